"""Checks of functions that give JAX arrays: results as tensors, and errors that JAX raises while it traces, in a sentence of advice."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

from .lab import Stop
from .lab_written import Odd

if TYPE_CHECKING:
    from torch import Tensor


def as_tensor(result: Any, what: str) -> Tensor:
    """A JAX array of a learner's function as a float64 tensor; Odd where it is none."""
    import jax
    import numpy as np
    import torch

    if result is None or result is ...:
        raise Odd(f"{what} gave {result!r}: the `...` is still there.")
    if not isinstance(result, jax.Array):
        raise Odd(f"{what} gave {type(result).__module__.split('.')[0]}'s {type(result).__name__}; it should be a JAX array, made with jnp.")
    return torch.from_numpy(np.array(result, np.float64))


ADVICE = {"TracerArrayConversionError": "NumPy wants numbers, and while JAX traces there are none: jnp where np stands.",
          "TracerBoolConversionError": "An `if` wants a number, and while JAX traces there is none: jnp.where.",
          "TracerIntegerConversionError": "range() and the like want an integer, and while JAX traces an argument of the compiled function has no value.",
          "IndexError": "The ends of a slice must be known while JAX traces, and an argument of the compiled function is not: mask instead of cutting.",
          "ConcretizationTypeError": "A number is wanted, and while JAX traces there is none.",
          "UnexpectedTracerError": "Something of an earlier trace was kept outside of the function: a pure function keeps nothing."}


def plainly(f: Callable, whose: str = "Your function") -> Callable:
    """f, whose errors come as Odd, in a line or two."""
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return f(*args, **kwargs)
        except (Stop, Odd):
            raise
        except Exception as e:
            name, line = type(e).__name__, (str(e).strip() or "no reason given").splitlines()[0]
            advice = ADVICE.get(name, "") if name != "IndexError" or "static" in line else ""
            raise Odd(f"{whose} raised {name}: {line.rstrip('.')}. {advice}".strip()) from None

    return call
