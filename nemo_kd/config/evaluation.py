"""Configuration of `evaluate_gpt`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_kd.config.answers import ResponseConfig
from nemo_kd.config.data import DataConfig, names_records
from nemo_kd.config.fields import Section, choice, count, path
from nemo_kd.config.shared import ModelConfig, PretrainedCheckpoint, TrainerConfig

BACKENDS = ("megatron", "hf", "vllm")
RESULT = "evaluation.json"
SAMPLES = "samples.jsonl"


@dataclass
class EvaluationConfig(ResponseConfig, key="evaluate"):
    """`evaluate`: what to measure, how to generate responses, and where the results go."""

    output_dir: str = path()
    """Folder of the results: evaluation.json, samples.jsonl, samples.html and config.yaml."""
    overwrite: bool = False
    """Replace the evaluation in output_dir as a whole."""
    num_examples: int | None = count(None)
    """Examples to evaluate, the first of the file. None: all."""
    cache: str | None = path(None)
    """Cache of a teacher's logits for the same file: measures KL, agreement and masses against the
    teacher."""
    base_model: str | None = path(None)
    """Model that the run of a training checkpoint started with. None: as config.yaml in the run's
    folder names it."""
    generate: bool | None = None
    """Generate a response to every example. None: if answer_field is given."""
    backend: str = choice("megatron", BACKENDS)
    """Generate with this model and layout (megatron), or on rank 0 with transformers (hf) or vLLM
    (vllm), which need a Hugging Face folder."""
    url: str | None = None
    """backend=vllm: address of a server of this model, such as http://localhost:8000/v1. None: load
    the model with the library vllm."""
    compare: str | None = path(None)
    """output_dir of another evaluation of the same file, shown beside this one in samples.html."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_field is not None and not self.generates:
            raise self.error(
                "answer_field",
                f"{self.answer_field} is compared with generated responses, but evaluate.generate="
                "false generates none; leave one of them out",
            )
        if self.compare is not None and not self.generates:
            raise self.error(
                "compare",
                f"{self.compare} has responses, but this evaluation generates none; give "
                "evaluate.answer_field or evaluate.generate=true",
            )
        if self.url is not None and self.backend != "vllm":
            raise self.error(
                "url",
                f"{self.url} has no effect with evaluate.backend={self.backend}; give "
                "evaluate.backend=vllm, or leave it out",
            )

    @property
    def generates(self) -> bool:
        """Return True if responses are generated."""
        if self.generate is None:
            return self.answer_field is not None
        return self.generate


@dataclass
class EvaluationDataConfig(DataConfig):
    """`data` of `evaluate_gpt`."""

    max_tokens_per_batch: int = count(8192)
    """Largest number of tokens per forward pass of one replica, padding included; a longer example
    runs alone."""
    packing: bool = True
    """True: join the examples of a batch to one row without padding. False, and always with context
    parallelism: one example per row, padded to the longest."""


@dataclass
class EvaluateGPTConfig(Section):
    """Keys of `evaluate_gpt`."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    pretrained_checkpoint: PretrainedCheckpoint = field(
        default_factory=PretrainedCheckpoint
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: EvaluationDataConfig = field(default_factory=EvaluationDataConfig)
    evaluate: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        file_path: Any = self.data.data.file_path
        if not names_records(file_path):
            raise self.error(
                "data.data.file_path",
                f"{file_path!r} is neither a path nor [PATH, PATH ...]; give one of them",
            )
