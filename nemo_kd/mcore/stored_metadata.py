"""Read `.metadata` of a distributed checkpoint, a pickle that may come from anywhere.

Unpickling can run code, and a few bytes can take any amount of memory or time. So this module
lists the permitted classes, and walks the opcodes before anything is built.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from nemo_kd.config import ConfigError

MAX_BYTES = 1 << 28
MAX_WEIGHT = 10_000
"""Limit of the number of values in one hashable value."""

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
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}
"""Permitted classes and functions besides dtypes; they only hold values."""

_ATOMS = {
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "EMPTY_TUPLE",
    "EMPTY_DICT",
    "EMPTY_LIST",
    "EMPTY_SET",
    "GLOBAL",
}
_TAKES = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "STACK_GLOBAL": 2,
    "REDUCE": 2,
    "NEWOBJ": 2,
    "BUILD": 1,
    "APPEND": 1,
    "SETITEM": 2,
}
"""Values that an opcode takes from the stack. Those of `_MARKED` take all above the last mark."""
_MARKED = {"TUPLE", "APPENDS", "SETITEMS", "ADDITEMS"}
_FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"}
"""Opcodes that add to the list, dict or set below and leave no new value."""
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
)


def read_metadata(file: BinaryIO, where: str) -> Metadata:
    """Unpickle `.metadata` in time and memory proportional to its length.

    Raises:
        ConfigError: it is damaged, would run code, or describes impossible tensors.
    """
    problem = f"{where}: not the metadata of a distributed checkpoint"
    data = file.read(MAX_BYTES + 1)
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        _check_opcodes(data)
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        _check_values(metadata)
    except _DAMAGE as error:
        raise ConfigError(f"{problem} ({str(error)[:300]})") from error
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{problem} ({type(error).__name__})") from error
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(
            getattr(torch, name, None), torch.dtype
        )
        if is_dtype or name in _HARMLESS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it refers to {module}.{name}, which no checkpoint needs"
        )


class _Value:
    """A value on the unpickler's stack: the number of values in it, and if another one holds it."""

    __slots__ = ("is_held", "weight")

    def __init__(self, weight: int = 1) -> None:
        self.weight = weight
        self.is_held = False


def _check_opcodes(data: bytes) -> None:
    """Refuse opcodes that torch does not write, and values that take too long to hash.

    A tuple that holds a tuple twice, which holds a tuple twice, ... is short in a pickle. An
    object must be filled before another one holds it, as pickle.dump does; else its weight could
    grow afterwards.
    """
    stack: list[_Value] = []
    marks: list[int] = []
    memo: list[_Value] = []
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _ATOMS:
            stack.append(_Value())
        elif name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(str(argument))])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _TAKES or name in _MARKED:
            first = marks.pop() if name in _MARKED else len(stack) - _TAKES[name]
            if first < (marks[-1] if marks else 0):
                raise ValueError("its opcodes do not fit together")
            taken = stack[first:]
            del stack[first:]
            weight = 1 + sum(value.weight for value in taken)
            for value in taken:
                value.is_held = True
            if name in _FILLS:
                continue
            if weight > MAX_WEIGHT:
                raise ValueError("a value in it consists of too many others")
            if name != "BUILD":
                stack.append(_Value(weight))
            elif stack[-1].is_held:
                raise ValueError("it changes a value that another one holds")
            else:
                stack[-1].weight += weight
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it has the opcode {name}, which torch does not write")


def _check_values(metadata: Any) -> None:
    """Refuse types and sizes that would break the reader of tensors."""
    if not isinstance(metadata, Metadata):
        raise TypeError(type(metadata).__name__)
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str):
            raise TypeError(f"a name is a {type(name).__name__}")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(name, entry)
        elif not isinstance(entry, BytesStorageMetadata):
            raise TypeError(f"an entry is a {type(entry).__name__}")
        elif vars(entry):
            # A size would make Megatron take it for a tensor, which torch then unpickles.
            raise TypeError(
                f"{name} is not a tensor but has {', '.join(map(str, vars(entry)))}"
            )
    for index, info in metadata.storage_data.items():
        for number in (info.offset, info.length):
            if type(number) is not int or number < 0:
                raise ValueError(f"{index.fqn} lies nowhere in a file")
        path = info.relative_path
        if not isinstance(path, str) or not isinstance(index.fqn, str):
            raise TypeError("a file has no name")
        if path in ("", ".", "..") or "/" in path or "\0" in path:
            raise ValueError(f"{index.fqn} lies in {path!r}, outside of the folder")
        if info.transform_descriptors:
            raise ValueError(f"{index.fqn} is stored as {info.transform_descriptors!r}")


def _check_tensor(name: str, entry: TensorStorageMetadata) -> None:
    dtype = entry.properties.dtype
    if not isinstance(dtype, torch.dtype) or not isinstance(entry.size, torch.Size):
        raise TypeError(f"{name} has no dtype or size")
    num_stored = 0
    for chunk in entry.chunks:
        is_chunk = isinstance(chunk, ChunkStorageMetadata)
        if not is_chunk or not len(chunk.sizes) == len(chunk.offsets) == len(entry.size):
            raise ValueError(f"{name} has chunks of another rank than its own")
        for offset, size, whole in zip(
            chunk.offsets, chunk.sizes, entry.size, strict=True
        ):
            if size < 0 or not 0 <= offset <= offset + size <= whole:
                raise ValueError(f"{name} has a chunk outside of it")
        num_stored += chunk.sizes.numel()
    if num_stored != entry.size.numel():
        raise ValueError(
            f"{name} has {entry.size.numel():,} values, its chunks {num_stored:,}"
        )
