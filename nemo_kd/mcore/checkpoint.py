"""Read models from disk: Hugging Face folders and .nemo archives.

A .nemo archive is a tar file of model_config.yaml (the architecture), model_weights/ (a Megatron
distributed checkpoint, which loads at any tensor-parallel size), tokenizer/ (the tokenizer's files)
and, where it is known, provenance.json (the data the model was trained on).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from nemo_kd.config import ConfigError
from nemo_kd.mcore.architecture import read_model_config
from nemo_kd.mcore.distributed_checkpoint import METADATA, ShardedFolder
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.model import sharded_weights
from nemo_kd.mcore.weights import (
    load_hf_weights,
    open_hf_model,
    zero_vocabulary_padding,
)
from nemo_kd.nemo_archive import (
    GENERATION_CONFIG,
    MODEL_CONFIG,
    PROVENANCE,
    WEIGHTS,
    ModelFiles,
    SafetensorsFolder,
    StoredBytes,
    read_json,
)
from nemo_kd.run.collective import gather, on_every_rank

FINGERPRINT_BLOCKS = 16
FINGERPRINT_BLOCK_BYTES = 1 << 16
SAMPLE_WHOLE_BYTES = 1 << 16
SAMPLE_BLOCK_BYTES = 1 << 13
SAMPLE_STRIDE_BYTES = 1 << 23
KEY = "pretrained_checkpoint.restore_from_path"


class PretrainedModel:
    """A model on disk, opened and checked but not loaded.

    Attributes:
        kind: hf or nemo.
        source: the path that was given.
        files: those of the folder, or of the archive, which is read in place.
        dtype: of the stored weights.
        provenance: the data the model was trained on, if recorded; conversions pass it on.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self.files = ModelFiles(source)
        self.kind = _kind(self.files)
        self.provenance: dict[str, Any] | None = None
        if PROVENANCE in self.files.sizes:
            with self.files.open(PROVENANCE) as file:
                self.provenance = json.load(file)
        self._weights: SafetensorsFolder | ShardedFolder
        if self.kind == "hf":
            self.architecture, self._weights = open_hf_model(source)
        else:
            with self.files.open(MODEL_CONFIG) as file:
                self.architecture = read_model_config(
                    file.read(), str(source / MODEL_CONFIG)
                )
            self._weights = ShardedFolder(self.files, f"{WEIGHTS}/")
        self.dtype = self._weights.dtype

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer's files while the model is open."""
        return self.files.tokenizer_folder()

    def eos_token_ids(self) -> set[int]:
        """Return the tokens that end a text by config.json or generation_config.json."""
        configs = [self.architecture.hf_config]
        path = self.tokenizer_folder / GENERATION_CONFIG
        if path.exists():
            configs.append(read_json(path))
        found: set[Any] = set()
        for config in configs:
            ids = config.get("eos_token_id", [])
            found.update(ids if isinstance(ids, list) else [ids])
        found.discard(None)
        return found

    def fingerprint(self) -> dict[str, str]:
        """Return name and two hashes: `weights` of architecture and files, `tensors` of samples.

        `weights` covers every weight file's size and 1 MiB of its bytes; old caches hold no other
        hash.
        """
        architecture = dataclasses.asdict(self.architecture) | {"hf_config": None}
        if self.architecture.num_moe_experts is None:
            # A dense model's hash equals that of versions without experts.
            architecture = {
                key: value for key, value in architecture.items() if "moe" not in key
            }
        digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
        sizes = self.files.sizes
        for name in sorted(sizes, key=PurePosixPath):
            if not name.endswith((".safetensors", ".distcp")):
                continue
            digest.update(f"{name}:{sizes[name]}".encode())
            last = max(0, sizes[name] - FINGERPRINT_BLOCK_BYTES)
            with self.files.open(name) as file:
                for block in range(FINGERPRINT_BLOCKS):
                    file.seek(block * last // (FINGERPRINT_BLOCKS - 1))
                    digest.update(file.read(FINGERPRINT_BLOCK_BYTES))
        return {
            "name": self.source.absolute().name,
            "weights": f"sha256:{digest.hexdigest()}",
            "tensors": sample_tensors(self.files, self._weights.stored.values()),
        }

    def load_weights(self, model: torch.nn.Module, groups: ProcessGroups) -> None:
        """Fill this rank's part of the model and zero the vocabulary padding; every rank calls it.

        Raises:
            ConfigError: the stored weights are not those that the architecture needs.
        """
        if isinstance(self._weights, SafetensorsFolder):
            load_hf_weights(model, self._weights, self.architecture, groups)
        else:
            wanted = sharded_weights(model)
            names = gather(lambda: {part.key for part in wanted.values()})
            differing = set[str]().union(*names) ^ set(self._weights.tensors)
            if differing:
                raise ConfigError(
                    f"{self.source}: model_weights does not fit model_config.yaml: "
                    f"{', '.join(sorted(differing)[:5])} stands in one of them only"
                )
            self._weights.load(wanted)
        zero_vocabulary_padding(model, self.architecture, groups)


@contextmanager
def open_pretrained(path: str, key: str = KEY) -> Iterator[PretrainedModel]:
    """Open a Hugging Face folder, a .nemo archive or an extracted one; every rank calls it.

    Every rank reads an archive in place.

    Raises:
        ConfigError: on every rank, nothing is there or it cannot be read; names `key`.
    """
    source = Path(path).expanduser()

    def open_model() -> PretrainedModel:
        try:
            return PretrainedModel(source)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error

    model = on_every_rank(open_model)
    with model.files:
        yield model


def sample_tensors(files: ModelFiles, parts: Iterable[StoredBytes]) -> str:
    """Hash every tensor: all of its bytes up to 64 KiB, else 8 KiB about every 8 MiB.

    It does not depend on how tensors are spread over files. Reads 1 to 5 MB of a GB.
    """
    digest = hashlib.sha256()
    for part in sorted(parts):
        digest.update(f"{part.label}:{part.num_bytes}".encode())
        length = part.num_bytes
        starts = [0]
        if length > SAMPLE_WHOLE_BYTES:
            last = length - SAMPLE_BLOCK_BYTES
            count = 3 + length // SAMPLE_STRIDE_BYTES
            starts = [number * last // (count - 1) for number in range(count)]
            length = SAMPLE_BLOCK_BYTES
        with files.open(part.file) as file:
            for start in starts:
                file.seek(part.offset + start)
                digest.update(file.read(length))
    return f"sha256:{digest.hexdigest()}"


def _kind(files: ModelFiles) -> str:
    if "config.json" in files.sizes:
        return "hf"
    if f"{WEIGHTS}/{METADATA}" in files.sizes and MODEL_CONFIG in files.sizes:
        return "nemo"
    raise ConfigError(
        f"{files.root} is neither a Hugging Face folder (config.json) nor a .nemo archive or its "
        f"content ({MODEL_CONFIG}, {WEIGHTS}/{METADATA}). Of a training checkpoint ({METADATA}) give "
        "the .nemo archive that its run leaves at the end; export an older NeMo model to Hugging "
        "Face with the NeMo version that wrote it, and give that folder"
    )
