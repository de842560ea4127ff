"""Whether the tokens of cached rows are those that the teacher's tokenizer and template make of their records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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


@dataclasses.dataclass
class Findings:
    """What is wrong with the whole cache, with single examples (by their number in the sample), and what was not checked."""

    problems: list[str] = dataclasses.field(default_factory=list)
    wrong: dict[int, str] = dataclasses.field(default_factory=dict)
    not_checked: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)


def check_rendering(
    manifests: Sequence[Manifest],
    examples: Sequence[Example],
    teacher: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    dataset: str | None,
) -> Findings:
    """Compares fingerprints, and renders the records of the examples again where their dataset can be had.

    Args:
        teacher: fingerprint of the teacher here.
        dataset: path of the dataset; None: where the manifest says.

    Raises:
        CacheError, DataError: `dataset` is not what the cache was made from.
    """
    findings = Findings()
    if not manifests:
        findings.not_checked.append(
            "teacher, tokenizer and chat template: the cache has no manifest"
        )
    for manifest in manifests:
        _compare_fingerprints(manifest, teacher, tokenizer, findings)
    data = _data_config(manifests, dataset, findings)
    if data is not None:
        rendered = TokenizedDataset(data, tokenizer, manifests[0].seq_length, vocab_size)
        for number, example in enumerate(examples):
            difference = _difference(rendered, example)
            if difference:
                findings.wrong[number] = f"not the record's tokens: {difference}"
    for name in ("problems", "not_checked", "remarks"):  # several manifests mostly say the same
        setattr(findings, name, list(dict.fromkeys(getattr(findings, name))))
    return findings


def _compare_fingerprints(
    manifest: Manifest,
    teacher: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    findings: Findings,
) -> None:
    if manifest.teacher.get("name") == UNKNOWN:
        findings.not_checked.append(
            "the teacher's name: the cache was made from another program's files"
        )
    elif manifest.teacher.get("weights") != teacher["weights"]:
        findings.remarks.append(
            f"the cache names the teacher {manifest.teacher.get('name')!r}, whose files are not those of {teacher['name']!r}; "
            "its numbers decide"
        )
    if manifest.tokenizer == UNKNOWN:
        findings.not_checked.append("the tokenizer: the cache does not tell it")
    elif manifest.tokenizer != tokenizer_fingerprint(tokenizer):
        findings.problems.append("the cache was made with another tokenizer than the teacher's")
    uses_template = "messages" in manifest.dataset.get("formats", ["messages"])
    if not uses_template:
        return
    if manifest.chat_template is None:
        findings.not_checked.append("the chat template: the cache does not tell it")
    elif manifest.chat_template != chat_template_fingerprint(tokenizer):
        findings.problems.append(
            "the cache was rendered with another chat template than the teacher's"
        )


def _data_config(
    manifests: Sequence[Manifest], asked: str | None, findings: Findings
) -> DataConfig | None:
    """How to render the dataset's records; None where that is not known, with the reason in `findings`."""
    told = [
        {name: m.dataset.get(name) for name in ("fingerprint", "formatting")} for m in manifests
    ]
    reason = ""
    if (
        not told
        or not isinstance(told[0]["formatting"], dict)
        or told[0]["fingerprint"] in (None, UNKNOWN)
    ):
        reason = "the cache does not tell its dataset and formatting"
    elif any(other != told[0] for other in told):
        reason = "its chunks were made from several datasets"
    if reason:
        if asked is not None:
            raise CacheError(f"--dataset: {asked} cannot be compared with the cache: {reason}")
        findings.not_checked.append(f"the tokens: {reason}")
        return None
    path = asked if asked is not None else str(manifests[0].dataset["path"])
    if asked is None and not Path(path).is_file():
        findings.not_checked.append(
            f"the tokens: the dataset {path} is not here; give it with --dataset"
        )
        return None
    if JsonlRecords(path).fingerprint() != told[0]["fingerprint"]:
        if asked is not None:
            raise CacheError(
                f"--dataset: {path} is not the file that the cache was made from: its checksum differs"
            )
        findings.not_checked.append(
            f"the tokens: {path} has changed since the cache was made; give the old one with --dataset"
        )
        return None
    formatting = dict(told[0]["formatting"] or {})
    markers = _known(ChatPromptTokens, formatting.pop("chat_prompt_tokens", {}))
    return DataConfig(
        chat_prompt_tokens=ChatPromptTokens(**markers),
        data=DatasetConfig(**(_known(DatasetConfig, formatting) | {"file_path": path})),
    )


def _known(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in settings.items() if name in names}


def _difference(dataset: TokenizedDataset, example: Example) -> str:
    """How the cached example differs from what its record makes now; empty where it does not."""
    if not 0 <= example.index < len(dataset):
        return f"the dataset has no record {example.index}"
    try:
        record = dataset[example.index]
    except DataError as error:
        return str(error)
    if isinstance(record, Skipped):
        return f"the record is skipped ({record.reason})"
    length = example.num_tokens
    names = dataset.tokenizer.convert_ids_to_tokens
    for name, cached_S, record_S in (
        ("tokens", example.tokens_S, record.tokens_S),
        ("labels", example.labels_S, record.labels_S),
        ("loss_mask", example.loss_mask_S, record.loss_mask_S),
    ):
        shared = min(length, len(record_S))
        differs = np.flatnonzero(cached_S[:shared] != record_S[:shared])
        if len(differs):
            found, expected = int(cached_S[differs[0]]), int(record_S[differs[0]])
            shown = (found, expected) if name == "loss_mask" else (names(found), names(expected))
            return f"{name} from position {differs[0]} on: {shown[0]!r} in the cache, {shown[1]!r} from the record"
    # A row ends with its last loss position.
    if length > record.num_tokens or record.loss_mask_S[length:].any():
        return f"{length} positions in the cache, {record.num_tokens} from the record"
    return ""
