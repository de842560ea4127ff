"""Console command for checkpoints."""

from pathlib import Path

from nemo_kd.cli.run import Command, check_model, check_writable, run
from nemo_kd.config.convert import ConvertCheckpointConfig, check_output


def check(config: ConvertCheckpointConfig) -> None:
    """Refuse paths that are not there, must not be replaced or cannot be written."""
    check_model("input_path", config.input_path)
    output = Path(config.output_path).absolute()
    check_output(output, Path(config.input_path).absolute(), config.overwrite)
    check_writable("output_path", output.parent)


COMMAND = Command(
    name="convert_checkpoint",
    summary="converts a Hugging Face folder to a .nemo archive and back",
    config_class=ConvertCheckpointConfig,
    check=check,
    function="nemo_kd.convert:convert",
    example="""convert_checkpoint input_path=Qwen3-0.6B/ output_path=qwen3.nemo
convert_checkpoint input_path=qwen3.nemo output_path=Qwen3-0.6B-back/""",
)


def main() -> None:
    run(COMMAND)


if __name__ == "__main__":
    main()
