"""Chapter 4b's microbenchmarks as far as a CPU can run them, `nbs measure --card`, and the committed file."""
import json

import pytest
import torch
from test_cli import fake_smi, nbs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nbs_lib import card
from nbs_lib.course import measure
from nbs_lib.kernels import achieved, read_card

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


class Touched(TorchDispatchMode):
    """Bytes of the distinct operands and results of what is not a mere view."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        seen = {(t.data_ptr(), t.numel()): min(t.nbytes, t.untyped_storage().nbytes())
                for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        if not f.is_view: self.bytes += sum(seen.values())
        return out


KINDS = [(make, dtype, kind) for make in ("movers", "norms", "losses", "lookups") for dtype in card.DTYPES
         for kind in getattr(card, make)(64, 128, dtype, "cpu")]


@pytest.mark.parametrize("make,dtype,kind", KINDS)
def test_a_mover_moves_the_bytes_that_it_claims(make, dtype, kind):
    """No less, and little more: numbers for each row or column. A lookup's table is not read as a whole."""
    call, claimed = getattr(card, make)(256, 1024, dtype, "cpu")[kind]
    with Touched() as seen: call()
    if kind == "layer norm backward": claimed = claimed*3//5           # two kernels read x and g each
    if kind == "embedding": claimed += 50304*1024*card.DTYPES[dtype].itemsize - 256*1024*card.DTYPES[dtype].itemsize
    if kind == "embedding backward": claimed -= 256*1024*card.DTYPES[dtype].itemsize      # rows read and added
    assert 0 <= seen.bytes/claimed - 1 < 0.3


def test_every_kind_of_the_committed_file_has_a_mover():
    made = {f"{kind} {dtype}" for make, dtype, kind in KINDS}
    assert made == set(achieved()["moves"])
    assert all(t > 0 for rows in achieved()["moves"].values() for _, t in rows)


@pytest.mark.parametrize("dtype", list(card.DTYPES))
@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
def test_products_are_products_in_each_layout(layout, dtype):
    torch.manual_seed(0)
    call = card.product(6, 10, 8, dtype, layout, "cpu")
    a, b = (cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, torch.Tensor) and cell.cell_contents.shape != (6, 10))
    assert torch.allclose(call().float(), (a.float() @ b.float()), rtol=0.02, atol=0.05)
    assert (a.stride(0) == 1) == (layout[0] == "t") and (b.stride(0) == 1) == (layout[1] == "t")


def test_the_plan_of_products_fits_a_card_of_16_gb():
    for sizes in (card.product_sizes(card.SIZES), card.product_sizes(card.COARSE, 2**41)):
        sizes = list(sizes)
        assert len(sizes) == len(set(sizes)) and all(4*(m*k + k*n + m*n) <= 6e9 and 2*m*n*k <= 2**44 for m, n, k in sizes)
    assert {tuple(row[:3]) for row in achieved()["matmul"]["bf16 nt"]} == set(card.product_sizes(card.SIZES))


def test_the_suites_with_a_clock_that_counts(monkeypatch):
    """Every part of the file, its keys and sizes, with a clock that only calls once."""
    monkeypatch.setattr(card, "SIZES", (16, 32))
    monkeypatch.setattr(card, "COARSE", (16,))
    called = []

    def clock(call, *_):
        called.append(call)
        return 1.0
    monkeypatch.setattr(card, "product", lambda *size: size)
    assert [len(rows) for rows in card.matmuls(clock).values()] == [8, 1]
    assert set(card.alignments(clock)) == set(achieved()["alignment"]) and len(called) == 9 + 15


@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_its_backward(causal):
    ahead, back = card.attention(4, 32, 16, "fp32", causal, "cpu")
    assert ahead().shape == (1, 4, 32, 16) and [g.shape for g in back()] == [(1, 4, 32, 16)]*3
    scores, values = card.batched(4, 32, 16, "bf16", "cpu")
    assert scores().shape == (4, 32, 32) and values().shape == (4, 32, 16)


def test_a_block_s_host_time_is_a_difference_of_two_models():
    small, large = [(3.0, 5.0), (9.0, 9.0), (3.0, 5.0)], [(11.0, 21.0)]*3          # one disturbed round does not count
    assert card.of_a_block(small, large, 2, 10) == [1.0, 2.0, 1.0, 1.0]
    assert card.of_a_block([(1.0, 1.0)], [(9.0, 9.0)], 2, 10)[2:] == [0.0, 0.0]    # never below nothing


@pytest.mark.parametrize("kind", list(card.TINY))
def test_the_host_s_models_run(kind):
    for precision, checkpointing in (("fp32", True), ("amp_bf16", False)):
        assert all(0 < t < 60 for t in card.host_model(card.tiny(kind, 1), precision, "sdpa", checkpointing, None, "cpu")())


def test_the_host_s_keys_are_those_of_the_committed_file():
    keys = {card.host_key(*kind[:4], bool(kind[4])) for kind in card.hosts()}
    assert keys | set(card.OPTIMIZERS) | {"ddp", "full_shard", "shard_grad_op", "zero1", "zero2", "zero3"} == set(achieved()["host"])


def test_the_host_s_optimizers():
    before = torch.get_num_threads()
    found = card.host_optimizers(1, n=64)
    assert found.pop("host threads") == 1 and torch.get_num_threads() == before
    assert set(found) == {f"host {name} {dtype}, parameters/s" for name in card.OPTIMIZERS for dtype in card.DTYPES} and min(found.values()) > 0


def test_rounded():
    assert card.rounded({"a": [1.23456, 2, "x"], "b": (float("inf"), 0.000123456), "c": -98766.0}) == {"a": [1.235, 2, "x"], "b": [float("inf"), 0.0001235], "c": -98770.0}


@NO_GPU
@pytest.mark.parametrize("measured", [card.measure_card, card.links, card.gap, lambda: card.several(2), lambda: card.gpu_seconds(print),
                                      lambda: card.event_seconds(print)])
def test_without_a_gpu_it_says_so(measured):
    with pytest.raises(RuntimeError, match="none here"): measured()


# nbs measure --card ---------------------------------------------------------------------------------------------------------------
SMI = "NVIDIA H100 80GB HBM3, 81559, 580.159.04, 700.00, Disabled"


def test_card_needs_a_gpu_and_nothing_else(tmp_path):
    run = nbs("measure", "--card", cwd=tmp_path, PATH=str(tmp_path))
    assert run.returncode == 1 and "no GPU" in run.stderr and not list(tmp_path.iterdir())
    for more in (["gpt2"], ["--cpu"], ["--inference"], ["--json"], ["--suite", "x.json"]):
        run = nbs("measure", "--card", *more, cwd=tmp_path)
        assert run.returncode == 2 and "--card" in run.stderr and "Traceback" not in run.stderr


@NO_GPU
def test_card_where_the_driver_is_there_and_cuda_is_not(tmp_path):
    run = nbs("measure", "--card", cwd=tmp_path, PATH=fake_smi(tmp_path/"bin", SMI))
    assert run.returncode == 1 and "none here" in run.stderr and "Traceback" not in run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bin"]


def test_card_never_writes_over_a_file(tmp_path):
    path = fake_smi(tmp_path/"bin", SMI)
    (tmp_path/"card_h100-sxm.json").write_text("mine")
    run = nbs("measure", "--card", cwd=tmp_path, PATH=path)
    assert run.returncode == 2 and "card_h100-sxm.json exists" in run.stderr and "--out" in run.stderr
    assert (tmp_path/"card_h100-sxm.json").read_text() == "mine"
    run = nbs("measure", "--card", "--out", "nowhere/card.json", cwd=tmp_path, PATH=path)
    assert run.returncode == 2 and "no folder" in run.stderr


def test_card_writes_what_read_card_reads(tmp_path, monkeypatch):
    """With a pretended GPU and a child that measures nothing."""
    monkeypatch.setenv("PATH", fake_smi(tmp_path/"bin", SMI))
    found = {k: v for k, v in achieved().items() if k not in ("gpu", "provenance")}
    (tmp_path/"found.json").write_text(json.dumps({"provenance": {"device": "NVIDIA H100 80GB HBM3", "torch": "x", "cuda": "y"}, **found}))
    monkeypatch.setattr(measure, "CARD", f"import shutil, sys; shutil.copy({str(tmp_path/'found.json')!r}, sys.argv[1])")
    monkeypatch.chdir(tmp_path)
    said = []
    out = measure.card(say=said.append)
    assert out.name == "card_h100-sxm.json" and "H100" in said[0]
    p = json.loads(out.read_text())["provenance"]
    assert p["driver"] == "580.159.04" and p["command"] == "nbs measure --card" and {"date", "cpus", "torch", "cuda"} <= set(p)
    assert read_card(str(out), "h100-sxm").product(2, "nt", 4096, 4096, 4096) > 0
    text = measure.card_summary(out)
    assert "TFLOP/s" in text and str(out) in text and len(text.splitlines()) == 4
    with pytest.raises(ValueError, match="exists already"): measure.card()
    monkeypatch.setattr(measure, "CARD", "raise SystemExit('the card fell off')")
    with pytest.raises(RuntimeError, match="the card fell off"): measure.card(tmp_path/"other.json")
    assert not (tmp_path/"other.json").exists()
