"""What a config says of its states, made once: each call of `generate` asks for it."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping

from unisono_spec.contract.base import Config, State


@functools.lru_cache(maxsize=64)
def known_states(config: Config, capacity: int | None = None) -> Mapping[str, State]:
    """`config.states(capacity)`."""
    return types.MappingProxyType(config.states(capacity))
