"""Console command that evaluates a model."""

from pathlib import Path

from nemo_kd.cache.layout import CacheLayout, path_of
from nemo_kd.cli.run import (
    Command,
    check_model,
    check_records,
    check_writable,
    run,
)
from nemo_kd.config import ConfigError
from nemo_kd.config.evaluation import RESULT, EvaluateGPTConfig, EvaluationConfig
from nemo_kd.config.shared import check_generation_layout


def check(config: EvaluateGPTConfig) -> None:
    """Refuse paths that are not there or cannot be written, and sizes that do not divide.

    Raises:
        ConfigError: names the key.
    """
    settings = config.evaluate
    trainer = config.trainer
    model = config.pretrained_checkpoint.restore_from_path
    check_model("pretrained_checkpoint.restore_from_path", model)
    if settings.base_model is not None:
        check_model("evaluate.base_model", settings.base_model)
    check_backend(settings, model)
    config.model.data_parallel_size(trainer.num_nodes * trainer.num_devices)
    if settings.generates and settings.backend == "megatron":
        check_generation_layout(
            config.model, "evaluate.generate or evaluate.answer_field"
        )
    check_records("data.data.file_path", config.data.data.file_path)
    if settings.cache is not None and "://" not in settings.cache:
        layout = CacheLayout(path_of(settings.cache))
        if not layout.existing_chunks() and not layout.manifest_path.exists():
            raise ConfigError(
                f"evaluate.cache: there is no file {settings.cache}; give the output_path of "
                "compute_topk_logits"
            )
    check_output(Path(settings.output_dir), settings.overwrite)


def check_backend(settings: EvaluationConfig, model: str) -> None:
    """Refuse a model that another backend than megatron cannot load."""
    if settings.backend == "megatron" or settings.url is not None:
        return
    if not Path(model, "config.json").is_file():
        raise ConfigError(
            f"evaluate.backend={settings.backend}: {model} is no Hugging Face folder; give the one "
            f"that this command writes: convert_checkpoint input_path={model} output_path=FOLDER"
        )


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder with other content than an evaluation that may be replaced."""
    key = "evaluate.output_dir"
    check_writable(key, folder.absolute().parent)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / RESULT).is_file():
        raise ConfigError(
            f"{key}: {folder} exists and is no evaluation (it has no {RESULT}); give another folder"
        )
    if not overwrite:
        raise ConfigError(
            f"{key}: {folder} holds an evaluation; give another folder, or replace it as a whole "
            "with evaluate.overwrite=true"
        )


COMMAND = Command(
    name="evaluate_gpt",
    summary="measures a model's loss, and generates and checks its answers",
    config_class=EvaluateGPTConfig,
    check=check,
    function="nemo_kd.evaluation.job:evaluate_gpt",
    example="""evaluate_gpt \\
    model=results/kd/checkpoints/kd.nemo data=test.jsonl output=results/kd/evaluation \\
    evaluate.answer_field=answer evaluate.checker=math evaluate.max_new_tokens=256 \\
    trainer.devices=8 model.tensor_model_parallel_size=2""",
)


def main() -> None:
    run(COMMAND)


if __name__ == "__main__":
    main()
