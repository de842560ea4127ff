"""Write a cache again: in another codec or container, with fewer tokens, or from other files."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import NamedTuple, Protocol

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


class Tokenizer(NamedTuple):
    """Fingerprint (`data.tokenizer.tokenizer_fingerprint`) and number of tokens."""

    fingerprint: str
    size: int


class Source(Protocol):
    """Rows in the order of their indices, with the manifests that describe their origin."""

    path: str
    manifests: list[Manifest]

    @property
    def largest_k(self) -> int:
        """Most tokens per position."""

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
    """Write the rows of `source` to `target`, with a progress bar; a killed conversion resumes.

    Args:
        target: a file or a template; its suffix chooses the container.
        cache: codec, and the tokens to keep. Temperatures and stored positions are the source's.
        vocab_size: of a source without a manifest.
        tokenizer: of a source without a manifest; without one, training cannot compare it with
            the student's.

    Raises:
        CacheError: the source is damaged or out of order, or the target holds something else.
    """
    layout = CacheLayout(target)
    if source.manifests and (vocab_size, tokenizer) != (None, None):
        raise CacheError(
            f"{source.path}: its manifest records vocabulary and tokenizer; leave --vocab-size and "
            "--tokenizer out"
        )
    for option, value in (
        ("--top-k", top_k),
        ("--examples-per-chunk", n_examples_per_chunk),
    ):
        if value is not None and value < 1:
            raise CacheError(f"{option}: {value} must be at least 1")
    if not target.endswith(SUFFIXES):
        raise CacheError(
            f"{target}: ends in none of {', '.join(SUFFIXES)}, which choose how lines are stored"
        )
    if isinstance(source, CacheReader):
        is_same_folder = layout.folder.resolve() == source.layout.folder.resolve()
        if is_same_folder and layout.output_path == source.layout.output_path:
            raise CacheError(f"{target}: is the source; give another target")
        source = _numbered(source)
    if n_examples_per_chunk is not None and not layout.is_template:
        raise CacheError(
            f"{target}: has no CHUNK_ID, which several chunks need; "
            "for example converted_CHUNK_ID.jsonl.zst"
        )
    manifest = _manifest(
        source, cache, top_k, vocab_size, n_examples_per_chunk, tokenizer
    )
    if not layout.is_template:
        manifest.n_examples_per_chunk = None
    indices = range(
        manifest.dataset["start_from_idx"], manifest.dataset["end_at_idx"] + 1
    )
    size = manifest.n_examples_per_chunk or len(indices)
    chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
    writer = CacheWriter(layout, manifest, chunks)
    try:
        for segment in tqdm(
            writer.missing_segments(), unit=" segments", desc="converting"
        ):
            sink = SegmentWriter(
                layout, manifest, segment, {"converted_from": source.path}
            )
            _copy(source, segment[1], sink, cache, manifest)
            sink.publish()
            writer.assemble_complete(up_to=segment[0])
        writer.assemble_complete()
    finally:
        writer.close()
    return writer.manifest


def _copy(
    source: Source,
    indices: range,
    sink: SegmentWriter,
    cache: CacheConfig,
    manifest: Manifest,
) -> None:
    positions = range(len(source))
    first = bisect_left(
        positions, indices[0], key=lambda place: source[place].example.index
    )
    expected = indices[0]
    for position in positions[first:]:
        row = source[position]
        index = row.example.index
        if index > indices[-1]:
            break
        if index < expected:
            raise CacheError(
                f"{source.path}: example {index} stands behind example {expected - 1}; sort the "
                "lines by index, or remove the field index, so that a line's place counts"
            )
        for _ in range(index - expected):
            sink.skip("not in the source")
        sink.write(_reduced(row, cache, manifest))
        expected = index + 1
    for _ in range(indices[-1] + 1 - expected):
        sink.skip("not in the source")


def _reduced(row: CachedExample, cache: CacheConfig, manifest: Manifest) -> CachedExample:
    row = trimmed(row)
    example = row.example
    ids = (example.tokens_S, example.labels_S, row.teacher.topk_token_ids_PK)
    largest = max(int(values.max(initial=-1)) for values in ids)
    if largest >= manifest.vocab_size:
        raise CacheError(
            f"example {example.index}: token id {largest} exceeds the vocabulary of "
            f"{manifest.vocab_size}; correct --vocab-size (vocab_size in the teacher's config.json)"
        )
    teacher = limited(row.teacher, manifest.top_k)
    # Unused entries have logit -inf.
    log_p_PK = teacher.topk_logits_PK - teacher.log_sum_exp_logits_P[:, None]
    teacher = keep(teacher, cache.kept(np.exp(log_p_PK)))
    if "tail_samples" not in manifest.codec:  # all rows of a cache hold the same fields
        teacher = replace(teacher, tail_token_ids_PM=None)
    return CachedExample(example, teacher)


def _numbered(source: CacheReader) -> Source:
    """Number rows by position if every chunk numbers its lines from 0.

    NeMo-Aligner's lines have no index, so readers take their place in the chunk.
    """
    starts = np.cumsum([0, *source.chunk_sizes()])[:-1].tolist()
    if source.manifests or len(starts) < 2:
        return source
    if any(source[start].example.index != 0 for start in starts):
        return source
    return _ByPosition(source)


class _ByPosition:
    def __init__(self, source: CacheReader) -> None:
        self.source = source
        self.path = source.path
        self.manifests = source.manifests
        self.largest_k = source.largest_k
        self.fingerprint = source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> CachedExample:
        row = self.source[position]
        return replace(row, example=replace(row.example, index=position))


def _manifest(
    source: Source,
    cache: CacheConfig,
    top_k: int | None,
    vocab_size: int | None,
    n_examples_per_chunk: int | None,
    tokenizer: Tokenizer | None,
) -> Manifest:
    first = source[0]
    first_index = first.example.index
    last_index = source[len(source) - 1].example.index
    if last_index < first_index:
        raise CacheError(
            f"{source.path}: the last line has index {last_index}, the first {first_index}; "
            "sort the lines by index"
        )
    if source.manifests:
        return _manifest_of(source.manifests, cache, top_k, n_examples_per_chunk)
    if vocab_size is None:
        raise CacheError(
            f"{source.path}: no manifest records the teacher's vocabulary; give --vocab-size "
            "(vocab_size in the model's config.json)"
        )
    tokenizer = tokenizer or Tokenizer(UNKNOWN, vocab_size)
    return Manifest(
        codec=codec_settings(cache)
        | {"temperatures": list(first.teacher.temperatures[1:])},
        top_k=top_k or source.largest_k,
        vocab_size=vocab_size,
        tokenizer_size=tokenizer.size,
        seq_length=0,
        teacher={"name": UNKNOWN, "source": source.fingerprint()},
        tokenizer=tokenizer.fingerprint,
        chat_template=None,
        dataset={
            "path": source.path,
            "fingerprint": UNKNOWN,
            "start_from_idx": first_index,
            "end_at_idx": last_index,
        },
        n_examples_per_chunk=n_examples_per_chunk,
    )


def _manifest_of(
    manifests: list[Manifest],
    cache: CacheConfig,
    top_k: int | None,
    n_examples_per_chunk: int | None,
) -> Manifest:
    """Return the manifest of caches after `cache` and `top_k` were applied to their rows."""
    known = manifests[0]
    top_k = top_k or max(manifest.top_k for manifest in manifests)
    codec = codec_settings(cache) | {"temperatures": known.codec["temperatures"]}
    if cache.codec == "packed" and known.codec["name"] == "packed":
        for name, stricter in (("min_probability", max), ("top_p", min), ("min_k", min)):
            codec[name] = stricter(codec[name], known.codec[name])
        codec["positions"] = known.codec["positions"]
    drops_tokens = top_k < known.top_k or cache.probability_floor > 0 or cache.top_p < 1
    if "tail_samples" in known.codec and not drops_tokens:
        codec |= {name: known.codec[name] for name in ("tail_samples", "seed")}
    records = {
        "start_from_idx": min(
            manifest.dataset["start_from_idx"] for manifest in manifests
        ),
        "end_at_idx": max(manifest.dataset["end_at_idx"] for manifest in manifests),
    }
    return replace(
        known,
        codec=codec,
        top_k=min(top_k, known.top_k),
        dataset=known.dataset | records,
        teacher=known.teacher | {"converted_from": known.hash()},
        n_examples_per_chunk=n_examples_per_chunk or known.n_examples_per_chunk,
        merged_chunks=None,
        chunks={},
    )
