"""A hub on 127.0.0.1 that huggingface_hub speaks with over HTTP, as much of it as downloads need.

It answers ModelScope's addresses, too, for the same files.
"""

import hashlib
import json
import socket
import struct
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from time import sleep

SHA = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`files`: {repository: {name: bytes}}; `fail`, `cut` and `moved_to` say what goes wrong; `seen` what was asked."""

    def __init__(self, files):
        self.files = files
        self.fail = None
        """(status, X-Error-Code or "", X-Error-Message, "api" or "resolve": where)"""
        self.cut = None
        """name of a file whose connection ends at 40 %, until this is None again"""
        self.reset = True
        """whether that end is a reset; otherwise the answer is short, and only the first is"""
        self.silent = None
        """name of a file whose connection stays open at 40 % without another byte, until this is None again"""
        self.moved_to = None
        """address of another hub that has the bytes, as a content network"""
        self.spoiled = None
        """name of a file that comes with its last byte changed"""
        self.listed = []
        """rows of ModelScope's list that stand in the place of a file's own, or beside the others"""
        self.ranges = True
        """whether a part of a file can be asked for"""
        self.seen = []
        """(method, path, authorization or None, range or None)"""
        self.port = 0

    def tokens(self):
        return {authorization for _, _, authorization, _ in self.seen}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.hub, self.path.partition("?")[0]
        hub.seen.append((self.command, path, self.headers.get("Authorization"), self.headers.get("Range")))
        parts = path.strip("/").split("/")
        api, modelscope = parts[0] == "api", parts[:2] == ["api", "v1"]
        parts = parts[1:] if modelscope or parts[0] == "models" else parts
        repo = "/".join(parts[2:4] if api else parts[:2])
        if hub.fail and hub.fail[3] == ("api" if api else "resolve"):
            status, code, message, _ = hub.fail
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            return self.answer(status, b"", {key: value for key, value in headers.items() if value})
        if repo not in hub.files:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        files = hub.files[repo]
        if modelscope:
            rows = {"folder": {"Path": "folder", "Size": 0, "Type": "tree"}}
            for name, data in files.items():
                rows[name] = {"Path": name, "Size": len(data), "Sha256": digest(data), "Type": "blob"}
            rows |= {row["Path"]: rows.get(row["Path"], {}) | row for row in hub.listed}
            return self.answer(200, json.dumps({"Code": 200, "Data": {"Files": list(rows.values())}}).encode())
        if api and "tree" in parts:
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)} for name, data in files.items()
            ]
            return self.answer(200, json.dumps(rows).encode())
        if api:
            sums = {name: {"sha256": digest(data), "size": len(data), "pointerSize": 9} for name, data in files.items()}
            siblings = [{"rfilename": name, "size": one["size"], "lfs": one} for name, one in sums.items()]
            body = {"id": repo, "modelId": repo, "sha": SHA, "siblings": siblings, "private": False, "tags": []}
            return self.answer(200, json.dumps(body).encode())
        name = "/".join(parts[4:])
        if name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        data = files[name]
        known = {"X-Repo-Commit": SHA, "ETag": f'"{digest(data)}"'}
        if hub.moved_to:
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest(data)}"'}
            return self.answer(302, b"", {**known, **linked, "Location": hub.moved_to + path})
        if name == hub.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = self.headers.get("Range") if hub.ranges else None
        start = int((asked or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            known["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(206 if start else 200, data[start:], known, cut=name in (hub.cut, hub.silent))

    def answer(self, status, body, headers=None, cut=False):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if not cut:
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) * 2 // 5])
        self.wfile.flush()
        self.close_connection = True
        while self.hub.silent:
            sleep(0.02)
        if not self.hub.reset:
            self.hub.cut = None
            return
        sleep(0.2)  # what was sent has arrived
        # closed with a reset: the client gives up at once, where it would try a short answer six times
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())


def weights(data, name="x"):
    """A safetensors file with those bytes as its one tensor."""
    header = json.dumps({name: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


@cache
def parts_of(row):
    """The repositories of a variant's transformer, autoencoder and text encoders, in few bytes."""
    return {
        row.repo: {
            row.flow_file: weights(b"f" * 900),
            "ae.safetensors": weights(b"a" * 500),
            "text_encoder_2/config.json": b"{}",
            "text_encoder_2/model.safetensors": weights(b"t" * 300),
            "tokenizer_2/spiece.model": b"s",
        },
        row.clip: {"config.json": b"{}", "model.safetensors": weights(b"c")},
        row.t5: {"config.json": b"{}", "spiece.model": b"s"},
    }


def digest(data):
    return hashlib.sha256(data).hexdigest()


@contextmanager
def fake_hub(files):
    """A running hub; its address is `http://127.0.0.1:{hub.port}`."""
    hub = FakeHub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
