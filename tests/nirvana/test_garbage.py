"""Garbage in every file that a command reads: one error line, never a crash, a hang, or a file opened elsewhere.

Each property goes through the library and through the command line. What is read without complaint must be usable.
"""

import contextlib
import copy
import json
import os
import resource
import shutil
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import with_compensation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import random_ids, random_keep, save_family, save_t5
from typer.testing import CliRunner

import nirvana.weights
from nirvana.allocation import Allocation
from nirvana.architectures.registry import read_config
from nirvana.calibration import read_ids
from nirvana.cli import app
from nirvana.errors import InputError
from nirvana.plan import Plan
from nirvana.plan_diff import diff_plans
from nirvana.plan_summary import summarise
from nirvana.walk import Stack
from nirvana.weights import INDEX_NAME, WEIGHTS_NAME, WeightFiles, model_digest, weight_files

SECONDS, BYTES = 5, 2 << 30
"""What one input may take: far above the milliseconds it needs, far below what a hang or a blown-up number costs."""
RULES = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
IDS = "ids.safetensors"
FAMILIES = ("llama", "gemma3_text", "qwen3_moe", "t5-relu-tied")


# -- guards --------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception: nothing may catch it."""


_opened: list[str] | None = None


def _note_open(event, arguments):
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_note_open)  # stays: Python has no way to take one back


def _stop(number, frame):
    raise Hang


@contextlib.contextmanager
def guarded(folder, monkeypatch=pytest.MonkeyPatch):
    """Bound time and memory, and allow files to be opened below `folder` and where Python and its libraries are."""
    global _opened
    allowed = [folder, sys.prefix, sys.base_prefix, "/dev", "/proc", "/sys", "/etc", Path(nirvana.__file__).parent]
    allowed = [os.path.realpath(place) for place in allowed]
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _stop)
    with monkeypatch.context() as patched:
        real = nirvana.weights.safe_open
        # it opens files in Rust, where no audit hook looks
        patched.setattr(nirvana.weights, "safe_open", lambda path, **rest: _noted(real, path, **rest))
        _opened = []
        resource.setrlimit(resource.RLIMIT_AS, (virtual + BYTES, most))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            signal.signal(signal.SIGALRM, before)
            opened, _opened = _opened, None
    outside = [path for path in opened if not any(path == place or path.startswith(f"{place}/") for place in allowed)]
    assert not outside
    assert torch.get_default_dtype() == torch.float32  # a configuration's dtype is set while a skeleton is built


def _noted(real, path, **rest):
    _note_open("open", (path,))
    return real(path, **rest)


def said_by(call):
    """Return the one line of the InputError that a call ends in, or None where it succeeds."""
    try:
        call()
    except InputError as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < 3000
        return line
    return None


def run(*arguments, statuses=(0, 2)):
    """Run a command; whatever it is given it does its work or says one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code in statuses, (result.stderr, result.exception)
    if result.exit_code == 2:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and result.stdout == ""
        assert "free memory" not in result.stderr and all(c.isprintable() for c in result.stderr[:-1])
    else:
        assert result.stderr == ""
    return result.exit_code


def test_the_guards_see_what_they_shall_see(tmp_path):
    with pytest.raises(AssertionError), guarded(tmp_path / "inside"):
        (tmp_path / "secret").write_text("")
    with pytest.raises(AssertionError), guarded(tmp_path / "inside"), contextlib.suppress(Exception):
        nirvana.weights.safe_open(tmp_path / "secret", framework="pt")
    with pytest.raises(MemoryError), guarded(tmp_path):
        bytearray(2 * BYTES)


# -- material ------------------------------------------------------------------------------------------------------

HUGE = [2**31, 10**9, 10**12, 2**63, 10**19, 10**400, 1e308, -1, -(2**63), -1e308]
RANGES = ["", "0-999999999999", "1-0", "0,0", "0-1,1-2", "-1", "0-", "0;1", "1e3", "٣", "0-0", "0," * 10_000 + "1"]
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from(HUGE),
    st.sampled_from([float("nan"), float("inf"), 0.0, -0.5, 0.5, 1.0]),
    st.sampled_from([*RANGES, "../secret", "/etc/passwd", "a\nb", "\x1b[2J", "\ud800", "x" * 100_000]),
    st.text(max_size=8),
    st.recursive(
        st.one_of(st.none(), st.integers(), st.text(max_size=3)),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
        max_leaves=6,
    ),
)


def places(value, path=()):
    """Yield the path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def broken(draw, good):
    """Return a JSON value with one to three places lost, doubled or replaced."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value)) or [()]))
        if not path:
            return draw(JUNK)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "lose", "double"]))
        if action == "lose":
            del holder[path[-1]]
        elif action == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        else:
            holder[path[-1]] = draw(JUNK)
    return value


@st.composite
def mangled(draw, text):
    """Return the bytes of a JSON file cut off, overwritten, nested without end, or not text at all."""
    data = text.encode()
    at = draw(st.integers(0, len(data)))
    filling = draw(
        st.one_of(
            st.binary(max_size=8),
            st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"\x00", b"9" * 5000, b"NaN", b"1e999"]),
        )
    )
    return draw(st.sampled_from([data[:at], data[:at] + filling, data[:at] + filling + data[at + len(filling) :]]))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model of each family, a plan for the first, and a secret beside them."""
    folder = tmp_path_factory.mktemp("garbage")
    for name in FAMILIES:
        (save_t5 if name.startswith("t5") else save_family)(name, folder / "home" / name)
    model = folder / "home" / "llama"
    sites = Stack.open(model).architecture.sites()
    origin = {"model_digest": model_digest(model), "model_type": "llama", "calibration_digest": "sha256:none"}
    asked = Allocation(0.4, gamma=3.36, round_to=8)
    Plan.build(sites, random_keep(sites), **origin, allocation=asked).write(folder / "home" / "good.json")
    plan = with_compensation(Plan.read(folder / "home" / "good.json"), random_ids(2, 4), folder / "home" / IDS)
    plan.write(folder / "home" / "compensated.json")
    shutil.copyfile(model / WEIGHTS_NAME, folder / "secret.safetensors")
    run("plan", "apply", folder / "home" / "good.json", model, "--to", folder / "home" / "warm")  # imports
    assert apply_compensated(folder / "home", folder / "home" / "compensated.json") == 0
    shutil.rmtree(folder / "home" / "pruned")
    return folder / "home"


def apply_compensated(home, plan):
    arguments = (home / "llama", "--to", home / "pruned", "--force", "--calibration", home / IDS)
    return run("plan", "apply", plan, *arguments)


# -- plans ---------------------------------------------------------------------------------------------------------


def check_plan(home, content):
    """A plan is refused, or it is whole: it can be compared, summed up, written, and says the same when read again."""
    path, target = home / "plan.json", home / "pruned"
    path.write_bytes(content)
    with guarded(home):
        refused = said_by(lambda: Plan.read(path))
        commands = (["show"], ["show", "--json"], ["validate"], ["validate", "--model", home / "llama"])
        codes = [run("plan", verb, path, *rest) for verb, *rest in commands]
        codes.append(run("plan", "diff", path, home / "good.json", statuses=(0, 1, 2)))
        applied = run("plan", "apply", path, home / "llama", "--to", target, "--force")
    if refused:
        assert set(codes) == {2} and applied == 2
    else:
        assert 2 not in codes[:3] and codes[4] != 2
        plan = Plan.read(path)
        plan.write(home / "again.json")
        assert diff_plans(plan, Plan.read(home / "again.json")).equal
        assert json.dumps(summarise(plan), allow_nan=False)
    assert target.exists() == (applied == 0)
    shutil.rmtree(target, ignore_errors=True)
    assert not [file for file in home.iterdir() if file.suffix == ".tmp"]


@RULES
@given(data=st.data())
def test_plans_with_wrong_values(home, data):
    value = data.draw(broken(json.loads((home / "good.json").read_text())))
    check_plan(home, json.dumps(value).encode())


@settings(RULES, max_examples=30)
@given(data=st.data())
def test_compensations_with_wrong_values(home, data):
    """A plan with an odd compensation is refused, or it has none, or one that can be written and read again."""
    value = json.loads((home / "compensated.json").read_text())
    value["compensation"] = data.draw(st.one_of(broken(value["compensation"]), JUNK))
    (home / "plan.json").write_text(json.dumps(value))
    with guarded(home):
        refused = said_by(lambda: Plan.read(home / "plan.json"))
        codes = [run("plan", verb, home / "plan.json") for verb in ("show", "validate")]
        codes.append(run("plan", "diff", home / "plan.json", home / "compensated.json", statuses=(0, 1, 2)))
        applied = apply_compensated(home, home / "plan.json")
    assert (2 in codes) == (refused is not None)
    if refused is None:
        plan = Plan.read(home / "plan.json")
        plan.write(home / "again.json")
        assert Plan.read(home / "again.json").compensation == plan.compensation
    assert applied == 2 or refused is None
    assert (home / "pruned").exists() == (applied == 0)
    shutil.rmtree(home / "pruned", ignore_errors=True)


def check_ids(home, content):
    """Ids are refused, or they are those of the plan."""
    with replaced(home / IDS, content):
        with guarded(home):
            refused = said_by(lambda: read_ids(home / IDS))
            code = apply_compensated(home, home / "compensated.json")
        assert code == 2 or (refused is None and torch.equal(read_ids(home / IDS)[0], random_ids(2, 4)))
    assert (home / "pruned").exists() == (code == 0)
    shutil.rmtree(home / "pruned", ignore_errors=True)
    assert not list(home.glob(".pruned.*"))


@settings(RULES, max_examples=30)
@given(data=st.data())
def test_calibration_files_of_garbage(home, data):
    file = (home / IDS).read_bytes()
    length = struct.unpack("<Q", file[:8])[0]
    header, values = file[8 : 8 + length], file[8 + length :]
    wrong = st.one_of(
        broken(json.loads(header)).map(lambda value: json.dumps(value).encode()), mangled(header.decode())
    )
    rebuilt = wrong.map(lambda text: struct.pack("<Q", len(text)) + text + values)
    check_ids(home, data.draw(st.one_of(rebuilt, st.integers(0, len(file) - 1).map(lambda size: file[:size]))))


def test_calibration_files_with_an_odd_header(home):
    for content in HEADERS:
        check_ids(home, content)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "F8_E4M3", "BOOL", "U64", "C64", "F6_E2M3", "BF16"])
def test_calibration_files_of_other_types(home, dtype):
    """Some of them torch has no name for."""
    size = {"F4": 4, "F6_E2M3": 6, "U64": 64, "C64": 64, "BF16": 16}.get(dtype, 8)
    header = json.dumps({"input_ids": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}}).encode()
    check_ids(home, struct.pack("<Q", len(header)) + header + bytes(size))


@RULES
@given(data=st.data())
def test_plans_of_wrong_bytes(home, data):
    check_plan(home, data.draw(mangled((home / "good.json").read_text())))


@settings(RULES, max_examples=100)
@given(keep=st.one_of(st.sampled_from(RANGES), st.from_regex(r"[0-9,-]{1,12}", fullmatch=True)), at=st.integers(0, 5))
def test_plans_with_wrong_ranges(home, keep, at):
    value = json.loads((home / "good.json").read_text())
    value["sites"][at]["keep"] = keep
    (home / "plan.json").write_text(json.dumps(value))
    with guarded(home):
        refused = said_by(lambda: Plan.read(home / "plan.json"))
    assert refused is None or "keep: expected" in refused or "achieved_ratio" in refused


def test_what_is_no_file(home):
    with guarded(home):
        for odd in (home, home / "llama" / "none.json", "/dev/zero", "/dev/null", home / "llama" / WEIGHTS_NAME):
            assert run("plan", "show", odd) == 2
            assert run("plan", "apply", home / "good.json", odd, "--to", home / "pruned") == 2


# -- configurations ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced(path, content):
    """Replace a file's bytes for a while."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def check_config(home, model, content):
    """A configuration is refused, or it describes the weights that are there: then surgery works."""
    with replaced(home / model / "config.json", content):
        with guarded(home):
            unreadable = said_by(lambda: read_config(home / model))
            refused = said_by(lambda: Stack.open(home / model))
            code = run("plan", "apply", home / "good.json", home / model, "--to", home / "pruned", "--force")
        assert refused or not unreadable
        assert code == 2 or model == "llama"
        if refused:
            assert code == 2
        assert (home / "pruned").exists() == (code == 0)
        shutil.rmtree(home / "pruned", ignore_errors=True)


@pytest.mark.parametrize("model", FAMILIES)
@settings(RULES, max_examples=20)
@given(data=st.data())
def test_configurations_with_wrong_values(home, model, data):
    value = data.draw(broken(json.loads((home / model / "config.json").read_text())))
    check_config(home, model, json.dumps(value).encode())


@settings(RULES, max_examples=30)
@given(data=st.data())
def test_configurations_of_wrong_bytes(home, data):
    check_config(home, "llama", data.draw(mangled((home / "llama" / "config.json").read_text())))


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("huge", [501, 10**9, 10**400, 1e308])
def test_counts_that_no_machine_can_hold(home, model, huge):
    """Layers, experts and labels are lists in configuration classes, sizes are shapes: neither may be built first."""
    good = json.loads((home / model / "config.json").read_text())
    sizes = [
        key for key in good if key.startswith(("num_", "d_", "vocab", "hidden_size", "intermediate", "moe_", "head"))
    ]
    for key in [*sizes, "num_labels", "max_window_layers"]:
        with replaced(home / model / "config.json", json.dumps({**good, key: huge}).encode()), guarded(home):
            refused = said_by(lambda: Stack.open(home / model))
        assert refused or key in ("num_labels", "max_window_layers", "num_experts_per_tok"), key


@pytest.mark.parametrize(
    "extra",
    [
        {"auto_map": {"AutoConfig": "../evil.Config", "AutoModelForCausalLM": "evil.Model"}},
        {"configuration_files": ["config.1.0.0.json", "config.1.0/../../../secret.json"]},
        {"_name_or_path": "../secret"},
        {"transformers_weights": "../secret.safetensors"},
        {"per_layer_config": {"0": {"num_attention_heads": 10**9}}},
        {"base_config": "/etc/passwd", "generation_config": "../secret", "tokenizer_class": "../secret"},
    ],
)
def test_keys_that_name_other_files(home, extra):
    good = json.loads((home / "llama" / "config.json").read_text())
    check_config(home, "llama", json.dumps(good | extra).encode())


# -- weights -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(home):
    """The first model in two shards, so that only the index says where its tensors are."""
    folder = home / "sharded"
    folder.mkdir()
    shutil.copyfile(home / "llama" / "config.json", folder / "config.json")
    from safetensors.torch import load_file, save_file

    tensors = load_file(home / "llama" / WEIGHTS_NAME)
    files = {f"model-0000{n + 1}-of-00002.safetensors": sorted(tensors)[n::2] for n in range(2)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


def check_weights(home, model):
    with guarded(home):
        listed = said_by(lambda: weight_files(model))
        refused = said_by(lambda: Stack.open(model))
        code = run("plan", "apply", home / "good.json", model, "--to", home / "pruned", "--force")
        run("plan", "validate", home / "good.json", "--model", model)
    assert refused or not listed
    assert (code == 2) == (refused is not None) and (home / "pruned").exists() == (code == 0)
    shutil.rmtree(home / "pruned", ignore_errors=True)
    return listed


NAMES = ["../secret.safetensors", "..", ".", "", "/etc/passwd", "a/b.safetensors", "..\\secret.safetensors", "C:x", "~"]
NAMES += ["config.json", "x\0.safetensors", "x" * 300 + ".safetensors", "é.safetensors", "model.bin", INDEX_NAME]


@pytest.mark.parametrize("name", NAMES)
def test_shards_elsewhere(home, sharded, name):
    secret = str(home.parent / "secret.safetensors")
    for odd in (name, name.replace("/etc/passwd", secret)):
        index = json.loads((sharded / INDEX_NAME).read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = odd
        with replaced(sharded / INDEX_NAME, json.dumps(index).encode()):
            assert "expected file names beside it" in check_weights(home, sharded)


@RULES
@given(data=st.data())
def test_indices_of_garbage(home, sharded, data):
    text = (sharded / INDEX_NAME).read_text()
    values = broken(json.loads(text)).map(lambda value: json.dumps(value).encode())
    with replaced(sharded / INDEX_NAME, data.draw(st.one_of(values, mangled(text)))):
        check_weights(home, sharded)


HEADERS = [b"", b"\x00", b"\xff" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 2**63 - 1), struct.pack("<Q", 0)]
HEADERS += [struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 100_000) + b"[" * 100_000, struct.pack("<Q", 10**8)]


@pytest.mark.parametrize("content", HEADERS)
def test_weights_with_an_odd_header(home, content):
    with replaced(home / "llama" / WEIGHTS_NAME, content):
        check_weights(home, home / "llama")
        assert said_by(lambda: WeightFiles(home / "llama")) or content.endswith(b"{}")


@RULES
@given(data=st.data())
def test_weights_of_garbage(home, data):
    """A header with wrong values, or a file cut off anywhere; bytes behind the header are anybody's numbers."""
    file = (home / "llama" / WEIGHTS_NAME).read_bytes()
    length = struct.unpack("<Q", file[:8])[0]
    header, tensors = file[8 : 8 + length], file[8 + length :]
    wrong = st.one_of(
        broken(json.loads(header)).map(lambda value: json.dumps(value).encode()), mangled(header.decode())
    )
    rebuilt = wrong.map(lambda text: struct.pack("<Q", len(text)) + text + tensors)
    content = data.draw(st.one_of(rebuilt, st.integers(0, len(file) - 1).map(lambda size: file[:size])))
    with replaced(home / "llama" / WEIGHTS_NAME, content):
        check_weights(home, home / "llama")


def test_a_pipe_is_no_weight_file(home, sharded):
    """Opening one would wait for a writer."""
    os.mkfifo(sharded / "pipe.safetensors")
    writer = os.open(sharded / "pipe.safetensors", os.O_RDWR)  # so that this test fails rather than waits
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "pipe.safetensors")
    with replaced(sharded / INDEX_NAME, json.dumps(index).encode()):
        assert "found no such file" in check_weights(home, sharded)
    os.close(writer)


def test_links_are_followed(home, tmp_path):
    """Hugging Face's cache consists of them, and only someone who can write here can make one."""
    for file in (home / "llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert said_by(lambda: Stack.open(tmp_path)) is None
    assert model_digest(tmp_path) == model_digest(home / "llama")
    assert np.array_equal(*(WeightFiles(path)["model.norm.weight"] for path in (tmp_path, home / "llama")))
