"""Claims about who serves: whatever is wished for and whoever dies, the crew is of those who are there and stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.protocol.crew import crew_size, crew_word
from paceline.protocol.effects import Effect, Open, Replace, Serve, Tell
from paceline.protocol.servers import Servers

PLACES = 5


def acts(effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if not isinstance(effect, Tell)]


def died(servers: Servers, rank: int, status: int = -9) -> list[Effect]:
    return servers.died(rank, status, f"server {rank} was killed by SIGKILL", may_replace=True)


@given(st.integers(0, 2**40), st.integers(0, 64))
def test_a_crew_has_a_number_and_a_size(number: int, size: int) -> None:
    assert crew_size(crew_word(number, size)) == size
    assert crew_word(number, size) != crew_word(number + 1, size)


def test_one_that_is_added_steps_when_it_is_there() -> None:
    servers = Servers(1, restarts=1)
    assert acts(servers.scale(3)) == [Serve(crew_word(0, 1), 3), Open(1, "server"), Open(2, "server")]
    assert acts(servers.joined(2)) == []  # the crew is the lowest so many
    assert acts(servers.joined(1)) == [Serve(crew_word(1, 3), 3)]
    assert servers.joined(1) == []  # said by the next process of it


def test_one_that_is_to_leave_steps_no_more_and_has_left_when_its_process_ends_by_itself() -> None:
    servers = Servers(3, restarts=1)
    assert acts(servers.scale(1)) == [Serve(crew_word(1, 1), 1)]
    assert acts(died(servers, 1)) == [Replace(1, "server")]  # it may have been in the midst of something
    assert acts(died(servers, 1, 0)) == []
    assert acts(died(servers, 2, 0)) == []
    assert acts(servers.scale(2)) == [Serve(crew_word(1, 1), 2), Open(1, "server")]


def test_one_that_is_wished_for_again_while_it_leaves_comes_again_when_it_has_left() -> None:
    servers = Servers(2, restarts=1)
    servers.scale(1)
    assert acts(servers.scale(2)) == []
    assert acts(died(servers, 1, 0)) == [Serve(crew_word(1, 1), 2), Open(1, "server")]
    assert acts(servers.joined(1)) == [Serve(crew_word(2, 2), 2)]


def test_one_that_was_added_and_cannot_start_is_given_up_and_those_above_it_leave() -> None:
    servers = Servers(1, restarts=1)
    servers.scale(3)
    servers.joined(2)
    assert acts(died(servers, 1, 1)) == [Replace(1, "server")]
    assert acts(died(servers, 1, 1)) == [Serve(crew_word(0, 1), 1)]
    assert servers.wanted == 1
    assert acts(died(servers, 2, 0)) == []


def test_one_that_dies_again_and_again_is_not_replaced() -> None:
    servers = Servers(2, restarts=1)
    assert acts(died(servers, 1)) == [Replace(1, "server")]
    assert died(servers, 1) == []
    servers.deaths.clear()  # a worker has got on
    assert acts(died(servers, 1)) == [Replace(1, "server")]
    assert servers.died(0, -9, "killed", may_replace=False) == []


@given(st.integers(1, PLACES), st.data())
@pytest.mark.parametrize("restarts", [0, 1000])
def test_the_crew_is_of_those_who_are_there_and_comes_to_what_is_wished_for(
    restarts: int, count: int, data: st.DataObject
) -> None:
    servers = Servers(count, restarts)
    alive, coming = set(range(count)), set[int]()  # processes; those of them that have not said that they are there
    crew, kept, crews = count, count, {crew_word(0, count): count}

    def obey(effects: list[Effect]) -> None:
        nonlocal crew, kept
        for effect in acts(effects):
            match effect:
                case Open(rank=rank, role="server") | Replace(rank=rank, role="server"):
                    assert rank not in alive
                    alive.add(rank)
                    coming.add(rank)
                case Serve(crew=word, kept=rank):
                    crew, kept = crew_size(word), rank
                    assert crews.setdefault(word, crew) == crew
                    assert 1 <= crew <= kept

    def ends(rank: int, status: int) -> None:
        alive.discard(rank)
        coming.discard(rank)
        obey(died(servers, rank, status))

    for _ in range(data.draw(st.integers(0, 12))):
        what = data.draw(st.sampled_from(["wish", "joins", "dies", "leaves"]))
        leaving = [rank for rank in sorted(alive) if rank >= kept]
        # With no restarts only one that is just coming may die: any other's death ends the run.
        mortal = sorted(alive if restarts else coming - set(range(crew)))
        if what == "wish":
            obey(servers.scale(data.draw(st.integers(1, PLACES))))
        elif what == "joins" and coming:
            rank = data.draw(st.sampled_from(sorted(coming)))
            coming.discard(rank)
            obey(servers.joined(rank))
        elif what == "dies" and mortal:
            ends(data.draw(st.sampled_from(mortal)), -9)
        elif what == "leaves" and leaving:
            ends(data.draw(st.sampled_from(leaving)), 0)
        assert set(range(crew)) <= alive
    while coming or any(rank >= kept for rank in alive):
        for rank in sorted(coming):
            coming.discard(rank)
            obey(servers.joined(rank))
        for rank in [rank for rank in sorted(alive) if rank >= kept]:
            ends(rank, 0)
    assert alive == set(range(servers.wanted))
    assert crew == kept == servers.wanted
