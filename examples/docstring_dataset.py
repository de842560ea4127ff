"""A chat dataset from text that every Python carries: the standard library's docstrings.

    python examples/docstring_dataset.py --output-dir data

writes train.jsonl and validation.jsonl with OpenAI `messages`: "What does `json.dumps` do?", answered by its docstring.
Nothing is imported from the library's modules: their source is parsed. The same Python gives the same files.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

SKIPPED_PACKAGES = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "ensurepip",
}
VALIDATION_SHARE = 0.1
MIN_CHARACTERS, MAX_CHARACTERS = 40, 400
MAX_OVERLAP = 0.5
DOCUMENTED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented_objects() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of every public object of the standard library's Python modules."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        names = [part for part in parts if part != "__init__"]
        # Others may have put files there: system packages, build configurations of this machine.
        if (
            not names
            or names[0] not in sys.stdlib_module_names
            or SKIPPED_PACKAGES & set(parts)
        ):
            continue
        if any(name.startswith("_") for name in names):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # about escape sequences in the library's own strings
                tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue  # templates and deliberately broken files that lie in the library
        yield from _documented(tree, ".".join(names))


def _documented(node: ast.Module | DOCUMENTED, name: str) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, docstring
    for child in node.body:
        if isinstance(child, DOCUMENTED) and not child.name.startswith("_"):
            yield from _documented(child, f"{name}.{child.name}")


def answers() -> dict[str, str]:
    """Qualified name -> its docstring up to the last paragraph that fits; each text once."""
    found: dict[str, str] = {}
    seen: set[tuple[str, ...]] = set()
    for name, docstring in documented_objects():
        answer = ""
        for paragraph in docstring.split("\n\n"):
            longer = f"{answer}\n\n{paragraph}".strip()
            if len(longer) > MAX_CHARACTERS:
                break
            answer = longer
        if (
            len(answer) >= MIN_CHARACTERS
            and name not in found
            and words(answer) not in seen
        ):
            seen.add(words(answer))
            found[name] = answer
    return found


def splits(answers: dict[str, str]) -> dict[str, dict[str, str]]:
    """train and validation of name -> text: drawn by a hash of the name; what resembles a training answer is not validated on."""
    drawn: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    for name, answer in answers.items():
        draw = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10_000 / 10_000
        drawn["validation" if draw < VALIDATION_SHARE else "train"][name] = answer
    having = defaultdict(list)
    for name, answer in drawn["train"].items():
        for triple in triples(answer):
            having[triple].append(name)
    for name, answer in list(drawn["validation"].items()):
        shared = Counter(
            other for triple in triples(answer) for other in having.get(triple, ())
        )
        if max(shared.values(), default=0) >= MAX_OVERLAP * len(triples(answer)):
            del drawn["validation"][name]
    return drawn


def words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without punctuation and layout."""
    return tuple(re.findall(r"\w+", text.lower()))


def triples(text: str) -> set[tuple[str, ...]]:
    """Every three words that follow one another: of two texts that say the same, most are shared."""
    found = words(text)
    return {found[start : start + 3] for start in range(max(1, len(found) - 2))}


def write_dataset(folder: Path) -> dict[str, int]:
    """Writes train.jsonl, then validation.jsonl, each whole or not at all; returns their numbers of records."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, chosen in splits(answers()).items():
        lines = [
            json.dumps(
                {
                    "messages": [
                        turn("user", f"What does `{name}` do?"),
                        turn("assistant", answer),
                    ]
                }
            )
            + "\n"
            for name, answer in chosen.items()
        ]
        # Neighbours in a file are alike; a fixed order by hash mixes them.
        lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
        temporary = folder / f".{split}.jsonl.tmp"
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, folder / f"{split}.jsonl")
        counts[split] = len(lines)
    return counts


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    for split, count in write_dataset(parser.parse_args().output_dir).items():
        print(f"{split}: {count} records")
