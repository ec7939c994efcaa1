#!/bin/bash
#SBATCH --job-name=sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sft-%j.log
# One training on all GPUs of two nodes, a task for each GPU. Five minutes before the time limit Slurm sends USR1: the training saves,
# and the job goes back into the queue. It does so as well, at most ten times, when a process or a node was lost.
# usage: sbatch slurm.sh FLAGS OF sft train...; the run folder, the rows and the model are on a shared drive
set -uo pipefail

# A training ends all of its tasks alike. With --kill-on-bad-exit=1 srun would kill the slower ones, and its status would be theirs.
srun --kill-on-bad-exit=0 --wait=120 sft train --resume auto "$@" &
step=$!
out_of_time=
trap 'out_of_time=1; kill -USR1 "$step"' USR1

while true; do # a signal that the trap has handled ends `wait` early
  wait "$step"
  status=$?
  kill -0 "$step" 2>/dev/null || break
done
is_lost= # the status of a task that was killed is above 128, that of the others 71
{ [ "$status" -eq 71 ] || [ "$status" -gt 128 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ] && is_lost=1
if [ "$status" -ne 0 ] && [ -n "$out_of_time$is_lost" ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
