"""Make the course's environment: `.venv`, from requirements.lock. Standard library only; run by the Makefile with the machine's Python.

A CUDA build of torch that this Python already has is kept, with its triton, jax, nvidia-* packages and transformers and all that these
need: their folder is linked into `.venv` (a .pth file, since a venv made from a venv does not see its parent's packages), and
nothing is installed over them. Without one, torch comes from where pip finds it; a download of gigabytes is announced with its size first,
and asked for where there is a terminal to ask at.

Settings, by environment: NBS_TORCH_INDEX (where to look for a CPU build of torch; empty: nowhere but pip's own index),
NBS_YES=1 (do not ask), and pip's own (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX, …).
"""
from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import importlib.metadata as metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements.lock"
STAMP = VENV / ".nbs.json"
LINK = "machine-packages.pth"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SUPPORTED = ((3, 11), (3, 13))
#: What a GPU machine brings along and keeps, each with everything that it requires.
KEPT = ("torch", "triton", "torchvision", "torchaudio", "jax", "jaxlib", "flax", "optax", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed")


def say(text: str) -> None:
    print(text, flush=True)


def give_up(problem: str, remedy: str):
    sys.exit(f"\n{problem}\n  Remedy: {remedy}")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def machine_packages() -> dict[str, str]:
    """What this Python has installed: version by canonical name."""
    return {canonical(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]}


def cuda_of_torch() -> str | None:
    """The CUDA version that this Python's torch was built for, read without importing torch; None without torch or CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    version = Path(spec.origin).parent / "version.py"
    found = re.search(r"^cuda[^=]*= *['\"]([^'\"]+)", version.read_text(encoding="utf-8"), re.M) if version.is_file() else None
    return found[1] if found else None


def closure(roots, installed: dict[str, str]) -> dict[str, str]:
    """`roots` and all that they require, as far as it is installed: version by name."""
    kept, todo = {}, [r for r in roots if r in installed] + [n for n in installed if n.startswith("nvidia-")]
    while todo:
        name = todo.pop()
        if name in kept or name not in installed:
            continue
        kept[name] = installed[name]
        for requirement in metadata.requires(name) or []:
            if "extra ==" not in requirement:
                todo.append(canonical(re.match(r"[\w.-]+", requirement)[0]))
    return kept


def pip(*args: str, quiet: bool = True, capture: bool = False) -> subprocess.CompletedProcess:
    command = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *args]
    if quiet:
        command.append("-q")
    return subprocess.run(command, capture_output=capture, text=True)


def make_venv() -> None:
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        give_up(f"Python {version} at {sys.executable} cannot make virtual environments: its `venv` package is missing.",
                f"apt-get install python{version}-venv (Debian and Ubuntu), then the same command again.")
    if VENV.exists():
        shutil.rmtree(VENV)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)


def link_machine(kept: dict[str, str]) -> None:
    folders = {str(d.locate_file("")) for d in metadata.distributions() if canonical(d.metadata["Name"] or "") in kept}
    site = subprocess.run([VENV / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                          capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / LINK).write_text("".join(f"{f}\n" for f in sorted(folders)))


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=6):
            return True
    except Exception:
        return False


def download_size(urls: list[str]) -> str:
    """The size of all `urls` in words; "at least" where a server did not say."""
    def one(url: str) -> int | None:
        if url.startswith("file:"):
            return 0
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30) as answer:
                return int(answer.headers["Content-Length"])
        except Exception:
            return None

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(one, urls))
    return ("at least " if None in sizes else "") + f"{sum(filter(None, sizes)) / 1e9:.1f} GB"


def torch_arguments(pin: str) -> list[str]:
    """pip arguments that install torch `pin`, after saying (and at a terminal asking) when that is a download of gigabytes."""
    def plan(*args: str) -> list[str] | None:
        run = pip("install", "--dry-run", "--ignore-installed", "--report", "-", *args, pin, capture=True)
        return [i["download_info"]["url"] for i in json.loads(run.stdout)["install"]] if run.returncode == 0 else None

    urls = plan()
    if urls is None:
        give_up(f"pip finds no {pin} for Python {sys.version_info.major}.{sys.version_info.minor} on this machine.",
                "check the network and pip's index (`pip config list`), or install a torch from 2.11 to 2.13 in this Python yourself.")
    if not any("nvidia" in Path(u).name for u in urls):
        return [pin]
    index = os.environ.get("NBS_TORCH_INDEX", CPU_INDEX)
    has_gpu = shutil.which("nvidia-smi") is not None
    if not has_gpu and index and reachable(f"{index}/torch/") and plan("--index-url", index):
        say(f"torch: no GPU here, so the CPU build from {index}")
        return [pin, "--index-url", index]
    size = download_size(urls)
    why = "this machine has a GPU" if has_gpu else "the package index offers no CPU build for it"
    say(f"torch: {pin} with CUDA is a download of {size} ({why}).")
    if sys.stdin.isatty() and os.environ.get("NBS_YES") != "1":
        if input("Download it? [y/N] ").strip().lower() not in ("y", "yes"):
            shutil.rmtree(VENV, ignore_errors=True)
            give_up("Nothing was downloaded.", "install torch 2.11 to 2.13 in this Python as you like it, and run the command again: it is kept.")
    return [pin]


def required(part: str) -> list[str]:
    """The names in one of settings.ini's lists of requirements."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return [canonical(re.match(r"[\w.-]+", r)[0]) for r in config["DEFAULT"][f"{part}_requirements"].split()]


def fingerprint(kept: dict[str, str]) -> str:
    parts = [LOCK.read_bytes(), (ROOT / "settings.ini").read_bytes(), Path(__file__).read_bytes(), sys.version.encode(), json.dumps(kept, sort_keys=True).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def main() -> None:
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        give_up(f"This is Python {sys.version.split()[0]}; the course runs on 3.11, 3.12 and 3.13.", "make PYTHON=/path/to/python3.12 …")
    lock = open(ROOT / ".venv.lock", "w")  # two commands started at once: the second waits for the first
    fcntl.flock(lock, fcntl.LOCK_EX)
    cuda, installed = cuda_of_torch(), machine_packages()
    kept = closure(KEPT, installed) if cuda else {}
    mark = fingerprint(kept)
    try:
        if json.loads(STAMP.read_text())["fingerprint"] == mark:
            return
    except (OSError, ValueError, KeyError):
        pass
    free = shutil.disk_usage(ROOT).free
    if free < 3e9:
        give_up(f"Only {free / 1e9:.1f} GB of disk are free at {ROOT}; the environment takes about 2 GB.", "free some space.")
    say(f"Environment: .venv with Python {sys.version.split()[0]} from requirements.lock")
    make_venv()
    pins = [line for line in LOCK.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    named: dict[str, list[str]] = {}  # a package may have a pin for some Pythons and another for others: pip reads the markers
    for pin in pins:
        named.setdefault(canonical(re.match(r"[\w.-]+", pin)[0]), []).append(pin)
    torch = named.pop("torch")[0].split(";")[0].strip()
    extra: list[str] = []
    if cuda:
        link_machine(kept)
        here = {n: v for n, v in kept.items() if n in ("torch", "transformers", "jax", "triton")}
        say(f"torch: {kept['torch']} with CUDA {cuda} is here already and is kept ({', '.join(f'{n} {v}' for n, v in sorted(here.items()))}); nothing is installed over it")
        named = {n: ps for n, ps in named.items() if n not in kept}
    else:
        extra = torch_arguments(torch)
    lonely = [pin for n in required("alone") for pin in named.pop(n, [])]
    oracles = [pin for pin in pins if canonical(re.match(r"[\w.-]+", pin)[0]) in required("oracle")]
    named = {n: ps for n, ps in named.items() if n not in required("oracle")}
    wanted = VENV / "wanted.txt"
    wanted.write_text("\n".join(pin for ps in named.values() for pin in ps) + "\n")
    constraints = VENV / "kept.txt"
    constraints.write_text("\n".join(f"{n}=={v}" for n, v in kept.items()) + "\n")
    steps = ([["install", *extra]] if extra else []) + [
        ["install", "-r", str(wanted), "-c", str(constraints)],
        ["install", "--no-deps", "--no-build-isolation", *lonely, "-e", str(ROOT)],
        ["install", "--no-deps", "--target", str(VENV / "oracles"), *oracles],
    ]
    for step in steps:
        if pip(*step).returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            give_up(f"pip could not install what the course needs (pip {' '.join(step)}).",
                    "read pip's message above; the network, the package index (`pip config list`) and the disk are the usual causes.")
    kernel = [VENV / "bin" / "python", "-m", "ipykernel", "install", "--sys-prefix", "--name", "scaling-measured", "--display-name", "Scaling, Measured"]
    subprocess.run(kernel, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # JupyterLab asks at its first start whether it may fetch news; a course that works unplugged answers for it.
    overrides = VENV / "share" / "jupyter" / "lab" / "settings" / "overrides.json"
    overrides.parent.mkdir(parents=True, exist_ok=True)
    overrides.write_text(json.dumps({"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}))
    STAMP.write_text(json.dumps({"fingerprint": mark, "python": sys.version.split()[0], "kept": kept}, indent=1))
    say("Environment: ready")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        shutil.rmtree(VENV, ignore_errors=True) if not STAMP.exists() else None
        sys.exit("\nInterrupted; run the same command again to go on.")
