"""The teacher on this rank: from examples to cached rows.

Shape legend: N positions with targets in a batch, S positions and P target positions of one
example, K kept logits, T temperatures, M tail samples, U = M + 1 random numbers.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from nemo_kd.batch import (
    Batch,
    CachedExample,
    Example,
    TeacherRows,
    join_rows,
    to_device,
)
from nemo_kd.config import ConfigError, UserInputError
from nemo_kd.config.shared import FP8_MULTIPLE, length_multiple
from nemo_kd.data.batches import collate, form_batches, pack
from nemo_kd.data.tokenizer import padding_id
from nemo_kd.mcore.architecture import ForwardFlops
from nemo_kd.mcore.kernels import Kernels, Machine, startup_facts
from nemo_kd.mcore.model import (
    hidden_at,
    output_weight,
)
from nemo_kd.mcore.schedule import loss_positions, run_batch
from nemo_kd.ops.selection import most_uncertain
from nemo_kd.ops.tail_sampling import tail_uniforms
from nemo_kd.ops.topk import topk_rows
from nemo_kd.ops.vocab import VocabShard

if TYPE_CHECKING:
    from nemo_kd.teacher.job import Job, Run

log = logging.getLogger(__name__)

SCALING_EXAMPLES = 64
SCALING_PASSES = 3

BatchResult = tuple[list[Example], Sequence[int], TeacherRows[torch.Tensor]]
"""(examples; index of the first token of each, and of filler, in the flat batch, b * S + s;
targets, whose positions are indices in the flat batch, with context parallelism this rank's)."""


@dataclass
class Pass:
    """Examples given to `Teacher.start`, with the results of their batches.

    Attributes:
        batches: None for a batch whose result is on other ranks.
        computed_tokens: with padding.
        ready: when it has occurred the results are on the host; None without a GPU.
    """

    examples: Sequence[Example]
    batches: list[BatchResult | None] = field(default_factory=list)
    computed_tokens: int = 0
    ready: torch.cuda.Event | None = None


class Teacher:
    """The teacher's weights on this rank.

    Args:
        step: called before every batch with its description.
    """

    def __init__(self, run: Run, step: Callable[[str], None] = lambda _: None) -> None:
        config = run.config
        groups = run.groups
        architecture = run.pretrained.architecture
        self.config = config
        self.groups = groups
        self.pad_id = padding_id(run.tokenizer, architecture.vocab_size)
        self.step = step
        self.max_examples = config.model.micro_batch_size
        self.max_tokens = config.max_tokens_per_batch
        self.packed = config.data.packing and groups.context_size == 1
        rows = FP8_MULTIPLE if config.model.fp8 else 1
        self.multiple_of = length_multiple(config.model, rows)
        self.vocab_size = architecture.vocab_size
        self.flops = ForwardFlops(architecture)
        kernels = Kernels(Machine.here(), config.model, config.trainer.precision)
        self.model = kernels.build_for_inference(architecture)
        run.pretrained.load_weights(self.model, groups)
        self.model.eval()
        if config.model.fp8 == "delayed":
            self._fix_scales(run.jobs)
        log.info(startup_facts(kernels, groups))

    def start(
        self, examples: Sequence[Example], mode: Any = torch.inference_mode
    ) -> Pass:
        """Compute the examples batch by batch; all ranks of a replica call it with the same ones.

        On a GPU it returns before the results arrive. If a batch exceeds the GPU's memory and the
        replica is a single rank, the limit on a batch is halved from there on.

        Raises:
            UserInputError: an example alone does not fit, or a batch that other ranks share.
        """
        result = Pass(examples)
        pending = self._batches(examples)
        if self.groups.lockstep_lanes > 1:
            box = torch.tensor(len(pending))
            dist.all_reduce(box, op=ReduceOp.MAX, group=self.groups.lockstep)
            pending += [[]] * (int(box) - len(pending))
        while pending:
            with mode():
                fits = self._fits(result, pending[0])
            if fits:
                del pending[0]
                continue
            tokens = sum(example.num_tokens for example in pending[0])
            torch.cuda.empty_cache()
            self.max_tokens = tokens // 2
            log.error(  # a warning would show on rank 0 only
                "out of memory with %d tokens in a batch; from here on data.max_tokens_per_batch "
                "is %d",
                tokens,
                self.max_tokens,
            )
            left = sorted(itertools.chain(*pending), key=lambda example: example.index)
            pending = self._batches(left)
        if self.groups.device.type == "cuda":
            result.ready = torch.cuda.Event()
            result.ready.record()
        return result

    def finish(self, started: Pass) -> list[CachedExample]:
        """Return the rows of a pass, in order; [] on ranks that do not write.

        Raises:
            UserInputError: the teacher's logits are not finite.
        """
        if started.ready is not None:
            started.ready.synchronize()
        rows: dict[int, CachedExample] = {}  # by the example's id()
        for result in started.batches:
            whole = self._whole(result)
            if result is None or whole is None:
                continue
            examples, starts, _ = result
            for example, start in zip(examples, starts, strict=False):
                first, last = np.searchsorted(
                    whole.positions_P, [start, start + example.num_tokens]
                )
                targets = whole.at(slice(first, last))
                targets = replace(targets, positions_P=targets.positions_P - start)
                finite_P = np.isfinite(targets.log_sum_exp_logits_P)
                if not finite_P.all():
                    raise UserInputError(
                        f"example {example.index}: the teacher's logits at position "
                        f"{targets.positions_P[~finite_P][0]} are not finite; try "
                        "trainer.precision=32, and check the checkpoint"
                    )
                rows[id(example)] = self._selected(CachedExample(example, targets))
        return [rows[id(one)] for one in started.examples if id(one) in rows]

    def _selected(self, row: CachedExample) -> CachedExample:
        """Return the row with the positions that `cache.select` selects."""
        selection = self.config.cache.selection
        if selection is None:
            return row
        count = selection.count(row.example.num_loss_tokens)
        is_kept_P = most_uncertain(row.teacher.map(torch.from_numpy), count).numpy()
        return CachedExample(row.example, row.teacher.at(is_kept_P), is_selected=True)

    def counts(self, computed: Pass) -> dict[str, float]:
        """Return what `Progress` counts of a pass."""
        examples = computed.examples
        tokens = sum(example.num_tokens for example in examples)
        return {
            "examples": len(examples),
            "tokens": tokens,
            "padding_tokens": computed.computed_tokens - tokens,
            "flops": sum(
                self.flops.example(one.num_tokens, one.num_loss_tokens)
                for one in examples
            ),
        }

    def _batches(self, examples: Sequence[Example]) -> list[list[Example]]:
        lengths = [example.num_tokens for example in examples]
        batches = form_batches(
            lengths, self.max_examples, self.max_tokens, self.packed, self.multiple_of
        )
        return [[examples[place] for place in batch] for batch in batches]

    def _fits(self, result: Pass, examples: list[Example]) -> bool:
        """Compute a batch; return False if it exceeds the GPU's memory and can be split."""
        num_tokens = sum(example.num_tokens for example in examples)
        indices = [example.index for example in examples]
        what = f"batch of {num_tokens} tokens, examples {indices}"
        self.step(what)
        starts: Sequence[int]
        if self.packed:
            batch = pack(examples, self.pad_id, self.multiple_of)
            assert batch.cu_seqlens is not None
            starts = batch.cu_seqlens.tolist()
        else:
            # A lane without examples computes filler: its experts serve the other lanes.
            batch = collate(examples or [None], self.pad_id, self.multiple_of)
            starts = range(0, batch.tokens_BS.numel(), batch.tokens_BS.shape[1])
        scored = None
        try:
            hidden = run_batch(self.model, batch, self.groups)
            if hidden is not None:
                targets = self._score(examples, starts, batch, hidden)
                scored = (examples, starts, targets)
        except torch.OutOfMemoryError as error:
            # With several ranks the others may be in a collective that this one left.
            if len(examples) > 1 and dist.get_world_size(self.groups.lockstep) == 1:
                return False
            raise UserInputError(
                f"data.max_tokens_per_batch: rank {dist.get_rank()} is out of memory with a {what} "
                f"({error}); give a number below {self.max_tokens}, lower model.max_seq_length, or "
                "spread the teacher over more ranks (model.tensor_model_parallel_size, "
                "model.pipeline_model_parallel_size, model.context_parallel_size)"
            ) from error
        result.batches.append(scored)
        result.computed_tokens += batch.tokens_BS.numel() if examples else 0
        return True

    def _fix_scales(self, jobs: Sequence[Job]) -> None:
        """Compute the first examples to find the scales of delayed FP8 scaling.

        Transformer Engine updates them where gradients are enabled, which is nowhere else. The
        first pass runs without scales. All ranks compute the same examples, and so does a later
        run that continues the cache.

        Raises:
            ConfigError: there is no dataset.
        """
        if not jobs:
            raise ConfigError("model.fp8: delayed needs a dataset; use current")
        dataset = jobs[0].dataset
        records = map(dataset.__getitem__, range(len(dataset)))
        found = (record for record in records if isinstance(record, Example))
        examples = list(itertools.islice(found, SCALING_EXAMPLES))
        self.model.requires_grad_(False)
        for _ in range(SCALING_PASSES):
            self.model.set_is_first_microbatch()  # quantize the weights again
            self.start(examples, torch.enable_grad)
        self.model.set_is_first_microbatch()

    def _score(
        self,
        examples: Sequence[Example],
        starts: Sequence[int],
        batch: Batch,
        hidden: torch.Tensor,
    ) -> TeacherRows[torch.Tensor]:
        cache = self.config.cache
        everywhere = cache.codec == "json" or cache.positions == "all"
        local_N, positions_N = loss_positions(batch, self.groups, everywhere)
        hidden_NH = hidden_at(
            hidden, to_device(local_N, hidden.device), len(batch.tokens_BS), self.model
        )
        uniforms_NU = None
        if cache.tail_samples:
            # They depend on seed, example and position only.
            uniforms_AU = np.zeros((batch.tokens_BS.numel(), cache.tail_samples + 1))
            for example, start in zip(examples, starts, strict=False):
                uniforms_AU[start : start + example.num_tokens] = tail_uniforms(
                    cache.seed, example.index, example.num_tokens, cache.tail_samples
                )
            uniforms_NU = to_device(
                torch.from_numpy(uniforms_AU)[positions_N], hidden.device
            )
        weight_vH = output_weight(self.model)
        found = topk_rows(
            hidden_NH,
            weight_vH,
            to_device(batch.labels_BS.flatten()[positions_N], hidden.device),
            VocabShard.of(len(weight_vH), self.vocab_size, self.groups.tensor),
            top_k=self.config.top_k,
            kept=cache.kept,
            temperatures=(1.0, *cache.temperatures),
            uniforms_NU=uniforms_NU,
        )
        return replace(found.map(_to_host), positions_P=positions_N)

    def _whole(self, result: BatchResult | None) -> TeacherRows[np.ndarray] | None:
        """Return the targets of a whole batch on the writer, None elsewhere.

        Under context parallelism the writer gathers the parts of all ranks.
        """
        groups = self.groups
        mine = None
        if result is not None and groups.tensor_rank == 0:
            mine = result[2].map(torch.Tensor.numpy)
        if groups.context_size == 1:
            return mine
        gathered: list[Any] | None = (
            [None] * len(groups.replica_ranks) if groups.is_writer else None
        )
        dist.gather_object(
            mine, gathered, dst=groups.writer_rank, group=groups.replica
        )
        if gathered is None:
            return None
        whole = join_rows([part for part in gathered if part is not None])
        return whole.at(whole.positions_P.argsort())


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start a copy to the host, which ends with the work queued on the device so far."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
        tensor, non_blocking=True
    )
