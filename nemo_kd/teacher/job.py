"""Open and check everything that stage 1 needs, before any long work starts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Example
from nemo_kd.cache.manifest import Manifest, codec_settings
from nemo_kd.cache.segment import Segment
from nemo_kd.config.data import sequence_length
from nemo_kd.config.errors import ConfigError
from nemo_kd.config.model import GPTArchitecture, check_layout
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.data.dataset import (
    NO_LOSS_TOKENS,
    TOO_LONG,
    TOO_SHORT,
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
from nemo_kd.run.collective import gather
from nemo_kd.run.ranks import join_ranks
from nemo_kd.run.resolved_config import resolved_config
from nemo_kd.teacher.model import Teacher, ignore_step

log = logging.getLogger(__name__)

MAX_EXPLAINED_RECORDS = 10_000
"""Records to read for an explanation why a dataset has no examples."""


@dataclass(frozen=True)
class Job:
    """One dataset and the cache to write from it.

    Attributes:
        split: the dataset's name, empty for a single dataset.
        chunks: record indices of every chunk.
        manifest: of the cache, without chunks.
    """

    split: str
    config: ComputeTopkLogitsConfig
    dataset: TokenizedDataset
    chunks: list[range]
    manifest: Manifest

    @property
    def label(self) -> str:
        """Prefix of log lines."""
        return f"{self.split}: " if self.split else ""

    @property
    def indices(self) -> range:
        return range(self.chunks[0][0], self.chunks[-1][-1] + 1)


@dataclass(frozen=True)
class Run:
    """The jobs of one command and their teacher, whose weights are not loaded yet."""

    config: ComputeTopkLogitsConfig
    pretrained: PretrainedModel
    groups: ProcessGroups
    pad_id: int
    jobs: list[Job]

    def load_teacher(self, step: Callable[..., None] = ignore_step) -> Teacher:
        """Load this rank's part of the teacher; `step` is called before every batch."""
        return Teacher(self.config, self.pretrained, self.groups, self.pad_id, step)

    def describe_ranks(self) -> str:
        """Describe how ranks share the teacher and the size of a batch, for reports."""
        model = self.config.model
        sizes = {
            "tensor": model.tensor_model_parallel_size,
            "pipeline": model.pipeline_model_parallel_size,
            "context": model.context_parallel_size,
            "data": self.groups.data_size,
        }
        product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        parts = [
            f"{dist.get_world_size()} ranks" + (f" = {product}" if product else ""),
            self.config.trainer.precision,
        ]
        if model.expert_model_parallel_size > 1:
            parts.append(f"experts over {model.expert_model_parallel_size} ranks")
        if self.config.max_tokens_per_batch is not None:
            parts.append(f"at most {self.config.max_tokens_per_batch:,} tokens per batch")
        if model.micro_batch_size is not None:
            parts.append(f"at most {model.micro_batch_size} examples per batch")
        return ", ".join(parts)


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
        tokenizer = load_tokenizer(pretrained.tokenizer_folder)
        jobs = [
            _open_job(split, part, pretrained, tokenizer)
            for split, part in config.splits().items()
        ]
        groups = initialize_model_parallel(config.model, config.model.seed)
        yield Run(
            config,
            pretrained,
            groups,
            padding_id(tokenizer, architecture.vocab_size),
            jobs,
        )


def check_model(config: ComputeTopkLogitsConfig, architecture: GPTArchitecture) -> None:
    """Refuse parallel sizes that do not divide, and a `top_k` above the vocabulary.

    Raises:
        ConfigError: names the key.
    """
    check_layout(architecture, config.model)
    use_transformer_engine(config.model.transformer_engine)
    config.model.data_parallel_size(dist.get_world_size())
    if config.top_k > architecture.vocab_size:
        raise ConfigError(
            f"top_k: {config.top_k} exceeds the teacher's vocabulary of "
            f"{architecture.vocab_size} tokens"
        )


def check_records(job: Job, segments: Sequence[Segment]) -> int:
    """Render every record of the segments once, shared among the ranks.

    Returns:
        The number of tokens in all of them.

    Raises:
        DataError: on every rank, for a record that cannot be rendered, or if no record of the
            whole range makes an example.
    """
    indices = [index for _, records in segments for index in records]

    def render_share() -> tuple[int, int]:
        num_examples = 0
        num_tokens = 0
        for index in tqdm(
            indices[dist.get_rank() :: dist.get_world_size()],
            desc=f"{job.label}checking records",
            unit=" records",
            disable=dist.get_rank() != 0 or not sys.stderr.isatty(),
            leave=False,
        ):
            record = job.dataset[index]
            if isinstance(record, Example):
                num_examples += 1
                num_tokens += record.num_tokens
        return num_examples, num_tokens

    shares = gather(render_share)
    # A part may be empty; only the whole range must not be.
    if len(indices) == len(job.indices) and not any(
        num_examples for num_examples, _ in shares
    ):
        raise nothing_to_train(job)
    return sum(num_tokens for _, num_tokens in shares)


def nothing_to_train(job: Job) -> DataError:
    """Explain why no record makes an example: reasons, formats and roles found, next step."""
    indices = job.indices[:MAX_EXPLAINED_RECORDS]
    reasons: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    for index in indices:
        item = job.dataset[index]
        reasons[item if isinstance(item, str) else "usable"] += 1
        formats[job.dataset.format(index)] += 1
        record = job.dataset.records[index]
        for key, role in (("messages", "role"), ("conversations", "from")):
            turns = record.get(key) or []
            roles.update(str(turn.get(role)) for turn in turns if isinstance(turn, dict))
    data = job.config.data.data
    remedies = {
        TOO_LONG: f"raise model.max_seq_length (now {job.manifest.seq_length})",
        TOO_SHORT: f"lower data.data.min_seq_length (now {data.min_seq_length})",
        NO_LOSS_TOKENS: (
            "only assistant turns with content are trained: rename the roles, or set "
            "data.data.format"
        ),
    }
    found = [f"formats found: {_counts(formats)}"]
    if roles:
        found.append(f"roles found: {_counts(roles)}")
    found += [remedies[reason] for reason in reasons if reason in remedies]
    return DataError(
        f"data.data.file_path: {data.file_path}: nothing to train: none of the "
        f"{len(indices):,} records {indices[0]} to {indices[-1]} makes an example "
        f"({_counts(reasons)}); {'; '.join(found)}"
    )


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name!r}" for name, count in counter.most_common(10))


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
    dataset = TokenizedDataset(
        config.data, tokenizer, seq_length, architecture.vocab_size
    )
    chunks = _chunks(config, len(dataset))
    # A wrong format or chat template shows here, before anything is written.
    first = dataset[chunks[0][0]]
    prefix = f"{split}: " if split else ""
    if isinstance(first, Example):
        text = trained_text(first, tokenizer)
        log.info("%sexample %d, trained between « and »:\n%s", prefix, first.index, text)
    else:
        log.info("%sexample %d is skipped: %s", prefix, chunks[0][0], first)
    formatting = dataclasses.asdict(data)
    del formatting["file_path"]
    formatting["chat_prompt_tokens"] = dataclasses.asdict(config.data.chat_prompt_tokens)
    manifest = Manifest(
        codec=codec_settings(config.cache),
        top_k=config.top_k,
        vocab_size=architecture.vocab_size,
        tokenizer_size=len(tokenizer),
        seq_length=seq_length,
        teacher=pretrained.fingerprint(),
        tokenizer=tokenizer_fingerprint(tokenizer),
        chat_template=chat_template_fingerprint(tokenizer),
        tokenizer_parts=tokenizer_parts(tokenizer),
        tokenizer_tokens=describe_tokens(tokenizer),
        dataset={
            "path": data.file_path,
            "fingerprint": dataset.records.fingerprint,
            "start_from_idx": chunks[0][0],
            "end_at_idx": chunks[-1][-1],
            "formats": _formats(dataset, range(chunks[0][0], chunks[-1][-1] + 1)),
            "formatting": formatting,
        },
        n_examples_per_chunk=config.n_examples_per_chunk,
        segment_examples=config.cache.segment_examples,
        config=resolved_config(config),
    )
    return Job(split, config, dataset, chunks, manifest)


def _chunks(config: ComputeTopkLogitsConfig, num_records: int) -> list[range]:
    """Return the record indices that each chunk covers.

    Raises:
        ConfigError: the range lies outside the dataset.
    """
    last = num_records - 1 if config.end_at_idx is None else config.end_at_idx
    for key, index in (("start_from_idx", config.start_from_idx), ("end_at_idx", last)):
        if index >= num_records:
            raise ConfigError(
                f"{key}: {index} lies outside {config.data.data.file_path}, whose records have "
                f"the indices 0 to {num_records - 1}"
            )
    indices = range(config.start_from_idx, last + 1)
    size = config.n_examples_per_chunk or len(indices)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _formats(dataset: TokenizedDataset, indices: range) -> list[str]:
    """Return the formats of all records; each rank parses its share of them."""
    share = indices[dist.get_rank() :: dist.get_world_size()]
    if dataset.config.data.format != "auto":
        return [dataset.config.data.format]
    found: list[Any] = gather(lambda: set(map(dataset.format, share)))
    return sorted(set().union(*found))
