"""Keeps fewer of a teacher's tokens; what goes joins the tail, at every temperature.

Shape legend: S positions, K kept tokens, T temperatures.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nemo_kd.batch import TeacherTopK


def limited(
    teacher: TeacherTopK, top_k: int | None = None, vocab_size: int | None = None
) -> TeacherTopK:
    """At most `top_k` tokens a position, all with ids below `vocab_size`; None does not limit.

    Tail samples with other ids stand for mass that a smaller vocabulary cannot take: they become -1.
    """
    samples_SM = teacher.tail_token_ids_SM
    if (
        vocab_size is not None
        and samples_SM is not None
        and samples_SM.max(initial=-1) >= vocab_size
    ):
        teacher = replace(
            teacher, tail_token_ids_SM=np.where(samples_SM < vocab_size, samples_SM, -1)
        )
    ids_SK = teacher.topk_token_ids_SK
    keeps_all = (top_k is None or top_k >= ids_SK.shape[1]) and (
        vocab_size is None or ids_SK.max() < vocab_size
    )
    if keeps_all:
        return teacher
    kept_SK = ids_SK >= 0
    if top_k is not None:
        kept_SK[:, top_k:] = False
    if vocab_size is not None:
        kept_SK &= ids_SK < vocab_size
    return keep(teacher, kept_SK)


def keep(teacher: TeacherTopK, kept_SK: np.ndarray) -> TeacherTopK:
    """The kept entries, in their order. Tail samples are given up where an entry goes: they were drawn for another tail."""
    used_SK = teacher.topk_token_ids_SK >= 0
    dropped_SK, kept_SK = used_SK & ~kept_SK, used_SK & kept_SK
    if not dropped_SK.any():
        return teacher
    logits_SK = np.where(used_SK, teacher.topk_logits_SK, -np.inf).astype(np.float64)
    tail_mass_TS = teacher.tail_mass_TS.astype(np.float64)
    for number, temperature in enumerate(teacher.temperatures):
        weights_SK = np.exp(logits_SK / temperature)
        total_S = weights_SK.sum(axis=1)
        share_S = np.where(dropped_SK, weights_SK, 0).sum(axis=1) / np.where(
            total_S > 0, total_S, 1
        )
        tail_mass_TS[number] += (1 - tail_mass_TS[number]) * share_S
    order_SK = np.argsort(~kept_SK, axis=1, kind="stable")[
        :, : max(1, int(kept_SK.sum(axis=1).max()))
    ]
    kept_SK = np.take_along_axis(kept_SK, order_SK, axis=1)
    ids_SK = np.where(kept_SK, np.take_along_axis(teacher.topk_token_ids_SK, order_SK, axis=1), -1)
    logits_SK = np.where(kept_SK, np.take_along_axis(logits_SK, order_SK, axis=1), -np.inf)
    known_S = kept_SK[:, 0]
    largest_S = np.where(known_S, logits_SK[:, 0], 0)
    return replace(
        teacher,
        topk_logits_SK=(logits_SK - largest_S[:, None]).astype(np.float32),
        topk_token_ids_SK=ids_SK,
        log_sum_exp_logits_S=np.where(known_S, teacher.log_sum_exp_logits_S - largest_S, 0).astype(
            np.float32
        ),
        tail_mass_TS=np.where(known_S, tail_mass_TS, 1).astype(np.float32),
        tail_token_ids_SM=None,
    )
