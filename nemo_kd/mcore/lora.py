"""Low-rank adapters (LoRA, Hu et al. 2021) on the projections of a frozen model.

A projection W of shape [out, in] is used as W + scale * up @ down. Only `down` [r, in] and `up` [out, r] are trained. One of
the two is cut over the tensor-parallel ranks as W is, the other is the same on all of them, and what they exchange
for an adapter has its rank as width: [S, B, r].

Shape legend: S positions, B rows, r rank of the adapter.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
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
from torch.nn import functional

from nemo_kd.config import ConfigError
from nemo_kd.config.peft import LoraConfig
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.model import chunks
from nemo_kd.mcore.weights import ADAPTERS

PROJECTIONS = {
    "attention_qkv": "self_attention.linear_qkv",
    "attention_dense": "self_attention.linear_proj",
    "mlp_fc1": "mlp.linear_fc1",
    "mlp_fc2": "mlp.linear_fc2",
}
CUT_BY_OUTPUT = ("attention_qkv", "mlp_fc1")
"""Their output is cut over the tensor-parallel ranks, that of the others is a sum over them."""


class Adapter(torch.nn.Module):
    """What one projection's output is changed by: scale * up(down(x)).

    Attributes:
        down: [r, in]; cut by `in` where the projection's input is cut.
        up: [out, r]; cut by `out` where the projection's output is.
        cut_by_output: which of both it is.
    """

    def __init__(
        self, weight: Tensor, target: str, lora: LoraConfig, config: TransformerConfig
    ) -> None:
        super().__init__()
        self.cut_by_output, self.scale, self.dropout = (
            target in CUT_BY_OUTPUT,
            lora.scale,
            lora.adapter_dropout,
        )
        self.sequence_parallel = config.sequence_parallel
        self.down = torch.nn.Parameter(weight.new_empty(lora.adapter_dim, weight.shape[1]))
        self.up = torch.nn.Parameter(weight.new_empty(weight.shape[0], lora.adapter_dim))
        cut, same = (self.up, self.down) if self.cut_by_output else (self.down, self.up)
        set_tensor_model_parallel_attributes(cut, True, 0 if self.cut_by_output else 1, 1)
        # Each rank sees a part of the sequence there: Megatron sums the gradients.
        same.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

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

    def product(self) -> Tensor:
        """What this rank's part of the projection's weight is changed by, in float32."""
        return self.scale * self.up.detach().float() @ self.down.detach().float()

    def _drop(self, x: Tensor) -> Tensor:
        if not self.dropout or not self.training:
            return x
        # The same random numbers on all tensor-parallel ranks where all have the same input, others where not.
        same_input = self.cut_by_output and not self.sequence_parallel
        with contextlib.nullcontext() if same_input else get_cuda_rng_tracker().fork():
            return functional.dropout(x, self.dropout)


def add_adapters(
    model: torch.nn.Module, lora: LoraConfig, seed: int, groups: ProcessGroups
) -> None:
    """Freezes the model and adds adapters to this rank's layers; they begin the same in every layout.

    Comes after the weights are loaded and before the gradient buffers are made, which frozen weights have none of.
    """
    model.requires_grad_(False)
    for layer in _layers(model):
        if not lora.has_layer(layer.layer_number):
            continue
        adapters = {}
        for target in lora.targets:
            projection = layer.get_submodule(PROJECTIONS[target])
            adapter = Adapter(projection.weight, target, lora, layer.config)
            _initialize(adapter, target, lora, f"{seed} {layer.layer_number} {target}", groups)
            projection.register_forward_hook(_adding(adapter))
            adapters[target] = adapter
        layer.add_module(ADAPTERS, torch.nn.ModuleDict(adapters))
    first = chunks(model)[0]
    if first.config.recompute_granularity == "full" and first.pre_process:
        # Layers that are computed anew pass a gradient on only where their input wants one, which no frozen weight gives it.
        first.embedding.register_forward_hook(_wanting_gradient)


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, Tensor, Adapter]]:
    """(name in a whole model, weight of the projection, adapter) of every adapter on this rank."""
    for layer in _layers(model):
        for target, adapter in getattr(layer, ADAPTERS, {}).items():
            name = f"decoder.layers.{layer.layer_number - 1}.{PROJECTIONS[target]}"
            yield name, layer.get_submodule(PROJECTIONS[target]).weight, adapter


@contextlib.contextmanager
def merged(model: torch.nn.Module) -> Iterator[None]:
    """Puts the adapters into the weights for as long as it lasts, and the very weights back; not for forward passes.

    Needs host memory for the weights that have adapters.
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


def adapter_state(model: torch.nn.Module) -> dict[str, Any]:
    """The adapters as Megatron's sharded tensors, for distributed checkpoints that load in any layout."""
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
    """Fills the adapters with what a checkpoint held for `adapter_state`."""
    for name, _, adapter in adapters(model):
        for side, parameter in adapter.named_parameters():
            with torch.no_grad():
                parameter.copy_(state[f"{name}.{ADAPTERS}.{side}"])


def adapter_identity(lora: LoraConfig, base_weights: str) -> dict[str, Any]:
    """What has to agree for a checkpoint of adapters to be loaded; the model under them, of this hash, is not in it."""
    return {
        "pretrained_checkpoint": base_weights,
        "target_modules": list(lora.targets),
        "adapter_dim": lora.adapter_dim,
        "scale": lora.scale,
        "layer_selection": lora.layer_selection,
    }


def check_same_adapters(before: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    """Compares what a checkpoint says (None: it has no adapters) with what is trained.

    Raises:
        ConfigError: lists what differs.
    """
    before, now = before or {}, now or {}
    keys = [key for key in (now or before) if before.get(key) != now.get(key)]
    if keys:
        differences = [
            f"{key} {before.get(key)} in the checkpoint, {now.get(key)} now" for key in keys
        ]
        raise ConfigError(
            f"model.peft: the checkpoint does not fit: {'; '.join(differences)}. Give the settings and the model it was "
            "trained with to go on, or another exp_manager.explicit_log_dir to begin anew"
        )


def _layers(model: torch.nn.Module) -> Iterator[Any]:
    return (layer for chunk in chunks(model) for layer in chunk.decoder.layers)


def _adding(adapter: Adapter) -> Any:
    def hook(
        _: torch.nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any]:
        projected, bias = outputs
        return projected + adapter(inputs[0]), bias

    return hook


def _wanting_gradient(_: torch.nn.Module, __: Any, embedded: Tensor) -> Tensor:
    return (
        embedded.requires_grad_()
        if torch.is_grad_enabled() and not embedded.requires_grad
        else embedded
    )


def _initialize(
    adapter: Adapter, target: str, lora: LoraConfig, key: str, groups: ProcessGroups
) -> None:
    """Draws the whole matrices from a generator of their own and keeps this rank's parts."""
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    )
    rank, size = groups.tensor_rank, groups.tensor_size
    for side, method in (("down", lora.column_init_method), ("up", lora.row_init_method)):
        parameter: Tensor = getattr(adapter, side)
        is_cut = (side == "up") == adapter.cut_by_output
        shape = list(parameter.shape)
        dim = 0 if side == "up" else 1
        shape[dim] *= size if is_cut else 1
        whole = _INIT[method](torch.empty(shape), generator)
        if is_cut and target == "mlp_fc1":  # [gate; up], of both every rank has its part
            whole = torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
        elif is_cut:
            whole = whole.chunk(size, dim)[rank]
        with torch.no_grad():
            parameter.copy_(whole)


_INIT = {
    "xavier": lambda tensor, generator: torch.nn.init.xavier_normal_(tensor, generator=generator),
    "normal": lambda tensor, generator: torch.nn.init.normal_(tensor, std=0.2, generator=generator),
    "kaiming": lambda tensor, generator: torch.nn.init.kaiming_uniform_(
        tensor, a=5**0.5, generator=generator
    ),
    "zero": lambda tensor, generator: tensor.zero_(),
}
"""As NeMo's adapters begin, kaiming as the peft library's."""
