"""What the tests of the architectures share: models far from their initial values, marks, and the comparison of forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import unisono_torch
from torch import Tensor
from unisono_conformance import judge
from unisono_spec.contract import Config
from unisono_torch.models.base import Model, State

VOCABULARY = 11


def create(config: Config, dtype: str = "float64") -> Model:
    model = unisono_torch.create(config, seed=3, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return model


def tokens(length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))


def marks(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length + 1)
    return torch.rand(2, length, generator=generator) < 0.15, torch.rand(2, length, generator=generator) < 0.7


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_forms(config: Config, marked: bool, length: int = 20) -> None:
    """The parallel form at several chunk sizes, and pieces with a state handed over, against the fold of `step`."""
    model, given = create(config), tokens(length)
    reset, valid = marks(length) if marked else (None, None)

    def part(a: int, b: int) -> tuple[Tensor | None, Tensor | None]:
        return None if reset is None else reset[:, a:b], None if valid is None else valid[:, a:b]

    start = model.init_state(2, 3 * length)
    truth, end = model.forward(given, start, reset, valid, form="recurrent")
    for chunk_size in (1, 3, 64):
        found, state = model.forward(given, start, reset, valid, chunk_size=chunk_size)
        judge.same(found, truth)
        judge.same(state, end)
    first, state = model.forward(given[:, :7], start, *part(0, 7), chunk_size=4)
    second, state = model.forward(given[:, 7:-1], state, *part(7, length - 1), chunk_size=4)
    last, state = model.step(given[:, -1], state, *(None if m is None else m[:, -1] for m in (reset, valid)))
    judge.same(torch.cat([first, second, last[:, None]], 1), truth)
    judge.same(state, end)


def midway(model: Model, length: int = 5, capacity: int = 20) -> State:
    """A state after some tokens, whose floats are leaves."""
    _, state = model.forward(tokens(length), model.init_state(2, capacity))
    return {name: a.detach().requires_grad_() if a.is_floating_point() else a for name, a in state.items()}


def gradients(model: Model, state: State, form: str, **how) -> dict[str, Tensor]:
    """Of every parameter and initial state."""
    leaves = {**dict(model.named_parameters()), **{name: a for name, a in state.items() if a.requires_grad}}
    logits, end = model.forward(tokens(12), state, *marks(12), form=form, **how)  # pyright: ignore[reportArgumentType]
    loss = logits.square().sum() + sum(a.square().sum() for a in end.values() if a.is_floating_point())
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def check_gradients(config: Config) -> None:
    model = create(config)
    state = midway(model)
    judge.same(gradients(model, state, "parallel", chunk_size=4), gradients(model, state, "recurrent"))


def check_dtypes(config: Config, dtype: str) -> None:
    model = create(config, dtype)
    for form in ("parallel", "recurrent"):
        logits, state = model.forward(tokens(9), form=form)  # pyright: ignore[reportArgumentType]
        assert logits.dtype == getattr(torch, dtype)
        assert logits.isfinite().all()
        for name, a in state.items():
            assert a.dtype == (torch.int32 if config.states(9)[name].integer else torch.float32)


Run = Callable[..., tuple[Tensor, Tensor | tuple[Tensor, ...]]]  # an op of its float inputs and `form`, marks included


def check_derivatives(run: Run, given: Sequence[Tensor], **how) -> None:
    def op(*given: Tensor) -> tuple[Tensor, ...]:
        o, state = run("parallel", *given, **how)
        return o, *(state if isinstance(state, tuple) else (state,))

    assert torch.autograd.gradcheck(op, [a.clone().requires_grad_() for a in given], fast_mode=True)


def check_poison(run: Run, form: str, given: Sequence[Tensor], sequences: int, valid: Tensor, **how) -> None:
    """The first `sequences` of `given` are [B, T, …]: what they hold where not valid reaches neither outputs nor gradients."""
    clean = run(form, *given, **how)
    spots = [~valid.reshape(*valid.shape, *(1,) * (a.ndim - 2)) for a in given[:sequences]]
    poisoned = [a.masked_fill(spot, float("nan")).requires_grad_() for a, spot in zip(given, spots, strict=False)]
    found = run(form, *poisoned, *given[sequences:], **how)
    judge.same(found, clean, 0)
    states = found[1] if isinstance(found[1], tuple) else (found[1],)
    for gradient in torch.autograd.grad(found[0].sum() + sum(a.sum() for a in states), poisoned):
        assert gradient.isfinite().all()
        assert not gradient[~valid].any()


def saved_bytes(config: Config, length: int, chunk_size: int = 64) -> int:
    """What the backward of one marked forward pass keeps."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    model = create(config)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.forward(tokens(length), None, *marks(length), chunk_size=chunk_size)
    return sum(sizes.values())
