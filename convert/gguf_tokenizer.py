"""A transformers tokenizer from the metadata of a GGUF file.

transformers can read these itself, but only where torch is installed. The pieces are standard: byte-level
byte-pair merges behind one of a few known splits of the text into words, which llama.cpp names in
``tokenizer.ggml.pre``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from torq_jax.errors import ConversionError

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types

# The split expressions that the models' own tokenizer.json files carry.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pre_tokenizer(name: str | None) -> pre_tokenizers.PreTokenizer | None:
    if name in ("smollm", "refact", "starcoder"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in ("llama-bpe", "llama3", "llama-v3"):
        return _split(_LLAMA3_SPLIT)
    if name == "qwen2":
        return _split(_QWEN2_SPLIT)
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return None  # "default" among them: files from before the name was written, whose split nobody knows


def build(metadata: Mapping[str, Any], where: str) -> Any:
    """The tokenizer that a GGUF file describes, as a ``PreTrainedTokenizerFast``.

    Args:
      metadata: the file's key-value pairs.
      where: the file's name, for errors.

    Raises:
      ConversionError: no tokenizer in the file, one of a kind that is not supported, or a damaged one.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if kind != "gpt2" or not tokens or merges is None:
        raise ConversionError(
            f"{where}: tokenizer model {kind!r} is not supported: must be byte-level BPE ('gpt2'); convert "
            "from the model's safetensors instead, or pass --calibration random"
        )
    split = _pre_tokenizer(pre)
    if pre is None or split is None:
        raise ConversionError(
            f"{where}: tokenizer.ggml.pre {pre!r} is not supported: must be one of smollm, llama-bpe, qwen2, "
            "gpt-2; convert from the model's safetensors instead, or pass --calibration random"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [_pair(merge, vocabulary, where) for merge in merges]
    # llama.cpp takes a word that is a token as it is for Llama 3, as tokenizer.json's ignore_merges does.
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre.startswith("llama")))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise ConversionError(f"{where}: the tokenizer has {len(tokens)} tokens but {len(kinds)} token types")
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == _CONTROL
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED]
    )
    return _wrap(tokenizer, tokens, metadata)


def _pair(merge: Any, vocabulary: Mapping[str, int], where: str) -> tuple[str, str]:
    # The library that takes the merges panics at bad ones, or names neither the file nor the merge.
    parts = tuple(merge.split(" ")) if isinstance(merge, str) else ()
    if len(parts) != 2 or not all(parts):
        raise ConversionError(
            f"{where}: the tokenizer's merge {merge!r} must be two tokens with a space between: the file is "
            "damaged: fetch it again"
        )
    for token in (*parts, "".join(parts)):
        if token not in vocabulary:
            raise ConversionError(
                f"{where}: the tokenizer's merge {merge!r} needs the token {token!r}, which is not in its "
                "vocabulary: the file is damaged: fetch it again"
            )
    return parts


def _wrap(tokenizer: Tokenizer, tokens: list[str], metadata: Mapping[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    special = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None and 0 <= int(index) < len(tokens):
            special[f"{ours}_token"] = tokens[int(index)]
    # Where the file does not say, llama.cpp begins a text with BOS for Llama 3, as its tokenizer.json does.
    add_bos = metadata.get("tokenizer.ggml.add_bos_token")
    if add_bos is None:
        add_bos = str(metadata["tokenizer.ggml.pre"]).startswith("llama")
    if add_bos and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.Sequence(
            [
                tokenizer.post_processor,
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
                ),
            ]
        )
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    if template := metadata.get("tokenizer.chat_template"):
        built.chat_template = template
    return built
