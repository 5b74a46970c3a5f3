"""The doctor: every finding has its fix, and a measurement between two sides finds what is there and what is wrong."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
from pathlib import Path

import pytest
from rich.console import Console as Screen

from paceline import __version__
from paceline.cli import doctor
from paceline.engine.doctor import OK, TROUBLE, Finding, Station, examine, open_door
from paceline.errors import ConfigError, HostError, UsageError
from paceline.transport.keys import FILE_VARIABLE, VARIABLE

KEYED = {VARIABLE: bytes(range(32)).hex()}


def found(findings: list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what == what)


def test_a_machine_that_can_train_has_no_trouble_and_what_is_amiss_has_a_fix(tmp_path: Path) -> None:
    findings = examine(KEYED, tmp_path / "runs" / "later")
    assert [finding for finding in findings if finding.state == TROUBLE] == []
    assert all(bool(finding.fix) == (finding.state != OK) for finding in findings)
    assert f"paceline {__version__}" in found(findings, "versions").told
    assert KEYED[VARIABLE] not in str(findings)
    assert found(findings, "job key").told.startswith("there, fingerprint ")


def test_what_is_wrong_is_trouble_and_the_others_are_still_told(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("no key")
    key.chmod(0o644)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        findings = examine({FILE_VARIABLE: str(key)}, tmp_path, port, "eth77")
    assert found(findings, "port").told == f"any address port {port} is in use"
    assert "eth77 fits no address" in found(findings, "interface").told
    assert found(findings, "job key").fix == f"chmod 600 {key}"
    assert found(findings, "disk").state == OK
    screen = Screen(file=io.StringIO(), width=200)
    assert doctor._show(findings, False, screen) == HostError.exit_code


@pytest.mark.parametrize("insecure", [False, True], ids=["tls", "plain"])
def test_two_sides_measure_the_link_between_them(insecure: bool, capsys: pytest.CaptureFixture[str]) -> None:
    told = io.StringIO()
    listening = threading.Event()

    class Told(io.StringIO):
        def write(self, text: str) -> int:
            told.write(text)
            if "listening at port" in told.getvalue():
                listening.set()
            return len(text)

    environment = {} if insecure else KEYED
    side = threading.Thread(target=doctor.listen, args=(environment, 0, insecure, Screen(file=Told()), 1))
    side.start()
    assert listening.wait(30)
    match = re.search(r"listening at port (\d+)", told.getvalue())
    assert match
    peer = f"127.0.0.1:{match[1]}"
    assert doctor.show_peer(environment, peer, insecure, True, Screen(file=io.StringIO())) == 0
    side.join(30)
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["link"]["told"].startswith(f"{peer} answers; {'plain text' if insecure else 'TLS 1.3'}")
    assert findings["peer"]["told"] == f"paceline {__version__}"
    assert re.fullmatch(r"[\d.]+ ms \(median of 100\)", findings["round trip"]["told"])
    assert re.fullmatch(r"[\d,]+ MB/s there, [\d,]+ MB/s back", findings["bandwidth"]["told"])
    assert ("insecure: whoever" in told.getvalue()) == insecure
    assert "another machine measures" in told.getvalue()


def test_another_key_no_key_and_nobody_there_are_told() -> None:
    refused: list[str] = []
    listener = open_door(Station(KEYED), 0, refused.append)
    other = Station({VARIABLE: bytes(range(1, 33)).hex()})
    with pytest.raises(HostError, match="another job key"):
        other.measure("127.0.0.1", listener.port)
    listener.close()
    assert len(refused) == 1
    with pytest.raises(ConfigError, match="need a job key"):
        Station({})
    with pytest.raises(HostError, match=r"within 0\.1 s: connection refused"):
        Station(KEYED).measure("127.0.0.1", listener.port, 0.1)


@pytest.mark.parametrize("text", ["node7", "node7:", ":80", "node7:http", "node7:0", "node7:65536", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="it must be HOST:PORT"):
        doctor.address(text)


def test_addresses() -> None:
    assert doctor.address("node7:29777") == ("node7", 29777)
    assert doctor.address("[::1]:80") == ("::1", 80)
