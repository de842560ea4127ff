"""Open and check everything that stage 1 needs, before any long work starts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.manifest import Manifest, codec_settings
from nemo_kd.cache.segment import Segment, segments
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config import ConfigError, DataError
from nemo_kd.config.data import sequence_length
from nemo_kd.config.shared import GPTArchitecture, check_fp8, check_layout
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.data.chat_template import fixed_date
from nemo_kd.data.dataset import TokenizedDataset, describe_left_out
from nemo_kd.data.records import open_records
from nemo_kd.data.tokenizer import (
    chat_template_fingerprint,
    describe_tokens,
    load_tokenizer,
    tokenizer_fingerprint,
    tokenizer_parts,
    trained_text,
)
from nemo_kd.mcore.checkpoint import PretrainedModel, open_pretrained
from nemo_kd.mcore.groups import ProcessGroups, initialize_model_parallel
from nemo_kd.mcore.kernels import Kernels, Machine
from nemo_kd.run.collective import gather, on_rank_zero
from nemo_kd.run.metrics import resolved_config
from nemo_kd.run.ranks import join_ranks
from nemo_kd.teacher.rendered import RenderedRecords

log = logging.getLogger(__name__)

NUM_DESCRIBED = 1000
"""Records that an error describes at most."""


@dataclass
class Job:
    """One dataset and the cache to write from it.

    Attributes:
        split: the dataset's name, empty for a single dataset.
        indices: of the records to compute.
        chunks: record indices of every chunk.
        manifest: of the cache, without chunks.
        writer: of the cache that is being written, on rank 0.
        missing: segments that this part still has to compute.
        num_tokens: tokens in them.
        rendered: what their records make, once `check_records` has run.
    """

    split: str
    config: ComputeTopkLogitsConfig
    dataset: TokenizedDataset
    indices: range
    chunks: list[range]
    manifest: Manifest
    writer: CacheWriter | None = None
    missing: list[Segment] = field(default_factory=list)
    num_tokens: int = 0
    rendered: RenderedRecords | None = None


@dataclass(frozen=True)
class Run:
    """The jobs of one command and their teacher, whose weights are not loaded yet."""

    config: ComputeTopkLogitsConfig
    pretrained: PretrainedModel
    groups: ProcessGroups
    tokenizer: PreTrainedTokenizerBase
    jobs: list[Job]


@contextlib.contextmanager
def open_run(config: ComputeTopkLogitsConfig) -> Iterator[Run]:
    """Join the ranks and open teacher, tokenizer and datasets.

    Raises:
        ConfigError, DataError: something the user gave cannot work.
    """
    join_ranks(config.trainer)
    with open_pretrained(config.pretrained_checkpoint.restore_from_path) as pretrained:
        architecture = pretrained.architecture
        check_model(config, architecture)
        data = config.data.data
        tokenizer = load_tokenizer(pretrained.tokenizer_folder, data.chat_template)
        data.date = on_rank_zero(
            lambda: fixed_date(data, tokenizer, _recorded_date(config))
        )
        jobs = [
            _open_job(split, part, pretrained, tokenizer)
            for split, part in config.splits().items()
        ]
        groups = initialize_model_parallel(config.model, config.model.seed)
        yield Run(config, pretrained, groups, tokenizer, jobs)


def _recorded_date(config: ComputeTopkLogitsConfig) -> str | None:
    """Return the date of the chat template in a cache that is already begun."""
    for part in config.splits().values():
        path = CacheLayout(part.output_path).manifest_path
        if path.exists():
            formatting = Manifest.load(path).dataset.get("formatting", {})
            if (recorded := formatting.get("date")) is not None:
                return str(recorded)
    return None


def check_model(
    config: ComputeTopkLogitsConfig, architecture: GPTArchitecture
) -> None:
    """Refuse parallel sizes that do not divide, and a `top_k` above the vocabulary.

    Raises:
        ConfigError: names the key.
    """
    check_layout(architecture, config.model)
    Kernels(Machine.here(), config.model, config.trainer.precision)
    if config.model.fp8:
        check_fp8(architecture, config.model)
    if config.model.fp8 == "delayed" and (
        architecture.num_moe_experts is not None or len(config.splits()) > 1
    ):
        raise ConfigError(
            "model.fp8: delayed finds the scales on the first examples of one dataset, which may "
            "not reach every expert; use current for experts or several datasets"
        )
    if config.top_k > architecture.vocab_size:
        raise ConfigError(
            f"top_k: {config.top_k} exceeds the teacher's vocabulary of "
            f"{architecture.vocab_size} tokens"
        )


def check_records(job: Job) -> None:
    """Tokenize every record of the missing segments, shared among the ranks; count tokens.

    Raises:
        DataError: on every rank, for a record that cannot be tokenized, or if no record of the
            whole range makes an example.
    """
    indices = [index for _, records in job.missing for index in records]
    log.info("%s: checking %d records", job.dataset.records.name, len(indices))

    job.rendered = RenderedRecords(job.dataset, indices)
    counts = job.rendered.counts
    job.num_tokens = counts.pop("tokens", 0)
    if counts:
        log.warning(describe_left_out(job.dataset.records.name, counts))
    # A part may be empty; only the whole range must not be.
    if len(indices) == len(job.indices) and not job.num_tokens:
        raise nothing_to_train(job, counts)


def nothing_to_train(job: Job, reasons: Counter[str]) -> DataError:
    """Return the error that none of some records makes an example, with the remedies."""
    data = job.config.data.data
    found = ", ".join(f"{count:,} {reason!r}" for reason, count in reasons.items())
    first = job.indices[:NUM_DESCRIBED]
    formats = ", ".join(sorted(job.dataset.formats(first)))
    records = map(job.dataset.records.__getitem__, first)
    roles = ", ".join(sorted({role for record in records for role in _roles(record)}))
    return DataError(
        f"data.data.file_path: {data.file_path}: nothing to train: none of the records makes an "
        f"example ({found}). Formats found: {formats or 'none'}; roles: {roles or 'none'}. Raise "
        f"model.max_seq_length (now {job.manifest.seq_length}), lower "
        f"data.data.min_seq_length (now {data.min_seq_length}), or, as only assistant turns with "
        "content are trained, rename the roles or set data.data.format"
    )


def _roles(record: dict[str, Any]) -> list[str]:
    turns = [
        turn
        for value in record.values()
        for turn in (value if isinstance(value, list) else ())
        if isinstance(turn, dict)
    ]
    found = [turn.get("role", turn.get("from")) for turn in turns]
    return [str(role) for role in found if role is not None]


def _open_job(
    split: str,
    config: ComputeTopkLogitsConfig,
    pretrained: PretrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Job:
    architecture = pretrained.architecture
    data = config.data.data
    seq_length = sequence_length(
        config.model.max_seq_length, architecture.max_position_embeddings
    )
    # One rank reads the whole data for line starts and hash; the others get them.
    records = on_rank_zero(lambda: open_records(data.file_path))
    dataset = TokenizedDataset(
        config.data, tokenizer, seq_length, architecture.vocab_size, records
    )
    indices = _indices(config, dataset)
    # A wrong format or chat template shows here, before anything is written.
    first = dataset[indices[0]]
    text = first if isinstance(first, str) else trained_text(first, tokenizer)
    log.info("example %d, trained between « and »:\n%s", indices[0], text)
    formats = {data.format}
    if data.format == "auto":
        # Each rank parses its share of the records.
        share = indices[dist.get_rank() :: dist.get_world_size()]
        formats = set().union(*gather(lambda: dataset.formats(share)))
    fp8 = {} if config.model.fp8 is None else {"fp8": config.model.fp8}
    manifest = Manifest(
        codec=codec_settings(config.cache),
        top_k=config.top_k,
        vocab_size=architecture.vocab_size,
        tokenizer_size=len(tokenizer),
        seq_length=seq_length,
        teacher=pretrained.fingerprint() | fp8,
        tokenizer=tokenizer_fingerprint(tokenizer),
        chat_template=chat_template_fingerprint(tokenizer),
        tokenizer_parts=tokenizer_parts(tokenizer),
        tokenizer_tokens=describe_tokens(tokenizer),
        dataset={
            "path": data.file_path,
            "fingerprint": dataset.records.fingerprint,
            "start_from_idx": indices[0],
            "end_at_idx": indices[-1],
            "formats": sorted(formats),
            "formatting": _formatting(config, dataset),
        },
        n_examples_per_chunk=config.n_examples_per_chunk,
        segment_examples=config.cache.segment_examples,
        config=resolved_config(config),
    )
    chunks = segments(indices, config.n_examples_per_chunk or len(indices))
    return Job(split, config, dataset, indices, chunks, manifest)


def _formatting(
    config: ComputeTopkLogitsConfig, dataset: TokenizedDataset
) -> dict[str, Any]:
    """Return all that decides which tokens a record becomes, besides the tokenizer."""
    formatting = dataclasses.asdict(config.data.data)
    del formatting["file_path"]
    formatting["chat_prompt_tokens"] = dataclasses.asdict(
        config.data.chat_prompt_tokens
    )
    formatting["record_function_source"] = dataset.function_source
    return formatting


def _indices(config: ComputeTopkLogitsConfig, dataset: TokenizedDataset) -> range:
    """Return the indices of the records to compute.

    Raises:
        ConfigError: the range lies outside the dataset, or slices select several stretches of it.
    """
    selected = dataset.indices
    num_records = len(dataset)
    if not isinstance(selected, range):
        raise ConfigError(
            f"data.data.file_path: {config.data.data.file_path}: the slices leave gaps between records, "
            "and a cache holds one stretch; give one command for each"
        )
    last = num_records - 1 if config.end_at_idx is None else config.end_at_idx
    if max(config.start_from_idx, last) >= num_records:
        raise ConfigError(
            f"start_from_idx, end_at_idx: {config.start_from_idx} to {last} lies outside "
            f"{config.data.data.file_path}, whose records have the indices 0 to {num_records - 1}"
        )
    first = max(config.start_from_idx, selected.start)
    indices = range(first, min(last + 1, selected.stop))
    if not indices:
        raise ConfigError(
            f"start_from_idx, end_at_idx: {config.start_from_idx} to {last} has no record of the "
            f"slice {config.data.data.file_path}, whose records have the indices {selected.start} to "
            f"{selected.stop - 1}"
        )
    return indices
