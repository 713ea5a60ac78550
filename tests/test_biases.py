"""Attention with biases: every way against the written-out one, within bounds that reject what is wrong; the limits' machinery; bytes and findings."""
import json
import math
import operator
import os
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex

from nbs_lib import biases
from nbs_lib.biases import (ALIBI, LEARNED, LIMITS, PACKED, TERMS, WAYS, Case, alibi_slopes, behind_the_check, by_flex, by_sdpa, computed_pairs, documents, error_bound,
                            flex_with_gradients, jax_with_gradients, judged, limits, off, packed, reference, trial, truth, verdict, with_gradients, work)
from nbs_lib.course import measure_biases as measure
from nbs_lib.course.measure_biases import in_pool

EMPTY = Case("padded, learned", terms=("table",), learned=("table",), mask="padded")
MANY = Case("several", terms=("alibi", "table", "keys", "pairs", "both ends"), learned=("alibi", "table", "keys", "pairs", "both ends"), s=40)
ODD = Case("odd sizes", s=100, d=24, wide=40)


@pytest.fixture(scope="module", autouse=True)
def quick_compiling():
    """XLA without most of its optimizations: the same programs, compiled in half the time."""
    try: import jax
    except ImportError: yield
    else:
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def sdpa(case, t): return with_gradients(lambda t: by_sdpa(case, t), case, t)


# the biases

@given(st.integers(1, 100))
def test_slopes_are_powers_between_0_and_1_and_all_different(n):
    slopes = alibi_slopes(n)
    assert slopes.shape == (n,) and len(set(slopes.tolist())) == n and 0 < slopes.min() and slopes.max() < 1
    if n & (n - 1) == 0: assert torch.allclose(slopes.log2(), -8*torch.arange(1, n + 1)/n)


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_the_same_dense_and_as_a_function(name):
    n, s = 3, 9
    torch.manual_seed(1)
    t = TERMS[name].make(n, s)
    dense, at = TERMS[name].dense(t, s).expand(n, s, s), TERMS[name].at(t, s)
    for h in range(n):
        for i in range(s):
            for j in range(s): assert math.isclose(float(dense[h, i, j]), float(at(h, i, j)), rel_tol=1e-6, abs_tol=1e-7)


@pytest.mark.parametrize("padding", [False, True])
def test_documents_lie_in_order_and_padding_sees_nothing(padding):
    ids = documents(64, padding)
    real = ids[ids >= 0]
    assert (real.diff() >= 0).all() and ids[:32].eq(0).all() and (ids < 0).sum() == (16 if padding else 0)
    i = torch.arange(64)
    may_see = packed(ids)(0, 0, i[:, None], i)
    assert may_see.any(1).eq(ids >= 0).all() and not may_see.triu(1).any()
    assert all(bool(may_see[a, b]) == (b <= a and ids[a] == ids[b] and ids[a] >= 0) for a in range(0, 64, 5) for b in range(64))


@settings(max_examples=8)
@given(st.integers(8, 600), st.sampled_from(["causal", "packed"]))
def test_computed_pairs_are_the_blocks_of_a_block_mask(s, mask):
    mod = biases.causal if mask == "causal" else packed(documents(s))
    blocks = flex.create_block_mask(mod, None, None, s, s, device="cpu")
    assert computed_pairs(s, mask) == int(blocks.to_dense().sum())*128**2


# every way against the reference

EACH = ([(c, torch.float32) for c in (ALIBI, LEARNED, PACKED, EMPTY, MANY, ODD)] + [(c, torch.bfloat16) for c in (LEARNED, EMPTY, MANY)]
        + [(ODD, torch.float16)])


@pytest.mark.parametrize("case,dtype", EACH, ids=lambda x: getattr(x, "name", str(x)))
def test_sdpa_and_flex_attention_stay_within_the_bound(case, dtype):
    t = case.inputs(dtype=dtype)
    true, bound = truth(case, t), error_bound(case, t, dtype)
    for found in (sdpa(case, t), flex_with_gradients(case, t)):
        assert set(found) == {"out", "q", "k", "v", *case.learned}
        assert max(off(found, true, bound).values()) <= 1


@pytest.mark.parametrize("case,dtype", [(ALIBI, torch.float32), (PACKED, torch.float32), (LEARNED, torch.bfloat16)], ids=lambda x: getattr(x, "name", str(x)))
def test_jax_stays_within_the_bound(case, dtype):
    pytest.importorskip("jax")
    t = case.inputs(dtype=dtype)
    found = jax_with_gradients(case, t)
    assert set(found) == {"out", "q", "k", "v", *case.learned}
    assert max(off(found, truth(case, t), error_bound(case, t)).values()) <= 1


def test_the_bound_is_not_generous_in_bf16():
    t = ALIBI.inputs(dtype=torch.bfloat16)
    assert off(sdpa(ALIBI, t), truth(ALIBI, t), error_bound(ALIBI, t, torch.bfloat16))["out"] > 0.2


def test_the_bound_holds_with_a_longer_sequence_and_large_scores():
    case = Case("large", s=300, d=64, b=1, n=2)
    t = case.inputs()
    t |= {"q": 10*t["q"]}
    assert max(off(sdpa(case, t), truth(case, t), error_bound(case, t)).values()) <= 1


WRONG = {
    "a bias off by one": lambda t: by_sdpa(LEARNED, t | {"table": t["table"].roll(1, -1)}),
    "no bias": lambda t: by_sdpa(LEARNED, t | {"table": 0*t["table"]}),
    "no scale": lambda t: by_sdpa(LEARNED, t | {"q": t["q"]*4}),
    "a mask off by one": lambda t: by_sdpa(LEARNED, t | {"k": torch.cat((t["k"][..., 1:, :], t["k"][..., :1, :]), -2)}),
    "heads exchanged": lambda t: by_sdpa(LEARNED, t | {"table": t["table"].flip(0)}),
    "a thousandth too large": lambda t: 1.001*by_sdpa(LEARNED, t),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_bound_rejects_what_is_wrong(name):
    t = LEARNED.inputs()
    shares = off(with_gradients(WRONG[name], LEARNED, t), truth(LEARNED, t), error_bound(LEARNED, t))
    assert min(shares["out"], shares["v"]) > 1


def test_a_bias_gradient_without_the_row_sum_is_rejected():
    t = LEARNED.inputs()
    true, bound = truth(LEARNED, t), error_bound(LEARNED, t)
    q, k, v, g = (t[x].double() for x in "qkvg")
    P = torch.softmax((q @ k.mT/4 + biases.dense_bias(LEARNED, {x: y.double() for x, y in t.items()})).masked_fill(~LEARNED.allowed(), -math.inf), -1)
    dP = g @ v.mT
    for minus, good in (((P*dP).sum(-1, keepdim=True), True), (0, False)):
        dS, away = (P*(dP - minus)).sum(0), biases.distance(128) + 127
        table = torch.zeros(4, 255, dtype=torch.float64).index_add_(1, away.flatten(), dS.flatten(1))
        assert (off({"table": table}, {"table": true["table"]}, bound)["table"] <= 1) == good


def test_the_reference_is_differentiable_and_empty_rows_give_zero():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 8, 8, dtype=torch.float64, requires_grad=True)
    allowed = EMPTY.__class__("small", mask="padded", s=8).allowed()
    assert torch.autograd.gradcheck(lambda *x: reference(*x, allowed), (q, k, v, bias))
    assert not reference(q, k, v, bias, allowed)[..., 6:, :].any()
    assert torch.allclose(reference(q, k, v, bias, torch.ones(8, 8, dtype=torch.bool)),
                          torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]))


# flex_attention's limits

def test_the_cpu_refuses_gradients_and_the_check_comes_back():
    t = ALIBI.inputs()
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="backward on CPU"): with_gradients(lambda t: by_flex(ALIBI, t), ALIBI, t)
        with behind_the_check(): with_gradients(lambda t: by_flex(ALIBI, t), ALIBI, t)


def test_a_learned_table_alone_has_its_gradient_on_a_cpu_through_the_front_door():
    t = LEARNED.inputs()
    learned = t | {"table": t["table"].requires_grad_()}
    (found,) = torch.autograd.grad(by_flex(LEARNED, learned), learned["table"], t["g"])
    assert off({"table": found}, {"table": truth(LEARNED, t)["table"]}, error_bound(LEARNED, t))["table"] <= 1


def test_each_claim_has_several_cases_with_names_of_their_own():
    names = [case.name for cases in LIMITS.values() for case in cases]
    assert len(LIMITS) == 4 and min(map(len, LIMITS.values())) >= 4 and len(set(names)) == len(names)


@pytest.mark.parametrize("claim", LIMITS)
def test_an_uncompiled_case_works(claim):
    """One of each claim, the one with the fewest tokens but one; a data file has them all."""
    case = sorted(LIMITS[claim], key=lambda c: c.s)[1]
    assert trial(case if case.s < 512 else Case("padded", mask="padded", masked_by="score_mod", d=32), "eager")["outcome"] == "works"


def test_the_measured_cases_are_those_of_the_claims():
    """All of them, uncompiled, on both machines, with one outcome; compiled on the H100."""
    names = [(claim, case.name) for claim, cases in LIMITS.items() for case in cases]
    for device, hows in (("cpu", ("eager",)), ("h100", ("eager", "compiled"))):
        rows = biases.measurements(device)["limits"]["rows"]
        for how in hows: assert [(r["claim"], r["case"]) for r in rows if r["how"] == how] == names
        assert [r["case"] for r in rows if r["how"] == "eager" and r["outcome"] != "works"] == ["a learned number without dimensions"]


def test_outcomes():
    t = ALIBI.inputs()
    true, bound = truth(ALIBI, t), error_bound(ALIBI, t)
    def fails(): raise RuntimeError("two\nlines " + 300*"x")
    assert judged(lambda: true, true, bound) == {"outcome": "works", "worst": 0.0, "detail": "out"}
    assert judged(lambda: true | {"k": true["k"] + 1}, true, bound)["outcome"] == "wrong"
    assert judged(lambda: true | {"k": true["k"]*math.nan}, true, bound) == {"outcome": "not finite", "worst": None, "detail": "k"}
    r = judged(fails, true, bound)
    assert r["outcome"] == "error" and r["detail"].startswith("RuntimeError: two lines x") and len(r["detail"]) == 200


def row(case, outcome, claim="gradients become NaN", how="compiled"):
    return {"claim": claim, "how": how, "case": case, "outcome": outcome, "worst": None, "detail": "why"}


def test_verdicts():
    assert verdict([row("a", "works"), row("b", "works")]) == ("no longer", "All 2 cases work, gradients included: a; b.")
    assert verdict([row("a", "error"), row("b", "wrong")])[0] == "holds"
    said, because = verdict([row("a", "works"), row("b", "not finite")])
    assert said == "only when tried with b" and because == "1 of 2 cases work, gradients included: b: not finite (why)."


def test_a_reason_names_the_innermost_error_and_is_not_cut():
    assert biases.cause("ValueError: x must be y") == "ValueError: x must be y" and biases.cause("q, k") == "q, k"
    long = "InductorError: LoweringException: NotImplementedError: Not supported here. This " + 200*"x"
    assert biases.cause(long[:200]) == "NotImplementedError: Not supported here"
    for case in biases.measurements("h100")["limits"]["rows"]:
        if case["outcome"] == "error": assert len(biases.cause(case["detail"])) < 160 and "target:" not in biases.cause(case["detail"])


def test_a_failure_where_all_is_a_power_of_two_says_nothing_of_other_numbers():
    claim = "dimensions must be powers of two"
    several = "a score_mod may not close over more than one tensor"
    assert measure.speaks(several, "two tensors") and not measure.speaks(several, "a learned number without dimensions")
    assert not measure.speaks(claim, "heads 8 wide") and measure.speaks(claim, "heads 96 wide") and measure.speaks("gradients become NaN", "heads 8 wide")
    rows = [row("heads 96 wide", "works", claim), row("heads 8 wide", "error", claim)]
    [found] = measure.limit_findings({"rows": rows, "provenance": WHERE})
    assert found["verdict"] == "no longer" and "Another limit: heads 8 wide (why)" in found["because"]
    [found] = measure.limit_findings({"rows": [row("heads 96 wide", "error", claim), *rows[1:]], "provenance": WHERE})
    assert found["verdict"] == "holds"


def test_a_pool_survives_errors_deaths_and_what_hangs():
    """Tasks that need no torch: a process of the pool imports what its task needs."""
    assert in_pool([(operator.truediv, 1, 0)], 60, 1)[0] == {"outcome": "error", "worst": None, "detail": "ZeroDivisionError: division by zero"}
    assert in_pool([(os._exit, 1)], 60, 1)[0]["outcome"] == "error"
    began = time.perf_counter()
    assert in_pool([(time.sleep, 60)], 0.5, 1)[0]["outcome"] == "not run" and time.perf_counter() - began < 40


# bytes, operations, and the command

def test_work_by_hand():
    b, n, s, d = 2, 4, 256, 32
    tensor = 2*b*n*s*d
    assert work("sdpa causal", b, n, s, d, False) == (4*tensor + 4*b*n*s, 4*d*b*n*s*(s + 1)//2, 0)
    assert work("sdpa dense", b, n, s, d, True) == (12*tensor + 8*b*n*s + 4*n*s*s, 14*d*b*n*s*s, 4*n*s*s)
    assert work("flex alibi", b, n, s, d, False).operations == 4*d*b*n*3*128**2
    half = s*(s + 1)//2                                       # cuDNN in JAX skips the future, and writes a gradient of the bias
    assert work("jax cudnn", b, n, s, d, False) == (4*tensor + 4*b*n*s + 2*n*half, 4*d*b*n*half, 2*n*half)
    assert work("jax cudnn", b, n, s, d, True) == (12*tensor + 8*b*n*s + 4*n*half + 2*b*n*s*s, 14*d*b*n*half, 4*n*half)
    assert work("jax xla", b, n, s, d, False).bytes - work("jax xla, bias inside", b, n, s, d, False).bytes == 2*b*n*s*s


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backward", [False, True])
def test_predictions_are_above_the_memory_limit_and_grow(way, backward):
    found = [limits(way, 16384//s, 16, s, 64, backward) for s in (512, 1024, 2048, 4096, 8192, 16384)]
    assert all(x["predicted"] >= x["memory"] > 0 for x in found)
    if way == "flex packed": assert found[0]["predicted"] < found[-1]["predicted"]            # blocks are coarse for short documents
    else: assert all(x["predicted"] < y["predicted"] and x["compute"] < y["compute"] for x, y in zip(found, found[1:]))


@pytest.mark.parametrize("part", ["torch", "jax", "explain"])
def test_nothing_measured_is_faster_than_its_limits(part):
    """A row below them would be a wrong clock, or a wrong count of what must be read: so cuDNN in JAX showed that it skips half of the bias."""
    rows = [r for r in biases.measurements("h100")[part]["rows"] if "seconds" in r]
    assert len(rows) > 20
    for r in rows:
        least = limits(r["way"].split(", ")[0] if "stage" in r["way"] else r["way"], r["b"], r["n"], r["s"], r["d"], r["passes"] == "both")
        assert r["seconds"] > 0.95*max(least["memory"], least["compute"]), r


def test_a_dense_bias_costs_what_its_bytes_cost():
    dense, function = (limits(way, 1, 16, 16384, 64, False) for way in ("sdpa dense", "flex alibi"))
    assert dense["memory"] > 10*function["memory"] and dense["predicted"] > 1.5*function["predicted"]


def test_the_command_keeps_other_parts_and_writes_rows_as_they_come(tmp_path, monkeypatch):
    file = tmp_path/"found.json"
    file.write_text(json.dumps({"limits": {"rows": []}}))
    def rows(part, *_):
        yield [{"way": part}]
        assert json.loads(file.read_text())[part]["rows"] == [{"way": part}]
        yield [{"way": part}, {"way": "more"}]
    monkeypatch.setattr(measure, "measured", rows)
    measure.main(["--small", "--part", "jax", "--part", "explain", "--out", str(file)])
    found = json.loads(file.read_text())
    assert set(found) == {"limits", "explain", "jax"} and found["jax"]["provenance"]["torch"] == torch.__version__
    assert found["jax"]["rows"] == [{"way": "jax"}, {"way": "more"}]


def test_every_way_of_a_learned_bias_is_judged_to_work():
    pytest.importorskip("jax")
    rows = measure.equal_rows("cpu", (LEARNED,))
    assert [r["outcome"] for r in rows] == ["works"]*3 and {r["case"] for r in rows} == {"learned bias"}


def test_parts_start_nothing_late_and_know_their_sizes():
    assert list(measure.measured("jax", "cpu", True, -1.0)) == list(measure.measured("explain", "cpu", True, -1.0)) == []
    assert [x["s"]*x["b"] for x in measure.swept("cuda", False)] == [16384]*6


def test_rows_of_jax_on_a_cpu():
    pytest.importorskip("jax")
    r = measure.jax_row("jax xla", "both", 64, 2, 2, 16, "cpu", rounds=1)
    assert r["seconds"] > 0 and r["bias"] == 4*2*64*64 and r["peak"] >= 3*4*2*2*64*16
    assert "error" in measure.jax_row("jax cudnn", "forward", 64, 2, 2, 16, "cpu") or torch.cuda.is_available()


def test_rows_of_torch_on_a_cpu_come_way_by_way():
    kept = [[dict(r) for r in rows] for rows in measure.torch_rows(64, 2, 2, 16, "cpu", ("sdpa causal", "sdpa dense", "sdpa table"))]
    assert [len(rows) for rows in kept] == [2, 4, 6, 6] and all(r["seconds"] > 0 for rows in kept for r in rows)
    assert [r["bias"] for r in kept[-1]] == [0, 0] + 4*[4*2*64*64]


def test_a_way_with_stages_gives_them_to_the_kernel(monkeypatch):
    seen = []
    monkeypatch.setattr(measure.flex, "flex_attention", lambda q, k, v, **how: seen.append(how["kernel_options"]) or q + k + v)
    for way in ("flex alibi, 2 stages", "flex alibi"): measure.torch_calls(64, 1, 2, 16, "cpu", (way,))[way][1]()
    assert seen == [{"num_stages": 2}, None]


def test_without_jax_a_row_says_what_to_install(monkeypatch):
    class Refuses:
        def find_spec(self, name, *_):
            if name == "jax" or name == "nbs_lib.jax_torch": raise ModuleNotFoundError("this lesson needs jax")
    import nbs_lib
    monkeypatch.delattr(nbs_lib, "jax_torch", raising=False)
    monkeypatch.delitem(sys.modules, "nbs_lib.jax_torch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    assert measure.jax_row("jax xla", "forward", 16, 1, 1, 8, "cpu")["error"] == "ModuleNotFoundError: this lesson needs jax"


# findings

WHERE = {"torch": "2.11", "device": "H100", "cuda": "13.0", "jax": "0.11.2", "jaxlib": "0.11.2"}


def speeds(way, times): return [{"way": way, "passes": "both", "s": s, "seconds": t} for s, t in times.items()]


def test_findings_follow_the_rows(monkeypatch):
    equal = [{"case": "a", "way": w, "outcome": o, "worst": 0.1, "detail": ""} for w, o in
             (("SDPA", "works"), ("jax.nn.dot_product_attention, xla", "works"), ("jax.nn.dot_product_attention, cudnn", "error"))]
    timings = speeds("flex alibi", {512: 2.0, 1024: 1.0}) + speeds("sdpa dense", {512: 1.0, 1024: 3.0}) + speeds("sdpa causal", {512: 0.5, 1024: 0.5})
    parts = {"limits": [row("a", "works"), row("b", "error"), row("c", "not run")], "equal": equal, "torch": timings}
    file = {name: {"provenance": WHERE, "rows": rows} for name, rows in parts.items()}
    monkeypatch.setattr(measure, "measurements", lambda device: file if device == "h100" else None)
    found = {(f["claim"], f["device"]): f for f in biases.findings()}
    said = {key: f["verdict"] for key, f in found.items()}
    assert said == {("flex_attention: gradients become NaN", "H100, compiled"): "only when tried with b",
                    ("JAX's attention takes a bias", "H100, xla"): "holds", ("JAX's attention takes a bias", "H100, cudnn"): "false",
                    ("a custom bias in PyTorch needs flex_attention", "H100"): "false",
                    ("flex_attention is faster than SDPA with a dense bias", "H100, compiled"): "only when s is 1,024",
                    ("a bias in flex_attention costs no time over flash", "H100, compiled"): "false"}
    assert all(f["versions"] == "torch 2.11, jax 0.11.2, jaxlib 0.11.2" and f["because"].endswith(".") for f in found.values())


def test_committed_findings_are_of_known_kinds():
    for f in biases.findings():
        assert set(f) == {"claim", "verdict", "because", "versions", "device"} and "not run" not in f["because"]
        assert f["verdict"] in ("holds", "no longer", "false") or f["verdict"].startswith("only when")


@pytest.mark.parametrize("call,words", [
    (lambda: alibi_slopes(0), "heads is 0"), (lambda: alibi_slopes(2.0), "heads is 2.0"), (lambda: documents(7), "s is 7"),
    (lambda: Case("x", terms=("rope",)), "terms has 'rope'"), (lambda: Case("x", learned=("table",)), "learned has 'table'"),
    (lambda: Case("x", mask="full"), "mask has 'full'"), (lambda: Case("x", masked_by="bias"), "masked_by has 'bias'"),
    (lambda: trial(ALIBI, "fast"), "how is 'fast'"), (lambda: verdict([]), "rows is empty"),
    (lambda: work("flash", 1, 1, 128, 64, False), "way is 'flash'"), (lambda: biases.measurements("tpu"), "device is 'tpu'")])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words) as e: call()
    assert "accepted" in str(e.value) and "\n" not in str(e.value)
