"""Recovery: fine-tune low-rank adapters of a pruned model, on text and on what the dense model says of it.

The loss of a token is (1 − d) · NLL + d · KL(dense‖student), d = `distillation`. Both models are in memory as a whole,
in float32, while it takes (the dense one only where it teaches): what can only be streamed cannot be recovered.

The same inputs on one kind of device with as many threads give the same bytes, whether the run was interrupted or not.

Source: LoRA, arXiv 2106.09685, after pruning as in LLM-Pruner, arXiv 2305.11627; distillation, arXiv 1503.02531, at
temperature 1.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from nirvana.adapter import Adapter, adapter_parameters, attach
from nirvana.architectures.registry import describe
from nirvana.errors import InputError
from nirvana.loading import load_model
from nirvana.training_state import load_state, save_state
from nirvana.walk import as_streams, microbatches, part_of

_LOG = logging.getLogger(__name__)

Sequences = Int[Tensor, "_ _"] | tuple[Int[Tensor, "_ _"], ...]
"""Token ids of a decoder-only model; of an encoder-decoder the encoder's and the decoder's."""
MICROBATCH_TOKENS = 256
"""Tokens of a forward: logits of a vocabulary of 49,152 then take 50 MB, and several such blocks live at once."""
GRADIENT_NORM = 1.0
"""A longer gradient is scaled down to this length, as is usual for language models."""
_STREAMS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Recipe:
    """How adapters are trained: section `recovery` of params.yaml."""

    tokens: int
    """Tokens to train on; what does not fill a last batch is left."""
    seed: int
    rank: int
    alpha: float
    learning_rate: float
    """Where the warm-up ends and the cosine begins."""
    warmup: float
    """Share of the steps in which the rate rises."""
    distillation: float
    """d, the share of the loss that comes from the dense model."""
    sequence_length: int
    """Tokens of text that a sequence stands for."""
    batch: int
    """Sequences a step."""
    curve_every: int
    """Tokens between two points of the learning curve, and between two saved states."""

    @property
    def tokens_a_step(self) -> int:
        """Tokens of text in a batch."""
        return self.batch * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.tokens_a_step


@dataclass(frozen=True)
class CurvePoint:
    """The student after that many tokens; nats a token."""

    tokens: int
    training_loss: float | None
    """The loss that is minimised, mean over the steps since the last point; None before the first step."""
    heldout_loss: float
    """Mean negative log-likelihood on held-out text."""
    heldout_kl: float | None
    """KL(dense‖student) there; None where nothing is distilled, for then the dense model is not kept."""


@dataclass(frozen=True)
class Recovered:
    """What training made."""

    adapter: Adapter
    curve: list[CurvePoint]
    dense_loss: float
    """The dense model's mean negative log-likelihood on the same held-out text."""


def recover(
    dense_directory: Path | str,
    pruned_directory: Path | str,
    text: Sequences,
    heldout: Sequences,
    recipe: Recipe,
    device: torch.device | str = "cpu",
    state_file: Path | None = None,
    on_step: Callable[[int], None] = lambda tokens: None,
) -> Recovered:
    """Train adapters of a pruned checkpoint.

    Args:
        dense_directory: The model that it was cut from.
        pruned_directory: The checkpoint; only its adapters are trained.
        text: Token ids `[sequences, length]` a stack. Of the last stack every token but the first is predicted. Where
            the recipe asks for more tokens, the sequences come again in another order.
        heldout: Likewise; measured, never trained on.
        recipe: How.
        device: Where it computes.
        state_file: Where a killed run left its state, and where this one leaves it. Runs of other inputs must have
            other files; the caller removes it in the end.
        on_step: Called after each step with the tokens trained on so far.

    Raises:
        InputError: If peft is not installed, the two models have different vocabularies, or the loss is not finite.
    """
    device = torch.device(device)
    dense = load_model(dense_directory, device)
    dense_loss, _ = heldout_losses(dense, None, heldout)
    teacher = dense if recipe.distillation > 0 else None
    vocabulary = dense.config.vocab_size
    del dense
    student = load_model(pruned_directory)
    if student.config.vocab_size != vocabulary:
        raise InputError(
            f"{pruned_directory}: expected the vocabulary of the dense model ({vocabulary} tokens), got "
            f"{student.config.vocab_size}; name the model that the checkpoint was cut from"
        )
    student = attach(student, describe(pruned_directory), recipe.rank, recipe.alpha, recipe.seed).to(device)
    curve = _train(student, teacher, text, heldout, recipe, state_file, on_step)
    return Recovered(Adapter.of(student, recipe.rank, recipe.alpha), curve, dense_loss)


def _train(
    student: Any,
    teacher: Any | None,
    text: Sequences,
    heldout: Sequences,
    recipe: Recipe,
    state_file: Path | None,
    on_step: Callable[[int], None],
) -> list[CurvePoint]:
    parameters = adapter_parameters(student)
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=0.0)
    position = load_state(state_file, parameters, optimizer) if state_file else None
    if position is None:
        position = {"step": 0, "curve": [asdict(CurvePoint(0, None, *heldout_losses(student, teacher, heldout)))]}
    else:
        _LOG.info("resuming after %d of %d steps", position["step"], recipe.steps)
    curve = [CurvePoint(**point) for point in position["curve"]]
    on_step(curve[-1].tokens)
    losses: list[float] = []
    for step in range(position["step"], recipe.steps):
        rows = rows_of(step, len(as_streams(text)[0]), recipe)
        losses.append(_backward(student, teacher, tuple(part[rows] for part in as_streams(text)), recipe))
        torch.nn.utils.clip_grad_norm_(parameters.values(), GRADIENT_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        optimizer.step()
        optimizer.zero_grad()
        tokens = (step + 1) * recipe.tokens_a_step
        if is_curve_point(step, recipe):
            curve.append(CurvePoint(tokens, float(np.mean(losses)), *heldout_losses(student, teacher, heldout)))
            _LOG.info("%d tokens: held-out loss %.4f nats a token", tokens, curve[-1].heldout_loss)
            losses.clear()
            if state_file:
                state = {"step": step + 1, "curve": [asdict(point) for point in curve]}
                save_state(state_file, parameters, optimizer, state)
        on_step(tokens)
    return curve


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Return the rate of a step: it rises linearly to the recipe's, then falls to zero as a cosine does."""
    rising = math.ceil(recipe.warmup * recipe.steps)
    if step < rising:
        return recipe.learning_rate * (step + 1) / rising
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / (recipe.steps - rising)))


def is_curve_point(step: int, recipe: Recipe) -> bool:
    """Tell whether a step reaches the next multiple of `curve_every` tokens, or is the last."""
    before, after = (number * recipe.tokens_a_step // recipe.curve_every for number in (step, step + 1))
    return after > before or step + 1 == recipe.steps


def rows_of(step: int, sequences: int, recipe: Recipe) -> list[int]:
    """Return the sequences of a step's batch: every pass over the text takes each once, in an order of its own."""
    places = range(step * recipe.batch, (step + 1) * recipe.batch)
    return [_order(recipe.seed, place // sequences, sequences)[place % sequences] for place in places]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, sequences: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(sequences).tolist()


def _backward(student: Any, teacher: Any | None, ids: tuple[Tensor, ...], recipe: Recipe) -> float:
    """Add the gradient of one batch's mean loss a token to the parameters; return the loss."""
    share = recipe.distillation
    predicted = ids[-1][:, 1:].numel()
    total = 0.0
    for part in _parts(ids):
        logits, targets = predictions(student, part)
        nll, kl = token_losses(logits, targets, _dense_logits(teacher, part))
        loss = ((1 - share) * nll.sum() + (share * kl.sum() if kl is not None else 0)) / predicted
        loss.backward()
        total += float(loss.detach())
    return _finite(total)


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise InputError(
            f"recovery: expected a finite loss, got {loss}; lower recovery.learning_rate, or make the checkpoint anew"
        )
    return loss


def _parts(ids: Sequences) -> Iterator[tuple[Tensor, ...]]:
    sequences, length = as_streams(ids)[-1].shape
    for rows in microbatches(sequences, max(1, MICROBATCH_TOKENS // length)):
        yield part_of(ids, rows)


def predictions(
    model: Any, ids: tuple[Tensor, ...]
) -> tuple[Float[Tensor, "positions vocab"], Int[Tensor, " positions"]]:
    """Return a model's logits at each position of the last stack that has a next token, and those tokens."""
    inputs = {name: part.to(model.device) for name, part in zip(_STREAMS, ids, strict=False)}
    logits = model(**inputs, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1).float(), ids[-1][:, 1:].flatten().to(model.device)


@torch.no_grad()
def _dense_logits(teacher: Any | None, ids: tuple[Tensor, ...]) -> Tensor | None:
    return None if teacher is None else predictions(teacher, ids)[0]


def token_losses(
    student: Float[Tensor, "positions vocab"],
    targets: Int[Tensor, " positions"],
    dense: Float[Tensor, "positions vocab"] | None = None,
) -> tuple[Float[Tensor, " positions"], Float[Tensor, " positions"] | None]:
    """Return the negative log-likelihood of each target and, given dense logits, KL(dense‖student), in nats."""
    log_q = student.log_softmax(dim=1)
    nll = functional.nll_loss(log_q, targets, reduction="none")
    if dense is None:
        return nll, None
    log_p = dense.log_softmax(dim=1)
    return nll, functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


@torch.no_grad()
def heldout_losses(student: Any, teacher: Any | None, heldout: Sequences) -> tuple[float, float | None]:
    """Return the means of `token_losses` over held-out sequences, summed in float64."""
    sums, predicted = [0.0, 0.0], 0
    for part in _parts(heldout):
        logits, targets = predictions(student, part)
        nll, kl = token_losses(logits, targets, _dense_logits(teacher, part))
        sums[0] += float(nll.double().sum())
        sums[1] += 0.0 if kl is None else float(kl.double().sum())
        predicted += len(targets)
    return _finite(sums[0] / predicted), None if teacher is None else sums[1] / predicted
