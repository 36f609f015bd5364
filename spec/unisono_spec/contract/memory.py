"""Whether what a config asks for fits into this machine, asked before any of it is built."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from unisono_spec.contract.errors import InputError

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@functools.cache
def memory() -> int:
    """Bytes of memory that this process may use at most: the machine's, or its container's where that is less."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system says
        found = 1 << 48
    for path in _LIMITS:
        try:
            found = min(found, int(path.read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return found


def check_fits(size: int, what: str, remedy: str) -> None:
    """Raise InputError where `size` bytes are more than there is memory."""
    if size > memory():
        raise InputError(f"{what}: {_human(size)}, and this machine has {_human(memory())} of memory; {remedy}")


def _human(size: int) -> str:
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 10_000:
            return f"{size} {unit}"
        size //= 1000
    return f"{size} PB" if size < 10**6 else "more than 10^21 bytes"
