"""Data of stage 2: open the splits, check them against the student, and form batches."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Batch, Example
from nemo_kd.cache.blend import CacheBlend
from nemo_kd.cache.layout import CacheError, path_of
from nemo_kd.cache.reader import CacheReader
from nemo_kd.config import ConfigError
from nemo_kd.config.data import sequence_length
from nemo_kd.config.model import GPTArchitecture, length_multiple
from nemo_kd.config.student import (
    SPLITS,
    StudentDataConfig,
    StudentDatasetConfig,
    StudentModelConfig,
    StudentRecordsConfig,
)
from nemo_kd.data.batches import (
    MicroBatches,
    TokenizedRows,
    example_of,
)
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.data.order import SampleOrder, TrainingBatches
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.run.interruption import follow_the_main_process
from nemo_kd.student.cache_match import find_mismatches
from nemo_kd.student.schedule import TrainingPlan

log = logging.getLogger(__name__)

Rows = CacheBlend | TokenizedRows

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
    if data.uses_cache and data.dataset != StudentDatasetConfig():
        log.warning(
            "model.data.dataset has no effect on caches, which hold tokens; it is for "
            "data_impl=dataset"
        )
    splits: dict[str, Rows] = {}
    readers: dict[str, list[CacheReader]] = {}
    mismatches: list[str] = []
    for split in filter(data.paths, SPLITS):
        if data.uses_cache:
            readers[split] = _open_caches(split, data, seq_length, architecture)
            mismatches += [
                f"\n  {split}: {text}"
                for text in find_mismatches(
                    readers[split], model, architecture.vocab_size, tokenizer
                )
            ]
        else:
            splits[split] = _tokenize(split, data, seq_length, architecture, tokenizer)
    if mismatches:
        raise CacheError(
            f"{PREFIX}: cache and student do not match:{''.join(mismatches)}"
        )
    splits |= {split: CacheBlend(sources) for split, sources in readers.items()}
    for split, rows in splits.items():
        is_weighted = data.weights(split) is not None
        _check_usable(f"{PREFIX}.{split}", rows, data.paths(split), is_weighted)
    return splits


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
        checked = range(start, start + size, -(-size // MAX_ROWS_CHECKED) or 1)
        start += size
        if not size and not is_weighted:
            continue
        if not any(example_of(rows[position]).num_loss_tokens for position in checked):
            raise ConfigError(
                f"{key}: {path}: none of {len(checked)} examples has a token in the loss "
                "(loss_mask is 0 throughout), so there is nothing to train or to measure on; take "
                "it out, or mark what is to be trained"
            )


def _open_caches(
    split: str, data: StudentDataConfig, seq_length: int, architecture: GPTArchitecture
) -> list[CacheReader]:
    vocab_size = architecture.vocab_size if data.drop_ids_outside_vocab else None
    chunks = data.n_chunks
    n_chunks = chunks.get(split) if isinstance(chunks, dict) else chunks
    readers = [
        CacheReader(path, n_chunks, data.top_k, seq_length, vocab_size)
        for path in data.paths(split)
    ]
    dropped = sum(reader.dropped_too_long for reader in readers)
    if dropped:
        log.warning(
            "%s: %d examples longer than %d tokens are dropped",
            split,
            dropped,
            seq_length,
        )
    return readers


def _tokenize(
    split: str,
    data: StudentDataConfig,
    seq_length: int,
    architecture: GPTArchitecture,
    tokenizer: PreTrainedTokenizerBase,
) -> TokenizedRows:
    paths = data.paths(split)
    for path in (each for each in paths if path_of(each) != each):
        raise ConfigError(
            f"{PREFIX}.{split}: {path} selects rows, which caches take and data_impl=dataset does "
            "not; give a file with these rows alone"
        )
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
        skipped.update(one for one in found if isinstance(one, str))
        examples.append(
            [replace(one, source=source) for one in found if isinstance(one, Example)]
        )
    for reason, count in skipped.items():
        log.warning("%s: %d examples skipped: %s", split, count, reason)
    return TokenizedRows(paths, examples)


class StudentData(pl.LightningDataModule):
    """Data loaders over the splits; a batch is the list of this rank's micro-batches of a step.

    Attributes:
        descriptions: of every split, with paths and fingerprint.
        training: the order of the training data, and the place in it.
    """

    def __init__(
        self,
        model: StudentModelConfig,
        splits: dict[str, Rows],
        plan: TrainingPlan,
        pad_id: int,
        groups: ProcessGroups,
    ) -> None:
        super().__init__()
        self.model = model
        self.splits = splits
        self.plan = plan
        self.pad_id = pad_id
        self.groups = groups
        self.descriptions = {split: rows.description() for split, rows in splits.items()}
        order = SampleOrder(
            splits["train"].source_chunks(),
            model.data.weights("train"),
            model.seed,
            model.data.shuffle,
        )
        self.training = TrainingBatches(
            order, model.global_batch_size, plan.steps_per_epoch, plan.max_steps
        )
        self._loaders: list[DataLoader[Any]] = []

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

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader("train")

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.loader("validation") if "validation" in self.splits else []

    def loader(self, split: str) -> DataLoader[Any]:
        """Return the split's batches: training data from the next step on, all of the others."""
        model = self.model
        groups = self.groups
        rows = self.splits[split]
        batches: Any = self.training
        if split != "train":
            batches = BatchSampler(
                range(len(rows)), model.global_batch_size, drop_last=False
            )
        multiple_of = length_multiple(model)
        if not model.packed:
            multiple_of = math.lcm(multiple_of, PADDED_MULTIPLE)
        max_tokens = model.data.max_tokens_per_batch
        num_workers = model.data.num_workers
        loader: DataLoader[Any] = DataLoader(
            MicroBatches(
                rows,
                data_rank=groups.data_rank,
                data_size=groups.data_size,
                micro_batch_size=model.micro_batch_size,
                max_tokens=max_tokens and max_tokens * groups.context_size,
                packed=model.packed,
                multiple_of=multiple_of,
                pad_id=self.pad_id,
                every_target=model.knowledge_distillation.objective == "custom",
                context_rank=groups.context_rank,
                context_size=groups.context_size,
            ),
            batch_sampler=batches,
            collate_fn=list,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            # A spawned worker would import everything again.
            multiprocessing_context="fork" if num_workers else None,
            # The seeds of workers must not be drawn from the generator of dropout.
            generator=torch.Generator(),
            pin_memory=groups.device.type == "cuda",
            worker_init_fn=follow_the_main_process,
        )
        self._loaders.append(loader)
        return loader

    def close(self) -> None:
        """End the processes that read ahead; they ignore signals, so Python would wait forever."""
        for loader in self._loaders:
            workers: Any = loader._iterator  # noqa: SLF001 - torch has no public way
            if workers is not None:
                workers._shutdown_workers()  # noqa: SLF001 - nor for this
        self._loaders.clear()
