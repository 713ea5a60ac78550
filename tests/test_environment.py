"""Making the environment: what a machine brings along is kept, the lock file is fit for every machine, problems name their remedy."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import environment
import pytest
from conftest import ROOT
from packaging.requirements import Requirement

PINS = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]


def package(folder: Path, name: str, version: str, *requires: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(f"Requires-Dist: {r}\n" for r in requires))


def ask(code: str, *paths: Path) -> str:
    """What a Python with only `paths` beside its standard library answers."""
    env = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "scripts", *paths))), "PATH": os.environ["PATH"]}
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def machine(tmp_path):
    """A machine's packages: a CUDA torch with its needs, a transformers, and something unrelated."""
    package(tmp_path, "torch", "2.11.0+cu130", "filelock", "nvidia-cublas==13.1; platform_system == 'Linux'", "optree; extra == 'optree'")
    package(tmp_path, "nvidia-cublas", "13.1")
    package(tmp_path, "filelock", "3.1")
    package(tmp_path, "optree", "0.1")
    package(tmp_path, "transformers", "5.17.0", "huggingface_hub<2,>=1.0")
    package(tmp_path, "huggingface-hub", "1.33.0", "tqdm")
    package(tmp_path, "tqdm", "4.0")
    package(tmp_path, "unrelated", "1.0")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('must not be imported to be asked')")
    (tmp_path / "torch" / "version.py").write_text("from typing import Optional\n__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    return tmp_path


def test_a_cuda_torch_is_kept_with_all_that_it_needs(machine):
    code = "import json, environment as e; print(json.dumps([e.cuda_of_torch(), e.closure(e.KEPT, e.machine_packages())]))"
    cuda, kept = json.loads(ask(code, machine))
    assert cuda == "13.0"
    assert kept == {"torch": "2.11.0+cu130", "nvidia-cublas": "13.1", "filelock": "3.1", "transformers": "5.17.0", "huggingface-hub": "1.33.0", "tqdm": "4.0"}


def test_a_cpu_torch_or_none_is_not_mistaken_for_cuda(machine, tmp_path):
    (machine / "torch" / "version.py").write_text("__version__ = '2.11.0+cpu'\ncuda = None\n")
    assert ask("import environment; print(environment.cuda_of_torch())", machine).strip() == "None"
    assert ask("import environment; print(environment.cuda_of_torch())").strip() == "None"


def test_an_unsupported_python_is_told_which_will_do(monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 10, 1))
    with pytest.raises(SystemExit, match="3.11, 3.12 and 3.13"):
        environment.main()


def test_gigabytes_are_announced_and_a_no_downloads_nothing(monkeypatch, tmp_path, capsys):
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    report = json.dumps({"install": [{"download_info": {"url": f"https://index.invalid/{name}.whl"}} for name in ("torch-2.13.0", "nvidia_cublas-13.1")]})
    monkeypatch.setattr(environment, "pip", lambda *a, **k: subprocess.CompletedProcess(a, 0, report, ""))
    monkeypatch.setattr(environment, "reachable", lambda url: False)
    monkeypatch.setattr(environment, "download_size", lambda urls: "2.7 GB")
    monkeypatch.setattr(environment.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    monkeypatch.delenv("NBS_YES", raising=False)
    with pytest.raises(SystemExit, match="Nothing was downloaded"):
        environment.torch_arguments("torch==2.13.0")
    assert "2.7 GB" in capsys.readouterr().out


def test_the_lock_pins_everything_for_every_machine():
    for pin in PINS:
        (spec,) = pin.specifier
        assert spec.operator == "==" and "+" not in spec.version and not pin.url, pin
        assert not pin.name.startswith(("nvidia-", "triton")), "torch's own metadata pins these"
    assert "--hash" not in (ROOT / "requirements.lock").read_text()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_satisfies_settings_ini(python):
    marks = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
    pinned = {environment.canonical(p.name): next(iter(p.specifier)).version for p in PINS if p.marker is None or p.marker.evaluate(marks)}
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    for part in ("requirements", "torch_requirements", "labs_requirements", "alone_requirements", "oracle_requirements", "dev_requirements"):
        for wanted in map(Requirement, config["DEFAULT"][part].split()):
            assert wanted.specifier.contains(pinned[environment.canonical(wanted.name)], prereleases=True), wanted
