"""The steps, declared: what each reads, writes and depends on. dvc.yaml is rendered from here.

A step's name is its module (`tasks/<name>.py`), its DVC stage and its Prefect task. Inputs are named by the output
of the step that makes them, so an edge of the graph is written once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.evaluation.lm_eval_task import OFFLINE_TASKS
from tasks.provenance.code_files import code_files

if TYPE_CHECKING:
    from tasks.params import Params

# everything but `runtime`, which may not change a result
EXPERIMENT = (
    "method",
    "model",
    "corpus",
    "calibration",
    "saliency",
    "allocation",
    "compensation",
    "recovery",
    "evaluation",
    "benchmark",
    "compute",
)


@dataclass(frozen=True)
class Out:
    """One output of a step.

    Attributes:
        path: File or directory, relative to the checkout.
        metric: Shown by `dvc metrics`, which takes its numbers and texts and leaves its lists out.
        tracked: Whether DVC keeps it. An untracked output stays out of dvc.yaml: it is this machine's own.
    """

    path: str
    metric: bool = False
    tracked: bool = True


@dataclass(frozen=True)
class Step:
    """One step of the pipeline.

    Attributes:
        name: Module, stage and task.
        inputs: Names of the outputs it reads.
        outs: Output name -> output.
        params: Sections and dotted keys of params.yaml that it may read.
        code: Modules beyond its imports: used through a hook or by their file name.
        torch: Whether it computes with torch, which then runs with fixed threads and deterministic algorithms.
        online: Whether it may reach the network under these parameters.
    """

    name: str
    inputs: tuple[str, ...]
    outs: Mapping[str, Out]
    params: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    torch: bool = True
    online: Callable[["Params"], bool] = field(default=lambda params: False)

    @property
    def module(self) -> str:
        """The step's source file."""
        return f"tasks/{self.name}.py"


def _hub_tasks(params: "Params") -> bool:
    """lm-eval fetches the data of every task that is not ours."""
    return any(task not in OFFLINE_TASKS for task in params.evaluation.tasks)


_PRESET = "method.preset"  # for steps that read a key it may fill in

# `import nirvana` makes transformers load a pruned checkpoint with this class
_PRUNED_CLASSES = ("nirvana/checkpoint/modeling_nirvana.py",)

STEPS: tuple[Step, ...] = (
    Step(
        "fetch_model",
        (),
        {"model": Out("data/model")},
        ("model.source", "model.trust_remote_code", "model.tokenizer"),
        online=lambda params: True,
    ),
    Step("fetch_corpus", (), {"corpus": Out("data/corpus")}, ("corpus",), torch=False, online=lambda params: True),
    Step(
        "sample_pool",
        ("model", "corpus"),
        {
            "candidates": Out("data/candidates.safetensors"),
            "heldout": Out("data/heldout.safetensors"),
            "compensation_corpus": Out("data/compensation_corpus.safetensors"),
            "evaluation_data": Out("data/evaluation"),
        },
        ("calibration", "compensation.method", "compensation.sequences", "compensation.sequence_length", _PRESET),
    ),
    Step(
        "generate_text",
        ("model", "compensation_corpus"),
        {"compensation_ids": Out("data/compensation.safetensors")},
        (
            "compensation.method",
            "compensation.self_generated",
            "calibration.seed",
            "calibration.add_bos",
            "compute",
            _PRESET,
        ),
        torch=False,  # unless there is something to write: the step sees to it itself
    ),
    Step(
        "collect_gradients",
        ("model", "candidates"),
        {"channel_saliency": Out("artifacts/channel_saliency")},
        ("saliency", "calibration.seed", "compute", _PRESET),
    ),
    Step(
        "aggregate_saliency",
        ("model", "channel_saliency"),
        {"unit_saliency": Out("artifacts/unit_saliency")},
        ("saliency.method", _PRESET),
    ),
    Step(
        "score_pool",
        ("model", "heldout", "unit_saliency"),
        {"kl_scores": Out("reports/kl_scores.csv"), "selection": Out("artifacts/selection.json", metric=True)},
        ("allocation", "saliency.method", "compute", _PRESET),
    ),
    Step(
        "allocate",
        ("model", "candidates", "unit_saliency", "selection", "compensation_ids"),
        {"plan": Out("artifacts/plan.json", metric=True), "allocation": Out("reports/allocation.csv")},
        ("allocation", "calibration.averaged", "saliency.method", "compensation.method", "compensation.ridge", _PRESET),
    ),
    Step(
        "prune",
        ("model", "plan", "heldout", "compensation_ids"),
        {"checkpoint": Out("artifacts/checkpoint"), "divergence": Out("reports/divergence.json", metric=True)},
        ("compute",),
    ),
    Step(
        "recover",
        ("model", "corpus", "heldout", "checkpoint"),
        {
            "recovered": Out("artifacts/recovered"),
            "recovery": Out("reports/recovery.json", metric=True),
            "recovery_curve": Out("reports/recovery.csv"),
        },
        ("recovery", "calibration.add_bos", "compute"),
        code=_PRUNED_CLASSES,
        torch=False,  # unless there is something to recover: the step sees to it itself
    ),
    Step(
        "evaluate_dense",
        ("model", "evaluation_data"),
        {
            "evaluation_dense": Out("reports/evaluation_dense.json", metric=True),
            "lm_eval_dense": Out("reports/lm_eval_dense.json"),
        },
        ("evaluation", "compute"),
        online=_hub_tasks,
    ),
    Step(
        "evaluate",
        ("checkpoint", "recovered", "evaluation_data"),
        {
            "evaluation": Out("reports/evaluation.json", metric=True),
            "lm_eval": Out("reports/lm_eval.json"),
        },
        ("evaluation", "compute"),
        code=_PRUNED_CLASSES,
        online=_hub_tasks,
    ),
    Step(
        "benchmark",
        ("model", "checkpoint", "recovered"),
        {"benchmark": Out("reports/benchmark.json", metric=True)},
        ("benchmark", "compute"),
        code=_PRUNED_CLASSES,
    ),
    Step(
        "report",
        (
            "plan",
            "selection",
            "kl_scores",
            "allocation",
            "unit_saliency",
            "divergence",
            "recovery",
            "recovery_curve",
            "evaluation",
            "evaluation_dense",
            "benchmark",
        ),
        {"report": Out("reports/report.html")},
        EXPERIMENT,
        torch=False,
    ),
    Step(
        "record",
        (
            "plan",
            "selection",
            "kl_scores",
            "allocation",
            "unit_saliency",
            "divergence",
            "recovery",
            "recovery_curve",
            "evaluation",
            "evaluation_dense",
            "lm_eval",
            "lm_eval_dense",
            "benchmark",
            "report",
        ),
        {"mlflow_run": Out("reports/mlflow_run.json", tracked=False)},
        EXPERIMENT,
        torch=False,
    ),
)

# `dvc plots show`: title -> what is drawn
PLOTS: tuple[dict[str, dict[str, Any]], ...] = (
    {
        "KL divergence of each candidate": {
            "template": "scatter",
            "x": "candidate",
            "y": {"reports/kl_scores.csv": "kl_divergence"},
            "x_label": "candidate",
            "y_label": "KL(dense || pruned), nats a token",
        }
    },
    {
        "Kept share of each layer's modules": {
            "template": "scatter",
            "x": "layer",
            "y": {"reports/allocation.csv": "kept_share"},
            "x_label": "layer",
            "y_label": "kept share",
        }
    },
)


def step(name: str) -> Step:
    """Return the step of that name; KeyError if there is none."""
    return {each.name: each for each in STEPS}[name]


def paths(name: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return a step's inputs and outputs, each by its name."""
    every = {out: Path(declared.path) for each in STEPS for out, declared in each.outs.items()}
    chosen = step(name)
    return {key: every[key] for key in chosen.inputs}, {key: Path(out.path) for key, out in chosen.outs.items()}


def stage(declared: Step, root: Path | str = ".") -> dict[str, Any]:
    """Return one step as a stage of dvc.yaml."""
    inputs, _ = paths(declared.name)
    code = {file for module in (declared.module, *declared.code) for file in code_files(module, root)}
    outs = [out for out in declared.outs.values() if out.tracked]
    described: dict[str, Any] = {
        "cmd": f"exec python -m tasks {declared.name}",
        "deps": sorted({*(path.as_posix() for path in inputs.values()), *code}),
        "params": sorted(declared.params),
        "outs": [out.path for out in outs if not out.metric],
        "metrics": [out.path for out in outs if out.metric],
    }
    return {key: value for key, value in described.items() if value}


def render(root: Path | str = ".") -> str:
    """Return the text of dvc.yaml."""
    import yaml

    content = {"stages": {each.name: stage(each, root) for each in STEPS}, "plots": list(PLOTS)}
    header = "# Rendered from tasks/registry.py by `python -m tasks --render`; a test compares the two.\n"
    return header + yaml.safe_dump(content, sort_keys=False, width=115)
