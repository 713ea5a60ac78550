"""`nbs fit`: the prediction, the verdict and, where it does not fit, the cheapest changes that make it fit."""
from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from ..hardware import GPU
from ..memory import Memory, train_memory
from ..verdict import verdict

#: What a change costs, from free to dear, by what it changes: nothing; the size of the pieces; the arithmetic done twice or sent over
#: the wire; the numbers; what is trained; the speed, many times over. Ranks, not measurements.
FREE, PIECES, RECOMPUTE, NUMBERS, DIFFERENT, SLOW = range(6)


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
    out, world, batch, strategy = [], settings["world_size"], settings["batch"], settings["strategy"]

    def add(option, cost, price, **new):
        new = {name: value for name, value in new.items() if settings[name] != value}
        flags = [option] if option else []
        flags += [f"--{name} {new[name]}" for name in ("precision", "strategy") if name in new]
        out.append(Change(" ".join(flags), tuple(new.items()), cost, price))

    if settings["attention"] == "eager":
        add("--attention sdpa", FREE, "the same result, without s×s scores in memory", attention="sdpa")
    if settings["optimizer"] == "adamw":
        add("--optimizer adamw_fused", FREE, "the same update in one kernel, without temporaries", optimizer="adamw_fused")
    if settings["precision"] == "fp32":
        add("", PIECES, "products in bf16, weights in fp32: faster, and seldom worse", precision="amp_bf16")
    for smaller in (b for b in (batch // 2, batch // 4, batch // 8, 1) if 0 < b < batch and batch % b == 0):
        parts = settings["accumulation"] * batch // smaller
        add(f"--batch {smaller} --accumulation {parts}", PIECES, "the same global batch in smaller pieces", batch=smaller, accumulation=parts)
    if not settings["checkpointing"]:
        add("--checkpointing", RECOMPUTE, "one more forward pass, about a third of the step", checkpointing=True)
    if world > 1 and strategy in ("ddp", "zero1", "zero2"):
        add("", RECOMPUTE, "parameters gathered once more in every step", strategy="shard_grad_op")
        add("", RECOMPUTE, "parameters gathered twice in every step", strategy="full_shard")
    if world > 1 and strategy == "shard_grad_op":
        add("", RECOMPUTE, "parameters gathered again in the backward pass", strategy="full_shard")
    if settings["optimizer"] in ("adamw", "adamw_fused"):
        add("--optimizer adamw_8bit", NUMBERS, "moments in 8 bits (bitsandbytes): evaluate", optimizer="adamw_8bit")
    if settings["precision"] in ("fp32", "amp_bf16", "amp_fp16"):
        add("", NUMBERS, "weights in bf16, which lose small updates: evaluate", precision="bf16")
    if settings["lora_rank"] is None:
        add("--lora-rank 16", DIFFERENT, "trains adapters, not the model", lora_rank=16, precision="bf16", strategy="ddp" if world > 1 else "single")
    if world > 1 and not settings["offload"]:
        sharded = strategy if strategy in ("full_shard", "shard_grad_op", "hybrid_shard") else "full_shard"
        add("--offload", SLOW, "parameters and optimizer in host memory: many times slower", offload=True, strategy=sharded)
    return out


def fits(m: Memory) -> bool:
    """Whether a step surely fits."""
    return verdict(m).answer == "fits"


def ways_out(model, card: GPU, settings: dict, most: int = 3) -> list[WayOut]:
    """The cheapest sets of up to three changes that make it fit on the card.

    No set contains another that is enough by itself.
    """
    open_changes, found = changes(settings), []
    sets = [s for n in (1, 2, 3) for s in itertools.combinations(open_changes, n) if _compatible(s)]
    sets.sort(key=lambda s: (max(c.cost for c in s), len(s), sum(c.cost for c in s)))  # the dearest change decides
    for candidate in sets:
        if any(set(w.changes) <= set(candidate) for w in found):
            continue
        new = {**settings, **{k: v for change in candidate for k, v in change.settings}}
        try:
            m = train_memory(model, **new, gpu=card)
        except ValueError:
            continue
        if fits(m):
            found.append(WayOut(candidate, m.peak_any))
            if len(found) == most:
                break
    return found


def _compatible(candidate) -> bool:
    """No setting is set twice, to different or to the same value."""
    names = [k for change in candidate for k, _ in change.settings]
    return len(names) == len(set(names))


def smallest_world(model, card: GPU, settings: dict) -> int | None:
    """The smallest number of such GPUs (a power of two up to 1024) on which full sharding of the same settings fits."""
    for world in (2**i for i in range(1, 11)):
        if world > settings["world_size"]:
            try:
                if fits(train_memory(model, **{**settings, "strategy": "full_shard", "world_size": world, "shard_size": None}, gpu=card)):
                    return world
            except ValueError:
                return None
    return None


# --- --write --------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Written:
    """A launcher's file that was written: the plan in a line, whether it surely fits, what to type, what the file cannot say."""

    path: Path
    title: str
    fits: bool
    commands: tuple[str, ...]
    notes: tuple[str, ...]


def recommended(settings: dict, fit: bool, out: list[WayOut], asked: bool) -> dict | None:
    """The settings to write: these if they fit or their strategy was asked for, else with the cheapest change; None if there is none."""
    if fit or asked:
        return settings
    return {**settings, **{k: v for change in out[0].changes for k, v in change.settings}} if out else None


def writable(path: Path, force: bool) -> None:
    """Refuse a name that says no format, a folder that is not there, and a file that is. ValueError with a sentence."""
    from ..launch import describe

    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"--write is {str(path)!r}; accepted are FILE.yaml (accelerate) and FILE.json (DeepSpeed).")
    if not path.parent.is_dir():
        raise ValueError(f"--write is {str(path)!r}; there is no folder {str(path.parent)!r}.")
    if path.is_dir():
        raise ValueError(f"--write is {str(path)!r}, which is a folder; accepted is a file.")
    if os.path.lexists(path) and not force:
        there = describe(path) if path.exists() else "a link that leads nowhere"
        raise ValueError(f"{path} is there already ({there}); it was left as it is. --force replaces it.")


def write(path: Path, model, card: GPU, settings: dict, fit: bool, nodes: int, main_ip: str | None, port: int) -> Written:
    """Write the launcher's file for these settings. ValueError where its format cannot say them; then nothing is written."""
    from .. import launch

    plan = train_memory(model, **settings, gpu=card).settings
    make = launch.deepspeed_config if path.suffix == ".json" else launch.accelerate_config
    config = make(plan, nodes=nodes, main_ip=main_ip, port=port)
    try:
        path.write_text(launch.text(config, str(path)))
    except OSError as e:
        raise ValueError(f"--write is {str(path)!r}, which cannot be written: {e.strerror}.") from None
    return Written(path, launch.title(plan), fit, tuple(launch.commands(config, str(path))), config.notes)
