"""What the benchmark of decoding counts and shows; it runs on a GPU."""

from __future__ import annotations

import torch
from unisono_spec.contract import count_params, preset
from unisono_tools.bench import decode


def test_a_floor_is_what_must_move() -> None:
    """Weights in bfloat16 without embeddings that are looked up; the state twice, or what a cache holds once."""
    config = preset("transformer-1m").replace(n_layers=1, d_model=64, head_width=16, vocab_size=100, tie_head=True)
    weights = 2 * count_params(config)
    cache = {name: torch.zeros(1, 2 * decode.ROOM, 4, 16, dtype=torch.bfloat16) for name in config.states(8) if name != "position"}
    assert len(cache) == 2
    held = sum(a.nbytes for a in cache.values()) / 2
    assert decode.floor_bytes(config, cache, decode.ROOM) == weights + held
    ssm = preset("mamba-1m")
    states = {name: torch.zeros(3, *s.shape) for name, s in ssm.states().items()}
    read = decode.floor_bytes(ssm, states, 10) - decode.floor_bytes(ssm, {}, 10)
    assert read == 2 * sum(a.nbytes for a in states.values())


def test_rows_stand_beside_their_transformer() -> None:
    row = {"batch": 1, "context": 1024, "parameters": 10**6, "floor_bytes": 3e6, "layers": 6, "kernels": 30.0}
    rows = [
        {**row, "model": "lat", "twin": "transformer", "graph_us": 2.0, "step_us": 1000.0, "one_us": 400.0, "drawn_us": 3.0},
        {**row, "model": "transformer", "graph_us": 5.0},
        {**row, "model": "transformer", "context": 2048, "note": "a state of 99 GB"},
    ]
    page = decode.markdown({"run": {}, "ceilings": {"copy_bytes_per_s": 3e12}, "rows": rows})
    assert "| lat | 1.0M | 1 | 1,024 | 1,000 | 400 | 3 | 2 | 30 / 6 | 50% | 2.50 |" in page
    assert "| transformer | 1.0M | 1 | 1,024 | – | – | – | 5 | 30 / 6 | 20% | – |" in page
    assert "| transformer | 1.0M | 1 | 2,048 | – | – | – | a state of 99 GB | | | |" in page
