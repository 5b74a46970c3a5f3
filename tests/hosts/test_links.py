"""Links over loopback: what is sent comes once, whole and in order, and everything that happens is told."""

from __future__ import annotations

import linecache
import random
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from paceline.errors import ConfigError, HostError
from paceline.protocol.link import Patience, Peer, Senseless
from paceline.transport.connect import connect
from paceline.transport.ends import Back, End, Ended, Event, Joined, LinkEnded, Lost, Received
from paceline.transport.frame import FrameError
from paceline.transport.link import Link
from paceline.transport.listener import Listener
from paceline.transport.turns import Turns
from paceline.transport.views import bytes_of
from paceline.transport.wire import MAX_PAYLOAD
from tests.hosts.ends import JOB, OTHER_KEY, WAIT_S, Pair, Push, Side, Word, payload, send_all
from tests.hosts.proxy import DOWN, UP, Faults, Proxy


class Interrupted(BaseException):
    """As Ctrl-C is, by a handler of this test."""


def interrupted(line: int, call: Callable[..., object], *arguments: object) -> bool | None:
    """Calls it; was it interrupted before the ``line``-th line of those that write a frame? None if another thread
    writes it. Not at ``with``: the interpreter itself may leave what that takes locked."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal left
        code = frame.f_code
        if Path(code.co_filename).parent.name != "transport" or code.co_name not in ("_write_frame", "write", "encode"):
            return trace
        if event == "line" and not linecache.getline(code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call(*arguments)
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return None if left == line else False


SECURE = pytest.mark.parametrize("secure", [True, False], ids=["tls", "plain"])


def pushes(count: int, seed: int) -> list[Push]:
    random_ = random.Random(seed)
    sizes = (0, 0, 1, 7, 4000, 70_000, 400_000)
    return [Push(seed * 1000 + number, random_.choice(sizes)) for number in range(count)]


@SECURE
def test_messages_and_payloads_come_in_order_both_ways(secure: bool) -> None:
    with Pair(secure=secure) as pair:
        near, far = pair.both()
        assert (near.peer, far.peer) == (Peer(0, "exchange"), Peer(1, "exchange"))
        there, back = pushes(100, 1), pushes(100, 2)
        threads = [send_all(near, there), send_all(far, back)]
        assert pair.server.take(100) == there
        assert pair.client.take(100) == back
        for thread in threads:
            thread.join(WAIT_S)
        near.flush(WAIT_S)
        far.flush(WAIT_S)


@SECURE
def test_threads_that_send_over_one_link_each_keep_their_order(secure: bool) -> None:
    """Whoever writes it: the thread that sends, or the link's."""
    with Pair(secure=secure) as pair:
        near, lists = pair.join(), [pushes(60, seed) for seed in range(6)]
        threads = [send_all(near, some) for some in lists]
        come = pair.server.take(360)
        for thread in threads:
            thread.join(WAIT_S)
        assert [[push for push in come if push.number // 1000 == seed] for seed in range(6)] == lists


@SECURE
def test_an_interrupt_in_the_midst_of_writing_loses_and_repeats_nothing(secure: bool) -> None:
    """Ctrl-C comes to the main thread wherever it is: at each line of writing, one after the other."""
    with Pair(secure=secure) as pair:
        near, sent, line, is_written = pair.join(), [], 0, False
        while not is_written:
            near.flush(WAIT_S)  # so that the next one is likely to be written by this thread
            sent.append(Push(len(sent), 1000))
            was_interrupted = interrupted(line, near.send, sent[-1], payload(sent[-1]))
            is_written = was_interrupted is False
            line += was_interrupted is True
            sent.append(Word(f"after line {line}"))
            near.send(sent[-1])
        assert line > 10, "writing has more lines than that"
        assert pair.server.take(len(sent)) == sent
        assert {type(event) for event in pair.client.other} <= {Lost, Back}


@SECURE
def test_who_sends_little_does_not_wait_for_a_peer_that_reads_nothing(secure: bool) -> None:
    goes_on = threading.Event()

    def place(link: Link, message: Push, size_bytes: int) -> memoryview:
        goes_on.wait(WAIT_S)
        return memoryview(bytearray(size_bytes))

    little = [Push(number, 12_000) for number in range(2000)]  # 24 MB: more than kernels keep for two sockets
    with Pair(secure=secure, place=place, patience=Patience()) as pair:
        near = pair.join()
        for push in little:
            last = near.send(push, payload(push))
        assert not last.done
        goes_on.set()
        assert pair.server.take(2000) == little


@SECURE
def test_links_that_take_turns_bring_all_and_wait_for_none_that_is_stuck(secure: bool) -> None:
    turns, goes_on = Turns(), threading.Event()

    def place(link: Link, message: Push, size_bytes: int) -> memoryview:
        goes_on.wait(WAIT_S)
        return memoryview(bytearray(size_bytes))

    with (
        Pair(secure=secure, turns=turns) as one,
        Pair(secure=secure, turns=turns) as other,
        Pair(secure=secure, turns=turns, place=place, patience=Patience()) as stuck,
    ):
        last = stuck.join().send(Push(3, MAX_PAYLOAD), payload(Push(3, MAX_PAYLOAD)))
        lists = [pushes(50, 1), pushes(50, 2)]
        threads = [send_all(pair.join(), some) for pair, some in zip((one, other), lists, strict=True)]
        assert [one.server.take(50), other.server.take(50)] == lists
        for thread in threads:
            thread.join(WAIT_S)
        assert not last.done
        goes_on.set()
        last.wait(WAIT_S)
        assert stuck.server.take(1) == [Push(3, MAX_PAYLOAD)]


@SECURE
def test_a_tensor_goes_from_its_memory_to_anothers(secure: bool) -> None:
    target = torch.zeros(1000, dtype=torch.bfloat16)
    source = torch.randn(3000).to(torch.bfloat16)[1000:2000]
    with Pair(secure=secure, place=lambda link, message, size: bytes_of(target)) as pair:
        sent = pair.join().send(Push(1, 2000), bytes_of(source))
        sent.wait(WAIT_S)
        assert sent.done
        assert torch.equal(target, source)


@SECURE
def test_an_end_is_told_to_both_after_everything_before_it(secure: bool) -> None:
    with Pair(secure=secure) as pair:
        near, far = pair.both()
        near.send(Word("last"))
        near.close()
        assert pair.server.take(1) == [Word("last")]
        assert pair.server.event(Ended).reason == "exchange of host 1 has closed the link"
        assert pair.client.event(Ended).reason == "this side has closed the link"
        for link in (near, far):
            with pytest.raises(LinkEnded):
                link.send(Word("too late"))


@SECURE
def test_a_cut_connection_is_mended_and_nothing_is_lost_or_repeated(secure: bool) -> None:
    with Pair(secure=secure) as pair, Proxy(("127.0.0.1", pair.listener.port)) as proxy:
        near = pair.join(proxy.port)
        assert pair.far is not None
        for count in range(5):
            thread = send_all(near, there := pushes(20, count))
            back = send_all(pair.far, pushes(20, count + 50))
            proxy.cut()
            assert pair.server.take(20) == there
            assert pair.client.take(20) == pushes(20, count + 50)
            thread.join(WAIT_S)
            back.join(WAIT_S)
        assert {type(event) for event in pair.server.other + pair.client.other} <= {Lost, Back}


@pytest.mark.sampled
@SECURE
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(Faults(cut=0.1), id="cut"),
        pytest.param(Faults(truncate=0.1), id="truncated"),
        pytest.param(Faults(duplicate=0.1), id="duplicated"),
        pytest.param(Faults(flip=0.1), id="flipped"),
        pytest.param(Faults(delay=0.2, cut=0.03, truncate=0.03, duplicate=0.03, flip=0.03), id="everything"),
    ],
)
def test_whatever_the_network_does_each_message_is_taken_once(secure: bool, seed: int, faults: Faults) -> None:
    with Pair(secure=secure) as pair, Proxy(("127.0.0.1", pair.listener.port), faults, seed, budget=8) as proxy:
        near = pair.join(proxy.port)
        assert pair.far is not None
        proxy.begin()
        there, back = pushes(60, 1), pushes(60, 2)
        threads = [send_all(near, there), send_all(pair.far, back)]
        assert pair.server.take(60) == there, proxy.done
        assert pair.client.take(60) == back, proxy.done
        for thread in threads:
            thread.join(WAIT_S)


@SECURE
@pytest.mark.parametrize("directions", [(UP,), (DOWN,), (UP, DOWN)], ids=["up", "down", "both"])
def test_a_silent_network_is_noticed_and_told_and_nothing_is_lost(secure: bool, directions: tuple[str, ...]) -> None:
    with Pair(secure=secure) as pair, Proxy(("127.0.0.1", pair.listener.port)) as proxy:
        near = pair.join(proxy.port)
        assert pair.far is not None
        proxy.silence(*directions)
        near.send(Word("there"))
        pair.far.send(Word("back"))
        told = [side.later(Lost).reason for side in (pair.client, pair.server)]
        assert any("silent" in reason for reason in told), told
        proxy.heal()
        proxy.cut()  # what was held back of old connections is of no use any more
        for side, word in ((pair.server, "there"), (pair.client, "back")):
            assert side.take(1) == [Word(word)]


def test_a_sender_waits_for_a_peer_that_does_not_take() -> None:
    held = threading.Event()

    def place(link: object, message: Push, size_bytes: int) -> memoryview:
        held.wait(WAIT_S)
        return memoryview(bytearray(size_bytes))

    small = Patience(heartbeat_s=0.1, silence_s=20, window_bytes=1_000_000)
    with Pair(patience=small, place=place) as pair:
        near = pair.join()
        for number in range(2):
            near.send(Push(number, 400_000), payload(Push(number, 400_000)), WAIT_S)
        with pytest.raises(TimeoutError, match="does not take what is sent"):
            near.send(Push(2, 400_000), bytes(400_000), 0.0)
        held.set()
        near.send(Push(2, 400_000), payload(Push(2, 400_000)), WAIT_S)
        assert len(pair.server.take(3)) == 3


def test_a_payload_that_nobody_expects_ends_the_session_on_both_sides() -> None:
    with Pair() as pair:
        pair.join().send(Push(1, 10), bytes(20))
        assert "sent 20 bytes with a Push; none are expected" in pair.server.later(Ended).reason
        pair.client.events.get(timeout=WAIT_S)


def test_what_is_too_large_or_no_message_of_the_peers_is_told() -> None:
    with Pair() as pair:
        near = pair.join()
        with pytest.raises(FrameError, match="over the limit"):
            near.send(Push(1), memoryview(bytearray(MAX_PAYLOAD + 1)))
        near.send(Peer(1, "not a message here"))
        assert "no message here" in pair.server.later(Ended).reason


def test_what_the_application_finds_senseless_ends_the_session_in_its_words() -> None:
    def judge(event: Event) -> None:
        if isinstance(event, Received):
            raise Senseless("there is no such word")
        server.events.put(event)

    server, client = Side(0, sink=judge), Side(1)
    listener = Listener(server.end, "127.0.0.1")
    near = connect(client.end, ("127.0.0.1", listener.port), WAIT_S)
    near.send(Word("absurd"))
    assert server.later_end() == "there is no such word"
    listener.close()
    near.end("it is over")
    near.close()


def test_a_new_incarnation_takes_the_place_of_the_old_one() -> None:
    with Pair() as pair:
        pair.join()
        newcomer = Side(1, me=Peer(1, "exchange", 1))
        link = connect(newcomer.end, ("127.0.0.1", pair.listener.port), WAIT_S)
        assert "exchange of host 1 (incarnation 1) has taken the place of exchange of host 1" in (
            pair.server.event(Ended).reason
        )
        assert pair.server.event(Joined).link.peer == Peer(1, "exchange", 1)
        assert "has been replaced by incarnation 1" in pair.client.later_end()
        with pytest.raises(HostError, match="has been replaced by incarnation 1"):
            connect(pair.client.end, ("127.0.0.1", pair.listener.port), WAIT_S)
        link.close()


def test_a_server_that_was_started_anew_ends_the_session() -> None:
    with Pair() as pair, Proxy(("127.0.0.1", pair.listener.port)) as proxy:
        near = pair.join(proxy.port)
        near.send(Word("one"))
        again = Listener(Side(0).end, "127.0.0.1", on_refused=pair.on_refused)
        proxy._target = ("127.0.0.1", again.port)
        proxy.cut()
        assert "the session is not known here" in pair.client.later_end()
        again.close()


def test_a_peer_that_stays_away_is_given_up() -> None:
    with Pair(patience=Patience(heartbeat_s=0.05, silence_s=0.2, give_up_s=0.3)) as pair:
        near = pair.join()
        pair.listener.close()
        assert pair.far is not None
        pair.far.end("the process has died")
        sent = near.send(Word("into the window"))
        assert "no connection to exchange of host 0 for 0.3 s" in pair.client.later_end()
        with pytest.raises(LinkEnded):
            sent.wait(WAIT_S)


def test_nobody_at_the_port_is_told_with_the_last_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(HostError, match=r"within 0\.2 s: connection refused"):
        connect(Side(1).end, ("127.0.0.1", port), 0.2)


def test_a_key_is_asked_for_unless_insecure_is_said() -> None:
    with pytest.raises(ConfigError, match="need a job key"):
        End(me=Peer(0, "exchange"), job=JOB, messages=Word, sink=print)


def test_plain_and_tls_do_not_meet_and_both_are_told() -> None:
    for secure, says in ((True, "does not speak TLS"), (False, "it is not paceline")):
        with Pair(secure=secure) as pair:
            with pytest.raises(HostError, match=r"no connection within 0\.5 s"):
                connect(Side(1, secure=not secure).end, ("127.0.0.1", pair.listener.port), 0.5)
            assert says in pair.refusal()


def test_another_key_is_refused_at_once() -> None:
    with Pair() as pair:
        with pytest.raises(HostError, match="another job key"):
            connect(Side(1, key=OTHER_KEY).end, ("127.0.0.1", pair.listener.port), WAIT_S)
        assert "job key" in pair.refusal()


def test_a_port_in_use_and_an_address_of_another_machine_are_told() -> None:
    with Pair() as pair:
        with pytest.raises(HostError, match=f"port {pair.listener.port} is in use"):
            Listener(pair.server.end, "127.0.0.1", pair.listener.port)
        with pytest.raises(HostError, match=r"no address '203\.0\.113\.7'"):
            Listener(pair.server.end, "203.0.113.7")


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    with Pair() as pair:
        pair.join()
    assert threading.active_count() == before
