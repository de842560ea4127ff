"""Run both stages on real text on a CPU: does a student learn more from logits than from labels?

    python examples/quickstart.py --output-dir quickstart_run

1. Train a teacher on questions about Python's standard library (two data-parallel ranks).
2. Cache its logits (two tensor-parallel ranks).
3. Train two equal students on the same examples in the same order: one on the labels (SFT), one on
   the labels and the cached logits (SFT + KD).
4. Compare both with the teacher.

Each step prints its command line. A rerun skips finished steps. `Quickstart.run` is the place to
start reading.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES)]

from docstring_dataset import write_dataset  # noqa: E402
from steps import Steps, quoted, say  # noqa: E402

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPES = {
    "teacher": {"hidden_size": 128, "num_hidden_layers": 3},
    "student": {"hidden_size": 64, "num_hidden_layers": 2},
}
NUM_HEADS = 4
STUDENTS = {"student_sft": "student, SFT alone", "student_kd": "student, SFT + KD"}


@dataclass(frozen=True)
class Settings:
    """Settings of a run; a folder holds the steps of one setting only.

    Attributes:
        scale: factor on `teacher_epochs` and `student_examples`.
        student_examples: number of training examples, from the first, whose logits are cached.
    """

    seed: int = 1234
    scale: float = 1.0
    vocab_size: int = 2048
    top_k: int = 32
    teacher_epochs: int = 3
    teacher_lr: float = 2e-3
    student_examples: int = 2000
    student_epochs: int = 4
    student_lr: float = 3e-3
    sft_loss_weight: float = 1.0
    kd_loss_weight: float = 1.0
    python: str = platform.python_version()


class Quickstart(Steps):
    """The steps of the quickstart; all their files lie in one folder."""

    name = "quickstart"

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings)
        self.data = self.folder / "data"

    def run(self) -> None:
        """Run all steps, from the dataset to the table."""
        started_s = time.perf_counter()
        chosen = self.settings
        teacher_epochs = max(1, round(chosen.teacher_epochs * chosen.scale))
        self.claim_folder()
        self.build_dataset()
        for name in SHAPES:
            self.build_model(name)
        records = self.dataset_keys()
        self.train(
            "teacher", "teacher_init", records, 0.0, teacher_epochs, chosen.teacher_lr
        )
        self.cache_logits("train")
        self.cache_logits("validation")
        for name, kd_weight in {
            "student_sft": 0.0,
            "student_kd": chosen.kd_loss_weight,
        }.items():
            epochs = chosen.student_epochs
            self.train(
                name,
                "student_init",
                self.cache_keys(),
                kd_weight,
                epochs,
                chosen.student_lr,
            )
        results = self.compare()
        self.plot(results["teacher"]["ce"])
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(
            f"\n{time.perf_counter() - started_s:.0f} s in all; the files are in {self.folder}"
        )

    def build_dataset(self) -> None:
        if not (self.data / "validation.jsonl").exists():
            say("dataset: docstrings of the standard library")
            for split, count in write_dataset(self.data).items():
                print(f"{split}: {count} examples")

    def build_model(self, name: str) -> None:
        """Write a Hugging Face folder: a tokenizer trained on the dataset, and random weights."""
        folder = self.folder / f"{name}_init"
        if folder.exists():
            return
        import torch
        from transformers import (
            AutoModelForCausalLM,
            PreTrainedTokenizerFast,
            Qwen3Config,
        )
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_tokenizer(
                self.data / "train.jsonl", self.settings.vocab_size
            ),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=CHAT_TEMPLATE,
        )
        shape = SHAPES[name]
        config = Qwen3Config(
            vocab_size=self.settings.vocab_size,
            intermediate_size=3 * shape["hidden_size"],
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_HEADS // 2,
            head_dim=shape["hidden_size"] // NUM_HEADS,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            **shape,
        )
        torch.manual_seed(self.settings.seed)
        model = AutoModelForCausalLM.from_config(config)
        unfinished = self.folder / f".{name}_init.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        tokenizer.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        unfinished.rename(folder)
        print(f"{name}: {model.num_parameters():,} parameters, random weights")

    def dataset_keys(self) -> list[str]:
        """Return keys that make stage 2 read plain records."""
        return [
            "model.data.data_impl=dataset",
            f"model.data.data_prefix.train={quoted(self.data / 'train.jsonl')}",
            f"model.data.data_prefix.validation={quoted(self.data / 'validation.jsonl')}",
        ]

    def cache_file(self, split: str) -> str:
        return quoted(self.folder / "cache" / f"{split}_CHUNK_ID.jsonl.zst")

    def cache_keys(self) -> list[str]:
        """Return keys that make stage 2 read the caches."""
        return [
            f"model.data.data_prefix.train={self.cache_file('train')}",
            f"model.data.data_prefix.validation={self.cache_file('validation')}",
        ]

    def cache_logits(self, split: str, *more: str) -> None:
        """Run stage 1 on two tensor-parallel ranks; `more` keys come last."""
        dataset = self.data / f"{split}.jsonl"
        last = []
        if split == "train":
            available = len(dataset.read_text(encoding="utf-8").splitlines())
            wanted = max(
                1, round(self.settings.student_examples * self.settings.scale)
            )
            last = [f"end_at_idx={min(wanted, available) - 1}"]
        self.command(
            f"cache_{split}",
            "compute_topk_logits",
            f"pretrained_checkpoint.restore_from_path={quoted(self.archive('teacher'))}",
            f"data.data.file_path={quoted(dataset)}",
            f"output_path={self.cache_file(split)}",
            "n_examples_per_chunk=500",
            *last,
            f"top_k={self.settings.top_k}",
            "trainer.precision=32",
            "trainer.devices=2",
            "model.tensor_model_parallel_size=2",
            "model.micro_batch_size=8",
            *more,
        )

    def train(
        self,
        name: str,
        start: str,
        data: list[str],
        kd_weight: float,
        epochs: int,
        lr: float,
        *more: str,
    ) -> None:
        """Run stage 2 on two data-parallel ranks; `more` keys come last."""
        self.command(
            name,
            "train_gpt_knowledge_distillation",
            f"name={name}",
            f"pretrained_checkpoint.restore_from_path={quoted(self.folder / start)}",
            *data,
            f"model.knowledge_distillation.sft_loss_weight={self.settings.sft_loss_weight}",
            f"model.knowledge_distillation.kd_loss_weight={kd_weight}",
            "model.knowledge_distillation.kd_loss=forward_kl",
            # 32 ids hold about half of this teacher's mass. A student from scratch learns their
            # proportions first.
            "model.knowledge_distillation.support=renormalize",
            "trainer.precision=32",
            "trainer.devices=2",
            f"trainer.knowledge_distillation.max_epochs={epochs}",
            "trainer.knowledge_distillation.val_check_interval=0.5",
            "model.micro_batch_size=16",
            "model.global_batch_size=32",
            f"model.seed={self.settings.seed}",
            f"model.optim.lr={lr}",
            "model.optim.betas=[0.9,0.95]",
            "model.optim.sched.warmup_steps=20",
            "model.optim.sched.min_lr=1e-4",
            "exp_manager.checkpoint_callback_params.save_top_k=1",
            f"exp_manager.explicit_log_dir={quoted(self.folder / name)}",
            *more,
        )

    def compare(self) -> dict[str, Any]:
        """Compare both students with the teacher on the validation split."""
        from compare_models import compare_with_teacher, read_examples

        from nemo_kd.config.shared import TrainerConfig
        from nemo_kd.run.ranks import join_ranks

        say("comparison on the validation split")
        join_ranks(TrainerConfig())
        teacher = str(self.archive("teacher"))
        examples = read_examples(str(self.data / "validation.jsonl"), teacher, 512)
        rows: dict[str, dict[str, float]] = {}
        for name in STUDENTS:
            found = compare_with_teacher(str(self.archive(name)), teacher, examples)
            rows[name] = {
                "ce": found.student_ce,
                "kl_to_teacher": found.forward_kl,
                "top1_agreement": found.top1_agreement,
            }
        rows["teacher"] = {
            "ce": found.teacher_ce,
            "kl_to_teacher": 0.0,
            "top1_agreement": 1.0,
        }
        print(
            f"{'':<22}{'CE':>8}{'KL to teacher':>16}{'top-1 agreement':>18}{'training':>11}"
        )
        for name, title in {**STUDENTS, "teacher": "teacher"}.items():
            ce, kl, top1 = rows[name].values()
            print(
                f"{title:<22}{ce:>8.4f}{kl:>16.4f}{top1:>18.2%}{self.times_s[name]:>9.0f} s"
            )
        print(
            f"(nats per token over {found.num_tokens:,} tokens of {len(examples)} examples that no "
            "model was trained on)"
        )
        return {
            **rows,
            "validation_examples": len(examples),
            "validation_tokens": found.num_tokens,
            "times_s": self.times_s,
            "settings": asdict(self.settings),
            "date": date.today().isoformat(),
            "cpu_cores": os.cpu_count(),
            "platform": platform.platform(),
        }

    def plot(self, teacher_ce: float) -> None:
        """Plot the validation cross-entropy of both students over their steps."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for name, title in STUDENTS.items():
            curve = self.curve(name, "validation/sft_loss")
            axes.plot(list(curve), list(curve.values()), marker="o", label=title)
        axes.axhline(teacher_ce, color="grey", linestyle="--", label="teacher")
        axes.set_title("Equal students, equal data")
        axes.set(xlabel="step", ylabel="validation cross-entropy (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(self.folder / "curves.png", dpi=150)
        print(f"curves: {self.folder / 'curves.png'}")


def train_tokenizer(dataset: Path, vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer of `vocab_size` ids on the texts of a chat dataset."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    records = (
        json.loads(line) for line in dataset.read_text(encoding="utf-8").splitlines()
    )
    texts = (
        message["content"] for record in records for message in record["messages"]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart_run"))
    parser.add_argument("--seed", type=int, default=Settings.seed)
    scale_help = (
        "factor on the teacher's epochs and the students' examples, 1 by default"
    )
    parser.add_argument("--scale", type=float, default=1.0, help=scale_help)
    arguments = parser.parse_args()
    if arguments.scale <= 0:
        parser.error(f"--scale: {arguments.scale} must be above 0")
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        ""  # two ranks on a CPU, also where there is one GPU
    )
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
    Quickstart(
        arguments.output_dir, Settings(seed=arguments.seed, scale=arguments.scale)
    ).run()


if __name__ == "__main__":
    main()
