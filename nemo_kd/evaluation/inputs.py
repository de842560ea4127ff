"""Everything that an evaluation reads besides the model's weights, checked before they load."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.answers.checkers import Checker, checker_of
from nemo_kd.answers.prompts import Question, first_examples, question_of, stop_ids
from nemo_kd.batch import Example
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.reader import CacheBlend, CacheReader
from nemo_kd.config.data import sequence_length
from nemo_kd.config.evaluation import EvaluateGPTConfig
from nemo_kd.config.loss import LossConfig
from nemo_kd.config.student import StudentDataConfig, StudentModelConfig
from nemo_kd.data.batches import TokenizedRows
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.data.tokenizer import load_tokenizer
from nemo_kd.mcore.checkpoint import PretrainedModel
from nemo_kd.mcore.generation import Sampling, check_prompts
from nemo_kd.student.data import find_mismatches

log = logging.getLogger(__name__)


@dataclass
class Inputs:
    """Examples to measure the loss on, and questions to answer.

    Attributes:
        rows: examples in order; with a cache its rows of them.
        skipped: records that make no example, by reason.
        sampling: with the tokens that end a response.

    Raises:
        ConfigError, DataError, CacheError: on every rank, something cannot be used.
    """

    config: EvaluateGPTConfig
    pretrained: PretrainedModel
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    rows: CacheBlend | TokenizedRows = field(init=False)
    questions: list[Question] = field(init=False)
    sampling: Sampling = field(init=False)
    skipped: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        settings = self.config.evaluate
        architecture = self.pretrained.architecture
        data = self.config.data.data
        self.tokenizer = load_tokenizer(
            self.pretrained.tokenizer_folder, data.chat_template
        )
        self.vocab_size = architecture.vocab_size
        self.seq_length = sequence_length(
            self.config.model.max_seq_length, architecture.max_position_embeddings
        )
        self.dataset = TokenizedDataset(
            self.config.data, self.tokenizer, self.seq_length, self.vocab_size
        )
        examples, self.skipped = first_examples(
            self.dataset, settings.num_examples, "data.data.file_path"
        )
        self.questions = []
        if settings.generates:
            self.questions = [
                question_of(self.dataset, example, settings.answer_field)
                for example in examples
            ]
        check_prompts(
            [question.prompt_ids for question in self.questions],
            [self.dataset.records.where(one.index) for one in self.questions],
            architecture.max_position_embeddings,
        )
        ends = stop_ids(self.tokenizer, examples, self.pretrained.eos_token_ids())
        self.sampling = Sampling(stop_ids=ends, **settings.sampling)
        self.checker: Checker | None = None
        if settings.answer_field is not None:
            self.checker = checker_of(settings)
        self.cache_facts: dict[str, Any] | None = None
        if settings.cache is None:
            self.rows = TokenizedRows([self.dataset.records.name])
            self.rows += examples
        else:
            self.rows = self._open_cache(settings.cache, examples)
            self.cache_facts = self.rows.description()
        self.num_examples = len(examples)

    def dataset_facts(self) -> dict[str, Any]:
        """Describe the data: path, fingerprint and skipped records."""
        return {
            "path": self.dataset.records.name,
            "fingerprint": self.dataset.records.fingerprint,
            "skipped": dict(self.skipped),
        }

    def _open_cache(self, path: str, examples: list[Example]) -> CacheBlend:
        """Open the cache of these examples.

        Raises:
            CacheError: it is damaged, does not fit the model, or holds other examples.
        """
        reader = CacheReader(
            path, seq_length=self.seq_length, vocab_size=self.vocab_size
        )
        model = measured_settings(path)
        for text in find_mismatches(reader, model, self.vocab_size, self.tokenizer):
            raise CacheError(f"evaluate.cache: {path} does not fit the model: {text}")
        if reader.max_topk_id >= self.vocab_size:
            log.warning(
                "warning: evaluate.cache: teacher tokens with ids from %d on, which the model does "
                "not have, count to the tail",
                self.vocab_size,
            )
        for number, example in enumerate(examples):
            where = self.dataset.records.where(example.index)
            if number >= len(reader):
                raise CacheError(
                    f"evaluate.cache: {path} ends before {where}: it has {len(reader)} rows; give "
                    f"the cache of the same file, or evaluate.num_examples={len(reader)}"
                )
            if not is_row_of(reader[number].example, example):
                raise CacheError(
                    f"evaluate.cache: {reader.where(number)} holds another example than {where}; "
                    "give the cache that was computed from the same file, with the same data keys "
                    "and model.max_seq_length"
                )
        return CacheBlend([reader])


def is_row_of(row: Example, example: Example) -> bool:
    """Return True if a cache's row, which may end after the last trained token, is the example."""
    end = np.flatnonzero(example.loss_mask_S)[-1] + 1
    return all(
        np.array_equal(getattr(row, name)[:end], getattr(example, name)[:end])
        for name in ("tokens_S", "labels_S", "loss_mask_S")
    )


def measured_settings(cache: str | None) -> StudentModelConfig:
    """Return stage 2's settings of a validation that measures cross-entropy, and with a cache the
    agreement with the teacher."""
    loss = LossConfig(kd_loss_weight=0.0, sft_loss_weight=1.0, compile="off")
    if cache is None:
        data = StudentDataConfig(data_impl="dataset")
    else:
        data = StudentDataConfig(
            data_prefix={"validation": [cache]},
            allow_other_template=True,  # the tokens are compared one by one
            drop_ids_outside_vocab=True,
        )
    return StudentModelConfig(data=data, knowledge_distillation=loss)
