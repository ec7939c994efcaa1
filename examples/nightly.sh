#!/bin/sh
# A nightly fine-tune with a quality gate: the new model replaces the old one only if it is good enough.
# usage: nightly.sh ROWS BEST_LINK MAX_LOSS [FLAGS OF sft train...]
set -eu
rows=$1 link=$2 max_loss=$3
shift 3
name=nightly-$(date +%Y%m%d)

final=$(sft train --data "$rows" --run "$name" --resume auto --quiet "$@")

status=0
sft eval "$name" --no-base --fail-above "loss=$max_loss" --json >"$name.json" || status=$?
if [ "$status" -eq 3 ]; then
  echo "$name is not good enough; $link stays as it is" >&2
  exit 3
elif [ "$status" -ne 0 ]; then
  exit "$status"
fi
ln -sfn "$(realpath "$final")" "$link"
echo "$link is now $name"
