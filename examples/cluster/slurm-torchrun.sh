#!/bin/bash
#SBATCH --job-name=sft
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=sft-%j.log
# One training on all GPUs of four nodes that goes on with fewer when one is lost: torchrun starts the processes of the others again.
# The first node keeps the meeting point; when that one is lost, the job goes back into the queue, as it does out of time.
# usage: sbatch slurm-torchrun.sh FLAGS OF sft train...; the run folder, the rows and the model are on a shared drive
set -uo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else torchrun sends processes to the store of a node that is gone
srun --no-kill --kill-on-bad-exit=0 --wait=0 torchrun --nnodes "1:$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 10 \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 240 \
  -m -- sftcli train --resume auto "$@" &
step=$!
out_of_time=
trap 'out_of_time=1; kill -USR1 "$step"' USR1

while true; do # a signal that the trap has handled ends `wait` early
  wait "$step"
  status=$?
  kill -0 "$step" 2>/dev/null || break
done
is_lost= # the status of a node that was lost is above 128; if the others have finished, the next start finds the run complete
[ "$status" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ] && is_lost=1
if [ "$status" -ne 0 ] && [ -n "$out_of_time$is_lost" ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
