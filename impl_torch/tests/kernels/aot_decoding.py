"""Compiles every kernel of a decoded token for an H100 that need not be there, as presets of one layer launch them. Run in a process
without TRITON_INTERPRET: `python -m impl_torch.tests.kernels.aot_decoding`, perhaps with names of those that it shall be."""

from __future__ import annotations

import sys

import torch
from unisono_spec.contract import preset
from unisono_torch import create
from unisono_torch.decoding import fused, parts
from unisono_torch.decoding.parts import Held
from unisono_torch.kernels import registry
from unisono_torch.kernels.decode import choose, common, counts, draw
from unisono_torch.kernels.mom_gru import operator
from unisono_torch.ops import dispatch

from . import absent

PRESETS = (
    "lat-base",
    "transformer-base",
    "mamba-130m",
    "s4d-base",
    "infinityformer-base",
    "cram-paper",
    "maru",
    "cram-fixed-gpt2",
    "cram-plus",
)
CONFIGS = {
    **{name: preset(name) for name in PRESETS},
    "channels": preset("cram-plus").replace(channel_weights=True, skip=True),
    "after": preset("cram-paper").replace(residual="after"),
    "wide": preset("lat-base").replace(attention="window", window=2048),
    "head norm": preset("lat-base").replace(head_norm=True),
}


def main() -> None:
    compiled: dict[str, absent.Compiled] = {}
    absent.install(compiled)
    dispatch.available = registry.available = fused.available = lambda device: True  # pyright: ignore[reportPrivateImportUsage]
    common.early = lambda device: True
    operator._multiprocessors = lambda device: 132
    for name in sys.argv[1:] or CONFIGS:
        config = CONFIGS[name].replace(n_layers=1, vocab_size=64)
        for batch, joined in ((1, ""), (16, "slabs"), (256, "tiles"), (256, "fronts"), (256, "")):
            parts.joined = lambda model, batch, joined=joined: joined
            model = create(config, dtype="bfloat16", implementation="triton")
            with torch.no_grad():
                made = fused.fused(model, model.init_state(batch, 2048), Held())
                assert made is not None, name
                made[1](torch.zeros(batch, dtype=torch.int64))
    number, scalar = torch.tensor(0), torch.tensor(1.0, dtype=torch.float64)
    ids, ties, bad = (torch.zeros((1, 2), dtype=kind) for kind in (torch.int64, torch.bool, torch.int32))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        logits, token, u = torch.zeros((2, 50257), dtype=dtype), torch.zeros(2, dtype=torch.int64), torch.zeros((1, 2), dtype=torch.float64)
        if dtype != torch.float64:
            choose.choose(logits, number, ids, ties, bad, token)
        draw.draw(logits, u, scalar, number, scalar, number, ids, ties, bad, token)
        if dtype == torch.bfloat16:
            counts.draw(counts.Counts(2, logits.device), logits, u, scalar, number, scalar, number, ids, ties, bad, token)
    absent.finish(compiled)


if __name__ == "__main__":
    main()
