"""All that chapters 5 and 6 ask of a host with several GPUs, in one call: collectives by size, memory and time of each strategy, scaling.

    python3 -m nbs_lib.course.measure_node --out FOLDER [--gpus N] [--minutes 9] [--predict | --rehearse]

First it writes what it predicts (FOLDER/predictions.json). Then it measures, each part in processes of its own: collectives.jsonl (the course's and
torch's, by size), rows.jsonl (`nbs measure`), scaling.json and scaling_strong.json (nbs_lib.course.scaling). Last it prints both side by side. A
folder that holds a part of it already is gone on with. --predict: only the first. --rehearse: tiny, on CPU ranks and gloo, to see that everything runs.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable

from ..hardware import detect_why, gpu
from ..kernels import card
from ..memory import capacity, train_memory
from ..roofline import train_time
from . import measure, processes
from .provenance import command_line
from .scaling import MODELS

OPS = ("all_reduce", "all_gather", "reduce_scatter")
SIZES = [2**k for k in range(12, 31, 2)]  # bytes of the whole tensor
TINY = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=96, max_position_embeddings=64, tie_word_embeddings=False)
SHAPES = (dict(model="llama-3.2-1b", batch=2, seq=1024), dict(model="llama-3-8b", batch=1, seq=2048, checkpointing=True))
STRATEGY = {"ddp": "ddp", "torch ddp": "ddp", "fsdp FULL_SHARD": "full_shard", "fsdp2 reshard": "full_shard", "fsdp SHARD_GRAD_OP": "shard_grad_op", "fsdp2 keep": "shard_grad_op",
         "zero1": "zero1", "zero2": "zero2", "zero3": "zero3"}
SHARES = {"collectives": 0.15, "strategies": 0.45, "scaling": 0.2, "strong": 0.2}  # of the time
GRACE = 60  # seconds that scaling may take to end by itself what it has begun


def strategies(gpus: int) -> list[dict[str, Any]]:
    """Settings of every strategy over so many GPUs; hybrid_shard in two groups, where there are four GPUs or more."""
    return [dict(strategy=s, world_size=gpus) for s in ("ddp", "full_shard", "shard_grad_op", "zero1", "zero2", "zero3")] + [
        dict(strategy="hybrid_shard", world_size=gpus, shard_size=gpus // 2)]*(gpus >= 4 and gpus % 2 == 0)


def entries(gpus: int, rehearse: bool = False) -> list[dict[str, Any]]:
    """A suite for `nbs measure`: a model of 1B and one of 8B parameters in every strategy whose predicted peak fits; or a tiny one in all of them."""
    if rehearse:
        return [dict(group="rehearsal", model=TINY, batch=1, seq=16, precision="fp32", attention="eager", optimizer="sgd", **s) for s in strategies(gpus)]
    room, out = capacity(gpu("h100-sxm")), []
    for shape in SHAPES:
        for s in strategies(gpus):
            settings = dict(**shape, precision="bf16", optimizer="adamw_fused", **s)
            if train_memory(**settings).peak_any <= room:
                out.append(dict(group={4: "four", 8: "eight"}.get(gpus, f"{gpus} GPUs"), **settings))
    return out


def gpt2_like(name: str) -> dict[str, Any]:
    """A config of transformers' GPT-2 with the sizes of a model of nbs_lib.course.scaling: whose step is predicted."""
    from ..gpt import GPTConfig

    c = GPTConfig(**MODELS[name][0])
    return dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_embd=c.hidden, n_layer=c.layers, n_head=c.heads, n_positions=c.context, vocab_size=c.vocab,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def modelled(name: str, strategy: str, gpus: int, strong: bool = False) -> float | None:
    """Chapter 4's share of linear scaling: tokens per second of all GPUs over as many times one GPU's. strong: one GPU's batch is divided among them; None where it does not divide."""
    batch, like = MODELS[name][1], gpt2_like(name)
    if strong and batch % gpus:
        return None

    def rate(batch: int, **more: Any) -> float:
        return batch/train_time(like, batch, like["n_positions"], "amp_bf16", "adamw_fused", **more).seconds
    return rate(batch//gpus if strong else batch, strategy=strategy, world_size=gpus)/rate(batch)


def measured_shares(gpus: int, strong: bool = False) -> dict[tuple[str, str], float]:
    """The share of linear scaling that was measured on so many H100s, by (model, way)."""
    from ..ddp import measured

    return {(model, way): r["linear"] for (model, way, ranks), r in measured(strong).items() if ranks == gpus}


def scaled(gpus: int) -> list[dict[str, Any]]:
    """The predicted share of linear scaling of each way: what was measured on two GPUs, carried on by what chapter 4's model says of so many against two.

    The model alone knows transformers' GPT-2 and not the course's GPT, whose casts and kernels take another share; from two GPUs on, what changes is communication.
    Strong scaling: on two GPUs as it was predicted from weak scaling before it was measured (chapter 6b: it was far off), on more from what two were measured to do.
    """
    out = []
    for n, strong in [(n, strong) for n in worlds(gpus) for strong in (False, True) if strong or n > 2]:
        known = strong and n > 2
        for (model, way), share in measured_shares(2, known).items():
            if (more := modelled(model, STRATEGY[way], n, strong)) is not None:
                out.append(dict(model=model, way=way, gpus=n, strong=strong, share=share*more/modelled(model, STRATEGY[way], 2, known)))
    return out


def predictions(gpus: int, rehearse: bool = False) -> dict[str, Any]:
    """What this command is going to measure on H100s, before it does: seconds of collectives, peaks and seconds of steps, shares of linear scaling."""
    h100 = card("h100-sxm")
    rows = []
    for e in [] if rehearse else entries(gpus):
        s = {k: v for k, v in e.items() if k != "group"}
        rows.append({**s, "peak": train_memory(**s).peak, "seconds": train_time(**s).seconds})
    return {"gpus": gpus, "device": h100.gpu.title, "basis": h100.basis, "collectives": [dict(op=op, bytes=n, ranks=w, seconds=h100.collective(op, w, n)) for w in worlds(gpus) for op in OPS for n in SIZES],
            "strategies": rows, "scaling": [] if rehearse else scaled(gpus)}


def worlds(gpus: int) -> list[int]:
    """2, 4, … up to all of them."""
    return [n for n in (2, 4, 8, 16) if n < gpus] + [gpus]


# --- collectives: on each rank ----------------------------------------------------------------------------------------------------

def rank_main(out: Path, sizes: list[int]) -> None:
    """What torchrun starts on each rank: chapter 5b's timer; rank 0 appends the rows to the file as they come."""
    import torch
    import torch.distributed as dist

    from ..collectives import measure_ours

    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else None
    if device:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device else "gloo", device_id=device)
    for row in measure_ours(sizes, OPS):
        if dist.get_rank() == 0:
            measure.append(out, row | {"command": command_line("nbs_lib.course.measure_node")})
    dist.destroy_process_group()


# --- the parts --------------------------------------------------------------------------------------------------------------------

def started(command: list[str], seconds: float, cpu: bool, say: Callable[[str], None]) -> None:
    """Run a command for at most so long, and say what it said; what it has written until then stays."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    (status, text), = processes.run([[sys.executable, "-W", "ignore", *command]], env, seconds)
    for line in text.splitlines():
        say("  " + line)
    if status is None:
        say(f"  {seconds:.0f} s are over; what it wrote until then is kept")
    elif status:
        say(f"  ended with exit status {status}; what it wrote until then is kept")


def run(out: Path, gpus: int, minutes: float, rehearse: bool, say: Callable[[str], None] = print) -> None:
    """All parts, one after the other, each with its share of the time that is left."""
    ends, left = time.monotonic() + 60*minutes, dict(SHARES)

    def budget(part: str) -> float:
        share = left[part]/sum(left.values())
        del left[part]
        return max(20.0, share*(ends - time.monotonic()))

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    there, sizes = {(r["op"], r["ranks"], r["bytes"]) for r in measure.rows_in(out/"collectives.jsonl")}, SIZES[:4] if rehearse else SIZES
    todo = {w: late for w in worlds(gpus) if (late := [n for n in sizes if any((op, w, n) not in there for op in OPS)])}
    seconds = budget("collectives")
    for w, late in todo.items():
        say(f"collectives over {w} ranks")
        started([*torchrun, str(w), "-m", "nbs_lib.course.measure_node", "--out", str(out), "--worker", *map(str, late)], seconds/len(todo), rehearse, say)
    (out/"suite.json").write_text(json.dumps(entries(gpus, rehearse), indent=1), encoding="utf-8")
    seconds = budget("strategies")
    say("strategies, through nbs measure")
    measure.suite(out/"suite.json", out/"rows.jsonl", cpu=rehearse, limit_seconds=seconds, say=lambda line: say("  " + line), limit=min(120.0, seconds))
    for part, strong in (("scaling", False), ("strong", True)):
        file, seconds, ranks = out/("scaling_strong.json" if strong else "scaling.json"), budget(part), [1, *worlds(gpus)]
        if file.exists() and {r["ranks"] for r in json.loads(file.read_text(encoding="utf-8"))["rows"]}.issuperset(ranks):
            continue
        say(f"{'strong' if strong else 'weak'} scaling")
        started(["-m", "nbs_lib.course.scaling", "--out", str(file), "--ranks", *map(str, ranks), "--steps", "2" if rehearse else "8", "--rounds", "1" if rehearse else "2",
                 "--seconds", str(seconds), *["--strong"]*strong, *["--dry-run", "--ways", "single", "ddp", "torch ddp", "zero3"]*rehearse], seconds + GRACE, rehearse, say)


def scaling_rows(file: Path) -> list[dict[str, Any]]:
    """What nbs_lib.course.scaling has measured so far: its file's rows, and those of a number of ranks that it had begun when it was ended (scaling.N.json)."""
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for part in sorted(file.parent.glob(f"{file.stem}.[0-9]*.json")):
        try:
            rows += json.loads(part.read_text(encoding="utf-8"))
        except ValueError:  # it was ended while it wrote
            continue
    return rows


def compared(out: Path) -> list[str]:
    """Lines that set what was predicted beside what was measured, as far as there is both."""
    told = json.loads((out/"predictions.json").read_text(encoding="utf-8"))
    wanted = {(p["op"], p["bytes"], p["ranks"]): p["seconds"] for p in told["collectives"]}
    lines = []
    for r in measure.rows_in(out/"collectives.jsonl"):
        p = wanted.get((r["op"], r["bytes"], r["ranks"]))
        theirs = r["torch's"]
        beside = f", predicted {1e6*p:,.1f} ({p/theirs:.2f} times)" if p and r["backend"] == "nccl" else ""
        lines.append(f"{r['op']:<15}{r['ranks']} ranks {r['bytes']:>14,} B: torch's {1e6*theirs:>10,.1f} µs{beside}; ours {1e6*r['ours']:,.1f}, off by {r['off']:g}")
    for r in measure.rows_in(out/"rows.jsonl"):
        lines.append(f"{measure.words(r['kind'], r['settings'])}: {measure.outcome(r, None)}")
    from .scaling import summary
    for name, strong in (("scaling", False), ("scaling_strong", True)):
        if rows := scaling_rows(out/f"{name}.json"):
            shares = {(p["model"], p["way"], p["gpus"]): p["share"] for p in told["scaling"] if p["strong"] == strong}
            lines.append("strong scaling:" if strong else "weak scaling:")
            for r, line in zip(rows, summary(rows)):
                share = shares.get((r["model"], r["way"], r["ranks"]))
                lines.append(line + (f"; predicted {share:.3f} of linear" if share else ""))
    return lines


def main(argv: list[str] | None = None) -> None:
    ask = argparse.ArgumentParser(prog="python3 -m nbs_lib.course.measure_node", description=__doc__.split("\n")[0])
    ask.add_argument("--out", type=Path, required=True, help="a folder; what is in it already is kept, and gone on with")
    ask.add_argument("--gpus", type=int, help="how many (default: all of this machine; --predict and --rehearse: 4)")
    ask.add_argument("--minutes", type=float, default=9, help="for everything (default: 9)")
    how = ask.add_mutually_exclusive_group()
    how.add_argument("--predict", action="store_true", help="only write and print what is predicted; no GPU is needed")
    how.add_argument("--rehearse", action="store_true", help="tiny, on CPU ranks")
    ask.add_argument("--worker", type=int, nargs="+", help=argparse.SUPPRESS)
    a = ask.parse_args(argv)
    if a.worker:
        rank_main(a.out/"collectives.jsonl", a.worker)
        return
    cards, why = ([], "") if a.predict or a.rehearse else detect_why()
    gpus = a.gpus or (4 if a.predict or a.rehearse else len(cards))
    if not (a.predict or a.rehearse) and (not cards or gpus > len(cards)):
        ask.error(f"{gpus or 'several'} GPUs are asked for and {len(cards)} are here{f' ({why})' if why else ''}; --predict and --rehearse need none.")
    if gpus < 2: ask.error(f"--gpus is {gpus}; accepted are 2 or more.")
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out/"predictions.json"
    if file.exists():
        if (known := json.loads(file.read_text(encoding="utf-8"))["gpus"]) != gpus: ask.error(f"{a.out} is of a run with {known} GPUs; name another folder with --out.")
    else:
        file.write_text(json.dumps(predictions(gpus, a.rehearse), indent=1) + "\n", encoding="utf-8")
    if a.predict:
        told = json.loads(file.read_text(encoding="utf-8"))
        for r in told["strategies"]:
            print(f"{r['model']:<14}{r['strategy']:<14}{r['peak']/2**30:6.2f} GiB {1e3*r['seconds']:8.1f} ms")
        for s in told["scaling"]:
            print(f"{s['model']:<6}{s['way']:<22}{s['gpus']} GPUs, {'strong' if s['strong'] else 'weak'}: {s['share']:.3f} of linear")
        return
    run(a.out, gpus, a.minutes, a.rehearse)
    print(*compared(a.out), sep="\n")


if __name__ == "__main__":
    main()
