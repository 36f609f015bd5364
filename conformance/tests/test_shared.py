"""What every room takes from one place, so that no room would disagree with another if it were wrong: written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from unisono_conformance import judge, numerics
from unisono_spec import create
from unisono_spec.contract import init_params
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.maru import MARUConfig
from unisono_spec.contract.sampling import Sampling, choose
from unisono_spec.contract.transformer import TransformerConfig
from unisono_spec.layers.lat import to_heads
from unisono_spec.ops import mom_gru
from unisono_tools.config import Optimizer

SEED, V = 11, 64


def uniform(row: int, n_generated: int) -> float:
    """The number that decides: Philox with the seed and, in one word, the row above how many ids were generated before."""
    return np.random.Generator(np.random.Philox(key=np.array([SEED, row * 2**32 + n_generated], np.uint64))).random()


def test_a_draw_is_keyed_by_seed_row_and_number_generated() -> None:
    logits = np.tile(np.log(np.arange(1.0, 6)), (4, 1))  # shares of 1 to 5 fifteenths; the best first: ids 4, 3, 2, 1, 0
    for n in (0, 1, 7):
        ids, _ = choose(logits, Sampling(temperature=1.0, seed=SEED), n)
        cuts = np.cumsum([5, 4, 3, 2, 1]) / 15
        assert ids.tolist() == [4 - int((cuts <= uniform(row, n)).sum()) for row in range(4)]


@pytest.mark.parametrize("top_k", [1, 5, 20])
def test_of_equal_logits_the_lowest_ids_are_kept_and_come_first(top_k: int) -> None:
    """More of them than a sort that is not stable would leave in their order."""
    logits = np.zeros((3, V))
    logits[:, 1::2] = 1.0
    for n in range(40):
        ids, _ = choose(logits, Sampling(temperature=1.0, top_k=top_k, seed=SEED), n)
        assert ids.tolist() == [1 + 2 * int(uniform(row, n) * top_k) for row in range(3)]


def test_generation_counts_what_it_generated_and_not_the_prompt() -> None:
    config = CRAMConfig(d_model=4, n_layers=1, vocab_size=V)
    model = create(config, {name: np.zeros_like(p) for name, p in init_params(config, 0, "float64").items()}, dtype="float64")
    wanted = [[int(uniform(row, n) * V) for n in range(6)] for row in range(2)]
    for length in (1, 5):
        prompt = np.ones((2, length), np.int64)
        found = model.generate(prompt, 6, Sampling(temperature=1.0, seed=SEED))
        assert found.tokens.tolist() == wanted
        begun = model.generate(prompt, 2, Sampling(temperature=1.0, seed=SEED))
        rest = model.generate(begun.tokens[:, -1:], 4, Sampling(temperature=1.0, seed=SEED), begun.state, n_generated=begun.n_generated)
        assert np.concatenate([begun.tokens, rest.tokens], 1).tolist() == wanted


def test_rope_turns_the_second_pair_by_a_hundredth() -> None:
    """Base 10000 over four components: angles p and p / 100, of every config that says nothing else, in LAT's own layer."""
    assert {config().rope_base for config in (LATConfig, TransformerConfig, InfinityFormerConfig)} == {10_000.0}
    random = np.random.default_rng(0)
    config = LATConfig(d_model=8, n_layers=1, head_width=4, qk_width=4, attention=("window",), positions="rope", vocab_size=7)
    p = {n.removeprefix("layers.0."): a + random.normal(size=a.shape) for n, a in init_params(config, 0, "float64").items()}
    position = np.array([0, 1, 2, 5])
    x = np.tile(random.normal(size=(1, 1, 8)), (1, len(position), 1))
    q, k, _ = to_heads(p, config, "window", x, position[None], lambda a: a)
    for a in (q, k):
        z = a[0, ..., :2] + 1j * a[0, ..., 2:]  # [T, H, 2]
        turned = np.exp(1j * (position[:, None, None] * np.array([1, 0.01]))) * z[0]
        for part in (np.real, np.imag):
            judge.within(part(z), part(turned), numerics.OTHER_MACHINE * numerics.formula("float64", 2) * np.abs(z))


def test_temperature_divides_logits_bias_and_noise_alike() -> None:
    config = MARUConfig(d_model=4, n_layers=1, prenorm=True, router="gumbel", temperature=0.5, n_banks=3, vocab_size=5)
    random = np.random.default_rng(0)
    p = {n.removeprefix("layers.0.cell."): a + random.normal(size=a.shape) for n, a in init_params(config, 0, "float64").items()}
    x, h = random.normal(size=(2, 2, p["router.0.weight"].shape[1] // 2))
    noise = random.gumbel(size=(2, 3))
    hidden = np.maximum(np.concatenate([x, h], -1) @ p["router.0.weight"].T + p["router.0.bias"], 0)
    logits = hidden @ p["router.1.weight"].T + p["router.1.bias"]
    e = np.exp(2 * (logits + p["balance_bias"] + noise))
    wanted = e / e.sum(-1, keepdims=True)
    found = mom_gru.routing(x, h, p, noise, config.temperature)
    judge.within(found, wanted, numerics.OTHER_MACHINE * numerics.formula("float64", hidden.shape[-1]) * wanted)


def test_defaults_are_the_sources() -> None:
    assert InfinityFormerConfig().dropout == 0.1
    opt = Optimizer()
    assert (opt.beta1, opt.beta2, opt.weight_decay) == (0.9, 0.95, 0.1)
