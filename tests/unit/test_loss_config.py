"""`model.knowledge_distillation`: what is taken, what is refused, and with which words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_kd.batch import Batch, TeacherRows
from nemo_kd.config import ConfigError
from nemo_kd.config import loss as config_loss
from nemo_kd.config.loss import LossConfig
from nemo_kd.config.typed import typed
from nemo_kd.ops import objectives
from nemo_kd.ops.vocab import VocabShard
from nemo_kd.student.loss import StudentLoss, load_custom_loss


def test_names_are_those_of_the_operators():
    for name in config_loss.DIVERGENCES:
        assert callable(getattr(objectives, name))
    assert tuple(objectives.LABEL_ESTIMATORS) == config_loss.LABEL_ESTIMATORS


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("fwd_kl", "forward_kl"),
        ("bwd_kl", "reverse_kl"),
        ("js_divergence", "jsd"),
        ("tvd", "tvd"),
    ],
)
def test_names_of_other_programs(alias, name):
    assert StudentLoss(LossConfig(kd_loss=alias)).losses.divergence.objective == name


def test_every_setting_reaches_the_operator():
    config = LossConfig(
        kd_loss="jsd", jsd_beta=0.2, temperature=4.0, multiply_by_squared_temperature=True, support="renormalize",
        sft_loss_weight=1.0, label_smoothing=0.1, z_loss_weight=0.01, compile="on",
    )  # fmt: skip
    losses = StudentLoss(config).losses
    assert losses.divergence == config_loss.Divergence(
        "jsd", "renormalize", 0.25, 0.25, 16.0, jsd_beta=0.2
    )
    assert (losses.label_smoothing, losses.z_loss_weight, losses.compile) == (
        0.1,
        0.01,
        True,
    )
    scaled = StudentLoss(
        LossConfig(kd_loss="fwd_kl", logits_scale=0.5, target_logits_scale=2.0)
    ).losses.divergence
    assert (scaled.student_scale, scaled.teacher_scale, scaled.factor) == (
        0.5,
        2.0,
        1.0,
    )
    skewed = StudentLoss(
        LossConfig(kd_loss="skewed_reverse_kl", skew_lambda=0.3)
    ).losses.divergence
    adaptive = StudentLoss(
        LossConfig(kd_loss="adaptive_kl", adaptive_kl_alpha=0.9)
    ).losses.divergence
    assert (skewed.skew_lambda, adaptive.adaptive_kl_alpha) == (0.3, 0.9)
    assert (
        StudentLoss(LossConfig(kd_loss_weight=0, sft_loss_weight=1)).losses.divergence
        is None
    )


@pytest.mark.parametrize(
    ("compile", "num_logits", "expected"),
    [
        ("auto", 1e9, False),
        ("auto", 1e11, True),
        ("off", 1e11, False),
        ("on", 1e9, True),
    ],
)
def test_auto_compiles_long_runs_only(compile, num_logits, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loss = StudentLoss(LossConfig(compile=compile))
    loss.compile_if_worthwhile(num_logits)
    assert loss.losses.compile is expected


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_compile_as_yaml_reads_it(value):
    """YAML takes on and off for booleans."""
    cfg = OmegaConf.create(f"compile: {value}")
    assert typed(LossConfig, cfg).compile == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kd_loss": "fkl"},
            "kd_loss: 'fkl' is not one of forward_kl, reverse_kl, jsd",
        ),
        (
            {"support": "top"},
            "support: 'top' is not one of renormalize, tail, truncate, label, sampled",
        ),
        ({"compile": "yes"}, "compile: 'yes' is not one of auto, on, off"),
        ({"kd_loss_weight": -1.0}, "kd_loss_weight: -1.0 must be at least 0"),
        ({"kd_loss_weight": float("inf")}, "kd_loss_weight: inf must be at least 0"),
        ({"sft_loss_weight": float("nan")}, "sft_loss_weight: nan must be at least 0"),
        ({"kd_loss_weight": 0.0}, "are both 0"),
        ({"logits_scale": 0.0}, "logits_scale: 0.0 must be above 0"),
        ({"temperature": -2.0}, "temperature: -2.0 must be above 0"),
        ({"temperature": float("inf")}, "temperature: inf must be above 0"),
        (
            {"temperature": 2.0, "logits_scale": 0.5},
            "temperature: give it, or logits_scale and target_logits_scale, not both",
        ),
        (
            {"multiply_by_squared_temperature": True},
            "multiply_by_squared_temperature: give temperature",
        ),
        (
            {"kd_loss": "jsd", "jsd_beta": 1.0},
            "jsd_beta: 1.0 must be above 0 and below 1",
        ),
        (
            {"kd_loss": "skewed_forward_kl", "skew_lambda": 0.0},
            "skew_lambda: 0.0 must be above 0 and below 1",
        ),
        (
            {"kd_loss": "adaptive_kl", "adaptive_kl_alpha": 1.5},
            r"adaptive_kl_alpha: 1.5 must be at least 0 and at most 1",
        ),
        (
            {"jsd_beta": 0.3},
            "jsd_beta: 0.3 has no effect with kd_loss=forward_kl, only with jsd",
        ),
        (
            {"kd_loss": "k2", "skew_lambda": 0.3},
            "skew_lambda: 0.3 has no effect with kd_loss=k2",
        ),
        (
            {"label_smoothing": 1.0, "sft_loss_weight": 1.0},
            r"label_smoothing: 1.0 must be at least 0 and below 1",
        ),
        (
            {"label_smoothing": 0.1},
            "label_smoothing: 0.1 belongs to the cross-entropy, which sft_loss_weight=0 leaves out",
        ),
        ({"z_loss_weight": 0.1}, "z_loss_weight: 0.1 belongs to the cross-entropy"),
        (
            {"kd_loss": "bwd_kl", "support": "truncate"},
            "support: truncate makes bwd_kl infinite",
        ),
        (
            {"kd_loss": "adaptive_kl", "support": "truncate"},
            "support: truncate makes adaptive_kl infinite",
        ),
        (
            {"kd_loss": "reverse_kl", "support": "label"},
            "support: label makes reverse_kl infinite",
        ),
        (
            {"kd_loss": "adaptive_kl", "support": "label"},
            "support: label makes adaptive_kl infinite",
        ),
        (
            {"kd_loss": "low_var_kl", "support": "label"},
            "support: label has no effect with kd_loss=low_var_kl",
        ),
        (
            {"kd_loss": "tvd", "support": "sampled"},
            "support: sampled works with forward_kl only, not tvd",
        ),
        (
            {"support": "sampled", "temperature": 2.0},
            "support=sampled needs temperature and scales of 1",
        ),
        (
            {"kd_loss": "k3", "support": "renormalize"},
            "support: renormalize has no effect with kd_loss=k3",
        ),
        (
            {"kd_loss": "k3", "target_logits_scale": 0.5},
            "kd_loss=k3 with support=tail needs temperature and scales of 1",
        ),
        (
            {"kd_loss": "custom"},
            "custom_loss: missing; kd_loss=custom needs the import path of a function",
        ),
        (
            {"custom_loss": "a.b"},
            "custom_loss: a.b has no effect with kd_loss=forward_kl, only with custom",
        ),
        (
            {"custom_args": {"alpha": 1}},
            "custom_args: {'alpha': 1} has no effect with kd_loss=forward_kl",
        ),
        (
            {"kd_loss": "custom", "custom_loss": "a.b", "temperature": 2.0},
            "kd_loss=custom with support=tail needs temperature and scales",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(settings, message):
    with pytest.raises(
        ConfigError, match=f"^model.knowledge_distillation[.:].*{message}|{message}"
    ):
        LossConfig(**settings)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "no_such_module_here.loss",
            "no_such_module_here.loss cannot be called .*: No module named",
        ),
        (
            "json.no_such_function",
            "json.no_such_function cannot be called .*: module 'json' has no attribute",
        ),
        ("loss", "loss cannot be called .*: "),
        (".relative.loss", ".relative.loss cannot be called .*: "),
        ("math.pi", "math.pi cannot be called .*: 3.14"),
    ],
)
def test_custom_losses_that_cannot_be_imported(path, message):
    with pytest.raises(ConfigError, match=f"custom_loss: {message}"):
        load_custom_loss(path, {})


def test_a_custom_loss_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_loss_file.py").write_text("def loss(*_):\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert load_custom_loss("my_own_loss_file.loss", {})(1, 2, 3, 4) == 7


def not_summed(logits, batch, shard, token_sum):
    return logits.sum(dim=-1), {}


def detached(logits, batch, shard, token_sum):
    return logits.detach().sum(), {}


def sums_a_tensor_of_another_shape(logits, batch, shard, token_sum):
    return token_sum(logits), {}


def sums_a_logit(logits, batch, shard, token_sum, power=1):
    return token_sum(logits[..., 0] ** power), {
        "powers": token_sum(logits[..., 0] ** power)
    }


def custom(name, **custom_args):
    path = f"tests.unit.test_loss_config.{name}"
    return StudentLoss(
        LossConfig(kd_loss="custom", custom_loss=path, custom_args=custom_args)
    )


def on_three_positions(loss, num_loss_tokens=3):
    zeros, mask = (
        torch.zeros(1, 3, dtype=torch.int64),
        torch.arange(3)[None] < num_loss_tokens,
    )
    batch = Batch(
        *[torch.tensor([0])] * 3, zeros, zeros, mask.float(), torch.arange(3)[None]
    )
    logits = torch.full((1, 3, 7), 2.0, requires_grad=True)
    total, sums = loss.on_logits(logits, batch, VocabShard.of(7, 7))
    total.backward()
    return sums, logits.grad


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_summed", r"returned the loss .*; it must be a scalar tensor"),
        (
            "detached",
            r"returned the loss .*a scalar tensor that depends on the logits",
        ),
        (
            "sums_a_tensor_of_another_shape",
            r"gave token_sum \[1, 3, 7\] values; it takes one for each position, \[1, 3\]",
        ),
    ],
)
def test_a_custom_loss_that_does_something_else(name, message):
    with pytest.raises(ConfigError, match=f"custom_loss: .*{name} {message}"):
        on_three_positions(custom(name))


def test_arguments_that_a_custom_loss_does_not_take():
    with pytest.raises(
        ConfigError,
        match="custom_loss: .*sums_a_logit cannot be called .* unexpected .* 'powr'",
    ):
        custom("sums_a_logit", powr=2)


def test_a_custom_loss_is_not_called_where_nothing_counts():
    """Micro-batches of filler rows alone have no teacher."""
    loss = custom("sums_a_logit", power=3)
    sums, gradient = on_three_positions(loss, num_loss_tokens=2)
    assert sums[-1, [1, -1]].tolist() == [16, 2]
    assert loss.custom_sums == {"powers": 16}
    assert gradient[0, :, 0].tolist() == [12, 12, 0]
    sums, gradient = on_three_positions(loss, num_loss_tokens=0)
    assert sums is None
    assert not gradient.any()


def test_a_custom_loss_in_a_file_that_does_not_parse(tmp_path, monkeypatch):
    (tmp_path / "does_not_parse.py").write_text("def loss(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError,
        match="custom_loss: does_not_parse.loss cannot be called .*: .*invalid syntax|does_not_parse",
    ):
        load_custom_loss("does_not_parse.loss", {})


def test_k1_is_warned_about(caplog):
    StudentLoss(LossConfig(kd_loss="k1"))
    assert (
        "kd_loss=k1: its gradient does not depend on the teacher, it only lowers the labels' probability"
        in caplog.text
    )
    caplog.clear()
    for config in (
        LossConfig(kd_loss="k2"),
        LossConfig(kd_loss="k1", kd_loss_weight=0, sft_loss_weight=1),
        LossConfig(),
    ):
        StudentLoss(config)
    assert not caplog.records


def test_renormalize_without_a_cross_entropy_is_warned_about(caplog):
    StudentLoss(LossConfig(support="renormalize"))
    assert (
        "nothing limits the student's probability outside the kept ids" in caplog.text
    )
    assert "the KL to its teacher rose from 2.4 to 5.6" in caplog.text
    caplog.clear()
    for config in (
        LossConfig(support="renormalize", sft_loss_weight=0.1),
        LossConfig(support="renormalize", sft_loss_weight=1, kd_loss_weight=0),
        LossConfig(),
    ):
        StudentLoss(config)
    assert not caplog.records


def test_which_temperature_of_a_cache():
    def missing(**settings) -> list[str]:
        return LossConfig(**settings).missing_targets(rows)

    tail = np.full((1, 3), 0.1)
    rows = TeacherRows(*np.zeros((4, 1)), tail, (1.0, 2.0, 3.0))
    for settings in ({}, {"target_logits_scale": 0.333333}, {"temperature": 2.0}):
        assert missing(**settings) == []
    assert "outside the kept ids at temperature 2.5" in missing(temperature=2.5)[0]
    assert missing(temperature=2.5, support="renormalize") == []
    assert missing(logits_scale=0.4) == []  # the student's needs no cache
    assert "lacks tail samples" in missing(support="sampled")[0]
    assert "log-probability of the labels" in missing(kd_loss="k2")[0]


def test_every_key_is_explained():
    from nemo_kd.config.typed import describe

    text = "\n".join(str(line) for line in describe(LossConfig))
    assert all(field.name in text for field in dataclasses.fields(LossConfig))
