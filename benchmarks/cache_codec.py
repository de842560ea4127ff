"""Size, error and speed of a logit cache: what a line weighs, what its codec loses, how fast it is written and read.

    OMP_NUM_THREADS=1 python -m benchmarks.cache_codec [--data-dir DIR] [--cache train_CHUNK_ID.jsonl.zst]

Bytes are those of whole lines. The codec's error is the KL divergence, in nats, from the exact float64 distribution over
the kept tokens and one bucket for all others to the decoded one. Speeds are tokens per second of CPU time on one core,
the best of several repetitions.

Shape legend: N positions, K kept tokens.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard

from benchmarks import synthetic_teacher
from benchmarks.synthetic_teacher import SyntheticTeacher
from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache.layout import CacheLayout, lines_of
from nemo_kd.cache.manifest import Manifest, codec_settings
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.record import decode, encode
from nemo_kd.cache.reduce import keep
from nemo_kd.cache.segment import publish_segment
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.data import CacheConfig


class Setting(NamedTuple):
    name: str
    cache: CacheConfig
    top_k: int


SETTINGS = (
    Setting("default: p >= 5e-4, at most 128", CacheConfig(), 128),
    Setting("compact: p >= 1e-3, at most 128", CacheConfig(min_probability=1e-3), 128),
    Setting("top-100", CacheConfig(min_probability=0), 100),
    Setting(
        "head of 16, top-p 0.95, and 4 tail samples",
        CacheConfig(
            min_probability=0,
            top_p=synthetic_teacher.HEAD_TOP_P,
            tail_samples=synthetic_teacher.TAIL_SAMPLES,
        ),
        synthetic_teacher.HEAD_K,
    ),
    Setting("`json` codec, top-100", CacheConfig(codec="json"), 100),
)


class Measured(NamedTuple):
    """Of one setting; sizes in bytes a token, speeds in tokens per second of whole .jsonl.zst lines."""

    setting: str
    kept: float
    plain_bytes: float
    zst_bytes: float
    kl_mean: float
    kl_p99: float
    encode: float
    decode: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "nemo_kd_benchmarks",
    )
    parser.add_argument(
        "--cache",
        help="rows of this cache are measured too: a path or template, [a:b] selects",
    )
    parser.add_argument(
        "--num-positions", type=int, default=synthetic_teacher.NUM_POSITIONS
    )
    parser.add_argument("--vocab-size", type=int, default=synthetic_teacher.VOCAB_SIZE)
    parser.add_argument("--seq-length", type=int, default=synthetic_teacher.SEQ_LENGTH)
    parser.add_argument(
        "--chunk-examples",
        type=int,
        nargs=2,
        default=(2000, 200),
        help="of the two chunks read from",
    )
    parser.add_argument(
        "--scanned-examples",
        type=int,
        default=100,
        help="of the json chunk that is scanned",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="for each speed")
    options = parser.parse_args(arguments)
    # glibc hands out memory faster once a process has freed a large block, as any process that loads a model has.
    np.empty(31 << 20, dtype=np.uint8).fill(0)
    print(
        f"{date.today()}, {_machine()}, Python {platform.python_version()}, numpy {np.__version__}\n"
    )
    teacher = synthetic_teacher.synthetic_teacher(
        options.data_dir, options.num_positions, options.vocab_size
    )
    rows = synthetic_rows(teacher, options.seq_length)
    print(
        f"Synthetic teacher, {len(teacher.labels_N):,} tokens, {options.vocab_size:,} words:\n"
    )
    print_codecs(
        [
            *(
                measure(setting, rows, teacher, options.seconds)
                for setting in SETTINGS
            ),
            measure_arrays(rows, options.seconds),
        ]
    )
    if options.cache:
        reader = CacheReader(options.cache)
        rows = [reader[position] for position in range(len(reader))]
        print(
            f"\n{options.cache}, {sum(row.example.num_loss_tokens for row in rows):,} loss tokens:\n"
        )
        # Samples cannot be drawn from a tail that is not there.
        print_codecs(
            [
                measure(setting, rows, None, options.seconds)
                for setting in SETTINGS
                if not setting.cache.tail_samples
            ]
        )
    print(
        f"\nRandom access, CPU time for an example of {options.seq_length} tokens:\n"
    )
    with tempfile.TemporaryDirectory(dir=options.data_dir) as folder:
        print_access(Path(folder), teacher, options)


def synthetic_rows(teacher: SyntheticTeacher, seq_length: int) -> list[CachedExample]:
    """Sequences of the positions one after the other, all of which count in the loss."""
    rows = []
    for index, start in enumerate(range(0, len(teacher.labels_N), seq_length)):
        mine = slice(start, start + seq_length)
        logits_SK, log_sum_exp_S = (
            teacher.logits_NK[mine].astype(np.float64),
            teacher.log_sum_exp_N[mine],
        )
        labels_S = teacher.labels_N[mine].astype(np.int64)
        tokens_S = np.append(synthetic_teacher.FIRST_TOKEN, labels_S[:-1])
        tail_S = np.clip(
            1 - np.exp(logits_SK - log_sum_exp_S[:, None]).sum(axis=1), 0, 1
        )
        row = TeacherRows(
            positions_P=np.arange(len(labels_S)),
            topk_logits_PK=(logits_SK - logits_SK[:, :1]).astype(np.float32),
            topk_token_ids_PK=teacher.ids_NK[mine],
            log_sum_exp_logits_P=(log_sum_exp_S - logits_SK[:, 0]).astype(np.float32),
            tail_mass_PT=tail_S[:, None].astype(np.float32),
            label_logprobs_P=teacher.label_logprobs_N[mine].astype(np.float32),
        )
        rows.append(
            CachedExample(
                Example(index, tokens_S, labels_S, np.ones(len(labels_S), np.float32)),
                row,
            )
        )
    return rows


def reduced(
    setting: Setting, rows: list[CachedExample], teacher: SyntheticTeacher | None
) -> list[CachedExample]:
    """The rows with what the setting keeps of them."""
    found, start = [], 0
    for row in rows:
        kept_SK = setting.cache.kept(np.exp(logprobs(row.teacher))) & (
            row.teacher.topk_token_ids_PK >= 0
        )
        kept_SK[:, setting.top_k :] = False
        fields = keep(row.teacher, kept_SK)
        if setting.cache.tail_samples and teacher is not None:
            samples = teacher.tail_ids_NM[start : start + row.example.num_tokens]
            fields = replace(fields, tail_token_ids_PM=samples)
        start += row.example.num_tokens
        found.append(CachedExample(row.example, fields))
    return found


def logprobs(teacher: TeacherRows) -> np.ndarray:
    """Float64, -inf where nothing is kept."""
    return (
        teacher.topk_logits_PK.astype(np.float64)
        - teacher.log_sum_exp_logits_P[:, None]
    )


def measure(
    setting: Setting,
    rows: list[CachedExample],
    teacher: SyntheticTeacher | None,
    seconds: float,
) -> Measured:
    """One line of the table."""
    inputs, codec = reduced(setting, rows, teacher), setting.cache.codec
    plain = [encode(row, codec) for row in inputs]
    lines = lines_of("chunk.jsonl.zst")
    raw = [lines.write(line) for line in plain]
    encode_s = best_s(
        lambda: [lines.write(encode(row, codec)) for row in inputs], seconds
    )
    decode_s = best_s(
        lambda: [decode(lines.read(frame, "line"), "line") for frame in raw], seconds
    )
    kl_N = np.concatenate(
        [
            codec_kl(row, decode(line, "line"))
            for row, line in zip(inputs, plain, strict=True)
        ]
    )
    num_tokens = sum(row.example.num_tokens for row in inputs)
    num_kept = sum(
        int((row.loss_rows().topk_token_ids_PK >= 0).sum()) for row in inputs
    )
    return Measured(
        setting.name, num_kept / len(kl_N), sum(map(len, plain)) / num_tokens, sum(map(len, raw)) / num_tokens,
        float(kl_N.mean()), float(np.percentile(kl_N, 99)), num_tokens / encode_s, num_tokens / decode_s,
    )  # fmt: skip


def measure_arrays(rows: list[CachedExample], seconds: float) -> Measured:
    """Measure the plain alternative: arrays in half precision of the likeliest 100 tokens, saved by torch.

    Megatron-LM's cache is of this kind, one such file per batch in a tar. It does not store tokens, labels or masks.
    """
    inputs = reduced(SETTINGS[2], rows, None)
    plain = [save_arrays(row.teacher) for row in inputs]
    raw = [zstandard.compress(each) for each in plain]
    encode_s = best_s(
        lambda: [zstandard.compress(save_arrays(row.teacher)) for row in inputs],
        seconds,
    )
    decode_s = best_s(lambda: [load_arrays(each) for each in raw], seconds)
    kls = []
    for row, each in zip(inputs, raw, strict=True):
        ids_SK, logprobs_SK = load_arrays(each)
        decoded = replace(
            row.teacher,
            topk_logits_PK=logprobs_SK.numpy(),
            topk_token_ids_PK=ids_SK.numpy(),
            log_sum_exp_logits_P=np.zeros(len(ids_SK), np.float32),
        )
        kls.append(codec_kl(row, replace(row, teacher=decoded)))
    kl_N = np.concatenate(kls)
    num_tokens = len(kl_N)
    return Measured(
        "float16 arrays of torch, top-100", SETTINGS[2].top_k,
        sum(map(len, plain)) / num_tokens, sum(map(len, raw)) / num_tokens,
        float(kl_N.mean()), float(np.percentile(kl_N, 99)), num_tokens / encode_s, num_tokens / decode_s,
    )  # fmt: skip


def save_arrays(teacher: TeacherRows) -> bytes:
    """Save log-probabilities as float16, and ids as 16 bits and the bits above."""
    ids_SK = torch.from_numpy(teacher.topk_token_ids_PK.astype(np.int32))
    fields = {
        "logprobs": torch.from_numpy(logprobs(teacher)).half(),
        "low": (ids_SK & 0xFFFF).to(torch.uint16),
        "high": (ids_SK >> 16).to(torch.uint8),
    }
    file = io.BytesIO()
    torch.save(fields, file)
    return file.getvalue()


def load_arrays(raw: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and log-probabilities, as a loss takes them."""
    fields = torch.load(io.BytesIO(zstandard.decompress(raw)), weights_only=True)
    ids_SK = fields["high"].int() << 16 | fields["low"].int()
    return ids_SK, fields["logprobs"].float()


def codec_kl(row: CachedExample, decoded: CachedExample) -> np.ndarray:
    """KL(exact || decoded) of every loss position, over its kept tokens and one bucket for the others."""
    found = decoded.loss_rows()
    exact_ids_NK, exact_NK = _by_id(row.loss_rows())
    ids_NK, found_NK = _by_id(found)
    if not np.array_equal(ids_NK, exact_ids_NK):
        raise ValueError(f"example {row.example.index}: the kept ids have changed")
    p_NK = np.exp(exact_NK)
    difference_NK = np.where(ids_NK >= 0, exact_NK, 0) - np.where(
        ids_NK >= 0, found_NK, 0
    )
    tail_N = np.maximum(1 - p_NK.sum(axis=1), 1e-15)
    found_tail_N = np.maximum(found.tail_mass_PT[:, 0].astype(np.float64), 1e-15)
    return (p_NK * difference_NK).sum(axis=1) + tail_N * np.log(tail_N / found_tail_N)


def _by_id(teacher: TeacherRows) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, log-probabilities) in ascending order of the ids, unused entries first."""
    ids_NK = teacher.topk_token_ids_PK
    order_NK = np.argsort(ids_NK, axis=1)[
        :, -max(1, int((ids_NK >= 0).sum(axis=1).max(initial=1))) :
    ]
    found_NK = logprobs(teacher)
    return np.take_along_axis(ids_NK, order_NK, 1), np.take_along_axis(
        found_NK, order_NK, 1
    )


def best_s(work: Callable[[], Any], seconds: float) -> float:
    """Least CPU time of several repetitions."""
    least, end = float("inf"), time.perf_counter() + seconds
    while least == float("inf") or time.perf_counter() < end:
        started = time.process_time()
        work()
        least = min(least, time.process_time() - started)
    return least


def print_codecs(table: list[Measured]) -> None:
    print(
        "| setting | kept | B/token .jsonl | B/token .jsonl.zst | codec KL mean / p99 | encode tokens/s | decode tokens/s |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in table:
        print(
            f"| {row.setting} | {row.kept:.1f} | {row.plain_bytes:,.1f} | {row.zst_bytes:,.1f} "
            f"| {row.kl_mean:.2e} / {row.kl_p99:.2e} | {row.encode:,.0f} | {row.decode:,.0f} |"
        )


def print_access(
    folder: Path, teacher: SyntheticTeacher, options: argparse.Namespace
) -> None:
    """Reads examples at random through CacheReader, and as NeMo-Aligner does: line by line from the top of the chunk."""
    print(
        "| reader | examples a chunk | chunk | ms an example: mean / p99 |\n|---|---|---|---|"
    )
    rows = synthetic_rows(teacher, options.seq_length)
    for num_examples in options.chunk_examples:
        path = write_cache(
            folder / f"packed_{num_examples}_CHUNK_ID.jsonl.zst",
            SETTINGS[0],
            rows,
            num_examples,
        )
        reader = CacheReader(str(path))
        _print_times(
            "`CacheReader`, packed .jsonl.zst",
            path,
            num_examples,
            reader.__getitem__,
            200,
        )
    path = write_cache(
        folder / "json_CHUNK_ID.jsonl", SETTINGS[-1], rows, options.scanned_examples
    )

    def scan(wanted: int) -> Any:
        with open(str(path).replace("CHUNK_ID", "0"), encoding="utf-8") as file:
            for number, line in enumerate(file):
                if number == wanted:
                    return json.loads(line)

    reader = CacheReader(str(path))
    _print_times(
        "`CacheReader`, json top-100 .jsonl",
        path,
        options.scanned_examples,
        reader.__getitem__,
        50,
    )
    _print_times(
        "scan as NeMo-Aligner's, same file", path, options.scanned_examples, scan, 50
    )


def _print_times(
    name: str, path: Path, num_examples: int, read: Callable[[int], Any], count: int
) -> None:
    size = Path(str(path).replace("CHUNK_ID", "0")).stat().st_size / 1e6
    times_ms = []
    for position in (
        np.random.default_rng(0).integers(num_examples, size=count + 5).tolist()
    ):
        started = time.process_time()
        read(position)
        times_ms.append(1000 * (time.process_time() - started))
    times_ms = times_ms[5:]  # the first ones open files and fill tables
    mean, high = np.mean(times_ms), np.percentile(times_ms, 99)
    print(f"| {name} | {num_examples:,} | {size:,.1f} MB | {mean:.2f} / {high:.2f} |")


def write_cache(
    path: Path, setting: Setting, rows: list[CachedExample], num_examples: int
) -> Path:
    """A cache of one chunk, whose examples repeat the rows."""
    layout, indices = CacheLayout(str(path)), range(num_examples)
    manifest = Manifest(
        codec=codec_settings(setting.cache), top_k=setting.top_k, vocab_size=1 << 24, tokenizer_size=1 << 24,
        seq_length=rows[0].example.num_tokens, teacher={"name": "synthetic"}, tokenizer="", chat_template=None,
        dataset={"start_from_idx": 0, "end_at_idx": num_examples - 1}, n_examples_per_chunk=None,
        segment_examples=num_examples,
    )  # fmt: skip
    writer = CacheWriter(layout, manifest, [indices])
    inputs = reduced(setting, rows, None)
    numbered = []
    for index in indices:
        row = inputs[index % len(inputs)]
        numbered.append(replace(row, example=replace(row.example, index=index)))
    publish_segment(layout, manifest, (0, indices), numbered, {})
    writer.assemble_complete()
    writer.close()
    return path


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    return f"{cpu}, no GPU used"


if __name__ == "__main__":
    main()
