"""Building the site: the filter, the two renderers' common ground, failures that leave the old site standing."""
from __future__ import annotations

import copy
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from nbs_lib.course import notebooks, render
from nbs_lib.course.figures import subplots, svg, table
from nbs_lib.course.notebooks import NotebookError


@pytest.fixture
def checkout(tmp_path):
    """A small checkout of one's own: front page, one chapter, one lab, one deck."""
    for part in ("_quarto.yml", "nbs/_metadata.yml", "nbs/labs/_metadata.yml", "slides/_metadata.yml", "slides/theme", "nbs/index.ipynb", "nbs/01_hardware.ipynb",
                 "nbs/labs/03_memory.ipynb", "slides/03_memory.ipynb"):
        target = tmp_path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, target)
    return tmp_path


def code(source, *outputs):
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": list(outputs), "execution_count": None, "id": "x"}


def notebook(*cells):
    return {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def sources(nb):
    return [notebooks.text_of(c) for c in nb["cells"]]


def test_directives_are_obeyed_and_gone():
    out = {"output_type": "stream", "name": "stdout", "text": "hi"}
    warn = {"output_type": "stream", "name": "stderr", "text": "warning"}
    nb = notebooks.for_site(notebook(
        code("#| default_exp x"), code("#| hide\nsecret = 1", out), code("#| export\ndef f(): pass"), code("#| hide_input\nshow()", out),
        code("#|hide_output\nquiet()", out), code("#| eval: false\nnever()"), code("loud()", warn, out)))
    assert sources(nb) == ["def f(): pass", "#| echo: false\nshow()", "quiet()", "never()", "loud()"]
    assert [len(c["outputs"]) for c in nb["cells"]] == [0, 1, 0, 0, 1]


def test_the_filter_changes_nothing_of_the_notebook_it_is_given():
    for path in sorted(ROOT.glob("*/*.ipynb")) + sorted(ROOT.glob("nbs/labs/*.ipynb")):
        nb = notebooks.read(path)
        before = copy.deepcopy(nb)
        notebooks.for_site(nb)
        assert nb == before


def test_the_filter_is_a_program_for_quarto():
    """JSON on stdin, JSON on stdout, with nothing but the standard library, and sources as lists of lines."""
    path = ROOT / "slides" / "03_memory.ipynb"
    run = subprocess.run([sys.executable, "-I", "-S", ROOT / "nbs_lib" / "course" / "notebooks.py"], stdin=open(path), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == notebooks.for_site(notebooks.read(path))
    assert all(isinstance(c["source"], list) for c in json.loads(run.stdout)["cells"])


def test_callouts_and_tabs_become_divs_and_code_is_left_alone():
    text = '::: {.callout-warning title="Mind"}\nx\n:::\n\n::: {.panel-tabset}\n## A\n\na\n\n## B\n\nb\n:::\n\n```\n::: {.callout-note}\n## not a tab\n```'
    out = notebooks.plain_divs(text)
    assert "::: {.box .box-warning}\n[Mind]{.box-title}" in out
    assert out.count("{.tab}") == 2 and "[B]{.tab-title}" in out
    assert "```\n::: {.callout-note}\n## not a tab\n```" in out
    import pypandoc

    page = pypandoc.convert_text(out, "html", format="markdown")
    assert page.count('class="tab"') == 2 and page.count('class="tabs"') == 1 and page.count("<h2") == 0


def test_solutions_are_stripped_at_their_indentation():
    source = "def f(x):\n    # BEGIN SOLUTION\n    y = x\n    return 2 * y\n    # END SOLUTION\n\nn = 16 * P  # SOLUTION\nlab.predict(1, n)"
    assert notebooks.strip_solution(source) == "def f(x):\n    ...  # your code here\n\nn = ...\nlab.predict(1, n)"
    with pytest.raises(NotebookError, match="END SOLUTION"):
        notebooks.strip_solution("# BEGIN SOLUTION\nx = 1")
    with pytest.raises(NotebookError, match="exercise"):
        notebooks.worksheet(notebook(code("x = 1  # SOLUTION")))


def test_only_what_changed_is_rendered_anew(checkout):
    assert render.build(checkout, quarto=False).fresh == 4
    assert render.build(checkout, quarto=False).fresh == 0
    path = checkout / "nbs" / "index.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"].append({"cell_type": "markdown", "id": "zz", "metadata": {}, "source": "a new line"})
    path.write_text(json.dumps(nb))
    assert render.build(checkout, quarto=False).fresh == 1
    assert "a new line" in (checkout / "_site" / "nbs" / "index.html").read_text()
    (checkout / "slides" / "theme" / "page.css").write_text("body { color: red }")
    assert render.build(checkout, quarto=False).fresh == 0
    assert "red" in (checkout / "_site" / "slides" / "theme" / "page.css").read_text()
    theme = checkout / "slides" / "theme" / "page.html"
    theme.write_text(theme.read_text().replace("<footer", "<!-- x --><footer"))
    assert render.build(checkout, quarto=False).fresh == 4


def test_a_site_that_is_up_to_date_is_not_touched(checkout):
    """So that whoever is reading it while somebody builds again finds every file in its place."""
    render.build(checkout, quarto=False)
    before = (checkout / "_site").stat()
    render.build(checkout, quarto=False)
    after = (checkout / "_site").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    (checkout / "_site" / "nbs" / "index.html").unlink()
    render.build(checkout, quarto=False)
    assert (checkout / "_site" / "nbs" / "index.html").is_file()


@pytest.mark.parametrize("harm,word", [
    (lambda p: p.write_text("{ broken"), "JSON"), (lambda p: p.write_text("[]"), "list of cells"),
    (lambda p: p.write_text(json.dumps(notebook(code("1/0", {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "no", "traceback": []})))), "ZeroDivisionError"),
    (lambda p: p.write_text(json.dumps(notebook({"cell_type": "raw", "id": "a", "metadata": {}, "source": "---\ntitle: [\n---"}))), "YAML"),
], ids=["not json", "no cells", "stored error", "front matter"])
def test_a_broken_notebook_is_named_and_the_old_site_stays(checkout, harm, word):
    render.build(checkout, quarto=False)
    before = {p.relative_to(checkout): p.read_bytes() for p in (checkout / "_site").rglob("*") if p.is_file()}
    harm(checkout / "nbs" / "01_hardware.ipynb")
    with pytest.raises(NotebookError, match=word) as caught:
        render.build(checkout, quarto=False)
    assert "01_hardware.ipynb" in str(caught.value)
    assert {p.relative_to(checkout): p.read_bytes() for p in (checkout / "_site").rglob("*") if p.is_file()} == before
    assert [p.name for p in checkout.iterdir() if p.name.startswith("_site")] == ["_site"], "nothing half-written is left"


def test_a_missing_front_page_is_named(checkout):
    (checkout / "nbs" / "index.ipynb").unlink()
    with pytest.raises(NotebookError, match="index.ipynb"):
        render.build(checkout, quarto=False)


def test_the_command_exits_with_2_and_says_that_the_site_was_left(checkout, monkeypatch, capsys):
    from nbs_lib.course.cli import main

    monkeypatch.chdir(checkout)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["build"]) == 0
    (checkout / "nbs" / "01_hardware.ipynb").write_text("{ broken")
    assert main(["build"]) == 2
    assert "01_hardware.ipynb" in (said := capsys.readouterr().err) and "left as it was" in said and "Traceback" not in said


def test_asking_for_quarto_where_it_is_not_says_so(checkout, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(render.BuildError, match="quarto"):
        render.build(checkout, quarto=True)


def test_a_quarto_on_path_is_used_and_its_failure_reported(checkout, tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "quarto"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'quarto: something is wrong' >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    with pytest.raises(render.BuildError, match="something is wrong"):
        render.build(checkout)
    assert not (checkout / "_site").exists()


def test_figures_are_the_same_bytes_every_time_and_say_what_they_show():
    def draw():
        fig, ax = subplots()
        ax.plot([1, 2, 3], [2, 3, 1], label="line")
        ax.legend()
        return svg(fig, "a line that rises and falls", caption="It falls.").svg

    first = draw()
    assert first == draw()
    assert 'aria-label="a line that rises and falls"' in first and "<metadata>" not in first and "DejaVu" not in first
    with pytest.raises(ValueError, match="alt"):
        svg(subplots()[0], "")


def test_two_figures_on_a_page_share_no_id():
    import re

    def ids(height):
        fig, ax = subplots()
        ax.plot([0, height])
        return set(re.findall(r'id="([^"]+)"', svg(fig, "a rising straight line").svg))

    assert not ids(1) & ids(2)


def test_tables_refuse_rows_that_do_not_match():
    assert "| a | 1 |" in table([["a", 1]], ["x", "y"]).markdown
    with pytest.raises(ValueError, match="2 headers"):
        table([["a"]], ["x", "y"])
    with pytest.raises(ValueError, match="align"):
        table([["a", 1]], ["x", "y"], align="l")


def test_worksheet_json_round_trips():
    nb, solutions = notebooks.worksheet(notebooks.read(ROOT / "nbs" / "labs" / "03_memory.ipynb"))
    import nbformat

    nbformat.validate(nbformat.read(io.StringIO(json.dumps(nb)), as_version=4))
    assert set(solutions) == {"1", "2", "3", "4", "5", "6"}
