"""`nbs measure`: a real training step of a transformers model on this machine's GPU, in a process of its own, as a row with its provenance.

The process reads settings (train_memory's arguments) as JSON on stdin and writes the row as JSON on stdout: `python -m nbs_lib.course.measure`.
"""
from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from ..models import Arch, arch

STEPS = 6  # the first two are unlike the rest; the third is the steady one that is predicted, and the last three are timed


def transformers_config(a: Arch) -> Any:
    """The transformers config whose model has the architecture `a` (random weights of the right shape, no download)."""
    import transformers as t

    if a.family == "gpt2":
        config = t.GPT2Config(n_embd=a.hidden, n_layer=a.layers, n_head=a.heads, n_inner=a.ffn, vocab_size=a.vocab, n_positions=a.max_positions, activation_function=a.activation,
                              resid_pdrop=a.hidden_dropout, attn_pdrop=a.attention_dropout, embd_pdrop=a.embedding_dropout, tie_word_embeddings=a.tied)
    elif a.family == "bert":
        config = t.BertConfig(hidden_size=a.hidden, num_hidden_layers=a.layers, num_attention_heads=a.heads, intermediate_size=a.ffn, vocab_size=a.vocab,
                              max_position_embeddings=a.max_positions, type_vocab_size=a.token_types, hidden_act=a.activation, hidden_dropout_prob=a.hidden_dropout,
                              attention_probs_dropout_prob=a.attention_dropout, tie_word_embeddings=a.tied)
    else:
        kind = {"llama": t.LlamaConfig, "mistral": t.MistralConfig, "mixtral": t.MixtralConfig, "qwen2": t.Qwen2Config, "qwen3": t.Qwen3Config}[a.model_type]
        own = {"llama": dict(attention_bias=a.qkv_bias, mlp_bias=a.mlp_bias), "mistral": dict(sliding_window=a.sliding_window),
               "mixtral": dict(num_local_experts=a.experts, num_experts_per_tok=a.experts_per_token, sliding_window=a.sliding_window), "qwen3": dict(attention_bias=a.qkv_bias)}
        config = kind(hidden_size=a.hidden, num_hidden_layers=a.layers, num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, head_dim=a.head_dim, intermediate_size=a.ffn,
                      vocab_size=a.vocab, max_position_embeddings=a.max_positions, hidden_act=a.activation, attention_dropout=a.attention_dropout, tie_word_embeddings=a.tied,
                      **own.get(a.model_type, {}))
    config.use_cache = False
    config.architectures = [a.architecture]
    return config


def build(a: Arch, dtype: str, device: str, attention: str = "sdpa", checkpointing: bool = False, lora_rank: int | None = None) -> Any:
    """The class that `a.architecture` names, with random weights, in training mode. `dtype`: "float32" or "bfloat16"."""
    import torch
    import transformers

    cls = getattr(transformers, a.architecture)
    with torch.device(device):
        model = cls._from_config(transformers_config(a), dtype=getattr(torch, dtype), attn_implementation=attention)
    model.train()
    if lora_rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=lora_rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"))
    if checkpointing:
        (model.get_base_model() if lora_rank else model).gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _optimizer(name: str, parameters: list) -> Any:
    import torch

    make = {"adamw": lambda p: torch.optim.AdamW(p, lr=1e-5), "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
            "sgd": lambda p: torch.optim.SGD(p, lr=1e-5), "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-5, momentum=0.9)}
    return make[name]([p for p in parameters if p.requires_grad])


def run(a: Arch, batch: int, seq: int, precision: str, optimizer: str, checkpointing: bool, attention: str, accumulation: int, lora_rank: int | None) -> dict:
    """The measured part of a row, in bytes and seconds; runs on the CUDA device of this process. Out of memory is a result: {"oom": …}."""
    import torch

    low = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(precision)
    cuda, row = torch.cuda, {}
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        model = build(a, "bfloat16" if precision == "bf16" else "float32", "cuda", attention, checkpointing, lora_rank)
        x = torch.randint(0, a.vocab, (batch, seq), device="cuda")
        step_optimizer, scaler = _optimizer(optimizer, list(model.parameters())), torch.amp.GradScaler("cuda", enabled=precision == "amp_fp16")
        times, peaks = [], []
        for _ in range(STEPS):
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
            phases, began = {}, time.perf_counter()
            for _ in range(accumulation):
                with torch.autocast("cuda", dtype=low) if low else contextlib.nullcontext():
                    loss = model(input_ids=x, labels=x).loss
                phases["forward"] = cuda.max_memory_allocated()
                scaler.scale(loss / accumulation if accumulation > 1 else loss).backward()
                phases["backward"] = cuda.max_memory_allocated()
            scaler.step(step_optimizer)
            scaler.update()
            phases["step"] = cuda.max_memory_allocated()
            step_optimizer.zero_grad(set_to_none=True)
            cuda.synchronize()
            times.append(time.perf_counter() - began)
            peaks.append(phases)
        free, total = cuda.mem_get_info()
        row.update(peak=peaks[2]["step"], phases=peaks[2], first=peaks[0]["step"], peak_any=max(p["step"] for p in peaks), reserved=cuda.max_memory_reserved(),
                   driver_used=total - free, step_seconds=statistics.median(times[3:]))
    except torch.cuda.OutOfMemoryError as e:
        row["oom"] = ". ".join(str(e).split(". ")[:2]) + "."
    return row


def provenance() -> dict[str, str]:
    """Device, driver, versions and date of this machine."""
    import datetime

    import torch
    import transformers

    smi = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout.split()
    return {"device": torch.cuda.get_device_name(0), "driver": smi[0] if smi else "unknown", "torch": torch.__version__, "cuda": torch.version.cuda or "",
            "transformers": transformers.__version__, "date": datetime.date.today().isoformat()}


def measure(settings: dict[str, Any]) -> dict:
    """Run one setting in a process of its own; returns the row: settings, provenance, and bytes and seconds or "oom".

    `settings`: train_memory's arguments but `gpu`, with `model` a name or a path. Raises RuntimeError with the process's last words when it fails.
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "nbs_lib.course.measure"], input=json.dumps(settings), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the measuring process failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    settings = json.load(sys.stdin)
    wanted = {k: settings[k] for k in ("batch", "seq", "precision", "optimizer", "checkpointing", "attention", "accumulation", "lora_rank")}
    row = run(arch(settings["model"]), **wanted)
    print(json.dumps({"kind": "train", "settings": {"model": settings["model"], **wanted}, "provenance": provenance(), **row}))


if __name__ == "__main__":
    main()
