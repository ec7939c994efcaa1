"""What ``sft prepare`` makes of real files, each without any flag about its format, as a table in Markdown.

    python benchmarks/files.py --model FOLDER FOLDER_OF_FILES

Files in folders called ``text`` are passed over. No text of a row is printed.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

SUFFIXES = {".json", ".jsonl", ".parquet", ".csv"}


def main() -> None:
    """Prepare every file, and print a line of the table for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder, file or name of a model")
    parser.add_argument("--max-tokens", default="512")
    parser.add_argument("--template", help="chat template in place of the model's own")
    parser.add_argument("--only", default="", help="part of the names of the files that are taken")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print("| File | Read as | Rows in | Kept | Rejected | Supervised tokens |")
    print("|---|---|--:|--:|---|--:|")
    failed = False
    for path in sorted(arguments.folder.rglob("*")):
        if (
            path.suffix in SUFFIXES
            and arguments.only in str(path)
            and "text" not in path.parts
            and path.is_file()
        ):
            failed |= not show(path, arguments)
    sys.exit(1 if failed else 0)


def show(path: Path, arguments: argparse.Namespace) -> bool:
    """Print the line of one file; return whether it could be prepared."""
    name = path.relative_to(arguments.folder)
    command = [sys.executable, "-m", "sftcli", "prepare", str(path), "--model", arguments.model]
    command += ["--max-tokens", arguments.max_tokens, "--set", "data.heldout_fraction=0"]
    command += ["--set", "data.max_rejected_fraction=1", "--json"]
    if arguments.template:
        command += ["--template", arguments.template]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    answer = json.loads(ended.stdout)
    if not answer["ok"]:
        message = answer["error"]["message"]
        total = re.search(r"(\d+) of \d+ were rejected", message)
        reasons = re.findall(r"[(;] ?([a-z-]+) (\d+), ", message)
        rejected = ", ".join(" ".join(reason) for reason in reasons) or message.splitlines()[0]
        print(f"| `{name}` | | {total[1] if total else '?'} | 0 | {rejected} | - |", flush=True)
        return bool(total)
    audit = answer["audit"]["train"]
    rows, kept, tokens, trained = (audit[key] for key in ("rows", "kept", "tokens", "response_tokens"))
    rejected = ", ".join(f"{reason} {count}" for reason, count in audit["rejected"].items())
    format_ = next(iter(answer["schemas"].values())).split(" rows")[0]
    share = f"{100 * trained / tokens:.1f} %" if tokens else "-"
    print(f"| `{name}` | {format_} | {rows} | {kept} | {rejected or 'none'} | {share} |", flush=True)
    return True


if __name__ == "__main__":
    main()
