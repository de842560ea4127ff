"""When a run has to stop before it is done, and what it does until then."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from nemo_kd.batch import Batch
from nemo_kd.run.interruption import Interruption, Requeue
from nemo_kd.run.watchdog import Watchdog
from nemo_kd.student.stop_flags import Agreement

log = logging.getLogger(__name__)


class StopsAllRanks(Exception):
    """What every rank raises at the same place, so that they can still do something together."""


class Stopped(StopsAllRanks, Requeue):
    """The run stops early, and its checkpoint is whole."""


class Ended(StopsAllRanks, SystemExit):
    """The same, but the same command would begin anew."""


class Lifetime(pl.Callback):
    """Stops all ranks after the same step, or between the same batches of a validation, and feeds the watchdog.

    Attributes:
        reason: why the run has to stop; the checkpoint callback saves then, and what would come next is not begun.
    """

    def __init__(
        self, interruption: Interruption | None, watchdog: Watchdog, resumes: bool = True
    ) -> None:
        self.interruption, self.watchdog, self.resumes = interruption, watchdog, resumes
        self.agreement = Agreement()
        self.reason: str | None = None
        self._loading = contextlib.ExitStack()
        self._loading.enter_context(watchdog.pause("loading"))

    @classmethod
    @contextlib.contextmanager
    def begin(cls, settings: dict[str, Any], timeout_s: float) -> Iterator[Lifetime]:
        """From here on signals, `max_time_per_run` and hangs are looked after; every rank takes part.

        Args:
            settings: of exp_manager. Where it writes no checkpoint, signals end the run as they would any other.
        """
        rank = torch.distributed.get_rank()
        with Watchdog(timeout_s, rank) as watchdog, watchdog.explain_collective_errors():
            if not settings["create_checkpoint_callback"]:
                yield cls(None, watchdog)
                return
            with Interruption(settings["max_time_per_run"]) as interruption:
                interruption.share(_own_store(), rank)
                yield cls(interruption, watchdog, resumes=settings["resume_if_exists"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.agreement = pl_module.agreement
        self.agreement.is_writing = trainer.strategy.checkpoint_io.is_writing
        self.agreement.wants_to_stop = lambda: (
            self.interruption is not None and self.interruption.reason is not None
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._loading.close()
        if self.interruption is not None:
            # Back from Lightning, which has handlers of its own, and would end this rank alone.
            self.interruption.take_signals()
            trainer._signal_connector.received_sigterm = False

    on_test_start = on_train_start

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: list[Batch], batch_idx: int
    ) -> None:
        self._leave_if_asked()
        self.watchdog.step("step %d: examples %s", trainer.global_step + 1, _Examples(batch))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._look_for_reason()
        self.watchdog.step("after step %d: waiting for data", trainer.global_step)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: list[Batch],
        batch_idx: int,
        *args: Any,
    ) -> None:
        self._leave_if_asked()
        where = "%s after step %d, batch %d: examples %s"
        self.watchdog.step(
            where, trainer.state.stage, trainer.global_step, batch_idx, _Examples(batch)
        )

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *args: Any,
    ) -> None:
        self.agreement.sum(torch.zeros(0, dtype=torch.float64, device=pl_module.groups.device))
        self._look_for_reason()
        self.watchdog.step(
            "after batch %d of the %s: waiting for data", batch_idx, trainer.state.stage
        )

    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_if_asked()

    on_test_end = on_validation_end

    def _look_for_reason(self) -> None:
        if self.agreement.stop and self.interruption is not None:
            self.reason = self.interruption.agreed_reason()

    def _leave_if_asked(self) -> None:
        if self.reason is None:
            return
        if self.resumes:
            raise Stopped(self.reason)
        log.warning(
            "%s; with exp_manager.resume_if_exists=true the same command goes on from its checkpoint",
            self.reason,
        )
        raise Ended(128 + signal.SIGTERM)


def _own_store() -> Store:
    """Keys that belong to this run, should the process have had another one."""
    store, number = _get_default_store(), [0]
    if torch.distributed.get_rank() == 0:
        number = [store.add("train_student", 1)]
    torch.distributed.broadcast_object_list(number, src=0)
    return PrefixStore(f"train_student/{number[0]}", store)


class _Examples:
    """The indices in a batch, put together when they are shown."""

    def __init__(self, micro_batches: Sequence[Batch]) -> None:
        self.micro_batches = micro_batches

    def __str__(self) -> str:
        return str([batch.indices_B.tolist() for batch in self.micro_batches])
