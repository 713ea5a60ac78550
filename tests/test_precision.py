"""Every format bit by bit, against torch's, numpy's and ml_dtypes' casts and against brute force."""
from __future__ import annotations

import builtins
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbs_lib.precision import (FORMATS, ROUNDINGS, SPECIALS, FloatFormat, bits, explore, fields, float_format,
                               power_of_two)

ML = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "e5m2": ml_dtypes.float8_e5m2, "e4m3fn": ml_dtypes.float8_e4m3fn,
      "e3m2": ml_dtypes.float6_e3m2fn, "e2m3": ml_dtypes.float6_e2m3fn, "e2m1": ml_dtypes.float4_e2m1fn}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "e5m2": torch.float8_e5m2,
         "e4m3fn": torch.float8_e4m3fn}
OTHERS = {ml_dtypes.float8_e4m3: FloatFormat("e4m3", 4, 3, 7, "ieee"), ml_dtypes.float8_e3m4: FloatFormat("e3m4", 3, 4, 3, "ieee")}
SATURATES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)      # torch's cast to e4m3fn; see the chapter


def same(a, b) -> bool:
    """Equal numbers, zeros with the same sign, NaN where the other has one."""
    a, b = (torch.as_tensor(np.asarray(v, dtype=np.float64) if not torch.is_tensor(v) else v.double()) for v in (a, b))
    nan = a.isnan()
    return a.shape == b.shape and torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan]) \
        and torch.equal(a[~nan].signbit(), b[~nan].signbit())


def ml_cast(x: torch.Tensor, dtype) -> np.ndarray:
    with np.errstate(all="ignore"): return x.numpy().astype(dtype).astype(np.float64)


def torch_cast(x: torch.Tensor, f: FloatFormat) -> torch.Tensor:
    return x.to(TORCH[f.name]).double()


def torch_overflow(f: FloatFormat) -> str | None:
    return "saturate" if f.name == "e4m3fn" and SATURATES else None


def million(f: FloatFormat, seed: int = 0) -> torch.Tensor:
    """A million float32: half are any bit pattern, half have exponents around the format's range."""
    g = torch.Generator().manual_seed(seed)
    any_bits = torch.randint(-2**31, 2**31, (500_000,), generator=g).to(torch.int32).view(torch.float32)
    low, high = max(-126, 1 - f.bias - f.mantissa - 3), min(127, f.top + 3)
    fraction = torch.rand(500_000, generator=g, dtype=torch.float64) + 1
    near = fraction*power_of_two(torch.randint(low, high + 1, (500_000,), generator=g))
    near = near*(2*torch.randint(2, (500_000,), generator=g) - 1)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, -2.0**-126, 3.4028235e38])
    x = torch.cat([special, any_bits, near.float()])
    return x[~x.isnan()] if f.specials == "none" else x


def positive(f: FloatFormat) -> torch.Tensor:
    """All finite values from 0 up, in order (float64)."""
    values = f.decode(torch.arange(2**(f.bits - 1)))
    return values[values.isfinite()]


# --- the formats ---

def test_the_numbers_of_each_format_are_torchs_and_ml_dtypes():
    for name, dtype in TORCH.items():
        f, info = FORMATS[name], torch.finfo(dtype)
        assert (f.bits, f.max, f.smallest_normal, f.epsilon) == (info.bits, info.max, info.tiny, info.eps)
    for name, dtype in ML.items():
        f, info = FORMATS[name], ml_dtypes.finfo(dtype)
        assert (f.max, f.smallest_normal, f.smallest) == (float(info.max), float(info.tiny), float(info.smallest_subnormal))
    assert list(FORMATS) == ["fp32", "tf32", "bf16", "fp16", "e5m2", "e4m3fn", "e3m2", "e2m3", "e2m1"]
    assert FORMATS["tf32"].bits == 19 and float_format("e2m1") is FORMATS["e2m1"]
    assert positive(FORMATS["e2m1"]).tolist() == [0, .5, 1, 1.5, 2, 3, 4, 6]


def test_power_of_two_is_exact():
    e = torch.arange(-1022, 1024)
    assert power_of_two(e).tolist() == [math.ldexp(1, k) for k in e.tolist()]


@pytest.mark.parametrize("name", ML)
def test_every_code_decodes_as_ml_dtypes_says(name):
    f = FORMATS[name]
    codes = torch.arange(2**f.bits)
    stored = codes.numpy().astype(np.uint8 if f.bits <= 8 else np.uint16).view(ML[name])
    with np.errstate(all="ignore"): assert same(f.decode(codes), stored.astype(np.float64))


@pytest.mark.parametrize("name", ["bf16", "fp16", "e5m2", "e4m3fn"])
def test_every_code_decodes_as_torch_says(name):
    f = FORMATS[name]
    codes = torch.arange(2**f.bits)
    stored = codes.to(torch.uint8 if f.bits == 8 else torch.int32)
    stored = stored.view(TORCH[name]) if f.bits == 8 else stored.to(torch.int16).view(TORCH[name])
    assert same(f.decode(codes), stored)


@pytest.mark.parametrize("f", [f for f in [*FORMATS.values(), *OTHERS.values()] if f.bits < 20], ids=lambda f: f.name)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_encoding_what_was_decoded_gives_the_code(f, rounding):
    codes = torch.arange(2**f.bits)
    values = f.decode(codes)
    number = ~values.isnan()
    assert torch.equal(f.encode(values[number], rounding), codes[number])
    if f.specials != "none":
        nan = f.encode(values[~number])
        assert f.decode(nan).isnan().all() and torch.equal(nan >> f.bits - 1, codes[~number] >> f.bits - 1)


def test_fp32_codes_are_float32s_bits():
    f, x = FORMATS["fp32"], million(FORMATS["fp32"])
    x = x[~x.isnan()]
    codes = x.view(torch.int32).long() & 0xFFFFFFFF
    assert torch.equal(f.encode(x), codes) and same(f.decode(codes), x) and torch.equal(f.round(x), x)


# --- rounding to nearest ---

@pytest.mark.parametrize("name", ML)
def test_a_million_floats_round_as_in_ml_dtypes(name):
    f = FORMATS[name]
    x = million(f)
    assert same(f.round(x), ml_cast(x, ML[name]))


@pytest.mark.parametrize("name", ["bf16", "fp16", "e5m2", "e4m3fn"])
def test_a_million_floats_round_as_in_torch(name):
    f = FORMATS[name]
    x = million(f, seed=1)
    assert same(f.round(x, overflow=torch_overflow(f)), torch_cast(x, f))


def test_a_million_float64s_round_to_fp32_as_in_torch():
    g = torch.Generator().manual_seed(2)
    x = torch.randint(-2**63, 2**63 - 1, (500_000,), generator=g).view(torch.float64)
    near = (torch.rand(500_000, generator=g, dtype=torch.float64) - .5)*power_of_two(torch.randint(-152, 130, (500_000,), generator=g))
    for values in (x, near): assert same(FORMATS["fp32"].round(values), values.float())


@pytest.mark.parametrize("dtype", OTHERS, ids=lambda d: d.__name__)
def test_a_format_that_the_module_does_not_name(dtype):
    """The class is general: IEEE-like e4m3 and e3m4, too, are what ml_dtypes says."""
    f = OTHERS[dtype]
    x = million(f)
    with np.errstate(all="ignore"): assert same(f.decode(torch.arange(256)), np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64))
    assert same(f.round(x), ml_cast(x, dtype))


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.bits <= 19])
def test_every_midpoint_goes_to_the_even_code_and_its_neighbours_to_the_nearer(name):
    """All midpoints of neighbouring values, and the float32 just below and above each; both signs. The last midpoint
    is the one between the largest value and what would follow it."""
    f = FORMATS[name]
    values = positive(f)
    after = torch.cat([values[1:], values[-1:]*2 - values[-2:-1]])
    middle = (values + after)/2
    ties = middle.float()
    exact = ties.double() == middle                  # tf32 and bf16 have ties below float32's subnormal numbers
    assert exact.all() or name == "tf32"
    values, after, ties = values[exact], after[exact], ties[exact]
    codes = torch.arange(len(exact))[exact]
    below, above = (torch.nextafter(ties, torch.tensor(to)) for to in (-math.inf, math.inf))
    last = len(exact) - 1
    limit = f.limit()
    def expected(code): return torch.where(code > last, limit, positive(f)[code.clamp(max=last)])
    for x, code in ((below, codes), (above, codes + 1), (ties, codes + codes % 2)):
        for sign in (1, -1):
            assert same(f.round(sign*x), sign*expected(code))
            if name in ML: assert same(f.round(sign*x), ml_cast(sign*x, ML[name]))
            if name in TORCH: assert same(f.round(sign*x, overflow=torch_overflow(f)), torch_cast(sign*x, f))


def integer_tf32(x: torch.Tensor) -> torch.Tensor:
    """fp32 to tf32 by integers: add just under half a step, one more if the last kept bit is 1, cut 13 bits."""
    pattern = x.view(torch.int32).long() & 0xFFFFFFFF
    rounded = pattern + 0xFFF + (pattern >> 13 & 1) & ~0x1FFF
    return torch.where(x.isnan(), x, rounded.to(torch.int32).view(torch.float32))


def test_tf32_by_integers():
    f = FORMATS["tf32"]
    x = million(f)
    assert same(f.round(x), integer_tf32(x))
    codes = torch.arange(2**19)                      # its codes are fp32's patterns without 13 bits
    assert same(f.decode(codes), (codes << 13).to(torch.int32).view(torch.float32))


# --- overflow ---

def test_500_in_e4m3fn():
    f, x = FORMATS["e4m3fn"], torch.tensor([448., 464., 465., 500., 1e30, math.inf, -500., -math.inf])
    assert same(f.round(x), ml_cast(x, ML["e4m3fn"]))
    assert f.round(x).tolist()[:2] == [448, 448] and f.round(x)[2:].isnan().all()
    assert f.round(x, overflow="saturate").tolist() == [448]*6 + [-448]*2
    assert same(f.round(x, overflow="saturate" if SATURATES else "nan"), torch_cast(x, f))


def test_overflow_in_e5m2_and_fp16_is_infinity_in_torch_as_well():
    for name in ("e5m2", "fp16", "bf16"):
        f = FORMATS[name]
        edge = f.max*(1 + f.epsilon/4/(1 - f.epsilon/2))             # half a step above the largest
        x = torch.tensor([f.max, edge*(1 - 1e-6), edge*1.0001, math.inf], dtype=torch.float64).float()
        assert same(f.round(x), torch_cast(x, f)) and f.round(x)[2:].isinf().all()
        assert f.round(-x, overflow="saturate").tolist() == [-f.max]*4
        assert f.round(x, overflow="nan")[2:].isnan().all() and f.round(x, overflow="nan")[:1].item() == f.max


def test_toward_zero_nothing_finite_overflows():
    for f in FORMATS.values():
        x = torch.tensor([1e300, -1e300, math.inf], dtype=torch.float64)
        assert f.round(x, "zero").tolist()[:2] == [f.max, -f.max]
        assert same(f.round(x, "zero")[2:], torch.tensor([f.limit()]))


# --- toward zero, neighbours ---

@pytest.mark.parametrize("name", ["tf32", "bf16"])
def test_toward_zero_is_a_bit_mask(name):
    f, x = FORMATS[name], million(FORMATS[name])
    x = x[~x.isnan()]
    mask = ~((1 << 23 - f.mantissa) - 1)
    assert same(f.round(x, "zero"), (x.view(torch.int32) & mask).view(torch.float32))


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.bits <= 16])
def test_neighbours_and_toward_zero_are_found_in_the_list_of_values(name):
    f, x = FORMATS[name], million(FORMATS[name])
    x = x[~x.isnan()]
    values, size = positive(f), x.double().abs()
    at = torch.searchsorted(values, size, right=True) - 1            # the last value ≤ |x|
    low = torch.where(size.isinf(), size, values[at])
    high = torch.cat([values, torch.tensor([math.inf]).double()])[at + (values[at] < size)]
    below, above = f.neighbours(x)
    assert torch.equal(torch.where(x < 0, -above, below), low) and torch.equal(torch.where(x < 0, -below, above), high)
    finite = ~x.isinf()
    assert same(f.round(x, "zero")[finite], low[finite].copysign(x[finite]))


@given(st.floats(width=32, allow_nan=False), st.sampled_from(list(FORMATS)))
def test_nearest_is_nearest(x, name):
    """By exact fractions: no neighbour is nearer than the rounded value."""
    f, t = FORMATS[name], torch.tensor([x], dtype=torch.float64)
    value = f.round(t, overflow="saturate").item()
    neighbours = [n.item() for n in f.neighbours(t) if math.isfinite(n.item())]
    if math.isfinite(x):
        off = abs(Fraction(value) - Fraction(x))
        assert value in [*neighbours, math.copysign(f.max, x)] and all(off <= abs(Fraction(n) - Fraction(x)) for n in neighbours)
    assert f.round(torch.tensor([value], dtype=torch.float64)).item() == value                # once is enough
    assert f.round(-t, overflow="saturate").item() == -value


# --- at random ---

@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_gives_only_neighbours_and_is_unbiased(name):
    """The share that goes up is a mean of n draws of 0 or 1: by Hoeffding off by t with probability at most
    2 exp(-2nt²); t is such that this is 10⁻⁹."""
    f, n = FORMATS[name], 40_000
    t = math.sqrt(math.log(2e9)/(2*n))
    g = torch.Generator().manual_seed(0)
    for share in (.03, .5, .9):
        for low in (0.0, f.smallest, f.smallest_normal, 1.0, 2.0**f.top):
            step = f.spacing(torch.tensor([low])).item()
            for sign in (1, -1):
                x = torch.full((n,), sign*(low + share*step), dtype=torch.float64)
                up = f.round(x, "stochastic", generator=g) == sign*(low + step)
                down = f.round(x, "stochastic", generator=g) == sign*low
                assert abs(up.double().mean().item() - share) < t and abs(down.double().mean().item() - 1 + share) < t
        values = f.round(x, "stochastic", generator=g)
        assert set(values.tolist()) == {-2.0**f.top, -2.0**f.top - step}


def test_stochastic_rounding_leaves_values_alone_and_repeats_with_a_seed():
    for f in FORMATS.values():
        values = f.decode(torch.arange(min(2**f.bits, 2**16)))
        if f.specials == "none": values = values[~values.isnan()]
        assert same(f.round(values, "stochastic"), values)
    x = torch.randn(1000)
    a, b, c = (FORMATS["bf16"].round(x, "stochastic", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(3)
    a = FORMATS["bf16"].round(x, "stochastic")
    torch.manual_seed(3)
    assert torch.equal(a, FORMATS["bf16"].round(x, "stochastic"))


def test_stochastic_rounding_beyond_the_largest_value():
    f, n = FORMATS["e4m3fn"], 20_000
    x = torch.full((n,), 456.0)                                      # a quarter of the way from 448 to 480
    r = f.round(x, "stochastic", generator=torch.Generator().manual_seed(0))
    assert abs(r.isnan().double().mean().item() - .25) < math.sqrt(math.log(2e9)/(2*n)) and set(r[~r.isnan()].tolist()) == {448}
    assert (f.round(x, "stochastic", overflow="saturate") == 448).all()


# --- shapes, dtypes, agreement of round with encode ---

@pytest.mark.parametrize("f", FORMATS.values(), ids=lambda f: f.name)
def test_round_is_decode_of_encode(f):
    x = million(f, seed=3)[:50_000]
    for rounding in ROUNDINGS:
        for overflow in SPECIALS[f.specials]:
            seeded = [torch.Generator().manual_seed(5) for _ in range(2)]
            codes = f.encode(x, rounding, overflow, seeded[0])
            assert codes.dtype == torch.int64 and same(f.decode(codes), f.round(x.double(), rounding, overflow, seeded[1]))


def test_dtypes_shapes_and_devices_are_kept():
    f = FORMATS["e4m3fn"]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 3, 5).to(dtype)
        assert f.round(x).dtype == dtype and f.round(x).shape == f.encode(x).shape == (2, 3, 5)
        assert same(f.round(x), f.round(x.double()))                 # these dtypes hold all of e4m3fn's values
        assert same(f.round(x.transpose(0, 2)), f.round(x).transpose(0, 2))
    assert f.round(torch.tensor(1.7)).shape == () and f.encode(torch.zeros(0, 4)).shape == (0, 4)
    assert f.decode(torch.zeros(0, dtype=torch.uint8)).shape == (0,)
    assert f.round(torch.tensor([1e-320], dtype=torch.float64)).item() == 0
    x = torch.randn(4, requires_grad=True)
    assert f.decode(torch.tensor([[8, 136]], dtype=torch.uint8)).tolist() == [[2.0**-6, -2.0**-6]] and f.round(x.detach()).shape == (4,)


# --- what is refused ---

@pytest.mark.parametrize("call, words", [
    (lambda: float_format("fp8"), ("name is 'fp8'", "e4m3fn", "fp32")),
    (lambda: FORMATS["bf16"].round(torch.ones(1), "up"), ("rounding is 'up'", "nearest, zero, stochastic")),
    (lambda: FORMATS["e4m3fn"].encode(torch.ones(1), overflow="infinity"), ("overflow is 'infinity'", "e4m3fn are nan, saturate")),
    (lambda: FORMATS["e2m1"].encode(torch.ones(1), overflow="nan"), ("overflow is 'nan'", "e2m1 are saturate")),
    (lambda: FORMATS["fp16"].round(torch.ones(1), overflow="wrap"), ("overflow is 'wrap'", "infinity, nan, saturate")),
    (lambda: FORMATS["fp16"].round(torch.ones(1, dtype=torch.int32)), ("x is torch.int32", "floating")),
    (lambda: FORMATS["e3m2"].round(torch.tensor([1.0, math.nan])), ("x has a NaN", "e3m2")),
    (lambda: FORMATS["e2m3"].decode(torch.tensor([3, 64])), ("codes go from 3 to 64", "0 to 63")),
    (lambda: FORMATS["bf16"].decode(torch.tensor([-1])), ("codes go from -1", "0 to 65535")),
    (lambda: FORMATS["bf16"].decode(torch.tensor([1.0])), ("codes are torch.float32", "integers")),
    (lambda: FORMATS["bf16"].decode(torch.tensor([True])), ("codes are torch.bool",)),
    (lambda: FloatFormat("x", 9, 2, 255, "ieee"), ("exponent is 9", "2 to 8")),
    (lambda: FloatFormat("x", 4, 0, 7, "ieee"), ("mantissa is 0", "1 to 23")),
    (lambda: FloatFormat("x", 4, True, 7, "ieee"), ("mantissa is True",)),
    (lambda: FloatFormat("x", 4, 3, 7.0, "ieee"), ("bias is 7.0",)),
    (lambda: FloatFormat("x", 4, 3, 7, "IEEE"), ("specials is 'IEEE'", "ieee, fn, none")),
    (lambda: FloatFormat("x", 8, 7, 127, "none"), ("bias is 127", "float32")),
    (lambda: bits(1.0, formats=("fp8",)), ("name is 'fp8'",)),
    (lambda: bits(1.0, "up"), ("rounding is 'up'",)),
])
def test_refused(call, words):
    with pytest.raises(ValueError) as e: call()
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value) and str(e.value).endswith(".")


# --- the microscope ---

def test_bits_shows_bits_neighbours_and_error():
    page = bits(0.1)
    assert fields(FORMATS["fp16"], 0x2E66) == ("0", "01011", "1001100110")
    line = next(row for row in repr(page).splitlines() if row.split()[0] == "fp16")
    assert line.split()[1:] == ["0", "01011", "1001100110", "0.09997559", "0.09997559", "0.1000366", "-2.4e-04"]
    data = page._repr_mimebundle_()
    assert data["text/html"].count("<tr>") == 10 and ">1001100110</code>" in data["text/html"]
    assert "has no code for it" in bits(math.nan).page and "nan" in bits(math.nan).page
    assert "inf" in repr(bits(1e6)) and ">448<" in bits(1e6, overflow="saturate").page
    assert repr(bits(0.0, formats=("e2m1",))).splitlines()[1].split() == ["e2m1", "0", "00", "0", "0", "0", "0", "0"]


def test_exploring_follows_the_controls():
    explorer = explore(0.1)
    controls, page = explorer.children
    number, rounding, saturate = controls.children
    assert page.value == bits(0.1).page
    number.value = "1e6"
    assert page.value == bits(1e6).page
    saturate.value = True
    assert page.value == bits(1e6, overflow="saturate").page
    rounding.value = "zero"
    assert page.value == bits(1e6, "zero", "saturate").page
    number.value = "<b>"
    assert "could not convert" in page.value and "<b>" not in page.value
    data = explorer._repr_mimebundle_()
    data = data[0] if isinstance(data, tuple) else data
    assert data["text/html"] == bits(0.1).page and "application/vnd.jupyter.widget-view+json" in data


def test_without_ipywidgets_a_page_stands_there(monkeypatch):
    real = builtins.__import__
    def without(name, *rest):
        if name.split(".")[0] == "ipywidgets": raise ImportError(name)
        return real(name, *rest)
    monkeypatch.setattr(builtins, "__import__", without)
    assert explore(3.0).page == bits(3.0).page
