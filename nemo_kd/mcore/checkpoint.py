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
from omegaconf import DictConfig

from nemo_kd.config import ConfigError, typed
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.mcore.distributed_checkpoint import ShardedFolder, save_sharded
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.hf_model import open_hf_model
from nemo_kd.mcore.model import chunks
from nemo_kd.mcore.weights import ADAPTERS, load_hf_weights, zero_vocabulary_padding
from nemo_kd.model_files import read_json

FORMAT_VERSION = 1
PROVENANCE = "provenance.json"
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES = 16, 1 << 16
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
        folder: the Hugging Face folder, or the content of the archive.
        source: the path that was given.
        tokenizer_folder: where the tokenizer's files lie while the model is open.
        dtype: of the stored weights.
        provenance: what the model was trained on, where it says so; conversions pass it on.
    """

    def __init__(self, kind: str, folder: Path, source: Path) -> None:
        self.kind, self.folder, self.source = kind, folder, source
        self.provenance = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else None
        if kind == "hf":
            self.architecture, hf_weights = open_hf_model(folder)
            self.tokenizer_folder = folder
            self.dtype = hf_weights.dtype
        else:
            self.architecture = _read_model_config(folder / "model_config.yaml")
            self.tokenizer_folder = folder / "tokenizer"
            self._stored = ShardedFolder(folder / "model_weights")
            self.dtype = functools.reduce(
                torch.promote_types, {tensor.properties.dtype for tensor in self._stored.tensors.values()}
            )

    def fingerprint(self) -> dict[str, str]:
        """Name, and a hash of the architecture, every weight file's size and 1 MiB of its bytes, spread over the file."""
        architecture = dataclasses.asdict(self.architecture) | {"hf_config": None}
        if self.architecture.num_moe_experts is None:  # a dense model's hash is that of versions without experts
            architecture = {key: value for key, value in architecture.items() if "moe" not in key}
        digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
        for path in sorted(path for path in self.folder.rglob("*") if path.suffix in (".safetensors", ".distcp")):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(self.folder)}:{size}".encode())
            with path.open("rb") as file:
                for block in range(FINGERPRINT_BLOCKS):
                    file.seek(block * max(0, size - FINGERPRINT_BLOCK_BYTES) // (FINGERPRINT_BLOCKS - 1))
                    digest.update(file.read(FINGERPRINT_BLOCK_BYTES))
        return {"name": self.source.absolute().name, "weights": f"sha256:{digest.hexdigest()}"}

    def load_weights(self, model: torch.nn.Module, groups: ProcessGroups) -> None:
        """Fills this rank's part of the model; every rank calls it. Vocabulary padding is zero afterwards.

        Raises:
            ConfigError: the stored weights are not those that the architecture needs.
        """
        if self.kind == "hf":
            load_hf_weights(model, self.folder, self.architecture, groups)
            return
        wanted = _weights(model)
        stages: list[Any] = [None] * len(groups.replica_ranks)
        torch.distributed.all_gather_object(stages, {tensor.key for tensor in wanted.values()}, group=groups.replica)
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
        if not folder.exists():
            raise ConfigError(
                f"{key}: {source} was extracted to {folder}, which this machine does not see; extract it (tar xf) on a file "
                "system that all machines share and give that folder"
            )
        yield PretrainedModel(_kind_of_folder(folder, key), folder, source)
        if _distributed():
            torch.distributed.barrier()  # no rank may still be reading
    finally:
        if _rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def save_nemo(
    path: str | Path,
    model: torch.nn.Module,
    architecture: GPTArchitecture,
    tokenizer_folder: Path,
    groups: ProcessGroups,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Writes a .nemo archive, whole or not at all; every rank takes part, rank 0 packs it.

    The weights lie beside `path` meanwhile, where all ranks write them: twice the archive's size is needed.
    """
    path = Path(path).absolute()
    folder = path.with_name(f".{path.name}.tmp")
    if _rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    save_sharded(_weights(model), folder / "model_weights")
    if _rank() == 0:
        config = {"format_version": FORMAT_VERSION, **dataclasses.asdict(architecture)}
        (folder / "model_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        copy_tokenizer(tokenizer_folder, folder / "tokenizer")
        save_provenance(provenance, folder)
        archive = folder.with_suffix(".tar")
        # NeMo's connector would pack as much, but importing it takes seconds and its base class only knows pickles.
        with archive.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for entry in sorted(folder.iterdir()):
                    tar.add(entry, arcname=f"./{entry.name}")
            file.flush()
            os.fsync(file.fileno())
        os.replace(archive, path)
        shutil.rmtree(folder)
    torch.distributed.barrier()


def save_provenance(provenance: dict[str, Any] | None, folder: Path) -> None:
    """Writes provenance.json into the folder of a model; nothing where nothing is known."""
    if provenance is not None:
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's files, chat templates and generation settings included."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates", dirs_exist_ok=True)


def _kind_of_folder(folder: Path, key: str) -> str:
    if (folder / "config.json").exists() or (folder / "config.json").is_symlink():
        return "hf"
    is_nemo = (folder / "model_config.yaml").is_file()
    if is_nemo and (folder / "model_weights" / ".metadata").is_file():
        return "nemo"
    raise _not_ours(folder, is_nemo, key)


def _weights(model: torch.nn.Module) -> dict[str, Any]:
    """The model's weights for a distributed checkpoint, without adapters and the states of Transformer Engine's FP8, pickles."""
    return {
        f"{number}.{name}": part
        for number, chunk in enumerate(chunks(model))
        for name, part in chunk.sharded_state_dict().items()
        if ADAPTERS not in name.split(".") and not name.endswith("_extra_state")
    }


def _read_model_config(path: Path) -> GPTArchitecture:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from error
    version = config.pop("format_version", None) if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: format_version is {version!r}, so another tool wrote it (nemo_kd writes {FORMAT_VERSION}); convert the "
            "model to Hugging Face with that tool, then with convert_checkpoint"
        )
    hf_config = config.pop("hf_config", {})  # kept from OmegaConf, which would interpolate "${...}" in it
    return dataclasses.replace(typed(GPTArchitecture, DictConfig(config)), hf_config=hf_config)


def _extract(source: Path, key: str) -> Path:
    """Unpacks into a new folder; only names and sizes are looked at before it is known to be a model of ours."""
    parent = source.absolute().parent
    folder = Path(
        tempfile.mkdtemp(prefix=f".{source.name}.extracted-", dir=parent if os.access(parent, os.W_OK) else None)
    )
    try:
        with tarfile.open(source) as tar:
            names = {os.path.normpath(name) for name in tar.getnames()}
            if "model_config.yaml" in names and "model_weights/.metadata" in names:
                tar.extractall(
                    folder, filter="data"
                )  # refuses absolute paths, `..`, links out of the folder and devices
    except (tarfile.TarError, EOFError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"{key}: {source} is no readable .nemo archive ({error}); copy or write it again") from error
    if not any(folder.iterdir()):
        shutil.rmtree(folder)
        raise _not_ours(source, "model_config.yaml" in names, key)
    return folder


def _not_ours(path: Path, is_nemo: bool, key: str) -> ConfigError:
    if is_nemo:
        return ConfigError(
            f"{key}: {path} is a NeMo model whose weights are no Megatron distributed checkpoint (model_weights/.metadata is "
            "missing); export it to Hugging Face with the NeMo version that wrote it and give that folder"
        )
    return ConfigError(
        f"{key}: {path} is neither a Hugging Face folder (config.json) nor a .nemo archive or its content (model_config.yaml)"
    )


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


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0
