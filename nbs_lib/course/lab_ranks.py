"""Checks of what learners write for several ranks: their function runs on real processes, beside the right one and the usual mistakes."""
from __future__ import annotations

import inspect
import linecache
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any, Callable, Sequence

from .lab import Verdict
from .world import RankError, World

FILE = "your function"
_worlds: dict[tuple, World] = {}


def lab_world(ranks: int, backend: str | None = None, patience: float = 3.0) -> World:
    """A world of so many ranks that the lab's cells and checks share; started anew when its ranks have ended."""
    key = ranks, backend
    if key not in _worlds or not _worlds[key].alive:
        _worlds[key] = World(ranks, backend, patience=patience)
    return _worlds[key]


def close_worlds() -> None:
    """End the ranks that lab_world started."""
    for w in _worlds.values():
        w.stop()
    _worlds.clear()


@dataclass(frozen=True)
class OnRanks:
    """A function that the learner writes and that every rank runs, held against `right` by what a trial with it gives.

    trial: an importable function (f, *arguments) → a list of numbers, called on each rank with the learner's function as f. cases: tuples of
    arguments. `slips`: functions as people get them wrong → what the mistake is; the first whose numbers agree with the answer's names it.
    `ranks`: how many processes; backend: as lab_world takes it. tolerance: relative, of each number.
    """

    right: Callable
    trial: Callable
    slips: Sequence[tuple[Callable, str]]
    why: str
    cases: Sequence[tuple] = ((),)
    ranks: int = 2
    backend: str | None = None
    tolerance: float = 1e-5
    _known: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def wrong(self) -> list:
        return [f for f, _ in self.slips]

    def judge(self, answer: Any) -> Verdict:
        """Whether the answer does what the right one does, on every rank and in every case; and if not, why not."""
        if not callable(answer):
            return Verdict(False, f"{answer!r} is no function: pass the function itself, without parentheses.")
        try:
            given = self.results(answer)
        except RankError as e:
            return Verdict(False, self._named(e) or f"On the ranks it went wrong.\n{e}")
        except ValueError as e:
            return Verdict(False, str(e))
        wanted = self._expected(self.right)
        if same(given, wanted, self.tolerance):
            return Verdict(True, self.why)
        for slip, reason in self.slips:
            if hasattr(slip, "fails"):  # it gives no numbers, and would take the ranks with it
                continue
            try:
                if same(given, self._expected(slip), self.tolerance):
                    return Verdict(False, reason)
            except RankError:
                continue
        return Verdict(False, difference(given, wanted, self.cases, self.tolerance))

    def results(self, f: Callable) -> list:
        """By rank, what the trial gives in each case: a list of numbers."""
        found = run_in(lab_world(self.ranks, self.backend), tried, f, self.trial, list(self.cases))
        return [[numbers(x) for x in answers] for answers in found]

    def _expected(self, f: Callable) -> list:
        """The results of the check's own functions, run once."""
        if f not in self._known:
            self._known[f] = self.results(f)
        return self._known[f]

    def _named(self, failure: RankError) -> str:
        """The reason of the slip that fails with the same error; "" if none does. Slips that fail are marked by `fails`."""
        last = str(failure).splitlines()
        for slip, reason in self.slips:
            mark = getattr(slip, "fails", None)
            if mark and any(mark in line for line in last):
                return f"{reason}\n{failure}"
        return ""


def fails(mark: str) -> Callable:
    """For a slip that does not give wrong numbers but fails, or waits for ever: a part of the message by which it is known."""
    def marked(f: Callable) -> Callable:
        f.fails = mark
        return f

    return marked


def changed(f: Callable, *changes: tuple[str, str], mark: str | None = None) -> Callable:
    """f with parts of its text replaced, one (old, new) after the other: a slip that is the solution but for a thing or two. mark: as `fails` takes it.

    ValueError where an old part is not there, or more than once.
    """
    name, text = source_of(f)
    for old, new in changes:
        if (times := text.count(old)) != 1:
            raise ValueError(f"old is {old!r}, which is {f'{times} times' if times else 'not'} in the text of {name}; it must be there once.")
        text = text.replace(old, new)
    space: dict[str, Any] = {}
    exec(text, space)
    space[name].source = text
    return fails(mark)(space[name]) if mark else space[name]


def source_of(f: Callable) -> tuple[str, str]:
    """A function's name and its text, so that ranks can define it. ValueError for what has none."""
    if text := getattr(f, "source", None):
        return f.__name__, text
    try:
        text = textwrap.dedent(inspect.getsource(f))
    except (OSError, TypeError):
        raise ValueError(f"the text of {getattr(f, '__name__', f)!r} cannot be found; define the function in a cell of its own, with def.") from None
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("def ")), None)
    if start is None:
        raise ValueError(f"{getattr(f, '__name__', f)!r} is no function made with def; define one in a cell of its own.")
    return f.__name__, "\n".join(lines[start:])


def remember(source: str) -> None:
    """So that tracebacks can quote the function's lines."""
    linecache.cache[FILE] = len(source), None, source.splitlines(keepends=True), FILE


def run_in(world: World, trial: Callable, f: Callable, *args: Any) -> list:
    """trial(f, *args) on every rank of a world, with a function f that is defined here, in a cell; results by rank. trial must be importable."""
    name, source = source_of(f)
    remember(source)  # here, for what is said of a deadlock
    return world.run(on_rank, name, source, trial, *args)


def on_rank(name: str, source: str, trial: Callable, *args: Any) -> Any:
    """Runs on a rank: define the function, and try it."""
    import torch
    import torch.distributed as dist

    remember(source)
    space: dict[str, Any] = {"torch": torch, "dist": dist, "nn": torch.nn, "Tensor": torch.Tensor, "math": math}
    exec(compile(source, FILE, "exec"), space)
    return trial(space[name], *args)


def tried(f: Callable, trial: Callable, cases: list) -> list:
    """Runs on a rank: what the trial gives with f in each case."""
    return [trial(f, *case) for case in cases]


def numbers(x: Any) -> list[float]:
    """What a trial gave, flat, as floats."""
    import torch

    if isinstance(x, torch.Tensor):
        return x.detach().double().flatten().tolist()
    if isinstance(x, (list, tuple)):
        return [n for part in x for n in numbers(part)]
    if isinstance(x, (bool, int, float)):
        return [float(x)]
    raise ValueError(f"your function gave {x!r}" + (": is a `return` missing?" if x is None else ", which is no tensor and no number."))


def same(a: list, b: list, tolerance: float) -> bool:
    """Whether two ranks-by-cases lists of numbers agree."""
    return all(len(x) == len(y) and all(math.isclose(p, q, rel_tol=tolerance, abs_tol=tolerance) for p, q in zip(x, y)) for ra, rb in zip(a, b) for x, y in zip(ra, rb))


def difference(given: list, wanted: list, cases: Sequence[tuple], tolerance: float) -> str:
    """The first place where two results differ, without giving the right number away."""
    for rank, (ra, rb) in enumerate(zip(given, wanted)):
        for case, x, y in zip(cases, ra, rb):
            if same([[x]], [[y]], tolerance):
                continue
            of = f" for {case}" if case else ""
            if len(x) != len(y):
                return f"On rank {rank}{of} it gives {len(x)} numbers; there should be {len(y)}."
            at = [i for i, (p, q) in enumerate(zip(x, y)) if not math.isclose(p, q, rel_tol=tolerance, abs_tol=tolerance)]
            ratios = {round(x[i]/y[i], 4) for i in at if y[i]}
            alike = f", each {ratios.pop():g} times what it should be" if len(ratios) == 1 else ""
            return f"On rank {rank}{of}, {len(at)} of {len(y)} numbers are wrong{alike}; the first is number {at[0]}, {x[at[0]]:.6g}."
    raise AssertionError("the results agree")

