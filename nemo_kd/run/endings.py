"""Errors at the end of a command: one `error:` line for what its user can change, and a status."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from nemo_kd.config import UserInputError
from nemo_kd.files import print_error, print_text, remedy
from nemo_kd.run.interruption import (
    REQUEUE,
    SIGNALS,
    CollectiveError,
    Requeue,
    end_children,
    ignore,
    is_ctrl_c,
)
from nemo_kd.run.ranks import find_ranks

USER_ERROR = 2
"""Exit status if the user's input, or the machine, cannot work; any other failure is 1."""

DEBUG = "HYDRA_FULL_ERROR"
"""Environment variable that shows the traceback of an error that otherwise is one line."""

NEXT_STEPS = {
    r"^MemoryError$|can't allocate memory|out of memory|Cannot allocate memory|std::bad_alloc": (
        "out of memory; make batches smaller (model.micro_batch_size, max_tokens_per_batch), "
        "spread the model over more devices (model.tensor_model_parallel_size), or end other "
        "programs"
    ),
    r"PytorchStreamWriter failed|unexpected pos \d+ vs": (
        "a file cannot be written; most likely the disk is full: free some space"
    ),
    r"DataLoader worker .*(is killed by signal|exited unexpectedly)": (
        "a process that reads data ahead was killed, mostly because the machine is out of "
        "memory; set fewer of them (data.num_workers, in stage 2 model.data.num_workers; 0 "
        "reads in the main process), or end other programs"
    ),
}
"""Cause and next step by a pattern in torch's RuntimeErrors."""

_LIBRARY_OS_ERROR = re.compile(
    r"(?:\(os error |Os \{ code: |\[Errno )(\d+)(?:\][^:\n]*: '(?P<path>[^'\n]+)')?"
)
"""Errors of the operating system in texts of safetensors, tokenizers and torch's checkpoints."""

_IN_WORKER = re.compile(r"Caught (\w+) in \w+ .*process \d+")


@contextlib.contextmanager
def errors_end_the_process() -> Iterator[None]:
    """End this process with a message and a status on errors that a user can fix.

    Child processes end first: one that is left would keep stdout open, and its reader waiting.
    Other errors are bugs; they keep their traceback and end with status 1.
    """
    try:
        yield
    except Requeue as requeue:
        ignore(SIGNALS)
        if (dist := _process_group()) is not None:
            # Once a rank leaves, launchers end the others, and one of those may be cleaning up.
            dist.barrier()
        if _rank() == 0:
            print_text(
                f"{requeue}; the same command continues (exit status {REQUEUE})",
                sys.stderr,
            )
        _leave(REQUEUE)
    except SystemExit as leaving:
        if leaving.code is None:
            # Lightning's SIGTERMException, which would pass for success
            sys.exit(128 + signal.SIGTERM)
        raise
    except KeyboardInterrupt as interrupt:
        if _rank() == 0:
            print_text(f"interrupted {interrupt}".strip(), sys.stderr)
        _leave(128 + signal.SIGINT)
    except CollectiveError as error:
        print_error(error)
        time.sleep(1)  # the rank that caused it ends first, and its exit status counts
        _leave(1)
    except Exception as error:
        if is_ctrl_c(
            error
        ):  # for example torch's, that a DataLoader's process has ended
            _leave(128 + signal.SIGINT)
        message = user_message(error)
        if message is None or DEBUG in os.environ:
            raise
        if _rank() != 0:
            # Rank 0 mostly fails too; then the launcher ends this process before it repeats that.
            time.sleep(3)
        print_error(message)
        _leave(USER_ERROR)
    else:
        if (dist := _process_group()) is not None:
            # Gloo's threads race with the end of the interpreter and at times abort a run that is done.
            dist.destroy_process_group()
    finally:
        end_children()


def _leave(status: int) -> NoReturn:
    """End this process; leave other ranks and threads behind, which may be waiting for it."""
    if _process_group() is None:
        sys.exit(status)
    end_children()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)


def user_message(error: BaseException) -> str | None:
    """Return path or key, cause and next step of an error; None for a bug."""
    text = str(error).strip() or type(error).__name__
    if _IN_WORKER.match(text):  # a DataLoader puts the worker's traceback before it
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    if isinstance(error, UserInputError):
        return text
    if isinstance(error, RuntimeError | MemoryError):
        for pattern, message in NEXT_STEPS.items():
            if re.search(pattern, text):
                return f"{message} ({text.splitlines()[0][:200]})"
    found = _os_error(error)
    if found is None:
        return None
    place = f"{found.filename}: " if found.filename else ""
    return f"{place}{os.strerror(found.errno or 0)}; {remedy(found)}"


def _os_error(error: BaseException | None) -> OSError | None:
    """Return an error of the operating system, even if a library wraps it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        matches = list(_LIBRARY_OS_ERROR.finditer(str(error)))
        if matches:
            number = int(matches[-1][1])
            return OSError(number, os.strerror(number), matches[-1]["path"])
        error = error.__cause__
    return None


def _rank() -> int:
    try:
        return find_ranks().rank
    except UserInputError:  # the error being reported
        return 0


def _process_group() -> Any:
    """Return torch.distributed if the ranks have joined; it is not imported for this."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        return torch.distributed
    return None
