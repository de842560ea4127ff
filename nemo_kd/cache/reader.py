"""Random access to the rows of a cache, from any number of processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kd.batch import CachedExample
from nemo_kd.cache.json_codec import decode
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.offsets import Offsets, digest, largest_id


class CacheReader:
    """The rows of several files or CHUNK_ID templates, one after the other; reading one touches its own bytes only.

    Args:
        paths: each a file or a template.
        n_chunks: chunks that every template must have; None reads all there are.
        top_k: teacher logits to keep, the largest; None keeps all.
        seq_length: rows with more positions are left out and counted in `dropped_too_long`.

    Raises:
        CacheError: a chunk is missing, damaged, or contradicts its manifest or the other chunks; or holds fewer than
            `top_k` logits.
    """

    def __init__(
        self, paths: Sequence[str], n_chunks: int | None = None, top_k: int | None = None, seq_length: int | None = None
    ) -> None:
        self.top_k = top_k
        self._descriptors: dict[int, tuple[int, int]] = {}  # file -> (process, descriptor)
        self.manifests: list[Manifest] = []
        self._files: list[Path] = []
        self._offsets: list[Offsets] = []
        for path in paths:
            self._open(CacheLayout(path), n_chunks)
        self._check_manifests()
        self.max_token_id = max(offsets.max_token_id for offsets in self._offsets)
        rows = [(file, line) for file, offsets in enumerate(self._offsets) for line in range(len(offsets))]
        lengths = np.concatenate([offsets.num_positions for offsets in self._offsets])
        fits = np.ones(len(rows), dtype=bool) if seq_length is None else lengths <= seq_length
        self.dropped_too_long = int((~fits).sum())
        self._rows = np.array(rows, dtype=np.int64).reshape(-1, 2)[fits]
        self._check_k()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> CachedExample:
        if not 0 <= position < len(self):
            raise IndexError(f"row {position} of {len(self)}")
        file, line = (int(number) for number in self._rows[position])
        start, end = self._offsets[file].starts[line : line + 2]
        raw = os.pread(self._descriptor(file), int(end - start), int(start))
        where, offsets = f"{self._files[file]}:{line + 1}", self._offsets[file]
        row = decode(raw, where, self.top_k, index=line)
        if row.example.num_tokens != offsets.num_positions[line] or largest_id(row) > offsets.max_token_id:
            raise CacheError(
                f"{where}: the line is another one than when its index was made; delete {self._files[file]}.idx"
            )
        return row

    def fingerprint(self) -> str:
        """Identifies the content: SHA-256 over the manifests and samples of every file."""
        parts = [manifest.hash() for manifest in self.manifests]
        parts += [f"{path.name}:{digest(path)}" for path in self._files]
        return f"sha256:{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def _open(self, layout: CacheLayout, n_chunks: int | None) -> None:
        chunk_ids = layout.existing_chunks()
        shared = Manifest.load(layout.manifest_path) if layout.manifest_path.exists() else None
        if n_chunks is None:
            n_chunks = shared.num_chunks if shared is not None else max(chunk_ids, default=0) + 1
        elif not layout.is_template and n_chunks != 1:
            raise CacheError(f"{layout.output_path}: n_chunks={n_chunks}, but a path without CHUNK_ID is one chunk")
        expected = list(range(n_chunks))
        missing = sorted(set(expected) - set(chunk_ids))
        if missing:
            raise CacheError(
                f"{layout.chunk_path(missing[0])}: the chunk is missing ({len(chunk_ids)} of {len(expected)} chunks of "
                f"{layout.output_path} are there); write it with compute_topk_logits, or correct model.data.data_prefix and n_chunks"
            )
        if shared is not None:
            self.manifests.append(shared)
        for chunk_id in expected:
            path = layout.chunk_path(chunk_id)
            manifest, key = shared, str(chunk_id)
            if shared is None and (own := CacheLayout(str(path)).manifest_path).exists():
                manifest, key = Manifest.load(own), "0"
                self.manifests.append(manifest)
            if manifest is not None:
                _check_chunk(path, manifest, key)
            index_path = layout.index_path(path)
            offsets = Offsets.load(index_path, path)
            if offsets is None:
                offsets = Offsets.scan(path)
                if os.access(path.parent, os.W_OK):
                    offsets.save(index_path, path)
            self._files.append(path)
            self._offsets.append(offsets)

    def _check_manifests(self) -> None:
        for manifest in self.manifests[1:]:
            first = self.manifests[0]
            for name in ("tokenizer", "vocab_size", "top_k"):
                if getattr(first, name) != getattr(manifest, name):
                    raise CacheError(
                        f"the caches differ in {name}: {getattr(first, name)!r} and {getattr(manifest, name)!r}; "
                        "read them in separate runs"
                    )

    def _check_k(self) -> None:
        smallest = min(offsets.smallest_k for offsets in self._offsets)
        largest = max(offsets.largest_k for offsets in self._offsets)
        if self.top_k is None and smallest != largest:
            raise CacheError(
                f"the caches hold {smallest} to {largest} logits a position; set model.data.top_k={smallest} to use as many of each"
            )
        if self.top_k is not None and self.top_k > smallest:
            raise CacheError(
                f"model.data.top_k: {self.top_k} exceeds the {smallest} logits a position that the cache holds"
            )

    def __del__(self) -> None:
        for process, descriptor in self._descriptors.values():
            if process == os.getpid():
                os.close(descriptor)

    def _descriptor(self, file: int) -> int:
        process, descriptor = self._descriptors.get(file, (0, -1))
        if process != os.getpid():
            descriptor = os.open(self._files[file], os.O_RDONLY)
            self._descriptors[file] = (os.getpid(), descriptor)
        return descriptor


def _check_chunk(path: Path, manifest: Manifest, key: str) -> None:
    summary = manifest.chunks.get(key)
    if summary is None:
        raise CacheError(
            f"{path}: the manifest does not list this chunk, so it is not complete; run compute_topk_logits again"
        )
    if path.stat().st_size != summary.bytes:
        raise CacheError(
            f"{path}: {path.stat().st_size} bytes, but the manifest says {summary.bytes}; the file is damaged: delete it and "
            "run compute_topk_logits again"
        )
