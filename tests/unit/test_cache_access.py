"""Reading a cache from worker processes and from object stores."""

from __future__ import annotations

import multiprocessing

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.reader import CacheBlend, CacheReader
from nemo_kd.data.batches import MicroBatches
from tests.tiny_cache import row, same, write

NAMES = ("train_CHUNK_ID.jsonl", "train_CHUNK_ID.jsonl.zst")


def indices(reader) -> list[int]:
    return [reader[position].example.index for position in range(len(reader))]


@pytest.mark.parametrize("name", NAMES)
def test_forked_readers_read_the_same_rows(tmp_path, name):
    reader = CacheReader(str(write(tmp_path, name)))
    reader[0]  # a descriptor that the children must not share
    with multiprocessing.get_context("fork").Pool(3) as pool:
        rows = pool.map(reader.__getitem__, [index % 10 for index in range(60)])
    assert all(
        same(found, row(index % 10, 3 + index % 10 % 4))
        for index, found in enumerate(rows)
    )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_give_the_same_batches(tmp_path, method):
    blend = CacheBlend(
        [CacheReader(str(write(tmp_path / str(part), NAMES[part]))) for part in (0, 1)]
    )
    batches = [[0, 13, 7, 5], [19, 4], [10, 9, 3], [2, 2, 11, 1]]

    def load(num_workers, max_tokens=None):
        context = multiprocessing.get_context(method) if num_workers else None
        return list(
            DataLoader(
                MicroBatches(blend, 1, 2, 1, max_tokens, max_tokens is not None, 8),
                batch_sampler=batches,
                collate_fn=list,
                num_workers=num_workers,
                multiprocessing_context=context,
            )
        )

    here, there = load(0), load(2)
    found = [
        [micro_batch.indices_B.tolist() for micro_batch in batch] for batch in there
    ]
    assert found == [[[7], [5]], [[4]], [[3], [-1]], [[1], [1]]]
    here, there = here + load(0, 9), there + load(2, 9)
    for ours, theirs in zip(sum(here, []), sum(there, []), strict=True):
        assert torch.equal(ours.indices_B, theirs.indices_B)
        if ours.topk_logits_BSK is None:
            assert not (ours.indices_B >= 0).any()
            assert theirs.topk_logits_BSK is None
            continue
        assert torch.equal(ours.topk_logits_BSK, theirs.topk_logits_BSK)
        assert torch.equal(ours.tokens_BS, theirs.tokens_BS)


def test_an_object_store_is_asked_for_a_batch_at_once(tmp_path, monkeypatch):
    write(tmp_path)
    store = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        store.pipe_file(f"memory://bucket/once/{path.name}", path.read_bytes())
    requests = []
    for name in ("cat_file", "cat_ranges", "info", "ls"):
        inner = getattr(type(store), name)
        monkeypatch.setattr(
            type(store),
            name,
            lambda self, what, *args, _name=name, _inner=inner, **kwargs: (
                requests.append((_name, what)) or _inner(self, what, *args, **kwargs)
            ),
        )
    blend = CacheBlend([CacheReader("memory://bucket/once/train_CHUNK_ID.jsonl")])
    rows = MicroBatches(blend, 0, 1, 8)
    alone = [what for name, what in requests if name == "cat_file"]
    assert alone[0].endswith("train_manifest.json")
    indexes = next(what for name, what in requests if name == "cat_ranges")
    assert [path.rsplit("/", 1)[1] for path in indexes] == [
        f"train_{chunk}.jsonl.idx" for chunk in range(3)
    ]
    assert [name for name, _ in requests].count("ls") == 1
    rows.__getitems__([0, 4, 9])  # all indexes are in memory from here on
    requests.clear()
    assert rows.__getitems__([3, 8])[0].indices_B.tolist() == [3, 8]
    assert requests[0][0] == "cat_ranges"
    # The store in memory serves a request for two ranges by two of its own.
    assert [name for name, _ in requests if name != "info"] == [
        "cat_ranges",
        "cat_file",
        "cat_file",
    ]


def in_child(reader, position):
    return reader[position]


def test_an_object_store_is_read_by_url_also_in_a_forked_process(tmp_path):
    write(tmp_path, NAMES[1])
    store = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        store.pipe_file(f"memory://bucket/cache/{path.name}", path.read_bytes())
    url = f"memory://bucket/cache/{NAMES[1]}"
    reader = CacheReader(url)
    assert indices(reader) == list(range(10))
    assert reader.fingerprint() == CacheReader(str(tmp_path / NAMES[1])).fingerprint()
    assert indices(CacheReader(f"{url}[3:5]")) == [3, 4]
    blend = CacheBlend([reader])
    blend.will_read([1, 8])
    assert same(blend[8], row(8, 3))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert same(pool.apply(in_child, (reader, 6)), row(6, 5))
    # Without manifest and index a chunk is scanned; nothing is written to the store.
    store.rm("memory://bucket/cache/train_1.jsonl.zst.idx")
    with pytest.raises(CacheError, match="the chunk is not complete"):
        CacheReader(url)
    manifest = store.cat_file("memory://bucket/cache/train_manifest.json")
    store.rm("memory://bucket/cache/train_manifest.json")
    assert same(CacheReader(url)[5], row(5, 4))
    assert not store.exists("memory://bucket/cache/train_1.jsonl.zst.idx")
    store.rm("memory://bucket/cache/train_1.jsonl.zst")
    store.pipe_file("memory://bucket/cache/train_manifest.json", manifest)
    with pytest.raises(
        CacheError,
        match=r"memory://bucket/cache/train_1\.jsonl\.zst: the chunk is missing",
    ):
        CacheReader(url)
    with pytest.raises(CacheError, match="nothing://x/a"):
        CacheReader("nothing://x/a/t_CHUNK_ID.jsonl")
