"""What a model takes: parameters, bytes on disk, bytes read a token, FLOPs a token, peak memory."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from nirvana.device import process_bytes
from nirvana.errors import InputError
from nirvana.greedy import decode, prefill
from nirvana.loading import auto_class, load_model
from nirvana.weights import WeightFiles, weight_files


def count_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def checkpoint_bytes(directory: Path | str) -> int:
    """Return the bytes of the safetensors files that a checkpoint is loaded from."""
    return sum(file.stat().st_size for file in weight_files(directory))


def float32_bytes(directory: Path | str) -> int:
    """Return the bytes that a checkpoint's weights take once loaded in float32."""
    weights = WeightFiles(directory)
    return sum(4 * math.prod(weights.shape(name)) for name in weights)


@torch.inference_mode()
def decode_weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that decoding one token reads, as loaded: those of every module that runs for it.

    For a decoder-only model that is every parameter once. In an encoder-decoder the encoder does not run, nor do the
    projections that made keys and values of its output: both are done with when the first token is there. Tables of
    which one row is looked up do not count, the input embedding first of all; it does, once, where the output head is
    tied to it. Of a layer's experts, as many count as a token meets. The KV cache and activations do not count.
    """
    read: dict[int, int] = {}
    experts = getattr(model.config, "num_experts", None)
    experts_met = model.config.num_experts_per_tok / experts if experts else 1

    def note(module: nn.Module, *_: object) -> None:
        if not isinstance(module, nn.Embedding):
            share = experts_met if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts") else 1
            for parameter in module.parameters(recurse=False):
                read[id(parameter)] = round(parameter.nbytes * share)

    reply = prefill(model, fixed_prompt(model.config.vocab_size, 1, 1).to(model.device))
    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        decode(model, reply)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(read.values())


def flops_per_token(config: PreTrainedConfig, batch_size: int, prompt_length: int) -> float:
    """Return the floating-point operations of a prefill, divided by its tokens.

    Counted are matrix products, two operations a multiply-add: projections, the two products of attention over the
    whole square of positions, and the head at the last position, which is all that generation needs. In an
    encoder-decoder that is the encoder over the prompt, keys and values of its output for every decoder layer, and the
    rest of the decoder and the head at one position. Not counted are softmax, norms, position embeddings and
    activations. The model is built from its configuration without memory (meta device) and with eager attention:
    torch's counter does not see the CPU kernel of sdpa, and counts would differ between devices.

    Args:
        config: The model's configuration, per-layer sizes included.
        batch_size: Prompts.
        prompt_length: Tokens a prompt.
    """
    with torch.device("meta"):
        model = auto_class(config).from_config(config, attn_implementation="eager").eval()
        _count_experts_met(model)
        ids = torch.zeros(batch_size, prompt_length, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        prefill(model, ids)
    return counter.get_total_flops() / ids.numel()


def _count_experts_met(model: PreTrainedModel) -> None:
    """Let experts multiply once for each token that meets them, in a form that the meta device knows.

    The grouped product exists there in bfloat16 only, and a loop over the experts that were hit needs values.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "num_experts_per_tok"):
            config._experts_implementation = "batched_mm"


def fixed_prompt(vocab_size: int, batch_size: int, prompt_length: int) -> torch.Tensor:
    """Return the same token ids every time, spread over the vocabulary so that embedding rows are not all warm."""
    # a prime stride visits every id before it repeats one
    return (torch.arange(batch_size * prompt_length) * 7919 % vocab_size).view(batch_size, prompt_length)


def peak_bytes(
    directory: Path | str, device: torch.device, batch_size: int, prompt_length: int, decode_tokens: int
) -> int:
    """Return the peak memory of loading a model, one prefill and some decoding, in a fresh process.

    On a CPU: the highest resident set of that process (VmHWM), less what it held after its imports; pages of the
    checkpoint file that loading has mapped count. On a GPU: torch.cuda.max_memory_allocated.

    Args:
        directory: Checkpoint directory.
        device: Where it computes.
        batch_size: Prompts.
        prompt_length: Tokens a prompt.
        decode_tokens: Tokens decoded after the prompt.

    Raises:
        InputError: If the process fails, for instance for want of memory.
    """
    command = [sys.executable, "-m", __name__, str(directory), f"--device={device}"]
    command += [f"--batch-size={batch_size}", f"--prompt-length={prompt_length}", f"--decode-tokens={decode_tokens}"]
    command += [f"--threads={torch.get_num_threads()}"]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        cause = "it was killed, as for want of memory" if done.returncode < 0 else last
        raise InputError(
            f"{directory}: expected to measure peak memory, the process ended with {done.returncode} ({cause}); "
            "free memory, or lower benchmark.batch_size or benchmark.prompt_length"
        )
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def _resident_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (highest so far) of this process."""
    if found := process_bytes(field):
        return found
    import resource  # macOS knows the highest only, in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _measure_here(arguments: argparse.Namespace) -> int:
    """Load, prefill, decode in this process and return its peak above the imports."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    before = _resident_bytes("VmRSS")
    model = load_model(arguments.directory, device)
    ids = fixed_prompt(model.config.vocab_size, arguments.batch_size, arguments.prompt_length).to(device)
    with torch.inference_mode():
        reply = prefill(model, ids)
        for _ in range(arguments.decode_tokens):
            reply = decode(model, reply)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident_bytes("VmHWM") - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the peak memory of one model in this process.")
    parser.add_argument("directory")
    parser.add_argument("--device", default="cpu")
    for option in ("--batch-size", "--prompt-length", "--decode-tokens", "--threads"):
        parser.add_argument(option, type=int, default=1)
    sys.stdout.write(json.dumps({"peak_bytes": _measure_here(parser.parse_args())}) + "\n")
