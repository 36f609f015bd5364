"""What runs learn from: several corpora, documents cut off, streams whose state is carried from batch to batch."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_spec.contract import InputError, init_params, zero_state
from unisono_spec.models import create
from unisono_tools import backends, evaluation
from unisono_tools.backends import open_trainer
from unisono_tools.config import DataChoice, ModelChoice
from unisono_tools.evaluation import evaluate, nll
from unisono_tools.train import checkpoint, train
from unisono_tools.train.datamodule import TextDataModule, load
from unisono_tools.train.logs import read

SMALL = {
    "cram-demo": {"d_model": 8, "n_layers": 2},
    "cram-1m": {"d_model": 8, "n_layers": 2},
    "based-1m": {"d_model": 8, "n_layers": 3, "head_width": 4, "qk_width": 4, "attention": ["conv", "linear", "window"]},
    "infinityformer-1m": {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ffn": 8, "dropout": 0.0},
    "maru-1m": {"d_model": 8, "n_layers": 1, "head_hidden": 8, "n_banks": 2, "n_slots": 3, "d_memory": 4},
    "transformer-1m": {"d_model": 8, "n_layers": 1, "head_width": 4},
    "mamba-1m": {"d_model": 8, "n_layers": 1},
    "s4d-1m": {"d_model": 8, "n_layers": 1, "d_state": 4},
}


@pytest.fixture
def corpora(tmp_path):
    """Two folders of documents: letters, and digits."""
    random = np.random.default_rng(0)
    for name, first in (("letters", 97), ("digits", 48)):
        (tmp_path / name).mkdir()
        for i in range(12):
            text = bytes(random.integers(first, first + 10, 30 + 20 * i).astype(np.uint8))
            (tmp_path / name / f"{i:02}.txt").write_bytes(text)
    return tmp_path


def _halves(config, tmp_path):
    """A run, and one that goes on from the other's middle: its folder."""
    whole = train(config)
    folder = tmp_path / "halves"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for step, source in checkpoint.steps(whole.run).items():
        if step < config.steps:
            shutil.copytree(source, folder / "checkpoints" / source.name)
    again = train(dataclasses.replace(config, out=str(folder)))
    for path in sorted(whole.checkpoint.glob("*.safetensors")):
        assert (again.checkpoint / path.name).read_bytes() == path.read_bytes(), path.name
    return whole


# where each shape is compiled, a position and a cache: the others' states are the court's (P3)
COMPILED = ("transformer-1m",)


def test_a_state_is_carried_from_batch_to_batch(backend, tiny, corpora, tmp_path):
    """Each loss is the spec's on one unbroken sequence; a run that goes on from a checkpoint ends with the same bits."""
    for preset in SMALL if backend == "torch" else COMPILED:
        data = DataChoice(corpus=str(corpora / "letters"), order="streamed", documents="reset", carry=24, eval_tokens=64)
        config = dataclasses.replace(
            tiny(backend=backend, threads=1, seq_len=8, batch_size=2, accumulation=2, steps=4, eval_every=9, dtype="float64", data=data),
            model=ModelChoice(preset, SMALL[preset]),
        )
        model = config.validate()
        datamodule = TextDataModule(config, model, load(data))
        trainer = open_trainer(config, model)
        params = init_params(model, 1, "float64")
        trainer.init(params)
        batches = [datamodule.batch(step) for step in range(4)]
        assert all(batch.carried for batch in batches)
        assert all(np.array_equal(a.targets[:, -1], b.inputs[:, 0]) for a, b in itertools.pairwise(batches))
        marks = [batch.reset for batch in batches if batch.reset is not None]
        assert [bool(mark[:, 0].all()) for mark in marks] == [True, False, False, True]
        losses = [trainer.grad_step(batch, i, 0.0).read().loss for i, batch in enumerate(batches)]
        tokens, reset = np.concatenate([batch.inputs for batch in batches], 1), np.concatenate(marks, 1)
        logits, _ = create(model, params).forward(tokens, None, reset)
        for i, (batch, loss) in enumerate(zip(batches, losses, strict=True)):
            part = logits[:, i * 8 : i * 8 + 8].reshape(-1, logits.shape[-1])
            assert loss == pytest.approx(nll(model, part, batch.targets.reshape(-1)).mean(), rel=numerics.mistake()), preset
        if preset in COMPILED:
            _halves(dataclasses.replace(config, out=str(tmp_path / preset)), tmp_path)


def test_streams_cover_a_corpus_in_order(tiny, corpora):
    """As many streams as rows; each epoch reads every window once, shifted by a place of its own, and begins anew."""
    config = tiny(seq_len=8, batch_size=3, data=DataChoice(corpus=str(corpora / "letters"), order="streamed"))
    corpus = load(config.data).corpora[0]
    datamodule = TextDataModule(config, config.validate(), corpus)
    windows = (len(corpus.train) - 1) // 3 // 8
    for epoch in range(2):
        read_ = np.concatenate([datamodule.batch(epoch * windows + w).inputs for w in range(windows)], 1)
        joined = read_.reshape(-1)
        found = np.asarray(corpus.train)
        shift = next(s for s in range(len(found) - len(joined)) if np.array_equal(found[s : s + len(joined)], joined))
        assert 0 <= shift <= len(found) - 1 - 3 * windows * 8
        starts = [bool(np.any(datamodule.batch(epoch * windows + w).reset)) for w in range(windows)]
        assert starts == [True] + [False] * (windows - 1)


def test_what_cannot_be_carried_is_refused(tiny):
    def said(preset="cram-demo", **changes):
        config = dataclasses.replace(tiny(), data=DataChoice(order="streamed", **changes), model=ModelChoice(preset))
        with pytest.raises(InputError) as caught:
            config.validate()
        return str(caught.value)

    assert "data.carry: 0, and this model keeps every token that it reads; give the tokens" in said("transformer-1m")
    assert "data.carry: 24 is no multiple of seq_len 16" in said(carry=24)
    assert "truncated with order=streamed" in said(documents="truncated")
    with pytest.raises(InputError, match=r"data\.carry: 16 with order=random"):
        dataclasses.replace(tiny(), data=DataChoice(carry=16)).validate()


def test_a_carried_state_that_is_gone(tiny, made, tmp_path):
    config = tiny(data=DataChoice(order="streamed"))
    model = config.validate()
    whole = dataclasses.replace(made(config), carried=zero_state(model, config.batch_size))
    for saved, said in ((made(config), "no such file"), (dataclasses.replace(whole, carried=zero_state(model, 3)), "not of 4 sequences")):
        with pytest.raises(checkpoint.Damaged, match=said):
            checkpoint.load(checkpoint.save(tmp_path, saved))
    assert checkpoint.load(checkpoint.save(tmp_path, whole)).carried is not None


def test_several_corpora_by_their_shares(tiny, corpora):
    """Shares decide how often each is read; the draw is one of seed and step, and counts agree with it."""
    names = {str(corpora / "letters"): 3.0, str(corpora / "digits"): 1.0}
    for order in ("random", "shuffled"):
        config = tiny(seq_len=8, batch_size=16, data=DataChoice(mixture=names, order=order))
        mixture = load(config.data)
        datamodule = TextDataModule(config, config.validate(), mixture)
        rows = np.concatenate([datamodule.batch(step).inputs for step in range(200)])
        digits = (rows < 60).all(1)
        assert ((rows < 60).any(1) == digits).all()
        expected = np.concatenate([mixture.drawn(config.seed, 16 * step, 16) for step in range(200)])
        assert np.array_equal(digits, expected == 0)  # by name, digits come first
        assert 700 < digits.sum() < 900  # 800 ± 4 standard errors of 24.5
        assert datamodule.read(200)[f"tokens.{corpora / 'digits'}"] == 8 * digits.sum()
        again = TextDataModule(config, config.validate(), load(config.data))
        assert np.array_equal(again.batch(199).inputs, datamodule.batch(199).inputs)
        if order == "shuffled":
            # within a corpus, an epoch reads each window once
            windows = (len(mixture.corpora[0].train) - 1) // 8
            first = rows[digits][:windows]
            assert len(np.unique(first, axis=0)) == windows


def test_a_run_on_a_mixture(backend, tiny, corpora, tmp_path):
    names = {str(corpora / "letters"): 3.0, str(corpora / "digits"): 1.0}
    data = DataChoice(mixture=names, order="shuffled", tokenizer="chars", eval_tokens=32)
    config = tiny(backend=backend, threads=1, seq_len=8, data=data, dtype="float64", accumulation=2)
    whole = _halves(config, tmp_path)
    rows = read(whole.run / "log.jsonl")
    # the first step's loss on each corpus is the spec's at the initial weights
    batch, model = TextDataModule(config, config.validate(), load(data)).batch(0), config.validate()
    logits, _ = create(model, init_params(model, config.seed, "float64")).forward(batch.inputs)
    assert batch.groups is not None
    for name, of in zip(("digits", "letters"), batch.groups.T, strict=True):
        expected = nll(model, logits[of].reshape(-1, logits.shape[-1]), batch.targets[of].reshape(-1)).mean()
        assert rows[0][f"loss.{corpora / name}"] == pytest.approx(expected, rel=numerics.mistake())
    last = next(row for row in reversed(rows) if "validation_loss" in row)
    each = [last[f"validation_loss.{corpora / name}"] for name in ("letters", "digits")]
    assert last["validation_loss"] == pytest.approx(0.75 * each[0] + 0.25 * each[1], rel=numerics.rounding("float64", 8))
    coder = checkpoint.load(whole.checkpoint).tokenizer
    assert coder is not None
    assert coder.vocab_size == 21  # 20 characters, and one for all others
    tokens = [row for row in rows if "loss" in row][-1]
    assert sum(value for name, value in tokens.items() if name.startswith("tokens.")) == 8 * 4 * 8
    with pytest.raises(InputError, match=r"data\.mixture.* is 3\.0 there and 2\.0 here"):
        train(dataclasses.replace(config, data=dataclasses.replace(data, mixture={**names, str(corpora / "letters"): 2.0})))
    (corpora / "digits" / "03.txt").write_text("0" * 90)
    with pytest.raises(InputError, match="now holds"):
        train(dataclasses.replace(config, steps=9))


def test_a_streamed_mixture_has_streams_by_share(tiny, corpora):
    names = {str(corpora / "letters"): 3.0, str(corpora / "digits"): 1.0}
    config = tiny(seq_len=8, batch_size=4, data=DataChoice(mixture=names, order="streamed"))
    datamodule = TextDataModule(config, config.validate(), load(config.data))
    assert [(row < 60).all() for row in datamodule.batch(5).inputs] == [True, False, False, False]
    assert datamodule.read(2) == {f"tokens.{corpora / 'digits'}": 16, f"tokens.{corpora / 'letters'}": 48}
    with pytest.raises(InputError, match="has less than one of 2 streams"):
        TextDataModule(dataclasses.replace(config, batch_size=2), config.validate(), load(DataChoice(mixture={**names, "sotu": 0.01})))


def test_documents_are_cut_off(backend, tiny, corpora):
    """A row is the beginning of one document; where that is short the rest is not read, and the loss is over what is."""
    config = tiny(backend=backend, seq_len=64, batch_size=12, dtype="float64")
    config = dataclasses.replace(config, data=DataChoice(corpus=str(corpora / "letters"), documents="truncated", order="shuffled"))
    corpus, model = load(config.data).corpora[0], config.validate()
    batch = TextDataModule(config, model, corpus).batch(0)
    starts = corpus.documents["train"]
    ends = [*starts[1:], len(corpus.train)]
    expected = {bytes(corpus.train[a : min(b, a + 65)]) for a, b in zip(starts, ends, strict=True)}
    assert batch.valid is not None
    found = set()
    for inputs, targets, valid in zip(batch.inputs, batch.targets, batch.valid, strict=True):
        n = int(valid.sum())
        assert valid[:n].all()
        found.add(bytes([*inputs[:n].astype(np.uint8), int(targets[n - 1])]))
    assert len(starts) == 12
    assert found == expected
    trainer, params = open_trainer(config, model), init_params(model, 1, "float64")
    trainer.init(params)
    nats = []
    for text in sorted(found):
        ids = np.frombuffer(text, np.uint8).astype(np.int64)
        nats.append(nll(model, create(model, params).forward(ids[None, :-1])[0][0], ids[1:]))
    assert trainer.gradient(batch, 0)[0].loss == pytest.approx(np.concatenate(nats).mean(), rel=numerics.mistake())
    single = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=str(corpora / "letters" / "09.txt")))
    with pytest.raises(InputError, match=r"truncated, and .* is one document"):
        TextDataModule(single, model, load(single.data))


def test_evaluation_starts_anew_at_documents(tiny, corpora):
    config = tiny(data=DataChoice(corpus=str(corpora / "letters")))
    model, corpus = config.validate(), load(config.data).corpora[0]
    from unisono_tools.backends.numpy import Reader

    reader = Reader(model, init_params(model, 1), "float64")
    ids, starts = np.asarray(corpus.train), corpus.documents["train"]
    marks = np.zeros(len(ids), bool)
    marks[starts] = True
    logits, _ = reader.forward(ids[None, :-1], reader.init_state(1), marks[None, :-1])
    assert evaluate(reader, ids, documents=starts).nats == pytest.approx(nll(model, logits[0], ids[1:]).sum(), rel=numerics.mistake())
    assert evaluate(reader, ids).nats != pytest.approx(evaluate(reader, ids, documents=starts).nats, rel=numerics.mistake())


def test_evaluation_where_logits_are_is_that_of_numpy(backend, tiny, monkeypatch):
    model = tiny().validate()
    reader = backends.backend(backend).Reader(model, init_params(model, 1), "float32")
    ids, starts = np.random.default_rng(0).integers(0, 256, 42), np.array([0, 9, 17])
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    here = evaluate(reader, ids, documents=starts)
    monkeypatch.setattr(type(reader), "far", property(lambda _: True))
    monkeypatch.setattr(evaluation, "nll", None)
    assert evaluate(reader, ids, documents=starts).nats == pytest.approx(here.nats, rel=numerics.rounding("float64", 2**12))


def test_eval_of_a_mixture_and_of_bases(backend, tiny, corpora, command, tmp_path):
    names = {str(corpora / "letters"): 3.0, str(corpora / "digits"): 1.0}
    result = train(tiny(backend=backend, steps=1, seq_len=8, data=DataChoice(mixture=names, eval_tokens=32)))
    code, out, _ = command("eval", result.run, "--backend", "numpy")
    assert code == 0
    bits = [float(part.split()[0]) for part in out.split("bits per token")[1:]]
    assert bits[2] == pytest.approx(0.75 * bits[1] + 0.25 * bits[0], abs=numerics.printed(6))
    genome = tmp_path / "genome.fa"
    genome.write_text(">one\n" + "acgtACGTnn\n" * 60)
    code, out, _ = command("eval", result.run, "--corpus", genome, "--backend", "numpy", "--documents", "reset")
    assert code == 0
    assert "bits per base" in out
    assert out.split("bits per base")[1].split()[0] == out.split("bits per token")[1].split()[0]
