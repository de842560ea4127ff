"""Files of models and tokenizers, which may come from anywhere: read within bounds, or refused in one line."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from nemo_kd.config import ConfigError, UserInputError

MAX_CONFIG_BYTES = 1 << 24
MAX_TOKENIZER_BYTES = 1 << 28
"""The largest tokenizer.json known has 40 MB."""
MAX_DEPTH = 64
_LFS_POINTER = b"version https://git-lfs"


def read_json(
    path: Path, max_bytes: int = MAX_CONFIG_BYTES, error_type: type[UserInputError] = ConfigError
) -> dict[str, Any]:
    """Return the mapping that a JSON file holds; time and memory are proportional to its length.

    Raises:
        error_type: it is not a readable regular file, is too large, is nested too deeply, or holds no mapping.
    """
    check_regular_file(path, error_type)
    num_bytes = path.stat().st_size
    if num_bytes > max_bytes:
        raise error_type(
            f"{path}: {num_bytes:,} bytes, more than such a file ever has ({max_bytes:,}); restore it"
        )
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror})") from error
    # A number of more than 4,300 digits is a ValueError too.
    except (ValueError, RecursionError) as error:
        reason = (
            "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        )
        raise error_type(f"{path}: not valid JSON ({reason}); copy or download it again") from error
    if not isinstance(content, dict):
        raise error_type(
            f"{path}: found a JSON {type(content).__name__}, expected an object; copy or download it again"
        )
    if _is_deep(content):
        raise error_type(f"{path}: nested more than {MAX_DEPTH} deep; copy or download it again")
    return content


def check_regular_file(path: Path, error_type: type[UserInputError] = ConfigError) -> None:
    """Refuse what cannot be read as a file, before anything opens it: opening a pipe waits for ever.

    Raises:
        error_type: nothing is there, a folder or a device is, it may not be read, or it is a Git LFS pointer.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
            raise error_type(f"{path}: found {kind}, expected a regular file")
        with path.open("rb") as file:
            start = os.pread(file.fileno(), len(_LFS_POINTER), 0)
    except OSError as error:
        is_dangling = path.is_symlink() and not path.exists()
        reason = (
            f"a link to {os.readlink(path)}, which does not exist"
            if is_dangling
            else error.strerror
        )
        raise error_type(f"{path}: cannot be read ({reason})") from error
    if start == _LFS_POINTER:
        raise error_type(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
        )


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            inner += value.values() if isinstance(value, dict) else value
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return False
    return True
