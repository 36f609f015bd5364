"""The tolerances: derived in one place, used from there, and honest."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from unisono_conformance.cases import case
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.pairwise import pairwise
from unisono_conformance.judging import judge, numerics, truth
from unisono_conformance.judging.patches import patched
from unisono_conformance.report import ledger

ROOT = Path(__file__).parents[2]
JUDGED = ("conformance", "spec/tests", "impl_jax/tests", "impl_torch/tests")
KEYWORDS = {"rtol", "atol", "rel_tol", "abs_tol", "rel", "abs", "decimal", "significant", "places"}
FUNCTIONS = {"allclose", "isclose", "assert_allclose", "assert_close", "approx", "assert_almost_equal", "assert_array_almost_equal"}


def literal_tolerances(source: str) -> list[int]:
    """Lines on which a comparison is given a number, or left to NumPy's default."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func).partition(".")[0]
        bounds = [k.value for k in node.keywords if k.arg in KEYWORDS]
        if name in FUNCTIONS:
            bounds += node.args[1:3] if name == "approx" else node.args[2:4]
        numbers = [part for b in bounds for part in ast.walk(b) if isinstance(part, ast.Constant) and isinstance(part.value, float)]
        if numbers or (name in FUNCTIONS and owner in ("np", "numpy") and not bounds):
            found.append(node.lineno)
    return found


def test_no_literal_tolerance_elsewhere() -> None:
    offences = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in JUDGED
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "numerics.py"
        for line in literal_tolerances(path.read_text("utf-8"))
    ]
    assert not offences


@pytest.mark.parametrize(
    "line",
    ["np.allclose(a, b)", "assert_allclose(a, b, rtol=1e-5)", "torch.testing.assert_close(a, b, 1e-3, 1e-3)", "pytest.approx(3, rel=1e-6)"],
)
def test_lint_sees(line: str) -> None:
    assert literal_tolerances(line) == [1]


def test_unit_roundoffs() -> None:
    """u is the largest relative error of rounding to nearest: half the spacing at 1."""
    from unisono_spec.contract import DTYPES

    for name, u in numerics.U.items():
        one = np.ones((), DTYPES[name])
        assert (one + np.asarray(2 * u, DTYPES[name])) > one
        assert np.asarray(1 + u, np.longdouble).astype(DTYPES[name]) == one


@pytest.mark.parametrize("dtype", sorted(numerics.U))
@pytest.mark.parametrize("name", ["cram/decayed_sum", "cram/weighted_sum"])
def test_budget_is_small_and_holds_for_long_sums(name: str, dtype: str) -> None:
    """At T = 10⁴ the factor is still below LIMIT, so nothing is ever judged by nonsense."""
    assert numerics.formula(dtype, 10**4, 1, gradient=True) < numerics.LIMIT
    judged = case(name)
    draw = Draw(name, judged.defaults[0], length=64)
    inputs = judged.inputs(draw, dtype)
    (o, budget), _ = truth.expected(judged, judged.setting(draw), inputs, dtype)
    assert (budget > 0).all()
    assert numerics.share(o + 2 * budget, o, budget).min() > 1


def test_useless_budget_is_an_error() -> None:
    with pytest.raises(numerics.BudgetError):
        numerics.check_useful(np.full((4, 1), 0.2), np.ones((4, 1)), "it")


def test_inputs_that_say_too_little_are_drawn_anew() -> None:
    def judge(target: int, draw: Draw) -> int:
        if draw.seed < target:
            raise numerics.BudgetError("too wide")
        return draw.seed

    def item(first_useful_seed: int) -> Any:
        return SimpleNamespace(prop=SimpleNamespace(judge=judge), target=first_useful_seed)

    draw, result = Draw("lat", "linear", seed=5), ledger.Result(item(0))
    assert [ledger._judged(item(n), draw, result) for n in (0, 6, 8)] == [5, 6, 8]
    assert result.redrawn == 0 + 1 + 3
    with pytest.raises(numerics.BudgetError):
        ledger._judged(item(9), draw, result)


def test_share_is_infinite_without_a_number() -> None:
    assert numerics.share(np.array([np.nan, np.inf, 1.0]), np.ones(3), np.full(3, 1.0)).tolist() == [np.inf, np.inf, 0]
    assert numerics.share(np.array([2.0]), np.ones(1), np.zeros(1)).tolist() == [np.inf]


def test_arrays_of_other_names_are_not_the_same() -> None:
    with pytest.raises(judge.Disagreement, match="S stands where z is expected"):
        judge.same({"S": np.ones(2)}, {"z": np.ones(2)})


@pytest.mark.parametrize("seed", range(3))
def test_slopes_are_derivatives(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The complex step against central differences D(h), which err by h²/6 of the third derivative and by the errors of two losses
    over 2h. D(2h) errs by four times as much of the one, and so by three times as much more than D(h): no third derivative is guessed."""
    judged = case("cram")
    monkeypatch.setattr(type(judged), "together", lambda self, name: name)
    draw = Draw("cram", "adaptive", length=4, seed=seed)
    setting, inputs = judged.setting(draw), judged.inputs(draw, "float64")
    (o, budget), state = truth.expected(judged, setting, inputs, "float64")
    do, dstate = np.ones_like(o), {n: np.ones_like(a) for n, (a, _) in state.items() if a.dtype.kind == "f"}
    pairs = [(o, budget), *(state[n] for n in dstate)]
    blur = sum(np.broadcast_to(limit, a.shape).sum() + numerics.formula("float64", a.size) * np.abs(a).sum() for a, limit in pairs)

    def loss(params):
        y, last = judged.reference(setting, inputs.replace(params=params), "recurrent")
        return y.sum() + sum(last[n].sum() for n in dstate)

    h = numerics.U["float64"] ** (1 / 3)
    for (kind, name), (directions, slope, limit) in truth.slopes(judged, setting, inputs, do, dstate, "float64", "map").items():
        if kind != "params":
            continue
        for i, along in enumerate(slope):

            def difference(step: float, i: int = i, directions: dict = directions) -> float:
                up, down = (
                    loss({**inputs.params, **{n: inputs.params[n] + s * v[i] for n, v in directions.items()}}) for s in (step, -step)
                )
                return (up - down) / (2 * step)

            near, far = difference(h), difference(2 * h)
            assert abs(near - along) <= abs(far - near) + blur / h + limit[i], name


def test_few_coordinates_have_as_many_realisations_as_a_direction() -> None:
    """One coordinate alone, by one realisation, could err by nearly nothing: its budget would be too narrow by luck."""
    judged, draw = case("infinityformer"), Draw("infinityformer", "learned", length=4)
    setting, inputs = judged.setting(draw), judged.inputs(draw, "float32")
    (o, _), _ = truth.expected(judged, setting, inputs, "float32")
    name = min(inputs.params, key=lambda n: inputs.params[n].size)
    moves = {name: truth._directions(inputs.params[name].shape, None)}
    counted = []

    def along(*args: Any, **kwargs: Any) -> np.ndarray:
        counted.append(args[9] if len(args) > 9 else 0)
        return np.zeros((max(counted[-1], 1), len(moves[name]))) if counted[-1] else np.zeros(len(moves[name]))

    with patched(((truth, "_along", along),)):
        truth._slope(judged, setting, inputs, np.ones_like(o), {}, "float32", "params", name, moves, "coordinate")
    assert max(counted) * len(moves[name]) >= numerics.REALISATIONS


def test_pairwise_covers_every_pair() -> None:
    fields = {"a": (1, 2, 3), "b": (True, False), "c": "xyz", "d": (0, 1)}
    rows = pairwise(fields, lambda row: not (row["a"] == 1 and row["b"]))
    seen = {(m, row[m], n, row[n]) for row in rows for m in fields for n in fields}
    wanted = {(m, p, n, q) for m in fields for n in fields if m != n for p in fields[m] for q in fields[n]}
    assert wanted - seen == {("a", 1, "b", True), ("b", True, "a", 1)}
    assert len(rows) < 3 * 2 * 3 * 2
