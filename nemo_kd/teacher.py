"""Stage 1: runs a teacher over a dataset and caches its top-k logits.

The loop is `compute_topk_logits`: chunks, in them global batches, in them each data-parallel rank's contiguous share.
Every row carries the index of its example from the file to the cache, so no layout or batch size can swap rows.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Batch, CachedExample, Example, TeacherTopK
from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.manifest import FORMAT_VERSION, Manifest
from nemo_kd.cache.writer import CacheWriter, ChunkWriter
from nemo_kd.config import ConfigError
from nemo_kd.config.data import sequence_length
from nemo_kd.config.model import PRECISIONS, GPTArchitecture, check_batch_sizes, check_tensor_parallel
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.data.collate import collate
from nemo_kd.data.dataset import Skipped, TokenizedDataset, describe_example
from nemo_kd.data.records import DataError
from nemo_kd.data.tokenizer import chat_template_fingerprint, load_tokenizer, padding_id, tokenizer_fingerprint
from nemo_kd.mcore.checkpoint import PretrainedModel, open_pretrained
from nemo_kd.mcore.groups import ProcessGroups, init_process_group, initialize_model_parallel
from nemo_kd.mcore.model import build_gpt_model, transformer_config, use_transformer_engine
from nemo_kd.mcore.schedule import forward
from nemo_kd.ops.topk import vocab_parallel_topk
from nemo_kd.ops.vocab import VocabShard

log = logging.getLogger(__name__)

Outcome = CachedExample | Skipped


class Teacher:
    """The teacher on this rank: from examples to their top-k logits."""

    def __init__(
        self, config: ComputeTopkLogitsConfig, pretrained: PretrainedModel, groups: ProcessGroups, pad_id: int
    ) -> None:
        self.top_k, self.micro_batch_size = config.top_k, config.model.micro_batch_size
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
        """The examples in order, each with the teacher's logits of its own positions; padding is cut off again."""
        for start in range(0, len(examples), self.micro_batch_size):
            micro_batch = examples[start : start + self.micro_batch_size]
            yield from self._micro_batch(micro_batch, collate(micro_batch, self.pad_id).to(self.groups.device))

    @torch.inference_mode()
    def _micro_batch(self, examples: Sequence[Example], batch: Batch) -> Iterator[CachedExample]:
        logits_BSv = forward(self.model, batch)
        shard = VocabShard.of(logits_BSv.shape[-1], self.vocab_size, self.groups.tensor)
        topk = vocab_parallel_topk(logits_BSv.flatten(0, 1), self.top_k, shard)
        shape = batch.tokens_BS.shape
        logits_BSK = topk.topk_logits_NK.unflatten(0, shape).cpu().numpy()
        ids_BSK = topk.topk_token_ids_NK.unflatten(0, shape).cpu().numpy()
        log_sum_exp_BS = topk.log_sum_exp_logits_N.unflatten(0, shape).cpu().numpy()
        for row, example in enumerate(examples):
            length = example.num_tokens
            if not torch.isfinite(topk.log_sum_exp_logits_N.unflatten(0, shape)[row, :length]).all():
                raise ValueError(
                    f"the teacher's logits of example {example.index} are not finite; try trainer.precision=32, "
                    "and check the checkpoint"
                )
            yield CachedExample(
                example,
                TeacherTopK(logits_BSK[row, :length], ids_BSK[row, :length], log_sum_exp_BS[row, :length]),
            )


def compute_topk_logits(config: ComputeTopkLogitsConfig) -> None:
    """Runs stage 1: writes every chunk of the asked range that is not complete yet.

    Raises:
        ConfigError, DataError, CacheError: something the user gave cannot work; before the teacher is loaded.
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
        writer = None
        if torch.distributed.get_rank() == 0:
            manifest = _manifest(config, pretrained, tokenizer, dataset, seq_length, chunks)
            writer = CacheWriter(CacheLayout(config.output_path), manifest)
        missing = _from_rank_zero([c for c in range(len(chunks)) if not writer.is_complete(c)] if writer else None)
        if missing:
            _check_records(dataset, [index for chunk in missing for index in chunks[chunk]])
            teacher = Teacher(config, pretrained, groups, padding_id(tokenizer, architecture.vocab_size))
            _write_chunks(config, teacher, dataset, chunks, missing, writer)
        if writer is not None:
            _report(writer.manifest, len(chunks) - len(missing))


def check_model(config: ComputeTopkLogitsConfig, architecture: GPTArchitecture) -> None:
    """Refuses layouts and batch sizes that do not divide, and a `top_k` above the vocabulary.

    Raises:
        ConfigError: names the key.
    """
    check_tensor_parallel(architecture, config.model.tensor_model_parallel_size)
    use_transformer_engine(config.model.transformer_engine)
    check_batch_sizes(
        config.model.micro_batch_size,
        config.model.global_batch_size,
        config.model.data_parallel_size(torch.distributed.get_world_size()),
    )
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


def _write_chunks(
    config: ComputeTopkLogitsConfig,
    teacher: Teacher,
    dataset: TokenizedDataset,
    chunks: list[range],
    missing: list[int],
    writer: CacheWriter | None,
) -> None:
    progress = tqdm(
        total=sum(len(chunks[chunk]) for chunk in missing),
        unit=" examples",
        desc="teacher",
        disable=writer is None,
        mininterval=1.0,
    )
    num_tokens, started_s = 0, time.perf_counter()
    for chunk in missing:
        indices = chunks[chunk]
        with contextlib.ExitStack() as stack:
            chunk_writer: ChunkWriter | None = None
            if writer is not None:
                chunk_writer = stack.enter_context(writer.chunk(chunk, indices[0], indices[-1]))
            for start in range(0, len(indices), config.model.global_batch_size):
                global_batch = indices[start : start + config.model.global_batch_size]
                outcomes = _global_batch(teacher, dataset, global_batch)
                for outcome in outcomes:
                    assert chunk_writer is not None
                    if isinstance(outcome, Skipped):
                        chunk_writer.skip(outcome.reason)
                    else:
                        chunk_writer.write(outcome)
                        num_tokens += outcome.example.num_tokens
                progress.set_postfix_str(
                    f"{num_tokens / (time.perf_counter() - started_s):,.0f} tokens/s", refresh=False
                )
                progress.update(len(global_batch))
    progress.close()


def _global_batch(teacher: Teacher, dataset: TokenizedDataset, indices: range) -> list[Outcome]:
    """What became of every example of one global batch, in the order of their indices, on rank 0; empty elsewhere."""
    groups = teacher.groups
    per_rank = -(-len(indices) // groups.data_size)
    mine = [dataset[index] for index in indices[groups.data_rank * per_rank : (groups.data_rank + 1) * per_rank]]
    rows = teacher.rows([example for example in mine if isinstance(example, Example)])
    outcomes: list[Outcome] = [example if isinstance(example, Skipped) else next(rows) for example in mine]
    if groups.tensor_rank != 0:
        return []
    gathered: list[list[Outcome]] | None = [[] for _ in range(groups.data_size)] if groups.data_rank == 0 else None
    torch.distributed.gather_object(outcomes, gathered, group=groups.data, group_dst=0)
    return [outcome for part in gathered or () for outcome in part]


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
        codec="json",
        top_k=config.top_k,
        vocab_size=pretrained.architecture.vocab_size,
        seq_length=seq_length,
        teacher=pretrained.fingerprint(),
        tokenizer=tokenizer_fingerprint(tokenizer),
        chat_template=chat_template_fingerprint(tokenizer),
        dataset={
            "path": config.data.data.file_path,
            "fingerprint": dataset.records.fingerprint(),
            "start_from_idx": chunks[0][0],
            "end_at_idx": chunks[-1][-1],
        },
        n_examples_per_chunk=config.n_examples_per_chunk,
        chunks={},
    )


def _from_rank_zero(value: list[int] | None) -> list[int]:
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


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
