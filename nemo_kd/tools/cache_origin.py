"""Check that the teacher's tokenizer and template make the tokens of cached rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample, Example
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN, Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.config import DataError
from nemo_kd.config.data import ChatPromptTokens, DataConfig, DatasetConfig
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.data.records import open_records
from nemo_kd.data.tokenizer import (
    chat_template_fingerprint,
    tokenizer_fingerprint,
    use_chat_template,
)
from nemo_kd.mcore.checkpoint import PretrainedModel


def check_origin(
    reader: CacheReader,
    rows: dict[str, CachedExample],
    pretrained: PretrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str | None,
) -> list[str]:
    """Compare vocabularies and fingerprints, and render the records again if the dataset is there.

    Args:
        rows: by their file:line.
        dataset: path of the dataset; None: the manifest's path.

    Returns:
        Lines of the report that begin with `note:`, `not checked:` or `wrong:`.

    Raises:
        CacheError: the vocabularies differ, or `dataset` is not what the cache was made from.
    """
    manifests = reader.manifests
    vocab_size = pretrained.architecture.vocab_size
    largest = max(reader.max_token_id, reader.max_topk_id)
    sizes = {each.vocab_size for each in manifests if not is_foreign([each])}
    if largest >= vocab_size or sizes - {vocab_size}:
        raise CacheError(
            f"{reader.path}: another teacher wrote the cache: it has ids up to {largest} and a "
            f"vocabulary of {sorted(sizes)} tokens, this teacher one of {vocab_size}"
        )
    ours = {
        "teacher": pretrained.fingerprint()["weights"],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat template": chat_template_fingerprint(tokenizer),
    }
    notes = []
    for manifest in manifests:
        theirs = {
            "teacher": manifest.teacher.get("weights"),
            "tokenizer": manifest.tokenizer,
            "chat template": manifest.chat_template,
        }
        if not manifest.uses_chat_template:
            del theirs["chat template"]
        for name, found in theirs.items():
            if found in (None, UNKNOWN):
                notes.append(f"not checked: the {name}: the cache does not record it")
            elif found != ours[name]:
                kind = "note" if name == "teacher" else "wrong"
                notes.append(f"{kind}: the cache was made with another {name}")
    try:
        config = _dataset_config(manifests, dataset)
    except CacheError as error:
        if dataset is not None:
            raise
        return [*dict.fromkeys(notes), f"not checked: the tokens: {error}"]
    records = TokenizedDataset(config, tokenizer, manifests[0].seq_length, vocab_size)
    for where, row in rows.items():
        example = row.example
        if difference := _difference(example, records[example.index]):
            notes.append(f"wrong: example {example.index} ({where}): {difference}")
    return list(dict.fromkeys(notes))


def use_its_template(
    manifests: Sequence[Manifest], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Give the tokenizer the chat template that the cache was made with, if that was a file's."""
    for manifest in manifests:
        template = manifest.dataset.get("formatting", {}).get("chat_template")
        if template is not None:
            use_chat_template(tokenizer, template)


def is_foreign(manifests: Sequence[Manifest]) -> bool:
    """Return True if another program wrote the rows."""
    return any(manifest.teacher.get("name") == UNKNOWN for manifest in manifests)


def _dataset_config(manifests: Sequence[Manifest], path: str | None) -> DataConfig:
    """Return the configuration that renders the dataset.

    Raises:
        CacheError: it is not known.
    """
    datasets = [manifest.dataset for manifest in manifests]
    fingerprints = {str(one.get("fingerprint")) for one in datasets}
    if len(fingerprints) != 1 or "formatting" not in datasets[0]:
        raise CacheError("the cache does not record one dataset and its formatting")
    fingerprint = datasets[0]["fingerprint"]
    formatting = datasets[0]["formatting"]
    if formatting.get("record_function") is not None:
        # A cache may come from anyone, and only the user names code to run.
        raise CacheError(
            f"its records went through {formatting['record_function']}, which is not run for a check"
        )
    path = path or datasets[0]["path"]
    try:
        is_same = open_records(path).fingerprint == fingerprint
    except DataError:
        is_same = False
    if not is_same:
        raise CacheError(
            f"{path} is not the data of the cache; give it with --dataset"
        )
    markers = ChatPromptTokens(**formatting.get("chat_prompt_tokens", {}))
    names = {one.name for one in dataclasses.fields(DatasetConfig)} & formatting.keys()
    settings = {name: formatting[name] for name in names} | {"file_path": path}
    return DataConfig(chat_prompt_tokens=markers, data=DatasetConfig(**settings))


def _difference(example: Example, record: Example | str) -> str:
    """Describe the first difference between a cached example and its record; empty if none."""
    if isinstance(record, str) or record.num_loss_tokens != example.num_loss_tokens:
        return "its record has another number of loss tokens"
    # A row ends with its last loss position.
    for name in ("tokens_S", "labels_S", "loss_mask_S"):
        cached = getattr(example, name)
        rendered = getattr(record, name)[: len(cached)]
        if not np.array_equal(cached, rendered):
            differs = cached[: len(rendered)] != rendered
            return f"not the {name[:-2]} of its record from position {differs.argmax()} on"
    return ""
