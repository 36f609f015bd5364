"""Kernels in Pallas' interpreter, against the recurrence in float64: values, every gradient, cuts of time, what they refuse."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from unisono_conformance import judge, numerics
from unisono_jax import InputError, registry
from unisono_jax.kernels import diagonal_ssm as diagonal_kernel
from unisono_jax.kernels import jla as jla_kernel
from unisono_jax.kernels import linear_attention as attention_kernel
from unisono_jax.kernels import multiscale as scales_kernel
from unisono_jax.kernels import selective_scan as scan_kernel
from unisono_jax.ops import diagonal_ssm, linear_attention, multiscale, selective_scan

OPS = {"linear_attention": linear_attention, "multiscale": multiscale, "selective_scan": selective_scan, "diagonal_ssm": diagonal_ssm}
RUNS: dict[str, Any] = {
    "linear_attention": attention_kernel.attend,
    "multiscale": scales_kernel.attend,
    "selective_scan": scan_kernel.scan,
    "diagonal_ssm": functools.partial(diagonal_ssm._by_kernel, reset=None, valid=None),
}
PARAMS = {"selective_scan": (2, 5), "diagonal_ssm": (1, 2, 3, 4)}  # which of what they read has no batch
B, T = 2, 21


@pytest.fixture(autouse=True, scope="module")
def untraced() -> Iterator[None]:
    """Traces that kernels keep are of the sizes below in this file, and of their own elsewhere."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some chunks a segment, some segments a sequence, and a rest. In float32, which tells more than bfloat16, all are served here."""
    monkeypatch.setenv(registry.INTERPRET, "1")
    for key, each in registry._KERNELS.items():
        monkeypatch.setitem(registry._KERNELS, key, dataclasses.replace(each, dtypes=("float32",)))
    for name, value in {"SIZE": 4, "PROGRAMS": 12, "SHORTEST": 6, "COLUMNS": 8, "BROAD": 8}.items():
        monkeypatch.setattr(attention_kernel, name, value)
    for name, value in {"BLOCK": 4, "TILE": 4, "GROUP": 2, "PROGRAMS": 12, "SHORTEST": 6}.items():
        monkeypatch.setattr(scan_kernel, name, value)
    for name, value in {"SIZE": 4, "ROWS": 4, "LEAST": 2, "SEQUENCES": 1, "AHEAD": 2}.items():
        monkeypatch.setattr(diagonal_kernel, name, value)


def inputs(op: str, rng: np.random.Generator) -> tuple[Any, ...]:
    """All positive but A, so that no sum cancels: an error is then a share of what it is in."""
    if op == "linear_attention":
        q, k, v = (rng.uniform(0.5, 2, (B, T, 2, n)) for n in (3, 3, 5))
        return q, k, v, (rng.uniform(1, 2, (B, 2, 3, 5)), rng.uniform(1, 2, (B, 2, 3)))
    if op == "multiscale":  # q' and k' of their own, and a weight for each channel
        q, k, v, q_norm, k_norm = (rng.uniform(0.5, 2, (B, T, 2, n)) for n in (3, 3, 5, 3, 3))
        log_decay, weight = -rng.exponential(0.2, (B, T, 2)), rng.uniform(0.5, 2, (B, T, 2, 2, 5))
        return q, k, v, q_norm, k_norm, log_decay, weight, (rng.uniform(1, 2, (B, 2, 2, 3, 5)), rng.uniform(1, 2, (B, 2, 2, 3)))
    if op == "diagonal_ssm":  # few turns in T tokens
        u, dt, c, d = rng.uniform(0.5, 2, (B, T, 6)), rng.uniform(0.02, 0.1, 6), rng.uniform(0.5, 2, (6, 3, 2)), rng.uniform(0.5, 2, 6)
        a = np.stack([-rng.uniform(0.5, 2, (6, 3)), rng.uniform(0.1, 0.4, (6, 3))], -1)
        return u, dt, a, c * [1, -1], d, rng.uniform(1, 2, (B, 6, 3, 2))
    u, dt, b, c = (rng.uniform(0.5, 2, (B, T, n)) for n in (6, 6, 3, 3))
    return u, dt / 8, -rng.uniform(0.5, 2, (6, 3)), b, c, rng.uniform(0.5, 2, 6), rng.uniform(1, 2, (B, 6, 3))


def cast(arrays: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), arrays)


def pulled(run: Any, given: Any, marks: Any) -> Any:
    """Outputs, and gradients of their sum."""

    def both(*given: Any) -> Any:
        out, pull = jax.vjp(lambda *a: run(*a, **marks), *given)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return jax.jit(both)(*given)


@pytest.mark.parametrize(("op", "sequences"), [*((op, 1) for op in OPS), ("diagonal_ssm", 2)])
def test_a_kernel_is_the_recurrence(op: str, sequences: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagonal_kernel, "SEQUENCES", sequences)
    if op == "diagonal_ssm":
        jax.clear_caches()
    given, marks = inputs(op, rng), {"reset": rng.random((B, T)) < 0.1, "valid": rng.random((B, T)) < 0.8}
    for where in ((0, 1), (0, T // 2), (0, T // 2 + 1), (-1, 0), (-1, T - 1)):
        marks["reset"][where] = marks["valid"][where] = True
    with jax.enable_x64(True):
        truth = pulled(OPS[op].recurrent, cast(given, jnp.float64), marks)
    found = pulled(lambda *a, **m: OPS[op].parallel(*a, **m, implementation="pallas"), cast(given, jnp.float32), marks)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        judge.same(np.asarray(a, np.float64), np.asarray(b), numerics.formula("float32", T, gradient=True))


def test_scales_that_share_a_normaliser(rng: np.random.Generator) -> None:
    """As InfinityFormer's: q' = q, and a weight for each token. What reaches q, k, v, log λ and the weights; a hard decay is among them."""
    q, k, v, _, _, log_decay, weight, state = inputs("multiscale", rng)
    log_decay[:, 5] = -1000

    def run(form: Any, dtype: Any, **more: Any) -> Any:
        return pulled(
            lambda q, k, *rest, **more: form(q, k, rest[0], q, k, *rest[1:], **more),
            cast((q, k, v, log_decay, weight[..., :1, :1], state), dtype),
            more,
        )

    with jax.enable_x64(True):
        truth = run(multiscale.recurrent, jnp.float64)
    found = run(functools.partial(multiscale.parallel, implementation="pallas"), jnp.float32)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        judge.same(np.asarray(a, np.float64), np.asarray(b), numerics.formula("float32", T, gradient=True))


def test_second_derivatives(rng: np.random.Generator) -> None:
    """By q, of the squares of the first derivatives by k."""
    given, reset = cast(inputs("linear_attention", rng), jnp.float32), jnp.asarray(rng.random((B, T)) < 0.1)

    def twice(implementation: str) -> Any:
        run = functools.partial(linear_attention.parallel, reset=reset, implementation=implementation)
        slope = jax.grad(lambda *a: run(*a)[0].sum(), 1)
        return jax.jit(jax.grad(lambda *a: jnp.square(slope(*a)).sum()))(*given)

    judge.same(twice("pallas"), twice("plain"), numerics.formula("float32", T, gradient=True))


def test_what_a_kernel_does_not_serve(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    u, dt, a, b, c, d, h = cast(inputs("selective_scan", rng), jnp.float32)
    wide_a, wide_b, wide_c, wide_h = (jnp.concatenate([x] * 20, -1) for x in (a, b, c, h))
    with pytest.raises(InputError, match="N from 1 to 32, not 60; use 'auto' or 'plain'"):
        selective_scan.parallel(u, dt, wide_a, wide_b, wide_c, d, wide_h, implementation="pallas")
    registry._tell.cache_clear()
    with caplog.at_level(logging.DEBUG, "unisono_jax"):
        for _ in "12":
            selective_scan.parallel(u, dt, a, b, c, d, h)
    assert [record.message for record in caplog.records] == [
        "selective_scan: plain operations, since selective_scan has kernels for a GPU, not for a CPU"
    ]
    monkeypatch.delenv(registry.INTERPRET)
    with pytest.raises(InputError, match="'pallas' cannot run on cpu"):
        selective_scan.parallel(u, dt, a, b, c, d, h, implementation="pallas")


def test_auto_takes_the_extra_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.INTERPRET)
    monkeypatch.setattr(registry, "_hopper", lambda: True)
    monkeypatch.setattr(registry, "unavailable", lambda name: None)
    assert registry.chosen("auto", "selective_scan", "float32", {"N": 16}) == "jla"
    assert registry.chosen("auto", "linear_attention", "float32", {"K": 16, "V": 16}) == "pallas"
    monkeypatch.setattr(registry, "divided", lambda: True)
    assert registry.chosen("auto", "selective_scan", "float32", {"N": 16}) == "pallas"
    monkeypatch.setattr(registry, "unavailable", lambda name: "not here" if name == "jla" else None)
    assert registry.chosen("auto", "selective_scan", "float32", {"N": 16}) == "pallas"


def test_the_extra_has_derivatives_and_runs_elsewhere(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its scan that answers wrongly: it is traced, and what runs on a CPU is plain."""
    padded = []

    def mamba1(C: Any, B: Any, u: Any, dt: Any, A: Any, *, d: Any, initial_state: Any, **_: Any) -> Any:
        padded.append((u.shape, A.shape))
        return (C.sum() + B.sum() + A.sum() + d.sum()) * (u + dt), 2 * initial_state

    module: Any = types.ModuleType("mamba1")
    module.mamba1 = mamba1
    monkeypatch.setitem(sys.modules, "jla.ops.mosaic_gpu.mamba1", module)
    given = cast(inputs("selective_scan", rng), jnp.float32)
    found = pulled(jla_kernel.scan, given, {})
    wanted = pulled(functools.partial(selective_scan.parallel, implementation="plain"), given, {})
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        judge.same(np.asarray(a), np.asarray(b), numerics.formula("float32", T, gradient=True))
    assert set(padded) == {((B, 32, 128), (128, 4))}

    def kernels(length: int, quickest: bool, slopes: bool) -> tuple[bool, bool]:
        """Whether the extra is asked, and whether Pallas' kernel is."""
        padded.clear()
        jax.clear_caches()
        shapes = *[(1, length, 8)] * 2, (8, 4), *[(1, length, 4)] * 2, (8,), (1, 8, 4)
        like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        run = functools.partial(jla_kernel.scan, quickest=quickest)
        text = str(jax.make_jaxpr(jax.grad(lambda *a: run(*a)[0].sum()) if slopes else run)(*like))
        return bool(padded), "pallas_call" in text

    long = jla_kernel.SEGMENTS * 512
    assert kernels(long, True, slopes=False) == (False, True)
    for case in ((long, False, False), (long, True, True), (32, True, False)):
        assert kernels(*case) == (True, False), case


@pytest.mark.parametrize("op", ["linear_attention", "selective_scan"])
def test_layers_share_their_kernels(op: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of three layers are lowered for a GPU: a program has the kernels of one."""
    monkeypatch.delenv(registry.INTERPRET)
    given = cast(inputs(op, rng), jnp.float32)
    at = 2 if op == "linear_attention" else 0  # what is as wide as what comes out

    def stacked(layers: int, x: jax.Array, *rest: Any) -> jax.Array:
        for _ in range(layers):
            x = RUNS[op](*rest[:at], x, *rest[at:])[0].astype(x.dtype)
        return x.sum()

    def kernels(layers: int) -> int:
        run = jax.jit(jax.value_and_grad(functools.partial(stacked, layers)))
        return run.trace(given[at], *given[:at], *given[at + 1 :]).lower(lowering_platforms=("cuda",)).as_text().count("gpu.triton")

    assert kernels(3) == kernels(1) > 1


@pytest.mark.parametrize("op", OPS)
def test_inside_a_shard_map(op: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, where arrays of tokens are divided and parameters are not. Kernels are traced; what runs on a CPU is plain."""
    monkeypatch.delenv(registry.INTERPRET)
    given = cast(inputs(op, rng), jnp.float32)
    parts = tuple(P() if i in PARAMS.get(op, ()) else P("d") for i in range(len(given)))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))

    def run(*given: Any) -> jax.Array:
        assert registry.divided()
        return RUNS[op](*given)[0]

    def slopes(run: Any) -> Any:
        return jax.jit(jax.grad(lambda *a: jnp.square(run(*a)).sum(), tuple(range(len(given)))))

    traced = slopes(jax.shard_map(run, mesh=mesh, in_specs=parts, out_specs=P("d"))).trace(*given)
    assert "pallas_call" in str(traced.jaxpr)
    if op in PARAMS:
        wanted = slopes(lambda *a: OPS[op].parallel(*a, implementation="plain")[0])(*given)
        for a, b in zip(traced.lower().compile()(*given), wanted, strict=True):
            judge.same(np.asarray(a), np.asarray(b), numerics.formula("float32", T, gradient=True))
    assert not registry.divided()
