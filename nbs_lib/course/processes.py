"""Other processes: their environment, a free port, what they said last, and launchers that are run so that nothing of theirs is left."""
from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # torch.cuda.is_available() asks NVML, so that a library's import does not start CUDA in the server


def environment() -> dict[str, str]:
    """The environment of measuring processes: this one's, and where this package is."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **{k: v for k, v in ENVIRONMENT.items() if k not in os.environ}, "PYTHONPATH": path}


def last_words(text: str) -> str:
    """The last line of a log that names an error, else the last that says something."""
    lines = [line.strip() for line in reversed(text.splitlines()) if line.strip()]
    return next((line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[0] if lines else "")


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- launchers and their ranks -------------------------------------------------------------------------------------------------

def marked(mark: str) -> list[int]:
    """The processes whose environment holds `mark` (Linux; elsewhere none)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder/"environ").read_bytes(): found.append(int(folder.name))
        except OSError: pass                                   # ended meanwhile, or another user's
    return found


def end(processes: list, mark: str, grace: float = 5) -> None:
    """End launchers, which then end their ranks; after `grace` seconds whatever bears the mark is killed."""
    for p in processes:
        if p.poll() is None: p.terminate()
    until = time.monotonic() + grace
    while any(p.poll() is None for p in processes) and time.monotonic() < until: time.sleep(0.05)
    for pid in marked(mark):
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
    for p in processes:
        if p.poll() is None: p.kill()
        p.wait()


def run(commands: list[list[str]], env: dict[str, str] | None = None, limit: float = 60,
        cwd: str | None = None) -> list[tuple[int | None, str]]:
    """Run commands side by side; (exit code, output) of each, None where `limit` seconds were not enough. No
    process that they started is left, not even one whose launcher died.
    """
    mark, outputs, processes = f"NBS_LAUNCH={uuid.uuid4().hex}", [], []
    env = {**(os.environ if env is None else env), **dict([mark.split("=")])}
    try:
        for command in commands:
            outputs.append(tempfile.TemporaryFile())
            processes.append(subprocess.Popen(command, stdout=outputs[-1], stderr=subprocess.STDOUT, env=env,
                                              cwd=cwd,
                                              stdin=subprocess.DEVNULL, start_new_session=True))
        until = time.monotonic() + limit
        while any(p.poll() is None for p in processes) and time.monotonic() < until: time.sleep(0.05)
        codes = [p.poll() for p in processes]
    finally:
        end(processes, mark)
    texts = []
    for output in outputs:
        output.seek(0)
        texts.append(output.read().decode(errors="replace"))
        output.close()
    return list(zip(codes, texts))
