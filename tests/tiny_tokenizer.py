"""A tokenizer as Llama 2's and Vicuna's, in small: spaces as part of words, the first one dropped, bytes as tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

WORDS = ("▁", "▁sky", "▁blue", "blue", "▁is", "é", "▁▁")
SPECIAL = ("<s>", "<unk>", "</s>")  # 256, 257, 258


def metaspace_tokenizer() -> Any:
    """The tokenizer, of as many tokens as `tiny_folder.make_target`'s."""
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(0x21, 0x7F)]
    pieces = [*WORDS, *letters, *(f"<0x{byte:02X}>" for byte in (0x0A, *range(0x80, 0x100)))]
    pieces += [f"▁{letter}" for letter in letters][: 256 - len(pieces)]
    scores = [(piece, -1.0 if piece in WORDS else -2.0) for piece in (*pieces, *SPECIAL)]
    backend = Tokenizer(models.Unigram(scores, unk_id=257, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
