"""Bring what is generated in step with the notebooks: the library, the worksheets, clean notebooks. `--check` only looks.

Generated: nbs_lib/*.py and nbs_lib/labs/*.py (nbdev), nbs_lib/labs/NN_topic.ipynb and .solutions.json (the worksheets).
"""
from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from nbs_lib.course import notebooks  # noqa: E402

GENERATED = ("nbs_lib/*.py", "nbs_lib/labs/*.py", "nbs_lib/labs/*.ipynb", "nbs_lib/labs/*.json")
NOTEBOOKS = ("nbs/*.ipynb", "nbs/labs/*.ipynb", "slides/*.ipynb")


def write_worksheets(root: Path) -> None:
    for path in sorted(root.glob("nbs/labs/*.ipynb")):
        sheet, solutions = notebooks.worksheet(notebooks.read(path))
        out = root / "nbs_lib" / "labs" / path.name
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(notebooks.titled(sheet), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        out.with_suffix(".solutions.json").write_text(json.dumps(solutions, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def export(root: Path) -> None:
    tools = Path(sys.executable).parent
    for command in (["nbdev_clean"], ["nbdev_clean", "--fname", "slides"], ["nbdev_export"]):
        run = subprocess.run([tools / command[0], *command[1:]], cwd=root, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
    write_worksheets(root)


def check() -> int:
    """Export a copy of the checkout and compare: 0 when all is in step, else 1 and the names of what is not."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        skip = shutil.ignore_patterns(".venv", ".git", "_site*", "work", "__pycache__", "*.egg-info", ".*")
        shutil.copytree(ROOT, copy, ignore=skip)
        for pattern in GENERATED:
            for path in copy.glob(pattern):
                if path.name != "__init__.py":
                    path.unlink()
        export(copy)
        wrong = []
        for pattern in (*GENERATED, *NOTEBOOKS):
            names = {p.relative_to(base) for base in (ROOT, copy) for p in base.glob(pattern)}
            wrong += [str(n) for n in names if not ((ROOT / n).is_file() and (copy / n).is_file() and filecmp.cmp(ROOT / n, copy / n, shallow=False))]
    if wrong:
        print("Out of step with the notebooks (run `make export` and commit):\n  " + "\n  ".join(sorted(wrong)))
    return bool(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when something is out of step")
    sys.exit(check() if parser.parse_args().check else export(ROOT))
