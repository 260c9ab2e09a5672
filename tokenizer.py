"""MAETok: masked autoencoders as tokenizers for diffusion models (arXiv 2502.03444).

    torchrun tokenizer.py  # stage 1, stage 2, evaluation -> out/tokenizer/
    python tokenizer.py --from-official DIR --out out/official  # a released checkpoint -> out/official/ckpt.pt

An image becomes L latent tokens of H channels. Stage 1 (Sec. 3.2) trains encoder and decoder while 40-60 % of the
patches are masked. Shallow auxiliary decoders predict features (here HOG) of the masked patches from the same latents.
Stage 2 (Sec. 3.3) freezes the encoder and tunes the pixel decoder while the mask ratio falls to 0. The paper's model has
no KL term: the structure of the latents makes them easy for a diffusion model.

Letters: B images, N patch tokens, L latent tokens, T all tokens, D width, d width of a head, H latent channels, P patch
size, S image size.
"""
import copy  # noqa: I001
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
import torch.nn.functional as F
from scipy.stats import truncnorm
from torch import Tensor, nn

from data import (
    Dist, Ema, ImageSet, Loader, Log, launch, load_checkpoint, make_optimizers, option, reading, save_grid, set_lr,
    to_float, to_uint8)
from fid import (
    ClassifierFD, cached_classifier, fold_layer_scale, linear_probe, load_lpips, load_vit, read_weights,
    reconstruction_metrics)

# ---- The model

@dataclass(frozen=True)
class ModelConfig:
    """The architecture. A checkpoint stores it."""
    size: int = option(32, "image side S in pixels", least=1)
    patch: int = option(8, "patch side P; divides --size", least=1)
    latents: int = option(8, "latent tokens L; 0: none, the image tokens are the latents")
    channels: int = option(16, "channels H of a latent token", least=1)
    width: int = option(192, "width D of encoder and decoder", least=1)
    depth: int = option(3, "layers of each", least=1)
    heads: int = option(3, "attention heads", least=1)
    decoder: str = option("plain", "Eq. 5, or modulated: as released, the latents scale and shift their rows in each layer",
                          ("plain", "modulated"))
    dec_width: int = 0  # 0: as the encoder, also for the next two
    dec_depth: int = 0
    dec_heads: int = 0
    dec_class_token: bool = False
    positions: str = "rope"  # of image tokens: 2D RoPE of learned frequency, or "table"
    kl: float = option(0.0, "weight of a KL term in nats per image; above 0: a VAE")
    aux_depth: int = option(3, "layers of an auxiliary decoder; 0: a linear map")
    aux_width: int = 96
    aux_heads: int = 2

    def __post_init__(self) -> None:
        if self.size % self.patch or self.patch % 2:
            raise ValueError(f"--size {self.size} must be a multiple of an even --patch {self.patch}")
        for width, heads in ((self.width, self.heads), self.decoder_size()[::2], (self.aux_width, self.aux_heads)):
            if width % (4 * heads):
                raise ValueError(f"width {width} must be a multiple of four times the heads {heads} (2D RoPE)")

    def decoder_size(self) -> tuple[int, int, int]:
        """Width, depth and heads of the pixel decoder."""
        return self.dec_width or self.width, self.dec_depth or self.depth, self.dec_heads or self.heads

    def tokens(self) -> tuple[int, int]:
        """Image tokens N and latent tokens L."""
        n = (self.size // self.patch) ** 2
        return n, self.latents or n

def patchify(x: Tensor, patch: int) -> Tensor:
    """B x C x S x S -> B x N x (P*P*C): patches row by row; inside one: row, column, channel."""
    b, c, s, _ = x.shape
    x = x.view(b, c, s // patch, patch, s // patch, patch)                  # B x C x rows x P x columns x P
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)

def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of patchify: B x N x (P*P*C) -> B x C x S x S."""
    b, n, f = x.shape
    g, c = math.isqrt(n), f // patch**2
    x = x.view(b, g, g, patch, patch, c)                    # B x rows x columns x P x P x C
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, g * patch, g * patch)

def init_rope_freqs(depth: int, heads: int, width: int, theta: float = 10.0) -> Tensor:
    """RoPE frequencies along x and y, 2 x depth x heads*d/2. Each head has its own random orientation (RoPE-Mixed)."""
    d = width // heads
    magnitude = theta ** (-torch.arange(0, d, 4).float() / d)               # d/4: from 1 down to about 1/theta
    angle = 2 * math.pi * torch.rand(depth, heads, 1)       # orientation of the head
    fx = torch.cat([magnitude * angle.cos(), magnitude * (angle + math.pi / 2).cos()], -1)
    fy = torch.cat([magnitude * angle.sin(), magnitude * (angle + math.pi / 2).sin()], -1)
    return torch.stack([fx, fy]).flatten(2)

def rope_tables(freqs: Tensor, heads: int, grid: tuple[int, int], n_prefix: int, n_latent: int) -> tuple:
    """cos and sin for every layer, depth x heads x T x d/2, with T = n_prefix + rows*columns + n_latent.

    Class tokens (the prefix) and latent tokens have no place in the image: their angle is 0.
    """
    n = torch.arange(grid[0] * grid[1], device=freqs.device)
    x, y = (n % grid[1]).float()[:, None], (n // grid[1]).float()[:, None]
    fx, fy = freqs.float().unflatten(-1, (heads, -1)).unsqueeze(-2)  # depth x heads x 1 x d/2
    angles = F.pad(x * fx + y * fy, (0, 0, n_prefix, n_latent))             # depth x heads x T x d/2
    return angles.cos(), angles.sin()                       # cos 1, sin 0 for tokens without a place

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (2i, 2i+1) by its angle. x: B x heads x T x d; tables: heads x T x d/2. Returns fp32."""
    pairs = x.float().unflatten(-1, (-1, 2))                # B x heads x T x d/2 x 2
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # half the time of the lines below
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2)
    even, odd = pairs.unbind(-1)                            # B x heads x T x d/2
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

class Attention(nn.Module):
    """Multi-head self-attention. `qk_norm` is the class of the norms of q and k."""

    def __init__(self, width: int, heads: int, qk_norm: Callable = nn.Identity):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = qk_norm(width // heads), qk_norm(width // heads)

    def forward(self, x, rope=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                # B x T x 3 x heads x d
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # B x heads x T x d
        q, k = self.q_norm(q), self.k_norm(k)               # the identity in the tokenizer
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)

        q, k = q.to(v.dtype), k.to(v.dtype)                 # rotate returns fp32
        if v.device.type == "cpu" and v.dtype == torch.bfloat16:  # half the time of torch's fused one
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)     # B x heads x T x T
            out = scores.softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))                    # B x T x D

class Mlp(nn.Module):
    def __init__(self, width: int, approximate: str = "none"):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))              # B x T x D

class Block(nn.Module):
    """A pre-norm transformer layer. With `channels` > 0 the latents z modulate their own rows, as in the released model.

    The norms then have no weights, and the last L rows become y*scale + shift (not 1 + scale). Both start at zero.
    """

    def __init__(self, width: int, heads: int, channels: int = 0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not channels)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not channels)
        self.mlp = Mlp(width)
        if channels:
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 4 * width))

    def forward(self, x, rope=None, z=None):
        if z is None:
            x = x + self.attn(self.norm1(x), rope)          # B x T x D
            return x + self.mlp(self.norm2(x))

        shift1, scale1, shift2, scale2 = self.modulation(z).chunk(4, -1)    # B x L x D
        x = x + self.attn(modulate_tail(self.norm1(x), scale1, shift1), rope)
        return x + self.mlp(modulate_tail(self.norm2(x), scale2, shift2))

def modulate_tail(x, scale, shift):
    rest, tail = x.split([x.shape[1] - scale.shape[1], scale.shape[1]], 1)
    return torch.cat([rest, tail * scale + shift], 1)       # the tail: the L latent tokens

def learned_tokens(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(1, *shape))

def run_blocks(net, x, n_prefix, n_latent, z=None):
    """All layers of an encoder or a decoder over [class | image | latents], each with its own RoPE tables."""
    ropes = [None] * len(net.blocks)
    if hasattr(net, "rope_freqs"):
        cos, sin = rope_tables(net.rope_freqs, net.heads, (net.grid, net.grid), n_prefix, n_latent)
        ropes = zip(cos.unbind(), sin.unbind())

    for block, rope in zip(net.blocks, ropes):
        x = block(x, rope, z)                               # B x T x D
    return net.norm(x)

class Encoder(nn.Module):
    """Image -> outputs of the L learnable latent tokens (Eq. 4); without any, of the N image tokens."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        d, n = cfg.width, cfg.tokens()[0]
        self.patch, self.grid, self.heads, self.latents = cfg.patch, cfg.size // cfg.patch, cfg.heads, cfg.latents
        self.patch_embed = nn.Linear(3 * cfg.patch**2, d)   # a convolution of stride P
        self.mask_token, self.class_token = learned_tokens(1, d), learned_tokens(1, d)
        self.pos_embed = learned_tokens(1 + n, d)  # the released model adds it beside RoPE
        if cfg.latents:
            self.latent_tokens, self.latent_pos_embed = learned_tokens(cfg.latents, d), learned_tokens(cfg.latents, d)
        if cfg.positions == "rope":
            self.rope_freqs = nn.Parameter(init_rope_freqs(cfg.depth, cfg.heads, d))
        self.blocks = nn.ModuleList(Block(d, cfg.heads) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def forward(self, image, mask=None):
        """mask: B x N, True where a patch is masked."""
        x = self.patch_embed(patchify(image, self.patch))                   # B x N x D
        if mask is not None:  # replaced, not dropped: the length stays N
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)

        b, n, _ = x.shape
        x = torch.cat([self.class_token.expand(b, -1, -1), x], 1)           # B x (1+N) x D
        x = x + self.pos_embed
        if self.latents:
            z = (self.latent_tokens + self.latent_pos_embed).expand(b, -1, -1)  # B x L x D
            x = torch.cat([x, z], 1)                                        # B x (1+N+L) x D

        x = run_blocks(self, x, 1, self.latents)            # B x (1+N+L) x D
        return x[:, -(self.latents or n):]                                  # B x L x D

class Decoder(nn.Module):
    """Latents h, B x L x H -> one vector per patch, B x N x out (Eq. 5); also the auxiliary decoders (Eq. 7)."""

    def __init__(self, cfg: ModelConfig, width: int, depth: int, heads: int, out: int, class_token: bool):
        super().__init__()
        self.grid, self.heads, self.latents = cfg.size // cfg.patch, heads, cfg.latents
        self.from_latent = nn.Linear(cfg.channels, width)
        if cfg.latents:
            self.mask_token, self.latent_pos_embed = learned_tokens(1, width), learned_tokens(cfg.latents, width)
        self.class_token = learned_tokens(1, width) if class_token else None
        self.modulated = cfg.decoder == "modulated"
        if cfg.positions == "rope":
            self.rope_freqs = nn.Parameter(init_rope_freqs(depth, heads, width))
        else:
            self.pos_embed = learned_tokens(class_token + self.grid**2, width)
        self.blocks = nn.ModuleList(Block(width, heads, cfg.channels * self.modulated) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not self.modulated)
        self.head = nn.Linear(width, out)

    def features(self, h):
        """The input of the last matrix: B x N x D."""
        b, n = len(h), self.grid**2
        if self.latents:
            x = self.mask_token.expand(b, n, -1)                            # B x N x D: copies of one token e
        else:
            x = self.from_latent(h)  # the latents are the image tokens
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(b, -1, -1), x], 1)
        if hasattr(self, "pos_embed"):
            x = x + self.pos_embed

        n_prefix = x.shape[1] - n
        if self.latents:
            x = torch.cat([x, self.from_latent(h) + self.latent_pos_embed], 1)      # B x (N+L) x D
        x = run_blocks(self, x, n_prefix, self.latents, h if self.modulated else None)
        return x[:, n_prefix:n_prefix + n]                  # B x N x D

    def forward(self, h):
        return self.head(self.features(h))                                  # B x N x out

class LinearDecoder(nn.Module):
    """An auxiliary decoder of depth 0: one matrix over the tokens, L -> N, and one over the channels, H -> out."""

    def __init__(self, cfg: ModelConfig, out: int):
        super().__init__()
        n, n_latent = cfg.tokens()
        self.mix, self.head = nn.Linear(n_latent, n), nn.Linear(cfg.channels, out)

    def forward(self, h):
        return self.head(self.mix(h.transpose(1, 2)).transpose(1, 2))       # B x N x out

class Tokenizer(nn.Module):
    """The autoencoder: images B x 3 x S x S in [-1, 1], latents B x L x H, unbounded. `widths`: features of each target."""

    def __init__(self, cfg: ModelConfig, widths: dict[str, int] | None = None):
        super().__init__()
        self.patch, self.variational = cfg.patch, cfg.kl > 0
        self.encoder = Encoder(cfg)
        self.to_latent = nn.Linear(cfg.width, cfg.channels * (1 + self.variational))
        self.decoder = Decoder(cfg, *cfg.decoder_size(), 3 * cfg.patch**2, cfg.dec_class_token)

        self.aux = nn.ModuleDict()
        for name, out in (widths or {}).items():
            if cfg.aux_depth:
                self.aux[name] = Decoder(cfg, cfg.aux_width, cfg.aux_depth, cfg.aux_heads, out, True)
            else:
                self.aux[name] = LinearDecoder(cfg, out)
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)
                nn.init.zeros_(m.weight) if "modulation" in name else nn.init.xavier_uniform_(m.weight)

    def encode(self, image, mask=None):
        """B x 3 x S x S -> latents B x L x H; for a VAE, the mean. mask: B x N, True where a patch is masked."""
        h = self.to_latent(self.encoder(image, mask))
        return h.chunk(2, -1)[0] if self.variational else h

    def decode(self, h):
        """Latents B x L x H -> images B x 3 x S x S, not clamped."""
        return unpatchify(self.decoder(h).float(), self.patch)

    def forward(self, image, mask=None, noise=None):
        """Training: "recon", the input "hidden" of its last matrix, "kl" of a VAE, and one prediction per target.

        noise: B x L x H, samples the latents of a VAE.
        """
        out = {}
        h = self.to_latent(self.encoder(image, mask))                       # B x L x H; of a VAE B x L x 2H
        if self.variational:
            h, log_variance = h.float().chunk(2, -1)
            if noise is not None:
                log_variance = log_variance.clamp(-30, 20)
                out["kl"] = 0.5 * (h.square() + log_variance.exp() - 1 - log_variance).sum((1, 2)).mean()
                h = h + (0.5 * log_variance).exp() * noise                  # a sample of the posterior

        hidden = self.decoder.features(h)                                   # B x N x D
        out["recon"] = unpatchify(self.decoder.head(hidden).float(), self.patch)
        out["hidden"] = hidden.detach()
        return out | {name: aux(h) for name, aux in self.aux.items()}       # B x N x out

# ---- Masks and targets

def sample_mask_ratio(low: float, high: float, rng: np.random.Generator) -> float:
    """The mask ratio of a batch: a normal around `high`, deviation 0.25, cut to [low, high], as in the released code."""
    if low == high:
        return high
    return float(truncnorm.ppf(rng.random(), (low - high) / 0.25, 0, loc=high, scale=0.25))

def random_mask(batch: int, n: int, ratio: float, generator: torch.Generator) -> Tensor:
    """B x N, True on ceil(N * ratio) random patches of each image."""
    noise = torch.rand(batch, n, generator=generator, device=generator.device)  # B x N; its ranks are random orders
    return noise.argsort(1).argsort(1) < math.ceil(n * ratio)               # rank of each patch

@functools.lru_cache  # copied to the device once, not in every step
def sobel(device: torch.device) -> Tensor:
    gx = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=device)
    return torch.stack([gx, gx.T])[:, None]

HOG_BINS = 9

def hog(x: Tensor, patch: int, cell: int = 0, window: int = -1) -> Tensor:
    """Histograms of oriented gradients of each patch: B x 3 x S x S -> B x N x 27*(P/cell)^2.

    Sobel gradients per channel; magnitudes weighted by a Gaussian window tiled over the image; summed over cells into 9
    unsigned orientations; each cell's histogram scaled to unit length. The official definition at P = 16 (cell 8,
    window 16), scaled with the patch. Window 0 is MaskFeat's. Feature order: channel, bin, cell row, cell column.
    """
    cell, window = cell or patch // 2, patch if window < 0 else window
    b, c, s, _ = x.shape
    padded = F.pad(x.float(), (1, 1, 1, 1), "reflect")
    gx, gy = F.conv2d(padded, sobel(x.device).repeat(c, 1, 1, 1), groups=c).unflatten(1, (c, 2)).unbind(2)
    magnitude = torch.hypot(gx, gy)                                         # B x 3 x S x S
    if window:
        at = torch.arange(window, device=x.device) - (window - 1) / 2
        w = torch.exp(-0.5 * (at / (window // 2)) ** 2)
        w = torch.outer(w, w) / w.sum() ** 2
        magnitude = magnitude * w.repeat(s // window, s // window)          # B x 3 x S x S

    bins = torch.floor(torch.atan2(gx, gy) / math.pi * HOG_BINS).long() % HOG_BINS
    histogram = torch.zeros(b, c, HOG_BINS, s, s, device=x.device)
    histogram.scatter_(2, bins.unsqueeze(2), magnitude.unsqueeze(2))        # B x 3 x 9 x S x S
    histogram = F.avg_pool2d(histogram.flatten(1, 2), cell) * cell**2       # B x 27 x S/cell x S/cell
    histogram = F.normalize(histogram.unflatten(1, (c, HOG_BINS)), dim=2).flatten(1, 2)
    return F.pixel_unshuffle(histogram, patch // cell).flatten(2).transpose(1, 2)  # B x N x 27*(P/cell)^2

def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of B x N errors over the masked patches; mask None: over all."""
    return error.mean() if mask is None else (error * mask).sum() / mask.sum()

def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Eq. 8: squared error of B x N x out on the masked patches only, mean over them and over the features."""
    return masked_mean((prediction.float() - target).square().mean(-1), mask)

def masked_cosine(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Negative cosine similarity on the masked patches only: the released code's form of Eq. 8 for teachers."""
    return masked_mean(-F.cosine_similarity(prediction.float(), target, dim=-1), mask)

@dataclass
class Target:
    """What an auxiliary decoder predicts: features(images in [-1, 1]) -> B x N x width, compared by loss."""
    width: int
    features: Callable
    loss: Callable

def pixel_target(cfg: "Config", dist: Dist, images: ImageSet) -> Target:
    return Target(3 * cfg.patch**2, functools.partial(patchify, patch=cfg.patch), masked_mse)

def hog_target(cfg: "Config", dist: Dist, images: ImageSet) -> Target:
    return Target(3 * HOG_BINS * 4, functools.partial(hog, patch=cfg.patch), masked_mse)  # 2 x 2 cells a patch

def teacher_target(cfg: "Config", dist: Dist, images: ImageSet, name: str) -> Target:
    """Patch features of a frozen network, B x N x width."""
    if name == "classifier":  # trained on the labels of the data; the one that scores samples has seed 0
        net = cached_classifier(images, dist, cfg.out, seed=1)
    else:
        net = load_vit(name, cfg.weights, dist, "--targets hog")
    features = functools.partial(net.patch_features, grid=cfg.size // cfg.patch)
    loss = {"cosine": masked_cosine, "mse": masked_mse}[cfg.teacher_loss]
    return Target(net.width, dist.autocast()(features), loss)

# To add a target: a function like those above, and its line here
TARGETS = {
    "pixel": pixel_target,
    "hog": hog_target,
    "dinov2": lambda cfg, *rest: teacher_target(cfg, *rest, f"dinov2_{cfg.dinov2}_pretrain"),
    "siglip": functools.partial(teacher_target, name="siglip-large-patch16-256"),
    "classifier": functools.partial(teacher_target, name="classifier"),
}

# ---- The image loss

def pixel_error(recon: Tensor, x: Tensor) -> Tensor:
    """L_recon of Eq. 6."""
    return F.mse_loss(recon, x)

def image_loss(recon: Tensor, x: Tensor, lpips: Callable | None) -> dict[str, Tensor]:
    """L_recon and L_percep of Eq. 6 by name, scalars. L_adv is Adversary.generator_loss."""
    losses = {"recon": pixel_error(recon, x)}
    if lpips:
        losses["lpips"] = lpips(recon, x).mean()
    return losses

def adaptive_weight(grad_nll: Tensor, grad_adv: Tensor, hidden: Tensor, patch: int, dist: Dist) -> Tensor:
    """|d L_nll / dW| / (|d L_adv / dW| + 1e-4), at most 1e4: L_adv then pulls as strongly as L_nll does.

    L_nll = L_recon + lambda1 L_percep; W is the last matrix of the decoder. Its gradient is the product of the gradient
    at its output, B x 3 x S x S, and its input `hidden`, B x N x D, summed over the images of all processes.
    """
    grads = [torch.einsum("bnp,bnd->pd", patchify(grad, patch), hidden.float()) for grad in (grad_nll, grad_adv)]
    nll, adv = dist.all_reduce(torch.stack(grads)).flatten(1).norm(dim=1) / dist.world_size
    return (nll / (adv + 1e-4)).clamp(0, 1e4)

# ---- Training

@dataclass(frozen=True)
class Config(ModelConfig):
    """The architecture above and the settings of a run. Defaults = preset `quick`, on the built-in images."""
    data: str = option("shapes", "shapes, cifar10, imagenette, a folder, or what data.py packed", free=True)
    out: str = option("out/tokenizer", "folder for ckpt.pt, stage1.pt, log.jsonl, recon.png, metrics.json", free=True)
    mask_min: float = option(0.4, "lowest mask ratio of stage 1")
    mask_max: float = option(0.6, "highest mask ratio of stage 1; 0: a plain autoencoder")
    targets: str = option("hog", f"of the auxiliary decoders: any of {','.join(TARGETS)}, or none")
    dinov2: str = "vitl14"  # or vits14, vitb14, each also with _reg4
    teacher_loss: str = "cosine"  # of dinov2, siglip, classifier; "mse": Eq. 8
    aux_weight: float = option(1.0, "weight of each masked target (Eq. 8)")
    lpips: float = option(0.0, "weight of LPIPS-VGG (lambda 1 of Eq. 6); 0: without")
    lpips_warmup: int = 0  # steps over which that weight rises from 0
    adversary: str = option("none", "discriminator of L_adv, on frozen DINO features", ("none", "dino"))
    adv_weight: float = 0.4  # lambda 2 of Eq. 6, times the adaptive weight
    adv_start: int = 0  # step at which L_adv and the discriminator begin
    adv_norm: str = "batch"  # its batch norm; "groups": of 8 images
    lecam: float = 0.001  # weight of the LeCam regulariser
    consistency: float = 4.0  # weight of consistency under augmentation
    diffaug: bool = True
    weights: str = option("", "folder of pretrained networks; empty: the cache", free=True)
    rfid: bool = option(False, "evaluate rFID (needs the Inception weights)", free=True)
    from_official: str = option("", "convert this released checkpoint (folder or file) and stop")
    steps: int = option(2150, "steps of stage 1", least=1)
    stage2_steps: int = option(1000, "steps of stage 2, while the mask ratio falls from --mask-max to 0")
    batch_size: int = option(64, "images per step, over all processes", least=1)
    micro_batch: int = option(0, "most images at once in a process; 0: all of its share", free=True)
    optimizer: str = option("muon", "muon: for the matrices inside blocks; adamw: for all",
                            ("adamw", "muon"))
    lr: float = option(2e-3, "peak learning rate of AdamW")
    muon_lr: float = 1.5e-2
    beta2: float = 0.95
    weight_decay: float = 1e-4
    warmup: int = 50  # steps
    schedule: str = "cosine"  # to a tenth
    clip: float = 1.0  # largest gradient norm; 0: any
    ema: float = 0.998  # decay of the weight average
    log_every: int = 200
    save_every: int = option(400, "steps between checkpoints", least=1, free=True)
    seed: int = option(0, "seed of all random numbers")
    compile: bool = option(torch.cuda.is_available(), "torch.compile the model", free=True)
    precision: str = option("auto", "of matrix products; auto: bf16 where the hardware has it",
                            ("auto", "fp32", "bf16"), free=True)

    def check(self) -> None:
        names = self.target_names()
        if not 0 <= self.mask_min <= self.mask_max < 1:
            raise ValueError("0 <= --mask-min <= --mask-max < 1 is needed")
        if set(names) - set(TARGETS) or len(set(names)) < len(names):
            raise ValueError(f"--targets {self.targets}: none, or each at most once of {', '.join(TARGETS)}")

    def target_names(self) -> list[str]:
        return [] if self.targets == "none" else self.targets.split(",")

PAPER = {  # Sec. 3 and Table 7 of the paper; [code]: not in the paper, from the official code; [ours]: in neither
    "data": "imagenet",  # [ours] stands for yours: give --data
    "size": 256, "patch": 16, "latents": 128, "channels": 32, "width": 768, "depth": 12, "heads": 12,
    "decoder": "plain",  # Eq. 5; the released decoder is "modulated"
    "mask_min": 0.4, "mask_max": 0.6,
    "targets": "hog,dinov2,siglip", "dinov2": "vitl14", "aux_depth": 3,
    "aux_width": 192, "aux_heads": 3, "aux_weight": 1.0,  # [code]
    "teacher_loss": "cosine",  # [code]; Eq. 8 is "mse"
    "lpips": 1.0,
    "lpips_warmup": 10_000,  # [code]
    "adversary": "dino",  # [code] on DINO ViT-S/16; the paper says DINOv2-S
    "adv_weight": 0.4, "adv_start": 30_000, "lecam": 0.001,
    "adv_norm": "batch", "diffaug": True, "consistency": 4.0,  # [code]
    "steps": 500_000, "stage2_steps": 50_000, "batch_size": 512,
    "optimizer": "adamw", "lr": 1e-4, "beta2": 0.95, "weight_decay": 1e-4, "warmup": 10_000,
    "clip": 1.0, "ema": 0.9999,  # [code]
    "log_every": 100, "save_every": 500, "rfid": True}  # [ours]
ONE_GPU = {"batch_size": 256, "stage2_steps": 10_000, "warmup": 500, "lr": 1e-3, "muon_lr": 1e-2, "ema": 0.999,
           "aux_width": 128, "channels": 16, "save_every": 2000}  # [ours], not run
# In every preset mask ratios come from a truncated normal [code], and stage 2 warms up again [ours]
PRESETS = {
    "quick": {},
    "ae": {"mask_min": 0.0, "mask_max": 0.0, "targets": "none"},  # the paper's ablations, at the size of quick
    "vae": {"mask_min": 0.0, "mask_max": 0.0, "targets": "none", "kl": 1e-5},
    "mae_pixel": {"targets": "pixel"},
    "mae_hog": {"targets": "hog"},
    "mae_teacher": {"targets": "classifier", "aux_weight": 0.1},  # [ours]; weight 1 costs 1.6 dB (finding_pilot.json)
    "cifar10": ONE_GPU | {"data": "cifar10", "size": 32, "patch": 4, "latents": 16, "width": 384, "depth": 6,
                          "heads": 6, "steps": 30_000},
    "imagenette64": ONE_GPU | {"data": "imagenette", "size": 64, "patch": 8, "latents": 32, "width": 512, "depth": 8,
                               "heads": 8, "steps": 40_000},
    "imagenet256": PAPER,
    "imagenet512": PAPER | {"size": 512},  # 1,024 patches of 16 pixels; the latents stay 128 x 32
}

def train(cfg: Config, dist: Dist, stage: int, model: Tokenizer, images: ImageSet, targets: dict[str, Target],
          lpips: Callable | None, adversary: "Adversary | None", state: dict | None) -> Tokenizer:
    """Stage 1 (Sec. 3.2) or stage 2 (Sec. 3.3). Returns the averaged model. `state`: the checkpoint to go on from.

    Stage 1 trains the model with Eq. 6 and Eq. 8 on masked images. Stage 2 trains the decoder with Eq. 6 while the mask
    ratio falls to 0. One step: batch and mask; forward; image terms down to the pixels (Eq. 6); masked targets (Eq. 8);
    one backward pass; learning rate, clip, optimizers; discriminator; average; log; save.
    """
    steps = cfg.steps if stage == 1 else cfg.stage2_steps
    if stage == 2:  # encoder and latents stay bit-identical
        model.requires_grad_(False).decoder.requires_grad_(True)
    params = [p for p in model.parameters() if p.requires_grad]
    ema, optimizers = Ema(model, cfg.ema), make_optimizers(model, cfg)
    start = restore(state, model, ema, optimizers, adversary) if state else 0

    net = dist.wrap(model, cfg.compile)                     # DDP: averages gradients over processes
    loader = Loader(images, cfg.batch_size, cfg.seed + stage - 1, dist)
    mine = dist.local_slice(cfg.batch_size)  # this process's rows of the global batch
    n, n_latent = cfg.tokens()
    log = Log(cfg, dist, f"stage {stage}", start, steps, loader)
    log.count_flops(model, torch.zeros(1, 3, cfg.size, cfg.size), torch.zeros(1, n, dtype=torch.bool))

    for step in range(start, steps):
        total_step = step if stage == 1 else cfg.steps + step
        x, _ = loader(step)                                 # B x 3 x S x S in [-1, 1]

        # The mask: one ratio for the whole batch
        if stage == 1:
            ratio = sample_mask_ratio(cfg.mask_min, cfg.mask_max, dist.rng(cfg.seed, "mask ratio", step))
        else:
            ratio = cfg.mask_max * (1 - step / max(1, steps - 1))
        generator = dist.generator(cfg.seed, "mask" if stage == 1 else "mask, stage 2", step)
        mask = random_mask(cfg.batch_size, n, ratio, generator)[mine]       # B x N

        noise = None
        if cfg.kl and stage == 1:
            generator = dist.generator(cfg.seed, "training noise", step)
            noise = torch.randn(cfg.batch_size, n_latent, cfg.channels, generator=generator, device=x.device)[mine]

        terms, recons = {}, []
        for micro in dist.micro_batches(net, len(x), cfg.micro_batch):
            share = (micro.stop - micro.start) / len(x)
            with dist.autocast():
                out = net(x[micro], mask[micro], None if noise is None else noise[micro])

            # Eq. 6. The graph is cut at the reconstruction: each image term is differentiated once, down to the
            # pixels, and the adaptive weight follows from these gradients.
            recon = out["recon"].detach().requires_grad_()
            with dist.autocast():
                losses = image_loss(recon, x[micro], lpips)
            nll = losses["recon"]
            if lpips:
                nll = nll + cfg.lpips * min(1, (total_step + 1) / max(1, cfg.lpips_warmup)) * losses["lpips"]
            (grad_recon,) = torch.autograd.grad(nll, recon)                 # B x 3 x S x S
            if adversary and total_step + 1 >= cfg.adv_start:
                losses["adv"] = adversary.generator_loss(recon, total_step, micro)
                (grad_adv,) = torch.autograd.grad(losses["adv"], recon)     # B x 3 x S x S
                losses["adaptive"] = adaptive_weight(grad_recon, grad_adv, out["hidden"], cfg.patch, dist)
                grad_recon = grad_recon + cfg.adv_weight * losses["adaptive"] * grad_adv

            # Eq. 8, and the KL term of a VAE
            aux_loss = out["recon"].new_zeros(())
            if noise is not None:
                losses["kl"] = out["kl"]
                aux_loss = aux_loss + cfg.kl * losses["kl"]
            for name, target in targets.items():
                losses[name] = target.loss(out[name], target.features(x[micro]), mask[micro] if cfg.mask_max else None)
                aux_loss = aux_loss + cfg.aux_weight * losses[name]

            # One backward pass. The value of image_term means nothing; its gradient at the reconstruction is grad_recon
            image_term = (out["recon"] * grad_recon).sum()
            ((image_term + aux_loss) * share).backward()
            recons.append(recon.detach())                   # for the discriminator
            for name, value in losses.items():
                terms[name] = terms.get(name, 0) + share * value.detach()

        lr_scale = set_lr(optimizers + (adversary.optimizers if adversary else []), step, steps, cfg)
        terms["grad"] = nn.utils.clip_grad_norm_(params, cfg.clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()                           # sets gradients to None
        if adversary and total_step + 1 >= cfg.adv_start:
            terms |= adversary.train_step(x, torch.cat(recons), total_step)
        ema.update(step)                                    # the model that is evaluated

        log.add(lr_scale, **terms)                          # stays on the device: no wait
        saving = (step + 1) % cfg.save_every == 0 or step + 1 == steps
        if saving or (step + 1) % cfg.log_every == 0:
            log.write(step + 1)  # ends the run if a term is not finite, before anything is saved
        if saving:
            dist.save(Path(cfg.out) / "ckpt.pt", {
                "kind": "tokenizer", "config": dataclasses.asdict(cfg), "stage": stage, "step": step + 1,
                "model": model.state_dict(), "ema": ema.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "adversary": adversary.state_dict() if adversary else {}})
    return ema.model

def restore(state: dict, model: nn.Module, ema: Ema, optimizers: list, adversary: "Adversary | None" = None) -> int:
    """Load a checkpoint into model, average, optimizers and adversary. Returns its step."""
    with reading("the checkpoint in --out", "one of these settings"):
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if adversary:
            adversary.load_state_dict(state["adversary"])
        return state["step"]

# ---- Evaluation and main

def load_tokenizer(path: str | Path, device: torch.device) -> tuple[Tokenizer, Config]:
    """The averaged model of a checkpoint without its auxiliary decoders, frozen, and its settings."""
    state = load_checkpoint(path, "tokenizer")
    with reading(path, "a tokenizer of this code"):
        cfg = Config(**state["config"])
        with torch.device("meta"):
            model = Tokenizer(cfg)
        weights = {name: value for name, value in state["ema"].items() if not name.startswith("aux.")}
        model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False), cfg

@torch.no_grad()
def encode_images(model: Tokenizer, x: Tensor, dist: Dist) -> Tensor:
    """uint8 B x 3 x S x S -> latents B x L x H, fp32, on the device."""
    with dist.autocast():
        return model.encode(to_float(x.to(dist.device))).float()

@torch.no_grad()
def decode_images(model: Tokenizer, h: Tensor, dist: Dist) -> Tensor:
    """Latents B x L x H -> uint8 B x 3 x S x S, on the device."""
    with dist.autocast():
        return to_uint8(model.decode(h))

def reconstruct(model: Tokenizer, x: Tensor, dist: Dist) -> Tensor:
    """uint8 images -> uint8 reconstructions."""
    return decode_images(model, encode_images(model, x, dist), dist)

def encode_dataset(model: Tokenizer, images: ImageSet, dist: Dist, most: int = 20_000) -> tuple[Tensor, Tensor]:
    """Latents n x L x H on the CPU and labels of all images, or of `most` of them evenly spaced."""
    index = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    parts = np.array_split(index, math.ceil(len(index) / 500))
    return torch.cat([encode_images(model, images[part], dist).cpu() for part in parts]), images.labels[index]

def save_recon_grid(path: Path, images: ImageSet, stage1: Tokenizer, stage2: Tokenizer, cfg: Config, dist: Dist) -> None:
    """recon.png: original, masked input, its reconstruction by stage 1, and the whole image by both stages."""
    x = images[np.arange(min(8, len(images)))]
    generator = torch.Generator().manual_seed(cfg.seed)
    mask = random_mask(len(x), cfg.tokens()[0], (cfg.mask_min + cfg.mask_max) / 2, generator)
    with torch.no_grad(), dist.autocast():
        h = stage1.encode(to_float(x.to(dist.device)), mask.to(dist.device))
    masked = unpatchify(patchify(x, cfg.patch).masked_fill(mask[..., None], 128), cfg.patch)
    columns = {"original": x, "masked": masked, "from masked": decode_images(stage1, h, dist),
               "stage 1": reconstruct(stage1, x, dist), "stage 2": reconstruct(stage2, x, dist)}
    grid = torch.stack([column.cpu() for column in columns.values()], 1)
    save_grid(path, grid.flatten(0, 1), len(columns), tuple(columns))

def evaluate(cfg: Config, dist: Dist, train_set: ImageSet, val_set: ImageSet, stage1: Tokenizer, stage2: Tokenizer,
             lpips: Callable | None) -> dict:
    """Reconstructions of both stages, the linear probe of the latents, and whether stage 2 left them as they were."""
    metrics, classes = {}, len(train_set.classes)
    judge = ClassifierFD(train_set, val_set, dist, cfg.out) if classes > 1 else None
    for name, model in (("stage1", stage1), ("stage2", stage2)):
        metrics[name] = reconstruction_metrics(lambda x, model=model: reconstruct(model, x, dist), val_set, dist, judge,
                                               lpips, cfg.weights if cfg.rfid else None)
        dist.print(f"{name}: validation", ", ".join(f"{key} {value:.4g}" for key, value in metrics[name].items()))
    if dist.is_main:
        z, y = encode_dataset(stage2, val_set, dist)
        metrics["latents_unchanged_by_stage2"] = torch.equal(z, encode_dataset(stage1, val_set, dist)[0])
        if classes > 1:
            metrics["linear_probe"] = linear_probe(*encode_dataset(stage2, train_set, dist), z, y, classes)
            dist.print(f"linear probe of the latents: {metrics['linear_probe']:.1%} of {classes} classes")
    return metrics

def main(cfg: Config, dist: Dist) -> None:
    began = time.time()
    if cfg.from_official:
        return convert(cfg, dist)

    dist.local_slice(cfg.batch_size)  # ends the run if the processes cannot share a batch
    if Path(cfg.data).exists():  # later stages find it from any folder
        cfg = dataclasses.replace(cfg, data=str(Path(cfg.data).absolute()))
    train_set = dist.rank0_first(lambda: ImageSet(cfg.data, cfg.size, "train", cfg.out))
    val_set = ImageSet(cfg.data, cfg.size, "val")
    dist.print(f"{cfg.data}: to train on {train_set.describe()}; to validate {len(val_set):,}")

    # A checkpoint in --out: the run goes on from there
    out, state, stage = Path(cfg.out), None, 1
    if (out / "ckpt.pt").exists():
        state = load_checkpoint(out / "ckpt.pt", "tokenizer")
        with reading(out / "ckpt.pt", "a checkpoint to go on from"):
            stage, step = state["stage"], state["step"]
            dist.print(f"continuing {out / 'ckpt.pt'} at step {step} of stage {stage}, saved by {state['commit']}")

    # The networks of the loss. A folder is made only after all of them are there
    lpips = load_lpips(cfg.weights, dist) if cfg.lpips else None
    adversary = Adversary(cfg, dist) if cfg.adversary == "dino" else None
    names = cfg.target_names() if stage == 1 else []
    targets = {name: TARGETS[name](cfg, dist, train_set) for name in names}
    dist.make_out_dir(cfg.out, cfg, {"images": train_set.fingerprint})

    if stage == 1:
        torch.manual_seed(cfg.seed)
        model = Tokenizer(cfg, {name: target.width for name, target in targets.items()}).to(dist.device)
        average = train(cfg, dist, 1, model, train_set, targets, lpips, adversary, state)
        dist.save(out / "stage1.pt", {"kind": "tokenizer", "config": dataclasses.asdict(cfg), "ema": average.state_dict()})
        dist.barrier()
        state, targets, model, average = None, None, None, None  # frees the memory of the teachers

    stage1, _ = load_tokenizer(out / "stage1.pt", dist.device)
    stage2 = stage1
    if cfg.stage2_steps:
        stage2 = train(cfg, dist, 2, copy.deepcopy(stage1).train(), train_set, {}, lpips, adversary, state)

    metrics = evaluate(cfg, dist, train_set, val_set, stage1, stage2, lpips)
    if dist.is_main:
        save_recon_grid(out / "recon.png", val_set, stage1, stage2, cfg, dist)
    dist.save(out / "metrics.json", metrics | {
        "images": len(val_set), "weights": "ema", "precision": dist.precision, "seed": cfg.seed, "steps": cfg.steps,
        "stage2_steps": cfg.stage2_steps, "seconds": round(time.time() - began)})
    dist.print(f"wrote {out}/ckpt.pt, recon.png, metrics.json in {time.time() - began:.0f} s")
    return dist.barrier()

# ---- Appendix A. The adversary of Eq. 6. A first reader may stop before it

def hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())

class LeCam:
    """LeCam regulariser (Tseng 2021): pulls logits to the running mean of the other side's logits, kept in `means`."""

    def __init__(self, dist: Dist, decay: float = 0.999):
        self.dist, self.decay, self.means = dist, decay, torch.zeros(2, device=dist.device)

    def __call__(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        now = torch.stack([logits_real.detach().mean(), logits_fake.detach().mean()])
        now = self.dist.all_reduce(now) / self.dist.world_size
        self.means = self.decay * self.means + (1 - self.decay) * now
        mean_real, mean_fake = self.means
        return F.relu(logits_real - mean_fake).square().mean() + F.relu(mean_real - logits_fake).square().mean()

def draw_augmentation(rng: np.random.Generator, batch: int, size: int, cutout: float, chance: float) -> dict:
    """Random numbers of DiffAugment for a batch. Each of its three operations occurs with probability `chance`."""
    reach, odd = int(size / 8 + 0.5), int(cutout * size + 0.5) % 2
    draws = {"color": rng.random((3, batch), np.float32),           # brightness, saturation, contrast
             "shift": rng.integers(-reach, reach + 1, (2, batch)),  # down, right
             "cutout": rng.integers(0, size + 1 - odd, (2, batch))}
    return {name: torch.from_numpy(draw) for (name, draw), u in zip(draws.items(), rng.random(3)) if u < chance}

def augment(x: Tensor, draws: dict, cutout: float) -> Tensor:
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
        rows, columns = (at + draws["shift"][..., None] + 1).clamp(0, s + 1)        # 2 x B x S into the padded image
        x = F.pad(x, (1, 1, 1, 1)).gather(2, rows[:, None, :, None].expand(b, c, s, s + 2))
        x = x.gather(3, columns[:, None, None, :].expand(b, c, s, s))
    if "cutout" in draws:
        side = int(cutout * s + 0.5)
        first = draws["cutout"][..., None] - side // 2
        rows, columns = (at >= first.clamp(0, s - 1)) & (at <= (first + side - 1).clamp(0, s - 1))
        x = x * ~(rows[:, None, :, None] & columns[:, None, None, :])
    return x

class GroupedBatchNorm(nn.BatchNorm1d):
    """Batch norm of B x C x T over each group of 8 images, in training and in evaluation alike."""

    def forward(self, x):
        groups = x.float().unflatten(0, (math.ceil(len(x) / 8), -1))        # B/8 x 8 x C x T
        mean = groups.mean((1, 3), keepdim=True)
        var = groups.var((1, 3), correction=0, keepdim=True)
        x = ((groups - mean) * (var + self.eps).rsqrt()).flatten(0, 1)
        return x * self.weight[:, None] + self.bias[:, None]

class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return (self.fn(x) + x) / math.sqrt(2)

class DinoDiscriminator(nn.Module):
    """Heads on the frozen features of a DINO ViT-S/16 (StyleGAN-T, VAR): images in [-1, 1] -> logits B x 5*196.

    The trunk is in a tuple, so it is no part of parameters(), state_dict() and train().
    """

    def __init__(self, trunk: nn.Module, norm: str = "batch", layers: tuple = (2, 5, 8, 11)):
        super().__init__()
        self.trunk, self.layers, width = (trunk,), layers, trunk.width
        norm_class = {"batch": nn.BatchNorm1d, "groups": GroupedBatchNorm}[norm]

        def conv(out, kernel):
            layer = nn.Conv1d(width, out, kernel, padding=kernel // 2, padding_mode="circular")
            return nn.utils.spectral_norm(layer)

        def unit(kernel):
            return nn.Sequential(conv(width, kernel), norm_class(width, eps=1e-6), nn.LeakyReLU(0.2))

        self.heads = nn.ModuleList(nn.Sequential(unit(1), Residual(unit(9)), conv(1, 1)) for _ in (0, *layers))

    def forward(self, *views):
        """Logits of each batch of images. Batch norm treats the batches separately."""
        return [self.logits(x) for x in views]

    def features(self, image):
        """Patch tokens plus class token, B x D x 196, before the layers and after each of `layers`."""
        trunk = self.trunk[0]
        x = trunk.normalise(image)
        size = trunk.patch * math.isqrt(trunk.pos_embed.shape[1])
        if image.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="area" if image.shape[-1] > size else "bicubic")
        x = trunk.embed(x)
        features = [x]
        for i, layer in enumerate(trunk.layers[:max(self.layers) + 1]):
            x = layer(x)
            features += [x] if i in self.layers else []
        return [(f[:, 1:] + f[:, :1]).transpose(1, 2) for f in features]

    def logits(self, image):
        return torch.cat([head(f).flatten(1).float() for head, f in zip(self.heads, self.features(image))], 1)

class Adversary:
    """The discriminator, its optimizer and its loss: hinge, LeCam, and consistency under augmentation.

    Its batch norm covers the batch of all GPUs; processes on a CPU keep their own statistics.
    """

    def __init__(self, cfg: Config, dist: Dist, net: nn.Module | None = None):
        self.cfg, self.dist, self.lecam = cfg, dist, LeCam(dist)
        torch.manual_seed(cfg.seed + 1)
        if net is None:
            trunk = load_vit("dino_deitsmall16_pretrain", cfg.weights, dist, "--adversary none")
            net = DinoDiscriminator(trunk, cfg.adv_norm)
        if dist.world_size > 1 and dist.device.type == "cuda" and cfg.adv_norm == "batch":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        self.net = net.to(dist.device).train()
        self.wrapped, self.optimizers = dist.wrap(self.net), make_optimizers(self.net, cfg)

    def view(self, x, purpose: int, step: int, micro: slice, cutout: float = 0.2, chance: float = 0.5):
        """x as the discriminator sees it: augmented, and above 224 pixels half of the time a crop of 224."""
        rng, size = self.dist.rng(self.cfg.seed, "augmentation", step, purpose), x.shape[-1]
        if self.cfg.diffaug or chance == 1:
            draws = draw_augmentation(rng, self.cfg.batch_size, size, cutout, chance)
            mine = self.dist.local_slice(self.cfg.batch_size)
            x = augment(x, {name: draw[:, mine][:, micro].to(x.device) for name, draw in draws.items()}, cutout)
        if size > 224 and rng.random() < 0.5:
            top, left = rng.integers(0, size - 223, 2)
            x = x[:, :, top:top + 224, left:left + 224]
        return x

    def generator_loss(self, recon: Tensor, step: int, micro: slice) -> Tensor:
        """L_adv of Eq. 6, for rows `micro` of this process's batch."""
        with self.dist.autocast():
            return -self.net(self.view(recon, 0, step, micro))[0].mean()

    def train_step(self, real: Tensor, fake: Tensor, step: int) -> dict:
        """One step on real images and detached reconstructions of the same batch. Returns terms of the log."""
        cfg, terms = self.cfg, {}
        for micro in self.dist.micro_batches(self.wrapped, len(real), cfg.micro_batch):
            share = (micro.stop - micro.start) / len(real)
            pair = real[micro], fake[micro]
            views = [self.view(x, 1 + i, step, micro) for i, x in enumerate(pair)]
            if cfg.consistency:
                views += [self.view(x, 3 + i, step, micro, 0.5, 1) for i, x in enumerate(pair)]
            with self.dist.autocast():
                logits_real, logits_fake, *logits_aug = self.wrapped(*views)

            losses = {"hinge": hinge_loss(logits_real, logits_fake), "lecam": self.lecam(logits_real, logits_fake)}
            loss = cfg.adv_weight * (losses["hinge"] + cfg.lecam * losses["lecam"])
            if logits_aug:
                losses["consistency"] = F.mse_loss(torch.cat([logits_real, logits_fake]), torch.cat(logits_aug))
                loss = loss + cfg.consistency * losses["consistency"]
            (loss * share).backward()
            losses |= {"logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
            for name, value in losses.items():
                terms[name] = terms.get(name, 0) + share * value.detach()

        terms["grad_d"] = nn.utils.clip_grad_norm_(self.net.parameters(), cfg.clip or math.inf)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return terms

    def state_dict(self) -> dict:
        return {"net": self.net.state_dict(), "means": self.lecam.means,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        self.lecam.means = state["means"].to(self.dist.device)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

# ---- Appendix B. Released checkpoints

# Patterns that turn a parameter's name here into its name in the released files, applied in this order
KEY_MAP = [("^aux.hog", "decoder_hog"), ("^aux.dinov2", "decoder_dino"), ("^aux.siglip", "decoder_clip"),
           (r"^decoder(\w*)\.from_latent", r"post_quant_conv\1"), (r"^decoder\.head", "decoder.to_pixel.model"),
           (r"^decoder(\w+)\.head", r"to_pixel\1"), ("^to_latent", "quant_conv"),
           (r"^(encoder|decoder\w*)\.(class_token|pos_embed|patch_embed|blocks|norm)", r"\1.model.\2"),
           ("class_token", "cls_token"), ("rope_freqs", "freqs"), ("patch_embed", "patch_embed.proj"),
           ("modulation", "adaLN_modulation")]
# What never reaches the output: RoPE grids, parts of the teachers, and unused parts of decoders
UNUSED = (r"freqs_t_|^(projection|repa_model|clip_model)\.|"
          r"^decoder\w*\.model\.(patch_embed\.|norm\.adaLN_modulation\.|head\.|pos_embed)")

def from_official(weights: dict[str, Tensor], enc_heads: int = 0, dec_heads: int = 0, aux_heads: int = 0,
                  path: str | Path = "the state dict") -> tuple[Tokenizer, ModelConfig]:
    """The state dict of a released AEModel, or of a MaskAEModel with its auxiliary decoders, as a Tokenizer.

    Heads default to 64 channels each, as in all released sizes. LayerScale is folded into the matrix before it. A key
    that is missing, unknown or of another shape ends the run with its name.
    """
    with reading(path, "a released tokenizer"):
        weights = dict(weights)
        fold_layer_scale(weights, "attn.proj", "mlp.fc2")
        conv = weights["encoder.model.patch_embed.proj.weight"]
        weights["encoder.model.patch_embed.proj.weight"] = conv.permute(0, 2, 3, 1).flatten(1)      # patchify's order
        weights.setdefault("encoder.mask_token", torch.zeros(1, 1, len(conv)))  # absent if trained without masks
        widths = {name: len(weights[f"to_pixel_{key}.weight"]) for key, name in (
            ("hog", "hog"), ("dino", "dinov2"), ("clip", "siglip")) if f"to_pixel_{key}.weight" in weights}

        def measure(side: str) -> tuple[int, int, int]:
            width = weights[f"{side}.latent_pos_embed"].shape[-1]
            depth = len({key.split(".")[3] for key in weights if key.startswith(f"{side}.model.blocks.")})
            return width, depth, max(1, width // 64)

        width, depth, heads = measure("encoder")
        dec_width, dec_depth, heads2 = measure("decoder")
        aux_width, aux_depth, heads3 = measure("decoder_hog") if widths else (192, 3, 3)
        side = math.isqrt(weights["encoder.model.pos_embed"].shape[1] - 1)
        modulated = "decoder.model.blocks.0.adaLN_modulation.1.weight" in weights
        cfg = ModelConfig(
            size=conv.shape[-1] * side, patch=conv.shape[-1], latents=weights["encoder.latent_tokens"].shape[1],
            channels=len(weights["quant_conv.weight"]), width=width, depth=depth, heads=enc_heads or heads,
            dec_width=dec_width, dec_depth=dec_depth, dec_heads=dec_heads or heads2,
            aux_width=aux_width, aux_depth=aux_depth, aux_heads=aux_heads or heads3,
            decoder="modulated" if modulated else "plain", dec_class_token="decoder.model.cls_token" in weights,
            positions="rope" if "encoder.freqs" in weights else "table")
        with torch.device("meta"):
            model = Tokenizer(cfg, widths)

        state = {}
        for name, value in model.state_dict().items():
            key = name
            for pattern, official in KEY_MAP:
                key = re.sub(pattern, official, key)
            if weights[key].shape != value.shape:
                raise ValueError(f"{key} is {list(weights[key].shape)}, not {list(value.shape)}")
            state[name] = weights.pop(key).float().clone()  # a copy: the file it is mapped from need not stay
        unknown = [key for key in weights if not re.search(UNUSED, key)]
        if unknown:
            raise ValueError(f"{min(unknown)} is unknown")
        model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False), cfg

def convert(cfg: Config, dist: Dist) -> None:
    """--from-official: config.json and model.safetensors of a folder, or a bare state dict -> ckpt.pt in --out."""
    path = Path(cfg.from_official)
    path = path / "model.safetensors" if path.is_dir() else path
    model, model_cfg = from_official(read_weights(path), path=path)
    about, statistics = path.with_name("config.json"), {}
    if about.exists():  # it holds scalar statistics of the latents
        with reading(about, "the config of a released tokenizer"):
            meta = json.loads(about.read_text())
            statistics = {name: float(meta[f"vq_{name}"]) for name in ("mean", "std") if f"vq_{name}" in meta}

    out = dist.make_out_dir(cfg.out)
    with reading(out, "an empty folder"):
        if (out / "ckpt.pt").exists():
            raise ValueError("ckpt.pt is there already; give another --out")
    cfg = dataclasses.replace(cfg, **dataclasses.asdict(model_cfg), targets=",".join(model.aux) or "none")
    dist.save(out / "ckpt.pt", {
        "kind": "tokenizer", "config": dataclasses.asdict(cfg), "stage": 2, "step": 0, "model": {},
        "ema": model.state_dict(), "latent_statistics": statistics, "source": str(path.absolute())})
    dist.print(f"{path}: {cfg.size} px, patch {cfg.patch}, {cfg.latents} latents x {cfg.channels}, {cfg.decoder} "
               f"decoder; latent statistics {statistics or 'not given'}; wrote {out / 'ckpt.pt'}")

if __name__ == "__main__":
    launch(main, Config, PRESETS, __doc__)
