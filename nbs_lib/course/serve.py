"""Servers on this machine only: the site (with reload after a build) and JupyterLab on the learner's folder."""
from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
#: Where the pages expect JupyterLab; the server puts the real address in its place.
LAB_ADDRESS = "http://localhost:8888/lab/tree/"
RELOAD = """<script>(() => { let built; setInterval(async () => {
  try { const now = await (await fetch("/.built")).text(); if (built && now !== built) location.reload(); built = now; } catch {}
}, 1000); })();</script>"""


def free_port(wanted: int) -> int:
    """`wanted` or the next free port above it, of 50. Raises OSError when none is free."""
    for port in range(wanted, wanted + 50):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((HOST, port))
                return port
            except OSError:
                continue
    raise OSError(f"no free port from {wanted} to {wanted + 49} on {HOST}")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Static files; pages get JupyterLab's real address and, while watching, the reload script."""

    def __init__(self, *args, state: "Site", **kwargs):
        self.state = state
        super().__init__(*args, directory=str(state.folder), **kwargs)

    def do_GET(self):
        if self.path == "/.built":
            return self._send(str(self.state.built).encode(), "text/plain")
        path = Path(self.translate_path(self.path))
        if path.is_dir() and self.path.endswith("/"):
            path = path / "index.html"
        if path.suffix == ".html" and path.is_file():
            page = path.read_text(encoding="utf-8")
            if self.state.lab:
                page = page.replace(LAB_ADDRESS, self.state.lab.tree).replace('.ipynb">Open in the local JupyterLab', f'.ipynb?token={self.state.lab.token}">Open in the local JupyterLab')
            if self.state.watching:
                page = page.replace("</body>", RELOAD + "</body>")
            return self._send(page.encode(), "text/html; charset=utf-8")
        return super().do_GET()

    def _send(self, data: bytes, kind: str):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@dataclass
class JupyterLab:
    """A running JupyterLab: its process, port (known once it answers: see `wait`) and token."""

    process: subprocess.Popen
    port: int
    token: str
    log: Path

    @property
    def tree(self) -> str:
        return f"http://localhost:{self.port}/lab/tree/"

    @property
    def address(self) -> str:
        return f"http://localhost:{self.port}/lab?token={self.token}"

    def wait(self, seconds: float = 60) -> bool:
        """Whether it answers within `seconds`."""
        from jupyter_core.paths import jupyter_runtime_dir

        said, until = Path(jupyter_runtime_dir()) / f"jpserver-{self.process.pid}.json", time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:  # the server writes its port down, since it takes the next when its first choice is in use
                self.port = json.loads(said.read_text())["port"]
            except (OSError, ValueError, KeyError):
                pass
            else:
                if answers(f"http://{HOST}:{self.port}/api/status?token={self.token}"):
                    return True
            time.sleep(0.2)
        return False

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def jupyterlab(folder: Path, port: int = 8888) -> JupyterLab:
    """Start JupyterLab on `folder`. Raises RuntimeError when JupyterLab is not installed."""
    if importlib.util.find_spec("jupyterlab") is None:
        raise RuntimeError("JupyterLab is not installed here: pip install 'nbs_lib[labs]' (or `make course` in the repository)")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".nbs").mkdir(exist_ok=True)
    token, log = secrets.token_hex(16), folder / ".nbs" / "jupyterlab.log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.ip={HOST}", f"--ServerApp.port={port}", "--ServerApp.port_retries=50",
               f"--ServerApp.root_dir={folder}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--ServerApp.allow_root=True")
    # The token goes by environment, where other users' `ps` does not show it; a session of its own keeps Ctrl-C from reaching it twice.
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env={**os.environ, "JUPYTER_TOKEN": token}, start_new_session=True)
    return JupyterLab(process, port, token, log)


class Site:
    """The site's server, in a thread of its own."""

    def __init__(self, folder: Path, port: int = 8000, lab: JupyterLab | None = None, watching: bool = False):
        self.folder, self.lab, self.watching, self.built = Path(folder), lab, watching, 1
        self.port = free_port(port)
        self.server = http.server.ThreadingHTTPServer((HOST, self.port), functools.partial(Handler, state=self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://localhost:{self.port}/"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def answers(address: str) -> bool:
    """Whether an HTTP GET of `address` succeeds."""
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def tunnel(*ports: int) -> str | None:
    """The `ssh -L` line that brings `ports` to the reader's own machine, when this is an SSH session."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) < 4:
        return None
    import getpass

    return f"ssh {' '.join(f'-L {p}:localhost:{p}' for p in ports)} -p {connection[3]} {getpass.getuser()}@{connection[2]}"
