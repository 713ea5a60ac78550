"""Runs the ladder of nbs_lib.ladder on this machine's GPU, each rung in a process of its own, and writes what it measured.

    python3 -m nbs_lib.course.ladder --out ladder.json [--nanogpt PATH/model.py] [--rungs fp32 tf32 …] [--batch 32]

While one rung runs, the next one's process has imported PyTorch already and waits for its turn; it does not touch the GPU. A rung that fails, or
takes longer than --limit, is a row with its error. Results are written after each rung.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .provenance import command_line, provenance

SEQ, CHECKED, WARM_UP = 1024, 10, 3
TINY = dict(layers=2, heads=2, hidden=64)  # --dry-run
NANO = ("nanogpt_eager", "nanogpt")


def nanogpt(path: str, start: dict, compiled: bool, device: str, sizes: dict):
    """nanoGPT's training step as its train.py has it by default (bf16 autocast, fused AdamW, no bias, vocabulary of 50304), without gradient clipping."""
    import torch
    import torch.nn.functional as F

    from ..gpt import ours

    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # its dataclass looks for it
    spec.loader.exec_module(module)
    own = {"layers": "n_layer", "heads": "n_head", "hidden": "n_embd"}
    model = module.GPT(module.GPTConfig(vocab_size=50304, bias=False, dropout=0.0, **{own[k]: v for k, v in sizes.items()}))
    padded = F.pad(start["tokens.weight"], (0, 0, 0, 50304 - len(start["tokens.weight"])))
    same = start | {"tokens.weight": padded, "head.weight": padded}
    model.load_state_dict({name: same[ours(name)] for name in model.state_dict()})
    model.to(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
    run = torch.compile(model) if compiled else model

    def step(ids, targets):
        with torch.autocast(device, torch.bfloat16):
            _, loss = run(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def timed(step, data: list, steps: int) -> list[float]:
    """Seconds between CUDA events around each step; the host runs ahead, as in training."""
    import torch

    if not torch.cuda.is_available():  # a dry run
        began = [time.perf_counter()]
        for i in range(steps):
            step(*data[i % len(data)])
            began.append(time.perf_counter())
        return [b - a for a, b in zip(began, began[1:])]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for i in range(steps):
        step(*data[i % len(data)])
        marks[i + 1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in zip(marks, marks[1:])]


def kernels(step, data: list) -> list[list]:
    """[name, calls, seconds] of the GPU's kernels in one step, longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as p:
        step(*data[1])
        torch.cuda.synchronize()
    found = [[e.key[:160], e.count, e.self_device_time_total / 1e6] for e in p.key_averages() if e.self_device_time_total]
    return sorted(found, key=lambda k: -k[2])[:40]


def run_rung(name: str, start: dict, a: argparse.Namespace) -> dict:
    """Measure one rung on the GPU: a row. Where the batch does not fit, half of it, and the row says so."""
    import gc

    import torch

    from ..gpt import batches, text
    from ..ladder import RUNGS, mfu, model_for, trainer

    batch, rung, device, seq = a.batch, RUNGS.get(name), "cpu" if a.dry_run else "cuda", 32 if a.dry_run else SEQ
    while True:
        source = batches(text(bytes_per_token=2), batch, seq)
        data = [tuple(x.contiguous().to(device) for x in next(source)) for _ in range(CHECKED)]
        try:
            if rung:
                step = trainer(rung, model_for(rung, start, device, **(TINY if a.dry_run else {})))
            else:
                step = nanogpt(a.nanogpt, start, name == "nanogpt", device, TINY if a.dry_run else {})
            began = time.perf_counter()
            losses = [float(step(*data[0]))]
            first = time.perf_counter() - began
            losses += [float(step(*d)) for d in data[1:]]
            for d in data[:WARM_UP]:
                step(*d)
            if not a.dry_run:
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(step, data, a.steps)
            break
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        step = None  # outside of the handler, whose traceback would keep the tensors
        gc.collect()
        torch.cuda.empty_cache()
    peak = 0 if a.dry_run else torch.cuda.max_memory_allocated()
    try:
        profile = kernels(step, data)
    except Exception as e:  # a profiler that does not work here must not cost the measurement
        profile = [[f"no profile: {e}"[:160], 0, 0.0]]
    rate = batch * seq / statistics.median(seconds)
    return dict(batch=batch, seconds=statistics.median(seconds), fastest=min(seconds), slowest=max(seconds), steps=a.steps, tokens_per_second=rate,
                mfu=mfu(rate), mfu_palm=mfu(rate, causal=False), peak=peak, losses=losses, first_step=first, kernels=profile,
                idea=rung.idea if rung else ["nanoGPT's own step, eager", "nanoGPT's own step, compiled"][name == "nanogpt"], settings=asdict(rung) if rung else {})


def rates(a: argparse.Namespace) -> dict:
    """What this card achieves: FLOP/s of the model's products by dtype and of attention by kernel, B/s of a copy; the time of each product, too."""
    import torch

    from ..ladder import _cross_entropy_kernel, choose_attention

    T, h, V, out, single = a.batch * SEQ, 768, 50304, {}, {}

    def seconds(f, n: int = 12) -> float:
        f(), f()
        return statistics.median(timed(lambda: f(), [()], n))

    shapes = {"qkv": (h, 3 * h), "out": (h, h), "up": (h, 4 * h), "down": (4 * h, h), "head": (h, V)}
    eight = {"fp8": (torch.float8_e4m3fn, True), "fp8 careful": (torch.float8_e4m3fn, False), "fp8 dx": (torch.float8_e5m2, False), "fp8 dx fast": (torch.float8_e5m2, True)}
    for dtype in ("fp32", "tf32", "bf16", *eight):
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        total = flops = 0
        for name, (k, n) in shapes.items():
            if dtype == "fp32" and name == "head":
                continue
            x, w = torch.randn(T, k, device="cuda"), torch.randn(n, k, device="cuda") * 0.02
            if dtype in eight:
                one, (kind, fast) = torch.ones((), device="cuda"), eight[dtype]
                x, w = x.to(kind), (w * 64).to(torch.float8_e4m3fn)
                call = lambda: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)  # noqa: E731
            else:
                if dtype == "bf16":
                    x, w = x.bfloat16(), w.bfloat16()
                call = lambda: x @ w.t()  # noqa: E731
            t, f, times = seconds(call, 5 if dtype == "fp32" else 12), 2 * T * k * n, 1 if name == "head" else 12
            single[f"{dtype} {name}"] = f / t
            total, flops = total + times * t, flops + times * f
            if dtype == "bf16":  # the two products of the backward pass
                dy = torch.randn(T, n, device="cuda", dtype=torch.bfloat16)
                for which, call in (("dx", lambda: dy @ w), ("dw", lambda: dy.t() @ x)):
                    t = seconds(call)
                    single[f"bf16 {name} {which}"] = f / t
                    total, flops = total + times * t, flops + times * f
                del dy
            del x, w, call
        out[dtype] = flops / total
    torch.backends.cuda.matmul.allow_tf32 = False
    qkv = torch.randn(a.batch, SEQ, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = (z.transpose(1, 2).requires_grad_() for z in qkv.unbind(2))
    for kind in ("flash", "cudnn"):
        choose_attention(kind)
        forward = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        y = forward()
        g, tf = torch.randn_like(y), seconds(forward)
        tb = seconds(lambda: torch.autograd.grad(y, (q, k, v), g, retain_graph=True))
        one_way = 2 * a.batch * 12 * SEQ * SEQ * 64
        single[f"{kind} forward"], single[f"{kind} backward"], out[kind] = one_way / tf, 2.5 * one_way / tb, 3.5 * one_way / (tf + tb)
    del qkv, q, k, v, y, g
    x, targets, losses = torch.randn(T, V, device="cuda", dtype=torch.bfloat16), torch.randint(V, (T,), device="cuda"), torch.empty(T, device="cuda")
    for block, warps in ((4096, 16), (8192, 32), (2048, 8), (4096, 32), (8192, 16), (16384, 32)):
        t = seconds(lambda: _cross_entropy_kernel[(T,)](x, targets, losses, 1 / T, V, BLOCK=block, num_warps=warps))
        single[f"cross-entropy {block} {warps}"] = 4 * T * V / t
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    out["copy"] = 2 * x.nbytes / seconds(lambda: y.copy_(x))
    return dict(rates=out, single=single)


def about(a: argparse.Namespace) -> dict:
    """Where the rows come from; and which triton and which nanoGPT."""
    try:
        import triton
        version = triton.__version__
    except ImportError:
        version = "none"
    nano = hashlib.sha256(Path(a.nanogpt).read_bytes()).hexdigest() if a.nanogpt else ""
    return {**provenance(command_line("nbs_lib.course.ladder")), "triton": version, "seq": SEQ, "nanogpt model.py sha256": nano}


def child(a: argparse.Namespace) -> None:
    """A rung's process: import, make the weights, wait for the word, measure, print the row."""
    import torch

    from ..ladder import weights

    if not (a.dry_run or torch.cuda.is_available()):
        sys.exit("No CUDA device here. The ladder runs on a GPU; --dry-run walks through it with a tiny model on the CPU.")
    start = weights(**(TINY if a.dry_run else {})) if a.child != "rates" else {}
    if sys.stdin.readline().strip() != "go":
        return
    if a.child == "rates":
        row = dict(rates={}, single={}, provenance={"device": "a dry run"}) if a.dry_run else rates(a) | {"provenance": about(a)}
    else:
        row = run_rung(a.child, start, a)
    print("\n" + json.dumps({"name": a.child, **row}), flush=True)


def begin(name: str, a: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "nbs_lib.course.ladder", "--child", name, "--batch", str(a.batch), "--steps", str(a.steps)] + ["--dry-run"] * a.dry_run
    return subprocess.Popen(command + (["--nanogpt", a.nanogpt] if a.nanogpt else []), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
                            stderr=open(f"{a.out}.{name}.log", "w"))


def stop(process: subprocess.Popen) -> None:
    """End a process that was started here, with the compiler's workers, which are in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def finish(process: subprocess.Popen, name: str, a: argparse.Namespace) -> dict:
    """Give the word, wait; the row, or one with its error. The log is kept only where there was one."""
    log = Path(f"{a.out}.{name}.log")
    try:
        out, _ = process.communicate("go\n", timeout=a.limit)
        if process.returncode == 0:
            log.unlink()
            return json.loads(out.splitlines()[-1])
        words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return dict(name=name, error=(words or ["it said nothing"])[-1][:400])
    except subprocess.TimeoutExpired:
        return dict(name=name, error=f"stopped after {a.limit} s")
    except BrokenPipeError:
        return dict(name=name, error="ended before its turn: " + log.read_text(errors="replace")[-400:])
    finally:
        stop(process)


def line(r: dict, result: dict) -> str:
    """A row of the table that is printed."""
    if "error" in r:
        return f"{r['name']:14}{r['error'][:110]}"
    from ..ladder import RUNGS, predicted

    base = next((x for x in result["rows"] if x["name"] == "fp32" and "losses" in x and x["batch"] == r["batch"]), None)
    off = f"{r['losses'][-1] - base['losses'][-1]:+.4f}" if base else ""
    told = sum(predicted(RUNGS[r["name"]], result["rates"], r["batch"]).values()) * 1000 if r["name"] in RUNGS and result.get("rates") else 0.0
    nano = next((x for x in result["rows"] if x["name"] == "nanogpt" and "seconds" in x), None)
    beside = f"{r['tokens_per_second'] / nano['tokens_per_second']:.3f}" if nano else ""
    return (f"{r['name']:14}{r['batch']:5}{told:9.1f}{r['seconds'] * 1000:9.2f}{r['fastest'] * 1000:9.2f}{r['tokens_per_second'] / 1000:9.1f}{100 * r['mfu']:7.1f}"
            f"{100 * r['mfu_palm']:7.1f}{r['peak'] / 2**30:7.1f}{r['losses'][-1]:9.4f} {off:8}{r['first_step']:7.1f} {beside}")


HEAD = (f"{'rung':14}{'batch':>5}{'told ms':>9}{'ms':>9}{'best ms':>9}{'ktok/s':>9}{'MFU%':>7}{'palm%':>7}{'GiB':>7}{'loss 10':>9} {'off':8}{'first s':>7} "
        "× nanoGPT")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="ladder.json")
    parser.add_argument("--nanogpt", default="", help="path of nanoGPT's model.py")
    parser.add_argument("--rungs", nargs="*", help="names; default: the whole ladder")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--limit", type=float, default=150, help="seconds a rung may take")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no further rung is begun")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU, to see that everything runs; the numbers mean nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        child(a)
        return 0
    from ..ladder import LADDER, RUNGS

    names = a.rungs or [r.name for r in LADDER] + [n for n in NANO if a.nanogpt]
    for n in names:
        if n not in RUNGS and n not in NANO:
            parser.error(f"--rungs {n!r} is not known. Accepted: {', '.join([*RUNGS, *NANO])}.")
        if n in NANO and not a.nanogpt:
            parser.error(f"--rungs {n} needs --nanogpt PATH.")
    result, began, names = {"provenance": {}, "rates": {}, "single": {}, "rows": []}, time.monotonic(), ["rates", *names]
    waiting = begin(names[0], a)
    try:
        for i, name in enumerate(names):
            process, waiting = waiting, begin(names[i + 1], a) if i + 1 < len(names) else None
            row = finish(process, name, a)
            elapsed = time.monotonic() - began
            if name == "rates" and "error" not in row:
                result |= {k: row[k] for k in ("provenance", "rates", "single")}
                print({k: f"{v / 1e12:.4g} T" for k, v in row["rates"].items()}, f"[{elapsed:.0f} s]\n{HEAD}", flush=True)
            else:
                result["rows"].append(row)
                print(line(row, result), f"[{elapsed:.0f} s]", flush=True)
            Path(a.out).write_text(json.dumps(result, indent=1) + "\n")
            if elapsed > a.budget:
                print(f"--budget is used up; not run: {', '.join(names[i + 1:])}")
                break
    finally:
        if waiting:
            stop(waiting)
    print("\n" + HEAD, *(line(r, result) for r in result["rows"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
