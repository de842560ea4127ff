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
from nemo_kd.cache.offsets import Offsets


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
        if layout.manifest_path.exists():
            existing = Manifest.load(layout.manifest_path)
            differences = existing.differences(manifest)
            if differences:
                raise CacheError(
                    f"{layout.manifest_path}: the cache there was written with other settings:\n  "
                    + "\n  ".join(differences)
                    + "\nWrite to another output_path, or delete that cache."
                )
            manifest.chunks = existing.chunks
        elif layout.existing_chunks():
            path = layout.chunk_path(layout.existing_chunks()[0])
            raise CacheError(
                f"output_path: {path} exists, but there is no manifest ({layout.manifest_path}) that tells what wrote it; "
                "write to another output_path, or delete the file"
            )

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
            writer = ChunkWriter(file, ChunkSummary(first_index, last_index))
            yield writer
            writer.summary.sha256 = f"sha256:{writer.digest.hexdigest()}"
        writer.offsets().save(self.layout.index_path(path), path)
        self.manifest.chunks[str(chunk_id)] = writer.summary
        self.manifest.save(self.layout.manifest_path)


class ChunkWriter:
    """The rows of one chunk, in the order of their indices."""

    def __init__(self, file: BinaryIO, summary: ChunkSummary) -> None:
        self.file, self.summary = file, summary
        self.digest = hashlib.sha256()
        self._starts, self._num_positions = [0], [0] * 0
        self._last_index, self._max_token_id = -1, -1

    def write(self, row: CachedExample) -> None:
        """Appends a row.

        Raises:
            CacheError: its index does not follow the last one's.
        """
        example, teacher, summary = row.example, row.teacher, self.summary
        if not max(self._last_index + 1, summary.first_index) <= example.index <= summary.last_index:
            raise CacheError(
                f"example {example.index} came after example {self._last_index} in the chunk of {summary.first_index} to {summary.last_index}"
            )
        self._last_index = example.index
        line = encode(row)
        self.file.write(line)
        self.digest.update(line)
        self._starts.append(self._starts[-1] + len(line))
        self._num_positions.append(trimmed_length(example.loss_mask_S))
        ids = (example.tokens_S, example.labels_S, teacher.topk_token_ids_SK)
        self._max_token_id = max(self._max_token_id, *(int(array.max()) for array in ids))
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

    def offsets(self) -> Offsets:
        """The index of what was written."""
        starts, lengths = np.array(self._starts, dtype=np.int64), np.array(self._num_positions, dtype=np.int64)
        return Offsets(starts, lengths, self._max_token_id)
