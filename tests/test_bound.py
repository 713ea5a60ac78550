"""What limits a training: the hypotheses' arithmetic, the experiments' logic, and the stated model in both frameworks."""
from __future__ import annotations

import json
import math
import re

import pytest

pytest.importorskip("jax")

import jax
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
from torch import nn

from nbs_lib.bound import (CHANGES, LIMITS, MODEL, PREDICTS, STORY, Biased, Case, Seen, biased_loss, biased_params, cases, cuda_cards, findings, flip, flips_at,
                           half, leaders, line_up, measurements, older, outcome, predicted, ranked, rate, ratios, scores, speed)
from nbs_lib.adapters import quick
from nbs_lib.course.measure_bound import key, main, run_case, told
from nbs_lib.gpt import batches, text
from nbs_lib.hardware import gpu
from nbs_lib.jax_torch import LlamaConfig

SMALL = LlamaConfig(layers=1, hidden=32, heads=2, kv_heads=2, head_dim=16, ffn=64, vocab=128, context=32)


def test_a_limit_predicts_in_proportion():
    a, b = gpu("rtx-5090"), gpu("h100-sxm")
    assert predicted("bandwidth", b, "torch") == pytest.approx(5000 * b.bandwidth / a.bandwidth)
    assert predicted("compute, fp32 as it comes", b, "torch") == pytest.approx(5000 * b.flops["fp32"] / a.flops["tf32"])
    assert predicted("compute, fp32 as it comes", b, "jax") > 7 * predicted("compute, fp32 as it comes", b, "torch")
    assert all(predicted(h, a, "jax") == pytest.approx(5000) for h in LIMITS)
    with pytest.raises(ValueError, match="hypothesis is 'luck'; accepted"):
        predicted("luck", a, "jax")


def test_the_ranking_finds_the_truth_in_stories_made_up():
    for truth in ("bandwidth", "compute, bf16", "compute, fp32 as it comes"):
        old = gpu("rtx-3090")
        story = (STORY[0], Seen(predicted(truth, old, "jax"), None, "jax"), Seen(predicted(truth, gpu("h100-sxm"), "torch"), "h100-sxm", "torch"))
        assert ranked(story)[0]["hypothesis"] == truth and ranked(story)[0]["miss"] == pytest.approx(1)
    assert {g.architecture for g in older()} == {"Ampere", "Ada"} and len(cuda_cards()) > len(older())


def test_the_journals_numbers_rank_as_the_chapter_says():
    rows = ranked()
    assert [r["hypothesis"] for r in rows] == ["compute, fp32 as it comes", "bandwidth", "host or input", "compute, bf16"]
    by = {r["hypothesis"]: r for r in rows}
    assert by["bandwidth"]["third"] > 2 * STORY[2].rate and by["compute, bf16"]["misses"][0] > 5
    assert min(by, key=lambda h: by[h]["misses"][0]) == "host or input"      # closest on the H100 alone
    assert findings()[0]["verdict"] == "holds"


@settings(max_examples=50)
@given(st.floats(1e-3, 1e3))
def test_outcomes_are_symmetric(ratio):
    turned = {"same": "same", "less": "more", "more": "less"}
    if abs(abs(math.log(ratio)) - math.log(1.2)) > 1e-9:
        assert outcome(1 / ratio) == turned[outcome(ratio)]


@pytest.mark.parametrize("bad", [0, -1.0, math.inf, math.nan])
def test_a_ratio_is_a_positive_number(bad):
    with pytest.raises(ValueError, match="ratio is .*; accepted"):
        outcome(bad)


def test_each_hypothesis_wins_where_its_predictions_come_true():
    number = {"same": 1.0, "less": 0.4, "more": 2.0}
    for h in next(iter(PREDICTS.values())):
        seen = {e: number[p[h]] for e, p in PREDICTS.items()}
        assert scores(seen)[h] == (len(PREDICTS), len(PREDICTS))
        assert leaders(seen) == (["bandwidth", "kernels"] if h in ("bandwidth", "kernels") else [h])


def test_each_experiment_changes_one_thing():
    c = cases(8)
    for experiment, (new, old) in CHANGES.items():
        assert experiment in PREDICTS
        assert sum(x != y for x, y in zip(c[new], c[old])) == 1, experiment
    rows = [{"framework": "torch", **x._asdict(), "seconds": 1.0 + i} for i, x in enumerate(c)]
    assert ratios(rows, 8) == {e: (1 + new) / (1 + old) for e, (new, old) in CHANGES.items()}
    assert set(ratios(rows[:2], 8)) == {"twice the batch"} and ratios(rows, 9) == {}


def test_the_bias_is_the_same_in_every_way_and_framework():
    torch.manual_seed(0)
    dense = Biased(SMALL)
    nn.init.normal_(dense.table)
    ids, targets = next(batches(text(), 2, 32))
    dense(ids, targets).backward()
    best, base = dense.table.grad, float(dense(ids, targets).detach())
    sdpa = Biased(SMALL, "sdpa")                                             # the chapter compares flex, too
    sdpa.load_state_dict(dense.state_dict())
    sdpa(ids, targets).backward()
    value, grads = jax.jit(jax.value_and_grad(biased_loss), static_argnums=3, compiler_options=quick())(biased_params(dense), *(jnp.asarray(x.numpy()) for x in (ids, targets)), SMALL)
    assert float(value) == pytest.approx(base, abs=1e-5)
    for g in (sdpa.table.grad, torch.tensor(jax.device_get(grads["table"]))):
        assert (g - best).abs().max() < 1e-4 * best.abs().max()
    nn.init.zeros_(sdpa.table)
    assert abs(float(sdpa(ids, targets).detach()) - base) > 1e-5             # the bias does something
    with pytest.raises(ValueError, match="how is 'fast'; accepted"):
        Biased(SMALL, "fast")


def test_a_case_gives_a_row_or_its_error():
    row = run_case(Case("sdpa", "fp32", 2), SMALL, "cpu", 2)
    assert row["rate"] == pytest.approx(2 / row["seconds"]) and row["loss"] == pytest.approx(math.log(128), abs=0.5)
    if not torch.cuda.is_available():
        assert "CUDA" in run_case(Case("sdpa", "fp32", 2, "graph"), SMALL, "cpu", 2)["error"]


def test_half_the_width_has_the_same_launches():
    h = half(MODEL)
    assert (h.layers, h.heads, h.context) == (MODEL.layers, MODEL.heads, MODEL.context) and 2 * h.hidden == MODEL.hidden
    assert speed("h100-sxm", 1, config=h).seconds == pytest.approx(speed("h100-sxm", 1).seconds, rel=0.05)      # the host's time


def test_the_flip_is_where_waiting_ends():
    name = flips_at(16)
    assert flip(16, answer=name).startswith("Right")
    rates = [r for _, r, _ in line_up(16)]
    assert rates == sorted(rates, reverse=True)
    place = [g.name for g, *_ in line_up(16)].index(name)
    assert all(bound == "launch" for *_, bound in line_up(16)[:place]) and line_up(16)[place][2] != "launch"
    assert "still waits" in flip(16, answer=line_up(16)[0][0].name)
    assert "faster one" in flip(16, answer=line_up(16)[-1][0].name)
    places = [[g.name for g, *_ in line_up(b)].index(flips_at(b)) for b in (2, 8, 16, 32, 256)]
    assert places == sorted(places, reverse=True) and places[-1] == 0        # the larger the batch, the faster the card that it fills
    assert rate(speed("h100-sxm", 256)) > 5 * rate(speed("h100-sxm", 16))
    for bad in ("tpu-v5e", "h100-mega"):
        with pytest.raises(ValueError):
            flip(16, answer=bad)


def test_the_command_keeps_rows_of_other_experiments(tmp_path, monkeypatch):
    from nbs_lib.course import measure_bound

    def rows(plan, rounds, config):
        yield from ({"framework": "jax", "how": "dense", "precision": p, "batch": b, "mode": "jit", "rate": 1.0} for b, p in plan)

    monkeypatch.setattr(measure_bound, "run_case", lambda c, *_: {"framework": "torch", **c._asdict(), "error": "no card"})
    monkeypatch.setattr(measure_bound, "jax_rates", rows)
    file = tmp_path / "bound.json"
    main(["--small", "--out", str(file), "--part", "torch"])
    main(["--small", "--out", str(file), "--part", "jax"])
    main(["--small", "--out", str(file), "--part", "jax"])
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 2 * 8 + 5 == len(set(map(key, found["rows"]))) and set(found["parts"]) == {"torch", "jax"}
    assert told(found["rows"][0]).endswith("eager: no card") and told(found["rows"][-1]).endswith("1 samples/s")


def test_committed_measurements():
    assert measurements("tpu") is None and {r["framework"] for r in measurements("cpu")["rows"]} == {"torch", "jax"}
    for m in filter(None, map(measurements, ("cpu", "h100"))):
        assert re.match(r"python3 -m nbs_lib\.(course\.measure_)?bound", m["provenance"]["command"])
        assert all(("rate" in r) != ("error" in r) for r in m["rows"]) and set(m["batches"]) == {r["batch"] for r in m["rows"]} & set(m["batches"])
    for f in findings():
        assert set(f) == {"claim", "verdict", "because", "versions", "device"} and f["because"].endswith(".")
