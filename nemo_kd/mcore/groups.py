"""Divide the ranks into Megatron's process groups, seed, save and set random generators, and let
Megatron run without a GPU."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from torch.overrides import TorchFunctionMode

from nemo_kd.config.shared import PARALLEL_SIZES, ParallelConfig

RANK_ORDER = "tp-cp-ep-dp-pp"
"""Tensor-parallel ranks are adjacent, pipeline stages farthest apart."""


@dataclass(frozen=True)
class ProcessGroups:
    """Place of this process. A replica is the tensor x pipeline x context ranks of one model copy.

    Attributes:
        tensor: ranks that share this rank's layers.
        pipeline: this rank and those at its place in the other stages, first stage to last.
        context: ranks that hold the other positions of this rank's sequences.
        data: ranks with the same shard in different replicas, which share no sequence.
        replica: all ranks of this rank's replica; always gloo, for Python objects.
        replica_ranks: their global ranks.
        lockstep: all ranks that must run every forward pass together, because one may hold experts
            that another's tokens need: several replicas with expert parallelism across them, else
            one; gloo.
        lockstep_lanes: number of replicas, hence of data-parallel ranks, in `lockstep`.
        lane: number of this rank's replica among them.
        writer_rank: global rank of the replica's writer: last stage, tensor and context rank 0.
        device: this process's GPU, or the CPU.
    """

    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    replica: dist.ProcessGroup
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    expert_rank: int
    data_rank: int
    data_size: int
    replica_ranks: tuple[int, ...]
    lockstep: dist.ProcessGroup
    lockstep_lanes: int
    lane: int
    writer_rank: int
    device: torch.device

    def layout(self) -> dict[str, int]:
        """Return the sizes of the groups; with equal sizes a rank has the same place."""
        return {
            "tensor": self.tensor_size,
            "pipeline": self.pipeline_size,
            "context": self.context_size,
            "data": self.data_size,
            "replicas in lockstep": self.lockstep_lanes,
        }

    @property
    def is_first_stage(self) -> bool:
        """True if this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True if this rank holds its part of the output layer."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_writer(self) -> bool:
        """True if this rank writes for its replica."""
        return dist.get_rank() == self.writer_rank


def initialize_model_parallel(parallel: ParallelConfig, seed: int) -> ProcessGroups:
    """Divide the ranks into groups and seed Megatron's random generators; every rank calls it.

    Groups of the same sizes are kept, others replaced. Needs a process group (`join_ranks`).

    Raises:
        ConfigError: the sizes do not divide the number of ranks.
    """
    install_cpu_support()
    parallel.data_parallel_size(dist.get_world_size())
    sizes = tuple(getattr(parallel, name) for name in PARALLEL_SIZES)
    groups = _process_groups(dist.group.WORLD, sizes, parallel.replicas_in_lockstep)
    chunks = parallel.chunks_per_stage
    parallel_state.set_virtual_pipeline_model_parallel_world_size(
        chunks if chunks > 1 else None
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return groups


@functools.lru_cache(maxsize=1)
def _process_groups(
    world: dist.ProcessGroup, sizes: tuple[int, ...], lanes: int
) -> ProcessGroups:
    """Replace all groups but the world; `lanes` replicas run in lockstep."""
    if parallel_state.model_parallel_is_initialized():
        _destroy_groups()
    parallel_state.initialize_model_parallel(
        **dict(zip(PARALLEL_SIZES, sizes, strict=True)), order=RANK_ORDER
    )
    tensor_size, pipeline_size, context_size, _ = sizes
    data = parallel_state.get_data_parallel_group()
    data_rank = data.rank()
    # A row a replica, in the order of `RANK_ORDER`.
    ranks = torch.arange(world.size()).view(
        pipeline_size, -1, context_size, tensor_size
    )
    replicas = ranks.transpose(0, 1).flatten(1)
    replica = _gloo_group(replicas, data_rank)
    lockstep = replica
    if lanes > 1:
        lockstep = _gloo_group(
            replicas.unflatten(0, (-1, lanes)).flatten(1), data_rank // lanes
        )
    device = _CPU
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return ProcessGroups(
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=data,
        replica=replica,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor_size,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=pipeline_size,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=context_size,
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        data_rank=data_rank,
        data_size=data.size(),
        replica_ranks=tuple(replicas[data_rank].tolist()),
        lockstep=lockstep,
        lockstep_lanes=lanes,
        lane=data_rank % lanes,
        writer_rank=int(ranks[-1, data_rank, 0, 0]),
        device=device,
    )


def _destroy_groups() -> None:
    """End all groups but the world: a gloo group wakes its thread a hundred times a second."""
    parallel_state.destroy_model_parallel()
    gc.collect()  # a model that is in a cycle keeps its groups
    # torch lists its groups nowhere else, and Megatron forgets them without ending them.
    for group in list(dist.distributed_c10d._world.pg_map):  # noqa: SLF001
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _gloo_group(members: torch.Tensor, mine: int) -> dist.ProcessGroup:
    """Make a gloo group for each row of global ranks, and return one of them."""
    return [dist.new_group(ranks, backend="gloo") for ranks in members.tolist()][mine]


def sharded_random_state() -> ShardedObject:
    """Return the state of this rank's random generators; it loads only into as many ranks."""
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        "random_state", state, (dist.get_world_size(),), (dist.get_rank(),)
    )


def set_random_state(state: dict[str, Any]) -> None:
    """Set every generator to the content of `sharded_random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])


_CPU = torch.device("cpu")
PRIMITIVE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables of oneDNN and of torch's wrapper around it, read at their first use."""
PRIMITIVES_KEPT = 128
"""In bf16 every new length compiles kernels of 0.7 MB; both caches keep 1,024 by default.

A student's step needs some tens.
"""
_FACTORIES = ("tensor", "zeros", "ones")
"""Functions that Megatron calls with `device="cuda"` or in page-locked memory."""
_MODULES_WITH_CUDA = (
    "distributed",
    "dist_checkpointing.strategies.torch",
    "models.gpt.gpt_layer_specs",
    "optimizer",
    "pipeline_parallel.schedules",
)
"""They import every module that allocates. A module imported later would keep the real torch."""


@functools.cache
def install_cpu_support() -> None:
    """Redirect Megatron's CUDA requests to the CPU, unless CUDA is available."""
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        # 0.16.1 reads it unbound without Transformer Engine.
        moe_utils.te_general_gemm = None
    if torch.cuda.is_available():
        return
    for variable in PRIMITIVE_CACHES:
        os.environ.setdefault(variable, str(PRIMITIVES_KEPT))
    for name in _MODULES_WITH_CUDA:
        importlib.import_module(f"megatron.core.{name}")
    torch_on_cpu = _torch_on_cpu()
    for name, module in list(sys.modules.items()):
        if (
            name.startswith("megatron.core")
            and getattr(module, "torch", None) is torch
        ):
            module.torch = torch_on_cpu  # type: ignore[attr-defined]
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    # It sets a generator through CUDA's queue of delayed calls, which no public name redirects.
    random._set_cuda_rng_state = _set_rng_state  # noqa: SLF001
    dispatcher: Any = importlib.import_module(
        "megatron.core.transformer.moe.token_dispatcher"
    )
    dispatcher.maybe_move_tensor_to_cpu = _move_to_cpu
    rotary: Any = importlib.import_module(
        "megatron.core.models.common.embeddings.rotary_pos_embedding"
    )
    rotary.get_pos_emb_on_this_cp_rank = cuda_methods_on_cpu()(
        rotary.get_pos_emb_on_this_cp_rank
    )
    _use_torch_adam()


def _use_torch_adam() -> None:
    """Step with torch's Adam: Transformer Engine's and Apex's, where installed, need a GPU."""
    optimizer: Any = importlib.import_module("megatron.core.optimizer")
    utils: Any = importlib.import_module("megatron.core.utils")
    optimizer.USING_PYTORCH_OPTIMIZER = True
    optimizer.Adam = torch.optim.AdamW
    optimizer.distrib_optimizer.Adam = torch.optim.Adam
    for module in (optimizer.optimizer, optimizer.clip_grads):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    optimizer.clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm


@contextlib.contextmanager
def cuda_methods_on_cpu() -> Iterator[None]:
    """Let `tensor.cuda()` return the tensor and `tensor.type()` name a CUDA type.

    It covers this thread's calls only, and does nothing where CUDA is available.
    """
    with (
        contextlib.nullcontext() if torch.cuda.is_available() else _CudaMethodsOnCpu()
    ):
        yield


class _CudaMethodsOnCpu(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _Redirected(types.ModuleType):
    """A module of which some names are replaced."""

    def __init__(self, module: types.ModuleType, **names: Any) -> None:
        super().__init__(module.__name__)
        vars(self).update(names, module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _torch_on_cpu() -> _Redirected:
    """Return torch with one device, the CPU."""
    cuda: Any = _Redirected(
        torch.cuda,
        # Megatron sorts tensors by isinstance checks against these.
        FloatTensor=torch.FloatTensor,
        HalfTensor=torch.HalfTensor,
        BFloat16Tensor=torch.BFloat16Tensor,
        Stream=_Stream,
        current_stream=_Stream,
        stream=lambda _: contextlib.nullcontext(),
        synchronize=lambda: None,
        current_device=lambda: _CPU,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda **_: torch.get_rng_state(),
    )
    cuda.random = cuda
    distributed = _Redirected(
        torch.distributed, all_gather=_all_gather, reduce_scatter=_reduce_scatter
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _Redirected(torch, cuda=cuda, distributed=distributed, **factories)


class _Stream:
    """A CUDA stream or event where every operation is complete when it returns."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self


def _all_gather(
    parts: list[torch.Tensor], part: torch.Tensor, group: dist.ProcessGroup
) -> None:
    """Gather tensors of different sizes, which NCCL takes and gloo does not.

    Tensor-parallel ranks exchange such tensors for experts under sequence parallelism.
    """
    parts[group.rank()].copy_(part)
    for rank, received in enumerate(parts):
        dist.broadcast(received, group=group, group_src=rank)


def _reduce_scatter(
    output: torch.Tensor, parts: list[torch.Tensor], group: dist.ProcessGroup
) -> None:
    total = torch.cat(parts)
    dist.all_reduce(total, group=group)
    output.copy_(total.split([len(part) for part in parts])[group.rank()])


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapped


def _set_rng_state(
    state: torch.Tensor, device: Any = None, graph_safe: bool = False
) -> None:
    torch.set_rng_state(state)


def _move_to_cpu(
    tensor: Any, as_numpy: bool = False, record_stream: bool = False
) -> Any:
    """Convert the dispatcher's token counts to numpy; Megatron converts those of a GPU only."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
