"""Compiles what operators launch for an H100 that need not be there, says which kernels spill registers, and goes on with aot_decoding.
Run in a process without TRITON_INTERPRET: `python -m impl_torch.tests.kernels.aot_operators`; -v says of each kernel its registers, stack
and shared memory. Names of operators choose some, --capability another GPU: either leaves out decoding."""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from unisono_torch.kernels.diagonal_ssm import diagonal_ssm, discretised
from unisono_torch.kernels.linear_attention import linear_attention
from unisono_torch.kernels.linear_attention import operator as linear
from unisono_torch.kernels.mom_gru import loop
from unisono_torch.kernels.mom_gru import operator as cell
from unisono_torch.kernels.multiscale import multiscale
from unisono_torch.kernels.multiscale import operator as scales
from unisono_torch.kernels.multiscale.turned import turned as turned_at_once
from unisono_torch.kernels.narrow import narrow
from unisono_torch.kernels.rotary import turned
from unisono_torch.kernels.selective_scan import selective_scan
from unisono_torch.kernels.short_conv import short_conv
from unisono_torch.kernels.window import window
from unisono_torch.ops.mom_gru_loop import Sizes, Weights

from . import absent, aot_decoding

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LENGTH = 2048  # so that time is cut
BOOL = functools.partial(torch.zeros, dtype=torch.bool)


def real(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def of_short_conv(dtype: torch.dtype, taps: int, width: int, bias: bool, owner: bool, silu: bool) -> Any:
    x, state = real(2, 70, width, dtype=dtype), real(2, taps - 1, width)
    owners = torch.zeros((2, taps - 1 + 70), dtype=torch.int64) if owner else None
    return short_conv(x, real(width, 1, taps), real(width) if bias else None, state, owners, silu, dtype)


def of_narrow(dtype: torch.dtype, rows: int, into: int, out: int) -> Any:
    return narrow(real(2, rows, into, dtype=dtype), real(out, into), real(out))


def of_diagonal_ssm(dtype: torch.dtype, width: int, pairs: int, reset: bool, valid: bool, length: int = 70) -> Any:
    power, grown = discretised(real(width), real(width, pairs, 2))
    starts, lives = (BOOL(2, length) if there else None for there in (reset, valid))
    return diagonal_ssm(
        real(2, length, width, dtype=dtype), power, grown, real(width, pairs, 2), real(width), real(2, width, pairs, 2), starts, lives
    )


def of_selective_scan(dtype: torch.dtype, width: int, states: int, marked: bool, gated: bool) -> Any:
    u, dt, z = (real(1, LENGTH, width, dtype=dtype) for _ in range(3))
    B, C = (real(1, LENGTH, states, dtype=dtype) for _ in range(2))
    mark = BOOL(1, LENGTH) if marked else None
    given = u, dt, real(width, states), B, C, real(width), real(1, width, states)
    return selective_scan(*given, mark, mark, z=z if gated else None, softplus=gated, out_dtype=F32 if dtype == F16 else None)


def of_rotary(dtype: torch.dtype, width: int, feature_map: str, numerator: bool) -> Any:
    q, k = (real(2, 70, 3, width, dtype=dtype) for _ in range(2))
    angle = torch.zeros(1, 70, width // 2)
    return turned(q, k, angle, angle, feature_map, real(1) if feature_map == "learned" else None, numerator)


def of_linear_attention(dtype: torch.dtype, width: int) -> Any:
    q, k, v = (real(1, LENGTH, 2, width, dtype=dtype) for _ in range(3))
    return linear_attention(q, k, v, (real(1, 2, width, width), real(1, 2, width)), feature_map="elu1")


def of_taylor2(dtype: torch.dtype, marked: bool) -> Any:
    q, k, v = (real(1, LENGTH, 2, n, dtype=dtype) for n in (16, 16, 64))
    mark = BOOL(1, LENGTH) if marked else None
    return linear_attention(q, k, v, (real(1, 2, 273, 64), real(1, 2, 273)), mark, mark, "taylor2")


def of_window(dtype: torch.dtype, width: int) -> Any:
    q, k, v = (real(1, LENGTH, 2, width, dtype=dtype) for _ in range(3))
    keys, values = (real(1, 64, 2, width, dtype=dtype) for _ in range(2))
    return window(q, k, v, keys, values, torch.zeros(1, dtype=torch.int32))


def of_multiscale(dtype: torch.dtype, widths: tuple[int, int], scales: int, marked: bool, apart: bool) -> Any:
    """apart: q_norm and k_norm are not q and k, decays and weights each token's own."""
    (K, V), time = widths, LENGTH if apart else 1
    q, k, q_norm, k_norm = (real(1, LENGTH, 2, K, dtype=dtype) for _ in range(4))
    mark = BOOL(1, LENGTH) if marked else None
    state = real(1, scales, 2, K, V), real(1, scales, 2, K)
    decay, weight, v = real(1, time, scales), real(1, time, scales, 2, 1), real(1, LENGTH, 2, V, dtype=dtype)
    return multiscale(q, k, v, q_norm if apart else None, k_norm if apart else None, decay, weight, state, mark, mark)


def of_retention(dtype: torch.dtype, width: int) -> Any:
    """One decay that is fixed, of so many heads that time is not cut."""
    q, k, v = (real(1, LENGTH, 96, width, dtype=dtype) for _ in range(3))
    state = real(1, 1, 96, width, width), real(1, 1, 96, width)
    return multiscale(q, k, v, None, None, torch.zeros(1, 1, 1), torch.ones(1, 1, 1, 1, 1), state)


def of_mom_gru(batch: int, width: int, banks: int, slots: int, memory: int, hidden: int, separate: bool, drawn: bool, marked: bool) -> Any:
    known, after = hidden + memory, (3 if separate else 2) * memory + 1
    weights = Weights(
        real(known + 3 * width, width), real(known + 3 * width), real(known + 2 * width, width), real(3 * width, memory),
        real(width, width), real(after, width), real(after), real(banks, hidden), real(banks), real(banks * slots, memory),
    )  # fmt: skip
    mark = BOOL(3, batch) if marked else None
    noise = real(3, batch, banks) if drawn else None
    x = real(3, batch, width)
    return loop(real(batch, width), real(batch, banks * slots, memory), x, mark, mark, noise, Sizes(banks, slots, 0.7), weights)


def of_turned_multiscale(dtype: torch.dtype, width: int, scales: int, feature_map: str) -> Any:
    qkv, angle = real(1, LENGTH, 3, 2, width, dtype=dtype), torch.zeros(1, LENGTH, width // 2)
    state, tau = (real(1, scales, 2, width, width), real(1, scales, 2, width)), real(1) if feature_map == "learned" else None
    shares = real(1, 1, scales), real(1, LENGTH, scales, 1, 1)
    return turned_at_once(qkv, angle, angle, feature_map, tau, *shares, state, still=True)[0]


CALLS: tuple[tuple[Any, ...], ...] = (
    (of_short_conv, BF16, 4, 1536, True, False, True),  # Mamba's
    (of_short_conv, BF16, 4, 1536, True, True, True),
    (of_short_conv, F16, 4, 70, True, True, True),
    (of_short_conv, F32, 16, 70, False, True, False),
    (of_short_conv, F64, 1, 70, False, False, True),
    (of_narrow, BF16, LENGTH, 48, 1536),  # Mamba's Δ
    (of_narrow, BF16, 70, 9, 70),
    (of_diagonal_ssm, BF16, 512, 32, False, False, LENGTH),  # S4D's, by products
    (of_diagonal_ssm, F64, 70, 128, False, False, LENGTH),
    (of_diagonal_ssm, BF16, 512, 32, False, False),
    (of_diagonal_ssm, F16, 70, 1, True, False),
    (of_diagonal_ssm, F32, 70, 64, False, True),
    (of_diagonal_ssm, BF16, 70, 128, True, True),
    (of_diagonal_ssm, F64, 70, 128, True, True),
    (of_selective_scan, BF16, 1536, 16, False, True),  # Mamba's, where NVRTC is missing
    (of_selective_scan, F32, 70, 3, True, True),
    (of_selective_scan, F16, 70, 32, True, False),
    (of_selective_scan, BF16, 70, 64, True, True),
    (of_selective_scan, F64, 70, 16, False, True),
    (of_rotary, BF16, 64, "elu1", True),  # LAT's
    (of_rotary, F16, 256, "learned", True),
    (of_rotary, F32, 2, "learned", False),
    (of_rotary, BF16, 80, "relu", False),
    (of_rotary, F32, 48, "none", False),
    (of_linear_attention, BF16, 64),  # in Gluon, and 128
    (of_linear_attention, BF16, 128),
    (of_linear_attention, BF16, 256),
    (of_taylor2, BF16, False),  # Based's
    (of_taylor2, F32, True),
    (of_window, BF16, 128),
    (of_multiscale, BF16, (64, 64), 1, False, False),  # in Gluon
    (of_multiscale, BF16, (64, 64), 4, False, False),
    (of_retention, BF16, 64),
    (of_multiscale, BF16, (64, 64), 1, True, True),
    (of_multiscale, BF16, (16, 48), 8, True, False),
    (of_multiscale, BF16, (128, 128), 4, False, True),
    (of_turned_multiscale, BF16, 64, 4, "elu1"),  # InfinityFormer's, in Gluon
    (of_turned_multiscale, F16, 48, 2, "learned"),
    (of_multiscale, F16, (64, 64), 2, True, True),
    (of_multiscale, F32, (16, 16), 1, False, False),
    (of_mom_gru, 16, 640, 4, 128, 64, 32, False, False, False),  # MARU's, where NVRTC is missing
    (of_mom_gru, 3, 77, 5, 31, 23, 19, True, True, True),
    (of_mom_gru, 40, 100, 6, 256, 128, 32, True, True, True),
)


NAMES = sorted({call.__name__.removeprefix("of_") for call, *_ in CALLS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all of them")
    parser.add_argument("--capability", type=int, default=90, choices=sorted(absent.SHARED), help="compute capability times ten; 90")
    parser.add_argument("-v", action="store_true", help="say of each kernel what it takes")
    chosen = parser.parse_args()
    if unknown := sorted({*chosen.names} - {*NAMES}):
        parser.error(f"NAME: {', '.join(unknown)}; give {', '.join(NAMES)}")
    compiled: dict[str, absent.Compiled] = {}
    absent.install(compiled, chosen.capability)
    hopper = chosen.capability == 90
    linear.hopper = scales.hopper = lambda device: hopper  # pyright: ignore[reportPrivateImportUsage]
    cell._multiprocessors = lambda device: 132
    for call, *given in CALLS:
        if chosen.names and call.__name__.removeprefix("of_") not in chosen.names:
            continue
        if chosen.v:
            print(call.__name__, *given, flush=True)
        found = [a for a in tree_leaves(call(*given)) if a.requires_grad]
        torch.autograd.backward(found, [torch.zeros_like(a) for a in found])
    print(*(f"spills: {each}" for each in compiled.values() if each.stack), sep="\n")
    absent.finish(compiled, chosen.capability)
    if hopper and not chosen.names:
        aot_decoding.main()


if __name__ == "__main__":
    main()
