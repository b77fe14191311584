"""Mutated params.yaml, config.json, tokenizer files, plans and corpora: one line or a usable result, never a traceback.

`python -m benchmarks.reliability.mutations --inputs 5000` prints, for each kind, how many inputs were tried, how many
were taken, and what went wrong: exceptions that are no InputError, and inputs that took over 10 s of CPU. An input is
made from its kind and a seed that hypothesis draws, so that `--kind config --seed 123` tries one again.
"""

import copy
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nirvana.errors import InputError

CPU_SECONDS = 10
ROOT = Path(__file__).resolve().parents[2]
SHARES = {"params": 0.46, "plan": 0.26, "config": 0.14, "tokenizer": 0.07, "corpus": 0.07}
"""Of the inputs, the kinds: most where an input is quick to try."""

_ODD_NUMBERS = [0, -1, 1, 2, 3, 2**31, 2**63, 10**19, 10**400, 1e308, 1e-320, -0.5, 0.5, float("nan"), float("inf")]
_ODD_TEXTS = ["", " ", "a\nb", "\x1b[2J", "\ud800", "x" * 100_000, "../x", "/etc/passwd", "٣", "(", "(a+)+$"]
_ODD: list[Any] = [*_ODD_NUMBERS, *_ODD_TEXTS, None, True, False, [], {}, [None], {"a": {"b": []}}, [[[[[]]]]], "cloze"]
_ODD_BYTES = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b"NaN",
    b"1e999",
    b"\t",
    b"- ",
]
_ODD_BYTES += [
    b"&a [*a]",
    b"!!binary x",
    b"5: 1\n",
    b"? ",
    b"\r",
    b"'",
    b'"',
    b"\xed\xa0\x80",
    b"{",
    b"}",
    b": ",
    b"\n\n",
]


class _TooLong(BaseException):
    """Not an Exception: nothing may catch it."""


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    tried: int = 0
    taken: int = 0
    tracebacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    slowest: float = 0.0


def mutated(value: Any, chance: random.Random) -> Any:
    """Return a JSON value with one to three places lost, doubled, renamed or replaced."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return chance.choice(_ODD)
        holder, key = chance.choice(places)
        action = chance.choice(["replace", "replace", "replace", "lose", "double", "rename"])
        if action == "lose":
            del holder[key]
        elif action == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif action == "rename" and isinstance(holder, dict):
            holder[f"{key}{chance.choice('sx_')}"] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(chance.choice(_ODD))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def mangled(content: bytes, chance: random.Random) -> bytes:
    """Return bytes cut off, overwritten, filled in or with one bit flipped."""
    at = chance.randint(0, len(content))
    odd = chance.choice(_ODD_BYTES)
    flipped = bytearray(content)
    if flipped:
        flipped[at % len(flipped)] ^= 1 << chance.randint(0, 7)
    return chance.choice(
        [content[:at], content[:at] + odd + content[at:], content[:at] + odd + content[at + len(odd) :], bytes(flipped)]
    )


def mutated_json(content: bytes, chance: random.Random) -> bytes:
    """Return a JSON file of wrong values, or of wrong bytes."""
    if chance.random() < 0.3:
        return mangled(content, chance)
    return json.dumps(mutated(json.loads(content), chance)).encode()


# -- kinds ---------------------------------------------------------------------------------------------------------


class Kinds:
    """Each method makes one input of its kind from a chance, and reads it as the product would."""

    def __init__(self, home: Path):
        sys.path.insert(0, str(ROOT / "tests"))  # the makers of tiny models
        from tiny import family_configs, random_keep, t5_configs, tiny_corpus, tiny_llama

        from nirvana.allocation import Allocation
        from nirvana.plan import Plan
        from nirvana.walk import Stack
        from nirvana.weights import model_digest
        from tasks.params import load_params

        self.home = home
        self.params_text = (ROOT / "params.yaml").read_bytes()
        self.params = load_params(ROOT / "params.yaml")
        model = tiny_llama(home / "llama")
        sites = Stack.open(model).architecture.sites()
        origin: dict[str, Any] = {"model_digest": model_digest(model), "calibration_digest": "sha256:none"}
        asked = Allocation(0.4, gamma=3.36, round_to=8)
        Plan.build(sites, random_keep(sites), model_type="llama", **origin, allocation=asked).write(home / "plan.json")
        self.plan_text = (home / "plan.json").read_bytes()
        self.configs = [
            json.dumps(config.to_dict(), default=str).encode()
            for config in [*family_configs().values(), *t5_configs().values()]
        ]
        self.tokenizer = {file.name: file.read_bytes() for file in model.glob("tokenizer*.json")}
        (home / "model").mkdir()
        (home / "tokenizer").mkdir()
        (home / "tokenizer/config.json").write_bytes((model / "config.json").read_bytes())
        self.texts = [file.read_text() for file in sorted(tiny_corpus(home / "texts", 12, 30).iterdir())]

    def params_kind(self, chance: random.Random) -> None:
        """Bytes of the file, or its values written as YAML."""
        from ruamel.yaml import YAML

        from tasks.params import flatten, load_params

        file = self.home / "params.yaml"
        if chance.random() < 0.5:
            file.write_bytes(mangled(self.params_text, chance))
        else:
            values = YAML(typ="safe").load(self.params_text.decode())
            text = json.dumps(mutated(values, chance)).replace("Infinity", ".inf").replace("NaN", ".nan")
            file.write_bytes(text.encode())
        flatten(load_params(file))

    def plan_kind(self, chance: random.Random) -> None:
        """A plan, read, summed up and written again."""
        from nirvana.plan import Plan
        from nirvana.plan_summary import summarise

        file = self.home / "mutated_plan.json"
        file.write_bytes(mutated_json(self.plan_text, chance))
        plan = Plan.read(file)
        json.dumps(summarise(plan), allow_nan=False)
        plan.write(file)

    def config_kind(self, chance: random.Random) -> None:
        """A configuration of any family, described and checked against the parameters."""
        from tasks.checks.model import check_model

        (self.home / "model/config.json").write_bytes(mutated_json(chance.choice(self.configs), chance))
        check_model(self.params, self.home / "model")

    def tokenizer_kind(self, chance: random.Random) -> None:
        """A tokenizer's files, loaded and used on a text."""
        from tasks.corpus.documents import Document
        from tasks.sample_pool import Encoder

        changed = chance.choice(sorted(self.tokenizer))
        for name, content in self.tokenizer.items():
            (self.home / "tokenizer" / name).write_bytes(mutated_json(content, chance) if name == changed else content)
        encoder = Encoder.of_model(self.home / "tokenizer", add_bos=False)
        encoder(Document("a", self.texts[0]))

    def corpus_kind(self, chance: random.Random) -> None:
        """Files of text in each format, read, split, and made into items."""
        from tasks.corpus.text_files import expand, read_files
        from tasks.evaluation.cloze import cloze_items
        from tasks.evaluation.continuation import continuation_items

        folder = Path(tempfile.mkdtemp(dir=self.home))
        suffix = chance.choice([".txt", ".md", ".jsonl", ".json", ".csv"])
        for number in range(chance.randint(1, 3)):
            (folder / f"{number}{suffix}").write_bytes(self._corpus_file(suffix, chance))
        documents = list(read_files(expand(folder), "text"))
        for make in (cloze_items, continuation_items):
            with suppress(InputError):
                make(documents, 2)

    def _corpus_file(self, suffix: str, chance: random.Random) -> bytes:
        rows: Any = [{"id": number, "text": text} for number, text in enumerate(self.texts[:4])]
        if suffix in (".txt", ".md"):
            return mangled(self.texts[0].encode(), chance)
        if suffix == ".csv":
            return mangled(b"id,text\n" + b"".join(f'{row["id"]},"{row["text"]}"\n'.encode() for row in rows), chance)
        if chance.random() < 0.6:
            rows = mutated(rows, chance)
        if suffix == ".jsonl" and isinstance(rows, list):
            content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        else:
            content = json.dumps(rows).encode()
        return mangled(content, chance) if chance.random() < 0.4 else content


# -- running them --------------------------------------------------------------------------------------------------


def attempt(read: Callable[[random.Random], None], kind: str, tally: Tally, seed: int) -> None:
    """Try one input and note what became of it."""
    tally.tried += 1
    start = time.process_time()
    try:
        with _alarm():
            read(random.Random(f"{kind} {seed}"))  # noqa: S311
        tally.taken += 1
    except InputError as error:
        if "\n" in str(error) or not str(error) or len(str(error)) > 5000:
            tally.tracebacks.append(f"{kind} {seed}: no single line: {str(error)[:200]!r}")
    except _TooLong:
        tally.hangs.append(f"{kind} {seed}")
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic in Rust is no Exception
        tally.tracebacks.append(f"{kind} {seed}: {traceback.format_exc()[-1500:]}")
    taken = time.process_time() - start
    tally.slowest = max(tally.slowest, taken)
    if taken > CPU_SECONDS and f"{kind} {seed}" not in tally.hangs:
        tally.hangs.append(f"{kind} {seed}")


@contextmanager
def _alarm() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _hypothesis(one: Callable[[int], None], count: int) -> None:
    """Call a function with so many seeds."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    quietly = list(HealthCheck)

    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=quietly)
    @given(seed=st.integers(0, 2**62))
    def with_seed(seed: int) -> None:
        one(seed)

    with_seed()


def try_all(inputs: int, kinds: tuple[str, ...] = tuple(SHARES)) -> dict[str, Tally]:
    """Try so many inputs, shared among the kinds, and return what became of them."""
    whole = sum(SHARES[kind] for kind in kinds)
    tallies = {kind: Tally() for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="nirvana-mutations-") as folder, _quietly(Path(folder)):
        home = Kinds(Path(folder))
        for kind, tally in tallies.items():
            read = getattr(home, f"{kind}_kind")
            count = max(1, round(inputs * SHARES[kind] / whole))

            _hypothesis(partial(attempt, read, kind, tally), count)
    return tallies


@contextmanager
def _quietly(folder: Path) -> Iterator[None]:
    """Work in the folder, with bounded memory, and let libraries log nowhere."""
    before, level = Path.cwd(), logging.root.manager.disable
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    logging.disable(logging.CRITICAL)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (32 << 30 if hard == resource.RLIM_INFINITY else min(32 << 30, hard), hard))
    try:
        yield
    finally:
        os.chdir(before)
        logging.disable(level)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main(
    inputs: Annotated[int, typer.Option(min=1, help="How many inputs to try.")] = 5000,
    kind: Annotated[str | None, typer.Option(help=f"Only this kind: {', '.join(SHARES)}.")] = None,
    seed: Annotated[int | None, typer.Option(help="Try one input of the kind again.")] = None,
) -> None:
    """Try mutated inputs; the exit status is 1 if one of them ended in a traceback or took too long."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if kind is not None and kind not in SHARES:
        raise typer.BadParameter(f"expected one of {', '.join(SHARES)}, got {kind!r}")
    if kind is not None and seed is not None:
        tally = Tally()
        with tempfile.TemporaryDirectory() as folder, _quietly(Path(folder)):
            attempt(getattr(Kinds(Path(folder)), f"{kind}_kind"), kind, tally, seed)
        tallies = {kind: tally}
    else:
        tallies = try_all(inputs, (kind,) if kind else tuple(SHARES))
    for name, tally in tallies.items():
        typer.echo(
            f"{name:10} {tally.tried:5} tried  {tally.taken:5} taken  {len(tally.tracebacks)} tracebacks  "
            f"{len(tally.hangs)} over {CPU_SECONDS} s of CPU  slowest {tally.slowest:.1f} s"
        )
    bad = [line for tally in tallies.values() for line in [*tally.tracebacks, *tally.hangs]]
    typer.echo(f"{'all':10} {sum(tally.tried for tally in tallies.values()):5} tried")
    for line in bad[:20]:
        typer.echo(line)
    sys.exit(bool(bad))


if __name__ == "__main__":
    typer.run(main)
