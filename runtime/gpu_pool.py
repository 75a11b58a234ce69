"""How much of each GPU's memory XLA takes for arrays, which jax lets nothing but the environment say."""

import os

from ..sharding.targets import POOL_SHARE

VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older name


def claim_memory() -> None:
    """Let XLA take POOL_SHARE of each GPU's memory, where it would take three quarters of it.

    Before jax looks for devices: afterwards, or where the environment names a share, this changes nothing.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = str(POOL_SHARE)
