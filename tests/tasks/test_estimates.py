"""The table of estimates: for the parameters of the checkout, kept until model or settings change."""

import re

import pytest
from ruamel.yaml import YAML
from tiny import tiny_llama

from nirvana.cli.estimate import BEST
from nirvana.errors import InputError
from tasks.estimates import table as estimates
from tasks.params import PARAMS_FILE, load_params

ROOT_PARAMS = PARAMS_FILE.resolve()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(ROOT_PARAMS.read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_shown_once_for_a_model_and_its_settings(checkout, capsys):
    assert estimates.shown_file(load_params()) is None
    tiny_llama(checkout / "data/model")
    file = estimates.shown_file(load_params())
    assert not file.exists()
    estimates.main()
    table = capsys.readouterr().out
    assert re.search(r"collect_gradients . resident, fast +. \d+ MB", table)
    assert re.search(r"GB free here; weights resident, memory fast", table)
    assert file.read_text() == table
    yaml = YAML()
    content = yaml.load(ROOT_PARAMS)
    content["calibration"]["sequences"] = 64
    yaml.dump(content, checkout / "params.yaml")
    assert estimates.shown_file(load_params()) != file


def test_every_setting_that_costs_reaches_the_estimate(checkout):
    work = estimates.workload(load_params())
    assert (work.pool_size, work.sequences, work.heldout_length, work.window, work.lm_eval) == (6, 8, 128, 512, True)


def test_what_the_preset_best_and_recovery_ask_for(checkout):
    yaml = YAML()
    content = yaml.load(ROOT_PARAMS)
    content["method"]["preset"] = "best"
    content["saliency"]["draws"] = 3
    content["compensation"] |= {"sequences": 40, "self_generated": 30, "sequence_length": 64}
    content["recovery"] |= {"tokens": 4096, "rank": 4, "distillation": 0.0, "curve_every": 2048}
    yaml.dump(content, checkout / "params.yaml")
    work = estimates.workload(load_params())
    assert (work.needs, work.draws) == ("input_gradients", 3)
    assert (work.compensation_sequences, work.self_generated, work.compensation_length) == (40, 30, 64)
    recovery = (work.recovery_tokens, work.recovery_rank, work.distillation, work.recovery_curve_every)
    assert recovery == (4096, 4, 0.0, 2048)


def test_what_is_not_asked_for_is_not_there(checkout):
    yaml = YAML()
    content = yaml.load(ROOT_PARAMS)
    content["method"]["preset"] = "nirvana"
    yaml.dump(content, checkout / "params.yaml")
    work = estimates.workload(load_params())
    assert (work.needs, work.compensation_sequences, work.recovery_tokens) == ("weight_gradients", 0, 0)
    content["compensation"]["self_generated"] = 30  # nobody would read it
    yaml.dump(content, checkout / "params.yaml")
    assert estimates.workload(load_params()).self_generated == 0


def test_the_command_line_asks_for_what_the_preset_asks_for(checkout):
    yaml = YAML()
    content = yaml.load(ROOT_PARAMS)
    content["method"]["preset"] = "best"
    yaml.dump(content, checkout / "params.yaml")
    work = estimates.workload(load_params())
    assert {name: getattr(work, name) for name in BEST} == BEST


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("compensation", "sequences", 20), ("compensation", "self_generated", 20), ("recovery", "tokens", 2048)],
)
def test_its_table_is_another(section, key, value, checkout):
    tiny_llama(checkout / "data/model")
    file = estimates.shown_file(load_params())
    yaml = YAML()
    content = yaml.load(ROOT_PARAMS)
    content[section][key] = value
    yaml.dump(content, checkout / "params.yaml")
    assert estimates.shown_file(load_params()) != file


def test_no_model_is_one_clear_line(checkout):
    with pytest.raises(InputError, match=r"expected a model in data/model, found none; run `dvc repro fetch_model`"):
        estimates.main()
