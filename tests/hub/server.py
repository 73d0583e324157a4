"""A Hub in memory: the endpoints that `huggingface_hub` uses to push a model and to load it, over real HTTP.

```python
with HubServer() as hub:
    hub.url  # for HF_ENDPOINT, with HF_HUB_DISABLE_XET=1
    hub.repos["me/model"].branches["main"][-1].files  # what arrived
```
Users are known by their tokens (`hub.users`); a namespace belongs to the user of that name. Paths of requests are
answered as https://huggingface.co does, as far as the client looks.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LARGE = (".safetensors", ".png")  # what the Hub keeps as LFS files, whatever their size


@dataclass
class Commit:
    """A commit: message, all files, and what the request changed."""

    message: str
    files: dict[str, bytes]
    changed: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    @property
    def oid(self) -> str:
        content = json.dumps([self.message, {k: hashlib.sha1(v).hexdigest() for k, v in sorted(self.files.items())}])
        return hashlib.sha1(content.encode()).hexdigest()


@dataclass
class Repo:
    """A repository: its branches (pull requests are branches `refs/pr/N`) and settings."""

    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("initial commit", {})]})


@dataclass
class Request:
    """What came in."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


class HubServer:
    """The server; `with` starts it on a free port and stops it.

    Attributes:
        users: User names by token.
        repos: Repositories by id.
        large: LFS objects by SHA-256.
        requests: Everything that came in, in order.
        cut_uploads: After so many uploads of LFS objects every other is cut off in the middle; `None` never cuts.
        cut_path: Requests to paths with this in them are cut off in the middle.
        refuse: Paths (as patterns) that are answered with a status: `{"/commit/": 409}`.
    """

    def __init__(self) -> None:
        self.users = {"hf_" + "m" * 34: "me", "hf_" + "o" * 34: "other"}
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.cut_uploads: int | None = None
        self.cut_path: str | None = None
        self.refuse: dict[str, int] = {}
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def token(self, user: str) -> str:
        return next(token for token, name in self.users.items() if name == user)

    def sent(self, method: str, pattern: str) -> list[Request]:
        """Requests whose path matches."""
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[repo_id].branches[revision][-1].files


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, content: dict | None = None) -> None:
        self.status, self.message, self.code, self.content = status, message, code, content or {"error": message}


_REPO = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_FILE = r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
_ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", _REPO + r"/preupload/(?P<revision>.+)", "preupload"),
    ("POST", _REPO + r"/commit/(?P<revision>.+)", "commit"),
    ("POST", _REPO + r"/branch/(?P<revision>.+)", "branch"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "upload"),
    ("POST", r"/lfs/verify", "verify"),
    ("GET", _REPO + r"/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", _REPO + r"(/revision/(?P<revision>[^/]+))?", "info"),
    ("HEAD", _FILE, "file"),
    ("GET", _FILE, "file"),
)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def handle_any(self) -> None:
        address = urlsplit(self.path)
        cut = self._is_cut(address.path)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length // 2 if cut else length)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self._read_chunks()
        if cut:  # as when a cable is pulled
            self.close_connection = True
            self.connection.close()
            return
        request = Request(self.command, address.path, parse_qs(address.query), dict(self.headers), body)
        self.hub.requests.append(request)
        try:
            for pattern, status in self.hub.refuse.items():
                if re.search(pattern, address.path):
                    raise Refused(status, "refused by the test")
            for method, pattern, name in _ROUTES:
                found = re.fullmatch(pattern, address.path)
                if method == self.command and found:
                    parts = {key: value and unquote(value) for key, value in found.groupdict().items()}
                    with self.hub.lock:
                        self.answer(*getattr(self, name)(request, **parts))
                    return
            raise Refused(404, f"no such endpoint: {self.command} {address.path}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self.answer(refused.content, headers, refused.status)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _is_cut(self, path: str) -> bool:
        if self.hub.cut_path is not None and self.hub.cut_path in path:
            return True
        if self.command != "PUT" or self.hub.cut_uploads is None:
            return False
        with self.hub.lock:
            self.hub.cut_uploads -= 1
            return self.hub.cut_uploads < 0

    def _read_chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, content: dict | list | bytes, headers: dict | None = None, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def user(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def writer(self, namespace: str) -> str:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if namespace != user:
            raise Refused(403, f"You don't have the rights to write to the namespace {namespace}")
        return user

    def repo(self, repo_id: str) -> Repo:
        found, user = self.hub.repos.get(repo_id), self.user()
        if found is None or (found.private and user != repo_id.split("/")[0]):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return found

    def history(self, repo_id: str, revision: str | None) -> list[Commit]:
        repo, revision = self.repo(repo_id), revision or "main"
        for commits in repo.branches.values():
            for number, commit in enumerate(commits):
                if commit.oid == revision:
                    return commits[: number + 1]
        if revision not in repo.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.branches[revision]

    def create(self, request: Request) -> tuple:
        values = json.loads(request.body)
        user = self.user()
        name = f"{values.get('organization') or user}/{values['name']}"
        self.writer(name.split("/")[0])
        answer = {"url": f"{self.hub.url}/{name}", "id": name, "name": name}
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo", None, {"error": "exists", **answer})
        private = values.get("visibility") == "private" or values.get("private", False)
        self.hub.repos[name] = Repo(private)
        return (answer,)

    def validate(self, request: Request) -> tuple:
        content = json.loads(request.body)["content"]
        block = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(block[1]) if block else None
        except yaml.YAMLError as error:
            raise Refused(400, "bad", None, {"errors": [{"message": str(error)}], "warnings": []}) from None
        if not isinstance(metadata, dict):
            return ({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]},)
        if "license" in metadata and metadata["license"] == "no-such-licence":
            message = '"license" must be one of [apache-2.0, mit, ...]'
            raise Refused(400, "bad", None, {"errors": [{"message": message}], "warnings": []})
        return ({"errors": [], "warnings": []},)

    def preupload(self, request: Request, repo: str, revision: str) -> tuple:
        files, there = json.loads(request.body)["files"], self.history(repo, revision)[-1].files
        self._check_right_to_commit(request, repo)
        answers = []
        for file in files:
            large = file["path"].endswith(LARGE)
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in there:
                content = there[file["path"]]
                answer["oid"] = hashlib.sha256(content).hexdigest() if large else _git_hash(content)
            answers.append(answer)
        return ({"files": answers},)

    def batch(self, request: Request, repo: str) -> tuple:
        if self.user() is None:
            raise Refused(401, "Invalid username or password.")
        objects = []
        for one in json.loads(request.body)["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.large:
                verify = {"href": f"{self.hub.url}/lfs/verify"}
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}, "verify": verify}
            objects.append(answer)
        return ({"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def upload(self, request: Request, oid: str) -> tuple:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refused(400, "the content has another hash")
        self.hub.large[oid] = request.body
        return (b"",)

    def verify(self, request: Request) -> tuple:
        values = json.loads(request.body)
        if len(self.hub.large.get(values["oid"], b"")) != values["size"]:
            raise Refused(404, "the object has not arrived")
        return ({},)

    def branch(self, request: Request, repo: str, revision: str) -> tuple:
        self.writer(repo.split("/")[0])
        if revision in self.repo(repo).branches:
            raise Refused(409, "Reference already exists")
        self.repo(repo).branches[revision] = list(self.history(repo, None))
        return ({},)

    def commit(self, request: Request, repo: str, revision: str) -> tuple:
        self._check_right_to_commit(request, repo)
        lines = [json.loads(line) for line in request.body.splitlines()]
        history = self.history(repo, revision)
        commit = Commit(lines[0]["value"]["summary"], dict(history[-1].files))
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                commit.files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.hub.large:
                    raise Refused(400, f"the LFS object of {path} has not arrived")
                commit.files[path] = self.hub.large[line["value"]["oid"]]
            elif line["key"] == "deletedFile":
                del commit.files[path]
            (commit.deleted if line["key"] == "deletedFile" else commit.changed).append(path)
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit.oid}"}
        branches = self.repo(repo).branches
        if "create_pr" in request.query:
            number = sum(name.startswith("refs/pr/") for name in branches) + 1
            branches[f"refs/pr/{number}"] = [*history, commit]
            return ({**answer, "pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"},)
        branches[revision].append(commit)
        return (answer,)

    def _check_right_to_commit(self, request: Request, repo: str) -> None:
        if "create_pr" in request.query and self.user() is not None:
            self.repo(repo)  # anyone who can see it may propose
        else:
            self.writer(repo.split("/")[0])

    def info(self, request: Request, repo: str, revision: str | None) -> tuple:
        commit, found = self.history(repo, revision)[-1], self.repo(repo)
        return (
            {
                "id": repo, "modelId": repo, "sha": commit.oid, "private": found.private,
                "gated": "auto" if found.gated else False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": name} for name in commit.files],
            },
        )  # fmt: skip

    def tree(self, request: Request, repo: str, revision: str) -> tuple:
        files = self.history(repo, revision)[-1].files
        return ([{"type": "file", "path": p, "size": len(c), "oid": _git_hash(c)} for p, c in files.items()],)

    def file(self, request: Request, repo: str, revision: str, file: str) -> tuple:
        commit = self.history(repo, revision)[-1]
        if self.hub.repos[repo].gated and file != "README.md" and self.user() is None:
            raise Refused(401, f"Access to model {repo} is restricted.", "GatedRepo")
        if file not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = commit.files[file]
        return (content, {"ETag": f'"{_git_hash(content)}"', "X-Repo-Commit": commit.oid})


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
