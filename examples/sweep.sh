#!/bin/sh
# Try learning rates, print the held-out loss of each, and name the best. Started again, it resumes where it stopped.
# usage: sweep.sh ROWS "RATE RATE..." [FLAGS OF sft train...]
set -eu
rows=$1 rates=$2
shift 2

for rate in $rates; do
  sft train --data "$rows" --run "rate-$rate" --resume auto --set training.learning_rate="$rate" --quiet "$@" >/dev/null
done
sft runs --json | python3 -c '
import json, sys
names = {"rate-" + rate for rate in sys.argv[1:]}  # those of an earlier sweep are not compared
runs = [run for run in json.load(sys.stdin)["runs"] if run["name"] in names]
runs.sort(key=lambda run: run["heldout_loss"])
for run in runs:
    print(run["name"], round(run["heldout_loss"], 4))
print("best:", runs[0]["name"])
' $rates
