"""The contract's configs as transformers' configurations. Fields have the contract's names; `hidden_size` and the like are read too."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from unisono_spec.contract import Config, InputError, config_class
from unisono_spec.contract.errors import shown
from unisono_spec.contract.published.own import RENAMED

ALIASES = {"hidden_size": "d_model", "num_hidden_layers": "n_layers"}


class UnisonoConfig(PreTrainedConfig):
    """What all share. `contract` is the config that every other room knows."""

    arch: ClassVar[str] = ""
    attribute_map: ClassVar[dict[str, str]] = ALIASES
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(self, **values: Any) -> None:
        """Fields of the contract's config by their names, and whatever transformers' configuration takes."""
        kind = config_class(self.arch or "lat")
        names = [field.name for field in dataclasses.fields(kind)]
        own = ALIASES | {new: old for old, new in RENAMED.items()}
        given = {own.get(name, name): value for name, value in values.items()}
        if (arch := given.pop("arch", self.arch)) != self.arch:
            raise InputError(f"arch: {shown(arch)}, and {type(self).__name__} is of {self.arch!r}; take the class of that one")
        contract = kind.from_dict({name: given[name] for name in names if name in given})
        # a tied head has no parameter of its own here: there is nothing for transformers to tie
        super().__init__(**{name: value for name, value in given.items() if name not in names} | {"tie_word_embeddings": False})
        for name, value in contract.to_dict().items():
            setattr(self, RENAMED.get(name, name), value)

    @property
    def contract(self) -> Config:
        """This configuration as the other rooms know it; InputError where its fields do not fit each other."""
        kind = config_class(self.arch)
        names = [field.name for field in dataclasses.fields(kind)]
        return kind.from_dict({name: getattr(self, RENAMED.get(name, name)) for name in names})

    @classmethod
    def of(cls, config: Config, **more: Any) -> UnisonoConfig:
        """The configuration of a contract's config; more: what transformers' takes besides."""
        return cls(**config.to_dict(), **more)


# each names its __init__, where transformers would make one of the fields that it finds
class CRAMHFConfig(UnisonoConfig):
    model_type = "unisono_cram"
    arch: ClassVar[str] = "cram"
    __init__ = UnisonoConfig.__init__


class LATHFConfig(UnisonoConfig):
    model_type = "unisono_lat"
    arch: ClassVar[str] = "lat"
    __init__ = UnisonoConfig.__init__


class InfinityFormerHFConfig(UnisonoConfig):
    model_type = "unisono_infinityformer"
    arch: ClassVar[str] = "infinityformer"
    __init__ = UnisonoConfig.__init__


class MARUHFConfig(UnisonoConfig):
    model_type = "unisono_maru"
    arch: ClassVar[str] = "maru"
    __init__ = UnisonoConfig.__init__


class SoftmaxHFConfig(UnisonoConfig):
    model_type = "unisono_transformer"
    arch: ClassVar[str] = "transformer"
    __init__ = UnisonoConfig.__init__


# transformers looks for "mamba" in the names of classes and types, and then takes other paths
class SelectiveSSMHFConfig(UnisonoConfig):
    model_type = "unisono_selective_ssm"
    arch: ClassVar[str] = "mamba"
    __init__ = UnisonoConfig.__init__


class S4DHFConfig(UnisonoConfig):
    model_type = "unisono_s4d"
    arch: ClassVar[str] = "s4d"
    __init__ = UnisonoConfig.__init__
