"""The models as transformers' PreTrainedModel."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from unisono_spec.contract import InputError
from unisono_spec.contract.errors import shown
from unisono_spec.contract.files import load_params, save_params
from unisono_spec.contract.initial import initialize

from unisono_torch.arrays import from_numpy, numpy_params, owned
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
from unisono_torch.layers.reading import Marks, Reading, Training
from unisono_torch.models.base import Model
from unisono_torch.ops.precision import exact

# what transformers calls a cache among its outputs: past_key_values until 5.23
CACHE = "cache" if "cache" in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
WEIGHTS = "model.safetensors"


class UnisonoForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of this project under transformers' names; its parameters have the names of the contract.

    `unisono` is the model as `unisono_torch.create` makes it, on the same parameters. It computes in the dtype that they are held in,
    or in what torch.autocast casts to.
    """

    config: UnisonoConfig
    config_class = UnisonoConfig
    base_model_prefix = "unisono"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True  # by itself: transformers' choice of attention does not reach it
    unisono: Model

    def __init__(self, config: UnisonoConfig, **_: Any) -> None:
        super().__init__(config)
        contract = config.contract
        if contract.reads_frames:
            raise InputError("codes: 'frame'; transformers' language models read token ids, use unisono_torch.create for frames")
        model: Model = importlib.import_module(f"unisono_torch.models.{contract.arch}").MODEL(contract)
        # the model's modules are this one's: one set of names, whoever replaces one of them
        self._modules.update(model._modules)
        model.__dict__["_modules"] = self._modules
        self.__dict__["unisono"] = model
        self.gradient_checkpointing = False
        self._seed = int(torch.randint(2**62, (), device="cpu").item())
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)  # pyright: ignore[reportAttributeAccessIssue]
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = StateCache({}, 0)

    def train(self, mode: bool = True) -> Self:
        self.unisono.training = mode
        return super().train(mode)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The contract's initial values, of what no file has given; drawn from torch's generator."""
        prefix = next((name for name, inside in self.named_modules() if inside is module), "")
        declared = self.config.contract.params()
        for name, p in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            if full in declared and not getattr(p, "_is_hf_initialized", False) and not p.is_meta:
                p.copy_(from_numpy(initialize(declared[full].initial, declared[full].shape, self._seed, full)))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        past_key_values: StateCache | None = None,
        cache: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """input_ids [B, T] → logits [B, T, V], and the cache after them.

        attention_mask [B, T], or as long as all tokens since the cache began: where 0, a token is not read. past_key_values, cache: two
        names of one thing. labels [B, T]: as transformers' models take them, −100 where nothing is asked. logits_to_keep: only of the
        last so many tokens. output_hidden_states: what each block is given, and what the last one hands on. position_ids [B, T]: they
        rise by one, and where they are 0 a document begins, as in rows of DataCollatorWithFlattening; these models count by themselves.
        A row of one document goes on from the cache whatever it begins with: to begin anew, give none.
        """
        if input_ids is None or inputs_embeds is not None:
            raise InputError("inputs_embeds: these models embed ids themselves; give input_ids")
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or not input_ids.shape[1]:
            raise InputError(f"input_ids: {shown(getattr(input_ids, 'shape', input_ids))}; give ids [B, T], at least one token")
        held = cache if cache is not None else past_key_values
        if held is not None and not isinstance(held, StateCache):
            if held.get_seq_length():
                raise InputError(f"{CACHE}: {shown(type(held).__name__)} is no state of this model; give what a call returned, or None")
            held = None
        model, tokens = self.unisono, input_ids.shape[1]
        model.dtype = str(self.dtype).removeprefix("torch.")
        valid = _valid(attention_mask, input_ids)
        keeps = use_cache if use_cache is not None else not self.training
        fresh = held is None or not held.state
        before = model._begin(None if fresh else held.state, len(input_ids), tokens)  # pyright: ignore[reportPrivateUsage]
        reset = _begins(position_ids, input_ids, valid)
        model._check(input_ids, before, reset, valid)  # pyright: ignore[reportPrivateUsage]
        read = Reading(Marks(reset, valid), 64, model.implementation, fresh, model.compute_dtype)
        training = Training(model._dropout(input_ids.shape, None))  # pyright: ignore[reportPrivateUsage]
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        with _Watched(model, self._checkpointed(), bool(output_hidden_states)) as hidden:
            logits, x, after = _whole(input_ids, before, model, read, training, last)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        more = {CACHE: StateCache(owned(after), tokens + (held.seen if held is not None else 0))} if keeps else {}
        out = CausalLMOutputWithPast(
            loss=cast("Any", loss), logits=cast("Any", logits), hidden_states=(*hidden, x) if output_hidden_states else None, **more
        )
        wanted = return_dict if return_dict is not None else getattr(self.config, "return_dict", True)
        return out if wanted else out.to_tuple()

    def _checkpointed(self) -> Any:
        return getattr(self, "_gradient_checkpointing_func", checkpoint) if self.gradient_checkpointing and self.training else None

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: StateCache | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The last `next_sequence_length` of `input_ids`, which the cache has not read yet, or all; and the mask of all that was read."""
        held = cache if cache is not None else past_key_values
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        return {"input_ids": input_ids.contiguous(), CACHE: held, "use_cache": use_cache, "logits_to_keep": 1, **mask}

    def get_input_embeddings(self) -> nn.Module:
        if "embedding" not in self._modules:
            raise InputError("codes: 'binary'; this model reads the digits of ids and has no embedding")
        return self._modules["embedding"]  # pyright: ignore[reportReturnType]

    def enable_input_require_grads(self) -> None:
        if "embedding" in self._modules:
            super().enable_input_require_grads()

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.contract.tie_head else self._modules.get("head")  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Cut the vocabulary, or grow it: by rows that are the mean of the others, or the contract's initial values."""
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        size += -size % (pad_to_multiple_of or 1)
        before, after = self.config.contract, self.config.contract.replace(vocab_size=size)
        old = before.params()
        for name, p in after.params().items():
            if p.shape == old[name].shape:
                continue
            held = self.get_parameter(name)
            drawn = from_numpy(initialize(p.initial, p.shape, self._seed, name)).to(held)
            if mean_resizing:
                drawn[:] = held.float().mean(0).to(held)
            kept = min(len(held), size)
            drawn[:kept] = held[:kept]
            where, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(where), leaf, nn.Parameter(drawn, held.requires_grad))
        self.config.vocab_size = size
        self.unisono.config = after
        return self.get_input_embeddings()

    @classmethod
    def from_unisono(cls, path: str | Path, **options: Any) -> Self:
        """A model from a safetensors file that any room wrote. options: of transformers' configuration, such as eos_token_id."""
        config, params = load_params(path)
        if config.arch != cls.config_class.arch:
            raise InputError(f"{path}: holds a {config.arch} model, this class reads {cls.config_class.arch}; use its own")
        model = cls(cls.config_class.of(config, **options))
        model.load_state_dict({name: from_numpy(a) for name, a in params.items()}, assign=True)
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As transformers does; where the weights are one file, every room reads it, by the contract's config in its header."""
        super().save_pretrained(save_directory, *args, **kwargs)
        whole = Path(save_directory) / WEIGHTS
        if whole.is_file():
            save_params(whole, self.config.contract, numpy_params(self))


class _Watched:
    """While blocks are called: each computed again in the backward, if asked for, and what each is given kept, if asked for."""

    def __init__(self, model: Model, again: Any, keep: bool) -> None:
        self.layers, self.again, self.keep = list(model.layers), again, keep  # pyright: ignore[reportArgumentType]

    def __enter__(self) -> list[Tensor]:
        given: list[Tensor] = []

        def called(layer: nn.Module, plain: Any) -> Any:
            def call(x: Tensor, *rest: Any) -> Any:
                if self.keep:
                    given.append(x)
                return plain(x, *rest) if self.again is None else self.again(plain, x, *rest)

            return call

        if self.keep or self.again is not None:
            for layer in self.layers:
                layer.forward = called(layer, layer.forward)
        return given

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            layer.__dict__.pop("forward", None)


@exact
def _whole(
    ids: Tensor, before: dict[str, Tensor], model: Model, read: Reading, training: Training, kept: slice | Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of the tokens that are `kept`, what the head reads of all, the state after them."""
    x, after = model._read(ids, before, read, training)  # pyright: ignore[reportPrivateUsage]
    return model._head(x[:, kept]), x, after  # pyright: ignore[reportPrivateUsage]


def _valid(mask: Tensor | dict[str, Tensor] | None, ids: Tensor) -> Tensor | None:
    """The mask of `ids` alone, from one of all tokens since the cache began; None where everything is read."""
    if isinstance(mask, dict):
        mask = next((a for a in mask.values() if isinstance(a, Tensor) and a.ndim == 2), None)
    if mask is None:
        return None
    if mask.ndim != 2 or len(mask) != len(ids) or mask.shape[1] < ids.shape[1]:
        raise InputError(f"attention_mask: shape {tuple(mask.shape)}, expected {tuple(ids.shape)}, or longer; give one number a token")
    valid = mask[:, -ids.shape[1] :].bool()
    return None if bool(valid.all()) else valid


def _begins(positions: Tensor | None, ids: Tensor, valid: Tensor | None) -> Tensor | None:
    """Where a document begins, by the positions of tokens within theirs; None where none does after the first token."""
    if positions is None:
        return None
    if positions.ndim != 2 or positions.shape[1] != ids.shape[1] or len(positions) not in (1, len(ids)):
        raise InputError(f"position_ids: shape {tuple(positions.shape)}, expected {tuple(ids.shape)}; give one number a token, or none")
    if ids.shape[1] == 1:  # nor is the host to wait for each token that is generated
        return None
    where = positions.expand(ids.shape)
    begins = where == 0 if valid is None else (where == 0) & valid
    goes_on = begins[:, 1:] | (where[:, 1:] == where[:, :-1] + 1)
    if valid is not None:  # what stands at a token that is not read says nothing
        goes_on |= ~(valid[:, 1:] & valid[:, :-1])
    if not bool(goes_on.all()):
        raise InputError("position_ids: they neither rise by one nor begin anew at 0; leave them out, the state knows its position")
    return begins if bool(begins[:, 1:].any()) else None


class CRAMForCausalLM(UnisonoForCausalLM):
    """Cumulative retention (docs/architectures/cram.md)."""

    config_class = CRAMHFConfig


class LATForCausalLM(UnisonoForCausalLM):
    """Linear attention and its hybrids (docs/architectures/lat.md)."""

    config_class = LATHFConfig


class BasedForCausalLM(LATForCausalLM):
    """Based: a LAT of linear attention by Taylor features, windows and convolutions, as the preset `based` has it."""


class InfinityFormerForCausalLM(UnisonoForCausalLM):
    """Attention at several time scales (docs/architectures/infinityformer.md)."""

    config_class = InfinityFormerHFConfig


class MARUForCausalLM(UnisonoForCausalLM):
    """Mamba, then a GRU with memory (docs/architectures/maru.md)."""

    config_class = MARUHFConfig


class TransformerForCausalLM(UnisonoForCausalLM):
    """Softmax attention, a baseline."""

    config_class = SoftmaxHFConfig


class SelectiveSSMForCausalLM(UnisonoForCausalLM):
    """The selective state space model of Gu & Dao (2024), a baseline."""

    config_class = SelectiveSSMHFConfig


class S4DForCausalLM(UnisonoForCausalLM):
    """A diagonal state space model, a baseline."""

    config_class = S4DHFConfig
