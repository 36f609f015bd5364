"""What every layer has beside its mixer."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from unisono_spec.contract import check_dtype
from unisono_spec.contract import layer as described
from unisono_spec.contract.checks import check_reading

from unisono_torch.arrays import DTYPES, check_device, from_numpy, owned, place, recorded
from unisono_torch.layers.reading import Marks, Reading
from unisono_torch.ops.dispatch import check_implementation
from unisono_torch.ops.fold import masked
from unisono_torch.ops.precision import autocast_dtype, exact

State = dict[str, Tensor]
Mask = Tensor | None


class Options(TypedDict, total=False):
    """seed: of the initial values, else torch's own generator. device, dtype: of the parameters, torch's defaults unless told; a dtype's
    name, or torch's own."""

    seed: int | None
    device: torch.device | str | None
    dtype: str | torch.dtype | None
    implementation: str  # auto, plain or triton


class Layer(nn.Module):
    """What every layer of this module has beside its mixer."""

    layer: described.Layer
    implementation: str

    def _begin(
        self,
        layer: described.Layer,
        /,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: str | torch.dtype | None = None,
        implementation: str = "auto",
        **unknown: Any,
    ) -> None:
        described.check_options(type(self).__init__, unknown, Options.__annotations__)
        self.layer, self.implementation = layer, check_implementation(implementation)
        held = torch.get_default_dtype() if dtype is None else DTYPES[check_dtype(dtype)]
        where = place(device)
        if where.type == "meta":
            made = {name: torch.empty(p.shape, dtype=held, device=where) for name, p in layer.params().items()}
        else:
            drawn = layer.init_params(int(torch.randint(2**62, (), device="cpu").item()) if seed is None else seed)
            made = {name: from_numpy(a, "cpu").to(where, held) for name, a in drawn.items()}
        self.load_state_dict(made, assign=True)

    def init_state(self, batch: int, capacity: int | None = None, dtype: str | torch.dtype | None = None) -> State:
        """The state before the first token of `batch` sequences: arrays [batch, …] by name. capacity: the most tokens that softmax
        attention shall read.

        dtype: of the x to come, the parameters' unless told; under float64 states are float64, else float32.
        """
        held = None if dtype is None else DTYPES[check_dtype(dtype)]
        return self._start(next(self.parameters(), torch.empty(0)), batch, capacity, held)

    def _start(self, like: Tensor, batch: int, capacity: int | None, dtype: torch.dtype | None) -> State:
        """like: what shares the state's device."""
        floats = torch.promote_types(dtype or like.dtype, torch.float32)
        state: State = {}
        for name, s in self.layer.starting(batch, capacity).items():
            if s.initial is None:
                state[name] = torch.zeros((batch, *s.shape), dtype=torch.int32 if s.integer else floats, device=like.device)
            else:  # gradients flow to it
                state[name] = getattr(self, s.initial).to(floats).repeat(batch, *(1 for _ in s.shape))
        return state

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        reset: Mask = None,
        valid: Mask = None,
        cu_seqlens: Any = None,
        chunk_size: int = 64,
        **training: Any,
    ) -> tuple[Tensor, State]:
        """x [B, T, D] → y [B, T, D], the state after the last token.

        cu_seqlens: where the sequences begin that lie one after the other in x [1, T, D], T last; each begins anew, the first too, and the
        state after is that of the last one with a token.
        chunk_size: tokens in a chunk, where the parallel form has chunks. Raises InputError on what does not fit.
        """
        self._check(x, state, reset, valid, cu_seqlens)
        check_reading("parallel", chunk_size)
        if cu_seqlens is not None:
            given = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
            reset = torch.as_tensor(described.starts(given, x.shape[1]), device=x.device)
        fresh = state is None
        state = self._start(x, x.shape[0], x.shape[1], x.dtype) if state is None else recorded(state)
        return self._run(x, state, Marks(reset, valid), chunk_size, fresh, training)

    def step(self, x: Tensor, state: State, reset: Mask = None, valid: Mask = None, **training: Any) -> tuple[Tensor, State]:
        """One token: x [B, D], reset and valid [B] → y [B, D], the state after it."""
        self._check(x, state, reset, valid, one=True)
        return self._run(x, recorded(state), Marks(reset, valid), None, False, training)

    def _check(self, x: Tensor, state: State | None, reset: Mask, valid: Mask, cu_seqlens: Any = None, one: bool = False) -> None:
        self.layer.check(x, state, reset, valid, cu_seqlens, one=one, array=Tensor)
        check_device(next(self.parameters(), x).device, {"x": x, "reset": reset, "valid": valid, **(state or {})})

    def _run(
        self, x: Tensor, state: State, marks: Marks, chunk_size: int | None, fresh: bool, training: dict[str, Any]
    ) -> tuple[Tensor, State]:
        dtype = (None if x.dtype == torch.float64 else autocast_dtype(x.device)) or x.dtype
        (x,) = masked(marks.valid, x)  # before a projection, whose weights' gradient a NaN would reach
        y, after = self._mix_exactly(x.to(dtype), state, Reading(marks, chunk_size, self.implementation, fresh, dtype), training)
        return y, owned(after)

    @exact
    def _mix_exactly(self, x: Tensor, state: State, read: Reading, training: dict[str, Any]) -> tuple[Tensor, State]:
        return self._mix(x, state, read, **training)

    def _mix(self, x: Tensor, state: State, read: Reading) -> tuple[Tensor, State]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        numbers = sum(p.numel() for p in self.parameters())
        return f"d_model={self.layer.width}, implementation={self.implementation!r}, {numbers:,} parameters"
