"""One tokenizer: dense, pruned and exported read the same ids, or the model is refused by name.

The witness of what is right is `AutoTokenizer` on the dense directory, and the tokenizers and sentencepiece libraries
themselves, which know nothing of model types.
"""

import json
import shutil

import pytest
import tokenizer_files as files
from exports import run_elsewhere, write_plan
from tiny import family_configs, save_family, tiny_t5, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from nirvana.checkpoint.companions import copy_companions
from nirvana.checkpoint.tokenizer import carry, check_same_ids, read_tokenizer
from nirvana.checkpoint.tokenizer_page import HARD, ORDINARY, ids
from nirvana.errors import InputError
from nirvana.surgery import prune

NUMBERS = "In 1984, 12345"
CLASSES = [
    None,
    "LlamaTokenizerFast",
    "LlamaTokenizer",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "CodeGenTokenizer",
    "GemmaTokenizer",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
]
FAMILIES = sorted({config.model_type for config in family_configs().values()} | {"t5"})


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """Directories of tokenizer files alone, by form and class."""
    root = tmp_path_factory.mktemp("forms")

    def made(form, class_name):
        folder = root / f"{form}-{class_name}"
        if not folder.exists():
            folder.mkdir()
            if form == "json":
                files.byte_level(folder, class_name)
            elif form == "vocab":
                files.vocab_and_merges(folder, class_name)
            elif form == "spiece.model":
                files.sentencepiece(folder, form, class_name, "unigram")
            else:
                files.sentencepiece(folder, form, class_name)
        return folder

    return made


def beside(folder, model_type, target):
    """Copy tokenizer files beside a configuration, which is all that a tokenizer is chosen by."""
    shutil.copytree(folder, target)
    (target / "config.json").write_text(json.dumps({"model_type": model_type}))
    return target


def targets(tmp_path, model_type):
    """Yield empty directories of a pruned and of a stock model."""
    for kind in (f"nirvana_{model_type}", model_type):
        target = tmp_path / kind
        target.mkdir()
        (target / "config.json").write_text(json.dumps({"model_type": kind}))
        yield target


def read_alike(source, tmp_path, model_type):
    """Carry a tokenizer over and compare what AutoTokenizer reads, text by text; return the dense one."""
    tokenizer, dense = read_tokenizer(source), AutoTokenizer.from_pretrained(source)
    for target in targets(tmp_path, model_type):
        carry(source, target, tokenizer)
        found = AutoTokenizer.from_pretrained(target)
        for text in (NUMBERS, *ORDINARY, *HARD):
            for special in (True, False):
                assert ids(found, text, special) == ids(dense, text, special), (target.name, text)
    return dense


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("form", ["json", "tokenizer.model"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_and_form_reads_alike_or_is_refused(model_type, form, class_name, forms, tmp_path):
    source = beside(forms(form, class_name), model_type, tmp_path / "dense")
    try:
        dense = read_alike(source, tmp_path, model_type)
    except InputError as error:
        assert any(reason in str(error) for reason in ("one reading of plain", "the pieces of", "cannot read them"))
        return
    if form == "json":  # then it is the file's own reading, by the library that knows no model type
        witness = Tokenizer.from_file(str(source / "tokenizer.json"))
        assert ids(dense, NUMBERS) == witness.encode(NUMBERS, add_special_tokens=False).ids
        assert ids(dense, NUMBERS, special=True)[0] == 0
    else:
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        found = [token for token in ids(dense, NUMBERS)[1:] if token > 2]
        assert found[0] == pieces.encode(NUMBERS)[1]  # but for a blank before the first word


# what is served by name, so that the test above cannot pass by refusing everything
SERVED = [
    ("mistral", "json", "LlamaTokenizer"),
    ("phi3", "json", "LlamaTokenizerFast"),
    ("phi3", "json", "GPT2Tokenizer"),
    ("granite", "json", "LlamaTokenizer"),
    ("granite", "json", "CodeGenTokenizer"),
    ("mistral", "json", "GemmaTokenizer"),
    ("llama", "json", "PreTrainedTokenizerFast"),
    ("mistral", "tokenizer.model", None),
    ("phi3", "tokenizer.model", "LlamaTokenizer"),
    ("llama", "tokenizer.model", "LlamaTokenizer"),
    ("gemma3_text", "tokenizer.model", None),
    ("qwen2", "vocab", None),
    ("qwen3_moe", "vocab", "Qwen2Tokenizer"),
    ("t5", "spiece.model", None),
    ("t5", "spiece.model", "T5Tokenizer"),
    ("t5", "sentencepiece.bpe.model", "XLMRobertaTokenizer"),
]


@pytest.mark.parametrize(("model_type", "form", "class_name"), SERVED)
def test_these_are_served(model_type, form, class_name, forms, tmp_path):
    source = beside(forms(form, class_name), model_type, tmp_path / "dense")
    assert len(set(ids(read_alike(source, tmp_path, model_type), ORDINARY[1]))) > 50


REFUSED = [
    ("t5", "vocab", None, "missing: spiece.model, tokenizer.json"),
    ("gemma3_text", "spiece.model", None, "expected the pieces of spiece.model"),
    ("qwen2", "sentencepiece.bpe.model", None, "expected the pieces of sentencepiece.bpe.model"),
    ("qwen2", "tokenizer.model", None, "expected the pieces of tokenizer.model"),
    ("phi3", "sentencepiece.bpe.model", None, "transformers cannot read them"),
    ("mistral", "vocab", "GPT2Tokenizer", "transformers cannot read them"),
]


@pytest.mark.parametrize(("model_type", "form", "class_name", "reason"), REFUSED)
def test_what_would_be_unknown_is_refused(model_type, form, class_name, reason, forms, tmp_path):
    with pytest.raises(InputError, match=reason):
        read_tokenizer(beside(forms(form, class_name), model_type, tmp_path / "dense"))


def test_t5_without_its_file_is_refused(tmp_path):
    tiny_t5(tmp_path / "dense")
    for file in (tmp_path / "dense").glob("tokenizer*"):
        file.unlink()
    files.named(tmp_path / "dense", "T5Tokenizer")
    with pytest.raises(InputError, match=r"T5Tokenizer of 104 tokens .* spiece.model"):
        prune(tmp_path / "dense", write_plan(tmp_path, {}), tmp_path / "pruned-again")


@pytest.mark.parametrize(
    ("model_type", "class_name"), [("qwen2", "LlamaTokenizerFast"), ("qwen2", None), ("qwen3", "Qwen2Tokenizer")]
)
def test_two_readings_are_refused_until_one_is_chosen(model_type, class_name, forms, tmp_path):
    source = beside(forms("json", class_name), model_type, tmp_path / "dense")
    with pytest.raises(InputError, match=r"Qwen2Tokenizer .*24 against 42 tokens.*model.tokenizer.*file or class"):
        read_tokenizer(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    witness = Tokenizer.from_file(str(source / "tokenizer.json"))

    def choose(reading):
        (source / "tokenizer_config.json").write_text(json.dumps(config | {"nirvana_reading": reading}))
        return read_tokenizer(source)

    by_class = choose("class")
    assert ids(by_class, NUMBERS) == ids(AutoTokenizer.from_pretrained(source), NUMBERS)
    read_alike(source, tmp_path, model_type)
    for target in (tmp_path / f"nirvana_{model_type}", tmp_path / model_type):
        shutil.rmtree(target)
    as_filed = choose("file")
    assert ids(as_filed, NUMBERS) == witness.encode(NUMBERS, add_special_tokens=False).ids != ids(by_class, NUMBERS)
    pruned, stock = targets(tmp_path, model_type)
    carry(source, pruned, as_filed)
    assert ids(AutoTokenizer.from_pretrained(pruned), NUMBERS) == ids(as_filed, NUMBERS)
    if model_type == "qwen2":  # transformers takes its class for this one whatever the file says
        with pytest.raises(InputError, match="reads others with Qwen2Tokenizer"):
            carry(source, stock, as_filed)
    else:
        carry(source, stock, as_filed)
        assert ids(AutoTokenizer.from_pretrained(stock), NUMBERS) == ids(as_filed, NUMBERS)
    with pytest.raises(InputError, match="nirvana_reading: expected one of file, class"):
        choose("both")


@pytest.mark.parametrize("name", ["mistral", "phi3", "granite", "qwen2"])
def test_checkpoint_and_exports_read_the_dense_ids(name, tmp_path):
    from exports import exported

    dense = save_family(name, tmp_path / "dense")
    files.byte_level(dense, "LlamaTokenizer", nirvana_reading="class")
    prune(dense, write_plan(tmp_path, {}), tmp_path / "pruned")
    exported(tmp_path, "padded", options=None)
    exported(tmp_path, "hf", options=None)
    right = ids(AutoTokenizer.from_pretrained(dense), NUMBERS, special=True)
    for form in ("pruned", "padded", "hf"):
        assert ids(AutoTokenizer.from_pretrained(tmp_path / form), NUMBERS, special=True) == right, form
    assert not set(json.loads((tmp_path / "pruned/tokenizer_config.json").read_text())) & {
        "nirvana_reading",
        "auto_map",
    }


READ = """
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained("pruned", trust_remote_code=True)("In 1984, 12345")["input_ids"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3", "qwen2", "gemma3_text"])
def test_without_nirvana_the_ids_are_the_same(name, tmp_path):
    dense = save_family(name, tmp_path / "dense")
    files.byte_level(dense, "LlamaTokenizer", nirvana_reading="class")
    prune(dense, write_plan(tmp_path, {}), tmp_path / "pruned")
    assert run_elsewhere(READ, tmp_path).strip() == str(
        ids(AutoTokenizer.from_pretrained(dense), NUMBERS, special=True)
    )


def test_another_tokenizer_is_told_from_it(tmp_path, forms):
    tokenizer = read_tokenizer(beside(forms("json", "TokenizersBackend"), "llama", tmp_path / "dense"))
    (pruned, _) = targets(tmp_path, "llama")
    carry(tmp_path / "dense", pruned, tokenizer)
    check_same_ids(tokenizer, pruned)
    description = json.loads((pruned / "tokenizer.json").read_text())
    description["post_processor"] = None
    (pruned / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="tokenizer: expected the dense model's tokens of a page"):
        check_same_ids(tokenizer, pruned)


def test_a_tokenizer_that_cannot_be_had_leaves_nothing(tmp_path):
    dense = save_family("qwen2", tmp_path / "dense")
    files.byte_level(dense, None, nirvana_reading="both")
    with pytest.raises(InputError, match="expected one of file, class"):
        prune(dense, write_plan(tmp_path, {}), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "pruned"]


def test_what_belongs_to_a_model_travels(tmp_path):
    dense = save_family("llama", tmp_path / "dense")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tools": "T {{ messages[0]['content'] }}"}
    tokenizer.save_pretrained(dense)
    carried = [
        "LICENSE",
        "LICENSE.md",
        "NOTICE",
        "license.txt",
        "spiece.model",
        "tekken.json",
        "sentencepiece.bpe.model",
    ]
    left = ["modeling_llama.py", "pytorch_model.bin", "README.md"]
    for name in [*carried, *left]:
        (dense / name).write_text(name)
    (dense / "additional_chat_templates/notes.txt").write_text("not a template")
    prune(dense, write_plan(tmp_path, {}), tmp_path / "pruned")
    names = {file.relative_to(tmp_path / "pruned").as_posix() for file in (tmp_path / "pruned").rglob("*")}
    assert {*carried, "chat_template.jinja", "additional_chat_templates/tools.jinja"} <= names
    assert not names & {*left, "additional_chat_templates/notes.txt"}
    again = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    talk = [{"role": "user", "content": "law"}]
    assert again.apply_chat_template(talk, tokenize=False, chat_template="tools") == "T law"


def test_a_link_to_a_file_elsewhere_is_refused(tmp_path):
    dense = save_family("llama", tmp_path / "dense")
    (tmp_path / "secret").write_text("of this machine")
    (dense / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="link to a file outside"):
        copy_companions(dense, tmp_path / "out")
    with pytest.raises(InputError, match="link to a file outside"):
        prune(dense, write_plan(tmp_path, {}), tmp_path / "new")
    assert not (tmp_path / "new").exists()
