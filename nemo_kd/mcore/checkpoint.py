"""Models on disk: Hugging Face folders and .nemo archives.

A .nemo archive is a tar file of model_config.yaml (the architecture), model_weights/ (a Megatron distributed
checkpoint, which loads at any tensor-parallel size), tokenizer/ (the tokenizer's files) and, where it is known,
provenance.json (what the model was trained on).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from nemo_kd.config import ConfigError
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.files import atomic_file, explained, remove, remove_abandoned, temporary_path
from nemo_kd.mcore.checkpoint_write import save_sharded
from nemo_kd.mcore.distributed_checkpoint import METADATA, ShardedFolder
from nemo_kd.mcore.fingerprint import StoredBytes, safetensors_parts, sample_tensors
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.hf_folder import SafetensorsFolder
from nemo_kd.mcore.hf_model import open_hf_model
from nemo_kd.mcore.model import chunks
from nemo_kd.mcore.model_config import check_size, read_model_config, write_model_config
from nemo_kd.mcore.weights import ADAPTERS, load_hf_weights, zero_vocabulary_padding
from nemo_kd.nemo_archive import (
    CHAT_TEMPLATES,
    MAX_TOP_FILE_BYTES,
    MODEL_CONFIG,
    PROVENANCE,
    TOKENIZER,
    WEIGHTS,
    Archive,
    ArchiveError,
    FolderFiles,
)
from nemo_kd.run.collective import on_every_rank, on_rank_zero, rank

FINGERPRINT_BLOCKS = 16
FINGERPRINT_BLOCK_BYTES = 1 << 16
KEY = "pretrained_checkpoint.restore_from_path"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class PretrainedModel:
    """A model on disk that has been looked at, not loaded.

    Attributes:
        kind: hf or nemo.
        source: the path that was given.
        files: those of the folder, or of the archive, which is read in place.
        dtype: of the stored weights.
        provenance: what the model was trained on, where it says so; conversions pass it on.
    """

    def __init__(self, kind: str, files: FolderFiles | Archive, source: Path) -> None:
        self.kind = kind
        self.files = files
        self.source = source
        self.provenance = _json(files, PROVENANCE) if PROVENANCE in files.sizes else None
        if kind == "hf":
            self.architecture, hf_weights = open_hf_model(files.root)
            self.dtype = hf_weights.dtype
            return
        if isinstance(files, Archive):
            files.check_names()
        config = _read_small(files, MODEL_CONFIG)
        self.architecture = read_model_config(config, str(files.root / MODEL_CONFIG))
        self._stored = ShardedFolder(files, f"{WEIGHTS}/")
        if not self._stored.tensors:
            raise ConfigError(
                f"{files.root / WEIGHTS}: holds no weights; copy or write the model again"
            )
        self.dtype = functools.reduce(
            torch.promote_types,
            {tensor.properties.dtype for tensor in self._stored.tensors.values()},
        )
        smallest = min(tensor.properties.dtype.itemsize for tensor in self._stored.tensors.values())
        num_bytes = sum(
            size for name, size in files.sizes.items() if name.startswith(f"{WEIGHTS}/")
        )
        check_size(self.architecture, num_bytes // smallest, str(files.root / MODEL_CONFIG))

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's files lie while the model is open."""
        if isinstance(self.files, Archive):
            return self.files.tokenizer_folder()
        return self.files.root / TOKENIZER if self.kind == "nemo" else self.files.root

    def fingerprint(self) -> dict[str, str]:
        """Return the name and two hashes: `weights` of architecture and files, `tensors` of samples of every tensor.

        `weights` covers every weight file's size and 1 MiB of its bytes; caches of older versions know no other hash.
        """
        architecture = dataclasses.asdict(self.architecture) | {"hf_config": None}
        if (
            self.architecture.num_moe_experts is None
        ):  # a dense model's hash is that of versions without experts
            architecture = {key: value for key, value in architecture.items() if "moe" not in key}
        digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
        sizes = self.files.sizes
        for name in sorted(sizes, key=PurePosixPath):
            if not name.endswith((".safetensors", ".distcp")):
                continue
            digest.update(f"{name}:{sizes[name]}".encode())
            with self.files.open(name) as file:
                for block in range(FINGERPRINT_BLOCKS):
                    last = max(0, sizes[name] - FINGERPRINT_BLOCK_BYTES)
                    file.seek(block * last // (FINGERPRINT_BLOCKS - 1))
                    digest.update(file.read(FINGERPRINT_BLOCK_BYTES))
        return {
            "name": self.source.absolute().name,
            "weights": f"sha256:{digest.hexdigest()}",
            "tensors": sample_tensors(self.files, self._stored_bytes()),
        }

    def _stored_bytes(self) -> Iterable[StoredBytes]:
        if self.kind == "hf":
            stored = SafetensorsFolder(self.files.root)
            return safetensors_parts(
                self.files, sorted({path.name for path in stored.files.values()})
            )
        return self._stored.parts()

    def load_weights(self, model: torch.nn.Module, groups: ProcessGroups) -> None:
        """Fill this rank's part of the model; every rank calls it. Vocabulary padding is zero afterwards.

        Raises:
            ConfigError: the stored weights are not those that the architecture needs.
        """
        if self.kind == "hf":
            load_hf_weights(model, self.files.root, self.architecture, groups)
            return
        wanted = _weights(model)
        stages: list[Any] = [None] * len(groups.replica_ranks)
        torch.distributed.all_gather_object(
            stages, {tensor.key for tensor in wanted.values()}, group=groups.replica
        )
        differing = set[str]().union(*stages) ^ set(self._stored.tensors)
        if differing:
            raise ConfigError(
                f"{self.source}: model_weights does not fit model_config.yaml: {', '.join(sorted(differing)[:5])} "
                "stands in one of them only"
            )
        self._stored.load(wanted)
        zero_vocabulary_padding(model, self.architecture, groups)


@contextmanager
def open_pretrained(path: str, key: str = KEY) -> Iterator[PretrainedModel]:
    """Open a Hugging Face folder, a .nemo archive or an extracted one; all ranks call it where there are several.

    An archive is read in place, by every rank: only its tokenizer is unpacked, into a temporary folder of each.

    Raises:
        ConfigError: on every rank, nothing is there, or nothing that can be read; names `key`.
    """
    source = Path(path).expanduser()

    def open_files() -> FolderFiles | Archive:
        if not source.exists():
            raise ConfigError(
                f"{key}: {path} does not exist; give a Hugging Face folder or a .nemo archive"
            )
        if source.is_dir():
            if not any(_is_there(source / name) for name in ("config.json", MODEL_CONFIG)):
                raise _not_ours(source, False, key)
            return FolderFiles(source)
        try:
            return Archive(source)
        except ArchiveError as error:
            raise ConfigError(f"{key}: {error}") from error

    files = on_every_rank(open_files)
    with files if isinstance(files, Archive) else nullcontext():
        yield on_every_rank(lambda: PretrainedModel(_kind(files, key), files, source))


def save_nemo(
    path: str | Path,
    model: torch.nn.Module,
    architecture: GPTArchitecture,
    tokenizer_folder: Path,
    groups: ProcessGroups,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a .nemo archive, whole or not at all; every rank takes part, rank 0 packs it.

    The weights lie beside `path` meanwhile, where all ranks write them: twice the archive's size is needed. What killed
    processes left there is removed.

    Raises:
        FileError: on every rank, something cannot be written; nothing is left of it.
    """
    path = Path(path).absolute()

    def new_folder() -> Path:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(path.parent)
            folder = temporary_path(path.with_name(f"{path.name}.content"))
            remove(folder)  # of a dead process that had this one's id
            folder.mkdir()
        return folder

    def pack() -> None:
        (folder / MODEL_CONFIG).write_text(write_model_config(architecture), encoding="utf-8")
        copy_tokenizer(tokenizer_folder, folder / TOKENIZER)
        save_provenance(provenance, folder)
        # NeMo's connector would pack as much, but importing it takes seconds and its base class only knows pickles.
        with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for entry in sorted(folder.iterdir()):
                tar.add(entry, arcname=f"./{entry.name}", filter=_without_owner)

    folder = on_rank_zero(new_folder)
    try:
        with explained(path):
            save_sharded(_weights(model), folder / WEIGHTS)
            on_rank_zero(pack)
    finally:
        if rank() == 0:
            remove(folder)


def _without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who packed it on which machine; whole seconds need no extended headers."""
    info.uid = 0
    info.gid = 0
    info.uname = ""
    info.gname = ""
    info.mtime = int(info.mtime)
    return info


def save_provenance(provenance: dict[str, Any] | None, folder: Path) -> None:
    """Writes provenance.json into the folder of a model; nothing where nothing is known."""
    if provenance is not None:
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files, chat templates and generation settings included, with this process's file modes."""
    templates = sorted((source / CHAT_TEMPLATES).glob("*.jinja"))
    names = [*TOKENIZER_FILES, *(f"{CHAT_TEMPLATES}/{path.name}" for path in templates)]
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _kind(files: FolderFiles | Archive, key: str) -> str:
    if isinstance(files, FolderFiles) and _is_there(files.root / "config.json"):
        return "hf"
    is_nemo = MODEL_CONFIG in files.sizes
    if is_nemo and f"{WEIGHTS}/{METADATA}" in files.sizes:
        return "nemo"
    raise _not_ours(files.root, is_nemo, key)


def _weights(model: torch.nn.Module) -> dict[str, Any]:
    """The model's weights for a distributed checkpoint, without adapters and the states of Transformer Engine's FP8, pickles."""
    return {
        f"{number}.{name}": part
        for number, chunk in enumerate(chunks(model))
        for name, part in chunk.sharded_state_dict().items()
        if ADAPTERS not in name.split(".") and not name.endswith("_extra_state")
    }


def _not_ours(path: Path, is_nemo: bool, key: str) -> ConfigError:
    if is_nemo:
        return ConfigError(
            f"{key}: {path} is a NeMo model whose weights are no Megatron distributed checkpoint (model_weights/.metadata is "
            "missing); export it to Hugging Face with the NeMo version that wrote it and give that folder"
        )
    if _is_there(path / METADATA):
        return ConfigError(
            f"{key}: {path} is a training checkpoint; give the .nemo archive that its run leaves at the end, for which the training "
            "command can be run again with trainer.knowledge_distillation.max_steps=STEP"
        )
    return ConfigError(
        f"{key}: {path} is neither a Hugging Face folder (config.json) nor a .nemo archive or its content (model_config.yaml)"
    )


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _read_small(files: FolderFiles | Archive, name: str) -> bytes:
    if files.sizes[name] > MAX_TOP_FILE_BYTES:
        raise ConfigError(
            f"{files.root / name}: {files.sizes[name]:,} bytes, more than any model's ({MAX_TOP_FILE_BYTES:,})"
        )
    try:
        with files.open(name) as file:
            return file.read(MAX_TOP_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{files.root / name}: cannot be read ({error.strerror})") from error


def _json(files: FolderFiles | Archive, name: str) -> dict[str, Any]:
    try:
        content = json.loads(_read_small(files, name).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{files.root / name}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{files.root / name}: {type(content).__name__} where a mapping belongs")
    return content
