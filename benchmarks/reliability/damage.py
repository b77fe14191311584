"""`python -m benchmarks.reliability.damage`: flip and cut files of a finished pipeline, run it, compare every byte.

Each case damages a copy of the finished checkout, in which DVC and we know every file already: a result in place (every
other with its time set back), or an object of DVC's cache that the result then has to come back from, or a file of
DVC's, MLflow's or Prefect's own. Some change a parameter too, so that what is damaged would be read. The run has to end
with the bytes of the undamaged one, or with one line that names the file. Anything else is a result that damage made
and nobody noticed.

Results are kept in .cache/reliability/damage.jsonl, so that a stopped run goes on where it was.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import yaml

from benchmarks.reliability.checkout import WORK, copy_checkout, environment, finish, prepared
from benchmarks.reliability.compare import (
    MEASURED,
    differing,
    measured_as_locked,
    output_files,
)
from benchmarks.reliability.results import Results, chosen
from tasks.registry import STEPS

Damage = Callable[[Path, random.Random], None]


@dataclass(frozen=True)
class Case:
    """One damage.

    Attributes:
        name: Says what is damaged, and how.
        damage: Does it.
        first: The first step of the run after it.
        until: The last.
        prefect: Whether that is the flow under Prefect.
        changed: Whether the pruning ratio changes too.
        alone: Whether it has a run of its own; else it may share one with damages to other files.
    """

    name: str
    damage: Damage
    first: str = STEPS[0].name
    until: str = STEPS[-1].name
    prefect: bool = False
    changed: bool = False
    alone: bool = True


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
    "reports/benchmark.json",
    "reports/report.html",
)
READ_BY_LATER = (
    "data/model/model.safetensors",
    "data/heldout.safetensors",
    "data/compensation.safetensors",
    "artifacts/unit_saliency/candidate_001.safetensors",
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
    """Flip one bit in place, whatever the mode; every other time the file's time is set back."""
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    times = file.stat()
    _overwrite(file, bytes(content))
    if generator.random() < 0.5:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut(file: Path, generator: random.Random) -> None:
    """Cut a file off in place."""
    content = file.read_bytes()
    _overwrite(file, content[: generator.randrange(len(content))])


def empty(file: Path, generator: random.Random) -> None:
    """Leave nothing of a file."""
    _overwrite(file, b"")


def garbage(file: Path, generator: random.Random) -> None:
    """Put what is no text and no database into a file's place."""
    _overwrite(file, b"\xff\xfe\x00" + generator.randbytes(max(600, file.stat().st_size) if file.exists() else 600))


def first_page(file: Path, generator: random.Random) -> None:
    """Flip sixteen bits in the first kilobyte, where SQLite has its header and its tables' list."""
    content = bytearray(file.read_bytes())
    for place in generator.sample(range(min(len(content), 1024)), 16):
        content[place] ^= 1 << generator.randrange(8)
    _overwrite(file, bytes(content))


def foreign(file: Path, generator: random.Random) -> None:
    """Put another program's database into a file's place."""
    file.unlink(missing_ok=True)
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE notes (text)")
        database.commit()


def _overwrite(file: Path, content: bytes) -> None:
    mode = file.stat().st_mode if file.exists() else 0o644
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
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


def cases() -> Iterator[Case]:
    """Yield what is damaged, and how."""
    for damage in (flip, cut):
        for name in RESULTS:
            yield Case(f"{damage.__name__} {name}", _in_place(damage, name), alone=False)
    for output, member in CACHED:
        yield Case(f"flip the cache's {output}" + (f"/{member}" if member else ""), _restored(flip, output, member))
    for output in DIRECTORIES:
        yield Case(f"flip the cache's listing of {output}", _restored(flip, output, None))
    yield Case("edit through a hard link: artifacts/plan.json", _linked)
    for name in READ_BY_LATER:
        yield Case(f"flip {name}, then another ratio", _in_place(flip, name), until="prune", changed=True)
    for number in range(3):
        yield Case(f"flip dvc.lock ({number + 1})", _in_place(flip, "dvc.lock"))
    for damage in (cut, empty, garbage):
        yield Case(f"{damage.__name__} dvc.lock", _in_place(damage, "dvc.lock"))
    for damage in (flip, cut):  # every step is computed again
        yield Case(f"{damage.__name__} DVC's run-cache, no dvc.lock", _run_cache(damage), until="sample_pool")
    yield Case("half a .dvc/tmp/rwlock", lambda path, _: _overwrite(path / ".dvc/tmp/rwlock", b'{"write": {'))
    for name in (".dvc/tmp/rwlock", ".dvc/tmp/lock", ".cache/steps/prune.json", ".cache/verified.json"):
        yield Case(f"garbage {name}", _in_place(garbage, name))
    yield Case("flip .cache/verified.json", _in_place(flip, ".cache/verified.json"))
    for damage in (flip, first_page, cut, empty, garbage, foreign):
        yield Case(f"{damage.__name__} DVC's database of hashes", _of_hashes(damage))
    yield Case("garbage reports/mlflow_run.json", _in_place(garbage, MEASURED[2]), first="record")
    for damage in (first_page, cut, empty, garbage, foreign):
        yield Case(f"{damage.__name__} mlflow.db", _in_place(damage, "mlflow.db"), first="record")
    for what in ("metric", "parameter", "tag"):
        yield Case(f"flip a {what} in mlflow.db", _of_value(what), first="record")
    for number in range(3):
        yield Case(f"flip mlflow.db ({number + 1})", _in_place(flip, "mlflow.db"), first="record")
    for damage in (flip, first_page, cut, garbage, foreign):
        yield Case(f"{damage.__name__} prefect.db", _in_place(damage, ".prefect/prefect.db"), prefect=True)


def _in_place(damage: Damage, name: str) -> Damage:
    return lambda path, generator: damage(path / name, generator)


def _restored(damage: Damage, output: str, member: str | None) -> Damage:
    def apply(path: Path, generator: random.Random) -> None:
        damage(cached(path, output, member), generator)
        remove(path / output)

    return apply


def _of_hashes(damage: Damage) -> Damage:
    def apply(path: Path, generator: random.Random) -> None:
        asked = "from flows.own_files import _state_directory; print(_state_directory())"
        place = Path(_in_checkout(path, asked).strip())
        for file in place.rglob("*.db"):
            damage(file, generator)
            for name in (f"{file.name}-wal", f"{file.name}-shm"):
                file.with_name(name).unlink(missing_ok=True)

    return apply


def _linked(path: Path, generator: random.Random) -> None:
    file, kept = path / "artifacts/plan.json", cached(path, "artifacts/plan.json")
    file.unlink()
    file.hardlink_to(kept)
    flip(file, generator)


def _run_cache(damage: Damage) -> Damage:
    def apply(path: Path, generator: random.Random) -> None:
        for file in sorted((path / ".dvc/cache/runs").glob("*/*/*")):
            damage(file, generator)
        (path / "dvc.lock").unlink()

    return apply


_STORED = {
    "metric": ("latest_metrics", "key = 'evaluation.token_perplexity'"),
    "parameter": ("params", "key = 'allocation.pruning_ratio'"),
    "tag": ("tags", "key = 'nirvana.experiment_digest'"),
}


def _of_value(what: str) -> Damage:
    return lambda path, generator: _flip_value(path, what)


def _flip_value(path: Path, what: str) -> None:
    """Change one stored value as a flipped bit would: SQLite has no checksums and does not notice."""
    table, where = _STORED[what]
    with closing(sqlite3.connect(path / "mlflow.db")) as database:
        changed = "value * 1.0625" if what == "metric" else "'8' || substr(value, 2)"
        done = database.execute(f"UPDATE {table} SET value = {changed} WHERE {where}")  # noqa: S608
        if done.rowcount < 1:
            raise RuntimeError(f"mlflow.db has no {what} where {where}")
        database.commit()


def remove(path: Path) -> None:
    """Remove a file or a directory."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def get_known(path: Path) -> None:
    """Have DVC and us hash every file of a copied checkout, as in one where nothing changed for long."""
    _in_checkout(
        path,
        "import flows.environment\n"
        "from dvc.repo import Repo\n"
        "from flows import own_files, verify\n"
        "from tasks.provenance.integrity import Ledger\n"
        "from tasks.registry import STEPS\n"
        "from pathlib import Path\n"
        "ledger = Ledger()\n"
        "[ledger.digest(out) for step in STEPS for out in verify.output_paths(step.name) if out.exists()]\n"
        "[ledger.md5(Path(file)) for file in sorted(verify.objects().glob('*/*'))]\n"
        "ledger.save()\n"
        "own_files.drop_damaged_runs(print)\n"
        "with Repo('.') as repo: repo.status()\n",
    )


def _in_checkout(path: Path, code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=path, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def change_ratio(path: Path) -> None:
    """Ask for another pruning ratio."""
    file = path / "params.yaml"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["allocation"]["pruning_ratio"] = 0.4
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")


def judge(finished: Path, path: Path, status: int, said: str, until: str = STEPS[-1].name) -> str:
    """Return what became of a damaged checkout: `made again`, `refused: ...` or `WRONG: ...`."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if "Traceback" in said:
        return f"WRONG: {said[-300:]}"
    if status:
        return f"refused: {errors[0]}" if len(errors) == 1 else f"WRONG: {said[-300:]}"
    expected, found = output_files(finished, until), output_files(path, until)
    wrong = [name for name in expected if found.get(name) != expected[name]] + sorted(found.keys() - expected)
    if wrong:
        return f"WRONG: {', '.join(wrong[:4])} differ"
    for object_ in (path / ".dvc/cache/files/md5").glob("*/*"):  # nothing damaged is kept where it could come back from
        name = (object_.parent.name + object_.name).removesuffix(".dir")
        if hashlib.md5(object_.read_bytes(), usedforsecurity=False).hexdigest() != name:
            return f"WRONG: {object_.relative_to(path)} is still damaged"
    warned = [line for line in said.splitlines() if re.search(r"\b(WARNING|warning:)", line)]
    return f"made again ({'named: ' + warned[0][:160] if warned else 'DVC asked again'})"


def judge_whole(finished: Path, path: Path, status: int, said: str, until: str) -> str:
    """Judge also what is measured, dvc.lock and the MLflow run; a database that was named may stay as it is."""
    outcome = judge(finished, path, status, said, until)
    if not outcome.startswith("made again") or until != STEPS[-1].name:
        return outcome
    if wrong := measured_as_locked(path):
        return f"WRONG: {', '.join(wrong)} differ from dvc.lock"
    if "not recorded: MLflow" in said:
        wrong = [each for each in differing(finished, path, "report") if not each.startswith(MEASURED[2])]
        return outcome if not wrong else f"WRONG: {', '.join(wrong)}"
    wrong = differing(finished, path)
    return f"WRONG: {', '.join(wrong[:4])}" if wrong else outcome


def together(every: list[Case], size: int) -> Iterator[list[Case]]:
    """Yield the cases in the runs that they share: those of one kind, each of another file."""
    shared: list[Case] = []
    for case in every:
        if case.alone or len(shared) == size or (shared and case.name.split()[0] != shared[0].name.split()[0]):
            if shared:
                yield shared
            shared = []
        if case.alone:
            yield [case]
        else:
            shared.append(case)
    if shared:
        yield shared


def try_cases(tried: list[Case], reference: Path, finished: Path, path: Path, seed: int = 0) -> dict[str, str]:
    """Damage a copy of the finished checkout, run it and return what became of each damage.

    Args:
        tried: What to do to one copy. Of several files, each has to be named.
        reference: What the run should end in.
        finished: What is damaged.
        path: Where.
        seed: Of bits and cuts.
    """
    copy_checkout(finished, path)
    if tried[0].first == STEPS[0].name:
        get_known(path)
    for case in tried:
        case.damage(path, random.Random(f"{seed} {case.name}"))  # noqa: S311
    first = tried[0]
    if first.changed:
        change_ratio(path)
    status, said = finish(path, first.until, first.prefect, first.first)
    outcome = judge_whole(reference, path, status, said, first.until)
    if len(tried) == 1:
        return {first.name: outcome}
    return {case.name: _named(case.name.split()[1], outcome, said) for case in tried}


def _named(file: str, outcome: str, said: str) -> str:
    """Return what became of one of several damages: all of them come right, and each is named, or none counts."""
    if not outcome.startswith("made again"):
        return f"WRONG, together with others: {outcome}"
    found = [line for line in said.splitlines() if file in line and "WARNING" in line]
    return f"made again (named: {found[0][:160]})" if found else f"WRONG: {file} was made again, but nobody said so"


def main(
    seed: Annotated[int, typer.Option(help="Of the bits and cuts.")] = 0,
    only: Annotated[str | None, typer.Option(help="Only cases whose names hold one of these, commas between.")] = None,
    start_at: Annotated[str | None, typer.Option("--from", help="From the first case whose name holds this.")] = None,
    work: Annotated[Path, typer.Option(help="Where the checkouts and the results are kept.")] = WORK,
    afresh: Annotated[bool, typer.Option(help="Forget earlier results.")] = False,
    size: Annotated[int, typer.Option("--together", min=1, help="Results damaged in place that share a run.")] = 4,
) -> None:
    """Print a line a case and how many passed; the exit status is 1 unless all did."""
    work = work.resolve()
    results, finished = Results(work / "damage.jsonl", afresh), prepared(work).finished
    every = {case.name: case for case in cases()}
    names = chosen(list(every), only, start_at)
    waiting = [every[name] for name in names if not results.is_known(name)]
    for tried in together(waiting, size):
        reference = start_from = finished
        if tried[0].changed:
            reference = _other_ratio(finished, work / "another-ratio")
        if tried[0].prefect:
            start_from = _shown(finished, work / "shown")
        results.start()
        outcomes = try_cases(tried, reference, start_from, work / "damaged", seed)
        for name, outcome in outcomes.items():
            results.add(name, not outcome.startswith("WRONG"), outcome, shared=len(tried))
        shutil.rmtree(work / "damaged", ignore_errors=True)
    raise typer.Exit(results.close(names))


def _other_ratio(finished: Path, path: Path) -> Path:
    """Return what the finished checkout becomes with another ratio."""
    if not path.exists():
        change_ratio(copy_checkout(finished, path))
        status, said = finish(path, "prune")
        if status:
            raise RuntimeError(f"the undamaged run failed:\n{said}")
    return path


def _shown(finished: Path, path: Path) -> Path:
    """Return the finished checkout after an unchanged run under Prefect."""
    if not path.exists():
        status, said = finish(copy_checkout(finished, path), prefect=True)
        if status:
            raise RuntimeError(f"the undamaged run failed:\n{said}")
    return path


if __name__ == "__main__":
    typer.run(main)
