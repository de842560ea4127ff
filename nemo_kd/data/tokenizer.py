"""Load tokenizers, fingerprint and compare them; show tokens and examples as text.

Text of tokens never holds invisible or control characters.

Shape legend: K kept tokens, P loss positions with teacher targets, S positions of the example.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample, Example
from nemo_kd.config import DataError
from nemo_kd.files import printable
from nemo_kd.nemo_archive import ModelFiles

BLOCK_IDS = 1024


def load_tokenizer(
    folder: str | Path, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder`; download nothing and run no code from the folder.

    Args:
        chat_template: file with a chat template that replaces the tokenizer's.

    Raises:
        DataError: the folder holds no tokenizer that transformers can load, or a damaged file; or
            the chat template cannot be read.
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
    if chat_template is not None:
        use_chat_template(tokenizer, chat_template)
    return tokenizer


def use_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Replace the tokenizer's chat template by a file's.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"chat_template: {path} is not a readable text file: {error}"
        ) from error


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
    """Describe the vocabulary so that another tokenizer can be compared with it.

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


def shares_ids(described: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the ids of a cache's tokenizer and of `tokenizer` mean the same.

    Two classes of transformers may load the same tokenizer.json with different added tokens: ids
    that only one of them has do not count.
    """
    ours = describe_tokens(tokenizer)
    if any(described[name] != ours[name] for name in ("size", "blocks")):
        return False
    return all(
        tokenizer.convert_ids_to_tokens(int(token_id)) in (None, token)
        for token_id, token in described["added"].items()
    )


def chat_template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash the chat template; None without one."""
    if not tokenizer.chat_template:
        return None
    return (
        f"sha256:{hashlib.sha256(orjson.dumps(tokenizer.chat_template)).hexdigest()}"
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of special tokens."""
    special = {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    return special | set(tokenizer.all_special_ids)


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


MARKS = str.maketrans({" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"})
BLANKS = " \n\r\t"
TEXT_ALTERNATIVES = 5
PROMPT_CHARACTERS = 1000


@dataclass(frozen=True)
class TokenText:
    """Text of token ids; `#id` without a tokenizer."""

    tokenizer: PreTrainedTokenizerBase | None

    def visible(self, token_id: int) -> str:
        """Return a token on one line, with marks for blanks and line breaks."""
        piece = self.tokenizer and self.tokenizer.convert_ids_to_tokens(token_id)
        if self.tokenizer is None or piece is None:  # padding of the vocabulary
            return f"#{token_id}"
        text = self.tokenizer.decode([token_id])
        if piece.startswith("▁"):  # SentencePiece's space, which decoding strips
            text = f" {text.lstrip(' ')}"
        return printable(text, BLANKS).translate(MARKS)

    def along(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each of several consecutive tokens; "…" for a token that ends inside
        a character, which the next ones complete."""
        if self.tokenizer is None:
            return [f"#{token_id} " for token_id in token_ids]
        stream = DecodeStream(skip_special_tokens=False)
        backend = self.tokenizer.backend_tokenizer
        steps = (stream.step(backend, token_id) for token_id in token_ids)
        return [printable(step or "…", BLANKS) for step in steps]


class LossPositions:
    """The teacher's answer at the loss positions of a row, in float64.

    Positions without teacher targets are left out.

    Attributes:
        position_P: index of the position in the row.
        ids_PK: kept ids, likeliest first; unused entries stand last and are -1.
        probability_PK: probability of the kept ids; 0 in unused entries.
        num_kept_P: how many ids are kept.
        tail_mass_P: probability outside the kept ids.
        entropy_P: entropy in nats, with one bucket for the tail: a lower bound.
        label_rank_P: rank of the label among the kept ids, from 1; 0 if it is not kept.
        label_logprob_P: nats; NaN if it is not stored.
    """

    def __init__(self, row: CachedExample) -> None:
        teacher = row.loss_rows()
        teacher = teacher.at(teacher.topk_token_ids_PK[:, 0] >= 0)
        ids_PK = teacher.topk_token_ids_PK
        log_sum_exp_P = teacher.log_sum_exp_logits_P.astype(np.float64)
        probability_PK = np.exp(teacher.topk_logits_PK - log_sum_exp_P[:, None])
        masses_PE = np.column_stack([probability_PK, teacher.tail_mass_PT[:, 0]])
        nats_PE = -np.log(np.where(masses_PE > 0, masses_PE, 1))
        is_label_PK = ids_PK == row.example.labels_S[teacher.positions_P, None]
        logprob_P = teacher.label_logprobs_P
        if logprob_P is None:
            logprob_P = np.full(len(teacher), np.nan)
        self.position_P = teacher.positions_P
        self.ids_PK = ids_PK
        self.probability_PK = probability_PK
        self.num_kept_P = (ids_PK >= 0).sum(axis=1)
        self.tail_mass_P = masses_PE[:, -1]
        # Rounding can put a certain teacher's entropy slightly below 0.
        self.entropy_P = np.maximum((masses_PE * nats_PE).sum(axis=1), 0)
        self.label_rank_P = is_label_PK.any(axis=1) * (is_label_PK.argmax(axis=1) + 1)
        self.label_logprob_P = logprob_P

    def alternatives(self, p: int, most: int) -> list[tuple[int, float]]:
        """Return (id, probability) of the likeliest kept tokens at the p-th position."""
        number = min(most, int(self.num_kept_P[p]))
        ids = self.ids_PK[p, :number].tolist()
        return list(zip(ids, self.probability_PK[p].tolist(), strict=False))


def text_ids(example: Example) -> list[int]:
    """Return the example's tokens and its last label: position s predicts token s + 1."""
    ids = np.append(example.tokens_S, example.labels_S[-1])
    # Labels outside the loss may be anything.
    ids[1:] = np.where(example.loss_mask_S > 0, example.labels_S, ids[1:])
    return ids.tolist()


def example_lines(
    row: CachedExample, text: TokenText, num_positions: int | None = None
) -> list[str]:
    """Describe a row: its prompt in one line, a header, then a line per loss position."""
    found = LossPositions(row)
    first = (
        found.position_P[0] if len(found.position_P) else row.example.num_tokens - 1
    )
    prompt = "".join(text.along(text_ids(row.example)[: first + 1]))[
        -PROMPT_CHARACTERS:
    ]
    lines = [
        f"before the first: {prompt.replace(chr(10), '⏎')}",
        "position  label            probability rank entropy   tail  the teacher's likeliest",
    ]
    for p, s in enumerate(found.position_P[:num_positions].tolist()):
        alternatives = "  ".join(
            f"{text.visible(token_id)} {share(probability)}"
            for token_id, probability in found.alternatives(p, TEXT_ALTERNATIVES)
        )
        lines.append(
            f"{s:>8}  {text.visible(int(row.example.labels_S[s])):<16} "
            f"{share(np.exp(found.label_logprob_P[p])):>11} "
            f"{found.label_rank_P[p] or '-':>4} {found.entropy_P[p]:>7.2f} "
            f"{share(found.tail_mass_P[p]):>6}  {alternatives}"
        )
    return lines


def trained_text(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    marks: tuple[str, str] = ("«", "»"),
) -> str:
    """Return the example's text, safe for a terminal, with every trained stretch between marks."""
    edges = np.flatnonzero(np.diff(example.loss_mask_S > 0, prepend=False)) + 1
    stretches = np.split(text_ids(example), edges)
    texts = [printable(tokenizer.decode(stretch)) for stretch in stretches]
    texts[1::2] = [text.join(marks) for text in texts[1::2]]
    return "".join(texts)


def share(probability: float) -> str:
    """Format a probability as percent with three digits."""
    return f"{100 * probability:.3g}%"
