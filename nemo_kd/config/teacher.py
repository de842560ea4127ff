"""Configuration of stage 1, `compute_topk_logits`."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass, field, replace

from nemo_kd.config.data import (
    MAX_TOP_K,
    CacheConfig,
    DataConfig,
    names_records,
)
from nemo_kd.config.fields import Section, bounded, choice, count, path
from nemo_kd.config.shared import (
    ModelConfig,
    PretrainedCheckpoint,
    RunConfig,
    TrainerConfig,
)

SPLIT = "SPLIT"
DEFAULT_MAX_TOKENS_PER_BATCH = 8192


@dataclass
class TeacherModelConfig(ModelConfig):
    """`model` of stage 1."""

    micro_batch_size: int | None = count(None)
    """Largest number of examples per forward pass; None: as many as data.max_tokens_per_batch
    allows."""
    fp8: str | None = choice(None, ("current", "delayed"))
    """Compute the layers' matrix products in FP8 (hybrid format) with Transformer Engine on a GPU
    of compute capability 8.9 or newer: current (each batch has its own scales) or delayed (the
    first 64 examples fix the scales; not for experts). None: off. It changes what the cache holds."""


@dataclass
class TeacherDataConfig(DataConfig):
    """`data` of stage 1."""

    max_tokens_per_batch: int | None = count(None)
    """Largest number of tokens per forward pass of one replica of the teacher, padding included; a
    longer example runs alone. None: 8192, or no limit if model.micro_batch_size is given."""
    packing: bool = True
    """True: join the examples of a batch to one row without padding; each keeps its own positions
    and attention. False, and always with context parallelism: one example per row, padded to the
    longest."""
    num_workers: int = bounded(1, at_least=0)
    """Processes per rank that read tokenized records ahead; 0: the teacher waits for each batch."""


@dataclass
class ComputeTopkLogitsConfig(Section):
    """Keys of `compute_topk_logits`."""

    name: str = "compute_topk_logits"
    """Name of the run."""
    start_from_idx: int = bounded(0, at_least=0)
    """First record of the dataset."""
    end_at_idx: int | None = None
    """Last record of the dataset, included; None: the dataset's last."""
    output_path: str = path()
    """File of the cache, or a template: CHUNK_ID becomes 0, 1, 2 ..., and SPLIT the split's name if
    data.data.file_path names several."""
    n_examples_per_chunk: int | None = count(None)
    """Records per chunk; needs CHUNK_ID in output_path. None: one chunk."""
    top_k: int = bounded(128, at_least=1, at_most=MAX_TOP_K)
    """Largest number of teacher logits kept per position; `cache` keeps fewer if the teacher is
    certain."""
    part: str | None = None
    """This job's part of the work, i/n with i from 0 to n - 1, if n jobs write one cache at the
    same time; shard is another name. None: the task's number in a Slurm array of several tasks,
    unless a range of records is given; otherwise 0/1, everything."""
    dry_run: bool = False
    """Print layout, first example and plan (disk, time, memory, from a short probe) and write
    nothing; `--dry-run` is the same."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    pretrained_checkpoint: PretrainedCheckpoint = field(
        default_factory=PretrainedCheckpoint
    )
    model: TeacherModelConfig = field(default_factory=TeacherModelConfig)
    data: TeacherDataConfig = field(default_factory=TeacherDataConfig)
    exp_manager: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache.min_k > self.top_k:
            raise self.error(
                "cache.min_k", f"{self.cache.min_k} exceeds top_k ({self.top_k})"
            )
        if self.end_at_idx is not None and self.end_at_idx < self.start_from_idx:
            raise self.error(
                "end_at_idx",
                f"{self.end_at_idx} is before start_from_idx {self.start_from_idx}",
            )
        self._check_splits()
        self.part_number()
        if (
            self.n_examples_per_chunk is not None
            and "CHUNK_ID" not in self.output_path
        ):
            raise self.error(
                "output_path",
                f"{self.output_path!r} has no CHUNK_ID, which n_examples_per_chunk="
                f"{self.n_examples_per_chunk} needs; for example "
                "data/train_with_logits_CHUNK_ID.jsonl",
            )

    @property
    def max_tokens_per_batch(self) -> int | None:
        """Return `data.max_tokens_per_batch` or its default; None: no limit."""
        if (
            self.data.max_tokens_per_batch is None
            and self.model.micro_batch_size is None
        ):
            return DEFAULT_MAX_TOKENS_PER_BATCH
        return self.data.max_tokens_per_batch

    def part_number(self) -> tuple[int, int]:
        """Return (i, n) of `part`, or of the task in a Slurm array."""
        if self.part is not None:
            match = re.fullmatch(r"(\d+)/(\d+)", self.part)
            if match is None or int(match[1]) >= int(match[2]):
                raise self.error(
                    "part",
                    f"{self.part!r} is not i/n with i from 0 to n - 1; 0/4, 1/4, 2/4 and 3/4 "
                    "share the work of four jobs",
                )
            return int(match[1]), int(match[2])
        array_size = _array_task("COUNT", 1)
        if array_size == 1 or self.start_from_idx or self.end_at_idx is not None:
            return 0, 1
        first = _array_task("MIN", 0)
        step = _array_task("STEP", 1)
        last = first + (array_size - 1) * step
        if _array_task("MAX", last) != last:
            raise self.error(
                "part",
                f"the Slurm array has {array_size} tasks that are not a range; give one "
                f"(--array=0-{array_size - 1}), or the part of each task (part=i/n)",
            )
        return (_array_task("ID", first) - first) // step, array_size

    def splits(self) -> dict[str, ComputeTopkLogitsConfig]:
        """Return split -> configuration with one dataset and one output path; "" is the only
        split."""
        paths = self.data.data.file_path
        if not isinstance(paths, dict):
            return {"": self}
        splits = {}
        for split, file_path in paths.items():
            part = copy.deepcopy(self)
            part.output_path = self.output_path.replace(SPLIT, split)
            part.data.data = replace(self.data.data, file_path=file_path)
            for key in self.environment:
                if key.startswith(("output_path", "data.data.file_path")):
                    del part.environment[key]
            splits[split] = part
        return splits

    def _check_splits(self) -> None:
        paths = self.data.data.file_path
        if names_records(paths):
            return
        if not isinstance(paths, dict) or not all(map(names_records, paths.values())):
            raise self.error(
                "data.data.file_path",
                f"{paths!r} is neither a path nor [PATH, PATH ...] nor {{SPLIT: PATH, SPLIT: PATH "
                "...}, for example {train: train.jsonl, validation: validation.jsonl}",
            )
        if SPLIT not in self.output_path:
            raise self.error(
                "output_path",
                f"{self.output_path!r} has no {SPLIT}, which the splits {', '.join(paths)} need; "
                f"for example cache/{SPLIT}_with_logits_CHUNK_ID.jsonl.zst",
            )
        if self.start_from_idx or self.end_at_idx is not None:
            raise self.error(
                "start_from_idx, end_at_idx",
                f"select records of one dataset, but data.data.file_path names {len(paths)}; "
                "give one path",
            )


def _array_task(name: str, default: int) -> int:
    """Return a number that Slurm sets for the tasks of an array."""
    return int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
