"""A part of a study that was computed is not computed again, unless a bit of it changed."""

import pytest

from studies import store


@pytest.fixture
def calls(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "STUDIES", tmp_path)
    monkeypatch.setattr(store, "study_key", lambda key_parts, compute: "key")
    return []


def test_a_value_is_kept_and_a_damaged_one_computed_again(calls, tmp_path):
    def compute():
        calls.append(1)
        return {"perplexity": 12.5, "pairs": (1, 2)}

    first = store.cached({"study": "s"}, compute)
    assert first == {"perplexity": 12.5, "pairs": [1, 2]} == store.cached({"study": "s"}, compute)
    assert len(calls) == 1
    file = tmp_path / "s/key.json"
    file.write_text(file.read_text().replace("12.5", "12.4"))
    assert store.cached({"study": "s"}, compute) == first and len(calls) == 2
    file.write_text(file.read_text().replace('"digest"', '"dagest"'))
    assert store.cached({"study": "s"}, compute) == first and len(calls) == 3
