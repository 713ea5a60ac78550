"""Training steps for chapter 10b's measurements: one Llama, JAX over a mesh and PyTorch over ranks, timed."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..jax_torch import ADAMW, Array, Llama, LlamaConfig, Params, causal_attention, loss, rope_torch
import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from ..spmd import Collective, batch_placement, collectives, mesh_for, placements

MODELS = {  # sizes and rows of the batch on each device
    "124m": (LlamaConfig(12, 768, 12, 12, 64, 2048, 50304, 1024), 16),
    "1b": (LlamaConfig(16, 2048, 32, 8, 64, 8192, 50304, 1024), 4),
    "tiny": (LlamaConfig(2, 64, 4, 2, 16, 192, 256, 64), 2),
}
WARM_UP, STEPS, LEARNING_RATE = 3, 10, 1e-4
PRECISION = {"jax": "weights and AdamW fp32; cast to bf16 in the step, residual stream bf16, logits fp32",
             "ddp": "weights, gradients and AdamW fp32; torch.autocast bf16",
             "fsdp2": "weights and AdamW fp32; MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=fp32)"}


def say(*what: Any) -> None:
    """A line of progress, at once."""
    print(f"{time.strftime('%H:%M:%S')} ", *what, flush=True)


def summed(found: Iterable[Collective]) -> list[list]:
    """[operation, dtype, group, arrays, whole bytes, bytes a device sends], for JSON."""
    out: dict[tuple, list[int]] = {}
    for c in found:
        for array in c.arrays:
            one = Collective(c.op, (array,), c.group, c.where, c.times)
            row = out.setdefault((c.op, array[0], c.group), [0, 0, 0])
            for i, n in enumerate((c.times, one.nbytes, one.sent)): row[i] += n
    return [[*k, *v] for k, v in sorted(out.items())]


# --- jax: tokens per second ------------------------------------------------------------------------------

@partial(jax.jit, static_argnums=(1, 2))
def normal(key: Array, shape: tuple[int, ...], size: float) -> Array:
    """Normal numbers; compiled once for each shape, not once for each parameter."""
    return jax.random.normal(key, shape)*size


def initial(key: Array, config: LlamaConfig) -> Params:
    """Random parameters as Llama's, fp32."""
    c, keys = config, iter(jax.random.split(key, 7*config.layers + 2))
    def matrix(*shape: int, last: bool = False) -> Array:
        return normal(next(keys), shape, 0.02/(2*c.layers)**0.5 if last else 0.02)
    h, d = c.hidden, c.head_dim
    def layer() -> Params:
        return {"norm1": jnp.ones(h), "q": matrix(h, c.heads*d), "k": matrix(h, c.kv_heads*d),
                "v": matrix(h, c.kv_heads*d), "out": matrix(c.heads*d, h, last=True), "norm2": jnp.ones(h),
                "gate": matrix(h, c.ffn), "up": matrix(h, c.ffn), "down": matrix(c.ffn, h, last=True)}
    params = {"tokens": matrix(c.vocab, h), "blocks": [layer() for _ in range(c.layers)], "norm": jnp.ones(h)}
    return params if c.tied else params | {"head": matrix(h, c.vocab)}


def train_step(params: Params, state: Any, ids: Array, targets: Array, config: LlamaConfig,
               optimizer: Any, attend: Callable = causal_attention, dtype: Any = jnp.bfloat16) -> tuple:
    """(parameters, state, loss) after a step. Products in dtype, everything kept in fp32."""
    def low(p: Params) -> Array:
        return loss(jax.tree.map(lambda x: x.astype(dtype), p), ids, targets, config, attend)
    value, grads = jax.value_and_grad(low)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def train_program(layout: str, mesh: Mesh, config: LlamaConfig, rows: int, dtype: Any = jnp.bfloat16,
                  attention: str | None = None, told: Callable = lambda *_: None,
                  params: Params | None = None) -> tuple:
    """(compiled training step, parameters, AdamW's state, ids, targets), all placed; rows a device.
    attention: an implementation of jax.nn.dot_product_attention. told: called with what is done next. params:
    to start from; random ones if None.
    """
    told("parameters and optimizer state are made")
    optimizer = optax.adamw(LEARNING_RATE, **ADAMW)
    if params is None: params = initial(jax.random.key(0), config)
    where = placements(params, layout, mesh)
    params = jax.device_put(params, where)
    kept = placements(jax.eval_shape(optimizer.init, params), layout, mesh)
    state = jax.jit(optimizer.init, out_shardings=kept)(params)
    shape = rows*mesh.devices.size, config.context + 1
    windows = np.random.default_rng(0).integers(0, config.vocab, shape, dtype=np.int32)
    ids, targets = (jax.device_put(x, batch_placement(mesh)) for x in (windows[:, :-1], windows[:, 1:]))
    step = partial(train_step, config=config, optimizer=optimizer, dtype=dtype,
                   attend=partial(causal_attention, implementation=attention))
    placed = jax.jit(step, donate_argnums=(0, 1), out_shardings=(where, kept, NamedSharding(mesh, P())))
    told("the step is traced")
    lowered = placed.lower(params, state, ids, targets)
    told("the step is compiled")
    # on a CPU: half the time to compile
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return lowered.compile(compiler_options=options), params, state, ids, targets


def jax_row(layout: str, name: str, attention: str | None = None) -> dict:
    """Tokens per second of JAX's training step over all devices. attention: "cudnn" on GPUs."""
    config, rows = MODELS[name]
    mesh, began = mesh_for(layout), time.perf_counter()
    def told(what: str) -> None: say(f"jax, {layout}, {name}: {what} ({time.perf_counter() - began:.0f} s)")
    made = train_program(layout, mesh, config, rows, attention=attention, told=told)
    compiled, params, state, ids, targets = made
    told("compiled; steps")
    row = {"part": "jax", "way": layout, "model": name, "devices": mesh.devices.size, "rows": rows,
           "context": config.context, "precision": PRECISION["jax"], "attention": attention or "xla",
           "ready after": time.perf_counter() - began, "found": summed(collectives(compiled.as_text()))}
    use = compiled.memory_analysis()
    row["bytes"] = (use.argument_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes
                    + use.temp_size_in_bytes)
    losses, seconds = [], []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        params, state, value = compiled(params, state, ids, targets)
        value.block_until_ready()
        jax.block_until_ready(params)
        seconds.append(time.perf_counter() - start)
        losses.append(float(value))
    rate = ids.size/statistics.median(seconds[WARM_UP:])
    return row | {"seconds": seconds[WARM_UP:], "losses": losses, "tokens/s": rate}


def jax_row_or_plain(layout: str, name: str, attention: str | None) -> dict:
    """jax_row with this attention; where that fails, with XLA's own, and the reason beside it."""
    if attention is None: return jax_row(layout, name)
    try: return jax_row(layout, name, attention)
    except Exception as e: why = f"{type(e).__name__}: {e}"[:300]
    say(f"jax, {layout}, {name}: without {attention}, since {why[:80]}")
    return jax_row(layout, name) | {f"without {attention}": why}


# --- torch: tokens per second ----------------------------------------------------------------------------

def tail_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of hidden states (b, s, h) by the head's weight (V, h)."""
    return F.cross_entropy(F.linear(x, weight).float().flatten(0, 1), targets.flatten())


class Tailed(Llama):
    """A Llama whose head and loss are one function, so that they can be compiled as one."""
    tail: Callable = staticmethod(tail_loss)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x, rope = self.tokens(ids), rope_torch(ids.shape[1], self.config, ids.device)
        for block in self.blocks: x = block(x, rope, self.attend)
        return self.tail(self.norm(x), (self.tokens if self.config.tied else self.head).weight, targets)


def torch_model(way: str, config: LlamaConfig, compiling: bool, device: torch.device) -> nn.Module:
    """The Llama on a device, by DistributedDataParallel ("ddp") or fully_shard ("fsdp2"). Blocks are compiled
    one by one, as is usual with FSDP2 (one compilation serves all), the head with its loss as one function.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    torch.manual_seed(0)
    with device: model = Tailed(config)
    if compiling:
        for block in model.blocks: block.compile()
        model.tail = torch.compile(tail_loss)
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in [*model.blocks, model]: fully_shard(part, mp_policy=policy)
    return model


def torch_row(way: str, name: str, compiling: bool, device: torch.device) -> dict:
    """Tokens per second of PyTorch's training step over all ranks; on every rank, by this rank's clock. On a
    GPU also the share of the time in which no kernel runs.
    """
    import torch.distributed as dist
    config, rows = MODELS[name]
    ranks, began, gpu = dist.get_world_size(), time.perf_counter(), device.type == "cuda"
    if dist.get_rank() == 0: say(f"torch, {way}, {name}, {'compiled' if compiling else 'eager'}: begins")
    model = torch_model(way, config, compiling, device)
    s = ADAMW
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (s["b1"], s["b2"]), s["eps"],
                                  s["weight_decay"], fused=True)
    generator = torch.Generator().manual_seed(dist.get_rank())
    windows = torch.randint(config.vocab, (rows, config.context + 1), generator=generator).to(device)
    losses, seconds = [], []
    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16) if way == "ddp" else nullcontext():
            value = model(windows[:, :-1], windows[:, 1:])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())                                 # waits for the GPU's forward pass
    for i in range(WARM_UP + STEPS):
        if gpu and i == WARM_UP: torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        losses.append(step())
        if gpu: torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rate = ranks*rows*config.context/statistics.median(seconds[WARM_UP:])
    row = {"part": "torch", "way": way, "compiled": compiling, "model": name, "devices": ranks, "rows": rows,
           "context": config.context, "precision": PRECISION[way], "seconds": seconds[WARM_UP:],
           "losses": losses, "all": time.perf_counter() - began, "tokens/s": rate}
    if not gpu: return row
    from .measure_bound import idle_share
    row["bytes"] = torch.cuda.max_memory_allocated()
    try: return row | {"idle": idle_share(step)}
    except Exception as e: return row | {"no idle": f"{type(e).__name__}: {e}"[:300]}
