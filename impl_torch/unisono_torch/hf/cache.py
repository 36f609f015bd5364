"""A running state as the cache that transformers' generate hands from step to step."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache


class StateCache(DynamicCache):
    """The state after `seen` tokens of each sequence, padding counted; empty before the first."""

    def __init__(self, state: dict[str, Tensor], seen: int) -> None:
        super().__init__()
        self.state, self.seen = state, seen

    # transformers asks these of a cache's layers, of which this has none
    is_linear: Any = (False,)  # pyright: ignore[reportIncompatibleMethodOverride]
    is_compileable: Any = False  # pyright: ignore[reportIncompatibleMethodOverride]
    is_croppable: Any = False  # pyright: ignore[reportIncompatibleMethodOverride]
    is_initialized: Any = True  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def batch_size(self) -> int:
        return next((len(a) for a in self.state.values()), -1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.seen > 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = {name: a[indices.to(a.device)] for name, a in self.state.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = {name: a.repeat_interleave(repeats, 0) for name, a in self.state.items()}

    def crop(self, *_: Any) -> None:
        raise NotImplementedError("a recurrent state cannot forget its last tokens; generate without an assistant model")

    def reset(self) -> None:
        raise NotImplementedError("begin anew with past_key_values=None")

    def __repr__(self) -> str:
        return f"StateCache({self.seen} tokens, {', '.join(f'{name} {tuple(a.shape)}' for name, a in self.state.items())})"
