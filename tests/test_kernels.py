"""Kernels of a step: their number beside what PyTorch runs, their time beside an H100's profile, and what a card makes of them."""
import copy
import json
import math
import statistics
from collections import Counter

import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nbs_lib.card import tiny
from nbs_lib.course.measure.built import build
from nbs_lib.hardware import gpus
from nbs_lib.kernels import (CLASSES, DTYPE, Card, Grid, achieved, between, busy, card, kernels, moved, profiled, read_card, rising,
                             seconds)
from nbs_lib.memory import PRECISIONS
from nbs_lib.models import arch
from nbs_lib.tape import value

H100 = card("h100-sxm")


# the list of kernels beside PyTorch's own -----------------------------------------------------------------------------------------
class Started(TorchDispatchMode):
    """Counts operations that start a kernel: those whose result is new memory, or that write into what they are given.

    slice_backward is two, as on a GPU: it fills a tensor with zeros, then copies into a part of it.
    """

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        given_, made = ([t.untyped_storage().data_ptr() for t in tree_leaves(x) if isinstance(t, torch.Tensor)]
                        for x in ((args, kwargs), out))
        name = f._schema.name.removeprefix("aten::")
        if made and not name.startswith(("empty", "new_empty")) and (f._schema.is_mutable or set(made) - set(given_)):
            self.ops[name] += 1 + (name == "slice_backward")
        return out


def started(config, precision, attention, checkpointing, lora_rank):
    """Operations of a forward and of a backward pass on the CPU."""
    model = build(arch(config), "bfloat16" if precision == "bf16" else "float32", "cpu", attention, checkpointing, lora_rank)
    ids = torch.randint(0, 512, (2, 16))
    with Started() as forward, torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp_bf16"):
        loss = model(input_ids=ids, labels=ids).loss
    with Started() as backward: loss.backward()
    return forward.ops, backward.ops


NO_DROPOUT = {"gpt2": dict(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0),           # three operations on a CPU
              "bert": dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)}
# Left out is what a CPU does in another way: autocast's casts around LayerNorm, and fused attention where heads share keys
SAME = [(kind, precision, "eager", checkpointing, None) for kind in ("llama", "qwen3")
        for precision in ("fp32", "bf16", "amp_bf16") for checkpointing in (False, True)]
SAME += [(kind, precision, attention, checkpointing, None) for kind in ("gpt2", "bert") for precision in ("fp32", "bf16")
         for attention in ("eager", "sdpa") for checkpointing in (False, True)]
SAME += [(kind, "bf16", "eager", checkpointing, 8) for kind in ("llama", "gpt2") for checkpointing in (False, True)]



@pytest.mark.parametrize("kind,precision,attention,checkpointing,lora", SAME)
def test_a_block_starts_the_kernels_that_pytorch_starts(kind, precision, attention, checkpointing, lora):
    """Three blocks less two blocks is one block, on both sides; forward and backward are exact."""
    config = [tiny(kind, n) | NO_DROPOUT.get(kind, {}) for n in (3, 2)]
    (f3, b3), (f2, b2) = (started(c, precision, attention, checkpointing, lora) for c in config)
    found = kernels(arch(config[0]), *PRECISIONS[precision], attention, False, lora, False, checkpointing)
    print(dict(f3 - f2), Counter(k.kind for k in found["f1"]), dict(b3 - b2), Counter(k.kind for k in found["b1"]))
    assert len(found["f1"]) == sum((f3 - f2).values())
    assert len(found["b1"]) == sum((b3 - b2).values())


def test_a_block_of_mixtral_is_short_by_its_routing_only():
    """Some ten small kernels that sort and count are missing, as the chapter says."""
    (f3, _), (f2, _) = (started(tiny("mixtral", n), "bf16", "eager", False, None) for n in (3, 2))
    assert 0 < sum((f3 - f2).values()) - len(kernels(arch(tiny("mixtral", 3)), 2, 2, "eager")["f1"]) <= 12


@pytest.mark.parametrize("precision", ["bf16", "amp_bf16"])
def test_fused_attention_with_shared_keys_is_one_kernel_of_the_forward_pass(precision):
    (f3, _), (f2, _) = (started(tiny("llama", n), precision, "sdpa", False, None) for n in (3, 2))
    assert sum((f3 - f2).values()) == len(kernels(arch(tiny("llama", 3)), *PRECISIONS[precision], "sdpa")["f1"])


def test_accumulation_adds_one_kernel_for_each_gradient():
    a = arch("llama-3.2-1b")
    once, again = (kernels(a, 2, 2, accumulating=more)["b1"] for more in (False, True))
    assert len(again) - len(once) == 9                         # seven matrices and two norms of a block


# times beside a real H100's -------------------------------------------------------------------------------------------------------
def test_busy_time_of_nine_profiled_steps():
    """Nothing is fitted: microbenchmarks on one side, real steps on the other. Each total within 10%, the median within 5%."""
    off, products = [], []
    for row in profiled()["rows"]:
        s = dict(row["settings"])
        mine, ms = busy(arch(s.pop("model")), **s), row["milliseconds"]
        assert set(mine) == set(ms) == set(CLASSES)
        off.append(abs(1e3*sum(mine.values())/sum(ms.values()) - 1))
        products.append(abs(1e3*mine["product"]/ms["product"] - 1))
    assert len(off) == 9 and max(off) < 0.10 and statistics.median(off) < 0.05
    assert max(products) < 0.08 and statistics.median(products) < 0.03


def test_the_profile_carries_its_provenance():
    p = profiled()["provenance"]
    assert p["device"] == "NVIDIA H100 80GB HBM3" and {"driver", "torch", "transformers", "date", "command"} <= set(p)


# what a card makes of sizes -------------------------------------------------------------------------------------------------------
KINDS = sorted({k.removesuffix(" bf16") for k in achieved()["moves"] if k.endswith("bf16")})
SIDE = st.integers(1, 300_000)


@given(st.sampled_from(KINDS), st.sampled_from([2, 4]), st.integers(1, 2**36), st.integers(0, 2**36))
def test_more_bytes_never_take_less(kind, e, size, more):
    assert 0 < H100.move(kind, e, size) <= H100.move(kind, e, size + more)*(1 + 1e-9)


@given(st.sampled_from([2, 4]), SIDE, SIDE, SIDE, st.sampled_from([0, 1, 2]), st.integers(1, 8))
def test_larger_products_take_longer_but_for_tiles(e, m, n, k, which, times):
    """A larger matrix may fit the tiles better: on this card by a third at most."""
    size = [m, n, k]
    small = H100.product(e, "nt", *(64*x for x in size))
    size[which] *= times
    assert 0 < small <= H100.product(e, "nt", *(64*x for x in size))*1.33


@given(st.sampled_from(["nt", "nn", "tn"]), SIDE, SIDE, SIDE)
def test_rows_that_begin_anywhere_never_help(layout, m, n, k):
    m, n, k = (max(64, x - x % 8) for x in (m, n, k))
    aligned = H100.product(2, layout, m, n, k)
    assert H100.product(2, layout, m + 1, n + 1, k + 1) >= aligned*0.75
    assert H100.product(2, layout, m, n, k, 3) == pytest.approx(3*aligned)


@given(st.sampled_from(["causal", "full"]), st.sampled_from([2, 4]), st.integers(1, 4096), st.integers(16, 2**17), st.sampled_from([32, 64, 128, 256]))
def test_attention_grows_with_heads_and_length(kind, e, heads, s, d):
    for backward in (False, True):
        t = H100.attention(kind, e, heads, s, d, backward)
        assert 0 < t <= 1.2*H100.attention(kind, e, 2*heads, s, d, backward) and t <= 1.2*H100.attention(kind, e, heads, 2*s, d, backward)
    assert H100.attention(kind, e, 64, 2**17, 64, False) == pytest.approx(4*H100.attention(kind, e, 64, 2**16, 64, False), rel=0.01)


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1e-6, 1)), min_size=1, max_size=8, unique_by=lambda p: p[0]), st.floats(0.1, 1e12), st.floats(1, 100))
def test_a_curve_made_to_rise_is_read_as_one(points, x, times):
    curve = rising(points)
    assert [p[0] for p in curve] == sorted(p[0] for p in points) and all(t <= dict(points)[n] for n, t in curve)
    assert between(curve, x) <= between(curve, x*times)*(1 + 1e-9)
    assert all(between(curve, n) == pytest.approx(t) for n, t in curve)


def test_a_product_that_was_measured_takes_what_was_measured():
    for dtype, e in (("bf16", 2), ("fp32", 4)):
        rows = achieved()["matmul"][f"{dtype} nt"]
        assert all(H100.product(e, "nt", m, n, k) == pytest.approx(t, rel=1e-6) for m, n, k, t in rows)


def test_a_side_left_out_is_predicted_from_its_neighbours():
    """Gaps four times as wide as the library has to bridge."""
    rows = achieved()["matmul"]["bf16 nt"]
    for out in (1024, 2048, 4096, 8192):
        grid = Grid([r for r in rows if out not in r[:3]])
        off = sorted(abs(grid.at(*r[:3])/r[3] - 1) for r in rows if out in r[:3] and 2*r[0]*r[1]*r[2] > 1e10)
        assert statistics.median(off) < 0.05 and off[len(off)*9//10] < 0.10


# other cards ----------------------------------------------------------------------------------------------------------------------
CUDA = [g for g in gpus() if g.capability]


@given(st.sampled_from(CUDA), st.sampled_from([4096, 8192, 16384]), st.sampled_from([2, 4]))
def test_an_unmeasured_card_keeps_the_shares_of_its_datasheet(g, size, e):
    """Large products by operations, products of one row and movers by bytes."""
    c, dtype = card(g), DTYPE[e]
    bandwidth = pytest.approx(H100.gpu.bandwidth/g.bandwidth)
    assert c.product(e, "nt", size, size, size)/H100.product(e, "nt", size, size, size) == pytest.approx(H100.gpu.flops[dtype]/g.flops[dtype])
    assert c.product(2, "nt", 1, size, size)/H100.product(2, "nt", 1, size, size) == bandwidth
    assert c.move("binary", e, size**2)/H100.move("binary", e, size**2) == bandwidth
    assert ("measured on" in c.basis) == (g.name == "h100-sxm") and (g.name == "h100-sxm" or c.basis.startswith("not measured"))


@given(st.sampled_from(CUDA), st.sampled_from([2, 4]), SIDE, SIDE, SIDE)
def test_no_product_beats_the_operations_of_a_datasheet(g, e, m, n, k):
    assert card(g).product(e, "nt", m, n, k) > 2*m*n*k/g.flops[DTYPE[e]]*0.99


def test_what_is_no_cuda_card_is_refused():
    with pytest.raises(ValueError, match="no CUDA device"): card("tpu-v5e")
    with pytest.raises(ValueError, match="not in the table"): card("h1000")


def test_read_card(tmp_path):
    """Your own file is read; a wrong one is named, and what it lacks."""
    found = copy.deepcopy(achieved())
    del found["collectives"]
    found["provenance"]["device"] = "my card"
    (tmp_path/"mine.json").write_text(json.dumps(found))
    mine = read_card(str(tmp_path/"mine.json"), "h200")
    assert mine.gpu.name == "h200" and "measured on my card" in mine.basis
    assert mine.product(2, "nt", 4096, 4096, 4096) == H100.product(2, "nt", 4096, 4096, 4096)
    assert mine.collective("all_reduce", 2, 2**20) > 0
    del found["matmul"]
    for name, text, word in (("half.json", json.dumps(found), "matmul"), ("text.json", "a card", "no file"), ("list.json", "[]", "no file")):
        (tmp_path/name).write_text(text)
        with pytest.raises(ValueError, match=word) as e: read_card(str(tmp_path/name), "h200")
        assert name in str(e.value)
    with pytest.raises(ValueError, match="absent"): read_card(str(tmp_path/"absent.json"), "h200")


def test_the_host_s_optimizers_with_and_without_a_measurement():
    """Where only AdamW was measured, time goes with the numbers read and written; a measurement goes first."""
    plain = copy.deepcopy(achieved())
    plain["links"] = {k: x for k, x in plain["links"].items() if not k.startswith("host") or "adamw " in k}
    on = Card(H100.gpu, plain)
    assert on.host_optimizer("adamw", 2) == plain["links"]["host adamw bf16, parameters/s"]
    assert on.host_optimizer("sgd", 2) == pytest.approx(on.host_optimizer("adamw", 2)*7/3)
    plain["links"]["host sgd bf16, parameters/s"] = 7e9
    assert on.host_optimizer("sgd", 2) == 7e9 and on.host_optimizer("sgd_momentum", 4) > on.host_optimizer("adamw", 4)


def test_seconds_of_every_kernel_of_every_kind_of_model():
    """No kind is missing from the card's file."""
    for name in ("gpt2", "bert-base-cased", "llama-3-8b", "qwen3-0.6b", "mixtral-8x7b"):
        a = arch(name)
        for precision, attention in ((p, x) for p in PRECISIONS for x in ("sdpa", "eager")):
            for place, found in kernels(a, *PRECISIONS[precision], attention, checkpointing=True).items():
                assert found and all(seconds(k, 1024, 512, a, H100) > 0 for k in found), (name, precision, place)
                assert all(moved(k, 1024, 512) > 0 for k in found if not k.kind.startswith(("product", "attention")))


def test_experts_share_the_tokens():
    """All experts' products together are those of a dense model with as many rows as tokens × experts per token."""
    a, T = arch("mixtral-8x7b"), 4096
    for place in ("f1", "b1"):
        grouped = [k for k in kernels(a, 2, 2)[place] if k.groups > 1]
        work = sum(2*math.prod(value(size, T, 1024) for size in k.sizes) for k in grouped)
        assert {k.groups for k in grouped} == {8} and work == (1 if place == "f1" else 2)*2*3*a.hidden*a.ffn*T*a.experts_per_token
