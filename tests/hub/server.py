"""A server on this machine that speaks the Hugging Face Hub's protocol, both ways, and fails when told to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "TestTokenOfNobody" * 2
LFS_SUFFIXES = (".safetensors", ".gguf", ".parquet", ".tar")


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Repo:
    """Commits of a repository: each a dict of path -> bytes."""

    def __init__(self, private=False, gated=False):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.lfs: set[str] = set()
        self.private, self.gated = private, gated

    def commit(self, files: dict[str, bytes], ref="main") -> str:
        now = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        sha = hashlib.sha1(repr((len(self.commits), sorted(now))).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = now, sha
        self.lfs |= {path for path in files if path.endswith(LFS_SUFFIXES)}
        return sha

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer:
    """Use as a context manager.

    Attributes:
      repos: (kind, id) -> Repo; kind is "models" or "datasets".
      requests: (method, path, whether it had the token) of each request.
      fail: (method, pattern of path) -> what to do at the next such requests, in order: a status to answer with, "cut"
        to close the connection half way, "corrupt" to send other bytes of the same number.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bool]] = []
        self.fail: dict[tuple[str, str], list] = {}
        outer = self

        class Handler(_Handler):
            hub = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def add(self, id: str, files: dict[str, bytes], kind="models", **settings) -> Repo:
        repo = self.repos.setdefault((kind, id), Repo(**settings))
        repo.commit(files)
        return repo

    def planned(self, method: str, path: str):
        for (wanted, pattern), actions in self.fail.items():
            if wanted == method and re.search(pattern, path) and actions:
                return actions.pop(0)
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def _answer(self, status=200, value=None, content=b"", headers=(), kind="application/json"):
        if value is not None:
            content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        names = {name.lower() for name, _ in headers}
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(content)))
        for name, text in headers:
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status, code="", message="no"):
        self._answer(status, {"error": message}, headers=[("X-Error-Code", code), ("X-Error-Message", message)])

    def _begin(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), unquote(parts.path)
        self.authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.hub.requests.append((self.command, path, self.authorised))
        self.action = self.hub.planned(self.command, path)
        if isinstance(self.action, int):
            self._error(self.action)
            return None
        return path

    def _repo(self, kind, id):
        repo = self.hub.repos.get((kind, id))
        if repo is None or (repo.private and not self.authorised):
            self._error(404 if self.authorised or repo is None else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self._begin()
        if path is None:
            return
        if match := re.fullmatch(r"/api/(models|datasets)", path):
            author = self.query.get("author", [""])[0]
            ids = [id for kind, id in self.hub.repos if kind == match[1] and id.startswith(f"{author}/")]
            self._answer(value=[{"id": id, "_id": id} for id in ids])
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/refs", path):
            repo = self._repo(match[1], match[2])
            if repo:
                refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.refs.items()]
                self._answer(value={"branches": refs, "converts": [], "tags": []})
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2], match[3] or "main")
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(*match.groups())
        elif match := re.fullmatch(r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1] or "models", *match.groups()[1:])
        elif match := re.fullmatch(r"/blobs/(\w+)", path):
            self._send_content(self.hub.blobs[match[1]], [("ETag", f'"{match[1]}"')])
        else:
            self._error(404)

    def _known(self, kind, id, revision):
        repo = self._repo(kind, id)
        if repo is None:
            return None, None
        sha = repo.sha(revision)
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None, None
        return repo, sha

    def _info(self, kind, id, revision):
        repo, sha = self._known(kind, id, revision)
        if repo:
            siblings = [{"rfilename": path} for path in repo.commits[sha]]
            self._answer(value={"id": id, "_id": id, "sha": sha, "private": repo.private, "siblings": siblings})

    def _tree(self, kind, id, revision):
        repo, sha = self._known(kind, id, revision)
        if not repo:
            return
        found = []
        for path, content in repo.commits[sha].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if path in repo.lfs:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            found.append(entry)
        self._answer(value=found)

    def _file(self, kind, id, revision, path):
        repo, sha = self._known(kind, id, revision)
        if not repo:
            return
        if repo.gated and not self.authorised:
            return self._error(401, "GatedRepo", "Access to it is restricted")
        content = repo.commits[sha].get(path)
        if content is None:
            return self._error(404, "EntryNotFound")
        headers = [("X-Repo-Commit", sha)]
        if path in repo.lfs:
            digest = hashlib.sha256(content).hexdigest()
            self.hub.blobs[digest] = content
            headers += [("X-Linked-Etag", f'"{digest}"'), ("X-Linked-Size", str(len(content)))]
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")  # as content is served from another host
            headers += [("Location", f"{elsewhere}/blobs/{digest}")]
            return self._answer(302, headers=headers)
        self._send_content(content, [*headers, ("ETag", f'"{git_sha1(content)}"')])

    def _send_content(self, content, headers):
        status, begin = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, begin = 206, int(match[1])
            headers = [*headers, ("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")]
        content = content[begin:]
        if self.action == "corrupt" and self.command == "GET":
            content = bytes(byte ^ 1 for byte in content)
        if self.action == "cut" and self.command == "GET":
            half = content[: len(content) // 2]
            self._answer(status, content=half, headers=[*headers, ("Content-Length", str(len(content)))], kind="x/y")
            self.close_connection = True
            return
        self._answer(status, content=content, headers=headers, kind="application/octet-stream")

    def do_POST(self):
        path = self._begin()
        if path is None:
            return
        if path == "/api/validate-yaml":
            return self._answer(value={"errors": [], "warnings": []})
        if not self.authorised:
            return self._error(401, message="Invalid credentials")
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(self.body)["files"]
            modes = [("lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular", f["path"]) for f in files]
            return self._answer(
                value={"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for m, p in modes]}
            )
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._lfs(json.loads(self.body)["objects"])
        if path == "/lfs/verify":
            return self._answer(value={})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self._commit(match[1], match[2])
        self._error(404)

    def _create(self, asked):
        id = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if ("models", id) in self.hub.repos:
            return self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{id}"})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos["models", id] = Repo(private=bool(private))
        self.hub.repos["models", id].commit({})
        self._answer(value={"url": f"{self.hub.url}/{id}", "name": id, "id": id})

    def _lfs(self, objects):
        found = []
        for one in objects:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.blobs:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.url}/lfs/verify", "header": {}},
                }
            found.append(entry)
        self._answer(value={"transfer": "basic", "objects": found}, kind="application/vnd.git-lfs+json")

    def do_PUT(self):
        path = self._begin()
        if path is None:
            return
        digest = path.rpartition("/")[2]
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self._error(400, message="other content")
        self.hub.blobs[digest] = self.body
        self._answer()

    def _commit(self, id, revision):
        files, lfs = {}, set()
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
                lfs.add(value["path"])
        repo = self.hub.repos["models", id]
        sha = repo.commit(files, revision)
        repo.lfs |= lfs
        self._answer(value={"commitUrl": f"{self.hub.url}/{id}/commit/{sha}", "commitOid": sha, "success": True})
