"""The commands of docs/training.md and docs/several-devices.md run as pasted, one after the other, with less to do appended; the launchers'
scripts with a scheduler that is played here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from unisono_tools.config import dump
from unisono_tools.train import checkpoint
from unisono_tools.train.logs import read

DOCS = Path(__file__).parents[3] / "docs"
PAGES = ("training.md", "several-devices.md")
LESS = (
    "--model.overrides.d_model 64 --steps 2 --batch_size 4 --seq_len 16 --accumulation 2 --data.eval_tokens 64 --data.eval_examples 4 "
    "--threads 1"
)


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("unisono ")]


def smaller(words: list[str], text: Path) -> list[str]:
    """The command with less to do, on as many processes as two cores carry; later options override earlier ones."""
    if words[1] == "train":
        words = [*words, *shlex.split(LESS)]
        words += [] if "--data.task" in words else ["--model.overrides.n_layers", "1"]
        words += ["--data.corpus", str(text)] if not {"--data.mixture", "--data.task"} & set(words) else []
        for name in ("--devices", "--context"):
            words += [name, "2"] if name in words else []
    elif words[1] == "eval":
        words += ["--limit", "2"]
    elif words[1] == "generate":
        words += ["--max_new_tokens", "4"]
    return words


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, text, tmp_path):
    (tmp_path / "notes.txt").write_text("Some notes, of no length. " * 300)
    (tmp_path / "prompts.txt").write_text("My fellow\nAmericans, this is\n")
    lines = commands(page)
    assert len(lines) >= 5
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    for i, line in enumerate(lines):
        words = smaller(shlex.split(line.partition(" > ")[0], comments=True), text)
        if words[1] == "train" and "--out" not in words:
            words += ["--out", f"runs/{i}"]
        done = subprocess.run(
            [sys.executable, "-m", "unisono_tools.cli", *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{page}: {line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        if words[1] == "train":
            run = tmp_path / words[words.index("--out") + 1]
            assert np.isfinite([row["loss"] for row in read(run / "log.jsonl") if "loss" in row]).all()


@pytest.fixture
def cluster(tiny, tmp_path):
    """A folder with run.yaml and what a scheduler has on its machines: (folder, where the run lies, environment)."""
    (tmp_path / "run.yaml").write_text(dump(tiny(backend="torch", threads=1, steps=2)))
    programs = tmp_path / "bin"
    programs.mkdir()
    # two machines, which are both this one
    (programs / "srun").write_text('#!/bin/bash\n"$@" & first=$!\n"$@" & second=$!\nwait $first && wait $second\n')
    (programs / "scontrol").write_text("#!/bin/bash\necho localhost\necho localhost\n")
    (programs / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "SLURM_JOB_NODELIST": "two[1-2]"}
    return tmp_path, tmp_path / "shared", environment


def _two_processes_trained(script: str, cluster) -> None:
    folder, run, environment = cluster
    script = script.replace("/shared/run", str(run))
    done = subprocess.run(["bash", "-ec", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(checkpoint.steps(run)) == [2]


def test_slurm(cluster):
    (script,) = [block for block in blocks("several-devices.md", "sh") if "#SBATCH" in block]
    _two_processes_trained(script.replace("--nproc-per-node 8", "--nproc-per-node 1"), cluster)


def test_skypilot(cluster):
    (task,) = [found for block in blocks("several-devices.md", "yaml") if "run" in (found := yaml.safe_load(block))]
    folder, run, environment = cluster
    sky = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "2", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1"}
    _two_processes_trained(task["run"], (folder, run, environment | sky))


def test_kubeflow(cluster):
    (job,) = [found for block in blocks("several-devices.md", "yaml") if "kind" in (found := yaml.safe_load(block))]
    roles = job["spec"]["pytorchReplicaSpecs"]
    assert roles["Worker"] == roles["Master"]
    (container,) = roles["Master"]["template"]["spec"]["containers"]
    folder, run, environment = cluster
    # as the operator sets them
    kube = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29511"}
    _two_processes_trained(shlex.join(container["command"]), (folder, run, environment | kube))
