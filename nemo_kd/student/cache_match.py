"""Check that a cache fits the student: tokenizer, vocabulary, fields that the loss needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nemo_kd.cache.manifest import UNKNOWN
from nemo_kd.cache.reader import CacheReader
from nemo_kd.config.loss import KEY
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
    samples: set[int] = set()
    for reader in readers:
        texts = _tokenizer_mismatches(reader, model.data, tokenizer, ours)
        texts += _size_mismatches(reader, model.data, vocab_size)
        if loss.cross_tokenizer and {one.tokenizer for one in reader.manifests} != {ours}:
            texts.append(
                f"{KEY}.cross_tokenizer: True, but nothing shows that teacher and student share "
                "one tokenizer, and token sequences of different ones cannot be aligned; use a "
                "student with the teacher's tokenizer"
            )
        if loss.divergence is not None and len(reader):
            teacher = reader[0].teacher  # stands for all rows
            texts += loss.missing_targets(teacher)
            is_rounded = not reader.manifests and not reader.has_packed_rows()
            if "tail_mass_PT" in loss.divergence.needs and is_rounded:
                log.warning(
                    "%s: the mass outside the kept ids comes from log_sum_exp_logits, which "
                    "NeMo-Aligner rounds to bfloat16 (1%% of all mass); %s.support=renormalize "
                    "does not need it",
                    reader.path,
                    KEY,
                )
            if loss.divergence.is_sampled and teacher.tail_token_ids_PM is not None:
                samples.add(teacher.tail_token_ids_PM.shape[1])
        found += [f"{reader.source}: {text}" for text in dict.fromkeys(texts)]
    if len(samples) > 1:  # a batch holds rows of several caches
        found.append(
            f"{KEY}.support: sampled needs equally many tail samples in all caches, there are "
            f"{sorted(samples)}; compute them with the same cache.tail_samples, or use support=tail"
        )
    return found


def _tokenizer_mismatches(
    reader: CacheReader,
    data: StudentDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    ours: str,
) -> list[str]:
    found: list[str] = []
    template = chat_template_fingerprint(tokenizer)
    named = [one for one in reader.manifests if one.tokenizer != UNKNOWN]
    if not named:
        log.warning(
            "%s: nothing records which tokenizer wrote it; make sure that it is the student's",
            reader.path,
        )
    for manifest in named:
        tokens = manifest.tokenizer_tokens
        differences = ["the tokens are not recorded"]
        if tokens is not None:
            differences = token_differences(tokens, tokenizer)
        if manifest.tokenizer != ours and differences:
            found.append(
                f"tokenizer: {manifest.tokenizer} ({manifest.tokenizer_size} tokens) in the cache, "
                f"{ours} ({len(tokenizer)} tokens) in the student ({'; '.join(differences)}); both "
                "must share one tokenizer"
            )
    for manifest in reader.manifests:
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
        found.append(
            f"vocabulary: the teacher's tokens have ids up to {reader.max_topk_id} in the cache, "
            f"the student has {vocab_size} ids; model.data.drop_ids_outside_vocab=true counts them "
            "to the tail"
        )
    held = [manifest.top_k for manifest in reader.manifests] or [reader.largest_k]
    if data.top_k is not None and data.top_k > min(held):
        found.append(
            f"model.data.top_k: {data.top_k} exceeds the {min(held)} logits a position that the "
            "cache holds at most"
        )
    return found
