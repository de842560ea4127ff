"""Megatron's optimizers behind torch's optimizer interface."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import TransformerConfig

from nemo_kd.config.optim import OptimConfig
from nemo_kd.mcore.cpu import cuda_methods_on_cpu
from nemo_kd.mcore.model import chunks

CHOSEN = ("initial_lr", "weight_decay", "betas", "eps")
"""What the configuration says of a group of parameters, whatever a checkpoint does."""


def sharding_metadata() -> dict[str, Any]:
    """How a distributed checkpoint lays out the optimizer: so that it loads at any tensor- and data-parallel size.

    A new one each time: Megatron writes the process groups of the moment into it.
    """
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,  # one rank of all replicas holds the whole state, not each
    }


def training_options(chunks_per_stage: int) -> dict[str, Any]:
    """What a TransformerConfig needs for training here: losses are token sums, divided once by the global token count."""
    return {
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": finalize_model_grads,
        # Of a stage's outputs, once sent, only the graph is needed; but interleaved ones may still be on their way.
        "deallocate_pipeline_outputs": chunks_per_stage == 1,
    }


def wrap_for_training(
    model: torch.nn.Module, config: TransformerConfig, distributed_optimizer: bool
) -> DistributedDataParallel | torch.nn.ModuleList:
    """The model with gradient buffers: float32 ones, reduced over data-parallel ranks once a step; same weights on all.
    Of the several chunks of an interleaved pipeline stage every one is wrapped.

    On GPUs they are reduced during the last backward pass of a step. Weights are not gathered during the next forward
    pass (`overlap_param_gather`): the output layer's is read without a call of its module, which would wait for it.
    """
    buffers = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed_optimizer,
        grad_reduce_in_fp32=config.params_dtype.itemsize < 4,
        overlap_grad_reduce=overlaps_gradients(),
    )
    # Of the chunks but the first one Megatron reduces all gradients at a time.
    wrapped = [
        DistributedDataParallel(config, buffers, chunk, number > 0)
        for number, chunk in enumerate(chunks(model))
    ]
    for ddp in wrapped:
        ddp.broadcast_params()
    if len(wrapped) > 1:
        if overlaps_gradients():
            config.no_sync_func = [ddp.no_sync for ddp in wrapped]
        return torch.nn.ModuleList(wrapped)
    if overlaps_gradients():
        config.no_sync_func = wrapped[0].no_sync
    return wrapped[0]


def release(model: torch.nn.Module) -> None:
    """Ends its training. Megatron's hooks on autograd's nodes close a circle, through C++, that would keep the weights for ever."""
    for ddp in chunks(model):
        ddp.grad_accs.clear()
        ddp.config.grad_scale_func = (
            None  # the optimizer's, whose shards of float32 weights are views with such nodes
        )
    for parameter in model.parameters():
        if hasattr(parameter, "main_param"):
            del parameter.main_param


def overlaps_gradients() -> bool:
    """Whether gradients are reduced while others are still made."""
    return torch.cuda.is_available()


class ModelOptimizer(torch.optim.Optimizer):
    """A MegatronOptimizer as a torch optimizer, for learning-rate schedulers and Lightning.

    Megatron takes the Adam of Transformer Engine where it is installed, else Apex's, else torch's.

    Attributes:
        grad_norm: global L2 norm of the last step's gradient before clipping.
        skipped: whether the last step changed nothing, as its loss or gradient was not finite; the same on all ranks.
    """

    def __init__(
        self, model: torch.nn.Module, optim: OptimConfig, gradient_clip_val: float | None
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
            self.megatron: MegatronOptimizer = get_megatron_optimizer(options, self.chunks)
        self.parts = getattr(self.megatron, "chained_optimizers", [self.megatron])
        for part in self.parts:
            _create_adam_state(part.optimizer)
        for group in self.megatron.param_groups:
            # 0 for biases and norms; Megatron leaves it to its own scheduler to multiply.
            group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        config.grad_scale_func = self.megatron.scale_loss
        self.grad_norm, self.skipped = math.nan, False
        super().__init__([{"params": []}], {"lr": optim.lr})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.megatron.param_groups

    @param_groups.setter
    def param_groups(self, _: list[dict[str, Any]]) -> None:
        """torch's constructor assigns its own groups; Megatron's are the ones in use."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's constructor calls this; the groups come from Megatron."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradient buffers as well as the parameters' gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, loss_is_finite: bool = True) -> Any:
        """Update the weights, unless the loss or the gradient is not finite: then change nothing."""
        result = closure() if closure is not None else None
        found_inf = self.megatron.prepare_grads()
        self.grad_norm = float(self.megatron.get_grad_norm())
        self.skipped = found_inf or not loss_is_finite or not math.isfinite(self.grad_norm)
        if self.skipped:
            return result
        for part in self.parts:
            parameters = part.get_parameters()
            max_norm = part.config.clip_grad
            if parameters and max_norm > 0:
                with cuda_methods_on_cpu():
                    clip_grad_by_total_norm_fp32(parameters, max_norm, self.grad_norm)
        self.megatron.step_with_ready_grads()
        return result

    def sharded_state_dict(
        self, model_state: dict[str, Any], is_loading: bool = False
    ) -> dict[str, Any]:
        """The optimizer's part of a distributed checkpoint; every rank takes part."""
        return self.megatron.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=sharding_metadata()
        )

    def load_sharded_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's moments, with the weight decay and decay rates of now."""
        chosen = [
            {name: group[name] for name in CHOSEN if name in group} for group in self.param_groups
        ]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for part in self.parts:
                if isinstance(part, DistributedOptimizer):
                    stack.enter_context(_own_steps(part.optimizer))
            self.megatron.load_state_dict(state)
        for group, values in zip(self.param_groups, chosen, strict=True):
            group.update(values)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the state is saved through `sharded_state_dict`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: see `state_dict`."""


def _create_adam_state(inner: torch.optim.Optimizer) -> None:
    """Create the state of torch's Adam before its first step: Megatron's saving asserts that there is one."""
    if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@contextlib.contextmanager
def _own_steps(inner: torch.optim.Optimizer) -> Iterator[None]:
    """Let Megatron's distributed optimizer load a checkpoint into torch's Adam (no Transformer Engine, no Apex).

    Megatron looks for a `step` per parameter in the checkpoint, which holds none. It also shares one `step` tensor
    between all parameters, which Adam then increments once per parameter: a wrong bias correction without an error.
    """
    if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        yield
        return
    steps: dict[torch.Tensor, torch.Tensor] = {}

    def set_aside(_: torch.optim.Optimizer) -> None:
        steps.update({key: state.pop("step").clone() for key, state in inner.state.items()})

    hook = inner.register_load_state_dict_post_hook(set_aside)
    try:
        yield
    finally:
        hook.remove()
        for key, step in steps.items():
            inner.state[key] = {"step": step, **inner.state[key]}
