"""One layer of MARU: the Mamba block, a Linear, and the MoM-GRU cell, with norms and residuals in a stack."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from unisono_spec.contract.maru import MARUConfig

from unisono_jax.layers.leaves import Arrays, Buffer, Linear, RMSNorm, sub, updated
from unisono_jax.layers.mamba import Mamba
from unisono_jax.layers.reading import Marks, Mask, Reading
from unisono_jax.ops import mom_gru
from unisono_jax.ops.elementwise import wide

LINEARS = ("query", "input", "hidden", "key", "value", "erase", "gate")
BUFFERS = ("balance_bias", "balance_load")
States = tuple[jax.Array, ...]  # conv, ssm, h, memory


class Cell(nnx.Module):
    def __init__(self, params: Arrays) -> None:
        self.memory = nnx.Param(params["memory"])
        self.router = nnx.List([Linear(sub(params, f"router.{i}")) for i in range(2)])
        for name in LINEARS:
            if f"{name}.weight" in params:
                setattr(self, name, Linear(sub(params, name)))
        for name in BUFFERS:  # of router="gumbel"
            if name in params:
                setattr(self, name, Buffer(params[name]))

    def arrays(self) -> dict[str, jax.Array]:
        """As ops/mom_gru.py takes them. No gradient reaches what a rule of its own updates."""
        found = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(self))}
        return {name: jax.lax.stop_gradient(a) if name in BUFFERS else a for name, a in found.items()}

    def __call__(
        self, x: jax.Array, state: mom_gru.State, read: Reading, noise: Mask, temperature: float
    ) -> tuple[jax.Array, mom_gru.State]:
        """x [B, D] or [B, T, D] → h, the state after it."""
        return read(mom_gru, x, self.arrays(), state, noise=noise, temperature=temperature)

    def load(self, x: jax.Array, before: jax.Array, h: jax.Array, marks: Marks, noise: Mask, temperature: float) -> jax.Array:
        """The mean share of each bank [n] over the valid tokens of x [B, T, D]; before [B, D] and h [B, T, D]: as the call knows them."""
        reset, valid = marks
        h = jnp.concatenate([before[:, None], h[:, :-1].astype(before.dtype)], 1)
        h = h if reset is None else jnp.where(reset[..., None], 0, h)
        rho = mom_gru.routing(x.astype(h.dtype), h, self.arrays(), noise, temperature)
        return jax.lax.stop_gradient(rho.mean((0, 1), where=None if valid is None else valid[..., None]))


class Block(nnx.Module):
    """x [B, (T,) D] → the same shape: project(mamba(x)), then the cell; prenorm: x ← x + mamba(norm(x)), x ← x + cell(project(norm(x)))."""

    def __init__(self, params: Arrays, config: MARUConfig) -> None:
        self.config = config
        self.mamba, self.project, self.cell = Mamba(sub(params, "mamba")), Linear(sub(params, "project")), Cell(sub(params, "cell"))
        if config.prenorm:
            self.mamba_norm, self.cell_norm = RMSNorm(sub(params, "mamba_norm")), RMSNorm(sub(params, "cell_norm"))

    def __call__(
        self,
        x: jax.Array,
        state: States,
        read: Reading,
        masks: tuple[Mask, ...],
        noise: Mask,
        loads: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, States]:
        """x [B, D] or [B, T, D] → the same, the state after it. masks: dropout's, of block and cell. loads: receives the cell's load."""
        prenorm = self.config.prenorm
        update, mixed = self.mamba(self.mamba_norm(x).astype(x.dtype) if prenorm else x, state[:2], read)  # pyright: ignore[reportArgumentType]
        x = self._after(x, update, masks[0])
        y = self.project(self.cell_norm(x) if prenorm else x, x.dtype)
        temperature = self.config.temperature
        update, kept = self.cell(y, state[2:], read, noise, temperature)  # pyright: ignore[reportArgumentType]
        if loads is not None and noise is not None:
            loads.append(self.cell.load(y, state[2], update, read.marks, noise, temperature))
        return self._after(x, update.astype(x.dtype), masks[1]), (*mixed, *kept)

    def _after(self, x: jax.Array, update: jax.Array, mask: Mask) -> jax.Array:
        if self.config.prenorm:
            return updated(x, update, mask)
        return update if mask is None else (update.astype(wide(x)) * mask.astype(wide(x))).astype(x.dtype)
