"""The files of a stored model: a folder, or a .nemo archive that is read in place.

An archive comes from anywhere. It is a plain tar file of regular files and folders under the names below, nothing else;
all its headers are checked before a byte of it is used. Nothing is unpacked but the small files of the tokenizer.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol

from nemo_kd.config import ConfigError
from nemo_kd.files import remove_abandoned, temporary_path

MODEL_CONFIG = "model_config.yaml"
PROVENANCE = "provenance.json"
WEIGHTS = "model_weights"
TOKENIZER = "tokenizer"
CHAT_TEMPLATES = "additional_chat_templates"
MAX_TOP_FILE_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 1 << 29
"""Of all files of a tokenizer together; the largest known have 40 MB."""
MAX_MEMBERS = 1 << 16
MAX_PAX_BYTES = 1 << 16
MAX_NAME_LENGTH = 255
BLOCK = tarfile.BLOCKSIZE
KNOWN_NAME = re.compile(
    rf"{MODEL_CONFIG}|{PROVENANCE}|{WEIGHTS}(/[^/]+)?|{TOKENIZER}(/[^/]+)?|{TOKENIZER}/{CHAT_TEMPLATES}/[^/]+"
)


class ArchiveError(ConfigError):
    """A file is not a tar archive, is damaged, or holds something that no archive of a model holds."""


class Files(Protocol):
    """Files of a model by their names relative to its root, `/` between the parts."""

    root: Path
    sizes: dict[str, int]

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. Raises OSError where it is missing or unreadable."""
        ...


class FolderFiles:
    """The files of a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        found = (path for path in root.rglob("*") if path.is_file())
        self.sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in found}

    def open(self, name: str) -> BinaryIO:
        return (self.root / name).open("rb")


class Member(NamedTuple):
    """Where in an archive a file's bytes lie."""

    offset: int
    num_bytes: int


class Archive:
    """The files of a .nemo archive; close it with `close` or a with block.

    The archive stays open: bytes are read at their offsets through one descriptor, which forked processes may share and
    which a new archive of the same name does not disturb.

    Raises:
        ArchiveError: it is not an uncompressed tar file of regular files and folders, or is damaged.
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
        self.sizes = {name: member.num_bytes for name, member in self.members.items()}

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, name: str) -> BinaryIO:
        if name not in self.members:
            raise FileNotFoundError(f"{self.root} holds no {name}")
        return io.BufferedReader(FilePart(self._descriptor, *self.members[name]))

    def check_names(self) -> None:
        """Refuse an archive of ours with other files than archives of ours have, or with small files that are large.

        Raises:
            ArchiveError: names the file.
        """
        for name in self.members:
            if not KNOWN_NAME.fullmatch(name):
                raise ArchiveError(
                    f"{self.root}: no .nemo archive of nemo_kd holds {name!r}; write the archive again"
                )
        for name in (MODEL_CONFIG, PROVENANCE):
            if self.sizes.get(name, 0) > MAX_TOP_FILE_BYTES:
                raise ArchiveError(
                    f"{self.root}: {name} has {self.sizes[name]:,} bytes, more than any has ({MAX_TOP_FILE_BYTES:,})"
                )

    def tokenizer_folder(self) -> Path:
        """Return a temporary folder with the tokenizer's files, unpacked again if it was cleaned up meanwhile.

        Its name holds machine and process: what a killed process leaves behind, the next one on this machine removes.

        Raises:
            ArchiveError: the archive has no tokenizer, or one that is larger than any.
        """
        names = [name for name in self.members if name.startswith(f"{TOKENIZER}/")]
        if unknown := [name for name in names if not KNOWN_NAME.fullmatch(name)]:
            raise ArchiveError(
                f"{self.root}: no tokenizer holds {unknown[0]!r}; write the archive again"
            )
        if not names:
            raise ArchiveError(
                f"{self.root} has no folder {TOKENIZER}/; give the tokenizer's own folder"
            )
        num_bytes = sum(self.sizes[name] for name in names)
        if num_bytes > MAX_TOKENIZER_BYTES:
            raise ArchiveError(
                f"{self.root}: the tokenizer has {num_bytes:,} bytes, more than any has ({MAX_TOKENIZER_BYTES:,})"
            )
        folder = self._tokenizer_folder
        if folder is None or not all((folder / name).is_file() for name in names):
            self._remove_tokenizer()
            self._tokenizer_folder = folder = new_temporary_folder()
            for name in names:
                self._write_new(folder / name, name)
        return folder / TOKENIZER

    def _write_new(self, path: Path, name: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        with os.fdopen(descriptor, "wb") as target, self.open(name) as source:
            shutil.copyfileobj(source, target)

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
    """Contiguous bytes of an open file as a file with a position of its own, which forked processes do not share."""

    def __init__(self, descriptor: int, offset: int, num_bytes: int) -> None:
        self.descriptor = descriptor
        self.offset = offset
        self.num_bytes = num_bytes
        self.position = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = (
            offset
            + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.num_bytes}[whence]
        )
        if position < 0:
            raise ValueError(f"negative position {position}")
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

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
    """Yield the folder of the tokenizer that `source` has: an archive, an extracted one, or a folder with its files."""
    if source.is_dir() or not source.exists():
        yield source / TOKENIZER if (source / MODEL_CONFIG).is_file() else source
        return
    with Archive(source) as archive:
        yield archive.tokenizer_folder()


def new_temporary_folder() -> Path:
    """Create an empty folder for this process alone, and remove those that dead processes of this user left."""
    parent = Path(tempfile.gettempdir()) / f"nemo_kd-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.is_symlink() or parent.stat().st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="nemo_kd-"))  # not ours: another user took the name
    remove_abandoned(parent)
    number = len(os.listdir(parent))
    while True:
        folder = temporary_path(parent / f"tokenizer-{number}")
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
        else:
            return folder


def _scan(descriptor: int) -> dict[str, Member]:
    """Return the files of a tar archive by their names; reads headers only.

    tarfile parses single headers. Walking them here bounds what a header can ask for: links, devices, sparse files,
    GNU's long names and nested extensions are refused, and every file lies behind the one before it, inside the archive.
    """
    num_bytes = os.fstat(descriptor).st_size
    members: dict[str, Member] = {}
    seen: set[str] = set()
    position = 0
    extension: dict[str, str] | None = None
    while True:
        block = os.pread(descriptor, BLOCK, position)
        if len(block) < BLOCK:
            plain = "" if position else ", so it is not an uncompressed tar file"
            raise tarfile.ReadError(
                f"it ends after {num_bytes:,} bytes without the mark of its end{plain}"
            )
        if not any(block):
            if extension is not None or position == 0:
                raise tarfile.ReadError(
                    "it ends with a header for nothing" if position else "it is empty"
                )
            return members
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except tarfile.HeaderError as error:
            reason = (
                f"{error} at byte {position:,}"
                if position
                else "it is not an uncompressed tar file"
            )
            raise tarfile.ReadError(reason) from error
        position += BLOCK
        size = info.size
        if extension is not None and "size" in extension:
            size = _decimal(extension["size"])
        if size < 0 or position + size > num_bytes:
            raise tarfile.ReadError(
                f"it has {num_bytes:,} bytes, and the header of {info.name!r} tells of more"
            )
        if info.type == tarfile.XHDTYPE:
            if extension is not None or size > MAX_PAX_BYTES:
                raise tarfile.ReadError(
                    f"the extended header at byte {position - BLOCK:,} is too long"
                )
            extension = _pax_records(os.pread(descriptor, size, position))
        else:
            name = _checked_name((extension or {}).get("path", info.name))
            extension = None
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
                raise tarfile.ReadError(f"{name!r} is neither a regular file nor a folder")
            if name in seen:
                raise tarfile.ReadError(f"it holds {name!r} twice")
            if len(seen) == MAX_MEMBERS:
                raise tarfile.ReadError(f"it holds more than {MAX_MEMBERS:,} files")
            seen.add(name)
            if info.type != tarfile.DIRTYPE:
                members[name] = Member(position, size)
            elif size:
                raise tarfile.ReadError(f"the folder {name!r} has {size:,} bytes")
        position += -(-size // BLOCK) * BLOCK


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
        key, equals, value = data[position + len(digits) + 1 : end].decode("utf-8").partition("=")
        if not (blank and equals and value.endswith("\n")) or end > len(data) or key in records:
            raise tarfile.ReadError("an extended header is damaged")
        if key.startswith("GNU.sparse"):
            raise tarfile.ReadError("it holds a sparse file")
        records[key] = value[:-1]
        position = end
    return records


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise tarfile.ReadError(f"an extended header tells {text[:20]!r} where a number belongs")
    return int(text)
