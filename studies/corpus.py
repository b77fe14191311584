"""The text of studies that train their own models."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from studies.store import STUDIES
from tasks import fetch_corpus
from tasks.params import Params


def fetched_corpus(params: Params) -> Path:
    """Return the corpus of params.yaml, fetched as the pipeline does it, into the studies' own cache.

    Raises:
        InputError: If the source cannot be resolved or read.
    """
    stated = json.dumps(asdict(params.corpus), sort_keys=True)
    directory = STUDIES / "corpus" / hashlib.sha256(stated.encode()).hexdigest()[:16]
    if not (directory / "source.json").is_file():
        fetch_corpus.run(params, {}, {"corpus": directory})
    return directory
