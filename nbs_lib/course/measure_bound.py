"""Measures for chapter 10f: what limits a small training with an attention bias, in PyTorch and in JAX.

`python3 -m nbs_lib.course.measure_bound --out FILE [--part torch flex jax]` prints what it does and writes
the file after each experiment; rows of other experiments that the file has stay. A CPU takes --small.
"""
from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")      # else JAX takes most of a GPU's memory

from ..bound import MODEL, Biased, Case, biased_loss, biased_params, cases, half
from ..jax_torch import ADAMW, LlamaConfig, Params
import jax
import optax
import torch
from jax import numpy as jnp
from torch import Tensor, nn

from ..gpt import batches, text
from .measure_adapters import clocked, say, versions
from .provenance import command_line, provenance

PARTS = ("torch", "flex", "jax")
SIZES = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context")


# --- PyTorch ---------------------------------------------------------------------------------------------

def torch_step(model: nn.Module, batch: int, seq: int, precision: str, fetch: bool = False,
               device: str = "cuda") -> Callable[[], Tensor]:
    """A training step, to be called again and again. precision: "fp32", "tf32" (products), "bf16" (autocast).
    fetch: batches come from the host's memory, made anew each time.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=device == "cuda")
    source = batches(text(), batch, seq)
    ids, targets = (x.to(device) for x in next(source))
    def step() -> Tensor:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        x, y = (t.to(device) for t in next(source)) if fetch else (ids, targets)
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"): loss = model(x, y)
        loss.backward()
        optimizer.step()
        return loss
    return step


def as_graph(step: Callable[[], Tensor]) -> Callable[[], None]:
    """The step's kernels recorded once, to be replayed without the host (CUDA only)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3): step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): step()
    return graph.replay


def idle_share(step: Callable[[], Any], steps: int = 5) -> float:
    """The share of the time in which no kernel runs, by PyTorch's profiler (which slows the host a bit)."""
    from torch.profiler import ProfilerActivity, profile
    step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        began = time.perf_counter()
        for _ in range(steps): step()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
    busy = sum(e.self_device_time_total for e in p.key_averages())*1e-6
    return max(0.0, 1 - busy/took)


def prepare(c: Case, config: LlamaConfig, device: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A call that runs the case's step, warmed up (and compiled), and what is known of it so far."""
    torch.manual_seed(0)
    model = Biased(half(config) if c.width == "half" else config, c.how).to(device)
    if c.mode == "compiled": model.llama.compile(dynamic=False)
    step = torch_step(model, c.batch, config.context, c.precision, c.fetch, device)
    began = time.perf_counter()
    loss = float(step().detach())
    found = {"framework": "torch", **c._asdict(), "first": time.perf_counter() - began, "loss": loss}
    if c.mode == "graph": step = as_graph(step)
    return step, found


def run_case(c: Case, config: LlamaConfig, device: str, rounds: int,
             profiled: bool = False) -> dict[str, Any]:
    """A row: seconds of a step (median), samples/s; with idle_share where asked; or the error's text."""
    try:
        step, found = prepare(c, config, device)
        wait = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
        seconds = clocked(step, wait, rounds)["seconds"]
        found |= {"seconds": seconds, "rate": c.batch/seconds}
        if profiled and device == "cuda": found["idle"] = idle_share(step)
        return found
    except Exception as e:
        return {"framework": "torch", **c._asdict(), "error": f"{type(e).__name__}: {e}".strip()[:300]}


def agreement(config: LlamaConfig, device: str, batch: int = 4) -> dict[str, dict[str, float]]:
    """How far sdpa and flex are from dense, in fp32: difference of the losses, and of the table's gradients
    as a share of the largest. flex without a gradient on a CPU, which has none.
    """
    torch.manual_seed(0)
    state, out = None, {}
    ids, targets = (x.to(device) for x in next(batches(text(), batch, config.context)))
    for how in ("dense", "sdpa", "flex"):
        model = Biased(config, how)
        if state is None: nn.init.normal_(model.table)
        state = state or copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        model.to(device)
        if how == "flex" and device == "cuda": model.llama.compile(dynamic=False)
        with torch.set_grad_enabled(how != "flex" or device == "cuda"): loss = model(ids, targets)
        if loss.requires_grad: loss.backward()
        if how == "dense": base, best = float(loss.detach()), model.table.grad
        out[how] = {"loss": abs(float(loss.detach()) - base)}
        if not loss.requires_grad: continue
        out[how]["table"] = float((model.table.grad - best).abs().max()/best.abs().max())
    return out


# --- JAX -------------------------------------------------------------------------------------------------

def jax_rates(plan: list[tuple[int, str]], rounds: int, config: LlamaConfig) -> Iterator[dict[str, Any]]:
    """Rows of the JAX step, one for each (batch, precision). precision: "default" (what JAX does with fp32),
    "highest" (full fp32), "bf16".
    """
    optimizer = optax.adamw(1e-4, **ADAMW)
    torch.manual_seed(0)
    params = biased_params(Biased(config))
    def step(params: Params, state: Any, ids: jax.Array, targets: jax.Array, dtype: Any) -> tuple:
        loss, grads = jax.value_and_grad(biased_loss)(params, ids, targets, config, dtype)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss
    for batch, precision in plan:
        say(f"jax, batch {batch}, {precision}: the step is compiled")
        row = {"framework": "jax", "how": "dense", "precision": precision, "batch": batch, "mode": "jit"}
        try:
            ids, targets = (jnp.asarray(x.numpy()) for x in next(batches(text(), batch, config.context)))
            dtype, state = jnp.bfloat16 if precision == "bf16" else jnp.float32, optimizer.init(params)
            began = time.perf_counter()
            with jax.default_matmul_precision("highest" if precision == "highest" else None):
                f = jax.jit(partial(step, dtype=dtype)).lower(params, state, ids, targets).compile()
            compiling = time.perf_counter() - began
            t = clocked(lambda: f(params, state, ids, targets)[2], jax.block_until_ready, rounds)
            row |= {"first": compiling + t["first"], "seconds": t["seconds"], "rate": batch/t["seconds"]}
        except Exception as e: row["error"] = f"{type(e).__name__}: {e}"[:300]
        yield row


# --- the command -----------------------------------------------------------------------------------------

def told(row: dict[str, Any]) -> str:
    """A row in a few words."""
    what = [str(row[k]) for k in ("framework", "how", "precision", "batch", "mode") if k in row]
    what += ["half as wide"]*(row.get("width") == "half") + ["fetched"]*bool(row.get("fetch"))
    return " ".join(what) + ": " + (row.get("error") or f"{row['rate']:,.0f} samples/s")


def key(row: dict[str, Any]) -> tuple:
    """Which experiment a row is."""
    return tuple(row.get(k) for k in ("framework", "how", "precision", "batch", "mode", "width", "fetch"))


def main(argv: list[str] | None = None) -> None:
    """What limits a small training with an attention bias: experiments that tell hypotheses apart."""
    ask = argparse.ArgumentParser(prog="python3 -m nbs_lib.course.measure_bound", description=main.__doc__)
    ask.add_argument("--out", type=Path, required=True, help="a JSON file; its other rows stay")
    ask.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    ask.add_argument("--small", action="store_true", help="a tiny model, for a CPU")
    a = ask.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(2, 64, 4, 4, 16, 128, 128, 64) if a.small else MODEL
    few, many, rounds = (2, 8, 3) if a.small else (16, 256, 10)
    made = provenance(command_line("nbs_lib.course.measure_bound"))
    made |= {k: v for k, v in versions().items() if "jax" in k or k == "optax"}
    same = {"model": {k: getattr(config, k) for k in SIZES}, "batches": [few, many]}
    old = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else {}
    if any(old.get(k) != v for k, v in same.items()): old = {}
    found: dict[str, Any] = same | {"rows": []} | {"provenance": made} | old
    parts = found.setdefault("parts", {"torch": old["provenance"]} if old else {})

    def keep(row: dict[str, Any]) -> None:
        found["rows"] = [r for r in found["rows"] if key(r) != key(row)] + [row]
        a.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        say(told(row))
    for part in PARTS:
        if part not in a.part: continue
        say(f"part {part}")
        parts[part] = made
        if part == "torch":
            for batch in (few, many):
                for c in cases(batch): keep(run_case(c, config, device, rounds, c == cases(batch)[0]))
        if part == "flex" and device == "cuda":
            for precision in ("bf16", "fp32"):
                keep(run_case(Case("flex", precision, many, "compiled"), config, device, rounds, True))
            try: found["agreement"] = agreement(config, device, many)
            except Exception as e: found["agreement"] = {"error": f"{type(e).__name__}: {e}".strip()[:300]}
            a.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if part == "jax":
            plan = [(many, "default"), (many, "highest"), (many, "bf16"), (few, "default"),
                    (2*few, "default")]
            for row in jax_rates(plan, rounds, config): keep(row)


if __name__ == "__main__": main()
