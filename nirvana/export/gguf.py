"""`gguf`: a file for llama.cpp, of architecture `llama` where all layers agree, else `deci` with sizes by layer.

llama.cpp rotates neighbouring values of a head, transformers the two halves: query and key rows are reordered. Facts
of the format are taken from the `gguf` package (names, keys, types); where llama.cpp reads them: its llama-model.cpp.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nirvana.checkpoint.tokenizer_page import HARD, ORDINARY, Difference
from nirvana.checkpoint.tokenizer_page import ids as ids_of
from nirvana.errors import InputError
from nirvana.export import llama_cpp
from nirvana.export.gguf_tokenizer import describe_tokenizer
from nirvana.export.parity import Parity, model_logits
from nirvana.export.source import Format, Measured, Options, Source, check_space
from nirvana.loading import load_model
from nirvana.plan import Plan
from nirvana.walk import Stack

_LOG = logging.getLogger(__name__)
WEIGHT_TYPES = ("f16", "q8_0")
RELATIVE_TOLERANCES = {"f16": 5e-3, "q8_0": 8e-2}
"""Of log-probabilities, for rounding alone: SmolLM2 measures 6e-4 and 2.4e-2, tiny random models up to 2e-3 and 4e-2;
with unrounded matrices 1e-6."""
POSITIONS = 16
"""Positions compared in llama.cpp, which gives the whole vocabulary for one at a time."""
STATIC_ROPE = ("default", "linear", "llama3")
"""Rotary scalings that are fixed factors on frequencies, whatever the length."""


@functools.cache
def gguf_package() -> Any:
    """Return the `gguf` package.

    Raises:
        InputError: If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            "gguf: expected the gguf package, found none; install it: pip install 'nirvana-pruning[gguf]'"
        ) from error
    return gguf


def _prepare(source: Source, options: Options) -> None:
    gguf_package()
    architecture, config = source.pruned.architecture, source.pruned.architecture.config
    from nirvana.architectures.registry import FAMILIES

    if not architecture.gguf_layout:
        able = ", ".join(name for name, family in FAMILIES.items() if family.gguf_layout)
        raise InputError(
            f"gguf: expected a model of {able} (llama.cpp knows layers of different sizes for no other), got "
            f"{architecture.model_type}; use --to hf, uniform or padded"
        )
    if options.weight_type not in WEIGHT_TYPES:
        raise InputError(f"type: expected one of {', '.join(WEIGHT_TYPES)}, got {options.weight_type!r}; choose one")
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in STATIC_ROPE or config.hidden_act != "silu":
        raise InputError(
            f"gguf: expected rotary scaling {', '.join(STATIC_ROPE)} and activation silu, got {rope} and "
            f"{config.hidden_act}, which the export does not describe; use --to hf, uniform or padded"
        )


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    """A GGMLQuantizationType."""
    read: Callable[[], Tensor]

    def data(self) -> NDArray[Any]:
        """Return the bytes as the file stores them.

        Raises:
            InputError: If a value is too large for the type.
        """
        values = self.read().to(torch.float32).contiguous().numpy()
        with np.errstate(over="ignore"):  # said below
            stored = gguf_package().quants.quantize(values, self.kind)
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            raise InputError(f"{self.name}: expected values below 65504 for f16, got larger ones; use --to hf")
        return stored


def _entries(stack: Stack, weight_type: str) -> list[_Entry]:
    """Return the tensors in the order in which the file holds them."""
    gguf = gguf_package()
    names = gguf.get_tensor_name_map(_architecture(stack), stack.num_layers)
    rotated = (gguf.MODEL_TENSOR.ATTN_Q, gguf.MODEL_TENSOR.ATTN_K)
    entries = []
    for name in sorted(stack.weights, key=_numbers_last):
        if not stack.is_parameter(name):
            continue
        tensor, gguf_name = names.get_type_and_name(name, try_suffixes=(".weight", ".bias"))
        read = functools.partial(_read, stack, name, tensor in rotated)
        shape = stack.weights.shape(name)
        entries.append(_Entry(gguf_name, shape, _kind(shape, weight_type), read))
    factors = _rope_factors(stack)
    if factors is not None:
        entries.append(_Entry("rope_freqs.weight", tuple(factors.shape), _kind(factors.shape, "f32"), lambda: factors))
    return entries


def _numbers_last(name: str) -> tuple[int, str]:
    """Order the tensors layer by layer: llama.cpp reads the file from front to back."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0] if numbers else -1, name)


def _kind(shape: tuple[int, ...], weight_type: str) -> Any:
    """Store vectors in full, matrices as asked; rows that q8_0 cannot cut into blocks of 32 in f16."""
    kinds = gguf_package().GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    block, _ = gguf_package().GGML_QUANT_SIZES[kinds.Q8_0]
    return kinds.Q8_0 if weight_type == "q8_0" and shape[-1] % block == 0 else kinds.F16


def _read(stack: Stack, name: str, rotated: bool) -> Tensor:
    tensor = stack.weights[name]
    return to_neighbours(tensor, stack.architecture.config.head_dim) if rotated else tensor


def to_neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder each head's rows from halves, as transformers rotates them, to neighbouring pairs, as llama.cpp does."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Undo `to_neighbours`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _rope_factors(stack: Stack) -> Tensor | None:
    """Return what llama.cpp divides each rotary frequency by; None where that is 1 everywhere."""
    config = stack.architecture.config
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    plain = rope["rope_theta"] ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return (plain / scaled.double()).float()


def _architecture(stack: Stack) -> Any:
    gguf = gguf_package()
    sizes = [_layer_sizes(stack, layer) for layer in range(stack.num_layers)]
    return gguf.MODEL_ARCH.LLAMA if len(set(sizes)) == 1 else gguf.MODEL_ARCH.DECI


def _layer_sizes(stack: Stack, layer: int) -> tuple[int, int, int]:
    """Return query heads, KV heads and neurons of a layer."""
    config = stack.architecture.config.per_layer_config[layer]
    return config.num_attention_heads, config.num_key_value_heads, config.intermediate_size


def _context_length(stack: Stack) -> int:
    """Return the longest text on which llama.cpp, which knows no window here, does what the model does."""
    config = stack.architecture.config
    window = getattr(config, "sliding_window", None)
    return min(window or config.max_position_embeddings, config.max_position_embeddings)


def _write(source: Source, options: Options, directory: Path) -> Plan:
    gguf = gguf_package()
    stack = source.pruned
    read = source.tokenizer()
    if read is None:
        raise InputError(
            f"{source.checkpoint}: expected a tokenizer, which a GGUF file holds too, found none; put the dense "
            "model's tokenizer files there"
        )
    tokenizer = describe_tokenizer(read, stack.architecture.vocab_size)
    entries = _entries(stack, options.weight_type)
    check_space(directory, sum(_bytes(entry) for entry in entries))
    writer = gguf.GGUFWriter(_file(directory, options.weight_type), gguf.MODEL_ARCH_NAMES[_architecture(stack)])
    try:
        _add_sizes(writer, stack, options)
        tokenizer.add_to(writer)
        _add_parity_places(writer, source.plan)
        for entry in entries:
            shape = gguf.quants.quant_shape_to_byte_shape(entry.shape, entry.kind)
            as_stored = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
            dtype = np.dtype(as_stored.get(entry.kind, np.uint8))
            dimensions = shape if dtype == np.uint8 else entry.shape
            writer.add_tensor_info(entry.name, dimensions, dtype, _bytes(entry), raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.data())
    finally:
        writer.close()
    return source.plan


def _bytes(entry: _Entry) -> int:
    return math.prod(gguf_package().quants.quant_shape_to_byte_shape(entry.shape, entry.kind))


def _file(directory: Path, weight_type: str) -> Path:
    return directory / f"model-{weight_type}.gguf"


def _only_file(directory: Path) -> Path:
    (file,) = directory.glob("*.gguf")
    return file


def _add_sizes(writer: Any, stack: Stack, options: Options) -> None:
    gguf, config = gguf_package(), stack.architecture.config
    sizes = [_layer_sizes(stack, layer) for layer in range(stack.num_layers)]
    heads, kv_heads, neurons = (list(column) for column in zip(*sizes, strict=True))
    agree = len(set(sizes)) == 1
    writer.add_type("model")
    file_types = gguf.LlamaFileType
    writer.add_file_type(file_types.MOSTLY_Q8_0 if options.weight_type == "q8_0" else file_types.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    context = _context_length(stack)
    if context < config.max_position_embeddings:
        _LOG.warning("the model attends to the last %d tokens, llama.cpp to all: that is its context now", context)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(stack.num_layers)
    writer.add_head_count(heads[0] if agree else heads)
    writer.add_head_count_kv(kv_heads[0] if agree else kv_heads)
    writer.add_feed_forward_length(neurons[0] if agree else neurons)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # explicit: llama.cpp would derive them from hidden size and heads, which pruning has taken apart
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_parity_places(writer: Any, plan: Plan) -> None:
    """Make room for what is measured once the file is complete."""
    writer.add_string("nirvana.model.digest", plan.model_digest)
    for key in ("tolerance", "max_abs_difference", "top1_agreement"):
        writer.add_float64(f"nirvana.parity.{key}", math.nan)
    writer.add_uint32("nirvana.parity.positions", 0)
    writer.add_string("nirvana.parity.runtime", "llama.cpp" if llama_cpp.is_installed() else "transformers")


def _finish(directory: Path, parity: Parity) -> None:
    """Note the finding in the file itself; sizes stay as they are."""
    reader = gguf_package().GGUFReader(_only_file(directory), "r+")
    for key in ("tolerance", "max_abs_difference", "top1_agreement", "positions"):
        reader.get_field(f"nirvana.parity.{key}").parts[-1][0] = getattr(parity, key)
    reader.data.flush()


def _measure(source: Source, directory: Path, ids: Any, positions: NDArray[np.int64]) -> Measured:
    """Run the file in llama.cpp where it is installed; read its tensors back into transformers where it is not."""
    file, vocab_size = _only_file(directory), source.dense.architecture.vocab_size
    if llama_cpp.is_installed():
        _compare_tokens(source, file)
        told = llama_cpp.log_probabilities(file, ids[0, : positions[-1] + 1].tolist(), positions, vocab_size)
        return Measured(torch.from_numpy(told), runtime="llama.cpp", quantity="log-probabilities")
    logits = model_logits(_read_back(source.checkpoint, source.pruned, file), ids, positions)
    return Measured(logits.log_softmax(dim=1), runtime="transformers", quantity="log-probabilities")


def _compare_tokens(source: Source, file: Path) -> None:
    """Refuse a file from which llama.cpp cuts a page of text into other tokens than the dense model's tokenizer."""
    tokenizer, page = source.tokenizer(), tuple(text for text in (*ORDINARY, *HARD) if text)
    for text, told in zip(page, llama_cpp.tokenize_each(file, page), strict=True):
        expected = ids_of(tokenizer, text, special=True)
        if told != expected:
            raise InputError(
                "gguf: expected llama.cpp to cut text into the tokens of the dense model's tokenizer, it cuts "
                f"{Difference(text, expected, told).line()}; nothing was written: it knows no way to cut text as this "
                "tokenizer does; use --to hf, uniform or padded"
            )


@torch.no_grad()
def _read_back(checkpoint: Path, stack: Stack, file: Path) -> Any:
    """Return the checkpoint's transformers model with the weights that the file holds, dequantised."""
    gguf = gguf_package()
    model: Any = load_model(checkpoint)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(_architecture(stack), stack.num_layers)
    for name, parameter in model.named_parameters():
        kind, gguf_name = names.get_type_and_name(name, try_suffixes=(".weight", ".bias"))
        tensor = stored[gguf_name]
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view(parameter.shape)
        rotated = kind in (gguf.MODEL_TENSOR.ATTN_Q, gguf.MODEL_TENSOR.ATTN_K)
        parameter.copy_(to_halves(values, stack.architecture.config.head_dim) if rotated else values)
    return model


def _positions(source: Source, tokens: int) -> NDArray[np.int64]:
    """Spread the positions over the sequence, or over what of it leaves the context room for one more token."""
    tokens = min(tokens, _context_length(source.pruned) - 1)
    return np.unique(np.linspace(0, tokens - 1, min(tokens, POSITIONS)).astype(np.int64))


FORMAT = Format(
    prepare=_prepare,
    write=_write,
    measure=_measure,
    positions=_positions,
    relative_tolerance=lambda options: RELATIVE_TOLERANCES[options.weight_type],
    finish=_finish,
)
