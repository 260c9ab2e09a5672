"""MAETok: masked autoencoders as tokenizers for diffusion models (arXiv 2502.03444).

    torchrun tokenizer.py                                # stage 1, stage 2, evaluation -> out/tokenizer/

An image becomes L latent tokens of H channels. Stage 1 (Sec. 3.2) trains encoder and decoder while 40-60 % of the
patches are replaced by a mask token, and shallow auxiliary decoders must predict features (here HOG) of the hidden
patches from the same latents. Stage 2 (Sec. 3.3) freezes the encoder and tunes the pixel decoder until it sees whole
images again. There is no KL term: what makes the latents easy for a diffusion model is their structure.

    python tokenizer.py --from-official DIR --out out/official     # a released checkpoint -> out/official/ckpt.pt

Letters: B images, N patch tokens, L latent tokens, D width, H latent channels, P patch size, S image size.
"""
import copy
import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.stats import truncnorm
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (
    LOAD_ERRORS,
    NAMED,
    Batches,
    Common,
    Ema,
    Images,
    Log,
    Run,
    bench,
    commit,
    fail,
    fold_layer_scale,
    in_a_line,
    launch,
    learning_rate,
    load_checkpoint,
    load_images,
    load_strictly,
    make_optimizers,
    micro_batches,
    optimizer_step,
    parse_config,
    pretrained,
    raise_if_of_the_machine,
    read_weights,
    resume,
    save_checkpoint,
    save_curves,
    save_grid,
    setting,
    start,
    to_device,
    to_float,
    to_uint8,
    write_json,
)
from fid import (
    Judge,
    Made,
    VisionTransformer,
    frechet_distance,
    freeze,
    inception_statistics,
    keep_classifier,
    knn_accuracy,
    linear_probe,
    load_inception,
    load_lpips,
    mixture_curve,
    principal_components,
    psnr,
    ssim,
)

TARGETS = ("pixel", "hog", "dinov2", "siglip", "classifier")


@dataclass
class Config(Common):
    """Defaults are the preset `quick`: the built-in images, minutes on two CPU cores."""
    data: str = setting("shapes", "shapes, cifar10, imagenette, a folder of images, or what data.py packed")
    size: int = setting(32, "image side S in pixels", least=1)
    out: str = setting("out/tokenizer", "folder for ckpt.pt, stage1.pt, log.jsonl, recon.png, metrics.json")
    patch: int = setting(8, "patch side P; divides --size", least=1)
    latents: int = setting(8, "number of learnable latent tokens L; 0: none, the image tokens are the latents")
    channels: int = setting(16, "channels of a latent token H", least=1)
    width: int = setting(192, "width D of encoder and decoder", least=1)
    depth: int = setting(3, "layers of the encoder, and of the decoder", least=1)
    heads: int = setting(3, "attention heads", least=1)
    dec_width: int = setting(0, "width of the decoder; 0: as the encoder")
    dec_depth: int = setting(0, "layers of the decoder; 0: as the encoder")
    dec_heads: int = setting(0, "heads of the decoder; 0: as the encoder")
    decoder: str = setting("plain", "plain: Eq. 5; modulated: as released, the latents also scale and shift their own "
                           "rows inside each layer", ("plain", "modulated"))
    dec_class_token: bool = setting(False, "a class token in the decoder, too")
    positions: str = setting("rope", "of image tokens: 2D RoPE of learned frequency, or a table", ("rope", "table"))
    mask_min: float = setting(0.4, "lowest share of patches hidden in stage 1")
    mask_max: float = setting(0.6, "highest share of patches hidden in stage 1; 0: a plain autoencoder")
    drop_masked: bool = setting(False, "leave hidden patches out of the encoder, as MAE does, where the paper puts a mask "
                                "token in their place: faster, other latents")
    kl: float = setting(0.0, "weight of a KL term in nats per image; above 0 the model is a variational autoencoder")
    targets: str = setting("hog", f"what the auxiliary decoders predict: any of {','.join(TARGETS)}, or none; classifier is "
                           "a small network trained here on the labels of the data")
    dinov2: str = setting("vitl14", "DINOv2 model of that target", tuple(
        f"vit{s}14{r}" for s in "sbl" for r in ("", "_reg4")))
    teacher_loss: str = setting("cosine", "form of the DINOv2 and SigLIP losses: negative cosine (the released code), "
                                "or mse (Eq. 8), of the classifier's, too", ("cosine", "mse"))
    aux_depth: int = setting(3, "layers of an auxiliary decoder; 0: a linear map")
    aux_width: int = setting(96, "width of an auxiliary decoder", least=1)
    aux_heads: int = setting(2, "heads of an auxiliary decoder", least=1)
    aux_weight: float = setting(1.0, "weight of each masked target (Eq. 8) beside the pixel loss")
    lpips: float = setting(0.0, "weight of the perceptual loss LPIPS-VGG (lambda 1 of Eq. 6); 0: without")
    lpips_warmup: int = setting(0, "steps over which that weight rises from 0")
    adversary: str = setting("none", "discriminator of L_adv: on frozen DINO features, or PatchGAN (no download)",
                             ("none", "dino", "patchgan"))
    adv_weight: float = setting(0.4, "weight of L_adv (lambda 2 of Eq. 6), times the adaptive weight")
    adv_start: int = setting(0, "step at which L_adv and the training of the discriminator begin")
    adv_norm: str = setting("batch", "its batch norm: over the whole batch, or in groups of 8", ("batch", "groups"))
    lecam: float = setting(0.001, "weight of the LeCam regulariser of the discriminator")
    consistency: float = setting(4.0, "weight of its consistency under augmentation; 0: without")
    diffaug: bool = setting(True, "DiffAugment what the discriminator sees")
    weights: str = setting("", "folder of pretrained networks; what is missing is downloaded into it; empty: the cache")
    rfid: bool = setting(False, "evaluate rFID, too (needs the Inception weights)")
    analyse: str = setting("", "analyse the latents of these checkpoints (commas between), write to --out and stop")
    dims: int = setting(0, "dimensions of that analysis; 0: the least that hold 90 % of the variance of each")
    from_official: str = setting("", "convert this released checkpoint (its folder or file) to --out and stop")
    steps: int = setting(2150, "steps of stage 1")
    stage2_steps: int = setting(1000, "steps of stage 2; the mask ratio falls from --mask-max to 0 over them")
    batch_size: int = setting(64, "images per step, over all processes", least=1)
    micro_batch: int = setting(0, "most images a process puts through at once; 0: all of its share. Batch norm, LeCam "
                               "means and adaptive weight of an adversary are then those of each piece")
    recompute: bool = setting(False, "keep only the input of each layer for the backward pass: less memory, a third "
                              "more work")
    optimizer: str = setting("muon", "muon for the matrices inside blocks and adamw for the rest, or adamw for all",
                             ("adamw", "muon"))
    lr: float = setting(2e-3, "peak learning rate of AdamW")
    muon_lr: float = setting(1.5e-2, "peak learning rate of Muon")
    beta2: float = setting(0.95, "second beta of AdamW")
    weight_decay: float = setting(1e-4, "weight decay")
    warmup: int = setting(50, "steps of linear warm-up")
    clip: float = setting(1.0, "largest gradient norm; 0: no clipping")
    ema: float = setting(0.998, "decay of the weight average")
    skip_nonfinite: int = setting(0, "steps with a gradient that is not finite to pass over before the run is stopped; "
                                  "above 0 each step waits for the device")
    log_every: int = setting(200, "steps between lines of the log", least=1)
    save_every: int = setting(400, "steps between checkpoints", least=1)
    bench: int = setting(0, "measure so many steps of both stages, write bench/bench.json and stop")

    def check(self):
        if self.size % self.patch or self.patch % 2:
            raise ValueError(f"--size {self.size} must be a multiple of an even --patch {self.patch}")
        for width, heads in ((self.width, self.heads), (self.dec_width or self.width, self.dec_heads or self.heads),
                             (self.aux_width, self.aux_heads)):
            if width % (4 * heads):
                raise ValueError(f"width {width} must be a multiple of four times the heads {heads} (2D RoPE)")
        if not 0 <= self.mask_min <= self.mask_max < 1:
            raise ValueError("0 <= --mask-min <= --mask-max < 1 is needed")
        if self.drop_masked and not self.latents:
            raise ValueError("--drop-masked needs latent tokens: with --latents 0 the patches are the latents")
        if self.drop_masked and self.compile:            # its lengths vary: torch 2.13 compiles code for that that fails
            raise ValueError("--drop-masked needs --no-compile")
        if set(self.target_names()) - set(TARGETS) or len(set(self.target_names())) < len(self.target_names()):
            raise ValueError(f"--targets {self.targets}: none, or each at most once of {', '.join(TARGETS)}")
        if self.adversary == "patchgan" and self.size < 32:
            raise ValueError(f"--adversary patchgan needs images of 32 pixels or more, not --size {self.size}")

    def target_names(self) -> list[str]:
        return [] if self.targets == "none" else self.targets.split(",")

    def tokens(self) -> tuple[int, int]:
        """Image tokens N and latent tokens L."""
        n = (self.size // self.patch) ** 2
        return n, self.latents or n


PAPER = {   # Sec. 3 and Table 7 of the paper; [code]: not in the paper, from the official code; [ours]: in neither
    "data": "imagenet",                                  # [ours] stands for yours: give --data
    "size": 256, "patch": 16, "latents": 128, "channels": 32, "width": 768, "depth": 12, "heads": 12,
    "decoder": "plain",                                  # Eq. 5; the code's and the released decoder is "modulated"
    "mask_min": 0.4, "mask_max": 0.6, "targets": "hog,dinov2,siglip", "dinov2": "vitl14", "aux_depth": 3,
    "aux_width": 192, "aux_heads": 3, "aux_weight": 1.0,             # [code]
    "teacher_loss": "cosine",                            # [code]; Eq. 8 is "mse"
    "lpips": 1.0, "lpips_warmup": 10_000,                # the warm-up: [code]
    "adversary": "dino",                                 # [code] on DINO ViT-S/16; the paper's table says DINOv2-S
    "adv_weight": 0.4, "adv_start": 30_000, "lecam": 0.001,
    "adv_norm": "batch", "diffaug": True, "consistency": 4.0,        # [code]
    "steps": 500_000, "stage2_steps": 50_000, "batch_size": 512, "optimizer": "adamw", "lr": 1e-4, "beta2": 0.95,
    "weight_decay": 1e-4, "warmup": 10_000,
    "clip": 1.0, "ema": 0.9999,                          # [code]
    "log_every": 100, "save_every": 5000, "rfid": True}  # [ours]
# Built in: rates fall by a cosine to a tenth, mask ratios from a truncated normal [code]; stage 2 warms up again [ours]
PRESETS = {
    "quick": {},
    "ae": {"mask_min": 0.0, "mask_max": 0.0, "targets": "none"},     # the paper's ablations, at the size of quick
    "vae": {"mask_min": 0.0, "mask_max": 0.0, "targets": "none", "kl": 1e-5},
    "mae_pixel": {"targets": "pixel"},
    "mae_hog": {"targets": "hog"},                       # the same as quick
    "mae_teacher": {"targets": "classifier", "aux_weight": 0.1},     # [ours] a teacher that needs no download; at weight
                                                         # 1 the pixels, here without LPIPS, lose 1.6 dB (800 steps)
    "cifar10": {                                         # [ours], for one GPU; not run yet
        "data": "cifar10", "size": 32, "patch": 4, "latents": 16, "channels": 16, "width": 384, "depth": 6, "heads": 6,
        "aux_width": 128, "aux_heads": 2, "batch_size": 256, "steps": 30_000, "stage2_steps": 10_000, "warmup": 500,
        "lr": 1e-3, "muon_lr": 1e-2, "ema": 0.999, "save_every": 2000},
    "imagenette64": {                                    # [ours], for one GPU; not run yet
        "data": "imagenette", "size": 64, "patch": 8, "latents": 32, "channels": 16, "width": 512, "depth": 8,
        "heads": 8, "aux_width": 128, "aux_heads": 2, "batch_size": 256, "steps": 40_000, "stage2_steps": 10_000,
        "warmup": 500, "lr": 1e-3, "muon_lr": 1e-2, "ema": 0.999, "save_every": 2000},
    "imagenet256": PAPER,
    "imagenet512": PAPER | {"size": 512},                # 1,024 patches of 16 pixels; the latents stay 128 x 32
}

# ---------------------------------------------------------------------------------------------------------------------
# The transformer


def patchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """B x C x S x S -> B x N x (P*P*C): patches row by row; inside one: row, column, channel."""
    b, c, s, _ = x.shape
    x = x.view(b, c, s // patch, patch, s // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """The inverse of patchify: B x N x (P*P*C) -> B x C x S x S."""
    b, n, f = x.shape
    g, c = math.isqrt(n), f // patch**2
    return x.view(b, g, g, patch, patch, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, g * patch, g * patch)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair of channels (2i, 2i+1) by its angle: x is B x heads x T x d, tables heads x T x d/2; fp32 out.

    Multiply-adds, which a compiler fuses; as complex numbers they take half the time on a CPU without one.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2)
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def init_rope_freqs(depth: int, heads: int, width: int, theta: float = 10.0) -> torch.Tensor:
    """Frequencies along x and y, 2 x depth x heads*d/2, each head with its own random orientation (RoPE-Mixed)."""
    d = width // heads
    magnitude = theta ** (-torch.arange(0, d, 4).float() / d)
    angle = 2 * math.pi * torch.rand(depth, heads, 1)
    fx = torch.cat([magnitude * angle.cos(), magnitude * (angle + math.pi / 2).cos()], -1)
    fy = torch.cat([magnitude * angle.sin(), magnitude * (angle + math.pi / 2).sin()], -1)
    return torch.stack([fx, fy]).flatten(2)


def rope_tables(freqs: torch.Tensor, heads: int, grid: tuple[int, int], before: int, after: int):
    """cos and sin for every layer: depth x heads x T x d/2, with T = before + rows*columns + after.

    Image token n stands at column n mod columns, row n div columns; class tokens (before) and latent tokens (after)
    have no place in the image and are not turned: their angle is 0.
    """
    n = torch.arange(grid[0] * grid[1], device=freqs.device)
    x, y = (n % grid[1]).float()[:, None], (n // grid[1]).float()[:, None]
    fx, fy = freqs.float().unflatten(-1, (heads, -1)).unsqueeze(-2)      # depth x heads x 1 x d/2
    angles = F.pad(x * fx + y * fy, (0, 0, before, after))
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Multi-head self-attention; rows of qkv are q, k, v, each split head by head; q and k are normed by `qk_norm`.

    `wanted`, a slice, says of which tokens the outputs are computed; all of them serve as keys and values.
    """

    def __init__(self, width: int, heads: int, qk_norm: Callable = nn.Identity):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = qk_norm(width // heads), qk_norm(width // heads)

    def forward(self, x, rope=None, wanted=slice(None)):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # B x heads x T x d
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.proj(attend(q[:, :, wanted], k, v).transpose(1, 2).flatten(2))


def attend(q, k, v):
    """Scaled dot-product attention in the precision of v; spelled out for bf16 on a CPU, where it takes half the time."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    if v.device.type != "cpu" or v.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v


class Mlp(nn.Module):
    def __init__(self, width: int, approximate: str = "none"):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(approximate), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer layer. With `channels`, the latents z scale and shift their own rows.

    That is the decoder of the released model: norms without weights; y*scale + shift (not 1 + scale) on the last L
    rows, from a layer that starts at zero, so that at first the decoder sees nothing of z. `wanted`: the tokens to
    return.
    """

    def __init__(self, width: int, heads: int, channels: int = 0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not channels)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not channels)
        self.mlp = Mlp(width)
        if channels:
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 4 * width))

    def forward(self, x, rope=None, z=None, wanted=slice(None)):
        if z is None:
            x = x[:, wanted] + self.attn(self.norm1(x), rope, wanted)
            return x + self.mlp(self.norm2(x))
        shift1, scale1, shift2, scale2 = self.modulation(z).chunk(4, -1)
        x = x + self.attn(modulate_tail(self.norm1(x), scale1, shift1), rope)
        return (x + self.mlp(modulate_tail(self.norm2(x), scale2, shift2)))[:, wanted]


def modulate_tail(x, scale, shift):
    rest, tail = x.split([x.shape[1] - scale.shape[1], scale.shape[1]], 1)
    return torch.cat([rest, tail * scale + shift], 1)


def token(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(1, *shape))


class Encoder(nn.Module):
    """Image -> outputs of the L learnable latent tokens (Eq. 4); without any, of the N image tokens."""

    def __init__(self, cfg: Config):
        super().__init__()
        d, n = cfg.width, (cfg.size // cfg.patch) ** 2
        self.patch, self.heads, self.latents, self.recompute = cfg.patch, cfg.heads, cfg.latents, cfg.recompute
        self.patch_embed = nn.Linear(3 * cfg.patch**2, d)
        self.mask_token, self.class_token = token(1, d), token(1, d)
        self.pos_embed = token(1 + n, d)                  # the released model adds it beside RoPE
        if cfg.latents:
            self.latent_tokens, self.latent_pos_embed = token(cfg.latents, d), token(cfg.latents, d)
        if cfg.positions == "rope":
            self.rope_freqs = nn.Parameter(init_rope_freqs(cfg.depth, cfg.heads, d))
        self.blocks = nn.ModuleList(Block(d, cfg.heads) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def forward(self, image, mask=None, drop=0):
        """mask B x N hides patches; `drop`, as many as it hides in each image, leaves them out (--drop-masked)."""
        x = self.patch_embed(patchify(image, self.patch))                             # B x N x D
        if mask is not None:                              # replaced, not dropped: the length stays N
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        b, n, _ = x.shape
        x = torch.cat([self.class_token.expand(b, -1, -1), x], 1) + self.pos_embed    # B x (1+N) x D
        if self.latents:
            z = (self.latent_tokens + self.latent_pos_embed).expand(b, -1, -1)        # B x L x D
            x = torch.cat([x, z], 1)                                                  # B x (1+N+L) x D
        seen = None
        if drop:
            hidden = F.pad(mask, (1, self.latents)).to(torch.uint8)
            seen = hidden.argsort(dim=1, stable=True)[:, :x.shape[1] - drop]              # B x T: which are left
            x = x.gather(1, seen[..., None].expand(-1, -1, x.shape[2]))
        g = math.isqrt(n)
        wanted = slice(-(self.latents or n), None)
        return self.norm(run_blocks(self, x, (g, g), 1, self.latents, wanted, seen=seen))     # B x L x D


class Decoder(nn.Module):
    """Latents h, B x L x H -> one vector per patch, B x N x out (Eq. 5); also the auxiliary decoders (Eq. 7)."""

    def __init__(self, cfg: Config, width: int, depth: int, heads: int, out: int, class_token: bool):
        super().__init__()
        self.grid, self.heads, self.latents, self.recompute = cfg.size // cfg.patch, heads, cfg.latents, cfg.recompute
        self.from_latent = nn.Linear(cfg.channels, width)
        if cfg.latents:
            self.mask_token, self.latent_pos_embed = token(1, width), token(cfg.latents, width)
        self.class_token = token(1, width) if class_token else None
        self.modulated = cfg.decoder == "modulated"
        if cfg.positions == "rope":
            self.rope_freqs = nn.Parameter(init_rope_freqs(depth, heads, width))
        else:
            self.pos_embed = token(int(class_token) + self.grid**2, width)
        self.blocks = nn.ModuleList(Block(width, heads, cfg.channels * self.modulated) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not self.modulated)
        self.head = nn.Linear(width, out)

    def features(self, h):
        """What the last layer sees: B x N x D."""
        b, n = len(h), self.grid**2
        x = self.mask_token.expand(b, n, -1) if self.latents else self.from_latent(h)             # B x N x D
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(b, -1, -1), x], 1)
        if hasattr(self, "pos_embed"):
            x = x + self.pos_embed
        before = x.shape[1] - n
        if self.latents:
            x = torch.cat([x, self.from_latent(h) + self.latent_pos_embed], 1)        # B x (N+L) x D
        wanted, z = slice(before, before + n), h if self.modulated else None
        return self.norm(run_blocks(self, x, (self.grid, self.grid), before, self.latents, wanted, z))

    def forward(self, h):
        return self.head(self.features(h))                                            # B x N x out


class LinearDecoder(nn.Module):
    """An auxiliary decoder of depth 0: one matrix over the tokens, L -> N, and one over the channels, H -> out."""

    def __init__(self, cfg: Config, out: int):
        super().__init__()
        n, count = cfg.tokens()
        self.mix, self.head = nn.Linear(count, n), nn.Linear(cfg.channels, out)

    def forward(self, h):
        return self.head(self.mix(h.transpose(1, 2)).transpose(1, 2))


def run_blocks(net, x, grid, before, after, wanted, z=None, seen=None):
    """All layers of an encoder or decoder over [class | image | latents] with its RoPE tables, or over its rows `seen`.

    Returns the tokens `wanted`. The last layer computes no others, as nobody reads them, which saves a sixth of the
    work of the default's encoder; a modulated one, whose z belongs to the last of all tokens, does.
    """
    ropes = [None] * len(net.blocks)
    if hasattr(net, "rope_freqs"):
        ropes = zip(*(table.unbind() for table in rope_tables(net.rope_freqs, net.heads, grid, before, after)))
    for block, rope in zip(net.blocks, ropes):
        if seen is not None and rope:
            rope = [table[:, seen].transpose(0, 1) for table in rope]                 # B x heads x T x d/2
        kept = wanted if block is net.blocks[-1] else slice(None)
        if net.recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, rope, z, kept, use_reentrant=False)
        else:
            x = block(x, rope, z, kept)
    return x


class Tokenizer(nn.Module):
    """The autoencoder and its auxiliary decoders: images B x 3 x S x S in [-1, 1], latents B x L x H, unbounded.

    `widths` gives the number of features of each auxiliary target by name.
    """

    def __init__(self, cfg: Config, widths: dict[str, int] | None = None):
        super().__init__()
        self.patch, self.variational = cfg.patch, cfg.kl > 0
        self.encoder = Encoder(cfg)
        self.to_latent = nn.Linear(cfg.width, cfg.channels * (1 + self.variational))
        self.decoder = Decoder(cfg, cfg.dec_width or cfg.width, cfg.dec_depth or cfg.depth, cfg.dec_heads or cfg.heads,
                               3 * cfg.patch**2, cfg.dec_class_token)
        self.aux = nn.ModuleDict({
            name: Decoder(cfg, cfg.aux_width, cfg.aux_depth, cfg.aux_heads, out, True) if cfg.aux_depth else
            LinearDecoder(cfg, out) for name, out in (widths or {}).items()})
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.weight) if "modulation" in name else nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def encode(self, image, mask=None, drop=0):
        """B x 3 x S x S -> latents B x L x H (of a VAE, their mean); mask B x N, True where a patch is hidden."""
        h = self.to_latent(self.encoder(image, mask, drop))
        return h.chunk(2, -1)[0] if self.variational else h

    def decode(self, h):
        """Latents B x L x H -> images B x 3 x S x S, not clamped."""
        return unpatchify(self.decoder(h).float(), self.patch)

    def forward(self, image, mask=None, drop=0, noise=None, frozen=False):
        """Training: "recon", the features "hidden" under the last layer, "kl" of a VAE, and a prediction per target.

        `drop` as in Encoder; `noise` B x L x H samples the latents of a VAE; `frozen` (stage 2) keeps gradients out
        of the encoder.
        """
        out = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            h = self.to_latent(self.encoder(image, mask, drop))
        if self.variational:
            h, log_variance = h.float().chunk(2, -1)
            if noise is not None:
                log_variance = log_variance.clamp(-30, 20)
                out["kl"] = 0.5 * (h.square() + log_variance.exp() - 1 - log_variance).sum((1, 2)).mean()
                h = h + (0.5 * log_variance).exp() * noise
        hidden = self.decoder.features(h)
        out["recon"], out["hidden"] = unpatchify(self.decoder.head(hidden).float(), self.patch), hidden.detach()
        return out | {name: aux(h) for name, aux in self.aux.items()}


def forward_flops(cfg: Config, widths: dict[str, int] | None = None, drop: int = 0) -> tuple[int, int, int]:
    """FLOPs of one image forward (2 per multiply-add of a matrix product): encoder without `drop` of the patches,
    decoder, auxiliary decoders.
    """
    (n, count), modulated = cfg.tokens(), cfg.decoder == "modulated"

    def layers(tokens, wanted, width, depth):
        """qkv 6, projection 2, MLP 16, and attention's products; of tokens not wanted the last layer has qkv only."""
        full = 24 * tokens * width**2 + 4 * tokens**2 * width
        return depth * full - (tokens - wanted) * (18 * width**2 + 4 * tokens * width)

    def decoder(width, depth, out, class_token):
        if not depth:
            return 2 * count * n * cfg.channels + 2 * n * cfg.channels * out
        modulation = 8 * depth * count * cfg.channels * width * modulated
        ends, tokens = 2 * count * cfg.channels * width + 2 * n * width * out, class_token + n + cfg.latents
        return ends + modulation + layers(tokens, tokens if modulated else n, width, depth)

    pixels = 3 * cfg.patch**2
    encoder = 2 * n * pixels * cfg.width + layers(1 + n - drop + cfg.latents, count, cfg.width, cfg.depth)
    encoder += 2 * count * cfg.width * cfg.channels * (1 + (cfg.kl > 0))
    aux = sum(decoder(cfg.aux_width, cfg.aux_depth, out, 1) for out in (widths or {}).values())
    pixel_decoder = decoder(cfg.dec_width or cfg.width, cfg.dec_depth or cfg.depth, pixels, cfg.dec_class_token)
    return encoder, pixel_decoder, aux


# ---------------------------------------------------------------------------------------------------------------------
# Masks and targets


def draw_mask_ratio(low: float, high: float, seed: int, step: int) -> float:
    """The batch's mask ratio: a normal around `high`, deviation 0.25, cut to [low, high] (as the released code)."""
    if low == high:
        return high
    u = np.random.default_rng([seed, 3, step]).random()
    return float(truncnorm.ppf(u, (low - high) / 0.25, 0, loc=high, scale=0.25))


def random_mask(batch: int, n: int, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """B x N, True on ceil(N * ratio) patches of each image, chosen anew for each."""
    noise = torch.rand(batch, n, generator=generator, device=generator.device)
    return noise.argsort(1).argsort(1) < math.ceil(n * ratio)


@functools.lru_cache                                     # copied to the device once, not in every step
def sobel(device: torch.device) -> torch.Tensor:
    gx = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=device)
    return torch.stack([gx, gx.T])[:, None]


HOG_BINS = 9
HOG_DIM = 3 * HOG_BINS * 4                               # 2 x 2 cells a patch


def hog(x: torch.Tensor, patch: int, cell: int = 0, window: int = -1) -> torch.Tensor:
    """Histograms of oriented gradients of each patch: B x 3 x S x S -> B x N x 27*(P/cell)^2.

    Sobel gradients per channel, magnitudes weighted by a Gaussian window tiled over the image, summed into 9 unsigned
    orientations over cells, each cell's histogram scaled to unit length. The official definition at P = 16 (cell 8,
    window 16), scaled with the patch; window 0 is MaskFeat's. Feature order: channel, bin, cell row, cell column.
    """
    cell, window = cell or patch // 2, patch if window < 0 else window
    b, c, s, _ = x.shape
    kernel = sobel(x.device).repeat(c, 1, 1, 1)
    gx, gy = F.conv2d(F.pad(x.float(), (1, 1, 1, 1), "reflect"), kernel, groups=c).unflatten(1, (c, 2)).unbind(2)
    magnitude = torch.hypot(gx, gy)
    if window:
        w = torch.exp(-0.5 * ((torch.arange(window, device=x.device) - (window - 1) / 2) / (window // 2)) ** 2)
        w = torch.outer(w, w) / w.sum() ** 2
        magnitude = magnitude * w.repeat(s // window, s // window)
    bins = torch.floor(torch.atan2(gx, gy) / math.pi * HOG_BINS).long() % HOG_BINS
    histogram = torch.zeros(b, c, HOG_BINS, s, s, device=x.device)
    histogram.scatter_(2, bins.unsqueeze(2), magnitude.unsqueeze(2))
    histogram = F.avg_pool2d(histogram.flatten(1, 2), cell) * cell**2
    histogram = F.normalize(histogram.unflatten(1, (c, HOG_BINS)), dim=2).flatten(1, 2)   # B x 27 x S/cell x S/cell
    return F.pixel_unshuffle(histogram, patch // cell).flatten(2).transpose(1, 2)


def masked_mse(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Eq. 8: squared error on the hidden patches only, mean over them and the features; mask None means all patches."""
    return masked_mean((prediction.float() - target).square().mean(-1), mask)


def masked_cosine(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Negative cosine similarity on the hidden patches only: the released code's form of Eq. 8 for the teachers."""
    return masked_mean(-F.cosine_similarity(prediction.float(), target, dim=-1), mask)


def masked_mean(error, mask):
    return error.mean() if mask is None else (error * mask).sum() / mask.sum()


@dataclass
class Target:
    """What an auxiliary decoder predicts: features(images in [-1, 1]) -> B x N x width, compared by loss."""
    width: int
    features: Callable
    loss: Callable


def make_targets(cfg: Config, run: Run, images: Images) -> dict[str, Target]:
    """The targets of --targets. To add one: its name in TARGETS, and a branch here that says its three fields."""
    targets, teacher_loss = {}, masked_cosine if cfg.teacher_loss == "cosine" else masked_mse
    for name in cfg.target_names():
        if name == "pixel":
            targets[name] = Target(3 * cfg.patch**2, functools.partial(patchify, patch=cfg.patch), masked_mse)
        elif name == "hog":
            targets[name] = Target(HOG_DIM, functools.partial(hog, patch=cfg.patch), masked_mse)
        elif name == "classifier":                       # its seed differs from that of the network that scores samples
            net, _ = keep_classifier(images, run, seed=1)
            features = functools.partial(net.patch_features, grid=cfg.size // cfg.patch)
            targets[name] = Target(net.WIDTH, run.autocast()(features), teacher_loss)
        else:
            file = f"dinov2_{cfg.dinov2}_pretrain" if name == "dinov2" else "siglip-large-patch16-256"
            net = freeze(VisionTransformer(pretrained(file, cfg.weights, "--targets hog"), name), run)
            features = functools.partial(net.patch_features, grid=cfg.size // cfg.patch)
            targets[name] = Target(net.width, run.autocast()(features), teacher_loss)
    return targets


# ---------------------------------------------------------------------------------------------------------------------
# The image loss


class ImageLoss:
    """L_recon + lambda1 L_percep + lambda2 L_adv (Eq. 6), with the discriminator behind L_adv and its training."""

    def __init__(self, cfg: Config, run: Run, lpips: Callable | None = None, adversary: "Adversary | None" = None):
        self.cfg, self.run, self.lpips, self.adversary = cfg, run, lpips, adversary

    def __call__(self, recon, hidden, x, step: int, part: slice):
        """Gradient with respect to `recon`, and the terms, for images x: rows `part` of this process's batch.

        Where gradients meet in the images, each term is differentiated once and the adaptive weight is nearly free.
        """
        pixels = recon.detach().requires_grad_()
        loss = F.mse_loss(pixels, x)
        terms = {"recon": loss}
        if self.lpips:
            with self.run.autocast():
                terms["lpips"] = self.lpips(pixels, x).mean()
            loss = loss + self.cfg.lpips * min(1, (step + 1) / max(1, self.cfg.lpips_warmup)) * terms["lpips"]
        (gradient,) = torch.autograd.grad(loss, pixels)
        if self.adversarial(step):
            terms["adv"] = self.adversary.generator_loss(pixels, step, part)
            (against,) = torch.autograd.grad(terms["adv"], pixels)
            terms["adaptive"] = adaptive_weight(gradient, against, hidden, self.cfg.patch, self.run)
            gradient = gradient + self.cfg.adv_weight * terms["adaptive"] * against
        return gradient, terms

    def adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part: before --adv-start it is not even run."""
        return self.adversary is not None and step + 1 >= self.cfg.adv_start

    def discriminator_step(self, real, fake: list, step: int, rate: float) -> dict:
        return self.adversary.train_step(real, torch.cat(fake), step, rate) if self.adversarial(step) else {}

    def state_dict(self) -> dict:
        return self.adversary.state_dict() if self.adversary else {}

    def load_state_dict(self, state: dict) -> None:
        if self.adversary and state:
            self.adversary.load_state_dict(state)


def make_image_loss(cfg: Config, run: Run) -> ImageLoss:
    """The image loss of these settings, with its pretrained networks."""
    lpips = freeze(load_lpips(cfg.weights), run) if cfg.lpips else None
    return ImageLoss(cfg, run, lpips, Adversary(cfg, run) if cfg.adversary != "none" else None)


def adaptive_weight(gradient, against, hidden, patch: int, run: Run) -> torch.Tensor:
    """|d L_nll / dW| / (|d L_adv / dW| + 1e-4), at most 1e4, W the decoder's last matrix; over all processes' images.

    The last layer is linear: its gradient is the product of that at its output and its input `hidden`.
    """
    both = torch.stack([torch.einsum("bnp,bnd->pd", patchify(g, patch), hidden.float()) for g in (gradient, against)])
    nll, adv = run.sum(both).flatten(1).norm(dim=1) / run.world
    return (nll / (adv + 1e-4)).clamp(0, 1e4)


def accumulate(terms: dict, more: dict, share: float) -> None:
    for name, value in more.items():
        terms[name] = terms.get(name, 0) + value.detach() * share


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_stage1(cfg: Config, run: Run, images: Images, targets: dict[str, Target], image_loss: ImageLoss,
                 state: dict | None) -> Tokenizer:
    """Stage 1 (Sec. 3.2): the whole model, masked images, image loss (Eq. 6) and masked targets (Eq. 8)."""
    torch.manual_seed(cfg.seed)
    model = Tokenizer(cfg, {name: target.width for name, target in targets.items()}).to(run.device)
    ema, optimizers, done = Ema(model, cfg.ema), make_optimizers(model, cfg), 0
    if state:
        done = restore(state, model, ema, optimizers, image_loss)
    parallel, params = run.parallel(model, cfg.compile), list(model.parameters())
    batches = Batches(images, cfg.batch_size, cfg.seed, run)
    log = Log(run, cfg, "stage 1", done, cfg.steps, batches)
    rows, (n, count) = run.rows(cfg.batch_size), cfg.tokens()
    for step in range(done, cfg.steps):
        x, _ = batches(step)
        ratio = draw_mask_ratio(cfg.mask_min, cfg.mask_max, cfg.seed, step)
        mask = random_mask(cfg.batch_size, n, ratio, run.generator(cfg.seed, 4, step))[rows]
        drop = math.ceil(n * ratio) * cfg.drop_masked
        noise = [None] * len(x)
        if cfg.kl:
            g = run.generator(cfg.seed, 7, step)
            noise = torch.randn(cfg.batch_size, count, cfg.channels, generator=g, device=run.device)[rows]
        terms, recons = {}, []
        for part in micro_batches(parallel, len(x), cfg.micro_batch):
            with run.autocast():
                out = parallel(x[part], mask[part], drop, noise[part] if cfg.kl else None)
            losses, weights = ({"kl": out["kl"]}, {"kl": cfg.kl}) if cfg.kl else ({}, {})
            for name, target in targets.items():
                where = mask[part] if cfg.mask_max else None
                losses[name], weights[name] = target.loss(out[name], target.features(x[part]), where), cfg.aux_weight
            gradient, image_terms = image_loss(out["recon"], out["hidden"], x[part], step, part)
            share = len(x[part]) / len(x)
            others = sum(weights[name] * loss for name, loss in losses.items())
            (((out["recon"] * gradient).sum() + others) * share).backward()
            accumulate(terms, image_terms | losses, share)
            recons.append(out["recon"].detach())
        rate = learning_rate(step, cfg.steps, cfg.warmup, "cosine")
        terms["grad"], taken = optimizer_step(optimizers, params, rate, cfg.clip, cfg.skip_nonfinite)
        if taken:
            terms |= image_loss.discriminator_step(x, recons, step, rate)
            ema.update(step)
        if log(step + 1, rate, taken, **terms):
            save(cfg, run, images, 1, step + 1, model, ema, optimizers, image_loss)
            run.leave_if_asked(step + 1 == cfg.steps)
    return ema.model


def train_stage2(cfg: Config, run: Run, images: Images, stage1: Tokenizer, image_loss: ImageLoss,
                 state: dict | None) -> Tokenizer:
    """Stage 2 (Sec. 3.3): encoder frozen, auxiliary decoders dropped, image loss only, mask ratio falling to zero."""
    model = copy.deepcopy(stage1).to(run.device).train()
    model.requires_grad_(False).decoder.requires_grad_(True)
    ema, optimizers, done = Ema(model, cfg.ema), make_optimizers(model, cfg), 0
    if state:
        done = restore(state, model, ema, optimizers, image_loss)
    parallel, params = run.parallel(model, cfg.compile), list(model.decoder.parameters())
    batches = Batches(images, cfg.batch_size, cfg.seed + 1, run)
    log = Log(run, cfg, "stage 2", done, cfg.stage2_steps, batches)
    rows, (n, _) = run.rows(cfg.batch_size), cfg.tokens()
    for step in range(done, cfg.stage2_steps):
        x, _ = batches(step)
        ratio = cfg.mask_max * (1 - step / max(1, cfg.stage2_steps - 1))
        mask = random_mask(cfg.batch_size, n, ratio, run.generator(cfg.seed, 5, step))[rows]
        drop = math.ceil(n * ratio) * cfg.drop_masked
        terms, recons = {}, []
        for part in micro_batches(parallel, len(x), cfg.micro_batch):
            with run.autocast():
                out = parallel(x[part], mask[part], drop, frozen=True)
            gradient, image_terms = image_loss(out["recon"], out["hidden"], x[part], cfg.steps + step, part)
            share = len(x[part]) / len(x)
            ((out["recon"] * gradient).sum() * share).backward()
            accumulate(terms, image_terms, share)
            recons.append(out["recon"].detach())
        rate = learning_rate(step, cfg.stage2_steps, cfg.warmup, "cosine")
        terms["grad"], taken = optimizer_step(optimizers, params, rate, cfg.clip, cfg.skip_nonfinite)
        if taken:
            terms |= image_loss.discriminator_step(x, recons, cfg.steps + step, rate)
            ema.update(step)
        if log(step + 1, rate, taken, **terms):
            save(cfg, run, images, 2, step + 1, model, ema, optimizers, image_loss)
            run.leave_if_asked(step + 1 == cfg.stage2_steps)
    return ema.model


def save(cfg, run, images, stage, step, model, ema, optimizers, image_loss):
    if run.main:
        save_checkpoint(Path(cfg.out) / "ckpt.pt", {
            "kind": "tokenizer", "config": dataclasses.asdict(cfg), "stage": stage, "step": step,
            "data": images.fingerprint, "model": model.state_dict(), "ema": ema.model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers], "image_loss": image_loss.state_dict()})


def restore(state: dict, model, ema, optimizers, image_loss=None) -> int:
    """Put a checkpoint back where it came from; returns the number of steps done."""
    try:
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if image_loss:
            image_loss.load_state_dict(state.get("image_loss", {}))
        return state["step"]
    except LOAD_ERRORS as error:
        raise_if_of_the_machine(error)
        fail(f"the checkpoint in --out does not fit these settings ({in_a_line(error)}); "
             "use --fresh to start over, or another --out")


def load_tokenizer(path: str | Path, device: torch.device) -> tuple[Tokenizer, Config]:
    """The averaged weights of a checkpoint without its auxiliary decoders, for evaluation, and its config."""
    state = load_checkpoint(path, "tokenizer")
    try:
        cfg = Config(**state["config"])
        cfg.check()
        with torch.device("meta"):
            model = Tokenizer(cfg)
        weights = {k: v for k, v in state["ema"].items() if not k.startswith("aux.")}
        load_strictly(model, weights, f"the tokenizer that {path} says it is")
    except LOAD_ERRORS as error:
        fail(f"{path} is not a tokenizer of this code ({in_a_line(error)})")
    return model.to(device).eval().requires_grad_(False), cfg


# ---------------------------------------------------------------------------------------------------------------------
# The adversary of Eq. 6. Nothing else needs this section: skip it on a first reading.


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class LeCam:
    """LeCam regulariser (Tseng 2021): logits are drawn to the running mean of the other side's, kept in `means`."""

    def __init__(self, run: Run, decay: float = 0.999):
        self.run, self.decay, self.means = run, decay, torch.zeros(2, device=run.device)

    def __call__(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        now = self.run.sum(torch.stack([real.detach().mean(), fake.detach().mean()])) / self.run.world
        means = self.decay * self.means + (1 - self.decay) * now
        self.means = torch.where(means.isfinite(), means, self.means)      # one bad batch must not stay in them
        mean_real, mean_fake = self.means
        return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()


def draw_augmentation(rng: np.random.Generator, batch: int, size: int, cutout: float, chance: float) -> dict:
    """Random numbers of DiffAugment for a batch; each of its three operations is there with probability `chance`."""
    reach, odd = int(size / 8 + 0.5), int(cutout * size + 0.5) % 2
    draws = {"color": rng.random((3, batch), np.float32),            # brightness, saturation, contrast
             "shift": rng.integers(-reach, reach + 1, (2, batch)),   # down, right
             "cutout": rng.integers(0, size + 1 - odd, (2, batch))}
    return {name: torch.from_numpy(draw) for (name, draw), u in zip(draws.items(), rng.random(3)) if u < chance}


def augment(x: torch.Tensor, draws: dict, cutout: float) -> torch.Tensor:
    """DiffAugment (Zhao 2020) of B x 3 x S x S: colour, translation, and a square of cutout * S set to 0 (mid grey)."""
    b, c, s, _ = x.shape
    at = torch.arange(s, device=x.device)
    if "color" in draws:
        brightness, saturation, contrast = draws["color"][..., None, None, None]
        x = x + brightness - 0.5
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * 2 * saturation
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * (contrast + 0.5)
    if "shift" in draws:
        rows, columns = (at + draws["shift"][..., None] + 1).clamp(0, s + 1)          # 2 x B x S into the padded image
        x = F.pad(x, (1, 1, 1, 1)).gather(2, rows[:, None, :, None].expand(b, c, s, s + 2))
        x = x.gather(3, columns[:, None, None, :].expand(b, c, s, s))
    if "cutout" in draws:
        side = int(cutout * s + 0.5)
        first = draws["cutout"][..., None] - side // 2
        rows, columns = (at >= first.clamp(0, s - 1)) & (at <= (first + side - 1).clamp(0, s - 1))
        x = x * ~(rows[:, None, :, None] & columns[:, None, None, :])
    return x


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of B x C x T over the global batch (torch's SyncBatchNorm needs GPUs), or, with `group`, over each
    group of so many images, in training and evaluation alike.
    """

    def __init__(self, channels: int, group: int = 0):
        super().__init__(channels, eps=1e-6)
        self.group = group

    def forward(self, x):
        x = x.float()
        if self.group:
            parts = x.unflatten(0, (-(-len(x) // self.group), -1))               # G x B/G x C x T
            mean, var = parts.mean((1, 3), keepdim=True), parts.var((1, 3), correction=0, keepdim=True)
            x = ((parts - mean) * (var + self.eps).rsqrt()).flatten(0, 1)
        elif not self.training:
            return super().forward(x)
        else:
            mean = over_processes(x.mean((0, 2)))
            var = over_processes((x - mean[:, None]).square().mean((0, 2)))
            with torch.no_grad():
                n = x.numel() // x.shape[1] * (dist.get_world_size() if dist.is_initialized() else 1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
            x = (x - mean[:, None]) * (var[:, None] + self.eps).rsqrt()
        return x * self.weight[:, None] + self.bias[:, None]


def over_processes(x):
    """Mean over the processes, through which gradients flow."""
    return all_reduce(x) / dist.get_world_size() if dist.is_initialized() else x


class DinoDiscriminator(nn.Module):
    """Heads on the frozen features of a DINO ViT-S/16 (StyleGAN-T, VAR): images in [-1, 1] -> logits B x 5*196.

    The trunk stands in a tuple: it is no part of parameters(), state_dict() or train().
    """

    def __init__(self, trunk: VisionTransformer, norm: str = "batch", readouts: tuple = (2, 5, 8, 11)):
        super().__init__()
        self.trunk, self.readouts, width = (trunk,), readouts, trunk.width

        def conv(out, kernel):
            layer = nn.Conv1d(width, out, kernel, padding=kernel // 2, padding_mode="circular")
            return nn.utils.spectral_norm(layer)

        def unit(kernel):
            return nn.Sequential(conv(width, kernel), BatchNorm(width, 8 * (norm == "groups")), nn.LeakyReLU(0.2))

        self.heads = nn.ModuleList(nn.Sequential(unit(1), Residual(unit(9)), conv(1, 1)) for _ in (0, *readouts))

    def forward(self, *views):
        """Logits of each batch of images, whose statistics are kept apart."""
        return [self.logits(x) for x in views]

    def features(self, image):
        """Patch tokens plus class token, B x D x 196, before the layers and after each of `readouts`."""
        trunk = self.trunk[0]
        x = trunk.normalise(image)
        size = trunk.patch * math.isqrt(trunk.pos_embed.shape[1])
        if image.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="area" if image.shape[-1] > size else "bicubic")
        x = trunk.embed(x)
        taps = [x]
        for i, layer in enumerate(trunk.layers[:max(self.readouts) + 1]):
            x = layer(x)
            taps += [x] if i in self.readouts else []
        return [(t[:, 1:] + t[:, :1]).transpose(1, 2) for t in taps]

    def logits(self, image):
        return torch.cat([head(f).flatten(1).float() for head, f in zip(self.heads, self.features(image))], 1)


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return (self.fn(x) + x) / math.sqrt(2)


class PatchDiscriminator(nn.Module):
    """PatchGAN of pix2pix and VQGAN: 3 strided layers from 64 channels; logits B x 30*30 at 256 pixels."""

    def __init__(self, norm: str = "batch", width: int = 64):
        super().__init__()
        sizes = [(3, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 4, stride, 1, bias=i == 3) for i, o, stride in sizes)
        self.norms = nn.ModuleList(BatchNorm(o, 8 * (norm == "groups")) for _, o, _ in sizes[1:])
        self.last = nn.Conv2d(8 * width, 1, 4, 1, 1)
        for conv in (*self.convs, self.last):
            nn.init.normal_(conv.weight, 0, 0.02)
        for m in self.norms:
            nn.init.normal_(m.weight, 1, 0.02)

    def forward(self, *views):
        return [self.logits(x) for x in views]

    def logits(self, x):
        x = F.leaky_relu(self.convs[0](x), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms):
            x = conv(x)
            x = F.leaky_relu(norm(x.flatten(2)).view(x.shape), 0.2)
        return self.last(x).flatten(1).float()


def make_discriminator(cfg: Config, run: Run) -> nn.Module:
    torch.manual_seed(cfg.seed + 1)
    if cfg.adversary == "patchgan":
        return PatchDiscriminator(cfg.adv_norm)
    weights = pretrained("dino_deitsmall16_pretrain", cfg.weights, "--adversary patchgan")
    return DinoDiscriminator(freeze(VisionTransformer(weights, "dino"), run), cfg.adv_norm)


class Adversary:
    """The discriminator, its optimizer and its loss: hinge and LeCam, and consistency under augmentation."""

    def __init__(self, cfg: Config, run: Run, net: nn.Module | None = None):
        self.cfg, self.run, self.lecam = cfg, run, LeCam(run)
        share = run.rows(cfg.batch_size).stop - run.rows(cfg.batch_size).start
        pieces = -(-share // cfg.micro_batch) if cfg.micro_batch else 1
        if cfg.adv_norm == "groups" and share % (8 * pieces):
            fail(f"--adv-norm groups needs a multiple of 8 images at a time, not {share / pieces:g} (--batch-size "
                 f"{cfg.batch_size}, {run.world} processes, --micro-batch {cfg.micro_batch})")
        self.net = (net or make_discriminator(cfg, run)).to(run.device).train()
        self.parallel, self.params = run.parallel(self.net), list(self.net.parameters())
        self.optimizers = make_optimizers(self.net, cfg)

    def view(self, x, purpose: int, step: int, part: slice, cutout: float = 0.2, chance: float = 0.5):
        """x as the discriminator sees it: augmented, and above 224 pixels half of the time a crop of 224 for DINO."""
        cfg, size = self.cfg, x.shape[-1]
        rng = np.random.default_rng([cfg.seed, 6, step, purpose])
        if cfg.diffaug or chance == 1:
            draws = draw_augmentation(rng, cfg.batch_size, size, cutout, chance)
            rows = self.run.rows(cfg.batch_size)
            draws = {k: v[:, rows][:, part].contiguous() for k, v in draws.items()}
            x = augment(x, {k: to_device(v, x.device) for k, v in draws.items()}, cutout)
        if cfg.adversary == "dino" and size > 224 and rng.random() < 0.5:
            top, left = rng.integers(0, size - 223, 2)
            x = x[:, :, top:top + 224, left:left + 224]
        return x

    def generator_loss(self, recon, step: int, part: slice) -> torch.Tensor:
        with self.run.autocast():
            return -self.net(self.view(recon, 0, step, part))[0].mean()

    def train_step(self, real, fake, step: int, rate: float) -> dict:
        """One step on real images and detached reconstructions of the same batch."""
        cfg, terms = self.cfg, {}
        for part in micro_batches(self.parallel, len(real), cfg.micro_batch):
            pair = real[part], fake[part]
            views = [self.view(x, 1 + i, step, part) for i, x in enumerate(pair)]
            if cfg.consistency:
                views += [self.view(x, 3 + i, step, part, 0.5, 1) for i, x in enumerate(pair)]
            with self.run.autocast():
                on_real, on_fake, *again = self.parallel(*views)
            losses = {"hinge": hinge_loss(on_real, on_fake), "lecam": self.lecam(on_real, on_fake)}
            loss = cfg.adv_weight * (losses["hinge"] + cfg.lecam * losses["lecam"])
            if again:
                losses["consistency"] = F.mse_loss(torch.cat([on_real, on_fake]), torch.cat(again))
                loss = loss + cfg.consistency * losses["consistency"]
            share = len(pair[0]) / len(real)
            (loss * share).backward()
            accumulate(terms, losses | {"on_real": on_real.mean(), "on_fake": on_fake.mean()}, share)
        terms["grad_d"], _ = optimizer_step(self.optimizers, self.params, rate, cfg.clip, cfg.skip_nonfinite)
        return terms

    def state_dict(self) -> dict:
        return {"net": self.net.state_dict(), "means": self.lecam.means,
                "optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        self.lecam.means = state["means"].to(self.run.device)
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)


# ---------------------------------------------------------------------------------------------------------------------
# The released weights

RENAMED = [(f"{old}_{theirs}.", f"aux.{ours}.{new}") for theirs, ours in (
    ("hog", "hog"), ("dino", "dinov2"), ("clip", "siglip")) for old, new in (
    ("decoder", ""), ("post_quant_conv", "from_latent."), ("to_pixel", "head."))]
RENAMED += [("post_quant_conv.", "decoder.from_latent."), ("quant_conv.", "to_latent."), ("to_pixel.model.", "head."),
            (".model.", "."), ("cls_token", "class_token"), (".freqs", ".rope_freqs"),
            ("patch_embed.proj", "patch_embed"), ("adaLN_modulation", "modulation")]


def from_official(weights: dict[str, torch.Tensor], enc_heads: int = 0, dec_heads: int = 0,
                  aux_heads: int = 0) -> tuple[Tokenizer, Config]:
    """The state dict of a released AEModel, or of a MaskAEModel in training with its auxiliary decoders, as our
    Tokenizer; heads default to 64 channels each, as in all released sizes.

    Folded away exactly: LayerScale (into the matrix before it) and what never reaches the output (RoPE grids, and in
    decoders the position table beside RoPE, the patch embedding, the modulation of the last norm). A key that is
    missing or left over is an error that names it.
    """
    rope, ours = any(key.endswith(".freqs") for key in weights), {}
    unused = (".model.patch_embed.", ".model.norm.adaLN_modulation.", ".model.head.", ".model.pos_embed")[:3 + rope]
    for key, value in weights.items():
        if "freqs_t_" in key or key.startswith(("projection.", "repa_model.", "clip_model.")):
            continue
        if not key.startswith("encoder.") and any(name in key for name in unused):
            continue
        for old, new in RENAMED:
            key = key.replace(old, new)
        ours[key] = value.float().clone()                 # a copy: the file it is mapped from need not stay
    widths = {name: len(ours[f"aux.{name}.head.weight"]) for name in TARGETS if f"aux.{name}.head.weight" in ours}

    def measure(side):
        return (ours[f"{side}.latent_pos_embed"].shape[-1],
                len({k.split("blocks.")[1].split(".")[0] for k in ours if k.startswith(f"{side}.blocks.")}))

    try:
        fold_layer_scale(ours, "attn.proj", "mlp.fc2")
        conv = ours["encoder.patch_embed.weight"]
        ours["encoder.patch_embed.weight"] = conv.permute(0, 2, 3, 1).flatten(1)       # patchify's order
        patch, rows = conv.shape[-1], ours["encoder.pos_embed"].shape[1] - 1
        (width, depth), (dec_width, dec_depth) = measure("encoder"), measure("decoder")
        aux_width, aux_depth = measure(f"aux.{next(iter(widths))}") if widths else (192, 3)
        cfg = Config(size=patch * math.isqrt(rows), patch=patch, latents=ours["encoder.latent_tokens"].shape[1],
                     channels=len(ours["to_latent.weight"]), width=width, depth=depth,
                     heads=enc_heads or max(1, width // 64), dec_width=dec_width, dec_depth=dec_depth,
                     dec_heads=dec_heads or max(1, dec_width // 64), aux_width=aux_width, aux_depth=aux_depth,
                     aux_heads=aux_heads or max(1, aux_width // 64), targets=",".join(widths) or "none",
                     positions="rope" if rope else "table", dec_class_token="decoder.class_token" in ours,
                     decoder="modulated" if "decoder.blocks.0.modulation.1.weight" in ours else "plain")
        cfg.check()
    except KeyError as error:
        fail(f"not a released tokenizer: {official_name(error.args[0])} is missing")
    except (ValueError, IndexError, RuntimeError, TypeError) as error:
        fail(f"not a released tokenizer: {str(error).splitlines()[0]}")
    ours.setdefault("encoder.mask_token", torch.zeros(1, 1, width))      # models trained without masking have none
    with torch.device("meta"):
        model = Tokenizer(cfg, widths)
    load_strictly(model, ours, "a released tokenizer", official_name)
    return model.eval().requires_grad_(False), cfg


def official_name(name: str) -> str:
    """Our name of a parameter as the released files call it."""
    for old, new in sorted(RENAMED, key=lambda pair: -len(pair[1])):
        name = name.replace(new, old) if new != "." else name
    return re.sub(r"^((?:en|de)coder\w*)\.(cls_token|pos_embed|patch_embed|blocks|norm)", r"\1.model.\2", name)


def convert(cfg: Config, run: Run) -> None:
    """--from-official: config.json and model.safetensors of a folder, or a bare state dict -> ckpt.pt in --out."""
    path, facts = Path(cfg.from_official), {}
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        fail(f"--from-official {cfg.from_official}: there is no {path}")
    about = path.with_name("config.json")
    try:
        if about.exists():
            facts = json.loads(about.read_text())
        statistics = {name: float(facts[f"vq_{name}"]) for name in ("mean", "std") if f"vq_{name}" in facts}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        fail(f"{about} is not the config of a released tokenizer ({error})")
    model, official = from_official(read_weights(path))
    official.data, official.out = cfg.data if cfg.data in NAMED else str(Path(cfg.data).absolute()), cfg.out
    out = run.claim(cfg.out, cfg.fresh)
    if (out / "ckpt.pt").exists():
        fail(f"{out / 'ckpt.pt'} is there already; give another --out, or --fresh to replace it")
    if run.main:
        save_checkpoint(out / "ckpt.pt", {
            "kind": "tokenizer", "config": dataclasses.asdict(official), "stage": 2, "step": 0, "data": "",
            "latent_statistics": statistics, "source": str(path.absolute()), "model": {}, "ema": model.state_dict()})
    run.print(f"{path}: {official.size} px, patch {official.patch}, {official.latents} latents x {official.channels}, "
              f"{official.decoder} decoder, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
              f"latent statistics {statistics or 'not given'}; wrote {out / 'ckpt.pt'}")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def encode_some(model: Tokenizer, images: Images, run: Run, most: int = 20_000, batch: int = 500):
    """Latents, n x L x H in fp32 on the CPU, and labels of all images, or of `most` of them evenly spaced."""
    index, parts = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int), []
    for part in tqdm(np.array_split(index, -(-len(index) // batch)), desc="encoding", leave=False, disable=None):
        with run.autocast():
            parts.append(model.encode(to_float(images[part].to(run.device))).float().cpu())
    return torch.cat(parts), images.labels[index]


@torch.no_grad()
def reconstruct(model: Tokenizer, x: torch.Tensor, run: Run) -> torch.Tensor:
    """uint8 images -> uint8 reconstructions."""
    with run.autocast():
        return to_uint8(model.decode(model.encode(to_float(x.to(run.device)))))


@torch.no_grad()
def evaluate(model: Tokenizer, images: Images, run: Run, lpips=None, batch: int = 250) -> dict:
    """PSNR, SSIM and LPIPS (if given) over the validation images, uint8 to uint8, shared out over the processes."""
    sums, names = torch.zeros(4, dtype=torch.float64), ("psnr", "ssim", "lpips")
    batch = max(1, min(batch, batch * 128**2 // images[np.arange(1)].shape[-1] ** 2))
    for i in range(batch * run.rank, len(images), batch * run.world):
        x = images[np.arange(i, min(i + batch, len(images)))].to(run.device)
        y, scores = reconstruct(model, x, run), [math.nan] * 3
        scores[0] = psnr(x, y).sum().item()
        if x.shape[-1] > 10:
            scores[1] = ssim(x, y).sum().item()
        if lpips:
            with run.autocast():
                scores[2] = lpips(to_float(x), to_float(y)).sum().item()
        sums += torch.tensor([*scores, len(x)], dtype=torch.float64)
    *totals, count = run.sum(sums.to("cuda") if run.device.type == "cuda" else sums).tolist()
    return {name: total / count for name, total in zip(names, totals) if not math.isnan(total)}


def picture(path: Path, images: Images, stage1: Tokenizer, stage2: Tokenizer, cfg: Config, run: Run) -> None:
    """recon.png: original, masked input, what stage 1 makes of it, and both stages on the whole image."""
    x = images[np.arange(min(8, len(images)))]
    n = (cfg.size // cfg.patch) ** 2
    mask = random_mask(len(x), n, (cfg.mask_min + cfg.mask_max) / 2, torch.Generator().manual_seed(cfg.seed))
    hidden = patchify(x, cfg.patch).masked_fill(mask[..., None], 128)
    with torch.no_grad(), run.autocast():
        drop = int(mask[0].sum()) * cfg.drop_masked
        guess = to_uint8(stage1.decode(stage1.encode(to_float(x.to(run.device)), mask.to(run.device), drop)))
    columns = [x, unpatchify(hidden, cfg.patch), guess, reconstruct(stage1, x, run), reconstruct(stage2, x, run)]
    save_grid(path, torch.stack([c.cpu() for c in columns], 1).flatten(0, 1), len(columns),
              ["original", "masked", "from masked", "stage 1", "stage 2"])


def main():
    cfg = parse_config(Config, PRESETS, __doc__)
    run, began = start(cfg), time.time()
    if cfg.from_official:
        return convert(cfg, run)
    if cfg.analyse:
        return analyse(cfg, run)
    if cfg.data not in NAMED:
        cfg.data = str(Path(cfg.data).absolute())        # the later stages find it from any folder
    train = run.first(lambda: load_images(cfg.data, cfg.size, "train"))
    val = load_images(cfg.data, cfg.size, "val")
    run.print(f"{cfg.data}: {len(train)} images to train on, {len(val)} to validate, {len(train.classes)} classes")
    if cfg.bench:
        return benchmark(cfg, run, train)
    out = run.claim(cfg.out, cfg.fresh)
    state = resume(out / "ckpt.pt", "tokenizer", cfg, {"data": train.fingerprint}, run)
    stage, image_loss = state["stage"] if state else 1, make_image_loss(cfg, run)
    exact = dataclasses.replace(run, precision="fp32")
    inception = load_inception(cfg, exact) if cfg.rfid else None
    if stage == 1:
        targets = make_targets(cfg, run, train)
        drop = round((cfg.mask_min + cfg.mask_max) / 2 * cfg.tokens()[0]) * cfg.drop_masked
        *parts, aux = forward_flops(cfg, {name: target.width for name, target in targets.items()}, drop)
        run.print(f"forward per image: {sum(parts) / 1e9:.4g} GFLOP, auxiliary decoders {aux / 1e9:.4g}; training takes "
                  "three times that; frozen networks and the discriminator come on top")
        model = train_stage1(cfg, run, train, targets, image_loss, state)
        del targets                                      # the teachers' memory
        if run.main:
            save_checkpoint(out / "stage1.pt", {"kind": "tokenizer", "config": dataclasses.asdict(cfg), "stage": 1,
                                                "step": cfg.steps, "ema": model.state_dict()})
        run.barrier()
    stage1, _ = load_tokenizer(out / "stage1.pt", run.device)
    stage2 = stage1
    if cfg.stage2_steps:
        stage2 = train_stage2(cfg, run, train, stage1, image_loss, state if stage == 2 else None)
    metrics, judge = {}, Judge(train, val, run) if len(train.classes) > 1 else None
    real = inception_statistics(inception, val, exact) if inception else None
    for name, m in (("stage1", stage1), ("stage2", stage2)):
        metrics[name] = evaluate(m, val, run, image_loss.lpips)
        made = Made(len(val), lambda i, m=m: reconstruct(m, val[i], run))
        if judge:
            metrics[name]["fd_classifier"] = judge(made)["fd_classifier"]
        if inception:
            remade = inception_statistics(inception, made, exact)
            metrics[name]["rfid"] = frechet_distance(real["mu"], real["sigma"], remade["mu"], remade["sigma"])
    if run.main:
        report(cfg, run, train, val, stage1, stage2, metrics, began)
    run.barrier()


def benchmark(cfg: Config, run: Run, images: Images) -> None:
    """--bench: images/s and the share of what the device can do, of the training loops of both stages."""
    cfg.out, cfg.adv_start = str(run.claim(Path(cfg.out) / "bench")), 0          # as most of a run is: with the adversary
    targets, image_loss = make_targets(cfg, run, images), make_image_loss(cfg, run)
    dropped = [round(ratio * cfg.tokens()[0]) * cfg.drop_masked for ratio in (
        (cfg.mask_min + cfg.mask_max) / 2, cfg.mask_max / 2)]
    flops = forward_flops(cfg, {name: t.width for name, t in targets.items()}, dropped[0])
    model, first = bench(cfg, run, 3 * sum(flops), lambda c: train_stage1(c, run, images, targets, image_loss, None))
    model.aux.clear()
    encoder, decoder, _ = forward_flops(cfg, {}, dropped[1])
    _, second = bench(cfg, run, encoder + 3 * decoder, lambda c: train_stage2(c, run, images, model, image_loss, None))
    if run.main:
        write_json(Path(cfg.out) / "bench.json", {"stage 1": first, "stage 2": second})
    run.barrier()


def analyse(cfg: Config, run: Run) -> None:
    """--analyse: linear probe, nearest neighbours and mixtures (App. B.3) of the latents of some tokenizers, compared.

    All are projected to one number of dimensions, --dims or the least that explain 90 % of the variance of each.
    """
    out = run.claim(cfg.out)
    if not run.main:
        return
    rows, latents, dims, first = {}, {}, 1, None
    for path in cfg.analyse.split(","):
        model, trained = load_tokenizer(path, run.device)
        first = first or trained
        if (trained.data, trained.size) != (first.data, first.size):
            fail(f"--analyse: {path} is of {trained.data}, {trained.size} px, not {first.data}, {first.size} px")
        train, val = (load_images(trained.data, trained.size, split) for split in ("train", "val"))
        (z, y), (v, u) = encode_some(model, train, run), encode_some(model, val, run)
        rows[path] = {"latents": list(z.shape[1:]), "data": trained.data, "steps": trained.steps, "seed": trained.seed}
        if len(train.classes) > 1:
            both = (z, y, v, u, len(train.classes))
            rows[path] |= {"linear_probe": linear_probe(*both), "knn_accuracy": knn_accuracy(*both)}
        latents[path] = z.flatten(1), v.flatten(1)
        enough = int((principal_components(latents[path][0])[2] < 0.9).sum()) + 1
        rows[path]["dimensions_for_90_percent"] = enough
        dims = cfg.dims or max(dims, enough)
    for path, (z, v) in latents.items():
        if z.shape[1] < dims:
            fail(f"--analyse: {path} has {z.shape[1]} numbers per image, fewer than {dims}")
        z, v = (x.to("cuda") if run.device.type == "cuda" else x for x in (z, v))
        rows[path]["mixture_nll_per_dimension"] = mixture_curve(z, v, dims, seed=cfg.seed)
        run.print(path, *(f"{k} {v:.4g}" for k, v in rows[path].items() if isinstance(v, (int, float))),
                  "mixtures", *(f"{k}:{v:.4f}" for k, v in rows[path]["mixture_nll_per_dimension"].items()))
    write_json(out / "analysis.json", {"dimensions": dims, "rows": rows, "seed": cfg.seed, "commit": commit()})
    curves = {path: list(row["mixture_nll_per_dimension"].items()) for path, row in rows.items()}
    save_curves(out / "analysis.png", curves,
                "Gaussians in the mixture", f"held-out negative log-likelihood per dimension ({dims} dims)", True)
    run.print(f"wrote {out}/analysis.json, analysis.png")


def report(cfg: Config, run: Run, train: Images, val: Images, stage1: Tokenizer, stage2: Tokenizer, metrics, began):
    """recon.png, metrics.json and a few lines: what the two stages achieved."""
    out, (z, y), (v1, _) = Path(cfg.out), encode_some(stage2, val, run), encode_some(stage1, val, run)
    metrics["latents_unchanged_by_stage2"] = torch.equal(z, v1)
    if len(train.classes) > 1:
        metrics["linear_probe"] = linear_probe(*encode_some(stage2, train, run), z, y, len(train.classes))
    picture(out / "recon.png", val, stage1, stage2, cfg, run)
    metrics |= {"images": len(val), "weights": "ema", "precision": cfg.precision, "seed": cfg.seed, "steps": cfg.steps,
                "stage2_steps": cfg.stage2_steps, "commit": commit(), "seconds": round(time.time() - began)}
    write_json(out / "metrics.json", metrics)
    for name in ("stage1", "stage2"):
        row = metrics[name]
        run.print(f"{name}: validation", ", ".join(f"{key.upper()} {value:.4g}" for key, value in row.items()))
    run.print(f"latents bit-identical before and after stage 2: {metrics['latents_unchanged_by_stage2']}")
    if "linear_probe" in metrics:
        run.print(f"linear probe of the latents: {metrics['linear_probe']:.1%} of {len(train.classes)} classes")
    run.print(f"wrote {out}/ckpt.pt, recon.png, metrics.json in {metrics['seconds']} s")


if __name__ == "__main__":
    launch(main)
