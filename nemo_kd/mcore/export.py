"""Write models: .nemo archives, Hugging Face folders and adapters; every rank writes its part."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from nemo_kd.config.model import GPTArchitecture
from nemo_kd.config.peft import ExportConfig, LoraConfig
from nemo_kd.files import atomic_file, explained, new_folder, remove, replace_folder
from nemo_kd.mcore.architecture import write_model_config
from nemo_kd.mcore.checkpoint import PretrainedModel
from nemo_kd.mcore.checkpoint_write import save_sharded
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.hf_folder import fused_place
from nemo_kd.mcore.lora import adapters, merged
from nemo_kd.mcore.model import chunks, sharded_weights
from nemo_kd.mcore.weights import Piece, hf_pieces, pieces, whole_shape, whole_tensor
from nemo_kd.nemo_archive import (
    CHAT_TEMPLATES,
    MODEL_CONFIG,
    PROVENANCE,
    TOKENIZER,
    WEIGHTS,
)
from nemo_kd.run.collective import on_rank_zero, raise_together

MAX_SHARD_SIZE = "5GB"
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


def save_model(
    path: Path,
    model: torch.nn.Module,
    source: PretrainedModel,
    groups: ProcessGroups,
    provenance: dict[str, Any],
    export: ExportConfig,
    lora: LoraConfig | None,
) -> None:
    """Write the .nemo archive with merged adapters, and the Hugging Face folder of `export`."""
    hf_folder = path.with_name(path.name.removesuffix(".nemo") + "-hf")
    architecture = source.architecture
    tokenizer_folder = source.tokenizer_folder
    with merged(model):
        save_nemo(path, model, architecture, tokenizer_folder, groups, provenance)
        if export.hf and export.lora == "merged":
            save_hf(hf_folder, model, architecture, tokenizer_folder, groups, provenance)
    if export.hf and export.lora == "adapter" and lora is not None:
        base = str(source.source.absolute())
        save_adapter(
            hf_folder,
            model,
            lora,
            architecture,
            base,
            tokenizer_folder,
            groups,
            provenance,
        )


def save_nemo(
    path: str | Path,
    model: torch.nn.Module,
    architecture: GPTArchitecture,
    tokenizer_folder: Path,
    groups: ProcessGroups,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a .nemo archive, whole or not at all; every rank calls it, rank 0 packs it.

    All ranks write the weights beside `path` first, so twice the archive's size is needed. Removes
    the files that killed processes left there.

    Raises:
        FileError: on every rank, a file cannot be written; nothing is left of it.
    """
    path = Path(path).absolute()

    def pack() -> None:
        (folder / MODEL_CONFIG).write_text(
            write_model_config(architecture), encoding="utf-8"
        )
        _copy_tokenizer(tokenizer_folder, folder / TOKENIZER)
        _save_provenance(provenance, folder)
        # NeMo's connector would pack the same, but takes seconds to import and its base class
        # reads pickles.
        with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for entry in sorted(folder.iterdir()):
                tar.add(entry, arcname=f"./{entry.name}", filter=_without_owner)

    content = path.with_name(f"{path.name}.content")
    with explained(path), _shared_folder(content) as folder:
        save_sharded(sharded_weights(model), folder / WEIGHTS)
        on_rank_zero(pack)


def save_hf(
    folder: Path,
    model: torch.nn.Module,
    architecture: GPTArchitecture,
    tokenizer_folder: Path,
    groups: ProcessGroups,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a Hugging Face folder, whole or not at all, replacing it; every rank calls it.

    All ranks see its disk. One rank of every pipeline stage (and of all that hold experts) writes
    the files of its layers. It gathers a file's weights over its tensor-parallel group first: this
    needs host memory for one file, and memory on its device for one weight.

    Raises:
        FileError: on every rank, a file cannot be written; the old folder stays.
    """
    with explained(folder), _shared_folder(folder) as temporary:
        _write_hf(temporary, model, architecture, groups)
        _publish(temporary, folder, tokenizer_folder, provenance)


def _write_hf(
    temporary: Path,
    model: torch.nn.Module,
    architecture: GPTArchitecture,
    groups: ProcessGroups,
) -> None:
    mine = _pieces_to_write(model, architecture, groups)
    files, first_file, num_files = _plan(mine, architecture, groups)
    names = dict.fromkeys(files, "model.safetensors")
    if num_files > 1:
        for number, file in enumerate(files, first_file + 1):
            names[file] = f"model-{number:05}-of-{num_files:05}.safetensors"
    weight_map: dict[str, str] = {}
    total_bytes = 0
    problem: OSError | None = None
    for file, hf_names in files.items():
        tensors: dict[str, torch.Tensor] = {}
        for hf_name in hf_names:
            tensor = whole_tensor(mine[hf_name], architecture, groups)
            if groups.tensor_rank == 0:
                tensors[hf_name] = tensor.cpu().contiguous()
        if groups.tensor_rank == 0 and problem is None:
            try:
                _save_tensors(tensors, temporary / names[file])
            except (
                OSError
            ) as error:  # raised after the loop, in which the others still gather
                problem = error
            weight_map |= dict.fromkeys(hf_names, names[file])
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    raise_together(problem)
    parts = _gather((weight_map, total_bytes))

    def write_configs() -> None:
        if num_files > 1:
            weight_maps = {name: file for part, _ in parts for name, file in part.items()}
            total_size = sum(size for _, size in parts)
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_maps}
            _write_json(temporary / "model.safetensors.index.json", index)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        named = {
            key: dtype
            for key in ("dtype", "torch_dtype")
            if key in architecture.hf_config
        }
        _write_json(temporary / "config.json", architecture.hf_config | named)

    on_rank_zero(write_configs)


def save_adapter(
    folder: Path,
    model: torch.nn.Module,
    lora: LoraConfig,
    architecture: GPTArchitecture,
    base_model: str,
    tokenizer_folder: Path,
    groups: ProcessGroups,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write the adapters alone in peft's format, whole or not at all; every rank calls it.

    peft has an adapter per projection: projections that share one here get copies of its input
    side.

    Args:
        base_model: path of the model without adapters, for loading them.
    """
    tensors: dict[str, torch.Tensor] = {}
    if groups.data_rank == groups.context_rank == 0:
        for piece in _adapter_pieces(model, architecture):
            tensors[piece.hf_name] = (
                whole_tensor(piece, architecture, groups).cpu().contiguous()
            )
    parts = _gather(tensors if groups.tensor_rank == 0 else {})

    def write_adapter() -> None:
        gathered = {name: tensor for part in parts for name, tensor in part.items()}
        _save_tensors(gathered, temporary / "adapter_model.safetensors")
        modules = sorted({name.split(".")[-3] for name in gathered})
        layers = lora.layer_selection
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": lora.adapter_dim,
            "lora_alpha": lora.scale * lora.adapter_dim,
            "lora_dropout": lora.adapter_dropout,
            "target_modules": modules,
            "layers_to_transform": layers and [number - 1 for number in sorted(layers)],
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        _write_json(temporary / "adapter_config.json", config)

    with explained(folder), _shared_folder(folder) as temporary:
        on_rank_zero(write_adapter)
        _publish(temporary, folder, tokenizer_folder, provenance)


def _pieces_to_write(
    model: torch.nn.Module, architecture: GPTArchitecture, groups: ProcessGroups
) -> dict[str, Piece]:
    """Return the Hugging Face tensors that only this rank's tensor-parallel group writes."""
    number = groups.data_rank * groups.context_size + groups.context_rank
    has_own_experts = number < chunks(model)[0].config.expert_model_parallel_size
    return {
        piece.hf_name: piece
        for piece in hf_pieces(model, architecture)
        if (has_own_experts if fused_place(piece.hf_name) else number == 0)
    }


def _plan(
    mine: dict[str, Piece], architecture: GPTArchitecture, groups: ProcessGroups
) -> tuple[dict[str, list[str]], int, int]:
    """Return the tensors of this rank's files, the number of earlier files, and of all."""
    # Views of one storage would count as one tensor; meta tensors have sizes and no storage.
    sizes = {}
    for name, piece in mine.items():
        shape = whole_shape(piece, architecture, groups.tensor_size)
        sizes[name] = torch.empty(shape, dtype=piece.view.dtype, device="meta")
    files: dict[str, list[str]] = {}
    if sizes:
        split = split_torch_state_dict_into_shards(sizes, max_shard_size=MAX_SHARD_SIZE)
        files = split.filename_to_tensors
    counts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(
        counts, len(files) if groups.tensor_rank == 0 else 0
    )
    return files, sum(counts[: torch.distributed.get_rank()]), sum(counts)


def _adapter_pieces(model: torch.nn.Module, architecture: GPTArchitecture) -> list[Piece]:
    """Return this rank's parts of the tensors of a peft adapter, under peft's names."""
    found = []
    for name, _, adapter in adapters(model):
        # The projection's weight is cut and fused along its rows as `up` is.
        up = pieces(f"{name}.weight", adapter.up.detach(), architecture)
        down = adapter.down.detach()[None]
        for piece in up:
            module = f"base_model.model.{piece.hf_name.removesuffix('.weight')}"
            by_output = adapter.cut_by_output
            found.append(Piece(f"{module}.lora_A.weight", down, None if by_output else 1))
            found.append(
                Piece(f"{module}.lora_B.weight", piece.view, 0 if by_output else None)
            )
    return found


@contextmanager
def _shared_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `path` that all ranks see; remove it afterwards."""
    folder = on_rank_zero(lambda: new_folder(path.absolute()))
    try:
        yield folder
    finally:
        if torch.distributed.get_rank() == 0:
            remove(folder)


def _publish(
    temporary: Path,
    folder: Path,
    tokenizer_folder: Path,
    provenance: dict[str, Any] | None,
) -> None:
    """Add the tokenizer and provenance, then give the folder its name; all ranks have written."""

    def publish() -> None:
        _copy_tokenizer(tokenizer_folder, temporary)
        _save_provenance(provenance, temporary)
        replace_folder(temporary, folder.absolute())

    on_rank_zero(publish)


def _without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out user and machine; whole seconds need no extended headers."""
    info.uid = 0
    info.gid = 0
    info.uname = ""
    info.gname = ""
    info.mtime = int(info.mtime)
    return info


def _save_provenance(provenance: dict[str, Any] | None, folder: Path) -> None:
    if provenance is not None:
        _write_json(folder / PROVENANCE, provenance)


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files and generation settings, with this process's file modes."""
    templates = sorted((source / CHAT_TEMPLATES).glob("*.jinja"))
    target.mkdir(parents=True, exist_ok=True)
    for path in [*(source / name for name in TOKENIZER_FILES), *templates]:
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with this process's mode; the library's is for its owner only."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise OSError(f"{path}: {error}") from error
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(mode)


def _gather(value: Any) -> list[Any]:
    """Return the values of all ranks on rank 0, a useless list on the others."""
    is_first = torch.distributed.get_rank() == 0
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(value, values if is_first else None)
    return values


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
