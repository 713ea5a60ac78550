"""The memory model: its contract, its arithmetic, real tensors on the CPU, accelerate's own code, and rows measured on H100s."""
import statistics

import pytest
from hypothesis import given, settings, strategies as st

from nbs_lib.blocks import step
from nbs_lib.memory import (PRECISIONS, SHARDED, STATES, STRATEGIES, estimator_table, inference_memory, measurements,
                            predict_row, train_memory)
from nbs_lib.models import arch
from nbs_lib.tape import value

BASE = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160,
            vocab_size=500, max_position_embeddings=128)
SMALL = {
    "llama": dict(model_type="llama", **BASE), "mha": dict(model_type="llama", **{**BASE, "num_key_value_heads": 4}),
    "qwen2": dict(model_type="qwen2", **BASE), "qwen3": dict(model_type="qwen3", head_dim=24, **BASE),
    "mistral": dict(model_type="mistral", sliding_window=4096, **BASE),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, **BASE),
    "gpt2": dict(model_type="gpt2", n_embd=64, n_layer=4, n_head=4, vocab_size=500, n_positions=128, resid_pdrop=0.0,
                 attn_pdrop=0.0, embd_pdrop=0.0),
    "bert": dict(model_type="bert", hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
                 vocab_size=500, max_position_embeddings=128, type_vocab_size=2, hidden_dropout_prob=0.0,
                 attention_probs_dropout_prob=0.0),
}
KNOWN = ["gpt2", "bert-base-cased", "llama-3-8b", "qwen3-0.6b", "qwen2-0.5b", "mistral-7b-v0.1", "mixtral-8x7b"]


@st.composite
def valid(draw):
    """Arguments of train_memory that are allowed together."""
    strategy = draw(st.sampled_from(STRATEGIES))
    world = 1 if strategy == "single" else draw(st.sampled_from([1, 2, 8, 64]))
    single = strategy in ("single", "ddp")
    precisions = [p for p in PRECISIONS if single or p != "amp_fp16"]
    k = dict(model=draw(st.sampled_from(KNOWN)), batch=draw(st.integers(1, 64)), seq=draw(st.integers(1, 512)),
             precision=draw(st.sampled_from(precisions)), optimizer=draw(st.sampled_from(sorted(STATES))),
             checkpointing=draw(st.booleans()), attention=draw(st.sampled_from(["sdpa", "eager"])),
             accumulation=draw(st.integers(1, 4)), strategy=strategy, world_size=world)
    if strategy == "hybrid_shard": k["shard_size"] = draw(st.sampled_from([d for d in (1, 2, 8) if world % d == 0]))
    if strategy in SHARDED: k["offload"] = draw(st.booleans())
    return k


@given(valid())
@settings(max_examples=150, deadline=None)
def test_terms_add_up_and_phases_rise(k):
    m = train_memory(**k)
    assert sum(m.terms.values()) == m.peak and all(type(n) is int and n >= 0 for n in m.terms.values())
    assert list(m.phases) == ["forward", "backward", "step"]
    assert m.phases["forward"] <= m.phases["backward"] <= m.phases["step"] == m.peak <= m.peak_any
    assert sum(m.by_phase[m.peak_phase].values()) == m.peak
    assert {name for name, _, why in m.explain() if why} == set(m.terms)


@given(valid())
@settings(max_examples=60, deadline=None)
def test_more_tokens_never_need_less(k):
    m = train_memory(**k)
    assert train_memory(**{**k, "batch": k["batch"] + 1}).peak >= m.peak
    if k["seq"] < 512: assert train_memory(**{**k, "seq": k["seq"] + 1}).peak >= m.peak


@given(valid())
@settings(max_examples=60, deadline=None)
def test_checkpointing_keeps_less(k):
    a = arch(k["model"])
    weight, products = PRECISIONS[k["precision"]]
    kept = [step(a, weight, products, k["attention"], False, None, False, c).kept for c in (True, False)]
    assert all(x <= y for x, y in zip(*kept))


def test_sharding_divides_the_states():
    one = train_memory("llama-3-8b", 1, 2048, strategy="full_shard", world_size=1)
    eight = train_memory("llama-3-8b", 1, 2048, strategy="full_shard", world_size=8)
    assert eight.terms["optimizer"] == pytest.approx(one.terms["optimizer"]/8, rel=1e-3)
    assert eight.terms["weights"] == pytest.approx(one.terms["weights"]/8, rel=1e-3)
    zeros = [train_memory("llama-3-8b", 1, 128, strategy=s, world_size=8).peak for s in ("ddp", "zero1", "zero2", "zero3")]
    assert zeros == sorted(zeros, reverse=True)


# real tensors -----------------------------------------------------------------------------------------------------------
def saved_bytes(config, b, s, precision, attention="eager"):
    """What autograd saves in a real forward pass on the CPU: each memory once, without weights, buffers and ids."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
    d = dict(config)
    kind = d.pop("model_type")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    cls = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model = cls.from_config(AutoConfig.for_model(kind, **d), dtype=dtype, attn_implementation=attention).train()
    model.config.use_cache = False
    x = torch.randint(0, config["vocab_size"], (b, s))
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), \
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "amp_bf16"):
        loss = model(input_ids=x, labels=x).loss
    assert loss.requires_grad
    return sum(m.nbytes() for at, m in seen.items() if at not in ours)


# On the CPU LayerNorm keeps its statistics in bf16, pow is not raised to fp32 by autocast, and dropout's mask is as wide as the
# tensor; there GPT-2 and BERT differ from CUDA. Everything else must agree to the byte.
SAME_ON_CPU = [(name, p) for name in SMALL for p in ("fp32", "bf16", "amp_bf16")
               if p == "fp32" or name not in ("gpt2", "bert")]


@pytest.mark.parametrize("name,precision", SAME_ON_CPU)
@pytest.mark.parametrize("b,s", [(2, 24), (3, 40)])
def test_saved_tensors_equal_the_ledger_to_the_byte(name, precision, b, s):
    weight, products = PRECISIONS[precision]
    ledger = value(step(arch(SMALL[name]), weight, products, "eager").after_forward[1], b*s, s)
    real = saved_bytes(SMALL[name], b, s, precision)
    if name == "mixtral":       # a CPU routes rows to experts by its own way, whose indices differ by version and by a few hundred bytes
        assert abs(real - ledger) < 0.0005*real
    else:
        assert real == ledger


def test_known_formulas_of_a_block():
    """Bytes per token and layer that the field's reports give (h, a, k, f, n): the ledger's, block by block."""
    def per_token(a, precision):
        v = step(a, *PRECISIONS[precision]).kept
        return sum(v[0::5])
    for name in ("llama-3-8b", "qwen2-0.5b", "smollm2-135m"):
        m = arch(name)
        h, A, k, f, n = m.hidden, m.heads*m.head_dim, m.kv_heads*m.head_dim, m.ffn, m.heads
        assert per_token(m, "bf16") == 16*h + 4*A + 4*k + 8*f + 4*n + 8
        assert per_token(m, "amp_bf16") == 26*h + 4*A + 4*k + 8*f + 4*n + 8
    h, n = 768, 12
    gpt2, bert = arch("gpt2"), arch("bert-base-cased")
    assert [per_token(gpt2, p) for p in ("bf16", "fp32", "amp_bf16")] == [c*h + 4*n + 16 for c in (58, 114, 86)]
    assert [per_token(bert, p) for p in ("bf16", "fp32", "amp_bf16")] == [c*h + 4*n + 16 for c in (34, 66, 42)]


# accelerate ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bert-base-cased", "gpt2", "llama-3-8b", "qwen2-0.5b", "mixtral-8x7b"])
def test_estimator_equals_accelerates_own_code(name):
    pytest.importorskip("accelerate")
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModel
    from nbs_lib.models import MODELS
    d = dict(MODELS[name].config)
    with init_empty_weights(): model = AutoModel.from_config(AutoConfig.for_model(d.pop("model_type"), **d))
    total, _ = calculate_maximum_sizes(model)
    for row in estimator_table(name):
        theirs = estimate_training_usage(total, row["dtype"])
        assert row["model"] == theirs["model"] and row["gradients"] == theirs["gradients"]
        assert row["backward"] == theirs["optimizer"] and row["step"] == theirs["step"]
    assert estimator_table(name)[0]["total"] == total


def test_the_published_tables_digit_by_digit():
    MiB, GiB = 2**20, 2**30
    full, half = estimator_table("bert-base-cased")
    assert full["total"] == 4*108_310_272 + 2*8*512 == 433_249_280
    assert [f"{full[k]/MiB:.2f}" for k in ("model", "gradients", "backward")] == ["413.18", "413.18", "826.36"]
    assert f"{full['step']/GiB:.2f}" == "1.61"
    assert [f"{half[k]/MiB:.2f}" for k in ("model", "gradients", "backward", "step")] == ["413.18", "619.77", "826.36", "826.36"]
    old, now = estimator_table("llama-3-8b", rotary_buffers=True)[0], estimator_table("llama-3-8b")[0]
    assert [f"{old[k]/GiB:.2f}" for k in ("model", "backward", "step")] == ["28.21", "56.42", "112.83"]
    assert f"{now['model']/GiB:.2f}" == "27.96"
    # the widely shown 56.43 and 112.84: no size rounds to 28.21, 56.43 (twice it) and 112.84 (four times it)
    assert not any(f"{2*x:.2f}" == "56.43" and f"{4*x:.2f}" == "112.84" and f"{x:.2f}" == "28.21"
                   for x in (28.2 + i/100_000 for i in range(2000)))


# refusals -----------------------------------------------------------------------------------------------------------------
GOOD = dict(model="llama-3-8b", batch=1, seq=128)
BAD = [
    (dict(model="llama-9-8b"), "model"), (dict(model=7), "model"), (dict(batch=0), "batch"), (dict(batch=-1), "batch"),
    (dict(batch=True), "batch"), (dict(batch=1.0), "batch"), (dict(batch="1"), "batch"), (dict(batch=2**40), "batch"),
    (dict(seq=0), "seq"), (dict(seq=None), "seq"), (dict(seq=10**9), "seq"), (dict(model="gpt2", seq=1025), "seq"),
    (dict(model="bert-base-cased", seq=513), "seq"), (dict(precision="fp16"), "precision"), (dict(precision=None), "precision"),
    (dict(precision=["bf16"]), "precision"), (dict(optimizer="adam"), "optimizer"), (dict(checkpointing=1), "checkpointing"),
    (dict(attention="flash"), "attention"), (dict(accumulation=0), "accumulation"), (dict(strategy="fsdp"), "strategy"),
    (dict(world_size=2), "world_size"), (dict(world_size=0), "world_size"), (dict(world_size=True), "world_size"),
    (dict(shard_size=2), "shard_size"), (dict(strategy="hybrid_shard", world_size=8), "shard_size"),
    (dict(strategy="hybrid_shard", world_size=8, shard_size=3), "shard_size"),
    (dict(strategy="hybrid_shard", world_size=8, shard_size=16), "shard_size"),
    (dict(strategy="full_shard", world_size=8, shard_size=4), "shard_size"),
    (dict(strategy="full_shard", world_size=8, precision="amp_fp16"), "precision"),
    (dict(offload=True), "offload"), (dict(offload=True, strategy="ddp", world_size=2), "offload"),
    (dict(offload=True, strategy="zero3", world_size=2), "offload"), (dict(offload="yes"), "offload"),
    (dict(lora_rank=0), "lora_rank"), (dict(lora_rank=True), "lora_rank"), (dict(lora_rank=8, precision="fp32"), "precision"),
    (dict(lora_rank=8, model="bert-base-cased"), "lora_rank"), (dict(lora_rank=8, strategy="full_shard", world_size=2), "strategy"),
    (dict(gpu="h9000"), "h9000"),
]


@pytest.mark.parametrize("change,name", BAD)
def test_bad_values_are_refused_by_name(change, name):
    with pytest.raises(ValueError) as e: train_memory(**{**GOOD, **change})
    text = str(e.value)
    assert name in text and len(text) > 20


@pytest.mark.parametrize("change,name", [
    (dict(batch=0), "batch"), (dict(seq=True), "seq"), (dict(precision="amp_bf16"), "precision"),
    (dict(kv_precision="int4"), "kv_precision"), (dict(world_size=3), "world_size"), (dict(model="bert-base-cased"), "model")])
def test_inference_refuses_too(change, name):
    with pytest.raises(ValueError, match=name): inference_memory(**{**GOOD, **change})


@given(st.sampled_from(["gpt2", "llama-3-8b", "qwen3-0.6b"]), st.integers(1, 64), st.integers(1, 1024),
       st.sampled_from(["fp32", "bf16", "int8", "int4"]), st.sampled_from(["bf16", "fp8"]))
@settings(max_examples=60, deadline=None)
def test_inference_terms_add_up(model, b, s, precision, kv):
    k = inference_memory(model, b, s, precision, kv)
    a = arch(model)
    assert sum(k.terms.values()) == k.peak
    assert k.terms["kv_cache"] == 2*a.layers*a.kv_heads*a.head_dim*b*s*(2 if kv == "bf16" else 1)
    assert inference_memory(model, b + 1, s, precision, kv).peak > k.peak


# measured rows --------------------------------------------------------------------------------------------------------------
ROWS = [r for r in measurements() if r["kind"] == "train"]
ONE = [r for r in ROWS if r["settings"].get("strategy", "single") == "single"]
TWO = [r for r in ROWS if r["settings"].get("strategy", "single") != "single"]


def errors(rows, *names):
    """Relative errors in percent, a list for each name. requested: bytes asked of the allocator; allocated: as max_memory_allocated counts."""
    quick = not {"replayed", "reserved"} & set(names)   # the replay takes most of a second a row
    found = [predict_row(r, quick) for r in rows]
    lists = [[abs(e[what]) for e in found if what in e] for what in names]
    return lists if len(names) > 1 else lists[0]


def median(e): return statistics.median(e)


def p95(e): return sorted(e)[int(0.95*len(e))]


FULL = [r for r in ONE if r["group"] != "small"]
SHARDED_ROWS = [r for r in TWO if r["settings"]["strategy"] in SHARDED]


def test_the_data_set_is_as_wide_as_it_claims():
    """Settings that the issue asked for: models, precisions, optimizers, lengths, batches, LoRA, accumulation."""
    seen = lambda k: {r["settings"].get(k) for r in FULL}
    assert len(FULL) + len(measurements(out_of_memory=True)) >= 120
    assert {"fp32", "bf16", "amp_bf16", "amp_fp16"} <= seen("precision") and {"adamw", "adamw_fused", "sgd", "sgd_momentum"} <= seen("optimizer")
    assert {True, False} == seen("checkpointing") and {"sdpa", "eager"} == seen("attention") and max(seen("accumulation")) >= 3
    assert min(seen("seq")) <= 128 and max(seen("seq")) >= 5000 and max(seen("batch")) >= 24 and 777 in seen("seq") and 3 in seen("batch")
    assert len({arch(m).model_type for m in seen("model")}) >= 6 and max(arch(m).parameters for m in seen("model")) > 8e9
    assert sum(r["group"] == "held out" for r in FULL) >= 30


@pytest.mark.parametrize("group", ["small", "real", "held out"])
def test_requested_bytes_on_one_h100(group):
    """What a step asks the allocator for: nearly to the byte, on settings drawn at random before anything was measured, too.

    Known misses: GPT-2 with LoRA and checkpointing is off by one hidden state (up to 0.5%), BERT, eager and checkpointed, by a
    score matrix (1.7%), Llama-3.2-3B under fp16 autocast by 60 MB (0.16%).
    """
    e = errors([r for r in ONE if r["group"] == group], "requested")
    assert len(e) >= 30 and median(e) < 0.0005 and sum(x > 0.02 for x in e) <= 3 and max(e) < 1.8


@pytest.mark.parametrize("what", ["allocated", "any", "forward", "backward", "step"])
def test_allocated_bytes_on_one_h100(what):
    """max_memory_allocated(), which counts whole blocks: median 0.1%, 95th percentile 1% (1.01% by a hair), worst 2%, in every phase."""
    e = errors(FULL, what)
    assert len(e) >= 135 and median(e) <= 0.06 and p95(e) <= 1.02 and max(e) <= 1.7


@pytest.mark.parametrize("what", ["allocated", "forward", "backward", "step"])
def test_two_and_four_h100s(what):
    """DDP, FSDP2, hybrid sharding and the course's ZeRO: median 0.5%, worst 3%; on these rows much less."""
    e = errors([r for r in TWO if r["group"] != "small"], what)
    assert len(e) >= 50 and median(e) <= 0.05 and max(e) <= 1.7


def test_sharded_steps_ask_for_what_is_predicted():
    """FSDP2, bytes requested: to 0.02%, three-layer models, offload and hybrid sharding included."""
    e = errors(SHARDED_ROWS, "requested")
    assert len(e) >= 40 and max(e) < 0.02


def test_replay_of_fsdp2_and_its_streams():
    """max_memory_allocated(), and what is reserved in three pools: median 2%, worst 8%; models of full size."""
    real = [r for r in SHARDED_ROWS if r["group"] != "small"]
    e, reserved = errors(real, "replayed", "reserved")
    assert len(e) >= 15 and median(e) < 0.01 and max(e) < 1
    assert median(reserved) <= 0.5 and max(reserved) <= 8


def test_ddp_peaks_lie_between_the_steady_one_and_the_largest():
    """Old buckets live as long as NCCL's watchdog holds them, from run to run differently: peak_any counts them."""
    for r in (r for r in TWO if r["settings"]["strategy"] == "ddp" and r["group"] != "small"):
        m = train_memory(**r["settings"])
        assert 0.99*m.peak <= r["peak_any"] <= 1.01*m.peak_any, r["name"]


def test_replay_of_the_allocator_on_one_h100():
    """max_memory_allocated() itself, and what is reserved, on every fifth row; chapter 3 replays all and asserts the same. (The worst is 18%, of a small BERT.)"""
    e, reserved = errors(FULL[::5], "replayed", "reserved")
    assert len(e) >= 27 and median(e) < 0.01 and p95(e) < 1 and max(e) < 1.8
    assert median(reserved) <= 0.05 and max(reserved) < 19


@given(st.sampled_from(["gpt2", "qwen2-0.5b"]), st.integers(1, 8), st.integers(1, 512), st.sampled_from(list(PRECISIONS)),
       st.booleans())
@settings(max_examples=15, deadline=None)
def test_replay_counts_at_least_what_is_asked_for(model, b, s, precision, ckpt):
    m = train_memory(model, b, s, precision, checkpointing=ckpt)
    asked = m.peak - m.terms.get("block rounding", 0)
    assert asked <= m.replayed.peak <= m.reserved
    # the closed form rounds the blocks of weights, states and gradients, the replay those of activations, too
    assert abs(m.peak/m.replayed.peak - 1) < 0.05


def test_inference_rows():
    """The prefill's peak, as the allocator counts it."""
    e = []
    for r in measurements():
        s = r["settings"]
        if r["kind"] == "inference" and r["group"] != "small":
            p = inference_memory(s["model"], s["batch"], s["seq"], s["precision"], kv_precision=s["precision"]).peak
            e.append(abs(100*(p/r["peak"] - 1)))
    assert len(e) >= 8 and statistics.median(e) < 0.05 and max(e) < 1.6


def test_rows_carry_their_provenance():
    for r in measurements():
        assert r["provenance"]["device"].startswith("NVIDIA H100") and r["provenance"]["torch"].startswith("2.11")
        assert r["provenance"]["transformers"] == "5.17.0" and r["provenance"]["date"] and r["provenance"]["command"]
