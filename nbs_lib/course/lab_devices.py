"""Checks that need several devices: one process whose JAX has eight simulated CPU devices, also where this one's JAX has a GPU or has started already."""
from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import tempfile
from typing import Any, BinaryIO

from .processes import environment, last_words

DEVICES = 8
_process: subprocess.Popen | None = None


def begin() -> None:
    """Start the process, where there is none; importing JAX takes it some seconds. It ends when its input does, so with this one at the latest."""
    global _process
    if _process is None or _process.poll() is not None:
        log = tempfile.TemporaryFile()
        _process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                    start_new_session=True, env=environment() | {"CUDA_VISIBLE_DEVICES": ""})
        _process.log = log


def on_devices(module: str, function: str, *args: Any) -> Any:
    """module.function(*args) in that process: what it returns, or RuntimeError with what it raised. Named, not passed: a notebook's functions cannot travel."""
    try:
        ok, answer = _ask(module, function, args)
    except (EOFError, BrokenPipeError):  # somebody has ended it: once more, with a new one
        _process.wait()
        try:
            ok, answer = _ask(module, function, args)
        except (EOFError, BrokenPipeError):
            status = _process.wait()
            _process.log.seek(0)
            said = last_words(_process.log.read().decode(errors="replace")) or f"exit status {status}"
            raise RuntimeError(f"the process with {DEVICES} simulated devices has ended: {said}") from None
    if not ok:
        raise RuntimeError(answer)
    return answer


def _ask(*request: Any) -> tuple[bool, Any]:
    begin()
    try:
        pickle.dump(request, _process.stdin)
        _process.stdin.flush()
        return pickle.load(_process.stdout)
    except KeyboardInterrupt:  # an answer that nobody waits for any more would be taken for the next one's
        _process.kill()
        raise


def _answer(requests: BinaryIO, answers: BinaryIO) -> None:
    """Runs there: answer what is asked until nobody can ask any more."""
    from nbs_lib.spmd import simulate

    simulate(DEVICES)
    while True:
        try:
            module, function, args = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = True, getattr(importlib.import_module(module), function)(*args)
        except Exception as e:
            reply = False, f"{type(e).__name__}: {e}"
        pickle.dump(reply, answers)
        answers.flush()


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # what is printed must not get between the answers
    _answer(sys.stdin.buffer, answers)
