"""Write models: .nemo archives, Hugging Face folders and adapters; every rank writes its part."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from nemo_kd.config.optim import ExportConfig, LoraConfig
from nemo_kd.files import atomic_file, explained, new_folder, remove, replace_folder
from nemo_kd.mcore.architecture import write_model_config
from nemo_kd.mcore.checkpoint import PretrainedModel
from nemo_kd.mcore.checkpoint_write import CheckpointWrite, gather_to_first
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.lora import adapters, merged
from nemo_kd.mcore.model import chunks, named_weights, sharded_weights
from nemo_kd.mcore.weights import Piece, hf_shapes, pieces, whole_tensor
from nemo_kd.nemo_archive import (
    CHAT_TEMPLATES,
    GENERATION_CONFIG,
    MODEL_CONFIG,
    PROVENANCE,
    TOKENIZER,
    WEIGHTS,
)
from nemo_kd.run.collective import gather, on_rank_zero, raise_together

MAX_FILE_BYTES = 5 * 10**9
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
    GENERATION_CONFIG,
)


@dataclass(frozen=True)
class ModelExport:
    """A model to write; every rank calls the methods and sees rank 0's disk.

    Each method writes all or nothing, and replaces what has the name.

    Attributes:
        source: the model that it was loaded from, open; gives architecture and tokenizer.

    Raises:
        FileError: on every rank, a file cannot be written; what was there stays.
    """

    model: torch.nn.Module
    source: PretrainedModel
    groups: ProcessGroups
    provenance: dict[str, Any] | None = None

    def save(self, path: Path, config: ExportConfig, lora: LoraConfig | None) -> None:
        """Write an archive with merged adapters, and the Hugging Face folder of `config`."""
        hf_folder = path.with_name(path.name.removesuffix(".nemo") + "-hf")
        with merged(self.model):
            self.save_nemo(path)
            if config.hf and config.lora == "merged":
                self.save_hf(hf_folder)
        if config.hf and config.lora == "adapter" and lora is not None:
            self.save_adapter(hf_folder, lora)

    def save_nemo(self, path: str | Path) -> None:
        """Write a .nemo archive; rank 0 packs it.

        All ranks write the weights beside `path` first, so twice the archive's size is needed.
        Removes the files that killed processes left there.
        """
        path = Path(path).absolute()

        def pack() -> None:
            (folder / MODEL_CONFIG).write_text(
                write_model_config(self.source.architecture), encoding="utf-8"
            )
            self._add_rest(folder, folder / TOKENIZER)
            # NeMo's connector would pack the same, but takes seconds to import and its base class
            # reads pickles.
            with (
                atomic_file(path) as file,
                tarfile.open(fileobj=file, mode="w") as tar,
            ):
                for entry in sorted(folder.iterdir()):
                    tar.add(entry, arcname=f"./{entry.name}", filter=_without_owner)

        content = path.with_name(f"{path.name}.content")
        with explained(path), _shared_folder(content) as folder:
            weights = sharded_weights(self.model)
            CheckpointWrite(weights, folder / WEIGHTS, in_background=False).finish()
            on_rank_zero(pack)

    def save_hf(self, folder: Path) -> None:
        """Write a Hugging Face folder.

        One rank of every pipeline stage (and of all that hold experts) writes the files of its
        layers. It gathers a file's weights over its tensor-parallel group first: this needs host
        memory for two files, and memory on its device for one weight.
        """
        with explained(folder), _shared_folder(folder) as temporary:
            self._write_weights(temporary)
            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            hf_config = self.source.architecture.hf_config
            keys = hf_config.keys() & {"dtype", "torch_dtype"}
            config = hf_config | dict.fromkeys(keys, dtype)
            on_rank_zero(lambda: _write_json(temporary / "config.json", config))
            self._publish(temporary, folder)

    def save_adapter(self, folder: Path, lora: LoraConfig) -> None:
        """Write the adapters alone in peft's format.

        peft has an adapter per projection: projections that share one here get copies of its input
        side.
        """
        tensors: dict[str, torch.Tensor] = {}
        if self.groups.data_rank == self.groups.context_rank == 0:
            for piece in self._adapter_pieces():
                tensor = whole_tensor(piece, self.source.architecture, self.groups)
                tensors[piece.hf_name] = tensor.cpu().contiguous()
        parts = gather_to_first(tensors if self.groups.tensor_rank == 0 else {})

        def write_adapter() -> None:
            gathered = {
                name: tensor for part in parts for name, tensor in part.items()
            }
            _save_tensors(gathered, temporary / "adapter_model.safetensors")
            layers = lora.layer_selection
            config = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": str(self.source.source.absolute()),
                "r": lora.adapter_dim,
                "lora_alpha": lora.scale * lora.adapter_dim,
                "lora_dropout": lora.adapter_dropout,
                "target_modules": sorted({name.split(".")[-3] for name in gathered}),
                "layers_to_transform": layers
                and [number - 1 for number in sorted(layers)],
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
            }
            _write_json(temporary / "adapter_config.json", config)

        with explained(folder), _shared_folder(folder) as temporary:
            on_rank_zero(write_adapter)
            self._publish(temporary, folder)

    def _write_weights(self, folder: Path) -> None:
        """Write the safetensors files, and their index where there are several."""
        architecture = self.source.architecture
        is_writer = self.groups.tensor_rank == 0
        mine = self._pieces_to_write()
        files = self._split(mine)
        of_ranks = gather(lambda: files if is_writer else [])
        first = sum(map(len, of_ranks[: torch.distributed.get_rank()]))
        all_files = list(itertools.chain(*of_ranks))

        def name_of(number: int) -> str:
            if len(all_files) == 1:
                return "model.safetensors"
            return f"model-{number + 1:05}-of-{len(all_files):05}.safetensors"

        problem: OSError | None = None
        for number, hf_names in enumerate(files, first):
            tensors: dict[str, torch.Tensor] = {}
            for hf_name in hf_names:
                tensor = whole_tensor(mine[hf_name], architecture, self.groups)
                if is_writer:
                    tensors[hf_name] = tensor.cpu().contiguous()
            try:
                if is_writer:
                    _save_tensors(tensors, folder / name_of(number))
            except OSError as error:
                # Raised after the loop, in which the others still gather.
                problem = error
        raise_together(problem)

        def write_index() -> None:
            weight_map = {
                hf_name: name_of(number)
                for number, hf_names in enumerate(all_files)
                for hf_name in hf_names
            }
            num_weights = sum(map(math.prod, hf_shapes(architecture).values()))
            itemsize = next(self.model.parameters()).itemsize
            index = {
                "metadata": {"total_size": num_weights * itemsize},
                "weight_map": weight_map,
            }
            _write_json(folder / "model.safetensors.index.json", index)

        if len(all_files) > 1:
            on_rank_zero(write_index)

    def _pieces_to_write(self) -> dict[str, Piece]:
        """Return the Hugging Face tensors that only this rank's tensor-parallel group writes."""
        groups = self.groups
        number = groups.data_rank * groups.context_size + groups.context_rank
        config = chunks(self.model)[0].config
        has_own_experts = number < config.expert_model_parallel_size
        architecture = self.source.architecture
        is_tied = architecture.share_embeddings_and_output_weights
        return {
            piece.hf_name: piece
            for name, weight in named_weights(self.model)
            # The last of several stages has a copy of a tied layer.
            if not (is_tied and name == "output_layer.weight")
            for piece in pieces(name, weight, architecture)
            if (has_own_experts if ".experts." in piece.hf_name else number == 0)
        }

    def _split(self, mine: dict[str, Piece]) -> list[list[str]]:
        """Return the names of the tensors of this rank's files."""
        shapes = hf_shapes(self.source.architecture)
        files: list[list[str]] = []
        room = 0
        for name, piece in mine.items():
            num_bytes = math.prod(shapes[name]) * piece.view.itemsize
            if num_bytes > room:
                files.append([])
                room = MAX_FILE_BYTES
            files[-1].append(name)
            room -= num_bytes
        return files

    def _adapter_pieces(self) -> list[Piece]:
        """Return this rank's parts of the tensors of a peft adapter, under peft's names."""
        found = []
        for name, _, adapter in adapters(self.model):
            # The projection's weight is cut and fused along its rows as `up` is.
            up = pieces(
                f"{name}.weight", adapter.up.detach(), self.source.architecture
            )
            down = adapter.down.detach()[None]
            cut_down, cut_up = (None, 0) if adapter.cut_by_output else (1, None)
            for piece in up:
                module = f"base_model.model.{piece.hf_name.removesuffix('.weight')}"
                found.append(Piece(f"{module}.lora_A.weight", down, cut_down))
                found.append(Piece(f"{module}.lora_B.weight", piece.view, cut_up))
        return found

    def _publish(self, temporary: Path, folder: Path) -> None:
        """Complete the folder and give it its name; all ranks have written."""
        on_rank_zero(lambda: self._add_rest(temporary, temporary))
        on_rank_zero(lambda: replace_folder(temporary, folder.absolute()))

    def _add_rest(self, folder: Path, tokenizer_folder: Path) -> None:
        """Add provenance and tokenizer (with generation settings), with this process's modes."""
        if self.provenance is not None:
            _write_json(folder / PROVENANCE, self.provenance)
        source = self.source.tokenizer_folder
        templates = sorted((source / CHAT_TEMPLATES).glob("*.jinja"))
        for path in [*(source / name for name in TOKENIZER_FILES), *templates]:
            if path.is_file():
                copy = tokenizer_folder / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


@contextmanager
def _shared_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `path` that all ranks see; remove it afterwards."""
    folder = on_rank_zero(lambda: new_folder(path.absolute()))
    try:
        yield folder
    finally:
        if torch.distributed.get_rank() == 0:
            remove(folder)


def _without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out user and machine; whole seconds need no extended headers."""
    mtime = int(info.mtime)
    return info.replace(uid=0, gid=0, uname="", gname="", mtime=mtime, deep=False)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # `save_file` would make a file that only its owner can read, and hide errors of the disk.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
