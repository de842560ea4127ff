"""Caches and student: what fits is opened, what does not is listed at once; what a run is told to resume with."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN
from nemo_kd.cache.reader import CacheReader
from nemo_kd.config import ConfigError, DataError
from nemo_kd.config.data import CacheConfig
from nemo_kd.config.shared import GPTArchitecture
from nemo_kd.data.tokenizer import chat_template_fingerprint, tokenizer_fingerprint
from nemo_kd.student.data import StudentData, check_dataset_settings, load_splits
from nemo_kd.student.run_folder import differences, experiment_record
from nemo_kd.student.steps import TrainingPlan
from nemo_kd.tools.recode import convert
from tests.tiny_cache import row, write
from tests.tiny_data import aligner_rows, student_config, write_chat_dataset
from tests.tiny_tokenizer import CHATML, LLAMA3, train_tokenizer

TOKENIZER = train_tokenizer(300)
LARGEST = max(
    max(
        found.example.tokens_S.max(),
        found.example.labels_S.max(),
        found.teacher.topk_token_ids_PK.max(),
    )
    for found in (row(index, 3 + index % 4) for index in range(10))
)
"""The largest id in the caches of this file."""

GROUPS = SimpleNamespace(
    data_rank=0,
    data_size=1,
    context_rank=0,
    context_size=1,
    device=torch.device("cpu"),
)


def architecture(vocab_size: int = 300) -> GPTArchitecture:
    return GPTArchitecture("llama", vocab_size, 1, 8, 8, 1, 1, 8, 512, 1e-5, 1e4)


def cache(folder, **changes):
    fields = {
        "tokenizer": tokenizer_fingerprint(TOKENIZER),
        "chat_template": chat_template_fingerprint(TOKENIZER),
        "tokenizer_size": 300,
        "vocab_size": 384,
    }
    return write(folder, **{**fields, **changes})


def config(train, validation=None, **overrides):
    if validation is None:
        validation = train if isinstance(train, str) else train[-1]
    data = {"data_prefix": {"train": train, "validation": [str(validation)]}}
    values = {
        f"model__data__{key}": value for key, value in {**data, **overrides}.items()
    }
    return student_config("m", "t", "v", "l", **values)


def load(train, vocab_size=300, tokenizer=TOKENIZER, **overrides):
    return load_splits(
        config(train, **overrides).model, architecture(vocab_size), tokenizer
    )


def problems(train, *args, **overrides) -> list[str]:
    with pytest.raises(CacheError, match="cache and student do not match:") as error:
        load(train, *args, **overrides)
    return str(error.value).splitlines()[1:]


def formats(*found):
    return {
        "path": "d",
        "fingerprint": "f",
        "start_from_idx": 0,
        "end_at_idx": 9,
        "formats": list(found),
    }


def test_vocabularies_padded_differently_fit_while_the_ids_do(tmp_path):
    path = str(cache(tmp_path))
    for vocab_size in (LARGEST + 1, 300, 999):
        assert len(load(path, vocab_size)["train"]) == 10
    of_tokens, of_teacher = problems(path, LARGEST)
    assert of_tokens.startswith(f"  {path}: vocabulary: ")
    assert f"ids up to {LARGEST}" in of_tokens
    assert f"the student has {LARGEST} ids" in of_tokens
    assert "the teacher's tokens have ids" in of_teacher


def test_teacher_ids_outside_the_vocabulary_are_dropped_when_asked(tmp_path):
    rows = [row(index, 3 + index % 4) for index in range(10)]
    tokens = max(
        max(found.example.tokens_S.max(), found.example.labels_S.max())
        for found in rows
    )
    teacher = max(found.teacher.topk_token_ids_PK.max() for found in rows)
    assert (
        tokens == teacher == 49
    )  # so another cache is needed, whose tokens stay below 40
    path = cache(tmp_path)
    for chunk in range(3):
        lines = []
        for line in (tmp_path / f"train_{chunk}.jsonl").read_text().splitlines():
            payload = json.loads(line)
            payload["tokens"] = [token % 40 for token in payload["tokens"]]
            payload["labels"] = [token % 40 for token in payload["labels"]]
            del payload["hash"]
            lines.append(json.dumps(payload) + "\n")
        (tmp_path / f"other_{chunk}.jsonl").write_text("".join(lines))
    other = str(path).replace("train_", "other_")
    lines = problems(other, 45)
    assert len(lines) == 1
    assert (
        "vocabulary: the teacher's tokens have ids up to 49 in the cache, the student has 45 ids"
        in lines[0]
    )
    assert "model.data.drop_ids_outside_vocab=true" in lines[0]
    kept = load(other, 45, drop_ids_outside_vocab=True)["train"]
    whole = load(other)["train"]
    ids = [
        set(rows[i].teacher.topk_token_ids_PK.flatten().tolist())
        for rows in (kept, whole)
        for i in range(10)
    ]
    assert set().union(*ids[:10]) == {i for i in set().union(*ids[10:]) if i < 45} | {
        -1
    }
    assert kept[3].teacher.tail_mass_PT.sum() > whole[3].teacher.tail_mass_PT.sum()


def test_all_mismatches_are_listed_in_one_error(tmp_path):
    good = cache(tmp_path / "good")
    bad = cache(
        tmp_path / "bad",
        tokenizer="sha256:aaa",
        chat_template="sha256:bbb",
        top_k=4,
        tokenizer_size=7,
    )
    lines = problems([str(good), str(bad)], LARGEST, validation=good, top_k=5)
    assert [line.split(": ")[1] for line in lines if str(bad) in line] == [
        "tokenizer",
        "chat template",
        "vocabulary",
        "vocabulary",
        "model.data.top_k",
    ]
    text = "\n".join(lines)
    ours = tokenizer_fingerprint(TOKENIZER)
    assert (
        f"tokenizer: sha256:aaa (7 tokens) in the cache, {ours} (300 tokens) in the student"
        in text
    )
    assert (
        f"chat template: sha256:bbb in the cache, {chat_template_fingerprint(TOKENIZER)} in the student"
        in text
    )
    assert "model.data.top_k: 5 exceeds the 4 logits a position" in text
    assert len(lines) == 5 + 3


@pytest.mark.parametrize(
    ("records", "teacher_template", "student_template", "fits"),
    [
        (["messages"], CHATML, CHATML, True),
        (["messages"], CHATML, LLAMA3, False),
        (["messages"], CHATML, None, False),
        (["messages", "prompt_template"], CHATML, LLAMA3, False),
        (["prompt_template"], CHATML, None, True),
        (["conversations"], CHATML, LLAMA3, True),
        (["prompt_template"], None, LLAMA3, True),
        (None, CHATML, LLAMA3, False),
        (None, None, LLAMA3, True),
    ],
)
def test_the_chat_template_counts_where_the_records_used_it(
    tmp_path, records, teacher_template, student_template, fits
):
    dataset = formats(*records or [])
    if records is None:
        del dataset["formats"]
    path = str(
        cache(
            tmp_path,
            dataset=dataset,
            chat_template=chat_template_fingerprint(
                train_tokenizer(300, teacher_template)
            ),
        )
    )
    student = train_tokenizer(300, student_template)
    if fits:
        assert len(load(path, 300, student)["train"]) == 10
        return
    lines = problems(path, 300, student)
    assert len(lines) == 1
    assert (
        f"in the cache, {chat_template_fingerprint(student) or 'none'} in the student; copy the teacher's chat_template"
        in lines[0]
    )
    assert len(load(path, 300, student, allow_other_template=True)["train"]) == 10


def student_data(train, steps_per_epoch=1, **overrides):
    typed = config(train, **overrides)
    splits = load_splits(typed.model, architecture(), TOKENIZER)
    return StudentData(
        typed.model, splits, TrainingPlan(steps_per_epoch, 10, 1, 1), 0, GROUPS
    )


def test_batches_of_a_blend_come_from_its_caches_by_weight(tmp_path):
    """Two teachers over the same records: two caches; the rows say by their place which one they are from."""
    first, second = (
        cache(tmp_path / "a"),
        cache(tmp_path / "b", teacher={"name": "u", "weights": "v"}, top_k=9),
    )
    data = student_data([1, f"{first}[:4]", 3, str(second)], steps_per_epoch=1)
    assert data.training.order.source_chunks == [[4], [4, 4, 2]]
    drawn = sum(list(data.training), [])
    assert len(drawn) == 80
    assert sum(position < 4 for position in drawn) == 20
    assert (
        data.splits["train"].num_tokens(3)
        == data.splits["train"][3].example.num_tokens
    )
    assert [
        len(micro_batch.indices_B)
        for batch in data.loader("train")
        for micro_batch in batch
    ] == [2] * 40
    with pytest.raises(
        ConfigError,
        match=r"a/train_CHUNK_ID.jsonl\[4:4\]: none of 0 examples",
    ):
        student_data([1, f"{first}[4:4]", 99, str(second)])


def test_a_run_goes_on_with_the_data_of_its_checkpoint_only(tmp_path):
    first = cache(tmp_path / "a")
    second = cache(tmp_path / "b", teacher={"name": "u", "weights": "v"})

    def record(train, **overrides):
        data = student_data(train, **overrides)
        return experiment_record(
            config(train, **overrides),
            architecture(),
            {"name": "s", "weights": "w"},
            data.descriptions,
            2,
        )

    before = record(str(first))
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    moved = record(str(tmp_path / "moved" / first.name))
    assert differences(before, moved) == {}
    part = record(f"{first}[:8]")
    told = differences(before, part)["model.data.data_prefix.train"]
    assert re.search(
        r"a/train_CHUNK_ID.jsonl'\], 'content': .* in the checkpoint, .*a/train_CHUNK_ID.jsonl\[:8\]",
        told,
    )
    assert "model.data.data_prefix.validation" in differences(
        before, record(str(first), validation=f"{first}[:8]")
    )
    weighted = [record([weight, str(first), 1, str(second)]) for weight in (1, 3)]
    assert (
        "'weights': [3, 1]} now"
        in differences(*weighted)["model.data.data_prefix.train"]
    )


def test_a_run_goes_on_behind_the_samples_of_its_checkpoint(tmp_path):
    data = student_data(str(cache(tmp_path / "a")))
    data.training.consumed_samples = 8
    other = student_data(str(tmp_path / "a" / "train_CHUNK_ID.jsonl"))
    other.load_state_dict(data.state_dict())
    assert other.training.consumed_samples == 8


def test_plain_records_have_sources_and_a_fingerprint_too(tmp_path):
    first, second = (
        str(write_chat_dataset(tmp_path / name, count))
        for name, count in (("a.jsonl", 12), ("b.jsonl", 9))
    )

    def sft(train):
        settings = student_config(
            "m", "t", "v", "l", model__knowledge_distillation__kd_loss_weight=0.0, model__data__data_impl="dataset",
            model__data__data_prefix={"train": train, "validation": [second]},
        )  # fmt: skip
        return StudentData(
            settings.model,
            load_splits(settings.model, architecture(), TOKENIZER),
            TrainingPlan(2, 10, 1, 1),
            0,
            GROUPS,
        )

    blend, one, other = (
        sft([1, first, 1, second]),
        sft([first, second]),
        sft([second, first]),
    )
    assert blend.training.order.source_chunks == [
        [11],
        [8],
    ]  # the sixth record of each has no answer
    fingerprints = [
        data.descriptions["train"]["fingerprint"] for data in (blend, one, other)
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert len(list(blend.loader("train"))) == 10


def test_caches_of_other_programs_are_read_with_a_warning(tmp_path, caplog):
    source = cache(tmp_path / "source")
    for file in (tmp_path / "source").glob("*manifest.json"):
        file.unlink()
    target = tmp_path / "converted_CHUNK_ID.jsonl.zst"
    convert(
        CacheReader(str(source)),
        str(target),
        CacheConfig(min_probability=0),
        vocab_size=384,
    )
    ours = cache(tmp_path / "ours")
    with caplog.at_level(logging.WARNING):
        assert (
            len(
                load([str(source), str(target), str(ours)], validation=str(ours))[
                    "train"
                ]
            )
            == 30
        )
    for path in (source, target):
        assert (
            f"{path}: nothing records which tokenizer wrote it; make sure that it is the student's"
            in caplog.text
        )
    assert f"{ours}: nothing tells" not in caplog.text


def test_a_source_without_loss_tokens_is_refused(tmp_path):
    good = aligner_rows(tmp_path / "good.jsonl", [0, 0, 1])
    load([str(good)])
    empty = aligner_rows(tmp_path / "empty.jsonl", [0, 0, 0])
    for train, validation, key in (
        ([good, empty], good, "train"),
        ([good], empty, "validation"),
    ):
        message = f"model.data.data_prefix.{key}: {empty}: none of 3 examples has a token in the loss"
        with pytest.raises(ConfigError, match=re.escape(message)):
            load([str(path) for path in train], validation=str(validation))


def loss_problems(train, **settings) -> list[str]:
    """What is wrong with a cache for a loss, of the training data."""
    values = {
        f"model__knowledge_distillation__{key}": value
        for key, value in settings.items()
    }
    data = {
        "model__data__data_prefix": {"train": [str(train)], "validation": [str(train)]}
    }
    with pytest.raises(CacheError) as error:
        load_splits(
            student_config("m", "t", "v", "l", **data, **values).model,
            architecture(),
            TOKENIZER,
        )
    return str(error.value).splitlines()[1:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"temperature": 2.0},
            "kd_loss=forward_kl, support=tail: the cache lacks the teacher's mass outside the kept ids at temperature 2; "
            "compute the cache with cache.temperatures=[2], or use support=renormalize",
        ),
        (
            {"support": "sampled"},
            "support=sampled: the cache lacks tail samples",
        ),
        (
            {"kd_loss": "k2"},
            "kd_loss=k2, support=tail: the cache lacks the teacher's log-probability of the labels",
        ),
    ],
)
def test_a_loss_that_needs_what_the_cache_lacks(tmp_path, settings, message):
    path = cache(tmp_path)
    for chunk in tmp_path.glob("*.jsonl"):  # as NeMo-Aligner writes them
        rows = [json.loads(line) for line in chunk.read_text().splitlines()]
        for fields in rows:
            for name in ("hash", "tail_mass", "temperatures", "label_logprobs"):
                fields.pop(name, None)
        chunk.write_text("".join(json.dumps(fields) + "\n" for fields in rows))
        Path(f"{chunk}.idx").unlink()
    (tmp_path / "train_manifest.json").unlink()
    assert any(message in line for line in loss_problems(path, **settings)), (
        loss_problems(path, **settings)
    )


def test_cross_tokenizer_is_taken_only_where_it_means_nothing(tmp_path):
    fits, foreign = cache(tmp_path / "a"), cache(tmp_path / "b", tokenizer=UNKNOWN)
    key = {"model__knowledge_distillation__cross_tokenizer": True}
    data = {
        "model__data__data_prefix": {"train": [str(fits)], "validation": [str(fits)]}
    }
    assert len(
        load_splits(
            student_config("m", "t", "v", "l", **data, **key).model,
            architecture(),
            TOKENIZER,
        )["train"]
    )
    (line,) = loss_problems(foreign, cross_tokenizer=True)
    assert (
        "cross_tokenizer: True, but nothing shows that teacher and student share one tokenizer"
        in line
    )


def test_tail_samples_do_not_go_with_fewer_ids():
    for name, value in (("top_k", 3), ("drop_ids_outside_vocab", True)):
        overrides = {
            "model__knowledge_distillation__support": "sampled",
            f"model__data__{name}": value,
        }
        with pytest.raises(ConfigError, match=f"model.data.{name}: support=sampled"):
            student_config("m", "t", "v", "l", **overrides)


def test_a_dataset_is_no_cache(tmp_path):
    path = str(write_chat_dataset(tmp_path / "train.jsonl", 3))
    with pytest.raises(
        CacheError,
        match=r"train\.jsonl:1: field tokens: found nothing; .*data_impl=dataset",
    ):
        load(path)


def test_settings_of_datasets_have_no_effect_on_caches(tmp_path, caplog):
    path = str(cache(tmp_path))
    questions = {
        "eval__interval": 5,
        "eval__data": "questions.jsonl",
        "eval__answer_field": "answer",
    }
    changed = {"model__data__dataset__min_seq_length": 2}
    for overrides in ({}, {**changed, **questions}):
        check_dataset_settings(student_config("m", path, path, "l", **overrides))
        assert "model.data.dataset" not in caplog.text
    check_dataset_settings(student_config("m", path, path, "l", **changed))
    assert "model.data.dataset has no effect on caches" in caplog.text


def test_a_dataset_of_selected_rows_is_no_file():
    found = student_config(
        "m",
        "t",
        "v",
        "l",
        model__data__data_prefix={
            "train": ["b.jsonl[:10%]"],
            "validation": ["c.jsonl"],
        },
        model__knowledge_distillation__kd_loss_weight=0.0,
        model__knowledge_distillation__sft_loss_weight=1.0,
        model__data__data_impl="dataset",
    )
    text = "b.jsonl[:10%]: no file matches this pattern; records are selected by PATH@[first:end]"
    with pytest.raises(DataError, match=re.escape(text)):
        load_splits(found.model, architecture(), TOKENIZER)
