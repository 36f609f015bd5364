"""A kernel as an op of JAX: where it runs, its gradient, and derivatives of that; and inside a shard_map, along which axes of the mesh
arrays vary, which kernels have to be told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def _axes(a: jax.Array) -> frozenset[str]:
    """The axes of a mesh along which `a` varies; none outside a shard_map."""
    kind: Any = jax.typeof(a)
    manual = getattr(kind, "manual_axis_type", None)  # jax 0.10 and later
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


def alike(arrays: Any) -> Any:
    """The same arrays, which all vary along the axes that one of them varies along."""
    axes = frozenset[str]().union(*map(_axes, jax.tree.leaves(arrays)))

    def vary(a: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(a)))
        if not missing:
            return a
        if hasattr(lax, "pcast"):
            return lax.pcast(a, missing, to="varying")
        return lax.pvary(a, missing)  # pyright: ignore[reportAttributeAccessIssue]  (before 0.9)

    return jax.tree.map(vary, arrays)


def within(state: dict[str, jax.Array], *beside: Any) -> dict[str, jax.Array]:
    """`state`, inside a shard_map varying as what is beside it does, modules among it: what a loop carries keeps its type."""
    if jax.sharding.get_abstract_mesh().empty:
        return state
    return alike((state, [nnx.state(a) if isinstance(a, nnx.Module) else a for a in beside]))[0]


def outlined(shapes: Iterable[tuple[tuple[int, ...], Any]], like: jax.Array) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a kernel's outputs, which vary as `like` does."""

    def filled(a: jax.Array) -> list[jax.Array]:
        return [jnp.broadcast_to(a.ravel()[0].astype(dtype), shape) for shape, dtype in shapes]

    return jax.eval_shape(filled, like)


def operator(
    forward: Callable[..., Any], backward: Callable[..., Any], plain: Callable[..., Any], alone: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """→ run(interpret, arrays, marks): outputs that can be differentiated by `arrays`.

    forward(interpret, arrays, marks) → outputs, what the gradient needs beside the arrays. backward(interpret, arrays, marks, that,
    cotangents) → gradients. plain(arrays, marks) → the same outputs in plain operations: what runs where the program is compiled for
    another platform than CUDA, and what second derivatives are made of. alone(interpret, arrays, marks) → outputs, without what only a
    gradient needs.

    All are traced, and kernels lowered, once for calls of the same shapes: a stack of layers has one of each, not one a layer.
    """
    forward, backward = (jax.jit(run, static_argnums=0) for run in (forward, backward))
    plain, alone = jax.jit(plain), alone and jax.jit(alone, static_argnums=0)

    def slopes(arrays: Any, marks: Any, cotangents: Any) -> Any:
        return jax.vjp(lambda *given: plain(given, marks), *arrays)[1](cotangents)

    def elsewhere(arrays: Any, marks: Any) -> Any:
        saved = jax.eval_shape(functools.partial(forward, True), arrays, marks)[1]
        outputs = plain(arrays, marks)
        return outputs, jax.tree.map(lambda a: alike((jnp.zeros(a.shape, a.dtype), outputs[0]))[0], saved)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(interpret: bool, arrays: Any, marks: Any) -> Any:
        if alone is None:
            return ahead(interpret, arrays, marks)[0]
        if interpret:
            return alone(True, arrays, marks)
        return lax.platform_dependent(arrays, marks, cuda=functools.partial(alone, False), default=plain)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def values(interpret: bool, arrays: Any, marks: Any) -> Any:
        if interpret:
            return forward(True, arrays, marks)
        return lax.platform_dependent(arrays, marks, cuda=functools.partial(forward, False), default=elsewhere)

    def valued(interpret: bool, arrays: Any, marks: Any) -> Any:
        return values(interpret, arrays, marks), (arrays, marks)

    def unvalued(interpret: bool, kept: Any, above: Any) -> Any:
        arrays, marks = kept
        return slopes(arrays, marks, above[0]), None  # what is saved is made of the arrays, which `second` differentiates by

    values.defvjp(valued, unvalued)

    def ahead(interpret: bool, arrays: Any, marks: Any) -> Any:
        found: Any = values(interpret, arrays, marks)
        outputs, saved = found
        return outputs, (arrays, marks, saved)

    def back(interpret: bool, kept: Any, cotangents: Any) -> Any:
        arrays, marks, saved = kept
        return gradients(interpret, arrays, marks, saved, cotangents), None

    run.defvjp(ahead, back)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def gradients(interpret: bool, arrays: Any, marks: Any, saved: Any, cotangents: Any) -> Any:
        if interpret:
            return backward(True, arrays, marks, saved, cotangents)
        return lax.platform_dependent(
            arrays, marks, saved, cotangents, cuda=functools.partial(backward, False), default=lambda a, m, _, c: slopes(a, m, c)
        )

    def again(interpret: bool, arrays: Any, marks: Any, saved: Any, cotangents: Any) -> Any:
        return gradients(interpret, arrays, marks, saved, cotangents), (arrays, marks, cotangents)

    def second(interpret: bool, kept: Any, above: Any) -> Any:
        arrays, marks, cotangents = kept
        to_arrays, to_cotangents = jax.vjp(lambda a, c: slopes(a, marks, c), arrays, cotangents)[1](above)
        return to_arrays, None, None, to_cotangents

    gradients.defvjp(again, second)
    return lambda interpret, arrays, marks: run(interpret, *alike((arrays, marks)))
