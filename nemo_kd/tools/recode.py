"""Writes a cache again: in the other codec or container, with fewer tokens, or from another program's files."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from nemo_kd.batch import CachedExample
from nemo_kd.cache.layout import SUFFIXES, CacheError, CacheLayout
from nemo_kd.cache.manifest import UNKNOWN, Manifest, codec_settings
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.record import trimmed
from nemo_kd.cache.reduce import keep, limited
from nemo_kd.cache.segment import SegmentWriter
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.cache import CacheConfig

log = logging.getLogger(__name__)


class Tokenizer(NamedTuple):
    """What a manifest says of a tokenizer: `data.tokenizer.tokenizer_fingerprint` and the number of its tokens."""

    fingerprint: str
    size: int


class Source(Protocol):
    """Rows in the order of their indices, and what is known about their origin."""

    path: str
    manifests: list[Manifest]

    @property
    def largest_k(self) -> int:
        """Most tokens a position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> CachedExample: ...

    def fingerprint(self) -> str: ...


def convert(
    source: Source,
    target: str,
    cache: CacheConfig,
    top_k: int | None = None,
    vocab_size: int | None = None,
    n_examples_per_chunk: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Manifest:
    """Writes the rows of `source` to `target`; killed and run again, it continues. Shows a progress bar.

    Args:
        target: a file or a template; its suffix chooses the container.
        cache: codec, and what is kept of what the source holds. Temperatures and stored positions are the source's.
        vocab_size: of a source without a manifest.
        tokenizer: that wrote a source without a manifest; without one, training cannot tell whether it is the student's.

    Raises:
        CacheError: the source is damaged or out of order, or the target holds something else.
    """
    layout = CacheLayout(target)
    if source.manifests and (vocab_size, tokenizer) != (None, None):
        raise CacheError(
            f"{source.path}: its manifest tells vocabulary and tokenizer; leave --vocab-size and --tokenizer out"
        )
    for option, value in (("--top-k", top_k), ("--examples-per-chunk", n_examples_per_chunk)):
        if value is not None and value < 1:
            raise CacheError(f"{option}: {value} must be at least 1")
    if not target.endswith(SUFFIXES):
        raise CacheError(
            f"{target}: ends in none of {', '.join(SUFFIXES)}, which tell how lines are stored"
        )
    if isinstance(source, CacheReader):
        if (
            layout.folder.resolve() == source.layout.folder.resolve()
            and layout.output_path == source.layout.output_path
        ):
            raise CacheError(f"{target}: is the source; give another target")
        source = _numbered(source)
    if n_examples_per_chunk is not None and not layout.is_template:
        raise CacheError(
            f"{target}: has no CHUNK_ID, which several chunks need; for example converted_CHUNK_ID.jsonl.zst"
        )
    manifest = _manifest(source, cache, top_k, vocab_size, n_examples_per_chunk, tokenizer)
    if not layout.is_template:
        manifest.n_examples_per_chunk = None
    first, last = manifest.dataset["start_from_idx"], manifest.dataset["end_at_idx"]
    size = manifest.n_examples_per_chunk or last - first + 1
    chunks = [range(start, min(start + size, last + 1)) for start in range(first, last + 1, size)]
    writer = CacheWriter(layout, manifest, chunks)
    try:
        for segment in tqdm(writer.missing_segments(), unit=" segments", desc="converting"):
            sink = SegmentWriter(layout, manifest, segment, {"converted_from": source.path})
            _copy(source, segment[1], sink, cache, manifest)
            sink.publish()
            writer.assemble_complete(up_to=segment[0])
        writer.assemble_complete()
    finally:
        writer.close()
    return writer.manifest


def _copy(
    source: Source, indices: range, sink: SegmentWriter, cache: CacheConfig, manifest: Manifest
) -> None:
    position = bisect_left(_Indices(source), indices[0])
    expected = indices[0]
    while position < len(source) and (row := source[position]).example.index <= indices[-1]:
        if row.example.index < expected:
            raise CacheError(
                f"{source.path}: example {row.example.index} stands behind example {expected - 1}; sort the lines by index, "
                "or remove the field index, so that a line's place counts"
            )
        for _ in range(row.example.index - expected):
            sink.skip("not in the source")
        sink.write(_reduced(row, cache, manifest))
        position, expected = position + 1, row.example.index + 1
    for _ in range(indices[-1] + 1 - expected):
        sink.skip("not in the source")


def _reduced(row: CachedExample, cache: CacheConfig, manifest: Manifest) -> CachedExample:
    row = trimmed(row)
    largest = max(
        int(ids.max(initial=-1))
        for ids in (row.example.tokens_S, row.example.labels_S, row.teacher.topk_token_ids_PK)
    )
    if largest >= manifest.vocab_size:
        raise CacheError(
            f"example {row.example.index}: token id {largest} exceeds the vocabulary of {manifest.vocab_size}; correct --vocab-size "
            "(vocab_size in the teacher's config.json)"
        )
    teacher = limited(row.teacher, manifest.top_k)
    used_PK = teacher.topk_token_ids_PK >= 0
    log_p_PK = (
        np.where(used_PK, teacher.topk_logits_PK, -np.inf) - teacher.log_sum_exp_logits_P[:, None]
    )
    teacher = keep(teacher, cache.kept(np.exp(log_p_PK)))
    if (
        "tail_samples" not in manifest.codec
    ):  # also of positions that lost no token: all rows hold the same fields
        teacher = replace(teacher, tail_token_ids_PM=None)
    return CachedExample(row.example, teacher)


def _numbered(source: CacheReader) -> Source:
    """The source, whose rows are numbered by position where every chunk numbers its lines anew.

    NeMo-Aligner's lines have no index, so readers take their place in the chunk.
    """
    starts = np.cumsum([0, *source.chunk_sizes()])[:-1].tolist()
    if (
        source.manifests
        or len(starts) < 2
        or any(source[start].example.index != 0 for start in starts)
    ):
        return source
    return _ByPosition(source)


class _ByPosition:
    def __init__(self, source: CacheReader) -> None:
        self.source, self.path, self.manifests = source, source.path, source.manifests
        self.largest_k, self.fingerprint = source.largest_k, source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> CachedExample:
        row = self.source[position]
        return replace(row, example=replace(row.example, index=position))


class _Indices(Sequence[int]):
    """The rows' indices, for a binary search that reads few rows."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: Any) -> Any:
        return self.source[position].example.index


def _manifest(
    source: Source,
    cache: CacheConfig,
    top_k: int | None,
    vocab_size: int | None,
    n_examples_per_chunk: int | None,
    tokenizer: Tokenizer | None,
) -> Manifest:
    first, last = source[0], source[len(source) - 1]
    if last.example.index < first.example.index:
        raise CacheError(
            f"{source.path}: the last line has index {last.example.index}, the first {first.example.index}; sort the lines by index"
        )
    k = top_k or max((manifest.top_k for manifest in source.manifests), default=source.largest_k)
    if not source.manifests:
        if vocab_size is None:
            raise CacheError(
                f"{source.path}: no manifest tells the teacher's vocabulary; give --vocab-size (vocab_size in the model's config.json)"
            )
        return Manifest(
            codec=codec_settings(cache) | {"temperatures": list(first.teacher.temperatures[1:])},
            top_k=k,
            vocab_size=vocab_size,
            tokenizer_size=tokenizer.size if tokenizer is not None else vocab_size,
            seq_length=0,
            teacher={"name": UNKNOWN, "source": source.fingerprint()},
            tokenizer=tokenizer.fingerprint if tokenizer is not None else UNKNOWN,
            chat_template=None,
            dataset={
                "path": source.path, "fingerprint": UNKNOWN, "start_from_idx": first.example.index,
                "end_at_idx": last.example.index,
            },
            n_examples_per_chunk=n_examples_per_chunk,
        )  # fmt: skip
    known = source.manifests[0]
    ends = [(m.dataset["start_from_idx"], m.dataset["end_at_idx"]) for m in source.manifests]
    return replace(
        known,
        codec=_codec(cache, known, k),
        top_k=min(k, known.top_k),
        dataset=known.dataset
        | {"start_from_idx": min(ends)[0], "end_at_idx": max(end for _, end in ends)},
        teacher=known.teacher | {"converted_from": known.hash()},
        n_examples_per_chunk=n_examples_per_chunk or known.n_examples_per_chunk,
        merged_chunks=None,
        chunks={},
    )


def _codec(cache: CacheConfig, known: Manifest, top_k: int) -> dict[str, Any]:
    """What the rows of `known` hold after `cache` has been applied to them."""
    codec = codec_settings(cache) | {"temperatures": known.codec["temperatures"]}
    if cache.codec == "packed" and known.codec["name"] == "packed":
        codec["min_probability"] = max(codec["min_probability"], known.codec["min_probability"])
        codec["top_p"] = min(codec["top_p"], known.codec["top_p"])
        codec["min_k"] = min(codec["min_k"], known.codec["min_k"])
        codec["positions"] = known.codec["positions"]
    drops_tokens = top_k < known.top_k or cache.probability_floor > 0 or cache.top_p < 1
    if "tail_samples" in known.codec and not drops_tokens:
        codec |= {name: known.codec[name] for name in ("tail_samples", "seed")}
    return codec
