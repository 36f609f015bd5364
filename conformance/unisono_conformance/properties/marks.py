"""P15, P17: packed and padded sequences, and sequences handed to another implementation half-way."""

from __future__ import annotations

import itertools

import numpy as np

from unisono_conformance.cases.inputs import Arrays, stack
from unisono_conformance.judging.trial import Trial
from unisono_conformance.properties.base import Property


def reset_separates(trial: Trial) -> None:
    """Row r restarts at token r, the last row at several: each equals the separate sequences, judged without marks. One call's rows all
    restart at their first token and nowhere else, for which an implementation may have a shorter way. What the state before a first token
    that restarts holds, be it NaN, is forgotten."""
    one = trial.running.rows([0])
    length = one.length
    cuts = [{0}] * (trial.draw.batch - 1) + [{r} for r in range(length)] + [{1, 2, length // 2, length - 1}]
    reset = np.array([[t in cut for t in range(length)] for cut in cuts])
    found = trial.subject.forward_rows(stack([one] * len(cuts)).replace(reset=reset, valid=np.ones_like(reset)).forgetting())
    fresh = trial.case.fresh_state(trial.setting, trial.inputs.params, 1, trial.inputs.length, trial.dtype)
    spans = [(row, *span) for row, cut in enumerate(cuts) for span in itertools.pairwise(sorted({0, length} | cut))]
    alone = [one.part(start, stop, fresh if start in cuts[row] else None) for row, start, stop in spans]
    for (row, start, stop), (o, state) in zip(spans, trial.expected_each(alone), strict=True):
        what = f"row that restarts at {sorted(cuts[row])}, tokens {start} to {stop - 1}"
        trial.compare(found[0][row : row + 1, start:stop], *o, what)
        if stop == length:
            trial.agrees_state({name: a[row : row + 1] for name, a in found[1].items()}, state, what)


def valid_is_absence(trial: Trial) -> None:
    """Padding left, right, in the middle, everywhere and at random, filled with NaN or garbage, changes nothing."""
    one = trial.running.rows([0])
    length = one.length
    keep = np.ones((5, length), bool)
    keep[0, :3] = keep[1, -3:] = keep[2, 2:5] = keep[3] = False
    keep[4] = trial.random("valid").random(length) < 0.5
    batch = stack([one] * len(keep)).replace(reset=np.zeros_like(keep), valid=keep)
    found = trial.subject.forward_rows(trial.case.spoil(trial.draw, batch, ~keep))
    rows = [row for row in range(len(keep)) if keep[row].any()]
    truths = trial.expected_each([one.times(np.flatnonzero(keep[row]).tolist()) for row in rows])
    for row, what in enumerate(("left", "right", "in the middle", "everywhere", "at random")):
        last = {name: a[row : row + 1] for name, a in found[1].items()}
        if row not in rows:
            for name, a in one.state.items():
                trial.same_bits(last[name], a, f"padding {what}: final and initial state {name}")
            continue
        o, state = truths[rows.index(row)]
        trial.compare(found[0][row : row + 1][:, keep[row]], *o, f"padding {what}")
        trial.agrees_state(last, state, f"padding {what}")


def reset_and_valid(trial: Trial) -> None:
    """Together: a reset acts before its token is read, also where that token is not valid."""
    random, inputs = trial.random("both"), trial.running
    shape = (inputs.batch, inputs.length)
    marked = inputs.replace(reset=random.random(shape) < 0.3, valid=random.random(shape) < 0.6)
    spoilt = trial.case.spoil(trial.draw, marked, ~marked.valid)  # pyright: ignore[reportOptionalOperand]
    found = trial.subject.forward(spoilt)
    fresh = trial.case.fresh_state(trial.setting, trial.inputs.params, 1, trial.inputs.length, trial.dtype)
    alone, where = [], []  # each stretch between resets that holds a valid token; (row, start, those tokens)
    finals = []  # a row's last state: of that stretch, or what it started from
    for row in range(inputs.batch):
        one = inputs.rows([row])
        reset, valid = marked.reset[row], marked.valid[row]  # pyright: ignore[reportOptionalSubscript]
        bounds = sorted({0, inputs.length, *np.flatnonzero(reset).tolist()})
        for start, stop in itertools.pairwise(bounds):
            first = fresh if reset[start] else one.state
            present = start + np.flatnonzero(valid[start:stop])
            final: int | Arrays = first
            if len(present):
                final = len(alone)
                alone.append(one.times(present.tolist()).replace(state=first))
                where.append((row, start, present))
        finals.append(final)
    truths = trial.expected_each(alone)
    for (row, start, present), (o, _) in zip(where, truths, strict=True):
        what = f"row {row}, valid tokens {present.tolist()} after a reset at {start}"
        trial.compare(found[0][row : row + 1][:, present], *o, what)
    for row, final in enumerate(finals):
        state = truths[final][1] if isinstance(final, int) else {name: (a, np.zeros(a.shape)) for name, a in final.items()}
        trial.agrees_state({name: a[row : row + 1] for name, a in found[1].items()}, state, f"row {row}, reset and valid together")


def handed_over(trial: Trial) -> None:
    """The spec begins and the implementation ends, and the other way round."""
    inputs, at = trial.running, trial.running.length // 2
    first, rest = inputs.part(0, at), inputs.part(at, inputs.length)
    _, state = trial.case.reference(trial.setting, first, "recurrent")
    state = {name: a.astype(inputs.state[name].dtype) for name, a in state.items()}
    rest = rest.replace(state=state)
    trial.agrees(trial.subject.forward(rest), rest, "the spec begins, the implementation ends")
    o, between = trial.subject.forward(first)
    for name, a in between.items():
        if a.dtype != state[name].dtype or a.shape != state[name].shape:
            trial.fail(f"state {name} cannot be handed on: {a.dtype} {a.shape}, expected {state[name].dtype} {state[name].shape}")
    rest = rest.replace(state=between)
    trial.agrees((o, between), first, "the implementation begins")
    wide, last = trial.case.reference(trial.setting, rest, "recurrent")
    _, (whole, state) = None, trial.expected(inputs)
    trial.compare(wide, whole[0][:, at:], whole[1][:, at:], "the implementation begins, the spec ends: o")
    trial.agrees_state(last, state, "the implementation begins, the spec ends")


PROPERTIES = (
    Property("P15r", "reset equals separate sequences", reset_separates, rows=True),
    Property("P15v", "valid equals absence", valid_is_absence, rows=True),
    Property("P15", "reset and valid together", reset_and_valid, rows=True, every_pair=True),
    Property("P17", "handed over in mid-sequence", handed_over, own_shapes=True, random=False),
)
