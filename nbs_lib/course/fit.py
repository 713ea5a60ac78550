"""`nbs fit`: the prediction, the verdict and, where it does not fit, the cheapest changes that make it fit."""
from __future__ import annotations

import itertools
from dataclasses import dataclass

from ..hardware import GPU
from ..memory import train_memory

#: What a change costs, from free to dear; used to order the ways out. Each is a rank, not a measurement: within one, fewer changes first.
FREE, SLOWER, SMALLER, DIFFERENT = range(4)
CONTEXT = 1024 * 2**20


def capacity(card: GPU) -> int:
    """Bytes that a training process can allocate on `card`: what the driver reports less what the CUDA context takes.

    The context (kernels, stacks, the driver's own) was measured on an H100: see CONTEXT.
    """
    return card.memory - CONTEXT


@dataclass(frozen=True)
class Change:
    """One setting changed: what to type, what it costs and why."""

    option: str
    settings: tuple[tuple[str, object], ...]
    cost: int
    price: str


@dataclass(frozen=True)
class WayOut:
    """Changes that together make it fit, with the peak that they lead to (bytes)."""

    changes: tuple[Change, ...]
    peak: int


def changes(settings: dict) -> list[Change]:
    """The changes that these settings leave open, each valid by itself or together with others."""
    out = []
    add = lambda option, cost, price, **new: out.append(Change(option, tuple(new.items()), cost, price))  # noqa: E731
    world = settings["world_size"]
    if settings["attention"] == "eager":
        add("--attention sdpa", FREE, "nothing: the same result without the s×s scores in memory", attention="sdpa")
    if settings["optimizer"] == "adamw":
        add("--optimizer adamw_fused", FREE, "nothing: the same update in one kernel, without temporaries", optimizer="adamw_fused")
    if world > 1 and settings["strategy"] == "ddp":
        add("--strategy full_shard", SLOWER, "half as many bytes again on the wire", strategy="full_shard")
        add("--strategy shard_grad_op", SLOWER, "the parameters are gathered once a step", strategy="shard_grad_op")
    if not settings["checkpointing"]:
        add("--checkpointing", SLOWER, "one more forward pass, about a third of the step", checkpointing=True)
    if settings["precision"] == "fp32":
        add("--precision amp_bf16", FREE, "bf16 products, fp32 weights: faster, and seldom worse", precision="amp_bf16")
    batch = settings["batch"]
    for smaller in (b for b in (batch // 2, batch // 4, batch // 8, 1) if 0 < b < batch and batch % b == 0):
        parts = settings["accumulation"] * batch // smaller
        add(f"--batch {smaller} --accumulation {parts}", SMALLER, "the same global batch in smaller pieces", batch=smaller, accumulation=parts)
    if settings["optimizer"] in ("adamw", "adamw_fused"):
        add("--optimizer adamw_8bit", DIFFERENT, "moments in 8 bits (bitsandbytes): evaluate", optimizer="adamw_8bit")
    if world > 1 and settings["strategy"] in ("full_shard", "shard_grad_op", "hybrid_shard", "ddp") and not settings["offload"]:
        strategy = settings["strategy"] if settings["strategy"] != "ddp" else "full_shard"
        add(f"--strategy {strategy} --offload" if settings["strategy"] == "ddp" else "--offload", DIFFERENT, "parameters and optimizer in host memory: many times slower", strategy=strategy, offload=True)
    if settings["precision"] in ("fp32", "amp_bf16", "amp_fp16"):
        add("--precision bf16", DIFFERENT, "bf16 weights lose small updates", precision="bf16")
    if settings["lora_rank"] is None:
        add("--lora-rank 16 --precision bf16", DIFFERENT, "trains adapters, not the model", lora_rank=16, precision="bf16",
            strategy="ddp" if world > 1 else "single")
    return out


def ways_out(model, card: GPU, room: int, settings: dict, most: int = 3) -> list[WayOut]:
    """The cheapest sets of up to three changes that bring the peak under `room` bytes, dearest change first compared.

    No set contains another that is enough by itself.
    """
    open_changes, found = changes(settings), []
    sets = [s for n in (1, 2, 3) for s in itertools.combinations(open_changes, n) if _compatible(s)]
    sets.sort(key=lambda s: (max(c.cost for c in s), len(s), sum(c.cost for c in s)))
    for candidate in sets:
        if any(set(w.changes) <= set(candidate) for w in found):
            continue
        new = {**settings, **{k: v for change in candidate for k, v in change.settings}}
        try:
            peak = train_memory(model, **new, gpu=card).peak_any
        except ValueError:
            continue
        if peak <= room:
            found.append(WayOut(candidate, peak))
            if len(found) == most:
                break
    return found


def _compatible(candidate) -> bool:
    """No setting is set twice, to different or to the same value."""
    names = [k for change in candidate for k, _ in change.settings]
    return len(names) == len(set(names))


def smallest_world(model, card: GPU, room: int, settings: dict) -> int | None:
    """The smallest number of such GPUs (a power of two up to 1024) on which full sharding of the same settings fits."""
    for world in (2**i for i in range(1, 11)):
        if world > settings["world_size"]:
            try:
                if train_memory(model, **{**settings, "strategy": "full_shard", "world_size": world, "shard_size": None}, gpu=card).peak_any <= room:
                    return world
            except ValueError:
                return None
    return None
