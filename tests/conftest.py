"""Shared by the tests: the checkout, the rendered site (a setting), a real browser."""
from __future__ import annotations

import functools
import http.server
import os
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

# the same examples in every run and no deadline, so that a red CI means a change; HYPOTHESIS_PROFILE=default draws new ones
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_addoption(parser):
    parser.addoption("--site", default=None, help="the rendered site to test (default: one built now, with Pandoc); a Quarto-made one passes the same tests")


def pytest_terminal_summary(terminalreporter):
    """CI gives a failed test a second try, since real processes, ports and browsers can be late on a busy machine; what failed first is shown."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"failed at first: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)


@pytest.fixture(scope="session")
def site(request, tmp_path_factory) -> Path:
    """The folder of the rendered site."""
    given = request.config.getoption("--site")
    if given:
        folder = Path(given).absolute()
        assert (folder / "nbs" / "index.html").is_file(), f"--site {given}: there is no rendered site"
        return folder
    from nbs_lib.course.render import build

    folder = tmp_path_factory.mktemp("site") / "_site"
    build(ROOT, folder, quarto=False)
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def address(site) -> str:
    """The site's address on a plain static server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    from browser import find
    from playwright.sync_api import sync_playwright

    path = find()
    assert path, "no Chromium: apt-get install chromium, or set NBS_CHROMIUM"
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"])
        yield chromium
        chromium.close()


def _world(ranks: int):
    from nbs_lib.course.world import World

    with World(ranks, backend="gloo") as world:
        yield world


@pytest.fixture(scope="module")
def two():
    """Two ranks on the CPU, for a whole module of tests."""
    yield from _world(2)


@pytest.fixture(scope="module")
def four():
    """Four ranks on the CPU, for a whole module of tests."""
    yield from _world(4)
