"""Keep fewer of a teacher's tokens; the others join the tail, at every temperature.

Shape legend: P positions, K kept tokens, T temperatures.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nemo_kd.batch import TeacherRows


def limited(
    teacher: TeacherRows[np.ndarray],
    top_k: int | None = None,
    vocab_size: int | None = None,
) -> TeacherRows[np.ndarray]:
    """Keep at most `top_k` tokens per position, all with ids below `vocab_size`; None: no limit.

    Tail samples with other ids become -1: a smaller vocabulary has no place for their mass.
    """
    samples_PM = teacher.tail_token_ids_PM
    if (
        vocab_size is not None
        and samples_PM is not None
        and samples_PM.max(initial=-1) >= vocab_size
    ):
        teacher = replace(
            teacher, tail_token_ids_PM=np.where(samples_PM < vocab_size, samples_PM, -1)
        )
    ids_PK = teacher.topk_token_ids_PK
    keeps_all = (top_k is None or top_k >= ids_PK.shape[1]) and (
        vocab_size is None or ids_PK.max(initial=-1) < vocab_size
    )
    if keeps_all:
        return teacher
    kept_PK = ids_PK >= 0
    if top_k is not None:
        kept_PK[:, top_k:] = False
    if vocab_size is not None:
        kept_PK &= ids_PK < vocab_size
    return keep(teacher, kept_PK)


def keep(
    teacher: TeacherRows[np.ndarray], kept_PK: np.ndarray
) -> TeacherRows[np.ndarray]:
    """Return the kept entries, in their order.

    Dropping an entry drops the tail samples too: they were drawn from another tail.
    """
    used_PK = teacher.topk_token_ids_PK >= 0
    dropped_PK = used_PK & ~kept_PK
    kept_PK = used_PK & kept_PK
    if not dropped_PK.any():
        return teacher
    logits_PK = np.where(used_PK, teacher.topk_logits_PK, -np.inf).astype(np.float64)
    tail_mass_PT = teacher.tail_mass_PT.astype(np.float64)
    for number, temperature in enumerate(teacher.temperatures):
        weights_PK = np.exp(logits_PK / temperature)
        total_P = weights_PK.sum(axis=1)
        share_P = np.where(dropped_PK, weights_PK, 0).sum(axis=1) / np.where(
            total_P > 0, total_P, 1
        )
        tail_mass_PT[:, number] += (1 - tail_mass_PT[:, number]) * share_P
    order_PK = np.argsort(~kept_PK, axis=1, kind="stable")[
        :, : max(1, int(kept_PK.sum(axis=1).max()))
    ]
    kept_PK = np.take_along_axis(kept_PK, order_PK, axis=1)
    ids_PK = np.where(
        kept_PK, np.take_along_axis(teacher.topk_token_ids_PK, order_PK, axis=1), -1
    )
    logits_PK = np.where(
        kept_PK, np.take_along_axis(logits_PK, order_PK, axis=1), -np.inf
    )
    known_P = kept_PK[:, 0]
    largest_P = np.where(known_P, logits_PK[:, 0], 0)
    return replace(
        teacher,
        topk_logits_PK=(logits_PK - largest_P[:, None]).astype(np.float32),
        topk_token_ids_PK=ids_PK,
        log_sum_exp_logits_P=np.where(
            known_P, teacher.log_sum_exp_logits_P - largest_P, 0
        ).astype(np.float32),
        tail_mass_PT=np.where(known_P[:, None], tail_mass_PT, 1).astype(np.float32),
        tail_token_ids_PM=None,
    )
