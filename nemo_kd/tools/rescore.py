"""Compare cached rows with their teacher: `logit_cache verify --against`.

The teacher scores a sample of rows twice, the second time as a control: each example alone and
padded, with other rounding errors. `compare_rows` decides which rows are wrong.

Shape legend: P compared positions of an example, K kept ids, M tail samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from nemo_kd.batch import CachedExample, Example
from nemo_kd.cache import json_codec, packed_codec
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN
from nemo_kd.cache.reader import CacheReader
from nemo_kd.config import ConfigError
from nemo_kd.config.cache import MAX_TOP_K
from nemo_kd.config.model import PRECISIONS, GPTArchitecture
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.config.typed import typed
from nemo_kd.data.tokenizer import load_tokenizer, padding_id
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.run.collective import gather, on_rank_zero
from nemo_kd.run.ranks import join_ranks
from nemo_kd.run.watchdog import Watchdog
from nemo_kd.teacher.job import Run, check_model
from nemo_kd.teacher.model import Teacher
from nemo_kd.tools.compare_rows import (
    FACTOR,
    FACTOR_OF_EXPERTS,
    ROUNDING_FACTOR,
    UNIT_ROUNDOFF,
    Comparison,
    ErrorBound,
    compare_rows,
    find_wrong,
    fit_temperatures,
    floor_kl,
    format_statistics,
)
from nemo_kd.tools.token_check import Checks, check_tokens

KEYS = (
    "trainer.",
    "model.",
    "data.max_tokens_per_batch",
    "data.packing",
    "data.num_workers",
)
"""Keys of stage 1 that do not follow from the cache."""
BORDER_SHARE = 2 / 3
"""Largest share of the sample for first and last rows of chunks, where errors show first."""
SPARE_IDS = 16
"""Ids that the teacher keeps beyond the cache's, since rounding exchanges the last ones."""
CONTROL_MULTIPLE = 16
"""The control pads every example to a multiple of this."""
MOST_SHOWN = 20


@dataclass(frozen=True)
class Sample:
    """Rows of a cache with teacher targets; `where` holds the file:line of each."""

    reader: CacheReader
    rows: list[CachedExample]
    where: list[str]
    num_empty: int

    @property
    def examples(self) -> list[Example]:
        return [row.example for row in self.rows]

    @property
    def precisions(self) -> set[str]:
        """Dtypes in which the cache was computed; empty if it does not record them."""
        chunks = [
            chunk
            for manifest in self.reader.manifests
            for chunk in manifest.chunks.values()
        ]
        named = [
            settings.get("precision")
            for chunk in chunks
            for settings in chunk.computed_with
        ]
        return {PRECISIONS[str(name)] for name in named if str(name) in PRECISIONS}

    def error_bound(self) -> ErrorBound:
        """Return the sum of the error bounds of all encodings that the rows went through."""
        manifests = self.reader.manifests
        bounds: list[Callable[..., tuple[np.ndarray, ...]]] = []
        # A cache that was converted to json may have been packed before.
        if not manifests or any(
            m.codec["name"] == "packed" or "converted_from" in m.teacher
            for m in manifests
        ):
            bounds.append(packed_codec.error_bound)
        is_foreign = any(m.teacher.get("name") == UNKNOWN for m in manifests)
        if is_foreign or (not manifests and not self.reader.has_packed_rows()):
            bounds.append(functools.partial(json_codec.error_bound, bfloat16=True))
        bounds = bounds or [json_codec.error_bound]

        def total(logprobs_PK: np.ndarray, tail_P: np.ndarray) -> list[np.ndarray]:
            errors = [bound(logprobs_PK, tail_P) for bound in bounds]
            return [np.sum(parts, axis=0) for parts in zip(*errors, strict=True)]

        return total


def open_sample(path: str, num_examples: int, seed: int = 0) -> Sample:
    """Read the rows to compare: first and last rows of chunks, and others at random.

    Raises:
        CacheError: there are none, or they cannot be read.
    """
    for option, value, least in (
        ("--num-examples", num_examples, 1),
        ("--seed", seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{option}: {value} must be at least {least}")
    reader = CacheReader(path)
    if not len(reader):
        raise CacheError(f"{path}: the cache has no rows to compare with a teacher")
    positions = sample_positions(reader.chunk_sizes(), num_examples, seed)
    reader.will_read(positions)
    rows = {position: with_targets_only(reader[position]) for position in positions}
    rows = {position: row for position, row in rows.items() if len(row.teacher)}
    if not rows:
        raise CacheError(
            f"{path}: none of {len(positions)} sampled rows has teacher targets"
        )
    where = [reader.where(position) for position in rows]
    return Sample(reader, list(rows.values()), where, len(positions) - len(rows))


def sample_positions(
    chunk_sizes: Sequence[int], num_examples: int, seed: int
) -> list[int]:
    """Return `num_examples` row numbers in ascending order, or all of them if there are fewer."""
    total = sum(chunk_sizes)
    if num_examples >= total:
        return list(range(total))
    random = np.random.default_rng(seed)
    ends = np.cumsum(chunk_sizes)
    chosen = np.unique(np.concatenate([ends - chunk_sizes, ends - 1]))
    most = max(1, round(BORDER_SHARE * num_examples))
    if len(chosen) > most:
        chosen = random.choice(chosen, most, replace=False)
    others = np.setdiff1d(np.arange(total), chosen)
    others = random.choice(others, num_examples - len(chosen), replace=False)
    return sorted([*chosen.tolist(), *others.tolist()])


def with_targets_only(row: CachedExample) -> CachedExample:
    """Return the row without positions that the json codec fills with the ids 0, 1, 2, ... ."""
    teacher = row.teacher
    ids_PK = teacher.topk_token_ids_PK
    is_filler_P = (ids_PK == np.arange(ids_PK.shape[1])).all(axis=1)
    is_filler_P &= (teacher.topk_logits_PK == 0).all(axis=1)
    is_filler_P &= row.example.loss_mask_S[teacher.positions_P] == 0
    return CachedExample(row.example, teacher.at((ids_PK[:, 0] >= 0) & ~is_filler_P))


def rescoring_config(
    sample: Sample, teacher: str, settings: Sequence[str]
) -> ComputeTopkLogitsConfig:
    """Return the configuration of stage 1 that scores what the cache holds.

    Args:
        settings: KEY=VALUE, keys of stage 1.

    Raises:
        ConfigError: a key is unknown, its value cannot work, or it follows from the cache.
    """
    given = [setting.lstrip("+") for setting in settings]
    for setting in given:
        key, equals, _ = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} is not of the form KEY=VALUE")
        if not key.startswith(KEYS):
            raise ConfigError(
                f"{key}: only trainer.*, model.*, data.max_tokens_per_batch and data.packing are "
                "accepted here; the rest follows from the cache"
            )
    has_prompts = any(len(row.loss_rows()) < len(row.teacher) for row in sample.rows)
    temperatures = {t for row in sample.rows for t in row.teacher.temperatures}
    base: dict[str, Any] = {
        "pretrained_checkpoint": {"restore_from_path": teacher},
        "output_path": sample.reader.path,
        "top_k": min(MAX_TOP_K, sample.reader.largest_k + SPARE_IDS),
        "data": {"data": {"file_path": "none"}},
        "cache": {
            "min_probability": 0,
            "positions": "all" if has_prompts else "loss",
            "temperatures": sorted(temperatures - {1}),
        },
    }
    if sample.precisions:
        base["trainer"] = {
            "precision": "bf16" if "bfloat16" in sample.precisions else "32"
        }
    merged = OmegaConf.merge(base, OmegaConf.from_dotlist(given))
    assert isinstance(merged, DictConfig)
    return typed(ComputeTopkLogitsConfig, merged)


def rescore(
    sample: Sample, config: ComputeTopkLogitsConfig, dataset: str | None = None
) -> tuple[str, bool]:
    """Score the sample twice and compare; every rank calls this.

    Every replica of the teacher computes the whole sample: data parallelism saves no time here.

    Args:
        dataset: path of the dataset, to render its records again; None: the manifest's path.

    Returns:
        The report, and True if nothing is wrong; the same on every rank.

    Raises:
        CacheError, ConfigError, DataError: the input cannot work; before the teacher is loaded.
    """
    join_ranks(config.trainer)
    source = config.pretrained_checkpoint.restore_from_path
    with open_pretrained(source) as pretrained, contextlib.ExitStack() as stack:
        architecture = pretrained.architecture
        check_teacher(sample, architecture, str(pretrained.source))
        config = dataclasses.replace(
            config, top_k=min(config.top_k, architecture.vocab_size)
        )
        check_model(config, architecture)
        tokenizer = load_tokenizer(pretrained.tokenizer_folder)
        groups = initialize_model_parallel(config.model, config.model.seed)
        checks = on_rank_zero(
            lambda: check_tokens(
                sample.reader.manifests,
                sample.examples,
                pretrained.fingerprint(),
                tokenizer,
                architecture.vocab_size,
                dataset,
            )
        )
        run = Run(
            config, pretrained, groups, padding_id(tokenizer, architecture.vocab_size), []
        )
        timeout_s = 60 * config.trainer.distributed_timeout_minutes
        watchdog = stack.enter_context(Watchdog(timeout_s, torch.distributed.get_rank()))
        stack.enter_context(watchdog.explain_collective_errors())
        with watchdog.pause("loading the teacher"):
            teacher = run.load_teacher(watchdog.step)
        here = PRECISIONS[config.trainer.precision]
        dtypes = (sample.precisions or {"bfloat16"}) | {here}
        dtype = "bfloat16" if "bfloat16" in dtypes else "float32"
        # A cache of another precision has other rounded weights too.
        is_mixed = bool(sample.precisions - {here})
        unit = torch.finfo(getattr(torch, dtype)).eps * (1 + is_mixed)
        scored, control = score_twice(teacher, sample.examples, unit)
        has_rows = groups.is_writer and groups.data_rank == 0
        with watchdog.pause("comparing"):
            outcomes = gather(
                lambda: (
                    compare(sample, run, checks, scored, control, dtype)
                    if has_rows
                    else None
                )
            )
    return next(outcome for outcome in outcomes if outcome is not None)


def check_teacher(sample: Sample, architecture: GPTArchitecture, teacher: str) -> None:
    """Refuse a teacher that cannot have written the cache.

    Raises:
        CacheError: its vocabulary has another size, or the rows have more positions than it has.
    """
    reader = sample.reader
    size = architecture.vocab_size
    longest = max(example.num_tokens for example in sample.examples)
    largest = max(reader.max_token_id, reader.max_topk_id)
    problem = ""
    if longest > architecture.max_position_embeddings:
        most = architecture.max_position_embeddings
        problem = f"a row has {longest} positions, {teacher} is made for {most}"
    if largest >= size:
        problem = (
            f"the id {largest} is outside the vocabulary of {teacher}, {size} tokens"
        )
    for manifest in reader.manifests:
        if manifest.vocab_size != size and manifest.teacher.get("name") != UNKNOWN:
            problem = (
                f"its teacher has a vocabulary of {manifest.vocab_size} tokens, "
                f"{teacher} one of {size}"
            )
    if problem:
        raise CacheError(f"{reader.path}: {problem}: another teacher wrote the cache")


def score_twice(
    teacher: Teacher, examples: Sequence[Example], unit: float
) -> tuple[list[CachedExample], list[CachedExample]]:
    """Score the examples in batches, in reverse order; then as a control, with errors of `unit`."""
    if teacher.max_examples is not None:
        teacher.max_examples = max(2, teacher.max_examples)
    scored = teacher.finish(teacher.start(examples[::-1]))[::-1]
    teacher.packed = False
    teacher.max_examples = 1
    teacher.multiple_of *= CONTROL_MULTIPLE
    with _rounding_errors(teacher, unit):
        return scored, teacher.finish(teacher.start(examples))


@contextlib.contextmanager
def _rounding_errors(teacher: Teacher, unit: float) -> Iterator[None]:
    """Multiply the numbers that leave a layer by random factors within `unit` of 1.

    Other batches alone do not show rounding: many kernels sum in one order for every batch, but in
    another one on another layout or machine. A unit in the last place stands for the several
    roundings, half a unit each, of a layer. Ranks that hold the same numbers change them alike.
    """
    device = teacher.groups.device
    random = torch.Generator(device).manual_seed(0)

    def disturb(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        noise = torch.rand(hidden.shape, generator=random, device=device) * 2 - 1
        hidden = (hidden.float() * (1 + unit * noise)).to(hidden.dtype)
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    decoder: Any = getattr(teacher.model, "module", teacher.model).decoder
    modules = [*decoder.layers, decoder.final_layernorm]
    hooks = [
        module.register_forward_hook(disturb) for module in modules if module is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compare(
    sample: Sample,
    run: Run,
    checks: Checks,
    scored: Sequence[CachedExample],
    control: Sequence[CachedExample],
    dtype: str,
) -> tuple[str, bool]:
    """Compare the sample with both passes; return the report, and True if nothing is wrong."""
    comparisons = []
    for row, where, *passes in zip(
        sample.rows, sample.where, scored, control, strict=True
    ):
        positions_P = row.teacher.positions_P
        by_teacher = [
            found.teacher.at(np.searchsorted(found.teacher.positions_P, positions_P))
            for found in passes
        ]
        comparisons.append(Comparison(row.example.index, where, row.teacher, *by_teacher))
    factor = FACTOR_OF_EXPERTS if run.pretrained.architecture.num_moe_experts else FACTOR
    statistics = compare_rows(comparisons, sample.error_bound(), dtype, factor)
    wrong = find_wrong(comparisons, statistics)
    right = [one for number, one in enumerate(comparisons) if number not in wrong]
    fit, control_fit, is_off = fit_temperatures(right or comparisons, factor)
    if right and is_off:
        checks.problems.append(f"the rows are those of temperature {1 / fit.scale:.4f}")
    for problems in (wrong, _wrong_samples(sample)):
        for number, texts in problems.items():
            checks.wrong.setdefault(number, []).extend(texts)
    here = PRECISIONS[run.config.trainer.precision]
    if not sample.precisions:
        checks.not_checked.append(
            f"the precision, {here} here: the cache does not record it"
        )
    elif sample.precisions != {here}:
        dtypes = ", ".join(sample.precisions)
        checks.notes.append(
            f"the cache was computed in {dtypes}, the teacher here in {here}"
        )
    if sample.rows[0].teacher.tail_token_ids_PM is not None:
        checks.not_checked.append(
            "which tail samples were drawn, beyond that none is a kept id"
        )
    if sample.num_empty:
        checks.not_checked.append(
            f"{sample.num_empty} sampled rows without teacher targets"
        )
    num_positions = sum(len(row.teacher) for row in sample.rows)
    lines = [
        f"{len(comparisons)} of {len(sample.reader):,} examples with {num_positions:,} positions, "
        f"scored by {run.pretrained.source}: {run.describe_ranks()}",
        "",
        *format_statistics(statistics, comparisons),
        f"{'temperature that fits best':<36}  {1 / fit.scale:8.4f} {'':17}  "
        f"{1 / control_fit.scale:10.4f}",
        "In nats. KL is that of the teacher from the cache, over the kept ids and all others",
        "together. The control scores each example alone and padded, with other rounding errors.",
        f"Allowed: {factor:g} x the control's worst, {ROUNDING_FACTOR:g} x what the encoding "
        f"rounds, and for the mean {floor_kl(dtype):.0e},",
        f"from the precision: {dtype}, unit roundoff {UNIT_ROUNDOFF[dtype]:.1e}.",
        "",
        *(f"note: {text}" for text in checks.notes),
        *(f"not checked: {text}" for text in checks.not_checked),
        *(f"wrong: {text}" for text in checks.problems),
    ]
    for number, texts in sorted(checks.wrong.items())[:MOST_SHOWN]:
        example = comparisons[number]
        lines.append(
            f"wrong: example {example.index} ({example.where}): {'; '.join(texts)}"
        )
    num_wrong = len(checks.wrong)
    if num_wrong > MOST_SHOWN:
        lines.append(f"wrong: and {num_wrong - MOST_SHOWN} more examples")
    result = "the cache matches this teacher; what differs is rounding"
    if num_wrong:
        result = f"the cache does not match: {num_wrong} of {len(comparisons)} examples are wrong"
    elif checks.problems:
        result = "the cache does not match this teacher, for the reasons above"
    lines.append(f"result: {result}")
    return "\n".join(lines), not num_wrong and not checks.problems


def _wrong_samples(sample: Sample) -> dict[int, list[str]]:
    """Return the examples with a tail sample among the kept ids."""
    found = {}
    for number, row in enumerate(sample.rows):
        samples_PM = row.teacher.tail_token_ids_PM
        if samples_PM is not None:
            is_kept_PMK = samples_PM[:, :, None] == row.teacher.topk_token_ids_PK[:, None]
            is_wrong_P = (is_kept_PMK.any(axis=2) & (samples_PM >= 0)).any(axis=1)
            if is_wrong_P.any():
                position = row.teacher.positions_P[is_wrong_P.argmax()]
                found[number] = [
                    f"the tail sample at position {position} is one of the kept ids"
                ]
    return found
