"""The console command `evaluate_gpt` as a file; runs from a checkout without installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_kd.cli.evaluate_gpt import main

if __name__ == "__main__":
    main()
