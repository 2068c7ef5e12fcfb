"""The part of the Hugging Face Hub's HTTP API that a dataset repository needs, on loopback.

Written from what huggingface_hub sends: repositories, commits with a parent, regular and LFS
uploads, listings, downloads. The real Hub also stores large files by Xet, throttles, and checks
more; of that nothing is here.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

Answer = tuple[int, dict[str, str], bytes]


class FakeHub:
    """A backend for ``servers.Faulty``.

    Attributes:
        repos: Of each dataset repository its commits, each a mapping of path to content.
        private: Repositories that were made private.
        largest_commit: Files of the largest commit so far.
        lfs_from: Files of so many bytes or more are uploaded by LFS.
    """

    def __init__(self, lfs_from: int = 1 << 62) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.largest_commit = 0
        self.lfs_from = lfs_from
        self.url = ""
        self._uploaded: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __call__(self, request: Any, body: bytes) -> Answer:
        parts = unquote(request.path).strip("/").split("/")
        with self._lock:
            if parts[:3] == ["api", "repos", "create"]:
                return self._create(json.loads(body))
            if parts[:2] == ["api", "validate-yaml"]:
                return _json({"errors": [], "warnings": []})
            if parts[0] == "upload":
                self._uploaded[parts[1]] = body
                return 200, {}, b""
            if parts[:2] == ["api", "datasets"]:
                return self._of_repo("/".join(parts[2:4]), parts[4:], request, body)
            if parts[0] == "datasets" and parts[2].endswith(".git"):
                return self._batch(json.loads(body))
            if parts[0] == "datasets" and parts[3] == "resolve":
                return self._resolve("/".join(parts[1:3]), "/".join(parts[5:]), request)
        return 404, {}, b"{}"

    def _create(self, asked: Any) -> Answer:
        name = (
            f"{asked['organization']}/{asked['name']}"
            if asked.get("organization")
            else asked["name"]
        )
        if name in self.repos:
            return 409, {}, b"{}"
        self.repos[name] = [{}]
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(name)
        return _json({"url": f"{self.url}/datasets/{name}"})

    def _of_repo(self, repo: str, rest: list[str], request: Any, body: bytes) -> Answer:
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commits = self.repos[repo]
        if not rest or rest[0] == "revision":
            return _json({"id": repo, "sha": _sha(len(commits)), "siblings": [], "tags": []})
        if rest[0] == "paths-info":
            asked = request.body_of_form if hasattr(request, "body_of_form") else _asked(body)
            return _json([_entry(path, commits[-1][path]) for path in asked if path in commits[-1]])
        if rest[0] == "tree":
            return self._tree(
                commits[-1], "/".join(rest[2:]), "recursive=true" in request.query.lower()
            )
        if rest[0] == "preupload":
            files = json.loads(body)["files"]
            return _json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["size"] >= self.lfs_from else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        if rest[0] == "commit":
            return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        return 404, {}, b"{}"

    def _tree(self, files: dict[str, bytes], below: str, recursive: bool) -> Answer:
        start = f"{below}/" if below else ""
        inside = [path for path in sorted(files) if path.startswith(start)]
        if below and not inside:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        folders = {p[: p.index("/", len(start))] for p in inside if "/" in p[len(start) :]}
        found: Iterable[str] = (
            inside if recursive else (p for p in inside if "/" not in p[len(start) :])
        )
        return _json(
            [
                *({"type": "directory", "path": f, "oid": "0" * 40} for f in sorted(folders)),
                *(_entry(path, files[path]) for path in found),
            ]
        )

    def _commit(self, repo: str, lines: list[Any]) -> Answer:
        commits = self.repos[repo]
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, _sha(len(commits))):
            return 412, {}, b'{"error": "A commit has happened since."}'
        files = dict(commits[-1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._uploaded[value["oid"]]
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
                del files[value["path"]]
        self.largest_commit = max(self.largest_commit, len(lines) - 1)
        commits.append(files)
        url = f"{self.url}/datasets/{repo}/commit/{_sha(len(commits))}"
        return _json({"success": True, "commitOid": _sha(len(commits)), "commitUrl": url})

    def _batch(self, asked: Any) -> Answer:
        objects = []
        for wanted in asked["objects"]:
            href = f"{self.url}/upload/{wanted['oid']}"
            objects.append({**wanted, "actions": {"upload": {"href": href, "header": {}}}})
        return _json({"transfer": "basic", "objects": objects})

    def _resolve(self, repo: str, path: str, request: Any) -> Answer:
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        content = self.repos[repo][-1].get(path)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": _sha(len(self.repos[repo]))}
        wanted = next((v for k, v in request.headers.items() if k.lower() == "range"), None)
        if wanted is None:
            return 200, headers, content
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        if int(first) >= len(content):
            return 416, {}, b""
        return 206, headers, content[int(first) : int(last) + 1]


def _asked(body: bytes) -> list[str]:
    """Paths of a paths-info request, which huggingface_hub sends as a form or as JSON."""
    if body.startswith(b"{"):
        return list(json.loads(body)["paths"])
    pairs = (pair.partition("=") for pair in body.decode().split("&"))
    return [unquote(value.replace("+", " ")) for name, _, value in pairs if name == "paths"]


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha(number: int) -> str:
    return f"{number:040x}"


def _json(value: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
