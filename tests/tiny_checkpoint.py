"""A small converted model of random weights, written without converting anything."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from torq_jax import checkpoint, mxfp4
from torq_jax.config import SITES, DecoderConfig
from torq_jax.decoder import SiteFormat

CONFIG = DecoderConfig(
    architecture="qwen3",
    vocab_size=288,
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_heads=16,
    num_kv_heads=8,
    head_dim=16,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    max_position_embeddings=128,
    tie_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    qk_norm=True,
    bos_token_id=0,
    eos_token_ids=(1,),
)


def write(path, *, group=2, activation_scale="even", **changes):
    """Write it; ``group`` blocks are mixed, position by position, and every block has its own matrix."""
    config = dataclasses.replace(CONFIG, **changes)
    rng = np.random.default_rng(0)
    forms = {}
    path.mkdir(parents=True)
    writer = checkpoint.CheckpointWriter(path)
    for index in range(config.num_layers):
        layer = {name: np.ones(config.hidden_size, np.float32) for name in ("attn_in_norm", "mlp_in_norm")}
        layer |= {name: np.ones(config.head_dim, np.float32) for name in ("q_norm", "k_norm")}
        for site in SITES:
            features = config.site_in_features(site)
            blocks = features // 32
            inter = _orthogonal(rng, 32, blocks // group, group, group)
            intra = _orthogonal(rng, blocks, 32, 32)
            forms[site] = SiteFormat("mxfp4", "mse", activation_scale, inter.shape, intra.shape)
            layer[site] = {"inter": inter, "intra": intra}
            for name, outputs in config.site_out_features(site).items():
                weight = rng.normal(size=(outputs, features)) / np.sqrt(features)
                packed = mxfp4.quantize(jnp.asarray(weight, jnp.float32), "mse")
                layer[site] |= {f"{name}_codes": packed.codes, f"{name}_scales": packed.scales}
        writer.layer(index, layer)
    for name in ("embed", "lm_head"):
        table = rng.normal(size=(config.vocab_size, config.hidden_size)) / np.sqrt(config.hidden_size)
        writer.outer(name, table.astype(np.float32))
    writer.outer("norm", np.ones(config.hidden_size, np.float32))
    writer.manifest(
        {"config": config.to_json(), "sites": {site: form.to_json() for site, form in forms.items()}}
    )
    return path


def _orthogonal(rng, *shape):
    return np.linalg.qr(rng.normal(size=shape))[0].astype(jnp.bfloat16)
