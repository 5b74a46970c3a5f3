"""``paceline export``: a script as a job of SLURM or of Kubernetes, where torchrun or Ray starts its workers.

What is written holds no secret: it names where the job key lies (a file of mode 0600, a Secret), and how that is made.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from paceline.cli.options import TRUTHS, JobFlags, flag, job_field, resolve, variable
from paceline.cli.run import chosen
from paceline.config import Job
from paceline.errors import UsageError
from paceline.transport.keys import FILE_VARIABLE, VARIABLE

KINDS = ("trainjob", "rayjob")
_PORT = 29500
_KEY = "job.key"  # the file's name, also as the key of the Secret's data
# Who starts the workers has these from elsewhere.
_NOT_TOLD = ("workers", "max_workers", "engine", "ray_address")


def export(
    target: str,
    script: str,
    args: tuple[str, ...],
    flags: JobFlags,
    *,
    nodes: int,
    image: str | None = None,
    kind: str = "trainjob",
    output: str | None = None,
) -> int:
    """The commands ``export slurm`` and ``export k8s``; returns the exit code. Raises UsageError."""
    if kind not in KINDS:
        raise UsageError(f"--kind is {kind!r}; it must be one of: {', '.join(KINDS)}")
    settings = resolve(flags, os.environ)
    if target == "slurm":
        chosen(script, args, settings)  # what an image has cannot be seen from here
    engine = "ray" if (target, kind) == ("k8s", "rayjob") else "torchrun"
    job = Job(name=Path(script).stem, **{**settings.values, "engine": engine})
    if not 1 <= nodes <= job.workers or job.workers % nodes:
        raise UsageError(f"{job.workers} workers do not divide over {nodes} nodes", fix="a multiple of it")
    told = [option for option, source in _sources(settings.sources) if source != "default"]
    command = [script, *args]
    if target == "slurm":
        text = slurm(job, command, told, nodes)
    elif image is None:
        raise UsageError("no image is given", fix="--image NAME:TAG, with paceline, the script and its data in it")
    elif engine == "ray":
        text = ray_job(job, command, told, nodes, image)
    else:
        text = train_job(job, command, told, nodes, image)
    if output is None:
        sys.stdout.write(text)
    else:
        Path(output).write_text(text)
    return 0


def slurm(job: Job, command: Sequence[str], told: Sequence[str], nodes: int) -> str:
    """A batch script: torchrun on every node; with ``--servers-apart`` on so many more, the first ones, as server hosts
    there are, with as many processes as one of them needs. ``told``: the options that somebody has set."""
    workers, apart = job.workers // nodes, _apart(job)
    processes = f"$((SLURM_NODEID < {apart} ? {_waiting(job)} : {workers}))" if apart else str(workers)
    options = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in _environment(job, told).items())
    return f"""#!/bin/bash
#SBATCH --job-name={_name(job.name)}
#SBATCH --nodes={nodes + apart}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={_cpus(job, nodes)}
#SBATCH --output=%x-%j.log
# Yours to add: --time, --partition, --account, --mem, --gpus-per-node.
#
# Submit it in a folder that all nodes share, with the script in it.

set -euo pipefail
cd "${{SLURM_SUBMIT_DIR:-.}}"
{"" if job.insecure else _KEY_FILE}{options}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export FIRST_NODE=${{first%%$'\\n'*}}

srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \\
  --nproc-per-node {processes} --max-restarts {job.restarts} --master-addr "$FIRST_NODE" --master-port {_PORT} "$@"' \\
  torchrun {shlex.join(command)}
"""


_KEY_FILE = f"""# The job key lies there too, for you alone to read; it is made if there is none.
export {FILE_VARIABLE}="${{{FILE_VARIABLE}:-$PWD/{_KEY}}}"
[[ -e ${FILE_VARIABLE} ]] || paceline key "${FILE_VARIABLE}"
"""


def train_job(job: Job, command: Sequence[str], told: Sequence[str], nodes: int, image: str) -> str:
    """A TrainJob of Kubeflow's Trainer, whose runtime tells torchrun where all are. All nodes are alike there: with
    ``--servers-apart`` there is one more for each of the servers' hosts, whose processes are servers, or wait beside
    them. Raises UsageError."""
    name, workers = _name(job.name), job.workers // nodes
    if job.server_hosts > 1 and workers < _waiting(job):
        has = "1 process" if workers == 1 else f"{workers} processes"
        raise UsageError(
            f"each node has {has}, as many as workers, and {_waiting(job)} servers are to be on one",
            fix="more --server-hosts, or fewer --servers or --nodes; or --kind rayjob",
        )
    environment = [{"name": key, "value": value} for key, value in _environment(job, told).items()]
    return _manifest(
        job,
        {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": name},
            "spec": {
                "runtimeRef": {"name": "torch-distributed"},
                "trainer": {
                    "image": image,
                    "command": ["torchrun", "--max-restarts", str(job.restarts), *command],
                    "numNodes": nodes + _apart(job),
                    "numProcPerNode": workers,
                    "env": [*environment, *_key_variable(job)],
                    "resourcesPerNode": {"requests": {"cpu": str(_cpus(job, nodes))}},
                },
            },
        },
    )


def ray_job(job: Job, command: Sequence[str], told: Sequence[str], nodes: int, image: str) -> str:
    """A RayJob of KubeRay: the run's home beside Ray's head, workers in pods of a group of their own. Servers that are
    not beside home are in pods of that group too: Ray chooses among them."""
    name, pods = _name(job.name), nodes + job.server_hosts - 1
    cpus = job.workers // nodes * (job.threads or 1) if pods == nodes else _cpus(job, nodes)
    options = [f"{flag(option)}={_text(job, option)}" for option in told if option not in (*_NOT_TOLD, *TRUTHS)]
    options += [flag(option) for option in told if option in TRUTHS]
    entry = ["paceline", "run", "--engine=ray", f"--workers={job.workers}", *options, "--", *command]
    try:
        version = {"rayVersion": metadata.version("ray")}
    except metadata.PackageNotFoundError:
        version = {}

    def pod(role: str, requests: dict[str, str]) -> dict[str, Any]:
        container = {
            "name": role,
            "image": image,
            "env": _key_variable(job),
            "resources": {"requests": requests},
        }
        return {"spec": {"containers": [container]}}

    return _manifest(
        job,
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": name},
            "spec": {
                "entrypoint": shlex.join(entry),
                "shutdownAfterJobFinishes": True,
                "rayClusterSpec": {
                    **version,
                    "headGroupSpec": {
                        "rayStartParams": {"num-cpus": "0"},  # no worker beside home, which has work of its own
                        "template": pod("ray-head", {"cpu": str(2 + len(job.servers_on(0)))}),
                    },
                    "workerGroupSpecs": [
                        {
                            "groupName": "workers",
                            "replicas": pods,
                            "minReplicas": pods,
                            "maxReplicas": pods,
                            "rayStartParams": {"num-cpus": str(cpus)},
                            "template": pod("ray-worker", {"cpu": str(cpus)}),
                        }
                    ],
                },
            },
        },
    )


def _cpus(job: Job, nodes: int) -> int:
    """Of each node."""
    for_workers = job.workers // nodes * (job.threads or 1)
    return max(for_workers, len(job.servers_on(0)) * (job.threads or 1)) if job.servers_apart else for_workers


def _apart(job: Job) -> int:
    """How many nodes have servers and no workers."""
    return job.server_hosts if job.servers_apart else 0


def _waiting(job: Job) -> int:
    """So many processes suffice on each of these: one for home, and one for each server that is not there."""
    return len(job.servers_on(1)) if job.server_hosts > 1 else 1


def _sources(sources: Mapping[str, str]) -> list[tuple[str, str]]:
    return [("run_dir" if field == "runs" else field, source) for field, source in sources.items()]


def _environment(job: Job, told: Sequence[str]) -> dict[str, str]:
    return {variable(option): _text(job, option) for option in told if option not in _NOT_TOLD}


def _text(job: Job, option: str) -> str:
    value = getattr(job, job_field(option))
    return str(int(value)) if option in TRUTHS else str(value)


def _name(text: str) -> str:
    """As both take it: small letters, digits and hyphens, a letter first."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:50].strip("-")
    return name if name[:1].isalpha() else f"job-{name}".strip("-")


def _key_variable(job: Job) -> list[dict[str, Any]]:
    if job.insecure:
        return []
    return [{"name": VARIABLE, "valueFrom": {"secretKeyRef": {"name": f"{_name(job.name)}-key", "key": _KEY}}}]


def _manifest(job: Job, value: dict[str, Any]) -> str:
    before = f"""# Before it is applied, once: the job key, as a Secret in the same namespace.
#   paceline key {_KEY} && kubectl create secret generic {_name(job.name)}-key --from-file={_KEY}
"""
    return f"{'' if job.insecure else before}{_yaml(value)}\n"


def _yaml(value: Any, indent: str = "") -> str:
    """Of dicts, lists and scalars; JSON's scalars are YAML's too."""
    match value:
        case dict() if value:
            return "\n".join(f"{indent}{key}:{_behind(item, indent)}" for key, item in value.items())
        case list() if value:
            return "\n".join(f"{indent}- {_yaml(item, indent + '  ').lstrip()}" for item in value)
    return indent + json.dumps(value, ensure_ascii=False)


def _behind(item: Any, indent: str) -> str:
    """What follows a key and its colon."""
    if isinstance(item, dict | list) and item:
        return "\n" + _yaml(item, indent + "  ")
    return " " + json.dumps(item, ensure_ascii=False)
