"""Megatron's distributed checkpoints: one folder, written and read by all ranks, loadable in any layout."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nemo_kd.config import ConfigError
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
    """What `folder` holds for the sharded tensors of `state`, and all its plain values; every rank calls it."""
    return dist_checkpointing.load(
        state, str(folder), strict=dist_checkpointing.validation.StrictHandling.RAISE_UNEXPECTED
    )


def tensors_in(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Name, shape and dtype of the tensors that a distributed checkpoint from elsewhere holds; no weight is read.

    torch unpickles `.metadata` without asking what is in it: look here before Megatron loads what somebody else wrote,
    and load tensors only, which torch reads without unpickling.

    Raises:
        ConfigError: the file is damaged, or would run code.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ConfigError(f"{path}: not the metadata of a distributed checkpoint ({error})") from error
    if not isinstance(metadata, Metadata):
        raise ConfigError(f"{path}: not the metadata of a distributed checkpoint ({type(metadata).__name__})")
    return {
        name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _HARMLESS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")
