"""The launchers' files are accepted by the launchers themselves, and what they start computes what one process computes."""
from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nbs_lib import launch, memory
from nbs_lib.models import MODELS, arch

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
GPT = arch({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 128, "n_positions": 32, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0})
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where there is no GPU")


def plan(model=GPT, batch=1, seq=32, precision="fp32", optimizer="adamw", checkpointing=False, attention="sdpa", accumulation=1, strategy="ddp",
         world_size=2, shard_size=None, offload=False, lora_rank=None):
    return memory.settings(model, batch, seq, precision, optimizer, checkpointing, attention, accumulation, strategy, world_size, shard_size,
                           offload, lora_rank, "h100-sxm")


@st.composite
def plans(draw):
    """A plan that memory.settings accepts, and machines that it can be spread over."""
    nodes, each = draw(st.sampled_from([1, 1, 2, 4])), draw(st.sampled_from([1, 2, 8]))
    world = nodes*each
    strategy = draw(st.sampled_from(memory.STRATEGIES))
    shard = draw(st.sampled_from([n for n in (1, 2, 4, 8, 32) if world % n == 0])) if strategy == "hybrid_shard" else None
    lora = draw(st.none() | st.just(8))
    try:
        p = plan(draw(st.sampled_from(list(MODELS))), draw(st.integers(1, 9)), draw(st.integers(1, 512)), draw(st.sampled_from(list(memory.PRECISIONS))),
                 draw(st.sampled_from(list(memory.STATES))), draw(st.booleans()), draw(st.sampled_from(memory.ATTENTION)), draw(st.integers(1, 9)),
                 strategy, world, shard, draw(st.booleans()), lora)
    except ValueError:
        assume(False)
    return p, nodes


def accelerate_environment(path: Path) -> tuple[dict[str, str], object]:
    """accelerate's own validation of the file, then what its launcher tells the processes."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    load_config_from_file(str(path))
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "train.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1], args
    return (prepare_multi_gpu_env(args) if args.use_fsdp or args.multi_gpu else prepare_simple_launcher_cmd_env(args)[1]), args


@settings(max_examples=150, deadline=None)
@given(plans())
def test_accelerate_accepts_every_config_and_reads_the_plan_out_of_it(drawn):
    p, nodes = drawn
    config = launch.accelerate_config(p, nodes, "10.0.0.1" if nodes > 1 else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "accelerate.yaml")
        path.write_text(launch.text(config))
        assert yaml.safe_load(path.read_text()) == config.values
        with patch.dict(os.environ):
            env, args = accelerate_environment(path)
    assert args.num_processes == p.world_size and args.num_machines == nodes and not args.cpu
    assert env["ACCELERATE_MIXED_PRECISION"].split(".")[-1].lower() == {"fp32": "no", "bf16": "no", "amp_bf16": "bf16", "amp_fp16": "fp16"}[p.precision]
    assert args.use_fsdp == (p.strategy in memory.SHARDED and p.shard_size != 1) and args.use_deepspeed == (p.strategy in memory.ZERO)
    if nodes > 1 and p.strategy not in memory.ZERO:             # DeepSpeed has launchers of its own for several machines
        assert args.nproc_per_node == str(p.world_size//nodes) and args.nnodes == str(nodes) and args.rdzv_endpoint == "10.0.0.1:29500"
    if args.use_fsdp:
        check_fsdp(p, env)
    if args.use_deepspeed:
        assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == p.strategy[-1] and env["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == str(p.accumulation)
    elif p.accumulation > 1:
        assert all(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={p.accumulation} " in c for c in launch.commands(config))
    assert len(launch.commands(config)) == nodes


def check_fsdp(p, env) -> None:
    """What Accelerator() makes of the launcher's variables is the plan's FSDP."""
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    with patch.dict(os.environ, env):
        plugin, parallel = FullyShardedDataParallelPlugin(), ParallelismConfig()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward == (p.strategy != "shard_grad_op")
    assert plugin.transformer_cls_names_to_wrap == [launch.BLOCKS[p.model.model_type]]
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == p.offload
    assert plugin.activation_checkpointing == (p.checkpointing and not launch.dropout(p.model))
    assert plugin.cpu_ram_efficient_loading and plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    if p.strategy == "hybrid_shard":
        assert env["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
        assert (parallel.dp_shard_size, parallel.dp_replicate_size) == (p.shard_size, p.world_size//p.shard_size)


def test_accelerate_refuses_what_we_do_not_write(tmp_path):
    """The check above can fail: a key that accelerate does not know, a type that it has not."""
    good = launch.text(launch.accelerate_config(plan()))
    for bad in (good + "gradient_accumulation_steps: 4\n", good.replace("MULTI_GPU", "MULTI_CARD")):
        (tmp_path/"bad.yaml").write_text(bad)
        with pytest.raises(ValueError):
            accelerate_environment(tmp_path/"bad.yaml")


@pytest.mark.parametrize("model_type", sorted(launch.BLOCKS))
def test_the_class_to_wrap_is_that_of_the_models_blocks(model_type):
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    a = next(a for a in map(arch, MODELS) if a.model_type == model_type)
    config = importlib.import_module("transformers").AutoConfig.for_model(model_type)
    config.num_hidden_layers = 2
    with torch.device("meta"):
        model = getattr(module, a.architecture)(config)
    assert sum(type(m).__name__ == launch.BLOCKS[model_type] for m in model.modules()) == 2
    no_split = getattr(model, "_no_split_modules", None)
    assert no_split is None or launch.BLOCKS[model_type] in no_split


def test_every_note_is_about_this_plan():
    def said(**kwargs):
        return " ".join(launch.accelerate_config(plan(**kwargs)).notes)
    assert "reduce_dtype=torch.float32" in said(strategy="full_shard", precision="amp_bf16") and "reduce_dtype" not in said(strategy="full_shard")
    assert "dtype=torch.bfloat16 when" in said(precision="bf16") and "bfloat16" not in said()
    assert "accumulate(model)" in said(accumulation=2) and "accumulate" not in said()
    assert "gradient_checkpointing_enable" in said(checkpointing=True)
    assert "gradient_checkpointing_enable" not in said(checkpointing=True, strategy="full_shard", model="llama-3-8b")
    assert "gradient_checkpointing_enable" in said(checkpointing=True, strategy="full_shard", model="gpt2")     # dropout


# --- bad input ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call,words", [
    (lambda: launch.accelerate_config(plan(world_size=6), nodes=4, main_ip="a"), ["nodes is 4", "6"]),
    (lambda: launch.accelerate_config(plan(), nodes=2), ["main_ip"]),
    (lambda: launch.accelerate_config(plan(), port=70000), ["port", "65,535"]),
    (lambda: launch.deepspeed_config(plan(strategy="hybrid_shard", shard_size=2)), ["hybrid_shard", "zero3"]),
    (lambda: launch.deepspeed_config(plan(strategy="full_shard", precision="bf16", offload=True)), ["bf16", "offload", "amp_bf16"]),
    (lambda: launch.command(2, 1, "x.py"), ["host"]),
    (lambda: launch.command(0, 1, "x.py"), ["nodes", "0"]),
    (lambda: launch.command(1, 4, "x.py", gpus=2), ["4 processes", "2 GPUs"]),
    (lambda: launch.command(1, 1, "x.py", gpus=0), ["nccl", "no GPU", "gloo"]),
    (lambda: launch.command(1, 1, "x.py", gpus=1, backend="mpi"), ["mpi", "gloo"]),
    (lambda: launch.script("jax"), ["jax", "accelerate"]),
    (lambda: launch.script("accelerate", batch=5, processes=2), ["batch is 5", "2"]),
])
def test_bad_input_is_a_sentence(call, words):
    with pytest.raises(ValueError) as e:
        call()
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


@pytest.mark.parametrize("content,kwargs,words", [
    (None, {}, ["there is no such file", "--write"]),
    ("distributed_type: [", {}, ["no YAML"]),
    ("a: 1\n", {}, ["distributed_type is missing"]),
    ("distributed_type: MULTI_GPU\nnum_processes: 3\nnum_machines: 2\n", dict(gpus=8), ["num_processes is 3", "2"]),
    ("distributed_type: MULTI_GPU\nnum_processes: -1\n", dict(gpus=8), ["num_processes", "-1"]),
    ("distributed_type: FSDP\nnum_processes: 2\n", dict(gpus=0), ["NCCL", "ACCELERATE_USE_CPU"]),
    ("distributed_type: FSDP\nnum_processes: 8\nnum_machines: 2\n", dict(gpus=2), ["4 processes", "2 GPUs"]),
    ("distributed_type: MULTI_CPU\nnum_processes: 2\n", {}, ["one process", "MULTI_GPU"]),
])
def test_a_launch_that_cannot_work_is_a_sentence(tmp_path, content, kwargs, words):
    path = tmp_path/"accelerate.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError) as e:
        launch.check_launch(path, **kwargs)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_a_port_in_use_is_named_with_a_free_one(tmp_path):
    import re
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path/"a.yaml").write_text(launch.text(launch.accelerate_config(plan(), nodes=2, main_ip="10.0.0.1", port=port)))
        with pytest.raises(ValueError, match=f"main_process_port is {port}") as e:
            launch.check_launch(tmp_path/"a.yaml", gpus=1)
    free = int(re.search(r"Free now is (\d+)", str(e.value))[1])
    assert free != port and not launch.in_use(free)
    assert launch.check_launch(tmp_path/"a.yaml", gpus=1)["main_process_port"] == port


# --- runs -----------------------------------------------------------------------------------------------------------------------

def losses(output: str) -> list[float]:
    return [float(line.split()[1]) for line in output.splitlines() if line.startswith("loss ")]


def told(answers) -> str:
    """All that launches said, for a message that pytest does not shorten."""
    return "\n".join(f"--- exit code {code}\n{output}" for code, output in answers)


def test_what_accelerate_launches_computes_what_one_process_computes(tmp_path):
    """Hybrid sharding over 2×2 ranks, and DDP over two machines, which are two launches here, with checks before."""
    port = launch.free_port()
    (tmp_path/"plain.py").write_text(launch.script(steps=3))
    for n in (2, 4):
        (tmp_path/f"train{n}.py").write_text(launch.script("accelerate", steps=3, processes=n))
    hybrid = launch.accelerate_config(plan(strategy="hybrid_shard", shard_size=2, world_size=4, checkpointing=True), block="Block", ram_efficient=False)
    two = launch.accelerate_config(plan(batch=2), nodes=2, main_ip="127.0.0.1", port=port)
    (tmp_path/"hybrid.yaml").write_text(launch.text(hybrid))
    (tmp_path/"two.yaml").write_text(launch.text(two))
    launch.check_launch(tmp_path/"hybrid.yaml", cpu=True), launch.check_launch(tmp_path/"two.yaml", cpu=True)
    runs = [launch.rehearsal(tmp_path/"hybrid.yaml", tmp_path/"train4.py")]
    runs += [launch.rehearsal(tmp_path/"two.yaml", tmp_path/"train2.py", f"--machine_rank={k}") for k in (0, 1)]
    answers = launch.run([[sys.executable, str(tmp_path/"plain.py")], *(command for command, _ in runs)], env=runs[0][1], limit=110)
    assert [code for code, _ in answers] == [0]*4, told(answers)
    one, sharded, ddp, second = (losses(output) for _, output in answers)
    assert len(one) == 3 and one[0] != one[1] and second == ddp      # print is for each machine's first
    assert sharded == pytest.approx(one, abs=1e-5) and ddp == pytest.approx(one, abs=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("changed,words", [(dict(), "DistributedDataParallel"), (dict(strategy="full_shard"), "FSDP"), (dict(strategy="shard_grad_op", precision="amp_bf16"), "FSDP")])
def test_accelerate_launch_on_two_gpus(tmp_path, changed, words):
    """The real thing, as its config says: NCCL, a process a GPU; the losses are those of one process."""
    who = "print('wrapped:', type(model).__name__)\n"
    (tmp_path/"plain.py").write_text(launch.script(steps=3))
    (tmp_path/"train.py").write_text(launch.script("accelerate", steps=3, processes=2).replace("\nfor ids", f"\n{who}\nfor ids"))
    (tmp_path/"plan.yaml").write_text(launch.text(launch.accelerate_config(plan(batch=2, **changed), block="Block", ram_efficient=False)))
    launch.check_launch(tmp_path/"plan.yaml", gpus=torch.cuda.device_count())
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path/"plan.yaml"), str(tmp_path/"train.py")]
    answers = launch.run([[sys.executable, str(tmp_path/"plain.py")], start], env=ENV, limit=110)
    assert [code for code, _ in answers] == [0, 0], told(answers)
    one, ours = (losses(output) for _, output in answers)
    wrapped = [line for line in answers[1][1].splitlines() if line.startswith("wrapped:")]
    assert len(wrapped) == 2 and all(words in line for line in wrapped), told(answers)
    assert len(one) == 3 and ours == pytest.approx(one, abs=0.03 if changed.get("precision") else 1e-3)


@NO_GPU
def test_what_runs_quietly_without_gpus(tmp_path):
    """The chapter's table: commands that look right and start something else."""
    (tmp_path/"who.py").write_text("import torch\nfrom accelerate import Accelerator\na = Accelerator()\nm = a.prepare(torch.nn.Linear(2, 2))\n"
                                   "print(f'ranks: {a.num_processes} {type(m).__name__}\\n', end='', flush=True)\na.end_training()\n")
    (tmp_path/"MULTI_CPU.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    (tmp_path/"FSDP.yaml").write_text(launch.text(launch.accelerate_config(plan(strategy="full_shard"), block="Linear")))
    start, who = [sys.executable, "-m", "accelerate.commands.launch"], str(tmp_path/"who.py")
    plain = {k: v for k, v in ENV.items() if not k.startswith("ACCELERATE")}
    config = ["--config_file", str(tmp_path/"FSDP.yaml"), who]
    answers = launch.run([[*start, "--cpu", "--num_processes", "2", who], [*start, "--config_file", str(tmp_path/"MULTI_CPU.yaml"), who],
                          [*start, *config], ["env", "ACCELERATE_USE_CPU=true", *start, *config]], env=plain, limit=110)
    said = [sorted(line for line in output.splitlines() if line.startswith("ranks")) for _, output in answers]
    assert said == [["ranks: 1 Linear"], ["ranks: 1 Linear"], ["ranks: 1 Linear"]*2, ["ranks: 2 DistributedDataParallel"]*2]


JOB = """
import datetime, os, signal, sys, torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
rank, world = dist.get_rank(), dist.get_world_size()
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print(f"rank {rank} of {world} node {os.environ['GROUP_RANK']} sum {total.item():.0f}", flush=True)
if sys.argv[1:] == [str(rank)]: os.kill(os.getpid(), signal.SIGKILL)
for _ in range(100): dist.all_reduce(total)
dist.destroy_process_group()
"""


def torchrun(path, *arguments, ranks):
    commands = launch.command(2, ranks, path, *arguments, host="127.0.0.1", port=launch.free_port(), job="test")
    assert commands[0][0] == "torchrun"
    return [[sys.executable, "-m", "torch.distributed.run", *words[1:]] for words in commands]


def test_two_nodes_meet_and_sum(tmp_path):
    (tmp_path/"job.py").write_text(JOB)
    answers = launch.run(torchrun(tmp_path/"job.py", ranks=2), env=ENV, limit=60)
    assert [code for code, _ in answers] == [0, 0], told(answers)
    said = sorted(line for _, output in answers for line in output.splitlines() if line.startswith("rank"))
    assert said == [f"rank {r} of 4 node {r//2} sum 10" for r in range(4)]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_ends_the_other_node_within_seconds(tmp_path, dies):
    (tmp_path/"job.py").write_text(JOB)
    began = time.monotonic()
    answers = launch.run(torchrun(tmp_path/"job.py", dies, ranks=1), env=ENV, limit=60)
    assert [code for code, _ in answers] == [1, 1] and time.monotonic() - began < 40, told(answers)
    dead = next(i for i, (_, output) in enumerate(answers) if "SIGKILL" in output)
    assert "onnection" in answers[1 - dead][1] and "SIGKILL" not in answers[1 - dead][1]


def gone(pid: int) -> bool:
    """Whether a process is over; a zombie that waits for its parent counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="orphans are found through /proc")
def test_nothing_is_left_of_a_launch_that_hangs_or_loses_its_launcher(tmp_path):
    (tmp_path/"hang.py").write_text("import os, pathlib, sys, time, signal\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
                                    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                                    "if sys.argv[2] == 'orphan': os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(600)\n")
    commands = [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(tmp_path/"hang.py"), str(tmp_path/kind), kind]
                for kind in ("hang", "orphan")]
    began = time.monotonic()
    (hung, _), (lost, _) = launch.run(commands, env=ENV, limit=15)
    assert hung is None and lost == -9 and time.monotonic() - began < 40
    deadline = time.monotonic() + 5  # on a busy machine a killed process takes a moment to end
    while time.monotonic() < deadline and not all(gone(int((tmp_path/kind).read_text())) for kind in ("hang", "orphan")):
        time.sleep(.1)
    assert all(gone(int((tmp_path/kind).read_text())) for kind in ("hang", "orphan"))


def test_importing_it_is_quick_and_imports_no_torch():
    code = "import sys, nbs_lib.launch; print([m for m in ('torch', 'accelerate', 'yaml', 'deepspeed') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- DeepSpeed ------------------------------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(plans())
def test_deepspeeds_file_adds_up(drawn):
    p, nodes = drawn
    try:
        config = launch.deepspeed_config(p, nodes, "10.0.0.1" if nodes > 1 else None)
    except ValueError:
        assert p.strategy == "hybrid_shard" or p.offload and p.precision == "bf16"
        return
    v = json.loads(launch.text(config))
    assert v == config.values and v["train_batch_size"] == p.batch*p.accumulation*p.world_size
    assert v["train_batch_size"] == v["train_micro_batch_size_per_gpu"]*v["gradient_accumulation_steps"]*p.world_size
    assert ("offload_param" in v["zero_optimization"]) == (p.offload and p.strategy == "full_shard")
    assert ("offload_optimizer" in v["zero_optimization"]) == p.offload
    assert [k for k in ("bf16", "torch_autocast") if k in v] == {"fp32": [], "bf16": ["bf16"]}.get(p.precision, ["torch_autocast"])
    assert len(launch.commands(config)) == nodes


@pytest.mark.parametrize("strategy,precision", [("ddp", "fp32"), ("zero1", "fp32"), ("shard_grad_op", "amp_bf16"), ("zero3", "bf16"), ("full_shard", "fp32")])
def test_deepspeed_runs_its_file_on_cpu_ranks(tmp_path, strategy, precision):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not among the course's requirements")
    (tmp_path/"plain.py").write_text(launch.script(steps=3))
    (tmp_path/"train.py").write_text(launch.script("deepspeed", steps=3, processes=2))
    config = launch.deepspeed_config(plan(batch=2, strategy=strategy, precision=precision))
    (tmp_path/"deepspeed.json").write_text(launch.text(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py", "deepspeed.json"]
    env = {**ENV, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(launch.__file__).parents[1])}
    answers = launch.run([[sys.executable, "plain.py"], torchrun], env=env, limit=110, cwd=str(tmp_path))
    assert [code for code, _ in answers] == [0, 0], told(answers)
    one, ours = (losses(output) for _, output in answers)
    assert len(one) == 3 and ours == pytest.approx(one, abs=1e-5 if precision == "fp32" else 0.03)
