"""Write the golden models: tiny random decoders with Hugging Face's own weights files, logits and tokens.

The test-suite compares ours with what Hugging Face's code computed, and needs neither torch nor network for
it. To make the files again (any environment with the two packages, they are not needed elsewhere):

    pip install torch transformers
    python tests/goldens/make_goldens.py [NAME ...]

Every directory holds what ``save_pretrained`` writes (config.json, safetensors in one file or in shards, a
tokenizer) and ``golden.npz``:

    tokens    int32   [2, 24]      random ids
    logits    float32 [2, 24, V]   of the weights as stored, computed in float32 with eager attention
    prompt    int32   [6]
    generated int32   [8]          greedy continuation of the prompt, never closer than 0.1 to another

The weights are drawn large (standard deviation 0.2, norms 1 + 0.2 n, biases too), so that a mistake anywhere
moves the logits by far more than rounding does.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

HERE = pathlib.Path(__file__).parent
VOCABULARY = 288
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|user|>", "<|assistant|>")
BOS, EOS = 0, 1

SENTENCES = (
    "The rotation mixes the blocks and the weight takes the same rotation once.",
    "A block of thirty-two values shares one scale, and the scale is a power of two.",
    "The error of the block is proportional to its energy, whatever that energy is.",
    "There is nothing in the text that the tokenizer has not seen before.",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

# name -> (class, configuration, dtype of the file, size of a shard or None)
GOLDENS = {
    # With 16 original positions the three branches of the llama3 scaling all matter within 24 tokens: the
    # wavelengths of head_dim 16 are 6.3 (interpolated), 32 and more (divided by the factor).
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig(
            **COMMON,
            intermediate_size=128,
            num_hidden_layers=2,
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        torch.float32,
        None,
    ),
    "llama3-tied": (
        LlamaForCausalLM,
        LlamaConfig(
            **COMMON,
            intermediate_size=128,
            num_hidden_layers=3,
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
        torch.bfloat16,
        "100KB",
    ),
    # head_dim 32 while hidden / heads is 16; an intermediate size that is no power of two.
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(
            **COMMON,
            intermediate_size=96,
            head_dim=32,
            num_hidden_layers=2,
            tie_word_embeddings=False,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        torch.float32,
        None,
    ),
    "qwen3-tied": (
        Qwen3ForCausalLM,
        Qwen3Config(
            **COMMON,
            intermediate_size=96,
            head_dim=32,
            num_hidden_layers=3,
            tie_word_embeddings=True,
            attention_bias=True,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        torch.float16,
        None,
    ),
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **COMMON,
            intermediate_size=160,
            moe_intermediate_size=96,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            head_dim=32,
            num_hidden_layers=2,
            tie_word_embeddings=False,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        torch.bfloat16,
        None,
    ),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly VOCABULARY tokens: the special ones, the 256 bytes and a few merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS], model_max_length=128
    )
    fast.chat_template = CHAT_TEMPLATE
    if len(fast) != VOCABULARY:
        raise SystemExit(f"the tokenizer has {len(fast)} tokens, the models {VOCABULARY}")
    return fast


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Every parameter 0.2 n, norms 1 + 0.2 n; tied parameters are drawn once."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)


def make(name: str, seed: int) -> None:
    """Write one golden directory and check what was written by loading it again."""
    model_class, config, dtype, shard = GOLDENS[name]
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config)
    randomise(model, generator)
    model = model.to(dtype)
    model.save_pretrained(directory, **({} if shard is None else {"max_shard_size": shard}))
    tokenizer().save_pretrained(directory)

    stored = model_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=generator)
    stored.generation_config.eos_token_id = None  # an accidental end of text must not shorten the answer
    with torch.no_grad():
        logits = stored(tokens).logits
        margin = 0.0
        while margin < 0.1:  # a prompt whose greedy answer no rounding can change
            prompt = torch.randint(0, VOCABULARY, (6,), generator=generator)
            answer = stored.generate(
                prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, max_new_tokens=8
            )[0]
            best = stored(answer[None]).logits[0, 5:13].topk(2).values
            margin = float((best[:, 0] - best[:, 1]).min())
    generated = answer[6:]
    if len(generated) != 8:
        raise SystemExit(f"{name}: {len(generated)} tokens were generated, not 8")
    np.savez(
        directory / "golden.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy().astype(np.float32),
        prompt=prompt.numpy().astype(np.int32),
        generated=generated.numpy().astype(np.int32),
    )
    sizes = [file.stat().st_size for file in directory.iterdir()]
    summary = {"name": name, "files": len(sizes), "bytes": sum(sizes), "logits_std": float(logits.std())}
    print(json.dumps(summary | {"closest_runner_up": margin}))


if __name__ == "__main__":
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for number, golden in enumerate(GOLDENS):
        if not sys.argv[1:] or golden in sys.argv[1:]:
            make(golden, seed=2 + number)
