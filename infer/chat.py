"""Talk with a target: see fasteagle_jax/commands/chat.py, or --help."""

import sys

from fasteagle_jax.commands.chat import main

if __name__ == "__main__":
    sys.exit(main())
