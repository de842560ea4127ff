"""Convert a Hugging Face folder to a .nemo archive or back, in one process on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nemo_kd.config import ConfigError
from nemo_kd.config.convert import ConvertCheckpointConfig, check_output
from nemo_kd.config.shared import PRECISIONS, ModelConfig, TrainerConfig
from nemo_kd.files import print_text
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.export import ModelExport
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.model import build_gpt_model, transformer_config
from nemo_kd.run.ranks import join_ranks


def convert(config: ConvertCheckpointConfig) -> None:
    """Write `output_path` from `input_path`, bit for bit unless `precision` is given.

    Needs memory for the weights and one file of up to 5 GB.

    Raises:
        ConfigError: the input cannot be read, or the output exists or is of the same kind; raised
            before any weight is read.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # copying needs host memory, not a GPU's
    source_path = Path(config.input_path).expanduser().absolute()
    output = Path(config.output_path).expanduser().absolute()
    to_nemo = output.suffix == ".nemo"
    check_output(output, source_path, config.overwrite)
    with open_pretrained(config.input_path, key="input_path") as source:
        if to_nemo == (source.kind == "nemo"):
            raise ConfigError(
                f"output_path: {output} would be of the same kind as the input; end it in .nemo "
                "for an archive, in anything else for a Hugging Face folder"
            )
        dtype = (
            getattr(torch, PRECISIONS[config.precision])
            if config.precision
            else source.dtype
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        join_ranks(TrainerConfig(accelerator="cpu", precision="32"))
        layout = ModelConfig(make_vocab_size_divisible_by=1)
        groups = initialize_model_parallel(layout, layout.seed)
        architecture = source.architecture
        options = transformer_config(
            architecture, layout, dtype, perform_initialization=False
        )
        model = build_gpt_model(architecture, options, 1, transformer_engine=False)
        source.load_weights(model, groups)
        export = ModelExport(model, source, groups, source.provenance)
        if to_nemo:
            export.save_nemo(output)
        else:
            export.save_hf(output)
    print_text(
        f"{config.input_path} -> {output} ({str(dtype).removeprefix('torch.')})"
    )
