"""Continuing prompts: in one call or many, ragged or not, in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_spec.contract import generation
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.sampling import GREEDY, Sampling, choose
from unisono_torch import create, numpy_state, state_from_numpy

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
    logits, _ = model.forward(torch.as_tensor(text), start)
    again, _ = model.step(torch.as_tensor(whole.tokens[:, -1]), whole.state)
    np.testing.assert_array_equal(choose(again.detach().numpy(), GREEDY, 0)[0], choose(logits[:, -1].detach().numpy(), GREEDY, 0)[0])
    # neither the prompt's length nor the position counts: the same logits draw by the number generated alone
    late = model.generate(prompt, 1, WARM, n_generated=6).tokens
    assert np.array_equal(late[:, 0], choose(model.forward(torch.as_tensor(prompt))[0][:, -1].detach().numpy(), WARM, 6)[0])


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


def test_long_prompts_cost_no_logits() -> None:
    """The head reads one token of each piece, and not 2,000 of a vocabulary of 65,536: half a gigabyte."""
    model = create(CRAMConfig(d_model=4, n_layers=1, code_bits=16, vocab_size=2**16))
    seen, head = [], model._head
    model._head = lambda x: (seen.append(tuple(x.shape)), head(x))[1]
    model.generate(np.zeros((1, 2000), int), 2)
    assert seen == [(1, 4)] * 5  # four pieces, and one token


def test_what_is_returned_can_be_trained_from() -> None:
    model, prompt = made(*CASES[0])
    state = model.generate(prompt, 1).state
    model.forward(torch.as_tensor(prompt), state)[0].sum().backward()


def test_arrays_lie_in_memory_as_they_like() -> None:
    """Prompts, marks and states flipped, read-only, of another byte order: as their copies."""
    model, prompt = made(*CASES[0])
    valid = np.ones(prompt.shape, bool)
    valid[:, -2:] = False
    right = model.generate(prompt, 3, valid=valid)
    fixed = prompt.copy()
    fixed.flags.writeable = False
    for given, marks in ((fixed, valid), (prompt[:, ::-1].copy()[:, ::-1], valid[:, ::-1].copy()[:, ::-1])):
        assert np.array_equal(model.generate(given, 3, valid=marks).tokens, right.tokens)
    state = numpy_state(right.state)
    for laid in (lambda a: a[:, ::-1].copy()[:, ::-1], lambda a: a.astype(a.dtype.newbyteorder(">"))):
        there = numpy_state(state_from_numpy({name: laid(a) for name, a in state.items()}))
        assert all(np.array_equal(there[name], a) and there[name].dtype == a.dtype for name, a in state.items())
