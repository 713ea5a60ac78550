"""Step time: bounds on the measured rows, physics over random settings, errors for people."""
import json
import statistics
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbs_lib.hardware import gpu, gpus
from nbs_lib.kernels import card
from nbs_lib.memory import measurements
from nbs_lib.models import arch
from nbs_lib.roofline import WHY, Clock, decode_time, step_flops, train_time

ROWS = [r for r in measurements() if r["kind"] == "train" and "seconds" in r]


def error(r): return abs(100*(train_time(**r["settings"]).seconds/r["seconds"] - 1))


def test_step_times_on_one_h100():
    """Nothing is fitted to these rows. The issue's goal is a median of 10% and a worst of 30%; host-bound steps miss the second."""
    e = sorted(error(r) for r in ROWS if r["settings"]["world_size"] == 1)
    assert len(e) >= 135 and statistics.median(e) <= 6 and e[int(0.9*len(e))] <= 22 and e[-1] <= 46


def test_step_times_where_the_gpu_is_busy():
    """Where the host needs less than 70% of the GPU's time."""
    busy = [r for r in ROWS if r["settings"]["world_size"] == 1 and (t := train_time(**r["settings"])).host < 0.7*t.device]
    e = [error(r) for r in busy]
    assert len(e) >= 50 and statistics.median(e) <= 4 and max(e) <= 21


@pytest.mark.parametrize("ranks,rows", [(2, 36), (4, 13)])
def test_step_times_on_several_h100s(ranks, rows):
    """DDP, FSDP2 and the course's ZeRO: median 10%, worst 30%. Offloaded steps are not in it: the host's optimizer is not right yet."""
    e = [error(r) for r in ROWS if r["settings"]["world_size"] == ranks and not r["settings"]["offload"]]
    assert len(e) >= rows and statistics.median(e) <= 8 and max(e) <= 26


def test_one_calibration_step():
    """Another step of the same model and precision as calibration: median 5%."""
    out, first = [], {}
    for r in (r for r in ROWS if r["settings"]["world_size"] == 1):
        known = first.setdefault((r["name"], r["settings"]["precision"]), r)
        if known is not r: out.append(abs(100*(train_time(**r["settings"], calibration=known).seconds/r["seconds"] - 1)))
    assert len(out) >= 85 and statistics.median(out) <= 5


@given(st.sampled_from(["gpt2", "llama-3.2-1b", "qwen3-0.6b", "bert-base-uncased"]), st.integers(1, 24), st.sampled_from([64, 128, 333, 512]),
       st.sampled_from(["fp32", "bf16", "amp_bf16", "amp_fp16"]), st.sampled_from(["adamw", "adamw_fused", "sgd"]), st.booleans(),
       st.sampled_from([g.name for g in gpus() if g.name.startswith(("h", "l", "a1", "rtx"))]))
@settings(max_examples=60, deadline=None)
def test_physics(model, b, s, precision, optimizer, ckpt, name):
    """Never above the datasheet, terms add up, more work never takes less time, recomputing never pays in time."""
    ask = dict(seq=s, precision=precision, optimizer=optimizer, gpu=name)
    t = train_time(model, b, checkpointing=ckpt, **ask)
    assert 0 < t.mfu < 1 and set(t.terms) <= set(WHY) and abs(sum(t.terms.values()) - t.seconds) < 1e-6*t.seconds
    assert train_time(model, b + 8, checkpointing=ckpt, **ask).seconds >= 0.98*t.seconds
    assert train_time(model, b, checkpointing=True, **ask).seconds >= train_time(model, b, checkpointing=False, **ask).seconds
    assert train_time(model, b, checkpointing=ckpt, launch=0.0, **ask).seconds <= t.seconds
    assert t.tokens_per_second == pytest.approx(b*s/t.seconds)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=50))
def test_the_clock_takes_as_long_as_the_slower_of_host_and_gpu(kernels):
    c = Clock()
    for device, host in kernels: c.run("bytes", device, host)
    assert max(sum(d for d, _ in kernels), sum(h for _, h in kernels)) <= c.device + 1e-9
    assert c.device <= sum(d for d, _ in kernels) + sum(h for _, h in kernels) + 1e-9
    assert abs(sum(c.terms.values()) - c.device) < 1e-9


def test_flops_of_mfu():
    """6 for each weight of a product and token, the head once, causal attention halved: counted by hand for GPT-2."""
    h, L, V, s = 768, 12, 50257, 1024
    by_hand = 6*(L*12*h*h + V*h)*s + 6*L*h*s*s
    assert step_flops(arch("gpt2"), 1, s) == by_hand
    assert step_flops(arch("gpt2"), 3, s) == 3*by_hand
    assert step_flops(arch("llama-3.2-1b"), 1, s, lora_rank=8) < 0.75*step_flops(arch("llama-3.2-1b"), 1, s)


def test_more_gpus():
    base = dict(model="llama-3-8b", batch=2, seq=2048, optimizer="adamw_fused", checkpointing=True)
    two, eight = (train_time(**base, strategy="full_shard", world_size=n) for n in (2, 8))
    assert eight.tokens_per_second > 3*two.tokens_per_second and eight.mfu < 1
    for strategy in ("ddp", "shard_grad_op", "zero1", "zero2", "zero3"): assert train_time(**base, strategy=strategy, world_size=4).mfu < 1
    slow = train_time(**base, strategy="full_shard", world_size=8, gpu="rtx-4090")
    assert slow.bound == "communication" or slow.terms["communication"] > 0.2*slow.seconds


def test_decode_reads_every_weight_once():
    """At least the weights over the datasheet's bandwidth, on every card; and batches share it."""
    for g in ("h100-sxm", "l4", "a100-80gb-sxm"):
        for name in ("llama-3-8b", "gpt2", "qwen3-4b"):
            a = arch(name)
            t = decode_time(name, 1, 512, gpu=g)
            assert t["seconds"] > 2*a.matmul_parameters/gpu(g).bandwidth
            assert decode_time(name, 4, 512, gpu=g)["weights"] < 1.6*t["weights"]


def test_unmeasured_cards_say_so():
    assert "not measured" in train_time("gpt2", 1, 128, gpu="l4").basis and "not measured" not in train_time("gpt2", 1, 128).basis
    assert card("h200").memory < 1 == card("h200").compute["bf16"]


@pytest.mark.parametrize("bad,word", [(dict(launch=-1), "launch"), (dict(launch="fast"), "launch"), (dict(gpu="h1000"), "h1000"), (dict(batch=0), "batch"),
                                      (dict(calibration={"oom": {}}), "calibration"), (dict(calibration=3), "calibration"), (dict(world_size=2), "world_size")])
def test_errors_are_for_people(bad, word):
    with pytest.raises(ValueError, match=word):
        train_time(**{**dict(model="gpt2", batch=1, seq=128), **bad})


def test_it_needs_the_standard_library_only():
    found = subprocess.run([sys.executable, "-S", "-c", "import sys; sys.path.insert(0, '.'); import nbs_lib.roofline, nbs_lib.verdict, json; "
                            "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'fastcore', 'nbdev', 'rich', 'matplotlib'})))"],
                           capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen3-0.6b", "qwen2.5-0.5b", "gpt2", "mistral-7b-v0.1"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_cost_the_host_time_in_every_model(model, checkpointing):
    """Two more products in each adapted layer, and their backward, are started one by one."""
    settings = dict(batch=1, seq=128, optimizer="sgd", checkpointing=checkpointing)
    assert train_time(model, lora_rank=8, **settings).host > 1.1*train_time(model, **settings).host
