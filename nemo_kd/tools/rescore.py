"""Scores a sample of cached rows with the teacher again: `logit_cache verify --against`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from nemo_kd.batch import CachedExample, Example
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
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.process_group import join_ranks
from nemo_kd.run.watchdog import Watchdog
from nemo_kd.teacher.job import Run, check_model
from nemo_kd.teacher.model import Teacher
from nemo_kd.tools.faithfulness import Rounding, targets_of
from nemo_kd.tools.rendering import Findings, check_rendering
from nemo_kd.tools.verdict import (
    FACTOR,
    FACTOR_OF_EXPERTS,
    ROUNDING_FACTOR,
    UNIT_ROUNDOFF,
    Compared,
    Verdict,
    floor_kl,
    judge,
)

KEYS = ("trainer.", "model.", "data.max_tokens_per_batch", "data.packing", "data.num_workers")
"""Of stage 1's: what does not follow from the cache."""
BORDERS = 2 / 3
"""Of the sample, where there are so many: first and last rows of chunks."""
SPARE_IDS = 16
"""Ids that the teacher keeps beyond the cache's, since rounding exchanges the last ones."""
PADDED_TO = 16
"""The control pads every example to a multiple of this."""
MOST_SHOWN = 20

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Rows of a cache, those about which the cache says something; `where` has the file:line of each."""

    reader: CacheReader
    rows: list[CachedExample]
    where: list[str]
    num_empty: int

    @property
    def examples(self) -> list[Example]:
        return [row.example for row in self.rows]

    @property
    def precisions(self) -> set[str]:
        """What the teacher computed in; empty where nobody tells."""
        chunks = [chunk for manifest in self.reader.manifests for chunk in manifest.chunks.values()]
        told = {
            str(settings.get("precision")) for chunk in chunks for settings in chunk.computed_with
        }
        return {PRECISIONS[precision] for precision in told if precision in PRECISIONS}

    @property
    def rounding(self) -> Rounding:
        manifests = self.reader.manifests
        unknown = any(manifest.teacher.get("name") == UNKNOWN for manifest in manifests)
        if not manifests:
            unknown = not self.reader.has_packed_rows()
        # A cache that was converted to json may have been packed before.
        packed = any(
            m.codec["name"] == "packed" or "converted_from" in m.teacher for m in manifests
        )
        return Rounding(packed=packed or not manifests, bfloat16=unknown)


def open_sample(path: str, num_examples: int, seed: int = 0) -> Sample:
    """The rows to compare: first and last ones of chunks, where errors show first, and others at random.

    Raises:
        CacheError: there are none, or they cannot be read.
    """
    if num_examples < 1:
        raise ConfigError(f"--num-examples: {num_examples} must be at least 1")
    if seed < 0:
        raise ConfigError(f"--seed: {seed} must not be negative")
    reader = CacheReader(path)
    if not len(reader):
        raise CacheError(f"{path}: the cache has no rows to compare with a teacher")
    positions = sampled(reader.chunk_sizes(), num_examples, seed)
    reader.will_read(positions)
    rows = {position: reader[position] for position in positions}
    said = [position for position in positions if len(targets_of(rows[position]))]
    if not said:
        raise CacheError(
            f"{path}: none of its {len(positions)} sampled rows says anything about any position"
        )
    return Sample(
        reader,
        [rows[position] for position in said],
        [reader.where(position) for position in said],
        len(positions) - len(said),
    )


def sampled(chunk_sizes: Sequence[int], num_examples: int, seed: int) -> list[int]:
    """Row numbers in ascending order; all there are where more are asked for."""
    total, random = sum(chunk_sizes), np.random.default_rng(seed)
    if num_examples >= total:
        return list(range(total))
    ends = np.cumsum(chunk_sizes)
    borders = np.unique(np.concatenate([ends - chunk_sizes, ends - 1]))
    most = max(1, round(BORDERS * num_examples))
    chosen = borders if len(borders) <= most else random.choice(borders, most, replace=False)
    others = np.setdiff1d(np.arange(total), chosen)
    chosen = np.concatenate(
        [chosen, random.choice(others, num_examples - len(chosen), replace=False)]
    )
    return sorted(chosen.tolist())


def rescoring_config(
    sample: Sample, teacher: str, settings: Sequence[str]
) -> ComputeTopkLogitsConfig:
    """Stage 1's configuration that asks the teacher for whatever the cache holds; `settings` are key=value.

    Raises:
        ConfigError: a key is unknown, its value cannot work, or it follows from the cache.
    """
    given = [setting.lstrip("+") for setting in settings]
    for setting in given:
        key, equals, _ = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} is no KEY=VALUE")
        if not key.startswith(KEYS):
            raise ConfigError(
                f"{key}: only trainer.*, model.*, data.max_tokens_per_batch and data.packing are taken here; the rest follows from the cache"
            )
    everywhere = any(
        (row.example.loss_mask_S[targets_of(row).positions_P] == 0).any() for row in sample.rows
    )
    temperatures = sorted({t for row in sample.rows for t in row.teacher.temperatures})
    base: dict[str, Any] = {
        "pretrained_checkpoint": {"restore_from_path": teacher},
        "output_path": sample.reader.path,
        "top_k": min(MAX_TOP_K, sample.reader.largest_k + SPARE_IDS),
        "data": {"data": {"file_path": "none"}},
        "cache": {
            "min_probability": 0,
            "positions": "all" if everywhere else "loss",
            "temperatures": [t for t in temperatures if t != 1],
        },
    }
    if sample.precisions:
        base["trainer"] = {"precision": "bf16" if "bfloat16" in sample.precisions else "32"}
    merged = OmegaConf.merge(base, OmegaConf.from_dotlist(given))
    assert isinstance(merged, DictConfig)
    return typed(ComputeTopkLogitsConfig, merged)


def rescore(
    sample: Sample, config: ComputeTopkLogitsConfig, dataset: str | None = None
) -> tuple[str, bool]:
    """Runs the teacher over the sample twice and compares; every rank calls it.

    Every replica of the teacher computes the whole sample, so data parallelism saves no time here.

    Args:
        dataset: path of the dataset, to render its records again; None: where the manifest says.

    Returns:
        The report, and whether all is well; the same on every rank.

    Raises:
        CacheError, ConfigError, DataError: before the teacher is loaded: something the user gave cannot work.
    """
    timeout_s = 60 * config.trainer.distributed_timeout_minutes
    join_ranks(config.trainer)
    with (
        open_pretrained(config.pretrained_checkpoint.restore_from_path) as pretrained,
        contextlib.ExitStack() as stack,
    ):
        architecture = pretrained.architecture
        check_vocabulary(sample, architecture, str(pretrained.source))
        config = dataclasses.replace(config, top_k=min(config.top_k, architecture.vocab_size))
        check_model(config, architecture)
        tokenizer = load_tokenizer(pretrained.tokenizer_folder)
        groups = initialize_model_parallel(config.model, config.model.seed)
        findings = on_rank_zero(
            lambda: check_rendering(
                sample.reader.manifests,
                sample.examples,
                pretrained.fingerprint(),
                tokenizer,
                architecture.vocab_size,
                dataset,
            )
        )
        run = Run(config, pretrained, groups, padding_id(tokenizer, architecture.vocab_size), [])
        watchdog = stack.enter_context(Watchdog(timeout_s, torch.distributed.get_rank()))
        stack.enter_context(watchdog.explain_collective_errors())
        with watchdog.pause("loading the teacher"):
            teacher = run.load_teacher(watchdog.step)
        # A cache of another precision has rounded weights besides.
        mixed = bool(sample.precisions - {PRECISIONS[config.trainer.precision]})
        unit = torch.finfo(getattr(torch, coarsest(sample, config))).eps * (1 + mixed)
        together, alone = score_twice(teacher, sample.examples, unit)
        outcome: tuple[str, bool] | None = None
        with watchdog.pause("comparing"):
            if groups.is_writer and groups.data_rank == 0:
                outcome = _outcome(sample, run, findings, together, alone)
            outcomes: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(outcomes, outcome)
    return next(outcome for outcome in outcomes if outcome is not None)


def coarsest(sample: Sample, config: ComputeTopkLogitsConfig) -> str:
    """The coarser one of the dtypes that the cache and the teacher here are computed in."""
    dtypes = (sample.precisions or {"bfloat16"}) | {PRECISIONS[config.trainer.precision]}
    return "bfloat16" if "bfloat16" in dtypes else "float32"


def factor_of(run: Run) -> float:
    """Return how many times the control's worst a divergence may be."""
    return FACTOR_OF_EXPERTS if run.pretrained.architecture.num_moe_experts else FACTOR


def check_vocabulary(sample: Sample, architecture: GPTArchitecture, teacher: str) -> None:
    """Refuses a teacher that cannot have written the cache.

    Raises:
        CacheError: its vocabulary has another size, or its positions are fewer than the rows have.
    """
    reader = sample.reader
    for size in {manifest.vocab_size for manifest in reader.manifests} - {architecture.vocab_size}:
        if not all(manifest.teacher.get("name") == UNKNOWN for manifest in reader.manifests):
            raise CacheError(
                f"{reader.path}: its teacher has a vocabulary of {size} tokens, {teacher} one of {architecture.vocab_size}: "
                "another teacher wrote the cache"
            )
    largest = max(reader.max_token_id, reader.max_topk_id)
    if largest >= architecture.vocab_size:
        raise CacheError(
            f"{reader.path}: the id {largest} is outside the vocabulary of {teacher}, {architecture.vocab_size} tokens: another "
            "teacher wrote the cache"
        )
    longest = max(example.num_tokens for example in sample.examples)
    if longest > architecture.max_position_embeddings:
        raise CacheError(
            f"{reader.path}: a row has {longest} positions, {teacher} is made for {architecture.max_position_embeddings}: "
            "another teacher wrote the cache"
        )


def score_twice(
    teacher: Teacher, examples: Sequence[Example], unit: float
) -> tuple[list[CachedExample], list[CachedExample]]:
    """Score the examples in batches, in reverse order; and as a control each alone, padded, with errors of `unit`."""
    if teacher.max_examples is not None:
        teacher.max_examples = max(2, teacher.max_examples)
    together = teacher.finish(teacher.start(examples[::-1]))[::-1]
    teacher.packed, teacher.max_examples, teacher.multiple_of = (
        False,
        1,
        PADDED_TO * teacher.multiple_of,
    )
    with _rounded_otherwise(teacher, unit):
        return together, teacher.finish(teacher.start(examples))


@contextlib.contextmanager
def _rounded_otherwise(teacher: Teacher, unit: float) -> Iterator[None]:
    """Moves the numbers that leave a layer at random by up to `unit`, in parts of them.

    Other batches alone do not show what rounding does: many kernels add up in one order whatever the batch, but in
    another one on another layout or machine. A unit in the last place stands for the several roundings, half a unit each, in a layer.
    Ranks that hold the same numbers move them alike.
    """
    device = teacher.groups.device
    random = torch.Generator(device).manual_seed(0)

    def move(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        shares = torch.rand(hidden.shape, generator=random, device=device) * 2 - 1
        moved = (hidden.float() * (1 + unit * shares)).to(hidden.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    decoder: Any = getattr(teacher.model, "module", teacher.model).decoder
    modules = [
        *decoder.layers,
        *([decoder.final_layernorm] if decoder.final_layernorm is not None else []),
    ]
    hooks = [module.register_forward_hook(move) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _outcome(
    sample: Sample,
    run: Run,
    findings: Findings,
    together: Sequence[CachedExample],
    alone: Sequence[CachedExample],
) -> tuple[str, bool]:
    compared = [
        _compared(row, where, first, second)
        for row, where, first, second in zip(
            sample.rows, sample.where, together, alone, strict=True
        )
    ]
    here = PRECISIONS[run.config.trainer.precision]
    if not sample.precisions:
        findings.not_checked.append(f"whether the cache was computed in {here}: it does not tell")
    elif sample.precisions != {here}:
        findings.remarks.append(
            f"the cache was computed in {', '.join(sample.precisions)}, the teacher here in {here}"
        )
    verdict = judge(compared, sample.rounding, coarsest(sample, run.config), factor_of(run))
    wrong = dict(findings.wrong)
    for number, text in [*verdict.wrong.items(), *_wrong_samples(sample)]:
        wrong[number] = "; ".join(filter(None, [wrong.get(number), text]))
    if sample.rows[0].teacher.tail_token_ids_PM is not None:
        findings.not_checked.append(
            "which tail samples were drawn; only that they are not among the kept ids"
        )
    if verdict.temperature_is_off:
        findings.problems.append(f"the rows are those of temperature {verdict.temperature:.4f}")
    return _report(
        sample, run, compared, verdict, findings, wrong
    ), not wrong and not findings.problems


def _compared(
    row: CachedExample, where: str, together: CachedExample, alone: CachedExample
) -> Compared:
    cached = targets_of(row)
    first, second = (
        scored.teacher.at(np.searchsorted(scored.teacher.positions_P, cached.positions_P))
        for scored in (together, alone)
    )
    return Compared(row.example.index, where, cached, first, second)


def _wrong_samples(sample: Sample) -> list[tuple[int, str]]:
    """Examples with a tail sample among the kept ids."""
    found = []
    for number, row in enumerate(sample.rows):
        samples_PM, ids_PK = row.teacher.tail_token_ids_PM, row.teacher.topk_token_ids_PK
        if samples_PM is not None:
            inside_P = (
                (samples_PM[:, :, None] == ids_PK[:, None]) & (samples_PM >= 0)[:, :, None]
            ).any(axis=(1, 2))
            if inside_P.any():
                position = row.teacher.positions_P[inside_P.argmax()]
                found.append(
                    (number, f"the tail sample at position {position} is one of the kept ids")
                )
    return found


def _report(
    sample: Sample,
    run: Run,
    compared: Sequence[Compared],
    verdict: Verdict,
    findings: Findings,
    wrong: dict[int, str],
) -> str:
    num_positions = sum(len(example.cached) for example in compared)
    dtype = coarsest(sample, run.config)
    lines = [
        f"{len(compared)} of {len(sample.reader):,} examples with {num_positions:,} positions, scored by {run.pretrained.source}: {run.layout()}",
        "",
        f"{'':36}  {'cache against teacher':^30}  {'teacher against itself':^22}",
        f"{'':36}  {'mean':>8} {'worst':>8} {'allowed':>8}  {'mean':>10} {'worst':>10}  worst example",
    ]
    for statistic in verdict.statistics:
        worst = statistic.worst
        lines.append(
            f"{statistic.name:<36}  {statistic.cached_E.mean():8.1e} {statistic.cached_E[worst]:8.1e} {statistic.allowed_E[worst]:8.1e}"
            f"  {statistic.control_E.mean():10.1e} {statistic.control_E.max():10.1e}  {compared[worst].index}"
        )
    lines += [
        f"{'temperature that fits best':<36}  {verdict.temperature:8.4f} {'':17}  {verdict.control_temperature:10.4f}",
        "In nats; KL is that of the teacher from the cache, over the kept ids and all others together. The control",
        "scores each example alone and padded, with other rounding errors, instead of in batches.",
        f"Allowed: {factor_of(run):g} x the control's worst, {ROUNDING_FACTOR:g} x what the codec rounds, and for the mean {floor_kl(dtype):.0e},",
        f"which follow from the precision: {dtype}, unit roundoff {UNIT_ROUNDOFF[dtype]:.1e}.",
        "",
    ]
    if sample.num_empty:
        findings.not_checked.append(f"{sample.num_empty} sampled rows without any stored position")
    lines += [f"note: {text}" for text in findings.remarks]
    lines += [f"not checked: {text}" for text in findings.not_checked]
    lines += [f"wrong: {text}" for text in findings.problems]
    for number, text in sorted(wrong.items())[:MOST_SHOWN]:
        lines.append(f"wrong: example {compared[number].index} ({compared[number].where}): {text}")
    if len(wrong) > MOST_SHOWN:
        lines.append(f"wrong: and {len(wrong) - MOST_SHOWN} more examples")
    if wrong:
        lines.append(
            f"verdict: the cache is not what this teacher says: {len(wrong)} of {len(compared)} examples are wrong"
        )
    elif findings.problems:
        lines.append("verdict: the cache is not what this teacher says, as told above")
    else:
        lines.append("verdict: the cache is what this teacher says; what differs is rounding")
    return "\n".join(lines)
