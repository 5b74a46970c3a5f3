"""Room on the nodes of a Ray cluster: which bundles of which placement groups workers are put in.

Workers are packed. With ``--servers-apart`` none is put on the driver's node, where home is: there a bundle has CPUs
for the servers. With ``--server-hosts`` servers are on other nodes too, one for each host of theirs, and no worker is
there. What workers have on a node that is lost Ray moves to where there is room.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from paceline.config import Job
from paceline.errors import ConfigError

_NODE = "ray.io/node-id"  # a label that Ray gives to every node


class Room:
    """Of one run; the calls are Ray's, and raise what it raises."""

    def __init__(self, ray: Any, job: Job) -> None:
        """Raises ConfigError where there are too few nodes, and servers are to be apart."""
        self._ray, self._job = ray, job
        self._groups: dict[int, tuple[Any, int]] = {}  # by rank: a placement group, and which of its bundles
        self._of_servers: dict[str, tuple[Any, int]] = {}  # by node
        self._home = ""  # the driver's node, if no worker may be on it
        self._servers: list[str] = []  # the nodes of their other hosts, host 1 first
        self._has_server_bundles = False
        if job.servers_apart:
            self._keep_apart()

    @property
    def cpus(self) -> float:
        """How many CPUs nodes have on which workers may be."""
        return sum(_cpus_of(node) for node in self._alive() if node["NodeID"] not in self._apart)

    @property
    def nodes(self) -> set[str]:
        """Those that live and may have workers."""
        return {node["NodeID"] for node in self._alive()} - set(self._apart)

    @property
    def lost_servers(self) -> list[int]:
        """Servers elsewhere whose nodes do not live any more."""
        alive = {node["NodeID"] for node in self._alive()}
        return [server for server in self._job.servers_elsewhere if self._node_of(server) not in alive]

    @property
    def _apart(self) -> list[str]:
        """The nodes that no worker may be on."""
        return [node for node in (self._home, *self._servers) if node]

    def _node_of(self, server: int) -> str:
        return self._servers[server % self._job.server_hosts - 1]

    def reserve(self, ranks: range) -> None:
        """Room for these workers, close together; the first time also for the servers, each host's on its node."""
        servers: list[tuple[str, float]] = []
        if not self._has_server_bundles:
            self._has_server_bundles = True
            servers = [*self._cpus_for_servers()]
        bundles = [{"CPU": count} for _, count in servers] + [{"CPU": float(cpus(self._job))}] * len(ranks)
        anywhere = f"!in({','.join(self._apart)})"
        where = [{_NODE: node} for node, _ in servers] + [{_NODE: anywhere}] * len(ranks)
        options = {"bundle_label_selector": where} if self._apart else {}
        group = self._ray.util.placement_group(bundles, strategy="PACK", **options)
        self._groups |= {rank: (group, len(servers) + place) for place, rank in enumerate(ranks)}
        self._of_servers |= {node: (group, place) for place, (node, _) in enumerate(servers)}

    def strategy(self, rank: int) -> Any:
        """Where its actor belongs."""
        if rank not in self._groups:
            self.reserve(range(rank, rank + 1))
        return self._strategy(*self._groups[rank])

    def strategy_of_server(self, server: int) -> Any:
        """Where that of a server elsewhere belongs."""
        return self._strategy(*self._of_servers[self._node_of(server)])

    def _strategy(self, group: Any, bundle: int) -> Any:
        return self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle
        )

    def fits(self, rank: int) -> bool:
        """Is there room for one more, where it is to be?"""
        if rank not in self._groups:
            return bool(self._free_cpus() >= cpus(self._job))
        group, bundle = self._groups[rank]
        placed = self._ray.util.placement_group_table(group)["bundles_to_node_id"]
        return placed.get(bundle) in self.nodes

    def release(self) -> None:
        """What was reserved is free again."""
        for group in {id(group): group for group, _ in self._groups.values()}.values():
            self._ray.util.remove_placement_group(group)

    def _keep_apart(self) -> None:
        if "bundle_label_selector" not in inspect.signature(self._ray.util.placement_group).parameters:
            raise ConfigError(
                f"--servers-apart needs a Ray that chooses nodes by their labels; this one is {self._ray.__version__}",
                fix="pip install -U ray, on every node",
            )
        if not self._ray.util.client.ray.is_connected():  # else this process, and home, is outside of the cluster
            self._home = self._ray.get_runtime_context().get_node_id()
        if self._home and not self.cpus:
            raise ConfigError(
                "--servers-apart is given, and Ray's cluster has no node for workers but this one, where servers are",
                why="home and its servers are where this command runs, and no worker is to be there",
                fix="ray start --address ADDRESS on other hosts, or --ray-address of a larger cluster; or leave it out",
            )

        if self._job.server_hosts > 1:
            self._choose_servers()

    def _choose_servers(self) -> None:
        """Nodes for the servers' other hosts: those that workers miss least."""
        hosts, needed = self._job.server_hosts, self._cpus_on(1)
        others = [node for node in self._alive() if node["NodeID"] != self._home and _cpus_of(node)]
        found = [node for node in others if _cpus_of(node) >= needed]
        if len(found) < hosts - 1 or len(others) < hosts:
            there = f"{len(others)} node{'s' * (len(others) != 1)}{' beside this one' if self._home else ''}"
            which = "one" if hosts == 2 else f"{hosts - 1}"
            raise ConfigError(
                f"--server-hosts is {hosts}, and Ray's cluster has {there}, which is not enough",
                why=f"servers are to have {which} for themselves, with {needed:g} CPUs, and workers one more at least",
                fix="ray start --address ADDRESS on other hosts; or --server-hosts 1",
            )
        free = self._ray._private.state.available_resources_per_node()

        def missed(node: dict[str, Any]) -> tuple[bool, float, float, str]:
            name = node["NodeID"]
            return free.get(name, {}).get("CPU", 0.0) < needed, node["Resources"].get("GPU", 0.0), _cpus_of(node), name

        self._servers = [node["NodeID"] for node in sorted(found, key=missed)[: hosts - 1]]

    def _cpus_for_servers(self) -> Iterator[tuple[str, float]]:
        """By node. Home's may have been told to have none: then Ray puts nothing there anyway."""
        has = sum(_cpus_of(node) for node in self._alive() if node["NodeID"] == self._home)
        if has:
            yield self._home, min(self._cpus_on(0), has)
        for host, node in enumerate(self._servers, 1):
            yield node, self._cpus_on(host)

    def _cpus_on(self, host: int) -> float:
        """For the servers of a host of theirs."""
        return float(len(self._job.servers_on(host)) * cpus(self._job))

    def _free_cpus(self) -> float:
        if not self._apart:
            return float(self._ray.available_resources().get("CPU", 0.0))
        free = self._ray._private.state.available_resources_per_node()
        return max((there.get("CPU", 0.0) for node, there in free.items() if node not in self._apart), default=0.0)

    def _alive(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]


def _cpus_of(node: dict[str, Any]) -> float:
    return float(node["Resources"].get("CPU", 0.0))


def cpus(job: Job) -> int:
    """How many of Ray's CPUs a worker has."""
    return job.threads or 1
