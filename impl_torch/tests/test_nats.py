"""The loss that a model makes by itself is the cross-entropy of its logits, in every architecture."""

from __future__ import annotations

from typing import Any

import bad_arguments
import pytest
import torch
import unisono_torch
from torch.nn import functional as F
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError, preset

NONE = -100
MODELS = {name: config for name, config in bad_arguments.MODELS.items() if config.predicts == "categorical"}
TOKENS = torch.arange(2 * 9).reshape(2, 9) % 7


@pytest.mark.parametrize("name", MODELS)
def test_it_is_that_of_the_logits(name: str) -> None:
    """With marks, a state that goes on, and targets that are not asked; and so are its gradients."""
    model: Any = unisono_torch.create(MODELS[name], seed=3, dtype="float64", param_dtype="float64")
    with torch.no_grad():
        _, state = model(TOKENS[:, :2], model.init_state(2, 9))
    given, targets = TOKENS[:, 2:8], TOKENS[:, 3:].clone()
    targets[0, 1] = NONE
    marks = {"reset": targets == 5, "valid": targets != 4}
    logits, after = model(given, state, **marks)
    total, nats, end = model.nats(given, targets, state, **marks)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").reshape(targets.shape)
    judge.same((nats, end), (expected.detach(), {n: a.detach() for n, a in after.items()}))
    slopes = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (total, expected.sum())]
    for found, true in zip(*slopes, strict=True):
        assert (found is None) == (true is None)
        judge.same([] if found is None else [found], [] if true is None else [true])


def test_of_precomputed_codes() -> None:
    model: Any = unisono_torch.create(MODELS["fixed"], seed=3, dtype="float64", param_dtype="float64")
    xi, targets = torch.rand(5, MODELS["fixed"].code_size, dtype=torch.float64), TOKENS[0, :5]
    total, nats = model.readout_nats(xi, targets.int())
    expected = F.cross_entropy(model.readout(xi), targets, reduction="none").detach()
    judge.same((total.detach(), nats), (expected.sum(), expected))


def test_autocast_narrows_the_model_and_not_the_loss() -> None:
    model: Any = unisono_torch.create(MODELS["transformer"], seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        total, nats, _ = model.nats(TOKENS, TOKENS)
        logits, _ = model(TOKENS)
        expected = F.cross_entropy(logits.double().flatten(0, 1), TOKENS.flatten(), reduction="none").reshape(TOKENS.shape)
    assert total.dtype == nats.dtype == torch.float32
    judge.same(nats, expected.float(), limit=numerics.rounding("float32", 2**6))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (TOKENS[:, 1:], r"targets: shape \(2, 8\) of torch.int64, expected \(2, 9\) ids"),
        (TOKENS + 10**6, "targets: id 1000000 is outside the vocabulary"),
        (TOKENS.double(), "of torch.float64, expected"),
        (TOKENS.to("meta"), "targets: on meta"),
        (None, "targets: None has type NoneType"),
    ],
)
def test_bad_targets_are_named(targets: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read or drawn for it."""
    models: Any = [unisono_torch.create(MODELS[name], seed=3).train() for name in ("s4d", "fixed")]
    s4d, fixed = models
    for model in models:
        for name in ("_dropout", "_read", "_last_product"):
            monkeypatch.setattr(model, name, None)
    asked = (lambda: s4d.nats(TOKENS, targets), lambda: fixed.readout_nats(torch.rand(2, 9, MODELS["fixed"].code_size), targets))
    for ask in asked:
        with pytest.raises(InputError, match=message):
            ask()


def test_frames_have_none() -> None:
    model: Any = unisono_torch.create(preset("cram-video", d_model=4, n_layers=1, frame_size=3), seed=3)
    with pytest.raises(InputError, match="targets: this model predicts a"):
        model.nats(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))
