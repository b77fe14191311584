"""Token perplexity: exp of the mean negative log-likelihood of a token, in float32, over windows of fixed length.

Not lm-eval's `word_perplexity`, which divides by the words of the untokenised text.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nirvana.errors import InputError

# Tokens of one forward. It goes through the model's own `forward`, so that every family's head counts (soft-capped or
# scaled logits included), and holds the logits of one microbatch: 512 tokens x 128k vocabulary x 4 bytes = 0.25 GiB.
_MICROBATCH_TOKENS = 512
# Positions whose logits are turned into log-probabilities at a time: the second copy stays small.
_CHUNK = 64


def windows_from_documents(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    window: int,
    tokens: int,
    add_bos: bool = True,
) -> Int[Tensor, "windows window"]:
    """Cut texts into windows of token ids, taken at even distances from all of the text.

    The documents are tokenised one by one and joined by a blank line, as is usual for WikiText; a window may cross from
    one into the next. Windows do not overlap.

    Args:
        tokenizer: The model's tokenizer.
        texts: Documents, in order.
        window: Tokens a window, BOS included.
        tokens: Tokens of all windows together, BOS included; rounded up to whole windows.
        add_bos: Begin each window with the BOS token.

    Returns:
        Token ids.

    Raises:
        InputError: If the text is too short, the window has nothing to predict, or there is no BOS token to add.
    """
    if window < 2:
        raise InputError(f"evaluation.window: expected at least 2 tokens, got {window}; enlarge it")
    bos = tokenizer.bos_token_id
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


@torch.inference_mode()
def token_perplexity(model: PreTrainedModel, windows: Int[Tensor, "windows window"], first_target: int = 1) -> float:
    """Return exp(mean negative log-likelihood) of the windows' tokens from `first_target` on.

    With BOS in front, `first_target=1` predicts every token of the text; without, every token but the first.

    Args:
        model: A causal language model in evaluation mode; its logits are read in float32.
        windows: Token ids; every window is scored by itself, without the ones before it.
        first_target: Position of the first token that is predicted, 1 or more.

    Raises:
        InputError: If the loss is NaN or infinite.
    """
    count, length = windows.shape
    predictions = count * (length - first_target)
    total = torch.zeros((), dtype=torch.float64)
    microbatch = max(1, _MICROBATCH_TOKENS // length)
    with tqdm(total=count, desc="token perplexity", unit="window") as progress:
        for batch in windows.to(model.device).split(microbatch):
            logits = model(batch, use_cache=False).logits[:, first_target - 1 : -1].flatten(0, 1)
            targets = batch[:, first_target:].flatten()
            for part, target in zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True):
                total += cross_entropy(part.float(), target, reduction="sum").double().cpu()
            progress.update(len(batch))
    mean = total.item() / predictions
    if not mean < 700:  # NaN, or beyond what exp can hold
        raise InputError(f"expected finite logits, got a mean loss of {mean}; the checkpoint is damaged, make it anew")
    return math.exp(mean)


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a document longer than the model's context is no reason to warn, it is cut below
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
