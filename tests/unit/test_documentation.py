"""Documentation against the code: keys that exist, what may change on resume, links that lead somewhere."""

from __future__ import annotations

import argparse
import ast
import functools
import re
from pathlib import Path

import pytest
import yaml

from nemo_kd.cli import (
    filter_sft_data,
    logit_cache,
    plot_runs,
    preprocess_openassistant,
)
from nemo_kd.cli.aligner_keys import ALIASES, IGNORED
from nemo_kd.cli.compose import option_parser
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.evaluation import EvaluateGPTConfig
from nemo_kd.config.exp_manager import FREE_KEYS, KEY
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.config.typed import describe, suggestion

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "compute_topk_logits": ComputeTopkLogitsConfig,
    "train_gpt_knowledge_distillation": TrainStudentConfig,
    "evaluate_gpt": EvaluateGPTConfig,
    "convert_checkpoint": ConvertCheckpointConfig,
}
PARSERS = {
    "filter_sft_data": filter_sft_data.parser,
    "logit_cache": logit_cache.parser,
    "plot_runs": plot_runs.parser,
    "preprocess_openassistant": preprocess_openassistant.parser,
}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMAND_FILES = sorted((ROOT / "scripts" / "slurm").iterdir()) + sorted(
    (ROOT / "examples").glob("*.py")
)
SOURCES = sorted((ROOT / "nemo_kd").rglob("*.py"))
HYDRA_OPTIONS = {*option_parser()._option_string_actions, "-h", "--help"}
COMMAND_LINE = re.compile(
    rf"(?:^[ \t]*(?:\w+: )?|`)({'|'.join([*CONFIGS, *PARSERS])})[ \n]+((?:\\\n|[^`\n#])+)",
    re.MULTILINE,
)
"""A command and its arguments, in backticks or from the beginning of a line, perhaps behind `usage:` or the like."""
KEY_IN_TEXT = re.compile(r"(?<![\w.{-])((?:[a-z_]+\.)+[a-z_]+)=(?!=)")


@pytest.mark.parametrize("page", PAGES + COMMAND_FILES, ids=lambda page: page.name)
def test_keys_in_the_documentation_exist(page):
    known = {each.key for config in CONFIGS.values() for each in describe(config)}
    known |= {alias for aliases in ALIASES.values() for alias in aliases}
    sections = {
        "checkpoint_callback_params": "exp_manager.",
        "lora_tuning": "model.peft.",
    }
    open_mappings = (
        "exp_manager.wandb_logger_kwargs.",
        "exp_manager.summary_writer_kwargs.",
        "model.data.data_prefix.",
    )
    for key in KEY_IN_TEXT.findall(page.read_text(encoding="utf-8")):
        whole = sections.get(key.partition(".")[0], "") + key
        assert whole in known or whole.startswith(open_mappings), (
            f"{page.name}: {key} is not a key"
        )


def test_the_page_on_stage_2_lists_what_may_change_when_a_run_goes_on():
    text = (ROOT / "docs" / "stage_2.md").read_text(encoding="utf-8")
    (table,) = re.findall(
        r"These may change freely.*?\n\n(\|.*?)\n\n", text, re.DOTALL
    )
    patterns = [
        re.escape(name).replace(r"\*", r"\w*")
        for name in re.findall(r"`([\w.*]+)`", table)
    ]
    for key in FREE_KEYS:
        name = key.rpartition(".")[2]
        is_size = name.endswith("_parallel_size") and "parallel sizes" in table
        assert (
            key == KEY
            or is_size
            or any(re.fullmatch(rf"(.*\.)?{one}", key) for one in patterns)
        ), f"{key} is missing"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(
            r"\]\(([^)#\s:]*(?:#[^)\s]*)?)\)", page.read_text(encoding="utf-8")
        ):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(
                    r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE
                )
                anchors = {
                    re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                    for heading in headings
                }
                assert anchor in anchors, f"{page.name}: {target}"


@functools.cache
def options_of(command: str, subcommand: str) -> set[str]:
    """Return the options that a command takes, or logit_cache with a subcommand."""
    if command in CONFIGS or (command == "logit_cache" and subcommand == "plan"):
        return HYDRA_OPTIONS
    parser: argparse.ArgumentParser = PARSERS[command]()
    if command == "logit_cache" and not subcommand.startswith("-"):
        (subcommands,) = (
            action.choices
            for action in parser._actions
            if isinstance(action.choices, dict)
        )
        assert subcommand in subcommands, (
            f"logit_cache {subcommand}: there is no such subcommand"
        )
        parser = subcommands[subcommand]
    return {option for action in parser._actions for option in action.option_strings}


def texts_of(file: Path) -> list[str]:
    """Return a page, or the string literals of a source file; what an f-string puts in is X."""
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return [content]
    nodes = list(ast.walk(ast.parse(content)))
    joined = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in joined for part in node.values}
    texts = [
        "".join(
            str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "X"
            for part in node.values
        )
        for node in joined
    ]
    return texts + [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in parts
    ]


def test_command_lines_name_subcommands_and_options_that_exist():
    found = set()
    for file in PAGES + SOURCES:
        for command, arguments in (
            line for text in texts_of(file) for line in COMMAND_LINE.findall(text)
        ):
            found.add(command)
            subcommand = arguments.split()[0] if command == "logit_cache" else ""
            if subcommand == "X":
                continue
            unknown = set(
                re.findall(r"(?<![\w-])--[a-z][\w-]*", arguments)
            ) - options_of(command, subcommand)
            assert not unknown, (
                f"{file.relative_to(ROOT)}: {command} {arguments.strip()}: {unknown}"
            )
    assert found == {*CONFIGS, *PARSERS}


MIGRATING = ROOT / "docs" / "migrating.md"
NAME = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*")
OTHER_VALUES = {
    *("qwen", "qwen3", "distill_qwen", "sft_loss", "custom_loss"),
    *("k1", "k2", "k3", "low_var_kl", "step_loss_mask"),
}
"""Values, and a field of records, among the flags of slime."""
SECTIONS = ("model", "trainer", "data", "exp_manager", "cache", "eval", "export")


def rows_of(page: Path) -> list[list[str]]:
    """Return the cells of a page's tables, without headings."""
    lines = page.read_text(encoding="utf-8").splitlines()
    pairs = zip(lines, [*lines[1:], ""], strict=True)
    return [
        [cell.strip() for cell in line.strip("|").replace(r"\|", "/").split("|")]
        for line, after in pairs
        if line.startswith("|") and not line.startswith("|-") and after[:2] != "|-"
    ]


def is_known(name: str) -> bool:
    """Return True for a key, an alias, a section, the end of a key, or a key in a free mapping."""
    known = {each.key for config in CONFIGS.values() for each in describe(config)}
    known |= {alias for aliases in ALIASES.values() for alias in aliases}
    return any(
        f".{key}.".endswith(f".{name}.")
        or key.startswith(f"{name}.")
        or name.startswith(f"{key}.")
        for key in known
    )


@pytest.mark.parametrize("page", ["migrating.md", "troubleshooting.md"])
def test_every_key_to_set_is_a_key_or_an_alias(page):
    """Every key=value outside the first column, and every name that has a section."""
    path = ROOT / "docs" / page
    found = 0
    for _, *cells in rows_of(path):
        for code in re.findall(r"`([^`]+)`", " ".join(cells)):
            for word in code.split():
                name = word.partition("=")[0]
                has_section = name.partition(".")[0] in SECTIONS and "." in name
                if NAME.fullmatch(name) and ("=" in word or has_section):
                    found += 1
                    assert is_known(name) or name == "part", f"{page}: {word}"
    assert found > 20
    for key in KEY_IN_TEXT.findall(path.read_text(encoding="utf-8")):
        assert is_known(key), f"{page}: {key}"


def test_flags_of_other_systems_lead_to_a_key():
    """Every flag in the first column of slime and ROLL is answered by name, if the row names a key."""
    text = MIGRATING.read_text(encoding="utf-8")
    classes = (TrainStudentConfig, ComputeTopkLogitsConfig)
    known = [[each.key for each in describe(config)] for config in classes]
    ignored = yaml.safe_load(IGNORED)["both"]
    found = set()
    unanswered = []
    for first, second, *_ in rows_of(MIGRATING):
        if second.startswith("-") or text.index(first) < text.index("## slime"):
            continue
        if text.index(first) > text.index("## Metrics"):
            break
        for flag in re.findall(r"`(--[a-z0-9-]+|[a-z0-9_.]+)`", first):
            name = flag.strip("-").replace("-", "_")
            if flag in OTHER_VALUES or "." in flag:
                continue
            found.add(name)
            if name not in ignored and not any(
                suggestion(name, keys) or name in keys for keys in known
            ):
                unanswered.append(flag)
    assert unanswered == []
    assert len(found) > 60


def test_messages_on_the_page_of_troubles_are_the_program_s():
    texts = "\n".join(text for file in SOURCES for text in texts_of(file))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    found = 0
    for line in page.splitlines():
        if not line.startswith("    ") or line.startswith("    training: 1,500"):
            continue
        message = line.strip().removeprefix("error: ").removeprefix("warning: ")
        for part in message.removesuffix("(...").split("..."):
            plain = part.strip()
            if len(plain) > 9 and not re.fullmatch(r"[\w.]+:", plain):
                found += 1
                assert plain in texts.replace("%%", "%"), plain
    assert found > 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_prose_have_at_most_120_characters(page):
    is_code = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        is_code ^= line.startswith("```")
        is_prose = not (is_code or line.startswith(("|", "    ", "```")))
        assert not is_prose or len(line) <= 120, f"{page.name}:{number}"
