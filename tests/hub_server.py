"""A small Hub on the loopback interface: enough of its protocol for the real client to publish and to download.

Objects are kept in memory. Large files go through the LFS protocol, in parts when they are larger than `part_size`.
`before` is called ahead of every request and may answer it: an HTTP status, "drop" to cut the connection, or None to
go on. "drop-after" carries the request out and cuts the connection instead of answering.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
LARGE = 100_000  # bytes; from here on a file is an LFS object, as every .safetensors file is

Before = Callable[[str, str], "int | str | None"]


@dataclass
class Blob:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {len(self.data)}\n"
            entry["oid"] = Blob(pointer.encode(), False).oid
            entry["lfs"] = {"oid": self.etag, "size": len(self.data), "pointerSize": len(pointer)}
        return entry


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)
    card: dict[str, Any] | None = None

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, Blob]:
        return self.commits[-1][1]

    def commit(self, files: dict[str, Blob]) -> str:
        self.commits.append((hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest(), files))
        return self.head

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub:
    """The state of the server, and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploaded = 0  # bytes that arrived by PUT
        self.part_size = 1 << 40
        self.before: Before | None = None
        self.url = ""

    def create(self, name: str, *, private: bool = False, card: dict[str, Any] | None = None) -> Repo:
        repo = self.repos[name] = Repo(private, card=card)
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return repo

    def count(self, method: str, pattern: str) -> int:
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # answers are several small writes
    hub: Hub
    body: bytes

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append((self.command, path))
        verdict = self.hub.before(self.command, path) if self.hub.before else None
        if verdict == "drop":
            self._cut()
            return
        self.body = self._read_body()
        if isinstance(verdict, int):
            self._send(verdict, {"error": "as the test wants it"})
            return
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                if path.startswith("/api") and not self._known_token():
                    return
                self.silent = verdict == "drop-after"
                action(self, *match.groups())
                if self.silent:
                    self._cut()
                return
        self._send(404, {"error": f"no such page: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815
    silent = False

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, data: Any = b"", **headers: str) -> None:
        if self.silent:
            return
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _known_token(self) -> bool:
        if self._token in (None, TOKEN):
            return True
        message = "Invalid credentials in Authorization header"
        self._send(401, {"error": message}, X_Error_Message=message)
        return False

    def _repo(self, name: str) -> Repo | None:
        """The repository, if the token may see it; otherwise answer as the Hub does."""
        repo = self.hub.repos.get(name)
        if repo is not None and (self._token or not repo.private):
            return repo
        if self._token is None:
            self._send(401, {"error": "Repository not found"})
        else:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return None

    def _commit_of(self, name: str, revision: str) -> tuple[str, dict[str, Blob]] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.at(revision)
        if commit is None:
            self._send(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return commit

    # --- pages -------------------------------------------------------------------------------------------------------

    def harnesses(self) -> None:
        self._send(200, {})

    def whoami(self) -> None:
        if self._token is None:
            self._send(401, {"error": "Invalid username or password."})
        else:
            self._send(200, {"type": "user", "name": "alice", "orgs": []})

    def validate_yaml(self) -> None:
        bad = "license: nonsense" in json.loads(self.body)["content"]
        self._send(400 if bad else 200, {"errors": [{"message": '"license" must be one of'}] if bad else []})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "alice":
            self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif name in self.hub.repos:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        else:
            self.hub.create(name, private=wanted["visibility"] == "private")
            self._send(200, {"url": f"{self.hub.url}/{name}"})

    def info(self, name: str, revision: str | None) -> None:
        commit = self._commit_of(name, revision or "main")
        if commit is not None:
            repo = self.hub.repos[name]
            siblings = [{"rfilename": path} for path in commit[1]]
            data = {"id": name, "sha": commit[0], "private": repo.private, "siblings": siblings, "tags": []}
            self._send(200, data | ({"cardData": repo.card} if repo.card else {}))

    def tree(self, name: str, revision: str) -> None:
        commit = self._commit_of(name, revision)
        if commit is not None:
            self._send(200, [blob.entry(path) for path, blob in commit[1].items()])

    def preupload(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        ignored = repo.files[".gitignore"].data.decode().split() if ".gitignore" in repo.files else []
        answers = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] >= LARGE
            mode, ignore = "lfs" if large else "regular", file["path"] in ignored
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignore})
        self._send(200, {"files": answers})

    def lfs_batch(self, name: str) -> None:
        if self._repo(name) is None:
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                verify = {"href": f"{self.hub.url}/verify"}
                if size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    header = {f"{i + 1}": f"{self.hub.url}/storage/{oid}/{i + 1}" for i in range(count)}
                    header["chunk_size"] = str(self.hub.part_size)
                    upload: dict[str, Any] = {"href": f"{self.hub.url}/complete/{oid}", "header": header}
                else:
                    upload = {"href": f"{self.hub.url}/storage/{oid}"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str, part: str | None) -> None:
        self.hub.uploaded += len(self.body)
        if part is None:
            self._store(oid, self.body)
        else:
            self.hub.parts[oid, int(part)] = self.body
            self._send(200, b"", ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def complete(self, oid: str) -> None:
        data = b""
        for part in json.loads(self.body)["parts"]:
            piece = self.hub.parts.pop((oid, part["partNumber"]))
            assert part["etag"] == f'"{hashlib.md5(piece).hexdigest()}"'
            data += piece
        self._store(oid, data)

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            self._send(400, {"error": "the hash is another"})
        else:
            self.hub.objects[oid] = data
            self._send(200, {})

    def verify(self) -> None:
        wanted = json.loads(self.body)
        found = len(self.hub.objects.get(wanted["oid"], b"")) == wanted["size"]
        self._send(200 if found else 404, {})

    def commit(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0]["value"], dict(repo.files)
        if header.get("parentCommit", repo.head) != repo.head:
            self._send(412, {"error": "The branch has moved"})
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        oid = repo.commit(files)
        self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit_of(name, revision)
        if commit is None:
            return
        blob = commit[1].get(path)
        if blob is None:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit[0])
            return
        headers = {"X_Repo_Commit": commit[0], "ETag": f'"{blob.etag}"', "Accept_Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X_Linked_Etag": f'"{blob.etag}"', "X_Linked_Size": str(len(blob.data))}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            rest = blob.data[int(asked[1]) :]
            headers["Content_Range"] = f"bytes {asked[1]}-{len(blob.data) - 1}/{len(blob.data)}"
            self._send(206, rest, **headers)
        else:
            self._send(200, blob.data, Content_Length=str(len(blob.data)), **headers)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("GET", "/api/agent-harnesses", _Handler.harnesses),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("GET", f"/api/models/{_NAME}(?:/revision/([^/]+))?", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("POST", f"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/storage/(\w+)(?:/(\d+))?", _Handler.put),
    ("POST", r"/complete/(\w+)", _Handler.complete),
    ("POST", "/verify", _Handler.verify),
    ("GET|HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub on a free port of the loopback interface."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
