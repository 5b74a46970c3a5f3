"""Whether all workers read the same data, where they are to: batches are dealt by number."""

from __future__ import annotations

from paceline.protocol.messages import Reads


class Readings:
    """What each worker has said of each loader."""

    def __init__(self) -> None:
        self._of: dict[int, dict[int, int]] = {}  # loader -> rank -> fingerprint
        self._told: set[int] = set()

    def take(self, rank: int, reads: Reads) -> str:
        """What there is to say of it, once a loader; usually nothing."""
        others = self._of.setdefault(reads.loader, {})
        others[rank] = reads.fingerprint
        differing = next((other for other in sorted(others) if others[other] != reads.fingerprint), None)
        if differing is None or reads.loader in self._told:
            return ""
        self._told.add(reads.loader)
        return (
            f"note: workers {min(rank, differing)} and {max(rank, differing)} do not have the same data, so it is not "
            "each sample once an epoch: seed what is random before the data are made (torch.manual_seed), "
            "or, where each is to have its own, --data own"
        )
