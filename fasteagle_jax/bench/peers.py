"""Other programs that decode the same target, beside the engine in `fasteagle bench --sweep slots --beside`.

They run on the CPU, and sample with noise of their own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fasteagle_jax.engine.requests import SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line

PEERS = ("transformers", "transformers:bfloat16", "llama.cpp")
INSTALL = {
    "torch": "pip install torch --index-url https://download.pytorch.org/whl/cpu",
    "llama_cpp": "pip install llama-cpp-python, which compiles it",
}


class Peer(Protocol):
    """A program that answers prompts of tokens."""

    most_rows: int | None  # that it decodes at once; None for any number

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, rows: int) -> list[list[int]]:
        """The new tokens of each answer, with the one that ends it, `rows` of them at a time."""
        ...


def load_peer(name: str, target: Path, stop_tokens: Sequence[int], max_len: int) -> Peer:
    """One of PEERS with the weights of a checkpoint's folder or GGUF file; UserError where it is not installed."""
    package = "llama_cpp" if name == "llama.cpp" else "torch"
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--beside {name} needs {package}: {INSTALL[package]}")
    try:
        if name == "llama.cpp":
            return LlamaCpp(target, stop_tokens, max_len)
        return Transformers(target, name.partition(":")[2] or "float32", stop_tokens)
    except (ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--beside {name} cannot read {target} ({first_line(error)}): leave it out") from error


class Transformers:
    """`generate` of transformers with torch: batches of so many prompts, padded on the left, one after the other."""

    most_rows: int | None = None

    def __init__(self, target: Path, dtype: str, stop_tokens: Sequence[int]):
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        is_file = target.is_file()
        place = (target.parent, {"gguf_file": target.name}) if is_file else (target, {})
        self.model: Any = AutoModelForCausalLM.from_pretrained(place[0], dtype=getattr(torch, dtype), **place[1]).eval()
        self.model.generation_config = GenerationConfig()  # no penalties or filters of the model's own
        self.stop_tokens = list(stop_tokens)

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, rows: int) -> list[list[int]]:
        """As of Peer."""
        answers: list[list[int]] = []
        for start in range(0, len(prompts), rows):
            answers += self._batch(prompts[start : start + rows], params)
        return answers

    def _batch(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        import torch

        size = max(map(len, prompts))
        pad = self.stop_tokens[0]
        ids = torch.tensor([[pad] * (size - len(prompt)) + list(prompt) for prompt in prompts])
        seen = torch.tensor([[0] * (size - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampled = params.temperature > 0
        settings: dict[str, Any] = {"do_sample": sampled, "max_new_tokens": params.max_new_tokens}
        settings |= {"temperature": params.temperature, "top_k": 0} if sampled else {"temperature": None, "top_k": None}
        settings |= {"top_p": None, "eos_token_id": self.stop_tokens, "pad_token_id": pad}
        with torch.no_grad():
            made = self.model.generate(input_ids=ids, attention_mask=seen, **settings)[:, size:].tolist()
        return [until_end(row, self.stop_tokens) for row in made]


class LlamaCpp:
    """llama.cpp with a GGUF file at its own precision, on all cores, one prompt after the other."""

    most_rows: int | None = 1

    def __init__(self, target: Path, stop_tokens: Sequence[int], max_len: int):
        from llama_cpp import Llama

        if not target.is_file():
            raise UserError(f"--beside llama.cpp reads a GGUF file and {target} is none: leave it out for this target")
        self.model: Any = Llama(str(target), n_ctx=max_len, n_threads=os.cpu_count(), verbose=False)
        self.stop_tokens = list(stop_tokens)

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, rows: int) -> list[list[int]]:
        """As of Peer."""
        answers = []
        for prompt in prompts:
            self.model.reset()
            made: list[int] = []
            for token in self.model.generate(list(prompt), temp=params.temperature, top_k=0, top_p=1.0, min_p=0.0):
                made.append(int(token))
                if token in self.stop_tokens or len(made) == params.max_new_tokens:
                    break
            answers.append(made)
        return answers


def until_end(tokens: Sequence[int], stop_tokens: Sequence[int]) -> list[int]:
    """The tokens to the first of `stop_tokens`, with it: of a row that others of its batch outlast."""
    ends = [i for i, token in enumerate(tokens) if token in stop_tokens]
    return list(tokens[: ends[0] + 1] if ends else tokens)
