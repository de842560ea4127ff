"""Stage 1: run a teacher over datasets and cache its top-k logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_kd.config.teacher import ComputeTopkLogitsConfig
    from nemo_kd.teacher.progress import CacheReport


def compute_topk_logits(config: ComputeTopkLogitsConfig) -> list[CacheReport]:
    """Run stage 1: write every chunk of the requested range that is not complete yet.

    The ranks join before Megatron loads, so that wrong devices are reported at once.

    Args:
        config: `trainer.devices` is the number of processes on this machine that call this.

    Returns:
        One report per dataset with paths and counts, the same on every rank; none for `dry_run`.

    Raises:
        UserInputError: configuration, model or dataset cannot work; the message names the key.
        Requeue: a signal or the time limit stopped the run; the same call continues it.
    """
    from nemo_kd.run.ranks import join_ranks

    join_ranks(config.trainer)
    from nemo_kd.teacher.loop import compute_topk_logits as compute

    return compute(config)
