"""Which implementations the ops have here, as contract/implementations.py describes them; and whether those with kernels can run.

`python -m unisono_jax.registry` writes the table of docs/kernels.md.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Mapping

import jax
from unisono_spec.contract import InputError, nearest
from unisono_spec.contract.errors import shown
from unisono_spec.contract.implementations import PLAIN, Implementation, choices, plain, table

GPU = "cuda, or a CPU in Pallas' interpreter"
NARROW = ("float32", "bfloat16")
INTERPRET = "UNISONO_PALLAS_INTERPRET"  # 1 in the environment: kernels run on a CPU
IMPLEMENTATIONS = (
    *plain(
        {
            "decayed_sum": "a matmul in each chunk, by levels",
            "weighted_sum": "a matmul in each chunk, by levels",
            "linear_attention": "masked matmuls in chunks, states by a scan over chunks",
            "multiscale": "masked matmuls in chunks, states by a scan over chunks",
            "selective_scan": "a token after the other, on a GPU rows of √C tokens side by side; chunks made again for the gradient",
            "short_conv": "one shifted product a tap",
            "diagonal_ssm": "Toeplitz matmuls in chunks",
            "window": "a banded mask in chunks",
            "softmax_attention": "masked attention of C queries at a time, made again for the gradient",
            "mom_gru": "a scan over tokens, products with x before it, gradients of weights after it",
        },
        ("float64", "float32", "bfloat16", "float16"),
    ),
    Implementation("linear_attention", "pallas", ("bfloat16",), {"K": (1, 128), "V": (1, 128)}, how="one sweep each way", devices=GPU),
    Implementation("multiscale", "pallas", ("bfloat16",), {"K": (1, 128), "V": (1, 128)}, how="a sweep a scale each way", devices=GPU),
    Implementation("selective_scan", "pallas", NARROW, {"N": (1, 32)}, how="one sweep each way", devices=GPU),
    Implementation("diagonal_ssm", "pallas", NARROW, {"P": (1, 64)}, how="products a chunk, a channel a program", devices=GPU),
    Implementation("selective_scan", "jla", NARROW, {"N": (1, 32)}, how="jax-linear-attention's mamba1", devices="cuda, Hopper"),
)
_KERNELS = {(each.op, each.name): each for each in IMPLEMENTATIONS if each.name != PLAIN}
_log = logging.getLogger("unisono_jax")


def check_implementation(implementation: str) -> None:
    """Raises InputError where no op has `implementation`, or its kernels cannot run here."""
    known = choices(IMPLEMENTATIONS)
    if implementation not in known:
        raise InputError(f"implementation: {shown(implementation)} is unknown in JAX; {nearest(implementation, known)}")
    if implementation not in ("auto", PLAIN) and (why := unavailable(implementation)):
        raise InputError(f"implementation: {why}")


def chosen(implementation: str, op: str, dtype: object, widths: Mapping[str, int], size: int = 1) -> str:
    """Which implementation of `op` serves this call, of arrays with `size` elements.

    The one that is named, else InputError with the reason. For "auto", the fastest kernel that is here, on a GPU of the kind that it was
    measured on, where it can, else "plain", and a debug log that says why, once.
    """
    check_implementation(implementation)
    if implementation == PLAIN or not size:
        return PLAIN
    name = implementation
    if name == "auto":  # jla's, where somebody installed it: it is the faster one; inside a shard_map it was not tried
        theirs = (op, "jla") in _KERNELS and not unavailable("jla") and not divided()
        name = "jla" if theirs else "pallas"
    if (op, name) not in _KERNELS:
        raise InputError(f"implementation: {name!r} has no {op}; use 'auto' or 'plain'")
    if implementation == "auto" and interpreted():
        why = f"{op} has kernels for a GPU, not for a CPU"
    else:
        why = unavailable(name) or _KERNELS[op, name].why_not(str(dtype), widths, {})
    if why is None and implementation == "auto" and jax.device_count() > 1 and not divided():
        why = "XLA does not divide a kernel among several devices; a jax.shard_map does, and takes it"
    if why is None and implementation == "auto" and not _hopper():
        why = "kernels were measured on an H100, and may not fit another GPU; 'pallas' tries"
    if why is None:
        return name
    if implementation != "auto":
        raise InputError(f"implementation: {why}")
    _tell(op, why)
    return PLAIN


def interpreted() -> bool:
    """Whether kernels run in Pallas' interpreter."""
    return os.environ.get(INTERPRET) == "1" and jax.default_backend() == "cpu"


def divided() -> bool:
    """Whether arrays are those of one device: inside a shard_map over all axes of its mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)


def unavailable(name: str) -> str | None:
    """Why kernels of this name cannot run here."""
    if name == "jla":
        if _hopper() and importlib.util.find_spec("jla"):
            return None
        return "'jla' needs an H100 or H200 and jax-linear-attention (pip install unisono[jla]); use 'auto' or 'plain'"
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"'pallas' needs JAX with Pallas' Triton backend, which {jax.__version__} has not; use 'auto' or 'plain'"
    if jax.default_backend() != "gpu" and not interpreted():
        return f"'pallas' cannot run on {jax.default_backend()}; use 'auto' or 'plain', or a CUDA device (pip install unisono[jax-cuda])"
    return None


def _hopper() -> bool:
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"


@functools.cache  # once
def _tell(op: str, why: str) -> None:
    _log.debug("%s: plain operations, since %s", op, why)


if __name__ == "__main__":
    print(table(IMPLEMENTATIONS))
