"""The demo: see `python -m infer.demo --help`."""

import sys

from fasteagle_jax.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
