"""Report what stage 1 has written, how good it is, and which command comes next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import ChunkSummary, Manifest
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.cache import CacheConfig
from nemo_kd.data.records import DataError
from nemo_kd.teacher.job import Job
from nemo_kd.terminal import size_text

POOR_KEPT_MASS = 0.9
"""Below this share of the teacher's probability inside the kept ids, a warning tells what to do."""


@dataclass(frozen=True)
class Work:
    """This run's part of a cache: tokens computed, wall time, and chunks that were complete before."""

    num_tokens: int
    seconds: float
    num_complete_before: int


def check_end(job: Job, writer: CacheWriter) -> str:
    """Compare the cache on disk with what this job was asked for.

    Returns:
        What other shards still have to do, empty if the cache is complete.

    Raises:
        CacheError: part of this job's own work is missing, because somebody removed files while it ran.
        DataError: the cache is complete and has no rows.
    """
    shard, num_shards = job.config.part_number()
    incomplete = writer.incomplete()
    if not incomplete:
        if not any(summary.examples for summary in writer.manifest.chunks.values()):
            raise DataError(
                f"{job.config.output_path}: the cache is complete and has no rows: every record was skipped"
            )
        return ""
    by_shard = writer.missing_by_shard()
    incomplete = writer.missing  # without the chunks that other shards have listed meanwhile
    if num_shards == 1 or by_shard.get(shard):
        own = by_shard.get(shard, 0)
        raise CacheError(
            f"{writer.layout.folder}: {len(incomplete)} of {len(job.chunks)} chunks are missing at the end of this job "
            f"({_some(incomplete)}), of whose work {own} segments are not there: files were removed while it ran; find "
            "out what removes them, then run the same command again: it computes what is missing"
        )
    if not incomplete:
        return ""
    others = ", ".join(
        f"{other}/{num_shards} ({count} segments)"
        for other, count in sorted(by_shard.items())
        if count
    )
    return (
        f"{len(incomplete)} of {len(job.chunks)} chunks ({_some(incomplete)}) wait for other shards: "
        f"{others or 'being put together'}. "
        f"Shard {shard}/{num_shards} is done and on disk; whichever shard ends last puts the chunks together. If one of "
        "them has failed, run it again, or the same command with shard=0/1 once no shard runs"
    )


def summary_lines(job: Job, manifest: Manifest, work: Work) -> list[tuple[str, str]]:
    """Describe the cache as it is now, other shards' chunks included."""
    total = _total(manifest)
    skipped = sorted(total.skipped.items())
    rate = f"{work.num_tokens:,} tokens in {timedelta(seconds=round(work.seconds))}"
    if work.num_tokens:
        rate += f", {work.num_tokens / max(work.seconds, 1e-9):,.0f} tokens/s"
    lines = [
        ("cache", job.config.output_path),
        (
            "chunks",
            f"{len(manifest.chunks)} of {len(job.chunks)} ({work.num_complete_before} were complete before)",
        ),
        ("examples", f"{total.examples:,}"),
        ("tokens", f"{total.tokens:,} ({total.loss_tokens:,} in the loss)"),
        (
            "size",
            f"{size_text(total.bytes)}, {total.bytes / max(1, total.tokens):,.1f} bytes per token",
        ),
        ("computed now", rate),
    ]
    if total.loss_tokens:  # else other shards' segments are still awaited
        lines += [
            (
                f"mass of the kept ids (at most {manifest.top_k})",
                f"{_share(total.kept_mass_sum, total):.4f}",
            ),
            ("label among the kept ids", f"{_share(total.label_in_topk, total):.4f}"),
            ("kept ids per position", f"{_share(total.kept_tokens, total):.1f}"),
        ]
    lines += [(f"skipped: {reason}", f"{count:,}") for reason, count in skipped] or [
        ("skipped", "0")
    ]
    if job.split:
        lines.insert(0, ("split", job.split))
    return lines


def next_commands(jobs: Sequence[Job]) -> list[str]:
    """Return command lines that check the caches and train a student on them."""
    paths = {job.split or "train": job.config.output_path for job in jobs}
    prefixes = {"train": "TRAIN_CACHE", "validation": "VALIDATION_CACHE"} | paths
    data = ", ".join(f"{split}: [{path}]" for split, path in prefixes.items())
    return [
        *(f"check: logit_cache verify {shlex.quote(path)}" for path in paths.values()),
        "next:  train_gpt_knowledge_distillation pretrained_checkpoint.restore_from_path=STUDENT "
        + shlex.quote(f"model.data.data_prefix={{{data}}}"),
    ]


def kept_mass_advice(manifest: Manifest, cache: CacheConfig) -> str:
    """Return a warning if the kept ids hold little of the teacher's probability, else an empty text."""
    total = _total(manifest)
    if not total.loss_tokens:
        return ""
    return advice(
        _share(total.kept_mass_sum, total), _share(total.kept_tokens, total), manifest.top_k, cache
    )


def advice(kept_mass: float, kept_ids: float, top_k: int, cache: CacheConfig) -> str:
    """Return what suits a cache that keeps `kept_mass` of the probability in `kept_ids` ids per position."""
    if kept_mass >= POOR_KEPT_MASS:
        return ""
    if cache.tail_samples:
        support = f"train with support=sampled: the {cache.tail_samples} tail samples per position stand for the rest"
    else:
        support = (
            "train with support=tail (the default), or write the cache again with cache.tail_samples=4 and train with "
            "support=sampled"
        )
    if cache.codec == "json" or kept_ids > 0.9 * top_k:
        remedy = f"a larger top_k (now {top_k})"
    elif cache.top_p < 1:
        remedy = f"a larger cache.top_p (now {cache.top_p:g})"
    else:
        remedy = f"a lower cache.min_probability (now {cache.probability_floor:g})"
    return (
        f"the kept ids hold {kept_mass:.1%} of the teacher's probability: {support}; {remedy} keeps more. "
        "support=renormalize sees nothing outside them: with it keep sft_loss_weight above 0"
    )


def _total(manifest: Manifest) -> ChunkSummary:
    total = ChunkSummary(0, 0)
    for summary in manifest.chunks.values():
        total.add(summary)
    return total


def _share(value: float, total: ChunkSummary) -> float:
    return value / max(1, total.loss_tokens)


def _some(chunks: Sequence[int]) -> str:
    names = [f"{chunk}" for chunk in chunks[:5]]
    return ", ".join(names + ["..."] * (len(chunks) > len(names)))
