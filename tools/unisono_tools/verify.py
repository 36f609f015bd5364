"""Whether a text is the one that float64 gives: what a backend's rounding did to it, beside the margin that near-ties are counted by."""

from __future__ import annotations

import dataclasses

import numpy as np
from unisono_spec.contract.generation import PIECE
from unisono_spec.contract.sampling import NEAR_TIE, Sampling, choose

from unisono_tools.backends.base import Reader


@dataclasses.dataclass(frozen=True)
class Verified:
    """off: the largest difference of a logit from float64's, as a share of the spread of its row. count: ids that were chosen.

    other: how many float64 chooses otherwise, after the same text; unreported: those of them that were not counted as near-ties.
    """

    off: float
    count: int
    other: int
    unreported: int

    def __str__(self) -> str:
        holds = "within" if self.off <= NEAR_TIE else "more than"
        return (
            f"logits err by up to {self.off:.1e} of their spread, {holds} the margin of near-ties, {NEAR_TIE:.0e}; "
            f"float64 chooses {self.other} of {self.count} ids otherwise, {self.unreported} of which were no near-ties"
        )


def verify(reader: Reader, wide: Reader, prompt: np.ndarray, max_new_tokens: int, sampling: Sampling) -> Verified:
    """Generate from prompt [T] with `reader`, and read the text again with it and with `wide`, the same model in float64."""
    found = reader.generate(prompt[None], max_new_tokens, sampling)
    text = np.concatenate([prompt, found.tokens[0]])
    states = [one.init_state(1, len(text)) for one in (reader, wide)]
    seen = np.zeros((1, reader.config.vocab_size), bool)
    off, other, unreported = 0.0, 0, 0
    for start in range(0, len(text) - 1, PIECE):
        piece = text[None, start : min(start + PIECE, len(text) - 1)]
        logits = []
        for i, one in enumerate((reader, wide)):
            out, states[i] = one.forward(piece, states[i])
            logits.append(out[0].astype(np.float64))
        ours, truth = logits
        for row in range(len(truth)):
            seen[0, text[start + row]] = True
            number = start + row + 1 - len(prompt)
            if number < 0:
                continue
            spread = truth[row].max() - truth[row].min()
            off = max(off, float(np.abs(ours[row] - truth[row]).max() / spread) if spread else 0.0)
            differs = int(choose(truth[None, row], sampling, number, seen)[0][0]) != text[start + row + 1]
            other += differs
            unreported += differs and not found.near_ties[0, number]
    return Verified(off, len(found.tokens[0]), other, unreported)
