"""`python -m benchmarks.reliability.damage`: flip and cut files of a finished pipeline, run it, compare every byte.

Each case damages a copy of the finished checkout: a result in place, or an object of DVC's cache that the result then
has to come back from, or a file of DVC's own. The run has to end with the bytes of the undamaged one, or with one line
that names the file. Anything else is a result that damage made and nobody noticed.
"""

import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
import yaml

from benchmarks.reliability.checkout import copy_checkout, finish, make_checkout, output_files

Damage = Callable[[Path], None]

RESULTS = (
    "data/model/model.safetensors",
    "data/model/config.json",
    "data/model/tokenizer.json",
    "data/corpus/documents.jsonl",
    "data/candidates.safetensors",
    "data/heldout.safetensors",
    "data/compensation.safetensors",
    "data/evaluation/documents.jsonl",
    "artifacts/channel_saliency/candidate_000.safetensors",
    "artifacts/unit_saliency/candidate_001.safetensors",
    "artifacts/selection.json",
    "artifacts/plan.json",
    "artifacts/checkpoint/model.safetensors",
    "artifacts/checkpoint/config.json",
    "artifacts/checkpoint/tokenizer.json",
    "artifacts/recovered/model.safetensors",
    "reports/kl_scores.csv",
    "reports/divergence.json",
    "reports/evaluation.json",
    "reports/lm_eval_dense.json",
)
CACHED = (
    ("data/model", "model.safetensors"),
    ("data/corpus", "documents.jsonl"),
    ("data/candidates.safetensors", None),
    ("artifacts/channel_saliency", "candidate_000.safetensors"),
    ("artifacts/unit_saliency", "candidate_001.safetensors"),
    ("artifacts/plan.json", None),
    ("artifacts/checkpoint", "model.safetensors"),
    ("artifacts/recovered", "model.safetensors"),
    ("reports/evaluation.json", None),
)
DIRECTORIES = ("data/model", "artifacts/checkpoint")


def flip(file: Path, generator: random.Random) -> None:
    """Flip one bit in place, whatever the mode."""
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    _overwrite(file, bytes(content))


def cut(file: Path, generator: random.Random) -> None:
    """Cut a file off in place."""
    content = file.read_bytes()
    _overwrite(file, content[: generator.randrange(len(content))])


def _overwrite(file: Path, content: bytes) -> None:
    mode = file.stat().st_mode
    file.chmod(0o644)
    with file.open("r+b") as opened:
        opened.truncate()
        opened.write(content)
    file.chmod(mode)


def cached(path: Path, output: str, member: str | None = None) -> Path:
    """Return the object of DVC's cache that holds an output, or one file of it."""
    stages = yaml.safe_load((path / "dvc.lock").read_text(encoding="utf-8"))["stages"].values()
    md5 = next(out["md5"] for stage in stages for out in stage.get("outs", []) if out["path"] == output)
    cache = path / ".dvc/cache/files/md5"
    if member is not None:
        listed = json.loads((cache / md5[:2] / md5[2:]).read_bytes())
        md5 = next(each["md5"] for each in listed if each["relpath"] == member)
    return cache / md5[:2] / md5[2:]


def cases(generator: random.Random) -> Iterator[tuple[str, Damage]]:
    """Yield what is damaged, and how, each case drawn from the generator."""

    def in_place(damage: Callable[[Path, random.Random], None], name: str) -> Damage:
        return lambda path: damage(path / name, generator)

    def restored(damage: Callable[[Path, random.Random], None], output: str, member: str | None) -> Damage:
        def apply(path: Path) -> None:
            damage(cached(path, output, member), generator)
            remove(path / output)

        return apply

    for name in RESULTS:
        yield f"flip {name}", in_place(flip, name)
        yield f"cut {name}", in_place(cut, name)
    for output, member in CACHED:
        yield f"flip the cache's {output}" + (f"/{member}" if member else ""), restored(flip, output, member)
    for output in DIRECTORIES:
        yield f"flip the cache's listing of {output}", restored(flip, output, None)
    yield "edit through a hard link: artifacts/plan.json", lambda path: _linked(path, generator)
    for number in range(3):
        yield f"flip dvc.lock ({number + 1})", in_place(flip, "dvc.lock")
    yield "cut dvc.lock", in_place(cut, "dvc.lock")
    yield "empty dvc.lock", lambda path: _overwrite(path / "dvc.lock", b"")
    yield "cut .dvc/tmp/rwlock", lambda path: _replace(path / ".dvc/tmp/rwlock", b'{"write": {')
    yield "no text in .dvc/tmp/rwlock", lambda path: _replace(path / ".dvc/tmp/rwlock", b"\xff\xfe\x00")
    yield "flip DVC's run-cache, no dvc.lock", lambda path: _run_cache(path, generator)
    yield "cut DVC's run-cache, no dvc.lock", lambda path: _run_cache(path, generator, cut)
    yield "no text in .cache/steps/prune.json", lambda path: _replace(path / ".cache/steps/prune.json", b"\xff\x00")
    yield "flip .cache/verified.json", in_place(flip, ".cache/verified.json")


def _linked(path: Path, generator: random.Random) -> None:
    file, kept = path / "artifacts/plan.json", cached(path, "artifacts/plan.json")
    file.unlink()
    file.hardlink_to(kept)
    flip(file, generator)


def _run_cache(path: Path, generator: random.Random, damage: Callable[[Path, random.Random], None] = flip) -> None:
    for file in sorted((path / ".dvc/cache/runs").glob("*/*/*")):
        damage(file, generator)
    (path / "dvc.lock").unlink()


def _replace(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def remove(path: Path) -> None:
    """Remove a file or a directory."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def judge(finished: Path, path: Path, status: int, said: str) -> str:
    """Return what became of a damaged checkout: `made again`, `refused: ...` or `WRONG: ...`."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if status:
        return f"refused: {errors[0]}" if len(errors) == 1 and "Traceback" not in said else f"WRONG: {said[-300:]}"
    expected, found = output_files(finished), output_files(path)
    differing = [name for name in expected if found.get(name) != expected[name]] + sorted(found.keys() - expected)
    if differing:
        return f"WRONG: {', '.join(differing[:4])} differ"
    for object_ in (path / ".dvc/cache/files/md5").glob("*/*"):  # nothing damaged is kept where it could come back from
        name = (object_.parent.name + object_.name).removesuffix(".dir")
        if hashlib.md5(object_.read_bytes(), usedforsecurity=False).hexdigest() != name:
            return f"WRONG: {object_.relative_to(path)} is still damaged"
    warned = [line for line in said.splitlines() if line.startswith("WARNING ")]
    return f"made again ({'named' if warned else 'DVC asked again'})"


def main(
    seed: Annotated[int, typer.Option(help="Of the bits and cuts.")] = 0,
    every: Annotated[int, typer.Option(min=1, help="Try one case of so many.")] = 1,
) -> None:
    """Print a line a case and how many passed; the exit status is 1 unless all did."""
    generator = random.Random(seed)  # noqa: S311
    parent = Path(tempfile.mkdtemp(prefix="nirvana-damage-"))
    tried = passed = 0
    try:
        finished = make_checkout(parent)
        status, said = finish(finished)
        if status:
            raise RuntimeError(f"the undamaged run failed:\n{said}")
        for name, damage in list(cases(generator))[::every]:
            path = copy_checkout(finished, parent / "damaged")
            damage(path)
            outcome = judge(finished, path, *finish(path))
            tried += 1
            passed += not outcome.startswith("WRONG")
            sys.stdout.write(f"{tried:3d}  {name:60s} {outcome}\n")
            sys.stdout.flush()
    finally:
        shutil.rmtree(parent, ignore_errors=True)
    sys.stdout.write(f"{passed} of {tried}\n")
    raise typer.Exit(0 if passed == tried else 1)


if __name__ == "__main__":
    typer.run(main)
