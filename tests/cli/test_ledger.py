"""``sft report --rows``: what rows cost before and after, exactly as ``sft eval`` has it, and what the page makes of that."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.data.conversations.fixes import read_fixes
from sftcli.services.report.ledger import LEDGERS
from tests.cli.conftest import program, short_training

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '</pre><script>document.title = "broken"</script><b onclick="x">'


def write_rows(path: Path) -> Path:
    """Write forty rows: the same question answered in two ways, an answer in another alphabet, one of markup, one much longer."""
    answers = {number: f"It is {2 * number}, of course." for number in range(40)}
    answers |= {
        5: "Это двенадцать, конечно.",
        6: HOSTILE,
        7: "Well. " * 60,
    }
    rows = [
        {"question": f"What is {number} plus {number}?", "answer": text} for number, text in answers.items()
    ]
    rows[9]["question"] = rows[8]["question"]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A folder with a run and its ledger, which tests only read, and what was printed."""
    folder = tmp_path_factory.mktemp("ledger")
    rows, held = write_rows(folder / "rows.jsonl"), folder / "held.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[:30]), encoding="utf-8")
    held.write_text("".join(lines[30:]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        flags = [
            *short_training(tiny_model, folder),
            "--data",
            str(rows),
            "--heldout",
            str(held),
            "--run",
            "one",
        ]
        result = CliRunner().invoke(app, ["train", *flags])
        assert result.exit_code == 0, result.output
        result = CliRunner().invoke(app, ["report", str(folder / "runs/one"), "--rows", "--json"])
        assert result.exit_code == 0, result.output
    (folder / "printed.json").write_text(result.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def sft_there(place, monkeypatch, capsys):
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))
    return program(monkeypatch, capsys)


@pytest.fixture
def ledger(place):
    return json.loads((place / "printed.json").read_text(encoding="utf-8"))["rows"]


def test_losses_are_those_of_an_evaluation_of_the_same_rows(place, ledger, sft_there, tmp_path):
    for name in ("rows.jsonl", "held.jsonl"):
        _, out, _ = sft_there(
            "eval", place / "runs/one", "--data", place / name, "--json", "--max-rows", "1", "--check", "none"
        )
        scores, (found,) = json.loads(out), [one for one in ledger["sources"] if one["source"].endswith(name)]
        assert found["rows"] == scores["rows"]
        assert found["before"] == pytest.approx(scores["base"]["loss"], abs=1e-6)
        assert found["after"] == pytest.approx(scores["tuned"]["loss"], abs=1e-6)
    one = ledger["rows"][0]
    line = Path(one["source"]).read_text(encoding="utf-8").splitlines()[one["line"] - 1]
    (tmp_path / "row.jsonl").write_text(line + "\n", encoding="utf-8")
    _, out, _ = sft_there(
        "eval", place / "runs/one", "--data", tmp_path / "row.jsonl", "--json", "--check", "none"
    )
    scores = json.loads(out)
    assert one["before"] == pytest.approx(scores["base"]["loss"], abs=1e-6)
    assert one["after"] == pytest.approx(scores["tuned"]["loss"], abs=1e-6)
    assert one["tokens"] == scores["tuned"]["response_tokens"]


def test_every_row_is_there_once_and_the_sums_are_those_of_the_sources(ledger):
    places = [(row["source"], row["line"]) for row in ledger["rows"]]
    assert len(places) == len(set(places)) == ledger["available"] == 40
    for source in ledger["sources"]:
        rows = [row for row in ledger["rows"] if row["source"] == source["source"]]
        assert sum(row["tokens"] for row in rows) == source["tokens"]
        total = sum(row["after"] * row["tokens"] for row in rows)
        assert total / source["tokens"] == pytest.approx(source["after"], abs=1e-9)


def test_rows_that_differ_from_their_neighbors_are_listed_with_the_reason(ledger):
    found = {Path(row["source"]).name + f":{row['line']}": row["reasons"] for row in ledger["rows"]}
    assert found["rows.jsonl:6"]["script"] == "most letters are Cyrillic, in 97% of its source Latin"
    assert found["rows.jsonl:7"]["format"].startswith("it is text with markup")
    assert "length" in found["rows.jsonl:8"]
    assert found["rows.jsonl:10"]["contradiction"].endswith(
        "rows.jsonl:9 asks the same and answers otherwise"
    )
    assert not {"script", "format", "length", "contradiction"} & found["rows.jsonl:20"].keys()


def test_the_file_is_what_was_printed_and_the_page_shows_it_as_text(place, ledger):
    kept = LEDGERS.read(place / "runs/one/rows.json")
    assert json.loads(json.dumps(kept.to_json())) == ledger
    page = (place / "runs/one/report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1
    assert HOSTILE not in page
    assert "&lt;/pre&gt;&lt;script" in re.sub("<wbr>", "", page)
    assert page.count('class="card row"') == len(kept.shown)
    assert not re.search(r'(?:src|href)="(?!#|data:,)', page)


def test_the_cost_is_told_before_it_is_paid_and_rows_are_drawn_above_a_limit(place, sft_there, tmp_path):
    copy = shutil.copytree(place / "runs", tmp_path / "runs")
    code, out, err = sft_there("report", copy / "one", "--rows", "--max-rows", "7")
    assert code == 0, err
    told = " ".join(err.split())
    assert "scoring 7 rows of 40, evenly drawn (--max-rows) in 4 passes" in told
    assert "about 1.3 times as long as to train on these rows once" in told
    assert "rows.jsonl (trained)" in out
    found = LEDGERS.read(copy / "one/rows.json")
    assert (len(found.rows), found.available) == (7, 40)


def test_two_processes_find_the_same(place, ledger, sft_there, tmp_path):
    copy = shutil.copytree(place / "runs", tmp_path / "runs")
    code, _, err = sft_there("report", copy / "one", "--rows", "--processes", "2")
    assert code == 0, err
    found = {row.place: row for row in LEDGERS.read(copy / "one/rows.json").rows}
    assert len(found) == len(ledger["rows"])
    for row in ledger["rows"]:
        other = found[f"{row['source']}:{row['line']}"]
        for name in ("before", "after", "apart_before", "apart_after"):
            assert getattr(other, name) == pytest.approx(row[name], abs=1e-6)
    assert (copy / "one/report.html").is_file()


def test_a_fix_replaces_the_answer_that_the_page_shows_and_no_other(sft, tiny_model, tmp_path):
    rows = [
        {"messages": [
            {"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."},
            {"role": "user", "content": "And twice?"}, {"role": "assistant", "content": HOSTILE if n == 3 else f"It is {2 * n}."},
        ]}
        for n in range(30)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    training = ["train", "--data", "rows.jsonl", *short_training(tiny_model, tmp_path)]
    for train_on, offered in (("all", 1), ("each", 0)):
        run = f"on-{train_on}"
        assert sft(*training, "--run", run, "--train-on", train_on)[0] == 0
        code, out, err = sft("report", run, "--rows", "--json")
        assert code == 0, err
        listed = [row for row in json.loads(out)["rows"]["rows"] if "format" in row["reasons"]]
        assert {row["is_part"] for row in listed} == {train_on == "each"}
        page = (tmp_path / "runs" / run / "report.html").read_text(encoding="utf-8")
        cards = [card for card in page.split('class="card row"')[1:] if 'data-fix="keep"' in card]
        assert {card.count('data-fix="replace"') for card in cards} == {offered}


def test_flags_of_rows_need_them(sft_there, place):
    for flag in (["--max-rows", "3"], ["--processes", "2"], ["--trust-remote-code"]):
        code, _, err = sft_there("report", place / "runs/one", *flag)
        assert (code, f"{flag[0]} needs --rows" in err) == (2, True)
    assert sft_there("report", place / "runs/one", place / "runs/one", "--rows")[0] == 2


def test_a_model_inside_of_a_run_is_refused_before_rows_are_scored(sft_there, place):
    before = (place / "runs/one/rows.json").read_bytes()
    code, _, err = sft_there("report", place / "runs/one/final", "--rows")
    assert (code, "scoring" in err) == (66, False)
    assert (place / "runs/one/rows.json").read_bytes() == before


# Filters, sorts and decides as a person would, and writes what came of it into the title.
USE_THE_PAGE = """<script>
const find = name => document.querySelector(name), seen = {};
const rows = () => [...document.querySelectorAll(".ledger .row")].filter(row => !row.hidden);
const set = (name, value) => { find(name).value = value; find(name).dispatchEvent(new Event("input")); };
seen.all = rows().length;
set(".why", "script"); seen.script = rows().map(row => row.dataset.place.split("/").pop());
set(".why", ""); set(".text", "of course"); seen.text = rows().length; set(".text", "");
set(".order", "place"); seen.sorted = rows().map(row => Number(row.dataset.place.split(":").pop()));
let file = null;
URL.createObjectURL = blob => { file = blob; return "#"; };
const of = (number, fix) => rows().filter(row => row.querySelector("textarea"))[number].querySelector(`[data-fix=${fix}]`);
of(0, "leave-out").click(); of(1, "replace").click(); of(2, "keep").click(); of(3, "keep").click(); of(3, "keep").click();
const area = rows()[1].querySelector("textarea");
area.value = "</scr" + "ipt> \\u00e9"; area.dispatchEvent(new Event("input"));
seen.told = find(".decided").textContent;
find(".download").click();
file.text().then(text => { seen.file = text; document.title = JSON.stringify(seen); });
</script>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_the_page_filters_sorts_and_writes_fixes_that_are_read_back(place, tmp_path):
    seen = used((place / "runs/one/report.html").read_text(encoding="utf-8"), tmp_path)
    kept = LEDGERS.read(place / "runs/one/rows.json")
    assert seen["all"] == len(kept.shown)
    assert seen["script"] == ["rows.jsonl:6"]
    assert seen["text"] == sum("of course" in row.answer for _, row in kept.shown)
    assert seen["told"] == "3 decided"
    fixes = seen["fixes"]
    assert [fix.fix for fix in fixes] == ["leave-out", "replace", "keep"]
    assert fixes[1].answer == "</script> é"
    by_place = sorted((row for _, row in kept.shown), key=lambda row: (row.source, row.line))
    assert [(fix.row, fix.place) for fix in fixes] == [(row.row, row.place) for row in by_place[:3]]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_what_was_decided_before_is_written_again(place, tmp_path):
    page = (place / "runs/one/report.html").read_text(encoding="utf-8")
    shown = [row for _, row in LEDGERS.read(place / "runs/one/rows.json").shown]
    by_place = sorted(shown, key=lambda row: (row.source, row.line))  # the first four are clicked
    changed, untouched = by_place[0].row, by_place[-1].row
    before = [
        {"row": "0" * 32, "fix": "leave-out", "place": "rows.jsonl:99"},
        {"row": changed, "fix": "keep"},
        {"row": untouched, "fix": "replace", "answer": 'so "it" is'},
    ]
    seen = used(page.replace('data-fixes="[]"', f'data-fixes="{escape(json.dumps(before))}"'), tmp_path)
    found = {fix.row: (fix.fix, fix.answer) for fix in seen["fixes"]}
    assert found["0" * 32] == found[changed] == ("leave-out", "")
    assert found[untouched] == ("replace", 'so "it" is')
    assert (len(found), seen["told"]) == (5, "5 decided, 2 of them before")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_browser_runs_the_script_of_the_page_and_no_other(place, tmp_path):
    page = (place / "runs/one/report.html").read_text(encoding="utf-8")
    other = '<script>document.title = "another script"</script><img src="x.png" onerror="document.title = 1">'
    (tmp_path / "page.html").write_text(page.replace("</body>", other + "</body>"), encoding="utf-8")
    done = opened(tmp_path / "page.html", tmp_path)
    assert "<title>one</title>" in done.stdout
    assert re.search(r'class="count muted">\d+ of \d+ rows<', done.stdout)  # which our script has written


def used(page: str, tmp_path: Path) -> dict:
    """Return what USE_THE_PAGE saw on ``page``, with the fixes that it wrote."""
    page = re.sub("<meta http-equiv[^>]*>", "", page).replace("</body>", USE_THE_PAGE + "</body>")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    done = opened(tmp_path / "page.html", tmp_path)
    seen = json.loads(unescape(re.findall("<title>(.*?)</title>", done.stdout, re.DOTALL)[0]))
    (tmp_path / "fixes.jsonl").write_text(seen["file"], encoding="utf-8")
    return seen | {"fixes": list(read_fixes(str(tmp_path / "fixes.jsonl")).by_row.values())}


def opened(page: Path, tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", page.absolute().as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
