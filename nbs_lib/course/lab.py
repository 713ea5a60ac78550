"""The labs' machinery: predict, measure, explain, with hints and a record that is kept.

A lab's module (`nbs_lib/labs/memory.py`) makes one `Lab` and describes its exercises; the worksheet calls `predict`, `measure`,
`explain`, `hint`, `solution` and `progress`. The record lies beside the worksheet in `.nbs/<slug>.json`, so that a kernel's restart
loses nothing.
"""
from __future__ import annotations

import html
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

COLOURS = {"predict": "#1d5fa8", "measure": "#b4500f", "explain": "#27744a", "wrong": "#a03048", "hint": "#8a6a00"}


class Stop(Exception):
    """Says to a learner what to do first; shown as a sentence, without a traceback."""

    def _render_traceback_(self):
        return [f"→ {self}"]


@dataclass(frozen=True)
class Verdict:
    """What a check says of an answer: whether it holds, and why or why not."""

    ok: bool
    message: str


@dataclass(frozen=True)
class Choice:
    """One of several options; every distractor has its reason.

    `options`: letter → text. `right`: the letter. `reasons`: letter → why it holds or does not, for every option.
    """

    options: Mapping[str, str]
    right: str
    reasons: Mapping[str, str]

    def __post_init__(self):
        if self.right not in self.options or set(self.reasons) != set(self.options):
            raise ValueError("Choice: `right` must be an option, and every option needs its reason")

    @property
    def wrong(self) -> list:
        return [letter for letter in self.options if letter != self.right]

    def judge(self, answer) -> Verdict:
        letter = answer.strip().lower() if isinstance(answer, str) else answer
        if not isinstance(letter, str) or letter not in self.options:
            return Verdict(False, f"{answer!r} is none of the options: answer with one of {', '.join(map(repr, self.options))}.")
        return Verdict(letter == self.right, self.reasons[letter])


@dataclass(frozen=True)
class Number:
    """A number that the library computes. `slips`: what a plausible mistake gives → what the mistake is.

    `truth` and the keys of `slips` may be numbers or functions without arguments, so that nothing heavy runs before it is needed.
    `tolerance` is relative.
    """

    truth: Any
    unit: str
    slips: Sequence[tuple[Any, str]]
    why: str
    tolerance: float = 0.01

    @property
    def right(self):
        return _value(self.truth)

    @property
    def wrong(self) -> list:
        return [_value(v) for v, _ in self.slips]

    def judge(self, answer) -> Verdict:
        number = _number(answer)
        if number is None:
            return Verdict(False, f"{answer!r} is no number; give one in {self.unit}.")
        truth = _value(self.truth)
        if math.isclose(number, truth, rel_tol=self.tolerance, abs_tol=1e-12):
            return Verdict(True, self.why)
        for slip, reason in self.slips:
            if math.isclose(number, _value(slip), rel_tol=self.tolerance, abs_tol=1e-12):
                return Verdict(False, reason)
        return Verdict(False, _off_by(number, truth, self.unit))


@dataclass(frozen=True)
class Function:
    """A function that the learner writes, held against `right` on `cases` (tuples of arguments).

    `slips`: functions as people get them wrong → what the mistake is; the first that agrees with the answer on all cases names it.
    """

    right: Callable
    cases: Sequence[tuple]
    slips: Sequence[tuple[Callable, str]]
    why: str
    tolerance: float = 1e-6

    @property
    def wrong(self) -> list:
        return [f for f, _ in self.slips]

    def judge(self, answer) -> Verdict:
        if not callable(answer):
            return Verdict(False, f"{answer!r} is no function: pass the function itself, without parentheses.")
        given, wanted = [], [self.right(*case) for case in self.cases]
        for case, truth in zip(self.cases, wanted):
            call = f"{getattr(answer, '__name__', 'your function')}({', '.join(map(repr, case))})"
            try:
                value = answer(*case)
            except Stop:
                raise
            except Exception as e:
                return Verdict(False, f"{call} raised {type(e).__name__}: {e}")
            number = _number(value)
            if number is None:
                return Verdict(False, f"{call} gave {value!r}, which is no number" + (": the `...` is still there." if value in (None, ...) else "."))
            given.append(number)
        if all(self._same(g, w) for g, w in zip(given, wanted)):
            return Verdict(True, self.why)
        for slip, reason in self.slips:
            if all(self._same(g, slip(*case)) for g, case in zip(given, self.cases)):
                return Verdict(False, reason)
        case, number, truth = next((c, g, w) for c, g, w in zip(self.cases, given, wanted) if not self._same(g, w))
        return Verdict(False, f"For {case} it gives {number:,.6g}. " + _off_by(number, truth, ""))

    def _same(self, a, b) -> bool:
        return math.isclose(a, b, rel_tol=self.tolerance, abs_tol=1e-12)


@dataclass(frozen=True)
class Two:
    """A choice and a function: lab.explain(n, (letter, function)). The letter is judged first; `call` is shown to whoever gives something else."""

    choice: Choice
    function: Function
    call: str

    @property
    def right(self) -> tuple:
        return self.choice.right, self.function.right

    @property
    def wrong(self) -> list:
        return [(letter, self.function.right) for letter in self.choice.wrong] + [(self.choice.right, f) for f in self.function.wrong]

    def judge(self, answer: Any) -> Verdict:
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            return Verdict(False, f"A letter and a function are asked for: {self.call}, with your letter.")
        if answer[0] is ...:
            return Verdict(False, "The letter is still missing: put it in place of the three dots.")
        first = self.choice.judge(answer[0])
        if not first.ok:
            return first
        second = self.function.judge(answer[1])
        return Verdict(second.ok, f"{first.message}\n{second.message}" if second.ok else f"The letter is right. {second.message}")


@dataclass(frozen=True)
class Exercise:
    """One exercise: what is predicted (in `unit`), how its misses are read, the check of its explanation, three hints."""

    name: str
    title: str
    unit: str = ""
    explain: Choice | Number | Function | None = None
    misses: Sequence[tuple[Any, str]] = ()
    hints: Sequence[str] = ()
    model_answer: str = ""

    def __post_init__(self):
        if len(self.hints) != 3:
            raise ValueError(f"exercise {self.name}: three hints, from a nudge to nearly the solution (there are {len(self.hints)})")


def _value(v):
    return v() if callable(v) else v


def _number(answer) -> float | None:
    """`answer` as a finite float; None for what is no number (a bool is none; a one-element tensor is one)."""
    if isinstance(answer, (bool, str)) or answer is None or answer is ...:
        return None
    try:
        number = float(answer)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _off_by(number: float, truth: float, unit: str) -> str:
    """How a wrong number misses, without giving the right one away."""
    if number <= 0 < truth:
        return "The answer is a positive number."
    ratio = number / truth if truth else math.inf
    for factor, name in ((1e9, "10^9 (bytes against GB?)"), (2**30, "2^30 (bytes against GiB?)"), (1e6, "10^6 (bytes against MB?)"),
                         (2**20, "2^20 (bytes against MiB?)"), (1e3, "1000"), (1024, "1024"), (8, "8 (bits against bytes?)")):
        for r, way in ((ratio, "large"), (1 / ratio if ratio else math.inf, "small")):
            if math.isclose(r, factor, rel_tol=0.01):
                return f"Too {way} by a factor of {name}"
    far = "far too" if not 0.1 < ratio < 10 else "too"
    return f"That is {far} {'large' if ratio > 1 else 'small'}" + (f", by {abs(ratio - 1):.0%}." if 0.5 < ratio < 2 else f": {ratio:.2g} times what it should be.")


def readable(number: float, unit: str) -> str:
    """`number` with its unit, bytes also in GiB or MiB."""
    if unit == "bytes":
        for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if abs(number) >= size:
                return f"{number:,.0f} bytes ({number / size:.3g} {name})"
    return f"{number:,.4g} {unit}".rstrip() if isinstance(number, float) and not number.is_integer() else f"{number:,.0f} {unit}".rstrip()


class Message:
    """A note to the learner: HTML in a notebook, plain text elsewhere."""

    def __init__(self, kind: str, title: str, text: str = "", rows: Sequence[tuple[str, str]] = ()):
        self.kind, self.title, self.text, self.rows = kind, title, text, rows

    def __repr__(self):
        wide = max((len(name) for name, _ in self.rows), default=0)
        rows = [f"  {name:<{wide}}  {value}" for name, value in self.rows]
        return "\n".join([self.title, *rows, *([self.text] if self.text else [])])

    def _repr_mimebundle_(self, include=None, exclude=None):
        rows = "".join(f"<tr><th style='text-align:left'>{html.escape(n)}</th><td style='text-align:right'>{html.escape(v)}</td></tr>" for n, v in self.rows)
        text = html.escape(self.text).replace("\n", "<br>")
        page = (f"<div style='border-left:5px solid {COLOURS.get(self.kind, '#566170')};padding:.3em 1em;margin:.3em 0'>"
                f"<strong>{html.escape(self.title)}</strong>{f'<table>{rows}</table>' if rows else ''}{f'<p>{text}</p>' if text else ''}</div>")
        return {"text/plain": repr(self), "text/html": page}


def _show(message: Message) -> None:
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(message)
        return
    display(message) if get_ipython() else print(message)


@dataclass
class Lab:
    """A lab's exercises and the learner's record of them. `slug`: "03_memory"."""

    slug: str
    title: str = ""
    exercises: dict[str, Exercise] = field(default_factory=dict)

    def exercise(self, name, title: str, **parts) -> Exercise:
        """Add an exercise (again, when its cell is run again); see `Exercise` for the parts.

        Raises ValueError when another exercise has the name.
        """
        name = str(name)
        if name in self.exercises and self.exercises[name].title != title:
            raise ValueError(f"{self.slug}: there is another exercise {name} already, {self.exercises[name].title!r}")
        self.exercises[name] = Exercise(name, title, **parts)
        return self.exercises[name]

    # --- what the worksheet calls -------------------------------------------------------------------------------------------

    def predict(self, name, value) -> None:
        """Record a prediction (a positive number in the exercise's unit), before measuring."""
        exercise, number = self._find(name), _number(value)
        if value is ... or value is None:
            raise Stop(f"Exercise {exercise.name}: put your number in place of the three dots, then run the cell again.")
        if number is None or number <= 0:
            raise Stop(f"Exercise {exercise.name}: {value!r} is no prediction; give a positive number in {exercise.unit}.")
        record = self._record()
        mine = record.setdefault(exercise.name, {})
        if "measured" in mine:
            mine.setdefault("later_predictions", []).append(number)
            text = "You have measured already, so the first prediction stands in the record; this one is noted beside it."
        else:
            mine["predicted"] = number
            text = "Recorded. Now measure."
        self._keep(record)
        _show(Message("predict", f"Exercise {exercise.name} · predicted {readable(number, exercise.unit)}", text))

    def predicted(self, name) -> float:
        """The recorded prediction. Raises Stop where there is none."""
        exercise = self._find(name)
        mine = self._record().get(exercise.name, {})
        if "predicted" not in mine:
            raise Stop(f"Exercise {exercise.name}: predict first. A measurement surprises only whoever has committed to a number.")
        return mine["predicted"]

    def measure(self, name, run: Callable[[], float], where: str = "here") -> None:
        """Run the measurement `run()` and set it beside the prediction. Refuses (Stop) when nothing was predicted."""
        exercise, predicted = self._find(name), self.predicted(name)
        if not callable(run):
            raise Stop(f"Exercise {exercise.name}: pass the measurement as a function, `lab.measure({exercise.name}, lambda: …)`, so that it runs after the prediction.")
        measured = _number(run())
        if measured is None or measured <= 0:
            raise Stop(f"Exercise {exercise.name}: the measurement gave no positive number; did the cell above it run?")
        record = self._record()
        mine = record.setdefault(exercise.name, {})
        mine.update(measured=measured, where=where)
        self._keep(record)
        _show(Message("measure", f"Exercise {exercise.name} · {exercise.title}", self._reading(exercise, predicted, measured), [
            ("predicted", readable(predicted, exercise.unit)), (f"measured {where}", readable(measured, exercise.unit)),
            ("predicted / measured", f"{predicted / measured:.3f}")]))

    def explain(self, name, answer) -> None:
        """Judge the explanation: a letter, a number or a function, as the exercise asks. Says whether it holds, and why."""
        exercise = self._find(name)
        if answer is ... or answer is None:
            raise Stop(f"Exercise {exercise.name}: put your answer in place of the three dots, then run the cell again.")
        if exercise.explain is None:
            if not isinstance(answer, str) or len(answer.split()) < 5:
                raise Stop(f"Exercise {exercise.name}: write a sentence or two; nothing checks it, but the model answer comes after yours.")
            self._note(exercise, explained=True, text=answer)
            _show(Message("explain", f"Exercise {exercise.name} · a model answer (yours was kept, and is not graded)", exercise.model_answer))
            return
        verdict = exercise.explain.judge(answer)
        self._note(exercise, explained=verdict.ok)
        _show(Message("explain" if verdict.ok else "wrong", f"Exercise {exercise.name} · {'right' if verdict.ok else 'not yet'}", verdict.message))

    def hint(self, name) -> None:
        """The next of three hints."""
        exercise = self._find(name)
        record = self._record()
        mine = record.setdefault(exercise.name, {})
        mine["hints"] = min(mine.get("hints", 0) + 1, 3)
        self._keep(record)
        for i in range(mine["hints"]):
            _show(Message("hint", f"Exercise {exercise.name} · hint {i + 1} of 3", exercise.hints[i]))
        if mine["hints"] == 3:
            _show(Message("hint", f"Still stuck? lab.solution({exercise.name}) shows a solution."))

    def solution(self, name) -> None:
        """A solution, once the three hints have been seen (or the exercise is done)."""
        exercise = self._find(name)
        mine = self._record().get(exercise.name, {})
        left = 3 - mine.get("hints", 0)
        if left and not mine.get("explained"):
            raise Stop(f"Exercise {exercise.name}: {left} hint{'s are' if left > 1 else ' is'} left; try lab.hint({exercise.name}) first.")
        path = Path(__file__).parent.parent / "labs" / f"{self.slug}.solutions.json"
        code = json.loads(path.read_text(encoding="utf-8")).get(exercise.name, "This exercise needs no code.")
        print(f"# Exercise {exercise.name}, a solution\n{code}")

    def progress(self) -> None:
        """Where you stand: every exercise with its prediction, measurement and explanation."""
        record, rows = self._record(), []
        for name, exercise in self.exercises.items():
            mine = record.get(name, {})
            done = [word for word, there in (("predicted", "predicted" in mine), ("measured", "measured" in mine), ("explained", mine.get("explained"))) if there]
            ratio = f", predicted/measured {mine['predicted'] / mine['measured']:.2f}" if {"predicted", "measured"} <= mine.keys() else ""
            rows.append((f"{name}. {exercise.title}", (", ".join(done) or "not begun") + ratio))
        finished = sum(1 for n in self.exercises if record.get(n, {}).get("explained"))
        _show(Message("explain", f"{self.title or self.slug}: {finished} of {len(self.exercises)} exercises explained", "", rows))

    # --- the record -----------------------------------------------------------------------------------------------------------

    def _find(self, name) -> Exercise:
        if str(name) not in self.exercises:
            raise Stop(f"There is no exercise {name!r} in this lab; there are {', '.join(self.exercises)}.")
        return self.exercises[str(name)]

    @property
    def record_path(self) -> Path | None:
        """Where the record is kept; None while nbdev runs the source notebook's tests."""
        if os.environ.get("IN_TEST"):
            return None
        return Path(os.environ.get("NBS_RECORD", Path.cwd() / ".nbs")) / f"{self.slug}.json"

    def _record(self) -> dict:
        path = self.record_path
        if path is None:
            return self.__dict__.setdefault("_memory", {})
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record, dict) and all(isinstance(v, dict) for v in record.values()):
                return record
            raise ValueError("not a record")
        except FileNotFoundError:
            return {}
        except ValueError:
            aside = path.with_suffix(".broken.json")
            path.replace(aside)
            _show(Message("hint", "The record of this lab could not be read", f"It was kept as {aside}, and a new one begins."))
            return {}

    def _note(self, exercise: Exercise, **facts) -> None:
        record = self._record()
        record.setdefault(exercise.name, {}).update(facts)
        self._keep(record)

    def _keep(self, record: dict) -> None:
        path = self.record_path
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(record, indent=1), encoding="utf-8")
        new.replace(path)

    def _reading(self, exercise: Exercise, predicted: float, measured: float) -> str:
        """What the distance between prediction and measurement suggests."""
        if math.isclose(predicted, measured, rel_tol=0.001):
            return "Within 0.1%: nothing is left to explain."
        if math.isclose(predicted, measured, rel_tol=0.03):
            return "Within 3%: every large term is there; what is left is small."
        for miss, reason in exercise.misses:
            if math.isclose(predicted, _value(miss), rel_tol=0.02):
                return reason
        return _off_by(predicted, measured, exercise.unit) + " Look for the term that is missing or counted twice before you read on."
