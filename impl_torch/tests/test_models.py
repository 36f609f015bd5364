"""CRAM as a model: the four verbs, variants, states, dtypes, files, compilation, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import unisono_torch
from torch import Tensor
from unisono_conformance import judge, numerics
from unisono_spec.contract import DTYPES, count_params
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.sampling import Sampling
from unisono_torch import InputError
from unisono_torch.models.base import Model
from unisono_torch.models.cram import CRAM
from unisono_torch.ops import decayed_sum

FIXED = CRAMConfig(d_model=8, n_layers=2, vocab_size=50)
ADAPTIVE = CRAMConfig(scheme="adaptive", d_model=8, n_layers=2, vocab_size=50, position_bits=6)
VARIANTS = {
    "fixed": FIXED,
    "embedding": FIXED.replace(codes="embedding", tie_head=True, head_bias=True, decay=0.9),
    "bernoulli": FIXED.replace(codes="frame", frame_size=3),
    "gaussian": FIXED.replace(codes="frame", frame_size=3, frame_head="gaussian"),
    "adaptive": ADAPTIVE,
    "tied": ADAPTIVE.replace(tie_head=True),
    "exclusive": ADAPTIVE.replace(n_layers=1, exclusive=True),
    "after": ADAPTIVE.replace(residual="after", k_scale=1.0),
    "input_norm": ADAPTIVE.replace(input_norm=True, head_bias=True),
}
BOTH = pytest.mark.parametrize("config", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
ALL = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def tokens(config: CRAMConfig, length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    if config.reads_frames:
        return torch.randn(batch, length, config.frame_size, generator=generator, dtype=torch.float64)
    return torch.randint(0, config.vocab_size, (batch, length), generator=generator)


def marks(length: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length + 1)
    return torch.rand(batch, length, generator=generator) < 0.1, torch.rand(batch, length, generator=generator) < 0.7


def create(config: CRAMConfig, dtype: str = "float64", **options: Any) -> CRAM:
    model = unisono_torch.create(config, seed=3, dtype=dtype, **options)
    assert isinstance(model, CRAM)
    return model


@ALL
def test_parameters_are_the_contract_s(config: CRAMConfig) -> None:
    model = create(config)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == {name: p.shape for name, p in config.params().items()}
    assert list(model.state_dict()) == list(config.params())
    assert sum(p.numel() for p in model.parameters()) == count_params(config)
    assert all(p.requires_grad for p in model.parameters())


@ALL
def test_forms_and_steps_agree_across_a_handed_over_state(config: CRAMConfig) -> None:
    model, given = create(config), tokens(config, 20)
    reset, valid = marks(20)
    parallel, end = model.forward(given, reset=reset, valid=valid, chunk_size=4)
    recurrent, _ = model.forward(given, reset=reset, valid=valid, form="recurrent")
    judge.same(parallel, recurrent)
    first, state = model.forward(given[:, :7], None, reset[:, :7], valid[:, :7])
    second, state = model.forward(given[:, 7:19], state, reset[:, 7:19], valid[:, 7:19])
    third, state = model.step(given[:, 19], state, reset[:, 19], valid[:, 19])
    judge.same(torch.cat([first, second, third[:, None]], 1), parallel)
    assert list(state) == list(config.states())
    for name in state:
        judge.same(state[name], end[name])


@ALL
def test_dropout_masks_multiply_each_update_in_both_forms(config: CRAMConfig) -> None:
    model, given = create(config), tokens(config, 12)
    generator = torch.Generator().manual_seed(0)
    masks = [(torch.rand(2, 12, config.d_model, generator=generator) < 0.5) * 2.0 for _ in range(config.n_layers)]
    parallel, _ = model.forward(given, dropout=masks)
    judge.same(parallel, model.forward(given, form="recurrent", dropout=masks)[0])
    assert judge.differ(parallel, model.forward(given)[0])


@ALL
def test_every_parameter_and_state_has_a_gradient_and_it_is_the_same_in_both_forms(config: CRAMConfig) -> None:
    model, given = create(config), tokens(config, 12)
    state = {name: a + 1 for name, a in model.init_state(2).items()}
    for a in state.values():
        if a.is_floating_point():
            a.requires_grad_()
    leaves = [*model.parameters(), *(a for a in state.values() if a.requires_grad)]
    gradients = []
    for form in ("parallel", "recurrent"):
        logits, end = model.forward(given, state, *marks(12), form=form)
        loss = logits.square().sum() + sum(a.square().sum() for a in end.values())
        gradients.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*gradients, strict=True):
        assert a.any()
        judge.same(a, b)


@BOTH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("param_dtype", [None, "bfloat16"])
def test_dtypes(config: CRAMConfig, dtype: str, param_dtype: str | None) -> None:
    model = unisono_torch.create(config, dtype=dtype, param_dtype=param_dtype)
    wide = torch.float64 if dtype == "float64" else torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if param_dtype else wide}
    for form in ("parallel", "recurrent"):
        logits, state = model.forward(tokens(config, 9), form=form)
        assert logits.dtype == getattr(torch, dtype)
        assert logits.isfinite().all()
        for name, a in state.items():
            assert a.dtype == (torch.int32 if config.states()[name].integer else wide)


def test_a_sum_beyond_float16_stays_finite_through_its_norm() -> None:
    for residual in ("before", "after"):
        model = create(ADAPTIVE.replace(residual=residual), "float16")
        state = {name: a + (1e6 if a.is_floating_point() else 0) for name, a in model.init_state(2).items()}
        logits, state = model.forward(tokens(ADAPTIVE, 5), state)
        assert logits.isfinite().all()
        assert state["layers.0.xi"].min() > 1e5


@pytest.mark.parametrize("changes", [{}, {"residual": "after"}, {"learned_decay": True, "skip": True}])
def test_a_sum_whose_squares_float32_does_not_hold(changes: dict[str, Any]) -> None:
    """A norm of them was NaN in 10M parameters with `skip` after 217 steps."""
    config = ADAPTIVE.replace(**changes)
    ids, drawn = tokens(config, 5), np.random.default_rng(0)
    sums = [name for name in config.states() if name.endswith(".xi")]
    state = {name: 1e25 * torch.tensor(drawn.normal(size=(2, config.d_model))) for name in sums}
    found = []
    for dtype in ("float32", "float64"):
        model = create(config, dtype)
        start = {name: state[name].to(a.dtype) if name in state else a for name, a in model.init_state(2).items()}
        logits, after = model.forward(ids, start)
        (slope,) = torch.autograd.grad(logits.square().sum(), model.get_parameter("layers.0.norm.weight"))
        found.append((logits.double(), slope.double(), *(after[name].double() / 1e25 for name in state)))
    judge.same(found[0], found[1], numerics.formula("float32", 200))


def test_what_is_not_valid_may_be_nan() -> None:
    config = VARIANTS["gaussian"]
    model, given = create(config), tokens(config, 15)
    reset, valid = marks(15)
    logits, state = model.forward(given, reset=reset, valid=valid)
    poisoned = given.masked_fill(~valid[..., None], float("nan")).requires_grad_()
    for form in ("parallel", "recurrent"):
        found, end = model.forward(poisoned, reset=reset, valid=valid, form=form)
        judge.same(found, logits)
        judge.same(end["xi"], state["xi"])
        (gradient,) = torch.autograd.grad(found.sum(), poisoned)
        assert gradient.isfinite().all()
        assert not gradient[~valid].any()


@pytest.mark.parametrize("config", [FIXED, VARIANTS["tied"]], ids=["fixed", "adaptive"])
def test_generate_is_repeated_forward(config: CRAMConfig) -> None:
    model, prompt = create(config), tokens(config, 6)
    generated = model.generate(prompt.numpy(), 5)
    text = prompt
    for _ in range(5):
        text = torch.cat([text, model.forward(text)[0][:, -1:].argmax(-1)], 1)
    assert np.array_equal(generated.tokens, text[:, 6:].numpy())
    assert generated.near_ties.shape == (2, 5)
    sampled = Sampling(temperature=1.0, seed=4)
    assert np.array_equal(model.generate(prompt, 9, sampled).tokens, model.generate(prompt, 9, sampled).tokens)
    assert create(config, "bfloat16").generate(prompt, 0).tokens.shape == (2, 0)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_saved_model_and_state_come_back_to_the_bit(tmp_path: Path, param_dtype: str) -> None:
    model = unisono_torch.create(ADAPTIVE, seed=5, param_dtype=param_dtype)
    model.save(tmp_path / "model.safetensors")
    again = unisono_torch.load(tmp_path / "model.safetensors", param_dtype=param_dtype)
    given = tokens(ADAPTIVE, 11)
    logits, state = model.forward(given)
    assert again.config == ADAPTIVE
    assert torch.equal(again.forward(given)[0], logits)
    arrays = unisono_torch.numpy_state(state)
    assert all(isinstance(a, np.ndarray) for a in arrays.values())
    back = unisono_torch.state_from_numpy(arrays)
    assert all(torch.equal(back[name], state[name]) for name in state)
    params = unisono_torch.numpy_params(model)
    assert {a.dtype for a in params.values()} == {DTYPES[param_dtype]}


def test_an_empty_batch_gives_an_empty_batch() -> None:
    for config in VARIANTS.values():
        for form in ("parallel", "recurrent"):
            logits, state = create(config).forward(tokens(config, 4, batch=0), form=form)
            assert logits.shape == (0, 4, config.output_size)
            assert all(len(a) == 0 for a in state.values())


@BOTH
def test_one_compiled_graph_serves_all_lengths_of_two_chunks_or_more(config: CRAMConfig) -> None:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = create(config)
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=True)
    for length in (150, 70):
        found, state = compiled(tokens(config, length), None, *marks(length))
        logits, end = model.forward(tokens(config, length), None, *marks(length))
        judge.same(found, logits)
        judge.same(state, end)
    assert len(graphs) == 1


def test_algorithm_1_reads_out_a_precomputed_sum() -> None:
    model, given = create(FIXED), tokens(FIXED, 9)
    xi, _ = decayed_sum.parallel(model.code(given), FIXED.decay, model.init_state(2)["xi"])
    judge.same(model.readout(xi), model.forward(given)[0])
    with pytest.raises(InputError, match="adaptive"):
        create(ADAPTIVE).readout(xi)


def test_bad_input_is_named_with_a_remedy() -> None:
    model, ids = create(FIXED), tokens(FIXED, 4)
    for message, call in {
        "id 50 is outside the vocabulary": lambda: model.forward(ids * 0 + 50),
        "id -1 is outside": lambda: model.step(ids[:, 0] * 0 - 1, model.init_state(2)),
        "T is 0": lambda: model.forward(ids[:, :0]),
        "give a torch.Tensor": lambda: model.forward([[1, 2]]),  # pyright: ignore[reportArgumentType]
        "reset: shape": lambda: model.forward(ids, reset=torch.zeros(2, 3, dtype=torch.bool)),
        "valid: shape .* of torch.float32": lambda: model.forward(ids, valid=torch.ones(2, 4)),
        "state: 'xi' is missing": lambda: model.forward(ids, {}),
        "state: xi has shape": lambda: model.forward(ids, model.init_state(3)),
        "form: 'serial' is unknown": lambda: model.forward(ids, form="serial"),  # pyright: ignore[reportArgumentType]
        "chunk_size: 0": lambda: model.forward(ids, chunk_size=0),
        "noise: this config has no noisy router": lambda: model.forward(ids, noise=[]),
        "dtype: 'float8' is not supported": lambda: unisono_torch.create(FIXED, dtype="float8"),
        "device: 'cude' cannot be used": lambda: unisono_torch.create(FIXED, device="cude"),
        "implementation: 'pallas' is unknown in PyTorch": lambda: unisono_torch.create(FIXED, implementation="pallas"),
        "'head.weight' is missing": _without_head,
        "a frame model predicts": lambda: create(VARIANTS["gaussian"]).generate(ids, 1),
    }.items():
        with pytest.raises(InputError, match=message):
            call()


def _without_head() -> Model:
    params = unisono_torch.numpy_params(create(FIXED))
    del params["head.weight"]
    return unisono_torch.create(FIXED, params)
