# hand-written stopgap, replaced by the export of nbs/03_memory.ipynb
from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from nbs_lib.models import Arch, arch

__all__ = ["train_memory", "inference_memory", "TrainMemory", "InferenceMemory"]
GiB, MiB = 2**30, 2**20
PRECISIONS = ("fp32", "bf16", "amp_bf16", "amp_fp16")
OPTIMIZERS = ("adamw", "adamw_fused", "sgd", "sgd_momentum", "adamw_8bit")
STRATEGIES = ("single", "ddp", "full_shard", "shard_grad_op", "hybrid_shard", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class TrainMemory:
    peak: int
    peak_any: int
    reserved: int
    phases: dict[str, int]
    terms: dict[str, int]
    peak_phase: str
    why: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def explain(self) -> list[tuple[str, int, str]]:
        return [(k, v, self.why.get(k, "")) for k, v in self.terms.items()]


@dataclass(frozen=True)
class InferenceMemory:
    peak: int
    terms: dict[str, int]
    why: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def explain(self) -> list[tuple[str, int, str]]:
        return [(k, v, self.why.get(k, "")) for k, v in self.terms.items()]


@lru_cache(4096)
def _known(name: str) -> Arch: return arch(name)


def _int(name, v, hi):
    if type(v) is not int or not 1 <= v <= hi:
        raise ValueError(f"{name} is {v!r}; accepted is a whole number from 1 to {hi:,}.")


def _one(name, v, ok):
    if not isinstance(v, str) or v not in ok: raise ValueError(f"{name} is {v!r}; accepted are {', '.join(ok)}.")


def _bool(name, v):
    if not isinstance(v, bool): raise ValueError(f"{name} is {v!r}; accepted are True and False.")


def train_memory(model, batch, seq, precision="bf16", optimizer="adamw", checkpointing=False, attention="sdpa",
                 accumulation=1, strategy="single", world_size=1, shard_size=None, offload=False, lora_rank=None,
                 gpu="h100-sxm") -> TrainMemory:
    a = _known(model) if isinstance(model, str) else arch(model)
    for k, v, hi in (("batch", batch, 2**20), ("seq", seq, 2**24), ("accumulation", accumulation, 2**20), ("world_size", world_size, 2**20)): _int(k, v, hi)
    _one("precision", precision, PRECISIONS); _one("optimizer", optimizer, OPTIMIZERS); _one("attention", attention, ("sdpa", "eager")); _one("strategy", strategy, STRATEGIES)
    _bool("checkpointing", checkpointing); _bool("offload", offload)
    h, A, k, f, n, V, L, P, T = a.hidden, a.heads*a.head_dim, a.kv_heads*a.head_dim, a.ffn, a.heads, a.vocab, a.layers, a.parameters, batch*seq
    w = 2 if precision == "bf16" else 4
    if strategy == "single" and world_size > 1: raise ValueError(f"world_size is {world_size} with strategy 'single'; accepted is 1, or another strategy.")
    N = world_size if strategy not in ("single", "ddp") else 1
    sh = shard_size or world_size
    shard = {"single": (1, 1, 1), "ddp": (1, 1, 1), "full_shard": (N, N, N), "shard_grad_op": (N, N, N), "hybrid_shard": (sh, sh, sh), "zero1": (1, 1, N), "zero2": (1, N, N), "zero3": (N, N, N)}[strategy]
    W, G = w*P//shard[0], w*P//shard[1]
    O = {"adamw": 2*w, "adamw_fused": 2*w, "sgd": 0, "sgd_momentum": w, "adamw_8bit": 2}[optimizer]*P//shard[2]
    if lora_rank: 
        Pl = L*lora_rank*((h + A) + 2*(h + k) + (A + h) + (2 if a.family == "llama" else 1)*(h + f) + (f + h)); W, G, O = w*P + 4*Pl, 4*Pl, 8*Pl
    table = {"llama": {"bf16": 16*h+4*A+4*k+8*f+4*n+8, "fp32": 24*h+16*A+16*f+4*n+8, "amp": 26*h+4*A+4*k+8*f+4*n+8},
             "gpt2": {"bf16": 58*h+4*n+16, "fp32": 114*h+4*n+16, "amp": 86*h+4*n+16}, "bert": {"bf16": 34*h+4*n+16, "fp32": 66*h+4*n+16, "amp": 42*h+4*n+16}}
    p = precision[:3] if precision.startswith("amp") else precision
    layer = table[a.family][p] + ((7 if p != "fp32" else 9)*n*seq if attention == "eager" else 0)
    act = L*T*(w*h if checkpointing else layer) + (T*layer if checkpointing else 0)
    logits = 12*V*T
    base = {"weights": W, "optimizer": O, "input": 8*T, "workspaces": 64*MiB}
    fwd = sum(base.values()) + act + logits*(10 if p != "fp32" else 8)//12
    bwd = max(fwd, sum(base.values()) + act + logits, sum(base.values()) + G)
    tmp = w*P//shard[2] if optimizer == "adamw" and not lora_rank else 0
    step = sum(base.values()) + G + tmp
    peak = max(bwd, step)
    if peak == step: terms = {**base, "gradients": G, "optimizer temporaries": tmp}; ph = "step"
    elif peak == sum(base.values()) + act + logits: terms = {**base, "activations": act, "logits": logits}; ph = "backward"
    else: terms = {**base, "gradients": G}; ph = "backward"
    return TrainMemory(peak, peak + (w*P if strategy == "ddp" else 0), int(peak*1.05), {"forward": fwd, "backward": bwd, "step": max(bwd, step)}, terms, ph, {k: "" for k in terms},
                       dict(model=a.name, batch=batch, seq=seq, precision=precision, optimizer=optimizer, checkpointing=checkpointing, attention=attention, accumulation=accumulation, strategy=strategy, world_size=world_size, shard_size=shard_size, offload=offload, lora_rank=lora_rank, gpu=getattr(gpu, "name", gpu)))


def inference_memory(model, batch, seq, precision="bf16", kv_precision="bf16", world_size=1) -> InferenceMemory:
    a = _known(model) if isinstance(model, str) else arch(model)
    bits = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "fp8": 8, "int4": 4}
    _one("precision", precision, bits); _one("kv_precision", kv_precision, bits)
    T = batch*seq
    terms = {"weights": a.parameters*bits[precision]//8//world_size, "kv_cache": 2*a.layers*T*a.kv_heads*a.head_dim*bits[kv_precision]//8//world_size,
             "activations": T*(4*a.hidden + 6*a.ffn), "logits": 6*batch*a.vocab, "workspaces": 32*MiB}
    return InferenceMemory(sum(terms.values()), terms, {k: "" for k in terms}, dict(model=a.name, batch=batch, seq=seq))
