"""Room on the nodes of a Ray cluster: which bundles of which placement groups workers are put in.

Workers are packed. With ``--servers-apart`` none is put on the driver's node, where home is: there a bundle has CPUs
for the servers. What belongs to a node that is lost Ray moves to where there is room.
"""

from __future__ import annotations

import inspect
from typing import Any

from paceline.config import Job
from paceline.errors import ConfigError

_NODE = "ray.io/node-id"  # a label that Ray gives to every node


class Room:
    """Of one run; the calls are Ray's, and raise what it raises."""

    def __init__(self, ray: Any, job: Job) -> None:
        """Raises ConfigError where there is no node but home's, and servers are to be apart."""
        self._ray, self._job = ray, job
        self._groups: dict[int, tuple[Any, int]] = {}  # by rank: a placement group, and which of its bundles
        self._home = ""  # the node that no worker may be on
        self._has_home_bundle = False
        if job.servers_apart:
            self._keep_apart()

    @property
    def cpus(self) -> float:
        """How many CPUs nodes have on which workers may be."""
        return sum(float(node["Resources"].get("CPU", 0.0)) for node in self._alive() if node["NodeID"] != self._home)

    @property
    def nodes(self) -> set[str]:
        """Those that live and may have workers."""
        return {node["NodeID"] for node in self._alive()} - {self._home}

    def reserve(self, ranks: range) -> None:
        """Room for these workers, close together."""
        bundles: list[dict[str, float]] = [{"CPU": cpus(self._job)}] * len(ranks)
        where = [{_NODE: f"!{self._home}"}] * len(ranks)
        before = 0
        if self._home and not self._has_home_bundle and (for_servers := self._cpus_for_servers()):
            self._has_home_bundle, before = True, 1
            bundles, where = [{"CPU": for_servers}, *bundles], [{_NODE: self._home}, *where]
        options = {"bundle_label_selector": where} if self._home else {}
        group = self._ray.util.placement_group(bundles, strategy="PACK", **options)
        self._groups |= {rank: (group, before + place) for place, rank in enumerate(ranks)}

    def strategy(self, rank: int) -> Any:
        """Where its actor belongs."""
        if rank not in self._groups:
            self.reserve(range(rank, rank + 1))
        group, bundle = self._groups[rank]
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
        if self._ray.util.client.ray.is_connected():
            return  # this process, and home with it, is outside of the cluster
        self._home = self._ray.get_runtime_context().get_node_id()
        if not self.cpus:
            raise ConfigError(
                "--servers-apart is given, and Ray's cluster has no node for workers but this one, where servers are",
                why="home and its servers are where this command runs, and no worker is to be there",
                fix="ray start --address ADDRESS on other hosts, or --ray-address of a larger cluster; or leave it out",
            )

    def _cpus_for_servers(self) -> float:
        """Of home's node, which may have been told to have none: then Ray puts nothing there anyway."""
        has = next((n["Resources"].get("CPU", 0.0) for n in self._alive() if n["NodeID"] == self._home), 0.0)
        return float(min(self._job.servers * cpus(self._job), has))

    def _free_cpus(self) -> float:
        if not self._home:
            return float(self._ray.available_resources().get("CPU", 0.0))
        free = self._ray._private.state.available_resources_per_node()
        return max((there.get("CPU", 0.0) for node, there in free.items() if node != self._home), default=0.0)

    def _alive(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]


def cpus(job: Job) -> int:
    """How many of Ray's CPUs a worker has."""
    return job.threads or 1
