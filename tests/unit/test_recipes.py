"""The recipes of conf/recipes: each is a valid configuration of its command and fits the other's."""

from __future__ import annotations

import re
import shlex

import pytest

from nemo_kd.cli.compose import conf_dir
from tests.unit.test_conf import COMMANDS, run

RECIPES = sorted(path.stem for path in (conf_dir() / "recipes").glob("*.yaml"))


def command_of(recipe: str) -> str:
    return next(name for name in COMMANDS if recipe.endswith(name))


def shown_command(recipe: str) -> list[str]:
    """Return the command line in the recipe's first lines."""
    text = (conf_dir() / "recipes" / f"{recipe}.yaml").read_text()
    lines = re.search(r"^#     (\w+ --config-dir.*\n(?:#         .*\n)*)", text, re.M)[
        1
    ]
    return shlex.split(lines.replace("\\\n", "\n").replace("#  ", "   "))


def recipe_config(recipe: str):
    command, *arguments = shown_command(recipe)
    assert command == command_of(recipe)
    arguments = [
        str(conf_dir() / "recipes") if a == "conf/recipes" else a for a in arguments
    ]
    config, warnings = run(command, *arguments)
    assert warnings == []
    return config


def test_there_is_a_recipe_of_both_stages_for_each_pair():
    stages = ("compute_topk_logits", "train_gpt_knowledge_distillation")
    pairs = ("qwen3_8b_to_0.6b", "smollm2_laptop")
    assert [f"{pair}_{stage}" for pair in pairs for stage in stages] == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_shown_in_a_recipe_gives_a_valid_configuration(recipe):
    recipe_config(recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_found_in_the_commands_own_folder(recipe):
    _, *arguments = shown_command(recipe)
    given = [each for each in arguments if "=" in each]
    config, _ = run(command_of(recipe), "--config-name", f"recipes/{recipe}", *given)
    assert config == recipe_config(recipe)


@pytest.mark.parametrize("pair", ["qwen3_8b_to_0.6b", "smollm2_laptop"])
def test_the_two_stages_of_a_pair_fit(pair):
    teacher = recipe_config(f"{pair}_compute_topk_logits")
    student = recipe_config(f"{pair}_train_gpt_knowledge_distillation")
    assert student.model.data.data_prefix["train"] == teacher.output_path
    assert student.model.max_seq_length == teacher.model.max_seq_length
    is_sampled = student.model.knowledge_distillation.support == "sampled"
    assert is_sampled == bool(teacher.cache.tail_samples)
