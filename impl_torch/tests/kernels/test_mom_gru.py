"""The kernels of MoM-GRU's loop against plain operations in float64: values, all gradients, every variant, marks, bits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import unisono_torch
from torch import Tensor
from unisono_conformance import judge, numerics
from unisono_spec.contract.maru import MARUConfig
from unisono_torch.kernels.mom_gru import backward, forward, loop, operator
from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops import mom_gru
from unisono_torch.ops.mom_gru_loop import Sizes, Weights

from .together import together


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    width: int
    banks: int
    slots: int
    memory: int
    hidden: int
    erase: str = "coupled"
    drawn: bool = False
    marked: bool = False
    programs: int = 1  # in the interpreter, of Triton's kernels

    def __str__(self) -> str:
        kinds = "".join(f"-{name}" for name in ("drawn", "marked") if getattr(self, name))
        return f"{self.batch}x{self.length}x{self.width}-{self.banks}x{self.slots}x{self.memory}-{self.hidden}-{self.erase}{kinds}"


CASES = [
    Case(2, 6, 11, 2, 5, 6, 7, "separate", drawn=True, marked=True, programs=3),
    Case(17, 2, 10, 1, 2, 9, 2, marked=True),
    Case(1, 2, 3, 3, 1, 1, 5),
]
ON_GPU = [
    Case(16, 70, 640, 4, 128, 64, 32),
    Case(3, 67, 640, 4, 128, 64, 32, "separate", drawn=True, marked=True),
    Case(64, 20, 144, 4, 64, 32, 32, marked=True),
    Case(40, 34, 100, 6, 256, 128, 32, marked=True),
    Case(1, 40, 640, 4, 128, 64, 32, marked=True),
    Case(2, 33, 77, 5, 31, 23, 19, "separate", drawn=True),
    Case(10, 35, 333, 3, 100, 50, 20, "separate", drawn=True, marked=True),
    Case(64, 12, 640, 4, 128, 64, 32, drawn=True),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames and "one_by_one" not in metafunc.function.__name__:
        metafunc.parametrize("case", CASES if interpreted() else CASES + ON_GPU, ids=str)


@pytest.fixture(autouse=True)
def _few(request, monkeypatch) -> None:
    """Tokens of a test are few: of a launch, too. And programs of a case that has several wait for each other."""
    if not interpreted():
        return
    monkeypatch.setattr(operator, "LONGEST", 4)
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case and case.programs > 1:
        together(monkeypatch)
        monkeypatch.setattr(operator, "SEGMENT", 4)
        monkeypatch.setattr(operator, "interpreted", lambda: False)
        monkeypatch.setattr(operator, "_multiprocessors", lambda device: case.programs)
        for module in (forward, backward):
            monkeypatch.setattr(module, "fetch", lambda p, programs: None)


def inputs(case: Case, device: str) -> tuple[list[Tensor], list[Tensor | None], Sizes]:
    """h, M, x, noise and the weights in float64; marks [T, B]; the router may be off."""
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(device)

    b, t, d, n = case.batch, case.length, case.width, case.banks
    config = MARUConfig(vocab_size=3, head_hidden=2, d_state=1, expand=1, d_model=d, n_banks=n, router_hidden=case.hidden)
    config = config.replace(n_slots=case.slots, d_memory=case.memory, erase=case.erase)
    of_cell = unisono_torch.create(config, dtype="float64").get_submodule("layers.0.cell").named_parameters()
    named = {name: p.detach().to(device) for name, p in of_cell}
    named = {name: p + 0.3 * normal(*p.shape) if p.ndim == 1 else p for name, p in named.items()}
    x, weights = mom_gru.prepared(normal(b, t, d), named, None)
    memory = normal(b, n * case.slots, case.memory)
    marks = [torch.rand(t, b, generator=made).to(device) < share if case.marked else None for share in (0.2, 0.8)]
    return [normal(b, d), memory, x.transpose(0, 1), normal(t, b, n), *weights], marks, Sizes(n, case.slots, 0.7 if case.drawn else 1.0)


def differentiate(function, given: list[Tensor], marks, sizes: Sizes, drawn: bool) -> list[Tensor]:
    leaves = [a.detach().requires_grad_() for a in given]
    h, M, x, noise, *weights = leaves
    outputs = function(h, M, x, *marks, noise if drawn else None, sizes, Weights._make(weights))
    made = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=made, dtype=torch.float64).to(o) for o in outputs]
    wanted = [a for a in leaves if drawn or a is not noise]
    gradients = torch.autograd.grad(outputs, wanted, upstream, materialize_grads=True, allow_unused=True)
    return [a.detach() for a in (*outputs, *gradients)]


def folded(h, M, x, reset, valid, noise, sizes, weights) -> tuple[Tensor, Tensor]:
    from unisono_torch.ops.mom_gru_loop import plain

    return plain(h, M, x, reset, valid, noise, sizes, *weights)


def test_values_and_gradients(case: Case, device: str) -> None:
    given, marks, sizes = inputs(case, device)
    want = differentiate(folded, given, marks, sizes, case.drawn)
    if interpreted():  # which knows float64
        judge.same(differentiate(loop, given, marks, sizes, case.drawn), want)
        return
    got = differentiate(loop, [a.float() for a in given], marks, sizes, case.drawn)
    errors = []
    for seed in range(4):  # plain operations in float32, whose operands err as those of the kernels' products do
        made = torch.Generator().manual_seed(seed)
        moved = [a * (1 + OPERANDS * (2 * torch.rand(a.shape, generator=made, dtype=a.dtype).to(a.device) - 1)) for a in given]
        found = differentiate(folded, [a.float() for a in moved], marks, sizes, case.drawn)
        errors.append([float((a - b).norm()) for a, b in zip(found, want, strict=True)])
    sizes_of = np.array([[float(b.norm())] for b in want])  # each array is one row
    limits = numerics.row_budget(sizes_of, np.array(errors)[..., None], "float32", case.length * case.batch, gradient=True)
    for a, b, limit in zip(got, want, limits[:, 0], strict=True):
        assert (a - b).norm() <= limit


OPERANDS = numerics.rounding("float32", 4)  # a product of three in tf32 keeps 22 bits of each


def test_without_gradients_in_pieces_and_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, marks, sizes = inputs(Case(2, 4, 4, 2, 3, 2, 3, "separate", drawn=True, marked=True), device)
    h, M, x, noise, *weights = [a.float() for a in given]
    reset, valid = marks
    whole, last = loop(h, M, x, reset, valid, noise, sizes, Weights._make(weights))
    outs = []
    monkeypatch.setattr(operator, "LONGEST", 2)
    for part in (slice(0, 1), slice(1, 4)):
        some = (None if m is None else m[part] for m in (reset, valid))
        out, M = loop(h, M, x[part], next(some), next(some), noise[part], sizes, Weights._make(weights))
        h = out[-1]
        outs.append(out)
    # the products with x are of other numbers of rows
    limit = numerics.rounding("float32", 2**8)
    judge.same([a.cpu() for a in (torch.cat(outs), M)], [a.cpu() for a in (whole, last)], limit=limit)


def test_the_same_bits_twice(device: str) -> None:
    case = CASES[2] if interpreted() else ON_GPU[1]
    given, marks, sizes = inputs(case, device)
    given = [a.float() for a in given]
    first, second = (differentiate(loop, given, marks, sizes, case.drawn) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_reset_cuts_nan(device: str) -> None:
    case = Case(1, 5, 4, 1, 3, 2, 3)
    given, _, sizes = inputs(case, device)
    h, M, x, _, *weights = (a.float() for a in given)
    x = x.contiguous()
    x[1] = torch.nan
    reset = torch.arange(5, device=device)[:, None] == 3
    out, last = loop(h, M, x, reset, None, None, sizes, Weights._make(weights))
    assert torch.isfinite(out[:1]).all()
    assert torch.isnan(out[1:3]).all()
    assert torch.isfinite(out[3:]).all()
    assert torch.isfinite(last).all()


def test_where_nothing_is_valid_no_weight_has_a_gradient(device: str) -> None:
    given, _, sizes = inputs(Case(2, 2, 4, 2, 3, 2, 3, "separate"), device)
    h, M, x, _, *weights = (a.float().requires_grad_() for a in given)
    out, last = loop(h, M, x, None, torch.zeros(2, 2, dtype=torch.bool, device=device), None, sizes, Weights._make(weights))
    *none, of_h, of_M = torch.autograd.grad(out.sum() + last.sum(), [x, *weights, h, M])
    assert not any(a.any() for a in none)
    assert (of_h == 2).all()
    assert (of_M == 1).all()


def test_one_gradient_is_that_of_all(device: str) -> None:
    given, _, sizes = inputs(Case(1, 1, 2, 1, 2, 1, 2), device)
    given = [a.float() for a in given]
    _, _, *whole = differentiate(loop, given, (None, None), sizes, True)
    for i in (0, 1, 3, 13):  # h, M, noise and M₀
        leaf = given[i].clone().requires_grad_()
        h, M, x, noise, *weights = *given[:i], leaf, *given[i + 1 :]
        out, last = loop(h, M, x, None, None, noise, sizes, Weights._make(weights))
        made = torch.Generator().manual_seed(1)
        upstream = [torch.randn(o.shape, generator=made, dtype=torch.float64).to(o) for o in (out, last)]
        (alone,) = torch.autograd.grad((out, last), leaf, upstream)
        assert torch.equal(alone, whole[i]), i


def test_second_derivatives_are_those_of_plain_operations(device: str) -> None:
    given, _, sizes = inputs(Case(1, 2, 2, 1, 2, 1, 2), device)
    found = []
    for function in (loop, folded):
        h, M, x, _, *weights = (a.float().requires_grad_() for a in given)
        out = function(h, M, x, None, None, None, sizes, Weights._make(weights))[0]
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        wanted = h, x, *weights
        again = torch.autograd.grad(slope.square().sum(), wanted, materialize_grads=True, allow_unused=True)
        found.append([a.detach().cpu() for a in again])
    judge.same(*found, limit=numerics.rounding("float32", 2**8))


def test_the_op_takes_the_kernel(device: str) -> None:
    config = MARUConfig(d_model=8, vocab_size=11, head_hidden=5, d_state=3, n_banks=2, n_slots=3, d_memory=4, router_hidden=5)
    tokens = torch.arange(2, device=device)[None]
    found = []
    for how in ("triton", "plain"):
        model = unisono_torch.create(config, seed=2, device=device, implementation=how)
        logits, state = model(tokens)
        logits.sum().backward()
        found.append([a.detach().cpu() for a in (logits, *state.values(), *(p.grad for p in model.parameters() if p.grad is not None))])
    judge.same(*found, limit=numerics.rounding("float32", 2**10))


DECODED = [Case(2, 5, 11, 2, 5, 6, 7, programs=3)]
DECODED_ON_GPU = [Case(batch, 5, 640, 4, 128, 64, 32) for batch in (1, 3, 16, 64, 256)]


def decoded(case: Case, dtype: torch.dtype, device: str) -> None:
    """Token by token on buffers that stay: what `loop` makes of all, h' in place of h, and on a residual."""
    given, _, sizes = inputs(case, device)
    h, M, x, _, *weights = (a.float() for a in given)
    weights = Weights._make(weights)
    with torch.no_grad():
        true, last = loop(h, M, x, None, None, None, sizes, weights)
        both, M, room = torch.stack([h, h]), M.clone(), operator.Room(h.device)
        for t, token in enumerate(x):
            residual = None if t % 2 else (10 * token[:, :1] + h).to(dtype)
            products = torch.addmm(weights.x_bias, token, weights.x.mT)
            out = operator.advance(both, M, products, sizes, weights, residual, dtype, room)
            judge.same(both[0].cpu(), true[t].cpu(), numerics.rounding("float32", 2**12))
            settled = both[0].to(dtype) if residual is None else both[0].to(dtype).float().add(residual.float()).to(dtype)
            assert torch.equal(out, settled)
        judge.same(M.cpu(), last.cpu(), numerics.rounding("float32", 2**12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", DECODED if interpreted() else DECODED_ON_GPU, ids=str)
def test_tokens_one_by_one(case: Case, dtype: torch.dtype, device: str) -> None:
    decoded(case, dtype, device)
