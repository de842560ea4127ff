#!/usr/bin/env bash
# Submits both stages as a chain: caches of train (an array) and validation, then the student once all of them succeeded.
#     ACCOUNT=my_account PARTITION=my_partition NUM_CHUNKS=10 ./submit_all.sh
set -euo pipefail
cd "$(dirname "$0")"
export NEMO_KD_SLURM_DIR="${PWD}"
# shellcheck source=scripts/slurm/env.sh
source ./env.sh

OPTIONS=()
[[ -z "${ACCOUNT:-}" ]] || OPTIONS+=(--account="${ACCOUNT}")
[[ -z "${PARTITION:-}" ]] || OPTIONS+=(--partition="${PARTITION}")
RANKS=(--ntasks-per-node="${TASKS_PER_NODE}" --gpus-per-node="${GPUS_PER_NODE}")

mkdir -p "${CACHE_DIR}" "${RESULTS_DIR}"
train="$(sbatch --parsable "${OPTIONS[@]}" "${RANKS[@]}" --array="0-$((${NUM_CHUNKS:?give the number of chunks} - 1))" \
    compute_topk_logits.sbatch train)"
validation="$(sbatch --parsable "${OPTIONS[@]}" "${RANKS[@]}" compute_topk_logits.sbatch validation)"
student="$(sbatch --parsable "${OPTIONS[@]}" "${RANKS[@]}" --dependency="afterok:${train}:${validation}" \
    --kill-on-invalid-dep=yes train_student.sbatch)"
echo "train caches ${train}, validation cache ${validation}, student ${student}"
