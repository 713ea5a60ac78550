"""FSDP from scratch (chapter 6): equal to FSDP2 and DDP, memory and bytes by formula, on real ranks."""
from __future__ import annotations

import contextlib
import gc
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import nbs_lib.fsdp as lib
from nbs_lib.course.world import RankError
from nbs_lib.fsdp import FSDP, clip_grad_norm, full_state_dict, load_full_state_dict
from nbs_lib.gpt import GPT, GPTConfig, batches, text

ODD = GPTConfig(layers=3, heads=2, hidden=36, vocab=131, context=24)     # nothing divides evenly
BF16 = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


# --- what ranks run ---------------------------------------------------------------------------------------------------------------

class Checkpointed(GPT):
    """The course's GPT whose blocks are computed again in backward."""

    def trunk(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks: x = checkpoint(block, x, use_reentrant=False)
        return self.norm(x)


class Segmented(GPT):
    """All blocks in one checkpoint."""

    def trunk(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.norm(checkpoint(lambda x: [x := block(x) for block in self.blocks][-1], x, use_reentrant=False))


def llama(tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=131, hidden_size=36, intermediate_size=70, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=18, tie_word_embeddings=tied, use_cache=False, max_position_embeddings=64, bos_token_id=0, eos_token_id=1))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=131, n_embd=36, n_layer=3, n_head=2, n_positions=64, use_cache=False, resid_pdrop=0,
                                      embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=1))


def recomputing_llama():
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


MODELS = {"gpt": lambda: GPT(ODD), "gpt checkpointed": lambda: Checkpointed(ODD), "gpt segmented": lambda: Segmented(ODD), "llama": llama, "tied llama": lambda: llama(True),
          "gpt2": gpt2, "llama checkpointed": recomputing_llama}


def frozen_none(model): pass


def frozen_some(model):
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name: p.requires_grad_(False)


def frozen_block(model):
    for p in blocks_of(model)[1].parameters(): p.requires_grad_(False)


def make(kind, freeze=frozen_none, seed=0):
    torch.manual_seed(seed)
    model = MODELS[kind]().train()
    freeze(model)
    return model


def blocks_of(model):
    return model.blocks if isinstance(model, GPT) else model.transformer.h if hasattr(model, "transformer") else model.model.layers


def loss_of(model, x, y):
    inner = model.module if hasattr(model, "module") else model
    return model(x, y) if isinstance(inner, GPT) else model(input_ids=x, labels=x).loss


def data(batch=2, seq=16): return batches(text() % 131, batch, seq, seed=10 + dist.get_rank())


def trainable(model): return [p for p in model.parameters() if p.requires_grad]


def train(model, steps=10, micro=1, quiet=lambda model, last: contextlib.nullcontext(), **adamw):
    optimizer, losses, source = torch.optim.AdamW(trainable(model), lr=1e-3, **adamw), [], data()
    for _ in range(steps):
        for i in range(micro):
            x, y = next(source)
            with quiet(model, i == micro - 1):
                loss = loss_of(model, x, y)
                loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def no_sync(model, last):
    """Gradients stay on their rank until the last micro-batch: each library's way."""
    if hasattr(model, "set_requires_gradient_sync"): model.set_requires_gradient_sync(last)
    elif not last: return model.no_sync()
    return contextlib.nullcontext()


def twin_of(model, strategy, shard_size=None, bf16=False):
    """PyTorch's own of a strategy."""
    world, mesh = dist.get_world_size(), None
    if strategy == "NO_SHARD" and not bf16: return DistributedDataParallel(model)
    if strategy in ("NO_SHARD", "HYBRID_SHARD"):
        size = shard_size or 1
        mesh = init_device_mesh("cpu", (world//size, size), mesh_dim_names=("replicate", "shard"))
    how = dict(mesh=mesh, reshard_after_forward=strategy != "SHARD_GRAD_OP")
    if bf16: how["mp_policy"] = MixedPrecisionPolicy(**BF16)
    for part in [*blocks_of(model), model]: fully_shard(part, **how)
    return model


def whole(twin):
    state = (twin.module if isinstance(twin, DistributedDataParallel) else twin).state_dict()
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).clone() for name, x in state.items()}


def against_torch(kind, strategy, shard_size=None, bf16=False, micro=1, quiet=False, freeze=frozen_none, steps=10, nudge=False, **adamw):
    """(losses and weights are equal, the largest difference of losses, of weights, the number of weights compared)."""
    twin = twin_of(make(kind, freeze), strategy, shard_size, bf16)
    ours = make(kind, freeze)
    ours = FSDP(ours, blocks_of(ours), strategy, shard_size, **(BF16 if bf16 else {}))
    if nudge and dist.get_rank() == 0:
        with torch.no_grad(): ours.flats[1].shard[5] += 1e-6
    how = dict(steps=steps, micro=micro, **adamw, **({"quiet": no_sync} if quiet else {}))
    a, b = train(ours, **how), train(twin, **how)
    mine, theirs = full_state_dict(ours), whole(twin)
    assert set(mine) == set(theirs) or dist.get_rank()
    apart = max([(mine[n] - theirs[n]).abs().max().item() for n in mine], default=0.0)
    equal = a == b and all(mine[n].equal(theirs[n]) for n in mine)
    return equal, max(abs(x - y) for x, y in zip(a, b)), apart, len(mine)


class Counter:
    """Counts what torch.distributed is handed by the module, by the ring's formula."""

    def __enter__(self):
        self.sent, self.saved = {}, (lib.all_gather_into, lib.reduce_scatter_into, dist.all_reduce)

        def counted(name, call, whole_of, times):
            def wrapper(*args, group=None, **more):
                n = dist.get_world_size(group)
                tensor = whole_of(args)
                key = name, n
                self.sent[key] = self.sent.get(key, 0) + times*tensor.numel()*tensor.element_size()*(n - 1)//n
                return call(*args, group=group, **more)
            return wrapper
        lib.all_gather_into = counted("all_gather", self.saved[0], lambda a: a[0], 1)
        lib.reduce_scatter_into = counted("reduce_scatter", self.saved[1], lambda a: a[1], 1)
        dist.all_reduce = counted("all_reduce", self.saved[2], lambda a: a[0], 2)
        return self

    def __exit__(self, *_): lib.all_gather_into, lib.reduce_scatter_into, dist.all_reduce = self.saved


@contextlib.contextmanager
def only_new():
    """live() does not see what was there before."""
    gc.collect()
    gc.freeze()
    try: yield
    finally: gc.unfreeze()


def live():
    """Bytes of all storages that Python's tensors are on, each once."""
    gc.collect()
    found = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, nn.Parameter): found[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
    return sum(found.values())


def settled():
    """live(), once gloo's threads have let go of the last collective's tensors."""
    last = None
    for _ in range(40):
        now = live()
        if now == last: return now
        last = now
        time.sleep(.05)
    return now


def memory(strategy, shard_size=None, bf16=False):
    """Bytes that live after each phase, but for those before the model; the most gathered; what was sent in a step."""
    x, y = next(data())
    with only_new(): return phases_of(strategy, shard_size, bf16, x, y)


def phases_of(strategy, shard_size, bf16, x, y):
    ours = FSDP(make("gpt"), None, strategy, shard_size, **(BF16 if bf16 else {}))
    phases = {"wrapped": settled()}
    optimizer = torch.optim.AdamW(ours.parameters())
    most = [0]

    def look(*_):
        most[0] = max(most[0], sum(f.whole.untyped_storage().nbytes() for f in ours.flats if not f.alias))
    for m in ours.module.modules():
        if not isinstance(m, (GPT, nn.ModuleList)):
            m.register_forward_pre_hook(look)
            m.register_full_backward_hook(look)
    for step in range(2):
        with Counter() as counter:
            loss_of(ours, x, y).backward()
        phases["backward"] = settled()
        optimizer.step()
        phases["step"] = settled()
        optimizer.zero_grad()
        phases["zero_grad"] = settled()
    return phases, most[0], counter.sent, len(ours.flats)


def gradients_against_sum():
    """On N ranks: our gradients, FSDP2's, and each element's bound from all ranks' own gradients, in double precision."""
    x, y = next(data())
    alone = make("gpt")
    loss_of(alone, x, y).backward()
    names = [name for name, _ in alone.named_parameters()]
    mine = torch.cat([p.grad.flatten() for p in alone.parameters()])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    every, n = torch.stack(every).double(), len(every)
    exact, bound = every.mean(0), (n - 1)*2**-24*(1 + 1e-5)*every.abs().mean(0)
    ours = FSDP(make("gpt"))
    loss_of(ours, x, y).backward()
    parts = {}
    for f in ours.flats:
        flat = torch.empty(f.length)
        lib.all_gather_into(flat, f.shard.grad)
        for part, home in zip(flat.split(f.parts)[::2], f.homes): parts[home.names[0]] = part
    got = torch.cat([parts[name] for name in names]).double()
    twin = twin_of(make("gpt"), "FULL_SHARD")
    loss_of(twin, x, y).backward()
    theirs = torch.cat([p.grad.full_tensor().flatten() for p in twin.parameters()]).double()
    return bool(((got - exact).abs() <= bound).all()), bool(((theirs - exact).abs() <= bound).all()), (got - theirs).abs().max().item()


def largest_gradient():
    x, y = next(data())
    alone = make("gpt")
    loss_of(alone, x, y).backward()
    sizes = torch.cat([p.grad.abs().flatten() for p in alone.parameters()])
    dist.all_reduce(sizes)
    return sizes.max().item()/dist.get_world_size()


def padding_gradient(ours):
    """The largest gradient in a buffer's padding, on all ranks."""
    largest = 0.0
    for f in ours.flats:
        whole = torch.empty(f.length)
        lib.all_gather_into(whole, f.shard.grad)
        largest = max([largest, *(x.abs().max().item() for x in whole.split(f.parts)[1::2] if len(x))])
    return largest


def other_ways():
    """What does not fit elsewhere, on two ranks; each entry is True."""
    source, found = data(), {}
    x, y = next(source)
    ours, plain = FSDP(make("gpt")), make("gpt")
    with torch.no_grad(): found["eval gives the plain model's logits"] = ours(x).equal(plain(x))
    found["and frees everything"] = all(f.whole.untyped_storage().nbytes() == 0 for f in ours.flats)

    ours, twin = FSDP(make("gpt")), twin_of(make("gpt"), "FULL_SHARD")
    for model in (ours, twin): (loss_of(model, x, y) + loss_of(model, y, x)).backward()     # two forwards, one backward
    for model in (ours, twin): torch.optim.SGD(model.parameters(), lr=1.0).step()     # a sum in another order
    mine, theirs = full_state_dict(ours), whole(twin)
    found["two forwards, one backward"] = all(torch.allclose(mine[n], theirs[n], rtol=0, atol=1e-6) for n in mine)

    ours, twin = FSDP(make("gpt")), DistributedDataParallel(make("gpt"))
    for model in (ours, twin): loss_of(model, x, y).backward()
    # in double precision: torch's clip_grad_norm_ is 1e-4 off here, since its sum on a CPU runs through in fp32
    norm = torch.stack([p.grad.double().square().sum() for p in twin.parameters()]).sum().sqrt().item()
    found["the norm is that of all gradients"] = norm > 0.1 and abs(clip_grad_norm(ours, 0.1).item()/norm - 1) < 1e-6
    found["padding has no gradient"] = padding_gradient(ours) == 0
    found["clipped to it"] = abs(clip_grad_norm(ours, 1e9).item() - 0.1) < 1e-6

    class Interrupt(Exception): pass

    def stop(*_): raise Interrupt
    ours, same = FSDP(make("gpt")), FSDP(make("gpt"))
    expected = train(same, steps=2)
    for place in ("register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(ours.module.blocks[1].up, place)(stop)
        with contextlib.suppress(Interrupt): loss_of(ours, x, y).backward()
        handle.remove()
        ours.zero_grad()
    found["a step after two that broke off"] = train(ours, steps=2) == expected

    found["one checkpoint around all blocks"] = train(FSDP(make("gpt segmented")), 3) == train(FSDP(make("gpt")), 3)
    losses = []
    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
        ours = FSDP(make("gpt"), strategy=strategy)
        loss_of(ours, x, y).backward()
        loss_of(ours, x, y)                                               # has no backward, and keeps parameters gathered
        torch.optim.SGD(ours.parameters(), lr=0.1).step()
        losses.append(loss_of(ours, x, y).item())
    found["no stale parameters"] = losses[0] == losses[1]

    ours, again = FSDP(make("gpt")), FSDP(make("gpt", seed=1))
    train(ours, steps=2)
    again.load_state_dict({name: t.clone() for name, t in ours.state_dict().items()})      # shards
    found["sharded checkpoint"] = train(again, steps=2) == train(ours, steps=2)
    state, again = full_state_dict(ours), FSDP(make("gpt", seed=2))
    load_full_state_dict(again, state if dist.get_rank() == 0 else None)
    found["full checkpoint"] = train(again, steps=2) == train(ours, steps=2)
    found["only rank 0 has it"] = bool(state) == (dist.get_rank() == 0)

    mixed = make("gpt")
    for b in mixed.blocks: b.norm1.bfloat16(); b.up.bfloat16()
    flats = FSDP(mixed).flats
    found["a buffer for each dtype"] = len(flats) == 1 + 2*3 and len({f.name for f in flats}) == len(flats)
    different = FSDP(make("gpt", seed=dist.get_rank()))
    found["all begin with rank 0's weights"] = all(x.equal(y) for x, y in zip(
        full_state_dict(different).values(), full_state_dict(FSDP(make("gpt"))).values()))
    found["offload changes nothing on a CPU"] = train(FSDP(make("gpt"), offload=True), 2) == train(FSDP(make("gpt")), 2)
    return found


def kept_under_no_sync(strategy):
    """After a backward under no_sync: bytes gathered, of whole gradients, and collectives that reduce."""
    ours = FSDP(make("gpt"), strategy=strategy)
    x, y = next(data())
    with Counter() as counter, ours.no_sync(): loss_of(ours, x, y).backward()
    return (sum(f.whole.untyped_storage().nbytes() for f in ours.flats if not f.alias), sum(f.unreduced.nbytes for f in ours.flats),
            [op for op, _ in counter.sent if op != "all_gather"], [f.shard.grad for f in ours.flats])


def recorded(strategy="FULL_SHARD", **how):
    from nbs_lib.fsdp import watch
    from nbs_lib.records import Record, one_step
    record = Record()
    ours = FSDP(make("gpt"), strategy=strategy, record=record, **how)
    optimizer = torch.optim.AdamW(ours.parameters())
    watch(ours, optimizer)
    for _, (x, y) in zip(range(3), data()):
        loss_of(ours, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return one_step(record)


def says(case):
    """The sentence with which a misuse is refused."""
    model = make("gpt")
    cases = {
        "unknown strategy": lambda: FSDP(model, strategy="SHARD_ALL"),
        "shard_size": lambda: FSDP(model, strategy="HYBRID_SHARD", shard_size=3),
        "no blocks": lambda: FSDP(nn.Linear(2, 2)),
        "block class": lambda: FSDP(model, nn.Conv2d),
        "foreign block": lambda: FSDP(model, [nn.Linear(2, 2)]),
        "twice": lambda: FSDP(FSDP(model)),
        "inner twice": lambda: (FSDP(model), FSDP(model)),
        "no module": lambda: FSDP("gpt"),
        "fp16": lambda: FSDP(model, param_dtype=torch.float16),
        "meta": lambda: FSDP(GPT(ODD).to("meta")),
        "no gradients": lambda: clip_grad_norm(FSDP(model), 1.0),
        "no record": lambda: lib.watch(FSDP(model), None),
        "missing weight": lambda: load_full_state_dict(FSDP(model), {}),
        "wrong shape": lambda: load_full_state_dict(FSDP(model), dict(make("gpt").state_dict()) | {"norm.weight": torch.ones(3)})}
    if case == "stale optimizer":
        optimizer = torch.optim.SGD(model.parameters(), lr=1)
        FSDP(model)
        cases[case] = optimizer.step
    if case == "a part":
        wrapped = FSDP(model)
        cases[case] = lambda: wrapped.module.blocks[0].up(torch.ones(1, 36))
    if case == "no tensor":
        wrapped = FSDP(model)
        wrapped.module.blocks[0].forward = lambda x: {"nothing": 1}
        cases[case] = lambda: wrapped(torch.zeros(1, 4, dtype=torch.long))
    try: cases[case]()
    except (ValueError, RuntimeError) as e: return str(e)
    return "accepted"


def from_two_ranks(state):
    """On another world: load, and give back."""
    ours = FSDP(make("gpt", seed=5), strategy="HYBRID_SHARD", shard_size=2)
    load_full_state_dict(ours, state if dist.get_rank() == 0 else None)
    return full_state_dict(ours)


def a_full_state(): return full_state_dict(FSDP(make("gpt", seed=3)))


# --- the tests --------------------------------------------------------------------------------------------------------------------

BITWISE = [("gpt", "FULL_SHARD", {}), ("gpt", "SHARD_GRAD_OP", {}), ("gpt", "NO_SHARD", {}), ("llama", "FULL_SHARD", {}),
           ("tied llama", "SHARD_GRAD_OP", {}), ("gpt2", "FULL_SHARD", {}),
           ("llama", "FULL_SHARD", dict(bf16=True)), ("llama", "NO_SHARD", dict(bf16=True)),
           ("gpt checkpointed", "FULL_SHARD", {}), ("llama checkpointed", "FULL_SHARD", {}),
           ("llama checkpointed", "FULL_SHARD", dict(bf16=True, freeze=frozen_some)),
           ("gpt", "FULL_SHARD", dict(micro=2)), ("gpt", "FULL_SHARD", dict(micro=3, quiet=True)),
           ("gpt", "SHARD_GRAD_OP", dict(micro=2, quiet=True)), ("gpt", "NO_SHARD", dict(micro=2, quiet=True)),
           ("llama", "FULL_SHARD", dict(micro=2, quiet=True, bf16=True)),
           ("gpt", "FULL_SHARD", dict(freeze=frozen_some)), ("gpt", "SHARD_GRAD_OP", dict(freeze=frozen_block)),
           ("gpt checkpointed", "FULL_SHARD", dict(freeze=frozen_block))]


@pytest.mark.parametrize("kind, strategy, how", BITWISE)
def test_two_ranks_bit_for_bit(two, kind, strategy, how):
    for equal, *far, _ in two.run(against_torch, kind, strategy, **how): assert equal, far


def test_the_comparison_can_fail(two):
    """One number of one shard that is 1e-6 off is seen on rank 0, which has the weights."""
    equal, _, apart, tensors = two.run(against_torch, "gpt", "FULL_SHARD", steps=2, nudge=True)[0]
    assert not equal and 0 < apart < 1e-4 and tensors == len(GPT(ODD).state_dict())


@pytest.mark.parametrize("kind, how", [("gpt", {}), ("gpt2", dict(bf16=True)), ("gpt", dict(micro=2, quiet=True))])
def test_hybrid_two_by_two_bit_for_bit(four, kind, how):
    for equal, *far, _ in four.run(against_torch, kind, "HYBRID_SHARD", 2, **how): assert equal, far


def test_four_ranks_gradients_within_the_bound_of_a_sum(four):
    """|computed mean - mean| <= (N-1) u mean|g|, element by element, in any order of addition (u = 2^-24, to first order)."""
    for ours, theirs, apart in four.run(gradients_against_sum): assert ours and theirs and apart > 0


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
def test_four_ranks_after_ten_steps(four, strategy):
    """Gradients apart by d = 2(N-1) u max mean|g| move an AdamW weight by at most 2.25 k lr d/eps in k = 10 steps (chapter 6)."""
    k, lr, eps = 10, 1e-3, 1e-3
    bound = 2.25*k*lr/eps*2*3*2**-24*max(four.run(largest_gradient))
    for _, losses, weights, _ in four.run(against_torch, "gpt", strategy, eps=eps):
        assert weights <= bound < 1e-4 and losses <= 1e-5


@pytest.mark.parametrize("strategy, size, bf16", [("FULL_SHARD", 4, False), ("SHARD_GRAD_OP", 4, False), ("NO_SHARD", 1, False),
                                                  ("HYBRID_SHARD", 2, False), ("HYBRID_SHARD_ZERO2", 2, True), ("FULL_SHARD", 4, True)])
def test_bytes_held_and_sent(four, strategy, size, bf16):
    lengths, hybrid = lib.unit_lengths(GPT(ODD), ranks=size), "HYBRID" in strategy
    states, reshard = lib.held(lengths, size), lib.STRATEGIES[strategy].reshard
    e = 2 if bf16 else 4
    for phases, most, sent, flats in four.run(memory, strategy, size if hybrid else None, bf16):
        counts = 4*flats                                     # AdamW's step counts
        assert phases["wrapped"] == states["parameters"]
        assert phases["backward"] == sum(states.values()) + counts
        assert phases["step"] == phases["backward"]
        assert phases["zero_grad"] == states["parameters"] + states["optimizer"] + counts
        assert most == (lib.gathered_peak(lengths, reshard, e) if size > 1 else 0)
        inside = sum(n for (_, ranks), n in sent.items() if ranks == size)
        across = sum(n for (_, ranks), n in sent.items() if ranks == 4//size) if size != 4 else 0
        if size == 2: inside, across = sent["all_gather", 2] + sent["reduce_scatter", 2], sent["all_reduce", 2]
        expected = lib.moved(lengths, 4, size, reshard, e, 4)
        assert {"inside": inside if size > 1 else 0, "across": across} == expected


def test_formulas():
    lengths = {"root": 256, "block 0": 512}
    P, N = 768*4, 4
    assert lib.moved(lengths, N, N, True)["inside"] == 3*P*(N - 1)//N
    assert lib.moved(lengths, N, N, False)["inside"] == lib.moved(lengths, N, 1, False)["across"] == 2*P*(N - 1)//N
    assert lib.moved(lengths, N, 2, True) == {"inside": 3*P//2, "across": P//2}
    for numbers in ([1], [31, 32, 33], [1000, 7]):
        for ranks in (1, 2, 3, 4, 7):
            n = lib.flat_length(numbers, ranks)
            assert n % (ranks*lib.ALIGN) == 0 and sum(numbers) <= n < sum(numbers) + lib.ALIGN*(ranks + len(numbers))


def test_other_ways(two):
    for found in two.run(other_ways):
        assert all(found.values()), [name for name, right in found.items() if not right]


def test_no_sync_keeps_whole_gradients(two):
    lengths = lib.unit_lengths(GPT(ODD), ranks=2)
    for strategy, kept in (("FULL_SHARD", 0), ("SHARD_GRAD_OP", 4*sum(lengths.values()))):
        for gathered, unreduced, reduced, shards in two.run(kept_under_no_sync, strategy):
            assert gathered == kept and unreduced == 4*sum(lengths.values()) and not reduced and shards == [None]*4


def test_prefetch_and_overlap_in_the_record(two):
    """The next gather begins before this block computes, and a reduce-scatter goes on while the next block computes."""
    for record in two.run(recorded):
        order = [e.label if e.what != "begin" else f"begin {e.name}" for e in record.events if e.what in ("begin", "end")]
        at = order.index
        assert at("begin all_gather block 1") < at("begin forward block 0") < at("end of forward block 0")
        assert at("end of all_gather block 1") > at("end of forward block 0")
        last = len(order) - 1 - order[::-1].index("begin all_gather block 0")
        assert last < at("begin backward block 1")
        assert at("begin reduce_scatter block 2") < at("begin backward block 1") < at("end of reduce_scatter block 2")
        units = lib.unit_lengths(GPT(ODD), ranks=2)
        assert record.bytes_sent == {"all_gather": 4*sum(units.values()), "reduce_scatter": 2*sum(units.values())}
        assert record.held() == {"parameters": 2*sum(units.values()), "gradients": 2*sum(units.values()),
                                 "optimizer": 4*sum(units.values())}


@pytest.mark.parametrize("case, words", [
    ("unknown strategy", ("SHARD_ALL", "FULL_SHARD")), ("shard_size", ("shard_size is 3", "divisor", "2 ranks")),
    ("no blocks", ("blocks is None", "no nn.ModuleList")), ("block class", ("Conv2d", "GPT has no")),
    ("foreign block", ("Linear", "not inside GPT")), ("twice", ("wrapped already",)), ("inner twice", ("wrapped already",)),
    ("no module", ("module is a str",)), ("fp16", ("float16", "scaler")), ("meta", ("tokens.weight", "meta")),
    ("no gradients", ("between backward and step",)), ("no record", ("no record",)), ("missing weight", ("state has no tokens.weight",)),
    ("wrong shape", ("norm.weight", "(3,)", "(36,)")), ("stale optimizer", ("SGD was made before FSDP",)),
    ("a part", ("blocks.0.up.", "not gathered", "Call the model")), ("no tensor", ("block 0", "dict without tensors"))])
def test_bad_input_is_a_sentence(two, case, words):
    for said in two.run(says, case): assert all(word in said for word in words), said


def test_no_process_group():
    with pytest.raises(ValueError, match="no process group.*torchrun"): FSDP(GPT(ODD))
    with pytest.raises(ValueError, match="has no groups"): lib.ranks_per_shard("FULL_SHARD", 4, 2)
    with pytest.raises(ValueError, match="shard_size is True"): lib.ranks_per_shard("HYBRID_SHARD", 4, True)


def test_a_world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for strategy in ("FULL_SHARD", "NO_SHARD"): assert train(FSDP(make("gpt"), strategy=strategy), 3) == train(make("gpt"), 3)
    finally: dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_a_model_that_has_trained_can_be_freed(strategy):
    """Autograd's nodes and hooks hold nothing of it for good."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = FSDP(make("gpt"), strategy=strategy)
        train(model, 1)
        gone = [weakref.ref(x) for x in (model, model.module, model.engine, *model.flats, *model.parameters())]
        del model
        gc.collect()
        assert not any(x() is not None for x in gone)
    finally: dist.destroy_process_group()


def test_stored_steps_keep_up_with_fsdp2():
    """Of the file with the measurements on H100s; nothing is timed here."""
    from nbs_lib.course.scaling import OURS
    from nbs_lib.ddp import measured

    rows = {key: r for key, r in measured().items() if key[1].startswith("fsdp ")}
    assert {(w, n) for _, w, n in rows} == {(f"fsdp {s}", n) for s in ("FULL_SHARD", "SHARD_GRAD_OP") for n in (2, 4)} and len(rows) == 8
    for (model, way, n), r in rows.items():
        theirs = measured()[model, OURS[way], n]
        assert r["twin"] > 0.9 and abs(r["peak"]/theirs["peak"] - 1) < 0.01
        assert all(abs(a/b - 1) < 2e-3 for a, b in zip(r["losses"], theirs["losses"]))


def test_a_checkpoint_of_two_ranks_on_four(two, four):
    state = two.run(a_full_state)[0]
    again = four.run(from_two_ranks, state)
    assert set(again[0]) == set(state) == set(make("gpt").state_dict()) and not again[1]
    assert all(again[0][name].equal(state[name]) for name in state)
    make("gpt").load_state_dict(state)                                    # a plain model's names and shapes


def test_names_are_those_of_the_installed_libraries():
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils.constants import FSDP_SHARDING_STRATEGY
    from torch.distributed.fsdp import ShardingStrategy

    assert {n.fsdp1 for n in lib.NAMES} - {"-"} == {s.name for s in ShardingStrategy}
    for number, n in enumerate(lib.NAMES[:5], 1):
        assert n.accelerate1 == f"{FSDP_SHARDING_STRATEGY[number - 1]} ({number})"
        assert ShardingStrategy(number).name == n.fsdp1
        one = FullyShardedDataParallelPlugin(fsdp_version=1, reshard_after_forward=n.accelerate1.split(" ")[0]) if n.fsdp1[0] != "_" else None
        assert one is None or one.reshard_after_forward == ShardingStrategy[n.fsdp1]
    for reshard in (True, False):
        assert FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=reshard).reshard_after_forward is reshard
    assert {"dp_replicate_size", "dp_shard_size"} <= set(ParallelismConfig.__dataclass_fields__)
    rows = lib.strategies(16, 8)
    assert len(rows) == 6 and rows[0]["sent"] == "2.81 P in rings of 16" and rows[3]["held"] == "1/8 of 4 P"
    with pytest.raises(ValueError, match="shard_size is 5"): lib.strategies(16, 5)


def test_a_rank_that_fails_is_reported(two):
    """Last: it ends the world of two."""
    with pytest.raises(RankError, match="SHARD_ALL"): two.run(FSDP, make("gpt"), strategy="SHARD_ALL")
