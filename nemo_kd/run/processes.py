"""Processes beside the one that computes: they end with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

ORPHAN_CHECK_S = 0.5
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """Have this process killed when process `parent`, whose main thread started it, ends in whatever way.

    Otherwise it would keep its parent's memory and stdout, and whoever reads that would wait for it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_end_as_orphan, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def _end_as_orphan(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHAN_CHECK_S)
    os._exit(1)
