"""Channels: messages in order, descriptors with the message they were sent with, and a clear end."""

from __future__ import annotations

import array
import os
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from paceline.protocol import messages
from paceline.transport.channel import Channel, Closed
from paceline.transport.frame import FrameError, encode

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = Channel.pair()
    yield left, right
    left.close()
    right.close()


def marked(number: int) -> int:
    """A descriptor of a file that holds this number."""
    fd = os.memfd_create("marked", os.MFD_CLOEXEC)
    os.write(fd, number.to_bytes(8, "little"))
    return fd


def mark(fd: int) -> int:
    """The number in the file; closes it."""
    number = int.from_bytes(os.pread(fd, 8, 0), "little")
    os.close(fd)
    return number


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_arrive_in_order(pair: Pair) -> None:
    left, right = pair
    sent = [messages.Logged(number, {"a": float(number)}) for number in range(50)]
    for message in sent:
        left.send(message)
    assert [right.receive() for _ in sent] == [(message, ()) for message in sent]


def test_both_directions_are_apart(pair: Pair) -> None:
    left, right = pair
    left.send(messages.Stop("from the left"))
    right.send(messages.Stop("from the right"))
    assert left.receive()[0] == messages.Stop("from the right")
    assert right.receive()[0] == messages.Stop("from the left")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drained", [False, True])
def test_descriptors_arrive_with_their_message_however_many_are_under_way(pair: Pair, seed: int, drained: bool) -> None:
    """Small and large messages, with none to sixteen descriptors, all sent before or while the first is read."""
    left, right = pair
    random_ = random.Random(seed)
    plan = [(random_.choice((0, 1, 500, 70_000)), random_.choice((0, 0, 1, 3, 16))) for _ in range(60)]

    def send() -> None:
        for number, (size, count) in enumerate(plan):
            fds = tuple(marked(number * 100 + place) for place in range(count))
            left.send(messages.Memory(number, count, "", bytes(size)), fds)
            for fd in fds:
                os.close(fd)

    sender = threading.Thread(target=send)
    sender.start()
    got: list[tuple[Any, tuple[int, ...]]] = []
    while len(got) < len(plan):
        got += right.drain() if drained else [right.receive()]
    sender.join()
    for number, ((size, count), (message, fds)) in enumerate(zip(plan, got, strict=True)):
        assert message == messages.Memory(number, count, "", bytes(size))
        assert [mark(fd) for fd in fds] == [number * 100 + place for place in range(count)]


def test_the_sender_keeps_its_descriptors_and_the_receiver_owns_its_own(pair: Pair) -> None:
    left, right = pair
    mine = marked(7)
    left.send(messages.Finished(), (mine,))
    _, (its,) = right.receive()
    assert its != mine
    assert not os.get_inheritable(its)
    assert (mark(mine), mark(its)) == (7, 7)


def test_a_message_larger_than_the_sockets_buffers_is_sent_whole(pair: Pair) -> None:
    left, right = pair
    large = messages.Steps(os.urandom(5_000_000))
    fd = marked(3)
    sender = threading.Thread(target=left.send, args=(large, (fd,)))
    sender.start()
    message, (its,) = right.receive()
    sender.join()
    assert message == large
    assert mark(its) == 3
    os.close(fd)


def test_what_was_sent_before_the_end_is_still_received(pair: Pair) -> None:
    left, right = pair
    left.send(messages.Finished())
    left.send(messages.Stop("bye"))
    left.close()
    assert right.receive()[0] == messages.Finished()
    assert right.receive()[0] == messages.Stop("bye")
    with pytest.raises(Closed):
        right.receive()


@pytest.mark.parametrize("ask", [Channel.receive, Channel.drain])
def test_the_peers_end_is_closed(pair: Pair, ask: Any) -> None:
    left, right = pair
    left.close()
    with pytest.raises(Closed):
        ask(right)


def test_sending_to_nobody_is_closed(pair: Pair) -> None:
    left, right = pair
    right.close()
    fd = marked(1)
    with pytest.raises(Closed):
        left.send(messages.Stop("now"), (fd,))
    with pytest.raises(Closed):
        left.send(messages.Stop("now"))
    os.close(fd)


def test_a_sender_that_blocks_is_told_when_the_peer_goes(pair: Pair) -> None:
    left, right = pair
    caught: list[BaseException] = []

    def send() -> None:
        try:
            while True:
                left.send(messages.Steps(bytes(30_000)))
        except Closed as error:
            caught.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    right._read()  # it has begun
    right.close()
    sender.join()
    assert len(caught) == 1


def test_half_a_message_at_the_end_is_closed_not_a_message(pair: Pair) -> None:
    left, right = pair
    left._sock.sendall(encode(messages.Stop("never to be finished"))[:-3])
    left.close()
    with pytest.raises(Closed):
        right.receive()


def test_descriptors_that_nobody_took_are_closed_with_the_channel() -> None:
    before = open_descriptors()
    left, right = Channel.pair()
    fd = marked(1)
    for _ in range(10):
        left.send(messages.Finished(), (fd, fd, fd))
    os.close(fd)
    _, mine = right.receive()
    right._read()
    left.close()
    right.close()
    for fd in mine:
        os.close(fd)
    assert open_descriptors() == before


def test_a_message_that_claims_descriptors_which_did_not_come_is_a_frame_error(pair: Pair) -> None:
    left, right = pair
    left._sock.sendall(encode(messages.Finished(), 2))
    with pytest.raises(FrameError, match="Finished claims 2 descriptors, 0 came"):
        right.receive()


def test_noise_is_a_frame_error(pair: Pair) -> None:
    left, right = pair
    left._sock.sendall(b"GET / HTTP/1.1\r\n")
    with pytest.raises(FrameError, match="the peer is not paceline"):
        right.receive()


def test_descriptors_are_not_inherited_by_programs_started_later(pair: Pair) -> None:
    left, right = pair
    fd = marked(5)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
    left._sock.sendmsg([encode(messages.Finished(), 1)], [rights])
    os.close(fd)
    _, (its,) = right.receive()
    assert not os.get_inheritable(its)
    os.close(its)
