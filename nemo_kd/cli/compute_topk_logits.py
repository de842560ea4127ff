"""Console command of stage 1."""

from nemo_kd.cli.run import Command, run
from nemo_kd.config.teacher import ComputeTopkLogitsConfig

COMMAND = Command(
    name="compute_topk_logits",
    summary="caches a teacher's top-k logits for every example of a dataset (stage 1)",
    config_class=ComputeTopkLogitsConfig,
    function="nemo_kd.teacher:compute_topk_logits",
    example="""compute_topk_logits \\
    model=teacher/ data=train.jsonl \\
    output=cache/train_CHUNK_ID.jsonl.zst n_examples_per_chunk=10000 \\
    trainer.devices=8 model.tensor_model_parallel_size=4""",
)


def main() -> None:
    run(COMMAND)


if __name__ == "__main__":
    main()
