"""Grammars: which tokens may come next in an answer that has to follow a JSON schema or a regular expression.

M nodes · V vocabulary. llguidance, of the extra `grammar`, decides on the host; a mask is a bit a token, uint32 [V/32].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fasteagle_jax.decoding.tree import NO_PARENT
from fasteagle_jax.errors import UserError


def everything_allowed(shape: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Masks uint32 [B, M, V/32] that ban nothing, for nodes of `shape` [B, M]."""
    return np.full((*shape, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)


def unpacked(mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """A mask as bool [V]."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size].astype(bool)


class Grammars:
    """Compiles grammars for a tokenizer, which is prepared for the first of them (about a second)."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, list(eos_token_ids)
        self._prepared: Any = None

    def compiled(self, structured_outputs: Mapping[str, Any] | None, name: str) -> str | None:
        """A grammar for `matcher`, None for none; UserError, with the prompt's name, for what is no grammar."""
        if structured_outputs is None:
            return None
        ((kind, value),) = structured_outputs.items()
        llguidance = self._prepare(name)
        try:
            if kind == "regex":
                grammar: str = llguidance.LLMatcher.grammar_from_regex(value)
            else:
                schema = {"type": "object"} if kind == "json_object" else value
                text = schema if isinstance(schema, str) else json.dumps(schema)
                grammar = llguidance.LLMatcher.grammar_from_json_schema(text)
            error = llguidance.LLMatcher.validate_grammar(grammar, self._prepared)
        except (ValueError, TypeError) as failed:
            error = str(failed)
        if error and not error.startswith("WARNING"):
            what = {"json": "JSON schema", "regex": "regular expression", "json_object": "JSON schema"}[kind]
            raise UserError(f"{name}: structured_outputs.{kind} is no {what} ({' '.join(error.split())}): mend it")
        return grammar

    def matcher(self, grammar: str) -> Matcher:
        """A Matcher at the beginning of an answer."""
        import llguidance

        return Matcher(llguidance.LLMatcher(self._prepared, grammar), self._eos)

    def _prepare(self, name: str) -> Any:
        try:
            import llguidance
            import llguidance.hf
        except ModuleNotFoundError:
            raise UserError(
                f"{name}: structured_outputs need llguidance: pip install 'fasteagle-jax[grammar]'"
            ) from None
        if not self._eos:
            raise UserError(f"{name}: structured_outputs need a token that ends an answer, and the target has none")
        if self._prepared is None:
            sizes: dict[str, Any] = {"n_vocab": self._vocab_size, "eos_token": self._eos}
            try:
                self._prepared = llguidance.hf.from_tokenizer(self._tokenizer, **sizes)
            except ValueError as error:
                said = " ".join(str(error).split())
                raise UserError(f"{name}: llguidance does not take the target's tokenizer ({said})") from None
        return llguidance


class Matcher:
    """A grammar at a place of its answer."""

    def __init__(self, matcher: Any, eos_token_ids: Sequence[int]) -> None:
        self._matcher, self._eos = matcher, frozenset(eos_token_ids)

    def consume(self, token: int) -> None:
        """Goes on by a token of the answer, which the mask here allows."""
        self._matcher.consume_token(token)
        self._check()

    def mask(self) -> np.ndarray:
        """The tokens that may come next, one of those that end the answer among them where it is complete."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return mask

    def _check(self) -> None:
        """Raises UserError where llguidance gave up: a grammar went beyond its limits."""
        if self._matcher.is_error():
            said = " ".join(self._matcher.get_error().split())
            raise UserError(f"structured_outputs cannot be followed further ({said}): simplify them")

    def masks(self, tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
        """The masks uint32 [M, V/32] after each node of a tree int32 [M], whose root ends the answer so far.

        A node that its parent bans, or where the answer ends, is never walked through; its mask does not matter. Nor
        does that of a guess with which the grammar goes beyond its limits: `consume` raises if the target chooses it.
        """
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents.tolist()):
            if parent != NO_PARENT:
                children.setdefault(parent, []).append(node)
        root = self.mask()
        found = np.zeros((len(tokens), len(root)), np.uint32)
        at_root = self._matcher.deep_copy()  # one that has failed does not go back

        def visit(node: int, mask: np.ndarray, path: list[int]) -> None:
            found[node] = mask
            for child in children.get(node, ()):
                token = int(tokens[child])
                allowed = token >= 0 and (int(mask[token // 32]) >> (token % 32)) & 1
                if not allowed or token in self._eos:
                    continue
                try:
                    self.consume(token)
                    below = self.mask()
                except UserError:
                    self._matcher = at_root.deep_copy()
                    self._matcher.consume_tokens(path)
                    continue
                visit(child, below, [*path, token])
                self._matcher.rollback(1)

        visit(0, root, [])
        return found
