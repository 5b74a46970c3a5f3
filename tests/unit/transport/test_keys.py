"""Job keys: only their owner can read them, nothing shows them, and every mistake is told without them."""

from __future__ import annotations

import base64
import copy
import logging
import os
import pickle  # noqa: TID251 (only to see that it is refused)
import socket
from pathlib import Path

import pytest

from paceline.errors import ConfigError
from paceline.transport.keys import FILE_VARIABLE, KEY_BYTES, VARIABLE, JobKey, job_key, new_job_key, read_job_key

SECRET = bytes(range(KEY_BYTES))
SHOWN = (SECRET.hex(), base64.b64encode(SECRET).decode(), repr(SECRET)[2:20])


def test_a_new_key_is_read_back_and_is_another_every_time(tmp_path: Path) -> None:
    key = new_job_key(tmp_path / "job.key")
    assert (tmp_path / "job.key").stat().st_mode & 0o777 == 0o600
    assert read_job_key(tmp_path / "job.key") == key
    assert job_key({FILE_VARIABLE: str(tmp_path / "job.key")}) == key
    assert new_job_key(tmp_path / "other.key") != key


def test_a_key_is_not_overwritten(tmp_path: Path) -> None:
    key = new_job_key(tmp_path / "job.key")
    with pytest.raises(ConfigError, match="exists already"):
        new_job_key(tmp_path / "job.key")
    assert read_job_key(tmp_path / "job.key") == key


@pytest.mark.parametrize(
    "text", [SECRET.hex(), SECRET.hex().upper(), f" {SHOWN[1]}\n", base64.urlsafe_b64encode(SECRET).decode()]
)
def test_hex_and_base64_in_the_environment_are_the_same_key(text: str) -> None:
    assert job_key({VARIABLE: text}) == JobKey(SECRET)


def test_without_a_key_there_is_none() -> None:
    assert job_key({}) is None
    assert job_key({VARIABLE: "", FILE_VARIABLE: ""}) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x" * 64, "64 characters that are no key"),
        ("short!", "6 characters that are no key"),
        (SECRET.hex()[:-2], "62 characters that are no key"),
        (base64.b64encode(SECRET + b"a").decode(), "33 bytes"),
        ("00" * 32, "32 times the same byte"),
        ("é" * 40, "40 characters that are no key"),
    ],
)
def test_what_is_no_key_is_refused_without_being_shown(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job_key({VARIABLE: text})
    assert says in str(caught.value)
    assert text not in str(caught.value)


def test_two_keys_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both set"):
        job_key({VARIABLE: SECRET.hex(), FILE_VARIABLE: str(tmp_path)})


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o700])
def test_a_file_that_others_may_use_is_refused_with_the_command_that_mends_it(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "job.key"
    new_job_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        read_job_key(path)
    assert f"has mode {mode:04o}; it must be 0600" in str(caught.value)
    assert caught.value.fix == f"chmod 600 {path}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.key"
    new_job_key(path)
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345; it must belong to user 0"):
        read_job_key(path)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
    (tmp_path / "large").touch(0o600)
    (tmp_path / "large").write_bytes(b"a" * 10**6)
    for name in ("pipe", "socket", "large", ".", "absent"):
        with pytest.raises(ConfigError, match="the job key's file"):
            read_job_key(tmp_path / name)


def test_nothing_shows_a_key(caplog: pytest.LogCaptureFixture) -> None:
    key = JobKey(SECRET)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").info("%s %r %s", key, key, [key])
    for text in (str(key), repr(key), repr([key]), caplog.text, key.fingerprint, f"{key}"):
        assert not any(secret in text for secret in SHOWN)
    for travel in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="does not travel"):
            travel(key)


def test_the_same_key_derives_the_same_and_another_purpose_or_key_something_else() -> None:
    key, other = JobKey(SECRET), JobKey(SECRET[::-1])
    assert key.derive("a") == JobKey(SECRET).derive("a")
    assert len({key.derive("a"), key.derive("b"), other.derive("a"), SECRET}) == 4
    assert key.fingerprint == JobKey(SECRET).fingerprint != other.fingerprint
