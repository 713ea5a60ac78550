"""Chapter 8e: what the command measures, on a CPU in small sizes, and what the committed measurement says."""
from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from nbs_lib import decode_measured as m
from nbs_lib.course.provenance import stored
from nbs_lib.decode import DOTS, SHAPE, VECTORS, Config, crossover, fitting, measured, moved, predicted
from nbs_lib.quantization import Quantized, format_of


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


def test_the_longest_loop_is_counted():
    sass = """.L_x_1:
        /*0010*/                   LDG.E R1, [R2] ;
    .L_x_2:
        /*0020*/              @P0 BRA `(.L_x_1) ;""".replace("    .L", ".L") + """
.L_x_0:
        /*0100*/                   LDS.U16 R1, [R2] ;
        /*0110*/                   PRMT R1, R1, 0x1, RZ ;
        /*0120*/         @!PT      PRMT R1, R1, 0x1, RZ ;
        /*0130*/          @P1      BRA `(.L_x_3) ;
        /*0140*/              @UP0 UIADD3 UR1, UR1, 0x1, URZ ;
        /*0150*/               @P0 BRA `(.L_x_0) ;
.L_x_3:
        /*0160*/                   EXIT ;
"""
    assert m.loop_instructions(sass) == {"LDS": 1, "PRMT": 2, "BRA": 2, "UIADD3": 1}
    assert m.loop_instructions("/*0010*/ EXIT ;") == {}


def test_the_committed_loops():
    """Of each dot config that the sweep tries, and bounds that the committed times keep."""
    held, found = stored("decode_instructions"), measured()
    loops = {(n, tuple(c)) for n, c, _ in held["loops"]}
    assert not held["errors"] and tuple(held["shape"]) == SHAPE
    for name, group in (("int4", 128), ("int8", SHAPE[1])):
        q = Quantized(format_of(name), SHAPE, group, torch.empty(0), torch.empty(0))
        assert {(name, tuple(fitting(c, q))) for c in sum(DOTS.values(), ())} <= loops
    limit, seen = max(found["limit"].values()), 0
    for name, batch, config, seconds, _ in found["sweep"]:
        t = m.counted(name, batch, Config(*config), limit)
        assert config[0] == "dot" or t is None
        if t: seen += t.seconds < seconds and t.unpacking > predicted(name, batch).unpacking
    assert seen == sum(m.counted(n, b, Config(*c), limit) is not None for n, b, c, *_ in found["sweep"]) > 10
    assert m.counted("int4", 1, VECTORS[0], limit) is None


def test_loops_are_counted_without_a_gpu(tmp_path):
    pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")
    q = Quantized(format_of("int4"), SHAPE, 128, torch.empty(0), torch.empty(0))
    loop = m.compiled_loop(DOTS[16][0], q)
    assert loop["turns"] == 32 and loop["instructions"]["HMMA"] == 16 and 200 < sum(loop["instructions"].values()) < 300


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
    # the goal is 75%: int8 reaches it, int4 with an early start, or with four times the rows
    early = by["int4", "kernel, early", 1]
    assert early["off"] <= 1 and early["bytes"]/early["seconds"]/limit >= 0.75 > share["int4"] > 0.6
    assert share["int8"] >= 0.75 and min(tall.values()) >= 0.75 and found["tall"]["int4"]["times"] == 4


def test_where_the_committed_kernels_win():
    found = measured()
    times: dict = {}
    for r in found["rows"]: times.setdefault((r["format"], r["way"]), {})[r["batch"]] = r["seconds"]
    bf16, limit = times["bf16", "torch"], max(found["limit"].values())
    for name in ("int8", "int4"):
        assert (crossover(times[name, "kernel"], bf16) or 256) > 64                                 # None: it wins up to 256
        assert all(times[name, "compiled"][b] > bf16[b] for b in m.BATCHES if b > 1)
        assert 0.6 < predicted(name, 1, bandwidth=limit).seconds/times[name, "kernel"][1] < 1       # nothing is faster than its bytes
    for b in m.BATCHES: assert 0.8 < predicted("bf16", b, bandwidth=limit).seconds/bf16[b] < 1


def test_the_committed_cost_of_dequantizing():
    found = measured()
    clock = {(r["base"], r["tokens"]): r["seconds"] for r in found["qlora"]}
    limit, shapes = max(found["limit"].values()), m.block_shapes()
    for tokens in (512, 8192): assert m.predicted_step("bf16", tokens, shapes, limit)[0] == pytest.approx(clock["bf16", tokens], rel=0.07)
    for tokens in (512, 1024, 2048, 4096, 8192):
        assert clock["bf16", tokens] < clock["nf4 compiled", tokens] < min(clock["int4", tokens], clock["nf4", tokens])
    weights = 2*sum(o*i for o, i in shapes)
    assert found["held"]["bf16"]["weights"] == weights and found["held"]["nf4"]["weights"] == weights*(4 + 16/64)/16
    assert found["held"]["nf4"]["kept for backward"] == 0 and found["held"]["nf4 layer"]["kept for backward"] >= weights
