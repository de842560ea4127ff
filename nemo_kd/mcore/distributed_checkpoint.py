"""Read Megatron's distributed checkpoints: in any layout, and from untrusted sources.

Reading runs no code. `stored_metadata` unpickles `.metadata` within bounds, torch reads values
that are not tensors with `weights_only=True`, and the weights of an archive are read as bytes.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    nested_values,
)
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
from nemo_kd.mcore.hf_folder import BLOCK_BYTES, StoredBytes
from nemo_kd.mcore.stored_metadata import read_metadata
from nemo_kd.nemo_archive import Files, FolderFiles

METADATA = ".metadata"
COMMON = "common.pt"
CONFIG = "metadata.json"
FORMAT = ("torch_dist", "torch")
EXTRA_STATE = "_extra_state"
OBJECT_NAME = re.compile(r"[^/]+/shard_\d+(\.\d+)*_\d+(\.\d+)*")
"""Megatron's name of an entry that is not a tensor: key, position and shape."""
_DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    OverflowError,
    MemoryError,
)
"""Errors of torch's and Python's readers on damaged bytes."""


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the content of `folder` for the sharded parts of `state`, and all its plain values.

    Every rank calls it. The model keeps its own states of FP8 layers: Transformer Engine would
    unpickle stored ones.

    Raises:
        ConfigError: `.metadata` or a value is damaged, or would run code.
    """
    metadata = _checked(folder)

    def load(part: Any) -> Any:
        """Load objects here: Megatron would unpickle them, but keeps loaded ones."""
        if isinstance(part, ShardedObject):
            return LocalNonpersistentObject(_load_object(part, metadata, folder))
        return part

    wanted = dict_list_map_outplace(load, state)
    strict = dist_checkpointing.validation.StrictHandling.RAISE_UNEXPECTED
    with _explained(folder):
        return dist_checkpointing.load(wanted, str(folder), strict=strict)


def load_plain(folder: Path) -> dict[str, Any]:
    """Return the plain values in `folder`, without its sharded tensors.

    Raises:
        ConfigError: they are damaged, or would run code.
    """
    _checked(folder)
    with _explained(folder):
        return dist_checkpointing.load_common_state_dict(str(folder))


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Raise torch's and Megatron's errors about a checkpoint as a ConfigError."""
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
    """Return the line with the cause, without torch's advice to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line for line in lines if "WeightsUnpickler" in line or "nsupported" in line
    ]
    return (telling or lines or [type(error).__name__])[0][:200]


def _checked(folder: Path) -> Metadata:
    """Read the files that torch and Megatron will unpickle, without running code."""
    path = folder / METADATA
    with _explained(folder):
        try:
            config = dist_checkpointing.core.maybe_load_config(str(folder))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{folder / CONFIG}: cannot be read ({error}); use another checkpoint"
            ) from error
    if config is not None and (config.sharded_backend, config.common_backend) != FORMAT:
        raise ConfigError(
            f"{folder / CONFIG}: the format {config.sharded_backend!r} with "
            f"{config.common_backend!r} is not torch_dist with torch, which nemo_kd writes; "
            "use another checkpoint"
        )
    try:
        with path.open("rb") as file:
            metadata = read_metadata(file, str(path))
        if (folder / COMMON).is_file():  # newer versions of Megatron write none
            load_values((folder / COMMON).read_bytes(), str(folder / COMMON))
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: cannot be read ({error.strerror})"
        ) from error
    for name, entry in metadata.state_dict_metadata.items():
        # torch would unpickle an entry of another name.
        if isinstance(entry, BytesStorageMetadata) and not OBJECT_NAME.fullmatch(name):
            raise ConfigError(f"{path}: {name} is not a tensor; use another checkpoint")
    return metadata


def load_values(data: bytes, where: str) -> Any:
    """Return the values that torch.save wrote, without running code in them.

    Raises:
        ConfigError: they are damaged, compressed (torch.save never compresses), or would run code.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(
                entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()
            ):
                raise zipfile.BadZipFile("it is compressed")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise ConfigError(
            f"{where}: cannot be read without running its code ({_reason(error)}); "
            "a checkpoint holds only tensors and plain values: use one that nemo_kd wrote"
        ) from error


def _load_object(part: ShardedObject, metadata: Metadata, folder: Path) -> Any:
    if part.key.endswith(EXTRA_STATE):
        return part.data
    info = metadata.storage_data.get(MetadataIndex(part.unique_key))
    if info is None:
        raise ConfigError(
            f"{folder}: {part.unique_key} is missing; use another checkpoint"
        )
    path = folder / Path(info.relative_path).name
    try:
        with path.open("rb") as file:
            file.seek(info.offset)
            data = file.read(min(info.length, path.stat().st_size))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{path}: {part.unique_key} cannot be read ({error})"
        ) from error
    values = load_values(data, f"{path}: {part.unique_key}")
    if not isinstance(values, list) or len(values) != 1:
        raise ConfigError(
            f"{path}: {part.unique_key} is not one value; use another checkpoint"
        )
    return values[0]


class ShardedFolder:
    """The tensors of a distributed checkpoint from elsewhere, by their names.

    Args:
        files: those of the model; or the folder of the checkpoint itself.
        prefix: start of the names of the checkpoint's files, for example `model_weights/`.

    Attributes:
        tensors: name -> shape, dtype and stored chunks.

    Raises:
        ConfigError: `.metadata` is damaged, or would run code.
    """

    def __init__(self, files: Files | Path, prefix: str = "") -> None:
        self.files: Files = FolderFiles(files) if isinstance(files, Path) else files
        self.prefix = prefix
        self.folder = self.files.root / prefix
        path = self.folder / METADATA
        try:
            with self.files.open(prefix + METADATA) as file:
                metadata = read_metadata(file, str(path))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
        self.tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._stored: dict[tuple[str, tuple[int, ...]], StoredBytes] = {}
        for index, info in metadata.storage_data.items():
            if prefix + info.relative_path not in self.files.sizes:
                raise ConfigError(
                    f"{self.folder / info.relative_path}: the file is missing; "
                    "copy or write the model again"
                )
            if index.fqn in self.tensors:
                offsets = tuple(index.offset or ())
                self._stored[index.fqn, offsets] = StoredBytes(
                    f"{index.fqn} {offsets}",
                    prefix + info.relative_path,
                    info.offset,
                    info.length,
                )

    def parts(self) -> Iterable[StoredBytes]:
        """Return the place of every stored part of a tensor."""
        return self._stored.values()

    def load(self, state: dict[str, Any]) -> None:
        """Fill the sharded tensors in `state`, a few megabytes at a time; no communication.

        Values outside the stored tensor (vocabulary padding) stay. Changes `state`.

        Raises:
            ConfigError: a tensor has another shape, or a file is missing or damaged.
        """
        apply_factories(state)
        for part in nested_values(state):
            stored = self.tensors[part.key]
            shape = tuple(part.global_shape)
            free = (
                1 if part.allow_shape_mismatch else 0
            )  # padding may differ along the vocabulary
            if shape[free:] != tuple(stored.size)[free:] or len(shape) != len(
                stored.size
            ):
                raise ConfigError(
                    f"{self.folder}: {part.key} has the shape {tuple(stored.size)}, "
                    f"model_config.yaml calls for {shape}"
                )
            target = part.data.detach()[(None,) * part.prepend_axis_num]
            for chunk in stored.chunks:
                target_slices = []
                offsets = []
                for ours, our_size, theirs, their_size in zip(
                    part.global_offset,
                    target.shape,
                    chunk.offsets,
                    chunk.sizes,
                    strict=True,
                ):
                    first = max(ours, theirs)
                    last = min(ours + our_size, theirs + their_size)
                    target_slices.append(slice(first - ours, max(first, last) - ours))
                    offsets.append(first - theirs)
                into = target[tuple(target_slices)]
                if into.numel():
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
        stored = self._stored.get((name, tuple(chunk.offsets)))
        if stored is None:
            raise ConfigError(
                f"{self.folder}: a part of {name} is missing; copy or write the model again"
            )
        sizes = list(chunk.sizes)
        while len(sizes) > 1 and sizes[0] == 1:  # numbers of layer and expert
            sizes = sizes[1:]
            offsets = offsets[1:]
            into = into[0]
        row_bytes = math.prod(sizes[1:]) * dtype.itemsize
        block_rows = max(1, BLOCK_BYTES // row_bytes)
        inner = [
            slice(first, first + size)
            for first, size in zip(offsets[1:], into.shape[1:], strict=True)
        ]
        try:
            with self.files.open(*stored[1:]) as file:
                start = _first_byte(file, sizes[0] * row_bytes)
                for row in range(0, len(into), block_rows):
                    target = into[row : row + block_rows]
                    file.seek(start + (offsets[0] + row) * row_bytes)
                    block = bytearray(file.read(len(target) * row_bytes))
                    rows = torch.frombuffer(block, dtype=dtype).view(
                        len(target), *sizes[1:]
                    )
                    target.copy_(rows[(slice(None), *inner)])
        except _DAMAGE as error:
            raise ConfigError(
                f"{self.files.root / stored.file}: {name} cannot be read ({error}); "
                "copy or write the model again"
            ) from error


def _first_byte(file: BinaryIO, num_bytes: int) -> int:
    """Return the offset of the tensor's bytes in torch.save's zip archive of stored entries."""
    with zipfile.ZipFile(file) as archive:
        entries = (
            entry for entry in archive.infolist() if entry.filename.endswith("/data/0")
        )
        entry = next(entries, None)
    if (
        entry is None
        or entry.compress_type != zipfile.ZIP_STORED
        or entry.file_size != num_bytes
    ):
        raise zipfile.BadZipFile(f"it is not {num_bytes} bytes as torch.save writes them")
    file.seek(entry.header_offset)
    header = file.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:])
    return entry.header_offset + len(header) + name_length + extra_length
