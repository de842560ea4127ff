#!/usr/bin/env bash
# Submits both stages as a chain: the caches of train (an array of NUM_SHARDS jobs) and validation, then the student
# once all of them succeeded, requeued ones included. Logs go to the current folder.
#     ACCOUNT=my_account PARTITION=my_partition NUM_SHARDS=4 scripts/slurm/submit_all.sh
set -euo pipefail
NEMO_KD_SLURM_DIR="$(cd "$(dirname "$0")" && pwd)"
export NEMO_KD_SLURM_DIR
# shellcheck source=scripts/slurm/env.sh
source "${NEMO_KD_SLURM_DIR}/env.sh"

OPTIONS=(--ntasks-per-node="${TASKS_PER_NODE}" --gpus-per-node="${GPUS_PER_NODE}")
[[ -z "${ACCOUNT:-}" ]] || OPTIONS+=(--account="${ACCOUNT}")
[[ -z "${PARTITION:-}" ]] || OPTIONS+=(--partition="${PARTITION}")
TEACHER_JOB="${NEMO_KD_SLURM_DIR}/compute_topk_logits.sbatch"
STUDENT_JOB="${NEMO_KD_SLURM_DIR}/train_student.sbatch"

mkdir -p "${CACHE_DIR}" "${RESULTS_DIR}"
train="$(sbatch --parsable "${OPTIONS[@]}" --array="0-$((${NUM_SHARDS:-1} - 1))" "${TEACHER_JOB}" train)"
validation="$(sbatch --parsable "${OPTIONS[@]}" "${TEACHER_JOB}" validation)"
student="$(sbatch --parsable "${OPTIONS[@]}" --dependency="afterok:${train}:${validation}" --kill-on-invalid-dep=yes \
    "${STUDENT_JOB}")"
echo "train cache ${train}, validation cache ${validation}, student ${student}"
