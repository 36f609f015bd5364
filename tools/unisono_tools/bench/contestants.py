"""Which of our own implementations a benchmark times: those that the rooms' registries have for its op, dtype and widths."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

from unisono_spec.contract.implementations import PLAIN


def serving(
    room: str, op: str, device: str, dtype: str, widths: Mapping[str, int] | None = None, settings: Mapping[str, object] | None = None
) -> list[str]:
    """Names for `implementation=`, kernels first; none where the room ("torch", "jax") has no framework here."""
    if importlib.util.find_spec(room) is None:
        return []
    given = widths or {}, settings or {}
    if room == "jax":
        registry = importlib.import_module("unisono_jax.registry")
        rows = [each for each in registry.IMPLEMENTATIONS if each.op == op and (each.name == PLAIN or not registry.unavailable(each.name))]
        found = [each.name for each in rows if each.why_not(dtype, *given) is None]
    else:
        import torch
        from unisono_torch.kernels import registry

        place, kind = torch.device(device), getattr(torch, dtype)
        found = [each.name for each in registry.IMPLEMENTATIONS if each.op == op and not registry.why_not(each, place, kind, *given)]
    return sorted(found, key=lambda name: name == PLAIN)
