"""Sets the course's DDP, ZeRO and FSDP beside PyTorch's on this machine's GPUs: the same GPT, the same data, in turn, in one process for each rank.

    python3 -m nbs_lib.course.scaling --out scaling.json [--ranks 1 2 4] [--models 124m 1.3b] [--ways ddp "torch ddp"] [--steps 20] [--strong] [--seconds 120] [--dry-run]

Each way is built anew in each round, and the rounds alternate, so that what drifts (clocks, neighbours) meets all ways alike. A way that fails is a row with its
error. After all timings one step of each is profiled, for the pictures of compute and communication (not between them: on the H100s, steps near the host's limit took
up to a third longer after a profile). --seconds: no way is begun after that, and what was measured stays. Without GPUs: --dry-run, tiny and on gloo.
"""
from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

from .provenance import command_line, provenance

MODELS = {  # sizes of nbs_lib.gpt.GPTConfig; batch of each rank
    "124m": (dict(layers=12, heads=12, hidden=768), 16),
    "1.3b": (dict(layers=24, heads=16, hidden=2048), 8),
    "tiny": (dict(layers=2, heads=2, hidden=64, vocab=512, context=64), 2),
}
WARM_UP, LEARNING_RATE = 4, 1e-4
ALONE = ("single",)
OURS = {"ddp": "torch ddp", "fsdp FULL_SHARD": "fsdp2 reshard", "fsdp SHARD_GRAD_OP": "fsdp2 keep"}  # and its twin
OTHERS = ("zero1", "zero2", "zero3")
ALL = [*ALONE, *(way for pair in OURS.items() for way in pair), *OTHERS]


def ways(ranks: int) -> list[str]:
    """What is run on so many ranks, each of the course's beside its twin."""
    return list(ALONE) if ranks == 1 else [way for pair in OURS.items() for way in pair] + list(OTHERS)


def built(way: str, model: Any, device: Any) -> tuple[Any, Callable[[], None], Callable[[], None]]:
    """The model wrapped, the optimizer's step, and what clears gradients. Weights fp32; products in bf16 (autocast, or FSDP's own policy)."""
    import torch

    from ..gpt import Block

    fused = device.type == "cuda"
    adamw = lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=fused)  # noqa: E731
    if way.startswith("zero"):
        from ..zero import STAGES

        engine = STAGES[way](model, torch.optim.AdamW, blocks=Block, lr=LEARNING_RATE, fused=fused)
        return model, engine.step, engine.zero_grad
    if way == "ddp":
        from ..ddp import DDP

        model = DDP(model)
    elif way == "torch ddp":
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if fused else None)
    elif way.startswith("fsdp2"):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        how = dict(reshard_after_forward=way.endswith("reshard"), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        for block in model.blocks:
            fully_shard(block, **how)
        fully_shard(model, **how)
    elif way.startswith("fsdp"):
        from ..fsdp import FSDP

        model = FSDP(model, Block, way.split()[1], param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    optimizer = adamw(model.parameters())
    return model, optimizer.step, optimizer.zero_grad


def stepper(way: str, name: str, device: Any, batch: int) -> Callable[[], Any]:
    """A training step on this rank's own part of the data, so many sequences. The model's first weights and the data are the same in every way."""
    import torch
    import torch.distributed as dist

    from ..gpt import GPT, GPTConfig

    config = GPTConfig(**MODELS[name][0])
    torch.manual_seed(0)
    with device:
        model = GPT(config)
    rank = dist.get_rank() if dist.is_initialized() else 0
    ids = torch.randint(config.vocab, (batch, config.context + 1), generator=torch.Generator().manual_seed(rank)).to(device)
    model, update, clear = built(way, model, device)
    plain = not way.startswith("fsdp")

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=plain):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        update()
        clear()
        return loss.detach()

    return step


def clocked(step: Callable[[], Any], steps: int, device: Any) -> list[float]:
    """Seconds of each step, between CUDA events; the host runs ahead, as in training."""
    import torch

    from .ladder import timed

    if device.type == "cuda":
        torch.cuda.synchronize()
    return timed(lambda: step(), [()], steps)


def profiled(step: Callable[[], Any]) -> list[list]:
    """One step's kernels on this rank's GPU: [lane, start, seconds, name], adjacent ones of the compute lane together."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        step()
        torch.cuda.synchronize()
    kernels = sorted((e.time_range.start, e.time_range.end, e.name) for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    spans: list[list] = []
    for start, end, name in kernels:
        lane = "communication" if name.lower().startswith("nccl") else "compute"
        last = next((s for s in reversed(spans) if s[0] == lane), None)
        if lane == "compute" and last and start - (last[1] + last[2]) < 20:  # microseconds between kernels that belong together
            last[2] = max(last[2], end - last[1])
        else:
            spans.append([lane, start, end - start, name.split("(")[0][:60] if lane == "communication" else "kernels"])
    began = min((s[1] for s in spans), default=0)
    return [[lane, round((start - began)/1e6, 7), round(took/1e6, 7), name] for lane, start, took, name in spans]


def run_way(way: str, name: str, device: Any, batch: int, steps: int) -> dict:
    """Build, warm up, measure; what was seen on this rank. steps 0: one step is profiled instead, {"spans": …}, which is nothing without a GPU."""
    import torch

    gpu = device.type == "cuda"
    step = stepper(way, name, device, batch)
    losses = [step() for _ in range(WARM_UP)]
    if not steps:
        return {"spans": profiled(step)} if gpu else {}
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    seen = {"seconds": clocked(step, steps, device), "losses": [float(x) for x in losses]}
    if gpu:
        seen |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return seen


def order(a: argparse.Namespace, ranks: int) -> list[tuple[str, str, int]]:
    """What is run on so many ranks, one after the other: (model, way, steps); every second round backwards, and profiles (0 steps) at the end."""
    mine = [way for way in ways(ranks) if way in a.ways]
    models = [name for name in a.models if batch_of(name, ranks, a.strong)]
    timed = [(name, way, a.steps) for name in models for r in range(a.rounds) for way in (mine[::-1] if r % 2 else mine)]
    return timed + [(name, way, 0) for name in models for way in mine]


def batch_of(name: str, ranks: int, strong: bool) -> int:
    """Sequences of a rank; 0 where there are fewer than ranks."""
    return MODELS[name][1]//(ranks if strong else 1)


def worker(a: argparse.Namespace) -> None:
    """On each rank: all ways of all models, round by round. Rank 0 writes the rows."""
    import torch
    import torch.distributed as dist

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if a.dry_run else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not a.dry_run:
        torch.cuda.set_device(device)
    began = time.monotonic()
    dist.init_process_group("gloo" if a.dry_run else "nccl", device_id=None if a.dry_run else device)
    rows: dict[tuple, dict] = {}
    over = False
    for name, way, steps in order(a, ranks):
        gc.collect()
        if not a.dry_run:
            torch.cuda.empty_cache()
        late = torch.tensor(float(time.monotonic() - began > a.seconds), device=device)
        dist.broadcast(late, 0)  # one rank's clock decides, or ranks would wait for each other; a barrier, too
        if over := bool(late.item()):
            break
        batch = batch_of(name, ranks, a.strong)
        try:
            seen = run_way(way, name, device, batch, steps)
        except Exception as e:  # all ranks meet the same error, or the group breaks and the launcher ends it
            seen = {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:300] if str(e) else ''}"}
        every: list = [None]*ranks
        dist.all_gather_object(every, seen)
        gather(rows.setdefault((name, way), {"model": name, "way": way, "ranks": ranks, "batch": batch}), every)
        if rank == 0:
            Path(a.out).write_text(json.dumps(list(rows.values())))
            print(name, way, ranks, [round(statistics.median(s["seconds"])*1000, 2) if "seconds" in s else s.get("error", "profiled") for s in every], flush=True)
    if over and rank == 0:
        print(f"{a.seconds:.0f} s are over; what was measured until then is kept", flush=True)
    gc.collect()  # a DDP module that is still there keeps gloo's threads running: at exit one of them can meet an interpreter that is gone, and abort
    dist.destroy_process_group()


def gather(row: dict, every: list[dict]) -> None:
    """Add what all ranks saw in one round to a row: a step lasts as long as on the slowest rank; bytes are rank 0's."""
    if errors := [s["error"] for s in every if "error" in s]:
        row["error"] = errors[0]
        return
    if "seconds" in every[0]:
        row.setdefault("rounds", []).append([max(times) for times in zip(*(s["seconds"] for s in every))])
        row["losses"] = [sum(x)/len(x) for x in zip(*(s["losses"] for s in every))]
    for k in ("peak", "reserved", "spans"):
        if k in every[0]:
            row[k] = every[0][k]


def summary(rows: list[dict]) -> list[str]:
    """Lines: tokens per second of all ranks, the ratio to one rank's share and to the twin, and the peak."""
    def rate(row: dict) -> float | None:
        rounds = row.get("rounds")
        return row["ranks"]*row["batch"]*MODELS[row["model"]][0].get("context", 1024)/statistics.median([s for r in rounds for s in r]) if rounds else None
    rates = {(r["model"], r["way"], r["ranks"]): rate(r) for r in rows}
    out = []
    for r in rows:
        mine, one = rates[r["model"], r["way"], r["ranks"]], rates.get((r["model"], "single", 1))
        if mine is None:
            out.append(f"{r['model']:>5} {r['way']:<20} {r['ranks']} ranks: {r['error']}")
            continue
        twin = rates.get((r["model"], OURS.get(r["way"]), r["ranks"]))
        out.append(f"{r['model']:>5} {r['way']:<20} {r['ranks']} ranks: {mine:>10,.0f} tokens/s" + (f", {mine/one/r['ranks']:.3f} of linear" if one else "")
                   + (f", {mine/twin:.3f} of {OURS[r['way']]}" if twin else "") + (f", peak {r['peak']/2**30:.2f} GiB" if "peak" in r else ""))
    return out


def main() -> None:
    """Launch the workers, one torchrun for each number of ranks, and put their rows together."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--out", default="scaling.json")
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    p.add_argument("--models", nargs="+", choices=list(MODELS), default=["124m", "1.3b"])
    p.add_argument("--ways", nargs="+", choices=ALL, default=ALL, metavar="WAY", help=f"only these: {', '.join(map(repr, ALL))}")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--strong", action="store_true", help="one rank's batch is divided among the ranks, instead of a batch for each")
    p.add_argument("--seconds", type=float, default=math.inf, help="for everything; no way is begun after that (default: as long as it takes)")
    p.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    a = p.parse_args()
    if "RANK" in os.environ:
        worker(a)
        return
    if a.dry_run:
        a.models = ["tiny"]
    out, rows, ends = Path(a.out), [], time.monotonic() + a.seconds
    for done, ranks in enumerate(a.ranks):
        part = out.with_suffix(f".{ranks}.json")
        share = max(0.0, ends - time.monotonic())/(len(a.ranks) - done)
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "nbs_lib.course.scaling", "--out", str(part),
                   "--models", *a.models, "--ways", *a.ways, "--steps", str(a.steps), "--rounds", str(a.rounds), "--seconds", str(share), *(["--strong"]*a.strong), *(["--dry-run"]*a.dry_run)]
        ended = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if part.exists():
            rows += json.loads(part.read_text())
            part.unlink()
        if ended.returncode:
            print(f"{ranks} ranks ended with exit status {ended.returncode}; rows until then are kept.")
        out.write_text(json.dumps({"provenance": provenance(command_line("nbs_lib.course.scaling")), "models": {m: MODELS[m][0] for m in a.models}, "rows": rows}, indent=None))
    print(*summary(rows), sep="\n")


if __name__ == "__main__":
    main()
