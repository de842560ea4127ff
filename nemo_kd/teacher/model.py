"""The teacher on this rank: from examples to cached rows.

Shape legend: N positions with targets in a batch, S positions and P target positions of one
example, K kept logits, T temperatures, M tail samples, U = M + 1 random numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from nemo_kd.batch import Batch, CachedExample, Example, TeacherRows, join_rows, to_device
from nemo_kd.config import UserInputError
from nemo_kd.config.model import PRECISIONS, length_multiple
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.data.batches import collate, form_batches, pack
from nemo_kd.mcore.checkpoint import PretrainedModel
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.model import (
    build_gpt_model,
    hidden_at,
    output_weight,
    transformer_config,
    use_transformer_engine,
)
from nemo_kd.mcore.schedule import loss_positions, run_batch
from nemo_kd.ops.tail_sampling import tail_uniforms
from nemo_kd.ops.topk import topk_rows
from nemo_kd.ops.vocab import VocabShard

log = logging.getLogger(__name__)


class TeacherError(UserInputError):
    """The teacher cannot compute an example; the message names it and the next step."""


@dataclass
class BatchResult:
    """Targets of one batch on their way to the host.

    Attributes:
        numbers: the batch's examples, as numbers within the pass.
        starts: index of the first token of each example in the flat batch, b * S + s.
        targets: positions are indices in the flat batch; under context parallelism this rank's
            part. On the host once `ready` has occurred.
    """

    numbers: list[int]
    starts: list[int]
    targets: TeacherRows[torch.Tensor]
    ready: torch.cuda.Event | None


@dataclass
class Pass:
    """Examples given to `Teacher.start`, with the results of their batches.

    Attributes:
        batches: None for a batch whose result is on other ranks.
        computed_tokens: with padding.
        max_tokens: limit on a batch at the end of the pass.
    """

    examples: Sequence[Example]
    batches: list[BatchResult | None] = field(default_factory=list)
    computed_tokens: int = 0
    max_tokens: int | None = None


def ignore_step(what: str, *details: object) -> None: ...


class Teacher:
    """The teacher's weights on this rank.

    Args:
        step: called before every batch with its description, `what % details`.
    """

    def __init__(
        self,
        config: ComputeTopkLogitsConfig,
        pretrained: PretrainedModel,
        groups: ProcessGroups,
        pad_id: int,
        step: Callable[..., None] = ignore_step,
    ) -> None:
        self.top_k = config.top_k
        self.cache = config.cache
        self.groups = groups
        self.pad_id = pad_id
        self.step = step
        self.temperatures = (1.0, *config.cache.temperatures)
        self.everywhere = config.cache.codec == "json" or config.cache.positions == "all"
        self.max_examples = config.model.micro_batch_size
        self.max_tokens = config.max_tokens_per_batch
        self.packed = config.data.packing and groups.context_size == 1
        self.multiple_of = length_multiple(config.model)
        self.vocab_size = pretrained.architecture.vocab_size
        dtype = getattr(torch, PRECISIONS[config.trainer.precision])
        self.model = build_gpt_model(
            pretrained.architecture,
            transformer_config(
                pretrained.architecture, config.model, dtype, perform_initialization=False
            ),
            config.model.make_vocab_size_divisible_by,
            use_transformer_engine(config.model.transformer_engine),
        )
        pretrained.load_weights(self.model, groups)
        self.model.eval()

    def rows(self, examples: Sequence[Example]) -> list[CachedExample]:
        """Return the examples with their targets, in order; [] on ranks that do not write."""
        return self.finish(self.start(examples))

    def start(self, examples: Sequence[Example]) -> Pass:
        """Compute the examples batch by batch; all ranks of a replica call it with the same ones.

        On a GPU it returns before the results arrive. If a batch exceeds the GPU's memory and the
        replica is a single rank, the limit on a batch is halved from there on.

        Raises:
            TeacherError: an example alone does not fit, or a batch that other ranks share.
        """
        result = Pass(examples)
        pending = list(range(len(examples)))
        while True:
            lengths = [examples[number].num_tokens for number in pending]
            places = form_batches(
                lengths, self.max_examples, self.max_tokens, self.packed, self.multiple_of
            )
            batches = [[pending[place] for place in batch] for batch in places]
            num_done = self._compute(result, batches)
            if num_done == len(batches):
                result.max_tokens = self.max_tokens
                return result
            self._halve([examples[number] for number in batches[num_done]])
            pending = sorted(number for batch in batches[num_done:] for number in batch)

    def finish(self, started: Pass) -> list[CachedExample]:
        """Return the rows of a pass, in order; [] on ranks that do not write.

        Raises:
            TeacherError: the teacher's logits are not finite.
        """
        rows: dict[int, CachedExample] = {}
        for result in started.batches:
            whole = self._whole(result)
            if result is None or whole is None:
                continue
            for number, start in zip(result.numbers, result.starts, strict=True):
                example = started.examples[number]
                first, last = np.searchsorted(
                    whole.positions_P, [start, start + example.num_tokens]
                )
                targets = whole.at(slice(first, last))
                targets = replace(targets, positions_P=targets.positions_P - start)
                _check_finite(example, targets)
                rows[number] = CachedExample(example, targets)
        return [rows[number] for number in sorted(rows)]

    def _compute(self, result: Pass, batches: list[list[int]]) -> int:
        """Compute batches; return their number if the next one exceeds the GPU's memory."""
        groups = self.groups
        num_steps = len(batches)
        if groups.lockstep_lanes > 1:
            box = torch.tensor(num_steps)
            dist.all_reduce(box, op=ReduceOp.MAX, group=groups.lockstep)
            num_steps = int(box)
        for number in range(num_steps):
            try:
                self._batch(result, batches[number] if number < len(batches) else [])
            except torch.OutOfMemoryError as error:
                if dist.get_world_size(groups.lockstep) > 1:
                    # The others may be in the middle of a collective that this rank left.
                    raise TeacherError(
                        f"data.max_tokens_per_batch: rank {dist.get_rank()} is out of memory with "
                        f"a batch of at most {self.max_tokens} tokens ({error}); give a smaller "
                        "one, or spread the teacher over more ranks"
                    ) from error
                return number
        return len(batches)

    def _halve(self, examples: Sequence[Example]) -> None:
        tokens = sum(example.num_tokens for example in examples)
        if len(examples) == 1:
            raise TeacherError(
                f"example {examples[0].index}: its {tokens} tokens do not fit into the GPU's "
                "memory, not even alone; lower model.max_seq_length, or spread the teacher "
                "over more ranks (model.tensor_model_parallel_size, "
                "model.pipeline_model_parallel_size, model.context_parallel_size)"
            )
        if self.groups.device.type == "cuda":
            torch.cuda.empty_cache()
        self.max_tokens = tokens // 2
        log.error(  # a warning would show on rank 0 only
            "out of memory with %d tokens in a batch; from here on data.max_tokens_per_batch is %d",
            tokens,
            self.max_tokens,
        )

    @torch.inference_mode()
    def _batch(self, result: Pass, numbers: list[int]) -> None:
        examples = [result.examples[number] for number in numbers]
        self.step(
            "batch of %d tokens, examples %s",
            sum(e.num_tokens for e in examples),
            [e.index for e in examples],
        )
        if self.packed:
            batch = pack(examples, self.pad_id, self.multiple_of)
        else:
            # A lane without examples computes filler: its experts serve the other lanes.
            batch = collate(examples or [None], self.pad_id, self.multiple_of)
        hidden = run_batch(self.model, batch, self.groups)
        result.batches.append(
            None if hidden is None else self._score(examples, numbers, batch, hidden)
        )
        result.computed_tokens += batch.tokens_BS.numel() if examples else 0

    def _score(
        self,
        examples: Sequence[Example],
        numbers: list[int],
        batch: Batch,
        hidden: torch.Tensor,
    ) -> BatchResult:
        local_N, positions_N = loss_positions(batch, self.groups, self.everywhere)
        hidden_NH = hidden_at(
            hidden, to_device(local_N, hidden.device), len(batch.tokens_BS), self.model
        )
        weight_vH = output_weight(self.model)
        found = topk_rows(
            hidden_NH,
            weight_vH,
            to_device(batch.labels_BS.flatten()[positions_N], hidden.device),
            VocabShard.of(len(weight_vH), self.vocab_size, self.groups.tensor),
            top_k=self.top_k,
            kept=self.cache.kept,
            temperatures=self.temperatures,
            uniforms_NU=self._uniforms(examples, batch, positions_N)
            if self.cache.tail_samples
            else None,
        )
        targets = replace(found.map(_to_host), positions_P=positions_N)
        ready = None
        if hidden.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        starts = _starts(batch)[: len(examples)]
        return BatchResult(numbers, starts, targets, ready)

    def _whole(self, result: BatchResult | None) -> TeacherRows[np.ndarray] | None:
        """Return the targets of a whole batch on the writer, None elsewhere.

        Under context parallelism the writer gathers the parts of all ranks.
        """
        groups = self.groups
        mine = None
        if result is not None and groups.tensor_rank == 0:
            if result.ready is not None:
                result.ready.synchronize()
            mine = result.targets.map(torch.Tensor.numpy)
        if groups.context_size == 1:
            return mine
        gathered: list[Any] | None = (
            [None] * len(groups.replica_ranks) if groups.is_writer else None
        )
        dist.gather_object(mine, gathered, dst=groups.writer_rank, group=groups.replica)
        if gathered is None:
            return None
        whole = join_rows([part for part in gathered if part is not None])
        return whole.at(whole.positions_P.argsort())

    def _uniforms(
        self, examples: Sequence[Example], batch: Batch, positions_N: torch.Tensor
    ) -> torch.Tensor:
        """Return random numbers that depend on seed, example and position only."""
        uniforms_AU = np.zeros((batch.tokens_BS.numel(), self.cache.tail_samples + 1))
        for example, start in zip(examples, _starts(batch), strict=False):
            length = example.num_tokens
            uniforms_AU[start : start + length] = tail_uniforms(
                self.cache.seed, example.index, length, self.cache.tail_samples
            )
        return to_device(torch.from_numpy(uniforms_AU)[positions_N], self.groups.device)


def _check_finite(example: Example, targets: TeacherRows[np.ndarray]) -> None:
    finite_P = np.isfinite(targets.log_sum_exp_logits_P)
    if not finite_P.all():
        raise TeacherError(
            f"example {example.index}: the teacher's logits at position "
            f"{targets.positions_P[~finite_P][0]} are not finite; try trainer.precision=32, and check "
            "the checkpoint"
        )


def _starts(batch: Batch) -> list[int]:
    """Return the index of each example's first token in the flat batch, b * S + s."""
    if batch.cu_seqlens is not None:
        return batch.cu_seqlens[:-1].tolist()
    num_rows, length = batch.tokens_BS.shape
    return [row * length for row in range(num_rows)]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start a copy to the host, which ends with the work queued on the device so far."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
        tensor, non_blocking=True
    )
