"""Mixed precision by hand: equal to PyTorch's autocast, GradScaler and AdamW; and the facts behind it."""
from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nbs_lib import mixed
from nbs_lib.gpt import GPT, GPTConfig, batches, text
from nbs_lib.mixed import (FP32, LOW, PRECISIONS, WEIGHTS, AdamW, Autocast, GradScaler, MasterWeights, Ops, accumulate, gradients,
                           kahan_sum, measurements, mixed_step, pairwise, predicted_error, shares, speed, swallowed_share,
                           timed_steps)
from nbs_lib.precision import FORMATS

TINY = GPTConfig(layers=1, heads=2, hidden=32, vocab=128, context=16)
LOWS = (torch.bfloat16, torch.float16)
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def gpt(seed: int = 0, attention: str = "sdpa") -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(layers=1, heads=2, hidden=32, vocab=128, context=16, attention=attention))


def equal(a, b) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


# --- autocast -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", LOWS)
@pytest.mark.parametrize("attention", ["sdpa", "plain"])
def test_autocast_trains_to_the_same_bits_as_torchs_by_the_same_operations(dtype, attention):
    def run(context):
        model, data = gpt(attention=attention), batches(text(), 2, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with Ops() as ops: losses = [mixed_step(model, *next(data), optimizer, context())]
        losses += [mixed_step(model, *next(data), optimizer, context()) for _ in range(49)]
        return ops.seen, losses, [p.grad for p in model.parameters()], [p.detach() for p in model.parameters()]

    ours, theirs = run(lambda: Autocast("cpu", dtype)), run(lambda: torch.autocast("cpu", dtype))
    assert ours[0] == theirs[0]
    assert all(map(equal, ours[1:], theirs[1:]))
    assert any(dtype in k[2] for k in ours[0]) and any(torch.float32 in k[2] for k in ours[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", LOWS)
def test_on_a_gpu_the_same_operations_run_in_the_same_dtypes(dtype):
    """Only the first loss has to be the same to the bit: kernels of the backward pass may add in any order."""
    def run(context):
        model, (ids, targets) = gpt(attention="plain").cuda(), next(batches(text(), 2, 16))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with Ops() as ops: return mixed_step(model, ids.cuda(), targets.cuda(), optimizer, context), ops.seen

    ours, theirs = run(Autocast("cuda", dtype)), run(torch.autocast("cuda", dtype))
    assert ours[1] == theirs[1] and torch.equal(ours[0], theirs[0])


X, Y = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))
CALLS = {
    "matmul": lambda x, y: x @ y, "mm": lambda x, y: torch.mm(x[0], y[0]), "bmm": torch.bmm, "linear": lambda x, y: F.linear(x, y[0]),
    "addmm": lambda x, y: torch.addmm(x[0], x[1], y[0]), "baddbmm": lambda x, y: torch.baddbmm(x, x, y),
    "einsum": lambda x, y: torch.einsum("bij,bkj->bik", x, y), "sdpa": lambda x, y: F.scaled_dot_product_attention(x, y, y),
    "conv1d": lambda x, y: F.conv1d(x, y), "softmax": lambda x, y: x.softmax(-1), "layer_norm": lambda x, y: F.layer_norm(x, (8,)),
    "exp": lambda x, y: x.exp(), "gelu": lambda x, y: F.gelu(x), "add": lambda x, y: x + y, "sum": lambda x, y: x.sum(-1),
    "pow": lambda x, y: x**2, "mse_loss": F.mse_loss, "l1_loss": F.l1_loss, "prod": lambda x, y: x.prod(-1), "cdist": torch.cdist,
    "cross_entropy": lambda x, y: F.cross_entropy(x[0], y[0].softmax(-1)), "kl_div": lambda x, y: F.kl_div(x, y.exp(), reduction="sum"),
    "named dtype": lambda x, y: x.prod(-1, dtype=torch.bfloat16), "double": lambda x, y: x.double() @ y.double(),
    "out": lambda x, y: torch.bmm(x, y, out=torch.empty_like(x)), "in place": lambda x, y: x.clone().baddbmm_(x, y),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("given_dtype", [torch.float32, torch.bfloat16])
def test_each_function_gives_what_it_gives_under_torch_autocast(name, given_dtype):
    x, y = X.to(given_dtype), Y.to(given_dtype)
    with torch.autocast("cpu", torch.bfloat16): theirs = CALLS[name](x, y)
    with Autocast("cpu", torch.bfloat16): ours = CALLS[name](x, y)
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_a_weight_is_cast_once_and_its_gradient_is_fp32():
    w, x = nn.Parameter(torch.randn(8, 8)), torch.randn(3, 8)

    def casts(context):
        w.grad = None
        with Ops() as ops, context: out = F.linear(F.linear(x, w), w).float().sum()
        out.backward()
        return sum(n for k, n in ops.seen.items() if k[0] == "aten._to_copy.default" and k[2] == (torch.bfloat16,)), w.grad.clone()

    (ours, mine), (theirs, torchs) = casts(Autocast()), casts(torch.autocast("cpu", torch.bfloat16))
    assert ours == theirs == 2                       # the weight, which is used twice, and the input
    assert mine.dtype == torch.float32 and torch.equal(mine, torchs)
    with Autocast() as a:
        F.linear(x, w)
        assert len(a.copies) == 1
    assert not a.copies                              # a later step must not see an old weight


def test_a_copy_made_without_a_graph_is_not_kept_for_those_that_need_one():
    w, x = nn.Parameter(torch.randn(8, 8)), torch.randn(3, 8)
    with Autocast():
        with torch.no_grad(): F.linear(x, w)
        F.linear(x, w).float().sum().backward()
    assert w.grad is not None and w.grad.abs().sum() > 0


def header() -> str:
    return (Path(torch.__file__).parent/"include/ATen/autocast_mode.h").read_text()


def macro(name: str) -> set[str]:
    found = re.search(rf"#define {name}\(_\)((?:.*\\\n)*.*)", header())
    return set(re.findall(r"_\((?:ADD_NS\()?(\w+)", found[1]))


@pytest.mark.skipif("AT_FORALL_FP32(" not in header(), reason="this torch's header has no lists")
def test_the_lists_are_those_that_torch_was_built_with():
    fp32 = macro("AT_FORALL_FP32") | macro("AT_FORALL_FP32_SET_OPT_DTYPE") | macro("AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE")
    assert LOW - macro("AT_FORALL_LOWER_PRECISION_FP") == set()
    # cross_entropy is log_softmax and nll_loss; __rpow__ is pow; older versions list no rms_norm
    assert FP32["cuda"] - fp32 <= {"cross_entropy", "rpow", "rms_norm"} and {"log_softmax", "nll_loss", "pow"} <= fp32


def test_the_cpus_list_has_no_softmax_and_no_norm():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ("softmax.int", "layer_norm", "exp"):
        assert has(f"aten::{op}", "AutocastCUDA") and not has(f"aten::{op}", "AutocastCPU")
    assert not FP32["cpu"] & {"softmax", "layer_norm", "exp"}
    for name in sorted(LOW - {"einsum"}):             # einsum has no rule on a CPU: the bmm in it has
        overload = {"conv_transpose2d": ".input", "conv_transpose3d": ".input"}.get(name, "")
        assert has(f"aten::{name}{overload}", "AutocastCPU"), name


@pytest.mark.parametrize("wrong", [dict(device="tpu"), dict(dtype=torch.float32), dict(dtype=torch.float64)])
def test_autocast_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) + ".*accepted"): Autocast(**wrong)


# --- loss scaling ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 7, 20, -9])
def test_a_power_of_two_changes_no_bit_of_an_fp32_gradient(k):
    model, (ids, targets) = gpt(), next(batches(text(), 2, 16))
    plain, larger = gradients(model, ids, targets), gradients(model, ids, targets, scale=2.0**k)
    assert plain and equal(larger.values(), [g*2.0**k for g in plain.values()])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.integers(-20, 20))
def test_shares_are_those_of_torchs_cast(numbers, k):
    g = torch.tensor(numbers)
    found, cast = shares({"one": g[:1], "others": g[1:]}, 2.0**k), (g*2.0**k).half()
    assert found["zero"] == pytest.approx((cast == 0).double().mean().item())
    assert found["infinite"] == pytest.approx((~cast.isfinite()).double().mean().item())
    # what lies just below the smallest normal number rounds up to it
    assert found["subnormal"] >= ((cast != 0) & (cast.abs() < 2.0**-14)).double().mean().item() - 1e-9


def test_fp16_gradients_vanish_without_a_scale_and_come_back_with_one():
    model, (ids, targets) = gpt(), next(batches(text(), 8, 16))

    def flat(*how): return torch.cat([g.flatten() for g in gradients(model, ids, targets, *how).values()])
    g = flat()

    def error(k): return float((flat(torch.float16, 2.0**k)/2.0**k - g).norm()/g.norm())
    assert error(-16) > 0.9 and error(8) < 0.01 and not math.isfinite(error(40))
    tiny = flat(torch.bfloat16, 2.0**-16)
    assert (tiny.half() == 0).double().mean() > 0.4 and (tiny == 0).double().mean() < 0.01      # bf16 has what fp16 loses


def scaled(scaler, get, steps=50, seed=0):
    """50 steps in fp16 with a scaler: scales, weights after each step, moments."""
    model, data = gpt(seed), batches(text(), 2, 16, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scales, weights = [], []
    for _ in range(steps):
        mixed_step(model, *next(data), optimizer, torch.autocast("cpu", torch.float16), scaler)
        scales.append(get())
        weights.append(model.head.weight.detach().clone())
    return scales, weights, [p.detach() for p in model.parameters()], [t for s in optimizer.state.values() for t in s.values()]


@pytest.mark.parametrize("start, growth, backoff, interval", [(2.0**30, 2.0, 0.5, 3), (2.0**16, 2.0, 0.5, 2000), (3.7e7, 1.7, 0.3, 2)])
def test_the_scaler_does_what_torchs_does_for_50_steps(start, growth, backoff, interval):
    mine = GradScaler(start, growth, backoff, interval)
    torchs = torch.amp.GradScaler("cpu", init_scale=start, growth_factor=growth, backoff_factor=backoff, growth_interval=interval)
    ours, theirs = scaled(mine, lambda: mine.factor), scaled(torchs, torchs.get_scale)
    assert ours[0] == theirs[0] and all(map(equal, ours[1:], theirs[1:]))
    if start > 2**16: assert 3 <= sum(torch.equal(a, b) for a, b in zip(ours[1], ours[1][1:])) < 40     # overflows were provoked


@settings(max_examples=60)
@given(st.floats(1e-30, 3e38), st.floats(1.01, 1e6), st.floats(1e-3, 0.99), st.integers(1, 5), st.lists(st.booleans(), max_size=40))
def test_the_scale_follows_torchs_for_any_settings_and_overflows(start, growth, backoff, interval, overflows):
    mine = GradScaler(start, growth, backoff, interval)
    torchs = torch.amp.GradScaler("cpu", start, growth, backoff, interval)
    torchs.scale(torch.ones(()))
    w = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in w]
    for bad in overflows:
        for p, optimizer, scaler in zip(w, optimizers, (mine, torchs)):
            p.grad = torch.tensor([1.0, float("inf" if bad else 2)])
            scaler.step(optimizer)
            scaler.update()
        assert mine.factor == torchs.get_scale() and torch.equal(*w)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_skipped_step_leaves_weights_and_moments_as_they_were(bad):
    model, data = gpt(), batches(text(), 2, 16)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-2), GradScaler(2.0**10)
    mixed_step(model, *next(data), optimizer, scaler=scaler)
    before = [p.detach().clone() for p in model.parameters()] + [t.clone() for s in optimizer.state.values() for t in s.values()]
    scaler.scale(model(*next(data))).backward()
    model.head.weight.grad[0, 0] = bad
    scaler.step(optimizer)
    assert scaler.found_inf
    scaler.update()
    assert scaler.factor == 2.0**9
    assert equal(before, [p.detach() for p in model.parameters()] + [t for s in optimizer.state.values() for t in s.values()])


def test_unscaled_gradients_can_be_clipped_before_the_step():
    model, (ids, targets) = gpt(), next(batches(text(), 2, 16))
    model(ids, targets).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler(2.0**12)
    scaler.scale(model(ids, targets)).backward()
    scaler.unscale_(optimizer)
    assert equal(plain, [p.grad for p in model.parameters()])
    with pytest.raises(RuntimeError, match="twice"): scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert equal(plain, [p.grad for p in model.parameters()])          # not divided once more
    scaler.update()
    with pytest.raises(RuntimeError, match="before step"): scaler.update()


@pytest.mark.parametrize("wrong", [dict(scale=0), dict(scale=math.inf), dict(growth=0.5), dict(backoff=0), dict(backoff=2),
                                   dict(interval=0), dict(interval=2.5), dict(scale=math.nan)])
def test_the_scaler_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) + ".*accepted"): GradScaler(**wrong)


def test_the_scaler_refuses_fp16_gradients_as_torchs_does():
    w = nn.Parameter(torch.ones(2, dtype=torch.float16))
    w.grad = torch.ones_like(w)
    optimizer = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(ValueError, match="float16"): GradScaler().step(optimizer)
    theirs = torch.amp.GradScaler("cpu")
    theirs.scale(torch.ones(()))
    with pytest.raises(ValueError): theirs.step(optimizer)


# --- weights --------------------------------------------------------------------------------------------------------------------

def train(model, optimizer, steps=50):
    data = batches(text(), 2, 16)
    return [mixed_step(model, *next(data), optimizer) for _ in range(steps)]


def test_adamw_on_fp32_weights_is_torchs():
    mine, theirs = gpt(), gpt()
    ours = train(mine, AdamW(mine.parameters(), lr=1e-3, weights="fp32"))
    assert equal(ours, train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-3, foreach=False)))
    assert equal(list(mine.parameters()), list(theirs.parameters()))


def test_adamw_with_masters_is_torchs_on_fp32_copies():
    mine, theirs = gpt().bfloat16(), gpt().bfloat16()
    optimizer = AdamW(mine.parameters(), lr=1e-3, weights="bf16 + fp32 master")
    masters = MasterWeights(theirs, lambda ps: torch.optim.AdamW(ps, lr=1e-3, foreach=False))
    assert equal(train(mine, optimizer), train(theirs, masters))
    assert equal([optimizer.state[p]["master"] for p in mine.parameters()], [m.detach() for m in masters.masters])
    assert equal([m.bfloat16().detach() for m in masters.masters], [p.detach() for p in theirs.parameters()])


def test_masters_leave_frozen_weights_and_missing_gradients_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    model[0].weight.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    masters = MasterWeights(model, lambda ps: torch.optim.SGD(ps, lr=1.0))
    assert len(masters.masters) == 3
    masters.step()
    assert equal(before, [p.detach() for p in model.parameters()])


def test_bf16_weights_under_masters_are_torch_autocasts_fp32_weights():
    """A network of products alone: the cast weight is the same number whether autocast or the optimizer casts it."""
    def mlp(): return nn.Sequential(nn.Linear(8, 32, bias=False), nn.GELU(), nn.Linear(32, 4, bias=False))
    torch.manual_seed(0)
    high, low = mlp(), mlp().bfloat16()
    masters = MasterWeights(low, lambda ps: torch.optim.AdamW(ps, lr=1e-2))
    for p, m, w in zip(high.parameters(), masters.masters, masters.weights):
        m.data.copy_(p.data)
        w.data.copy_(p.data)
    optimizer = torch.optim.AdamW(high.parameters(), lr=1e-2)
    for _ in range(50):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16): out = high(x)
        F.mse_loss(out.float(), x[:, :4]).backward()
        optimizer.step()
        masters.zero_grad()
        F.mse_loss(low(x.bfloat16()).float(), x[:, :4]).backward()
        masters.step()
    assert equal([p.detach() for p in high.parameters()], [m.detach() for m in masters.masters])


def constant_push(weights, start=1.0, lr=1e-4, steps=200, n=2000):
    """Weights that AdamW moves by −lr a step (gradients of 1, no decay): where they are after all steps, and the optimizer."""
    p = nn.Parameter(torch.full((n,), start, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=lr, weight_decay=0.0, weights=weights)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p.detach().double(), optimizer


def test_small_updates_vanish_in_bf16_and_arrive_with_each_of_the_three_cures():
    target = 1 - 200*1e-4                            # 0.98; each update is 2.5% of the step between bf16 numbers below 1
    stuck, optimizer = constant_push("bf16")
    assert (stuck == 1).all() and optimizer.swallowed == 1
    for cure in ("bf16 + fp32 master", "bf16 Kahan"):
        found, optimizer = constant_push(cure)
        assert (found - target).abs().max() <= 2.0**-9 and optimizer.swallowed == 0        # half a step of bf16
    found, optimizer = constant_push("bf16 stochastic")
    # each of 2000 weights took Binomial(200, 1e-4/2^-8) steps of 2^-8: a standard error of 2^-8·√(200·p)/√2000
    assert abs(float(found.mean()) - target) < 4*2.0**-8*math.sqrt(200*1e-4*2**8/2000)
    assert 0.9 < optimizer.swallowed < 1
    assert equal([found], [constant_push("bf16 stochastic")[0]])                            # its seed decides


def test_stochastic_rounding_is_reproducible_and_a_new_seed_draws_anew():
    def run(seed):
        p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
        optimizer = AdamW([p], lr=1e-3, weights="bf16 stochastic", seed=seed)
        for _ in range(5):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach()
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


@given(st.floats(0.5, 2, exclude_max=True), st.floats(2.0**-14, 2.0**-5))
def test_an_update_below_half_a_step_is_swallowed(w, update):
    w = torch.tensor(w).bfloat16()
    after = (w.float() + update).bfloat16()
    if update/w < 2.0**-9: assert after == w
    if update/w > 2.0**-8: assert after != w
    half = FORMATS["bf16"].spacing(w)/2
    if update != half: assert (after == w) == (update < half)


@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("update", [1e-3, 3e-4, 1e-4, 1e-5, 2.0**-12*1.01])
def test_swallowed_share_is_that_of_drawn_weights(std, update):
    n = 200_000
    w = (torch.randn(n, generator=torch.Generator().manual_seed(0))*std).bfloat16()
    share = ((w.float() + update*w.sign().float()).bfloat16() == w).double().mean().item()
    p = swallowed_share(std, update)
    assert abs(share - p) < 5*math.sqrt(p*(1 - p)/n) + 1e-4 + 2.0**-8      # rounding w to bf16 moves it across a power of two


@pytest.mark.parametrize("wrong", [dict(std=0, update=1), dict(std=1, update=-1), dict(std=math.nan, update=1), dict(std=1, update=math.inf)])
def test_swallowed_share_refuses(wrong):
    with pytest.raises(ValueError, match="accepted is a positive number"): swallowed_share(**wrong)


def test_a_bf16_second_moment_never_decays_in_torchs_adamw():
    p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([p], lr=1e-3)
    p.grad = torch.linspace(0.1, 3, 64).bfloat16()
    optimizer.step()
    v = optimizer.state[p]["exp_avg_sq"].clone()
    for _ in range(20):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], v)            # in fp32 it would be 0.999^20 = 0.98 of it


@pytest.mark.parametrize("weights", WEIGHTS)
def test_adamw_refuses_weights_of_another_dtype(weights):
    wrong = torch.bfloat16 if weights == "fp32" else torch.float32
    with pytest.raises(ValueError, match="dtype is .*accepted is torch"): AdamW([nn.Parameter(torch.ones(2, dtype=wrong))], weights=weights)
    with pytest.raises(ValueError, match="weights is 'int8'; accepted is one of fp32"): AdamW([nn.Parameter(torch.ones(2))], weights="int8")


# --- long sums ------------------------------------------------------------------------------------------------------------------

def terms(n, trials=32, seed=0, signed=False):
    t = torch.rand(trials, n, generator=torch.Generator().manual_seed(seed))
    return ((2*t - 1) if signed else t).bfloat16().float()


def rms(x): return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype, name, n", [(torch.float16, "fp16", 1024), (torch.float32, "fp32", 4096), (torch.bfloat16, "bf16", 128)])
@pytest.mark.parametrize("signed", [False, True])
def test_errors_are_as_predicted_while_they_are_independent(dtype, name, n, signed):
    t = terms(n, 200, signed=signed)
    if dtype == torch.float32: t = torch.rand(200, n, generator=torch.Generator().manual_seed(0)) - 0.5*signed     # no exact sums
    measured, predicted = rms(accumulate(t, dtype).double() - t.double().sum(-1)), rms(predicted_error(t, name))
    assert 0.6 < measured/predicted < 1.6


def test_a_running_sum_of_ones_stands_still_where_half_a_step_is_one():
    ones = torch.ones(5000)
    assert accumulate(ones, torch.bfloat16) == 256 and accumulate(ones, torch.float16) == 2048
    assert accumulate(ones[:4096], torch.bfloat16, 64) == pairwise(ones[:4096], torch.bfloat16) == 4096
    assert kahan_sum(ones[:4096], torch.bfloat16) == 4096


@settings(max_examples=40)
@given(st.integers(1, 400), st.integers(0, 10**6), st.booleans())
def test_sums_keep_their_bounds(n, seed, signed):
    t = terms(n, 4, seed, signed)
    exact, size = t.double().sum(-1), t.double().abs().sum(-1)
    for dtype in (torch.float16, torch.float32):
        u, levels = UNIT[dtype], math.ceil(math.log2(n)) if n > 1 else 1
        gamma = lambda k: k*u/(1 - k*u)                                                   # noqa: E731
        if dtype == torch.float32:
            assert ((kahan_sum(t, dtype).double() - exact).abs() <= (2*u + 8*n*u*u)*size).all()
        assert ((accumulate(t, dtype).double() - exact).abs() <= gamma(n)*size + 1e-7).all()
        assert ((pairwise(t, dtype).double() - exact).abs() <= gamma(levels + 1)*size + 1e-7).all()


def test_kahan_beats_a_plain_sum_in_sixteen_bits():
    t = terms(2048)
    exact = t.double().sum(-1)
    for dtype in LOWS: assert rms(kahan_sum(t, dtype).double() - exact) < rms(accumulate(t, dtype).double() - exact)/5


def test_blocks_must_divide():
    t = terms(12, 1)
    assert torch.equal(accumulate(t, torch.float32, 12), accumulate(t, torch.float32))
    for block in (5, 0, -3, 2.0):
        with pytest.raises(ValueError, match="block is .*divisor of 12"): accumulate(t, torch.float32, block)


# --- measurements and their commands -----------------------------------------------------------------------------------------------

def test_the_committed_runs_show_what_the_chapter_says():
    found = measurements()
    for part in ("weights", "scales", "matrices"): assert {"device", "torch", "date", "command"} <= set(found[part]["provenance"])
    curves = found["weights"]["curves"]
    assert set(curves) == set(WEIGHTS)
    end = {k: sum(c["losses"][-20:])/20 for k, c in curves.items()}
    assert end["bf16"] > end["fp32"] + 0.04
    for cure in ("bf16 + fp32 master", "bf16 Kahan", "bf16 stochastic"): assert abs(end[cure] - end["fp32"]) < 0.02
    for row in found["scales"]["shares"]:
        p, m = row["predicted"], row["measured"]
        assert m["infinite"] >= p["infinite"]                            # what is lost on the way adds to it
        if row["log2 scale"] <= -4: assert m["zero"] >= p["zero"]
    for row in found["matrices"]["rows"]:                                # noise: only where gradients cancel
        assert (row["error"] > 1) == (row["median"] < -25) == (row["matrix"][7] != "0" and row["matrix"].endswith(("query", "key")))


def test_the_command_measures_and_keeps_other_parts(tmp_path):
    out = tmp_path/"found.json"
    mixed.main(["--small", "--part", "scales", "--out", str(out)])
    mixed.main(["--small", "--part", "weights", "--out", str(out)])
    found = json.loads(out.read_text())
    assert set(found) == {"scales", "weights"} and set(found["weights"]["curves"]) == set(WEIGHTS)
    assert [r["log2 scale"] for r in found["scales"]["shares"]] == [0, 8]
    mixed.main(["--small", "--part", "matrices", "--out", str(out)])
    rows = json.loads(out.read_text())["matrices"]["rows"]
    assert [r["matrix"].split()[1] for r in rows] == ["query", "key", "value", "out", "up", "down"]


def test_speed_times_each_precision_and_leaves_the_setting(capsys):
    before = torch.get_float32_matmul_precision()
    mixed.main(["--small", "--speed"])
    rows = json.loads(capsys.readouterr().out)["speed"]["rows"]
    assert [r["precision"] for r in rows] == list(PRECISIONS) and torch.get_float32_matmul_precision() == before
    for r in rows: assert len(r["rounds"]) == 2 and r["seconds"] > 0 and r["tokens_per_second"] == pytest.approx(64/r["seconds"])
    with pytest.raises(ValueError, match="precision is 'fp8'; accepted is one of fp32"): timed_steps("fp8", TINY, 1, 16, 1, "cpu")
    assert speed(TINY, 1, 16, 1, 1, "cpu")[0]["precision"] == "fp32"
