"""How commands end: one line with cause and next step, status 2, no child left behind; bugs keep their traceback."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_kd.config import ConfigError
from nemo_kd.run.endings import user_message

ROOT = Path(__file__).resolve().parents[2]
WORKER = "Caught {name} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n{said}\n"


def failing(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command that runs `code`."""
    program = "import os, sys, time, errno, multiprocessing\nfrom nemo_kd.run.endings import errors_end_the_process\n"
    program += "with errors_end_the_process():\n" + "".join(
        f"    {line}\n" for line in code.splitlines()
    )
    line = [sys.executable, "-c", program]
    return subprocess.run(
        line,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
        env={"PATH": "", **env},
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "x", "/a/b"),
            "/a/b: No space left on device; the disk is full: free some space, then run",
        ),
        (
            OSError(errno.EDQUOT, "x", "/a/b"),
            "/a/b: Disk quota exceeded; your quota is used up: free some space",
        ),
        (
            OSError(errno.EIO, "x", "/a/b"),
            "/a/b: Input/output error; check the path and its file system",
        ),
        (
            PermissionError(errno.EACCES, "x", "/a/b"),
            "/a/b: Permission denied; give another path, or have its owner",
        ),
        (
            IsADirectoryError(errno.EISDIR, "x", "/a"),
            "/a: Is a directory; check the path and its file system",
        ),
        (
            FileNotFoundError(errno.ENOENT, "x", "/a"),
            "/a: No such file or directory; check the path",
        ),
        (
            OSError(errno.EMFILE, "x", "/a"),
            "/a: Too many open files; raise the limit (`ulimit -n`)",
        ),
        (
            OSError(errno.EADDRINUSE, "x"),
            "Address already in use; check the path and its file system",
        ),
        (
            OSError(
                WORKER.format(
                    name="OSError",
                    said="OSError: [Errno 28] No space left on device: '/c'",
                )
            ),
            "/c: No space",
        ),
        (
            RuntimeError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
            "No space left on",
        ),
        (
            RuntimeError(
                'IoError(Os { code: 28, kind: StorageFull, message: "No space left" })'
            ),
            "No space left on",
        ),
        (
            RuntimeError(
                "PytorchStreamWriter failed writing file data/0: file write failed"
            ),
            "a file cannot be written; most likely",
        ),
        (
            RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. "),
            "a process that reads data ahead was",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 17, 18) exited unexpectedly"),
            "a process that reads data ahead was",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            ),
            "out of memory; make batches smaller",
        ),
        (MemoryError(), "out of memory; make batches smaller"),
        (
            ConfigError(
                WORKER.format(
                    name="ConfigError",
                    said="nemo_kd.config.ConfigError: a:3: bad",
                )
            ),
            "a:3: bad",
        ),
        (ValueError("a bug"), None),
        (OSError("no number"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_of_the_machine_say_what_to_do(error, message):
    found = user_message(error)
    assert found == message if message is None else found.startswith(message)
    assert found is None or "\n" not in found


def test_a_cause_that_a_library_wraps_is_found():
    error = RuntimeError("write failed")
    error.__cause__ = OSError(errno.ENOSPC, "x", "/a")
    assert user_message(error).startswith("/a: No space left on device")


def test_machine_errors_end_with_status_2_and_bugs_with_a_traceback():
    result = failing('open("/no/such/file")')
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert result.stderr.startswith(
        "error: /no/such/file: No such file or directory; check the path"
    )
    result = failing('open("/no/such/file")', HYDRA_FULL_ERROR="1")
    assert (result.returncode, "Traceback" in result.stderr) == (1, True)
    result = failing('raise ValueError("a bug")')
    assert result.returncode == 1
    assert result.stderr.endswith("ValueError: a bug\n")


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("raise KeyboardInterrupt", 130),
        ("try:\n    raise KeyboardInterrupt\nfinally:\n    raise RuntimeError", 130),
        ("open('/no/such')", 2),
        ("raise ValueError", 1),
        ("sys.exit(0)", 0),
        ("pass", 0),
    ],
)
def test_no_child_keeps_stdout_open(end, status):
    code = "import signal\ndef sleep():\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    time.sleep(600)\n"
    started_s = time.monotonic()
    result = failing(
        f"{code}multiprocessing.get_context('fork').Process(target=sleep).start()\n{end}"
    )
    assert (result.returncode, time.monotonic() - started_s < 30) == (status, True), (
        result.stderr
    )


def test_ranks_that_are_done_leave_their_group():
    """Gloo's threads, alive at the end of the interpreter, abort about one run of 25."""
    code = "import atexit\nimport torch.distributed as dist\n"
    code += "dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())\n"
    code += "atexit.register(lambda: print(dist.is_initialized()))"
    result = failing(code)
    assert (result.returncode, result.stdout) == (0, "False\n")
