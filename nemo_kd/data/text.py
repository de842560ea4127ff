"""Tokens and examples as text.

Token text never holds invisible characters, control characters or broken UTF-8.

Shape legend: K kept tokens, P loss positions with teacher targets, S positions of the example.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample, Example
from nemo_kd.terminal import printable

MARKS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
TEXT_ALTERNATIVES = 5
PROMPT_CHARACTERS = 1000
_SENTENCEPIECE_SPACE = "▁"
_ESCAPED_BYTES = re.compile("[\udc80-\udcff]+")


class TokenText:
    """Bytes and visible text of token ids; `#id` without a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, str] = {}
        self._byte_level = False
        self._sentencepiece = False
        if tokenizer is not None:
            added = tokenizer.added_tokens_decoder.items()
            self._added = {token_id: token.content for token_id, token in added}
            decoder = tokenizer.backend_tokenizer.decoder
            kind = "" if decoder is None else decoder.__getstate__().decode()
            self._byte_level = '"ByteLevel"' in kind
            self._sentencepiece = _SENTENCEPIECE_SPACE in kind or '"Metaspace"' in kind

    def raw(self, token_id: int) -> bytes:
        """Return the bytes of a token, which need not be whole characters."""
        if self._tokenizer is None:
            return f"#{token_id} ".encode()
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.convert_ids_to_tokens(int(token_id))
        if piece is None:
            return f"#{token_id}".encode()  # padding of the vocabulary
        if self._byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        if self._sentencepiece:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes.fromhex(piece[3:5])
            piece = piece.replace(_SENTENCEPIECE_SPACE, " ")
        return piece.encode()

    def visible(self, token_id: int, pending: bytes = b"") -> str:
        """Return the token on one line, with marks for blanks and line breaks.

        Args:
            pending: first bytes of a character that the token may complete.
        """
        if self._tokenizer is None:
            return f"#{token_id}"
        return marked(decoded(pending, self.raw(token_id))[0])

    def of(self, token_ids: Sequence[int], pending: bytes = b"") -> str:
        """Return the text of consecutive tokens; `pending` as in `visible`."""
        return decoded(pending, b"".join(map(self.raw, token_ids)))[0]

    def along(self, token_ids: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """Yield (text, pending bytes before it) for each of several consecutive tokens."""
        pending = b""
        for token_id in token_ids:
            text, unfinished = decoded(pending, self.raw(token_id))
            yield text, pending
            pending = unfinished


def decoded(pending: bytes, raw: bytes) -> tuple[str, bytes]:
    """Return the text of a token that follows `pending`, and the unfinished character at its end.

    Bytes of a broken or unfinished character become `⟨E2 82⟩`, invisible characters `\\x1b` and
    `\\u200b`. Blanks and line breaks stay.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(pending + raw)
    unfinished = decoder.getstate()[0]
    text = (pending + raw).decode(errors="surrogateescape")
    if pending and _ESCAPED_BYTES.match(text):
        text = text[len(pending) :]  # pending bytes were shown with the token before
    text = _ESCAPED_BYTES.sub(
        lambda run: f"⟨{run[0].encode(errors='surrogateescape').hex(' ').upper()}⟩", text
    )
    return printable(text, "".join(MARKS)), unfinished


def marked(text: str) -> str:
    """Return the text on one line, with marks for blanks and line breaks."""
    return "".join(MARKS.get(character, character) for character in text)


def _byte_level_alphabet() -> dict[str, int]:
    """Return the bytes behind the characters of GPT-2's byte-level vocabularies.

    Printable Latin-1 stands for itself; the other bytes are numbered from U+0100 on.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    alphabet = {chr(byte): byte for byte in printed}
    return alphabet | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


@dataclass(frozen=True)
class LossPositions:
    """The teacher's answer at the loss positions of a row, in float64.

    Positions without teacher targets are left out.

    Attributes:
        position_P: index of the position in the row.
        ids_PK: kept ids, likeliest first; unused entries stand last and are -1.
        probability_PK: probability of the kept ids; 0 in unused entries.
        tail_mass_P: probability outside the kept ids.
        entropy_P: entropy in nats, with one bucket for the tail: a lower bound.
        label_rank_P: rank of the label among the kept ids, from 1; 0 if it is not kept.
        label_logprob_P: nats; NaN if it is neither stored nor kept.
    """

    position_P: np.ndarray
    ids_PK: np.ndarray
    probability_PK: np.ndarray
    tail_mass_P: np.ndarray
    entropy_P: np.ndarray
    label_rank_P: np.ndarray
    label_logprob_P: np.ndarray

    @classmethod
    def of(cls, row: CachedExample) -> LossPositions:
        teacher = row.loss_rows()
        teacher = teacher.at(teacher.topk_token_ids_PK[:, 0] >= 0)
        position_P = teacher.positions_P
        ids_PK = teacher.topk_token_ids_PK
        logits_PK = teacher.topk_logits_PK.astype(np.float64)
        logprob_PK = logits_PK - teacher.log_sum_exp_logits_P[:, None]
        logprob_PK = np.where(ids_PK >= 0, logprob_PK, -np.inf)
        tail_mass_P = teacher.tail_mass_PT[:, 0].astype(np.float64)
        masses_PK = np.column_stack([np.exp(logprob_PK), tail_mass_P])
        nats_PK = -np.log(np.where(masses_PK > 0, masses_PK, 1))
        is_label_PK = ids_PK == row.example.labels_S[position_P, None]
        is_kept_P = is_label_PK.any(axis=1)
        kept_logprob_P = np.where(is_label_PK, logprob_PK, 0).sum(axis=1)
        label_logprob_P = np.where(is_kept_P, kept_logprob_P, np.nan)
        if teacher.label_logprobs_P is not None:
            stored_P = teacher.label_logprobs_P.astype(np.float64)
            label_logprob_P = np.where(np.isnan(stored_P), label_logprob_P, stored_P)
        return cls(
            position_P=position_P,
            ids_PK=ids_PK,
            probability_PK=masses_PK[:, :-1],
            tail_mass_P=tail_mass_P,
            # Rounding can put a certain teacher's entropy slightly below 0.
            entropy_P=np.maximum((masses_PK * nats_PK).sum(axis=1), 0),
            label_rank_P=np.where(is_kept_P, is_label_PK.argmax(axis=1) + 1, 0),
            label_logprob_P=label_logprob_P,
        )

    @property
    def num_kept_P(self) -> np.ndarray:
        return (self.ids_PK >= 0).sum(axis=1)

    def alternatives(self, p: int, most: int) -> list[tuple[int, float]]:
        """Return (id, probability) of the likeliest kept tokens at the p-th position."""
        pairs = zip(
            self.ids_PK[p, :most].tolist(), self.probability_PK[p].tolist(), strict=False
        )
        return [
            (token_id, probability) for token_id, probability in pairs if token_id >= 0
        ]


def text_ids(row: CachedExample) -> list[int]:
    """Return the row's tokens and its last label: position s predicts token s + 1."""
    example = row.example
    ids = np.append(example.tokens_S, example.labels_S[-1])
    in_loss = np.append(0, example.loss_mask_S) > 0
    # Labels outside the loss may be anything.
    return np.where(in_loss, np.append(0, example.labels_S), ids).tolist()


def example_lines(
    row: CachedExample, text: TokenText, num_positions: int | None = None
) -> list[str]:
    """Describe a row: its prompt in one line, a header, then a line per loss position."""
    found = LossPositions.of(row)
    token_ids = text_ids(row)
    first = (
        int(found.position_P[0]) if len(found.position_P) else row.example.num_tokens - 1
    )
    prompt = marked(text.of(token_ids[: first + 1])).replace(MARKS[" "], " ")
    if len(prompt) > PROMPT_CHARACTERS:
        prompt = f"… {prompt[-PROMPT_CHARACTERS:]}"
    lines = [
        f"before the first: {prompt}",
        "position  label            probability rank entropy   tail  the teacher's likeliest",
    ]
    pieces = list(text.along(token_ids))
    for p, s in enumerate(found.position_P[:num_positions].tolist()):
        _, pending = pieces[s + 1]
        label = text.visible(int(row.example.labels_S[s]), pending)
        alternatives = "  ".join(
            f"{text.visible(token_id, pending)} {share(probability)}"
            for token_id, probability in found.alternatives(p, TEXT_ALTERNATIVES)
        )
        lines.append(
            f"{s:>8}  {label:<16} {share(float(np.exp(found.label_logprob_P[p]))):>11} "
            f"{found.label_rank_P[p] or '-':>4} {found.entropy_P[p]:>7.2f} "
            f"{share(found.tail_mass_P[p]):>6}  {alternatives}"
        )
    return lines


def trained_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the example's text with every trained stretch between « and »."""
    parts: list[str] = [tokenizer.decode(example.tokens_S[:1])]
    edges = np.flatnonzero(np.diff(example.loss_mask_S)) + 1
    labels = np.split(example.labels_S, edges)
    for stretch, mask in zip(labels, np.split(example.loss_mask_S, edges), strict=True):
        text = tokenizer.decode(stretch)
        parts.append(f"«{text}»" if mask[0] else text)
    return "".join(parts)


def share(probability: float) -> str:
    """Format a probability as percent with at most three digits."""
    percent = 100 * float(probability)
    if math.isnan(percent):
        return "?"
    if 0 < percent < 0.01:
        return "<.01%"
    num_digits = 0 if percent == 0 or percent >= 99.95 else 1 if percent >= 1 else 2
    return f"{percent:.{num_digits}f}%"
