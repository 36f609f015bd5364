"""y = f(norm(x) W₁ᵀ + b₁) W₂ᵀ + b₂, perhaps added to a residual, of few sequences in one launch.

The programs of the first product are those of `project`; those of the second, beside them, hold their rows of W₂ and wait.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels.decode.common import ACTIVATIONS, NORMS, done, kind_of
from unisono_torch.kernels.decode.project import Finish, finished, rows_multiplied, rows_of
from unisono_torch.kernels.decode.tiles import Norm


@triton.jit
def pair(
    x, first, second, first_bias, second_bias, first_gain, first_shift, y, W, bias, residual, out, counters, gain, shift, normed, blocks, N,
    x_row, INNER: tl.constexpr, K: tl.constexpr, FIRST_NORM: tl.constexpr, FIRST_EPS: tl.constexpr, ACT: tl.constexpr,
    FIRST_BIAS: tl.constexpr, FIRST_ROWS: tl.constexpr, FIRST_COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr, KIND: tl.constexpr,
    STEPS: tl.constexpr, BATCH: tl.constexpr, PROGRAMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, NEXT: tl.constexpr,
    NEXT_EPS: tl.constexpr, SHARE: tl.constexpr, WHOLE: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [B, K], first and second [INNER, K] → y [B, INNER] by STEPS programs, see `rows_multiplied`; out [B, N] by PROGRAMS, see
    `finished`."""
    if tl.program_id(0) < STEPS:
        rows_multiplied(
            tl.program_id(0), x, first, second, first_bias, second_bias, first_gain, first_shift, x, y, x, x, x, INNER, x_row, INNER, K,
            SEQUENCES, FIRST_NORM, FIRST_EPS, ACT, FIRST_BIAS, False, 0, 1, False, KIND, EARLY, FIRST_ROWS, FIRST_COLUMNS,
        )  # fmt: skip
        done(counters, TOGETHER)
    else:
        finished(
            tl.program_id(0) - STEPS, y, W, bias, residual, out, counters, gain, shift, normed, blocks, N, INNER, BATCH, STEPS, PROGRAMS,
            HAS_BIAS, HAS_RESIDUAL, ROWS, COLUMNS, TALL, SPLIT, DOT, NEXT, NEXT_EPS, SHARE, WHOLE, TOGETHER, EARLY,
        )  # fmt: skip


def paired(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    norm: Norm,
    act: str,
    finish: Finish,
    residual: Tensor | None,
) -> Tensor:
    """x [B, K], weight [INNER, K] and, where `act` takes two products, second → what `finish` makes of them, on the residual."""
    (batch, k), n = x.shape, len(weight)
    kind, gain, shift, eps = norm
    y, rows = weight.new_empty((batch, n)), rows_of(n, k, second is not None)
    programs, out, given = finish.launched(triton.cdiv(n, rows), y, residual)
    pair[(programs,)](
        x, weight, second, bias, second_bias, gain, shift, y, x_row=x.stride(0), INNER=n, K=k, FIRST_NORM=NORMS[kind], FIRST_EPS=eps,
        ACT=ACTIVATIONS[act], FIRST_BIAS=bias is not None, FIRST_ROWS=rows, FIRST_COLUMNS=triton.next_power_of_2(k), SEQUENCES=batch,
        KIND=kind_of(weight.dtype), **given,
    )  # fmt: skip
    return finish.after(out, residual)
