"""Mails of an archive: their bodies, and each only once."""

from __future__ import annotations

import collections
import email
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

WORDS = 5  # that a shingle has
ALIKE = 0.5  # share of two mails' shingles that they have in common, from which on they are one
READ = 4096  # bytes that are compared


def bodies(archive: Path) -> Iterator[tuple[bytes, bool]]:
    """(body, whether it is spam) of each data/GROUP/*.txt, in the order of names; the headers would tell.

    Text parts alone, decoded from base64 or quoted-printable.
    """
    with tarfile.open(archive) as tar:
        members = {m.name: m for m in tar.getmembers() if m.isfile() and m.name.endswith(".txt") and "/data/" in m.name}
        for name in sorted(members):
            file = tar.extractfile(members[name])
            mail = email.message_from_bytes(file.read() if file else b"")
            texts = [p.get_payload(decode=True) for p in mail.walk() if p.get_content_maintype() == "text"]
            yield b"\n".join(t for t in texts if isinstance(t, bytes)).strip(), name.split("/")[-2].startswith("spam")


def distinct(mails: Iterable[tuple[bytes, bool]]) -> list[tuple[bytes, bool]]:
    """Those that are not empty and not nearly like one before: the Jaccard index of their runs of 5 words (Broder 1997) is below a half."""
    kept: list[tuple[bytes, bool]] = []
    sizes: list[int] = []
    having: dict[bytes, list[int]] = collections.defaultdict(list)
    for text, spam in mails:
        words = re.findall(rb"[a-z]+", text[:READ].lower())
        runs = {b" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}
        shared = collections.Counter(i for run in runs for i in having.get(run, ()))
        if not text or any(n >= ALIKE * (len(runs) + sizes[i] - n) for i, n in shared.items()):
            continue
        for run in runs:
            having[run].append(len(kept))
        kept.append((text, spam))
        sizes.append(len(runs))
    return kept
