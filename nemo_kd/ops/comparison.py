"""Distance between student and teacher at each position, whatever loss trains the student.

At temperature 1, over the teacher's kept ids and one bucket for all others. So every figure is a
cheap lower bound: the divergence between buckets is at most the one over the whole vocabulary, and
so are both entropies.

Shape legend: N positions, E entries (kept ids and the bucket).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kd.batch import TeacherRows
from nemo_kd.config.loss import Divergence
from nemo_kd.ops.objectives import forward_kl
from nemo_kd.ops.student_logits import StudentLogits
from nemo_kd.ops.token_losses import entries_of

COMPARED = (
    "teacher_mass",
    "student_mass",
    "top1_agreement",
    "teacher_kl",
    "teacher_entropy",
    "student_entropy",
)
"""Probability of the kept ids under the teacher and under the student; 1 where both rank the same
token first; KL(teacher || student) and entropies in nats."""


def compare(
    student: StudentLogits, teacher: TeacherRows[Tensor], vocab_size: int
) -> Tensor:
    """Return [N, 1 + len(COMPARED)]: 1 and `COMPARED`; all 0 for a row without kept ids."""
    assert student.kept_NK is not None
    known_N = (teacher.topk_token_ids_PK >= 0).any(dim=-1)
    entries = entries_of(student, teacher, Divergence(), vocab_size, scale_index=0)
    columns = [
        known_N,
        1 - entries.p_NE[:, -1],
        entries.q_NE[:, :-1].sum(dim=-1),
        # The student's logit at the teacher's first token, less the largest of all.
        student.kept_NK[:, :1].amax(dim=-1) == 0,
        forward_kl(entries).value_NE.sum(dim=-1),
        torch.special.entr(entries.p_NE).sum(dim=-1),
        torch.special.entr(entries.q_NE).sum(dim=-1),
    ]
    dtype = entries.q_NE.dtype
    return torch.stack(
        [torch.where(known_N, column.to(dtype), 0) for column in columns], dim=-1
    )
