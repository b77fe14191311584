"""The one reader of params.yaml: a frozen, validated dataclass a section.

Every key must be present and no other may be: an experiment is what its params.yaml says, not what a default
says behind its back. Only `method.preset` and `saliency.method` speak for others: they fill in keys that are null
(`nirvana.presets`). A field's `description` is what the error message calls "expected".
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from nirvana import allocation
from nirvana.errors import InputError
from nirvana.methods.registry import METHODS
from nirvana.presets import PRESETS, resolve_presets
from tasks.sources.source import parse_source

PARAMS_FILE = Path("params.yaml")
RUNTIME = "runtime"

_STRICT = ConfigDict(extra="forbid")
_LARGEST_FILE = 256 << 10  # bytes, forty times the file that we ship: YAML is read slowly
_DEEPEST = 8  # levels of brackets; a section's list is the second
_MOST_VALUES = 10_000  # in all, however often an alias repeats them
_LONGEST_TEXT = 1000  # characters
_LONGEST_PATH, _LONGEST_NAME = 4096, 255  # bytes: PATH_MAX and NAME_MAX of Linux

# A check's ValueError is what its message says after the key: expected, got, remedy.


def _check_text(text: str) -> str:
    """Refuse what no file name, database or JSON file can hold: half a character, NUL."""
    if any("\ud800" <= character <= "\udfff" or character == "\0" for character in text):
        raise ValueError(f"expected a text of whole characters, got {_given(text)}; correct it")
    return text


def _check_source(source: str) -> str:
    _check_text(source)
    sizes = [len(part.encode()) for part in source.split("/")]
    if sum(sizes) + len(sizes) > _LONGEST_PATH or max(sizes) > _LONGEST_NAME + len("path:"):
        raise ValueError(
            f"expected a path of at most {_LONGEST_PATH} bytes whose names have at most {_LONGEST_NAME}, which is what "
            f"systems allow, got {_given(source)}; shorten it"
        )
    parse_source(source)  # an InputError is a ValueError
    return source


def _check_sources(sources: str | tuple[str, ...]) -> str | tuple[str, ...]:
    each = (sources,) if isinstance(sources, str) else sources
    if not each or len(set(each)) < len(each):
        raise ValueError(f"expected one source or more, each once, got {list(each)}; correct the list")
    for source in each:
        _check_source(source)
    return sources


def _check_regex(pattern: str) -> str:
    _check_text(pattern)
    if len(pattern) > _LONGEST_TEXT:
        raise ValueError(f"expected at most {_LONGEST_TEXT} characters, got {len(pattern)}; shorten it")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"expected a regular expression, got {_given(pattern)} ({error}); correct it") from None
    return pattern


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Source = Annotated[
    str, AfterValidator(_check_source), Field(strict=True, description="a source such as hf:, path: or pypi:")
]
Sources = Annotated[
    Annotated[str, Field(strict=True)] | tuple[Annotated[str, Field(strict=True)], ...],
    BeforeValidator(_to_tuple),
    AfterValidator(_check_sources),
    Field(description="a source such as hf:, path: or pypi:, or a list of such"),
]
Regex = Annotated[str, AfterValidator(_check_regex), Field(strict=True, description="a regular expression or null")]
Text = Annotated[
    str,
    AfterValidator(_check_text),
    Field(
        strict=True, min_length=1, max_length=_LONGEST_TEXT, description=f"a text of 1 to {_LONGEST_TEXT} characters"
    ),
]


def _whole(least: int, most: int, unit: str = "") -> Any:
    """Return the bounds of a whole number; why each is there stands beside its type."""
    return Field(strict=True, ge=least, le=most, description=f"a whole number from {least} to {most}{unit}")


def _one_of(names: Collection[str], more: str = "") -> Any:
    """Return what allows these names only."""
    listed = [*names]
    return Field(
        strict=True, pattern=f"^({'|'.join(listed)})$", description=f"{', '.join(listed[:-1])} or {listed[-1]}{more}"
    )


# What no machine or model can use. Bounds that depend on the model or the corpus are tasks/check.py's.
_LONGEST_CONTEXT = 2**20  # tokens: the longest context that a model of our families was published with
_MOST_AT_ONCE = 2**16  # sequences in a forward: with one token each they would still be a matrix of gigabytes
Seed = Annotated[int, _whole(0, 2**63 - 1)]  # what random generators, databases and JSON readers take alike
Tokens = Annotated[int, _whole(1, _LONGEST_CONTEXT, " tokens")]
Window = Annotated[int, _whole(2, _LONGEST_CONTEXT, " tokens")]
AllTokens = Annotated[int, _whole(1, 10**12, " tokens")]  # days of computing on any machine
NoOrAllTokens = Annotated[int, _whole(0, 10**12, " tokens")]
AtOnce = Annotated[int, _whole(1, _MOST_AT_ONCE)]
Sequences = Annotated[
    int, _whole(1, 10**6)
]  # more than a corpus of max_documents at its default gives, and still a list in memory
NoOrSequences = Annotated[int, _whole(0, 10**6)]
Items = Annotated[int, _whole(1, 10**7)]  # a list in memory
Documents = Annotated[int, _whole(1, 10**9)]  # rows of the largest public corpora
Candidates = Annotated[int, _whole(1, 10**4)]  # a file, a row of the report and a column of its figure each
Draws = Annotated[int, _whole(1, 10**3)]  # as many backward passes a sequence
Repeats = Annotated[int, _whole(1, 10**4)]
NoOrRepeats = Annotated[int, _whole(0, 10**4)]
Rank = Annotated[int, _whole(1, 2**16)]  # wider than any matrix that an adapter is put on
Multiple = Annotated[int, _whole(1, 2**20)]  # more neurons than a layer has
Threads = Annotated[int, _whole(1, 1024)]  # more than a machine has cores: each waits for the others at every operation
Workers = Annotated[
    Annotated[int, Field(strict=True, ge=1, le=1024)] | Literal["auto"],
    Field(description="a whole number from 1 to 1024, or auto"),  # processes of 0.3 GB and more
]
Ratio = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False, description="a number in [0, 1)")]
# within these bounds products and quotients of such numbers stay finite in float32; the plan's own limit is the same
Positive = Annotated[
    float,
    Field(strict=True, ge=1e-12, le=1e9, allow_inf_nan=False, description="a finite number above 0, from 1e-12 to 1e9"),
]
LearningRate = Annotated[
    float,
    Field(strict=True, ge=1e-12, le=10, allow_inf_nan=False, description="a finite number above 0, from 1e-12 to 10"),
]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False, description="a number in [0, 1]")]
Flag = Annotated[bool, Field(strict=True, description="true or false")]
Address = Annotated[
    str,
    Field(
        strict=True,
        pattern=r"^(tcp|tls)://(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$",
        description="the address of a Dask scheduler such as tcp://HOST:8786, or null",
    ),
]
_Layers = Annotated[int, Field(strict=True, ge=0, le=1024)]
FirstAndLast = Annotated[
    tuple[_Layers, _Layers],
    BeforeValidator(_to_tuple),
    Field(description="two whole numbers from 0 to 1024 such as [3, 1], or null for the method's"),
]
Names = Annotated[
    tuple[Text, ...],
    BeforeValidator(_to_tuple),
    Field(max_length=1000, description="a list of lm-eval task names, at most 1000"),
]


@dataclass(frozen=True, config=_STRICT)
class Model:
    """Which model is pruned."""

    source: Source
    trust_remote_code: Flag
    tokenizer: Annotated[Literal["file", "class"] | None, Field(description="file, class or null")] = None


@dataclass(frozen=True, config=_STRICT)
class Corpus:
    """Which text calibrates and judges it."""

    source: Sources
    config: Text | None
    split: Text
    text_field: Text
    max_documents: Documents
    strip: Regex | None

    @property
    def sources(self) -> tuple[str, ...]:
        """Each source of text, in order; the other keys hold for all of them."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass(frozen=True, config=_STRICT)
class Method:
    """What fills in the keys that are null."""

    preset: Annotated[str, _one_of(PRESETS)]


@dataclass(frozen=True, config=_STRICT)
class Calibration:
    """The pool of candidate calibration sets and the held-out batch that chooses one; lengths in tokens.

    `repeated` is the share of sequences that say a thing twice.
    """

    seed: Seed
    pool_size: Candidates
    sequences: Sequences
    sequence_length: Window
    add_bos: Annotated[Flag | None, Field(description="true, false, or null: as the tokenizer itself puts it")]
    heldout_sequences: Sequences
    heldout_length: Window
    averaged: Candidates
    repeated: Share


@dataclass(frozen=True, config=_STRICT)
class Saliency:
    """How units are scored; `microbatch` in sequences, `draws` in label sequences a calibration sequence."""

    method: Annotated[str, _one_of(METHODS, ", or null for the preset's")]
    microbatch: AtOnce
    draws: Draws


@dataclass(frozen=True, config=_STRICT)
class Allocation(allocation.Allocation):
    """How many units leave, and where; every key has to be given, or null for what the method has."""

    pruning_ratio: Ratio
    ranking: Annotated[allocation.Ranking, Field(description="modules, joint or layers, or null for the method's")] = (
        Field()
    )
    gamma: Positive = Field()
    attention_factor: Positive = Field()
    round_to: Multiple = Field()
    rule: Annotated[allocation.Rule, Field(description="exact or published")] = Field()
    scope: Annotated[allocation.Scope, Field(description="global or uniform")] = Field()
    protected_layers: FirstAndLast = Field()


@dataclass(frozen=True, config=_STRICT)
class Compensation:
    """How the kept weights make up for the removed ones; `sequence_length` in tokens."""

    method: Annotated[
        Literal["none", "least_squares"], Field(description="none or least_squares, or null for the preset's")
    ]
    ridge: Positive
    sequences: Sequences
    self_generated: Annotated[
        NoOrSequences, Field(description="a whole number from 0 to 1000000, or null for the preset's")
    ]
    sequence_length: Window


@dataclass(frozen=True, config=_STRICT)
class Recovery:
    """How the pruned model is fine-tuned, if it is (`tokens` above 0); lengths in tokens, `batch` in sequences."""

    tokens: NoOrAllTokens
    seed: Seed
    rank: Rank
    alpha: Positive
    learning_rate: LearningRate
    warmup: Share
    distillation: Share
    sequence_length: Window
    batch: AtOnce
    curve_every: AllTokens
    merge: Flag

    @model_validator(mode="after")
    def _a_step_fits(self) -> "Recovery":
        if 0 < self.tokens < self.batch * self.sequence_length:
            raise ValueError(
                f"expected tokens of one batch ({self.batch} x {self.sequence_length}) or more, or 0, got "
                f"{self.tokens}; raise it or lower batch or sequence_length"
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class Evaluation:
    """What the dense and the pruned model are asked; lengths in tokens."""

    window: Window
    perplexity_tokens: AllTokens
    cloze_items: Items
    continuation_items: Items
    tasks: Names
    limit: Annotated[Items | None, Field(description="a whole number from 1 to 10000000, or null")]
    batch_size: AtOnce

    @model_validator(mode="after")
    def _window_fits(self) -> "Evaluation":
        if self.perplexity_tokens < self.window:
            raise ValueError(
                f"expected perplexity_tokens of one window ({self.window}) or more, got {self.perplexity_tokens}; "
                "raise it or shorten the window"
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class Benchmark:
    """How speed is measured; lengths in tokens."""

    batch_size: AtOnce
    prompt_length: Tokens
    decode_tokens: Tokens
    repeats: Repeats
    warmup: NoOrRepeats


@dataclass(frozen=True, config=_STRICT)
class Compute:
    """What may change the last bits of a result."""

    threads: Threads


@dataclass(frozen=True, config=_STRICT)
class Runtime:
    """What may not change a result."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="auto, cpu or cuda")]
    execution: Annotated[Literal["auto", "resident", "streamed"], Field(description="auto, resident or streamed")]
    memory: Annotated[Literal["auto", "fast", "lean"], Field(description="auto, fast or lean")]
    runner: Annotated[Literal["processes", "dask"], Field(description="processes or dask")]
    workers: Workers
    scheduler: Address | None

    @model_validator(mode="after")
    def _no_contradiction(self) -> "Runtime":
        if self.execution == "streamed" and self.memory == "fast":
            raise ValueError(
                "expected memory auto or lean with execution streamed, got fast, which needs every layer's weights at "
                "once; change memory to lean or execution to auto"
            )
        if self.scheduler and self.runner != "dask":
            raise ValueError(
                f"expected runner dask with a scheduler, got {self.runner}, which stays on this machine; "
                "change runner to dask or scheduler to null"
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class Params:
    """All of params.yaml."""

    method: Method
    model: Model
    corpus: Corpus
    calibration: Calibration
    saliency: Saliency
    allocation: Allocation
    compensation: Compensation
    recovery: Recovery
    evaluation: Evaluation
    benchmark: Benchmark
    compute: Compute
    runtime: Runtime

    @model_validator(mode="after")
    def _sections_agree(self) -> "Params":
        own = METHODS[self.saliency.method].ranking
        if self.allocation.ranking == "joint" != own:
            raise ValueError(
                f"allocation.ranking: expected {own} with saliency.method {self.saliency.method}, whose values "
                f"cannot be compared between attention and MLP, got joint; change ranking to {own} or method to fisher"
            )
        if self.calibration.averaged > self.calibration.pool_size:
            raise ValueError(
                f"calibration.averaged: expected at most pool_size ({self.calibration.pool_size}), got "
                f"{self.calibration.averaged}; lower it or raise pool_size"
            )
        return self


SECTIONS: dict[str, type] = {field.name: field.type for field in fields(Params)}  # type: ignore[misc]


def load_params(path: Path | str = PARAMS_FILE) -> Params:
    """Read and check a params.yaml.

    Raises:
        InputError: If the file is missing or not YAML, a key is unknown, missing or given twice, or a value is
            not what its field describes.
    """
    path = Path(path)
    return parse_params(_read_yaml(path), path.name)


def parse_params(values: Any, name: str = PARAMS_FILE.name) -> Params:
    """Check the content of a params.yaml; `name` is the file that errors point to."""
    _check_form(values, name)
    if not isinstance(values, Mapping):
        raise InputError(
            f"{name}: expected the sections {', '.join(SECTIONS)}, got {_given(values)}; write them as in params.yaml"
        )
    try:
        return TypeAdapter(Params).validate_python(_resolved(values))
    except ValidationError as error:
        raise InputError(f"{name}: {_explain(error)}") from None


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what preset and method say; anything odd is left for the validation to name."""
    sections = {name: keys for name, keys in values.items() if isinstance(keys, Mapping)}
    flat = resolve_presets({f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()})
    return {**values, **{name: {key: flat[f"{name}.{key}"] for key in keys} for name, keys in sections.items()}}


def _read_yaml(path: Path) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import YAMLError

    text = _read_text(path)
    try:
        return YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        found = re.search(r'duplicate key "([^"]*)"', str(error))
        where = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        key = found.group(1) if found else "a key"
        raise InputError(f"{path.name}: expected each key once, got {key} twice{where}; keep one") from None
    except RecursionError:
        raise InputError(f"{path.name}: expected at most {_DEEPEST} levels of brackets, got more; correct it") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0] or "unreadable text"
        raise InputError(f"{path.name}: expected YAML, got a mistake{where} ({problem}); correct it") from None
    except Exception as error:  # its constructors raise what Python does: for a date of month 13, a key that is a list
        raise InputError(
            f"{path.name}: expected YAML of texts, numbers and lists, got a value that cannot be read "
            f"({type(error).__name__}: {_shortened(str(error))}); correct it"
        ) from None


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: expected parameters, found no file; run from the checkout") from None
    except OSError as error:
        raise InputError(f"{path}: expected parameters, got {error.strerror}; check path and rights") from None
    if len(content) > _LARGEST_FILE:
        raise InputError(f"{path.name}: expected at most {_LARGEST_FILE >> 10} KiB, got more; shorten it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path.name}: expected YAML in UTF-8, got other bytes from byte {error.start + 1} on; save it as UTF-8"
        ) from None


def _check_form(values: Any, name: str) -> None:
    """Refuse keys that are no text, and values nested or repeated without end, before anything walks through them.

    Raises:
        InputError: If there are any.
    """
    waiting, seen = [(values, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST_VALUES:
            raise InputError(
                f"{name}: expected at most {_DEEPEST} levels and {_MOST_VALUES} values, got more; write the sections "
                "out as in params.yaml"
            )
        if isinstance(value, Mapping):
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise InputError(f"{name}: expected keys that are text, got the key {_given(odd[0])}; correct it")
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += [(inner, depth + 1) for inner in value]


def _explain(error: ValidationError) -> str:
    """One line for the first thing wrong: the key, what it expects, what it got, what to do."""
    # an unknown key and the missing key it was meant to be are one mistake: name the unknown one
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "unexpected_keyword_argument")
    problem = problems[0]
    # a union adds its branches to the location ("limit", "constrained-int"): keep the keys only
    location = [part for part in problem["loc"] if isinstance(part, int | str)][:2]
    if not location:  # a check between sections names its keys itself
        return str(problem["ctx"]["error"])
    section, key = str(location[0]), str(location[1]) if len(location) > 1 else None
    dotted = ".".join(map(str, location))
    if problem["type"] == "unexpected_keyword_argument":
        known = [field.name for field in fields(SECTIONS[section])] if key else list(SECTIONS)
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        remedy = f"did you mean {close[0]}?" if close else "correct it"
        return f"{_shortened(dotted)}: unknown key, expected one of {', '.join(known)}; {remedy}"
    if problem["type"] in ("missing", "missing_argument") and len(problem["loc"]) <= 2:
        return f"{dotted}: expected {_expectation(section, key)}, the key is missing; add it"
    if problem["type"] == "value_error":
        return f"{dotted}: {problem['ctx']['error']}"
    return f"{dotted}: expected {_expectation(section, key)}, got {_given(problem['input'])}; edit params.yaml"


def _expectation(section: str, key: str | None) -> str:
    if section not in SECTIONS or key is None:
        return f"a section with {', '.join(field.name for field in fields(SECTIONS[section]))}"
    hint = TypeAdapter(SECTIONS[section]).json_schema()["properties"][key]
    options = [hint, *hint.get("anyOf", [])]
    described = next((option["description"] for option in options if "description" in option), "another value")
    nullable = any(option.get("type") == "null" for option in hint.get("anyOf", []))
    return described if not nullable or "null" in described else f"{described}, or null"


def _given(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        return _shortened(repr(value))
    except ValueError:  # Python writes out no number of more than 4300 digits
        return f"{type(value).__name__} of very many digits"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def flatten(params: Params) -> dict[str, Any]:
    """Return every value by its dotted key: {"allocation.gamma": 3.36, ...}."""
    return {f"{section}.{key}": value for section, keys in asdict(params).items() for key, value in keys.items()}  # type: ignore[call-overload]


class UndeclaredParameterError(LookupError):
    """A step read a parameter that DVC does not know it depends on."""


class _View:
    """Read-only access to some attributes of a dataclass."""

    def __init__(self, name: str, values: Mapping[str, Any], declared: Collection[str]) -> None:
        self.__dict__.update(values)
        self.__dict__["_name"] = name
        self.__dict__["_declared"] = sorted(declared)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        raise UndeclaredParameterError(
            f"{self._name} reads `{key}`, which it does not declare "
            f"(declared: {', '.join(self._declared) or 'none'}); "
            "add it to its `params` in tasks/registry.py and run `python -m tasks --render`"
        )

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError("parameters are frozen")


def restrict(params: Params, keys: Collection[str], name: str = "the step") -> Any:
    """Return a view of `params` on the declared keys only.

    Args:
        params: All parameters.
        keys: Sections ("calibration") and single keys ("evaluation.window"). `runtime` is always readable.
        name: Who reads, for the error.

    Raises:
        UndeclaredParameterError: On access to a key that is not declared.
    """
    sections: dict[str, Any] = {RUNTIME: params.runtime}
    for key in keys:
        section, _, field = key.partition(".")
        whole = getattr(params, section)
        if field:
            chosen = {k.partition(".")[2] for k in keys if k.startswith(section + ".")}
            view = _View(f"{name}: {section}", {k: getattr(whole, k) for k in chosen}, chosen)
            sections.setdefault(section, view)
        else:
            sections[section] = whole
    return _View(name, sections, keys)
