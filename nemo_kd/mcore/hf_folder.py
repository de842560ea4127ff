"""Read the safetensors files of a Hugging Face folder, a weight at a time."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nemo_kd.config import ConfigError
from nemo_kd.nemo_archive import check_regular_file, read_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_ROTARY_BUFFER = ".rotary_emb.inv_freq"
"""Old checkpoints hold the rotary frequencies, which follow from config.json."""


class ExpertNames(NamedTuple):
    """Names inside a layer of a Hugging Face model whose file has a tensor per expert."""

    block: str
    gate: str
    up: str
    down: str

    @property
    def router(self) -> str:
        return f"{self.block}.gate.weight"

    def weight(self, expert: int | str, part: str) -> str:
        return f"{self.block}.experts.{expert}.{part}.weight"


EXPERT_NAMES = {
    "mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ExpertNames("mlp", "gate_proj", "up_proj", "down_proj"),
}


class StoredBytes(NamedTuple):
    """Place of a tensor, or of a part of one, in a file.

    Attributes:
        label: name, dtype and shape.
    """

    label: str
    file: str
    offset: int
    num_bytes: int


class SafetensorsFolder:
    """The weights of a Hugging Face folder, by the names under which save_pretrained writes them.

    Attributes:
        stored: place of every weight by its name.
        shapes: of the weights.
        dtype: the narrowest that holds all weights without loss.

    Raises:
        ConfigError: the folder has no safetensors, or one of them is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored: dict[str, StoredBytes] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        dtypes = set()
        for path in _paths(folder):
            _open(path)  # checks the header
            with path.open("rb") as file:
                (header_bytes,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                dtype = entry["dtype"]
                if dtype not in _DTYPES:
                    raise ConfigError(
                        f"{path}: {name} has the dtype {dtype}; supported: {', '.join(_DTYPES)}"
                    )
                dtypes.add(_DTYPES[dtype])
                first, end = entry["data_offsets"]
                self.stored[name] = StoredBytes(
                    f"{name} {dtype} {entry['shape']}",
                    path.name,
                    8 + header_bytes + first,
                    end - first,
                )
                self.shapes[name] = tuple(entry["shape"])
        self.dtype = functools.reduce(torch.promote_types, dtypes, torch.bool)

    def parts(self) -> Iterable[StoredBytes]:
        """Return the place of every weight."""
        return self.stored.values()

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> torch.Tensor:
        """Return a part of a weight: a view of the file, whose pages stay in memory until then."""
        weight = _open(self.folder / self.stored[name].file).get_slice(name)
        return weight[rows] if columns == slice(None) else weight[rows, columns]

    def are_equal(self, first: str, second: str) -> bool:
        """Return True if two stored weights hold the same values."""
        values = self.read(first)
        return torch.equal(values, self.read(second).to(values.dtype))

    def check(self, expected: dict[str, tuple[int, ...]], optional: set[str]) -> None:
        """Refuse a folder whose weights are not exactly those of a model.

        Args:
            expected: name and shape of every weight.
            optional: names of weights that may be there.

        Raises:
            ConfigError: lists the weights that are missing, left over or of another shape.
        """
        problems = [f"missing: {name}" for name in expected if name not in self.shapes]
        for name, found in self.shapes.items():
            shape = expected.get(name)
            if shape is not None and shape != found:
                problems.append(
                    f"{name} has the shape {found}, config.json calls for {shape}"
                )
            is_known = shape is not None or name in optional
            if not is_known and not name.endswith(_ROTARY_BUFFER):
                problems.append(f"no place for: {name}")
        if problems:
            raise ConfigError(
                f"{self.folder}: the weights do not fit config.json: {'; '.join(problems[:4])}"
            )


def _paths(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(
                f"{index}: weight_map is missing, empty or not an object; "
                "copy or download it again"
            )
        names = {Path(str(file)).name for file in weight_map.values()}
        return [folder / name for name in sorted(names)]
    if single.exists():
        return [single]
    raise ConfigError(
        f"{folder}: no model.safetensors; load the model with transformers and save it with "
        "save_pretrained, which writes safetensors (pickles as in *.bin can run code)"
    )


def _open(path: Path) -> safe_open:
    check_regular_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path}: not a readable safetensors file ({error}); copy or download it again"
        ) from error
