"""Collectives from sends: equal to torch.distributed's, bytes counted on real ranks, the model's arithmetic, what is refused."""
from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nbs_lib import collectives as c
from nbs_lib.course.processes import environment
from nbs_lib.course.world import RankError, World

RANKS = 4
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.int32, torch.int8, torch.uint8)
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
GROUPS: dict[tuple[int, ...], dist.ProcessGroup] = {}


@pytest.fixture(scope="module")
def world():
    with World(RANKS, backend="gloo") as w:
        w.run(make_groups)
        yield w


# --- on the ranks -------------------------------------------------------------------------------------------------------------------

def make_groups() -> None:
    """Subgroups of every size; a rank keeps them from one call to the next."""
    for members in ((0,), (0, 1), (2, 3), (1, 2, 3), (0, 1, 2, 3)):
        GROUPS[members] = dist.new_group(list(members))


def data(seed: int, shape: tuple[int, ...], dtype: torch.dtype, ranks: int) -> list[torch.Tensor]:
    """Every rank's tensor: random values of many sizes, the same on all ranks."""
    g = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return [torch.randint(-2**31, 2**31, shape, generator=g).to(dtype) for _ in range(ranks)]
    return [(torch.randn(shape, generator=g, dtype=torch.float64)*2.0**torch.randint(-6, 6, shape, generator=g)).to(dtype) for _ in range(ranks)]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but any NaN equals any other."""
    if not a.is_floating_point():
        return a.dtype == b.dtype and torch.equal(a, b)
    bits = BITS[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def compare(xs: list[torch.Tensor], members: tuple[int, ...]) -> dict | None:
    """All collectives on xs[i] for the i-th member, against torch's and against sums in order on one process; bytes counted."""
    if dist.get_rank() not in members:
        return None
    group, me, N = GROUPS[members], members.index(dist.get_rank()), len(members)
    x, part = xs[me], c.chunks(xs[me].numel(), N)[me]
    wires = {op: c.Wire() for op in c.OPS}
    out = {"sent": {}, "expected": {}}
    with wires["all_reduce"]:
        reduced = c.all_reduce(x.clone(), group=group)
    with wires["reduce_scatter"]:
        scattered = c.reduce_scatter(x.clone(), group=group)
    own = torch.zeros_like(x)
    own.view(-1)[part] = x.reshape(-1)[part]
    with wires["all_gather"]:
        gathered = c.all_gather(own, group=group)
    with wires["broadcast"]:
        from_0 = c.broadcast(x.clone(), group=group)
    with wires["pipelined_broadcast"]:
        piped = c.pipelined_broadcast(x.clone(), 3, group=group)
    with wires["tree_all_reduce"]:
        tree = c.tree_all_reduce(x.clone(), group=group)
    last = c.broadcast(x.clone(), N - 1, group), c.pipelined_broadcast(x.clone(), 2, N - 1, group)
    theirs = x.clone()
    if x.numel():
        dist.all_reduce(theirs, group=group)
    ring = c.ring_sum(xs)
    out |= {"order": same(reduced, ring), "scattered": same(scattered, ring.view(-1)[part]),
            "gathered": same(gathered, torch.cat([y.reshape(-1)[s] for y, s in zip(xs, c.chunks(x.numel(), N))]).view(x.shape)),
            "broadcast": same(from_0, xs[0]) and same(piped, xs[0]) and all(same(y, xs[-1]) for y in last), "theirs": same(reduced, theirs)}
    if x.is_floating_point():
        two = 2*c.sum_bound(xs)*(1 + 2**-40)  # the bound and the difference are themselves rounded, to 53 bits
        out["within"] = all(bool(((y.double() - theirs.double()).abs() <= two).all()) for y in (reduced, tree))
        out["finite"] = bool(theirs.isfinite().all())
    for op, wire in wires.items():
        out["sent"][op], out["expected"][op] = wire.bytes, c.bytes_sent(op, x.nbytes, N, me, x.element_size())
    return out


def compare_seed(seed: int, shape: tuple[int, ...], dtype: torch.dtype, members: tuple[int, ...]) -> dict | None:
    return compare(data(seed, shape, dtype, len(members)), members)


def gloos_order(n: int, seed: int) -> tuple[bool, bool]:
    """Whether torch's all_reduce has the bits of sums in the order of gloo's allreduce.cc, and of this chapter's ring."""
    N, xs = dist.get_world_size(), data(seed, (n,), torch.float32, dist.get_world_size())
    theirs = xs[dist.get_rank()].clone()
    dist.all_reduce(theirs)
    segments = -(-max(-(-4*n//2**20), 2*N)//N)*N  # of 1 MiB at most, at least two a rank
    size = math.ceil(math.ceil(4*n/segments)/4)  # numbers in a segment
    expected = torch.empty(n)
    for part in range(N):
        s = slice(min(n, part*size*segments//N), min(n, (part + 1)*size*segments//N))
        total = xs[(part - 1) % N][s]
        for k in range(2, N + 1):
            total = xs[(part - k) % N][s] + total
        expected[s] = total
    return same(theirs, expected), same(theirs, c.ring_sum(xs))


def refused(what: str) -> str:
    """The message of the ValueError that a wrong call raises, on this rank alone: nothing is sent."""
    x = torch.zeros(4, 6)
    calls = {
        "not a tensor": lambda: c.all_reduce([1.0]),
        "strides": lambda: c.all_reduce(x.t()),
        "device": lambda: c.broadcast(torch.zeros(3, device="meta")),
        "max": lambda: c.all_reduce(x, dist.ReduceOp.MAX),
        "mean": lambda: c.reduce_scatter(x, "mean"),
        "bool": lambda: c.tree_all_reduce(x > 0),
        "float8": lambda: c.all_reduce(x.to(torch.float8_e4m3fn)),
        "source": lambda: c.broadcast(x, source=RANKS),
        "negative source": lambda: c.pipelined_broadcast(x, 2, source=-1),
        "pieces": lambda: c.pipelined_broadcast(x, 0),
        "group": lambda: c.all_gather(x, GROUPS[0, 1] if dist.get_rank() > 1 else GROUPS[2, 3]),
        "sizes": lambda: c.measure_ours([5]),
        "too small": lambda: c.measure_ours([RANKS*2 - 2]),
        "ops": lambda: c.measure_ours([64], ["broadcast"]),
        "alike": lambda: c.alike(torch.zeros(2 + dist.get_rank() % 2)),
    }
    try:
        calls[what]()
    except ValueError as e:
        return str(e)
    return "accepted"


def odd_tensors() -> list[bool]:
    """Any dtype travels; shapes, gradients and slices of storages are kept."""
    rank, ok = dist.get_rank(), []
    for x in (torch.arange(7) % 2 == rank % 2, torch.full((5,), rank + 1.0).to(torch.float8_e4m3fn), torch.full((3, 2), 1 + 1j*rank),
              torch.tensor(float(rank)), torch.full((3,), rank, dtype=torch.uint16), torch.empty(0, 4)):
        whole, before = x.clone(), x.shape
        c.broadcast(whole, 2)
        theirs = x.contiguous().view(-1).view(torch.uint8).clone()
        if x.numel():
            dist.broadcast(theirs, 2)
        ok.append(whole.shape == before and torch.equal(whole.view(-1).view(torch.uint8), theirs))
    z = torch.full((5,), rank + 1j)
    ok.append(torch.equal(c.all_reduce(z), torch.full((5,), 6 + 4j)) and z[0].item() == 6 + 4j)
    storage = torch.zeros(11)
    storage[3:9] = rank
    c.all_reduce(storage[3:9])
    ok.append(storage.tolist() == [0]*3 + [6]*6 + [0]*2)  # in place, and nothing beside it
    p = torch.nn.Parameter(torch.ones(3))
    ok.append(c.all_reduce(p) is p and p.requires_grad and p.grad_fn is None and p.tolist() == [4]*3)
    with c.Wire() as outer, c.Wire(look=lambda: None) as inner:
        c.all_gather(torch.zeros(8, dtype=torch.uint8))
    ok.append((outer.bytes, outer.messages, len(inner.seen)) == (6, 3, 4) and c._wires == [])
    return ok


# --- equal to torch.distributed's ---------------------------------------------------------------------------------------------------

def check(found: list[dict | None], floating: bool) -> None:
    here = [f for f in found if f]
    for f in here:
        assert f["order"] and f["scattered"] and f["gathered"] and f["broadcast"]
        assert f["sent"] == f["expected"]
        if len(here) <= 2 or not floating:
            assert f["theirs"], "one addition, or exact ones: the same bits"
        if floating and f["finite"]:
            assert f["within"]


GROUP = st.sampled_from([(0,), (0, 1), (2, 3), (1, 2, 3), (0, 1, 2, 3)])
SHAPE = st.one_of(st.integers(0, 13).map(lambda n: (n,)), st.tuples(st.integers(1, 5), st.integers(1, 70)), st.integers(1000, 5000).map(lambda n: (n,)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), shape=SHAPE, dtype=st.sampled_from(FLOATS + WHOLE), members=GROUP)
def test_equal_on_random_tensors(world, seed, shape, dtype, members):
    check(world.run(compare_seed, seed, shape, dtype, members), dtype.is_floating_point)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.floats(width=32), min_size=n, max_size=n), min_size=RANKS, max_size=RANKS)),
       pair=st.booleans())
def test_equal_on_any_float(world, rows, pair):
    """Infinities, NaN, −0, subnormals, cancellation."""
    members = (2, 3) if pair else (0, 1, 2, 3)
    check(world.run(compare, [torch.tensor(r, dtype=torch.float32) for r in rows[:len(members)]], members), True)


def test_four_ranks_add_in_another_order(world):
    """Four ranks: not torch's bits, so the comparison with the bound is needed."""
    found = world.run(compare_seed, 5, (5000,), torch.float32, (0, 1, 2, 3))
    assert not any(f["theirs"] for f in found) and all(f["within"] and f["order"] for f in found)


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="the order was read and seen for torch 2.13's gloo")
def test_gloos_order(world):
    for n in (1, 3, 8, 10, 63, 4097, 600_001):
        found = world.run(gloos_order, n, n)
        assert all(theirs for theirs, _ in found)
    assert not any(ours for _, ours in found)


def test_any_dtype_in_place(world):
    for found in world.run(odd_tensors):
        assert all(found), found


# --- bad input ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("what, words", [
    ("not a tensor", "x is [1.0]; accepted is a tensor"), ("strides", "strides (1, 6); accepted are contiguous"), ("device", "x is on meta; accepted are cpu tensors"),
    ("max", "accepted is 'sum'"), ("mean", "op is 'mean'"), ("bool", "dtype torch.bool; accepted for sums are float64"), ("float8", "float8_e4m3fn"),
    ("source", "source is 4; accepted are the group's ranks, 0 to 3"), ("negative source", "source is -1"), ("pieces", "pieces is 0"),
    ("group", "group does not contain this rank"), ("sizes", "sizes has 5"), ("too small", f"2 bytes, {RANKS*2} or more"), ("ops", "ops has 'broadcast'"), ("alike", "rank 0 has (2,) of float32, rank 1 has (3,) of float32")])
def test_refused(world, what, words):
    for said in world.run(refused, what):
        assert words in said


@pytest.mark.parametrize("call, words", [
    (lambda: c.bytes_sent("gather", 8, 2), "op is 'gather'; accepted are broadcast"), (lambda: c.bytes_sent("all_reduce", -1, 2), "nbytes is -1"),
    (lambda: c.bytes_sent("all_reduce", 8.0, 2), "nbytes is 8.0"), (lambda: c.bytes_sent("all_reduce", 8, 0), "ranks is 0"),
    (lambda: c.bytes_sent("all_reduce", 8, 2, rank=2), "rank is 2; accepted are 0 to 1"), (lambda: c.bytes_sent("all_reduce", 9, 2, itemsize=4), "itemsize is 4"),
    (lambda: c.collective_seconds("all_reduce", 8, 2, 0.0, 1e9), "latency is 0.0"), (lambda: c.collective_seconds("all_reduce", 8, 2, 1e-6, math.inf), "bandwidth is inf"),
    (lambda: c.collective_seconds("pipelined_broadcast", 8, 2, 1e-6, 1e9, pieces=-1), "pieces is -1"), (lambda: c.crossover(0, 1e-6, 1e9), "ranks is 0"),
    (lambda: c.chunks(-1, 2), "n is -1"), (lambda: c.measured_link("all_reduce", [[8, 1e-6]], 2), "rows has 1 rows"),
    (lambda: c.measured_link("all_reduce", [[8, 1e-6], [16, 1e-6]], 2), "rows has 2 rows"), (lambda: c.sum_bound([torch.ones(2, dtype=torch.int64)]), "torch.int64")])
def test_refused_in_arithmetic(call, words):
    with pytest.raises(ValueError) as e:
        call()
    assert words in str(e.value)


def uneven() -> None:
    c.all_reduce(torch.ones(8 + dist.get_rank()))


def test_sizes_that_differ_do_not_hang():
    """gloo aborts the rank that gets more than it waits for, as the chapter says; `alike` would have said it in a sentence."""
    with pytest.raises(RankError, match="data size doesn't match"), World(2, backend="gloo") as w:
        w.run(uneven)


def test_torchrun_times_it(tmp_path):
    """The benchmark's own command, on two CPU ranks: a row for each operation and size, with provenance and a check; no time is asserted."""
    out = tmp_path / "rows.jsonl"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nbs_lib.collectives", "--largest", "14", "--out", out],
                          env={**environment(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["op"], row["bytes"]) for row in rows] == [(op, n) for n in (2**12, 2**14) for op in c.RING]
    assert all(row["off"] == 0 and row["ours"] > 0 and row["torch's"] > 0 and row["backend"] == "gloo" and row["ranks"] == 2 for row in rows)
    assert all({"device", "torch", "date", "command", "dtype"} <= set(row) for row in rows)


# --- arithmetic ---------------------------------------------------------------------------------------------------------------------

@given(n=st.integers(0, 10**6), ranks=st.integers(1, 40))
def test_bytes_of_all_ranks(n, ranks):
    """All together: (N − 1) n for each half of a ring and for a broadcast, whatever the remainder; nobody sends more than the rest and a number."""
    for op, times in (("reduce_scatter", 1), ("all_gather", 1), ("all_reduce", 2), ("broadcast", 1), ("pipelined_broadcast", 1), ("tree_all_reduce", 2)):
        each = [c.bytes_sent(op, n, ranks, r) for r in range(ranks)]
        assert sum(each) == times*(ranks - 1)*n and c.bytes_sent(op, n, ranks) == max(each)
        if n % ranks == 0 and op in ("reduce_scatter", "all_gather", "all_reduce"):
            assert set(each) == {times*(ranks - 1)*n//ranks}


@given(n=st.integers(0, 10**6), ranks=st.integers(1, 40))
def test_chunks(n, ranks):
    parts = c.chunks(n, ranks)
    sizes = [len(range(n)[s]) for s in parts]
    assert [i for s in parts for i in (s.start, s.stop)] == sorted(i for s in parts for i in (s.start, s.stop))
    assert sum(sizes) == n and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@given(ranks=st.integers(4, 300), latency=st.floats(1e-7, 1e-3), bandwidth=st.floats(1e8, 1e12))
def test_crossover_lies_between(ranks, latency, bandwidth):
    n = c.crossover(ranks, latency, bandwidth)
    for factor, first in ((0.5, "tree_all_reduce"), (2, "all_reduce")):
        size = math.ceil(factor*n/ranks)*ranks  # so that all parts are of one size
        times = {op: c.collective_seconds(op, size, ranks, latency, bandwidth) for op in ("tree_all_reduce", "all_reduce")}
        if (size < n) == (first == "tree_all_reduce"):
            assert min(times, key=times.get) == first


@given(n=st.integers(10**3, 10**8), ranks=st.integers(3, 600), latency=st.floats(1e-6, 1e-4))
def test_best_pieces_are_best(n, ranks, latency):
    """No other number of pieces takes less by the formula but for roundings of floats."""
    best = c.best_pieces(n, ranks, latency, 1e11)

    def seconds(p): return (ranks - 2 + p)*(latency + n/p/1e11)
    assert all(seconds(best) <= (1 + 1e-12)*seconds(p) for p in {max(1, best//2), max(1, best - 1), best + 1, 2*best} if p <= n)


def test_model_by_hand():
    a, b = 1e-5, 1e9
    assert c.collective_seconds("all_reduce", 8_000_000, 4, a, b) == pytest.approx(6*a + 12e-3)
    assert c.collective_seconds("reduce_scatter", 8_000_000, 4, a, b) == pytest.approx(3*a + 6e-3)
    assert c.collective_seconds("broadcast", 8_000_000, 5, a, b) == pytest.approx(3*(a + 8e-3))
    assert c.collective_seconds("tree_all_reduce", 8_000_000, 4, a, b) == pytest.approx(4*(a + 8e-3))
    assert c.collective_seconds("pipelined_broadcast", 8_000_000, 4, a, b, pieces=8) == pytest.approx(10*(a + 1e-3))
    assert all(c.collective_seconds(op, 100, 1, a, b) == 0 for op in c.OPS)
    assert c.crossover(2, a, b) == c.crossover(1, a, b) == 0


@given(latency=st.floats(1e-6, 1e-4), bandwidth=st.floats(1e9, 1e12), ranks=st.integers(2, 16), op=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]))
def test_link_is_found_again(latency, bandwidth, ranks, op):
    """From times that the model made, its own latency and bandwidth."""
    rows = [[n, c.collective_seconds(op, n, ranks, latency, bandwidth)] for n in (4096, 2**20, 2**34)]
    assert c.measured_link(op, rows, ranks) == pytest.approx((latency, bandwidth), rel=1e-6)


def test_bound_can_be_reached_and_not_left():
    """1 + u + u + u in the worst order loses almost all that the bound allows; the check that uses it is not slack."""
    u = 2.0**-24
    xs = [torch.tensor([v]) for v in (1.0, u, u, u)]
    worst = ((xs[0] + xs[1]) + xs[2]) + xs[3]
    loss = abs(worst.item() - (1 + 3*u))
    assert 0.9*c.sum_bound(xs).item() < loss <= c.sum_bound(xs).item()


def test_stored_rows_of_two_gpus():
    """The rings are NCCL's equal to the bit, and near it in time where bytes rule; not where calls do. Nothing is timed here."""
    rows = [json.loads(line) for line in (files("nbs_lib")/"data"/"collectives_h100.jsonl").read_text().splitlines()]
    assert {(r["op"], r["bytes"]) for r in rows} == {(op, 2**k) for op in c.RING for k in range(12, 31, 2)} and len(rows) == 30
    assert all(r["off"] == 0 and r["ranks"] == 2 and r["dtype"] == "bfloat16" for r in rows)
    for op in c.RING:
        found = sorted((r["bytes"], r["ours"], r["torch's"]) for r in rows if r["op"] == op)
        slower = [ours/theirs for _, ours, theirs in found]
        assert min(slower[:5]) > 3 and slower[-1] < 1.2 and slower[5:] == sorted(slower[5:], reverse=True)
        own = c.measured_link(op, [[n, ours] for n, ours, _ in found], 2)
        off = sorted(abs(c.collective_seconds(op, n, 2, *own)/ours - 1) for n, ours, _ in found)
        assert off[5] < 0.07 and off[-2] < 0.14 and off[-1] < 0.31     # the worst is 64 MiB, between the two regimes
