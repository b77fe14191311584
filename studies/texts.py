"""Where a comparison's texts come from: the pipeline's files, JSON files of token ids, or text to judge on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nirvana.architectures.registry import read_config
from nirvana.errors import InputError
from nirvana.files import read_json
from nirvana.perplexity import windows_from_documents
from nirvana.weights import model_digest
from studies.comparison import Text, Texts
from studies.store import cached
from tasks.corpus.documents import Document, read_documents
from tasks.corpus.text_files import expand, read_files
from tasks.generate_text import interleaved, writable_tokens, written_by
from tasks.sample_pool import Encoder, draw_candidates, draw_compensation, draw_heldout, split_documents
from tasks.sources.model_directory import load_tokenizer

if TYPE_CHECKING:
    from tasks.params import Params

CALIBRATION_SEQUENCES = 32
"""The paper's; of the pipeline's first candidates, as many as are there."""
WINDOW = 128
"""Tokens of an evaluation window: short, so that there are enough of them to resample."""


def texts_of_ids(directory: Path, tokens: int | None = None, compensation_sequences: int | None = None) -> Texts:
    """Read calibration_ids, calibration_extra_ids, heldout_ids and evaluation_ids, each a list of lists of token ids.

    Args:
        directory: Of the `.json` files. Compensation is fitted on the calibration ids, then the extra ones.
        tokens: Evaluation tokens, rounded down to whole windows; None: all.
        compensation_sequences: None: all.

    Raises:
        InputError: If a file is missing, or holds anything but sequences of one length.
    """
    calibration, extra, heldout, evaluation = (
        _ids_from(directory / f"{name}_ids.json")
        for name in ("calibration", "calibration_extra", "heldout", "evaluation")
    )
    if calibration.shape[1] != extra.shape[1]:
        raise InputError(
            f"{directory}: expected calibration_ids and calibration_extra_ids of one length, got "
            f"{calibration.shape[1]} and {extra.shape[1]} tokens; cut them alike"
        )
    windows = len(evaluation) if tokens is None else tokens // evaluation.shape[1]
    return Texts(
        Text(calibration),
        Text(_first(torch.cat([calibration, extra]), compensation_sequences, "compensation", directory)),
        Text(heldout),
        Text(_first(evaluation, max(1, windows), "evaluation", directory)),
    )


def _first(ids: Tensor, count: int | None, what: str, source: Path) -> Tensor:
    if count is not None and count > len(ids):
        raise InputError(
            f"{source}: expected {count} sequences of {ids.shape[1]} tokens for {what}, got {len(ids)}; ask for fewer"
        )
    return ids[:count].clone()


def _ids_from(file: Path) -> Tensor:
    values = read_json(file)
    rows = values if isinstance(values, list) else []
    whole = all(isinstance(row, list) and row and all(type(each) is int for each in row) for row in rows)
    if not rows or not whole or len({len(row) for row in rows}) != 1:
        raise InputError(f"{file}: expected a list of equally long lists of token ids, got something else; correct it")
    return torch.tensor(rows, dtype=torch.int64)


def judged_on(texts: Texts, path: Path, model: Path, tokens: int) -> Texts:
    """Return the texts with another one to judge on: what is calibrated and compensated on stays.

    Args:
        texts: Of the ids or the pipeline.
        path: A `.json` file of token ids, or text: a file, JSON rows with a column `text`, a directory of such.
        model: The dense model, whose tokenizer reads text.
        tokens: Evaluation tokens: of ids rounded down to whole sequences, of text rounded up to windows of `WINDOW`.

    Raises:
        InputError: If there is no such file, or it holds too little.
    """
    if path.suffix == ".json":
        ids = _ids_from(path)
        ids = _first(ids, max(1, tokens // ids.shape[1]), "evaluation", path)
    else:
        tokenizer = load_tokenizer(model)
        documents = (document.text for document in read_text(path, "--judge"))
        ids = windows_from_documents(tokenizer, documents, WINDOW, tokens, tokenizer.bos_token_id is not None)
    return replace(texts, evaluation=Text(ids))


def with_generated(texts: Texts, model: Path, count: int, params: "Params | None" = None) -> Texts:
    """Return the texts with more to fit compensation on, which the dense model writes itself.

    Args:
        texts: Of the ids or the pipeline.
        model: The dense model.
        count: Sequences; 0: the texts as they are.
        params: How the pipeline draws, where the other text is its own: seed, and whether sequences begin with BOS.

    Raises:
        InputError: If the model does not fit into memory, or writes no text.
    """
    if not count:
        return texts
    rows = texts.compensation.ids
    length = rows.shape[1]
    seed, add_bos = (params.calibration.seed, params.calibration.add_bos) if params else (0, False)
    tokens = hashlib.sha256(str(writable_tokens(model)).encode()).hexdigest()
    stated = {"study": "generated", "model": model_digest(model), "tokens": tokens, "threads": torch.get_num_threads()}
    stated |= {"sequences": count, "length": length, "seed": seed, "add_bos": add_bos}
    device = torch.device("cpu")  # as all that studies compute
    found = cached(
        stated,
        lambda: {"ids": written_by(model, count, length, seed, add_bos, device, "--self-generated").tolist()},
    )
    return replace(texts, compensation=Text(interleaved(rows, torch.tensor(found["ids"]))))


def read_text(path: Path, option: str) -> list[Document]:
    """Read documents: a text file is one, a row of JSON is one.

    Args:
        path: A file, or a directory of files of one kind.
        option: What the path was given for, for errors.

    Raises:
        InputError: If there are none.
    """
    if not path.exists():
        raise InputError(f"{option}: expected a directory or file of text (.txt, .jsonl), {path} does not exist")
    try:
        return [document for document in read_files(expand(path), "text") if document.text.strip()]
    except InputError as error:
        raise InputError(f"{option} {path.name}: {error}") from None


def texts_of_pipeline(params: "Params", model: Path, corpus: Path, tokens: int, compensation_sequences: int) -> Texts:
    """Take the pipeline's text, drawn as the pipeline draws it; not its token ids, which may be another model's.

    Args:
        params: How the pipeline draws.
        model: The dense model, whose tokenizer reads documents.
        corpus: The directory that fetch_corpus writes.
        tokens: Evaluation tokens, BOS included; rounded up to windows of `WINDOW`.
        compensation_sequences: Drawn as the pipeline draws its own.

    Raises:
        InputError: If a file is missing, the corpus is too small, or the model is no decoder alone.
    """
    if read_config(model).is_encoder_decoder:
        raise InputError(f"{model}: expected a decoder-only model, got an encoder-decoder; choose another")
    splits = split_documents(read_documents(corpus / "documents.jsonl"))
    encoder = Encoder.of_model(model, params.calibration.add_bos)
    bos = encoder.tokenizer.bos_token_id is not None
    texts = (document.text for document in splits["evaluation"])
    calibrated, fitted, heldout = _drawn(params, splits, encoder, compensation_sequences)
    return Texts(
        Text(calibrated[:CALIBRATION_SEQUENCES].clone()),
        Text(fitted),
        Text(heldout),
        Text(windows_from_documents(encoder.tokenizer, texts, WINDOW, tokens, bos)),
    )


def _drawn(
    params: "Params", splits: Mapping[str, Sequence[Document]], encoder: Encoder, sequences: int
) -> tuple[Tensor, ...]:
    """Draw the pipeline's candidates, its text for compensation and the held-out batch, none made to repeat itself.

    Rivals are calibrated on what was written, whatever `calibration.repeated` asks for.
    """
    pool = draw_candidates(params.calibration, splits["calibration"], encoder)
    fitted = draw_compensation(params, splits["calibration"], encoder, sequences, "--compensation-sequences")
    heldout = draw_heldout(params.calibration, splits["heldout"], encoder)
    drawn = (pool.input_ids.reshape(-1, pool.input_ids.shape[-1]), fitted.input_ids[0], heldout.input_ids[0])
    return tuple(map(torch.from_numpy, drawn))
