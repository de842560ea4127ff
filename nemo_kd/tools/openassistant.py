"""Conversations from OpenAssistant's message trees, as records of NeMo's chat format.

The files equal those of NeMo-Aligner's preprocess_openassistant_data.py byte for byte.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_kd.config import DataError
from nemo_kd.data.records import open_records
from nemo_kd.files import atomic_file

SEED = 10
TRAIN_SHARE = 0.95
ROLES = {"prompter": "User", "assistant": "Assistant"}
ATTRIBUTES = ("quality", "toxicity", "humor", "creativity")
LARGEST_SCORE = 4
"""Scores from 0 to 1 become whole numbers from 0 to this."""
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def preprocess_openassistant(source: str, folder: Path) -> Counter[str]:
    """Write train.jsonl and val.jsonl: a record for every path from a prompt to a last reply.

    Returns:
        Counts of trees, of the records in each file, and of prompts without a reply, which make no
        record.

    Raises:
        DataError: a line is not a tree, or no tree has a reply; with file:line.
    """
    trees = open_records(source)
    order = list(range(len(trees)))
    random.Random(SEED).shuffle(order)
    num_train = int(len(order) * TRAIN_SHARE)
    counts = Counter(trees=len(order))
    for name, indices in (("train", order[:num_train]), ("val", order[num_train:])):
        with atomic_file(folder / f"{name}.jsonl") as file:
            for index in indices:
                try:
                    threads = list(_threads(trees[index]))
                except (KeyError, TypeError) as error:
                    raise DataError(
                        f"{trees.where(index)}: not a message tree of OpenAssistant ({error!r}); "
                        "give its .trees.jsonl.gz file"
                    ) from error
                for turns in threads:
                    if len(turns) < 2:
                        counts["prompts without a reply"] += 1
                        continue
                    file.write(_line(turns))
                    counts[name] += 1
    if not counts["train"] + counts["val"]:
        raise DataError(
            f"{source}: no message has a reply; give OpenAssistant's .trees.jsonl.gz file"
        )
    return counts


def _threads(node: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Yield the turns of every path from a message to its last replies."""
    message = node.get("prompt", node)
    if not {"text", "role"} <= {*message}:
        yield []  # as NeMo-Aligner: the path ends before it
        return
    turn = {"value": message["text"], "from": ROLES[message["role"]]}
    if turn["from"] == "User":
        turn["label"] = None
    elif "labels" in message:
        turn["label"] = _label(message["labels"])
    threads = [thread for reply in message["replies"] for thread in _threads(reply)]
    for thread in threads or [[]]:
        yield [turn, *thread]


def _label(labels: dict[str, Any]) -> str:
    return ",".join(
        f"{name}:{round(labels[name]['value'] * LARGEST_SCORE)}"
        for name in ATTRIBUTES
        if name in labels
    )


def _line(turns: list[dict[str, Any]]) -> bytes:
    record = {
        "conversations": turns,
        "system": SYSTEM,
        "mask": "User",
        "type": "VALUE_TO_TEXT",
    }
    return f"{json.dumps(record, ensure_ascii=False)}\n".encode()
