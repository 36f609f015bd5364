"""Which run may continue another, what may change and what must be as it was, and which one needs no more steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from unisono_spec.contract import InputError
from unisono_spec.contract.plain import expanded

from unisono_tools.config import TrainConfig, flatten, to_dict
from unisono_tools.data.tokenizers import identity
from unisono_tools.train.checkpoint import Best, Checkpoint, model_file, saved_tokenizer, tokenizer_of
from unisono_tools.train.datamodule import DataModule


def stopping(train: TrainConfig, done: int, best: Best | None) -> str | None:
    """Why, after so many steps, the validation says that no more are needed, or of use."""
    if train.enough and best is not None and best.score is not None and best.score >= train.enough:
        return f"{best.score:.4f} is enough"
    if train.patience and best is not None and done - best.step >= train.patience * train.eval_every:
        return f"no better validation since step {best.step}"
    return None


def doubts(train: TrainConfig, datamodule: DataModule) -> Iterator[str]:
    """What is allowed, and hardly meant."""
    yield from train.doubts()
    try:
        model = model_file(expanded(train.init_from)) if train.init_from else None
        before = saved_tokenizer(model) if model and tokenizer_of(model) else None
    except InputError:  # of a run that goes on, it need not be there any more; of a new one, it will be missed
        return
    if before and datamodule.tokenizer and identity(before) != identity(datamodule.tokenizer):
        yield (
            f"init_from: {train.init_from} learned ids of the tokenizer {before.name!r}, which are other texts than those of this run's "
            f"{datamodule.tokenizer.name!r}; give data.tokenizer the tokenizer.json or the name of the former"
        )


# A continued run may change these: they touch neither the arithmetic nor the order of the data, but for roundings, and that each part
# of an accumulated batch draws dropout of its own. More steps stretch the cosine.
FREE = (
    *("steps", "epochs", "max_minutes", "patience", "enough", "wandb_project", "eval_every", "checkpoint_every", "log_every", "keep"),
    *(
        "data.eval_tokens",
        "data.eval_examples",
        "data.eval_window",
        "data.workers",
        "backend",
        "device",
        "implementation",
        "threads",
        "out",
    ),
    *("accumulation", "gradient_checkpointing", "compile", "cuda_graphs", "devices", "parallel", "context"),
)
# So may these where what they name is the same, as a fingerprint says.
NAMES = ("data.corpus", "data.validation")


def check_continues(config: TrainConfig, saved: TrainConfig, source: str, free: Sequence[str] = ()) -> None:
    """Raise InputError, naming the fields, where `config` is not the run that `saved` began. free: what else may differ here."""
    new, old = flatten(to_dict(config)), flatten(to_dict(saved))
    changed = [name for name in sorted(old | new) if new.get(name) != old.get(name) and name not in (*FREE, *free)]
    if changed:
        said = ", ".join(f"{name} is {old.get(name)!r} there and {new.get(name)!r} here" for name in changed)
        raise InputError(f"{source}: {said}; use the run's own values, or another --out (with --init_from to start from its weights)")


def check_same_run(train: TrainConfig, datamodule: DataModule, before: Checkpoint, source: str) -> None:
    """Raise InputError where `train`, or its corpus, is not what the run began with. A corpus may have been moved."""
    check_continues(train, before.train, source, NAMES if before.corpus and before.corpus == datamodule.digest else ())
    if before.corpus and datamodule.digest and before.corpus != datamodule.digest:
        raise InputError(
            f"data.corpus: {Path(train.data.corpus).absolute() if Path(datamodule.name).exists() else datamodule.name} now holds "
            f"{datamodule.digest[:12]}, {source} learned from {before.corpus[:12]}: the text, its splits or the tokenizer changed; "
            "restore it, or choose another --out (with --init_from to start from its weights)"
        )
