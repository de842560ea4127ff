"""`input`/`output` records through a prompt template; the answer is trained."""

from __future__ import annotations

import string
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_kd.config import ConfigError
from nemo_kd.config.data import DatasetConfig
from nemo_kd.data.records import DataError


class PromptTemplate:
    """A template such as "{input} {output}" whose last field carries the answer.

    Prompt and answer are tokenized apart, so the first answer token is the same whatever the prompt; the text between
    the last prompt field and the answer belongs to the answer's first token, as byte-level tokenizers expect.

    Raises:
        ConfigError: the template is malformed or does not end with the field `label_key`.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        template = config.prompt_template
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ConfigError(f"data.data.prompt_template: {template!r} is malformed ({error})") from error
        self.fields = [name for _, name, _, _ in parts if name is not None]
        if not self.fields or self.fields[-1] != config.label_key or not template.endswith(f"{{{config.label_key}}}"):
            raise ConfigError(
                f"data.data.prompt_template: {template!r} must end with the field of data.data.label_key, {{{config.label_key}}}"
            )
        prompt = template[: -len(config.label_key) - 2]
        self.prompt, self.joint = prompt.rstrip(" "), prompt[len(prompt.rstrip(" ")) :]
        self.truncatable = {name.strip() for name in config.truncation_field.split(",")} & set(self.fields[:-1])

    def render(
        self, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[list[int], list[bool]]:
        """Token ids and which of them are trained; prompt fields are cut where the whole exceeds `max_length` tokens.

        Raises:
            DataError: a field is missing or no text, or a special token is asked for that the tokenizer lacks.
        """
        values = {name: self._text(record, name) for name in self.fields}
        answer = self._encode(tokenizer, self.joint + values[self.config.label_key])
        if self.config.add_sep:
            answer = [self._special(tokenizer, "sep"), *answer]
        first_trained = int(self.config.add_sep)
        if self.config.add_eos:
            answer = [*answer, self._special(tokenizer, "eos")]
        start = [self._special(tokenizer, "bos")] if self.config.add_bos else []
        pieces = self._prompt_pieces(values, tokenizer)
        excess = len(start) + sum(len(ids) for _, ids in pieces) + len(answer) - max_length
        prompt: list[int] = []
        for cuttable, ids in pieces:
            cut = min(max(excess, 0), len(ids)) if cuttable else 0
            excess -= cut
            if cut:
                ids = ids[cut:] if self.config.truncation_method == "left" else ids[:-cut]
            prompt += ids
        context = len(start) + len(prompt) + first_trained
        ids = start + prompt + answer
        return ids, [position >= context for position in range(len(ids))]

    def _prompt_pieces(
        self, values: dict[str, str], tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[bool, list[int]]]:
        if not self.truncatable:
            return [(False, self._encode(tokenizer, self.prompt.format(**values)))]
        pieces: list[tuple[bool, list[int]]] = []
        for literal, name, _, _ in string.Formatter().parse(self.prompt):
            if literal:
                pieces.append((False, self._encode(tokenizer, literal)))
            if name is not None:
                pieces.append((name in self.truncatable, self._encode(tokenizer, values[name])))
        return pieces

    @staticmethod
    def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    @staticmethod
    def _special(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is None:
            raise DataError(f"data.data.add_{name}=True, but the tokenizer has no {name} token")
        return int(token_id)

    @staticmethod
    def _text(record: dict[str, Any], name: str) -> str:
        if not isinstance(record.get(name), str):
            found = (
                f"found {str(record[name])[:80]!r}"
                if name in record
                else f"the record has {', '.join(record) or 'nothing'}"
            )
            raise DataError(f"the field `{name}` of data.data.prompt_template must be a text, but {found}")
        return record[name]
