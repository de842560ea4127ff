"""Files of models and tokenizers, which may come from anywhere: folders, JSON and .nemo archives.

An archive is read in place. It is a plain tar file of regular files and folders under the names
below. All its headers are checked before any other byte is used. Only the tokenizer's small files
are unpacked.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from nemo_kd.config import ConfigError, UserInputError
from nemo_kd.files import owner_name, remove_abandoned

MODEL_CONFIG = "model_config.yaml"
PROVENANCE = "provenance.json"
WEIGHTS = "model_weights"
TOKENIZER = "tokenizer"
CHAT_TEMPLATES = "additional_chat_templates"
MAX_TOP_FILE_BYTES = 1 << 20
MAX_CONFIG_BYTES = 1 << 24
MAX_TOKENIZER_BYTES = 1 << 28
"""Limit of tokenizer.json; the largest known has 40 MB."""
MAX_ALL_TOKENIZER_BYTES = 1 << 29
MAX_JSON_DEPTH = 64
LFS_POINTER = b"version https://git-lfs"
MAX_MEMBERS = 1 << 16
MAX_PAX_BYTES = 1 << 16
MAX_NAME_LENGTH = 255
BLOCK = tarfile.BLOCKSIZE
KNOWN_NAME = re.compile(
    rf"{MODEL_CONFIG}|{PROVENANCE}|{WEIGHTS}(/[^/]+)?"
    rf"|{TOKENIZER}(/[^/]+)?|{TOKENIZER}/{CHAT_TEMPLATES}/[^/]+"
)


class ArchiveError(ConfigError):
    """A file is not a tar archive, is damaged, or holds files that no archive of a model holds."""


class Files(Protocol):
    """Files of a model by their names relative to its root, with `/` between the parts."""

    root: Path
    sizes: dict[str, int]

    def open(self, name: str, start: int = 0, num_bytes: int | None = None) -> BinaryIO:
        """Open a part of a file, all of it by default.

        Raises:
            OSError: it is missing or unreadable.
        """
        ...


class FolderFiles:
    """The files of a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        found = (path for path in root.rglob("*") if path.is_file())
        self.sizes = {
            path.relative_to(root).as_posix(): path.stat().st_size for path in found
        }

    def open(self, name: str, start: int = 0, num_bytes: int | None = None) -> BinaryIO:
        descriptor = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC)
        length = os.fstat(descriptor).st_size - start if num_bytes is None else num_bytes
        return io.BufferedReader(
            FilePart(descriptor, start, length, owns_descriptor=True)
        )


class Archive(contextlib.AbstractContextManager["Archive"]):
    """The files of a .nemo archive; close it with `close` or a with block.

    The archive stays open. Bytes are read at their offsets through one descriptor, which forked
    processes may share and which a new archive of the same name does not disturb.

    Raises:
        ArchiveError: it is damaged, or not an uncompressed tar file of regular files and folders.
    """

    def __init__(self, path: Path) -> None:
        self.root = path
        self._tokenizer_folder: Path | None = None
        try:
            # Without O_NONBLOCK a pipe of that name would be waited for.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ArchiveError(f"{path} cannot be read ({error.strerror})") from error
        try:
            self.members = _scan(self._descriptor)
        except (tarfile.TarError, OSError, ValueError) as error:
            os.close(self._descriptor)
            raise ArchiveError(
                f"{path} is no readable .nemo archive ({error}); copy or write it again"
            ) from error
        self.sizes = {name: num_bytes for name, (_, num_bytes) in self.members.items()}

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, name: str, start: int = 0, num_bytes: int | None = None) -> BinaryIO:
        if name not in self.members:
            raise FileNotFoundError(f"{self.root} holds no {name}")
        offset, size = self.members[name]
        length = size - start if num_bytes is None else min(num_bytes, size - start)
        return io.BufferedReader(FilePart(self._descriptor, offset + start, length))

    def check_names(self) -> None:
        """Refuse an archive with other files than nemo_kd writes.

        Raises:
            ArchiveError: names the file.
        """
        for name in self.members:
            if not KNOWN_NAME.fullmatch(name):
                problem = (
                    f"no .nemo archive of nemo_kd holds {name!r}; write the archive again"
                )
                raise ArchiveError(f"{self.root}: {problem}")

    def tokenizer_folder(self) -> Path:
        """Return a temporary folder with the tokenizer's files, unpacked again if it is gone.

        Its name holds machine and process, so that the next process on this machine removes what a
        killed one left.

        Raises:
            ArchiveError: the archive has no tokenizer, or one that is larger than any.
        """
        names = [name for name in self.members if name.startswith(f"{TOKENIZER}/")]
        if unknown := [name for name in names if not KNOWN_NAME.fullmatch(name)]:
            problem = f"no tokenizer holds {unknown[0]!r}; write the archive again"
            raise ArchiveError(f"{self.root}: {problem}")
        if not names:
            raise ArchiveError(
                f"{self.root} has no folder {TOKENIZER}/; give the tokenizer's own folder"
            )
        num_bytes = sum(self.sizes[name] for name in names)
        if num_bytes > MAX_ALL_TOKENIZER_BYTES:
            raise ArchiveError(
                f"{self.root}: the tokenizer has {num_bytes:,} bytes, "
                f"more than any ({MAX_ALL_TOKENIZER_BYTES:,})"
            )
        folder = self._tokenizer_folder
        if folder is None or not all((folder / name).is_file() for name in names):
            self._remove_tokenizer()
            self._tokenizer_folder = folder = new_temporary_folder()
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with (folder / name).open("xb") as target, self.open(name) as source:
                    shutil.copyfileobj(source, target)
        return folder / TOKENIZER

    def close(self) -> None:
        """Remove the tokenizer's temporary folder and close the archive."""
        self._remove_tokenizer()
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def _remove_tokenizer(self) -> None:
        if self._tokenizer_folder is not None:
            shutil.rmtree(self._tokenizer_folder, ignore_errors=True)
            self._tokenizer_folder = None


class FilePart(io.RawIOBase):
    """Contiguous bytes of an open file, with a position that forked processes do not share."""

    def __init__(
        self, descriptor: int, offset: int, num_bytes: int, owns_descriptor: bool = False
    ) -> None:
        self.descriptor = descriptor
        self.offset = offset
        self.num_bytes = num_bytes
        self.owns_descriptor = owns_descriptor
        self.position = 0

    def close(self) -> None:
        if self.owns_descriptor and not self.closed:
            os.close(self.descriptor)
        super().close()

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origins = {
            io.SEEK_SET: 0,
            io.SEEK_CUR: self.position,
            io.SEEK_END: self.num_bytes,
        }
        position = offset + origins[whence]
        if position < 0:
            raise ValueError(f"negative position {position}")
        self.position = position
        return position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.num_bytes - self.position))
        data = os.pread(self.descriptor, wanted, self.offset + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@contextlib.contextmanager
def open_tokenizer(source: Path) -> Iterator[Path]:
    """Yield the tokenizer's folder of an archive, an extracted one, or a folder with its files."""
    if source.is_dir() or not source.exists():
        yield source / TOKENIZER if (source / MODEL_CONFIG).is_file() else source
        return
    with Archive(source) as archive:
        yield archive.tokenizer_folder()


def new_temporary_folder() -> Path:
    """Create an empty folder for this user alone; remove those that dead processes left."""
    parent = Path(tempfile.gettempdir()) / f"nemo_kd-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.is_symlink() or parent.stat().st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="nemo_kd-"))  # another user took the name
    remove_abandoned(parent)
    return Path(tempfile.mkdtemp(f".{owner_name()}.tmp", ".tokenizer-", parent))


def _scan(descriptor: int) -> dict[str, tuple[int, int]]:
    """Return offset and size of every file in a tar archive; reads headers only.

    tarfile parses single headers. The walk refuses links, devices, sparse files, GNU's long names
    and nested extensions. Every file lies behind the one before it, inside the archive.
    """
    num_bytes = os.fstat(descriptor).st_size
    members: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()
    position = 0
    extension: dict[str, str] = {}
    while (info := _read_header(descriptor, position, num_bytes)) is not None:
        position += BLOCK
        size = _decimal(extension["size"]) if "size" in extension else info.size
        if size < 0 or position + size > num_bytes:
            raise tarfile.ReadError(
                f"it has {num_bytes:,} bytes, and the header of {info.name!r} tells of more"
            )
        if info.type == tarfile.XHDTYPE:
            if extension or size > MAX_PAX_BYTES:
                raise tarfile.ReadError(
                    f"the extended header at byte {position - BLOCK:,} is too long"
                )
            extension = _pax_records(os.pread(descriptor, size, position))
        else:
            name = _checked_name(extension.get("path", info.name))
            extension = {}
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
                raise tarfile.ReadError(
                    f"{name!r} is neither a regular file nor a folder"
                )
            if name in seen:
                raise tarfile.ReadError(f"it holds {name!r} twice")
            if len(seen) == MAX_MEMBERS:
                raise tarfile.ReadError(f"it holds more than {MAX_MEMBERS:,} files")
            seen.add(name)
            if info.type != tarfile.DIRTYPE:
                members[name] = (position, size)
            elif size:
                raise tarfile.ReadError(f"the folder {name!r} has {size:,} bytes")
        position += -(-size // BLOCK) * BLOCK
    if position == 0:
        raise tarfile.ReadError("it is empty")
    if extension:
        raise tarfile.ReadError("it ends with a header for nothing")
    return members


def _read_header(
    descriptor: int, position: int, num_bytes: int
) -> tarfile.TarInfo | None:
    """Return the header at `position`; None for the mark of the end."""
    block = os.pread(descriptor, BLOCK, position)
    if len(block) < BLOCK:
        plain = "" if position else ", so it is not an uncompressed tar file"
        raise tarfile.ReadError(
            f"it ends after {num_bytes:,} bytes without the mark of its end{plain}"
        )
    if not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except tarfile.HeaderError as error:
        plain = "it is not an uncompressed tar file"
        raise tarfile.ReadError(
            f"{error} at byte {position:,}" if position else plain
        ) from error


def _checked_name(name: str) -> str:
    """Return a member's name without a leading `./`."""
    relative = name.removeprefix("./").rstrip("/") or "."
    parts = relative.split("/")
    is_plain = relative == "." or not {"", ".", ".."} & set(parts)
    if (
        not is_plain
        or len(name) > MAX_NAME_LENGTH
        or not name.isprintable()
        or PurePosixPath(name).is_absolute()
    ):
        raise tarfile.ReadError(
            f"the name {name[:80]!r} leads out of it, or is none that a model's files have"
        )
    return relative


def _pax_records(data: bytes) -> dict[str, str]:
    """Parse `LENGTH KEY=VALUE\\n` records, of which path and size matter here."""
    records: dict[str, str] = {}
    position = 0
    while position < len(data):
        digits, blank, _ = data[position : position + 8].partition(b" ")
        end = position + _decimal(digits.decode("ascii", "replace"))
        key, equals, value = (
            data[position + len(digits) + 1 : end].decode("utf-8").partition("=")
        )
        if (
            not (blank and equals and value.endswith("\n"))
            or end > len(data)
            or key in records
        ):
            raise tarfile.ReadError("an extended header is damaged")
        if key.startswith("GNU.sparse"):
            raise tarfile.ReadError("it holds a sparse file")
        records[key] = value[:-1]
        position = end
    return records


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise tarfile.ReadError(
            f"an extended header tells {text[:20]!r} where a number belongs"
        )
    return int(text)


def read_json(
    path: Path,
    max_bytes: int = MAX_CONFIG_BYTES,
    error_type: type[UserInputError] = ConfigError,
) -> dict[str, Any]:
    """Return the mapping in a JSON file, in time and memory proportional to its length.

    Raises:
        error_type: it is not readable, too large, nested too deeply, or holds no mapping.
    """
    check_regular_file(path, error_type)
    num_bytes = path.stat().st_size
    if num_bytes > max_bytes:
        raise error_type(
            f"{path}: {num_bytes:,} bytes, more than any such file ({max_bytes:,}); restore it"
        )
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise error_type(
            f"{path}: nested too deeply; copy or download it again"
        ) from error
    except ValueError as error:  # a number of more than 4,300 digits too
        raise error_type(
            f"{path}: not valid JSON ({str(error)[:200]}); copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise error_type(
            f"{path}: found a JSON {type(content).__name__}, expected an object; "
            "copy or download it again"
        )
    if _is_deep(content):
        raise error_type(
            f"{path}: nested more than {MAX_JSON_DEPTH} deep; copy or download it again"
        )
    return content


def check_regular_file(
    path: Path, error_type: type[UserInputError] = ConfigError
) -> None:
    """Refuse a path that cannot be read as a file, before anything opens it: opening a pipe blocks.

    Raises:
        error_type: it is missing, a folder, pipe or device, unreadable, or a Git LFS pointer.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
            raise error_type(f"{path}: found {kind}, expected a regular file")
        with path.open("rb") as file:
            start = os.pread(file.fileno(), len(LFS_POINTER), 0)
    except OSError as error:
        reason = error.strerror
        if path.is_symlink() and not path.exists():
            reason = f"a link to {os.readlink(path)}, which does not exist"
        raise error_type(f"{path}: cannot be read ({reason})") from error
    if start == LFS_POINTER:
        raise error_type(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
        )


def _is_deep(value: Any, levels: int = MAX_JSON_DEPTH) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deep(part, levels - 1) for part in inner)
