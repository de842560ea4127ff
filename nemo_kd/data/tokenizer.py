"""Tokenizers from local folders, and what identifies them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import orjson
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_kd.data.records import DataError


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; nothing is downloaded and no code from the folder runs.

    Raises:
        DataError: the folder holds no tokenizer that transformers can load.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder; a tokenizer is read from the folder of its model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{folder}: no usable tokenizer ({reason}); save one there with tokenizer.save_pretrained(folder)"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"{folder}: the tokenizer has no tokenizer.json (fast tokenizer); convert it with transformers")
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary with its ids, added tokens included: equal for tokenizers whose ids mean the same."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return f"sha256:{hashlib.sha256(orjson.dumps(vocabulary)).hexdigest()}"


def chat_template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of the chat template; None without one."""
    if not tokenizer.chat_template:
        return None
    return f"sha256:{hashlib.sha256(orjson.dumps(tokenizer.chat_template)).hexdigest()}"


def padding_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """A token id of the model to fill positions with that never count: padding, else end of sequence, else 0.

    Some tokenizers have a padding token that their model has no embedding for.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int) and token_id < vocab_size:
            return token_id
    return 0


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text from its beginning, without special tokens of the tokenizer's own."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that continues another one.

    SentencePiece tokenizers (Llama 1 and 2, Mistral) put a space before every text, which does not belong there. Behind
    a line break they put none before `text`; where the two would share a token, no space is put anyway.
    """
    encoding = tokenizer(f"\n{text}", add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoding["offset_mapping"]
    first = next((position for position, (_, end) in enumerate(offsets) if end > 1), len(offsets))
    if first < len(offsets) and offsets[first][0] < 1:
        return encode(tokenizer, text)
    return list(encoding["input_ids"][first:])
