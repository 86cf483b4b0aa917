"""Fine-tune norms and scales of a converted model against its float original: finetune.py MODEL FLOAT [STEPS].

MODEL is a W4A4 checkpoint, FLOAT the same model converted with ``--method none --weights bf16 --activations bf16``.
Codes, scales of blocks and embeddings stay as they are. Trained are the norms and, where a transform runs online, a
factor for each feature that it writes: a column of its matrix. Gradients pass the casts straight through.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import torq_jax
from torq_jax import data, evaluate
from torq_jax.config import SITES

WINDOW, RATE = 256, 1e-3  # tokens of a step, Adam's rate at its start


def perplexity(model, tokenizer, windows=8):
    """On text that is not trained on."""
    return evaluate.perplexity(model, tokenizer, data.path(data.EVALUATION), window=512, windows=windows)[0]


def start(state):
    """What is trained: logarithms of the norms' and the features' factors, all zero."""
    layers = state["layers"]
    norms = {
        i: {n: jnp.zeros_like(layer[n]) for n in layer if n.endswith("norm")} for i, layer in layers.items()
    }
    features = {
        i: {s: jnp.zeros((*layer[s]["intra"].shape[:-2], 1, 32)) for s in SITES if "intra" in layer[s]}
        for i, layer in layers.items()
    }
    return {"norms": norms, "features": features, "norm": jnp.zeros_like(state["norm"])}


def tuned(state, trained):
    """The model's parameters with the factors in them."""
    layers = {}
    for i, layer in state["layers"].items():
        layers[i] = dict(layer) | {n: layer[n] * jnp.exp(f) for n, f in trained["norms"][i].items()}
        for site, factor in trained["features"][i].items():
            layers[i][site] = dict(layer[site]) | {"intra": layer[site]["intra"] * jnp.exp(factor)}
    return state | {"layers": layers, "norm": state["norm"] * jnp.exp(trained["norm"])}


def finetune(model, teacher, tokens, steps, progress=print):
    """``model`` after ``steps`` of Adam on the Kullback-Leibler divergence of its next tokens from the teacher's."""
    graph, state = nnx.split(model)
    state = nnx.to_pure_dict(state)
    trained, optimiser = start(state), optax.adam(optax.cosine_decay_schedule(RATE, steps))
    held = optimiser.init(trained)
    teach = nnx.jit(lambda teacher, tokens: jax.nn.log_softmax(teacher(tokens)[0]))

    @jax.jit
    def step(trained, held, state, tokens, target):
        def divergence(trained):
            given = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, tuned(state, trained))))
            return jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(given(tokens)[0])), -1).mean()

        loss, gradient = jax.value_and_grad(divergence)(trained)
        update, held = optimiser.update(gradient, held)
        return optax.apply_updates(trained, update), held, loss

    for i in range(steps):
        batch = jnp.asarray(tokens[i % len(tokens)][None])
        trained, held, loss = step(trained, held, state, batch, teach(teacher, batch))
        if i % 10 == 0 or i == steps - 1:
            progress(f"step {i}: {float(loss):.4f} nats")
    return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, tuned(state, trained))))


if __name__ == "__main__":
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 200
    model, tokenizer, _ = torq_jax.load(sys.argv[1])
    teacher = torq_jax.load(sys.argv[2]).model
    text, _ = evaluate.read_text(data.path(data.CALIBRATION))
    tokens = evaluate.cut(evaluate.tokenize(tokenizer, text), WINDOW)
    tokens = np.random.default_rng(0).permutation(tokens)
    before = {"float": perplexity(teacher, tokenizer), "before": perplexity(model, tokenizer)}
    after = finetune(model, teacher, tokens, steps)
    print(json.dumps(before | {"after": perplexity(after, tokenizer), "steps": steps}))
