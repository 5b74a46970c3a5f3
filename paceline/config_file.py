"""config.toml: a ``Job`` and the script it ran, as a flat TOML file that runs again as it is.

``dump`` writes every resolved value, ``load`` reads such a file or one written by hand with fewer keys.
TOML has no null: a field that is None is left out. Knows nothing of flags and of the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path

from paceline.config import Async, Bounded, Job, Local, Pace, Quorum, Sync, parse_pace
from paceline.errors import ConfigError, UsageError

JOB_KEYS = tuple(field.name for field in dataclasses.fields(Job))
KEYS = ("script", "args", *JOB_KEYS)


def dump(job: Job, script: str | None, args: tuple[str, ...]) -> str:
    """The text of config.toml; ``script`` is None for a run that was started from Python."""
    values: dict[str, object] = {"script": script, "args": args if script is not None else None}
    values |= {key: getattr(job, key) for key in JOB_KEYS}
    return "".join(f"{key} = {_toml(key, value)}\n" for key, value in values.items() if value is not None)


def load(path: Path) -> dict[str, object]:
    """The values of the keys that the file has, each of the type of the Job's field; ``args`` is a tuple.

    Ranges are checked by ``Job``, when flags and environment have had their say.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"config file {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} is {error.reason}") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}", fix="strings need quotes: pace = 'sync'") from None
    return {key: _checked(path, key, value) for key, value in raw.items()}


def _toml(key: str, value: object) -> str:
    match value:
        case Sync() | Quorum() | Bounded() | Async() | Local() | Path():
            return _string(key, str(value))
        case bool():
            return "true" if value else "false"
        case str():
            return _string(key, value)
        case tuple():
            return "[" + ", ".join(_string(key, item) for item in value) + "]"
        case int() | float():
            return repr(value)
    raise AssertionError(f"a Job's {key} of type {type(value).__name__} has no TOML form")


def _string(key: str, text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{key} has bytes that are not UTF-8: {text!r}", fix="give it a name that is text")
    # JSON's escapes are TOML's too; DEL is the one character that JSON leaves bare and TOML does not allow.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _checked(path: Path, key: str, value: object) -> object:
    if key not in KEYS:
        close = difflib.get_close_matches(key.replace("-", "_"), KEYS, n=1)
        raise ConfigError(
            f"{path} has a key {key!r}; the keys are: {', '.join(KEYS)}",
            fix=f"did you mean {close[0]!r}?" if close else "",
        )
    wanted, convert = _KINDS.get(key, _WHOLE)
    converted = convert(value)
    if converted is None:
        raise ConfigError(f"{path}: {key} is {value!r}; it must be {wanted}")
    return converted


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _texts(value: object) -> tuple[str, ...] | None:
    return tuple(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _pace(value: object) -> Pace | None:
    return parse_pace(value) if isinstance(value, str) else None


def _folder(value: object) -> Path | None:
    return Path(value) if isinstance(value, str) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _switch(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


_WHOLE: tuple[str, Callable[[object], object]] = ("a whole number", _whole)
_KINDS: dict[str, tuple[str, Callable[[object], object]]] = {
    "script": ("a string", _text),
    "args": ("a list of strings", _texts),
    "name": ("a string", _text),
    "pace": ("a string", _pace),
    "assign": ("a string", _text),
    "data": ("a string", _text),
    "staleness_damping": ("true or false", _switch),
    "engine": ("a string", _text),
    "ray_address": ("a string", _text),
    "interface": ("a string", _text),
    "insecure": ("true or false", _switch),
    "servers_apart": ("true or false", _switch),
    "return_timeout": ("a number", _number),
    "compensate": ("a number", _number),
    "clip": ("a number", _number),
    "hang_timeout": ("a number", _number),
    "until_loss": ("a number", _number),
    "runs": ("a string", _folder),
}
