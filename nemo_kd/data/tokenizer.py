"""Load tokenizers from local folders, fingerprint and compare them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import orjson
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_kd.data.records import DataError
from nemo_kd.nemo_archive import ModelFiles

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
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what the tokenizers library raises has no other class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DataError(
            f"{folder}: no usable tokenizer ({reason}); save one there with "
            "tokenizer.save_pretrained(folder)"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"{folder}: the tokenizer has no tokenizer.json (fast tokenizer); convert it with "
            "transformers"
        )
    return tokenizer


def load_tokenizer_of(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder, in a model's folder, or in a .nemo archive.

    Raises:
        ConfigError: the path holds no tokenizer.
        DataError: the tokenizer cannot be loaded.
    """
    with ModelFiles(Path(path).expanduser()) as files:
        return load_tokenizer(files.tokenizer_folder())


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
    special = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items()
    }
    parts = {"model": model, "merges": merges, "special_tokens": special}
    for name in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor"):
        parts[name] = content.get(name)
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[
            :16
        ]
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
    """Describe where a cache's tokenizer and `tokenizer` differ.

    Two classes of transformers may load the same tokenizer.json with different added tokens: ids
    that only one of them has do not count.
    """
    ours = describe_tokens(tokenizer)
    found = [
        f"id {token_id}: {theirs!r} in the cache, {token!r} in the student"
        for token_id, theirs in described["added"].items()
        if (token := tokenizer.convert_ids_to_tokens(int(token_id)))
        not in (None, theirs)
    ]
    if any(described[name] != ours[name] for name in ("size", "blocks")):
        found.append(
            f"the vocabulary without added tokens: {described['size']:,} in the cache, "
            f"{ours['size']:,} in the student"
        )
    return found[:4]


def chat_template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash the chat template; None without one."""
    if not tokenizer.chat_template:
        return None
    return (
        f"sha256:{hashlib.sha256(orjson.dumps(tokenizer.chat_template)).hexdigest()}"
    )


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
        (position for position, (_, end) in enumerate(offsets) if end > 1),
        len(offsets),
    )
    if first < len(offsets) and offsets[first][0] < 1:
        return encode(tokenizer, text)
    return list(encoding["input_ids"][first:])
