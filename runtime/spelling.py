"""What to say about a name that nobody knows: the nearest known one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Half a sentence for the end of an error: the nearest known name, or all of them where none is near.

    `prefix` is what users write before the name, as -- before a flag's.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return f"the known ones are {', '.join(prefix + known for known in names)}"
