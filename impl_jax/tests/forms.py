"""What the tests of the architectures share: models far from their initial values, marks, and the comparison of forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import unisono_jax
from flax import nnx
from unisono_spec.contract import Config, init_params

B, T = 2, 12
Close = Callable[..., None]


def create(config: Config, dtype: str = "float64", **changes: Any) -> Any:
    """A model far from its initial values: zeros and ones would hide what they multiply."""
    rng = np.random.default_rng(1)
    params = {name: p + 0.3 * rng.normal(size=p.shape) for name, p in init_params(config, 3, "float64").items()}
    return unisono_jax.create(config, params, dtype=dtype, **changes)


def tokens(config: Any, length: int = T) -> np.ndarray:
    return np.random.default_rng(length).integers(0, config.vocab_size, (B, length))


def marks(length: int = T) -> tuple[np.ndarray, np.ndarray]:
    """reset, valid: among them a reset where the token is not valid, and padding at the end of a row."""
    rng = np.random.default_rng(length + 1)
    reset, valid = rng.random((B, length)) < 0.15, rng.random((B, length)) < 0.7
    reset[0, length // 2], valid[0, length // 2], valid[1, -2:] = True, False, False
    return reset, valid


def check_forms(
    config: Config, close: Close, gradients: bool = False, marked: bool = True, noise: Sequence[np.ndarray] | None = None
) -> None:
    """The parallel form with a state handed over, to a step or (under noise, which steps do not take) to itself, against one fold
    of `step`: logits, states, and every gradient if asked, which costs most of the time.

    Caches of keys start empty here, and are only compared from there.
    """
    given, rng = tokens(config), np.random.default_rng(2)
    reset, valid = marks() if marked else (None, None)

    def part(a: Any, when: slice) -> Any:
        return jax.tree.map(lambda a: a[:, when], a)

    def of(given: Any, state: Any, when: slice) -> Any:
        return given[:, when], state, part(reset, when), part(valid, when)

    with jax.enable_x64(True):
        model = create(config)
        graph, params = nnx.split(model)
        state = model.init_state(B, 2 * T)
        floats = {n: jnp.abs(rng.normal(size=a.shape)) for n, a in state.items() if a.dtype != jnp.int32 and n[-2:] not in (".k", ".v")}

        @jax.jit
        def run(params: Any, floats: Any) -> Any:
            def folded(params: Any, floats: Any) -> Any:
                return nnx.merge(graph, params).forward(given, {**state, **floats}, reset, valid, form="recurrent", noise=noise)

            def pieced(params: Any, floats: Any) -> Any:
                model, first, last = nnx.merge(graph, params), slice(0, T - 1), slice(T - 1, T)
                y, held = model.forward(*of(given, {**state, **floats}, first), chunk_size=4, noise=part(noise, first))
                if noise is None:
                    end, held = model.step(given[:, -1], held, *(None if m is None else m[:, -1] for m in (reset, valid)))
                    return jnp.concatenate([y, end[:, None]], 1), held
                end, held = model.forward(*of(given, held, last), noise=part(noise, last))
                return jnp.concatenate([y, end], 1), held

            def loss(f: Any) -> Any:
                def value(params: Any, floats: Any) -> Any:
                    y, held = f(params, floats)
                    seen = y if valid is None else jnp.where(valid[..., None], y, 0)
                    return jnp.mean(jnp.sin(seen)) + sum(jnp.mean(jnp.sin(a)) for a in held.values() if a.size), (seen, held)

                return jax.value_and_grad(value, (0, 1), has_aux=True) if gradients else value

            return loss(folded)(params, floats), loss(pieced)(params, floats)

        folded, pieced = run(params, floats)
        jax.tree.map(close, pieced, folded)
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(folded))
        if gradients:
            trained = zip(model.config.params().values(), _named(folded[1][0], model), strict=True)
            assert all(np.any(g != 0) == p.trainable for p, g in trained)


def _named(gradients: Any, model: Any) -> list[np.ndarray]:
    found = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradients)}
    return [found[name] for name in model.config.params()]


def check_poison(run: Callable, given: Sequence[Any], sequences: int, close: Close) -> None:
    """The first `sequences` of `given` are [B, T, …]: what they hold where not valid reaches neither outputs nor gradients.

    run(form, *given, reset, valid) → o, final state.
    """
    reset, valid = marks()

    def at(a: Any) -> np.ndarray:
        return np.broadcast_to(valid.reshape(B, T, *(1,) * (a.ndim - 2)), a.shape)

    with jax.enable_x64(True):

        @jax.jit
        def both(given: Any) -> Any:
            def loss(form: str, given: Any) -> Any:
                o, last = run(form, *given, reset, valid)
                floats = [a for a in jax.tree.leaves((o, last)) if a.dtype == o.dtype]
                return sum(jnp.sum(jnp.sin(a)) for a in floats), (o, last)

            return [jax.value_and_grad(lambda g, form=form: loss(form, g), has_aux=True)(given) for form in ("recurrent", "parallel")]

        poisoned = [np.where(at(a), a, np.nan) if i < sequences else a for i, a in enumerate(given)]
        clean, damaged = both(list(given)), both(poisoned)
        jax.tree.map(np.testing.assert_array_equal, damaged, clean)
        jax.tree.map(close, clean[1], clean[0])
        for (_, (o, _)), gradients in damaged:
            assert not np.asarray(o)[~valid].any()
            assert all(not np.asarray(g)[~at(g)].any() for g in gradients[:sequences])
            assert all(np.isfinite(g).all() for g in gradients)


def check_dtypes(config: Config, dtype: str) -> None:
    """Logits in `dtype`, states float32; by tracing alone."""
    model, given = create(config, dtype, param_dtype="bfloat16"), jnp.asarray(tokens(config))
    reset, valid = map(jnp.asarray, marks())
    kept = {name: jnp.dtype("int32" if s.integer else "float32") for name, s in config.states(T).items()}
    for form in ("parallel", "recurrent"):
        logits, state = jax.eval_shape(lambda t, form=form: model.forward(t, None, reset, valid, form=form), given)
        step, after = jax.eval_shape(model.step, given[:, 0], state)
        assert logits.dtype == step.dtype == jnp.dtype(dtype)
        assert {n: a.dtype for n, a in state.items()} == {n: a.dtype for n, a in after.items()} == kept


def residual_floats(config: Config, length: int, chunk_size: int = 64) -> int:
    """What the backward of one marked forward pass keeps."""
    graph, params = nnx.split(create(config, "float32"))
    given, (reset, valid) = jnp.asarray(tokens(config, length)), map(jnp.asarray, marks(length))

    def kept(params: Any) -> Any:
        _, pull = jax.vjp(lambda p: nnx.merge(graph, p).forward(given, None, reset, valid, chunk_size=chunk_size)[0], params)
        return pull

    return sum(a.size for a in jax.tree.leaves(jax.eval_shape(kept, params)))
