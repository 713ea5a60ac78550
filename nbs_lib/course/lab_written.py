"""Checks of functions that give tensors: what the learner wrote is tried on cases, and compared with the right one and with slips."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Sequence

from .lab import Stop, Verdict

if TYPE_CHECKING:
    from torch import Tensor


class Odd(Exception):
    """An answer's result that cannot be compared; the message says why."""


def attempt(call: Callable[[], Any], whose: str = "Your function") -> Any:
    """What `call` gives, in which the learner's function runs; a Verdict against it where that raises or gives what cannot be compared."""
    try:
        return call()
    except Stop:
        raise
    except Odd as e:
        return Verdict(False, str(e))
    except Exception as e:
        return Verdict(False, f"{whose} raised {type(e).__name__}: {e}")


def tensor_of(result: Any, what: str) -> Tensor:
    """A result of a learner's function as a float64 tensor; Odd where it is none."""
    import torch

    if result is None or result is ...:
        raise Odd(f"{what} gave {result!r}: the `...` is still there.")
    if not isinstance(result, torch.Tensor):
        raise Odd(f"{what} gave {type(result).__name__}; it should be a tensor.")
    return result.detach().double()


@dataclass(frozen=True)
class Written:
    """A check of a function that the learner writes.

    `observe(f)`: tries f and gives (case, results) pairs. `expected()`: the same pairs as they should be. `slips`: functions as people
    get them wrong → what the mistake is. `tell(case, i, got, want)`: a sentence on a case's results, of which the i-th differs first. `tolerance`: root mean
    square of the difference within a case; 0 asks for equality.
    """

    right: Callable
    observe: Callable[[Callable], list[tuple[str, Tensor]]]
    expected: Callable[[], list[tuple[str, Tensor]]]
    slips: Sequence[tuple[Callable, str]]
    tell: Callable[[str, int, Tensor, Tensor], str]
    why: str
    tolerance: float = 0.0

    @property
    def wrong(self) -> list:
        return [f for f, _ in self.slips]

    def same(self, a: list, b: list) -> bool:
        return all(self.close(x, y) for (_, x), (_, y) in zip(a, b, strict=True))

    def close(self, x: Tensor, y: Tensor) -> bool:
        if x.shape != y.shape:
            return False
        if not self.tolerance:
            return bool((x == y).all())
        return bool((x - y).square().mean().sqrt() <= self.tolerance)

    def judge(self, answer: Any) -> Verdict:
        if not callable(answer):
            return Verdict(False, f"{answer!r} is no function: pass the function itself, without parentheses.")
        got = attempt(lambda: self.observe(answer))
        if isinstance(got, Verdict):
            return got
        want = self.expected()
        if self.same(got, want):
            return Verdict(True, self.why)
        for slip, reason in self.slips:
            if self.same(got, self.observe(slip)):
                return Verdict(False, reason)
        case, mine, truth = next((n, x, y) for (n, x), (_, y) in zip(got, want) if not self.close(x, y))
        if mine.shape != truth.shape:
            return Verdict(False, f"{case}: the result has shape {tuple(mine.shape)}; it should be {tuple(truth.shape)}.")
        i = int((mine != truth).flatten().nonzero()[0])
        return Verdict(False, self.tell(case, i, mine.flatten(), truth.flatten()))
