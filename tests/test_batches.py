"""Samplers, batches, schedules and seeds, against torch's, accelerate's and transformers' own, on two real ranks where ranks matter."""
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st

from nbs_lib.batches import (IGNORED, ShardedSampler, apart, deal, draw_shards, global_batch, per_rank_batch, scaled_lr, schedule_position,
                             seeded, step_gradients, stride, token_weights, updates_apart)
from nbs_lib.gpt import GPT, GPTConfig


@pytest.fixture(scope="module")
def world():
    from nbs_lib.course.world import World

    with World(2, backend="gloo") as world:
        yield world


# --- what runs on the ranks -------------------------------------------------------------------------------------------------------

def accelerator(accumulation=1, step_with_optimizer=True, **loader):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DataLoaderConfiguration

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Accelerator(cpu=True, gradient_accumulation_steps=accumulation, step_scheduler_with_optimizer=step_with_optimizer,
                       dataloader_config=DataLoaderConfiguration(**loader))


def loaders(cases):
    """For each (n, batch size, drop_last, options): the batches that accelerate's prepared loader gives this rank."""
    from torch.utils.data import DataLoader

    return [[x.tolist() for x in accelerator(**options).prepare(DataLoader(range(n), b, drop_last=drop))] for n, b, drop, options in cases]


def schedules(cases, n=40, batch=4):
    """For each (calls, split_batches, accumulation, with_optimizer): a real schedule's position and rate after each call, and the loader's length."""
    from torch.utils.data import DataLoader

    answers = []
    for calls, split, accumulation, coupled in cases:
        a = accelerator(accumulation, coupled, split_batches=split)
        net = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k/1000)
        net, optimizer, loader, schedule = a.prepare(net, optimizer, DataLoader(torch.ones(n, 1), batch), schedule)
        stood = []
        while len(stood) < calls:
            for x in loader:
                with a.accumulate(net):
                    a.backward(net(x).mean()*1e-6)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                stood.append((schedule.scheduler.last_epoch, schedule.get_last_lr()[0]))
        answers.append((stood[:calls], len(loader)))
    return answers


def small(dtype=torch.float64):
    torch.manual_seed(0)
    return GPT(GPTConfig(layers=2, heads=2, hidden=32, vocab=64, context=16)).to(dtype)


def tokens(lengths):
    """(ids, targets), (b, 16): sample i has lengths[i] counted targets."""
    ids = torch.randint(64, (len(lengths), 17), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    for i, n in enumerate(lengths):
        targets[i, n:] = IGNORED
    return ids[:, :-1], targets


def parts(lengths, accumulation):
    """This rank's micro-batches."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    b = per_rank_batch(len(lengths), ranks, accumulation)
    ids, targets = (x.chunk(ranks)[rank] for x in tokens(lengths))
    return list(zip(ids.split(b), targets.split(b)))


def ours(lengths, accumulation, by, dtype=torch.float64):
    return step_gradients(small(dtype), parts(lengths, accumulation), by)


def trainers(lengths, accumulation):
    """As transformers' Trainer does it, under torch's DDP: its loss function, num_items_in_batch of all ranks, times their number."""
    from contextlib import nullcontext

    from torch.nn.parallel import DistributedDataParallel
    from transformers.loss.loss_utils import ForCausalLMLoss

    batches, ranks = parts(lengths, accumulation), dist.get_world_size()
    model = DistributedDataParallel(small())
    items = sum((t != IGNORED).sum() for _, t in batches)
    dist.all_reduce(items)
    for i, (ids, targets) in enumerate(batches):
        with nullcontext() if i == len(batches) - 1 else model.no_sync():
            logits = model(ids)
            loss = ForCausalLMLoss(_Keeps(logits), None, 64, num_items_in_batch=items, shift_labels=targets)
            (loss*ranks).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}


class _Keeps:
    """Logits that stay in fp64 when the loss asks for floats, so that the comparison is not about fp32."""

    def __init__(self, logits):
        self.logits = logits

    def float(self):
        return self.logits


def resumed(seedable):
    """Whether a new process's loader goes on as the first would have, after 3 steps of epoch 1; and without being told the epoch."""
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader

    def loader():
        torch.manual_seed(0)
        return accelerator(use_seedable_sampler=seedable, data_seed=0).prepare(DataLoader(range(24), 2, shuffle=True))

    def all_of(x): return [b.tolist() for b in x]

    first = loader()
    epochs = [all_of(first), all_of(first)]
    told = loader()
    told.set_epoch(1)
    rest = all_of(skip_first_batches(told, 3))
    return rest == epochs[1][3:], all_of(skip_first_batches(loader(), 3)) == epochs[1][3:], all_of(told) == epochs[1]


def metrics(n, batch):
    """(means, counts) of gather and of gather_for_metrics over n squares."""
    from torch.utils.data import DataLoader

    a = accelerator()
    gathered, kept = [], []
    for x in a.prepare(DataLoader(torch.arange(float(n))**2, batch)):
        gathered.append(a.gather(x))
        kept.append(a.gather_for_metrics(x))
    return [(float(x.mean()), len(x), x.tolist()) for x in (torch.cat(gathered), torch.cat(kept))]


def random_numbers(seed):
    """This rank's first weight and next random number, built with seeded(); and what set_seed(device_specific=True) draws."""
    from accelerate.utils import set_seed

    accelerator()
    model = seeded(lambda: torch.nn.Linear(4, 4), seed, dist.get_rank())
    drawn = torch.rand(3)
    set_seed(seed, device_specific=True)
    return model.weight.detach(), drawn, torch.rand(3)


def raises(lengths, how):
    try:
        step_gradients(small(), [] if how == "none" else parts(lengths, 1), how if how == "sum" else "tokens")
    except ValueError as e:
        return str(e)


# --- who gets which sample --------------------------------------------------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 60), N=st.integers(1, 9), drop=st.booleans(), shuffle=st.booleans(), seed=st.integers(0, 5), epochs=st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_the_sampler_is_torchs(n, N, drop, shuffle, seed, epochs):
    from torch.utils.data.distributed import DistributedSampler

    mine = [ShardedSampler(n, N, r, shuffle, seed, drop) for r in range(N)]
    theirs = [DistributedSampler(range(n), N, r, shuffle, seed, drop) for r in range(N)]
    for epoch in epochs:
        for a, b in zip(mine, theirs):
            a.set_epoch(epoch)
            b.set_epoch(epoch)
            assert list(a) == list(b) == list(a) and len(a) == len(b)
        if not drop:
            assert {i for s in mine for i in s} == set(range(n))


@settings(deadline=None)
@given(n=st.integers(1, 40), N=st.integers(1, 4), drop=st.booleans(), start=st.integers(0, 45), epoch=st.integers(0, 3))
def test_the_sampler_goes_on_within_an_epoch(n, N, drop, start, epoch):
    for r in range(N):
        s = ShardedSampler(n, N, r, seed=3, drop_last=drop)
        s.set_epoch(epoch)
        whole = list(s)
        s.set_epoch(epoch, start)
        assert list(s) == whole[start:] and len(s) == len(whole[start:])
        s.set_epoch(epoch)
        assert list(s) == whole


@settings(max_examples=300, deadline=None)
@given(n=st.integers(0, 50), N=st.integers(1, 6), per_rank=st.integers(1, 5), split=st.booleans(), even=st.booleans(), drop=st.booleans(), seed=st.integers(0, 3))
def test_dealt_as_accelerate_does(n, N, per_rank, split, even, drop, seed):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    b = per_rank*N if split else per_rank
    theirs = [list(BatchSamplerShard(BatchSampler(order, b, drop), N, r, split, even)) for r in range(N)]
    assert deal(order, b, N, split, even, drop) == theirs


def test_prepared_loaders_on_real_ranks(world):
    cases = [(n, 4 if split else 2, drop, dict(split_batches=split, even_batches=even))
             for n in (1, 3, 8, 11, 12) for split in (False, True) for even in (True, False) for drop in (True, False)]
    real = world.run(loaders, cases)
    for i, (n, b, drop, options) in enumerate(cases):
        assert [real[r][i] for r in range(2)] == deal(range(n), b, 2, drop_last=drop, **options), cases[i]


def test_full_steps_hold_the_same_samples_either_way():
    for N, b in ((2, 2), (4, 3)):
        n = 5*N*b
        ways = stride(n, b, N), deal(range(n), b, N), deal(range(n), b*N, N, split_batches=True)
        for t in range(5):
            assert len({frozenset(i for mine in way for i in mine[t]) for way in ways}) == 1


def test_the_picture_marks_what_comes_again():
    picture = draw_shards({"accelerate": deal(range(5), 2, 2)}, "Five samples on two ranks, in two steps, with three samples again.").svg
    assert picture.count("font: 700") + picture.count("font-weight: 700") + picture.count("bold") == 3
    assert draw_shards({"torch": stride(4, 2, 2)}, "Four samples on two ranks in one step.").svg.count("700") == 0


@pytest.mark.parametrize("n, batch", [(9, 2), (8, 2), (7, 3), (1, 2)])
def test_an_average_over_repeated_samples(world, n, batch):
    scores = [float(i**2) for i in range(n)]
    extra = [scores[i % n] for i in range(-n % (2*batch))]
    for (mean, count, _), (right, kept, values) in world.run(metrics, n, batch):
        assert count == n + len(extra) and math.isclose(mean, sum(scores + extra)/count, rel_tol=1e-6)
        assert kept == n and values == scores and math.isclose(right, sum(scores)/n, rel_tol=1e-6)


# --- the batch --------------------------------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(b=st.integers(1, 64), N=st.integers(1, 16), a=st.integers(1, 8))
def test_the_parts_of_a_batch(b, N, a):
    assert per_rank_batch(global_batch(b, N, a), N, a) == b
    if N*a > 1:
        with pytest.raises(ValueError, match=f"batch is {b*N*a + 1}, world_size {N}, accumulation {a}; .* {N*a} divides, such as {b*N*a} or {(b + 1)*N*a}"):
            per_rank_batch(b*N*a + 1, N, a)


def close(mine, reference, tokens):
    """Within 2√tokens eps, the chapter's tolerance."""
    return apart(mine, reference) < 2*tokens**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_ranks_are_one_larger_batch(world, dtype, accumulation):
    lengths = [16]*16
    reference = step_gradients(small(dtype), [tokens(lengths)])
    for by in ("tokens", "batches"):
        for mine in world.run(ours, lengths, accumulation, by, dtype):
            assert close(mine, reference, sum(lengths)), apart(mine, reference)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_by_tokens_where_lengths_differ(world, accumulation):
    lengths = [16, 15, 9, 16, 4, 4, 1, 2]
    right = step_gradients(small(), [tokens(lengths)])
    by_tokens, theirs = world.run(ours, lengths, accumulation, "tokens"), world.run(trainers, lengths, accumulation)
    for mine, other in zip(by_tokens, theirs):
        assert close(mine, right, sum(lengths)) and close(other, right, sum(lengths))
    # the mean of means is another gradient: the one with the predicted weights
    b = per_rank_batch(8, 2, accumulation)
    counts = [sum(lengths[i:i + b]) for i in range(0, 8, b)]
    means = [step_gradients(small(), [(i, t)]) for i, t in zip(*(x.split(b) for x in tokens(lengths)))]
    predicted = {k: sum(w*n*g[k] for w, n, g in zip(token_weights(counts), counts, means))/sum(counts) for k in right}
    for mine in world.run(ours, lengths, accumulation, "batches"):
        assert close(mine, predicted, sum(lengths)) and apart(mine, right)*torch.finfo(torch.float64).eps > 0.1


def test_a_rank_without_targets(world):
    lengths = [16, 16, 0, 0]
    right = step_gradients(small(), [tokens(lengths)])
    for mine in world.run(ours, lengths, 1, "tokens"):
        assert close(mine, right, sum(lengths))
    for mine in world.run(ours, lengths, 1, "batches"):                # the mean over no token has no gradient, but is averaged in
        assert close(mine, {k: g/2 for k, g in right.items()}, sum(lengths))


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8))
def test_token_weights_average_to_one_over_tokens(counts):
    assert math.isclose(sum(w*n for w, n in zip(token_weights(counts), counts)), sum(counts))
    assert all(w == 1 for w in token_weights([7]*len(counts)))


def test_the_scaling_rule_is_of_first_order():
    gaps = [updates_apart(small, *tokens([16]*8), lr=lr, k=2) for lr in (1e-3, 2e-3, 4e-3)]
    assert all(1.9 < b/a < 2.1 for a, b in zip(gaps, gaps[1:]))
    assert scaled_lr(0.1, batch=1024, reference=256) == pytest.approx(0.4)


# --- the schedule -----------------------------------------------------------------------------------------------------------------

def test_the_schedule_stands_where_predicted(world):
    cases = [(23, split, accumulation, coupled) for split in (False, True) for accumulation in (1, 2, 3, 7) for coupled in (True, False)]
    for answers in world.run(schedules, cases):
        for (calls, split, accumulation, coupled), (stood, length) in zip(cases, answers):
            assert length == (10 if split else 5)
            predicted = [schedule_position(k + 1, 2, split, accumulation, coupled, epoch=length) for k in range(calls)]
            assert [k for k, _ in stood] == predicted
            assert all(math.isclose(rate, 1 - k/1000) for k, rate in stood)


def test_after_k_steps_it_is_where_one_process_is_after_2k():
    for k in range(12):
        assert schedule_position(k, world_size=2) == schedule_position(2*k)
        assert schedule_position(k, world_size=8, split_batches=True) == k
    assert schedule_position(7, 4, accumulation=2) == 12 and schedule_position(7, 4, accumulation=2, with_optimizer=False) == 7


# --- seeds, and going on ----------------------------------------------------------------------------------------------------------

def test_equal_weights_and_different_masks(world):
    (w0, r0, a0), (w1, r1, a1) = world.run(random_numbers, 5)
    assert torch.equal(w0, w1) and not torch.equal(r0, r1)
    assert torch.equal(r0, a0) and torch.equal(r1, a1)


def test_skipping_batches(world):
    assert world.run(resumed, True) == [(True, False, True)]*2      # right when told the epoch; not otherwise; and the loader itself stays there
    assert [right for right, *_ in world.run(resumed, False)] == [False, False]


# --- bad input --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, words", [
    (lambda: ShardedSampler(0, 2, 0), "n is 0; accepted is a whole number from 1"),
    (lambda: ShardedSampler(8, 0, 0), "world_size is 0"),
    (lambda: ShardedSampler(8, 2, -1), "rank is -1; accepted are 0 to 1"),
    (lambda: ShardedSampler(8, 2, 1).set_epoch(0, -2), "start is -2"),
    (lambda: deal(range(8), 3, 2, split_batches=True), "batch_size is 3 with split_batches; accepted is a multiple of world_size, 2"),
    (lambda: deal(range(8), 0, 2), "batch_size is 0"),
    (lambda: global_batch(2, 2.0), "world_size is 2.0"),
    (lambda: per_rank_batch(2, 3), "such as 3[.]"),
    (lambda: token_weights([3, 0]), r"tokens is \[3, 0\]"),
    (lambda: token_weights([]), r"tokens is \[\]"),
    (lambda: schedule_position(-1), "calls is -1"),
    (lambda: schedule_position(4, epoch=0), "epoch is 0"),
    (lambda: scaled_lr(0.1, 0, 8), "batch is 0"),
    (lambda: updates_apart(small, *tokens([16]*4), lr=0.1, k=3), "batch is 4, world_size 3"),
])
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("how, words", [("none", "micro_batches is empty"), ("tokens", "no rank has a counted target"), ("sum", "by is 'sum'; accepted are 'tokens' and 'batches'")])
def test_bad_steps_are_refused_on_every_rank(world, how, words):
    assert all(words in said for said in world.run(raises, [0]*4, how))
