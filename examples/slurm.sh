#!/bin/bash
#SBATCH --job-name=sft
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# A run that is longer than its time limit. Slurm sends USR1 five minutes before the end; sft saves and ends with 75, and the
# job is requeued. After the restart, `--resume auto` resumes bit for bit.
# usage: sbatch slurm.sh ROWS [FLAGS OF sft train...]
set -uo pipefail
rows=$1
shift

sft train --data "$rows" --run "slurm-${SLURM_JOB_ID:-0}" --resume auto "$@" &
training=$!
trap 'kill -USR1 "$training"' USR1

status=1
while true; do # a signal that the trap has handled ends `wait` early
  wait "$training"
  status=$?
  kill -0 "$training" 2>/dev/null || break
done
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
