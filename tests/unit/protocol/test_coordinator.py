"""What the coordinator does about what happens, as tables of events and effects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.protocol import messages
from paceline.protocol.coordinator import Coordinator
from paceline.protocol.crew import crew_word
from paceline.protocol.effects import (
    Abort,
    Allocate,
    AskToLeave,
    Came,
    Died,
    Done,
    Effect,
    Event,
    Give,
    GiveUp,
    Interrupted,
    Open,
    Replace,
    Serve,
    Tell,
    Wished,
)

SAID = messages.Failed("ScriptError", "worker 1 raised ValueError: no", traceback="Traceback ...")


def wrap(rank: int, number: int = 1, kind: str = "exchange", what: str = "SGD over 7 parameters") -> Came:
    return Came("worker", rank, messages.Wrap(number, kind, f"spec of {rank}".encode(), 100 + rank, what))


def finished(rank: int) -> Came:
    return Came("worker", rank, messages.Finished())


def died(rank: int, status: int = 0, role: str = "worker", pid: int = 4321) -> Died:
    return Died(role, rank, pid, status)


def steps(rank: int) -> Came:
    return Came("worker", rank, messages.Steps(b""))


def effects(coordinator: Coordinator, *events: Event) -> list[Effect]:
    return [effect for event in events for effect in coordinator.handle(event)]


def aborts(found: list[Effect]) -> list[Abort]:
    return [effect for effect in found if isinstance(effect, Abort)]


def the_abort(found: list[Effect]) -> Abort:
    (abort,) = aborts(found)
    return abort


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_memory_is_given_once_when_the_last_worker_asks(order: tuple[int, ...]) -> None:
    coordinator = Coordinator(3, 0)
    assert effects(coordinator, *(wrap(rank) for rank in order[:2])) == []
    (given_,) = coordinator.handle(wrap(order[2]))
    assert given_ == Allocate(
        messages.Wrap(1, "exchange", b"spec of 0", 100, "SGD over 7 parameters"), servers=False, workers=(0, 1, 2)
    )


@pytest.mark.parametrize(
    ("kind", "servers", "to_servers"), [("exchange", 2, True), ("copy", 2, False), ("copy", 0, False)]
)
def test_servers_get_exchanges_and_no_copies(kind: str, servers: int, to_servers: bool) -> None:
    (given_,) = effects(Coordinator(2, servers), wrap(0, kind=kind), wrap(1, kind=kind))
    assert isinstance(given_, Allocate)
    assert given_.servers is to_servers


def test_one_worker_gets_its_memory_at_once() -> None:
    assert len(Coordinator(1, 0).handle(wrap(0))) == 1


def test_collectives_of_different_numbers_are_kept_apart() -> None:
    coordinator = Coordinator(2, 0)
    assert effects(coordinator, wrap(0, 1), wrap(1, 1)) == [Allocate(wrap(0, 1).message, False, (0, 1))]
    assert coordinator.handle(wrap(1, 2)) == []
    assert coordinator.handle(wrap(0, 2)) == [Allocate(wrap(0, 2).message, False, (0, 1))]


def test_kinds_that_differ_abort_and_name_the_worker() -> None:
    found = effects(
        Coordinator(3, 0), wrap(0), wrap(2, kind="copy", what="4 tensors"), wrap(1)
    )  # worker 2 wraps a model where the others wrap an optimizer
    abort = the_abort(found)
    assert (abort.role, abort.rank, abort.failure.kind) == ("worker", 2, "ConfigError")
    assert abort.failure.what == "worker 2 wraps 4 tensors where worker 0 wraps SGD over 7 parameters"
    assert not any(isinstance(effect, Allocate) for effect in found)


@pytest.mark.parametrize("finished_first", [True, False])
def test_a_worker_that_ended_while_others_wait_in_a_wrap_aborts(finished_first: bool) -> None:
    events: list[Event] = [finished(1), wrap(0)] if finished_first else [wrap(0), finished(1)]
    abort = the_abort(effects(Coordinator(2, 0), *events))
    assert (abort.rank, abort.failure.kind) == (1, "ConfigError")
    assert abort.failure.what == (
        "worker 1 ended without the run.wrap that worker 0 waits in (SGD over 7 parameters, call 1)"
    )
    assert "run.is_main" in abort.failure.fix


def test_a_worker_that_ended_while_nobody_waits_is_no_failure() -> None:
    coordinator = Coordinator(2, 0)
    found = effects(coordinator, wrap(0), wrap(1), finished(1))
    assert aborts(found) == []
    assert found[-1] == Tell("leave", "worker 1 has finished", "worker", 1)


@pytest.mark.parametrize(
    ("status", "how", "why"),
    [
        (-9, "worker 1 (pid 4321) was killed by SIGKILL", "when memory runs out"),
        (-11, "worker 1 (pid 4321) was killed by SIGSEGV", "native code"),
        (-7, "worker 1 (pid 4321) was killed by SIGBUS", "memory that could not be had"),
        (-15, "worker 1 (pid 4321) was killed by SIGTERM", ""),
        (-63, "worker 1 (pid 4321) was killed by signal 63", ""),
        (3, "worker 1 (pid 4321) exited with status 3 in the middle of the run", ""),
        (0, "worker 1 (pid 4321) exited with status 0 in the middle of the run", ""),
    ],
)
def test_a_death_is_told_with_worker_pid_and_signal(status: int, how: str, why: str) -> None:
    found = effects(Coordinator(2, 0), wrap(0), wrap(1), died(1, status))
    abort = the_abort(found)
    assert (abort.role, abort.rank, abort.failure.kind) == ("worker", 1, "WorkersLost")
    assert abort.failure.what == how
    assert why in abort.failure.why
    assert "logs/worker-1.log" in abort.failure.fix
    assert Tell("died", how, "worker", 1) in found


def test_a_failure_said_by_a_worker_is_passed_on_as_it_is() -> None:
    found = Coordinator(2, 0).handle(Came("worker", 1, SAID))
    assert found == [Tell("failed", f"worker 1: {SAID.what}", "worker", 1), Abort("worker", 1, SAID)]


@pytest.mark.parametrize(
    "later",
    [
        Came("worker", 0, messages.Failed("ConfigError", "another")),
        died(1, 1),
        died(0, -9),
        died(0, 75),
        Died("server", 0, 99, 75),
        wrap(0),
        finished(0),
    ],
)
def test_only_the_first_failure_is_reported(later: Event) -> None:
    coordinator = Coordinator(2, 1)
    assert len(aborts(coordinator.handle(Came("worker", 1, SAID)))) == 1
    assert aborts(coordinator.handle(later)) == []


def test_the_run_is_done_when_all_workers_have_ended() -> None:
    coordinator = Coordinator(2, 1)
    assert Done() not in effects(coordinator, wrap(0), wrap(1), finished(0), finished(1), died(1))
    assert coordinator.handle(died(0)) == [Done()]


def test_a_script_that_never_wrapped_is_told_so_at_its_end() -> None:
    told, done = effects(Coordinator(2, 0), finished(0), finished(1), died(0), died(1))[-2:]
    assert done == Done()
    assert isinstance(told, Tell)
    assert told.kind == "warning"
    assert "never called run.wrap" in told.text


def test_a_worker_that_fails_after_its_end_is_still_a_failure() -> None:
    """Finished was said, then an exit function crashed."""
    found = effects(Coordinator(1, 0), finished(0), died(0, -11))
    assert the_abort(found).failure.what == "worker 0 (pid 4321) was killed by SIGSEGV"
    assert Done() not in found


def test_a_server_that_dies_in_the_middle_aborts() -> None:
    abort = the_abort(effects(Coordinator(2, 2), wrap(0), wrap(1), died(1, -9, "server")))
    assert (abort.role, abort.rank) == ("server", 1)
    assert abort.failure.what == "server 1 (pid 4321) was killed by SIGKILL"
    assert "logs/server-1.log" in abort.failure.fix


def test_a_server_may_not_even_exit_cleanly_before_the_workers() -> None:
    assert aborts(effects(Coordinator(1, 1), died(0, 0, "server")))


def test_a_server_that_ends_after_the_workers_is_no_failure() -> None:
    coordinator = Coordinator(2, 1)
    effects(coordinator, finished(0), finished(1), died(0), died(1))
    assert coordinator.handle(died(0, 0, "server")) == []


def test_the_reason_of_the_end_is_kept_and_told() -> None:
    coordinator = Coordinator(1, 0)
    found = coordinator.handle(Came("worker", 0, messages.Ended("7 steps done")))
    assert found == [Tell("stop", "training is over: 7 steps done")]
    assert coordinator.reason == "7 steps done"


@pytest.mark.parametrize(
    "message",
    [
        messages.Steps(b""),
        messages.Logged(1, {"a": 1.0}),
        messages.LoggedBehind(1, None, 1, {}),
        messages.Pass(0, 0, 3),
        messages.Ready({}),
    ],
)
def test_what_is_not_its_business_has_no_effect(message: messages.Any) -> None:
    assert Coordinator(1, 0).handle(Came("worker", 0, message)) == []


# --- deaths that a run survives ---


def test_a_worker_that_dies_is_replaced_so_often_and_then_the_run_fails() -> None:
    coordinator = Coordinator(2, 0, restarts=2)
    effects(coordinator, wrap(0), wrap(1))
    for _ in range(2):
        told, replaced = coordinator.handle(died(1, -9))
        assert told == Tell("died", "worker 1 (pid 4321) was killed by SIGKILL; another takes its place", "worker", 1)
        assert replaced == Replace(1)
    abort = the_abort(coordinator.handle(died(1, -9)))
    assert abort.failure.what == "worker 1 (pid 4321) was killed by SIGKILL"
    assert abort.failure.why == "the 3rd time without getting on in between"


@pytest.mark.parametrize(("reports", "replaced"), [(0, False), (1, False), (2, True)])
def test_who_gets_on_in_between_is_replaced_again(reports: int, replaced: bool) -> None:
    """The first report may be what a process says as it ends."""
    coordinator = Coordinator(2, 0, restarts=1)
    effects(coordinator, wrap(0), wrap(1), died(1, -9), *[steps(1)] * reports)
    assert (Replace(1) in coordinator.handle(died(1, -9))) is replaced


def test_others_deaths_are_no_business_of_ones_own() -> None:
    coordinator = Coordinator(3, 0, restarts=1)
    found = effects(coordinator, wrap(0), wrap(1), wrap(2), died(0, -9), died(1, -9), died(2, -9))
    assert [effect for effect in found if isinstance(effect, Replace)] == [Replace(0), Replace(1), Replace(2)]


def test_a_newcomer_gets_the_memory_that_the_others_have() -> None:
    coordinator = Coordinator(2, 0, restarts=1)
    effects(coordinator, wrap(0), wrap(1), wrap(0, 2, "copy"), died(1, -9))
    assert coordinator.handle(wrap(1)) == [Give(1, 1)]
    assert coordinator.handle(wrap(1, 2, "copy")) == [Allocate(wrap(0, 2, "copy").message, False, (0, 1))]


def test_what_the_dead_had_asked_for_is_asked_for_again() -> None:
    coordinator = Coordinator(2, 0, restarts=1)
    assert effects(coordinator, wrap(1), died(1, -9))[-1] == Replace(1)
    assert coordinator.handle(wrap(0)) == []
    assert coordinator.handle(wrap(1)) == [Allocate(wrap(0).message, False, (0, 1))]


def test_a_newcomer_that_wraps_something_else_aborts() -> None:
    coordinator = Coordinator(2, 0, restarts=1)
    effects(coordinator, wrap(0), wrap(1), died(1, -9))
    assert the_abort(coordinator.handle(wrap(1, kind="copy", what="4 tensors"))).rank == 1


def test_the_others_go_on_while_they_are_enough() -> None:
    coordinator = Coordinator(4, 0, min_workers=2)
    told, given_up = effects(coordinator, died(3, -9))
    assert isinstance(told, Tell)
    assert told.text.endswith("; the other 3 go on without it")
    assert given_up == GiveUp(3)
    assert GiveUp(2) in coordinator.handle(died(2, -9))
    assert coordinator.handle(wrap(0)) == []
    assert coordinator.handle(wrap(1)) == [Allocate(wrap(0).message, False, (0, 1))]
    assert aborts(coordinator.handle(died(1, -9)))


def test_a_lost_worker_elsewhere_is_waited_for_once() -> None:
    gone = Came("worker", 1, messages.Failed("WorkersLost", "worker 1 is lost"))
    late = Came("worker", 1, messages.Failed("NotBack", "worker 1 has not come within 60 s"))
    coordinator = Coordinator(2, 0, restarts=3, min_workers=1)
    assert effects(coordinator, gone, died(1, 1))[-1] == Replace(1)
    told, given_up = effects(coordinator, late, died(1, 1))
    assert isinstance(told, Tell)
    assert told.text == "worker 1 has not come within 60 s; the other goes on without it"
    assert given_up == GiveUp(1)


def test_a_wrap_waits_no_more_for_who_is_given_up() -> None:
    coordinator = Coordinator(3, 0, min_workers=1)
    found = effects(coordinator, wrap(1), wrap(2), died(0, -9))
    assert found[1:] == [GiveUp(0), Allocate(wrap(1).message, False, (1, 2))]


def test_the_run_is_done_when_those_that_are_left_have_ended() -> None:
    coordinator = Coordinator(2, 1, min_workers=1)
    found = effects(coordinator, wrap(0), wrap(1), died(1, -9), finished(0))
    assert Done() not in found
    assert coordinator.handle(died(0)) == [Done()]


def test_what_a_script_raises_once_is_forgiven_and_twice_is_not() -> None:
    coordinator = Coordinator(2, 0, restarts=3)
    effects(coordinator, wrap(0), wrap(1), steps(1), steps(1))
    assert coordinator.handle(Came("worker", 1, SAID)) == [Tell("raised", f"worker 1: {SAID.what}", "worker", 1)]
    told, replaced = coordinator.handle(died(1, 1))
    assert told == Tell("died", "worker 1 raised ValueError: no; another takes its place", "worker", 1)
    assert replaced == Replace(1)
    assert the_abort(coordinator.handle(Came("worker", 1, SAID))).failure == SAID


def test_what_a_script_raises_at_its_start_is_told_at_once() -> None:
    coordinator = Coordinator(2, 0, restarts=3)
    effects(coordinator, wrap(0), wrap(1), steps(1))
    assert the_abort(coordinator.handle(Came("worker", 1, SAID))).failure == SAID


def test_nobody_is_replaced_once_the_user_has_asked_for_the_end() -> None:
    coordinator = Coordinator(2, 0, restarts=3)
    allocated, told = effects(coordinator, wrap(0), wrap(1), Interrupted(), Interrupted())
    assert allocated == Allocate(wrap(0).message, False, (0, 1))
    assert isinstance(told, Tell)
    assert told.kind == "interrupt"
    assert coordinator.handle(died(1, -9))[1:] == [GiveUp(1)]
    assert coordinator.handle(died(0, -9))[1:] == [GiveUp(0), Done()]
    assert coordinator.was_interrupted


@pytest.mark.parametrize("reasons", [[], ["out of data"], ["interrupted"], ["out of data", "interrupted"]])
def test_a_run_that_was_over_when_ctrl_c_came_was_not_interrupted(reasons: list[str]) -> None:
    coordinator = Coordinator(2, 0)
    effects(coordinator, Interrupted())
    for rank, reason in enumerate(reasons):
        coordinator.handle(Came("worker", rank, messages.Ended(reason)))
    effects(coordinator, finished(0), finished(1))
    assert coordinator.was_interrupted == ("interrupted" in reasons)


RANKS = st.integers(0, 2)
EVENTS = st.one_of(
    st.builds(wrap, RANKS, st.integers(1, 3), st.sampled_from(["exchange", "copy"])),
    st.builds(finished, RANKS),
    st.builds(died, RANKS, st.sampled_from([0, 1, -9])),
    st.builds(lambda rank: Died("server", rank, 5, 0), st.integers(0, 1)),
    st.builds(lambda rank: Came("worker", rank, SAID), RANKS),
)


@given(st.lists(EVENTS, max_size=25), st.integers(0, 2), st.integers(1, 3))
def test_whatever_happens_at_most_one_failure_is_told(events: list[Event], restarts: int, least: int) -> None:
    found = effects(Coordinator(3, 2, restarts=restarts, min_workers=least), *events)
    assert len(aborts(found)) <= 1
    told = [effect for effect in found if isinstance(effect, Tell) and effect.kind == "failed"]
    assert len(told) == len(aborts(found))


POISONED = messages.Failed("Poisoned", "worker 1: the gradient of step 7 was not finite", "most are", "look")


def out(rank: int) -> list[Event]:
    return [Came("worker", rank, POISONED), died(rank, 1)]


def test_who_is_out_for_its_gradients_is_replaced_as_often_as_one_that_dies_whether_it_gets_on_or_not() -> None:
    coordinator = Coordinator(2, 0, restarts=2)
    for _ in range(2):
        effects(coordinator, steps(1), steps(1), steps(1))
        told, replaced = effects(coordinator, *out(1))
        assert told == Tell("died", f"{POISONED.what}; another takes its place", "worker", 1)
        assert replaced == Replace(1)
    effects(coordinator, steps(1), steps(1), steps(1))
    assert the_abort(effects(coordinator, *out(1))) == Abort("worker", 1, POISONED)


def test_who_is_out_and_not_replaced_is_given_up_where_enough_are_left() -> None:
    assert effects(Coordinator(2, 0, min_workers=1), *out(1))[-1] == GiveUp(1)


# --- workers that are added, and leave ---


def joined(rank: int) -> Came:
    return Came("worker", rank, messages.Joined(1))


def test_added_workers_come_to_the_lowest_places_and_the_highest_leave() -> None:
    coordinator = Coordinator(2, 0)
    effects(coordinator, wrap(0), wrap(1))
    assert coordinator.handle(Wished(4)) == [Open(2), Open(3)]
    assert coordinator.coming == {2, 3}
    assert coordinator.handle(wrap(2)) == [Give(2, 1)]
    effects(coordinator, joined(2), joined(3))
    assert coordinator.handle(Wished(1)) == [AskToLeave(3), AskToLeave(2), AskToLeave(1)]


def test_a_wrap_waits_for_who_is_added_and_not_for_who_leaves() -> None:
    coordinator = Coordinator(2, 0)
    effects(coordinator, wrap(0), wrap(1), Wished(3), wrap(2))
    assert effects(coordinator, wrap(0, 2), wrap(1, 2)) == []
    assert coordinator.handle(wrap(2, 2)) == [Allocate(wrap(0, 2).message, False, (0, 1, 2))]
    effects(coordinator, joined(2), Wished(1), wrap(0, 3), finished(2))
    assert coordinator.handle(finished(1)) == [Allocate(wrap(0, 3).message, False, (0,))]


def test_who_has_left_when_asked_to_is_no_loss_and_may_come_again() -> None:
    coordinator = Coordinator(2, 0, restarts=0)
    effects(coordinator, wrap(0), wrap(1), Wished(1), finished(1))
    assert coordinator.handle(died(1)) == [Tell("leave", "worker 1 has left; 1 goes on", "worker", 1)]
    assert coordinator.handle(Wished(2)) == [Open(1)]
    effects(coordinator, Wished(1), Wished(2), finished(1))
    assert coordinator.handle(died(1))[-1] == Open(1)


def test_who_dies_while_it_is_asked_to_leave_is_replaced() -> None:
    coordinator = Coordinator(2, 0, restarts=1)
    effects(coordinator, wrap(0), wrap(1), Wished(1))
    assert coordinator.handle(died(1, -9))[-1] == Replace(1)


def test_one_that_is_added_and_cannot_start_is_no_end_of_the_run() -> None:
    coordinator = Coordinator(1, 0, restarts=3)
    effects(coordinator, wrap(0), Wished(2), Came("worker", 1, SAID))
    found = coordinator.handle(died(1, 1))
    assert found[-1] == GiveUp(1)
    assert not aborts(found)
    assert coordinator.wanted == 1


@pytest.mark.parametrize(
    ("events", "workers", "why"),
    [
        ([], 0, "workers is 0"),
        ([], 1, "--min-workers 2"),
        ([finished(1)], 3, "coming to its end"),
        ([Interrupted()], 3, "coming to its end"),
        ([Came("worker", 0, messages.Ended("2 epochs"))], 3, "coming to its end"),
        ([], 2, ""),
        ([], 5, ""),
    ],
)
def test_what_cannot_be_wished_for(events: list[Event], workers: int, why: str) -> None:
    coordinator = Coordinator(2, 0, min_workers=2)
    effects(coordinator, wrap(0), wrap(1), *events)
    refused = coordinator.refusal(workers)
    assert (refused is None) == (not why)
    assert refused is None or why in refused.what


def test_servers_are_wished_for_with_workers_or_alone() -> None:
    coordinator = Coordinator(1, 1, restarts=1)
    effects(coordinator, wrap(0))
    assert coordinator.handle(Wished(2, 2)) == [Open(1), Serve(crew_word(0, 1), 2), Open(1, "server")]
    there = coordinator.handle(Came("server", 1, messages.Joined(0)))
    assert there[-1] == Serve(crew_word(1, 2), 2)
    assert coordinator.handle(Wished(servers=1)) == [Serve(crew_word(2, 1), 1)]
    left = coordinator.handle(died(1, 0, "server"))
    assert left == [Tell("leave", "server 1 has left; 1 goes on", "server", 1)]
    assert coordinator.wanted_servers == 1


def test_wishes_for_servers_that_cannot_be_are_refused() -> None:
    without, one = Coordinator(1, 0), Coordinator(1, 1)
    assert without.refusal(None, 1) is not None
    assert without.refusal(2) is None
    assert one.refusal(None, 0) is not None
    assert one.refusal(None, 3) is None


def test_a_server_that_leaves_may_do_so_after_ctrl_c() -> None:
    coordinator = Coordinator(1, 2, restarts=1)
    effects(coordinator, wrap(0), Wished(servers=1), Interrupted())
    assert not aborts(coordinator.handle(died(1, 0, "server")))
