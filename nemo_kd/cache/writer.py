"""Writes a cache chunk by chunk; a chunk is there whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np

from nemo_kd.batch import CachedExample
from nemo_kd.cache.files import atomic_file, remove_abandoned
from nemo_kd.cache.json_codec import encode, trimmed_length
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import ChunkSummary, Manifest
from nemo_kd.cache.offsets import LineFacts


class CacheWriter:
    """One process that writes the chunks of one layout and keeps their manifest.

    Args:
        manifest: what is about to be written. A cache that is there already is continued if it says the same.

    Raises:
        CacheError: another teacher, dataset or setting wrote the cache that is there, or nobody knows who did.
    """

    def __init__(self, layout: CacheLayout, manifest: Manifest) -> None:
        self.layout, self.manifest = layout, manifest
        layout.folder.mkdir(parents=True, exist_ok=True)
        existing = Manifest.load(layout.manifest_path) if layout.manifest_path.exists() else None
        if existing is None and layout.existing_chunks():
            path = layout.chunk_path(layout.existing_chunks()[0])
            raise CacheError(
                f"output_path: {path} exists, but there is no manifest ({layout.manifest_path}) that tells what wrote it; "
                "write to another output_path, or delete the file"
            )
        # A manifest without chunks is what is left of a run that got no further: it binds nobody.
        if existing is not None and (existing.chunks or layout.existing_chunks()):
            differences = existing.differences(manifest)
            if differences:
                raise CacheError(
                    f"{layout.manifest_path}: the cache there was written with other settings:\n  "
                    + "\n  ".join(differences)
                    + "\nWrite to another output_path, or delete that cache."
                )
            manifest.chunks = existing.chunks
        manifest.save(layout.manifest_path)  # before the first chunk, so that no chunk is ever of unknown origin

    def is_complete(self, chunk_id: int) -> bool:
        """Whether the chunk is listed and its file is there with the listed size."""
        summary = self.manifest.chunks.get(str(chunk_id))
        path = self.layout.chunk_path(chunk_id)
        return summary is not None and path.is_file() and path.stat().st_size == summary.bytes

    @contextmanager
    def chunk(self, chunk_id: int, first_index: int, last_index: int) -> Iterator[ChunkWriter]:
        """A chunk to write rows to; it appears, with its index and manifest entry, when the block ends without an error."""
        path = self.layout.chunk_path(chunk_id)
        remove_abandoned(path)
        with atomic_file(path) as file:
            writer = ChunkWriter(file, ChunkSummary(first_index, last_index), self.manifest.top_k)
            yield writer
            writer.check_complete()
            writer.summary.sha256 = f"sha256:{writer.digest.hexdigest()}"
        writer.facts.offsets().save(self.layout.index_path(path), path)
        self.manifest.chunks[str(chunk_id)] = writer.summary
        self.manifest.save(self.layout.manifest_path)


class ChunkWriter:
    """The rows of one chunk, in the order of their indices."""

    def __init__(self, file: BinaryIO, summary: ChunkSummary, top_k: int) -> None:
        self.file, self.summary, self.top_k = file, summary, top_k
        self.digest, self.facts = hashlib.sha256(), LineFacts()
        self._last_index = -1

    def write(self, row: CachedExample) -> None:
        """Appends a row.

        Raises:
            CacheError: its index does not follow the last one's, or it holds another number of logits than the cache.
        """
        example, teacher, summary = row.example, row.teacher, self.summary
        if teacher.topk_logits_SK.shape[1] != self.top_k:
            raise CacheError(
                f"example {example.index} has {teacher.topk_logits_SK.shape[1]} logits a position in a cache of top_k={self.top_k}"
            )
        if not max(self._last_index + 1, summary.first_index) <= example.index <= summary.last_index:
            raise CacheError(
                f"example {example.index} came after example {self._last_index} in the chunk of {summary.first_index} to {summary.last_index}"
            )
        self._last_index = example.index
        line = encode(row)
        self.file.write(line)
        self.digest.update(line)
        self.facts.add(row, len(line), trimmed_length(example.loss_mask_S))
        summary.examples += 1
        summary.tokens += example.num_tokens
        summary.loss_tokens += example.num_loss_tokens
        summary.bytes += len(line)
        in_loss = example.loss_mask_S > 0
        log_mass_SK = teacher.topk_logits_SK[in_loss] - teacher.log_sum_exp_logits_S[in_loss, None]
        summary.kept_mass_sum += float(np.exp(log_mass_SK, dtype=np.float64).sum())
        label_hits = teacher.topk_token_ids_SK[in_loss] == example.labels_S[in_loss, None]
        summary.label_in_topk += int(label_hits.any(axis=1).sum())

    def skip(self, reason: str) -> None:
        """Counts a record that makes no row."""
        self.summary.skipped[reason] = self.summary.skipped.get(reason, 0) + 1

    def check_complete(self) -> None:
        """Refuses a chunk in which records of its range are neither written nor skipped.

        Raises:
            CacheError: says how many.
        """
        summary = self.summary
        expected, found = summary.last_index - summary.first_index + 1, summary.examples + sum(summary.skipped.values())
        if found != expected:
            raise CacheError(
                f"the chunk of examples {summary.first_index} to {summary.last_index} got {found} of {expected} records"
            )
