#!/usr/bin/env bash
# SFT on nested subsets of a dataset, on all of it, and on its correct records; then a report.
#     STUDENT=model/ TRAIN_DATA=train.jsonl VALIDATION_DATA=validation.jsonl scripts/run_sft_experiments.sh
#     scripts/run_sft_experiments.sh 128 full       # some of 128 256 512 1024 full filtered
#     scripts/run_sft_experiments.sh --bundled      # word problems and a small model, on a CPU
# Further variables are in sft_experiment.sh. The same command continues after an interruption and skips what is done:
# RESULTS_DIR/sft_<size>/final is a trained model. The commands of nemo_kd must be on PATH.
set -euo pipefail
HERE="$(cd "$(dirname "$0")" && pwd)"

IS_BUNDLED=false
if [[ "${1:-}" == --bundled ]]; then
    shift
    IS_BUNDLED=true
    RESULTS_DIR="${RESULTS_DIR:-${PWD}/sft_experiments}"
    TASK="${RESULTS_DIR}/task"
    STUDENT="${TASK}/base/checkpoints/base.nemo"
    TRAIN_DATA="${TASK}/data/train.jsonl"
    VALIDATION_DATA="${TASK}/data/validation.jsonl"
    LEARNING_RATE="${LEARNING_RATE:-1e-3}"
    GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-16}"
    MICRO_BATCH_SIZE="${MICRO_BATCH_SIZE:-16}"
    EVAL_EXAMPLES="${EVAL_EXAMPLES:-400}"
    MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-48}"
    PRECISION="${PRECISION:-32}"
fi
# shellcheck source=scripts/sft_experiment.sh
source "${HERE}/sft_experiment.sh"
DEVICES="${DEVICES:-1}"

(($#)) || set -- "${SIZES[@]}"
for size in "$@"; do
    check_size "${size}"
done
if "${IS_BUNDLED}" && [[ ! -e "${STUDENT}" ]]; then
    "${PYTHON}" "${EXPERIMENTS_PY}" bundled "${TASK}"
    # The model learns English and the form of a solution from other problems, half of them solved wrong.
    train_gpt_knowledge_distillation \
        name=base \
        trainer.precision="${PRECISION}" \
        pretrained_checkpoint.restore_from_path="${TASK}/untrained" \
        model.data.data_impl=dataset \
        model.data.data_prefix.train="${TASK}/other_data/train.jsonl" \
        trainer.knowledge_distillation.limit_val_batches=0 \
        model.knowledge_distillation.kd_loss_weight=0 \
        model.knowledge_distillation.sft_loss_weight=1 \
        model.micro_batch_size=32 \
        model.global_batch_size=32 \
        model.optim.lr=3e-3 \
        exp_manager.explicit_log_dir="${TASK}/base"
fi
for size in "$@"; do
    is_done "${size}" && continue
    prepare "${size}"
    train_gpt_knowledge_distillation trainer.devices="${DEVICES}" "${KEYS[@]}"
    finish "${size}"
done
report
