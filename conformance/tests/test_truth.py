"""What the spec says: kept between runs, asked once for rows of one length."""

from __future__ import annotations

import numpy as np
import pytest
from unisono_conformance.cases import case, cases
from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import stack
from unisono_conformance.judging import numerics, truth
from unisono_conformance.judging.patches import patched
from unisono_conformance.judging.store import Store
from unisono_spec import create
from unisono_spec.contract import InputError
from unisono_spec.layers.params import exact
from unisono_spec.ops import diagonal_ssm, multiscale


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What other tests have asked for, and where it is kept, is theirs."""
    monkeypatch.setattr(truth, "_memory", type(truth._memory)())
    monkeypatch.setattr(truth, "_store", None)
    yield
    truth.keep_in(None)


def asked(dtype: str = "float32"):
    draw, lat = Draw("lat", "linear", "tame", 2, 8, 3), case("lat")
    return lat, lat.setting(draw), lat.inputs(draw, dtype), dtype


def test_what_is_kept_is_what_was_said(tmp_path, monkeypatch):
    (o, budget), state = truth.expected(*asked())
    cotangents = np.ones_like(o), {name: np.ones_like(a) for name, (a, _) in state.items() if a.dtype.kind == "f"}
    slopes = truth.slopes(*asked()[:3], *cotangents, "float32", "map")
    truth.keep_in(tmp_path)
    for _ in range(2):  # computed and kept, then read
        truth._memory.clear()
        again, last = truth.expected(*asked())
        for found, expected in ((again, (o, budget)), *((last[name], pair) for name, pair in state.items())):
            assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]
        for name, (moves, true, limit) in truth.slopes(*asked()[:3], *cotangents, "float32", "map").items():
            assert [a.tobytes() for a in (true, limit)] == [a.tobytes() for a in slopes[name][1:]]
            assert all((v == slopes[name][0][array]).all() for array, v in moves.items())
        monkeypatch.setattr(truth, "_realised", None)
        monkeypatch.setattr(truth, "_slope", None)


def test_the_order_of_arrays_is_no_other_question(tmp_path, monkeypatch):
    """Else another process, which reads what is kept, would have it computed anew."""
    truth.keep_in(tmp_path)
    lat, setting, inputs, dtype = asked()

    def turned(arrays):
        return dict(reversed(arrays.items()))

    (o, _), state = truth.expected(lat, setting, inputs, dtype)
    assert list(state) == sorted(state)
    dstate = {name: np.ones_like(a) for name, (a, _) in state.items() if a.dtype.kind == "f"}
    truth.slopes(lat, setting, inputs, o, dstate, dtype, "kind")
    truth._memory.clear()
    monkeypatch.setattr(truth, "_realised", None)
    monkeypatch.setattr(truth, "_slope", None)
    inputs = inputs.replace(state=turned(inputs.state), params=turned(inputs.params))
    assert list(truth.expected(lat, setting, inputs, dtype)[1]) == sorted(state)
    assert len(dstate) > 1
    truth.slopes(lat, setting, inputs, o, turned(dstate), dtype, "kind")


def test_another_cotangent_is_another_question(tmp_path):
    truth.keep_in(tmp_path)
    (o, _), _ = truth.expected(*asked())
    one, two = (truth.slopes(*asked()[:3], do, {}, "float32", "map") for do in (np.ones_like(o), 2 * np.ones_like(o)))
    assert any((one[name][1] != two[name][1]).any() for name in one)


def test_answers_of_other_code_are_deleted(tmp_path):
    (tmp_path / "truth-0123456789abcdef.sqlite").write_bytes(b"")
    Store(tmp_path).close()
    assert len(list(tmp_path.glob("truth-*.sqlite"))) == 1
    assert not (tmp_path / "truth-0123456789abcdef.sqlite").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"truth: .*file/folder cannot keep"):
        Store(tmp_path / "file" / "folder")


def test_rows_of_one_length_are_asked_for_together():
    lat, setting, inputs, dtype = asked("float64")
    pieces = [inputs.rows([row]).part(start, stop) for row, start, stop in ((0, 0, 3), (1, 2, 5), (1, 0, 8))]
    for piece, (o, state) in zip(pieces, truth.expected_each(lat, setting, pieces, dtype), strict=True):
        alone, last = truth.expected(lat, setting, piece, dtype)
        for found, pair in ((o, alone), *((state[name], last[name]) for name in last)):
            assert numerics.share(found[0], *pair).max() <= 1


INEXACT = [name for name, each in cases().items() if isinstance(each, ModelCase) and each.inexact]


@pytest.mark.parametrize("form", ["recurrent", "parallel"])
@pytest.mark.parametrize("name", INEXACT)
def test_each_realisation_errs_by_itself(name, form):
    """Also where the error is that of a parameter, which has no rows: one error for all could be nearly none."""
    model, alone = cases()[name], 0
    assert isinstance(model, ModelCase)
    for variant in model.defaults:
        draw = Draw(name, variant, "tame", 1, 8, 3)
        setting, inputs = model.setting(draw), model.inputs(draw, "float32")
        copies = stack([inputs] * 4)
        found, _ = model.reference(setting, copies, form, rounded=exact)
        apart = len(np.unique(found, axis=0))
        assert apart == 4 or (found == model.reference(setting, copies, form)[0]).all(), variant  # where nothing is inexact
        alone += apart == 4
    assert alone


def turned(op, off):
    return lambda u, dt, A, *more: op(u, dt, (A + off(A.shape) / dt[:, None, None]).astype(A.dtype), *more)


def decayed(op, off):
    def run(q, k, v, q_norm, k_norm, log_decay, *more, **named):
        return op(q, k, v, q_norm, k_norm, (log_decay + (log_decay < 0) * off(log_decay.shape[-1])).astype("float32"), *more, **named)

    return run


LONG = [("s4d", "plain", "near_one"), ("s4d", "bare", "large"), ("infinityformer", "learned", "near_one")]


@pytest.mark.parametrize(("name", "variant", "regime"), LONG)
def test_decays_may_be_off_by_two_roundings_at_each_of_a_thousand_tokens(name, variant, regime):
    """As a framework's float32 e^x is, which gives the same at each token."""
    model, draw = case(name), Draw(name, variant, regime, batch=1, length=1000, chunk_size=256, seed=1)
    setting, inputs = model.setting(draw), model.inputs(draw, "float32")
    (o, budget), state = truth.expected(model, setting, inputs, "float32")
    module, change = {"s4d": (diagonal_ssm, turned), "infinityformer": (multiscale, decayed)}[name]
    for seed in range(2):

        def off(shape, seed=seed):
            return np.random.default_rng(seed).choice([-1, 1], shape) * numerics.rounding("float32", 2)

        with patched(tuple((module, form, change(getattr(module, form), off)) for form in ("step", "parallel"))):
            found, last = create(setting, inputs.params, dtype="float32").forward(inputs.arrays["tokens"], inputs.state, chunk_size=256)
        shares = [numerics.share(found, o, budget), *(numerics.share(last[key], *pair) for key, pair in state.items())]
        assert max(share.max() for share in shares) <= 1
