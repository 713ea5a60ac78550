"""Attention with a bias, measured: the half of chapter 10c that its readers need not read.

`python3 -m nbs_lib.course.measure_biases --out FILE` writes parts (see BUDGET), each with its rows and where
they come from, after every row; chapter 10c reads them. findings() are the verdicts that they support.
"""
from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from ..biases import (ALIBI, LEARNED, LIMITS, PACKED, WAYS, Case, alibi_slopes, by_sdpa, causal, cause, distance,
                      documents, error_bound, flex_with_gradients, jax_with_gradients, judged, measurements,
                      packed, short, timed, trial, truth, verdict, with_gradients)
from .provenance import Parts, command_line, finding, libraries, provenance


# --- PyTorch ------------------------------------------------------------------------------------------------

def seconds_of(calls: dict[Any, Callable[[], Any]], device: str, rounds: int = 5) -> dict[Any, float]:
    """The median seconds of each call, measured in turns, after one that is not counted. NaN where memory ran
    out.
    """
    def once(call: Callable) -> float:
        if device == "cpu":
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        try:
            start.record()
            for _ in range(3): call()
            end.record()
        except torch.OutOfMemoryError: return math.nan
        end.synchronize()
        return start.elapsed_time(end)/3e3
    times = [[once(call) for call in calls.values()] for _ in range(rounds + 1)][1:]
    return {name: float(f"{statistics.median(t):.4g}") for name, t in zip(calls, zip(*times))}


def torch_calls(s: int, b: int, n: int, d: int, device: str, ways: tuple[str, ...]) -> dict[str, tuple]:
    """way → (forward, forward and backward, bytes of its dense bias): calls on bf16 inputs, compiled for s.
    A way of flex_attention may end with ", 2 stages": its kernels then have so many.
    """
    case = Case("ALiBi", s=s, b=b, n=n, d=d)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    t = {x: y.requires_grad_() for x, y in case.inputs(device, dtype).items() if x in "qkvg"}
    slopes, g = alibi_slopes(n).to(device), t.pop("g").detach()
    ids, out = documents(s).to(device), {}

    def both(forward: Callable, *more: Tensor) -> Callable:
        return lambda: torch.autograd.grad(forward(), (*t.values(), *more), g)

    def sdpa(**how: Any) -> Callable: return lambda: F.scaled_dot_product_attention(*t.values(), **how)
    if "sdpa causal" in ways: out["sdpa causal"] = sdpa(is_causal=True), both(sdpa(is_causal=True)), 0
    for way in (w for w in ("sdpa dense", "sdpa table") if w in ways):
        bias = torch.empty(1, n, s, s, device=device, dtype=dtype)
        for h in range(n):
            away = distance(s, device)
            bias[0, h] = (-slopes[h]*away).masked_fill(away < 0, -math.inf)
        more = (bias.requires_grad_(),) if way == "sdpa table" else ()
        out[way] = sdpa(attn_mask=bias), both(sdpa(attn_mask=bias), *more), bias.nbytes
    learned = torch.zeros(n, 2*s - 1, device=device, requires_grad=True)
    mods = {"flex alibi": (lambda score, b, h, i, j: score - slopes[h]*(i - j), causal, ()),
            "flex packed": (lambda score, b, h, i, j: score - slopes[h]*(i - j), packed(ids), ()),
            "flex table": (lambda score, b, h, i, j: score + learned[h, i - j + s - 1], causal, (learned,))}
    for way in (w for w in ways if w.startswith("flex")):
        kind, _, stages = way.partition(", ")
        mod, mask, more = mods[kind]
        options = {"num_stages": int(stages.split()[0])} if stages else None
        blocks = flex.create_block_mask(mask, None, None, s, s, device=device)
        call = torch.compile(flex.flex_attention, dynamic=False)
        how = dict(score_mod=mod, block_mask=blocks, kernel_options=options)
        forward = lambda call=call, how=how: call(*t.values(), **how)
        alone = forward
        if device == "cpu":                   # compiled, it has a forward pass only; the other says so
            plain = [y.detach() for y in t.values()]
            alone = torch.no_grad()(lambda call=call, how=how: call(*plain, **how))
            forward = lambda how=how: flex.flex_attention(*t.values(), **how)
        out[way] = alone, both(forward, *more), 0
    return out


def tried(call: Callable, device: str) -> dict[str, Any]:
    """First call, with what it compiles: {"first": seconds, "peak": bytes beyond what was there}, or "error".
    """
    began = time.perf_counter()
    try:
        call()
        if device == "cuda": torch.cuda.synchronize()
        first = float(f"{time.perf_counter() - began:.3g}")
        if device == "cpu": return {"first": first}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return {"first": first, "peak": torch.cuda.max_memory_allocated() - before}
    except torch.OutOfMemoryError: return {"error": "out of memory"}
    except Exception as e: return {"error": short(e)}


def kernels_of(call: Callable) -> list[str]:
    """Names of the GPU's kernels of a call, the longest first; at most three, cut at 80 characters. Where the
    profiler fails: why.
    """
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        events = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)
        return [e.key[:80] for e in events if e.device_time_total][:3]
    except Exception as e: return [short(e)]


def host_of(call: Callable, times: int = 10) -> float:
    """Seconds until a call returns, not waiting for the GPU: what the host needs to launch it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times): call()
    seconds = (time.perf_counter() - began)/times
    torch.cuda.synchronize()
    return float(f"{seconds:.3g}")


def torch_rows(s: int, b: int, n: int, d: int, device: str, ways: tuple[str, ...], names: bool = False,
               host: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Rows of way, s, b, n, d, passes ("forward" or "both"), seconds, first, peak, bias (bytes); or error.
    They come after each way, timed alone, and at the end again, timed in turns. names: with the longest
    kernels' names; host: with the host's seconds.
    """
    torch._dynamo.reset()
    rows, calls = [], {}
    for way in ways:                              # one by one: a bias that does not fit stops only its own
        try: made = torch_calls(s, b, n, d, device, (way,))[way]
        except torch.OutOfMemoryError: made = None
        for i, passes in enumerate(("forward", "both")):
            row = {"way": way, "s": s, "b": b, "n": n, "d": d, "passes": passes}
            row |= tried(made[i], device) | {"bias": made[2]} if made else {"error": "out of memory"}
            if "error" not in row:
                calls[way, passes] = made[i]
                if names: row["kernels"] = kernels_of(made[i])
                if host and device == "cuda": row["host"] = host_of(made[i])
                row |= clocked(seconds_of({0: made[i]}, device, 1)[0])
            rows.append(row)
        del made
        yield rows
    for key, seconds in seconds_of(calls, device).items():
        next(r for r in rows if (r["way"], r["passes"]) == key).update(clocked(seconds))
    yield rows


def clocked(seconds: float) -> dict[str, Any]:
    """The part of a row that says how long it took, or that memory ran out."""
    return {"error": "out of memory"} if math.isnan(seconds) else {"seconds": seconds}


# --- JAX ----------------------------------------------------------------------------------------------------

def jax_row(way: str, passes: str, s: int, b: int, n: int, d: int, device: str,
            rounds: int = 5) -> dict[str, Any]:
    """As a row of torch_rows: jax.nn.dot_product_attention with ALiBi, its dense bias given or made inside;
    peak as XLA planned it (temporaries and results).
    """
    row = {"way": way, "s": s, "b": b, "n": n, "d": d, "passes": passes}
    try:
        from .. import jax_torch
        jax, jnp = jax_torch.jax, jax_torch.jnp
        dtype = jnp.bfloat16 if device == "cuda" else jnp.float32
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, g = (jax.random.normal(x, (b, s, n, d), dtype) for x in keys)
        slopes = jnp.asarray(alibi_slopes(n).numpy())
        away = lambda: jnp.arange(s)[:, None] - jnp.arange(s)
        dense = lambda: (-slopes[:, None, None]*away()).astype(dtype)[None]
        how = "cudnn" if way == "jax cudnn" else "xla"
        bias = jnp.zeros(()) if "inside" in way else jax.jit(dense)()

        def attend(q, k, v, bias):
            return jax.nn.dot_product_attention(q, k, v, bias=bias if bias.ndim else dense(), is_causal=True,
                                                implementation=how)

        def both(q, k, v, bias):
            out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, bias), q, k, v)
            return backward(g)
        began = time.perf_counter()
        call = jax.jit(attend if passes == "forward" else both).lower(q, k, v, bias).compile()
        planned = call.memory_analysis()
        jax.block_until_ready(call(q, k, v, bias))
        row |= {"first": float(f"{time.perf_counter() - began:.3g}"), "bias": bias.nbytes if bias.ndim else 0,
                "peak": planned.temp_size_in_bytes + planned.output_size_in_bytes}
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            for _ in range(3): out = call(q, k, v, bias)
            jax.block_until_ready(out)
            times.append((time.perf_counter() - began)/3)
        return row | {"seconds": float(f"{statistics.median(times):.4g}")}
    except Exception as e:
        return row | {"error": "out of memory" if "RESOURCE_EXHAUSTED" in str(e) else short(e)}


# --- the limits and the comparison --------------------------------------------------------------------------

def in_pool(tasks: list[tuple], seconds: float, workers: int) -> list[dict[str, Any]]:
    """judged(*task) for tasks of (function, *arguments), in so many processes: compiling takes long, and a
    kernel that breaks its process breaks no other. What is not done after so many seconds is "not run".
    """
    import concurrent.futures as futures
    from multiprocessing import active_children, get_context

    began, out = time.perf_counter(), []
    late = {"outcome": "not run", "worst": None, "detail": "no time left"}
    pool = futures.ProcessPoolExecutor(workers, get_context("spawn"))
    with patch.dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS="1"):    # each process compiles by itself
        waiting = [pool.submit(*task) for task in tasks]
    for one in waiting:
        left = max(0.0, seconds - (time.perf_counter() - began))
        try: out.append(one.result(left))
        except futures.TimeoutError: out.append(dict(late))
        except Exception as e: out.append({"outcome": "error", "worst": None, "detail": short(e)})
    pool.shutdown(wait=False, cancel_futures=True)
    if any(not one.done() for one in waiting):                         # what hangs would hold us up
        for child in active_children(): child.terminate()
    return out


def limit_rows(device: str, seconds: float) -> list[dict[str, Any]]:
    """Every case of LIMITS, in every way that this device offers: rows of claim, case, how, and of judged."""
    hows = ("compiled", "eager") if device == "cuda" else ("eager", "compiled forward")
    dtype, workers = (torch.bfloat16, 8) if device == "cuda" else (torch.float32, 2)
    plan = [(claim, case, how) for how in hows for claim, cases in LIMITS.items() for case in cases]
    found = in_pool([(trial, case, how, device, dtype) for _, case, how in plan], seconds, workers)
    return [{"claim": claim, "case": case.name, "how": how} | r for (claim, case, how), r in zip(plan, found)]


def equal_rows(device: str, cases: tuple[Case, ...] = (ALIBI, LEARNED, PACKED)) -> list[dict[str, Any]]:
    """Biases in every way, judged: rows of case, way, and of judged. bf16 on a GPU, fp32 on a CPU."""
    dtype, rows = torch.bfloat16 if device == "cuda" else torch.float32, []
    for case in cases:
        case = replace(case, s=256, d=64)
        t = case.inputs(device, dtype)
        true, bound = truth(case, t), error_bound(case, t, dtype)
        ways = {"SDPA": lambda: with_gradients(lambda t: by_sdpa(case, t), case, t),
                "flex_attention, eager": lambda: flex_with_gradients(case, t),
                "jax.nn.dot_product_attention, xla": lambda: jax_with_gradients(case, t)}
        if device == "cuda":
            ways |= {"flex_attention, compiled": lambda: flex_with_gradients(case, t, True),
                     "jax.nn.dot_product_attention, cudnn": lambda: jax_with_gradients(case, t, "cudnn")}
        rows += [{"case": case.name, "way": way} | judged(call, true, bound) for way, call in ways.items()]
    return rows


# --- the command --------------------------------------------------------------------------------------------

def swept(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """Sizes of the sweep over lengths, 16,384 tokens each, the telling ones first."""
    n, d, tokens = (4, 32, 256) if small else (16, 64, 16384)
    for s in (256, 128) if small else (2048, 8192, 16384, 512, 4096, 1024):
        yield dict(s=s, b=max(1, tokens//s), n=n, d=d, device=device)


def measured(part: str, device: str, small: bool, seconds: float) -> Iterator[list[dict[str, Any]]]:
    """The rows of a part so far, again and again: "limits" and "equal" at once, the others after each
    experiment. Nothing new is started after so many seconds.
    """
    end, done = time.perf_counter() + seconds, []
    if part == "limits": yield limit_rows(device, seconds)
    if part == "equal": yield equal_rows(device)
    if part == "explain":
        stages = ("flex table, 2 stages", "flex table, 1 stage", "flex alibi", "flex packed", "sdpa dense")
        wide = ("sdpa causal", "sdpa dense", "flex alibi")
        for ways, d, s in ((stages, 64, 2048), (wide, 128, 8192), (stages, 64, 8192)):
            if time.perf_counter() > end: return
            sizes = dict(s=128, b=1, n=2, d=d//2) if small else dict(s=s, b=16384//s, n=16, d=d)
            for rows in torch_rows(**sizes, device=device, ways=ways, host=True): yield done + rows
            done += rows
    for i, sizes in enumerate(swept(device, small) if part in ("torch", "jax") else ()):
        if part == "torch":
            if time.perf_counter() > end: return
            ways, first = WAYS[:4] + (WAYS[4:6] if i < 2 else ()), device == "cuda" and not i
            for rows in torch_rows(**sizes, ways=ways, names=first): yield done + rows
            done += rows
            if device == "cuda": torch.cuda.empty_cache()
        else:
            for way, passes in ((w, p) for w in WAYS[6:] for p in ("forward", "both")):
                if time.perf_counter() > end: return
                done.append(jax_row(way, passes, **sizes))
                yield done


#: Seconds of each part, most telling first. A GPU call has at most ten minutes: give "jax" one of its own.
BUDGET = {"torch": 150, "equal": 60, "limits": 90, "explain": 120, "jax": 300}


def main(argv: list[str] | None = None) -> None:
    """Measure on this machine, and put what was found into a file as it comes."""
    ask = argparse.ArgumentParser(prog="python3 -m nbs_lib.course.measure_biases", description=main.__doc__)
    ask.add_argument("--out", type=Path, required=True, help="a JSON file; its other parts stay")
    ask.add_argument("--part", choices=list(BUDGET), action="append", help="only this; may be given again")
    ask.add_argument("--small", action="store_true", help="short sequences, to try it on a CPU")
    ask.add_argument("--seconds", type=float, help="a part starts nothing new after so long; default: "
                     + ", ".join(f"{part} {n}" for part, n in BUDGET.items()))
    a = ask.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try: found = Parts(a.out, provenance(command_line("nbs_lib.course.measure_biases")) | libraries("jax", "jaxlib"))
    except ValueError as e: ask.error(str(e))
    for part in a.part or tuple(BUDGET):
        began, said = time.perf_counter(), 0
        for rows in measured(part, device, a.small, a.seconds or BUDGET[part]):
            for r in rows[said:]: print(" | ".join(str(x) for x in r.values())[:200], flush=True)
            said = len(rows)
            found.keep(part, {"seconds": round(time.perf_counter() - began), "rows": rows})
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)


# --- verdicts -----------------------------------------------------------------------------------------------

def speaks(claim: str, case: str) -> bool:
    """Whether a case that fails supports a claim: where all dimensions are powers of two, or there is one tensor
    only, it speaks of another limit.
    """
    tried = {c.name: c for c in LIMITS.get(claim, ())}.get(case)
    if tried is not None and "more than one tensor" in claim: return len(tried.terms) > 1
    if tried is None or claim != "dimensions must be powers of two": return True
    return any(n & (n - 1) for n in (tried.d, tried.wide or tried.d, tried.s, tried.n))


def limit_findings(part: dict[str, Any]) -> list[dict[str, str]]:
    """A finding for each claim of LIMITS and each way of running it with gradients that was measured."""
    out = []
    for how in ("compiled", "eager"):
        for claim in LIMITS:
            rows = [r for r in part["rows"]
                    if (r["claim"], r["how"]) == (claim, how) and r["outcome"] != "not run"]
            if not rows: continue
            said, because = verdict([r for r in rows if speaks(claim, r["case"])])
            others = [f"{r['case']} ({cause(r['detail'])})" for r in rows
                      if r["outcome"] != "works" and not speaks(claim, r["case"])]
            if others: because += f" Another limit: {'; '.join(others)}."
            out.append(finding(f"flex_attention: {claim}", said, because, part["provenance"], how))
    return out


def equal_findings(part: dict[str, Any]) -> list[dict[str, str]]:
    """Whether JAX's attention takes a bias, and whether PyTorch needs flex_attention for one."""
    by_way: dict[str, list] = {}
    for r in part["rows"]:
        if not r["detail"].startswith("ModuleNotFoundError"): by_way.setdefault(r["way"], []).append(r)
    out = []
    for way in (w for w in by_way if w.startswith("jax")):
        said, because = verdict(by_way[way])
        said = {"no longer": "holds", "holds": "false"}.get(said, said.replace("when tried", "when not tried"))
        out.append(finding("JAX's attention takes a bias", said, because, part["provenance"], way.split(", ")[1]))
    said, because = verdict(by_way["SDPA"])
    said = "false" if said == "no longer" else "holds"
    return out + [finding("a custom bias in PyTorch needs flex_attention", said,
                          "SDPA takes it dense, as attn_mask. " + because, part["provenance"])]


NAMED = {"sdpa dense": "SDPA with a dense bias", "sdpa causal": "SDPA without a bias"}


def speed_findings(found: dict[str, Any]) -> list[dict[str, str]]:
    """On a GPU: flex_attention against a dense bias and against flash attention; on a CPU: whether it trains.
    """
    part, out = found["torch"], []
    mine = timed(found, "flex alibi")
    if not part["provenance"]["cuda"]:
        refused = [r["error"] for r in mine.values() if "error" in r]
        said = "false" if len(refused) == len(mine) else "holds"
        return [finding("flex_attention trains on a CPU", said,
                        refused[0] if refused else "its backward pass ran.", part["provenance"])] if mine else []
    for other, claim, least in (("sdpa dense", "flex_attention is faster than SDPA with a dense bias", 1.0),
                                ("sdpa causal", "a bias in flex_attention costs no time over flash", 0.95)):
        ratios = {s: r["seconds"]/mine[s]["seconds"] for s, r in timed(found, other).items()
                  if "seconds" in r and "seconds" in mine.get(s, {})}
        if not ratios: continue
        good = [s for s, ratio in sorted(ratios.items()) if ratio > least]
        said = "holds" if len(good) == len(ratios) else "false" if not good else \
            "only when s is " + ", ".join(f"{s:,}" for s in good)
        because = ", ".join(f"{ratio:.2f} at {s:,} tokens" for s, ratio in sorted(ratios.items()))
        out.append(finding(claim, said, f"{NAMED[other]} takes so many times flex_attention's time, forward and "
                           f"backward: {because}.", part["provenance"], "compiled"))
    return out


def findings() -> list[dict[str, str]]:
    """The verdicts that the data files support: {"claim", "verdict", "because", "versions", "device"}."""
    out = []
    for found in filter(None, map(measurements, ("h100", "cpu"))):
        if "limits" in found: out += limit_findings(found["limits"])
        if "equal" in found: out += equal_findings(found["equal"])
        if "torch" in found: out += speed_findings(found)
    return out


if __name__ == "__main__": main()
