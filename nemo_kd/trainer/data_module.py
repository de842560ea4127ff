"""Batches for training and validation: which examples, in which order, on which rank."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset

from nemo_kd.batch import Batch, CachedExample, Example
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.data.collate import collate
from nemo_kd.data.order import EvaluationBatches, TrainingBatches
from nemo_kd.mcore.groups import ProcessGroups

Row = Example | CachedExample


class Rows(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Row: ...


class StudentData(pl.LightningDataModule):
    """Data loaders over the splits; each batch is a list of this rank's micro-batches, padded one by one."""

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
        self.config, self.splits, self.groups = config, splits, groups
        self.collate = functools.partial(_micro_batches, micro_batch_size=config.model.micro_batch_size, pad_id=pad_id)
        self.training = TrainingBatches(
            len(splits["train"]),
            config.model.global_batch_size,
            steps_per_epoch,
            max_steps,
            config.model.seed,
            config.model.data.shuffle,
            groups.data_rank,
            groups.data_size,
        )

    def state_dict(self) -> dict[str, int]:
        return {"consumed_samples": self.training.consumed_samples}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.training.consumed_samples = state_dict["consumed_samples"]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", self.training)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("validation", self._once("validation"))

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", self._once("test"))

    def _once(self, split: str) -> EvaluationBatches:
        return EvaluationBatches(
            len(self.splits[split]), self.config.model.global_batch_size, self.groups.data_rank, self.groups.data_size
        )

    def _loader(self, split: str, batches: TrainingBatches | EvaluationBatches) -> DataLoader[Any]:
        num_workers = self.config.model.data.num_workers
        return DataLoader(
            _WithFiller(self.splits[split]),
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )


class _WithFiller(Dataset[Row | None]):
    """The rows, and None for position -1: a row that only fills up a batch."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Row | None:
        return None if position < 0 else self.rows[position]


def _micro_batches(rows: Sequence[Row | None], micro_batch_size: int, pad_id: int) -> list[Batch]:
    return [collate(rows[start : start + micro_batch_size], pad_id) for start in range(0, len(rows), micro_batch_size)]
