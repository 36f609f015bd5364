"""InfinityFormer has no length limit: 200,000 tokens in constant memory, and at their end it is where the spec is."""

from __future__ import annotations

import numpy as np
import torch
import unisono_torch
from unisono_conformance.cases.infinityformer import InfinityFormer
from unisono_conformance.cases.inputs import Inputs
from unisono_conformance.judging import numerics, truth
from unisono_spec.contract import init_params, initial_state
from unisono_spec.contract.infinityformer import InfinityFormerConfig

LENGTH, CHUNK = 200_000, 4096
CONFIG = InfinityFormerConfig(d_model=4, n_layers=1, n_heads=1, d_ffn=2, vocab_size=7, n_scales=2)


def test_200_000_tokens_in_constant_memory() -> None:
    random = np.random.default_rng(0)
    params = {name: (p + random.normal(0, 0.1, p.shape)).astype(np.float32) for name, p in init_params(CONFIG, 0).items()}
    tokens = random.integers(0, CONFIG.vocab_size, (1, LENGTH))
    model = unisono_torch.create(CONFIG, params)
    state, sizes, logits = model.init_state(1), set(), torch.empty(0)
    with torch.no_grad():
        for start in range(0, LENGTH, CHUNK):
            # nothing outlives a call but the state, which is measured as it was returned
            logits, state = model.forward(torch.from_numpy(tokens[:, start : start + CHUNK]), state)
            sizes.add(sum(a.untyped_storage().nbytes() for a in state.values()))
    assert sizes == {sum(a.nbytes for a in initial_state(CONFIG, params, 1).values())}
    assert state["position"].item() == LENGTH
    inputs = Inputs({"tokens": tokens}, initial_state(CONFIG, params, 1), params=params)
    (o, budget), last = truth.expected(InfinityFormer(), CONFIG, inputs, "float32")
    tail = logits.shape[1]
    assert numerics.share(logits.numpy(), o[:, -tail:], budget[:, -tail:]).max() <= 1
    for name, (true, within) in last.items():
        assert numerics.share(state[name].numpy(), true, within).max() <= 1, name
