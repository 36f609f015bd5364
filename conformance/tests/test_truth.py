"""What the spec says: kept between runs, asked once for rows of one length."""

from __future__ import annotations

import numpy as np
import pytest
from unisono_conformance.cases import case
from unisono_conformance.cases.draw import Draw
from unisono_conformance.judging import numerics, truth
from unisono_conformance.judging.store import Store
from unisono_spec.contract import InputError


@pytest.fixture(autouse=True)
def forgotten():
    truth._memory.clear()
    yield
    truth.keep_in(None)
    truth._memory.clear()


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
