"""Both stages on real text, on a CPU, in minutes: does a student learn more from a teacher's logits than from labels?

    python examples/quickstart.py --output-dir quickstart_run

A teacher is trained on questions about Python's standard library by two data-parallel ranks, its logits are cached by
two tensor-parallel ranks, and two equal students see the same examples in the same order: one learns the labels (SFT), one the labels and the
teacher's cached logits (SFT + KD). Each step prints its command line; steps that are done are skipped when it runs again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES)]

from docstring_dataset import write_dataset  # noqa: E402

VOCAB_SIZE = 2048
TOP_K = 32
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES: dict[str, dict[str, int]] = {
    "teacher": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
    "student": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
}
TEACHER_EPOCHS = 3
STUDENT_EXAMPLES = 2000
STUDENT_EPOCHS = 4


class Quickstart:
    """The steps, each with its files below one folder."""

    def __init__(self, folder: Path, seed: int, scale: float) -> None:
        self.folder, self.seed, self.scale = folder.absolute(), seed, scale
        self.data = self.folder / "data"
        self.times_s: dict[str, float] = {}

    def run(self) -> None:
        """Everything, from the dataset to the table."""
        started_s = time.perf_counter()
        self.build_dataset()
        for name in SHAPES:
            self.build_model(name)
        self.train("teacher", self.dataset_keys(), kd_weight=0.0, epochs=TEACHER_EPOCHS, lr=2e-3)
        for split in ("train", "validation"):
            self.cache_logits(split)
        for name, kd_weight in (("student_sft", 0.0), ("student_kd", 1.0)):
            self.train(name, self.cache_keys(), kd_weight, epochs=STUDENT_EPOCHS, lr=3e-3)
        results = self.compare()
        self.plot()
        print(f"\nall of it took {time.perf_counter() - started_s:.0f} s; the files are in {self.folder}")
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    def build_dataset(self) -> None:
        if not (self.data / "validation.jsonl").exists():
            say("dataset: docstrings of the standard library")
            print(", ".join(f"{split}: {count} examples" for split, count in write_dataset(self.data).items()))

    def build_model(self, name: str) -> None:
        """A tokenizer trained on the dataset and a Qwen3 model with random weights, as a Hugging Face folder."""
        folder = self.folder / f"{name}_init"
        if (folder / "config.json").exists():
            return
        import torch
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()

        tokenizer_file = self.folder / "tokenizer.json"
        if not tokenizer_file.exists():
            train_tokenizer(self.data / "train.jsonl", tokenizer_file)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_file),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=CHAT_TEMPLATE,
        )
        shape = SHAPES[name]
        config = Qwen3Config(
            vocab_size=VOCAB_SIZE,
            num_key_value_heads=shape["num_attention_heads"] // 2,
            head_dim=shape["hidden_size"] // shape["num_attention_heads"],
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            **shape,
        )
        torch.manual_seed(self.seed)
        model = AutoModelForCausalLM.from_config(config)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, random weights")

    def dataset_keys(self) -> list[str]:
        splits = f"{{train: [{self.data}/train.jsonl], validation: [{self.data}/validation.jsonl]}}"
        return ["model.data.data_impl=dataset", f"model.data.data_prefix={splits}"]

    def cache_keys(self) -> list[str]:
        cache = self.folder / "cache"
        return [
            f"model.data.data_prefix={{train: [{cache}/train_CHUNK_ID.jsonl], validation: [{cache}/validation_CHUNK_ID.jsonl]}}"
        ]

    def cache_logits(self, split: str) -> None:
        """Stage 1 with two tensor-parallel ranks."""
        last = [f"end_at_idx={round(STUDENT_EXAMPLES * self.scale) - 1}"] if split == "train" else []
        self.command(
            f"cache_{split}",
            "compute_topk_logits",
            f"pretrained_checkpoint.restore_from_path={self.archive('teacher')}",
            f"data.data.file_path={self.data}/{split}.jsonl",
            f"output_path={self.folder}/cache/{split}_CHUNK_ID.jsonl",
            "n_examples_per_chunk=500",
            *last,
            f"top_k={TOP_K}",
            "trainer.precision=32",
            "trainer.devices=2",
            "model.tensor_model_parallel_size=2",
            "model.micro_batch_size=8",
            "model.global_batch_size=32",
        )

    def train(self, name: str, data: list[str], kd_weight: float, epochs: int, lr: float) -> None:
        """Stage 2: SFT where `kd_weight` is 0."""
        start = "teacher" if name == "teacher" else "student"
        self.command(
            name,
            "train_gpt_knowledge_distillation",
            f"name={name}",
            f"pretrained_checkpoint.restore_from_path={self.folder}/{start}_init",
            *data,
            "model.knowledge_distillation.sft_loss_weight=1.0",
            f"model.knowledge_distillation.kd_loss_weight={kd_weight}",
            "model.knowledge_distillation.kd_loss=fwd_kl",
            "trainer.precision=32",
            "trainer.devices=2",
            f"trainer.knowledge_distillation.max_epochs={max(1, round(epochs * self.scale))}",
            "trainer.knowledge_distillation.val_check_interval=0.5",
            "model.micro_batch_size=16",
            "model.global_batch_size=32",
            f"model.seed={self.seed}",
            f"model.optim.lr={lr}",
            "model.optim.betas=[0.9,0.95]",
            "model.optim.sched.warmup_steps=20",
            "model.optim.sched.min_lr=1e-4",
            "exp_manager.checkpoint_callback_params.save_top_k=1",
            f"exp_manager.explicit_log_dir={self.folder}/{name}",
        )

    def archive(self, name: str) -> Path:
        """The .nemo archive that a training run leaves."""
        return self.folder / name / "checkpoints" / f"{name}.nemo"

    def command(self, step: str, command: str, *keys: str) -> None:
        """Runs a command unless it has been done; remembers how long it took."""
        done = self.folder / f"{step}.done"
        if done.exists():
            self.times_s[step] = float(done.read_text())
            return
        line = [sys.executable, str(EXAMPLES / f"{command}.py"), *keys]
        say(step)
        print(" \\\n    ".join(shlex.quote(word) for word in [command, *keys]), flush=True)
        started_s = time.perf_counter()
        status = subprocess.run(line, env={**os.environ, "WANDB_MODE": "offline"}, check=False).returncode
        if status:
            sys.exit(f"quickstart: the step {step} failed with status {status}; its message stands above")
        self.times_s[step] = time.perf_counter() - started_s
        done.write_text(f"{self.times_s[step]:.1f}")

    def compare(self) -> dict[str, Any]:
        """Both students against the teacher on the validation split, over the whole vocabulary."""
        from nemo_kd.config.data import DataConfig, DatasetConfig
        from nemo_kd.data.dataset import Skipped, TokenizedDataset
        from nemo_kd.data.tokenizer import load_tokenizer
        from nemo_kd.evaluation.agreement import compare_with_teacher
        from nemo_kd.mcore.groups import init_process_group

        say("comparison on the validation split")
        init_process_group(1, 1, "auto")
        config = DataConfig(data=DatasetConfig(file_path=str(self.data / "validation.jsonl")))
        dataset = TokenizedDataset(
            config, load_tokenizer(self.folder / "student_init"), max_seq_length=512, vocab_size=VOCAB_SIZE
        )
        examples = [example for i in range(len(dataset)) if not isinstance(example := dataset[i], Skipped)]
        results: dict[str, Any] = {"times_s": self.times_s}
        print(f"{'':<22}{'CE':>8}{'KL to teacher':>16}{'top-1 agreement':>18}{'training':>11}")
        for name, title in (("student_sft", "student, SFT alone"), ("student_kd", "student, SFT + KD")):
            result = compare_with_teacher(str(self.archive(name)), str(self.archive("teacher")), examples)
            results[name] = vars(result)
            print(
                f"{title:<22}{result.student_ce:>8.4f}{result.forward_kl:>16.4f}{result.top1_agreement:>18.2%}"
                f"{self.times_s[name]:>9.0f} s"
            )
        print(f"{'teacher':<22}{result.teacher_ce:>8.4f}{0:>16.4f}{1:>18.2%}{self.times_s['teacher']:>9.0f} s")
        print(
            f"(nats per token over {result.num_tokens:,} tokens of {len(examples)} examples that no model was trained on)"
        )
        return results

    def plot(self) -> None:
        """Validation cross-entropy over the steps of both students."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for name, title in (("student_sft", "SFT alone"), ("student_kd", "SFT + KD")):
            lines = (self.folder / name / "metrics" / "metrics.jsonl").read_text().splitlines()
            points = [row for row in map(json.loads, lines) if "validation/sft_loss" in row]
            axes.plot([p["step"] for p in points], [p["validation/sft_loss"] for p in points], marker="o", label=title)
        axes.set(
            xlabel="step", ylabel="validation cross-entropy (nats per token)", title="Students of equal size and data"
        )
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(self.folder / "curves.png", dpi=150)
        print(f"curves: {self.folder / 'curves.png'}")


def train_tokenizer(dataset: Path, file: Path) -> None:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    records = (json.loads(line) for line in dataset.read_text(encoding="utf-8").splitlines())
    tokenizer.train_from_iterator((m["content"] for record in records for m in record["messages"]), trainer)
    tokenizer.save(str(file))


def say(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart_run"))
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--scale", type=float, default=1.0, help="fewer examples and epochs below 1, for a quick look")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
    Quickstart(arguments.output_dir, arguments.seed, arguments.scale).run()


if __name__ == "__main__":
    main()
