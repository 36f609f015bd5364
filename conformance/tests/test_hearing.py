"""judge_op: one function before the court, from Python."""

from __future__ import annotations

import pytest
from unisono_conformance import judge_op
from unisono_spec.contract import InputError
from unisono_spec.ops import decayed_sum


def forgets(x, decay, initial_state, reset=None, valid=None):
    """The state that it was given is of no use to it."""
    o, last = decayed_sum.recurrent(x, decay, 0 * initial_state, reset, valid)
    return o, last


def blind(x, decay, initial_state):
    """Knows no marks."""
    return decayed_sum.recurrent(x, decay, initial_state)


def test_what_is_right_holds():
    verdict = judge_op(decayed_sum.parallel, "decayed_sum", dtypes=("float64",))
    assert verdict.holds, verdict
    assert not verdict.failed
    assert {"P1", "P2", "P3", "P5", "P13", "P15", "P16"} <= {line.item.prop.label for line in verdict.lines}
    assert "Every property holds." in str(verdict)
    assert "| P1 | equals the spec |" in verdict._repr_markdown_()


def test_what_is_wrong_fails_by_the_property_that_it_violates():
    verdict = judge_op(forgets, "decayed_sum", dtypes=("float64",), properties=("P3", "P15r", "P16"))
    assert list(verdict.failed) == ["P3", "P15r"]  # not P16: its bits are the same twice
    assert "times the budget" in verdict.failed["P3"]
    assert "reproduce" not in verdict.failed["P3"]
    assert "P3    split anywhere and handed over" in str(verdict)
    assert "FAILED" in str(verdict)


def test_to_die_is_a_verdict():
    verdict = judge_op(blind, "decayed_sum", dtypes=("float64",), properties=("P1", "P15"))
    assert list(verdict.failed) == ["P15"]
    assert "it died of TypeError" in verdict.failed["P15"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"op": "decayed_some"}, "op: 'decayed_some'.*decayed_sum"),
        ({"form": "sideways"}, "form: 'sideways'"),
        ({"framework": "numpi"}, "framework: 'numpi'.*numpy"),
        ({"framework": "torch"}, r"framework: torch is not installed here.*unisono\[torch\]"),
        ({"dtypes": ("float99",)}, "dtype: 'float99'"),
        ({"dtypes": ()}, "dtypes: none given"),
        ({"properties": ("P99",)}, "properties: 'P99'"),
        ({"properties": ("P7",)}, "none of P7 applies to decayed_sum in numpy"),
        ({"profile": "quick"}, "profile: 'quick'"),
        ({"function": 3}, "function: 3 cannot be called"),
    ],
)
def test_bad_arguments_are_named(arguments, words, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match=words):
        judge_op(**{"function": decayed_sum.parallel, "op": "decayed_sum", **arguments})
