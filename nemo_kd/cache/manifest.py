"""Identity of a cache: who wrote it, from what. Written once, before the first segment.

In format 2 it lists the complete chunks; while a job wrote, it had a journal. Each line of that is
the CRC-32 of its JSON in eight hex digits, a space and the JSON; the first line names the manifest
by the SHA-256 of its content, every other line lists one chunk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from nemo_kd.cache.index import ChunkIndex, ChunkSummary
from nemo_kd.cache.layout import CacheError, LocalStorage, Storage
from nemo_kd.config.data import CHAT_TEMPLATE_FORMATS, CODECS, CacheConfig
from nemo_kd.files import write_atomically

FORMAT_VERSION = 3
IN_MEMORY = ("chunks", "digest", "format_version")
"""Fields that `save` does not take from the object."""
OPTIONAL_IDENTITY = ("teacher.tensors", "tokenizer_parts")
UNKNOWN = "unknown"
"""Value of what another program did not record, in the manifest of a cache made from its files."""


@dataclass
class Manifest:
    """Identity of a cache; plain JSON on disk."""

    codec: dict[str, Any]
    """`name` and the settings that decide what is stored (config.cache.CacheConfig)."""
    top_k: int
    """Most teacher entries per position."""
    vocab_size: int
    """Columns of the teacher's logits that stand for tokens; every id in the cache is below."""
    tokenizer_size: int
    """Tokens of the tokenizer; models of one family pad their vocabularies to different sizes."""
    seq_length: int
    teacher: dict[str, Any]
    tokenizer: str
    """`data.tokenizer.tokenizer_fingerprint`."""
    chat_template: str | None
    dataset: dict[str, Any]
    n_examples_per_chunk: int | None
    tokenizer_parts: dict[str, str] | None = None
    """`data.tokenizer.tokenizer_parts`; None in manifests of older versions."""
    tokenizer_tokens: dict[str, Any] | None = None
    """`data.tokenizer.describe_tokens`, to name differences; None in manifests of older versions.
    """
    segment_examples: int = 64
    """Records computed together."""
    config: dict[str, Any] | None = None
    """Keys of the job that created the cache; None in caches of older versions and other programs."""
    merged_chunks: int | None = None
    """Chunks of a cache that was merged from several."""
    chunks: dict[int, ChunkSummary] = field(default_factory=dict)
    """Complete chunks by number, as the reader or writer that has this manifest found them; not in
    the file.
    """
    format_version: int = field(default=FORMAT_VERSION, init=False)
    """Of the file; `save` writes FORMAT_VERSION."""
    digest: str = field(default="", init=False)
    """SHA-256 of the file."""

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read the manifest of a cache on a disk; see `read`."""
        return cls.read(LocalStorage(str(path.parent)), path.name)

    @classmethod
    def read(cls, storage: Storage, name: str) -> Manifest:
        """Read a manifest; only one of format 2 lists its chunks.

        Raises:
            CacheError: it is not a manifest, or of a format this version does not read.
        """
        content = storage.read(name)
        manifest = cls.parse(content, f"{storage.folder}/{name}")
        if manifest.format_version == FORMAT_2:
            with contextlib.suppress(FileNotFoundError):
                journal = storage.read(name + JOURNAL_SUFFIX)
                manifest.chunks |= journaled_chunks(journal, content)
        return manifest

    @classmethod
    def parse(cls, content: bytes, path: str) -> Manifest:
        """Return the manifest in the content of a file that messages call `path`.

        Raises:
            CacheError: see `read`.
        """
        try:
            payload = orjson.loads(content)
            version = payload["format_version"]
            # A later version may add fields without changing what these mean.
            known = {
                one.name: _checked(one.name, payload[one.name], one.type)
                for one in dataclasses.fields(cls)
                if one.name in payload and one.init
            }
            if version not in (FORMAT_2, FORMAT_VERSION):
                raise ValueError(
                    f"format_version {version} is not read by this version of nemo_kd"
                )
            if version == FORMAT_2:
                known["chunks"] = listed_chunks(payload["chunks"])
            for name in ("start_from_idx", "end_at_idx"):
                _checked(f"dataset.{name}", known["dataset"][name], "int")
            manifest = cls(**known)
            manifest.format_version = version
            manifest.digest = _sha256(content)
            if manifest.codec["name"] not in CODECS or manifest.num_chunks < 1:
                raise ValueError("codec.name or the number of chunks is not valid")
            for name in ("top_k", "vocab_size"):
                if known[name] < 1:
                    raise ValueError(
                        f"{name}: found {known[name]}, expected at least 1"
                    )
            return manifest
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise CacheError(
                f"{path}: not a cache manifest ({error}); restore it from a copy, or move it "
                "away: the chunks can be read without it, but their teacher and tokenizer are then "
                "not checked"
            ) from error

    def save(self, path: Path) -> None:
        """Write the manifest, whole or not at all."""
        content = orjson.dumps(
            self._payload() | {"format_version": FORMAT_VERSION},
            option=orjson.OPT_INDENT_2
            | orjson.OPT_SORT_KEYS
            | orjson.OPT_APPEND_NEWLINE,
        )
        write_atomically(path, content)
        self.format_version = FORMAT_VERSION
        self.digest = _sha256(content)

    @property
    def uses_chat_template(self) -> bool:
        """Return True if a chat template rendered records; also if their formats are not listed."""
        formats = self.dataset.get("formats", CHAT_TEMPLATE_FORMATS)
        return not set(CHAT_TEMPLATE_FORMATS).isdisjoint(formats)

    def differences(self, other: Manifest) -> list[str]:
        """Return every field of the identity that differs, with both values."""
        return list(_differences(self._identity(), other._identity()))

    def _identity(self) -> dict[str, Any]:
        """Return all that must agree before a cache is continued."""
        identity = self._payload() | {"tokenizer_tokens": None, "config": None}
        # The fingerprint identifies the dataset wherever it lies.
        return identity | {"dataset": identity["dataset"] | {"path": None}}

    def summary_of(self, chunk: int, index: ChunkIndex | None) -> ChunkSummary | None:
        """Return the summary of a complete chunk, else None."""
        if self.format_version == FORMAT_2:
            return self.chunks.get(chunk)
        return index.summary if index is not None else None

    def records_of(self, chunk: int) -> tuple[int, int]:
        """Return the first and the last record of a chunk, unless the cache was merged."""
        start = self.dataset["start_from_idx"]
        end = self.dataset["end_at_idx"]
        size = self.n_examples_per_chunk or end - start + 1
        return start + chunk * size, min(start + (chunk + 1) * size - 1, end)

    @property
    def num_chunks(self) -> int:
        """Return the number of chunks of the complete cache."""
        if self.merged_chunks is not None:
            return self.merged_chunks
        num_records = self.dataset["end_at_idx"] - self.dataset["start_from_idx"] + 1
        return (
            -(-num_records // self.n_examples_per_chunk)
            if self.n_examples_per_chunk
            else 1
        )

    def _payload(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self).items()
            if name not in IN_MEMORY and (name, value) != ("config", None)
        }


def codec_settings(cache: CacheConfig) -> dict[str, Any]:
    """Return `Manifest.codec`: the settings that decide what a record holds."""
    settings: dict[str, Any] = {
        "name": cache.codec,
        "temperatures": list(cache.temperatures),
    }
    if cache.codec == "packed":
        settings |= {
            "min_probability": cache.probability_floor,
            "top_p": cache.top_p,
            "min_k": cache.min_k,
            "positions": cache.stored_positions,
        }
    if cache.select:
        settings["select"] = cache.select
    if cache.tail_samples:
        settings |= {"tail_samples": cache.tail_samples, "seed": cache.seed}
    return settings


def _checked(name: str, value: Any, expected: Any) -> Any:
    """Refuse a value that does not fit an annotation of `Manifest`."""
    kind = type(value).__name__.removesuffix("Type")
    if not re.search(rf"(^|\| ){kind}\b", expected):
        raise ValueError(f"{name}: found {value!r:.99}, expected {expected}")
    return value


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _differences(
    ours: dict[str, Any], theirs: dict[str, Any], prefix: str = ""
) -> Iterator[str]:
    for key in sorted(ours.keys() | theirs.keys()):
        name = prefix + key
        mine = ours.get(key)
        other = theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from _differences(mine, other, f"{name}.")
        elif mine != other and not (
            name in OPTIONAL_IDENTITY and None in (mine, other)
        ):
            yield f"{name}: {mine!r} in the cache, {other!r} now"


FORMAT_2 = 2
JOURNAL_SUFFIX = ".journal"


def listed_chunks(chunks: dict[str, Any]) -> dict[int, ChunkSummary]:
    """Return the summaries in the field `chunks` of a manifest."""
    return {int(key): ChunkSummary.parse(summary) for key, summary in chunks.items()}


def journaled_chunks(journal: bytes, manifest: bytes) -> dict[int, ChunkSummary]:
    """Return the summaries in a journal, up to a line that a kill left incomplete.

    The journal of another manifest than the file `manifest` is ignored.
    """
    chunks: dict[str, Any] = {}
    for number, line in enumerate(journal.split(b"\n")[:-1]):
        checksum, _, fields = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(fields):
            break
        entry = orjson.loads(fields)
        if number:
            chunks[entry["chunk"]] = entry["summary"]
        elif entry["manifest"] != hashlib.sha256(manifest).hexdigest():
            break
    return listed_chunks(chunks)
