"""What the labs of several ranks run on: ranks and a GPT by what this machine has; and on each rank its device, its model, its batches and what they leave."""
from __future__ import annotations

import time
from typing import TYPE_CHECKING, Callable, Iterator, Sequence

from ..memory import GiB, train_memory
from ..models import Arch, arch
from .lab_ranks import lab_world
from .world import World

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..gpt import GPT, GPTConfig

SHARE = 0.6     # of the memory that is free on every GPU: what a lab may take by prediction


def rank_world() -> World:
    """The ranks of this machine: NCCL with as many GPUs as there are (2, 4 or 8), else four on gloo."""
    import torch

    gpus = next((n for n in (8, 4, 2) if torch.cuda.device_count() >= n), 0)
    return lab_world(gpus, "nccl") if gpus else lab_world(4, "gloo")


def largest(sizes: Sequence[tuple], precision: str, world: World, models: int = 1) -> tuple[GPTConfig, int]:
    """The first of `sizes`, ((layers, heads, hidden), sequences of a rank) from large to small, that fits the world's GPUs: its GPT and sequences.

    It fits if its predicted peak under DDP, and what `models` - 1 more such models hold between their steps, take less than SHARE of the memory
    that is free on every GPU. MemoryError where nothing fits.
    """
    from ..gpt import GPTConfig

    free = min(world.run(free_bytes))
    for (layers, heads, hidden), batch in sizes:
        c = GPTConfig(layers=layers, heads=heads, hidden=hidden)
        predicted = train_memory(as_gpt2(c), batch, c.context, precision, strategy="ddp", world_size=world.ranks)
        idle = sum(predicted.by_phase["step"][k] for k in ("weights", "optimizer", "buckets"))
        if predicted.peak_any + (models - 1)*idle < SHARE*free:
            return c, batch
    raise MemoryError(f"the GPUs have {free/GiB:.1f} GiB free, which is too little for this lab; end what else runs there, or hide the GPUs "
                      "(CUDA_VISIBLE_DEVICES=) and use the CPU.")


def as_gpt2(c: GPTConfig) -> Arch:
    """The GPT-2 of transformers with the same tensors, for predictions."""
    return arch(dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_embd=c.hidden, n_layer=c.layers, n_head=c.heads, vocab_size=c.vocab,
                     n_positions=c.context))


def small(c: GPTConfig) -> GPTConfig:
    """The same with four blocks at most, where several models are held or trained."""
    from ..gpt import GPTConfig

    return GPTConfig(min(4, c.layers), c.heads, c.hidden, c.vocab, c.context)


def free_bytes() -> int:
    """On a rank: what is free on its GPU."""
    import torch

    return torch.cuda.mem_get_info()[0]


def device_here() -> torch.device:
    """On a rank: where its tensors live."""
    import torch
    import torch.distributed as dist

    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def own_batches(c: GPTConfig, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """On a rank: endless (ids, targets), other ones than on the other ranks."""
    import torch.distributed as dist

    from ..gpt import batches, text

    device = device_here()
    for ids, targets in batches(text(2 if c.vocab > 128*256 else 1), batch, c.context, seed=dist.get_rank()):
        yield ids.to(device), targets.to(device)


def fresh(c: GPTConfig) -> GPT:
    """On a rank: a GPT, with the same weights on every rank."""
    import torch

    from ..gpt import GPT

    torch.manual_seed(0)
    with device_here():
        return GPT(c)


def settled(now: Callable[[], int]) -> int:
    """The least of what `now` says within a fifth of a second: gloo's threads let go of a collective's tensors a little after its end."""
    found = [now()]
    for _ in range(20):
        time.sleep(0.01)
        found.append(now())
    return min(found)
