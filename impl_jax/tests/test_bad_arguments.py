"""Arguments of the wrong kind, in JAX."""

from __future__ import annotations

import bad_arguments
import jax.numpy as jnp
import pytest
import unisono_jax

ROOM = bad_arguments.Room("jax", unisono_jax, jnp.asarray)


# what is accepted is compiled, op by op: a few models stand for the others, whose checks are the same
@pytest.mark.parametrize("name", ["adaptive", "frames", "hybrid", "maru"])
def test_every_argument_of_every_verb(name):
    assert bad_arguments.check(ROOM, bad_arguments.MODELS[name]) > 1000


def test_load(tmp_path):
    bad_arguments.files(ROOM, tmp_path)
