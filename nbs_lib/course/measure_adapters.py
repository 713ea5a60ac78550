"""Measures for chapter 10d: LoRA on SmolLM2-135M in PyTorch and in JAX: the same losses, memory and time.

`python3 -m nbs_lib.course.measure_adapters --out FILE [--part equal] [--ways "lora eager" …]` prints what it
does, runs one way after the other, each in a process of its own, and writes the file after each; rows of ways
that were not run now stay.
"""
from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")      # else JAX takes most of a GPU's memory

from ..adapters import (SMOLLM2, adapt, adapter_step, fresh, from_peft, merge, merge_torch, predicted,
                        rounding, run_jax, run_torch, with_peft)
from ..jax_torch import (ADAMW, Llama, LlamaConfig, Params, causal_attention, forward, from_transformers,
                         to_jax)
from ..jax_torch import loss as jax_loss
import jax
import numpy as np
import optax
import torch
from jax import numpy as jnp
from torch import Tensor, nn

from ..gpt import batches, text
from ..memory import train_memory
from ..models import arch
from .provenance import Parts, command_line, finding, libraries, provenance

WAYS = ("lora eager", "lora jit", "full eager", "full jit", "lora compiled", "lora compiled whole")


def say(*what: Any) -> None:
    """A line of progress, at once; beside the output, which is a child's answer."""
    print(f"{time.strftime('%H:%M:%S')} ", *what, file=sys.stderr, flush=True)


# --- equality --------------------------------------------------------------------------------------------

def tokens_of(tokenizer: Any = None) -> Tensor:
    """The course's text through a tokenizer; without one, two bytes a token (below 32,768)."""
    if tokenizer is None: return text(2)
    return torch.tensor(tokenizer(bytes(text()[:200_000].tolist()).decode("ascii"))["input_ids"])


def smollm2() -> tuple[Llama, Tensor, str]:
    """(model in fp32, tokens, "real" or "random"): SmolLM2's own weights where they are installed."""
    from nbs_lib.smollm2 import load
    try: theirs, tokenizer = load()
    except ModuleNotFoundError: return from_transformers(built("float32", "cpu", None)), tokens_of(), "random"
    # a copy: load() hands out the same object again
    return copy.deepcopy(from_transformers(theirs)), tokens_of(tokenizer), "real"


def built(dtype: str, device: str, rank: int | None) -> nn.Module:
    """transformers' LlamaForCausalLM of SmolLM2's shape, random weights, with peft's adapters or without."""
    from nbs_lib.course.measure.built import build
    torch.manual_seed(0)
    return build(arch(SMOLLM2), dtype, device, "sdpa", False, rank)


def equal(rank: int = 16, lr: float = 1e-3, steps: int = 10, batch: int = 2,
          seq: int = 128) -> dict[str, Any]:
    """SmolLM2 in both: losses, what they may differ by, counts, and the logits after merging."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    say("equal: SmolLM2 is read")
    model, tokens, weights = smollm2()
    params, scale = to_jax(model), 2.0
    start = from_peft(with_peft(model, rank, scale*rank))
    def data() -> Iterator[tuple[Tensor, Tensor]]: return batches(tokens, batch, seq)
    ids, targets = next(data())
    say("equal: JAX compiles and trains")
    with jax.default_matmul_precision("highest"):
        ours = run_jax(params, start, model.config, scale, data(), lr, steps)
        both = [np.asarray(forward(p, jnp.asarray(ids.numpy()), model.config))
                for p in (adapt(params, ours.result, scale), merge(params, ours.result, scale))]
    say("equal: PyTorch trains")
    theirs = run_torch(model.to(device), data(), lr, steps)
    say("equal: the rounding is measured")
    errors = rounding(model, data())
    with torch.no_grad():
        logits = model(ids.to(device)).cpu().numpy()
        again = merge_torch(model)(ids.to(device)).cpu().numpy()
    return {"weights": weights, "rank": rank, "lr": lr, "batch": batch, "seq": seq, "torch": theirs.losses,
            "jax": ours.losses, "apart": max(abs(x - y) for x, y in zip(theirs.losses, ours.losses)),
            "rounding": errors._asdict(), "tolerance": errors.tolerance(lr, steps),
            "trained": [theirs.trained, ours.trained], "state": [theirs.state, ours.state],
            "predicted": predicted(model.config, rank),
            "merged": {"peft": float(abs(again - logits).max()), "jax": float(abs(both[0] - both[1]).max()),
                       "logits": float(abs(logits).max())}}


# --- cost: memory and time -------------------------------------------------------------------------------

def clocked(step: Callable[[], Any], wait: Callable[[Any], Any], rounds: int) -> dict[str, float]:
    """Seconds of the first call; median of later ones after three more. wait: until its work is done."""
    times = []
    for _ in range(4 + rounds):
        began = time.perf_counter()
        wait(step())
        times.append(time.perf_counter() - began)
    return {"first": times[0], "seconds": statistics.median(times[4:]), "fastest": min(times[4:])}


def cost_torch(trains: str, how: str, rank: int, batch: int, seq: int, rounds: int) -> dict[str, Any]:
    """A step of transformers' model: peak memory (GPU) and time. how: "eager", "compiled" (each block),
    "compiled whole".
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, lora = "bfloat16" if device == "cuda" else "float32", rank if trains == "lora" else None
    model = built(dtype, device, lora)
    if how == "compiled":
        for block in model.get_base_model().model.layers if lora else model.model.layers: block.compile()
    if how == "compiled whole": model.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = text(2)[:batch*seq].view(batch, seq).to(device)
    say(f"{trains} {how}: built; the first step")
    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda": torch.cuda.synchronize()
    found = clocked(step, lambda _: None, rounds)
    if device != "cuda": return found | {"dtype": dtype, "peak": None, "expected": None}
    torch.cuda.reset_peak_memory_stats()
    step()
    expected = train_memory(SMOLLM2, batch, seq, "bf16", lora_rank=lora).peak if how == "eager" else None
    return found | {"dtype": dtype, "peak": torch.cuda.max_memory_allocated(), "expected": expected}


def full_step(config: LlamaConfig, lr: float, attend: Callable) -> tuple:
    """As adapter_step(), but all parameters are trained: step(params, state, None, ids, targets)."""
    optimizer = optax.adamw(lr, **ADAMW)
    def step(params: Params, state: Any, _: None, ids: jax.Array, targets: jax.Array) -> tuple:
        loss, grads = jax.value_and_grad(jax_loss)(params, ids, targets, config, attend)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss
    return step, optimizer


def cost_jax(trains: str, how: str, rank: int, batch: int, seq: int, rounds: int) -> dict[str, Any]:
    """The same in JAX: also what the compiler planned. On a GPU attention is cuDNN's, which makes no scores,
    as PyTorch's; old results are given up to the step (donated), as PyTorch overwrites them.
    """
    device, gpu = jax.devices()[0], jax.default_backend() == "gpu"
    model = from_transformers(built("bfloat16" if gpu else "float32", "cpu", None))
    params, config = to_jax(model), model.config
    attend = partial(causal_attention, implementation="cudnn") if gpu else causal_attention
    tokens = text(2)[:batch*(seq + 1)].view(batch, seq + 1).numpy()
    ids, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    if trains == "lora":
        trained = fresh(params, rank, jax.random.key(0))
        step, optimizer = adapter_step(config, 2.0, 1e-4, attend)
    else: trained, params, (step, optimizer) = params, None, full_step(config, 1e-4, attend)
    state, began = optimizer.init(trained), time.perf_counter()
    say(f"{trains} {how}: built; the step is compiled")
    program = jax.jit(step, donate_argnums=(0, 1)).lower(trained, state, params, ids, targets).compile()
    compiling, m = time.perf_counter() - began, program.memory_analysis()
    planned = (m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
               - m.alias_size_in_bytes) if m else None
    say(f"{trains} {how}: compiled in {compiling:.0f} s; steps")
    held = [trained, state]
    def once() -> jax.Array:
        held[0], held[1], loss = program(*held, params, ids, targets)
        return loss
    found = clocked(once, jax.block_until_ready, rounds)
    found["first"] += compiling
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use") if gpu else None
    return found | {"dtype": "bfloat16" if gpu else "float32", "peak": peak, "expected": planned}


def cost(way: str, **sizes: int) -> dict[str, Any]:
    """Peak memory and time of a step: one of WAYS, in this process. ValueError for another."""
    if way not in WAYS: raise ValueError(f"way is {way!r}; accepted are {', '.join(map(repr, WAYS))}.")
    trains, how = way.split(" ", 1)
    return (cost_jax if how == "jit" else cost_torch)(trains, how, **sizes)


CHILD = """import json
from importlib import import_module
try: found = getattr(import_module({module!r}), {function!r})(**{arguments!r})
except Exception as e: found = {{"error": f"{{type(e).__name__}}: {{e}}"[:300]}}
print(json.dumps(found))"""


def in_a_child(module: str, function: str, arguments: dict[str, Any],
               seconds: float) -> dict[str, Any] | None:
    """function(**arguments) in a process of its own (peaks of memory of one are not those of another), or
    {"error": …}. None if it took longer than so many seconds: then it was not measured.
    """
    call = CHILD.format(module=module, function=function, arguments=arguments)
    command = [sys.executable, "-W", "ignore", "-c", call]
    try: done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired: return None
    if done.returncode: return {"error": f"ended with exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def costs(ways: list[str], sizes: dict[str, int], limit: float) -> Iterator[dict[str, Any]]:
    """A row for each way, or its error; none for a way that takes longer than so many seconds."""
    for way in ways:
        say(f"{way}: begins")
        row = in_a_child("nbs_lib.course.measure_adapters", "cost", {"way": way} | sizes, limit)
        if row is None: say(f"{way}: not run, since it took more than {limit:.0f} s"); continue
        say(f"{way}: {row.get('error') or '{:.1f} ms a step'.format(1e3*row['seconds'])}")
        yield {"way": way} | row


def versions() -> dict[str, str]:
    """Of the libraries beside PyTorch."""
    return libraries("jax", "jaxlib", "optax", "peft", "transformers")


def main(argv: list[str] | None = None) -> None:
    """LoRA on SmolLM2-135M in PyTorch and in JAX: the same losses, memory and time."""
    ask = argparse.ArgumentParser(prog="python3 -m nbs_lib.course.measure_adapters", description=main.__doc__)
    ask.add_argument("--out", type=Path, required=True, help="a JSON file; its other parts and ways stay")
    ask.add_argument("--part", choices=["equal", "cost"], help="only this one")
    ask.add_argument("--ways", nargs="+", choices=WAYS, help="only these of the part cost")
    ask.add_argument("--limit", type=float, default=240, help="seconds for one way")
    ask.add_argument("--small", action="store_true", help="short sequences and few steps, for a CPU")
    a = ask.parse_args(argv)
    try: found = Parts(a.out, provenance(command_line("nbs_lib.course.measure_adapters")) | versions())
    except ValueError as e: ask.error(str(e))
    if a.part != "equal":
        sizes = dict(rank=16, batch=8, seq=512, rounds=20)
        if a.small: sizes = dict(rank=16, batch=1, seq=64, rounds=3)
        old = found.get("cost", {})
        rows = {r["way"]: r for r in old.get("rows", []) if {k: old.get(k) for k in sizes} == sizes}
        for row in costs(a.ways or list(WAYS[:2] if a.small else WAYS), sizes, a.limit):
            rows[row["way"]] = row
            found.keep("cost", sizes | {"rows": [rows[w] for w in WAYS if w in rows]})
    if a.part != "cost":
        try: found.keep("equal", equal(steps=5, batch=1, seq=64) if a.small else equal())
        except Exception as e: found.keep("equal", {"error": f"{type(e).__name__}: {e}"[:300]})
        say("equal: done")


# --- verdicts ----------------------------------------------------------------------------------------------

def equal_told(e: dict[str, Any]) -> dict[str, str]:
    """The verdict on the part "equal" of a measurement."""
    good = (e["apart"] <= e["tolerance"] and len({*e["trained"], e["predicted"]["trained"]}) == 1
            and e["state"] == [e["predicted"]["torch"], e["predicted"]["optax"]])
    return finding("LoRA by hand in JAX trains like peft", "holds" if good else "false",
                   f"{len(e['jax'])} steps on SmolLM2-135M ({e['weights']} weights): losses "
                   f"differ by {e['apart']:.1e} nats at most, {e['tolerance']:.1e} are allowed; "
                   f"{e['trained'][1]:,} numbers trained in both.", e["provenance"])


def costs_told(c: dict[str, Any]) -> list[dict[str, str]]:
    """The verdicts on the part "cost": memory and time, where both ways of training were measured."""
    rows = {r["way"]: r for r in c["rows"] if "seconds" in r}
    where, out = f"SmolLM2-135M, batch {c['batch']}, {c['seq']} tokens", []
    pairs = [(n, rows[f"lora {w}"], rows[f"full {w}"]) for n, w in (("PyTorch", "eager"), ("JAX", "jit"))
             if {f"lora {w}", f"full {w}"} <= rows.keys()]
    if pairs and all(r["peak"] for _, *both in pairs for r in both):
        saves = [lora["peak"] < full["peak"] for _, lora, full in pairs]
        peaks = " and ".join(f"{a['peak']/2**30:.2f} GiB instead of {b['peak']/2**30:.2f} in {n}"
                             for n, a, b in pairs)
        out.append(finding("LoRA takes less memory than training all parameters",
                           "holds" if all(saves) else "false", f"{where}: peaks of {peaks}.", c["provenance"]))
    theirs = {w: r for w, r in rows.items() if w.startswith("lora") and w != "lora jit"}
    if theirs and "lora jit" in rows and any(r["peak"] for r in rows.values()):
        ours, best = rows["lora jit"]["seconds"], min(theirs, key=lambda w: theirs[w]["seconds"])
        took = ", ".join(f"{1e3*r['seconds']:.0f} ms {w[5:]}" for w, r in theirs.items())
        out.append(finding("A LoRA step is faster in JAX than with peft",
                           "holds" if theirs[best]["seconds"] > 1.05*ours else "false",
                           f"{where}: {1e3*ours:.0f} ms by jit; with peft {took}.", c["provenance"]))
    return out


if __name__ == "__main__": main()
