"""What readers and learners see of a notebook: one filter for every renderer, and the worksheet without its solutions.

Quarto runs this file as an `ipynb-filter` (notebook JSON on stdin, notebook JSON on stdout); the Pandoc path calls `for_site`.
Standard library only, since Quarto may run it with a Python that has nothing else.

The source notebooks carry nbdev's directives (`#| export`, `#| hide`, …) and, in labs, otter-grader's solution marks:
`name = value  # SOLUTION`, and lines between `# BEGIN SOLUTION` and `# END SOLUTION`.
"""
from __future__ import annotations

import copy
import json
import re
import sys

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
#: Options that the renderers obey, and that therefore stay in the cell; every other directive is obeyed or dropped here.
KEPT = {"code-fold", "echo", "output"}
CALLOUT = re.compile(r"^(:{3,})\s*\{\s*\.callout-(note|tip|warning|important|caution)(?:\s+title=\"([^\"]*)\")?\s*\}\s*$")
TABSET = re.compile(r"^(:{3,})\s*\{\s*\.panel-tabset\s*\}\s*$")
FENCE = re.compile(r"^(`{3,})")
LAB = re.compile(r"^lab:\s*[\"']?([\w-]+)[\"']?\s*$", re.M)
BEGIN, END, LINE = "# BEGIN SOLUTION", "# END SOLUTION", "# SOLUTION"
TODO = "...  # your code here"
KERNEL = {"display_name": "Scaling, Measured", "language": "python", "name": "scaling-measured"}


class NotebookError(ValueError):
    """A notebook that cannot be used; the message says which and why."""


def text_of(cell: dict) -> str:
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def directives(cell: dict) -> dict[str, str]:
    """The `#| name`, `#| name value` and `#| name: value` lines at the top of a code cell."""
    found = {}
    if cell["cell_type"] == "code":
        for line in text_of(cell).splitlines():
            if not (match := DIRECTIVE.match(line)):
                break
            found[match[1]] = (match[2] or "").strip("\"'")
    return found


def body(cell: dict) -> str:
    """A code cell's source below its directives."""
    lines = text_of(cell).splitlines()
    while lines and (DIRECTIVE.match(lines[0]) or not lines[0].strip()):
        lines.pop(0)
    return "\n".join(lines)


def read(path) -> dict:
    """The notebook at `path` as JSON. Raises NotebookError, naming the file, where it is missing or broken."""
    try:
        with open(path, encoding="utf-8") as f:
            nb = json.load(f)
    except FileNotFoundError:
        raise NotebookError(f"{path}: there is no such notebook") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise NotebookError(f"{path}: not a notebook, its JSON is broken ({e})") from None
    if not isinstance(nb, dict) or not isinstance(nb.get("cells"), list) or nb.get("nbformat") != 4:
        raise NotebookError(f"{path}: not a notebook in format 4 (it has no list of cells)")
    for i, cell in enumerate(nb["cells"]):
        if not isinstance(cell, dict) or cell.get("cell_type") not in ("code", "markdown", "raw"):
            raise NotebookError(f"{path}: cell {i + 1} is neither code nor markdown nor raw")
    return nb


def front_matter_text(nb: dict) -> str:
    """The YAML between the `---` lines of the first cell, or an empty text."""
    first = nb["cells"][0] if nb["cells"] else None
    if first and first["cell_type"] == "raw" and (m := re.match(r"\s*---\n(.*?)\n---\s*$", text_of(first), re.S)):
        return m[1]
    return ""


def titled(nb: dict) -> dict:
    """The notebook with its front matter as a heading, for those who open it in Jupyter."""
    front = front_matter_text(nb)
    title, description = (m[1].strip().strip("\"'") if (m := re.search(rf"^{key}:\s*(.+)$", front, re.M)) else "" for key in ("title", "description"))
    heading = {**nb["cells"][0], "cell_type": "markdown", "source": f"# {title}\n\n{description}"}
    return {**nb, "cells": [heading, *nb["cells"][1:]]} if title else nb


def lab_of(nb: dict) -> str | None:
    """The slug of the lab that this notebook is, from `lab:` in its front matter."""
    match = LAB.search(front_matter_text(nb))
    return match[1] if match else None


def for_site(nb: dict) -> dict:
    """The notebook as readers see it: directives obeyed, warnings dropped, pictures in the page; a lab as its worksheet."""
    slug = lab_of(nb)
    nb = worksheet(nb)[0] if slug else copy.deepcopy(nb)
    if slug:
        nb["cells"].insert(1, _markdown_cell(_lab_actions(slug)))
    cells = []
    for cell in nb["cells"]:
        marks = directives(cell)
        if "hide" in marks:
            continue
        if cell["cell_type"] == "code":
            cell["outputs"] = [] if "hide_output" in marks else [_shown(o) for o in cell["outputs"] if o.get("name") != "stderr"]
            if "code-line-numbers" in marks:
                cells.append(_markdown_cell(f'``` {{.python .cell-code data-steps="{marks["code-line-numbers"]}"}}\n{body(cell)}\n```'))
                marks["echo"] = "false"
            _strip_directives(cell, marks)
            if not cell["outputs"] and (marks.get("echo") == "false" or not body(cell).strip()):
                continue
        elif cell["cell_type"] == "markdown":
            cell["source"] = plain_divs(text_of(cell))
        cells.append(cell)
    for cell in cells:
        cell["source"] = text_of(cell).splitlines(keepends=True)
    nb["cells"] = cells
    return nb


def plain_divs(text: str) -> str:
    """Callouts and tabsets as divs that every renderer passes on alike; the theme and its script make the rest."""
    out, code, tabset, open_tab = [], None, None, False
    for line in text.splitlines():
        if fence := FENCE.match(line):
            code = fence[1] if code is None else None if line.strip() == code else code
        if code is not None:
            out.append(line.replace("code-line-numbers=", "data-steps=") if fence else line)
        elif callout := CALLOUT.match(line):
            colons, kind, title = callout.groups()
            out += [f"{colons} {{.box .box-{kind}}}", f"[{title or kind.title()}]{{.box-title}}", ""]
        elif match := TABSET.match(line):
            tabset, open_tab = match[1], False
            out.append(f"{tabset} {{.tabs}}")
        elif tabset and line.startswith("## "):
            out += ([tabset, ""] if open_tab else []) + [f"{tabset} {{.tab}}", f"[{line[3:].strip()}]{{.tab-title}}", ""]
            open_tab = True
        elif tabset and line.strip() == tabset:
            out += ([tabset] if open_tab else []) + [tabset]
            tabset = None
        else:
            out.append(line)
    return "\n".join(out)


def worksheet(nb: dict) -> tuple[dict, dict[str, str]]:
    """A lab's notebook without solutions, tests and outputs, and the solutions: code by exercise ("1", "2", …)."""
    nb, solutions, cells = copy.deepcopy(nb), {}, []
    for cell in nb["cells"]:
        marks = directives(cell)
        if marks.keys() & {"hide", "default_exp", "export", "exporti", "exports"}:
            continue
        if cell["cell_type"] == "code":
            source = body(cell)
            stripped = strip_solution(source)
            if stripped != source:
                exercise = marks.get("exercise")
                if not exercise:
                    raise NotebookError(f"a cell with a solution has no `#| exercise: N`: {source[:80]!r}")
                shown = "\n".join(l for l in source.splitlines() if l.strip() not in (BEGIN, END))
                solutions[exercise] = (solutions[exercise] + "\n\n" if exercise in solutions else "") + shown.replace("  " + LINE, "")
            kept = [l for l in text_of(cell).splitlines() if (m := DIRECTIVE.match(l)) and m[1] in KEPT]
            cell.update(source="\n".join([*kept, stripped]), outputs=[], execution_count=None)
            if not stripped.strip():
                continue
        cells.append(cell)
    nb["cells"] = cells
    nb["metadata"] = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return nb, solutions


def strip_solution(source: str) -> str:
    """`source` with each solution replaced by `...`, at the same indentation."""
    out, inside = [], False
    for line in source.splitlines():
        mark = line.strip()
        if mark == BEGIN:
            inside = True
            out.append(line[: len(line) - len(line.lstrip())] + TODO)
        elif mark == END:
            inside = False
        elif not inside:
            if mark.endswith(LINE):
                line = re.sub(r"=(?!=).*$", "= ...", line, count=1) if "=" in line else line[: len(line) - len(line.lstrip())] + TODO
            out.append(line)
    if inside:
        raise NotebookError(f"a `{BEGIN}` without its `{END}`: {source[:80]!r}")
    return "\n".join(out)


def _markdown_cell(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text, "id": "lab-actions"}


def _lab_actions(slug: str) -> str:
    return (
        '<p class="lab-actions">'
        f'<a class="button" href="http://localhost:8888/lab/tree/{slug}.ipynb">Open in the local JupyterLab</a> '
        f'<a class="button quiet" href="../../nbs_lib/labs/{slug}.ipynb" download>Download the worksheet</a> '
        f"<span>or, in a terminal: <code>nbs lab {int(slug.split('_')[0])}</code></span></p>"
    )


def _strip_directives(cell: dict, marks: dict[str, str]) -> None:
    kept = [f"#| {name}: {value}" for name, value in marks.items() if name in KEPT]
    if "hide_input" in marks and "echo" not in marks:
        kept.append("#| echo: false")
    cell["source"] = "\n".join([*kept, body(cell)])


def _shown(output: dict) -> dict:
    """An output as Markdown with raw HTML: SVG stands in the page, where the theme's colours reach it.

    (Quarto loads two scripts from another host for every page with an output of type text/html, and shows SVG as a mere image.)
    """
    data = {mime: "".join(text) if isinstance(text, list) else text for mime, text in output.get("data", {}).items()}
    if "image/svg+xml" in data:
        picture = data["image/svg+xml"]
        caption = re.search(r'data-caption="([^"]*)"', picture[:2000])
        page = f'<figure class="plot">{picture}' + (f"<figcaption>{caption[1]}</figcaption>" if caption else "") + "</figure>"
    elif "text/html" in data:
        page = data["text/html"]
    else:
        return output
    return {**output, "data": {"text/markdown": f"````{{=html}}\n{page}\n````\n", "text/plain": data.get("text/plain", "")}}


def main() -> None:
    json.dump(for_site(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
