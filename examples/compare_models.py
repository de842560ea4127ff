"""Compare a student with its teacher over whole vocabularies.

    python examples/compare_models.py STUDENT TEACHER VALIDATION.jsonl

Models are Hugging Face folders or .nemo archives with one tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import kl_div, nll_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_kd.batch import Example
from nemo_kd.config import ConfigError
from nemo_kd.config.data import DataConfig, DatasetConfig
from nemo_kd.config.shared import ModelConfig, TrainerConfig
from nemo_kd.data.batches import collate
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.groups import ProcessGroups, initialize_model_parallel
from nemo_kd.mcore.model import build_gpt_model, forward, transformer_config
from nemo_kd.run.endings import errors_end_the_process
from nemo_kd.run.ranks import join_ranks


@dataclass(frozen=True)
class Agreement:
    """Means over the loss tokens; losses in nats per token.

    Attributes:
        forward_kl: KL(teacher || student) over the whole vocabulary, without temperature.
        top1_agreement: share of tokens where both models rank the same token first.
    """

    num_tokens: int
    student_ce: float
    teacher_ce: float
    forward_kl: float
    top1_agreement: float


@torch.inference_mode()
def compare_with_teacher(
    student_path: str,
    teacher_path: str,
    examples: Iterable[Example],
    micro_batch_size: int = 16,
) -> Agreement:
    """Run both models in float32, each whole on this process's device, over `examples`.

    Memory: 2 x micro_batch_size x positions x vocabulary logits besides the models. Needs a process
    group; several ranks would all compute the same.

    Raises:
        ConfigError: the models' vocabularies or tokenizers differ, or the examples have no loss
            token.
    """
    layout = ModelConfig(make_vocab_size_divisible_by=1)
    groups = initialize_model_parallel(layout, layout.seed)
    student, *ours = _load(student_path, layout, groups)
    teacher, *theirs = _load(teacher_path, layout, groups)
    if ours != theirs:
        raise ConfigError(
            f"{student_path} and {teacher_path} have different tokenizers or vocabularies (of "
            f"{ours[0]} and {theirs[0]} ids), so a token id means different texts to them"
        )
    sums = torch.zeros(5, dtype=torch.float64)
    remaining = iter(examples)
    while micro_batch := list(islice(remaining, micro_batch_size)):
        batch = collate(micro_batch, pad_id=0).to(groups.device)
        mask_BS = batch.loss_mask_BS > 0
        labels_N = batch.labels_BS[mask_BS]
        log_q_NV, log_p_NV = (
            forward(model, batch)[mask_BS][:, : ours[0]].float().log_softmax(dim=-1)
            for model in (student, teacher)
        )
        figures = (
            mask_BS.sum(),
            nll_loss(log_q_NV, labels_N, reduction="sum"),
            nll_loss(log_p_NV, labels_N, reduction="sum"),
            kl_div(log_q_NV, log_p_NV, log_target=True, reduction="sum"),
            (log_p_NV.argmax(dim=-1) == log_q_NV.argmax(dim=-1)).sum(),
        )
        sums += torch.stack([figure.double() for figure in figures]).cpu()
    if not sums[0]:
        raise ConfigError(
            "there is nothing to compare the models on: the examples have no loss token"
        )
    return Agreement(int(sums[0]), *(sums[1:] / sums[0]).tolist())


def _load(
    path: str, layout: ModelConfig, groups: ProcessGroups
) -> tuple[torch.nn.Module, int, str]:
    """(model, size of its vocabulary, fingerprint of its tokenizer)."""
    with open_pretrained(path) as source:
        tokenizer = tokenizer_fingerprint(load_tokenizer(source.tokenizer_folder))
        config = transformer_config(source.architecture, layout, torch.float32)
        model = build_gpt_model(
            source.architecture,
            config,
            layout.make_vocab_size_divisible_by,
            transformer_engine=False,
        )
        source.load_weights(model, groups)
        return model.eval(), source.architecture.vocab_size, tokenizer


def read_examples(path: str, model: str, max_seq_length: int) -> list[Example]:
    """Tokenize a JSONL dataset with the tokenizer of `model`; records that are too long are left
    out."""
    with open_pretrained(model) as source:
        dataset = TokenizedDataset(
            DataConfig(data=DatasetConfig(file_path=path)),
            load_tokenizer(source.tokenizer_folder),
            max_seq_length,
            source.architecture.vocab_size,
        )
        records = [dataset[index] for index in range(len(dataset))]
    return [record for record in records if isinstance(record, Example)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("dataset", help="JSONL file, as for stage 1")
    parser.add_argument("--max-seq-length", type=int, default=4096)
    options = parser.parse_args()
    with errors_end_the_process():
        join_ranks(TrainerConfig())
        examples = read_examples(
            options.dataset, options.teacher, options.max_seq_length
        )
        found = compare_with_teacher(options.student, options.teacher, examples)
        for name, value in vars(found).items():
            print(f"{name:<16}{value:>12,.4f}")


if __name__ == "__main__":
    main()
