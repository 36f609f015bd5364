"""What a model can see: its dependency matrix, how far back one input bit still changes its state, and what can be read back from ξ."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import unisono_spec
from unisono_spec.contract import DTYPES, Config, InputError, check_dtype, preset, presets
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.initial import generator
from unisono_spec.models.base import Model
from unisono_spec.models.cram import CRAM
from unisono_spec.ops.elementwise import sigmoid

from unisono_tools.experiments import figures

STEP = 1e-100  # of the complex step: no difference is taken, so it can be as small as one likes


def inspect(target: str | Path, out_dir: str | Path, length: int = 48) -> dict[str, Path]:
    """Draw every figure that applies to a checkpoint or preset, as PNGs in `out_dir`; returns them by name."""
    model = unisono_spec.create(preset(str(target))) if str(target) in presets() else unisono_spec.load(target)
    out, name = Path(out_dir), Path(target).stem
    drawn = {
        "dependency": figures.dependency(out / "dependency.png", dependency_matrix(model, length), f"{name}: what each output depends on")
    }
    config = model.config
    if isinstance(config, CRAMConfig):
        limit = 512
        reaches = {dtype: effective_reach(config, dtype, limit) for dtype in DTYPES}
        drawn["reach"] = figures.reach(out / "reach.png", reaches, limit, f"{name}: how far back one input bit changes the state")
        if config.scheme == "fixed" and config.codes == "binary" and config.decay <= 0.5:
            accuracy = decoding_accuracy(config)
            drawn["decoding"] = figures.decoding(out / "decoding.png", accuracy, f"{name}: input bits read back from ξ")
    return drawn


def dependency_matrix(model: Model, length: int, seed: int = 0) -> np.ndarray:
    """|∂ logits_t / ∂ input_j|, [T, T]: row t, column j, the largest over the logits, along one random direction of unit length per input.

    By the complex step (Squire & Trapp 1998) in the float64 spec: exact zeros where nothing flows, and no rounding of small values.
    model: of unisono_spec. Inputs are what the tokens stand for: embeddings, digits or frames.
    """
    config = model.config
    rng = generator(seed, "inspect.dependency")
    if config.reads_frames:
        tokens = rng.random((1, length, config.frame_size))
    else:
        # no id twice: its row of the embedding is then the input of one position
        most = config.vocab_size
        if not 1 <= length <= most:
            raise InputError(f"length: {length}; use 1 to {most} tokens, which this vocabulary can tell apart")
        tokens = rng.permutation(most)[None, :length]
    out = np.zeros((length, length))
    for j in range(length):
        logits, _ = _nudged(model, tokens, j, rng).forward(tokens, model.init_state(1, length))
        if not config.reads_frames:
            logits[..., tokens[0, j]] = 0  # a tied head was nudged, too
        out[:, j] = np.abs(logits[0].imag).max(-1) / STEP
    return out


def _nudged(model: Model, tokens: np.ndarray, j: int, rng: np.random.Generator) -> Model:
    """`model` with i·STEP added to input j along a random direction."""

    def step(width: int) -> np.ndarray:
        direction = rng.normal(size=width)
        return 1j * STEP * direction / np.linalg.norm(direction)

    model = copy.copy(model)
    if "embedding.weight" in model.params:
        weight = model.params["embedding.weight"].astype(np.complex128)
        weight[tokens[0, j]] += step(weight.shape[1])
        model.params = {**model.params, "embedding.weight": weight}
        return model
    assert isinstance(model, CRAM)
    x = model.code(tokens).astype(np.complex128)  # [1, T, code]
    x[0, j] += step(x.shape[-1])
    model.code = lambda tokens: x
    return model


def effective_reach(config: Config, dtype: str, limit: int = 512, trials: int = 200, seed: int = 0) -> np.ndarray:
    """After how many tokens a changed first input leaves no trace in the state, [trials] integers; `limit` where it never vanished.

    The recurrence is run in `dtype` on random inputs, twice a trial: with the first input's bit off and on (binary codes, frames), or with
    two different values of its embedding. Unisono holds states in float32 or wider; the 16-bit rows show why. The adaptive scheme
    has s = 1: there nothing fades, and an old input is lost only when the sum's rounding exceeds it.
    """
    if not isinstance(config, CRAMConfig):
        raise InputError(f"arch={config.arch!r}: the reach is defined for cram; use one of its checkpoints or presets")
    kind = DTYPES[check_dtype(dtype)]
    rng = generator(seed, "inspect.reach")
    if config.has_embedding:
        x = rng.normal(0, config.d_model**-0.5, (2, trials, limit))
    else:
        x = np.broadcast_to(rng.integers(0, 2, (trials, limit)).astype(np.float64), (2, trials, limit)).copy()
        x[:, :, 0] = np.array([[0.0], [1.0]])
    x[1, :, 1:] = x[0, :, 1:]
    u = sigmoid(x).astype(kind)
    keep, gain = (config.decay, 1 - config.decay) if config.scheme == "fixed" else (1.0, 1.0)
    state = np.zeros((2, trials), kind)
    reach = np.zeros(trials, np.int64)
    for t in range(limit):
        state = (np.asarray(keep, kind) * state + np.asarray(gain, kind) * u[:, :, t]).astype(kind)
        reach += state[0] != state[1]  # once equal, equal for ever
    return reach


def decode(xi: np.ndarray, decay: float, count: int, length: int | None = None) -> np.ndarray:
    """The last `count` input bits of each channel of ξ, newest first: ξ [...] → [..., count], for decay ≤ ½.

    ξ = Σ_k (1−λ) λ^k σ(b_k). With σ(0) taken off and divided by σ(1) − σ(0), the newest bit weighs 1−λ and all older ones together at
    most λ (less the share of tokens before the first): it is 1 where the rest is nearer to 1−λ than to that. length: how many tokens ξ
    has read; None: many.
    """
    if not 0 < decay <= 0.5:
        raise InputError(f"decay: {decay}; bits of different ages overlap above 0.5 and cannot be read back one by one")
    zero, one = sigmoid(np.array([0.0, 1.0]))
    read = 1.0 if length is None else 1 - decay**length
    rest = (np.asarray(xi).astype(np.float64) - zero * read) / (one - zero)
    bits = []
    for age in range(count):
        older = decay if length is None else decay * (1 - decay ** (length - age - 1))
        bit = rest >= (older + 1 - decay) / 2
        rest = (rest - (1 - decay) * bit) / decay
        bits.append(bit)
    return np.stack(bits, -1)


def decoding_accuracy(config: CRAMConfig, count: int = 56, trials: int = 2000, seed: int = 0) -> Mapping[str, np.ndarray]:
    """Share of random bits that `decode` finds again, by dtype of ξ and age [count]. The sum itself is made in float64."""
    length = count + 8
    bits = generator(seed, "inspect.decode").integers(0, 2, (trials, length))  # newest first
    weight = (1 - config.decay) * config.decay ** np.arange(length)
    xi = sigmoid(bits.astype(np.float64)) @ weight
    names = ("float64", "float32", "float16", "bfloat16")
    return {name: (decode(xi.astype(DTYPES[name]), config.decay, count, length) == bits[:, :count]).mean(0) for name in names}
