"""Tables of measurements: read from a folder of YAML files, and planned as training runs.

`table.yaml` has the title, what all rows share (`row`), and what `--quick` changes (`quick`); each other file is a row, in the order of
their names. A row names a model of `unisono match`, which is fitted to its number of parameters. With `tasks` each file is a model, and
a row for each of them, with its own `quick` besides: the first task chooses the learning rate, but of those that have `rates` of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from unisono_spec.contract import ANY, DTYPES, Config, InputError, nearest, preset, state_dtype
from unisono_spec.contract.plain import build, expanded

from unisono_tools.commands.match import number
from unisono_tools.config import TrainConfig, from_dict
from unisono_tools.experiments.match import FAMILIES
from unisono_tools.experiments.match import nearest as matched
from unisono_tools.reading import read_yaml
from unisono_tools.tasks import open_task

EVALUATIONS = 12  # of each run, at equal distances
BYTES = 256  # ids of a text
NESTED = ("row", "quick", "train", "tasks")  # fields of mappings of mappings


@dataclasses.dataclass(frozen=True)
class Row:
    """label: as the table prints it. model: of `unisono match`. overrides: fields of its config; with d_model and n_layers, as it is.

    vocab: ids that the model has, if not as many as its data. train: what differs from a run's defaults.
    rates: learning rates, of which the best for the first seed is taken for the others.
    rate_of: the row whose best rate is taken instead. task: of the table's tasks. not_run: why it is printed without figures.
    """

    label: str
    model: str
    params: str = "1M"
    vocab: int = 0
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1])
    rates: list[float] = dataclasses.field(default_factory=lambda: [2e-3])
    rate_of: str = ""
    task: str = ""
    not_run: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """about: what the page says under the title. order: of the rows on it, as their files' names, or the best first.

    figure: curves over training, of validation alone or by epochs beside the minibatches' loss; the score on the test split against the
    bytes of the state, a line for each model; or none.
    tasks: the columns of a table that has a line for each model, by what they are called; mean: of which of them a mean is printed; bits:
    what a further column is called, of bits a target.
    """

    name: str
    title: str
    about: str
    order: Literal["rows", "score"]
    figure: Literal["curves", "epochs", "state", "none"]
    rows: dict[str, Row]
    tasks: dict[str, str] = dataclasses.field(default_factory=dict)
    mean: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    bits: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _File:
    title: str
    about: str = ""
    order: Literal["rows", "score"] = "rows"
    figure: Literal["curves", "epochs", "state", "none"] = "curves"
    tasks: dict[str, Any] = dataclasses.field(default_factory=dict)
    mean: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    quick: dict[str, Any] = dataclasses.field(default_factory=dict)


def names() -> list[str]:
    """The tables that come with the tools."""
    return sorted(entry.name for entry in resources.files("unisono_tools.tables").iterdir() if (entry / "table.yaml").is_file())


def load(name: str, quick: bool = False) -> Table:
    """A table by its name, or by the path of its folder. InputError where a file does not fit."""
    known = names()
    folder = Path(str(resources.files("unisono_tools.tables") / name)) if name in known else expanded(name)
    if not (folder / "table.yaml").is_file():
        raise InputError(f"table: {name!r} is neither one of them nor a folder with table.yaml; {nearest(name, known)}")
    shared = _read(_File, read_yaml(folder / "table.yaml"), f"{folder.name}/table.yaml")
    rows = {}
    for path in sorted(folder.glob("*.yaml")):
        if path.name != "table.yaml":
            for name, values in _rows_of(path, shared, quick):
                rows[name] = _read(Row, values, f"{folder.name}/{path.name}")
                if not rows[name].seeds or not rows[name].rates:
                    raise InputError(f"{folder.name}/{path.name}: seeds and rates; give one at least of each")
    if not rows:
        raise InputError(f"table: {folder} has no rows; add a YAML file for each")
    for name, row in rows.items():
        if row.rate_of and (row.rate_of not in rows or rows[row.rate_of].rate_of):
            raise InputError(f"{folder.name}/{name}.yaml: rate_of: {row.rate_of!r}; name a row that has rates of its own")
    tasks = {name: str(task.get("label", name)) for name, task in shared.tasks.items()}
    bits = {name: str(task["bits"]) for name, task in shared.tasks.items() if "bits" in task}
    return Table(folder.name, shared.title, shared.about, shared.order, shared.figure, rows, tasks, shared.mean, bits)


def page(table: Table) -> dict[str, Any]:
    """What the page of a table's results says beside them: kept with them, so that they are drawn without the table."""
    found = {field.name: getattr(table, field.name) for field in dataclasses.fields(table) if field.name not in ("name", "rows")}
    return {name: value for name, value in found.items() if name != "bits" or value}


def _rows_of(path: Path, shared: _File, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows that a file stands for: one, or one for each task."""
    own, small = dict(read_yaml(path)), shared.quick if quick else {}
    if not shared.tasks:
        yield path.stem, merged(shared.row, own, small)
        return
    special = own.pop("tasks", {})
    first = next(iter(shared.tasks))
    for task, values in shared.tasks.items():
        chosen = {} if task == first or "rates" in values else {"rate_of": f"{path.stem}.{first}"}
        smaller = merged(small, values.get("quick", {})) if quick else {}
        values = {key: value for key, value in values.items() if key not in ("label", "bits", "quick")}
        yield f"{path.stem}.{task}", merged(shared.row, values, own, special.get(task, {}), smaller, chosen, {"task": task})


def _read(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    """The dataclass `cls`; what is nested further is judged where it becomes a run."""
    nested = {name: values[name] for name in NESTED if name in values}
    for name, value in nested.items():
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {name}: {value!r}; give names with values")
    return dataclasses.replace(build(cls, {**values, **{name: {} for name in nested}}, where), **nested)


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, of which later ones win."""
    out: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            old = out.get(key)
            out[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def vocabulary(row: Row) -> int:
    """How many ids the model of a row reads; of frames, which have none, as of bytes."""
    data = row.train.get("data", {})
    if row.vocab:
        return row.vocab
    return (open_task(data["task"], data.get("task_options")).vocab_size if data.get("task") else 0) or BYTES


def config_of(row: Row) -> Config:
    """Fitted to its number of parameters, unless its overrides say how deep and wide it is."""
    return _config(row.model, number(row.params), vocabulary(row), json.dumps(row.overrides))


@functools.cache  # a search
def _config(model: str, params: int, vocab: int, overrides: str) -> Config:
    fields = json.loads(overrides)
    if model in FAMILIES and {"d_model", "n_layers"} <= set(fields):
        family, d, n = FAMILIES[model], fields["d_model"], fields["n_layers"]
        return preset(family.base, **{**family.spell(vocab), **family.widen(d), **family.deepen(n), **fields}, vocab_size=vocab)
    return matched(model, params, vocab, fields)


def plan(table: Table, name: str, seed: int, rate: float, out: Path, **options: Any) -> TrainConfig:
    """One run of a row. options: fields of TrainConfig that are the caller's, such as the device."""
    row = table.rows[name]
    base, config = FAMILIES[row.model].base, config_of(row)
    default = preset(base).to_dict()
    overrides = {field: value for field, value in config.to_dict().items() if value != default[field]}
    steps = int(row.train.get("steps", TrainConfig.steps))
    every = max(1, math.ceil(steps / EVALUATIONS))
    start = {
        "schedule": {"warmup_steps": max(1, steps // 20)},
        "eval_every": every,
        "checkpoint_every": steps,
        "keep": 1,
        "data": {} if row.train.get("data", {}).get("task") else {"eval_window": row.train.get("seq_len", TrainConfig.seq_len)},
    }
    own = {
        "model": {"preset": base, "overrides": overrides},
        "optimizer": {"lr": rate},
        "seed": seed,
        "out": str(out / table.name / f"{name}-lr-{rate:g}-seed-{seed}"),
        **{key: value for key, value in options.items() if value is not None},
    }
    return from_dict(merged(start, row.train, own))


def length(row: Row) -> int:
    """Tokens of the longest sequence that a row is tested on."""
    data = row.train.get("data", {})
    if not data.get("task"):
        return int(row.train.get("seq_len", TrainConfig.seq_len))
    task = open_task(data["task"], data.get("task_options"))
    return max(map(task.length, task.settings("test")))


def state_bytes(config: Config, length: int) -> int:
    """Of one sequence of `length` tokens, in float32."""
    states = config.states(length if any(ANY in s.shape for s in config.states().values()) else None)
    return sum(math.prod(s.shape) * DTYPES[state_dtype("float32")].itemsize for s in states.values())
