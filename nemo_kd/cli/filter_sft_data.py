"""Console command that keeps the records whose response is correct."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nemo_kd.cli.options import OptionParser, path
from nemo_kd.cli.run import check_records, check_writable
from nemo_kd.config.answers import CHECKERS, AnswerConfig
from nemo_kd.files import print_table, print_text
from nemo_kd.run.endings import errors_end_the_process

SUMMARY = (
    "Keeps the records of a dataset whose last trained turn answers correctly, line by line as they "
    "are. Statistics are written beside the output, with the suffix .stats.json."
)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "input": (
        path,
        "dataset with messages, conversations or plain fields, also PATH@[a:b]",
    ),
    "output": (path, "JSONL file to write"),
    "--answer-field": (str, "field of a record that holds the right answer", ...),
    "--checker": (CHECKERS, "how a response is compared with the answer", "math"),
    "--pattern": (
        str,
        "--checker regex: regular expression with one group, the answer",
    ),
    "--custom-checker": (
        str,
        "--checker custom: import path of function(response, answer) -> bool",
    ),
    "--label-key": (
        str,
        "field of a record without turns that holds the response",
        "output",
    ),
}
"""Other arguments of `OptionParser.add_option` for each name."""


def main() -> None:
    arguments = parser().parse_args()
    with errors_end_the_process():
        from nemo_kd.evaluation.filter import filter_records

        source = arguments.input
        target = Path(arguments.output)
        check_records("input", source)
        settings = AnswerConfig(
            answer_field=arguments.answer_field,
            checker=arguments.checker,
            pattern=arguments.pattern,
            custom_checker=arguments.custom_checker,
        )
        check_writable("output", target.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        found = filter_records(source, target, settings, arguments.label_key)
        rows = [("original", f"{found['original']:,}"), ("kept", f"{found['kept']:,}")]
        rows.append(("retention", f"{found['retention']:.1%}"))
        rows += [(reason, f"{n:,}") for reason, n in found["reasons"].items() if n]
        print_table(rows)
        if not found["kept"]:
            print_text(
                f"warning: {target} is empty: no response is correct", sys.stderr
            )


def parser() -> OptionParser:
    result = OptionParser(prog="filter_sft_data", description=SUMMARY)
    for name, row in OPTIONS.items():
        result.add_option(name, *row)
    return result


if __name__ == "__main__":
    main()
