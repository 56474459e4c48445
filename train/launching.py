"""Starting as many processes as `accelerate launch` was asked for."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

import psutil

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def start_processes(module: str, arguments: Sequence[str]) -> None:
    """Begin a command that `accelerate launch -m` may have started: end when the launcher ends, and become a launcher
    of several processes where so many were asked for and one was started.

    Args:
        module: of the command.
        arguments: of the command.
    """
    launcher = accelerate_launch()
    if launcher:
        end_with_parent()
    if (processes := processes_asked_for(launcher)) > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        os.execv(sys.executable, [sys.executable, *command, "-m", module, *arguments])  # noqa: S606 - none is wanted


def accelerate_launch() -> list[str]:
    """The words of the `accelerate launch` that has started this process; none where another program has."""
    parent = psutil.Process().parent()
    words = [] if parent is None else parent.cmdline()
    return words if any("accelerate" in word for word in words[:4]) else []


def processes_asked_for(launcher: list[str]) -> int:
    """How many processes `accelerate launch --cpu --num_processes n` was asked for: without MPI it starts one, whatever
    n is, and says nothing. 1 where another launcher has done its work."""
    if "WORLD_SIZE" in os.environ or os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        return 1
    pairs = [[*word.split("=", 1), after][:2] for word, after in zip(launcher, [*launcher[1:], ""], strict=True)]
    asked = [value for name, value in pairs if name.replace("-", "_") == "__num_processes" and value.isdigit()]
    return int(asked[0]) if asked else 1


def end_with_parent() -> None:
    """Let the system send SIGTERM when the process that started this one ends: `accelerate launch` with one process
    does not hand on the SIGTERM that it gets, and training would go on without it. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
