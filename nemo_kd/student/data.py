"""Data of stage 2: open the splits, check them against the student, and form batches."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Batch, Example
from nemo_kd.cache.blend import CacheBlend
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.reader import CacheReader, is_subset
from nemo_kd.config import ConfigError
from nemo_kd.config.data import sequence_length
from nemo_kd.config.model import GPTArchitecture, length_multiple
from nemo_kd.config.student import (
    SPLITS,
    StudentDataConfig,
    StudentDatasetConfig,
    StudentModelConfig,
    StudentRecordsConfig,
    TrainStudentConfig,
)
from nemo_kd.data.batches import (
    MicroBatchRows,
    Rows,
    TokenizedRows,
    example_of,
    micro_batches,
)
from nemo_kd.data.dataset import Skipped, TokenizedDataset
from nemo_kd.data.order import EvaluationBatches, SampleOrder, TrainingBatches, shares
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.run.interruption import follow_the_main_process
from nemo_kd.student.cache_match import find_mismatches
from nemo_kd.student.schedule import TrainingPlan
from nemo_kd.student.throughput import WatchedLoader

log = logging.getLogger(__name__)

PREFIX = "model.data.data_prefix"

MAX_ROWS_CHECKED = 4096
"""Examples of one source, spread over it, that are read until one has a token in the loss."""

PADDED_MULTIPLE = 8
"""Padded rows are a multiple of this long: matrix products of such sizes are fast."""


def load_splits(
    model: StudentModelConfig,
    architecture: GPTArchitecture,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Rows]:
    """Open train, validation and, if given, test.

    Raises:
        CacheError, DataError: a file is missing or damaged, or a cache does not fit the student.
        ConfigError: a split, or a path that has a weight, has no usable example.
    """
    data = model.data
    seq_length = sequence_length(
        model.max_seq_length, architecture.max_position_embeddings
    )
    paths = {split: data.paths(split) for split in SPLITS if data.paths(split)}
    splits: Mapping[str, Rows]
    if data.uses_cache:
        splits = _open_caches(paths, model, seq_length, architecture, tokenizer)
    else:
        for split, of_split in paths.items():
            for path in filter(is_subset, of_split):
                raise ConfigError(
                    f"{PREFIX}.{split}: {path} selects rows, which caches take and "
                    "data_impl=dataset does not; give a file with these rows alone"
                )
        splits = {
            split: _tokenize(
                split, paths[split], data, seq_length, architecture, tokenizer
            )
            for split in paths
        }
    for split, rows in splits.items():
        _check_usable(
            f"{PREFIX}.{split}", rows, paths[split], data.weights(split) is not None
        )
    return dict(splits)


def source_names(paths: Sequence[str]) -> list[str]:
    """Return a short name of each path for metrics: the file's, numbered if several are alike."""
    stems = [
        re.sub(r"[_-]?CHUNK_ID", "", Path(path.partition("[")[0]).name.partition(".")[0])
        or "data"
        for path in paths
    ]
    return [
        stem if stems.count(stem) == 1 else f"{stem}_{number}"
        for number, stem in enumerate(stems)
    ]


def _check_usable(key: str, rows: Rows, paths: Sequence[str], is_weighted: bool) -> None:
    """Refuse a split without examples, and a source without tokens in the loss.

    Raises:
        ConfigError: names the source.
    """
    if not len(rows):
        raise ConfigError(f"{key}: no usable example in {', '.join(paths)}")
    start = 0
    for path, sizes in zip(paths, rows.source_chunks(), strict=True):
        size = sum(sizes)
        if is_weighted and not size:
            raise ConfigError(
                f"{key}: no usable example in {path}, which has a weight; take it out"
            )
        spread = np.linspace(start, start + size - 1, min(size, MAX_ROWS_CHECKED)).astype(
            int
        )
        if size and not any(
            example_of(rows[at]).num_loss_tokens for at in spread.tolist()
        ):
            raise ConfigError(
                f"{key}: {path}: none of {len(spread)} examples has a token in the loss "
                "(loss_mask is 0 throughout), so there is nothing to train or to measure on; take "
                "it out, or mark what is to be trained"
            )
        start += size


def _open_caches(
    paths: dict[str, list[str]],
    model: StudentModelConfig,
    seq_length: int,
    architecture: GPTArchitecture,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, CacheBlend]:
    data = model.data
    if data.dataset != StudentDatasetConfig():
        log.warning(
            "model.data.dataset has no effect on caches, which hold tokens; it is for "
            "data_impl=dataset"
        )
    vocab_size = architecture.vocab_size if data.drop_ids_outside_vocab else None
    mismatches: list[str] = []
    readers: dict[str, list[CacheReader]] = {}
    for split, of_split in paths.items():
        n_chunks = (
            data.n_chunks.get(split) if isinstance(data.n_chunks, dict) else data.n_chunks
        )
        readers[split] = [
            CacheReader(path, n_chunks, data.top_k, seq_length, vocab_size)
            for path in of_split
        ]
        found = find_mismatches(readers[split], model, architecture.vocab_size, tokenizer)
        mismatches += [f"  {split}: {text}" for text in found]
    if mismatches:
        lines = "\n".join(mismatches)
        raise CacheError(f"{PREFIX}: cache and student do not match:\n{lines}")
    for split, sources in readers.items():
        dropped = sum(reader.dropped_too_long for reader in sources)
        if dropped:
            log.warning(
                "%s: %d examples longer than %d tokens are dropped",
                split,
                dropped,
                seq_length,
            )
    return {split: CacheBlend(sources) for split, sources in readers.items()}


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
    for source, path in enumerate(paths):
        config = StudentRecordsConfig(
            data.chat, data.chat_prompt_tokens, replace(data.dataset, file_path=path)
        )
        dataset = TokenizedDataset(config, tokenizer, seq_length, architecture.vocab_size)
        title = f"tokenizing {split}"
        found = [
            dataset[position]
            for position in tqdm(range(len(dataset)), title, leave=False, disable=None)
        ]
        skipped.update(one.reason for one in found if isinstance(one, Skipped))
        examples.append(
            [replace(one, source=source) for one in found if isinstance(one, Example)]
        )
    for reason, count in skipped.items():
        log.warning("%s: %d examples skipped: %s", split, count, reason)
    return TokenizedRows(paths, examples)


class StudentData(pl.LightningDataModule):
    """Data loaders over the splits; a batch is the list of this rank's micro-batches of a step."""

    def __init__(
        self,
        config: TrainStudentConfig,
        splits: dict[str, Rows],
        plan: TrainingPlan,
        pad_id: int,
        groups: ProcessGroups,
    ) -> None:
        super().__init__()
        model = config.model
        batch_size = model.global_batch_size
        multiple_of = length_multiple(model)
        if not model.packed:
            multiple_of = math.lcm(multiple_of, PADDED_MULTIPLE)
        self.config = config
        self.splits = splits
        self.groups = groups
        self.descriptions = {split: rows.description() for split, rows in splits.items()}
        max_tokens = model.data.max_tokens_per_batch
        self.micro_batch_rows = functools.partial(
            MicroBatchRows,
            data_rank=groups.data_rank,
            data_size=groups.data_size,
            micro_batch_size=model.micro_batch_size,
            max_tokens=max_tokens and max_tokens * groups.context_size,
            packed=model.packed,
            multiple_of=multiple_of,
        )
        self.collate = functools.partial(
            micro_batches,
            pad_id=pad_id,
            packed=model.packed,
            multiple_of=multiple_of,
            context_rank=groups.context_rank,
            context_size=groups.context_size,
            every_target=model.knowledge_distillation.objective == "custom",
        )
        order = _training_order(
            config, splits["train"], plan.steps_per_epoch * batch_size
        )
        self.training = TrainingBatches(
            order, batch_size, plan.steps_per_epoch, plan.max_steps
        )
        self._loaders: list[WatchedLoader] = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed_samples": self.training.consumed_samples,
            "global_batch_size": self.training.global_batch_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the steps of the checkpoint, even if their batches had another size."""
        now = self.training.global_batch_size
        before = state_dict.get("global_batch_size", now)
        self.training.consumed_samples = state_dict["consumed_samples"] // before * now

    def transfer_batch_to_device(
        self, batch: list[Batch], device: torch.device, dataloader_idx: int
    ) -> list[Batch]:
        """Return the batch as it is: `forward_backward` moves micro-batches one by one."""
        return batch

    def train_dataloader(self) -> WatchedLoader:
        self.watched = self._loader("train", self.training)
        return self.watched

    def val_dataloader(self) -> WatchedLoader | list[Any]:
        return (
            self._evaluation_loader("validation") if "validation" in self.splits else []
        )

    def test_dataloader(self) -> WatchedLoader:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> WatchedLoader:
        batch_size = self.config.model.global_batch_size
        return self._loader(split, EvaluationBatches(len(self.splits[split]), batch_size))

    def _loader(
        self, split: str, batches: TrainingBatches | EvaluationBatches
    ) -> WatchedLoader:
        num_workers = self.config.model.data.num_workers
        loader: DataLoader[Any] = DataLoader(
            self.micro_batch_rows(self.splits[split]),
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            # A spawned worker would import everything again.
            multiprocessing_context="fork" if num_workers else None,
            # The seeds of workers must not be drawn from the generator of dropout.
            generator=torch.Generator(),
            pin_memory=self.groups.device.type == "cuda",
            worker_init_fn=follow_the_main_process,
        )
        self._loaders.append(WatchedLoader(loader))
        return self._loaders[-1]

    def close(self) -> None:
        """End the processes that read ahead."""
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()


def _training_order(
    config: TrainStudentConfig, rows: Rows, samples_per_epoch: int
) -> SampleOrder:
    data = config.model.data
    weights = data.weights("train")
    if weights is not None:
        counts = shares(weights, samples_per_epoch)
        for path, count in zip(data.paths("train"), counts, strict=True):
            if count == 0:
                raise ConfigError(
                    f"{PREFIX}.train: the weight of {path} gives it none of the "
                    f"{samples_per_epoch} samples of an epoch; give it a greater one, or take the "
                    "path out"
                )
            log.info(
                "train: %s gives %d of the %d samples of an epoch",
                path,
                count,
                samples_per_epoch,
            )
    return SampleOrder(rows.source_chunks(), weights, config.model.seed, data.shuffle)
