"""The site from stored outputs: Quarto where it is on PATH, else Pandoc and reveal.js from Python packages; nothing is executed.

Both read `_quarto.yml`, pass the notebooks through `notebooks.for_site` and write the same paths under `_site/`. A build goes into
a folder of its own and takes the old site's place only when it is whole, so a build that fails leaves the old site as it was.
"""
from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import notebooks
from .notebooks import NotebookError

HERE = Path(__file__).parent
MARKS = ".marks.json"
#: Links between notebooks work in JupyterLab and become links between pages; the worksheets' downloads are HTML and stay.
PAGE_LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]+)\.ipynb(#[^)]*)?\)")


class BuildError(RuntimeError):
    """A site that could not be built; the message names the file and the remedy."""


@dataclass
class Built:
    """What a build did: pages by path, how many of them anew, by which renderer, in how many seconds."""

    pages: list[str]
    fresh: int
    renderer: str
    seconds: float

    def __str__(self):
        return f"{len(self.pages)} pages ({self.fresh} anew) with {self.renderer} in {self.seconds:.1f} s"


def repository(start: Path | None = None) -> Path | None:
    """The checkout that holds this installation or `start` (default: the current folder), or None."""
    for folder in [start or Path.cwd(), *(start or Path.cwd()).parents, HERE.parent.parent]:
        if (folder / "_quarto.yml").is_file() and (folder / "nbs").is_dir():
            return folder
    return None


def configuration(root: Path) -> dict:
    import yaml

    try:
        return yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        raise BuildError(f"{root / '_quarto.yml'}: cannot be read ({e})") from None


def sources(root: Path, config: dict) -> list[Path]:
    """The notebooks that make the site, in the order of `_quarto.yml`, relative to `root`.

    Raises NotebookError when one that `_quarto.yml` names is not there.
    """
    for name in config["project"]["render"]:
        if not set("*?[") & set(name) and not (root / name).is_file():
            raise NotebookError(f"{root / name}: _quarto.yml names this notebook, and it is not there")
    return [path.relative_to(root) for pattern in config["project"]["render"] for path in sorted(root.glob(pattern))]


def build(root: Path, out: Path | None = None, *, quarto: bool | None = None) -> Built:
    """Render the site of the checkout `root` into `out` (default `_site`). `quarto`: True or False to insist on a renderer.

    Raises BuildError or NotebookError, and then leaves an earlier site untouched.
    """
    began, out = time.perf_counter(), Path(out or root / "_site").absolute()
    config = configuration(root)
    pages = sources(root, config)
    for page in pages:
        notebooks.read(root / page)
    found = shutil.which("quarto")
    if quarto and not found:
        raise BuildError("there is no `quarto` on PATH; without it the site is built with Pandoc (leave --quarto out)")
    use_quarto = bool(found) if quarto is None else quarto
    targets = [str(p.with_suffix(".html")) for p in pages]
    marks = {} if use_quarto else _marks(root, config, pages)
    if marks and _read_json(out / MARKS) == marks and all((out / t).is_file() for t in targets):
        return Built(targets, 0, "Pandoc", time.perf_counter() - began)
    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    new.chmod(0o755)
    try:
        fresh = _with_quarto(root, new, pages) if use_quarto else _with_pandoc(root, new, config, marks, out)
        _swap(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return Built(targets, fresh, "Quarto" if use_quarto else "Pandoc", time.perf_counter() - began)


def _swap(new: Path, out: Path) -> None:
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _with_quarto(root: Path, new: Path, pages: list[Path]) -> int:
    run = subprocess.run(["quarto", "render", str(root), "--output-dir", str(new)], capture_output=True, text=True)
    if run.returncode:
        raise BuildError(f"quarto render failed:\n{run.stderr.strip()[-2000:]}")
    return len(pages)


def _marks(root: Path, config: dict, pages: list[Path]) -> dict[str, str]:
    """What a site is made of, as digests: of each page with all that goes into it, and of the files beside the pages."""
    common = hashlib.sha256((root / "_quarto.yml").read_bytes())
    for part in [HERE / "render.py", HERE / "notebooks.py", *sorted(root.glob("slides/theme/*.html")), *sorted(root.glob("nbs/**/_metadata.yml")), *sorted(root.glob("slides/_metadata.yml"))]:
        common.update(part.read_bytes())
    marks = {str(page): hashlib.sha256(common.digest() + (root / page).read_bytes()).hexdigest() for page in pages}
    beside = hashlib.sha256()
    for path in _resources(root, config):
        beside.update(str(path).encode() + path.read_bytes())
    return {**marks, "beside": beside.hexdigest()}


def _resources(root: Path, config: dict) -> list[Path]:
    return [path for pattern in config["project"].get("resources", []) for path in sorted(root.glob(pattern.lstrip("/")))]


def _with_pandoc(root: Path, new: Path, config: dict, marks: dict[str, str], old: Path) -> int:
    """Every page whose mark changed is rendered; the others are taken over from the old site."""
    fresh, before, pages = 0, _read_json(old / MARKS), [Path(name) for name in marks if name != "beside"]
    for page in pages:
        target = page.with_suffix(".html")
        (new / target).parent.mkdir(parents=True, exist_ok=True)
        if before.get(str(page)) == marks[str(page)] and (old / target).is_file():
            shutil.copy2(old / target, new / target)
        else:
            (new / target).write_text(render_page(root, page, config), encoding="utf-8")
            fresh += 1
    (new / MARKS).write_text(json.dumps(marks))
    _copy_assets(root, new, config)
    home, title = pages[0].with_suffix(".html"), config["website"]["title"]
    (new / "index.html").write_text(
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><meta http-equiv="refresh" content="0; url={home}"></head>'
        f'<body><main><h1>{title}</h1><a href="{home}">To the front page</a></main></body></html>', encoding="utf-8")
    return fresh


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _copy_assets(root: Path, new: Path, config: dict) -> None:
    import sphinx_revealjs

    reveal = Path(sphinx_revealjs.__file__).parent / "_static" / "revealjs"
    libs = new / "site_libs"
    for part in ("dist/reset.css", "dist/reveal.css", "dist/reveal.js", "plugin/notes/notes.js", "plugin/notes/speaker-view.html"):
        (libs / "revealjs" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(reveal / part, libs / "revealjs" / part)
    for path in _resources(root, config):
        (new / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, new / path.relative_to(root))


def metadata(root: Path, page: Path, nb: dict, config: dict) -> dict:
    """A page's metadata as Quarto merges it: the project's, its folders', its own front matter."""
    import yaml

    merged = {key: config[key] for key in ("course", "lang") if key in config}
    for folder in [root, *(root / part for part in reversed(page.parents))]:
        if (folder / "_metadata.yml").is_file():
            merged.update(yaml.safe_load((folder / "_metadata.yml").read_text(encoding="utf-8")) or {})
    try:
        return {**merged, **(yaml.safe_load(notebooks.front_matter_text(nb)) or {})}
    except yaml.YAMLError as e:
        raise NotebookError(f"{page}: its front matter is not YAML ({e})") from None


def render_page(root: Path, page: Path, config: dict) -> str:
    """One notebook as a page or, where its metadata say `format: revealjs`, as a deck."""
    import pypandoc

    nb = notebooks.read(root / page)
    meta = metadata(root, page, nb, config)
    deck = "revealjs" in meta.get("format", {})
    meta.pop("format", None)
    template = root / "slides" / "theme" / ("deck.html" if deck else "page.html")
    with tempfile.TemporaryDirectory() as folder:
        values = Path(folder) / "values.json"
        values.write_text(json.dumps(meta))
        args = ["--standalone", "--mathml", f"--template={template}", f"--metadata-file={values}", "--wrap=none"]
        args += ["--slide-level=2", f"--variable=revealjs-url={meta.get('root', '')}site_libs/revealjs"] if deck else ["--toc", "--toc-depth=3", "--section-divs"]
        try:
            return pypandoc.convert_text(to_markdown(notebooks.for_site(nb), str(page)), "revealjs" if deck else "html5",
                                         format="markdown-implicit_figures", extra_args=args)
        except RuntimeError as e:
            raise BuildError(f"{page}: pandoc refused it ({e})") from None


def to_markdown(nb: dict, name: str) -> str:
    """A filtered notebook as Pandoc's Markdown, its cells in the divs that Quarto makes of them."""
    parts = []
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(PAGE_LINK.sub(r"](\1.html\2)", notebooks.text_of(cell)))
        elif cell["cell_type"] == "code":
            parts.append(_cell(cell, name))
    return "\n\n".join(parts) + "\n"


def _cell(cell: dict, name: str) -> str:
    marks, parts = notebooks.directives(cell), [":::::::: {.cell}"]
    if marks.get("echo") != "false":
        parts.append(_fence(notebooks.body(cell), "{.python .cell-code}"))
    if marks.get("output") != "false":
        parts += [_output(o, name) for o in cell["outputs"]]
    return "\n\n".join([*parts, "::::::::"])


def _output(output: dict, name: str) -> str:
    kind = output["output_type"]
    if kind == "error":
        raise NotebookError(f"{name}: a cell's stored output is an error ({output.get('ename')}: {output.get('evalue')})")
    if kind == "stream":
        return _div("cell-output-stdout", _fence("".join(output["text"]).rstrip("\n"), "{.text}"))
    data = {mime: "".join(text) if isinstance(text, list) else text for mime, text in output["data"].items()}
    if "text/markdown" in data:
        return _div("cell-output-display", PAGE_LINK.sub(r"](\1.html\2)", data["text/markdown"]))
    return _div("cell-output-display", _fence(data.get("text/plain", ""), "{.text}"))


def _div(kind: str, text: str) -> str:
    return f":::::: {{.cell-output .{kind}}}\n\n{text}\n\n::::::"


def _fence(text: str, attributes: str) -> str:
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    ticks = "`" * (longest + 1)
    return f"{ticks} {attributes}\n{text}\n{ticks}"


def watch(root: Path, rebuilt, out: Path | None = None, stop=None) -> None:
    """Build again whenever a source changes, until `stop` (a threading.Event) is set. `rebuilt` gets each Built or error."""
    from watchfiles import watch as changes

    folders = [root / "nbs", root / "slides", root / "_quarto.yml", root / "nbs_lib" / "labs", HERE]
    ignored = {".ipynb_checkpoints", "__pycache__"}
    for batch in changes(*[f for f in folders if f.exists()], stop_event=stop, raise_interrupt=False):
        if all(set(Path(path).parts) & ignored for _, path in batch):
            continue
        try:
            rebuilt(build(root, out))
        except (BuildError, NotebookError) as e:
            rebuilt(e)
