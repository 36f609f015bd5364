"""Features that a kernel makes of two numbers at a time, in PTX, which Triton's interpreter does not know: done here as it is written."""

from __future__ import annotations

import re

import numpy as np
import torch
from unisono_torch.kernels.linear_attention import hopper_forward

LOG2E = 1.4426950408889634
BF16 = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.bfloat16)  # every number, both zeros, infinities and NaN


def by(name: str, *operands: np.ndarray) -> np.ndarray:
    """What an instruction makes of 32-bit registers."""
    wide = [a.view(np.float32) for a in operands]
    halves = [torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16) for a in operands]
    of_halves = {
        "min.NaN.bf16x2": torch.minimum,
        "max.NaN.bf16x2": torch.maximum,
        "fma.rn.bf16x2": lambda a, b, c: (a.double() * b.double() + c.double()).float().bfloat16(),
    }
    if name in of_halves:
        return of_halves[name](*halves).view(torch.int16).numpy().view(np.uint32)
    if name == "cvt.rn.bf16x2.f32":  # the first operand is the upper half
        return (
            torch.stack([torch.from_numpy(a.copy()).bfloat16() for a in wide[::-1]], -1).view(torch.int16).numpy().view(np.uint32).ravel()
        )
    if name == "ex2.approx.ftz.f32":
        power = np.exp2(wide[0])
        return np.where(power < np.finfo(np.float32).tiny, np.float32(0), power).view(np.uint32)
    return {
        "mov.b32": lambda a: a,
        "shl.b32": lambda a, b: a << b,
        "and.b32": lambda a, b: a & b,
        "mul.f32": lambda a, b: (a.view(np.float32) * b.view(np.float32)).view(np.uint32),
    }[name](*operands)


def run(text: str, given: np.ndarray) -> np.ndarray:
    """$0 of $1."""
    registers = {"$1": given}

    def value(operand: str) -> np.ndarray:
        if operand in registers:
            return registers[operand]
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return np.full_like(given, number)

    for line in text.strip("{}\n").split("\n"):
        parts = re.fullmatch(r"(\S+) (.*);", line.strip())
        assert parts is not None
        name, operands = parts.groups()
        if name == ".reg":
            continue
        target, *sources = operands.split(", ")
        registers[target] = by(name, *map(value, sources))
    return registers["$0"]


def test_elu1_of_two_is_elu1_of_each():
    first, second = BF16, BF16.flip(0)
    with np.errstate(all="ignore"):
        made = run(hopper_forward.ELU1_OF_TWO.value, torch.stack([first, second], -1).view(torch.int16).numpy().view(np.uint32).ravel())
    found = torch.from_numpy(made.view(np.int16).copy()).view(torch.bfloat16).reshape(-1, 2)
    for column, x in zip(found.unbind(1), (first.float(), second.float()), strict=True):
        small = torch.exp2(torch.where(x > 0, 0.0, x) * LOG2E)
        small = torch.where(small < torch.finfo(torch.float32).tiny, 0.0, small)  # e^x that float32 does not hold
        exact = torch.maximum(x + 1, small).bfloat16()
        assert torch.equal(column.isnan(), exact.isnan())
        live = ~exact.isnan()
        assert torch.equal(column[live], exact[live])
