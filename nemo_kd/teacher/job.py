"""What stage 1 is about to do, checked before any long work starts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Example
from nemo_kd.cache.manifest import FORMAT_VERSION, Manifest, codec_settings
from nemo_kd.cache.writer import Segment
from nemo_kd.config import ConfigError
from nemo_kd.config.data import DataConfig, sequence_length
from nemo_kd.config.model import GPTArchitecture, check_layout
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.data.dataset import (
    NO_LOSS_TOKENS,
    TOO_LONG,
    TOO_SHORT,
    Skipped,
    TokenizedDataset,
)
from nemo_kd.data.records import DataError
from nemo_kd.data.text import trained_text
from nemo_kd.data.tokenizer import (
    chat_template_fingerprint,
    describe_tokens,
    load_tokenizer,
    padding_id,
    tokenizer_fingerprint,
    tokenizer_parts,
)
from nemo_kd.mcore.checkpoint import PretrainedModel, open_pretrained
from nemo_kd.mcore.groups import ProcessGroups, initialize_model_parallel
from nemo_kd.mcore.model import use_transformer_engine
from nemo_kd.run.process_group import join_ranks
from nemo_kd.teacher.model import Teacher, ignored

log = logging.getLogger(__name__)

MOST_EXPLAINED = 10_000
"""Records that an explanation of a dataset without examples reads."""


@dataclass(frozen=True)
class Job:
    """One dataset's cache.

    Attributes:
        split: the dataset's name where there are several, else empty.
        chunks: the record indices of every chunk.
        manifest: of the cache to be written, without chunks.
        first_example: the first record with its loss mask, for a person to look at.
    """

    split: str
    config: ComputeTopkLogitsConfig
    dataset: TokenizedDataset
    chunks: list[range]
    manifest: Manifest
    first_example: str


@dataclass(frozen=True)
class Run:
    """The jobs of one command and the teacher they share, whose weights are not loaded yet."""

    config: ComputeTopkLogitsConfig
    pretrained: PretrainedModel
    groups: ProcessGroups
    pad_id: int
    jobs: list[Job]

    def load_teacher(self, step: Callable[..., None] = ignored) -> Teacher:
        """Every rank loads its part; `step` is called before every batch, with what comes next."""
        return Teacher(self.config, self.pretrained, self.groups, self.pad_id, step)

    def layout(self) -> str:
        """How the teacher is spread over the ranks and what they compute at a time."""
        model, limits = self.config.model, [f"{self.config.trainer.precision}"]
        sizes = [
            ("tensor", model.tensor_model_parallel_size),
            ("pipeline", model.pipeline_model_parallel_size),
            ("context", model.context_parallel_size),
            ("data", self.groups.data_size),
        ]
        if model.expert_model_parallel_size > 1:
            limits.append(f"experts over {model.expert_model_parallel_size} ranks")
        if self.config.max_tokens_per_batch is not None:
            limits.append(f"at most {self.config.max_tokens_per_batch:,} tokens a batch")
        if model.micro_batch_size is not None:
            limits.append(f"at most {model.micro_batch_size} examples a batch")
        split = " x ".join(f"{name} {size}" for name, size in sizes if size > 1)
        return f"{torch.distributed.get_world_size()} ranks{f' = {split}' if split else ''}, {', '.join(limits)}"


@contextlib.contextmanager
def open_run(config: ComputeTopkLogitsConfig) -> Iterator[Run]:
    """Joins the ranks and opens teacher, tokenizer and datasets.

    Raises:
        ConfigError, DataError: something the user gave cannot work.
    """
    join_ranks(config.trainer)
    with open_pretrained(config.pretrained_checkpoint.restore_from_path) as pretrained:
        architecture = pretrained.architecture
        check_model(config, architecture)
        tokenizer = load_tokenizer(pretrained.tokenizer_folder)
        seq_length = sequence_length(
            config.model.max_seq_length, architecture.max_position_embeddings
        )
        jobs = [
            _job(split, part, pretrained, tokenizer, seq_length)
            for split, part in config.splits().items()
        ]
        groups = initialize_model_parallel(config.model, config.model.seed)
        yield Run(config, pretrained, groups, padding_id(tokenizer, architecture.vocab_size), jobs)


def check_model(config: ComputeTopkLogitsConfig, architecture: GPTArchitecture) -> None:
    """Refuses layouts and batch sizes that do not divide, and a `top_k` above the vocabulary.

    Raises:
        ConfigError: names the key.
    """
    check_layout(architecture, config.model)
    use_transformer_engine(config.model.transformer_engine)
    config.model.data_parallel_size(torch.distributed.get_world_size())
    if config.top_k > architecture.vocab_size:
        raise ConfigError(
            f"top_k: {config.top_k} exceeds the teacher's vocabulary of {architecture.vocab_size} tokens"
        )


def plan_chunks(config: ComputeTopkLogitsConfig, num_records: int) -> list[range]:
    """The record indices that each chunk covers.

    Raises:
        ConfigError: the asked range lies outside the dataset.
    """
    last = num_records - 1 if config.end_at_idx is None else config.end_at_idx
    for key, index in (("start_from_idx", config.start_from_idx), ("end_at_idx", last)):
        if index >= num_records:
            raise ConfigError(
                f"{key}: {index} lies outside {config.data.data.file_path}, whose records have the indices 0 to {num_records - 1}"
            )
    indices = range(config.start_from_idx, last + 1)
    size = config.n_examples_per_chunk or len(indices)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def check_records(job: Job, segments: list[Segment]) -> int:
    """Render every record of the segments once, shared out among the ranks, before the teacher is loaded.

    Returns:
        The tokens of all of them.

    Raises:
        DataError: on every rank: what one of them found in a record; or no record of the whole range makes an example.
    """
    indices = [index for _, records in segments for index in records]
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    num_tokens = 0
    num_examples = 0
    problem = None
    name = f"checking records{f' of {job.split}' if job.split else ''}"
    hidden = rank != 0 or not sys.stderr.isatty()
    for index in tqdm(
        indices[rank::world_size], desc=name, unit=" records", disable=hidden, leave=False
    ):
        try:
            record = job.dataset[index]
        except DataError as error:
            problem = str(error)
            break
        if isinstance(record, Example):
            num_tokens += record.num_tokens
            num_examples += 1
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, (problem, num_tokens, num_examples))
    for message, _, _ in found:
        if message is not None:
            raise DataError(message)
    covers_all = len(indices) == sum(map(len, job.chunks))  # a shard's part may be empty
    if covers_all and not any(examples for _, _, examples in found):
        raise nothing_to_train(job)
    return sum(tokens for _, tokens, _ in found)


def nothing_to_train(job: Job) -> DataError:
    """Explain why no record of the job makes an example: counts per reason, formats and roles found, next step."""
    indices = range(job.chunks[0][0], job.chunks[-1][-1] + 1)[:MOST_EXPLAINED]
    reasons: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    for index in indices:
        item = job.dataset[index]
        reasons[item.reason if isinstance(item, Skipped) else "usable"] += 1
        record = job.dataset.records[index]
        formats.update(job.dataset.formats([index]))
        for key, role in (("messages", "role"), ("conversations", "from")):
            turns = record.get(key)
            roles.update(str(turn.get(role)) for turn in turns or [] if isinstance(turn, dict))
    data = job.config.data.data
    remedies = {
        TOO_LONG: f"raise model.max_seq_length (now {job.manifest.seq_length})",
        TOO_SHORT: f"lower data.data.min_seq_length (now {data.min_seq_length})",
        NO_LOSS_TOKENS: "only an assistant's turns with content are trained: rename the roles, or set data.data.format",
    }
    roles_found = f"; roles found: {_counts(roles)}" if roles else ""
    advice = "; ".join(remedies[reason] for reason in reasons if reason in remedies)
    return DataError(
        f"data.data.file_path: {data.file_path}: nothing to train: none of the {len(indices):,} records {indices[0]} to "
        f"{indices[-1]} makes an example ({_counts(reasons)}); formats found: {_counts(formats)}{roles_found}; {advice}"
    )


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name!r}" for name, count in counter.most_common(10))


def _job(
    split: str,
    config: ComputeTopkLogitsConfig,
    pretrained: PretrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
) -> Job:
    dataset = TokenizedDataset(
        config.data, tokenizer, seq_length, pretrained.architecture.vocab_size
    )
    chunks = plan_chunks(config, len(dataset))
    first = dataset[
        chunks[0].start
    ]  # a wrong format or template shows here, before anything is written
    if isinstance(first, Example):
        text = f"example {first.index}, trained between « and »:\n{trained_text(first, tokenizer)}"
    else:
        text = f"example {first.index} is skipped: {first.reason}"
    log.info("%s%s", f"{split}: " if split else "", text)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        codec=codec_settings(config.cache),
        top_k=config.top_k,
        vocab_size=pretrained.architecture.vocab_size,
        tokenizer_size=len(tokenizer),
        seq_length=seq_length,
        teacher=pretrained.fingerprint(),
        tokenizer=tokenizer_fingerprint(tokenizer),
        chat_template=chat_template_fingerprint(tokenizer),
        tokenizer_parts=tokenizer_parts(tokenizer),
        tokenizer_tokens=describe_tokens(tokenizer),
        dataset={
            "path": config.data.data.file_path,
            "fingerprint": dataset.records.fingerprint(),
            "start_from_idx": chunks[0][0],
            "end_at_idx": chunks[-1][-1],
            "formats": dataset.formats(index for chunk in chunks for index in chunk),
            "formatting": formatting(config.data),
        },
        n_examples_per_chunk=config.n_examples_per_chunk,
        segment_examples=config.cache.segment_examples,
    )
    return Job(split, config, dataset, chunks, manifest, text)


def formatting(data: DataConfig) -> dict[str, Any]:
    """The settings that decide how a record becomes tokens and a mask, tokenizer and length apart."""
    settings = dataclasses.asdict(data.data) | {
        "chat_prompt_tokens": dataclasses.asdict(data.chat_prompt_tokens)
    }
    return {name: value for name, value in settings.items() if name != "file_path"}
