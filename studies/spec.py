"""A study as data: `studies/specs/NAME.yaml` says its question, settings, variants, tables, verdict and picture.

`docs/studies.md` describes the form. This module imports no torch: the command line reads specs before threads are set.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nirvana.errors import InputError

DIRECTORY = Path(__file__).parent / "specs"
_BEST = "fisher+least_squares"
"""What `best` stands for among ways."""


@dataclass(frozen=True)
class Setting:
    """What a user may change of a study: `--name VALUE` or `-S name=VALUE`."""

    name: str
    default: Any
    help: str = ""
    quick: Any = None
    """With `--quick`; None: the default."""
    kind: str = "number"
    """`number`, `count` (whole, above 0), `name` or `way` (a method, maybe with `+bias` or `+least_squares`)."""
    below: float = 1.0
    """Numbers lie between 0 and this."""
    least: int = 1
    """Of a count."""
    choices: Sequence[str] = ()
    always: Sequence[Any] = ()
    """Takes part whatever is asked for."""
    ascending: bool = False
    """Whether the values are taken in ascending order."""

    @property
    def option(self) -> str:
        """The option's name."""
        return f"--{self.name.replace('_', '-')}"

    def read(self, text: str) -> Any:
        """Read a value: several, comma-separated, where the default is a list.

        Raises:
            InputError: If it is not of this kind.
        """
        parts = [part.strip() for part in text.split(",")]
        several = isinstance(self.default, list)
        values = [self._one(part, text) for part in (parts if several else [text.strip()])]
        return list(dict.fromkeys(values)) if several else values[0]

    def _one(self, part: str, text: str) -> Any:
        several, said = isinstance(self.default, list), f"got {text}; correct "
        if self.kind in ("name", "way"):
            value = _BEST if self.kind == "way" and part == "best" else part
            if not value or (self.choices and value not in self.choices):
                wanted = " or ".join(self.choices) or "a name"
                raise InputError(f"{self.option}: expected {wanted}, {said}it")
            return value
        if self.kind == "count":
            if not (part.isascii() and part.isdigit() and len(part) <= 9) or int(part) < self.least:
                wanted = f"whole numbers above {self.least - 1} such as 1,8,64" if several else "a whole number"
                at_least = "" if several else f" of at least {self.least}"
                raise InputError(f"{self.option}: expected {wanted}{at_least}, {said}{'them' if several else 'it'}")
            return int(part)
        try:
            number = float(part)
        except ValueError:
            number = float("nan")
        if not 0 < number < self.below:
            such = "numbers" if several else "a number"
            example = "0.2,0.4" if several else "0.4"
            raise InputError(
                f"{self.option}: expected {such} between 0 and {self.below:g} such as {example}, "
                f"{said}{'them' if several else 'it'}"
            )
        return number


@dataclass(frozen=True)
class Spec:
    """What `studies/specs/NAME.yaml` holds."""

    name: str
    question: str
    tables: Sequence[Mapping[str, Any]]
    picture: Mapping[str, Any]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    options: Sequence[str] = ()
    """What else the command line may say, of `flows.study.OPTIONS`."""
    needs: Sequence[str] = ("model", "texts")
    """Of `model`, `texts` and `corpus`, which DVC brings up to date unless they are given; or `documents` alone."""
    texts_of_corpus: bool = False
    """Whether a corpus that is given is where the texts come from."""
    judges_tokens: bool = True
    """Whether the evaluation text judges anything."""
    threads: int | None = None
    """None: params.yaml's, or those asked for."""
    measure: str = "studies.measure:rows"
    """The function that returns rows: `module:function`."""
    variants: Sequence[Mapping[str, Any]] = ()
    unreachable: str | None = None
    """Errors that hold these words leave a row with nothing but names; None: every error ends the study."""
    verdict: Sequence[Mapping[str, Any]] = ()
    series: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    def values(self, quick: bool, changed: Mapping[str, str]) -> dict[str, Any]:
        """Return the settings' values.

        Args:
            quick: Whether to take those that only show that it works.
            changed: By name, as text.

        Raises:
            InputError: If there is no such setting, or a value is not of its kind.
        """
        unknown = sorted(set(changed) - set(self.settings))
        if unknown:
            raise InputError(
                f"{self.name}: expected settings of {', '.join(self.settings)}, got {', '.join(unknown)}; correct them"
            )
        result = {}
        for name, setting in self.settings.items():
            value = setting.quick if quick and setting.quick is not None else setting.default
            value = setting.read(changed[name]) if name in changed else value
            result[name] = sorted({*value, *setting.always}) if setting.ascending else value
        return result

    def names(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what names each variant, in order; see `_expanded`."""
        return [names for each in self.variants for names in _expanded(each, values)]


def _expanded(entry: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every combination of what `each` lists: a setting's values, 0 … n − 1 of a count, or those spelled out."""
    loops = {}
    for name, of in entry.get("each", {}).items():
        given = values[of] if isinstance(of, str) else of
        loops[name] = range(given) if isinstance(given, int) else given if isinstance(given, list) else [given]
    fixed = {name: value for name, value in entry.items() if name != "each"}
    for combination in itertools.product(*loops.values()):
        names = fixed | dict(zip(loops, combination, strict=True))
        if "way" in names:
            method, _, compensation = names.pop("way").partition("+")
            names |= {"method": method, "compensation": compensation or "none"}
            names |= {"ratio": 0.0} if method == "dense" else {}
        yield names


def load_spec(name: str) -> Spec:
    """Read a study's spec.

    Raises:
        InputError: If there is no such study.
    """
    file = DIRECTORY / f"{name}.yaml"
    if name not in study_names():
        raise InputError(f"expected a study of {', '.join(study_names())}, got {name}; correct the name")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    settings = {key: Setting(key, **value) for key, value in content.pop("settings", {}).items()}
    return Spec(name, settings=settings, **content)


def study_names() -> list[str]:
    """Return every study's name."""
    return sorted(file.stem for file in DIRECTORY.glob("*.yaml"))


def resolve(name: str) -> Callable[..., Any]:
    """Return the function `module:function`."""
    module, function = name.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found
