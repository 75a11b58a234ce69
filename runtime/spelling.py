"""How errors spell things: the nearest known name of an unknown one, and any value in a few characters."""

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


def shown(value: object) -> str:
    """The value as an error message shows it: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an integer of more than 4300 digits has no repr, and a user's type may have a broken one
        text = f"a huge or unprintable {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
