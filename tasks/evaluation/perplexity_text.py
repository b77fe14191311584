"""What token perplexity is measured on: windows of held-out text, as the model's kind of stack predicts them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig

from nirvana.checkpoint.tokenizer import begins_with
from nirvana.perplexity import token_perplexity, windows_from_documents
from nirvana.walk import Stack
from tasks.corpus.documents import Document
from tasks.corpus.span_corruption import PairMaker, Pairs


@dataclass(frozen=True)
class NextTokens:
    """For a decoder-only model: every token of a window but its first."""

    windows: torch.Tensor
    bos: bool
    kind: str = "next_token"

    @property
    def predictions(self) -> int:
        """Tokens that are predicted."""
        return self.windows.shape[0] * (self.windows.shape[1] - 1)

    def perplexity(self, stack: Stack) -> float:
        """Return the token perplexity of a model."""
        with progress_bar(stack) as on_layer:
            return token_perplexity(stack, self.windows, self.windows[:, 1:], on_layer)


@dataclass(frozen=True)
class Targets:
    """For an encoder-decoder: every token of the targets that windows are turned into, sentinels and EOS too."""

    pairs: Pairs
    kind: str
    bos: bool = False

    @property
    def predictions(self) -> int:
        """Tokens that are predicted."""
        return self.pairs.labels.size

    def perplexity(self, stack: Stack) -> float:
        """Return the token perplexity of a model."""
        arrays = (self.pairs.input_ids, self.pairs.decoder_input_ids, self.pairs.labels)
        source, target, labels = (torch.from_numpy(array) for array in arrays)
        with progress_bar(stack) as on_layer:
            return token_perplexity(stack, (source, target), labels, on_layer)


@contextmanager
def progress_bar(stack: Stack) -> Iterator[Callable[[int], None]]:
    """Show a walk over the layers."""
    with tqdm(total=stack.num_layers, desc="token perplexity", unit="layer") as bar:
        yield lambda layer: _moved(bar)


def _moved(bar: tqdm) -> None:
    bar.update()


def perplexity_text(
    tokenizer: Any, config: PreTrainedConfig, documents: Sequence[Document], window: int, tokens: int
) -> NextTokens | Targets:
    """Cut held-out documents into what a model is judged on.

    Args:
        tokenizer: The model's.
        config: The model's.
        documents: Held-out documents.
        window: Tokens of text a window, BOS included where the tokenizer itself puts one and the model is decoder-only.
        tokens: Tokens of text in all windows.

    Raises:
        InputError: If the documents are too short, or the model's kind of pair cannot be made of a window.
    """
    texts = (document.text for document in documents)
    if not config.is_encoder_decoder:
        bos = begins_with(tokenizer)
        windows = windows_from_documents(tokenizer, texts, window, tokens, bos is not None, bos)
        return NextTokens(windows, bos is not None)
    maker = PairMaker.of_model(tokenizer, config)
    windows = windows_from_documents(tokenizer, texts, window, tokens, add_bos=False)
    # not by calibration.seed: whatever calibrated a model, the same spans judge it
    return Targets(maker(windows.numpy(), "evaluation"), maker.kind)
