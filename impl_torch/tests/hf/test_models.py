"""What transformers' users expect of a causal language model, for each class: `nox -s hf` asks with two versions of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import unisono_torch
import unisono_torch.hf as hf
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from unisono_conformance import judge
from unisono_spec.contract import InputError, config_to_dict
from unisono_torch.hf.modeling import CACHE

V = 61
CLASSES: dict[str, tuple[type[hf.UnisonoForCausalLM], dict[str, Any]]] = {
    "fixed": (hf.CRAMForCausalLM, {"d_model": 16, "n_layers": 2}),
    "adaptive": (hf.CRAMForCausalLM, {"scheme": "adaptive", "d_model": 16, "n_layers": 2, "tie_head": True}),
    "lat": (hf.LATForCausalLM, {"d_model": 16, "n_layers": 2, "head_width": 8, "qk_width": 8, "positions": "rope"}),
    "based": (
        hf.BasedForCausalLM,
        {
            "d_model": 16,
            "n_layers": 3,
            "attention": ["conv", "linear", "window"],
            "feature_map": "taylor2",
            "qk_width": 4,
            "window": 3,
            "head_width": 8,
            "norm": "rms",
            "ffn": "swiglu",
            "tie_head": True,
            "head_bias": False,
        },
    ),
    "infinityformer": (hf.InfinityFormerForCausalLM, {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ffn": 32, "dropout": 0.0}),
    "maru": (
        hf.MARUForCausalLM,
        {
            "d_model": 16,
            "n_layers": 2,
            "prenorm": True,
            "n_slots": 4,
            "d_memory": 4,
            "head_hidden": 16,
            "temperature": 0.5,
            "router": "gumbel",
        },
    ),
    "transformer": (hf.TransformerForCausalLM, {"d_model": 16, "n_layers": 2, "head_width": 8}),
    "selective": (hf.SelectiveSSMForCausalLM, {"d_model": 16, "n_layers": 2, "d_state": 4}),
    "s4d": (hf.S4DForCausalLM, {"d_model": 16, "n_layers": 2, "d_state": 4}),
}
EACH = pytest.mark.parametrize("name", CLASSES)


def make(name: str) -> hf.UnisonoForCausalLM:
    """A model whose continuations differ from each other, in float64 so that no two choices lie near each other."""
    cls, fields = CLASSES[name]
    torch.manual_seed(3)
    config = cls.config_class(vocab_size=V, **fields, pad_token_id=0, bos_token_id=1, eos_token_id=V + 1)
    model = cls(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.double().eval()


def ids(length: int = 9, batch: int = 2) -> Tensor:
    return torch.randint(2, V, (batch, length), generator=torch.Generator().manual_seed(length))


def more(model: hf.UnisonoForCausalLM, given: Tensor, **options: Any) -> Tensor:
    return model.generate(given, max_new_tokens=6, do_sample=False, **options)  # pyright: ignore[reportReturnType, reportCallIssue]


@EACH
@torch.no_grad()
def test_logits_are_the_model_s(name: str) -> None:
    model = make(name)
    plain = unisono_torch.create(model.config.contract, unisono_torch.numpy_params(model), dtype="float64")
    judge.same(model(ids()).logits, plain(ids())[0])
    assert set(model.state_dict()) == set(model.config.contract.params())


@EACH
@torch.no_grad()
def test_the_cache_changes_nothing(name: str) -> None:
    model, given = make(name), ids()
    whole = model(given).logits
    first = model(given[:, :4])
    assert first[CACHE].get_seq_length() == 4
    second = model(given[:, 4:8], **{CACHE: first[CACHE]})
    third = model(given[:, 8:], **{CACHE: second[CACHE]}, logits_to_keep=1)
    judge.same(torch.cat([first.logits, second.logits, third.logits], 1), whole)
    assert torch.equal(more(model, given), more(model, given, use_cache=False))


@EACH
@torch.no_grad()
def test_greedy_text_is_generate_s_of_every_room(name: str) -> None:
    model, given = make(name), ids()
    ours = model.unisono.generate(given, 6)
    assert more(model, given)[:, 9:].tolist() == ours.tokens.tolist()


@EACH
@torch.no_grad()
def test_padding_on_the_left_is_not_read(name: str) -> None:
    model, given = make(name), ids()
    padded, mask = torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.int64)
    padded[0, 3:], mask[0, 3:] = given[0], 1
    padded[1, 6:], mask[1, 6:] = given[1, :6], 1
    found = more(model, padded, attention_mask=mask)
    assert found[0, 12:].tolist() == more(model, given[:1])[0, 9:].tolist()
    assert found[1, 12:].tolist() == more(model, given[1:, :6])[0, 6:].tolist()


@EACH
@torch.no_grad()
def test_positions_part_documents(name: str) -> None:
    """As DataCollatorWithFlattening hands them over: each document is read as if it were alone."""
    model, text = make(name), ids(9, 1)
    first, second = model(text[:, :4]).logits, model(text[:, 4:])
    packed = model(text, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    judge.same(torch.cat([first, second.logits], 1), packed.logits)
    judge.same(model(text[:, :1], **{CACHE: packed[CACHE]}).logits, model(text[:, :1], **{CACHE: second[CACHE]}).logits)
    mask, positions = [[0, 1, 1, 1, 1, 1, 1, 1, 0]], [[1, 0, 1, 2, 3, 4, 5, 6, 0]]
    padded = model(text, attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions))
    judge.same(padded.logits[:, 1:8], model(text[:, 1:8]).logits)
    for wrong in ([[0, 1, 2, 3, 3, 4, 5, 6, 7]], [[0, 1]], [0]):
        with pytest.raises(InputError, match="position_ids: "):
            model(text, position_ids=torch.tensor(wrong))


@EACH
@torch.no_grad()
def test_a_text_goes_on_from_its_cache_in_every_way(name: str) -> None:
    model, given = make(name), ids()
    whole = more(model, given)
    begun: Any = model.generate(given, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)  # pyright: ignore[reportCallIssue]
    mask = torch.ones_like(begun.sequences)
    rest = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask, CACHE: copy.deepcopy(begun[CACHE])}
    assert torch.equal(model.generate(begun.sequences, **rest), whole)  # pyright: ignore[reportCallIssue, reportArgumentType]
    seen = begun[CACHE].get_seq_length()
    only_new = begun.sequences[:, seen:]
    rest[CACHE] = begun[CACHE]
    found: Any = model.generate(only_new, **rest)  # pyright: ignore[reportCallIssue]
    assert torch.equal(found[:, only_new.shape[1] :], whole[:, begun.sequences.shape[1] :])
    assert torch.equal(more(model, given, prefill_chunk_size=4), whole)


@EACH
@torch.no_grad()
def test_beams_are_those_without_a_cache(name: str) -> None:
    model, given = make(name), ids()
    assert torch.equal(more(model, given, num_beams=3), more(model, given, num_beams=3, use_cache=False))
    several = more(model, given, num_beams=4, num_return_sequences=2)
    assert several.shape == (4, 15)


@torch.no_grad()
def test_sampling_repeats_with_its_seed_and_with_or_without_a_cache() -> None:
    model, given = make("lat"), ids()
    drawn = []
    for options in ({}, {}, {"use_cache": False}):
        torch.manual_seed(7)
        drawn.append(model.generate(given, max_new_tokens=8, do_sample=True, temperature=0.9, top_k=20, top_p=0.95, **options))  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@EACH
@torch.no_grad()
def test_saved_and_loaded_by_every_door(name: str, tmp_path: Path) -> None:
    model, given = make(name), ids()
    model.save_pretrained(tmp_path)
    wanted = model(given).logits
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded).__name__ == type(model).__name__.replace("Based", "LAT")
    assert AutoConfig.from_pretrained(tmp_path).contract == model.config.contract
    assert not loaded.training
    judge.same(loaded(given).logits, wanted)
    judge.same(unisono_torch.load(tmp_path / "model.safetensors", dtype="float64")(given)[0], wanted)
    judge.same(type(model).from_unisono(tmp_path / "model.safetensors")(given).logits, wanted)
    model.save_pretrained(tmp_path / "parts", max_shard_size="1KB")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 1
    judge.same(unisono_torch.from_hf(tmp_path / "parts", dtype="float64")(given)[0], wanted)
    narrow: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow(given).logits.dtype == torch.bfloat16
    assert copy.deepcopy(model)(given).logits.equal(wanted)


@EACH
def test_blocks_computed_again_give_the_same_gradients(name: str) -> None:
    model, given = make(name).train(), ids()
    found = []
    for again in (False, True):
        if again:
            enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # 5.24's name
            enable({"use_reentrant": False})
        model.zero_grad()
        loss = model(given, labels=given).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        judge.same(a, b)


@EACH
@torch.no_grad()
def test_the_vocabulary_grows_and_shrinks(name: str) -> None:
    model, given = make(name), ids()
    if name == "fixed":
        with pytest.raises(InputError, match="has no embedding"):
            model.get_input_embeddings()
        return
    wanted = model(given).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    judge.same(model(given).logits[..., :V], wanted)
    assert len(model.get_input_embeddings().weight) == 70  # pyright: ignore[reportArgumentType]
    model.resize_token_embeddings(V)
    judge.same(model(given).logits, wanted)
    model.resize_token_embeddings(pad_to_multiple_of=8)
    assert model(given).logits.shape[-1] == 64


@EACH
@torch.no_grad()
def test_hidden_states_and_tuples(name: str) -> None:
    model = make(name)
    out = model(ids(), output_hidden_states=True)
    assert len(out.hidden_states) == model.config.n_layers + 1  # pyright: ignore[reportAttributeAccessIssue]
    assert all(h.shape == (2, 9, 16) for h in out.hidden_states)
    assert torch.equal(model(ids(), return_dict=False)[0], out.logits)


def test_a_new_model_begins_as_the_contract_says() -> None:
    torch.manual_seed(1)
    one = hf.LATForCausalLM(hf.LATHFConfig(d_model=64, n_layers=1, vocab_size=V))
    torch.manual_seed(1)
    two = hf.LATForCausalLM(hf.LATHFConfig(d_model=64, n_layers=1, vocab_size=V))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert 0.015 < float(one.get_input_embeddings().weight.detach().std()) < 0.025  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert one.num_parameters() == sum(p.numel() for p in one.parameters())


def test_errors_name_what_is_wrong() -> None:
    model = make("lat")
    with pytest.raises(InputError, match=r"lat.d_model: 0"):
        hf.LATHFConfig(d_model=0)
    with pytest.raises(InputError, match="arch: 'maru', and LATHFConfig is of 'lat'"):
        hf.LATHFConfig(arch="maru")
    assert hf.LATHFConfig(**config_to_dict(model.config.contract)).contract == model.config.contract
    for odd in (torch.zeros(0, dtype=torch.long), torch.zeros(3, dtype=torch.long), ids()[:, :0], ids().tolist()):
        with pytest.raises(InputError, match=r"input_ids: .* at least one token"):
            model(odd)
    with pytest.raises(InputError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(InputError, match=r"attention_mask: shape \(2, 3\)"):
        model(ids(), attention_mask=torch.ones(2, 3))
    with pytest.raises(InputError, match="outside the vocabulary"):
        model(torch.tensor([[V]]))
    with pytest.raises(InputError, match="'frame'"):
        hf.CRAMForCausalLM(hf.CRAMHFConfig(codes="frame", frame_size=4))
