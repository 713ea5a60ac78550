"""Chapter 10g: what people say, and what we measured: one table of verdicts, made from the data files alone."""
from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nbs_lib
from nbs_lib import claims
from nbs_lib.claims import CHAPTERS, DEVICES, FORGOTTEN, ONLY, PARTS, WORDS, Verdict, as_verdict, in_short, measured_parts, of_resumed, short_table, verdict_table, waiting, waiting_claims
from nbs_lib.course.provenance import stored

pytest.importorskip("jax", reason="the lesson's extra")
DATA = Path(nbs_lib.__file__).parent / "data"

#: What the leads say people say of JAX and PyTorch, and the words of the claim that tests it.
SAID = {"JAX compiles the graph ahead, PyTorch rebuilds it every forward": "JAX compiles the graph ahead, PyTorch rebuilds it every forward",
        "JAX is blazing fast once it works": "JAX is blazing fast once it works",
        "JAX parallelizes across devices automatically": "JAX parallelizes across devices automatically",
        "no PEFT-style library": "There is no PEFT-style library for JAX",
        "more effort than it is worth": "JAX is more effort",
        "compile time": "compiling is worth its time",
        "LoRA on a real small model in both": "LoRA by hand in JAX trains like peft",
        "torch.func (vmap, grad)": "Functional transforms are what only JAX has",
        "JAX's attention takes a bias": "JAX's attention takes a bias",
        "PyTorch's answer is flex_attention": "a custom bias in PyTorch needs flex_attention",
        "a score_mod may not close over more than one tensor": "flex_attention: a score_mod may not close over more than one tensor",
        "dimensions must be powers of two": "flex_attention: dimensions must be powers of two",
        "no gradient unless the sequence is a multiple of 128": "flex_attention: no gradient unless the sequence is a multiple of 128",
        "NaN gradients": "flex_attention: gradients become NaN",
        "bandwidth alone is not the story": "An H100 has more bandwidth than an RTX 5090, so bandwidth alone is not the story",
        "which hypotheses would explain all three": "The stated small training is memory-bound on an H100",
        "stop it at any step, start again, same losses": "A training can be stopped at any step, and goes on with the same losses"}


@pytest.fixture(scope="module")
def found() -> list[Verdict]: return claims.verdicts()


@pytest.fixture
def changed(monkeypatch, tmp_path):
    """changed(name, change): from now on, data file NAME is a copy that change(data) has altered."""
    altered = {}

    def other(name):
        return copy.deepcopy(altered[name]) if name in altered else stored(name)

    def change(name, how):
        file = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
        how(file)
        altered[name] = file
    for module in CHAPTERS:
        if hasattr(m := __import__(f"nbs_lib.{module}", fromlist=["x"]), "stored"): monkeypatch.setattr(m, "stored", other)
    return change


def said(claim, kind, how=None):
    return [v.verdict for v in claims.verdicts() if v.claim == claim and v.kind == kind and how in (None, v.how)]


@pytest.mark.parametrize("lead", SAID)
def test_every_claim_of_the_leads_has_a_verdict_with_numbers_versions_and_device(found, lead):
    mine = [v for v in found if v.claim == SAID[lead]]
    assert mine
    for v in mine:
        assert re.search(r"\d", v.because) and v.because.endswith(".") and v.versions and v.device, v
        assert (DATA.parent.parent / "nbs" / f"{v.chapter}.ipynb").exists()


def test_verdicts_are_in_the_four_words_and_stand_together(found):
    names = [v.claim for v in found]
    assert {v.word for v in found} <= {*WORDS, ONLY.strip()} and len({(v.claim, v.device, v.how) for v in found}) == len(found)
    assert [a for a, b in zip(names, names[1:]) if a != b] + names[-1:] == list(dict.fromkeys(names))       # each in one run
    assert {v.chapter for v in found} == set(CHAPTERS.values())


def row(**other):
    return {"claim": "c", "verdict": "holds", "because": "2 of 2.", "versions": "torch 2.11, JAX 0.11.2", "device": "NVIDIA H100 80GB HBM3"} | other


@pytest.mark.parametrize("verdict", ["maybe", "only when", "only when ", "only when: it rains", "Holds", "", "holds, mostly"])
def test_an_unknown_verdict_is_refused_by_the_claims_name(verdict):
    with pytest.raises(ValueError, match="verdict of the claim 'my claim' is") as e: as_verdict(row(claim="my claim", verdict=verdict), "10a_compiled")
    assert "accepted are holds, no longer, false" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("field", ["because", "versions", "device"])
def test_a_verdict_without_its_reason_or_place_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} of the claim 'c' is empty"): as_verdict(row(**{field: ""}), "10a_compiled")


@pytest.mark.parametrize("device,kind,name,how", [
    ("NVIDIA H100 80GB HBM3", "H100", "NVIDIA H100 80GB HBM3", ""), ("NVIDIA H100 80GB HBM3, compiled", "H100", "NVIDIA H100 80GB HBM3", "compiled"),
    ("CPU, x86_64", "CPU", "CPU, x86_64", ""), ("CPU, x86_64, eager", "CPU", "CPU, x86_64", "eager"), ("NVIDIA H200", "H200", "NVIDIA H200", ""),
    ("NVIDIA GeForce RTX 5090", "RTX 5090", "NVIDIA GeForce RTX 5090", ""), ("any", "any", "any", "")])
def test_device_and_way_are_told_apart(device, kind, name, how):
    v = as_verdict(row(device=device), "10a_compiled")
    assert (v.kind, v.device, v.how) == (kind, name, how)


def test_versions_are_named_alike():
    assert as_verdict(row(versions="torch 2.11, JAX 0.11.2"), "x").versions == "torch 2.11, jax 0.11.2"
    assert as_verdict(row(versions="torch 2.11, jax 0.11.2, jaxlib 0.11.2"), "x").versions == "torch 2.11, jax 0.11.2"
    assert "jaxlib 0.11.1" in as_verdict(row(versions="torch 2.11, jax 0.11.2, jaxlib 0.11.1"), "x").versions


def only(monkeypatch, *rows):
    """verdicts() of these rows alone."""
    for module in CHAPTERS: monkeypatch.setattr(f"nbs_lib.{module}.findings", lambda given=rows if module == "compiled" else (): list(given))
    return claims.verdicts()


def test_a_claim_on_two_devices_keeps_two_verdicts(monkeypatch):
    two = only(monkeypatch, row(device="CPU, x86_64", verdict="false"), row(claim="d"), row())
    assert [(v.claim, v.kind, v.verdict) for v in two] == [("c", "H100", "holds"), ("c", "CPU", "false"), ("d", "H100", "holds")]
    assert in_short(two[:2]) == "**holds** (H100); **false** (CPU)" and in_short([two[0]]) == "**holds**"
    assert claims.differing(two) == {"c": {"H100": "holds", "CPU": "false"}}
    with pytest.raises(ValueError, match="the claim 'c' has 2 verdicts on NVIDIA H100"): only(monkeypatch, row(), row(verdict="false"))


def test_ways_of_running_are_named_where_they_disagree():
    ways = [as_verdict(row(device=f"NVIDIA H100, {how}", verdict=verdict), "x") for how, verdict in (("compiled", "only when it rains"), ("eager", "no longer"))]
    cpu = as_verdict(row(device="CPU, x86_64, eager", verdict="no longer"), "x")
    assert in_short([*ways, cpu]) == "**only when** it rains (H100 compiled); **no longer** (H100 eager, CPU)"


def test_the_tables_hold_every_claim_verdict_reason_and_version(found):
    long, short = verdict_table(found).markdown, short_table(found).markdown
    for v in found:
        assert v.claim in long and v.claim in short and claims.bold(v.verdict) in long and claims.plain(v.because) in long
        assert f"({v.chapter}.ipynb)" in long and v.verdict.removeprefix(v.word) in short
        if v.kind in DEVICES: assert all(part in long and part in short for part in v.versions.split(", "))
    assert long.count("**" + found[0].claim + "**") == 1 and "2026-" in long and "#" not in long
    assert "vmap(\\<lambda>" in long                                        # else the page would lose it as a tag


def test_verdicts_follow_the_data_files(changed):
    """Altered copies of the files turn verdicts over, on that device alone."""
    def slow(f):
        for r in (r for part in f.values() for r in part.get("rows", [])):
            if str(r.get("name")).startswith("jax.jit"): r["seconds"] = 2.0                 # slower than anything measured, JAX without jit, too

    def apart(f):
        for r in f["rows"]:
            if "apart" in r: r["apart"] = 1.0

    def broken(f):
        for r in f["limits"]["rows"]:
            if r["claim"] == "gradients become NaN" and r["how"] == "compiled": r |= {"outcome": "not finite", "detail": "q"}

    def other_words(f): f["smollm2"]["rows"]["jax"][3] = f["smollm2"]["rows"]["jax, float32"][3] = -1
    def gone(f): f["equal"]["apart"] = 2*f["equal"]["tolerance"]
    def lost(f):
        for r in f["resumed"]["rows"]: r["gap"] = 0.0
    flips = {("JAX is blazing fast once it works", "H100"): ("compiled_h100", slow, "holds", "false"),
             ("JAX parallelizes across devices automatically", "CPU"): ("spmd_cpu", apart, ONLY, "false"),
             ("flex_attention: gradients become NaN", "H100"): ("biases_h100", broken, "no longer", "holds"),
             ("Real weights say the same in JAX", "CPU"): ("jax_torch_cpu", other_words, "holds", "false"),
             ("LoRA by hand in JAX trains like peft", "CPU"): ("adapters_cpu", gone, "holds", "false"),
             ("A training can be stopped at any step, and goes on with the same losses", "CPU"): ("claims_cpu", lost, ONLY, "holds")}
    before = {key: said(*key) for key in flips}
    other = said("JAX is blazing fast once it works", "CPU")
    for key, (file, change, was, _) in flips.items():
        assert before[key][0].startswith(was), key
        changed(file, change)
    for key, (*_, becomes) in flips.items(): assert becomes in said(*key), key
    assert said("JAX is blazing fast once it works", "CPU") == other


def test_a_new_file_brings_its_verdicts_and_takes_them_off_the_list(monkeypatch):
    cpu = stored("claims_cpu")
    cpu["resumed"]["provenance"]["device"] = "NVIDIA H100 80GB HBM3"
    def without_gpus(name): return cpu if name == "claims_h100" else None if name.endswith("_h100") else stored(name)
    monkeypatch.setattr(claims, "stored", without_gpus)
    monkeypatch.setattr("nbs_lib.jax_torch.stored", without_gpus)
    found = claims.verdicts()
    claim = "A training can be stopped at any step, and goes on with the same losses"
    assert {v.kind for v in found if v.claim == claim} == {"H100", "CPU"} and "claims" not in waiting() and claim not in waiting_claims(found)
    assert waiting()["compiled"] == list(PARTS["compiled"]) and "JAX is blazing fast once it works" in waiting_claims(found)
    assert "H100: not measured yet" in short_table([v for v in found if v.claim in waiting_claims(found) and v.chapter == "10_jax_torch"][:1]).markdown


def test_the_parts_are_those_of_the_commands(capsys):
    from nbs_lib import adapters, bound, jax_torch, transforms
    from nbs_lib.course import measure_adapters, measure_biases, measure_bound, measure_compiled, measure_spmd
    assert set(PARTS) == set(CHAPTERS) and set(PARTS["compiled"]) == set(measure_compiled.PARTS) and set(PARTS["biases"]) == set(measure_biases.BUDGET)
    assert set(PARTS["bound"]) == set(measure_bound.PARTS) and set(PARTS["spmd"]) == set(measure_spmd.PARTS) - {"ranks"}       # gloo: a CPU's
    for main, module in ((jax_torch.main, "jax_torch"), (transforms.main, "transforms"), (measure_adapters.main, "adapters")):
        with pytest.raises(SystemExit): main(["--help"])
        assert set(re.search(r"--part \{([\w,]+)\}", capsys.readouterr().out)[1].split(",")) == set(PARTS[module])


def test_a_part_that_was_cut_is_on_the_list_with_its_rows(monkeypatch):
    file = {"timings": {"rows": [1]}, "compiled": {"rows": [1, 2], "unfinished": True}}
    monkeypatch.setattr(claims, "stored", lambda name: file if name == "transforms_h100" else None)
    assert waiting()["transforms"] == ["bites", "compiled"] and waiting()["adapters"] == list(PARTS["adapters"])
    assert [claims.begun("transforms", p) for p in PARTS["transforms"]] == [0, 0, 2] and claims.begun("adapters", "cost") == 0


def test_committed_files_have_only_parts_that_are_known():
    for module, parts in PARTS.items():
        for kind in ("cpu", "h100"):
            if file := stored(f"{module}_{kind}"): assert measured_parts(file) <= {*parts, "ranks"} | ({"provenance", "agreement"} if module == "bound" else set()), (module, kind)


def test_a_stopped_training_needs_the_optimizer_and_the_place():
    rows = claims.resumed((2,))
    assert len(rows) == 2*(len(FORGOTTEN) + 1)
    for r in rows: assert (r["gap"] == 0) == r["forgotten"].startswith("nothing"), r
    off = [{**r, "gap": r["gap"] or 1e-5} for r in rows]                    # as TF32 on a GPU: rounding, beside what forgetting costs
    assert of_resumed(off)[0] == of_resumed(rows)[0]
    assert "two unstopped runs 1e-05" in of_resumed(off)[1] and "unstopped runs" not in of_resumed([r for r in rows if r["forgotten"] in FORGOTTEN])[1]
    off = [{**r, "gap": r["gap"] or (1e-5 if r["forgotten"] == "nothing" else 0.0)} for r in rows]
    assert of_resumed(off)[0] == "false"                                    # unstopped runs agree, so it is the stop
    off = [{**r, "gap": r["gap"] or 0.1} for r in rows]
    assert of_resumed(off)[0] == "false"                                    # nothing can be told from runs that differ by so much
    assert of_resumed(rows)[0] == "only when the optimizer's state and the place in the data are kept with the weights"
    kept = claims.in_torch(b"", 0, 3)[1]
    assert isinstance(kept, bytes) and claims.in_torch(kept, 3, 5)[0] == claims.in_torch(b"", 0, 5)[0][3:]


@pytest.mark.parametrize("stop", [0, 7, 1.5, True])
def test_a_stop_must_leave_two_steps(stop):
    with pytest.raises(ValueError, match=f"stops has {stop}; accepted are whole numbers from 1 to 6"): claims.resumed((stop,))


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_it_imports_without_torch_and_jax_and_says_what_is_missing_when_asked():
    assert run("import sys, nbs_lib.claims; print({'torch', 'jax', 'matplotlib'} & set(sys.modules))").strip() == "set()"
    told = run("import sys\nsys.modules['jax'] = None\nfrom nbs_lib.claims import verdicts\ntry: verdicts()\nexcept ModuleNotFoundError as e: print(e)")
    assert told.strip() == "this lesson needs jax, which is optional; install it with: pip install 'nbs_lib[jax]'"
