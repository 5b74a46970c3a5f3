"""The zygote: one single-threaded process with torch imported, from which workers and servers are forked.

``import torch`` takes over two seconds on busy cores; forking a process that has it takes milliseconds. It
must stay single-threaded and must not touch CUDA: neither survives a fork.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import sys

from paceline.engine import allocator
from paceline.engine.name import name_process
from paceline.protocol import messages
from paceline.transport.channel import Channel, Closed


def main(descriptor: int) -> None:
    """Serve the launcher behind ``descriptor`` until it closes its end; then kill what is left."""
    import socket

    name_process("paceline:zygote")
    allocator.forget(os.environ)
    for number in (signal.SIGINT, signal.SIGTERM):  # the front decides what they mean
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor))
    births: dict[tuple[str, int], int] = {}
    versions = _import_everything()
    gc.collect()
    gc.freeze()  # children share these objects' pages; a collection would touch them all
    wake = _wake_on_child_exit()
    children: dict[int, tuple[str, int]] = {}
    poll = select.poll()  # select() knows no descriptor above 1023
    poll.register(channel, select.POLLIN)
    poll.register(wake, select.POLLIN)
    try:
        channel.send(messages.Ready(versions))
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if wake in ready:
                os.read(wake, 4096)
                _report_exits(channel, children)
            if channel.fileno() in ready:
                for message, descriptors in channel.drain():
                    if isinstance(message, messages.Fork):
                        # A launcher that takes over cannot know what the one before it has asked for.
                        if message.birth > births.get((message.role, message.rank), 0):
                            births[message.role, message.rank] = message.birth
                            _fork(channel, message, descriptors, children)
                        for given in descriptors:
                            os.close(given)
    except Closed:
        pass
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _import_everything() -> dict[str, str]:
    import platform

    import numpy
    import torch

    from paceline import __version__

    importlib.import_module("paceline.run.session")  # what the scripts are going to import

    # The first step of an optimizer imports more of torch, 0.7 s of it; forked processes find it done.
    torch.set_num_threads(1)
    parameter = torch.zeros(1)
    parameter.grad = torch.zeros(1)
    torch.optim.SGD([parameter]).step()

    return {
        "paceline": __version__,
        "torch": str(torch.__version__),
        "numpy": str(numpy.__version__),
        "python": platform.python_version(),
    }


def _wake_on_child_exit() -> int:
    """A descriptor that becomes readable when a child has ended."""
    readable, writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    return readable


def _report_exits(channel: Channel, children: dict[int, tuple[str, int]]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        if pid in children:
            role, rank = children.pop(pid)
            channel.send(messages.Exited(role, rank, pid, os.waitstatus_to_exitcode(status)))


def _fork(
    channel: Channel, order: messages.Fork, descriptors: tuple[int, ...], children: dict[int, tuple[str, int]]
) -> None:
    import socket

    zygote = os.getpid()
    its, the_launchers = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pid = os.fork()
    if pid == 0:
        from paceline.engine import process

        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        channel.close()
        the_launchers.close()
        process.main(order.role, order.rank, order.setup, (its.detach(), *descriptors), zygote)
        raise AssertionError("a forked process came back")
    children[pid] = (order.role, order.rank)
    channel.send(messages.Forked(order.role, order.rank, pid), (the_launchers.fileno(),))
    its.close()
    the_launchers.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
