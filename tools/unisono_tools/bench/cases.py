"""What is timed: shapes and dtypes as data, with the fewest bytes each must move."""

from __future__ import annotations

import dataclasses

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    op: str  # "decayed_sum" or "weighted_sum"
    batch: int
    length: int
    width: int
    dtype: str  # of x and its gradient
    out_dtype: str  # of ξ and its gradient
    decay: float = 0.5  # of a decayed sum

    @property
    def name(self) -> str:
        op = f"{self.op} λ={self.decay:g}" if self.op == "decayed_sum" else self.op
        return f"{op}, B{self.batch} T{self.length} D{self.width}, {self.dtype} → {self.out_dtype}"

    @property
    def elements(self) -> int:
        return self.batch * self.length * self.width

    def floor_bytes(self) -> tuple[int, int]:
        """Forward reads x and writes ξ; backward reads x and ∂ξ and writes ∂x. Weights add one float32 a token, each way."""
        x, xi = BYTES[self.dtype] * self.elements, BYTES[self.out_dtype] * self.elements
        weights = 4 * self.batch * self.length if self.op == "weighted_sum" else 0
        return x + xi + weights, 2 * x + xi + 2 * weights


def _both(*sizes, **more) -> list[Case]:
    return [Case(op, *sizes, **more) for op in ("decayed_sum", "weighted_sum")]


SUITES = {
    "cram": [
        *_both(8, 16384, 1024, "bfloat16", "bfloat16"),
        *_both(8, 16384, 1024, "bfloat16", "float32"),
        *_both(8, 4096, 1024, "bfloat16", "bfloat16"),
        Case("decayed_sum", 8, 4096, 1024, "float32", "float32"),
        Case("decayed_sum", 8, 4096, 1024, "float16", "float16"),
        Case("decayed_sum", 8, 16384, 1024, "bfloat16", "bfloat16", decay=0.9),
        Case("decayed_sum", 8, 16384, 1024, "bfloat16", "bfloat16", decay=0.999),
        Case("decayed_sum", 1, 131072, 1024, "bfloat16", "bfloat16"),
        Case("decayed_sum", 64, 512, 1060, "bfloat16", "bfloat16"),
    ],
    # for a CPU, and to see that the benchmark itself works
    "small": [*_both(2, 128, 32, "bfloat16", "float32"), *_both(1, 256, 16, "float32", "float32")],
}
