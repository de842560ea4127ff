"""`logit_cache verify --against`: rows of another example, position, temperature or template show, and rounding does not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_kd.batch import CachedExample, TeacherRows
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.segment import publish_segment
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config import ConfigError, DataError, UserInputError
from nemo_kd.teacher.loop import compute_topk_logits
from nemo_kd.tools.rescore import (
    open_sample,
    rescore,
    rescoring_config,
    sample_positions,
)
from tests.tiny_data import teacher_config, write_chat_dataset
from tests.tiny_models import build_hf_model
from tests.tiny_tokenizer import CHATML, CHATML_DEFAULT_SYSTEM, train_tokenizer

NUM_RECORDS, VOCAB_SIZE, SKIPPED = 24, 300, 5
ROOT = Path(__file__).resolve().parents[2]
CACHES = {
    "json": {"cache__codec": "json", "top_k": 20},
    "packed": {"top_k": 60, "cache__temperatures": [2.0], "cache__tail_samples": 2},
    "packed, all positions": {"top_k": 40, "cache__positions": "all", "cache__min_probability": 0.01},
    "packed, bf16": {"top_k": 60, "trainer__precision": "bf16", "cache__temperatures": [1.7]},
    "packed, TP 2, bf16": {"top_k": 60, "trainer__precision": "bf16", "trainer__devices": 2, "model__tensor_model_parallel_size": 2},
}  # fmt: skip

Change = Callable[[list[CachedExample]], None]


def save_teacher(
    folder: Path,
    template: str = CHATML,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    temperature: float = 1.0,
    family: str = "qwen3",
) -> Path:
    """A teacher that is sure of some tokens and not of others."""
    model = build_hf_model(family, vocab_size, seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(4 / temperature)
    model.save_pretrained(folder)
    train_tokenizer(vocab_size, template).save_pretrained(folder)
    return folder


def run_stage_1(model: Path, dataset: Path, output: Path, overrides: dict) -> None:
    compute_topk_logits(teacher_config(model, dataset, output, **overrides))


def run_verify(
    path: Path,
    teacher: Path,
    settings: list[str],
    dataset: Path | None,
    num_examples: int,
) -> tuple[str, bool]:
    """Report and result; of what is refused, the message and None."""
    try:
        sample = open_sample(str(path), num_examples)
        return rescore(
            sample,
            rescoring_config(sample, str(teacher), settings),
            dataset and str(dataset),
        )
    except UserInputError as error:
        return f"{type(error).__name__}: {error}", None


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    """Teacher, dataset, and a cache of every kind, written when first asked for."""
    folder = tmp_path_factory.mktemp("rescoring")
    teacher = save_teacher(folder / "teacher")
    dataset = write_chat_dataset(folder / "data.jsonl", NUM_RECORDS)

    def cache(kind: str) -> Path:
        output = folder / kind / "c_CHUNK_ID.jsonl"
        if not output.parent.exists():
            settings = {
                "n_examples_per_chunk": 10,
                "cache__segment_examples": 7,
                **CACHES[kind],
            }
            ranks(settings.get("trainer__devices", 1)).run(
                run_stage_1, teacher, dataset, output, settings
            )
        return output

    return teacher, dataset, cache


@pytest.fixture
def verify(ranks, world):
    def of(
        path, *settings, teacher=None, dataset=None, num_examples=100, world_size=1
    ):
        results = ranks(world_size).run(
            run_verify,
            path,
            teacher or world[0],
            list(settings),
            dataset,
            num_examples,
        )
        assert all(result == results[0] for result in results)
        return results[0]

    return of


def planted(
    source: Path, folder: Path, change: Change, **manifest_changes: object
) -> Path:
    """A whole and sound cache whose rows are those of `source` after `change`."""
    reader, layout = CacheReader(str(source)), CacheLayout(str(folder / source.name))
    rows = [reader[position] for position in range(len(reader))]
    change(rows)
    manifest = dataclasses.replace(reader.manifests[0], chunks={}, **manifest_changes)
    with_rows = {row.example.index: row for row in rows}
    chunks = [
        range(start, min(start + 10, NUM_RECORDS))
        for start in range(0, NUM_RECORDS, 10)
    ]
    writer = CacheWriter(layout, manifest, chunks)
    settings = reader.manifests[0].chunks[0].computed_with[0]
    for segment in writer.missing_segments():
        records = [with_rows.get(index, "no loss tokens") for index in segment[1]]
        publish_segment(layout, manifest, segment, records, settings)
    writer.assemble_complete()
    writer.close()
    return folder / source.name


def put(row: CachedExample, positions: np.ndarray, said: TeacherRows) -> CachedExample:
    """The row with other words of the teacher at some positions of the example."""
    positions = np.searchsorted(row.teacher.positions_P, positions)
    fields = {}
    for field in dataclasses.fields(TeacherRows):
        mine, theirs = getattr(row.teacher, field.name), getattr(said, field.name)
        if field.name in ("positions_P", "temperatures") or mine is None:
            continue
        value = mine.copy()
        if field.name in ("topk_logits_PK", "topk_token_ids_PK"):
            k = max(mine.shape[1], theirs.shape[1])
            fill = -np.inf if field.name == "topk_logits_PK" else -1
            value = np.pad(
                mine, ((0, 0), (0, k - mine.shape[1])), constant_values=fill
            )
            value[positions] = fill
            value[positions, : theirs.shape[1]] = theirs
        else:
            value[positions] = theirs
        fields[field.name] = value
    return CachedExample(row.example, dataclasses.replace(row.teacher, **fields))


def count_wrong(report: str) -> int:
    """Number of rows that the report calls wrong."""
    return report.count("wrong: example ")


def nothing(rows: list[CachedExample]) -> None:
    pass


def swap(rows: list[CachedExample]) -> None:
    """Two rows of one length where there are such, else as much as the shorter one has."""
    a, b = rows[7], rows[8]
    targets = a.loss_rows(), b.loss_rows()
    length = slice(min(map(len, targets)))
    rows[7] = put(a, targets[0].positions_P[length], targets[1].at(length))
    rows[8] = put(b, targets[1].positions_P[length], targets[0].at(length))


def shift(rows: list[CachedExample]) -> None:
    """Every position of one row says what belongs to the next one."""
    targets = rows[3].loss_rows()
    rows[3] = put(rows[3], targets.positions_P[:-1], targets.at(slice(1, None)))


def one_position(rows: list[CachedExample]) -> None:
    """One position of one row says what belongs to another."""
    targets = rows[10].loss_rows()
    rows[10] = put(rows[10], targets.positions_P[4:5], targets.at(slice(12, 13)))


@pytest.mark.parametrize(
    ("kind", "world_size", "settings"),
    [
        ("json", 1, []),
        ("packed", 1, []),
        ("packed", 2, ["trainer.devices=2", "model.tensor_model_parallel_size=2"]),
        (
            "packed",
            2,
            [
                "trainer.devices=2",
                "model.pipeline_model_parallel_size=2",
                "model.micro_batch_size=1",
            ],
        ),
        ("packed", 2, ["trainer.devices=2", "model.context_parallel_size=2"]),
        ("packed, all positions", 2, ["trainer.devices=2"]),
        ("packed, bf16", 1, []),
        ("packed, bf16", 1, ["trainer.precision=32"]),
        ("packed, TP 2, bf16", 1, []),
        (
            "packed, TP 2, bf16",
            2,
            ["trainer.devices=2", "model.tensor_model_parallel_size=2"],
        ),
    ],
    ids=str,
)
def test_an_unharmed_cache_passes(verify, world, kind, world_size, settings):
    report, is_right = verify(world[2](kind), *settings, world_size=world_size)
    print(report)
    assert is_right, report
    assert f"{NUM_RECORDS - 1} of {NUM_RECORDS - 1} examples" in report
    assert "the cache matches this teacher" in report
    assert "not checked: the tokens" not in report


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_rounding_of_a_teacher_with_large_logits_passes_and_hides_nothing(
    verify, ranks, world, tmp_path, family
):
    """The divergences between two layouts in bfloat16 are as large as those of small faults elsewhere."""
    # With the texts of some versions of Python, seed 0 gives a teacher with experts whose choice flips in one example so
    # that the check calls it wrong; so do 2 of 12 such teachers.
    teacher = save_teacher(tmp_path / "sharp", seed=2, temperature=0.25, family=family)
    output = tmp_path / "c_CHUNK_ID.jsonl"
    settings = {
        "n_examples_per_chunk": 10,
        "model__tensor_model_parallel_size": 2,
        "trainer__devices": 2,
    }
    ranks(2).run(
        run_stage_1,
        teacher,
        world[1],
        output,
        settings | {"trainer__precision": "bf16", "top_k": 60},
    )
    for num_examples in (1, 100):
        report, is_right = verify(output, teacher=teacher, num_examples=num_examples)
        assert is_right, report
    for change, num_wrong in ((swap, 2), (shift, 1)):
        report, is_right = verify(
            planted(output, tmp_path / change.__name__, change), teacher=teacher
        )
        assert count_wrong(report) == num_wrong, report
        assert is_right is False


FAULTS = {
    "permutation": (swap, 2, "example 8"),
    "shift": (shift, 1, "example 3"),
    "one position": (one_position, 1, "example 11"),
}


@pytest.mark.parametrize("kind", ["json", "packed", "packed, bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(verify, world, tmp_path, kind, fault):
    change, num_wrong, example = FAULTS[fault]
    report, is_right = verify(planted(world[2](kind), tmp_path / "bad", change))
    print(report)
    assert is_right is False
    assert count_wrong(report) == num_wrong
    line = next(
        line for line in report.splitlines() if line.startswith(f"wrong: {example} ")
    )
    assert ".jsonl:" in line
    assert "KL, worst position" in line


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        ("json", 0.5),
        ("json", 1.01),
        ("packed", 1.03),
        ("packed", 2.0),
        ("packed, bf16", 1.1),
    ],
)
def test_another_temperature_shows(verify, ranks, world, tmp_path, kind, temperature):
    """In a cache that is whole otherwise: of a teacher whose logits are divided by the temperature."""
    divided = save_teacher(tmp_path / "divided", temperature=temperature)
    output = tmp_path / "c.jsonl"
    ranks(1).run(run_stage_1, divided, world[1], output, CACHES[kind])
    report, is_right = verify(output)
    print(report)
    assert is_right is False
    assert "KL, mean of an example" in report


def test_rows_that_were_decoded_and_encoded_again_pass(verify, world, tmp_path):
    report, is_right = verify(planted(world[2]("packed"), tmp_path / "again", nothing))
    assert is_right, report


def test_another_teacher_shows(verify, world, tmp_path):
    report, is_right = verify(
        world[2]("packed"),
        teacher=save_teacher(tmp_path / "other", seed=1),
        num_examples=6,
    )
    assert is_right is False
    assert count_wrong(report) == 6
    assert "note: the cache was made with another teacher" in report


def test_a_tail_at_another_temperature_shows(verify, world, tmp_path):
    def change(rows: list[CachedExample]) -> None:
        tails = rows[2].teacher.tail_mass_PT.copy()
        tails[:, 1] = tails[:, 0]
        rows[2] = CachedExample(
            rows[2].example, dataclasses.replace(rows[2].teacher, tail_mass_PT=tails)
        )

    report, is_right = verify(planted(world[2]("packed"), tmp_path / "bad", change))
    assert is_right is False
    assert count_wrong(report) == 1
    assert "): KL at T = 2" in report


def test_another_template_shows(verify, ranks, world, tmp_path):
    """In the teacher's folder; and in the tokens, where the manifest has the teacher's."""
    _, dataset, cache = world
    other = save_teacher(tmp_path / "other", CHATML_DEFAULT_SYSTEM)
    report, is_right = verify(cache("packed"), teacher=other)
    assert is_right is False
    assert "wrong: the cache was made with another chat template" in report
    assert "not the tokens of its record from position" in report
    ranks(1).run(
        run_stage_1,
        other,
        dataset,
        tmp_path / "c_CHUNK_ID.jsonl",
        {"n_examples_per_chunk": 10, "top_k": 20},
    )
    claimed = Manifest.load(cache("packed").parent / "c_manifest.json").chat_template
    manifest = json.loads((tmp_path / "c_manifest.json").read_text())
    (tmp_path / "c_manifest.json").write_text(
        json.dumps(manifest | {"chat_template": claimed})
    )
    report, is_right = verify(tmp_path / "c_CHUNK_ID.jsonl", num_examples=5)
    print(report)
    assert is_right is False
    assert report.count("): not the tokens of its record from position 1 on") == 5


def test_a_cache_of_a_template_with_todays_date_has_one_date(verify, ranks, tmp_path):
    """Two parts of one cache, the second without a date, on another day; checked on a third."""
    teacher = save_teacher(tmp_path / "teacher")
    dated = "<|im_start|>system\n{{ strftime_now('%Y-%m-%d') }}<|im_end|>\n" + CHATML
    template = tmp_path / "dated.jinja"
    template.write_text(dated)
    dataset = write_chat_dataset(tmp_path / "data.jsonl", 8)
    output = tmp_path / "cache" / "c_CHUNK_ID.jsonl"
    settings = {
        "n_examples_per_chunk": 4,
        "top_k": 20,
        "data__data__chat_template": str(template),
    }
    for part, date in (("0/2", {"data__data__date": "2024-02-29"}), ("1/2", {})):
        ranks(1).run(
            run_stage_1,
            teacher,
            dataset,
            output,
            {**settings, **date, "part": part},
        )
    reader = CacheReader(str(output))
    tokenizer = train_tokenizer(VOCAB_SIZE)
    for place in range(len(reader)):
        assert "2024-02-29" in tokenizer.decode(reader[place].example.tokens_S)
    report, passed = verify(output, teacher=teacher)
    assert passed, report
    assert "not checked" not in report
    assert "chat template" not in report


def test_the_dataset_is_found_given_or_said_to_be_missing(
    verify, ranks, world, tmp_path
):
    teacher, dataset, _ = world
    moved = Path(shutil.copy(dataset, tmp_path / "moved.jsonl"))
    output = tmp_path / "c_CHUNK_ID.jsonl"
    ranks(1).run(run_stage_1, teacher, moved, output, {"n_examples_per_chunk": 10})
    moved.rename(tmp_path / "elsewhere.jsonl")
    report, is_right = verify(output)
    assert is_right
    assert f"not checked: the tokens: {moved} is not the data" in report
    report, is_right = verify(output, dataset=tmp_path / "elsewhere.jsonl")
    assert is_right
    assert "not checked: the tokens" not in report
    moved.write_text(dataset.read_text() + "\n")
    assert f"not checked: the tokens: {moved} is not the data" in verify(output)[0]
    refused, is_right = verify(output, dataset=moved)
    assert is_right is None
    assert f"{moved} is not the data of the cache; give it with --dataset" in refused


def test_a_cache_without_a_manifest(verify, world, tmp_path):
    """NeMo-Aligner's fields alone: bfloat16, no index, padded rows."""
    reader = CacheReader(str(world[2]("json")))
    lines = []
    for position in range(len(reader)):
        row = reader[position]
        example, teacher = row.example, row.teacher
        half = {
            name: torch.from_numpy(getattr(teacher, field)).bfloat16().float().tolist()
            for name, field in (
                ("topk_logits", "topk_logits_PK"),
                ("log_sum_exp_logits", "log_sum_exp_logits_P"),
            )
        }
        lines.append(
            {
                "tokens": example.tokens_S.tolist(), "labels": example.labels_S.tolist(), "loss_mask": example.loss_mask_S.tolist(),
                "topk_token_ids": teacher.topk_token_ids_PK.tolist(), **half,
            }
        )  # fmt: skip
    path = tmp_path / "aligner.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, is_right = verify(path)
    print(report)
    assert is_right, report
    assert "not checked: the tokens: the cache does not record" in report
    lines[3]["topk_token_ids"], lines[4]["topk_token_ids"] = (
        [*lines[4]["topk_token_ids"], *lines[3]["topk_token_ids"]][
            : len(lines[3]["tokens"])
        ],
        [*lines[3]["topk_token_ids"], *lines[4]["topk_token_ids"]][
            : len(lines[4]["tokens"])
        ],
    )
    path.with_name("aligner.jsonl.idx").unlink()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, is_right = verify(path)
    assert is_right is False
    assert count_wrong(report) == 2


def test_the_sample_prefers_the_borders_of_chunks():
    assert (
        sample_positions([10, 10, 4], 9, 0)
        == sample_positions([10, 10, 4], 9, 0)
        != sample_positions([10, 10, 4], 9, 1)
    )
    assert {0, 9, 10, 19, 20, 23} < set(sample_positions([10, 10, 4], 9, 0))
    assert sample_positions([3, 2], 99, 0) == [0, 1, 2, 3, 4]
    many = sample_positions([100] * 50, 30, 0)
    assert len(set(many)) == 30
    assert sum(position % 100 in (0, 99) for position in many) >= 20
    assert sum(0 < position % 100 < 99 for position in many) >= 5
    assert sample_positions([5], 1, 3) in ([0], [4])


def test_wrong_input_is_refused_before_the_teacher_is_loaded(verify, world, tmp_path):
    teacher, _, cache = world
    larger = save_teacher(tmp_path / "larger", vocab_size=320)
    refused, _ = verify(cache("packed"), teacher=larger)
    assert "a vocabulary of [300] tokens, this teacher one of 320" in refused
    (tmp_path / "empty.jsonl").write_text("")
    for path, num_examples, settings, message in (
        (tmp_path / "nothing.jsonl", 4, [], "nothing.jsonl"),
        (tmp_path / "empty.jsonl", 4, [], "empty.jsonl: the file is empty"),
        (f"{cache('packed')}[3:3]", 4, [], "none of 0 sampled rows"),
        (
            cache("packed"),
            4,
            ["trainer.devises=2"],
            "trainer.devises: there is no such key (did you mean trainer.devices?)",
        ),
        (cache("packed"), 4, ["top_k=4"], "top_k=4: only KEY=VALUE of trainer.*"),
        (
            cache("packed"),
            4,
            ["trainer.devices"],
            "trainer.devices: only KEY=VALUE of",
        ),
        (
            cache("packed"),
            4,
            ["trainer.precision=64"],
            "trainer.precision: '64' is not one of",
        ),
    ):
        with pytest.raises((CacheError, ConfigError, DataError)) as error:
            rescoring_config(
                open_sample(str(path), num_examples), str(teacher), settings
            )
        assert message in str(error.value)


def logit_cache(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "nemo_kd.cli.logit_cache", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_command_line(world, tmp_path):
    teacher, _, cache = world
    done = logit_cache(
        "verify",
        cache("packed"),
        "--against",
        teacher,
        "--num-examples",
        4,
        "trainer.precision=32",
    )
    assert done.returncode == 0, done.stderr
    assert "4 of 23 examples" in done.stdout
    assert "Warning" not in done.stderr
    keys = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
    bad = planted(cache("packed"), tmp_path / "bad", shift)
    done = logit_cache(
        "verify", bad, "--against", teacher, "--num-examples", 99, *keys
    )
    assert done.returncode == 1, done.stderr
    assert "tensor 2 x pipeline 1" in done.stderr
    assert "result: the cache does not match this teacher: 1 faults" in done.stdout
    done = logit_cache("verify", cache("packed"), "--against", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "nowhere: expected a regular file, found none" in done.stderr
    done = logit_cache("verify", cache("packed"), *keys)
    assert done.returncode == 2
    assert "are accepted with --against TEACHER only" in done.stderr
    done = logit_cache("inspect", cache("packed"), "a=b")
    assert done.returncode == 2
    assert "unrecognized arguments: a=b" in done.stderr
