"""Other estimators: our functions against the originals' outputs, the rules of the comparison, and the comparison itself."""
import statistics

import pytest
from hypothesis import given, settings, strategies as st

from nbs_lib.memory import STATES, STRATEGIES, PRECISIONS, SHARDED, train_memory
from nbs_lib.models import arch
from nbs_lib.peers import (PEERS, accelerate, deepspeed, deepspeed_zero2, deepspeed_zero3, eleuther, eleuther_memory, errors,
                           largest_layer, llm_analysis, llm_analysis_memory, llm_analysis_peak, megatron, megatron_memory,
                           steps, textbook, textbook_activations)

# What the originals say, made on 2026-11-22 by running them on a CPU, at the commits that the chapter names. Bytes per GPU.
# DeepSpeed edaa722: the two functions, cut out of their files unchanged; the arguments are ours, the output the second value (GPU).
ZERO2 = [
    ((2_851_000_000, 8, False), 12_116_750_000),
    ((2_851_000_000, 8, True), 5_702_000_000),
    ((124_439_808, 1, False), 2_488_796_160),
    ((1_235_814_400, 3, False), 9_886_515_200),
]
ZERO3 = [
    ((2_851_000_000, 32_000_000, 8, False, False), 6_542_750_000),
    ((2_851_000_000, 32_000_000, 8, True, False), 840_750_000),
    ((2_851_000_000, 32_000_000, 8, True, True), 128_000_000),
    ((1_235_814_400, 262_668_288, 3, False, False), 8_465_559_552),
]
# EleutherAI's cookbook 827ee3b: calc_transformer_mem.py with these options; ":.2f" in its prints replaced by ":.17g", GiB times 2^30.
ELEUTHER = [
    ('--zero-stage 0 -hs 768 -l 12 -a 12 -v 50257 -s 1024 -b 8',
     dict(h=768, L=12, n=12, V=50257, s=1024, b=8, ffn=4.0, linears=2),
     dict(weights=325_982_208, gradients=651_964_416, optimizer=1_955_893_248, unsharded=0, activations=8_606_711_808, total=11_540_551_680)),
    ('--zero-stage 0 -hs 2048 -l 16 -a 32 -v 128256 -s 2048 -b 2 -ff 4.0 -nl 3 -kv 0.25 -ca',
     dict(h=2048, L=16, n=32, V=128256, s=2048, b=2, ffn=4.0, linears=3, kv=0.25, checkpointing=True),
     dict(weights=3_005_751_296, gradients=6_011_502_592, optimizer=18_034_507_776, unsharded=0, activations=4_563_402_752, total=31_615_164_416)),
    ('--zero-stage 0 -hs 1024 -l 28 -a 16 -v 151936 -s 640 -b 3 -ff 3.0 -nl 3 -kv 0.5 --disable-mixed-precision --low-prec-bytes-per-val 4 --optimizer sgd_momentum',
     dict(h=1024, L=28, n=16, V=151936, s=640, b=3, ffn=3.0, linears=3, kv=0.5, mixed=False, low=4, optimizer='sgd_momentum'),
     dict(weights=2_657_492_992, gradients=2_657_492_992, optimizer=5_314_985_984, unsharded=0, activations=8_587_837_440, total=19_217_809_408)),
    ('--zero-stage 3 --num-gpus 4 -hs 2048 -l 16 -a 32 -v 32000 -s 1024 -b 1 -ff 2.75 -nl 3 -kv 0.125 -zbs 0 -zmlp 123456789',
     dict(h=2048, L=16, n=32, V=32000, s=1024, b=1, ffn=2.75, linears=3, kv=0.125, zero=3, gpus=4, live=123_456_789),
     dict(weights=419_039_232, gradients=838_078_464, optimizer=2_514_235_392, unsharded=246_913_578, activations=3_825_205_248, total=7_843_471_914)),
    ('--zero-stage 2 --num-gpus 8 -hs 4096 -l 32 -a 32 -v 32000 -s 4096 -b 1 -ff 3.5 -nl 3 -kv 0.25 --num-experts 8 -zbs 1000',
     dict(h=4096, L=32, n=32, V=32000, s=4096, b=1, ffn=3.5, linears=3, kv=0.25, zero=2, gpus=8, experts=8, bucket=1000),
     dict(weights=93_438_623_744, gradients=23_359_655_936, optimizer=70_078_967_808, unsharded=2000, activations=104_152_956_928, total=291_030_206_416)),
    ('--zero-stage 1 --num-gpus 2 -hs 768 -l 12 -a 12 -v 50257 -s 1024 -b 8 --bytes-per-grad-ele 2 -zbs 500000000',
     dict(h=768, L=12, n=12, V=50257, s=1024, b=8, ffn=4.0, linears=2, gradient=2, zero=1, gpus=2, bucket=500_000_000),
     dict(weights=325_982_208, gradients=325_982_208, optimizer=977_946_624, unsharded=1_000_000_000, activations=8_606_711_808, total=11_236_622_848)),
]
# Megatron-LM d98e8a6: report_theoretical_memory with an argument object of these values, every parallel size 1; its import of .utils stubbed.
MEGATRON = [
    (dict(h=768, L=12, n=12, kv=12, d=64, f=3072, V=50257, s=1024, b=8, gated=False, rms=False, tied=True),
     dict(states=2_224_267_776, activations=3_579_727_872, total=5_803_995_648)),
    (dict(h=2048, L=16, n=32, kv=8, d=64, f=8192, V=128256, s=2048, b=2, gated=True, rms=True, tied=True),
     dict(states=22_244_659_200, activations=5_921_238_221, total=28_165_897_421)),
    (dict(h=1024, L=28, n=16, kv=8, d=128, f=3072, V=151936, s=640, b=3, gated=True, rms=True, tied=False),
     dict(states=13_529_253_888, activations=2_584_108_800, total=16_113_362_688)),
    (dict(h=4096, L=32, n=32, kv=8, d=128, f=14336, V=32000, s=4096, b=1, gated=True, rms=True, tied=False, experts=8, top=2),
     dict(states=840_650_268_672, activations=19_494_425_395, total=860_144_694_067)),
]
# llm-analysis d841e40: LLMAnalysis(...).training(...) with 16-bit weights and activations; `fire`, which only its command line needs, stubbed.
LLM_ANALYSIS = [
    (dict(h=768, L=12, n=12, kv=12, f=3072, V=50257, s=1024, b=8, gated=False, prefetch=0),
     dict(weights=247_102_464, optimizer=1_482_614_784, gradients=494_204_928, activations=3_965_992_960, unsharded=0, loss=823_410_688, total=6_519_120_896)),
    (dict(h=768, L=12, n=12, kv=12, f=3072, V=50257, s=1024, b=8, gated=False, flash=False, softmax_dropout=True, norm=2, master=2, other=2, prefetch=0),
     dict(weights=247_102_464, optimizer=494_204_928, gradients=247_102_464, activations=9_379_790_848, unsharded=0, loss=823_410_688, total=10_944_508_928)),
    (dict(h=2048, L=16, n=32, kv=8, f=8192, V=128256, s=2048, b=2, gated=True, checkpointing=True, other=4, prefetch=0),
     dict(weights=2_471_628_800, optimizer=9_886_515_200, gradients=4_943_257_600, activations=1_369_440_256, unsharded=0, loss=1_050_673_152, total=18_352_074_752)),
    (dict(h=2048, L=16, n=32, kv=8, f=8192, V=128256, s=16, b=1, gated=True, zero=3, dp=2),
     dict(weights=1_235_814_400, optimizer=7_414_886_400, gradients=2_471_628_800, activations=25_862_144, unsharded=243_286_016, loss=4_104_192, total=11_365_615_616)),
    (dict(h=2048, L=22, n=32, kv=4, f=5632, V=32000, s=1024, b=1, gated=True, master=2, other=2, zero=2, dp=2, prefetch=0),
     dict(weights=2_069_024_768, optimizer=2_069_024_768, gradients=1_034_512_384, activations=1_744_830_464, unsharded=0, loss=65_536_000, total=5_948_416_000)),
    (dict(h=4096, L=32, n=32, kv=8, f=14336, V=32000, s=4096, b=3, gated=True, experts=8, top=2, zero=1, dp=8),
     dict(weights=93_143_441_408, optimizer=69_857_581_056, gradients=186_286_882_816, activations=102_659_260_416, unsharded=5_805_080_576, loss=786_432_000, total=355_092_985_856)),
    (dict(h=1024, L=8, n=16, kv=4, f=2816, V=32000, s=512, b=4, gated=True, experts=4, top=2, other=4, flash=False, prefetch=1),
     dict(weights=661_227_520, optimizer=2_644_910_080, gradients=1_322_455_040, activations=1_569_783_808, unsharded=74_461_184, loss=131_072_000, total=5_006_993_408)),
]


@pytest.mark.parametrize("arguments,said", ZERO2)
def test_deepspeed_zero2(arguments, said):
    assert deepspeed_zero2(*arguments) == said


@pytest.mark.parametrize("arguments,said", ZERO3)
def test_deepspeed_zero3(arguments, said):
    assert deepspeed_zero3(*arguments) == said


@pytest.mark.parametrize("command,arguments,said", ELEUTHER)
def test_eleuther(command, arguments, said):
    ours = eleuther_memory(**arguments)
    assert round(sum(ours.values())) == said["total"]
    assert {k: round(n) for k, n in ours.items()} == {k: n for k, n in said.items() if k != "total"}


@pytest.mark.parametrize("arguments,said", MEGATRON)
def test_megatron(arguments, said):
    ours = megatron_memory(**arguments)
    assert round(ours["states"] + ours["copies"]) == said["states"]
    assert round(ours["activations"] + ours["logits"]) == said["activations"]
    assert round(sum(ours.values())) == said["total"]


@pytest.mark.parametrize("arguments,said", LLM_ANALYSIS)
def test_llm_analysis(arguments, said):
    ours = llm_analysis_memory(**arguments)
    assert round(sum(llm_analysis_peak(ours).values())) == said["total"]
    ours["activations"] += ours.pop("logits")                  # the original counts the logits among them
    assert {k: round(n) for k, n in ours.items()} == {k: n for k, n in said.items() if k != "total"}


@pytest.mark.parametrize("model", ["gpt2", "bert-base-cased", "llama-3-8b"])
@pytest.mark.parametrize("precision,line", [("fp32", "float32"), ("amp_bf16", "float32"), ("bf16", "float16")])
def test_accelerate_is_its_own_code(model, precision, line):
    estimate = pytest.importorskip("accelerate.commands.estimate")
    a = arch(model)
    size = 4*a.base_parameters + sum(a.buffers.values())
    printed = max(estimate.estimate_training_usage(size, line).values())
    assert accelerate(dict(model=model, batch=1, seq=128, precision=precision))["total"] == printed


def test_the_textbook_is_the_papers_formula():
    s, b, h, L, n = 2048, 4, 6144, 48, 64
    assert textbook_activations(s, b, h, L, n) == s*b*h*L*34 + 5*n*s*s*b*L
    assert textbook_activations(s, b, h, L, n, checkpointing=True) == 2*s*b*h*L
    mixed = textbook(dict(model="gpt2", batch=1, seq=1, precision="amp_bf16", checkpointing=True))
    assert mixed["claims"]["states"] == 16*arch("gpt2").parameters


def test_largest_layer_is_torchs():
    """As DeepSpeed's model_to_params counts it, on the model itself."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    small = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100, max_position_embeddings=64)
    for c in (transformers.LlamaConfig(intermediate_size=160, **small),
              transformers.MixtralConfig(intermediate_size=160, num_local_experts=4, **small),
              transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=64)):
        with torch.device("meta"): m = transformers.AutoModelForCausalLM.from_config(c)
        assert largest_layer(arch(c)) == max(sum(p.numel() for p in x.parameters(recurse=False)) for x in m.modules())


@st.composite
def valid(draw):
    """Arguments of train_memory that are allowed together."""
    strategy = draw(st.sampled_from(STRATEGIES))
    k = dict(model=draw(st.sampled_from(["gpt2", "bert-base-cased", "llama-3-8b", "qwen3-0.6b", "mixtral-8x7b"])), strategy=strategy,
             world_size=1 if strategy == "single" else draw(st.sampled_from([1, 2, 8])), batch=draw(st.integers(1, 32)),
             seq=draw(st.integers(1, 511)), optimizer=draw(st.sampled_from(sorted(STATES))), checkpointing=draw(st.booleans()),
             attention=draw(st.sampled_from(["sdpa", "eager"])), accumulation=draw(st.integers(1, 3)),
             precision=draw(st.sampled_from([p for p in PRECISIONS if strategy in ("single", "ddp") or p != "amp_fp16"])))
    if strategy == "hybrid_shard": k["shard_size"] = 1
    if strategy in SHARDED: k["offload"] = draw(st.booleans())
    return k


@given(valid(), st.sampled_from(sorted(PEERS)))
@settings(max_examples=250, deadline=None)
def test_claims_make_the_total_and_more_tokens_never_need_less(k, name):
    said = PEERS[name](k)
    more, longer = PEERS[name](k | {"batch": k["batch"] + 1}), PEERS[name](k | {"seq": k["seq"] + 1})
    if said is None:
        assert more is None and longer is None                 # what a tool has no option for does not depend on tokens
        return
    assert said["claims"] and all(type(n) is int and n > 0 for n in said["claims"].values())
    assert sum(said["claims"].values()) == said["total"] <= min(more["total"], longer["total"])


BASE = dict(model="llama-3.2-1b", batch=1, seq=512, precision="amp_bf16")
NO_OPTION = {
    "accelerate": [dict(optimizer="sgd"), dict(strategy="full_shard", world_size=2)],
    "DeepSpeed": [dict(precision="fp32"), dict(precision="bf16"), dict(optimizer="sgd"), dict(strategy="ddp", world_size=2)],
    "textbook": [dict(model="mixtral-8x7b"), dict(optimizer="adamw_8bit"), dict(strategy="full_shard", world_size=2, offload=True)],
    "EleutherAI": [dict(model="bert-base-cased"), dict(precision="bf16"), dict(optimizer="sgd"), dict(checkpointing=True)],
    "Megatron-LM": [dict(model="bert-base-cased"), dict(checkpointing=True), dict(precision="fp32"), dict(attention="eager"),
                    dict(strategy="full_shard", world_size=2)],
    "llm-analysis": [dict(model="bert-base-cased"), dict(precision="fp32"), dict(precision="bf16", optimizer="sgd"),
                     dict(optimizer="adamw_8bit"), dict(strategy="full_shard", world_size=2, offload=True)],
}


@pytest.mark.parametrize("name", PEERS)
def test_what_a_tool_has_no_option_for_is_none(name):
    assert PEERS[name](BASE)["total"] > 0
    for change in [*NO_OPTION[name], dict(precision="bf16", lora_rank=8)]:
        assert PEERS[name](BASE | change) is None, change


@pytest.mark.parametrize("name", PEERS)
def test_bad_settings_are_refused_in_the_librarys_words(name):
    with pytest.raises(ValueError, match="batch is 0; accepted"): PEERS[name](BASE | {"batch": 0})
    with pytest.raises(ValueError, match="precision is 'fp8'"): PEERS[name](BASE | {"precision": "fp8"})


def test_sharding_divides_what_it_says():
    P, two = arch("llama-3.2-1b").parameters, BASE | dict(world_size=2)
    assert deepspeed(two | dict(strategy="shard_grad_op"))["total"] == 2*P + 9*P
    assert textbook(two | dict(strategy="full_shard", checkpointing=True))["claims"]["states"] == 8*P
    assert textbook(two | dict(strategy="zero1"))["claims"]["states"] == 4*P + 6*P
    for peer in (eleuther, llm_analysis):
        single, ddp, full = (peer(BASE), peer(two | dict(strategy="ddp")), peer(two | dict(strategy="full_shard")))
        assert single == ddp and full["total"] < single["total"]
    assert megatron(two | dict(strategy="ddp")) == megatron(BASE)


@pytest.mark.parametrize("name", PEERS)
def test_a_hundred_times_closer(name):
    """On the measured steps on one GPU: the formula over all of them, the replay on just those that the peer supports."""
    peer = errors(PEERS[name], rows := steps())
    theirs = statistics.median(abs(e["total"]) for e in peer)
    formula = statistics.median(abs(100*(train_memory(**r["settings"]).peak/r["peak"] - 1)) for r in rows)
    replayed = statistics.median(abs(100*(train_memory(**e["row"]["settings"]).replayed.peak/e["row"]["peak"] - 1)) for e in peer)
    assert len(peer) >= 10 and theirs >= 100*formula and theirs >= 100*replayed


def test_what_accelerate_and_deepspeed_claim_they_compute():
    """Their totals are far off for what they leave out, not for what they say."""
    for name, near in (("accelerate", 1), ("DeepSpeed", 10)):
        e = errors(PEERS[name], steps())
        assert statistics.median(abs(x["terms"]) for x in e) < near < statistics.median(abs(x["total"]) for x in e)
