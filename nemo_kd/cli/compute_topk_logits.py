"""Console command of stage 1."""

from dataclasses import replace

from nemo_kd.cache.layout import SUFFIXES, CacheLayout
from nemo_kd.cli.run import (
    Command,
    check_records,
    check_stage,
    check_writable,
    run,
)
from nemo_kd.config import ConfigError
from nemo_kd.config.teacher import ComputeTopkLogitsConfig


def check(config: ComputeTopkLogitsConfig) -> None:
    """Refuse paths that are not there or cannot be written, and sizes that do not divide.

    Raises:
        ConfigError, CacheError: names the key.
    """
    check_stage(config)
    for part in config.splits().values():
        check_records("data.data.file_path", part.data.data.file_path)
        if not part.output_path.endswith(SUFFIXES):
            raise ConfigError(
                f"output_path: {part.output_path} ends in none of {', '.join(SUFFIXES)}, which "
                "tell how lines are stored"
            )
        folder = CacheLayout(part.output_path).folder
        if not config.dry_run:
            check_writable("output_path", folder)
    log_dir = config.exp_manager.explicit_log_dir
    if log_dir is not None and not config.dry_run:
        check_writable("exp_manager.explicit_log_dir", log_dir)


COMMAND = Command(
    name="compute_topk_logits",
    summary="caches a teacher's top-k logits for every example of a dataset (stage 1)",
    config_class=ComputeTopkLogitsConfig,
    check=check,
    function="nemo_kd.teacher.loop:compute_topk_logits",
    example="""compute_topk_logits \\
    model=teacher/ data=train.jsonl \\
    output=cache/train_CHUNK_ID.jsonl.zst n_examples_per_chunk=10000 \\
    trainer.devices=8 model.tensor_model_parallel_size=4""",
)

PLAN = replace(
    COMMAND,
    summary="estimates disk, time and memory by a short probe, with the same keys (logit_cache plan)",
    function="nemo_kd.teacher.reports:estimate_cost",
    example="""logit_cache plan \\
    pretrained_checkpoint.restore_from_path=teacher/ \\
    data.data.file_path=data/train.jsonl \\
    output_path=cache/train_with_logits_CHUNK_ID.jsonl.zst n_examples_per_chunk=10000""",
)
"""`logit_cache plan`."""


def main() -> None:
    run(COMMAND)


if __name__ == "__main__":
    main()
