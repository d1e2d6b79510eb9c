"""A FastEagle drafter's folder read and run in plain torch, for those who bring FastEagle to another server.

docs/format.md says what a folder holds. This is the arithmetic, without a cache or a tree: the logits of all levels at
all positions of a text, given the true tokens before each guess. The target gives its features, embedding and head and,
for a drafter that reads them, the keys and values of one layer.

T stream positions · N levels · F feature layers · H hidden width · V draft vocabulary · K heads of K/V · D head width.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

FORMAT = 2


class FastEagle:
    """The drafter in a folder, in float32."""

    def __init__(self, folder: str | Path):
        self.config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
        if self.config["architectures"] != ["FastEagleDrafter"] or self.config.get("format", 1) > FORMAT:
            raise ValueError(f"{folder} is no FastEagle drafter of format {FORMAT} or older")
        stored = load_file(Path(folder) / "model.safetensors")
        scales = {name[: -len("_scale")]: x for name, x in stored.items() if name.endswith(("_scale", ".scale"))}
        self.weights = {name: x.float() * scales.get(name, 1.0) for name, x in stored.items()}  # int8: a scale a row
        ids = stored.get("token_ids")
        self.token_ids = torch.arange(self.config["vocab_size"]) if ids is None else ids.long()

    def logits(
        self,
        features: Tensor,
        next_tokens: Tensor,
        embedding: Tensor,
        head: Tensor,
        context: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The logits [N, T, V] of the tokens `token_ids`: of level i, from 1, at position t for x[t+1+i].

        Args:
          features: [T, F*H], inputs of the target's `feature_layers` at x[t], concatenated low to high.
          next_tokens: x[t+1], int64 [T].
          embedding, head: the target's, a row a token. Its own map of logits (a cap, a scale) is left to the caller.
          context: for `context` "target" keys (rotated) and values [K, T, D] of x[t] in its layer `context_layer`.

        Of level i the last i - 1 positions are given tokens past the end, and mean nothing.
        """
        c = self.config
        g = self._matmul("fc", features)
        read = [g, embedding[next_tokens]]
        if c.get("norm_inputs"):
            read = [self._norm(x) for x in read]
        fused = self._matmul("fuse", torch.cat(read, dim=-1))
        h, result, first = fused, [], None
        rows = self.weights.get("head.weight", head[self.token_ids])  # a head of its own, whose logits no map changes
        for i in range(c["num_levels"]):
            level = f"levels.{i}"
            layer = level if f"{level}.self_attn.q_proj.weight" in self.weights else "shared"
            if c.get("reinject"):
                h = h + self._matmul(f"{level}.reinject", self._norm(fused))
            x = self._norm(h, f"{level}.input_layernorm")
            if c.get("context") == "shared":  # what the first level made at earlier positions
                first = context = first or self._qkv(layer, x, 0)[1:]
            attended = self._attention(layer, x, context)
            if c.get("side_by_side"):
                h = h + attended + self._mlp(layer, self._norm(h, f"{level}.post_attention_layernorm"))
            else:
                h = h + attended
                h = h + self._mlp(layer, self._norm(h, f"{level}.post_attention_layernorm"))
            # Embeddings of the tokens before the guess [T, J, H], the nearest first, zero for those before x[t+1].
            before = [torch.roll(embedding[next_tokens], j - i, 0) if j <= i else g * 0 for j in range(self._reach)]
            corrected = h if not c.get("correction") else self._corrected(h, before[0])
            logits = self._norm(corrected, f"{level}.norm") @ rows.T
            if c.get("edges"):
                logits = logits + self._edges(h, torch.stack(before, dim=1))
            result.append(logits)
        return torch.stack(result)

    @property
    def _reach(self) -> int:
        return self.config.get("edges_reach", 1)

    def _matmul(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def _norm(self, x: Tensor, name: str = "") -> Tensor:
        """RMSNorm, with the gain of this name or none."""
        normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return normed * self.weights[f"{name}.weight"] if name else normed

    def _mlp(self, layer: str, x: Tensor) -> Tensor:
        gated = silu(self._matmul(f"{layer}.mlp.gate_proj", x)) * self._matmul(f"{layer}.mlp.up_proj", x)
        return self._matmul(f"{layer}.mlp.down_proj", gated)

    def _corrected(self, h: Tensor, e: Tensor) -> Tensor:
        """States corrected by the token before the guess."""
        of_state = self._matmul("correction.of_state", self._norm(h))
        of_token = self._matmul("correction.of_token", self._norm(e))
        return h + self._matmul("correction.to_state", silu(of_state + of_token))

    def _edges(self, h: Tensor, e: Tensor) -> Tensor:
        """Scores [T, V] of tokens after those before: <(A e) * (P h), B[v]>; gated, A e is silu(A e + G h)."""
        of_path = self._matmul("edges.of_token", self._norm(e).flatten(1))
        if self.config.get("edges_gated"):
            of_path = silu(of_path + self._matmul("edges.gate", self._norm(h)))
        return of_path * self._matmul("edges.of_state", self._norm(h)) @ self.weights["edges.table.weight"].T

    def _qkv(self, layer: str, x: Tensor, ahead: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [heads, T, D] of x [T, H], at positions t + `ahead`."""
        split = len(x), -1, self.config["head_dim"]
        q, k, v = (self._matmul(f"{layer}.self_attn.{n}_proj", x).view(split).transpose(0, 1) for n in "qkv")
        if self.config.get("qk_norm"):
            q, k = self._norm(q, f"{layer}.self_attn.q_norm"), self._norm(k, f"{layer}.self_attn.k_norm")
        return self._rotate(q, ahead), self._rotate(k, ahead), v

    def _attention(self, layer: str, x: Tensor, context: tuple[Tensor, Tensor] | None) -> Tensor:
        c, T = self.config, len(x)
        K, D = c["num_kv_heads"], c["head_dim"]
        of_target = c.get("context") == "target"
        q, k, v = self._qkv(layer, x, int(of_target))
        q = q.view(K, -1, T, D)  # query heads by the K/V head that they share
        scale = c.get("attention_scale") or D**-0.5
        distance = torch.arange(T)[:, None] - torch.arange(T)
        window = c.get("window") or T + 1
        if context is None:  # its own keys at 0..t
            scores = q @ k[:, None].transpose(-1, -2)
            seen = (distance >= 0) & (distance < window)
            values = v
        else:  # the target's at 0..t, then its own at its own position, t + 1; or the first level's before its own, t
            itself = (q * k[:, None]).sum(-1, keepdim=True)
            scores = torch.cat([q @ context[0][:, None].transpose(-1, -2), itself], dim=-1)
            given = (distance >= 1 - of_target) & (distance < window - of_target)
            seen = torch.cat([given, torch.ones(T, 1, dtype=torch.bool)], dim=1)
            values = context[1]
        scores = scores * scale
        if cap := c.get("soft_cap"):
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~seen, -math.inf)  # [K, G, T, T or T + 1]
        if c.get("sinks"):  # a score of each query head that takes part and has no value
            sinks = self.weights[f"{layer}.self_attn.sinks.weight"].view(K, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(dim=-1)
        attended = weights[..., :T] @ values[:, None]
        if context is not None:
            attended = attended + weights[..., T : T + 1] * v[:, None]
        return self._matmul(f"{layer}.self_attn.o_proj", attended.reshape(-1, T, D).transpose(0, 1).reshape(T, -1))

    def _rotate(self, x: Tensor, ahead: int) -> Tensor:
        """x [heads, T, D] with channels d and d + D/2 rotated as a pair, at positions t + `ahead`."""
        rope, D = self.config["rope"], x.shape[-1]
        if rope is None:
            return x
        if rope["kind"] not in ("default", "linear", "llama3") or rope.get("partial", 1.0) != 1.0:
            raise NotImplementedError(f"rope of kind {rope['kind']} is left out of this example")
        freqs = rope["theta"] ** (-torch.arange(0, D, 2) / D)
        if rope["kind"] == "linear":
            freqs = freqs / rope["factor"]
        elif rope["kind"] == "llama3":
            turns = rope["original_max_positions"] * freqs / (2 * math.pi)
            keep = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            keep = keep.clamp(0, 1)
            freqs = keep * freqs + (1 - keep) * freqs / rope["factor"]
        angles = (torch.arange(x.shape[1]) + ahead)[:, None] * freqs
        a, b = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
