"""Record of a run: its configuration, its progress and the places that show them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import yaml

from nemo_kd import __version__
from nemo_kd.config import ConfigError
from nemo_kd.config.fields import is_path
from nemo_kd.files import explained, print_text, write_atomically

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger(__name__)

WINDOW_INTERVALS = 10
"""Number of intervals in the moving window of recent rates."""


class Counts(dict[str, float]):
    """Sums by name since the start of the run, of one replica of the model or of all.

    steps: optimizer steps of the whole run, those before a resume included.
    tokens, padding_tokens: positions that the model computed, without and for padding.
    loss_tokens: tokens whose label counts in the loss.
    examples, flops: as ForwardFlops counts.
    data_wait_s: time in which the model waited for data.
    cached_tokens, cached_loss_tokens, bytes: on disk; they follow `tokens` with a delay.
    kept_mass_sum: probability of the kept ids, summed over cached_loss_tokens.
    """

    def __missing__(self, name: str) -> float:
        return 0.0

    def add(self, counts: Mapping[str, float]) -> None:
        for name, value in counts.items():
            self[name] += value


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


@dataclass
class Progress:
    """Counts, and shows progress and rates every `interval_s`.

    On stderr it is a bar on a terminal, else a line per report. With a store every replica counts
    and publishes there, and replica 0, which alone has a name and sinks, reports the sum; no
    replica waits for another. There is no background thread: a report comes with the first `add`
    after the interval.

    Args:
        name: start of its lines; None shows nothing.
        total: tokens or steps of all replicas, as `unit` says.
        sinks: further places with `log(metrics)` and `finish()`: MetricsFile, WandbRun.
        replica, num_replicas: number of this replica in the store, and of all.
        peak_flops: of all GPUs together; None if unknown, then without utilisation.
        start: counts from before this run, which the rates leave out.

    Attributes:
        latest: further metrics for the next report.
    """

    name: str | None
    total: int
    interval_s: float
    sinks: Sequence[Any] = ()
    store: Store | None = None
    replica: int = 0
    num_replicas: int = 1
    peak_flops: float | None = None
    unit: str = "tokens"
    start: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = Counts(self.start)
        self.latest: dict[str, float] = {}
        self._shown: Counts | None = None
        self._started_s = time.monotonic()
        self._next_report_s = self._started_s + self.interval_s
        self._window = deque(
            [(self._started_s, Counts(self.start))], maxlen=WINDOW_INTERVALS + 1
        )
        self._bar: Any = None
        if self.name is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self.name,
                total=self.total,
                unit=f" {self.unit}",
                unit_scale=True,
                dynamic_ncols=True,
            )

    def add(self, **counts: float) -> None:
        """Add to the counts, and report if the interval is over."""
        self.counts.add(counts)
        now_s = time.monotonic()
        if now_s >= self._next_report_s:
            self._next_report_s = now_s + self.interval_s
            self.report()

    def report(self) -> None:
        """Publish the counts, and show the sum in the sinks."""
        if self.store is not None:
            self.store.set(
                f"progress/{self.replica}", orjson.dumps(self.counts).decode()
            )
        if self.name is not None:
            self._shown = self._sum()
            metrics = {**self.latest, **self._metrics(self._shown, time.monotonic())}
            self._show(metrics)
            for sink in self.sinks:
                sink.log(metrics)

    def note(self, text: str) -> None:
        """Print a separate line, above the bar if there is one."""
        line = f"{self.name}: {text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print_text(line, sys.stderr)

    def finish(self) -> None:
        """Report once more if something changed.

        For a last report on all replicas, each calls `report` and waits for the others before.
        """
        if self._shown != self._sum():
            self.report()

    def close(self) -> None:
        """Close the bar and the sinks."""
        if self._bar is not None:
            self._bar.close()
        for sink in self.sinks:
            sink.finish()

    def _show(self, metrics: dict[str, float]) -> None:
        done = metrics[f"progress/{self.unit}"]
        texts = [
            text.format(metrics[name])
            for name, text in DESCRIPTIONS.items()
            if name in metrics
        ]
        if self._bar is not None:
            self._bar.n = int(done)
            self._bar.set_postfix_str(", ".join(texts))  # draws
            return
        if "perf/eta_s" in metrics:
            texts.append(f"{timedelta(seconds=round(metrics['perf/eta_s']))} left")
        self.note(", ".join([f"{done:,.0f}/{self.total:,} {self.unit}", *texts]))

    def _sum(self) -> Counts:
        if self.store is None:
            return Counts(self.counts)
        total = Counts()
        for replica in range(self.num_replicas):
            key = f"progress/{replica}"
            if self.store.check([key]):
                total.add(orjson.loads(self.store.get(key)))
        return total

    def _metrics(self, total: Counts, now_s: float) -> dict[str, float]:
        """Return rates over the last WINDOW_INTERVALS reports, without those that are unknown."""
        before_s, before = self._window[0]
        self._window.append((now_s, total))
        recent = Counts({name: total[name] - before[name] for name in total})
        seconds = max(now_s - before_s, 1e-9)
        done = total[self.unit]
        metrics = {
            "progress/tokens": total["tokens"],
            "progress/examples": total["examples"],
            f"progress/{self.unit}": done,
            "progress/percent": _ratio(100 * done, self.total),
            "perf/tokens_per_s": recent["tokens"] / seconds,
            "perf/tokens_per_s_overall": total["tokens"]
            / max(now_s - self._started_s, 1e-9),
            "perf/eta_s": _ratio(
                max(0.0, self.total - done) * seconds, recent[self.unit]
            ),
            "perf/mfu_percent": _ratio(
                100 * recent["flops"] / seconds, self.peak_flops
            ),
            "cache/kept_mass": _ratio(
                total["kept_mass_sum"], total["cached_loss_tokens"]
            ),
            "cache/bytes_per_token": _ratio(total["bytes"], total["cached_tokens"]),
        }
        if "padding_tokens" in total:
            computed = recent["tokens"] + recent["padding_tokens"]
            padded = _ratio(100 * recent["padding_tokens"], computed)
            metrics["perf/padding_percent"] = padded
        if "data_wait_s" in total:
            waited_s = recent["data_wait_s"] / self.num_replicas
            metrics["perf/data_wait_percent"] = 100 * waited_s / seconds
        return {name: value for name, value in metrics.items() if value is not None}


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


class MetricsFile:
    """Appends every report to a file as one JSON line, with `time` in Unix seconds.

    Raises:
        FileError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab", buffering=0)

    def log(self, metrics: Mapping[str, float]) -> None:
        with explained(self.path):
            self.file.write(orjson.dumps({"time": time.time(), **metrics}) + b"\n")

    def finish(self) -> None:
        self.file.close()


class WandbRun:
    """A run of Weights & Biases; a failure after the start is one warning.

    wandb gives up at once without an API key, and after `init_timeout` (90 s) without a network.

    Args:
        arguments: of wandb.init; save_dir and offline as in NeMo also work.
        axes: metrics and the metric that their charts run along.

    Raises:
        ConfigError: the login, network or folder is missing, or an argument is wrong.
    """

    def __init__(
        self, arguments: Mapping[str, Any], axes: Mapping[str, str] | None = None
    ) -> None:
        import wandb

        settings = dict(arguments)
        if "save_dir" in settings:
            settings["dir"] = settings.pop("save_dir")
        if settings.pop("offline", False):
            settings["mode"] = "offline"
        try:
            self.run = wandb.init(**settings)
        except (wandb.Error, OSError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"exp_manager.create_wandb_logger: Weights & Biases does not start ({reason}); log "
                "in (wandb login, or WANDB_API_KEY), set WANDB_MODE=offline to keep everything on "
                "this machine, correct exp_manager.wandb_logger_kwargs, or leave the key out"
            ) from error
        self.is_lost = False
        for metrics, axis in (axes or {}).items():
            self.run.define_metric(metrics, step_metric=axis)

    def log(self, metrics: Mapping[str, float]) -> None:
        self._attempt(self.run.log, dict(metrics))

    def log_table(
        self, name: str, rows: Sequence[Mapping[str, Any]], axes: Mapping[str, float]
    ) -> None:
        """Log rows that have the same keys as a table, beside the values of its axes."""
        import wandb

        def log_rows(rows: Sequence[Mapping[str, Any]]) -> None:
            data = [list(row.values()) for row in rows]
            table = wandb.Table(columns=list(rows[0]), data=data)
            self.run.log({name: table, **axes})

        self._attempt(log_rows, rows)

    def finish(self, error: object = None, *_: object) -> None:
        self._attempt(self.run.finish, int(error is not None))

    def _attempt(self, function: Callable[[Any], object], argument: Any) -> None:
        import wandb

        try:
            if not self.is_lost:
                function(argument)
        except (wandb.Error, OSError, RuntimeError, TypeError, ValueError) as error:
            self.is_lost = True
            log.warning(
                "exp_manager.create_wandb_logger: Weights & Biases failed (%s: %s); the run "
                "continues without it, and the file of its metrics holds all",
                type(error).__name__,
                error,
            )


SECRET_NAME = re.compile(
    r"(?i)(api|access|private|secret|auth)[_-]?key|^key$|token$|secret|passw|credential|^auth"
)
"""Names inside free mappings, and of environment variables, whose values are never written."""

SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)"
    r"|^[0-9a-f]{40}$|^local-[0-9a-f]{40}$|://[^/\s:@]+:[^/\s@]+@"
)
"""Tokens of well-known services, keys of Weights & Biases, and addresses with a password."""


def resolved_config(config: Any, *, paths: bool = True) -> dict[str, Any]:
    """Return the keys of a typed configuration, nested and as plain values; paths only on request.

    Values that came from environment variables are `${oc.env:NAME}`, as they were given. Keys whose
    name or value looks like a secret are left out.
    """
    values = _plain(config, paths)
    for key, text in config.environment.items():
        *sections, name = key.split(".")
        parent = values
        for section in sections:
            parent = parent.get(section, {})
        if paths or name in parent:
            parent[name] = _plain(text)
    return values


def save_config(path: Path, values: dict[str, Any]) -> None:
    """Write the configuration of a run; one with other values that is there keeps a numbered name.

    Raises:
        FileError: it cannot be written.
    """
    content = (
        f"# Configuration of this run with all defaults, by nemo_kd {__version__}; secrets are "
        f"left out.\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
    ).encode()
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_bytes() != content:
            names = (
                path.with_stem(f"{path.stem}-{number}")
                for number in itertools.count(1)
            )
            path.rename(next(name for name in names if not name.exists()))
    write_atomically(path, content)


def _plain(value: Any, paths: bool = True) -> Any:
    if dataclasses.is_dataclass(value):
        value = {
            each.name: getattr(value, each.name)
            for each in dataclasses.fields(value)
            if paths or not is_path(each)
        }
    if isinstance(value, dict):
        return {
            str(name): _plain(each, paths)
            for name, each in value.items()
            if not SECRET_NAME.search(str(name)) and not _is_secret(each)
        }
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value if not _is_secret(each)]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _is_secret(value: Any) -> bool:
    secrets = [text for name, text in os.environ.items() if SECRET_NAME.search(name)]
    return isinstance(value, str) and (
        bool(SECRET_VALUE.search(value))
        or any(len(secret) >= 8 and secret in value for secret in secrets)
    )
