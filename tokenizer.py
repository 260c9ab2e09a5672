"""MAETok: masked autoencoders as tokenizers for diffusion models (arXiv 2502.03444).

    torchrun tokenizer.py                                # stage 1, stage 2, evaluation -> out/tokenizer/

An image becomes L latent tokens of H channels. Stage 1 (Sec. 3.2) trains encoder and decoder while 40-60 % of the
patches are replaced by a mask token, and shallow auxiliary decoders must predict features (here HOG) of the hidden
patches from the same latents. Stage 2 (Sec. 3.3) freezes the encoder and tunes the pixel decoder until it sees whole
images again. There is no KL term: what makes the latents easy for a diffusion model is their structure.

Letters: B images, N patch tokens, L latent tokens, D width, H latent channels, P patch size, S image size.
"""
import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import truncnorm
from torch import nn
from tqdm import tqdm

from data import (
    NAMED,
    Batches,
    Common,
    Ema,
    Images,
    Log,
    Run,
    commit,
    fail,
    learning_rate,
    load_checkpoint,
    load_images,
    make_optimizers,
    micro_batches,
    optimizer_step,
    parse_config,
    resume,
    save_checkpoint,
    save_grid,
    setting,
    start,
    to_float,
    to_uint8,
    write_json,
)


@dataclass
class Config(Common):
    """Defaults are the preset `quick`: the built-in images, minutes on two CPU cores."""
    data: str = setting("shapes", "shapes, cifar10, imagenette, a folder of images, or what data.py packed")
    size: int = setting(32, "image side S in pixels", least=1)
    out: str = setting("out/tokenizer", "folder for ckpt.pt, stage1.pt, log.jsonl, recon.png, metrics.json")
    patch: int = setting(8, "patch side P; divides --size", least=1)
    latents: int = setting(8, "number of latent tokens L", least=1)
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
    targets: str = setting("hog", "features the auxiliary decoders predict: hog, or none")
    aux_depth: int = setting(3, "layers of an auxiliary decoder", least=1)
    aux_width: int = setting(96, "width of an auxiliary decoder", least=1)
    aux_heads: int = setting(2, "heads of an auxiliary decoder", least=1)
    aux_weight: float = setting(1.0, "weight of each masked target (Eq. 8) beside the pixel loss")
    steps: int = setting(2400, "steps of stage 1")
    stage2_steps: int = setting(1100, "steps of stage 2; the mask ratio falls from --mask-max to 0 over them")
    batch_size: int = setting(64, "images per step, over all processes", least=1)
    micro_batch: int = setting(0, "most images a process puts through at once; 0: all of its share")
    optimizer: str = setting("muon", "muon for the matrices inside blocks and adamw for the rest, or adamw for all",
                             ("adamw", "muon"))
    lr: float = setting(2e-3, "peak learning rate of AdamW")
    muon_lr: float = setting(1.5e-2, "peak learning rate of Muon")
    beta2: float = setting(0.95, "second beta of AdamW")
    weight_decay: float = setting(1e-4, "weight decay")
    warmup: int = setting(50, "steps of linear warm-up")
    clip: float = setting(1.0, "largest gradient norm; 0: no clipping")
    ema: float = setting(0.998, "decay of the weight average")
    log_every: int = setting(200, "steps between lines of the log", least=1)
    save_every: int = setting(400, "steps between checkpoints", least=1)

    def check(self):
        if self.size % self.patch or self.patch % 2:
            raise ValueError(f"--size {self.size} must be a multiple of an even --patch {self.patch}")
        for width, heads in ((self.width, self.heads), (self.dec_width or self.width, self.dec_heads or self.heads),
                             (self.aux_width, self.aux_heads)):
            if width % (4 * heads):
                raise ValueError(f"width {width} must be a multiple of four times the heads {heads} (2D RoPE)")
        if not 0 <= self.mask_min <= self.mask_max < 1:
            raise ValueError("0 <= --mask-min <= --mask-max < 1 is needed")
        if set(self.target_names()) - {"hog"}:
            raise ValueError(f"--targets {self.targets}: hog or none")

    def target_names(self) -> list[str]:
        return [] if self.targets == "none" else self.targets.split(",")


PRESETS = {
    "quick": {},
    "imagenet256": {                                     # the paper's Table 7 and Sec. 3
        "data": "imagenet", "size": 256, "patch": 16, "latents": 128, "channels": 32, "width": 768, "depth": 12,
        "heads": 12, "aux_width": 192, "aux_heads": 3, "steps": 500_000, "stage2_steps": 50_000, "batch_size": 512,
        "optimizer": "adamw", "lr": 1e-4, "beta2": 0.95, "weight_decay": 1e-4, "warmup": 10_000, "ema": 0.9999,
        "save_every": 5000},
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
    """Turn each pair of channels (2i, 2i+1) by its angle, in fp32: x is B x heads x T x d, tables heads x T x d/2."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def init_rope_freqs(depth: int, heads: int, width: int, theta: float = 10.0) -> torch.Tensor:
    """Frequencies along x and y, 2 x depth x heads*d/2, each head with its own random orientation (RoPE-Mixed)."""
    d = width // heads
    magnitude = theta ** (-torch.arange(0, d, 4).float() / d)
    angle = 2 * math.pi * torch.rand(depth, heads, 1)
    fx = torch.cat([magnitude * angle.cos(), magnitude * (angle + math.pi / 2).cos()], -1)
    fy = torch.cat([magnitude * angle.sin(), magnitude * (angle + math.pi / 2).sin()], -1)
    return torch.stack([fx, fy]).flatten(2)


def rope_tables(freqs: torch.Tensor, heads: int, grid: tuple[int, int], before: int, after: int):
    """cos and sin for every layer: depth x heads x T x d/2, T = before + rows*columns + after.

    Image token n stands at column n mod columns, row n div columns; class tokens (before) and latent tokens (after)
    have no place in the image and are not turned: their angle is 0.
    """
    n = torch.arange(grid[0] * grid[1], device=freqs.device)
    x, y = (n % grid[1]).float()[:, None], (n // grid[1]).float()[:, None]
    fx, fy = freqs.float().unflatten(-1, (heads, -1)).unsqueeze(-2)      # depth x heads x 1 x d/2
    angles = F.pad(x * fx + y * fy, (0, 0, before, after))
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Multi-head self-attention; rows of qkv are q, k, v, each split head by head. `qk_norm` normalises q and k."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # B x heads x T x d
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


def attend(q, k, v):
    """Scaled dot-product attention; on a CPU in fp32, whose backward is there 3 times faster than that of bf16."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


class Mlp(nn.Module):
    def __init__(self, width: int, approximate: str = "none"):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(approximate), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer layer. With `channels`, the latents z scale and shift their own rows.

    That is the decoder of the released model: norms without weights; y*scale + shift (not 1 + scale) on the last L
    rows, from a layer that starts at zero, so that at first the decoder sees nothing of z.
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
            x = x + self.attn(self.norm1(x), rope)
            return x + self.mlp(self.norm2(x))
        shift1, scale1, shift2, scale2 = self.modulation(z).chunk(4, -1)
        x = x + self.attn(modulate_tail(self.norm1(x), scale1, shift1), rope)
        return x + self.mlp(modulate_tail(self.norm2(x), scale2, shift2))


def modulate_tail(x, scale, shift):
    count = scale.shape[1]
    return torch.cat([x[:, :-count], x[:, -count:] * scale + shift], 1)


def token(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(1, *shape))


class Encoder(nn.Module):
    """Image -> outputs of the L learnable latent tokens (Eq. 4)."""

    def __init__(self, cfg: Config):
        super().__init__()
        d, n = cfg.width, (cfg.size // cfg.patch) ** 2
        self.patch, self.heads, self.latents = cfg.patch, cfg.heads, cfg.latents
        self.patch_embed = nn.Linear(3 * cfg.patch**2, d)
        self.mask_token, self.class_token = token(1, d), token(1, d)
        self.pos_embed = token(1 + n, d)                  # the released model adds it beside RoPE
        self.latent_tokens, self.latent_pos_embed = token(cfg.latents, d), token(cfg.latents, d)
        if cfg.positions == "rope":
            self.rope_freqs = nn.Parameter(init_rope_freqs(cfg.depth, cfg.heads, d))
        self.blocks = nn.ModuleList(Block(d, cfg.heads) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def forward(self, image, mask=None):
        x = self.patch_embed(patchify(image, self.patch))                             # B x N x D
        if mask is not None:                              # replaced, not dropped: the length stays N
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        b, n, _ = x.shape
        x = torch.cat([self.class_token.expand(b, -1, -1), x], 1) + self.pos_embed    # B x (1+N) x D
        z = (self.latent_tokens + self.latent_pos_embed).expand(b, -1, -1)            # B x L x D
        x = torch.cat([x, z], 1)                                                      # B x (1+N+L) x D
        g = math.isqrt(n)
        x = run_blocks(self, x, (g, g), 1, self.latents)
        return self.norm(x[:, -self.latents:])                                        # B x L x D


class Decoder(nn.Module):
    """Latents h, B x L x H -> one vector per patch, B x N x out (Eq. 5); also the auxiliary decoders (Eq. 7)."""

    def __init__(self, cfg: Config, width: int, depth: int, heads: int, out: int, class_token: bool):
        super().__init__()
        self.grid, self.heads, self.latents = cfg.size // cfg.patch, heads, cfg.latents
        self.from_latent = nn.Linear(cfg.channels, width)
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

    def forward(self, h):
        b, n = len(h), self.grid**2
        x = self.mask_token.expand(b, n, -1)                                          # B x N x D
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(b, -1, -1), x], 1)
        if hasattr(self, "pos_embed"):
            x = x + self.pos_embed
        before = x.shape[1] - n
        x = torch.cat([x, self.from_latent(h) + self.latent_pos_embed], 1)            # B x (N+L) x D
        x = run_blocks(self, x, (self.grid, self.grid), before, self.latents, h if self.modulated else None)
        return self.head(self.norm(x[:, before:before + n]))                          # B x N x out


def run_blocks(net, x, grid, before, after, z=None):
    """All layers of an encoder or decoder over [class | image | latents] with its RoPE tables."""
    if hasattr(net, "rope_freqs"):
        cos, sin = rope_tables(net.rope_freqs, net.heads, grid, before, after)
    for i, block in enumerate(net.blocks):
        x = block(x, (cos[i], sin[i]) if hasattr(net, "rope_freqs") else None, z)
    return x


class Tokenizer(nn.Module):
    """The autoencoder and its auxiliary decoders: images B x 3 x S x S in [-1, 1], latents B x L x H, unbounded."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.patch = cfg.patch
        self.encoder = Encoder(cfg)
        self.to_latent = nn.Linear(cfg.width, cfg.channels)
        self.decoder = Decoder(cfg, cfg.dec_width or cfg.width, cfg.dec_depth or cfg.depth, cfg.dec_heads or cfg.heads,
                               3 * cfg.patch**2, cfg.dec_class_token)
        self.aux = nn.ModuleDict({name: Decoder(cfg, cfg.aux_width, cfg.aux_depth, cfg.aux_heads, HOG_DIM, True)
                                  for name in cfg.target_names()})
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.weight) if "modulation" in name else nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def encode(self, image, mask=None):
        """B x 3 x S x S -> latents B x L x H; mask B x N, True where a patch is hidden."""
        return self.to_latent(self.encoder(image, mask))

    def decode(self, h):
        """Latents B x L x H -> images B x 3 x S x S, not clamped."""
        return unpatchify(self.decoder(h).float(), self.patch)

    def forward(self, image, mask=None, frozen=False):
        """Reconstruction and the auxiliary predictions; `frozen` (stage 2) keeps gradients out of the encoder."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            h = self.encode(image, mask)
        return self.decode(h), {name: aux(h) for name, aux in self.aux.items()}


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
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=x.device)
    kernel = torch.stack([sobel, sobel.T])[:, None].repeat(c, 1, 1, 1)
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
    error = (prediction.float() - target).square().mean(-1)
    return error.mean() if mask is None else (error * mask).sum() / mask.sum()


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_stage1(cfg: Config, run: Run, images: Images, state: dict | None) -> Tokenizer:
    """Stage 1 (Sec. 3.2): the whole model, masked images, pixel loss (Eq. 6) and masked targets (Eq. 8)."""
    torch.manual_seed(cfg.seed)
    model = Tokenizer(cfg).to(run.device)
    ema, optimizers, done = Ema(model, cfg.ema), make_optimizers(model, cfg), 0
    if state:
        done = restore(state, model, ema, optimizers)
    parallel, params = run.parallel(model, cfg.compile), list(model.parameters())
    batches = Batches(images, cfg.batch_size, cfg.seed, run)
    log = Log(run, cfg, "stage 1", done, cfg.steps, batches)
    n = (cfg.size // cfg.patch) ** 2
    for step in range(done, cfg.steps):
        x, _ = batches(step)
        ratio = draw_mask_ratio(cfg.mask_min, cfg.mask_max, cfg.seed, step)
        mask = random_mask(cfg.batch_size, n, ratio, run.generator(cfg.seed, 4, step))[run.rows(cfg.batch_size)]
        terms = {}
        for part in micro_batches(parallel, len(x), cfg.micro_batch):
            share, hidden = len(x[part]) / len(x), mask[part] if cfg.mask_max else None
            with run.autocast():
                recon, predictions = parallel(x[part], mask[part])
            losses = {"recon": F.mse_loss(recon, x[part])}
            for name, prediction in predictions.items():
                losses[name] = cfg.aux_weight * masked_mse(prediction, hog(x[part], cfg.patch), hidden)
            loss = sum(losses.values()) * share
            loss.backward()
            for name, value in losses.items():
                terms[name] = terms.get(name, 0) + value.detach() * share
        rate = learning_rate(step, cfg.steps, cfg.warmup, "cosine")
        terms["grad"] = optimizer_step(optimizers, params, rate, cfg.clip)
        ema.update(step)
        log(step + 1, **terms)
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save(cfg, run, images, 1, step + 1, model, ema, optimizers)
    return ema.model


def train_stage2(cfg: Config, run: Run, images: Images, stage1: Tokenizer, state: dict | None) -> Tokenizer:
    """Stage 2 (Sec. 3.3): encoder frozen, auxiliary decoders dropped, pixel loss only, mask ratio falling to zero."""
    model = copy.deepcopy(stage1).to(run.device).train()
    model.aux = nn.ModuleDict()
    model.requires_grad_(False).decoder.requires_grad_(True)
    ema, optimizers, done = Ema(model, cfg.ema), make_optimizers(model, cfg), 0
    if state:
        done = restore(state, model, ema, optimizers)
    parallel, params = run.parallel(model, cfg.compile), list(model.decoder.parameters())
    batches = Batches(images, cfg.batch_size, cfg.seed + 1, run)
    log = Log(run, cfg, "stage 2", done, cfg.stage2_steps, batches)
    n = (cfg.size // cfg.patch) ** 2
    for step in range(done, cfg.stage2_steps):
        x, _ = batches(step)
        ratio = cfg.mask_max * (1 - step / max(1, cfg.stage2_steps - 1))
        mask = random_mask(cfg.batch_size, n, ratio, run.generator(cfg.seed, 5, step))[run.rows(cfg.batch_size)]
        terms = {}
        for part in micro_batches(parallel, len(x), cfg.micro_batch):
            share = len(x[part]) / len(x)
            with run.autocast():
                recon, _ = parallel(x[part], mask[part], frozen=True)
            loss = F.mse_loss(recon, x[part]) * share
            loss.backward()
            terms["recon"] = terms.get("recon", 0) + loss.detach()
        rate = learning_rate(step, cfg.stage2_steps, cfg.warmup, "cosine")
        terms["grad"] = optimizer_step(optimizers, params, rate, cfg.clip)
        ema.update(step)
        log(step + 1, **terms)
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.stage2_steps:
            save(cfg, run, images, 2, step + 1, model, ema, optimizers)
    return ema.model


def save(cfg, run, images, stage, step, model, ema, optimizers):
    if run.main:
        save_checkpoint(Path(cfg.out) / "ckpt.pt", {
            "kind": "tokenizer", "config": dataclasses.asdict(cfg), "stage": stage, "step": step,
            "data": images.fingerprint, "model": model.state_dict(), "ema": ema.model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers]})


def restore(state: dict, model, ema, optimizers) -> int:
    model.load_state_dict(state["model"])
    ema.model.load_state_dict(state["ema"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return state["step"]


def load_tokenizer(path: str | Path, device: torch.device) -> tuple[Tokenizer, Config]:
    """The averaged weights of a checkpoint, in evaluation mode, and the config they were trained with."""
    state = load_checkpoint(path, "tokenizer")
    cfg = Config(**state["config"])
    if state["stage"] == 2:
        cfg.targets = "none"
    model = Tokenizer(cfg)
    model.load_state_dict(state["ema"])
    return model.to(device).eval().requires_grad_(False), cfg


# ---------------------------------------------------------------------------------------------------------------------
# The released weights

RENAMED = (("post_quant_conv.", "decoder.from_latent."), ("quant_conv.", "to_latent."), ("to_pixel.model.", "head."),
           (".model.", "."), ("cls_token", "class_token"), (".freqs", ".rope_freqs"),
           ("patch_embed.proj", "patch_embed"), ("adaLN_modulation", "modulation"))


def from_official(weights: dict[str, torch.Tensor], enc_heads: int = 0, dec_heads: int = 0) -> tuple[Tokenizer, Config]:
    """The released AEModel's state dict as our Tokenizer; heads default to 64 channels each, as in all released sizes.

    Folded away exactly: LayerScale (into the matrix before it) and what never reaches the output (RoPE grids, the
    decoder's position table beside RoPE, its patch embedding, the modulation of its last norm). A key that is missing
    or left over is an error that names it.
    """
    rope = "encoder.freqs" in weights
    dead = ("freqs_t_x", "freqs_t_y", "decoder.model.patch_embed.", "decoder.model.norm.adaLN_modulation.")
    dead += ("decoder.model.pos_embed",) if rope else ()
    ours = {}
    for key, value in weights.items():
        if any(word in key for word in dead) or key.endswith("gamma"):
            continue
        module = key.rpartition(".")[0]
        gamma = {"attn.proj": "ls1.gamma", "mlp.fc2": "ls2.gamma"}.get(".".join(module.split(".")[-2:]))
        gamma = weights.get(module.rpartition(".")[0].rpartition(".")[0] + f".{gamma}")
        if gamma is not None:
            value = value * (gamma[:, None] if value.ndim == 2 else gamma)
        if key.endswith("patch_embed.proj.weight"):
            value = value.permute(0, 2, 3, 1).flatten(1)  # to patchify's order: row, column, channel
        for old, new in RENAMED:
            key = key.replace(old, new)
        ours[key] = value
    try:
        patch = math.isqrt(ours["encoder.patch_embed.weight"].shape[1] // 3)
        rows = ours["encoder.pos_embed"].shape[1] - 1
        width, dec_width = (ours[f"{side}.mask_token"].shape[-1] if f"{side}.mask_token" in ours else
                            ours[f"{side}.latent_pos_embed"].shape[-1] for side in ("encoder", "decoder"))
        depth, dec_depth = (len({k.split(".")[2] for k in ours if k.startswith(f"{side}.blocks.")})
                            for side in ("encoder", "decoder"))
        cfg = Config(size=patch * math.isqrt(rows), patch=patch, latents=ours["encoder.latent_tokens"].shape[1],
                     channels=ours["to_latent.weight"].shape[0], width=width, depth=depth,
                     heads=enc_heads or width // 64, dec_width=dec_width, dec_depth=dec_depth,
                     dec_heads=dec_heads or dec_width // 64, targets="none", positions="rope" if rope else "table",
                     decoder="modulated" if "decoder.blocks.0.modulation.1.weight" in ours else "plain",
                     dec_class_token="decoder.class_token" in ours)
    except KeyError as error:
        fail(f"not a released tokenizer: {error} is missing")
    ours.setdefault("encoder.mask_token", torch.zeros(1, 1, width))      # models trained without masking have none
    model = Tokenizer(cfg)
    missing, extra = model.load_state_dict(ours, strict=False)
    if missing or extra:
        fail(f"not a released tokenizer: {'missing ' + missing[0] if missing else 'unknown ' + extra[0]}")
    return model.eval().requires_grad_(False), cfg


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


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each pair of uint8 images; identical ones count as 100 dB."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return (20 * math.log10(255) - 10 * error.log10()).clamp(max=100)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each pair of uint8 images: 11-pixel Gaussian window of deviation 1.5 (Wang 2004)."""
    w = torch.exp(-0.5 * ((torch.arange(11, device=a.device, dtype=torch.float64) - 5) / 1.5) ** 2)
    w = (torch.outer(w, w) / w.sum() ** 2)[None, None]

    def blur(x):
        return F.conv2d(x.flatten(0, 1)[:, None], w).view(*x.shape[:2], x.shape[2] - 10, x.shape[3] - 10)

    a, b = a.double() / 255, b.double() / 255
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return score.flatten(1).mean(1)


def linear_probe(train_z, train_y, val_z, val_y, classes: int, iterations: int = 100) -> float:
    """Accuracy of logistic regression on the flattened, standardised latents (paper Fig. 5a)."""
    z, v = train_z.flatten(1).double(), val_z.flatten(1).double()
    mean, std = z.mean(0), z.std(0) + 1e-6
    z, v = (z - mean) / std, (v - mean) / std
    w = torch.zeros(z.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=iterations, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(z @ w[:-1] + w[-1], train_y) + 1e-4 * w.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return ((v @ w[:-1] + w[-1]).argmax(1) == val_y).double().mean().item()


def evaluate(model: Tokenizer, images: Images, run: Run, batch: int = 250) -> dict:
    """PSNR and SSIM over the validation images, uint8 against uint8, shared out over the processes."""
    sums = torch.zeros(3, dtype=torch.float64)
    for i in range(batch * run.rank, len(images), batch * run.world):
        x = images[np.arange(i, min(i + batch, len(images)))].to(run.device)
        y = reconstruct(model, x, run)
        sums += torch.tensor([psnr(x, y).sum(), ssim(x, y).sum() if x.shape[-1] > 10 else math.nan, len(x)])
    total_psnr, total_ssim, count = run.sum(sums.to(run.device)).tolist()
    return {"psnr": total_psnr / count} | ({} if math.isnan(total_ssim) else {"ssim": total_ssim / count})


def picture(path: Path, images: Images, stage1: Tokenizer, stage2: Tokenizer, cfg: Config, run: Run) -> None:
    """recon.png: original, masked input, what stage 1 makes of it, and both stages on the whole image."""
    x = images[np.arange(min(8, len(images)))]
    n = (cfg.size // cfg.patch) ** 2
    mask = random_mask(len(x), n, (cfg.mask_min + cfg.mask_max) / 2, torch.Generator().manual_seed(cfg.seed))
    hidden = patchify(x, cfg.patch).masked_fill(mask[..., None], 128)
    with torch.no_grad(), run.autocast():
        guess = to_uint8(stage1.decode(stage1.encode(to_float(x.to(run.device)), mask.to(run.device))))
    columns = [x, unpatchify(hidden, cfg.patch), guess, reconstruct(stage1, x, run), reconstruct(stage2, x, run)]
    save_grid(path, torch.stack([c.cpu() for c in columns], 1).flatten(0, 1), len(columns),
              ["original", "masked", "from masked", "stage 1", "stage 2"])


def main():
    cfg = parse_config(Config, PRESETS, __doc__)
    run, began = start(cfg), time.time()
    if cfg.data not in NAMED:
        cfg.data = str(Path(cfg.data).absolute())        # the later stages find it from any folder
    train = run.first(lambda: load_images(cfg.data, cfg.size, "train"))
    val = load_images(cfg.data, cfg.size, "val")
    run.print(f"{cfg.data}: {len(train)} images to train on, {len(val)} to validate, {len(train.classes)} classes")
    out = run.claim(cfg.out, cfg.fresh)
    state = resume(out / "ckpt.pt", "tokenizer", cfg, {"data": train.fingerprint}, run)
    stage = state["stage"] if state else 1
    if stage == 1:
        model = train_stage1(cfg, run, train, state)
        if run.main:
            save_checkpoint(out / "stage1.pt", {"kind": "tokenizer", "config": dataclasses.asdict(cfg), "stage": 1,
                                                "step": cfg.steps, "ema": model.state_dict()})
        run.barrier()
    stage1, _ = load_tokenizer(out / "stage1.pt", run.device)
    stage2 = train_stage2(cfg, run, train, stage1, state if stage == 2 else None) if cfg.stage2_steps else stage1
    metrics = {"stage1": evaluate(stage1, val, run), "stage2": evaluate(stage2, val, run)}
    if run.main:
        report(cfg, run, train, val, stage1, stage2, metrics, began)
    run.barrier()


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
        run.print(f"{name}: validation PSNR {row['psnr']:.2f} dB, SSIM {row.get('ssim', math.nan):.3f}")
    run.print(f"latents bit-identical before and after stage 2: {metrics['latents_unchanged_by_stage2']}")
    if "linear_probe" in metrics:
        run.print(f"linear probe of the latents: {metrics['linear_probe']:.1%} of {len(train.classes)} classes")
    run.print(f"wrote {out}/ckpt.pt, recon.png, metrics.json in {metrics['seconds']} s")


if __name__ == "__main__":
    main()
