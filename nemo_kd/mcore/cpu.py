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
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

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
