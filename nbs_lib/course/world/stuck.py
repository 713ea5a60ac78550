"""Whether ranks only wait for each other, and where: read from their Python stacks, which they write when asked."""
from __future__ import annotations

import json
import linecache
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

IN_CELL = "/ipykernel_"  # of the file name that ipykernel gives a cell
NOT_OWN = ("/ipykernel", "/IPython/", "/asyncio/", "/tornado/", "/torch/", "/course/world/inside.py", "/threading.py", "<frozen")
Frames = tuple[tuple[str, int, str], ...]  # (file, line, function), innermost first


@dataclass(frozen=True)
class Place:
    """Where a rank stands: the function of torch.distributed that it called ("" where there is none), and its own line."""

    function: str
    line: int
    file: str
    text: str

    def __str__(self) -> str:
        where = f"line {self.line} of " + ("the cell" if IN_CELL in self.file else Path(self.file).name)
        return (f"in {self.function}, " if self.function else "at ") + where + (f": {self.text}" if self.text else "")


class Stuck:
    """Looks at ranks that have not answered. They are stuck if for `patience` seconds no stack has changed and none computed.

    sources: the text of each rank's cell.
    """

    def __init__(self, sources: Sequence[str | None], patience: float):
        self.sources, self.patience = sources, patience
        self.seen: dict[int, Frames | None] = {}
        self.spent: dict[int, float] = {}
        self.first = self.next = time.monotonic()
        self.next += patience/4  # most cells have answered by then

    def look(self, pending: Sequence[int], processes: Sequence[subprocess.Popen], folder: Path) -> dict[int, Place] | None:
        """Where the pending ranks stand, if they are stuck, else None. Asks them now and then only."""
        now = time.monotonic()
        if now < self.next:
            return None
        self.next = now + self.patience/8
        stacks = {r: stack(folder/f"ask{r}") for r in pending}
        spent = {r: cpu_seconds(processes[r].pid) for r in pending}
        still = stacks == self.seen and all(stacks[r] and self.waits(r, stacks[r], spent[r] - self.spent[r], now - self.first) for r in pending)
        if not still:
            self.first, self.seen, self.spent = now, stacks, spent
        return {r: self.place(r, stacks[r]) for r in pending} if still and now - self.first >= self.patience else None

    def waits(self, rank: int, frames: Frames, spent: float, elapsed: float) -> bool:
        """Whether a rank with this stack only waits: in torch.distributed, or using hardly any processor time; and not asleep on purpose."""
        idle = spent < 0.02 + 0.02*elapsed  # its kernel's other threads use a little; a rank that computes gets more, even of a busy machine
        return "/torch/distributed/" in frames[0][0] or (idle and "sleep(" not in self.line(rank, *frames[0][:2]))

    def line(self, rank: int, file: str, number: int) -> str:
        """A line's text, of the cell or of a file."""
        if IN_CELL not in file:
            return linecache.getline(file, number).strip()
        lines = (self.sources[rank] or "").splitlines()
        return lines[number - 1].strip() if 0 < number <= len(lines) else ""

    def place(self, rank: int, frames: Frames) -> Place:
        """The cell's (or else the caller's) line, and what it called in torch.distributed."""
        calls = [name for f, _, name in frames if "/torch/distributed/" in f and name != "wrapper" and not name.startswith(("_", "<"))]
        own = [(f, n) for f, n, _ in frames if IN_CELL in f and self.line(rank, f, n) and "nbs_lib.course.world.inside" not in self.line(rank, f, n)]
        own = own or [(f, n) for f, n, _ in frames if not any(part in f for part in NOT_OWN)] or [frames[0][:2]]
        return Place(calls[-1] if calls else "", own[0][1], own[0][0], self.line(rank, *own[0]))


def explain(where: dict[int, Place], sources: Sequence[str | None], patience: float) -> str:
    """A deadlock, for people. where: the ranks that wait; sources: what each rank was asked, None for those that were not."""
    lines = [f"Deadlock: for {patience:g} seconds nothing has moved."]
    for r, source in enumerate(sources):
        lines.append(f"  rank {r} waits {where[r]}" if r in where else f"  rank {r} has finished" if source is not None else f"  rank {r} was not asked")
    if len(where) < len(sources):
        lines.append("A collective needs every rank of its group: each has to call it, in the same order. A rank that has finished will not call it any more.")
    elif len({(p.function, p.line) for p in where.values()}) > 1:
        lines.append("They wait in different places: each must call the same collectives in the same order, and each receive needs its send.")
    else:
        lines.append("All wait at the same place, each for a message that none of them sends.")
    return "\n".join([*lines, "All ranks were ended; start new ones."])


def stack(ask: Path) -> Frames | None:
    """The frames of the thread that runs a rank's cells. ask: its pipe. None if it does not answer."""
    answer = ask.with_suffix(".json")
    answer.unlink(missing_ok=True)
    try:
        pipe = os.open(ask, os.O_WRONLY | os.O_NONBLOCK)  # fails where nobody reads
        os.write(pipe, b"?")
        os.close(pipe)
        for _ in range(20):
            time.sleep(0.02)
            if answer.exists():
                return tuple((file, line, function) for file, line, function in json.loads(answer.read_text()))
    except OSError:
        pass
    return None


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    import psutil

    try:
        t = psutil.Process(pid).cpu_times()
        return t.user + t.system
    except psutil.Error:
        return 0.0
