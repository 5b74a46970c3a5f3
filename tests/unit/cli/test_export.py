"""Claims about jobs that are written for clusters: well formed, as was asked, and without a secret."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.cli.main import answer

SECRET = "0123456789abcdef" * 4

# Stand in for SLURM's commands and torchrun: the batch script runs on a node of its own, two tasks follow.
STUBS = {
    "scontrol": "#!/bin/bash\nprintf 'node7\\nnode8\\n'\n",
    "paceline": '#!/bin/bash\necho "$*" > keys\n',
    "srun": '#!/bin/bash\nshift\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n',
    "torchrun": (
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if k.startswith('PACELINE_')}]))\n"
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PACELINE_JOB_KEY", SECRET)
    (tmp_path / "train.py").touch()
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def exported(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    assert answer(["export", *line]) == 0
    out = capsys.readouterr().out
    assert SECRET not in out
    return out


def manifest(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, Any]:
    return dict(yaml.safe_load(exported(capsys, "k8s", "--image", "me/train:1", *line)))


def submitted(folder: Path, script: str) -> list[tuple[list[str], dict[str, str]]]:
    """What torchrun got on each node: its arguments, and what of paceline's was in its environment."""
    slurm = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | slurm
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=environment, cwd="/", check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]  # type: ignore[misc]


def test_a_batch_script_starts_torchrun_on_every_node(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2", "--workers", "6", "--pace", "bounded:4", "--staleness-damping"]
    script = exported(capsys, "slurm", *options, "train.py", "--name", "two words; $HOME 'q'")
    assert "#SBATCH --nodes=2\n" in script
    assert "#SBATCH --ntasks-per-node=1\n" in script
    for rank, (arguments, environment) in enumerate(submitted(folder, script)):
        told = shlex.split(f"--nnodes 2 --node-rank {rank} --nproc-per-node 3 --max-restarts 3 --master-addr node7")
        assert arguments[:10] == told
        assert arguments[10:] == ["--master-port", "29500", "train.py", "--name", "two words; $HOME 'q'"]
        assert environment == {
            "PACELINE_PACE": "bounded:4",
            "PACELINE_STALENESS_DAMPING": "1",
            "PACELINE_JOB_KEY_FILE": str(folder / "job.key"),
        }
    assert (folder / "keys").read_text() == f"key {folder / 'job.key'}\n"


def test_where_servers_are_apart_there_is_a_node_for_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2", "--workers", "6", "--servers", "2", "--servers-apart"]
    script = exported(capsys, "slurm", *options, "train.py")
    assert "#SBATCH --nodes=3\n" in script
    for rank, (arguments, environment) in enumerate(submitted(folder, script)):
        assert arguments[4:6] == ["--nproc-per-node", "3" if rank else "1"]
        assert environment["PACELINE_SERVERS_APART"] == "1"
    assert manifest(capsys, *options, "train.py")["spec"]["trainer"]["numNodes"] == 3
    job = manifest(capsys, "--kind", "rayjob", *options, "train.py")
    assert "--servers-apart" in shlex.split(job["spec"]["entrypoint"])


def test_where_servers_have_several_hosts_each_is_a_node(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2", "--workers", "6", "--servers", "5", "--servers-apart", "--server-hosts", "2"]
    script = exported(capsys, "slurm", *options, "train.py")
    assert "#SBATCH --nodes=4\n" in script
    assert "#SBATCH --cpus-per-task=3\n" in script
    for arguments, environment in submitted(folder, script):  # on two nodes, and these are the servers'
        assert arguments[4:6] == ["--nproc-per-node", "2"]
        assert environment["PACELINE_SERVER_HOSTS"] == "2"
    assert manifest(capsys, *options, "train.py")["spec"]["trainer"]["numNodes"] == 4
    job = manifest(capsys, "--kind", "rayjob", *options, "train.py")
    assert "--server-hosts=2" in shlex.split(job["spec"]["entrypoint"])
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["rayStartParams"]) == (3, {"num-cpus": "3"})


def test_no_key_is_asked_for_where_links_are_to_be_insecure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = exported(capsys, "slurm", "train.py", "--insecure", "--nodes", "2")
    assert [environment for _, environment in submitted(folder, script)] == [{"PACELINE_INSECURE": "1"}] * 2
    assert not (folder / "keys").exists()
    job = manifest(capsys, "train.py", "--insecure")
    assert job["spec"]["trainer"]["env"] == [{"name": "PACELINE_INSECURE", "value": "1"}]


def test_a_train_job_has_what_kubeflow_asks_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = manifest(
        capsys, "--nodes", "2", "--workers", "8", "--epochs", "3", "/app/my train.py", "--text", 'a: "b"\n- é #'
    )
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["metadata"] == {"name": "my-train"}
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    trainer = job["spec"]["trainer"]
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("me/train:1", 2, 4)
    assert trainer["command"] == ["torchrun", "--max-restarts", "3", "/app/my train.py", "--text", 'a: "b"\n- é #']
    epochs, key = trainer["env"]
    assert epochs == {"name": "PACELINE_EPOCHS", "value": "3"}
    secret = {"secretKeyRef": {"name": "my-train-key", "key": "job.key"}}
    assert key == {"name": "PACELINE_JOB_KEY", "valueFrom": secret}


def test_a_ray_job_has_what_kuberay_asks_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kind", "rayjob", "--nodes", "2", "--workers", "4", "--servers", "1", "--pace", "async"]
    job = manifest(capsys, *options, "--threads", "2", "/app/train.py", "--lr", "0.1")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    typed = shlex.split(job["spec"]["entrypoint"])
    ours = ["--engine=ray", "--workers=4", "--servers=1", "--pace=async", "--threads=2"]
    assert typed == ["paceline", "run", *ours, "--", "/app/train.py", "--lr", "0.1"]
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["rayStartParams"]) == (2, {"num-cpus": "4"})
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        (container,) = template["spec"]["containers"]
        assert container["image"] == "me/train:1"
        assert [variable["name"] for variable in container["env"]] == ["PACELINE_JOB_KEY"]
    assert answer(["run", "--dry-run", *ours, "train.py"]) == 0  # the command is one that paceline takes


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("slurm --nodes 3 --workers 4 train.py", "4 workers do not divide over 3 nodes"),
        ("slurm absent.py", "script 'absent.py' does not exist"),
        ("k8s train.py", "no image is given"),
        ("k8s --image a --kind job train.py", "--kind is 'job'; it must be one of: trainjob, rayjob"),
        (
            "k8s --image a --workers 2 --nodes 2 --servers 4 --servers-apart --server-hosts 2 train.py",
            "each node has 1 process, as many as workers, and 2 servers are to be on one",
        ),
        ("k8s --image a --data served train.py", "data is served, and workers are started by torchrun"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    assert answer(["export", *line.split()]) == 2
    assert says in capsys.readouterr().err
