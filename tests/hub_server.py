"""A small Hub on 127.0.0.1: the HTTP calls that huggingface_hub makes to push a model, without Xet storage."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_testtoken"


class HubState:
    """What the server holds, and how it is to behave.

    `repos` is {id: {branch: {path: bytes}}}, `objects` the large files by sha256; a file is in a repository only after
    a commit. `uploads` lists the large files whose whole content arrived, in order. With `cut_after` not None, so many
    uploads succeed; every later one ends with a closed connection in its middle.
    """

    def __init__(self):
        self.repos = {}
        self.private = {}
        self.objects = {}
        self.uploads = []
        self.commits = []
        self.cut_after = None
        self.may_write = True
        self.calls = []
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubState

    def log_message(self, *_):
        pass

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status, content=None, **headers):
        data = json.dumps({} if content is None else content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        path, content = unquote(self.path.split("?")[0]), self.body()
        self.state.calls.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        if not self.state.may_write:
            return self.answer(403, {"error": "no rights"}, X_Error_Message="You don't have the rights")
        with self.state.lock:
            return self.post(path, content)

    def post(self, path, content):
        state, base = self.state, f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if repo in state.repos else 200
            if status == 200:
                state.repos[repo] = {"main": {}}
                state.private[repo] = asked.get("visibility") == "private" or asked.get("private") is True
            return self.answer(status, {"url": f"{base}/{repo}"})
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/branch/(.+)", path):
            repo, branch = found.groups()
            status = 409 if branch in state.repos[repo] else 200
            state.repos[repo].setdefault(branch, dict(state.repos[repo]["main"]))
            return self.answer(status)
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/(.+)", path):
            files = json.loads(content)["files"]
            large = (".safetensors", ".png")
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            return self.answer(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(content)["objects"]
            todo = {"upload": {"href": "", "header": {}}}
            objects = []
            for item in wanted:
                entry = {"oid": item["oid"], "size": item["size"]}
                if item["oid"] not in state.objects:
                    entry["actions"] = {"upload": {**todo["upload"], "href": f"{base}/upload/{item['oid']}"}}
                objects.append(entry)
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/(.+)", path):
            return self.commit(*found.groups(), [json.loads(line) for line in content.splitlines() if line])
        return self.answer(404, {"error": f"no such call: {path}"})

    def commit(self, repo, branch, lines):
        state, changed = self.state, {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in state.objects:
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                changed[value["path"]] = state.objects[value["oid"]]
        state.repos[repo][branch].update(changed)
        state.commits.append((repo, branch, lines[0]["value"]["summary"], sorted(changed)))
        sha = hashlib.sha1(str(len(state.commits)).encode()).hexdigest()
        url = f"http://{self.headers['Host']}/{repo}/commit/{sha}"
        return self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def do_PUT(self):
        size = int(self.headers["Content-Length"])
        with self.state.lock:
            if self.state.cut_after is not None and len(self.state.uploads) >= self.state.cut_after:
                self.rfile.read(size // 2)
                self.close_connection = True
                self.connection.close()
                return
            content = self.rfile.read(size)
            oid = self.path.rsplit("/", 1)[-1]
            assert hashlib.sha256(content).hexdigest() == oid
            self.state.objects[oid] = content
            self.state.uploads.append(oid)
        self.answer(200)

    def do_GET(self):
        self.state.calls.append(f"GET {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "orgs": []})
        found = re.match(r"/api/models/([\w.-]+/[\w.-]+)", self.path)
        if found and found.group(1) in self.state.repos and self.state.may_write:
            return self.answer(200, {"id": found.group(1), "sha": "0" * 40, "siblings": []})
        return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")


@contextmanager
def hub_server():
    """Yield (address, state) of a running server."""
    state = HubState()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"state": state}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", state
    finally:
        server.shutdown()
        server.server_close()
