"""A small Hugging Face Hub on this machine, for the true huggingface_hub client (2.4).

It speaks what creating, pushing and pulling a repository takes: create, branch, preupload, LFS (also in parts),
commit, tree, paths, and files by HEAD and GET. Repositories live in memory, file contents under a folder.

    with serve(tmp_path) as hub:
        subprocess.run(..., env=os.environ | hub.env(tmp_path / "hf_home"))   # read when huggingface_hub is imported
        assert hub.repos["models", "user/name"]

`python tests/hub_server.py PORT FOLDER` serves until interrupted, to try commands by hand.
"""

import base64
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

LFS_MIN = 10 * 2**20  # larger files go by LFS, as on the Hub, and so do some endings whatever their size
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".png", ".jpg", ".npz", ".zip")
PART_BYTES = 8 * 2**20  # larger LFS files are sent in parts of this size


class Hub:
    """The repositories, and what tests set and read.

    Attributes:
        repos: (kind, "user/name") -> {"private", "branches": name -> commit, "commits": commit -> {path: file},
            "variables"}, where kind is "models", "datasets" or "spaces" and a file is {"size", "sha256", "git_sha1",
            "lfs"}.
        token: what a client has to send to write, or to see a private repository; None lets everybody.
        faults: part of an address -> what goes wrong there: an HTTP status, a pair of that and the Hub's code for the
            reason, or with a sentence too, "corrupt" or "truncate" its bytes, or "hang": no answer at all.
        bad_metadata: what the Hub finds wrong with the metadata of a card.
        log: (method, address, status) of every answer.
    """

    def __init__(self, root: Path, token: str | None = None) -> None:
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.token = token
        self.repos: dict[tuple[str, str], dict] = {}
        self.faults: dict[str, int | str | tuple[int, str] | tuple[int, str, str]] = {}
        self.bad_metadata: list[str] = []
        self.log: list[tuple[str, str, int]] = []
        self.parts: dict[str, dict[int, bytes]] = {}  # of LFS files that are being sent
        self.url = ""

    def env(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment variables that lead a client here, with its cache and settings under `home`."""
        switches = dict.fromkeys(("DISABLE_XET", "DISABLE_PROGRESS_BARS", "DISABLE_TELEMETRY"), "1") | {"OFFLINE": "0"}
        env = {f"HF_HUB_{name}": value for name, value in switches.items()}
        return env | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token or "", "NO_PROXY": "*"}

    def blob(self, sha256: str) -> Path:
        return self.root / sha256

    def create(self, kind: str, repo_id: str, private: bool = False) -> dict:
        """An empty repository."""
        repo = {"id": repo_id, "private": private, "branches": {}, "commits": {}, "variables": {}}
        self.repos[kind, repo_id] = repo
        self.commit(repo, {}, "main")
        return repo

    def add(self, repo: dict, files: dict[str, bytes], branch: str = "main") -> str:
        """Put files into a repository past the client, as a stranger's git push would. Returns the commit."""
        return self.commit(repo, self.files(repo, branch) | {p: self.store(b) for p, b in files.items()}, branch)

    def files(self, repo: dict, revision: str) -> dict[str, dict]:
        return repo["commits"][repo["branches"].get(revision, revision)]

    def store(self, content: bytes, lfs: bool = False) -> dict:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blob(sha256).write_bytes(content)
        return describe(sha256, content, lfs)

    def commit(self, repo: dict, files: dict[str, dict], branch: str) -> str:
        commit = hashlib.sha1(f"{time.time_ns()}".encode()).hexdigest()
        repo["commits"][commit] = files
        repo["branches"][branch] = commit
        return commit


def describe(sha256: str, content: bytes, lfs: bool) -> dict:
    """A file as the Hub lists it. git knows an LFS file by its pointer, not by its content."""
    size = len(content)
    if lfs:
        content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"size": size, "sha256": sha256, "git_sha1": git_sha1, "lfs": lfs}


def refuse(status: int, code: str = "", message: str = "refused") -> JSONResponse:
    """An error as the Hub sends it; huggingface_hub chooses its exception by the code."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return JSONResponse({"error": message}, status, headers=headers)


class RefusedError(Exception):
    def __init__(self, *answer: int | str) -> None:
        self.answer = answer


def make_app(hub: Hub) -> Starlette:
    def authorized(request: Request) -> bool:
        return hub.token is None or request.headers.get("authorization") == f"Bearer {hub.token}"

    def find(request: Request, write: bool = False) -> dict:
        """The repository of the address, if it exists and the client may see it (or write to it)."""
        kind = request.path_params.get("kind", "models")
        repo = hub.repos.get((kind, f"{request.path_params['user']}/{request.path_params['name']}"))
        if repo is None or (repo["private"] and not authorized(request)):
            raise RefusedError(404 if authorized(request) else 401, "RepoNotFound", "Repository not found")
        if write and not authorized(request):
            raise RefusedError(403, "", "Forbidden: you need write access")
        return repo

    def find_commit(request: Request, repo: dict) -> str:
        revision = unquote(request.path_params.get("revision", "main"))
        commit = repo["branches"].get(revision, revision)
        if commit not in repo["commits"]:
            raise RefusedError(404, "RevisionNotFound", "Invalid rev id")
        return commit

    async def create(request: Request) -> Response:
        if not authorized(request):
            return refuse(401, message="Invalid username or password.")
        wanted = await request.json()
        kind, repo_id = wanted.get("type", "model") + "s", f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        url = f"{hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in hub.repos:
            return JSONResponse({"error": "You already created this repo", "url": url}, 409)
        hub.create(kind, repo_id, wanted.get("visibility") == "private")
        return JSONResponse({"url": url, "name": repo_id, "id": repo_id})

    async def branch(request: Request) -> Response:
        repo = find(request, write=True)
        name = unquote(request.path_params["branch"])
        if name in repo["branches"]:
            return refuse(409, message="Reference already exists")
        repo["branches"][name] = repo["branches"]["main"]
        return JSONResponse({})

    async def variables(request: Request) -> Response:
        repo = find(request, write=True)
        wanted = await request.json()
        repo["variables"][wanted["key"]] = {"value": wanted["value"], "updatedAt": "2026-01-01T00:00:00.000Z"}
        return JSONResponse(repo["variables"])

    async def validate_yaml(request: Request) -> Response:
        errors = [{"message": each} for each in hub.bad_metadata]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def info(request: Request) -> Response:
        repo = find(request)
        commit = find_commit(request, repo)
        siblings = [{"rfilename": path} for path in sorted(repo["commits"][commit])]
        answer = {"_id": "0", "id": repo["id"], "sha": commit, "private": repo["private"], "siblings": siblings}
        return JSONResponse(answer | {"tags": [], "downloads": 0, "likes": 0})

    async def tree(request: Request) -> Response:
        """The files below a folder, or its own files and folders."""
        repo, below = find(request), unquote(request.path_params.get("path", ""))
        paths = listed(repo["commits"][find_commit(request, repo)])
        paths = {path: entry for path, entry in paths.items() if not below or path.startswith(f"{below}/")}
        if request.query_params.get("recursive", "").lower() != "true":
            paths = {path: entry for path, entry in paths.items() if path.rpartition("/")[0] == below}
        return JSONResponse(list(paths.values()))

    async def paths_info(request: Request) -> Response:
        repo, form = find(request), await request.form()
        paths = listed(repo["commits"][find_commit(request, repo)])
        return JSONResponse([paths[path] for path in form.getlist("paths") if path in paths])

    def listed(files: dict[str, dict]) -> dict[str, dict]:
        """Files and folders as the Hub lists them, by path."""
        entries = {}
        for path, file in files.items():
            for folder in map(str, Path(path).parents):
                if folder != ".":
                    entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            entry = {"type": "file", "path": path, "size": file["size"], "oid": file["git_sha1"]}
            lfs = {"lfs": {"oid": file["sha256"], "size": file["size"], "pointerSize": 134}} if file["lfs"] else {}
            entries[path] = entry | lfs
        return dict(sorted(entries.items()))

    async def preupload(request: Request) -> Response:
        repo = find(request, write=True)
        commit = find_commit(request, repo)
        modes = []
        for wanted in (await request.json())["files"]:
            lfs = wanted["size"] > LFS_MIN or wanted["path"].endswith(LFS_ENDINGS)
            mode = {"path": wanted["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if there := repo["commits"][commit].get(wanted["path"]):
                mode["oid"] = there["sha256"] if there["lfs"] else there["git_sha1"]
            modes.append(mode)
        return JSONResponse({"files": modes, "commitOid": commit})

    async def commit(request: Request) -> Response:
        repo = find(request, write=True)
        files = dict(repo["commits"][find_commit(request, repo)])
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = hub.store(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if not hub.blob(value["oid"]).exists():
                    return refuse(400, message=f"LFS pointer to a file that does not exist: {value['path']}")
                files[value["path"]] = describe(value["oid"], hub.blob(value["oid"]).read_bytes(), lfs=True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = hub.commit(repo, files, unquote(request.path_params["revision"]))
        prefix = "" if request.path_params["kind"] == "models" else request.path_params["kind"] + "/"
        url = f"{hub.url}/{prefix}{repo['id']}/commit/{sha}"
        return JSONResponse({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    async def lfs_batch(request: Request) -> Response:
        find(request, write=True)
        wanted = await request.json()
        objects = []
        for entry in wanted["objects"]:
            sha256, size = entry["oid"], entry["size"]
            href = f"{hub.url}/_lfs/{sha256}"
            if not hub.blob(sha256).exists():
                upload = {"href": href}
                if size > PART_BYTES:
                    parts = {str(i + 1): f"{href}/{i + 1}" for i in range(-(-size // PART_BYTES))}
                    upload = {"href": f"{href}/complete", "header": {"chunk_size": str(PART_BYTES), **parts}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        return JSONResponse({"transfer": "multipart", "objects": objects})

    async def lfs_put(request: Request) -> Response:
        content = await request.body()
        if "part" in request.path_params:
            hub.parts.setdefault(request.path_params["sha256"], {})[request.path_params["part"]] = content
        elif hub.store(content)["sha256"] != request.path_params["sha256"]:
            return refuse(400, message="sha256 mismatch")
        return Response(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    async def lfs_complete(request: Request) -> Response:
        parts = hub.parts.pop(request.path_params["sha256"])
        content = b"".join(parts[part["partNumber"]] for part in (await request.json())["parts"])
        matches = hub.store(content)["sha256"] == request.path_params["sha256"]
        return JSONResponse({}) if matches else refuse(400, message="sha256 mismatch")

    async def lfs_verify(request: Request) -> Response:
        return JSONResponse({}) if hub.blob(request.path_params["sha256"]).exists() else refuse(404)

    async def resolve(request: Request) -> Response:
        repo = find(request)
        commit = find_commit(request, repo)
        path = unquote(request.path_params["path"])
        headers = {"X-Repo-Commit": commit}
        file = repo["commits"][commit].get(path)
        if file is None:
            answer = refuse(404, "EntryNotFound", "Entry not found")
            answer.headers.update(headers)
            return answer
        if file["lfs"]:
            # To a storage host, as on the Hub. It has to be another name than the endpoint's, or the client follows
            # in its HEAD and misses X-Repo-Commit.
            headers |= {"X-Linked-Etag": f'"{file["sha256"]}"', "X-Linked-Size": str(file["size"])}
            location = f"{hub.url.replace('127.0.0.1', 'localhost')}/_cdn/{file['sha256']}/{path}"
            return Response(status_code=302, headers=headers | {"Location": location})
        return content(request, file["sha256"], headers | {"ETag": f'"{file["git_sha1"]}"'})

    async def cdn(request: Request) -> Response:
        return content(request, request.path_params["sha256"], {})

    def content(request: Request, sha256: str, headers: dict[str, str]) -> Response:
        fault = next((hub.faults[part] for part in hub.faults if part in request.url.path), None)
        if fault is None or request.method == "HEAD":
            return FileResponse(hub.blob(sha256), headers=headers)
        whole = hub.blob(sha256).read_bytes()
        return Response(whole[:-1] if fault == "truncate" else whole[:-1] + bytes([whole[-1] ^ 1]), headers=headers)

    async def refusal(request: Request, error: Exception) -> Response:
        return refuse(*error.answer)

    repo, files, lfs = "/api/{kind}/{user}/{name}", "/{user}/{name}/resolve/{revision}/{path:path}", "/_lfs/{sha256}"
    app = Starlette(
        routes=[
            Route("/api/repos/create", create, methods=["POST"]),
            Route("/api/{kind}/{user}/{name}/variables", variables, methods=["POST"]),
            Route("/api/validate-yaml", validate_yaml, methods=["POST"]),
            Route(repo, info),
            Route(repo + "/revision/{revision}", info),
            Route(repo + "/tree/{revision}", tree),
            Route(repo + "/tree/{revision}/{path:path}", tree),
            Route(repo + "/paths-info/{revision}", paths_info, methods=["POST"]),
            Route(repo + "/branch/{branch}", branch, methods=["POST"]),
            Route(repo + "/preupload/{revision}", preupload, methods=["POST"]),
            Route(repo + "/commit/{revision}", commit, methods=["POST"]),
            Route("/{user}/{name}.git/info/lfs/objects/batch", lfs_batch, methods=["POST"]),
            Route("/{kind}/{user}/{name}.git/info/lfs/objects/batch", lfs_batch, methods=["POST"]),
            Route(lfs, lfs_put, methods=["PUT"]),
            Route(lfs + "/{part:int}", lfs_put, methods=["PUT"]),
            Route(lfs + "/complete", lfs_complete, methods=["POST"]),
            Route(lfs + "/verify", lfs_verify, methods=["POST"]),
            Route("/_cdn/{sha256}/{path:path}", cdn),
            Route(files, resolve),
            Route("/{kind}" + files, resolve),
        ],
        exception_handlers={RefusedError: refusal},
    )
    app.add_middleware(Doorman, hub=hub)
    return app


class Doorman:
    """Logs every answer, and gives those that a test has ordered."""

    def __init__(self, app, hub: Hub) -> None:
        self.app, self.hub = app, hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["raw_path"].decode()

        async def logged(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.hub.log.append((scope["method"], path, message["status"]))
            await send(message)

        fault = next((fault for part, fault in self.hub.faults.items() if part in path), None)
        if fault == "hang":
            self.hub.log.append((scope["method"], path, 0))
            while (await receive())["type"] != "http.disconnect":
                pass
            return None
        refusal = refuse(fault) if isinstance(fault, int) else refuse(*fault) if isinstance(fault, tuple) else None
        # Routed by the raw path: a revision such as exp%2Fone is one segment, unquoted by who reads it.
        await (refusal or self.app)({**scope, "path": path}, receive, logged)


@contextmanager
def serve(root: Path, token: str | None = None, port: int = 0) -> Iterator[Hub]:
    """A Hub in a thread, on a free port unless one is given."""
    hub = Hub(root, token)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        hub.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(make_app(hub), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield hub
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    with serve(Path(sys.argv[2]), port=int(sys.argv[1])) as hub:
        print(hub.url)
        threading.Event().wait()
