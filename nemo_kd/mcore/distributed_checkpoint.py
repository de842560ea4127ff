"""Read Megatron's distributed checkpoints: in any layout, and without running code in them."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_kd.config import ConfigError
from nemo_kd.nemo_archive import ModelFiles, StoredBytes

METADATA = ".metadata"
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
"""Permitted classes and functions of `.metadata` besides dtypes; they only hold values."""


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


@contextlib.contextmanager
def _reading(where: object) -> Iterator[None]:
    """Report whatever torch and Python raise on damaged bytes as a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{where}: cannot be read ({str(error)[:200]}); copy or write the model again"
        ) from error


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the content of `folder` for the sharded parts of `state`, and all its plain values.

    Every rank calls it. The model keeps its own states of FP8 layers: Transformer Engine would
    unpickle stored ones.

    Raises:
        ConfigError: `.metadata` or a value is damaged, or would run code.
    """

    def keep(part: Any) -> Any:
        if isinstance(part, ShardedObject) and part.key.endswith("_extra_state"):
            return LocalNonpersistentObject(part.data)
        return part

    # Even where Megatron asks torch.load for any object, it builds tensors and plain values only.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    path = folder / METADATA
    try:
        with _reading(path), path.open("rb") as file:
            _MetadataUnpickler(file).load()
        return dist_checkpointing.load(
            dict_list_map_outplace(keep, state),
            str(folder),
            strict="raise_unexpected",
        )
    except (
        CheckpointException,
        dist_checkpointing.core.CheckpointingException,
        pickle.UnpicklingError,
        OSError,
    ) as error:
        # torch advises to trust the file, so its text is not shown.
        raise ConfigError(
            f"{folder}: cannot be read, or holds more than tensors and plain values; use another "
            "checkpoint"
        ) from error


def fill_from(folder: Path, state: dict[str, Any]) -> None:
    """Fill the sharded tensors in `state` from a checkpoint; no communication. Changes `state`.

    Raises:
        ConfigError: a tensor is missing or has another shape, or a file is damaged.
    """
    with ModelFiles(folder) as files, torch.no_grad():
        ShardedFolder(files).load(state)


class ShardedFolder:
    """The tensors of a distributed checkpoint in a model's files, by their names.

    Args:
        prefix: start of the names of the checkpoint's files, for example `model_weights/`.

    Attributes:
        tensors: name -> shape, dtype and stored chunks.
        stored: (name, offsets) of a chunk -> its place.
        dtype: the narrowest that holds all tensors without loss.

    Raises:
        ConfigError: `.metadata` is damaged, would run code, or lists a file that is missing.
    """

    def __init__(self, files: ModelFiles, prefix: str = "") -> None:
        self.files = files
        self.folder = files.root / prefix
        self.stored: dict[Any, StoredBytes] = {}
        path = prefix + METADATA
        with _reading(files.root / path), files.open(path) as file:
            metadata = _MetadataUnpickler(file).load()
            self.tensors = {
                name: entry
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            self.dtype = functools.reduce(
                torch.promote_types,
                {tensor.properties.dtype for tensor in self.tensors.values()},
                torch.bool,
            )
            for name, tensor in self.tensors.items():
                # Unlike a range's length, the difference of its ends' squares tells its place too.
                measure = sum(
                    math.prod(
                        map(
                            lambda start, size: size * (2 * start + size),
                            chunk.offsets,
                            chunk.sizes,
                        )
                    )
                    for chunk in tensor.chunks
                )
                if measure != math.prod(tensor.size) ** 2:
                    raise ValueError(f"the parts of {name} do not cover it")
            for index, info in metadata.storage_data.items():
                name = prefix + info.relative_path
                if name not in files.sizes:
                    raise ConfigError(
                        f"{files.root / name}: the file is missing; copy or write the model again"
                    )
                if index.fqn in self.tensors:
                    offsets = tuple(index.offset or ())
                    self.stored[index.fqn, offsets] = StoredBytes(
                        f"{index.fqn} {offsets}", name, info.offset, info.length
                    )

    def load(self, state: dict[str, Any]) -> None:
        """Fill the sharded tensors in `state`, a stored part at a time; no communication.

        Values outside the stored tensor (vocabulary padding) stay. Changes `state`.

        Raises:
            ConfigError: a tensor has another shape, or a file is damaged.
        """
        apply_factories(state)
        for part in nested_values(state):
            with _reading(f"{self.folder}: {part.key}"):
                stored = self.tensors[part.key]
                shape = tuple(part.global_shape)
                # Padding may differ along the vocabulary.
                free = int(part.allow_shape_mismatch)
                if shape[free:] != stored.size[free:]:
                    raise ConfigError(
                        f"{self.folder}: {part.key} has the shape {tuple(stored.size)}, "
                        f"model_config.yaml calls for {shape}"
                    )
                target = part.data.detach()[(None,) * part.prepend_axis_num]
                for chunk in stored.chunks:
                    ours = []
                    theirs = []
                    for our_start, our_size, start, size in zip(
                        part.global_offset,
                        target.shape,
                        chunk.offsets,
                        chunk.sizes,
                        strict=True,
                    ):
                        first = max(our_start, start)
                        last = max(first, min(our_start + our_size, start + size))
                        ours.append(slice(first - our_start, last - our_start))
                        theirs.append(slice(first - start, last - start))
                    into = target[tuple(ours)]
                    if into.numel():
                        place = self.stored[part.key, tuple(chunk.offsets)]
                        with self.files.open(place.file) as file:
                            file.seek(place.offset)
                            data = io.BytesIO(file.read(place.num_bytes))
                        whole = torch.load(data, map_location="cpu", weights_only=True)
                        into.copy_(whole.reshape(chunk.sizes)[tuple(theirs)])
