"""`nbs measure`: the model that it builds is the one that is predicted; ranks, rows and suites, rehearsed on a CPU and with a pretended GPU."""
from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from test_cli import fake_smi, nbs

from nbs_lib.course import measure
from nbs_lib.course.measure.built import blocks, hollow, lay_down
from nbs_lib.course.cli import parser
from nbs_lib.course.measure import build, transformers_config
from nbs_lib.course.measure.server import Failed, Server
from nbs_lib.course.measure.step import infer, train
from nbs_lib.models import MODELS, arch

TINY = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
            vocab_size=101, max_position_embeddings=64, tie_word_embeddings=True)
TINY_GPT2 = dict(model_type="gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=64)
TINY_BERT = dict(model_type="bert", architectures=["BertForMaskedLM"], hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=101,
                 max_position_embeddings=64)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def settings(**changed) -> dict:
    return {**measure.TRAIN, "model": TINY, "batch": 2, "seq": 8, "precision": "fp32", "optimizer": "sgd", **changed}


def job(kind="cpu", fault=None, lr=0.5, **changed) -> dict:
    return {"kind": kind, "settings": settings(**changed), "device": "cpu", "steps": 6, "seconds": 0.01, "fault": fault, "lr": lr}


# --- the model ------------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("config", [TINY, {**TINY, "tie_word_embeddings": False}, TINY_GPT2, TINY_BERT,
                                    {**TINY, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}])
def test_a_model_that_is_laid_down_is_whole(config):
    """The same parameters, dtypes, ties and buffers as transformers' own, although its constructor has touched no memory."""
    a = arch(config)
    model, own = hollow(a, "bfloat16"), build(a, "bfloat16", "cpu")
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    lay_down(model, "cpu")
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [(n, p.shape, p.dtype) for n, p in own.named_parameters()]
    for (name, b), (_, real) in zip(model.named_buffers(), own.named_buffers(), strict=True):
        assert torch.equal(b, real), name
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == a.tied and len(blocks(model)) == a.layers
    x = torch.randint(0, 101, (2, 8))
    assert 4 < float(model(input_ids=x, labels=x).loss.detach()) < 5.5  # about ln 101: weights, norms and biases are sensible


# --- ranks ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def server():
    with Server(["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM"], ["torch.distributed.fsdp", "torch._dynamo", "nbs_lib.zero"]) as s:
        yield s


def expected(ranks: int, accumulation: int = 1, lr: float = 0.5) -> list[list[float]]:
    """Losses of data-parallel SGD, computed by one process that takes every rank's batch: by rank, three steps each."""
    torch.manual_seed(0)
    a = arch(TINY)
    model = hollow(a, "float32")
    lay_down(model, "cpu")
    batches = [torch.randint(0, a.vocab, (2, 8), generator=torch.Generator().manual_seed(r)) for r in range(ranks)]
    losses = [[] for _ in batches]
    for _ in range(3):
        both = [model(input_ids=x, labels=x).loss for x in batches]
        grads = torch.autograd.grad(sum(both) / ranks, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads):
                p -= lr * g
        for mine, loss in zip(losses, both):
            mine.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("changed", [
    dict(), dict(accumulation=3), dict(strategy="ddp", world_size=2), dict(strategy="ddp", world_size=2, accumulation=2), dict(strategy="full_shard", world_size=2),
    dict(strategy="full_shard", world_size=2, accumulation=2), dict(strategy="shard_grad_op", world_size=2), dict(strategy="full_shard", world_size=2, offload=True, checkpointing=True),
    dict(strategy="hybrid_shard", world_size=4, shard_size=2), dict(strategy="full_shard", world_size=1),
    dict(strategy="zero1", world_size=2), dict(strategy="zero1", world_size=2, accumulation=2), dict(strategy="zero2", world_size=2, accumulation=2),
    dict(strategy="zero2", world_size=4), dict(strategy="zero3", world_size=4), dict(strategy="zero3", world_size=2, accumulation=2, checkpointing=True)], ids=lambda c: "-".join(map(str, c.values())) or "single")
def test_every_strategy_trains_as_one_process_with_all_batches_would(server, changed):
    ranks = server.run(job(**changed), 60)
    assert len(ranks) == changed.get("world_size", 1)
    for mine, theirs in zip(ranks, expected(len(ranks)), strict=True):
        assert mine["losses"] == pytest.approx(theirs, abs=1e-3)  # fp32; the learning rate is high, so that a wrong gradient is seen


@pytest.mark.parametrize("changed", [dict(precision="amp_bf16"), dict(precision="amp_bf16", strategy="full_shard", world_size=2), dict(precision="bf16", optimizer="adamw_fused"),
                                     dict(precision="bf16", lora_rank=4, checkpointing=True), dict(precision="amp_bf16", strategy="zero3", world_size=2, optimizer="adamw_fused"),
                                     dict(precision="amp_bf16", strategy="zero2", world_size=2, model=TINY_GPT2), dict(precision="bf16", strategy="zero3", world_size=2, model=TINY_BERT), dict(model=TINY_GPT2, strategy="full_shard", world_size=2, optimizer="adamw", lr=1e-3)],
                         ids=lambda c: "-".join(str(v) for v in c.values() if not isinstance(v, dict)))
def test_other_settings_run(server, changed):
    for r in server.run(job(**changed), 60):
        assert len(r["losses"]) == 3 and 4 < r["losses"][0] < 5.5


def measuring() -> set[int]:
    """Ids of this process's measuring processes and theirs."""
    out = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    rows = [(int(pid), int(parent), args) for pid, parent, args in (line.split(None, 2) for line in out.splitlines()[1:])]
    servers = {pid for pid, parent, args in rows if "nbs_lib.course.measure.server" in args and parent == os.getpid()}
    return {pid for pid, parent, _ in rows if parent in servers}


@pytest.mark.parametrize("fault,changed,word", [([1, 1, "raise"], dict(strategy="ddp", world_size=2), "rank 1: ValueError: a fault that the job asked for"),
                                                ([1, 1, "raise"], dict(strategy="full_shard", world_size=2), "rank 1: ValueError: a fault"),
                                                ([1, 1, "kill"], dict(strategy="ddp", world_size=2), "rank 1: the process was killed by signal 9"),
                                                ([0, 0, "raise"], dict(), "ValueError: a fault")])
def test_a_rank_that_dies_ends_the_others_and_its_error_is_told(server, fault, changed, word):
    began = time.monotonic()
    with pytest.raises(Failed) as e:
        server.run(job(fault=fault, **changed), 60)
    assert str(e.value).startswith(word) and time.monotonic() - began < 10
    assert not measuring()


def test_a_row_past_its_limit_is_ended(server):
    began = time.monotonic()
    with pytest.raises(Failed, match="limit of 1.5 seconds"):
        server.run(job(fault=[1, 2, "hang"], strategy="ddp", world_size=2), 1.5)
    assert time.monotonic() - began < 6 and not measuring()


def test_ranks_end_with_their_client():
    code = ("import sys, json; from nbs_lib.course.measure.server import Server; s = Server(['LlamaForCausalLM']); "
            "print(s.process.pid, flush=True); s.run(json.loads(sys.argv[1]), 60)")
    client = subprocess.Popen([sys.executable, "-c", code, json.dumps(job(fault=[0, 0, "hang"]))], stdout=subprocess.PIPE, text=True)
    theirs = int(client.stdout.readline())

    def children():
        return [int(n) for n in subprocess.run(["ps", "-o", "pid=", "--ppid", str(theirs)], capture_output=True, text=True).stdout.split()]

    end = time.monotonic() + 30
    while not (ranks := children()) and time.monotonic() < end:
        time.sleep(0.05)
    assert ranks
    client.send_signal(signal.SIGKILL)
    client.wait()
    client.stdout.close()

    def alive(pid):
        try:
            with open(f"/proc/{pid}/stat") as f:
                return f.read().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False
    end = time.monotonic() + 10
    while any(map(alive, (theirs, *ranks))) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, (theirs, *ranks)))


def test_fresh_processes_do_as_forked_ones():
    """Where an import has started CUDA in the server, ranks are not forked."""
    from nbs_lib.course.measure.server import conduct

    ranks = conduct(job(strategy="ddp", world_size=2), 60, False)
    assert [r["losses"] for r in ranks] == [pytest.approx(x, abs=1e-3) for x in expected(2)]


# --- rows, with a pretended GPU ---------------------------------------------------------------------------------------------------

@pytest.fixture
def pretended(monkeypatch):
    """torch.cuda's statistics as a machine with a GPU would have them; tensors stay on the CPU. Counts calls, so that peaks rise."""
    calls = {"stats": 0, "reset": 0}

    def stats():
        calls["stats"] += 1
        return {"allocated_bytes.all.peak": 1000 * calls["stats"], "requested_bytes.all.peak": 900 * calls["stats"], "num_alloc_retries": 0}

    fakes = dict(synchronize=lambda: None, memory_stats=stats, max_memory_reserved=lambda: 5000, memory_reserved=lambda: 4096, memory_allocated=lambda: 2048,
                 reset_peak_memory_stats=lambda: calls.__setitem__("reset", calls["reset"] + 1), mem_get_info=lambda: (6_000, 16_000), empty_cache=lambda: None,
                 max_memory_allocated=lambda: 1000 * calls["stats"])
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return calls


TRAINED = {"peak", "phases", "requested", "requested_phases", "first", "peak_any", "peaks", "reserved", "driver_used", "context", "seconds", "timed", "first_seconds", "loss",
           "start", "built", "parameters", "retries", "provenance"}


def test_a_training_row_has_all_its_numbers(pretended):
    row = train({**job("train"), "steps": 7, "seconds": 100.0}, 0, None)
    json.dumps(row)
    assert set(row) == TRAINED
    assert list(row["phases"]) == list(row["first"]) == list(row["requested_phases"]) == ["forward", "backward", "step"]
    assert row["peak"] == row["phases"]["step"] == 9000 and row["first"]["forward"] == 1000  # the third step's; three readings a step
    assert row["peaks"] == [3000, 6000, 9000, 10000] and row["peak_any"] == 10000  # timed steps are read once, after the last
    assert len(row["timed"]) == 7 and row["driver_used"] == 10_000 and row["context"] == 10_000 - 4096 and row["reserved"] == 5000
    assert row["loss"]["last"] < row["loss"]["first"] < 5.5 and row["parameters"] == arch(TINY).parameters
    assert pretended["reset"] == 3 + 2  # before each step that is read, before the timed ones, and once at the end


def test_timed_steps_go_on_long_enough(pretended):
    assert len(train({**job("train"), "steps": 30, "seconds": 0.0}, 0, None)["timed"]) == 5
    assert len(train({**job("train"), "steps": 2, "seconds": 9.0}, 0, None)["timed"]) == 2


@pytest.mark.parametrize("where,at", [("forward", "forward"), ("backward", "backward"), ("step", "step"), ("build", "build")])
def test_out_of_memory_is_a_result_with_its_phase(pretended, monkeypatch, where, at):
    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has …")

    target = {"forward": (transformers.LlamaForCausalLM, "forward"), "backward": (torch.Tensor, "backward"), "step": (torch.optim.SGD, "step"), "build": (torch, "empty_like")}[where]
    monkeypatch.setattr(*target, full)
    row = train(job("train"), 0, None)
    assert set(row) == {"oom", "provenance"} and row["provenance"]["torch"] and row["oom"]["at"] == at and row["oom"]["step"] == 0 and row["oom"]["oom"] == "CUDA out of memory. Tried to allocate 1.00 GiB"
    json.dumps(row)


def test_other_errors_are_not_taken_for_full_memory(pretended, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(job("train"), 0, None)


@pytest.mark.parametrize("config,seq,new", [(TINY, 8, 9), (TINY_GPT2, 60, 5), (TINY_GPT2, 64, 1)])
def test_an_inference_row_has_all_its_numbers(pretended, config, seq, new):
    c = {**measure.INFERENCE, "model": config, "batch": 2, "seq": seq, "precision": "fp32", "kv_precision": "fp32"}
    row = infer({"kind": "inference", "settings": c, "device": "cpu"}, 0, None)
    json.dumps(row)
    assert row["peak"] < row["generate"] and row["new_tokens"] == new and row["seconds"] > 0 and (row["token_seconds"] is None) == (new == 1)


def test_a_full_rank_is_the_rows_result(server):
    (row,) = server.run(job(fault=[1, 1, "oom"], strategy="ddp", world_size=2), 60)
    assert row["oom"]["at"] == "forward" and row["oom"]["step"] == 1 and row["oom"]["rank"] == 1
    assert not measuring()


# --- settings and suites ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("entry", [
    dict(model="gpt2", batch=2, seq=64), dict(model="llama-3-8b", precision="amp_bf16", optimizer="adamw_fused", checkpointing=True, strategy="hybrid_shard", world_size=4, shard_size=2, offload=True),
    dict(model=TINY, batch=3, seq=8, attention="eager", accumulation=2, lora_rank=4), dict(kind="inference", model="llama-3.2-1b", batch=4, precision="fp32"),
    dict(model="gpt2", strategy="full_shard", world_size=1), dict(model="gpt2", strategy="zero3", world_size=2)])
def test_the_command_of_a_row_repeats_it(entry):
    kind, c = measure.complete(entry)
    line = shlex.split(measure.command(kind, c))
    assert line[0] == "nbs"
    assert measure.complete(measure.entry_of(parser().parse_args(line[1:]))) == (kind, c)


@pytest.mark.parametrize("entry,word", [(dict(model="gpt2", strategy="zero2", world_size=2, offload=True), "offload"), (dict(model="gpt2", sec=8), "'sec'"), (dict(batch=2), "model is missing"),
                                        (dict(kind="inference", model="gpt2", precision="int8"), "'fp32' and 'bf16'"), (dict(kind="inference", model="gpt2", kv_precision="fp8"), "kv_precision"),
                                        (dict(kind="dance", model="gpt2"), "'inference'"), (dict(model="gpt2", world_size=2), "world_size")])
def test_what_cannot_be_measured_is_refused(entry, word):
    with pytest.raises(ValueError, match=word):
        measure.complete(entry)


def test_a_suite_resumes_skips_and_loses_nothing(tmp_path):
    entries = [dict(model=TINY, batch=b, seq=8, precision="fp32", name=f"tiny {b}", group="held out") for b in (1, 2)]
    entries += [dict(model=TINY, seq=8, strategy="ddp", world_size=2, precision="fp32"), dict(kind="inference", model=TINY, seq=8)]
    suite, out, said = tmp_path / "suite.json", tmp_path / "rows.jsonl", []
    suite.write_text(json.dumps(entries))
    assert measure.suite(suite, out, cpu=True, limit_seconds=0, say=said.append) == {"measured": 0, "there": 0, "skipped": 4, "failed": 0}
    suite.write_text(json.dumps(entries[:1]))
    assert measure.suite(suite, out, cpu=True, say=said.append)["measured"] == 1
    with open(out, "a") as f:  # an error of an earlier run, and a line that was torn when it ended
        f.write(json.dumps({"kind": "cpu", "settings": measure.complete(entries[1])[1], "error": "what went wrong then"}) + '\n{"kind": "cp')
    suite.write_text(json.dumps(entries))
    said.clear()
    assert measure.suite(suite, out, cpu=True, say=said.append) == {"measured": 2, "there": 1, "skipped": 1, "failed": 0}
    rows = list(measure.rows_in(out))
    assert [r.get("name") for r in rows] == ["tiny 1", None, "tiny 2", None] and rows[0]["group"] == "held out"
    for r in (rows[0], *rows[2:]):
        assert set(r["settings"]) == set(measure.TRAIN) and r["provenance"]["command"].startswith("nbs measure") and len(r["rank_losses"]) == r["settings"]["world_size"]
    assert any("generating is measured on a GPU" in line for line in said) and any("ddp over 2" in line and "losses" in line for line in said)
    assert measure.suite(suite, out, cpu=True, say=said.append) == {"measured": 0, "there": 3, "skipped": 1, "failed": 0}


def test_a_failed_row_is_recorded_and_the_suite_goes_on(tmp_path, monkeypatch):
    suite, out, said = tmp_path / "suite.json", tmp_path / "rows.jsonl", []
    suite.write_text(json.dumps([dict(model=TINY, batch=b, seq=8) for b in (1, 2)]))

    def fail(bench, kind, c, **labels):
        raise Failed("rank 0: a bad day")

    monkeypatch.setattr(measure.Bench, "measure", fail)
    assert measure.suite(suite, out, cpu=True, say=said.append)["failed"] == 2
    assert [r["error"] for r in measure.rows_in(out)] == ["rank 0: a bad day"] * 2 and all("a bad day" in line for line in said)


def test_a_row_is_told_beside_its_prediction():
    kind, c = measure.complete(dict(model="gpt2", batch=8, seq=1024))
    row = {"kind": kind, "settings": c, "peak": measure.predict(kind, c).peak, "seconds": 0.1}
    assert "+0.00%" in measure.outcome(row, None) and "100.0 ms" in measure.outcome(row, None)
    assert "out of memory in backward" in measure.outcome({**row, "oom": {"at": "backward", "step": 0}}, None)


# --- the command ----------------------------------------------------------------------------------------------------------------

@NO_GPU
def test_without_a_gpu_it_says_what_can_be_done_instead():
    run = nbs("measure", "gpt2", "--seq", "512")
    assert run.returncode == 1 and "no GPU" in run.stderr and "--cpu" in run.stderr and "nbs lab 3" in run.stderr and "Traceback" not in run.stderr


def test_a_rehearsal_counts_to_the_byte_and_says_why_where_it_cannot():
    own = json.dumps({**TINY, "tie_word_embeddings": False})
    run = nbs("measure", own, "--batch", 2, "--seq", 40, "--precision", "fp32", "--attention", "eager", "--cpu", COLUMNS="200")
    assert run.returncode == 0 and "+0.00%" in run.stdout and "reason" not in run.stdout, run.stdout + run.stderr
    assert "--attention eager" in measure.held_on_cpu(settings())[1] and measure.held_on_cpu(settings(attention="eager"))[1] == ""
    assert "dropout" in measure.held_on_cpu(settings(model=TINY_GPT2, attention="eager"))[1]


def test_bad_input_is_refused_before_anything_runs(tmp_path):
    path = fake_smi(tmp_path / "bin", "NVIDIA L4, 23034, 550.54.15, 72.00, [N/A]")
    (tmp_path / "suite.json").write_text('[{"model": "gpt2"}, {"model": "gpt2", "precision": "fp8"}]')
    bad = [(["gpt3"], "gpt2"), (["gpt2", "--seq", "4096"], "1024"), (["gpt2", "--seq", "8", "--optimizer", "adamw_8bit"], "bitsandbytes"), (["gpt2", "--precision", "fp8"], "bf16"),
           ([], "which model"), (["--suite", tmp_path / "suite.json"], "--out"), (["--suite", tmp_path / "suite.json", "--out", tmp_path / "rows"], "entry 2"),
           (["gpt2", "--inference", "--checkpointing"], "--checkpointing")]
    for args, word in bad:
        run = nbs("measure", *args, PATH=path)
        assert run.returncode == 2 and word in run.stderr and "Traceback" not in run.stderr, run.stderr
    run = nbs("measure", "gpt2", "--gpus", 2, PATH=path)
    assert run.returncode == 1 and "this machine has 1" in run.stderr


@NO_GPU
def test_a_measuring_process_that_fails_is_one_sentence(tmp_path):
    """A machine whose nvidia-smi lists a card that this torch cannot use."""
    run = nbs("measure", "gpt2", "--seq", "64", PATH=fake_smi(tmp_path / "bin", "NVIDIA L4, 23034, 550.54.15, 72.00, [N/A]"))
    assert run.returncode == 1 and len(run.stderr.strip().splitlines()) == 1 and "Traceback" not in run.stderr, run.stderr
