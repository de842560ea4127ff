"""Functions of a user, named by import path on the command line or in a YAML file of the user."""

from __future__ import annotations

import hashlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any


def import_function(path: str, *arguments: Any, **options: Any) -> Callable[..., Any]:
    """Import the function at a path; modules in the current folder count.

    Args:
        arguments, options: an example of a call, which its signature must accept.

    Raises:
        ValueError: there is none, or it does not take the arguments.
    """
    add_current_folder()
    try:
        function: Callable[..., Any] = pkgutil.resolve_name(path)
        inspect.signature(function).bind(*arguments, **options)
    except (ImportError, AttributeError, SyntaxError, TypeError) as error:
        raise ValueError(str(error)) from error
    return function


def add_current_folder() -> None:
    """Make modules of the current folder importable, behind all others."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def source_fingerprint(function: Callable[..., Any]) -> str:
    """Hash the source of the module that defines a function.

    Raises:
        ValueError: there is no source.
    """
    module = inspect.getmodule(function)
    try:
        source = inspect.getsource(module or function)
    except (OSError, TypeError) as error:
        raise ValueError(f"its source cannot be read: {error}") from error
    return f"sha256:{hashlib.sha256(source.encode()).hexdigest()}"
