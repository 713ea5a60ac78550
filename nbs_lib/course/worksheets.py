"""A learner's own copies of the worksheets. They are never written over: a newer worksheet goes beside the old one."""
from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "labs"


@dataclass(frozen=True)
class Copy:
    """A learner's copy: where it is, whether it was written now, and whether a newer worksheet than any copy's is shipped."""

    path: Path
    written: bool
    newer: bool


def shipped() -> dict[str, Path]:
    """The worksheets of this installation: path by slug ("03_memory")."""
    return {p.stem: p for p in sorted(SHIPPED.glob("[0-9]*.ipynb"))}


def find(lab) -> str:
    """The slug of the lab that `lab` names: 3, "3", "03", "03_memory" or "memory". Raises ValueError that lists the labs."""
    known, name = shipped(), str(lab).strip().lower()
    for slug in known:
        number, topic = slug.split("_", 1)
        if name in (slug, topic) or (re.fullmatch(r"\d+", name) and int(name) == int(number)):
            return slug
    raise ValueError(f"there is no lab {lab!r}; there are: {', '.join(f'{int(s[:2])} ({s[3:]})' for s in known) or 'none'}")


def own_copy(slug: str, folder: Path, update: bool = False) -> Copy:
    """The learner's copy of lab `slug` in `folder`, written when there is none; `update`: a newer worksheet is written beside it."""
    source = shipped()[slug].read_bytes()
    mark = hashlib.sha256(source).hexdigest()
    ledger = folder / ".nbs" / "issued.json"
    try:
        issued = json.loads(ledger.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        issued = {}
    mine = sorted((p for p in folder.glob(f"{slug}*.ipynb") if re.fullmatch(rf"{slug}(-\d+)?", p.stem)), key=_version)
    newer = bool(mine) and not any(issued.get(p.name) == mark for p in mine)
    if mine and not (update and newer):
        return Copy(mine[-1], False, newer)
    path = folder / f"{slug}.ipynb" if not mine else folder / f"{slug}-{_version(mine[-1]) + 1}.ipynb"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as f:
        f.write(source)
    ledger.parent.mkdir(exist_ok=True)
    issued[path.name] = mark
    ledger.write_text(json.dumps(issued, indent=1), encoding="utf-8")
    return Copy(path, True, False)


def _version(path: Path) -> int:
    match = re.search(r"-(\d+)$", path.stem)
    return int(match[1]) if match else 1
