"""One JupyterLab and one Chromium for all tests in a browser, and the list at their end."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

REPOSITORY = Path(__file__).parents[2]
PICTURES = REPOSITORY / "build" / "browser"
DECKS = REPOSITORY / "build" / "slides"
START_S, OPEN_S = 60, 60
"""Seconds that the server may take to start, and a lesson to open with a kernel."""

SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # All cells are on the page, also those that have not been scrolled to.
    "notebook-extension/tracker": {"windowingMode": "none"},
}
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

report: dict[str, dict] = {}
"""Of each lesson or deck what the list at the end says."""


def lessons() -> list[Path]:
    """The notebooks that LESSONS names ("00 02"); without it, those of the course's second form."""
    names = tuple(os.environ.get("LESSONS", "").split())
    found = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
    asked = [path for path in found
             if (path.name.startswith(names) if names else '"core"' in path.read_text())]
    assert asked, f"no notebook for LESSONS={' '.join(names)}; it takes numbers like 00 02"
    return asked


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The copies that `make lab` makes of the lessons, marked as not yet run."""
    folder = tmp_path_factory.mktemp("lessons")
    subprocess.run([sys.executable, REPOSITORY / "notebooks" / "build.py", "--lab", folder],
                   check=True)
    for path in lessons():
        notebook = nbformat.read(folder / path.name, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.execution_count = None
        nbformat.write(notebook, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def server(folder, tmp_path_factory) -> Iterator[str]:
    """The address of a JupyterLab without any settings but ours, for `folder`."""
    home = tmp_path_factory.mktemp("jupyter")
    for name, settings in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    own = {"JUPYTER_CONFIG_DIR": home / "config", "JUPYTER_DATA_DIR": home / "data",
           "JUPYTER_RUNTIME_DIR": home / "runtime", "JUPYTERLAB_SETTINGS_DIR": home / "settings",
           "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces", "IPYTHONDIR": home / "ipython",
           "CLAWDEMY_LEDGER": folder / "ledger.jsonl", "HF_HUB_OFFLINE": "1"}
    others = {name: value for name, value in os.environ.items()
              if name not in ("MPLBACKEND", "TRITON_INTERPRET")}
    port = free_port()
    log = home / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
             f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
             "--LabApp.expose_app_in_browser=True"],
            env=others | {name: str(value) for name, value in own.items()},
            stdout=output, stderr=subprocess.STDOUT)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while not answers(f"{address}/api"):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()                             # and with it, its kernels
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"),
                                             args=CHROMIUM)
        yield browser
        browser.close()


def strangers(context: BrowserContext) -> list[str]:
    """Refuses every request that leaves this machine; the list that is returned fills with them."""
    found: list[str] = []

    def refuse(route) -> None:
        found.append(route.request.url)
        route.abort()

    context.route(lambda url: url.startswith("http") and "//127.0.0.1:" not in url, refuse)
    return found


@pytest.fixture(scope="session")
def page(browser, server) -> Iterator[Page]:
    """A window of JupyterLab, of the size of a small laptop's screen."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    context.add_init_script(path=Path(__file__).with_name("lab.js"))
    page = context.new_page()
    found = strangers(context)
    yield page
    context.close()
    assert not found, "JupyterLab or a lesson asked for something from the network"


def pytest_terminal_summary(terminalreporter) -> None:
    """The list: what was run, what was tried, how long it took."""
    write = terminalreporter.write_line
    if not report:
        return
    write("")
    write(f"{'':28} {'seconds':>8} {'controls':>9} {'worst answer':>13} {'arithmetic':>11} "
          f"{'slides':>7}")
    for name, found in report.items():
        numbers = (f"{found[key]:,.0f}{unit}" if key in found else ""
                   for key, unit in (("seconds", ""), ("controls", ""), ("screen", " ms"),
                                     ("arithmetic", " ms"), ("slides", "")))
        write("{:28} {:>8} {:>9} {:>13} {:>11} {:>7}".format(name, *numbers))
    for name, found in report.items():
        for line in found.get("answers", []):
            write(f"{name:28} {line}")
    write(f"pictures of all of it: {PICTURES.relative_to(REPOSITORY)}/")
