"""Run Megatron Core on a machine without CUDA.

Megatron reads the current CUDA device, allocates with `device="cuda"` and compares
`tensor.type()` with the names of CUDA types. Its modules see a `torch` here that uses the CPU
instead. Where they call methods of tensors, the call runs inside `cuda_methods_on_cpu`. torch
itself and its users outside Megatron stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
PRIMITIVE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables of oneDNN and of torch's wrapper around it, read at their first use."""
PRIMITIVES_KEPT = 128
"""In bf16 every new length compiles kernels of 0.7 MB; both caches keep 1,024 by default.

A student's step needs some tens.
"""
_FACTORIES = (
    "tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
)
_MODULES_WITH_CUDA = (
    "distributed",
    "dist_checkpointing.strategies.torch",
    "models.gpt.gpt_layer_specs",
    "optimizer",
    "pipeline_parallel.schedules",
)
"""They import every module that allocates. A module imported later would keep the real torch."""


def install_cpu_support() -> None:
    """Redirect Megatron's CUDA requests to the CPU, unless CUDA is available or that is done."""
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = (
            None  # 0.16.1 reads it unbound without Transformer Engine
        )
    if torch.cuda.is_available():
        return
    for variable in PRIMITIVE_CACHES:
        os.environ.setdefault(variable, str(PRIMITIVES_KEPT))
    for name in _MODULES_WITH_CUDA:
        importlib.import_module(f"megatron.core.{name}")
    torch_on_cpu = _TorchOnCpu("torch")
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
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
    if not hasattr(rotary.get_pos_emb_on_this_cp_rank, "__wrapped__"):
        rotary.get_pos_emb_on_this_cp_rank = _redirected(
            rotary.get_pos_emb_on_this_cp_rank
        )


def cuda_methods_on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Return a context where `tensor.cuda()` is the tensor and `tensor.type()` names a CUDA type.

    It covers this thread's calls only, and does nothing where CUDA is available.
    """
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaMethodsOnCpu()


class _CudaMethodsOnCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _redirected(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _CudaMethodsOnCpu():
            return function(*args, **kwargs)

    return wrapped


class _Stream:
    """A CUDA stream or event where every operation is complete when it returns."""

    def record_event(self) -> _Stream:
        return self

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


class _CudaOnCpu(types.ModuleType):
    """torch.cuda with one device, the CPU. Other names are torch.cuda's."""

    # Megatron sorts tensors by isinstance checks against these.
    FloatTensor = torch.FloatTensor
    HalfTensor = torch.HalfTensor
    BFloat16Tensor = torch.BFloat16Tensor
    Stream = _Stream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @property
    def random(self) -> _CudaOnCpu:
        return self

    def current_device(self) -> torch.device:
        return _CPU

    def current_stream(self) -> _Stream:
        return _Stream()

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    max_memory_allocated = memory_allocated


class _DistributedOnCpu(types.ModuleType):
    """torch.distributed with collectives over tensors of different sizes.

    NCCL takes them, gloo does not. Tensor-parallel ranks exchange such tensors for experts under
    sequence parallelism.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    def all_gather(
        self, parts: list[torch.Tensor], part: torch.Tensor, group: Any = None
    ) -> Any:
        if len({part.shape for part in parts}) == 1:
            return torch.distributed.all_gather(parts, part, group)
        padded = part.new_zeros(max(len(part) for part in parts), *part.shape[1:])
        padded[: len(part)] = part
        received = [torch.empty_like(padded) for _ in parts]
        torch.distributed.all_gather(received, padded, group)
        for target, source in zip(parts, received, strict=True):
            target.copy_(source[: len(target)])
        return None

    def reduce_scatter(
        self, output: torch.Tensor, parts: list[torch.Tensor], group: Any = None
    ) -> Any:
        if len({part.shape for part in parts}) == 1:
            return torch.distributed.reduce_scatter(output, parts, group=group)
        total = torch.cat(parts)
        torch.distributed.all_reduce(total, group=group)
        sizes = [len(part) for part in parts]
        output.copy_(total.split(sizes)[torch.distributed.get_rank(group)])
        return None


class _TorchOnCpu(types.ModuleType):
    """torch whose tensor factories replace a GPU by the CPU. Other names are torch's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.cuda = _CudaOnCpu("torch.cuda")
        self.distributed = _DistributedOnCpu("torch.distributed")
        for factory in _FACTORIES:
            setattr(self, factory, _on_cpu(getattr(torch, factory)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.device(kwargs.get("device") or _CPU).type == "cuda":
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _set_rng_state(
    state: torch.Tensor, device: Any = None, graph_safe: bool = False
) -> None:
    torch.set_rng_state(state)


def _move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Convert the dispatcher's token counts to numpy; Megatron converts those of a GPU only."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
