"""One attempt to push a folder to the Hub, or to ask whether that is possible: a process that reads a job from its
standard input and writes the outcome as its last line. It imports nothing of the package."""

from __future__ import annotations

import fnmatch
import json
import re
import sys
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

RETRIED = (408, 409, 412, 425, 429)  # and everything from 500
OFFLINE = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids all requests"
# Weights of an earlier push that the folder no longer has: left in the repo, transformers could load them instead.
STALE = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# What only a repo of source code holds, such as this project's own, which is a model repo too: a push would put the
# card over its README.md, and the code that travels with a model over its code.
SOURCE = ("setup.cfg", "train/")
LOCAL = "training.json"  # of a stage's folder: names paths of this machine


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `error` is empty when it succeeded, `retry` says whether another one can help, and
    `refused` that this repo must not get the folder."""

    error: str = ""
    retry: bool = False
    refused: bool = False
    wait_s: float = 0.0  # at least so long, says the server
    url: str = ""


class _PassingError(Exception):
    """A request failed in a way that may pass."""

    def __init__(self, message: str, wait_s: float = 0.0):
        super().__init__(message)
        self.wait_s = wait_s


class _RefusedError(ValueError):
    """This repo must not get the folder."""


def _limit_requests(timeout_s: float) -> None:
    """Give huggingface_hub's client a time limit, and no retries of passing errors of its own: those, up to 23 s a
    request, would multiply with ours."""
    client: Any = huggingface_hub.get_session()
    client.timeout = timeout_s
    send = client.send

    def send_once(request: Any, **options: Any) -> Any:
        try:
            response = send(request, **options)
        except OfflineModeIsEnabled:
            raise
        except Exception as error:
            message = f"{request.method} {request.url}: {type(error).__name__} {error}"
            raise _PassingError(message) from error
        if response.status_code >= 500 or response.status_code in (408, 425, 429):
            message = f"{request.method} {request.url}: status {response.status_code}"
            raise _PassingError(message, _seconds_to_wait(response.headers))
        return response

    client.send = send_once


def _run_job(job: dict[str, Any]) -> str:
    """Create the repo and, where the job has a folder, commit it. Returns a URL."""
    _limit_requests(job["timeout_s"])
    api = HfApi(endpoint=job["endpoint"], token=job["token"])
    repo_id = job["repo_id"]
    if "folder" not in job:
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ValueError("the token may only read. Make one that may write: https://huggingface.co/settings/tokens")
    url = api.create_repo(repo_id, private=job["private"] or None, exist_ok=True)
    info = api.model_info(repo_id)
    there = [file.rfilename for file in info.siblings or []]
    _check_repo(repo_id, there, is_public=job["private"] and not info.private)
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


def _check_repo(repo_id: str, there: list[str], is_public: bool) -> None:
    """Raise for a repo that must not get the folder: a public one where a private one was asked for, or source code."""
    if is_public:
        raise _RefusedError(
            f"the repo exists and is public, but a private one was asked for: `hf repos settings {repo_id} --private` "
            "makes it private, or leave out --hub-private"
        )
    if source := next((path for path in there if path.startswith(SOURCE)), None):
        raise _RefusedError(
            f"the repo holds source code ({source}), and a push would overwrite its README.md and its code: name "
            "another repo. One that is not there is created"
        )


def _is_pushed(path: str) -> bool:
    """As `hf upload`: everything but git's and the cache's own folders, and what names paths of this machine."""
    return path != LOCAL and not {".git", ".cache"} & set(path.split("/")[:-1])


def _seconds_to_wait(headers: Any) -> float:
    """From Retry-After (seconds or a date), or the Hub's RateLimit header (`"api";r=0;t=55`). A date is one of the
    server's clock, which the answer tells (`Date`): this machine's may be wrong."""
    value = headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    if value:
        try:
            now = parsedate_to_datetime(headers["Date"]).timestamp() if "Date" in headers else time.time()
            return max(0.0, parsedate_to_datetime(value).timestamp() - now)
        except ValueError:
            return 0.0
    limit = re.search(r"r=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else 0.0


def _verdict(error: BaseException, endpoint: str) -> Outcome:
    """Whether another attempt can help: not where the Hub, or the folder, gives a definite no."""
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
    try:
        outcome = Outcome(url=_run_job(job))
    except Exception as error:
        outcome = _verdict(error, job["endpoint"] or constants.ENDPOINT)
    sys.stdout.write("\n" + json.dumps(vars(outcome)) + "\n")


if __name__ == "__main__":
    _child()
