"""A tiny comparison and made-up rows, for the tests of the sweeps."""

from contextlib import contextmanager

from tiny import random_ids

from studies.comparison import Comparison, Text, Texts


def tiny_comparison(model_directory):
    return Comparison(model_directory, Texts(*(Text(random_ids(4, 16, i)) for i in range(4))), round_to=8)


@contextmanager
def counted(monkeypatch):
    """Count the models that are judged while this lasts."""
    judged, original = [], Comparison.judged_by
    with monkeypatch.context() as patched:
        patched.setattr(Comparison, "judged_by", lambda self, of: judged.append(1) or original(self, of))
        yield judged


def made_row(method, ratio, loss, kl=0.5, **names):
    """Two windows and two held-out sequences, the second a nat worse."""
    return {
        "method": method,
        "ratio": ratio,
        "achieved_ratio": ratio,
        "kl_divergence": kl,
        "divergences": [kl - 0.5, kl + 0.5],
        "losses": [loss - 0.5, loss + 0.5],
        **names,
    }
