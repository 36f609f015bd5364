"""S4D by matrix products, both ways: chunks.py's kernels and the products between them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from unisono_torch.kernels.registry import interpreted

CHUNK, WIDE_CHUNK, WIDE = 64, 128, 32  # tokens, and those of states of more than so many pairs
# tokens of a sequence, or of all: of fewer, a channel's matrix costs more than a sweep's one token after the other
LONG, MANY = 1024, 8192
SHORTEST = 128
TOKENS, KERNEL_ROWS, POWERS = 64, 32, 512  # at most, of a program: tokens of a tile, rows of K, complex powers of all pairs
_lock = threading.RLock()  # what is chosen is the process's, and each device's gradients have a thread


def chunk(pairs: int) -> int:
    """Tokens."""
    return 4 if interpreted() else CHUNK if pairs <= WIDE else WIDE_CHUNK  # the interpreter pays by the operation


def serves(batch: int, length: int, marked: bool) -> bool:
    """Whether products do what a sweep would, and sooner: resets and gaps would need a matrix a chunk."""
    if interpreted():
        return not marked and length >= chunk(1)
    return not marked and length >= SHORTEST and (length >= LONG or batch * length >= MANY)


def rows(length: int, pairs: int) -> int:
    """Of a sequence: its chunks, and the last one once more."""
    return -(-length // chunk(pairs)) + 1


def shape(batch: int, length: int, width: int, pairs: int) -> tuple[int, int, int, int]:
    """Of what is kept: each chunk's inputs and the state before it."""
    return (width, batch, rows(length, pairs), chunk(pairs) + 2 * pairs)


def _channels() -> int:
    """Of a tile; the interpreter pays by the operation, not by the element."""
    return 8 if interpreted() else 64


def _powers(pairs: int) -> int:
    """Of a channel, that a program makes at once."""
    return max(1, min(chunk(pairs), POWERS // (1 << (pairs - 1).bit_length())))


def _launch(name: str, programs: int, pairs: int, length: int, given: dict[str, object]) -> None:
    import triton

    from unisono_torch.kernels.diagonal_ssm import chunks

    function, size = getattr(chunks, name), chunk(pairs)
    arguments = {
        **given,
        "T": length,
        "rows": rows(length, pairs),
        "P": pairs,
        "CHUNK": size,
        "BP": triton.next_power_of_2(pairs),
        "BQ": _powers(pairs),
        "BJ": min(size, KERNEL_ROWS),
        "BT": min(size, TOKENS),
        "BD": _channels(),
        "BITS": size.bit_length(),
    }
    warps = 1 if name.startswith("carry") else 4
    function[(programs,)](**{name: arguments[name] for name in function.arg_names}, num_warps=warps)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Products with all of float32's digits, whatever is chosen for others."""
    with _lock, _chosen():
        yield


@contextlib.contextmanager
def _chosen() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    try:
        chosen = torch.get_float32_matmul_precision()
    except RuntimeError:  # chosen by torch.backends.….fp32_precision, which may not be mixed with the other way
        before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
        return
    if chosen != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if chosen != "highest":
            torch.set_float32_matmul_precision(chosen)


def _tiles(batch: int, length: int, width: int, pairs: int) -> int:
    size = chunk(pairs)
    return -(-width // _channels()) * batch * rows(length, pairs) * (size // min(size, TOKENS))


def _matrix(power: Tensor, grown: Tensor, C: Tensor, D: Tensor, like: Tensor) -> Tensor:
    """[D, S, S]; its last 2P rows' last 2P columns are never read."""
    (width, pairs, _) = C.shape
    size = chunk(pairs)
    kernel, matrix = like.new_empty(width, size), like.new_empty(width, size + 2 * pairs, size + 2 * pairs)
    made: dict[str, object] = {"kernel": kernel, "matrix": matrix}
    _launch("entries", width * (size // _powers(pairs)), pairs, 0, {"power": power, "grown": grown, "C": C, "D": D, **made})
    _launch("toeplitz", width * (size // min(size, KERNEL_ROWS)), pairs, 0, made)
    return matrix


@whole()
def forward(
    u: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    initial: Tensor,
    y: Tensor,
    final: Tensor,
    kept: Tensor,
) -> None:
    """u [B, T, D] whose rows lie evenly and (power, grown, C, D) → y, final [B, D, P, 2], and `kept`, of `shape`."""
    (batch, length, width), pairs = u.shape, initial.shape[2]
    size = chunk(pairs)
    matrix, programs, z = _matrix(*parameters, kept), _tiles(batch, length, width, pairs), kept.flatten(1, 2)
    common = {"batch": batch, "DIM": width, "power": parameters[0]}
    _launch("spread", programs, pairs, length, {"a": u, "out": kept, "ROW": u.stride(1), "LAST": True, **common})
    torch.bmm(z[..., :size], matrix[:, :size, size:], out=z[..., size:])
    _launch("carry", batch * width, pairs, length, {"z": kept, "initial": initial, "final": final, **common})
    outputs = torch.bmm(z, matrix[..., :size])
    _launch("collect", programs, pairs, length, {"a": outputs, "out": y, "LAST": False, **common})


@whole()
def backward(dy: Tensor, dfinal: Tensor, parameters: tuple[Tensor, Tensor, Tensor, Tensor], kept: Tensor, du: Tensor) -> tuple[Tensor, ...]:
    """du is written; gradients of power, grown, C, D and the initial state."""
    (batch, length, width), pairs = dy.shape, dfinal.shape[2]
    size = chunk(pairs)
    matrix, programs, z, slopes = (
        _matrix(*parameters, kept),
        _tiles(batch, length, width, pairs),
        kept.flatten(1, 2),
        torch.empty_like(kept),
    )
    q, dinitial, dpowers = slopes.flatten(1, 2), torch.empty_like(dfinal), kept.new_empty(width, batch, 2, pairs, 2)
    power, grown, C, _ = parameters
    common = {"batch": batch, "DIM": width, "power": power}
    _launch("spread", programs, pairs, length, {"a": dy, "out": slopes, "ROW": dy.stride(1), "LAST": False, **common})
    torch.bmm(q[..., :size], matrix[:, size:, :size].mT, out=q[..., size:])
    states = {"q": slopes, "z": kept, "dfinal": dfinal, "dinitial": dinitial, "dpowers": dpowers}
    _launch("carry_back", batch * width, pairs, length, {**states, **common})
    inputs = torch.bmm(q, matrix[:, :size].mT)
    _launch("collect", programs, pairs, length, {"a": inputs, "out": du, "LAST": True, **common})
    del matrix, inputs
    slope, dkernel = torch.bmm(z.mT, q), kept.new_empty((width, size), dtype=torch.float64)
    _launch("lags", width, pairs, 0, {"slope": slope, "dkernel": dkernel})
    found = [torch.empty_like(a) for a in parameters]
    named = dict(zip(("dpower", "dgrown", "dC", "dD"), found, strict=True))
    made = {"slope": slope, "dkernel": dkernel, "dpowers": dpowers.sum(1), "grown": grown, "C": C}
    _launch("fold", width, pairs, length, {**made, **named, **common})
    return *found, dinitial
