"""What error messages advise: keys that exist, and never to delete what a user wrote."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from tasks.params import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
KEYS = {f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in fields(kind)}
_DOTTED = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z_]+)\b(?!\()")
_FILES = ("json", "csv", "html", "py", "yaml", "log", "safetensors", "jsonl", "txt", "embed_tokens", "norm", "layers")
_DELETE = re.compile(r"\b(delete|erase|rm -|(remove|clear) (it|them|the|this|that|your))\b", re.IGNORECASE)


def messages() -> Iterator[tuple[str, str]]:
    """Yield where and what every text is that ends in an InputError, a refusal or a line for the user."""
    for package in ("nirvana", "tasks", "flows"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = ast.unparse(node.func)
                if not re.search(r"(InputError|ValueError|StepFailedError|refused|_fail)$", name):
                    continue
                text = " ".join(_text(part) for part in [*node.args, *(word.value for word in node.keywords)])
                yield f"{file.relative_to(ROOT)}:{node.lineno}", text


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return " ".join(_text(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))


MESSAGES = list(messages())


def test_there_are_messages_to_look_at() -> None:
    assert len(MESSAGES) > 150
    assert any("calibration.add_bos" in text for _, text in MESSAGES)


def test_every_key_that_a_message_names_exists() -> None:
    named = [
        (where, f"{section}.{key}")
        for where, text in MESSAGES
        for section, key in _DOTTED.findall(text)
        if key not in _FILES and not where.startswith("nirvana/plan.py")  # a plan's own keys
    ]
    assert len(named) > 40
    assert [(where, key) for where, key in named if key not in KEYS] == []


def test_no_message_advises_to_delete() -> None:
    assert [(where, text) for where, text in MESSAGES if _DELETE.search(text)] == []


@pytest.mark.parametrize("text", ["lower calibration.sequence", "set saliency.metod"])
def test_the_scan_finds_what_it_is_for(text: str) -> None:
    ((section, key),) = _DOTTED.findall(text)
    assert f"{section}.{key}" not in KEYS


def test_a_draw_that_cannot_be_had_names_the_keys_to_lower() -> None:
    """ "lower one batch for compensation" is no key."""
    import numpy as np

    from nirvana.errors import InputError
    from tasks import sample_pool
    from tasks.corpus.documents import Document
    from tasks.params import load_params

    params = load_params(ROOT / "params.yaml")
    encoder = sample_pool.Encoder(None, 10, None, {"a": np.zeros(300, dtype=np.int64)})
    for call in (
        lambda: sample_pool.draw_heldout(params.calibration, [Document("a", "")], encoder),
        lambda: sample_pool.draw_compensation(params, [Document("a", "")], encoder, 50),
    ):
        with pytest.raises(InputError) as caught:
            call()
        advice = str(caught.value).partition("; ")[2]
        assert "one " not in advice and set(re.findall(r"[a-z]+\.[a-z_]+", advice)) <= KEYS
