"""Every lab: its checks accept the solution and reject wrong answers, its worksheet holds no solution, and it runs in real kernels."""
from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from nbs_lib.course import notebooks, worksheets
from nbs_lib.course.lab import Choice, Function, Lab, Number
from nbs_lib.course.lab_ranks import close_worlds

LABS = [p.stem for p in sorted(ROOT.glob("nbs/labs/[0-9]*.ipynb"))]
KERNEL = "scaling-measured"
# hidden asserts stand beside the code of the lab's module, in its notebook, and see all its names
BESIDE = "import nbs_lib.labs.{0} as beside\nglobals().update({{name: x for name, x in vars(beside).items() if name not in globals()}})"


def lab_of(slug: str) -> Lab:
    return importlib.import_module(f"nbs_lib.labs.{slug.split('_', 1)[1]}").lab


EXERCISES = [(slug, name) for slug in LABS for name in lab_of(slug).exercises]


@pytest.fixture(scope="module", autouse=True)
def ranks_end():
    """The ranks that checks have started end with this module."""
    yield
    close_worlds()


def run_in_kernel(nb, folder, **options) -> nbformat.NotebookNode:
    """Run `nb` in a real kernel, the one that JupyterLab starts for a worksheet, in `folder`."""
    client = NotebookClient(nb, timeout=240, kernel_name=KERNEL, resources={"metadata": {"path": str(folder)}}, **options)
    client.execute(env={**{k: v for k, v in os.environ.items() if k != "IN_TEST"}, "OMP_NUM_THREADS": "1"})
    return nb


def said(nb) -> str:
    """Everything that the cells printed or displayed, as text."""
    out = []
    for cell in nb.cells:
        for o in cell.get("outputs", []):
            out.append(o.get("text") or o.get("data", {}).get("text/plain") or "\n".join(o.get("traceback", [])))
    return "\n".join(out)


def test_there_are_labs():
    assert LABS and EXERCISES


@pytest.mark.parametrize("slug", LABS)
def test_a_lab_has_four_to_six_exercises_and_a_header(slug):
    assert 4 <= len(lab_of(slug).exercises) <= 6
    text = "\n".join(notebooks.text_of(c) for c in notebooks.read(ROOT / "nbs" / "labs" / f"{slug}.ipynb")["cells"][:3])
    for wanted in ("What you will be able to do", "Time", "Hardware", "Without a GPU"):
        assert wanted in text


@pytest.mark.parametrize("slug,name", EXERCISES)
def test_check_accepts_the_solution_and_rejects_wrong_answers(slug, name):
    exercise = lab_of(slug).exercises[name]
    assert len(set(exercise.hints)) == 3
    check = exercise.explain
    if check is None:
        assert len(exercise.model_answer.split()) > 20
        return
    accepted = check.judge(check.right)
    assert accepted.ok and accepted.message
    wrong = list(check.wrong)
    assert len(wrong) >= (2 if isinstance(check, Choice) else 3)
    verdicts = [check.judge(w) for w in [*wrong, "zz" if isinstance(check, Choice) else None]]
    assert not any(v.ok for v in verdicts)
    assert len({v.message for v in verdicts}) == len(verdicts), "every wrong answer has a reason of its own"


@pytest.mark.parametrize("slug,name", EXERCISES)
def test_numbers_off_by_a_common_factor_are_told_so(slug, name):
    check = lab_of(slug).exercises[name].explain
    if not isinstance(check, Number):
        pytest.skip("no number")
    for factor, word in ((1e9, "GB"), (2**20, "MiB"), (1e-9, "GB")):
        verdict = check.judge(check.right * factor)
        assert not verdict.ok and word in verdict.message
    for answer in (-check.right, 0, float("nan"), "ten", True, [1, 2]):
        assert not check.judge(answer).ok


@pytest.mark.parametrize("slug", LABS)
def test_worksheet_holds_no_solution_and_still_parses(slug):
    sheet = nbformat.read(worksheets.shipped()[slug], as_version=4)
    solutions = json.loads((worksheets.SHIPPED / f"{slug}.solutions.json").read_text())
    source = "\n".join(c.source for c in sheet.cells)
    assert sheet.cells[0].cell_type == "markdown" and sheet.cells[0].source.startswith(f"# Lab {int(slug[:2])}")
    assert "SOLUTION" not in source and "#| export" not in source and "assert " not in source
    for cell in sheet.cells:
        if cell.cell_type == "code":
            compile(cell.source, slug, "exec")
            assert not cell.outputs
    kept = {line.strip() for line in source.splitlines()}
    for code in solutions.values():
        lines = [line.strip() for line in code.splitlines() if re.search(r"[^=]=[^=]|return", line)]
        assert [line for line in lines if line not in kept], "each solution has lines that the worksheet lacks"
    assert set(solutions) <= set(lab_of(slug).exercises)


@pytest.mark.parametrize("slug", LABS)
def test_lab_runs_start_to_end_in_a_real_kernel(slug, tmp_path):
    """With its solutions, as a learner who gets everything right, in about a minute on two cores; and the asserts hidden at its end hold."""
    nb = nbformat.read(ROOT / "nbs" / "labs" / f"{slug}.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and notebooks.directives(c).keys() & {"export", "default_exp"})]
    hidden = [c for c in nb.cells if c.cell_type == "code" and "hide" in notebooks.directives(c)]
    shown = [c for c in nb.cells if c not in hidden]  # these run with what the worksheet itself imports
    nb.cells = [*shown, nbformat.v4.new_code_cell(BESIDE.format(slug.split("_", 1)[1])), *hidden]
    began = time.monotonic()
    text = said(run_in_kernel(nb, tmp_path))
    seconds = time.monotonic() - began
    lab = lab_of(slug)
    assert f"{len(lab.exercises)} of {len(lab.exercises)} exercises explained" in text
    record = json.loads((tmp_path / ".nbs" / f"{slug}.json").read_text())
    assert all({"predicted", "measured"} <= record[name].keys() and record[name]["explained"] is True for name in lab.exercises)
    print(f"{slug}: {seconds:.0f} s in a real kernel")


@pytest.mark.parametrize("slug", LABS)
def test_a_learner_who_has_answered_nothing_is_told_what_to_do(slug, tmp_path):
    """The worksheet as it is: every cell runs; none shows a Python traceback; measuring is refused before predicting."""
    copy = worksheets.own_copy(slug, tmp_path).path
    nb = run_in_kernel(nbformat.read(copy, as_version=4), tmp_path, allow_errors=True)
    errors = [(c.source, o) for c in nb.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert errors
    for source, error in errors:
        assert error.ename == "Stop", (source, error.ename, error.evalue)
        assert "Traceback" not in "".join(error.traceback)
    text = said(nb)
    assert "predict first" in text and "in place of the three dots" in text
    record = tmp_path / ".nbs" / f"{slug}.json"
    kept = json.loads(record.read_text()) if record.exists() else {}
    assert not any("predicted" in mine or "measured" in mine or mine.get("explained") for mine in kept.values())


@pytest.mark.parametrize("slug", LABS)
def test_hints_come_one_by_one_and_the_solution_after_them(slug, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NBS_RECORD", str(tmp_path))
    monkeypatch.delenv("IN_TEST", raising=False)
    lab = lab_of(slug)
    name = next(n for n, e in lab.exercises.items() if e.explain is not None)
    with pytest.raises(Exception, match="3 hints are left"):
        lab.solution(name)
    for count in (1, 2, 3):
        lab.hint(name)
        shown = capsys.readouterr().out
        assert [f"hint {i} of 3" in shown for i in (1, 2, 3)] == [i <= count for i in (1, 2, 3)]
    lab.solution(name)
    assert "a solution" in capsys.readouterr().out


def test_a_cell_that_fails_in_a_kernel_would_be_noticed(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1/0")])
    with pytest.raises(CellExecutionError):
        run_in_kernel(nb, tmp_path)


# --- a learner's work is never written over -----------------------------------------------------------------------------------


def test_own_copy_is_never_written_over_and_updates_go_beside_it(tmp_path, monkeypatch):
    slug, shipped = LABS[0], tmp_path / "shipped"
    shutil.copytree(worksheets.SHIPPED, shipped)
    monkeypatch.setattr(worksheets, "SHIPPED", shipped)
    work = tmp_path / "work"
    first = worksheets.own_copy(slug, work)
    assert first.written and not first.newer
    first.path.write_text("my own work")
    again = worksheets.own_copy(slug, work, update=True)
    assert again.path == first.path and not again.written
    sheet = json.loads((shipped / f"{slug}.ipynb").read_text())
    sheet["cells"].append({"cell_type": "markdown", "id": "x", "metadata": {}, "source": "new"})
    (shipped / f"{slug}.ipynb").write_text(json.dumps(sheet))
    told = worksheets.own_copy(slug, work)
    assert told.newer and not told.written
    beside = worksheets.own_copy(slug, work, update=True)
    assert beside.written and beside.path != first.path and "new" in beside.path.read_text()
    assert first.path.read_text() == "my own work"
    assert not worksheets.own_copy(slug, work, update=True).written


def test_a_broken_record_is_kept_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_RECORD", str(tmp_path))
    monkeypatch.delenv("IN_TEST", raising=False)
    lab = lab_of(LABS[0])
    (tmp_path / f"{LABS[0]}.json").write_text("{ half a rec")
    lab.predict("1", 5)
    assert json.loads((tmp_path / f"{LABS[0]}.json").read_text())["1"]["predicted"] == 5
    assert (tmp_path / f"{LABS[0]}.broken.json").read_text() == "{ half a rec"


def test_a_first_prediction_stands_after_measuring(tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_RECORD", str(tmp_path))
    monkeypatch.delenv("IN_TEST", raising=False)
    lab = lab_of(LABS[0])
    lab.predict("1", 5)
    lab.predict("1", 6)  # free to change one's mind before the measurement
    lab.measure("1", lambda: 7)
    assert json.loads((tmp_path / f"{LABS[0]}.json").read_text())["1"]["measured"] == 7
    lab.predict("1", 7)
    assert lab.predicted("1") == 6


def test_functions_that_fail_are_explained():
    check = Function(lambda x: 2 * x, cases=[(3,), (5,)], slips=[(lambda x: x, "forgot the 2")], why="yes")
    assert check.judge(lambda x: x + x).ok
    assert check.judge(lambda x: x).message == "forgot the 2"
    assert "ZeroDivisionError" in check.judge(lambda x: 1 / 0).message
    assert "no function" in check.judge(6).message
    assert "`...`" in check.judge(lambda x: ...).message
    assert not check.judge(lambda x: 6).ok, "right on one case only"


@pytest.mark.browser
def test_worksheet_opens_in_a_real_jupyterlab(browser, tmp_path):
    from nbs_lib.course.serve import jupyterlab

    copy = worksheets.own_copy(LABS[0], tmp_path).path
    server = jupyterlab(tmp_path, 18888)
    try:
        assert server.wait(90), server.log.read_text()[-2000:]
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{server.tree}{copy.name}?token={server.token}")
        page.locator(".jp-Notebook h2", has_text="What you will be able to do").wait_for(timeout=90_000)
        page.locator(".jp-Toolbar-kernelName", has_text="Scaling, Measured").wait_for(timeout=30_000)  # it finds the course's kernel
        page.close()
    finally:
        server.stop()
    assert server.process.poll() is not None


def test_kernel_is_registered_in_the_environment():
    names = subprocess.run([sys.executable, "-m", "jupyter", "kernelspec", "list", "--json"], capture_output=True, text=True).stdout
    assert KERNEL in json.loads(names)["kernelspecs"], "run `make environment`, which registers it"
