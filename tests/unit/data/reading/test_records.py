import gzip
import io
import json
import os
import re
import sys
import threading

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from sftcli.data.reading import json_rows as jsonrows
from sftcli.data.reading import text_lines as textlines
from sftcli.data.reading.hub_rows import pick_split, split_rows
from sftcli.data.reading.records import fingerprint_source, read_records
from sftcli.data.reading.source import RowLimit, SourceKind, parse_source
from sftcli.errors import DataError, NetworkError, NotFoundError, StorageError, UsageError

ROWS = [{"prompt": f"p{n}", "completion": "é\u2028\n" * n} for n in range(1, 6)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file in a folder that is the current one, and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return name

    return write


def read(text, *, seed=0, note=lambda _: None):
    return list(read_records(parse_source(text), seed=seed, note=note))


def fields(text, **options):
    return [dict(record.fields) for record in read(text, **options)]


def fault(text):
    with pytest.raises(DataError) as caught:
        read(text)
    assert caught.value.location.file == text
    return caught.value


# Naming a source


@pytest.mark.parametrize(
    ("text", "name", "rows", "split", "config"),
    [
        ("Open-Orca/OpenOrca", "Open-Orca/OpenOrca", None, None, None),
        ("Open-Orca/OpenOrca:50000", "Open-Orca/OpenOrca", 50000, None, None),
        ("gsm8k:50_000@train#main", "gsm8k", 50000, "train", "main"),
        ("a/b#x.y@test", "a/b", None, "test", "x.y"),
    ],
)
def test_a_hub_name_has_rows_split_and_config_behind_it(text, name, rows, split, config):
    source = parse_source(text)
    assert (source.kind, source.name) == (SourceKind.HUB, name)
    assert (source.sample, source.split, source.config) == (rows and RowLimit(rows=rows), split, config)


@pytest.mark.parametrize("name", ["a:5@b#c.jsonl", "rows:3", "-x.jsonl", "preset:x.jsonl", "gsm8k"])
def test_a_path_that_exists_wins_as_a_whole(write, name):
    write(name, LINES)
    assert (parse_source(name).kind, parse_source(name).sample) == (SourceKind.FILES, None)
    assert parse_source(f"{name}:2").sample == RowLimit(rows=2)
    assert len(read(name)) == 5


def test_a_file_of_a_preset_is_found_wherever_one_is(write):
    write("other", "")
    assert len(read("preset:quick/heldout.jsonl:7")) == 7


@pytest.mark.parametrize(
    "text", ["rows.jsonl:0", "rows.jsonl:-1", "rows.jsonl:many", "rows.jsonl:2:2", "rows.jsonl@train", "-#c"]
)
def test_an_option_that_does_not_fit_is_refused_with_a_hint(write, text):
    write("rows.jsonl", LINES)
    with pytest.raises(UsageError) as caught:
        parse_source(text)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["data/trian.jsonl", "data/trian.jsonl:20", "./data/trian.jsonl"])
def test_a_mistyped_path_names_the_nearest_file(write, text):
    write("data/train.jsonl", LINES)
    with pytest.raises(NotFoundError, match=r"trian\.jsonl") as caught:
        parse_source(text)
    assert caught.value.hint == "did you mean 'data/train.jsonl'?"


def test_a_folder_that_is_missing_too_is_said(write):
    write("other", "")
    with pytest.raises(NotFoundError) as caught:
        parse_source("nowhere/train.jsonl")
    assert caught.value.hint == "there is no folder 'nowhere' either"


def test_a_name_that_may_be_of_the_hub_says_that_neither_was_found(write):
    write("trainset", LINES)
    with pytest.raises(
        NetworkError, match="no file 'trainst', and the hub dataset of that name cannot be reached"
    ) as caught:
        read("trainst")
    assert caught.value.hint.startswith("did you mean 'trainset'?")
    assert "hf download --repo-type dataset trainst" in caught.value.hint


# Kinds of files


def table():
    return pa.Table.from_pylist(ROWS)


def parquet_bytes():
    sink = io.BytesIO()
    parquet.write_table(table(), sink, row_group_size=2)
    return sink.getvalue()


def arrow_bytes(writer):
    sink = io.BytesIO()
    with writer(sink, table().schema) as out:
        out.write_table(table(), max_chunksize=2)
    return sink.getvalue()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.output_stream(sink, compression="zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


CSV = 'prompt,completion\np1,"a ""b"", c"\r\n\n"p\n2",\n'


@pytest.mark.parametrize(
    ("name", "data", "first_line"),
    [
        ("rows.jsonl", LINES, 1),
        ("rows.ndjson", LINES.rstrip(b"\n"), 1),
        ("rows", LINES, 1),
        ("windows.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"), 1),
        ("blank.jsonl", b"\n  \n" + LINES.replace(b"\n", b"\n\n"), 3),
        ("rows.json", json.dumps(ROWS), 1),
        ("pretty.json", json.dumps(ROWS, indent=2), 2),
        ("array.jsonl", b"\n" + json.dumps(ROWS).encode() + b"\n\n", 2),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0), 1),
        ("rows.jsonl.zst", zstd(LINES[:70]) + zstd(LINES[70:]), 1),
        ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0), 1),
        ("rows.parquet", parquet_bytes(), 1),
        ("rows.arrow", arrow_bytes(ipc.new_file), 1),
        ("stream.arrow", arrow_bytes(ipc.new_stream), 1),
    ],
)
def test_the_same_rows_come_out_of_every_kind_of_file(write, name, data, first_line):
    write(name, data)
    records = read(name)
    assert [dict(record.fields) for record in records] == ROWS
    assert str(records[0].origin) == f"{name}:{first_line}"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.csv", CSV),
        ("rows.tsv", CSV.replace(",", "\t")),
        ("rows.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
    ],
)
def test_tables_of_text_keep_quotes_and_line_ends_and_know_their_lines(write, name, data):
    write(name, data)
    records = read(name)
    assert [record.origin.line for record in records] == [2, 4]
    separator = "\t" if name.endswith("tsv") else ","
    assert [dict(record.fields) for record in records] == [
        {"prompt": "p1", "completion": f'a "b"{separator} c'},
        {"prompt": "p\n2", "completion": ""},
    ]


def test_a_pretty_array_gives_the_line_on_which_each_row_begins(write):
    write("rows.json", '[\n  {\n    "text": "a\\n"\n  },\n\n  {"text": "b"}, {"text": "c"}\n]\n')
    assert [record.origin.line for record in read("rows.json")] == [2, 6, 6]


def test_a_folder_gives_its_files_in_order_and_says_what_it_skips(write):
    write("all/b.jsonl", LINES)
    write("all/a.csv", CSV)
    write("all/.hidden.jsonl", "broken")
    write("all/README.md", "text")
    write("all/dataset_info.json", "{}")
    notes = []
    assert [record.origin.path for record in read("all", note=notes.append)] == ["all/a.csv"] * 2 + [
        "all/b.jsonl"
    ] * 5
    assert notes == ["all: skipped, not a known data format: README.md"]


def test_standard_input_is_json_lines_or_an_array(monkeypatch):
    for data in (LINES, json.dumps(ROWS).encode()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        records = read("-")
        assert [dict(record.fields) for record in records] == ROWS
        assert records[0].origin.path == "stdin"


def test_a_named_pipe_can_be_read_twice(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(LINES,))
    writer.start()
    source = parse_source(f"{tmp_path}/pipe:5")
    writer.join()
    first, again = (list(read_records(source, seed=0)) for _ in range(2))
    assert [dict(record.fields) for record in first] == ROWS
    assert first == again
    assert first[0].origin.path == f"{tmp_path}/pipe"


def test_a_terminal_is_not_waited_for(monkeypatch):
    terminal, other = os.openpty()
    with os.fdopen(other) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(UsageError, match="standard input is a terminal"):
            parse_source("-")
    os.close(terminal)


def test_a_byte_order_mark_is_noted_once_even_when_the_file_is_read_twice(write):
    write("rows.jsonl", b"\xef\xbb\xbf" + LINES)
    notes = []
    read("rows.jsonl:3", note=notes.append)
    assert notes == ["rows.jsonl: starts with a byte order mark, which is skipped"]


def test_the_last_of_two_equal_keys_counts(write):
    write("rows.jsonl", '{"text": "a", "text": "b"}')
    assert fields("rows.jsonl") == [{"text": "b"}]


@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=9) | st.integers() | st.none()),
        min_size=1,
        max_size=9,
    ),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_whatever_json_can_hold_comes_back(tmp_path_factory, rows, ascii_only, indent):
    folder = tmp_path_factory.mktemp("json")
    rows = json.loads(json.dumps(rows).replace("\\u0000", "0"))
    (folder / "a.json").write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    (folder / "b.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows), encoding="utf-8"
    )
    assert fields(str(folder)) == rows * 2


# Samples


def test_a_sample_keeps_the_order_and_is_the_same_on_every_machine(write):
    write("rows.jsonl", "".join(f'{{"text": "{n}"}}\n' for n in range(1000)))
    assert [int(row["text"]) for row in fields("rows.jsonl:8", seed=5)] == [
        29,
        366,
        547,
        587,
        629,
        737,
        778,
        804,
    ]


def test_a_smaller_sample_is_part_of_a_larger_one(write):
    write("rows.jsonl", "".join(f'{{"text": "{n}"}}\n' for n in range(200)))
    small, large = ({row["text"] for row in fields(f"rows.jsonl:{size}")} for size in (20, 60))
    assert small < large


def test_a_pipe_gives_the_sample_that_a_file_gives(write, monkeypatch):
    write("rows.jsonl", LINES)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    assert fields("-:3", seed=4) == fields("rows.jsonl:3", seed=4)


def test_a_sample_is_neither_the_first_rows_nor_the_same_for_every_seed(write):
    write("rows.jsonl", "".join(f'{{"text": "{n}"}}\n' for n in range(100)))
    samples = {tuple(row["text"] for row in fields("rows.jsonl:10", seed=seed)) for seed in range(5)}
    assert len(samples) == 5
    assert tuple(map(str, range(10))) not in samples


@pytest.mark.parametrize(
    ("rows", "sample", "times"),
    [
        ("20", RowLimit(rows=20), 1),
        ("25%", RowLimit(percent=25), 1),
        ("0.5%", RowLimit(percent=0.5), 1),
        ("x3", None, 3),
        ("20x3", RowLimit(rows=20), 3),
        ("50%x2", RowLimit(percent=50), 2),
    ],
)
def test_rows_are_a_number_a_share_and_a_repetition(write, rows, sample, times):
    write("rows.jsonl", LINES)
    source = parse_source(f"rows.jsonl:{rows}")
    assert (source.name, source.sample, source.times) == ("rows.jsonl", sample, times)
    assert parse_source(f"Open-Orca/OpenOrca:{rows}@train").times == times


@pytest.mark.parametrize("rows", ["0", "0%", "101%", "x0", "x101", "3x", "1.5", "x1.5", "%", "train"])
def test_rows_of_another_form_are_refused_with_the_grammar(write, rows):
    write("rows.jsonl", LINES)
    with pytest.raises(UsageError) as caught:
        parse_source(f"rows.jsonl:{rows}")
    assert "5000x3" in caught.value.hint


@pytest.mark.parametrize(("share", "count"), [("100%", 100), ("25%", 25), ("2.4%", 2), ("0.1%", 1)])
def test_a_share_is_that_many_rows_and_the_sample_of_that_number(write, share, count):
    write("rows.jsonl", "".join(f'{{"text": "{n}"}}\n' for n in range(100)))
    taken = fields(f"rows.jsonl:{share}")
    assert len(taken) == count
    assert taken == fields(f"rows.jsonl:{count}")


def test_more_rows_than_there_are_is_refused(write):
    write("rows.jsonl", LINES)
    with pytest.raises(UsageError, match="asks for 6 rows, but there are only 5"):
        read("rows.jsonl:6")


# Faults of files


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.jsonl",
            '{"a": "1"}\n{"a": "2", x}\n',
            'a.jsonl:2:12: broken JSON: Expecting property name enclosed in double quotes\n  {"a": "2", x}\n             ^',
        ),
        (
            "b.jsonl",
            '{"a": "1"}\n{"a": "2"',
            'b.jsonl:2:10: the last line is truncated\n  {"a": "2"\n           ^',
        ),
        (
            "c.jsonl",
            '{"a": "1"}\n{"a": "2\n',
            'c.jsonl:2:9: the last line is truncated\n  {"a": "2\n          ^',
        ),
        (
            "d.json",
            '{\n  "data": [\n  ]\n}\n{\n  "data" [1]\n}',
            "d.json:6:10: broken JSON: Expecting ':' delimiter\n    \"data\" [1]\n           ^",
        ),
        (
            "d.jsonl",
            '{"a": "1"\n{"a": "2"}\n',
            'd.jsonl:2:1: broken JSON: Expecting \',\' delimiter\n  {"a": "2"}\n  ^',
        ),
        (
            "e.json",
            '[\n{"a": 1},\n{"a" 2}\n]',
            "e.json:3:6: broken JSON: Expecting ':' delimiter\n  {\"a\" 2}\n       ^",
        ),
        (
            "f.json",
            '[{"a": 1},\n{"a": 2}',
            "f.json:2:9: the array is truncated: it has no closing ']'\n  {\"a\": 2}\n          ^",
        ),
        (
            "g.json",
            '[{"a": 1},\n{"a": ',
            'g.json:2:7: the array is truncated or broken: Expecting value\n  {"a": \n        ^',
        ),
        (
            "h.json",
            '[{"a": 1}\n{"a": 2}]',
            "h.json:2:1: broken JSON: expected ',' or ']'\n  {\"a\": 2}]\n  ^",
        ),
        ("i.json", '[{"a": 1},\n]', "i.json:2:1: broken JSON: a row is missing after ','\n  ]\n  ^"),
        ("j.json", '[{"a": 1}]\n[]', "j.json:2:1: text after the end of the array\n  []\n  ^"),
        (
            "k.jsonl",
            '{"a": "1"}\n"text"\n',
            "k.jsonl:2: the row is text, expected an object with named columns",
        ),
        ("l.json", '[{"a": 1},\n null]', "l.json:2: the row is null, expected an object with named columns"),
        (
            "m.jsonl",
            b'{"a": "1"}\n{"a": "caf\xe9"}\n',
            "m.jsonl:2: byte 0xe9 at byte 21 of the file is not UTF-8",
        ),
        (
            "n.json",
            b'[{"a": 1},\n{"a": "\x93hi\x94"}]',
            "n.json:2: byte 0x93 at byte 18 of the file is not UTF-8",
        ),
        (
            "o.jsonl",
            '{"a": "1"}\n{"a": "\\ud83d"}\n',
            'o.jsonl:2: "a" holds half of a surrogate pair (\\ud83d)',
        ),
        ("p.jsonl", '{"a": ["x", {"b": "\\u0000"}]}\n', 'p.jsonl:1: "a" holds a NUL character (\\u0000)'),
        ("q.jsonl", b'{"a": 1}\n{"a": "\0"}\n', "q.jsonl:2: a NUL byte stands at byte 16 of the file"),
        ("r.jsonl", '{"a": "1"}\n'.encode("utf-32"), "r.jsonl:1: the file is UTF-32, expected UTF-8"),
        (
            "s.jsonl",
            '{"a": "1"}\n'.encode("utf-16-le"),
            "s.jsonl:1: the file is UTF-16 without a byte order mark, expected UTF-8",
        ),
        ("s.csv", "a\nx\n".encode("utf-16")[:-1], "s.csv:2: broken UTF-16: truncated data"),
        (
            "a.yaml",
            "- prompt: p\n- just text\n",
            "a.yaml:2: the row is text, expected an object with named columns",
        ),
        ("b.yaml", "- prompt: [p\n", "b.yaml:2:1: broken YAML: did not find expected ',' or ']'"),
        (
            "c.yaml",
            "- prompt: !!python/name:os.system x\n",
            "c.yaml:1:11: broken YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
        ),
        ("d.yaml", "a: &a [x, x]\nb: &b [*a, *a]\n", "d.yaml:2: the alias *a repeats a list or an object"),
        (
            "e.yaml",
            "a: " + "[" * 200 + "]" * 200,
            "e.yaml:1: lists and objects are nested more than 100 deep",
        ),
        ("f.yaml", "- 7: x\n", "f.yaml:1: the name 7 is a number, expected text"),
        ("h.yaml", "- a: x\n- a: !!int x\n", "h.yaml:2:6: broken YAML: the value is no int"),
        ("g.yaml", "- a: !!binary aGk=\n", "g.yaml:1: a value is bytes, expected a plain one"),
        ("h.yml", "", "h.yml: no rows"),
        ("t.jsonl", "", "t.jsonl: no rows"),
        ("u.jsonl", "\n\n", "u.jsonl: no rows"),
        ("v.json", "[]", "v.json: no rows"),
        (
            "w.jsonl",
            '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "w.jsonl:1: lists and objects are nested more than 100 deep",
        ),
        (
            "x.json",
            '[{"a": ' + "[" * 200 + "]" * 200 + "}]",
            "x.json:1: lists and objects are nested more than 100 deep",
        ),
        (
            "y.jsonl",
            '{"a": ' + "9" * 5000 + "}",
            "y.jsonl:1: broken JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits",
        ),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv:3: the row has 3 fields, the header has 2"),
        (
            "b.csv",
            'a,b\n1,2\n1,"2\n3\n',
            "b.csv:3: broken CSV in the row that begins here: unexpected end of data",
        ),
        ("c.csv", "a,a\n1,2\n", "c.csv:1: the header has two columns 'a'"),
        ("d.csv", "a,\n1,2\n", "d.csv:1: column 2 has no name in the header"),
        (
            "e.csv",
            "a;b\n1;2\n",
            "e.csv:1: the header has one column only and looks not separated by ','",
        ),
        ("f.csv", "a,b\n", "f.csv: no rows"),
        ("g.csv", "", "g.csv: no rows"),
        ("a.txt", " \n", "a.txt: no rows"),
        ("b.txt", b"caf\xe9", "b.txt:1: byte 0xe9 at byte 3 of the file is not UTF-8"),
        ("a.xlsx", "PK", "a.xlsx: rows cannot be read from a .xlsx file"),
        ("a.parquet.gz", "PK", "a.parquet.gz: rows cannot be read from a .parquet.gz file"),
        (
            "a.jsonl.gz",
            gzip.compress(LINES, mtime=0)[:-20],
            "a.jsonl.gz is a truncated or damaged .gz file: Compressed file ended before the end-of-stream marker was reached",
        ),
        ("b.jsonl.gz", LINES, "b.jsonl.gz is a truncated or damaged .gz file: Not a gzipped file (b'{\"')"),
        (
            "a.jsonl.zst",
            zstd(LINES)[:-5],
            "a.jsonl.zst is a truncated or damaged .zst file: Truncated compressed stream",
        ),
    ],
)
def test_a_broken_file_is_named_with_the_place_of_the_fault(write, name, data, message):
    write(name, data)
    assert fault(name).message == message


@pytest.mark.parametrize(
    ("name", "data", "hint"),
    [
        (
            "a.jsonl",
            b'{"a": "caf\xe9"}',
            "looks like Latin-1: iconv -f latin1 -t utf-8 a.jsonl > utf8-a.jsonl",
        ),
        (
            "b.jsonl",
            b'{"a": "\x93"}',
            "looks like Windows-1252: iconv -f cp1252 -t utf-8 b.jsonl > utf8-b.jsonl",
        ),
        ("c.jsonl", "{}".encode("utf-16-le"), "iconv -f utf-16le -t utf-8 c.jsonl > utf8-c.jsonl"),
        ("d.jsonl", "{}".encode("utf-16-be"), "iconv -f utf-16be -t utf-8 d.jsonl > utf8-d.jsonl"),
        ("e.jsonl", "{}".encode("utf-32"), "iconv -f utf-32 -t utf-8 e.jsonl > utf8-e.jsonl"),
    ],
)
def test_a_broken_file_comes_with_a_command_that_mends_it(write, name, data, hint):
    write(name, data)
    assert fault(name).hint == hint


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"])
def test_utf_16_is_read_and_said(write, name, encoding):
    text = CSV if name.endswith("csv") else LINES.decode()
    text = f"[{','.join(text.splitlines())}]" if name.endswith("json") else text
    data = (b"" if encoding == "utf-16" else b"\xfe\xff") + text.encode(encoding)
    notes = []
    found = fields(write(name, gzip.compress(data) if name.endswith("gz") else data), note=notes.append)
    assert found == fields(write(f"plain.{name.split('.')[1]}", text))
    assert notes == [f"{name}: is UTF-16, by its byte order mark"]


@pytest.mark.parametrize("indent", [1, 4, "\t"])
def test_objects_over_several_lines_are_rows(write, indent):
    spread = "\n".join(json.dumps(row, indent=indent, ensure_ascii=False) for row in ROWS)
    assert fields(write("rows.json", spread)) == ROWS
    assert fields(write("one.json", json.dumps(ROWS[0], indent=indent))) == ROWS[:1]
    assert [record.origin.line for record in read("rows.json")] == [1, 5, 9, 13, 17]


YAML = """\
# questions of the harbor office
- prompt: &ask Is the ferry late?
  completion: No
- prompt: *ask
  completion: |
    At 12:30.
    Until then: wait.
- prompt: When?
  completion: 2024-05-01
  score: 0.5
  seen: true
  note: ~
"""


def test_yaml_is_read_as_it_is_written(write):
    expected = [
        {"prompt": "Is the ferry late?", "completion": "No"},
        {"prompt": "Is the ferry late?", "completion": "At 12:30.\nUntil then: wait.\n"},
        {"prompt": "When?", "completion": "2024-05-01", "score": 0.5, "seen": True, "note": None},
    ]
    assert fields(write("rows.yaml", YAML)) == expected
    assert [record.origin.line for record in read("rows.yaml")] == [2, 4, 8]
    assert fields(write("rows.yml.gz", gzip.compress(YAML.encode()))) == expected
    documents = "prompt: p\ncompletion: c\n---\nprompt: 1:30\ncompletion: 010\n"
    assert fields(write("documents.yml", documents)) == [
        {"prompt": "p", "completion": "c"},
        {"prompt": "1:30", "completion": "010"},
    ]


WRITTEN = st.text("ab \u00e9\n\"'\\:#-[]{}&*!|>%@,?=~<0.5") | st.integers() | st.booleans() | st.none()


@given(st.lists(st.dictionaries(st.text("abc", min_size=1), WRITTEN), min_size=1))
def test_yaml_and_json_say_the_same(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("yaml") / "rows.yaml"
    path.write_text(json.dumps(rows), "utf-8")
    assert fields(str(path)) == rows


def test_plain_text_is_one_text_a_file_and_said(write):
    notes = []
    write("book/one.txt", "The ferry leaves at seven.\r\n\n  It returns.\n")
    write("book/two.txt", "Fog.")
    assert fields("book", note=notes.append) == [
        {"text": "The ferry leaves at seven.\r\n\n  It returns.\n"},
        {"text": "Fog."},
    ]
    assert notes == ["book: plain text, 2 texts, one a file"]


@pytest.mark.parametrize("beside", ["README.txt", "dataset.yaml"])
def test_notes_and_settings_beside_rows_are_passed_over(write, beside):
    write("data/rows.jsonl", LINES)
    write(f"data/{beside}", "license: mit")
    assert len(read("data")) == 5
    assert parse_source("data").skipped == (beside,)


def test_a_plain_text_that_is_too_long_is_refused(write, monkeypatch):
    monkeypatch.setattr(textlines, "MAX_TEXT_BYTES", 5)
    write("a.txt", "Once upon")
    assert "is not read as one text" in fault("a.txt").message


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("data", [b"PAR1 broken PAR1", b"junk", parquet_bytes()[:-9]])
def test_a_damaged_table_is_named(write, name, data):
    write(name, data)
    assert re.match(rf"{name}:? (cannot be read as|is a Parquet file)", fault(name).message)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.yaml", "a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "is a pointer of Git LFS"),
        (b"\0" * 99, "holds zeros only"),
        (b"BZh91AY&SY\0\xff", r"is compressed \(bzip2\)"),
    ],
)
def test_a_file_of_another_kind_is_told_as_what_it_is(write, name, data, message):
    write(name, data)
    assert re.match(rf"{name} {message}", fault(name).message)


def test_a_duration_that_python_has_no_number_for_is_a_fault_of_the_file(write):
    sink = io.BytesIO()
    parquet.write_table(pa.table({"a": pa.array([2**62], pa.duration("s"))}), sink)
    write("a.parquet", sink.getvalue())
    assert fault("a.parquet").message.startswith("a.parquet cannot be read as Parquet: ")


def test_a_nul_in_a_table_is_named_with_its_row(write):
    sink = io.BytesIO()
    parquet.write_table(pa.table({"a": ["x", "y\0"]}), sink)
    write("a.parquet", sink.getvalue())
    assert fault("a.parquet").message == 'a.parquet:2: "a" holds a NUL character (\\u0000)'


def test_a_long_line_shows_only_the_part_with_the_fault(write):
    write("a.jsonl", '{"a": "' + "é" * 500 + '", "b": x, "c": "' + "é" * 500 + '"}')
    *_, shown, caret = fault("a.jsonl").message.split("\n")
    assert len(shown) <= 74
    assert shown[caret.index("^")] == "x"


def test_control_characters_do_not_reach_the_terminal(write):
    write("a.jsonl", '{"a": "\x1b[31m"}')
    assert "\x1b" not in fault("a.jsonl").message


def test_a_line_without_end_is_refused_before_it_fills_the_memory(write, monkeypatch):
    monkeypatch.setattr(textlines, "MAX_LINE_BYTES", 2**20)
    write("a.jsonl", LINES + b'{"a": "' + b"x" * 2**21 + b'"}')
    assert fault("a.jsonl").message == "a.jsonl:6: the line is longer than 1 MB"


def test_an_array_that_is_too_large_is_refused_with_the_way_out(write, monkeypatch):
    monkeypatch.setattr(jsonrows, "MAX_ARRAY_BYTES", 2**20)
    write("a.json", json.dumps([{"a": "x" * 2**20}]))
    assert fault("a.json").hint == "make it one object per line: jq -c '.[]' a.json > rows.jsonl"


def test_a_file_that_grows_while_it_is_read_is_refused(write, tmp_path):
    write("a.jsonl", LINES)
    rows = read_records(parse_source("a.jsonl"), seed=0)
    next(rows)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(LINES)
    with pytest.raises(DataError, match=r"a\.jsonl: the file changed while it was read"):
        list(rows)


def test_an_empty_folder_names_the_folders_in_it(write):
    write("all/train.jsonl", LINES)
    write("outer", "")
    (parse_source("all").files[0].parent / "empty" / "inner").mkdir(parents=True)
    assert fault("all/empty").hint == "name one of its folders, such as all/empty/inner"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_storage_fault(write, tmp_path):
    write("a.jsonl", LINES)
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(StorageError, match="cannot be read: Permission denied"):
        read("a.jsonl")


# Fingerprints


def test_a_fingerprint_follows_the_content_and_the_options(write):
    write("a.jsonl", LINES)
    before = fingerprint_source(parse_source("a.jsonl"))
    assert fingerprint_source(parse_source("a.jsonl")) == before
    assert fingerprint_source(parse_source("a.jsonl:3")).content != before.content
    write("a.jsonl", LINES.replace(b"p1", b"q1"))
    assert fingerprint_source(parse_source("a.jsonl")).content != before.content


def test_a_pipe_has_the_fingerprint_of_its_rows(monkeypatch):
    prints = []
    for data in (LINES, LINES, LINES[:90]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        prints.append(fingerprint_source(parse_source("-")).content)
    assert prints[0] == prints[1] != prints[2]


# The hub, without one


def test_the_train_split_is_taken_and_said_when_none_is_named():
    notes = []
    assert pick_split({"test": 1, "train": 2}, parse_source("org/set"), notes.append) == 2
    assert notes == ["org/set: split train of test, train"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("org/set@tets", "has no split 'tets'; it has test, dev"), ("org/set", "none of them train")],
)
def test_a_split_that_is_not_there_or_not_clear_is_refused(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        pick_split({"test": 1, "dev": 2}, parse_source(text), lambda _: None)
    assert "test" in caught.value.hint


def test_rows_of_a_loaded_split_come_with_their_numbers_each_time():
    import datasets

    rows = split_rows(datasets.Dataset.from_list(ROWS), "org/set")
    assert list(rows()) == list(rows()) == list(enumerate(ROWS, 1))


def test_without_the_hub_the_copy_in_the_cache_is_used(write, tmp_path, monkeypatch):
    import datasets

    write("open_set/train.jsonl", LINES)
    cache = tmp_path / "cache"
    datasets.load_dataset(str(tmp_path / "open_set"), cache_dir=str(cache))
    (cache / "open_set").rename(cache / "org___open_set")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    notes = []
    assert fields("org/OpenSet@train", note=notes.append) == ROWS
    assert notes == ["org/OpenSet: the hub cannot be reached; using the cached copy"]
    assert fingerprint_source(parse_source("org/OpenSet")) == fingerprint_source(parse_source("org/OpenSet"))
    with pytest.raises(UsageError, match="for config 'other'"):
        read("org/OpenSet#other")
