"""Where a published checkpoint lies: a folder, or a repository on the Hugging Face hub, through its own client."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

from unisono_spec.contract.errors import InputError, shown
from unisono_spec.contract.plain import expanded, is_file, is_folder

HUB = "hf:"
_REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Place(Protocol):
    """Files by their names. str() is how messages call it.

    note: why a file may be missing that is not, as after a failed download; empty otherwise.
    """

    note: str

    def get(self, name: str) -> Path | None:
        """The file of that name, fetched if need be; None where there is none."""
        ...

    def pickles(self) -> list[str]:
        """Names of files that are not read, since they could run code."""
        ...


def find(source: str | Path, revision: str | None = None) -> Place:
    """The place that `source` names; a folder that is there goes before a repository of that name."""
    if not isinstance(source, (str, Path)):
        raise InputError(f"source: {shown(source)} has type {type(source).__name__}; give a folder, or owner/name on the hub")
    text = str(source)
    path, named = expanded(text), text.removeprefix(HUB)
    if is_file(path):
        return _File(path)
    if text and not text.startswith(HUB) and is_folder(path):
        if revision is not None:
            raise InputError(f"revision: {shown(revision)}; {text} is a folder, which has none: leave it out, or write {HUB}owner/name")
        return _Folder(path)
    if not _REPOSITORY.fullmatch(named):
        raise InputError(f"{shown(text)}: no such folder; give the folder of a checkpoint, or owner/name on the hub")
    return _Repository(named, revision)


class _Folder:
    note = ""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def get(self, name: str) -> Path | None:
        return self.path / name if is_file(self.path / name) else None

    def pickles(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir() if path.suffix in PICKLED)


class _File(_Folder):
    """One safetensors file, and what lies beside it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent)
        self.file = path
        if path.suffix != ".safetensors":
            pickled = f": a {path.suffix} is a pickle, which can run code" if path.suffix in PICKLED else ""
            raise InputError(f"{path}: is not read{pickled}; give a folder with config.json and safetensors, or a .safetensors file")

    def get(self, name: str) -> Path | None:
        return self.file if name == "model.safetensors" else None if name.endswith(".index.json") else super().get(name)


class _Repository:
    """A repository, in the client's cache: with HF_HUB_OFFLINE=1, what lies there already."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.revision, self.pinned, self.note = name, revision, "", ""
        try:
            from huggingface_hub import errors, hf_hub_download  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(
                f"{name}: no such folder, and the hub needs the package huggingface_hub; pip install huggingface_hub, or download it"
            ) from error
        self.download: Any = hf_hub_download
        self.absent: Any = errors.EntryNotFoundError
        self.unreached: Any = errors.LocalEntryNotFoundError

    def __str__(self) -> str:
        return f"{HUB}{self.name}"

    def get(self, name: str) -> Path | None:
        try:
            path = Path(self.download(self.name, name, revision=self.pinned or self.revision))
        except self.absent as error:
            if self.pinned:
                self.note = f" ({_reason(error)})" if isinstance(error, self.unreached) else self.note
                return None
            raise self._unread(error) from error
        except Exception as error:  # the client raises errors of several libraries
            raise self._unread(error) from error
        if not self.pinned:
            commit = path.parent.name  # every later file is of the same commit
            self.pinned = commit if _COMMIT.fullmatch(commit) else self.revision or "main"
        return path

    def pickles(self) -> list[str]:
        return []

    def _unread(self, error: Exception) -> InputError:
        return InputError(
            f"{self}: could not be read from the hub ({_reason(error)}); check name, revision and network, or give a local folder"
        )


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
