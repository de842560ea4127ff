"""Low-rank adapters (LoRA, Hu et al. 2021) on the projections of a frozen model.

A projection W of shape [out, in] acts as W + scale * up @ down. Only `down` [r, in] and `up` [out,
r] are trained. One of them is cut over the tensor-parallel ranks as W is, the other is the same on
all. The ranks exchange [S, B, r] for an adapter.

Shape legend: S positions, B rows, r rank of the adapter.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional, init
from torch.utils.hooks import RemovableHandle

from nemo_kd.config.optim import LoraConfig
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.model import ADAPTERS, chunks, layers

PROJECTIONS = {
    "attention_qkv": "self_attention.linear_qkv",
    "attention_dense": "self_attention.linear_proj",
    "mlp_fc1": "mlp.linear_fc1",
    "mlp_fc2": "mlp.linear_fc2",
}
CUT_BY_OUTPUT = ("attention_qkv", "mlp_fc1")
"""Their output is cut over the tensor-parallel ranks; that of the others is summed over them."""


class Adapter(torch.nn.Module):
    """Low-rank term of one projection: scale * up(down(x)).

    Attributes:
        down: [r, in]; cut by `in` where the projection's input is cut.
        up: [out, r]; cut by `out` where the projection's output is.
        cut_by_output: the projection's output is cut, not its input.
        hook: what adds it to the projection's output.
    """

    hook: RemovableHandle

    def __init__(
        self, weight: Tensor, target: str, lora: LoraConfig, config: TransformerConfig
    ) -> None:
        super().__init__()
        self.cut_by_output = target in CUT_BY_OUTPUT
        self.scale = lora.scale
        self.dropout = lora.adapter_dropout
        self.sequence_parallel = config.sequence_parallel
        self.down = torch.nn.Parameter(
            weight.new_empty(lora.adapter_dim, weight.shape[1])
        )
        self.up = torch.nn.Parameter(
            weight.new_empty(weight.shape[0], lora.adapter_dim)
        )
        if self.cut_by_output:
            set_tensor_model_parallel_attributes(self.up, True, 0, 1)
            same: Any = self.down
        else:
            set_tensor_model_parallel_attributes(self.down, True, 1, 1)
            same = self.up
        # Each rank sees a part of the sequence there: Megatron sums the gradients.
        same.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        low_SBr = functional.linear(self._drop(x), self.down) * self.scale
        if self.cut_by_output:
            gather = (
                gather_from_sequence_parallel_region
                if self.sequence_parallel
                else copy_to_tensor_model_parallel_region
            )
            return functional.linear(gather(low_SBr), self.up)
        add = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        return functional.linear(add(low_SBr), self.up)

    def add_to_output(
        self,
        _: torch.nn.Module,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, Any],
    ) -> tuple[Tensor, Any]:
        """Add this term to what the projection returns; a forward hook."""
        projected, bias = outputs
        return projected + self(inputs[0]), bias

    def product(self) -> Tensor:
        """Return the term that this rank's part of the weight gains, in float32."""
        return self.scale * self.up.detach().float() @ self.down.detach().float()

    def _drop(self, x: Tensor) -> Tensor:
        if not self.dropout or not self.training:
            return x
        # Tensor-parallel ranks drop the same values if they have the same input, else different
        # ones.
        same_input = self.cut_by_output and not self.sequence_parallel
        with contextlib.nullcontext() if same_input else get_cuda_rng_tracker().fork():
            return functional.dropout(x, self.dropout)


def add_adapters(
    model: torch.nn.Module, lora: LoraConfig, seed: int, groups: ProcessGroups
) -> None:
    """Freeze the model and add adapters to its layers, with the same values in every layout.

    Call it after loading the weights and before making gradient buffers: frozen weights have none.
    """
    model.requires_grad_(False)
    for layer in layers(model):
        if not lora.has_layer(layer.layer_number):
            continue
        adapters = {}
        for target in lora.targets:
            projection = layer.get_submodule(PROJECTIONS[target])
            adapter = Adapter(projection.weight, target, lora, layer.config)
            _initialize(
                adapter, target, lora, f"{seed} {layer.layer_number} {target}", groups
            )
            adapter.hook = projection.register_forward_hook(adapter.add_to_output)
            adapters[target] = adapter
        layer.add_module(ADAPTERS, torch.nn.ModuleDict(adapters))
    first = chunks(model)[0]
    if first.config.recompute_granularity == "full" and first.pre_process:
        # Recomputed layers pass on a gradient only if their input requires one; frozen weights do
        # not.
        first.embedding.register_forward_hook(_wanting_gradient)


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, Tensor, Adapter]]:
    """Yield (name in a whole model, weight of the projection, adapter) of this rank's adapters."""
    for layer in layers(model):
        for target, adapter in getattr(layer, ADAPTERS, {}).items():
            name = f"decoder.layers.{layer.layer_number - 1}.{PROJECTIONS[target]}"
            yield name, layer.get_submodule(PROJECTIONS[target]).weight, adapter


@contextlib.contextmanager
def merged(model: torch.nn.Module) -> Iterator[None]:
    """Merge the adapters into the weights inside the block, then restore the exact weights.

    Not for forward passes. Needs host memory for the weights that have adapters.
    """
    kept = []
    with torch.no_grad():
        for _, weight, adapter in adapters(model):
            kept.append((weight, weight.to("cpu", copy=True)))
            weight.copy_(weight.float() + adapter.product())
        try:
            yield
        finally:
            for weight, original in kept:
                weight.copy_(original)


def merge_adapters(model: torch.nn.Module) -> None:
    """Merge the adapters into the weights for good, and remove them."""
    with torch.no_grad():
        for _, weight, adapter in adapters(model):
            weight.copy_(weight.float() + adapter.product())
            adapter.hook.remove()
    for layer in layers(model):
        if hasattr(layer, ADAPTERS):
            delattr(layer, ADAPTERS)


def adapter_state(model: torch.nn.Module) -> dict[str, Any]:
    """Return the adapters as Megatron's sharded tensors, which load in any layout."""
    state: dict[str, Any] = {}
    for name, _, adapter in adapters(model):
        cut = {"up": 0} if adapter.cut_by_output else {"down": 1}
        parts = make_sharded_tensors_for_checkpoint(
            adapter.state_dict(keep_vars=True), f"{name}.{ADAPTERS}.", cut
        )
        if name.endswith(PROJECTIONS["mlp_fc1"]):
            up = f"{name}.{ADAPTERS}.up"
            parts[up] = apply_swiglu_sharded_factory(parts[up], (), False)
        state |= parts
    return state


def load_adapter_state(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Fill the adapters from a checkpoint's values of `adapter_state`."""
    for name, _, adapter in adapters(model):
        for side, parameter in adapter.named_parameters():
            with torch.no_grad():
                parameter.copy_(state[f"{name}.{ADAPTERS}.{side}"])


def adapter_identity(lora: LoraConfig, base_weights: str) -> dict[str, Any]:
    """Return the settings that a checkpoint of adapters, which lacks the model, needs."""
    return {
        "pretrained_checkpoint": base_weights,
        "target_modules": list(lora.targets),
        "adapter_dim": lora.adapter_dim,
        "scale": lora.scale,
        "layer_selection": lora.layer_selection,
    }


def _wanting_gradient(_: torch.nn.Module, __: Any, embedded: Tensor) -> Tensor:
    if torch.is_grad_enabled() and not embedded.requires_grad:
        return embedded.requires_grad_()
    return embedded


def _initialize(
    adapter: Adapter, target: str, lora: LoraConfig, key: str, groups: ProcessGroups
) -> None:
    """Draw the whole matrices from their own generator and keep this rank's parts."""
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    )
    rank = groups.tensor_rank
    size = groups.tensor_size
    for side, method in (
        ("down", lora.column_init_method),
        ("up", lora.row_init_method),
    ):
        parameter: Tensor = getattr(adapter, side)
        is_cut = (side == "up") == adapter.cut_by_output
        shape = list(parameter.shape)
        dim = 0 if side == "up" else 1
        shape[dim] *= size if is_cut else 1
        whole = _INIT[method](torch.empty(shape), generator=generator)
        if (
            is_cut and target == "mlp_fc1"
        ):  # [gate; up]: every rank has its part of both
            whole = torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
        elif is_cut:
            whole = whole.chunk(size, dim)[rank]
        with torch.no_grad():
            parameter.copy_(whole)


_INIT: dict[str, Any] = {
    "xavier": init.xavier_normal_,
    "normal": partial(init.normal_, std=0.2),
    "kaiming": partial(init.kaiming_uniform_, a=5**0.5),
    "zero": lambda tensor, generator: tensor.zero_(),
}
"""Initializations of NeMo's adapters; kaiming is that of the peft library."""
