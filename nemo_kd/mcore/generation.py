"""Generate responses token by token, with cached keys and values, on the ranks of one replica.

A loop over Megatron's static cache, because Megatron's engines assert flash-attn or draw from a
generator that a whole batch shares; this runs on the CPU too, and a sample depends on its own
prompt only. Prompts of different lengths share a batch without padding: a step feeds a row its
prompt's next token where it has one left, else the token chosen in the step before.

Shape legend: B rows, S positions, V real vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.inference.contexts import StaticInferenceContext

from nemo_kd.config import UserInputError
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.model import chunks, project, unwrapped, without_output_layer
from nemo_kd.mcore.optimizer import gather_weights
from nemo_kd.mcore.schedule import run_stages

SEQUENCE_PARALLEL = (
    "sequence_parallel",
    "scatter_to_sequence_parallel",
    "reduce_scatter_embeddings",
)
"""Attributes of modules and of their configuration: a single position cannot be split."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
        max_new_tokens: most tokens of a response, its stop token included.
        stop_ids: tokens that end a response.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: sample among the fewest tokens that together reach this probability.
        seed: with a prompt's number and the step it determines the random number of a token.
    """

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def random(self, number: int) -> np.random.Generator:
        """Return the random numbers of a prompt's tokens, one per step."""
        return np.random.Generator(np.random.Philox(key=[self.seed, number]))


@dataclass(frozen=True)
class Response:
    """Generated tokens of one prompt.

    Attributes:
        token_ids: without the stop token.
        entropy_nats: of the model's distribution at temperature 1, per generated token, the stop
            token included.
        stopped: ended by a stop token; False where `max_new_tokens` or the model's last position
            cut it.
    """

    token_ids: list[int]
    entropy_nats: list[float]
    stopped: bool


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    groups: ProcessGroups,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    vocab_size: int,
    max_batch: int,
    numbers: Sequence[int],
    on_step: Callable[[], None],
) -> list[Response]:
    """Return a response per prompt, the same on all ranks of the replica, which all call it.

    Context parallelism is not supported: `check_generation_layout` refuses it before long work.
    Replicas in lockstep (expert parallelism) call it together, each with its own prompts or none.
    The model is left as it was: mode, weights, gradients and random generators.

    Args:
        model: as built, or wrapped for training.
        prompts: `check_prompts` has accepted them.
        vocab_size: real vocabulary; padding columns are never chosen.
        max_batch: most prompts that are decoded together, which bounds the memory for the cache.
        numbers: a number per prompt that its samples depend on.
        on_step: called before each step, for example to show a watchdog progress.

    Raises:
        UserInputError: the model's logits are not finite.
    """
    assert groups.context_size == 1
    rows = [
        _Row(
            list(prompt),
            min(sampling.max_new_tokens, num_positions(model) - len(prompt)),
            sampling.random(number),
        )
        for number, prompt in zip(numbers, prompts, strict=True)
    ]
    decoder = _Decoder(model, groups, sampling, vocab_size, on_step)
    with _evaluation_mode(model):
        for batch in _batches(rows, max_batch, sampling.max_new_tokens):
            decoder.decode(batch)
        while _any_lane_is_active(groups, False):
            decoder.forward([[0]], StaticInferenceContext(1, 1))
    check_finite(rows, numbers)  # at the end, for replicas that step together
    return [Response(row.token_ids, row.entropy_nats, row.stopped) for row in rows]


def num_positions(model: torch.nn.Module) -> int:
    """Return the positions that the model was built for."""
    return int(unwrapped(chunks(model)[0]).max_sequence_length)


def check_prompts(
    prompts: Sequence[Sequence[int]], names: Iterable[str], positions: int
) -> None:
    """Refuse prompts without a token or without room for a response.

    Raises:
        UserInputError: names the prompt.
    """
    for name, prompt in zip(names, prompts, strict=True):
        if not 0 < len(prompt) < positions:
            raise UserInputError(
                f"{name}: {len(prompt)} tokens, but a prompt of this model has 1 to "
                f"{positions - 1}, so that a response has a position; leave it out or change it"
            )


def check_finite(responses: Sequence[Response | _Row], numbers: Sequence[int]) -> None:
    """Refuse responses of a model whose logits are not finite.

    Raises:
        UserInputError: names the prompt's number.
    """
    for number, response in zip(numbers, responses, strict=True):
        if any(map(math.isnan, response.entropy_nats)):
            raise UserInputError(
                f"prompt {number}: the model's logits are not finite; try trainer.precision=32, and "
                "check the checkpoint"
            )


@dataclass
class _Row:
    """A prompt and its response so far; `max_new_tokens` is what its positions allow."""

    prompt: list[int]
    max_new_tokens: int
    random: np.random.Generator
    token_ids: list[int] = field(default_factory=list)
    entropy_nats: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def is_done(self) -> bool:
        return self.stopped or len(self.token_ids) == self.max_new_tokens

    def draw(self, position: int) -> float:
        """Return the random number of the token at a position; the prompt's take none."""
        return self.random.random() if position >= len(self.prompt) else 0.0

    def add(self, token: int, entropy: float, stop_ids: frozenset[int]) -> None:
        self.entropy_nats.append(entropy)
        self.stopped = token in stop_ids or math.isnan(entropy)
        if not self.stopped:
            self.token_ids.append(token)


def _batches(
    rows: Sequence[_Row], max_batch: int, max_new_tokens: int
) -> Iterator[list[_Row]]:
    """Yield batches of prompts of similar lengths, the longest first: memory lacks at once or never.

    A batch takes a step for every token that its longest prompt has more than its shortest. A
    second batch would take up to `max_new_tokens`, so it pays beyond that.
    """
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.prompt), reverse=True):
        if batch and (
            len(batch) == max_batch
            or len(batch[0].prompt) - len(row.prompt) > max_new_tokens
        ):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@dataclass
class _Decoder:
    """A model on this rank, and how to choose from its logits."""

    model: torch.nn.Module
    groups: ProcessGroups
    sampling: Sampling
    vocab_size: int
    on_step: Callable[[], None]

    def decode(self, rows: list[_Row]) -> None:
        """Generate until every row is done."""
        shortest = min(len(row.prompt) for row in rows)
        room = max(len(row.prompt) + row.max_new_tokens for row in rows)
        cache = StaticInferenceContext(len(rows), room)
        tokens = [row.prompt[:shortest] for row in rows]
        while rows:
            _any_lane_is_active(self.groups, True)
            logits_BV = self.forward(tokens, cache)
            position = cache.sequence_len_offset
            chosen, entropies = self._choose(logits_BV, rows, position)
            tokens = []
            for row, token, entropy in zip(rows, chosen, entropies, strict=True):
                if position < len(row.prompt):
                    tokens.append([row.prompt[position]])
                    continue
                if not row.is_done:
                    row.add(token, entropy, self.sampling.stop_ids)
                tokens.append([token])
            left = [place for place, row in enumerate(rows) if not row.is_done]
            if 2 * len(left) <= len(rows):  # each copy of the cache halves it
                rows = [rows[place] for place in left]
                tokens = [tokens[place] for place in left]
                _keep_rows(cache, left)

    def forward(
        self, tokens: list[list[int]], cache: StaticInferenceContext
    ) -> torch.Tensor | None:
        """Return the last position's logits [B, V], on the last stage; grow the cache."""
        self.on_step()
        tokens_BS = torch.tensor(tokens, device=self.groups.device)
        hidden_SBH = run_stages(
            self.model,
            self.groups,
            lambda stage: _hidden_states(stage, tokens_BS, cache),
        )
        cache.increment_sequence_len_offset(tokens_BS.shape[1])
        if hidden_SBH is None:
            return None
        last = chunks(self.model)[-1]
        logits_B1V = project(last, hidden_SBH[-1:], gather_output=True)
        return logits_B1V[:, 0, : self.vocab_size]

    def _choose(
        self, logits_BV: torch.Tensor | None, rows: list[_Row], position: int
    ) -> tuple[list[int], list[float]]:
        """Return a token per row and its entropy; the replica's writer decides."""
        groups = self.groups
        chosen_2B = torch.empty(2, len(rows), dtype=torch.float64)
        if groups.is_writer:
            assert logits_BV is not None
            uniforms_B = torch.tensor(
                [row.draw(position) for row in rows], dtype=torch.float64
            )
            ids_B, entropy_B = choose_tokens(
                logits_BV, self.sampling, uniforms_B.to(logits_BV.device)
            )
            chosen_2B = torch.stack([ids_B.double(), entropy_B]).cpu()
        if len(groups.replica_ranks) > 1:
            dist.broadcast(chosen_2B, groups.writer_rank, groups.replica)
        ids, entropies = chosen_2B.tolist()
        return [int(token) for token in ids], entropies


def _hidden_states(
    stage: torch.nn.Module, tokens_BS: torch.Tensor, cache: StaticInferenceContext
) -> torch.Tensor:
    """Return a stage's hidden states [S, B, H] of tokens that follow the cached ones."""
    start = cache.sequence_len_offset
    positions_S = torch.arange(
        start, start + tokens_BS.shape[1], device=tokens_BS.device
    )
    with without_output_layer(stage):
        return stage(
            tokens_BS,
            positions_S.expand_as(tokens_BS),
            None,
            inference_context=cache,
            runtime_gather_output=True,  # demanded, though without effect here
        )


def _keep_rows(cache: StaticInferenceContext, places: list[int]) -> None:
    memories = cache.key_value_memory_dict
    for layer, memory in memories.items():
        memories[layer] = tuple(part_SBgD[:, places] for part_SBgD in memory)


def choose_tokens(
    logits_BV: torch.Tensor, sampling: Sampling, uniforms_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (token ids [B], entropy in nats [B], float64) of rows of logits.

    The entropy is NaN where logits are NaN or +inf; the token means nothing there.

    Args:
        uniforms_B: random numbers in [0, 1), float64; unused by the greedy choice.
    """
    logits_BV = logits_BV.double()
    entropy_B = torch.special.entr(logits_BV.softmax(-1)).sum(-1)
    logits_BV = logits_BV.where(entropy_B[:, None].isfinite(), 0)
    if not sampling.temperature:
        return logits_BV.argmax(-1), entropy_B
    probabilities_BV = (logits_BV / sampling.temperature).softmax(-1)
    descending_BV = probabilities_BV.sort(descending=True).values
    reached_BV = descending_BV.cumsum(-1)
    last_B1 = torch.searchsorted(reached_BV, sampling.top_p * reached_BV[:, -1:])
    smallest_B1 = descending_BV.gather(-1, last_B1)
    kept_BV = probabilities_BV.where(probabilities_BV >= smallest_B1, 0)
    # In the order of ids: rounding in another layout may swap equally probable tokens.
    ends_BV = kept_BV.cumsum(-1)
    drawn_B1 = uniforms_B[:, None] * ends_BV[:, -1:]
    return torch.searchsorted(ends_BV, drawn_B1, right=True)[:, 0], entropy_B


def _any_lane_is_active(groups: ProcessGroups, is_active: bool) -> bool:
    """Return True if a replica in lockstep with this one takes a step; each calls it once a step."""
    if groups.lockstep_lanes == 1:
        return is_active
    active = torch.tensor(int(is_active))
    dist.all_reduce(active, dist.ReduceOp.MAX, group=groups.lockstep)
    return bool(active)


@contextlib.contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Set the model to evaluation without sequence parallelism, then back."""
    # Every replica waits here for its weights: one without prompts runs no module that does.
    gather_weights(
        part for part in chunks(model) if isinstance(part, DistributedDataParallel)
    )
    modes = [(module, module.training) for module in model.modules()]
    changed: list[tuple[Any, str]] = []
    try:
        for module, _ in modes:
            module.training = False
            for owner in (module, getattr(module, "config", None)):
                for name in SEQUENCE_PARALLEL:
                    if getattr(owner, name, False):
                        changed.append((owner, name))
                        setattr(owner, name, False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for owner, name in changed:
            setattr(owner, name, True)
