"""Further metrics of generated responses, called as NeMo-Aligner calls `inference_metrics`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hydra
import torch
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric

from nemo_kd.answers.prompts import Question
from nemo_kd.answers.samples import Sample
from nemo_kd.config import ConfigError
from nemo_kd.config.student import LOOP
from nemo_kd.config.user_function import add_current_folder
from nemo_kd.mcore.generation import Response

KEY = f"{LOOP}.inference_metrics"


class InferenceMetrics:
    """Objects with `update(batch, generation_output)`, `compute()` and `reset()`, by name.

    Rank 0 alone calls them, with the responses of all ranks.

    Args:
        settings: name -> {_target_: class, argument: value}, as Hydra instantiates it.

    Raises:
        ConfigError: a class cannot be imported or called, or lacks a method.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.metrics: dict[str, Any] = {}
        add_current_folder()
        for name, entry in settings.items():
            with _explained(name):
                metric = hydra.utils.instantiate(entry)
                for method in ("update", "compute", "reset"):
                    getattr(metric, method)
            for part in (
                metric.modules() if isinstance(metric, torch.nn.Module) else ()
            ):
                if isinstance(part, Metric):
                    # It has the responses of all ranks, and must not wait for the others.
                    part.distributed_available_fn = lambda: False
            self.metrics[name] = metric

    def reset(self) -> None:
        for name, metric in self.metrics.items():
            with _explained(name):
                metric.reset()

    def update(
        self,
        records: Sequence[Mapping[str, Any]],
        questions: Sequence[Question],
        responses: Sequence[Response],
        samples: Sequence[Sample],
    ) -> None:
        """Pass responses with their prompts and records to all metrics.

        batch: `contexts` (token ids of the prompts, padded with 0 on the right), `context_lengths`,
        and `metadata` (the records; `output` is the right answer where a record has no such field).
        generation_output: `predictions` (texts of the responses), `sentences` (with the prompts) and
        `token_ids` (of both).
        """
        prompts = [torch.tensor(question.prompt_ids) for question in questions]
        batch = {
            "contexts": pad_sequence(prompts, batch_first=True),
            "context_lengths": torch.tensor([len(prompt) for prompt in prompts]),
            "metadata": [
                {"output": question.answer, **record}
                for question, record in zip(questions, records, strict=True)
            ],
        }
        generation_output = {
            "predictions": [sample.response for sample in samples],
            "sentences": [sample.prompt + sample.response for sample in samples],
            "token_ids": [
                [*question.prompt_ids, *response.token_ids]
                for question, response in zip(questions, responses, strict=True)
            ],
        }
        for name, metric in self.metrics.items():
            with _explained(name):
                metric.update(batch, generation_output)

    def compute(self) -> dict[str, float]:
        """Return `eval/NAME` of every metric."""
        found = {}
        for name, metric in self.metrics.items():
            with _explained(name):
                found[f"eval/{name}"] = float(metric.compute())
        return found


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a foreign class can raise anything
        cause = error.__cause__ or error  # Hydra's errors tell nothing
        reason = " ".join(str(cause).split())
        raise ConfigError(
            f"{KEY}.{name}: {type(cause).__name__}: {reason}; it must be a class whose objects have "
            "update(batch, generation_output), compute() -> number, and reset()"
        ) from error
