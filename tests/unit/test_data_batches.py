"""Records by index, batches, the training plan."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from nemo_kd.batch import CachedExample, Example, TeacherRows, context_positions
from nemo_kd.config import ConfigError, DataError
from nemo_kd.config.data import DataConfig, DatasetConfig, sequence_length
from nemo_kd.config.shared import ParallelConfig, check_batch_sizes, padded_vocab_size
from nemo_kd.config.student import LoopConfig
from nemo_kd.data.batches import collate, pack
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.data.records import open_records
from nemo_kd.data.tokenizer import (
    chat_template_fingerprint,
    load_tokenizer,
    padding_id,
    tokenizer_fingerprint,
    trained_text,
)
from nemo_kd.student.steps import TrainingPlan, plan_training
from tests.tiny_tokenizer import train_tokenizer


def test_records_are_read_by_index_whatever_the_order(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"n": 0, "text": "ü\u2028 x"}, {"n": 1}, {"n": 2, "deep": {"a": [1]}}]
    path.write_text(
        "\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        encoding="utf-8",
    )
    records = open_records(str(path))
    assert [records[i] for i in (2, 0, 1)] == [rows[2], rows[0], rows[1]]
    assert pickle.loads(pickle.dumps(records))[1] == rows[1]
    assert records.where(1) == f"{path}:4"
    before = records.fingerprint
    path.write_text('{"n": 0}')
    assert open_records(str(path)).fingerprint != before


def test_forked_readers_share_no_file_position(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(
        "".join(json.dumps({"n": n, "pad": "x" * (n % 97)}) + "\n" for n in range(400))
    )
    records = open_records(str(path))
    assert records[7]["n"] == 7  # the file is open before the fork
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(functools.partial(number_of, records), range(400)) == list(
            range(400)
        )


def number_of(records, index):
    return records[index]["n"]


def test_fingerprints_are_sha256_of_the_bytes(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 300_000)
    assert (
        open_records(str(path)).fingerprint
        == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    )


def test_tokenizers_are_loaded_from_folders_only(tmp_path):
    tokenizer = train_tokenizer(512)
    tokenizer.save_pretrained(tmp_path / "good")
    loaded = load_tokenizer(tmp_path / "good")
    assert loaded("Real text.")["input_ids"] == tokenizer("Real text.")["input_ids"]
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(loaded) != tokenizer_fingerprint(train_tokenizer(600))
    assert chat_template_fingerprint(loaded) == chat_template_fingerprint(tokenizer)
    with pytest.raises(
        DataError,
        match="missing: no such folder; a tokenizer is read from the folder of its model",
    ):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no usable tokenizer"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "good" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="good: no usable tokenizer"):
        load_tokenizer(tmp_path / "good")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a regular file, found none; check the path"),
        ("", "the file has no records"),
        ("\n \n", "the file has no records"),
        ('{"a": 1}\n{"a": ', ":2: not valid JSON"),
        ("{}\n[1]\n", ":2: found a JSON list"),
        ("[1]\n", ", element 0: found a JSON int"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, content, message):
    path = tmp_path / "d.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        records = open_records(str(path))
        [records[i] for i in range(len(records))]
    assert str(path) in str(error.value)


def dataset(tmp_path, records, max_seq_length=512, vocab_size=512, **config):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(
        chat=config.pop("chat", None),
        data=DatasetConfig(file_path=str(path), **config),
    )
    return TokenizedDataset(data, train_tokenizer(512), max_seq_length, vocab_size)


def test_examples_are_shifted_and_carry_their_index(tmp_path):
    chat = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
        ]
    }
    examples = dataset(tmp_path, [chat, {"input": "a", "output": "b"}])
    first = examples[0]
    ids = train_tokenizer(512).apply_chat_template(chat["messages"], return_dict=True)[
        "input_ids"
    ]
    assert first.tokens_S.tolist() == ids[:-1]
    assert first.labels_S.tolist() == ids[1:]
    assert (first.index, examples[1].index) == (0, 1)
    assert trained_text(first, train_tokenizer(512)).endswith(
        "<|im_start|>assistant\n«Yo<|im_end|>»\n"
    )


def test_unusable_examples_are_skipped_with_a_reason(tmp_path):
    long = {
        "messages": [
            {"role": "user", "content": "x " * 300},
            {"role": "assistant", "content": "Yo"},
        ]
    }
    silent = {"messages": [{"role": "user", "content": "Hi"}]}
    examples = dataset(
        tmp_path,
        [long, silent, {"input": "a", "output": "b"}],
        max_seq_length=50,
        min_seq_length=4,
    )
    assert [examples[i] for i in range(3)] == [
        "too long",
        "no loss tokens",
        "too short",
    ]


def test_a_format_is_chosen_where_a_record_has_the_fields_of_two(tmp_path):
    conversations = [
        {"from": "User", "value": "Hi"},
        {"from": "Assistant", "value": "Yo"},
    ]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
    ]
    record = {
        "conversations": conversations,
        "messages": messages,
        "input": "Hi",
        "output": "Yo",
    }
    texts = {
        name: trained_text(
            dataset(tmp_path, [record], format=name)[0], train_tokenizer(512)
        )
        for name in ("auto", "messages", "conversations", "prompt_template")
    }
    assert texts == {
        "auto": texts["messages"],
        "messages": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>»\n",
        "conversations": "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n«Yo\n<extra_id_1>»",
        "prompt_template": "Hi« Yo<|im_end|>»",
    }


def test_the_longest_example_has_max_seq_length_positions(tmp_path):
    record = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
        ]
    }
    length = dataset(tmp_path, [record])[0].num_tokens
    assert isinstance(dataset(tmp_path, [record], max_seq_length=length)[0], Example)
    assert dataset(tmp_path, [record], max_seq_length=length - 1)[0] == "too long"
    prompt = {"input": "word " * 100, "output": "end"}
    assert dataset(tmp_path, [prompt], max_seq_length=20)[0].num_tokens == 20
    assert (
        dataset(tmp_path, [{**prompt, "output": "word " * 100}], max_seq_length=20)[0]
        == "too long"
    )


def test_wrong_kinds_of_records_name_file_and_line(tmp_path):
    with pytest.raises(
        DataError,
        match=r"d\.jsonl:2: data\.data\.format=auto and data\.chat=True do not fit",
    ):
        dataset(
            tmp_path, [{"messages": []}, {"input": "a", "output": "b"}], chat=True
        )[1]
    with pytest.raises(
        DataError,
        match=r"d\.jsonl:1: data\.data\.format=messages and",
    ):
        dataset(tmp_path, [{"input": "a", "output": "b"}], format="messages")[0]


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path):
    with pytest.raises(
        DataError,
        match=r"d\.jsonl:1: the token '.*' has the id \d+, outside the model's vocabulary of 20",
    ):
        dataset(tmp_path, [{"input": "a", "output": "b"}], vocab_size=20)[0]
    assert padding_id(train_tokenizer(512), 512) == 0
    assert (
        padding_id(
            PreTrainedTokenizerFast(
                tokenizer_object=train_tokenizer(512)._tokenizer, pad_token="<|eot|>"
            ),
            3,
        )
        == 0
    )


def example(index, length, k=None):
    part = Example(
        index,
        np.arange(length) + 1,
        np.arange(length) + 2,
        np.ones(length, dtype=np.float32),
    )
    if k is None:
        return part
    logits = -np.arange(k, dtype=np.float32) * np.ones((length, 1), dtype=np.float32)
    ids = np.arange(k) + np.zeros((length, 1), dtype=np.int64)
    tail = np.full((length, 1), 0.1, dtype=np.float32)
    return CachedExample(
        part,
        TeacherRows(
            np.arange(length),
            logits,
            ids.astype(np.int64),
            np.full(length, 2.0, dtype=np.float32),
            tail,
        ),
    )


def test_collate_pads_on_the_right_and_masks_the_padding():
    batch = collate([example(4, 3, k=2), None, example(7, 9, k=2)], pad_id=0)
    assert batch.tokens_BS.shape == (3, 16)
    assert batch.indices_B.tolist() == [4, -1, 7]
    assert batch.tokens_BS[0].tolist() == [1, 2, 3] + [0] * 13
    assert batch.loss_mask_BS.sum(1).tolist() == [3, 0, 9]
    assert batch.topk_logits_BSK.shape == (3, 16, 2)
    assert batch.topk_token_ids_BSK[0, 2].tolist() == [0, 1]
    assert batch.topk_token_ids_BSK[1, 5].tolist() == [-1, -1]
    assert batch.tail_mass_BST[0, :, 0].tolist() == pytest.approx([0.1] * 3 + [1] * 13)
    assert batch.position_ids_BS[2].tolist() == list(range(16))
    assert collate([example(0, 8)], 0).topk_logits_BSK is None


def said(index, length, k, temperatures=(1.0,), labels=True, num_samples=None):
    """A row with different values in every field of the teacher."""
    random = np.random.default_rng(index)
    teacher = TeacherRows(
        np.arange(length),
        -np.sort(random.random((length, k)).astype(np.float32), axis=1),
        np.argsort(random.random((length, 99)), axis=1)[:, :k],
        random.random(length).astype(np.float32),
        random.random((len(temperatures), length)).astype(np.float32).T,
        temperatures,
        -random.random(length).astype(np.float32) if labels else None,
        None
        if num_samples is None
        else random.integers(-1, 99, size=(length, num_samples)),
    )
    return CachedExample(example(index, length), teacher)


def check_fields(batch, place, row, s):
    """Row None, or a position beyond its end: nothing is known."""
    teacher = row.teacher if row is not None and s < row.example.num_tokens else None
    k = 0 if teacher is None else teacher.topk_logits_PK.shape[1]
    padding = [-np.inf] * (5 - k), [-1] * (5 - k)
    if teacher is None:
        expected = (padding[0], padding[1], 0, [1, 1], 0, [-1] * 4)
    else:
        expected = (
            [*teacher.topk_logits_PK[s], *padding[0]], [*teacher.topk_token_ids_PK[s], *padding[1]], teacher.log_sum_exp_logits_P[s],
            [teacher.tail_mass_PT[s, 0], teacher.tail_mass_PT[s, 1]], teacher.label_logprobs_P[s], [*teacher.tail_token_ids_PM[s]],
        )  # fmt: skip
    fields = (
        batch.topk_logits_BSK, batch.topk_token_ids_BSK, batch.log_sum_exp_logits_BS, batch.tail_mass_BST,
        batch.label_logprobs_BS, batch.tail_token_ids_BSM,
    )  # fmt: skip
    for field, wanted in zip(fields, expected, strict=True):
        assert field[place].tolist() == np.asarray(wanted).tolist()


def test_every_field_of_the_teacher_lands_in_its_place():
    rows = [
        said(0, 3, 2, (1.0, 2.0), num_samples=4),
        None,
        said(1, 10, 5, (1.0, 2.0), num_samples=4),
        said(2, 1, 1, (1.0, 2.0), num_samples=4),
    ]
    batch = collate(rows, pad_id=0)
    assert batch.tail_mass_BST.shape == (4, 16, 2)
    assert batch.tail_token_ids_BSM.shape == (4, 16, 4)
    for b, row in enumerate(rows):
        for s in range(16):
            check_fields(batch, (b, s), row, s)
    packed = pack(rows, pad_id=0, multiple_of=8)
    assert packed.cu_seqlens.tolist() == [0, 3, 13, 14, 16]
    assert packed.indices_B.tolist() == [0, 1, 2]
    assert packed.loss_positions_N.tolist() == list(range(14))
    assert packed.topk_logits_BSK.shape == (1, 16, 5)
    for start, row in ((0, rows[0]), (3, rows[2]), (13, rows[3]), (14, None)):
        for s in range(2 if row is None else row.example.num_tokens):
            check_fields(packed, (0, start + s), row, s)
    for rank in (0, 1):
        half = batch.context_part(rank, 2)
        for place, s in enumerate(context_positions(16, rank, 2).tolist()):
            check_fields(half, (2, place), rows[2], s)
        assert half.teacher.positions_P.tolist() == half.loss_positions_N.tolist()


def test_a_batch_holds_targets_of_the_loss_alone_unless_told_otherwise():
    rows = [said(0, 6, 2), None, said(1, 10, 3)]
    for row in (rows[0], rows[2]):
        row.example.loss_mask_S[::2] = 0
    batch, whole = (collate(rows, 0, every_target=every) for every in (False, True))
    assert batch.teacher.positions_P.tolist() == batch.loss_positions_N.tolist()
    assert whole.teacher.positions_P.tolist() == [*range(6), *range(32, 42)]
    for name in (
        "topk_logits_BSK",
        "topk_token_ids_BSK",
        "tail_mass_BST",
        "label_logprobs_BS",
    ):
        ours, theirs = (getattr(one, name).flatten(0, 1) for one in (batch, whole))
        assert torch.equal(
            ours[batch.loss_positions_N], theirs[batch.loss_positions_N]
        )
    assert (batch.topk_token_ids_BSK[0, ::2] == -1).all()
    assert batch.topk_token_ids_BSK.dtype == torch.int64
    some = replace(rows[0], teacher=rows[0].teacher.at(slice(0, 3)))
    with pytest.raises(
        ValueError, match="example 0: only 1 of its 3 positions in the loss have"
    ):
        collate([some], 0)


def test_a_batch_of_different_caches_has_what_all_of_them_have():
    both = collate([said(0, 3, 2, (1.0, 2.0)), said(1, 3, 2, (1.0, 4.0))], 0)
    assert both.tail_mass_BST.shape == (2, 8, 1)
    assert (
        both.tail_mass_BST[1, 2, 0]
        == said(1, 3, 2, (1.0, 4.0)).teacher.tail_mass_PT[2, 0]
    )
    three, two = said(0, 3, 2, (1.0, 2.0, 4.0)), said(1, 3, 2, (1.0, 4.0))
    common = collate([three, two], 0)
    assert common.teacher.temperatures == (1.0, 4.0)
    assert common.tail_mass_BST[:, 2].tolist() == [
        three.teacher.tail_mass_PT[2, [0, 2]].tolist(),
        two.teacher.tail_mass_PT[2].tolist(),
    ]
    rounded = said(1, 3, 2, (1.0, float(np.float32(1.3))))
    mixed = collate([said(0, 3, 2, (1.0, 1.3)), rounded], 0)
    assert mixed.teacher.temperatures == (1.0, 1.3)
    assert (
        mixed.tail_mass_BST[1, 2].tolist() == rounded.teacher.tail_mass_PT[2].tolist()
    )
    assert both.label_logprobs_BS is not None
    assert (
        collate([said(0, 3, 2), said(1, 3, 2, labels=False)], 0).label_logprobs_BS
        is None
    )
    for first, second in ((4, None), (None, 4), (4, 2), (None, None)):
        assert (
            collate(
                [said(0, 3, 2, num_samples=first), said(1, 3, 2, num_samples=second)],
                0,
            ).tail_token_ids_BSM
            is None
        )
    fillers = collate([None, None], 0)
    assert (
        int(fillers.indices_B.max()),
        fillers.topk_logits_BSK,
        fillers.loss_mask_BS.sum(),
    ) == (
        -1,
        None,
        0,
    )


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        (LoopConfig(max_epochs=2, val_check_interval=4), TrainingPlan(6, 12, 4, 4)),
        (
            LoopConfig(max_steps=5, val_check_interval=1000),
            TrainingPlan(6, 5, 1000, 1000),
        ),
        (
            LoopConfig(val_check_interval=0.5, save_interval=1.0),
            TrainingPlan(6, 6, 3, 6),
        ),
        (LoopConfig(val_check_interval=4, save_interval=3), TrainingPlan(6, 6, 4, 3)),
        (
            LoopConfig(max_epochs=3, limit_train_batches=2, val_check_interval=1),
            TrainingPlan(2, 6, 1, 1),
        ),
        (LoopConfig(limit_train_batches=0.5), TrainingPlan(3, 3, 100, 100)),
    ],
)
def test_plans(loop, expected):
    assert plan_training(loop, 50, 8) == expected


def test_impossible_plans_and_layouts_are_refused():
    with pytest.raises(ConfigError, match="exceeds the 7 training examples"):
        plan_training(LoopConfig(), 7, 8)
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        plan_training(LoopConfig(max_steps=0), 80, 8)
    with pytest.raises(ConfigError, match="2 x 4 = 8"):
        check_batch_sizes(2, 12, 4)
    with pytest.raises(ConfigError, match="3 x 1 x 1 = 3 does not divide the 4 ranks"):
        ParallelConfig(tensor_model_parallel_size=3).data_parallel_size(4)
    with pytest.raises(
        ConfigError, match="exceeds the model's max_position_embeddings"
    ):
        sequence_length(9, 8)
    assert (sequence_length(None, 8), sequence_length(None, 10**6)) == (8, 4096)
    assert [padded_vocab_size(157, 128, tp) for tp in (1, 2, 4)] == [256, 256, 256]
    assert padded_vocab_size(10, 4, 3) == 12
