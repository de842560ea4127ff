"""`logit_cache inspect`: its figures are right, and its page is complete in itself and safe."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.data.tokenizer import tokenizer_fingerprint
from nemo_kd.evaluation.inspect_cache import (
    Alternative,
    InspectedToken,
    check_tokenizer,
    entropies,
    histogram,
    inspected_tokens,
    report,
    statistics,
    token_text,
)
from nemo_kd.evaluation.inspect_page import page
from tests.tiny_cache import row, write
from tests.tiny_tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def inspect(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "nemo_kd.cli.logit_cache", "inspect", *map(str, words)]
    return subprocess.run(line, check=False, cwd=ROOT, capture_output=True, text=True)


def test_figures_against_plain_sums(tmp_path):
    found = statistics(CacheReader(str(write(tmp_path))), 1000)
    rows = [row(index, 3 + index % 4) for index in range(10)]
    masses, entropy, logprobs, hits = [], [], [], []
    for one in rows:
        for s in np.flatnonzero(one.example.loss_mask_S):
            p = np.exp(one.teacher.topk_logits_SK[s].astype(float) - one.teacher.log_sum_exp_logits_S[s])
            parts = [*p, 1 - p.sum()]
            masses.append(p.sum())
            entropy.append(-sum(part * np.log(part) for part in parts))
            logprobs.append(one.teacher.label_logprobs_S[s])
            hits.append(one.example.labels_S[s] in one.teacher.topk_token_ids_SK[s])
    assert found.num_rows == 10
    np.testing.assert_allclose(found.kept_mass, masses, atol=1e-6)
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-5)
    np.testing.assert_allclose(found.label_logprob, logprobs, atol=1e-6)
    assert found.label_kept.tolist() == hits
    assert set(found.num_kept.tolist()) == {4}
    assert len(statistics(CacheReader(str(tmp_path / "train_CHUNK_ID.jsonl")), 3).num_kept) < len(masses)


def test_entropy_of_what_is_not_known_is_zero():
    one = row(0)
    nothing = replace(one.teacher, topk_token_ids_SK=np.full((5, 4), -1), topk_logits_SK=np.full((5, 4), -np.inf))
    assert entropies(replace(one, teacher=nothing)).tolist() == [0] * 5


def test_histograms_count_every_value_once():
    assert histogram(np.array([1, 2, 2, 3, 4, 1000]), (1, 2, 3, 5, float("inf"))) == [
        ("1", 1 / 6), ("2", 2 / 6), ("3 - 4", 2 / 6), ("5 or more", 1 / 6)
    ]  # fmt: skip
    assert histogram(np.array([0.0, 1.0]), (0.0, 0.5, 1.0)) == [("0 - 0.5", 0.5), ("0.5 - 1", 0.5)]


def test_tokens_with_their_alternatives():
    tokenizer, one = train_tokenizer(300), row(4, 6, vocab_size=300)
    tokens = inspected_tokens(one, tokenizer, 3)
    assert len(tokens) == 7
    assert [token.in_loss for token in tokens] == [False, False, False, False, True, True, True]
    last, ids = tokens[-1], one.teacher.topk_token_ids_SK[-1]
    assert [other.text for other in last.alternatives] == [token_text(int(token), tokenizer) for token in ids[:3]]
    label = int(one.example.labels_S[-1])
    assert last.rank == (ids.tolist().index(label) + 1 if label in ids else None)
    assert last.probability == pytest.approx(float(np.exp(one.teacher.label_logprobs_S[-1])), rel=1e-5)


def test_pieces_of_characters_are_spelled_as_the_tokenizer_does():
    tokenizer = train_tokenizer(300)
    texts = [token_text(token, tokenizer) for token in range(300)]
    assert all(texts)
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)
    assert token_text(5, None) == "[5]"


class Parser(HTMLParser):
    """Collects tags, and checks that every one is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_the_page_is_whole_safe_and_needs_nothing():
    hostile = "<script>alert(1)</script>\"'&"
    token = InspectedToken(hostile, True, 5.0, 0.25, 2, 0.2, [Alternative(" a\n", 0.5), Alternative(hostile, 0.2)])
    missed = InspectedToken("x", True, 0.0, 1.0, None, None, [])
    text = page(
        hostile, [(hostile, hostile)], [(hostile, [("0", 0.5)])], [(3, [InspectedToken("\n", False), token, missed])]
    )
    parser = Parser()
    parser.feed(text)
    assert parser.open == []
    names = {tag for tag, _ in parser.tags}
    assert not names & {"script", "link", "img", "iframe", "a", "form"}
    attributes = [(name, value or "") for _, pairs in parser.tags for name, value in pairs.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "href")]
    assert "url(" not in text
    assert "http:" not in text
    assert "https:" not in text
    assert parser.text.count(hostile) >= 6
    assert "␣a⏎" in parser.text
    assert "rank 2, probability 0.2000; entropy 5.00 nats" in parser.text
    assert ("tabindex", "0") in attributes


def test_the_command_tells_and_writes_a_page(tmp_path):
    tokenizer = train_tokenizer(50 + 256)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path, codec="packed", tokenizer=tokenizer_fingerprint(tokenizer))
    result = inspect(path, "--tokenizer", tmp_path / "tokenizer", "--html", tmp_path / "p.html", "--num-examples", 4)
    assert result.returncode == 0, result.stderr
    manifest = Manifest.load(tmp_path / "train_manifest.json")
    num_bytes, tokens = (sum(getattr(c, name) for c in manifest.chunks.values()) for name in ("bytes", "tokens"))
    assert f"bytes per token        {num_bytes / tokens:.1f} " in result.stdout
    assert "examples               10" in result.stdout
    html = (tmp_path / "p.html").read_text()
    Parser().feed(html)
    assert html.count("<article>") == 4
    refused = inspect(path, "--example", 10)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "error: --example: 10 lies outside the 10 examples" in refused.stderr


def test_another_tokenizer_is_refused(tmp_path):
    tokenizer = train_tokenizer(300)
    reader = CacheReader(str(write(tmp_path)))
    with pytest.raises(CacheError, match=r"--tokenizer: sha256:.* is another tokenizer than .* \(tok\)"):
        check_tokenizer(reader, tokenizer)


def test_a_foreign_file_is_told_of_too(tmp_path):
    path = write(tmp_path, "t.jsonl", n_examples_per_chunk=None)
    (tmp_path / "t.manifest.json").unlink()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["hash"], line["label_logprobs"], line["tail_mass"], line["temperatures"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader = CacheReader(str(path))
    text = report(reader, statistics(reader, 5), inspected_tokens(reader[0], None, 2))
    assert "none: written by another program" in text
    assert "teacher cross-entropy  not stored" in text
