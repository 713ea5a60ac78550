"""The course's lessons, found by their file names: one number and one slug name a lesson everywhere."""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from . import notebooks


@dataclass(frozen=True)
class Lesson:
    """A lesson: its slug ("03_memory"), title and description (from the chapter's front matter), and which parts it has."""

    slug: str
    title: str
    description: str
    lab: bool
    deck: bool


def lessons(root: Path) -> list[Lesson]:
    """The lessons of the checkout `root`, in order."""
    out = []
    for path in sorted(root.glob("nbs/[0-9]*.ipynb")):
        front = notebooks.front_matter_text(notebooks.read(path))
        said = {key: (m[1].strip().strip("\"'") if (m := re.search(rf"^{key}:\s*(.+)$", front, re.M)) else "") for key in ("title", "description")}
        out.append(Lesson(path.stem, said["title"] or path.stem, said["description"],
                          (root / "nbs" / "labs" / path.name).is_file(), (root / "slides" / path.name).is_file()))
    return out
