"""A Hugging Face model's folder: its architecture and its weights, checked against each other before anything is allocated."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from nemo_kd.config import ConfigError
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.mcore.families import architecture_from_hf
from nemo_kd.mcore.hf_folder import SafetensorsFolder
from nemo_kd.mcore.weights import EMBEDDING, OUTPUT, check_hf_weights
from nemo_kd.model_files import read_json

log = logging.getLogger(__name__)


def open_hf_model(folder: Path) -> tuple[GPTArchitecture, SafetensorsFolder]:
    """Read config.json and the headers of the weights.

    Raises:
        ConfigError: a file is damaged, or the weights are not exactly those that config.json calls for.
    """
    config = read_json(folder / "config.json")
    try:
        architecture = architecture_from_hf(config)
    except ConfigError as error:
        raise ConfigError(
            f"{folder / str(error)}"
        ) from error  # the message opens with the file's name
    stored = SafetensorsFolder(folder)
    if architecture.share_embeddings_and_output_weights and _has_own_output(stored):
        # transformers 5 uses the stored layer too. Untied in config.json of an export, all its versions do.
        log.warning(
            "%s: %s differs from the embedding: it is used, although config.json ties both",
            folder,
            OUTPUT,
        )
        untied = architecture.hf_config | {"tie_word_embeddings": False}
        architecture = dataclasses.replace(
            architecture, share_embeddings_and_output_weights=False, hf_config=untied
        )
    check_hf_weights(stored, architecture)
    return architecture, stored


def _has_own_output(stored: SafetensorsFolder) -> bool:
    return {EMBEDDING, OUTPUT} <= set(stored.files) and not stored.equal(EMBEDDING, OUTPUT)
