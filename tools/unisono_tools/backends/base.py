"""What a backend offers to the training loop and to the commands. Arrays that cross this line are NumPy's."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from unisono_spec.contract import ANY, Arrays, Config, InputError, Param
from unisono_spec.contract.files import WIDE
from unisono_spec.contract.generation import Generated
from unisono_spec.contract.initial import generator
from unisono_spec.contract.sampling import Sampling


def peak_of_process() -> int:
    """The most bytes of memory that this process has held; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # no Unix
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


# an opaque running state in the backend's own arrays
Running = Any


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one gradient is computed from.

    inputs: ids [B, T], frames [B, T, F], or with `precomputed` ξ [N, code]; targets: ids [B, T] or [N], frames [B, T, F] or [N, F].
    scored: targets that count, as `targets` without F; None counts all. state: where the sequences start; None is the initial state.
    reset, valid: [B, T] as a model takes them: where a document starts, which tokens are read at all. carried: the sequences go on
    where those of the batch before ended, but where `reset` says otherwise; no gradient goes back there. groups: [B, G], which rows are
    of which corpus, whose losses are told apart.
    """

    inputs: np.ndarray
    targets: np.ndarray
    scored: np.ndarray | None = None
    state: Arrays | None = None
    precomputed: bool = False
    reset: np.ndarray | None = None
    valid: np.ndarray | None = None
    carried: bool = False
    groups: np.ndarray | None = None

    def microbatches(self, number: int) -> list[Batch]:
        """Equal parts along the first axis."""
        rows = len(self.inputs) // number

        def cut(array: np.ndarray | None, i: int) -> np.ndarray | None:
            return None if array is None else array[i * rows : (i + 1) * rows]

        return [
            Batch(
                self.inputs[i * rows : (i + 1) * rows],
                self.targets[i * rows : (i + 1) * rows],
                cut(self.scored, i),
                None if self.state is None else {name: a[i * rows : (i + 1) * rows] for name, a in self.state.items()},
                self.precomputed,
                cut(self.reset, i),
                cut(self.valid, i),
                self.carried,
                cut(self.groups, i),
            )
            for i in range(number)
        ]

    @property
    def count(self) -> int:
        """How many numbers are predicted: tokens, or pixels."""
        return max(1, int(self._counts().sum()))

    @property
    def group_counts(self) -> np.ndarray:
        """`count` of each group [G]."""
        return np.zeros(0, np.int64) if self.groups is None else self._counts() @ self.groups

    def _counts(self) -> np.ndarray:
        """How many numbers each row predicts [B]."""
        rows = self.targets.shape[: 1 if self.precomputed else 2]
        width = self.targets.size // max(1, int(np.prod(rows)))
        scored = np.ones(rows, bool) if self.scored is None else self.scored
        return width * scored.reshape(len(scored), -1).sum(1)


# Loss scaling for float16: the factor begins at SCALE, doubles after GROWTH steps in a row whose gradient is finite, and halves after one
# whose gradient is not, which is skipped; torch.amp.GradScaler's numbers.
SCALE, GROWTH, SCALE_FLOOR, SCALE_LIMIT = 2.0**16, 2000, 1.0, 2.0**24
SCALER = {"scale": ("float32",), "scale_steps": ("int64",), "skipped": ("int64",)}  # its state beside the moments, [1] each


@dataclasses.dataclass(frozen=True)
class Step:
    """loss: mean nats over the batch's targets, before the update; norm: global norm of the gradient, before clipping.

    scale: what the loss was multiplied by before its gradient was taken. skipped: a number was not finite, and nothing was updated.
    groups: nats of each of the batch's groups, summed over their targets.
    """

    loss: float
    norm: float
    scale: float = 1.0
    skipped: bool = False
    groups: tuple[float, ...] = ()

    @property
    def diverged(self) -> bool:
        """Whether no smaller scale could have helped."""
        return not math.isfinite(self.loss) or (self.skipped and self.scale <= SCALE_FLOOR)


class Pending(Protocol):
    """A step that the device has been told to take."""

    def read(self) -> Step:
        """Wait until it is done."""
        ...


class Trainer(Protocol):
    """Parameters and AdamW's moments, and what is done with them."""

    config: Config
    threads: int  # CPU threads that it computes with
    rank: int  # of this process among those that train one model; 0 writes

    @property
    def notes(self) -> list[str]:
        """What who trains should know; the loop takes it out and says it."""
        ...

    def init(self, params: Arrays, optimizer: Arrays | None = None, carried: Arrays | None = None, average: Arrays | None = None) -> None:
        """Start from these parameters, from moments as `optimizer_state` gives them (None: zeros), and from what `carried` and
        `average` give."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any of the processes."""
        ...

    def gradient(self, batch: Batch, step: int) -> tuple[Step, Arrays]:
        """Loss and gradient, without an update; for tests and hand-overs."""
        ...

    def grad_step(self, batch: Batch, step: int, lr: float) -> Pending:
        """Ask for one update with learning rate `lr`, and do not wait for it. A loss or norm that is not finite leaves parameters,
        moments and averages as they were."""
        ...

    def reader(self) -> Reader:
        """The model as it stands now, its averaged weights where there are any. All processes ask at once, the first one reads."""
        ...

    def params(self) -> Arrays:
        """Parameters by contract name. All processes ask at once, and the first one gets them; so with what follows."""
        ...

    def average(self) -> Arrays | None:
        """Parameters averaged over the steps; None where `ema` is 0."""
        ...

    def optimizer_state(self) -> Arrays:
        """`m.<param>` and `v.<param>`, AdamW's first and second moments, and `count` [1] int64, the number of updates; with float16
        also what `SCALER` names."""
        ...

    def carried(self) -> Arrays | None:
        """The state after the last batch whose sequences are carried on, [B, …]; None where there was none. All processes ask at once."""
        ...


class Reader(Protocol):
    """A model that reads tokens and predicts the next. backend: the name of what computes."""

    config: Config
    backend: str

    @property
    def tokenizer(self) -> str | None:
        """What the file itself names, as ONNX graphs do."""
        ...

    @property
    def seq_len(self) -> int | None:
        """How many tokens at once it was trained on, where the file itself says so."""
        ...

    def init_state(self, batch: int, capacity: int | None = None) -> Running:
        """capacity: the most tokens that softmax attention, where the model has any, shall read."""
        ...

    def forward(self, tokens: np.ndarray, state: Running, reset: np.ndarray | None = None) -> tuple[np.ndarray, Running]:
        """tokens [B, T] (frames [B, T, F]) → logits [B, T, V], the state after them."""
        ...

    def step(self, token: np.ndarray, state: Running) -> tuple[np.ndarray, Running]:
        """token [B] → logits [B, V], the state after it."""
        ...

    def generate(
        self,
        prompt: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling,
        state: Running = None,
        n_generated: int = 0,
        valid: Any = None,
        seen: np.ndarray | None = None,
    ) -> Generated:
        """Continue prompt [B, T], as contract/generation.py says; the ids that follow and where to go on from."""
        ...

    def to_numpy(self, state: Running) -> Arrays:
        """A running state as files hold it."""
        ...

    def from_numpy(self, arrays: Arrays) -> Running:
        """The inverse; the arrays may come from any backend."""
        ...


def caches(config: Config) -> bool:
    """Whether the model keeps every token that it reads, as softmax attention does: its state needs a capacity."""
    return any(ANY in state.shape for state in config.states().values())


def trained(config: Config) -> list[str]:
    """The parameters that gradients move; the others are buffers with a rule of their own."""
    return [name for name, p in config.params().items() if p.trainable]


def router_noise(config: Config, seed: int, step: int, microbatch: int, shape: tuple[int, ...]) -> list[np.ndarray] | None:
    """Gumbel noise [*shape, banks] a layer, float32, from (seed, step, microbatch, layer): the same for every backend."""
    drawn = [generator(seed, f"noise.{step}.{microbatch}.{i}").gumbel(size=(*shape, n)) for i, n in enumerate(config.noise_widths)]
    return [a.astype(np.float32) for a in drawn] or None


def decays(config: Config, weight_decay: float) -> dict[str, float]:
    """AdamW's decay of each parameter: `weight_decay` where the contract says so, else none."""
    return {name: weight_decay if p.weight_decay else 0.0 for name, p in config.params().items() if p.trainable}


def dropout_seeds(config: Config, seed: int, step: int, microbatch: int) -> np.ndarray:
    """One seed a layer [L] uint32, from (seed, step, microbatch, layer)."""
    layers = range(config.n_updates)
    seeds = [generator(seed, f"dropout.{step}.{microbatch}.{layer}").integers(2**32, dtype=np.uint32) for layer in layers]
    return np.array(seeds, np.uint32)


def ema_share(decay: float, step: int) -> float:
    """How far step `step` moves an exponential moving average: less by and by, so that initial weights do not weigh on it."""
    return 1 - min(decay, (1 + step) / (10 + step))


def check_moments(config: Config, optimizer: Mapping[str, Any], source: str = "optimizer state") -> None:
    """Raise InputError unless `optimizer` holds the moments of exactly the parameters of `config` that are trained."""
    shapes: dict[str, Param] = config.params()
    expected = {f"{kind}.{name}": shapes[name].shape for kind in ("m", "v") for name in trained(config)} | {"count": (1,)}
    if SCALER.keys() & optimizer.keys():
        expected |= dict.fromkeys(SCALER, (1,))
    for name in expected.keys() | optimizer.keys():
        found = optimizer[name].shape if name in optimizer else None
        if name not in expected or found != expected[name]:
            raise InputError(
                f"{source}: {name} has shape {found}, expected {expected.get(name)}; use the optimizer.safetensors of the same checkpoint"
            )
        dtype, fitting = str(optimizer[name].dtype), {"count": ("int64",), **SCALER}.get(name, WIDE)
        if dtype not in fitting:
            raise InputError(f"{source}: {name} has dtype {dtype}, expected {' or '.join(fitting)}; restore the file")


def check_updates(optimizer: Arrays, source: str) -> None:
    """Raise InputError where a second moment is negative, or where the number of updates is none."""
    for name, array in optimizer.items():
        if name.startswith("v.") and array.size and array.min() < 0:
            raise InputError(f"{source}: {name} is negative; second moments are means of squares: restore the file")
    for name in ("count", "scale_steps", "skipped"):
        if name in optimizer and not 0 <= optimizer[name][0] < 2**31:
            raise InputError(f"{source}: {name} is {optimizer[name][0]}; it is a number of steps so far: restore the file")
    if "scale" in optimizer and not SCALE_FLOOR <= optimizer["scale"][0] <= SCALE_LIMIT:
        raise InputError(f"{source}: scale is {optimizer['scale'][0]}; it lies in [{SCALE_FLOOR:g}, {SCALE_LIMIT:g}]: restore the file")


def steps_taken(optimizer: Arrays) -> int:
    """Updates and skipped steps."""
    return int(optimizer["count"][0]) + int(optimizer["skipped"][0] if "skipped" in optimizer else 0)
