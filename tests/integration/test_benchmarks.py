"""The benchmarks run and their tables hold what they are about; figures are for machines with nothing beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_codec_benchmark_runs_on_a_tiny_setting(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.cache_codec", f"--data-dir={tmp_path}", "--num-positions=96", "--vocab-size=3000",
        "--seq-length=32", "--chunk-examples", "20", "5", "--scanned-examples=5", "--seconds=0.02",
        f"--cache={ROOT / 'tests' / 'golden' / 'numbers_CHUNK_ID.jsonl'}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    codecs = [row for row in rows if len(row) == 7 and row[0] != "setting"]
    assert len(codecs) == 5 + 4  # a cache has no tail to draw samples from
    for name, kept, plain, zst, kl, encode, decode in codecs[:5]:
        mean, p99 = map(float, kl.split(" / "))
        assert -1e-6 < mean <= p99 < 2e-3, name
        assert float(zst.replace(",", "")) < float(plain.replace(",", ""))
        assert float(kept) >= 1
        assert min(int(speed.replace(",", "")) for speed in (encode, decode)) > 0
    access = [row for row in rows if len(row) == 4 and row[0] != "reader"]
    assert [row[1] for row in access] == ["20", "5", "5", "5"]
