"""Checks that run a learner's function on several ranks: what is right, what is wrong and why, and what waits for ever."""
from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402

from nbs_lib.course.lab_bench import SHARE, as_gpt2, largest, settled, small  # noqa: E402
from nbs_lib.course.lab_ranks import OnRanks, changed, close_worlds, fails, lab_world, run_in, source_of  # noqa: E402
from nbs_lib.gpt import GPT, GPTConfig  # noqa: E402
from nbs_lib.memory import train_memory  # noqa: E402


def trial(f, size):
    """Runs on each rank: the mean over ranks of a tensor that differs between them."""
    x = torch.arange(float(size)) + 10*dist.get_rank()
    return f(x)


def mean(x):
    dist.all_reduce(x)
    return x/dist.get_world_size()


def total(x):
    dist.all_reduce(x)
    return x


def local(x):
    return x


@fails("Deadlock")
def only_first(x):
    if dist.get_rank() == 0:
        dist.all_reduce(x)
    return x/dist.get_world_size()


@pytest.fixture(scope="module")
def check():
    yield OnRanks(mean, trial, [(total, "a sum, not yet a mean"), (local, "nothing was exchanged"), (only_first, "every rank must call it")],
                  "the mean", cases=((3,), (5,)))
    close_worlds()


def test_the_solution_is_accepted_and_each_slip_has_its_reason(check):
    assert check.judge(mean).ok
    verdicts = [check.judge(f) for f in check.wrong]
    assert not any(v.ok for v in verdicts)
    assert verdicts[0].message == "a sum, not yet a mean" and verdicts[1].message == "nothing was exchanged"
    assert "every rank must call it" in verdicts[2].message and "rank 0 waits in all_reduce" in verdicts[2].message and "dist.all_reduce(x)" in verdicts[2].message
    assert check.judge(mean).ok, "after a deadlock there are new ranks"


def test_other_mistakes_are_told_where_they_are(check):
    def thrice(x):
        dist.all_reduce(x)
        return 3*x/dist.get_world_size()

    def misspelt(x):
        return dist.all_reduc(x)

    def nothing(x):
        dist.all_reduce(x)

    def short(x):
        return x[:1]

    assert "each 3 times what it should be" in check.judge(thrice).message
    assert "all_reduc" in (said := check.judge(misspelt).message) and "your function:2 in misspelt" in said and "course/" not in said
    assert "is a `return` missing?" in check.judge(nothing).message
    assert "it gives 1 numbers; there should be 3" in check.judge(short).message
    for answer in (None, 3, "mean"):
        assert "no function" in check.judge(answer).message
    assert "made with def" in check.judge(lambda x: x).message
    assert "cannot be found" in check.judge(os.getpid).message


def test_a_functions_text_is_found_where_it_was_defined():
    name, text = source_of(only_first)
    assert name == "only_first" and text.startswith("def only_first(x):")


def test_slips_that_are_the_solution_but_for_a_thing_or_two():
    twice = changed(mean, ("x/dist", "2*x/dist"))
    assert source_of(twice) == ("mean", source_of(mean)[1].replace("x/dist", "2*x/dist")) and not hasattr(twice, "fails")
    assert changed(twice, ("2*x", "3*x"), mark="Deadlock").fails == "Deadlock"
    both = changed(mean, ("x/dist", "2*x/dist"), ("2*x", "3*x"))
    assert source_of(both) == source_of(changed(twice, ("2*x", "3*x"))) and "return 3*x/dist" in both.source
    with pytest.raises(ValueError, match="not in the text of mean"):
        changed(mean, ("dist.broadcast", ""))
    with pytest.raises(ValueError, match="not in the text of mean"):
        changed(mean, ("x/dist", "x*dist"), ("x/dist", "x"))
    with pytest.raises(ValueError, match="'dist.', which is 2 times in the text of mean"):
        changed(mean, ("dist.", "torch.distributed."))


def test_a_function_of_a_cell_runs_on_ranks_and_the_checks_own_functions_run_once(check):
    world = lab_world(2, "gloo")
    thrice = changed(mean, ("x/dist", "3*x/dist"))
    assert [x.tolist() for x in run_in(world, trial, thrice, 3)] == [[15.0, 18.0, 21.0]]*2
    counting, runs = OnRanks(mean, trial, [(total, "a sum"), (thrice, "three times")], "the mean", cases=((3,),), backend="gloo"), []
    world_run, world.run = world.run, lambda *a: runs.append(a) or world_run(*a)
    assert counting.judge(thrice).message == "three times" and len(runs) == 4
    assert counting.judge(thrice).message == "three times" and len(runs) == 5
    assert lab_world(2, "gloo") is world


# --- what the labs run on ------------------------------------------------------------------------------------------------------


def test_the_largest_model_that_fits_is_taken():
    sizes = (((24, 16, 1024), 8), ((12, 12, 768), 2), ((12, 12, 768), 1))
    found = [train_memory(as_gpt2(GPTConfig(*shape)), batch, 1024, "fp32", strategy="ddp", world_size=4) for shape, batch in sizes]
    gpus = lambda *free: SimpleNamespace(ranks=4, run=lambda f: list(free))  # noqa: E731
    for (shape, batch), t in zip(sizes, found):
        enough = int(t.peak_any/SHARE) + 2
        assert largest(sizes, "fp32", gpus(10*enough, enough, 10*enough)) == (GPTConfig(*shape), batch), "the GPU with least room decides"
    with pytest.raises(MemoryError, match="0.9 GiB free"):
        largest(sizes, "fp32", gpus(int(0.9*2**30)))


def test_room_for_several_models_is_for_all_that_they_hold():
    sizes, parameters = (((24, 16, 1024), 8), ((12, 12, 768), 1)), sum(p.numel() for p in bare(GPTConfig(24, 16, 1024)).parameters())
    alone = train_memory(as_gpt2(GPTConfig(24, 16, 1024)), 8, 1024, "fp32", strategy="ddp", world_size=2).peak_any
    idle = 4*parameters*(1 + 2 + 1)         # weights, AdamW's two moments, buckets
    for extra, taken in ((0.99, sizes[1]), (1.01, sizes[0])):
        world = SimpleNamespace(ranks=2, run=lambda f, extra=extra: [int((alone + 2*extra*idle)/SHARE)]*2)
        assert largest(sizes, "fp32", world, models=3) == (GPTConfig(*taken[0]), taken[1])


def bare(c):
    with torch.device("meta"):
        return GPT(c)


def test_predictions_are_for_a_model_with_the_same_parameters():
    c = GPTConfig(6, 4, 128, 1000, 64)
    assert as_gpt2(c).parameters == sum(p.numel() for p in bare(c).parameters())
    assert small(c) == GPTConfig(4, 4, 128, 1000, 64) and small(small(c)) == small(c)


def test_a_count_waits_until_it_is_at_its_least():
    counts = iter([9, 9, 4] + [5]*100)
    assert settled(lambda: next(counts)) == 4


def test_the_labs_plumbing_comes_without_torch():
    asked = "import sys, nbs_lib.course.lab_bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked]).returncode == 0
