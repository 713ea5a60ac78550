"""The command `nbs` as people and scripts use it: real processes, exit codes, sentences instead of tracebacks."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

from nbs_lib.course.cli import main

NBS = Path(sys.executable).with_name("nbs")


def nbs(*args, cwd=None, **env) -> subprocess.CompletedProcess:
    return subprocess.run([str(NBS), *map(str, args)], capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL, env={**os.environ, **env}, timeout=120)


def test_fit_fits_and_adds_up():
    run = nbs("fit", "llama-3.2-1b", "--gpu", "h100-sxm", "--batch", 1, "--seq", 2048, "--json")
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["fits"] and sum(answer["terms"].values()) == answer["peak"] <= answer["peak_any"] <= answer["capacity"]
    assert max(answer["phases"].values()) == answer["peak"]


def test_fit_that_does_not_fit_names_changes_that_do():
    settings = ["llama-3-8b", "--gpu", "a100-80gb-sxm", "--batch", "4", "--seq", "2048", "--precision", "amp_bf16"]
    run = nbs("fit", *settings, "--json")
    assert run.returncode == 1
    answer = json.loads(run.stdout)
    assert not answer["fits"] and answer["ways_out"]
    for way in answer["ways_out"]:
        options = way["options"].split()
        kept = [s for i, s in enumerate(settings) if s not in options and (i == 0 or settings[i - 1] not in options or not settings[i - 1].startswith("--"))]
        again = nbs("fit", *kept, *options, "--json")
        assert again.returncode == 0, (way, again.stdout)
        assert json.loads(again.stdout)["peak_any"] == way["peak"]


def test_fit_prints_a_breakdown_whose_rows_are_its_total():
    run = nbs("fit", "gpt2", "--gpu", "rtx-4090", "--batch", 8, "--seq", 1024, "--precision", "fp32", COLUMNS="100")
    assert run.returncode == 0
    rows = [float(m[1]) for m in re.finditer(r"^[a-z].*?\s(\d+\.\d\d)\s+\d+%$", run.stdout, re.M)]
    total = float(re.search(r"peak of a steady step\s+(\d+\.\d\d)", run.stdout)[1])
    assert sum(r for r in rows if r != total) == pytest.approx(total, abs=0.06)


BAD = [
    (["fit", "lama-3-8b"], "llama-3-8b"),
    (["fit", "gpt2", "--gpu", "h1000"], "h100"),
    (["fit", "gpt2", "--precision", "fp31"], "fp32"),
    (["fit", "gpt2", "--strategy", "zero4"], "zero3"),
    (["fit", "gpt2", "--optimizer", "adam"], "adamw"),
    (["fit", "gpt2", "--batch", "0"], "--batch"),
    (["fit", "gpt2", "--batch", "-3"], "--batch"),
    (["fit", "gpt2", "--batch", "1.5"], "--batch"),
    (["fit", "gpt2", "--seq", "many"], "--seq"),
    (["fit", "gpt2", "--seq", "2048"], "1024"),
    (["fit", "gpt2", "--batch", "9" * 30], "batch"),
    (["fit", "gpt2", "--gpus", "4", "--strategy", "single"], "world_size"),
    (["fit", "gpt2", "--offload"], "offload"),
    (["fit", "gpt2", "--gpus", "2", "--precision", "amp_fp16"], "amp_fp16"),
    (["fit", "bert-base-cased", "--lora-rank", "8"], "lora_rank"),
    (["fit"], "model"),
    (["fitt"], "fit"),
    (["lab", "77", "--no-open"], "77"),
]


@pytest.mark.parametrize("args,word", BAD, ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_bad_input_is_a_sentence_and_exit_code_2(args, word):
    run = nbs(*args)
    assert run.returncode == 2, run.stdout
    assert word in run.stderr and "Traceback" not in run.stderr and not run.stdout
    assert len(run.stderr.strip().splitlines()) <= 4


@pytest.mark.parametrize("text,word", [
    ("{ not json", "JSON"), ("[1, 2]", "object"), ('{"model_type": "t5"}', "t5"), ('{"model_type": "llama"}', "hidden_size"),
    ('{"model_type": "gpt2", "n_embd": -4, "n_layer": 2, "n_head": 2, "vocab_size": 10}', "n_embd"),
], ids=["broken", "list", "t5", "empty", "negative"])
def test_bad_config_json_is_named_with_its_fault(tmp_path, text, word):
    path = tmp_path / "config.json"
    path.write_text(text)
    run = nbs("fit", path)
    assert run.returncode == 2 and "config.json" in run.stderr and word.lower() in run.stderr.lower() and "Traceback" not in run.stderr


def test_fit_with_ones_own_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=8192, vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=True, head_dim=64)))
    mine, known = (json.loads(nbs("fit", m, "--json").stdout) for m in (tmp_path / "config.json", "llama-3.2-1b"))
    assert mine["parameters"] == known["parameters"] and mine["peak"] == known["peak"]


FIT = ["fit", "llama-3.2-1b", "--gpu", "h100-sxm", "--gpus", "2", "--seq", "512"]


def test_fit_writes_the_config_of_the_plan_and_never_over_a_file(tmp_path):
    import yaml

    path = tmp_path / "accelerate.yaml"
    run = nbs(*FIT, "--strategy", "shard_grad_op", "--precision", "amp_bf16", "--write", path)
    assert run.returncode == 0, run.stderr
    assert f"accelerate launch --config_file {path} train.py" in run.stdout and "reduces gradients in bf16" in " ".join(run.stdout.split())
    values = yaml.safe_load(path.read_text())
    assert (values["distributed_type"], values["num_processes"], values["fsdp_config"]["fsdp_reshard_after_forward"]) == ("FSDP", 2, False)
    before = path.read_bytes()
    again = nbs(*FIT, "--strategy", "ddp", "--write", path)
    assert again.returncode == 2 and not again.stdout and "FSDP, 2 processes" in again.stderr and "--force" in again.stderr
    assert path.read_bytes() == before
    assert nbs(*FIT, "--strategy", "ddp", "--write", path, "--force").returncode == 0
    assert yaml.safe_load(path.read_text())["distributed_type"] == "MULTI_GPU"


def test_fit_writes_the_cheapest_change_that_fits_unless_a_strategy_was_asked_for(tmp_path):
    import yaml

    tight = ["fit", "llama-3-8b", "--gpu", "h100-sxm", "--gpus", "8", "--seq", "8192", "--precision", "amp_bf16", "--json", "--write"]
    answer = json.loads(nbs(*tight, tmp_path / "a.yaml").stdout)
    assert not answer["fits"] and answer["ways_out"][0]["options"] == "--checkpointing" and "checkpointing" in answer["written_for"]
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["fsdp_config"]["fsdp_activation_checkpointing"] is True
    asked = json.loads(nbs(*tight, tmp_path / "b.yaml", "--strategy", "full_shard").stdout)
    assert "checkpointing" not in asked["written_for"] and (tmp_path / "b.yaml").exists()
    hopeless = nbs("fit", "llama-3-70b", "--gpu", "h100-sxm", "--gpus", "2", "--precision", "fp32", "--seq", "32000", "--write", tmp_path / "c.yaml")
    assert hopeless.returncode == 1 and "was not written" in hopeless.stdout and not (tmp_path / "c.yaml").exists()


def test_fit_writes_deepspeeds_json_and_several_machines(tmp_path):
    path = tmp_path / "deepspeed.json"
    run = nbs(*FIT, "--strategy", "zero2", "--batch", "3", "--accumulation", "2", "--nodes", "2", "--main-ip", "node-0", "--write", path)
    assert run.returncode == 0, run.stderr
    values = json.loads(path.read_text())
    assert values["train_batch_size"] == 12 and values["zero_optimization"] == {"stage": 2} and values["gradient_clipping"] == 0
    assert "on machine 1: torchrun --nnodes=2 --nproc-per-node=1" in run.stdout


@pytest.mark.parametrize("more,word", [
    (["--write", "a.toml"], "FILE.yaml"), (["--write", "nowhere/a.yaml"], "nowhere"), (["--write", "folder.yaml"], "folder"),
    (["--write", "a.yaml", "--nodes", "2"], "main_ip"), (["--write", "a.yaml", "--nodes", "3", "--main-ip", "x"], "nodes is 3"),
    (["--write", "a.yaml", "--main-port", "99999"], "port"), (["--force"], "--write"),
    (["--write", "a.json", "--strategy", "hybrid_shard", "--shard-size", "2"], "hybrid_shard"),
], ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_what_cannot_be_written_is_a_sentence(tmp_path, more, word):
    (tmp_path / "folder.yaml").mkdir()
    run = nbs(*FIT, *more, cwd=tmp_path)
    assert run.returncode == 2 and word in run.stderr and "Traceback" not in run.stderr and not run.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["folder.yaml"]


def fake_smi(folder: Path, line: str) -> str:
    """A PATH on which nvidia-smi says `line`."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{line}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_fit_asks_about_the_card_in_this_machine(tmp_path):
    path = fake_smi(tmp_path / "known", "NVIDIA L4, 23034, 550.54.15, 72.00, [N/A]")
    assert json.loads(nbs("fit", "gpt2", "--json", PATH=path).stdout)["gpu"] == "l4"
    assert json.loads(nbs("fit", "gpt2", "--gpu", "a10", "--json", PATH=path).stdout)["gpu"] == "a10"
    run = nbs("fit", "gpt2", PATH=fake_smi(tmp_path / "unknown", "NVIDIA Imaginary 9000, 23034, 550.54.15, 72.00, [N/A]"))
    assert run.returncode == 2 and "Imaginary" in run.stderr and "--gpu" in run.stderr


def test_importing_the_arithmetic_loads_no_torch_and_no_rich():
    code = "import sys, nbs_lib.hardware, nbs_lib.models, nbs_lib.memory; print([m for m in ('torch', 'numpy', 'rich', 'jax', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_doctor_finds_this_machine_fit_for_the_labs():
    run = nbs("doctor", "--json")
    findings = {f["what"].split(" (")[0]: f for f in json.loads(run.stdout)}
    assert findings["torch"]["state"] == "ok" and findings["Rendering"]["state"] == "ok"
    assert run.returncode == (1 if any(f["state"] == "missing" for f in findings.values()) else 0)
    assert all(f["remedy"] for f in findings.values() if f["state"] == "missing")


def test_lab_writes_ones_own_copy_and_says_where(tmp_path):
    run = nbs("lab", 3, "--dir", tmp_path / "mine", "--no-open")
    assert run.returncode == 0 and (tmp_path / "mine" / "03_memory.ipynb").is_file()
    assert "Yours" in nbs("lab", "memory", "--dir", tmp_path / "mine", "--no-open").stdout


def test_installed_wheel_has_labs_but_no_site(tmp_path):
    """From a wheel in an environment of its own, in a folder far from the repository: no torch comes along."""
    wheels, venv = tmp_path / "wheels", tmp_path / "venv"
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "_site*", "work", "build", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, copy], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin" / "pip", "install", "-q", *wheels.glob("*.whl")], check=True, capture_output=True)
    listed = subprocess.run([venv / "bin" / "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout.lower()
    assert "nbs_lib" in listed.replace("-", "_") and "torch" not in listed and "jupyter" not in listed
    run = lambda *args: subprocess.run([venv / "bin" / "nbs", *args], capture_output=True, text=True, cwd=tmp_path, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)})  # noqa: E731
    assert run("fit", "gpt2").returncode == 0
    assert run("lab", "3", "--no-open").returncode == 0 and (tmp_path / "work" / "03_memory.ipynb").is_file()
    build = run("build")
    assert build.returncode == 1 and "repository" in build.stderr and "Traceback" not in build.stderr
    opened = run("lab", "3")
    assert opened.returncode == 1 and "pip install" in opened.stderr and "Traceback" not in opened.stderr


def test_course_without_a_terminal_checks_itself_and_stops(tmp_path):
    run = nbs("course", "--port", 18000, "--lab-port", 18900, NBS_WORK=str(tmp_path / "work"))
    assert run.returncode == 0, run.stderr
    assert "Site:" in run.stdout and "JupyterLab:" in run.stdout and "Fits" in run.stdout
    assert (tmp_path / "work" / "03_memory.ipynb").is_file()
    for port in (18000, 18900):
        with pytest.raises(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=3)


def test_serve_puts_the_running_jupyterlab_in_the_pages(site):
    from nbs_lib.course.serve import JupyterLab, Site

    server = Site(site, 18200, lab=JupyterLab(None, 19999, "secret", None), watching=True)
    try:
        page = urllib.request.urlopen(f"{server.address}nbs/labs/03_memory.html").read().decode()
        assert "http://localhost:19999/lab/tree/03_memory.ipynb?token=secret" in page and "/.built" in page
        assert urllib.request.urlopen(f"{server.address}.built").read() == b"1"
        with pytest.raises(OSError):
            urllib.request.urlopen(f"{server.address}../../etc/passwd")
    finally:
        server.stop()


def test_interrupting_serve_ends_it_at_once():
    # a test run in the background of a script inherits an ignored SIGINT
    process = subprocess.Popen([str(NBS), "serve", "--port", "18300"], stdout=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while "Site:" not in (line := process.stdout.readline()):
        assert process.poll() is None, line
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


@pytest.mark.parametrize("number, command", [(signal.SIGTERM, ["serve", "--port", "18310"]), (signal.SIGHUP, ["lab", "--port", "18320"])])
def test_killed_or_without_its_terminal_it_ends_what_it_started(number, command, tmp_path):
    process = subprocess.Popen([str(NBS), *command], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"NBS_WORK": str(tmp_path/"work"), "PYTHONUNBUFFERED": "1"},
                               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    lines = []
    while not lines or not re.match("Site: |JupyterLab: ", lines[-1]):
        lines.append(process.stdout.readline())
        assert process.poll() is None, lines
    address = re.search(r"http://\S+", lines[-1])[0]
    urllib.request.urlopen(address).close()
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    with pytest.raises(urllib.error.URLError): urllib.request.urlopen(address)


def test_main_without_a_command_prints_help(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out
