"""repositories in memory or on the disk -> the part of the Hugging Face Hub that downloads and uploads need.

Large files are redirected to another host name, as the Hub does, and can be cut, slowed, withheld or replaced.
"""

import base64
import contextlib
import hashlib
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import huggingface_hub
import pytest

LARGE = (".safetensors", ".pt", ".msgpack")
CHUNK = 1 << 16


@dataclass
class Request:
    """One line of the log."""

    method: str
    path: str
    start: int | None  # of the range that was asked for
    token: str | None
    host: str


@dataclass
class Repository:
    """Commits, oldest first; the last is `main`."""

    commits: dict[str, dict[str, bytes | Path]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def add(self, files: dict[str, bytes | Path], commit: str | None = None) -> str:
        commit = commit or hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[commit] = files
        return commit

    @property
    def main(self) -> str:
        return list(self.commits)[-1]


class Hub(ThreadingHTTPServer):
    """Serves until closed. What goes wrong is chosen by file name, in these attributes:

    cuts: how many bytes each of the next answers sends before its connection breaks.
    statuses: what the next answers are instead of the file.
    replaced: other content than was announced.
    pause: seconds after each 64 KiB.
    page: what is answered to everything, as the gate of a hotel's network does.
    has_ranges: whether an answer can begin elsewhere than at 0.
    """

    daemon_threads = True

    def __init__(self, token: str = "hf_secret"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.repos: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.uploads: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = {}
        self.statuses: dict[str, list[int]] = {}
        self.replaced: dict[str, bytes] = {}
        self.pause = 0.0
        self.has_ranges = True
        self.page: bytes | None = None
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def put(self, repo: str, files: dict[str, bytes | Path] | Path, commit: str | None = None) -> str:
        """Add a commit, of these files or of those in a folder; returns it."""
        if isinstance(files, Path):
            files = {path.name: path for path in files.iterdir()}
        return self.repos.setdefault(repo, Repository()).add(files, commit)

    def fetched(self, name: str) -> list[Request]:
        """Requests of one file, at the host that sends it."""
        return [
            request for request in self.requests if request.path.endswith(f"/{name}") and request.host != "redirect"
        ]


@contextlib.contextmanager
def serving(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The only Hub that this process, and those that it starts, can reach, with an empty cache in `folder`."""
    server = Hub()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        patch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        patch.setenv(name, "127.0.0.1,localhost")
    patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no token"))
    patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    patch.setenv("HF_ENDPOINT", server.endpoint)
    patch.setenv("DALLE_DEMO_CACHE", str(folder / "cache"))
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def size_of(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def hash_of(content: bytes | Path, blob: bool = False) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size_of(content)) if blob else hashlib.sha256()
    with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as source:
        while chunk := source.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers for one connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body=b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": f"{code} hf_secret"}, X_Error_Code=code, X_Error_Message=f"{code} hf_secret")

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        self.start = int(found[1]) if found else None
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.known = token == self.server.token
        host = "redirect" if "/resolve/" in path and path.endswith(LARGE) else (self.headers.get("Host") or "")
        self.server.requests.append(Request(self.command, path, self.start, token, host.split(":")[0]))
        if self.server.page is not None:
            return self.answer(200, self.server.page)
        for pattern, action in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return action(self, *match.groups())
        return self.refuse(404, "Unknown")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def repository(self, name: str) -> Repository | None:
        """Repository that may be read; answers what the Hub does when there is none."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.known):
            self.refuse(404 if self.known else 401, "RepoNotFound")
            return None
        return repo

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self.repository(name)
        if repo is None:
            return None
        commit = repo.main if revision in (None, "main") else revision
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound")
        siblings = []
        for path, content in repo.commits[commit].items():
            size = size_of(content)
            sibling = {"rfilename": path, "size": size}
            if path.endswith(LARGE):  # in git there is a pointer to the file
                sha256 = hash_of(content)
                sibling |= {"blobId": hash_of(sha256.encode(), blob=True)}
                sibling |= {"lfs": {"sha256": sha256, "size": size, "pointerSize": 130}}
            else:
                sibling |= {"blobId": hash_of(content, blob=True)}
            siblings.append(sibling)
        return self.answer(200, {"id": name, "sha": commit, "private": repo.private, "siblings": siblings})

    def resolve(self, name: str, commit: str, path: str) -> None:
        repo = self.repository(name)
        if repo is None:
            return None
        if repo.gated and not self.known:
            return self.refuse(401, "GatedRepo")
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound")
        if path not in repo.commits[commit]:
            return self.refuse(404, "EntryNotFound")
        if path.endswith(LARGE):
            location = f"http://localhost:{self.server.server_address[1]}/cdn/{name}/{commit}/{quote(path)}?signature=hf_secret"
            return self.answer(302, Location=location)
        return self.send_file(path, repo.commits[commit][path])

    def cdn(self, name: str, commit: str, path: str) -> None:
        self.send_file(path, self.server.repos[name].commits[commit][path])

    def send_file(self, path: str, content: bytes | Path) -> None:
        if status := next(iter(self.server.statuses.get(path, [])), None):
            self.server.statuses[path].pop(0)
            return self.refuse(status, "Injected")
        if not self.server.has_ranges:
            self.start = None
        content = self.server.replaced.get(path, content)
        size, start = size_of(content), self.start or 0
        if self.start is not None and start >= size:
            return self.refuse(416, "Range")
        cut = self.server.cuts.get(path, [])
        end = min(size, start + cut.pop(0)) if cut else size
        self.send_response(206 if self.start is not None else 200)
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that left
            self.send_bytes(content, start, end)
        if end < size:
            self.close_connection = True
            self.wfile.flush()
        return None

    def send_bytes(self, content: bytes | Path, start: int, end: int) -> None:
        with content.open("rb") if isinstance(content, Path) else memoryview(content) as source:
            for at in range(start, end, CHUNK):
                length = min(CHUNK, end - at)
                if isinstance(content, Path):
                    source.seek(at)
                    self.wfile.write(source.read(length))
                else:
                    self.wfile.write(source[at : at + length])
                time.sleep(self.server.pause)

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if not self.known:
            return self.refuse(401, "Unauthorized")
        if not name.startswith("tester/"):
            return self.refuse(403, "Forbidden")
        if name in self.server.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.server.endpoint}/{name}"})
        self.server.repos[name] = Repository(private=wanted.get("visibility") == "private")
        self.server.repos[name].add({})
        return self.answer(200, {"url": f"{self.server.endpoint}/{name}", "name": name})

    def preupload(self, name: str) -> None:
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})

    def batch(self, name: str) -> None:
        objects = [
            thing | {"actions": {"upload": {"href": f"{self.server.endpoint}/upload/{thing['oid']}"}}}
            for thing in json.loads(self.body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def take(self, oid: str) -> None:
        self.server.uploads[oid] = self.body
        self.answer(200)

    def commit(self, name: str) -> None:
        repo = self.server.repos[name]
        files = dict(repo.commits[repo.main])
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.uploads[entry["value"]["oid"]]
        commit = repo.add(files)
        url = f"{self.server.endpoint}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


NAME = "([^/]+/[^/]+)"
ROUTES = {
    "/api/repos/create": Handler.create,
    "/api/validate-yaml": lambda handler: handler.answer(200, {"errors": [], "warnings": []}),
    f"/api/models/{NAME}": Handler.info,
    f"/api/models/{NAME}/revision/([^/]+)": Handler.info,
    f"/api/models/{NAME}/preupload/main": Handler.preupload,
    f"/api/models/{NAME}/commit/main": Handler.commit,
    f"/{NAME}.git/info/lfs/objects/batch": Handler.batch,
    "/upload/([^/]+)": Handler.take,
    f"/{NAME}/resolve/([^/]+)/(.+)": Handler.resolve,
    f"/cdn/{NAME}/([^/]+)/(.+)": Handler.cdn,
}
