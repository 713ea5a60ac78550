"""Ranks from a notebook: real processes, started, asked, failing, stuck, interrupted, and gone afterwards."""
from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ipykernel")

from nbs_lib.course.world import RankError, World, checked, readable, together, Answer  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def processes_of(parent: int) -> set[int]:
    """The rank processes that name this parent in their environment."""
    found = set()
    for p in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"JPY_PARENT_PID={parent}\0NBS" in (text := p.read_bytes().decode(errors="replace")) or (f"JPY_PARENT_PID={parent}\0" in text and "NBS_BACKEND" in text):
                found.add(int(p.parent.name))
        except OSError:
            pass
    return found


def gone(pids: set[int], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(running(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def add_ranks(x: float, times: int = 1) -> tuple:
    """Called on ranks by the tests below."""
    import torch.distributed as dist

    t = torch.full((2,), x + dist.get_rank())
    for _ in range(times):
        dist.all_reduce(t)
    return dist.get_rank(), t, os.getpid()


@pytest.fixture(scope="module")
def world():
    with World(2, backend="gloo", patience=2) as w:
        yield w


def test_functions_run_on_every_rank_and_bring_their_results(world):
    answers = world.run(add_ranks, 1.0, times=2)
    assert [a[0] for a in answers] == [0, 1]
    assert all(torch.equal(a[1], torch.tensor([6.0, 6.0])) for a in answers)
    pids = {a[2] for a in answers}
    assert len(pids) == 2 and os.getpid() not in pids and pids <= processes_of(os.getpid())


def test_cells_keep_their_variables_and_print_rank_by_rank(world, capsys):
    world.execute("seen = rank*10")
    world.execute("print('the same'); world_size")
    world.execute("print(seen + 1)")
    world.execute("print('only here')", on=[1])
    assert capsys.readouterr().out.splitlines() == ["[all] the same", "[all] 2", "[0] 1", "[1] 11", "[1] only here"]
    assert world.get("seen") == [0, 10]


def test_an_error_of_all_ranks_is_told_once_and_ends_nothing(world):
    with pytest.raises(RankError, match="all ranks failed alike") as e:
        world.execute("x = 1\nundefined_name + x")
    assert "line 2" in str(e.value) and "NameError" in str(e.value) and str(e.value).count("NameError") == 1
    assert "course/world/" not in str(e.value)
    assert world.get("x") == [1, 1]


def test_errors_of_called_functions_are_told_without_the_machinery(world):
    with pytest.raises(RankError, match="all ranks failed alike") as e:
        world.run(add_ranks, "no number")
    assert "add_ranks" in str(e.value) and "course/world/" not in str(e.value) and "__import__" not in str(e.value)


def test_what_cannot_be_called_is_said_before_anything_is(world):
    def inner():
        return 1

    inner.__module__ = "__main__"
    with pytest.raises(ValueError, match="%%ranks cell, or in a module"):
        world.run(inner)
    with pytest.raises(ValueError, match="rank 5 is not there; accepted are 0 to 1"):
        world.execute("1", on=[5])


@pytest.mark.parametrize("cell, parts, failed", [
    ("if rank == 1:\n    raise KeyError('mine')\ndist.barrier()", ["rank 1 failed", "KeyError: 'mine'", "rank 0"], (1,)),
    ("import os\nif rank == 1:\n    os._exit(3)\ndist.barrier()", ["rank 1 failed", "exit status 3", "rank 0 lost its connection"], (1,)),
    ("import os\nif rank == 0:\n    os.kill(os.getpid(), 9)\ndist.barrier()", ["rank 0 failed", "SIGKILL", "memory"], (0,)),
    ("x = torch.ones(1)\nif rank == 0:\n    dist.all_reduce(x)", ["Deadlock", "rank 0 waits in all_reduce, line 3 of the cell: dist.all_reduce(x)", "rank 1 has finished"], (0,)),
    ("x = torch.ones(1)\nif rank == 0:\n    dist.recv(x, 1)\nelse:\n    dist.recv(x, 0)", ["rank 0 waits in recv, line 3", "rank 1 waits in recv, line 5", "different places"], (0, 1)),
    ("w = dist.irecv(torch.ones(1), 1 - rank)\nw.wait()", ["line 2 of the cell: w.wait()", "All wait at the same place"], (0, 1)),
], ids=["error", "exit", "killed", "skipped", "crossed", "asynchronous"])
def test_failures_and_deadlocks_end_by_themselves_and_say_why(cell, parts, failed):
    with World(2, backend="gloo", patience=1.5) as w:
        pids = processes_of(os.getpid())
        began = time.monotonic()
        with pytest.raises(RankError) as e:
            w.execute(cell)
        assert time.monotonic() - began < 15
        for part in parts:
            assert part in str(e.value), str(e.value)
        assert e.value.ranks == failed
        assert not w.alive and gone({p for p in pids if p in {q.pid for q in w.processes}})
        for ask in (lambda: w.execute("1"), lambda: w.run(add_ranks, 1.0), lambda: w.get("rank")):
            with pytest.raises(RankError, match="have ended; start new ones"):
                ask()


def test_ranks_that_work_or_sleep_are_left_in_peace():
    with World(2, backend="gloo", patience=0.5) as w:
        w.execute("import time\nif rank == 0:\n    time.sleep(3)\ndist.barrier()")
        w.execute("t = time.time()\nwhile rank == 0 and time.time() < t + 3:\n    pass\ndist.barrier()")
        assert w.get("rank") == [0, 1]


SCRIPT = textwrap.dedent("""
    from nbs_lib.course.world import World, RankError
    w = World(2, backend="gloo", patience=60)
    print("up", flush=True)
    try:
        w.execute("if rank == 0: dist.barrier()")
    except RankError as e:
        print(e, flush=True)
""")


@pytest.mark.parametrize("signal_number, says", [(signal.SIGINT, "Interrupted; the ranks were ended"), (signal.SIGTERM, ""), (signal.SIGKILL, "")])
def test_no_rank_outlives_its_caller(signal_number, says):
    """Interrupted in a collective, terminated, or killed without a chance to clean up."""
    # a job in the background of a shell script ignores SIGINT, and so would its children
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    p = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heeds)
    assert p.stdout.readline() == "up\n"
    time.sleep(1)
    pids = processes_of(p.pid)
    assert len(pids) >= 2
    p.send_signal(signal_number)
    out, _ = p.communicate(timeout=20)
    assert says in out
    assert gone(pids)


def test_what_a_machine_cannot_do_is_a_sentence(monkeypatch):
    for given, says in [(0, "whole number"), (2.0, "whole number"), (True, "whole number"), (10**6, "this machine")]:
        with pytest.raises(ValueError, match=says):
            checked(given, "gloo")
    with pytest.raises(ValueError, match="accepted are 'gloo'"):
        checked(2, "mpi")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="needs a GPU for each, and this machine has 0"):
        checked(2, "nccl")
    assert checked(2, None) == "gloo"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checked(2, None) == "nccl" and checked(4, None) == "gloo"


def test_lines_of_ranks_are_put_together():
    one, two = Answer(0, ["a", "b"]), Answer(1, ["a", "b"])
    assert together([one, two]) == ["[all] a", "[all] b"]
    assert together([one, Answer(1)]) == ["[0] a", "[0] b"]
    assert together([Answer(0, ["a"])]) == ["[0] a"]
    assert readable(["\x1b[31mValueError\x1b[0m: no"]) == "ValueError: no"
