"""Check that the teacher's tokenizer and template make the tokens of cached rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Example
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN, Manifest
from nemo_kd.config.data import ChatPromptTokens, DataConfig, DatasetConfig
from nemo_kd.data.dataset import Skipped, TokenizedDataset
from nemo_kd.data.records import DataError, JsonlRecords
from nemo_kd.data.tokenizer import chat_template_fingerprint, tokenizer_fingerprint


@dataclass
class Checks:
    """Results of checks, for a report.

    Attributes:
        problems: of the whole cache.
        wrong: problems of single examples, by their number in the sample.
        not_checked: what could not be checked, with the reason.
    """

    problems: list[str] = field(default_factory=list)
    wrong: dict[int, list[str]] = field(default_factory=dict)
    not_checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_tokens(
    manifests: Sequence[Manifest],
    examples: Sequence[Example],
    teacher: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    dataset: str | None,
) -> Checks:
    """Compare fingerprints, and render the examples' records again if the dataset is there.

    Args:
        teacher: fingerprint of the teacher that is loaded.
        dataset: path of the dataset; None: the manifest's path.

    Raises:
        CacheError, DataError: `dataset` is not what the cache was made from.
    """
    checks = Checks()
    if not manifests:
        checks.not_checked.append(
            "teacher, tokenizer and chat template: the cache has no manifest"
        )
    for manifest in manifests:
        _compare_fingerprints(manifest, teacher, tokenizer, checks)
    data = _data_config(manifests, dataset, checks)
    if data is not None:
        rendered = TokenizedDataset(data, tokenizer, manifests[0].seq_length, vocab_size)
        for number, example in enumerate(examples):
            difference = _difference(rendered, example)
            if difference:
                checks.wrong[number] = [f"not the record's tokens: {difference}"]
    # Manifests of one cache mostly have the same problems.
    checks.problems = list(dict.fromkeys(checks.problems))
    checks.not_checked = list(dict.fromkeys(checks.not_checked))
    checks.notes = list(dict.fromkeys(checks.notes))
    return checks


def _compare_fingerprints(
    manifest: Manifest,
    teacher: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    checks: Checks,
) -> None:
    name = manifest.teacher.get("name")
    if name == UNKNOWN:
        checks.not_checked.append("the teacher's name: another program wrote the cache")
    elif manifest.teacher.get("weights") != teacher["weights"]:
        checks.notes.append(
            f"the cache names the teacher {name!r}, whose files are not those of "
            f"{teacher['name']!r}; its numbers decide"
        )
    if manifest.tokenizer == UNKNOWN:
        checks.not_checked.append("the tokenizer: the cache does not record it")
    elif manifest.tokenizer != tokenizer_fingerprint(tokenizer):
        checks.problems.append(
            "the cache was made with another tokenizer than the teacher's"
        )
    if "messages" not in manifest.dataset.get("formats", ["messages"]):
        return  # no chat template was used
    if manifest.chat_template is None:
        checks.not_checked.append("the chat template: the cache does not record it")
    elif manifest.chat_template != chat_template_fingerprint(tokenizer):
        checks.problems.append(
            "the cache was rendered with another chat template than the teacher's"
        )


def _data_config(
    manifests: Sequence[Manifest], asked: str | None, checks: Checks
) -> DataConfig | None:
    """Return the configuration that renders the dataset; None, with a reason, if unknown."""
    origins = [
        (manifest.dataset.get("fingerprint"), manifest.dataset.get("formatting"))
        for manifest in manifests
    ]
    path = asked
    reason = ""
    if (
        not origins
        or origins[0][0] in (None, UNKNOWN)
        or not isinstance(origins[0][1], dict)
    ):
        reason = "the cache does not record its dataset and formatting"
    elif any(origin != origins[0] for origin in origins):
        reason = "its chunks were made from several datasets"
    elif asked is None:
        path = str(manifests[0].dataset["path"])
        if not Path(path).is_file():
            reason = f"the dataset {path} is not here; give it with --dataset"
    if (
        not reason
        and path is not None
        and JsonlRecords(path).fingerprint() != origins[0][0]
    ):
        reason = f"{path} has changed since the cache was made; give the old one with --dataset"
        if asked is not None:
            reason = (
                "its checksum differs from that of the file that the cache was made from"
            )
    if reason and asked is not None:
        raise CacheError(
            f"--dataset: {asked} cannot be compared with the cache: {reason}"
        )
    if reason:
        checks.not_checked.append(f"the tokens: {reason}")
        return None
    formatting: dict[str, Any] = dict(origins[0][1] or {})
    markers = _known(ChatPromptTokens, formatting.pop("chat_prompt_tokens", {}))
    settings = _known(DatasetConfig, formatting) | {"file_path": path}
    return DataConfig(
        chat_prompt_tokens=ChatPromptTokens(**markers), data=DatasetConfig(**settings)
    )


def _known(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in dataclasses.fields(cls)}
    return {name: value for name, value in settings.items() if name in names}


def _difference(dataset: TokenizedDataset, example: Example) -> str:
    """Describe the first difference between a cached example and its record; empty if none."""
    if not 0 <= example.index < len(dataset):
        return f"the dataset has no record {example.index}"
    try:
        record = dataset[example.index]
    except DataError as error:
        return str(error)
    if isinstance(record, Skipped):
        return f"the record is skipped ({record.reason})"
    length = min(example.num_tokens, record.num_tokens)
    for name in ("tokens", "labels", "loss_mask"):
        cached = getattr(example, f"{name}_S")[:length]
        expected = getattr(record, f"{name}_S")[:length]
        differs = np.flatnonzero(cached != expected)
        if len(differs):
            first = differs[0]
            shown = [int(values[first]) for values in (cached, expected)]
            if name != "loss_mask":
                shown = dataset.tokenizer.convert_ids_to_tokens(shown)
            return (
                f"{name} from position {first} on: {shown[0]!r} in the cache, "
                f"{shown[1]!r} from the record"
            )
    # A row ends with its last loss position.
    if example.num_tokens > record.num_tokens or record.loss_mask_S[length:].any():
        return f"{example.num_tokens} positions in the cache, {record.num_tokens} from the record"
    return ""
