"""Which adapters are meant, and what is refused before anything is loaded."""

from __future__ import annotations

import pytest

from nemo_kd.config import ConfigError
from nemo_kd.config.optim import ExportConfig, LoraConfig, PeftConfig, check_lora
from nemo_kd.config.shared import GPTArchitecture, ParallelConfig
from nemo_kd.config.student import StudentModelConfig
from tests.tiny_data import student_config

LAYERS = 6


def architecture(**changes) -> GPTArchitecture:
    fields = {
        "family": "llama", "vocab_size": 100, "num_layers": LAYERS, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2,
        "num_query_groups": 2, "kv_channels": 4, "max_position_embeddings": 64, "layernorm_epsilon": 1e-5, "rotary_base": 1e4,
    }  # fmt: skip
    return GPTArchitecture(**{**fields, **changes})


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (["attention_qkv"], ("attention_qkv",)),
        (["mlp", "attention_dense"], ("attention_dense", "mlp_fc1", "mlp_fc2")),
        (["attention", "attention_qkv"], ("attention_qkv", "attention_dense")),
        (["all"], ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2")),
    ],
)
def test_groups_stand_for_projections(names, targets):
    assert LoraConfig(target_modules=names).targets == targets


def test_scale():
    assert LoraConfig(adapter_dim=8).scale == 1
    assert LoraConfig(adapter_dim=8, alpha=32).scale == 4


def test_every_weight_is_trained_unless_lora_is_asked_for():
    assert PeftConfig().lora is None
    assert PeftConfig(peft_scheme=None).lora is None
    assert PeftConfig(peft_scheme="lora").lora == LoraConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_proj"]},
            "target_modules: 'q_proj' is not one of attention_qkv, attention_dense, mlp_fc1",
        ),
        ({"target_modules": []}, "target_modules: is empty"),
        ({"adapter_dim": 0}, "adapter_dim: 0 must be at least 1"),
        ({"alpha": 0.0}, "alpha: 0.0 must be above 0"),
        (
            {"adapter_dropout": 1.0},
            "adapter_dropout: 1.0 must be at least 0 and below 1",
        ),
        (
            {"column_init_method": "ones"},
            "column_init_method: 'ones' is not one of xavier, normal, kaiming, zero",
        ),
        ({"column_init_method": "zero"}, "zero for both leaves no gradient"),
    ],
)
def test_impossible_adapters(settings, message):
    with pytest.raises(ConfigError) as error:
        LoraConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("lora", "model", "stages", "message"),
    [
        (
            {"layer_selection": [1, 7]},
            {},
            1,
            "layer_selection: [1, 7] must be of the model's layers 1 to 6",
        ),
        ({"layer_selection": [0]}, {}, 1, "layer_selection: [0] must be of"),
        ({"layer_selection": []}, {}, 1, "layer_selection: [] must be of"),
        (
            {"layer_selection": [1, 2]},
            {},
            3,
            "leaves part 2 of 3 of the pipeline (layers 3 to 4) nothing to train",
        ),
        (
            {"target_modules": ["all"]},
            {"family": "mixtral", "num_moe_experts": 4, "moe_router_topk": 2},
            1,
            "mlp_fc1, mlp_fc2 would be adapters of experts, which are not supported; use attention",
        ),
    ],
)
def test_adapters_that_the_model_has_no_place_for(lora, model, stages, message):
    with pytest.raises(ConfigError) as error:
        check_lora(
            adapters(**lora),
            architecture(**model),
            ParallelConfig(pipeline_model_parallel_size=stages),
        )
    assert message in str(error.value)


def adapters(**lora) -> PeftConfig:
    return PeftConfig("lora", lora_tuning=LoraConfig(**lora))


def test_a_part_of_an_interleaved_pipeline_without_adapters():
    parallel = StudentModelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3
    )
    with pytest.raises(ConfigError) as error:
        check_lora(adapters(layer_selection=[1, 2, 3, 4]), architecture(), parallel)
    assert (
        "leaves part 5 of 6 of the pipeline (layers 5 to 5) nothing to train"
        in str(error.value)
    )
    assert "model.virtual_pipeline_model_parallel_size" in str(error.value)


def test_adapters_that_fit():
    mixture = architecture(family="mixtral", num_moe_experts=4, moe_router_topk=2)
    check_lora(adapters(target_modules=["attention"]), mixture, ParallelConfig())
    check_lora(
        adapters(layer_selection=[2, 3, 6]),
        architecture(),
        ParallelConfig(pipeline_model_parallel_size=3),
    )


def test_settings_of_adapters_that_are_not_asked_for_are_told(caplog):
    check_lora(PeftConfig(), architecture(), ParallelConfig())
    assert not caplog.text
    check_lora(
        PeftConfig(lora_tuning=LoraConfig(adapter_dim=8)),
        architecture(),
        ParallelConfig(),
    )
    assert (
        "model.peft.lora_tuning has no effect: all weights are trained" in caplog.text
    )


def test_a_file_of_adapters_is_not_read():
    with pytest.raises(
        ConfigError,
        match=r"model\.peft\.restore_from_path: a\.nemo is not read; give the \.nemo of the earlier run",
    ):
        PeftConfig(restore_from_path="a.nemo")


def test_export(tmp_path):
    with pytest.raises(
        ConfigError, match=r"export\.lora: 'both' is not one of merged, adapter"
    ):
        ExportConfig(lora="both")
    with pytest.raises(
        ConfigError,
        match=r"export\.lora: adapter, but export\.hf=false writes no folder",
    ):
        ExportConfig(lora="adapter")
    with pytest.raises(
        ConfigError,
        match=r"export\.lora: adapter, but model\.peft\.peft_scheme=none trains none",
    ):
        student_config(
            tmp_path,
            tmp_path,
            tmp_path,
            tmp_path,
            export__hf=True,
            export__lora="adapter",
        )
    config = student_config(
        tmp_path,
        tmp_path,
        tmp_path,
        tmp_path,
        export__hf=True,
        export__lora="adapter",
        model__peft__peft_scheme="lora",
    )
    assert config.model.peft.lora is not None
