"""Evaluation in training: the student answers questions, and a checker compares the answers."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedTokenizerBase

from nemo_kd.answers.checkers import checker_of
from nemo_kd.answers.prompts import Question, first_examples, question_of, stop_ids
from nemo_kd.answers.responses import respond
from nemo_kd.answers.samples import (
    Sample,
    check_responses,
    summarize,
    write_samples,
)
from nemo_kd.config.answers import ANSWER_METRICS
from nemo_kd.config.data import sequence_length
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.files import explained
from nemo_kd.mcore.checkpoint import PretrainedModel
from nemo_kd.mcore.generation import Sampling
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.metrics import WandbRun
from nemo_kd.student.inference_metrics import InferenceMetrics
from nemo_kd.student.reports import RunLog

if TYPE_CHECKING:
    from nemo_kd.student.module import StudentModule


class Evaluation:
    """Questions of `eval.data`: their answers are generated, checked and measured.

    Every rank has all questions and learns all metrics; rank 0 alone checks answers.

    Attributes:
        interval: optimizer steps between evaluations.
        questions: those with long prompts first: where memory is short, it shows at once.

    Raises:
        ConfigError, DataError: a setting or a record cannot be used.
    """

    def __init__(
        self,
        config: TrainStudentConfig,
        pretrained: PretrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.settings = settings = config.eval
        assert settings.interval
        assert settings.data
        self.interval = settings.interval
        self.tokenizer = tokenizer
        self.vocab_size = pretrained.architecture.vocab_size
        self.checker = checker_of(settings)
        self.further = InferenceMetrics(
            config.trainer.knowledge_distillation.inference_metrics or {}
        )
        num_positions = pretrained.architecture.max_position_embeddings
        longest = sequence_length(config.model.max_seq_length, num_positions)
        self.dataset = TokenizedDataset(
            config.model.data.records(settings.data),
            tokenizer,
            min(longest, num_positions - 1),  # a response needs a position
            self.vocab_size,
        )
        examples, _ = first_examples(self.dataset, settings.num_examples, "eval.data")
        questions = [
            question_of(self.dataset, example, settings.answer_field)
            for example in examples
        ]
        self.questions = sorted(questions, key=lambda one: -len(one.prompt_ids))
        ends = stop_ids(tokenizer, examples, pretrained.eos_token_ids())
        self.sampling = Sampling(stop_ids=ends, **settings.sampling)

    def run(self, student: StudentModule) -> dict[str, float]:
        """Answer all questions with the current weights; log and return the metrics.

        Every rank calls it. The training continues as if it had not taken place.

        Raises:
            Stopped, Ended: on every rank, if there is a reason to stop.
            ConfigError: on every rank, a function of the user failed.
        """
        started_s = time.monotonic()
        step = student.global_step
        samples: list[Sample] = []
        with isolate_rng():
            on_rank_zero(self.further.reset)
        size = self.settings.batch_size * student.groups.data_size
        for start in range(0, len(self.questions), size):
            with isolate_rng():
                samples += self._answer(student, self.questions[start : start + size])
            student.on_evaluation_batch_end()
        samples.sort(key=lambda sample: sample.index)
        metrics = {
            f"eval/{name.removeprefix('mean_')}": value
            for name, value in summarize(samples).items()
            if value is not None
        }
        with isolate_rng():
            metrics |= on_rank_zero(self.further.compute)
        metrics["eval_step"] = float(step)
        seconds = time.monotonic() - started_s
        student.run_log.evaluation("eval", step, metrics, seconds)
        show(samples[: self.settings.log_generations], step, student.run_log)
        # No mean over nothing ranks a checkpoint.
        return dict.fromkeys(ANSWER_METRICS, math.nan) | metrics

    def _answer(
        self, student: StudentModule, questions: Sequence[Question]
    ) -> list[Sample]:
        responses = respond(
            student.model,
            student.groups,
            [question.prompt_ids for question in questions],
            self.sampling,
            vocab_size=self.vocab_size,
            max_batch=self.settings.batch_size,
            numbers=[question.index for question in questions],
            on_step=lambda: student.watchdog.step(
                f"responses to {len(questions)} prompts"
            ),
        )

        def check() -> list[Sample]:
            samples = check_responses(
                questions, responses, self.tokenizer, self.checker
            )
            records = [self.dataset.records[question.index] for question in questions]
            self.further.update(records, questions, responses, samples)
            return samples

        return on_rank_zero(check)


def show(samples: Sequence[Sample], step: int, run_log: RunLog) -> None:
    """Show samples in generations/, in TensorBoard and as a table of Weights & Biases.

    Every rank calls it.
    """
    if not samples:
        return
    path = run_log.log_dir / "generations" / f"step={step}.jsonl"

    def write() -> None:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_samples(path, samples)

    on_rank_zero(write)
    text = "\n\n---\n\n".join(map(_markdown, samples))
    for logger in run_log.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("eval/generations", text, step)
            logger.save()
    rows = [asdict(sample) for sample in samples]
    for sink in run_log.sinks:
        if isinstance(sink, WandbRun):
            axes = {"step": step, "eval_step": step}
            sink.log_table("eval/generations", rows, axes)


def _markdown(sample: Sample) -> str:
    """Return a sample with its texts as blocks of code, which show white space and tags."""
    facts = (
        f"record {sample.index}, {'correct' if sample.correct else 'incorrect'}, "
        f"{sample.num_tokens} tokens"
    )
    blocks = {
        facts: sample.prompt,
        "response": sample.response,
        "right answer": str(sample.answer),
    }
    return "\n\n".join(
        f"**{title}**\n\n{textwrap.indent(text, '    ', lambda line: True)}"
        for title, text in blocks.items()
    )
