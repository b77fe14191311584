"""A stand-in for the hub's HTTP API on 127.0.0.1: one revision of models and data sets, served from directories.

It knows what huggingface_hub and datasets ask for: the revision's listing, its tree, the sizes of paths, and files with
ETag, commit and byte ranges. Anything but the pinned revision and its commit is 404, as on the hub.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by "models/ORG/NAME" or "datasets/ORG/NAME"; `requests` records what was asked for."""

    repositories: dict[str, Path]
    revision: str
    endpoint: str = ""
    requests: list[str] = field(default_factory=list)

    def files(self, key: str) -> list[str]:
        root = self.repositories[key]
        return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())

    def knows(self, revision: str) -> bool:
        return unquote(revision) in (self.revision, COMMIT)


@contextmanager
def hub_stand_in(repositories: dict[str, Path], revision: str = "v1.0") -> Iterator[Hub]:
    """Serve repositories at one revision; yields the hub with its `endpoint`."""
    hub = Hub(repositories, revision)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(root: Path, name: str) -> dict:
    path = root / name
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    return {"type": "file", "path": name, "oid": _etag(path), "size": path.stat().st_size}


def _etag(path: Path) -> str:
    content = path.read_bytes()  # as git names a file, which is what the hub says of small ones
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, reply in (
            (r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            (r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", self._paths),
            (r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            match = re.fullmatch(pattern, path)
            if match is None:
                continue
            kind, repository, revision, *rest = match.groups()
            key = f"{kind or 'models'}/{repository}"
            if key not in self.hub.repositories:
                return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if revision is not None and not self.hub.knows(revision):
                return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return reply(key, *rest, query=parse_qs(url.query), body=body)
        return self._send(404, {"error": "Not found"})

    def _info(self, key: str, *, query: dict, body: str) -> None:
        names = self.hub.files(key)
        reply = {
            "id": key.split("/", 1)[1],
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name} for name in names],
        }
        self._send(200, reply)

    def _tree(self, key: str, folder: str | None, *, query: dict, body: str) -> None:
        root = self.hub.repositories[key]
        start = root / (folder or "")
        if not start.is_dir():
            return self._send(404, {"error": "Not found"}, {"X-Error-Code": "EntryNotFound"})
        deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found = sorted(start.rglob("*") if deep else start.iterdir())
        return self._send(200, [_entry(root, file.relative_to(root).as_posix()) for file in found])

    def _paths(self, key: str, *, query: dict, body: str) -> None:
        root = self.hub.repositories[key]
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        self._send(200, [_entry(root, name) for name in paths if (root / name).exists()])

    def _file(self, key: str, name: str, *, query: dict, body: str) -> None:
        path = self.hub.repositories[key] / name
        if not path.is_file():
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not span:
            return self._send(200, data, headers)
        first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(206, data[first : last + 1], headers)

    def _send(self, status: int, reply: object, headers: dict[str, str] | None = None) -> None:
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if reply is data else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
