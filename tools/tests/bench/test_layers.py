"""The benchmarks of whole layers: what they fit, and that each contestant runs."""

from __future__ import annotations

from unisono_tools.bench import linear, peers


def test_exponents_of_known_powers():
    points = [linear.Point("m", n, 1e-6 * n, 1e-9 * n**2, 0.1 * n**0.5) for n in linear.LENGTHS]
    found = linear.exponents(points)["m"]
    assert {kind: round(p, 6) for kind, p in found.items()} == {"forward": 1.0, "backward": 2.0, "peak": 0.5}
    assert "| m | 1.00 | 2.00 | 0.50 |" in linear.markdown({"command": "none"}, points)


def test_a_point():
    point = linear.measure("mamba", 256, 1)
    assert point.forward > 0
    assert point.backward > 0
    assert point.peak >= 0


def test_contestants_agree_in_shape_and_run():
    for make, batch, _ in peers.CASES.values():
        calls = make(batch, 64)
        assert "unisono" in calls
        assert len({call().numel() for call in calls.values()}) == 1
        assert peers.milliseconds(calls["unisono"], 1) > 0
    assert "| layer | unisono | 2.0 | 1.00 |" in peers.markdown({}, {"layer": {"unisono": 2.0, "peer": 5.0}})
