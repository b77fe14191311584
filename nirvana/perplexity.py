"""Token perplexity: exp of the mean negative log-likelihood of a token, in float32, over windows of fixed length.

Not lm-eval's `word_perplexity`, which divides by the words of the untokenised text.
"""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nirvana.errors import InputError
from nirvana.head import token_losses
from nirvana.walk import Ids, Stack, final_hidden_states


def windows_from_documents(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    window: int,
    tokens: int,
    add_bos: bool = True,
    bos: int | None = None,
) -> Int[Tensor, "windows window"]:
    """Cut texts into windows of token ids, taken at even distances from all of the text.

    The documents are tokenised one by one and joined by a blank line, as is usual for WikiText; a window may cross from
    one into the next. Windows do not overlap.

    Args:
        tokenizer: The model's tokenizer.
        texts: Documents, in order.
        window: Tokens a window, BOS included.
        tokens: Tokens of all windows together, BOS included; rounded up to whole windows.
        add_bos: Begin each window with a token of its own.
        bos: Which; None: the tokenizer's BOS token.

    Returns:
        Token ids.

    Raises:
        InputError: If the text is too short, the window has nothing to predict, or there is no BOS token to add.
    """
    if window < 2:
        raise InputError(f"evaluation.window: expected at least 2 tokens, got {window}; enlarge it")
    bos = tokenizer.bos_token_id if bos is None else bos
    if add_bos and bos is None:
        raise InputError("expected a tokenizer with a BOS token, got one without; ask for windows without BOS")
    separator = _token_ids(tokenizer, "\n\n")
    stream: list[int] = []
    for text in texts:
        stream.extend(_token_ids(tokenizer, text))
        stream.extend(separator)
    body = window - 1 if add_bos else window
    available, count = len(stream) // body, math.ceil(tokens / window)
    if count > available:
        raise InputError(
            f"evaluation.perplexity_tokens: expected at most {available * window} (the evaluation documents hold "
            f"{available} windows of {window} tokens), got {tokens}; lower it or add documents"
        )
    pieces = torch.tensor(stream[: available * body], dtype=torch.int64).view(available, body)
    chosen = pieces[torch.arange(count) * available // count]
    if add_bos:
        chosen = torch.cat([torch.full((count, 1), bos, dtype=torch.int64), chosen], dim=1)
    return chosen.contiguous()


def token_perplexity(
    stack: Stack,
    ids: Ids,
    targets: Int[Tensor, "batch predictions"],
    on_layer: Callable[[int], None] = lambda layer: None,
) -> float:
    """Return exp(mean negative log-likelihood) of the targets.

    The model is walked layer by layer: it is never in memory as a whole, nor are its logits.

    Args:
        stack: Dense or pruned model, resident or streamed: the same number, bit for bit.
        ids: What the model reads; every window is scored by itself, without the ones before it.
        targets: Tokens to predict. Of a decoder-only model the last ones of `ids`, predicted at the position before
            each: `ids[:, 1:]` are all that can be. An encoder-decoder predicts one at every position of the decoder.
        on_layer: Called after each layer, for progress.

    Raises:
        InputError: If a token id is out of range, or the loss is NaN or infinite.
    """
    hidden = final_hidden_states(stack, ids, on_layer=on_layer)
    if not stack.architecture.is_encoder_decoder:
        hidden = hidden[:, -targets.shape[1] - 1 : -1]
    losses = token_losses(
        hidden.flatten(0, 1), targets.to(hidden.device).flatten(), stack.head_weight(), stack.architecture.logit_softcap
    )
    mean = float(losses.mean())
    if not mean < 700:  # NaN, or beyond what exp can hold
        raise InputError(f"expected finite logits, got a mean loss of {mean}; the checkpoint is damaged, make it anew")
    return math.exp(mean)


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a document longer than the model's context is no reason to warn, it is cut below
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
