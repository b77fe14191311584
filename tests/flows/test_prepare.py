"""What studies have DVC bring up to date before they read the pipeline's text, and what they are asked."""

import json

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML
from tiny import tiny_corpus, tiny_llama

from flows import study
from nirvana.errors import InputError
from studies.spec import load_spec, study_names
from studies.subject import SELF_GENERATED, Asked, Subject, fitted_on
from tasks.corpus.documents import Document, write_documents
from tasks.params import PARAMS_FILE
from tasks.registry import step

ROOT_PARAMS = PARAMS_FILE.resolve()


@pytest.mark.parametrize("name", ["compare", "zero_shot", "fine_tuning"])
def test_a_step_comes_after_those_that_it_reads(name):
    """Each is brought by itself: DVC would miss what an earlier one makes."""
    brought = study.missing(load_spec(name), Asked())
    assert "sample_pool" in brought
    known: set[str] = set()
    for each in brought:
        assert set(step(each).inputs) <= known, each
        known |= set(step(each).outs)


def test_what_is_given_is_not_brought(tmp_path):
    given = {"model": tmp_path, "corpus": tmp_path}
    assert study.missing(load_spec("compare"), Asked(ids=tmp_path, model=tmp_path)) == []
    assert study.missing(load_spec("zero_shot"), Asked(**given)) == []
    assert study.missing(load_spec("fine_tuning"), Asked(**given)) == ["fetch_corpus", "sample_pool"]
    assert study.missing(load_spec("fine_tuning"), Asked(ids=tmp_path, model=tmp_path)) == ["fetch_corpus"]
    assert study.missing(load_spec("calibration_study"), Asked(model=tmp_path)) == ["fetch_corpus"]


def test_another_corpus_needs_nothing_that_the_model_wrote(tmp_path, monkeypatch):
    """Preset `best` asks for such text, but a study has its own written."""
    yaml = YAML()
    content = yaml.load(ROOT_PARAMS)
    content["method"]["preset"] = "best"
    content["calibration"] |= {"sequence_length": 32, "heldout_length": 32}
    yaml.dump(content, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    texts = sorted(tiny_corpus(tmp_path / "texts", documents=120).iterdir())
    (tmp_path / "corpus").mkdir()
    write_documents(tmp_path / "corpus/documents.jsonl", (Document(file.stem, file.read_text()) for file in texts))
    files = {"model": tiny_llama(tmp_path / "model"), "corpus": tmp_path / "corpus"}
    asked = Asked(tokens=2, compensation_sequences=4)
    found = Subject(asked, files).texts
    assert found.compensation.ids.shape == (4, content["compensation"]["sequence_length"])


def asked_by(name, *options):
    """Return what a study's command line comes to."""
    told = []
    command = study.command(name, lambda *given: told.append(given))
    done = CliRunner().invoke(command, options)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return told[0]


@pytest.mark.parametrize("name", ["compare", "zero_shot", "fine_tuning", "quantised", "attention_factor"])
def test_the_models_own_text_is_asked_for_unless_it_is_refused(name):
    """A flow that dropped the option would fit on less text, and say nothing."""
    asked = [asked_by(name, *options)[1] for options in ([], ["--self-generated", "0"], ["--self-generated", "7"])]
    assert [each.self_generated for each in asked] == [SELF_GENERATED, 0, 7] and SELF_GENERATED > 0
    assert 0 < asked_by(name, "--quick")[1].self_generated < SELF_GENERATED


@pytest.mark.parametrize("name", study_names())
def test_every_setting_is_an_option_and_quick_is_less(name):
    spec, _, values = asked_by(name)
    assert values == {key: setting.default for key, setting in spec.settings.items()}
    assert asked_by(name, "--quick")[2] != values
    assert all(setting.help for setting in spec.settings.values())


def test_settings_are_read_from_options_and_assignments():
    _, _, values = asked_by("gamma_sweep", "--gammas", "8, 0.5,8", "-S", "ratios=0.3")
    assert values == {"ratios": [0.3], "gammas": [0.5, 3.36, 8.0]}
    _, _, values = asked_by("zero_shot", "--methods", "nirvana, flap+bias,best")
    assert values["methods"] == ["nirvana", "flap+bias", "fisher+least_squares"]
    assert {"method": "flap", "compensation": "bias", "ratio": 0.2} in load_spec("zero_shot").names(values)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("compare", ["--ratios=2"], "--ratios: expected numbers between 0 and 1 such as 0.2,0.4, got 2; correct them"),
        ("modules", ["--ratios="], "--ratios: expected numbers between 0 and 1"),
        ("gamma_sweep", ["--gammas=1,x"], "--gammas: expected numbers between 0 and 1000"),
        ("attention_factor", ["--factors=0,1"], "--factors: expected numbers between 0 and 1000"),
        ("alignment", ["--round-to=1,0"], "--round-to: expected whole numbers above 0 such as 1,8,64, got 1,0"),
        ("fine_tuning", ["--ratio=0.2,0.4"], "--ratio: expected a number between 0 and 1 such as 0.4"),
        ("calibration_study", ["--method=flap"], "--method: expected nirvana or fisher, got flap; correct it"),
        ("calibration_study", ["--candidates=3"], "--candidates: expected a whole number of at least 4, got 3"),
        ("compare", ["-S", "ratio=0.4"], "compare: expected settings of ratios, methods, seeds, got ratio"),
        ("compare", ["-S", "ratios"], "-S: expected KEY=VALUE"),
    ],
)
def test_what_cannot_be_is_one_line(name, options, said):
    with pytest.raises(InputError) as raised:
        asked_by(name, *options)
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)
    with pytest.raises(InputError, match="expected a study of alignment, "):
        load_spec("flop")


def test_a_quick_study_fits_on_little():
    quick = Asked(tokens=4096, compensation_sequences=160, self_generated=96, quick=True).limited()
    assert (quick.tokens, quick.compensation_sequences, quick.self_generated) == (2048, 32, 24)
    less = Asked(tokens=100, compensation_sequences=5, quick=True).limited()
    assert (less.tokens, less.compensation_sequences, less.self_generated) == (100, 5, 0)
    whole = Asked(compensation_sequences=160, self_generated=96).limited()
    assert (whole.tokens, whole.compensation_sequences, whole.self_generated) == (4096, 160, 96)


def test_what_is_asked_for_reaches_the_text_and_is_said(tmp_path, monkeypatch):
    model = tiny_llama(tmp_path / "model")
    ids = tmp_path / "ids"
    ids.mkdir()
    for part in ("calibration", "calibration_extra", "heldout", "evaluation"):
        (ids / f"{part}_ids.json").write_text(json.dumps([list(range(8))] * 4))
    monkeypatch.chdir(tmp_path)
    for count in (0, 3):
        asked = Asked(ids, model=model, tokens=8, compensation_sequences=5, self_generated=count)
        texts = Subject(asked, {"model": model}).texts
        assert texts.compensation.ids.shape == (5 + count, 8)
        own = ", 3 x 8 of them the dense model's own" if count else ""
        assert fitted_on(texts, asked).endswith(f"was fitted on {5 + count} x 8 tokens{own}")
