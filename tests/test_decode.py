"""Chapter 8d: products with quantized weights. The kernels run compiled on a GPU, else in Triton's interpreter where Triton is installed."""
from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nbs_lib import decode as d
from nbs_lib.quantization import NF4, QuantizedLinear, quantize_tensor

HERE = Path(__file__).resolve()


def weight(rows: int, columns: int, method: str, group, seed: int = 0, **options):
    g = torch.Generator().manual_seed(seed)
    return quantize_tensor(torch.randn(rows, columns, generator=g)*0.02, method, group, **options)


def inputs(batch: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def hopper() -> bool: return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def to(q, device: str):
    return replace(q, codes=q.codes.to(device), scales=q.scales.to(device))


def kernels_against_bound(device: str) -> None:
    """Both kernels, several shapes, groups, batches and configs: within error_bound and the rounding of y."""
    vectors = [d.Config("vector", 8, 1, 4), d.Config("vector", 4, 1, 1, 2)]
    dots = [d.Config("dot", 16, 16, 4, 2), d.Config("dot", 64, 32, 4, 3, apart=True)]
    for method, group, shape in (("absmax_int4", 64, (64, 1024)), ("absmax_int4", 128, (32, 2048)), ("absmax_int8", None, (64, 1024)),
                                 ("absmax_int8", 64, (32, 512))):
        q = to(weight(*shape, method, group), device)
        for batch, configs in ((1, vectors + dots[:1]), (5, dots), (33, dots[1:])):
            x = inputs(batch, shape[1]).to(device)
            for config in filter(None, (d.fitting(c, q) for c in configs)):
                y = d.quantized_matmul(x, q, "kernel", config)
                wrong = d.off(y, x, q, config)
                assert y.dtype == torch.bfloat16 and y.shape == (batch, shape[0])
                assert wrong <= 1, (method, group, shape, batch, config, wrong)
    with pytest.raises(ValueError, match="does not fit 5 rows of x and a weight of shape"): d.quantized_matmul(inputs(5, 1024).to(device), to(
        weight(64, 1024, "absmax_int4", 64), device), "kernel", vectors[0])
    q, apart = to(weight(16, 1024, "absmax_int4", 128), device), inputs(1, 1026).to(device)[:, 1:1025]     # x from an odd address on
    assert torch.equal(d.quantized_matmul(apart, q, "kernel"), d.quantized_matmul(apart.clone(), q, "kernel"))
    # what a wrong kernel would make is told apart: a few codes changed by one
    q = to(weight(16, 1024, "absmax_int4", 128), device)
    x = inputs(1, 1024).to(device)
    config = d.fitting(vectors[1], q)
    codes = q.codes.clone()
    codes[:8] ^= 0x11
    assert d.off(d.quantized_matmul(x, replace(q, codes=codes), "kernel", config), x, q, config) > 1
    # a batch of any shape, and no numbers but its own: x's rows beyond the batch do not leak in
    x = inputs(6, 1024).to(device)
    assert torch.equal(d.quantized_matmul(x.view(2, 3, 1024), q, "kernel").view(6, 16), d.quantized_matmul(x, q, "kernel"))


def every_config_of_the_sweep(device: str) -> None:
    """Each config as it is, on a weight that it need not shrink for. Interpreted, asking ahead and taking x apart change no bit: the sums are the same ones."""
    for method, group in (("absmax_int4", 128), ("absmax_int4", 64), ("absmax_int8", None)):
        q, x = to(weight(16, 4096, method, group), device), inputs(1, 4096).to(device)
        for config in d.VECTORS:
            fit = d.fitting(config, q)
            assert fit.rows == config.rows and fit.stages == config.stages and fit.warps == min(config.warps, 4 if q.format.bits == 4 else 8)
            y = d.quantized_matmul(x, q, "kernel", config)
            assert d.off(y, x, q, config) <= 1, (method, config)
            if config.stages > 1 and device == "cpu": assert torch.equal(y, d.quantized_matmul(x, q, "kernel", config._replace(stages=1)))
        q, x = to(weight(128, 512, method, group), device), inputs(70, 512).to(device)
        for config in dict.fromkeys(sum(d.DOTS.values(), ())):
            assert d.fitting(config, q) == config._replace(apart=config.apart and q.format.bits == 4)
            y = d.quantized_matmul(x, q, "kernel", config)
            assert d.off(y, x, q, config) <= 1, (method, config)
            if config.apart and device == "cpu": assert torch.equal(y, d.quantized_matmul(x, q, "kernel", config._replace(apart=False)))


@pytest.mark.parametrize("check", ["kernels_against_bound", "every_config_of_the_sweep"])
def test_kernels_are_within_the_bound(check):
    if hopper(): return globals()[check]("cuda")
    if not find_spec("triton"): pytest.skip("no GPU from compute capability 9.0 on, and Triton, whose interpreter would do, is not installed")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, sys.path)])}
    code = f"import test_decode as t; t.{check}('cpu')"        # a process of its own: Triton reads the variable when it is imported
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not hopper(), reason="no GPU from compute capability 9.0 on")
@pytest.mark.parametrize("config", [c for c in d.VECTORS if c.stages > 1])
def test_an_early_start_changes_nothing(config):
    q, x = to(weight(512, 4096, "absmax_int4", 128), "cuda"), inputs(1, 4096).cuda()
    assert d.fitting(config._replace(early=True), q).early
    plain = d.quantized_matmul(x, q, "kernel", config)
    for _ in range(5): assert torch.equal(d.quantized_matmul(x, q, "kernel", config._replace(early=True)), plain)


@pytest.mark.skipif(not hopper(), reason="no GPU from compute capability 9.0 on")
def test_an_early_start_waits_for_x():
    """A chain: each product's x is the result of the one before."""
    qs = [to(weight(4096, 4096, "absmax_int4", 128, seed=s), "cuda") for s in range(8)]
    config, got = next(c for c in d.VECTORS if c.stages > 1), []
    for early in (False, True):
        x = inputs(1, 4096).cuda()
        for q in qs: x = d.quantized_matmul(x, q, "kernel", config._replace(early=early))
        got.append(x)
    assert torch.equal(*got)


@pytest.mark.skipif(not find_spec("triton"), reason="Triton, which compiles without a GPU, too, is not installed")
@pytest.mark.parametrize("config", [c for c in d.VECTORS if c.stages > 1])
@pytest.mark.parametrize("method, group", [("absmax_int4", 128), ("absmax_int8", None)])
def test_an_early_start_reads_x_and_writes_only_after_the_wait(config, method, group):
    """In what Triton compiles: codes (which are loaded to be evicted first) and scales (16 bits) come before griddepcontrol.wait, all else after it."""
    from nbs_lib.decode_measured import compiled_kernel
    q, orders = weight(16, 4096, method, group), {}
    for early in (True, False):
        ptx = compiled_kernel(d.fitting(config._replace(early=early), q), q).asm["ptx"]
        found = re.findall(r"griddepcontrol\.(wait|launch)|(ld|st)\.global(\S*)", ptx)
        orders[early] = [wait or {"ld": "codes" if "evict_first" in how else "scales" if how.endswith(".b16") else "x", "st": "y"}[kind] for wait, kind, how in found]
    before, after = (part.split() for part in " ".join(orders[True]).split("wait"))
    assert {"codes", "launch"} <= set(before) <= {"codes", "scales", "launch"} and {"x", "y"} <= set(after) and "launch" not in after
    assert not {"wait", "launch"} & set(orders[False])


def number(text: str, registers: dict[str, int]) -> int:
    """The bits of a PTX operand."""
    if text.startswith(("0x", "0f")): return int(text[2:], 16)
    return registers[text] if text in registers else int(text)


def fp32(bits: int) -> float: return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits_of(x: float) -> int: return struct.unpack("<I", struct.pack("<f", x))[0]


def bf16_bits(x: float) -> int:
    assert float(torch.tensor(x).bfloat16()) == x                       # exact, so how it rounds does not matter
    return bits_of(x) >> 16


def execute(ptx: str, given: dict[str, int]) -> dict[str, int]:
    """Runs the few instructions that nbs_lib.decode uses, by the PTX manual's description of each."""
    registers = dict(given)
    for statement in ptx.strip("{} \n").split(";"):
        if not statement.strip() or statement.split()[0].startswith(".reg"): continue
        op, operands = statement.split(None, 1)
        to, *sources = (x.strip() for x in operands.split(","))
        a, b, c = ([number(x, registers) for x in sources] + [0, 0])[:3]
        if op == "mov.b32": out = a
        elif op == "and.b32": out = a & b
        elif op == "shr.u32": out = a >> b
        elif op == "prmt.b32":                                          # byte i is the one, of eight, that nibble i of c names
            out = sum(((b << 32 | a) >> 8*(c >> 4*i & 7) & 255) << 8*i for i in range(4))
        elif op == "sub.f32": out = bits_of(fp32(a) - fp32(b))
        elif op == "fma.rn.bf16x2":
            out = sum(bf16_bits(fp32((a >> s & 0xFFFF) << 16)*fp32((b >> s & 0xFFFF) << 16) + fp32((c >> s & 0xFFFF) << 16)) << s for s in (0, 16))
        elif op == "cvt.rn.bf16x2.f32": out = bf16_bits(fp32(a)) << 16 | bf16_bits(fp32(b))       # the first operand is the upper half
        else: raise AssertionError(f"no such instruction here: {op}")
        registers[to] = out
    return registers


@pytest.mark.parametrize("what", list(d.PTX))
def test_the_ptx_makes_the_numbers_that_codes_stand_for(what):
    kind, bits = what.split()
    outputs = {"fp32 4": 8, "fp32 8": 4, "bf16 4": 4, "bf16 8": 2}[what]
    for start in range(256):
        codes = [start, (start + 85) % 256, (7*start) % 256, 255 - start]
        if bits == "8": codes = [min(c, 254) for c in codes]            # absmax_int8's last code is 254
        found = execute(d.PTX[what], {f"${outputs}": sum(c << 8*i for i, c in enumerate(codes))})
        if kind == "fp32": got = [fp32(found[f"${i}"]) for i in range(outputs)]
        else: got = [fp32((found[f"${i}"] >> s & 0xFFFF) << 16) for i in range(outputs) for s in (0, 16)]
        if bits == "8": assert got == [c - 127 for c in codes]
        else: assert got == [part + (128 if kind == "fp32" else -7) for part in [c & 15 for c in codes] + [c >> 4 for c in codes]]


@pytest.mark.parametrize("method, group", [("absmax_int8", None), ("absmax_int8", 32), ("absmax_int4", 64), ("absmax_int4", None), ("nf4", 64)])
def test_unpacked_weight_is_the_dequantized_one(method, group):
    q = weight(24, 192, method, group)
    levels = torch.tensor(NF4) if method == "nf4" else q.format.zero
    codes, scales = q.codes.view(24, -1), q.scales.view(24, -1)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(d.unpacked_weight(codes, scales, q.format.bits, levels, dtype), q.dequantize(dtype))
    x = inputs(3, 192)
    assert torch.equal(d.unpacked_product(x, codes, scales, q.format.bits, levels), F.linear(x, q.dequantize(torch.bfloat16)))


@pytest.mark.parametrize("method, group, options", [("absmax_int8", None, {}), ("absmax_int4", 64, {}), ("affine_int4", 64, {}), ("nf4_double", 64, {}),
                                                    ("ternary", 64, {}), ("absmax_int3", 64, {})])
@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (0, 256)])
def test_the_plain_way_is_the_layers_forward(method, group, options, shape):
    q = weight(32, 256, method, group, **options)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    bias = torch.nn.Parameter(torch.linspace(-1, 1, 32))
    assert torch.equal(d.quantized_matmul(x, QuantizedLinear(q, bias)), QuantizedLinear(q, bias)(x))
    assert torch.equal(d.quantized_matmul(x, q), F.linear(x, q.dequantize()))


def test_bad_input_is_named():
    q, x = weight(32, 256, "absmax_int4", 64), inputs(2, 256)
    for given, weights, more, said in ((x[:, :8], q, {}, r"x is of shape \(2, 8\), torch.bfloat16; accepted are floating-point tensors \(…, 256\)"),
                                       (x.int(), q, {}, "x is of shape .* torch.int32"), ([1.0], q, {}, "x is a list"), (x, x, {}, "q is a Tensor"),
                                       (x, q, {"way": "fast"}, "way is 'fast'; accepted are 'auto', 'kernel' and 'plain'")):
        with pytest.raises(ValueError, match=said): d.quantized_matmul(given, weights, **more)
    with pytest.raises(ValueError, match="name is 'int3'; accepted are bf16, int8, int4"): d.moved("int3", 1)
    with pytest.raises(ValueError, match="way is 'eager'; accepted are kernel, compiled"): d.predicted("int4", 1, "eager")


@pytest.mark.parametrize("x, q, said", [
    (inputs(2, 256).float(), weight(32, 256, "absmax_int4", 64), "take bf16, and x is torch.float32"),
    (inputs(2, 256), weight(32, 256, "nf4", 64), "and q is nf4"), (inputs(2, 256), weight(32, 256, "absmax_int3", 64), "q is absmax_int3"),
    (inputs(2, 256).requires_grad_(), weight(32, 256, "absmax_int4", 64), "no backward pass"),
    (inputs(2, 256), weight(24, 256, "absmax_int4", 64), r"do not fit a weight of shape \(24, 256\) with groups of 64"),
    (inputs(2, 256), weight(32, 256, "absmax_int8", "tensor"), "groups of 8192"), (inputs(1, 1024), weight(32, 1024, "absmax_int8", "tensor"), "do not fit"),
    (inputs(1, 96), weight(32, 96, "absmax_int4", 48), "do not fit"), (inputs(2, 256), weight(32, 256, "absmax_int4", 16), "groups of 16")])
def test_what_the_kernels_cannot_take_is_said(x, q, said):
    assert re.search(said, d.why_plain(x, q))
    with pytest.raises(ValueError, match="way is 'kernel', which cannot be: The kernels"): d.quantized_matmul(x, q, "kernel")
    assert torch.equal(d.quantized_matmul(x, q), F.linear(x, q.dequantize(x.dtype)))


def test_without_triton_or_a_gpu_the_plain_way_is_taken(monkeypatch):
    q, x = weight(64, 1024, "absmax_int4", 64), inputs(2, 1024)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(d, "has_triton", lambda: False)
    assert d.why_plain(x, q) == "Triton is not installed."
    monkeypatch.setattr(d, "has_triton", lambda: True)
    assert d.why_plain(x, q) == "The kernels are for NVIDIA GPUs from compute capability 9.0 on, and x is on cpu."
    assert torch.equal(d.quantized_matmul(x, q), F.linear(x, q.dequantize(torch.bfloat16)))


@given(rows=st.integers(1, 40), columns=st.integers(1, 64), bits=st.sampled_from([4, 8]), config=st.sampled_from([*d.VECTORS, *sum(d.DOTS.values(), ())]))
def test_a_config_that_fits_divides_the_weight(rows, columns, bits, config):
    rows, columns = 8*rows, 128*columns
    q = d.Quantized(d.format_of(f"int{bits}"), (rows, columns), 128, torch.empty(0), torch.empty(0))
    fit = d.fitting(config, q)
    if fit is None:
        assert config.kernel == "vector" and columns % (32*16*8//bits) or config.kernel == "dot" and rows % 16
        return
    assert rows % fit.rows == 0 and fit.rows <= config.rows and fit.rows & (fit.rows - 1) == 0 and fit.warps <= config.warps
    if fit.kernel == "vector": assert columns % (fit.warps*32*16*8//bits) == 0
    else: assert fit.rows >= 16 and q.group % d.group_steps(q) == 0 and columns % d.group_steps(q) == 0
    assert d.fitting(fit, q) == fit


def test_the_default_config_is_the_measured_one(monkeypatch):
    q = weight(64, 4096, "absmax_int4", 128)
    monkeypatch.setattr(d, "measured", lambda: None)
    assert d.default_config(q, 1) == d.fitting(d.VECTORS[0], q) and d.default_config(q, 100).batch == 128
    monkeypatch.setattr(d, "measured", lambda: {"chosen": {"int4": {"1": ["vector", 4, 1, 2, 1], "64": ["dot", 32, 64, 8, 3, False]}}})
    assert d.default_config(q, 1) == d.Config("vector", 4, 1, 2)
    assert d.default_config(q, 100) == d.Config("dot", 32, 64, 8, 3)
    # batch 16: the measured one for batch 1 is a vector kernel, which takes one row of x
    assert d.default_config(q, 16).kernel == "dot"


@pytest.mark.parametrize("method", ["absmax_int4", "absmax_int8"])
def test_an_early_start_is_never_the_default_and_is_the_measured_one_where_asked_for(monkeypatch, method):
    q = weight(64, 4096, method, 128)
    fast, wrong, other = ["vector", 2, 1, 2, 2, True, False], ["vector", 2, 1, 1, 2, True, False], ["vector", 4, 1, 1, 2, True, False]
    early = [[name, 1, c, s, off] for name in ("int4", "int8") for c, s, off in ((other, 3e-6, 0.5), (fast, 2e-6, 0.5), (wrong, 1e-6, 1.5), (wrong, None, 0.5))]
    for found in (d.measured(), None, {"early": early, "chosen": {}}):
        monkeypatch.setattr(d, "measured", lambda: found)
        assert not any(d.default_config(q, batch).early for batch in (1, 2, 16, 64, 128, 256, 1000))
        config = d.early_config(q)
        assert config.early and config.stages > 1 and d.fitting(config, q) == config
    assert config == d.fitting(d.Config(*fast), q)                      # the fastest of those that are right
    assert d.early_config(weight(24, 96, method, 48)) is None


@pytest.mark.parametrize("name, method, group", [("int8", "absmax_int8", None), ("int4", "absmax_int4", 128), ("int4", "absmax_int4", 64)])
@pytest.mark.parametrize("batch", [1, 7])
def test_predicted_bytes_are_those_of_the_tensors(name, method, group, batch):
    q, x = weight(64, 512, method, group), inputs(batch, 512)
    y = d.quantized_matmul(x, q)
    assert d.moved(name, batch, (64, 512), group or 128) == q.nbytes + x.nbytes + y.nbytes
    assert d.moved("bf16", batch, (64, 512)) == 2*64*512 + x.nbytes + y.nbytes


def test_predictions():
    t = {name: d.predicted(name, 1) for name in d.BITS}
    assert all(x.seconds == x.memory for x in t.values()) and t["int4"].seconds < t["int8"].seconds < t["bf16"].seconds
    assert 3.7 < t["bf16"].seconds/t["int4"].seconds < 4 and d.predicted("int4", 1, bandwidth=1e12).seconds == d.moved("int4", 1)/1e12
    for name in d.BITS:
        times = [d.predicted(name, b).seconds for b in range(1, 600)]
        assert times == sorted(times)
    assert all(d.predicted("int4", b, "compiled").seconds > d.predicted("bf16", b).seconds for b in range(2, 400))
    assert d.predicted("int4", 1, "compiled") == d.predicted("int4", 1)
    assert (d.instructions("bf16"), d.instructions("int8"), d.instructions("int4")) == (0, 1, 7/8)


@given(cross=st.floats(2, 200), slope=st.floats(0.1, 2))
def test_crossover_finds_where_two_lines_meet(cross, slope):
    batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    plain = dict.fromkeys(batches, 3.0)
    quantized = {b: 3.0*(b/cross)**slope for b in batches}
    assert d.crossover(quantized, plain) == pytest.approx(cross)
    assert d.crossover({b: 1.0 for b in batches}, plain) is None
    assert d.crossover({b: 4.0 for b in batches}, plain) == 1


@pytest.mark.parametrize("method", ["nf4", "int4", "int8"])
def test_the_trace_counts_what_dequantizing_moves(method):
    """On the meta device as with numbers; and by hand for its largest kernels."""
    real = weight(64, 256, method, 64)
    with d.Moves() as seen: real.dequantize(torch.bfloat16)
    kernels, size = d.unpacking(method, (64, 256))
    assert (kernels, size) == (len(seen.others), sum(n for _, n in seen.others))
    n = 64*256
    assert n*(4 + 4) < max(b for _, b in seen.others) < n*(4 + 4 + 1) and ("_to_copy", n*(4 + 2)) in seen.others
    assert d.unpacking(method + " compiled", (64, 256)) == (1, real.nbytes + 2*n) and d.unpacking("bf16", (64, 256)) == (0, 0)
