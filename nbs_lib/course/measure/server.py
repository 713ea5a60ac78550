"""Measuring processes: one per rank and row, forked from a server that has imported the libraries but never touched CUDA.

A fresh process per row begins with an empty allocator, and ends with everything that a failed row may have left. Importing torch and
transformers takes ten seconds, forking takes none. `Server` is the client's side; `python -m nbs_lib.course.measure.server` is the server.
A rank that fails ends the others at once, and its own error is the row's. If the server or its client dies, the ranks die with it.
"""
from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..processes import environment, free_port, last_words

GRACE = 0.5  # seconds that other ranks' last words are waited for, once one has failed


class Failed(RuntimeError):
    """A row that could not be measured; the message is the failing rank's own error."""


# --- the client's side ----------------------------------------------------------------------------------------------------------

class Server:
    """A server process. `classes`: names of the transformers classes to import beforehand; `libraries`: other modules.

    Use it as a context; `run(job, limit)` may be called many times. Raises Failed when a job fails, and when the server itself does.
    """

    def __init__(self, classes: list[str] = [], libraries: list[str] = []):
        self.words = tempfile.TemporaryFile("w+")
        answers, theirs = os.pipe()
        jobs = json.dumps({"out": theirs, "parent": os.getpid(), "classes": classes, "libraries": libraries})
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "nbs_lib.course.measure.server", "serve", jobs], stdin=subprocess.PIPE, stdout=self.words, stderr=self.words,
                                        pass_fds=(theirs,), env=environment())
        os.close(theirs)
        self.answers = os.fdopen(answers, encoding="utf-8")

    def run(self, job: dict, limit: float = 300.0) -> list[dict]:
        """What each rank of the job measured, rank 0 first. After `limit` seconds the ranks are ended and the job has failed."""
        try:
            self.process.stdin.write((json.dumps({"job": job, "limit": limit}) + "\n").encode())
            self.process.stdin.flush()
            line = self.answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.words.seek(0)
            raise Failed(f"the measuring process did not start: {last_words(self.words.read()) or 'it said nothing'}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["ranks"]

    def close(self) -> None:
        """End the server, and with it whatever it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for f in (self.process.stdin, self.answers, self.words):
            try:
                f.close()
            except OSError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


# --- the server -----------------------------------------------------------------------------------------------------------------

def die_with(parent: int) -> None:
    """On Linux: this process is killed when its parent, the process of that id, ends, however it ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended already
            os._exit(1)


def serve(options: dict) -> None:
    """Answer jobs, one line of JSON each, until stdin ends."""
    die_with(options["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the client's to answer
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    out = os.fdopen(options["out"], "w", encoding="utf-8")
    forks = sys.platform == "linux" and load(options)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ranks": conduct(request["job"], request["limit"], forks, out)}
        except Failed as e:
            answer = {"error": str(e)}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def load(options: dict) -> bool:
    """Import what ranks need. Whether forked processes can then use CUDA; if an import started it here, ranks are fresh processes."""
    import importlib

    import torch
    import transformers

    for name in options["classes"]:
        getattr(transformers, name)
    for name in options["libraries"]:
        try:
            importlib.import_module(name)
        except Exception:  # a rank that needs it will say so
            pass
    import gc

    gc.collect()
    gc.freeze()
    if not hasattr(torch._C, "_cuda_getDeviceCount") or _forks_well():
        return True
    if options["libraries"]:  # one of them may have been it: once more without
        os.execv(sys.executable, [sys.executable, "-W", "ignore", "-m", "nbs_lib.course.measure.server", "serve", json.dumps({**options, "libraries": []})])
    return False


def _forks_well() -> bool:
    """Whether a forked process can count the devices."""
    import torch

    if torch.cuda.is_initialized():
        return False
    child = os.fork()
    if child == 0:
        try:
            bad = torch.cuda._is_in_bad_fork()
            if not bad and sys.platform == "linux" and Path("/dev/nvidiactl").exists():
                bad = torch._C._cuda_getDeviceCount() < 1
            os._exit(1 if bad else 0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


# --- ranks of one job -----------------------------------------------------------------------------------------------------------

@dataclass
class Rank:
    """A running rank: its process, the pipe that it answers on, the log of what it prints."""

    rank: int
    pid: int
    pipe: int
    log: Path
    said: bytes = b""
    answer: dict | None = None
    status: int | None = None
    ended: float = field(default=0.0)

    def finish(self) -> None:
        """Its pipe is closed: note what it said and how it ended."""
        os.close(self.pipe)
        _, self.status = os.waitpid(self.pid, 0)
        self.ended = time.time()
        if self.said:
            try:
                self.answer = json.loads(self.said)
            except json.JSONDecodeError:
                pass

    def kill(self) -> None:
        if self.status is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.finish()

    @property
    def failed(self) -> bool:
        return self.status is not None and (self.answer is None or "error" in self.answer)

    @property
    def over(self) -> bool:
        """Whether the others need not go on: it failed, or its memory is full."""
        return self.failed or self.answer is not None and "oom" in self.answer

    def why(self) -> str:
        """What went wrong, as a sentence."""
        if self.answer:
            return self.answer["error"]
        code = os.waitstatus_to_exitcode(self.status)
        end = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        hint = "; the machine may have run out of host memory" if code == -9 else ""
        words = last_words(self.log.read_text(errors="replace")) if self.log.exists() else ""
        return f"the process {end}{hint}" + (f"; its last words: {words[:300]}" if words else "")


def conduct(job: dict, limit: float, forks: bool, *close: Any) -> list[dict]:
    """Run a job's ranks to their end; returns what each measured, or where one's memory is full, that. Raises Failed. No process is left."""
    world, ranks = job["settings"].get("world_size", 1), []
    job = {**job, "port": free_port(), "limit": limit}
    with tempfile.TemporaryDirectory(prefix="nbs-measure-") as folder:
        try:
            for rank in range(world):
                ranks.append((_fork if forks else _spawn)(job, rank, Path(folder) / f"rank{rank}.log", close))
            on_time = _wait(ranks, time.monotonic() + limit)
            culprit = min((r for r in ranks if r.failed), key=lambda r: (r.answer is not None, r.answer["at"] if r.answer else r.ended), default=None)
            full = next((r for r in ranks if r.answer and "oom" in r.answer), None)
            if full:
                return [full.answer]
            if culprit:
                raise Failed((f"rank {culprit.rank}: " if world > 1 else "") + culprit.why())
            if not on_time:
                raise Failed(f"it ran past its limit of {limit:g} seconds and was ended")
            return [r.answer for r in ranks]
        finally:
            for r in ranks:
                r.kill()


def _wait(ranks: list[Rank], deadline: float) -> bool:
    """Until all ranks have ended, one is over (and the others had a moment to say what they saw), or the deadline: then False."""
    chosen = selectors.DefaultSelector()
    for r in ranks:
        chosen.register(r.pipe, selectors.EVENT_READ, r)
    over = False
    while chosen.get_map():
        left = deadline - time.monotonic()
        if left <= 0:
            return over
        for key, _ in chosen.select(left):
            r, part = key.data, os.read(key.fd, 1 << 16)
            r.said += part
            if not part:
                chosen.unregister(key.fd)
                r.finish()
                if r.over and not over:
                    over, deadline = True, min(deadline, time.monotonic() + GRACE)
    return True


def _fork(job: dict, rank: int, log: Path, close: Any) -> Rank:
    ours, theirs = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid:
        os.close(theirs)
        return Rank(rank, pid, ours, log)
    try:  # the child never returns, whatever happens
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(ours)
        for f in close:
            os.close(f.fileno())
        words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (words, 1), (words, 2)):
            os.dup2(source, target)
        work(job, rank, theirs, parent)
    finally:
        os._exit(1)


def _spawn(job: dict, rank: int, log: Path, close: Any) -> Rank:
    ours, theirs = os.pipe()
    with open(log, "wb") as words:
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "nbs_lib.course.measure.server", "rank", json.dumps({"rank": rank, "out": theirs, "parent": os.getpid()})],
                                   stdin=subprocess.PIPE, stdout=words, stderr=words, pass_fds=(theirs,))
    os.close(theirs)
    process.stdin.write(json.dumps(job).encode())
    process.stdin.close()
    process.returncode = 0  # waited for by its pid
    return Rank(rank, process.pid, ours, log)


# --- one rank -------------------------------------------------------------------------------------------------------------------

def work(job: dict, rank: int, out: int, parent: int) -> None:
    """Do the job as this rank, write the answer to the pipe `out`, and end the process."""
    die_with(parent)
    code = 0
    try:
        store = join(job, rank)
        from .step import RUN

        answer = RUN[job["kind"]](job, rank, store)
        send(out, answer)
        if store is not None and "oom" not in answer:
            leave(store, rank, job["settings"]["world_size"])
    except BaseException as e:
        import traceback

        traceback.print_exc()
        send(out, {"error": words(e), "at": time.time()})
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(code)  # no exit handlers of the server's libraries, no waiting for other ranks


def send(out: int, answer: dict) -> None:
    """Write all of it; pipes take 64 KiB at a time."""
    data = json.dumps(answer).encode()
    while data:
        data = data[os.write(out, data):]


def words(e: BaseException) -> str:
    """An error as one line: its kind, its message, where it was raised."""
    import traceback

    frames = traceback.extract_tb(e.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:400]}{where}"


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join(job: dict, rank: int) -> Any:
    """Take this rank's device and, but for strategy "single", its place in the process group; returns the store that ranks share, or None."""
    import torch

    cuda, c = job["device"] == "cuda", job["settings"]
    # what is offloaded is updated on the CPU: if each rank takes all of its cores, ranks wait for each other's threads
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cpus() // c.get("world_size", 1))))
    if cuda:
        torch.cuda.set_device(rank)
    if c.get("strategy", "single") == "single":
        return None
    from datetime import timedelta

    import torch.distributed as dist

    if not cuda and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    world, wait = c["world_size"], timedelta(seconds=job["limit"])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    store = dist.TCPStore("127.0.0.1", job["port"], world, is_master=rank == 0, timeout=wait)
    device = dict(device_id=torch.device("cuda", rank)) if cuda else {}
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=wait, **device)
    return store


def leave(store: Any, rank: int, world: int) -> None:
    """Rank 0 keeps the store, so it goes last."""
    store.set(f"done{rank}", "1")
    if rank == 0:
        store.wait([f"done{r}" for r in range(world)])


if __name__ == "__main__":
    what, given = sys.argv[1], json.loads(sys.argv[2])
    if what == "serve":
        serve(given)
    else:
        work(json.load(sys.stdin), given["rank"], given["out"], given["parent"])
