"""Which implementations an op has beside the plain one, and what they serve. Data: reading it needs neither Triton nor a GPU.

Everything that asks about kernels asks here: the ops (`implementation=`), the court's adapter, the benchmarks, docs/kernels.md
(`python -m unisono_torch.kernels.registry` writes its table).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of an op.

    dtypes: of its inputs. widths: by axis (K, V), the least and the most. settings: what else it takes, by argument; an argument that
    is not named here may be anything.
    """

    op: str
    name: str
    dtypes: tuple[torch.dtype, ...]
    widths: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, tuple[object, ...]] = dataclasses.field(default_factory=dict)

    def why_not(self, device: torch.device, dtype: torch.dtype, widths: Mapping[str, int], settings: Mapping[str, object]) -> str | None:
        """Why it cannot serve such a call and what would help; None where it can."""
        if not available(device):
            return (
                f"{self.name!r} cannot run on {device.type}; use 'auto' or 'plain', or a CUDA device with triton installed "
                "(pip install unisono[torch-cuda]), or Triton's interpreter (TRITON_INTERPRET=1 in the environment)"
            )
        if dtype not in self.dtypes:
            return f"{self.name!r} serves {self.op} in {_names(self.dtypes)}, not in {_names((dtype,))}; use 'auto' or 'plain'"
        for axis, (least, most) in self.widths.items():
            if not least <= widths[axis] <= most:
                return f"{self.name!r} serves {self.op} with {axis} from {least} to {most}, not {widths[axis]}; use 'auto' or 'plain'"
        for name, values in self.settings.items():
            if settings[name] not in values:
                return f"{self.name!r} serves {self.op} with {name} of {values}, not {settings[name]!r}; use 'auto' or 'plain'"
        return None


IMPLEMENTATIONS = (
    Implementation("decayed_sum", "triton", FLOATS),
    Implementation("weighted_sum", "triton", FLOATS),
    Implementation(
        "linear_attention",
        "triton",
        FLOATS[1:],
        {"K": (1, 256), "V": (1, 256)},
        {"feature_map": ("none", "elu1", "relu", "learned"), "one_dtype": (True,)},
    ),
    Implementation("multiscale", "triton", FLOATS[1:], {"K": (1, 128), "V": (1, 128), "scales": (1, 8)}),
    Implementation("selective_scan", "triton", FLOATS, widths={"N": (1, 64)}),
    Implementation("short_conv", "triton", FLOATS, widths={"w": (1, 16)}),
    Implementation("diagonal_ssm", "triton", FLOATS, widths={"P": (1, 128)}),
)
REGISTRY: Mapping[tuple[str, str], Implementation] = {(each.op, each.name): each for each in IMPLEMENTATIONS}


@torch.compiler.assume_constant_result  # a compiler cannot look for modules
def available(device: torch.device | str) -> bool:
    """Whether the kernels run on `device`: a GPU with Triton installed, or the CPU under Triton's interpreter (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return False
    kind = torch.device(device).type
    return interpreted() if kind == "cpu" else kind == "cuda" and torch.cuda.is_available() and not interpreted()


def interpreted() -> bool:
    """Whether Triton's functions run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def served(name: str) -> dict[str, tuple[str, ...]]:
    """The ops that have the implementation `name`, with the names of their dtypes."""
    return {each.op: tuple(str(d).removeprefix("torch.") for d in each.dtypes) for each in IMPLEMENTATIONS if each.name == name}


def table() -> str:
    """The registry in Markdown."""
    lines = ["| op | implementation | dtypes | widths | settings |", "|---|---|---|---|---|"]
    for each in IMPLEMENTATIONS:
        widths = ", ".join(f"{axis} {least}–{most}" for axis, (least, most) in each.widths.items()) or "any"
        settings = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in each.settings.items()) or "any"
        lines.append(f"| `{each.op}` | {each.name} | {_names(each.dtypes)} | {widths} | {settings} |")
    return "\n".join(lines)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


if __name__ == "__main__":
    print(table())
