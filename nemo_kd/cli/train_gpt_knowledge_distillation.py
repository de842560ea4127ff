"""Console command of stage 2."""

from nemo_kd.cli.run import Command, run
from nemo_kd.config.student import TrainStudentConfig

COMMAND = Command(
    name="train_gpt_knowledge_distillation",
    summary="trains a student from cached teacher logits, or on labels alone (stage 2)",
    config_class=TrainStudentConfig,
    function="nemo_kd.student:train_student",
    example="""train_gpt_knowledge_distillation \\
    pretrained_checkpoint.restore_from_path=student/ \\
    "model.data.data_prefix={train: [cache/train_with_logits_CHUNK_ID.jsonl.zst], validation: [cache/val_with_logits_CHUNK_ID.jsonl.zst]}" \\
    model.knowledge_distillation.kd_loss=bwd_kl \\
    model.knowledge_distillation.kd_loss_weight=1.0 model.knowledge_distillation.sft_loss_weight=0.1 \\
    model.micro_batch_size=1 model.global_batch_size=128 model.optim.lr=1e-5 \\
    trainer.devices=8 exp_manager.explicit_log_dir=results/kd""",
)


def main() -> None:
    run(COMMAND)


if __name__ == "__main__":
    main()
