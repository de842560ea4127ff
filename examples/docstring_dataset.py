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
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_PACKAGES = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo", "ensurepip"}
VALIDATION_SHARE = 0.08
MIN_CHARACTERS, MAX_CHARACTERS = 40, 400


def documented_objects() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of every public object of the standard library's Python modules."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED_PACKAGES & set(parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and deliberately broken files that lie in the library
        yield from _documented(tree, module)


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith(
                "_"
            ):
                yield from _documented(child, f"{name}.{child.name}")


def examples() -> Iterator[tuple[str, dict[str, object]]]:
    """(split, record); every answer occurs once, cut at the last paragraph that fits."""
    seen: set[str] = set()
    for name, docstring in documented_objects():
        answer = ""
        for paragraph in docstring.split("\n\n"):
            longer = f"{answer}\n\n{paragraph}".strip()
            if len(longer) > MAX_CHARACTERS:
                break
            answer = longer
        if len(answer) < MIN_CHARACTERS or answer in seen:
            continue
        seen.add(answer)
        draw = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10_000 / 10_000
        messages = [{"role": "user", "content": f"What does `{name}` do?"}, {"role": "assistant", "content": answer}]
        yield ("validation" if draw < VALIDATION_SHARE else "train"), {"messages": messages}


def write_dataset(folder: Path) -> dict[str, int]:
    """Writes train.jsonl and validation.jsonl; returns their numbers of records."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    for split, record in examples():
        lines[split].append(json.dumps(record, ensure_ascii=False) + "\n")
    for split, records in lines.items():
        # Neighbours in a file are alike; a fixed order by hash mixes them.
        records.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
        (folder / f"{split}.jsonl").write_text("".join(records), encoding="utf-8")
    return {split: len(records) for split, records in lines.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    for split, count in write_dataset(parser.parse_args().output_dir).items():
        print(f"{split}: {count} records")
