"""Tokens and examples as text. Text of tokens never holds invisible or control characters.

Shape legend: K kept tokens, P loss positions with teacher targets, S positions of the example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample, Example
from nemo_kd.terminal import printable

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


@dataclass(frozen=True)
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

    position_P: np.ndarray
    ids_PK: np.ndarray
    probability_PK: np.ndarray
    num_kept_P: np.ndarray
    tail_mass_P: np.ndarray
    entropy_P: np.ndarray
    label_rank_P: np.ndarray
    label_logprob_P: np.ndarray

    @classmethod
    def of(cls, row: CachedExample) -> LossPositions:
        teacher = row.loss_rows()
        teacher = teacher.at(teacher.topk_token_ids_PK[:, 0] >= 0)
        ids_PK = teacher.topk_token_ids_PK
        log_sum_exp_P = teacher.log_sum_exp_logits_P.astype(np.float64)
        probability_PK = np.exp(teacher.topk_logits_PK - log_sum_exp_P[:, None])
        masses_PE = np.column_stack([probability_PK, teacher.tail_mass_PT[:, 0]])
        nats_PE = -np.log(np.where(masses_PE > 0, masses_PE, 1))
        is_label_PK = ids_PK == row.example.labels_S[teacher.positions_P, None]
        logprob_P = teacher.label_logprobs_P
        return cls(
            position_P=teacher.positions_P,
            ids_PK=ids_PK,
            probability_PK=probability_PK,
            num_kept_P=(ids_PK >= 0).sum(axis=1),
            tail_mass_P=masses_PE[:, -1],
            # Rounding can put a certain teacher's entropy slightly below 0.
            entropy_P=np.maximum((masses_PE * nats_PE).sum(axis=1), 0),
            label_rank_P=is_label_PK.any(axis=1) * (is_label_PK.argmax(axis=1) + 1),
            label_logprob_P=np.full(len(teacher), np.nan)
            if logprob_P is None
            else logprob_P,
        )

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
    found = LossPositions.of(row)
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


def trained_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the example's text with every trained stretch between « and »."""
    edges = np.flatnonzero(np.diff(example.loss_mask_S > 0, prepend=False)) + 1
    stretches = np.split(text_ids(example), edges)
    texts = [tokenizer.decode(stretch) for stretch in stretches]
    return "".join(f"«{text}»" if n % 2 else text for n, text in enumerate(texts))


def share(probability: float) -> str:
    """Format a probability as percent with three digits."""
    return f"{100 * probability:.3g}%"
