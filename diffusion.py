"""SiT: a flow-matching transformer on the tokenizer's latents (arXiv 2401.08740; MAETok Sec. 4).

    torchrun diffusion.py                                # encodes the data once, trains -> out/diffusion/

A latent x is one row of L tokens with H channels, normalised; eps is Gaussian noise of the same shape. Time t runs from
0 (data) to 1 (noise): x_t = alpha x + sigma eps, and the network learns the velocity v = alpha' x + sigma' eps, on the
linear path eps - x. Sampling follows v from t = 1 to t = 0.
"""
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import (
    LOAD_ERRORS,
    Chunks,
    Common,
    Ema,
    Images,
    Log,
    Run,
    batch_indices,
    bench,
    commit,
    double,
    fail,
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
    read_json,
    read_weights,
    resume,
    save_checkpoint,
    save_grid,
    setting,
    start,
    to_device,
    to_float,
    to_uint8,
    write_json,
)
from fid import Judge, Made, frechet_distance
from tokenizer import Attention, Mlp, Tokenizer, load_tokenizer, reconstruct, restore


@dataclass
class Config(Common):
    """Defaults are the preset `quick`."""
    tokenizer: str = setting("out/tokenizer/ckpt.pt", "checkpoint of tokenizer.py; it also names the data and the size")
    out: str = setting("out/diffusion", "folder for ckpt.pt, latents/, log.jsonl, samples.png, metrics.json")
    width: int = setting(192, "width D", least=1)
    depth: int = setting(6, "layers", least=1)
    heads: int = setting(3, "attention heads", least=1)
    style: str = setting("sit", "sit, or lightning: RMSNorm, SwiGLU, QK norm and 1D RoPE as in LightningDiT",
                         ("sit", "lightning"))
    qk_norm: bool = setting(False, "normalise queries and keys of the style sit")
    cosine_loss: float = setting(0.0, "weight of 1 - cosine of predicted and true velocity (LightningDiT)")
    path: str = setting("linear", "interpolation between data and noise", ("linear", "cosine"))
    time: str = setting("lognormal", "distribution of t in training", ("lognormal", "uniform"))
    label_dropout: float = setting(0.1, "share of labels replaced by the null class in training")
    steps: int = setting(600, "training steps")
    batch_size: int = setting(256, "latents per step, over all processes", least=1)
    micro_batch: int = setting(0, "most latents a process puts through at once; 0: all of its share")
    recompute: bool = setting(False, "keep only the input of each layer for the backward pass: less memory, a third "
                              "more work")
    optimizer: str = setting("muon", "muon for the matrices inside blocks and adamw for the rest, or adamw for all",
                             ("adamw", "muon"))
    lr: float = setting(1e-3, "peak learning rate of AdamW")
    muon_lr: float = setting(1e-2, "peak learning rate of Muon")
    beta2: float = setting(0.99, "second beta of AdamW")
    weight_decay: float = setting(0.0, "weight decay")
    schedule: str = setting("cosine", "learning rate after the warm-up", ("constant", "cosine", "linear"))
    warmup: int = setting(50, "steps of linear warm-up")
    clip: float = setting(1.0, "largest gradient norm; 0: no clipping")
    ema: float = setting(0.998, "decay of the weight average")
    skip_nonfinite: int = setting(0, "steps with a gradient that is not finite to pass over before the run is stopped; "
                                  "above 0 each step waits for the device")
    sampler: str = setting("heun", "solver for previews and the evaluation", ("euler", "heun", "sde"))
    sampling_steps: int = setting(10, "its steps", least=1)
    guidance: float = setting(2.0, "its guidance scale; 1: none", least=1)
    guidance_low: float = setting(0.0, "guidance acts where guidance_low <= t")
    guidance_high: float = setting(0.75, "... and t <= guidance_high")
    samples: int = setting(2000, "images sampled for the evaluation after training; 0: none")
    log_every: int = setting(200, "steps between lines of the log", least=1)
    save_every: int = setting(500, "steps between checkpoints", least=1)
    preview_every: int = setting(400, "steps between previews in samples.png", least=1)
    keep_every: int = setting(0, "steps between averaged models kept as step-N.pt, for autoguidance; 0: none")
    bench: int = setting(0, "measure so many training steps, write bench/bench.json and stop")

    def check(self):
        if self.width % (2 * self.heads):
            raise ValueError(f"--width {self.width} must be a multiple of twice the --heads {self.heads}")
        if not self.guidance_low <= self.guidance_high <= 1:
            raise ValueError("0 <= --guidance-low <= --guidance-high <= 1 is needed")


SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
PRESETS = {"quick": {}}                                  # the others: the paper's Tables 8 and 9
for name, (width, depth, heads) in SIZES.items():
    PRESETS[f"sit-{name}"] = {
        "width": width, "depth": depth, "heads": heads, "steps": 4_000_000, "batch_size": 256, "optimizer": "adamw",
        "lr": 1e-4, "beta2": 0.999, "weight_decay": 0.0, "schedule": "constant", "warmup": 0, "ema": 0.9999,
        "sampler": "sde", "sampling_steps": 250, "guidance": 1.9, "guidance_high": 0.75, "samples": 50_000,
        "save_every": 10_000, "preview_every": 10_000}
    PRESETS[f"lightning-{name}"] = PRESETS[f"sit-{name}"] | {
        "style": "lightning", "cosine_loss": 1.0, "steps": 400_000, "batch_size": 1024, "lr": 2e-4, "beta2": 0.95,
        "sampler": "euler", "guidance": 1.8}

# ---------------------------------------------------------------------------------------------------------------------
# The network


def sinusoid(x: torch.Tensor, width: int) -> torch.Tensor:
    """cos and sin of x at `width`/2 frequencies from 1 down to 1/10000, cosines first: x is t in [0, 1], unscaled."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=x.device) / (width // 2))
    angles = x.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


def token_positions(length: int, width: int) -> torch.Tensor:
    """1 x L x D table of sines (even channels) and cosines (odd ones) of the token's number."""
    angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, width, 2).double() / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[None].float()


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class SwiGlu(nn.Module):
    """The gated MLP of LightningDiT; two thirds of the width make it as large as the plain one."""

    def __init__(self, width: int):
        super().__init__()
        hidden = 8 * width // 3
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
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
        qk = norm if style == "lightning" else nn.LayerNorm if qk_norm else nn.Identity
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = Attention(width, heads, qk)
        self.mlp = SwiGlu(width) if style == "lightning" else Mlp(width, "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int, style: str):
        super().__init__()
        self.norm = make_norm(style)(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(self.norm(x), shift, scale))


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(sinusoid(t, 256))


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class SiT(nn.Module):
    """Velocity of latents x (B x L x H) at times t (B, in [0, 1]) for classes y (B, in 0..K; K is the null class).

    Parameters bear the names of the released checkpoints. The style lightning turns queries and keys by the token's
    number (RoPE) in place of the table of positions.
    """

    def __init__(self, length: int, channels: int, classes: int, width: int, depth: int, heads: int, qk_norm=False,
                 style: str = "sit", recompute: bool = False):
        super().__init__()
        self.shape, self.null, self.rope, self.recompute = (length, channels), classes, style == "lightning", recompute
        if self.rope:
            d = width // heads
            angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, d, 2) / d)        # L x d/2
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        else:
            self.pos_embed = nn.Parameter(token_positions(length, width), requires_grad=False)
        self.x_embedder = nn.Linear(channels, width)
        self.t_embedder, self.y_embedder = TimeEmbedder(width), LabelEmbedder(classes, width)
        self.blocks = nn.ModuleList(SiTBlock(width, heads, qk_norm, style) for _ in range(depth))
        self.final_layer = FinalLayer(width, channels, style)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        for m in (*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1],
                  self.final_layer.linear):
            nn.init.zeros_(m.weight)

    def forward(self, x, t, y):
        c = self.t_embedder(t) + self.y_embedder(y)                                   # B x D
        x = self.x_embedder(x) + (0 if self.rope else self.pos_embed)                 # B x L x D
        rope = (self.cos, self.sin) if self.rope else None
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, c, rope, use_reentrant=False)
            else:
                x = block(x, c, rope)
        return self.final_layer(x, c).float()                                         # B x L x H


def forward_flops(length: int, channels: int, width: int, depth: int, style: str = "sit") -> int:
    """FLOPs of one network call for one image (2 per multiply-add of a matrix product)."""
    mlp = 6 * width * (8 * width // 3) if style == "lightning" else 16 * width**2
    layer = length * (8 * width**2 + mlp) + 4 * length**2 * width + 12 * width**2
    return depth * layer + 4 * length * channels * width + 2 * (256 * width + width**2) + 4 * width**2


def from_official(weights: dict[str, torch.Tensor], heads: int = 0) -> SiT:
    """The state dict of a released 1-D SiT; nothing is folded away. Heads default to those of the released sizes."""
    try:
        (rows, width), (_, channels) = (weights[k].shape for k in ("y_embedder.embedding_table.weight",
                                                                   "x_embedder.weight"))
        length = weights["pos_embed"].shape[1]
    except KeyError as error:
        fail(f"not a released SiT: {error} is missing")
    depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    heads = heads or {w: h for w, _, h in SIZES.values()}.get(width, max(1, width // 64))
    with torch.device("meta"):
        model = SiT(length, channels, rows - 1, width, depth, heads, "blocks.0.attn.q_norm.weight" in weights)
    load_strictly(model, {k: v.float() for k, v in weights.items()}, "a released SiT")
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching


def interpolant(t, path: str):
    """alpha, sigma and their derivatives at t, for a tensor or a number."""
    if path == "linear":
        return 1 - t, t, 0 * t - 1, 0 * t + 1
    half_pi, t = math.pi / 2, torch.as_tensor(t)
    alpha, sigma = torch.cos(half_pi * t), torch.sin(half_pi * t)
    return alpha, sigma, -half_pi * sigma, half_pi * alpha


def draw_times(n: int, distribution: str, path: str, generator: torch.Generator) -> torch.Tensor:
    """Training times: uniform, or the log-normal noise level sigma/alpha = exp(N(0, 1)) expressed as t."""
    if distribution == "uniform":
        return torch.rand(n, generator=generator, device=generator.device)
    return lognormal_times(torch.randn(n, generator=generator, device=generator.device), path)


def lognormal_times(normal: torch.Tensor, path: str) -> torch.Tensor:
    level = normal.exp()
    return level / (1 + level) if path == "linear" else 2 / math.pi * torch.atan(level)


def velocity_loss(model, x, noise, t, y, path: str, cosine: float = 0.0) -> torch.Tensor:
    """Squared error of the velocity at x_t = alpha x + sigma noise, mean over tokens and channels; one per sample.

    `cosine` weighs LightningDiT's second term, 1 - cosine similarity over the channels, mean over the tokens.
    """
    alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1, 1) for c in interpolant(t, path))
    velocity, target = model(alpha * x + sigma * noise, t, y), d_alpha * x + d_sigma * noise
    loss = (velocity - target).square().mean((1, 2))
    return loss + cosine * (1 - F.cosine_similarity(velocity, target, dim=-1)).mean(1) if cosine else loss


# ---------------------------------------------------------------------------------------------------------------------
# Sampling. The state is float64, so that hundreds of small steps add up without rounding; the network is not.


def guided_velocity(model, y: torch.Tensor, scale: float = 1.0, low: float = 0.0, high: float = 1.0, guide=None):
    """velocity(x, t, gate=t) with classifier-free guidance where low <= gate <= high: v_null + scale (v_class - v_null)

    With `guide`, autoguidance: a worse model, earlier or smaller, given the class, stands in for the null branch.
    Outside the interval, and for scale <= 1, only the class branch is computed. The gate is the time at the start of
    the step also for Heun's second evaluation, as in the official sampler.
    """
    null = torch.full_like(y, model.null)

    def velocity(x, t, gate=None):
        x, times = x.float().to(y.device), y.new_full((len(x),), t, dtype=torch.float32)
        if scale <= 1 or not low <= (t if gate is None else gate) <= high:
            return double(model(x, times, y))
        if guide is not None:
            without = double(guide(x, times, y))
            return without + scale * (double(model(x, times, y)) - without)
        v = double(model(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, null])))
        with_class, without = v.chunk(2)
        return without + scale * (with_class - without)

    return velocity


def sample_ode(velocity, noise: torch.Tensor, steps: int, heun: bool = False) -> torch.Tensor:
    """Follow dx = v dt from t = 1 to 0 in equal steps: Euler, or Heun with a plain last step (2*steps - 1 calls)."""
    times = np.linspace(1, 0, steps + 1)
    x = double(noise)
    for t, following in itertools.pairwise(times):
        v = velocity(x, t)
        if heun and following > 0:
            v = (v + velocity(x + (following - t) * v, following, gate=t)) / 2
        x = x + (following - t) * v
    return x


def sample_sde(velocity, noise: torch.Tensor, steps: int, path: str, draw) -> torch.Tensor:
    """Euler-Maruyama with diffusion g^2 = 2t: steps - 1 noisy steps from t = 1 to 0.04, then one without noise to 0.

    The score follows from the velocity; guidance, being inside it, acts on the whole drift. draw(): N(0, 1) like x.
    """
    times = np.append(np.linspace(1, 0.04, steps), 0.0)
    x = double(noise)
    for t, following in itertools.pairwise(times):
        dt = following - t
        v = velocity(x, t)
        alpha, sigma, d_alpha, d_sigma = (float(c) for c in interpolant(t, path))
        ratio = alpha / d_alpha
        score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)
        x = x + (v - t * score) * dt
        if following > 0:
            x = x + math.sqrt(2 * t * -dt) * double(draw())
    return x


class ImageNoise:
    """Noise of samples number `index`, each from a generator of its own, a function of (seed, number): B x L x H."""

    def __init__(self, index, seed: int, shape: tuple[int, int], device: torch.device):
        self.shape, self.device = shape, device
        seeds = (int(np.random.SeedSequence([seed, 6, int(i)]).generate_state(1, np.uint64)[0] >> 1) for i in index)
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]

    def __call__(self) -> torch.Tensor:
        return to_device(torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]), self.device)


@dataclass
class Sampling:
    """How to sample; everything a result depends on besides the weights."""
    sampler: str = "heun"
    steps: int = 10
    guidance: float = 1.0
    low: float = 0.0
    high: float = 1.0
    seed: int = 0

    def calls(self) -> int:
        """Network calls for one image, a guided one counted once."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps

    def evaluations(self) -> int:
        """Network calls for one image, a guided one counted twice: what sampling costs."""
        times = np.linspace(1, 0.04, self.steps) if self.sampler == "sde" else np.linspace(1, 0, self.steps + 1)[:-1]
        calls = np.full(self.steps, 2 if self.sampler == "heun" else 1)
        calls[-1] = 1
        guided = (self.guidance > 1) & (self.low <= times) & (times <= self.high)
        return int((calls * (1 + guided)).sum())


@torch.no_grad()
def generate(model: SiT, decode, index, y, how: Sampling, path: str, run: Run, guide=None) -> torch.Tensor:
    """uint8 images number `index` of classes y, through `decode` (normalised latents -> images in [-1, 1])."""
    draw = ImageNoise(index, how.seed, model.shape, run.device)
    with run.autocast():
        velocity = guided_velocity(model, y.to(run.device), how.guidance, how.low, how.high, guide)
        if how.sampler == "sde":
            x = sample_sde(velocity, draw(), how.steps, path, draw)
        else:
            x = sample_ode(velocity, draw(), how.steps, heun=how.sampler == "heun")
        return to_uint8(decode(x.float().to(run.device))).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Latents of the whole data set, encoded once


def fingerprint(weights: dict[str, torch.Tensor], parts=("encoder.", "to_latent.")) -> str:
    """Hash of the weights whose names begin so: by default those of a tokenizer that decide the latents."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        if name.startswith(parts):
            digest.update(name.encode())
            digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_data(tokenizer: Tokenizer, images: Images, folder: Path, run: Run, chunk: int = 500) -> dict:
    """Write latents.npy (n x 2 x L x H float16: the image and its mirror image), labels.npy and meta.json with the
    statistics; return meta. Shared out over the processes, continued where it was cut, refused if of other things.
    """
    belongs = {"tokenizer": fingerprint(tokenizer.state_dict()), "data": images.fingerprint, "images": len(images)}
    meta = folder / "meta.json"
    started = folder / "belongs.json"
    if run.main:
        folder.mkdir(parents=True, exist_ok=True)
        if started.exists() and read_json(started) != belongs:
            fail(f"{folder} holds latents of another tokenizer, size or data set; remove it or give another --out")
        write_json(started, belongs)
    run.barrier()
    if not meta.exists():
        one = tokenizer.encode(to_float(images[np.arange(1)].to(run.device)))
        shape = (len(images), 2, *one.shape[1:])
        chunks = Chunks(folder / "latents.npy", shape, np.float16, chunk, run, "encoding")
        for i, j in chunks:
            x = to_float(images[np.arange(i, j)].to(run.device))
            with run.autocast():
                both = torch.stack([tokenizer.encode(view) for view in (x, x.flip(3))], 1)
            chunks.write(i, both.float().cpu().numpy())
        latents = chunks.array
        if run.main:
            total, squares = 0.0, 0.0
            for i in range(0, len(latents), 4096):
                z = latents[i:i + 4096].astype(np.float64).reshape(-1, latents.shape[-1])
                total, squares = total + z.sum(0), squares + (z**2).sum(0)
            count = latents.size / latents.shape[-1]
            mean = total / count
            std = np.sqrt(squares / count - mean**2)
            np.save(folder / "labels.npy", images.labels.numpy())
            write_json(meta, belongs | {"mean": mean.tolist(), "std": std.tolist()})
        run.barrier()
    return read_json(meta, "mean", "std", "tokenizer")


class LatentBatches:
    """`batches(step)`: this process's rows of the global batch, normalised, image or mirror image; and labels."""

    def __init__(self, folder: Path, mean, std, cfg: Config, run: Run):
        try:
            latents, labels = np.load(folder / "latents.npy", mmap_mode="r"), np.load(folder / "labels.npy")
        except LOAD_ERRORS as error:
            fail(f"{folder} is damaged ({in_a_line(error)}); remove it and run again")
        self.latents, self.waited = latents, 0.0
        if run.device.type != "cuda" or latents.nbytes < torch.cuda.mem_get_info(run.device)[0] / 3:
            self.latents = torch.from_numpy(np.array(latents)).to(run.device)
        self.labels = torch.from_numpy(labels)
        self.mean, self.std, self.cfg, self.run = mean, std, cfg, run

    def indices(self, step: int) -> np.ndarray:
        """Numbers of the images in the global batch."""
        return batch_indices(len(self.labels), self.cfg.batch_size, self.cfg.seed, step)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        start, cfg = time.perf_counter(), self.cfg
        rows = self.run.rows(cfg.batch_size)
        index = self.indices(step)[rows]
        side = np.random.default_rng([cfg.seed, 2, step]).integers(0, 2, cfg.batch_size)[rows]
        device = self.run.device
        if isinstance(self.latents, torch.Tensor):
            x = self.latents[to_device(torch.from_numpy(index), device), to_device(torch.from_numpy(side), device)]
        else:
            x = to_device(torch.from_numpy(self.latents[index, side]), device)
        self.waited += time.perf_counter() - start
        return (x.float() - self.mean) / self.std, to_device(self.labels[index], device)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def build(cfg: Config, shape, classes: int) -> SiT:
    return SiT(*shape, classes, cfg.width, cfg.depth, cfg.heads, cfg.qk_norm, cfg.style, cfg.recompute)


def train(cfg: Config, run: Run, folder: Path, facts: dict, preview, state: dict | None) -> SiT:
    """Flow matching with dropped labels; returns the averaged model."""
    torch.manual_seed(cfg.seed)
    mean, std = (torch.tensor(facts[name], device=run.device) for name in ("mean", "std"))
    batches = LatentBatches(folder, mean, std, cfg, run)
    model = build(cfg, facts["shape"], len(facts["classes"])).to(run.device)
    ema, optimizers, done = Ema(model, cfg.ema), make_optimizers(model, cfg), 0
    if state:
        done = restore(state, model, ema, optimizers)
    parallel, params = run.parallel(model, cfg.compile), [p for p in model.parameters() if p.requires_grad]
    log = Log(run, cfg, "diffusion", done, cfg.steps, batches)
    edges, quarters = torch.tensor([0.25, 0.5, 0.75], device=run.device), torch.arange(4, device=run.device)
    for step in range(done, cfg.steps):
        x, y = batches(step)
        generator, rows = run.generator(cfg.seed, 7, step), run.rows(cfg.batch_size)
        t = draw_times(cfg.batch_size, cfg.time, cfg.path, generator)[rows]
        drop = torch.rand(cfg.batch_size, generator=generator, device=run.device)[rows] < cfg.label_dropout
        noise = torch.randn(cfg.batch_size, *x.shape[1:], generator=generator, device=run.device)[rows]
        y = torch.where(drop, model.null, y)
        losses = []
        for part in micro_batches(parallel, len(x), cfg.micro_batch):
            with run.autocast():
                loss = velocity_loss(parallel, x[part], noise[part], t[part], y[part], cfg.path, cfg.cosine_loss)
            (loss.sum() / len(x)).backward()
            losses.append(loss.detach())
        loss = torch.cat(losses)
        terms = {"loss": loss.mean()}
        in_bin = (torch.bucketize(t, edges)[:, None] == quarters).float()             # B x 4: which quarter of [0, 1]
        for k, name in enumerate(("t<.25", "t<.5", "t<.75", "t<1")):
            terms[name] = ((loss * in_bin[:, k]).sum(), in_bin[:, k].sum())
        rate = learning_rate(step, cfg.steps, cfg.warmup, cfg.schedule)
        terms["grad"], taken = optimizer_step(optimizers, params, rate, cfg.clip, cfg.skip_nonfinite)
        if taken:
            ema.update(step)
        save = log(step + 1, rate, taken, **terms)
        averaged = {"kind": "diffusion", "config": dataclasses.asdict(cfg), "step": step + 1, **facts}
        if run.main and save and cfg.keep_every and (step + 1) % cfg.keep_every == 0:
            save_checkpoint(Path(cfg.out) / f"step-{step + 1}.pt", averaged | {"ema": ema.model.state_dict()})
        if run.main and save:
            save_checkpoint(Path(cfg.out) / "ckpt.pt", averaged | {
                "ema": ema.model.state_dict(), "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers]})
        if save:
            run.leave_if_asked(step + 1 == cfg.steps)
        if run.main and ((step + 1) % cfg.preview_every == 0 or step + 1 == cfg.steps):
            preview(ema.model)
    return ema.model


def load_diffusion(path: str | Path, device: torch.device) -> tuple[SiT, Config, dict]:
    """The averaged model of a checkpoint, its config, and the facts stored with it (mean, std, classes, ...)."""
    state = load_checkpoint(path, "diffusion")
    try:
        cfg = Config(**state["config"])
        cfg.check()
        model = build(cfg, state["shape"], len(state["classes"]))
        load_strictly(model, state["ema"], f"the model that {path} says it is")
        if not all(np.isfinite(state[name]).all() and len(state[name]) == model.shape[1] for name in ("mean", "std")):
            raise ValueError("the statistics of its latents are damaged")
    except LOAD_ERRORS as error:
        fail(f"{path} is not a diffusion model of this code ({in_a_line(error)})")
    return model.to(device).eval().requires_grad_(False), cfg, state


def load_official(path: str, tokenizer: str, device: torch.device) -> tuple[SiT, Config, dict]:
    """A released SiT (folder or file) and the facts that load_diffusion gives; the statistics of its latents are those
    that tokenizer.py --from-official found beside the released tokenizer.
    """
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        fail(f"--from-official {path}: there is no {file}")
    state, about = load_checkpoint(tokenizer, "tokenizer"), file.with_name("config.json")
    statistics = state.get("latent_statistics", {})
    if statistics.keys() != {"mean", "std"}:
        fail(f"{tokenizer} has no latent statistics: convert it with the config.json that was released beside it")
    try:
        heads = int(json.loads(about.read_text()).get("num_heads") or 0) if about.exists() else 0
    except (OSError, ValueError, TypeError, AttributeError) as error:
        fail(f"{about} is not the config of a released SiT ({type(error).__name__}: {error})")
    model = from_official(read_weights(file), heads)
    weights = {k: v for k, v in state["ema"].items() if k.startswith(("encoder.", "to_latent."))}
    facts = {name: [statistics[name]] * model.shape[1] for name in ("mean", "std")} | {
        "classes": [str(c) for c in range(model.null)], "shape": list(model.shape), "size": state["config"]["size"],
        "data": "", "step": 0, "tokenizer_weights": fingerprint(weights)}
    return model.to(device), Config(tokenizer=tokenizer, path="cosine"), facts


def latent_decoder(tokenizer: Tokenizer, mean: torch.Tensor, std: torch.Tensor):
    """Normalised latents -> images in [-1, 1]."""
    return lambda x: tokenizer.decode(x * std + mean)


def main():
    cfg = parse_config(Config, PRESETS, __doc__)
    run, began = start(cfg), time.time()
    tokenizer, tok = load_tokenizer(cfg.tokenizer, run.device)
    images = run.first(lambda: load_images(tok.data, tok.size, "train"))
    out = run.claim(cfg.out, cfg.fresh)
    if cfg.fresh and run.main and (out / "latents").exists():
        shutil.rmtree(out / "latents.old", ignore_errors=True)
        (out / "latents").rename(out / "latents.old")    # at once: half a folder must not look whole
        shutil.rmtree(out / "latents.old")
    meta = encode_data(tokenizer, images, out / "latents", run)
    facts = {"mean": meta["mean"], "std": meta["std"], "classes": images.classes, "data": tok.data, "size": tok.size,
             "shape": [tok.tokens()[1], tok.channels], "tokenizer_weights": meta["tokenizer"]}
    flops = forward_flops(*facts["shape"], cfg.width, cfg.depth, cfg.style)
    if cfg.bench:
        cfg.out = str(run.claim(out / "bench"))
        _, found = bench(cfg, run, 3 * flops, lambda c: train(c, run, out / "latents", facts, lambda model: None, None))
        return write_json(out / "bench/bench.json", found) if run.main else None
    state = resume(out / "ckpt.pt", "diffusion", cfg, {"tokenizer_weights": meta["tokenizer"]}, run)
    mean, std = (torch.tensor(facts[name], device=run.device) for name in ("mean", "std"))
    decode = latent_decoder(tokenizer, mean, std)
    classes = len(images.classes)
    guidance = cfg.guidance if classes > 1 and cfg.label_dropout else 1.0       # else there is no null class
    how = Sampling(cfg.sampler, cfg.sampling_steps, guidance, cfg.guidance_low, cfg.guidance_high, cfg.seed)
    run.print(f"latents of {len(images)} images: {' x '.join(map(str, facts['shape']))}, std {min(meta['std']):.2f} to "
              f"{max(meta['std']):.2f}; a network call: {flops / 1e9:.4g} GFLOP per image, in training 3 times that")

    def preview(model):
        per = max(1, min(8, 80 // classes))
        shown = min(classes, 10)
        y = torch.arange(shown).repeat(per)
        names = [] if classes == 1 else [images.classes[c] for c in range(shown)]
        save_grid(out / "samples.png", generate(model, decode, range(len(y)), y, how, cfg.path, run), shown, names)

    model = train(cfg, run, out / "latents", facts, preview, state)
    if cfg.samples:
        evaluate(cfg, run, model, tokenizer, decode, images, how, facts, began)
    run.barrier()


def evaluate(cfg: Config, run: Run, model: SiT, tokenizer: Tokenizer, decode, images: Images, how: Sampling,
             facts: dict, began: float) -> None:
    """Score samples beside what bounds them: real and reconstructed validation images above, decoded noise below."""
    n, classes, rows = cfg.samples, len(images.classes), {}
    y = torch.arange(n) % classes
    val = load_images(facts["data"], facts["size"], "val")
    if classes == 1:
        run.print("one class only: fd_classifier is not available; look at samples.png")
    else:
        judge = Judge(images, val, run)
        noise = Made(n, lambda i: to_uint8(decode(ImageNoise(i, cfg.seed, model.shape, run.device)())))
        with torch.no_grad():
            samples, ours = judge.score(Made(n, lambda i: generate(model, decode, i, y[i], how, cfg.path, run)), y)
            remade, theirs = judge.score(Made(len(val), lambda i: reconstruct(tokenizer, val[i], run)), val.labels)
            samples["fd_to_reconstructions"] = frechet_distance(*ours, *theirs)      # without what the decoder spoils
            rows = {"samples": samples, "decoded noise": judge(noise, y), "reconstructed validation images": remade,
                    "real validation images": judge.reference}
    if run.main:
        write_json(Path(cfg.out) / "metrics.json", {
            "rows": rows, "sampling": dataclasses.asdict(how), "labels": "balanced", "features": "classifier",
            "against": f"{len(images)} training images of {facts['data']}", "steps": cfg.steps, "seed": cfg.seed,
            "precision": cfg.precision, "commit": commit(), "seconds": round(time.time() - began)})
        for name, row in rows.items():
            run.print(f"{name:32s} N={row['images']:<6d} fd_classifier {row['fd_classifier']:8.3f}   "
                      f"recognised by class {row['class_accuracy']:6.1%}")
        if rows:
            run.print(f"samples against reconstructions: fd_classifier {rows['samples']['fd_to_reconstructions']:.3f}")
        run.print(f"wrote {cfg.out}/ckpt.pt, samples.png, metrics.json in {time.time() - began:.0f} s")


if __name__ == "__main__":
    launch(main)
