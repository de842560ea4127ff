"""Errors at the end of a command: one `error:` line for what its user can change, and a status."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from nemo_kd.config.errors import UserInputError
from nemo_kd.files import REMEDIES
from nemo_kd.run.interruption import REQUEUE, SIGNALS, Requeue, end_children
from nemo_kd.run.ranks import find_ranks
from nemo_kd.run.watchdog import CollectiveError
from nemo_kd.terminal import print_error, print_text, printable

USER_ERROR = 2
"""Exit status if the user's input, or the machine, cannot work; any other failure is 1."""

DEBUG = "HYDRA_FULL_ERROR"
"""Environment variable that shows the traceback of an error that otherwise is one line."""

_NETWORK = "check the network"
_NO_ANSWER = "check the address and the network"

NEXT_STEPS = {
    **REMEDIES,
    errno.EMFILE: (
        "too many files are open: raise the limit (`ulimit -n`), or set fewer data workers"
    ),
    errno.ENFILE: (
        "the machine has too many files open: end other programs, or set fewer data workers"
    ),
    errno.ENOMEM: "the machine is out of memory: end other programs, or make batches smaller",
    errno.EAGAIN: (
        "the machine allows no more processes: raise the limit (`ulimit -u`), or set fewer data "
        "workers"
    ),
    errno.EADDRINUSE: (
        "another program uses this network port: end it, or set MASTER_PORT to a free one"
    ),
    errno.EADDRNOTAVAIL: "the address is not this machine's: check MASTER_ADDR",
    errno.ECONNREFUSED: f"nobody answers there: {_NO_ANSWER}",
    errno.ENETUNREACH: _NETWORK,
    errno.EHOSTUNREACH: _NETWORK,
    errno.ETIMEDOUT: f"nobody answers there in time: {_NO_ANSWER}",
    errno.EPIPE: "the program that reads the output has ended",
}

_LIBRARY_OS_ERROR = re.compile(
    r"\(os error (\d+)\)|Os \{ code: (\d+)|\[Errno (\d+)\][^:\n]*(?:: '(?P<path>[^'\n]+)')?"
)
"""Errors of the operating system in texts of safetensors, tokenizers and torch's checkpoints."""

_MEMORY = re.compile(
    r"can't allocate memory|CUDA out of memory|Cannot allocate memory|std::bad_alloc"
)
_FILE_WRITER = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs")
_KILLED_WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ?[\d, ]*\).*(is killed by signal|exited unexpectedly)"
)
_IN_WORKER = re.compile(r"Caught (\w+) in \w+ .*process \d+")


@contextlib.contextmanager
def errors_end_the_process(at_once: bool = True) -> Iterator[None]:
    """End this process with a message and a status on errors that a user can fix.

    Child processes end first: one that is left would keep stdout open, and its reader waiting.
    Other errors are bugs; they keep their traceback and end with status 1.

    Args:
        at_once: leave other ranks and threads behind, which may be waiting for this one.
    """

    def leave(status: int) -> None:
        end_children()
        if not at_once:
            sys.exit(status)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)

    try:
        yield
    except Requeue as requeue:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _wait_for_other_ranks()
        if _rank() == 0:
            print_text(
                f"{requeue}; the same command continues (exit status {REQUEUE})",
                sys.stderr,
            )
        leave(REQUEUE)
    except SystemExit as leaving:
        end_children()
        if (
            leaving.code is None
        ):  # Lightning's SIGTERMException, which would pass for success
            sys.exit(128 + signal.SIGTERM)
        raise
    except KeyboardInterrupt as interrupt:
        if _rank() == 0:
            print_text(f"interrupted {interrupt}".strip(), sys.stderr)
        leave(128 + signal.SIGINT)
    except CollectiveError as error:
        if DEBUG in os.environ:
            raise
        print_error(error)
        time.sleep(1)  # the rank that caused it ends first, and its exit status counts
        leave(1)
    except Exception as error:
        message = user_message(error)
        if message is None or DEBUG in os.environ:
            sys.excepthook = _print_traceback
            end_children()
            raise
        if _rank() != 0:
            # Rank 0 mostly fails too; then the launcher ends this process before it repeats that.
            time.sleep(3)
        print_error(message)
        leave(USER_ERROR)
    end_children()


def user_message(error: BaseException) -> str | None:
    """Return path or key, cause and next step of an error; None for a bug."""
    text = str(error)
    is_runtime_error = isinstance(error, RuntimeError)
    if isinstance(error, UserInputError):
        return _raised_in_worker(error)
    if isinstance(error, MemoryError) or (is_runtime_error and _MEMORY.search(text)):
        first = re.split(r"\n|\. (?=GPU|Of the)", _raised_in_worker(error))[0][:200]
        return (
            f"out of memory{f' ({first})' if first else ''}; make batches smaller "
            "(model.micro_batch_size, max_tokens_per_batch), spread the model over more devices "
            "(model.tensor_model_parallel_size), or end other programs"
        )
    if isinstance(error, RecursionError):
        return (
            "something in the input is nested too deeply to be read; "
            f"{DEBUG}=1 before the command shows where"
        )
    if _KILLED_WORKER.search(text):
        return (
            "a process that reads data ahead was killed, mostly because the machine is out of "
            "memory; set fewer of them (data.num_workers, in stage 2 model.data.num_workers; 0 "
            "reads in the main process), or end other programs"
        )
    found = _os_error(error)
    if found is not None and found[0] in NEXT_STEPS:
        number, path = found
        cause = f"{path}: {os.strerror(number)}" if path else os.strerror(number)
        return f"{cause}; {NEXT_STEPS[number]}, then run the same command again"
    if found is None and is_runtime_error and _FILE_WRITER.search(text):
        return (
            f"a file cannot be written ({text.splitlines()[0]}); most likely the disk is full: "
            "free some space"
        )
    return None


def _os_error(error: BaseException | None) -> tuple[int, str] | None:
    """Return (errno, path) of an error of the operating system, even if a library wraps it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            names = (error.filename, error.filename2)
            path = " -> ".join(
                os.fsdecode(name) for name in names if isinstance(name, str | bytes)
            )
            return error.errno, path
        matches = list(_LIBRARY_OS_ERROR.finditer(str(error)))
        if matches:
            last = matches[-1]
            return int(last[1] or last[2] or last[3]), last["path"] or ""
        error = error.__cause__
    return None


def _raised_in_worker(error: BaseException) -> str:
    """Return the message without the traceback that a DataLoader put before it."""
    text = str(error)
    if _IN_WORKER.match(text):
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return text.strip()


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))


def _rank() -> int:
    try:
        return find_ranks().rank
    except UserInputError:  # the error being reported
        return 0


def _wait_for_other_ranks() -> None:
    """Wait: once a rank leaves, launchers end the others, and one of those may be cleaning up."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.barrier()
