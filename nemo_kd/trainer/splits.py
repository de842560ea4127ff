"""The examples of every split, checked against the student before any work starts."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample, Example
from nemo_kd.cache.blend import CacheBlend
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.reader import CacheReader
from nemo_kd.config import ConfigError
from nemo_kd.config.data import DataConfig, sequence_length
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.config.student import StudentDataConfig, StudentModelConfig
from nemo_kd.data.dataset import Skipped, TokenizedDataset, describe_example
from nemo_kd.data.tokenizer import tokenizer_fingerprint
from nemo_kd.trainer.data_module import Rows

log = logging.getLogger(__name__)


def load_splits(
    model: StudentModelConfig, architecture: GPTArchitecture, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Rows]:
    """Opens train, validation and, where given, test.

    Raises:
        CacheError, DataError: a file is missing or damaged, or a cache does not fit the student.
        ConfigError: nothing is left of a split.
    """
    seq_length = sequence_length(
        "model.data.seq_length",
        model.data.seq_length or model.encoder_seq_length,
        architecture.max_position_embeddings,
    )
    splits: dict[str, Rows] = {}
    for split in ("train", "validation", "test"):
        paths = model.data.paths(split)
        if not paths:
            continue
        if model.data.uses_cache:
            splits[split] = _open_cache(split, paths, model.data, seq_length, architecture, tokenizer)
        else:
            splits[split] = _tokenize(split, paths, model.data, seq_length, architecture, tokenizer)
        if not len(splits[split]):
            raise ConfigError(f"model.data.data_prefix.{split}: no usable example in {', '.join(paths)}")
        log.info("%s: %d examples from %s", split, len(splits[split]), ", ".join(paths))
    first = splits["train"][0]
    example = first.example if isinstance(first, CachedExample) else first
    log.info("example %d, trained between « and »:\n%s", example.index, describe_example(example, tokenizer))
    return splits


def _open_cache(
    split: str,
    paths: list[str],
    data: StudentDataConfig,
    seq_length: int,
    architecture: GPTArchitecture,
    tokenizer: PreTrainedTokenizerBase,
) -> CacheBlend:
    n_chunks = data.n_chunks.get(split) if isinstance(data.n_chunks, dict) else data.n_chunks
    readers = [CacheReader(path, n_chunks, data.top_k, seq_length) for path in paths]
    reader = CacheBlend(readers)
    fingerprint = tokenizer_fingerprint(tokenizer)
    for manifest in reader.manifests:
        if data.top_k is not None and data.top_k > manifest.top_k:
            raise CacheError(
                f"model.data.top_k: {data.top_k} exceeds the {manifest.top_k} logits a position that the cache holds at most"
            )
        if manifest.vocab_size != architecture.vocab_size:
            raise CacheError(
                f"model.data.data_prefix.{split}: the cache's teacher has a vocabulary of {manifest.vocab_size} tokens, the student "
                f"one of {architecture.vocab_size}; both must share one tokenizer"
            )
        if manifest.tokenizer != fingerprint:
            raise CacheError(
                f"model.data.data_prefix.{split}: the cache was written with tokenizer {manifest.tokenizer}, the student has "
                f"{fingerprint}; both must share one tokenizer"
            )
    largest = max(max(part.max_token_id, part.max_topk_id) for part in readers)
    if largest >= architecture.vocab_size:
        raise CacheError(
            f"model.data.data_prefix.{split}: token id {largest} in the cache is outside the student's vocabulary of "
            f"{architecture.vocab_size} tokens; both must share one tokenizer"
        )
    dropped = sum(part.dropped_too_long for part in readers)
    if dropped:
        log.warning("%s: %d examples longer than %d tokens are dropped", split, dropped, seq_length)
    return reader


def _tokenize(
    split: str,
    paths: list[str],
    data: StudentDataConfig,
    seq_length: int,
    architecture: GPTArchitecture,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Example]:
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    for path in paths:
        config: Any = DataConfig(chat=data.chat, chat_prompt_tokens=data.chat_prompt_tokens, data=data.dataset)
        config.data.file_path = path
        dataset = TokenizedDataset(
            config, tokenizer, data.dataset.max_seq_length or seq_length, architecture.vocab_size
        )
        for position in tqdm(range(len(dataset)), desc=f"tokenizing {split}", unit=" examples", leave=False):
            example = dataset[position]
            if isinstance(example, Skipped):
                skipped[example.reason] += 1
            else:
                examples.append(example)
    for reason, count in skipped.items():
        log.warning("%s: %d examples skipped: %s", split, count, reason)
    return examples
