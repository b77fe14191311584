"""Does a pruned model still learn? Every method's, fine-tuned alike: same adapters, same tokens in the same order.

The dense model is trained as well: what it gains is the text's, and not what a pruned one gets back.

Each model is written as a checkpoint, low-rank adapters are trained on the text's own likelihood (nothing is distilled:
the dense model would teach what methods differ in), merged, and judged window by window as before.

FLAP's bias is a parameter that Llama's configuration can have; other families' checkpoints have no place for it.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nirvana.adapter import merge
from nirvana.architectures.registry import describe
from nirvana.baselines.shortgpt import write_shortgpt
from nirvana.compensation import RIDGE
from nirvana.errors import InputError
from nirvana.files import atomic_directory, read_json, scratch_directory, write_json
from nirvana.plan import Compensation as PlannedCompensation
from nirvana.plan import Plan
from nirvana.recovery import Recipe, recover
from nirvana.surgery import prune
from nirvana.walk import Stack, final_hidden_states
from nirvana.weights import WeightFiles, model_digest
from studies.comparison import (
    BEST,
    COMPENSATIONS,
    DENSE,
    ROUND_TO,
    Comparison,
    Compensation,
    Row,
    Text,
    Texts,
    window_losses,
)
from studies.methods import SHORTGPT, method_named
from studies.store import STUDIES, cached, study_key
from tasks.corpus.documents import read_documents
from tasks.recovery.recovery_text import training_text
from tasks.sample_pool import Encoder, split_documents

if TYPE_CHECKING:
    from tasks.params import Params, Recovery

STUDY = "fine_tuning"
TOKENS = 24 * 8 * 128
"""24 steps of the pipeline's batch: an hour for eight models on two cores."""
_POINTS = 8
"""Of a learning curve at most, after its first; a killed run repeats no more than what lies between two."""
Way = tuple[str, Compensation]
"""Method and compensation."""


@dataclass(frozen=True)
class Settings:
    """Which models are asked for; `dense` is the one that is not pruned."""

    ways: tuple[Way, ...] = (
        (DENSE, "none"),
        ("nirvana", "none"),
        ("nirvana", "least_squares"),
        BEST,  # type: ignore[assignment]
        ("flap", "bias"),
        ("llm_pruner", "none"),
        ("llm_pruner", "least_squares"),
        (SHORTGPT, "none"),
    )
    ratio: float = 0.4
    tokens: int = TOKENS
    """Tokens that each is trained on."""

    @property
    def reference(self) -> Way:
        """What the others are compared with: ours if it takes part, else the first."""
        pruned = [way for way in self.ways if way[0] != DENSE]
        return next((way for way in pruned if way == BEST), pruned[0])


def recipe_of(recovery: "Recovery", tokens: int) -> Recipe:
    """Return how every model is trained: section `recovery` of params.yaml, nothing distilled, so many tokens.

    Raises:
        InputError: If the tokens make no step.
    """
    values = asdict(recovery) | {"tokens": tokens, "distillation": 0.0}
    del values["merge"]
    recipe = Recipe(**values)
    if recipe.steps < 1:
        raise InputError(
            f"--training-tokens: expected {recipe.tokens_a_step} or more, one batch of recovery.batch sequences of "
            f"recovery.sequence_length tokens, got {tokens}; ask for more"
        )
    every = math.ceil(recipe.steps / _POINTS) * recipe.tokens_a_step
    return Recipe(**values | {"curve_every": every})


def check(settings: Settings) -> None:
    """Refuse what cannot be asked for.

    Raises:
        InputError: If a method is unknown or has no checkpoint, none prunes, or the ratio is not between 0 and 1.
    """
    for name, compensation in settings.ways:
        whole = name in (DENSE, SHORTGPT)  # no units leave
        if not whole:
            method_named(name)
        allowed = ("none",) if whole else COMPENSATIONS
        if compensation not in allowed:
            raise InputError(
                f"{name}: expected compensation {' or '.join(allowed)}, got {compensation}; choose one of them"
            )
    if all(name == DENSE for name, _ in settings.ways):
        raise InputError("--methods: expected a method that prunes, got none; name one, such as nirvana")
    if not 0 < settings.ratio < 1:
        raise InputError(f"ratio: expected a number between 0 and 1, got {settings.ratio:g}; choose e.g. 0.4")


def read_training(params: "Params", model: Path, corpus: Path, recipe: Recipe) -> Text:
    """Return what every model is trained on: the calibration split of a corpus, as the recover step cuts it.

    Args:
        params: Reads `calibration.add_bos`.
        model: The dense model, whose tokenizer reads documents.
        corpus: Directory of `documents.jsonl`.
        recipe: How much, how long and in which order.

    Raises:
        InputError: If there is no such corpus, or it does not fill one sequence.
    """
    documents = split_documents(read_documents(corpus / "documents.jsonl"))["calibration"]
    encoder = Encoder.of_model(model, params.calibration.add_bos)
    length, seed = recipe.sequence_length, recipe.seed
    (ids,) = training_text(documents, encoder, None, tokens=recipe.tokens, length=length, seed=seed)
    return Text(ids)


def measure(study: "FineTuning", settings: Settings) -> list[Row]:
    """Return the dense model's row, then one a method; what an earlier run finished is not trained again.

    Raises:
        InputError: If a method is unknown, a ratio cannot be reached, peft is missing, or a loss is not finite.
    """
    check(settings)
    rows = [study.dense()]
    with tqdm(settings.ways, desc="fine-tuning", unit="model") as bar:
        for name, compensation in bar:
            bar.set_postfix_str(name)
            rows.append(study.tuned(name, 0.0 if name == DENSE else settings.ratio, compensation))
    return rows


class FineTuning(Comparison):
    """One dense model, the texts that it is pruned and judged by, and the text that pruned models are trained on."""

    def __init__(
        self,
        model_directory: Path | str,
        texts: Texts,
        training: Text,
        recipe: Recipe,
        ridge: float = RIDGE,
        round_to: int = ROUND_TO,
        device: torch.device | str = "cpu",
    ):
        super().__init__(model_directory, texts, ridge, round_to)
        self.training, self.recipe, self.device = training, recipe, torch.device(device)

    def tuned(self, name: str, ratio: float, compensation: Compensation = "none") -> Row:
        """Return what training makes of a method's pruned model, computed now unless it is known.

        Args:
            name: A method of units, `shortgpt`, or `dense`.
            ratio: Share of the block weights that leaves.
            compensation: `none`, `bias` (Llama's configuration only) or `least_squares`.

        Returns:
            Names of what was asked for; `achieved_ratio`; `adapter_parameters`; `curve`, the fields of
            `nirvana.recovery.CurvePoint` at each point, on the held-out text; `dense_heldout_loss` there; `before`
            and `after`, one mean loss a window of the evaluation text; `seconds_a_step`, the median.
        """
        method = {} if name in (DENSE, SHORTGPT) else asdict(method_named(name))
        how = {key: value for key, value in method.items() if key not in ("scorer", "source")}
        key = self.key(name, ratio, compensation, 0, how | {"round_to": self.round_to})
        key |= {"study": STUDY, "kind": "fine-tuned", "recipe": asdict(self.recipe)}
        key |= {"training": self.training.digest, "device": self.device.type}
        states = STUDIES / STUDY / f"{study_key(key, self._tuned)}.states"
        row = cached(key, lambda: self._tuned(name, ratio, compensation, states))
        shutil.rmtree(states, ignore_errors=True)
        return row

    def _tuned(self, name: str, ratio: float, compensation: Compensation, states: Path) -> Row:
        with scratch_directory(STUDIES / STUDY / name) as directory:
            merged = directory / "merged"
            checkpoint = self.model_directory if name == DENSE else directory / "checkpoint"
            achieved = 0.0 if name == DENSE else self._write(checkpoint, name, ratio, compensation)
            before = self._losses(checkpoint)
            # the same bytes only from the same checkpoint with as many threads
            state = {"pruned": model_digest(checkpoint), "threads": torch.get_num_threads()}
            file = states / f"{study_key(state, self._tuned)}.safetensors"
            with _watched(f"training {name}", self.recipe.steps * self.recipe.tokens_a_step) as (times, on_step):
                found = recover(
                    self.model_directory,
                    checkpoint,
                    self.training.ids,
                    self.texts.heldout.ids,
                    self.recipe,
                    self.device,
                    file,
                    on_step,
                )
            merged.mkdir()
            merge(checkpoint, found.adapter, merged)
            after = self._losses(merged)
        return {
            "method": name,
            "ratio": ratio,
            "compensation": compensation,
            "achieved_ratio": achieved,
            "adapter_parameters": found.adapter.parameters,
            "curve": [asdict(point) for point in found.curve],
            "dense_heldout_loss": found.dense_loss,
            "before": before,
            "after": after,
            "seconds_a_step": float(np.median(np.diff(times))) if len(times) > 1 else 0.0,
        }

    def _write(self, target: Path, name: str, ratio: float, compensation: Compensation) -> float:
        """Write the pruned checkpoint; return the share that left."""
        if name == SHORTGPT:
            return write_shortgpt(self.model_directory, self.stack, self.texts.calibration.ids, ratio, target)
        keep, _ = self.keep(name, ratio)
        biases = self.updates(keep, compensation) if compensation == "bias" else {}
        planned, ids = None, None
        if compensation == "least_squares":
            text = self.texts.compensation
            planned, ids = PlannedCompensation(self.ridge, text.digest), target.with_name("compensation.safetensors")
            save_file({"input_ids": text.ids.contiguous()}, ids)
        plan = Plan.build(
            self.stack.architecture.sites(),
            keep,
            model_digest=self.model,
            model_type=self.stack.architecture.model_type,
            calibration_digest=self.texts.calibration.digest,
            parameters={"pruning_ratio": ratio, "method": name},
            compensation=planned,
        )
        pruned = target.with_name("pruned") if biases else target
        prune(self.model_directory, plan, pruned, calibration=ids)
        if biases:
            write_with_biases(pruned, biases, target)
        return plan.achieved_ratio["total"]

    def _losses(self, checkpoint: Path) -> list[float]:
        """Return the mean loss of each window of the evaluation text."""
        stack, ids = Stack.open(checkpoint), self.texts.evaluation.ids
        hidden = final_hidden_states(stack, ids)
        losses = window_losses(hidden, ids, stack.head_weight(), stack.architecture.logit_softcap).tolist()
        if not np.isfinite(losses).all():
            raise InputError(
                "fine_tuning: expected finite losses, got NaN or infinity; lower recovery.learning_rate or the ratio"
            )
        return losses


def write_with_biases(checkpoint: Path, biases: Mapping[str, Tensor], target: Path) -> None:
    """Write a checkpoint again with biases on its linear layers: those given, the others zero.

    Raises:
        InputError: If the family's configuration knows no such biases.
    """
    kind = describe(checkpoint).model_type
    if kind != "llama":
        raise InputError(
            f"bias: expected a model of Llama's configuration, which can have biases, got {kind}; choose flap without"
        )
    with atomic_directory(target) as temporary:
        for file in checkpoint.iterdir():
            if ".safetensors" not in file.name:  # the weights and their index
                shutil.copy(file, temporary)
        configuration = temporary / "config.json"
        write_json(configuration, read_json(configuration) | {"attention_bias": True, "mlp_bias": True})
        stored = WeightFiles(checkpoint)
        tensors = {name: stored[name] for name in stored}
        for name, shape in describe(temporary).parameter_shapes.items():
            if name.endswith(".bias") and name not in tensors:
                tensors[name] = biases[name].cpu() if name in biases else torch.zeros(shape)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def _watched(what: str, tokens: int) -> Iterator[tuple[list[float], Callable[[int], None]]]:
    """Show a bar of tokens; yield when each step ended, and what to call then."""
    times: list[float] = []
    with tqdm(total=tokens, desc=what, unit="token", leave=False) as bar:

        def on_step(done: int) -> None:
            times.append(time.monotonic())
            bar.update(done - bar.n)

        yield times, on_step


def described(study: FineTuning) -> dict[str, Any]:
    """Return recipe and training text as MLflow keeps them."""
    training = {"text": study.training.digest, "sequences_and_tokens": list(study.training.ids.shape)}
    return {"recipe": asdict(study.recipe), "training": training, "device": study.device.type}
