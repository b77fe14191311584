"""What params.yaml asks of the text, held against the corpus before anything is computed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nirvana.errors import InputError

if TYPE_CHECKING:
    from tasks.corpus.documents import Document
    from tasks.corpus.span_corruption import PairMaker
    from tasks.params import Params
    from tasks.sample_pool import Encoder

_FIRST_LOOK = 4
"""Documents that are tried first; four times as many each time they do not suffice."""


def check_text(params: "Params", model: Path, corpus: Path) -> None:
    """Check that the documents give the sequences, windows and items that are asked for.

    Raises:
        InputError: If they do not, or the tokenizer does not fit.
    """
    from nirvana.architectures.registry import read_config
    from tasks.corpus.documents import read_documents
    from tasks.corpus.span_corruption import PairMaker
    from tasks.sample_pool import Encoder, draw_all, split_documents

    splits = split_documents(read_documents(corpus / "documents.jsonl"))
    encoder = Encoder.of_model(model, params.calibration.add_bos)
    drawn = draw_all(params, splits, encoder)
    config = read_config(model)
    pairs = PairMaker.of_model(encoder.tokenizer, config) if config.is_encoder_decoder else None
    if pairs is not None:
        for pool in drawn:  # a row tells: how many spans it has depends on its length alone
            if pool.input_ids.size:
                pairs(pool.input_ids[0, :1], pool.order)
    _check_evaluation(params, splits["evaluation"], encoder.tokenizer, config)
    _check_recovery(params, splits["calibration"], encoder, pairs)


def _check_evaluation(params: "Params", documents: "Sequence[Document]", tokenizer: object, config: object) -> None:
    from tasks.evaluation.cloze import check_cloze_items
    from tasks.evaluation.continuation import continuation_items
    from tasks.evaluation.perplexity_text import perplexity_text

    asked = params.evaluation
    if "cloze" in asked.tasks:
        check_cloze_items(documents, asked.cloze_items)
    if "continuation" in asked.tasks:
        _enough(documents, lambda some: continuation_items(some, asked.continuation_items))
    _enough(
        documents,
        lambda some: perplexity_text(tokenizer, config, some, asked.window, asked.perplexity_tokens),  # type: ignore[arg-type]
    )


def _check_recovery(
    params: "Params", documents: "Sequence[Document]", encoder: "Encoder", pairs: "PairMaker | None"
) -> None:
    if not params.recovery.tokens:
        return
    from tasks.recovery.recovery_text import training_text

    length = params.recovery.sequence_length
    training_text(documents, encoder, pairs, tokens=length, length=length, seed=params.recovery.seed)


def _enough(documents: "Sequence[Document]", make: "Callable[[Sequence[Document]], object]") -> None:
    """Try with few documents first: what these give, all of them give, and most corpora are much larger than needed.

    Raises:
        InputError: What `make` says of all of them.
    """
    count = _FIRST_LOOK
    while count < len(documents):
        try:
            make(documents[:count])
            return
        except InputError:
            count *= 4
    make(documents)
