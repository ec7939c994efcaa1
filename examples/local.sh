#!/bin/sh
# Fine-tune on your own rows, on this machine: check the rows, train, evaluate, generate.
# usage: local.sh ROWS [FLAGS OF sft train...]
set -eu
rows=$1
shift

sft prepare "$rows" --show 1 "$@" >/dev/null
sft train --data "$rows" --run local --resume auto "$@"
sft eval local
sft generate "What is two plus two?" --checkpoint local
