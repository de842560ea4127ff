"""Read the safetensors files of a Hugging Face folder a few megabytes at a time."""

from __future__ import annotations

import functools
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nemo_kd.config import ConfigError
from nemo_kd.nemo_archive import MAX_TOKENIZER_BYTES, check_regular_file, read_json

BLOCK_BYTES = 4 << 20
"""Bytes read of mapped files before the mappings are renewed, which frees their pages."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NUMBERED = re.compile(
    r"model\.layers\.(?P<layer>\d{1,9})\.(?:\w+\.experts\.(?P<expert>\d{1,9})\.)?"
)
_ROTARY_BUFFER = ".rotary_emb.inv_freq"
"""Old checkpoints hold the rotary frequencies, which follow from config.json."""


@dataclass(frozen=True)
class ExpertNames:
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
_EXPERT = re.compile(
    r"(?P<layer>.*)\.(?:block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\.(?P<part>\w+)\.weight"
)
_FUSED = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1, "w2": None, "down_proj": None}
"""Half of the fused tensor `gate_up_proj` that is the part; None: the part is in `down_proj`."""


class Place(NamedTuple):
    """Stored tensor of a weight. Fused tensors are [experts, rows, columns].

    Attributes:
        half: 0 or 1: this half of the expert's rows is the weight (gate, up). None: all rows are.
    """

    name: str
    expert: int | None = None
    half: int | None = None


def fused_place(hf_name: str) -> Place | None:
    """Return where transformers 5 keeps an expert's weight in memory; None for other weights."""
    match = _EXPERT.fullmatch(hf_name)
    if match is None:
        return None
    half = _FUSED[match["part"]]
    tensor = "down_proj" if half is None else "gate_up_proj"
    return Place(f"{match['layer']}.mlp.experts.{tensor}", int(match["expert"]), half)


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

    Experts may also lie fused in one tensor a layer, as in the memory of transformers 5.

    Raises:
        ConfigError: the folder has no safetensors, or one of them is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open_files: dict[Path, safe_open] = {}
        self._mapped_bytes = 0
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.exists():
            self.files = {
                name: folder / file for name, file in _weight_map(index).items()
            }
        elif single.exists() or single.is_symlink():
            self.files = dict.fromkeys(_open(single).keys(), single)
        else:
            pickled = sorted(
                path.name
                for pattern in ("*.bin", "*.pt", "*.pth")
                for path in folder.glob(pattern)
            )
            found = (
                f"only {pickled[0]}, a pickle, which can run code when it is loaded"
                if pickled
                else "no weights"
            )
            raise ConfigError(
                f"{folder}: {found}, and no model.safetensors; load the model with transformers "
                "and save it with save_pretrained, which writes safetensors"
            )
        for path in sorted(set(self.files.values())):
            if not path.exists() and not path.is_symlink():
                raise ConfigError(
                    f"{path}: the file is missing, though {index.name} lists it"
                )

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds all tensors without loss."""
        names = {name: self._slice(name).get_dtype() for name in self.files}
        for name, dtype in names.items():
            if dtype not in _DTYPES:
                raise ConfigError(
                    f"{self.files[name]}: {name} has the dtype {dtype}; "
                    f"supported: {', '.join(_DTYPES)}"
                )
        return functools.reduce(
            torch.promote_types, {_DTYPES[dtype] for dtype in names.values()}
        )

    def read(self, name: str, rows: slice, columns: slice | None = None) -> torch.Tensor:
        """Return a part of a weight: a view of the file. Copy and drop it before the next call."""
        if self._mapped_bytes >= BLOCK_BYTES:
            self._open_files.clear()
            self._mapped_bytes = 0
        place = self._place(name)
        stored = self._slice(place.name)
        if place.expert is not None:
            first = (place.half or 0) * self.shape(name)[0]
            rows = slice(first + rows.start, first + rows.stop)
            part = stored[place.expert : place.expert + 1, rows, columns or slice(None)][
                0
            ]
        else:
            part = stored[rows] if columns is None else stored[rows, columns]
        self._mapped_bytes += len(part) * self.row_bytes(name)
        return part

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._place(name)
        stored = tuple(self._slice(place.name).get_shape())
        if place.expert is None:
            return stored
        return (stored[1] if place.half is None else stored[1] // 2, stored[2])

    def row_bytes(self, name: str) -> int:
        """Return the bytes in the file from one row of the weight to the next."""
        dtype = _DTYPES[self._slice(self._place(name).name).get_dtype()]
        return math.prod(self.shape(name)[1:]) * dtype.itemsize

    def num_layers_and_experts(self) -> tuple[int, int]:
        """Return the number of layers in the stored names, and the most experts of a layer."""
        num_layers = 0
        num_experts = 0
        for name in self.files:
            if match := _NUMBERED.match(name):
                num_layers = max(num_layers, 1 + int(match["layer"]))
                num_experts = max(num_experts, 1 + int(match["expert"] or -1))
            if name.endswith(".mlp.experts.down_proj"):
                num_experts = max(num_experts, *self._slice(name).get_shape()[:1], 0)
        return num_layers, num_experts

    def equal(self, first: str, second: str) -> bool:
        """Return True if two stored weights hold the same values; reads both until they differ."""
        if self.shape(first) != self.shape(second):
            return False
        num_rows = self.shape(first)[0]
        block_rows = max(1, BLOCK_BYTES // max(1, self.row_bytes(first)))
        for start in range(0, num_rows, block_rows):
            rows = slice(start, min(start + block_rows, num_rows))
            block = self.read(first, rows).clone()
            if not torch.equal(block.float(), self.read(second, rows).float()):
                return False
        return True

    def check(self, expected: dict[str, tuple[int, ...]], optional: set[str]) -> None:
        """Refuse a folder whose weights are not exactly those of a model; reads the headers only.

        Args:
            expected: name and shape of every weight.
            optional: names of weights that may be there.

        Raises:
            ConfigError: lists the weights that are missing, left over or of another shape.
        """
        stored: dict[str, tuple[int, ...]] = {}
        for name, shape in expected.items():
            place = self._place(name)
            if place.expert is None:
                stored[place.name] = shape
                continue
            num_experts = max(place.expert + 1, *stored.get(place.name, (0,))[:1])
            num_rows = shape[0] if place.half is None else 2 * shape[0]
            stored[place.name] = (num_experts, num_rows, *shape[1:])
        missing = stored.keys() - self.files.keys()
        left_over = {
            name
            for name in self.files.keys() - stored.keys() - optional
            if not name.endswith(_ROTARY_BUFFER)
        }
        problems = [f"missing: {_some(missing)}"] if missing else []
        problems += [f"no place for: {_some(left_over)}"] if left_over else []
        for name in stored.keys() & self.files.keys():
            found = tuple(self._slice(name).get_shape())
            if found != stored[name]:
                problems.append(
                    f"{name} has the shape {found}, config.json calls for {stored[name]}"
                )
        if problems:
            raise ConfigError(
                f"{self.folder}: the weights do not fit config.json: {'; '.join(problems[:5])}"
            )

    def _place(self, name: str) -> Place:
        fused = fused_place(name)
        if fused is not None and fused.name in self.files:
            return fused
        # Beside fused experts the router has another name too.
        router = name.replace(".block_sparse_moe.gate.", ".mlp.gate.")
        return Place(router if router in self.files else name)

    def _slice(self, stored_name: str) -> Any:
        path = self.files[stored_name]
        if path not in self._open_files:
            self._open_files[path] = _open(path)
        try:
            return self._open_files[path].get_slice(stored_name)
        except SafetensorError as error:
            raise ConfigError(
                f"{path}: {stored_name} is missing, though the index lists it there"
            ) from error


def safetensors_parts(paths: Iterable[Path]) -> Iterator[StoredBytes]:
    """Yield the place of every tensor in safetensors files whose headers were checked before."""
    for path in paths:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            label = f"{name} {entry['dtype']} {entry['shape']}"
            yield StoredBytes(label, path.name, 8 + header_bytes + first, end - first)


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of every tensor by its name; all files lie in the folder of the index."""
    weight_map = read_json(index, MAX_TOKENIZER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(
            f"{index}: weight_map is missing, empty or not an object; copy or download it again"
        )
    for name, file in weight_map.items():
        is_name = isinstance(file, str) and Path(file).name == file
        if not is_name or not file.endswith(".safetensors"):
            raise ConfigError(
                f"{index}: weight_map: {name[:100]}: found {str(file)[:100]!r}, "
                "expected the name of a .safetensors file in this folder"
            )
    return weight_map


def _open(path: Path) -> safe_open:
    check_regular_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path}: not a readable safetensors file ({error}); copy or download it again"
        ) from error


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
