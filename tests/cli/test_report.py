"""The report of a run: one file, complete, and drawn by a real browser without a request or an error."""

import functools
import json
import re
import shlex
import shutil
import subprocess
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from sftcli.cli.app import app
from tests.cli.conftest import short_training, write_sums

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(autouse=True)
def _no_pictures() -> None:
    """Here they are looked at."""


@pytest.fixture
def run(rows: Path, flags: list[str], tmp_path: Path) -> Path:
    result = CliRunner().invoke(app, ["train", "--data", str(rows), "--run", "first", *flags])
    assert result.exit_code == 0, result.exception
    return tmp_path / "runs" / "first"


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tests only read."""
    place = tmp_path_factory.mktemp("finished")
    data = write_sums(place / "rows.jsonl")
    result = CliRunner().invoke(
        app, ["train", "--data", str(data), *short_training(tiny_model, place), "--run", "one"]
    )
    assert result.exit_code == 0, result.exception
    return place / "runs" / "one"


def test_a_run_leaves_a_page_with_its_charts_and_commands(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg ") == 4
    assert f"sft eval {finished}" in text_of(page)  # by its path: it is not where commands look for a name
    assert not re.search(r'(?:src|href)="(?!#|data:,)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("out", ["/", "folder", "folder/"])
def test_a_folder_in_place_of_the_page_is_refused_and_nothing_is_left(finished, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    result = CliRunner().invoke(app, ["report", str(finished), "--out", out])
    assert getattr(result.exception, "exit_code", result.exit_code) == 73, result.exception
    for place in (tmp_path, Path("folder"), Path("/")):
        assert [path.name for path in place.iterdir() if path.name.startswith(".sft")] == []


def test_runs_are_compared_on_one_page_with_scores_and_samples(run, rows, flags, tmp_path):
    changed = ["--run", "second", "--lr", "2e-3", "--lora"]
    assert CliRunner().invoke(app, ["train", "--data", str(rows), *flags[:-2], *changed]).exit_code == 0
    CliRunner().invoke(app, ["eval", "first", "--runs", str(tmp_path / "runs")])
    out = tmp_path / "both.html"
    result = CliRunner().invoke(
        app, ["report", "first", "second", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    )
    assert result.stdout == f"{out}\n"
    page = out.read_text(encoding="utf-8")
    assert "2 runs compared" in page
    compared = text_of(page.partition("<h2>Settings that differ")[2].partition("<h2>")[0])
    assert compared.split() == [
        "first", "second", "training.learning_rate", "0.01", "0.002", "adapter.kind", "none", "lora",
    ]  # fmt: skip
    assert "sft eval" in text_of(page.partition("<h2>Scores")[2].partition("<h2>")[0])  # of the second
    assert "no interval: 12 rows are too few" in page
    assert "expected" in page


def text_of(html: str) -> str:
    """Return what a reader sees of a part of the page."""
    return unescape(re.sub(r"<[^>]*>", " ", re.sub(r"</?(?:wbr|span)[^>]*>", "", html)))


def test_every_command_of_the_page_runs_as_it_is_printed(sft, rows, tiny_model):
    assert sft("train", "--data", rows, *short_training(tiny_model, Path()), "--run", "one")[0] == 0
    commands = printed_commands()
    shutil.rmtree("runs/one/final")  # as a kill before the end leaves it
    assert sft("report", "one")[0] == 0
    resume = [words for words in printed_commands() if words not in commands]
    assert [words[1] for words in (*resume, *commands)] == ["resume", "eval", "generate", "train"]
    for words in (*resume, *commands):
        code, _, err = sft(*words[1:])
        assert code == 0, (words, err)


def printed_commands() -> list[list[str]]:
    """Return the commands of the page of the run "one" in words."""
    page = Path("runs/one/report.html").read_text(encoding="utf-8")
    return [shlex.split(text_of(one)) for one in re.findall(r'<pre class="command">(.*?)</pre>', page)]


def test_a_page_has_no_notation_of_python_and_tells_defaults_from_own_values(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"\b(None|True|False)\b|\('|\[\]", text_of(page.partition("<body>")[2]))
    chosen, _, defaults = page.partition("<h3>Settings")[2].partition("<details")
    assert "training.<wbr>learning_<wbr>rate" in chosen
    assert "training.<wbr>weight_<wbr>decay" in defaults


def test_a_page_begins_with_a_summary_and_the_main_settings(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    top, _, below = page.partition("<h1>")[2].partition("</dl>")
    assert (top.count("<svg"), below.count("<svg")) == (1, 3)  # the losses, then what else is drawn
    top = text_of(top)
    assert re.search(r"was trained for 4 steps on 48 rows, 0\.67 epochs, in [\d.]+s\. Held-out loss \d", top)
    assert re.search(r"learning rate\s*1\.0e-02.*batch\s*8 rows a step.*length\s*4 steps", top, re.DOTALL)
    assert re.search(r"started \d{4}-\d\d-\d\d \d\d:\d\d UTC with", top)


def test_screens_name_the_page_and_show_has_the_scores(sft, rows, tiny_model):
    place = f"report: {Path('runs/one/report.html')}\n"
    assert place in sft("train", "--data", rows, *short_training(tiny_model, Path()), "--run", "one")[2]
    _, table, err = sft("eval", "one", "--no-base")
    assert place in err
    assert "base" not in table
    assert "difference" not in table
    assert "prompt   What is " in err  # of the first wrong answer, without what all prompts share
    shown = sft("show", "one")[1]
    assert re.search(r"scores +exactly right \d+ of 12; loss \d", shown)
    assert re.search(r"report +runs/one/report.html", shown)


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
def test_a_browser_draws_the_page_without_errors_or_requests(finished, tmp_path):
    Recorder.seen.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Recorder, directory=str(finished)))
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


# Lists the words that stand in two lines, and everything that is wider than the page.
FIND_FAULTS = """<script>
const faults = [], range = document.createRange();
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  if (walk.currentNode.parentElement.closest("script, style, svg, pre")) continue;
  for (const word of walk.currentNode.data.matchAll(/[\\p{L}\\p{N}]+/gu)) {
    range.setStart(walk.currentNode, word.index); range.setEnd(walk.currentNode, word.index + word[0].length);
    if (range.getClientRects().length > 1) faults.push(word[0]);
  }
}
if (document.body.scrollWidth > document.documentElement.clientWidth) faults.push("too wide");
document.title = "faults: " + faults.join(" ");
</script>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_no_word_is_broken_inside(run, sft, tmp_path, width):
    assert sft("eval", run)[0] == 0
    assert sft("report", run, run, "--out", "both.html")[0] == 0
    for path in (run / "report.html", Path("both.html")):
        page = path.read_text(encoding="utf-8").replace("<details", "<details open")
        page = page.replace("</style>", f"html {{ width: {width}px; }}</style>").replace(
            "</body>", FIND_FAULTS + "</body>"
        )
        Path("faults.html").write_text(page, encoding="utf-8")
        done = subprocess.run(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1280,800",
                "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                Path("faults.html").absolute().as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert "<title>faults: </title>" in done.stdout, re.findall("<title>.*</title>", done.stdout)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_browser_prints_the_page_with_its_charts_and_whole_cards(finished, tmp_path):
    printed = tmp_path / "report.pdf"
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr",
            "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--print-to-pdf={printed}", (finished / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    content = printed.read_bytes()
    assert content.startswith(b"%PDF-")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 10
