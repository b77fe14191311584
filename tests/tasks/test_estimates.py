"""The table of estimates: for the parameters of the checkout, kept until model or settings change."""

import re

import pytest
from ruamel.yaml import YAML
from tiny import tiny_llama

from nirvana.errors import InputError
from tasks import estimates
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


def test_no_model_is_one_clear_line(checkout):
    with pytest.raises(InputError, match=r"expected a model in data/model, found none; run `dvc repro fetch_model`"):
        estimates.main()
