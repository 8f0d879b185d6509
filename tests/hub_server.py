"""A small part of the Hugging Face Hub on loopback: what its client asks for when a data set is written and read."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from servers import Loopback


class HubServer(Loopback):
    """Repositories as lists of commits; each a mapping of paths to bytes. Large files come by LFS.

    Attributes:
        commits: by repository, oldest first.
        stored: LFS files by SHA-256, committed or not.
        uploads: LFS files that were sent, in their order.
        refuse: how many uploads from now on are refused.
        before_commit: called once, before the next commit.
    """

    def __init__(self):
        super().__init__(_Hub)
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.stored: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.private: dict[str, bool] = {}
        self.refuse = 0
        self.before_commit = None


def sha(repo, commits):
    return hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, content, status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self):
        path, body = unquote(urlsplit(self.path).path), self._body()
        for pattern, action in _ROUTES:
            if found := re.fullmatch(pattern, path):
                action(self, body, *found.groups())
                return
        self._send({"error": path}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _files(self, repo):
        commits = self.server.commits.get(repo)
        if commits is None:
            self._send({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        return commits and (commits[-1] if commits else {})

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'lab'}/{asked['name']}"
        known = repo in self.server.commits
        self.server.commits.setdefault(repo, [{}])
        self.server.private.setdefault(repo, asked.get("private") or asked.get("visibility") == "private")
        self._send({"url": f"{self.server.url}/datasets/{repo}", "name": repo}, 409 if known else 200)

    def info(self, _body, repo):
        if self._files(repo) is not None:
            commit = sha(repo, self.server.commits[repo])
            self._send({"id": repo, "_id": "0", "sha": commit, "private": True, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, _body, repo, folder):
        files = self._files(repo)
        if files is None:
            return
        prefix = f"{folder}/" if folder else ""
        below = [path for path in files if path.startswith(prefix)]
        if folder and not below:
            self._send({"error": "no such folder"}, 404, X_Error_Code="EntryNotFound")
            return
        listed = {}
        for path in below:
            head, slash, _ = path.removeprefix(prefix).partition("/")
            listed[head] = (
                {"type": "directory", "oid": "0", "size": 0, "path": prefix + head}
                if slash
                else entry(path, files[path])
            )
        self._send(list(listed.values()))

    def paths(self, body, repo):
        files = self._files(repo)
        if files is not None:
            asked = json.loads(body)["paths"]
            self._send([entry(path, files[path]) for path in asked if path in files])

    def preupload(self, body, _repo):
        asked = json.loads(body)["files"]
        mode = {True: "lfs", False: "regular"}
        self._send(
            {
                "files": [
                    {"path": file["path"], "uploadMode": mode[file["path"].endswith(".zip")], "shouldIgnore": False}
                    for file in asked
                ]
            }
        )

    def batch(self, body, _repo):
        objects = []
        for one in json.loads(body)["objects"]:
            actions = (
                {}
                if one["oid"] in self.server.stored
                else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
            )
            objects.append({"oid": one["oid"], "size": one["size"], **actions})
        self._send({"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        if self.server.refuse:
            self.server.refuse -= 1
            self._send({"error": "try later"}, 400)
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        self.server.uploads.append(oid)
        self._send(b"")

    def commit(self, body, repo):
        if self.server.before_commit:
            self.server.before_commit, action = None, self.server.before_commit
            action()
        lines = [json.loads(line) for line in body.splitlines()]
        commits = self.server.commits[repo]
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != sha(repo, commits):
            self._send({"error": "a commit came first"}, 412)
            return
        files = dict(commits[-1])
        for line in lines[1:]:
            value = line["value"]
            content = base64.b64decode(value["content"]) if line["key"] == "file" else self.server.stored[value["oid"]]
            files[value["path"]] = content
        commits.append(files)
        commit = sha(repo, commits)
        self._send(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/datasets/{repo}/commit/{commit}"}
        )

    def file(self, _body, repo, path):
        files = self._files(repo)
        if files is None:
            return
        if path not in files:
            self._send({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        content = files[path]
        if found:
            part = content[int(found[1]) : int(found[2]) + 1]
            self._send(part, 206, Content_Range=f"bytes {found[1]}-{int(found[1]) + len(part) - 1}/{len(content)}")
        else:
            self._send(content)

    def log_message(self, *_arguments):
        """Be quiet."""


def entry(path, content):
    listed = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": path}
    if path.endswith(".zip"):
        digest = hashlib.sha256(content).hexdigest()
        listed["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 100}
    return listed


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"/api/repos/create", _Hub.create),
    (r"/api/validate-yaml", lambda hub, _body: hub._send({"errors": [], "warnings": []})),
    (rf"/api/datasets/{_REPO}(?:/revision/\w+)?", _Hub.info),
    (rf"/api/datasets/{_REPO}/tree/\w+/?(.*)", _Hub.tree),
    (rf"/api/datasets/{_REPO}/paths-info/\w+", _Hub.paths),
    (rf"/api/datasets/{_REPO}/preupload/\w+", _Hub.preupload),
    (rf"/api/datasets/{_REPO}/commit/\w+", _Hub.commit),
    (rf"/datasets/{_REPO}\.git/info/lfs/objects/batch", _Hub.batch),
    (rf"/datasets/{_REPO}/resolve/\w+/(.+)", _Hub.file),
    (r"/lfs/(\w+)", _Hub.upload),
]
