"""Write a cache again: in another codec or container, with fewer tokens, or from other files."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample
from nemo_kd.cache.layout import SUFFIXES, CacheError, CacheLayout
from nemo_kd.cache.manifest import UNKNOWN, Manifest, codec_settings
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.record import check_vocabulary, trimmed
from nemo_kd.cache.reduce import keep, limited
from nemo_kd.cache.segment import Record, publish_segment
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.data import CacheConfig
from nemo_kd.data.tokenizer import tokenizer_fingerprint
from nemo_kd.tools.vllm_files import VllmRows

Source = CacheReader | VllmRows
"""Rows in the order of their indices, with the manifests that describe their origin."""


MISSING = "not in the source"
"""Reason why a record makes no row."""


def convert(
    source: Source,
    target: str,
    cache: CacheConfig,
    top_k: int | None = None,
    vocab_size: int | None = None,
    n_examples_per_chunk: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Manifest:
    """Write the rows of `source` to `target`, with a progress bar; a killed conversion resumes.

    Args:
        target: a file or a template; its suffix chooses the container.
        cache: codec, and the tokens to keep. Temperatures and stored positions are the source's.
        vocab_size: of a source without a manifest.
        tokenizer: the teacher's, of a source without a manifest; without one, training cannot
            compare it with the student's.

    Raises:
        CacheError: the source is damaged or out of order, or the target holds something else.
    """
    layout = CacheLayout(target)
    if not target.endswith(SUFFIXES):
        raise CacheError(
            f"{target}: ends in none of {', '.join(SUFFIXES)}, which choose how lines are stored"
        )
    if Path(source.path).resolve() == Path(target).resolve():
        raise CacheError(f"{target}: is the source; give another target")
    ends = (source[0].example.index, source[len(source) - 1].example.index)
    if ends[1] < ends[0]:
        raise CacheError(
            f"{source.path}: ends with a lower index than it begins; sort the lines by index"
        )
    manifest = _manifest(source, ends, cache, top_k, vocab_size, tokenizer)
    if n_examples_per_chunk or not layout.is_template:
        manifest.n_examples_per_chunk = n_examples_per_chunk
    first = manifest.dataset["start_from_idx"]
    end = manifest.dataset["end_at_idx"] + 1
    size = manifest.n_examples_per_chunk or end - first
    chunks = [
        range(start, min(start + size, end)) for start in range(first, end, size)
    ]
    writer = CacheWriter(layout, manifest, chunks)
    try:
        for segment in tqdm(
            writer.missing_segments(), unit=" segments", desc="converting"
        ):
            records = list(_records(source, segment[1], cache, manifest))
            publish_segment(
                layout, manifest, segment, records, {"converted_from": source.path}
            )
            writer.assemble_complete()
        writer.assemble_complete()
    finally:
        writer.close()
    return writer.manifest


def _records(
    source: Source,
    indices: range,
    cache: CacheConfig,
    manifest: Manifest,
) -> Iterator[Record]:
    """Yield the reduced row of every index, or why there is none."""
    positions = range(len(source))
    first = bisect_left(positions, indices[0], key=lambda at: source[at].example.index)
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
        yield from itertools.repeat(MISSING, index - expected)
        yield _reduced(row, cache, manifest)
        expected = index + 1
    yield from itertools.repeat(MISSING, indices[-1] + 1 - expected)


def _reduced(
    row: CachedExample, cache: CacheConfig, manifest: Manifest
) -> CachedExample:
    row = trimmed(row)
    check_vocabulary(row, manifest.vocab_size, f"example {row.example.index}")
    teacher = limited(row.teacher, manifest.top_k)
    # Unused entries have logit -inf.
    log_p_PK = teacher.topk_logits_PK - teacher.log_sum_exp_logits_P[:, None]
    teacher = keep(teacher, cache.kept(np.exp(log_p_PK)))
    if (
        "tail_samples" not in manifest.codec
    ):  # all rows of a cache hold the same fields
        teacher = replace(teacher, tail_token_ids_PM=None)
    return replace(row, teacher=teacher)


def _manifest(
    source: Source,
    ends: tuple[int, int],
    cache: CacheConfig,
    top_k: int | None,
    vocab_size: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Manifest:
    """Return the manifest of the target, whose records lie between `ends`."""
    codec = codec_settings(cache)
    dataset = {"start_from_idx": ends[0], "end_at_idx": ends[1]}
    if not source.manifests:
        if vocab_size is None:
            raise CacheError(
                f"{source.path}: no manifest records the teacher's vocabulary; give --vocab-size "
                "(vocab_size in the model's config.json)"
            )
        return Manifest(
            codec=codec | {"temperatures": list(source[0].teacher.temperatures[1:])},
            top_k=top_k or source.largest_k,
            vocab_size=vocab_size,
            tokenizer_size=len(tokenizer) if tokenizer else vocab_size,
            seq_length=0,
            teacher={"name": UNKNOWN, "source": source.fingerprint()},
            tokenizer=tokenizer_fingerprint(tokenizer) if tokenizer else UNKNOWN,
            chat_template=None,
            dataset=dataset | {"path": source.path, "fingerprint": UNKNOWN},
            n_examples_per_chunk=None,
        )
    if vocab_size is not None or tokenizer is not None:
        raise CacheError(
            f"{source.path}: its manifest records vocabulary and tokenizer; leave --vocab-size and "
            "--tokenizer out"
        )
    known = source.manifests[0]
    records = [manifest.dataset for manifest in source.manifests]
    dataset["start_from_idx"] = min(record["start_from_idx"] for record in records)
    dataset["end_at_idx"] = max(record["end_at_idx"] for record in records)
    codec["temperatures"] = known.codec["temperatures"]
    codec |= _of_source(source, codec, known.codec)
    top_k = min(top_k or known.top_k, known.top_k)
    assert isinstance(source, CacheReader)  # the other source has no manifest
    selection = source.source.removeprefix(source.path)
    is_cut = cache.probability_floor > 0 or cache.top_p < 1
    if "tail_samples" in known.codec and not is_cut and top_k == known.top_k:
        codec |= {name: known.codec[name] for name in ("tail_samples", "seed")}
    return replace(
        known,
        codec=codec,
        top_k=top_k,
        dataset=known.dataset | dataset,
        teacher=known.teacher | {"converted_from": known.digest + selection},
        merged_chunks=None,
        chunks={},
    )


def _of_source(
    source: Source, codec: dict[str, Any], known: dict[str, Any]
) -> dict[str, Any]:
    """Return settings of the target's codec that depend on the source's.

    Raises:
        CacheError: the target cannot express which positions the source stores.
    """
    if codec["name"] == "packed" == known["name"]:
        kept = known.keys() & {"positions", "select"}
        stricter = {"min_probability": max, "top_p": min, "min_k": min}
        return {name: known[name] for name in kept} | {
            name: choose(codec[name], known[name]) for name, choose in stricter.items()
        }
    if "select" in known:
        raise CacheError(
            f"{source.path}: holds the teacher at selected positions ({known['select']}), which "
            "the json codec cannot express; stay with --codec packed"
        )
    return {}
