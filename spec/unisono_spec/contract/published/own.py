"""What this project's own classes for transformers save (unisono_torch.hf): the contract's fields and names, in one file or in several."""

from __future__ import annotations

import dataclasses

from unisono_spec.contract import config_class
from unisono_spec.contract.errors import InputError
from unisono_spec.contract.published.plan import Plan, Settings

# `model_type` → architecture: transformers takes other paths where it finds "mamba" in the name of a type
TYPES = {
    **{f"unisono_{arch}": arch for arch in ("cram", "lat", "infinityformer", "maru", "transformer", "s4d")},
    "unisono_selective_ssm": "mamba",
}
RENAMED = {"temperature": "router_temperature"}  # of a config's fields: transformers' own is sampling's


def unisono(given: Settings) -> Plan:
    """config.json of `UnisonoForCausalLM`."""
    kind = config_class(TYPES[given.values["model_type"]])
    names = {field.name: RENAMED.get(field.name, field.name) for field in dataclasses.fields(kind)}
    try:
        config = kind.from_dict({name: given.values[there] for name, there in names.items() if there in given.values})
    except InputError as error:
        raise InputError(f"{given.source}: {error}") from error
    return Plan(config, "unisono", {name: p.shape for name, p in config.params().items()}, dict)
