"""Pushing checkpoints to the Hub in the background: a push never blocks, ends or corrupts a run.

Each attempt is a process of its own (`push_process.py`) that makes one atomic commit. A process can be stopped, which a
thread that hangs on a connection cannot: it would come back later and put an old checkpoint over a new one.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from . import push_process
from .push_process import LOCAL, OFFLINE, STALE, Outcome

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 900.0
SLOWEST_UPLOAD = 1e6  # bytes a second: what is slower is taken for a connection that hangs
# Runs a file without its folder on sys.path, where `data.py` or `config.py` could hide other modules.
_CHILD = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
# Stands in the command for a push that the repo must not get.
ANOTHER = "OWNER/ANOTHER-NAME"


@dataclass(frozen=True)
class Push:
    """A complete folder on its way to the Hub."""

    folder: Path
    message: str
    temporary: bool


class HubPusher:
    """Pushes folders to `repo_id`, one at a time, from a background thread.

    Args:
        repo_id: `"organisation/name"` or `"user/name"`.
        private: whether the repo is created private; a public one that exists is refused.
        token: the logged-in one (`hf auth login`, HF_TOKEN) where it is not given.
        endpoint: the Hub's address; HF_ENDPOINT or https://huggingface.co where it is not given.
        attempts: attempts a push.
        wait_s: seconds before the second attempt; doubled each time, with jitter, and at least the Retry-After.
        timeout_s: seconds without an answer, or without a byte moving, after which a request has failed. A whole
            attempt may take ten times as long, and a second a megabyte.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        endpoint: str | None = None,
        attempts: int = 5,
        wait_s: float = 2.0,
        timeout_s: float = 60.0,
    ):
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}. Typical value: 5")
        if not wait_s >= 0:
            raise ValueError(f"wait_s must be at least 0, got {wait_s}. Typical value: 2.0")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}. Typical value: 60.0")
        self.repo_id = repo_id
        self.private = private
        self.token = token
        self.endpoint = endpoint
        self.attempts = attempts
        self.wait_s = wait_s
        self.timeout_s = timeout_s
        self._lock = threading.Lock()  # of the five below
        self._thread: threading.Thread | None = None
        self._running: Push | None = None
        self._waiting: Push | None = None
        self._failed: Push | None = None  # the newest that failed, unless a later one succeeded
        self._refused = False  # since the last that succeeded
        self._stopped = threading.Event()

    def check(self) -> None:
        """Ask the Hub whether pushes will be possible, and create the repo. A Hub out of reach is only a warning.

        Raises:
            ValueError: when the answer is no: a bad name, no token or one that may not write, a public repo where a
                private one was asked for, or a repo that holds source code, which pushes would overwrite. It says what
                to do.
        """
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo_id)
        except ValueError as error:
            raise ValueError(f"the Hub does not allow the name {self.repo_id!r}: {error}") from error
        if self.repo_id.count("/") != 1:
            raise ValueError(f"the Hub's repo must be 'organisation/name' or 'user/name', got {self.repo_id!r}")
        outcome = self._attempt(None)
        if not outcome.error:
            logger.info("Pushing to %s.", outcome.url)
        elif outcome.retry or outcome.error == OFFLINE:
            logger.warning(
                "The Hub could not be asked about %s (%s). Training goes on; each push tries again, and what is not "
                "pushed is said at the end.",
                self.repo_id,
                outcome.error,
            )
        else:
            raise ValueError(f"cannot push to {self.repo_id!r}: {outcome.error}")

    def push(self, folder: str | os.PathLike[str], message: str, *, temporary: bool = False) -> None:
        """Hand over a complete folder and return at once. Nothing is raised: errors are logged, `finish` sums them up.

        Args:
            folder: must not change until it is pushed.
            message: of the commit.
            temporary: the folder is a copy made for this push: it is deleted once this or a later push has replaced
                it in the repo, or a later one takes its place in the queue. The newest that failed is kept.
        """
        push = Push(Path(folder).resolve(), message, temporary)
        with self._lock:
            older, self._waiting = self._waiting, push
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hub-pusher", daemon=True)
                try:
                    atexit.unregister(self._at_exit)
                    atexit.register(self._at_exit)
                    self._thread.start()
                except RuntimeError as error:  # no more threads, or the interpreter is ending
                    self._thread = None
                    self._waiting, older, self._failed = None, self._failed, push
                    logger.error("%r was not pushed: %s", message, error)
        if older is not None:
            self._supersede(older, push)

    def finish(self, timeout_s: float | None = None) -> list[str]:
        """Wait for what is under way; after `timeout_s` seconds it is stopped.

        Without a limit this takes as long as the attempts do, each of which is limited.

        Returns:
            The shell commands that push what is not pushed; empty when the newest folder is in the repo.
        """
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
            if thread.is_alive():
                self._stopped.set()
                thread.join()
                self._stopped.clear()
        atexit.unregister(self._at_exit)
        return [] if self._failed is None else [self._command(self._failed)]

    def _at_exit(self) -> None:
        for command in self.finish(timeout_s=0):
            logger.error("Not pushed to %s. This pushes it: %s", self.repo_id, command)

    def _command(self, push: Push) -> str:
        """The shell command that does what `push` would have done. The token is never part of it."""
        settings = []
        if any(os.environ.get(name, "0") not in ("", "0") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
            settings.append("HF_HUB_OFFLINE=0")
        if self.endpoint is not None:
            settings.append(f"HF_ENDPOINT={shlex.quote(self.endpoint)}")
        repo_id = ANOTHER if self._refused else self.repo_id
        command = ["hf", "upload", repo_id, str(push.folder), ".", "--repo-type", "model"]
        command += ["--commit-message", push.message, "--exclude", LOCAL]
        for pattern in STALE:
            command += ["--delete", pattern]
        return " ".join([*settings, shlex.join(command + ["--private"] * self.private)])

    # The background thread

    def _work(self) -> None:
        while True:
            with self._lock:
                self._running, self._waiting = self._waiting, None
                if self._running is None:
                    self._thread = None
                    return
                push = self._running
            outcome = self._attempts(push)
            with self._lock:
                self._running, newer, failed_before = None, self._waiting, self._failed
                if outcome is not None:
                    self._refused = bool(outcome.error) and (self._refused or outcome.refused)
                if outcome is not None and outcome.error and failed_before is not None and not push.folder.is_dir():
                    failed_before = None  # of the two, the older one is all there is: it stays the one to push
                elif outcome is not None:
                    self._failed = push if outcome.error else None
            if outcome is None:
                self._supersede(push, newer)
                continue
            if outcome.error:
                logger.error(
                    "%r was not pushed to %s: %s. It is in %s, this pushes it: %s",
                    *(push.message, self.repo_id, outcome.error, push.folder, self._command(push)),
                )
            else:
                logger.info("Pushed %r: %s", push.message, outcome.url)
                self._discard(push)
            if failed_before is not None:
                self._supersede(failed_before, push)

    def _attempts(self, push: Push) -> Outcome | None:
        """The outcome of the last attempt; `None` when, between two attempts, a newer folder came to be pushed."""
        for attempt in range(1, self.attempts + 1):
            outcome = self._attempt(push)
            if not outcome.error or not outcome.retry or attempt == self.attempts:
                return outcome
            wait_s = self.wait_s * 2 ** (attempt - 1) * random.uniform(1.0, 1.5)  # noqa: S311 - no secret
            wait_s = min(max(wait_s, outcome.wait_s), LONGEST_WAIT_S)
            logger.warning(
                "Attempt %d of %d to push %r failed: %s. The next one is in %.1f s.",
                *(attempt, self.attempts, push.message, outcome.error, wait_s),
            )
            self._stopped.wait(wait_s)
            with self._lock:
                if self._waiting is not None:
                    return None
        raise AssertionError("unreachable: attempts is at least 1")

    def _attempt(self, push: Push | None) -> Outcome:
        """One attempt to push, or without a push only to check."""
        try:
            return self._run_process(push)
        except Exception as error:  # no process, no disk, …: whatever it is, training goes on
            return Outcome(f"{type(error).__name__}: {error}", retry=True)

    def _run_process(self, push: Push | None) -> Outcome:
        """The process of one attempt. It is killed when its time is over, or by `finish`."""
        limit_s = 2 * self.timeout_s
        job = {name: getattr(self, name) for name in ("repo_id", "private", "token", "endpoint", "timeout_s")}
        if push is not None:
            size = sum(file.stat().st_size for file in push.folder.rglob("*") if file.is_file())
            limit_s = 10 * self.timeout_s + size / SLOWEST_UPLOAD
            job |= {"folder": str(push.folder), "message": push.message}
        # Files and no pipes: a worker that the data loader forks meanwhile would keep a pipe open.
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            stdin.write(json.dumps(job).encode())
            stdin.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, push_process.__file__],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,  # Ctrl-C is for the trainer to handle
            )
            end = time.monotonic() + limit_s
            try:
                while process.poll() is None:
                    if self._stopped.wait(0.05):
                        return Outcome("stopped before it was done")
                    if time.monotonic() > end:
                        return Outcome(f"no result after {limit_s:.0f} s", retry=True)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            stdout.seek(0)
            stderr.seek(0)
            lines = stdout.read().decode(errors="replace").splitlines()
            if process.returncode != 0 or not lines:
                end_of_log = stderr.read().decode(errors="replace").strip()[-300:]
                return Outcome(f"the uploading process ended with {process.returncode}: {end_of_log}", retry=True)
            return Outcome(**json.loads(lines[-1]))

    def _supersede(self, older: Push, newer: Push | None) -> None:
        logger.info("%r is not pushed any more, %r takes its place.", older.message, newer and newer.message)
        self._discard(older)

    def _discard(self, push: Push) -> None:
        """Delete a folder that was handed over as temporary and is not needed by another push."""
        with self._lock:
            others = [other.folder for other in (self._running, self._waiting, self._failed) if other is not None]
        if push.temporary and push.folder not in others:
            shutil.rmtree(push.folder, ignore_errors=True)
