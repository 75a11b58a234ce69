"""Models by name: `org/name` at a revision, fetched through huggingface_hub into its cache.

First the small files, then exactly the weights that they name: no pickle, no code, no second copy in another format.
Where the hub is, which token it takes and where the cache lies is huggingface_hub's business (HF_ENDPOINT, HF_TOKEN,
HF_HOME, HF_HUB_OFFLINE); what is in the cache is used when the hub cannot be reached.
"""

import fnmatch
import re
from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, TOKENIZER_FILES, WEIGHTS_FILE, read_weight_map
from .json_files import read_object
from .store_format import MANIFEST_FILE, PARAMS_FOLDER

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SMALL_FILES = (CONFIG_FILE, GENERATION_FILE, INDEX_FILE, MANIFEST_FILE, *TOKENIZER_FILES)


def download(
    name: str, revision: str | None = None, *, cache_dir: Path | None = None, endpoint: str | None = None
) -> Path:
    """The local snapshot of the hub's model `org/name`, fetched if it is not in the cache.

    `revision` is a branch, tag or commit, by default the hub's "main". `cache_dir` and `endpoint` override
    huggingface_hub's own settings.

    Raises:
      CheckpointError: neither the hub nor the cache has the model, or it has no weights that can be loaded.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"expected org/name, as on the Hugging Face hub; got {name!r}. Check the spelling.")
    small = _fetch(name, revision, _SMALL_FILES, cache_dir, endpoint)
    if not (small / CONFIG_FILE).exists():
        raise CheckpointError(f"{name}: expected a model; the repository has no config.json. Is it a language model?")
    weights = _weight_patterns(small)
    # The snapshot's folder is named by its commit: a branch that moves meanwhile cannot mix two commits.
    path = _fetch(name, small.name, (*_SMALL_FILES, *weights), cache_dir, endpoint)
    found = [file.relative_to(path).as_posix() for file in path.rglob("*")]
    if not any(fnmatch.filter(found, pattern) for pattern in weights):
        raise CheckpointError(
            f"{name}: expected weights as safetensors or as a Millrace store; the repository has none. Weights in "
            "other formats, pickles above all, are never fetched: choose another repository or revision."
        )
    return path


def _weight_patterns(snapshot: Path) -> tuple[str, ...]:
    """The files that hold the weights, by what the small files say."""
    if (snapshot / MANIFEST_FILE).exists():
        files = read_object(snapshot / MANIFEST_FILE).get("files")
        return (f"{PARAMS_FOLDER}/*", *(files if isinstance(files, dict) else ()))
    if (snapshot / INDEX_FILE).exists():
        return tuple(sorted(set(read_weight_map(snapshot.resolve()).values())))
    return (WEIGHTS_FILE,)


def _fetch(
    name: str, revision: str | None, patterns: tuple[str, ...], cache_dir: Path | None, endpoint: str | None
) -> Path:
    """The snapshot's folder, once the files that match are in it."""
    # Imported here: start-up from a local directory does not need an HTTP client.
    import huggingface_hub
    from huggingface_hub import errors

    at = f"{name} at revision {revision or 'main'}"
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, cache_dir=cache_dir, endpoint=endpoint, allow_patterns=list(patterns)
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{at}: access is granted by its owners; ask on its page, then set HF_TOKEN.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{at}: the hub has no such model. Check the name; if it is private, set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{at}: the model has no such revision. Name a branch, tag or commit of it.") from error
    except Exception as error:  # the client's transport, and what it raises, changes between versions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{at}: cannot be fetched, and is not in the cache or not whole ({reason}). Check the network, or name a "
            "local directory."
        ) from error
    return Path(folder)
