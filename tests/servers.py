"""Servers on loopback: S3 (moto), files over HTTP, and a proxy that cuts connections."""

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def s3_server():
    """Moto's server as a process of its own; gives its address."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/moto-api/", timeout=5).close()
                break
            except (OSError, urllib.error.URLError):
                if server.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()


class Loopback(ThreadingHTTPServer):
    """Serves on a free port of this machine, in a thread, while the context is open."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that goes away is no error here."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_error):
        self.shutdown()
        self.server_close()


class FileServer(Loopback):
    """Serves a folder over HTTP, with or without byte ranges, and does what a test asks it to do wrong.

    Attributes:
        cuts: for requests of units to come, after how many bytes of the answer the connection is closed.
        every_cut: the same for every request of a unit.
        flips: files of which one byte is changed on its way, and which.
        requests: (method, path, range) of every request so far.
        slow: seconds before each 4,096 bytes of a unit.
    """

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        super().__init__(_Files)
        self.folder, self.ranges = folder, ranges
        self.cuts: list[int] = []
        self.every_cut: int | None = None
        self.flips: dict[str, int] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.slow = 0.0
        self.connections: list[socket.socket] = []

    def fetched(self, part: str) -> list[tuple[str, str, str | None]]:
        """GET requests of paths that contain `part`."""
        return [request for request in self.requests if request[0] == "GET" and part in request[1]]

    def __exit__(self, *error):
        super().__exit__(*error)
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Files(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.server.connections.append(self.connection)

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        asked = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, asked))
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = bytearray(path.read_bytes())
        if self.path in self.server.flips:
            content[self.server.flips[self.path]] ^= 1
        start, stop = 0, len(content)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        if found and self.server.ranges:
            start, stop = int(found[1]), min(int(found[2] or stop) + 1, stop)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            self._send(bytes(content[start:stop]))

    def _send(self, content):
        unit = "/units/" in self.path
        cut = self.server.every_cut
        if unit and self.server.cuts:
            cut = self.server.cuts.pop(0)
        if unit and cut is not None and cut < len(content):
            self.wfile.write(content[:cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        for start in range(0, len(content), 4096):
            if unit and self.server.slow:
                time.sleep(self.server.slow)
            self.wfile.write(content[start : start + 4096])

    def log_message(self, *_arguments):
        """Be quiet."""


class CuttingProxy:
    """Passes TCP connections on, and closes the next ones after `cuts` bytes of answers; then it passes all."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self.cuts: list[int] = []
        self.cut = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_error):
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source, target, answer):
        with contextlib.suppress(OSError):
            while block := source.recv(4096):
                if answer and self.cuts:
                    self.cuts[0] -= len(block)
                    if self.cuts[0] < 0:
                        self.cuts.pop(0)
                        self.cut += 1
                        break
                target.sendall(block)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def copy_of(folder: Path, to: Path) -> Path:
    """A copy of a folder that a test may damage."""
    shutil.copytree(folder, to)
    return to
