"""Perplexity in torch of what ``python -m convert.export DIR --to hf`` wrote: load_in_torch.py OUT TEXT."""

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
TIES = torch.tensor(
    [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
)  # between neighbours; a tie goes to the even code


def cast(x, rule):
    """Round to MXFP4 in blocks of 32, with scale rule floor, ceil or even."""
    bits = x.abs().amax(-1, keepdim=True).float().view(torch.int32)
    bits = bits + {"floor": 0, "even": 1 << 21, "ceil": (1 << 22) - 1}[rule]
    scale = torch.exp2(((bits >> 23) - 129).clamp(-127).double())
    y = (x.abs() / scale).clamp(max=6.0).contiguous()
    code = torch.bucketize(y, TIES.double(), right=False)
    code = code + ((code < 7) & (code % 2 == 1) & (y == TIES.double()[code.clamp(max=6)])).int()
    return GRID.double()[code] * scale * x.sign()


def prepare(x, inter, intra, rule):
    """What enters a site's linear layers: both levels of the rotation, then the cast."""
    z = torch.nn.functional.pad(x.double(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))  # [..., B, 32]
    if inter is not None:
        size = inter.shape[-1]
        inter = inter.double().expand(32, -1, -1, -1) if inter.ndim == 3 else inter.double()
        z = torch.einsum("...ngk,kngh->...nhk", z.unflatten(-2, (-1, size)), inter).flatten(-3, -2)
    if intra is not None:
        z = torch.einsum("...bk,bkl->...bl", z, intra.double().expand(z.shape[-2], 32, 32))
    z = z.to(x.dtype).double()
    return (z if rule is None else cast(z, rule)).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def load(path, dtype=torch.float32):
    """The model, with a hook before every linear layer of a layer's sites."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with safe_open(f"{path}/model.safetensors", "pt") as file:
        online = {name: file.get_tensor(name) for name in file.keys() if ".torq." in name}  # noqa: SIM118
    for i, sites in enumerate(model.config.torq["layers"]):
        for site, form in sites.items():
            matrices = [online.get(f"model.layers.{i}.torq.{site}.{level}") for level in ("inter", "intra")]
            hook = lambda _, x, m=matrices, r=form["activation_scale"]: (prepare(x[0], *m, r),)  # noqa: E731
            for module in form["modules"]:
                model.get_submodule(f"model.layers.{i}.{module}").register_forward_pre_hook(hook)
    return model


if __name__ == "__main__":
    path, text = sys.argv[1:]
    ids = AutoTokenizer.from_pretrained(path)(Path(text).read_text(), return_tensors="pt").input_ids[:, :1024]
    with torch.no_grad():
        print("perplexity", float(load(path)(ids, labels=ids).loss.exp()))
