"""`input`/`output` records through a prompt template; the answer is trained."""

from __future__ import annotations

import string
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_kd.config import ConfigError
from nemo_kd.config.data import DatasetConfig
from nemo_kd.data.records import DataError
from nemo_kd.data.tokenizer import encode, encode_continuation


class PromptTemplate:
    """A template such as "{input} {output}" whose last field carries the answer.

    Prompt and answer are tokenized apart, so where the answer begins does not depend on the prompt; spaces between the
    two belong to the answer's first token, as tokenizers expect.

    Raises:
        ConfigError: the template is malformed or does not end with the field `label_key`.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        parts = _parse(config.prompt_template, f"{config.KEY}.prompt_template")
        literal, last = parts[-1] if parts else ("", None)
        self.fields = [name for _, name in parts if name is not None]
        if last != config.label_key or self.fields.count(last) > 1:
            raise ConfigError(
                f"{config.KEY}.prompt_template: {config.prompt_template!r} must end with the field of {config.KEY}.label_key, "
                f"{{{config.label_key}}}, and hold it once"
            )
        self._prompt: list[tuple[str, str | None]] = [*parts[:-1], (literal.rstrip(" "), None)]
        self._joint = literal[len(literal.rstrip(" ")) :]
        named = [name.strip() for name in config.truncation_field.split(",")]
        self._cuttable = [name for name in named if name in self.fields[:-1]]

    def render(
        self, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[list[int], list[bool]]:
        """Token ids and which of them are trained; prompt fields are cut where the whole exceeds `max_length` tokens.

        Raises:
            DataError: a field is missing or no text, or a special token is asked for that the tokenizer lacks.
        """
        values = {name: self._text(record, name) for name in self.fields}
        start = [self._special(tokenizer, "bos")] if self.config.add_bos else []
        separator = [self._special(tokenizer, "sep")] if self.config.add_sep else []
        end = [self._special(tokenizer, "eos")] if self.config.add_eos else []
        answer = encode_continuation(tokenizer, self._joint + values[self.config.label_key])
        room = max_length - sum(map(len, (start, separator, answer, end)))
        context = [*start, *self._cut_prompt(values, tokenizer, room), *separator]
        trained = [*answer, *end]
        return context + trained, [False] * len(context) + [True] * len(trained)

    def _text(self, record: dict[str, Any], name: str) -> str:
        if not isinstance(record.get(name), str):
            found = (
                f"found {str(record[name])[:80]!r}"
                if name in record
                else f"the record has {', '.join(record) or 'nothing'}"
            )
            raise DataError(
                f"the field `{name}` of {self.config.KEY}.prompt_template must be a text, but {found}"
            )
        return record[name]

    def _special(self, tokenizer: PreTrainedTokenizerBase, name: str) -> int:
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is None:
            raise DataError(
                f"{self.config.KEY}.add_{name}=True, but the tokenizer has no {name} token"
            )
        return int(token_id)

    def _cut_prompt(
        self, values: dict[str, str], tokenizer: PreTrainedTokenizerBase, room: int
    ) -> list[int]:
        """The prompt's ids, with as many tokens cut from the fields that may be cut as `room` tokens ask for."""
        text, spans = "", []
        for literal, name in self._prompt:
            text += literal
            if name is not None:
                spans.append((name, len(text), len(text) + len(values[name])))
                text += values[name]
        ids = encode(tokenizer, text)
        excess = len(ids) - max(room, 0)
        if excess <= 0 or not self._cuttable:
            return ids
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        cut: set[int] = set()
        for cuttable in self._cuttable:
            inside = [
                position
                for position, (first, last) in enumerate(offsets)
                if any(
                    name == cuttable and start <= first < last <= stop
                    for name, start, stop in spans
                )
            ]
            number = min(excess - len(cut), len(inside))
            cut.update(
                inside[:number]
                if self.config.truncation_method == "left"
                else inside[len(inside) - number :]
            )
        return [token_id for position, token_id in enumerate(ids) if position not in cut]


def _parse(template: str, key: str) -> list[tuple[str, str | None]]:
    """Literal texts, each with the name of the field after it."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{key}: {template!r} is malformed ({error})") from error
    for _, name, specification, conversion in parts:
        if name == "" or specification or conversion:
            raise ConfigError(
                f"{key}: in {template!r} every field must be a plain name such as {{input}}"
            )
    return [(literal, name) for literal, name, _, _ in parts]
