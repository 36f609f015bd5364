"""A model as a function of its named parameters."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import numpy as np
from flax import nnx
from unisono_spec.contract import Config

Named = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model as a function of its named parameters, so that they can be differentiated, stored and replaced by name.

    Equal models are equal keys: what is compiled for one serves the other.
    """

    config: Config
    graph: Any
    paths: tuple[tuple[tuple[Any, ...], type], ...]  # with the kind of variable that lies there
    recomputed: bool = False  # of each block keep its inputs alone, and compute the rest again for the gradient

    def __call__(self, named: Named) -> Any:
        leaves = [(path, kind(named[_name(path)])) for path, kind in self.paths]
        model: Any = nnx.merge(self.graph, nnx.from_flat_state(leaves))
        if self.recomputed:
            # no modules: the initial state is looked for in the whole model
            whole: Any = nnx.merge(self.graph, nnx.from_flat_state(leaves))
            vars(model).update(layers=[Recomputed(layer) for layer in model.layers], init_state=whole.init_state)
        return model


class Recomputed:
    """A block of which only the inputs are kept for the gradient (Chen et al. 2016)."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, *args: Any) -> Any:
        return _recompute(self.layer, args)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.layer, name)
        return (lambda *args: _recompute(value, args)) if inspect.ismethod(value) else value


def _recompute(call: Any, args: tuple[Any, ...]) -> Any:
    """`call(*args)` under jax.checkpoint. A list among `args` receives loads, which leave the function by its result alone."""
    measured = [a for a in args if isinstance(a, list)]
    leaves, tree = jax.tree.flatten([None if isinstance(a, list) else a for a in args])
    arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    @jax.checkpoint
    def block(given: list[jax.Array]) -> tuple[Any, list[list[jax.Array]]]:
        filled = list(leaves)
        for i, array in zip(arrays, given, strict=True):
            filled[i] = array
        loads: list[list[jax.Array]] = [[] for _ in measured]
        fresh = iter(loads)
        whole = [next(fresh) if isinstance(a, list) else b for a, b in zip(args, tree.unflatten(filled), strict=True)]
        return call(*whole), loads

    out, loads = block([leaves[i] for i in arrays])
    for kept, found in zip(measured, loads, strict=True):
        kept.extend(found)
    return out


def functional(model: Any) -> tuple[Functional, Named]:
    """The model's function, and its parameters by contract name."""
    graph, params = nnx.split(model)
    flat = list(nnx.to_flat_state(params))
    paths = tuple((path, type(leaf)) for path, leaf in flat)
    return Functional(model.config, graph, paths), {_name(path): leaf[...] for path, leaf in flat}


def _name(path: tuple) -> str:
    """The contract's name of the parameter at an NNX path."""
    return ".".join(map(str, path))


def ids(array: np.ndarray) -> np.ndarray:
    """Ids as int32, which JAX computes with; frames and ξ as they are."""
    return np.asarray(array, np.int32) if np.asarray(array).dtype.kind in "iu" else np.asarray(array)
