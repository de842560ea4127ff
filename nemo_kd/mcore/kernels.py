"""Choose Megatron's kernels and fusions for this machine, and describe them when a run starts.

The model is built, and the run described, from the same `Kernels`.
"""

from __future__ import annotations

import importlib.util
import logging
import socket
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

from nemo_kd.config import ConfigError
from nemo_kd.config.shared import PRECISIONS, GPTArchitecture
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.model import build_gpt_model, transformer_config
from nemo_kd.run.collective import gather

log = logging.getLogger(__name__)

ADAMS = {"transformer_engine": "Transformer Engine's", "apex": "Apex's"}
"""Package of the fused Adam that Megatron found -> its name."""
FP8_FIELDS = {
    "fp8": "hybrid",
    "fp8_amax_history_len": 1024,
    "fp8_amax_compute_algo": "max",
}
FP8_RECIPES = {"current": "tensorwise", "delayed": "delayed"}
"""`model.fp8` -> Megatron's name of it."""
NO_ENGINE = "no Transformer Engine"
MAX_RANKS_SHOWN = 64
"""Of more ranks only the first and the last are shown."""


@dataclass(frozen=True)
class Machine:
    """GPU of this process, and the optional packages that Megatron can use.

    Attributes:
        capability: compute capability of the GPU; (0, 0) without one.
        apex: its kernel that adds up weight gradients is installed.
        adam: package of Megatron's Adam: Transformer Engine's, else Apex's, else torch's.
    """

    capability: tuple[int, int] = (0, 0)
    transformer_engine: bool = False
    apex: bool = False
    adam: str = "torch"

    @classmethod
    def here(cls) -> Machine:
        """Return this process's machine."""
        has_gpu = torch.cuda.is_available()
        apex_kernel = importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
        return cls(
            capability=torch.cuda.get_device_capability() if has_gpu else (0, 0),
            transformer_engine=HAVE_TE,
            apex=apex_kernel is not None,
            adam=optimizer.Adam.__module__.partition(".")[0],
        )


class Kernels:
    """Kernels of a model on one machine.

    Args:
        model: section `model` of stage 1 or 2.

    Attributes:
        transformer_engine: the layers are Transformer Engine's.
        reasons: why a fusion is off, empty where it is on, by the name of Megatron's option.
        fields: fields of TransformerConfig that select kernels.
        own_norms: norms are modules with Transformer Engine too, where adapters follow them.
        shards_optimizer: each data-parallel rank holds a part of the optimizer's state.

    Raises:
        ConfigError: Transformer Engine or FP8 is demanded, but not possible here.
    """

    def __init__(self, machine: Machine, model: Any, precision: str) -> None:
        self.machine = machine
        self.model = model
        self.dtype = getattr(torch, PRECISIONS[precision])
        no_gpu = "" if any(machine.capability) else "no GPU"
        no_engine = no_gpu or ("" if machine.transformer_engine else NO_ENGINE)
        if model.transformer_engine == "on" and no_engine:
            raise ConfigError(
                f"model.transformer_engine: on, but there is {no_engine} here (pip install "
                "'nemo_kd[gpu]' on a machine with a GPU); use auto or off"
            )
        if model.transformer_engine == "off":
            no_engine = no_gpu or "model.transformer_engine=off"
        self.transformer_engine = not no_engine
        self.reasons = {
            "apply_rope_fusion": no_engine,
            "bias_activation_fusion": no_gpu,
        }
        self.fields: dict[str, Any] = {
            name: not why for name, why in self.reasons.items()
        }
        self.fp8 = getattr(model, "fp8", None)
        if self.fp8:
            if no_engine or machine.capability < (8, 9):
                raise ConfigError(
                    f"model.fp8: {self.fp8}, but FP8 needs Transformer Engine's layers on a GPU of "
                    f"compute capability 8.9 or newer (here: {no_engine or machine.capability}); "
                    "leave it out"
                )
            self.fields |= FP8_FIELDS | {"fp8_recipe": FP8_RECIPES[self.fp8]}
        self.own_norms = self.shards_optimizer = False
        if hasattr(model, "optim"):
            self.shards_optimizer = model.optim.is_sharded
            self.own_norms = model.peft.lora is not None
            no_sum = "frozen weights" if self.own_norms else ""
            if self.dtype == torch.float32:
                no_sum = "float32 weights"
            if no_engine and not machine.apex:
                no_sum = no_sum or "no Apex"
            # Megatron's output layer refuses the field without Apex; see `wrap_for_training`.
            self.fields["gradient_accumulation_fusion"] = machine.apex and not (
                no_gpu or no_sum
            )
            whole = (
                "" if self.shards_optimizer else f"model.optim.name={model.optim.name}"
            )
            self.reasons |= {
                "gradient_accumulation_fusion": no_gpu or no_sum,
                "overlap_grad_reduce": no_gpu,
                "overlap_param_gather": no_gpu or whole,
            }

    def uses(self, fusion: str) -> bool:
        """Return True if a fusion is on."""
        return self.reasons.get(fusion) == ""

    def build_for_inference(self, architecture: GPTArchitecture) -> Any:
        """Build this rank's part of a model that is not trained; its weights are to be loaded."""
        config = transformer_config(
            architecture,
            self.model,
            self.dtype,
            perform_initialization=False,
            **self.fields,
        )
        padding = self.model.make_vocab_size_divisible_by
        return build_gpt_model(architecture, config, padding, self.transformer_engine)


def startup_facts(kernels: Kernels, groups: ProcessGroups) -> str:
    """Describe layout and kernels, a line per fact; every rank calls this.

    Warns if `model.transformer_engine=auto` finds a GPU, but no Transformer Engine.
    """
    model = kernels.model
    layers = "Transformer Engine" if kernels.transformer_engine else "torch"
    if kernels.reasons["apply_rope_fusion"] == NO_ENGINE:
        log.warning(
            "warning: model.transformer_engine=auto: Transformer Engine is not installed (pip "
            "install 'nemo_kd[gpu]'), so torch's slower layers run on this GPU; "
            "model.transformer_engine=off silences this"
        )
    sequence = " (sequence parallel)" if model.sequence_parallel else ""
    parts = model.chunks_per_stage
    interleaved = f" ({parts} interleaved parts each)" if parts > 1 else ""
    fp8 = f", layers in FP8 with {kernels.fp8} scaling" if kernels.fp8 else ""
    norms = (
        "modules" if kernels.own_norms or layers == "torch" else "in the projections"
    )
    reasons = kernels.reasons
    place = (
        f"({groups.tensor_rank}, {groups.pipeline_rank}, {groups.context_rank}, "
        f"{groups.expert_rank}, {groups.data_rank})"
    )
    facts = {
        "layout": f"tensor {groups.tensor_size}{sequence} x pipeline {groups.pipeline_size}"
        f"{interleaved} x context {groups.context_size} x data {groups.data_size}, experts over "
        f"{model.expert_model_parallel_size}",
        "attention": f"{layers}, with the softmax inside",
        "norms": f"{layers}, {norms}",
        "GEMM": f"{layers}, {kernels.dtype}{fp8}",
        "fusions": ", ".join(name for name, why in reasons.items() if not why),
        "unused": "; ".join(f"{name} ({why})" for name, why in reasons.items() if why),
    }
    if hasattr(model, "optim"):
        adam = ADAMS.get(kernels.machine.adam, "torch's")
        facts["Adam"] = f"{adam}, {model.optim.name}"
    places = gather(lambda: f"{place} on {socket.gethostname()}")
    shown = [f"{number} = {text}" for number, text in enumerate(places)]
    if len(shown) > MAX_RANKS_SHOWN:
        shown[1:-1] = ["..."]
    facts["ranks"] = "\n  ".join(["rank = (tp, pp, cp, ep, dp)", *shown])
    return "\n".join(
        f"{name + ':':<12}{text or 'none'}" for name, text in facts.items()
    )
