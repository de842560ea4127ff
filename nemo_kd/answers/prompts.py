"""Questions of a dataset: prompts, right answers, and the tokens that end a response.

Shape legend: S positions of an example.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.answers.checkers import ground_truth
from nemo_kd.batch import Example
from nemo_kd.config import DataError
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.data.formats import last_role
from nemo_kd.data.tokenizer import special_ids

log = logging.getLogger(__name__)

END_TOKENS = 8
USERS = ("user", "human")


@dataclass(frozen=True)
class Question:
    """A prompt to answer.

    Attributes:
        index: of the record in its dataset.
        prompt_ids: tokens before the record's last trained turn.
        answer: the right one; None if nothing is checked.
        reference: text of that turn, without special tokens.
    """

    index: int
    prompt_ids: list[int]
    answer: str | None = None
    reference: str = ""


def first_examples(
    dataset: TokenizedDataset, wanted: int | None, key: str
) -> tuple[list[Example], Counter[str]]:
    """Return the first examples of a dataset, `wanted` or all, and how many records were skipped
    by reason, with a warning.

    Args:
        key: names the file, for messages.

    Raises:
        DataError: there is none.
    """
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    for index in dataset.indices:
        if len(examples) == wanted:
            break
        found = dataset[index]
        if isinstance(found, str):
            skipped[found] += 1
        else:
            examples.append(found)
    path = dataset.records.name
    for reason, count in skipped.items():
        log.warning(
            "warning: %s: %s: %d records skipped: %s", key, path, count, reason
        )
    if not examples:
        raise DataError(
            f"{key}: {path}: none of the records can be evaluated; raise model.max_seq_length (now "
            f"{dataset.max_seq_length}), or correct {dataset.config.data.KEY}.format and the roles: "
            "only turns of the assistant with content count. A chat that ends with its question "
            "needs one more turn of the assistant, for example with the right answer"
        )
    return examples, skipped


def question_of(
    dataset: TokenizedDataset, example: Example, answer_field: str | None
) -> Question:
    """Return the question that an example of `dataset` asks.

    Raises:
        DataError: the record has no right answer in `answer_field`, or its last turn is the user's.
    """
    answer = None
    record = dataset.records[example.index]
    where = dataset.records.where(example.index)
    if last_role(record, dataset.config.data) in USERS:
        raise DataError(
            f"{where}: the last turn is the user's, but the prompt of a record ends before the "
            "last turn of the assistant, and this question would stay out; add a turn of the "
            "assistant, for example with the right answer"
        )
    if answer_field is not None:
        try:
            answer = ground_truth(record, answer_field)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if answer is None:
            raise DataError(
                f"{where}: the field {answer_field!r}, which must hold the right answer, is missing "
                f"or empty; the record has the fields {', '.join(record)}"
            )
    turn_ids = example.labels_S[slice(*_last_turn(example))]
    reference = dataset.tokenizer.decode(turn_ids, skip_special_tokens=True).strip()
    return Question(example.index, prompt_ids(example), answer, reference)


def prompt_ids(example: Example) -> list[int]:
    """Return the tokens before the last trained stretch of an example."""
    first, _ = _last_turn(example)
    return example.tokens_S[: first + 1].tolist()


def stop_ids(
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    eos_ids: Iterable[int] = (),
) -> frozenset[int]:
    """Return the tokens that end a response; warn if no example has one.

    Args:
        examples: an added token that ends the last trained turn of one of them is a stop token.
        eos_ids: the model's own (`PretrainedModel.eos_token_ids`), besides the tokenizer's.
    """
    found = set(eos_ids)
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    # Some tokenizers have runs of spaces as added tokens.
    added = {
        token
        for token, added_token in tokenizer.added_tokens_decoder.items()
        if added_token.content.strip()
    }
    added.update(special_ids(tokenizer))
    turn_ids: list[int] = []
    has_end = False
    for example in examples:
        turn_ids = example.labels_S[slice(*_last_turn(example))].tolist()
        places = [place for place, one in enumerate(turn_ids) if one in added]
        # Some templates train the line break after it as well.
        if places and not tokenizer.decode(turn_ids[places[-1] + 1 :]).strip():
            found.add(turn_ids[places[-1]])
        has_end |= not found.isdisjoint(turn_ids)
    if turn_ids and not has_end:
        log.warning(
            "warning: no trained turn of the dataset has a token that ends a response; the last one "
            "ends with %r. Responses may run to max_new_tokens",
            tokenizer.decode(turn_ids[-END_TOKENS:]),
        )
    return frozenset(found)


def _last_turn(example: Example) -> tuple[int, int]:
    """Return the bounds of the last trained stretch, as positions of labels."""
    trained_S = example.loss_mask_S > 0
    edges = np.flatnonzero(np.diff(trained_S, prepend=False, append=False))
    return int(edges[-2]), int(edges[-1])
