"""`nbs measure`: real steps of transformers models on this machine, each row beside its prediction and with its provenance.

A row is a dict: "kind" ("train", "inference"; "cpu" for a rehearsal without a GPU), "settings" (all arguments of the predicting function
but `gpu`), "provenance", and what was measured, in bytes and seconds; or "oom", which is a result; or "error", which is none.
"""
from __future__ import annotations

import datetime
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator

from ...hardware import GPU, detect_why, squash
from ...memory import SHARDED, ZERO, inference_memory, train_memory
from ...models import arch
from .built import build, transformers_config  # noqa: F401  (the labs build their models here)
from .server import Failed, Server

GIB = 2**30
TRAIN = dict(model=None, batch=1, seq=None, precision="bf16", optimizer="adamw", checkpointing=False, attention="sdpa", accumulation=1,
             strategy="single", world_size=1, shard_size=None, offload=False, lora_rank=None)
INFERENCE = dict(model=None, batch=1, seq=None, precision="bf16", kv_precision=None, world_size=1)
LABELS = ("kind", "group", "name")  # of a suite's entry, kept in its row
ROW_SECONDS, STEPS, SECONDS = 300.0, 30, 1.0  # a row's limit; the most timed steps; how long they go on at least


# --- settings -------------------------------------------------------------------------------------------------------------------

def complete(entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and all settings of a suite's entry, defaults filled in and checked. Raises ValueError that names what is wrong."""
    kind = entry.get("kind", "train")
    if kind not in ("train", "inference"):
        raise ValueError(f"kind is {kind!r}; accepted are 'train' and 'inference'.")
    defaults = TRAIN if kind == "train" else INFERENCE
    if unknown := [k for k in entry if k not in defaults and k not in LABELS]:
        raise ValueError(f"{unknown[0]!r} is no setting of kind {kind!r}; accepted are {', '.join(defaults)}, and {', '.join(LABELS)}.")
    if entry.get("model") is None:
        raise ValueError("model is missing: a known name, the path of a config.json, or a config as a dict.")
    c = {**defaults, **{k: v for k, v in entry.items() if k in defaults}}
    c["seq"] = c["seq"] or min(2048, arch(c["model"]).max_positions)
    if kind == "inference":
        c["kv_precision"] = c["kv_precision"] or c["precision"]
    predict(kind, c)
    _measurable(kind, c)
    return kind, c


def _measurable(kind: str, c: dict[str, Any]) -> None:
    """Refuse what is predicted but cannot be measured."""
    if kind == "inference":
        if c["precision"] not in ("fp32", "bf16"):
            raise ValueError(f"precision is {c['precision']!r}; inference is measured in 'fp32' and 'bf16'.")
        if c["kv_precision"] != c["precision"]:
            raise ValueError(f"kv_precision is {c['kv_precision']!r}; transformers' own cache, which is measured, has the model's precision, {c['precision']!r}.")
        if c["world_size"] != 1:
            raise ValueError(f"world_size is {c['world_size']}; inference is measured on one GPU.")
    elif c["optimizer"] == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("optimizer is 'adamw_8bit', which needs bitsandbytes, and it is not installed here (pip install bitsandbytes).")


def predict(kind: str, c: dict[str, Any], card: GPU | None = None) -> Any:
    """The memory model's prediction for these settings."""
    f = train_memory if kind == "train" else inference_memory
    return f(**c, **({"gpu": card} if card else {}))


def predicted_seconds(c: dict[str, Any], card: GPU | None) -> float | None:
    """The roofline's step time; None where there is no roofline, or it does not know this case."""
    if card is None or importlib.util.find_spec("nbs_lib.roofline") is None:
        return None
    try:
        from ... import roofline

        return roofline.train_time(**c, gpu=card).seconds
    except Exception:  # a prediction that fails must not lose a measurement
        return None


def command(kind: str, c: dict[str, Any]) -> str:
    """The line that measures these settings again."""
    parts = ["nbs", "measure", c["model"] if isinstance(c["model"], str) else json.dumps(c["model"], separators=(",", ":"))]
    parts += ["--inference"] if kind == "inference" else []
    options = dict(batch="--batch", seq="--seq", precision="--precision", optimizer="--optimizer", attention="--attention", accumulation="--accumulation",
                   strategy="--strategy", world_size="--gpus", shard_size="--shard-size", lora_rank="--lora-rank")
    for name, option in options.items():
        if c.get(name) is not None and (name in ("batch", "seq", "precision") or c[name] != TRAIN[name]):
            parts += [option, str(c[name])]
    parts += [f"--{name}" for name in ("checkpointing", "offload") if c.get(name)]
    parts += ["--cpu"] if kind == "cpu" else []
    return " ".join(map(shlex.quote, parts))


def entry_of(args: Any) -> dict[str, Any]:
    """The suite's entry that the options of the command line `nbs measure` describe. Raises ValueError."""
    model = args.model
    if model.lstrip().startswith("{"):  # as rows of models without a name repeat themselves
        try:
            model = json.loads(model)
        except json.JSONDecodeError as e:
            raise ValueError(f"the model looks like a config, but is no JSON: {e}") from None
    entry = dict(model=model, batch=args.batch, seq=args.seq, precision=args.precision)
    trained = dict(optimizer=args.optimizer, checkpointing=args.checkpointing, attention=args.attention, accumulation=args.accumulation, lora_rank=args.lora_rank,
                   strategy=args.strategy or ("full_shard" if args.gpus > 1 else "single"), shard_size=args.shard_size, offload=args.offload)
    if args.inference:
        training = dict(optimizer="adamw", checkpointing=False, attention="sdpa", accumulation=1, lora_rank=None, strategy="single", shard_size=None, offload=False)
        if wrong := [name for name, plain in training.items() if trained[name] != plain and not (name == "strategy" and args.strategy is None)]:
            raise ValueError(f"--{wrong[0].replace('_', '-')} belongs to training; --inference takes --batch, --seq and --precision")
        return {"kind": "inference", **entry, "world_size": args.gpus}
    return {"kind": "train", **entry, **trained, "world_size": args.gpus}


def words(kind: str, c: dict[str, Any]) -> str:
    """The settings as people read them."""
    parts = [f"{c['batch']} × {c['seq']:,}", c["precision"]]
    if kind != "inference":
        parts += [c["optimizer"], "eager" if c["attention"] == "eager" else "", "checkpointing" if c["checkpointing"] else "",
                  f"accumulation {c['accumulation']}" if c["accumulation"] > 1 else "", f"LoRA {c['lora_rank']}" if c["lora_rank"] else "",
                  "" if c["strategy"] == "single" else f"{c['strategy']} over {c['world_size']}" + (f" by {c['shard_size']}" if c["shard_size"] else ""),
                  "offload" if c["offload"] else ""]
    return f"{arch(c['model']).name}, {'generating, ' if kind == 'inference' else ''}{', '.join(filter(None, parts))}"


# --- rows -----------------------------------------------------------------------------------------------------------------------

class Bench:
    """This machine's devices, and the server whose processes measure on them. A context; `rows`: what is going to be measured."""

    def __init__(self, rows: list[tuple[str, dict]], cpu: bool = False, steps: int = STEPS, seconds: float = SECONDS, limit: float = ROW_SECONDS):
        self.cpu, self.steps, self.seconds, self.limit = cpu, steps, seconds, limit
        self.cards, self.why = ([], "") if cpu else detect_why()
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = len(self.cards) if named is None else min(len(self.cards), len([d for d in named.split(",") if d.strip()]))
        self.card = self.cards[0].gpu if self.cards else None
        self._rows, self._server = rows, None

    @property
    def server(self) -> Server:
        if self._server is not None and self._server.process.poll() is not None:  # it died; the next row gets another
            self._server.close()
            self._server = None
        if self._server is None:
            settings = [c for _, c in self._rows]
            libraries = ["torch._dynamo", "torch.utils.checkpoint"]
            libraries += ["torch.distributed.fsdp"] if any(c.get("strategy") in SHARDED for c in settings) else []
            libraries += ["nbs_lib.zero"] if any(c.get("strategy") in ZERO for c in settings) else []
            libraries += ["peft"] if any(c.get("lora_rank") for c in settings) else []
            self._server = Server(sorted({arch(c["model"]).architecture for c in settings}), libraries)
        return self._server

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._server:
            self._server.close()

    def measure(self, kind: str, c: dict[str, Any], **labels: str) -> dict[str, Any]:
        """The row of these settings (complete ones). Raises Failed when there is none."""
        kind = "cpu" if self.cpu else kind
        ranks = self.server.run({"kind": kind, "settings": c, "device": "cpu" if self.cpu else "cuda", "steps": self.steps, "seconds": self.seconds}, self.limit)
        measured = dict(ranks[0])
        seen = measured.pop("provenance", {})
        row = {"kind": kind, **labels, "settings": c, "provenance": self.provenance(kind, c, seen)}
        if kind == "train":
            row["tokens"] = c["batch"] * c["seq"] * c["accumulation"] * c["world_size"]
        row |= measured
        if "oom" not in row and kind == "train":
            row["rank_peaks"] = [r["peak"] for r in ranks]
        if "oom" not in row and kind == "cpu":
            del row["losses"]
            row["rank_losses"] = [r["losses"] for r in ranks]
        return row

    def provenance(self, kind: str, c: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
        """Where and how a row was measured: `seen` by the measuring process, and by this one."""
        card = self.cards[0] if self.cards else None
        here = {"device": card.name if card else "cpu", "total_memory": card.memory if card else None, "driver": card.driver if card else None}
        return {**here, "gpus": self.gpus, "cpus": os.cpu_count(), **seen, "date": datetime.date.today().isoformat(), "command": command(kind, c)}


def append(path: Path, row: dict[str, Any]) -> None:
    """One more line of JSON, on the disk when this returns; a line that an interrupted run left torn is closed first."""
    with open(path, "ab+") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")
        f.write((json.dumps(row) + "\n").encode())
        f.flush()
        os.fsync(f.fileno())


# --- suites ---------------------------------------------------------------------------------------------------------------------

def read_suite(path: Path) -> list[tuple[dict, str, dict]]:
    """The entries of a suite: (labels, kind, complete settings). Raises ValueError that names the entry."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"the suite {path} cannot be read: {e}") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"the suite {path} is no JSON: {e}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise ValueError(f"the suite {path} must be a list of settings, each a dict: [{{\"model\": \"gpt2\", \"batch\": 8}}, …]")
    out = []
    for i, entry in enumerate(entries, 1):
        try:
            kind, c = complete(entry)
        except (ValueError, TypeError) as e:
            raise ValueError(f"entry {i} of {path}: {e}") from None
        out.append(({k: entry[k] for k in LABELS[1:] if k in entry}, kind, c))
    return out


def key(kind: str, c: dict[str, Any]) -> str:
    return json.dumps([kind, c], sort_keys=True)


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines; torn lines are passed over."""
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                yield row


def suite(path: Path, out: Path, cpu: bool = False, limit_seconds: float | None = None, say: Callable[[str], None] = print, **options: Any) -> dict[str, int]:
    """Measure what a suite lists and `out` does not hold yet, row by row; returns how many were measured, there already, skipped, failed.

    A row that failed in an earlier run is tried again; one that was out of memory is a result and is not. `limit_seconds`: after these no
    further row is begun. `options`: Bench's.
    """
    began, entries = time.monotonic(), read_suite(path)
    there = {key(r.get("kind"), r.get("settings")) for r in rows_in(out) if "error" not in r}
    count = {"measured": 0, "there": 0, "skipped": 0, "failed": 0}
    todo = [e for e in entries if key("cpu" if cpu else e[1], e[2]) not in there]
    count["there"] = len(entries) - len(todo)
    if count["there"]:
        say(f"{count['there']} of {len(entries)} rows are in {out} already")
    with Bench([(kind, c) for _, kind, c in todo], cpu, **options) as bench:
        if todo and not cpu and not bench.cards:
            raise RuntimeError(no_gpu(bench.why))
        for i, (labels, kind, c) in enumerate(todo, 1):
            what = f"[{i}/{len(todo)}] {words(kind, c)}:"
            if key("cpu" if cpu else kind, c) in there:  # the suite lists it twice
                count["there"] += 1
                continue
            if limit_seconds is not None and time.monotonic() - began > limit_seconds:
                count["skipped"] += len(todo) - i + 1
                say(f"{limit_seconds:g} seconds are over; {len(todo) - i + 1} rows are left for another run")
                break
            if unfit := _unfit(kind, c, bench):
                count["skipped"] += 1
                say(f"{what} skipped, {unfit}")
                continue
            start = time.monotonic()
            try:
                row = bench.measure(kind, c, **labels)
            except Failed as e:
                row = {"kind": "cpu" if cpu else kind, **labels, "settings": c, "provenance": bench.provenance(kind, c, {}), "error": str(e)}
            append(out, row)
            there.add(key(row["kind"], c))
            count["failed" if "error" in row else "measured"] += 1
            say(f"{what} {outcome(row, bench.card)} ({time.monotonic() - start:.1f} s)")
    return count


def _unfit(kind: str, c: dict[str, Any], bench: Bench) -> str | None:
    """Why these settings cannot be measured on this machine; None if they can."""
    if bench.cpu:
        return "generating is measured on a GPU" if kind == "inference" else too_large_for_cpu(c)
    return f"it needs {c['world_size']} GPUs and there are {bench.gpus}" if c["world_size"] > bench.gpus else None


def outcome(row: dict[str, Any], card: GPU | None) -> str:
    """A row and its prediction in half a line."""
    if "error" in row:
        return f"FAILED, {row['error']}"
    if row["kind"] == "cpu":
        return "out of memory" if "oom" in row else "losses " + " | ".join(" ".join(f"{x:.4f}" for x in losses) for losses in row["rank_losses"])
    mine = predict(row["kind"], row["settings"], card).peak
    if "oom" in row:
        return f"predicted {mine / GIB:.2f} GiB, out of memory in {row['oom']['at']} of step {row['oom']['step']}"
    seconds = predicted_seconds(row["settings"], card) if row["kind"] == "train" else None
    return (f"predicted {mine / GIB:.3f} GiB, measured {row['peak'] / GIB:.3f}, {mine / row['peak'] - 1:+.2%}; {row['seconds'] * 1000:.1f} ms"
            + (f", predicted {seconds * 1000:.1f}, {seconds / row['seconds'] - 1:+.1%}" if seconds else ""))


def no_gpu(why: str) -> str:
    return f"there is no GPU to measure on ({why}). `--cpu` counts what a small model's forward pass keeps, and rehearses several ranks; lab 3 goes on from there: `nbs lab 3`"


# --- a card ---------------------------------------------------------------------------------------------------------------------

CARD = """import json, sys, torch
from nbs_lib.card import measure_card
found = measure_card(lambda line: print(line, flush=True))
seen = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
json.dump({"provenance": seen, **found}, open(sys.argv[1], "w"))
"""


def card(out: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Measure what this machine's card achieves (nbs_lib.card) in a process of its own, and write it; returns the file.

    out: default card_<gpu>.json in the current folder. Raises ValueError where it exists already or cannot be written, RuntimeError without a
    GPU or when measuring fails.
    """
    cards, why = detect_why()
    if not cards:
        raise RuntimeError(f"there is no GPU to measure ({why})")
    name = cards[0].gpu.name if cards[0].gpu else squash(cards[0].name)
    out = Path(out or f"card_{name}.json")
    if out.exists():
        raise ValueError(f"{out} exists already and is left as it is; name another file with --out")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {out.absolute().parent}")
    say(f"{cards[0].name}: a few minutes, during which nothing else should run on it")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "card.json"
        run = subprocess.run([sys.executable, "-W", "ignore", "-c", CARD, str(file)], stderr=subprocess.PIPE, text=True, errors="replace")
        if run.returncode:
            raise RuntimeError("measuring failed: " + (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1])
        found = json.loads(file.read_text(encoding="utf-8"))
    seen = found.pop("provenance")
    here = {**seen, "driver": cards[0].driver, "cpus": os.cpu_count(), "date": datetime.date.today().isoformat(), "command": "nbs measure --card"}
    with open(out, "x", encoding="utf-8") as f:
        f.write(json.dumps({"gpu": name, "provenance": here, **found}) + "\n")
    return out


def card_summary(file: Path) -> str:
    """What a card's file says, in four lines."""
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    best = {dtype: max(2 * m * n * k / t for m, n, k, t in found["matmul"][f"{dtype} nt"]) for dtype in ("bf16", "fp32")}
    size, seconds = max(found["moves"]["unary bf16"])
    host = found["host"]["llama bf16"]
    lines = [f"products: up to {best['bf16'] / 1e12:.0f} TFLOP/s in bf16, {best['fp32'] / 1e12:.1f} in fp32", f"memory: {size / seconds / 1e12:.2f} TB/s in a copy",
             f"host: {1e3 * host[0]:.1f} ms forward and {1e3 * host[1]:.1f} backward for a block of Llama", f"{found['gpu']}, {found['provenance']['date']}: {file}"]
    return "\n".join(lines)


# --- on a CPU -------------------------------------------------------------------------------------------------------------------

def held_on_cpu(c: dict[str, Any]) -> tuple[int, str]:
    """What the memory model says the forward pass keeps for backward (bytes, as on a GPU), and why a CPU keeps something else ("": it does not)."""
    from ...memory import passes
    from ...tape import value

    s = train_memory(**c).settings
    held = value(passes(s).after_forward[1], s.batch * s.seq, s.seq)
    if c["checkpointing"]:
        return held, "a checkpoint holds its block's input by itself, where this counting does not see it"
    if c["attention"] == "sdpa":
        return held, "the CPU's attention kernel keeps other tensors than CUDA's; with --attention eager both keep the same"
    if s.model.family != "llama" and (s.model.hidden_dropout or s.model.attention_dropout or s.model.embedding_dropout):
        return held, "the CPU's dropout keeps a mask as wide as its tensor, CUDA's one byte an element"
    if s.model.family != "llama" and c["precision"] != "fp32":
        return held, "the CPU's LayerNorm keeps its statistics in 16 bits, CUDA's in 32"
    if s.model.experts:
        return held, "the CPU routes rows to experts in its own way, whose indices differ by a few hundred bytes"
    if c["lora_rank"] or c["precision"] == "amp_fp16":
        return held, "the two were compared for full training in fp32, bf16 and amp_bf16 only"
    return held, ""


def too_large_for_cpu(c: dict[str, Any]) -> str | None:
    """Why a rehearsal of these settings would take too long or too much here; None if it would not."""
    need = train_memory(**c).peak * c["world_size"]
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 if hasattr(os, "sysconf") else 4 * GIB
    work = 6 * arch(c["model"]).parameters * c["batch"] * c["seq"] * c["accumulation"] * c["world_size"]
    if need > room:
        return f"a step needs about {need / GIB:.1f} GiB, and a rehearsal may take {room / GIB:.1f} here"
    return f"a step takes {work / 1e12:.0f} TFLOP, too much for a CPU (at most 20)" if work > 2e13 else None
