"""Models on disk: Hugging Face folders and .nemo archives.

A .nemo archive is a tar file of model_config.yaml (the architecture), model_weights/ (a Megatron distributed
checkpoint, which loads at any tensor-parallel size) and tokenizer/ (the tokenizer's files).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from omegaconf import OmegaConf

from nemo_kd.config import ConfigError, typed
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.mcore.distributed_checkpoint import load_sharded, save_sharded
from nemo_kd.mcore.families import architecture_from_hf
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.weights import SafetensorsFolder, load_hf_weights, zero_vocabulary_padding

FORMAT_VERSION = 1
KEY = "pretrained_checkpoint.restore_from_path"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
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
        folder: the Hugging Face folder, or the content of the archive.
        source: the path that was given.
        tokenizer_folder: where the tokenizer's files lie while the model is open.
    """

    def __init__(self, kind: str, folder: Path, source: Path) -> None:
        self.kind, self.folder, self.source = kind, folder, source
        if kind == "hf":
            self.architecture = architecture_from_hf(_json(folder / "config.json"))
            self.tokenizer_folder = folder
        else:
            self.architecture = _read_model_config(folder / "model_config.yaml")
            self.tokenizer_folder = folder / "tokenizer"

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""
        if self.kind == "hf":
            return SafetensorsFolder(self.folder).dtype
        metadata = dist_checkpointing.load_tensors_metadata(str(self.folder / "model_weights"))
        return metadata["embedding.word_embeddings.weight"].dtype

    def fingerprint(self) -> dict[str, str]:
        """Name, and a hash of architecture, file names, sizes and the first and last MiB of every weight file."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.architecture), sort_keys=True).encode())
        files = (
            [self.source] if self.source.is_file() else sorted(p for p in self.folder.rglob("*") if _is_weight_file(p))
        )
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read(1 << 20))
        return {"name": self.source.name, "weights": f"sha256:{digest.hexdigest()}"}

    def load_weights(self, model: GPTModel, groups: ProcessGroups) -> None:
        """Fills this rank's part of the model; every rank calls it. Vocabulary padding is zero afterwards."""
        if self.kind == "hf":
            load_hf_weights(model, self.folder, self.architecture, groups)
            return
        wanted = {k: v for k, v in model.sharded_state_dict().items() if not k.endswith("_extra_state")}
        model.load_state_dict(load_sharded(wanted, self.folder / "model_weights"), strict=False)
        zero_vocabulary_padding(model, self.architecture, groups)


@contextmanager
def open_pretrained(path: str, key: str = KEY) -> Iterator[PretrainedModel]:
    """Opens a Hugging Face folder, a .nemo archive or an extracted one; all ranks call it where there are several.

    An archive is extracted beside itself, or into the temporary folder where that cannot be written, and removed again.

    Raises:
        ConfigError: nothing is there, or nothing that can be read; names `key`.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise ConfigError(f"{key}: {path} does not exist; give a Hugging Face folder or a .nemo archive")
    if source.is_dir():
        yield PretrainedModel(_kind_of_folder(source, key), source, source)
        return
    folder = _on_rank_zero(_extract, source, key)
    try:
        yield PretrainedModel(_kind_of_folder(folder, key), folder, source)
        if _distributed():
            torch.distributed.barrier()
    finally:
        if _rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def save_nemo(
    path: str | Path, model: GPTModel, architecture: GPTArchitecture, tokenizer_folder: Path, groups: ProcessGroups
) -> None:
    """Writes a .nemo archive, whole or not at all; every rank takes part, rank 0 packs it."""
    path = Path(path).absolute()
    folder = path.with_name(f".{path.name}.tmp")
    save_sharded(model.sharded_state_dict(), folder / "model_weights")
    if torch.distributed.get_rank() == 0:
        config = {"format_version": FORMAT_VERSION, **dataclasses.asdict(architecture)}
        (folder / "model_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        copy_tokenizer(tokenizer_folder, folder / "tokenizer")
        archive = folder.with_suffix(".tar")
        with tarfile.open(archive, "w") as tar:
            for entry in sorted(folder.iterdir()):
                tar.add(entry, arcname=f"./{entry.name}")
        os.replace(archive, path)
        shutil.rmtree(folder)
    torch.distributed.barrier()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's files, chat templates and generation settings included."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates", dirs_exist_ok=True)


def _kind_of_folder(folder: Path, key: str) -> str:
    if (folder / "config.json").is_file():
        return "hf"
    if (folder / "model_config.yaml").is_file():
        if (folder / "model_weights" / ".metadata").is_file():
            return "nemo"
        raise ConfigError(
            f"{key}: {folder} holds a NeMo model whose weights are no Megatron distributed checkpoint (model_weights/.metadata is "
            "missing); export it to Hugging Face with the NeMo version that wrote it and give that folder"
        )
    raise ConfigError(
        f"{key}: {folder} is neither a Hugging Face folder (config.json) nor an extracted .nemo (model_config.yaml)"
    )


def _read_model_config(path: Path) -> GPTArchitecture:
    config: Any = OmegaConf.load(path)
    version = config.pop("format_version", None) if hasattr(config, "pop") else None
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: format_version {version!r} was not written by nemo_kd (it writes {FORMAT_VERSION}); convert the model to "
            "Hugging Face with the tool that wrote it, then with convert_checkpoint"
        )
    return typed(GPTArchitecture, config)


def _extract(source: Path, key: str) -> Path:
    parent = source.absolute().parent
    folder = Path(
        tempfile.mkdtemp(prefix=f".{source.name}.extracted-", dir=parent if os.access(parent, os.W_OK) else None)
    )
    try:
        with tarfile.open(source) as tar:
            tar.extractall(folder, filter="data")  # refuses absolute paths, `..`, links out of the folder and devices
    except (tarfile.TarError, EOFError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"{key}: {source} is no readable .nemo archive ({error}); copy or write it again") from error
    return folder


def _on_rank_zero(function: Any, *args: Any) -> Any:
    """What `function(*args)` gives on rank 0, on every rank; its ConfigError is raised on all."""
    outcome: list[Any] = [None, None]
    if _rank() == 0:
        try:
            outcome[0] = function(*args)
        except ConfigError as error:
            outcome[1] = str(error)
    if _distributed():
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ConfigError(outcome[1])
    return outcome[0]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error


def _is_weight_file(path: Path) -> bool:
    return path.is_file() and (path.suffix in (".safetensors", ".distcp") or path.name == ".metadata")


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0
