"""Layers that are no attention: state spaces, cumulative sums, convolutions, and a GRU with memory."""

from __future__ import annotations

from typing import Literal, Unpack

import jax
from unisono_spec.contract import layer as described
from unisono_spec.contract.cram import CRAMConfig

from unisono_jax.layers import cram, lat, mamba, maru, s4d
from unisono_jax.layers.leaves import Conv
from unisono_jax.layers.reading import Reading
from unisono_jax.nn.base import Layer, Options, State, drawn
from unisono_jax.ops import decayed_sum, short_conv
from unisono_jax.ops.elementwise import silu


class SelectiveSSM(Layer, mamba.Mamba):
    """x [B, T, D] → [B, T, D]: Mamba's block, convolution, selective scan, gate (Gu & Dao 2024, figure 3), with the names of the
    published checkpoints.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        expand: int = 2,
        conv_width: int = 4,
        dt_rank: int = 0,
        bias: bool = False,
        conv_bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        """dt_rank: 0 stands for ⌈D / 16⌉. State: conv [B, conv_width − 1, expand·D], ssm [B, expand·D, d_state]."""
        fields = {"d_state": d_state, "expand": expand, "conv_width": conv_width, "dt_rank": dt_rank, "bias": bias}
        layer = described.selective_ssm(d_model, **fields, conv_bias=conv_bias)
        mamba.Mamba.__init__(self, drawn(layer, **options))
        self._begin(layer, **options)

    def _mix(self, x: jax.Array, state: State, read: Reading) -> tuple[jax.Array, State]:
        y, (conv, ssm) = mamba.Mamba.__call__(self, x, (state["conv"], state["ssm"]), read)
        return y, {"conv": conv, "ssm": ssm}


class S4D(Layer, s4d.Mixer):
    """x [B, T, D] → [B, T, D]: a diagonal state space model with GELU and GLU after it (Gu, Gupta et al. 2022, S4D-Lin;
    docs/architectures/baselines.md).
    """

    def __init__(self, d_model: int, d_state: int = 64, **options: Unpack[Options]) -> None:
        """d_state: N states a channel, as N/2 conjugate pairs. State: ssm [B, D, N/2, 2]."""
        layer = described.s4d(d_model, d_state)
        s4d.Mixer.__init__(self, drawn(layer, **options))
        self._begin(layer, **options)

    def _mix(self, x: jax.Array, state: State, read: Reading) -> tuple[jax.Array, State]:
        y, after = s4d.Mixer.__call__(self, x, state["ssm"], read)
        return y, {"ssm": after}


class MoMGRU(Layer, maru.Cell):
    """x [B, T, D] → [B, T, D]: a GRU that reads and writes banks of memory (docs/architectures/maru.md)."""

    def __init__(
        self,
        d_model: int,
        n_banks: int = 4,
        n_slots: int = 128,
        d_memory: int = 64,
        router_hidden: int = 32,
        erase: Literal["coupled", "separate"] = "coupled",
        router: Literal["dense", "gumbel"] = "dense",
        temperature: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        """State: h [B, D], memory [B, n_banks, n_slots, d_memory], which starts as the learned M₀.

        router="gumbel": `noise` [B, T, n_banks] is added to the router's logits in training; without it the router has none.
        """
        fields = {"n_banks": n_banks, "n_slots": n_slots, "d_memory": d_memory, "router_hidden": router_hidden}
        layer = described.mom_gru(d_model, **fields, erase=erase, router=router, temperature=temperature)
        maru.Cell.__init__(self, drawn(layer, **options))
        self.temperature = temperature
        self._begin(layer, **options)

    def _mix(self, x: jax.Array, state: State, read: Reading, noise: jax.Array | None = None) -> tuple[jax.Array, State]:
        y, (h, memory) = maru.Cell.__call__(self, x, (state["h"], state["memory"]), read, noise, self.temperature)
        return y.astype(x.dtype), {"h": h, "memory": memory}


class CumulativeRetention(Layer, cram.Mixer):
    """x [B, T, D] → ξ [B, T, D]: CRAM's sum over the sequence, ξₜ = ξₜ₋₁ + sₜ σ(xₜ), s scored from position and x (eqs 8–10); or, given
    `decay` λ, the fixed scheme's ξₜ = λ ξₜ₋₁ + (1−λ) σ(xₜ) (eq 5), which has no parameters. Muraleedharan; docs/architectures/cram.md.

    ξ comes out in float32 or wider: rounded to 16 bits, a sum would lose its latest terms.
    """

    def __init__(
        self,
        d_model: int,
        decay: float | None = None,
        position_bits: int = 20,
        k_scale: float = 0.0,
        exclusive: bool = False,
        **options: Unpack[Options],
    ) -> None:
        """k_scale: 0 stands for √D. exclusive: ξₜ without token t, as eqs 7–10 print it. State: xi [B, D], and position where scored."""
        self.decay, self.exclusive = decay, exclusive
        if decay is None:
            layer = described.retention(d_model, position_bits=position_bits, k_scale=k_scale, exclusive=exclusive)
            cram.Mixer.__init__(self, drawn(layer, **options))
        else:
            layer = described.fixed_retention(d_model, decay)
        self._begin(layer, **options)

    def _mix(self, x: jax.Array, state: State, read: Reading) -> tuple[jax.Array, State]:
        if self.decay is not None:
            xi, last = read(decayed_sum, x, self.decay, state["xi"])
            return xi, {"xi": last}
        where, count = read.positions(state["position"], x)
        config: CRAMConfig = self.layer.config  # pyright: ignore[reportAssignmentType]
        xi, (last,) = self.summed(config, x, cram.Mixer.__call__(self, config, x, where), [state["xi"]], read)
        return xi, {"position": count, "xi": last}


class ShortConvolution(Layer, Conv):
    """x [B, T, D] → [B, T, D]: a causal depthwise convolution, its last tap on the token itself, and SiLU where asked for: as Mamba has
    one.
    """

    def __init__(
        self, d_model: int, width: int = 4, bias: bool = True, activation: Literal["silu"] | None = None, **options: Unpack[Options]
    ) -> None:
        """State: conv [B, width − 1, D], the last inputs."""
        layer = described.short_convolution(d_model, width, bias)
        Conv.__init__(self, drawn(layer, **options))
        self.activation = activation
        self._begin(layer, **options)

    def _mix(self, x: jax.Array, state: State, read: Reading) -> tuple[jax.Array, State]:
        y, after = read(short_conv, x, self.weight[...], None if self.bias is None else self.bias[...], state["conv"])
        y = y.astype(x.dtype)
        return (silu(y.astype(after.dtype)).astype(x.dtype) if self.activation else y), {"conv": after}


class GatedShortConvolution(Layer, lat.GatedConv):
    """x [B, T, D] → [B, T, D]: W_o (SiLU(a) ∘ conv(b)), [a, b] = W_in x, Based's convolution layer (Arora et al. 2024;
    docs/architectures/lat.md).
    """

    def __init__(self, d_model: int, width: int = 3, mult: int = 4, bias: bool = True, **options: Unpack[Options]) -> None:
        """W_in: D → mult·D, split in two halves. State: conv [B, width − 1, mult·D / 2]."""
        layer = described.gated_convolution(d_model, width, mult, bias)
        lat.GatedConv.__init__(self, drawn(layer, **options))
        self._begin(layer, **options)

    def _mix(self, x: jax.Array, state: State, read: Reading) -> tuple[jax.Array, State]:
        y, (conv,) = lat.GatedConv.__call__(self, x, {}, x, (state["conv"],), read)  # it does not look at positions
        return y, {"conv": conv}
