"""The committed measurements: rows with their provenance, read from the library's data files."""
from __future__ import annotations

import json
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent.parent / "data"


@cache
def rows(name: str = "memory_h100") -> tuple[dict, ...]:
    """The rows of the data file `name`: dicts with "settings" (train_memory's arguments), bytes, and "provenance".

    Raises ValueError that lists the data files for a name that is none.
    """
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        raise ValueError(f"measurements {name!r}: there is no such file; there are {', '.join(p.stem for p in sorted(DATA.glob('*.jsonl')))}")
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line)
