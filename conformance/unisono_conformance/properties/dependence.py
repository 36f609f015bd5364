"""P5, P6: what an output depends on: the whole of its past, nothing of its future, nothing of other rows."""

from __future__ import annotations

import numpy as np
from unisono_spec.contract import DTYPES

from unisono_conformance.cases.inputs import Inputs, stack
from unisono_conformance.judging import numerics
from unisono_conformance.judging.trial import Trial
from unisono_conformance.properties.base import Property


def full_lower_triangle(trial: Trial) -> None:
    """Row j of a batch has token j changed; what then moves is column j of the dependency matrix."""
    inputs = trial.running.rows([0])
    length, case = inputs.length, trial.case
    same = stack([inputs] * length)  # the same shape, since a row's bits may depend on where in a batch it stands
    batch = stack([case.flip(trial.setting, inputs, j) for j in range(length)])
    # [changed token j, output t]
    moved = _largest(trial.subject.forward_rows(batch)[0].astype(np.float64) - trial.subject.forward_rows(same)[0].astype(np.float64))
    ((true, budget), _), ((true_same, budget_same), _) = trial.expected(batch), trial.expected(same)
    should = _largest(true - true_same)
    blur = _largest(np.broadcast_to(budget + budget_same, true.shape))
    itself = case.reads_itself(trial.setting)
    for j in range(length):
        for t in range(length):
            if t < j or (t == j and not itself):
                if moved[j, t] != 0:
                    trial.fail(f"output {t} changes by {moved[j, t]:.3g} with token {j}, which it must not have read: not causal")
            elif should[j, t] > 2 * blur[j, t] and moved[j, t] < should[j, t] - blur[j, t]:
                trial.fail(
                    f"output {t} changes by {moved[j, t]:.3g} with token {j}, the spec's by {should[j, t]:.3g}: "
                    "it does not see its whole past"
                )


def _largest(a: np.ndarray) -> np.ndarray:
    """Of each token: [B, T, …] → [B, T]."""
    return np.abs(a).reshape(*a.shape[:2], -1).max(-1)


def reach(trial: Trial) -> None:
    """Each token within the declared reach moves each array of the final state by at least one bit."""
    inputs, found = trial.inputs.rows([0]), {}
    for name, a in inputs.state.items():
        if a.dtype.kind != "f":
            continue
        reach = trial.case.reach(trial.setting, trial.dtype, name)
        length = inputs.length if reach is None else min(reach, inputs.length)
        if length not in found:  # arrays of one reach are read from one run
            last = inputs.part(inputs.length - length, inputs.length)
            some = {0, 1, length // 3, length // 2, length - 2, length - 1}
            tokens = [j for j in range(length) if trial.subject.many_shapes or j in some]
            flipped = trial.subject.forward_rows(stack([trial.case.flip(trial.setting, last, j) for j in tokens]))
            found[length] = tokens, flipped[1], trial.subject.forward_rows(stack([last] * len(tokens)))[1]
        tokens, moved, same = found[length]
        for row, j in enumerate(tokens):
            if (moved[name][row] == same[name][row]).all():
                trial.fail(
                    f"final state {name} has the same bits after another token {j}, {length - j} tokens before its end: "
                    f"declared reach {reach}"
                )


def sees_far_in_narrow_formats(trial: Trial) -> None:
    """A wide model in 16 bits sees a token as far back as rounding of what its layers hand on, and of no sum, leaves it visible; and it
    equals the spec.

    The spec, rounded there, says how far: to where the last logits of three quarters of the rows still change. An implementation rounds
    other sums, and so other rows change: of 24, fewer than a quarter of as many with a probability of 1e-9.
    """
    inputs, dtype = trial.inputs, DTYPES[trial.dtype]

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(x.dtype)

    def last(batch: Inputs) -> np.ndarray:
        return trial.case.reference(trial.setting, batch, "parallel", "float32", rounded)[0][:, -1].astype(dtype)

    def changed(a: np.ndarray, b: np.ndarray) -> int:
        return int((a != b).any(-1).sum())

    before, rows = last(inputs), inputs.batch
    for time in range(inputs.length):
        flipped = trial.case.flip(trial.setting, inputs, time)
        should = changed(last(flipped), before)
        if should >= 0.75 * rows:
            break
    else:
        raise numerics.BudgetError(f"{trial.case.name}: no token is visible in {trial.dtype}; choose inputs that say more")
    logits, state = trial.subject.forward(inputs)
    two = inputs.rows([0, 1])
    trial.agrees((logits[:2], {name: a[:2] for name, a in state.items()}), two, "two rows")
    found = changed(trial.subject.forward(flipped)[0][:, -1], logits[:, -1])
    if found < should / 4:
        trial.fail(
            f"another token {inputs.length - 1 - time} tokens back changes the last logits of {found} rows of {rows}, of {should} where "
            "no sum is rounded"
        )


def rows_independent(trial: Trial) -> None:
    """A row is what it would be alone, whatever its neighbours hold."""
    inputs = trial.running
    for row in range(inputs.batch):
        others = np.ones((inputs.batch, inputs.length), bool)
        others[row] = False
        spoilt = trial.case.spoil(trial.draw, inputs, others)
        state = {
            name: np.where((np.arange(inputs.batch) == row).reshape(-1, *(1,) * (a.ndim - 1)), a, np.array(np.nan, a.dtype))
            if a.dtype.kind == "f"
            else a
            for name, a in inputs.state.items()
        }
        o, last = trial.subject.forward(spoilt.replace(state=state))
        alone = inputs.rows([row])
        found = (o[row : row + 1], {name: a[row : row + 1] for name, a in last.items()})
        trial.agrees(found, alone, f"row {row} beside rows of NaN or garbage")


PROPERTIES = (
    Property(
        "P5",
        "full lower triangle",
        full_lower_triangle,
        shapes=((1, 12, 5),),
        dtypes=("float64", "float32"),
        regimes=("tame",),
        own_shapes=True,
        random=False,
    ),
    Property(
        "P5r",
        "declared reach",
        reach,
        shapes=((2, 50, 16),),
        dtypes=("float64", "float32"),
        regimes=("tame",),
        own_shapes=True,
        random=False,
    ),
    Property(
        "P5w",
        "a wide model sees far in 16 bits",
        sees_far_in_narrow_formats,
        shapes=((24, 16, 16),),
        dtypes=("bfloat16", "float16"),
        regimes=("tame",),
        own_shapes=True,
        random=False,
        wide=True,
        applies=lambda case, can: case.level == "model",
    ),
    Property("P6", "batch rows are independent", rows_independent, random=False),
)
