"""Pushing checkpoints to the Hub in the background: a push never blocks, ends or corrupts a run.

Each attempt is a process of its own that makes one atomic commit. A process can be stopped, which a thread that hangs
on a connection cannot: it would come back later and put an old checkpoint over a new one. The process runs this very
file, and imports nothing but `huggingface_hub`.
"""

from __future__ import annotations

import atexit
import fnmatch
import json
import logging
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

RETRIED = (408, 409, 412, 425, 429)  # and everything from 500
OFFLINE = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids all requests"
LONGEST_WAIT_S = 900.0
SLOWEST_UPLOAD = 1e6  # bytes a second: what is slower is taken for a connection that hangs
# Weights of an earlier push that the folder no longer has: left in the repo, transformers could load them instead.
STALE = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# What only a repo of source code holds, such as this project's own, which is a model repo too: a push would put the
# card over its README.md, and the code that travels with a model over its code.
SOURCE = ("setup.cfg", "train/")
LOCAL = "training.json"  # of a stage's folder: names paths of this machine
# Stands in the command for a push that the repo must not get.
ANOTHER = "OWNER/ANOTHER-NAME"
# Runs this file without its folder on sys.path, where `data.py` or `config.py` could hide other modules.
_CHILD = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"


@dataclass(frozen=True)
class Push:
    """A complete folder on its way to the Hub."""

    folder: Path
    message: str
    temporary: bool


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `error` is empty when it succeeded, `retry` says whether another one can help, and
    `refused` that this repo must not get the folder."""

    error: str = ""
    retry: bool = False
    refused: bool = False
    wait_s: float = 0.0  # at least so long, says the server
    url: str = ""


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
            wait_s = self.wait_s * 2 ** (attempt - 1) * random.uniform(1.0, 1.5)
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
                [sys.executable, "-c", _CHILD, __file__],
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


# The process of one attempt


class _PassingError(Exception):
    """A request failed in a way that may pass."""

    def __init__(self, message: str, wait_s: float = 0.0):
        super().__init__(message)
        self.wait_s = wait_s


class _RefusedError(ValueError):
    """This repo must not get the folder."""


def _run_job(job: dict[str, Any]) -> str:
    """Create the repo and, where the job has a folder, commit it. Returns a URL."""
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils._http import default_client_factory

    def client() -> Any:
        """huggingface_hub's client with a time limit, and without its own retries of passing errors: those, up to
        23 s a request, would multiply with ours."""
        made: Any = default_client_factory()
        made.timeout = job["timeout_s"]
        send = made.send

        def send_once(request: Any, **options: Any) -> Any:
            try:
                response = send(request, **options)
            except huggingface_hub.errors.OfflineModeIsEnabled:
                raise
            except Exception as error:
                message = f"{request.method} {request.url}: {type(error).__name__} {error}"
                raise _PassingError(message) from error
            if response.status_code >= 500 or response.status_code in (408, 425, 429):
                message = f"{request.method} {request.url}: status {response.status_code}"
                raise _PassingError(message, _seconds_to_wait(response.headers))
            return response

        made.send = send_once
        return made

    huggingface_hub.set_client_factory(client)
    api = HfApi(endpoint=job["endpoint"], token=job["token"])
    repo_id = job["repo_id"]
    if "folder" not in job:
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ValueError("the token may only read. Make one that may write: https://huggingface.co/settings/tokens")
    url = api.create_repo(repo_id, private=job["private"] or None, exist_ok=True)
    info = api.model_info(repo_id)
    if job["private"] and not info.private:
        raise _RefusedError(
            f"the repo exists and is public, but a private one was asked for: `hf repos settings {repo_id} --private` "
            "makes it private, or leave out --hub-private"
        )
    there = [file.rfilename for file in info.siblings or []]
    if source := next((path for path in there if path.startswith(SOURCE)), None):
        raise _RefusedError(
            f"the repo holds source code ({source}), and a push would overwrite its README.md and its code: name "
            "another repo. One that is not there is created"
        )
    if "folder" not in job:
        return str(url)

    folder = Path(job["folder"])
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there")
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    # Not `upload_folder`: with hf_xet it may split a folder into several commits, and a repo between them is broken.
    operations: list[Any] = [CommitOperationAdd(path, file) for path, file in files.items() if _is_pushed(path)]
    for path in there:
        if path not in files and any(fnmatch.fnmatchcase(path, pattern) for pattern in STALE):
            operations.append(CommitOperationDelete(path))
    # The parent: a commit of an attempt that was given up, and that the Hub carries out late, is refused.
    commit = api.create_commit(repo_id, operations, commit_message=job["message"], parent_commit=info.sha)
    return commit.commit_url


def _is_pushed(path: str) -> bool:
    """As `hf upload`: everything but git's and the cache's own folders, and what names paths of this machine."""
    return path != LOCAL and not {".git", ".cache"} & set(path.split("/")[:-1])


def _seconds_to_wait(headers: Any) -> float:
    """From Retry-After (seconds or a date), or the Hub's RateLimit header (`"api";r=0;t=55`)."""
    value = headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return 0.0
    limit = re.search(r"r=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else 0.0


def _verdict(error: BaseException, endpoint: str) -> Outcome:
    """Whether another attempt can help: not where the Hub, or the folder, gives a definite no."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, _RefusedError):
        return Outcome(_one_line(error), refused=True)
    cause: BaseException | None = error
    while cause is not None:  # the client wraps what happened in an LFS upload
        message = _one_line(error) if cause is error else f"{_one_line(error)} {_one_line(cause)}"
        if isinstance(cause, _PassingError):
            return Outcome(message, retry=True, wait_s=cause.wait_s)
        if isinstance(cause, OfflineModeIsEnabled):
            return Outcome(OFFLINE)
        if isinstance(cause, LocalTokenNotFoundError):
            return Outcome("no token: run `hf auth login`, or set HF_TOKEN to one that may write")
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if not str(cause.response.url).startswith(endpoint):  # the storage's, of a signed address: ask for another
                return Outcome(message, retry=True)
            advice = {
                401: "The token is missing or not valid: `hf auth login`, or set HF_TOKEN. ",
                403: "The token may not write there: make one that may at https://huggingface.co/settings/tokens. ",
            }
            return Outcome(advice.get(status, "") + message, retry=status in RETRIED or status >= 500)
        cause = cause.__cause__
    definite = isinstance(error, (ValueError, FileNotFoundError)) and not isinstance(error, json.JSONDecodeError)
    return Outcome(f"{type(error).__name__}: {_one_line(error)}", retry=not definite)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _child() -> None:
    job = json.load(sys.stdin)
    from huggingface_hub import constants

    try:
        outcome = Outcome(url=_run_job(job))
    except Exception as error:
        outcome = _verdict(error, job["endpoint"] or constants.ENDPOINT)
    sys.stdout.write("\n" + json.dumps(vars(outcome)) + "\n")


if __name__ == "__main__":
    _child()
