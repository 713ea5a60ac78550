"""The course's GPT against transformers', and the ladder's rungs against the first: same loss, same gradients."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nbs_lib.gpt import GPT, GPTConfig, batches, load_gpt2, ours, text, train
from nbs_lib.ladder import (ALTERNATIVES, LADDER, RUNGS, Fp8Linear, LinearCrossEntropy, Masters, cross_entropy_, flops_per_token, fp8_product,
                            mfu, model_for, per_logit, predicted, to_fp8, trainer, weights)
from nbs_lib.models import arch

SIZES = dict(layers=2, heads=4, hidden=64, context=32)
RATES = dict(fp32=50e12, tf32=350e12, bf16=650e12, fp8=1000e12, flash=300e12, cudnn=400e12, copy=2.9e12)


def test_gpt2_124m_is_transformers_gpt2():
    """Full size: logits and every gradient, with weights large enough that nothing is nearly linear."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    for name, p in theirs.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
    mine = load_gpt2(GPT(), theirs.state_dict())
    assert mine.parameter_count == arch("gpt2").parameters
    ids = torch.randint(0, 50257, (1, 48))
    reference = theirs(ids, labels=ids)
    with torch.no_grad():
        logits = mine(ids)
    assert (logits - reference.logits).abs().max() < 1e-5 * reference.logits.abs().max()
    reference.loss.backward()
    mine(ids[:, :-1], ids[:, 1:]).backward()
    gradients = {ours(n): p.grad for n, p in theirs.named_parameters()}
    for name, p in mine.named_parameters():
        g = gradients[name].t() if name.startswith("blocks") and p.dim() == 2 else gradients[name]
        assert (p.grad - g).norm() < 1e-5 * g.norm(), name


@pytest.mark.parametrize("bias", [True, False])
def test_attention_both_ways(bias):
    torch.manual_seed(0)
    plain = GPT(GPTConfig(vocab=50, bias=bias, attention="plain", **SIZES))
    fused = GPT(GPTConfig(vocab=50, bias=bias, **SIZES))
    fused.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 50, (3, 32))
    assert torch.allclose(plain(ids), fused(ids), atol=1e-5)


def test_a_shorter_sequence_and_a_longer_one():
    model = GPT(GPTConfig(vocab=50, **SIZES))
    assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 50)
    with pytest.raises(ValueError, match="33 tokens.*32"):
        model(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize("bad", [dict(layers=0), dict(heads=5), dict(hidden=True), dict(vocab=1.5), dict(attention="flash")])
def test_sizes_that_cannot_be(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        GPTConfig(**bad)


def test_training_learns_more_than_letter_counts():
    torch.manual_seed(0)
    losses = train(GPT(GPTConfig(vocab=128, **SIZES)), batches(text(), 16, 32), steps=120, lr=3e-3)
    assert abs(losses[0] - math.log(128)) < 0.1 and sum(losses[-10:]) / 10 < 3.1


def test_batches_are_windows_of_the_text_and_repeat_by_seed():
    tokens = torch.arange(1000)
    (ids, targets), (again, _) = next(batches(tokens, 4, 16, seed=3)), next(batches(tokens, 4, 16, seed=3))
    assert torch.equal(ids, again) and torch.equal(ids + 1, targets) and torch.equal(ids[:, 1:], targets[:, :-1])


# the ladder

@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_linear_cross_entropy_is_cross_entropy(chunk):
    torch.manual_seed(0)
    x, w, targets = torch.randn(64, 32, requires_grad=True), torch.randn(200, 32, requires_grad=True), torch.randint(0, 200, (64,))
    F.cross_entropy(x @ w.t(), targets).mul(3).backward()
    expected, x.grad, w.grad = (x.grad, w.grad), None, None
    loss = LinearCrossEntropy.apply(x, w, targets, chunk, False)
    loss.mul(3).backward()
    assert abs(loss - F.cross_entropy(x @ w.t(), targets)) < 1e-5
    for g, e in zip((x.grad, w.grad), expected):
        assert (g - e).norm() < 1e-5 * e.norm()


@pytest.mark.parametrize("vocab", [100, 4096, 5000, 50304])
def test_the_triton_kernel_interpreted(vocab, monkeypatch):
    """What the GPU runs, on the CPU by Triton's interpreter, where Triton is installed."""
    pytest.importorskip("triton")
    code = f"""
import torch, nbs_lib.ladder as L
torch.manual_seed(0)
z, t = torch.randn(3, {vocab})*4, torch.randint(0, {vocab}, (3,))
mine, theirs, loss, expected = z.clone(), z.clone(), torch.full((3,), torch.nan), torch.empty(3)
L._cross_entropy_kernel[(3,)](mine, t, loss, 0.5, {vocab}, BLOCK=4096, num_warps=4)
L.cross_entropy_(theirs, t, expected, 0.5)
assert (loss - expected).abs().max() < 1e-5 and (mine - theirs).norm() < 1e-5*theirs.norm()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


def test_cross_entropy_in_place_leaves_a_gradient():
    z, targets, losses = torch.randn(5, 9), torch.randint(0, 9, (5,)), torch.full((5,), torch.nan)
    before = z.clone()
    cross_entropy_(z, targets, losses, 1.0)
    assert torch.allclose(losses, F.cross_entropy(before, targets, reduction="none"), atol=1e-6)
    assert z.sum(-1).abs().max() < 1e-6  # softmax sums to 1, and so does the one-hot row


def test_masters_is_adamw():
    """In fp32 the hand-written AdamW does what PyTorch's does."""
    torch.manual_seed(0)
    a = GPT(GPTConfig(vocab=50, bias=False, **SIZES))
    b = GPT(GPTConfig(vocab=50, bias=False, **SIZES))
    b.load_state_dict(a.state_dict())
    b.bfloat16 = lambda: b  # stay in fp32
    data = batches(torch.randint(0, 50, (1000,)), 4, 32)
    run = [trainer(replace(LADDER[0], optimizer=o), m, lr=1e-2) for o, m in (("foreach", a), ("masters", b))]
    for _, (ids, targets) in zip(range(5), data):
        losses = [float(step(ids, targets)) for step in run]
        assert abs(losses[0] - losses[1]) < 1e-4
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.allclose(p, q, atol=1e-4)


def test_masters_keep_what_bf16_forgets():
    model = GPT(GPTConfig(vocab=50, bias=False, **SIZES))
    before = [p.detach().clone() for p in model.parameters()]
    masters = Masters(model, 1e-3, compiled=False)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()) and model.head.weight is model.tokens.weight
    assert all(torch.equal(w, p) and w.dtype == torch.float32 for (w, _, _), p in zip(masters.states, before))


def test_fp8_products_are_off_by_the_rounding_of_three_bits():
    torch.manual_seed(0)
    x, w = torch.randn(64, 256), torch.randn(128, 256) * 0.02
    error = (fp8_product(x.bfloat16(), w.bfloat16()).float() - x @ w.t()).norm() / (x @ w.t()).norm()
    assert 0.01 < error < 0.05
    assert to_fp8(torch.tensor([1e6, -1e6]), 1.0).float().tolist() == [448.0, -448.0]


@pytest.mark.parametrize("both", [False, True])
def test_fp8_linear_gradients(both):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False).bfloat16()
    x = torch.randn(2, 32, 64, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(2, 32, 48, dtype=torch.bfloat16) / 64
    linear(x).backward(dy)
    expected, x.grad, dw, linear.weight.grad = x.grad, None, linear.weight.grad, None
    Fp8Linear(linear, both)(x).backward(dy)
    assert (x.grad - expected).norm() < (0.1 if both else 0.01) * expected.norm()
    assert (linear.weight.grad - dw).norm() < 0.01 * dw.norm()


def losses_of(rung, compiled="", vocab=128, steps=10):
    model = model_for(rung, weights(vocab=128, **SIZES), vocab=vocab, **SIZES)
    step = trainer(replace(rung, compiled=compiled if rung.compiled else "", chunk=100), model, lr=3e-3)
    return [float(step(*d)) for _, d in zip(range(steps), batches(text(), 8, 32))]


@pytest.fixture(scope="module")
def first():
    return losses_of(LADDER[0])


@pytest.mark.parametrize("rung", [r for r in LADDER if not r.fp8], ids=lambda r: r.name)
def test_every_rung_trains_the_same_model(rung, first):
    losses = losses_of(rung)
    assert first[0] - first[-1] > 1 and abs(losses[0] - first[0]) < 0.002 and abs(losses[-1] - first[-1]) < 0.02


def test_fp8_trains_nearly_the_same(first):
    """Emulated on this CPU, and slow there: the last rung only."""
    losses = losses_of(RUNGS["fp8"], steps=4)
    assert abs(losses[0] - first[0]) < 0.01 and abs(losses[3] - first[3]) < 0.05


@pytest.mark.parametrize("name", ["padded", "fused_loss"])
def test_rungs_can_be_traced(name, first):
    """torch.compile's front end takes the step as one graph; the compiler itself is left to the GPU."""
    losses = losses_of(RUNGS[name], "aot_eager")
    assert abs(losses[-1] - first[-1]) < 0.02


def test_padding_adds_classes_that_nothing_trains():
    plain, padded = losses_of(LADDER[0]), losses_of(LADDER[0], vocab=129)
    assert 0 < padded[0] - plain[0] < 1.1 * math.log(129 / 128)


def test_flops_are_the_design_s():
    a, c = arch("gpt2"), GPTConfig()
    assert flops_per_token(c, 1024, causal=False) == 6 * a.matmul_parameters + 12 * a.layers * a.hidden * 1024
    assert 0.41 < mfu(485_000, causal=False) < 0.43  # what nanoGPT reached, by its own count


def test_each_rung_is_named_once_and_predicted_no_slower():
    names = [r.name for r in LADDER + ALTERNATIVES]
    assert len(names) == len(set(names)) == len(RUNGS)
    times = [sum(predicted(r, RATES).values()) for r in LADDER]
    assert all(b <= a for a, b in zip(times, times[1:])) and times[0] > 10 * times[-1]
    assert all(t > 0 for r in RUNGS.values() for t in predicted(r, RATES).values())
    assert per_logit(RUNGS["fused_loss"]) < per_logit(RUNGS["compile"]) < per_logit(RUNGS["fp32"])


def test_the_script_walks_through_without_a_gpu(tmp_path):
    out = tmp_path / "ladder.json"
    command = [sys.executable, "-m", "nbs_lib.course.ladder", "--dry-run", "--out", str(out), "--batch", "2", "--steps", "2", "--rungs", "sdpa"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [r["name"] for r in rows] == ["sdpa"] and all(len(r["losses"]) == 10 and r["tokens_per_second"] > 0 for r in rows)
    assert list(tmp_path.iterdir()) == [out]


def test_the_script_refuses_for_people():
    command = [sys.executable, "-m", "nbs_lib.course.ladder", "--rungs"]
    assert "'fp16' is not known" in subprocess.run([*command, "fp16"], capture_output=True, text=True).stderr
    assert "--nanogpt PATH" in subprocess.run([*command, "nanogpt"], capture_output=True, text=True).stderr
