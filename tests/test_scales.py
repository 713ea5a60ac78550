"""Scales per tensor, row and block; the MX formats and NVFP4 against torchao's bits, and against brute force."""
from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbs_lib.course.oracles import oracles

oracles()
logging.disable(logging.WARNING)                   # torchao names the kernels that it cannot load on a CPU
from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor  # noqa: E402
from torchao.prototype.mx_formats.kernels import unpack_uint4  # noqa: E402

logging.disable(logging.NOTSET)

from nbs_lib.precision import FORMATS, FloatFormat, float_format  # noqa: E402
from nbs_lib.scales import (BLOCK_FORMATS, MXFP4, MXFP6_E2M3, MXFP8_E4M3, NVFP4, SCALES, octave_sqnr, scale_values,  # noqa: E402
                            scaled, sqnr, step_sqnr)

MX = {"MXFP8_E4M3": torch.float8_e4m3fn, "MXFP8_E5M2": torch.float8_e5m2, "MXFP6_E3M2": "fp6_e3m2",
      "MXFP6_E2M3": "fp6_e2m3", "MXFP4": torch.float4_e2m1fn_x2}


def torchao_mx(x, name):
    """(codes, scales, values) by torchao."""
    scales, data = mx_tensor.to_mx(x, MX[name], 32)
    values = mx_tensor.to_dtype(data, scales, MX[name], 32, torch.float32)
    return unpack_uint4(data) if name == "MXFP4" else data.view(torch.uint8), scales.view(torch.uint8), values


def torchao_nvfp4(x):
    whole = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max())
    theirs = nvfp4_tensor.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=whole)
    return unpack_uint4(theirs.qdata), theirs.scale.view(torch.uint8), theirs.dequantize(torch.float32)


def inputs() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    def normal(*shape): return torch.randn(*shape, generator=g)
    zeros = normal(128, 256)
    zeros[::3, ::5], zeros[7], zeros[9, :64] = 0, 0, -0.0
    outlier = normal(128, 256)
    outlier[:, ::50] *= 1e4
    powers = 2.0**torch.randint(-30, 30, (64, 256), generator=g)*torch.tensor([1, 1.25, 1.5, 1.75, 1.875])[torch.randint(5, (64, 256), generator=g)]
    return {"normal": normal(128, 256), "zeros": zeros, "outliers": outlier, "powers and ties": powers,
            "spread": normal(128, 256)*(4*normal(128, 256)).exp(), "huge": normal(64, 256)*1e37, "tiny": normal(64, 256)*2.0**-100,
            "one octave": 1 + torch.rand(64, 256, generator=g), "negative": -normal(64, 256).abs(), "bf16": normal(64, 256).bfloat16().float()}


@pytest.mark.parametrize("kind", inputs())
@pytest.mark.parametrize("name", MX)
def test_mx_is_torchaos_bit_for_bit(name, kind):
    x = inputs()[kind]
    ours, (codes, scales, values) = scaled(x, name), torchao_mx(x, name)
    assert torch.equal(ours.scales.flatten(), scales.flatten())
    assert torch.equal(ours.codes, codes) and torch.equal(ours.dequantize(), values)


@pytest.mark.parametrize("kind", [k for k in inputs() if k not in ("tiny",)])
def test_nvfp4_is_torchaos_bit_for_bit(kind):
    x = inputs()[kind]
    ours, (codes, scales, values) = scaled(x, NVFP4), torchao_nvfp4(x)
    assert torch.equal(ours.scales.flatten(), scales.flatten())
    assert torch.equal(ours.codes, codes) and torch.equal(ours.dequantize(), values)


def test_every_power_of_two_and_its_neighbours_get_torchaos_scale():
    tops = 2.0**torch.arange(-120, 127).double()
    x = torch.zeros(3*len(tops), 32)
    x[:, 4] = torch.cat([tops, tops*(1 - 2.0**-24), tops*(1 + 2.0**-23)]).float()
    x[:, 9] = -x[:, 4]/3
    for name, dtype in MX.items():
        ours, (codes, scales, values) = scaled(x, name), torchao_mx(x, name)
        normal = scales.flatten() > 0                # below, torchao divides by another number: see the next test
        assert normal.sum() > 700 and torch.equal(ours.scales.flatten(), scales.flatten())
        assert torch.equal(ours.codes[normal], codes[normal]) and torch.equal(ours.dequantize()[normal], values[normal])


def test_below_the_smallest_scale():
    """Where the shared exponent is -127, torchao 0.18 divides by 2**-126 and multiplies by 2**-127; we by one of them."""
    x = torch.zeros(2, 32)
    x[0], x[1, ::2] = 1.5*2.0**-125, -2.0**-126
    ours, (_, scales, values) = scaled(x, MXFP8_E4M3), torchao_mx(x, "MXFP8_E4M3")
    assert ours.scales.flatten().tolist() == scales.flatten().tolist() == [0, 0]
    assert torch.equal(ours.dequantize(), x) and torch.equal(values, x/2)


def test_nan_and_infinity_make_their_group_nan_and_no_other():
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(4, 64)
        x[1, 40] = bad
        for name in MX:
            values = scaled(x, name).dequantize()
            assert values[1, 32:].isnan().all() and torch.equal(values[1, :32], x[1, :32]) and torch.equal(values[2:], x[2:])
            if math.isnan(bad): assert torch.equal(values.isnan(), torchao_mx(x, name)[2].isnan())
        assert scaled(x, "e4m3fn", "row").dequantize()[1].isnan().all() and scaled(x, "e2m1").dequantize().isnan().all()
        assert torch.equal(scaled(x, "e4m3fn", "row").dequantize()[::2], x[::2])
        assert scaled(x, NVFP4).dequantize().isnan().all()           # its whole tensor shares a scale


def test_zeros_stay_zero_with_their_sign():
    for fmt in [*BLOCK_FORMATS, *[n for n, f in FORMATS.items() if f.bits <= 8]]:
        x = torch.zeros(3, 64)
        x[1] = -0.0
        s = scaled(x, fmt)
        assert (s.dequantize() == 0).all() and torch.equal(s.dequantize().signbit(), x.signbit())


# --- scales, brute force ---

@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_each_value_is_the_nearest_that_its_scale_allows(name):
    b = BLOCK_FORMATS[name]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(16, 64, generator=g)*(2*torch.randn(16, 64, generator=g)).exp()
    s = scaled(x, name)
    f = float_format(b.element)
    values = f.decode(torch.arange(2**f.bits))
    values = values[values.isfinite()]
    for block, got, factor in zip(x.double().reshape(-1, b.block), s.dequantize().double().reshape(-1, b.block), s.factors.double().flatten()):
        nearest = (values[None]*factor - block[:, None]).abs().amin(-1)
        # NVFP4 multiplies by a rounded reciprocal: near a tie it may take the other neighbour, 3 ulp of fp32 off
        assert ((got - block).abs() - nearest <= 4*2.0**-23*block.abs()).all()


@pytest.mark.parametrize("name", MX)
def test_the_largest_of_a_block_falls_into_the_highest_octave(name):
    f = float_format(BLOCK_FORMATS[name].element)
    s, x = scaled(inputs()["spread"], name), inputs()["spread"]
    largest = (x.reshape(-1, 32)/s.factors.reshape(-1, 1)).abs().amax(-1)
    assert ((2.0**f.top <= largest) & (largest < 2.0**(f.top + 1))).all()


@given(st.floats(1e-30, 1e30), st.sampled_from([n for n, f in FORMATS.items() if f.exponent < 8]))
def test_one_fp32_scale_brings_the_largest_to_the_largest(a, name):
    x = torch.tensor([[a, -a/2, a/7, 0.0]])
    s = scaled(x, name)
    assert float_format(name).decode(s.codes)[0, 0] == float_format(name).max
    assert abs(s.dequantize()[0, 0].item()/x[0, 0].item() - 1) < 3*2.0**-24
    assert s.dequantize().abs().max() == s.dequantize()[0, 0]


def test_scaling_by_powers_of_two_changes_nothing_else():
    x = inputs()["normal"]
    for name in MX:
        a, b = scaled(x, name), scaled(x*2.0**20, name)
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scales.int() + 20, b.scales.int())


def test_blocks_rows_and_the_tensor_are_the_same_where_they_hold_the_same():
    x = inputs()["normal"]
    for kind in SCALES:
        row, block = scaled(x, "e2m1", "row", scale_format=kind), scaled(x, "e2m1", "block", x.shape[-1], kind)
        assert torch.equal(row.codes, block.codes) and torch.equal(row.dequantize(), block.dequantize())
        assert row.scales.shape == (128,) and block.scales.shape == (128, 1)
        one, whole = scaled(x[:1], "e3m2", "row", scale_format=kind), scaled(x[:1], "e3m2", "tensor", scale_format=kind)
        assert torch.equal(one.dequantize(), whole.dequantize()) and whole.scales.shape == ()
    by_hand = scaled(x, "e2m1", "block", 16, "e4m3fn")
    assert torch.equal(by_hand.dequantize(), scaled(x, NVFP4).dequantize())


def test_shapes_dtypes_and_own_formats():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 3, 64).to(dtype)
        s = scaled(x, MXFP4)
        assert s.codes.shape == x.shape and s.scales.shape == (2, 3, 2) and s.dequantize().dtype == dtype
        assert s.dequantize(torch.float32).dtype == torch.float32
    x = torch.randn(8, 64)
    assert torch.equal(scaled(x.t().contiguous().t(), MXFP4).dequantize(), scaled(x, MXFP4).dequantize())
    assert scaled(x, FloatFormat("e3m4", 3, 4, 3, "ieee"), "row").codes.dtype == torch.uint8
    assert scaled(x, "bf16").codes.dtype == torch.int32 and sqnr(x, scaled(x, "bf16").dequantize()) > 50
    assert scaled(x, "MXFP4").dequantize().equal(scaled(x, MXFP4).dequantize())


def test_stochastic_rounding_is_right_on_average():
    x = torch.full((4096, 32), 1.3)
    x[:, 0] = 6
    s = scaled(x, MXFP4, rounding="stochastic", generator=torch.Generator().manual_seed(0))
    values = s.dequantize()[:, 1:]
    bound = 0.5*math.sqrt(math.log(2e9)/(2*values.numel()))          # Hoeffding: values are 1 or 1.5
    assert set(values.unique().tolist()) == {1, 1.5} and abs(values.double().mean().item() - 1.3) < bound + 1e-6
    assert set(scaled(x, MXFP4).dequantize()[:, 1:].unique().tolist()) == {1.5}


# --- bytes ---

def test_bytes_and_bits():
    x = torch.randn(64, 256)
    n = x.numel()
    for name, bits in (("MXFP8_E4M3", 8.25), ("MXFP8_E5M2", 8.25), ("MXFP6_E3M2", 6.25), ("MXFP6_E2M3", 6.25), ("MXFP4", 4.25), ("NVFP4", 4.5)):
        s = scaled(x, name)
        whole = 4 if name == "NVFP4" else 0
        assert BLOCK_FORMATS[name].bits_per_value == bits and s.nbytes == n*bits/8 + whole and s.bits_per_value == bits + 8*whole/n
    assert scaled(x, "e4m3fn").nbytes == n + 4 and scaled(x, "e2m1", "row").nbytes == n//2 + 4*64
    assert scaled(torch.ones(1, 3), "e2m1").nbytes == 2 + 4          # half a byte left over
    mx = mx_tensor.MXTensor.to_mx(x, torch.float8_e4m3fn, 32)
    assert scaled(x, MXFP8_E4M3).nbytes == mx.qdata.nbytes + mx.scale.nbytes


# --- error ---

def test_sqnr_of_known_noise():
    x = torch.tensor([3.0, -4.0])
    assert sqnr(x, x + 0.5) == pytest.approx(10*math.log10(12.5/.25)) and sqnr(x, x) == math.inf


@pytest.mark.parametrize("name", ["e2m1", "e5m2", "e4m3fn", "e2m3", "fp16"])
def test_the_octave_model_holds_for_numbers_evenly_over_an_octave(name):
    f = float_format(name)
    x = (1 + (torch.arange(2**16, dtype=torch.float64) + .5)/2**16)*2.0**(f.top - 1)
    s = scaled(x[None], name, "block", 2**16, "e8m0")
    assert sqnr(x, f.round(x)) == pytest.approx(octave_sqnr(f), abs=0.01)
    assert step_sqnr(x[None], s) == pytest.approx(octave_sqnr(f), abs=0.01)


def test_smaller_blocks_and_finer_scales_are_better_on_normal_numbers():
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(3))
    exact = [sqnr(x, scaled(x, "e2m1", "block", b).dequantize()) for b in (256, 64, 32, 16)]
    assert exact == sorted(exact)
    e8m0, e4m3, fp32 = (sqnr(x, scaled(x, "e2m1", "block", 32, k).dequantize()) for k in ("e8m0", "e4m3fn", "fp32"))
    assert e8m0 + .5 < e4m3 < fp32
    s = scaled(x, MXFP6_E2M3)
    assert abs(step_sqnr(x, s) - sqnr(x, s.dequantize())) < 1


def test_scale_values():
    codes = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    assert scale_values("e8m0", codes)[:4].tolist() == [2.0**-127, 2.0**-126, 1, 2.0**127] and scale_values("e8m0", codes)[4].isnan()
    theirs = codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(scale_values("e8m0", codes)[:4], theirs[:4]) and theirs[4].isnan()


@pytest.mark.parametrize("call, words", [
    (lambda x: scaled(x, "fp8"), ("name is 'fp8'", "e4m3fn")),
    (lambda x: scaled(x, MXFP4), ("block is 32", "divisor of the last dimension, 48")),
    (lambda x: scaled(x, "e2m1", "block", 0), ("block is 0",)),
    (lambda x: scaled(x, "e2m1", "block", 16.0), ("block is 16.0",)),
    (lambda x: scaled(x, "e2m1", "block"), ("block is None", "'block'")),
    (lambda x: scaled(x, "e2m1", "row", 16), ("block is 16", "'row'")),
    (lambda x: scaled(x, "e2m1", "channel"), ("scale is 'channel'", "'tensor', 'row' and 'block'")),
    (lambda x: scaled(x, "e2m1", scale_format="bf16"), ("scale_format is 'bf16'", "fp32, e8m0, e4m3fn")),
    (lambda x: scaled(x, "NVFP4", "row"), ("NVFP4", "accepted are none")),
    (lambda x: scaled(x.long(), "e2m1"), ("x is torch.int64",)),
    (lambda x: scaled(x[:, :0], "e2m1"), ("shape (3, 0)",)),
    (lambda x: scaled(x[0, 0], "e2m1"), ("shape ()",)),
    (lambda x: scaled(x, "e2m1", rounding="up"), ("rounding is 'up'",)),
])
def test_refused(call, words):
    with pytest.raises(ValueError) as e: call(torch.ones(3, 48))
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value) and str(e.value).endswith(".")
