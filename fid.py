"""Networks we do not train, and what we measure with them.

    torchrun fid.py  # out/samples/samples.npz against its data -> metrics.json
    torchrun fid.py A B  # FID, sFID, IS, precision, recall of A against B
    torchrun fid.py stats B --out ref.npz  # statistics of B, to give in its place
    python fid.py latents CKPT [CKPT ...] --out DIR  # what may tell how well they generate

A and B: an npz with arr_0 (uint8 n x S x S x 3), a folder of images, or a data set. B may be statistics.
`fid` is as ADM's; `fd_classifier` uses a network trained on the labels of the data set.
"""
import argparse  # noqa: I001
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, distributed, nn
from torch.distributions import MultivariateNormal
from torch.nn.utils.fusion import fuse_conv_bn_weights
from tqdm import tqdm

from data import (
    DATASETS, Dist, ImageSet, Loader, all_images, cache_dir, download, launch,
    lr_schedule, option, read_image, reading, to_float, writing)

# ---- Pretrained weights

META = "https://dl.fbaipublicfiles.com"
LPIPS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
VGG, INCEPTION, DINO = "vgg16-397923af", "pt_inception-2015-12-05-6726825d", "dino_deitsmall16_pretrain"
WEIGHTS = {  # name: address, start of the published sha256
    VGG: (f"https://download.pytorch.org/models/{VGG}.pth", VGG[-8:]),
    "lpips_vgg": (LPIPS, "a78928a0"),
    INCEPTION: (f"{FID}/{INCEPTION}.pth", INCEPTION[-8:]),
    DINO: (f"{META}/dino/{DINO}/{DINO}.pth", "")}
for net in ("siglip-large-patch16-256", "siglip-so400m-patch14-224"):
    WEIGHTS[net] = f"https://huggingface.co/google/{net}/resolve/main/model.safetensors", ""
for net in ("vits14", "vits14_reg4", "vitb14", "vitb14_reg4", "vitl14", "vitl14_reg4"):
    WEIGHTS[f"dinov2_{net}_pretrain"] = f"{META}/dinov2/dinov2_{net[:6]}/dinov2_{net}_pretrain.pth", ""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
Weights = dict[str, Tensor]

def pretrained(name: str, folder: str, dist: Dist, hint: str) -> Weights:
    """Weights from the folder ("": the cache), else downloaded into it."""
    url, sha256 = WEIGHTS[name]
    root = Path(folder or cache_dir()).absolute() / name
    paths = [root.with_suffix(suffix) for suffix in (Path(url).suffix, ".pth", ".safetensors")]
    path = next(filter(Path.exists, paths), paths[0])
    hint = f" (--weights), or do without: {hint}"
    return read_weights(dist.rank0_first(lambda: download(url, path, sha256, hint)))

def read_weights(path: str | Path) -> Weights:
    """Tensors by name, on the CPU. Runs no code from the file."""
    with reading(path, "a file of weights"):
        if Path(path).suffix != ".safetensors":
            with torch.serialization.safe_globals([argparse.Namespace]):  # settings
                state = torch.load(path, map_location="cpu", weights_only=True)
            for name in ("ema", "model", "state_dict"):  # wrappings, best first
                state = state[name] if isinstance(state.get(name), dict) else state
            return dict(state)

        raw, tensors = torch.from_numpy(np.memmap(path, np.uint8, "c")), {}
        begin = 8 + int.from_bytes(bytes(raw[:8]), "little")
        header = json.loads(bytes(raw[8:begin]))  # then come the tensors
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            part = raw[begin:][start:stop].clone()  # torch needs an aligned address
            tensors[name] = part.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return tensors

def fold_layer_scale(weights: Weights, attention: str, mlp: str):
    """Multiply LayerScale (`ls1.gamma`, `ls2.gamma`) into the matrices of these names."""
    for block in {key[:-9] for key in weights if key.endswith(("ls1.gamma", "ls2.gamma"))}:
        for scale, layer in (("ls1", block + attention), ("ls2", block + mlp)):
            gamma, bias = weights.pop(f"{block}{scale}.gamma"), weights[f"{layer}.bias"]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] * gamma[:, None]
            weights[f"{layer}.bias"] = bias * gamma.view_as(bias)

# ---- Frozen networks: vision transformers, LPIPS, Inception

KEY_MAP = {  # names in the public files -> in torch's own layer
    "vision_model.": "", "encoder.": "", "embeddings.": "", "position_embedding.weight": "pos_embed",
    "patch_embedding": "patch_embed", "patch_embed.proj": "patch_embed", "blocks.": "layers.",
    "attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc": "linear",
    "post_layernorm": "norm", "layer_norm": "norm"}
# SigLIP's text half and pooling; training's mask
UNUSED = re.compile(r"text_model\.|logit_|vision_model\.head\.|.*(_ids|mask_token)$")
IMAGENET = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[..., None, None]  # mean, std

def freeze(net: nn.Module, dist: Dist) -> nn.Module:
    return net.to(dist.device, memory_format=torch.channels_last).eval().requires_grad_(False)

class VisionTransformer(nn.Module):
    """DINO, DINOv2 or SigLIP's vision tower, sizes as in the weights; `resample`: other patches."""

    def __init__(self, weights: Weights, kind: str, heads: int = 0, resample: int = 0):
        super().__init__()
        with reading("the file", f"{kind} weights"):
            w = {key: value.float() for key, value in weights.items() if not UNUSED.match(key)}
            for old, new in KEY_MAP.items():
                w = {key.replace(old, new): value for key, value in w.items()}
            fold_layer_scale(w, "self_attn.out_proj", "linear2")
            for key in [key for key in w if ".q_proj." in key]:  # SigLIP's three matrices
                parts = [w.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
                w[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)

            width, _, patch, _ = w["patch_embed.weight"].shape
            if resample:  # products with resized patches stay (FlexiViT)
                pixels = torch.eye(patch**2).view(-1, 1, patch, patch)
                resize = F.interpolate(pixels, resample, mode="bicubic", antialias=True).flatten(1)
                kernel = w["patch_embed.weight"].flatten(2) @ resize.pinverse().T
                w["patch_embed.weight"] = kernel.unflatten(2, (resample, -1))
                patch = resample
            pos = w.pop("pos_embed").reshape(1, -1, width)  # 1 x tokens x D
            prefix = pos[:, :0]
            if kind != "siglip":  # a class token, with a position of its own
                prefix, pos = w.pop("cls_token") + pos[:, :1], pos[:, 1:]
            registers = w.pop("register_tokens", pos[:, :0])

            # DINO was trained with exact GELU; published discriminators on it use tanh's
            gelu = F.gelu if kind == "dinov2" else partial(F.gelu, approximate="tanh")
            heads = heads or (16 if width == 1152 else max(1, width // 64))  # 1152: so400m
            layer = width, heads, len(w["layers.0.linear1.weight"]), 0, gelu, 1e-6, True, True
            depth = sum(key.endswith(".linear1.weight") for key in w)
            with torch.device("meta"):  # no memory: the weights move in
                self.patch_embed = nn.Conv2d(3, width, patch, patch)
                self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(*layer) for _ in range(depth)))
                self.norm = nn.LayerNorm(width, 1e-6)
            self.load_state_dict(w, assign=True)

        self.kind, self.width, self.patch, self.resampled = kind, width, patch, resample > 0
        self.prefix, self.registers = prefix.shape[1], registers.shape[1]
        self.register_buffer("rgb", IMAGENET)
        self.register_buffer("pos_embed", pos)
        self.register_buffer("prefix_tokens", torch.cat([prefix, registers], 1))

    def positions(self, rows: int, columns: int) -> Tensor:
        m = math.isqrt(self.pos_embed.shape[1])
        if rows == columns == m:
            return self.pos_embed
        table = self.pos_embed.unflatten(1, (m, m)).permute(0, 3, 1, 2)  # 1 x D x m x m
        size, scale = (rows, columns), None
        antialias = self.registers > 0 or self.resampled
        if self.kind != "siglip" and not antialias:  # the kernel takes this scale, not rows / m
            size, scale = None, ((rows + 0.1) / m, (columns + 0.1) / m)
        table = F.interpolate(table, size, scale, "bicubic", antialias=antialias)
        return table.flatten(2).transpose(1, 2)  # 1 x rows*columns x D

    def embed(self, x: Tensor) -> Tensor:
        """Normalised images -> class token, registers, patches."""
        x = self.patch_embed(x)  # B x D x rows x columns
        tokens = x.flatten(2).transpose(1, 2) + self.positions(*x.shape[-2:])  # B x N x D
        return torch.cat([self.prefix_tokens.expand(len(x), -1, -1), tokens], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers(self.embed(x)))  # B x (prefix + registers + N) x D

    def normalise(self, image: Tensor) -> Tensor:
        plain = self.kind == "siglip" and not self.resampled  # as trained
        return image if plain else (image - self.rgb[0]) / self.rgb[1]

    @torch.no_grad()
    def patch_features(self, image: Tensor, grid: int) -> Tensor:
        """Images in [-1, 1], resized to grid x grid patches -> B x grid*grid x D."""
        size = grid * self.patch
        if image.shape[-1] != size:
            image = F.interpolate(image, size, mode="bicubic", antialias=True)
        tokens = self(self.normalise(image))
        return tokens[:, self.prefix + self.registers:].float()

def load_vit(name: str, folder: str, dist: Dist, hint: str, **how) -> VisionTransformer:
    kind = re.split("[_-]", name)[0]  # dino, dinov2, siglip
    return freeze(VisionTransformer(pretrained(name, folder, dist, hint), kind, **how), dist)

def convolution(weight: Tensor, bias: Tensor, stride=1, padded=True) -> nn.Conv2d:
    out, channels, *kernel = weight.shape
    conv = nn.Conv2d(channels, out, kernel, stride, [k // 2 * padded for k in kernel])
    conv.load_state_dict({"weight": weight, "bias": bias})
    return conv

class Lpips(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al. 2018): distance of images in [-1, 1], B values."""

    STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's numbers

    def __init__(self, vgg: Weights, heads: Weights):
        super().__init__()
        self.stages, self.heads = nn.ModuleList(), nn.ParameterList()
        with reading("the file", "weights of VGG16 or LPIPS"):
            for i, numbers in enumerate(self.STAGES):
                self.stages.append(nn.Sequential())
                for n in numbers:
                    conv = convolution(vgg[f"features.{n}.weight"], vgg[f"features.{n}.bias"])
                    self.stages[i].extend([conv, nn.ReLU()])
                self.heads.append(heads[f"lin{i}.model.1.weight"].float())
        self.register_buffer("rgb", IMAGENET)

    def features(self, x: Tensor) -> list[Tensor]:
        x, features = (x - self.rgb[0]) / self.rgb[1], []
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i else x)
            features.append(F.normalize(x.float(), eps=1e-10))  # finite gradient at 0
        return features

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.heads, self.features(a), self.features(b))
        return sum((head * (f - g).square()).sum(1).mean((1, 2)) for head, f, g in pairs)

def load_lpips(folder: str, dist: Dist) -> Lpips:
    vgg, heads = (pretrained(name, folder, dist, "--lpips 0") for name in (VGG, "lpips_vgg"))
    return freeze(Lpips(vgg, heads), dist)

STEM = "1a_3x3 2a_3x3 2b_3x3 pool 3b_1x1 4a_3x3 pool"
STRIDED = re.compile(r"Conv2d_1a|Mixed_6a.branch3x3(dbl_3)?$|Mixed_7a.branch(3x3_2|7x7x3_4)")
UNPADDED = re.compile(rf"{STRIDED.pattern}|Conv2d_[24]a")
BRANCHES = {  # by the kind of block: chains of convolutions and pools, a|b side by side
    "A": ("1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3", "mean _pool"),
    "B": ("3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3", "pool"),
    "C": ("1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5", "mean _pool"),
    "D": ("3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4", "pool"),
    "E": ("1x1", "3x3_1 3x3_2a|3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a|3x3dbl_3b", "mean _pool")}
BRANCHES["F"] = *BRANCHES["E"][:3], "max _pool"
BLOCKS = "5bA 5cA 5dA 6aB 6bC 6cC 6dC 6eC 7aD 7bE 7cF"
POOLS = {
    "pool": lambda x: F.max_pool2d(x, 3, 2),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "mean": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)}  # torchvision counts it

class Inception(nn.Module):
    """FID's Inception of 2015: uint8 images -> pool, spatial, logits."""

    def __init__(self, weights: Weights, resize: str = "tf1"):
        super().__init__()
        self.resize, self.convs = resize, nn.ModuleDict()
        with reading("the file", "weights of FID's Inception"):
            self.register_buffer("fc", weights["fc.weight"].reshape(1008, 2048))
            parts = "running_mean", "running_var", "weight", "bias"
            for name in [key[:-12] for key in weights if key.endswith(".conv.weight")]:
                mean, variance, *affine = (weights[f"{name}.bn.{part}"] for part in parts)
                w = weights[f"{name}.conv.weight"]
                w, b = fuse_conv_bn_weights(w, None, mean, variance, 1e-3, *affine)
                conv = convolution(w, b, 1 + bool(STRIDED.match(name)), not UNPADDED.match(name))
                self.convs[name.replace(".", "/")] = conv  # a module's name holds no dot

    def chain(self, x: Tensor, names: str, at: str) -> Tensor:
        for name in names.split():
            if name in POOLS:
                x = POOLS[name](x)
            else:
                x = torch.cat([F.relu(self.convs[at + part](x)) for part in name.split("|")], 1)
        return x

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.resize == "tf1":
            x = (tf_resize(images) - 128) / 128
        else:  # pytorch-fid
            x = 2 * F.interpolate(images.float() / 255, 299, mode="bilinear") - 1
        x = self.chain(x, STEM, "Conv2d_")
        for block in BLOCKS.split():
            at = f"Mixed_{block[:2]}/branch"
            parts = [self.chain(x, names, at) for names in BRANCHES[block[2]]]
            if block == "6dC":  # 17 x 17 x 7, flattened H, W, C
                spatial = parts[0][:, :7].permute(0, 2, 3, 1).flatten(1).float()  # B x 2023
            x = torch.cat(parts, 1)
        pool = x.float().mean((2, 3))  # B x 2048
        return pool, spatial, pool @ self.fc.T  # the Inception Score leaves out the bias

def load_inception(folder: str, dist: Dist, resize: str = "tf1") -> Inception:
    weights = pretrained(INCEPTION, folder, dist, "--features classifier or --no-rfid")
    return freeze(Inception(weights, resize), dist)

# ---- Moments and distances

@dataclass
class LazyImages:
    """n images, made when asked for: make(index array) -> uint8 B x 3 x S x S."""
    n: int
    make: Callable
    from_files: bool = False  # then a thread reads ahead

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: np.ndarray) -> Tensor:
        return self.make(index)

def in_batches(images, dist: Dist, batch: int):
    """This process's share, as (first index, uint8 B x 3 x S x S on the device)."""
    n, step, reader, ahead = len(images), dist.world_size * batch, ThreadPoolExecutor(1), None
    from_files = getattr(images, "from_files", True)  # an ImageSet's are

    def read(start):
        x = images[np.arange(start, min(start + batch, n))]
        return x.pin_memory() if from_files and dist.device.type == "cuda" else x

    starts = range(dist.rank * batch, n, step)
    for start in tqdm(starts, desc="features", leave=False, disable=not dist.is_main or None):
        x = ahead.result() if ahead else read(start)
        ahead = reader.submit(read, start + step) if from_files and start + step < n else None
        yield start, x.to(dist.device, non_blocking=True)

class Moments:
    """Mean and covariance of features (B x D), in float64, over batches and processes."""

    def __init__(self, width: int, device: torch.device):
        self.sums = torch.zeros(width + 1, width + 1, device=device).double()

    def add(self, features: Tensor):
        # Multiples of 2^-15 sum up exactly: no bit depends on order or batches.
        x = (features.double() * 2**15).round() / 2**15
        x = F.pad(x, (0, 1), value=1.0)  # a column of ones counts and sums
        self.sums += x.T @ x

    def finish(self, dist: Dist) -> tuple[Tensor, Tensor]:
        sums = dist.all_reduce(self.sums).cpu()
        n, mean = sums[-1, -1], sums[-1, :-1] / sums[-1, -1]
        return mean, (sums[:-1, :-1] - n * torch.outer(mean, mean)) / (n - 1).clamp(min=1)

def frechet_distance(mean1, cov1, mean2, cov2) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64."""
    mean1, cov1, mean2, cov2 = (torch.as_tensor(x).double().cpu() for x in (mean1, cov1, mean2, cov2))
    with reading("a mean or covariance", "finite and of the right size"):
        # Eigenvalues of C1^(1/2) C2 C1^(1/2) are real at any rank; scipy's sqrtm is not
        values, vectors = torch.linalg.eigh(cov1)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
        distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
        if not distance.isfinite():
            raise ValueError("the distance")
    return max(0.0, distance.item())

# ---- FID, sFID, Inception Score, precision and recall, as in ADM

def tf_resize(x: Tensor, size: int = 299) -> Tensor:
    """TensorFlow 1's bilinear resize of B x 3 x H x W, bit by bit: no half-pixel shift."""
    for axis in (3, 2):  # first along rows of pixels, then along columns
        n = x.shape[axis]
        at = torch.arange(size, device=x.device) * torch.tensor(n / size)  # float32
        low = at.floor().long()
        weight = (at - low).view(-1, *[1] * (3 - axis))
        a = x.index_select(axis, low).float()
        b = x.index_select(axis, (low + 1).clamp(max=n - 1)).float()
        x = a + (b - a) * weight
    return x

def inception_score(logits: Tensor, block: int = 5000) -> float:
    """exp(mean KL(p(y|x) || p(y))) of blocks of the logits, n x classes, averaged."""
    scores = []
    for part in logits.split(block):
        p = part.double().softmax(1)
        entropy = torch.special.entr(p).sum(1).mean()
        scores.append((torch.special.entr(p.mean(0)).sum() - entropy).exp())
    return torch.stack(scores).mean().item()

def knn_radii(x: Tensor) -> Tensor:
    # The fourth: each point, n x D, is its own nearest
    return torch.cat([torch.cdist(part, x).kthvalue(4).values for part in x.split(2000)])

def precision_recall(reference: Tensor, samples: Tensor) -> Iterator[float]:
    """Share of samples within a radius of the reference; the reverse (Kynkaanniemi 2019)."""
    for points, centres in ((samples, reference), (reference, samples)):
        radii = knn_radii(centres)  # in parts, as n x n distances would not fit
        hits = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(2000)]
        yield torch.cat(hits).double().mean().item()

@torch.no_grad()
def inception_statistics(net: Inception, images, dist: Dist, batch=100, every=1) -> dict:
    """Moments of uint8 images; pool features and logits of one in `every`."""
    moments = Moments(2048, dist.device), Moments(2023, dist.device)
    rows = torch.zeros(math.ceil(len(images) / every), 2048 + 1008, device=dist.device)
    for start, x in in_batches(images, dist, batch):
        with dist.autocast():
            pool, spatial, logits = net(x)
        moments[0].add(pool)
        moments[1].add(spatial)
        kept = torch.cat([pool, logits], 1)[-start % every::every]
        rows[math.ceil(start / every):][:len(kept)] = kept  # each process fills its own

    pool, logits = dist.all_reduce(rows).split([2048, 1008], 1)
    (mu, sigma), (mu_s, sigma_s) = (m.finish(dist) for m in moments)
    return {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "features": pool, "logits": logits}

# ---- Reconstructions

def psnr(a: Tensor, b: Tensor) -> Tensor:
    error = ((a.double() - b.double()) / 255).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=100)  # B, in dB

def ssim(a: Tensor, b: Tensor, flat: bool = False) -> Tensor:
    """SSIM of pairs of uint8 images (Wang 2004). `flat`: the paper's, on [-1, 1]."""
    span, correction = (2, 49 / 48) if flat else (1, 1)  # sample covariance
    a, b = (x.double() / (255 / span) - (span - 1) for x in (a, b))
    w = torch.ones(7) if flat else torch.signal.windows.gaussian(11, std=1.5, dtype=a.dtype)
    w = (torch.outer(w, w) / w.sum() ** 2).to(a)
    blur = partial(F.conv2d, weight=w.expand(a.shape[1], 1, -1, -1), groups=a.shape[1])
    ma, mb = blur(a), blur(b)
    moments = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    va, vb, cov = (correction * x for x in moments)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2  # flat images: no division by zero
    score = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return score.flatten(1).mean(1)  # B

@torch.no_grad()
def reconstruction_metrics(reconstruct, images, dist: Dist, judge, lpips, weights) -> dict:
    """Scores of reconstruct(uint8) against uint8 images; rfid with a folder of weights."""
    metrics = {"psnr": psnr}
    if images.size > 10:  # SSIM's window has 11 pixels
        metrics |= {"ssim": ssim, "ssim_7x7_range2": partial(ssim, flat=True)}
    if lpips:
        metrics["lpips"] = lambda x, y: lpips(to_float(x), to_float(y))
    sums = torch.zeros(len(metrics), device=dist.device).double()
    for _, x in in_batches(images, dist, 50):
        y = reconstruct(x)
        sums += torch.stack([f(x, y).double().sum() for f in metrics.values()])  # in fp32 or more
    scores = dict(zip(metrics, (dist.all_reduce(sums) / len(images)).tolist()))
    lazy = LazyImages(len(images), lambda i: reconstruct(images[i].to(dist.device)))
    if judge:
        scores["fd_classifier"] = judge.score(lazy)[0]["fd_classifier"]
    if weights is not None:
        fp32 = replace(dist, precision="fp32")
        net = load_inception(weights, fp32)
        a, b = (inception_statistics(net, x, fp32) for x in (lazy, images))
        scores["rfid"] = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
    return scores

# ---- Latents: what may tell, before a generator is trained, how well it will generate

def linear_probe(train_z, train_y, val_z, val_y, classes: int, device=None, iterations=100) -> float:
    """Accuracy of logistic regression on standardised latents, fitted on `device` (Fig. 5a)."""
    large = train_z[0].numel() * classes > 2e6  # float64 would not fit
    dtype, history = (torch.float32, 3) if large else (torch.float64, 100)
    z, v = (x.flatten(1).to(device, dtype) for x in (train_z, val_z))  # n x L*H
    y = train_y.to(z.device)
    mean, std = z.mean(0), z.std(0) + 1e-6
    z, v = (F.pad((x - mean) / std, (0, 1), value=1.0) for x in (z, v))  # for the bias
    w = z.new_zeros(z.shape[1], classes, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=iterations, history_size=history, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(z @ w, y) + 1e-4 * w.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return ((v @ w).argmax(1) == val_y.to(z.device)).double().mean().item()

def gmm_log_prob(x, weights, means, covariances) -> Tensor:
    """log(weight * density), n x K. Covariances K x D x D, or K x D if diagonal."""
    if covariances.ndim == 2:
        square = x**2 @ (1 / covariances).T - 2 * x @ (means / covariances).T  # n x K
        rest = means**2 / covariances + (2 * math.pi * covariances).log()  # K x D
        return weights.log() - 0.5 * (square + rest.sum(1))
    parts = [MultivariateNormal(m, c).log_prob(x) for m, c in zip(means, covariances)]
    return torch.stack(parts, 1) + weights.log()

def fit_gmm(x: Tensor, k: int, diagonal: bool = False) -> tuple:
    """Weights, means, covariances (plus 1e-3) of k Gaussians: EM from k-means++."""
    x, total = x.double(), -math.inf
    _, cluster = kmeans2(x.cpu().numpy(), k, minit="++", rng=np.random.default_rng(0))
    responsibility = F.one_hot(torch.from_numpy(cluster).long(), k).to(x)  # n x K
    floor = 1e-3 if diagonal else 1e-3 * torch.eye(x.shape[1]).to(x)

    def spread(d, r):  # n x D, n -> D, or D x D
        return r @ d**2 if diagonal else (d * r[:, None]).T @ d

    for _ in range(100):
        count = responsibility.sum(0) + 1e-9  # a cluster may be empty
        weights, means = count / count.sum(), responsibility.T @ x / count[:, None]
        covariances = torch.stack([spread(x - m, r) / n + floor for m, r, n in zip(means, responsibility.T, count)])
        joint = gmm_log_prob(x, weights, means, covariances)
        responsibility = joint.softmax(1)
        last, total = total, joint.logsumexp(1).mean()
        if total - last < 1e-4 * x.shape[1]:
            break
    return weights, means, covariances

def gmm_nll_curve(train_z, val_z, dims: int, sizes=(1, 2, 4, 8, 16, 32), diagonal=False) -> dict:
    """Held-out negative log-likelihood per dimension of mixtures, after PCA to `dims` (App. B.3).

    The released code's covariances are `diagonal` (Fig. 2a).
    """
    axes = torch.linalg.eigh(torch.cov(train_z.double().T))[1].flip(1)  # largest first
    z, v = (x.double() @ axes[:, :dims] for x in (train_z, val_z))
    std = z.std(0).clamp(min=1e-9)  # a dead channel stays where it is
    curve = {}
    for k in tqdm([k for k in sizes if 2 * k <= len(z)], desc="mixtures", leave=False, disable=None):
        log_prob = gmm_log_prob(v / std, *fit_gmm(z / std, k, diagonal))  # n x K
        curve[k] = -log_prob.logsumexp(1).mean().item() / dims
    return curve

def interpolate(v: Tensor, z: Tensor) -> Tensor:
    """Half way on the sphere from each row of v to one of its 10 nearest rows of z (iFID, arXiv 2603.05630).

    By cosine; drawn by softmax(-mean squared distance). v is n x D, z is m x D.
    """
    unit, generator, parts = F.normalize(z), torch.Generator(z.device).manual_seed(0), []
    for a in v.split(500):
        near = z[(F.normalize(a) @ unit.T).topk(min(10, len(z))).indices]  # B x 10 x D
        chance = (-(near - a[:, None]).square().mean(2)).softmax(1)  # B x 10
        drawn = torch.multinomial(chance, 1, generator=generator)[:, 0]  # B
        b = near[torch.arange(len(a), device=a.device), drawn]  # B x D
        cosine = F.cosine_similarity(a, b)[:, None]  # of the angle w
        parts.append((a + b) / (2 + 2 * cosine).sqrt())  # sin(w/2) / sin(w) = 1 / sqrt(2 + 2 cos(w))
    return torch.cat(parts)

def velocity_variance(x: Tensor, t: float, queries: int = 1000) -> float:
    """Variance of the velocity given x_t on the linear path, per dimension, averaged over x_t.

    As if the rows of x, n x D, were all the data: x_t = (1 - t) x_i + t eps, with a known
    posterior over i. v = (x_t - x) / t, so Var[v | x_t] = Var[x | x_t] / t^2.
    """
    x, generator, total = x.double(), torch.Generator(x.device).manual_seed(0), 0.0
    index = torch.linspace(0, len(x) - 1, queries, device=x.device).long()
    noise = torch.randn(queries, x.shape[1], generator=generator, device=x.device)
    for x_t in ((1 - t) * x[index] + t * noise).split(250):
        posterior = (torch.cdist(x_t, (1 - t) * x).square() / (-2 * t**2)).softmax(1)  # B x n
        total += (posterior @ x**2 - (posterior @ x) ** 2).sum().item()
    return total / (queries * x.shape[1] * t**2)

# ---- Features from the data set's own labels

class Classifier(nn.Module):
    """A small network: images in [-1, 1] -> features (B x 192), class logits (B x K)."""

    def __init__(self, classes: int, dist: Dist):
        super().__init__()
        self.dist, self.width, self.stages = dist, 192, nn.Sequential()
        for i, o in pairwise((3, 32, 64, 128, 192)):
            conv = nn.Conv2d(i, o, 3, 1 if i == 3 else 2, 1, bias=False)
            self.stages.append(nn.Sequential(conv, nn.BatchNorm2d(o), nn.GELU()))
        self.head = nn.Linear(192, classes)
        self.register_buffer("mean", torch.zeros(192).double())  # of the training images
        self.register_buffer("cov", torch.zeros(192, 192).double())

    def maps(self, x: Tensor) -> Tensor:
        if not 8 <= x.shape[-1] <= 64:  # NaN below, in bf16
            x = F.interpolate(x, 8 if x.shape[-1] < 8 else 64, mode="area")
        return self.stages(x)  # B x 192 x S/8 x S/8

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.maps(x).mean((2, 3))
        return features.float(), self.head(features).float()

    @torch.no_grad()
    def patch_features(self, x: Tensor, grid: int) -> Tensor:
        maps = F.adaptive_avg_pool2d(self.maps(x), grid)  # averaged, or repeated
        return maps.flatten(2).transpose(1, 2).float()  # B x grid*grid x 192

    @torch.no_grad()
    def score(self, images, labels=None) -> tuple[dict, tuple]:
        """({fd_classifier, images, class_accuracy}, (mean, covariance)) of uint8 images."""
        dist, moments, n = self.dist, Moments(192, self.dist.device), len(images)
        if n <= self.width:
            dist.print(f"{n} images, no more than {self.width} features: their fd_classifier is too high")
        found = torch.zeros(n, dtype=torch.long, device=dist.device)
        for start, x in in_batches(images, dist, 500):
            features, logits = self(to_float(x))
            moments.add(features)
            found[start:start + len(x)] = logits.argmax(1)
        moments, found = moments.finish(dist), dist.all_reduce(found).cpu().numpy()
        row = {"fd_classifier": frechet_distance(self.mean, self.cov, *moments), "images": n}
        if labels is not None:
            row["class_accuracy"] = (found == np.asarray(labels)).mean().item()
        return row, moments

def train_classifier(images: ImageSet, dist: Dist, seed=0, steps=800) -> Classifier:
    torch.manual_seed(seed)
    net = Classifier(len(images.classes), dist).to(dist.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3, weight_decay=0.05)
    loader = Loader(images, 100, seed, dist)
    for step in tqdm(range(steps), desc="classifier", disable=None):
        optimizer.param_groups[0]["lr"] = 5e-3 * lr_schedule(step, steps, steps // 10, "linear")
        x, y = loader(step)  # B x 3 x S x S, B
        # Blur in three of four batches, and noise, teach forms, not pixels
        if step % 4:
            small = max(1, round(x.shape[-1] / (step % 4 + 1)))
            blurred = F.interpolate(x, small, mode="area")
            x = F.interpolate(blurred, x.shape[-2:], mode="bicubic")
        g = dist.generator(seed, "classifier noise", step)
        amount = 0.15 * torch.rand(len(x), 1, 1, 1, generator=g, device=dist.device)
        x = x + amount * torch.randn(x.shape, generator=g, device=dist.device)
        with dist.autocast():
            loss = F.cross_entropy(net(x)[1], y, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)

def cached_classifier(images: ImageSet, dist: Dist, out: str, seed: int = 0) -> Classifier:
    """The frozen classifier of a data set, kept in the cache, or in `out` if it is read-only."""
    # Seed 0 scores, seed 1 teaches the tokenizer: no network scores what it taught
    if len(images.classes) < 2:
        dist.die("a classifier needs two classes or more")
    path = cache_dir() / f"classifier-4-{seed}-{images.fingerprint}.pt"  # 4: its version
    if cache_dir().exists() and not os.access(cache_dir(), os.W_OK) and not path.exists():
        path = Path(out) / path.name

    net = Classifier(len(images.classes), dist).to(dist.device)
    if dist.is_main:
        if not path.exists():
            dist.print("training a classifier of the data: 800 steps")
            trained = train_classifier(images, replace(dist, world_size=1), seed)
            _, (trained.mean, trained.cov) = trained.score(images)
            dist.save(path, {"model": trained.state_dict()})
        net.load_state_dict(read_weights(path))
    dist.barrier()
    for x in net.state_dict().values() if dist.world_size > 1 else ():
        distributed.broadcast(x, 0)  # other nodes may not see the file
    return freeze(net, dist)

# ---- Command line

@dataclass(frozen=True)
class Config:
    task: str = option("score", "set by the commands above", ("score", "stats", "latents"))
    samples: str = option("out/samples/samples.npz", "the set A, or checkpoints with commas")
    data: str = option("", "the set B; empty: what the samples name")
    out: str = option("", "file, or folder for latents; empty: beside A")
    features: str = option("classifier", "`A B` means fid", ("classifier", "fid", "both"))
    resize: str = option("tf1", "as ADM or pytorch-fid", ("tf1", "pytorch-fid"))
    size: int = option(0, "side of a data set; 0: that of A")
    weights: str = option("", "folder of Inception's weights; empty: the cache")
    batch_size: int = option(100, "images of a process at a time", least=1)
    precision: str = option("fp32", "bf16 moves a FID slightly", ("auto", "fp32", "bf16"))
    dims: int = option(0, "of the mixtures; 0: 90 % of the variance")

    def check(self):
        if self.task != "score" and not (self.samples and self.out):
            raise ValueError(f"{self.task} needs names and --out")

def arguments(argv: list[str]) -> list[str]:
    """`A B`, `stats B` and `latents CKPT ...` as flags."""
    words = list(takewhile(lambda word: word[:1] != "-", argv))
    if words[:1] in (["stats"], ["latents"]):
        argv[:len(words)] = ["--task", words[0], "--samples", ",".join(words[1:])]
    elif len(words) == 2:
        argv[:2] = ["--samples", words[0], "--data", words[1], "--features", "fid"]
    return argv

def open_set(name: str, size: int, dist: Dist) -> tuple:
    """(images or None, what an npz holds beside them: statistics, labels, meta)."""
    path = next(filter(Path.is_file, (Path(name), Path(name, "samples.npz"))), Path(name))
    if path.is_file():
        return open_npz(path)
    packed = name not in DATASETS and (path / "packed.json").is_file()
    if name not in DATASETS and path.is_dir() and not packed:
        return open_folder(path), {}
    if not size and not packed:
        dist.die(f"{name}: no such file or folder; for a data set, give --size")
    return dist.rank0_first(lambda: ImageSet(name, size * (not packed), "train")), {}

def open_folder(root: Path) -> LazyImages:
    names = all_images(root)
    pool, shape = ThreadPoolExecutor(os.cpu_count()), None

    def load(i):
        with reading(names[i], "an image like the others"):
            image = read_image(names[i], 0)
            if shape and image.shape != shape:
                raise ValueError("it is of another size; data.py makes one size")
        return image

    def read(index):
        images = np.stack(list(pool.map(load, index)))
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    shape = load(0).shape
    return LazyImages(len(names), read, from_files=True)

def open_npz(path: Path) -> tuple:
    with reading(path, "an npz file of images (arr_0) or statistics"), np.load(path) as npz:
        arrays = {name: npz[name] for name in npz.files if name != "arr_0"}
        if "arr_0" not in npz.files:
            return None, {"mu": arrays["mu"], "sigma": arrays["sigma"]} | arrays
        entry = npz.zip.getinfo("arr_0.npy")
        if entry.compress_type or npz.zip.testzip():
            pixels = npz["arr_0"]  # or says what is damaged
        else:  # it may be larger than memory
            with open(path, "rb") as file:
                file.seek(entry.header_offset + 26)  # lengths of a name and of extra fields
                file.seek(sum(np.fromfile(file, "<u2", 2)), os.SEEK_CUR)
                np.lib.format.read_magic(file)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                pixels = np.memmap(file, dtype, "c", file.tell(), shape, "CF"[fortran])
        if pixels.dtype != np.uint8 or pixels.shape[3:] != (3,) or not len(pixels):
            raise ValueError("arr_0 is not uint8 n x S x S x 3, n above 0")
        labels = arrays.get("labels", np.arange(len(pixels)))
        if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(f"{labels.size} labels for {len(pixels)} images: one integer each")
        arrays["meta"] = json.loads(str(arrays.get("meta", "{}")))
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return LazyImages(len(pixels), lambda i: pixels[i], from_files=True), arrays

def inception_scores(cfg: Config, dist: Dist, images, reference, statistics: dict) -> dict:
    """FID, sFID, IS, precision, recall against reference images or statistics."""
    made_with = str(statistics.get("resize", cfg.resize))
    if made_with != cfg.resize:
        dist.die(f"{cfg.data} was made with --resize {made_with}, not {cfg.resize}: give that")
    net = load_inception(cfg.weights, dist, cfg.resize)
    if reference and images[np.arange(1)].shape != reference[np.arange(1)].shape:
        dist.print("A and B differ in size: both are resized to 299 px")
    a = inception_statistics(net, images, dist, cfg.batch_size)
    b, row = {}, {"resize": cfg.resize, "inception_score": inception_score(a["logits"])}
    if reference:
        every = math.ceil(len(reference) / 10_000)  # ADM's reference files have so many
        b = inception_statistics(net, reference, dist, cfg.batch_size, every)
        if min(len(images), len(b["features"])) > 3:
            row["precision"], row["recall"] = precision_recall(b["features"], a["features"])
        else:
            dist.print("precision and recall need more than 3 images in each set")
    n = {"n": len(reference)} if reference and "mu" not in statistics else {}
    b |= n | statistics  # of the whole set, unlike its images
    row["n_reference"] = int(b["n"]) if "n" in b else None
    for name, mean, cov in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if mean in b:
            row[name] = frechet_distance(a[mean], a[cov], b[mean], b[cov])
    fewest = min(len(images), row["n_reference"] or 2048)
    if fewest < 2048:
        dist.print(f"{fewest} images, fewer than 2,048 features: the FID is too high")
    return row

def score(cfg: Config, dist: Dist):
    """Samples against a data set -> metrics.json."""
    images, beside = open_set(cfg.samples, cfg.size, dist)
    if "mu" in beside:
        dist.die(f"{cfg.samples} holds statistics: give it second, as B")
    size = cfg.size or images[np.arange(1)].shape[-1]
    meta, labels = beside.get("meta", {}), beside.get("labels")
    data = cfg.data or meta.get("data") or dist.die(f"{cfg.samples} does not name its data set: give --data")
    at = Path(cfg.samples).absolute()
    name = "" if at.name == "samples.npz" else f"{at.name}."
    out = Path(cfg.out or at.with_name(name + "metrics.json"))
    rows = {"samples": {"images": len(images)}}
    if not cfg.data or cfg.features != "fid":
        train, val = dist.rank0_first(lambda: [ImageSet(data, size, split) for split in ("train", "val")])
    if cfg.features != "classifier":
        reference = open_set(data, size, dist) if cfg.data else (train, {})  # as the model saw them
        rows["samples"] |= inception_scores(cfg, dist, images, *reference)
    if cfg.features != "fid":
        classes = list(train.classes)
        if labels is not None and not 0 <= labels.min() <= labels.max() < len(classes):
            dist.die(f"{cfg.samples} has labels {labels.min()} to {labels.max()}, {data} has {len(classes)} classes")
        if list(beside.get("classes", classes)) != classes:
            dist.print(f"{cfg.samples} and {data} have other classes: class_accuracy is left out")
            labels = None
        if len(classes) > 1:
            judge = cached_classifier(train, dist, str(out.parent))
            rows["samples"] |= judge.score(images, labels)[0]
            rows["validation_images"], _ = judge.score(val, val.labels)
        else:
            dist.print(f"{data} has one class only: no fd_classifier")

    dist.print(json.dumps(rows, indent=1))  # also if it cannot be written
    dist.save(out, rows | {"against": data, "sampling": meta, "precision": dist.precision})
    dist.print(f"wrote {out}")

def write_statistics(cfg: Config, dist: Dist):
    """Statistics of all images of a set, and up to 10,000 of them -> npz."""
    images = open_set(cfg.samples, cfg.size, dist)[0] or dist.die(f"{cfg.samples} holds no images")
    net = load_inception(cfg.weights, dist, cfg.resize)
    stats = inception_statistics(net, images, dist, cfg.batch_size, every=len(images))
    del stats["features"], stats["logits"]
    if dist.is_main:
        some = images[np.arange(0, len(images), math.ceil(len(images) / 10_000))]
        with writing(cfg.out) as file:
            np.savez(file, arr_0=some.permute(0, 2, 3, 1), n=len(images), resize=cfg.resize, **stats)
    dist.print(f"wrote {cfg.out}")

def compare_latents(cfg: Config, dist: Dist):
    """Predictors of tokenizers; mixtures all in as many dimensions -> analysis.json."""
    from tokenizer import decode_images, encode_dataset, load_tokenizer  # which imports this file

    dist, rows, latents = replace(dist, rank=0, world_size=1), {}, {}
    for path in cfg.samples.split(","):
        model, trained = load_tokenizer(path, dist.device)
        data = cfg.data or trained.data or dist.die("give --data: the tokenizer names none")
        train, val = (ImageSet(data, trained.size, split) for split in ("train", "val"))
        (z, y), (v, u) = (encode_dataset(model, images, dist) for images in (train, val))
        row = rows[path] = {"latents": list(z.shape[1:]), "data": data}
        normal = (z - z.mean((0, 1))) / z.std((0, 1)).clamp(min=1e-9)  # as the generator sees them
        normal = normal.flatten(1).to(dist.device)
        row["velocity_variance"] = {t: velocity_variance(normal, t) for t in (0.3, 0.5, 0.7)}
        z, v = latents[path] = [x.flatten(1).to(dist.device) for x in (z, v)]
        variance = torch.linalg.eigvalsh(torch.cov(z.double().T)).flip(0).cumsum(0)
        row["dimensions_for_90_percent"] = int((variance < 0.9 * variance[-1]).sum()) + 1
        if len(train.classes) > 1:
            row["linear_probe"] = linear_probe(z, y, v, u, len(train.classes), dist.device)
            row["probe_images"] = len(z), len(v)
        h = interpolate(v, z).unflatten(1, row["latents"])
        mixed = LazyImages(len(h), lambda i, model=model, h=h: decode_images(model, h[i], dist))
        if len(train.classes) > 1 and cfg.features != "fid":
            judge = cached_classifier(train, dist, cfg.out)
            row["ifd_classifier"] = frechet_distance(*judge.score(mixed)[1], *judge.score(val)[1])
        if cfg.features != "classifier":
            net = load_inception(cfg.weights, dist, cfg.resize)
            a, b = (inception_statistics(net, x, dist) for x in (mixed, val))
            row["ifid"] = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])

    dims = cfg.dims or max(row["dimensions_for_90_percent"] for row in rows.values())
    dims = min(dims, *(z.shape[1] for z, _ in latents.values()))
    for path, (z, v) in latents.items():
        rows[path]["mixture_nll_per_dimension"] = gmm_nll_curve(z, v, dims)
        rows[path]["diagonal_mixture_nll_per_dimension"] = gmm_nll_curve(
            z, v, dims, (1, 3, 10, 30, 100, 300), diagonal=True)
        dist.print(path, rows[path])
    out = Path(cfg.out) / "analysis.json"
    dist.save(out, {"dimensions": dims, "rows": rows})
    dist.print(f"wrote {out}")

def main(cfg: Config, dist: Dist):
    {"score": score, "stats": write_statistics, "latents": compare_latents}[cfg.task](cfg, dist)

if __name__ == "__main__":
    launch(main, Config, {}, __doc__, arguments(sys.argv[1:]))
