"""The text part of a model of text and pictures: taken out, it says what the whole model says of text."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, random_keep, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from wrappers import save_wrapper, wrapper_configs

from nirvana.allocation import Allocation
from nirvana.architectures.wrappers import COMPARED
from nirvana.errors import InputError
from nirvana.plan import Plan
from nirvana.surgery import prune
from nirvana.text_part import PlainModel, write_text_part
from nirvana.walk import Stack, final_hidden_states
from nirvana.weights import INDEX_NAME, WEIGHTS_NAME, model_digest


def test_every_wrapper_that_is_taken_apart_is_compared_here():
    assert wrapper_configs().keys() == COMPARED


@pytest.mark.parametrize("name", sorted(COMPARED))
def test_text_part_equals_the_whole_model_on_text(name, tmp_path):
    """The reference is transformers' own class of the whole model, run on text alone, in stock transformers."""
    whole = save_wrapper(name, tmp_path / "whole", shard_size="60KB")
    write_text_part(whole, tmp_path / "text")
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = AutoModelForImageTextToText.from_pretrained(whole)(input_ids=ids, use_cache=False).logits
        text, told = AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
        got = text(input_ids=ids, use_cache=False).logits
    assert not told["missing_keys"] and not told["unexpected_keys"]
    largest = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-5 * largest
    stack = Stack.open(tmp_path / "text")
    walked = final_hidden_states(stack, ids) @ stack.head_weight().T
    assert (walked - expected).abs().max() <= 1e-5 * largest
    assert (tmp_path / "text" / INDEX_NAME).is_file()  # shards stay shards
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert "vision_config" not in config and config["vocab_size"] == 512
    assert "mrope" not in json.dumps(config)


def renamed(directory, rename):
    tensors = load_file(directory / WEIGHTS_NAME)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, directory / WEIGHTS_NAME, {"format": "pt"})


SPELLINGS = {
    # today's names in the modules, as transformers writes them with save_original_format=False
    "gemma3": lambda name: name.replace("language_model.model.", "model.language_model."),
    # as Qwen published them
    "qwen2_5_vl": lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual."),
    "llava": lambda name: name.replace("language_model.model.", "model.language_model.").replace(
        "language_model.lm_head", "lm_head"
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_old_and_new_names_of_wrappers_are_read(name, tmp_path):
    whole = save_wrapper(name, tmp_path / "whole")
    write_text_part(whole, tmp_path / "text")
    before = load_file(whole / WEIGHTS_NAME).keys()
    renamed(whole, SPELLINGS[name])
    write_text_part(whole, tmp_path / "other")
    one, other = (load_file(tmp_path / part / WEIGHTS_NAME) for part in ("text", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert before != load_file(whole / WEIGHTS_NAME).keys() or name == "qwen2_5_vl"


def test_a_head_that_is_stored_is_the_models_own(tmp_path):
    whole = save_wrapper("mistral3", tmp_path / "whole", tie_word_embeddings=False)
    write_text_part(whole, tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["tie_word_embeddings"] is False
    tied = save_wrapper("mistral3", tmp_path / "tied", tie_word_embeddings=True)
    write_text_part(tied, tmp_path / "text-tied")
    assert json.loads((tmp_path / "text-tied" / "config.json").read_text())["tie_word_embeddings"] is True
    tensors = load_file(whole / WEIGHTS_NAME)
    save_file({n: t for n, t in tensors.items() if "lm_head" not in n}, whole / WEIGHTS_NAME, {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        write_text_part(whole, tmp_path / "headless")
    assert not (tmp_path / "headless").exists()


def test_what_the_library_is_given_names_the_way_out(tmp_path):
    whole = save_wrapper("gemma3", tmp_path / "whole")
    with pytest.raises(InputError, match=r"got a wrapper around a gemma3_text model; its text part can be pruned"):
        Stack.open(whole)


def test_a_text_part_that_lacks_or_has_other_tensors_is_refused(tmp_path):
    whole = save_wrapper("gemma3", tmp_path / "whole")
    tensors = load_file(whole / WEIGHTS_NAME)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file({key: tensors[key] for key in tensors if key != name}, whole / WEIGHTS_NAME, {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        write_text_part(whole, tmp_path / "text")
    extra = name.replace("weight", "lora_A.weight")
    save_file(tensors | {extra: torch.ones(2, 2)}, whole / WEIGHTS_NAME, {"format": "pt"})
    with pytest.raises(InputError, match=r"lora_A\.weight: expected the parameters of a gemma3_text model"):
        write_text_part(whole, tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_text_part_is_pruned_like_any_model(tmp_path):
    whole = save_wrapper("gemma3", tmp_path / "whole")
    tiny_tokenizer().save_pretrained(whole)
    beside = {"License.txt", "COPYING", "spm.spm", "encoder.json", "additional_chat_templates/tool_use.jinja"}
    (whole / "additional_chat_templates").mkdir()
    for name in beside:
        (whole / name).write_text("{}")
    write_text_part(whole, tmp_path / "text")
    written = {file.relative_to(tmp_path / "text").as_posix() for file in (tmp_path / "text").rglob("*")}
    assert written >= beside | {"tokenizer.json"}
    stack = Stack.open(tmp_path / "text")
    sites = stack.architecture.sites()
    plan = Plan.build(
        sites,
        random_keep(sites),
        model_digest=model_digest(tmp_path / "text"),
        model_type="gemma3_text",
        calibration_digest="none",
        allocation=Allocation(0.4),
    )
    prune(tmp_path / "text", plan, tmp_path / "pruned")
    Stack.open(tmp_path / "pruned")
    assert PlainModel.open(tmp_path / "text").is_plain
    with pytest.raises(InputError, match="expected no such path or an empty directory"):
        write_text_part(whole, tmp_path / "text")
