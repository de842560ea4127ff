"""The YAML files of conf/: complete, commented, and equal to the defaults of the dataclasses.

`python -m tests.unit.test_conf` writes them again after a change of a default or a docstring.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import textwrap
import typing
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_kd.cli.aligner_keys import ALIASES
from nemo_kd.cli.compose import compose, conf_dir, option_parser
from nemo_kd.config import ConfigError
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.evaluation import EvaluateGPTConfig
from nemo_kd.config.fields import need
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.config.typed import describe, typed

COMMANDS = {
    "compute_topk_logits": ComputeTopkLogitsConfig,
    "evaluate_gpt": EvaluateGPTConfig,
    "train_gpt_knowledge_distillation": TrainStudentConfig,
    "convert_checkpoint": ConvertCheckpointConfig,
}
HEADER = """\
# All keys of {command} with their defaults.
#
# Copy this file, keep the lines that you change, and run it:
#     {command} --config-path FOLDER --config-name FILE
# Keys on the command line override the file. ??? marks keys that need a value.
# These names are short for keys below:
"""


def conf_text(command: str) -> str:
    names = [
        f"#     {name}: {key}"
        for name, key in ALIASES[command].items()
        if "." not in name
    ]
    header = HEADER.format(command=command) + "\n".join(names) + "\n"
    return header + "\n".join(_section(COMMANDS[command], 0)) + "\n"


def _section(cls: type, depth: int) -> list[str]:
    indent = "  " * depth
    docs = {one.key: one.doc for one in describe(cls)}
    hints = typing.get_type_hints(cls)
    lines = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            lines += [
                "",
                f"{indent}{field.name}:",
                *_section(hints[field.name], depth + 1),
            ]
            continue
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        bounds = need(field)
        doc = docs[field.name] + (f" Must be {bounds}." if bounds else "")
        for word, plain in {"None": "null", "True": "true", "False": "false"}.items():
            doc = re.sub(rf"\b{word}\b", plain, doc)
        value = (
            yaml.safe_dump(default, default_flow_style=True)
            .removesuffix("...\n")
            .strip()
        )
        comment = f"{indent}# "
        lines += [
            "",
            *textwrap.wrap(
                doc, 100, initial_indent=comment, subsequent_indent=comment
            ),
        ]
        lines.append(f"{indent}{field.name}: {value}")
    return lines


def defaults(cls: type) -> dict:
    return OmegaConf.to_container(OmegaConf.structured(cls))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_file_of_a_command_has_every_key_with_its_default_and_a_comment(command):
    path = conf_dir() / f"{command}.yaml"
    assert yaml.safe_load(path.read_text()) == defaults(COMMANDS[command])
    assert path.read_text() == conf_text(command), "run python -m tests.unit.test_conf"


def run(command: str, *arguments: str):
    options, keys = option_parser().parse_known_args(arguments)
    cfg, warnings = compose(options, keys, command, COMMANDS[command])
    return typed(COMMANDS[command], cfg), warnings


def test_the_command_line_and_the_dataclass_give_the_same_run():
    given = ["model=m", "output=o", "data=d", "validation=v"]
    config, warnings = run("train_gpt_knowledge_distillation", *given)
    plain = typed(
        TrainStudentConfig,
        OmegaConf.create(
            {
                "pretrained_checkpoint": {"restore_from_path": "m"},
                "exp_manager": {"explicit_log_dir": "o"},
                "model": {"data": {"data_prefix": {"train": "d", "validation": "v"}}},
            }
        ),
    )
    assert (config, warnings) == (plain, [])


@pytest.mark.parametrize("name", ["max_seq_length", "model.encoder_seq_length"])
@pytest.mark.parametrize("in_file", ["max_seq_length", "model.max_seq_length"])
def test_the_command_line_wins_over_every_name_in_a_file(tmp_path, name, in_file):
    values = OmegaConf.create(
        {"lr": 1e-5, "model": {"data": {"data_prefix": {"train": "t"}}}}
    )
    OmegaConf.update(values, in_file, 1024)
    OmegaConf.save(values, tmp_path / "mine.yaml")
    config, _ = run(
        "train_gpt_knowledge_distillation",
        *["--config-path", str(tmp_path), "--config-name", "mine"],
        *["model=m", "data=d", "validation=v", "lr=1e-3", f"{name}=77"],
    )
    assert config.model.data.data_prefix["train"] == "d"
    assert (config.model.optim.lr, config.model.max_seq_length) == (1e-3, 77)


def test_a_path_in_a_file_stays_beside_keys_of_the_same_section(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: m\ndata: d\noutput: o.jsonl\n")
    config, _ = run(
        "compute_topk_logits",
        *["--config-path", str(tmp_path), "--config-name", "mine"],
        *["model.tensor_model_parallel_size=2", "data.num_workers=0"],
    )
    assert config.pretrained_checkpoint.restore_from_path == "m"
    assert config.data.data.file_path == "d"
    assert config.model.tensor_model_parallel_size == 2
    assert config.data.num_workers == 0


def test_names_of_one_key_must_agree_in_a_file_even_with_the_default(tmp_path):
    text = "lr: 1e-3\nmodel: {optim: {lr: 3.0e-5}, encoder_seq_length: 5}\n"
    (tmp_path / "mine.yaml").write_text(text)
    arguments = ["--config-path", str(tmp_path), "--config-name", "mine"]
    with pytest.raises(
        ConfigError,
        match=r"^lr=0.001 and model.optim.lr=3e-05: both are names of model",
    ):
        run("train_gpt_knowledge_distillation", *arguments)


def test_references_to_other_names_are_references_to_their_keys(tmp_path):
    text = "lr: 1e-3\nepochs: 7\nname: run_${epochs}\ndata: d\nvalidation: ${data}\n"
    (tmp_path / "mine.yaml").write_text(text)
    arguments = ["--config-path", str(tmp_path), "--config-name", "mine", "model=m"]
    config, _ = run("train_gpt_knowledge_distillation", *arguments)
    assert config.name == "run_7"
    assert config.model.data.data_prefix == {"train": "d", "validation": "d"}


def test_mappings_without_a_default_take_single_keys():
    config, _ = run(
        "train_gpt_knowledge_distillation",
        *["model=m", "data=d", "validation=v", "model.data.n_chunks.train=2"],
        *["exp_manager.summary_writer_kwargs.flush_secs=5", "exp_manager.name=null"],
    )
    assert config.model.data.n_chunks == {"train": 2}
    assert config.exp_manager.summary_writer_kwargs == {"flush_secs": 5}


if __name__ == "__main__":
    for name in COMMANDS:
        Path(conf_dir() / f"{name}.yaml").write_text(conf_text(name))
    print(shlex.join(str(path) for path in conf_dir().glob("*.yaml")))
