"""One call for a host with several GPUs: what it predicts, a rehearsal on CPU ranks, and going on where it stopped."""
import json
import statistics
import subprocess
import sys
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbs_lib.course import measure, measure_node as node
from nbs_lib.course.processes import environment
from nbs_lib.hardware import gpu
from nbs_lib.memory import capacity, train_memory


def call(*args, limit=300):
    return subprocess.run([sys.executable, "-W", "ignore", "-m", "nbs_lib.course.measure_node", *map(str, args)], capture_output=True, text=True, timeout=limit,
                          env=environment() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def test_four_gpus_carried_on_from_two_are_as_measured():
    """The rule that predicts eight GPUs, tried on four, which were measured: median within 2%, each within a tenth."""
    told = {(s["model"], s["way"]): s["share"] for s in node.scaled(4) if s["gpus"] == 4 and not s["strong"]}
    off = {key: told[key]/share - 1 for key, share in node.measured_shares(4).items()}
    assert len(off) >= 12 and statistics.median(map(abs, off.values())) < 0.02 and max(map(abs, off.values())) < 0.1, off


@given(st.sampled_from([2, 4, 8]))
def test_what_is_measured_fits_and_has_every_strategy(gpus):
    found = node.entries(gpus)
    for e in found:
        s = {k: v for k, v in e.items() if k != "group"}
        assert train_memory(**s).peak_any <= capacity(gpu("h100-sxm")) and measure.complete(e)[0] == "train"
    every = {"ddp", "full_shard", "shard_grad_op", "zero1", "zero2", "zero3"} | ({"hybrid_shard"} if gpus >= 4 else set())
    assert {e["strategy"] for e in found if "1b" in e["model"]} == every and {e["world_size"] for e in found} == {gpus}
    assert ("ddp", "llama-3-8b") not in {(e["strategy"], e["model"]) for e in found} and any("8b" in e["model"] for e in found) == (gpus >= 2)


def test_strong_scaling_is_predicted_below_weak():
    """The same communication beside less work. Never more than the weak share."""
    told = {(s["model"], s["way"], s["gpus"], s["strong"]): s["share"] for s in node.scaled(8)}
    strong = [k for k in told if k[3] and k[2] > 2]
    assert strong and all(0 < told[k] < told[*k[:3], False] for k in strong)


def test_a_batch_that_does_not_divide_is_left_out():
    assert node.modelled("1.3b", "ddp", 16, strong=True) is None and node.modelled("1.3b", "ddp", 16) > 0
    assert node.worlds(8) == [2, 4, 8] and node.worlds(2) == [2] and node.worlds(6) == [2, 4, 6]


def test_predictions_need_no_gpu(tmp_path):
    done = call("--predict", "--gpus", 8, "--out", tmp_path/"new"/"folder")
    assert done.returncode == 0 and "zero3" in done.stdout and "of linear" in done.stdout, done.stderr
    told = json.loads((tmp_path/"new"/"folder"/"predictions.json").read_text())
    assert told["gpus"] == 8 and {c["ranks"] for c in told["collectives"]} == {2, 4, 8} and {c["op"] for c in told["collectives"]} == set(node.OPS)
    again = call("--predict", "--gpus", 4, "--out", tmp_path/"new"/"folder")
    assert again.returncode == 2 and "of a run with 8 GPUs" in again.stderr and json.loads((tmp_path/"new"/"folder"/"predictions.json").read_text()) == told


@pytest.mark.parametrize("args, words", [([], "0 are here"), (["--gpus", 1, "--rehearse"], "--gpus is 1; accepted are 2 or more"), (["--gpus", 4], "4 GPUs are asked for and 0 are here")])
def test_what_cannot_be_is_a_sentence(tmp_path, args, words):
    done = call("--out", tmp_path/"x", *args)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr and not (tmp_path/"x").exists()


def test_a_rehearsal_runs_every_part_and_is_gone_on_with(tmp_path):
    """Real processes on gloo: collectives equal to torch's, all strategies with the same losses, both kinds of scaling."""
    done = call("--rehearse", "--gpus", 2, "--minutes", 10, "--out", tmp_path, limit=590)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = list(measure.rows_in(tmp_path/"collectives.jsonl"))
    assert {(r["op"], r["bytes"]) for r in rows} == {(op, n) for op in node.OPS for n in node.SIZES[:4]}
    assert all(r["off"] == 0 and r["ours"] > 0 and r["torch's"] > 0 and r["backend"] == "gloo" and r["date"] for r in rows)
    steps = list(measure.rows_in(tmp_path/"rows.jsonl"))
    assert [r["settings"]["strategy"] for r in steps] == [s["strategy"] for s in node.strategies(2)] and not any("error" in r for r in steps)
    assert len({json.dumps([[round(x, 4) for x in losses] for losses in r["rank_losses"]]) for r in steps}) == 1
    weak, strong = (json.loads((tmp_path/f"{name}.json").read_text())["rows"] for name in ("scaling", "scaling_strong"))
    batch = {(r["way"], r["ranks"]): (r["batch"], s["batch"]) for r, s in zip(weak, strong, strict=True)}
    assert batch["single", 1] == (2, 2) and batch["torch ddp", 2] == (2, 1) and not any("error" in r for r in weak + strong)
    told = done.stdout[done.stdout.index("\nweak scaling:\n"):]  # the report
    for part in told.split("strong scaling:"):
        assert all(f" {way:<20} {ranks} ranks:" in part for way, ranks in (("single", 1), ("ddp", 2), ("torch ddp", 2), ("zero3", 2))) and part.count("of linear") >= 4, part
    again = call("--rehearse", "--gpus", 2, "--minutes", 10, "--out", tmp_path, limit=590)
    assert again.returncode == 0 and "are in" in again.stdout and not {"weak scaling", "strong scaling"} & set(again.stdout.splitlines())
    assert list(measure.rows_in(tmp_path/"collectives.jsonl")) == rows


def test_what_a_cut_part_has_measured_is_reported_and_measured_again(tmp_path, monkeypatch):
    """The failure of the first run on two GPUs: scaling was ended while its two ranks ran, so its file held one rank's rows, and the report only those."""
    def row(ranks, *seconds):
        return dict(model="tiny", way="single" if ranks == 1 else "ddp", ranks=ranks, batch=2, rounds=[list(seconds)])
    (tmp_path/"predictions.json").write_text(json.dumps({"gpus": 4, "collectives": [], "scaling": [dict(model="tiny", way="ddp", gpus=2, strong=True, share=0.75)]}))
    for file in ("scaling.json", "scaling_strong.json"):
        (tmp_path/file).write_text(json.dumps({"rows": [row(1, 1.0)]}))
    (tmp_path/"scaling.2.json").write_text(json.dumps([row(2, 1.25)]))
    (tmp_path/"scaling_strong.2.json").write_text(json.dumps([row(2, 2.0)]))
    (tmp_path/"scaling_strong.4.json").write_text('[{"model": "ti')  # ended while it wrote
    weak, strong = "\n".join(node.compared(tmp_path)).split("strong scaling:")
    assert "ddp                  2 ranks" in weak and "0.800 of linear" in weak and "predicted" not in weak
    assert "ddp                  2 ranks" in strong and "0.500 of linear; predicted 0.750 of linear" in strong and "4 ranks" not in strong
    called = []
    monkeypatch.setattr(node, "started", lambda command, *rest: called.append(command))
    monkeypatch.setattr(node.measure, "suite", lambda *a, **k: None)
    (tmp_path/"scaling.json").write_text(json.dumps({"rows": [row(n, 1.0) for n in (1, 2, 4)]}))
    node.run(tmp_path, 4, 5, True, lambda line: None)
    ours = [c for c in called if "nbs_lib.course.scaling" in c]
    assert len(ours) == 1 and "--strong" in ours[0] and 0 < float(ours[0][ours[0].index("--seconds") + 1]) < 300


def test_strong_scaling_on_two_was_predicted_from_weak_and_more_stand_on_it():
    told = {(s["model"], s["way"], s["gpus"]): s["share"] for s in node.scaled(4) if s["strong"]}
    two = node.measured_shares(2, strong=True)
    for (model, way), share in two.items():
        kind = node.STRATEGY[way]
        assert told[model, way, 4] == pytest.approx(share*node.modelled(model, kind, 4, True)/node.modelled(model, kind, 2, True))
        assert told[model, way, 4] < share


def test_the_dry_run_on_two_gpus_is_stored():
    """What nbs_lib/data keeps of it: the settings that this command measures on two GPUs, peaks within a thousandth of what it had told, times within a third."""
    rows = list(measure.rows_in(files("nbs_lib")/"data"/"node_2_h100.jsonl"))
    assert [{k: r["settings"][k] for k in ("model", "batch", "seq", "strategy", "world_size")} for r in rows] == [{k: e[k] for k in ("model", "batch", "seq", "strategy", "world_size")} for e in node.entries(2)]
    for r in rows:
        assert abs(r["told"]["peak"]/r["peak"] - 1) < 1e-3 and abs(r["told"]["seconds"]/r["seconds"] - 1) < 1/3
        assert abs(train_memory(**r["settings"]).peak/r["peak"] - 1) < 1e-3 and "H100" in r["provenance"]["device"] and r["provenance"]["command"]


def test_profiles_come_after_all_timings():
    """Of all models, since a profile makes what is timed after it longer; every second round backwards, so that drift meets all ways alike."""
    from argparse import Namespace

    from nbs_lib.course import scaling

    a = Namespace(models=["124m", "1.3b", "tiny"], ways=scaling.ALL, rounds=2, steps=5, strong=True)
    plan = scaling.order(a, 4)                                      # the tiny model's two sequences do not divide among four
    first = next(i for i, (*_, steps) in enumerate(plan) if not steps)
    assert all(steps == 5 for *_, steps in plan[:first]) and all(not steps for *_, steps in plan[first:])
    assert {name for name, *_ in plan} == {"124m", "1.3b"}
    small = [way for name, way, _ in plan[:first] if name == "124m"]
    assert small == [*scaling.ways(4), *reversed(scaling.ways(4))] and [way for name, way, _ in plan[first:] if name == "124m"] == scaling.ways(4)
