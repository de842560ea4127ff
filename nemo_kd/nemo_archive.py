"""Files of models and tokenizers, which may come from anywhere: folders, JSON and .nemo archives.

A .nemo archive is an uncompressed tar file. It is read in place; only the tokenizer's small files
are unpacked.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any

from nemo_kd.config import ConfigError, UserInputError

MODEL_CONFIG = "model_config.yaml"
PROVENANCE = "provenance.json"
WEIGHTS = "model_weights"
TOKENIZER = "tokenizer"
CHAT_TEMPLATES = "additional_chat_templates"
LFS_POINTER = b"version https://git-lfs"


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


def check_regular_file(
    path: Path, error_type: type[UserInputError] = ConfigError
) -> None:
    """Refuse a path that cannot be read as a file; opening a pipe would block.

    Raises:
        error_type: it is missing, not a regular file, unreadable, or a Git LFS pointer.
    """
    try:
        if not path.is_file():
            raise error_type(f"{path}: expected a regular file, found none")
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror})") from error
    if start == LFS_POINTER:
        raise error_type(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
        )
