"""Which checkpoint the steps after recovery judge: the pruned one, or what fine-tuning made of it.

`artifacts/recovered` always exists, because a step's dependencies are fixed; where nothing was to be recovered it holds
only a file that says so, and nothing is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nirvana.checkpoint.recovered import read_form
from nirvana.files import scratch_directory

SCRATCH = Path(".cache/scratch")  # not the system's: what a killed step leaves there, nobody removes


@contextmanager
def judged_checkpoint(checkpoint: Path, recovered: Path) -> Iterator[Path]:
    """Yield the directory of the checkpoint to judge.

    Args:
        checkpoint: What `prune` wrote.
        recovered: What `recover` wrote. An adapter alone is merged into a temporary copy.

    Raises:
        InputError: If `recovered` does not say what it holds, or its adapter is of another checkpoint.
    """
    form = read_form(recovered)
    if form == "adapter":
        from nirvana.adapter import Adapter, merge

        with scratch_directory(SCRATCH / "merged") as folder:
            merge(checkpoint, Adapter.load(recovered), folder)
            yield folder
    else:
        yield checkpoint if form == "none" else recovered
