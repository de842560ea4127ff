# Variables of all templates in this folder; edit this file, or set them in the environment of sbatch.
# shellcheck shell=bash

# --- the cluster; --account, --partition, --time and --nodes are options of sbatch (see submit_all.sh)
export GPUS_PER_NODE="${GPUS_PER_NODE:-8}"           # 0: CPU processes
export TASKS_PER_NODE="${TASKS_PER_NODE:-$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))}"
export CONTAINER="${CONTAINER:-}"                    # image for pyxis (srun --container-image); empty: none
export MOUNTS="${MOUNTS:-}"                          # source:target,source:target for the container
export VENV="${VENV:-}"                              # virtual environment to activate; empty: none
export MAX_REQUEUES="${MAX_REQUEUES:-50}"            # times that a job which ran out of time goes back into the queue

# --- files, on storage that every node sees
export WORK_DIR="${WORK_DIR:-${PWD}}"
export TEACHER="${TEACHER:-${WORK_DIR}/teacher}"     # Hugging Face folder or .nemo
export STUDENT="${STUDENT:-${WORK_DIR}/student}"
export TRAIN_DATA="${TRAIN_DATA:-${WORK_DIR}/data/train.jsonl}"
export VALIDATION_DATA="${VALIDATION_DATA:-${WORK_DIR}/data/validation.jsonl}"
export CACHE_DIR="${CACHE_DIR:-${WORK_DIR}/cache}"
export RESULTS_DIR="${RESULTS_DIR:-${WORK_DIR}/results}"

# --- stage 1
export TOP_K="${TOP_K:-128}"
export N_EXAMPLES_PER_CHUNK="${N_EXAMPLES_PER_CHUNK:-10000}"
export MAX_TOKENS_PER_BATCH="${MAX_TOKENS_PER_BATCH:-16384}" # of one forward pass of one replica of the teacher
export TEACHER_TP="${TEACHER_TP:-8}"

# --- stage 2
export STUDENT_TP="${STUDENT_TP:-1}"
export GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-128}"
export LEARNING_RATE="${LEARNING_RATE:-1e-5}"
export PRECISION="${PRECISION:-auto}"

# Ranks, world size and the node of rank 0 come from Slurm; the port from the job, so that jobs on one node do not meet.
MASTER_ADDR="$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" 2>/dev/null | head -n 1)"
export MASTER_ADDR
export MASTER_PORT="$((20000 + ${SLURM_JOB_ID:-0} % 20000))"
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron overlaps communication in the order it was issued
export TOKENIZERS_PARALLELISM=false

REQUEUE=75 # exit status of a command that was interrupted with everything saved

# run COMMAND KEY=VALUE ...: the command once per task of the job. If it was interrupted, the job goes back into the
# queue and runs the same command again.
run() {
    local status=0
    step --ntasks-per-node="${TASKS_PER_NODE}" --kill-on-bad-exit=1 "$@" || status="$?"
    if ((status == REQUEUE)); then
        requeue
    fi
    return "${status}"
}

# once COMMAND ARGUMENT ...: the command in one task.
once() {
    step --nodes=1 --ntasks=1 "$@"
}

# step OPTION ... COMMAND ARGUMENT ...: srun with the virtual environment and in the container, if there are any.
step() {
    local options=()
    if [[ -n "${CONTAINER}" ]]; then
        options+=(--container-image="${CONTAINER}")
        [[ -z "${MOUNTS}" ]] || options+=(--container-mounts="${MOUNTS}")
    fi
    if [[ -n "${VENV}" ]]; then
        # shellcheck disable=SC1091
        source "${VENV}/bin/activate"
    fi
    srun "${options[@]}" "$@"
}

# requeue: puts this job back into the queue; of an array, this task only (the array's number alone would mean all).
requeue() {
    local job="${SLURM_JOB_ID}"
    [[ -z "${SLURM_ARRAY_TASK_ID:-}" ]] || job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
        echo "job ${job} was requeued MAX_REQUEUES=${MAX_REQUEUES} times; submit it again to continue" >&2
        return
    fi
    echo "job ${job} goes back into the queue"
    scontrol requeue "${job}"
}
