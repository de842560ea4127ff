"""Ranks publish their segments from processes of their own, beside the threads of a live process group."""

from __future__ import annotations

import torch

from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.segment import SegmentPublisher
from nemo_kd.cache.writer import CacheWriter
from tests.tiny_cache import COMPUTED_WITH, chunks_of, manifest, row, write
from tests.unit.test_cache_writer import content


def publish_share(path: str) -> int:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    layout, description = CacheLayout(path), manifest("packed")
    writer = (
        CacheWriter(layout, description, chunks_of(description)) if rank == 0 else None
    )
    box = [writer.missing_segments() if writer is not None else None]
    torch.distributed.broadcast_object_list(box, src=0)
    with SegmentPublisher(layout, description, COMPUTED_WITH) as publisher:
        for segment in box[0][rank::size]:
            publisher.publish(
                segment, [row(index, 3 + index % 4) for index in segment[1]]
            )
            torch.randn(300, 300) @ torch.randn(
                300, 300
            )  # this process computes meanwhile
    torch.distributed.barrier()
    if writer is not None:
        writer.assemble_complete()
        writer.close()
    return len(publisher.done)


def test_ranks_publish_side_by_side(ranks, tmp_path):
    name = "train_CHUNK_ID.jsonl.zst"
    write(tmp_path / "straight", name, codec="packed")
    assert ranks(2).run(publish_share, str(tmp_path / "cache" / name)) == [3, 2]
    assert content(tmp_path / "cache") == content(tmp_path / "straight")
