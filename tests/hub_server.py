"""A hub on this machine, for tests of what is fetched from one."""

import contextlib
import hashlib
import http.server
import json
import re
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(http.server.BaseHTTPRequestHandler):
    """The part of the hub's file API that a download uses, over directories of ``server.models``.

    A data set's name there begins with ``datasets/``, as in its addresses.
    """

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            repo, what, revision = match.groups()
            if self.known(repo, revision):
                self.listing(repo, what)
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = match.groups()
            if self.known(repo, revision):
                self.file(repo, name)
        else:
            self.answer(404, X_Error_Code="EntryNotFound")

    def known(self, repo, revision):
        if repo in self.server.broken:
            self.answer(500, X_Error_Message="out of order")
        elif repo not in self.server.models:
            # As the real hub answers without a token: 401, so as not to tell private from missing.
            self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif revision not in ("main", "v1", COMMIT):
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        else:
            return True
        return False

    def listing(self, repo, what):
        files = sorted(f for f in self.server.models[repo].rglob("*") if f.is_file())
        names = [str(f.relative_to(self.server.models[repo])) for f in files]
        if what == "revision":
            data = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        else:
            data = [
                {
                    "type": "file",
                    "path": n,
                    "size": f.stat().st_size,
                    "oid": hashlib.sha1(n.encode()).hexdigest(),
                }
                for n, f in zip(names, files, strict=True)
            ]
        self.answer(200, json.dumps(data).encode(), Content_Type="application/json")

    def file(self, repo, name):
        if repo in self.server.gated:
            # Without a token, then with one that has no access: 401 and 403, both named gated.
            status = 403 if "Authorization" in self.headers else 401
            self.answer(status, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            return
        file = self.server.models[repo] / name
        if not file.is_file():
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        body = file.read_bytes()
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        self.answer(200, body, ETag=etag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")


@contextlib.contextmanager
def serve(home, monkeypatch):
    """A server that the environment names as the hub, with its cache in ``home``."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.models, server.gated, server.broken, server.requests = {}, set(), set(), []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def unreachable(monkeypatch):
    """Name a hub that nobody answers at; returns its port."""
    with http.server.HTTPServer(("127.0.0.1", 0), HubHandler) as closed:
        port = closed.server_port
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    return port
