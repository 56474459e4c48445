"""Being asked to stop: by a scheduler, or by Ctrl-C."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

PREEMPTED = 75  # exit status after SIGTERM: everything is saved, start again (EX_TEMPFAIL of sysexits.h)


class Preempted(Exception):
    """The run was asked to stop, and has saved where it is."""


@contextmanager
def asked_to_stop() -> Iterator[list[bool]]:
    """A flag that SIGTERM, what schedulers send before they take a node away, and the first Ctrl-C set; a second Ctrl-C
    ends at once."""
    asked = [False]

    def ask(number: int, _: Any) -> None:
        asked[0] = True
        if number == signal.SIGINT:
            logger.warning("Asked to stop: the step is finished and saved. Ctrl-C again ends at once.")
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    before: dict[int, Any] = {}
    try:
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            before[number] = signal.signal(number, ask)
    except ValueError:  # not in the main thread: whoever runs it there has to stop it
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """Schedulers send SIGTERM, and terminals Ctrl-C, to every process; workers have to go on until the loop has saved
    where it is."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
