"""Console command of stage 2."""

from nemo_kd.cache.layout import CacheLayout, path_of
from nemo_kd.cli.run import (
    Command,
    check_records,
    check_stage,
    check_writable,
    run,
)
from nemo_kd.config import ConfigError
from nemo_kd.config.exp_manager import PARAMS, ExpManagerConfig
from nemo_kd.config.shared import check_batch_sizes
from nemo_kd.config.student import SPLITS, TrainStudentConfig


def check(config: TrainStudentConfig) -> None:
    """Refuse paths that are not there or cannot be written, and sizes that do not divide.

    Raises:
        ConfigError, CacheError: names the key.
    """
    model = config.model
    replicas = check_stage(config)
    if model.data.max_tokens_per_batch is None:
        check_batch_sizes(model.micro_batch_size, model.global_batch_size, replicas)
    for split in SPLITS:
        for path in model.data.paths(split):
            key = f"model.data.data_prefix.{split}"
            if not model.data.uses_cache:
                check_records(key, path)
            elif "://" not in path:
                layout = CacheLayout(path_of(path))
                if not layout.existing_chunks() and not layout.manifest_path.exists():
                    raise ConfigError(
                        f"{key}: there is no file {path}; give the output_path of "
                        "compute_topk_logits"
                    )
    if config.eval.interval:
        check_records("eval.data", str(config.eval.data))
    check_folders(config.exp_manager)


def check_folders(settings: ExpManagerConfig) -> None:
    """Refuse folders of logs and checkpoints that cannot be made or written."""
    name = "explicit_log_dir" if settings.explicit_log_dir else "exp_dir"
    check_writable(f"exp_manager.{name}", getattr(settings, name))
    dirpath = settings.checkpoint_callback_params.dirpath
    if dirpath and settings.create_checkpoint_callback:
        check_writable(f"{PARAMS}.dirpath", dirpath)


COMMAND = Command(
    name="train_gpt_knowledge_distillation",
    summary="trains a student from cached teacher logits, or on labels alone (stage 2)",
    config_class=TrainStudentConfig,
    check=check,
    function="nemo_kd.student.job:train_student",
    example="""train_gpt_knowledge_distillation \\
    model=student/ output=results/kd \\
    data=cache/train_CHUNK_ID.jsonl.zst validation=cache/validation_CHUNK_ID.jsonl.zst \\
    model.knowledge_distillation.sft_loss_weight=0.1 lr=1e-5 \\
    model.global_batch_size=128 model.data.max_tokens_per_batch=16384 trainer.devices=8""",
)


def main() -> None:
    run(COMMAND)


if __name__ == "__main__":
    main()
