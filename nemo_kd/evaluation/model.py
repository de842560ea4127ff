"""The model to evaluate: an archive, a Hugging Face folder, or a checkpoint of a training."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from nemo_kd.config import ConfigError
from nemo_kd.config.evaluation import EvaluateGPTConfig
from nemo_kd.config.optim import LoraConfig
from nemo_kd.mcore.checkpoint import KEY, PretrainedModel, open_pretrained
from nemo_kd.mcore.distributed_checkpoint import fill_from
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.kernels import Kernels, Machine
from nemo_kd.mcore.lora import adapter_state, add_adapters, merge_adapters
from nemo_kd.mcore.model import sharded_weights
from nemo_kd.mcore.weights import zero_vocabulary_padding
from nemo_kd.run.collective import on_every_rank, on_rank_zero
from nemo_kd.student.checkpoint_folder import CONTENTS, Contents, check_whole

PEFT = "model.peft."


@dataclass(frozen=True)
class EvaluatedModel:
    """A model on disk, opened and checked but not loaded.

    Attributes:
        pretrained: the model, or the one that the training of `checkpoint` started with, which
            gives architecture and tokenizer.
        checkpoint: folder of a training checkpoint.
        contents: of the checkpoint.
    """

    pretrained: PretrainedModel
    checkpoint: Path | None = None
    contents: Contents | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Return the model's name and hashes; rank 0's disk counts."""
        origin: dict[str, Any] = on_rank_zero(self.pretrained.fingerprint)
        if self.checkpoint is None or self.contents is None:
            return origin
        files = json.dumps(self.contents.files, sort_keys=True).encode()
        return {
            "name": self.checkpoint.name,
            "step": self.contents.step,
            "files": f"sha256:{hashlib.sha256(files).hexdigest()}",
            "start": origin,
        }

    def load(self, config: EvaluateGPTConfig, groups: ProcessGroups) -> Any:
        """Build this rank's part of the model and load its weights; every rank calls it."""
        architecture = self.pretrained.architecture
        kernels = Kernels(Machine.here(), config.model, config.trainer.precision)
        model = kernels.build_for_inference(architecture)
        lora = self._lora()
        if self.checkpoint is None or lora is not None:
            self.pretrained.load_weights(model, groups)
        if self.checkpoint is not None:
            if lora is None:
                state = sharded_weights(model)
            else:
                add_adapters(model, lora, config.model.seed, groups)
                state = adapter_state(model)  # empty in a stage without adapters
            on_every_rank(partial(fill_from, self.checkpoint, state))
            merge_adapters(model)
            zero_vocabulary_padding(model, architecture, groups)
        return model.eval()

    def _lora(self) -> LoraConfig | None:
        """Return the adapters of the checkpoint's training, None if it trained all weights."""
        experiment = (self.contents and self.contents.experiment) or {}
        if experiment.get(f"{PEFT}peft_scheme") != "lora":
            return None
        start = f"{PEFT}lora_tuning."
        values = {
            key.removeprefix(start): value
            for key, value in experiment.items()
            if key.startswith(start)
        }
        return LoraConfig(**values)


@contextlib.contextmanager
def open_model(config: EvaluateGPTConfig) -> Iterator[EvaluatedModel]:
    """Open the model; every rank calls it.

    Raises:
        ConfigError, CheckpointError: on every rank, it cannot be read.
    """
    path = Path(config.pretrained_checkpoint.restore_from_path).expanduser()
    base = config.evaluate.base_model
    if not (path / CONTENTS).is_file():
        if base is not None:
            raise ConfigError(
                f"evaluate.base_model: {base} is for training checkpoints, but {path} is a whole "
                "model; leave it out"
            )
        with open_pretrained(str(path)) as pretrained:
            yield EvaluatedModel(pretrained)
        return
    contents = check_whole(path)
    base = on_every_rank(lambda: base or _base_of(path))
    with open_pretrained(base, "evaluate.base_model") as pretrained:
        on_rank_zero(lambda: _check_base(path, contents, pretrained))
        yield EvaluatedModel(pretrained, path, contents)


def _base_of(checkpoint: Path) -> str:
    """Return the path of the model that a checkpoint's training started with.

    Raises:
        ConfigError: config.yaml of its run is not there or does not say it.
    """
    path = checkpoint.absolute().parent.parent / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = config["pretrained_checkpoint"]["restore_from_path"]
        if not isinstance(found, str) or not Path(found).exists():
            raise ValueError(f"it names {found}, which is not there")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{KEY}: {checkpoint} is a training checkpoint, which has no architecture and no "
            f"tokenizer; they are read from the model that its run started with, as {path} names "
            f"it ({error}). Give that model: evaluate.base_model=PATH"
        ) from error
    return found


def _check_base(
    checkpoint: Path, contents: Contents, pretrained: PretrainedModel
) -> None:
    """Refuse a base model with other weights than the training started with."""
    if contents.experiment is None:
        raise ConfigError(
            f"{KEY}: {checkpoint} has no record of its experiment, so another version wrote it; "
            "give the .nemo archive of its run"
        )
    before = contents.experiment[KEY]
    now = pretrained.fingerprint()
    if before["weights"] != now["weights"]:
        raise ConfigError(
            f"evaluate.base_model: {pretrained.source} has the weights {now['weights']}, but the "
            f"run of {checkpoint} started with {before['name']}, {before['weights']}; give that "
            "model"
        )
