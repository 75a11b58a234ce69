"""Deployments, a file each: `get_config() -> RuntimeConfig`, loaded by `millrace COMMAND --config=NAME`."""
