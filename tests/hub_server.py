"""A Hugging Face Hub of one file, in memory, for tests: create, push, pull, private repositories, refs.

    python tests/hub_server.py 8765
    HF_ENDPOINT=http://127.0.0.1:8765 HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_test hf upload tester/tiny FOLDER

It speaks the endpoints that huggingface_hub 2.x calls, and keeps the manners that clients rely on: 401 without a
token, 404 for a repository that one may not see, object ids that let a client skip unchanged files, commits that
check what they are given. Large files go through Git LFS, not Xet: set HF_HUB_DISABLE_XET=1, and all variables
before huggingface_hub is imported, which reads them once.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_test": "tester", "hf_other": "other"}
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def blob_id(self) -> str:
        """Git's name of the blob; of an LFS file it is that of the pointer in real life, here that of the content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def describe(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Commit:
    oid: str
    title: str
    author: str
    files: dict[str, File]


@dataclass
class Repository:
    owner: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, title: str, author: str, files: dict[str, File]) -> Commit:
        content = "".join(f"{path}{file.sha256}" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)}{title}{content}".encode()).hexdigest()
        commit = Commit(oid, title, author, files)
        self.commits.append(commit)
        self.branches[branch] = commit
        return commit

    def at(self, revision: str) -> Commit:
        named = {commit.oid: commit for commit in self.commits} | self.tags | self.branches
        if revision not in named:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return named[revision]


class Refusal(Exception):
    """An HTTP error with the headers by which huggingface_hub tells the kinds apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Hub(ThreadingHTTPServer):
    """The state of the server: repositories by (kind, `owner/name`), LFS objects by sha256, and the requests seen."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: str, token: str | None = "hf_test") -> dict[str, str]:
        """What a client process needs in its environment; `home` is the folder of its cache."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return variables | ({"HF_TOKEN": token} if token else {})


ID = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets)/{ID}"
GIT = rf"/(?:(?P<kind>datasets)/)?{ID}"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("GET", rf"{API}/refs", "refs"),
    ("GET", rf"{API}/commits/(?P<revision>[^/]+)", "commits"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"{API}/branch/(?P<name>[^/]+)", "branch"),
    ("POST", rf"{API}/tag/(?P<revision>[^/]+)", "tag"),
    ("POST", rf"{GIT}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("GET", rf"{GIT}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    """One method per route; each returns what is sent as JSON, or sends by itself and returns None."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def do_DELETE(self) -> None:
        self.answer("DELETE")

    def log_message(self, format: str, *args: Any) -> None:
        """Silent; `Hub.requests` has them."""

    def answer(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        try:
            for verb, pattern, name in ROUTES:
                if verb == method and (match := re.fullmatch(pattern, path)):
                    # A group that did not take part in the match keeps the method's default.
                    given = {key: value for key, value in match.groupdict().items() if value is not None}
                    with self.server.lock:
                        reply = getattr(self, name)(**given)
                    if reply is not None:
                        self.send(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})
                    return
            raise Refusal(404, f"no such endpoint: {method} {path}")
        except Refusal as refusal:
            body = json.dumps({"error": str(refusal)}).encode()
            self.send(refusal.status, body, {"Content-Type": "application/json", **refusal.headers})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who asks, and what they may see.

    @property
    def user(self) -> str | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = TOKENS.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def signed_in(self) -> str:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        return self.user

    def readable(self, kind: str, id: str) -> Repository:
        repository = self.server.repositories.get((kind, id))
        if repository is None or (repository.private and repository.owner != self.user):
            # Strangers cannot tell a private repository from a missing one; without a token the Hub says 401.
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, kind: str, id: str) -> Repository:
        user = self.signed_in()
        repository = self.readable(kind, id)
        if repository.owner != user:
            raise Refusal(403, f"you may not write to {id}")
        return repository

    # Account and repositories.

    def whoami(self) -> dict[str, Any]:
        name = self.signed_in()
        return {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_yaml(self) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def create(self) -> dict[str, Any] | None:
        user, wanted = self.signed_in(), json.loads(self.body)
        owner = wanted.get("organization") or user
        if owner != user:
            raise Refusal(403, f"you may not create a repository for {owner}")
        kind, id = f"{wanted.get('type') or 'model'}s", f"{owner}/{wanted['name']}"
        reply = {"url": f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{id}", "name": id}
        if (kind, id) in self.server.repositories:
            self.send(409, json.dumps(reply).encode(), {"X-Error-Message": "You already created this repository"})
            return None
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repository = self.server.repositories[kind, id] = Repository(owner, bool(private))
        repository.commit(
            "main", "initial commit", user, {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)}
        )
        return reply

    def delete(self) -> dict[str, Any]:
        wanted = json.loads(self.body)
        key = f"{wanted.get('type') or 'model'}s", f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self.writable(*key)
        del self.server.repositories[key]
        return {}

    # Pull.

    def info(self, kind: str, id: str, revision: str = "main") -> dict[str, Any]:
        repository = self.readable(kind, id)
        commit = repository.at(revision)
        siblings = [
            {"rfilename": path, "size": len(file.content), "blobId": file.blob_id}
            | ({"lfs": {"sha256": file.sha256, "size": len(file.content), "pointerSize": 134}} if file.lfs else {})
            for path, file in sorted(commit.files.items())
        ]
        named = {"id": id, "modelId": id, "author": repository.owner, "sha": commit.oid, "private": repository.private}
        dated = {"createdAt": DATE, "lastModified": DATE, "disabled": False, "gated": False}
        return named | dated | {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings}

    def tree(self, kind: str, id: str, revision: str, path: str = "") -> list[dict[str, Any]]:
        commit = self.readable(kind, id).at(revision)
        inside = f"{path.rstrip('/')}/" if path else ""
        entries = [file.describe(name) for name, file in sorted(commit.files.items()) if name.startswith(inside)]
        if not entries:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return entries

    def resolve(self, id: str, revision: str, path: str, kind: str = "models") -> None:
        commit = self.readable(kind, id).at(revision)
        file = commit.files.get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        size = len(file.content)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(size)}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
            self.send(206, file.content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"})
        else:
            self.send(200, file.content, headers)

    def refs(self, kind: str, id: str) -> dict[str, Any]:
        repository = self.readable(kind, id)

        def listed(refs: dict[str, Commit], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": at.oid} for name, at in refs.items()]

        branches, tags = listed(repository.branches, "refs/heads/"), listed(repository.tags, "refs/tags/")
        return {"branches": branches, "tags": tags, "converts": []}

    def commits(self, kind: str, id: str, revision: str) -> list[dict[str, Any]]:
        repository = self.readable(kind, id)
        upto = repository.commits.index(repository.at(revision)) + 1
        return [
            {"id": commit.oid, "title": commit.title, "message": "", "date": DATE, "authors": [{"user": commit.author}]}
            for commit in reversed(repository.commits[:upto])
        ]

    # Push.

    def preupload(self, kind: str, id: str, revision: str) -> dict[str, Any]:
        stored = self.writable(kind, id).at(revision).files
        files = []
        for wanted in json.loads(self.body)["files"]:
            path, known = wanted["path"], stored.get(wanted["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = known.etag if known else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self, id: str, kind: str = "models") -> dict[str, Any]:
        self.writable(kind, id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid = wanted["oid"]
            upload = {"upload": {"href": f"{self.server.url}/lfs/{oid}", "header": {}}}
            stored = oid in self.server.objects
            objects.append({"oid": oid, "size": wanted["size"]} | ({} if stored else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> None:
        """Without a token, as a pre-signed address is; the name is the hash, so nothing can be overwritten."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have this sha256")
        self.server.objects[oid] = self.body
        self.send(200, b"", {})

    def commit(self, kind: str, id: str, revision: str) -> dict[str, Any]:
        repository = self.writable(kind, id)
        files, title = dict(repository.at(revision).files), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = File(self.server.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(400, f"there is no {value['path']} to delete")
            elif key == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
            else:
                raise Refusal(400, f"unknown operation {key}")
        commit = repository.commit(revision, title, self.signed_in(), files)
        return {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.server.url}/{id}/commit/{commit.oid}"}

    def branch(self, kind: str, id: str, name: str) -> dict[str, Any]:
        repository = self.writable(kind, id)
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        return self.point(repository.branches, name, repository.at(start))

    def tag(self, kind: str, id: str, revision: str) -> dict[str, Any]:
        repository = self.writable(kind, id)
        return self.point(repository.tags, json.loads(self.body)["tag"], repository.at(revision))

    def point(self, refs: dict[str, Commit], name: str, commit: Commit) -> dict[str, Any]:
        if name in refs:
            raise Refusal(409, f"{name} exists")
        refs[name] = commit
        return {}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port, in a thread of this process."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


if __name__ == "__main__":
    with Hub(int(sys.argv[1]) if len(sys.argv) > 1 else 0) as served:
        print(f"HF_ENDPOINT={served.url} HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_test", flush=True)
        served.serve_forever()
