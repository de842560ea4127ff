"""Megatron's distributed checkpoints as they are read: in any layout, and from anywhere.

Nothing in one runs code: `.metadata` is unpickled by a reader that knows its classes, what is not a tensor by torch with
`weights_only=True`, and the weights of an archive are read as bytes.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    apply_factories,
)
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from nemo_kd.config import ConfigError
from nemo_kd.mcore.fingerprint import StoredBytes
from nemo_kd.mcore.hf_folder import BLOCK_BYTES
from nemo_kd.mcore.stored_metadata import read_metadata
from nemo_kd.nemo_archive import Files, FolderFiles

METADATA = ".metadata"
COMMON = "common.pt"
CONFIG = "metadata.json"
EXTRA_STATE = "_extra_state"
OBJECT_NAME = re.compile(r"[^/]+/shard_\d+(\.\d+)*_\d+(\.\d+)*")
"""How Megatron calls an entry that is not a tensor: key, position and shape."""


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what `folder` holds for the sharded parts of `state`, and all its plain values; every rank calls it.

    States that layers keep beside their weights (of FP8, pickles that Transformer Engine would load) are not read: the
    model keeps its own.

    Raises:
        ConfigError: `.metadata` or a value is damaged, or would run code.
    """
    metadata = _checked(folder)

    def load(part: Any) -> Any:
        """Megatron would unpickle an object; it passes on one that is there already."""
        if isinstance(part, ShardedObject):
            return LocalNonpersistentObject(_load_object(part, metadata, folder))
        return part

    wanted = dict_list_map_outplace(load, state)
    strict = dist_checkpointing.validation.StrictHandling.RAISE_UNEXPECTED
    with _explained(folder):
        return dist_checkpointing.load(wanted, str(folder), strict=strict)


def load_plain(folder: Path) -> dict[str, Any]:
    """Return the plain values that `folder` holds, without its sharded tensors.

    Raises:
        ConfigError: they are damaged, or would run code.
    """
    _checked(folder)
    with _explained(folder):
        return dist_checkpointing.load_common_state_dict(str(folder))


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Raise what torch and Megatron find wrong with a checkpoint as a ConfigError."""
    try:
        yield
    except (CheckpointException, dist_checkpointing.core.CheckpointingException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        raise ConfigError(
            f"{folder}: cannot be read ({_reason(cause)}); use another checkpoint"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the line that tells what was wrong; of torch's advice to trust the file, nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "WeightsUnpickler" in line or "nsupported" in line]
    return (telling or lines or [type(error).__name__])[0][:200]


def _checked(folder: Path) -> Metadata:
    """Read what torch and Megatron will unpickle, in a way that runs no code; both read it again then."""
    path = folder / METADATA
    with _explained(folder):
        try:
            config = dist_checkpointing.core.maybe_load_config(str(folder))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{folder / CONFIG}: cannot be read ({error}); use another checkpoint"
            ) from error
    if config is not None and (config.sharded_backend, config.common_backend) != (
        "torch_dist",
        "torch",
    ):
        raise ConfigError(
            f"{folder / CONFIG}: the format {config.sharded_backend!r} with {config.common_backend!r} is not torch_dist with "
            "torch, which nemo_kd writes; use another checkpoint"
        )
    try:
        with path.open("rb") as file:
            metadata = read_metadata(file, str(path))
        if (folder / COMMON).is_file():  # newer versions of Megatron write none
            load_values((folder / COMMON).read_bytes(), str(folder / COMMON))
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata) and not OBJECT_NAME.fullmatch(
            name
        ):  # torch would unpickle it
            raise ConfigError(f"{path}: {name} is not a tensor; use another checkpoint")
    return metadata


def load_values(data: bytes, where: str) -> Any:
    """Return the values that torch.save wrote; code in them is refused, not run.

    Raises:
        ConfigError: they are damaged, compressed (torch.save does not), or not plain values and tensors.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("it is compressed")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (
        *(zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, NotImplementedError),
        *(
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            AssertionError,
            OverflowError,
            MemoryError,
        ),
    ) as error:
        raise ConfigError(
            f"{where}: cannot be read without running its code ({_reason(error)}); "
            "a checkpoint holds tensors and plain values only: use one that nemo_kd wrote"
        ) from error


def _load_object(part: ShardedObject, metadata: Metadata, folder: Path) -> Any:
    if part.key.endswith(EXTRA_STATE):
        return part.data
    info = metadata.storage_data.get(MetadataIndex(part.unique_key))
    if info is None:
        raise ConfigError(f"{folder}: {part.unique_key} is missing; use another checkpoint")
    path = folder / Path(info.relative_path).name
    try:
        with path.open("rb") as file:
            file.seek(info.offset)
            data = file.read(min(info.length, path.stat().st_size))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{path}: {part.unique_key} cannot be read ({error})") from error
    values = load_values(data, f"{path}: {part.unique_key}")
    if not isinstance(values, list) or len(values) != 1:
        raise ConfigError(f"{path}: {part.unique_key} is not one value; use another checkpoint")
    return values[0]


class ShardedFolder:
    """The tensors of a distributed checkpoint from elsewhere, by their names.

    `.metadata` may only hold values, and weights are read as bytes.

    Args:
        files: of the model; or the folder of the checkpoint itself.
        prefix: of the names of the checkpoint's files, such as `model_weights/`.

    Attributes:
        tensors: name -> shape, dtype and stored chunks.

    Raises:
        ConfigError: `.metadata` is damaged, or would run code.
    """

    def __init__(self, files: Files | Path, prefix: str = "") -> None:
        self.files: Files = FolderFiles(files) if isinstance(files, Path) else files
        self.prefix = prefix
        self.folder = self.files.root / prefix
        try:
            with self.files.open(prefix + METADATA) as file:
                metadata = read_metadata(file, str(self.folder / METADATA))
        except OSError as error:
            raise ConfigError(f"{self.folder / METADATA}: cannot be read ({error})") from error
        entries = metadata.state_dict_metadata.items()
        self.tensors = {
            name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)
        }
        for file_name in sorted(
            {Path(info.relative_path).name for info in metadata.storage_data.values()}
        ):
            if prefix + file_name not in self.files.sizes:
                raise ConfigError(
                    f"{self.folder / file_name}: the file is missing; copy or write the model again"
                )
        self._stored = {
            (index.fqn, tuple(index.offset or ())): info
            for index, info in metadata.storage_data.items()
        }

    def parts(self) -> Iterator[StoredBytes]:
        """Yield where every stored part of a tensor lies, for `sample_tensors`."""
        for (name, offsets), info in self._stored.items():
            if name in self.tensors:
                yield StoredBytes(
                    f"{name} {offsets}", self.prefix + info.relative_path, info.offset, info.length
                )

    def load(self, state: dict[str, Any]) -> None:
        """Fill the memory of the sharded tensors in `state`, a few megabytes at a time; no communication.

        What lies outside of the stored tensor (vocabulary padding) keeps its values. `state` is changed.

        Raises:
            ConfigError: a tensor has another shape, or a file is missing or damaged.
        """
        apply_factories(state)
        for part in nested_values(state):
            stored = self.tensors[part.key]
            shape = tuple(part.global_shape)
            free = 1 if part.allow_shape_mismatch else 0  # padding may differ along the vocabulary
            if shape[free:] != tuple(stored.size)[free:] or len(shape) != len(stored.size):
                raise ConfigError(
                    f"{self.folder}: {part.key} has the shape {tuple(stored.size)}, model_config.yaml calls for {shape}"
                )
            target = part.data.detach()[(None,) * part.prepend_axis_num]
            for chunk in stored.chunks:
                both = list(
                    zip(part.global_offset, target.shape, chunk.offsets, chunk.sizes, strict=True)
                )
                begin = [max(ours, theirs) for ours, _, theirs, _ in both]
                end = [
                    min(ours + our_size, theirs + their_size)
                    for ours, our_size, theirs, their_size in both
                ]
                if all(first < last for first, last in zip(begin, end, strict=True)):
                    span = zip(begin, end, part.global_offset, strict=True)
                    into = target[
                        tuple(slice(first - ours, last - ours) for first, last, ours in span)
                    ]
                    offsets = [
                        first - theirs for first, theirs in zip(begin, chunk.offsets, strict=True)
                    ]
                    self._read(part.key, chunk, stored.properties.dtype, offsets, into)

    def _read(
        self,
        name: str,
        chunk: ChunkStorageMetadata,
        dtype: torch.dtype,
        offsets: list[int],
        into: torch.Tensor,
    ) -> None:
        """Copy the part of a chunk that starts at `offsets` in it."""
        info = self._stored.get((name, tuple(chunk.offsets)))
        if info is None:
            raise ConfigError(
                f"{self.folder}: a part of {name} is missing; copy or write the model again"
            )
        file_name = Path(info.relative_path).name
        path = self.folder / file_name
        sizes = list(chunk.sizes)
        while len(sizes) > 1 and sizes[0] == 1:  # numbers of layer and expert
            sizes, offsets, into = sizes[1:], offsets[1:], into[0]
        row_bytes = math.prod(sizes[1:]) * dtype.itemsize
        block_rows = max(1, BLOCK_BYTES // row_bytes)
        inner = tuple(
            slice(first, first + size)
            for first, size in zip(offsets[1:], into.shape[1:], strict=True)
        )
        try:
            with self.files.open(self.prefix + file_name) as file:
                start = info.offset + _first_byte(file, info, sizes[0] * row_bytes)
                for row in range(0, len(into), block_rows):
                    target = into[row : row + block_rows]
                    file.seek(start + (offsets[0] + row) * row_bytes)
                    block = bytearray(file.read(len(target) * row_bytes))
                    rows = torch.frombuffer(block, dtype=dtype).view(len(target), *sizes[1:])
                    target.copy_(rows[(slice(None), *inner)])
        except (
            OSError,
            zipfile.BadZipFile,
            struct.error,
            RuntimeError,
            ValueError,
            OverflowError,
        ) as error:
            raise ConfigError(
                f"{path}: {name} cannot be read ({error}); copy or write the model again"
            ) from error


class _FilePart(io.RawIOBase):
    """A part of a file as if it were a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        )
        return self.position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        data = self.file.read(max(0, min(len(buffer), self.length - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _first_byte(file: BinaryIO, info: Any, num_bytes: int) -> int:
    """Return where the tensor's bytes begin in the part of a file that torch.save wrote: a zip archive of stored entries."""
    part = _FilePart(file, info.offset, info.length)
    with zipfile.ZipFile(part) as archive:
        entry = next(
            (entry for entry in archive.infolist() if entry.filename.endswith("/data/0")), None
        )
    if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size != num_bytes:
        raise zipfile.BadZipFile(f"it is not {num_bytes} bytes as torch.save writes them")
    part.seek(entry.header_offset)
    header = part.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:])
    return entry.header_offset + len(header) + name_length + extra_length
