"""Megatron's optimizers behind torch's optimizer interface."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import TransformerConfig

from nemo_kd.config.optim import OptimConfig
from nemo_kd.mcore.groups import cuda_methods_on_cpu
from nemo_kd.mcore.kernels import Kernels
from nemo_kd.mcore.model import chunks

CHOSEN = ("initial_lr", "weight_decay", "betas", "eps")
"""Values of a parameter group that the configuration sets, not the checkpoint."""


def sharding_metadata() -> dict[str, Any]:
    """Return the layout of the optimizer in a checkpoint that loads at any parallel size.

    Returns a new dict each time: Megatron writes its process groups into it.
    """
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        # One rank of all replicas gathers the whole state, not each.
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }


def wrap_for_training(
    model: torch.nn.Module, config: TransformerConfig, kernels: Kernels
) -> DistributedDataParallel | torch.nn.ModuleList:
    """Wrap every chunk with float32 gradient buffers; broadcast the first replica's weights.

    Data-parallel ranks reduce the buffers once a step; GPUs do so during the last backward pass,
    and gather the weights of a distributed optimizer during the next forward pass. A module waits
    for its weights when it is called, as `output_weight` does; others call `gather_weights`.
    """
    if kernels.uses("gradient_accumulation_fusion"):
        layer: Any
        for layer in model.modules():
            if hasattr(layer, "fuse_wgrad_accumulation"):  # Transformer Engine's
                layer.fuse_wgrad_accumulation = True
    overlaps = kernels.uses("overlap_grad_reduce")
    buffers = DistributedDataParallelConfig(
        use_distributed_optimizer=kernels.shards_optimizer,
        grad_reduce_in_fp32=config.params_dtype.itemsize < 4,
        overlap_grad_reduce=overlaps,
        overlap_param_gather=kernels.uses("overlap_param_gather"),
    )
    # Megatron reduces all gradients of a chunk at a time, but for the first chunk.
    wrapped = [
        DistributedDataParallel(config, buffers, chunk, number > 0)
        for number, chunk in enumerate(chunks(model))
    ]
    for ddp in wrapped:
        ddp.broadcast_params()
    is_interleaved = len(wrapped) > 1
    if overlaps:
        no_sync = [ddp.no_sync for ddp in wrapped]
        config.no_sync_func = no_sync if is_interleaved else no_sync[0]
    return torch.nn.ModuleList(wrapped) if is_interleaved else wrapped[0]


def release(model: torch.nn.Module) -> None:
    """Free a trained model: Megatron's hooks on autograd's nodes keep its weights."""
    for ddp in chunks(model):
        ddp.grad_accs.clear()
        # The optimizer's method; its shards of float32 weights are views with such nodes.
        ddp.config.grad_scale_func = None
    for parameter in model.parameters():
        if hasattr(parameter, "main_param"):
            del parameter.main_param


def gather_weights(wrapped: Iterable[Any]) -> None:
    """Finish gathering all weights of a model's chunks, before reading them outside a forward pass."""
    for ddp in wrapped:
        if ddp.use_forward_hook:
            ddp.start_param_sync(force_sync=True)


class ModelOptimizer(torch.optim.Optimizer):
    """A MegatronOptimizer as a torch optimizer, for learning-rate schedulers and Lightning.

    `Machine.adam` says whose Adam Megatron takes.

    Attributes:
        grad_norm: global L2 norm of the last step's gradient before clipping.
        skipped: the last step changed nothing, because its loss or gradient was not finite; the
            same on all ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optim: OptimConfig,
        gradient_clip_val: float | None,
    ) -> None:
        self.chunks = list(chunks(model))
        config = self.chunks[0].config
        options = OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=optim.is_sharded,
            decoupled_weight_decay=optim.name != "adam",
            clip_grad=gradient_clip_val or 0.0,
        )
        with cuda_methods_on_cpu():
            self.megatron: MegatronOptimizer = get_megatron_optimizer(
                options, self.chunks
            )
        self.parts = getattr(self.megatron, "chained_optimizers", [self.megatron])
        for part in self.parts:
            _create_adam_state(part.optimizer)
        for group in self.megatron.param_groups:
            # 0 for biases and norms; Megatron's own scheduler would multiply.
            group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        config.grad_scale_func = self.megatron.scale_loss
        self.grad_norm = math.nan
        self.skipped = False
        super().__init__([{"params": []}], {"lr": optim.lr})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.megatron.param_groups

    @param_groups.setter
    def param_groups(self, _: list[dict[str, Any]]) -> None:
        """Ignore the groups of torch's constructor; Megatron's are in use."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Ignore the call of torch's constructor; the groups come from Megatron."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradient buffers and the parameters' gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad(set_to_none)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, loss_is_finite: bool = True
    ) -> Any:
        """Update the weights; change nothing if the loss or the gradient is not finite."""
        if closure is not None:
            closure()
        found_inf = self.megatron.prepare_grads()
        self.grad_norm = float(self.megatron.get_grad_norm())
        self.skipped = (
            found_inf or not loss_is_finite or not math.isfinite(self.grad_norm)
        )
        if self.skipped:
            return
        for part in self.parts:
            parameters = part.get_parameters()
            max_norm = part.config.clip_grad
            if parameters and max_norm > 0:
                with cuda_methods_on_cpu():
                    clip_grad_by_total_norm_fp32(parameters, max_norm, self.grad_norm)
        self.megatron.step_with_ready_grads()

    def sharded_state_dict(
        self, model_state: dict[str, Any], is_loading: bool = False
    ) -> dict[str, Any]:
        """Return the optimizer's part of a distributed checkpoint; every rank calls it.

        It gathers the model's weights, which such a checkpoint holds too.
        """
        gather_weights(self.chunks)
        return self.megatron.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=sharding_metadata()
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint's moments; keep this run's weight decay and decay rates."""
        chosen = [
            {name: group[name] for name in CHOSEN if name in group}
            for group in self.param_groups
        ]
        # Megatron finds the groups of a checkpoint by it, from 0.17 on.
        for group, key, _ in nested_items_iter(state_dict):
            if key == "max_lr":
                group[key] = self.defaults["lr"]
        with torch.no_grad(), _own_steps(self.parts):
            self.megatron.load_state_dict(state_dict)
        for group, values in zip(self.param_groups, chosen, strict=True):
            group.update(values)


def _create_adam_state(inner: torch.optim.Optimizer) -> None:
    """Create Adam's state before its first step, as Megatron's saving asserts."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state[parameter]
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
                state["step"] = torch.tensor(0.0)


@contextlib.contextmanager
def _own_steps(parts: list[MegatronOptimizer]) -> Iterator[None]:
    """Let Megatron's distributed optimizer load a checkpoint into torch's Adam.

    Megatron looks for a `step` per parameter in the checkpoint, which holds none. It also shares
    one `step` tensor between all parameters, which Adam then increments once per parameter: a
    wrong bias correction without an error.
    """
    inner = [
        part.optimizer
        for part in parts
        if isinstance(part, DistributedOptimizer)
        and isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)
    ]
    steps: list[tuple[dict[str, Any], torch.Tensor]] = []

    def set_aside(loaded: torch.optim.Optimizer) -> None:
        steps.extend((state, state.pop("step")) for state in loaded.state.values())

    hooks = [each.register_load_state_dict_post_hook(set_aside) for each in inner]
    yield
    for hook in hooks:
        hook.remove()
    for state, step in steps:
        state["step"] = step.clone()
