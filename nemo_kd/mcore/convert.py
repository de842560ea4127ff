"""`convert_checkpoint`: Hugging Face folder <-> .nemo archive, in one process on the CPU."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from megatron.core.models.gpt import GPTModel
from safetensors.torch import save_file

from nemo_kd.config import ConfigError
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.model import PRECISIONS, GPTArchitecture
from nemo_kd.config.teacher import ModelConfig
from nemo_kd.mcore.checkpoint import PretrainedModel, copy_tokenizer, open_pretrained, save_nemo, save_provenance
from nemo_kd.mcore.groups import ProcessGroups, init_process_group, initialize_model_parallel
from nemo_kd.mcore.model import build_gpt_model, transformer_config
from nemo_kd.mcore.weights import hf_tensors

MAX_SHARD_SIZE = "5GB"


def convert(config: ConvertCheckpointConfig) -> None:
    """Writes `output_path` from `input_path`; the weights keep their bits unless `precision` asks for another dtype.

    Needs memory for about twice the weights.

    Raises:
        ConfigError: the input cannot be read, the output exists or is of the same kind; before any weight is read.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # conversion is copying: it needs host memory, not a GPU's
    source_path = Path(config.input_path).expanduser().absolute()
    output = Path(config.output_path).expanduser().absolute()
    to_nemo = output.suffix == ".nemo"
    _check_output(output, source_path, config.overwrite)
    with open_pretrained(config.input_path, key="input_path") as source:
        if to_nemo == (source.kind == "nemo"):
            raise ConfigError(
                f"output_path: {output} would be of the same kind as the input; end it in .nemo for an archive, in "
                "anything else for a Hugging Face folder"
            )
        dtype = getattr(torch, PRECISIONS[config.precision]) if config.precision else source.dtype
        output.parent.mkdir(parents=True, exist_ok=True)
        model, groups = _load(source, dtype)
        if to_nemo:
            save_nemo(output, model, source.architecture, source.tokenizer_folder, groups, source.provenance)
        else:
            save_hf(output, model, source, dtype)
    print(f"{config.input_path} -> {output} ({str(dtype).removeprefix('torch.')})", flush=True)


def save_hf(folder: Path, model: GPTModel, source: PretrainedModel, dtype: torch.dtype) -> None:
    """Writes a Hugging Face folder from a whole model (one rank); it appears whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = dict(hf_tensors(model, source.architecture))
    # Views of one storage would count as one tensor in the plan; meta tensors have sizes and no storage.
    sizes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=MAX_SHARD_SIZE)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name].contiguous() for name in names}, temporary / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (temporary / "config.json").write_text(json.dumps(_hf_config(source.architecture, dtype), indent=2) + "\n")
    copy_tokenizer(source.tokenizer_folder, temporary)
    save_provenance(source.provenance, temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def _check_output(output: Path, source: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise ConfigError(f"output_path: {output} exists; give another path or overwrite=True")
    if source.resolve().is_relative_to(output.resolve()):
        raise ConfigError(
            f"output_path: {output} holds the input, which overwrite=True would delete; give another path"
        )
    replaceable = output.is_file() if output.suffix == ".nemo" else (output / "config.json").is_file()
    if not replaceable:
        raise ConfigError(
            f"output_path: {output} exists and is not such a model; overwrite=True replaces only a .nemo archive by another, "
            "or a folder with config.json"
        )


def _load(source: PretrainedModel, dtype: torch.dtype) -> tuple[GPTModel, ProcessGroups]:
    init_process_group(1, 1, "cpu")
    layout = ModelConfig(make_vocab_size_divisible_by=1)
    groups = initialize_model_parallel(layout, layout.seed)
    config = transformer_config(source.architecture, layout, dtype, perform_initialization=False)
    model = build_gpt_model(source.architecture, config, 1, transformer_engine=False)
    source.load_weights(model, groups)
    return model, groups


def _hf_config(architecture: GPTArchitecture, dtype: torch.dtype) -> dict[str, Any]:
    config = dict(architecture.hf_config)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    return config
