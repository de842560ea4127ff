"""`logit_cache plan`: the keys of stage 1."""

from nemo_kd.cli.run import Command
from nemo_kd.config.teacher import ComputeTopkLogitsConfig

COMMAND = Command(
    name="compute_topk_logits",
    summary="estimate disk, time and memory of compute_topk_logits with the same keys, by a short "
    "probe",
    config_class=ComputeTopkLogitsConfig,
    function="nemo_kd.teacher.estimate:estimate_cost",
    example="""logit_cache plan \\
    pretrained_checkpoint.restore_from_path=teacher/ \\
    data.data.file_path=data/train.jsonl \\
    output_path=cache/train_with_logits_CHUNK_ID.jsonl.zst n_examples_per_chunk=10000""",
    subcommand="plan",
)
