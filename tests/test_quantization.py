"""Weights in few bits: equal to torchao's and bitsandbytes' where those do the same, bounded where they do not."""
import itertools
import math
from importlib import import_module

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from nbs_lib import quantization as q
from nbs_lib.course import oracles
from nbs_lib.gpt import GPT, GPTConfig


def installed(name):
    """The module; None where it, or what it needs, is not installed."""
    try: return import_module(name)
    except ImportError: return None


oracles.oracles()
bnb = installed("bitsandbytes.functional")
ao, bitnet = installed("torchao.quantization.quant_primitives"), installed("torchao.prototype.quantized_training.bitnet")
nf4_tensor = installed("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
needs_bnb = pytest.mark.skipif(bnb is None, reason="bitsandbytes, which this compares with, is not installed here")
needs_torchao = pytest.mark.skipif(None in (ao, bitnet, nf4_tensor), reason="torchao, which this compares with, is not installed here")


@pytest.mark.skipif(not oracles.FOLDER.is_dir(), reason="the packages that proofs compare with are not installed here")
def test_what_is_compared_with_is_there():
    assert None not in (bnb, ao, bitnet, nf4_tensor)

SMALL = GPTConfig(layers=2, heads=2, hidden=64, vocab=96, context=32)
BUILTIN = ("int8", "int4", "int3", "int2", "affine_int8", "affine_int4", "affine_int3", "affine_int2", "nf4",
           "nf4_double", "ternary", "ternary_fit")


def normal(*shape, seed=0, scale=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))*scale


def model(seed=0):
    torch.manual_seed(seed)
    return GPT(SMALL)


# packing

@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
def test_pack_and_back(bits, numbers):
    codes = torch.tensor([x % 2**bits for x in numbers], dtype=torch.uint8)
    packed = q.pack(codes, bits)
    assert torch.equal(q.unpack(packed, bits, len(codes)), codes)
    word = math.lcm(bits, 8)//8
    assert packed.numel() == math.ceil(len(codes)*bits/8/word)*word          # no more than a word is wasted
    whole = sum(c << bits*i for i, c in enumerate(codes.tolist()))           # one long number, lowest code first
    assert int.from_bytes(bytes(packed.tolist()), "little") == whole


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=70))
def test_pack_trits_and_back(numbers):
    codes = torch.tensor(numbers, dtype=torch.uint8)
    packed = q.pack_trits(codes)
    assert packed.numel() == math.ceil(len(codes)/5) and torch.equal(q.unpack_trits(packed, len(codes)), codes)


def test_packing_refuses():
    for bad in (0, 9, 4.0, True): pytest.raises(ValueError, q.pack, torch.zeros(8, dtype=torch.uint8), bad)
    with pytest.raises(ValueError, match="codes go from 0 to 16"): q.pack(torch.tensor([0, 16]), 4)
    with pytest.raises(ValueError, match="codes go from -1"): q.pack(torch.tensor([-1]), 4)
    with pytest.raises(ValueError, match="n is 5"): q.unpack(torch.zeros(2, dtype=torch.uint8), 4, 5)
    with pytest.raises(ValueError, match="0, 1 and 2"): q.pack_trits(torch.tensor([3]))
    with pytest.raises(ValueError, match="n is 6"): q.unpack_trits(torch.zeros(1, dtype=torch.uint8), 6)


# against torchao

def by_torchao(w, name, group):
    """(codes as ours, scales, zeros, dequantized) by torchao's primitives, fp32 scales."""
    f = q.format_of(name)
    g = q.span(w.shape, group)
    block = w.shape if g == w.numel() else (1, g)
    if f.kind == "absmax": kind, low, high, dtype = "SYMMETRIC", -f.zero, f.zero, torch.int8
    else: kind, low, high, dtype = "ASYMMETRIC", 0, f.top, torch.uint8
    scale, zero = ao.choose_qparams_affine(w, getattr(ao.MappingType, kind), block, dtype, low, high)
    codes = ao.quantize_affine(w, block, scale, zero, dtype, low, high)
    back = ao.dequantize_affine(codes, block, scale, zero, dtype, low, high)
    return codes.int() - low, scale.flatten(), zero.flatten(), back


@needs_torchao
@pytest.mark.parametrize("group", [32, None, "tensor"])
@pytest.mark.parametrize("name", [f"{kind}_int{bits}" for kind in ("absmax", "affine") for bits in range(2, 9)])
def test_equal_to_torchao_bit_for_bit(name, group):
    for seed, scale, shift in ((0, 0.02, 0), (1, 3.0, 0.5), (2, 1e-4, -1e-3)):
        w = normal(24, 96, seed=seed, scale=scale) + shift
        w[3] = 0                                                    # a row of zeros
        codes, scales, zeros, back = by_torchao(w, name, group)
        ours = q.quantize_tensor(w, name, group, scale_dtype=torch.float32)
        assert torch.equal(ours.unpacked().int(), codes) and torch.equal(ours.scales, scales)
        assert torch.equal(ours.dequantize(), back)
        if ours.zeros is not None: assert torch.equal(ours.zeros.int(), zeros.int())


@needs_torchao
def test_ternary_equal_to_torchaos_bitnet():
    w = normal(48, 80, seed=3)
    scale = bitnet.get_bitnet_scale(w)
    ours = q.quantize_tensor(w, "ternary", "tensor", scale_dtype=torch.float32)
    assert torch.equal(ours.scales[0], scale)
    assert torch.equal(ours.unpacked().int() - 1, bitnet.quantize_bitnet_weight(w, scale).int())


# NF4 against bitsandbytes

@needs_bnb
def test_nf4_levels_are_those_of_bitsandbytes():
    # theirs came from probabilities in fp32, right to 2**-25 each; a quantile moves by that over the density, at most
    # 1/0.073 at the outermost one, and is divided by 1.85: 2.2e-7, twice because all are divided by the outermost
    assert torch.allclose(torch.tensor(q.NF4), bnb.get_4bit_type("nf4", "cpu"), rtol=0, atol=4.5e-7)
    assert q.NF4[0] == -1 and q.NF4[7] == 0 and q.NF4[15] == 1 and list(q.NF4) == sorted(q.NF4)


@needs_bnb
@pytest.mark.parametrize("group", [32, 64, 128])
def test_nf4_equal_to_bitsandbytes(group):
    for seed, scale in ((0, 0.02), (1, 5.0)):
        w = normal(40, 256, seed=seed, scale=scale)
        packed, state = bnb.quantize_4bit(w, blocksize=group, quant_type="nf4")
        ours = q.quantize_tensor(w, "nf4", group, scale_dtype=torch.float32)
        theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(w.shape)  # first code: high bits
        assert torch.equal(ours.unpacked(), theirs) and torch.equal(ours.scales, state.absmax)
        assert torch.allclose(ours.dequantize(), bnb.dequantize_4bit(packed, state), rtol=1e-6, atol=0)


@needs_bnb
@needs_torchao
def test_double_quantization_beside_the_two_others():
    # 256 scales share a constant in all three; int8 (ours: ±127, torchao: −128 to 127 with the largest clipped) or
    # an 8-bit float (bitsandbytes). The scales differ by up to half a step; the weights' error hardly does.
    w = normal(256, 256, seed=4)
    ours = q.quantize_tensor(w, "nf4_double", 64)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert ours.scales.numel() == state.absmax.numel() and ours.constants.numel() - 1 == state.state2.absmax.numel()
    true = w.view(-1, 64).abs().amax(1)
    found = q.undo_double(ours.scales, ours.constants)
    step = ours.constants[1:].repeat_interleave(256)
    assert (found - true).abs().le(step/2*1.001).all()
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert (found - true).norm() < (theirs - true).norm()                  # even steps suit scales better
    rest = nf4_tensor.to_nf4(w, 64, 256)
    assert torch.allclose(found, rest.dequantize_scalers(rest.quantized_scalers, rest.quantization_factor, 256),
                          atol=float(step.max())*2)
    single = q.relative_error(w, q.quantize_tensor(w, "nf4", 64, scale_dtype=torch.float32))
    errors = [q.relative_error(w, ours), float((w - bnb.dequantize_4bit(packed, state)).norm()/w.norm()),
              float((w - rest.get_original_weight()).norm()/w.norm())]
    assert errors[0] <= min(errors[1:]) and all(single*0.999 < e < single*1.01 for e in errors)


def test_nf4s_table_is_made_once_for_each_device():
    cpu = torch.device("cpu")
    assert q.nf4_levels(cpu) is q.nf4_levels(cpu) and torch.equal(q.nf4_levels(cpu), torch.tensor(q.NF4))
    from torch._subclasses.fake_tensor import FakeTensorMode
    q._LEVELS.pop(cpu)
    with FakeTensorMode(): fake = q.nf4_levels(cpu)                        # a tracer's stand-in does not stay
    assert type(fake) is not torch.Tensor and type(q.nf4_levels(cpu)) is torch.Tensor
    q._LEVELS.pop(cpu)
    with torch.inference_mode(): q.nf4_levels(cpu)
    layer = q.QuantizedLinear(q.quantize_tensor(normal(8, 64), "nf4", 64))
    layer(torch.randn(2, 64, requires_grad=True)).sum().backward()         # made in inference mode, and used outside
    assert torch.equal(torch.compile(q.nf4_levels, backend="eager")(cpu), q.nf4_levels(cpu))


def test_double_quantization_of_hard_scales():
    w = normal(8, 512, seed=5)
    w[0], w[1, :64] = 0, w[1, :64]*1e6                      # a scale of nothing beside one of a million
    ours = q.quantize_tensor(w, "nf4_double", 64).dequantize()
    assert ours.isfinite().all() and torch.equal(ours[0], torch.zeros(512))
    assert (ours - w)[1, :64].abs().max() < 0.2*w.abs().max()


# bounds and optima

weights = st.lists(st.floats(-1000, 1000, width=32), min_size=16, max_size=16)


@settings(deadline=None)
@given(weights, st.sampled_from([m for m in BUILTIN if "int" in m]), st.sampled_from([4, 8, None, "tensor"]),
       st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_weight_is_off_by_more_than_half_a_step(numbers, method, group, dtype):
    w = torch.tensor(numbers).view(2, 8)
    done = q.quantize_tensor(w, method, group, scale_dtype=dtype)
    step = done.scales.double().repeat_interleave(done.group).view(2, 8)
    # half a step, and what fp32 arithmetic loses in x/scale, in (code − zero)·scale
    assert ((w - done.dequantize()).double().abs() <= step*(0.5 + 2**-13)).all()


@settings(deadline=None)
@given(weights)
def test_zero_stays_zero(numbers):
    w = torch.tensor(numbers).view(2, 8)
    w[:, ::3] = 0
    for method in BUILTIN:
        back = q.quantize_tensor(w, method, 4).dequantize()
        assert (back[:, ::3] == 0).all() and back.isfinite().all(), method


@settings(deadline=None)
@given(weights)
def test_quantizing_what_is_quantized_changes_nothing(numbers):
    w = torch.tensor(numbers).view(2, 8)
    assume(w.abs().max() > 1e-3)
    for method in ("int8", "int4", "nf4"):
        once = q.quantize_tensor(w, method, 4, scale_dtype=torch.float32).dequantize()
        twice = q.quantize_tensor(once, method, 4, scale_dtype=torch.float32).dequantize()
        assert torch.allclose(once, twice, rtol=1e-5, atol=0), method


CODES = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5)), dtype=torch.float64)


@settings(deadline=None)
@given(st.lists(st.floats(-8, 8, width=32), min_size=5, max_size=5))
def test_fitted_ternary_is_the_best_of_all(numbers):
    x = torch.tensor(numbers, dtype=torch.float64)
    # of each of the 3⁵ − 1 codes with its best scale, and of all zeros
    c = CODES[CODES.any(1)]
    off = (x - c*((c@x)/(c*c).sum(1))[:, None]).square().sum(1)
    best = min(float(off.min()), float((x*x).sum()))
    fitted = q.quantize_tensor(x.float()[None], "ternary_fit", scale_dtype=torch.float32).dequantize()
    assert float(((x - fitted)**2).sum()) <= best*(1 + 1e-5) + 1e-9
    plain = q.quantize_tensor(x.float()[None], "ternary", scale_dtype=torch.float32).dequantize()
    assert float(((x - fitted)**2).sum()) <= float(((x - plain)**2).sum())*(1 + 1e-5) + 1e-9


def test_clipping_pays_at_three_bits_and_not_at_eight():
    w = normal(64, 256, seed=6)
    errors = {bits: {clip: q.relative_error(w, q.quantize_tensor(w, f"int{bits}", 64, clip=clip))
                     for clip in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)} for bits in (8, 3)}
    assert min(errors[3], key=errors[3].get) < 0.9 and min(errors[8], key=errors[8].get) == 1.0


def test_smaller_groups_do_better_and_cost_more():
    w = normal(64, 512, seed=7)
    for method in BUILTIN[:9]:
        done = [q.quantize_tensor(w, method, g) for g in (16, 64, 256)]
        errors, bits = [q.relative_error(w, d) for d in done], [d.bits_per_weight for d in done]
        assert errors == sorted(errors) and bits == sorted(bits, reverse=True), method


@pytest.mark.parametrize("name", ["int8", "int5", "int4", "int3", "int2", "nf4"])
@pytest.mark.parametrize("group", [8, 64, 512])
def test_expected_error_of_normal_weights(name, group):
    w = normal(512, 512, seed=8, scale=1.0)
    found = q.relative_error(w, q.quantize_tensor(w, name, group, scale_dtype=torch.float32))
    assert found == pytest.approx(q.expected_error(name, group), rel=0.01)


@pytest.mark.parametrize("method", BUILTIN)
def test_expected_bits_are_the_bytes(method):
    done = q.quantize_tensor(normal(1280, 640), method, 64)
    assert done.nbytes == sum(x.nbytes for x in done.tensors.values())
    assert done.bits_per_weight == pytest.approx(q.expected_bits(method, 64), abs=1e-3)


def test_codes_can_be_rebuilt_from_parts():
    w = normal(6, 32)
    for name in ("absmax_int3", "affine_int4", "nf4", "ternary"):
        f, x = q.format_of(name), w.view(-1, 16)
        scales, zeros = q.choose_scales(x, f)
        codes = q.nearest_codes(x, f, scales, zeros)
        mine = q.store(codes.view(6, 32), f, 16, scales, zeros, columns=torch.full((32,), 2.0))
        assert torch.equal(mine.dequantize(), 2*q.quantize_tensor(w, name, 16).dequantize())
        assert torch.equal(mine.dequantize(), 2*q.code_values(codes, f, scales, zeros).view(6, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    w = normal(4, 64).to(dtype)
    done = q.quantize_tensor(w, "int8", 64)
    assert done.dequantize(dtype).dtype == dtype
    assert torch.equal(done.dequantize(), q.quantize_tensor(w.float(), "int8", 64).dequantize())


# refusals

@pytest.mark.parametrize("w, given_, said", [
    (normal(4, 60), dict(method="int4", group=64), "group is 64, which does not divide the 60 inputs"),
    (normal(4, 64), dict(method="int4", group=0), "group is 0"),
    (normal(4, 64), dict(method="int4", group="row"), "group is 'row'"),
    (normal(4, 64), dict(method="int9"), "method is 'int9', with 9 bits; accepted are 2 to 8"),
    (normal(4, 64), dict(method="affine_int1"), "1 bits"),
    (normal(4, 64), dict(method="q4_k"), "method is 'q4_k'; accepted are int8"),
    (normal(4, 64), dict(method=4), "method is 4"),
    (normal(64), dict(method="int4"), "shape"),
    (torch.zeros(0, 4), dict(method="int4"), "empty"),
    (torch.zeros(4, 64, dtype=torch.int8), dict(method="int4"), "dtype torch.int8"),
    (torch.full((4, 64), float("nan")), dict(method="int4"), "infinities or NaNs"),
    (torch.zeros(4, 64, device="meta"), dict(method="int4"), "meta"),
    ([[1.0]], dict(method="int4"), "a list"),
    (normal(4, 64), dict(method="int4", clip=0.0), "clip is 0.0"),
    (torch.full((4, 64), 1e7), dict(method="int4", scale_dtype=torch.float16), "float32"),
])
def test_quantize_tensor_refuses(w, given_, said):
    with pytest.raises(ValueError, match=said) as e: q.quantize_tensor(w, **given_)
    assert "accepted" in str(e.value) and "\n" not in str(e.value)


def test_formats_by_name():
    assert q.format_of("int4") == q.format_of("absmax_int4") and q.format_of("affine_int3").name == "affine_int3"
    for bad in ("int1", "int16", "fp4", None, "nf3"): pytest.raises(ValueError, q.format_of, bad)
    for bad in ("affine_int4", "ternary"): pytest.raises(ValueError, q.expected_error, bad, 64)
    with pytest.raises(ValueError, match="group is 0"): q.expected_error("nf4", 0)


# models

@pytest.mark.parametrize("method", BUILTIN)
def test_quantized_model_computes_with_dequantized_weights(method):
    ids = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(1))
    ours, plain = model(), model()
    report = q.quantize(ours, method, group=32)
    weights = dict(ours.named_modules())
    with torch.no_grad():
        for row in report.rows: plain.get_submodule(row.layer).weight.copy_(weights[row.layer].weight)
        assert torch.equal(ours(ids), plain(ids))
    assert len(report.rows) == 8 and report.skipped == (("head", "tied: its weight is also tokens.weight"),)
    assert report.before == q.nbytes(model()) and report.after == q.nbytes(ours) < report.before
    assert ours.head.weight is ours.tokens.weight


def test_report_says_what_was_done():
    m = model()
    was = {name: p.detach().clone() for name, p in m.named_parameters()}
    report = q.quantize(m, "nf4", skip=("blocks.0.up", "down"))
    assert {name for name, why in report.skipped if why == "in skip"} == {"blocks.0.up", "blocks.0.down",
                                                                          "blocks.1.down"}
    for row in report.rows:
        w, layer = was[row.layer + ".weight"], m.get_submodule(row.layer)
        assert row.shape == tuple(w.shape) and row.bits == 8*row.nbytes/w.numel() == 4.25
        assert row.error == pytest.approx(float((w - layer.weight).norm()/w.norm()), rel=1e-5)
    assert report.bits_per_weight == 4.25
    text = str(report)
    assert all(row.layer in text for row in report.rows) and "tied" in text and f"{report.after:,}" in text


def test_conv1d_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50, n_positions=16, resid_pdrop=0, embd_pdrop=0,
                        attn_pdrop=0)
    m = GPT2LMHeadModel(config).eval()
    ids = torch.arange(10)[None]
    before, w = m(ids).logits, m.transformer.h[0].mlp.c_fc.weight.detach().clone()
    report = q.quantize(m, "int8", group=32)
    assert [r.shape for r in report.rows] == [(96, 32), (32, 32), (128, 32), (32, 128)]
    assert ("lm_head", "in skip") in report.skipped
    assert torch.equal(m.transformer.h[0].mlp.c_fc.weight, q.quantize_tensor(w.t(), "int8", 32).dequantize())
    assert 0 < (m(ids).logits - before).abs().max() < 0.05*before.abs().max()


@pytest.mark.parametrize("method", ["int4", "int3", "affine_int4", "nf4_double", "ternary"])
def test_saved_and_loaded(method, tmp_path):
    ids = torch.arange(16)[None]
    ours, other = model(), model(seed=1)
    q.quantize(ours, method)
    torch.save(ours.state_dict(), tmp_path/"model.pt")
    q.quantize(other, method)
    assert not torch.equal(ours(ids), other(ids))
    other.load_state_dict(torch.load(tmp_path/"model.pt", weights_only=True))
    assert torch.equal(ours(ids), other(ids))
    wrong = model()
    q.quantize(wrong, "nf4" if method != "nf4" else "int4", group=32)
    with pytest.raises((ValueError, RuntimeError)): wrong.load_state_dict(ours.state_dict())


def test_another_format_of_the_same_shape_is_not_loaded():
    ours, wrong = model(), model()
    q.quantize(ours, "nf4")
    q.quantize(wrong, "int4")
    with pytest.raises((ValueError, RuntimeError), match="nf4"): wrong.load_state_dict(ours.state_dict())


def test_to_a_dtype_keeps_the_levels():
    m = model()
    q.quantize(m, "nf4_double")
    was = m.blocks[0].up.weight
    m.to(torch.bfloat16)
    layer = m.blocks[0].up
    assert layer.constants.dtype == torch.float32 and layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, was.bfloat16()) and m(torch.arange(8)[None]).dtype == torch.bfloat16


def test_gradients_reach_what_is_not_quantized():
    m = model()
    q.quantize(m, "nf4")
    ids = torch.arange(17)[None]
    m(ids[:, :-1], ids[:, 1:]).backward()
    assert m.positions.weight.grad.abs().sum() > 0 and m.blocks[0].qkv.bias.grad is not None
    assert not any("codes" in name or name.endswith("up.weight") for name, _ in m.named_parameters())


class Twice(nn.Module):
    """One layer in two places, two layers with one weight, and a subclass."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(64, 64)
        self.c, self.d = nn.Linear(64, 64), nn.Linear(64, 64)
        self.d.weight = self.c.weight
        self.attention = nn.MultiheadAttention(64, 2)


def test_shared_layers_and_subclasses():
    m = Twice()
    report = q.quantize(m, "int8")
    assert m.a is m.b and isinstance(m.a, q.QuantizedLinear) and [r.layer for r in report.rows] == ["a"]
    why = dict(report.skipped)
    assert "d.weight" in why["c"] and "c.weight" in why["d"]
    assert why["attention.out_proj"] == "a NonDynamicallyQuantizableLinear, not a plain Linear"


def unchanged(m, call, said):
    """call raises ValueError, saying so, and leaves m as it was."""
    before = {name: id(x) for name, x in m.named_modules()}
    with pytest.raises(ValueError, match=said) as e: call()
    assert "\n" not in str(e.value) and before == {name: id(x) for name, x in m.named_modules()}


def test_quantize_refuses_and_leaves_the_model_alone():
    m = model()
    for given_, said in ((dict(method="int4", group=48), "layer blocks.0.qkv: group is 48"),
                         (dict(method="nope"), "method is 'nope'"),
                         (dict(method="int12"), "12 bits"),
                         (dict(method="int4", clip=2.0), "layer blocks.0.qkv: clip is 2.0"),
                         (dict(method="int4", skip=("blocks",)), "no linear layers")):
        unchanged(m, lambda: q.quantize(m, **given_), said)
    with torch.no_grad(): m.blocks[1].down.weight[0, 0] = float("inf")          # the last layer
    unchanged(m, lambda: q.quantize(m, "int4"), "blocks.1.down.weight has infinities")
    with torch.device("meta"): empty = GPT(SMALL)
    unchanged(empty, lambda: q.quantize(empty, "int4"), "meta")
    for none in (nn.Sequential(nn.Embedding(4, 4)), nn.Linear(64, 64)):
        unchanged(none, lambda: q.quantize(none, "int4"), "no linear layers")
    done = model()
    q.quantize(done, "int4")
    unchanged(done, lambda: q.quantize(done, "int4"), "quantized already")
    with pytest.raises(ValueError, match="model is a dict"): q.quantize({}, "int4")


@needs_torchao
def test_quantize_refuses_what_torchao_has_quantized():
    theirs = nn.Sequential(nn.Linear(64, 64))
    theirs[0].weight = nn.Parameter(nf4_tensor.to_nf4(torch.randn(256, 64), 64, 1), requires_grad=False)
    unchanged(theirs, lambda: q.quantize(theirs, "int4"), "0.weight is a ")


def test_registered_method_sees_each_layers_inputs(monkeypatch):
    monkeypatch.setattr(q, "METHODS", dict(q.METHODS))
    seen = {}

    def spy(w, group, inputs, extra=0):
        seen[tuple(w.shape)] = (inputs, extra)
        return q.quantize_tensor(w, "int4", group)
    q.register("spy", spy, needs_inputs=True)
    m, plain, got = model().train(), model(), []
    plain.blocks[1].up.register_forward_pre_hook(lambda module, args: got.append(args[0].flatten(0, 1)))
    ids = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(2))
    for original in (False, True):
        for bad, said in ((None, "calibration is None"), (ids, "calibration is a Tensor"), ([], "calibration is empty")):
            unchanged(m, lambda: q.quantize(m, "spy", calibration=bad, original_inputs=original), said)
    q.quantize(m, "spy", calibration=[ids, (ids[:1],), {"ids": ids}], original_inputs=True, extra=3)
    inputs, extra = seen[256, 64]
    for x in (ids, ids[:1], ids): plain(x)
    assert torch.equal(inputs, torch.cat(got)) and extra == 3 and m.training
    with pytest.raises(ValueError, match=r"inputs is of shape \(3, 5\)"):
        q.quantize_tensor(normal(4, 64), "spy", 64, inputs=torch.zeros(3, 5))


# layer after layer

def spy(monkeypatch, fail=None):
    """Registers "spy": int3, which notes what it is given; in order. It raises at its call number `fail`."""
    monkeypatch.setattr(q, "METHODS", dict(q.METHODS))
    seen = []

    def method(w, group, inputs):
        if len(seen) == fail: raise ValueError("not this one")
        seen.append((w, inputs))
        return q.quantize_tensor(w, "int3", group)
    q.register("spy", method, needs_inputs=True)
    return seen


class Backwards(nn.Module):
    """Runs its layers in another order than it registers them; one of them never, one twice."""

    def __init__(self, idle=False):
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first, self.middle = nn.Linear(32, 16), nn.Linear(16, 32), nn.Linear(32, 32)
        if idle: self.idle = nn.Linear(16, 16)

    def forward(self, x, scale=1.0):
        h = self.middle(input=self.middle(self.first(x)*scale).relu())
        return self.last(h)


def one_at_a_time(model, order, given, method, group):
    """Quantizes layer after layer by hand: each by what comes into it in the model as it is by then."""
    for name in order:
        layer, (owner, _, key) = model.get_submodule(name), name.rpartition(".")
        inputs = q.record_inputs(model, {name: layer}, [given])[name]
        tokens = len(inputs)//2 if name == "middle" else len(inputs)       # of its first run
        done = q.quantize_tensor(q.weight_of(layer).detach(), method, group, inputs[:tokens])
        setattr(model.get_submodule(owner), key, q.QuantizedLinear(done, layer.bias, layer.weight.dtype))
    return model


def test_layers_are_taken_in_the_order_of_execution(monkeypatch):
    seen = spy(monkeypatch)
    x = [normal(3, 16, seed=1, scale=1.0), normal(5, 16, seed=2, scale=1.0)]
    m, hand = Backwards(), Backwards()
    report = q.quantize(m, "spy", group=16, calibration=x)
    assert [r.layer for r in report.rows] == ["first", "middle", "last"]
    ours = [inputs for _, inputs in seen]
    assert [len(inputs) for inputs in ours] == [8, 8, 8] and torch.equal(ours[0], torch.cat(x))
    seen.clear()
    one_at_a_time(hand, ["first", "middle", "last"], torch.cat(x), "spy", 16)
    assert all(torch.equal(a, b) for a, (_, b) in zip(ours, seen))
    assert torch.equal(m(x[0]), hand(x[0]))
    was = Backwards()
    assert torch.equal(ours[1], m.first(torch.cat(x))) and not torch.equal(ours[1], was.first(torch.cat(x)))


def test_a_layer_that_runs_twice(monkeypatch):
    """In order it is quantized at its first run, and its second sees the quantized one; with original inputs both runs count."""
    seen, x = spy(monkeypatch), normal(6, 16, seed=1, scale=1.0)
    q.quantize(Backwards(), "spy", group=16, calibration=[x], original_inputs=True)
    was = Backwards()
    first = was.first(x)
    assert [tuple(inputs.shape) for _, inputs in seen] == [(6, 32), (6, 16), (12, 32)]         # as registered
    assert torch.equal(seen[2][1], torch.cat([first, was.middle(first).relu()]))
    seen.clear()
    m = Backwards()
    q.quantize(m, "spy", group=16, calibration=[x])
    assert torch.equal(seen[1][1], m.first(x)) and torch.equal(seen[2][1], m.middle(m.middle(m.first(x)).relu()))


@pytest.mark.parametrize("original", [False, True])
def test_a_layer_that_never_runs(monkeypatch, original):
    spy(monkeypatch)
    m = Backwards(idle=True).train()
    m.middle.eval()
    unchanged(m, lambda: q.quantize(m, "spy", group=16, calibration=[normal(2, 16)], original_inputs=original),
              "calibration never reached layer idle")
    assert m.training and m.first.training and not m.middle.training           # each in its mode again
    report = q.quantize(m, "spy", group=16, calibration=[normal(2, 16)], skip=("idle",), original_inputs=original)
    assert dict(report.skipped) == {"idle": "in skip"} and m.first.training and not m.middle.training
    assert isinstance(m.middle, q.QuantizedLinear) and not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())


@pytest.mark.parametrize("given_, said", [
    ([normal(2, 16), dict(x=normal(2, 16))], "calibration has inputs of several kinds"),
    ([(normal(2, 16), 1.0), (normal(2, 16),)], "calibration has inputs of several kinds"),
    ([normal(2, 3, 16), normal(2, 4, 16)], r"calibration has shape \(n, 3, 16\) and shape \(n, 4, 16\) for argument 0"),
    ([dict(x=normal(2, 16), scale=1.0), dict(x=normal(2, 16), scale=2.0)], "calibration has 1.0 and 2.0 for argument 'scale'"),
    ([normal(2, 16), 3.0], "calibration has 3.0 and shape"),
])
def test_inputs_that_do_not_go_together(monkeypatch, given_, said):
    spy(monkeypatch)
    m = Backwards()
    unchanged(m, lambda: q.quantize(m, "spy", group=16, calibration=given_), said + ".*; accepted ")


def test_inputs_by_name(monkeypatch):
    seen = spy(monkeypatch)
    x = normal(4, 16, seed=3, scale=1.0)
    q.quantize(Backwards(), "spy", group=16, calibration=[dict(x=x[:1], scale=2.0), dict(x=x[1:], scale=2.0)])
    by_name = [inputs for _, inputs in seen]
    seen.clear()
    q.quantize(Backwards(), "spy", group=16, calibration=[(x, 2.0)])
    assert all(torch.equal(a, b) for a, (_, b) in zip(by_name, seen))


@pytest.mark.parametrize("original", [False, True])
def test_a_failure_midway_changes_nothing(monkeypatch, original):
    spy(monkeypatch, fail=2)
    m, x = Backwards().train(), normal(4, 16)
    before = m(x)
    unchanged(m, lambda: q.quantize(m, "spy", group=16, calibration=[x], original_inputs=original), "layer .*: not this one")
    assert torch.equal(m(x), before) and m.training and not any(y._forward_hooks or y._forward_pre_hooks for y in m.modules())


def test_conv1d_in_order(monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    seen = spy(monkeypatch)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50, n_positions=16, use_cache=False)

    def made():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)
    ids, m = torch.arange(20).view(2, 10), made()
    report = q.quantize(m, "spy", group=32, calibration=[dict(input_ids=ids[:1]), dict(input_ids=ids[1:])])
    order = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert [r.layer for r in report.rows] == order
    assert [(tuple(w.shape), tuple(x.shape)) for w, x in seen] == [
        ((96, 32), (20, 32)), ((32, 32), (20, 32)), ((128, 32), (20, 32)), ((32, 128), (20, 128))]
    ours = [x for _, x in seen]
    seen.clear()
    hand = one_at_a_time(made(), order, dict(input_ids=ids), "spy", 32).eval()
    assert all(torch.equal(a, b) for a, (_, b) in zip(ours, seen))
    assert m.training and torch.equal(m.eval()(ids).logits, hand(ids).logits)


def test_a_method_that_fails_in_the_last_layer_changes_nothing(monkeypatch):
    monkeypatch.setattr(q, "METHODS", dict(q.METHODS))

    def fails(w, group, inputs):
        if w.shape == (64, 256): raise ValueError("not this one")
        return q.quantize_tensor(w, "int4", group)
    q.register("fails", fails)
    m = model()
    unchanged(m, lambda: q.quantize(m, "fails"), "layer blocks.0.down: not this one")


def test_bytes_of_a_named_model():
    from nbs_lib.models import arch

    a = arch("llama-3-8b")
    parts = a.parameters_by_component
    matrices = parts["attention"] + parts["mlp"]
    assert q.model_bytes("llama-3-8b", "bf16") == 2*a.parameters
    assert q.model_bytes("llama-3-8b", "int4") == matrices*4.25/8 + 2*(a.parameters - matrices)
    with pytest.raises(ValueError): q.model_bytes("llama-3-8b", "int77")
    with pytest.raises(ValueError): q.model_bytes("llama-9", "int4")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("method", BUILTIN)
def test_the_same_on_a_gpu(method):
    w = normal(64, 256)
    here, there = q.quantize_tensor(w, method, 64), q.quantize_tensor(w.cuda(), method, 64)
    assert there.codes.is_cuda
    # numbers are rounded one by one, alike everywhere; a mean (of weights, or of scales) may be summed in another order
    mean = "ternary" in method or "double" in method
    differ = (there.unpacked().cpu() != here.unpacked()).float().mean()
    assert differ <= (0.005 if mean else 0) and torch.allclose(there.scales.cpu().float(), here.scales.float(), rtol=0.01, atol=mean)
    m = model().cuda()
    q.quantize(m, method)
    assert m(torch.arange(8, device="cuda")[None]).isfinite().all()


@needs_gpu
@pytest.mark.parametrize("method", BUILTIN)
def test_a_gpu_dequantizes_to_the_same_bits(method):
    """The same codes, moved: the weight is the plain reference's to the last bit, the product within fp32's roundoff."""
    layer = q.QuantizedLinear(q.quantize_tensor(normal(64, 256), method, 64))
    x, exact = normal(5, 256, seed=1, scale=1.0), layer.weight.double()
    here = layer.weight
    layer = layer.cuda()
    assert layer.weight.is_cuda and torch.equal(layer.weight.cpu(), here)
    off = (layer(x.cuda()).cpu().double() - x.double() @ exact.T).abs()
    assert (off <= 256*2**-24*(x.double().abs() @ exact.abs().T) + 1e-12).all()


@needs_gpu
def test_in_order_on_a_gpu(monkeypatch):
    seen, x = spy(monkeypatch), normal(32, 16, seed=1, scale=1.0)
    q.quantize(Backwards(), "spy", group=16, calibration=[x])
    here = [inputs for _, inputs in seen]
    seen.clear()
    q.quantize(Backwards().cuda(), "spy", group=16, calibration=[x.cuda()])
    assert all(b.is_cuda and torch.allclose(a, b.cpu(), rtol=1e-4, atol=1e-5) for a, (_, b) in zip(here, seen)) and len(seen) == 3
