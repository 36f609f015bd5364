"""Continuing prompts: in one call or many, ragged or not, in pieces."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_spec import create
from unisono_spec.contract import InputError, generation
from unisono_spec.contract.sampling import GREEDY, Sampling, choose

CASES = [(case, variant) for case in cases().values() if isinstance(case, ModelCase) for variant in case.defaults]
EACH = pytest.mark.parametrize(("case", "variant"), CASES, ids=[f"{case.name}-{variant}" for case, variant in CASES])
WARM = Sampling(temperature=1.5, seed=7)
LENGTH = 9


def made(case: ModelCase, variant: str) -> tuple[Any, np.ndarray]:
    draw = Draw(case=case.name, variant=variant, regime=case.regimes[0], length=LENGTH)
    inputs = case.inputs(draw, "float32")
    return create(case.setting(draw), inputs.params), inputs.arrays["tokens"]


@EACH
def test_calls_of_one_token_are_one_call_of_many(case: ModelCase, variant: str) -> None:
    model, prompt = made(case, variant)
    whole = model.generate(prompt, 7, WARM)
    assert whole.n_generated == 7
    found, tokens = model.generate(prompt, 1, WARM), []
    tokens.append(found.tokens)
    for n in (1, 1, 1, 3):
        found = model.generate(found.tokens[:, -1:], n, WARM, found.state, found.n_generated)
        tokens.append(found.tokens)
    assert np.array_equal(np.concatenate(tokens, 1), whole.tokens)
    assert found.n_generated == 7
    # the state has read all but the last id
    text = np.concatenate([prompt, whole.tokens], 1)
    start = model.init_state(2, 32)
    logits, _ = model.forward(text, start)
    again, _ = model.step(whole.tokens[:, -1], whole.state)
    np.testing.assert_array_equal(choose(again, GREEDY, 0)[0], choose(logits[:, -1], GREEDY, 0)[0])
    # neither the prompt's length nor the position counts: the same logits draw by the number generated alone
    late = model.generate(prompt, 1, WARM, n_generated=6).tokens
    assert np.array_equal(late[:, 0], choose(model.forward(prompt)[0][:, -1], WARM, 6)[0])


@EACH
def test_ragged_prompts(case: ModelCase, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded left, right and between, in pieces of any length: as each row alone, and with no logits but the last."""
    model, prompt = made(case, variant)
    valid = np.ones((3, LENGTH), bool)
    valid[0, :5], valid[1, 4:], valid[2, 2:5] = False, False, False
    rows = np.concatenate([prompt, prompt[:1, ::-1]])
    alone = [model.generate(row[None, read], 4).tokens[0] for row, read in zip(rows, valid, strict=True)]
    for piece in (LENGTH, 4, 3):
        monkeypatch.setattr(generation, "PIECE", piece)
        found = model.generate(rows, 4, valid=valid)
        assert np.array_equal(found.tokens, alone)


def test_the_head_reads_one_token_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = made(*CASES[0])
    seen, head = [], model._head
    monkeypatch.setattr(model, "_head", lambda x: (seen.append(x.shape), head(x))[1])
    model.generate(prompt, 3)
    assert [len(shape) for shape in seen] == [2, 2, 2]


def test_nothing_generated_is_a_prompt_read() -> None:
    model, prompt = made(*CASES[0])
    found = model.generate(prompt, 0)
    assert (found.tokens.shape, found.near_ties.shape, found.n_generated) == ((2, 0), (2, 0), 0)
    for name, a in model.forward(prompt)[1].items():
        assert np.array_equal(found.state[name], a)


def test_bad_arguments_are_named_with_a_remedy() -> None:
    model, prompt = made(*CASES[0])
    for message, arguments in {
        "max_new_tokens: -1; give": {"max_new_tokens": -1},
        "max_new_tokens: 2.0; give": {"max_new_tokens": 2.0},
        "max_new_tokens: True; give": {"max_new_tokens": True},
        "n_generated: -1; give": {"n_generated": -1},
        "n_generated: None; give": {"n_generated": None},
        "more than 2..32; use another seed": {"n_generated": 2**32 - 1},
        "sampling: dict; give": {"sampling": {}},
        "valid: row 1 has no token": {"valid": np.array([[True] * LENGTH, [False] * LENGTH])},
        "valid: shape": {"valid": np.ones((2, 3), bool)},
        "T is 0": {"prompt": prompt[:, :0]},
        "id 999 is outside": {"prompt": prompt * 0 + 999},
        "state: ": {"state": {}},
    }.items():
        given: dict[str, Any] = {"prompt": prompt, "max_new_tokens": 2, **arguments}
        with pytest.raises(InputError, match=message):
            model.generate(**given)


@pytest.mark.parametrize("law", [WARM, Sampling(1.5, seed=7, repetition_penalty=1.3)])
def test_who_follows_is_asked_as_early_as_can_be(law: Sampling) -> None:
    """For the ids after the first, and for the first where the prompt is one token; where it refuses, a step at a time is right."""
    case, variant = CASES[0]
    model, prompt = made(case, variant)
    before, asked = model.generate(prompt, 1, law), []

    def last(tokens: np.ndarray, state: Any, valid: np.ndarray | None) -> tuple[np.ndarray, Any]:
        logits, state = model.forward(tokens, state)
        return logits[:, -1], state

    def follow(refuses: bool, ids: np.ndarray, state: Any, law: Sampling, number: int, count: int, seen: np.ndarray | None) -> Any:
        asked.append((number, count))
        assert ids.dtype == np.int64
        assert ids.flags.writeable
        if refuses:
            return None
        found = model.generate(ids[:, None], count, law, state, number, seen=seen)
        return found.tokens, found.near_ties, found.state

    before.tokens.flags.writeable = False
    for given, how in ((prompt, {}), (before.tokens, {"state": before.state, "n_generated": 1, "seen": before.seen})):
        true = model.generate(given, 4, law, **how)
        for refuses in (False, True):
            found = generation.generate(
                model.config,
                lambda state, batch, more: model.init_state(batch, 64) if state is None else state,
                last,
                given,
                4,
                law,
                how.get("state"),
                how.get("n_generated", 0),
                None,
                how.get("seen"),
                partial(follow, refuses),
            )
            assert np.array_equal(found.tokens, true.tokens)
            assert found.n_generated == true.n_generated
            assert found.seen is None if true.seen is None else np.array_equal(np.asarray(found.seen), true.seen)
    assert asked == [(1, 3), (1, 3), (1, 4), (1, 4), (2, 3)]


def test_positions_are_asked_for_before_who_follows() -> None:
    case, variant = next(pair for pair in CASES if "position" in made(*pair)[0].init_state(1, 8))
    model, prompt = made(case, variant)
    state = model.init_state(2, 64)
    state["position"] = np.array([3, -1], np.int32)

    def nobody(*given: Any) -> Any:
        raise AssertionError

    with pytest.raises(InputError, match="state: position is -1"):
        generation.generate(model.config, lambda state, batch, more: state, nobody, prompt[:, :1], 9, GREEDY, state, follow=nobody)
