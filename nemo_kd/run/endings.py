"""The end of a command: one `error:` line for what its user can change, and an exit status that tells the cases apart."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import psutil

from nemo_kd.config import UserInputError
from nemo_kd.files import REMEDIES
from nemo_kd.run.interruption import REQUEUE, SIGNALS, Requeue
from nemo_kd.run.ranks import find_ranks
from nemo_kd.run.watchdog import CollectiveError
from nemo_kd.terminal import print_error, print_text, printable

USER_ERROR = 2
"""Exit status when the user's input, or the machine, cannot work; any other failure is 1."""

DEBUG = "HYDRA_FULL_ERROR"
"""Environment variable that shows the traceback of an error that otherwise is one line."""

CHILD_GRACE_S = 5.0
"""Time for a killed child process to be gone."""

NEXT_STEPS = {
    **REMEDIES,
    errno.EMFILE: "too many files are open: raise the limit (`ulimit -n`), or set fewer data workers",
    errno.ENFILE: "the machine has too many files open: end other programs, or set fewer data workers",
    errno.ENOMEM: "the machine is out of memory: end other programs, or make batches smaller",
    errno.EAGAIN: "the machine allows no more processes: raise the limit (`ulimit -u`), or set fewer data workers",
    errno.EADDRINUSE: "another program uses this network port: end it, or set MASTER_PORT to a free one",
    errno.EADDRNOTAVAIL: "the address is not this machine's: check MASTER_ADDR",
    errno.ECONNREFUSED: "nobody answers there: check the address and the network",
    errno.ENETUNREACH: "check the network",
    errno.EHOSTUNREACH: "check the network",
    errno.ETIMEDOUT: "nobody answers there in time: check the address and the network",
    errno.EPIPE: "the program that reads the output has ended",
}

_LIBRARY_OS_ERROR = re.compile(
    r"\(os error (\d+)\)|Os \{ code: (\d+)|\[Errno (\d+)\][^:\n]*(?:: '(?P<path>[^'\n]+)')?"
)
"""Errors of the operating system in the texts of safetensors, tokenizers, torch's distributed checkpoints."""

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
    """End this process, with a message and its status, on errors that a user can do something about.

    Child processes end first, whatever the reason: one that is left would keep stdout open, and whoever reads it waiting.
    Other errors are bugs: they keep their traceback and end with status 1.

    Args:
        at_once: leaves other ranks and threads behind, which may be waiting for this one; for whatever has any.
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
            print_text(f"{requeue}; the same command continues (exit status {REQUEUE})", sys.stderr)
        leave(REQUEUE)
    except SystemExit as leaving:
        end_children()
        if leaving.code is None:  # Lightning's SIGTERMException, which would pass for success
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
            # Rank 0 mostly fails alike; then the launcher ends this process before it repeats the message.
            time.sleep(3)
        print_error(message)
        leave(USER_ERROR)
    end_children()


def user_message(error: BaseException) -> str | None:
    """Return path or key, cause and next step of an error that is not a bug; None for one that is."""
    if isinstance(error, UserInputError):
        return _raised_in_worker(error) or str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _MEMORY.search(str(error))
    ):
        return (
            f"out of memory{_detail(error)}; make batches smaller (model.micro_batch_size, max_tokens_per_batch), spread the "
            "model over more devices (model.tensor_model_parallel_size), or end other programs"
        )
    if isinstance(error, RecursionError):
        return f"something in the input is nested too deeply to be read; {DEBUG}=1 before the command shows where"
    if _KILLED_WORKER.search(str(error)):
        return (
            "a process that reads data ahead was killed, mostly because the machine is out of memory; set fewer of them "
            "(data.num_workers, in stage 2 model.data.num_workers; 0 reads in the main process), or end other programs"
        )
    return _os_message(error)


def _os_message(error: BaseException) -> str | None:
    found = _os_error(error)
    if found is None:
        if isinstance(error, RuntimeError) and _FILE_WRITER.search(str(error)):
            return f"a file cannot be written ({str(error).splitlines()[0]}); most likely the disk is full: free some space"
        return None
    number, path = found
    next_step = NEXT_STEPS.get(number)
    if next_step is None:
        return None
    where = f"{path}: " if path else ""
    return f"{where}{os.strerror(number)}; {next_step}, then run the same command again"


def _os_error(error: BaseException | None) -> tuple[int, str] | None:
    """Return (errno, path) of an error of the operating system, also one that a library passes on as its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            names = [
                os.fsdecode(name)
                for name in (error.filename, error.filename2)
                if isinstance(name, str | bytes)
            ]
            return error.errno, " -> ".join(names)
        matches = list(_LIBRARY_OS_ERROR.finditer(str(error)))
        if matches:
            last = matches[-1]
            return int(last[1] or last[2] or last[3]), last["path"] or ""
        error = error.__cause__
    return None


def _raised_in_worker(error: BaseException) -> str | None:
    """Return the message alone, where a DataLoader put the traceback of its worker before it."""
    text = str(error)
    if not _IN_WORKER.match(text):
        return None
    _, found, said = text.rpartition(f"{type(error).__name__}: ")
    return said.strip() if found else None


def _detail(error: BaseException) -> str:
    text = (_raised_in_worker(error) or str(error)).strip()
    first = re.split(r"\n|\. (?=GPU|Of the)", text)[0][:200]
    return f" ({first})" if first else ""


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))


def _rank() -> int:
    try:
        return find_ranks().rank
    except UserInputError:  # it is this that is to be told
        return 0


def _wait_for_other_ranks() -> None:
    """The first rank that leaves makes launchers end the others, and one of those may be cleaning up."""
    torch: Any = sys.modules.get("torch")
    if (
        torch is not None
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
    ):
        torch.distributed.barrier()


def end_children() -> None:
    """Kill the processes of this one that read data or write files; what they write appears whole or not at all."""
    me = os.getpid()
    for child in multiprocessing.active_children():
        # A forked process also lists those of its parent.
        if (
            child.pid is not None
            and psutil.pid_exists(child.pid)
            and psutil.Process(child.pid).ppid() == me
        ):
            child.kill()
            child.join(CHILD_GRACE_S)
