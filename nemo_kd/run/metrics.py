"""Metrics of a run: counters, their rates, and the places that show them."""

from __future__ import annotations

import contextlib
import errno
import logging
import operator
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import orjson

from nemo_kd.config import ConfigError
from nemo_kd.files import open_for_append
from nemo_kd.terminal import print_text, printable

if TYPE_CHECKING:
    from torch.distributed import Store

Unit = Literal["tokens", "steps"]
"""Field of Counters that measures progress."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

WINDOW_INTERVALS = 10
"""Number of intervals in the moving window of recent rates."""


@dataclass
class Counters:
    """Sums since the start of the run, of one replica of the model or of all."""

    steps: float = 0
    """Optimizer steps of the whole run, those before a resume included."""
    tokens: float = 0
    """Tokens that the model computed, without padding."""
    padding_tokens: float = 0
    """Positions computed for padding."""
    loss_tokens: float = 0
    """Tokens whose label counts in the loss."""
    examples: float = 0
    flops: float = 0
    """As ForwardFlops counts them."""
    data_wait_s: float = 0
    """Time in which the model waited for data."""
    cached_tokens: float = 0
    """Tokens on disk; they follow `tokens` with a delay."""
    cached_loss_tokens: float = 0
    kept_mass_sum: float = 0
    """Probability of the kept ids, summed over cached_loss_tokens."""
    bytes: float = 0
    """Size on disk."""

    def __add__(self, other: Counters) -> Counters:
        return Counters(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*map(operator.sub, astuple(self), astuple(other)))


class SharedCounters:
    """Counters of all replicas in a store. No replica waits for another.

    Args:
        rank: number of this replica.
        size: number of replicas.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store = store
        self.rank = rank
        self.size = size

    def publish(self, counters: Counters) -> None:
        self.store.set(f"progress/{self.rank}", orjson.dumps(asdict(counters)).decode())

    def total(self) -> Counters:
        """Return the sum of the counters that the replicas published last."""
        keys = [f"progress/{rank}" for rank in range(self.size)]
        published = [
            orjson.loads(self.store.get(key)) for key in keys if self.store.check([key])
        ]
        return sum((Counters(**counters) for counters in published), Counters())


class Sink(Protocol):
    """A place that shows metrics."""

    def show(self, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Progress:
    """Counts, and reports progress and rates to the sinks every `interval_s`.

    With `shared` every replica counts and publishes, and replica 0, which alone has sinks, reports
    the sum. There is no background thread: a report comes with the first `add` after the interval.

    Args:
        total: tokens or steps of all replicas, as `unit` says; 0 if unknown, then without ETA.
        peak_flops: of all GPUs together; None if unknown, then without utilisation.
        start: counts from before this run, which the rates leave out.

    Attributes:
        latest: further metrics for the next report.
    """

    def __init__(
        self,
        total: int,
        interval_s: float,
        sinks: Sequence[Sink] = (),
        shared: SharedCounters | None = None,
        peak_flops: float | None = None,
        unit: Unit = "tokens",
        start: Counters | None = None,
    ) -> None:
        self.total = total
        self.unit = unit
        self.interval_s = interval_s
        self.sinks = sinks
        self.shared = shared
        self.peak_flops = peak_flops
        self.counters = start or Counters()
        self.latest: dict[str, float] = {}
        self._shown: Counters | None = None
        self._started_s = time.monotonic()
        self._next_report_s = self._started_s + interval_s
        self._window = deque(
            [(self._started_s, self.counters)], maxlen=WINDOW_INTERVALS + 1
        )

    def add(self, **counts: float) -> None:
        """Add to the fields of Counters, and report if the interval is over."""
        self.counters += Counters(**counts)
        now_s = time.monotonic()
        if now_s >= self._next_report_s:
            self._next_report_s = now_s + self.interval_s
            self.report()

    def report(self) -> None:
        """Publish the counters, and show the sum in the sinks."""
        if self.shared is not None:
            self.shared.publish(self.counters)
        if self.sinks:
            self._shown = self._total()
            metrics = {**self.latest, **self._metrics(self._shown, time.monotonic())}
            for sink in self.sinks:
                sink.show(metrics)

    def close(self) -> None:
        """Report once more if something changed, and close the sinks.

        For a last report on all replicas, each calls `report` and waits for the others before.
        """
        if self._shown != self._total():
            self.report()
        for sink in self.sinks:
            sink.close()

    def _total(self) -> Counters:
        return self.counters if self.shared is None else self.shared.total()

    def _metrics(self, total: Counters, now_s: float) -> dict[str, float]:
        """Return rates over the last WINDOW_INTERVALS reports, without those that are unknown."""
        before_s, before = self._window[0]
        self._window.append((now_s, total))
        recent = total - before
        seconds = max(now_s - before_s, 1e-9)
        num_replicas = 1 if self.shared is None else self.shared.size
        done = getattr(total, self.unit)
        recently_done = getattr(recent, self.unit)
        metrics = {
            "progress/tokens": total.tokens,
            "progress/examples": total.examples,
            "perf/tokens_per_s": recent.tokens / seconds,
            "perf/tokens_per_s_overall": total.tokens
            / max(now_s - self._started_s, 1e-9),
            "perf/data_wait_percent": 100 * recent.data_wait_s / seconds / num_replicas,
        }
        if self.unit == "steps":
            metrics["progress/steps"] = total.steps
        if self.total:
            metrics["progress/percent"] = 100 * done / self.total
            if recently_done:
                metrics["perf/eta_s"] = (
                    max(0.0, self.total - done) * seconds / recently_done
                )
        if recent.tokens:
            computed = recent.tokens + recent.padding_tokens
            metrics["perf/padding_percent"] = 100 * recent.padding_tokens / computed
        if self.peak_flops:
            metrics["perf/mfu_percent"] = 100 * recent.flops / seconds / self.peak_flops
        if total.cached_loss_tokens:
            metrics["cache/kept_mass"] = total.kept_mass_sum / total.cached_loss_tokens
        if total.cached_tokens:
            metrics["cache/bytes_per_token"] = total.bytes / total.cached_tokens
        return metrics


DESCRIPTIONS = {
    "epoch": "epoch {:.2f}",
    "train/loss": "loss {:.4f}",
    "train/kd_loss": "kd_loss {:.4f}",
    "train/sft_loss": "sft_loss {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad_norm {:.3g}",
    "perf/tokens_per_s": "{:,.0f} tokens/s",
    "perf/mfu_percent": "{:.1f}% MFU",
    "perf/padding_percent": "{:.1f}% padding",
    "perf/data_wait_percent": "{:.1f}% data wait",
    "perf/peak_memory_gib": "{:.1f} GiB",
    "cache/kept_mass": "kept mass {:.4f}",
}


class ProgressLine:
    """Progress on stderr: a bar on a terminal, else a line per report.

    The bar leaves messages of the package's loggers whole. A narrow terminal cuts its end, so the
    time left comes first there.
    """

    def __init__(self, name: str, total: int, unit: Unit = "tokens") -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.bar: Any = None
        self._resources = contextlib.ExitStack()
        if sys.stderr.isatty():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            counts = f"{{n_fmt}}/{{total_fmt}} {unit} [{{elapsed}}{{postfix}}]"
            self.bar = tqdm(
                desc=name,
                total=total or None,
                unit_scale=unit == "tokens",
                dynamic_ncols=True,
                bar_format="{desc}: {percentage:3.0f}%|{bar:10}| " + counts,
            )
            self._resources.callback(self.bar.close)
            self._resources.enter_context(
                logging_redirect_tqdm([logging.getLogger("nemo_kd")])
            )

    def show(self, metrics: dict[str, float]) -> None:
        done = metrics[f"progress/{self.unit}"]
        rates = [
            text.format(metrics[name])
            for name, text in DESCRIPTIONS.items()
            if name in metrics
        ]
        left = []
        if "perf/eta_s" in metrics:
            left = [f"{timedelta(seconds=round(metrics['perf/eta_s']))} left"]
        if self.bar is not None:
            self.bar.n = int(done)
            self.bar.set_postfix_str(", ".join([*left, *rates]))  # draws
        elif self.unit == "steps":
            self.note(", ".join([f"step {done:,.0f}/{self.total:,}", *rates, *left]))
        else:
            count = f"{done:,.0f} {self.unit}"
            if "progress/percent" in metrics:
                count = f"{metrics['progress/percent']:.1f}%, {count} of {self.total:,}"
            self.note(", ".join([count, *rates, *left]))

    def note(self, text: str) -> None:
        """Print a separate line, above the bar if there is one."""
        line = f"{self.name}: {text}"
        if self.bar is not None:
            self.bar.write(printable(line), file=sys.stderr)
        else:
            print_text(line, sys.stderr)

    def close(self) -> None:
        self._resources.close()


class MetricsFile:
    """Appends every report to a file as one JSON line, with `time` in Unix seconds."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = open_for_append(path)

    def show(self, metrics: dict[str, float]) -> None:
        line = orjson.dumps({"time": time.time(), **metrics}) + b"\n"
        descriptor = self.file.fileno()
        size_before = os.fstat(descriptor).st_size
        try:
            while line:
                line = line[os.write(descriptor, line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size_before)  # no half line
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        self.file.close()


@contextlib.contextmanager
def explained_wandb_errors() -> Iterator[None]:
    """Explain why Weights & Biases does not start.

    wandb gives up at once without an API key, and after `init_timeout` (90 s) without a network.

    Raises:
        ConfigError: the package, login or network is missing, or wandb has no such argument.
        OSError: its folder cannot be written.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "exp_manager.create_wandb_logger: wandb is not installed (pip install wandb)"
        ) from error
    try:
        yield
    except TypeError as error:
        raise ConfigError(
            f"exp_manager.wandb_logger_kwargs: {error}; leave that key out"
        ) from error
    except (wandb.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(
            "."
        )
        raise ConfigError(
            f"exp_manager.create_wandb_logger: Weights & Biases does not start ({reason}); log "
            "in (wandb login, or WANDB_API_KEY), set WANDB_MODE=offline to keep everything on "
            "this machine, or leave the key out"
        ) from error


class WandbSink:
    """Weights & Biases; `settings` are arguments of wandb.init."""

    def __init__(self, settings: dict[str, Any]) -> None:
        with explained_wandb_errors():
            import wandb

            self.run = wandb.init(**settings)

    def show(self, metrics: dict[str, float]) -> None:
        self.run.log(metrics)

    def close(self) -> None:
        self.run.finish()
