"""Step: the dense model writes part of the text that compensation is fitted on; none with `self_generated: 0`.

What one corpus speaks of is little of what a model can do, and the kept columns are solved for on few tokens. On text
of the model's own they are held to all of it, and no second corpus is needed (docs/decisions/0019).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nirvana.files import atomic_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tasks.params import Params


def run(params: "Params", inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Write the token ids `[sequences, length]`: none where there is no compensation, or for an encoder-decoder.

    Raises:
        InputError: If the model does not fit into memory, or cannot be read.
    """
    import numpy as np
    from safetensors.numpy import save_file

    asked = params.compensation
    count = 0 if asked.method == "none" else asked.self_generated
    ids = np.empty((0, asked.sequence_length), dtype=np.int64)
    if count:
        # brings torch: seconds that a step with nothing to do must not take
        from nirvana.architectures.registry import read_config
        from nirvana.device import resolve_device
        from tasks.child import fix_torch

        if not read_config(inputs["model"]).is_encoder_decoder:  # which fills gaps, and writes no text
            fix_torch(params.compute.threads)
            device = resolve_device(params.runtime.device)
            ids = written_by(inputs["model"], count, asked.sequence_length, params.calibration.seed, device).numpy()
    with atomic_file(outputs["generated_ids"]) as temporary:
        save_file({"input_ids": ids}, temporary)
        temporary.chmod(0o644)


def written_by(model: Path, sequences: int, length: int, seed: int, device: "torch.device") -> "Tensor":
    """Return text of the model in a directory.

    Args:
        model: The dense model, decoder-only.
        sequences: How many.
        length: Tokens a sequence.
        seed: Of the draws.
        device: Where it computes; holds all weights in float32.

    Raises:
        InputError: If weights, keys and values do not fit into its memory, or the model cannot be read.
    """
    from tqdm import tqdm

    from nirvana.errors import InputError
    from nirvana.estimate import Sizes, Workload, device_bytes
    from nirvana.estimate_memory import self_generation_bytes
    from nirvana.generation import generate
    from nirvana.loading import load_model
    from tasks.model_directory import load_tokenizer, vocabulary_size

    work = Workload(self_generated=sequences, compensation_length=length)
    # on_cpu=False: mapped weights count too, for if they do not stay in memory, each token reads them from disk again
    needed, free = self_generation_bytes(Sizes.of(model), work, on_cpu=False), device_bytes(device)
    if needed > free:
        raise InputError(
            "compensation.self_generated: expected 0 for a model whose weights in float32, keys and values need "
            f"{needed / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB free here; set it to 0"
        )
    tokenizer, known = load_tokenizer(model), vocabulary_size(model)
    plain = {token for token in tokenizer.get_vocab().values() if token < known} - set(tokenizer.all_special_ids)
    loaded = load_model(model, device)
    with tqdm(total=sequences * length, desc="generated text", unit="token") as bar:
        return generate(loaded, sequences, length, plain, seed, bar.update)
