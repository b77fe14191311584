"""Run a GGUF file in llama.cpp (the `xllamacpp` package) and return what it says.

It runs in a process of its own: llama.cpp ends its process when a file confuses it, and its logs go where they like.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nirvana.errors import InputError

_LOWEST = -1e30
"""llama.cpp writes its lowest float for a probability that has become zero."""
_TIMEOUT_SECONDS = 3600
LIKELIEST = 4096
"""Tokens asked for at most positions: llama.cpp sorts and spells what it tells, 0.1 s against 1.1 s for 49,152."""


def is_installed() -> bool:
    """Tell whether llama.cpp is at hand."""
    return importlib.util.find_spec("xllamacpp") is not None


def log_probabilities(
    file: Path, ids: Sequence[int], positions: NDArray[np.int64], vocab_size: int
) -> NDArray[np.float32]:
    """Return log-probabilities of the next token, [positions, vocab].

    The whole vocabulary at the last position; -inf for all but the `LIKELIEST` tokens at the others.

    Raises:
        InputError: If llama.cpp cannot run the file.
    """
    request = {"ids": list(ids), "positions": positions.tolist(), "vocab_size": vocab_size}
    return _ask(file, request)["log_probabilities"]


def greedy_tokens(file: Path, ids: Sequence[int], count: int) -> list[int]:
    """Return the most likely continuation of a prompt, `count` tokens.

    Raises:
        InputError: If llama.cpp cannot run the file.
    """
    return _ask(file, {"ids": list(ids), "count": count})["tokens"].tolist()


def tokenize(file: Path, text: str) -> list[int]:
    """Return the tokens that llama.cpp cuts a text into.

    Raises:
        InputError: If llama.cpp cannot run the file.
    """
    return tokenize_each(file, [text])[0]


def tokenize_each(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens that llama.cpp cuts each of several texts into.

    Raises:
        InputError: If llama.cpp cannot run the file.
    """
    answer = _ask(file, {"ids": [0], "texts": list(texts)})
    ends = answer["lengths"].cumsum()
    return [part.tolist() for part in np.split(answer["tokens"], ends[:-1])]


def _ask(file: Path, request: dict[str, Any]) -> dict[str, NDArray[Any]]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.safetensors"
        question = json.dumps(request | {"file": str(file), "answer": str(answer)})
        command = [sys.executable, "-m", "nirvana.export.llama_cpp"]
        try:
            done = subprocess.run(
                command, input=question, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(f"{file}: expected an answer of llama.cpp, got none in an hour; try again") from error
        if done.returncode != 0 or not answer.is_file():
            log = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
            cause = " ".join((log or ["no message"])[0].split())[:200]
            raise InputError(
                f"{file.name}: expected a file that llama.cpp can run, got exit status {done.returncode} ({cause})"
            )
        return load_file(answer)


class _Server:
    """llama.cpp with one file loaded; lives in the process that `_ask` starts."""

    def __init__(self, file: str, context: int):
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = file
        parameters.n_ctx = context
        parameters.n_gpu_layers = 0
        parameters.warmup = False
        parameters.fit_params = False
        parameters.use_jinja = False
        # its threads wait for one another without sleeping: with two on a busy machine, 100 s instead of 2
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        # a cache in full precision: what is compared is the file
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(parameters)
        self._letter = self.tokenize("a", add_special=False)[-1]

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Return a text's tokens: what the bindings do not offer but their server on the loopback does."""
        body = json.dumps({"content": text, "add_special": add_special}).encode()
        asked = urllib.request.Request(  # noqa: S310
            f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as reply:
            return json.load(reply)["tokens"]

    def likeliest(self, prompt: list[int], count: int) -> list[dict[str, Any]]:
        """Return the `count` likeliest next tokens; what one prompt shares with the last is computed once.

        llama.cpp says nothing of a token that is part of a character, or ends the text. So it is made to choose a
        letter: the log-probabilities that it reports are those before the choice.
        """
        request = {"prompt": prompt, "n_predict": 1, "n_probs": count, "logit_bias": [[self._letter, 1e6]]}
        (choice,) = self._server.handle_completions(request | {"temperature": 0.0})["choices"]
        return choice["logprobs"]["content"][0]["top_logprobs"]


def _answer(server: _Server, question: dict[str, Any]) -> dict[str, NDArray[Any]]:
    ids, vocab_size = question["ids"], question.get("vocab_size", 0)
    if "texts" in question:
        rows = [server.tokenize(text) for text in question["texts"]]
        flat = [token for row in rows for token in row]
        return {"tokens": np.array(flat, dtype=np.int64), "lengths": np.array([len(row) for row in rows])}
    if "count" in question:
        tokens: list[int] = []
        while len(tokens) < question["count"]:
            tokens.append(server.likeliest(ids + tokens, 1)[0]["id"])
        return {"tokens": np.array(tokens, dtype=np.int64)}
    values = np.full((len(question["positions"]), vocab_size), -np.inf, dtype=np.float32)
    for row, position in zip(values, question["positions"], strict=True):
        count = vocab_size if position == question["positions"][-1] else min(vocab_size, LIKELIEST)
        for entry in server.likeliest(ids[: position + 1], count):
            if entry["logprob"] > _LOWEST:
                row[entry["id"]] = entry["logprob"]
    return {"log_probabilities": values}


def _main() -> NoReturn:
    """Answer one question and end the process."""
    question = json.load(sys.stdin)
    server = _Server(question["file"], len(question["ids"]) + question.get("count", 0) + 8)
    status = 0
    try:
        save_file(_answer(server, question), question["answer"])
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # not by returning: the server's destructor now and then waits for ever for a thread that listens
    os._exit(status)


if __name__ == "__main__":
    _main()
