"""nbs_lib.models against transformers' own classes, built on the meta device (shapes without memory)."""
import json
import os
import re

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st

from nbs_lib.models import MODELS, arch, classes

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

COMPONENTS = [  # the first pattern that a parameter's name matches says where it belongs
    ("head", r"^(lm_head|score|classifier|cls)\."),
    ("pooler", r"pooler\."),
    ("norms", r"(norm|layernorm|LayerNorm|ln_1|ln_2|ln_f)\.(weight|bias)$"),
    ("router", r"\.mlp\.gate\.weight$"),
    ("experts", r"\.mlp\.experts\."),
    ("attention", r"\.(self_attn|attn|attention)\."),
    ("mlp", r"\.(mlp|intermediate|output)\."),
    ("embeddings", r"embed_tokens|_embeddings|wte|wpe"),
]


def build(config: dict, name: str | None = None):
    """transformers' model of that config, on the meta device; `name` is its class (default: the config's)."""
    cls = getattr(transformers, name or config["architectures"][0])
    with torch.device("meta"):
        return cls(cls.config_class(**{k: v for k, v in config.items() if k != "model_type"}))


def component(name: str) -> str:
    return next(c for c, pattern in COMPONENTS if re.search(pattern, name))


def shapes(model) -> list:
    return [(n, tuple(p.shape)) for n, p in model.named_parameters()]


def buffers(model) -> list:
    out = []
    for name, b in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        persistent = leaf not in model.get_submodule(owner)._non_persistent_buffers_set
        out.append((name, tuple(b.shape), str(b.dtype).removeprefix("torch."), persistent))
    return out


def check(a, model) -> None:
    """Names, shapes and order of all parameters and buffers; totals; the sum of each component."""
    assert a.parameter_shapes() == shapes(model)
    assert a.buffer_shapes() == buffers(model)
    assert a.parameters == sum(p.numel() for p in model.parameters())
    want: dict[str, int] = {}
    for n, p in model.named_parameters():
        want[component(n)] = want.get(component(n), 0) + p.numel()
    assert {k: v for k, v in a.parameters_by_component.items() if v} == want
    assert sum(a.parameters_by_component.values()) == a.parameters
    size = {}
    for b in model.buffers():
        key = str(b.dtype).removeprefix("torch.")
        size[key] = size.get(key, 0) + b.numel()*b.element_size()
    assert a.buffers == size


@pytest.mark.parametrize("name", MODELS)
def test_known_model_is_transformers_tensor_by_tensor(name):
    check(arch(name), build(MODELS[name].config))


def test_anchors_that_people_know():
    """Numbers printed elsewhere: Meta's 8B, OpenAI's 124M, accelerate's 413.18 MB table for bert-base-cased."""
    assert arch("llama-3-8b").parameters == 8_030_261_248
    assert arch("llama-3-8b").base_parameters == 7_504_924_672
    assert arch("gpt2").parameters == 124_439_808
    bert = arch("bert-base-cased")
    assert bert.base_parameters == 108_310_272
    assert bert.base_parameters*4 + sum(bert.buffers.values()) == 433_249_280


# ---- random configs ---------------------------------------------------------------------------------------------

FEW = settings(max_examples=150, deadline=None)
SMALL = st.integers(1, 6)


@st.composite
def llama_like(draw):
    m = draw(st.sampled_from(["llama", "mistral", "mixtral", "qwen2", "qwen3"]))
    kv, group, d = draw(SMALL), draw(st.integers(1, 3)), 2*draw(SMALL)
    n = kv*group
    config = {"model_type": m, "hidden_size": n*draw(SMALL), "num_hidden_layers": draw(st.integers(1, 3)),
              "num_attention_heads": n, "num_key_value_heads": kv,
              "intermediate_size": draw(SMALL), "vocab_size": draw(st.integers(2, 9)), "head_dim": d,
              "max_position_embeddings": draw(st.integers(8, 64))}
    if m != "qwen3" and config["hidden_size"]//n % 2 == 0 and draw(st.booleans()): del config["head_dim"]
    if m in ("llama", "qwen2", "qwen3") and draw(st.booleans()): config["num_key_value_heads"] = None
    for flag in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if draw(st.booleans()): config[flag] = draw(st.booleans())
    if draw(st.booleans()): config["rope_theta"] = 5e5
    if m == "mixtral":
        config["num_local_experts"] = draw(st.integers(1, 5))
        config["num_experts_per_tok"] = draw(st.integers(1, config["num_local_experts"]))
    if draw(st.booleans()): config["sliding_window"] = draw(st.sampled_from([None, 4, 4096]))
    if m in ("qwen2", "qwen3") and config.get("sliding_window", 4) and draw(st.booleans()):
        config |= {"use_sliding_window": True, "max_window_layers": draw(st.integers(0, 4))}
    return with_class(draw, config)


@st.composite
def gpt2_like(draw):
    n = draw(SMALL)
    config = {"model_type": "gpt2", "n_embd": n*draw(SMALL), "n_layer": draw(st.integers(1, 3)), "n_head": n,
              "n_inner": draw(st.sampled_from([None, 5])), "vocab_size": draw(st.integers(2, 9)),
              "n_positions": draw(st.integers(1, 9))}
    if draw(st.booleans()): config["tie_word_embeddings"] = draw(st.booleans())
    return with_class(draw, config)


@st.composite
def bert_like(draw):
    n = draw(SMALL)
    config = {"model_type": "bert", "hidden_size": n*draw(SMALL), "num_hidden_layers": draw(st.integers(1, 3)),
              "num_attention_heads": n, "intermediate_size": draw(SMALL), "vocab_size": draw(st.integers(2, 9)),
              "max_position_embeddings": draw(st.integers(1, 9)), "type_vocab_size": draw(st.integers(1, 3)),
              "pad_token_id": 0}
    if draw(st.booleans()): config["tie_word_embeddings"] = draw(st.booleans())
    return with_class(draw, config)


def with_class(draw, config: dict) -> dict:
    """Any class of the model_type; a classifier with names for its classes, or a number of them, or neither."""
    config["architectures"] = [draw(st.sampled_from(list(classes(config["model_type"]))))]
    if "Sequence" in config["architectures"][0]:
        labels = draw(st.integers(0, 4))
        if labels > 2: config["id2label"] = {str(i): f"class {i}" for i in range(labels)}
        elif labels: config["num_labels"] = labels
    return config


def same(config: dict) -> None:
    """arch of the dict and of transformers' config object agree with each other and with the real class."""
    model = build(config)
    a, b = arch(config), arch(model.config)
    check(a, model)
    assert b.parameter_shapes() == a.parameter_shapes()
    fields = set(a.__dataclass_fields__) - {"name", "notes"}
    assert {f: getattr(a, f) for f in fields} == {f: getattr(b, f) for f in fields}
    name = a.architecture.removesuffix("Model") if a.head == "none" else a.architecture
    base = build(config, next(c for c, head in classes(a.model_type).items() if head == "none"))
    assert a.base_parameters == sum(p.numel() for p in base.parameters()), name
    inside = [m.weight for n, m in model.named_modules() if re.search(r"(layers|\.h|^h|layer)\.\d+\.", n)
              and type(m).__name__ in ("Linear", "Conv1D")]
    assert a.linear_parameters == sum(w.numel() for w in inside)
    per_layer = [p.numel() for n, p in model.named_parameters() if re.search(r"(layers|\bh|layer)\.0\.", n)]
    assert a.layer_parameters == sum(per_layer)
    assert a.layer_parameters == a.attention_parameters + a.mlp_parameters + a.norm_parameters


@FEW
@given(llama_like())
def test_random_llama_like(config):
    same(config)


@FEW
@given(gpt2_like())
def test_random_gpt2(config):
    same(config)


@FEW
@given(bert_like())
def test_random_bert(config):
    same(config)


# ---- measured products: the P of 6P -----------------------------------------------------------------------------

def linear_flops(model, tokens: int, device: str) -> int:
    """FLOPs of a forward pass in products with weights, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode
    x = torch.zeros(1, tokens, dtype=torch.long, device=device)
    mask = torch.zeros(1, 1, tokens, tokens, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=x, attention_mask=mask, **({} if model.config.model_type == "bert" else {"use_cache": False}))
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("name", ["gpt2-medium", "bert-base-cased", "llama-3.2-1b", "mistral-7b-v0.1", "qwen2.5-3b",
                                  "qwen3-0.6b"])
def test_matmul_parameters_are_what_pytorch_multiplies(name):
    a = arch(name)
    assert linear_flops(build(MODELS[name].config), 16, "meta") == 2*a.matmul_parameters*16


def test_matmul_parameters_of_experts_are_the_active_ones():
    config = MODELS["mixtral-8x7b"].config | {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 24, "vocab_size": 50, "num_local_experts": 5, "num_experts_per_tok": 3}
    cls = transformers.MixtralForCausalLM
    model = cls(cls.config_class(**config, experts_implementation="eager")).eval()
    assert linear_flops(model, 16, "cpu") == 2*arch(config).matmul_parameters*16


# ---- names, files, bad input ------------------------------------------------------------------------------------

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100,
         "max_position_embeddings": 128, "tie_word_embeddings": False}


def refused(model) -> str:
    with pytest.raises(ValueError) as e: arch(model)
    assert type(e.value) is ValueError
    return str(e.value)


@pytest.mark.parametrize("spelling, name", [
    ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"), ("Llama-3-8B", "llama-3-8b"), ("llama3-8b", "llama-3-8b"),
    ("LLAMA_3_8B", "llama-3-8b"), ("meta-llama/Llama-3.2-1B", "llama-3.2-1b"), ("openai-community/gpt2", "gpt2"),
    ("GPT-2 XL", "gpt2-xl"), ("Qwen/Qwen2.5-7B", "qwen2.5-7b"), ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m"),
    ("meta-llama/Llama-2-7b-hf", "llama-2-7b"), ("huggyllama/llama-30b", "llama-30b"), ("llama-33b", "llama-30b"),
    ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"), ("mistralai/Mistral-7B-v0.3", "mistral-7b-v0.3"),
    ("google-bert/bert-base-cased", "bert-base-cased"), (" Qwen3-0.6B ", "qwen3-0.6b"),
    ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"), ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b")])
def test_spellings(spelling, name):
    assert arch(spelling).name == name


def test_every_name_is_its_own():
    for name in MODELS:
        assert arch(name).name == arch(name.upper()).name == name


@pytest.mark.parametrize("name, near", [
    ("qwen2-57b", "qwen2-7b"), ("llama-8b", "llama-3-8b"), ("mistral-7b", "mistral-7b-v0.1"),
    ("Mixtral-8x22B-Instruct-v0.1", "mixtral-8x22b"), ("someone/gpt2", "gpt2"), ("Llama-318B", "")])
def test_unknown_names_name_the_value_near_ones_and_what_is_accepted(name, near):
    message = refused(name)
    assert repr(name) in message and near in message and "config.json" in message and "dict" in message


@pytest.mark.parametrize("model", ["", "  ", None, 3, 3.5, [], (), object(), int, dict, b"gpt2", "\0", "x"*5000, "~", "."])
def test_things_that_are_no_model(model):
    assert refused(model)


def write(folder, text):
    (folder/"config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_a_file_its_folder_and_the_dict_agree(tmp_path, monkeypatch):
    folder = write(tmp_path, json.dumps(LLAMA))
    want = arch(LLAMA).parameter_shapes()
    for model in (folder, str(folder), folder/"config.json", str(folder/"config.json")):
        assert arch(model).parameter_shapes() == want and arch(model).name == tmp_path.name
    write(tmp_path, b"\xef\xbb\xbf" + json.dumps(LLAMA | {"_name_or_path": "ours/model"}).encode())
    assert arch(folder).name == "ours/model"
    monkeypatch.chdir(tmp_path)
    (tmp_path/"gpt2").mkdir()
    write(tmp_path/"gpt2", json.dumps(LLAMA))
    assert arch("gpt2").model_type == "gpt2" and arch("./gpt2").model_type == "llama"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"gpt2"', b"\xff\xfe\x00", b"\x00"*100, "["*100_000])
def test_a_file_that_is_no_config(tmp_path, text):
    assert "config.json" in refused(write(tmp_path, text))


def test_missing_and_huge_files(tmp_path):
    assert "No such file" in refused(tmp_path)
    assert str(tmp_path/"model.json") in refused(tmp_path/"model.json")
    with open(tmp_path/"config.json", "wb") as f: f.truncate(2**25)
    assert "bytes" in refused(tmp_path)


SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
BERT = MODELS["bert-base-cased"].config
GPT2 = MODELS["gpt2"].config


@pytest.mark.parametrize("config, sizes", [
    (LLAMA, SIZES), (BERT, [*SIZES, "max_position_embeddings"]),
    (GPT2, ["n_embd", "n_layer", "n_head", "vocab_size", "n_positions"])])
def test_sizes_are_never_guessed_and_must_be_whole_numbers(tmp_path, config, sizes):
    for field in sizes:
        left = {k: v for k, v in config.items() if k != field}
        assert f"{field} is missing" in refused(left)
        assert str(tmp_path) in refused(write(tmp_path, json.dumps(left)))
        for value in (None, 0, -1, 1.0, 768.5, "768", True, [768], {}, 10**12, float("nan"), float("inf")):
            message = refused(config | {field: value})
            assert f"{field} is {value!r}" in message and "accepted" in message


@pytest.mark.parametrize("change, words", [
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, ["num_attention_heads", "5", "hidden_size", "64"]),
    ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "4"]),
    ({"num_key_value_heads": 8}, ["num_key_value_heads", "8", "4"]),
    ({"head_dim": 15}, ["head_dim", "15", "even"]),
    ({"hidden_act": "xielu"}, ["hidden_act", "xielu", "silu"]),
    ({"hidden_act": None}, ["hidden_act"]),
    ({"attention_dropout": 1.5}, ["attention_dropout", "1.5"]),
    ({"tie_word_embeddings": "false"}, ["tie_word_embeddings", "'false'", "true or false"]),
    ({"attention_bias": 1}, ["attention_bias", "1"]),
    ({"rope_scaling": {"rope_type": "magic"}}, ["rope_type", "magic", "llama3"]),
    ({"rope_scaling": "linear"}, ["rope_parameters", "linear"]),
    ({"rope_theta": -1}, ["rope_theta", "-1"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
    ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
    ({"is_encoder_decoder": True}, ["is_encoder_decoder"]),
    ({"add_cross_attention": True}, ["add_cross_attention"]),
    ({"per_layer_config": {"0": {"intermediate_size": 8}}}, ["per_layer_config"]),
    ({"layer_types": ["full_attention", "linear_attention"]}, ["layer_types", "linear_attention"]),
    ({"layer_types": ["full_attention"]}, ["layer_types"]),
    ({"architectures": ["LlamaForQuestionAnswering"]}, ["LlamaForQuestionAnswering", "LlamaForCausalLM"]),
    ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "'llama'"]),
    ({"architectures": ["LlamaForCausalLM", "LlamaModel"]}, ["architectures", "one class"]),
    ({"architectures": "LlamaForCausalLM"}, ["architectures", "list"]),
    ({"architectures": 3}, ["architectures", "3"]),
    ({"architectures": [["LlamaForCausalLM"]]}, ["architectures"]),
    ({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}, ["model_type", "deepseek_v3"]),
    ({"model_type": "t5"}, ["model_type", "t5", "mixtral"]),
    ({"model_type": None, "architectures": ["MambaForCausalLM"]}, ["model_type", "missing"]),
    ({"model_type": ["llama"]}, ["model_type", "llama"]),
])
def test_what_is_not_modelled_is_refused_by_name(tmp_path, change, words):
    for model in (LLAMA | change, write(tmp_path, json.dumps(LLAMA | change))):
        assert all(word in refused(model) for word in words), refused(model)


def test_refusals_of_other_families():
    assert "is_decoder" in refused(BERT | {"is_decoder": True})
    assert "position_embedding_type" in refused(BERT | {"position_embedding_type": "relative_key"})
    assert "reorder_and_upcast_attn" in refused(GPT2 | {"reorder_and_upcast_attn": True})
    assert "hidden_size" in refused(GPT2 | {"hidden_size": 512})
    mixtral = MODELS["mixtral-8x7b"].config
    assert "num_experts_per_tok" in refused(mixtral | {"num_experts_per_tok": 9})
    assert "num_experts" in refused(mixtral | {"num_experts": 4})
    mistral = {k: v for k, v in MODELS["mistral-7b-v0.1"].config.items() if k != "num_key_value_heads"}
    assert arch(mistral).kv_heads == 8                                         # transformers' default
    assert "default for mistral" in refused(mistral | {"num_attention_heads": 4, "hidden_size": 4096})
    bert = BERT | {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}}
    assert arch(bert).labels == 2 and "id2label" in refused(bert | {"num_labels": 3})
    assert "id2label" in refused(bert | {"id2label": {}})
    qwen3 = MODELS["qwen3-8b"].config
    assert "head_dim" in refused(qwen3 | {"head_dim": None})
    assert arch({k: v for k, v in qwen3.items() if k != "head_dim"}).head_dim == 128


def test_a_missing_class_is_assumed_and_said():
    for config, usual in ((LLAMA, "LlamaForCausalLM"), (BERT, "BertForMaskedLM"), (GPT2, "GPT2LMHeadModel")):
        for without in ({k: v for k, v in config.items() if k != "architectures"}, config | {"architectures": None}):
            assert arch(without).architecture == usual and usual in arch(without).notes[0]
    assert arch({k: v for k, v in BERT.items() if k != "model_type"}).model_type == "bert"
    assert arch(transformers.LlamaConfig(num_hidden_layers=1)).notes


def test_unverified_fields_are_shown():
    for name, known in MODELS.items():
        a = arch(name)
        assert a.source and a.unverified == known.unverified
        assert all(any(f in note for note in a.notes) for f in a.unverified)


VALUES = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=5) | st.lists(
    st.integers(0, 3), max_size=3) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
KEYS = sorted({*LLAMA, *BERT, *GPT2, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "layer_types",
               "sliding_window", "use_sliding_window", "max_window_layers", "attention_dropout", "hidden_act",
               "num_local_experts", "num_experts_per_tok", "id2label", "num_labels", "mlp_bias", "attention_bias",
               "quantization_config", "per_layer_config", "n_inner", "resid_pdrop", "_name_or_path"})


@settings(max_examples=300, deadline=None)
@given(st.one_of(llama_like(), gpt2_like(), bert_like()), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2))
def test_any_change_is_a_sentence_or_transformers_own_model(config, change):
    """Never another exception; and what is accepted is what transformers builds, if it builds it."""
    config = config | change
    try: a = arch(config)
    except ValueError as e:
        assert str(e).startswith("the config: ")
        return
    try: model = build(config, a.architecture)
    except Exception: return                       # transformers refuses more
    check(a, model)
