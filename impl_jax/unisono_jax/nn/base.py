"""What every layer has beside its mixer."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from unisono_spec.contract import InputError, check_dtype, state_dtype
from unisono_spec.contract import layer as described
from unisono_spec.contract.checks import as_array, check_reading

from unisono_jax.arrays import ARRAYS, check_x64, drawn_key, place
from unisono_jax.kernels.operator import within
from unisono_jax.layers.reading import Marks, Reading
from unisono_jax.ops.elementwise import masked, wide
from unisono_jax.registry import check_implementation

State = dict[str, jax.Array]


class Options(TypedDict, total=False):
    """rngs or seed: of the initial values. param_dtype: what parameters are held in, float32 unless told. device: as `create` has it."""

    rngs: nnx.Rngs | None
    seed: int | None
    param_dtype: Any
    device: Any
    implementation: str  # auto or plain


def drawn(
    layer: described.Layer,
    /,
    rngs: nnx.Rngs | None = None,
    seed: int | None = None,
    param_dtype: Any = "float32",
    device: Any = None,
    **_: Any,
) -> dict[str, jax.Array]:
    """The layer's initial parameters."""
    if (rngs is None) == (seed is None):
        raise InputError("rngs: give rngs=nnx.Rngs(0), or seed=0 for the values that every room draws with it; one of the two")
    if rngs is not None:
        bits = jax.random.bits(drawn_key(rngs, "params"), dtype=jnp.uint32)
        if isinstance(bits, Tracer):
            raise InputError("rngs: initial values are drawn by NumPy, not in traced code; make the layer outside of jit and eval_shape")
        seed = int(bits)
    held = check_x64(check_dtype(param_dtype))
    return {name: place(a.astype(held), device) for name, a in layer.init_params(seed).items()}  # pyright: ignore[reportArgumentType]


class Layer(nnx.Module):
    """What every layer of this package has beside its mixer."""

    layer: described.Layer
    implementation: str

    def _begin(self, layer: described.Layer, /, **options: Unpack[Options]) -> None:
        described.check_options(type(self).__init__, options, Options.__annotations__)
        self.layer, self.implementation = layer, options.get("implementation", "auto")
        check_implementation(self.implementation)

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = None) -> State:
        """The state before the first token of `batch` sequences: arrays [batch, …] by name. capacity: the most tokens that softmax
        attention shall read.

        dtype: of the x to come, the parameters' unless told; under float64 states are float64, else float32.
        """
        params = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(self))}
        held = next((a.dtype for a in params.values()), "float32") if dtype is None else dtype
        floats, state = state_dtype(check_dtype(held)), {}
        for name, s in self.layer.starting(batch, capacity).items():
            shape, dtype = (batch, *s.shape), jnp.int32 if s.integer else floats
            state[name] = jnp.zeros(shape, dtype) if s.initial is None else jnp.broadcast_to(params[s.initial].astype(dtype), shape)
        return state

    def __call__(
        self,
        x: Any,
        state: State | None = None,
        reset: Any = None,
        valid: Any = None,
        cu_seqlens: Any = None,
        chunk_size: int = 64,
        **training: Any,
    ) -> tuple[jax.Array, State]:
        """x [B, T, D] → y [B, T, D], the state after the last token.

        cu_seqlens: where the sequences begin that lie one after the other in x [1, T, D], T last; each begins anew, the first too, and the
        state after is that of the last one with a token.
        chunk_size: tokens in a chunk, where the parallel form has chunks. Raises InputError on what does not fit.
        """
        x, reset, valid = (a if a is None else as_array(name, a) for name, a in (("x", x), ("reset", reset), ("valid", valid)))
        self.layer.check(x, state, reset, valid, cu_seqlens, array=ARRAYS)
        check_reading("parallel", chunk_size)
        if isinstance(cu_seqlens, Tracer):
            reset = jnp.zeros((1, x.shape[1]), bool).at[0, cu_seqlens[:-1]].set(True, mode="drop")
        elif cu_seqlens is not None:
            reset = described.starts(cu_seqlens, x.shape[1])
        state = self.init_state(x.shape[0], x.shape[1], x.dtype) if state is None else state
        return self._run(x, state, reset, valid, chunk_size, training)

    def step(self, x: Any, state: State, reset: Any = None, valid: Any = None, **training: Any) -> tuple[jax.Array, State]:
        """One token: x [B, D], reset and valid [B] → y [B, D], the state after it."""
        x, reset, valid = (a if a is None else as_array(name, a) for name, a in (("x", x), ("reset", reset), ("valid", valid)))
        self.layer.check(x, state, reset, valid, one=True, array=ARRAYS)
        return self._run(x, state, reset, valid, None, training)

    def _run(
        self, x: Any, state: State, reset: Any, valid: Any, chunk_size: int | None, training: dict[str, Any]
    ) -> tuple[jax.Array, State]:
        check_x64(x.dtype.name)
        x, marks = jnp.asarray(x), Marks(*(None if m is None else jnp.asarray(m) for m in (reset, valid)))
        floats, (x,) = wide(x), masked(marks.valid, x)  # before a projection, whose weights' gradient a NaN would reach
        held = {name: jnp.asarray(state[name], jnp.int32 if s.integer else floats) for name, s in self.layer.states().items()}
        held = within(held, x, marks, self)
        return self._mix(x, held, Reading(marks, chunk_size, self.implementation), **training)

    def _mix(self, x: jax.Array, state: State, read: Reading) -> tuple[jax.Array, State]:
        raise NotImplementedError
