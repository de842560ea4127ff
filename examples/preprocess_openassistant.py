"""The console command `preprocess_openassistant` as a file; runs from a checkout without installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_kd.cli.preprocess_openassistant import main

if __name__ == "__main__":
    main()
