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
    ids_PK = teacher.topk_token_ids_PK
    samples_PM = teacher.tail_token_ids_PM
    kept_PK = np.ones(ids_PK.shape, dtype=bool)
    if top_k is not None:
        kept_PK[:, top_k:] = False
    if vocab_size is not None:
        kept_PK &= ids_PK < vocab_size
        if samples_PM is not None:
            samples_PM = np.where(samples_PM < vocab_size, samples_PM, -1)
            teacher = replace(teacher, tail_token_ids_PM=samples_PM)
    return keep(teacher, kept_PK)


def keep(
    teacher: TeacherRows[np.ndarray], kept_PK: np.ndarray
) -> TeacherRows[np.ndarray]:
    """Return the kept entries, in their order.

    Dropping an entry drops the tail samples too: they were drawn from another tail.
    """
    ids_PK = teacher.topk_token_ids_PK
    dropped_PK = (ids_PK >= 0) & ~kept_PK
    if not dropped_PK.any():
        return teacher
    kept_PK = (ids_PK >= 0) & kept_PK
    logits_PK = np.where(ids_PK >= 0, teacher.topk_logits_PK, -np.inf).astype(
        np.float64
    )
    tail_mass_PT = teacher.tail_mass_PT.astype(np.float64)
    for number, temperature in enumerate(teacher.temperatures):
        weights_PK = np.exp(logits_PK / temperature)
        # The largest weight is 1, unless a position has no entry.
        total_P = np.maximum(weights_PK.sum(axis=1), 1)
        share_P = np.where(dropped_PK, weights_PK, 0).sum(axis=1) / total_P
        tail_mass_PT[:, number] += (1 - tail_mass_PT[:, number]) * share_P
    order_PK = np.argsort(~kept_PK, axis=1, kind="stable")
    order_PK = order_PK[:, : max(1, kept_PK.sum(axis=1).max())]
    ids_PK, logits_PK = (
        np.take_along_axis(np.where(kept_PK, values, unused), order_PK, axis=1)
        for values, unused in ((ids_PK, -1), (logits_PK, -np.inf))
    )
    known_P = ids_PK[:, 0] >= 0
    largest_P = np.where(known_P, logits_PK[:, 0], 0)
    log_sum_exp_P = np.where(known_P, teacher.log_sum_exp_logits_P - largest_P, 0)
    return replace(
        teacher,
        topk_logits_PK=(logits_PK - largest_P[:, None]).astype(np.float32),
        topk_token_ids_PK=ids_PK,
        log_sum_exp_logits_P=log_sum_exp_P.astype(np.float32),
        tail_mass_PT=np.where(known_P[:, None], tail_mass_PT, 1).astype(np.float32),
        tail_token_ids_PM=None,
    )
