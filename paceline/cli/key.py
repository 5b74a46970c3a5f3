"""``paceline key``: makes a job key."""

from __future__ import annotations

from pathlib import Path

from paceline.transport.keys import FILE_VARIABLE, new_job_key


def make_key(path: Path) -> int:
    """The command ``key``; returns the exit code. The key itself is not shown. Raises ConfigError."""
    key = new_job_key(path)
    print(f"{path} is a job key (fingerprint {key.fingerprint}), which only you can read")
    print(f"next: copy it to every host of the job, and set {FILE_VARIABLE}={path} there")
    return 0
