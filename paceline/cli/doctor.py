"""``paceline doctor``: findings and their fixes, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console as Screen
from rich.table import Table
from rich.text import Text

from paceline.cli.answers import print_json, print_whole
from paceline.errors import HostError, UsageError

if TYPE_CHECKING:
    from paceline.engine.doctor import Finding

PORT = 29777  # where `--listen` listens, unless told otherwise
_STYLES = {"ok": "green", "advice": "yellow", "trouble": "red"}


def show_machine(
    environment: Mapping[str, str], folder: Path, port: int, interface: str | None, json: bool, screen: Screen
) -> int:
    """What this machine has. Exit code 4 if something must be mended first."""
    from paceline.engine.doctor import examine

    return _show(examine(environment, folder, port, interface), json, screen)


def show_peer(environment: Mapping[str, str], peer: str, insecure: bool, json: bool, screen: Screen) -> int:
    """What the link to HOST:PORT can do. Raises HostError, ConfigError, UsageError."""
    from paceline.engine.doctor import Station

    host, port = address(peer)
    return _show(Station(environment, insecure=insecure).measure(host, port), json, screen)


def listen(environment: Mapping[str, str], port: int, insecure: bool, screen: Screen, links: int | None = None) -> int:
    """Answers `paceline doctor --peer` from other machines until Ctrl-C, or until so many links have ended."""
    from paceline.engine.doctor import Station, open_door

    def tell(line: str) -> None:
        screen.print(line, soft_wrap=True)

    station = Station(environment, insecure=insecure)
    listener = open_door(station, port, tell)
    try:
        tell(f"listening at port {listener.port}; on the other machine: paceline doctor --peer HOST:{listener.port}")
        if insecure:
            tell("insecure: whoever reaches this port may speak, and all can be read on the way")
        station.answer(lambda: tell("another machine measures"), links)
    finally:
        listener.close()
    return 0


def address(text: str) -> tuple[str, int]:
    """``host:port``, ``[::1]:port``. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UsageError(f"--peer {text!r} is no address; it must be HOST:PORT, for example node7:29777")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _show(findings: Sequence[Finding], json: bool, screen: Screen) -> int:
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        table = Table.grid(padding=(0, 2, 0, 0))
        for finding in findings:
            told = Text(finding.told)
            if finding.fix:
                told.append(f"\nfix: {finding.fix}", _STYLES[finding.state])
            table.add_row(Text(finding.state, _STYLES[finding.state]), finding.what, told)
        print_whole(table, screen)
    return HostError.exit_code if any(finding.state == "trouble" for finding in findings) else 0
