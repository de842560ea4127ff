"""Read models from disk: Hugging Face folders and .nemo archives.

A .nemo archive is a tar file of model_config.yaml (the architecture), model_weights/ (a Megatron
distributed checkpoint, which loads at any tensor-parallel size), tokenizer/ (the tokenizer's files)
and, where it is known, provenance.json (the data the model was trained on).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from nemo_kd.config import ConfigError
from nemo_kd.mcore.architecture import read_model_config
from nemo_kd.mcore.distributed_checkpoint import METADATA, ShardedFolder
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.hf_folder import StoredBytes, safetensors_parts
from nemo_kd.mcore.model import sharded_weights
from nemo_kd.mcore.weights import load_hf_weights, open_hf_model, zero_vocabulary_padding
from nemo_kd.nemo_archive import (
    MAX_TOP_FILE_BYTES,
    MODEL_CONFIG,
    PROVENANCE,
    TOKENIZER,
    WEIGHTS,
    Archive,
    ArchiveError,
    Files,
    FolderFiles,
)
from nemo_kd.run.collective import on_every_rank

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

    def __init__(self, kind: str, files: FolderFiles | Archive, source: Path) -> None:
        self.kind = kind
        self.files = files
        self.source = source
        self._parts: Callable[[], Iterable[StoredBytes]]
        self.provenance = _read_provenance(files) if PROVENANCE in files.sizes else None
        if kind == "hf":
            self.architecture, hf_weights = open_hf_model(files.root)
            self.dtype = hf_weights.dtype
            paths = set(hf_weights.files.values())
            self._parts = functools.partial(safetensors_parts, paths)
            return
        if isinstance(files, Archive):
            files.check_names()
        config_path = files.root / MODEL_CONFIG
        self.architecture = read_model_config(
            _read_small(files, MODEL_CONFIG), str(config_path)
        )
        self._stored = ShardedFolder(files, f"{WEIGHTS}/")
        self._parts = self._stored.parts
        dtypes = {tensor.properties.dtype for tensor in self._stored.tensors.values()}
        if not dtypes:
            raise ConfigError(
                f"{files.root / WEIGHTS}: holds no weights; copy or write the model again"
            )
        self.dtype = functools.reduce(torch.promote_types, dtypes)

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer's files while the model is open."""
        if isinstance(self.files, Archive):
            return self.files.tokenizer_folder()
        return self.files.root / TOKENIZER if self.kind == "nemo" else self.files.root

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
            "tensors": sample_tensors(self.files, self._parts()),
        }

    def load_weights(self, model: torch.nn.Module, groups: ProcessGroups) -> None:
        """Fill this rank's part of the model and zero the vocabulary padding; every rank calls it.

        Raises:
            ConfigError: the stored weights are not those that the architecture needs.
        """
        if self.kind == "hf":
            load_hf_weights(model, self.files.root, self.architecture, groups)
            return
        wanted = sharded_weights(model)
        stages: list[Any] = [None] * len(groups.replica_ranks)
        torch.distributed.all_gather_object(
            stages, {tensor.key for tensor in wanted.values()}, group=groups.replica
        )
        differing = set[str]().union(*stages) ^ set(self._stored.tensors)
        if differing:
            raise ConfigError(
                f"{self.source}: model_weights does not fit model_config.yaml: "
                f"{', '.join(sorted(differing)[:5])} stands in one of them only"
            )
        self._stored.load(wanted)
        zero_vocabulary_padding(model, self.architecture, groups)


@contextmanager
def open_pretrained(path: str, key: str = KEY) -> Iterator[PretrainedModel]:
    """Open a Hugging Face folder, a .nemo archive or an extracted one; every rank calls it.

    Every rank reads an archive in place and unpacks its tokenizer only, into its own temporary
    folder.

    Raises:
        ConfigError: on every rank, nothing is there or it cannot be read; names `key`.
    """
    source = Path(path).expanduser()

    def open_files() -> FolderFiles | Archive:
        if not source.exists():
            raise ConfigError(
                f"{key}: {path} does not exist; give a Hugging Face folder or a .nemo archive"
            )
        if source.is_dir():
            if not any(_exists(source / name) for name in ("config.json", MODEL_CONFIG)):
                raise _unknown_model(source, False, key)
            return FolderFiles(source)
        try:
            return Archive(source)
        except ArchiveError as error:
            raise ConfigError(f"{key}: {error}") from error

    files = on_every_rank(open_files)
    with files if isinstance(files, Archive) else nullcontext():
        yield on_every_rank(lambda: PretrainedModel(_kind(files, key), files, source))


def sample_tensors(files: Files, parts: Iterable[StoredBytes]) -> str:
    """Hash every tensor: all of its bytes up to 64 KiB, else 8 KiB about every 8 MiB.

    It does not depend on how tensors are spread over files. Reads 1 to 5 MB of a GB.

    Raises:
        ConfigError: a file is unreadable or ends too early.
    """
    digest = hashlib.sha256()
    for part in sorted(parts):
        digest.update(f"{part.label}:{part.num_bytes}".encode())
        path = files.root / part.file
        blocks = [(0, part.num_bytes)]
        if part.num_bytes > SAMPLE_WHOLE_BYTES:
            last = part.num_bytes - SAMPLE_BLOCK_BYTES
            count = 3 + part.num_bytes // SAMPLE_STRIDE_BYTES
            starts = [number * last // (count - 1) for number in range(count)]
            blocks = [(start, SAMPLE_BLOCK_BYTES) for start in starts]
        try:
            with files.open(part.file) as file:
                for start, length in blocks:
                    file.seek(part.offset + start)
                    block = file.read(length)
                    if len(block) < length:
                        raise ConfigError(
                            f"{path}: ends inside {part.label}; copy or download it again"
                        )
                    digest.update(block)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    return f"sha256:{digest.hexdigest()}"


def _kind(files: FolderFiles | Archive, key: str) -> str:
    if isinstance(files, FolderFiles) and _exists(files.root / "config.json"):
        return "hf"
    is_nemo = MODEL_CONFIG in files.sizes
    if is_nemo and f"{WEIGHTS}/{METADATA}" in files.sizes:
        return "nemo"
    raise _unknown_model(files.root, is_nemo, key)


def _unknown_model(path: Path, is_nemo: bool, key: str) -> ConfigError:
    if is_nemo:
        return ConfigError(
            f"{key}: {path} is a NeMo model whose weights are no Megatron distributed checkpoint "
            "(model_weights/.metadata is missing); export it to Hugging Face with the NeMo version "
            "that wrote it and give that folder"
        )
    if _exists(path / METADATA):
        return ConfigError(
            f"{key}: {path} is a training checkpoint; give the .nemo archive that its run leaves "
            "at the end, for which the training command can be run again with "
            "trainer.knowledge_distillation.max_steps=STEP"
        )
    return ConfigError(
        f"{key}: {path} is neither a Hugging Face folder (config.json) nor a .nemo archive or its "
        "content (model_config.yaml)"
    )


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _read_small(files: Files, name: str) -> bytes:
    path = files.root / name
    if files.sizes[name] > MAX_TOP_FILE_BYTES:
        raise ConfigError(
            f"{path}: {files.sizes[name]:,} bytes, more than any model's ({MAX_TOP_FILE_BYTES:,})"
        )
    try:
        with files.open(name) as file:
            return file.read(MAX_TOP_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _read_provenance(files: Files) -> dict[str, Any]:
    path = files.root / PROVENANCE
    try:
        content = json.loads(_read_small(files, PROVENANCE).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {type(content).__name__} where a mapping belongs")
    return content
