"""`.metadata` of a distributed checkpoint, a pickle that may come from anywhere.

Unpickling can run code, and a few bytes can ask for any amount of memory or time. So the classes that it may refer to are
listed, and its opcodes are walked before anything is built.
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
"""Values that one hashable value may consist of."""

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
"""The classes and functions that the pickle is made of, dtypes apart; none of them does more than hold values."""

_ATOMS = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *(
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "EMPTY_TUPLE",
        "EMPTY_DICT",
        "EMPTY_LIST",
        "EMPTY_SET",
        "GLOBAL",
    ),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARKED = {"TUPLE", "APPENDS", "SETITEMS", "ADDITEMS"}


def read_metadata(file: BinaryIO, where: str) -> Metadata:
    """Unpickle `.metadata`; time and memory are proportional to its length.

    Raises:
        ConfigError: it is damaged, or would run code, or says of tensors what cannot be.
    """
    data = file.read(MAX_BYTES + 1)
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        _check_opcodes(data)
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        _check_values(metadata)
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ) as error:
        raise ConfigError(
            f"{where}: not the metadata of a distributed checkpoint ({str(error)[:300]})"
        ) from error
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise ConfigError(
            f"{where}: not the metadata of a distributed checkpoint ({type(error).__name__})"
        ) from error
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _HARMLESS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")


class _Value:
    """A value on the unpickler's stack: how many values it consists of, and if another one holds it."""

    __slots__ = ("is_held", "weight")

    def __init__(self, weight: int = 1) -> None:
        self.weight = weight
        self.is_held = False


def _check_opcodes(data: bytes) -> None:
    """Refuse opcodes that torch does not write, and values that hold each other so often that hashing one never ends.

    Tuples that hold a tuple twice, which holds a tuple twice, ... are short in a pickle. An object is filled before
    another one holds it, as pickle.dump does; else its weight could grow afterwards.
    """
    stack: list[_Value] = []
    marks: list[int] = []
    memo: list[_Value] = []

    def take(first: int) -> int:
        if first < (marks[-1] if marks else 0):
            raise ValueError("its opcodes do not fit together")
        weight = 1
        for value in stack[first:]:
            value.is_held = True
            weight += value.weight
        if weight > MAX_WEIGHT and opcode.name not in ("APPENDS", "SETITEMS", "ADDITEMS"):
            raise ValueError("a value in it consists of too many others")
        del stack[first:]
        return weight

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
        elif name in _TUPLES:
            stack.append(_Value(take(len(stack) - _TUPLES[name])))
        elif name in _MARKED:
            weight = take(marks.pop())
            if name == "TUPLE":
                stack.append(_Value(weight))
        elif name in ("STACK_GLOBAL", "REDUCE", "NEWOBJ"):
            stack.append(_Value(take(len(stack) - 2)))
        elif name == "BUILD":
            weight = take(len(stack) - 1)
            if stack[-1].is_held:
                raise ValueError("it changes a value that another one holds")
            stack[-1].weight += weight
        elif name in ("APPEND", "SETITEM"):
            take(len(stack) - (1 if name == "APPEND" else 2))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it has the opcode {name}, which torch does not write")


def _check_values(metadata: Any) -> None:
    """Refuse types and sizes that the reader of tensors would stumble over."""
    if not isinstance(metadata, Metadata):
        raise TypeError(type(metadata).__name__)
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(
            entry, TensorStorageMetadata | BytesStorageMetadata
        ):
            raise TypeError(f"an entry is a {type(entry).__name__}")
        if isinstance(entry, BytesStorageMetadata):
            if vars(
                entry
            ):  # a size would make Megatron take it for a tensor, which torch then unpickles
                raise TypeError(
                    f"{name} is not a tensor but has {', '.join(map(str, vars(entry)))}"
                )
            continue
        if not isinstance(entry.properties.dtype, torch.dtype) or not isinstance(
            entry.size, torch.Size
        ):
            raise TypeError(f"{name} has no dtype or size")
        num_stored = 0
        for chunk in entry.chunks:
            if not isinstance(chunk, ChunkStorageMetadata) or not len(chunk.sizes) == len(
                chunk.offsets
            ) == len(entry.size):
                raise ValueError(f"{name} has chunks of another rank than its own")
            for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True):
                if not 0 <= offset <= offset + size <= whole or size < 0:
                    raise ValueError(f"{name} has a chunk outside of it")
            num_stored += chunk.sizes.numel()
        if num_stored != entry.size.numel():
            raise ValueError(f"{name} has {entry.size.numel():,} values, its chunks {num_stored:,}")
    for index, info in metadata.storage_data.items():
        numbers = (info.offset, info.length)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{index.fqn} lies nowhere in a file")
        if not isinstance(info.relative_path, str) or not isinstance(index.fqn, str):
            raise TypeError("a file has no name")
        if (
            info.relative_path in ("", ".", "..")
            or "/" in info.relative_path
            or "\0" in info.relative_path
        ):
            raise ValueError(f"{index.fqn} lies in {info.relative_path!r}, outside of the folder")
        if info.transform_descriptors:
            raise ValueError(f"{index.fqn} is stored as {info.transform_descriptors!r}")
