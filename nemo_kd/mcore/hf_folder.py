"""The safetensors files of a Hugging Face folder, read a few megabytes at a time."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_kd.config import ConfigError
from nemo_kd.mcore.experts import fused_part, fused_router
from nemo_kd.model_files import MAX_TOKENIZER_BYTES, check_regular_file, read_json

BLOCK_BYTES = 4 << 20
"""Files are mapped into memory; what is read is kept by the process until the mapping ends, which it does after so much."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_NUMBERED = re.compile(
    r"model\.layers\.(?P<layer>\d{1,9})\.(?:\w+\.experts\.(?P<expert>\d{1,9})\.)?"
)
_ROTARY_BUFFER = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class _Place:
    """A weight's stored tensor, and where in it the weight lies if experts are fused."""

    name: str
    expert: int | None = None
    half: int | None = None


class SafetensorsFolder:
    """The weights of a Hugging Face folder, by the names under which save_pretrained writes them.

    Experts may also lie fused in one tensor a layer, as in the memory of transformers 5.

    Raises:
        ConfigError: the folder has no safetensors, or one of them is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            self.files = {name: folder / file for name, file in _weight_map(index).items()}
        elif single.exists() or single.is_symlink():
            self.files = dict.fromkeys(_open(single).keys(), single)
        else:
            pickled = sorted(
                path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
            )
            found = (
                f"only {pickled[0]}, a pickle, which can run code when it is loaded"
                if pickled
                else "no weights"
            )
            raise ConfigError(
                f"{folder}: {found}, and no model.safetensors; load the model with transformers and save it with "
                "save_pretrained, which writes safetensors"
            )
        missing = sorted(
            {path for path in self.files.values() if not path.exists() and not path.is_symlink()}
        )
        if missing:
            raise ConfigError(f"{missing[0]}: the file is missing, though {index.name} lists it")
        self._open_files: dict[Path, safe_open] = {}
        self._mapped_bytes = 0

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds all the tensors without loss."""
        names = {name: self._slice(name).get_dtype() for name in self.files}
        for name, dtype in names.items():
            if dtype not in _DTYPES:
                raise ConfigError(
                    f"{self.files[name]}: {name} has the dtype {dtype}; supported: {', '.join(_DTYPES)}"
                )
        return functools.reduce(torch.promote_types, {_DTYPES[dtype] for dtype in names.values()})

    def read(self, name: str, rows: slice, columns: slice | None = None) -> torch.Tensor:
        """A part of a weight: a view of the file, to be copied and dropped before the next call."""
        if self._mapped_bytes >= BLOCK_BYTES:
            self._open_files.clear()
            self._mapped_bytes = 0
        place = self._place(name)
        stored = self._slice(place.name)
        if place.expert is not None:
            first = (place.half or 0) * self.shape(name)[0]
            rows = slice(first + rows.start, first + rows.stop)
            part = stored[place.expert : place.expert + 1, rows, columns or slice(None)][0]
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
        """Bytes in the file from one row of the weight to the next."""
        return (
            math.prod(self.shape(name)[1:])
            * _DTYPES[self._slice(self._place(name).name).get_dtype()].itemsize
        )

    def num_layers_and_experts(self) -> tuple[int, int]:
        """Return how many layers the stored names count, and the most experts of a layer."""
        found = [match for name in self.files if (match := _NUMBERED.match(name))]
        layers = {int(match["layer"]) for match in found}
        experts = {int(match["expert"]) for match in found if match["expert"]}
        fused = [
            self._slice(name).get_shape()[:1]
            for name in self.files
            if name.endswith(".mlp.experts.down_proj")
        ]
        num_experts = max([1 + max(experts, default=-1), *(shape[0] for shape in fused if shape)])
        return 1 + max(layers, default=-1), num_experts

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
        """Refuses a folder whose weights are not exactly those of a model; reads the files' headers only.

        Args:
            expected: name and shape of every weight.
            optional: names of weights that may be there.

        Raises:
            ConfigError: lists what is missing, left over or of another shape.
        """
        stored: dict[str, tuple[int, ...]] = {}
        for name, shape in expected.items():
            place = self._place(name)
            if place.expert is None:
                stored[place.name] = shape
            else:
                num_experts = max(place.expert + 1, *stored.get(place.name, (0,))[:1])
                stored[place.name] = (
                    num_experts,
                    shape[0] if place.half is None else 2 * shape[0],
                    *shape[1:],
                )
        # Old checkpoints hold the rotary frequencies, which follow from config.json.
        left_over = {
            name
            for name in set(self.files) - set(stored) - optional
            if not name.endswith(_ROTARY_BUFFER)
        }
        missing = set(stored) - set(self.files)
        problems = [f"missing: {_some(missing)}"] if missing else []
        problems += [f"no place for: {_some(left_over)}"] if left_over else []
        for name in stored.keys() & self.files.keys():
            if (found := tuple(self._slice(name).get_shape())) != stored[name]:
                problems.append(
                    f"{name} has the shape {found}, config.json calls for {stored[name]}"
                )
        if problems:
            raise ConfigError(
                f"{self.folder}: the weights do not fit config.json: {'; '.join(problems[:5])}"
            )

    def _place(self, name: str) -> _Place:
        fused = fused_part(name)
        if fused is not None and fused.name in self.files:
            return _Place(fused.name, fused.expert, fused.half)
        router = fused_router(name)
        return _Place(router if router in self.files else name)

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


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of every tensor, by its name; all of them lie in the folder of the index."""
    weight_map = read_json(index, MAX_TOKENIZER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(
            f"{index}: weight_map is missing, empty or not an object; copy or download it again"
        )
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ConfigError(
                f"{index}: weight_map: {name[:100]}: found {str(file)[:100]!r}, expected the name of a .safetensors file in "
                "this folder"
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
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
