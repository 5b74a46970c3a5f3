"""How mistakes and failures are shown: one block on stderr, and the exit code that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from paceline.errors import PacelineError, ScriptError, UsageError

if TYPE_CHECKING:
    from cyclopts import CycloptsError


def nearest(text: str, known: Iterable[str]) -> str:
    """``did you mean 'run'?``, or nothing if no known word is close."""
    close = difflib.get_close_matches(text, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def report(error: PacelineError, stderr: TextIO) -> None:
    """The script's own traceback first, then ``error: / why: / fix:``."""
    if isinstance(error, ScriptError) and error.traceback:
        stderr.write(error.traceback.rstrip("\n") + "\n\n")
    stderr.write(f"error: {error}\n")
    stderr.flush()


def misuse(error: CycloptsError) -> UsageError:
    """What cyclopts found wrong with a command line, in our words."""
    import cyclopts

    match error:
        case cyclopts.UnknownCommandError():
            assert error.app is not None
            word = (error.unused_tokens or ["?"])[0]
            known = [name for name in error.app.resolved_commands() if not name.startswith("-")]
            kind = "option" if word.startswith("-") else "command"
            what = f"unknown {kind} {word!r}" + (f"; the commands are: {', '.join(known)}" if kind == "command" else "")
            return UsageError(what, fix=nearest(word, [*known, "--help", "--version"]) or _help(error))
        case cyclopts.UnknownOptionError():
            word = (error.token.keyword or error.token.value).partition("=")[0]
            known = [name for argument in error.argument_collection for name in argument.names]
            return UsageError(f"unknown option {word!r}", fix=nearest(word, known) or _help(error))
        case cyclopts.MissingArgumentError():
            assert error.argument is not None
            return UsageError(f"{error.argument.name} needs a value", fix=_help(error))
        case cyclopts.RepeatArgumentError():
            return UsageError(f"{error.token.keyword} is given more than once", fix="give it once")
        case cyclopts.UnusedCliTokensError():
            extra = " ".join(error.unused_tokens or [])
            return UsageError(f"there is no place for {extra!r} here", fix=_help(error))
    return UsageError(str(error).strip().rstrip("."), fix=_help(error))


def _help(error: CycloptsError) -> str:
    return " ".join(["paceline", *(error.command_chain or []), "--help"])
