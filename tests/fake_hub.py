"""A local server that answers as the Hugging Face Hub does, for what huggingface_hub asks of it here.

It stands in for these parts of the Hub's HTTP interface, with the headers and bodies that huggingface_hub 1 and 2 read:

- POST /api/repos/create
- POST /api/validate-yaml
- POST /api/models/ID/preupload/REVISION, which says of every file whether it goes as git or as LFS object
- POST /ID.git/info/lfs/objects/batch and PUT of the objects it names (the transfer "basic"; not Xet)
- POST /api/models/ID/commit/REVISION, newline-delimited JSON
- HEAD and GET /ID/resolve/REVISION/PATH, LFS objects by a redirect
- GET /api/models/ID/tree/REVISION, and /api/models/ID

A repository named GATED is gated, in place of STRANGE something else answers, BROKEN cannot be made; a token other than
TOKEN may not write, and what is not there is answered with the Hub's error codes. `huggingface_hub` reads where the Hub
is when it is imported, so its user runs in a process of its own, with `environment(...)`.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_fake_token_that_may_write"
GATED = "someone/gated"
STRANGE = "someone/strange"
BROKEN = "someone/broken"


@dataclass
class FakeHub:
    """What the server holds.

    Attributes:
        url: where it is.
        repositories: id -> the commits of its main branch, each {path: content}.
        stored: LFS objects by their SHA-256.
        private: ids of private repositories.
        asked: every request, "METHOD path".
    """

    url: str = ""
    repositories: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def environment(self, home: Path, token: str = TOKEN) -> dict[str, str]:
        """For a process that takes it for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


@contextmanager
def serving() -> Iterator[FakeHub]:
    """The server, on a free port of this machine."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def commit_id(repo_id: str, number: int) -> str:
    return hashlib.sha1(f"{repo_id} {number}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        path, body = self._asked(), self._body()
        if path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            assert yaml.safe_load(card.split("---")[1])["library_name"] == "dpcache"
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._error(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            if repo_id == BROKEN:
                return self._error(503, "", "Down for maintenance")
            if repo_id in self.hub.repositories:
                return self._json({"url": f"{self.hub.url}/{repo_id}"}, 409)
            if asked.get("visibility") == "private" or asked.get("private"):
                self.hub.private.add(repo_id)
            self.hub.repositories[repo_id] = [{".gitattributes": b"*.safetensors filter=lfs\n"}]
            return self._json({"url": f"{self.hub.url}/{repo_id}"})
        if path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(body)
            assert "basic" in asked["transfers"]
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/objects/{o['oid']}"}}} for o in asked["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        _, _, _, user, name, action, _revision = path.split("/")
        if action == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        assert action == "commit"
        return self._commit(f"{user}/{name}", [json.loads(line) for line in body.splitlines()])

    def _commit(self, repo_id: str, lines: list[dict[str, Any]]) -> None:
        assert lines[0]["key"] == "header" and lines[0]["value"]["summary"]
        files = dict(self.hub.repositories[repo_id][-1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
                assert len(files[value["path"]]) == value["size"]
            else:
                assert line["key"] == "file" and value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
        self.hub.repositories[repo_id].append(files)
        found = commit_id(repo_id, len(self.hub.repositories[repo_id]) - 1)
        self._json({"success": True, "commitOid": found, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{found}"})

    def do_PUT(self) -> None:
        path, body = self._asked(), self._body()
        oid = path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        self._json({})

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def _read(self) -> None:
        path = self._asked()
        parts = path.strip("/").split("/")
        if parts[0] == "objects":
            return self._answer(200, self.hub.stored[parts[1]], {})
        if parts[:2] == ["api", "models"]:
            parts = parts[2:]
        repo_id, (action, revision, *file) = "/".join(parts[:2]), parts[2:] or ["info", "main"]
        if repo_id == STRANGE:
            return self._answer(200, b"<html>Please log in to the network.</html>", {})
        if repo_id == GATED:
            return self._error(403, "GatedRepo", f"Access to model {repo_id} is restricted.")
        allowed = repo_id not in self.hub.private or self.headers.get("authorization") == f"Bearer {TOKEN}"
        if repo_id not in self.hub.repositories or not allowed:
            return self._error(401 if not allowed else 404, "RepoNotFound", "Repository not found")
        commits = self.hub.repositories[repo_id]
        known = {"main": len(commits) - 1, **{commit_id(repo_id, number): number for number in range(len(commits))}}
        if revision not in known:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        number = known[revision]
        commit = {"X-Repo-Commit": commit_id(repo_id, number)}
        if action == "info":
            return self._json({"id": repo_id, "sha": commit["X-Repo-Commit"]})
        if action == "tree":
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in commits[number].items()
            ]
            return self._json(files)
        content = commits[number].get("/".join(file))
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", commit)
        digest = hashlib.sha256(content).hexdigest()
        if digest in self.hub.stored:
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            return self._answer(302, b"", {**commit, **linked, "Location": self._elsewhere(digest)})
        return self._answer(200, content, {**commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _elsewhere(self, digest: str) -> str:
        """Of an object, on what counts as another host: only redirects within the Hub are followed."""
        return f"{self.hub.url.replace('127.0.0.1', 'localhost')}/objects/{digest}"

    def _asked(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        codes = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        self._answer(status, json.dumps({"error": message}).encode(), {**codes, **(headers or {})})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """The test's own output stays clean."""
