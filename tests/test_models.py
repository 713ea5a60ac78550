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
