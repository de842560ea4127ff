"""Evaluate a model: loss on a dataset, agreement with a teacher, generated and checked answers."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import torch.distributed as dist

from nemo_kd import __version__
from nemo_kd.answers.responses import respond
from nemo_kd.answers.samples import (
    Sample,
    check_responses,
    summarize,
    write_samples,
)
from nemo_kd.config.answers import AnswerConfig
from nemo_kd.config.evaluation import RESULT, SAMPLES, EvaluateGPTConfig
from nemo_kd.config.shared import check_layout
from nemo_kd.evaluation.backends import RankZeroBackend
from nemo_kd.evaluation.inputs import Inputs
from nemo_kd.evaluation.model import open_model
from nemo_kd.evaluation.page import (
    OtherEvaluation,
    figures,
    read_evaluation,
    samples_page,
)
from nemo_kd.evaluation.scores import measure_loss, perplexity
from nemo_kd.files import (
    explained,
    new_folder,
    print_table,
    print_text,
    replace_folder,
    write_atomically,
)
from nemo_kd.mcore.generation import Response
from nemo_kd.mcore.groups import ProcessGroups, initialize_model_parallel
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.interruption import Watchdog
from nemo_kd.run.metrics import Progress, resolved_config, save_config
from nemo_kd.run.ranks import join_ranks

log = logging.getLogger(__name__)

Respond = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Response]]
"""Returns responses to prompts with their numbers; every rank calls it."""

PAGE = "samples.html"
INTERVAL_S = 10.0
"""Seconds between two lines of progress."""


def evaluate_gpt(config: EvaluateGPTConfig) -> dict[str, Any]:
    """Measure the model, write the results and print a table; every rank calls this.

    Returns:
        The content of evaluation.json, on every rank.

    Raises:
        ConfigError, DataError, CacheError, CheckpointError: something that the user gave cannot be
            used; raised before the weights load.
        UserInputError: the model's logits are not finite.
        FileError: the results cannot be written.
    """
    join_ranks(config.trainer)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_model(config))
        check_layout(opened.pretrained.architecture, config.model)
        inputs = Inputs(config, opened.pretrained)
        groups = initialize_model_parallel(config.model, config.model.seed)
        timeout_s = 60 * config.trainer.distributed_timeout_minutes
        watchdog = stack.enter_context(Watchdog(timeout_s, dist.get_rank()))
        other = None
        if config.evaluate.compare is not None:
            fingerprint = inputs.dataset.records.fingerprint
            other = read_evaluation(config.evaluate.compare, fingerprint)
        samples: list[Sample] = []
        if inputs.questions and config.evaluate.backend != "megatron":
            with watchdog.pause(f"responses of {config.evaluate.backend}"):
                backend = RankZeroBackend(inputs, groups.device)
                samples = _answer(backend.respond, 1, inputs, watchdog)
            del backend
            gc.collect()  # its memory is the model's now
        with watchdog.pause("loading the model"):
            model = opened.load(config, groups)
        scores = _measure(model, groups, inputs, watchdog)
        if config.evaluate.backend == "megatron":
            ask = _megatron(model, groups, inputs, watchdog)
            samples = _answer(ask, groups.data_size, inputs, watchdog)
        with watchdog.pause("writing the results"):
            result = _result(inputs, opened.fingerprint(), scores, samples)
            on_rank_zero(lambda: _finish(config, result, samples, other))
    return result


def _measure(
    model: Any, groups: ProcessGroups, inputs: Inputs, watchdog: Watchdog
) -> dict[str, float]:
    rows = inputs.rows
    lengths = [rows.num_tokens(place) for place in range(inputs.num_examples)]
    with _progress("loss", sum(lengths), "tokens") as progress:

        def on_pass(positions: range) -> None:
            watchdog.step(f"loss: after examples {positions[0]} to {positions[-1]}")
            progress.add(
                tokens=sum(lengths[positions.start : positions.stop]),
                examples=len(positions),
            )

        return measure_loss(model, groups, inputs, on_pass)


def _megatron(
    model: Any, groups: ProcessGroups, inputs: Inputs, watchdog: Watchdog
) -> Respond:
    """Return a function that asks the model on all ranks."""
    return lambda prompts, numbers: respond(
        model,
        groups,
        prompts,
        inputs.sampling,
        vocab_size=inputs.vocab_size,
        max_batch=inputs.config.evaluate.batch_size,
        numbers=numbers,
        on_step=lambda: watchdog.step(f"a token of {len(prompts)} responses"),
    )


def _answer(
    ask: Respond, num_replicas: int, inputs: Inputs, watchdog: Watchdog
) -> list[Sample]:
    """Answer all questions; rank 0 checks the responses, a batch at a time."""
    # The longest first: where memory is short, it shows at once.
    by_length = sorted(inputs.questions, key=lambda one: -len(one.prompt_ids))
    samples: list[Sample] = []
    size = inputs.config.evaluate.batch_size * num_replicas
    with _progress("responses", len(by_length), "examples") as progress:
        for start in range(0, len(by_length), size):
            questions = by_length[start : start + size]
            numbers = [question.index for question in questions]
            watchdog.step(f"responses to the records {numbers}")
            prompts = [question.prompt_ids for question in questions]
            responses = ask(prompts, numbers)
            check = partial(
                check_responses, questions, responses, inputs.tokenizer, inputs.checker
            )
            samples += on_rank_zero(check)
            progress.add(
                examples=len(questions),
                tokens=sum(len(one.token_ids) + one.stopped for one in responses),
            )
    return sorted(samples, key=lambda sample: sample.index)


@contextlib.contextmanager
def _progress(name: str, total: int, unit: str) -> Iterator[Progress]:
    """Show progress on rank 0, which counts for all ranks."""
    is_shown = dist.get_rank() == 0 and total > 0
    progress = Progress(name if is_shown else None, total, INTERVAL_S, unit=unit)
    try:
        yield progress
        progress.finish()
    finally:
        progress.close()


def _result(
    inputs: Inputs,
    fingerprint: dict[str, Any],
    scores: dict[str, float],
    samples: list[Sample],
) -> dict[str, Any]:
    """Return the content of evaluation.json."""
    config = inputs.config
    settings = config.evaluate
    checker = {
        each.name: getattr(settings, each.name) for each in fields(AnswerConfig)
    }
    sampling = {
        **asdict(inputs.sampling),
        "stop_ids": sorted(inputs.sampling.stop_ids),
        "backend": settings.backend,
    }
    return {
        **(summarize(samples) if samples else {}),
        "num_examples": inputs.num_examples,
        **scores,
        "perplexity": perplexity(scores["ce"]),
        "nemo_kd": __version__,
        "model": fingerprint,
        "precision": config.trainer.precision,
        "dataset": inputs.dataset_facts(),
        "cache": inputs.cache_facts,
        "sampling": sampling if samples else None,
        "checker": checker if settings.answer_field is not None else None,
        "outcomes": dict(Counter(one.outcome for one in samples if one.outcome)),
    }


def _finish(
    config: EvaluateGPTConfig,
    result: dict[str, Any],
    samples: list[Sample],
    other: OtherEvaluation | None,
) -> None:
    """Write the folder of results as a whole, and print the table."""
    folder = Path(config.evaluate.output_dir).absolute()
    is_replaced = (folder / RESULT).exists()
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    with explained(folder):
        new = new_folder(folder)
        save_config(new / "config.yaml", resolved_config(config))
        write_atomically(new / RESULT, orjson.dumps(result, option=options))
        if samples:
            write_samples(new / SAMPLES, samples)
            page = samples_page(result, samples, other)
            write_atomically(new / PAGE, page.encode())
        replace_folder(new, folder)
    print_table([*figures(result).items()])
    print_text(f"{'replaced' if is_replaced else 'results in'} {folder}")
