"""Many prompts at once, and a repetition penalty: as each prompt alone, as one longer call, in every room."""

from __future__ import annotations

import json

import numpy as np
import pytest
from unisono_spec.contract.generation import Generated
from unisono_spec.contract.plain import MAX_BYTES
from unisono_spec.contract.sampling import Sampling, choose
from unisono_tools import batched
from unisono_tools.backends import open_reader
from unisono_tools.batched import continued
from unisono_tools.data.tokenizers import Bytes
from unisono_tools.streaming import stream
from unisono_tools.train import checkpoint

PENALTY = Sampling(repetition_penalty=1.7)
MODELS = {
    "fixed": ("cram-demo", {}),
    "transformer": ("transformer-1m", {"n_layers": 1, "head_width": 4}),
}


@pytest.fixture(params=["fixed"])
def model(request, tiny, made, tmp_path):
    preset, overrides = MODELS[request.param]
    return checkpoint.save(tmp_path / request.param, made(tiny(preset, overrides), seed=1)) / "model.safetensors"


@pytest.mark.parametrize("model", MODELS, indirect=True)
@pytest.mark.parametrize("sampling", [Sampling(), PENALTY])
def test_ragged_prompts_are_what_each_is_alone(model, sampling, monkeypatch):
    reader, coder, prompts = open_reader(model, "numpy"), Bytes(), ["We the people", "x", "ünion "]
    whole = continued(reader, coder, prompts, 11, sampling, [])
    monkeypatch.setattr(batched, "AT_ONCE", 4)
    together = continued(reader, coder, prompts, 11, sampling, [])
    alone = [continued(reader, coder, [prompt], 11, sampling, [])[0] for prompt in prompts]
    assert together == alone == whole
    assert [row["tokens"] for row in together] == [11] * 3


def test_a_text_ends_where_it_says_stop_and_the_others_go_on(model):
    reader, coder = open_reader(model, "numpy"), Bytes()
    whole = continued(reader, coder, ["We ", "They "], 20, Sampling(temperature=1.5), [])
    text = str(whole[0]["text"])
    stop = text[5:7]
    again = continued(reader, coder, ["We ", "They "], 20, Sampling(temperature=1.5), [stop])
    assert again[0]["text"] == text[: text.index(stop)]
    # what is drawn for the others' sake counts for nobody
    tokens = again[0]["tokens"]
    assert isinstance(tokens, int)
    assert tokens < 20
    assert continued(reader, coder, ["We "], tokens, Sampling(temperature=1.5), [stop]) == again[:1]
    other = str(whole[1]["text"])
    assert again[1]["text"] == (other[: other.index(stop)] if stop in other else other)


def test_a_penalty_counts_prompt_and_text(model):
    """Token by token from full logits, with the ids of all that was read."""
    reader = open_reader(model, "numpy", "float64")
    text = list(b"We the people, we the")
    found = reader.generate(np.array([text]), 12, PENALTY)
    for token in found.tokens[0].tolist():
        logits, _ = reader.forward(np.array([text]), reader.init_state(1, 64))
        seen = np.isin(np.arange(256), text)[None]
        assert int(choose(logits[:, -1], PENALTY, 0, seen)[0][0]) == token
        text.append(token)
    assert found.seen is not None
    assert set(np.flatnonzero(found.seen[0])) == set(text)
    assert reader.generate(np.array([text]), 3, Sampling()).seen is None
    # in many calls, with the prompt in pieces
    pieces = [np.frombuffer(b"We the people", np.uint8).astype(int), np.frombuffer(b", we the", np.uint8).astype(int)]
    steps: list[Generated] = list(stream(reader, pieces, 12, PENALTY))
    assert [int(step.tokens[0, 0]) for step in steps] == found.tokens[0].tolist()


def test_a_saved_state_knows_what_the_text_holds(command, model, tmp_path):
    def run(*argv):
        code, out, err = command("generate", model, "--backend", "numpy", *argv)
        assert code == 0, err
        return out.removesuffix("\n")

    how = ("--temperature", 0, "--repetition-penalty", 1.7)
    whole = run("--prompt", "We the ", *how, "--max-new-tokens", 12)
    first = run("--prompt", "We the ", *how, "--max-new-tokens", 5, "--save_state", tmp_path / "a")
    assert first + run("--state", tmp_path / "a", "--max-new-tokens", 7) == whole
    assert run("--prompt", "We the ", "--temperature", 0, "--max-new-tokens", 12) != whole


def test_a_text_is_verified(command, refused, model, tmp_path):
    code, _, err = command("generate", model, "--backend", "numpy", "--prompt", "We", "--max_new_tokens", 5, "--verify")
    assert code == 0
    assert "float32: logits err by up to" in err
    assert "float64 chooses 0 of 5 ids otherwise, 0 of which were no near-ties" in err
    assert "verify: reads a prompt and weights" in refused("generate", model, "--verify", "--prompt_file", tmp_path / "x")


def test_the_command(command, refused, model, tmp_path):
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("We the\n\nOne\r\nñ\n", encoding="utf-8-sig")
    rows.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("We the", "One", "ñ")), encoding="utf-8-sig")
    said = []
    for file in (lines, rows):
        code, out, err = command("generate", model, "--backend", "numpy", "--prompts", file, "--batch_size", 2, "--max_new_tokens", 5)
        assert code == 0, err
        said.append([json.loads(line) for line in out.splitlines()])
    assert said[0] == said[1]
    assert [row["prompt"] for row in said[0]] == ["We the", "One", "ñ"]
    assert [row["tokens"] for row in said[0]] == [5, 5, 5]
    how = ("generate", model, "--backend", "numpy", "--prompts")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    assert "holds none; write one a line" in refused(*how, tmp_path / "empty.txt")
    assert "line 1 has no text under 'prompt'" in refused(*how, tmp_path / "bad.jsonl")
    assert "is no file" in refused(*how, tmp_path / "none.txt")
    assert "is no file" in refused(*how, "/dev/zero")
    (tmp_path / "long.txt").write_bytes(b"x" * MAX_BYTES)
    assert "line 1 is longer than" in refused(*how, tmp_path / "long.txt")
    assert "batch_size: 0" in refused(*how, lines, "--batch_size", 0)
    assert "goes with no other prompt" in refused(*how, lines, "--prompt", "x")
    assert "repetition_penalty: 0" in refused("generate", model, "--repetition_penalty", 0)
