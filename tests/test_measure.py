"""`nbs measure`: the model that it builds is the one that is predicted; without a GPU it says so. (What it measures needs a GPU.)"""
from __future__ import annotations

import pytest
import torch
import transformers
from test_cli import fake_smi, nbs

from nbs_lib.course.measure import build, transformers_config
from nbs_lib.models import MODELS, arch


@pytest.mark.parametrize("name", [n for n in MODELS if arch(n).parameters < 15e9])
def test_the_model_that_is_measured_is_the_one_that_is_predicted(name):
    a = arch(name)
    with torch.device("meta"):
        model = getattr(transformers, a.architecture)._from_config(transformers_config(a))
    assert [(n, tuple(p.shape)) for n, p in model.named_parameters()] == [(n, tuple(s)) for n, s in a.parameter_shapes()]
    assert arch(transformers_config(a)).parameters_by_component == a.parameters_by_component


def test_a_small_model_is_built_and_takes_a_step():
    a = arch(dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                  intermediate_size=96, vocab_size=100, max_position_embeddings=64, tie_word_embeddings=True))
    model = build(a, "bfloat16", "cpu", "eager", checkpointing=True)
    x = torch.randint(0, 100, (2, 8))
    model(input_ids=x, labels=x).loss.backward()
    assert model.training and all(p.grad is not None and p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.config._attn_implementation == "eager" and model.is_gradient_checkpointing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_can_be_done_instead():
    run = nbs("measure", "gpt2", "--seq", "512")
    assert run.returncode == 1 and "no GPU" in run.stderr and "nbs lab 3" in run.stderr and "Traceback" not in run.stderr


def test_bad_input_is_refused_before_anything_runs(tmp_path):
    path = fake_smi(tmp_path / "bin", "NVIDIA L4, 23034, 550.54.15, 72.00, [N/A]")
    for args, word in ((["gpt3"], "gpt2"), (["gpt2", "--seq", "4096"], "1024"), (["gpt2", "--seq", "8", "--optimizer", "adamw_8bit"], "adamw_8bit"), (["gpt2", "--precision", "fp8"], "bf16")):
        run = nbs("measure", *args, PATH=path)
        assert run.returncode == 2 and word in run.stderr and "Traceback" not in run.stderr, run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_measuring_process_that_fails_is_one_sentence(tmp_path):
    """A machine whose nvidia-smi lists a card that this torch cannot use."""
    run = nbs("measure", "gpt2", "--seq", "64", PATH=fake_smi(tmp_path / "bin", "NVIDIA L4, 23034, 550.54.15, 72.00, [N/A]"))
    assert run.returncode == 1 and len(run.stderr.strip().splitlines()) == 1 and "Traceback" not in run.stderr, run.stderr
