"""Batches for training and validation: which examples, in which order, on which rank."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from nemo_kd.batch import Batch
from nemo_kd.config import ConfigError
from nemo_kd.config.model import length_multiple
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.data.batches import MicroBatching
from nemo_kd.data.collate import micro_batches
from nemo_kd.data.order import EvaluationBatches, SampleOrder, TrainingBatches, shares
from nemo_kd.data.rows import MicroBatchRows, Rows
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.schedule import context_positions
from nemo_kd.run.interruption import follow_the_main_process
from nemo_kd.student.throughput import WatchedLoader

log = logging.getLogger(__name__)

PADDED_MULTIPLE = 8
"""Padded rows are a multiple of so many positions long: matrix products of such sizes are the fast ones."""


class StudentData(pl.LightningDataModule):
    """Data loaders over the splits; each batch is the list of this rank's micro-batches of a global batch."""

    def __init__(
        self,
        config: TrainStudentConfig,
        splits: dict[str, Rows],
        steps_per_epoch: int,
        max_steps: int,
        pad_id: int,
        groups: ProcessGroups,
    ) -> None:
        super().__init__()
        self._loaders: list[WatchedLoader] = []
        self.config, self.splits, self.groups = config, splits, groups
        self.descriptions = {split: rows.description() for split, rows in splits.items()}
        model = config.model
        multiple_of = length_multiple(model)
        if not model.packed:
            multiple_of = math.lcm(multiple_of, PADDED_MULTIPLE)
        max_tokens = model.data.max_tokens_per_batch
        self.batching = MicroBatching(
            groups.data_rank,
            groups.data_size,
            model.micro_batch_size,
            max_tokens if max_tokens is None else max_tokens * groups.context_size,
            model.packed,
            multiple_of,
        )
        columns = functools.partial(
            context_positions, rank=groups.context_rank, size=groups.context_size
        )
        self.collate = functools.partial(
            micro_batches,
            pad_id=pad_id,
            packed=model.packed,
            multiple_of=multiple_of,
            columns=columns if groups.context_size > 1 else None,
            every_target=model.knowledge_distillation.objective == "custom",
        )
        order = _training_order(config, splits["train"], steps_per_epoch * model.global_batch_size)
        self.training = TrainingBatches(order, model.global_batch_size, steps_per_epoch, max_steps)

    def state_dict(self) -> dict[str, Any]:
        batches = self.training
        return {
            "consumed_samples": batches.consumed_samples,
            "global_batch_size": batches.global_batch_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the steps of the checkpoint, also where their batches had another size."""
        now = self.training.global_batch_size
        before = state_dict.get("global_batch_size", now)
        self.training.consumed_samples = state_dict["consumed_samples"] // before * now

    def transfer_batch_to_device(
        self, batch: list[Batch], device: torch.device, dataloader_idx: int
    ) -> list[Batch]:
        """The batch as it is: micro-batches go to the device one by one, see `forward_backward`."""
        return batch

    def train_dataloader(self) -> WatchedLoader:
        self.watched = self._loader("train", self.training)
        return self.watched

    def val_dataloader(self) -> WatchedLoader | list[Any]:
        """Return the validation data; an empty list where a run without validations has none."""
        return (
            self._loader("validation", self._once("validation"))
            if "validation" in self.splits
            else []
        )

    def test_dataloader(self) -> WatchedLoader:
        return self._loader("test", self._once("test"))

    def _once(self, split: str) -> EvaluationBatches:
        return EvaluationBatches(len(self.splits[split]), self.config.model.global_batch_size)

    def _loader(self, split: str, batches: TrainingBatches | EvaluationBatches) -> WatchedLoader:
        num_workers = self.config.model.data.num_workers
        loader: DataLoader[Any] = DataLoader(
            MicroBatchRows(self.splits[split], self.batching.share),
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            multiprocessing_context="fork"
            if num_workers
            else None,  # a spawned one imports everything anew
            generator=torch.Generator(),  # workers' seeds come from it, and not from what dropout draws from
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


def _training_order(config: TrainStudentConfig, rows: Rows, samples_per_epoch: int) -> SampleOrder:
    data = config.model.data
    weights = data.weights("train")
    if weights is not None:
        for path, share in zip(
            data.paths("train"), shares(weights, samples_per_epoch), strict=True
        ):
            if share == 0:
                raise ConfigError(
                    f"model.data.data_prefix.train: the weight of {path} gives it none of the {samples_per_epoch} samples of an "
                    "epoch; give it a greater one, or take the path out"
                )
            log.info(
                "train: %s gives %d of the %d samples of an epoch", path, share, samples_per_epoch
            )
    return SampleOrder(rows.source_chunks(), weights, config.model.seed, data.shuffle)
