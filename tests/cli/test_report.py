"""The report of a run: one file, complete, and drawn by a real browser without a request or an error."""

import functools
import json
import re
import shutil
import subprocess
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from sftcli.cli.app import app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(autouse=True)
def _no_pictures() -> None:
    """Here they are looked at."""


@pytest.fixture
def run(rows: Path, flags: list[str], tmp_path: Path) -> Path:
    result = CliRunner().invoke(app, ["train", "--data", str(rows), "--run", "first", *flags])
    assert result.exit_code == 0, result.exception
    return tmp_path / "runs" / "first"


def test_a_run_leaves_a_page_with_its_charts_and_commands(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg ") == 4
    assert f"sft eval {run}" in page  # by its path: it is not where commands look for a name
    assert not re.search(r'(?:src|href)="(?!#|data:,)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_runs_are_compared_on_one_page_with_scores_and_samples(run, rows, flags, tmp_path):
    CliRunner().invoke(app, ["train", "--data", str(rows), "--run", "second", *flags])
    CliRunner().invoke(app, ["eval", "first", "--runs", str(tmp_path / "runs")])
    out = tmp_path / "both.html"
    result = CliRunner().invoke(
        app, ["report", "first", "second", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    )
    assert result.stdout == f"{out}\n"
    page = out.read_text(encoding="utf-8")
    assert "2 runs compared" in page
    assert "no interval: 12 rows are too few" in page
    assert "expected" in page


def test_foreign_text_is_text_on_the_page(run, tmp_path):
    log = run / "events.jsonl"
    event = {"event": "Warned", "text": "<script>alert(1)</script>"}
    log.write_text(log.read_text(encoding="utf-8") + json.dumps(event) + "\n", encoding="utf-8")
    CliRunner().invoke(app, ["report", "first", "--runs", str(tmp_path / "runs")])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


class Recorder(SimpleHTTPRequestHandler):
    """Serves a folder, and every other host too, and remembers who asked for what."""

    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self):
        self.seen.append((self.path, self.headers.get("Referer")))
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_browser_draws_the_page_without_errors_or_requests(run, tmp_path):
    Recorder.seen.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Recorder, directory=str(run)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
            f"--host-resolver-rules=MAP * 127.0.0.1:{server.server_port}", "--window-size=400,800", "--dump-dom",
            f"http://page.test:{server.server_port}/report.html",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    server.shutdown()
    thread.join()
    server.server_close()
    assert done.stdout.count("<svg ") == 4
    assert "CONSOLE" not in done.stderr
    assert ("/report.html", None) in Recorder.seen
    assert [path for path, referer in Recorder.seen if referer] == []  # what a page asks for names the page


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_browser_prints_the_page_with_its_charts_and_whole_cards(run, tmp_path):
    printed = tmp_path / "report.pdf"
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr",
            "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--print-to-pdf={printed}", (run / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    content = printed.read_bytes()
    assert content.startswith(b"%PDF-")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 10
