"""Texts that are continued: from saved states, from files, after signals; `generate` and `run` share all of it."""

from __future__ import annotations

import io
import json
import signal
import sys

import numpy as np
import pytest
from unisono_spec.contract import InputError
from unisono_spec.contract.continuing import KEY, Continuation, load_continuation, save_continuation
from unisono_spec.contract.files import load_state, save_state
from unisono_spec.contract.generation import PIECE, Generated
from unisono_spec.contract.sampling import Sampling
from unisono_tools import streaming
from unisono_tools.backends import open_reader
from unisono_tools.data.tokenizers import Bytes
from unisono_tools.train import checkpoint

MODELS = {
    "fixed": ("cram-demo", {}),
    "lat": ("lat-1m", {"n_layers": 1, "head_width": 4, "qk_width": 4}),
    "maru": ("maru-1m", {"n_layers": 1, "head_hidden": 8, "n_banks": 2, "n_slots": 4, "d_memory": 4}),
    "transformer": ("transformer-1m", {"n_layers": 1, "head_width": 4}),
}


@pytest.fixture(params=["fixed"])
def model(request, tiny, made, tmp_path):
    preset, overrides = MODELS[request.param]
    return checkpoint.save(tmp_path / request.param, made(tiny(preset, overrides), seed=1)) / "model.safetensors"


@pytest.fixture
def generate(command, model):
    def run(*argv: object) -> str:
        code, out, err = command("generate", model, "--backend", "numpy", *argv)
        assert code == 0, err
        return out.removesuffix("\n")

    return run


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_a_saved_state_goes_on_as_one_longer_text(generate, tmp_path):
    how = ("--temperature", 1.3, "--top_k", 200, "--top_p", 0.97, "--seed", 2**62)
    whole = generate("--prompt", "We the ", *how, "--max_new_tokens", 21)
    first = generate("--prompt", "We the ", *how, "--max_new_tokens", 7, "--save_state", tmp_path / "a")
    # the file says how: nothing need be said again
    second = generate("--state", tmp_path / "a", "--max_new_tokens", 6, "--save_state", tmp_path / "a")
    third = generate("--state", tmp_path / "a", "--max_new_tokens", 8)
    assert first + second + third == whole
    assert generate("--state", tmp_path / "a", "--max_new_tokens", 8, "--seed", 1) != third


def test_a_prompt_after_a_state(generate, tmp_path):
    text = generate("--prompt", "We ", "--temperature", 0, "--max_new_tokens", 5, "--save_state", tmp_path / "a")
    later = generate("--state", tmp_path / "a", "--prompt", " hold ", "--max_new_tokens", 9)
    assert later.startswith(" hold ")
    written = text.encode("utf-8", "replace") + b" hold "
    if "\ufffd" not in text:  # then the ids are those of the text
        (tmp_path / "prompt").write_bytes(written)
        assert generate("--prompt_file", tmp_path / "prompt", "--temperature", 0, "--max_new_tokens", 9) == later.removeprefix(" hold ")


def test_long_prompts_are_read_in_pieces(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 100)
    text = "Four score and seven years ago " * (2 * PIECE // 31 + 1)
    (tmp_path / "prompt.txt").write_text(text)
    expected = generate("--prompt", text, "--max_new_tokens", 9).removeprefix(text)
    assert generate("--prompt_file", tmp_path / "prompt.txt", "--max_new_tokens", 9) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert generate("--prompt_file", "-", "--max_new_tokens", 9) == expected


def test_characters_that_a_state_parts(generate, model, tmp_path, monkeypatch):
    ids, state = "né😀!".encode(), open_reader(model, "numpy").init_state(1)

    def stream(reader, prompt, number, sampling, before, start, seen):
        for n in range(start, start + number):
            yield Generated(np.array([[ids[n]]]), np.zeros((1, 1), bool), state, n + 1)

    monkeypatch.setattr(streaming, "stream", stream)
    for cut in range(1, len(ids)):
        first = generate("--prompt", "x", "--max_new_tokens", cut, "--save_state", tmp_path / "a")
        assert first + generate("--state", tmp_path / "a", "--max_new_tokens", len(ids) - cut) == "xné😀!"


@pytest.fixture
def heard():
    """Signals are as in a terminal: to what a shell runs in the background, SIGINT is nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_text_and_saves_the_state(number, command, model, generate, tmp_path, monkeypatch):
    plain = streaming.stream

    def stream(*given: object):
        for n, found in enumerate(plain(*given)):  # pyright: ignore[reportArgumentType]
            if n == 4:
                signal.raise_signal(number)
            yield found

    whole = generate("--seed", 3, "--max_new_tokens", 9)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "stream", stream)
        code, out, err = command("generate", model, "--backend", "numpy", "--seed", 3, "--save_state", tmp_path / "a")
    assert code == 128 + number
    assert "after 5 tokens" in err
    assert "Traceback" not in err
    assert out.removesuffix("\n") + generate("--state", tmp_path / "a", "--max_new_tokens", 4) == whole


def test_states_that_do_not_fit(refused, tiny, made, model, generate, tmp_path):
    def state(path: object) -> str:
        return refused("generate", model, "--backend", "numpy", "--state", path)

    generate("--max_new_tokens", 3, "--save_state", tmp_path / "a")
    config, arrays = load_state(tmp_path / "a")
    assert "no such file" in state(tmp_path / "none")
    assert "expected 'state'" in state(model)
    other = checkpoint.save(tmp_path / "other", made(tiny(overrides={"d_model": 16}))) / "model.safetensors"
    assert "d_model is 8 there and 16 here; give a state of this one" in refused(
        "generate", other, "--backend", "numpy", "--state", tmp_path / "a"
    )
    save_state(tmp_path / "b", config, {name: np.repeat(a, 2, 0) for name, a in arrays.items()})
    assert "a state of 2 sequences" in state(tmp_path / "b")
    save_state(tmp_path / "b", config, arrays)  # a state alone lacks the token that comes next
    assert "prompt: empty" in state(tmp_path / "b")
    assert generate("--state", tmp_path / "b", "--prompt", "a", "--max_new_tokens", 3)
    good = {"unread": [1], "n_generated": 3, "seed": "0"}
    for bad, word in (
        ("{", "generation: not JSON"),
        ("[]", "names with values"),
        (json.dumps({**good, "seed": "-1"}), "seed: '-1'"),
        (json.dumps({**good, "seed": str(2**64)}), "seed: "),
        (json.dumps({**good, "unread": [256]}), "id 256 is outside the vocabulary"),
        (json.dumps({**good, "held": [-1]}), "id -1 is outside"),
        (json.dumps({**good, "n_generated": -1}), "n_generated: -1"),
        (json.dumps({**good, "temperature": -1}), "temperature: -1"),
        (json.dumps({**good, "code": "x"}), "code: no such field"),
    ):
        save_state(tmp_path / "b", config, arrays, {KEY: bad})
        assert word in state(tmp_path / "b")


def test_a_continuation_comes_back_as_it_was(tiny, tmp_path):
    config = tiny().validate()
    state = {name: np.full((1, *s.shape), 0.5, np.float32) for name, s in config.states().items()}
    given = Continuation(state, (7, 8), 12, (226,), Sampling(0.7, 5, 0.9, 2**64 - 1))
    save_continuation(tmp_path / "a", config, given)
    found = load_continuation(tmp_path / "a", config)
    assert (found.unread, found.n_generated, found.held, found.sampling) == ((7, 8), 12, (226,), given.sampling)
    assert all(np.array_equal(found.state[name], a) for name, a in state.items())
    assert load_state(tmp_path / "a")[0] == config  # to every room it is a state


def test_bad_requests(refused, model, tmp_path):
    for argv, word in (
        (("--max_new_tokens", 0), "max_new_tokens: 0"),
        (("--prompt", "a", "--prompt_file", "b"), "give one of them"),
        (("--prompt_file", tmp_path / "none"), "cannot be read"),
        (("--prompt_file", tmp_path), "cannot be read"),
        (("--prompt_file", "/dev/zero"), "a device, which may never end"),
        (("--temperature", -1), "temperature: -1"),
        (("--top_p", 0), "top_p: 0"),
        (("--prompt", ""), "prompt: empty"),
    ):
        assert word in refused("generate", model, "--backend", "numpy", *argv)
    assert "is not a .onnx file" in refused("run", model)


def test_a_state_that_cannot_be_saved_is_told_before_the_text(command, model, tmp_path):
    (tmp_path / "file").touch()
    for place, word in (
        (tmp_path, "a folder; name a file in it"),
        (tmp_path / "file" / "state", "cannot be written"),
        ("/dev/null", "a device"),
    ):
        code, out, err = command("generate", model, "--backend", "numpy", "--save_state", place)
        assert code == 2
        assert word in err
        assert not out
    assert not list(tmp_path.glob(".*.part"))


def test_what_a_decoder_holds():
    decoder = Bytes().decoder()
    texts = [decoder.put(i) + "|" + str(decoder.held) for i in b"a\xe2\xc3\xa9\xf0\x9f"]
    assert texts == ["a|[]", "|[226]", "\ufffd|[226, 195]", "é|[]", "|[240]", "|[240, 159]"]
    with pytest.raises(InputError, match="stop: ''"):
        streaming.Text(Bytes(), [""])
