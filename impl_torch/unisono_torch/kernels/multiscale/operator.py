"""`unisono::multiscale`, the PyTorch operator around its kernels: how they are launched, traced and differentiated.

Forward: what fades (functions.py), states before each segment (states.py), what tokens read of them (forward.py). Backward: the same states
anew, gradients of queries (backward.py), of states from the last to the first, of keys and values. Saved: inputs, and a float32 denominator
a token, head and scale. Opaque to torch.compile, which takes shapes and dtypes from the fake versions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unisono_torch.kernels.multiscale import parts, table
from unisono_torch.kernels.registry import hopper, interpreted
from unisono_torch.kernels.rows import dense
from unisono_torch.ops.transforms import again


class Turn(NamedTuple):
    """How q and k were turned before φ, cos and sin [B or 1, T, K/2], and where gradients go, [B, T, H, K] that lie alike."""

    cos: Tensor
    sin: Tensor
    feature_map: str
    dq: Tensor
    dk: Tensor
    dv: Tensor


class _Call:
    """What all launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, log_decay: Tensor, weight: Tensor,
                 reset: Tensor | None, valid: Tensor | None, do: Tensor | None = None) -> None:  # fmt: skip
        import triton.language as tl

        self.batch, self.length, self.heads, self.K = q.shape
        self.V, self.scales = v.shape[-1], weight.shape[2]
        width = table.width_of(self.K, self.V)
        product = "bfloat16" if v.dtype == torch.bfloat16 else "float32"
        self.same = q_norm is None
        self.log_decay, self.weight = log_decay, weight.expand(self.batch, self.length, self.scales, self.heads, 1)
        self.reset, self.valid = (None if a is None else a.contiguous() for a in (reset, valid))
        moved = {"q": q, "k": k, "v": v, "do": do, "q_norm": q_norm, "k_norm": k_norm}
        self.moved = {n: a if a is None else dense(a) for n, a in moved.items()}
        steps = [a.stride(i) for a in self.moved.values() if a is not None for i in range(3)]
        self.unit = 16 if all(step % 16 == 0 for step in steps) else 1  # so that loads are as wide as strides allow
        shared = reset is None and valid is None and log_decay.shape[0] == 1  # by all sequences
        self.alike = shared and log_decay.shape[1] == 1  # for all tokens
        self.hopper = self._on_hopper()
        emulated = interpreted() and not self.hopper
        self.cut = cut = table.INTERPRETED if emulated else (table.ONE if self.scales == 1 else table.TABLE)[product, width]
        self.span = cut.chunk * cut.blocks
        self.segments = -(-self.length // self.span)
        # the interpreter cannot compute in 16 bits
        self.dot = tl.bfloat16 if v.dtype == torch.bfloat16 and not interpreted() else tl.float32
        self.tf32 = v.dtype == torch.float16
        self.made = torch.bfloat16 if self.dot == tl.bfloat16 else torch.float32
        self.shared = shared
        # one decay by hopper_sweep.py, of uncut time: no states reach memory, and what fades is computed where it is used
        self.swept = self.hopper and self.scales == 1 and self.batch * self.heads >= table.FEW

    def _on_hopper(self) -> bool:
        """Whether hopper.py makes the states."""
        moved = [a for a in self.moved.values() if a is not None]
        v = moved[-1]
        wide = v.dtype == torch.bfloat16 and self.K == self.V == 64 and self.unit == 16 and all(a.data_ptr() % 16 == 0 for a in moved)
        return self.alike and self.same and wide and hopper(v.device)

    def size(self, n: int) -> int:
        """Of a block that holds n columns."""
        return max(self.cut.columns, 1 << (n - 1).bit_length())

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        q = self.moved["q"]
        assert q is not None
        return q.new_empty(shape, dtype=dtype)

    def strides(self, name: str, letter: str) -> dict[str, int]:
        a = self.moved[name]
        return {f"{letter}{i}": 0 if a is None else a.stride(i) // self.unit for i in range(3)}

    def prepare(self) -> None:
        from unisono_torch.kernels.multiscale import functions

        shared, rows, padded = self.shared, 1 if self.shared else self.batch, self.segments * self.span
        decay = self.log_decay.expand(rows, self.length, self.scales)
        self.hi, self.lo, self.near, self.kept, self.ahead = (self.empty(rows, self.scales, padded) for _ in range(5))
        self.whole = self.empty(rows, self.scales, self.segments)
        self.section = None if self.reset is None else self.empty(self.batch, padded, dtype=torch.int32)
        self.p0 = 0 if shared else self.scales * padded
        self.w0 = 0 if shared else self.scales * self.segments
        launch: Any = functions.prepare
        with torch.cuda.device_of(decay):
            launch[(rows * self.scales * self.segments,)](
                decay, self.reset, self.valid, self.hi, self.lo, self.near, self.kept, self.ahead, self.whole, self.section,
                self.length, self.segments, *decay.stride(), M=self.scales, C=self.cut.chunk, NB=self.cut.blocks,
                HAS_RESET=self.reset is not None, HAS_VALID=self.valid is not None, num_warps=1 if self.span < 128 else 4,
            )  # fmt: skip

    def pieces(self, strips: int) -> tuple[int, int]:
        """(how many pieces of time, segments each): from the shape alone, so that a result's bits do not depend on the GPU."""
        assert self.moved["v"] is not None
        kept = 4 * self.scales * self.size(self.K) * self.size(self.V)
        shortest = max(table.SHORTEST, int(kept / (table.OWN * 4 * self.moved["v"].itemsize * (self.K + self.V) * self.span)))
        count = 1 if strips >= table.FEW else max(1, min(table.PROGRAMS // strips, -(-self.segments // shortest)))
        each = -(-self.segments // count)
        return -(-self.segments // each), each

    def states(self, S: Tensor, z: Tensor, S_end: Tensor, z_end: Tensor, back: tuple[Tensor, ...] | None = None,
               before: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """States [B, H, M, N, K, V] and normalisers before each segment, or their gradients after it; with `before`, whole's besides."""
        from unisono_torch.kernels.multiscale import states

        if self.hopper:
            return self._states_on_hopper(S, z, S_end, z_end, back, before)
        names = ("k", "v", "k_norm") if back is None else ("q", "do", "q_norm")
        columns = self.cut.columns
        blocks = -(-self.V // columns)
        strips = self.batch * self.heads * self.scales * blocks
        count, each = self.pieces(strips)
        scratch, BK = (count - 1) * strips, self.size(self.K)
        shape = self.batch, self.heads, self.scales, self.segments
        kept, kept_z = self.empty(*shape, self.K, self.V, dtype=self.made), self.empty(*shape, self.K)
        through = None if before is None else self.empty(blocks, *shape)
        padded = self.segments * self.span
        weights = (self.ahead, self.ahead) if back is None else back
        arguments = {
            "x": self.moved[names[0]], "y": self.moved[names[1]], "x_norm": self.moved[names[2]], "valid": self.valid,
            "weight": weights[0], "weight_norm": weights[1], "whole": self.whole, "start": S, "start_z": z, "kept": kept, "kept_z": kept_z,
            "end": S_end, "end_z": z_end, "before": before and before[0], "before_z": before and before[1], "through": through,
            "own": self.empty(scratch, BK * columns), "own_z": self.empty(scratch, BK), "own_w": self.empty(scratch),
            "T": self.length, "H": self.heads, "batches": self.batch, "segments": self.segments, "pieces": count, "each": each,
            **self.strides(names[0], "x"), **self.strides(names[1], "y"), **self.strides(names[2], "n"), "w0": self.w0,
            "c0": self.p0 if back is None else self.heads * self.scales * padded, "c1": 0 if back is None else self.scales * padded,
            "UNIT": self.unit, "BACK": back is not None, "SAME": self.same, "THROUGH": before is not None,
            "HAS_VALID": self.valid is not None, "M": self.scales, "K": self.K, "V": self.V, "BK": BK, "BN": columns,
            "C": self.cut.chunk, "NB": self.cut.blocks, "DOT": self.dot, "TF32": self.tf32, "STAGES": self.cut.stages,
            "num_warps": self.cut.state_warps,
        }  # fmt: skip
        kernel: Any = states.states
        with torch.cuda.device_of(kept):
            if count > 1:
                kernel[(strips * (count - 1),)](**arguments, WRITES=False)
            kernel[(strips * count,)](**arguments, WRITES=True)
        return kept, kept_z, through

    def _states_on_hopper(self, S: Tensor, z: Tensor, S_end: Tensor, z_end: Tensor, back: tuple[Tensor, ...] | None,
                          before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        from unisono_torch.kernels.multiscale import hopper

        shape = self.batch, self.heads, self.scales, self.segments
        kept, kept_z = self.empty(*shape, self.K, self.V, dtype=self.made), self.empty(*shape, self.K)
        strips = self.batch * self.heads * self.scales
        count, _ = self.pieces(strips)
        through = None if before is None else self.empty(strips * count)
        given = self._pieces_on_hopper(S, z, S_end, z_end, back, before, kept, kept_z, through)
        with torch.cuda.device_of(kept):
            hopper.states[(strips * count,)](**given, WRITES=True)
        return kept, kept_z, through

    def _pieces_on_hopper(self, S: Tensor, z: Tensor, S_end: Tensor, z_end: Tensor, back: tuple[Tensor, ...] | None = None,
                          before: tuple[Tensor, Tensor] | None = None, kept: Tensor | None = None, kept_z: Tensor | None = None,
                          through: Tensor | None = None) -> dict[str, Any]:  # fmt: skip
        """Arguments of hopper.states, which has left in own, own_z and own_w what each piece but the last adds."""
        from unisono_torch.kernels.multiscale import hopper

        cut, names = table.HOPPER, ("k", "v") if back is None else ("q", "do")
        strips = self.batch * self.heads * self.scales
        count, each = self.pieces(strips)
        scratch, padded = (count - 1) * strips, self.segments * self.span
        weights = (self.ahead, self.ahead) if back is None else back
        arguments = {
            "x": self.moved[names[0]], "y": self.moved[names[1]], "weight": weights[0], "weight_norm": weights[1], "whole": self.whole,
            "start": S, "start_z": z, "kept": kept, "kept_z": kept_z, "end": S_end, "end_z": z_end,
            "before": before and before[0], "before_z": before and before[1], "through": through,
            "own": self.empty(scratch, self.K * self.V), "own_z": self.empty(scratch, self.K), "own_w": self.empty(scratch),
            "T": self.length, "H": self.heads, "batches": self.batch, "segments": self.segments, "pieces": count, "each": each,
            **self.strides(names[0], "x"), **self.strides(names[1], "y"),
            "c0": 0 if back is None else self.heads * self.scales * padded, "c1": 0 if back is None else self.scales * padded,
            "UNIT": self.unit, "BACK": back is not None, "THROUGH": before is not None, "M": self.scales, "K": self.K, "V": self.V,
            "BN": self.V, "C": 64, "NB": self.span // 64, "STAGES": cut.stages, "num_warps": 4, "maxnreg": cut.registers,
        }  # fmt: skip
        if count > 1:
            with torch.cuda.device_of(S):
                hopper.states[(strips * (count - 1),)](**arguments, WRITES=False)
        return arguments

    def sweep_on_hopper(self, S: Tensor, z: Tensor, S_end: Tensor, z_end: Tensor, o: Tensor, denominator: Tensor) -> None:
        """One decay forward."""
        strips, cut = self.batch * self.heads, table.HOPPER_SWEEPS["forward"]
        count, each = (1, self.segments) if self.swept else self.pieces(strips)
        names = ("own", "own_z", "own_w")
        own = dict.fromkeys(names, self.empty(0)) if self.swept else self._pieces_on_hopper(S, z, S_end, z_end)
        arguments = {
            "start": S, "start_z": z, "end": S_end, "end_z": z_end, "o": o, "denominator": denominator, **{n: own[n] for n in names},
            "strips": strips, "pieces": count, "each": each * self.span,
        }  # fmt: skip
        self._launch_sweep("forward", cut, strips * count, arguments, gains=True)

    def sweep_back_on_hopper(self, given: dict[str, Tensor]) -> Tensor:
        """Gradients of one decay's queries, keys, values and initial state; δ [B, H, 1, T]."""
        strips = self.batch * self.heads
        delta, shares, lost = (self.empty(self.batch, self.heads, 1, self.length) for _ in range(3))
        queries = {name: given[name] for name in ("denominator", "dq")} | {"start": given["S"], "start_z": given["z"], "delta": delta}
        keys = {"dk": given["dk"], "dv": given["dv"], "end": given["dS"], "end_z": given["dz"]}
        keys |= {"start": given["S_out"], "start_z": given["z_out"]}
        between = {"shares": shares, "lost": lost}
        self._launch_sweep("of_queries", table.HOPPER_SWEEPS["of_queries"], strips, queries | between, gains=True)
        self._launch_sweep("of_keys", table.HOPPER_SWEEPS["of_keys"], strips, keys | between, gains=False)
        return delta

    def _launch_sweep(self, name: str, cut: table.SweepCut, programs: int, more: dict[str, Any], gains: bool) -> None:
        from unisono_torch.kernels.multiscale import hopper_sweep

        moved = {n: a for n, a in self.moved.items() if a is not None}
        arguments = {
            **moved, "log_decay": self.log_decay, "T": self.length, "H": self.heads,
            **{f"{n[0]}{i}": a.stride(i) // self.unit for n, a in moved.items() for i in range(3)},
            "UNIT": self.unit, "N": self.K, "C": cut.chunk, "STAGES": cut.stages, "WARPS": cut.warps, "num_warps": cut.warps,
        }  # fmt: skip
        if gains:
            g = self.weight.stride()
            arguments |= {"gain": self.weight, "g0": g[0], "g1": g[1], "g3": g[3]}
        kernel: Any = getattr(hopper_sweep, name)
        with torch.cuda.device_of(self.log_decay):
            kernel[(programs,)](**arguments, **more)

    def launch_on_hopper(self, name: str, more: dict[str, Any]) -> None:
        from unisono_torch.kernels.multiscale import hopper_segments

        moved = {n: a for n, a in self.moved.items() if a is not None}
        arguments = {
            **moved, "hi": self.hi, "lo": self.lo, "T": self.length, "H": self.heads, "segments": self.segments,
            **{f"{n[0]}{i}": a.stride(i) // self.unit for n, a in moved.items() for i in range(3)},
            "UNIT": self.unit, "M": self.scales, "C": 64, "num_warps": 4,
        }  # fmt: skip
        if name != "of_keys":
            arguments |= {"gain": self.weight, **{f"g{i}": self.weight.stride(i) for i in range(4)}}
        kernel: Any = getattr(hopper_segments, name)
        with torch.cuda.device_of(self.hi):
            kernel[(self.batch * self.heads * self.segments,)](**arguments, **more)

    def launch(self, kernel: Any, blocks: int, more: dict[str, Any], registers: int | None = None) -> None:
        arguments = {
            "q": self.moved["q"], "k": self.moved["k"], "v": self.moved["v"],
            "q_norm": self.moved["q_norm"], "k_norm": self.moved["k_norm"], "gain": self.weight, "valid": self.valid,
            "section": self.section,
            "hi": self.hi, "lo": self.lo, "near": self.near, "T": self.length, "H": self.heads, "batches": self.batch,
            "segments": self.segments, **self.strides("q", "q"), **self.strides("k", "k"), **self.strides("v", "v"),
            **self.strides("q_norm", "a"), **self.strides("k_norm", "b"),
            **{f"g{i}": self.weight.stride(i) for i in range(4)}, "p0": self.p0, "UNIT": self.unit, "SAME": self.same, "ALIKE": self.alike,
            "HAS_RESET": self.reset is not None, "HAS_VALID": self.valid is not None, "M": self.scales,
            "SCALES": 1 << (self.scales - 1).bit_length(), "K": self.K, "V": self.V, "BK": self.size(self.K), "BN": self.cut.columns,
            "C": self.cut.chunk, "NB": self.cut.blocks, "DOT": self.dot, "TF32": self.tf32, "num_warps": self.cut.warps,
            "maxnreg": registers,
        }  # fmt: skip
        with torch.cuda.device_of(self.hi):
            kernel[(self.batch * self.heads * blocks * self.segments * self.cut.blocks,)](**arguments, **more)


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, Tensor log_decay, Tensor weight, Tensor S, Tensor z, "
    "Tensor? reset, Tensor? valid"
)


@torch.library.custom_op("unisono::multiscale", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
def _forward(q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid):
    return read(q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid)


def read(q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid, still=False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_forward`. still: the first scale does not decay."""
    given = (q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid)
    divided = parts.division(q, v, S.shape[1], True)
    if len(divided) == 1:
        return _read(*given, still)
    return parts.joined(_forward_fake(*given), _read, divided, given, still)


def _read(q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid, still) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from unisono_torch.kernels.multiscale import forward

    o, S_end, z_end, denominator = _forward_fake(q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid)
    if o.numel() == 0:
        return o, S_end.copy_(S), z_end.copy_(z), denominator
    call = _Call(q, k, v, q_norm, k_norm, log_decay, weight, reset, valid)
    if not call.swept:
        call.prepare()
    if call.hopper and call.scales == 1:
        call.sweep_on_hopper(S.contiguous(), z.contiguous(), S_end, z_end, o, denominator)
        return o, S_end, z_end, denominator
    kept, kept_z, _ = call.states(S.contiguous(), z.contiguous(), S_end, z_end)
    given = {"S": kept, "z": kept_z, "o": o, "denominator": denominator}
    if call.hopper:
        call.launch_on_hopper("forward", given | {"STILL": still})
    else:
        call.launch(forward.forward, -(-call.V // call.cut.columns), given | {"kept": call.kept}, call.cut.registers)
    return o, S_end, z_end, denominator


@_forward.register_fake
def _forward_fake(q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid):
    return (
        v.new_empty(v.shape),
        S.new_empty(S.shape, dtype=torch.float32),
        z.new_empty(z.shape, dtype=torch.float32),
        q.new_empty((q.shape[0], q.shape[2], S.shape[1], q.shape[1]), dtype=torch.float32),
    )


_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op(
    "unisono::multiscale_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor dS, Tensor dz, Tensor denominator, {_INPUTS}, bool fades, bool weighs) -> {_GRADIENTS}",
)
def _backward(do, dS, dz, denominator, q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid, fades, weighs):
    """Gradients of q, k, v, q_norm, k_norm (empty where they are q and k), log_decay (empty without `fades`), weight (without `weighs`),
    S and z."""
    return gradients(do, dS, dz, denominator, q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid, fades, weighs)


def gradients(
    do, dS, dz, denominator, q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid, fades, weighs, turn=None, still=False
) -> tuple[Any, ...]:
    """As `_backward`. turn: gradients of q, k and v are put there, those of q and k turned back, where kernels do that. still: the first
    scale does not decay, and its log λ is given no gradient."""
    given = (q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid)
    divided = parts.division(q, v, S.shape[1], fades)
    if len(divided) == 1:
        return _gradients(do, dS, dz, denominator, *given, fades, weighs, turn, still)
    before = do, dS, dz, denominator
    whole = list(_backward_fake(*before, *given, fades, weighs))
    return parts.gradients_joined(whole, _gradients, divided, before, given, (fades, weighs), turn, still)


def _gradients(
    do, dS, dz, denominator, q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid, fades, weighs, turn, still
) -> tuple[Any, ...]:
    from unisono_torch.kernels.multiscale import backward

    given = (do, dS, dz, denominator, q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid, fades, weighs)
    dq, dk, dv, dq_norm, dk_norm, dlog_decay, dweight, S_out, z_out = _backward_fake(*given)
    if do.numel() == 0:
        return dq, dk, dv, dq_norm, dk_norm, dlog_decay.zero_(), dweight.zero_(), S_out.copy_(dS), z_out.copy_(dz)
    call = _Call(q, k, v, q_norm, k_norm, log_decay, weight, reset, valid, do)
    if call.swept and not fades and turn is None:
        given = {"denominator": denominator, "dq": dq, "dk": dk, "dv": dv, "S_out": S_out, "z_out": z_out}
        given |= {"S": S.contiguous(), "z": z.contiguous(), "dS": dS.contiguous(), "dz": dz.contiguous()}
        delta = call.sweep_back_on_hopper(given)
        _of_weights(delta, call.length, dweight)
        return dq, dk, dv, dq_norm, dk_norm, dlog_decay, dweight, S_out, z_out
    del dk, dv  # made again once the states are gone: both at once would be the most that this takes
    call.prepare()
    kept, kept_z, _ = call.states(S.contiguous(), z.contiguous(), torch.empty_like(S_out), torch.empty_like(z_out))
    padded = call.segments * call.span
    shape = call.batch, call.heads, call.scales
    delta, shares, lost, back, back_z = (call.empty(*shape, padded) for _ in range(5))
    kept_for = (kept, kept_z) if fades else None
    if call.hopper:
        turn = turn if turn is not None and turn.feature_map in table.TURNED else None
        how: dict[str, Any] = {"cos": None, "sin": None, "MAP": "", "SHARED": True, "STILL": still}
        if turn is not None:
            how |= {"cos": turn.cos.contiguous(), "sin": turn.sin.contiguous(), "MAP": turn.feature_map, "SHARED": len(turn.cos) == 1}
            dq = turn.dq
        faded = call.empty(2, *shape, call.segments) if fades else None
        read, sent = (None, None) if faded is None else faded
        given = {
            "S": kept, "z": kept_z, "denominator": denominator, "dq": dq, "delta": delta, "shares": shares, "lost": lost, "back": back,
            "back_z": back_z, "fades": read, "FADES": fades, **how, **{f"e{i}": dq.stride(i) // call.unit for i in range(3)},
        }  # fmt: skip
        call.launch_on_hopper("of_queries", given)
        after, after_z, through = call.states(dS.contiguous(), dz.contiguous(), S_out, z_out, (back, back_z), kept_for)
        del given, kept, kept_z, kept_for
        dk, dv = (k.new_empty(k.shape), v.new_empty(v.shape)) if turn is None else (turn.dk, turn.dv)
        given = {
            "dS": after, "dz": after_z, "shares": shares, "lost": lost, "dk": dk, "dv": dv, "fades": sent, "FADES": fades,
            **how, **{f"e{i}": dv.stride(i) // call.unit for i in range(3)},
        }  # fmt: skip
        call.launch_on_hopper("of_keys", given)
        _of_weights(delta, call.length, dweight)
        if faded is not None and through is not None:
            rows = [a.reshape(call.batch * call.heads, call.scales, -1) for a in (*faded, through)]
            torch.sum(torch.cat(rows, -1), (0, 2), dtype=dlog_decay.dtype, out=dlog_decay.view(call.scales))
        return dq, dk, dv, dq_norm, dk_norm, dlog_decay, dweight, S_out, z_out
    more = {"do": call.moved["do"], "BV": call.size(call.V), "FADES": fades, **call.strides("do", "d")}
    read = None if not fades else call.empty(*shape, padded)
    tail = None if not fades else call.empty(*shape, call.segments * call.cut.blocks)
    given = {
        "kept": call.kept, "S": kept, "z": kept_z, "denominator": denominator, "dq": dq, "dq_norm": dq_norm, "delta": delta,
        "shares": shares, "lost": lost, "back": back, "back_z": back_z, "fades": read, "tail": tail, **more,
    }  # fmt: skip
    call.launch(backward.of_queries, -(-call.K // call.cut.columns), given)
    after, after_z, through = call.states(dS.contiguous(), dz.contiguous(), S_out, z_out, (back, back_z), kept_for)
    del given, kept, kept_z, kept_for
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    blocks = -(-max(call.K, call.V) // call.cut.columns)
    sent = None if not fades else call.empty(blocks, *shape, padded)
    head = None if not fades else call.empty(blocks, *shape, call.segments * call.cut.blocks)
    given = {
        "ahead": call.ahead, "dS": after, "dz": after_z, "dk": dk, "dk_norm": dk_norm, "dv": dv,
        "shares": shares, "lost": lost, "fades": sent, "head_sum": head, **more,
    }  # fmt: skip
    call.launch(backward.of_keys, blocks, given)
    _of_weights(delta, call.length, dweight)
    if fades:
        assert read is not None
        assert tail is not None
        assert sent is not None
        assert head is not None
        assert through is not None
        found = (read.sum(1) + sent.sum((0, 2))).unflatten(-1, (call.segments, call.cut.blocks, call.cut.chunk))  # [B, M, N, 2, C]
        found = found + through.sum((0, 2))[..., None, None]
        if call.cut.blocks == 2:
            # the second block's queries read across the first, whose keys are sent across the second
            tail, head = (a.unflatten(-1, (-1, 2)) for a in (tail.sum(1), head.sum((0, 2))))
            found = found + torch.stack([tail[..., 1], head[..., 0]], -1)[..., None]
        found = found.flatten(2)[..., : call.length].mT
        if valid is not None:
            found = torch.where(valid[..., None], found, 0)
        dlog_decay.copy_(found.sum_to_size(dlog_decay.shape))
    return dq, dk, dv, dq_norm, dk_norm, dlog_decay, dweight, S_out, z_out


def _of_weights(delta: Tensor, length: int, out: Tensor) -> None:
    """δ [B, H, M, N·L] → weights' gradient [B or 1, T or 1, M, H or 1, 1], if it is asked for."""
    if out.numel():
        if out.shape[3] == 1:
            delta = delta.sum(1, keepdim=True)  # as it lies; what is left is small
        out.copy_(delta[..., :length].permute(0, 3, 2, 1)[..., None].sum_to_size(out.shape))


@_backward.register_fake
def _backward_fake(do, dS, dz, denominator, q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid, fades, weighs):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty((0,) if q_norm is None else q_norm.shape),
        k.new_empty((0,) if k_norm is None else k_norm.shape),
        log_decay.new_empty(log_decay.shape if fades else (0,)),
        weight.new_empty(weight.shape if weighs else (0,)),
        S.new_empty(S.shape, dtype=torch.float32),
        z.new_empty(z.shape, dtype=torch.float32),
    )


def _setup(ctx, inputs, output) -> None:
    *tensors, reset, valid = inputs
    denominator = output[3]
    ctx.mark_non_differentiable(denominator)
    ctx.save_for_backward(denominator, *tensors, reset, valid)


def _gradient(ctx, do, dS, dz, _):
    denominator, *inputs = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(_plain, inputs, ctx.needs_input_grad, (do, dS, dz))
    fades, weighs = ctx.needs_input_grad[5:7]
    dq, dk, dv, dq_norm, dk_norm, dlog_decay, dweight, dS0, dz0 = _backward(do, dS, dz, denominator, *inputs, fades, weighs)
    same, S, z = inputs[3] is None, inputs[7], inputs[8]
    norms = (None, None) if same else (dq_norm, dk_norm)
    shares = dlog_decay if fades else None, dweight if weighs else None
    return dq, dk, dv, *norms, *shares, dS0.to(S.dtype), dz0.to(z.dtype), None, None


def _plain(q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid):
    """The same in plain operations, for second derivatives."""
    from unisono_torch.ops import multiscale

    q_norm, k_norm = q if q_norm is None else q_norm, k if k_norm is None else k_norm
    o, (S, z) = multiscale.parallel(q, k, v, q_norm, k_norm, log_decay, weight, (S, z), reset, valid, implementation="plain")
    return o.to(v.dtype), S, z


_forward.register_autograd(_gradient, setup_context=_setup)
