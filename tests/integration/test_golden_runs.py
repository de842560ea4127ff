"""Reproduce the recorded caches, losses and weights; `tests/golden/record_runs.py` defines the runs.

Where torch and the processor are those of the recording, every number must equal the recorded one to
the last bit. Elsewhere sums run in another order: numbers may differ by the tolerances of `CACHE_REL`
and `Case.rel`, and digests are not compared.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.golden import record_runs
from tests.golden.record_runs import STAGE_1, STAGE_2

RECORDED = json.loads(record_runs.RECORDED.read_text())
SAME_MACHINE = RECORDED["signature"] == record_runs.signature()
CACHE_REL = 5e-3
"""The packed codec rounds to coarse steps: a value between two steps may take either."""


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    return record_runs.make_world(ranks, tmp_path_factory.mktemp("golden_runs"))


@pytest.mark.parametrize("name", STAGE_1)
def test_stage_1_reproduces_the_recorded_cache(ranks, world, tmp_path, name):
    found = record_runs.stage_1(ranks, world, name, tmp_path)
    recorded = RECORDED["stage_1"][name]
    problems = differences(recorded["numbers"], found["numbers"], CACHE_REL)
    if SAME_MACHINE:
        problems += differences(recorded, found, 0.0)
    assert not problems, report(problems)


@pytest.mark.parametrize("name", STAGE_2)
def test_stage_2_reproduces_the_recorded_run(ranks, world, tmp_path, name):
    found = record_runs.stage_2(ranks, world, name, tmp_path)
    recorded = RECORDED["stage_2"][name]
    if not SAME_MACHINE:
        recorded.pop("weights_sha256", None)
    problems = differences(recorded, found, 0.0 if SAME_MACHINE else STAGE_2[name].rel)
    assert not problems, report(problems)


def test_context_parallelism_trains_on_label_as_one_rank_does():
    """The recorded runs of two cases, which the test before reproduces."""
    alone, split = (
        RECORDED["stage_2"][name]["steps"]
        for name in ("forward KL, label", "CP, label")
    )
    for step, row in alone.items():
        for name in ("train/loss", "train/kd_loss", "train/teacher_kl", "grad_norm"):
            assert split[step][name] == pytest.approx(row[name], rel=1e-6)


def differences(recorded: Any, found: Any, rel: float, where: str = "") -> list[str]:
    """Return a line for each recorded value that differs; values that are new in `found` are allowed."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        absent = [f"{where}/{key}: absent" for key in recorded if key not in found]
        shared = [key for key in recorded if key in found]
        return absent + sum(
            (
                differences(recorded[key], found[key], rel, f"{where}/{key}")
                for key in shared
            ),
            [],
        )
    is_number = isinstance(recorded, int | float) and isinstance(found, int | float)
    if recorded == found or (
        is_number and recorded == pytest.approx(found, rel=rel, abs=rel * 1e-3)
    ):
        return []
    return [f"{where}: recorded {recorded!r}, found {found!r}"]


def report(problems: list[str]) -> str:
    """Return the first lines: a difference in the first step makes all later ones differ."""
    hint = "If results are meant to change: python -m tests.golden.record_runs"
    return "\n".join([f"{len(problems)} values differ", *problems[:12], hint])
