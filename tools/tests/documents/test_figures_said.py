"""What README and the architectures' pages say in figures is what the results' files, or a measurement, say."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

from unisono_spec.contract import count_params, preset, presets
from unisono_tools.bench import marks

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs/results"
README = re.sub(r"\s+", " ", (ROOT / "README.md").read_text("utf-8"))


def numbers(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def of(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


def test_cram_kernels():
    cases = numbers("kernels-h100")["cases"]
    shares = []
    for op in ("decayed_sum", "weighted_sum"):
        case = next(case for case in cases if case["op"] == op)
        ours, peer = of(case["rows"], contestant="unisono"), of(case["rows"], contestant="accelerated-scan warp")
        for floor, way in zip(case["floor_ms"], ("forward_ms", "backward_ms"), strict=True):
            shares.append(f"{100 * floor / ours[way]:.0f}")
            assert 3 < peer[way] / ours[way] < 3.5
            assert peer[way] == min(row[way] for row in case["rows"] if row["contestant"] != "unisono")
    a, b, c, d = shares
    assert f"at {a} % (forward) and {b} % (backward)" in README
    assert f"the adaptive one's at {c} % and {d} %" in README


def test_the_selective_scan_and_mom_gru():
    rows = numbers("kernels-scan-h100")["scans"]
    ours, peer = (of(rows, shape=rows[0]["shape"], by=by) for by in ("triton", "jax-linear-attention"))
    assert f"takes {ours['forward_ms']:.2f} ms forward and {ours['both_ms']:.2f} both ways" in README
    a, b = (100 * ours[name] / peer[name] for name in ("forward_ms", "both_ms"))
    assert f"{a:.0f} % and {b:.0f} % of jax-linear-attention's time" in README
    ours, plain = (of(numbers("kernels-gru-h100")["loops"], batch=16, by=by) for by in ("kernels", "plain"))
    assert f"takes {ours['forward_us']:.1f} µs a token forward and {ours['both_us']:.1f} both ways" in README
    assert [round(plain[name] / ours[name]) for name in ("forward_us", "both_us")] == [6, 7]
    rows = numbers("trained-ssm-h200")["training"]
    for compiled, graphs in itertools.product((False, True), repeat=2):
        mamba, lat = (of(rows, model=name, compiled=compiled, graphs=graphs) for name in ("mamba-130m", "lat, as large as mamba-130m"))
        assert f"{100 * mamba['tokens_per_s'] / lat['tokens_per_s']:.0f} % of" in README


def test_decoding():
    rows = numbers("decode-h200")["rows"]
    flat = [round(row["graph_us"]) for row in rows if row["model"] == "lat-base" and row["batch"] == 1]
    near, far = (of(rows, model="transformer-base", batch=1, context=n)["graph_us"] for n in (1024, 131072))
    assert f"costs lat-base {min(flat)} to {max(flat)} µs at any context" in README
    assert f"{near:.0f} µs at 1K tokens and {far:,.0f} at 128K" in README
    mamba = [of(rows, model="mamba-130m", batch=1, context=n)["graph_us"] for n in (1024, 32768, 131072, 1048576)]
    assert max(mamba) < 1.01 * min(mamba)
    near, far = (of(rows, model="transformer of 129M", batch=1, context=n)["graph_us"] for n in (1024, 131072))
    assert f"mamba-130m {mamba[0]:.0f} µs, a Transformer of its size {near:.0f} and {far:,.0f}" in README


def test_linear_attention():
    found = numbers("kernels-attention-h100")
    case = of(found["cases"], name="B8 T4096 H16 K=V=64, bfloat16")
    ours = of(case["rows"], contestant="unisono")
    jla = of(case["rows"], contestant="jax-linear-attention, no normaliser")
    sdpa = of(case["rows"], contestant="causal SDPA (softmax, quadratic)")
    ways = "forward_ms", "both_ms"
    times = " ms forward and ".join(f"{ours[way]:.2f}" for way in ways)
    quadratic = " and ".join(f"{sdpa[way] / ours[way]:.1f}" for way in ways)
    share = " % and ".join(f"{100 * ours[f'kernels_{way}'] / jla[way]:.0f}" for way in ways)
    said = " ".join(README.split())
    assert f"takes {times} both ways on an H100: {quadratic} times as fast as causal SDPA" in said
    assert f"its kernels take {share} % of the time of jax-linear-attention's" in said
    for gpu in ("h100", "h200"):
        page = (RESULTS / f"kernels-attention-marks-{gpu}.md").read_text("utf-8")
        by_length = f"kernels-attention-lengths-{gpu}"
        lengths = numbers(by_length) if (RESULTS / f"{by_length}.json").exists() else None
        assert page == marks.markdown(gpu, numbers(f"kernels-attention-{gpu}"), lengths)


def _faster(page: str, model: str, lengths: tuple[int, ...], size: int = 152_000_000, head: str = "usual") -> list[str]:
    """How many times the tokens a second of the Transformer beside it."""
    rows = [row for row in numbers(page)["training"] if (row["size"], row.get("head", "usual"), row["compiled"]) == (size, head, True)]
    rates = [[of(rows, model=name, length=length)["tokens_per_s"] for length in lengths] for name in (model, "transformer")]
    return [f"{a / b:.2f}" for a, b in zip(*rates, strict=True)]


def test_models_in_training():
    some = _faster("models-h200", "lat", (2048, 8192, 16384, 65536))
    assert (
        "LAT makes {} times the Transformer's tokens a second at sequences of 2,048, {} times at 8,192, {} times at 16,384 and {} times at "
        "65,536 on an H200"
    ).format(*some) in README
    some = _faster("models-h100", "infinityformer", (2048, 8192, 16384), head="alike")
    assert "InfinityFormer {}, {} and {} times up to 16,384 on an H100".format(*some) in README
    some = [_faster("models-h200", model, (2048, 8192, 16384, 65536), 70_400_000, "alike") for model in ("lat", "infinityformer")]
    said = " ".join(README.split())
    assert "LAT makes {}, {}, {} and {} times, InfinityFormer {}, {}, {} and {} times on an H200".format(*some[0], *some[1]) in said
    some = [_faster("models-h100", model, (2048, 8192, 16384, 65536), 70_400_000, "alike") for model in ("lat", "infinityformer")]
    assert "on an H100 {}, {}, {} and {} times, and {}, {}, {} and {} (".format(*some[0], *some[1]) in said
    some = _faster("models-h200", "infinityformer", (2048, 16384, 65536))
    assert "and {}, {} and {} times at 2,048, 16,384 and 65,536 on an H200".format(*some) in said


def test_layers_on_a_cpu():
    cases = numbers("peers-cpu")["cases"]
    ours, slow = "unisono, PyTorch", "transformers, slow path"
    ratios = {}
    for length in (128, 512):
        rows = cases[f"Mamba block, B 4, T {length}, D 128"]
        ratios[length] = [of(rows, contestant=slow)[way] / of(rows, contestant=ours)[way] for way in ("forward_ms", "ms")]
    assert f"{ratios[512][1]:.0e}" == "1e+02"
    assert "trains about a hundred times as fast as transformers' slow path at 512 tokens" in README
    assert f"{ratios[128][1]:.1f} times at 128" in README
    assert f"the forward alone is {ratios[512][0]:.1f} and {ratios[128][0]:.1f} times as fast" in README
    shares = []
    for length in (512, 4096):
        rows = cases[f"linear attention, B 1, T {length}, 4 heads of 64"]
        shares.append(of(rows, contestant="torch SDPA (softmax, quadratic)")["ms"] / of(rows, contestant=ours)["ms"])
    assert shares[0] > 1
    assert f"{shares[1]:.0f}" == "6"
    assert "costs less than through quadratic attention at 512 tokens and a sixth of it at 4,096" in README


def test_cost_against_length():
    fitted = numbers("linear-cpu")["exponents"]
    powers = [p for name, kinds in fitted.items() for kind, p in kinds.items() if name != "transformer" or kind == "peak"]
    assert (f"{min(powers):.1f}", f"{max(powers):.1f}") == ("0.8", "1.2")
    assert "with powers of the length from 0.8 to 1.2" in README
    assert {f"{fitted['transformer'][kind]:.1f}" for kind in ("forward", "backward")} == {"1.7"}
    assert "the Transformer's time with 1.7" in README


def test_the_comparison():
    curves = numbers("compare-1m")["curves"]
    page = (ROOT / "docs/comparison.md").read_text("utf-8")
    rows = re.findall(r"^\| .+? \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert rows == [(f"{c['parameters']:,}", f"{c['bits'][-1]:.3f}", f"{c['speed']:,.0f}") for c in curves]
    spread = numbers("compare-1m-seeds")["curves"]
    said = re.findall(r"^\| .+? \| ([\d,]+) \| ([\d.]+) \(([\d.]+)–([\d.]+)\) \|$", page, re.MULTILINE)
    assert said == [(f"{c['parameters']:,}", *(f"{c[name][-1]:.3f}" for name in ("bits", "low", "high"))) for c in spread]
    counts = [f"{bits:.3f}" for bits in reversed(numbers("compare-1m")["baselines"].values())]
    assert "; ".join(counts) in page


def test_counts_of_parameters():
    """Every large number on the architectures' pages is a preset's count, but for one share of a model."""
    known = {f"{count_params(config):,}" for config in presets().values()} | {"63,983,028"}
    for page in sorted((ROOT / "docs/architectures").glob("*.md")):
        said = set(re.findall(r"\b\d{1,3}(?:,\d{3}){2,}\b", page.read_text("utf-8")))
        assert said, page.name
        assert said <= known, page.name
    blocks = [math.prod(p.shape) for name, p in preset("cram-paper").params().items() if name.startswith("layers.")]
    assert f"{sum(blocks):,}" == "63,983,028"


def test_one_address():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    urls = project["project"]["urls"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f'repository-code: "{urls["Repository"]}"' in citation
    assert f'url: "{urls["Documentation"]}"' in citation
    (substitution,) = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    assert substitution["replacement"].startswith(f"]({urls['Repository']}/blob/main/")
    assert all(url.startswith(urls["Repository"]) for name, url in urls.items() if name != "Documentation")


def check_where_elu_plus_one_is_zero():
    """Below −24 ln 2 in float32, or −25 ln 2 where expm1 rounds once, and below −9 ln 2 in bfloat16."""
    import torch
    from torch.nn.functional import elu

    for dtype, digits in ((torch.float32, (24, 25)), (torch.bfloat16, (9,))):
        x = -torch.linspace(4, 20, 16385).to(dtype)
        # the largest numbers of the grid, or of bfloat16, that are below
        assert x[elu(x) + 1 == 0].max().item() in [max(v for v in x.tolist() if v < -n * math.log(2)) for n in digits]
    page = (ROOT / "docs/architectures/lat.md").read_text("utf-8")
    assert f"elu(x) + 1 is 0 below −{24 * math.log(2):.1f} in float32 and −{9 * math.log(2):.2f} in bfloat16" in page


if importlib.util.find_spec("torch"):  # in the sessions that have it
    test_where_elu_plus_one_is_zero = check_where_elu_plus_one_is_zero


def test_what_the_tables_runs_took():
    tables = [found for path in sorted(RESULTS.glob("*.json")) if "table" in (found := json.loads(path.read_text("utf-8")))]
    seconds = [run["seconds"] for table in tables for row in table["rows"] for run in row["runs"]]
    said = " ".join((RESULTS / "README.md").read_text("utf-8").split())
    assert len(tables) > 8
    assert f"The {len(seconds)} runs behind these tables took {sum(seconds) / 60:.0f} minutes by their own clocks" in said
