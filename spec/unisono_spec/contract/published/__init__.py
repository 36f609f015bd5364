"""Checkpoints that others have published, under the names of this project: Mamba's in both of its namings, those of
flash-linear-attention whose definitions are ours, and what our own classes for transformers save. What computes something else is
refused, by the field that says so.

A checkpoint is a folder with config.json and safetensors files, here or on the hub. Pickles are never read, and no file names code.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from unisono_spec.contract.base import Arrays, Config
from unisono_spec.contract.errors import InputError, nearest, shown
from unisono_spec.contract.files import check_finite, check_params
from unisono_spec.contract.plain import read_file, read_json
from unisono_spec.contract.published import linear_attention, mamba, own
from unisono_spec.contract.published.places import Place, find
from unisono_spec.contract.published.plan import Plan, Settings
from unisono_spec.contract.published.weights import read_tensors

# by the `model_type` of config.json
TYPES = {"mamba": mamba.transformers, "linear_attn": linear_attention.fla, **dict.fromkeys(own.TYPES, own.unisono)}
CONFIG = "config.json"
# of github.com/HazyResearch/based
BASED = "its convolution has SiLU on the half that is convolved, LAT's on the other; and RoPE turns its windows alone"


@dataclasses.dataclass(frozen=True)
class Published:
    """A checkpoint as every room reads it. naming: whose names it was written in. place: where it lies, and what lies beside it."""

    config: Config
    params: Arrays
    naming: str
    place: Place


def read(source: str | Path, revision: str | None = None) -> Published:
    """Read a published checkpoint.

    source: a folder, a .safetensors file beside its config.json, or owner/name (or hf:owner/name) on the hub, which needs the package
    huggingface_hub. revision: a branch, tag or commit there. float16 and bfloat16 come as float32, which holds them exactly.
    Raises InputError, which names field and value, where the model is not one of ours, and lists tensors that are missing or unknown.
    """
    place = find(source, revision)
    path = place.get(CONFIG)
    if path is None:
        raise InputError(f"{place}: holds no {CONFIG}; give the folder of a published checkpoint, or owner/name on the hub")
    plan = plan_of(path)  # before any of the weights is fetched or read
    params = plan.make(read_tensors(place, plan, str(path)))
    check_params(plan.config, params, str(place))
    check_finite(params, str(place))
    return Published(plan.config, params, plan.naming, place)


def plan_of(path: Path) -> Plan:
    """What a config.json declares: our config, and the tensors that its weights must have."""
    remedy = "give the config.json of a published checkpoint"
    values = read_json(read_file(path, remedy), str(path), remedy)
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, not names with values; {remedy}")
    given = Settings(values, str(path))
    given.must("alt_mixer", why=BASED, remedy="train one here: preset based")
    kind = values.get("model_type")
    if kind is None and ("ssm_cfg" in values or {"d_model", "n_layer"} <= values.keys()):
        return mamba.mamba_ssm(given)
    if not isinstance(kind, str) or kind not in TYPES:
        raise InputError(f"{path}: model_type: {shown(kind)} is not read here; {nearest(kind, TYPES)}, or mamba_ssm's own, which has none")
    given.must("auto_map", None, why="it names code, which is not run and may define anything", remedy="remove the key")
    given.must("quantization_config", None, why="weights must be floats", remedy="take the checkpoint that was quantised")
    return TYPES[kind](given)
