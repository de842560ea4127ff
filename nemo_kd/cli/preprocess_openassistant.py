"""Console command that turns OpenAssistant's message trees into records of NeMo's chat format."""

from __future__ import annotations

from pathlib import Path

from nemo_kd.cli.options import OptionParser
from nemo_kd.cli.run import check_writable
from nemo_kd.config import ConfigError
from nemo_kd.files import print_table
from nemo_kd.run.endings import errors_end_the_process

SUMMARY = (
    "Writes train.jsonl (95% of the trees) and val.jsonl, as NeMo-Aligner's "
    "preprocess_openassistant_data.py does, byte for byte."
)
REPOSITORY = "OpenAssistant/oasst1"
TREES = "2023-04-12_oasst_all.trees.jsonl.gz"


def main() -> None:
    arguments = parser().parse_args()
    with errors_end_the_process():
        from nemo_kd.tools.openassistant import preprocess_openassistant

        folder = arguments.output_directory.expanduser()
        check_writable("--output_directory", folder)
        folder.mkdir(parents=True, exist_ok=True)
        source = arguments.input or _trees(folder)
        counts = preprocess_openassistant(source, folder)
        rows = [(name, f"{count:,}") for name, count in counts.items()]
        print_table([*rows, ("files", f"{folder}/train.jsonl, val.jsonl")])


def parser() -> OptionParser:
    result = OptionParser(prog="preprocess_openassistant", description=SUMMARY)
    result.add_argument(
        "-dir",
        "--output_directory",
        "--output-directory",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="for train.jsonl and val.jsonl",
    )
    result.add_argument(
        "--input",
        metavar="FILE",
        help=f"message trees, .jsonl or .jsonl.gz (default: {TREES} in the folder, downloaded from "
        f"{REPOSITORY} if it is not there)",
    )
    return result


def _trees(folder: Path) -> str:
    """Return the path of the published trees in a folder; download them if they are not there."""
    if not (folder / TREES).exists():
        import huggingface_hub

        try:
            huggingface_hub.hf_hub_download(
                REPOSITORY, TREES, repo_type="dataset", local_dir=folder
            )
        except OSError as error:
            raise ConfigError(
                f"--input: {TREES} of {REPOSITORY} cannot be downloaded "
                f"({type(error).__name__}); give the file that another machine has downloaded"
            ) from error
    return str(folder / TREES)


if __name__ == "__main__":
    main()
