"""Classes of a user that measure responses."""

from __future__ import annotations

import sys

import pytest

from nemo_kd.config import ConfigError
from nemo_kd.student.inference_metrics import InferenceMetrics

CLASS = """class Length:
    def update(self, batch, generation_output): ...
    def compute(self): return 3
    def reset(self): ...
"""


def test_modules_of_the_current_folder_count(tmp_path, monkeypatch):
    (tmp_path / "metrics_of_a_user.py").write_text(CLASS)
    monkeypatch.chdir(tmp_path)
    # A console command has its own folder first, not the current one.
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    metrics = InferenceMetrics({"a": {"_target_": "metrics_of_a_user.Length"}})
    assert metrics.compute() == {"eval/a": 3.0}


def test_a_class_that_is_not_there_is_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        InferenceMetrics({"a": {"_target_": "no_such_module.Length"}})
    text = str(error.value)
    assert text.startswith("trainer.knowledge_distillation.inference_metrics.a: ")
    assert "No module named 'no_such_module'" in text
    assert "\n" not in text
