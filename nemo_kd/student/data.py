"""Data of stage 2: open the splits, check them against the student, and form batches."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Example
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN
from nemo_kd.cache.reader import CacheBlend, CacheReader
from nemo_kd.config import ConfigError
from nemo_kd.config.data import sequence_length
from nemo_kd.config.loss import KEY
from nemo_kd.config.shared import GPTArchitecture, length_multiple
from nemo_kd.config.student import (
    SPLITS,
    StudentDataConfig,
    StudentDatasetConfig,
    StudentModelConfig,
    TrainStudentConfig,
)
from nemo_kd.data.batches import (
    MicroBatches,
    TokenizedRows,
    example_of,
)
from nemo_kd.data.dataset import TokenizedDataset, describe_left_out
from nemo_kd.data.order import SampleOrder, TrainingBatches
from nemo_kd.data.records import open_records
from nemo_kd.data.tokenizer import (
    chat_template_fingerprint,
    shares_ids,
    tokenizer_fingerprint,
)
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.run.collective import gather, on_rank_zero, rank, world_size
from nemo_kd.run.interruption import follow_the_main_process
from nemo_kd.student.steps import TrainingPlan

log = logging.getLogger(__name__)

Rows = CacheBlend | TokenizedRows

SAMPLED_ROWS = 64
PREFIX = "model.data.data_prefix"

PADDED_MULTIPLE = 8
"""Padded rows are a multiple of this long: matrix products of such sizes are fast."""


def check_dataset_settings(config: TrainStudentConfig) -> None:
    """Warn of settings of datasets that nothing reads."""
    data = config.model.data
    reads = not data.uses_cache or config.eval.interval
    if not reads and data.dataset != StudentDatasetConfig():
        log.warning(
            "model.data.dataset has no effect on caches, which hold tokens; it is for "
            "data_impl=dataset and eval.data"
        )


def load_splits(
    model: StudentModelConfig,
    architecture: GPTArchitecture,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Rows]:
    """Open train, validation and, if given, test.

    Raises:
        CacheError, DataError: a file is missing or damaged, or a cache does not fit the student.
        ConfigError: a path has no usable example.
    """
    data = model.data
    seq_length = sequence_length(
        model.max_seq_length, architecture.max_position_embeddings
    )
    smallest_dropped_id = (
        architecture.vocab_size if data.drop_ids_outside_vocab else None
    )
    splits: dict[str, Rows] = {}
    for split in filter(data.paths, SPLITS):
        if data.uses_cache:
            num_chunks = data.n_chunks
            if isinstance(num_chunks, dict):
                num_chunks = num_chunks.get(split)
            readers = [
                CacheReader(
                    path, num_chunks, data.top_k, seq_length, smallest_dropped_id
                )
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
            listed = "".join(
                f"\n  {reader.source}: {text}"
                for reader in readers
                for text in find_mismatches(
                    reader, model, architecture.vocab_size, tokenizer
                )
            )
            if listed:
                raise CacheError(
                    f"{PREFIX}.{split}: cache and student do not match:{listed}"
                )
            splits[split] = CacheBlend(readers)
        else:
            splits[split] = _tokenize(split, data, seq_length, architecture, tokenizer)
        _check_usable(split, splits[split], data)
    return splits


def source_names(paths: Sequence[str]) -> list[str]:
    """Return a short name of each path for metrics: the file's, numbered if several are alike."""
    stems = [
        Path(path).name.partition(".")[0].replace("_CHUNK_ID", "") for path in paths
    ]
    return [
        stem if stems.count(stem) == 1 else f"{stem}_{number}"
        for number, stem in enumerate(stems)
    ]


def _check_usable(split: str, rows: Rows, data: StudentDataConfig) -> None:
    """Refuse a source without tokens in the loss.

    Raises:
        ConfigError: names the source.
    """
    start = 0
    for path, sizes in zip(data.paths(split), rows.source_chunks(), strict=True):
        positions = range(start, start + sum(sizes))
        start = positions.stop
        if not any(example_of(rows[place]).num_loss_tokens for place in positions):
            raise ConfigError(
                f"{PREFIX}.{split}: {path}: none of {len(positions)} examples has a token in the "
                "loss, so there is nothing to train or to measure on; take it out, or mark what is "
                "to be trained"
            )


def find_mismatches(
    reader: CacheReader,
    model: StudentModelConfig,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[str]:
    """Yield everything in which a cache does not fit the student."""
    data = model.data
    loss = model.knowledge_distillation
    ours = tokenizer_fingerprint(tokenizer)
    yield from _tokenizer_mismatches(reader, data, tokenizer, ours)
    # Vocabularies of one family are padded differently, so the ids count.
    if reader.max_token_id >= vocab_size:
        yield (
            f"vocabulary: the tokens have ids up to {reader.max_token_id} in the cache, the "
            f"student has {vocab_size} ids; both must share one tokenizer"
        )
    if reader.max_topk_id >= vocab_size and not data.drop_ids_outside_vocab:
        yield (
            f"vocabulary: the teacher's tokens have ids up to {reader.max_topk_id} in the cache, "
            f"the student has {vocab_size} ids; model.data.drop_ids_outside_vocab=true counts them "
            "to the tail"
        )
    held = [manifest.top_k for manifest in reader.manifests] or [reader.largest_k]
    if data.top_k is not None and data.top_k > min(held):
        yield (
            f"model.data.top_k: {data.top_k} exceeds the {min(held)} logits a position that the "
            "cache holds at most"
        )
    if loss.cross_tokenizer and {one.tokenizer for one in reader.manifests} != {ours}:
        yield (
            f"{KEY}.cross_tokenizer: True, but nothing shows that teacher and student share "
            "one tokenizer, and token sequences of different ones cannot be aligned; use a "
            "student with the teacher's tokenizer"
        )
    if loss.divergence is not None and len(reader):
        yield from loss.missing_targets(reader[0].teacher)  # it stands for all rows
    if loss.objective == "custom" and reader.select is not None:
        yield (
            f"{KEY}.kd_loss: custom, but the cache holds the teacher at selected positions only "
            f"({reader.select}), which a custom loss cannot use; use another kd_loss, or a cache "
            "without cache.select"
        )
    if loss.distill_on_prompt and not _holds_all_positions(reader):
        yield (
            f"{KEY}.distill_on_prompt: True, but the cache holds the teacher at positions of the "
            "loss only; compute it with cache.positions=all"
        )


def _holds_all_positions(reader: CacheReader) -> bool:
    stored = {manifest.codec.get("positions", "all") for manifest in reader.manifests}
    if stored or not len(reader):
        return stored <= {"all"}
    row = reader[0]
    return len(row.teacher) == row.example.num_tokens


def _tokenizer_mismatches(
    reader: CacheReader,
    data: StudentDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    ours: str,
) -> Iterator[str]:
    template = chat_template_fingerprint(tokenizer)
    named = [one for one in reader.manifests if one.tokenizer != UNKNOWN]
    if not named:
        log.warning(
            "%s: nothing records which tokenizer wrote it; make sure that it is the student's",
            reader.path,
        )
    for manifest in named:
        tokens = manifest.tokenizer_tokens
        is_same = tokens is not None and shares_ids(tokens, tokenizer)
        if manifest.tokenizer != ours and not is_same:
            yield (
                f"tokenizer: {manifest.tokenizer} ({manifest.tokenizer_size} tokens) in the cache, "
                f"{ours} ({len(tokenizer)} tokens) in the student; both must share one tokenizer"
            )
    for manifest in reader.manifests:
        if (
            manifest.uses_chat_template
            and manifest.chat_template not in (None, template)
            and not data.allow_other_template
        ):
            yield (
                f"chat template: {manifest.chat_template} in the cache, {template or 'none'} in "
                "the student; copy the teacher's chat_template into the student's tokenizer files, "
                "or set model.data.allow_other_template=true"
            )


def _tokenize(
    split: str,
    data: StudentDataConfig,
    seq_length: int,
    architecture: GPTArchitecture,
    tokenizer: PreTrainedTokenizerBase,
) -> TokenizedRows:
    paths = data.paths(split)
    rows = TokenizedRows(paths)
    for source, path in enumerate(paths):
        records = on_rank_zero(functools.partial(open_records, path))
        left_out: Counter[str] = Counter()
        dataset = TokenizedDataset(
            data.records(path), tokenizer, seq_length, architecture.vocab_size, records
        )
        for found in _tokenized(dataset, f"tokenizing {split}"):
            if isinstance(found, str):  # the reason to skip it
                left_out[found] += 1
            else:
                rows.append(replace(found, source=source))
                left_out += found.left_out
        if left_out:
            log.warning(describe_left_out(path, left_out))
    return rows


def _tokenized(dataset: TokenizedDataset, what: str) -> Iterator[Example | str]:
    """Yield what all records make; every rank tokenizes a share of them."""
    size = world_size()
    share = dataset.indices[rank() :: size]
    progress = tqdm(share, what, leave=False, disable=None)
    shares = gather(lambda: [dataset[index] for index in progress])
    for number in range(len(dataset.indices)):
        yield shares[number % size][number // size]


@dataclass
class StudentData:
    """Data loaders over the splits; a batch is the list of this rank's micro-batches of a step.

    Attributes:
        descriptions: of every split, with paths and fingerprint.
        training: the order of the training data, and the place in it.
    """

    model: StudentModelConfig
    splits: dict[str, Rows]
    plan: TrainingPlan
    pad_id: int
    groups: ProcessGroups
    _loaders: list[DataLoader[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.descriptions = {
            split: rows.description() for split, rows in self.splits.items()
        }
        model = self.model
        order = SampleOrder(
            self.splits["train"].source_chunks(),
            model.data.weights("train"),
            model.seed,
            model.data.shuffle,
        )
        self.training = TrainingBatches(
            order,
            model.global_batch_size,
            self.plan.steps_per_epoch,
            self.plan.max_steps,
        )

    @functools.cached_property
    def sample(self) -> list[Example]:
        """Some training examples, evenly spaced."""
        rows = self.splits["train"]
        places = range(0, len(rows), -(-len(rows) // SAMPLED_ROWS))
        return [example_of(rows[place]) for place in places]

    @property
    def loss_tokens_per_step(self) -> float:
        """Return an estimate for a global batch."""
        loss_tokens = sum(example.num_loss_tokens for example in self.sample)
        return self.model.global_batch_size * loss_tokens / len(self.sample)

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed_samples": self.training.consumed_samples,
            "global_batch_size": self.training.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps of the checkpoint, even if their batches had another size."""
        now = self.training.global_batch_size
        before = state.get("global_batch_size", now)
        self.training.consumed_samples = state["consumed_samples"] // before * now

    def loader(self, split: str) -> DataLoader[Any]:
        """Return the split's batches: training data from the next step on, all of the others."""
        model = self.model
        loss = model.knowledge_distillation
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
                every_target=loss.objective == "custom",
                distill_on_prompt=loss.distill_on_prompt,
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
