"""Records: what a rank may write down, what can be read out of it, and the pictures drawn from it."""
from __future__ import annotations

import builtins
import json
import pickle
import re
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nbs_lib.records import (KINDS, LANES, Event, Record, Span, _names, _rows, begins, find, holdings, holdings_strip, one_step,
                             overlapped, sentence, spans, step_through, timeline, together, union)

UNITS = ("block 0", "block 1", "root")
QUICK = settings(max_examples=60, deadline=None)
actions = st.lists(st.one_of(
    st.tuples(st.just("hold"), st.sampled_from(KINDS), st.sampled_from(UNITS), st.integers(0, 10**12)),
    st.tuples(st.just("free"), st.sampled_from(KINDS), st.sampled_from(UNITS), st.just(0)),
    st.tuples(st.just("sent"), st.just(""), st.sampled_from(("all_reduce", "all_gather")), st.integers(0, 10**12)),
    st.tuples(st.just("mark"), st.just(""), st.sampled_from(("forward", "backward", "step")), st.just(0)),
    st.tuples(st.just("begin"), st.sampled_from(LANES), st.sampled_from(UNITS), st.just(0)),
    st.tuples(st.just("end"), st.just(""), st.just(""), st.integers(0, 5))), max_size=40)


def keep(plan, rank: int = 0) -> tuple[Record, dict, list[dict]]:
    """A record of a plan; what a plain dictionary says is held at the end; and bytes by kind after each event."""
    record, held, course = Record(rank, "cpu"), {}, []
    for what, kind, name, n in plan:
        before = len(record.events)
        try:
            if what == "hold": record.hold(kind, name, n)
            elif what == "free": record.free(kind, name)
            elif what == "sent": record.sent(name, n)
            elif what == "mark": record.mark(name)
            elif what == "begin": record.begin(kind, name)
            else: record.end(n)
        except ValueError as e:
            # only what cannot be true is refused, with a reason that names it, and leaves nothing behind
            assert (what == "hold") == ((kind, name) in held) and what in ("hold", "free", "end")
            assert (name in str(e) and kind in str(e)) or what == "end" and f"span {n} " in str(e)
            assert len(record.events) == before
            continue
        if what == "hold": held[kind, name] = n
        if what == "free": del held[kind, name]
        course.append({k: sum(b for (kind, _), b in held.items() if kind == k)
                       for k in KINDS if any(kind == k for kind, _ in held)})
    return record, held, course


@QUICK
@given(actions)
def test_what_is_held_is_what_was_held_less_what_was_freed(plan):
    record, held, course = keep(plan)
    assert [c for _, c in record.course()] == course
    assert record.held() == (course[-1] if course else {})
    assert all(n >= 0 for moment in course for n in moment.values())
    flow = sum(e.nbytes*{"hold": 1, "free": -1}.get(e.what, 0) for e in record.events)
    assert flow == sum(record.held().values()) == sum(held.values())
    assert all((key in record) == (key in held) for key in [(k, u) for k in KINDS for u in UNITS])
    assert record.peak() == {k: top for k in KINDS if (top := max((c.get(k, 0) for c in course), default=0))}
    assert record.peak_total == max((sum(c.values()) for c in course), default=0) <= sum(record.peak().values())
    assert sum(record.bytes_sent.values()) == sum(e.nbytes for e in record.events if e.what == "sent")
    assert [record.held(i) for i in range(len(course))] == course
    with pytest.raises(ValueError, match=f"moment is {len(course)}; this record has {len(course)} events"):
        record.held(len(course))


@QUICK
@given(actions, st.integers(0, 7))
def test_a_record_survives_json_and_pickle_and_goes_on(plan, rank):
    record, held, _ = keep(plan, rank)
    for again in (Record.from_dict(json.loads(json.dumps(record.to_dict()))), pickle.loads(pickle.dumps(record))):
        assert (again.rank, again.events) == (rank, record.events) and again.held() == record.held()
        for kind, name in held: again.free(kind, name)
        assert not again.held()
        again.end(again.begin("compute", "more"))
        assert again.events[-1].time >= record.events[-1].time if record.events else True
        assert len(spans(again)) == len(spans(record)) + 1


def test_times_do_not_go_back():
    times = [e.time for e in keep([("mark", "", "forward", 0)]*50)[0].events]
    assert times == sorted(times) and times[0] >= 0


@pytest.mark.parametrize("events, words", [
    ([[0, "hold", "parameters", "a", 4, 4, -1]]*2, "rank 3 holds parameters of 'a' already"),
    ([[0, "free", "buckets", "a", 4, 4, -1]], "rank 3 does not hold buckets of 'a'"),
    ([[0, "end", "compute", "a", 0, 0, 0]], "span 0 ('a') of rank 3 is not open"),
    ([[0, "lend", "compute", "a", 0, 0, 0]], "what is 'lend'; accepted are hold, free, begin"),
    ([[0, "hold", "parameters", "a", 5, 4, -1]], "accepted is at most the whole, 4"),
    ([[0, "sent", "", "a", 0.5, 0, -1]], "nbytes is 0.5 for 'a'; accepted is a whole number")])
def test_data_that_cannot_be_true_is_refused(events, words):
    with pytest.raises(ValueError, match=re.escape(words)): Record.from_dict({"rank": 3, "events": events})


# --- spans ---

def of_spans(lanes: dict[str, list[tuple[float, float]]], rank: int = 0) -> Record:
    """A record whose spans lie at these times."""
    told = [(t, n, what, lane) for n, (lane, (a, b)) in enumerate((l, x) for l, xs in lanes.items() for x in xs)
            for t, what in ((a, "begin"), (b, "end"))]
    told.sort(key=lambda x: (x[0], x[2] != "begin"))
    return Record.from_dict({"rank": rank, "events": [[t, what, lane, f"forward block {n}", 0, 0, n] for t, n, what, lane in told]})


stretches = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda x: (x[0], x[0] + x[1])), max_size=8)


@settings(max_examples=200, deadline=None)
@given(stretches, stretches)
def test_overlap_equals_counting_each_second(compute, communication):
    busy = [{t for a, b in lane for t in range(a, b)} for lane in (compute, communication)]
    record = of_spans({"compute": compute, "communication": communication})
    if not busy[1]:
        with pytest.raises(ValueError, match="rank 0 has no time in communication"): overlapped(record)
    else: assert overlapped(record) == pytest.approx(len(busy[0] & busy[1])/len(busy[1]))
    joined = union(compute)
    assert {t for a, b in joined for t in range(a, b)} == busy[0]
    assert all(b < c for (_, b), (c, _) in zip(joined, joined[1:]))


@pytest.mark.parametrize("compute, communication, share", [
    ([(0, 10)], [(2, 4)], 1), ([(0, 3)], [(2, 6)], .25), ([(0, 2)], [(2, 4)], 0), ([(0, 1), (3, 4)], [(0, 4)], .5),
    ([(0, 4), (1, 3)], [(0, 4), (2, 8)], .5)])
def test_overlap_by_hand(compute, communication, share):
    assert overlapped(of_spans({"compute": compute, "communication": communication})) == share


@QUICK
@given(actions)
def test_the_order_clock_keeps_the_order(plan):
    record, *_ = keep(plan)
    ticks, seconds = spans(record, "events"), spans(record)
    assert sorted(s.name for s in ticks) == sorted(s.name for s in seconds)
    assert all(s.end >= s.start + 1 for s in ticks)
    steps = [e for e in record.events if e.what in ("begin", "end")]
    place = {(e.what, e.span): i for i, e in enumerate(steps)}
    both = sorted((place["begin", e.span], place["end", e.span]) for e in steps if e.what == "begin" and ("end", e.span) in place)
    for (a, b), s in zip(both, ticks):                   # sorted alike: begins in order
        for (c, d), t in zip(both, ticks):
            if b < c: assert s.end <= t.start            # one after the other stays so
            if a < c < b: assert t.start < s.end         # and what overlaps, overlaps


@QUICK
@given(stretches)
def test_no_span_lies_on_another(lane):
    found = sorted((Span("compute", "x", a, b) for a, b in lane), key=lambda s: s.start)
    rows = _rows(found)
    assert sorted((s for row in rows for s in row), key=lambda s: s.start) == found
    assert all(a.end <= b.start for row in rows for a, b in zip(row, row[1:]))
    crowd = max((sum(a <= t < b for a, b in lane) for t in range(80)), default=0)
    assert len(rows) == crowd or any(a == b for a, b in lane)


def test_a_name_is_written_only_where_it_fits():
    long, short = Span("compute", "forward block 10", 0, 20), Span("compute", "forward block 11", 20, 22)
    assert _names([long], 10) == {long: "forward block 10"}
    assert _names([long, short], 2) == {long: "forward 10", short: "forward 11"}
    assert _names([long, short], 2.5) == {long: "block 10", short: "block 11"}
    assert _names([long, short], 5) == {long: "10", short: "11"}
    assert _names([long, short], 10) == {long: "10"}
    bucket = Span("compute", "backward to bucket 3", 0, 2)
    assert _names([bucket], 8) == {bucket: "3"}


class Clock:
    """A GPU's clock for the test: an event takes its time from it, in milliseconds."""
    now, synchronised = 0.0, 0

    def __init__(self, enable_timing=False): assert enable_timing
    def record(self): self.at = Clock.now
    def elapsed_time(self, other):
        assert Clock.synchronised > 1                    # once at the start, and before anything is read
        return other.at - self.at


def test_spans_of_a_gpu_are_timed_by_its_events(monkeypatch):
    def synchronize(): Clock.synchronised += 1
    Clock.now, Clock.synchronised = 100.0, 0
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(Event=Clock, synchronize=synchronize, is_initialized=lambda: True))
    record = Record()                                    # this process has used CUDA, so it asks for its events
    a = record.begin("compute", "forward")
    b = record.begin("communication", "all_reduce")
    Clock.now = 107.0
    record.end(a)
    Clock.now = 121.0
    record.end(b)
    record.mark("step")
    host = record.events[-1].time
    assert [(s.start, s.end) for s in spans(record)] == [(0, .007), (0, .021)] and overlapped(record) == pytest.approx(1/3)
    assert record.events[-1].time == host                # what is no span stays on the host's clock
    assert pickle.loads(pickle.dumps(record)).events == record.events
    assert Clock.synchronised == 2                       # nothing new to wait for
    assert not Record(device="cpu")._waiting


# --- moments ---

def sharded(rank: int, ranks: int, blocks: int = 3, steps: int = 1) -> Record:
    """A sharded step as its strategy would write it down."""
    r, whole = Record(rank, "cpu"), 1200*ranks
    for b in range(blocks): r.hold("parameters", f"block {b}", 1200, whole)
    for _ in range(steps):
        for phase, order in (("forward", range(blocks)), ("backward", reversed(range(blocks)))):
            r.mark(phase)
            for b in order:
                with r.span("communication", f"all_gather block {b}"): r.hold("gathered", f"block {b}", whole)
                r.sent("all_gather", 1200*(ranks - 1))
                with r.span("compute", f"{phase} block {b}"): pass
                r.free("gathered", f"block {b}")
                if phase == "backward": r.hold("gradients", f"block {b}", 1200, whole)
        r.mark("step")
        with r.span("compute", "step"): pass
        for b in range(blocks): r.free("gradients", f"block {b}")
    return r


def test_a_step_of_many_is_like_the_only_one():
    one, many = sharded(1, 2), sharded(1, 2, steps=3)
    for number in (0, 1, 2, -1):
        cut = one_step(many, number)
        assert [e.label for e in cut.events] == [e.label for e in one.events] and cut.course() == one.course()
        assert cut.bytes_sent == one.bytes_sent and cut.rank == 1 and begins(cut) == 3
        assert len(spans(cut)) == len(spans(one)) and all(s.start >= 0 for s in spans(cut))
    for wrong in (3, -4):
        with pytest.raises(ValueError, match=f"number is {wrong}; the record of rank 1 has 3 steps"): one_step(many, wrong)


def test_steps_of_several_micro_batches_and_of_none_marked():
    def marked(*phases):
        r = Record(0, "cpu")
        for p in phases: r.mark(p)
        return [len(one_step(r, n).events) for n in range(2)]
    assert marked(*("forward", "backward", "forward", "backward", "step")*2) == [5, 5]
    assert marked("forward", "backward", "forward", "backward") == [2, 2]


def test_a_span_cut_by_the_step_is_left_out():
    r = Record(0, "cpu")
    r.mark("forward")
    late = r.begin("communication", "all_gather block 0")
    r.mark("step")
    r.mark("forward")
    r.end(late)
    assert [e.label for e in one_step(r).events] == ["forward"] and not spans(one_step(r, 0))


def test_moments_of_ranks_that_wrote_different_things():
    a, b = sharded(0, 2), Record(1, "cpu")
    b.mark("before")                                     # a line that the other lacks, and most of the other's missing
    b.hold("parameters", "block 0", 1200, 2400)
    b.mark("forward")
    rows = together([a, b])
    assert [i for i, _ in rows] == list(range(len(a.events)))
    assert rows[0] == [0, 1] and rows[1] == [1, 1] and all(j == 2 for _, j in rows[3:])
    assert find(a, "peak") == max(range(len(a.events)), key=lambda i: sum(a.held(i).values()))
    assert find(a, "step") == find(a, find(a, "step")) and find(a, "end") == find(a, -1)
    for wrong in ("steps", 10**6, True, None):
        with pytest.raises(ValueError, match=f"moment is {wrong!r}; accepted are 'peak'.*'forward'"): find(a, wrong)
    for wrong in ([], [a, Record(0, "cpu")]):
        with pytest.raises(ValueError, match=f"records are {len(wrong)}"): together(wrong)


# --- pictures ---

def area(svg: str, colour: str) -> float:
    """The area of all boxes filled with a colour of the palette, in square points."""
    total = 0.0
    for path in re.findall(rf'<path d="([^"]*)"[^>]*style="fill: var\(--fig-{colour}, [^)]*\)', svg):
        for box in path.split("z"):
            corners = [tuple(map(float, p)) for p in re.findall(r"(-?[\d.]+) (-?[\d.]+)", box)]
            if corners: total += (max(x for x, _ in corners) - min(x for x, _ in corners))*(max(y for _, y in corners) - min(y for _, y in corners))
    return total


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_picture_shows_each_rank_its_share(ranks):
    records = [sharded(r, ranks) for r in range(ranks)]
    picture = holdings(records, "forward block 1")
    ElementTree.fromstring(picture.svg)
    # all parts of three blocks' parameters are as much as the one gathered block of every rank, three times over the ranks
    assert area(picture.svg, "c1")/3 == pytest.approx(area(picture.svg, "c4")/ranks, rel=1e-3)
    assert "c2" not in {c for c in ("c1", "c2", "c4") if area(picture.svg, c)}
    assert all(f"rank {r}: " in picture.svg for r in range(ranks)) and "KiB of gathered" in picture.alt


def test_every_picture_is_the_same_every_time_and_well_formed():
    for draw in (lambda r: holdings(r, ["forward block 0", "peak", "end"]), holdings_strip, timeline):
        first, second = (draw([sharded(r, 4) for r in range(4)]) for _ in range(2))
        assert first.svg == second.svg and len(first.svg) < 150_000
        ElementTree.fromstring(first.svg)
        assert not re.search(r"[\"' :]#(1d5fa[89]|b4500[ef]|27744[ab]|8a3f8f|8a6a00|3a7d8c|a03048|fcfbf8)[\"';]", first.svg)  # all themed


def band(svg: str, colour: str) -> float:
    """The height of a band of the strip, in points."""
    name = re.search(rf'<use [^>]*href="#([^"]+)"[^>]*style="fill: var\(--fig-{colour}, ', svg)[1]
    path = re.search(rf'<path [^>]*id="{name}"[^>]*>', svg)[0]
    heights = [float(y) for _, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", re.search(r' d="([^"]*)"', path)[1])]
    return max(heights) - min(heights)


def test_bands_are_as_high_as_the_bytes():
    r = Record(0, "cpu")
    r.hold("parameters", "model", 3000)
    r.mark("forward")
    r.mark("step")
    r.hold("optimizer", "model", 2000)
    r.mark("end")
    svg = holdings_strip([r]).svg
    assert band(svg, "c1") == pytest.approx(1.5*band(svg, "c3"), rel=1e-3)
    assert "at most 4.883 KiB" in svg and "'hold optimizer model'" in holdings_strip([r]).alt


def test_the_timeline_says_what_is_hidden_and_refuses_nothing_to_draw():
    record = of_spans({"compute": [(0, 2)], "communication": [(1, 3)]}, rank=5)
    assert "rank 5 hides 50% of its communication" in timeline([record], "seconds").alt
    assert "%" not in timeline([record]).alt
    for bad in (lambda: timeline([Record(0, "cpu")]), lambda: timeline([record], "hours")):
        with pytest.raises(ValueError, match="no spans|'hours'"): bad()
    odd = Record(0, "cpu")
    for n in range(30):
        with odd.span("communication", f"operation{n} x"): pass
    ElementTree.fromstring(timeline([odd]).svg)          # more operations than there are looks


# --- the widget ---

def test_moving_through_a_step():
    records = [sharded(r, 2) for r in range(2)]
    steps = step_through(records)
    (back, on, slider), told, picture = steps.children[0].children, *steps.children[1:]
    assert (slider.min, slider.max, slider.value) == (3, len(records[0].events) - 1, 3)
    seen = set()
    for n in range(3, 6):
        assert slider.value == n and sentence(records[0], n) in told.value and picture.value == holdings(records, n).svg
        seen.add(told.value)
        on.click()
    assert len(seen) == 3
    slider.value = slider.max
    on.click()
    assert slider.value == slider.max
    slider.value = slider.min
    back.click()
    assert slider.value == slider.min and "Forward begins on rank 0" in told.value
    data = steps._repr_mimebundle_()
    data = data[0] if isinstance(data, tuple) else data
    assert data["image/svg+xml"] == holdings(records).svg and "application/vnd.jupyter.widget-view+json" in data


def test_without_ipywidgets_a_picture_stands_there(monkeypatch):
    real = builtins.__import__
    def without(name, *rest):
        if name.split(".")[0] == "ipywidgets": raise ImportError(name)
        return real(name, *rest)
    monkeypatch.setattr(builtins, "__import__", without)
    records = [sharded(0, 2)]
    assert step_through(records).svg == holdings(records).svg


def test_sentences():
    r = sharded(0, 4, blocks=1)
    said = [sentence(r, i) for i in range(len(r.events))]
    assert said[0] == "Rank 0 holds parameters of block 0 (0.25 of it): +1.172 KiB"
    assert said[1:4] == ["Forward begins on rank 0", "Rank 0 begins all_gather block 0", "Rank 0 gathers block 0: +4.688 KiB"]
    assert "Rank 0 sends 3.516 KiB for all_gather" in said and "Rank 0 has ended forward block 0" in said
    assert "Rank 0 gives back the gathered block 0: −4.688 KiB" in said
    every = [Event(0, what, kind, "u", 1, 1) for what in ("hold", "free") for kind in KINDS]
    assert len({sentence(SimpleNamespace(rank=0, events=[e]), 0) for e in every}) == 2*len(KINDS)


# --- real ranks ---

def on_a_rank() -> Record:
    """What a rank writes down of one reduction under way while it computes."""
    record, x = Record(), torch.ones(1 << 16)
    record.mark("backward")
    record.hold("buckets", "bucket 0", x.nbytes)
    span = record.begin("communication", "all_reduce bucket 0")
    work = dist.all_reduce(x, async_op=True)
    record.sent("all_reduce", x.nbytes)
    with record.span("compute", "backward block 0"): torch.ones(64, 64) @ torch.ones(64, 64)
    work.wait()
    record.end(span)
    record.free("buckets", "bucket 0")
    assert x.eq(dist.get_world_size()).all()
    return record


def test_records_come_back_from_real_ranks():
    from nbs_lib.course.world import World

    with World(2, backend="gloo") as world: records = world.run(on_a_rank)
    assert [r.rank for r in records] == [0, 1] and all(r.bytes_sent == {"all_reduce": 1 << 18} for r in records)
    assert all(0 < overlapped(r) < 1 and overlapped(r, "events") == 1 and r.peak() == {"buckets": 1 << 18} for r in records)
    assert timeline(records).svg == timeline([Record.from_dict(r.to_dict()) for r in records]).svg


def test_importing_records_brings_neither_torch_nor_matplotlib():
    import subprocess
    code = "import sys, nbs_lib.records as r; r.Record().mark('x'); print({'torch', 'matplotlib', 'ipywidgets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
