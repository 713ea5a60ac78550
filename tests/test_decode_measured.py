"""Chapter 8e: what the command measures, on a CPU in small sizes, and what the committed measurement says."""
from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from nbs_lib import decode_measured as m
from nbs_lib.decode import SHAPE, crossover, measured, moved, predicted


def test_predicted_steps():
    shapes = m.block_shapes()
    assert shapes == [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    share = [m.predicted_step("nf4", t, shapes)[1]/m.predicted_step("nf4", t, shapes)[0] for t in (512, 2048, 8192)]
    assert share == sorted(share, reverse=True) and 0 < share[-1] < share[0] < 1
    whole, twice = m.predicted_step("nf4", 512, shapes)
    assert whole - twice == pytest.approx(m.predicted_step("bf16", 512, shapes)[0]) and m.predicted_step("bf16", 512, shapes)[1] == 0


@pytest.mark.parametrize("how", ["nf4", "int4", "nf4 compiled", "int4 compiled"])
def test_qloras_product_has_the_plain_gradients_and_keeps_no_weight(how):
    torch.manual_seed(0)
    base, held = m.base_of(how, (64, 128), "cpu", m.unpacked_weight)
    torch.manual_seed(0)
    plain, same = m.base_of(how.split()[0] + " layer", (64, 128), "cpu", m.unpacked_weight)
    assert held == same == 64*128//2 + 2*64*128//64
    x, g = (torch.randn(5, n).bfloat16() for n in (128, 64))
    kept: dict[str, list[int]] = {}
    got = {}
    for name, f in (("ours", base), ("plain", plain)):
        layer = m.Adapted(f, 64, 128, 4, "cpu")
        torch.manual_seed(1)
        layer.a.data.normal_(); layer.b.data.normal_()
        sizes = kept.setdefault(name, [])
        z = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t): f(z)
        got[name] = layer.step(z, g)
    assert all(torch.equal(a, b) for a, b in zip(got["ours"], got["plain"]))
    assert not kept["ours"] and 64*128 in kept["plain"]


def test_adapters_are_lora():
    w, x = torch.randn(6, 4).bfloat16(), torch.randn(3, 4).bfloat16().requires_grad_()
    layer = m.Adapted(lambda z: F.linear(z, w), 6, 4, 2, "cpu")
    layer.b.data.normal_()
    g = torch.randn(3, 6).bfloat16()
    exact = w.float() + 2*layer.b.float() @ layer.a.float()
    dx, da, db = layer.step(x, g)
    assert torch.allclose(dx.float(), g.float() @ exact, atol=0.1)
    assert da.shape == layer.a.shape and torch.allclose(db.float(), 2*g.float().t() @ (x.float() @ layer.a.float().t()), atol=0.1)


def test_the_command_writes_what_it_measured(tmp_path):
    out = tmp_path/"decode.json"
    m.main(["--small", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["provenance"]["torch"] == torch.__version__ and set(found["limit"]) == {"copy", "kernel"}
    seen = {(r["format"], r["way"], r["batch"]) for r in found["rows"]}
    assert {("bf16", "torch", b) for b in m.BATCHES} <= seen and ("int4", "eager", 256) in seen and ("int8", "compiled", 1) in seen
    for r in found["rows"]: assert r["seconds"] > 0 and r["bytes"] == moved(r["format"], r["batch"], tuple(found["shape"]))
    assert {r["base"] for r in found["qlora"]} == {"bf16", "nf4", "int4", "nf4 compiled", "int4 compiled"}
    assert bool(found["sweep"]) != any(name == "kernels" for name, _ in found["errors"])


def test_an_error_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch):
    real = m.base_of
    monkeypatch.setattr(m, "base_of", lambda how, *more: real(how, *more) if how != "nf4" else 1/0)
    m.main(["--small", "--part", "qlora", "--out", str(tmp_path/"x.json")])
    found = json.loads((tmp_path/"x.json").read_text(encoding="utf-8"))
    assert found["errors"] == [["nf4", "ZeroDivisionError: division by zero"]] and {r["base"] for r in found["qlora"]} == {
        "bf16", "int4", "nf4 compiled", "int4 compiled"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_full_command_says_so(capsys):
    with pytest.raises(SystemExit) as stopped: m.main([])
    assert stopped.value.code == 2 and "there is no GPU here; --small runs a small version on the CPU" in capsys.readouterr().err


def test_the_committed_measurement():
    found = measured()
    assert "H100" in found["provenance"]["device"] and tuple(found["shape"]) == SHAPE and not found["errors"]
    limit, by = max(found["limit"].values()), {(r["format"], r["way"], r["batch"]): r for r in found["rows"]}
    for r in found["rows"]: assert r["bytes"] == moved(r["format"], r["batch"], group=found["group"])
    assert all(by[name, "kernel", b]["off"] <= 1 for name in ("int8", "int4") for b in m.BATCHES)
    share = {name: by[name, "kernel", 1]["bytes"]/by[name, "kernel", 1]["seconds"]/limit for name in ("int8", "int4")}
    tall = {name: t["bytes"]/t["seconds"]/limit for name, t in found["tall"].items()}
    # the goal is 75%: int8 reaches it, int4 does with four times the rows only
    assert share["int8"] >= 0.75 and 0.70 <= share["int4"] < 0.75 and min(tall.values()) >= 0.75 and found["tall"]["int4"]["times"] == 4


def test_where_the_committed_kernels_win():
    found = measured()
    times: dict = {}
    for r in found["rows"]: times.setdefault((r["format"], r["way"]), {})[r["batch"]] = r["seconds"]
    bf16, limit = times["bf16", "torch"], max(found["limit"].values())
    for name in ("int8", "int4"):
        assert 64 < crossover(times[name, "kernel"], bf16) < 128
        assert all(times[name, "compiled"][b] > bf16[b] for b in m.BATCHES if b > 1)
        assert 0.6 < predicted(name, 1, bandwidth=limit).seconds/times[name, "kernel"][1] < 1       # nothing is faster than its bytes
    for b in m.BATCHES: assert 0.8 < predicted("bf16", b, bandwidth=limit).seconds/bf16[b] < 1


def test_the_committed_cost_of_dequantizing():
    found = measured()
    clock = {(r["base"], r["tokens"]): r["seconds"] for r in found["qlora"]}
    limit, shapes = max(found["limit"].values()), m.block_shapes()
    for tokens in (512, 8192): assert m.predicted_step("bf16", tokens, shapes, limit)[0] == pytest.approx(clock["bf16", tokens], rel=0.07)
    for tokens in (512, 1024, 2048, 4096, 8192):
        assert clock["bf16", tokens] < clock["nf4 compiled", tokens] < clock["int4", tokens] < clock["nf4", tokens]
    weights = 2*sum(o*i for o, i in shapes)
    assert found["held"]["bf16"]["weights"] == weights and found["held"]["nf4"]["weights"] == weights*(4 + 16/64)/16
    assert found["held"]["nf4"]["kept for backward"] == 0 and found["held"]["nf4 layer"]["kept for backward"] >= weights
