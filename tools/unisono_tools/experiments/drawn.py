"""A table and a figure of a results file, from that file alone."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from unisono_spec.contract.files import write_bytes

from unisono_tools.experiments import figures

Results = dict[str, Any]


def counted(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a row that have ended at the learning rate that counts."""
    return [run for run in row["runs"] if run["lr"] == row["rate"] and run.get("score") is not None]


def spread(values: list[float], digits: int) -> str:
    """The mean, and how far the seeds lie apart."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def ordered(results: Results, order: str) -> list[dict[str, Any]]:
    """Rows as they are, or the best first; those without a result last."""
    rows = results["rows"]
    if order == "rows":
        return rows

    def key(row: dict[str, Any]) -> float:
        scores = [run["score"] for run in counted(row)]
        sign = 1 if _metric(row) == "bits" else -1
        return sign * sum(scores) / len(scores) if scores else math.inf

    return sorted(rows, key=key)


def _metric(row: dict[str, Any]) -> str:
    return next((run["metric"] for run in row["runs"]), "bits")


def markdown(results: Results) -> str:
    """The page: what was run, on what, and the table."""
    page, rows = results["page"], ordered(results, results["page"]["order"])
    tests = list(dict.fromkeys(setting for row in rows for run in counted(row) for setting in run.get("tests", {})))
    metric = next((_metric(row) for row in rows if row["runs"]), "bits")
    unit = _unit(rows, metric)
    words = unit == "bits a token"
    several = len({rate for row in rows for rate in row["rates"]}) > 1
    heads = ["model", "parameters", "bytes of state", f"validation, {unit}"]
    heads += [f"test, {unit}" if tests == ["bits"] else f"test {setting}" for setting in tests]
    heads += ["test, perplexity"] if words else []
    heads += ["tokens/s", "peak MiB", *(["learning rate"] if several else [])]
    lines = [f"# {page['title']}", "", *([page["about"].strip(), ""] if page["about"] else [])]
    lines += [f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in results["about"].items()]
    if results["quick"]:
        lines += ["- a quick run, which says that everything works and nothing else"]
    if page["tasks"]:
        lines += by_task(results)
    else:
        lines += ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        lines += [f"| {' | '.join(_cells(row, tests, several, len(heads), words))} |" for row in rows]
    lines += ["", "Means over seeds, with the least and the most. Where several runs share a device (`--jobs`), speeds are lower bounds."]
    return "\n".join(lines) + "\n"


def _unit(rows: list[dict[str, Any]], metric: str) -> str:
    """Ids are bytes where no tokenizer is named."""
    named = any(row["train"].get("data", {}).get("tokenizer", "bytes") != "bytes" for row in rows)
    return metric if metric != "bits" else "bits a token" if named else "bits a byte"


def by_task(results: Results) -> list[str]:
    """A line a model, a column a task: the score on the test split; then means over those tasks alone that all models were run on that
    were run on one of them at all; below, why some were not."""
    columns, bits = results["page"]["tasks"], results["page"].get("bits", {})
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        models.setdefault(row["label"], {})[row["task"]] = row
    means = {}
    for name, of in results["page"]["mean"].items():
        begun = [tasks for tasks in models.values() if any(_tested(tasks[task]) for task in of)]
        common = [task for task in of if begun and all(_tested(tasks[task]) for tasks in begun)]
        means[f"{name}: {', '.join(columns[task] for task in common) or 'no task that all have'}"] = common
    heads, notes = ["model", "learning rate"], {}
    heads += [head for task, name in columns.items() for head in (name, *([bits[task]] if task in bits else []))] + list(means)
    lines = ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for label, tasks in models.items():
        rates = dict.fromkeys(f"{row['rate']:g}" for row in tasks.values() if row["rate"])
        cells = [label, " / ".join(rates)]
        for task, row in tasks.items():
            scores, tests = _tested(row), [run["tests"] for run in counted(row) if run.get("tests")]
            digits, scale = (3, 1) if _metric(row) == "bits" else (1, 100)
            each = [spread([scale * one[setting] for one in tests], digits) for setting in (tests[0] if tests else {})]
            cells.append(" / ".join(each) or "–")
            cells[-1] += _early(row)
            if task in bits:
                found = [run["bits"] for run in counted(row) if run.get("bits")]
                cells.append(" / ".join(spread([one[setting] for one in found], 2) for setting in (found[0] if found else {})) or "–")
            if not scores:
                notes.setdefault((columns[task], *_why(row)), []).append(label)
        for of in means.values():
            found = [100 * sum(scores) / len(scores) for task in of if (scores := _tested(tasks[task]))]
            cells.append(f"{sum(found) / len(found):.1f}" if found else "–")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Percent, but for bits; one seed where no spread is shown."]
    lines += ["", *(f"- {task}, {what} for {', '.join(who)}: {why}" for (task, what, why), who in notes.items())] if notes else []
    return lines


def _tested(row: dict[str, Any]) -> list[float]:
    """Of each seed the score on the test split, the mean over its settings."""
    return [sum(tests.values()) / len(tests) for run in counted(row) if (tests := run.get("tests"))]


def _early(row: dict[str, Any]) -> str:
    """Why a run of the row ended before its last step, if one did: that was cut short, or that the validation ended."""
    runs = counted(row)
    part = next((run for run in runs if run["status"] != "done"), None) or next((run for run in runs if run.get("ended")), None)
    return f" ({_ended(part)})" if part else ""


def _ended(run: dict[str, Any]) -> str:
    """What ended a run, and when; of one that failed no step is known but that which the error may say."""
    if run["status"].startswith("failed: "):
        return run["status"]
    why = run["ended"] if run["status"] == "done" else run["status"]
    return f"{why} at step {run['steps']:,} of {run['of']:,}"


def _why(row: dict[str, Any]) -> tuple[str, str]:
    """That a row was not run, failed or is not finished, and why."""
    furthest = max((run for run in row["runs"] if run["status"] != "done"), key=lambda run: run["steps"], default=None)
    if row["not_run"] or furthest is None:  # or done at other rates alone
        return "not run", row["not_run"] or "not reached"
    if furthest["status"].startswith("failed: "):
        return "failed", furthest["status"].removeprefix("failed: ")
    return "not finished", _ended(furthest)


def _cells(row: dict[str, Any], tests: list[str], several: bool, width: int, perplexity: bool) -> list[str]:
    runs, first = counted(row), [row["label"], f"{row['parameters']:,}", f"{row['state_bytes']:,}"]
    if not runs:
        return [*first, ": ".join(_why(row)), *[""] * (width - 4)]
    digits = 3 if _metric(row) == "bits" else 4
    one = " (one seed)" if len(runs) == 1 else ""
    out = [*first, spread([run["score"] for run in runs], digits) + one + _early(row)]
    out += [spread([run["tests"][s] for run in runs if s in run.get("tests", {})], digits) for s in tests]
    out += [spread([2 ** run["tests"]["bits"] for run in runs], 2)] if perplexity else []
    speeds = [run["tokens_a_second"] for run in runs if run.get("tokens_a_second")]
    peaks = [run["peak_bytes"] for run in runs if run.get("peak_bytes")]
    out += [f"{sum(speeds) / len(speeds):,.0f}" if speeds else "", f"{max(peaks) / 2**20:,.0f}" if peaks else ""]
    return [*out, *([f"{row['rate']:g}"] if several else [])]


def draw(results: Results, path: Path) -> Path:
    """Curves of the metric, the mean over seeds with the least and the most as a shade; or what `figure` of the table says."""
    page = results["page"]
    if page["figure"] == "epochs":
        return _over_epochs(results, path)
    if page["figure"] == "state":
        return _against_state(results, path)
    lines, metric = {}, "bits"
    for row in ordered(results, page["order"]):
        runs = [run["curve"] for run in counted(row)]
        if not runs:
            continue
        metric, scores = _metric(row), [run["score"] for run in counted(row)]
        lines[f"{row['label'].replace('`', '')}  {sum(scores) / len(scores):.3f}"] = _over_seeds(runs)
    text = metric == "bits"
    what = f"validation, {_unit(results['rows'], metric)}" if text else f"validation {metric}"
    return figures.curves(path, lines, {}, "training tokens" if text else "training examples", what, page["title"])


def _over_seeds(curves: list[list[tuple[float, float]]]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Where, and there the mean, the least and the most, as far as the shortest goes."""
    columns = list(zip(*([value for _, value in curve] for curve in curves), strict=False))
    mean, low, high = ([f(column) for column in columns] for f in (statistics.fmean, min, max))
    return [at for at, _ in curves[0][: len(columns)]], mean, low, high


def _over_epochs(results: Results, path: Path) -> Path:
    """The minibatches' loss and the validation's, in bits, over the epochs: means over seeds with the least and the most as a shade."""
    with figures.panels(path, 2, 12, 4.8, sharey=True) as panels:
        for number, row in enumerate(results["rows"]):
            runs = [run for run in counted(row) if run["steps"]]  # a failed one has no known length
            if not runs:
                continue
            scale = runs[0]["epochs"] / (runs[0]["curve"][-1][0] * runs[0]["of"] / runs[0]["steps"])
            for axes, kind in zip(panels, ("losses", "curve"), strict=True):
                x, mean, low, high = _over_seeds([run[kind] for run in runs])
                x, look = [at * scale for at in x], figures.look(row["label"], number)
                axes.plot(x, mean, **look, markersize=4, label=row["label"])
                axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        for axes, title in zip(panels, ("training, minibatches", "validation"), strict=True):
            axes.set(title=title, xlabel="epochs", ylabel="bits a byte")
        figures.legend_below(panels[0], 4)
    return path


def _against_state(results: Results, path: Path) -> Path:
    """The mean over the test settings, of the seeds with the least and the most, against the bytes of the state, from small to large, a
    line for each model."""
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    metric = "accuracy"
    for row in results["rows"]:
        if scores := _tested(row):
            metric = _metric(row)
            name = row["label"].rpartition(", ")[0] or row["label"]  # without its width
            points.setdefault(name, []).append((float(row["state_bytes"]), sum(scores) / len(scores), min(scores), max(scores)))
    what = f"test {metric}, mean over settings"
    return figures.against(
        path, {model: sorted(at) for model, at in points.items()}, "bytes of state, float32", what, results["page"]["title"]
    )


def write(results: Results, folder: Path) -> tuple[Path, ...]:
    """The page, and the figure where something has been run."""
    page = folder / f"{results['table']}.md"
    drawn = []
    if results["page"]["figure"] != "none" and any(counted(row) for row in results["rows"]):
        drawn = [draw(results, folder / f"{results['table']}.png")]
    text = markdown(results) + "".join(f"\n![{results['table']}]({path.name})\n" for path in drawn)
    write_bytes(page, text.encode())
    return (page, *drawn)
