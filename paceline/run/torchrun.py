"""A worker among processes that torchrun (or another starter that sets RANK and WORLD_SIZE) has started, on any hosts.

    rank 0's process --starts--> home: front, launcher, a deputy for every worker, each listening (beside.py)
            |  where they listen: the store at MASTER_ADDR:MASTER_PORT, torch's own
            v
    every rank --link--> its deputy

Home is beside rank 0. Every rank, also that one, is a worker elsewhere (``engine/elsewhere/remote.py``); with
``--servers-apart`` those of home's host are none: they wait for the run's end. With ``--server-hosts`` more hosts are
without workers, and ranks of these are servers. Home outlives rank 0's process: when torchrun starts its processes
again, they find it and go on in the places that they had.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import msgspec

from paceline.engine.elsewhere.around import Around
from paceline.engine.elsewhere.remote import RemoteWorker
from paceline.errors import ConfigError, HostError
from paceline.run import beside
from paceline.run.beside import Found, Place, Rank, Started
from paceline.run.doors import is_insecure
from paceline.run.elsewhere import Life, attend, be_server, meet
from paceline.transport.borrow import this_host
from paceline.transport.keys import FILE_VARIABLE, job_key, read_job_key

_LOOK_S = 0.5
_MEET_S = 600.0  # ranks may come late: they import, or read data, before they call init

_served: list[Any] = []  # the store, which rank 0 serves without an agent: who is started again asks there


def join(options: Mapping[str, Any]) -> RemoteWorker:
    """Become a worker of the run that these processes are; rank 0 starts its home. Blocks until all of it is there.

    ``options``: fields of Job; those of rank 0 count. Raises HostError, ConfigError; SystemExit, at the end of the run,
    where this process is no worker.
    """
    place = Rank.read(os.environ)
    insecure = is_insecure(os.environ) or bool(options.get("insecure"))
    given = None if insecure else job_key(os.environ)
    if given is None and not insecure and not place.is_one_host:
        raise ConfigError(
            "workers on several hosts need a job key",
            why="without one whoever reaches the port could read and change the training",
            fix=f"paceline key job.key, copy the file to every host, set {FILE_VARIABLE}=job.key there; or "
            "PACELINE_INSECURE=1 on a network that you trust",
        )
    from torch.distributed.distributed_c10d import PrefixStore

    store = _store(place.run)
    store.set(f"host/{place.rank}", this_host())
    home: Started | Found | None = None
    if place.rank == 0:
        home = _find(store, place) or beside.start(
            place, _hosts(store, place), options, store, insecure=insecure, has_key=given is not None
        )
        there = home.place
    else:
        there = _told(store, place)
    _check(there)
    hosts = _hosts(store, place)
    workers = there.workers(hosts)
    key = given or (read_job_key(there.key_file) if there.key_file else None)
    if (server := there.servers(hosts).get(place.rank)) is not None:
        there = _home_of(server, store, there)
        be_server(server, there.job, (there.host, there.server_ports[server]), key)
    if place.rank not in workers:
        if hosts[place.rank] != there.apart[0]:
            sys.exit(0)  # it has nothing to do on its host, and no home to wait for
        attend(home or Found(there, interrupts=False), may_come_again=place.restarts)
    number = workers.index(place.rank)
    if number >= len(there.ports):
        raise HostError(
            f"rank is {place.rank}, and the run was started with {len(there.ports)} workers",
            fix="start as many processes as at first: torchrun --nnodes N, not MIN:MAX",
        )
    around = Around([hosts[rank] for rank in workers], PrefixStore(f"attempt/{place.attempt}", store))
    worker = meet(number, place.attempt, there.job, (there.host, there.ports[number]), key, around)
    Life(worker, home, may_come_again=place.restarts).begin()
    return worker


def _store(run: str) -> Any:
    """Torch's store of these processes, as ``init_process_group`` would have it: the agent's under torchrun, else one
    that rank 0 serves and shares with whoever asks in its process. What was said in it before a restart is there."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_MEET_S)))
    except Exception as error:  # noqa: BLE001  torch raises several kinds, of its own too
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise HostError(f"the processes cannot meet at {where}: {str(error).splitlines()[0]}") from None
    while isinstance(store, PrefixStore):  # torch has one for each attempt
        store = store.underlying_store
    _served.append(store)
    return PrefixStore(f"paceline/{run}", store)


def _hosts(store: Any, place: Rank) -> list[str]:
    """On which each rank is; waits until all have come."""
    if place.is_one_host:
        return [this_host()] * place.world
    return [store.get(f"host/{rank}").decode() for rank in range(place.world)]


def _find(store: Any, place: Rank) -> Found | None:
    """The home that an attempt before this one has started, if it lives."""
    there = beside.known(store)
    if there is None:
        return None
    beside.publish(store, place, there)
    return Found(there)


def _home_of(server: int, store: Any, there: Place) -> Place:
    """Home, for a process that is to be this server: one that has lost it comes to its end, so this is the next one.
    Raises HostError."""
    while store.add(f"server/{server}/{there.job}", 1) > 1:
        sys.stderr.write(f"paceline: server {server} is lost to the run, which ends; waiting for the next one\n")
        before = there
        while there.job == before.job:
            time.sleep(_LOOK_S)
            try:
                there = msgspec.json.decode(store.get("home"), type=Place)
            except RuntimeError:  # torch's DistStoreError and others
                raise HostError(f"there is no next run that server {server} could be in") from None
        _check(there)
    return there


def _check(there: Place) -> None:
    """Raises HostError if home has not started."""
    if there.failed:
        raise HostError(f"home, beside rank 0, has not started: {there.failed}")


def _told(store: Any, place: Rank) -> Place:
    """Home, as rank 0 tells of it; or has told, where this host's processes alone have been started again."""
    there = beside.known(store) if place.attempt else None
    return there or msgspec.json.decode(store.get(f"home/{place.attempt}"), type=Place)
