"""Print a platform's flags on one line: python -m apt_jax.parallel.flags gpu"""

import sys

from apt_jax.errors import UserError
from apt_jax.parallel.flags import environment_value

try:
    if len(sys.argv) != 2:
        raise UserError("give one platform: gpu or tpu")
    print(environment_value(sys.argv[1]))
except UserError as error:
    print(f"flags: {error}", file=sys.stderr)
    sys.exit(2)
