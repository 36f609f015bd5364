"""The only place with a tolerance. docs/conformance.md tells the same derivation at leisure.

**Ops.** A computed sum of n products errs by at most γ_n Σ|terms| (Higham, Accuracy and Stability, 2nd ed., section 3.1), and by
about √n·u Σ|terms| when roundings are independent. Each element of an op's output is therefore held to

    |y − y*| ≤ (c₁ · roundings · u(dtype) + c₂ · √T · u(state dtype)) · Σ|terms|

where y* is the float64 spec on the inputs as the implementation gets them (already rounded to dtype), T the length of the sum, and
`roundings` how often the contract lets a value be rounded to dtype: never for ξ and states, which are float32 or wider; once for a
gradient that is handed back in the dtype of its input.

c₁ = 2: rounding to nearest errs by at most u; once more for the value that is rounded, being off itself.
c₂ = 8: a term (1−λ) λⁿ σ(x) takes about seven roundings (x/2, tanh or exp, sum, quotient; λⁿ; two products), and one to be added.
Gradients run the chain twice, forward and backward: c₁ and c₂ are doubled.

**Models.** A bound along a whole network is too wide to be useful, so rounding itself is asked what it costs: the spec is evaluated
REALISATIONS times in float32, with each value that a layer hands on multiplied by 1 + u(dtype)·r, r uniform in [−1, 1] (Monte Carlo
arithmetic: Parker 1997). Rounding is a function of the value, and so is r: of a token that comes back the same errors add up.
A row (the logits of one token, or one row of a state) is held to SHARE = 2 times the largest error seen
among its elements and the realisations, plus the floor of the op formula with one rounding, whose terms are the row's largest
|y*|: no accident makes the budget smaller than the rounding of the answer. A row has one or two
independent errors, so a single realisation can err by nearly nothing: the largest of 32 is rarely below 1.7 standard deviations.
Among the realisations are a few whose parameters err by ELEMENTARY u(float32), and no layer rounds: the error of a function of a parameter
is the same at every token. What is computed from a number that nothing has rounded, a parameter or an embedding, would err in all
realisations alike, as NumPy happens to, and in an implementation otherwise, at every token that comes back in the same way: over n
tokens by n δ, not by √n δ. So a case names functions inside ops that err in realisations as well, alike for like arguments.
(A long sequence gets fewer realisations; a token's error is then the largest among as many neighbours as make 32.)
The realisations use the recurrent form, whose running sums err most (of long sequences, the parallel one).
A float64 implementation is held to the float32 estimate times u(float64)/u(float32), since first-order errors scale with u, and
that twice, in both formulas: y* is float64 too, and errs as much as what it judges.

**Gradients of models** are judged by directional derivatives: the float64 spec by the complex step (no autodiff, no cancellation),
its realisations in complex64, where the real and the imaginary part are perturbed apart. They err as forward mode does, along the
values; reverse mode adds the roundings of its way back, so the share is doubled like c₁ and c₂.

A budget above LIMIT of the values would accept nonsense: it is an error of the test, not a pass. (The values are those of the
row, or of the average row where that is larger: a row that is small by accident does not make a test useless; nor do a few rows that a
norm over nearly equal numbers leaves without information.)
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from unisono_spec.contract.base import DTYPES, state_dtype

# Unit roundoff: half the distance between 1 and the next number.
U = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}

# Where a format has lost its digits, and an error is absolute: float16's smallest numbers lie 2^-24 apart, which a rounding and the value
# being off take half of each; of the others, what lies below the smallest normal number may be flushed to zero.
TINY = {"float64": 2.0**-1022, "float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}

C1, C2 = 2.0, 8.0
GRADIENT = 2.0  # times c₁, c₂ and SHARE, for gradients
SHARE = 2.0
TWO_PARTIES = 2.0
REALISATIONS, TOKENS = 32, 10_000  # of a long sequence, no more realisations than hold so many tokens, and at least 4
LIMIT, USELESS = 0.1, 0.1

# The spec on another machine, whose BLAS sums in another order and whose libm rounds differently, through whole models: reference
# vectors are held to ten times the formula for one op.
OTHER_MACHINE = 10.0

# What e^x, tanh and their like err by in frameworks, in units of u (XLA and torch say 1 to 2 units in the last place). An error in a
# function of a parameter, such as a decay, is the same at every token: it adds up where independent roundings do not.
ELEMENTARY, MOVES = 4.0, 4

# The roundings that end σ(x) = 1 / (1 + e^−x): of the sum and of the quotient.
SIGMOID = 2.0

# The complex step: Im f(x + ih)/h errs by O(h²). 2^-66 keeps products of two steps far below rounding, and one step above
# underflow, in complex64 too.
STEP = 2.0**-66


class BudgetError(Exception):
    """The budget is so wide that the comparison proves nothing: the test is wrong, not the implementation."""


def formula(dtype: str, length: int, roundings: int = 0, gradient: bool = False) -> float:
    """The factor of the row's sum of absolute terms."""
    factor = C1 * roundings * U[dtype] + C2 * np.sqrt(max(length, 1)) * U[state_dtype(dtype)]
    return float(factor * (GRADIENT if gradient else 1) * (TWO_PARTIES if dtype == "float64" else 1))


def widened(dtype: str, length: int, roundings: int, instead_of: int = 0, gradient: bool = False) -> float:
    """What the budget of an op with `instead_of` roundings is multiplied by, where it may have `roundings`."""
    return formula(dtype, length, max(roundings, instead_of), gradient) / formula(dtype, length, instead_of, gradient)


def realisations(length: int) -> int:
    return max(4, min(REALISATIONS, TOKENS // max(length, 1)))


def perturbation(dtype: str, seed: int = 0, roundings: float = 1.0):
    """What the spec applies to each value that a layer hands on. Rows of a batch are independent realisations, and so are seeds."""
    u = roundings * U["float32" if dtype == "float64" else dtype]

    def perturbed(x: np.ndarray) -> np.ndarray:
        if x.dtype.kind == "c":
            real, imag = (part * (1 + u * _uniform(part, seed)) for part in (np.real(x), np.imag(x)))
            return (real + 1j * imag).astype(x.dtype)
        return (x * (1 + u * _uniform(x, seed))).astype(x.dtype)

    return perturbed


def alike(x: np.ndarray, roundings: float) -> np.ndarray:
    """What a function of x in float32 errs by, relative to its value: up to so many u, and alike for like x in one row of a batch."""
    return roundings * U["float32"] * _uniform(np.real(x), 0)


def _uniform(x: np.ndarray, seed: int) -> np.ndarray:
    """r in [−1, 1), a hash (splitmix64) of each value's bits, its row and the seed: as any rounding, the same for the same value."""
    x = np.ascontiguousarray(x)
    z = x.view(f"u{x.itemsize}").astype(np.uint64)
    z += ((np.arange(len(x), dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)).reshape(-1, *(1,) * (x.ndim - 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-52 - 1


def moved(params: dict[str, np.ndarray], length: int) -> list[dict[str, np.ndarray]]:
    """Parameters that err as elementary functions of them do in frameworks' float32."""
    random = np.random.Generator(np.random.Philox(length))
    number = MOVES if length < 1000 else MOVES // 2

    def errs(p: np.ndarray) -> np.ndarray:
        return p.astype(np.float64) * (1 + ELEMENTARY * U["float32"] * random.uniform(-1, 1, p.shape))

    return [{name: errs(p) for name, p in params.items()} for _ in range(number)]


def scale_to(dtype: str) -> float:
    """What an error estimated with float32 arithmetic is multiplied by."""
    return TWO_PARTIES * U["float64"] / U["float32"] if dtype == "float64" else 1.0


def estimate_dtype(dtype: str) -> str:
    """Where errors are estimated: float64 implementations by float32 arithmetic."""
    return "float32" if dtype == "float64" else dtype


def row_budget(
    truth: np.ndarray, errors: np.ndarray, dtype: str, length: int, gradient: bool = False, sequence: bool = False
) -> np.ndarray:
    """The budget of each row [..., 1] of `truth` [..., width], from the errors [realisation, ..., width].

    sequence: rows are tokens [B, T, width], and what realisations lack is made up for by neighbouring tokens.
    """
    largest = np.abs(errors).max((0, -1), initial=0)
    if sequence and len(errors) < REALISATIONS:
        largest = _largest_near(largest, -(-REALISATIONS // len(errors)))
    largest = largest[..., None]
    scale = np.abs(truth).max(-1, keepdims=True, initial=0)
    return SHARE * (GRADIENT if gradient else 1) * largest * scale_to(dtype) + formula(dtype, length, 1, gradient) * scale


def _largest_near(a: np.ndarray, width: int) -> np.ndarray:
    """The largest of each `width` neighbours along the last axis, of which the middle one is the element itself."""
    before = width // 2
    padded = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(before, width - 1 - before)])
    return np.lib.stride_tricks.sliding_window_view(padded, width, -1).max(-1)


def check_useful(budget: np.ndarray, scale: np.ndarray, what: str) -> None:
    """Raise BudgetError where more than USELESS of the budgets (but for one) exceed LIMIT of the scale of what they judge."""
    if not budget.size:
        return
    ratio = budget / np.maximum(np.maximum(scale, scale.mean()), np.finfo(np.float64).tiny)
    if (ratio > LIMIT).sum() > max(1, USELESS * ratio.size):
        raise BudgetError(f"{what}: the budget is up to {ratio.max():.2g} of the value, above {LIMIT}; choose inputs that say more")


def share(found: np.ndarray, truth: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """|found − truth| / budget, elementwise; infinite where found is not finite, or errs without a budget."""
    found = np.asarray(found).astype(np.float64)
    budget = np.broadcast_to(budget, truth.shape)
    error = np.abs(found - truth)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(error == 0, 0.0, error / budget)
    return np.where(np.isfinite(found), ratio, np.inf)


def representable(a: np.ndarray, dtype: str) -> np.ndarray:
    """`a` rounded to `dtype`, held in the state dtype of `dtype`."""
    return a.astype(DTYPES[dtype]).astype(DTYPES[state_dtype(dtype)])


def visible_reach(decay: float, contrast: float, dtype: str) -> int:
    """How many tokens back a change of `contrast` in one term still moves a decayed sum that lies in [½, 1).

    The term weighs (1−λ)λⁿ·contrast; numbers in [½, 1) lie u(dtype) apart. Two tokens less than that count: the roundings
    of the tokens since may have absorbed the last unit.
    """
    return max(1, int(np.floor(np.log(U[dtype] / ((1 - decay) * contrast)) / np.log(decay))) - 2)


# What tests beside the court's properties compare with. Worst cases, where they are small; statistics of seeded draws.

SIGMAS = 5.0


def rounding(dtype: str, roundings: int) -> float:
    """Of the value: what so many roundings of it cost at most, to first order, in any order and on any machine."""
    return roundings * U[dtype]


def forms(terms: int = 2**8, ops: int = 2**4, spread: int = 2**4) -> float:
    """Of the largest value: how far two float64 programs for one function may differ.

    Each op's sum of at most `terms` products errs by at most γ_terms Σ|terms| (Higham, section 3.1), through at most `ops` ops one
    after another, whose Σ|terms| is at most `spread` times their result. The defaults are for whole models of tests: 2⁻³⁶.
    """
    return TWO_PARTIES * rounding("float64", terms * ops * spread)


def mistake() -> float:
    """Of the largest value: what differs by more is another function, not another order: 2⁶ times what forms may differ by."""
    return 2**6 * forms()


# A central difference with step h errs by h²/6 of a third derivative and by u/h of the value: least at h = u^⅓.
DIFFERENCE_STEP = U["float64"] ** (1 / 3)


def difference(third: int = 2**14) -> float:
    """Of the largest value: the error of a central difference, where third derivatives are at most `third` times the values."""
    return third * DIFFERENCE_STEP**2


def sampling(count: int, deviation: Any = 1.0) -> Any:
    """What the mean of `count` independent draws may be off by, SIGMAS standard deviations; a deviation of n draws is known like a
    mean of 2n."""
    return SIGMAS * deviation / np.sqrt(count)


def printed(digits: int) -> float:
    """What two numbers may differ by when printed with so many decimals, if they differ by less than that before: one unit."""
    return (1 + forms()) * 10.0**-digits


def kernel(
    dtype: str, accumulator: str, length: int, width: int, largest_x: float, largest: float, truncated: bool = False
) -> tuple[float, float]:
    """How far a sum's kernel may be off: the factor of Σ|terms| of an output in `dtype`, and what is added to it.

    Every term of every output is a product of positive coefficients, so Σ|terms| is the same function of absolute values. A term
    meets at most 2T roundings on its way down the sum (and `width` in a row sum); they accumulate as their square root, times 4
    with overwhelming probability (Higham & Mary 2019, theorem 2.4). Besides: e^x is off by |x| u, the sigmoid, its slope and the
    weights by 12 roundings, the rounded λ by one for each token by which a term of a chunk of at most 16 is older or younger than they
    are on average. A halo omits 2^−64 of the largest input. The output's own rounding comes last (`truncated`: towards zero), or its
    smallest subnormal.
    """
    roundings = 12 + 8 + largest_x + 4 * float(np.sqrt(2 * length + width))
    last = U[dtype] * (2 if truncated else 1)
    smallest = ml_dtypes.finfo(DTYPES[dtype]).smallest_subnormal if dtype in ("bfloat16", "float16") else np.finfo(dtype).smallest_normal
    halo = 2.0 ** (-128 if accumulator == "float64" else -64)
    return roundings * U[accumulator] + last, halo * largest + float(smallest)


def jitter(params: dict[str, np.ndarray], seed: int, dtype: str = "float64") -> dict[str, np.ndarray]:
    """Parameters that err by ELEMENTARY u(dtype) each, for realisations of a training that errs so before each step."""
    random = np.random.Generator(np.random.Philox(seed))
    return {name: p * (1 + ELEMENTARY * U[dtype] * random.uniform(-1, 1, p.shape)) for name, p in params.items()}


def training(errors: float, scale: float, terms: int) -> float:
    """How far two trainings in float64 may end from one another, in numbers as large as `scale` that sum up `terms` others.

    Adam divides by the root of a gradient's square, so that a coordinate whose gradient cancels errs as much as it moves: no bound a
    priori is of use, and realisations are asked again. `errors` is the largest of several whose parameters err before each step.
    """
    return TWO_PARTIES * SHARE * errors + formula("float64", terms) * scale
