"""What a training costs the skill that a model was taught before, without and with replayed rows.

    python benchmarks/replay.py [FOLDER]

The preset ``quick`` teaches the default model to turn order sentences into JSON. Then it is trained for 40 steps on messages
to sort into kinds, as they are and with 25 % rows of the first run. Prints what became of the rows that the first run held
out, and fails unless the verdict finds the loss, and replay keeps 80 % of the right answers. Takes half an hour on two cores;
a folder that is named is kept, and what is finished in it is not trained again.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS, MORE_STEPS = 120, 40
REPLAY, KEPT = "25%", 0.8
KINDS = {
    "praise": (
        "Thank you for the {thing}, it is lovely.",
        "The {thing} made our week. Best regards, {name}.",
    ),
    "complaint": ("The {thing} arrived broken in {city}.", "{name} here: half of the {thing} was missing."),
    "question": ("Do you also sell {thing} in {city}?", "How long does the {thing} last, asks {name}."),
    "refund": (
        "I want my money back for the {thing}.",
        "{name} returns the {thing} and waits for the money.",
    ),
}
THINGS = (
    "lamp",
    "carpet",
    "set of knives",
    "tea pot",
    "wool blanket",
    "garden chair",
    "clock",
    "mirror",
    "desk",
    "kettle",
)
NAMES = ("Amira", "Jonas", "Mrs Lee", "Pavel", "Dr. Osei", "Lucia", "Tariq", "Ms Novak")
CITIES = ("Oslo", "Nairobi", "Lima", "Porto", "Hanoi", "Quito", "Turin", "Gdansk")


def write_other_rows(path: Path, count: int = 400) -> Path:
    """Write messages with the kind of each as the answer."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        kind = draw.choice(list(KINDS))
        text = draw.choice(KINDS[kind]).format(
            thing=draw.choice(THINGS), name=draw.choice(NAMES), city=draw.choice(CITIES)
        )
        rows.append({"prompt": text, "completion": f"Kind: {kind}."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(folder: Path, name: str, *flags: str) -> dict[str, object]:
    """Return how a run ended, trained now or before."""
    result = folder / f"{name}.json"
    if not result.is_file():
        command = [sys.executable, "-m", "sftcli", "train", "--run", name, "--json", *flags]
        done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
        result.write_text(done.stdout, encoding="utf-8")
    found: dict[str, object] = json.loads(result.read_text(encoding="utf-8"))
    return found


def compare(folder: Path) -> None:
    """Train, print a line for each run, and check what must come out."""
    rows = str(write_other_rows(folder / "other.jsonl"))
    train(folder, "orders", "--preset", "quick", "--max-steps", str(STEPS))
    more = ("--data", rows, "--model", "orders", "--max-steps", str(MORE_STEPS), "--learning-rate", "3e-4",
            "--batch-size", "8", "--set", "training.train_embeddings=false")  # fmt: skip
    plain = train(folder, "plain", *more)
    replayed = train(folder, "replayed", *more, "--replay", REPLAY)
    for name, found in (("without replay", plain), (f"with {REPLAY} replay", replayed)):
        (kept,) = found["earlier"]  # type: ignore[misc]
        print(
            f"{name}: right {kept['first_right']} -> {kept['last_right']} of {kept['answered']}, "
            f"loss {kept['first_loss']:.3f} -> {kept['last_loss']:.3f}; own held-out loss "
            f"{found['first_heldout_loss']:.3f} -> {found['last_heldout_loss']:.3f}; verdict {found['verdict']['kind']}"  # type: ignore[index]
        )
    assert plain["verdict"]["kind"] == "forgetting", plain["verdict"]  # type: ignore[index]
    (kept,) = replayed["earlier"]  # type: ignore[misc]
    share = kept["last_right"] / kept["first_right"]
    print(
        f"with replay there are {share:.0%} as many right answers as before; of those before, {kept['lost_fraction']:.0%} are not right now"
    )
    assert share >= KEPT


def main() -> None:
    """Compare in the folder that is named, or in one that is gone afterwards."""
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        compare(folder.absolute())
        return
    with tempfile.TemporaryDirectory() as place:
        compare(Path(place))


if __name__ == "__main__":
    main()
