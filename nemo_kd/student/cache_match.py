"""Check that a cache fits the student: tokenizer, vocabulary, fields that the loss needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nemo_kd.cache.manifest import UNKNOWN
from nemo_kd.cache.reader import CacheReader
from nemo_kd.config.loss import KEY, LossConfig
from nemo_kd.config.student import StudentDataConfig, StudentModelConfig
from nemo_kd.data.tokenizer import (
    chat_template_fingerprint,
    token_differences,
    tokenizer_fingerprint,
)

log = logging.getLogger(__name__)


def find_mismatches(
    readers: Sequence[CacheReader],
    model: StudentModelConfig,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """List everything in which the caches of a split do not fit the student."""
    loss = model.knowledge_distillation
    ours = tokenizer_fingerprint(tokenizer)
    found: list[str] = []
    for reader in readers:
        texts = [
            *_tokenizer_mismatches(reader, model.data, tokenizer, ours),
            *_size_mismatches(reader, model.data, vocab_size),
            *_missing_fields(reader, loss, ours),
        ]
        found += [f"{reader.source}: {text}" for text in dict.fromkeys(texts)]
    return found + _different_samples(readers, loss)


def _tokenizer_mismatches(
    reader: CacheReader,
    data: StudentDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    ours: str,
) -> list[str]:
    found: list[str] = []
    template = chat_template_fingerprint(tokenizer)
    if not reader.manifests or any(
        manifest.tokenizer == UNKNOWN for manifest in reader.manifests
    ):
        log.warning(
            "%s: nothing records which tokenizer wrote it; make sure that it is the student's",
            reader.path,
        )
    for manifest in reader.manifests:
        if manifest.tokenizer not in (ours, UNKNOWN):
            tokens = manifest.tokenizer_tokens
            differences = None if tokens is None else token_differences(tokens, tokenizer)
            if differences != []:
                named = (
                    f"; first differences: {'; '.join(differences)}"
                    if differences
                    else ""
                )
                found.append(
                    f"tokenizer: {manifest.tokenizer} ({manifest.tokenizer_size} tokens) in the "
                    f"cache, {ours} ({len(tokenizer)} tokens) in the student{named}; both must "
                    "share one tokenizer"
                )
        # Only `messages` use the template; without a list of formats all records count as such.
        if (
            "messages" in manifest.dataset.get("formats", ["messages"])
            and manifest.chat_template not in (None, template)
            and not data.allow_other_template
        ):
            found.append(
                f"chat template: {manifest.chat_template} in the cache, {template or 'none'} in "
                "the student; copy the teacher's chat_template into the student's tokenizer files, "
                "or set model.data.allow_other_template=true"
            )
    return found


def _size_mismatches(
    reader: CacheReader, data: StudentDataConfig, vocab_size: int
) -> list[str]:
    """Compare the ids that the cache holds: vocabularies of one family are padded differently."""
    found: list[str] = []
    if reader.max_token_id >= vocab_size:
        found.append(
            f"vocabulary: the tokens have ids up to {reader.max_token_id} in the cache, the "
            f"student has {vocab_size} ids; both must share one tokenizer"
        )
    if reader.max_topk_id >= vocab_size and not data.drop_ids_outside_vocab:
        chunks = sum(facts.max_topk_id >= vocab_size for facts in reader.chunk_facts)
        found.append(
            f"vocabulary: the teacher's tokens have ids up to {reader.max_topk_id} in {chunks} of "
            f"{len(reader.chunk_facts)} chunks of the cache, the student has {vocab_size} ids; "
            "model.data.drop_ids_outside_vocab=true counts them to the tail"
        )
    held = min(
        (manifest.top_k for manifest in reader.manifests), default=reader.largest_k
    )
    if data.top_k is not None and data.top_k > held:
        found.append(
            f"model.data.top_k: {data.top_k} exceeds the {held} logits a position that the cache "
            "holds at most"
        )
    return found


def _missing_fields(reader: CacheReader, loss: LossConfig, ours: str) -> list[str]:
    """List what the loss needs and the cache lacks; the first row stands for all."""
    found: list[str] = []
    theirs = {manifest.tokenizer for manifest in reader.manifests}
    if loss.cross_tokenizer and theirs != {ours}:
        found.append(
            f"{KEY}.cross_tokenizer: True, but nothing shows that teacher and student share one "
            "tokenizer, and token sequences of different ones are not aligned: NeMo-Aligner fed "
            "the student the teacher's token ids and compared logits by rank, whatever tokens they "
            "belonged to. Use a student with the teacher's tokenizer"
        )
    divergence = loss.divergence
    if divergence is None or not len(reader):
        return found
    is_rounded = not reader.manifests and not reader.has_packed_rows()
    if "tail_mass_PT" in divergence.needs and is_rounded:
        log.warning(
            "%s: the mass outside the kept ids comes from log_sum_exp_logits, which NeMo-Aligner "
            "rounds to bfloat16 (1%% of all mass); %s.support=renormalize does not need it",
            reader.path,
            KEY,
        )
    return found + loss.missing_targets(reader[0].teacher)


def _different_samples(readers: Sequence[CacheReader], loss: LossConfig) -> list[str]:
    """Refuse different numbers of tail samples, as a batch holds rows of several caches."""
    if loss.divergence is None or not loss.divergence.is_sampled:
        return []
    counts = {
        reader.source: ids_PM.shape[1]
        for reader in readers
        if len(reader) and (ids_PM := reader[0].teacher.tail_token_ids_PM) is not None
    }
    if len(set(counts.values())) <= 1:
        return []
    held = ", ".join(f"{count} in {path}" for path, count in counts.items())
    return [
        f"{KEY}.support: sampled needs equally many tail samples in all caches, there are {held}; "
        "compute them with the same cache.tail_samples, or use support=tail"
    ]
