"""``python -m tests.simulation.mutants [--only TEXT] [--seeds N]``: can the simulation fail?

Each mutant is one of the protocol's modules with one thing wrong: a comparison flipped or its bound moved, a guard or
an effect dropped, ``and`` for ``or``, a ``not`` left out, a constant one too large. It is put in place in memory, in a
process of its own, and schedules are run until one fails. One that survives them is tried on the module's unit tests,
which is counted apart. A mutant that survives is explained in README.md, or a gap.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from paceline.data import ledger
from paceline.protocol import deals, hosts, log, rounds
from tests.simulation.plans import WORLDS
from tests.simulation.world import World

MODULES = (rounds, deals, log, ledger)
UNPLAYED = (hosts,)  # no schedule has workers elsewhere: by unit tests alone
SEEDS = 1000
_TESTS = Path(__file__).parents[1] / "unit"
UNIT_TESTS = {
    rounds: _TESTS / "protocol" / "test_rounds.py",
    deals: _TESTS / "protocol" / "test_deals.py",
    hosts: _TESTS / "protocol" / "test_hosts.py",
    log: _TESTS / "protocol" / "test_log.py",
    ledger: _TESTS / "data" / "test_ledger.py",
}
_LIMIT_S = 120.0
_ROOM_BYTES = 3 << 30  # a loop that never ends may fill memory; threads of which few are there at once take 1 GiB

_FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_MOVED: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True)
class Mutant:
    module: ModuleType
    function: str  # dotted, within the module
    line: int
    what: str
    make: Callable[[], ast.Module]

    @property
    def name(self) -> str:
        return f"{self.module.__name__.rpartition('.')[2]}.{self.function}: {self.what}"

    @property
    def worlds(self) -> tuple[str, ...]:
        """Where it matters most."""
        in_rounds = self.module is rounds and self.function not in ("quorum_met", "within_bound")
        return WORLDS if self.module in (deals, ledger) else ("rounds",) if in_rounds else ("log",)

    @property
    def place(self) -> str:
        return f"{Path(self.module.__file__ or '').name}:{self.line}"

    def put_in_place(self) -> None:
        """The functions keep their identity, so that whoever has imported them calls the mutant."""
        code = compile(self.make(), self.module.__file__ or "", "exec")
        _function(self.module, self.function).__code__ = _code(code, self.function)


def mutants() -> Iterator[Mutant]:
    for module in (*MODULES, *UNPLAYED):
        source = Path(module.__file__ or "").read_text()
        tree = ast.parse(source)
        for path, function in _functions(tree):
            for number, node in enumerate(ast.walk(function)):
                for what, change in _changes(node):
                    make = partial(_make, tree, path, number, change)
                    yield Mutant(module, path, getattr(node, "lineno", 0), what, make)


_Change = Callable[[ast.AST, Any], None]  # the function, and the node in it that becomes another


def _make(tree: ast.Module, path: str, number: int, change: _Change) -> ast.Module:
    changed = copy.deepcopy(tree)
    twin = dict(_functions(changed))[path]
    change(twin, list(ast.walk(twin))[number])
    return ast.fix_missing_locations(changed)


def _changes(node: ast.AST) -> Iterator[tuple[str, _Change]]:
    told = ast.unparse(node).partition("\n")[0] if isinstance(node, ast.expr | ast.stmt) else ""
    match node:
        case ast.Compare(ops=[op]):
            yield f"{told} is flipped", lambda _, twin: _set_op(twin, _FLIPPED[type(op)]())
            if type(op) in _MOVED:
                yield f"{told} has its bound moved", lambda _, twin: _set_op(twin, _MOVED[type(op)]())
        case ast.BoolOp(op=op):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield f"{told} has and and or swapped", lambda _, twin: setattr(twin, "op", other)
        case ast.UnaryOp(op=ast.Not()):
            yield f"{told} loses its not", lambda _, twin: _replace(twin, ast.Call(_name("bool"), [twin.operand], []))
        case ast.If(body=[*_, ast.Return() | ast.Continue()], orelse=[]):
            yield f"{told} is dropped", _drop
        case ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield f"{told} is dropped", _drop
        case ast.Assign(targets=targets) if any(_is_effect(target) for target in targets):
            yield f"{told} is dropped", _drop
        case ast.BinOp(op=ast.Add() | ast.Sub(), right=ast.Constant(value=1)):
            yield f"{told} is one off", lambda _, twin: setattr(twin, "right", ast.Constant(2))


def _is_effect(target: ast.expr) -> bool:
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    return all(isinstance(one, ast.Subscript | ast.Attribute) for one in targets)


def _set_op(twin: ast.Compare, op: ast.cmpop) -> None:
    twin.ops = [op]


def _name(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _replace(twin: Any, new: ast.expr) -> None:
    """Make an expression another in place: its parent is not known."""
    twin.op, twin.operand = ast.UAdd(), new


def _drop(function: ast.AST, twin: ast.stmt) -> None:
    for node in ast.walk(function):
        for field in ("body", "orelse"):
            statements = getattr(node, field, None)
            if isinstance(statements, list) and twin in statements:
                statements[statements.index(twin)] = ast.Pass()


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Those that do something: not those of protocols, nor what only lays out memory."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not any(ast.unparse(base) == "Protocol" for base in node.bases):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def _function(module: ModuleType, path: str) -> FunctionType:
    found: Any = module
    for name in path.split("."):
        found = vars(found)[name]
    if isinstance(found, property):
        found = found.fget
    assert isinstance(found, FunctionType)
    return found


def _code(code: CodeType, path: str) -> CodeType:
    for name in path.split("."):
        code = next(const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == name)
    return code


def try_out(mutant: Mutant, seeds: int = SEEDS) -> str:
    """How it was caught by schedules, or "" if it survives."""
    return _told(_live, mutant, seeds)


def try_on_units(mutant: Mutant) -> str:
    """How it was caught by the unit tests of its module, or "" if it survives."""
    return _told(_live_through_units, mutant)


def _told(live: Callable[..., None], *given: Any) -> str:
    """What ``live`` has to tell, in a process of its own; None from it says that it is getting on."""
    mine, its = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=live, args=(*given, its), daemon=True)
    child.start()
    told = None
    while told is None:
        told = mine.recv() if mine.poll(_LIMIT_S) else "hangs"
    child.kill()
    child.join()
    return str(told)


def _live(mutant: Mutant, seeds: int, told: Connection) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM_BYTES, used + _ROOM_BYTES))
    mutant.put_in_place()
    for seed in range(seeds):
        told.send(None)
        try:
            worlds = mutant.worlds if seed > 20 else WORLDS
            World(seed, worlds[seed % len(worlds)]).run()
        except BaseException as error:  # noqa: BLE001  whatever goes wrong, somebody would have seen it
            text = str(error).partition("\n")[0][:80]
            told.send(f"seed {seed}: {type(error).__name__} {text}")
            return
    told.send("")


def _live_through_units(mutant: Mutant, told: Connection) -> None:
    mutant.put_in_place()
    options = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        failed = pytest.main([*options, "--hypothesis-seed=0", str(UNIT_TESTS[mutant.module])])
    told.send("a unit test" if failed else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutants")
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    asked = parser.parse_args()
    begun = time.monotonic()
    survivors, count, by_units = [], 0, 0
    for mutant in mutants():
        if asked.only not in mutant.name:
            continue
        count += 1
        caught = "" if mutant.module in UNPLAYED else try_out(mutant, asked.seeds)
        if not caught:
            caught = try_on_units(mutant)
            by_units += bool(caught)
        print(f"{'killed  ' if caught else 'SURVIVED'} {mutant.place:14} {mutant.name}  {caught}", flush=True)
        if not caught:
            survivors.append(mutant)
    seconds = time.monotonic() - begun
    killed = count - len(survivors) - by_units
    print(f"{killed} of {count} mutants killed in {seconds:.0f} s, {by_units} more by unit tests; survivors:")
    for mutant in survivors:
        print(f"  {mutant.place:14} {mutant.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
