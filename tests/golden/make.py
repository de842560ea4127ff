"""Writes the golden caches anew, which only a new version of the format calls for: python -m tests.golden.make

`rows.json` holds the rows before anything was rounded away. Three caches hold them: `loss` (packed, compressed, what
counts in the loss, two temperatures, tail samples), `all` (packed, plain, every position) and `numbers` (json codec).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.manifest import Manifest, codec_settings
from nemo_kd.cache.segment import publish_segment
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.data import CacheConfig

FOLDER = Path(__file__).parent
CACHES = {
    "loss_CHUNK_ID.jsonl.zst": CacheConfig(
        min_probability=0.01, temperatures=[2.0], tail_samples=2
    ),
    "all_CHUNK_ID.jsonl": CacheConfig(positions="all", min_probability=0.02),
    "numbers_CHUNK_ID.jsonl": CacheConfig(
        codec="json", temperatures=[2.0], tail_samples=2
    ),
}
VOCAB_SIZE, CANDIDATES, JSON_K, SKIPPED = 200_000, 300, 3, 3
MASKS = {
    0: [0, 0, 1, 1, 0, 1],
    1: [1],
    2: [0, 1, 1, 0, 0],
    4: [0, 1, 1, 1, 1],
    5: [0, 0],
}
"""Loss masks by index: length 1, positions behind the loss, none in the loss; record 3 is skipped."""


def row(index: int, name: str) -> CachedExample:
    """A teacher that knows 300 tokens: flat ones, sharp ones, one that is certain."""
    cache, mask, random = CACHES[name], MASKS[index], np.random.default_rng(index)
    length = len(mask)
    ids_SC = np.argsort(random.random((length, VOCAB_SIZE)), axis=1)[:, :CANDIDATES]
    spread_S = np.array(
        [
            0.05 if index == 4 and s > 0 else [3, 1.5, 6, 25][s % 4]
            for s in range(length)
        ]
    )
    logits_SC = -np.sort(
        -random.normal(size=(length, CANDIDATES)) * spread_S[:, None], axis=1
    )
    logits_SC = np.round(logits_SC - logits_SC[:, :1], 2)
    p_SC = np.exp(logits_SC) / np.exp(logits_SC).sum(axis=1, keepdims=True)
    if cache.codec == "json":
        kept_SC = np.arange(CANDIDATES) < np.full((length, 1), JSON_K)
    else:
        # Flat positions keep more than 256 tokens, which take two bytes to count, together enough for classes of ids.
        kept_SC = (
            cache.kept(p_SC)
            | (np.arange(CANDIDATES) < 260)
            & ((spread_S == 0.05) & (cache.positions == "loss"))[:, None]
        )
    places_S = np.array([[0, CANDIDATES - 1, 1][s % 3] for s in range(length)])
    pick = np.arange(length), places_S
    samples_SM = np.full((length, 2), -1)
    for s in range(1, length, 2):
        samples_SM[s] = np.sort(random.choice(ids_SC[s][~kept_SC[s]], 2))
    heads = [
        (np.where(kept_SC, w, 0).sum(1) / w.sum(1))
        for w in (np.exp(logits_SC / t) for t in temperatures(cache))
    ]
    teacher = TeacherRows(
        positions_P=np.arange(length),
        topk_logits_PK=np.where(kept_SC, logits_SC, -np.inf).astype(np.float32),
        topk_token_ids_PK=np.where(kept_SC, ids_SC, -1),
        log_sum_exp_logits_P=(logits_SC - np.log(p_SC))[:, 0].astype(np.float32),
        tail_mass_PT=np.clip(1 - np.array(heads), 0, 1).astype(np.float32).T,
        temperatures=temperatures(cache),
        label_logprobs_P=np.log(p_SC[pick]).astype(np.float32),
        tail_token_ids_PM=samples_SM if cache.tail_samples else None,
    )
    k = int(kept_SC.sum(axis=1).max())
    teacher = replace(
        teacher,
        topk_logits_PK=teacher.topk_logits_PK[:, :k],
        topk_token_ids_PK=teacher.topk_token_ids_PK[:, :k],
    )
    tokens_S = random.integers(VOCAB_SIZE, size=length)
    return CachedExample(
        Example(index, tokens_S, ids_SC[pick], np.array(mask, dtype=np.float32)),
        teacher,
    )


def temperatures(cache: CacheConfig) -> tuple[float, ...]:
    return (1.0, *cache.temperatures)


def floats(values: np.ndarray) -> Any:
    return (
        float(str(values)) if values.ndim == 0 else [floats(value) for value in values]
    )


def to_json(row: CachedExample) -> dict[str, Any]:
    """The row as lists, used entries only; floats with the fewest digits that give the same float32."""
    example, teacher = row.example, row.teacher
    counts = (teacher.topk_token_ids_PK >= 0).sum(axis=1).tolist()
    samples = teacher.tail_token_ids_PM
    return {
        "index": example.index, "tokens": example.tokens_S.tolist(), "labels": example.labels_S.tolist(),
        "loss_mask": example.loss_mask_S.astype(int).tolist(), "temperatures": list(teacher.temperatures),
        "topk_logits": [floats(x[:n]) for x, n in zip(teacher.topk_logits_PK, counts, strict=True)],
        "topk_token_ids": [x[:n].tolist() for x, n in zip(teacher.topk_token_ids_PK, counts, strict=True)],
        "log_sum_exp_logits": floats(teacher.log_sum_exp_logits_P),
        "tail_mass": floats(teacher.tail_mass_PT.T),
        "label_logprobs": floats(teacher.label_logprobs_P),
        "tail_token_ids": None if samples is None else samples.tolist(),
    }  # fmt: skip


def from_json(fields: dict[str, Any]) -> CachedExample:
    """The row that `to_json` wrote."""
    k = max(map(len, fields["topk_logits"]))
    f32, samples = np.float32, fields["tail_token_ids"]
    teacher = TeacherRows(
        positions_P=np.arange(len(fields["tokens"])),
        topk_logits_PK=np.array(
            [x + [-np.inf] * (k - len(x)) for x in fields["topk_logits"]], dtype=f32
        ),
        topk_token_ids_PK=np.array(
            [x + [-1] * (k - len(x)) for x in fields["topk_token_ids"]]
        ),
        log_sum_exp_logits_P=np.array(fields["log_sum_exp_logits"], dtype=f32),
        tail_mass_PT=np.array(fields["tail_mass"], dtype=f32).T,
        temperatures=tuple(fields["temperatures"]),
        label_logprobs_P=np.array(fields["label_logprobs"], dtype=f32),
        tail_token_ids_PM=None if samples is None else np.array(samples),
    )
    mask_S = np.array(fields["loss_mask"], dtype=f32)
    return CachedExample(
        Example(
            fields["index"],
            np.array(fields["tokens"]),
            np.array(fields["labels"]),
            mask_S,
        ),
        teacher,
    )


def write(folder: Path, name: str, rows: list[CachedExample]) -> None:
    """A cache of two chunks of three records each."""
    cache, layout = CACHES[name], CacheLayout(str(folder / name))
    manifest = Manifest(
        codec=codec_settings(cache), top_k=CANDIDATES, vocab_size=VOCAB_SIZE, tokenizer_size=VOCAB_SIZE, seq_length=8,
        teacher={"name": "golden", "weights": "none"}, tokenizer="none", chat_template=None, n_examples_per_chunk=3,
        dataset={"path": "golden", "fingerprint": "none", "start_from_idx": 0, "end_at_idx": 5},
    )  # fmt: skip
    writer, by_index = (
        CacheWriter(layout, manifest, [range(3), range(3, 6)]),
        {row.example.index: row for row in rows},
    )
    for segment in writer.missing_segments():
        records = [
            "empty" if index == SKIPPED else by_index[index] for index in segment[1]
        ]
        publish_segment(layout, manifest, segment, records, {"precision": "float32"})
    writer.assemble_complete()
    writer.close()
    layout.lock_path.unlink()


def tiny_row() -> CachedExample:
    """The worked example of docs/cache_format.md."""
    teacher = TeacherRows(
        positions_P=np.arange(3),
        topk_logits_PK=np.array(
            [[0, -np.inf], [0, -1.25], [0, -np.inf]], dtype=np.float32
        ),
        topk_token_ids_PK=np.array([[1, -1], [6, 900], [2, -1]]),
        log_sum_exp_logits_P=np.array([0, 0.5, 0.01], dtype=np.float32),
        tail_mass_PT=np.array([[0], [0.22], [0.01]], dtype=np.float32),
        label_logprobs_P=np.array([0, -4.0, -0.01], dtype=np.float32),
    )
    example = Example(
        7,
        np.array([5, 6, 9]),
        np.array([6, 9, 2]),
        np.array([0, 1, 1], dtype=np.float32),
    )
    return CachedExample(example, teacher)


def main() -> None:
    for path in FOLDER.glob("*_*"):
        if path.suffix != ".py":
            path.unlink()
    rows = {name: [row(index, name) for index in MASKS] for name in CACHES}
    (FOLDER / "rows.json").write_text(
        json.dumps(
            {name: [to_json(row) for row in found] for name, found in rows.items()}
        )
        + "\n"
    )
    for name, found in rows.items():
        write(FOLDER, name, found)


if __name__ == "__main__":
    main()
