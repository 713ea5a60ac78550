"""Transforms of one loss in torch.func and JAX: equal numbers, equal products; and experiments on what bites."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("jax", reason="an optional extra")

import jax
from jax import numpy as jnp

from nbs_lib import transforms
from nbs_lib.gpt import batches, text
from nbs_lib.jax_torch import Llama, LlamaConfig, grads_torch, largest_gap, loss, measurements, to_jax
from nbs_lib.transforms import (EXPERIMENTS, KINDS, Bite, bites, carried, findings, jax_transforms, like, matmul_flops, outcome,
                                plain_sdpa, seconds, timings, torch_flops, torch_transforms)

TINY = LlamaConfig(layers=1, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab=128, context=32)


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model, (ids, targets) = Llama(TINY), next(batches(text(), 3, 16))
    v = like(dict(model.named_parameters()))
    x = to_jax(model), jnp.asarray(ids.numpy()), jnp.asarray(targets.numpy())
    return model, ids, targets, v, torch_transforms(model, ids, targets, v), jax_transforms(TINY, carried(model, v)), x


@pytest.mark.parametrize("kind", KINDS)
def test_each_transform_gives_the_same_by_the_same_products(case, kind):
    model, ids, _, _, ours, theirs, x = case
    with plain_sdpa(): got, flops = ours[kind](), torch_flops(ours[kind])
    right = jax.jit(theirs[kind])(*x)
    if kind == "per example":
        pairs = [(carried(model, {n: g[i] for n, g in got.items()}), jax.tree.map(lambda g: g[i], right)) for i in range(len(ids))]
    else: pairs = [(carried(model, got) if isinstance(got, dict) else got.detach().numpy(), right)]
    for a, b in pairs:
        assert largest_gap(a, b) < 1e-5*max(1, *(float(abs(t).max()) for t in jax.tree.leaves(b)))
    assert flops == matmul_flops(theirs[kind], *x)
    assert flops == {"loss": 1, "Hessian product": 9}.get(kind, 3)*matmul_flops(theirs["loss"], *x)


def test_the_gradient_is_autograds_and_the_mean_of_the_examples(case):
    model, ids, targets, _, ours, _, _ = case
    with plain_sdpa(): whole, each = carried(model, ours["gradient"]()), ours["per example"]()
    assert largest_gap(whole, grads_torch(model, ids, targets)) < 1e-6
    assert largest_gap(carried(model, {n: g.mean(0) for n, g in each.items()}), whole) < 1e-6
    for i in range(len(ids)):
        assert largest_gap(carried(model, {n: g[i] for n, g in each.items()}), grads_torch(model, ids[i:i+1], targets[i:i+1])) < 1e-6


def test_jvp_and_the_hessian_product_are_what_differences_in_fp64_say(case):
    """The derivative along v, of the loss and of the gradient: (f(w + εv) − f(w − εv))/2ε, off by ε²."""
    model, ids, targets, v, _, theirs, x = case
    eps, around = 1e-4, []
    for sign in (1, -1):
        twin = Llama(TINY).double()
        twin.load_state_dict({n: p.double() + sign*eps*v[n].double() for n, p in model.named_parameters()})
        value = twin(ids, targets)
        value.backward()
        around.append((value.item(), {n: p.grad for n, p in twin.named_parameters()}))
    slope = (around[0][0] - around[1][0])/(2*eps)
    bend = carried(model, {n: (g - around[1][1][n])/(2*eps) for n, g in around[0][1].items()})
    assert float(theirs["jvp"](*x)) == pytest.approx(slope, abs=1e-3)
    product = jax.jit(theirs["Hessian product"])(*x)
    assert largest_gap(product, bend) < 1e-3*max(float(abs(t).max()) for t in jax.tree.leaves(product))


def test_the_fused_kernel_has_no_forward_rule_on_the_cpu(case):
    """When this fails, PyTorch has learned it: say so in the chapter."""
    ours = case[4]
    for kind in ("jvp", "Hessian product"):
        assert outcome(ours[kind]) == "NotImplementedError"
        with plain_sdpa(): assert outcome(ours[kind]) != "NotImplementedError"


def test_products_are_counted_inside_calls_and_loops_are_refused():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert matmul_flops(lambda a, b: a @ b, a, b) == 2*3*4*5
    assert matmul_flops(jax.jit(lambda a, b: jax.checkpoint(jnp.matmul)(a, b).sum()), a, b) == 2*3*4*5
    assert matmul_flops(jax.vmap(lambda a: a @ b), jnp.ones((7, 3, 4))) == 7*2*3*4*5
    with pytest.raises(ValueError, match="scan"): matmul_flops(lambda a: jax.lax.scan(lambda c, _: (c, c @ b), a, None, 3), a)


def test_a_direction_is_the_same_for_the_same_seed():
    weights = {"a": torch.zeros(3, 4), "b": torch.zeros(2, dtype=torch.float64)}
    x, y, z = like(weights), like(weights), like(weights, 1)
    assert all(torch.equal(x[n], y[n]) and not torch.equal(x[n], z[n]) and x[n].dtype == w.dtype for n, w in weights.items())


# --- what bites -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def found() -> dict[str, Bite]:
    return {e.__name__: b for e, b in zip(EXPERIMENTS, bites(), strict=True)}


@pytest.mark.parametrize("name, torchs, jaxs", [
    ("two_draws", "other numbers", "the same numbers"), ("draw_between", "other numbers", "the same numbers"),
    ("wide_integers", str(2**40 + 7), "7"), ("sums", str(2**32), "0"), ("promotion", "bfloat16", "float32"),
    ("assignment", "1.0", "TypeError"), ("view", "x has changed", "x is as before"), ("donated", "1.0", "RuntimeError"),
    ("read_outside", "IndexError", "4.0, the last row's"), ("write_outside", "IndexError", "dropped"),
    ("ignored_label", f"{np.log(4):.2f}, without it", "nan"), ("division", "RuntimeError", "a number of type int32"),
    ("last_batch", "nothing is compiled", "compiled 2 times"), ("layout", "x @ W.T is right", "another result, no error"),
    ("decay", "0.01", "0.0001")])
def test_what_bites(found, name, torchs, jaxs):
    assert (found[name].torch, found[name].jax) == (torchs, jaxs)


def test_what_depends_on_the_device_says_so(found):
    gpu = torch.cuda.is_available()
    for name in ("products", "at_once"): assert ("GPU" if gpu else "CPU") in found[name].tried
    assert found["products"].torch == "error of fp32"
    if jax.default_backend() == "cpu": assert found["products"].jax == "error of fp32"
    assert found["shared"].torch == "changes with it"


def test_experiments_leave_the_generator_as_it_was():
    state = torch.get_rng_state()
    transforms.two_draws(), transforms.draw_between()
    assert torch.equal(state, torch.get_rng_state())


def test_an_outcome_is_the_result_or_the_errors_name():
    assert outcome(lambda: 3) == "3" and outcome(lambda: [][1]) == "IndexError"


# --- measuring ------------------------------------------------------------------------------------------------------------------

def test_timings_have_each_transform_and_keep_an_error_as_text(monkeypatch):
    def few(*a): return {k: (lambda: torch.zeros(())) if k != "vjp" else (lambda: 1/0) for k in KINDS}
    monkeypatch.setattr(transforms, "torch_transforms", few)
    monkeypatch.setattr(transforms, "jax_transforms", lambda *a: {k: lambda p, i, t: i.sum() for k in KINDS})
    rows = {r["transform"]: r for r in timings(TINY, 2, 8, rounds=1)}
    assert list(rows) == list(KINDS) and all("jax ms" in r for r in rows.values())
    assert rows["vjp"]["torch error"] == "ZeroDivisionError: division by zero" and "torch ms" not in rows["vjp"]
    assert {"torch, loop ms", "jax, loop ms"} <= rows["per example"].keys()


def test_seconds_calls_in_turns():
    calls = []
    took = seconds({n: lambda n=n: calls.append(n) for n in "ab"}, 3)
    assert "".join(calls) == "aabb" + "ab"*3 and took.keys() == {"a", "b"}


def test_the_command_writes_what_bites(tmp_path):
    transforms.main(["--out", str(tmp_path/"x.json"), "--small", "--part", "bites"])
    part = json.loads((tmp_path/"x.json").read_text())["bites"]
    assert len(part["rows"]) == len(EXPERIMENTS) and part["provenance"]["jax"] == jax.__version__


def test_findings_come_from_the_committed_rows():
    found = measurements("transforms")
    assert {"bites", "timings"} <= found["cpu"].keys() and all("bites" in parts for parts in found.values())
    for parts in found.values():
        for name in {"timings", "compiled"} & parts.keys(): assert [r["transform"] for r in parts[name]["rows"]] == list(KINDS)
    for f in findings():
        assert f.keys() == {"claim", "verdict", "because", "versions", "device"}
        assert f["verdict"] in ("holds", "false", "no longer") or f["verdict"].startswith("only when")


def test_compiled_rows_are_told_as_far_as_there_are_any(monkeypatch):
    rows = [{"transform": k, "torch ms": 3.0, "jax ms": 1.0} for k in KINDS]
    parts = {"timings": {"rows": rows, "provenance": {"device": "x"}}}
    monkeypatch.setattr(transforms, "measurements", lambda name, unfinished: {"h100": parts})
    alone, = findings()
    assert alone["verdict"] == "false" and "3.0 to 3.0 times" in alone["because"] and "by torch.compile not measured" in alone["because"]
    parts["compiled"] = {"rows": [rows[0] | {"torch, compiled ms": 0.9}, rows[1] | {"torch, compiled ms": 1.25}, rows[2] | {"torch, compiled error": "no"}],
                         "unfinished": True}
    assert "by torch.compile, measured for 2 of them, 0.90 to 1.25 times as long" in findings()[0]["because"]
    del rows[3]["torch ms"]
    assert findings()[0]["verdict"].startswith("only when") and "5 of 6" in findings()[0]["because"]
    parts["timings"]["unfinished"] = True
    assert findings() == []
