"""Everything paceline raises on purpose, with the exit code each ends in.

    PacelineError                1   something a person must read
    ├── ScriptError              1   the user's script raised, or one of its processes died of itself
    ├── UsageError               2   a flag, pace or count that does not exist or does not fit
    ├── ConfigError              3   a file, a batch or a model that cannot be trained as it is
    ├── HostError                4   the machine lacks something: memory, a port, a kernel feature
    ├── WorkersLost              5   fewer workers are left than the job needs
    │   └── NotBack              5   a worker elsewhere was lost, and has not come again in time
    ├── Diverged                 6   the loss is no longer a number
    │   └── Poisoned             6   one worker's gradients are not, and it cannot be replaced again
    └── Interrupted            130   Ctrl-C

An error is one block: what was wrong (with the value seen), why, and what to do.
"""

from __future__ import annotations


class PacelineError(Exception):
    """``what`` names the value seen and what is allowed; ``why`` and ``fix`` are optional sentences."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"why:   {self.why}")
        if self.fix:
            lines.append(f"fix:   {self.fix}")
        return "\n".join(lines)


def kind_of(name: str, otherwise: type[PacelineError] = PacelineError) -> type[PacelineError]:
    """The class of this name, as another process has told it."""
    kind = globals().get(name)
    return kind if isinstance(kind, type) and issubclass(kind, PacelineError) else otherwise


class ScriptError(PacelineError):
    """A worker's own code ended the run; ``traceback`` is the user's, already formatted, or empty."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "", traceback: str = "") -> None:
        super().__init__(what, why=why, fix=fix)
        self.traceback = traceback


class UsageError(PacelineError):
    exit_code = 2


class ConfigError(PacelineError):
    exit_code = 3


class HostError(PacelineError):
    exit_code = 4


class WorkersLost(PacelineError):
    exit_code = 5


class NotBack(WorkersLost):
    pass


class Diverged(PacelineError):
    exit_code = 6


class Poisoned(Diverged):
    """A worker ends of it alone; the run only where no other takes its place."""


class Interrupted(PacelineError):
    exit_code = 130
