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
