"""What a cache says about itself: who wrote it, from what, and which chunks are complete."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from nemo_kd.cache import journal
from nemo_kd.cache.layout import CacheError
from nemo_kd.config.cache import CODECS, CacheConfig
from nemo_kd.files import explained, read_file, write_atomically

FORMAT_VERSION = 2
DEEPEST = 32
LARGEST_NUMBER = 1 << 60
OPTIONAL_IDENTITY = ("teacher.tensors", "tokenizer_parts")
UNKNOWN = "unknown"
"""What the manifest of a cache made from another program's files says where that program told nothing."""


@dataclass
class ChunkSummary:
    """One complete chunk. Token counts are positions; `bytes` and `sha256` are the data file's."""

    first_index: int
    last_index: int
    examples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    bytes: int = 0
    sha256: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    """Records of the range that are not in the chunk, by reason."""
    kept_tokens: int = 0
    """Teacher entries stored for loss tokens."""
    kept_mass_sum: float = 0.0
    """Teacher probability inside the kept ids, summed over loss tokens."""
    label_in_topk: int = 0
    """Loss tokens whose label is among the kept ids."""
    computed_with: list[dict[str, Any]] = field(default_factory=list)
    """Batch size, layout and precision of the runs that computed the rows: what rounding depends on."""

    def add(self, other: ChunkSummary) -> None:
        """Takes in the counts of a part that follows."""
        for name in (
            "examples",
            "tokens",
            "loss_tokens",
            "bytes",
            "kept_tokens",
            "kept_mass_sum",
            "label_in_topk",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        self.computed_with += [
            settings for settings in other.computed_with if settings not in self.computed_with
        ]


@dataclass
class Manifest:
    """Identity and content of a cache; plain JSON on disk."""

    codec: dict[str, Any]
    """`name` and the settings that decide what is stored (config.cache.CacheConfig)."""
    top_k: int
    """Most teacher entries a position."""
    vocab_size: int
    """Columns of the teacher's logits that stand for tokens; every id in the cache is below."""
    tokenizer_size: int
    """Tokens that the tokenizer knows; same-family models pad their vocabularies differently beyond it."""
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
    """`data.tokenizer.describe_tokens`, to name differences; None in manifests of older versions."""
    segment_examples: int = 64
    """Records computed together."""
    merged_chunks: int | None = None
    """Chunks of a cache that was merged from several."""
    format_version: int = FORMAT_VERSION
    chunks: dict[str, ChunkSummary] = field(default_factory=dict)
    """Chunk id (as text) -> summary, complete chunks only."""

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads a manifest, and what its journal lists besides.

        Raises:
            CacheError: it is no manifest, or of a format this version does not read.
        """
        try:
            listed = read_journal(
                path
            )  # first: what another process moves from it into the manifest is seen in one of them
            return cls.parse(read_file(path), str(path), listed)
        except OSError as error:
            raise CacheError(f"{path}: the manifest cannot be read ({error.strerror})") from error

    @classmethod
    def parse(cls, content: bytes, path: str, listed: bytes = b"") -> Manifest:
        """The manifest in the content of a file that is called `path` in messages.

        Args:
            listed: content of its journal, read before the manifest.

        Raises:
            CacheError: as `load`.
        """
        try:
            payload = orjson.loads(content)
            _check_depth(payload)
            version = payload["format_version"]
            if version != FORMAT_VERSION:
                raise CacheError(
                    f"{path}: format_version {version} is not read by this version of nemo_kd (it reads {FORMAT_VERSION}); "
                    "use the version that wrote the cache, or write the cache again"
                )
            chunks = parse_summaries(payload["chunks"], path) | _journaled(
                content, path, listed, payload["chunks"].keys()
            )
            manifest = cls(**(_known(cls, payload) | {"chunks": chunks}))
            _check_types(manifest, path)
            return manifest
        except CacheError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CacheError(
                f"{path}: not a cache manifest ({error}); restore it from a copy, or move it away: the chunks are whole without it, "
                "only nobody checks then which teacher and tokenizer wrote them"
            ) from error

    def save(self, path: Path) -> None:
        """Writes the manifest, whole or not at all, and removes its journal, whose chunks it must have."""
        write_atomically(path, self._json())
        with explained(path):
            journal.journal_path(path).unlink(missing_ok=True)

    def identity(self) -> dict[str, Any]:
        """What must agree before a cache is continued, flat: `teacher.weights` and so on."""
        payload = dataclasses.asdict(
            dataclasses.replace(self, chunks={})
        )  # copies of all chunks would take long
        del payload["chunks"], payload["tokenizer_tokens"]
        payload["dataset"].pop(
            "path", None
        )  # the fingerprint tells what was read, wherever it lies
        return dict(_flat(payload))

    def differences(self, other: Manifest) -> list[str]:
        """Every field of the identity that differs, with both values."""
        ours, theirs = self.identity(), other.identity()
        # Manifests of older versions do not have these; what they have is compared.
        for optional in OPTIONAL_IDENTITY:
            if not (_starts(ours, optional) and _starts(theirs, optional)):
                ours = {key: value for key, value in ours.items() if not key.startswith(optional)}
                theirs = {
                    key: value for key, value in theirs.items() if not key.startswith(optional)
                }
        return [
            f"{key}: {ours.get(key)!r} in the cache, {theirs.get(key)!r} now"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]

    @property
    def num_chunks(self) -> int:
        """Chunks that the whole cache has when it is complete."""
        if self.merged_chunks is not None:
            return self.merged_chunks
        num_records = self.dataset["end_at_idx"] - self.dataset["start_from_idx"] + 1
        return -(-num_records // self.n_examples_per_chunk) if self.n_examples_per_chunk else 1

    def hash(self) -> str:
        """SHA-256 of the manifest's content."""
        return f"sha256:{hashlib.sha256(self._json()).hexdigest()}"

    def _json(self) -> bytes:
        payload = dataclasses.asdict(self)
        for name in ("tokenizer_parts", "tokenizer_tokens"):
            if (
                payload[name] is None
            ):  # a manifest of an older version keeps its bytes, and with them its hash
                del payload[name]
        return orjson.dumps(payload, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n"


def codec_settings(cache: CacheConfig) -> dict[str, Any]:
    """`Manifest.codec`: the settings that decide what a record holds."""
    settings: dict[str, Any] = {"name": cache.codec, "temperatures": list(cache.temperatures)}
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


def read_journal(path: Path, start: int = 0) -> bytes:
    """Return the bytes of a manifest's journal from `start`; nothing where there is none."""
    try:
        return read_file(journal.journal_path(path), start)
    except FileNotFoundError:
        return b""


def parse_summaries(payload: dict[str, Any], path: str) -> dict[str, ChunkSummary]:
    """Return the summaries of chunks by number, of which a later version may tell more.

    Raises:
        CacheError, TypeError, ValueError, AttributeError: they are no such summaries.
    """
    chunks = {key: ChunkSummary(**_known(ChunkSummary, chunk)) for key, chunk in payload.items()}
    counts = [one.name for one in dataclasses.fields(ChunkSummary) if one.type == "int"]
    for key, summary in chunks.items():
        if not re.fullmatch("0|[1-9][0-9]{0,17}", key):
            raise CacheError(
                f"{path}: chunks: found {key!r}, expected numbers of chunks; restore the manifest"
            )
        if not isinstance(summary.sha256, str) or not isinstance(summary.computed_with, list):
            raise TypeError(f"chunks.{key}: sha256 or computed_with is of another type")
        if not math.isfinite(float(summary.kept_mass_sum)):
            raise ValueError(f"chunks.{key}.kept_mass_sum is not finite")
        numbers = {f"chunks.{key}.{name}": getattr(summary, name) for name in counts}
        numbers |= {
            f"chunks.{key}.skipped.{reason}": count for reason, count in summary.skipped.items()
        }
        _check_numbers(numbers, path)
    return chunks


def journaled_summaries(chunks: dict[str, Any], path: str) -> dict[str, ChunkSummary]:
    """Return the summaries in the journal `path`.

    Raises:
        CacheError: it holds something else.
    """
    try:
        _check_depth(chunks)
        return parse_summaries(chunks, path)
    except CacheError:
        raise
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CacheError(
            f"{path}: not the journal of a manifest ({error}); restore it from a copy, or delete it: chunks that only it "
            "lists are then computed again"
        ) from error


def _journaled(
    content: bytes, path: str, listed: bytes, known: Collection[str]
) -> dict[str, ChunkSummary]:
    """The chunks of a manifest's journal.

    A journal of an older manifest is what a kill leaves between the writing of the manifest with its chunks and its end.
    """
    if not listed:
        return {}
    part = journal.parse(listed, f"{path}{journal.SUFFIX}")
    chunks = dict(part.chunks)
    if part.manifest == journal.manifest_digest(content):
        return journaled_summaries(chunks, f"{path}{journal.SUFFIX}")
    unknown = [str(key) for key in chunks if key not in known]
    if unknown:
        raise CacheError(
            f"{path}{journal.SUFFIX}: lists chunk {unknown[0]}, but belongs to another manifest than {path}; restore the manifest, "
            "or delete the journal: chunks that only it lists are then computed again"
        )
    return {}


def _check_types(manifest: Manifest, path: str) -> None:
    """Refuses a manifest whose numbers are none, as after an edit by hand."""
    numbers: dict[str, Any] = {
        name: getattr(manifest, name) for name in ("top_k", "vocab_size", "segment_examples")
    }
    numbers |= {
        f"dataset.{name}": manifest.dataset[name] for name in ("start_from_idx", "end_at_idx")
    }
    for name in ("n_examples_per_chunk", "merged_chunks"):
        if getattr(manifest, name) is not None:
            numbers[name] = getattr(manifest, name)
    for name in ("codec", "teacher", "dataset"):
        if not isinstance(getattr(manifest, name), dict):
            raise TypeError(f"{name} is not an object")
    if manifest.codec["name"] not in CODECS:
        raise CacheError(
            f"{path}: codec.name: found {manifest.codec['name']!r}, expected one of {', '.join(CODECS)}"
        )
    _check_numbers(numbers, path)


def _check_numbers(numbers: dict[str, Any], path: str) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < LARGEST_NUMBER:
            raise CacheError(
                f"{path}: {name}: found {value!r}, expected a number of at least 0; the manifest was edited or damaged: restore it"
            )


def _check_depth(payload: Any) -> None:
    """Refuse nesting that recursive code, here and in the standard library, does not survive."""
    level = [payload] if isinstance(payload, dict | list) else []
    depth = 0
    while level:
        if depth > DEEPEST:
            raise ValueError(f"objects or lists are nested more than {DEEPEST} deep")
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [one for values in inner for one in values if isinstance(one, dict | list)]
        depth += 1


def _known(cls: type, payload: dict[str, Any]) -> dict[str, Any]:
    """The fields that this version knows; a later one may add some without changing what these mean."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in payload.items() if name in names}


def _starts(identity: dict[str, Any], prefix: str) -> bool:
    return any(key.startswith(prefix) and value is not None for key, value in identity.items())


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, inner in value.items():
        items += (
            _flat(inner, f"{prefix}{key}.")
            if isinstance(inner, dict)
            else [(f"{prefix}{key}", inner)]
        )
    return items
