"""Console command for checkpoints."""

from nemo_kd.cli.run import Command, run
from nemo_kd.config.convert import ConvertCheckpointConfig

COMMAND = Command(
    name="convert_checkpoint",
    summary="converts a Hugging Face folder to a .nemo archive and back",
    config_class=ConvertCheckpointConfig,
    function="nemo_kd.convert:convert",
    example="""convert_checkpoint input_path=Qwen3-0.6B/ output_path=qwen3.nemo
convert_checkpoint input_path=qwen3.nemo output_path=Qwen3-0.6B-back/""",
)


def main() -> None:
    run(COMMAND)


if __name__ == "__main__":
    main()
