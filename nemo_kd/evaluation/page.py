"""Page of an evaluation's samples, beside the dataset's turns and another evaluation's samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from nemo_kd.answers.samples import Sample
from nemo_kd.config import ConfigError
from nemo_kd.config.evaluation import RESULT, SAMPLES
from nemo_kd.files import read_file
from nemo_kd.page import build_page

TEMPLATE = Path(__file__).with_name("samples.html")
MOST_SAMPLES = 1000
"""Most samples on a page: the first ones."""


@dataclass(frozen=True)
class OtherEvaluation:
    """An evaluation to compare with.

    Attributes:
        name: of its folder.
        result: content of evaluation.json.
        samples: lines of samples.jsonl by their `index`.
    """

    name: str
    result: dict[str, Any]
    samples: dict[int, dict[str, Any]]


def read_evaluation(folder: str, dataset_fingerprint: str) -> OtherEvaluation:
    """Read an evaluation's folder.

    Raises:
        ConfigError: it has no samples, is damaged, or is of another dataset.
    """
    path = Path(folder)
    try:
        result = orjson.loads(read_file(path / RESULT))
        lines = map(orjson.loads, read_file(path / SAMPLES).splitlines())
        samples = {line["index"]: line for line in lines}
        dataset = result["dataset"]
        is_same = dataset["fingerprint"] == dataset_fingerprint
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"evaluate.compare: {folder} holds no evaluation with samples ({error!r}); give the "
            "evaluate.output_dir of one that generated responses"
        ) from error
    if not is_same:
        raise ConfigError(
            f"evaluate.compare: {folder} is an evaluation of another file, {dataset['path']}; give "
            "one of the same file as data.data.file_path"
        )
    return OtherEvaluation(path.absolute().name, result, samples)


def figures(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers of evaluation.json as text."""
    return {
        name: f"{value:,.4f}".removesuffix(".0000")
        for name, value in result.items()
        if isinstance(value, int | float)
    }


def samples_page(
    result: Mapping[str, Any],
    samples: Sequence[Sample],
    other: OtherEvaluation | None = None,
) -> str:
    """Return a self-contained page of samples with the numbers of `result`, evaluation.json."""
    theirs = figures(other.result) if other else {}
    their_samples = other.samples if other else {}
    content = {
        "title": f"{result['model']['name']} on {Path(result['dataset']['path']).name}",
        "other": other and other.name,
        "figures": [
            {
                "name": name.replace("_", " "),
                "value": value,
                "theirs": theirs.get(name),
            }
            for name, value in figures(result).items()
        ],
        "num_samples": len(samples),
        "samples": [
            {**asdict(sample), "theirs": their_samples.get(sample.index)}
            for sample in samples[:MOST_SAMPLES]
        ],
    }
    return build_page(TEMPLATE, content)
