"""The examples of every split, checked against the student before any work starts."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample, Example
from nemo_kd.cache.blend import CacheBlend
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN
from nemo_kd.cache.reader import CacheReader, is_subset
from nemo_kd.config import ConfigError
from nemo_kd.config.data import sequence_length
from nemo_kd.config.loss import KEY, LossConfig
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.config.student import (
    SPLITS,
    StudentDataConfig,
    StudentDatasetConfig,
    StudentModelConfig,
    StudentRecordsConfig,
)
from nemo_kd.data.dataset import Skipped, TokenizedDataset
from nemo_kd.data.rows import Rows
from nemo_kd.data.tokenizer import (
    chat_template_fingerprint,
    token_differences,
    tokenizer_fingerprint,
)

log = logging.getLogger(__name__)

MOST_ROWS_LOOKED_AT = 4096
"""Examples of one source, spread over it, that are read while none of them has a token in the loss."""


def load_splits(
    model: StudentModelConfig, architecture: GPTArchitecture, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Rows]:
    """Opens train, validation and, where given, test.

    Raises:
        CacheError, DataError: a file is missing or damaged, or a cache does not fit the student.
        ConfigError: nothing is left of a split, or of a path that has a weight.
    """
    data = model.data
    seq_length = sequence_length(model.max_seq_length, architecture.max_position_embeddings)
    paths = {split: data.paths(split) for split in SPLITS if data.paths(split)}
    if data.uses_cache:
        if data.dataset != StudentDatasetConfig():
            log.warning(
                "model.data.dataset has no effect on caches, which hold tokens; it is for data_impl=dataset"
            )
        splits = _open_caches(
            paths, data, model.knowledge_distillation, seq_length, architecture, tokenizer
        )
    else:
        for split, of_split in paths.items():
            _check_no_subset(split, of_split)
        splits = {
            split: _tokenize(split, paths[split], data, seq_length, architecture, tokenizer)
            for split in paths
        }
    for split, rows in splits.items():
        key, chunks = f"model.data.data_prefix.{split}", rows.source_chunks()
        if not len(rows):
            raise ConfigError(f"{key}: no usable example in {', '.join(paths[split])}")
        for path, sizes in zip(paths[split], chunks, strict=True):
            if data.weights(split) is not None and not sum(sizes):
                raise ConfigError(
                    f"{key}: no usable example in {path}, which has a weight; take it out"
                )
        _check_loss_tokens(key, paths[split], rows, [sum(sizes) for sizes in chunks])
    return splits


def _check_loss_tokens(key: str, paths: Sequence[str], rows: Rows, sizes: Sequence[int]) -> None:
    """Refuses a source in which no token counts in the loss; mostly its first example shows that one does.

    Raises:
        ConfigError: names the source.
    """
    start = 0
    for path, size in zip(paths, sizes, strict=True):
        positions = start + np.unique(
            np.linspace(0, size - 1, min(size, MOST_ROWS_LOOKED_AT)).astype(int)
        )
        found = (rows[position] for position in positions.tolist())
        examples = (row.example if isinstance(row, CachedExample) else row for row in found)
        if size and not any(example.num_loss_tokens for example in examples):
            raise ConfigError(
                f"{key}: {path}: none of {len(positions)} examples has a token in the loss (loss_mask is 0 throughout), so there "
                "is nothing to learn from it or to measure on it; take it out, or mark what is to be trained"
            )
        start += size


def _open_caches(
    paths: dict[str, list[str]],
    data: StudentDataConfig,
    loss: LossConfig,
    seq_length: int,
    architecture: GPTArchitecture,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Rows]:
    vocab_size = architecture.vocab_size if data.drop_ids_outside_vocab else None
    readers: dict[str, list[CacheReader]] = {}
    for split, of_split in paths.items():
        n_chunks = data.n_chunks.get(split) if isinstance(data.n_chunks, dict) else data.n_chunks
        readers[split] = [
            CacheReader(path, n_chunks, data.top_k, seq_length, vocab_size) for path in of_split
        ]
    student = _Student(
        architecture.vocab_size,
        len(tokenizer),
        tokenizer_fingerprint(tokenizer),
        chat_template_fingerprint(tokenizer),
        functools.partial(token_differences, tokenizer=tokenizer),
    )
    mismatches = [
        f"  {split}: {reader.source}: {mismatch}"
        for split in readers
        for reader in readers[split]
        for mismatch in [
            *_mismatches(reader, data, student),
            *_missing_fields(reader, loss, student),
        ]
    ]
    mismatches += [
        f"  {split}: {line}" for split in readers for line in _differences(readers[split], loss)
    ]
    if mismatches:
        raise CacheError(
            "model.data.data_prefix: cache and student do not match:\n" + "\n".join(mismatches)
        )
    for split, sources in readers.items():
        dropped = sum(reader.dropped_too_long for reader in sources)
        if dropped:
            log.warning(
                "%s: %d examples longer than %d tokens are dropped", split, dropped, seq_length
            )
    return {split: CacheBlend(sources) for split, sources in readers.items()}


class _Student(NamedTuple):
    vocab_size: int
    tokenizer_size: int
    tokenizer: str
    chat_template: str | None
    token_differences: Callable[[dict[str, Any]], list[str]]


def _mismatches(reader: CacheReader, data: StudentDataConfig, student: _Student) -> list[str]:
    """Everything in which a cache does not suit the student; where the files have no manifest, as far as rows tell.

    Vocabularies of one family are padded differently, so what counts is the ids that the cache holds.
    """
    found: list[str] = []
    vocab_size = student.vocab_size
    if not reader.manifests or any(manifest.tokenizer == UNKNOWN for manifest in reader.manifests):
        log.warning(
            "%s: nothing tells which tokenizer wrote it; make sure that it is the student's",
            reader.path,
        )
    for manifest in reader.manifests:
        if manifest.tokenizer not in (student.tokenizer, UNKNOWN):
            tokens = manifest.tokenizer_tokens
            differences = None if tokens is None else student.token_differences(tokens)
            if differences != []:
                named = f"; first differences: {'; '.join(differences)}" if differences else ""
                found.append(
                    f"tokenizer: {manifest.tokenizer} ({manifest.tokenizer_size} tokens) in the cache, {student.tokenizer} "
                    f"({student.tokenizer_size} tokens) in the student{named}; both must share one tokenizer"
                )
        # Only `messages` are rendered by the tokenizer's template; manifests that do not tell are taken at their word.
        rendered = (
            "messages" in manifest.dataset.get("formats", ["messages"])
            and manifest.chat_template is not None
        )
        if (
            rendered
            and manifest.chat_template != student.chat_template
            and not data.allow_other_template
        ):
            found.append(
                f"chat template: {manifest.chat_template} in the cache, {student.chat_template or 'none'} in the student; copy the teacher's "
                "chat_template into the student's tokenizer files, or set model.data.allow_other_template=true"
            )
    if reader.max_token_id >= vocab_size:
        found.append(
            f"vocabulary: the tokens have ids up to {reader.max_token_id} in the cache, the student has {vocab_size} ids; "
            "both must share one tokenizer"
        )
    if reader.max_topk_id >= vocab_size and not data.drop_ids_outside_vocab:
        chunks = sum(facts.max_topk_id >= vocab_size for facts in reader.chunk_facts)
        found.append(
            f"vocabulary: the teacher's tokens have ids up to {reader.max_topk_id} in {chunks} of {len(reader.chunk_facts)} chunks of the "
            f"cache, the student has {vocab_size} ids; model.data.drop_ids_outside_vocab=true counts them to the tail"
        )
    held = min((manifest.top_k for manifest in reader.manifests), default=reader.largest_k)
    if data.top_k is not None and data.top_k > held:
        found.append(
            f"model.data.top_k: {data.top_k} exceeds the {held} logits a position that the cache holds at most"
        )
    return list(dict.fromkeys(found))


def _missing_fields(reader: CacheReader, loss: LossConfig, student: _Student) -> list[str]:
    """What the loss needs and the cache's rows do not have; the first row speaks for all."""
    found: list[str] = []
    if loss.cross_tokenizer and {manifest.tokenizer for manifest in reader.manifests} != {
        student.tokenizer
    }:
        found.append(
            f"{KEY}.cross_tokenizer: True, but nothing shows that teacher and student share one tokenizer, and token "
            "sequences of different ones are not aligned: NeMo-Aligner fed the student the teacher's token ids and compared logits by "
            "rank, whatever tokens they belonged to. Use a student with the teacher's tokenizer"
        )
    divergence = loss.divergence
    if divergence is None or not len(reader):
        return found
    is_rounded = not reader.manifests and not reader.has_packed_rows()
    if "tail_mass_PT" in divergence.needs and is_rounded:
        log.warning(
            "%s: the mass outside the kept ids comes from log_sum_exp_logits, which NeMo-Aligner rounds to bfloat16 (1%% of all mass); "
            "%s.support=renormalize does not need it",
            reader.path,
            KEY,
        )
    return found + loss.missing_targets(reader[0].teacher)


def _differences(readers: Sequence[CacheReader], loss: LossConfig) -> list[str]:
    """What the loss needs alike in all caches of a split, for a batch holds rows of several; the first row speaks for all."""
    if loss.divergence is None or not loss.divergence.is_sampled:
        return []
    samples = {
        reader.source: reader[0].teacher.tail_token_ids_PM for reader in readers if len(reader)
    }
    counts = {path: ids_PM.shape[1] for path, ids_PM in samples.items() if ids_PM is not None}
    if len(set(counts.values())) <= 1:
        return []
    held = ", ".join(f"{count} in {path}" for path, count in counts.items())
    return [
        f"{KEY}.support: sampled needs equally many tail samples in all caches, there are {held}; compute them "
        "with the same cache.tail_samples, or use support=tail"
    ]


class TokenizedRows:
    """Examples of plain records, in memory; path after path."""

    def __init__(self, paths: Sequence[str], examples: Sequence[Sequence[Example]]) -> None:
        self.paths = list(paths)
        self.sizes = [len(of_path) for of_path in examples]
        self.examples = [example for of_path in examples for example in of_path]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> Example:
        return self.examples[position]

    def num_tokens(self, position: int) -> int:
        return self.examples[position].num_tokens

    def will_read(self, positions: Sequence[int]) -> None:
        """Nothing has to be fetched."""

    def source_chunks(self) -> list[list[int]]:
        """Each path is one chunk."""
        return [[size] if size else [] for size in self.sizes]

    def description(self) -> dict[str, Any]:
        """As `CacheBlend.description`; the fingerprint is that of the token ids and loss masks."""
        digest = hashlib.sha256()
        for example in self.examples:
            for values, dtype in (
                (example.tokens_S, "<i4"),
                (example.labels_S, "<i4"),
                (example.loss_mask_S, "u1"),
            ):
                digest.update(values.astype(dtype).tobytes())
        return {"paths": self.paths, "fingerprint": f"sha256:{digest.hexdigest()}", "caches": []}


def _check_no_subset(split: str, paths: Sequence[str]) -> None:
    for path in paths:
        if is_subset(path):
            raise ConfigError(
                f"model.data.data_prefix.{split}: {path} selects rows, which caches take, and data_impl=dataset does not; "
                "give a file with these rows alone"
            )


def _tokenize(
    split: str,
    paths: list[str],
    data: StudentDataConfig,
    seq_length: int,
    architecture: GPTArchitecture,
    tokenizer: PreTrainedTokenizerBase,
) -> TokenizedRows:
    examples: list[list[Example]] = []
    skipped: Counter[str] = Counter()
    for path in paths:
        config = StudentRecordsConfig(
            data.chat, data.chat_prompt_tokens, replace(data.dataset, file_path=path)
        )
        dataset = TokenizedDataset(config, tokenizer, seq_length, architecture.vocab_size)
        examples.append([])
        for position in tqdm(
            range(len(dataset)),
            desc=f"tokenizing {split}",
            unit=" examples",
            leave=False,
            disable=None,
        ):
            example = dataset[position]
            if isinstance(example, Skipped):
                skipped[example.reason] += 1
            else:
                examples[-1].append(replace(example, source=len(examples) - 1))
    for reason, count in skipped.items():
        log.warning("%s: %d examples skipped: %s", split, count, reason)
    return TokenizedRows(paths, examples)
