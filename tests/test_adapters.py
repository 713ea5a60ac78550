"""LoRA in JAX beside peft: the same numbers, bytes and losses; and what must be refused."""
from __future__ import annotations

import copy
import json
import re

import pytest

pytest.importorskip("jax")
pytest.importorskip("peft")

import jax
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from nbs_lib.adapters import (Adapted, adapt, correction_error, findings, fresh, from_peft, lines_of, measurements, merge, merge_torch,
                              predicted, quick, rounding, run_jax, run_torch, with_peft)
from nbs_lib.adapters import jitted
from nbs_lib.course import measure_adapters
from nbs_lib.course.measure_adapters import cost, in_a_child
from nbs_lib.gpt import batches, text
from nbs_lib.jax_torch import ADAMW, MATRICES, Llama, LlamaConfig, to_jax
from nbs_lib.jax_torch import forward as plain_forward

forward = jax.jit(plain_forward, static_argnums=2, compiler_options=quick())

CONFIG = LlamaConfig(layers=1, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab=128, context=32)
RANK, SCALE, LR, STEPS = 4, 2.0, 1e-2, 8


def data():
    return batches(text(), 2, 16)


@pytest.fixture(scope="module")
def pair():
    """Parameters, the start, both trained, and what they may differ by."""
    torch.manual_seed(0)
    model = Llama(CONFIG)
    params = to_jax(model)
    start = from_peft(with_peft(model, RANK, SCALE * RANK))
    theirs = run_torch(model, data(), LR, STEPS)
    return params, start, theirs, run_jax(params, start, CONFIG, SCALE, data(), LR, STEPS), rounding(model, data())


@settings(max_examples=2)
@given(n=st.integers(1, 9), m=st.integers(1, 9), r=st.integers(1, 5), scale=st.floats(-4, 4))
def test_an_adapted_matrix_is_the_matrix_that_merging_gives(n, m, r, scale):
    rng = np.random.default_rng(n)
    x, w, a, b = (rng.normal(size=s).astype(np.float32) for s in ((3, n), (n, m), (n, r), (r, m)))
    np.testing.assert_allclose(jnp.asarray(x) @ Adapted(w, a, b, scale), x @ (w + scale * a @ b), rtol=1e-4, atol=1e-4)


def test_an_adapted_matrix_is_a_node_of_the_tree():
    node = Adapted(jnp.ones((3, 2), jnp.bfloat16), jnp.ones((3, 1)), jnp.ones((1, 2)), 0.5)
    assert len(jax.tree.leaves(node)) == 3
    assert (jnp.ones((1, 3), jnp.bfloat16) @ node).dtype == jnp.bfloat16      # the base's dtype, as with peft
    assert jax.jit(lambda x, node: x @ node)(jnp.ones((1, 3)), node).shape == (1, 2)


def test_same_losses_numbers_and_bytes_as_peft(pair):
    _, _, theirs, ours, errors = pair
    apart = max(abs(x - y) for x, y in zip(theirs.losses, ours.losses))
    assert apart < errors.tolerance(LR, STEPS) < 1e-3
    p = predicted(CONFIG, RANK)
    assert theirs.trained == ours.trained == p["trained"] == CONFIG.layers * RANK * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert (theirs.state, ours.state) == (p["torch"], p["optax"])
    assert p["torch"] - p["optax"] == 4 * (2 * len(MATRICES) * CONFIG.layers - 1)      # a step count for each tensor, or one


def test_the_tolerance_catches_what_differs(pair):
    params, start, theirs, _, errors = pair
    wrong = {"another start": run_jax(params, fresh(params, RANK, jax.random.key(1)), CONFIG, SCALE, data(), LR, STEPS),
             "no alpha/r, optax's own decay": run_jax(params, start, CONFIG, 1.0, data(), LR, STEPS, decay=1e-4)}
    for name, run in wrong.items():
        assert max(abs(x - y) for x, y in zip(theirs.losses, run.losses)) > errors.tolerance(LR, STEPS), name


def test_the_base_stays_and_both_merges_give_the_same_logits(pair):
    params, start, theirs, ours, errors = pair
    torch.manual_seed(0)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, to_jax(Llama(CONFIG)))))
    ids = next(data())[0]
    with torch.no_grad():
        logits, merged = theirs.result(ids).numpy(), merge_torch(copy.deepcopy(theirs.result))(ids).numpy()
    jids = jnp.asarray(ids.numpy())
    assert abs(merged - logits).max() < 4 * errors.logits
    carried = from_peft(theirs.result)
    for a in (carried, ours.result):
        plain, alone = forward(adapt(params, a, SCALE), jids, CONFIG), forward(merge(params, a, SCALE), jids, CONFIG)
        assert abs(plain - alone).max() < 4 * errors.logits
    assert abs(np.asarray(forward(merge(params, carried, SCALE), jids, CONFIG)) - logits).max() < 4 * errors.logits
    assert abs(np.asarray(forward(params, jids, CONFIG)) - logits).max() > 100 * errors.logits


def test_at_the_start_nothing_changes_and_only_b_has_a_gradient(pair):
    params, start, *_ = pair
    ids, targets = (jnp.asarray(x.numpy()) for x in next(data()))
    assert (forward(adapt(params, start, SCALE), ids, CONFIG) == forward(params, ids, CONFIG)).all()
    step, optimizer = jitted(CONFIG, SCALE, LR, ADAMW["weight_decay"])       # as run_jax has compiled it
    new, _, _ = step(start, optimizer.init(start), params, ids, targets)
    a, b = start[0]["q"]
    decayed = a * (1 - LR * 0.01)                       # B is zero, so A moves by its weight decay alone
    np.testing.assert_allclose(new[0]["q"][0], decayed, rtol=1e-6)
    assert (new[0]["q"][1] != b).any()


def test_fresh_adapters_are_distributed_as_pefts(pair):
    params, start, *_ = pair
    for mine, theirs in zip(fresh(params, RANK, jax.random.key(0)), start):
        for name in MATRICES:
            a, b, c, d = map(np.asarray, (*mine[name], *theirs[name]))
            end = a.shape[0] ** -0.5
            assert a.shape == c.shape and b.shape == d.shape and not b.any() and not d.any()
            assert end / 2 < abs(a).max() <= end and end / 2 < abs(c).max() <= end * (1 + 1e-6)
    chosen = fresh(params, RANK, jax.random.key(0), ("q", "v"))
    assert [set(x) for x in chosen] == [{"q", "v"}] * CONFIG.layers and adapt(params, chosen, 1.0)["blocks"][0]["k"] is params["blocks"][0]["k"]


def test_bias_correction_in_fp32_is_off_as_said():
    assert 1e-6 < correction_error(1) < 1e-4 and correction_error(10_000) < 1e-6


@pytest.mark.parametrize("call, message", [
    (lambda p: fresh(p, 0, jax.random.key(0)), "rank is 0; accepted"),
    (lambda p: fresh(p, 2.0, jax.random.key(0)), "rank is 2.0; accepted"),
    (lambda p: fresh(p, 2, jax.random.key(0), ("q", "qkv")), "targets has 'qkv'; accepted"),
    (lambda p: cost("lora magic", rank=1, batch=1, seq=1, rounds=1), "way is 'lora magic'; accepted"),
    (lambda p: adapt(p, [], 1.0), "zip")])
def test_bad_input_is_refused(pair, call, message):
    with pytest.raises(ValueError, match=message):
        call(pair[0])


def test_lines_are_counted_without_docstrings():
    assert 10 <= lines_of("Adapted", "adapt") <= 20 and lines_of("nothing") == 0
    assert lines_of("Adapted", "adapt") == lines_of("Adapted") + lines_of("adapt")


def test_committed_measurements_hold_what_the_chapter_says():
    m = measurements("cpu")
    for found in filter(None, (m, measurements("h100"))):
        for part in found.values(): assert re.match(r"python3 -m nbs_lib\.(course\.measure_)?adapters", part["provenance"]["command"])
        if e := found.get("equal"): assert e["apart"] <= e["tolerance"] and e["trained"] == [e["predicted"]["trained"]] * 2
    assert m["equal"]["weights"] == "real" and measurements("tpu") is None
    for f in findings():
        assert set(f) == {"claim", "verdict", "because", "versions", "device"} and f["because"].endswith(".")


def test_verdicts_on_cost_follow_the_rows():
    made = {"torch": "2", "jax": "1", "peft": "3", "device": "GPU"}
    def cost(**rows): return {"batch": 8, "seq": 512, "provenance": made, "rows": [{"way": way.replace("_", " "), "seconds": s, "peak": p} for way, (s, p) in rows.items()]}
    def said(c): return {f["claim"]: f["verdict"] for f in measure_adapters.costs_told(c)}
    memory, time = "LoRA takes less memory than training all parameters", "A LoRA step is faster in JAX than with peft"
    rows = dict(lora_eager=(0.2, 5), full_eager=(0.1, 6), lora_jit=(0.1, 5), full_jit=(0.1, 6))
    assert said(cost(**rows)) == {memory: "holds", time: "holds"}
    assert said(cost(**rows | {"lora_eager": (0.2, 7)}))[memory] == "false" == said(cost(**rows | {"lora_jit": (0.3, 5)}))[time]
    assert said(cost(**rows | {"lora_compiled": (0.05, 5)}))[time] == "false"                              # the best of peft's
    assert said(cost(lora_eager=(0.2, None), full_eager=(0.1, None), lora_jit=(0.1, None))) == {}           # a CPU: no peaks, no verdict
    assert said(cost(lora_eager=(0.2, 5))) == {} == said({"batch": 1, "seq": 1, "provenance": made, "rows": [{"way": "lora jit", "error": "x"}]})


def test_a_failing_child_gives_its_error_and_a_late_one_nothing():
    assert in_a_child("json", "loads", {"s": '{"seconds": 1.5}'}, 60) == {"seconds": 1.5}
    assert "JSONDecodeError" in in_a_child("json", "loads", {"s": "no json"}, 60)["error"]
    assert in_a_child("os", "_exit", {"status": 3}, 60) == {"error": "ended with exit status 3"}
    assert in_a_child("time", "tzset", {}, 0.0) is None


def test_the_command_keeps_ways_that_were_measured_before(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_adapters, "in_a_child", lambda module, function, given, limit:
                        None if given["way"] == "full jit" else {"seconds": 1.5})
    file = tmp_path / "adapters.json"
    for way in ("lora jit", "full jit", "lora eager"):
        measure_adapters.main(["--small", "--part", "cost", "--ways", way, "--out", str(file)])
    assert [r["way"] for r in json.loads(file.read_text())["cost"]["rows"]] == ["lora eager", "lora jit"]


def test_what_is_not_timed_is_compiled_quickly_where_xla_knows_how(monkeypatch):
    ask = quick.__wrapped__                                     # not the answer that it keeps
    assert ask() == {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert ask() == {"xla_gpu_autotune_level": 0}
    def unknown(*_, compiler_options): raise jax.errors.JaxRuntimeError(f"No such compile option: {compiler_options}")
    monkeypatch.setattr(jax, "jit", unknown)
    assert ask() is None
