# Settings and steps of the SFT experiments. run_sft_experiments.sh runs them one after another,
# slurm/run_sft_experiments.sbatch one per job. Set the variables in the environment.
# shellcheck shell=bash

SIZES=(128 256 512 1024 full filtered)
PYTHON="${PYTHON:-python3}"
EXPERIMENTS_PY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/examples/sft_experiments.py"

# --- files
export WORK_DIR="${WORK_DIR:-${PWD}}"
export STUDENT="${STUDENT:-${WORK_DIR}/student}"             # Hugging Face folder or .nemo
export TRAIN_DATA="${TRAIN_DATA:-${WORK_DIR}/data/train.jsonl}"
export VALIDATION_DATA="${VALIDATION_DATA:-${WORK_DIR}/data/validation.jsonl}"
export RESULTS_DIR="${RESULTS_DIR:-${WORK_DIR}/sft_experiments}"

# --- answers
export ANSWER_FIELD="${ANSWER_FIELD:-answer}"                # field of a record with the right answer
export CHECKER="${CHECKER:-math}"                            # math, exact, regex or custom
export PATTERN="${PATTERN:-}"                                # of CHECKER=regex
export CUSTOM_CHECKER="${CUSTOM_CHECKER:-}"                  # of CHECKER=custom: package.function
export LABEL_KEY="${LABEL_KEY:-output}"                      # field with the response of records that are not chats
export EVAL_EXAMPLES="${EVAL_EXAMPLES:-100}"                 # questions per evaluation, the first of VALIDATION_DATA
export NUM_EVALS="${NUM_EVALS:-8}"                           # evaluations per training, beside the first
export MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-256}"

# --- training; docs/evaluation.md says when to change what
export LEARNING_RATE="${LEARNING_RATE:-1e-5}"
export MIN_LEARNING_RATE="${MIN_LEARNING_RATE:-0}"
export GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-8}"
export MICRO_BATCH_SIZE="${MICRO_BATCH_SIZE:-2}"
export WARMUP_STEPS="${WARMUP_STEPS:-100}"                   # at most a tenth of the training
export EPOCHS="${EPOCHS:-}"                                  # empty: by size
export SEED="${SEED:-1234}"                                  # of the subsets and of the training
export PRECISION="${PRECISION:-auto}"
export FURTHER_KEYS="${FURTHER_KEYS:-}"                      # of the training: KEY=VALUE KEY=VALUE, without blanks inside

# once COMMAND ARGUMENT ...: the command; slurm/env.sh has another for a job's nodes.
once() {
    "$@"
}

# check_size SIZE: ends the script unless it is one of SIZES.
check_size() {
    local size
    for size in "${SIZES[@]}"; do
        [[ "$1" != "${size}" ]] || return 0
    done
    echo "unknown size $1: give one of ${SIZES[*]}" >&2
    exit 2
}

# prepare SIZE: writes the training records to RESULTS_DIR/data and sets KEYS, those of the training.
prepare() {
    local size="$1" data="${TRAIN_DATA}" epochs=3 records steps interval warmup
    local run="${RESULTS_DIR}/sft_${size}"
    local -a further=() checks=()
    read -ra further <<<"${FURTHER_KEYS}"
    if [[ -n "${PATTERN}" ]]; then
        further+=("eval.pattern=${PATTERN}")
        checks+=(--pattern "${PATTERN}")
    fi
    if [[ -n "${CUSTOM_CHECKER}" ]]; then
        further+=("eval.custom_checker=${CUSTOM_CHECKER}")
        checks+=(--custom-checker "${CUSTOM_CHECKER}")
    fi
    mkdir -p "${RESULTS_DIR}/data"
    case "${size}" in
    full) ;;
    filtered)
        data="${RESULTS_DIR}/data/filtered.jsonl"
        # Again each time: the checker or the answers may have changed.
        once filter_sft_data "${TRAIN_DATA}" "${data}" --answer-field "${ANSWER_FIELD}" --checker "${CHECKER}" \
            --label-key "${LABEL_KEY}" "${checks[@]}"
        ;;
    *)
        data="${RESULTS_DIR}/data/${size}.jsonl"
        once "${PYTHON}" "${EXPERIMENTS_PY}" subset "${TRAIN_DATA}" "${data}" --size "${size}" --seed "${SEED}"
        ;;
    esac
    case "${size}" in
    128 | 256) epochs=5 ;;
    512) epochs=4 ;;
    esac
    epochs="${EPOCHS:-${epochs}}"
    records="$(once "${PYTHON}" "${EXPERIMENTS_PY}" count "${data}")"
    steps="$((records * epochs / GLOBAL_BATCH_SIZE))"
    interval="$((steps >= NUM_EVALS ? steps / NUM_EVALS : 1))"
    warmup="$((WARMUP_STEPS * 10 > steps ? steps / 10 : WARMUP_STEPS))"
    # shellcheck disable=SC2034 # for the scripts that source this one
    KEYS=(
        name="sft_${size}"
        trainer.precision="${PRECISION}"
        pretrained_checkpoint.restore_from_path="${STUDENT}"
        model.data.data_impl=dataset
        model.data.data_prefix.train="${data}"
        model.data.data_prefix.validation="${VALIDATION_DATA}"
        model.data.dataset.label_key="${LABEL_KEY}"
        model.knowledge_distillation.kd_loss_weight=0
        model.knowledge_distillation.sft_loss_weight=1
        trainer.knowledge_distillation.max_epochs="${epochs}"
        trainer.knowledge_distillation.val_check_interval="${interval}"
        model.micro_batch_size="${MICRO_BATCH_SIZE}"
        model.global_batch_size="${GLOBAL_BATCH_SIZE}"
        model.seed="${SEED}"
        model.optim.lr="${LEARNING_RATE}"
        model.optim.sched.warmup_steps="${warmup}"
        model.optim.sched.min_lr="${MIN_LEARNING_RATE}"
        eval.interval="${interval}"
        eval.data="${VALIDATION_DATA}"
        eval.answer_field="${ANSWER_FIELD}"
        eval.checker="${CHECKER}"
        eval.num_examples="${EVAL_EXAMPLES}"
        eval.max_new_tokens="${MAX_NEW_TOKENS}"
        export.hf=true
        exp_manager.explicit_log_dir="${run}"
        exp_manager.checkpoint_callback_params.save_top_k=1
        exp_manager.checkpoint_callback_params.monitor=eval/accuracy
        exp_manager.checkpoint_callback_params.mode=max
        "${further[@]}"
    )
}

# is_done SIZE: whether its model is there; tells so.
is_done() {
    local final="${RESULTS_DIR}/sft_$1/final"
    [[ -e "${final}" ]] || return 1
    echo "sft_$1: done before (${final}); remove ${RESULTS_DIR}/sft_$1 to train it again"
}

# finish SIZE: names the trained model, a Hugging Face folder.
finish() {
    ln -sfn "checkpoints/sft_$1-hf" "${RESULTS_DIR}/sft_$1/final"
}

# report: draws the accuracies of all sizes that there are, and prints them as a table.
report() {
    once "${PYTHON}" "${EXPERIMENTS_PY}" report "${RESULTS_DIR}"
}
