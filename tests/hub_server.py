"""A Hub in memory, on this machine: the endpoints that huggingface_hub 2.4 calls for what Medley does, with hashes and sizes checked, and faults on request.

No Xet: clients are to set HF_HUB_DISABLE_XET. What is asked beyond these endpoints is answered 404, and kept in `strange`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

TOKEN = "hf_thisIsASecretThatNobodyMayWriteDown"
USER = "user"


@dataclass
class Fault:
    """What goes wrong with the next requests that match."""

    pattern: str
    """Of `METHOD /path`."""
    status: int = 0
    """What is answered; 0 is nothing: the connection is closed in the middle of the body."""
    times: int = 1
    seconds: float = 0.0
    """Waited before; with status -1 then answered as if nothing was."""


@dataclass
class Repo:
    """A repository: commits are trees of path to content."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    """SHA-256 of what is kept as a large file."""
    messages: dict[str, list[str]] = field(default_factory=dict)
    """Of each branch, oldest first."""

    def commit(self, branch: str, tree: dict[str, bytes], message: str) -> str:
        """Put a tree on a branch."""
        name = hashlib.sha1(json.dumps([branch, message, len(self.commits), sorted(tree)]).encode()).hexdigest()
        self.commits[name] = tree
        self.branches[branch] = name
        self.messages.setdefault(branch, []).append(message)
        return name

    def tree(self, revision: str) -> dict[str, bytes] | None:
        """What a branch or a commit holds."""
        return self.commits.get(self.branches.get(revision, revision))


class HubServer:
    """The Hub; `url` is what HF_ENDPOINT is set to."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.calls: list[str] = []
        self.agents: set[str] = set()
        self.strange: list[str] = []
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Be away."""
        self._server.shutdown()
        self._server.server_close()

    def made(self, name: str, *, private: bool) -> Repo:
        """Make a repository as the Hub does: with a first commit."""
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return repo

    def fail(self, pattern: str, status: int = 0, times: int = 1, seconds: float = 0.0) -> None:
        """Have the next requests that match go wrong."""
        self.faults.append(Fault(pattern, status, times, seconds))

    def called(self, pattern: str) -> list[str]:
        """The requests that match."""
        return [call for call in self.calls if re.search(pattern, call)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A Hub, for as long as the block lasts."""
    server = HubServer()
    try:
        yield server
    finally:
        server.close()


def blob_hash(content: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        server_hub = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, content: object = None, headers: dict[str, str] | None = None, body: bytes | None = None) -> None:
        payload = body if body is not None else json.dumps({} if content is None else content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("Content-Type", "application/json" if body is None else "application/octet-stream")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        said = message or code or "refused"
        self._answer(status, {"error": said}, {"X-Error-Message": said, **({"X-Error-Code": code} if code else {})})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _any(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        call = f"{self.command} {path}"
        with hub.lock:
            hub.calls.append(call)
            hub.agents.add(self.headers.get("User-Agent", ""))
            fault = next((fault for fault in hub.faults if fault.times and re.search(fault.pattern, call)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None:
            time.sleep(fault.seconds)
            if fault.status == 0:
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                self.close_connection = True
                self.connection.close()
                return
            if fault.status > 0:
                self._body()
                self._refuse(fault.status, message=f"{fault.status} on request, for {self.headers.get('Authorization', '')}")
                return
        body = self._body()
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not is_known:
            self._refuse(401, message="Invalid credentials in Authorization header")
            return
        with hub.lock:
            for pattern, answer in _ROUTES.items():
                if found := re.fullmatch(pattern, call):
                    if "repo" in found.groupdict() and not self._may_see(found["repo"], is_known):
                        self._refuse(404 if is_known else 401, "RepoNotFound", "Repository not found")
                        return
                    if self.command == "POST" and not is_known:  # a place to PUT to is signed
                        self._refuse(401, message="a token is needed")
                        return
                    answer(self, body, **found.groupdict())
                    return
            hub.strange.append(call)
        self._refuse(404, message="no such endpoint here")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any

    def _may_see(self, name: str, is_known: bool) -> bool:
        repo = self.server_hub.repos.get(name)
        return repo is not None and (is_known or not repo.private)

    def _repo(self, name: str) -> Repo:
        return self.server_hub.repos[name]

    # --- endpoints -----------------------------------------------------------------------------------------------------------------------

    def _whoami(self, body: bytes) -> None:
        self._answer(200, {"name": USER, "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != USER:
            self._refuse(403, message="You don't have the rights to create a model under this namespace")
        elif name in self.server_hub.repos:
            self._refuse(409, message="You already created this model repo")
        else:
            self.server_hub.made(name, private=asked.get("visibility") == "private")
            self._answer(200, {"url": f"{self.server_hub.url}/{name}", "name": name, "id": name})

    def _validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        try:
            head = YAML(typ="safe").load(content.split("---\n")[1])
        except (IndexError, YAMLError) as error:
            self._answer(400, {"errors": [{"message": f"no metadata: {error}"}], "warnings": []})
            return
        errors = [{"message": f"{name} has to be a text"} for name in ("license", "pipeline_tag", "library_name") if not isinstance(head.get(name), str)]
        if "base_model" in head and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(head["base_model"])):
            errors.append({"message": "base_model has to be a model id"})
        if not isinstance(head.get("tags"), list):
            errors.append({"message": "tags has to be a list"})
        if not all(isinstance(entry, dict) and isinstance(entry.get("text"), str) for entry in head.get("widget", [])):
            errors.append({"message": "widget has to be a list of examples"})
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        of = self._repo(repo)
        if (tree := of.tree(revision)) is None:
            self._refuse(404, "RevisionNotFound")
            return
        siblings = [{"rfilename": name} for name in tree]
        self._answer(200, {"_id": "1", "id": repo, "modelId": repo, "private": of.private, "sha": of.branches.get(revision, revision), "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def _auth_check(self, body: bytes, repo: str, write: str | None = None) -> None:
        if repo.split("/")[0] != USER:
            self._refuse(403, message="no write access")
        else:
            self._answer(200)

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        if (tree := self._repo(repo).tree(revision)) is None:
            self._refuse(404, "RevisionNotFound")
            return
        files = []
        for asked in json.loads(body)["files"]:
            content = tree.get(asked["path"])
            is_large = asked["path"].endswith((".safetensors", ".png"))
            known = {} if content is None else {"oid": hashlib.sha256(content).hexdigest() if is_large else blob_hash(content)}
            files.append({"path": asked["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, **known})
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            entry: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server_hub.objects:
                place = f"{self.server_hub.url}/objects/{asked['oid']}"
                entry["actions"] = {"upload": {"href": f"{place}?signature=secret"}, "verify": {"href": f"{place}/verify"}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._refuse(400, message="the hash differs")
        else:
            self.server_hub.objects[oid] = body
            self._answer(200)

    def _verify(self, body: bytes, oid: str) -> None:
        asked = json.loads(body)
        whole = asked["oid"] == oid and len(self.server_hub.objects.get(oid, b"")) == asked["size"]
        self._answer(200) if whole else self._refuse(400, message="the size differs")

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        of = self._repo(repo)
        if revision not in of.branches:
            self._refuse(404, "RevisionNotFound")
            return
        tree, message = dict(of.tree(revision) or {}), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if len(self.server_hub.objects.get(value["oid"], b"")) != value["size"]:
                        self._refuse(400, message=f"{value['path']} was not uploaded")
                        return
                    tree[value["path"]] = self.server_hub.objects[value["oid"]]
                    of.large.add(value["oid"])
                case "deletedFile":
                    if value["path"] not in tree:
                        self._refuse(404, "EntryNotFound", "A file with this name doesn't exist")
                        return
                    del tree[value["path"]]
        name = of.commit(revision, tree, message)
        self._answer(200, {"commitUrl": f"{self.server_hub.url}/{repo}/commit/{name}", "commitOid": name, "success": True})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        if (tree := self._repo(repo).tree(revision)) is None:
            self._refuse(404, "RevisionNotFound")
            return
        self._answer(200, [{"type": "file", "path": name, "size": len(content), "oid": blob_hash(content), **self._lfs(repo, content)} for name, content in sorted(tree.items())])

    def _lfs(self, repo: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        return {"lfs": {"oid": digest, "size": len(content), "pointerSize": 130}} if digest in self._repo(repo).large else {}

    def _refs(self, body: bytes, repo: str) -> None:
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in self._repo(repo).branches.items()]
        self._answer(200, {"branches": branches, "tags": [], "converts": []})

    def _branch(self, body: bytes, repo: str, branch: str) -> None:
        of = self._repo(repo)
        if branch in of.branches:
            self._refuse(409, message="the branch exists")
            return
        of.branches[branch] = of.branches[json.loads(body or b"{}").get("startingPoint", "main")]
        of.messages[branch] = list(of.messages["main"])
        self._answer(200)

    def _squash(self, body: bytes, repo: str, branch: str) -> None:
        of = self._repo(repo)
        tree = of.commits[of.branches[branch]]
        of.messages[branch] = []
        of.commit(branch, tree, json.loads(body)["message"])
        of.commits = {name: of.commits[name] for name in of.branches.values()}
        self._answer(200)

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        of = self._repo(repo)
        if (tree := of.tree(revision)) is None:
            self._refuse(404, "RevisionNotFound")
        elif path not in tree:
            self._refuse(404, "EntryNotFound")
        else:
            content = tree[path]
            digest = hashlib.sha256(content).hexdigest()
            etag = f'"{digest if digest in of.large else blob_hash(content)}"'
            headers = {"X-Repo-Commit": of.branches.get(revision, revision), "ETag": etag, "Accept-Ranges": "bytes"}
            first = int(found[1]) if (found := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
            self._answer(206 if first else 200, headers=headers, body=content[first:])


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES: dict[str, Callable[..., None]] = {
    r"GET /api/whoami-v2": _Handler._whoami,
    r"POST /api/repos/create": _Handler._create,
    r"POST /api/validate-yaml": _Handler._validate,
    rf"GET /api/models/{_REPO}": _Handler._info,
    rf"GET /api/models/{_REPO}/revision/(?P<revision>.+)": _Handler._info,
    rf"GET /api/models/{_REPO}/auth-check(?P<write>/write)?": _Handler._auth_check,
    rf"POST /api/models/{_REPO}/preupload/(?P<revision>.+)": _Handler._preupload,
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": _Handler._batch,
    r"PUT /objects/(?P<oid>[0-9a-f]{64})": _Handler._put,
    r"POST /objects/(?P<oid>[0-9a-f]{64})/verify": _Handler._verify,
    rf"POST /api/models/{_REPO}/commit/(?P<revision>.+)": _Handler._commit,
    rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)/?": _Handler._tree,
    rf"GET /api/models/{_REPO}/refs": _Handler._refs,
    rf"POST /api/models/{_REPO}/branch/(?P<branch>.+)": _Handler._branch,
    rf"POST /api/models/{_REPO}/super-squash/(?P<branch>.+)": _Handler._squash,
    rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": _Handler._resolve,
}
