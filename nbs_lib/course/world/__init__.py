"""Several ranks from a notebook or a test: real processes, each a Jupyter kernel of its own, with torch.distributed set up between them.

`World(2)` starts them; `run` calls a function on each, `execute` runs a cell's text on each, `get` asks each for a value. In a notebook,
`%load_ext nbs_lib.course.world` gives the cell magic `%%ranks`. A rank that fails is reported with its own traceback, and since the
others may wait for it for ever, all are ended within seconds; so are ranks that wait for each other. None outlives its caller.
"""
from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Sequence

from ..oracles import FOLDER as ORACLES
from ..processes import environment, last_words
from .stuck import Stuck, explain

LOST = re.compile(r"gloo.*(?:Connection (?:reset|closed) by peer|Broken pipe)", re.S | re.I)  # what a rank says when another one has ended
GRACE = 2.0  # seconds that other ranks are waited for, once one has failed


class RankError(RuntimeError):
    """What went wrong on the ranks, for people: which rank, its own traceback, and what was done. `ranks`: those that failed."""

    def __init__(self, message: str, ranks: Sequence[int] = ()):
        super().__init__(message)
        self.ranks = tuple(ranks)

    def _render_traceback_(self):
        return str(self).splitlines()


@dataclass
class Answer:
    """What a rank said of one request. `error`: its traceback."""

    rank: int
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    done: bool = False


class World:
    """`ranks` processes with a process group between them: NCCL where there are as many GPUs, else gloo on the CPU.

    backend: "gloo" or "nccl" instead. patience: seconds after which ranks that only wait for each other are ended. limit: seconds that a
    collective may take by its own clock. Use it as a context, or call `stop`. Raises ValueError for what this machine cannot do, and RankError
    when ranks do not come up.
    """

    def __init__(self, ranks: int = 2, backend: str | None = None, patience: float = 5.0, limit: float = 600.0):
        self.ranks, self.backend = ranks, checked(ranks, backend)
        self.patience, self.limit = patience, limit
        self.folder = Path(tempfile.mkdtemp(prefix="nbs-"))
        self.processes: list[subprocess.Popen] = []
        self.clients: list[Any] = []
        self._finalizer = weakref.finalize(self, _end, self.processes, self.clients, self.folder)
        try:
            for rank in range(ranks):
                self._start(rank)
            self._begin()
        except BaseException:
            self.stop()
            raise

    # --- what people call

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> list:
        """function(*args, **kwargs) on every rank; their results, rank 0 first. It must be importable there: a module's, not a cell's."""
        if getattr(function, "__module__", "__main__") == "__main__":
            raise ValueError(f"{getattr(function, '__name__', function)!r} is defined in this notebook or script, where ranks cannot import it; "
                             "define it in a %%ranks cell, or in a module.")
        self._must_live()
        given = self.folder / "call.pkl"
        given.write_bytes(pickle.dumps((function.__module__, function.__qualname__, args, kwargs)))
        files = [self.folder / f"answer{r}.pkl" for r in range(self.ranks)]
        self._conduct([f"__import__('nbs_lib.course.world.inside', fromlist=['call']).call({str(given)!r}, {str(f)!r})" for f in files])
        return [pickle.loads(f.read_bytes()) for f in files]

    def execute(self, source: str, on: Sequence[int] | None = None, show: Callable[[str], None] = print) -> list[list[str]]:
        """A cell's text on every rank (or on those in `on`); what they print is shown, rank by rank. The printed lines, by rank."""
        wanted = range(self.ranks) if on is None else on
        if bad := [r for r in wanted if r not in range(self.ranks)]:
            raise ValueError(f"rank {bad[0]} is not there; accepted are 0 to {self.ranks - 1}.")
        answers = self._conduct([source if r in wanted else None for r in range(self.ranks)], show)
        return [a.lines for a in answers]

    def get(self, expression: str) -> list:
        """The value of an expression on every rank."""
        files = [self.folder / f"answer{r}.pkl" for r in range(self.ranks)]
        self._conduct([f"__import__('nbs_lib.course.world.inside', fromlist=['give']).give({expression}, {str(f)!r})" for f in files])
        return [pickle.loads(f.read_bytes()) for f in files]

    def stop(self) -> None:
        """End all ranks, at once. A second time does nothing."""
        self._finalizer()

    @property
    def alive(self) -> bool:
        """Whether the ranks still run."""
        return self._finalizer.alive

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    # --- how it works

    def _must_live(self) -> None:
        if not self.alive:
            raise RankError("these ranks have ended; start new ones with World(…), or with a %%ranks cell.")

    def _start(self, rank: int) -> None:
        """One rank's process: an ordinary kernel, which its client reaches through sockets in this world's folder."""
        from jupyter_client import BlockingKernelClient
        from jupyter_client.connect import write_connection_file

        file, _ = write_connection_file(str(self.folder / f"rank{rank}.json"), transport="ipc", ip=str(self.folder / f"rank{rank}"))
        os.mkfifo(self.folder / f"ask{rank}")
        log = open(self.folder / f"rank{rank}.log", "w")
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", file, "--IPKernelApp.capture_fd_output=False",
                                    "--InteractiveShell.xmode=Plain", "--InteractiveShell.colors=nocolor"],
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=self._environment(rank))
        log.close()
        self.processes.append(process)
        client = BlockingKernelClient(connection_file=file)
        client.load_connection_file()
        client.start_channels(stdin=False, hb=False)
        self.clients.append(client)

    def _environment(self, rank: int) -> dict[str, str]:
        """As torchrun sets it, and this process's search path, so that ranks import what it can, but for oracles."""
        own = environment()
        searched = [os.path.abspath(p) for p in sys.path if p and p != str(ORACLES)]
        path = os.pathsep.join(dict.fromkeys([*searched, os.getcwd(), own["PYTHONPATH"]]))
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        more = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks, "MASTER_ADDR": "127.0.0.1", "NBS_BACKEND": self.backend,
                "JPY_PARENT_PID": os.getpid(), "GLOO_SOCKET_IFNAME": loopback, "PYTHONPATH": path}
        if self.backend == "gloo":
            more |= {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
        return {**own, **{k: str(v) for k, v in more.items()}}

    def _begin(self) -> None:
        """Wait for the kernels, then let them join the process group."""
        until = time.monotonic() + 120
        for rank, client in enumerate(self.clients):
            while not self._answers(client):
                if self.processes[rank].poll() is not None or time.monotonic() > until:
                    raise RankError(f"rank {rank} did not start: {self._last_words(rank) or 'its kernel said nothing'}", [rank])
        store = self.folder / "store"
        self._conduct([f"__import__('nbs_lib.course.world.inside', fromlist=['begin']).begin(globals(), {os.getpid()}, {str(store)!r}, {str(self.folder / f'ask{r}')!r}, {self.limit})"
                       for r in range(self.ranks)])

    @staticmethod
    def _answers(client: Any) -> bool:
        """Whether a kernel answers a question on both channels: its output channel may connect later, and then has missed some."""
        from queue import Empty

        message = client.kernel_info()
        try:
            while client.get_shell_msg(timeout=1)["parent_header"].get("msg_id") != message:
                pass
            while client.get_iopub_msg(timeout=0.3)["parent_header"].get("msg_id") != message:
                pass
        except Empty:
            return False
        return True

    def _conduct(self, sources: Sequence[str | None], show: Callable[[str], None] | None = None) -> list[Answer]:
        """Send each rank its source, and wait until all have answered, one has failed, or they only wait for each other."""
        self._must_live()
        answers = [Answer(r, done=source is None) for r, source in enumerate(sources)]
        asked = [None if source is None else client.execute(source, allow_stdin=False) for client, source in zip(self.clients, sources)]
        try:
            self._await(answers, asked, Stuck(sources, self.patience))
        except KeyboardInterrupt:
            self.stop()
            raise RankError("Interrupted; the ranks were ended, and their variables are gone.") from None
        finally:
            if show:
                for line in together(answers):
                    show(line)
        if failed := [a for a in answers if a.error]:
            self._give_up(answers, failed)
        return answers

    def _await(self, answers: list[Answer], asked: list, stuck: Stuck) -> None:
        """Collect what the ranks say."""
        failed_at, poller = None, self._poller()
        while not all(a.done for a in answers):
            poller.poll(200)
            for a, client, message in zip(answers, self.clients, asked):
                if message is not None and not a.done:
                    self._listen(a, client, message)
                if not a.done and self.processes[a.rank].poll() is not None:
                    a.done, a.error = True, self._obituary(a.rank)
            if failed_at is None and any(a.error for a in answers):
                failed_at = time.monotonic()
            if failed_at and time.monotonic() > failed_at + GRACE:
                return
            pending = [a.rank for a in answers if not a.done]
            if not failed_at and pending and (where := stuck.look(pending, self.processes, self.folder)):
                self.stop()
                raise RankError(explain(where, stuck.sources, self.patience), pending)

    def _poller(self) -> Any:
        import zmq

        poller = zmq.Poller()
        for client in self.clients:
            poller.register(client.iopub_channel.socket, zmq.POLLIN)
        return poller

    @staticmethod
    def _listen(a: Answer, client: Any, message: str) -> None:
        """Take in what a rank has said since."""
        from queue import Empty

        while not a.done:
            try:
                said = client.get_iopub_msg(timeout=0)
            except Empty:
                return
            if said["parent_header"].get("msg_id") != message:
                continue
            kind, content = said["msg_type"], said["content"]
            if kind == "stream":
                (a.lines if content["name"] == "stdout" else a.warnings).append(content["text"])
            elif kind == "execute_result":
                a.lines.append(content["data"]["text/plain"] + "\n")
            elif kind == "error":
                a.error = readable(content["traceback"])
            elif kind == "status" and content["execution_state"] == "idle":
                a.done = True
                a.lines, a.warnings = "".join(a.lines).splitlines(), "".join(a.warnings).splitlines()

    def _give_up(self, answers: list[Answer], failed: list[Answer]) -> None:
        """Raise RankError. Where only some ranks failed, the others may wait for them for ever: all are ended."""
        if len({a.error for a in failed}) == 1 and len(failed) == self.ranks:
            raise RankError(f"all ranks failed alike:\n{failed[0].error}", range(self.ranks))
        lost = [a for a in failed if LOST.search(a.error)]
        if len(lost) < len(failed):  # it is another rank's failure that they saw
            failed = [a for a in failed if a not in lost]
        said = [f"rank {a.rank} failed:\n{a.error}" for a in failed]
        for what, some in (("lost its connection", lost if lost[0:1] != failed[0:1] else []), ("was still at work, or waited", [a for a in answers if not a.done]),
                           ("had finished", [a for a in answers if a.done and not a.error])):
            said += [f"rank {a.rank} {what}" for a in some]
        self.stop()
        raise RankError("\n".join([*said, "All ranks were ended, since their collectives no longer match."]), [a.rank for a in failed])

    def _obituary(self, rank: int) -> str:
        code = self.processes[rank].wait()
        how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit status {code}"
        hint = "; the system does this when memory runs out" if code == -signal.SIGKILL else ""
        words = self._last_words(rank)
        return f"its process ended {how}{hint}." + (f" Its last words: {words}" if words else "")

    def _last_words(self, rank: int) -> str:
        return last_words((self.folder / f"rank{rank}.log").read_text(errors="replace"))


def checked(ranks: int, backend: str | None) -> str:
    """The backend for so many ranks on this machine. Raises ValueError where it cannot be."""
    if type(ranks) is not int or ranks < 1:
        raise ValueError(f"ranks is {ranks!r}; accepted is a whole number from 1.")
    if backend not in (None, "gloo", "nccl"):
        raise ValueError(f"backend is {backend!r}; accepted are 'gloo' (CPU), 'nccl' (one GPU a rank), and None (whichever this machine can).")
    import torch

    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if backend == "nccl" and gpus < ranks:
        raise ValueError(f"backend is 'nccl' with {ranks} ranks; NCCL needs a GPU for each, and this machine has {gpus}. Use 'gloo', or at most {gpus} ranks.")
    if backend is None:
        backend = "nccl" if gpus >= max(2, ranks) else "gloo"
    most = max(8, 2*cores)
    if backend == "gloo" and ranks > most:
        raise ValueError(f"ranks is {ranks}; accepted are 1 to {most} on this machine, which has {cores} cores.")
    return backend


MACHINERY = re.compile(r"^ *File .*(?:torch/distributed/c10d_logger|course/world/inside|course/lab_ranks)\.py.*\n(?: {4}.*\n)*\n?"
                       r"|^ *(?:Cell In\[\d+\]|File <ipython.*?>), line \d+.*\n *__import__\('nbs_lib\.course\.world\.inside'.*\n", re.M)


def readable(traceback: Sequence[str]) -> str:
    """A rank's traceback without colours, and without the frames of this machinery."""
    text = MACHINERY.sub("", re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(traceback)))
    text = re.sub(r"Cell In\[\d+\], line", "the cell, line", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def together(answers: Sequence[Answer]) -> list[str]:
    """The ranks' lines with their rank before them; once where all said the same."""
    spoke = [a for a in answers if a.lines]
    if len(spoke) == len(answers) > 1 and all(a.lines == spoke[0].lines for a in spoke):
        return [f"[all] {line}" for line in spoke[0].lines]
    return [f"[{a.rank}] {line}" for a in spoke for line in a.lines]


def _end(processes: list[subprocess.Popen], clients: list, folder: Path) -> None:
    """Kill the ranks with whatever they have started, and forget their files."""
    for p in processes:
        try:
            os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    for p in processes:
        p.wait()
    for client in clients:
        client.stop_channels()
    shutil.rmtree(folder, ignore_errors=True)


# --- the cell magic ---------------------------------------------------------------------------------------------------------------

_current: World | None = None


def world(ranks: int | None = None, backend: str | None = None) -> World:
    """The world of this notebook's %%ranks cells; started where there is none, or none of this size."""
    global _current
    here = _current is not None and _current.alive
    if here and (ranks in (None, _current.ranks)) and backend in (None, _current.backend):
        return _current
    size = ranks or (_current.ranks if _current else 2)
    if here:
        _current.stop()
    _current = World(size, backend)
    return _current


def stop() -> None:
    """End the ranks of this notebook's %%ranks cells."""
    if _current is not None:
        _current.stop()


MAGIC = re.compile(r"\s*(\d+)?\s*(?:--on\s+(\d+(?:\s*,\s*\d+)*))?\s*(?:--backend\s+(\w+))?\s*(--fails)?\s*")


def ranks_magic(line: str, cell: str) -> None:
    """`%%ranks [how many] [--on 0,2] [--backend gloo] [--fails]`: run this cell on every rank, or on those listed.

    --fails: the cell is meant to fail; what went wrong is printed, and it is an error if nothing does.
    """
    m = MAGIC.fullmatch(line)
    if m is None:
        raise RankError(f"%%ranks {line.strip()}: this is not understood; accepted is `%%ranks [how many] [--on 0,2] [--backend gloo] [--fails]`.")
    had = _current is not None and not _current.alive
    try:
        w = world(int(m[1]) if m[1] else None, m[3])
        if had:
            print("(New ranks: what cells had defined on the old ones is gone.)")
        w.execute(cell, [int(x) for x in m[2].split(",")] if m[2] else None)
    except (ValueError, RankError) as e:
        if not m[4]:
            raise RankError(str(e), getattr(e, "ranks", ())) from None
        print(e)
        return
    if m[4]:
        raise RankError("this cell was meant to fail (--fails), and it did not.")


def load_ipython_extension(shell: Any) -> None:
    """For `%load_ext nbs_lib.course.world`."""
    shell.register_magic_function(ranks_magic, "cell", "ranks")
