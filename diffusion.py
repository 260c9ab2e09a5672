"""SiT: a flow-matching transformer on the tokenizer's latents (arXiv 2401.08740; MAETok Sec. 4).

    torchrun diffusion.py  # encodes the data once, trains -> out/diffusion/

Time t runs from 0 (normalised latents x) to 1 (noise eps): x_t = alpha x + sigma eps. The network
learns the velocity v = alpha' x + sigma' eps; on the linear path v = eps - x.
"""
import json  # noqa: I001
import math
import os
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import (
    Dist, Ema, ImageSet, Loader, Log, die, launch, load_checkpoint, make_optimizers, make_shards,
    option, reading, save_grid, set_lr)
from fid import LazyImages, cached_classifier, frechet_distance, read_weights
from tokenizer import (
    Attention, Mlp, decode_images, encode_images, fingerprint, free, load_tokenizer,
    positive, reconstruct, restore, take_over)

# ---- The network

def sinusoid(t: Tensor, width: int) -> Tensor:
    """B -> B x width: cos and sin of t at width/2 frequencies from 1 down to 1/10000."""
    i = torch.arange(width // 2, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * i / (width // 2))  # B x width/2
    return torch.cat([angles.cos(), angles.sin()], -1)

def token_positions(length: int, width: int) -> Tensor:
    """1 x L x D: sines (even channels) and cosines (odd ones) of the token's number."""
    angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, width, 2).double() / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[None].float()

def modulate(x, shift, scale):
    return x * (1 + scale) + shift

class SwiGlu(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        hidden = 8 * width // 3  # makes it as large as the plain MLP
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)  # B x L x 8D/3 each
        return self.w3(F.silu(gate) * value)

# To add a style: its norm, its norm of queries and keys, its MLP
layer_norm = partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)  # c shifts and scales
rms_norm = partial(nn.RMSNorm, eps=1e-6)
STYLES = {
    "sit": (layer_norm, nn.LayerNorm, partial(Mlp, approximate="tanh")),
    "lightning": (rms_norm, rms_norm, SwiGlu)}

class SiTBlock(nn.Module):
    """A transformer layer that the condition c shifts, scales and gates (adaLN-Zero)."""
    def __init__(self, width, heads, style, qk_norm):
        super().__init__()
        norm, norm_qk, mlp = STYLES[style]
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = Attention(width, heads, norm_qk if qk_norm else nn.Identity)
        self.mlp = mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)  # B x 1 x D
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

class SiT(nn.Module):
    """Velocity of latents x (B x L x H) at times t (B) for classes y (B; K is the null class)."""
    def __init__(self, length: int, channels: int, classes: int, width: int, depth: int, heads: int,
                 style: str = "sit", qk_norm: bool = False):
        super().__init__()  # parameters have the names of the released checkpoints
        self.shape, self.null_class, self.size = (length, channels), classes, (width, heads)
        self.pos_embed = nn.Parameter(token_positions(length, width), False)  # 1 x L x D
        # Lightning also turns queries and keys by the token's number
        sin, cos = token_positions(length, width // heads).unflatten(2, (-1, 2)).unbind(3)  # 1 x L x d/2
        rope = torch.cat([cos, sin]) if style == "lightning" else None  # 2 x L x d/2
        self.register_buffer("rope", rope, persistent=False)
        self.x_embedder = nn.Linear(channels, width)  # a token is a patch of size 1
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.blocks = nn.ModuleList(SiTBlock(width, heads, style, qk_norm) for _ in range(depth))
        self.final_layer = nn.ModuleDict({
            "norm": STYLES[style][0](width), "linear": nn.Linear(width, channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))})

        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
            if name.endswith(("adaLN_modulation.1", "final_layer.linear")):
                nn.init.zeros_(m.weight)  # each layer begins as the identity, the velocity as 0
        for m in (self.y_embedder.embedding_table, mlp[0], mlp[2]):
            nn.init.normal_(m.weight, std=0.02)

    def forward(self, x, t, y):
        c = self.t_embedder.mlp(sinusoid(t, 256)) + self.y_embedder.embedding_table(y)  # B x D
        c, x = c[:, None], self.x_embedder(x) + self.pos_embed  # B x 1 x D, B x L x D
        for block in self.blocks:
            x = block(x, c, self.rope)  # B x L x D
        last = self.final_layer
        shift, scale = last.adaLN_modulation(c).chunk(2, -1)  # B x 1 x D
        return last.linear(modulate(last.norm(x), shift, scale)).float()  # B x L x H

# ---- Flow matching

def cosine_path(t):
    half_pi, angle = math.pi / 2, math.pi / 2 * torch.as_tensor(t)
    alpha, sigma = angle.cos(), angle.sin()  # alpha^2 + sigma^2 = 1
    return alpha, sigma, -half_pi * sigma, half_pi * alpha

# To add a path: its line here. t -> alpha, sigma, alpha', sigma'; noise level sigma / alpha -> t
Interpolant = namedtuple("Interpolant", "coefficients time_of")
PATHS = {
    "linear": Interpolant(lambda t: (1 - t, t, 0 * t - 1, 0 * t + 1), lambda level: level / (1 + level)),
    "cosine": Interpolant(cosine_path, lambda level: 2 / math.pi * level.atan())}

def sample_timesteps(n: int, distribution: str, path: str, generator: torch.Generator) -> Tensor:
    """Training times: uniform, or with a lognormal noise level sigma / alpha."""
    draw = torch.rand if distribution == "uniform" else torch.randn
    x = draw(n, generator=generator, device=generator.device)
    return x if distribution == "uniform" else PATHS[path].time_of(x.exp())

def velocity_loss(model, x, noise, t, y, path: str, cosine: float = 0.0) -> Tensor:
    """Squared error of the velocity at x_t, B values. `cosine`: weight of LightningDiT's term."""
    alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1, 1) for c in PATHS[path].coefficients(t))
    velocity = model(alpha * x + sigma * noise, t, y)  # B x L x H
    target = d_alpha * x + d_sigma * noise  # B x L x H: the derivative of x_t
    loss = (velocity - target).square().mean((1, 2))  # B
    if cosine:
        loss = loss + cosine * (1 - F.cosine_similarity(velocity, target, dim=-1)).mean(1)
    return loss

# ---- Sampling. The state is float64, so that hundreds of small steps add up without rounding

def guided_velocity(model, y: Tensor, scale: float = 1, low: float = 0, high: float = 1, guide=None) -> Callable:
    """velocity(x, t, gate=t): v_null + scale (v - v_null) where low <= gate <= high, else v."""
    def velocity(x, t, gate=None):
        x, times = x.float(), y.new_full((len(x),), t, dtype=torch.float32)
        if scale <= 1 or not low <= (t if gate is None else gate) <= high:
            return model(x, times, y).double()
        if guide:  # autoguidance: a worse model, given the class, is the null branch
            v, v_null = model(x, times, y), guide(x, times, y)  # B x L x H each
        else:  # both branches in one call
            both = torch.cat([y, torch.full_like(y, model.null_class)])  # 2B
            v, v_null = model(x.repeat(2, 1, 1), times.repeat(2), both).chunk(2)
        return v_null.double() + scale * (v.double() - v_null.double())
    return velocity

def sample_ode(velocity: Callable, noise: Tensor, steps: int, heun: bool = False) -> Tensor:
    """Follow dx = v dt from t = 1 to 0 in equal steps: Euler, or Heun, whose last is Euler's."""
    x = noise.double()
    for t, t_next in pairwise(np.linspace(1, 0, steps + 1)):
        v = velocity(x, t)  # points from data to noise
        if heun and t_next > 0:
            # Mean of both slopes; t decides on guidance at both, as released
            v = (v + velocity(x + (t_next - t) * v, t_next, gate=t)) / 2
        x = x + (t_next - t) * v  # t falls, so the step is against v
    return x

def sample_sde(velocity: Callable, noise: Tensor, steps: int, path: str, draw: Callable) -> Tensor:
    """Euler-Maruyama with g^2 = 2t: noisy steps from t = 1 to 0.04, then one without noise to 0."""
    x = noise.double()
    for t, t_next in pairwise([*np.linspace(1, 0.04, steps), 0.0]):
        dt, v = t_next - t, velocity(x, t)  # dt < 0
        alpha, sigma, d_alpha, d_sigma = (float(c) for c in PATHS[path].coefficients(t))
        ratio = alpha / d_alpha
        # Gradient of log p_t(x). It follows from v, so guidance acts on the whole drift
        score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)
        x = x + (v - t * score) * dt  # drift; g^2 / 2 = t
        if t_next > 0:
            x = x + math.sqrt(2 * t * -dt) * draw().double()  # noise of variance g^2 |dt|
    return x

def image_noise(index, seed: int, shape: tuple, dist: Dist) -> Callable:
    """draw() -> noise of samples number `index`, B x L x H: a function of (seed, number)."""
    generators = [Dist().generator(seed, "sampling noise", int(i)) for i in index]  # of the CPU
    def draw():
        x = torch.stack([torch.randn(shape, generator=g) for g in generators])
        x = x.pin_memory() if dist.device.type == "cuda" else x  # draws while the device works
        return x.to(dist.device, non_blocking=True)
    return draw

@dataclass(frozen=True)
class SamplerConfig:
    """All that samples depend on besides the weights."""
    sampler: str = "heun"
    steps: int = 10
    guidance: float = 1.0
    low: float = 0.0  # guidance acts where low <= t <= high
    high: float = 1.0
    seed: int = 0
    path: str = "linear"

    def nfe(self) -> tuple[int, int]:
        """Network calls for one image, and the same if a guided call counts twice."""
        sde = self.sampler == "sde"
        times = np.linspace(1, 0.04, self.steps) if sde else np.linspace(1, 0, self.steps + 1)[:-1]
        if self.sampler == "heun":
            times = times.repeat(2)[:-1]  # two slopes a step, one in the last
        guided = (self.guidance > 1) & (self.low <= times) & (times <= self.high)
        return len(times), len(times) + int(guided.sum())

def draw_labels(rule: str, classes, n: int, dist: Dist, seed: int) -> np.ndarray:
    """n of these classes: random, or as many of each."""
    return dist.rng(seed, "labels").choice(classes, n) if rule == "random" else np.resize(classes, n)

@torch.no_grad()
def generate(model: SiT, index, y: Tensor, cfg: SamplerConfig, dist: Dist, guide=None) -> Tensor:
    """Normalised latents B x L x H of samples number `index`, of classes y."""
    velocity = guided_velocity(model, y.to(dist.device), cfg.guidance, cfg.low, cfg.high, guide)
    draw = image_noise(index, cfg.seed, model.shape, dist)  # also in the steps of the SDE
    with dist.autocast():
        if cfg.sampler == "sde":
            x = sample_sde(velocity, draw(), cfg.steps, cfg.path, draw)
        else:
            x = sample_ode(velocity, draw(), cfg.steps, heun=cfg.sampler == "heun")
    finite = x.isfinite().flatten(1).all(1).tolist()  # B
    if not all(finite):
        die(f"the velocity of sample {index[finite.index(False)]} is not finite: "
            "damaged weights, or try --precision fp32")
    return x.float()

# ---- Latents of the whole data set, encoded once

@dataclass
class LatentSet:
    """Latents of a data set, as Loader takes them."""
    rows: object  # Shards, float16 n x 2 x L x H: image and mirror image
    labels: Tensor  # n
    index: np.ndarray  # 0..n-1
    mean: Tensor  # H
    std: Tensor  # H

    def view(self, rows: Tensor, mirror: Tensor) -> Tensor:
        """float16 B x 2 x L x H -> normalised float B x L x H."""
        x = torch.where(mirror[:, None, None], rows[:, 1], rows[:, 0])
        return (x.float() - self.mean) / self.std

def encode_dataset(tokenizer, images: ImageSet, folder: Path, made_of: dict, dist: Dist) -> LatentSet:
    """Latents of all images, in shards below `folder`."""
    batch = max(1, min(500, 500 * 128**2 // images.size**2))

    def encode(start, stop):
        z = []
        for x in images[np.arange(start, stop)].split(batch):
            views = [encode_images(tokenizer, view, dist).half() for view in (x, x.flip(3))]
            z.append(torch.stack(views, 1).cpu())
        return torch.cat(z).numpy()

    made_of = made_of | {"precision": dist.precision}
    length = 1000 // batch * batch  # few files: Linux maps 65,530
    rows = make_shards(folder, len(images), length, encode, made_of, dist, "encoding")
    sums = torch.zeros(2, rows.shape[-1], device=dist.device).double()
    for array in rows.arrays[dist.rank::dist.world_size]:
        z = torch.from_numpy(array).to(dist.device).double().flatten(0, -2)
        sums += torch.stack([z.sum(0), z.square().sum(0)])
    mean, square = dist.all_reduce(sums) / math.prod(rows.shape[:-1])  # H each
    std = (square - mean**2).clamp(min=0).sqrt()
    least = 1e-6 * std.max()  # no division by zero
    dead = (std <= least).nonzero()[:, 0].tolist()
    if len(dead) == len(std):
        die("all latents are equal: the tokenizer has learned nothing, train it again")
    if dead:
        dist.print(f"warning: the latent channels {dead} are constant")
    return LatentSet(rows, images.labels, np.arange(len(images)), mean.float(), std.clamp(min=least).float())

# ---- Training

@dataclass(frozen=True)
class Config:
    """Defaults = preset `quick`."""
    tokenizer: str = free("out/tokenizer/ckpt.pt", "checkpoint of tokenizer.py")
    data: str = free("", "the images; empty: as for the tokenizer")
    out: str = free("out/diffusion", "folder of the run")
    init: str = free("", "checkpoint to start from, ours or released")
    width: int = positive(192, "width D")
    depth: int = positive(6, "transformer layers")
    heads: int = positive(3, "attention heads")
    style: str = option("sit", "lightning: RMSNorm, SwiGLU, RoPE", tuple(STYLES))
    qk_norm: bool = option(False, "normalise queries and keys")
    cosine_loss: float = 0.0  # weight
    path: str = option("linear", "from data to noise", tuple(PATHS))
    time: str = "lognormal"  # distribution of t in training; or uniform
    label_dropout: float = 0.1  # share of null labels
    steps: int = positive(600, "training steps")
    batch_size: int = positive(256, "latents a step, of all processes")
    micro_batch: int = free(0, "latents at once in a process; 0: all")
    optimizer: str = option("muon", "muon: of matrices inside blocks", ("adamw", "muon"))
    lr: float = option(1e-3, "peak learning rate of AdamW")
    muon_lr: float = 1e-2
    beta2: float = 0.99
    weight_decay: float = 0.0
    warmup: int = 50  # steps
    schedule: str = "cosine"  # after the warm-up; or constant, linear
    clip: float = 1.0  # largest gradient norm; 0: any
    ema: float = 0.998  # decay of the weight average
    sampler: str = free("heun", "of previews and evaluation", ("euler", "heun", "sde"))
    sampling_steps: int = free(10, "steps of that sampler", least=1)
    guidance: float = free(2.0, "guidance scale; 1: no guidance", least=1)
    guidance_high: float = free(0.75, "guidance acts where t <= this")
    samples: int = free(2000, "images to evaluate; 0: none")
    labels: str = "balanced"  # of these images; or random
    log_every: int = 200
    preview_every: int = 400  # samples.png
    save_every: int = free(500, "steps between checkpoints", least=1)
    keep_every: int = free(0, "steps between kept step-N.pt; 0: none")
    seed: int = option(0, "of all random numbers")
    compile: bool = free(False, "torch.compile; a CPU needs a C++ compiler")
    precision: str = option("auto", "auto: bf16 where fast", ("auto", "fp32", "bf16"))

    def check(self):
        if self.width % (2 * self.heads) or self.guidance_high > 1:
            raise ValueError(f"--width {self.width} is no multiple of 2 --heads, or --guidance-high is above 1")
        if self.cosine_loss and not self.clip:
            raise ValueError("cosine_loss needs a clip above 0, else training diverges")

    def build_sit(self, shape: tuple, classes: int) -> SiT:
        return SiT(*shape, classes, self.width, self.depth, self.heads, self.style, self.qk_norm)

SIT = {  # Sec. 4 of the paper
    "steps": 4_000_000, "optimizer": "adamw", "lr": 1e-4, "beta2": 0.999, "warmup": 0,
    "schedule": "constant", "ema": 0.9999, "sampler": "sde", "sampling_steps": 250,
    "guidance": 1.9, "samples": 0, "labels": "random", "save_every": 10_000, "preview_every": 50_000,
    "compile": torch.cuda.is_available(),
    "micro_batch": 256}  # of XL: 40 GiB of activations, 160 MiB an image
LIGHTNING = SIT | {
    "style": "lightning", "cosine_loss": 1.0, "steps": 400_000, "batch_size": 1024, "micro_batch": 128,
    "lr": 2e-4, "beta2": 0.95, "sampler": "euler", "guidance": 1.8}
SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
KINDS = {
    "sit-{}": SIT, "lightning-{}": LIGHTNING,
    # As in arXiv 2603.05630. Their gFID with the released tokenizer: b 13.73, xl 6.27
    "sit-{}-40ep": SIT | {"steps": 400_000, "batch_size": 128, "guidance": 1.0}}
PRESETS = {"quick": {}} | {
    kind.format(size): preset | dict(zip(("width", "depth", "heads"), numbers))
    for size, numbers in SIZES.items() for kind, preset in KINDS.items()}

def train(cfg: Config, dist: Dist, latents: LatentSet, meta: dict, preview, init=None) -> SiT:
    """The averaged model. `meta` goes into checkpoints; `init` is a model to start from."""
    torch.manual_seed(cfg.seed)
    model = cfg.build_sit(meta["shape"], len(meta["classes"])).to(dist.device)
    if init:
        take_over(model, init.state_dict(), dist)
    ema, optimizers = Ema(model, cfg.ema), make_optimizers(model, cfg, dist)
    ckpt, start = Path(cfg.out, "ckpt.pt"), 0
    if ckpt.exists():
        state = load_checkpoint(ckpt, "diffusion")
        start = restore(state, model, ema, optimizers)
        dist.print(f"continuing {ckpt} at step {start}, saved by {state['commit']}")
        if start > cfg.steps:
            die(f"{ckpt} has more than --steps {cfg.steps}")

    net = dist.wrap(dist.compiled(model, cfg.compile))  # DDP: averages gradients over processes
    n, mine = cfg.batch_size, dist.local_slice(cfg.batch_size)
    loader = Loader(latents, n, cfg.seed, dist)
    log = Log(cfg, dist, "diffusion", start, cfg.steps, loader)
    log.count_flops(model, torch.zeros(1, *model.shape), torch.zeros(1), torch.zeros(1).long())

    for step in range(start, cfg.steps):
        x, y = loader(step)  # B x L x H, B
        # Time, noise and dropped labels, drawn for the global batch
        generator = dist.generator(cfg.seed, "training noise", step)
        t = sample_timesteps(n, cfg.time, cfg.path, generator)[mine]
        drop = torch.rand(n, generator=generator, device=x.device)[mine] < cfg.label_dropout
        noise = torch.randn(n, *model.shape, generator=generator, device=x.device)[mine]
        y = torch.where(drop, model.null_class, y)  # teaches the null branch of guidance

        losses = torch.empty_like(t)
        for micro, _ in dist.micro_batches(net, len(x), cfg.micro_batch):
            rows = (row[micro] for row in (x, noise, t, y))
            with dist.autocast():
                loss = velocity_loss(net, *rows, cfg.path, cfg.cosine_loss)
            (loss.sum() / len(x)).backward()  # mean over this process's rows
            losses[micro] = loss.detach()

        lr_scale = set_lr(optimizers, step, cfg.steps, cfg)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(step)  # samples come from the average

        # Also for each quarter of [0, 1]: flow matching is hard in the middle
        terms = {"loss": losses.mean(), "grad": grad_norm}
        for k in range(1, 5):
            inside = ((4 * t).ceil() == k).float()  # B
            terms[f"t<{k / 4:g}"] = (losses * inside).sum(), inside.sum()
        log.add(lr_scale, **terms)

        done, last = step + 1, step + 1 == cfg.steps
        keeping = cfg.keep_every and done % cfg.keep_every == 0
        saving = last or done % cfg.save_every == 0
        if saving or keeping or done % cfg.log_every == 0:
            log.write(done)  # ends the run if a term is not finite
        if saving or keeping:
            state = meta | {"kind": "diffusion", "config": asdict(cfg), "step": done, "ema": ema.model.state_dict()}
        if keeping:
            dist.save(ckpt.with_name(f"step-{done}.pt"), state)
        if saving:
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            dist.save(ckpt, state | {"model": model.state_dict()})
        if dist.is_main and (last or done % cfg.preview_every == 0):
            preview(ema.model)
    return ema.model

# ---- Loading, and the run

def load_diffusion(path: str | Path, device, tokenizer: str | None = None) -> tuple:
    """(averaged model, settings, what else is stored). A released SiT samples with `tokenizer`."""
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    if file.suffix != ".safetensors":
        state = load_checkpoint(file, "diffusion")
        with reading(file, "a diffusion model of this code"):
            cfg = Config(**state["config"])
            model = cfg.build_sit(state["shape"], len(state["classes"]))
            model.load_state_dict(state["ema"])
            if np.isfinite(state["mean"] + state["std"]).sum() != 2 * model.shape[1]:
                raise ValueError("the statistics of its latents are damaged")
        return model.to(device).eval().requires_grad_(False), cfg, state

    if tokenizer == "":
        die("a released SiT needs --tokenizer")
    with reading(file, "a released SiT"):
        about = file.with_name("config.json")
        heads = json.loads(about.read_text()).get("num_heads") if about.exists() else 0
        model = from_official(read_weights(file), heads).to(device)
    meta = {"classes": [str(c) for c in range(model.null_class)], "data": "", "step": 0}
    if tokenizer:
        state = load_checkpoint(tokenizer, "tokenizer")
        meta |= {"tokenizer": [tokenizer], "tokenizer_weights": fingerprint(state["ema"])}
        with reading(tokenizer, "a tokenizer converted with its config.json"):
            statistics = state["latent_statistics"]
            meta |= {name: [statistics[name]] * model.shape[1] for name in ("mean", "std")}
            meta["size"] = state["config"]["size"]
    # No file says its path. The demos sample with cosine
    return model, Config(path="cosine"), meta

def from_official(weights: dict[str, Tensor], heads: int = 0) -> SiT:
    """The state dict of a released SiT. heads 0: those of its size."""
    length, (width, channels) = weights["pos_embed"].shape[1], weights["x_embedder.weight"].shape
    classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    depth = sum(name.endswith("attn.qkv.weight") for name in weights)
    heads = heads or (16 if width == 1152 else width // 64)
    normed = "blocks.0.attn.q_norm.weight" in weights
    with torch.device("meta"):
        model = SiT(length, channels, classes, width, depth, heads, qk_norm=normed)
    model.load_state_dict({name: w.float() for name, w in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)

def open_inputs(cfg: Config, dist: Dist) -> tuple:
    """(tokenizer, training images, model of --init)"""
    for path in filter(None, (cfg.tokenizer, cfg.init)):
        if Path(path).resolve().parent == Path(cfg.out).resolve():
            die(f"--out {cfg.out} is the folder of {path}, whose ckpt.pt it would overwrite")
    init = None
    if cfg.init and not Path(cfg.out, "ckpt.pt").exists():  # else the run goes on
        init, _, _ = load_diffusion(cfg.init, dist.device)
        if init.size != (cfg.width, cfg.heads):
            die("--init {} needs --width {} --heads {}".format(cfg.init, *init.size))
    tokenizer, tok = load_tokenizer(cfg.tokenizer, dist.device)
    for part in (tokenizer.encoder, tokenizer.decoder):
        dist.compiled(part, cfg.compile)
    data = cfg.data or tok.data or die("give --data: the tokenizer names none")
    images = dist.rank0_first(lambda: ImageSet(data, tok.size, "train", cfg.out))
    dist.print(f"{data}: {images.describe()}")
    if tok.images and tok.images != images.fingerprint:
        dist.print("warning: the tokenizer was trained on other images than", images.data)
    if len(empty := np.delete(images.classes, images.labels)):
        dist.print("warning: no training images, so no samples, of", ", ".join(empty[:20]))
    return tokenizer, images, init

def evaluate(cfg: Config, dist: Dist, model, tokenizer, images, val, make) -> dict:
    """Scores of samples; reconstructions and real images are bounds."""
    judge, n = cached_classifier(images, dist, cfg.out), cfg.samples
    present = np.unique(images.labels)
    y = torch.from_numpy(draw_labels(cfg.labels, present, n, dist, cfg.seed))
    samples = LazyImages(n, lambda i: make(model, y[i], i))
    recons = LazyImages(len(val), lambda i: reconstruct(tokenizer, val[i], dist))
    rows = {"real validation images": judge.score(val, val.labels)[0]}
    rows["samples"], moments = judge.score(samples, y)
    rows["reconstructions"], recon_moments = judge.score(recons, val.labels)
    rows["samples"]["fd_to_reconstructions"] = frechet_distance(*moments, *recon_moments)
    for name, row in rows.items():
        dist.print(f"{name:32s}", *(f"{key} {value:.4g} " for key, value in row.items()))
    return rows

def main(cfg: Config, dist: Dist):
    dist.local_slice(cfg.batch_size)  # ends the run if it cannot be shared
    tokenizer, images, init = open_inputs(cfg, dist)
    classes, weights = images.classes, fingerprint(tokenizer.state_dict())
    made_of = {"tokenizer_weights": weights, "images": images.fingerprint}
    begun = Path(cfg.out, "ckpt.pt").exists()  # its pictures and steps stay
    stale = ["metrics.json"] + ["samples.png", "step-*.pt"] * (not begun)
    out = dist.make_out_dir(cfg.out, cfg, made_of, stale)
    latents = encode_dataset(tokenizer, images, out / "latents", made_of, dist)

    present = images.labels.unique()  # classes that have images
    meta = made_of | {
        "mean": latents.mean.tolist(), "std": latents.std.tolist(), "shape": latents.rows.shape[2:],
        "classes": classes, "present": present.tolist(), "data": images.data, "size": images.size,
        "tokenizer": [os.path.relpath(cfg.tokenizer, out), str(Path(cfg.tokenizer).absolute())]}
    guidance = cfg.guidance if len(classes) > 1 and cfg.label_dropout else 1.0  # else no null class
    sampling = SamplerConfig(
        cfg.sampler, cfg.sampling_steps, guidance, 0.0, cfg.guidance_high, cfg.seed, cfg.path)

    def make(model, y, index):
        z = generate(model, index, y, sampling, dist)  # B x L x H
        return decode_images(tokenizer, z * latents.std + latents.mean, dist)

    def preview(model):
        y, titles = present[:10].repeat(8), [classes[c] for c in present[:10]]
        save_grid(out / "samples.png", make(model, y, range(len(y))), len(titles), titles)

    model, rows = train(cfg, dist, latents, meta, preview, init), {}
    dist.compiled(model, cfg.compile)
    if cfg.samples and len(classes) > 1:
        val = ImageSet(images.data, images.size, "val")
        rows = evaluate(cfg, dist, model, tokenizer, images, val, make)
    elif cfg.samples:
        dist.print("one class only: no fd_classifier; look at samples.png")
    dist.save(out / "metrics.json", {
        "rows": rows, "sampling": asdict(sampling), "labels": cfg.labels, "against": images.data,
        "steps": cfg.steps, "precision": dist.precision})
    dist.print(f"wrote {out}")

if __name__ == "__main__":
    launch(main, Config, PRESETS, __doc__)
