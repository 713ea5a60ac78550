"""The verdict: right on every measured step, those that ran out of memory too, and honest about what was never measured."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbs_lib.allocator import Allocator, Full
from nbs_lib.memory import capacity, measurements, replayed, train_memory
from nbs_lib.verdict import doubts, like, memory_errors, score, verdict


def test_right_on_every_measured_step():
    counted = score()
    assert counted["wrong"] == 0 and counted["too close to call"] <= 0.1*sum(counted.values()) and counted["right"] > 200


def test_the_replay_names_the_step_and_the_phase_in_which_memory_ends():
    """On one GPU: the settings that ran out of memory on the H100, one of them by fragmentation at 90% of the capacity."""
    rows, fragmented = measurements(out_of_memory=True), 0
    for r in rows:
        m = train_memory(**r["settings"])
        room = capacity(m.settings.gpu)
        assert replayed(m.settings, room).full == (r["oom"]["step"], r["oom"]["at"]), r["name"]
        fragmented += m.peak_any < 0.95*room
    assert len(rows) >= 6 and fragmented >= 1


def test_too_close_to_call_is_narrow():
    """Batches of GPT-2 around the capacity of a card: few are left open, and the answers are in order."""
    order = {"fits": 0, "too close to call": 1, "out of memory": 2}
    for card in ("h100-sxm", "l4"):
        found = [verdict(train_memory("gpt2", batch, 1024, gpu=card)) for batch in range(1, 140)]
        open_ = [v for v in found if v.answer == "too close to call"]
        assert len(open_) <= 4 and all(v.peak > 0.85*v.room for v in open_)
        assert [order[v.answer] for v in found] == sorted(order[v.answer] for v in found)
        assert {v.answer for v in found} >= {"fits", "out of memory"}


@given(st.lists(st.integers(1, 50*2**20), min_size=1, max_size=60), st.integers(21*2**20, 400*2**20))
@settings(max_examples=60, deadline=None)
def test_an_allocator_never_exceeds_its_capacity(sizes, room):
    a, held = Allocator(room), []
    for i, n in enumerate(sizes):
        try: held.append(a.allocate(n))
        except Full:
            assert a.reserved + n > room - 20*2**20 or n > room - a.allocated       # nothing unused was left to give back
            for b in held: a.release(b)
            held = []
        if i % 3 == 2 and held: a.release(held.pop(0))
        assert a.allocated <= a.reserved <= room
    for b in held: a.release(b)
    a.return_unused()
    assert a.allocated == a.reserved == 0 and not a.blocks


def test_doubts_name_what_was_never_measured():
    assert doubts(train_memory("llama-3-8b", 1, 2048).settings) == ()
    words = " ".join(doubts(train_memory("mixtral-8x7b", 1, 2048, strategy="zero3", world_size=16, optimizer="adamw_8bit", gpu="l4").settings))
    for word in ("L4", "mixtral", "three layers", "adamw_8bit", "4 GPUs", "8.2B"): assert word in words


@pytest.mark.parametrize("asked", [dict(model="llama-3-8b", batch=1, seq=2048), dict(model="gpt2", batch=1, seq=128, strategy="ddp", world_size=2)])
def test_trust_comes_from_rows_that_are_like_it(asked):
    c = train_memory(**asked).settings
    rows = like(c)
    assert len(rows) >= 3 and {r["settings"].get("world_size", 1) for r in rows} == {c.world_size}
    median, worst = memory_errors(rows)
    assert 0 <= median <= worst < 3


def test_the_readme_says_what_the_data_say():
    """Every number in its paragraph on accuracy, computed from the rows."""
    import re
    import statistics

    from conftest import ROOT
    from nbs_lib.memory import predict_row
    from nbs_lib.roofline import train_time

    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = [r for r in measurements() if r["kind"] == "train" and r["group"] != "small"]
    one, two = ([r for r in rows if (r["settings"].get("world_size", 1) > 1) == several] for several in (False, True))
    e, f = (sorted(abs(predict_row(r, quick=True)["allocated"]) for r in found) for found in (one, two))
    timed = [abs(100*(train_time(**r["settings"]).seconds/r["seconds"] - 1)) for r in rows if "seconds" in r]
    held = sum(r["group"] == "held out" for r in one)
    assert f"On {len(one)} measured training steps of full-size models on one H100 ({held} of them" in text
    assert f"by {statistics.median(e):.2f}% in the median, by at most {e[int(0.95*len(e))]:.2f}% on 95 of 100 and by {e[-1]:.1f}% at worst" in text
    assert f"on {len(two)} steps on two and four H100s under DDP, FSDP2 and ZeRO by {statistics.median(f):.2f}% in the median and {f[-1]:.1f}% at worst" in text
    assert {"seven": 7}[re.search(r"(\w+) that ran out of memory included", text)[1]] == len(measurements(out_of_memory=True))
    assert f"Step time is off by {statistics.median(timed):.0f}% in the median on {len(timed)} steps" in text
    misses = {off: max(x for x, r in zip(timed, [r for r in rows if "seconds" in r]) if bool(r["settings"]["offload"]) == off) for off in (False, True)}
    assert f"where the host decides, by up to {misses[False]:.0f}%, and the one offloaded step by {misses[True]:.0f}%" in text
