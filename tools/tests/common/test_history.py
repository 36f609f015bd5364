"""What weights say of themselves, the picture of a run, and the memory that it is told to need."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from unisono_spec.contract import InputError, count_params, init_params, preset
from unisono_tools.config import ModelChoice, TrainConfig
from unisono_tools.experiments.history import plot
from unisono_tools.train.gauges import gauges
from unisono_tools.train.outlook import memory

INFINITY = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_ffn": 8}
MARU = {"d_model": 8, "n_layers": 1, "head_hidden": 8, "n_banks": 2, "n_slots": 3, "d_memory": 4, "router": "gumbel"}


def test_gauges():
    config = preset("infinityformer-1m", **INFINITY)
    params = init_params(config, 0)
    params["layers.1.mixer.decay.bias"][:] = np.log([1, 3, 9])
    params["layers.1.mixer.gate.bias"][:] = 0
    told = gauges(config, params)
    assert [round(told[f"decay.1.{i}"], 6) for i in range(3)] == [0.5, 0.75, 0.9]
    assert told["gate.1"] == 0.5
    assert len(told) == 8
    config = preset("maru-1m", **MARU)
    params = init_params(config, 0)
    params["layers.0.cell.balance_load"][:] = (0.25, 0.75)
    assert gauges(config, params) == {"load.0.0": 0.25, "load.0.1": 0.75}
    config = preset("cram-1m")
    assert gauges(config, init_params(config, 0)) == {}


def test_a_picture(command, refused, tmp_path):
    assert "log.jsonl holds no step; give the folder" in refused("plot", tmp_path)
    rows = [{"step": i, "time": i, "loss": 5 / i, "lr": 1e-3, "gradient_norm": 1 / i, "rate": 100.0 * i} for i in range(1, 80)]
    rows += [{"step": i, "time": i, "validation_loss": 4 / i, "decay.0.0": 0.9, "decay.0.1": 0.99, "load.0.0": 0.5} for i in (40, 79)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = command("plot", tmp_path)
    assert code == 0
    assert out.strip() == str(tmp_path / "history.png")
    whole = (tmp_path / "history.png").read_bytes()
    assert whole.startswith(b"\x89PNG")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:79]))
    assert plot(tmp_path, tmp_path / "less.png").read_bytes() != whole
    each = [row | {"loss.a": 5.0, "loss.b/*.txt": 3.0} for row in rows[:79:2]] + [{"step": 9, "time": 9, "validation_loss.a": 4.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    drawn = plot(tmp_path, tmp_path / "each.svg").read_text()
    assert all(f"<!-- {words} -->" in drawn for words in ("Loss of each corpus, nats a target; dots: validation", "b/*.txt"))
    # each of one point is a dot, which lines are not: losses, rate, norm, speed, two decays, one load
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[0], rows[-1])))
    assert plot(tmp_path, tmp_path / "few.svg").read_text().count('<g clip-path="url') == 8
    with pytest.raises(InputError):
        plot(tmp_path / "nowhere", tmp_path / "x.png")


def test_the_memory_that_is_foretold():
    plan = TrainConfig(model=ModelChoice("lat-base"), dtype="bfloat16")
    whole = memory(plan, 1 << 14)
    held = 4 * 4 * count_params(plan.model.config())
    assert memory(dataclasses.replace(plan, ema=0.9), 1 << 14) == whole + held // 4
    assert memory(dataclasses.replace(plan, accumulation=2), 1 << 14) - held == (whole - held) // 2
    assert memory(dataclasses.replace(plan, devices=2), 1 << 14) - held == (whole - held) // 2
    assert memory(dataclasses.replace(plan, devices=2, parallel="fsdp"), 1 << 14) == whole // 2
    assert held < memory(dataclasses.replace(plan, gradient_checkpointing=True), 1 << 14) < whole
