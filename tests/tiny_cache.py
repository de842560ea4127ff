"""Rows and caches for tests, made without a model."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache.index import ChunkIndex, ChunkSummary
from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.manifest import Manifest, codec_settings
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.segment import publish_segment
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.data import CacheConfig

COMPUTED_WITH = {"micro_batch_size": 1}


def row(
    index: int,
    length: int = 5,
    k: int = 4,
    vocab_size: int = 50,
    cache: CacheConfig | None = None,
    temperatures: tuple[float, ...] = (1.0,),
) -> CachedExample:
    """A row of random logits, whose first half is a prompt; what is kept follows `cache`, or is k everywhere."""
    random = np.random.default_rng(index)
    logits = random.normal(size=(length, vocab_size)) * 3
    order = np.argsort(-logits, axis=1)[:, :k]
    top = np.take_along_axis(logits, order, 1)
    logits = logits - top[:, :1]
    top = top - top[:, :1]
    log_sum_exp = np.log(np.exp(logits).sum(1))
    kept = (
        np.ones(top.shape, dtype=bool)
        if cache is None
        else cache.kept(np.exp(top - log_sum_exp[:, None]))
    )
    tails = []
    for temperature in temperatures:
        weights = np.exp(logits / temperature)
        head = np.where(kept, np.exp(top / temperature), 0).sum(1)
        tails.append(1 - head / weights.sum(1))
    mask = np.ones(length, dtype=np.float32)
    mask[: length // 2] = 0
    labels = random.integers(vocab_size, size=length)
    label_logprobs = np.take_along_axis(logits, labels[:, None], 1)[:, 0] - log_sum_exp
    teacher = TeacherRows(
        np.arange(length),
        np.where(kept, top, -np.inf).astype(np.float32),
        np.where(kept, order, -1),
        log_sum_exp.astype(np.float32),
        np.array(tails, dtype=np.float32).T.copy(),
        temperatures,
        label_logprobs.astype(np.float32),
    )
    return CachedExample(
        Example(index, random.integers(vocab_size, size=length), labels, mask), teacher
    )


def manifest(codec: str = "json", **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "codec": codec_settings(CacheConfig(codec=codec)), "top_k": 4, "vocab_size": 50, "tokenizer_size": 50, "seq_length": 64,
        "teacher": {"name": "t", "weights": "w"}, "tokenizer": "tok", "chat_template": None, "n_examples_per_chunk": 4,
        "dataset": {"path": "d", "fingerprint": "f", "start_from_idx": 0, "end_at_idx": 9}, "segment_examples": 2,
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def chunks_of(manifest: Manifest) -> list[range]:
    """The record indices of every chunk that the manifest calls for."""
    indices = range(
        manifest.dataset["start_from_idx"], manifest.dataset["end_at_idx"] + 1
    )
    size = manifest.n_examples_per_chunk or len(indices)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def write(folder: Path, name: str = "train_CHUNK_ID.jsonl", **changes: Any) -> Path:
    """A whole cache of ten rows; row i has 3 + i % 4 positions."""
    layout, description = CacheLayout(str(folder / name)), manifest(**changes)
    writer = CacheWriter(layout, description, chunks_of(description))
    for segment in writer.missing_segments():
        write_segment(layout, description, segment)
    writer.assemble_complete()
    writer.close()
    return folder / name


def write_segment(layout: CacheLayout, description: Manifest, segment: Any) -> None:
    """Publishes a segment of rows."""
    rows = [row(index, 3 + index % 4) for index in segment[1]]
    publish_segment(layout, description, segment, rows, COMPUTED_WITH)


def everywhere(row: CachedExample) -> CachedExample:
    """The row with teacher rows at all positions: without any entry where there is no target."""
    positions_P, num_tokens = row.teacher.positions_P, row.example.num_tokens
    filler = {"topk_logits_PK": -np.inf, "topk_token_ids_PK": -1, "tail_mass_PT": 1, "tail_token_ids_PM": -1}  # fmt: skip
    fields = {}
    for name, values in vars(row.teacher).items():
        if isinstance(values, np.ndarray):
            fields[name] = np.full(
                (num_tokens, *values.shape[1:]), filler.get(name, 0), values.dtype
            )
            fields[name][positions_P] = values
    fields["positions_P"] = np.arange(num_tokens)
    return replace(row, teacher=replace(row.teacher, **fields))


def same(a: CachedExample, b: CachedExample) -> bool:
    """Whether two rows hold the same numbers in the fields that NeMo-Aligner's format has."""
    return all(
        np.array_equal(getattr(getattr(a, part), name), getattr(getattr(b, part), name))
        for part, names in (("example", ("tokens_S", "labels_S", "loss_mask_S")), ("teacher", ("positions_P", "topk_logits_PK", "topk_token_ids_PK", "log_sum_exp_logits_P")))
        for name in names
    )  # fmt: skip


def same_places(a: ChunkIndex, b: ChunkIndex) -> bool:
    """Whether two indexes describe the same lines of the same file."""
    a, b = (
        replace(one, facts=one.facts._replace(mtime_ns=0), summary=None)
        for one in (a, b)
    )
    return a.to_bytes() == b.to_bytes()


def summaries(path: Path | str) -> dict[int, ChunkSummary]:
    """The summaries of a cache's complete chunks, by number."""
    return CacheReader(str(path), partial=True).manifests[0].chunks


def edit_index(path: Path, **changes: object) -> None:
    """Change the summary in the index of a chunk; the index stays well formed."""
    place = path.with_name(path.name + ".idx")
    index = ChunkIndex.parse(place.read_bytes())
    summary = replace(index.summary, **changes)
    facts = index.facts
    if "bytes" in changes:
        facts = facts._replace(bytes=changes["bytes"])
    place.write_bytes(replace(index, facts=facts, summary=summary).to_bytes())


def as_format_2(path: Path, journaled: int = 0) -> None:
    """Turn a cache into the same one of format 2, whose last `journaled` chunks only the manifest's journal lists."""
    layout = CacheLayout(str(path))
    chunks = {str(key): asdict(summary) for key, summary in summaries(path).items()}
    for key in chunks:
        place = layout.index_path(int(key))
        index = ChunkIndex.parse(place.read_bytes())
        content = b"NKDIDX02" + replace(index, summary=None).to_bytes()[8:-4]
        place.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
    listed = list(chunks)[: len(chunks) - journaled]
    payload = json.loads(layout.manifest_path.read_bytes())
    payload |= {"format_version": 2, "chunks": {key: chunks[key] for key in listed}}
    content = json.dumps(payload).encode()
    layout.manifest_path.write_bytes(content)
    entries = [{"manifest": hashlib.sha256(content).hexdigest()}]
    entries += [
        {"chunk": key, "summary": chunks[key]} for key in chunks if key not in listed
    ]
    if journaled:
        lines = (json.dumps(entry).encode() for entry in entries)
        layout.manifest_path.with_suffix(".json.journal").write_bytes(
            b"".join(b"%08x %s\n" % (zlib.crc32(x), x) for x in lines)
        )
