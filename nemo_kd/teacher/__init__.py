"""Stage 1: run a teacher over datasets and cache its top-k logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_kd.config.teacher import ComputeTopkLogitsConfig


def compute_topk_logits(config: ComputeTopkLogitsConfig) -> None:
    """Run stage 1; see `nemo_kd.teacher.loop.compute_topk_logits`.

    The ranks join before Megatron loads, so that wrong devices are reported at once.
    """
    from nemo_kd.run.process_group import join_ranks

    join_ranks(config.trainer)
    from nemo_kd.teacher.loop import compute_topk_logits as compute

    compute(config)
