"""Stage 2: train a student from a cache of teacher logits, or on labels alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_kd.config.student import TrainStudentConfig
    from nemo_kd.student.report import StudentRun


def train_student(config: TrainStudentConfig) -> StudentRun:
    """Run stage 2; see `nemo_kd.student.job.train_student`.

    The ranks join before Megatron and Lightning load, so that wrong devices are reported at once.
    """
    from nemo_kd.run.ranks import join_ranks

    join_ranks(config.trainer)
    from nemo_kd.student.job import train_student as train

    return train(config)
