"""`sampling.json`: random numbers and choices of tokens, for implementations of contract/sampling.py in other languages.

`uniform`: the number u in [0, 1) of (seed, row, n). `choices`: logits of one row, how they are drawn from, and the id and near-tie that
follow. Seeds are digits in texts, since not every JSON reader holds 64 bits; infinite logits are the texts "inf" and "-inf".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract.errors import InputError
from unisono_spec.contract.files import write_bytes
from unisono_spec.contract.sampling import Sampling, choose

NAME = "sampling.json"
SEEDS = (0, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**64 - 1)
WAYS = ((0.0, 0, 1.0), (0.8, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (2.0, 9, 0.9), (1e-3, 0, 1.0), (5e-324, 0, 1.0), (1e308, 0, 1.0))
SIZES = (1, 2, 17, 256)


def write_sampling(folder: Path) -> None:
    random = np.random.default_rng(0)
    rows = [np.round(random.normal(0, 3, size), 3).tolist() for size in SIZES]
    rows += [[0.0, 2.0, 2.0, 1.0], [0.0, "inf", 1.0, "-inf"], ["inf", 0.0, "-inf", "inf"], ["-inf", "-inf", 3.0], [1e308, -1e308, 0.0]]
    uniform = [{"seed": str(seed), "row": row, "n": n} for seed in SEEDS for row, n in ((0, 0), (0, 1), (0, 2**32 - 1), (7, 1000))]
    choices = [
        {"logits": logits, "temperature": t, "top_k": k, "top_p": p, "seed": str(seed), "n": n}
        for i, logits in enumerate(rows)
        for j, (t, k, p) in enumerate(WAYS)
        for seed, n in ((SEEDS[(i + j) % len(SEEDS)], 3), (i, j))
    ]
    found = {"uniform": [{**v, "u": _uniform(v)} for v in uniform], "choices": [{**v, **_choice(v)} for v in choices]}
    lines = [f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, values)) + "\n ]" for name, values in found.items()]
    write_bytes(folder / NAME, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def check_sampling(folder: Path) -> int:
    """Raise InputError where the file is not what the contract says; returns how many vectors it holds."""
    found = json.loads((folder / NAME).read_text())
    for vector in found["uniform"]:
        if _uniform(vector) != vector["u"]:
            raise InputError(f"{NAME}: {vector} is not what the contract says; python -m unisono_conformance.vectors write")
    for vector in found["choices"]:
        now = _choice(vector)
        # a near-tie that is drawn may fall otherwise where exp is rounded otherwise
        either = vector["near_tie"] and vector["temperature"] and now["near_tie"]
        if not either and any(now[name] != vector[name] for name in now):
            raise InputError(f"{NAME}: {vector} is {now} now; python -m unisono_conformance.vectors write")
    return len(found["uniform"]) + len(found["choices"])


def _uniform(vector: dict[str, Any]) -> float:
    key = np.array([int(vector["seed"]), (vector["row"] << 32) | vector["n"]], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _choice(vector: dict[str, Any]) -> dict[str, Any]:
    sampling = Sampling(vector["temperature"], vector["top_k"], vector["top_p"], int(vector["seed"]))
    ids, ties = choose(np.array([vector["logits"]], float), sampling, vector["n"])
    return {"id": int(ids[0]), "near_tie": bool(ties[0])}
