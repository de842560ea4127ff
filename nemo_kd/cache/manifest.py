"""Identity of a cache: who wrote it, from what. Written once, before the first segment."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from nemo_kd.cache import format2
from nemo_kd.cache.index import LARGEST_NUMBER, ChunkIndex, ChunkSummary
from nemo_kd.cache.layout import CacheError
from nemo_kd.config.cache import CODECS, CacheConfig
from nemo_kd.files import read_file, write_atomically

FORMAT_VERSION = 3
DEEPEST = 32
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
    """Of the file that was read; `save` writes FORMAT_VERSION."""
    digest: str = field(default="", init=False)
    """SHA-256 of the file that was read."""

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest; only one of format 2 lists its chunks.

        Raises:
            CacheError: it is not a manifest, or of a format this version does not read.
        """
        try:
            # The journal first: chunks that another process moves from it into the manifest are in
            # one of them.
            journal_path = path.with_name(path.name + format2.JOURNAL_SUFFIX)
            journal = read_file(journal_path) if journal_path.exists() else b""
            return cls.parse(read_file(path), str(path), journal)
        except OSError as error:
            raise CacheError(
                f"{path}: the manifest cannot be read ({error.strerror})"
            ) from error

    @classmethod
    def parse(cls, content: bytes, path: str, journal: bytes = b"") -> Manifest:
        """Return the manifest in the content of a file that messages call `path`.

        Args:
            journal: content of a format 2 manifest's journal, read before the manifest.

        Raises:
            CacheError: see `load`.
        """
        try:
            payload = orjson.loads(content)
            _check_depth(payload)
            version = payload["format_version"]
            if version not in (format2.VERSION, FORMAT_VERSION):
                raise CacheError(
                    f"{path}: format_version {version} is not read by this version of nemo_kd (it "
                    f"reads {format2.VERSION} and {FORMAT_VERSION}); use the version that wrote "
                    "the cache, or write the cache again"
                )
            chunks: dict[int, ChunkSummary] = {}
            if version == format2.VERSION:
                chunks = format2.listed_chunks(payload, content, journal, path)
            # A later version may add fields without changing what these mean.
            known = {
                one.name: payload[one.name]
                for one in dataclasses.fields(cls)
                if one.name in payload and one.init
            }
            manifest = cls(**(known | {"chunks": chunks}))
            manifest.format_version = version
            manifest.digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
            _check_types(manifest, path)
            return manifest
        except CacheError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CacheError(
                f"{path}: not a cache manifest ({error}); restore it from a copy, or move it "
                "away: the chunks can be read without it, but their teacher and tokenizer are then "
                "not checked"
            ) from error

    def save(self, path: Path) -> None:
        """Write the manifest, whole or not at all."""
        write_atomically(path, self._json())

    def identity(self) -> dict[str, Any]:
        """Return all that must agree before a cache is continued, by flat keys: `teacher.weights`
        and so on.
        """
        payload = self._payload()
        payload.pop("tokenizer_tokens", None)
        payload.pop("config", None)
        # The fingerprint identifies the dataset wherever it lies.
        payload["dataset"].pop("path", None)
        return dict(_flat(payload))

    def differences(self, other: Manifest) -> list[str]:
        """Return every field of the identity that differs, with both values."""
        ours = self.identity()
        theirs = other.identity()
        # Manifests of older versions lack these.
        for optional in OPTIONAL_IDENTITY:
            if not (_has(ours, optional) and _has(theirs, optional)):
                ours = {
                    key: value
                    for key, value in ours.items()
                    if not key.startswith(optional)
                }
                theirs = {
                    key: value
                    for key, value in theirs.items()
                    if not key.startswith(optional)
                }
        return [
            f"{key}: {ours.get(key)!r} in the cache, {theirs.get(key)!r} now"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]

    def summary_of(self, chunk: int, index: ChunkIndex | None) -> ChunkSummary | None:
        """Return the summary of a complete chunk, else None."""
        if self.format_version == format2.VERSION:
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

    def hash(self) -> str:
        """Return the SHA-256 of the manifest's file."""
        return self.digest or f"sha256:{hashlib.sha256(self._json()).hexdigest()}"

    def _payload(self) -> dict[str, Any]:
        # Copies of all chunks would take long.
        payload = dataclasses.asdict(dataclasses.replace(self, chunks={}))
        if self.config is None:  # of another program's files
            del payload["config"]
        return {name: value for name, value in payload.items() if name not in IN_MEMORY}

    def _json(self) -> bytes:
        payload = self._payload() | {"format_version": FORMAT_VERSION}
        return (
            orjson.dumps(payload, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
            + b"\n"
        )


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
            "positions": cache.positions,
        }
    if cache.tail_samples:
        settings |= {"tail_samples": cache.tail_samples, "seed": cache.seed}
    return settings


def _check_types(manifest: Manifest, path: str) -> None:
    """Refuse values of another type, as after an edit by hand."""
    for name in ("codec", "teacher", "dataset"):
        if not isinstance(getattr(manifest, name), dict):
            raise TypeError(f"{name} is not an object")
    if manifest.codec["name"] not in CODECS:
        raise CacheError(
            f"{path}: codec.name: found {manifest.codec['name']!r}, expected one of "
            f"{', '.join(CODECS)}"
        )
    numbers: dict[str, Any] = {
        name: getattr(manifest, name)
        for name in ("top_k", "vocab_size", "segment_examples")
    }
    for name in ("start_from_idx", "end_at_idx"):
        numbers[f"dataset.{name}"] = manifest.dataset[name]
    for name in ("n_examples_per_chunk", "merged_chunks"):
        if getattr(manifest, name) is not None:
            numbers[name] = getattr(manifest, name)
    for name, value in numbers.items():
        if type(value) is not int or not 0 <= value < LARGEST_NUMBER:
            raise CacheError(
                f"{path}: {name}: found {value!r}, expected a number of at least 0; the manifest "
                "was edited or damaged: restore it"
            )


def _check_depth(payload: Any) -> None:
    """Refuse nesting that recursive code, here and in the standard library, does not survive."""
    level = [payload]
    for _ in range(DEEPEST):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [
            one for values in inner for one in values if isinstance(one, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"objects or lists are nested more than {DEEPEST} deep")


def _has(identity: dict[str, Any], prefix: str) -> bool:
    return any(
        key.startswith(prefix) and value is not None for key, value in identity.items()
    )


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            items += _flat(inner, f"{prefix}{key}.")
        else:
            items.append((f"{prefix}{key}", inner))
    return items
