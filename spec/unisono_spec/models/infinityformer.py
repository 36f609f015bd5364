"""InfinityFormer: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head; as docs/architectures/infinityformer.md resolves it."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.layers.infinityformer import ffn_update, mixer_inputs, mixer_update
from unisono_spec.layers.params import sub
from unisono_spec.layers.reading import Reading, Training
from unisono_spec.models.base import Model
from unisono_spec.ops import multiscale


class InfinityFormer(Model):
    config: InfinityFormerConfig

    def _read(self, tokens: np.ndarray, state: Arrays, read: Reading, training: Training) -> tuple[np.ndarray, Arrays]:
        r, config = self.rounded, self.config
        where, count = read.positions(state["position"], tokens)
        x = self.params["embedding.weight"][tokens]
        out: Arrays = {"position": count}
        for i in range(config.n_layers):
            p, S, z = sub(self.params, f"layers.{i}"), f"layers.{i}.S", f"layers.{i}.z"
            inputs = *mixer_inputs(p, config, x, where, r), (state[S], state[z])
            if config.compress_every:  # sequential whatever the form: layer by layer instead of token by token
                op = multiscale.step if read.one_token else multiscale.recurrent
                due = (where + 1) % config.compress_every == 0
                o, (out[S], out[z]) = op(*inputs, *read.marks, due, config.compress_rank)
            else:
                o, (out[S], out[z]) = read(multiscale, *inputs)
            x = self._updated(x, mixer_update(p, o, r), training.mask(2 * i))
            x = self._updated(x, ffn_update(p, x, r), training.mask(2 * i + 1))
        return x, out


MODEL = InfinityFormer
