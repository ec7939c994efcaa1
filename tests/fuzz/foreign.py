"""Files of others: models and adapters in each of their formats, rows in each of theirs, templates, prompts and settings."""

import gzip
import io
import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import torch
from pyarrow import ipc, parquet
from safetensors.torch import load_file, save_file

from sftcli.data.conversations.heldout_split import row_key
from sftcli.data.conversations.messages import Conversation, Message
from sftcli.data.reading.record import Origin
from tests.fuzz.damage import FORMS
from tests.fuzz.runner import sft_in_child
from tests.fuzz.targets import Target
from tests.support.foreign_adapter import foreign_adapter
from tests.support.runs import write_rows
from tests.support.tiny_gguf import build_tiny_gguf
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_modern import build_tiny_pt

_ROWS = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(12)]
_SHORT = "--max-steps 1 --batch-size 4 --run fuzzed --set training.precision=fp32 -q"
_TRAIN = f"train --data rows.jsonl {_SHORT}"
_ASK = "generate Hi --max-new-tokens 2"


def make_model(folder: Path) -> None:
    """A model, one in two files, and one that has an adapter, with rows, prompts and a template."""
    build_tiny_model(folder / "model")
    build_tiny_model(folder / "parts")
    _split(folder / "parts")
    foreign_adapter(folder / "model", folder / "adapter", r=2, target_modules=["q_proj", "v_proj"])
    write_rows(folder / "rows.jsonl")
    (folder / "model" / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}', encoding="utf-8")
    (folder / "own.jinja").write_bytes((folder / "model" / "chat_template.jinja").read_bytes())
    sft_in_child("prepare -q rows.jsonl --model model")  # the tokenizer is known then


def make_files(folder: Path) -> None:
    """A model in one file of either kind."""
    build_tiny_model(folder / "model")
    build_tiny_gguf(folder / "model", folder / "m.gguf")
    build_tiny_pt(folder / "m.pt")
    write_rows(folder / "rows.jsonl")
    sft_in_child("prepare -q rows.jsonl --model model")


def make_rows(folder: Path) -> None:
    """Rows, prompts and settings, in each form."""
    build_tiny_model(folder / "model")
    lines = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
    table = pa.table({"question": [row["question"] for row in _ROWS], "answer": [row["answer"] for row in _ROWS],
                      "took": pa.array([5] * len(_ROWS), pa.duration("s")), "tags": [["a", "b"]] * len(_ROWS)})  # fmt: skip
    parquet.write_table(table, folder / "rows.parquet")
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    with pa.OSFile(str(folder / "stream.arrow"), "wb") as sink, ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    text = {
        "rows.jsonl": lines,
        "rows.json": json.dumps(_ROWS).encode(),
        "rows.jsonl.gz": gzip.compress(lines),
        "rows.csv": ("question,answer\n" + "".join('"{question}","{answer}"\n'.format(**row) for row in _ROWS)).encode(),
        "rows.yaml": "".join("- question: {question}\n  answer: {answer}\n".format(**row) for row in _ROWS).encode(),
        "rows.txt": b"The ferry leaves at seven. " * 9,
        "prompts.jsonl": b'{"prompt": "Hi"}\n{"prompt": "What is 1?"}\n',
        "prompts.txt": b"Hi\nWhat is 1?\n",
        "set.toml": b'[training]\nmax_steps = 1\nlearning_rate = 1e-3\n[data]\nsources = ["rows.jsonl"]\n',
        "set.yaml": b"training:\n  max_steps: 1\n  learning_rate: 0.001\ndata:\n  sources: [rows.jsonl]\n",
        "set.json": b'{"max_steps": 1, "learning_rate": 0.001, "lr_scheduler_type": "cosine"}',
    }  # fmt: skip
    for name, content in text.items():
        (folder / name).write_bytes(content)
    with pa.CompressedOutputStream(pa.OSFile(str(folder / "rows.jsonl.zst"), "wb"), "zstd") as packed:
        packed.write(lines)
    (folder / "fixes.jsonl").write_text("".join(json.dumps(fix) + "\n" for fix in _fixes()), encoding="utf-8")
    sft_in_child("prepare -q rows.jsonl --model model")


def _fixes() -> Iterator[dict[str, str]]:
    """Yield a fix of each kind, of the first rows."""
    kinds = (
        {"fix": "leave-out"},
        {"fix": "replace", "answer": "It is none."},
        {"fix": "keep", "place": "rows.jsonl:3"},
    )
    for row, fix in zip(_ROWS, kinds, strict=False):
        turns = (
            Message(role="user", content=row["question"]),
            Message(role="assistant", content=row["answer"], trained=True),
        )
        conversation = Conversation(messages=turns, origin=Origin(path="rows.jsonl", line=1))
        yield {"row": row_key(conversation).hex(), **fix}


def _split(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / part, metadata={"format": "pt"})
    places = {name: part for part, inside in parts.items() for name in inside}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "model.safetensors").unlink()


# Structures inside of files that are no text.


def _read_header(content: bytes, random: Random) -> dict[str, Any]:
    return {"root": json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])}


def _write_header(tree: dict[str, Any], content: bytes) -> bytes:
    text = json.dumps(tree["root"]).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]


_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


class _Gguf:
    """Reads and writes the head of a GGUF file."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 4

    def number(self, form: str) -> Any:
        try:
            (found,) = struct.unpack_from("<" + form, self.content, self.at)
        except struct.error as error:
            raise ValueError("it is damaged already") from error
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        size = self.number("Q")
        self.at += size
        return self.content[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.number("I"), self.number("Q")
            return [inner, *(self.value(inner) for _ in range(count))]
        if kind not in _PLAIN:
            raise ValueError("it is damaged already")
        return self.number(_PLAIN[kind])


def _read_gguf(content: bytes, random: Random) -> dict[str, Any]:
    file = _Gguf(content)
    version, tensors, values = file.number("I"), file.number("Q"), file.number("Q")
    found: dict[str, Any] = {}
    for _ in range(values):
        key, kind = file.text(), file.number("I")
        found[key] = [kind, file.value(kind)]
    infos = []
    for _ in range(tensors):
        name = file.text()
        shape = [file.number("Q") for _ in range(file.number("I"))]
        infos.append([name, shape, file.number("I"), file.number("Q")])
    return {"root": {"version": version, "values": found, "tensors": infos}, "end": file.at}


def _packed(kind: int, value: Any) -> bytes:
    if kind == 8:
        text = str(value).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text
    if kind == 9:
        inner, *items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_packed(inner, item) for item in items)
    return struct.pack("<" + _PLAIN[kind], value)


def _write_gguf(tree: dict[str, Any], content: bytes) -> bytes:
    end, root = tree.pop("end"), tree["root"]
    try:
        head = struct.pack("<IQQ", root["version"], len(root["tensors"]), len(root["values"]))
        for key, (kind, value) in root["values"].items():
            head += _packed(8, key) + struct.pack("<I", kind) + _packed(kind, value)
        for name, shape, kind, offset in root["tensors"]:
            head += _packed(8, name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    except (struct.error, KeyError, AttributeError) as error:
        raise ValueError("no such structure can be written") from error
    head = b"GGUF" + head
    return head + bytes(-len(head) % 32) + content[end + (-end % 32) :]


def _loaded(content: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    except (RuntimeError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError("it is damaged already") from error
    return found


_PLAIN_KEYS = ("config", "step", "run_name")  # of a checkpoint: what is beside tensors


def _read_pt(content: bytes, random: Random) -> dict[str, Any]:
    return {"root": {key: value for key, value in _loaded(content).items() if key in _PLAIN_KEYS}}


def _write_pt(tree: dict[str, Any], content: bytes) -> bytes:
    tensors = {key: value for key, value in _loaded(content).items() if key not in _PLAIN_KEYS}
    written = io.BytesIO()
    torch.save(tensors | tree["root"], written)
    return written.getvalue()


_READ_TOML, _WRITE_TOML = FORMS[".toml"]


def _write_settings(tree: dict[str, Any], content: bytes) -> bytes:
    if not isinstance(tree["root"], dict):
        raise ValueError("TOML has tables alone")
    return _WRITE_TOML(tree, content)


FORMS |= {
    ".safetensors": (_read_header, _write_header),
    ".gguf": (_read_gguf, _write_gguf),
    ".pt": (_read_pt, _write_pt),
    ".toml": (_READ_TOML, _write_settings),
}


def _of_model(file: str, *commands: str) -> Target:
    return Target(name=file, make=make_model, file=file, commands=commands)


def _of_rows(file: str, *commands: str) -> Target:
    every = commands or (f"prepare {file} --model model", f"prepare {file}:5 --model model")
    return Target(name=file, make=make_rows, file=file, commands=every)


_USE = (
    f"{_ASK} -m model",
    f"{_ASK} -m model --temperature 1",
    "export model --to hf --out out",
    "export model --to gguf --out out.gguf",
    "eval model --data rows.jsonl --no-base --max-rows 2",
    f"{_TRAIN} --model model",
    f"{_TRAIN} --model model --lora --rank 2",
)
_READ = (f"{_ASK} -m model", "prepare rows.jsonl --model model", f"{_TRAIN} --model model")
_ADAPTED = (
    f"{_ASK} -m adapter --base-model model",
    "export adapter --to hf --out out --base-model model",
    f"{_TRAIN} --model model --lora --rank 2 --set adapter.start_from=adapter",
)
_PARTS = (f"{_ASK} -m parts", f"{_TRAIN} --model parts", "export parts --to hf --out out")

FOREIGN = (
    _of_model("model/config.json", *_USE),
    _of_model("model/model.safetensors", *_USE),
    _of_model("model/tokenizer.json", *_READ),
    _of_model("model/tokenizer_config.json", *_READ),
    _of_model("model/special_tokens_map.json", *_READ),
    _of_model("model/generation_config.json", f"{_ASK} -m model", "export model --to hf --out out", f"{_TRAIN} --model model"),
    _of_model("model/chat_template.jinja", *_READ),
    _of_model("own.jinja", "prepare rows.jsonl --model model --template own.jinja"),
    _of_model("parts/model.safetensors.index.json", *_PARTS),
    _of_model("parts/model-00002-of-00002.safetensors", *_PARTS),
    _of_model("adapter/adapter_config.json", *_ADAPTED),
    _of_model("adapter/adapter_model.safetensors", *_ADAPTED),
    Target(name="GGUF", make=make_files, file="m.gguf", commands=(f"{_ASK} -m m.gguf", f"{_TRAIN} --model m.gguf")),
    Target(
        name="pt",
        make=make_files,
        file="m.pt",
        commands=(f"{_ASK} -m m.pt --tokenizer model", f"{_TRAIN} --model m.pt --tokenizer model"),
    ),
    *map(_of_rows, ("rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.jsonl.zst", "rows.csv", "rows.yaml", "rows.parquet",
                    "rows.arrow", "stream.arrow")),
    _of_rows("rows.txt", "prepare rows.txt --model model --as-text"),
    _of_rows("prompts.jsonl", "generate --file prompts.jsonl --out answers.jsonl -m model --max-new-tokens 2"),
    _of_rows("prompts.txt", "generate --file prompts.txt --out answers.jsonl -m model --max-new-tokens 2"),
    _of_rows("fixes.jsonl", "prepare rows.jsonl --model model --fixes fixes.jsonl"),
    *(_of_rows(file, f"train --config {file} --data rows.jsonl --model model {_SHORT}") for file in ("set.toml", "set.yaml", "set.json")),
)  # fmt: skip
