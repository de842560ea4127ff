"""The common list of work: segments that replicas of the teacher claim one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from torch.distributed import Store, get_process_group_ranks, get_rank

from nemo_kd.cache.writer import Segment
from nemo_kd.mcore.groups import ProcessGroups


class WorkList:
    """Hands out segments through a counter in the store that all ranks share, so that a slow replica holds up nobody.

    Ranks that must step together (a replica; with expert parallelism several, each in a lane of its own) follow their
    first rank, which asks the counter for as many segments as there are lanes. Nothing here is a collective.

    Args:
        store: keys below it belong to this list alone.
        reason_to_stop: asked before every segment; None: go on. Every rank asks, so that each can tell its own; the
            first rank's answer counts.
    """

    def __init__(
        self,
        store: Store,
        segments: Sequence[Segment],
        groups: ProcessGroups,
        reason_to_stop: Callable[[], str | None],
    ) -> None:
        self._store, self._segments, self._groups, self._reason_to_stop = (
            store,
            segments,
            groups,
            reason_to_stop,
        )
        self._team = get_process_group_ranks(groups.lockstep)[0]
        self._leader = self._team == get_rank()
        self._turns = 0

    def claims(self) -> Iterator[Segment | None]:
        """This lane's segments until the list is empty; None where only other lanes got one. May run ahead of the work."""
        turn, lanes = 0, self._groups.lockstep_lanes
        while True:
            key = f"claim/{self._team}/{turn}"
            if self._leader:
                self._store.set(key, str(self._store.add("next", lanes) - lanes))
            first = int(self._store.get(key))
            if first >= len(self._segments):
                return
            mine = first + self._groups.lane
            yield self._segments[mine] if mine < len(self._segments) else None
            turn += 1

    def goes_on(self) -> bool:
        """Whether to work on the next claimed segment, the same answer on all ranks that step together."""
        key = f"go/{self._team}/{self._turns}"
        self._turns += 1
        reason = self._reason_to_stop()
        if self._leader:
            if reason is not None:
                self._store.set("stopped", reason)
            self._store.set(key, "stop" if reason is not None else "go")
        return self._store.get(key) == b"go"

    def wait_for_all(self, num_ranks: int, meanwhile: Callable[[], None]) -> str | None:
        """Waits until all ranks are done with the list; returns why one of them stopped before its end, if one did.

        A rank that dies ends the others through their launcher, one that hangs ends itself.
        """
        self._store.add("finished", 1)
        while self._store.add("finished", 0) < num_ranks:
            meanwhile()
            time.sleep(0.05)
        return self._store.get("stopped").decode() if self._store.check(["stopped"]) else None


def wait_until(store: Store, key: str, meanwhile: Callable[[], None]) -> None:
    """Waits for a key of the store, however long it takes."""
    while not store.check([key]):
        meanwhile()
        time.sleep(0.05)
