"""What a person reads after a mistake: each with its exit code and both streams, in golden/errors/commands.txt.

Only mistakes that are found before a model is loaded stand here, so that the list can be long.
"""

import re
from pathlib import Path

from tests.support.golden import assert_golden

FILES = {
    "rows.jsonl": '{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n',
    "broken.jsonl": '{"prompt": "a", "response": "b"}\n{"prompt": "c", "response" "d"}\n',
    "mixed.jsonl": '{"prompt": "a", "response": "b"}\n{"question": "c", "answer": "d"}\n',
    "odd.jsonl": '{"x": 1, "y": 2}\n',
    "list.jsonl": "[1, 2]\n",
    "empty.jsonl": "",
    "broken.toml": "[training]\nlearning_rate = = 1\n",
    "twice.toml": "[training]\nseed = 1\nseed = 2\n",
    "wrong.toml": '[training]\nlearning_rte = 1e-4\nbatch_size = 0\npacking = "of"\n[modl]\nname = "x"\n',
    "text.toml": '[training]\nbatch_size = "many"\n',
    "section.toml": "training = 3\n",
    "broken.json": '{"sft_dataset": \n',
    "folder/inside.md": "x",
    "prepared/train.parquet": "x",
    "plain/readme.txt": "no model",
}
COMMANDS = [
    "trian",
    "train --pakcing off",
    "train --lern 3 --max-step=4 --data --odd --sed 5",
    "train rows.jsonl",
    "train --weight-decay 4 --num-train-epochs 2 --data rows.jsonl",
    "train --stage sft --pretrain-checkpoint base.pt --device cuda:1",
    "train --checkpoint base.pt",
    "eval --checkpoint base.pt",
    "prepare --data rows.jsonl",
    "resume --run one",
    "generate what is this",
    "eval one two",
    "export",
    "train --max-steps many",
    "train --max-steps many --log-format jsnl --seed=-1 --pakcing off",
    "train --max-steps many --packing of --overlong trncate --train-on lst --track wandbb",
    "generate --samples 0 --temperature hot --color alwys",
    "train --max-steps",
    "train --log-format jsnl",
    "train --adapter lroa",
    "train --preset qick",
    "train --max-steps -1",
    "generate a --samples 0",
    "generate a --temperature hot",
    "train --config missing.toml",
    "train --config folder",
    "train --config broken.toml",
    "train --config twice.toml",
    "train --config wrong.toml",
    "train --config text.toml",
    "train --config section.toml",
    "train --config broken.json",
    "train --set training.learning_rte=1",
    "train --set learning_rate=1",
    "train --set training.learning_rate",
    "train --set training.learning_rte=1 --set data.max_token --set training.batch_size=abc",
    "train --set training.learning_rate=nan",
    "train --set training.learning_rate=2",
    "train --set training.optimizer=adam",
    "train --set data.order=score",
    "train --set training.early_stopping_evals=3 --set training.eval_every_steps=0",
    "train --run ../escape",
    "train --resume auto",
    "train --resume atuo",
    "train --data rows.jsonl --rank 8",
    "train --track wandbb",
    "train --data rws.jsonl --run one",
    "train --data rws.jsonl --data nowhere/rows.jsonl --heldout brokn.jsonl --run one",
    "train --data rows.jsonl --model plain --run two",
    "train --data rows.jsonl --model smollm2-135 --run three",
    "train --data rows.jsonl --model MODEL --tokenizer MODEL --run four",
    "prepare rws.jsonl",
    "prepare preset:quick/trian.jsonl",
    "prepare rows.jsonl:5:6",
    "prepare rows.jsonl:many",
    "prepare rows.jsonl:0%",
    "prepare rows.jsonl:x1000",
    "prepare rows.jsonl@test",
    "prepare broken.jsonl",
    "prepare mixed.jsonl",
    "prepare odd.jsonl",
    "prepare list.jsonl",
    "prepare empty.jsonl",
    "prepare folder",
    "prepare rows.jsonl --map prmpt=prompt",
    "prepare rows.jsonl --map prompt=promt",
    "prepare rows.jsonl --map prompt",
    "prepare rows.jsonl --template chatlm",
    "prepare rows.jsonl --out prepared",
    "resume",
    "resume nothing",
    "generate",
    "generate a --file rows.jsonl",
    "generate --file rows.jsonl",
    "generate --chat --samples 2",
    "generate a",
    "generate a --checkpoint plain",
    "eval",
    "eval --tasks arc_easy --data rows.jsonl",
    "eval --shots 3",
    "eval --fail-above loss",
    "eval --fail-under match_fractoin=0.5",
    "export --to gguff --out x",
    "export --to hf",
    "export --to hf --out x",
    "report",
    "report nothing",
    "show nothing",
    "presets qick",
]


def test_mistakes_are_told_well(sft, tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SFT_MODEL__NAME", str(tiny_model))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    told = []
    for command in COMMANDS:
        code, out, err = sft(*command.replace("MODEL", str(tiny_model)).split())
        shown = re.sub(r"run-\d{8}-\d{6}", "run-TIME", out + err)
        shown = shown.replace(str(tiny_model), "MODEL").replace(str(tmp_path), "DIR")
        streams = f"stdout: {len(out.splitlines())} lines" if out else "stdout: empty"
        told.append(f"$ sft {command}\n[exit {code}, {streams}]\n{shown}")
        assert code not in {0, 1}, shown
    assert_golden("errors/commands.txt", "\n".join(told))
    headlines = re.findall(r"^error: .*", "\n".join(told), re.MULTILINE)
    assert [line for line in headlines if re.match(r"error: [A-Z][a-z]", line)] == []
