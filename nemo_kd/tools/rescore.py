"""Compare cached rows with their teacher: `logit_cache verify --against`.

The teacher scores a sample of rows twice, the second time as a control: each example alone and
padded, with other rounding errors, and stored as the cache is. A row is wrong if it differs from
the teacher by much more than the control does.

Shape legend: P compared positions of an example, K kept ids, E examples.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache import packed_codec
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.reduce import keep
from nemo_kd.config import ConfigError
from nemo_kd.config.data import MAX_TOP_K
from nemo_kd.config.shared import PRECISIONS
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.config.typed import typed
from nemo_kd.data.tokenizer import load_tokenizer
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.run.collective import gather, on_rank_zero
from nemo_kd.run.interruption import Watchdog
from nemo_kd.run.ranks import join_ranks
from nemo_kd.teacher.job import Run, check_model
from nemo_kd.teacher.model import Teacher
from nemo_kd.tools.cache_origin import check_origin, is_foreign, use_its_template

Targets = TeacherRows[np.ndarray]

KEYS = ("trainer.", "model.", "data.max_tokens_per_batch", "data.packing")
"""Keys of stage 1 that do not follow from the cache."""
BORDER_SHARE = 2 / 3
"""Largest share of the sample for first and last rows of chunks, where errors show first."""
SPARE_IDS = 16
"""Ids that the teacher keeps beyond the cache's, since rounding exchanges the last ones."""
CONTROL_MULTIPLE = 16
"""The control pads every example to a multiple of this."""
FACTOR = 4.0
"""Allowed multiple of the control's worst divergence: that of twice the error of a logit."""
FACTOR_OF_EXPERTS = 10.0
"""The same for a mixture of experts, where rounding may change an expert's choice."""
KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "mean of an example": np.mean,
    "median of an example": np.median,
    "worst position": np.max,
}
"""Figures of an example. The median ignores the few positions that one expert's changed choice
changes by much."""
SMALLEST_KL = 2e-6
"""KL of float32 fields close to a certain teacher."""
SMALLEST_LABEL = -58.0
SMALLEST_TAIL = 1e-6
"""Smaller label log-probabilities and tails count as these: float32 holds tails within 1e-7."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Rows of a cache with the targets of positions in the loss.

    Attributes:
        rows: by their file:line.
        dtypes: in which the cache was computed; empty if it does not record them.
    """

    reader: CacheReader
    rows: dict[str, CachedExample]
    dtypes: set[str]


def open_sample(path: str, num_examples: int, seed: int = 0) -> Sample:
    """Read the rows to compare: first and last rows of chunks, and others at random.

    Raises:
        CacheError: there are none, or they cannot be read.
    """
    reader = CacheReader(path)
    positions = sample_positions(reader.chunk_sizes(), num_examples, seed)
    reader.will_read(positions)
    rows = {}
    for position in positions:
        row = reader[position]
        targets = row.loss_rows()
        targets = targets.at(targets.topk_token_ids_PK[:, 0] >= 0)
        if len(targets):
            rows[reader.where(position)] = CachedExample(row.example, targets)
    if not rows:
        raise CacheError(
            f"{path}: none of {len(positions)} sampled rows has teacher targets"
        )
    dtypes = {
        PRECISIONS[str(settings["precision"])]
        for manifest in reader.manifests
        for chunk in manifest.chunks.values()
        for settings in chunk.computed_with
        if "precision" in settings
    }
    return Sample(reader, rows, dtypes)


def sample_positions(
    chunk_sizes: Sequence[int], num_examples: int, seed: int
) -> list[int]:
    """Return `num_examples` row numbers in ascending order, or all of them if there are fewer."""
    random = np.random.default_rng(seed)
    total = sum(chunk_sizes)
    ends = np.cumsum(chunk_sizes, dtype=int)
    borders = random.permutation(np.union1d(ends - chunk_sizes, ends - 1))
    borders = borders[: max(1, round(BORDER_SHARE * num_examples))]
    others = random.permutation(np.setdiff1d(np.arange(total), borders))
    return sorted([*borders.tolist(), *others.tolist()][:num_examples])


def rescoring_config(
    sample: Sample, teacher: str, settings: Sequence[str]
) -> ComputeTopkLogitsConfig:
    """Return the configuration of stage 1 that scores what the cache holds.

    Args:
        settings: KEY=VALUE, keys of stage 1.

    Raises:
        ConfigError: a key is unknown, its value cannot work, or it follows from the cache.
    """
    for setting in settings:
        if not setting.startswith(KEYS) or "=" not in setting:
            raise ConfigError(
                f"{setting}: only KEY=VALUE of trainer.*, model.*, data.max_tokens_per_batch and "
                "data.packing are accepted here; the rest follows from the cache"
            )
    temperatures = {
        t for row in sample.rows.values() for t in row.teacher.temperatures
    }
    base: dict[str, Any] = {
        "pretrained_checkpoint": {"restore_from_path": teacher},
        "output_path": sample.reader.path,
        "top_k": min(MAX_TOP_K, sample.reader.largest_k + SPARE_IDS),
        "data": {"data": {"file_path": "none"}},
        "cache": {
            "min_probability": 0,
            "temperatures": sorted(temperatures - {1}),
        },
    }
    if sample.dtypes:
        precision = "bf16" if "bfloat16" in sample.dtypes else "32"
        base["trainer"] = {"precision": precision}
    merged = OmegaConf.merge(base, OmegaConf.from_dotlist(list(settings)))
    assert isinstance(merged, DictConfig)
    return typed(ComputeTopkLogitsConfig, merged)


def rescore(
    sample: Sample, config: ComputeTopkLogitsConfig, dataset: str | None = None
) -> tuple[str, bool]:
    """Score the sample twice and compare; every rank calls this.

    Args:
        dataset: path of the dataset, to render its records again; None: the manifest's path.

    Returns:
        The report, and True if nothing is wrong; the same on every rank.

    Raises:
        CacheError, ConfigError, DataError: the input cannot work; before the teacher is loaded.
    """
    join_ranks(config.trainer)
    timeout_s = 60 * config.trainer.distributed_timeout_minutes
    watchdog = Watchdog(timeout_s, torch.distributed.get_rank())
    with open_pretrained(config.pretrained_checkpoint.restore_from_path) as pretrained:
        vocab_size = pretrained.architecture.vocab_size
        config = dataclasses.replace(config, top_k=min(config.top_k, vocab_size))
        check_model(config, pretrained.architecture)
        tokenizer = load_tokenizer(pretrained.tokenizer_folder)
        use_its_template(sample.reader.manifests, tokenizer)
        groups = initialize_model_parallel(config.model, config.model.seed)
        run = Run(config, pretrained, groups, tokenizer, [])
        notes = on_rank_zero(
            lambda: check_origin(
                sample.reader, sample.rows, pretrained, tokenizer, dataset
            )
        )
        with watchdog:
            with watchdog.pause("loading the teacher"):
                teacher = Teacher(run, watchdog.step)
            # A cache of another precision has other rounded weights too.
            dtypes = sample.dtypes or {"bfloat16"}
            dtypes = dtypes | {PRECISIONS[config.trainer.precision]}
            unit = torch.finfo(getattr(torch, min(dtypes))).eps * len(dtypes)
            scored, control = score_twice(teacher, sample, unit)
            has_rows = groups.is_writer and groups.data_rank == 0
            with watchdog.pause("comparing"):
                reports = gather(
                    lambda: (
                        compare(sample, run, scored, control, unit) if has_rows else []
                    )
                )
    lines = [*(line for report in reports for line in report), *notes]
    num_wrong = sum(line.startswith("wrong: ") for line in lines)
    result = "the cache matches this teacher; what differs is rounding"
    if num_wrong:
        result = f"the cache does not match this teacher: {num_wrong} faults"
    return "\n".join([*lines, f"result: {result}"]), not num_wrong


def score_twice(
    teacher: Teacher, sample: Sample, unit: float
) -> tuple[list[CachedExample], list[CachedExample]]:
    """Score the examples in batches, in reverse order; then as a control, with rounding errors.

    Other batches alone do not show rounding: many kernels sum in one order for every batch, but in
    another one on another layout or machine. So the numbers that leave a layer are multiplied by
    random factors within `unit` of 1, on all ranks that hold the same numbers alike.
    """
    examples = [row.example for row in sample.rows.values()]
    if teacher.max_examples is not None:
        teacher.max_examples = max(2, teacher.max_examples)
    scored = teacher.finish(teacher.start(examples[::-1]))[::-1]
    teacher.packed = False
    teacher.max_examples = 1
    teacher.multiple_of *= CONTROL_MULTIPLE
    device = teacher.groups.device
    random = torch.Generator(device).manual_seed(0)

    def disturb(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        noise = torch.rand(hidden.shape, generator=random, device=device) * 2 - 1
        hidden = (hidden.float() * (1 + unit * noise)).to(hidden.dtype)
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    decoder: Any = getattr(teacher.model, "module", teacher.model).decoder
    for module in (*decoder.layers, decoder.final_layernorm):
        if module is not None:
            module.register_forward_hook(disturb)
    return scored, teacher.finish(teacher.start(examples))


def compare(
    sample: Sample,
    run: Run,
    scored: Sequence[CachedExample],
    control: Sequence[CachedExample],
    unit: float,
) -> list[str]:
    """Return the lines of the report on the numbers; those of wrong rows begin with `wrong:`."""
    factor = (
        FACTOR_OF_EXPERTS if run.pretrained.architecture.num_moe_experts else FACTOR
    )
    # Always allowed, since a short control may happen to be exact: logits off by a few units.
    floor = SMALLEST_KL + (6 * unit) ** 2 / 2
    lines = [
        f"{len(scored)} of {len(sample.reader):,} examples, scored by "
        f"{run.pretrained.source}",
        f"note: the cache was computed in {', '.join(sample.dtypes) or 'unknown'}",
        "",
        f"{'':36}  {'cache against teacher':^30}  {'teacher against itself':^22}",
        f"{'in nats':36}  {'mean':>8} {'worst':>8} {'allowed':>8}  {'mean':>10} {'worst':>10}  "
        "worst example",
    ]
    wrong: dict[int, list[str]] = defaultdict(list)
    for name, values in measure(sample, scored, control).items():
        cached_E, control_E = np.array(values).T
        allowed = factor * control_E.max() + floor
        worst = int(cached_E.argmax())
        lines.append(
            f"{name:<36}  {cached_E.mean():8.1e} {cached_E[worst]:8.1e} {allowed:8.1e}  "
            f"{control_E.mean():10.1e} {control_E.max():10.1e}  "
            f"{scored[worst].example.index}"
        )
        for number in np.flatnonzero(~(cached_E <= allowed)).tolist():
            wrong[number].append(f"{name} {cached_E[number]:.1e}")
    for number, (where, row) in enumerate(sample.rows.items()):
        if number in wrong:
            text = ", ".join(wrong[number])
            lines.append(f"wrong: example {row.example.index} ({where}): {text}")
    return lines


def measure(
    sample: Sample, scored: Sequence[CachedExample], control: Sequence[CachedExample]
) -> dict[str, list[Any]]:
    """Return the figures by name: of each example that of the cache and that of the control."""
    figures: dict[str, list[Any]] = defaultdict(list)
    temperatures = set.intersection(
        *(set(row.teacher.temperatures) for row in sample.rows.values())
    )
    has_labels = all(
        row.teacher.label_logprobs_P is not None for row in sample.rows.values()
    )
    for row, *passes in zip(sample.rows.values(), scored, control, strict=True):
        positions_P = row.teacher.positions_P
        by_teacher, by_control = (
            found.teacher.at(np.searchsorted(found.teacher.positions_P, positions_P))
            for found in passes
        )
        compared = (row.teacher, as_stored(sample, row, by_control))
        for temperature in sorted(temperatures):
            kls = [divergence(found, by_teacher, temperature) for found in compared]
            name = "KL" if temperature == 1 else f"KL at T = {temperature:g}"
            for kind, reduce in KINDS.items():
                figures[f"{name}, {kind}"].append([reduce(kl_P) for kl_P in kls])
        if has_labels:
            labels: Any = [one.label_logprobs_P for one in (*compared, by_teacher)]
            labels_3P = np.maximum(labels, SMALLEST_LABEL)
            squares = np.square(labels_3P[:2] - labels_3P[2]).mean(axis=1) / 2
            figures["labels, half the mean square"].append(squares)
    return figures


def as_stored(sample: Sample, row: CachedExample, control: Targets) -> Targets:
    """Return the control's targets as a cache holds them: as many ids, in the same encodings."""
    counts_P = (row.teacher.topk_token_ids_PK >= 0).sum(axis=1)
    places_K = np.arange(control.topk_token_ids_PK.shape[1])
    control = keep(control, places_K < counts_P[:, None])
    manifests = sample.reader.manifests
    # A cache that was converted to json may have been packed before.
    is_packed = sample.reader.has_packed_rows() or any(
        "converted_from" in manifest.teacher for manifest in manifests
    )
    if (not manifests and not is_packed) or is_foreign(manifests):
        logits_PK, log_sum_exp_P = (
            torch.from_numpy(values).bfloat16().float().numpy()
            for values in (control.topk_logits_PK, control.log_sum_exp_logits_P)
        )
        control = dataclasses.replace(
            control, topk_logits_PK=logits_PK, log_sum_exp_logits_P=log_sum_exp_P
        )
    if is_packed:
        places_P = control.positions_P
        tokens_P = row.example.tokens_S[places_P]
        labels_P = row.example.labels_S[places_P]
        example = Example(0, tokens_P, labels_P, np.ones(len(places_P)))
        control = dataclasses.replace(control, positions_P=np.arange(len(places_P)))
        blob = packed_codec.pack(CachedExample(example, control), "all")
        control = packed_codec.unpack(blob, example)
    return control


def divergence(p: Targets, q: Targets, temperature: float = 1.0) -> np.ndarray:
    """Return KL(p || q) [P] in nats over p's ids and all others together.

    It is the sum of p ln(p / q) - p + q, whose terms are at least 0 even where rounded
    probabilities do not sum to 1.
    """
    ids_PK = p.topk_token_ids_PK.astype(np.int64)
    p_PN = log_probs(p, ids_PK, temperature)
    q_PN = log_probs(q, ids_PK, temperature)
    used_PN = np.isfinite(p_PN)
    distance_PN = np.subtract(p_PN, q_PN, where=used_PN, out=np.zeros(used_PN.shape))
    return (np.exp(p_PN) * (distance_PN + np.expm1(-distance_PN))).sum(axis=1)


def log_probs(teacher: Targets, ids_PK: np.ndarray, temperature: float) -> np.ndarray:
    """Return log-probabilities [P, K + 1] of ids (-1: no id), and of all others together.

    An id that is not kept has the largest probability that the kept ones allow.
    """
    kept_Pk = teacher.topk_logits_PK.astype(np.float64) / temperature
    total_P = teacher.log_sum_exp_logits_P.astype(np.float64)
    if temperature != 1:
        tail_P = teacher.tail_mass_PT[:, teacher.temperatures.index(temperature)]
        head_P = 1 - tail_P.clip(max=1 - SMALLEST_TAIL)
        total_P = np.log(np.exp(kept_Pk).sum(axis=1) / head_P)
    kept_Pk -= total_P[:, None]
    tail_P = np.maximum(1 - np.exp(kept_Pk).sum(axis=1), SMALLEST_TAIL)
    rows_P1 = (np.arange(len(ids_PK)) << 32)[:, None]
    keys_N = (teacher.topk_token_ids_PK + rows_P1).ravel()
    order_N = keys_N.argsort()
    place_PK = np.searchsorted(keys_N, ids_PK + rows_P1, sorter=order_N)
    place_PK = order_N[place_PK.clip(max=len(keys_N) - 1)]
    is_missing_PK = (keys_N[place_PK] != ids_PK + rows_P1) & (ids_PK >= 0)
    smallest_P = np.where(np.isfinite(kept_Pk), kept_Pk, np.inf).min(axis=1)
    share_P = np.log(tail_P / np.maximum(is_missing_PK.sum(axis=1), 1))
    most_P1 = np.minimum(smallest_P, share_P)[:, None]
    found_PK = np.where(is_missing_PK, most_P1, kept_Pk.ravel()[place_PK])
    found_PK = np.where(ids_PK < 0, -np.inf, found_PK)
    others_P = np.maximum(1 - np.exp(found_PK).sum(axis=1), SMALLEST_TAIL)
    return np.column_stack([found_PK, np.log(others_P)])
