"""The live breakdown, as a learner moves its controls in a kernel."""
from __future__ import annotations

import re

from nbs_lib.course.widgets import breakdown, memory_explorer
from nbs_lib.memory import train_memory

SETTINGS = dict(batch=1, seq=2048, precision="bf16", optimizer="adamw", checkpointing=False, strategy="single", world_size=1)


def test_breakdown_shows_every_term_and_a_verdict():
    page = breakdown("llama-3-8b", "h100-sxm", **SETTINGS)
    m = train_memory("llama-3-8b", batch=1, seq=2048)
    shown = [float(x) for x in re.findall(r">(\d+\.\d\d) GiB", page)]
    assert abs(sum(shown) - m.peak / 2**30) < 0.05 and "Fits" in page
    assert "Does not fit" in breakdown("llama-3-8b", "rtx-4090", **SETTINGS)


def test_refused_settings_say_why_instead_of_failing():
    page = breakdown("bert-base-cased", "h100-sxm", **SETTINGS)
    assert "Not possible" in page and "512" in page
    assert "world_size" in breakdown("gpt2", "h100-sxm", **{**SETTINGS, "seq": 512, "world_size": 8})


def test_moving_a_control_changes_the_breakdown():
    explorer = memory_explorer()
    columns, out = explorer.children
    controls = {c.description: c for column in columns.children for c in column.children}
    assert set(controls) >= {"model", "batch", "sequence", "precision", "optimizer", "checkpointing", "strategy", "GPU"}
    before = out.value
    controls["sequence"].value = 8192
    assert out.value != before and "Does not fit" in out.value
    controls["checkpointing"].value = True
    assert "Fits" in out.value
