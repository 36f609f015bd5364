"""No comparison has a tolerance of its own: what is compared anywhere in this repository is held to a number that numerics.py derives."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# of tests every line is read, of the other folders how differences are compared
TESTS = ("conformance/tests", "conformance/oracles", "spec/tests", "impl_jax/tests", "impl_torch/tests", "tools/tests")
OTHERS = ("conformance/unisono_conformance", "impl_jax/unisono_jax", "impl_torch/unisono_torch", "tools/unisono_tools", "docs/examples")
HOMES = {"numerics.py", "test_numerics.py", Path(__file__).name}  # where tolerances are derived, and what judges them
# An implementation cannot call the court: what an export costs in roundings is derived where it is checked.
# Pathfinder draws by published lengths and angles, which are conditions of a picture and no errors of arithmetic.
BY_THEMSELVES = {
    "impl_onnx/unisono_onnx/check.py",
    "tools/unisono_tools/tasks/pathfinder.py",
}
COURT = {"numerics", "judge", "truth", "tails"}  # modules whose numbers are derived
CONTRACT = {"NEAR_TIE"}  # what each room promises to its users by

KEYWORDS = {"rtol", "atol", "rel_tol", "abs_tol", "rel", "abs", "decimal", "significant", "places", "tolerance"}
# what compares by default, too, with a tolerance of its own
WITH_DEFAULTS = {"allclose", "isclose", "assert_allclose", "assert_close", "approx", "assert_almost_equal", "assert_array_almost_equal"}
# which arguments of what compares are tolerances
ARGUMENTS = {**dict.fromkeys(WITH_DEFAULTS, slice(2, 4)), "approx": slice(1, 3), **dict.fromkeys(("close", "same", "within"), slice(2, 3))}
DISTANCES = {"abs", "fabs", "absolute", "ptp", "norm", "hypot"}
ARITHMETIC = {"sqrt", "max", "min", "float", "log", "exp", "abs"}
# fields that hold one
MEASURED = re.compile(r"(^|_)(error|errors|difference|differences|deviation|drift|gap|gaps)(_|$)")


class Scope:
    """What names stand for, here and around: the expressions that they were assigned."""

    def __init__(self, around: Scope | None = None) -> None:
        self.around, self.values = around, dict[str, list[ast.expr]]()

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else []
            for i, part in enumerate(target.elts):
                self.assign(part, values[i] if len(values) == len(target.elts) else value)
            return
        while isinstance(target, (ast.Subscript, ast.Attribute, ast.Starred)):
            target = target.value
        if isinstance(target, ast.Name):
            self.values.setdefault(target.id, []).append(value)

    def meaning(self, name: str) -> list[ast.expr]:
        return self.values.get(name) or (self.around.meaning(name) if self.around else [])

    def reach(self, expression: ast.AST, seen: set[str] | None = None) -> Iterator[ast.AST]:
        """Every node of `expression`, and of what its names stand for."""
        seen = set() if seen is None else seen
        for node in ast.walk(expression):
            yield node
            if isinstance(node, ast.Name) and node.id not in seen:
                seen.add(node.id)
                for value in self.meaning(node.id):
                    yield from self.reach(value, seen)


def called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def field(node: ast.AST) -> str:
    """The name in x.name and x["name"]."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    return node.attr if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in COURT else ""


def is_difference(expression: ast.AST, scope: Scope) -> bool:
    """Whether a distance of two things is in it: |a − b|, the norm of a difference, a range; or a field that is called an error."""
    for node in scope.reach(expression):
        name = called(node)
        if name == "ptp" or MEASURED.search(field(node)):
            return True
        if name in DISTANCES and any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub) for n in scope.reach(node)):
            return True
    return False


def is_derived(expression: ast.AST, scope: Scope) -> bool:
    """Whether it comes from the court, or is exact: whole numbers, or fractions of them."""
    nodes = list(scope.reach(expression))
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    exact = "Fraction" in names or all(isinstance(n, (ast.Constant, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop)) for n in nodes)
    return (bool(names & (COURT | CONTRACT)) or exact) and not has_own_number(expression, scope)


def own_numbers(expression: ast.AST, scope: Scope) -> Iterator[Any]:
    """The number literals and roundoffs that are factors or terms of it; what is computed by a call is data."""
    left, seen = [expression], set[str]()
    while left:
        node = left.pop()
        if is_roundoff(node):
            yield math.nan
        if isinstance(node, ast.Constant):
            yield node.value
        if isinstance(node, ast.Name) and node.id not in seen:
            seen.add(node.id)
            left += scope.meaning(node.id)
        if isinstance(node, ast.Subscript):
            left.append(node.value)
        elif not isinstance(node, ast.Call) or called(node) in ARITHMETIC:
            left += ast.iter_child_nodes(node)


def has_own_number(expression: ast.AST, scope: Scope) -> bool:
    return any(isinstance(n, float) and n not in (0.0, 1.0) for n in own_numbers(expression, scope))


def is_roundoff(node: ast.AST) -> bool:
    """2⁻ⁿ or 10⁻ⁿ written out, `finfo(…).eps`, or numerics.U, which only numerics.py puts to use."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and isinstance(node.left, ast.Constant) and node.left.value in (2, 10):
        power = node.right.operand if isinstance(node.right, ast.UnaryOp) and isinstance(node.right.op, ast.USub) else None
        return isinstance(power, ast.Constant)
    if isinstance(node, ast.Attribute):
        return (node.attr == "eps" and called(node.value) == "finfo") or (node.attr == "U" and getattr(node.value, "id", "") == "numerics")
    return called(node) in ("spacing", "nextafter")


class Lint(ast.NodeVisitor):
    def __init__(self, tests: bool) -> None:
        self.tests, self.scope, self.lines = tests, Scope(), set[int]()

    def inside(self, node: ast.AST) -> None:
        self.scope = Scope(self.scope)
        for child in ast.walk(node):  # a name may be read above the line that assigns it
            if isinstance(child, ast.Assign):
                for target in child.targets:
                    self.scope.assign(target, child.value)
            elif isinstance(child, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and child.value is not None:
                self.scope.assign(child.target, child.value)
            elif isinstance(child, (ast.For, ast.comprehension)):
                self.scope.assign(child.target, child.iter)
            elif isinstance(child, ast.arguments):
                named = [*child.posonlyargs, *child.args]
                for argument, default in zip(named[len(named) - len(child.defaults) :], child.defaults, strict=True):
                    self.scope.assign(ast.Name(argument.arg), default)
        self.generic_visit(node)
        self.scope = self.scope.around or self.scope

    visit_Module = visit_FunctionDef = visit_AsyncFunctionDef = inside

    def visit_Compare(self, node: ast.Compare) -> None:
        sides = [node.left, *node.comparators]
        for left, how, right in zip(sides, node.ops, sides[1:], strict=False):
            measured = [is_difference(side, self.scope) for side in (left, right)]
            if isinstance(how, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) and any(measured):
                bound = right if measured[0] else left
                nearer = all(measured) and not any(own_numbers(bound, self.scope))  # |a − b| < |a − c|
                if not nearer and not is_derived(bound, self.scope):
                    self.lines.add(node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = called(node)
        bounds = [k.value for k in node.keywords if k.arg in KEYWORDS] + node.args[ARGUMENTS.get(name, slice(0))]
        if any(has_own_number(bound, self.scope) for bound in bounds) or (name in WITH_DEFAULTS and not bounds):
            self.lines.add(node.lineno)
        self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        if self.tests and is_roundoff(node):
            self.lines.add(node.lineno)  # pyright: ignore[reportAttributeAccessIssue]
        super().generic_visit(node)


def own_tolerances(source: str, tests: bool = True) -> list[int]:
    """Lines on which something is compared with a number that is not the court's."""
    lint = Lint(tests)
    lint.visit(ast.parse(source))
    return sorted(lint.lines)


def test_no_tolerance_elsewhere() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folders, tests in ((TESTS, True), (OTHERS, False))
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name not in HOMES and str(path.relative_to(ROOT)) not in BY_THEMSELVES
        for line in own_tolerances(path.read_text("utf-8"), tests)
    ]
    assert not found


PLANTED = """
np.allclose(a, b)
assert_allclose(a, b, rtol=1e-5)
torch.testing.assert_close(a, b, 1e-3, 1e-3)
torch.testing.assert_close(a, b)
assert x == pytest.approx(3)
assert x == pytest.approx(3, rel=1e-6)
close(a, b, 4 * np.finfo(np.float32).eps)
judge.within(a, b, 1e-5 * scale)
judge.same(a, b, 2**4 * numerics.U["float32"])
assert np.abs(a - b).max() < 1e-6
assert (a - b).abs().max() <= 2.0**-20
assert 1e-3 > abs(x - y)
assert (np.abs(a - b) <= bound * scale).all()
assert np.linalg.norm(a - b) / np.linalg.norm(b) < limit
assert np.ptp(scores) <= AGREE
assert row["error_x"] < 1e-4
assert row.error < SMALL
assert not abs(a - b) > tolerance
ok = bool((np.abs(a - b) < eps).all())
wrong = np.abs(a - b).max() > 4 * np.abs(c - b).max() + 2**-20
"""
HIDDEN = """
AGREE = 1e-10
def check(y, truth, float32, tolerance=1e-6):
    SHARE, FLOOR = 4.0, 1e-6
    allowed = SHARE * np.abs(float32 - truth).max() + FLOOR * np.abs(truth).max()
    error = np.abs(y - truth).max()
    assert error <= allowed
    assert error <= tolerance
    found = {}
    for name in y:
        found[name] = np.ptp(y[name])
    assert max(found.values()) <= AGREE
"""
DERIVED = """
assert np.abs(a - b).max() <= numerics.formula("float32", 64) * terms
assert abs(count - target) <= 2
assert 200 * abs(count - 10**6) <= 10**6
assert abs(Fraction(count, 7) - 1) < Fraction(1, 100)
assert np.abs(a - b).max() == 0
assert share.max() <= 1
assert 1e-3 <= dt.min() < 2e-3
assert x == pytest.approx(3, rel=numerics.rounding("float64", 8))
budget = numerics.row_budget(truth, errors, dtype, 8)
assert (np.abs(a - truth) <= budget).all()
close(a, b, numerics.rounding("bfloat16", 16))
"""


@pytest.mark.parametrize("line", PLANTED.strip().splitlines())
def test_lint_sees(line: str) -> None:
    assert own_tolerances(line) == [1]


def test_lint_sees_through_names() -> None:
    lines = [HIDDEN.splitlines()[n - 1].strip() for n in own_tolerances(HIDDEN)]
    assert lines == ["assert error <= allowed", "assert error <= tolerance", "assert max(found.values()) <= AGREE"]


def test_lint_lets_derived_numbers_pass() -> None:
    assert not own_tolerances(DERIVED)
