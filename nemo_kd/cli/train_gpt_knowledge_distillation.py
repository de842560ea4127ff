"""Console command of stage 2."""

from nemo_kd.cli.run import Command, run
from nemo_kd.config.student import TrainStudentConfig

COMMAND = Command(
    name="train_gpt_knowledge_distillation",
    summary="trains a student from cached teacher logits, or on labels alone (stage 2)",
    config_class=TrainStudentConfig,
    function="nemo_kd.student:train_student",
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
