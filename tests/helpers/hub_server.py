"""A Hugging Face Hub of one process: the endpoints that huggingface_hub asks when it downloads and uploads a model."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories: name -> commits (oldest first) of files, and branches. `asked` has the paths of all requests."""

    def __init__(self):
        self.commits, self.branches, self.asked, self.created = {}, {}, [], {}

    def commit(self, name, files, branch="main"):
        """Add a commit; returns its hash."""
        history = self.commits.setdefault(name, {})
        digest = hashlib.sha1(f"{name} {len(history)}".encode()).hexdigest()
        history[digest] = dict(files)
        self.branches.setdefault(name, {})[branch] = digest
        return digest

    def files(self, name, revision):
        """(commit, files) of a branch or commit; None where there is none."""
        commit = self.branches.get(name, {}).get(revision, revision)
        return (commit, self.commits[name][commit]) if commit in self.commits.get(name, {}) else None


@contextmanager
def serving(hub):
    """Serve a `Hub`; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def reply(self, body, status=200, **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self, code="EntryNotFound"):
            self.reply({"error": code}, 404, X_Error_Code=code)

        def do_GET(self):
            hub.asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                name, kind, revision = found.groups()
                if name not in hub.commits:
                    return self.missing("RepoNotFound")
                if (stored := hub.files(name, revision or "main")) is None:
                    return self.missing("RevisionNotFound")
                if kind == "tree":
                    return self.reply(
                        [{"type": "file", "path": p, "size": len(d), "oid": etag(d)} for p, d in stored[1].items()]
                    )
                return self.reply(
                    {"id": name, "sha": stored[0], "siblings": [{"rfilename": path} for path in stored[1]]}
                )
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                name, revision, file = found.groups()
                stored = hub.files(name, revision)
                if stored is None or file not in stored[1]:
                    return self.missing()
                return self.reply(stored[1][file], ETag=f'"{etag(stored[1][file])}"', X_Repo_Commit=stored[0])
            self.missing()

        do_HEAD = do_GET

        def do_POST(self):
            hub.asked.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/validate-yaml":  # of the card
                return self.reply({"errors": [], "warnings": []})
            if self.path == "/api/repos/create":
                if self.headers.get("Authorization") != "Bearer hf_pass":
                    return self.reply({"error": "Invalid username or password."}, 401)
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name in hub.created:
                    return self.reply({"error": "exists", "url": f"{address}/{name}"}, 409)
                hub.created[name] = asked
                hub.commit(name, {})
                return self.reply({"url": f"{address}/{name}", "name": name})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", self.path):
                name, branch = found.groups()
                hub.branches[name].setdefault(branch, hub.branches[name]["main"])
                return self.reply({})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/?]+).*", self.path):
                asked = json.loads(body)["files"]
                rows = [{"path": row["path"], "uploadMode": "regular", "shouldIgnore": False} for row in asked]
                return self.reply({"files": rows})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/?]+).*", self.path):
                name, branch = found.groups()
                files = dict(hub.files(name, branch)[1])
                for line in body.splitlines():
                    row = json.loads(line)
                    if row["key"] == "file":
                        files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                    if row["key"] == "deletedFile":
                        del files[row["value"]["path"]]
                commit = hub.commit(name, files, branch)
                return self.reply({"commitUrl": f"{address}/{name}/commit/{commit}", "commitOid": commit})
            self.missing()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def etag(data):
    return hashlib.sha1(data).hexdigest()
