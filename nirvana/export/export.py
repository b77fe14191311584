"""Pruned checkpoints as files that other tools load, each verified before it gets its name.

One module a format. What they share is here: the target is new or an earlier export, the files appear whole or not at
all, and they only appear after a fresh load of them has said what the dense model, masked by the plan, says.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nirvana.checkpoint.digests import write_digests
from nirvana.errors import InputError
from nirvana.export import gguf as export_gguf
from nirvana.export import hf as export_hf
from nirvana.export import padded as export_padded
from nirvana.export import uniform as export_uniform
from nirvana.export.parity import Parity, check, compare, masked_logits
from nirvana.export.parity_ids import parity_ids
from nirvana.export.source import Format, Options, Source, is_disk_full
from nirvana.files import atomic_directory, write_json
from nirvana.plan import PLAN_NAME, Plan

EXPORT_NAME = "nirvana_export.json"
FORMATS: dict[str, Format] = {
    "hf": export_hf.FORMAT,
    "uniform": export_uniform.FORMAT,
    "padded": export_padded.FORMAT,
    "gguf": export_gguf.FORMAT,
}
_NOT_COMPENSATED = "not compensated: other units stay than in the checkpoint, with the dense model's weights"
_RUNTIMES = ("torch", "transformers", "gguf", "xllamacpp")


@dataclass(frozen=True)
class Exported:
    """Where an export is, and how near it is to its reference."""

    directory: Path
    parity: Parity
    note: str | None = None
    """What it does not have of its checkpoint."""


def export_checkpoint(
    checkpoint: Path | str,
    to: str,
    model: Path | str,
    target: Path | str,
    *,
    options: Options | None = None,
    text: Path | str | None = None,
    ids: Path | str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Exported:
    """Write a pruned checkpoint in another form.

    Args:
        checkpoint: What `prune` wrote.
        to: One of `FORMATS`.
        model: The dense model it was cut from: the reference of the comparison.
        target: Directory that appears. An earlier export there is replaced, anything else is refused.
        options: What only some formats ask for.
        text: Text to compare on; a text of our own otherwise.
        ids: File of token ids to compare on, instead of text.
        on_stage: Called with what begins, for progress.

    Raises:
        InputError: If the format cannot hold this model, the inputs do not belong together, the target holds
            something else, the disk is too small, or the files do not say what the masked dense model says. Nothing
            is left under the target's name then.
    """
    if to not in FORMATS:
        raise InputError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}; choose one")
    options, form = options or Options(), FORMATS[to]
    directories = Path(checkpoint).resolve(), Path(model).resolve()
    final = Path(target).resolve()
    _check_target(final, directories)
    on_stage("reading")
    source = Source.open(*directories)
    form.prepare(source, options)
    tokens = parity_ids(source.checkpoint, source.dense, _path(text), _path(ids))
    try:
        with atomic_directory(final) as temporary:
            on_stage("writing")
            plan = form.write(source, options, temporary)
            on_stage("verifying")
            parity = _verify(source, form, options, temporary, plan, tokens)
            check(parity, to)
            form.finish(temporary, parity)
            plan.write(temporary / PLAN_NAME)
            note = None if plan.compensation == source.plan.compensation else _NOT_COMPENSATED
            write_json(temporary / EXPORT_NAME, _metadata(to, options, plan, parity, note))
            write_digests(temporary)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise InputError(
            f"{final}: the disk became full while the export was written ({error.strerror}); "
            "free some space and run again"
        ) from error
    return Exported(final, parity, note)


def _path(value: Path | str | None) -> Path | None:
    return None if value is None else Path(value)


def _check_target(target: Path, sources: tuple[Path, ...]) -> None:
    """Refuse to replace anything but an earlier export."""
    if any(target == source or target in source.parents for source in sources):
        raise InputError(
            f"{target}: expected a directory apart from the checkpoint and the dense model, got one of them or one "
            "above; choose another"
        )
    if target.exists() and not (target.is_dir() and ((target / EXPORT_NAME).is_file() or not any(target.iterdir()))):
        raise InputError(
            f"{target}: expected no such path, an empty directory or an earlier export, got something else; "
            "choose another directory or move that aside"
        )


def _verify(source: Source, form: Format, options: Options, directory: Path, plan: Plan, tokens: Any) -> Parity:
    """Compare the written files with the dense model masked by their plan."""
    length = (tokens[-1] if isinstance(tokens, tuple) else tokens).shape[-1]
    positions = form.positions(source, length)
    measured = form.measure(source, directory, tokens, positions)
    updates = None if plan.compensation is None else source.compensated()
    reference = masked_logits(source.model, plan.keep, tokens, positions, updates)
    return compare(
        reference.log_softmax(dim=1) if measured.quantity == "log-probabilities" else reference,
        measured.values,
        relative_tolerance=form.relative_tolerance(options),
        quantity=measured.quantity,
        runtime=measured.runtime,
        ids=tokens,
    )


def _metadata(to: str, options: Options, plan: Plan, parity: Parity, note: str | None) -> dict[str, object]:
    versions = {}
    for name in _RUNTIMES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    reference = f"the dense model masked by {PLAN_NAME}"
    if plan.compensation is not None:
        reference += ", with what compensation solved for taken from the checkpoint"
    return {
        **({} if note is None else {"note": note}),
        "schema_version": 1,
        "format": to,
        "weight_type": options.weight_type if to == "gguf" else None,
        "model": {"digest": plan.model_digest},
        "parity": asdict(parity) | {"reference": reference},
        "versions": versions,
    }
