"""Judge hostile responses in a process with limits of time and memory.

Neither a regular expression nor a power of large integers can be interrupted by an exception:
both run in C code. math-verify's own limit is such an exception, which only the main thread gets.
Here the kernel kills the process at its limit, and the next question starts another one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable

LIMIT_CPU_S = 3.0
"""Of one question. Time of the processor, so that a loaded machine changes no result."""
LIMIT_BYTES = 4 << 30
"""Of address space."""


class LimitedProcess:
    """A process that runs a module which calls `serve`. One thread of one process may ask it."""

    def __init__(self, module: str, *options: str) -> None:
        self._arguments = (module, *options)
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, response: str, answer: str) -> str | None:
        """Return the result for a response and an answer; None if it exceeds the limits."""
        if self._child is None or self._child.poll() is not None:
            self._child = self._start()
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps([response, answer]).encode() + b"\n")
        self._child.stdin.flush()
        reply = self._child.stdout.readline()
        if not reply:  # killed
            self._child.wait()
            return None
        return str(json.loads(reply))

    def _start(self) -> subprocess.Popen[bytes]:
        # Not from the working folder, whose modules would stand in for those of packages.
        paths = [path for path in sys.path if os.path.isabs(path)]
        child = subprocess.Popen(
            [sys.executable, "-m", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            cwd="/",  # `python -m` looks there first
            start_new_session=True,  # Ctrl-C ends the parent, and its pipe ends the child
        )
        assert child.stdout is not None
        if not child.stdout.readline():
            raise RuntimeError(
                f"{' '.join(self._arguments)} ended with status {child.wait()}"
            )
        return child


def serve(judge: Callable[[str, str], str]) -> None:
    """Answer questions on stdin, one line each, until its end."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    _, allowed = resource.getrlimit(resource.RLIMIT_AS)
    if allowed == resource.RLIM_INFINITY or allowed > LIMIT_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies.write(b"ready\n")
    for stream in (sys.stdout, sys.stderr):  # parsers print complaints
        os.dup2(nowhere, stream.fileno())
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, LIMIT_CPU_S)
        reply = judge(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply).encode() + b"\n")
