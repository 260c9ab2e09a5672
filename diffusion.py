"""SiT: a flow-matching transformer on the tokenizer's latents (arXiv 2401.08740; MAETok Sec. 4).

    torchrun diffusion.py  # encodes the data once, trains -> out/diffusion/

A latent x is L tokens of H channels, normalised; eps is Gaussian noise of the same shape. Time t runs from 0 (data) to 1
(noise): x_t = alpha x + sigma eps. The network learns the velocity v = alpha' x + sigma' eps; on the linear path
v = eps - x. Sampling follows v from t = 1 to t = 0.
"""
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import (
    Dist,
    Ema,
    ImageSet,
    Loader,
    Log,
    Shards,
    launch,
    load_checkpoint,
    make_optimizers,
    make_shards,
    option,
    reading,
    save_grid,
    set_lr,
)
from fid import ClassifierFD, LazyImages, frechet_distance, read_weights
from tokenizer import Attention, Mlp, Tokenizer, decode_images, encode_images, load_tokenizer, reconstruct, restore

# -------------------------------------------------------------------------------------------------
# The network


def sinusoid(t: Tensor, width: int) -> Tensor:
    """B -> B x width: cos and sin of t in [0, 1], unscaled, at width/2 frequencies from 1 down to 1/10000."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t.float()[:, None] * freqs                     # B x width/2
    return torch.cat([angles.cos(), angles.sin()], -1)


def token_positions(length: int, width: int) -> Tensor:
    """1 x L x D table of sines (even channels) and cosines (odd ones) of the token's number."""
    angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, width, 2).double() / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[None].float()


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class SwiGlu(nn.Module):
    """The gated MLP of LightningDiT. Two thirds of the width make it as large as the plain one."""

    def __init__(self, width: int):
        super().__init__()
        hidden = 8 * width // 3
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)              # B x L x 8D/3 each
        return self.w3(F.silu(gate) * value)


def make_norm(style: str) -> Callable:
    if style == "lightning":
        return functools.partial(nn.RMSNorm, eps=1e-6)
    return functools.partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)


class SiTBlock(nn.Module):
    """A transformer layer whose norms are shifted, scaled and gated by the condition c (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, qk_norm: bool, style: str):
        super().__init__()
        norm = make_norm(style)
        norm_qk = nn.Identity
        if qk_norm or style == "lightning":
            norm_qk = norm if style == "lightning" else nn.LayerNorm
        self.norm1, self.norm2 = norm(width), norm(width)   # their shift and scale come from c
        self.attn = Attention(width, heads, norm_qk)
        self.mlp = SwiGlu(width) if style == "lightning" else Mlp(width, "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)        # B x D
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int, style: str):
        super().__init__()
        self.norm = make_norm(style)(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)                 # B x D
        return self.linear(modulate(self.norm(x), shift, scale))            # B x L x H


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(sinusoid(t, 256))                   # B x D


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)  # the last row is the null class

    def forward(self, y):
        return self.embedding_table(y)                      # B x D


class SiT(nn.Module):
    """Velocity of latents x (B x L x H) at times t (B, in [0, 1]) for classes y (B, in 0..K; K is the null class).

    Parameters have the names of the released checkpoints. Style lightning has RMSNorm, SwiGLU, QK norm, and RoPE over the
    token's number in place of the table of positions.
    """

    def __init__(self, length: int, channels: int, classes: int, width: int, depth: int, heads: int,
                 qk_norm: bool = False, style: str = "sit"):
        super().__init__()
        self.shape, self.null_class, self.rope = (length, channels), classes, style == "lightning"
        if self.rope:
            d = width // heads
            angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, d, 2) / d)        # L x d/2
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        else:
            self.pos_embed = nn.Parameter(token_positions(length, width), requires_grad=False)  # 1 x L x D, fixed
        self.x_embedder = nn.Linear(channels, width)        # a token is a patch of size 1
        self.t_embedder, self.y_embedder = TimeEmbedder(width), LabelEmbedder(classes, width)
        self.blocks = nn.ModuleList(SiTBlock(width, heads, qk_norm, style) for _ in range(depth))
        self.final_layer = FinalLayer(width, channels, style)

        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        gates = [block.adaLN_modulation[1] for block in self.blocks]
        for m in (*gates, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(m.weight)  # each layer begins as the identity, the velocity as 0

    def forward(self, x, t, y):
        c = self.t_embedder(t) + self.y_embedder(y)         # B x D
        x = self.x_embedder(x)                              # B x L x D
        if not self.rope:
            x = x + self.pos_embed                          # B x L x D
        rope = (self.cos, self.sin) if self.rope else None
        for block in self.blocks:
            x = block(x, c, rope)                           # B x L x D
        return self.final_layer(x, c).float()               # B x L x H


# -------------------------------------------------------------------------------------------------
# Flow matching


@dataclass(frozen=True)
class Interpolant:
    """A path from data to noise: alpha and sigma of t, their derivatives, and the t of a noise level sigma / alpha."""
    coefficients: Callable  # t -> alpha, sigma, alpha', sigma'
    time_of: Callable  # level -> t


def cosine_coefficients(t):
    half_pi, t = math.pi / 2, torch.as_tensor(t)
    alpha, sigma = torch.cos(half_pi * t), torch.sin(half_pi * t)           # alpha^2 + sigma^2 = 1
    return alpha, sigma, -half_pi * sigma, half_pi * alpha


# To add a path: its line here
PATHS = {"linear": Interpolant(lambda t: (1 - t, t, 0 * t - 1, 0 * t + 1), lambda level: level / (1 + level)),
         "cosine": Interpolant(cosine_coefficients, lambda level: 2 / math.pi * torch.atan(level))}


def sample_timesteps(n: int, distribution: str, path: str, generator: torch.Generator) -> Tensor:
    """Training times: uniform, or such that the noise level sigma / alpha is exp(N(0, 1)) (lognormal)."""
    if distribution == "uniform":
        return torch.rand(n, generator=generator, device=generator.device)
    return lognormal_timesteps(torch.randn(n, generator=generator, device=generator.device), path)


def lognormal_timesteps(normal: Tensor, path: str) -> Tensor:
    return PATHS[path].time_of(normal.exp())


def velocity_loss(model, x, noise, t, y, path: str, cosine: float = 0.0) -> Tensor:
    """Squared error of the velocity at x_t = alpha x + sigma noise, mean over tokens and channels; B values.

    `cosine` weighs LightningDiT's second term: 1 - cosine similarity over the channels, mean over the tokens.
    """
    alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1, 1) for c in PATHS[path].coefficients(t))
    velocity = model(alpha * x + sigma * noise, t, y)       # B x L x H
    target = d_alpha * x + d_sigma * noise                  # B x L x H: the derivative of x_t
    loss = (velocity - target).square().mean((1, 2))        # B
    if cosine:
        loss = loss + cosine * (1 - F.cosine_similarity(velocity, target, dim=-1)).mean(1)
    return loss


# -------------------------------------------------------------------------------------------------
# Sampling. The state is float64, so that hundreds of small steps add up without rounding. The network is not


def guided_velocity(model, y: Tensor, scale: float = 1.0, low: float = 0.0, high: float = 1.0,
                    guide=None) -> Callable:
    """velocity(x, t, gate=t) with classifier-free guidance where low <= gate <= high: v_null + scale (v_class - v_null).

    With `guide` (autoguidance) a worse model, earlier or smaller, given the class, replaces the null branch. Outside the
    interval, and for scale <= 1, only the class branch is computed. The gate is the time at the start of a step also for
    Heun's second evaluation, as in the official sampler.
    """
    null = torch.full_like(y, model.null_class)             # B

    def velocity(x, t, gate=None):
        x, times = x.float(), y.new_full((len(x),), t, dtype=torch.float32)
        gate = t if gate is None else gate
        if scale <= 1 or not low <= gate <= high:
            return model(x, times, y).double()
        if guide is not None:
            v_class, v_null = model(x, times, y), guide(x, times, y)
        else:
            v_class, v_null = model(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, null])).chunk(2)
        return v_null.double() + scale * (v_class.double() - v_null.double())

    return velocity


def sample_ode(velocity: Callable, noise: Tensor, steps: int, heun: bool = False) -> Tensor:
    """Follow dx = v dt from t = 1 to 0 in equal steps: Euler, or Heun with an Euler step at the end."""
    x = noise.double()                                      # t = 1: nothing but noise
    for t, t_next in itertools.pairwise(np.linspace(1, 0, steps + 1)):
        v = velocity(x, t)                                  # points from data to noise
        if heun and t_next > 0:
            v = (v + velocity(x + (t_next - t) * v, t_next, gate=t)) / 2    # mean of the slopes at both ends
        x = x + (t_next - t) * v                            # t falls, so the step is against v
    return x


def sample_sde(velocity: Callable, noise: Tensor, steps: int, path: str, draw: Callable) -> Tensor:
    """Euler-Maruyama with diffusion g^2 = 2t: steps - 1 noisy steps from t = 1 to 0.04, then one without noise to 0.

    The score follows from the velocity, so guidance acts on the whole drift. draw(): N(0, 1) like x.
    """
    x = noise.double()                                      # t = 1: nothing but noise
    for t, t_next in itertools.pairwise([*np.linspace(1, 0.04, steps), 0.0]):
        dt = t_next - t                                     # negative
        v = velocity(x, t)
        alpha, sigma, d_alpha, d_sigma = (float(c) for c in PATHS[path].coefficients(t))
        ratio = alpha / d_alpha
        score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)      # gradient of log p_t(x)
        x = x + (v - t * score) * dt                        # drift; g^2 / 2 = t
        if t_next > 0:
            x = x + math.sqrt(2 * t * -dt) * draw().double()                # noise of variance g^2 |dt|
    return x


class ImageNoise:
    """Noise of samples number `index`, B x L x H: each has its own generator, a function of (seed, number)."""

    def __init__(self, index: Sequence[int], seed: int, shape: tuple[int, int], dist: Dist):
        self.shape, self.device = shape, dist.device
        self.generators = [Dist().generator(seed, "sampling noise", int(i)) for i in index]  # of the CPU

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


@dataclass(frozen=True)
class SamplerConfig:
    """How to sample: all that a result depends on besides the weights."""
    sampler: str = "heun"
    steps: int = 10
    guidance: float = 1.0
    low: float = 0.0
    high: float = 1.0
    seed: int = 0

    def nfe(self) -> int:
        """Network calls for one image; a guided call counts once."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps

    def nfe_with_guidance(self) -> int:
        """Network calls for one image; a guided call counts twice."""
        times = np.linspace(1, 0, self.steps + 1)[:-1]
        if self.sampler == "sde":
            times = np.linspace(1, 0.04, self.steps)
        calls = np.full(self.steps, 2 if self.sampler == "heun" else 1)
        calls[-1] = 1                                       # the last step of Heun is an Euler step
        guided = (self.guidance > 1) & (self.low <= times) & (times <= self.high)
        return int((calls * (1 + guided)).sum())


@torch.no_grad()
def generate(model: SiT, decode: Callable, index: Sequence[int], y: Tensor, sampling: SamplerConfig, path: str,
             dist: Dist, guide: SiT | None = None) -> Tensor:
    """Samples number `index` of classes y as uint8 B x 3 x S x S on the CPU. decode: normalised latents -> uint8."""
    draw = ImageNoise(index, sampling.seed, model.shape, dist)              # also the noise of the SDE's steps
    with dist.autocast():
        velocity = guided_velocity(model, y.to(dist.device), sampling.guidance, sampling.low, sampling.high, guide)
        if sampling.sampler == "sde":
            x = sample_sde(velocity, draw(), sampling.steps, path, draw)
        else:
            x = sample_ode(velocity, draw(), sampling.steps, heun=sampling.sampler == "heun")
    return decode(x.float()).cpu()


# -------------------------------------------------------------------------------------------------
# Latents of the whole data set, encoded once


def fingerprint(weights: dict[str, Tensor], parts: tuple[str, ...] = ("encoder.", "to_latent.")) -> str:
    """Hash of the weights whose names begin so; by default those of a tokenizer that decide the latents."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        if name.startswith(parts):
            digest.update(name.encode())
            digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class LatentSet:
    """Latents of a data set. rows: float16 n x 2 x L x H, the image and its mirror image; statistics per channel."""
    rows: Shards
    labels: Tensor
    mean: Tensor                                      # H
    std: Tensor

    def __post_init__(self) -> None:
        self.index = np.arange(len(self.labels))

    def view(self, rows: Tensor, mirror: Tensor) -> Tensor:
        """float16 B x 2 x L x H -> normalised float B x L x H: the image, or its mirror image."""
        x = torch.where(mirror[:, None, None], rows[:, 1], rows[:, 0])
        return (x.float() - self.mean) / self.std


@torch.no_grad()
def encode_dataset(tokenizer: Tokenizer, images: ImageSet, folder: Path, dist: Dist) -> LatentSet:
    """The latents of all images, in shards below `folder`; encoded by all processes, once."""
    def encode(start: int, stop: int) -> np.ndarray:
        x = images[np.arange(start, stop)]
        both = [encode_images(tokenizer, view, dist) for view in (x, x.flip(3))]
        return torch.stack(both, 1).cpu().numpy().astype(np.float16)

    made_of = {"tokenizer": fingerprint(tokenizer.state_dict()), "images": images.fingerprint, "precision": dist.precision}
    length = max(1, 500 * 128**2 // max(128, images.size) ** 2)
    rows = make_shards(folder, len(images), length, encode, made_of, dist, "encoding")

    total, squares, count = 0.0, 0.0, 0
    for array in rows.arrays:
        z = array.reshape(-1, array.shape[-1]).astype(np.float64)
        total, squares, count = total + z.sum(0), squares + (z**2).sum(0), count + len(z)
    mean = total / count
    std = np.sqrt(squares / count - mean**2).clip(min=1e-6)  # a constant channel does not divide by zero
    mean, std = (torch.tensor(x, dtype=torch.float32, device=dist.device) for x in (mean, std))
    return LatentSet(rows, images.labels, mean, std)


def latent_decoder(tokenizer: Tokenizer, mean: Tensor, std: Tensor, dist: Dist) -> Callable:
    """Normalised latents B x L x H -> uint8 images."""
    return lambda x: decode_images(tokenizer, x * std + mean, dist)


# -------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Config:
    """Settings of a run. Defaults = preset `quick`."""
    tokenizer: str = option("out/tokenizer/ckpt.pt", "checkpoint of tokenizer.py; it names the data, too", free=True)
    out: str = option("out/diffusion", "folder for ckpt.pt, latents/, log.jsonl, samples.png, metrics.json", free=True)
    width: int = option(192, "width D", least=1)
    depth: int = option(6, "layers", least=1)
    heads: int = option(3, "attention heads", least=1)
    style: str = option("sit", "sit, or lightning: RMSNorm, SwiGLU, QK norm and 1D RoPE as in LightningDiT",
                        ("sit", "lightning"))
    qk_norm: bool = False  # norm of queries and keys in style sit
    cosine_loss: float = 0.0  # weight of LightningDiT's cosine term
    path: str = option("linear", "interpolation between data and noise", tuple(PATHS))
    time: str = "lognormal"  # distribution of t in training; or uniform
    label_dropout: float = 0.1  # share of labels replaced by the null class
    steps: int = option(600, "training steps")
    batch_size: int = option(256, "latents a step, over all processes", least=1)
    micro_batch: int = option(0, "most latents that a process puts through at once; 0: all of its share", free=True)
    optimizer: str = option("muon", "muon: for the matrices inside blocks, AdamW for the rest; adamw: for all",
                            ("adamw", "muon"))
    lr: float = option(1e-3, "peak learning rate of AdamW")
    muon_lr: float = 1e-2
    beta2: float = 0.99
    weight_decay: float = 0.0
    warmup: int = 50  # steps
    schedule: str = "cosine"  # after the warm-up; or constant, linear
    clip: float = 1.0  # largest gradient norm; 0: any
    ema: float = 0.998  # decay of the weight average
    sampler: str = option("heun", "solver of previews and evaluation", ("euler", "heun", "sde"), free=True)
    sampling_steps: int = option(10, "its steps", least=1, free=True)
    guidance: float = option(2.0, "its guidance scale; 1: none", least=1, free=True)
    guidance_low: float = 0.0
    guidance_high: float = option(0.75, "guidance acts where t <= this; t = 1 is noise", free=True)
    samples: int = option(2000, "images sampled for the evaluation after training; 0: none", free=True)
    log_every: int = 200
    preview_every: int = 400  # samples.png
    save_every: int = option(500, "steps between checkpoints; a kill costs the steps since the last", least=1, free=True)
    keep_every: int = option(0, "steps between models kept as step-N.pt, for autoguidance; 0: none", free=True)
    seed: int = option(0, "seed of all random numbers")
    compile: bool = option(torch.cuda.is_available(), "torch.compile the model (a CPU needs a C++ compiler)", free=True)
    precision: str = option("auto", "of matrix products; auto: bf16 where the hardware multiplies it",
                            ("auto", "fp32", "bf16"), free=True)

    def check(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"--width {self.width} must be a multiple of twice the --heads {self.heads}")
        if not self.guidance_low <= self.guidance_high <= 1:
            raise ValueError("--guidance-high must lie between 0 and 1")

    def build_sit(self, shape: Sequence[int], classes: int) -> SiT:
        return SiT(*shape, classes, self.width, self.depth, self.heads, self.qk_norm, self.style)


SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}  # width, depth, heads
PRESETS = {"quick": {}}  # the others: the paper's Tables 8 and 9
for size, (width, depth, heads) in SIZES.items():
    PRESETS[f"sit-{size}"] = {
        "width": width, "depth": depth, "heads": heads, "steps": 4_000_000, "batch_size": 256,
        "optimizer": "adamw", "lr": 1e-4, "beta2": 0.999, "schedule": "constant", "warmup": 0, "ema": 0.9999,
        "sampler": "sde", "sampling_steps": 250, "guidance": 1.9, "samples": 50_000,
        "save_every": 2000, "preview_every": 10_000}
    PRESETS[f"lightning-{size}"] = PRESETS[f"sit-{size}"] | {
        "style": "lightning", "cosine_loss": 1.0, "steps": 400_000, "batch_size": 1024, "lr": 2e-4, "beta2": 0.95,
        "sampler": "euler", "guidance": 1.8}


def train(cfg: Config, dist: Dist, latents: LatentSet, meta: dict, preview: Callable, state: dict | None) -> SiT:
    """Flow matching with dropped labels. Returns the averaged model. `meta` goes into the checkpoints."""
    torch.manual_seed(cfg.seed)
    model = cfg.build_sit(meta["shape"], len(meta["classes"])).to(dist.device)
    params = [p for p in model.parameters() if p.requires_grad]
    ema, optimizers = Ema(model, cfg.ema), make_optimizers(model, cfg)
    start = restore(state, model, ema, optimizers) if state else 0

    net = dist.wrap(model, cfg.compile)                     # DDP: averages gradients over processes
    loader, mine = Loader(latents, cfg.batch_size, cfg.seed, dist), dist.local_slice(cfg.batch_size)
    log = Log(cfg, dist, "diffusion", start, cfg.steps, loader)
    example = torch.zeros(1, *meta["shape"]), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    log.count_flops(model, *example)
    edges, quarters = torch.tensor([0.25, 0.5, 0.75], device=dist.device), torch.arange(4, device=dist.device)

    for step in range(start, cfg.steps):
        x, y = loader(step)                                 # B x L x H, B

        # Time, noise and dropped labels, drawn for the global batch
        generator = dist.generator(cfg.seed, "training noise", step)
        t = sample_timesteps(cfg.batch_size, cfg.time, cfg.path, generator)[mine]
        drop = torch.rand(cfg.batch_size, generator=generator, device=x.device)[mine] < cfg.label_dropout
        noise = torch.randn(cfg.batch_size, *x.shape[1:], generator=generator, device=x.device)[mine]
        y = torch.where(drop, model.null_class, y)          # teaches the null branch of guidance

        losses = []
        for micro in dist.micro_batches(net, len(x), cfg.micro_batch):
            with dist.autocast():
                loss = velocity_loss(net, x[micro], noise[micro], t[micro], y[micro], cfg.path, cfg.cosine_loss)
            (loss.sum() / len(x)).backward()                # mean over this process's rows
            losses.append(loss.detach())                    # B values over all pieces

        lr_scale = set_lr(optimizers, step, cfg.steps, cfg)
        grad_norm = nn.utils.clip_grad_norm_(params, cfg.clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(step)                                    # samples come from the average

        # The loss, and the loss in each quarter of [0, 1]: flow matching is hard in the middle
        loss = torch.cat(losses)
        terms = {"loss": loss.mean(), "grad": grad_norm}
        in_quarter = (torch.bucketize(t, edges)[:, None] == quarters).float()       # B x 4
        for k, name in enumerate(("t<.25", "t<.5", "t<.75", "t<1")):
            terms[name] = ((loss * in_quarter[:, k]).sum(), in_quarter[:, k].sum())
        log.add(lr_scale, **terms)

        last = step + 1 == cfg.steps
        keeping = cfg.keep_every and (step + 1) % cfg.keep_every == 0
        saving = last or (step + 1) % cfg.save_every == 0
        if saving or keeping or (step + 1) % cfg.log_every == 0:
            log.write(step + 1)  # ends the run if a term is not finite, before it is saved
        checkpoint = {"kind": "diffusion", "config": dataclasses.asdict(cfg), "step": step + 1, **meta}
        if keeping:
            dist.save(Path(cfg.out) / f"step-{step + 1}.pt", checkpoint | {"ema": ema.model.state_dict()})
        if saving:
            dist.save(Path(cfg.out) / "ckpt.pt", checkpoint | {
                "model": model.state_dict(), "ema": ema.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
        if dist.is_main and (last or (step + 1) % cfg.preview_every == 0):
            preview(ema.model)
    return ema.model


# -------------------------------------------------------------------------------------------------
# Loading, evaluation and main


def load_diffusion(path: str | Path, device: torch.device) -> tuple[SiT, Config, dict]:
    """The averaged model of a checkpoint, its settings, and what is stored with it (mean, std, classes, ...)."""
    state = load_checkpoint(path, "diffusion")
    with reading(path, "a diffusion model of this code"):
        cfg = Config(**state["config"])
        model = cfg.build_sit(state["shape"], len(state["classes"]))
        model.load_state_dict(state["ema"])
        if not all(np.isfinite(state[name]).all() and len(state[name]) == model.shape[1] for name in ("mean", "std")):
            raise ValueError("the statistics of its latents are damaged")
    return model.to(device).eval().requires_grad_(False), cfg, state


def from_official(weights: dict[str, Tensor], heads: int = 0, path: str | Path = "the state dict") -> SiT:
    """The state dict of a released 1-D SiT. Heads default to those of the released sizes."""
    with reading(path, "a released SiT"):
        rows, width = weights["y_embedder.embedding_table.weight"].shape
        channels = weights["x_embedder.weight"].shape[1]
        length = weights["pos_embed"].shape[1]
        depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
        heads = heads or {w: h for w, _, h in SIZES.values()}.get(width, max(1, width // 64))
        with torch.device("meta"):
            model = SiT(length, channels, rows - 1, width, depth, heads, "blocks.0.attn.q_norm.weight" in weights)
        model.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)


def load_official(path: str, tokenizer: str, device: torch.device) -> tuple[SiT, Config, dict]:
    """A released SiT (folder or file), as load_diffusion gives a model of ours.

    The statistics of its latents come from the tokenizer that `tokenizer.py --from-official` converted.
    """
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    heads, about = 0, file.with_name("config.json")
    if about.exists():
        with reading(about, "the config of a released SiT"):
            heads = int(json.loads(about.read_text()).get("num_heads") or 0)
    model = from_official(read_weights(file), heads, file)

    state = load_checkpoint(tokenizer, "tokenizer")
    with reading(tokenizer, "a tokenizer converted with the config.json that was released beside it"):
        statistics = {name: [state["latent_statistics"][name]] * model.shape[1] for name in ("mean", "std")}
    meta = statistics | {
        "classes": [str(c) for c in range(model.null_class)], "shape": list(model.shape), "size": state["config"]["size"],
        "data": "", "step": 0, "tokenizer_weights": fingerprint(state["ema"])}
    # Nothing published says which path the released models were trained on. Their demos sample with the cosine path
    return model.to(device), Config(tokenizer=tokenizer, path="cosine"), meta


def evaluate(cfg: Config, dist: Dist, model: SiT, tokenizer: Tokenizer, decode: Callable, images: ImageSet,
             sampling: SamplerConfig, meta: dict) -> dict:
    """Upper bound: real and reconstructed validation images. Lower bound: decoded noise. Between them the samples."""
    n, classes = cfg.samples, len(images.classes)
    y = torch.arange(n) % classes
    val = ImageSet(meta["data"], meta["size"], "val")
    classifier_fd = ClassifierFD(images, val, dist)
    samples = LazyImages(n, lambda i: generate(model, decode, i, y[i], sampling, cfg.path, dist))
    noise = LazyImages(n, lambda i: decode(ImageNoise(i, cfg.seed, model.shape, dist)()))
    recons = LazyImages(len(val), lambda i: reconstruct(tokenizer, val[i], dist))

    rows = {}
    rows["samples"], sample_moments = classifier_fd.score(samples, y)
    rows["decoded noise"], _ = classifier_fd.score(noise, y)
    rows["reconstructed validation images"], recon_moments = classifier_fd.score(recons, val.labels)
    rows["real validation images"] = classifier_fd.reference
    rows["samples"]["fd_to_reconstructions"] = frechet_distance(*sample_moments, *recon_moments)  # without decoder error
    for name, row in rows.items():
        dist.print(f"{name:32s} N={row['images']:<6d} fd_classifier {row['fd_classifier']:8.3f}   "
                   f"recognised by class {row['class_accuracy']:6.1%}")
    return rows


def main(cfg: Config, dist: Dist) -> None:
    began = time.time()
    tokenizer, tok = load_tokenizer(cfg.tokenizer, dist.device)
    images = dist.rank0_first(lambda: ImageSet(tok.data, tok.size, "train"))
    tokenizer_weights = fingerprint(tokenizer.state_dict())
    out = dist.make_out_dir(cfg.out, cfg, {"tokenizer_weights": tokenizer_weights, "images": images.fingerprint})

    latents = encode_dataset(tokenizer, images, out / "latents", dist)
    meta = {"mean": latents.mean.tolist(), "std": latents.std.tolist(), "classes": images.classes, "data": tok.data,
            "size": tok.size, "shape": [tok.tokens()[1], tok.channels], "tokenizer_weights": tokenizer_weights}
    dist.print(f"latents of {len(images)} images: {meta['shape'][0]} x {meta['shape'][1]}, "
               f"std {min(meta['std']):.2f} to {max(meta['std']):.2f}")

    state = None
    if (out / "ckpt.pt").exists():  # the run goes on from there
        state = load_checkpoint(out / "ckpt.pt", "diffusion")
        dist.print(f"continuing {out / 'ckpt.pt'} at step {state['step']}, saved by {state['commit']}")

    decode, classes = latent_decoder(tokenizer, latents.mean, latents.std, dist), len(images.classes)
    guidance = cfg.guidance if classes > 1 and cfg.label_dropout else 1.0  # else there is no null class
    sampling = SamplerConfig(cfg.sampler, cfg.sampling_steps, guidance, cfg.guidance_low, cfg.guidance_high, cfg.seed)

    def preview(model: SiT) -> None:
        columns = min(classes, 10)
        y = torch.arange(columns).repeat(8)
        names = tuple(images.classes[c] for c in range(columns)) if classes > 1 else ()
        grid = generate(model, decode, range(len(y)), y, sampling, cfg.path, dist)
        save_grid(out / "samples.png", grid, columns, names)

    model = train(cfg, dist, latents, meta, preview, state)
    rows = {}
    if cfg.samples and classes > 1:
        rows = evaluate(cfg, dist, model, tokenizer, decode, images, sampling, meta)
    elif cfg.samples:
        dist.print("one class only: fd_classifier is not available; look at samples.png")
    dist.save(out / "metrics.json", {
        "rows": rows, "sampling": dataclasses.asdict(sampling), "labels": "balanced", "features": "classifier",
        "against": f"{len(images)} training images of {meta['data']}", "steps": cfg.steps, "seed": cfg.seed,
        "precision": dist.precision, "seconds": round(time.time() - began)})
    dist.print(f"wrote {cfg.out}/ckpt.pt, samples.png, metrics.json in {time.time() - began:.0f} s")
    dist.barrier()


if __name__ == "__main__":
    launch(main, Config, PRESETS, __doc__)
