"""DDP from scratch, on real ranks: equal to PyTorch's bit for bit, to one process within derived tolerances, and as large as predicted."""
import copy
import gc
import itertools
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

from nbs_lib import collectives
from nbs_lib.course.scaling import OURS
from nbs_lib.ddp import DDP, Bucket, MiB, assign, kernels_of, measured, scaling, shard_batch, trained
from nbs_lib.gpt import GPT, GPTConfig, batches, text
from nbs_lib.memory import rounded, train_memory
from nbs_lib.records import Record, overlapped, spans

KiB = 1024
LLAMA = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
             max_position_embeddings=64, attn_implementation="eager")
GPT2 = dict(n_layer=2, n_head=4, n_embd=128, vocab_size=256, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0,
            eos_token_id=0, attn_implementation="eager")


# --- what ranks run

def build(kind, seed=0):
    torch.manual_seed(seed)
    if kind in ("gpt2", "llama", "llama tied"):
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        if kind == "gpt2":
            return GPT2LMHeadModel(GPT2Config(**GPT2))
        return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=kind == "llama tied"))
    model = GPT(GPTConfig(layers=2, heads=4, hidden=64, vocab=256, context=32, attention="plain"))
    if kind == "bf16":
        model.bfloat16()
    if kind == "mixed":
        for name, m in model.named_modules():
            if isinstance(m, nn.Linear) and name != "head":
                m.register_forward_pre_hook(lambda m, x: x[0].bfloat16())
                m.register_forward_hook(lambda m, x, y: y.float())
                m.bfloat16()
    if kind == "frozen":
        for name, p in model.named_parameters():
            p.requires_grad_("norm" not in name and "blocks.0" not in name)
    return model


def loss_of(model, ids):
    """The mean loss, by logits: in the model's own precision."""
    out = model(ids)
    logits = getattr(out, "logits", out)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def data(batch=4, seed=0):
    """Endless batches of this rank."""
    for ids, _ in batches(text(), batch*dist.get_world_size(), seq=32, seed=seed):
        yield shard_batch(ids, dist.get_rank(), dist.get_world_size())


def grads(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def equal(xs, ys):
    return len(xs) == len(ys) > 0 and all(torch.equal(x, y) for x, y in zip(xs, ys))


def flat(model):
    return torch.cat([g.double().flatten() for g in grads(model)])


def race(kind, steps=3, cap=None, rebuild=True, micro=1, clear="none"):
    """Train PyTorch's and ours side by side. Per step whether gradients and weights were equal; then the buckets of both."""
    model = build(kind, seed=dist.get_rank())            # other weights on each rank: both must broadcast
    theirs = TorchDDP(copy.deepcopy(model), bucket_cap_mb=cap and cap/MiB)
    ours = DDP(model, **({} if cap is None else dict(bucket_bytes=cap, first_bytes=cap)), rebuild=rebuild)
    pair, stream, found = (theirs, ours), data(), []
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, foreach=m is ours) for m in pair]
    for _ in range(steps):
        mine = list(itertools.islice(stream, micro))
        for m, o in zip(pair, optimizers):
            with m.no_sync():
                for ids in mine[:-1]:
                    (loss_of(m, ids)/micro).backward()
            loss = loss_of(m, mine[-1])/micro
            if clear == "late":
                o.zero_grad()
            loss.backward()
        same = equal(grads(theirs), grads(ours))
        inside = {b.flat.untyped_storage().data_ptr() for b in ours.reducer.buckets}
        views = all(g.untyped_storage().data_ptr() in inside for g in grads(ours))
        for o in optimizers:
            o.step()
            if clear != "late":
                o.zero_grad(set_to_none=clear == "none")
        found.append((same, views, equal(list(theirs.parameters()), list(ours.parameters()))))
    log = theirs._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices")
    return found, log, [b.indices for b in ours.reducer.buckets], [p.detach() for p in ours.parameters()]


def own_gradients(kind="gpt", seed=0):
    """This rank's own gradients, ours with equal and with other buckets, and PyTorch's, after the buckets are rebuilt."""
    cap, stream = 100*KiB, data(seed=seed)
    models = [build(kind), DDP(build(kind), cap, cap), DDP(build(kind), 30*KiB, 10*KiB, rebuild=False),
              TorchDDP(build(kind), bucket_cap_mb=cap/MiB)]
    for ids in itertools.islice(stream, 2):
        for m in models:
            m.zero_grad()
            loss_of(m, ids).backward()
    return [flat(m).float() for m in models]


def against_one_process(kind):
    """Relative gaps of DDP's gradient to one process's on the whole batch, in fp32 and fp64, and e: one process's fp32 from its fp64."""
    whole, _ = next(batches(text(), 8, seq=32))
    mine, found = shard_batch(whole, dist.get_rank(), dist.get_world_size()), {}
    for dtype in (torch.float32, torch.float64):
        one, ours = build(kind).to(dtype), DDP(build(kind).to(dtype), 100*KiB, 20*KiB)
        loss_of(one, whole).backward()
        loss_of(ours, mine).backward()
        found[dtype] = flat(one), flat(ours)
    gap = lambda a, b: float((a - b).norm()/b.norm())  # noqa: E731
    return gap(*found[torch.float32]), gap(*found[torch.float64]), gap(found[torch.float32][0], found[torch.float64][0])


class Counting:
    """torch's all-reduce, which counts bytes and calls."""

    def __init__(self):
        self.sizes = []

    def __call__(self, t):
        self.sizes.append(t.nbytes)
        return dist.all_reduce(t, async_op=True)


def storages(tensors):
    """Bytes of the storages behind tensors, each once: as they are, and in the allocator's blocks of 512."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values()), sum(map(rounded, found.values()))


def sizes_of(kind):
    """Bytes of live tensors on this rank, and of each all-reduce of the last step."""
    counting = Counting()
    ours = DDP(build(kind), 200*KiB, 100*KiB, all_reduce=counting)
    optimizer = torch.optim.AdamW(ours.parameters())
    for ids in itertools.islice(data(), 3):
        counting.sizes = []
        loss_of(ours, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    states = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    return {"weights": storages(ours.parameters()), "gradients": storages(grads(ours)), "optimizer": storages(states),
            "buckets": storages([b.flat for b in ours.reducer.buckets])}, counting.sizes


def synced(quiet):
    """Bytes that four micro-batches send; and whether gradients were this rank's own before the last one."""
    counting, reference = Counting(), build("gpt")
    ours = DDP(build("gpt"), 100*KiB, 100*KiB, rebuild=False, all_reduce=counting)
    mine = list(itertools.islice(data(), 4))
    for ids in mine[:3]:
        if quiet:
            with ours.no_sync():
                loss_of(ours, ids).backward()
        else:
            loss_of(ours, ids).backward()
        loss_of(reference, ids).backward()
    own = equal(grads(ours), grads(reference))
    loss_of(ours, mine[3]).backward()
    return len(counting.sizes), sum(counting.sizes), own


class Branches(nn.Module):
    """Two layers; rank `rare` does not use the second one."""

    def __init__(self, rare):
        super().__init__()
        self.first, self.second, self.rare = nn.Linear(4, 4), nn.Linear(4, 4), rare

    def forward(self, x):
        x = self.first(x)
        return x if self.rare in (None, dist.get_rank()) else self.second(x)


def said(call):
    try:
        call()
    except Exception as e:
        return type(e).__name__, str(e)
    return None


def unused(rare):
    """What DDP says when a layer gets no gradient: on rank `rare`, or (None) on all."""
    ours = DDP(Branches(rare), 1, 1, rebuild=False)
    message = said(lambda: ours(torch.ones(2, 4)).sum().backward())
    if rare == dist.get_rank():                          # the other rank waits: answer its two all-reduces for that layer, and those behind
        for b in ours.reducer.buckets:
            dist.all_reduce(b.flat)
    ours.module.rare = -1
    ours.zero_grad()
    ours(torch.ones(2, 4)).sum().backward()              # and it goes on, once all parameters are used
    return message, [float(g.sum()) for g in grads(ours)]


def recorded():
    """A record of three steps, and the buckets' bytes in the first and in the last."""
    record = Record(device="cpu")
    ours = DDP(build("gpt"), 100*KiB, 50*KiB, record=record)
    first, starts = [b.nbytes for b in ours.reducer.buckets], []
    for ids in itertools.islice(data(), 3):
        starts.append(len(record.events))
        loss_of(ours, ids).backward()
        ours.zero_grad()
    return record, starts, first, [b.nbytes for b in ours.reducer.buckets]


def odds_and_ends():
    """Smaller promises, by name."""
    rank, found = dist.get_rank(), {}
    ids = next(data())
    # buffers are broadcast, too
    model = nn.BatchNorm1d(3)
    model.running_mean.fill_(rank + 1)
    found["buffers"] = DDP(model).module.running_mean.tolist() == [1, 1, 1]
    # strides of a transposed weight
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ours = DDP(conv)
    ours(torch.randn(2, 3, 8, 8)).sum().backward()
    found["strides"] = conv.weight.grad.stride() == conv.weight.stride() != torch.empty(4, 3, 3, 3).stride()
    # what a gradient held before DDP is kept and added to, as without it
    plain, kept = build("gpt"), build("gpt")
    for m in (plain, kept):
        loss_of(m, ids).backward()
    ours = DDP(kept)
    loss_of(ours, ids).backward()
    mean = [p.grad.clone() for p in plain.parameters()]
    for g in mean:
        dist.all_reduce(g.div_(2))
    found["kept"] = all(torch.allclose(a, 2*b, atol=1e-6) for a, b in zip(grads(ours), mean))
    # dropped, it leaves neither hooks nor buckets behind
    model = build("gpt")
    ours = DDP(model)
    loss_of(ours, ids).backward()
    reducer, bucket = weakref.ref(ours.reducer), weakref.ref(ours.reducer.buckets[0])
    model.zero_grad()
    del ours
    gc.collect()
    found["gone"] = reducer() is None and bucket() is None and not any(p._post_accumulate_grad_hooks for p in model.parameters())
    # without gradients nothing happens
    ours = DDP(build("gpt"))
    with torch.no_grad():
        ours(ids)
    found["no_grad"] = all(p.grad is None for p in ours.parameters())
    # the course's own ring
    a, b = DDP(build("gpt"), all_reduce=collectives.all_reduce), DDP(build("gpt"))
    with collectives.Wire() as wire:
        loss_of(a, ids).backward()
    loss_of(b, ids).backward()
    nbytes = sum(x.nbytes for x in a.reducer.buckets)
    found["ring"] = equal(grads(a), grads(b)) and wire.bytes == collectives.bytes_sent("all_reduce", nbytes, 2, rank, 4)
    return found


def refusals():
    from torch.utils.checkpoint import checkpoint

    rank = dist.get_rank()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=True)
            return x

    ours, reentrant = DDP(build("gpt")), DDP(Twice())
    loss = loss_of(ours, next(data()))
    loss.backward(retain_graph=True)
    return {"again": said(loss.backward), "models": said(lambda: DDP(nn.Linear(2 + rank, 2))), "frozen": said(lambda: DDP(nn.Linear(2, 2).requires_grad_(False))),
            "dtypes": said(lambda: DDP(nn.Linear(2, 2).to([torch.float32, torch.bfloat16][rank]))),
            "twice": said(lambda: reentrant(torch.ones(1, 4, requires_grad=True)).sum().backward())}


def in_groups():
    """Ranks 0 and 1, and 2 and 3, each a world of their own: gradients, and those of the ranks one by one."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    ids = next(data())
    ours, alone = DDP(build("gpt", seed=dist.get_rank()//2*2), group=groups[dist.get_rank()//2]), build("gpt", seed=dist.get_rank()//2*2)
    loss_of(ours, ids).backward()
    loss_of(alone, ids).backward()
    return flat(ours).float(), flat(alone).float()


# --- on two ranks

CASES = {
    "gpt, tied": dict(kind="gpt"), "small buckets": dict(kind="gpt", cap=60*KiB), "buckets of one tensor": dict(kind="gpt", cap=1),
    "never rebuilt": dict(kind="gpt", cap=60*KiB, rebuild=False), "GPT-2": dict(kind="gpt2", cap=200*KiB), "Llama": dict(kind="llama", cap=200*KiB),
    "Llama, tied": dict(kind="llama tied"), "bf16": dict(kind="bf16", cap=60*KiB), "fp32 and bf16": dict(kind="mixed", cap=60*KiB),
    "frozen": dict(kind="frozen", cap=60*KiB), "accumulated": dict(kind="gpt", micro=3, cap=60*KiB),
    "gradients set to zero": dict(kind="gpt", clear="zero"), "accumulated, set to zero": dict(kind="llama", micro=2, clear="zero"),
    "zero_grad after forward": dict(kind="gpt", clear="late"),
}


@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit_as_torch(two, case):
    answers = two.run(race, **CASES[case])
    for found, log, buckets, _ in answers:
        assert found == [(True, True, True)]*3           # gradients equal, in the buckets, and the weights after the step
        if CASES[case].get("rebuild", True) and case != "fp32 and bf16":
            assert log == ", ".join(" ".join(map(str, b)) for b in buckets)
    assert equal(answers[0][3], answers[1][3])           # and the ranks are equal


@pytest.mark.parametrize("kind, config", [("llama", LLAMA), ("gpt2", GPT2)])
def test_memory_and_bytes_as_predicted(two, kind, config):
    from transformers import GPT2Config, LlamaConfig

    c = (LlamaConfig if kind == "llama" else GPT2Config)(**config)
    m = train_memory(c, batch=4, seq=32, precision="fp32", strategy="ddp", world_size=2).by_phase["step"]
    for found, sent in two.run(sizes_of, kind):
        exact = {k: n[0] for k, n in found.items()}
        P = exact["weights"]
        assert exact == {"weights": P, "gradients": P, "buckets": P, "optimizer": 2*P} and sum(sent) == P
        buffers = m["weights"] - found["weights"][1]
        assert 0 <= buffers <= 2*512                     # rotary frequencies
        assert m["gradients"] == found["weights"][1] and m["optimizer"] == found["optimizer"][1]
        assert abs(m["buckets"] - exact["buckets"]) <= 512*40      # a block for each gradient there, a flat one here


def test_no_sync_sends_once(two):
    quiet, loud = two.run(synced, True), two.run(synced, False)
    for a, b in zip(quiet, loud):
        assert a[0]*4 == b[0] and a[1]*4 == b[1]
        assert a[2] and not b[2]                         # own sums until the last micro-batch


def test_unused_parameters(two):
    for (message, after), rank in zip(two.run(unused, None), range(2)):
        kind, words = message
        assert kind == "RuntimeError" and f"2 parameters got no gradient on rank {rank}: second.weight, second.bias." in words
        assert all(after)
    here, there = two.run(unused, 1)
    assert here[0] is None and "on rank 1: second.weight, second.bias" in there[0][1]
    assert here[1] == there[1]


def test_record(two):
    for record, starts, first, last in two.run(recorded):
        P = sum(first)
        assert len(first) == 1 and len(last) > 2 and sum(last) == P
        assert record.held() == {"parameters": P, "gradients": P} and record.peak_total == 2*P       # also while they are rebuilt
        assert record.bytes_sent == {"all_reduce": 3*P}  # 2(N − 1)/N of P on two ranks, three times
        labels = [e.label for e in record.events[starts[2]:] if e.what in ("begin", "end", "mark")]
        n = len(last)
        assert labels[:5] == ["forward", "forward", "end of forward", "backward", "backward to bucket 0"]
        assert [x for x in labels if x.startswith("all_reduce")] == [f"all_reduce bucket {k}" for k in range(n)]
        for k in range(n - 1):                           # the first bucket is on its way while the next one is filled
            assert labels.index(f"all_reduce bucket {k}") < labels.index(f"end of backward to bucket {k + 1}") < labels.index(f"end of all_reduce bucket {k}")


def test_smaller_promises(two):
    for found in two.run(odds_and_ends):
        assert all(found.values()), found


def test_refusals_on_ranks(two):
    for found in two.run(refusals):
        assert found["models"][0] == found["dtypes"][0] == found["frozen"][0] == "ValueError"
        assert "not the same on all ranks: rank 1 trains 2" in found["models"][1] and "nothing to reduce" in found["frozen"][1]
        for what, name in (("twice", "layer."), ("again", "norm.weight")):
            kind, words = found[what]
            assert kind == "RuntimeError" and name in words and "use_reentrant=False" in words and "second backward pass" in words


# --- on four ranks

def test_four_ranks(four):
    own, same, other, theirs = zip(*four.run(own_gradients))
    assert all(torch.equal(s, theirs[0]) for s in (*same, *theirs))                  # the same buckets: the same order of addition
    scaled = [g/4 for g in own]
    bound = 2*collectives.sum_bound(scaled)
    assert ((other[0].double() - theirs[0].double()).abs() <= bound).all()
    assert (other[0] != theirs[0]).any()                 # another order does make a difference, or the bound would be idle
    true = torch.stack([g.double() for g in scaled]).sum(0)
    assert ((theirs[0].double() - true).abs() <= bound/2).all()


@pytest.mark.parametrize("kind, ranks", [("llama", "two"), ("gpt", "four")])
def test_one_process_on_the_whole_batch(request, kind, ranks):
    for single, double, e in request.getfixturevalue(ranks).run(against_one_process, kind):
        assert 1e-8 < e < 1e-5
        assert single < 4*e and double < 4*e/2**29


def test_groups(four):
    ours, alone = zip(*four.run(in_groups))
    assert torch.equal(ours[0], alone[0]/2 + alone[1]/2) and torch.equal(ours[2], alone[2]/2 + alone[3]/2)
    assert torch.equal(ours[0], ours[1]) and not torch.equal(ours[0], ours[2])


# --- without ranks

@pytest.mark.parametrize("call, words", [
    (lambda: DDP(nn.Linear(2, 2)), "no process group"), (lambda: DDP(nn.Linear(2, 2), bucket_bytes=0), "bucket_bytes is 0"),
    (lambda: DDP(nn.Linear(2, 2), first_bytes=1.5), "first_bytes is 1.5"), (lambda: DDP(nn.ReLU()), "no parameter that needs a gradient"),
    (lambda: DDP("model"), "module is a str"), (lambda: trained(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))), "on cpu and meta"),
    (lambda: trained(nn.EmbeddingBag(2, 2, sparse=True)), "sparse"), (lambda: shard_batch(torch.ones(7), 0, 2), "7 rows; accepted is a multiple of world_size, 2"),
    (lambda: shard_batch(torch.tensor(1.0), 0, 1), "0 rows"), (lambda: shard_batch(torch.ones(4), -1, 2), "rank is -1"),
    (lambda: shard_batch(torch.ones(4), 0, 2.0), "world_size is 2.0")])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_shards_are_the_batch():
    x = torch.arange(24).view(8, 3)
    assert torch.equal(torch.cat([shard_batch(x, r, 4) for r in range(4)]), x)
    assert shard_batch(x, 1, 4).data_ptr() == x[2:].data_ptr()


def test_assignment_closes_buckets_as_torch():
    assert assign([10, 10, 10, 10], "aaaa", [10, 25]) == [[0], [1, 2, 3]]
    assert assign([10, 1, 10, 10], "abaa", [15, 1]) == [[0, 2], [3], [1]]            # each kind has its own limits
    assert assign([99], "a", [1]) == [[0]] and assign([], "", [1]) == []
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        n = int(torch.randint(1, 30, (), generator=generator))
        tensors = [torch.empty(int(k), dtype=[torch.float32, torch.float16][int(k) % 2]) for k in torch.randint(1, 99, (n,), generator=generator)]
        limits = [int(x) for x in torch.randint(1, 500, (2,), generator=generator)]
        ours = assign([t.nbytes for t in tensors], [t.dtype for t in tensors], limits)
        assert sorted(ours, key=min) == dist._compute_bucket_assignment_by_size(tensors, limits)[0]


def test_a_bucket_is_its_views():
    shapes = [torch.zeros(3, 4), torch.zeros(()), torch.zeros(4, 3).t()]
    b = Bucket.of(shapes, [2, 0, 1])
    assert b.nbytes == 4*25 and [v.shape for v in b.views] == [(3, 4), (3, 4), ()] and b.views[0].stride() == (1, 3)
    for k, v in enumerate(b.views):
        v.fill_(k + 1)
    assert b.flat.tolist() == [1]*12 + [2]*12 + [3]


# --- what was measured on H100s (the stored file; nothing is timed here)

def test_stored_steps_keep_up_with_torchs():
    rows = {key: r for key, r in measured().items() if key[1] == "ddp"}
    assert {(m, n) for m, _, n in rows} == {(m, n) for m in ("124m", "1.3b") for n in (2, 4)}
    for (model, _, n), r in rows.items():
        theirs = measured()[model, "torch ddp", n]
        assert r["twin"] > 0.97 and abs(r["peak"]/theirs["peak"] - 1) < 0.01
        assert r["losses"][0] == theirs["losses"][0]
        assert all(abs(a/b - 1) < 1e-3 for a, b in zip(r["losses"], theirs["losses"]))
        assert 0.85 < r["linear"] < 1


def test_stored_strong_scaling_divides_one_gpus_batch():
    """The same models, half of one GPU's batch on each of two; what was predicted stands beside it, and the kernels' time in place of the kernels."""
    weak, strong = measured(), measured(strong=True)
    assert {key for key in strong} == {key for key in weak if key[2] <= 2}
    for (model, way, n), r in strong.items():
        assert r["batch"]*n == weak[model, "single", 1]["batch"] and len(r["rounds"]) == 2 and "spans" not in r and 0 < r["computing"]
        assert ("told" in r) == (n == 2) and 0.4 < r["linear"] <= 1 and ("twin" in r) == (way in OURS)
        if n == 2:
            assert r["peak"] < weak[model, way, n]["peak"] and 0.6 < r["told"] < 0.9
    again = {r["way"]: r for r in scaling(strong=True)["again"]}
    assert set(again) == {way for m, way, n in strong if m == "124m" and n == 2} and all(len(r["rounds"]) == 2 for r in again.values())


def test_stored_kernels_overlap():
    row = measured()["1.3b", "ddp", 2]
    record = kernels_of(row)
    assert {s.name for s in spans(record)} == {"kernels", "all_reduce"} and overlapped(record) > 0.9
    assert len(spans(record)) == sum(not name.startswith("nccl:") for *_, name in row["spans"])
    with pytest.raises(ValueError, match="'torch ddp', has no spans"):
        kernels_of(measured()["1.3b", "torch ddp", 2])
