"""What the kernels should compute: a fold over tokens in float64, and how far rounding may take them from it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import torch
from torch import Tensor
from unisono_conformance import numerics


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    width: int
    dtype: torch.dtype
    decay: float | None  # None: a weighted sum
    exclusive: bool
    initial: bool
    reset: bool
    valid: bool
    shortest: int  # tokens a segment, at least

    def __str__(self) -> str:
        kind = ("exclusive" if self.exclusive else "weighted") if self.decay is None else f"decay{self.decay:g}"
        marks = "".join(f"-{name}" for name in ("initial", "reset", "valid") if getattr(self, name))
        return f"{self.batch}x{self.length}x{self.width}-{str(self.dtype)[6:]}-{kind}{marks}-{self.shortest}"


def draw_cases(seed: int, count: int, batches: tuple, lengths: tuple, widths: tuple, shortest: tuple) -> list[Case]:
    """A lattice's points in random order; every value of each axis comes up before one comes twice."""
    pick = random.Random(seed)
    axes = {
        "batch": batches,
        "length": lengths,
        "width": widths,
        "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
        "kind": ((0.5, False), (None, False), (0.9, False), (None, True), (0.999, False), (1e-3, False)),
        "initial": (True, False),
        "reset": (True, False),
        "valid": (False, True),
        "shortest": shortest,
    }
    columns = {}
    for name, values in axes.items():
        rounds = (pick.sample(values, len(values)) for _ in itertools.count())
        columns[name] = list(itertools.islice(itertools.chain.from_iterable(rounds), count))
    kinds = columns.pop("kind")
    return [
        Case(decay=decay, exclusive=exclusive, **{name: column[i] for name, column in columns.items()})
        for i, (decay, exclusive) in enumerate(kinds)
    ]


SMALL = draw_cases(0, 24, batches=(1, 2, 3), lengths=(1, 7, 8, 33, 50, 72), widths=(1, 3, 16, 20, 33), shortest=(8, 16, 4096))
# with one long enough for a halo in float32 at λ = ½, in which its last segment lies whole; one sequence has a reset just before that
SMALL.append(Case(2, 131, 9, torch.float32, 0.5, False, True, True, False, 128))
LARGE = draw_cases(
    1, 96, batches=(1, 2, 5), lengths=(1, 17, 255, 1000, 2048), widths=(1, 8, 60, 128, 300, 1060), shortest=(16, 64, 256, 4096)
)


def inputs(case: Case, seed: int, device: str) -> dict[str, Any]:
    """x, s, initial, reset, valid. Tokens that are not valid hold NaN or infinity."""
    made = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.length)
    x = 4 * torch.randn(*shape, case.width, generator=made, dtype=torch.float64)
    s = torch.randn(shape, generator=made, dtype=torch.float64) if case.decay is None else None
    valid = torch.rand(shape, generator=made) < 0.8 if case.valid else None
    if valid is not None:
        x = torch.where(valid[..., None], x, torch.tensor([math.nan, math.inf, -math.inf])[torch.arange(case.width) % 3])
        s = None if s is None else torch.where(valid, s, math.nan)
    reset = torch.rand(shape, generator=made) < 0.1 if case.reset else None
    if reset is not None:
        reset[1:, 0] = True
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    tensors = {
        "x": x.to(case.dtype),
        "s": None if s is None else s.to(wide),
        "initial": torch.randn(case.batch, case.width, generator=made, dtype=torch.float64).to(wide) if case.initial else None,
        "reset": reset,
        "valid": valid,
    }
    return {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}


def sigmoid(x: Tensor) -> Tensor:
    """σ whose slope e / (1+e)² keeps its digits where σ is near 1; that of torch.sigmoid, σ (1−σ), does not."""
    e = torch.exp(torch.where(x < 0, x, -x))
    return torch.where(x < 0, e / (1 + e), 1 / (1 + e))


def fold(
    x: Tensor, s: Tensor | None, initial: Tensor | None, reset: Tensor | None, valid: Tensor | None, decay: float | None, exclusive: bool
) -> tuple[Tensor, Tensor]:
    """eqs 5 and 10, token by token."""
    state, out = x.new_zeros(x.shape[0], x.shape[2]) if initial is None else initial, []
    for t in range(x.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None], 0, state)
        token, gain = x[:, t], (1 - decay if s is None else s[:, t, None])  # type: ignore[operator]
        if valid is not None:
            token = torch.where(valid[:, t, None], token, 0)
            gain = gain if s is None else torch.where(valid[:, t, None], gain, 0)
        after = (1 if decay is None else decay) * state + gain * sigmoid(token)
        if valid is not None:
            after = torch.where(valid[:, t, None], after, state)
        out.append(state if exclusive else after)
        state = after
    return torch.stack(out, 1), state


def differentiate(function, tensors: dict[str, Any], upstream: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """`function(**tensors) → (ξ, final)` and its vector-Jacobian product."""
    leaves = {name: tensors[name] for name in ("x", "s", "initial") if tensors[name] is not None}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    xi, final = function(**{**tensors, **leaves})
    outputs = [o for o in (xi, final) if o.requires_grad]  # an exclusive ξ of one token has no gradient
    chosen = [u.to(o.dtype) for u, o in zip(upstream, (xi, final), strict=True) if o.requires_grad]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), chosen)
    return {"xi": xi.detach(), "final": final.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def absolute(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None or tensor.dtype == torch.bool else tensor.abs()


def bound(terms: Tensor, dtype: torch.dtype, accumulator: torch.dtype, length: int, width: int, largest_x: float, largest: float) -> Tensor:
    """How far an output of `dtype` may lie from the exact one, given the sum of its terms' absolute values (numerics.kernel)."""
    truncated = dtype == torch.bfloat16 and terms.device.type == "cpu"  # by Triton's interpreter
    out, sums = (str(d).removeprefix("torch.") for d in (dtype, accumulator))
    factor, floor = numerics.kernel(out, sums, length, width, largest_x, largest, truncated)
    return factor * terms + floor
