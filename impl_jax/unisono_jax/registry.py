"""Which implementations the ops have here, as contract/implementations.py describes them.

`python -m unisono_jax.registry` writes the table of docs/kernels.md.
"""

from __future__ import annotations

from unisono_spec.contract import InputError, nearest
from unisono_spec.contract.errors import shown
from unisono_spec.contract.implementations import choices, plain, table

IMPLEMENTATIONS = plain(
    {
        "decayed_sum": "a matmul in each chunk, by levels",
        "weighted_sum": "a matmul in each chunk, by levels",
        "linear_attention": "masked matmuls in chunks, states by a scan over chunks",
        "multiscale": "masked matmuls in chunks, states by a scan over chunks",
        "selective_scan": "rows of √C tokens, composed side by side; a scan over chunks, made again for the gradient",
        "short_conv": "one shifted product a tap",
        "diagonal_ssm": "Toeplitz matmuls in chunks",
        "window": "a banded mask in chunks",
        "softmax_attention": "masked attention of C queries at a time, made again for the gradient",
        "mom_gru": "a scan over tokens, products with x before it",
    },
    ("float64", "float32", "bfloat16", "float16"),
)


def check_implementation(implementation: str) -> None:
    """Raises InputError where no op has `implementation`. "auto" is "plain", the one that XLA compiles on every device."""
    known = choices(IMPLEMENTATIONS)
    if implementation not in known:
        raise InputError(f"implementation: {shown(implementation)} is unknown in JAX; {nearest(implementation, known)}")


if __name__ == "__main__":
    print(table(IMPLEMENTATIONS))
