"""What a run tells about itself: counters, their names with units, and where they are shown."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
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
"""Field of Counters in which a run knows its total."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

WINDOW_INTERVALS = 10
"""Number of intervals in the moving window of recent rates."""


@dataclass
class Counters:
    """Sums since the start of the run, of one replica of the model or of all."""

    steps: float = 0
    """Optimizer steps of the whole run, those before a resume included."""
    tokens: float = 0
    """Tokens that went through the model."""
    padding_tokens: float = 0
    """Positions computed besides them, for nothing."""
    loss_tokens: float = 0
    """Tokens whose label counts in the loss."""
    examples: float = 0
    flops: float = 0
    """As ForwardFlops counts them."""
    data_wait_s: float = 0
    """Time in which the model waited for data."""
    cached_tokens: float = 0
    """Tokens of what is on disk; it follows `tokens` at a distance."""
    cached_loss_tokens: float = 0
    kept_mass_sum: float = 0
    """Probability inside the kept tokens, summed over cached_loss_tokens."""
    bytes: float = 0
    """On disk."""

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class SharedCounters:
    """Every replica's counters, through a store instead of collectives: nobody waits for anybody.

    `rank` counts replicas, `size` is their number.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size

    def publish(self, counters: Counters) -> None:
        self.store.set(_key(self.rank), orjson.dumps(asdict(counters)).decode())

    def total(self) -> Counters:
        """The sum over the replicas of what each published last; one that published nothing yet counts as 0."""
        keys = [_key(rank) for rank in range(self.size)]
        return sum(
            (
                Counters(**orjson.loads(self.store.get(key)))
                for key in keys
                if self.store.check([key])
            ),
            Counters(),
        )


def _key(rank: int) -> str:
    return f"progress/{rank}"


class Sink(Protocol):
    """Where metrics go."""

    def show(self, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Progress:
    """Counts, and every `interval_s` tells the sinks how far the run is and how fast.

    With `shared`, every replica counts and publishes, and the one whose rank is 0 shows the whole job; give sinks to
    that one only. Nothing runs in the background: a report comes with the first `add` after the interval.

    Args:
        total: tokens or steps of the whole job, as `unit` says; 0 if unknown, then there is no ETA.
        peak_flops: of all GPUs of the job together; None if unknown, then there is no utilisation.
        start: counts that were there before, to which the rates do not apply.
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
        self._window = deque([(self._started_s, self.counters)], maxlen=WINDOW_INTERVALS + 1)

    def add(self, **counts: float) -> None:
        """Adds to the fields of Counters; reports if it is time."""
        self.counters += Counters(**counts)
        now_s = time.monotonic()
        if now_s >= self._next_report_s:
            self._next_report_s = now_s + self.interval_s
            self.report()

    def report(self) -> None:
        """Publishes and shows the present state, with the `latest` values of what is not counted."""
        if self.shared is not None:
            self.shared.publish(self.counters)
        if self.sinks:
            total = self.counters if self.shared is None else self.shared.total()
            self._shown = total
            metrics = {**self.latest, **self._metrics(total, time.monotonic())}
            for sink in self.sinks:
                sink.show(metrics)

    def close(self) -> None:
        """A last report, unless the last one told the same. For one over the whole job, all replicas call `report`, meet
        at a barrier and then this."""
        if self._shown is None or self._shown != (
            self.counters if self.shared is None else self.shared.total()
        ):
            self.report()
        for sink in self.sinks:
            sink.close()

    def _metrics(self, total: Counters, now_s: float) -> dict[str, float]:
        """Rates over the last WINDOW_INTERVALS reports, the cache over the whole run; nothing that is unknown."""
        before_s, before = self._window[0]
        self._window.append((now_s, total))
        recent, seconds = total - before, max(now_s - before_s, 1e-9)
        num_replicas = 1 if self.shared is None else self.shared.size
        done, recently_done = getattr(total, self.unit), getattr(recent, self.unit)
        metrics = {
            "progress/tokens": total.tokens,
            "progress/examples": total.examples,
            "perf/tokens_per_s": recent.tokens / seconds,
            "perf/tokens_per_s_overall": total.tokens / max(now_s - self._started_s, 1e-9),
            "perf/data_wait_percent": 100 * recent.data_wait_s / seconds / num_replicas,
        }
        if self.unit == "steps":
            metrics["progress/steps"] = total.steps
        if self.total:
            metrics["progress/percent"] = 100 * done / self.total
            if recently_done:
                metrics["perf/eta_s"] = max(0.0, self.total - done) * seconds / recently_done
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


class ProgressLine:
    """On stderr: a bar where somebody watches, elsewhere a plain line an interval.

    The bar leaves messages of the package's loggers whole. What a narrow terminal has no room for is at its end, so the
    time that is left comes first there.
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

            form = (
                "{desc}: {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} "
                + unit
                + " [{elapsed}{postfix}]"
            )
            self.bar = tqdm(
                desc=name,
                total=total or None,
                unit_scale=unit == "tokens",
                dynamic_ncols=True,
                bar_format=form,
            )
            self._resources.callback(self.bar.close)
            self._resources.enter_context(logging_redirect_tqdm([logging.getLogger("nemo_kd")]))

    def show(self, metrics: dict[str, float]) -> None:
        done = metrics[f"progress/{self.unit}"]
        described = list(_described(metrics))
        eta = (
            [f"{timedelta(seconds=round(metrics['perf/eta_s']))} left"]
            if "perf/eta_s" in metrics
            else []
        )
        if self.bar is not None:
            self.bar.n = int(done)
            self.bar.set_postfix_str(", ".join([*eta, *described]))  # draws
            return
        if self.unit == "steps":
            parts = [f"step {done:,.0f}/{self.total:,}"]
        elif "progress/percent" in metrics:
            parts = [
                f"{metrics['progress/percent']:.1f}%",
                f"{done:,.0f} {self.unit} of {self.total:,}",
            ]
        else:
            parts = [f"{done:,.0f} {self.unit}"]
        self.note(", ".join([*parts, *described, *eta]))

    def note(self, text: str) -> None:
        """Prints a line of its own, above the bar if there is one."""
        line = f"{self.name}: {text}"
        if self.bar is not None:
            self.bar.write(printable(line), file=sys.stderr)
        else:
            print_text(line, sys.stderr)

    def close(self) -> None:
        self._resources.close()


def _described(metrics: dict[str, float]) -> Iterable[str]:
    texts = {
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
    yield from (text.format(metrics[name]) for name, text in texts.items() if name in metrics)


class MetricsFile:
    """A file to which every report is appended, a JSON object per line, with `time` in unix seconds."""

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
    """Raise what keeps Weights & Biases from starting as an error that names the key and the ways out.

    wandb gives up by itself: at once without a key, after its `init_timeout` (90 s) without a network.

    Raises:
        ConfigError: there is no package, no login, no network, or an argument that wandb does not have.
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
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ConfigError(
            f"exp_manager.create_wandb_logger: Weights & Biases does not start ({reason}); log in (wandb login, or "
            "WANDB_API_KEY), set WANDB_MODE=offline to keep everything on this machine, or leave the key out"
        ) from error


class WandbSink:
    """Weights & Biases; WANDB_MODE=offline keeps everything on this machine. `settings` are arguments of wandb.init."""

    def __init__(self, settings: dict[str, Any]) -> None:
        with explained_wandb_errors():
            import wandb

            self.run = wandb.init(**settings)

    def show(self, metrics: dict[str, float]) -> None:
        self.run.log(metrics)

    def close(self) -> None:
        self.run.finish()
