"""A training step of one Llama in PyTorch and in JAX, in all ways that chapter 10a compiles it, and its
clock.
"""
from __future__ import annotations

import contextlib
import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..compiled import scanned_loss, stacked
from ..jax_torch import ADAMW, Array, Llama, LlamaConfig, Params, causal_attention, loss, to_jax

import jax      # after jax_torch, which says what to install where there is none
import optax
from jax import numpy as jnp

LATE = "not run: the time was over"


# --- the step -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Work:
    """A training step: sizes, and one dtype for weights, moments and products. device: "cpu" or "cuda"."""
    config: LlamaConfig
    batch: int
    seq: int
    device: str = "cpu"
    dtype: str = "float32"

    def tokens(self) -> np.ndarray:
        """Random ids (batch, seq + 1), the same ones each time."""
        return np.random.default_rng(0).integers(self.config.vocab, size=(self.batch, self.seq + 1))

    def model(self) -> Llama:
        torch.manual_seed(0)
        return Llama(self.config).to(getattr(torch, self.dtype))


SIZES = {"small": Work(LlamaConfig(layers=2, hidden=32, kv_heads=4, head_dim=8, ffn=64, context=16), 2, 16),
         "cpu": Work(LlamaConfig(), 4, 128),
         "cuda": Work(LlamaConfig(layers=12, hidden=768, heads=12, kv_heads=12, head_dim=64, ffn=2048,
                                  vocab=50304, context=1024), 8, 1024, "cuda", "bfloat16")}


def torch_step(w: Work, compiled: str = "") -> Callable[[], Any]:
    """One AdamW step of Llama, to be called again and again; it returns the loss without waiting for it.
    compiled: "" (eager), "blocks" (each block for itself), or a mode of torch.compile, for the whole model.
    """
    model = run = w.model().to(w.device)
    if compiled == "blocks":
        for b in model.blocks: b.compile()
    elif compiled: run = torch.compile(model, mode=compiled)
    betas = {"betas": (ADAMW["b1"], ADAMW["b2"]), "eps": ADAMW["eps"], "weight_decay": ADAMW["weight_decay"]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, **betas)
    ids = torch.from_numpy(w.tokens()).to(w.device)
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> Any:
        torch.compiler.cudagraph_mark_step_begin()       # what "reduce-overhead" returned may be overwritten
        value = run(ids, targets)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()
    return step


def jax_step(w: Work, how: str = "jit", implementation: str | None = None) -> Callable[[], Any]:
    """The same step in JAX; it returns (loss, parameters). how: "jit", "scan" (jit, the blocks by lax.scan)
    or "ops" (no jit: each operation for itself). implementation: of attention, see causal_attention.
    """
    if how not in ("jit", "scan", "ops"): raise ValueError(f"how is {how!r}; accepted are jit, scan, ops.")
    params, optimizer = to_jax(w.model()), optax.adamw(1e-4, **ADAMW)
    if how == "scan": params = stacked(params)
    attend = functools.partial(causal_attention, implementation=implementation)
    value_of = scanned_loss if how == "scan" else loss
    ids, targets = (jnp.asarray(t) for t in (w.tokens()[:, :-1], w.tokens()[:, 1:]))

    def update(params: Params, state: Any, ids: Array, targets: Array) -> tuple[Params, Any, Array]:
        value, grads = jax.value_and_grad(value_of)(params, ids, targets, w.config, attend)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value
    if how != "ops": update = jax.jit(update, donate_argnums=(0, 1))     # new weights in the old ones' memory
    held = [params, optimizer.init(params)]

    def step() -> Any:
        held[0], held[1], value = update(*held, ids, targets)
        return value, held[0]
    return step


# --- the clock ----------------------------------------------------------------------------------------------

def wait(value: Any) -> float | None:
    """Until it is computed; returns the loss, where the value is one or a tuple that starts with one."""
    if isinstance(value, torch.Tensor):
        if value.is_cuda: torch.cuda.synchronize()
    else: jax.block_until_ready(value)
    first = value[0] if isinstance(value, tuple) else value
    return float(first) if first.ndim == 0 else None


def seconds(call: Callable[[], Any], times: int = 1) -> float:
    """Wall seconds of a call, mean of so many in a row, the last one waited for."""
    start = time.perf_counter()
    for _ in range(times): value = call()
    wait(value)
    return (time.perf_counter() - start)/times


Makers = dict[str, Callable[[], Callable[[], Any]]]
Rows = list[dict[str, Any]]


def compared(makers: Makers, first: int = 4, rounds: int = 5, steps: int = 5, limit: float = math.inf,
             slow: tuple[str, ...] = (), save: Callable[[Rows], None] = lambda rows: None) -> Rows:
    """Rows of name, first (seconds of each of the first calls), loss (after one step), seconds (steady:
    median of rounds, in which all take turns), rounds. What raises gets its error's text, and what would
    start later than `limit` seconds from now is not run. slow: timed with one call a round. save gets the
    rows after each of them, with one round that it had alone, and after all rounds.
    """
    calls, rows, end = {}, {}, time.perf_counter() + limit

    def timed(name: str) -> float: return seconds(calls[name], 1 if name in slow else steps)
    for name, make in makers.items():
        row = rows[name] = {"name": name}
        if time.perf_counter() > end: row["error"] = LATE
        else:
            try:
                call = make()
                start = time.perf_counter()
                row["loss"] = wait(call())
                row["first"] = [time.perf_counter() - start] + [seconds(call) for _ in range(first - 1)]
                calls[name] = call
                row["rounds"] = [timed(name)]
                row["seconds"] = row["rounds"][0]
            except Exception as e:
                row["error"] = f"{type(e).__name__}: {e}"[:400]
                calls.pop(name, None)
        said = row.get("error") or f"first call {row['first'][0]:.2f} s, then {1e3*row['seconds']:.2f} ms"
        print(name, said, flush=True)
        save(list(rows.values()))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in calls: taken[name].append(timed(name))
    for name, times in taken.items(): rows[name] |= {"rounds": times, "seconds": statistics.median(times)}
    save(list(rows.values()))
    return list(rows.values())


def forget() -> None:
    """Drop what torch.compile and jax.jit have compiled in this process."""
    torch.compiler.reset()
    jax.clear_caches()


@contextlib.contextmanager
def cold() -> Iterator[None]:
    """Empty caches, in memory and on disk, for torch.compile and jax.jit. JAX keeps none on disk by default:
    here it does, so that a second start can be timed, too.
    """
    from jax.experimental.compilation_cache.compilation_cache import reset_cache
    from torch._inductor.utils import fresh_cache
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs

    def keep(folder: str | None, at_least: float) -> None:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", at_least)
        reset_cache()              # else a process that once compiled without a folder stays without
    with tempfile.TemporaryDirectory() as folder, fresh_cache():
        keep(folder, 0.0)
        forget()
        try: yield
        finally: keep(*before)


def warm_up(device: str) -> None:
    """Start the frameworks, their libraries and compilers, so that no row pays for that."""
    if device == "cuda" and jax.default_backend() != "gpu":
        raise RuntimeError(f"torch has a GPU here, JAX runs on {jax.default_backend()}; install jax[cuda13].")
    w = torch.ones(64, 64, device=device, requires_grad=True)
    (w @ w).sum().backward()
    jax.block_until_ready(jax.jit(lambda x: (x @ x).sum())(jnp.ones((64, 64))))
    with contextlib.suppress(Exception): torch.compile(lambda x: x*2 + 1)(w).sum().backward()
