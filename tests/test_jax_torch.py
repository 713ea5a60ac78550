"""One Llama in PyTorch and in JAX: the same numbers, the same training, the same tokens; and what bad input says."""
from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("jax", reason="an optional extra")

import jax
import optax
from jax import numpy as jnp

from nbs_lib import jax_torch
from nbs_lib.gpt import batches, text
from nbs_lib.jax_torch import (ADAMW, Llama, LlamaConfig, agreement, causal_attention, causal_sdpa, code_tokens, curves, findings,
                               forward, from_transformers, grads_torch, greedy_jax, init_params, jit_forward, largest_gap, loss, measure,
                               measurements, of_curves, of_logits, of_smollm2, precision, precise_adamw, smollm2_jax, to_jax,
                               to_torch, train_jax, train_torch)

TINY = LlamaConfig(layers=1, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab=128, context=32)


logits = jax.jit(forward, static_argnums=(2, 3))        # compiled once a shape; without jit each operation is
gradient = jax.jit(jax.value_and_grad(loss), static_argnums=3)


def both(config: LlamaConfig = TINY, seed: int = 0):
    torch.manual_seed(seed)
    model = Llama(config)
    return model, to_jax(model)


# --- the same numbers -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers, heads, d, tied, seq", [(1, (4, 4), 4, True, 16), (2, (4, 2), 10, False, 7), (1, (3, 1), 4, True, 1)])
def test_logits_and_gradients_agree_for_many_shapes(layers, heads, d, tied, seq):
    config = LlamaConfig(layers, 20, *heads, d, 24, 128, 16, theta=500.0, tied=tied)
    model, params = both(config)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(4)          # norms of 4, and weights large enough for sharp attention
    params = to_jax(model)
    ids, targets = next(batches(text(), 2, seq))
    ours, theirs = model(ids).detach().numpy(), logits(params, ids.numpy(), config)
    assert theirs.dtype == jnp.float32 and theirs.shape == (2, seq, 128)
    assert largest_gap(ours, theirs) < 1e-5*max(1, np.abs(ours).max())
    (value, grads), own = gradient(params, ids.numpy(), targets.numpy(), config), grads_torch(model, ids, targets)
    assert largest_gap(own, grads) < 1e-5*max(1, *(float(abs(g).max()) for g in jax.tree.leaves(grads)))
    assert model(ids, targets).item() == pytest.approx(float(value), rel=1e-5)


def test_the_llama_is_transformers_own():
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    for tied in (True, False):
        torch.manual_seed(0)
        theirs = LlamaForCausalLM(TheirConfig(vocab_size=99, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                                              num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=tied,
                                              rope_parameters={"rope_type": "default", "rope_theta": 777.0})).eval()
        with torch.no_grad():
            for name, p in theirs.named_parameters(): p.mul_(8 if p.dim() == 2 else 2)
        model, ids = from_transformers(theirs), torch.randint(99, (2, 24))
        assert model.config.theta == 777 and model.config.tied is tied
        with torch.no_grad(): ours, right = model(ids), theirs(ids).logits
        assert torch.allclose(ours, right, atol=1e-5*right.abs().max().item())
        assert largest_gap(logits(to_jax(model), ids.numpy(), model.config), right) < 1e-5*right.abs().max().item()


@pytest.mark.parametrize("change", [{"attention_bias": True}, {"mlp_bias": True},
                                    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}])
def test_a_llama_that_is_not_ours_is_refused(change):
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM(TheirConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, **change))
    with pytest.raises(ValueError, match="accepted"): from_transformers(theirs)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_come_back_to_the_bit(kind, tied):
    config = LlamaConfig(1, 32, 4, 2, 8, 48, 64, 32, tied=tied)
    model = Llama(config).to(kind)
    params = to_jax(model)
    assert all(str(x.dtype) == str(kind).removeprefix("torch.") for x in jax.tree.leaves(params))
    assert ("head" in params) is not tied and params["blocks"][0]["gate"].shape == (32, 48)
    again = to_torch(params, config).state_dict()
    assert again.keys() == model.state_dict().keys() and all(torch.equal(w, again[n]) for n, w in model.state_dict().items())
    assert to_jax(model, jnp.bfloat16)["tokens"].dtype == jnp.bfloat16


def test_in_bf16_both_are_as_far_from_fp32():
    model, _ = both()
    ids, _ = next(batches(text(), 2, 32))
    true = model(ids).detach().numpy()
    low = copy.deepcopy(model).bfloat16()
    ours, theirs = (largest_gap(true, x) for x in (low(ids).detach(), logits(to_jax(low), ids.numpy(), TINY)))
    assert low(ids).dtype == torch.float32
    assert 0 < ours < 2**-5*np.abs(true).max() and theirs < 3*ours


def test_what_was_carried_across_shares_no_memory():
    model, params = both()
    before = jax.tree.map(lambda x: np.array(x), params)
    with torch.no_grad():
        for p in model.parameters(): p.add_(1)
    assert largest_gap(before, params) == 0


def test_attention_can_be_replaced_in_both():
    model, params = both()
    ids, _ = next(batches(text(), 1, 8))
    model.attend = lambda q, k, v: causal_sdpa(0*q, k, v)                    # a mean of what came before
    def mean(q, k, v): return causal_attention(0*q, k, v)
    assert largest_gap(model(ids).detach(), logits(params, ids.numpy(), TINY, mean)) < 1e-5
    assert largest_gap(model(ids).detach(), logits(params, ids.numpy(), TINY)) > 1e-4


def test_causal_what_comes_later_changes_nothing_before():
    _, params = both()
    a = np.arange(16)[None]
    b = a.copy()
    b[0, 10:] = 99
    gap = np.abs(np.asarray(logits(params, a, TINY)) - np.asarray(logits(params, b, TINY))).max(-1)[0]
    assert gap[:10].max() < 1e-6 and gap[10] > 1e-4


def test_fresh_parameters_have_the_shapes_and_the_spread_of_torchs():
    config = LlamaConfig(2, 64, 4, 2, 16, 176, 128, 32, tied=False)
    model, theirs = both(config)
    ours = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.1)     # of 2,048 numbers and more: 1.6 % is one sigma
    q, k = ours["blocks"][0]["k"], ours["blocks"][0]["v"]
    assert largest_gap(q, k) > 0.01                                          # a key of its own for each


# --- the same training ----------------------------------------------------------------------------------------------------------

def test_fifty_steps_lie_on_each_other_and_the_bias_correction_is_why_not_closer():
    config = LlamaConfig(1, 64, 4, 2, 16, 176, 128, 64)
    runs = curves(config, 4, 64)
    learned = runs["torch"][0] - runs["torch"][-1]
    off = {name: largest_gap(losses, runs["fp64"]) for name, losses in runs.items()}
    assert learned > 1 and off["jax"] < 1e-4*learned
    assert off["torch"] < 1e-5 and off["jax, float32, precise"] < 4*off["torch"] and off["jax"] > 3*off["jax, float32, precise"]
    assert of_curves(runs)[1] == "false"


def test_another_setting_shows():
    """What people get wrong is larger than rounding: so the comparison can fail."""
    model, params = both()
    def data(): return batches(text(), 4, 32)
    ours = train_torch(copy.deepcopy(model), data(), 3e-3, 30)
    assert largest_gap(train_jax(params, TINY, data(), 3e-3, 30)[1], ours) < 1e-4
    for wrong in ({"b2": 0.95}, {"eps": 1e-3}):
        assert largest_gap(train_jax(params, TINY, data(), 3e-3, 30, **wrong)[1], ours) > 1e-3, wrong


def test_training_leaves_the_old_parameters_and_changes_the_new():
    _, params = both()
    before = jax.tree.map(lambda x: np.array(x), params)
    after, losses = train_jax(params, TINY, batches(text(), 2, 16), 1e-3, 3)
    assert len(losses) == 3 and largest_gap(before, params) == 0
    assert 1e-3 < largest_gap(before, after) < 5e-3                          # three steps of lr each, and some decay


@settings(max_examples=8)
@given(st.lists(st.floats(-10, 10).filter(lambda g: abs(g) > 1e-3), min_size=1, max_size=10), st.floats(1e-4, 0.5))
def test_adamw_is_the_formula_in_all_three(grads, lr):
    w, m, v = 1.0, 0.0, 0.0
    p = torch.ones(1, requires_grad=True)
    theirs = torch.optim.AdamW([p], lr=lr, betas=(ADAMW["b1"], ADAMW["b2"]), eps=ADAMW["eps"], weight_decay=ADAMW["weight_decay"])
    rules = [[rule, jnp.ones(1), rule.init(jnp.ones(1))] for rule in (optax.adamw(lr, **ADAMW), precise_adamw(lr, **ADAMW))]
    for t, g in enumerate(grads, 1):
        m, v = 0.9*m + 0.1*g, 0.999*v + 0.001*g*g
        w -= lr*(m/(1 - 0.9**t)/((v/(1 - 0.999**t))**0.5 + 1e-8) + 0.01*w)
        p.grad = torch.tensor([g])
        theirs.step()
        for r in rules:
            update, r[2] = r[0].update(jnp.array([g], jnp.float32), r[2], r[1])
            r[1] = optax.apply_updates(r[1], update)
    tolerance = 1e-6*len(grads) + 5e-5*lr*len(grads)                         # roundings; optax's bias correction
    assert p.item() == pytest.approx(w, abs=tolerance)
    assert float(rules[0][1][0]) == pytest.approx(w, abs=tolerance) and float(rules[1][1][0]) == pytest.approx(w, abs=tolerance)


# --- real weights ---------------------------------------------------------------------------------------------------------------

def test_smollm2_says_the_same_in_jax():
    from nbs_lib.smollm2 import PROMPT, greedy, load
    try: params, config, tokenizer = smollm2_jax()
    except ModuleNotFoundError as e: pytest.skip(str(e))
    prompt = tokenizer(PROMPT)["input_ids"]
    with torch.inference_mode():
        theirs, said = greedy(load()[0], torch.tensor(prompt), 20).ids, load()[0](torch.tensor([prompt])).logits
    assert (config.layers, config.hidden, config.heads, config.kv_heads) == (30, 576, 9, 3)
    assert greedy_jax(params, config, prompt, 20) == theirs
    ours = jit_forward(params, np.array([prompt + theirs]), config)[:, :len(prompt)]         # compiled by now
    assert largest_gap(said, ours) < 1e-5*said.abs().max().item()
    committed = measurements()["cpu"]["smollm2"]["rows"]
    assert committed["transformers"] == theirs and committed["jax"] == theirs


# --- findings and the measuring command -----------------------------------------------------------------------------------------

def test_findings_follow_the_numbers():
    rows = [{"library": "torch", "level": "highest", "gap": 1e-7}, {"library": "jax", "level": "default", "gap": 2e-7},
            {"library": "jax", "level": "float32", "gap": 2e-7}]
    assert of_logits(rows)[1] == "holds"
    rows[1]["gap"] = 1e-3
    assert of_logits(rows)[1].startswith("only when")
    rows[2]["gap"] = 1e-3
    assert of_logits(rows)[1] == "false"
    near = {"torch": [4.0, 3.0], "jax": [4.0, 3.01], "jax, float32": [4.0, 3.00001]}
    assert of_curves(near)[1].startswith("only when") and of_curves(near | {"jax, float32": [4.0, 3.1]})[1] == "holds"
    spoken = {"transformers": [1, 2, 3], "jax": [1, 2, 9], "jax, float32": [1, 2, 3]}
    assert of_smollm2(spoken)[1].startswith("only when") and "2 are" in of_smollm2(spoken)[2]
    for f in findings():
        assert f.keys() == {"claim", "verdict", "because", "versions", "device"}
        assert f["verdict"] in ("holds", "false", "no longer") or f["verdict"].startswith("only when")


def test_a_failed_part_leaves_its_error_and_the_others_stay(tmp_path):
    out = tmp_path/"x.json"
    measure({"good": lambda: [1]}, out, "m")
    def bad(): raise RuntimeError("no such card")
    found = measure({"bad": bad}, out, "m")
    assert found == json.loads(out.read_text()) and found["good"]["rows"] == [1]
    assert found["bad"]["error"] == "RuntimeError: no such card" and found["bad"]["provenance"]["jax"] == jax.__version__


def test_a_part_that_yields_is_in_the_file_row_by_row(tmp_path, monkeypatch):
    out, seen = tmp_path/"x_cpu.json", []
    def rows():
        for i in range(3):
            yield i
            seen.append(json.loads(out.read_text())["slow"])
    measure({"slow": rows}, out, "m")
    assert [(x["rows"], x["unfinished"]) for x in seen] == [([0], True), ([0, 1], True), ([0, 1, 2], True)]
    assert json.loads(out.read_text())["slow"]["rows"] == [0, 1, 2] and "unfinished" not in json.loads(out.read_text())["slow"]
    monkeypatch.setattr(jax_torch, "stored", lambda name: {"slow": seen[0], "done": {"rows": [1]}} if name == "x_cpu" else None)
    assert list(jax_torch.measurements("x")["cpu"]) == ["done"]                       # what was cut is no result
    assert "done" in jax_torch.measurements("x", unfinished=True)["cpu"] and len(jax_torch.measurements("x", unfinished=True)["cpu"]) == 2    # unless asked for


def test_a_file_that_is_none_of_ours_stays_as_it_is(tmp_path):
    for text in ("no json", "[1]"):
        out = tmp_path/"x.json"
        out.write_text(text)
        with pytest.raises(SystemExit, match="--out"): measure({"good": lambda: [1]}, out, "m")
        assert out.read_text() == text and [f.name for f in tmp_path.iterdir()] == ["x.json"]


def test_the_command_measures(tmp_path):
    out = tmp_path/"x.json"
    jax_torch.main(["--out", str(out), "--small", "--part", "agreement"])
    assert of_logits(json.loads(out.read_text())["agreement"]["rows"])[1] in ("holds", jax_torch.TRUE_FP32)


def test_the_committed_measurement_names_where_it_comes_from():
    for device, parts in measurements().items():
        assert {"agreement", "curves"} | ({"smollm2"} if device == "cpu" else set()) <= parts.keys()     # its weights are too large to carry to a machine without a net
        for part in parts.values():
            assert {"device", "torch", "jax", "date", "command", "jax device"} <= part["provenance"].keys()


def test_precision_is_set_within_and_restored_after():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), precision("float32", "high"):
        assert torch.get_float32_matmul_precision() == "high" and jax.config.jax_default_matmul_precision == "float32"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before and jax.config.jax_default_matmul_precision is None


def test_agreement_is_relative_to_fp64():
    assert all(0 < r["gap"] < 1e-5 for r in agreement(TINY, 2, 16) if r["library"] == "torch" and r["level"] == "highest")


def test_code_is_counted_without_comments_and_docstrings(tmp_path, monkeypatch):
    (tmp_path/"counted.py").write_text('def f(x):\n    """Said\n    at length."""\n    # why\n    return x + 1\n\n\ndef g(x):\n    return x + 1\n')
    monkeypatch.syspath_prepend(tmp_path)
    import counted
    assert code_tokens(counted.f) == code_tokens(counted.g) == 10            # def f ( x ) : return x + 1
    assert code_tokens(counted.f, counted.g) == 20


# --- bad input ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, value", [("layers", 0), ("hidden", 1.5), ("kv_heads", 3), ("head_dim", 7), ("vocab", True), ("theta", -1),
                                         ("eps", 0), ("theta", float("inf")), ("tied", 1), ("context", "8")])
def test_a_size_that_cannot_be_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; accepted .*") as e: LlamaConfig(**{name: value})
    assert "\n" not in str(e.value)


def test_bad_input_is_named():
    model, params = both()
    for call in (lambda: model(torch.zeros(1, 33, dtype=torch.long)), lambda: forward(params, np.zeros((1, 33), int), TINY)):
        with pytest.raises(ValueError, match="33 tokens .* 32"): call()
    with pytest.raises(ValueError, match="tokens is 0"): greedy_jax(params, TINY, [1], 0)
    with pytest.raises(ValueError): largest_gap({"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match="shape"): largest_gap(jnp.ones(2), jnp.ones(3))
    with pytest.raises(RuntimeError): to_torch(params, LlamaConfig(2, 32, 4, 2, 8, 48, 128, 32))


def test_without_jax_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['jax'] = None\ntry: import nbs_lib.jax_torch\nexcept ModuleNotFoundError as e: print(e)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'nbs_lib[jax]'" in said and said.count("\n") == 1 and "jax" in said.split(";")[0]
