"""All that CI runs, in order: what is generated is in step, every notebook runs, stored outputs are fresh, pytest. Ends with a table.

Chapters and decks run under nbval, which runs every cell and its asserts as nbdev_test does, and compares what is stored. Labs run in the
course's own kernel (tests/test_labs.py), their hidden asserts included. Once is enough: nbdev_test runs the same cells and passes on all of
them. No notebook may take more than two minutes; what takes longer belongs into a committed measurement.

Stored outputs are of one Python: another one's standard library has another text to train on, and its lock may have another JAX. There, where outputs
differ, the second try runs every cell and every assert without comparing them, and the report says so.

They start real processes, ports and browsers, which can be late on a busy machine: what fails has a second try, and both are reported.
"""
from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent
LIMIT = 120
STORED_BY = (3, 11)     # whose outputs are stored, which is CI's
COMPARES = sys.version_info[:2] == STORED_BY
WORKERS = 3     # one more than the two cores: tests wait for processes, ports and pages
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
       "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}


def run(command: list, quiet: bool = True) -> tuple[bool, str, float]:
    """Whether it succeeded, what it printed, how many seconds it took."""
    began = time.perf_counter()
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=ENV, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None)
    return done.returncode == 0, done.stdout or "", time.perf_counter() - began


def notebook_job(path: Path) -> tuple[Path, list[tuple[bool, str, float]]]:
    """The notebook's tries: one, or two where the first failed."""
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-current-env", "-p", "no:cacheprovider", "-p", "no:xdist", path]
    tries = [run([*command, "--nbval"])]
    if not tries[0][0]:
        tries.append(run([*command, "--nbval" if COMPARES else "--nbval-lax"]))
    return path, tries


def main() -> int:
    passed = failed = 0
    began = time.perf_counter()

    def report(name: str, ok: bool, text: str, seconds: float) -> None:
        nonlocal passed, failed
        passed, failed = passed + ok, failed + (not ok)
        print(f"{'ok    ' if ok else 'FAILED'} {name} ({seconds:.0f} s)", flush=True)
        if not ok:
            print(text[-6000:], flush=True)

    report("generated code, worksheets and notebooks are in step", *run([sys.executable, "scripts/export.py", "--check"]))

    notebooks = [p.relative_to(ROOT) for part in ("nbs", "slides") for p in sorted(ROOT.glob(f"{part}/*.ipynb"))]
    times: dict[str, dict[str, float]] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        for path, tries in pool.map(notebook_job, notebooks):
            ok, text, seconds = tries[-1]
            again = ", second try" if len(tries) == 2 else ""
            if again and ok and not COMPARES:
                again = f", outputs differ from Python {'.'.join(map(str, STORED_BY))}'s and are not compared"
            elif again:
                print(f"failed at first: {path}\n{tries[0][1][-6000:]}", flush=True)
            report(f"nbval {path}{again}", ok, text, seconds)
            times.setdefault(path.stem, {})[path.parts[-2]] = seconds
    report("the site is built", *run([sys.executable, "-m", "nbs_lib.course.cli", "build", "--out", "_site"]))

    print("\npytest", flush=True)
    ok, _, seconds = run([sys.executable, "-m", "pytest", "tests", "-n", str(WORKERS), "--dist", "worksteal", "--site", "_site", "--durations", "8",
                           "--reruns", "1", "-q"], quiet=False)
    report("pytest", ok, "see above", seconds)

    columns = ["nbs", "slides"]
    print(f"\n{'nbval, seconds':<20}" + "".join(f"{c:>17}" for c in columns))
    for lesson, row in sorted(times.items()):
        print(f"{lesson:<20}" + "".join(f"{row[c]:>17.0f}" if c in row else f"{'':>17}" for c in columns))
        slow = [c for c, s in row.items() if s > LIMIT]
        if slow:
            report(f"{lesson}: at most {LIMIT} s", False, f"too slow: {', '.join(slow)}", max(row.values()))
    print(f"\n{time.perf_counter() - began:.0f} s in all\n{passed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
