"""Stage 1: runs a teacher over a dataset and caches its top-k logits.

The loop is `_write_segments`: each data-parallel rank takes segments, runs of consecutive records, and in them
micro-batches. What is computed together so depends on the records alone, not on the ranks; and every row carries the
index of its example from the file to the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Batch, CachedExample, Example, TeacherTopK
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import FORMAT_VERSION, Manifest, codec_settings
from nemo_kd.cache.writer import CacheWriter, Segment, SegmentWriter
from nemo_kd.config import ConfigError
from nemo_kd.config.data import DataConfig, sequence_length
from nemo_kd.config.model import PRECISIONS, GPTArchitecture, check_tensor_parallel
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.data.collate import collate
from nemo_kd.data.dataset import Skipped, TokenizedDataset, describe_example
from nemo_kd.data.records import DataError
from nemo_kd.data.tokenizer import chat_template_fingerprint, load_tokenizer, padding_id, tokenizer_fingerprint
from nemo_kd.mcore.checkpoint import PretrainedModel, open_pretrained
from nemo_kd.mcore.groups import ProcessGroups, init_process_group, initialize_model_parallel
from nemo_kd.mcore.model import build_gpt_model, transformer_config, use_transformer_engine
from nemo_kd.mcore.schedule import forward
from nemo_kd.ops.tail_sampling import tail_uniforms
from nemo_kd.ops.topk import topk_of_logits
from nemo_kd.ops.vocab import VocabShard

log = logging.getLogger(__name__)


class Teacher:
    """The teacher on this rank: from examples to what it says about each of their positions."""

    def __init__(
        self, config: ComputeTopkLogitsConfig, pretrained: PretrainedModel, groups: ProcessGroups, pad_id: int
    ) -> None:
        self.top_k, self.micro_batch_size = config.top_k, config.model.micro_batch_size
        self.cache, self.temperatures = config.cache, (1.0, *config.cache.temperatures)
        self.groups, self.pad_id = groups, pad_id
        self.vocab_size = pretrained.architecture.vocab_size
        self.model = build_gpt_model(
            pretrained.architecture,
            transformer_config(
                pretrained.architecture, config.model, getattr(torch, PRECISIONS[config.trainer.precision])
            ),
            config.model.make_vocab_size_divisible_by,
            use_transformer_engine(config.model.transformer_engine),
        )
        pretrained.load_weights(self.model, groups)
        self.model.eval()

    def rows(self, examples: Sequence[Example]) -> Iterator[CachedExample]:
        """The examples in order, each with what the teacher says about its own positions; padding is cut off again."""
        for start in range(0, len(examples), self.micro_batch_size):
            micro_batch = examples[start : start + self.micro_batch_size]
            yield from self._micro_batch(micro_batch, collate(micro_batch, self.pad_id).to(self.groups.device))

    @torch.inference_mode()
    def _micro_batch(self, examples: Sequence[Example], batch: Batch) -> Iterator[CachedExample]:
        logits_Nv = forward(self.model, batch).flatten(0, 1)
        shard = VocabShard.of(logits_Nv.shape[-1], self.vocab_size, self.groups.tensor)
        found = topk_of_logits(
            logits_Nv[:, : shard.num_real],
            batch.labels_BS.flatten(),
            shard,
            self.top_k,
            self.cache.kept,
            self.temperatures,
            self._uniforms(examples, batch) if self.cache.tail_samples else None,
        )
        fields = {
            "topk_logits": found.topk_logits_NK,
            "topk_token_ids": found.topk_token_ids_NK,
            "log_sum_exp_logits": found.log_sum_exp_N,
            "tail_mass": found.tail_mass_NT,
            "label_logprobs": found.label_logprobs_N,
        }
        if found.tail_token_ids_NM is not None:
            fields["tail_token_ids"] = found.tail_token_ids_NM
        shape = batch.tokens_BS.shape
        arrays = {name: values.unflatten(0, shape).cpu().numpy() for name, values in fields.items()}
        for row, example in enumerate(examples):
            mine = {name: values[row, : example.num_tokens] for name, values in arrays.items()}
            yield CachedExample(example, self._teacher_topk(mine, example))

    def _teacher_topk(self, fields: dict[str, np.ndarray], example: Example) -> TeacherTopK:
        if not np.isfinite(fields["log_sum_exp_logits"]).all():
            raise ValueError(
                f"the teacher's logits of example {example.index} are not finite; try trainer.precision=32, "
                "and check the checkpoint"
            )
        return TeacherTopK(
            topk_logits_SK=fields["topk_logits"],
            topk_token_ids_SK=fields["topk_token_ids"],
            log_sum_exp_logits_S=fields["log_sum_exp_logits"],
            tail_mass_TS=fields["tail_mass"].T,
            temperatures=self.temperatures,
            label_logprobs_S=fields["label_logprobs"],
            tail_token_ids_SM=fields.get("tail_token_ids"),
        )

    def _uniforms(self, examples: Sequence[Example], batch: Batch) -> torch.Tensor:
        """Random numbers of every position that depend on nothing but the seed, the example and the position."""
        num_examples, num_positions = batch.tokens_BS.shape
        uniforms = np.zeros((num_examples, num_positions, self.cache.tail_samples + 1))
        for row, example in enumerate(examples):
            uniforms[row, : example.num_tokens] = tail_uniforms(
                self.cache.seed, example.index, example.num_tokens, self.cache.tail_samples
            )
        return torch.from_numpy(uniforms).flatten(0, 1).to(batch.tokens_BS.device)


@dataclasses.dataclass(frozen=True)
class Job:
    """What stage 1 is about to do, checked.

    Attributes:
        chunks: the record indices of every chunk.
        manifest: of the cache to be written, without chunks.
    """

    config: ComputeTopkLogitsConfig
    pretrained: PretrainedModel
    dataset: TokenizedDataset
    chunks: list[range]
    groups: ProcessGroups
    manifest: Manifest
    pad_id: int

    def load_teacher(self) -> Teacher:
        return Teacher(self.config, self.pretrained, self.groups, self.pad_id)


@contextlib.contextmanager
def open_job(config: ComputeTopkLogitsConfig) -> Iterator[Job]:
    """Joins the ranks and opens teacher, tokenizer and dataset; the weights are not loaded yet.

    Raises:
        ConfigError, DataError: something the user gave cannot work.
    """
    init_process_group(config.trainer.num_nodes, config.trainer.devices, config.trainer.accelerator)
    with open_pretrained(config.pretrained_checkpoint.restore_from_path) as pretrained:
        architecture = pretrained.architecture
        check_model(config, architecture)
        tokenizer = load_tokenizer(pretrained.tokenizer_folder)
        seq_length = sequence_length(
            "data.data.max_seq_length",
            config.data.data.max_seq_length or config.model.encoder_seq_length,
            architecture.max_position_embeddings,
        )
        dataset = TokenizedDataset(config.data, tokenizer, seq_length, architecture.vocab_size)
        chunks = plan_chunks(config, len(dataset))
        first = dataset[chunks[0].start]  # a wrong format or template shows here, before anything is written
        if isinstance(first, Example):
            log.info("example %d, trained between « and »:\n%s", first.index, describe_example(first, tokenizer))
        groups = initialize_model_parallel(config.model, config.model.seed)
        manifest = _manifest(config, pretrained, tokenizer, dataset, seq_length, chunks)
        pad_id = padding_id(tokenizer, architecture.vocab_size)
        yield Job(config, pretrained, dataset, chunks, groups, manifest, pad_id)


def compute_topk_logits(config: ComputeTopkLogitsConfig) -> None:
    """Runs stage 1: writes every chunk of the asked range that is not complete yet.

    Raises:
        ConfigError, DataError, CacheError: something the user gave cannot work; before the teacher is loaded.
    """
    with open_job(config) as job, contextlib.ExitStack() as stack:
        writer, missing = _open_writer(job)
        if writer is not None:
            stack.callback(writer.close)
        num_complete = len(job.chunks) - len({chunk for chunk, _ in missing})
        if missing:
            _check_records(job.dataset, [index for _, indices in missing for index in indices])
            _write_segments(job, job.load_teacher(), missing, writer)
        if writer is not None:
            writer.assemble_complete()
            _report(writer.manifest, num_complete)


def check_model(config: ComputeTopkLogitsConfig, architecture: GPTArchitecture) -> None:
    """Refuses layouts and batch sizes that do not divide, and a `top_k` above the vocabulary.

    Raises:
        ConfigError: names the key.
    """
    check_tensor_parallel(architecture, config.model.tensor_model_parallel_size)
    use_transformer_engine(config.model.transformer_engine)
    config.model.data_parallel_size(torch.distributed.get_world_size())
    if config.top_k > architecture.vocab_size:
        raise ConfigError(f"top_k: {config.top_k} exceeds the teacher's vocabulary of {architecture.vocab_size} tokens")


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


def _check_records(dataset: TokenizedDataset, indices: list[int]) -> None:
    """Renders every record once, shared out among the ranks: a malformed one shows before the teacher is loaded.

    Raises:
        DataError: on every rank, what one of them found.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problems: list[str | None] = [None] * world_size
    mine = tqdm(indices[rank::world_size], desc="checking records", unit=" records", disable=rank != 0, leave=False)
    problem = None
    for index in mine:
        try:
            dataset[index]
        except DataError as error:
            problem = str(error)
            break
    torch.distributed.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise DataError(found)


def _open_writer(job: Job) -> tuple[CacheWriter | None, list[Segment]]:
    """(the cache's writer on rank 0, the segments to compute).

    Raises:
        CacheError: on every rank, what rank 0 found against writing.
    """
    writer, missing, problem = None, list[Segment](), ""
    if torch.distributed.get_rank() == 0:
        try:
            writer = CacheWriter(CacheLayout(job.config.output_path), job.manifest, job.chunks)
            missing = writer.missing_segments()
        except CacheError as error:
            problem = str(error)
    box: list[Any] = [missing, problem]
    torch.distributed.broadcast_object_list(box, src=0)
    missing, problem = box
    if problem:
        raise CacheError(problem)
    return writer, missing


def _write_segments(job: Job, teacher: Teacher, missing: list[Segment], writer: CacheWriter | None) -> None:
    """Computes this data-parallel rank's share of the missing segments; rank 0 puts chunks together meanwhile."""
    groups, layout, computed_with = job.groups, CacheLayout(job.config.output_path), _computed_with(job.config)
    mine = missing[groups.data_rank :: groups.data_size]
    progress = tqdm(
        total=sum(len(indices) for _, indices in mine),
        unit=" examples",
        desc="teacher" if groups.data_size == 1 else f"teacher, 1 of {groups.data_size} data-parallel ranks",
        disable=writer is None,
        mininterval=1.0,
    )
    num_tokens, started_s = 0, time.perf_counter()
    with progress:
        for segment in mine:
            # Every tensor-parallel rank takes part in computing the rows, one of them writes them.
            sink = SegmentWriter(layout, job.manifest, segment, computed_with) if groups.tensor_rank == 0 else None
            num_tokens += _write_segment(teacher, [job.dataset[index] for index in segment[1]], sink)
            if writer is not None:
                writer.assemble_complete(up_to=segment[0])
            rate = groups.data_size * num_tokens / (time.perf_counter() - started_s)
            progress.set_postfix_str(f"{rate:,.0f} tokens/s in all", refresh=False)
            progress.update(len(segment[1]))
    torch.distributed.barrier()


def _write_segment(teacher: Teacher, records: Sequence[Example | Skipped], sink: SegmentWriter | None) -> int:
    """Computes the records' rows and publishes them; returns their tokens."""
    rows, num_tokens = teacher.rows([record for record in records if isinstance(record, Example)]), 0
    for record in records:
        if isinstance(record, Skipped):
            if sink is not None:
                sink.skip(record.reason)
            continue
        row = next(rows)
        num_tokens += row.example.num_tokens
        if sink is not None:
            sink.write(row)
    if sink is not None:
        sink.publish()
    return num_tokens


def _computed_with(config: ComputeTopkLogitsConfig) -> dict[str, Any]:
    """What rounding depends on besides the weights; the manifest records it."""
    return {
        "micro_batch_size": config.model.micro_batch_size,
        "tensor_model_parallel_size": config.model.tensor_model_parallel_size,
        "precision": config.trainer.precision,
        "torch": torch.__version__,
    }


def _manifest(
    config: ComputeTopkLogitsConfig,
    pretrained: PretrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenizedDataset,
    seq_length: int,
    chunks: list[range],
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        codec=codec_settings(config.cache),
        top_k=config.top_k,
        vocab_size=pretrained.architecture.vocab_size,
        tokenizer_size=len(tokenizer),
        seq_length=seq_length,
        teacher=pretrained.fingerprint(),
        tokenizer=tokenizer_fingerprint(tokenizer),
        chat_template=chat_template_fingerprint(tokenizer),
        dataset={
            "path": config.data.data.file_path,
            "fingerprint": dataset.records.fingerprint(),
            "start_from_idx": chunks[0][0],
            "end_at_idx": chunks[-1][-1],
            "formats": dataset.formats(index for chunk in chunks for index in chunk),
            "formatting": _formatting(config.data),
        },
        n_examples_per_chunk=config.n_examples_per_chunk,
        segment_examples=config.cache.segment_examples,
    )


def _formatting(data: DataConfig) -> dict[str, Any]:
    """The settings that decide how a record becomes tokens and a mask, tokenizer and length apart."""
    settings = dataclasses.asdict(data.data) | {"chat_prompt_tokens": dataclasses.asdict(data.chat_prompt_tokens)}
    return {name: value for name, value in settings.items() if name not in ("file_path", "max_seq_length")}


def _report(manifest: Manifest, num_already_complete: int) -> None:
    chunks = manifest.chunks.values()
    examples, tokens = sum(chunk.examples for chunk in chunks), sum(chunk.tokens for chunk in chunks)
    loss_tokens, num_bytes = sum(chunk.loss_tokens for chunk in chunks), sum(chunk.bytes for chunk in chunks)
    lines = [
        ("chunks", f"{len(chunks)} ({num_already_complete} were complete before)"),
        ("examples", f"{examples:,}"),
        ("tokens", f"{tokens:,} ({loss_tokens:,} in the loss)"),
        ("bytes per token", f"{num_bytes / max(1, tokens):,.1f}"),
        (
            f"teacher mass in the top {manifest.top_k}",
            f"{sum(c.kept_mass_sum for c in chunks) / max(1, loss_tokens):.4f}",
        ),
        (f"label in the top {manifest.top_k}", f"{sum(c.label_in_topk for c in chunks) / max(1, loss_tokens):.4f}"),
    ]
    skipped: dict[str, int] = {}
    for chunk in chunks:
        for reason, count in chunk.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    lines += [(f"skipped: {reason}", f"{count:,}") for reason, count in skipped.items()] or [("skipped", "0")]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines), flush=True)
