"""Both stages on real text, on a CPU, in minutes: does a student learn more from a teacher's logits than from labels?

    python examples/quickstart.py --output-dir quickstart_run

Two data-parallel ranks train a teacher on questions about Python's standard library, two tensor-parallel ranks cache
its logits, and two equal students see the same examples in the same order: one learns the labels (SFT), one the labels
and the teacher's cached logits (SFT + KD). Each step prints its command line; a rerun skips the steps that are done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
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

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPES: dict[str, dict[str, int]] = {
    "teacher": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "student": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
STUDENTS = {"student_sft": "student, SFT alone", "student_kd": "student, SFT + KD"}


@dataclass(frozen=True)
class Settings:
    """What a run depends on; a folder holds the steps of one setting only.

    Attributes:
        scale: factor on `teacher_epochs` and on `student_examples`.
        student_examples: the first so many training examples, whose teacher logits are cached.
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


class Quickstart:
    """The steps, each with its files below one folder."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder.absolute(), settings
        self.data = self.folder / "data"
        self.times_s: dict[str, float] = {}

    def run(self) -> None:
        """Everything, from the dataset to the table."""
        started_s = time.perf_counter()
        chosen = self.settings
        self.claim_folder()
        self.build_dataset()
        for name in SHAPES:
            self.build_model(name)
        teacher_epochs = max(1, round(chosen.teacher_epochs * chosen.scale))
        self.train(
            "teacher", "teacher_init", self.dataset_keys(), 0.0, teacher_epochs, chosen.teacher_lr
        )
        for split in ("train", "validation"):
            self.cache_logits(split)
        for name, kd_weight in zip(STUDENTS, (0.0, chosen.kd_loss_weight), strict=True):
            self.train(
                name,
                "student_init",
                self.cache_keys(),
                kd_weight,
                chosen.student_epochs,
                chosen.student_lr,
            )
        results = self.compare()
        self.plot(results["teacher"]["ce"])
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(
            f"\nall of it took {time.perf_counter() - started_s:.0f} s; the files are in {self.folder}"
        )

    def claim_folder(self) -> None:
        """Writes the settings into the folder, or checks that its steps were made with the same."""
        file = self.folder / "settings.json"
        if file.exists():
            made_with, now = json.loads(file.read_text()), asdict(self.settings)
            differing = [key for key in now if made_with.get(key) != now[key]]
            if differing:
                changes = ", ".join(
                    f"{key} {made_with.get(key)} (now {now[key]})" for key in differing
                )
                sys.exit(
                    f"quickstart: the steps in {self.folder} were made with {changes}; give another --output-dir"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            sys.exit(
                f"quickstart: {self.folder} holds other files; give an --output-dir that is new or empty"
            )
        file.write_text(json.dumps(asdict(self.settings), indent=2) + "\n")

    def build_dataset(self) -> None:
        if not (self.data / "validation.jsonl").exists():
            say("dataset: docstrings of the standard library")
            print(
                ", ".join(
                    f"{split}: {count} examples"
                    for split, count in write_dataset(self.data).items()
                )
            )

    def build_model(self, name: str) -> None:
        """A tokenizer trained on the dataset and a Qwen3 model with random weights, as a Hugging Face folder."""
        folder = self.folder / f"{name}_init"
        if folder.exists():
            return
        import torch
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_tokenizer(self.data / "train.jsonl", self.settings.vocab_size),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=CHAT_TEMPLATE,
        )
        shape = SHAPES[name]
        config = Qwen3Config(
            vocab_size=self.settings.vocab_size,
            num_key_value_heads=shape["num_attention_heads"] // 2,
            head_dim=shape["hidden_size"] // shape["num_attention_heads"],
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
        train, validation = (
            quoted(self.data / f"{split}.jsonl") for split in ("train", "validation")
        )
        return [
            "model.data.data_impl=dataset",
            f"model.data.data_prefix={{train: [{train}], validation: [{validation}]}}",
        ]

    def cache_file(self, split: str) -> str:
        return quoted(self.folder / "cache" / f"{split}_CHUNK_ID.jsonl.zst")

    def cache_keys(self) -> list[str]:
        train, validation = self.cache_file("train"), self.cache_file("validation")
        return [f"model.data.data_prefix={{train: [{train}], validation: [{validation}]}}"]

    def cache_logits(self, split: str, *more: str) -> None:
        """Stage 1 with two tensor-parallel ranks; `more` keys come last."""
        dataset = self.data / f"{split}.jsonl"
        last = []
        if split == "train":
            available = len(dataset.read_text(encoding="utf-8").splitlines())
            wanted = max(1, round(self.settings.student_examples * self.settings.scale))
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
        """Stage 2 with two data-parallel ranks; SFT where `kd_weight` is 0. `more` keys come last."""
        self.command(
            name,
            "train_gpt_knowledge_distillation",
            f"name={name}",
            f"pretrained_checkpoint.restore_from_path={quoted(self.folder / start)}",
            *data,
            f"model.knowledge_distillation.sft_loss_weight={self.settings.sft_loss_weight}",
            f"model.knowledge_distillation.kd_loss_weight={kd_weight}",
            "model.knowledge_distillation.kd_loss=forward_kl",
            # 32 ids hold about half of this teacher's mass, and a student from scratch learns their proportions first.
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

    def archive(self, name: str) -> Path:
        """The .nemo archive that a training run leaves."""
        return self.folder / name / "checkpoints" / f"{name}.nemo"

    def command(self, step: str, command: str, *keys: str) -> None:
        """Runs a command unless it has been done; remembers how long it took."""
        done = self.folder / f"{step}.done"
        if done.exists():
            self.times_s[step] = float(done.read_text())
            print(f"{step}: done before")
            return
        say(step)
        print(" \\\n    ".join(shlex.quote(word) for word in [command, *keys]), flush=True)
        started_s = time.perf_counter()
        status = subprocess.run(
            [sys.executable, str(EXAMPLES / f"{command}.py"), *keys], check=False
        ).returncode
        if status:
            sys.exit(
                f"quickstart: the step {step} failed with status {status}; its message stands above"
            )
        self.times_s[step] = round(time.perf_counter() - started_s, 1)
        done.write_text(str(self.times_s[step]))

    def compare(self) -> dict[str, Any]:
        """Both students against the teacher on the validation split, over the whole vocabulary."""
        from nemo_kd.config.data import DataConfig, DatasetConfig
        from nemo_kd.data.dataset import Skipped, TokenizedDataset
        from nemo_kd.data.tokenizer import load_tokenizer
        from nemo_kd.run.process_group import init_process_group
        from nemo_kd.tools.compare import compare_with_teacher

        say("comparison on the validation split")
        init_process_group(1, 1, "auto")
        config = DataConfig(data=DatasetConfig(file_path=str(self.data / "validation.jsonl")))
        tokenizer = load_tokenizer(self.folder / "student_init")
        dataset = TokenizedDataset(
            config, tokenizer, max_seq_length=512, vocab_size=self.settings.vocab_size
        )
        examples = [
            example for i in range(len(dataset)) if not isinstance(example := dataset[i], Skipped)
        ]
        found = {
            name: compare_with_teacher(
                str(self.archive(name)), str(self.archive("teacher")), examples
            )
            for name in STUDENTS
        }
        rows = {
            name: {
                "ce": row.student_ce,
                "kl_to_teacher": row.forward_kl,
                "top1_agreement": row.top1_agreement,
            }
            for name, row in found.items()
        }
        one = found["student_kd"]
        rows["teacher"] = {"ce": one.teacher_ce, "kl_to_teacher": 0.0, "top1_agreement": 1.0}
        print(f"{'':<22}{'CE':>8}{'KL to teacher':>16}{'top-1 agreement':>18}{'training':>11}")
        for name, title in {**STUDENTS, "teacher": "teacher"}.items():
            ce, kl, top1 = rows[name].values()
            print(f"{title:<22}{ce:>8.4f}{kl:>16.4f}{top1:>18.2%}{self.times_s[name]:>9.0f} s")
        print(
            f"(nats per token over {one.num_tokens:,} tokens of {len(examples)} examples that no model was trained on)"
        )
        counts = {"validation_examples": len(examples), "validation_tokens": one.num_tokens}
        machine = {
            "date": date.today().isoformat(),
            "cpu_cores": os.cpu_count(),
            "platform": platform.platform(),
        }
        return {
            **rows,
            **counts,
            "times_s": self.times_s,
            "settings": asdict(self.settings),
            **machine,
        }

    def plot(self, teacher_ce: float) -> None:
        """Validation cross-entropy over the steps of both students."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for name, title in STUDENTS.items():
            lines = (self.folder / name / "metrics" / "metrics.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if "validation/sft_loss" in row]
            curve = {
                row["step"]: row["validation/sft_loss"] for row in rows
            }  # a resumed run repeats steps
            axes.plot(list(curve), list(curve.values()), marker="o", label=title)
        axes.axhline(teacher_ce, color="grey", linestyle="--", label="teacher")
        axes.set(
            xlabel="step",
            ylabel="validation cross-entropy (nats per token)",
            title="Equal students, equal data",
        )
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(self.folder / "curves.png", dpi=150)
        print(f"curves: {self.folder / 'curves.png'}")


def train_tokenizer(dataset: Path, vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of `vocab_size` ids, trained on the texts of a chat dataset."""
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
    records = (json.loads(line) for line in dataset.read_text(encoding="utf-8").splitlines())
    tokenizer.train_from_iterator(
        (m["content"] for record in records for m in record["messages"]), trainer
    )
    return tokenizer


def quoted(path: Path) -> str:
    """A path as a value on a command's line, where Hydra's grammar gives some characters a meaning."""
    text = str(path)
    return (
        text if re.fullmatch(r"[A-Za-z0-9_/.+-]+", text) else "'" + text.replace("'", "\\'") + "'"
    )


def say(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart_run"))
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="below 1 the teacher sees fewer epochs and the students fewer examples",
    )
    arguments = parser.parse_args()
    if arguments.scale <= 0:
        parser.error(f"--scale: {arguments.scale} must be above 0")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks on a CPU, also where there is one GPU
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
    Quickstart(arguments.output_dir, Settings(seed=arguments.seed, scale=arguments.scale)).run()


if __name__ == "__main__":
    main()
