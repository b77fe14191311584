"""Sizes, FLOPs and ratios against hand-computed values; no assertion on a time."""

import json

import pytest
import torch
from tiny import pruned_checkpoint, random_keep, save_family, save_t5, t5_configs, tiny_llama
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from nirvana import benchmark as benchmark_module
from nirvana.benchmark import Workload, benchmark, compare, measure_latencies, speeds
from nirvana.device import available_bytes
from nirvana.errors import InputError
from nirvana.footprint import (
    checkpoint_bytes,
    count_parameters,
    decode_weight_bytes,
    fixed_prompt,
    float32_bytes,
    flops_per_token,
    peak_bytes,
)
from nirvana.greedy import decode, prefill
from nirvana.loading import load_model
from nirvana.walk import Stack

VOCABULARY, HIDDEN, NEURONS, LAYERS, HEAD_DIM, HEADS, KV_HEADS = 100, 32, 64, 2, 8, 4, 2
CPU = torch.device("cpu")
WORKLOAD = Workload(batch_size=2, prompt_length=16, decode_tokens=4, repeats=2, warmup=1)


def _config(**overrides) -> LlamaConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
    }
    return LlamaConfig(**settings | overrides)


def _block_weights(neurons: int = NEURONS) -> int:
    """Weights of the projections of one layer."""
    attention = 2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * KV_HEADS * HEAD_DIM
    return attention + 3 * HIDDEN * neurons


@pytest.mark.parametrize("neurons", [64, 40])
@pytest.mark.parametrize(("batch", "length"), [(1, 16), (3, 10)])
def test_flops_of_a_prefill(batch, length, neurons):
    projections = 2 * LAYERS * _block_weights(neurons)  # a token
    attention = 2 * 2 * LAYERS * length * HEADS * HEAD_DIM  # a token: scores and weighted values, whole square
    head = 2 * HIDDEN * VOCABULARY / length  # at the last position only
    counted = flops_per_token(_config(intermediate_size=neurons), batch, length)
    assert counted == pytest.approx(projections + attention + head, rel=1e-12)


def test_flops_do_not_depend_on_the_attention_kernel():
    config = _config()
    config._attn_implementation = "sdpa"
    assert flops_per_token(config, 1, 16) == flops_per_token(_config(), 1, 16)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_weight_bytes(tied):
    model = LlamaForCausalLM(_config(tie_word_embeddings=tied))
    norms = (2 * LAYERS + 1) * HIDDEN
    blocks = LAYERS * _block_weights() + norms
    table = VOCABULARY * HIDDEN
    assert count_parameters(model) == blocks + (1 if tied else 2) * table
    # the head is read; the input embedding is not, unless it is the head
    assert decode_weight_bytes(model) == 4 * (blocks + table)


def test_checkpoint_bytes_sum_the_shards_only(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"x" * 7)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {"weight_map": {f"tensor{number}": name for number, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 100)
    (tmp_path / "consolidated.safetensors").write_bytes(b"x" * 100)  # the same weights once more, as Mistral ships
    assert checkpoint_bytes(tmp_path) == 17


def test_the_prompt_is_fixed_and_in_the_vocabulary():
    prompt = fixed_prompt(50, 2, 30)
    assert prompt.shape == (2, 30)
    assert torch.equal(prompt, fixed_prompt(50, 2, 30))
    assert prompt.max() < 50
    assert prompt.unique().numel() == 50


def test_speeds_are_tokens_over_latency():
    latency = measure_latencies({"only": LlamaForCausalLM(_config()).eval()}, WORKLOAD)["only"]
    figures = speeds(latency, WORKLOAD)
    prefill_s, decode_s = figures["prefill_latency_ms"] / 1000, figures["decode_latency_ms"] / 1000
    assert figures["prefill_tokens_per_second"] * prefill_s == pytest.approx(2 * 16)
    assert figures["decode_tokens_per_second"] * decode_s == pytest.approx(2)


def test_models_take_turns_and_decode_with_a_cache(monkeypatch):
    models = {name: LlamaForCausalLM(_config()).eval() for name in ("dense", "pruned")}
    calls: list[tuple[str, int]] = []
    for name, model in models.items():
        forward = model.forward

        def spy(ids, *args, _name=name, _forward=forward, **kwargs):
            calls.append((_name, ids.shape[1]))
            return _forward(ids, *args, **kwargs)

        monkeypatch.setattr(model, "forward", spy)
    measure_latencies(models, WORKLOAD)
    prefills = [name for name, length in calls if length == WORKLOAD.prompt_length]
    assert prefills == ["dense", "pruned", "pruned", "dense", "dense", "pruned"]
    assert [length for _, length in calls[:5]] == [16, 1, 1, 1, 1]


def _figures(prefill: float, decode: float, flops: float = 1.0, weight_bytes: float = 1.0) -> dict[str, float]:
    return {
        "prefill_latency_ms": prefill,
        "decode_latency_ms": decode,
        "flops_per_token": flops,
        "weight_bytes_per_token": weight_bytes,
    }


def test_ratios_and_floors():
    compared = compare(_figures(10.0, 4.0, 200.0, 80.0), _figures(8.0, 3.0, 150.0, 64.0))
    assert compared["ratio"] == pytest.approx(_figures(0.8, 0.75, 0.75, 0.8))
    assert compared["floor"] == pytest.approx({"prefill": 0.75, "decode": 0.8})
    assert compared["warning"] is None


@pytest.mark.parametrize(
    ("prefill", "decode", "named", "not_named"),
    [
        (12.0, 3.0, ["prefill (1.20"], ["decode"]),
        (8.0, 4.0, ["decode (1.00"], ["prefill"]),
        (12, 5, ["prefill", "decode"], []),
    ],
)
def test_warning_names_what_is_not_faster(prefill, decode, named, not_named):
    warning = compare(_figures(10.0, 4.0), _figures(prefill, decode))["warning"]
    assert all(each in warning for each in named)
    assert not any(each in warning for each in not_named)


@pytest.mark.slow
def test_benchmark_of_two_checkpoints(tmp_path):
    dense = tiny_llama(tmp_path / "dense", intermediate_size=2048)
    pruned = tiny_llama(tmp_path / "pruned", intermediate_size=1024)
    result = benchmark(dense, pruned, WORKLOAD, CPU)
    assert set(result) == {"dense", "pruned", "ratio", "floor", "warning", "machine"}
    assert set(result["dense"]) == set(result["pruned"]) == set(result["ratio"])
    removed = LAYERS * 3 * HIDDEN * 1024
    assert result["dense"]["parameters"] - result["pruned"]["parameters"] == removed
    assert result["dense"]["checkpoint_bytes"] - result["pruned"]["checkpoint_bytes"] == pytest.approx(
        4 * removed, rel=0.01
    )
    assert result["dense"]["flops_per_token"] - result["pruned"]["flops_per_token"] == pytest.approx(2 * removed)
    assert result["floor"]["prefill"] == result["ratio"]["flops_per_token"] < 0.6
    assert min(result["dense"]["peak_bytes"], result["pruned"]["peak_bytes"]) > 0


@pytest.mark.slow
def test_peak_memory_grows_with_the_model(tmp_path):
    small = peak_bytes(tiny_llama(tmp_path / "small"), CPU, 1, 16, 1)
    large_directory = tiny_llama(tmp_path / "large", intermediate_size=200_000)  # 154 MB of weights
    assert peak_bytes(large_directory, CPU, 1, 16, 1) - small > 100e6


def test_peak_memory_of_what_does_not_load_is_one_line(tmp_path):
    with pytest.raises(InputError, match="peak memory") as caught:
        peak_bytes(tmp_path, CPU, 1, 16, 1)
    assert "\n" not in str(caught.value)


def _t5_weights(config: T5Config) -> tuple[int, int]:
    """Weights of one attention, and of one feed-forward."""
    matrices = 3 if config.is_gated_act else 2
    return 4 * config.d_model * config.num_heads * config.d_kv, matrices * config.d_model * config.d_ff


@pytest.mark.parametrize("name", t5_configs())
@pytest.mark.parametrize(("batch", "length"), [(1, 16), (3, 10)])
def test_flops_of_an_encoder_decoder(name, batch, length):
    config = t5_configs()[name]
    encoder, decoder, inner = config.num_layers, config.num_decoder_layers, config.num_heads * config.d_kv
    attention, feed_forward = _t5_weights(config)
    # a prompt: two operations a weight and position, then scores and weighted values
    read = 2 * length * encoder * (attention + feed_forward) + 2 * 2 * encoder * length * length * inner
    # the decoder's one position: its own attention reads one position, the other the whole prompt
    self_attention = 2 * attention + 2 * 2 * inner
    cross = 2 * attention // 2 + 2 * 2 * length * inner  # q and o
    cross_keys_values = 2 * length * attention // 2  # k and v of the whole prompt
    head = 2 * config.d_model * config.vocab_size
    write = decoder * (self_attention + cross + cross_keys_values + 2 * feed_forward) + head
    assert flops_per_token(config, batch, length) == pytest.approx((read + write) / length, rel=1e-12)


@pytest.mark.parametrize("name", t5_configs())
def test_weight_bytes_of_an_encoder_decoder(tmp_path, name):
    model = load_model(save_t5(name, tmp_path))
    config = model.config
    attention, feed_forward = _t5_weights(config)
    norms = (3 * config.num_decoder_layers + 1) * config.d_model
    # k and v of the cross-attention were used up in the prefill; the encoder too
    blocks = config.num_decoder_layers * (attention + attention // 2 + feed_forward) + norms
    assert decode_weight_bytes(model) == 4 * (blocks + config.vocab_size * config.d_model)


@pytest.mark.parametrize("name", t5_configs())
def test_a_reply_on_the_cache_is_what_generate_writes(tmp_path, name):
    model = load_model(save_t5(name, tmp_path))
    prompt = fixed_prompt(512, 2, 12)
    with torch.inference_mode():
        reply = prefill(model, prompt)
        written = [reply.next_ids]
        for _ in range(5):
            reply = decode(model, reply)
            written.append(reply.next_ids)
        # a cache of its own: transformers makes one with as many layers as the encoder has
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        model.generation_config.eos_token_id = None
        expected = model.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.cat(written, dim=1), expected[:, 1:])


def test_an_encoder_decoder_decodes_with_a_cache(monkeypatch):
    model = T5ForConditionalGeneration(t5_configs()["t5-relu-tied"]).eval()
    encoded, decoded = [], []
    for stack, lengths in ((model.encoder, encoded), (model.decoder, decoded)):

        def spy(*args, _forward=stack.forward, _lengths=lengths, **kwargs):
            _lengths.append(kwargs["input_ids"].shape[1])
            return _forward(*args, **kwargs)

        monkeypatch.setattr(stack, "forward", spy)
    measure_latencies({"only": model}, WORKLOAD)
    assert encoded == [16] * 3
    assert decoded == [1] * 3 * 5


def test_float32_bytes_are_those_of_the_loaded_model(tmp_path):
    directory = tiny_llama(tmp_path / "model")
    model = load_model(directory)
    assert float32_bytes(directory) == 4 * count_parameters(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert float32_bytes(tmp_path / "half") == float32_bytes(directory)
    assert available_bytes(CPU) > 0


@pytest.mark.parametrize(("share", "alternated"), [(2.0, True), (1.9, False)])
def test_what_does_not_fit_twice_is_measured_one_after_the_other(tmp_path, monkeypatch, share, alternated):
    directory = tiny_llama(tmp_path / "model")
    both = 2 * float32_bytes(directory)
    alive: list[str] = []
    seen: list[list[str]] = []

    def measure(models, workload):
        seen.append(list(models))
        return {name: benchmark_module.Latency(8.0 if name == "pruned" else 10.0, 1.0) for name in models}

    def load(path, device, _load=load_model):
        alive.append(str(path))
        return _load(path, device)

    monkeypatch.setattr(benchmark_module, "available_bytes", lambda device: int(share * both))
    monkeypatch.setattr(benchmark_module, "peak_bytes", lambda *arguments: 1)
    monkeypatch.setattr(benchmark_module, "measure_latencies", measure)
    monkeypatch.setattr(benchmark_module, "load_model", load)
    result = benchmark(directory, directory, WORKLOAD, CPU)
    assert seen == ([["dense", "pruned"]] if alternated else [["dense"], ["pruned"]])
    assert result["warning"].startswith("not alternated:") != alternated
    assert "not faster in decode" in result["warning"]
    assert result["ratio"]["prefill_latency_ms"] == 0.8
    assert set(result["dense"]) == set(result["pruned"])


@pytest.mark.slow
def test_benchmark_of_two_encoder_decoders(tmp_path):
    dense = save_t5("t5-gated-gelu-untied", tmp_path / "dense", d_ff=2048)
    pruned = save_t5("t5-gated-gelu-untied", tmp_path / "pruned", d_ff=1024)
    result = benchmark(dense, pruned, WORKLOAD, CPU)
    removed = 5 * 3 * 32 * 1024
    assert result["dense"]["parameters"] - result["pruned"]["parameters"] == removed
    # decoding reads the decoder's three layers only
    assert result["dense"]["weight_bytes_per_token"] - result["pruned"]["weight_bytes_per_token"] == 4 * removed * 3 / 5
    assert min(result["dense"]["peak_bytes"], result["pruned"]["peak_bytes"]) > 0


def test_flops_and_bytes_of_experts_are_those_that_a_token_meets(tmp_path):
    """Hand-computed: 3 layers, the middle one dense, else 2 of 4 experts of 24 neurons; hidden 32, 4 x 16 queries."""
    model = load_model(save_family("qwen3_moe", tmp_path))
    attention, dense, expert, router = 32 * (64 + 32 + 32 + 64), 3 * 32 * 48, 3 * 32 * 24, 32 * 4
    products = 3 * attention + dense + 2 * (2 * expert + router)
    scores = 3 * 2 * 2 * 8 * 64
    assert flops_per_token(model.config, 1, 8) == 2 * products + scores + 2 * 32 * 512 / 8
    # norms: two of 32 a layer and one of 16 each for q and k, one at the end; the head is not tied
    norms = 3 * (2 * 32 + 2 * 16) + 32
    assert decode_weight_bytes(model) == 4 * (products + norms + 32 * 512)


def test_benchmark_of_experts_runs_to_the_end(tmp_path):
    model = save_family("qwen3_moe", tmp_path / "dense")
    pruned_checkpoint(model, random_keep(Stack.open(model).architecture.sites()), tmp_path / "pruned")
    result = benchmark(model, tmp_path / "pruned", Workload(1, 8, 2, 1, 0), CPU)
    assert 0 < result["floor"]["prefill"] < 1
    assert 0 < result["floor"]["decode"] < 1
