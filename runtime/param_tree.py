"""Parameter trees by path: a nested dict's leaves, named by their keys joined with "/"."""

from typing import Any

import jax


def flatten(tree: Any) -> tuple[dict[str, Any], jax.tree_util.PyTreeDef]:
    """Every leaf by its path, in the tree's order, and the definition that `jax.tree.unflatten` takes."""
    pairs, definition = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in pairs}, definition
