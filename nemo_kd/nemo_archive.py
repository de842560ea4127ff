"""Files of models and tokenizers, which may come from anywhere: folders, JSON and .nemo archives.

A .nemo archive is an uncompressed tar file. It is read in place; only the tokenizer's small files
are unpacked.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nemo_kd.config import ConfigError
from nemo_kd.files import check_regular_file

MODEL_CONFIG = "model_config.yaml"
PROVENANCE = "provenance.json"
WEIGHTS = "model_weights"
TOKENIZER = "tokenizer"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATES = "additional_chat_templates"


class ModelFiles(contextlib.AbstractContextManager["ModelFiles"]):
    """Files of a model in a folder or in a .nemo archive; a with block closes the archive.

    An archive stays open: a new one of the same name does not disturb the reader.

    Attributes:
        root: path of the folder or archive.
        sizes: bytes of every file by its name relative to the root.

    Raises:
        ConfigError: an archive is damaged, or holds more than regular files and folders.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._close = contextlib.ExitStack()
        self._archive: tarfile.TarFile | None = None
        if root.is_dir():
            self.sizes = {
                path.relative_to(root).as_posix(): path.stat().st_size
                for path in root.rglob("*")
                if path.is_file()
            }
            return
        check_regular_file(root)
        try:
            file = self._close.enter_context(root.open("rb"))
            self._archive = tarfile.TarFile(fileobj=file)
            self._members = {
                member.name.removeprefix("./"): _checked(member)
                for member in self._archive
                if not member.isdir()
            }
            file.seek(self._archive.offset)
            if file.read(1024) != bytes(1024):
                raise tarfile.ReadError("its end is missing")
        except (tarfile.TarError, OSError) as error:
            raise ConfigError(
                f"{root} is no readable .nemo archive ({error}); copy or write it again"
            ) from error
        self.sizes = {name: member.size for name, member in self._members.items()}
        self._unpacked = self._close.enter_context(
            tempfile.TemporaryDirectory(prefix="nemo_kd-")
        )

    def __exit__(self, *_: object) -> None:
        self._close.close()

    def open(self, name: str) -> IO[bytes]:
        """Open a file whose name is in `sizes` for reading."""
        if self._archive is None:
            return (self.root / name).open("rb")
        return tarfile.ExFileObject(self._archive, self._members[name])

    def tokenizer_folder(self) -> Path:
        """Return the folder with the tokenizer's files, unpacked from an archive by every call.

        Raises:
            ConfigError: the archive has no tokenizer.
        """
        if self._archive is None:
            return self.root / TOKENIZER if MODEL_CONFIG in self.sizes else self.root
        members = [
            member
            for name, member in self._members.items()
            if name.startswith(f"{TOKENIZER}/")
        ]
        if not members:
            raise ConfigError(
                f"{self.root} has no folder {TOKENIZER}/; give the tokenizer's own folder"
            )
        # A long run may outlast the first copy: systems delete old temporary files.
        self._archive.extractall(self._unpacked, members, filter="data")
        return Path(self._unpacked) / TOKENIZER


def _checked(member: tarfile.TarInfo) -> tarfile.TarInfo:
    if not member.isreg() or member.issparse():
        raise tarfile.ReadError(f"{member.name!r} is not a regular file")
    # It refuses names that lead out of the archive.
    tarfile.data_filter(member, TOKENIZER)
    return member


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Raises:
        ConfigError: the file is unreadable or holds no mapping.
    """
    check_regular_file(path)
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}, not a mapping")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not valid JSON ({str(error)[:200]}); copy or download it again"
        ) from error
    return content


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
