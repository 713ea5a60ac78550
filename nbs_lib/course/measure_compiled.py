"""What compiling costs and gives, measured: the half of chapter 10a that its readers need not read.

`python3 -m nbs_lib.course.measure_compiled --out FILE` writes parts (see PARTS), each with its rows and
where they come from; chapter 10a reads them. A row that was not run says so in "error". findings() are the
verdicts that they support.
"""
from __future__ import annotations

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..compiled import (TRAPS, Trap, after, by_name, cases_part, chain, equations, measurements, pays_after,
                        product, scanned_loss, stacked, step_rows, trapped, versions)
from ..jax_torch import loss, to_jax
from .compiled_steps import (LATE, SIZES, Makers, Work, cold, compared, forget, jax_step, seconds,
                             torch_step, warm_up)
from .provenance import Parts, command_line, provenance

import jax      # after jax_torch, which says what to install where there is none
import optax
from jax import numpy as jnp

Save = Callable[[dict[str, Any]], None]      # keeps what a part has found so far


def nowhere(found: dict[str, Any]) -> None:
    """A Save that keeps nothing."""


# --- compiling alone ----------------------------------------------------------------------------------------

def jax_compiling(w: Work, scan: bool) -> dict[str, float]:
    """Seconds of tracing, and of compiling, loss and gradients ahead of time; nothing is run."""
    jax.clear_caches()
    params = to_jax(w.model())
    ids, targets = (jnp.asarray(t) for t in (w.tokens()[:, :-1], w.tokens()[:, 1:]))
    f, params = (scanned_loss, stacked(params)) if scan else (loss, params)
    gradients = jax.value_and_grad(functools.partial(f, config=w.config))
    start = time.perf_counter()
    lowered = jax.jit(gradients).lower(params, ids, targets)
    traced = time.perf_counter()
    lowered.compile()
    return {"trace": traced - start, "compile": time.perf_counter() - traced,
            "equations": equations(gradients, params, ids, targets)}


def torch_compiling(w: Work, blocks: bool) -> dict[str, float]:
    """Seconds that a first forward and backward pass takes beyond the third: trace, with a backend that
    only traces ("aot_eager"); compile, what the real one takes beyond that, on a GPU (a CPU's starts a C++
    compiler, whose headers alone take longer than such small models).
    """
    from torch._inductor.utils import fresh_cache
    ids = torch.from_numpy(w.tokens()).to(w.device)

    def first(backend: str) -> float:
        torch.compiler.reset()
        model = run = w.model().to(w.device)
        if blocks:
            for b in model.blocks: b.compile(backend=backend)
        else: run = torch.compile(model, backend=backend)

        def both() -> Any:
            value = run(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            value.backward()
            return value.detach()
        with fresh_cache(): times = [seconds(both) for _ in range(3)]
        return times[0] - times[2]
    found = {"trace": first("aot_eager")}
    return found | ({"compile": first("inductor") - found["trace"]} if w.device == "cuda" else {})


COMPILING: dict[str, Callable[[Work], dict[str, float]]] = {
    "jax.jit": lambda w: jax_compiling(w, False), "jax.jit, scan": lambda w: jax_compiling(w, True),
    "torch.compile": lambda w: torch_compiling(w, False),
    "torch.compile, each block": lambda w: torch_compiling(w, True)}


def layers_part(w: Work, layers: tuple[int, ...], limit: float = math.inf,
                save: Save = nowhere) -> dict[str, Any]:
    """What compiling costs by the number of layers: rows of name, layers, trace and compile (in seconds),
    for each of the given numbers in turn. An error, or the time's end, is noted in the row.
    """
    rows, last, end = [], dict.fromkeys(COMPILING, 0.0), time.perf_counter() + limit
    if limit > 0: warm_up(w.device)
    for n in layers:
        for name, compiling in COMPILING.items():
            row: dict[str, Any] = {"name": name, "layers": n}
            try:
                start = time.perf_counter()
                if start + 2*last[name] > end: raise TimeoutError(LATE)
                row |= compiling(replace(w, config=replace(w.config, layers=n)))
                last[name] = time.perf_counter() - start
            except Exception as e: row["error"] = f"{type(e).__name__}: {e}"[:400]
            rows.append(row)
            said = {k: row[k] for k in ("error", "trace", "compile") if k in row}
            print(n, "layers,", name, said, flush=True)
            save({"rows": rows})
    return {"rows": rows}


# --- parts --------------------------------------------------------------------------------------------------

def functions_part(device: str, n: int, rounds: int = 12, save: Save = nowhere) -> dict[str, Any]:
    """A product of n×n matrices and a chain of elementwise operations, in four ways each: rows by function.
    """
    dtype = "bfloat16" if device == "cuda" else "float32"
    numbers = np.random.default_rng(0).random((n, n), np.float32)
    x = torch.from_numpy(numbers).to(device, getattr(torch, dtype))
    y = jnp.asarray(x.float().cpu().numpy(), dtype)
    out: dict[str, Any] = {"n": n, "dtype": dtype}
    with cold():
        warm_up(device)
        for f in (product, chain):
            makers: Makers = {"torch eager": lambda: lambda: f(x), "jax, op by op": lambda: lambda: f(y),
                              "torch.compile": lambda: functools.partial(torch.compile(f), x),
                              "jax.jit": lambda: functools.partial(jax.jit(f), y)}
            out[f.__name__] = compared(makers, 4, rounds, 4)
            save(out)
    return out


def step_makers(w: Work) -> Makers:
    """Every way to make the step here, by name."""
    fused = "cudnn" if w.device == "cuda" else None
    makers: Makers = {"torch eager": lambda: torch_step(w), "torch.compile": lambda: torch_step(w, "default"),
                      "torch.compile, each block": lambda: torch_step(w, "blocks"),
                      "jax.jit": lambda: jax_step(w, "jit", fused),
                      "jax.jit, scan": lambda: jax_step(w, "scan", fused),
                      "jax, op by op": lambda: jax_step(w, "ops", fused)}
    if w.device != "cuda": return makers
    return makers | {"torch.compile, reduce-overhead": lambda: torch_step(w, "reduce-overhead"),
                     "jax.jit, XLA's attention": lambda: jax_step(w)}


#: The ways of each part of the step; two are in all of them, since a part may be run on another day.
STEPS = {"steps": ("torch eager", "jax.jit", "torch.compile", "torch.compile, reduce-overhead"),
         "steps-more": ("torch eager", "jax.jit", "jax.jit, scan", "torch.compile, each block",
                        "jax.jit, XLA's attention"),
         "steps-ops": ("torch eager", "jax.jit", "jax, op by op")}
AGAIN = ("torch.compile", "jax.jit")


def steps_part(w: Work, part: str = "steps", limit: float = math.inf, rounds: int = 5, steps: int = 8,
               save: Save = nowhere) -> dict[str, Any]:
    """The training step in the ways of a part of STEPS, first calls and steady; in part "steps" the
    compiled ones are then started anew, with what the first start left on disk. Keys: rows, again.
    """
    if part not in STEPS: raise ValueError(f"part is {part!r}; accepted are {', '.join(STEPS)}.")
    makers, end = step_makers(w), time.perf_counter() + limit
    with cold():
        warm_up(w.device)
        mine = {name: makers[name] for name in STEPS[part] if name in makers}
        rows = compared(mine, 4, rounds, steps, end - time.perf_counter(), ("jax, op by op",),
                        lambda rows: save({"rows": rows}))
        if part != "steps": return {"rows": rows}
        forget()
        again = compared({n: makers[n] for n in AGAIN}, 1, 1, 1, end - time.perf_counter())
        return {"rows": rows, "again": again}


# --- traps that need a GPU ----------------------------------------------------------------------------------

def doubled(calls: int, copy: bool = False) -> float:
    """2i + 1 for call i of a function compiled with CUDA graphs, read after one more call; the first call
    warms up, the second records, later ones replay.
    """
    f = torch.compile(lambda x: x*2 + 1, mode="reduce-overhead")

    def call(i: int) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return f(torch.full((1024,), float(i), device="cuda"))
    for i in range(1, calls + 1): held = call(i)
    if copy: held = held.clone()
    call(calls + 1)
    return held.mean().item()


GPU_TRAPS = (
    Trap("torch", "reduce-overhead: the recording's result, kept", "has been overwritten by a subsequent run",
         lambda: doubled(2), lambda: doubled(2, True)),
    Trap("torch", "reduce-overhead: a replay's result, kept", "",
         lambda: doubled(4), lambda: doubled(4, True)))


def traps_part(device: str) -> dict[str, Any]:
    """What every trap does here: rows of trapped()."""
    return {"rows": [trapped(t) for t in TRAPS + (GPU_TRAPS if device == "cuda" else ())]}


# --- the command --------------------------------------------------------------------------------------------

def source() -> dict[str, Any]:
    """provenance() and what JAX is and runs on."""
    return provenance(command_line("nbs_lib.course.measure_compiled")) | {
        "jax": jax.__version__, "jaxlib": jax.lib.__version__, "optax": optax.__version__,
        "jax device": jax.devices()[0].device_kind, "torch threads": torch.get_num_threads(),
        "cores allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}


#: Most telling first. A GPU call has at most ten minutes: run "steps-ops" and "layers" in calls of their own.
PARTS = ("steps", "steps-more", "traps", "functions", "cases", "steps-ops", "layers")


def run(part: str, device: str, small: bool, limit: float, save: Save = nowhere) -> dict[str, Any]:
    """One of PARTS, measured."""
    w = replace(SIZES["small"], device=device) if small else SIZES[device]
    shallow = replace(SIZES["small"], device=device)
    if part == "cases": return cases_part()
    if part == "traps": return traps_part(device)
    if part == "functions":
        return functions_part(device, 256 if small else 8192 if device == "cuda" else 1024, save=save)
    if part == "layers":
        work = {"work": asdict(shallow)}
        layers = (1, 2) if small else (2, 8, 4, 16)
        return work | layers_part(shallow, layers, limit, lambda found: save(work | found))
    work = {"work": asdict(w)}
    return work | steps_part(w, part, limit, save=lambda found: save(work | found))


def main(argv: list[str] | None = None) -> None:
    """Measure what compiling costs and gives here, and put it into a file, after each experiment."""
    ask = argparse.ArgumentParser(prog="python3 -m nbs_lib.course.measure_compiled", description=main.__doc__)
    ask.add_argument("--out", type=Path, help="a JSON file; its other parts stay. Without it: print")
    ask.add_argument("--part", choices=PARTS, action="append", help="only this; may be given again")
    ask.add_argument("--small", action="store_true", help="sizes that a CPU can do, on a GPU, too")
    ask.add_argument("--limit", type=float, default=480, help="seconds after which nothing new is started")
    ask.add_argument("--cores", type=int, help="use so many CPU cores, in torch and in JAX")
    a = ask.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")     # else JAX takes 3/4 of a GPU
    if a.cores:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-a.cores:])
        torch.set_num_threads(a.cores)
    device, end = "cuda" if torch.cuda.is_available() else "cpu", time.perf_counter() + a.limit
    try: found = Parts(a.out, source())
    except ValueError as e: ask.error(str(e))
    for part in a.part or PARTS:
        print(f"--- {part}, {end - time.perf_counter():.0f} s left", flush=True)
        save = functools.partial(found.keep, part)
        try: save(run(part, device, a.small, end - time.perf_counter(), save))
        except Exception as e: save(found.get(part, {}) | {"error": f"{type(e).__name__}: {e}"[:400]})
    if not a.out: print(json.dumps(found, indent=1))


# --- verdicts -----------------------------------------------------------------------------------------------

def on_rebuilding(part: dict[str, Any]) -> tuple[str, str]:
    """Verdict and reason, from the cases: does a compiled PyTorch build its graph again in each call?"""
    rows = {r["changed"]: r for r in part["rows"]}
    same, lengths = rows["nothing"], rows["a length: 8, 9, 10, 11"]
    jax_same, torch_same = same["jax"]["counts"], same["torch"]["counts"]
    because = (f"In {len(jax_same)} equal calls jit traced {jax_same[-1]} time, in the first, and "
               f"torch.compile captured {torch_same[-1]} graph; for four lengths "
               f"{lengths['jax']['counts'][-1]} and {lengths['torch']['counts'][-1]}. "
               "Eager PyTorch records a new autograd graph in each forward.")
    rebuilt = torch_same[-1] > torch_same[0]
    return "holds" if rebuilt else "only when PyTorch runs eager", because


def on_speed(rows: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Verdict and reason, from the step's rows by name: is a jitted step the fastest, by more than a tenth?
    """
    def fastest(start: str) -> dict[str, Any]:
        return min((r for n, r in rows.items() if n.startswith(start)), key=lambda r: r["seconds"])
    jit, compiled, ops = fastest("jax.jit"), fastest("torch.compile"), "jax, op by op"
    others = {"eager PyTorch": rows["torch eager"], compiled["name"]: compiled}
    if ops in rows: others["JAX without jit"] = rows[ops]
    ratio = {name: r["seconds"]/jit["seconds"] for name, r in others.items()}
    slower = [name for name, x in ratio.items() if x > 1.1]
    verdict = ("holds" if len(slower) == len(ratio) else
               f"only when compared with {' or '.join(slower)}" if slower else "false")
    took = ", ".join(f"{n} {1e3*r['seconds']:,.1f} ms ({ratio[n]:.2g} times that)" for n, r in others.items())
    slow = rows.get("jax.jit, XLA's attention", jit)
    return verdict, (f"A training step takes {1e3*jit['seconds']:.1f} ms with {jit['name']}, {took}."
                     + ("" if ops in rows else " JAX without jit was not run yet.")
                     + (f" With XLA's own attention in place of cuDNN's jit takes {1e3*slow['seconds']:.1f} ms."
                        if slow is not jit else ""))


def on_cost(rows: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Verdict and reason, from the step's rows by name: is compiling worth its time?"""
    said, ends = [], []
    for name, plain in (("torch.compile", "torch eager"), ("jax.jit", "jax, op by op")):
        r = rows[name]
        first = f"{name}: first call {r['first'][0]:.1f} s, then {1e3*r['seconds']:.1f} ms a step"
        if plain in rows:
            ends.append(pays_after(rows[name], rows[plain]))
            said.append(f"{first} instead of {1e3*rows[plain]['seconds']:,.1f} ({plain}); paid {after(ends[-1])}")
        else: said.append(f"{first} ({plain}: not run yet)")
    paid = [n for n in ends if n is not None]
    verdict = f"only when a run has more than {max(paid):,} steps of one shape" if paid else "false"
    return verdict, "; ".join(said) + "."


CLAIMS = {"JAX compiles the graph ahead, PyTorch rebuilds it every forward": "cases",
          "JAX is blazing fast once it works": "steps", "compiling is worth its time": "steps"}
_JUDGES = dict(zip(CLAIMS, (on_rebuilding, on_speed, on_cost)))


def findings() -> list[dict[str, str]]:
    """A row per claim and measured device: claim, verdict, because, versions, device."""
    out = []
    for found in map(measurements, ("cpu", "h100")):
        for claim, part in CLAIMS.items():
            if "rows" not in found.get(part, {}): continue
            given = found[part] if part == "cases" else by_name(step_rows(found).values())
            verdict, because = _JUDGES[claim](given)
            out.append({"claim": claim, "verdict": verdict, "because": because,
                        "versions": versions(found[part]), "device": found[part]["provenance"]["device"]})
    return out


if __name__ == "__main__": main()
