"""The step itself, inside a measuring process (see ranks): training steps, generation, and what a forward pass keeps on a CPU.

A job is a dict: "kind" ("train", "inference", "cpu"), "settings" (all arguments of the predicting function but `gpu`), and how to run it.
"""
from __future__ import annotations

import contextlib
import os
import statistics
import time
from typing import Any

from ...memory import SHARDED, ZERO
from ...models import arch
from .built import LEARNING_RATE, divide, hollow, lay_down, make, optimizer

STEADY = 3        # the first two steps are unlike the rest; the third is the steady one that is predicted
AFTER = {"forward": "backward", "backward": "step", "step": "forward"}
FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def full(e: BaseException) -> bool:
    """Whether an error says that the device's memory is used up (the allocator's, cuBLAS's or NCCL's words for it)."""
    import torch

    return isinstance(e, torch.cuda.OutOfMemoryError) or isinstance(e, RuntimeError) and any(word in str(e) for word in FULL)


class Step:
    """One training step on this rank. `at`: the phase it is in ("build", "forward", "backward", "step"); `number`: how many are done."""

    def __init__(self, job: dict, rank: int):
        self.job, self.c, self.rank, self.at, self.number = job, job["settings"], rank, "build", 0
        self.a, self.device = arch(self.c["model"]), job["device"]

    def build(self) -> None:
        """The model, its optimizer, and random tokens, other ones on each rank."""
        import torch

        c = self.c
        torch.manual_seed(0)
        lr = self.job.get("lr", LEARNING_RATE)
        if c["strategy"] in ZERO:
            self.optimizer = divide(self.a, c, self.device, lr)
            self.net = self.optimizer.model
        else:
            self.net = make(self.a, c, self.device, self.rank)
            self.optimizer = optimizer(c["optimizer"], self.net.parameters(), lr)
        tokens = torch.Generator().manual_seed(self.rank)
        self.x = torch.randint(0, self.a.vocab, (c["batch"], c["seq"]), generator=tokens).to(self.device)
        self.scaler = torch.amp.GradScaler(self.device, enabled=c["precision"] == "amp_fp16")
        low = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(c["precision"])
        self.low = None if c["strategy"] in (*SHARDED, "zero3") else low  # where parameters are gathered, they are gathered in 16 bits
        self.at = "forward"

    def passes(self, mark) -> None:
        """Forward and backward of all micro-batches; `mark(phase)` is called after each."""
        import torch

        parts, x = self.c["accumulation"], self.x
        for i in range(parts):
            with self.quiet(i < parts - 1):
                with torch.autocast(self.device, dtype=self.low) if self.low else contextlib.nullcontext():
                    fault(self)
                    self.loss = self.net(input_ids=x, labels=x).loss
                self.after("forward", mark)
                self.scaler.scale(self.loss / parts if parts > 1 else self.loss).backward()
                self.after("backward", mark)

    def run(self, mark=lambda phase: None) -> None:
        """The whole step."""
        self.passes(mark)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.after("step", mark)
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1

    def quiet(self, more: bool) -> contextlib.AbstractContextManager:
        """While more micro-batches follow, gradients stay on this rank."""
        if self.c["strategy"] in SHARDED and self.c["accumulation"] > 1:
            self.net.set_requires_gradient_sync(not more)
        waits = {"ddp": self.net, "zero1": self.optimizer}.get(self.c["strategy"])  # zero2 and zero3 keep no whole gradients
        return waits.no_sync() if more and waits else contextlib.nullcontext()

    @property
    def parameters(self) -> int:
        """How many the whole model has."""
        if self.c["strategy"] in ZERO:
            return sum(p.whole.numel() for p in self.optimizer.pieces)
        return sum(p.numel() for p in self.net.parameters())

    def after(self, phase: str, mark) -> None:
        mark(phase)
        self.at = AFTER[phase]


def fault(step: Step) -> None:
    """For tests: the job's "fault" (rank, number of the step, how) happens here, in forward."""
    rank, number, how = step.job.get("fault") or (None, None, None)
    if (rank, number) != (step.rank, step.number):
        return
    if how == "raise":
        raise ValueError("a fault that the job asked for")
    if how == "oom":
        import torch

        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 2.00 GiB of which 0 is free.")
    if how == "kill":
        os.kill(os.getpid(), 9)
    time.sleep(3600)


# --- training on a GPU ----------------------------------------------------------------------------------------------------------

class Gauge:
    """The caching allocator's statistics. `reserved`: the most that it held over the whole run, bytes."""

    def __init__(self):
        self.reserved = 0

    def reset(self) -> None:
        import torch

        torch.cuda.synchronize()
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    @staticmethod
    def peaks() -> tuple[int, int]:
        """Since the last reset: the most bytes allocated (blocks as the allocator counts them), and the most that were asked for."""
        import torch

        s = torch.cuda.memory_stats()
        return s["allocated_bytes.all.peak"], s["requested_bytes.all.peak"]


def train(job: dict, rank: int, store: Any) -> dict:
    """The measured part of a row: bytes and seconds of training steps on this process's GPU. Out of memory is a result, too."""
    step = Step(job, rank)
    try:
        return _train(step, store)
    except Exception as e:
        if not full(e):
            raise
        return {"oom": {"oom": " ".join(". ".join(str(e).split(". ")[:2]).split())[:400], "at": step.at, "step": step.number, "rank": rank, **_held()},
                "provenance": provenance(step.c)}


def _held() -> dict[str, int]:
    import torch

    return dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved()) if torch.cuda.is_initialized() else {}


def _train(step: Step, store: Any) -> dict:
    import torch

    gauge, cuda = Gauge(), torch.cuda
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    step.build()
    built = {"allocated": cuda.memory_allocated(), "reserved": cuda.memory_reserved()}
    steps, starts, seconds, losses = [], [], [], []
    for _ in range(STEADY):
        phases: dict[str, tuple[int, int]] = {}
        gauge.reset()
        starts.append(cuda.memory_allocated())
        began = time.perf_counter()
        step.run(lambda phase: phases.__setitem__(phase, gauge.peaks()))
        cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        steps.append(phases)
        losses.append(float(step.loss.detach()))
    gauge.reset()
    timed = _timed(step, store)
    later = gauge.peaks()[0]
    gauge.reset()
    free, total = cuda.mem_get_info()
    steady, peaks = steps[-1], [s["step"][0] for s in steps]
    return {"peak": peaks[-1], "phases": {k: p[0] for k, p in steady.items()}, "requested": steady["step"][1], "requested_phases": {k: p[1] for k, p in steady.items()},
            "first": {k: p[0] for k, p in steps[0].items()}, "peak_any": max(*peaks, later), "peaks": [*peaks, later], "reserved": gauge.reserved,
            "driver_used": total - free, "context": total - free - cuda.memory_reserved(), "seconds": statistics.median(timed), "timed": timed, "first_seconds": seconds[0],
            "loss": {"first": losses[0], "last": float(step.loss.detach())}, "start": starts[-1], "built": built,
            "parameters": step.parameters, "retries": cuda.memory_stats()["num_alloc_retries"], "provenance": provenance(step.c)}


def _timed(step: Step, store: Any) -> list[float]:
    """Seconds of single steps: at least 5, and on until they took `seconds` together or are `steps`. All ranks take as many."""
    import torch

    times: list[float] = []
    least, most, enough = min(5, step.job["steps"]), step.job["steps"], step.job["seconds"]
    on = True
    while on:
        torch.cuda.synchronize()
        began = time.perf_counter()
        step.run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        on = agreed(store, step.rank, len(times), len(times) < least or len(times) < most and sum(times) < enough)
    return times


def agreed(store: Any, rank: int, number: int, answer: bool) -> bool:
    """Rank 0's answer, on every rank (through the store, so that no tensor is made for it)."""
    if store is None:
        return answer
    if rank == 0:
        store.set(f"on{number}", "1" if answer else "0")
        return answer
    return store.get(f"on{number}") == b"1"


def provenance(c: dict) -> dict[str, Any]:
    """What this process sees of its device and of the libraries that it runs."""
    import torch
    import transformers

    out: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or "", "transformers": transformers.__version__}
    if c.get("offload"):
        out["threads"] = torch.get_num_threads()
    if c.get("lora_rank"):
        import peft

        out["peft"] = peft.__version__
    if c.get("optimizer") == "adamw_8bit":
        import bitsandbytes

        out["bitsandbytes"] = bitsandbytes.__version__
    if torch.cuda.is_initialized():
        out |= {"device": torch.cuda.get_device_name(), "total_memory": torch.cuda.get_device_properties().total_memory}
        if c.get("world_size", 1) > 1:
            out["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_NVLS_ENABLE"):
        if os.environ.get(name):
            out[name] = os.environ[name]
    return out


# --- generation -----------------------------------------------------------------------------------------------------------------

def infer(job: dict, rank: int, store: Any) -> dict:
    """The measured part of an inference row: peaks of prefill and of generate (bytes), seconds of prefill and of a decoded token."""
    at = ["build"]
    try:
        return _infer(job, at)
    except Exception as e:
        if not full(e):
            raise
        return {"oom": {"oom": " ".join(". ".join(str(e).split(". ")[:2]).split())[:400], "at": at[0], "step": 0, "rank": rank, **_held()},
                "provenance": provenance(job["settings"] if "settings" in job else {})}


def _infer(job: dict, at: list[str]) -> dict:
    import torch

    c, cuda, gauge = job["settings"], torch.cuda, Gauge()
    a = arch(c["model"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    model = hollow(a, "bfloat16" if c["precision"] == "bf16" else "float32").eval()
    lay_down(model, job["device"])
    x = torch.randint(0, a.vocab, (c["batch"], c["seq"]), generator=torch.Generator().manual_seed(0)).to(job["device"])
    tokens = min(8, a.max_positions - c["seq"]) if a.family == "gpt2" else 8  # beyond its table of positions GPT-2 cannot go on
    prefill, decode, peaks, kept = [], [], {}, 0

    def clocked(times, **inputs):
        cuda.synchronize()
        began = time.perf_counter()
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        cuda.synchronize()
        times.append(time.perf_counter() - began)
        return out

    with torch.no_grad():
        for _ in range(STEADY):
            at[0] = "prefill"
            gauge.reset()
            out = clocked(prefill, input_ids=x)
            peaks["prefill"], requested = gauge.peaks()
            kept = cuda.memory_allocated()
            at[0] = "decode"
            for _ in range(tokens):
                token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                out = None
                out = clocked(decode, input_ids=token, past_key_values=cache)
            out = token = cache = None
        at[0] = "generate"
        gauge.reset()
        model.generation_config.eos_token_id = None
        model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=tokens + 1, do_sample=False, pad_token_id=0, use_cache=True)
        peaks["generate"] = gauge.peaks()[0]
        gauge.reset()
    free, total = cuda.mem_get_info()
    return {"peak": peaks["prefill"], "requested": requested, "generate": peaks["generate"], "kept": kept, "reserved": gauge.reserved, "driver_used": total - free,
            "context": total - free - cuda.memory_reserved(), "seconds": statistics.median(prefill[1:]), "timed": prefill,
            "token_seconds": statistics.median(decode[tokens:]) if decode else None, "new_tokens": tokens + 1, "parameters": sum(p.numel() for p in model.parameters()),
            "retries": cuda.memory_stats()["num_alloc_retries"], "provenance": provenance(c)}


# --- on a CPU -------------------------------------------------------------------------------------------------------------------

def rehearse(job: dict, rank: int, store: Any) -> dict:
    """Steps on a CPU: their losses, and the bytes that the first forward pass keeps for backward (each storage once; no weights, buffers, ids)."""
    import torch

    step = Step(job, rank)
    try:
        step.build()
        losses, kept = [], {}
        own = {t.untyped_storage().data_ptr() for t in (*step.net.parameters(), *step.net.buffers(), step.x)} if step.c["strategy"] == "single" else set()

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        def mark(phase):
            if phase == "forward" and "held" not in job:
                job["held"] = sum(s.nbytes() for at, s in kept.items() if at not in own)

        for i in range(STEADY):
            count = i == 0 and step.c["strategy"] == "single"
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t) if count else contextlib.nullcontext():
                step.run(mark if count else lambda phase: None)
            kept.clear()
            losses.append(float(step.loss.detach()))
    except Exception as e:
        if not full(e):
            raise
        return {"oom": {"oom": str(e)[:400], "at": step.at, "step": step.number, "rank": rank}, "provenance": provenance(step.c)}
    return {"losses": losses, "held": job.get("held"), "parameters": step.parameters, "provenance": provenance(step.c)}


RUN = {"train": train, "inference": infer, "cpu": rehearse}
