"""The page writes what onnxruntime writes in Python, and texts go from one to the other and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from unisono_spec.contract import config_to_dict
from unisono_spec.contract.continuing import Continuation, load_continuation, save_continuation
from unisono_spec.contract.files import load_params
from unisono_spec.contract.sampling import Sampling
from unisono_tools.backends import open_reader
from unisono_tools.streaming import stream

ROOT = Path(__file__).parents[3]
MODELS = ("cram", "lat", "mamba", "maru")  # of conftest.py
PROMPT = "The people of the United States, née 1776 — "
SAMPLING = Sampling(1.1, 200, 0.98, 2**63 + 11)
FIELDS = {"temperature": 1.1, "top_k": 200, "top_p": 0.98, "seed": 2**63 + 11}


def written(path, number, sampling=SAMPLING, prompt=PROMPT, before: Continuation | None = None, backend=None):
    """What Python writes, token by token."""
    reader = open_reader(path, backend)
    if before is None:
        return list(stream(reader, [np.frombuffer(prompt.encode(), np.uint8)], number, sampling))
    state = reader.from_numpy(before.state)
    return list(stream(reader, [np.array(before.unread)], number, before.sampling, state, before.n_generated))  # pyright: ignore[reportArgumentType]


def same(found, expected) -> None:
    """Token for token, at least until rounding may decide: where Python's own choice was a near-tie."""
    ids = [int(g.tokens[0, 0]) for g in expected]
    parting = next((i for i, (a, b) in enumerate(zip(found, ids, strict=True)) if a != b), None)
    assert parting is None or expected[parting].near_ties[0, 0], (parting, found[:parting], ids[parting])


@pytest.mark.parametrize("name", MODELS)
def test_one_seed_gives_one_text(name, build, visit):
    made = build(name)
    seen = visit(made.url)
    seen.choose(prompt=PROMPT, limit=150, **FIELDS)
    found = seen.write()
    same(found, written(made.graph, 150))
    assert seen.page.inner_text("#given") == PROMPT
    # the text that is shown is that of the bytes, but for what HTML does not show and half a character at the end
    shown = seen.page.evaluate("document.getElementById('written').textContent")
    assert bytes(found).decode(errors="replace").startswith(shown)
    seen.choose(temperature=0, limit=40)
    same(seen.write(), written(made.graph, 40, Sampling(0.0, 200, 0.98, 2**63 + 11)))


@pytest.mark.parametrize("name", MODELS)
def test_a_text_goes_from_the_page_to_python_and_back(name, build, visit, tmp_path):
    made = build(name)
    config, _ = load_params(made.checkpoint)
    whole = written(made.graph, 120)
    seen = visit(made.url)
    seen.choose(prompt=PROMPT, limit=50, **FIELDS)
    found = seen.write()
    saved = load_continuation(seen.saved(tmp_path / "page.safetensors"), config)
    assert (saved.n_generated, saved.sampling, list(saved.unread)) == (50, SAMPLING, found[-1:])
    for backend in ("torch", "numpy"):
        continued = written(made.checkpoint, 30, before=saved, backend=backend)
        found_there = [int(g.tokens[0, 0]) for g in continued]
        same(found + found_there, whole[:80])
    last = continued[-1]
    state = open_reader(made.checkpoint, "numpy").to_numpy(last.state)
    path = tmp_path / "python.safetensors"
    save_continuation(path, config, Continuation(state, tuple(map(int, last.tokens[0])), last.n_generated, (), SAMPLING))
    # another page, which knows nothing of the first but its file
    other = visit(made.url)
    other.page.set_input_files("#file", path)
    other.until("document.getElementById('status').textContent.includes('80 tokens')")
    assert other.page.input_value("#seed") == str(SAMPLING.seed)
    other.choose(limit=40)
    same(found + found_there + other.write("#pause"), whole)


def test_pausing_and_going_on_changes_nothing(build, visit):
    made = build("mamba")
    seen = visit(made.url)
    seen.choose(prompt=PROMPT, **FIELDS)
    seen.page.click("#start")
    for _ in range(3):
        seen.until(f"window.ids.length > {len(seen.ids) + 20}")
        seen.page.keyboard.press("Escape")
        seen.until("!document.body.classList.contains('running')")
        seen.page.click("#pause")
    seen.page.click("#pause")
    seen.until("!document.body.classList.contains('running')")
    same(seen.ids, written(made.graph, len(seen.ids)))
    # begun anew in the middle of a text
    before = len(seen.ids)
    seen.page.click("#start")
    seen.until("document.body.classList.contains('running')")
    seen.choose(limit=30)
    seen.page.click("#start")
    seen.until("document.getElementById('status').textContent === 'Paused after 30 tokens.'")
    assert len(seen.ids) > before
    same(seen.ids[-30:], written(made.graph, 30))


def test_memory_stays(build, visit):
    """The state, and what the page keeps of a text."""
    made = build("cram")
    seen = visit(made.url)
    seen.choose(prompt="a", limit=25_000, temperature=1.5)
    size = seen.page.inner_text("#size")
    assert len(seen.write()) == 25_000
    assert seen.page.inner_text("#size") == size == f"{8 * 4} B"
    assert 15_000 < seen.page.evaluate("document.getElementById('text').textContent.length") < 21_000
    assert len(seen.page.get_attribute("#curve polyline", "points").split()) <= 120


def test_what_is_wrong_is_said(build, visit, tmp_path):
    made = build("mamba")
    seen = visit(made.url)
    for fields, word in (
        ({"seed": "-1"}, "seed: "),
        ({"seed": str(2**64)}, "seed: "),
        ({"seed": "0", "top_p": "0"}, "top_p: 0"),
        ({"top_p": "1", "prompt": ""}, "prompt: empty"),
    ):
        seen.choose(**fields)
        seen.page.evaluate("document.getElementById('form').dispatchEvent(new Event('submit', {cancelable: true}))")
        assert word in seen.status
    config, _ = load_params(build("lat").checkpoint)
    zeros = open_reader(build("lat").graph).init_state(1)
    save_continuation(tmp_path / "other", config, Continuation(zeros))
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(5000))
    for path, word in (
        (tmp_path / "other", "arch is"),
        (tmp_path / "noise", "not a safetensors file"),
        (made.checkpoint, 'expected "state"'),
    ):
        seen.page.set_input_files("#file", path)
        seen.until(f"document.getElementById('status').textContent.includes({word!r})")
        assert seen.page.get_attribute("#status", "class") == "error"
    seen.choose(prompt="a", limit=5)
    assert len(seen.write()) == 5
    assert config_to_dict(config)["arch"] == "lat"


SIZES = {"phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True}, "desktop": {}}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_accessible_and_fits(size, scheme, build, visit):
    """axe-core finds nothing, nothing leaves the screen, and the keyboard reaches everything. Leaves screenshots."""
    seen = visit(build("mamba").url, color_scheme=scheme, **SIZES[size])
    axe = (ROOT / "web/playground/node_modules/axe-core/axe.min.js").read_text("utf-8")
    for state in ("ready", "written"):
        if state == "written":
            seen.choose(limit=300)
            seen.write()
        found = seen.page.evaluate(f"{axe}; axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes.map((n) => n.html)]))")
        assert found == [], (state, found)
        assert seen.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    seen.page.screenshot(path=ROOT / f"build/screenshots/{size}-{scheme}.png", full_page=True)
    reached = set()
    seen.page.evaluate("document.activeElement.blur()")
    for _ in range(40):
        seen.page.keyboard.press("Tab")
        reached.add(seen.page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    controls = seen.page.evaluate(
        "[...document.querySelectorAll('button:enabled, input:not([hidden]), textarea, select, a')].map((e) => e.id)"
    )
    assert set(controls) <= reached, set(controls) - reached
