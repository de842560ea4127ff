"""What a run leaves: an archive, and Hugging Face folders of models and adapters, written by all ranks that hold a part."""

from __future__ import annotations

import json
import os
import re
import stat
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
from nemo_kd.files import explained, remove, remove_abandoned, temporary_path
from nemo_kd.mcore.checkpoint import PretrainedModel, copy_tokenizer, save_nemo, save_provenance
from nemo_kd.mcore.experts import fused_part
from nemo_kd.mcore.folder_swap import replace_folder, restore_replaced
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.lora import adapters, merged
from nemo_kd.mcore.model import chunks
from nemo_kd.mcore.weights import Piece, hf_pieces, pieces, whole_shape, whole_tensor
from nemo_kd.run.collective import on_rank_zero, raise_together

MAX_SHARD_SIZE = "5GB"


def save_model(
    path: Path,
    model: torch.nn.Module,
    source: PretrainedModel,
    groups: ProcessGroups,
    provenance: dict[str, Any],
    export: ExportConfig,
    lora: LoraConfig | None,
) -> None:
    """Write the .nemo archive `path`, adapters merged, and beside it the Hugging Face folder that `export` asks for."""
    hf_folder = path.with_name(path.name.removesuffix(".nemo") + "-hf")
    architecture, tokenizer_folder = source.architecture, source.tokenizer_folder
    with merged(model):
        save_nemo(path, model, architecture, tokenizer_folder, groups, provenance)
        if export.hf and export.lora == "merged":
            save_hf(hf_folder, model, architecture, tokenizer_folder, groups, provenance)
    if export.hf and export.lora == "adapter" and lora is not None:
        base = str(source.source.absolute())
        save_adapter(
            hf_folder, model, lora, architecture, base, tokenizer_folder, groups, provenance
        )


def save_hf(
    folder: Path,
    model: torch.nn.Module,
    architecture: GPTArchitecture,
    tokenizer_folder: Path,
    groups: ProcessGroups,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a Hugging Face folder, whole or not at all, replacing it; every rank takes part, and all see its disk.

    One rank of every pipeline stage (and of all that hold experts) writes the files of its layers. It gathers a file's
    weights over its tensor-parallel group first, so it needs host memory for one file, and memory on its device for
    one weight.

    Raises:
        FileError: on every rank, something cannot be written; the old folder is left.
    """
    with _new_folder(folder) as temporary:
        _write_hf(temporary, model, architecture, groups)
        _finish(temporary, folder, tokenizer_folder, provenance)


def _write_hf(
    temporary: Path, model: torch.nn.Module, architecture: GPTArchitecture, groups: ProcessGroups
) -> None:
    mine = _pieces_to_write(model, architecture, groups)
    files, first_file, num_files = _plan(mine, architecture, groups)
    names = {
        file: "model.safetensors"
        if num_files == 1
        else f"model-{first_file + number:05}-of-{num_files:05}.safetensors"
        for number, file in enumerate(files, 1)
    }
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
            except OSError as error:  # the others gather on: they hear of it behind the loop
                problem = error
            weight_map |= dict.fromkeys(hf_names, names[file])
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    raise_together(problem)
    parts = _gather((weight_map, total_bytes))

    def write_configs() -> None:
        if num_files > 1:
            index = {
                "metadata": {"total_size": sum(size for _, size in parts)},
                "weight_map": {
                    hf_name: file for part, _ in parts for hf_name, file in part.items()
                },
            }
            _write_json(temporary / "model.safetensors.index.json", index)
        _write_json(
            temporary / "config.json", _hf_config(architecture, next(model.parameters()).dtype)
        )

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
    """Write the adapters alone as the peft library reads them, whole or not at all; every rank takes part.

    That library has an adapter for every projection: those that share one here get copies of its input side.

    Args:
        base_model: where the model without the adapters is found, for those who load them.
    """
    tensors: dict[str, torch.Tensor] = {}
    if groups.data_rank == groups.context_rank == 0:
        for piece in _adapter_pieces(model, architecture):
            tensors[piece.hf_name] = whole_tensor(piece, architecture, groups).cpu().contiguous()
    parts = _gather(tensors if groups.tensor_rank == 0 else {})

    def write_adapter() -> None:
        gathered = {name: tensor for part in parts for name, tensor in part.items()}
        _save_tensors(gathered, temporary / "adapter_model.safetensors")
        modules = sorted({name.split(".")[-3] for name in gathered})
        _write_json(temporary / "adapter_config.json", _adapter_config(lora, modules, base_model))

    with _new_folder(folder) as temporary:
        on_rank_zero(write_adapter)
        _finish(temporary, folder, tokenizer_folder, provenance)


def _pieces_to_write(
    model: torch.nn.Module, architecture: GPTArchitecture, groups: ProcessGroups
) -> dict[str, Piece]:
    """The Hugging Face tensors that this rank's tensor-parallel group writes, each of which one group does."""
    number = groups.data_rank * groups.context_size + groups.context_rank
    has_own_experts = number < chunks(model)[0].config.expert_model_parallel_size
    return {
        piece.hf_name: piece
        for piece in hf_pieces(model, architecture)
        if (has_own_experts if fused_part(piece.hf_name) else number == 0)
    }


def _plan(
    mine: dict[str, Piece], architecture: GPTArchitecture, groups: ProcessGroups
) -> tuple[dict[str, list[str]], int, int]:
    """(tensors of every file that this rank writes, number of files that ranks before it write, of all files)."""
    # Views of one storage would count as one tensor; meta tensors have sizes and no storage.
    sizes = {
        name: torch.empty(
            whole_shape(piece, architecture, groups.tensor_size),
            dtype=piece.view.dtype,
            device="meta",
        )
        for name, piece in mine.items()
    }
    files = (
        split_torch_state_dict_into_shards(sizes, max_shard_size=MAX_SHARD_SIZE).filename_to_tensors
        if sizes
        else {}
    )
    counts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, len(files) if groups.tensor_rank == 0 else 0)
    return files, sum(counts[: torch.distributed.get_rank()]), sum(counts)


def _adapter_pieces(model: torch.nn.Module, architecture: GPTArchitecture) -> list[Piece]:
    """This rank's parts of the tensors of a peft adapter, under its names for them."""
    found = []
    for name, _, adapter in adapters(model):
        # The projection's weight is cut and fused along its rows as `up` is.
        up = pieces(f"{name}.weight", adapter.up.detach(), architecture)
        down = adapter.down.detach()[None]
        for piece in up:
            module = f"base_model.model.{piece.hf_name.removesuffix('.weight')}"
            by_output = adapter.cut_by_output
            found.append(Piece(f"{module}.lora_A.weight", down, None if by_output else 1))
            found.append(Piece(f"{module}.lora_B.weight", piece.view, 0 if by_output else None))
    return found


def _adapter_config(lora: LoraConfig, modules: list[str], base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.adapter_dim,
        "lora_alpha": lora.scale * lora.adapter_dim,
        "lora_dropout": lora.adapter_dropout,
        "target_modules": modules,
        "layers_to_transform": None
        if lora.layer_selection is None
        else [n - 1 for n in sorted(lora.layer_selection)],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _hf_config(architecture: GPTArchitecture, dtype: torch.dtype) -> dict[str, Any]:
    config = dict(architecture.hf_config)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    return config


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that all ranks see; it is removed where the block fails.

    What killed processes left beside `folder` is removed, and an old folder that one was about to replace restored.
    """
    folder = folder.absolute()

    def make() -> Path:
        folder.parent.mkdir(parents=True, exist_ok=True)
        restore_replaced(folder)
        remove_abandoned(folder.parent)
        temporary = temporary_path(folder)
        remove(temporary)  # of a dead process that had this one's id
        temporary.mkdir()
        return temporary

    with explained(folder):
        temporary = on_rank_zero(make)
        try:
            yield temporary
        except BaseException:
            if torch.distributed.get_rank() == 0:
                remove(temporary)
            raise


def _finish(
    temporary: Path, folder: Path, tokenizer_folder: Path, provenance: dict[str, Any] | None
) -> None:
    """Add what rank 0 knows and give the folder its name; all ranks have written."""

    def name() -> None:
        copy_tokenizer(tokenizer_folder, temporary)
        save_provenance(provenance, temporary)
        replace_folder(temporary, folder.absolute())

    on_rank_zero(name)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with this process's file mode; the library's own is readable by its owner only."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)


def _gather(value: Any) -> list[Any]:
    """The values of all ranks, on rank 0; on the others nothing that can be used."""
    is_first = torch.distributed.get_rank() == 0
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(value, values if is_first else None)
    return values


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
