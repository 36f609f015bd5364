"""Arguments of the wrong kind, in NumPy."""

from __future__ import annotations

import bad_arguments
import numpy as np
import pytest
import unisono_spec
from unisono_spec.contract import InputError, init_params
from unisono_spec.contract.files import save_params
from unisono_spec.contract.layer import starts
from unisono_spec.contract.sampling import Sampling
from unisono_spec.ops import decayed_sum

ROOM = bad_arguments.Room("spec", unisono_spec, lambda a: a)


@pytest.mark.parametrize("name", bad_arguments.MODELS)
def test_every_argument_of_every_verb(name):
    assert bad_arguments.check(ROOM, bad_arguments.MODELS[name]) > 1000


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_arrays_with_rules_of_their_own(tmp_path):
    """Masked arrays, whose mask nobody would read, and matrices: wherever an array is taken."""
    config = bad_arguments.MODELS["adaptive"]
    model, params, tokens = unisono_spec.create(config), init_params(config), np.zeros((2, 3), np.int64)
    state, sums = model.init_state(2), np.zeros((2, 3, 4))
    for odd in (np.ma.masked_array, np.asmatrix):
        for run in (
            lambda odd=odd: model.forward(odd(tokens)),
            lambda odd=odd: model.forward(tokens, valid=odd(tokens == 0)),
            lambda odd=odd: model.forward(tokens, {**state, "layers.0.xi": odd(state["layers.0.xi"])}),
            lambda odd=odd: model.generate(odd(tokens), 1),
            lambda odd=odd: model.generate(tokens, 1, Sampling(repetition_penalty=1.1), seen=odd(np.zeros((2, config.vocab_size), bool))),
            lambda odd=odd: starts(odd(np.array([0, 3])), 3),
            lambda odd=odd: unisono_spec.create(config, {**params, "embedding.weight": odd(params["embedding.weight"])}),
            lambda odd=odd: save_params(tmp_path / "a", config, {**params, "embedding.weight": odd(params["embedding.weight"])}),
            lambda odd=odd: decayed_sum.recurrent(sums, 0.5, odd(np.zeros((2, 4)))),
        ):
            with pytest.raises(InputError, match="which computes by rules of its own"):
                run()


def test_load(tmp_path):
    bad_arguments.files(ROOM, tmp_path)
