"""jit and torch.compile: what is counted is what happens; traps are real, cures work; break-even is where the lines cross."""
from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

jax = pytest.importorskip("jax", reason="JAX is an optional extra")
pytest.importorskip("optax")

from jax import numpy as jnp  # noqa: E402

from nbs_lib import compiled  # noqa: E402
from nbs_lib.compiled import (CASES, TRAPS, WAYS, Graphs, Traces, about, after, break_even, bucket, by_name, counts,  # noqa: E402
                              equations, extra, findings, measurements, pays_after, stacked, step_rows, trapped,
                              unlike)
from nbs_lib.course import compiled_steps, measure_compiled as measure  # noqa: E402
from nbs_lib.course.compiled_steps import SIZES, Work, compared, jax_step, torch_step, wait  # noqa: E402
from nbs_lib.course.measure_compiled import CLAIMS, GPU_TRAPS, STEPS, layers_part, main, on_cost, on_rebuilding, on_speed  # noqa: E402
from nbs_lib.jax_torch import LlamaConfig  # noqa: E402

TINY = Work(LlamaConfig(layers=2, hidden=32, head_dim=8, ffn=64, context=16), 2, 16)


@pytest.fixture(scope="module", autouse=True)
def quick_compiling():
    """XLA without most of its optimizations: the same programs, compiled in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# --- counters -------------------------------------------------------------------------------------------------------------------

def test_graphs_are_those_that_dynamo_counts():
    from torch._dynamo.utils import counters

    f = Graphs(lambda x: (x*x).sum(), dynamic=False)
    counters.clear()
    for n in (3, 4, 4, 5): f(torch.ones(n))
    assert f.count == counters["stats"]["unique_graphs"] == 3


def test_traces_are_as_many_as_the_versions_that_jit_keeps():
    f = Traces(lambda x, n: x*n, static_argnames="n")
    for size, n in ((3, 2), (4, 2), (4, 2), (4, 3)): f(jnp.ones(size), n=n)
    assert f.count == f.jitted._cache_size() == 3


@settings(max_examples=5)
@given(st.lists(st.integers(2, 6), min_size=1, max_size=5))
def test_jax_traces_once_for_each_shape(lengths):
    f = Traces(lambda x: (x*x).sum())
    for n in lengths: f(jnp.ones(n))
    assert f.count == len(set(lengths))


@settings(max_examples=4)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=4))
def test_torch_compiles_at_most_twice_for_lengths_from_two(lengths):
    f = Graphs(lambda x: (x*x).sum())
    for n in lengths: f(torch.ones(n))
    assert f.count == min(2, len(set(lengths)))


# --- cases ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cases() -> list[dict]:
    """Every case, run once here."""
    return json.loads(json.dumps(compiled.cases_part()["rows"]))


def test_only_a_global_makes_a_wrong_result_and_only_in_jax(cases):
    wrong = [(r["changed"], f) for r in cases for f in ("jax", "torch") if not r[f].get("right", True)]
    assert wrong == [("a global variable: 2.0, 3.0", "jax")]


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_the_measured_machines_counted_as_this_one_does(cases, device):
    """They have other versions: torch 2.11 and 2.13, JAX 0.10 and 0.11 count alike."""
    stored = measurements(device)["cases"]["rows"]
    assert [r["changed"] for r in stored] == [c.changed for c in CASES] and unlike(stored, cases) == []


def test_unlike_names_what_differs():
    one = [{"changed": "a", "jax": 1}, {"changed": "b", "jax": 1}]
    assert unlike(one, [{"changed": "a", "jax": 2}]) == ["a"]


def test_counts_refuses_another_framework():
    with pytest.raises(ValueError, match="framework is 'tf'; accepted are jax and torch"): counts(CASES[0], "tf")


@given(st.integers(1, 10**6), st.integers(0, 6))
def test_a_bucket_holds_the_length_and_is_no_larger_than_needed(n, k):
    b = bucket(n, 2**k)
    assert b >= max(n, 2**k) and b & (b - 1) == 0 and (b == 2**k or b < 2*n)


@pytest.mark.parametrize("bad", [0, -1, 2.0, "8"])
def test_bucket_refuses_what_is_no_length(bad):
    with pytest.raises(ValueError, match="n is .*; accepted is a whole number from 1"): bucket(bad)
    with pytest.raises(ValueError, match="smallest is .*; accepted"): bucket(3, bad)


# --- traps ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trap", TRAPS, ids=lambda t: f"{t.framework}: {t.name}")
def test_a_trap_catches_and_its_cure_does_not(trap):
    r = trapped(trap)
    assert trap.says in r["line"]
    assert bool(r["raises"]) == bool(trap.says)
    assert r["cured"] != r["line"]
    assert "\n" not in r["line"]


def test_the_measured_machines_fell_into_the_same_traps():
    stored = [measurements(device)["traps"]["rows"][:len(TRAPS)] for device in ("cpu", "h100")]
    assert stored[0] == stored[1] and [(r["framework"], r["name"]) for r in stored[0]] == [(t.framework, t.name) for t in TRAPS]
    assert all(bool(r["raises"]) == bool(t.says) and t.says in r["line"] for r, t in zip(stored[0], TRAPS))


def test_traps_of_a_gpu_have_names_of_their_own():
    assert len({t.name for t in GPU_TRAPS} - {t.name for t in TRAPS}) == len(GPU_TRAPS) == 2


def test_a_trap_that_does_not_catch_is_seen():
    trap = compiled.Trap("jax", "none", "an error", lambda: 1, lambda: 1)
    assert trapped(trap) == {"framework": "jax", "name": "none", "raises": "", "line": "1", "cured": "1"}


# --- the loop over layers -------------------------------------------------------------------------------------------------------

def test_equations_count_loops_once_and_calls_each_time():
    def three(x):
        for _ in range(3): x = jnp.sin(x)
        return x
    def scan(x): return jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=3)[0]
    assert equations(three, 1.0) == 3
    assert equations(scan, 1.0) == 2                                        # scan itself and one sin
    inner = jax.jit(jnp.sin)
    assert equations(lambda x: inner(inner(x)), 1.0) == 4


# --- steps ----------------------------------------------------------------------------------------------------------------------

def test_all_ways_train_alike():
    """The same losses, eager PyTorch and JAX with jit, without and with scan; JAX's two forms end with the same weights."""
    calls = [torch_step(TINY)] + [jax_step(TINY, how) for how in ("jit", "scan")]
    losses = np.array([[wait(call()) for _ in range(2)] for call in calls])
    np.testing.assert_allclose(losses, np.broadcast_to(losses[0], losses.shape), rtol=1e-4)
    assert losses[0][1] < losses[0][0]
    loop, scan = (call()[1] for call in calls[1:])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), scan, stacked(loop))


def test_jax_step_refuses_another_way():
    with pytest.raises(ValueError, match="how is 'fast'; accepted are jit, scan, ops"): jax_step(TINY, "fast")


def test_compared_keeps_what_went_well():
    def broken(): raise RuntimeError("no such kernel")
    rows = compared({"good": lambda: lambda: torch.ones(()), "broken": lambda: broken}, first=2, rounds=3, steps=1)
    assert rows[1] == {"name": "broken", "error": "RuntimeError: no such kernel"}
    assert rows[0]["loss"] == 1.0 and len(rows[0]["first"]) == 2 and len(rows[0]["rounds"]) == 3
    assert sorted(rows[0]["rounds"])[1] == rows[0]["seconds"]


def test_compared_saves_a_whole_row_before_the_next_is_made():
    kept = []
    def second():
        assert kept[-1][0]["seconds"] > 0 and "rounds" in kept[-1][0]
        return lambda: torch.ones(())
    rows = compared({"a": lambda: lambda: torch.ones(()), "b": second}, 1, 1, 1, save=lambda rows: kept.append(json.loads(json.dumps(rows))))
    assert [len(k) for k in kept] == [1, 2, 2] and all("error" not in r for r in rows)


def test_compared_starts_nothing_after_its_time():
    assert compared({"a": lambda: pytest.fail("started")}, limit=-1.0) == [{"name": "a", "error": "not run: the time was over"}]


def test_layers_part_says_what_it_left_out_and_saves_each_row():
    kept = []
    rows = layers_part(SIZES["small"], (1,), limit=-1.0, save=lambda found: kept.append(len(found["rows"])))["rows"]
    assert len(rows) == 4 and kept == [1, 2, 3, 4] and all("not run: the time was over" in r["error"] for r in rows)


def test_steps_part_refuses_another_part_and_the_parts_cover_all_ways():
    with pytest.raises(ValueError, match="part is 'all'; accepted are steps, steps-more, steps-ops"): measure.steps_part(TINY, "all")
    assert {w for ways in STEPS.values() for w in ways} == set(WAYS)


def test_step_rows_takes_each_way_once_and_leaves_out_what_was_not_run():
    file = {"steps": {"rows": [row([1.0], 1.0, "jax.jit"), {"name": "jax, op by op", "error": compiled_steps.LATE},
                               {"name": "torch.compile", "error": "RuntimeError: no"}]},
            "steps-more": {"rows": [row([2.0], 2.0, "jax.jit"), row([3.0], 3.0, "torch eager")]}}
    found = step_rows(file)
    assert list(found) == ["torch eager", "torch.compile", "jax.jit"]
    assert found["jax.jit"]["seconds"] == 1.0 and list(by_name(found.values())) == ["torch eager", "jax.jit"]


# --- break-even -----------------------------------------------------------------------------------------------------------------

@given(st.integers(-50, 10**6), st.integers(-50, 10**3))
def test_break_even_is_the_first_step_at_which_compiling_is_not_behind(cost, saving):
    n = break_even(float(cost), float(saving))
    if n is None: assert saving <= 0 < cost
    elif n == 0: assert cost <= 0
    else: assert n*saving >= cost > (n - 1)*saving


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_break_even_refuses_what_is_no_time(bad):
    with pytest.raises(ValueError, match="cost is"): break_even(bad, 1.0)
    with pytest.raises(ValueError, match="saving is"): break_even(1.0, bad)


def row(first: list[float], seconds: float, name: str = "") -> dict:
    return {"name": name, "first": first, "seconds": seconds, "rounds": [seconds]*5}


def test_pays_after_counts_from_the_first_calls_of_both():
    slow, fast = row([1.0, 1.0], 1.0), row([9.0, 0.5], 0.5)
    assert extra(slow) == 0.0 and extra(fast) == 8.5
    assert pays_after(fast, slow) == 17
    assert pays_after(fast, row([8.5, 1.0], 1.0)) == 2          # extra 7.5: the plain one was slow at first, too
    assert pays_after(slow, row([1.0], 1.0)) == 0                # costs nothing, gives nothing
    assert pays_after(row([9.0], 0.99), row([1.0], 1.0) | {"rounds": [0.9, 1.0, 1.0, 1.1, 1.2]}) is None
    assert pays_after(row([1235.4], 0.5), row([1.0], 1.0)) == 2500 and [about(n) for n in (0, 7, 82, 328, 3176, 31760)] == [0, 7, 82, 330, 3200, 32000]
    assert after(None) == "never" and after(1200) == "after about 1,200 steps" and after(82) == "after 82 steps" and after(0).startswith("at once")


# --- findings -------------------------------------------------------------------------------------------------------------------

def steps(eager: float, torch_compiled: float, jit: float, ops: float) -> dict:
    return by_name([row([eager], eager, "torch eager"), row([10.0], torch_compiled, "torch.compile"), row([10.0], jit, "jax.jit"),
                    row([ops], ops, "jax, op by op"), {"name": "torch.compile, each block", "error": "x"}])


def test_verdicts_follow_the_numbers():
    assert on_speed(steps(2.0, 1.5, 1.0, 4.0))[0] == "holds"
    assert on_speed(steps(2.0, 0.9, 1.0, 4.0))[0] == "only when compared with eager PyTorch or JAX without jit"
    assert on_speed(steps(0.9, 0.5, 1.0, 1.0))[0] == "false"
    assert on_cost(steps(2.0, 1.0, 1.0, 2.0))[0] == "only when a run has more than 9 steps of one shape"
    assert on_cost(steps(1.0, 2.0, 2.0, 1.0))[0] == "false"
    missing = {n: r for n, r in steps(2.0, 1.5, 1.0, 4.0).items() if n != "jax, op by op"}
    assert on_speed(missing)[1].endswith("JAX without jit was not run yet.") and "(jax, op by op: not run yet)" in on_cost(missing)[1]
    def part(same): return {"rows": [{"changed": c, "jax": {"counts": [1, 1]}, "torch": {"counts": same}}
                                     for c in ("nothing", "a length: 8, 9, 10, 11")]}
    assert on_rebuilding(part([1, 1]))[0] == "only when PyTorch runs eager"
    assert on_rebuilding(part([1, 2]))[0] == "holds"


def test_findings_have_a_row_for_each_claim_measured():
    rows = findings()
    assert {r["claim"] for r in rows} == set(CLAIMS)
    for r in rows:
        assert set(r) == {"claim", "verdict", "because", "versions", "device"} and all(r.values())
        assert r["verdict"] in ("holds", "no longer", "false") or r["verdict"].startswith("only when ")


def test_measurements_refuses_another_device():
    with pytest.raises(ValueError, match="device is 'tpu'; accepted are cpu and h100"): measurements("tpu")


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_the_measured_steps_are_the_same_step(device):
    part = measurements(device)["steps"]
    losses = [r["loss"] for r in by_name(step_rows(measurements(device)).values()).values()]
    assert len(losses) >= 4
    assert max(losses) - min(losses) < (1e-4 if part["work"]["dtype"] == "float32" else 0.05)


def test_the_command_keeps_other_parts_and_says_where_it_ran(tmp_path, monkeypatch, cases):
    out = tmp_path / "found.json"
    out.write_text('{"steps": {"rows": []}}')
    monkeypatch.setattr(measure, "cases_part", lambda: {"rows": cases})
    def half(device, n, save): save({"product": [1]}); raise RuntimeError("gone")
    monkeypatch.setattr(measure, "functions_part", half)
    main(["--part", "cases", "--part", "functions", "--small", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["steps"] == {"rows": []} and len(found["cases"]["rows"]) == len(CASES)
    assert found["functions"]["product"] == [1] and found["functions"]["error"] == "RuntimeError: gone"
    assert {"torch", "jax", "jaxlib", "optax", "date", "command", "device", "jax device"} <= set(found["cases"]["provenance"])
