"""Decoders that are kept: of which model, batch and stream a call comes, and what it is read with, changes nothing."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from unisono_spec.contract import InputError
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.sampling import GREEDY, choose, uniform
from unisono_torch import load
from unisono_torch.decoding import Decoder, decoder
from unisono_torch.decoding.fused import fused
from unisono_torch.decoding.parts import Held

from .test_decoding import CONFIGS, CUT, WARM, made, text


def test_batches_models_and_threads_in_turns(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models, each from two threads (on a GPU each with a stream of its own), in batches that change."""
    widths, batches = (8, 12), (2, 1, 3, 2)
    configs = {width: CRAMConfig(d_model=width, n_layers=1, vocab_size=30) for width in widths}
    alone = {width: made(configs[width], "cpu", implementation="plain")[0] for width in widths}
    truth = {(width, batch): alone[width].generate(text(5, batch), 3, CUT).tokens for width in widths for batch in set(batches)}
    monkeypatch.setattr(decoder, "FEWEST", 1)
    monkeypatch.setattr(decoder, "_serves", lambda model: True)
    models, found = {width: made(configs[width], device)[0] for width in widths}, []

    def write(width: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext():
            found.extend(((width, batch), models[width].generate(text(5, batch), 3, CUT).tokens) for batch in batches)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(write, 2 * widths))
    assert len(found) == 16
    assert all(np.array_equal(tokens, truth[key]) for key, tokens in found)
    assert {len(decoder._decoders[model]) for model in models.values()} == {3}


def test_another_decoder_need_not_wait(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one that runs in another thread."""
    monkeypatch.setattr(decoder, "FEWEST", 1)
    monkeypatch.setattr(decoder, "_serves", lambda model: True)
    (first, _), (second, _) = made(CONFIGS["fixed"], device), made(CONFIGS["fixed"], device)
    begun, written, run = threading.Event(), threading.Event(), Decoder.run

    def late(self: Decoder, *given: Any) -> Any:
        if not begun.is_set():
            begun.set()
            assert written.wait(20)
        return run(self, *given)

    monkeypatch.setattr(Decoder, "run", late)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        one = thread.submit(first.generate, text(3), 3)
        assert begun.wait(20)
        other = second.generate(text(3), 3)
        written.set()
        assert np.array_equal(one.result().tokens, other.tokens)


def test_decoders_of_other_batches_leave_where_memory_ends(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = made(CONFIGS["fixed"], "cpu", implementation="plain")[0].generate(text(5, 3), 3)
    monkeypatch.setattr(decoder, "FEWEST", 1)
    monkeypatch.setattr(decoder, "_serves", lambda model: True)
    model, kept = made(CONFIGS["fixed"], device)[0], []
    for batch in (1, 2):
        model.generate(text(5, batch), 3)

    def short(*given: Any) -> Decoder:
        kept.append(len(decoder._decoders[model]))
        if len(kept) == 1:
            raise torch.OutOfMemoryError("no room")
        return Decoder(*given)

    monkeypatch.setattr(decoder, "Decoder", short)
    assert np.array_equal(model.generate(text(5, 3), 3).tokens, truth.tokens)
    assert kept == [2, 0]


@pytest.mark.parametrize("name", ["transformer", "fixed"])
def test_tokens_read_one_a_call(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the buffers of a decoder, once there were some calls; what it returned before stays as it was."""
    truth = made(CONFIGS[name], "cpu", implementation="plain")[0].generate(text(5), 6, WARM)
    monkeypatch.setattr(decoder, "FEWEST", 2)
    monkeypatch.setattr(decoder, "_serves", lambda model: True)
    model, _ = made(CONFIGS[name], device)
    found, states = model.generate(text(5), 1, WARM), []
    tokens = [found.tokens]
    for _ in range(5):
        found = model.generate(found.tokens[:, -1:], 1, WARM, found.state, found.n_generated)
        tokens.append(found.tokens)
        states.append((found.state, {key: a.clone() for key, a in found.state.items()}))
    assert np.array_equal(np.concatenate(tokens, 1), truth.tokens)
    assert all(torch.equal(state[key], a) for state, copy in states for key, a in copy.items())
    assert decoder._missed[model] == 0
    assert {key[0] for key in decoder._decoders[model]} == {"drawn"}


def test_a_token_of_any_layout_and_a_state_from_elsewhere(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of one token goes to the decoder at once."""
    monkeypatch.setattr(decoder, "FEWEST", 1)
    monkeypatch.setattr(decoder, "_serves", lambda model: True)
    model, _ = made(CONFIGS["fixed"], device)
    prompt = np.array([[3], [4]], np.int32)
    prompt.flags.writeable = False
    found = model.generate(prompt[::-1], 2, WARM)
    assert np.array_equal(found.tokens, model.generate(prompt[::-1].astype(np.int64), 2, WARM).tokens)
    with pytest.raises(InputError, match="on meta, the model is on"):
        model.generate(prompt, 2, state={name: a.to("meta") for name, a in found.state.items()})


def test_sizes_in_turns_make_no_graph_a_call(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_here: list[int] = []

    class Counted(Decoder):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made_here.append(len(self.token))

    for name, value in (("FEWEST", 3), ("KEPT", 1), ("_serves", lambda model: True), ("Decoder", Counted)):
        monkeypatch.setattr(decoder, name, value)
    model, _ = made(CONFIGS["fixed"], device)
    for batch in (1, 2, 1, 2, 1, 2):
        model.generate(text(1, batch), 1)
    assert made_here == [1]
    monkeypatch.setattr(decoder, "FEWEST", 1)
    model.generate(text(1, 2), 1)
    assert len(decoder._decoders[model]) == 1
    monkeypatch.setattr(decoder, "MOST", 1)
    assert decoder.follow(model, text(1)[:, 0], model.init_state(2), GREEDY, 0, 2) is None


@pytest.mark.parametrize("name", ["lat", "transformer", "mamba"])
def test_weights_are_cast_once(name: str, device: str) -> None:
    model, _ = made(CONFIGS[name], device, dtype="bfloat16", param_dtype="float32")
    held = Held()
    assert fused(model, model.init_state(2, 8), held) is not None
    assert held
    assert not any(torch.equal(a, b) for (a, _), (b, _) in itertools.combinations(held._made, 2))


def test_a_cache_is_held_in_the_compute_dtype_alone(device: str) -> None:
    """What comes back has the state's own dtypes."""
    model, _ = made(CONFIGS["transformer"], device, dtype="bfloat16")
    state = model.init_state(2, 8)
    here = Decoder(model, state, "greedy")
    assert {here.state[name].dtype for name in ("layers.0.k", "layers.0.v")} == {torch.bfloat16}
    assert all(a.dtype == state[name].dtype for name, a in here._ended(state).items())


def test_trained_parameters_are_read(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were changed in place, also where the decoder holds what it made of them, and those of a cast model."""
    monkeypatch.setattr(decoder, "FEWEST", 1)
    model, _ = made(CONFIGS["s4d"], device)
    alone, _ = made(CONFIGS["s4d"], "cpu", implementation="plain")

    def agree() -> None:
        state = {key: a.to(device) for key, a in alone.init_state(2).items()}
        found, _, _ = decoder.follow(model, text(1)[:, 0], state, GREEDY, 0, 4) or pytest.fail("no decoder")
        assert np.array_equal(found, alone.generate(text(1), 4).tokens)

    agree()
    with torch.no_grad():
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            p.mul_(-1.5)
            q.mul_(-1.5)
    agree()
    model.double()
    alone.double()
    agree()


def test_a_decoder_ends_where_positions_do(device: str) -> None:
    model, _ = made(CONFIGS["learned"], device)
    longest = model.config.longest
    assert longest is not None
    ends = [decoder._ends_within(model, {"position": torch.tensor([0, longest - 2])}, count) for count in (2, 3)]
    assert ends == [False, True]


def test_trouble_after_some_blocks_is_told_by_its_token(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id whose embedding is NaN is chosen as the third, and read for the fourth."""
    for name, value in (("FEWEST", 1), ("BLOCK", 2)):
        monkeypatch.setattr(decoder, name, value)
    model, _ = made(CONFIGS["s4d"], device)

    def ids() -> np.ndarray:
        found = decoder.follow(model, text(1, 1)[:, 0], model.init_state(1), WARM, 5, 4) or pytest.fail("no decoder")
        return found[0][0]

    third = ids()[2]
    assert third not in (*text(1, 1)[0], *ids()[:2])
    with torch.no_grad():
        model.get_parameter("embedding.weight")[third] = torch.nan
    with pytest.raises(InputError, match="NaN at generated token 8"):
        ids()


def test_models_with_decoders_are_copied_and_saved(device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decoder, "FEWEST", 1)
    monkeypatch.setattr(decoder, "_serves", lambda model: True)
    model, _ = made(CONFIGS["fixed"], device)
    tokens = model.generate(text(3), 3).tokens
    assert decoder._decoders[model]
    other = copy.deepcopy(model)
    assert other not in decoder._decoders
    model.save(tmp_path / "model.safetensors")
    for again in (other, load(tmp_path / "model.safetensors", device=device)):
        assert np.array_equal(again.generate(text(3), 3).tokens, tokens)


def test_what_acts_on_modules_is_no_graph() -> None:
    """Hooks, parametrisations, and modules that wrap those of a model: their steps are taken one by one."""
    models: dict[str, Any] = {name: made(config, "cpu")[0] for name, config in CONFIGS.items()}
    assert all(decoder._tensors(model) is not None for model in models.values())
    a, b, c = (models[name] for name in ("fixed", "mamba", "lat"))
    seen = a.head.register_forward_hook(lambda *given: None)
    assert decoder._tensors(a) is None
    seen.remove()
    assert decoder._tensors(a) is not None
    torch.nn.utils.parametrizations.weight_norm(b.layers[0].mixer.in_proj)
    assert decoder._tensors(b) is None

    class Adapted(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

    c.layers[0].ffn.up = Adapted(c.layers[0].ffn.up)
    assert decoder._tensors(c) is None


def test_ids_drawn_by_counts_are_those_of_a_sort(device: str) -> None:
    """Of a model in bfloat16, whose logits have few different numbers."""
    model, _ = made(CONFIGS["s4d"], device, dtype="bfloat16")
    found = []
    with torch.no_grad(), np.errstate(over="ignore", invalid="ignore"):
        for sort in (False, True):
            one = decoder.Decoder(model, model.init_state(4), "drawn")
            assert one.counts is not None
            if sort:
                one.counts, one.graph = None, None
            found.append(one.run(text(1, 4)[:, 0], model.init_state(4), CUT, 3, 5))
    (ids, ties, _), (others, same, _) = found
    assert np.array_equal(ids, others)
    assert np.array_equal(ties, same)


def test_equals_drawn_by_counts_stand_by_their_ids(device: str) -> None:
    """0 and −0 are one number, here and in the contract's law."""
    from unisono_torch.kernels.decode import counts

    logits = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0]], dtype=torch.bfloat16, device=device)
    held, many = counts.Counts(1, logits.device), 2
    numbers = torch.as_tensor(uniform(WARM.seed, 1, 0, many), device=device)
    ids, ties, trouble = (torch.zeros((many, 1), dtype=kind, device=device) for kind in (torch.int64, torch.bool, torch.int32))
    warm, all_of_them, whole = (torch.tensor(value, device=device) for value in (WARM.temperature, WARM.top_k, WARM.top_p))
    with np.errstate(over="ignore", invalid="ignore"):
        for i in range(many):
            number, token = torch.tensor(i, device=device), ids.new_empty(1)
            counts.draw(held, logits, numbers, warm.double(), all_of_them, whole.double(), number, ids, ties, trouble, token)
    true = [choose(logits.float().cpu().numpy(), WARM, i) for i in range(many)]
    assert [(int(a), bool(b)) for a, b in zip(ids, ties, strict=True)] == [(int(a[0]), bool(b[0])) for a, b in true]


def test_a_state_that_is_handed_out_has_its_order_and_memory(device: str) -> None:
    """The names' order whatever dtypes arrays have; none of them keeps the others alive."""
    model, _ = made(CONFIGS["taylor2"], device)
    state = model.init_state(2)
    like = {name: a.double() if i % 2 else a.float() for i, (name, a) in enumerate(state.items())}
    with torch.no_grad():
        after = decoder.Decoder(model, state, "greedy")._ended(like)
    assert [(name, a.dtype) for name, a in after.items()] == [(name, a.dtype) for name, a in like.items()]
    assert all(a.untyped_storage().nbytes() == a.nbytes for a in after.values())
