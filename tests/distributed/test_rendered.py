"""Records that all ranks tokenize once: the same as those of the dataset, whoever reads them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.batch import Example
from nemo_kd.config.data import DataConfig, DatasetConfig
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.teacher import rendered
from tests.tiny_tokenizer import train_tokenizer


def each_as_in_the_dataset(path: str, folder: str, on_one_machine: bool) -> int:
    """Return how many records a rank tokenized again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        if not on_one_machine:
            patch.setattr(rendered, "_open", lambda share: None)
        return _compared(path, patch)


def _compared(path: str, patch: pytest.MonkeyPatch) -> int:
    data = DataConfig(data=DatasetConfig(file_path=path, min_seq_length=9))
    dataset = TokenizedDataset(data, train_tokenizer(512), 40, 512)
    indices = [*range(3, 17), *range(20, 31)]
    found = rendered.RenderedRecords(dataset, indices)
    expected = {index: dataset[index] for index in indices}
    counts = Counter(record for record in expected.values() if isinstance(record, str))
    counts["tokens"] = sum(
        record.num_tokens
        for record in expected.values()
        if isinstance(record, Example)
    )
    assert found.counts == counts
    assert len(counts) == 3
    calls = []
    render = TokenizedDataset.__getitem__

    def counted(self, index):
        calls.append(index)
        return render(self, index)

    patch.setattr(TokenizedDataset, "__getitem__", counted)
    for index, record in expected.items():
        if isinstance(record, str):
            assert found[index] == record
            continue
        for name in ("tokens_S", "labels_S", "loss_mask_S"):
            ours = getattr(found[index], name)
            theirs = getattr(record, name)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
    return len(calls)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_records_are_tokenized_once(ranks, tmp_path, size):
    path = tmp_path / "d.jsonl"
    texts = ("", "word " * 3, "word " * 9, "word " * 90)
    with path.open("w") as file:
        for index in range(32):
            record = {"input": f"Question {index}?", "output": texts[index % 4]}
            file.write(json.dumps(record) + "\n")
    run = ranks(size).run
    folder = str(tmp_path / "temporary")
    Path(folder).mkdir()
    assert run(each_as_in_the_dataset, str(path), folder, True) == [0] * size
    assert not list(Path(folder).iterdir())
    assert 0 not in run(each_as_in_the_dataset, str(path), folder, False)
