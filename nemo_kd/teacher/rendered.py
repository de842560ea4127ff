"""Keep what the records of a job make, so that each is tokenized once."""

from __future__ import annotations

import errno
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import torch.distributed as dist

from nemo_kd.batch import Example
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.run.collective import gather, on_every_rank

ID_BYTES = 4


@dataclass
class _Share:
    """What one rank tokenized, in a file of its machine.

    Attributes:
        ends: where each record's ids and loss mask end in the file.
        reasons: of the records that make no example, by their place in the share.
    """

    path: str = ""
    machine: str = ""
    ends: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)


class RenderedRecords:
    """Examples of a dataset, tokenized once by all ranks together; every rank creates one.

    A rank keeps its share in a temporary file (5 bytes per token), which the ranks of its machine
    open before its name is removed. What ranks of other machines tokenized is tokenized again.

    Attributes:
        counts: records by reason why they make no example, what is left out of the others, and
            their `tokens`.

    Raises:
        DataError, OSError: on every rank, for a record that cannot be tokenized.
    """

    def __init__(self, dataset: TokenizedDataset, indices: Sequence[int]) -> None:
        self._dataset = dataset
        self._indices = np.array(indices, dtype=np.int64)
        self.counts: Counter[str] = Counter()
        own = _Share()
        with tempfile.NamedTemporaryFile(prefix="nemo_kd-") as file:
            own.path = file.name
            own.machine = os.uname().nodename
            counts: list[Counter[str]] = gather(lambda: self._render(own, file))  # type: ignore[arg-type]
            self._shares = gather(lambda: own)
            self._files = on_every_rank(
                lambda: [_open(share) for share in self._shares]
            )
            dist.barrier()  # the name goes when all have opened the file
        for each in counts:
            self.counts += each

    def __getitem__(self, index: int) -> Example | str:
        place = int(np.searchsorted(self._indices, index))
        row, rank = divmod(place, len(self._shares))
        share = self._shares[rank]
        if row in share.reasons:
            return share.reasons[row]
        file = self._files[rank]
        if file is None:
            return self._dataset[index]
        start = share.ends[row - 1] if row else 0
        content = os.pread(file.fileno(), share.ends[row] - start, start)
        if len(content) != share.ends[row] - start:
            raise OSError(errno.EIO, os.strerror(errno.EIO), share.path)
        size = len(content) // (ID_BYTES + 1)
        ids = np.frombuffer(content, "<i4", size).astype(np.int64)
        trained = np.frombuffer(content, "u1", size, ID_BYTES * size)
        return Example(index, ids[:-1], ids[1:], trained[1:].astype(np.float32))

    def _render(self, own: _Share, file: BinaryIO) -> Counter[str]:
        counts: Counter[str] = Counter()
        share = self._indices[dist.get_rank() :: dist.get_world_size()].tolist()
        for row, index in enumerate(share):
            found = self._dataset[index]
            if isinstance(found, str):
                own.reasons[row] = found
                counts[found] += 1
            else:
                counts["tokens"] += found.num_tokens
                counts += found.left_out
                ids = np.append(found.tokens_S, found.labels_S[-1])
                trained = np.append(0, found.loss_mask_S)
                file.write(
                    ids.astype("<i4").tobytes() + trained.astype("u1").tobytes()
                )
            own.ends.append(file.tell())
        file.flush()
        return counts


def _open(share: _Share) -> BinaryIO | None:
    """Open another rank's file; None on another machine, which may see the file, but late."""
    return open(share.path, "rb") if share.machine == os.uname().nodename else None
