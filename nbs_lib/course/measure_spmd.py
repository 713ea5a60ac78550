"""Measures for chapter 10b: sharded steps in JAX and PyTorch, on this machine's GPUs or (--small) on its CPU.

`python3 -m nbs_lib.course.measure_spmd --out FILE [--part …] [--models …]` runs each part in processes of its
own, prints what it does, and writes the file after each experiment. Rows of other experiments in the file
stay, and each part keeps its own provenance. `--join A B --out FILE` makes one file of several.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..jax_torch import Array, LlamaConfig, Params, block, causal_attention, loss, rms_norm
import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

from ..spmd import (LAYOUTS, SMALL, Collective, apart, as_jax, collectives, held, mesh_for, predicted,
                    program, sent, simulate, small_case, tolerance, torch_step)
from .processes import end
from .provenance import command_line, provenance
from .train_spmd import jax_row_or_plain, say, summed, torch_row

PARTS = ("programs", "others", "ranks", "torch", "jax")     # the most telling first, the slowest last
WHAT = ("part", "way", "model", "compiled", "layout", "mistake", "case")         # which experiment a row is


# --- programs: what XLA communicates ---------------------------------------------------------------------

def listed(found: Iterable[Collective]) -> list[list]:
    """[operation, dtype, shape, runs, the end of op_name] of each array, for JSON."""
    return [[c.op, dtype, list(shape), c.times, c.where[-60:]] for c in found for dtype, shape in c.arrays]


def compared(layout: str, config: LlamaConfig = SMALL, function: Callable = loss) -> dict:
    """A layout's step beside the unsharded one on the devices that are there: collectives, how far apart."""
    case, mesh = as_jax(*small_case(config)), mesh_for(layout)
    with jax.default_matmul_precision("highest"):
        compiled, args = program(layout, mesh, *case, config, function)
        alone = jax.jit(lambda p, i, t: jax.value_and_grad(loss)(p, i, t, config))(*case)
        off = apart(compiled(*args), alone)
    found, wanted = collectives(compiled.as_text()), predicted(layout, mesh, config, *case[1].shape)
    return {"devices": mesh.devices.size, "found": summed(found), "predicted": summed(wanted), "apart": off,
            "allowed": tolerance(config, case[1].size), "arrays": listed(found)}


def program_row(layout: str) -> dict:
    """The small step's collectives, and whether it is the unsharded step."""
    return {"part": "programs", "layout": layout} | compared(layout)


def wrong_rows() -> list[dict]:
    """The chapter's silent mistakes: bytes and operations, as multiples of those of the right program."""
    case, mesh = as_jax(*small_case()), mesh_for("data")
    good, _ = program("data", mesh, *case, SMALL)
    everywhere = NamedSharding(mesh, P())
    def pinned(q: Array, k: Array, v: Array) -> Array:
        return causal_attention(*(jax.lax.with_sharding_constraint(t, everywhere) for t in (q, k, v)))
    bad = {"batch not divided": program("data", mesh, *case, SMALL, rows=everywhere)[0],
           "q, k, v pinned everywhere": program("data", mesh, *case, SMALL, partial(loss, attend=pinned))[0]}
    base, work = sent(collectives(good.as_text())), good.cost_analysis()["flops"]
    def row(name: str, c: Any) -> dict:
        found = collectives(c.as_text())
        return {"part": "programs", "mistake": name, "devices": mesh.devices.size, "found": summed(found),
                "operations": c.cost_analysis()["flops"]/work, "bytes": sent(found)/base}
    return [row(name, c) for name, c in bad.items()]


def checkpointed(params: Params, ids: Array, targets: Array, config: LlamaConfig) -> Array:
    """As loss; each block is computed again in the backward pass."""
    again = jax.checkpoint(lambda x, p: block(x, p, config, causal_attention))
    x = params["tokens"][ids]
    for p in params["blocks"]: x = again(x, p)
    logits = rms_norm(x, params["norm"], config.eps) @ params["tokens"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def again_row() -> dict:
    """Fully sharded, with blocks that are computed again."""
    row = {"part": "others", "case": "blocks computed again", "of": "fsdp"}
    return row | compared("fsdp", SMALL, checkpointed)


def grouped_row() -> dict:
    """Tensor parallelism with a quarter as many key heads as devices."""
    config = replace(SMALL, kv_heads=max(1, jax.device_count()//4))
    return {"part": "others", "case": "fewer key heads than devices", "of": "tensor",
            "kv_heads": config.kv_heads} | compared("tensor", config)


def held_row() -> dict:
    """Bytes on the fullest device of gradients, placed as parameters are or left to XLA."""
    mesh, case = mesh_for("fsdp"), as_jax(*small_case())
    _, args = program("fsdp", mesh, *case, SMALL)
    loose = jax.jit(lambda p, i, t: jax.grad(loss)(p, i, t, SMALL))(*args)
    return {"part": "others", "case": "results not placed", "of": "fsdp", "devices": mesh.devices.size,
            "placed": held(args[0]), "not placed": held(loose)}


# --- ranks: what PyTorch communicates, on four gloo processes --------------------------------------------

def rank_rows(way: str, world: Any) -> dict:
    """PyTorch's small step on the ranks of a world beside the one on a single device."""
    model, ids, targets = small_case()
    value = model(ids, targets)
    value.backward()
    answers = world.run(torch_step, way)
    grads, first = {n: p.grad for n, p in model.named_parameters()}, answers[0]
    off = max(apart(a["grads"], grads) for a in answers)
    losses = max(abs(a["loss"]/float(value.detach()) - 1) for a in answers)
    wanted = predicted(way, {"data" if way == "fsdp" else "model": len(answers)}, SMALL, *ids.shape)
    return {"part": "ranks", "way": way, "devices": len(answers), "found": summed(first["found"]),
            "predicted": summed(wanted), "apart": max(off, losses), "allowed": tolerance(SMALL, ids.numel()),
            "counted": first["counted"], "heard": len(first["found"])}


def refused_row(world: Any) -> dict:
    """What PyTorch says to two key heads on four ranks."""
    from .world import RankError
    row = {"part": "ranks", "way": "tensor", "case": "two key heads"}
    try: world.run(torch_step, "tensor", replace(SMALL, kv_heads=2))
    except RankError as e: return row | {"refused": str(e).strip().splitlines()[-1]}
    return row | {"refused": ""}


# --- the command -----------------------------------------------------------------------------------------

def attempt(jobs: list[tuple[dict, Callable[[], Any]]], part: Path, until: float, keep: bool = True) -> None:
    """Run jobs (what it is, how) one after the other; rows go into the file `part` after each, if keep. What
    there was no time for has no row.
    """
    import gc
    rows: list[dict] = []
    for what, job in jobs:
        if not go_on(until):
            if keep: say(*what.values(), "not run: the time was up (--limit)")
            continue
        if keep: say(*what.values())
        try: made = job()
        except Exception as e: made = what | {"error": f"{type(e).__name__}: {e}"[:500]}
        rows += made if isinstance(made, list) else [made]
        gc.collect()
        if torch.cuda.is_initialized(): torch.cuda.empty_cache()
        if not keep: continue
        part.with_suffix(".new").write_text(json.dumps(rows))
        part.with_suffix(".new").replace(part)
        r = rows[-1]
        said = f"{r['tokens/s']:,.0f} tokens/s" if "tokens/s" in r else r.get("error", "read")
        say(*what.values(), said)


def go_on(until: float) -> bool:
    """Whether there is time; with ranks, rank 0's answer for all, so that none waits for another."""
    yes = time.time() < until
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        said = [yes]
        torch.distributed.broadcast_object_list(said, src=0)
        return said[0]
    return yes


def read_jobs(a: argparse.Namespace) -> list[tuple[dict, Callable]]:
    """The jobs of the parts that read programs."""
    if a.work == "others":
        cases = {"blocks computed again": again_row, "results not placed": held_row,
                 "fewer key heads than devices": grouped_row}
        return [({"part": "others", "case": name}, row) for name, row in cases.items()]
    layouts = [x for x in LAYOUTS if len(LAYOUTS[x]) == 1 or jax.device_count() % 4 == 0]
    jobs = [({"part": "programs", "layout": x}, partial(program_row, x)) for x in layouts]
    return [*jobs, ({"part": "programs", "mistake": "all"}, wrong_rows)]


def work(a: argparse.Namespace) -> None:
    """What a process of the command does: one part. Under torchrun: on each rank."""
    part, ways = Path(a.out), a.ways or ["data", "fsdp", "ddp", "fsdp2"]
    names = ["tiny"] if a.small else a.models
    if a.work in ("programs", "others"):
        if a.small: simulate(8)
        attempt(read_jobs(a), part, a.until)
    elif a.work == "ranks":
        from .world import World
        with World(4, backend="gloo") as world:
            jobs = [({"part": "ranks", "way": w}, partial(rank_rows, w, world)) for w in ("fsdp", "tensor")]
            jobs += [({"part": "ranks", "case": "two key heads"}, partial(refused_row, world))]
            attempt(jobs, part, a.until)
    elif a.work == "jax":
        if a.small: simulate(2)
        fused = None if a.small else "cudnn"
        attempt([({"part": "jax", "way": w, "model": m}, partial(jax_row_or_plain, w, m, fused))
                 for m in names for w in ("data", "fsdp") if w in ways], part, a.until)
    else:
        device = torch.device("cpu") if a.small else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if not a.small: torch.cuda.set_device(device)
        backend, mine = ("gloo", None) if a.small else ("nccl", device)
        torch.distributed.init_process_group(backend, device_id=mine)
        attempt([({"part": "torch", "way": w, "model": m, "compiled": c}, partial(torch_row, w, m, c, device))
                 for m in names for w in ("ddp", "fsdp2") if w in ways for c in (False, True)], part, a.until,
                torch.distributed.get_rank() == 0)
        torch.distributed.destroy_process_group()


def launch(what: str, part: Path, a: argparse.Namespace, until: float, keep: Callable) -> None:
    """Run a part in processes of its own; `keep` gets its rows after each experiment. Processes that are far
    over time are ended.
    """
    ranks = 2 if a.small else torch.cuda.device_count()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, "-W", "ignore", *(torchrun if what == "torch" else []), "-m",
               "nbs_lib.course.measure_spmd", "--work", what, "--out", str(part), "--until", str(until),
               "--models", *a.models, *["--small"]*a.small, *(["--ways", *a.ways] if a.ways else [])]
    mark = f"NBS_LAUNCH={uuid.uuid4().hex}"
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env | dict([mark.split("=")]), start_new_session=True)
    seen = 0.0
    def look() -> float:
        if part.exists() and part.stat().st_mtime != seen: keep(json.loads(part.read_text()))
        return part.stat().st_mtime if part.exists() else seen
    try:
        while process.poll() is None and time.time() < until + a.grace:
            time.sleep(0.5)
            seen = look()
    finally:
        code = process.poll()
        end([process], mark)
        look()
        part.unlink(missing_ok=True)
    if code is None: say(f"{what}: ended, since it took too long")
    elif code: keep([{"part": what, "error": f"ended with exit status {code}"}])


def ran(row: dict) -> bool:
    """Whether a row is of an experiment that was run: not one that the time was up for."""
    return not any(words in row.get("error", "") for words in ("the time was up", "it took too long"))


def joined(old: dict, new: dict) -> dict:
    """Two measurements as one: of the same experiment the newer row. "parts": provenance and seconds of each
    part; "provenance": of the first.
    """
    def what(row: dict) -> str:
        return json.dumps([row.get(k) for k in WHAT])
    rows = {what(r): r for data in (old, new) for r in data.get("rows", []) if ran(r)}
    parts = dict(old.get("parts", {}))
    for data in (old, new):
        alone = {r["part"]: {"provenance": data["provenance"], "seconds": data["seconds"]}
                 for r in data.get("rows", []) if ran(r) and "error" not in r and "parts" not in data}
        parts |= alone | data.get("parts", {})
    source = (old or new)["provenance"]
    kept = sorted(rows.values(), key=lambda r: PARTS.index(r["part"]))
    seconds = round(sum({json.dumps(p["provenance"]): p["seconds"] for p in parts.values()}.values()), 1)
    return {"provenance": source, "seconds": seconds, "parts": parts, "rows": kept}


def write(out: Path, data: dict) -> None:
    """One row a line, so that differences can be read."""
    rows = ",\n".join(json.dumps(r) for r in data["rows"])
    head = json.dumps({k: v for k, v in data.items() if k != "rows"}, indent=1)
    out.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n', encoding="utf-8")


def main() -> None:
    """Measure, and write the rows with their provenance after each experiment."""
    about = __doc__.split("\n")[0]
    p = argparse.ArgumentParser(prog="python3 -m nbs_lib.course.measure_spmd", description=about)
    p.add_argument("--out", default="spmd.json", help="a JSON file; rows of other experiments in it stay")
    p.add_argument("--part", nargs="+", choices=PARTS, help="default: all that this machine can")
    p.add_argument("--models", nargs="+", choices=["124m", "1b"], default=["124m", "1b"])
    p.add_argument("--ways", nargs="+", choices=["data", "fsdp", "ddp", "fsdp2"], help="default: all")
    p.add_argument("--small", action="store_true", help="tiny, on this CPU")
    p.add_argument("--limit", type=float, default=150.0, help="seconds after which no experiment is begun")
    p.add_argument("--grace", type=float, default=60.0, help="seconds after the limit until a part is ended")
    p.add_argument("--join", nargs="+", type=Path, help="measure nothing; make one file of these")
    p.add_argument("--work", choices=PARTS, help=argparse.SUPPRESS)
    p.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.work: return work(a)
    out, began = Path(a.out), time.time()
    if a.join:
        data: dict = {}
        for file in a.join: data = joined(data, json.loads(file.read_text(encoding="utf-8")))
        return write(out, data)
    if not a.small and torch.cuda.device_count() < 2:
        raise SystemExit(f"this needs two GPUs or more, here are {torch.cuda.device_count()}; use --small.")
    source = provenance(command_line("nbs_lib.course.measure_spmd"))
    source |= {n: version(n) for n in ("jax", "jaxlib", "optax")}
    source["gpus"] = 0 if a.small else torch.cuda.device_count()
    old = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for what in a.part or [x for x in PARTS if a.small or x != "ranks"]:
        say(f"part {what}")
        start, base = time.time(), dict(old)
        def keep(rows: list[dict]) -> None:
            nonlocal old
            if not rows: return
            new = {"provenance": source, "seconds": round(time.time() - start, 1), "rows": rows}
            old = joined(base, new)
            write(out, old)
        launch(what, out.with_suffix(f".{what}.part"), a, began + a.limit, keep)


if __name__ == "__main__": main()
