"""One model, stored in every way that people store it: read as the same model, or refused with the way out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    family_configs,
    ids_for,
    logits_of,
    masked_dense,
    one_layout_each,
    random_ids,
    random_keep,
    save_family,
    tiny_llama,
)
from transformers import AutoModel, AutoModelForCausalLM

from nirvana.allocation import Allocation
from nirvana.architectures.registry import FAMILIES, describe
from nirvana.config_values import config_values
from nirvana.directory_kind import kind_of_directory
from nirvana.errors import InputError
from nirvana.export.export import export_checkpoint
from nirvana.export.parity import masked_logits
from nirvana.loading import load_model
from nirvana.plan import Plan
from nirvana.projections import output_projections
from nirvana.saliency import channel_saliency
from nirvana.surgery import prune
from nirvana.text_part import PlainModel, write_text_part
from nirvana.walk import Stack, final_hidden_states
from nirvana.weights import INDEX_NAME, WEIGHTS_NAME, WeightFiles, model_digest


def change_config(path, **values):
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))


def renamed(source: Path, target: Path, rename) -> Path:
    """Copy a model, each tensor under `rename(name)`; None leaves it out."""
    target.mkdir()
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    tensors = load_file(source / WEIGHTS_NAME)
    renames = {name: rename(name) for name in tensors}
    save_file({new: tensors[old] for old, new in renames.items() if new}, target / WEIGHTS_NAME, {"format": "pt"})
    return target


def plan_of(model, seed=0, share=0.6):
    stack = Stack.open(model)
    sites = stack.architecture.sites()
    keep = random_keep(sites, seed, share)
    for site in sites:  # experts of a layer keep equally many
        if site.equal_with is not None:
            count = len(keep[next(other.name for other in sites if other.equal_with == site.equal_with)])
            keep[site.name] = np.sort(np.random.default_rng(seed).permutation(site.units)[:count])
    return Plan.build(
        sites,
        keep,
        model_digest=model_digest(model),
        model_type=stack.architecture.model_type,
        calibration_digest="none",
        allocation=Allocation(0.4),
    )


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    weights = WeightFiles(directory)
    return {name: weights[name] for name in weights}


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- the family's classes and ours agree on names ------------------------------------------------------------------


def test_the_prefix_of_each_family_is_the_one_that_transformers_adds(tmp_path):
    for name in one_layout_each():
        architecture = describe(save_family(name, tmp_path / name))
        if architecture.base_prefix:
            assert architecture.base_prefix == f"{architecture.skeleton.base_model_prefix}."
    assert {config.model_type for config in family_configs().values()} | {"t5"} == set(FAMILIES)


# -- prefixes ------------------------------------------------------------------------------------------------------

PREFIXES = {
    "the model without its head": ("", "lm_head.weight"),
    "old wrapper": ("language_model.model.", "language_model.lm_head.weight"),
    "new wrapper": ("model.language_model.", "lm_head.weight"),
    "wrapper of idefics": ("model.text_model.", "lm_head.weight"),
    "torch.compile": ("_orig_mod.model.", "_orig_mod.lm_head.weight"),
    "a trainer's module": ("module.model.", "module.lm_head.weight"),
}


@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("name", ["llama-untied-biases", "qwen3_moe"])
def test_other_prefixes_are_the_same_model(name, kind, tmp_path):
    prefix, head = PREFIXES[kind]
    model = save_family(name, tmp_path / "model")

    def rename(parameter):
        return head if parameter == "lm_head.weight" else prefix + parameter.removeprefix("model.")

    other = renamed(model, tmp_path / "other", rename)
    ids = random_ids(2, 12)
    for execution in ("resident", "streamed"):
        assert torch.equal(
            final_hidden_states(Stack.open(other, execution=execution), ids),
            final_hidden_states(Stack.open(model), ids),
        )
    sums, others = (channel_saliency(Stack.open(path), ids).sums for path in (model, other))
    assert sums.keys() == others.keys() and all(torch.equal(sums[key], others[key]) for key in sums)
    prune(model, plan_of(model), tmp_path / "pruned")
    prune(other, plan_of(other), tmp_path / "pruned-other")
    assert_same_tensors(tmp_path / "pruned", tmp_path / "pruned-other")
    positions = np.arange(12)
    keep = plan_of(model).keep
    assert torch.equal(*(masked_logits(path, keep, ids[:1], positions) for path in (model, other)))
    write_text_part(other, tmp_path / "plain")
    assert_same_tensors(tmp_path / "plain", model)
    assert torch.equal(load_model(tmp_path / "plain")(ids).logits, load_model(model)(ids).logits)


def test_transformers_own_base_model_is_read(tmp_path):
    """What `AutoModel.save_pretrained` writes, not a renaming of ours."""
    model = save_family("llama", tmp_path / "model")
    AutoModel.from_pretrained(model).save_pretrained(tmp_path / "base")
    ids = random_ids(2, 12)
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "base" / WEIGHTS_NAME)
    assert torch.equal(*(final_hidden_states(Stack.open(tmp_path / name), ids) for name in ("model", "base")))
    assert torch.equal(*(load_model(tmp_path / name)(ids).logits for name in ("model", "base")))
    assert PlainModel.open(tmp_path / "base").is_plain


def test_a_model_without_the_head_it_needs_is_refused_with_the_way_out(tmp_path):
    model = save_family("llama-untied-biases", tmp_path / "model")
    AutoModel.from_pretrained(model).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"saved without it; save it again with AutoModelForCausalLM"):
        Stack.open(tmp_path / "base")
    with pytest.raises(InputError, match=r"found no lm_head\.weight"):  # else random numbers
        load_model(tmp_path / "base")


def test_a_prefix_that_transformers_does_not_read_never_loads_as_random_numbers(tmp_path):
    model = save_family("llama", tmp_path / "model")
    other = renamed(model, tmp_path / "other", lambda name: f"_orig_mod.{name}")
    with pytest.raises(InputError, match="write_text_part"):
        load_model(other)
    assert not PlainModel.open(other).is_plain


def test_an_embedding_stored_as_the_head_is_found(tmp_path):
    """safetensors' own save_model keeps the first name of a shared tensor."""
    model = save_family("llama", tmp_path / "model")
    other = renamed(
        model, tmp_path / "other", lambda name: "lm_head.weight" if name == "model.embed_tokens.weight" else name
    )
    ids = random_ids(2, 12)
    assert torch.equal(*(final_hidden_states(Stack.open(path), ids) for path in (model, other)))
    assert torch.equal(*(load_model(path)(ids).logits for path in (model, other)))
    prune(other, plan_of(other), tmp_path / "pruned")
    load_model(tmp_path / "pruned")


def test_leftovers_are_ignored_and_what_is_unknown_is_refused(tmp_path):
    model = save_family("llama", tmp_path / "model")
    tensors = load_file(model / WEIGHTS_NAME)
    leftover = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4)}  # whole numbers, too
    save_file(tensors | leftover, model / WEIGHTS_NAME, {"format": "pt"})
    prune(model, plan_of(model), tmp_path / "pruned")
    load_model(tmp_path / "pruned")
    stray = {"model.layers.0.mlp.mask": torch.ones(3, dtype=torch.int8)}
    save_file(tensors | stray, model / WEIGHTS_NAME, {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.mask: expected"):
        Stack.open(model)


@pytest.mark.parametrize("types", [(torch.float16, torch.bfloat16), (torch.float64, torch.float32)])
def test_mixed_types_are_read_as_transformers_reads_them(types, tmp_path):
    model = save_family("llama", tmp_path / "model")
    tensors = load_file(model / WEIGHTS_NAME)
    mixed = {name: tensor.to(types[number % 2]) for number, (name, tensor) in enumerate(sorted(tensors.items()))}
    save_file(mixed, model / WEIGHTS_NAME, {"format": "pt"})
    ids = random_ids(1, 12)
    stack = Stack.open(model)
    hidden = final_hidden_states(stack, ids)
    logits = hidden @ stack.head_weight().float().T
    assert torch.allclose(logits, load_model(model)(ids).logits, atol=1e-4)
    prune(model, plan_of(model), tmp_path / "pruned")
    pruned = tensors_of(tmp_path / "pruned")
    assert all(pruned[name].dtype == mixed[name].dtype for name in pruned)


# -- fused experts -------------------------------------------------------------------------------------------------


@pytest.fixture
def experts(tmp_path):
    """One Qwen3-MoE in both layouts, as transformers writes them."""
    model = save_family("qwen3_moe", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / WEIGHTS_NAME)
    return model, tmp_path / "fused"


def test_fused_experts_are_the_same_model(experts, tmp_path):
    model, fused = experts
    ids = random_ids(2, 12)
    for execution in ("resident", "streamed"):
        assert torch.equal(*(final_hidden_states(Stack.open(path, execution=execution), ids) for path in experts))
    sums, others = (channel_saliency(Stack.open(path), ids).sums for path in experts)
    assert sums.keys() == others.keys() and all(torch.equal(sums[key], others[key]) for key in sums)
    keep = plan_of(model).keep
    for path in experts:
        prune(path, plan_of(path), tmp_path / f"pruned-{path.name}", verified=True)
    assert_same_tensors(tmp_path / "pruned-model", tmp_path / "pruned-fused")
    masked = logits_of(masked_dense(model, keep), ids)
    pruned = logits_of(load_model(tmp_path / "pruned-fused"), ids)
    assert torch.allclose(masked, pruned, atol=1e-5)
    assert torch.equal(*(masked_logits(path, keep, ids[:1], np.arange(12)) for path in experts))
    assert torch.equal(*(load_model(path)(ids).logits for path in experts))
    assert PlainModel.open(fused).is_plain  # transformers reads both


def test_fused_experts_are_exported_in_the_dense_shape(experts, tmp_path):
    for path in experts:
        prune(path, plan_of(path), tmp_path / f"pruned-{path.name}")
        (tmp_path / "ids.json").write_text(json.dumps(list(range(20))))
        target = tmp_path / f"padded-{path.name}"
        export_checkpoint(tmp_path / f"pruned-{path.name}", "padded", path, target, ids=tmp_path / "ids.json")
    assert_same_tensors(tmp_path / "padded-model", tmp_path / "padded-fused")


def test_compensation_of_fused_experts_is_refused_in_both_layouts(experts):
    for path in experts:
        with pytest.raises(InputError, match="nirvana and no compensation"):
            output_projections(Stack.open(path).architecture)


def test_a_pruned_model_saved_with_fused_experts_is_read_again(experts, tmp_path):
    model, _ = experts
    prune(model, plan_of(model), tmp_path / "pruned")
    load_model(tmp_path / "pruned").save_pretrained(tmp_path / "again", save_original_format=False)
    ids = random_ids(2, 12)
    assert torch.equal(*(final_hidden_states(Stack.open(tmp_path / name), ids) for name in ("pruned", "again")))


def test_fused_experts_of_another_number_are_refused(experts):
    _, fused = experts
    change_config(fused, num_experts=3, num_local_experts=3)
    with pytest.raises(InputError, match=r"experts\.\w+: expected shape \(3,"):
        Stack.open(fused)


def test_half_fused_layers_are_read(experts, tmp_path):
    """One layer fused, the others not."""
    model, fused = experts
    one, other = load_file(model / WEIGHTS_NAME), load_file(fused / WEIGHTS_NAME)
    layer = "model.layers.0.mlp.experts."
    mixed = {name: tensor for name, tensor in one.items() if not name.startswith(layer)}
    mixed |= {name: tensor for name, tensor in other.items() if name.startswith(layer)}
    shutil.copytree(model, tmp_path / "mixed")
    save_file(mixed, tmp_path / "mixed" / WEIGHTS_NAME, {"format": "pt"})
    ids = random_ids(2, 12)
    assert torch.equal(*(final_hidden_states(Stack.open(path), ids) for path in (model, tmp_path / "mixed")))


# -- files ---------------------------------------------------------------------------------------------------------


def sharded(source: Path, target: Path, files: list[str]) -> Path:
    """Copy a model, its tensors dealt to files in turn, with an index."""
    target.mkdir()
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    tensors = load_file(source / WEIGHTS_NAME)
    file_of = {name: files[number % len(files)] for number, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if file_of[name] == file}, target / file, {"format": "pt"})
    (target / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return target


@pytest.mark.parametrize(
    "files",
    [
        ["model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"],
        ["model-00001-of-00001.safetensors"],
        ["part (a).safetensors", "0.safetensors"],
    ],
    ids=str,
)
def test_the_index_decides_and_what_is_written_loads(files, tmp_path):
    model = save_family("llama", tmp_path / "model")
    other = sharded(model, tmp_path / "other", files)
    (other / "consolidated.safetensors").write_bytes(b"another copy, never looked at")
    (other / "pytorch_model.bin").write_bytes(b"never looked at")
    ids = random_ids(2, 12)
    assert torch.equal(*(final_hidden_states(Stack.open(path), ids) for path in (model, other)))
    prune(model, plan_of(model), tmp_path / "pruned")
    prune(other, plan_of(other), tmp_path / "pruned-other")
    assert torch.equal(*(load_model(tmp_path / name)(ids).logits for name in ("pruned", "pruned-other")))


def test_a_single_file_of_any_name_is_the_model(tmp_path):
    model = save_family("llama", tmp_path / "model")
    digest = plan_of(model)
    (model / WEIGHTS_NAME).rename(model / "weights.safetensors")
    prune(model, digest, tmp_path / "pruned", match_digest=False)
    load_model(tmp_path / "pruned")
    assert not PlainModel.open(model).is_plain  # transformers does not look for that name
    write_text_part(model, tmp_path / "plain")
    load_model(tmp_path / "plain")


def test_two_files_with_one_tensor(tmp_path):
    """The same bytes twice are harmless; two values have no right answer."""
    files = ["a.safetensors", "b.safetensors"]
    model = sharded(save_family("llama", tmp_path / "model"), tmp_path / "other", files)
    name = "model.norm.weight"
    tensors = {file: load_file(model / file) for file in files}
    value = next(part[name] for part in tensors.values() if name in part)
    for file in files:
        save_file(tensors[file] | {name: value}, model / file, {"format": "pt"})
    Stack.open(model)
    save_file(tensors["b.safetensors"] | {name: value + 1}, model / "b.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"b\.safetensors: expected each tensor once, got another model\.norm\.weight"):
        Stack.open(model)


def test_a_shard_that_lacks_a_tensor_is_named(tmp_path):
    files = ["a.safetensors", "b.safetensors"]
    model = sharded(save_family("llama", tmp_path / "model"), tmp_path / "other", files)
    name = "model.layers.1.mlp.up_proj.weight"
    for file in files:
        part = load_file(model / file)
        if part.pop(name, None) is not None:
            save_file(part, model / file, {"format": "pt"})
            holder = file
    with pytest.raises(InputError, match=f"although {INDEX_NAME} says that it is in '{holder}'"):
        Stack.open(model)


def test_an_index_of_pickles_is_refused(tmp_path):
    model = save_family("llama", tmp_path / "model")
    (model / WEIGHTS_NAME).unlink()
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(InputError, match=r"end in \.safetensors, got 'pytorch_model-00001-of-00002\.bin'"):
        Stack.open(model)


def test_an_empty_file_is_named(tmp_path):
    model = save_family("llama", tmp_path / "model")
    (model / WEIGHTS_NAME).write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.safetensors: expected a whole safetensors file"):
        Stack.open(model)


# -- what is no model ----------------------------------------------------------------------------------------------


def put(directory: Path, **files: str) -> Path:
    for name, content in files.items():
        path = directory / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return directory


OTHERS = {
    "adapter": (
        {"adapter_config.json": '{"base_model_name_or_path": "acme/base"}', "adapter_model.safetensors": ""},
        r"found an adapter of acme/base; merge it first: .*merge_and_unload",
    ),
    "diffusers": ({"model_index.json": "{}"}, "found a pipeline of diffusers"),
    "sentence-transformers": (
        {"modules.json": "[]", "0_Transformer/config.json": "{}"},
        r"found a model of sentence-transformers; .*/0_Transformer",
    ),
    "trainer": (
        {f"checkpoint-{number}/config.json": "{}" for number in (500, 1000, 90)},
        r"holds only checkpoints; .*/checkpoint-1000 \(or another of 3\)",
    ),
    "cache": (
        {"snapshots/aaa/config.json": "{}", "snapshots/bbb/config.json": "{}", "refs/main": "bbb\n"},
        r"root of a Hugging Face cache entry; .*/snapshots/bbb \(or another of 2\)",
    ),
    "cache of many": ({"models--a--b/snapshots/c/config.json": "{}"}, r"whole .* cache; .*models--a--b/snapshots/c$"),
    "snapshots": ({"0123456789abcdef0123456789abcdef01234567/config.json": "{}"}, r"0123456789abcdef\w+$"),
    "folder": ({"inner/config.json": "{}"}, r"a folder with models in it; .*/inner$"),
    "gguf": ({"model.gguf": ""}, r"GGUF files; name one of them, as path:.*/model\.gguf"),
    "tensorflow": ({"config.json": "{}", "tf_model.h5": ""}, r"TensorFlow weights \(tf_model\.h5\)"),
    "flax": ({"config.json": "{}", "flax_model.msgpack": ""}, r"Flax weights"),
    "mistral": ({"params.json": "{}", "consolidated.safetensors": ""}, "Mistral's own form"),
    "pickle": ({"config.json": "{}", "pytorch_model.bin": ""}, r"found pytorch_model\.bin; pickled weights"),
    "no index": ({"config.json": "{}", "a.safetensors": "", "b.safetensors": ""}, "no index that says"),
    "nothing": ({"notes.md": ""}, "found none"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_directory_that_is_no_model_says_what_it_is(kind, tmp_path):
    files, said = OTHERS[kind]
    for name, content in files.items():
        put(tmp_path / "it", **{name.replace("/", "__"): content})
    with pytest.raises(InputError, match=said) as refused:
        if "config.json" in files:
            WeightFiles(tmp_path / "it")
        else:
            load_model(tmp_path / "it")
    assert "\n" not in str(refused.value)


def test_a_whole_model_is_no_other_kind(tmp_path):
    model = tiny_llama(tmp_path / "model")
    assert kind_of_directory(model) is None
    put(model, **{"1_Pooling__config.json": "{}", "modules.json": "[]", "checkpoint-5__config.json": "{}"})
    assert kind_of_directory(model) is None
    Stack.open(model)


def test_quantised_models_say_which(tmp_path):
    model = save_family("llama", tmp_path / "model")
    for method in ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"):
        change_config(model, quantization_config={"quant_method": method})
        with pytest.raises(InputError, match=rf"got a quantised model \(quant_method '{method}'\)"):
            Stack.open(model)


# -- configurations ------------------------------------------------------------------------------------------------


def test_su_is_longrope(tmp_path):
    rope = {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    model = save_family("phi3", tmp_path / "model")
    told = json.loads((model / "config.json").read_text())
    told.pop("rope_parameters")
    told |= {"max_position_embeddings": 128, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    (model / "config.json").write_text(json.dumps(told | {"rope_scaling": rope}))
    shutil.copytree(model, tmp_path / "today")
    change_config(tmp_path / "today", rope_scaling=rope | {"type": "longrope"})
    ids = random_ids(1, 24)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "today")(ids).logits
    stack = Stack.open(model)
    assert torch.allclose(final_hidden_states(stack, ids) @ stack.head_weight().T, reference, atol=1e-5)
    assert torch.equal(load_model(model)(ids).logits, reference)
    prune(model, plan_of(model, share=1.0), tmp_path / "pruned")  # a stock configuration
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")(ids).logits, reference, atol=1e-5)


def test_a_padding_token_of_minus_one_is_none_to_the_end(tmp_path):
    model = save_family("llama", tmp_path / "model")
    change_config(model, pad_token_id=-1, architectures=["LLaMAForCausalLM"])
    ids = ids_for("llama", 2, 12)
    assert torch.equal(*(load_model(path)(ids).logits for path in (model, save_family("llama", tmp_path / "plain"))))
    prune(model, plan_of(model), tmp_path / "pruned")
    written = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert written["pad_token_id"] is None and "LLaMAForCausalLM" not in written["architectures"]
    assert load_model(tmp_path / "pruned").generate(ids, max_new_tokens=4, do_sample=False).shape[0] == 2


@pytest.mark.parametrize("pad", [512, 9999])
def test_a_padding_token_without_an_embedding_names_key_and_value(pad, tmp_path):
    model = save_family("llama", tmp_path / "model")
    change_config(model, pad_token_id=pad)
    for refused in (Stack.open, load_model):
        with pytest.raises(
            InputError, match=rf'pad_token_id below vocab_size \(512\), got {pad}; write "pad_token_id": n'
        ):
            refused(model)
    change_config(model, pad_token_id=None)
    Stack.open(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "nope"),
        ("num_attention_heads", "x"),
        ("rope_parameters", {"rope_type": "bogus"}),
        ("rope_parameters", "x"),
        ("hidden_size", -3),
        ("rms_norm_eps", "tiny"),
    ],
)
def test_a_value_that_nothing_can_be_built_from_is_named(key, value, tmp_path):
    model = save_family("llama", tmp_path / "model")
    change_config(model, **{key: value})
    with pytest.raises(InputError, match=rf"got {key}: .*correct {key} there"):
        Stack.open(model)


def test_what_cannot_be_built_is_one_line_when_it_is_loaded_too(tmp_path):
    model = save_family("llama", tmp_path / "model")
    told = json.loads((model / "config.json").read_text())
    told.pop("rope_parameters")
    (model / "config.json").write_text(json.dumps(told | {"rope_scaling": {"type": "dynamic_ntk", "factor": 2.0}}))
    for refused in (Stack.open, load_model):
        with pytest.raises(InputError, match=r"got rope_scaling: .*correct rope_scaling there"):
            refused(model)


def test_a_padding_token_that_only_the_class_assumes_is_none(tmp_path):
    """Phi-3's class assumes 32000 where nothing is said: with a smaller vocabulary transformers asserts."""
    model = save_family("phi3", tmp_path / "model")
    told = json.loads((model / "config.json").read_text())
    told.pop("pad_token_id")
    (model / "config.json").write_text(json.dumps(told))
    prune(model, plan_of(model), tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["pad_token_id"] is None
    load_model(tmp_path / "pruned")


def test_kernels_of_the_author_are_no_property_of_the_model(tmp_path):
    """flash_attention_2 in config.json needs a package and a GPU that nobody else may have."""
    model = save_family("llama", tmp_path / "dense")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"_attn_implementation": "flash_attention_2"}))
    stack = Stack.open(model)
    assert stack.architecture.config._attn_implementation == "sdpa"
    assert "flash_attention_2" not in json.dumps(config_values(model))


def test_an_odd_value_is_named_without_pages_of_configuration(tmp_path, caplog, capfd):
    model = save_family("llama", tmp_path / "model")
    capfd.readouterr()
    change_config(model, use_return_dict=True)
    with pytest.raises(InputError, match="correct use_return_dict there"):
        describe(model)
    assert not caplog.text and capfd.readouterr().err == ""
