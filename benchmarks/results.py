"""What distillation is worth: students of equal shape, data and steps, trained with different losses, over several seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.results docstrings source --seeds 1 2 3 --folder results_run

docstrings  the quickstart's data, models and teacher: "What does `json.dumps` do?", answered by its docstring
source      harder: "Write `json.dumps`: <docstring>", answered by its source code; twice the vocabulary, longer examples

Every seed has its own random weights and order of the data. The students see the same cache of the teacher's 32 largest logits and
4 tail samples a position, on one rank; "dense" computes the teacher's logits of the whole vocabulary live instead. What is compared
is measured over whole vocabularies on validation examples that no model was trained on. A rerun goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import statistics
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.teacher_inputs import functions
from nemo_kd.batch import Batch
from nemo_kd.ops.vocab import VocabShard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples import docstring_dataset  # noqa: E402
from examples.quickstart import Quickstart, Settings, quoted  # noqa: E402

TAIL_SAMPLES = 4
MAX_SOURCE_CHARACTERS = 1000
ALONE = (
    "trainer.devices=1",
    "trainer.knowledge_distillation.val_check_interval=1.0",
    "model.data.num_workers=0",
)
"""Keys of every run: one rank, which spends its time on training."""
LOSS = "model.knowledge_distillation."
VARIANTS: dict[str, tuple[str, ...]] = {
    "SFT alone": ("kd_loss_weight=0",),
    "forward KL, renormalized top-k": ("kd_loss=forward_kl", "support=renormalize"),
    "forward KL, tail bucket": ("kd_loss=forward_kl", "support=tail"),
    "forward KL, tail bucket, weight 4": (
        "kd_loss=forward_kl",
        "support=tail",
        "kd_loss_weight=4",
    ),
    "forward KL, head + tail samples": ("kd_loss=forward_kl", "support=sampled"),
    "reverse KL, renormalized top-k": ("kd_loss=reverse_kl", "support=renormalize"),
    "reverse KL, tail bucket": ("kd_loss=reverse_kl", "support=tail"),
    "forward KL, dense teacher": (
        "kd_loss=custom",
        "support=tail",
        "custom_loss=benchmarks.results.dense_forward_kl",
    ),
    "reverse KL, dense teacher": (
        "kd_loss=custom",
        "support=tail",
        "custom_loss=benchmarks.results.dense_reverse_kl",
    ),
}


class Experiment(Quickstart):
    """A task's dataset, teacher and caches, and any number of students."""

    def __init__(self, folder: Path, task: str, settings: Settings) -> None:
        super().__init__(folder, settings)
        self.task = task

    def prepare(self) -> None:
        """Everything that all students share."""
        self.claim_folder()
        if not (self.data / "validation.jsonl").exists():
            DATASETS[self.task](self.data)
        for name in ("teacher", "student"):  # the student's for its tokenizer
            self.build_model(name)
        epochs, lr = self.settings.teacher_epochs, self.settings.teacher_lr
        self.train(
            "teacher", "teacher_init", self.dataset_keys(), 0.0, epochs, lr, *ALONE
        )
        for split in ("train", "validation"):
            self.cache_logits(split, f"cache.tail_samples={TAIL_SAMPLES}")
        source, target = (
            quoted(self.archive("teacher")),
            quoted(self.folder / "teacher_hf"),
        )
        self.command(
            "teacher_hf",
            "convert_checkpoint",
            f"input_path={source}",
            f"output_path={target}",
        )

    def student(self, variant: str, seed: int) -> Path:
        """Trains a student, unless it is there; its archive."""
        seeded = Experiment(
            self.folder / f"seed_{seed}", self.task, replace(self.settings, seed=seed)
        )
        seeded.data, seeded.cache_file = self.data, self.cache_file  # type: ignore[method-assign]
        seeded.folder.mkdir(exist_ok=True)
        seeded.build_model("student")
        name = "".join(
            character if character.isalnum() else "_" for character in variant
        )
        keys = [f"{LOSS}{key}" for key in VARIANTS[variant]]
        if "dense" in variant:
            keys.append(
                f"{LOSS}custom_args={{teacher: {quoted(self.folder / 'teacher_hf')}}}"
            )
        chosen = self.settings
        arguments = (
            self.cache_keys(),
            chosen.kd_loss_weight,
            chosen.student_epochs,
            chosen.student_lr,
        )
        seeded.train(name, "student_init", *arguments, *ALONE, *keys)
        return seeded.archive(name)


def write_source_dataset(folder: Path) -> None:
    """As `docstring_dataset.write_dataset`, but the answer is the source of the function or class."""
    library = Path(sysconfig.get_path("stdlib"))
    sources: dict[str, str] = {}
    questions: dict[str, str] = {}
    for path in sorted(library.glob("*.py")) + sorted(library.glob("*/*.py")):
        parts = path.relative_to(library).parts
        if (
            docstring_dataset.SKIPPED_PACKAGES & set(parts)
            or parts[0].removesuffix(".py") not in sys.stdlib_module_names
        ):
            continue
        try:
            found = list(functions(path))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for name, docstring, source in found:
            if len(source) <= MAX_SOURCE_CHARACTERS and source not in sources.values():
                sources[name], questions[name] = (
                    source,
                    f"Write `{name}`: {docstring.split(chr(10) * 2)[0][:200]}",
                )
    drawn = docstring_dataset.splits(sources)
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in drawn.items():
        turns = (
            [("user", questions[name]), ("assistant", source)]
            for name, source in chosen.items()
        )
        records = [
            {"messages": [docstring_dataset.turn(*turn) for turn in pair]}
            for pair in turns
        ]
        records.sort(
            key=lambda record: hashlib.sha256(json.dumps(record).encode()).digest()
        )
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )


DATASETS: dict[str, Callable[[Path], Any]] = {
    "docstrings": docstring_dataset.write_dataset,
    "source": write_source_dataset,
}
SETTINGS = {
    "docstrings": Settings(),
    "source": Settings(vocab_size=4096, teacher_epochs=4, student_epochs=3),
}


def dense_forward_kl(
    logits_BSv: torch.Tensor,
    batch: Batch,
    shard: VocabShard,
    token_sum: Callable[..., torch.Tensor],
    teacher: str,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """KL(teacher || student) over the whole vocabulary, the teacher's logits computed here and now."""
    log_p, log_q = _dense(logits_BSv, batch, shard, teacher)
    return token_sum((log_p.exp() * (log_p - log_q)).sum(dim=-1)), {}


def dense_reverse_kl(
    logits_BSv: torch.Tensor,
    batch: Batch,
    shard: VocabShard,
    token_sum: Callable[..., torch.Tensor],
    teacher: str,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """KL(student || teacher), likewise."""
    log_p, log_q = _dense(logits_BSv, batch, shard, teacher)
    return token_sum((log_q.exp() * (log_q - log_p)).sum(dim=-1)), {}


def _dense(
    logits_BSv: torch.Tensor, batch: Batch, shard: VocabShard, teacher: str
) -> tuple[torch.Tensor, torch.Tensor]:
    assert shard.num_real == shard.vocab_size, "one tensor-parallel rank"
    with torch.no_grad():
        # Only without a cache of keys does the model tell by their positions that examples of a packed row are apart.
        logits = load_teacher(teacher)(
            batch.tokens_BS, position_ids=batch.position_ids_BS, use_cache=False
        ).logits
    return logits.float().log_softmax(dim=-1), logits_BSv[
        ..., : shard.vocab_size
    ].log_softmax(dim=-1)


@functools.cache
def load_teacher(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measure(experiment: Experiment, archive: Path) -> dict[str, float]:
    """The student against the teacher on the validation split; remembered beside the archive."""
    file = archive.with_suffix(".json")
    if not file.exists():
        from examples.compare_models import compare_with_teacher, read_examples
        from nemo_kd.config.shared import TrainerConfig
        from nemo_kd.run.ranks import join_ranks

        join_ranks(TrainerConfig())
        teacher = str(experiment.archive("teacher"))
        examples = read_examples(
            str(experiment.data / "validation.jsonl"), teacher, 512
        )
        found = compare_with_teacher(str(archive), teacher, examples)
        file.write_text(json.dumps(vars(found)))
    return json.loads(file.read_text())


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+", choices=DATASETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("results_run"))
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTHONPATH"] = str(
        ROOT
    )  # the commands import the dense teacher from here
    for task in options.tasks:
        experiment = Experiment(options.folder / task, task, SETTINGS[task])
        experiment.prepare()
        found: dict[str, list[dict[str, float]]] = {
            variant: [] for variant in VARIANTS
        }
        for seed in options.seeds:
            for variant in VARIANTS:
                found[variant].append(
                    measure(experiment, experiment.student(variant, seed))
                )
        first = found["SFT alone"][0]
        print(
            f"\n{task}: the teacher has a cross-entropy of {first['teacher_ce']:.4f} over {first['num_tokens']:,.0f} tokens\n"
        )
        print(
            "| loss | cross-entropy | KL to the teacher | top-1 agreement |\n|---|---|---|---|"
        )
        for variant, rows in found.items():
            ce, kl = (
                spread([row[name] for row in rows], 4)
                for name in ("student_ce", "forward_kl")
            )
            agreement = spread([100 * row["top1_agreement"] for row in rows], 2)
            print(f"| {variant} | {ce} | {kl} | {agreement}% |", flush=True)


if __name__ == "__main__":
    main()
