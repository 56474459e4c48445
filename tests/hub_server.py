"""A small Hub: the part of the Hugging Face Hub's HTTP API that pushing and loading a model needs, and its faults.

It keeps everything in memory, and is as strict as the Hub where it matters: a commit is one step, and is refused when
it names an LFS object that was never uploaded; an uploaded object must hash to its name; a private repo is hidden from
those without a token. LFS files are served from another host than the API, as by the Hub's CDN.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import sys
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_NAMES = re.compile(r".*\.(safetensors|bin|png|jpg)$")
FAULTS = (401, 403, 409, 429, 500, 503, "cut", "lost", "slow")


@dataclass
class File:
    """A file of a commit, as git (its hash is that of a git blob) or LFS (the sha256 of the bytes) names it."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return sha256(self.data) if self.lfs else hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, File]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, File]) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        """The commit of `main` or of a hash."""
        named = [commit for commit in self.commits if revision in ("main", commit.oid)]
        return named[-1] if named else None


@dataclass
class Fault:
    kind: int | str
    times: float
    match: re.Pattern[str]
    seconds: float


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """`with HubServer() as server:` serves `server.endpoint` from a thread.

    `repos` holds what was pushed; `tokens` maps a token to its role (`"write"` or `"read"`); `requests` lists every
    request as (method, path, status or fault).
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens = {"hf_write": "write", "hf_read": "read"}
        self.requests: list[tuple[str, str, int | str]] = []
        self.faults: list[Fault] = []
        self.lock = Lock()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.hub = self  # type: ignore[attr-defined]
        port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}"

    def __enter__(self) -> HubServer:
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, kind: int | str, times: float = 1, match: str = "", seconds: float = 1.0) -> None:
        """Make the next `times` requests whose "METHOD path" matches the regular expression fail.

        Args:
            kind: a status; `"cut"` (the connection breaks in the middle of the request), `"lost"` (the request is
                carried out, its answer never arrives) or `"slow"` (the answer takes `seconds`).
            times: `float("inf")` for every one.
            seconds: the delay of `"slow"`, and the Retry-After of 429.
        """
        if kind not in FAULTS:
            raise ValueError(f"kind must be one of {FAULTS}, got {kind!r}")
        self.faults.append(Fault(kind, times, re.compile(match), seconds))

    def heal(self) -> None:
        """End all faults."""
        self.faults.clear()

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.match.search(line):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """path -> bytes of a commit; empty where there is none."""
        repo = self.repos.get(repo_id)
        commit = repo.at(revision) if repo else None
        return {path: file.data for path, file in commit.files.items()} if commit else {}

    # The API. Each method answers one route of `ROUTES`.

    def whoami(self, request: Request) -> Answer:
        if request.role is None:
            return error(401, "Invalid credentials in Authorization header")
        token = {"displayName": "test", "role": request.role}
        return reply({"type": "user", "name": "someone", "auth": {"type": "access_token", "accessToken": token}})

    def create(self, request: Request) -> Answer:
        if request.role != "write":
            return error(403 if request.role else 401, "You don't have the rights to create a model")
        options = request.json()
        repo_id = f"{options['organization'] or 'someone'}/{options['name']}"
        url = {"url": f"{self.endpoint}/{repo_id}"}
        with self.lock:
            if repo_id in self.repos:
                return reply({"error": "You already created this model repo", **url}, 409)
            self.repos[repo_id] = Repo(private=options.get("visibility") == "private" or bool(options.get("private")))
            attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            self.repos[repo_id].commit("initial commit", {".gitattributes": File(attributes, lfs=False)})
        return reply(url)

    def validate_yaml(self, request: Request) -> Answer:
        header = re.match(r"---\n(.*?)\n---\n", request.json()["content"], re.DOTALL)
        if header is None:
            return reply({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            yaml.safe_load(header[1])
        except yaml.YAMLError as problem:
            return reply({"errors": [{"message": str(problem)}], "warnings": []}, 400)
        return reply({"errors": [], "warnings": []})

    def preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        repo = self.writable(request, repo_id)
        commit = repo.at(unquote(revision)) if isinstance(repo, Repo) else None
        if isinstance(repo, Answer) or commit is None:
            return repo if isinstance(repo, Answer) else error(404, "Invalid rev id", "RevisionNotFound")
        files = []
        for file in request.json()["files"]:
            there = commit.files.get(file["path"])
            mode = "lfs" if LFS_NAMES.match(file["path"]) or file["size"] > 10_000_000 else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            files.append({**entry, "oid": there.oid} if there else entry)
        return reply({"files": files})

    def lfs_batch(self, request: Request, repo_id: str) -> Answer:
        repo = self.writable(request, repo_id)
        if isinstance(repo, Answer):
            return repo
        objects = []
        for item in request.json()["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.objects:
                upload = {"href": f"{self.cdn}/lfs/{item['oid']}?signature=test"}
                verify = {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, oid: str) -> Answer:
        if request.query.get("signature") != ["test"]:
            return error(403, "Request has expired")
        if sha256(request.body) != oid:
            return error(400, f"object {oid} does not match its content")
        self.objects[oid] = request.body
        return reply({})

    def lfs_verify(self, request: Request, repo_id: str) -> Answer:
        repo, item = self.writable(request, repo_id), request.json()
        if isinstance(repo, Answer):
            return repo
        there = item["oid"] in self.objects and len(self.objects[item["oid"]]) == item["size"]
        return reply({}) if there else error(404, "object not found")

    def commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        repo = self.writable(request, repo_id)
        if isinstance(repo, Answer):
            return repo
        lines = [json.loads(line) for line in request.body.splitlines()]
        with self.lock:
            current = repo.at(unquote(revision))
            if current is None:
                return error(404, "Invalid rev id", "RevisionNotFound")
            files, message = dict(current.files), ""
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "header":
                    message = value["summary"]
                    if value.get("parentCommit", current.oid) != current.oid:
                        return error(412, "The branch has moved")
                elif key == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
                elif key == "lfsFile":
                    if len(self.objects.get(value["oid"], b"")) != value["size"] or value["oid"] not in self.objects:
                        return error(400, f"LFS object {value['oid']} of {value['path']} is missing")
                    files[value["path"]] = File(self.objects[value["oid"]], lfs=True)
                elif key == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        return error(404, "A file with this name doesn't exist", "EntryNotFound")
                else:
                    return error(400, f"unknown operation {key!r}")
            made = repo.commit(message, files)
        return reply(
            {"success": True, "commitOid": made.oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{made.oid}"}
        )

    def info(self, request: Request, repo_id: str, revision: str = "main") -> Answer:
        found = self.readable(request, repo_id, unquote(revision))
        if isinstance(found, Answer):
            return found
        siblings = [{"rfilename": path} for path in found.files]
        private = self.repos[repo_id].private
        return reply({"id": repo_id, "sha": found.oid, "private": private, "tags": [], "siblings": siblings})

    def tree(self, request: Request, repo_id: str, revision: str, folder: str = "") -> Answer:
        found = self.readable(request, repo_id, unquote(revision))
        if isinstance(found, Answer):
            return found
        folder = f"{unquote(folder)}/" if folder else ""
        inside = {path: file for path, file in found.files.items() if path.startswith(folder)}
        if folder and not inside:
            return error(404, f"{folder} does not exist", "EntryNotFound")
        entries: list[dict[str, Any]] = []
        for path, file in inside.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
            if file.lfs:
                entry["lfs"] = {"oid": file.oid, "size": len(file.data), "pointerSize": 130}
            entries.append(entry)
        return reply(entries)

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        found = self.readable(request, repo_id, unquote(revision))
        if isinstance(found, Answer):
            return found
        file = found.files.get(unquote(path))
        commit = {"X-Repo-Commit": found.oid}
        if file is None:
            missing = error(404, "Entry not found", "EntryNotFound")
            return Answer(missing.status, missing.body, {**missing.headers, **commit})
        if file.lfs:
            linked = {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.oid}"'}
            return Answer(302, b"", {**commit, **linked, "Location": f"{self.cdn}/cdn/{file.oid}"})
        return Answer(200, file.data, {**commit, "ETag": f'"{file.oid}"'})

    def cdn_get(self, request: Request, oid: str) -> Answer:
        data = self.objects[oid]
        wanted = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if wanted is None:
            return Answer(200, data, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
        first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        return Answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def readable(self, request: Request, repo_id: str, revision: str) -> Commit | Answer:
        """The commit, or why it cannot be read; a private repo looks as if it did not exist."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and request.role is None):
            return error(401 if request.role is None else 404, "Repository not found", "RepoNotFound")
        return repo.at(revision) or error(404, "Invalid rev id", "RevisionNotFound")

    def writable(self, request: Request, repo_id: str) -> Repo | Answer:
        if request.role != "write":
            return error(403 if request.role else 401, "Your token may not write to this repo")
        return self.repos.get(repo_id) or error(404, "Repository not found", "RepoNotFound")


_ID = r"([\w.-]+/[\w.-]+?)"
ROUTES = [
    ("GET", r"/api/whoami-v2", HubServer.whoami),
    ("POST", r"/api/repos/create", HubServer.create),
    ("POST", r"/api/validate-yaml", HubServer.validate_yaml),
    ("POST", rf"/api/models/{_ID}/preupload/([^/]+)", HubServer.preupload),
    ("POST", rf"/api/models/{_ID}/commit/([^/]+)", HubServer.commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/verify", HubServer.lfs_verify),
    ("PUT", r"/lfs/(\w+)", HubServer.lfs_put),
    ("GET", rf"/api/models/{_ID}", HubServer.info),
    ("GET", rf"/api/models/{_ID}/revision/([^/]+)", HubServer.info),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)", HubServer.tree),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)/(.+)", HubServer.tree),
    ("GET", r"/cdn/(\w+)", HubServer.cdn_get),
    ("GET", rf"/{_ID}/resolve/([^/]+)/(.+)", HubServer.resolve),
]


@dataclass
class Request:
    """A request as the API sees it; `role` is that of its token, `None` without a known one."""

    body: bytes
    headers: dict[str, str]
    query: dict[str, list[str]]
    role: str | None

    def json(self) -> Any:
        return json.loads(self.body)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def reply(content: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def error(status: int, message: str, code: str | None = None) -> Answer:
    headers = {
        "Content-Type": "application/json",
        "X-Error-Message": message,
        **({"X-Error-Code": code} if code else {}),
    }
    return Answer(status, json.dumps({"error": message}).encode(), headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no error of the server's."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        fault = hub.take_fault(f"{self.command} {url.path}")
        if fault and fault.kind == "cut":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.cut(hub, url.path, "cut")
        body = self.read_body()
        if fault and fault.kind == "slow":
            time.sleep(fault.seconds)
        if fault and isinstance(fault.kind, int):
            conflict = ": Cannot create repo: another conflicting operation is in progress" if fault.kind == 409 else ""
            answer = error(fault.kind, f"fault {fault.kind}{conflict}")
            if fault.kind == 429:
                answer.headers["Retry-After"] = str(int(fault.seconds))
        else:
            answer = self.answer(hub, url.path, body, parse_qs(url.query))
        if fault and fault.kind == "lost":
            return self.cut(hub, url.path, "lost")
        hub.requests.append((self.command, url.path, answer.status))
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, hub: HubServer, path: str, body: bytes, query: dict[str, list[str]]) -> Answer:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        request = Request(body, dict(self.headers.items()), query, hub.tokens.get(token))
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, handler in ROUTES:
            if route_method == method and (match := re.fullmatch(pattern, path)):
                return handler(hub, request, *match.groups())  # type: ignore[operator]
        return error(404, f"no route for {method} {path}")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def cut(self, hub: HubServer, path: str, kind: str) -> None:
        """Break the connection with a reset, as a failing network does."""
        hub.requests.append((self.command, path, kind))
        self.close_connection = True
        self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Quiet: the requests are in `HubServer.requests`."""
