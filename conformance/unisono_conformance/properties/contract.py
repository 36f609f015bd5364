"""P8, P9, P12, P14, P16: names and dtypes, the same bits twice, compiled and exported forms."""

from __future__ import annotations

import math

import numpy as np
from unisono_spec.contract import count_params

from unisono_conformance.judging.trial import Trial
from unisono_conformance.properties.base import Property


def parameters(trial: Trial) -> None:
    """An implementation holds the parameters that it was given, under the contract's names, in the contract's layout."""
    found, config = trial.ask(trial.subject.model(trial.inputs.params).params), trial.setting
    declared = config.params()
    if sorted(found) != sorted(declared):
        trial.fail(f"parameter names: missing {sorted(set(declared) - set(found))}, foreign {sorted(set(found) - set(declared))}")
    count = sum(math.prod(a.shape) for name, a in found.items() if declared[name].trainable)
    if count != count_params(config):
        trial.fail(f"{count} parameters, the config declares {count_params(config)}")
    for name, p in trial.inputs.params.items():
        trial.same_bits(found[name], p, f"parameter {name} as held and as given")


def dtypes(trial: Trial) -> None:
    """Logits in the compute dtype, ξ and float states float32 or wider, counters int32."""
    o, last = trial.subject.forward(trial.running)
    subject, allowed = trial.subject, trial.subject.output_dtypes()
    if o.dtype not in allowed:
        trial.fail(f"{subject.output} has dtype {o.dtype}, expected {np.dtype(allowed[0])}")
    for name, a in trial.running.state.items():
        want = np.dtype(np.int32) if a.dtype.kind == "i" else np.dtype(subject.wide)
        if last[name].dtype != want:
            trial.fail(f"final state {name} has dtype {last[name].dtype}, expected {want}")


def same_bits(trial: Trial) -> None:
    inputs = trial.running
    first = trial.subject.forward(inputs)
    for what, other in trial.subject.again(inputs).items():
        trial.same_bits(first[0], other[0], f"{what}: outputs")
        for name in first[1]:
            trial.same_bits(first[1][name], other[1][name], f"{what}: final state {name}")


def compiled(trial: Trial) -> None:
    model = trial.ask(trial.subject.model(trial.inputs.params).compiled)
    lengths = (3, 2) if trial.case.loops else (trial.running.length, 4)  # a compiler unrolls loops
    for length, what in zip(lengths, ("compiled", "compiled, at another length"), strict=True):
        inputs = trial.running.part(0, length)
        trial.agrees(trial.subject.forward(inputs, model=model), inputs, what)


def exported(trial: Trial) -> None:
    """A graph equals the model that it was exported from, at lengths and batches that it was not traced with."""
    graph = trial.subject.model(trial.inputs.params)
    for inputs in (trial.running, trial.running.part(0, 1), trial.running.rows([1]), trial.running.rows([0, 1, 1])):
        for what, model in {"the graph": graph, **graph.others()}.items():
            trial.agrees(trial.subject.forward(inputs, model=model), inputs, f"{what} at B={inputs.batch}, T={inputs.length}")


def _models(case, capabilities) -> bool:
    return case.level == "model"


PROPERTIES = (
    Property(
        "P8", "parameter names, shapes, counts", parameters, rows=True, each_form=False, random=False,
        applies=_models,
    ),
    Property("P9", "dtypes and float32 state", dtypes, regimes=("tame",), random=False),
    Property(
        "P12", "compiled equals eager", compiled, dtypes=("float32",), random=False,
        applies=lambda case, can: can.compiled and case.level == "model", claims=("compiled",),
    ),
    Property(
        "P14", "exported graph equals source", exported, rows=True, random=False,
        applies=lambda case, can: can.exported and case.level == "model", claims=("exported",),
    ),
    Property("P16", "the same bits twice", same_bits, regimes=("tame", "large"), random=False),
)  # fmt: skip
