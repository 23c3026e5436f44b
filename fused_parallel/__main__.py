"""`python -m fused_parallel` and `torchrun ... -m fused_parallel`: the command line."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
