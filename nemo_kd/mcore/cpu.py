"""Makes Megatron Core run on a machine without CUDA.

Megatron asks for the current CUDA device, allocates with `device="cuda"` and asserts on type names such as
`torch.cuda.FloatTensor`. Here Megatron's modules, and only they, see a torch that answers such requests with the CPU.
Nothing outside Megatron changes, and no torch operation gets slower.
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

_CPU = torch.device("cpu")
PRIMITIVE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables of oneDNN and of torch's wrapper around it, read when they are first used."""
PRIMITIVES_KEPT = 128
"""In bf16 every new length compiles kernels, 0.7 MB each; by default 1,024 are kept of every kind, in two caches. A step of
a student needs some tens."""
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


def install_cpu_support() -> None:
    """Redirects Megatron's CUDA requests to the CPU; does nothing where CUDA is available or when called again."""
    if torch.cuda.is_available():
        return
    for variable in PRIMITIVE_CACHES:
        os.environ.setdefault(variable, str(PRIMITIVES_KEPT))
    # What is imported later would keep the real torch: load all that allocates first.
    for name in (
        "distributed",
        "dist_checkpointing",
        "dist_checkpointing.exchange_utils",
        "dist_checkpointing.strategies.async_utils",
        "dist_checkpointing.strategies.filesystem_async",
        "dist_checkpointing.strategies.fully_parallel",
        "dist_checkpointing.strategies.torch",
        "models.gpt.gpt_layer_specs",
        "optimizer",
        "pipeline_parallel.schedules",
    ):
        importlib.import_module(f"megatron.core.{name}")
    torch_on_cpu = _TorchOnCpu("torch")
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = torch_on_cpu  # type: ignore[attr-defined]
    _redirect_random_state()
    _redirect_tensor_methods()


class _CudaOnCpu(types.ModuleType):
    """torch.cuda with one device, the CPU; what is not listed is torch.cuda's own."""

    # isinstance checks against them sort a tensor by its dtype.
    FloatTensor, HalfTensor, BFloat16Tensor = (
        torch.FloatTensor,
        torch.HalfTensor,
        torch.BFloat16Tensor,
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return _CPU

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    max_memory_allocated = memory_allocated


class _TorchOnCpu(types.ModuleType):
    """torch whose tensor factories put on the CPU what was meant for a GPU; all else is torch's own."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.cuda = _CudaOnCpu("torch.cuda")
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


def _redirect_random_state() -> None:
    """Megatron keeps one random state a tensor-parallel rank; without CUDA it is the CPU generator's."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_state(
        device: Any = None, clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state  # type: ignore[attr-defined]


def _redirect_tensor_methods() -> None:
    """For callers inside Megatron: `tensor.cuda()` is the tensor, and `tensor.type()` has the name that it asserts."""
    if getattr(torch.Tensor.type, "for_megatron", False):
        return
    tensor_type, tensor_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        if isinstance(result, str) and _caller_is_megatron():
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _caller_is_megatron() else tensor_cuda(self, *args, **kwargs)

    type_.for_megatron = True  # type: ignore[attr-defined]
    torch.Tensor.type, torch.Tensor.cuda = type_, cuda  # type: ignore[method-assign,assignment]


def _caller_is_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")
