"""How near a student is to its teacher at each position, whatever loss trains it.

At temperature 1, over the teacher's kept ids and one bucket for all others, so that every figure is a bound that is cheap to
have: the divergence between buckets is at most the one over the whole vocabulary, and so are both entropies.

Shape legend: N positions, E entries (kept ids and the bucket).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nemo_kd.ops.objectives import forward_kl
from nemo_kd.ops.student_logits import StudentLogits
from nemo_kd.ops.token_losses import Divergence, TeacherRows, entries_of

COMPARED = (
    "teacher_mass",
    "student_mass",
    "top1_agreement",
    "teacher_kl",
    "teacher_entropy",
    "student_entropy",
)
"""Probability that the teacher has, and that the student has, inside the kept ids; whether both rank the same token first;
KL(teacher || student) and entropies in nats."""


def compare(student: StudentLogits, teacher: TeacherRows, vocab_size: int) -> Tensor:
    """[N, 1 + len(COMPARED)]: 1 where the teacher says anything, and `COMPARED`; 0 where it says nothing."""
    assert student.kept_NK is not None
    num_used_N = (teacher.topk_token_ids_NK >= 0).sum(dim=-1)
    known_N = num_used_N > 0
    at_1 = replace(teacher, tail_mass_N=teacher.unscaled_tail_mass_N)
    entries = entries_of(
        student, at_1, Divergence(), num_used_N == vocab_size, slice(None), scale_index=0
    )
    columns = [
        known_N,
        1 - entries.p_NE[:, -1],
        entries.q_NE[:, :-1].sum(dim=-1),
        student.kept_NK[:, :1].amax(dim=-1) == 0,  # the teacher's first, less the largest of all
        forward_kl(entries).value_NE.sum(dim=-1),
        torch.special.entr(entries.p_NE).sum(dim=-1),
        torch.special.entr(entries.q_NE).sum(dim=-1),
    ]
    return torch.stack(
        [torch.where(known_N, column.to(entries.q_NE.dtype), 0) for column in columns], dim=-1
    )
