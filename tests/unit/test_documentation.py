"""Documentation against the code: keys that exist, what may change on resume, links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_kd.config import describe
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.experiment import FREE_KEYS, KEY
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.config.teacher import ComputeTopkLogitsConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "compute_topk_logits": ComputeTopkLogitsConfig,
    "train_gpt_knowledge_distillation": TrainStudentConfig,
    "convert_checkpoint": ConvertCheckpointConfig,
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND_FILES = sorted((ROOT / "scripts" / "slurm").iterdir()) + sorted((ROOT / "examples").glob("*.py"))
KEY_IN_TEXT = re.compile(r"(?<![\w.{-])((?:[a-z_]+\.)+[a-z_]+)=(?!=)")


@pytest.mark.parametrize("page", PAGES + COMMAND_FILES, ids=lambda page: page.name)
def test_keys_in_the_documentation_exist(page):
    known = {each.key for config in CONFIGS.values() for each in describe(config)}
    sections = {"checkpoint_callback_params": "exp_manager.", "lora_tuning": "model.peft."}
    open_mappings = ("exp_manager.wandb_logger_kwargs.", "exp_manager.summary_writer_kwargs.")
    for key in KEY_IN_TEXT.findall(page.read_text(encoding="utf-8")):
        whole = sections.get(key.partition(".")[0], "") + key
        assert whole in known or whole.startswith(open_mappings), f"{page.name}: {key} is not a key"


def test_the_page_on_stage_2_lists_what_may_change_when_a_run_goes_on():
    text = (ROOT / "docs" / "stage_2.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"These may change freely.*?\n\n(\|.*?)\n\n", text, re.DOTALL)
    patterns = [re.escape(name).replace(r"\*", r"\w*") for name in re.findall(r"`([\w.*]+)`", table)]
    for key in FREE_KEYS:
        name = key.rpartition(".")[2]
        is_size = name.endswith("_parallel_size") and "parallel sizes" in table
        assert key == KEY or is_size or any(re.fullmatch(rf"(.*\.)?{one}", key) for one in patterns), (
            f"{key} is missing"
        )


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s:]*(?:#[^)\s]*)?)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{page.name}: {target}"
