"""The `unisono` command. Each verb is one typed function in `commands/`; its arguments and its help are made from that function."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import requires, version
from pathlib import Path

from unisono_spec.contract import InputError, nearest

from unisono_tools.signals import listen

# verb → (module in commands/, what it does); a module is imported when its verb is called
VERBS = {
    "train": ("train", "train a model, or continue a run"),
    "eval": ("evaluate", "held-out bits per byte and perplexity of a trained model"),
    "generate": ("generate", "continue a text"),
    "run": ("run", "continue a text with a .onnx file and onnxruntime, nothing else"),
    "import": ("importing", "read a checkpoint that others published: a folder, or owner/name on the hub"),
    "precompute": ("precompute", "ξ of a whole corpus, for training on positions (Algorithm 1)"),
    "export": ("export", "write a checkpoint as one ONNX graph"),
    "list": ("listing", "presets and their exact parameter counts"),
    "match": ("match", "configs of every model with the same number of parameters"),
    "compare": ("compare", "train every model of one size under one budget, and draw their curves"),
    "task": ("task", "what a task asks, and what a predictor reaches that knows nothing of order"),
    "experiment": ("experiment", "the runs of one table of measurements, its page and its figure"),
    "conform": ("conform", "judge an implementation by the court's properties"),
    "plot": ("plot", "draw what a run has logged"),
    "inspect": ("inspect", "draw a model's dependency matrix and its effective reach"),
    "bench": ("bench", "time kernels against their peers and the hardware's floor"),
}
OK, WRONG, INTERRUPTED = 0, 2, 130
SMALLER = "use a smaller batch_size, seq_len or model, or a machine with more memory"
# what the allocators of torch, XLA and onnxruntime say
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "RESOURCE_EXHAUSTED", "Failed to allocate memory", "bad allocation", "bad_alloc")
# what gloo and NCCL say where another of several processes is gone
DISCONNECTED = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")
AGAIN = "the same command continues from the last checkpoint"


def main(argv: list[str] | None = None) -> int:
    """Run one verb; bad input is one line on stderr and exit code 2, Ctrl-C is exit code 130."""
    argv = sys.argv[1:] if argv is None else argv
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115, open for good
    verb = argv[0] if argv else "--help"
    name = "unisono" if verb.startswith("-") else f"unisono {verb}"
    return guarded(name, lambda: _run(verb, argv[1:]) if argv else _help(WRONG))


def guarded(name: str, work: Callable[[], int]) -> int:
    """The exit code of `work`, with every foreseeable error as one line on stderr instead of a traceback."""
    try:
        code = work()
        if sys.stdout:
            sys.stdout.flush()  # at the end of the process, what is wrong with it would be no line
        return code
    except KeyboardInterrupt:
        return _fail(name, "interrupted", INTERRUPTED)
    except InputError as error:
        return _fail(name, str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = _extra_with({"yaml": "pyyaml"}.get(package, package))
        if extra is None:
            raise
        return _fail(name, f"the package {package} is not installed here; pip install 'unisono[{extra}]'")
    except BrokenPipeError:
        # the reader of our output has gone, as `head` does: nothing is wrong
        sys.stdout = None
        return OK
    except MemoryError as error:
        return _fail(name, f"{str(error) or 'out of memory'}; {SMALLER}")
    except OverflowError as error:
        return _fail(name, f"a number is out of range ({error}); use a smaller one")
    except RecursionError:
        return _fail(name, "something is nested too deeply; flatten what you gave")
    except UnicodeError as error:
        return _fail(name, f"a text is not UTF-8, or the terminal cannot show it ({error}); use UTF-8 (PYTHONUTF8=1)")
    except RuntimeError as error:
        # frameworks have no common class for what their allocators and connections raise; any other is a fault of ours
        said = str(error).strip().partition("\n")[0]
        if any(words in str(error) for words in OUT_OF_MEMORY):
            return _fail(name, f"out of memory ({said}); {SMALLER}")
        if (os.environ.get("WORLD_SIZE") or "1") != "1" and any(words in str(error) for words in DISCONNECTED):
            return _fail(name, f"process {os.environ.get('RANK')}: another process has ended ({said}); {AGAIN}")
        raise
    except OSError as error:
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError:
            sys.stdout = None
        where = f"{error.filename}: " if error.filename else ""
        return _fail(
            name, f"{where}{error.strerror or str(error) or type(error).__name__}; check the path, its permissions and the free space"
        )


def _extra_with(package: str) -> str | None:
    """The extra of this distribution that brings a package, `tools` before others; None where none does."""
    found = [re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", line) for line in requires("unisono") or ()]
    extras = [match[2] for match in found if match and match[1].lower() == package.lower()]
    return min(extras, key=lambda extra: extra != "tools", default=None)


def _run(verb: str, argv: list[str]) -> int:
    if verb in ("-h", "--help", "help"):
        return _help(OK)
    if verb in ("-V", "--version"):
        print(f"unisono {version('unisono')}")
        return OK
    if verb not in VERBS:
        raise InputError(f"{verb!r} is not one of its verbs; {nearest(verb, VERBS)}")
    listen()
    return importlib.import_module(f"unisono_tools.commands.{VERBS[verb][0]}").main(argv)


def _fail(name: str, message: str, code: int = WRONG) -> int:
    line = f"{name}: error: {' '.join(message.split())}"
    with contextlib.suppress(OSError):  # nobody may be left to tell
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)
    return code


def _help(code: int) -> int:
    print("usage: unisono VERB [arguments]\n\nLinear-time sequence models: train, judge, export.\n")
    for verb, (_, what) in VERBS.items():
        print(f"  {verb:<11} {what}")
    print("\n`unisono VERB --help` lists a verb's arguments. Every verb reads them from a YAML file too: --config FILE.")
    return code


if __name__ == "__main__":
    sys.exit(main())
