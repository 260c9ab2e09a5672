"""MAETok: masked autoencoders as tokenizers for diffusion models (arXiv 2502.03444).

    torchrun tokenizer.py  # stage 1, stage 2, evaluation -> out/tokenizer/
    python tokenizer.py --from-official DIR --out DIR2  # converts a released checkpoint

Stage 1 (Sec. 3.2) encodes masked images as L latent tokens. A decoder rebuilds the images, and
auxiliary decoders predict features (here HOG) of the masked patches. Stage 2 (Sec. 3.3) tunes the
decoder while the mask ratio falls to 0. Masking, not a KL term, gives the latents structure.

Letters: B images, N patch tokens, L latent tokens, T all tokens, D width, d width of a head,
H latent channels, P patch size, S image size, K classes. "As released": as the authors' code.
"""
import hashlib  # noqa: I001
import json
import math
import re
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import truncnorm
from torch import Tensor, nn

from data import (
    Dist, Ema, ImageSet, Loader, Log, launch, load_checkpoint, make_optimizers, option,
    reading, save_grid, set_lr, to_float, to_uint8)
from fid import (
    Weights, cached_classifier, fold_layer_scale, linear_probe, load_lpips, load_vit, read_weights,
    psnr, reconstruction_metrics)

# ---- The model

positive = partial(option, least=1)
free = partial(option, free=True)  # may differ when a run is resumed

@dataclass(frozen=True)
class ModelConfig:
    """The architecture."""
    size: int = positive(32, "image side S in pixels")
    patch: int = positive(8, "patch side P")
    latents: int = option(8, "latent tokens L; 0: image tokens in their place")
    channels: int = positive(16, "channels H of a latent")
    width: int = positive(192, "width D of encoder and decoder")
    depth: int = positive(3, "layers of each")
    heads: int = positive(3, "attention heads")
    decoder: str = option("plain", "plain: Eq. 5; modulated: as released", ("plain", "modulated"))
    dec_width: int = 0  # 0: that of the encoder, also below
    dec_depth: int = 0
    dec_heads: int = 0
    dec_class_token: bool = False
    positions: str = "rope"  # 2D RoPE of learned frequency; or "table"
    kl: float = option(0.0, "weight of a KL term in nats; above 0: a VAE")
    aux_depth: int = option(3, "layers of auxiliary decoders; 0: linear")
    aux_width: int = 96
    aux_heads: int = 2

    def tokens(self) -> tuple[int, int]:
        """Image tokens N, latent tokens L."""
        n = (self.size // self.patch) ** 2
        return n, self.latents or n

def patchify(x: Tensor, patch: int) -> Tensor:
    """B x C x S x S -> B x N x (P*P*C): patches by row; inside: row, column, channel."""
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B x C x rows x P x columns x P
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of patchify."""
    g = math.isqrt(x.shape[1])
    x = x.view(len(x), g, g, patch, patch, -1)  # B x rows x columns x P x P x C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

def init_rope_freqs(depth: int, heads: int, width: int) -> Tensor:
    """RoPE-Mixed (Heo 2024): frequencies along x and y, 2 x depth x heads*d/2."""
    d = width // heads
    magnitude = 10.0 ** (-torch.arange(0, d, 4).float() / d)  # d/4
    angle = 2 * math.pi * torch.rand(depth, heads, 1, 1)  # each head has its own orientation
    angle = angle + math.pi / 2 * torch.arange(2)[:, None]  # depth x heads x 2 x 1
    return torch.stack([magnitude * angle.cos(), magnitude * angle.sin()]).flatten(2)

def rope_tables(freqs, heads: int, grid: tuple, n_prefix: int, n_latent: int) -> tuple:
    """cos and sin, depth x heads x T x d/2, with T = n_prefix + rows*columns + n_latent."""
    n = torch.arange(grid[0] * grid[1], device=freqs.device)
    x, y = (n % grid[1]).float()[:, None], (n // grid[1]).float()[:, None]
    fx, fy = freqs.float().unflatten(-1, (heads, -1)).unsqueeze(-2)  # depth x heads x 1 x d/2
    # Class and latent tokens have no place in the image: RoPE leaves them as they are
    angles = F.pad(x * fx + y * fy, (0, 0, n_prefix, n_latent))
    return angles.cos(), angles.sin()

def rotate(x, cos, sin) -> Tensor:
    """Turn channels (2i, 2i+1) of x, B x heads x T x d, by angle i, in fp32."""
    pairs = x.float().unflatten(-1, (-1, 2))  # B x heads x T x d/2 x 2
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # takes half the time
        turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
        return torch.view_as_real(turned).flatten(-2)
    even, odd = pairs.unbind(-1)  # B x heads x T x d/2
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

class Attention(nn.Module):
    """Self-attention. `qk_norm`: class of the norms of q and k."""

    def __init__(self, width: int, heads: int, qk_norm: type = nn.Identity):
        super().__init__()
        self.heads, d = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = qk_norm(d), qk_norm(d)

    def forward(self, x, rope=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # B x T x 3 x heads x d
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # B x heads x T x d
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if v.device.type == "cpu" and v.dtype == torch.bfloat16:  # takes half the time
            out = (q / math.sqrt(q.shape[-1]) @ k.mT).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))  # B x T x D

class Mlp(nn.Sequential):
    def __init__(self, width: int, approximate: str = "none"):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate)
        self.fc2 = nn.Linear(4 * width, width)

class Block(nn.Module):
    """A pre-norm layer. With `channels`, the latents h modulate their rows (as released)."""

    def __init__(self, width: int, heads: int, channels: int = 0):
        super().__init__()
        norm = partial(nn.LayerNorm, width, 1e-6, elementwise_affine=not channels)
        self.norm1, self.attn = norm(), Attention(width, heads)
        self.norm2, self.mlp = norm(), Mlp(width)
        if channels:
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 4 * width))

    def forward(self, x, rope=None, h=None):
        if not hasattr(self, "modulation"):
            x = x + self.attn(self.norm1(x), rope)  # B x T x D
            return x + self.mlp(self.norm2(x))
        shift1, scale1, shift2, scale2 = self.modulation(h).chunk(4, -1)  # B x L x D
        x = x + self.attn(modulate_tail(self.norm1(x), scale1, shift1), rope)
        return x + self.mlp(modulate_tail(self.norm2(x), scale2, shift2))

def modulate_tail(x, scale, shift):
    n = scale.shape[1]
    return torch.cat([x[:, :-n], x[:, -n:] * scale + shift], 1)  # not 1 + scale

def learned_tokens(width: int, *counts: int) -> list[nn.Parameter]:
    return [nn.Parameter(0.02 * torch.randn(1, n, width)) for n in counts]

class Layers(nn.Module):
    """Layers over the tokens [class | image | latents], of encoder and decoders."""

    def add_layers(self, cfg: ModelConfig, width: int, depth: int, heads: int, channels: int = 0):
        self.grid, self.heads, self.latents = (cfg.size // cfg.patch,) * 2, heads, cfg.latents
        if cfg.positions == "rope":
            self.rope_freqs = nn.Parameter(init_rope_freqs(depth, heads, width))
        self.blocks = nn.ModuleList(Block(width, heads, channels) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-6, not channels)

    def run(self, x, latents, h=None):
        """B x N x D and [B x L x D] or [] -> both after the last layer."""
        n, first, ropes = x.shape[1], 0, [None] * len(self.blocks)
        if hasattr(self, "class_token"):
            first, x = 1, torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        if hasattr(self, "pos_embed"):
            x = x + self.pos_embed
        if hasattr(self, "rope_freqs"):
            ropes = zip(*rope_tables(self.rope_freqs, self.heads, self.grid, first, self.latents))
        x = torch.cat([x, *latents], 1).float()  # B x T x D: layers add up in fp32
        for block, rope in zip(self.blocks, ropes):
            x = block(x, rope, h)
        x = self.norm(x)
        return x[:, first:first + n], x[:, first + n:]

class Encoder(Layers):
    """Image -> latent tokens, B x L x D (Eq. 4); without any, image tokens."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        d, self.patch = cfg.width, cfg.patch
        self.patch_embed = nn.Linear(3 * cfg.patch**2, d)  # a convolution of stride P
        self.mask_token, self.class_token = learned_tokens(d, 1, 1)
        (self.pos_embed,) = learned_tokens(d, 1 + cfg.tokens()[0])  # as released, beside RoPE
        if cfg.latents:
            self.latent_tokens, self.latent_pos_embed = learned_tokens(d, cfg.latents, cfg.latents)
        self.add_layers(cfg, d, cfg.depth, cfg.heads)

    def forward(self, image, mask=None):
        """mask: B x N, True: masked."""
        x = self.patch_embed(patchify(image, self.patch))  # B x N x D
        if mask is not None:  # replaced, not dropped: the length stays N
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        if not self.latents:
            return self.run(x, [])[0]
        z = self.latent_tokens + self.latent_pos_embed  # 1 x L x D
        return self.run(x, [z.expand(len(x), -1, -1)])[1]  # B x L x D

class Decoder(Layers):
    """Latents -> pixels (Eq. 5) or features (Eq. 7) of each patch, B x N x out."""

    def __init__(self, cfg: ModelConfig, size: tuple, out: int, class_token: bool):
        super().__init__()
        width = size[0]  # then depth, heads
        self.from_latent = nn.Linear(cfg.channels, width)
        if cfg.latents:
            self.mask_token, self.latent_pos_embed = learned_tokens(width, 1, cfg.latents)
        if class_token:
            (self.class_token,) = learned_tokens(width, 1)
        if cfg.positions == "table":
            (self.pos_embed,) = learned_tokens(width, class_token + cfg.tokens()[0])
        self.add_layers(cfg, *size, cfg.channels * (cfg.decoder == "modulated"))
        self.head = nn.Linear(width, out)

    def features(self, h):
        """The input of the last matrix: B x N x D."""
        z = self.from_latent(h)  # B x L x D
        if not self.latents:  # they are the image tokens
            return self.run(z, [], h)[0]
        x = self.mask_token.expand(len(h), math.prod(self.grid), -1)  # N copies of one token e
        return self.run(x, [z + self.latent_pos_embed], h)[0]

    def forward(self, h):
        return self.head(self.features(h))  # B x N x out

class LinearDecoder(nn.ModuleDict):
    """A matrix over tokens, L -> N, and one over channels, H -> out."""

    def __init__(self, cfg: ModelConfig, out: int):
        n, n_latent = cfg.tokens()
        super().__init__({"mix": nn.Linear(n_latent, n), "head": nn.Linear(cfg.channels, out)})

    def forward(self, h):
        return self.head(self.mix(h.mT).mT)  # B x N x out

class Tokenizer(nn.Module):
    """Images B x 3 x S x S in [-1, 1] <-> latents B x L x H. `widths`: of the targets."""

    def __init__(self, cfg: ModelConfig, widths: dict[str, int] | None = None):
        super().__init__()
        self.patch, self.variational = cfg.patch, cfg.kl > 0
        self.encoder = Encoder(cfg)
        self.to_latent = nn.Linear(cfg.width, cfg.channels * (1 + self.variational))
        size = cfg.dec_width or cfg.width, cfg.dec_depth or cfg.depth, cfg.dec_heads or cfg.heads
        self.decoder = Decoder(cfg, size, 3 * cfg.patch**2, cfg.dec_class_token)
        size, self.aux = (cfg.aux_width, cfg.aux_depth, cfg.aux_heads), nn.ModuleDict()
        for name, out in (widths or {}).items():
            self.aux[name] = Decoder(cfg, size, out, True) if cfg.aux_depth else LinearDecoder(cfg, out)
        normal = partial(nn.init.trunc_normal_, std=0.02)  # as released
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)
                (nn.init.zeros_ if "modulation" in name else normal)(m.weight)

    def encode(self, image, mask=None):
        """Images -> latents; of a VAE, their mean."""
        return self.to_latent(self.encoder(image, mask)).chunk(1 + self.variational, -1)[0]

    def decode(self, h):
        """Latents -> images, not clamped."""
        return unpatchify(self.decoder(h).float(), self.patch)

    def forward(self, image, mask=None, noise=None):
        """What training needs, by name. noise, B x L x H, samples the latents of a VAE."""
        out, h = {}, self.to_latent(self.encoder(image, mask))
        if self.variational:
            h, log_var = h.float().chunk(2, -1)  # B x L x H each
            if noise is not None:
                log_var = log_var.clamp(-30, 20)
                out["kl"] = 0.5 * (h.square() + log_var.exp() - 1 - log_var).sum((1, 2)).mean()
                h = h + (0.5 * log_var).exp() * noise
        hidden = self.decoder.features(h)  # B x N x D
        out["recon"] = unpatchify(self.decoder.head(hidden).float(), self.patch)
        out["hidden"] = hidden.detach()
        return out | {name: aux(h) for name, aux in self.aux.items()}  # B x N x out

# ---- Crops, masks and targets

def random_crop(x: Tensor, size: int, batch: int, mine: slice, rng: np.random.Generator) -> Tensor:
    """Resize each square image to a random side from S to that of x, crop S x S."""
    sides = rng.integers(size, x.shape[-1] + 1, batch)
    places, crops = rng.integers(0, sides - size + 1, (2, batch)), []
    for image, side, (top, left) in zip(x, sides[mine], places.T[mine]):
        image = F.interpolate(image[None], (side, side), mode="bicubic", antialias=True)
        crops.append(image[:, :, top:top + size, left:left + size])
    return torch.cat(crops).clamp(-1, 1)

def sample_mask_ratio(low: float, high: float, rng: np.random.Generator) -> float:
    """As released: normal around `high`, cut to [low, high]."""
    if low == high:
        return high
    return float(truncnorm.ppf(rng.random(), (low - high) / 0.25, 0, high, 0.25))

def random_mask(batch: int, n: int, ratio: float, generator: torch.Generator) -> Tensor:
    """B x N, True on ceil(N * ratio) random patches of each image."""
    noise = torch.rand(batch, n, generator=generator, device=generator.device)
    return noise.argsort(1).argsort(1) < math.ceil(n * ratio)  # ranks are random orders

def hog(x: Tensor, patch: int, cell: int = 0, window: int = -1) -> Tensor:
    """Histograms of gradients, B x 3 x S x S -> B x N x 27*(P/cell)^2; window 0: MaskFeat's.

    The official ones of P = 16, scaled. Order: channel, bin, cell row, cell column.
    """
    cell, window = cell or patch // 2, patch if window < 0 else window
    b, c, s, _ = x.shape
    padded = F.pad(x.float(), (1, 1, 1, 1), "reflect")
    gx, gy, slope, smooth = 0, 0, (1, 0, -1), (1, 2, 1)
    # Sobel's filters, not conv2d: each machine adds in this order, or a bin may change by rounding
    for i, j in np.ndindex(3, 3):
        shifted = padded[..., i:i + s, j:j + s]
        gx = gx + smooth[i] * slope[j] * shifted
        gy = gy + slope[i] * smooth[j] * shifted
    magnitude = torch.hypot(gx, gy)  # B x 3 x S x S
    if window:  # a Gaussian, tiled over the image
        w = torch.signal.windows.gaussian(window, std=window // 2, device=x.device)
        w = torch.outer(w, w) / w.sum() ** 2
        magnitude = magnitude * w.repeat(s // window, s // window)

    # Opposite gradients fall into the same bin
    bins = torch.floor(torch.atan2(gx, gy) / math.pi * 9).long() % 9
    bars = torch.zeros(b, c, 9, s, s, device=x.device)
    bars.scatter_(2, bins[:, :, None], magnitude[:, :, None])  # B x 3 x 9 x S x S
    bars = F.avg_pool2d(bars.flatten(1, 2), cell) * cell**2  # B x 27 x S/cell x S/cell
    bars = F.normalize(bars.unflatten(1, (c, 9)), dim=2).flatten(1, 2)
    return F.pixel_unshuffle(bars, patch // cell).flatten(2).mT

def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean of B x N errors over the masked patches."""
    return (error * mask).sum() / mask.sum()

def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Eq. 8: squared error of B x N x out on the masked patches only."""
    return masked_mean((prediction.float() - target).square().mean(-1), mask)

def masked_cosine(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Negative cosine similarity: the released code's loss for teachers."""
    return masked_mean(-F.cosine_similarity(prediction.float(), target, dim=-1), mask)

# What an auxiliary decoder predicts. features(images B x 3 x S x S in [-1, 1]) -> B x N x width.
# One weight for all; HOG's mean square is 0.1
Target = namedtuple("Target", "width features loss")

def teacher_target(cfg: "Config", dist: Dist, images: ImageSet, name: str) -> Target:
    """Patch features of a frozen network."""
    net = (cached_classifier(images, dist, cfg.out, seed=1)
           if name == "classifier" else
           load_vit(name, cfg.weights, dist, "--targets hog", resample=cfg.teacher_patch))
    dist.compiled(net, cfg.compile)  # for a ViT's forward
    features = partial(net.patch_features, grid=cfg.size // cfg.patch)
    loss = masked_cosine if cfg.teacher_loss == "cosine" else masked_mse
    return Target(net.width, dist.autocast()(features), loss)

# To add a target: its line here, a function of (cfg, dist, training ImageSet)
TARGETS = {
    "pixel": lambda cfg, *_: Target(3 * cfg.patch**2, partial(patchify, patch=cfg.patch), masked_mse),
    "hog": lambda cfg, *_: Target(3 * 9 * 4, partial(hog, patch=cfg.patch), masked_mse),  # 4 cells a patch
    "dinov2": lambda cfg, *rest: teacher_target(cfg, *rest, f"dinov2_{cfg.dinov2}_pretrain"),
    "siglip": lambda cfg, *rest: teacher_target(cfg, *rest, f"siglip-{cfg.siglip}"),
    "classifier": partial(teacher_target, name="classifier")}

# ---- The image loss

def image_loss(recon, x, lpips) -> dict[str, Tensor]:
    """L_recon and L_percep of Eq. 6. L_adv is Adversary.generator_loss."""
    losses = {"recon": F.mse_loss(recon, x)}
    if lpips:
        losses["lpips"] = lpips(recon, x).mean()
    return losses

def adaptive_weight(grad_nll, grad_adv, hidden, patch: int, dist: Dist) -> Tensor:
    """|d (L_recon + lambda1 L_percep) / dW| / |d L_adv / dW| of a micro-batch.

    W is the decoder's last matrix. Its gradient is the product of the gradient at the pixels,
    B x 3 x S x S, and its input `hidden`, B x N x D.
    """
    grads = [torch.einsum("bnp,bnd->pd", patchify(grad, patch), hidden.float())
             for grad in (grad_nll, grad_adv)]
    nll, adv = dist.all_reduce(torch.stack(grads)).flatten(1).norm(dim=1) / dist.world_size
    return (nll / (adv + 1e-4)).clamp(0, 1e4)

# ---- Training

@dataclass(frozen=True)
class Config(ModelConfig):
    """The architecture and a run. Defaults = preset `quick`."""
    data: str = free("shapes", "shapes, cifar10, imagenette, or a folder")
    images: str = ""  # the fingerprint of its training images
    out: str = free("out/tokenizer", "folder of the run")
    augment: str = option("none", "crop: random size and place", ("none", "crop"))
    mask_min: float = option(0.4, "lowest mask ratio of stage 1")
    mask_max: float = option(0.6, "highest; 0: see --preset ae")
    targets: str = option("hog", f"any of {','.join(TARGETS)}; or none")
    dinov2: str = "vitl14"  # or vits14, vitb14, or with _reg4
    siglip: str = "large-patch16-256"  # or so400m-patch14-224
    teacher_patch: int = 0  # of both; 0: theirs
    teacher_loss: str = "cosine"  # of dinov2, siglip, classifier; "mse": Eq. 8
    aux_weight: float = option(1.0, "weight of targets, one for all (Eq. 8)")
    lpips: float = option(0.0, "weight of LPIPS-VGG (lambda 1 of Eq. 6)")
    lpips_warmup: int = 0  # steps over which that weight rises
    adversary: str = option("none", "discriminator on DINO features", ("none", "dino"))
    adv_weight: float = 0.4  # lambda 2 of Eq. 6, times the adaptive weight
    adv_start: int = 0  # step
    disc_lr: float = 0.0  # its learning rate; 0: lr
    lecam: float = 0.001  # weight
    consistency: float = 4.0  # weight
    diffaug: bool = True
    weights: str = free("", "folder of pretrained networks")
    rfid: bool = free(False, "evaluate rFID")
    init: str = option("", "checkpoint to start from, ours or released")
    stage2_only: bool = option(False, "train stage 2 alone, from --init")
    from_official: str = option("", "released checkpoint to convert")
    steps: int = positive(2150, "steps of stage 1")
    stage2_steps: int = option(1000, "steps of stage 2")
    batch_size: int = positive(64, "images a step, of all processes")
    micro_batch: int = free(0, "images at once in a process; 0: all")
    optimizer: str = option("muon", "muon: of matrices inside blocks", ("adamw", "muon"))
    lr: float = option(2e-3, "peak learning rate of AdamW")
    muon_lr: float = 1.5e-2
    beta2: float = 0.95
    weight_decay: float = 1e-4
    warmup: int = 50  # steps
    schedule: str = "cosine"  # to a tenth
    clip: float = 1.0  # largest gradient norm; 0: any
    ema: float = 0.998  # decay of the weight average
    log_every: int = 200
    save_every: int = free(400, "steps between checkpoints", least=1)
    seed: int = option(0, "of all random numbers")
    compile: bool = free(False, "torch.compile; presets of one GPU and more set it there")
    precision: str = free("auto", "auto: bf16 where fast", ("auto", "fp32", "bf16"))

    def check(self):
        names = self.target_names()
        if self.size % self.patch or self.patch % 2:
            raise ValueError(f"--size {self.size} must be a multiple of an even --patch")
        if self.width % (4 * self.heads):
            raise ValueError(f"--width {self.width} must be a multiple of 4 --heads")
        if not 0 <= self.mask_min <= self.mask_max < 1:
            raise ValueError("0 <= --mask-min <= --mask-max < 1 is needed")
        if len(names) != len({*names} & {*TARGETS}):
            raise ValueError(f"--targets {self.targets}: each once of {','.join(TARGETS)}; or none")
        if self.stage2_only and not (self.init and self.stage2_steps):
            raise ValueError("--stage2-only needs --init and --stage2-steps")

    def target_names(self) -> list[str]:
        return [] if self.targets == "none" else self.targets.split(",")

PAPER = {  # Sec. 3 and Table 7; [code]: not there, from the released code; [ours]: in neither
    "data": "imagenet",  # [ours] stands for yours: give --data
    "size": 256, "patch": 16, "latents": 128, "channels": 32, "width": 768, "depth": 12, "heads": 12,
    "decoder": "plain",  # Eq. 5; the released decoder is "modulated"
    "mask_min": 0.4, "mask_max": 0.6, "targets": "hog,dinov2,siglip", "aux_depth": 3,
    "dinov2": "vitl14", "siglip": "large-patch16-256",
    "aux_width": 192, "aux_heads": 3, "aux_weight": 1.0,  # [code]
    "teacher_loss": "cosine",  # [code]; Eq. 8 is "mse"
    "lpips": 1.0,
    "lpips_warmup": 10_000,  # [code]
    "adversary": "dino",  # [code] on DINO ViT-S/16; the paper says DINOv2-S
    "adv_weight": 0.4, "adv_start": 30_000, "lecam": 0.001,
    "diffaug": True, "consistency": 4.0,  # [code]
    "steps": 500_000, "stage2_steps": 50_000, "batch_size": 512,
    "micro_batch": 64,  # [ours] 33 GiB of activations, 530 MiB an image with LPIPS and discriminator
    "optimizer": "adamw", "lr": 1e-4, "beta2": 0.95, "weight_decay": 1e-4, "warmup": 10_000,
    "clip": 1.0, "ema": 0.9999,  # [code]
    "log_every": 100, "save_every": 2000, "rfid": True,  # [ours]
    "compile": torch.cuda.is_available()}
RELEASED = PAPER | {  # [code]: its yaml, where that is not the paper; no stage 2
    "decoder": "modulated", "siglip": "so400m-patch14-224", "teacher_patch": 16, "augment": "crop",
    "lr": 2e-4,  # 1e-4 * batch / 256
    "steps": 500_400, "warmup": 5004}  # 200 and 2 epochs
ONE_GPU = {  # [ours], not run
    "batch_size": 256, "stage2_steps": 10_000, "warmup": 500, "lr": 1e-3, "muon_lr": 1e-2,
    "ema": 0.999, "aux_width": 128, "channels": 16, "save_every": 2000,
    "compile": torch.cuda.is_available()}
AE = {"mask_min": 0.0, "mask_max": 0.0, "targets": "none"}
PRESETS = {
    "quick": {},
    "ae": AE, "vae": AE | {"kl": 1e-5},  # the paper's ablations, here and below
    "mae_pixel": {"targets": "pixel"}, "mae_hog": {"targets": "hog"},
    "mae_teacher": {"targets": "classifier", "aux_weight": 0.1},  # [ours]; 1 costs 1.6 dB
    "cifar10": ONE_GPU | {"data": "cifar10", "size": 32, "patch": 4, "latents": 16, "width": 384,
                          "depth": 6, "heads": 6, "steps": 30_000},
    "imagenette64": ONE_GPU | {"data": "imagenette", "size": 64, "patch": 8, "latents": 32, "width": 512,
                               "depth": 8, "heads": 8, "steps": 40_000},
    "imagenet256": PAPER, "released256": RELEASED,
    # [ours], from Sec. 3: 128 latents at 512 px too, patch still 16
    "imagenet512": PAPER | {"size": 512, "micro_batch": 16}}

def train(cfg: Config, dist: Dist, stage: int, model: Tokenizer, images: ImageSet, val: Tensor,
          targets: dict[str, Target], lpips, adversary, state: dict | None) -> Tokenizer:
    """Stage 1: all parts, by Eq. 6 and Eq. 8; stage 2: the decoder, by Eq. 6. -> averaged model."""
    steps = cfg.steps if stage == 1 else cfg.stage2_steps
    if stage == 2:  # encoder and latents stay bit-identical
        model.requires_grad_(False).decoder.requires_grad_(True)
    ema, own = Ema(model, cfg.ema), make_optimizers(model, cfg, dist)
    optimizers = own + (adversary.optimizers if adversary else [])
    stateful = [*optimizers, adversary] if adversary else optimizers
    start = restore(state, model, ema, stateful) if state else 0

    net = dist.wrap(dist.compiled(model, cfg.compile))  # DDP: averages gradients over processes
    batch, mine = cfg.batch_size, dist.local_slice(cfg.batch_size)
    loader = Loader(images, batch, cfg.seed, dist)
    n, n_latent = cfg.tokens()
    log = Log(cfg, dist, f"stage {stage}", start, steps, loader)
    log.count_flops(model, torch.zeros(1, 3, cfg.size, cfg.size), torch.zeros(1, n).bool())

    def whole():  # masked losses do not show a failure on whole images
        return {"val_psnr": psnr(val.to(dist.device), reconstruct(ema.model, val, dist)).mean()}

    for step in range(start, steps):
        total_step = step if stage == 1 else cfg.steps + step
        adversarial = adversary and total_step + 1 >= cfg.adv_start
        x, _ = loader(total_step)  # B x 3 x S x S in [-1, 1], this process's rows; larger before a crop
        if cfg.augment == "crop":
            rng = dist.rng(cfg.seed, "augmentation", total_step, 5)  # the adversary uses 0 to 4
            x = random_crop(x, cfg.size, batch, mine, rng)

        # The mask: one ratio for the whole batch
        if stage == 1:
            rng = dist.rng(cfg.seed, "mask ratio", step)
            stream, ratio = "mask", sample_mask_ratio(cfg.mask_min, cfg.mask_max, rng)
        else:
            stream, ratio = "mask, stage 2", cfg.mask_max * (1 - step / max(1, steps - 1))
        mask = random_mask(batch, n, ratio, dist.generator(cfg.seed, stream, step))[mine]  # B x N
        inputs = [x, mask]
        if cfg.kl and stage == 1:  # noise for the latents of a VAE
            generator = dist.generator(cfg.seed, "training noise", step)
            shape = batch, n_latent, cfg.channels
            inputs.append(torch.randn(shape, generator=generator, device=x.device)[mine])

        terms, recons = {}, []
        for micro, share in dist.micro_batches(net, len(x), cfg.micro_batch):  # share: its part of x
            with dist.autocast():
                out = net(*(rows[micro] for rows in inputs))
                # Eq. 6, at the detached pixels: the adaptive weight needs the gradient of each loss there
                recon = out["recon"].detach().requires_grad_()
                losses = image_loss(recon, x[micro], lpips)
            nll = losses["recon"]
            if lpips:
                nll = nll + cfg.lpips * min(1, (total_step + 1) / max(1, cfg.lpips_warmup)) * losses["lpips"]
            (grad_recon,) = torch.autograd.grad(nll, recon)  # B x 3 x S x S
            if adversarial:
                losses["adv"] = adversary.generator_loss(recon, total_step, micro)
                (grad_adv,) = torch.autograd.grad(losses["adv"], recon)  # B x 3 x S x S
                weight = adaptive_weight(grad_recon, grad_adv, out["hidden"], cfg.patch, dist)
                losses["adaptive"] = weight
                grad_recon = grad_recon + cfg.adv_weight * weight * grad_adv

            # Eq. 8, and the KL term of a VAE
            aux_loss = 0
            if "kl" in out:
                losses["kl"] = out["kl"]
                aux_loss = cfg.kl * out["kl"]
            for name, target in targets.items():
                where = mask[micro] | (cfg.mask_max == 0)  # an autoencoder: everywhere
                losses[name] = target.loss(out[name], target.features(x[micro]), where)
                aux_loss = aux_loss + cfg.aux_weight * losses[name]

            # One backward pass. The gradient of image_term at the reconstruction is grad_recon;
            # its value means nothing. DDP averages over processes in the last micro-batch
            image_term = (out["recon"] * grad_recon).sum()
            ((image_term + aux_loss) * share).backward()
            recons.append(recon.detach())
            for name, value in losses.items():
                terms[name] = terms.get(name, 0) + share * value.detach()

        lr_scale = set_lr(optimizers, step, steps, cfg)
        terms["grad"] = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        for optimizer in own:
            optimizer.step()
            optimizer.zero_grad()
        if adversarial:
            terms |= adversary.train_step(x, torch.cat(recons), total_step)
        ema.update(step)

        done = step + 1
        saving = done == steps or done % cfg.save_every == 0
        log.add(lr_scale, **terms)
        if saving or done % cfg.log_every == 0:
            log.write(done, whole if saving else dict)
        if saving:
            dist.save(Path(cfg.out) / "ckpt.pt", {
                "kind": "tokenizer", "config": asdict(cfg), "stage": stage, "step": done,
                "model": model.state_dict(), "ema": ema.model.state_dict(),
                "optimizers": [part.state_dict() for part in stateful]})
    return ema.model

def restore(state: dict, model: nn.Module, ema: Ema, optimizers: list) -> int:
    """Load a checkpoint. Returns its step."""
    with reading("the checkpoint in --out", "one of these settings"):
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["step"]

def stretch(table: Tensor, rows: int) -> Tensor:
    """Resize positions, 1 x ([class +] N) x D, to another grid."""
    old, new = math.isqrt(table.shape[1]), math.isqrt(rows)
    first, grid = table.split([table.shape[1] - old**2, old**2], 1)
    grid = F.interpolate(grid.mT.unflatten(2, (old, old)), (new, new), mode="bicubic")
    return torch.cat([first, grid.flatten(2).mT], 1)

@torch.no_grad()
def take_over(model: nn.Module, weights: Weights, dist: Dist) -> list[str]:
    """Start from the weights of another run where name and shape agree. Returns the names of the rest."""
    own = model.state_dict()
    names = {"taken over": [], "stretched": [], "new": [], "dropped": sorted(weights.keys() - own.keys())}
    for name, p in own.items():
        w, kind = weights.get(name, torch.empty(0)), "taken over"
        if name.endswith(".pos_embed") and w.ndim == 3 and w.shape != p.shape:
            w, kind = stretch(w, p.shape[1]), "stretched"
        if w.shape == p.shape:
            p.copy_(w)
        names[kind if w.shape == p.shape else "new"].append(name)
    for kind, found in names.items():
        dist.print(f"--init: {len(found)} {kind}:", ", ".join(found[:8] + ["..."] * (len(found) > 8)))
    if all(own[name].ndim < 2 for name in names["taken over"]):
        dist.die("--init: no matrix fits; give the sizes of that model")
    return names["new"]

def fingerprint(weights: Weights, parts=("encoder.", "to_latent.")) -> str:
    """Hash of the weights of these parts; the default decides the latents."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        if name.startswith(parts):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

def read_init(path: str) -> tuple[Weights, str]:
    """Weights of a checkpoint, ours or a released one, and their hash."""
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    with reading(path, "a checkpoint to start from"):
        released = file.suffix == ".safetensors"
        weights = (from_official(read_weights(file))[0].state_dict() if released
                   else load_checkpoint(file, "tokenizer")["ema"])
        return weights, fingerprint(weights, "")

# ---- Evaluation and main

def load_tokenizer(path: str | Path, device: torch.device) -> tuple[Tokenizer, Config]:
    """The averaged model of a checkpoint, without auxiliary decoders; its settings."""
    state = load_checkpoint(path, "tokenizer")
    with reading(path, "a tokenizer of this code"):
        cfg = Config(**{k: v for k, v in state["config"].items() if k != "adv_norm"})  # once a field
        with torch.device("meta"):
            model = Tokenizer(cfg)
        weights = {name: w for name, w in state["ema"].items() if name[:4] != "aux."}
        model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False), cfg

@torch.no_grad()
def encode_images(model: Tokenizer, x: Tensor, dist: Dist, mask: Tensor | None = None) -> Tensor:
    """uint8 B x 3 x S x S -> latents B x L x H, fp32, on the device."""
    with dist.autocast():
        return model.encode(to_float(x.to(dist.device)), mask).float()

@torch.no_grad()
def decode_images(model: Tokenizer, h: Tensor, dist: Dist) -> Tensor:
    """Latents B x L x H -> uint8 B x 3 x S x S, on the device."""
    with dist.autocast():
        return to_uint8(model.decode(h))

def reconstruct(model: Tokenizer, x: Tensor, dist: Dist) -> Tensor:
    return decode_images(model, encode_images(model, x, dist), dist)

def encode_dataset(model: Tokenizer, images: ImageSet, dist: Dist, most: int = 20_000) -> tuple:
    """Latents n x L x H, on the CPU, and labels of at most `most` images."""
    index = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    parts = np.array_split(index, math.ceil(len(index) / 500))
    z = [encode_images(model, images[part], dist).cpu() for part in parts]
    return torch.cat(z), images.labels[index]

def evaluate(cfg: Config, dist: Dist, images: ImageSet, val: ImageSet, stages: dict, lpips) -> dict:
    """Scores of the reconstructions, linear probe of the latents, recon.png."""
    metrics = {"images": len(val), "precision": dist.precision, "seed": cfg.seed,
               "steps": cfg.steps * (not cfg.stage2_only), "stage2_steps": cfg.stage2_steps}
    classes = len(images.classes)
    # The classifier is weak on a thousand classes, and its training reads all images
    judge = cached_classifier(images, dist, cfg.out) if 1 < classes < 1000 else None
    inception = cfg.weights if cfg.rfid else None
    for name, model in stages.items():
        make = partial(reconstruct, model, dist=dist)
        metrics[name] = reconstruction_metrics(make, val, dist, judge, lpips, inception)
        dist.print(name, *(f" {key} {value:.4g}" for key, value in metrics[name].items()))
    if not dist.is_main:
        return metrics
    if classes > 1:
        (train_z, train_y), (z, y) = (encode_dataset(stages["stage2"], part, dist) for part in (images, val))
        metrics["linear_probe"] = linear_probe(train_z, train_y, z, y, classes, dist.device)
        metrics["probe_images"] = len(train_z), len(z)
        dist.print(f"linear probe: {metrics['linear_probe']:.1%}, fitted on {len(train_z):,}, tested on {len(z):,}")

    at = np.linspace(0, len(val) - 1, min(8, len(val))).astype(int)
    x, ratio = val[at], (cfg.mask_min + cfg.mask_max) / 2
    mask = random_mask(len(x), cfg.tokens()[0], ratio, torch.Generator().manual_seed(cfg.seed))
    masked = patchify(x, cfg.patch).masked_fill(mask[..., None], 128)
    h = encode_images(stages["stage1"], x, dist, mask.to(dist.device))
    columns = [x, unpatchify(masked, cfg.patch), decode_images(stages["stage1"], h, dist),
               *(reconstruct(model, x, dist) for model in stages.values())]
    grid = torch.stack([column.cpu() for column in columns], 1).flatten(0, 1)
    save_grid(Path(cfg.out) / "recon.png", grid, 5, ("original", "masked", "rebuilt", *stages))
    return metrics

def main(cfg: Config, dist: Dist):
    if cfg.from_official:
        return convert(cfg, dist)
    dist.local_slice(cfg.batch_size)  # ends the run if it cannot be shared
    images = source = dist.rank0_first(lambda: ImageSet(cfg.data, cfg.size, "train", cfg.out))
    if cfg.augment == "crop":  # from larger images
        source = dist.rank0_first(lambda: ImageSet(cfg.data, math.ceil(1.25 * cfg.size), "train"))
    val = ImageSet(cfg.data, cfg.size, "val")
    shown = val[np.linspace(0, len(val) - 1, min(64, len(val))).astype(int)]
    cfg = replace(cfg, data=images.data, images=images.fingerprint)
    dist.print(f"{cfg.data}: {images.describe()}; validation {len(val):,}")

    out, state, stage = Path(cfg.out), None, 1
    if (out / "ckpt.pt").exists():
        state = load_checkpoint(out / "ckpt.pt", "tokenizer")
        stage, step = state.get("stage", 1), state.get("step")
        if step is None or cfg.stage2_only and stage == 1:
            dist.die(f"{out} holds the ckpt.pt of something else: give another --out")
        dist.print(f"continuing {out / 'ckpt.pt'} at step {step} of stage {stage}, saved by {state['commit']}")

    if cfg.init:  # known by its hash
        weights, digest = read_init(cfg.init)
        cfg = replace(cfg, init=digest)

    # A folder is made only after the networks of the loss are there
    lpips = dist.compiled(load_lpips(cfg.weights, dist), cfg.compile) if cfg.lpips else None
    adversary = Adversary(cfg, dist) if cfg.adversary == "dino" else None
    names = cfg.target_names() if stage == 1 and not cfg.stage2_only else []
    targets = {name: TARGETS[name](cfg, dist, images) for name in names}
    if stage == 1:
        torch.manual_seed(cfg.seed)
        model = Tokenizer(cfg, {name: target.width for name, target in targets.items()}).to(dist.device)
        new = take_over(model, weights, dist) if cfg.init and not state else []
        if cfg.stage2_only and new:
            dist.die(f"--stage2-only: {new[0]} does not fit")

    stale = ["metrics.json", "recon.png"] + ["stage1.pt"] * (state is None)
    dist.make_out_dir(cfg.out, cfg, stale=stale)

    if stage == 1:
        if not cfg.stage2_only:
            model = train(cfg, dist, 1, model, source, shown, targets, lpips, adversary, state)
        dist.save(out / "stage1.pt", {"kind": "tokenizer", "config": asdict(cfg), "ema": model.state_dict()})
        dist.barrier()
        state = targets = model = weights = None  # frees the memory of the teachers

    stage1, stage2 = (load_tokenizer(out / "stage1.pt", dist.device)[0] for _ in range(2))
    if cfg.stage2_steps:
        stage2 = train(cfg, dist, 2, stage2.train(), source, shown, {}, lpips, adversary, state)
    stages = {"stage1": stage1, "stage2": stage2}
    dist.save(out / "metrics.json", evaluate(cfg, dist, images, val, stages, lpips))
    dist.print(f"wrote {out}")

# ---- Appendix A. The adversary of Eq. 6. A first reader may stop before it

def hinge_loss(real, fake) -> Tensor:
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

class LeCam(nn.Module):
    """LeCam (Tseng 2021): pulls logits to the running mean of the other side's."""

    def __init__(self, dist: Dist):
        super().__init__()
        self.dist = dist
        self.register_buffer("means", torch.zeros(2, device=dist.device))  # of real, of fake

    def forward(self, real, fake, share: float = 1):
        now = torch.stack([real.mean(), fake.mean()]).detach()
        now = self.dist.all_reduce(now) / self.dist.world_size
        self.means = self.means.lerp(now, 1 - 0.999**share)
        mean_real, mean_fake = self.means
        return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()

def draw_augmentation(rng, batch: int, size: int, cutout: float, chance: float) -> dict:
    """Random numbers of DiffAugment; each operation occurs with probability `chance`."""
    reach, odd = int(size / 8 + 0.5), int(cutout * size + 0.5) % 2
    draws = {"color": rng.random((3, batch), np.float32),  # brightness, saturation, contrast
             "shift": rng.integers(-reach, reach + 1, (2, batch)),  # down, right
             "cutout": rng.integers(0, size + 1 - odd, (2, batch))}
    pairs = zip(draws.items(), rng.random(3))
    return {name: torch.from_numpy(draw) for (name, draw), u in pairs if u < chance}

def augment(x, draws: dict, cutout: float) -> Tensor:
    """DiffAugment (Zhao 2020) of B x 3 x S x S: colour, shift, a grey square of cutout*S."""
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
        rows, columns = (at + draws["shift"][..., None] + 1).clamp(0, s + 1)  # B x S, padded by 1
        x = F.pad(x, (1, 1, 1, 1)).gather(2, rows[:, None, :, None].expand(b, c, s, s + 2))
        x = x.gather(3, columns[:, None, None].expand(b, c, s, s))
    if "cutout" in draws:
        side = int(cutout * s + 0.5)
        first = draws["cutout"][..., None] - side // 2  # 2 x B x 1
        rows, columns = (at >= first) & (at < first + side)  # B x S
        x = x * ~(rows[:, None, :, None] & columns[:, None, None])
    return x

class GlobalBatchNorm(nn.BatchNorm1d):
    """Over all processes. torch's SyncBatchNorm lets the host wait."""

    def __init__(self, width: int, dist: Dist):
        super().__init__(width, 1e-6)
        self.dist = dist

    def forward(self, x):
        all_reduce, n = self.dist.all_reduce, self.dist.world_size
        if n == 1:
            return super().forward(x)
        x = x.float()  # B x C x T
        own = torch.stack([x, x * x]).mean((1, 3)) / n  # 2 x C
        total = own + all_reduce(own.detach().clone()) - own.detach()
        if total.requires_grad:
            total.register_hook(lambda g: all_reduce(g.clone()))  # add up, too
        mean, square = total[..., None]  # C x 1
        scale = self.weight[:, None] * (square - mean**2 + self.eps).rsqrt()
        return (x - mean) * scale + self.bias[:, None]

class Residual(nn.ModuleDict):
    def forward(self, x):
        return (self.fn(x) + x) / math.sqrt(2)

class DinoDiscriminator(nn.Module):
    """Heads on the features of a frozen DINO ViT-S/16 (StyleGAN-T, VAR)."""

    def __init__(self, trunk: nn.Module, dist: Dist, layers: tuple = (2, 5, 8, 11)):
        super().__init__()
        self.trunk, self.layers = (trunk,), layers  # a tuple hides it from parameters()
        width = trunk.width

        def conv(out, kernel):
            layer = nn.Conv1d(width, out, kernel, padding="same", padding_mode="circular")
            return nn.utils.spectral_norm(layer)

        def unit(kernel):
            return nn.Sequential(conv(width, kernel), GlobalBatchNorm(width, dist), nn.LeakyReLU(0.2))

        heads = (nn.Sequential(unit(1), Residual({"fn": unit(9)}), conv(1, 1)) for _ in (0, *layers))
        self.heads = nn.ModuleList(heads)

    def features(self, image):
        """Patch tokens plus class token, B x D x 196, before and after layers."""
        trunk = self.trunk[0]
        x, size = trunk.normalise(image), trunk.patch * math.isqrt(trunk.pos_embed.shape[1])
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="area" if x.shape[-1] > size else "bicubic")
        tokens = [trunk.embed(x)]
        for layer in trunk.layers:
            tokens.append(layer(tokens[-1]))
        taken = (tokens[i + 1] for i in (-1, *self.layers))
        return [(f[:, 1:] + f[:, :1]).mT for f in taken]

    def forward(self, *views):
        """Logits B x 5*196 of each batch; batch norm treats them separately."""
        pairs = (zip(self.heads, self.features(x)) for x in views)
        return [torch.cat([head(f).flatten(1).float() for head, f in pair], 1) for pair in pairs]

class Adversary(nn.Module):
    """The discriminator, its optimizers and its loss: hinge, LeCam, consistency."""

    def __init__(self, cfg: Config, dist: Dist, net: nn.Module | None = None):
        super().__init__()
        self.cfg, self.dist, self.lecam = cfg, dist, LeCam(dist)
        torch.manual_seed(cfg.seed + 1)
        if net is None:
            trunk = load_vit("dino_deitsmall16_pretrain", cfg.weights, dist, "--adversary none")
            net = DinoDiscriminator(trunk, dist)
            if cfg.compile:
                net.features = torch.compile(net.features, fullgraph=True, dynamic=False)
        self.net = net.to(dist.device).train()
        self.wrapped = (dist.wrap(self.net),)  # a tuple hides it from state_dict()
        self.optimizers = make_optimizers(self.net, replace(cfg, lr=cfg.disc_lr or cfg.lr), dist)

    def view(self, x, purpose, step, micro):
        """x augmented, and half of the time a crop of 224 pixels."""
        cfg, size, strong = self.cfg, x.shape[-1], purpose > 2  # for consistency
        rng = self.dist.rng(cfg.seed, "augmentation", step, purpose)
        if cfg.diffaug or strong:
            cutout, chance = (0.5, 1) if strong else (0.2, 0.5)
            mine = self.dist.local_slice(cfg.batch_size)
            draws = draw_augmentation(rng, cfg.batch_size, size, cutout, chance)
            draws = {k: draw[:, mine][:, micro].to(x.device, non_blocking=True) for k, draw in draws.items()}
            x = augment(x, draws, cutout)
        if size > 224 and rng.random() < 0.5:
            top, left = rng.integers(0, size - 223, 2)
            x = x[:, :, top:top + 224, left:left + 224]
        return x.contiguous()  # torch.compile makes a graph for other strides

    def generator_loss(self, recon: Tensor, step: int, micro: slice) -> Tensor:
        """L_adv of Eq. 6, for rows `micro`."""
        with self.dist.autocast():
            return -self.net(self.view(recon, 0, step, micro))[0].mean()

    def train_step(self, real: Tensor, fake: Tensor, step: int) -> dict:
        """One step. Returns terms of the log."""
        cfg, (net,), terms = self.cfg, self.wrapped, {}
        for micro, share in self.dist.micro_batches(net, len(real), cfg.micro_batch):
            pairs = (real, fake) * (2 if cfg.consistency else 1)
            views = [self.view(x[micro], 1 + i, step, micro) for i, x in enumerate(pairs)]
            with self.dist.autocast():
                on_real, on_fake, *augmented = net(*views)

            losses = {"hinge": hinge_loss(on_real, on_fake), "lecam": self.lecam(on_real, on_fake, share)}
            loss = cfg.adv_weight * (losses["hinge"] + cfg.lecam * losses["lecam"])
            if augmented:
                losses["consistency"] = F.mse_loss(torch.cat([on_real, on_fake]), torch.cat(augmented))
                loss = loss + cfg.consistency * losses["consistency"]
            (loss * share).backward()
            losses |= {"logits_real": on_real.mean(), "logits_fake": on_fake.mean()}
            for name, value in losses.items():
                terms[name] = terms.get(name, 0) + share * value.detach()

        terms["grad_d"] = nn.utils.clip_grad_norm_(self.net.parameters(), cfg.clip or math.inf)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return terms

# ---- Appendix B. Released checkpoints

# Patterns that turn a parameter's name here into the released one, in this order
KEY_MAP = [(r"^aux\.", "decoder_"), ("_dinov2", "_dino"), ("_siglip", "_clip"),
           (r"^decoder(\w*)\.from_latent", r"post_quant_conv\1"),
           (r"^decoder\.head", "decoder.to_pixel.model"), (r"^decoder(\w+)\.head", r"to_pixel\1"),
           ("^to_latent", "quant_conv"), ("class_token", "cls_token"), ("rope_freqs", "freqs"),
           ("patch_embed", "patch_embed.proj"), ("modulation", "adaLN_modulation"),
           (r"^(\w+)\.(cls_token|pos_embed|patch_embed|blocks|norm)", r"\1.model.\2")]
# What reaches no output: RoPE grids, parts of the teachers, unused parts of decoders
UNUSED = (r"freqs_t_|^(projection|repa_model|clip_model)\.|"
          r"^decoder\w*\.model\.(patch_embed\.|norm\.adaLN_modulation\.|head\.|pos_embed)")

def official_name(name: str) -> str:
    for pattern, official in KEY_MAP:
        name = re.sub(pattern, official, name)
    return name

def from_official(weights: Weights, enc_heads: int = 0, dec_heads: int = 0,
                  aux_heads: int = 0) -> tuple[Tokenizer, ModelConfig]:
    """The state dict of a released AEModel or MaskAEModel. Heads 0: of 64 channels each."""
    with reading("the checkpoint", "a released tokenizer"):
        weights = dict(weights)
        fold_layer_scale(weights, "attn.proj", "mlp.fc2")
        name = "encoder.model.patch_embed.proj.weight"
        conv = weights[name]
        weights[name] = conv.permute(0, 2, 3, 1).flatten(1)  # in patchify's order
        weights.setdefault("encoder.mask_token", torch.zeros(1, 1, len(conv)))  # of a plain AE

        heads = {name: official_name(f"aux.{name}.head.weight") for name in ("hog", "dinov2", "siglip")}
        widths = {name: len(weights[key]) for name, key in heads.items() if key in weights}
        nets, sizes = [("", "encoder", enc_heads), ("dec_", "decoder", dec_heads)], {}
        for field, net, heads in nets + [("aux_", "decoder_hog", aux_heads)] * bool(widths):
            width = weights[f"{net}.latent_pos_embed"].shape[-1]
            blocks = {key.split(".")[3] for key in weights if key.startswith(f"{net}.model.blocks.")}
            sizes |= {f"{field}width": width, f"{field}depth": len(blocks),
                      f"{field}heads": heads or max(1, width // 64)}
        patch, grid = conv.shape[-1], math.isqrt(weights["encoder.model.pos_embed"].shape[1] - 1)
        modulated = "decoder.model.blocks.0.adaLN_modulation.1.weight" in weights
        cfg = ModelConfig(
            size=patch * grid, patch=patch, **sizes,
            latents=weights["encoder.latent_tokens"].shape[1],
            channels=len(weights["quant_conv.weight"]),
            decoder="modulated" if modulated else "plain",
            dec_class_token="decoder.model.cls_token" in weights,
            positions="rope" if "encoder.freqs" in weights else "table")
        with torch.device("meta"):
            model = Tokenizer(cfg, widths)

        state = {name: weights.pop(official_name(name)).float() for name in model.state_dict()}
        for key in weights:
            if not re.search(UNUSED, key):
                raise ValueError(f"{key} is unknown")
        model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False), cfg

def convert(cfg: Config, dist: Dist):
    """A file, or a folder with model.safetensors and config.json -> ckpt.pt in --out."""
    path = Path(cfg.from_official)
    path = path / "model.safetensors" if path.is_dir() else path
    model, found = from_official(read_weights(path))
    about, statistics = path.with_name("config.json"), {}
    if about.exists():  # it holds mean and deviation of the latents
        with reading(about, "the config of a released tokenizer"):
            meta = json.loads(about.read_text())
            statistics = {k: meta[f"vq_{k}"] for k in ("mean", "std") if f"vq_{k}" in meta}
    out = Path(cfg.out) / "ckpt.pt"
    if out.exists():
        dist.die(f"{out} is there already; give another --out")
    cfg = replace(cfg, **asdict(found), targets=",".join(model.aux) or "none", data="")
    dist.save(out, {"kind": "tokenizer", "config": asdict(cfg), "ema": model.state_dict(),
                    "latent_statistics": statistics})
    dist.print(f"{path} -> {out}: {found}, latents {statistics}")

if __name__ == "__main__":
    launch(main, Config, PRESETS, __doc__)
