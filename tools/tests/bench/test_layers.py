"""The benchmarks of whole layers: what they fit, and that each contestant runs."""

from __future__ import annotations

import pytest
import torch
from unisono_conformance import numerics
from unisono_spec.contract import InputError
from unisono_tools.bench import linear, peers


def test_exponents_of_known_powers():
    points = [linear.Point("m", n, 1e-6 * n, 1e-9 * n**2, 0.1 * n**0.5 * (2 if n == 8192 else 1)) for n in linear.LENGTHS]
    found = linear.exponents(points)["m"]
    assert {kind: round(p, 6) for kind, p in found.items()} == {"forward": 1.0, "backward": 2.0, "peak": 0.4}
    # 8K tokens take twice the memory: powers from 4K to 8K and on to 16K are 1 more and 1 less
    assert "| m | 1.00 (1.00–1.00) | 2.00 (2.00–2.00) | 0.40 (-0.50–1.50) |" in linear.markdown({"command": "none"}, points)


def test_a_point():
    for params in ("", "1M"):
        point = linear.measure("mamba", 256, 1, params)
        assert point.reading is not None
        assert min(point.reading, point.forward, point.backward) > 0
        assert point.read is not None
        assert point.peak >= point.read >= 0
    with pytest.raises(InputError, match=r"'based' is none of .* or say --params"):
        linear.config_of("based", "")


def test_contestants_agree():
    for make, batch in {(make, batch) for make, batch, _ in peers.CASES.values()}:
        exact = make(batch, 64, torch.float64)[peers.OURS].forward().numpy()
        for row in peers.measure(make(batch, 64, torch.float32), exact, 1):
            assert row.forward_ms > 0
            assert row.ms > 0
            assert row.error is None or row.error < numerics.formula("float32", 64 * 64)
    rows = [peers.Row("ours", 1.0, 2.0, 1e-7), peers.Row("peer", 3.0, 5.0, None)]
    assert "| layer | peer | 3.0 | 3.00 | 5.0 | 2.50 | – |" in peers.markdown({}, {"layer": rows})
