"""Join fields of a record to a text whose last field is trained."""

from __future__ import annotations

import string
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_kd.config import ConfigError, DataError
from nemo_kd.config.data import DatasetConfig
from nemo_kd.data.tokenizer import encode_continuation

BUILT_IN_TEMPLATES = {
    "alpaca": (
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}",
        "output",
    ),
    "alpaca without input": (
        "### Instruction:\n{instruction}\n\n### Response:\n{output}",
        "output",
    ),
    "text": ("{text}", "text"),
}
"""Templates of formats other than prompt_template, with the field that is trained."""


class PromptTemplate:
    """A template, for example "{input} {output}", whose last field, the answer, is trained.

    Prompt and answer are tokenized apart, so the start of the answer does not depend on the prompt.
    Spaces between the two belong to the answer's first token, as tokenizers expect.

    Raises:
        ConfigError: the template is malformed or does not end with the field `label_key`.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        try:
            parts = list(string.Formatter().parse(config.prompt_template))
        except ValueError:
            parts = []
        fields = [name for _, name, _, _ in parts]
        if fields.count(config.label_key) != 1 or fields[-1] != config.label_key:
            raise ConfigError(
                f"{config.KEY}.prompt_template: {config.prompt_template!r} must be text with fields "
                f"and end with the field of {config.KEY}.label_key, {{{config.label_key}}}, the "
                "only time that it occurs"
            )
        *before, last = [(literal, name) for literal, name, _, _ in parts]
        self._parts = [*before, (last[0].rstrip(" "), None)]
        self._spaces = last[0][len(last[0].rstrip(" ")) :]
        self._cuttable = [name.strip() for name in config.truncation_field.split(",")]

    def render(
        self,
        record: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> tuple[list[int], list[bool]]:
        """Return token ids, and True for the trained ones; cut prompt fields to fit `max_length`.

        Raises:
            DataError: a field is missing or not a text, or the tokenizer lacks a special token.
        """
        start, separator, end = (
            self._special(tokenizer, name) for name in ("bos", "sep", "eos")
        )
        text = self._spaces + self._text(record, self.config.label_key)
        trained = encode_continuation(tokenizer, text) + end
        room = max_length - len(start) - len(separator) - len(trained)
        context = [*start, *self._encode_prompt(record, tokenizer, room), *separator]
        return context + trained, [False] * len(context) + [True] * len(trained)

    def _text(self, record: dict[str, Any], name: str) -> str:
        value = record.get(name)
        if not isinstance(value, str):
            raise DataError(
                f"the field `{name}` of {self.config.KEY}.prompt_template must be a text, found "
                f"{str(value)[:80]!r} in a record with the fields {', '.join(record)}"
            )
        return value

    def _special(self, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
        if not getattr(self.config, f"add_{name}"):
            return []
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is None:
            raise DataError(
                f"{self.config.KEY}.add_{name}=True, but the tokenizer has no {name} token"
            )
        return [int(token_id)]

    def _encode_prompt(
        self, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, room: int
    ) -> list[int]:
        """Return the prompt's ids, without the tokens of cuttable fields that exceed `room`."""
        text = ""
        fields: list[str | None] = []  # of every character
        for literal, name in self._parts:
            value = "" if name is None else self._text(record, name)
            text += literal + value
            fields += [None] * len(literal) + [name] * len(value)
        encoding = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True
        )
        ids: list[int] = encoding["input_ids"]
        excess = len(ids) - max(room, 0)
        if excess <= 0:
            return ids
        cut: set[int] = set()
        for name in self._cuttable:
            inside = [
                position
                for position, (first, last) in enumerate(encoding["offset_mapping"])
                if {*fields[first:last]} == {name}
            ]
            if self.config.truncation_method == "right":
                inside.reverse()
            cut.update(inside[: excess - len(cut)])
        return [
            token_id for position, token_id in enumerate(ids) if position not in cut
        ]
