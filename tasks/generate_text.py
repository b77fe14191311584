"""Step: the dense model writes part of the text that compensation is fitted on; none with `self_generated: 0`.

What one corpus speaks of is little of what a model can do, and the kept columns are solved for on few tokens. On text
of the model's own they are held to all of it, and no second corpus is needed (docs/decisions/0019).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nirvana.files import atomic_file

if TYPE_CHECKING:
    import torch
    from jaxtyping import Int
    from torch import Tensor

    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write what the corpus gave and, evenly spread among it, what the model wrote; an encoder-decoder writes nothing.

    Raises:
        InputError: If the model does not fit into memory, or cannot be read.
    """
    count = 0 if params.compensation.method == "none" else params.compensation.self_generated
    corpus = inputs["compensation_corpus"]
    if not count or _is_encoder_decoder(inputs["model"]):
        with atomic_file(outputs["compensation_ids"]) as temporary:
            shutil.copyfile(corpus, temporary)
            temporary.chmod(0o644)
        return
    # brings torch: seconds that a step with nothing to do must not take
    from nirvana.device import resolve_device
    from tasks.corpus.token_files import read_ids
    from tasks.sample_pool import documents_of, save_ids
    from tasks.workers.child import fix_torch

    fix_torch(params.compute.threads)
    device = resolve_device(params.runtime.device)
    (rows,) = read_ids(corpus)
    seed, add_bos = params.calibration.seed, params.calibration.add_bos
    written = written_by(inputs["model"], count, rows.shape[1], seed, add_bos, device)
    save_ids({"input_ids": interleaved(rows, written).numpy()}, documents_of(corpus), outputs["compensation_ids"])


def _is_encoder_decoder(model: Path) -> bool:
    from nirvana.architectures.registry import read_config

    return bool(read_config(model).is_encoder_decoder)


def interleaved(first: "Int[Tensor, 'rows length']", second: "Int[Tensor, 'rows length']") -> "Tensor":
    """Return the rows of both, each kind spread evenly: any stretch of them is a fair sample."""
    import torch

    # in float64, where no two places of one kind are equal
    places = [(torch.arange(len(rows)).double() + 0.5) / max(1, len(rows)) for rows in (first, second)]
    return torch.cat([first, second])[torch.cat(places).argsort(stable=True)]


def writable_tokens(model: Path) -> list[int]:
    """Return the ids that the model may write: its tokenizer's, without those that the tokenizer calls special.

    What a tokenizer names (BOS, EOS, padding) is only a part of these: separators of documents, turns and files are
    special too, and none of them is text.
    """
    from tasks.sources.model_directory import load_tokenizer, vocabulary_size

    tokenizer, known = load_tokenizer(model), vocabulary_size(model)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    return sorted(token for token in tokenizer.get_vocab().values() if token < known and token not in special)


def written_by(
    model: Path,
    sequences: int,
    length: int,
    seed: int,
    add_bos: bool | None,
    device: "torch.device",
    option: str = "compensation.self_generated",
) -> "Tensor":
    """Return text of the model in a directory.

    Args:
        model: The dense model, decoder-only.
        sequences: How many.
        length: Tokens a sequence.
        seed: Of the draws.
        add_bos: Whether each begins with the tokenizer's BOS; None: as the tokenizer itself would begin.
        device: Where it computes; holds all weights in float32.
        option: What asks for so many, for errors.

    Raises:
        InputError: If weights, keys and values do not fit into its memory, the model is an encoder-decoder, or it
            cannot be read.
    """
    from tqdm import tqdm

    from nirvana.errors import InputError
    from nirvana.generation import generate
    from nirvana.loading import load_model
    from tasks.sample_pool import Encoder

    if _is_encoder_decoder(model):
        raise InputError(
            f"{option}: expected 0 for an encoder-decoder, which fills gaps and writes no text; got another"
        )
    _check_that_it_fits(model, sequences, length, device, option)
    bos = Encoder.of_model(model, add_bos).bos
    tokens, loaded = writable_tokens(model), load_model(model, device)
    with tqdm(total=sequences * length, desc="generated text", unit="token") as bar:
        return generate(loaded, sequences, length, tokens, seed, bos, bar.update)


def _check_that_it_fits(model: Path, sequences: int, length: int, device: "torch.device", option: str) -> None:
    import torch

    from nirvana.device import available_bytes
    from nirvana.errors import InputError
    from nirvana.estimate.memory import self_generation_bytes
    from nirvana.estimate.steps import ModelSizes, Workload

    sizes, work = ModelSizes.of(model), Workload(self_generated=sequences, compensation_length=length)
    # on_cpu=False: mapped weights count too, for if they do not stay in memory, each token reads them from disk again
    needs = {device: self_generation_bytes(sizes, work, on_cpu=False)}
    if device.type != "cpu":
        needs[torch.device("cpu")] = 4 * sizes.weights  # where they are read before they go there
    for place, needed in needs.items():
        free = available_bytes(place)
        if needed > free:
            raise InputError(
                f"{option}: expected fewer sequences, or 0, for a model whose weights in float32, keys and values need "
                f"{needed / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB free on {place.type}; ask for fewer"
            )
