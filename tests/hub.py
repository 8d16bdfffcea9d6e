"""A stand-in for the Hugging Face hub: an HTTP server on this machine that gives out folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from offload.model import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".gguf")  # files that the hub keeps in large-file storage


@dataclass
class StandIn:
    """What the stand-in gives out, how it fails, and what it was asked."""

    url: str = ""
    folders: dict[str, Path] = field(default_factory=dict)  # id -> files
    gated: set[str] = field(default_factory=set)
    # File -> bytes after which the connection is lost, in one answer after the other.
    break_after: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # file -> size that the listing claims
    status: dict[str, int] = field(default_factory=dict)  # file, or "api" -> status of the answer
    asked: list[str] = field(default_factory=list)  # METHOD path [first byte]

    def fetched(self) -> set[str]:
        """The files whose content was sent."""
        gets = (line.split() for line in self.asked)
        return {
            words[1].split("/", 5)[5]
            for words in gets
            if words[0] == "GET" and "/resolve/" in words[1]
        }


def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            first = (self.headers.get("Range") or "").partition("=")[2]
            hub.asked.append(f"{self.command} {path} {first}".strip())
            words = path.strip("/").split("/")
            id = "/".join(words[2:4] if words[0] == "api" else words[:2])
            if id not in hub.folders:
                return self.refuse(404, "RepoNotFound")
            if id in hub.gated:
                return self.refuse(403, "GatedRepo")
            if status := hub.status.get("api" if words[0] == "api" else words[-1]):
                return self.refuse(status, "")
            if words[0] == "api":
                return self.describe(id, words[5] if len(words) > 5 else "main")
            file = hub.folders[id] / "/".join(words[4:])
            if not file.is_file():
                return self.refuse(404, "EntryNotFound")
            return self.send(file, first, body)

        def describe(self, id: str, revision: str) -> None:
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            folder, siblings = hub.folders[id], []
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    path = file.relative_to(folder).as_posix()
                    about: dict[str, Any] = {"rfilename": path, "blobId": _etag(file)}
                    about["size"] = size = hub.sizes.get(path, file.stat().st_size)
                    if file.suffix in LARGE:
                        about["lfs"] = {"sha256": _etag(file), "size": size, "pointerSize": 100}
                    siblings.append(about)
            data = json.dumps({"id": id, "sha": COMMIT, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def send(self, file: Path, span: str, body: bool) -> None:
            data = file.read_bytes()
            begin, _, end = span.partition("-")
            part = data[int(begin or 0) : int(end) + 1 if end else None]
            self.send_response(206 if span else 200)
            for name, value in (
                ("ETag", f'"{_etag(file)}"'),
                ("X-Repo-Commit", COMMIT),
                ("Content-Length", str(len(part))),
            ):
                self.send_header(name, value)
            self.end_headers()
            if body:
                breaks = hub.break_after.get(file.name)
                most = breaks.pop(0) if breaks else len(part)
                self.wfile.write(part[:most])
                if most < len(part):
                    self.close_connection = True

    return Handler


@contextmanager
def stand_in(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The hub of this process is the stand-in, and its cache is `cache`."""
    hub_stand_in = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub_stand_in))
    server.daemon_threads = True
    hub_stand_in.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    files = hub_stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (
        ("HF_HUB_OFFLINE", False),
        ("ENDPOINT", hub_stand_in.url),
        ("HF_HUB_CACHE", str(cache)),
        ("HUGGINGFACE_CO_URL_TEMPLATE", files),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # the one of an offline process refuses to connect
    hub.forget()
    try:
        yield hub_stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        huggingface_hub.close_session()
        hub.forget()
