"""Megatron's distributed checkpoints: one folder, written and read by all ranks, loadable in any layout."""

from __future__ import annotations

import io
import math
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from nemo_kd.config import ConfigError
from nemo_kd.mcore.hf_folder import BLOCK_BYTES
from nemo_kd.mcore.optimizer import sharding_metadata

_HARMLESS = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}
"""What the pickle that torch names `.metadata` is made of, dtypes apart; nothing in it does more than hold values."""


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Writes `state` (sharded tensors and plain values) into `folder`; every rank calls it, `folder` is replaced.

    Megatron forks writer processes: a script that gets here must guard its entry point with `__name__`.
    """
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder), content_metadata=sharding_metadata())


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `folder` holds for the sharded tensors of `state`, and all its plain values; every rank calls it.

    Raises:
        ConfigError: `.metadata` is damaged, or would run code.
    """
    _read_metadata(folder / ".metadata")  # torch will unpickle it
    return dist_checkpointing.load(
        state, str(folder), strict=dist_checkpointing.validation.StrictHandling.RAISE_UNEXPECTED
    )


def load_plain(folder: Path) -> dict[str, Any]:
    """The plain values that `folder` holds, without its sharded tensors."""
    return dist_checkpointing.load_common_state_dict(str(folder))


class ShardedFolder:
    """The tensors that a distributed checkpoint from elsewhere holds, by their names.

    torch unpickles `.metadata` without asking what is in it; here it may only hold values, and weights are read as bytes.

    Attributes:
        tensors: name -> shape, dtype and stored chunks.

    Raises:
        ConfigError: `.metadata` is damaged, or would run code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = _read_metadata(folder / ".metadata")
        entries = metadata.state_dict_metadata.items()
        self.tensors = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._stored = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Fills the memory of the sharded tensors in `state`, a few megabytes at a time; no communication.

        What lies outside of the stored tensor (vocabulary padding) keeps its values. `state` is changed.

        Raises:
            ConfigError: a tensor has another shape, or a file is missing or damaged.
        """
        apply_factories(state)
        for part in nested_values(state):
            stored = self.tensors[part.key]
            if not part.allow_shape_mismatch and tuple(part.global_shape) != tuple(stored.size):
                raise ConfigError(
                    f"{self.folder}: {part.key} has the shape {tuple(stored.size)}, model_config.yaml calls for "
                    f"{tuple(part.global_shape)}"
                )
            target = part.data.detach()[(None,) * part.prepend_axis_num]
            for chunk in stored.chunks:
                both = list(zip(part.global_offset, target.shape, chunk.offsets, chunk.sizes, strict=True))
                begin = [max(ours, theirs) for ours, _, theirs, _ in both]
                end = [min(ours + our_size, theirs + their_size) for ours, our_size, theirs, their_size in both]
                if all(first < last for first, last in zip(begin, end, strict=True)):
                    span = zip(begin, end, part.global_offset, strict=True)
                    into = target[tuple(slice(first - ours, last - ours) for first, last, ours in span)]
                    offsets = [first - theirs for first, theirs in zip(begin, chunk.offsets, strict=True)]
                    self._read(part.key, chunk, stored.properties.dtype, offsets, into)

    def _read(
        self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype, offsets: list[int], into: torch.Tensor
    ) -> None:
        """Copies the part of a chunk that starts at `offsets` in it."""
        info = self._stored[name, tuple(chunk.offsets)]
        path = self.folder / Path(info.relative_path).name
        sizes = list(chunk.sizes)
        while len(sizes) > 1 and sizes[0] == 1:  # numbers of layer and expert
            sizes, offsets, into = sizes[1:], offsets[1:], into[0]
        row_bytes = math.prod(sizes[1:]) * dtype.itemsize
        block_rows = max(1, BLOCK_BYTES // row_bytes)
        inner = tuple(slice(first, first + size) for first, size in zip(offsets[1:], into.shape[1:], strict=True))
        try:
            with path.open("rb") as file:
                start = info.offset + _first_byte(file, info, sizes[0] * row_bytes)
                for row in range(0, len(into), block_rows):
                    target = into[row : row + block_rows]
                    file.seek(start + (offsets[0] + row) * row_bytes)
                    block = bytearray(file.read(len(target) * row_bytes))
                    rows = torch.frombuffer(block, dtype=dtype).view(len(target), *sizes[1:])
                    target.copy_(rows[(slice(None), *inner)])
        except (OSError, zipfile.BadZipFile, RuntimeError, ValueError) as error:
            raise ConfigError(f"{path}: {name} cannot be read ({error}); copy or write the model again") from error


class _FilePart(io.RawIOBase):
    """A part of a file as if it were a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        return self.position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        data = self.file.read(max(0, min(len(buffer), self.length - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _first_byte(file: BinaryIO, info: _StorageInfo, num_bytes: int) -> int:
    """Where in the part of a file that torch.save wrote (a zip archive of stored entries) the tensor's bytes begin."""
    part = _FilePart(file, info.offset, info.length)
    with zipfile.ZipFile(part) as archive:
        entry = next((entry for entry in archive.infolist() if entry.filename.endswith("/data/0")), None)
    if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size != num_bytes:
        raise zipfile.BadZipFile(f"it is not {num_bytes} bytes as torch.save writes them")
    part.seek(entry.header_offset)
    header = part.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:])
    return entry.header_offset + len(header) + name_length + extra_length


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ConfigError(f"{path}: not the metadata of a distributed checkpoint ({error})") from error
    if not isinstance(metadata, Metadata):
        raise ConfigError(f"{path}: not the metadata of a distributed checkpoint ({type(metadata).__name__})")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _HARMLESS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")
