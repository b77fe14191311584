"""A tiny comparison and a study's rows of it, for the tests of studies."""

from contextlib import contextmanager
from types import SimpleNamespace

from tiny import random_ids

from nirvana.allocation import Allocation
from nirvana.loading import load_model
from nirvana.plan import Plan
from nirvana.surgery import prune
from nirvana.walk import Stack
from nirvana.weights import model_digest
from studies.comparison import Comparison, Text, Texts
from studies.spec import load_spec, resolve
from studies.subject import Asked


def tiny_comparison(model_directory):
    return Comparison(model_directory, Texts(*(Text(random_ids(4, 16, i)) for i in range(4))), round_to=8)


def measured(name, comparison, **changed):
    """Return a study's rows of a comparison, its settings changed as the command line does it."""
    spec = load_spec(name)
    subject = SimpleNamespace(comparison=comparison, asked=Asked(), notes=[], parameters={})
    return resolve(spec.measure)(subject, spec, spec.values(False, changed))


def pruned_model(model_directory, keep, ratio, target):
    """Write the checkpoint of a Llama that keeps these units, and load it."""
    plan = Plan.build(
        Stack.open(model_directory).architecture.sites(),
        keep,
        model_digest=model_digest(model_directory),
        model_type="llama",
        calibration_digest="none",
        allocation=Allocation(ratio, gamma=1.0),
    )
    prune(model_directory, plan, target)
    return load_model(target)


@contextmanager
def counted(monkeypatch):
    """Count the models that are judged while this lasts."""
    judged, original = [], Comparison.judged_by
    with monkeypatch.context() as patched:
        patched.setattr(Comparison, "judged_by", lambda self, of: judged.append(1) or original(self, of))
        yield judged
