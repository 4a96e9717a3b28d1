"""`python -m apt_jax` is `apt-jax`."""

import sys

from apt_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
