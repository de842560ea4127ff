"""`logit_cache inspect`: its figures are right, its text is harmless, its page complete in itself and safe."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nemo_kd.batch import CachedExample
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.record import encode
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.cli.logit_cache import parser
from nemo_kd.config import ConfigError, UserInputError
from nemo_kd.data.tokenizer import (
    LossPositions,
    TokenText,
    example_lines,
    load_tokenizer_of,
    share,
    tokenizer_fingerprint,
)
from nemo_kd.tools.inspect_cache import (
    PAGE_ALTERNATIVES,
    Histogram,
    Report,
    cache_page,
    check_tokenizer,
    describe_cache,
    histograms,
    measure,
    spread,
)
from tests.tiny_cache import chunks_of, manifest, row, write, write_segment
from tests.tiny_tokenizer import train_sentencepiece_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "</script><script>alert(1)</script>\"'&{{data}}<!--"


def inspect(*words: object) -> subprocess.CompletedProcess[str]:
    line = [
        sys.executable,
        "-m",
        "nemo_kd.cli.logit_cache",
        "inspect",
        *map(str, words),
    ]
    return subprocess.run(line, check=False, cwd=ROOT, capture_output=True, text=True)


def test_figures_against_plain_sums(tmp_path):
    reader = CacheReader(str(write(tmp_path)))
    found = measure(reader, 1000)
    rows = [row(index, 3 + index % 4) for index in range(10)]
    masses, entropies, logprobs, ranks = [], [], [], []
    for one in rows:
        for s in np.flatnonzero(one.example.loss_mask_S):
            p = np.exp(
                one.teacher.topk_logits_PK[s].astype(float)
                - one.teacher.log_sum_exp_logits_P[s]
            )
            masses.append(p.sum())
            entropies.append(-sum(part * math.log(part) for part in [*p, 1 - p.sum()]))
            logprobs.append(one.teacher.label_logprobs_P[s])
            ids = one.teacher.topk_token_ids_PK[s].tolist()
            label = int(one.example.labels_S[s])
            ranks.append(ids.index(label) + 1 if label in ids else 0)
    assert (found.num_rows, found.num_tokens) == (
        10,
        sum(one.example.num_tokens for one in rows),
    )
    assert found.num_loss_tokens == len(masses) == len(found.arrays["entropy_P"])
    np.testing.assert_allclose(1 - found.arrays["tail_mass_P"], masses, atol=1e-6)
    np.testing.assert_allclose(found.arrays["entropy_P"], entropies, atol=1e-5)
    np.testing.assert_allclose(found.arrays["label_logprob_P"], logprobs, atol=1e-6)
    assert found.arrays["label_rank_P"].tolist() == ranks
    assert set(found.arrays["num_kept_P"].tolist()) == {4}
    _, counts, _ = map(dict, describe_cache(reader, found).facts)
    files = list(tmp_path.glob("train_?.jsonl"))
    assert counts["bytes per token"].startswith(
        f"{sum(file.stat().st_size for file in files) / found.num_tokens:,.1f},"
    )
    shown = {one.title.partition(":")[0]: one for one in histograms(found)}
    assert (
        f": mean {np.mean(entropies):.3f}," in shown["entropy in nats, at least"].title
    )
    assert f": mean {np.mean(masses):.3f}," in shown["probability kept"].title
    assert f": mean {-np.mean(logprobs):.3f}," in shown["nats of the label"].title
    assert shown["tokens kept"].shares[2] == 1
    assert shown["tokens kept"].labels[2] == "from 3"
    ranked = shown["rank of the label, 0 if not kept"]
    assert ranked.labels[:2] == ["from 0", "from 1"]
    for number in (0, 1):
        assert ranked.shares[number] == pytest.approx(ranks.count(number) / len(ranks))


def test_the_entropy_of_the_whole_distribution_is_above_the_bound(tmp_path):
    found = measure(CacheReader(str(write(tmp_path))), 1000)
    truths = []
    for index in range(10):
        length = 3 + index % 4
        logits = (
            np.random.default_rng(index).normal(size=(length, 50)) * 3
        )  # as tiny_cache.row draws them
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        truths += (-(p * np.log(p)).sum(1))[length // 2 :].tolist()
    assert (found.arrays["entropy_P"] <= np.array(truths) + 1e-6).all()


def test_a_sample_is_bounded_and_spread_over_the_cache(tmp_path):
    reader = CacheReader(str(write(tmp_path)))
    assert measure(reader, 3).num_rows == 3
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 20) == [0, 1, 2]
    _, counts, sample = map(dict, describe_cache(reader, measure(reader, 3)).facts)
    assert sample["measured"].startswith("3 of 10 examples")
    part = CacheReader(str(tmp_path / "train_CHUNK_ID.jsonl[2:5]"))
    _, counts, _ = map(dict, describe_cache(part, measure(part, 9)).facts)
    assert counts["examples"] == "10, 3 of them read"


def test_positions_of_which_nothing_is_known_are_left_out():
    one = row(0)
    ids_SK, logits_SK = (
        one.teacher.topk_token_ids_PK.copy(),
        one.teacher.topk_logits_PK.copy(),
    )
    ids_SK[3], logits_SK[3] = -1, -np.inf
    logprobs = one.teacher.label_logprobs_P
    seen = LossPositions(
        replace(
            one,
            teacher=replace(
                one.teacher, topk_token_ids_PK=ids_SK, topk_logits_PK=logits_SK
            ),
        )
    )
    assert seen.position_P.tolist() == [2, 4]
    np.testing.assert_allclose(seen.label_logprob_P, logprobs[[2, 4]], rtol=1e-6)
    without = LossPositions(
        replace(one, teacher=replace(one.teacher, label_logprobs_P=None))
    )
    assert np.isnan(without.label_logprob_P).all()


def test_a_cache_still_being_written_is_told_of(tmp_path):
    description = manifest("packed")
    layout = CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl.zst"))
    writer = CacheWriter(layout, description, chunks_of(description))
    for segment in writer.missing_segments():
        if segment[0] == 1:
            write_segment(layout, description, segment)
    writer.assemble_complete()
    writer.close()
    with pytest.raises(CacheError, match="the chunk is missing"):
        CacheReader(layout.output_path)
    reader = CacheReader(layout.output_path, partial=True)
    assert [reader[position].example.index for position in range(len(reader))] == [
        4,
        5,
        6,
        7,
    ]
    _, counts, _ = map(dict, describe_cache(reader, measure(reader, 9)).facts)
    assert counts["chunks"] == "1 of 3 complete, 1 found"
    assert counts["examples"] == "4, 4 of them read"
    with pytest.raises(CacheError, match="no complete chunk"):
        CacheReader(str(tmp_path / "nothing_CHUNK_ID.jsonl"), partial=True)


def test_a_token_that_ends_inside_a_character_is_an_ellipsis():
    tokenizer = train_tokenizer(300)
    ids = tokenizer("naïve 😀\n中\x1b[31m\u202e<b>", add_special_tokens=False)[
        "input_ids"
    ]
    tokens = TokenText(tokenizer)
    assert "".join(tokens.along(ids)).replace("…", "") == (
        "naïve 😀\n中\\x1b[31m\\u202e<b>"
    )
    assert "…" in tokens.along(ids)
    for token in range(300):
        assert tokens.visible(token).isprintable()
        assert not set(" \n") & set(tokens.visible(token))
    assert tokens.visible(9999) == "#9999"
    assert TokenText(None).visible(5) == "#5"


def test_tokens_of_sentencepiece_keep_their_space():
    tokenizer = train_sentencepiece_tokenizer()
    ids = tokenizer("the value of", add_special_tokens=False)["input_ids"]
    tokens = TokenText(tokenizer)
    assert "".join(tokens.along(ids)) == "the value of"
    assert "".join(map(tokens.visible, ids)) == "␣the␣value␣of"


def test_probabilities_in_percent():
    assert [share(p) for p in (1, 0.9999, 0.5, 0.0123, 0.00123, 0, math.nan)] == [
        "100%", "100%", "50%", "1.23%", "0.123%", "0%", "nan%"
    ]  # fmt: skip


def word_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    )


def content_of(page: str) -> dict:
    """The data of a page."""
    (data,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page
    )
    return json.loads(data)


def hostile_page() -> tuple[CachedExample, str]:
    vocabulary = {f"t{number}": number for number in range(48)} | {
        HOSTILE: 48,
        "\x1b[31m": 49,
    }
    one = row(3, 8)
    ids_SK, labels_S = (
        one.teacher.topk_token_ids_PK.copy(),
        one.example.labels_S.copy(),
    )
    ids_SK[ids_SK >= 48] = 0
    ids_SK[:, 0], ids_SK[:, 1], labels_S[5] = 48, 49, 48
    one = CachedExample(
        replace(one.example, labels_S=labels_S),
        replace(one.teacher, topk_token_ids_PK=ids_SK),
    )
    report = Report([[("teacher", HOSTILE)]], [Histogram("title", ["0"], [1.0])])
    return one, cache_page(
        f"folder/{HOSTILE.replace('/', '|')}",
        report,
        [(2, one)],
        TokenText(word_tokenizer(vocabulary)),
    )


def test_the_page_needs_nothing_and_its_data_ends_nothing():
    _, page = hostile_page()
    assert page.count("<script") == 3
    for forbidden in ("http:", "https:", "url(", "@import", "fetch(", "innerHTML"):
        assert forbidden not in page, forbidden
    assert "default-src 'none'" in page
    content = content_of(page)
    assert content["title"] == HOSTILE.replace("/", "|").rpartition("/")[2]
    assert HOSTILE in content["facts"]
    assert content["histograms"] == [
        {"title": "title", "labels": ["0"], "shares": [1.0]}
    ]


def test_the_page_knows_every_loss_token():
    one, page = hostile_page()
    (example,) = content_of(page)["examples"]
    assert example["heading"].startswith("Example 2 · record 3 · 8 positions, 4 in")
    assert [target[0] for target in example["targets"]] == [5, 6, 7, 8]
    assert len(example["tokens"]) == 9
    _, label, probability, rank, entropy, kept, tail, others = example["targets"][1]
    assert label == HOSTILE
    assert (rank, kept) == (1, 4)
    logprob = one.teacher.label_logprobs_P[5]
    assert probability == pytest.approx(math.exp(logprob), rel=1e-6)
    assert tail == pytest.approx(one.teacher.tail_mass_PT[5, 0], rel=1e-6)
    assert entropy == pytest.approx(LossPositions(one).entropy_P[1])
    assert others[1][0] == "\\x1b[31m"
    p = np.exp(one.teacher.topk_logits_PK[5] - one.teacher.log_sum_exp_logits_P[5])
    np.testing.assert_allclose([q for _, q in others], p, rtol=1e-5)


def test_the_page_does_not_grow_with_long_examples():
    page = cache_page("c", Report([], []), [(0, row(0, 9000, k=40))], TokenText(None))
    (example,) = content_of(page)["examples"]
    assert len(example["targets"]) == 2000
    assert {len(target[-1]) for target in example["targets"]} == {PAGE_ALTERNATIVES}
    assert len(example["tokens"]) + example["before"] + example["after"] == 9001


def test_an_example_as_text():
    one = row(4, 6)
    lines = example_lines(one, TokenText(None))
    assert (
        lines[0]
        .rstrip()
        .endswith(" ".join(f"#{token}" for token in one.example.tokens_S[:4]))
    )
    assert example_lines(one, TokenText(None), 1) == lines[:3]
    assert len(lines) == 5
    for line, s in zip(lines[2:], (3, 4, 5), strict=True):
        words = line.split()
        assert words[:2] == [str(s), f"#{one.example.labels_S[s]}"]
        assert words[2] == share(float(np.exp(one.teacher.label_logprobs_P[s])))
        assert [word for word in words[6:] if word.startswith("#")] == [
            f"#{token}" for token in one.teacher.topk_token_ids_PK[s]
        ]


def test_the_command_tells_and_writes_a_page(tmp_path):
    tokenizer = train_tokenizer(50 + 256)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path, codec="packed", tokenizer=tokenizer_fingerprint(tokenizer))
    html = tmp_path / "p.html"
    result = inspect(
        path,
        "--tokenizer",
        tmp_path / "tokenizer",
        "--html",
        html,
        "--num-examples",
        4,
    )
    assert result.returncode == 0, result.stderr
    assert (
        f"tokenizer                    {tokenizer_fingerprint(tokenizer)}"
        in result.stdout
    )
    assert "chunks                       3 of 3 complete, 3 found" in result.stdout
    assert len(content_of(html.read_text())["examples"]) == 4
    refused = inspect(path, "--example", 10)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(
        "error: --example: 10 lies outside the 10 examples"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--html", "{folder}/file/p.html"),
            "--html: {folder}/file cannot be written",
        ),
        (("--html", "{folder}/none/p.html", "--example", "-1"), "--example: -1 lies"),
        (
            ("--tokenizer", "{folder}/none"),
            "none: expected a regular file, found none; check the path",
        ),
        (("--example", "-1"), "--example: -1 lies outside the 10 examples"),
    ],
)
def test_what_cannot_be_done_is_told(tmp_path, words, message):
    path = write(tmp_path)
    (tmp_path / "file").touch()
    given = [word.format(folder=tmp_path) for word in words]
    arguments = parser().parse_args(["inspect", str(path), *given])
    with pytest.raises(UserInputError, match=message.format(folder=tmp_path)):
        arguments.run(arguments)


def test_help_comes_without_heavy_imports():
    code = (
        "import sys; sys.argv[1:] = ['inspect', '--help']\n"
        "from nemo_kd.cli.logit_cache import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "--num-examples N" in result.stdout
    assert result.stdout.endswith("0 []\n")


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    path = write(tmp_path)
    line = [
        sys.executable,
        "-m",
        "nemo_kd.cli.logit_cache",
        "inspect",
        path,
        "--html",
        tmp_path / "p.html",
    ]
    with subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.wait() == 0
        assert process.stderr.read() == ""
    assert (tmp_path / "p.html").exists()


def test_tokenizers_of_archives_and_of_their_folders(tmp_path):
    tokenizer = train_tokenizer(300)
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "model_config.yaml").write_text("")
    (folder / "weights").write_bytes(bytes(100))
    for name, members in (
        ("m.nemo", ("tokenizer", "weights")),
        ("empty.nemo", ("weights",)),
    ):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member in members:
                tar.add(folder / member, arcname=f"./{member}")
    for source in (folder / "tokenizer", folder, tmp_path / "m.nemo"):
        assert tokenizer_fingerprint(
            load_tokenizer_of(str(source))
        ) == tokenizer_fingerprint(tokenizer)
    with pytest.raises(ConfigError, match="has no folder tokenizer/"):
        load_tokenizer_of(str(tmp_path / "empty.nemo"))
    with pytest.raises(ConfigError, match=r"is no readable .nemo archive"):
        load_tokenizer_of(str(folder / "weights"))


def test_another_tokenizer_is_refused(tmp_path):
    tokenizer = train_tokenizer(300)
    reader = CacheReader(str(write(tmp_path)))
    with pytest.raises(
        CacheError,
        match=r"--tokenizer: mine has .* the fingerprint sha256:.*, but .* has ids up to \d+ of tok;",
    ):
        check_tokenizer(reader, tokenizer, "mine")


def test_a_foreign_file_is_told_of_too(tmp_path):
    lines = [json.loads(encode(row(index), "json")) for index in range(4)]
    for line in lines:
        for name in ("hash", "label_logprobs", "tail_mass", "temperatures"):
            del line[name]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = inspect(path, "--html", tmp_path / "t.html")
    assert result.returncode == 0, result.stderr
    assert "manifest                     none" in result.stdout
    assert (
        "measured                     4 of 4 examples with 20 tokens, 12 in"
        in result.stdout
    )
    assert "examples                     4\n" in result.stdout
    assert content_of((tmp_path / "t.html").read_text())["title"] == "t.jsonl"
    with pytest.raises(CacheError, match=r"has 1 tokens .* has ids up to \d+ of"):
        check_tokenizer(CacheReader(str(path)), word_tokenizer({"a": 0}), "tiny")
