"""Load tokenizers from local folders, fingerprint and compare them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import orjson
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_kd.config import ConfigError
from nemo_kd.config.model import MOST_LAYERS
from nemo_kd.data.records import DataError
from nemo_kd.nemo_archive import (
    MAX_TOKENIZER_BYTES,
    ArchiveError,
    check_regular_file,
    open_tokenizer,
    read_json,
)

MAX_TEMPLATE_BYTES = 1 << 20
BLOCK_IDS = 1024


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder`; download nothing and run no code from the folder.

    Raises:
        DataError: the folder holds no tokenizer that transformers can load, or a damaged file.
    """
    if not Path(folder).is_dir():
        raise DataError(
            f"{folder}: no such folder; a tokenizer is read from the folder of its model"
        )
    _check_files(Path(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what the tokenizers library raises has no other class
        raise _unusable(folder, error) from error
    except BaseException as error:
        if (
            type(error).__name__ != "PanicException"
        ):  # of Rust code, which Python cannot name
            raise
        raise _unusable(folder, error) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"{folder}: the tokenizer has no tokenizer.json (fast tokenizer); convert it with "
            "transformers"
        )
    templates = tokenizer.chat_template
    texts = list(templates.values()) if isinstance(templates, dict) else [templates or ""]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{folder}: tokenizer_config.json: chat_template: found {str(templates)[:80]!r}, "
            "expected a text"
        )
    return tokenizer


def load_tokenizer_of(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder, in a model's folder, or in a .nemo archive.

    Raises:
        ConfigError: the path holds no tokenizer.
        DataError: the tokenizer cannot be loaded.
    """
    try:
        with open_tokenizer(Path(path).expanduser()) as folder:
            return load_tokenizer(folder)
    except ArchiveError as error:
        raise ConfigError(f"--tokenizer: {error}") from error


def _unusable(folder: str | Path, error: BaseException) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return DataError(
        f"{folder}: no usable tokenizer ({reason}); save one there with "
        "tokenizer.save_pretrained(folder)"
    )


def _check_files(folder: Path) -> None:
    """Refuse damaged files before transformers reads them without bounds or file names in errors.

    Raises:
        DataError: names the file.
    """
    names = (
        "tokenizer_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
    )
    templates = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path in [folder / name for name in (*names, "config.json")]:
        if path.exists() or path.is_symlink():
            content = read_json(path, MAX_TOKENIZER_BYTES, DataError)
            if path.name == "config.json":
                _check_config(path, content)
    for path in [folder / "tokenizer.model", folder / "chat_template.jinja", *templates]:
        if path.exists() or path.is_symlink():
            check_regular_file(path, DataError)
            if path.suffix == ".jinja" and path.stat().st_size > MAX_TEMPLATE_BYTES:
                raise DataError(
                    f"{path}: {path.stat().st_size:,} bytes, more than a chat template ever has"
                )


def _check_config(path: Path, content: dict[str, Any]) -> None:
    """Bound the number of layers: transformers makes lists of that length to find the class."""
    num_layers = content.get("num_hidden_layers")
    if num_layers is not None and (
        type(num_layers) is not int or not 0 < num_layers <= MOST_LAYERS
    ):
        raise DataError(
            f"{path}: num_hidden_layers: found {str(num_layers)[:80]}, expected an integer from 1 "
            f"to {MOST_LAYERS:,}"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the vocabulary with its ids and added tokens: equal if all ids mean the same."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return f"sha256:{hashlib.sha256(orjson.dumps(vocabulary)).hexdigest()}"


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hash everything besides the vocabulary that decides how text becomes ids.

    Hashes of the loaded tokenizer, not of its files: what transformers rewrites when it saves them
    (names, versions, order, notation) does not count.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = dict(content["model"])
    vocabulary = model.pop("vocab", None)
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in model.pop("merges", None) or []
    ]
    if isinstance(vocabulary, list):  # Unigram: scores decide
        model["scores"] = vocabulary
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = {
        "model": model,
        "merges": merges,
        "added_tokens": content.get("added_tokens"),
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content.get("pre_tokenizer"),
        "post_processor": content.get("post_processor"),
        "special_tokens": special,
    }
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]
        for name, part in parts.items()
    }


def describe_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Describe the vocabulary so that another tokenizer can name the first ids that differ.

    Holds the added tokens by id, and a short hash per 1,024 ids of the vocabulary without them.
    """
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    by_block: dict[int, list[tuple[int, str]]] = {}
    for token, token_id in vocabulary.items():
        by_block.setdefault(token_id // BLOCK_IDS, []).append((token_id, token))
    blocks = [
        hashlib.sha256(orjson.dumps(sorted(by_block.get(number, [])))).hexdigest()[:12]
        for number in range(1 + max(by_block, default=-1))
    ]
    added = {
        str(token_id): token.content
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    return {"size": len(vocabulary), "added": added, "blocks": blocks}


def token_differences(
    described: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Name the first ids whose tokens differ between a cache's tokenizer and `tokenizer`.

    Two classes of transformers may load the same tokenizer.json with different added tokens: ids
    that only one of them has do not count.
    """
    ours = describe_tokens(tokenizer)
    found = []
    if not all(
        isinstance(described.get(name), type(value)) for name, value in ours.items()
    ) or not all(
        token_id.isascii() and token_id.isdigit() and len(token_id) < 10
        for token_id in described["added"]
    ):
        return ["the manifest's tokenizer_tokens are damaged; restore it"]
    for token_id, theirs in described["added"].items():
        token = tokenizer.convert_ids_to_tokens(int(token_id))
        if token is not None and token != theirs:
            found.append(
                f"id {token_id}: {theirs!r} in the cache, {token!r} in the student"
            )
    if described["size"] != ours["size"]:
        found.append(
            f"the vocabulary without added tokens: {described['size']:,} in the cache, "
            f"{ours['size']:,} here"
        )
    same_size = described["size"] == ours["size"]
    common_ids = min(described["size"], ours["size"])
    for number, (theirs_hash, our_hash) in enumerate(
        zip(described["blocks"], ours["blocks"], strict=False)
    ):
        first = number * BLOCK_IDS
        is_common = same_size or first + BLOCK_IDS <= common_ids
        if is_common and theirs_hash != our_hash:
            last = min(first + BLOCK_IDS, common_ids) - 1
            found.append(f"a token among the ids {first} to {last}")
            break
    return found[:4]


def chat_template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash the chat template; None without one."""
    if not tokenizer.chat_template:
        return None
    return f"sha256:{hashlib.sha256(orjson.dumps(tokenizer.chat_template)).hexdigest()}"


def padding_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Return the model's id for filler positions: padding, else end of sequence, else 0.

    Some tokenizers have a padding token without an embedding in their model.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int) and token_id < vocab_size:
            return token_id
    return 0


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text, without special tokens that the tokenizer would add."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text that continues another one.

    SentencePiece tokenizers (Llama 1 and 2, Mistral) put a space before every text, which does not
    belong here. After a line break they put none before `text`; if the two would share a token,
    they put none anyway.
    """
    encoding = tokenizer(
        f"\n{text}", add_special_tokens=False, return_offsets_mapping=True
    )
    offsets = encoding["offset_mapping"]
    first = next(
        (position for position, (_, end) in enumerate(offsets) if end > 1), len(offsets)
    )
    if first < len(offsets) and offsets[first][0] < 1:
        return encode(tokenizer, text)
    return list(encoding["input_ids"][first:])
