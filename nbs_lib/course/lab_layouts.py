"""Exercise 5 of lab 10: what XLA makes of a small Llama's step, and of one block, on eight devices; and the check of a learner's layout of that block."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from .. import spmd
from ..adapters import quick
from ..jax_torch import Params, block, causal_attention
from .lab import Verdict
from .lab_devices import on_devices
from .lab_jax import plainly
from .lab_written import Odd, attempt

ONE = replace(spmd.SMALL, layers=1, tied=False)


def parameters() -> int:
    """How many parameters exercise 5's Llama has."""
    return sum(spmd.parameter_count(ONE))


def _facts(program: Any) -> dict[str, Any]:
    """Of a compiled program: {"sent": bytes a device sends, "kinds": {operation: arrays}, "flops": of a device}."""
    found = spmd.collectives(program.as_text())
    return {"sent": spmd.sent(found), "kinds": {op: n for op, (n, *_) in spmd.by_kind(found).items()}, "flops": program.cost_analysis()["flops"]}


def _step_facts(layout: str, placed: bool) -> dict[str, Any]:
    """Where there are eight devices: _facts of the small Llama's step."""
    case, mesh = spmd.as_jax(*spmd.small_case(ONE)), spmd.mesh_for(layout)
    step, _ = spmd.program(layout, mesh, *case, ONE, rows=None if placed else NamedSharding(mesh, P()))
    return _facts(step)


@cache
def step_facts(layout: str = "data", placed: bool = True) -> dict[str, Any]:
    """What XLA makes of the small Llama's step on eight devices: bytes that a device sends, arrays by kind of collective, operations of a device. placed: whether the batch is divided."""
    return on_devices(__name__, "_step_facts", layout, placed)


SHAPES = {"x": (8, 8, 64), "norm1": (64,), "q": (64, 64), "k": (64, 64), "v": (64, 64), "out": (64, 64), "norm2": (64,), "gate": (64, 192), "up": (64, 192), "down": (192, 64)}
AXES = {"data": 2, "model": 4}
INTO, OUT_OF = ("q", "k", "v", "gate", "up"), ("out", "down")
WEIGHTS = INTO + OUT_OF


def _lay(x: Any = P("data"), into: Any = P(None, "model"), out_of: Any = P("model", None), norms: Any = P(), **others: Any) -> Callable:
    """A layout with its possible slips; the defaults are right."""
    table_ = {"x": x, "norm1": norms, "norm2": norms} | dict.fromkeys(INTO, into) | dict.fromkeys(OUT_OF, out_of) | others
    return lambda name: table_[name]


def block_step(p: Params, x: Any) -> tuple:
    """The block's mean square and its gradients."""
    return jax.value_and_grad(lambda p: (block(x, p, ONE, causal_attention) ** 2).mean())(p)


@cache
def _alone() -> tuple:
    """(parameters, x, what block_step gives on one device)."""
    g = np.random.default_rng(6)
    x, *weights = (jnp.asarray(g.normal(size=shape).astype(np.float32) / 8) for shape in SHAPES.values())
    p = dict(zip([name for name in SHAPES if name != "x"], weights))
    return p, x, jax.jit(block_step, compiler_options=quick())(p, x)


def _block_facts(specs: dict[str, tuple]) -> dict[str, Any]:
    """Where there are eight devices: of block_step, laid out so: _facts, bytes of parameters that a device holds, the collectives of the forward pass as (operation, numbers, devices), and whether results are as on one device."""
    mesh, (p, x, wanted) = Mesh(np.array(jax.devices()).reshape(*AXES.values()), tuple(AXES)), _alone()
    where = {name: NamedSharding(mesh, P(*specs[name])) for name in p}
    step = jax.jit(block_step, out_shardings=(NamedSharding(mesh, P()), where))
    args = jax.device_put(p, where), jax.device_put(x, NamedSharding(mesh, P(*specs["x"])))
    program = step.lower(*args).compile(compiler_options=quick())
    ahead = [(c.op, sum(math.prod(shape) for _, shape in c.arrays), c.group) for c in spmd.collectives(program.as_text()) if not c.backward]
    return {**_facts(program), "held": spmd.held(args[0]), "ahead": ahead, "right": spmd.apart(program(*args), wanted) < spmd.tolerance(ONE, math.prod(SHAPES["x"][:2]))}


@cache
def block_facts(specs: tuple[tuple[str, tuple], ...]) -> dict[str, Any]:
    return on_devices(__name__, "_block_facts", dict(specs))


@dataclass(frozen=True)
class Layout:
    """A check of `lay`, name → PartitionSpec: by what XLA makes of it, beside what it makes of Megatron-LM's layout."""

    right: Any = _lay()

    @property
    def wrong(self) -> list:
        return [lambda name: None, lambda name: ("data",), _lay(x=P("rows")), _lay(norms=P(None, "model")), _lay(out_of=P("model", "model")), _lay(x=P()), _lay(x=P(("data", "model"))), _lay(P("data"), P(), P()),
                _lay(into=P("model", None), out_of=P(None, "model")), _lay(gate=P("model", None), up=P("model", None)),
                _lay(norms=P("model")), lambda name: {}[name]]

    def judge(self, answer: Any) -> Verdict:
        if not callable(answer):
            return Verdict(False, f"{answer!r} is no function: pass the function itself, lab.explain(5, lay).")
        said = attempt(lambda: self.tried(answer))
        if isinstance(said, Verdict):
            return said
        if said:
            return Verdict(False, said)
        good = self.good()
        ops = [f"{op} of {n:,} numbers in groups of {group}" for op, n, group in good["ahead"]]
        return Verdict(True, f"Megatron-LM's layout on a grid: half the rows and a quarter of the matrices on each device, {good['held']:,} bytes of parameters. Forward XLA needs {len(ops)} collectives ({'; '.join(sorted(set(ops)))}): the matrices "
                             "that go into attention and the MLP give each device some heads and hidden units, those that come out give partial sums, and only these are added over devices. The model's text has not changed. (With many more tokens, sums of activations outweigh gradients, and dividing rows only sends less.)")

    def good(self) -> dict[str, Any]:
        return block_facts(self.specs(self.right))

    @staticmethod
    def specs(lay: Callable) -> tuple[tuple[str, tuple], ...]:
        """What `lay` says of every array; Odd for what is no layout of it."""
        found = []
        for name, shape in SHAPES.items():
            given = plainly(lay, f"lay({name!r})")(name)
            if given is None or given is ...:
                raise Odd(f"lay({name!r}) gave {given!r}: is the `...` still there, or a return missing? An array that is whole everywhere has P().")
            if not isinstance(given, P):
                raise Odd(f"lay({name!r}) gave {given!r}; it should be a PartitionSpec, such as P('data') or P(None, 'model').")
            if len(given) > len(shape):
                raise Odd(f"lay({name!r}) gave {given}, for {len(given)} axes; {name} has shape {shape}.")
            axes = [a for part in given if part is not None for a in (part if isinstance(part, tuple) else (part,))]
            if bad := [a for a in axes if a not in AXES]:
                raise Odd(f"lay({name!r}) gave {given}: the mesh has no axis {bad[0]!r}; it has 'data' and 'model'.")
            if len(axes) > len(set(axes)):
                raise Odd(f"lay({name!r}) gave {given}: an axis of the mesh divides one axis of an array only, or nothing would be left for it to divide.")
            found.append((name, tuple(given) + (None,) * (len(shape) - len(given))))
        return tuple(found)

    def tried(self, lay: Callable) -> str | None:
        """What is wrong, or None."""
        specs = dict(self.specs(lay))
        mine, good = block_facts(tuple(specs.items())), self.good()
        if mine["right"] and mine["held"] == good["held"] and mine["kinds"] == good["kinds"] and mine["sent"] <= 1.01 * good["sent"] and mine["flops"] <= 1.05 * good["flops"]:
            return None
        return self.tell(specs, mine, good)

    @staticmethod
    def tell(specs: dict[str, tuple], mine: dict, good: dict) -> str:
        def over(name: str, axis: str) -> list[int]:
            return [i for i, part in enumerate(specs[name]) if axis == part or isinstance(part, tuple) and axis in part]

        work, sends = mine["flops"] / good["flops"], mine["sent"] / good["sent"]
        kinds = ", ".join(f"{n} {op}" for op, n in mine["kinds"].items()) or "none"
        result = f"Results are {'right' if mine['right'] else 'wrong'}, but each device does {work:.2f} times the work and sends {sends:.2f} times the bytes (arrays: {kinds})."
        if over("x", "data") != [0]:
            reason = "x's rows are not divided over 'data': both halves of the mesh do the same." if not over("x", "data") else "x is divided along its positions or hidden numbers. Rows are independent of each other; tokens meet in attention."
            return f"{reason} {result}"
        if over("x", "model") not in ([], [0]):
            return f"x is divided along its positions or hidden numbers as well. Norms and products need all of a token's numbers, and attention all tokens of a row: they must be gathered. {result}"
        if over("x", "model"):
            return f"Every device has rows of its own, so none of a group of four may keep its part of a matrix: all parts must be gathered. {result}"
        if lost := [name for name in WEIGHTS if over(name, "data")]:
            return f"{', '.join(lost)}: divided over 'data'. Each half of the rows needs the whole of its part, and gathers it: that is full sharding, which buys memory with bytes. {result}"
        if whole := [name for name in WEIGHTS if not over(name, "model")]:
            return f"{'No matrix is' if len(whole) == len(WEIGHTS) else ', '.join(whole) + ': not'} divided over 'model': a device holds {mine['held']:,} bytes of parameters; {good['held']:,} would do. {result}"
        rows, columns = ([name for name in names if over(name, "model") != [axis]] for names, axis in ((INTO, 1), (OUT_OF, 0)))
        if rows and columns:
            return f"{', '.join(rows)} by rows and {', '.join(columns)} by columns: the other way round. A product whose sum runs over a divided axis gives partial sums, so XLA must add or gather after every matrix. {result}"
        if rows:
            return f"{', '.join(rows)}: divided by rows, the axis over which y @ W sums. Every device has all of y, and the sum must be added over devices at once; by columns, a device has whole heads or hidden units. {result}"
        if columns:
            return f"{', '.join(columns)}: divided by columns. What comes in is divided along the axis over which this product sums, so it must be gathered first; by rows, each device multiplies what it has, and the sums are added. {result}"
        return f"The norms' weights are divided: 64 numbers, which every device needs whole, are gathered each time. Nothing is saved. {result}"
