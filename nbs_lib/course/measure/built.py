"""Real models for `nbs measure` and the labs: transformers' own classes, laid down on a device, split over ranks, with their optimizer.

Everything here runs where torch is; importing this module does not import it.
"""
from __future__ import annotations

import contextlib
from typing import Any, Iterator

from ...memory import SHARDED, ZERO
from ...models import Arch

LEARNING_RATE = 1e-5


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


def _class(a: Arch) -> Any:
    import transformers

    return getattr(transformers, a.architecture)


def build(a: Arch, dtype: str, device: str, attention: str = "sdpa", checkpointing: bool = False, lora_rank: int | None = None) -> Any:
    """The class that `a.architecture` names, with transformers' own random weights, in training mode. `dtype`: "float32" or "bfloat16"."""
    import torch

    with torch.device(device):
        model = _class(a)._from_config(transformers_config(a), dtype=getattr(torch, dtype), attn_implementation=attention)
    return _equip(model.train(), checkpointing, lora_rank)


def _equip(model: Any, checkpointing: bool, lora_rank: int | None) -> Any:
    """With adapters (peft's defaults, dropout 0), with checkpointing (non-reentrant)."""
    if lora_rank:
        from peft import LoraConfig, get_peft_model

        conv = model.config.model_type == "gpt2"  # whose layers are Conv1D, (in, out)
        model = get_peft_model(model, LoraConfig(r=lora_rank, target_modules="all-linear", lora_dropout=0.0, fan_in_fan_out=conv, task_type="CAUSAL_LM"))
    if checkpointing:
        (model.get_base_model() if lora_rank else model).gradient_checkpointing_enable({"use_reentrant": False})
    return model


# --- laid down without a trace --------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it, modules register their parameters on the meta device (no memory, no random numbers); buffers are real."""
    import torch

    register = torch.nn.Module.register_parameter

    def on_meta(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def hollow(a: Arch, dtype: str, attention: str = "sdpa") -> Any:
    """The model with parameters on the meta device and real buffers on the CPU, in training mode: nothing on the GPU."""
    import torch

    with _parameters_on_meta():
        model = _class(a)._from_config(transformers_config(a), dtype=getattr(torch, dtype), attn_implementation=attention)
    if a.tied:
        model.tie_weights()
    return model.train()


def _in_order(module: Any) -> Iterator[Any]:
    """The modules in the order in which `Module.to` moves their tensors: children first."""
    for child in module.children():
        yield from _in_order(child)
    yield module


def lay_down(model: Any, device: str, exact: bool = False) -> None:
    """Give a hollow model its tensors on `device`: each is allocated once, at its size, in the order of `Module.to`, and nothing else is.

    Matrices are drawn from a normal distribution of standard deviation 0.02, norms are 1, biases 0. `exact`: a sharded model gets the
    numbers that the whole model would get (it costs a copy of each whole matrix); else every rank draws the same numbers for its shard.
    """
    import torch

    done: dict[int, Any] = {}  # a tied tensor is laid down once
    with torch.no_grad():
        for module in _in_order(model):
            for name, p in module._parameters.items():
                if p is None:
                    continue
                if p.is_meta and id(p) not in done:
                    new = torch.nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
                    _draw(new, name, exact)
                    done[id(p)] = done[id(new)] = new
                module._parameters[name] = done.get(id(p), p)
            _move_buffers(module, device)


def _move_buffers(module: Any, device: str) -> None:
    for name, b in module._buffers.items():
        if b is not None and device != "cpu":
            module._buffers[name] = b.to(device)


def _draw(p: Any, name: str, exact: bool) -> None:
    local = p.to_local() if hasattr(p, "to_local") else p
    if p.dim() < 2:
        local.fill_(0.0 if name.endswith("bias") else 1.0)
    elif local is p or not exact:
        _noise(local)
    else:
        import torch
        from torch.distributed.tensor import distribute_tensor

        whole = torch.empty(p.shape, dtype=p.dtype)
        _noise(whole)
        local.copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local())


def _noise(t: Any) -> None:
    """Random numbers in place. A CPU draws them one by one, so a large tensor there repeats its first million."""
    if not t.is_cpu or t.numel() <= 2**20:
        t.normal_(std=0.02)
        return
    first, *rest = t.view(-1).split(2**20)
    first.normal_(std=0.02)
    for part in rest:
        part.copy_(first[:part.numel()])


# --- split over ranks -----------------------------------------------------------------------------------------------------------

def blocks(model: Any) -> Any:
    """The model's transformer blocks."""
    if hasattr(model, "transformer"):
        return model.transformer.h
    return model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers


def shard(model: Any, strategy: str, precision: str, offload: bool, shard_size: int | None, world_size: int, device: str) -> None:
    """FSDP2: `fully_shard` on each block and on the root, `reshard_after_forward` passed to both."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if strategy == "hybrid_shard":
        mesh = init_device_mesh(device, (world_size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device, (world_size,))
    options: dict[str, Any] = dict(mesh=mesh, reshard_after_forward=strategy != "shard_grad_op")
    if precision == "amp_bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device == "cuda")
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def divide(a: Arch, c: dict[str, Any], device: str, lr: float) -> Any:
    """The course's own ZeRO (nbs_lib.zero) of the stage that the settings name; it stands where the optimizer does, and its `model` is the model."""
    import torch

    from ...zero import STAGES

    stage = STAGES[c["strategy"]]
    model = hollow(a, "bfloat16" if c["precision"] == "bf16" else "float32", c["attention"])
    how: dict[str, Any] = dict(optimizer=lambda parameters: optimizer(c["optimizer"], parameters, lr))
    if c["strategy"] == "zero3":  # divided while it is on the meta device: no rank ever holds all of it
        for module in model.modules():
            _move_buffers(module, device)
        model = _equip(model, c["checkpointing"], None)
        z = stage(model, blocks=blocks(model), dtype=torch.bfloat16 if c["precision"] == "amp_bf16" else None, device=device, **how)
        fill(z, exact=device == "cpu")
    else:
        lay_down(model, device)
        model = _equip(model, c["checkpointing"], None)
        z = stage(model, blocks=blocks(model), **how)
    _tidy(device)
    return z


def fill(z: Any, exact: bool) -> None:
    """Draw the numbers of a model that ZeRO-3 has divided on the meta device, as `lay_down` does. `exact`: those that the whole model would get."""
    import torch

    pieces = {id(p.shard): p for p in z.pieces}
    with torch.no_grad():
        for module in _in_order(z.model):
            for name, shard in module._parameters.items():
                if (p := pieces.pop(id(shard), None)) is None:  # none, or tied and drawn already
                    continue
                if p.whole.dim() < 2 or not exact:
                    _draw(shard.view(-1, 1) if p.whole.dim() > 1 else shard, name, exact=False)
                else:
                    whole = torch.empty(p.whole.shape, dtype=shard.dtype)
                    _noise(whole)
                    shard.copy_(whole.flatten()[z.rank * p.part:][:shard.numel()])


def make(a: Arch, c: dict[str, Any], device: str, rank: int) -> Any:
    """The model that the settings `c` (train_memory's arguments) describe, laid down on `device`, ready for its strategy's steps.

    device: "cuda" (this process's current one) or "cpu". A process group must be there, but for strategy "single". ZeRO: see `divide`.
    """
    model = hollow(a, "bfloat16" if c["precision"] == "bf16" else "float32", c["attention"])
    if c["strategy"] in SHARDED:
        model = _equip(model, c["checkpointing"], None)
        shard(model, c["strategy"], c["precision"], c["offload"], c["shard_size"], c["world_size"], device)
        lay_down(model, "cpu" if c["offload"] else device, exact=device == "cpu")
        model._apply(lambda t: t)  # FSDP takes note of the new shards, and pads those of other ranks
    else:
        lay_down(model, device)
        model = _equip(model, c["checkpointing"], c["lora_rank"])
        if c["strategy"] == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            model = DistributedDataParallel(model, device_ids=[rank] if device == "cuda" else None)
    _tidy(device)
    return model


def _tidy(device: str) -> None:
    """Give back what building has left."""
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def optimizer(name: str, parameters: Any, lr: float = LEARNING_RATE) -> Any:
    """The optimizer of that name over the parameters that are trained, torch's defaults but for the learning rate."""
    import torch

    trained = [p for p in parameters if p.requires_grad]
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=lr)
    make = {"adamw": lambda p: torch.optim.AdamW(p, lr=lr), "adamw_fused": lambda p: torch.optim.AdamW(p, lr=lr, fused=True),
            "sgd": lambda p: torch.optim.SGD(p, lr=lr), "sgd_momentum": lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9)}
    return make[name](trained)
