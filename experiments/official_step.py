"""Time a training step of this code beside the official one: ViT-B tokenizer, SiT-B, 256 px.

    python experiments/official_step.py --official ../continuous_tokenizer
    python experiments/official_step.py                      # our half alone

The official code is github.com/Hhhhhhao/continuous_tokenizer at commit f4d60a0 with its own
requirements. Its half follows train_tokenizer.py and train_sit.py without data, LPIPS and
discriminator. It runs in no test. One step of each in turn; losses are pixels and velocity.
"""
import copy  # noqa: I001
import json
import sys
from functools import partial

import torch
import torch.nn.functional as F
from common import in_turn, made_by, make_parser, write_json

import data
import diffusion
import tokenizer

def our_half(cfg, what: str, x, y):
    """(model, loss of a network, optimizer, update of the averaged weights)"""
    if what == "tokenizer":
        model = tokenizer.Tokenizer(cfg.settings)
        generator = torch.Generator(x.device)

        def loss(network):
            mask = tokenizer.random_mask(len(x), cfg.settings.tokens()[0], 0.5, generator)
            return tokenizer.image_loss(network(x, mask)["recon"], x, None)["recon"]
    else:
        model = diffusion.SiT(128, 32, 1000, *cfg.sit)

        def loss(network):
            t = torch.randn(len(x), device=x.device).sigmoid()
            return diffusion.velocity_loss(network, x, torch.randn_like(x), t, y, "linear").mean()

    ema = data.Ema(model.to(x.device), 0.9999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return model, loss, optimizer, lambda: ema.update(0)

def official_half(cfg, what: str, x, y):
    """The same of the official code."""
    sys.path.insert(0, cfg.official)
    from losses.sit_loss import SILoss
    from modelling.sit import SiT_models
    from modelling.tokenizer import VQ_models
    from utils.ema import update_ema

    if what == "tokenizer":
        vit = "vit_base_patch14_dinov2"
        model = VQ_models["AE-16"](
            image_size=256, codebook_embed_dim=32, num_latent_tokens=128,
            enc_type="vit", encoder_model=f"{vit}.lvd142m", enc_patch_size=16, enc_pretrained=False,
            dec_type="vit", decoder_model=f"{vit}_movqv2", dec_patch_size=16, dec_pretrained=False,
            enc_token_drop=0.4, enc_token_drop_max=0.6, dec_cls_token=False,
            use_ape=False, use_rope=True, rope_mixed=True).to(x.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

        def loss(network):
            return F.mse_loss(network(x)[0].float(), x)
    else:
        model = SiT_models["SiT-B/1"](
            in_channels=32, input_size=128, num_classes=1000, use_cfg=True, z_dims=[0],
            vae_1d=True, fused_attn=True, qk_norm=False).to(x.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
        criterion = SILoss(prediction="v", path_type="linear", weighting="lognormal")

        def loss(network):
            return criterion(network, x, {"y": y})[0].mean()

    average = copy.deepcopy(model).requires_grad_(False)
    return model, loss, optimizer, lambda: update_ema(average, model)

def step(dist, network, loss, optimizer, update_average):
    with dist.autocast():
        value = loss(network)
    value.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    update_average()

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--official", default="", help="checkout of the official code; empty: our half alone")
    add("--batch", type=int, nargs=2, default=[4, 16], help="images a step: tokenizer, generator")
    add("--rounds", type=int, default=7, help="steps to take the median of, after two to warm up")
    add("--kinds", nargs="+", default=["ours, eager", "ours, compiled"], help="of our code")
    add("--model", type=json.loads, default={}, help="JSON: other settings of the tokenizer")
    add("--sit", type=int, nargs=3, default=[768, 12, 12], help="width, depth, heads of the SiT")
    add("--json", default="out/official_step.json", help="file to write")
    cfg = parser.parse_args()
    preset = tokenizer.PRESETS["imagenet256"] | {"decoder": "modulated"} | cfg.model
    cfg.settings, dist = tokenizer.Config(**preset), data.start("auto")

    result = made_by("official_step.py") | {"batch": cfg.batch}
    kinds = ["official, eager"] * bool(cfg.official) + cfg.kinds
    shapes = {"tokenizer": (3, cfg.settings.size, cfg.settings.size), "generator": (128, 32)}
    for batch, (what, shape) in zip(cfg.batch, shapes.items()):
        x = torch.randn(batch, *shape, device=dist.device).clamp(-1, 1)
        y = torch.randint(1000, x.shape[:1], device=dist.device)
        works = {}
        for kind in kinds:
            half = official_half if kind.startswith("official") else our_half
            model, *rest = half(cfg, what, x, y)
            model = torch.compile(model) if "compiled" in kind else model
            works[kind] = partial(step, dist, model, *rest)
        seconds = in_turn(works, cfg.rounds)
        ratio = {kind: round(seconds[kinds[0]] / s, 2) for kind, s in seconds.items()}
        result[what] = {"seconds": seconds, "ratio": ratio}
        print(what, result[what])
    write_json(cfg.json, result)

if __name__ == "__main__":
    main()
