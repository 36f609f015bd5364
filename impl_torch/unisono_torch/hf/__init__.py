"""The models behind transformers' interface: from_pretrained, generate with every strategy, Trainer, the Auto classes.

    import unisono_torch.hf  # registers the Auto classes
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("runs/lat")   # a folder with config.json and model.safetensors
    model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20, num_beams=4)

The weights are one safetensors file under the names of the contract, so that every room reads what `save_pretrained` writes, and
`from_unisono` reads what any room writes. The running state is the `past_key_values` of transformers up to 5.23 and the `cache` of 5.24
and later, of constant size but for softmax attention; padding on the left, on the right or between is not read. Needs the extra `hf`.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from unisono_torch.hf.cache import StateCache
from unisono_torch.hf.configuration import (
    CRAMHFConfig,
    InfinityFormerHFConfig,
    LATHFConfig,
    MARUHFConfig,
    S4DHFConfig,
    SelectiveSSMHFConfig,
    SoftmaxHFConfig,
    UnisonoConfig,
)
from unisono_torch.hf.modeling import (
    BasedForCausalLM,
    CRAMForCausalLM,
    InfinityFormerForCausalLM,
    LATForCausalLM,
    MARUForCausalLM,
    S4DForCausalLM,
    SelectiveSSMForCausalLM,
    TransformerForCausalLM,
    UnisonoForCausalLM,
)

__all__ = [
    "BasedForCausalLM",
    "CRAMForCausalLM",
    "CRAMHFConfig",
    "InfinityFormerForCausalLM",
    "InfinityFormerHFConfig",
    "LATForCausalLM",
    "LATHFConfig",
    "MARUForCausalLM",
    "MARUHFConfig",
    "S4DForCausalLM",
    "S4DHFConfig",
    "SelectiveSSMForCausalLM",
    "SelectiveSSMHFConfig",
    "SoftmaxHFConfig",
    "StateCache",
    "TransformerForCausalLM",
    "UnisonoConfig",
    "UnisonoForCausalLM",
]

for _model in UnisonoForCausalLM.__subclasses__():
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
