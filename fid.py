"""Frechet distances between sets of images, and what else a set of samples is scored by.

    torchrun fid.py                                      # out/samples/samples.npz against its data -> metrics.json
    torchrun fid.py A B                                  # FID, sFID, IS, precision, recall of samples A against B
    torchrun fid.py stats B --out ref.npz                # the statistics of B, to be used in its place
    python fid.py table RUNS --out DIR                   # many runs compared (README, "The finding"): table and pictures

A set is an npz with arr_0 (uint8 n x S x S x 3), a folder of images of one size, a data set by name, what data.py
packed, or as B statistics (mu, sigma, mu_s, sigma_s), like the reference files of ADM.

A Frechet distance is named after its features. `fid` uses the Inception weights of 2015 and follows ADM's evaluator;
`fd_dinov2` the class token of DINOv2 ViT-L/14; `fd_classifier` a small network trained here on the labels of the data
set itself, and says nothing about numbers published as FID.
"""
import functools
import itertools
import json
import math
import os
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import (
    LOAD_ERRORS,
    NAMED,
    PRECISIONS,
    READ_ERRORS,
    Batches,
    Images,
    Run,
    cache_dir,
    commit,
    double,
    fail,
    find_images,
    fold_layer_scale,
    in_a_line,
    launch,
    learning_rate,
    load_checkpoint,
    load_images,
    load_strictly,
    locked,
    parse_config,
    pretrained,
    read_image,
    read_json,
    save_checkpoint,
    save_curves,
    save_grid,
    setting,
    start,
    to_float,
    write_atomically,
    write_json,
)


@dataclass
class Config:
    samples: str = setting("out/samples/samples.npz", "the samples A")
    data: str = setting("", "the set B to compare with; empty: the data set named in the samples file")
    stats: str = setting("", "write the statistics of this set to --out and stop")
    table: str = setting("", "compare the runs KIND-SEED in this folder, write table and pictures to --out and stop")
    out: str = setting("", "JSON file to write, with --stats npz, with --table folder; empty: metrics.json beside the samples, or the runs")
    features: str = setting("", "any of classifier, fid, dinov2; empty: fid for `fid.py A B`, else classifier")
    resize: str = setting("tf1", "to 299 pixels for fid: tf1 as ADM, or as pytorch-fid", ("tf1", "pytorch-fid"))
    size: int = setting(0, "side of a data set given by name; 0: that of the samples")
    weights: str = setting("", "folder of feature networks; what is missing is downloaded into it; empty: the cache")
    batch_size: int = setting(100, "images a process scores at a time", least=1)
    precision: str = setting("fp32", "arithmetic of the networks; bf16 is faster and moves a FID slightly", PRECISIONS)

    def check(self):
        unknown = set(self.features.split(",")) - {"", "classifier", "fid", "dinov2"}
        if unknown:
            raise ValueError(f"--features {self.features}: classifier, fid, dinov2")


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


class Moments:
    """Sums of features and of their outer products in float64, over any number of batches and processes.

    Features are rounded to multiples of 2^-15 (3e-5): then every sum up to 8e6 is exact, and no bit of the result
    depends on the order or the size of the batches.
    """

    def __init__(self, width: int, device: torch.device):
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        self.n, self.first, self.second = zeros(1), zeros(width), zeros(width, width)

    def add(self, features: torch.Tensor) -> None:
        features = (double(features) * 2**15).round() / 2**15
        self.n += len(features)
        self.first += features.sum(0)
        self.second += features.T @ features

    def finish(self, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance (divided by n - 1) over all processes, on the CPU."""
        n, first, second = (run.sum(x).cpu() for x in (self.n, self.first, self.second))
        mean = first / n
        return mean, (second - n * torch.outer(mean, mean)) / (n - 1).clamp(min=1)


def frechet_distance(mean1, cov1, mean2, cov2) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64.

    The trace of the root is the sum of the root eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2): always real, and
    finite for covariances without full rank, which scipy's sqrtm of the product is not.
    """
    mean1, cov1, mean2, cov2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item()
    if not math.isfinite(distance):
        fail("a Frechet distance is not finite: the features or the statistics hold NaN or infinity")
    return max(0.0, distance)


# ---------------------------------------------------------------------------------------------------------------------
# FID, sFID, Inception Score, precision and recall, as ADM's evaluator defines them


def tf_resize(x: torch.Tensor, size: int = 299) -> torch.Tensor:
    """Bilinear resize of B x 3 x H x W to size x size as TensorFlow 1 does it, in float32: no half-pixel shift, no
    smoothing when shrinking, first along rows of pixels, then along columns.
    """
    for axis in (3, 2):
        n = x.shape[axis]
        at = torch.arange(size, device=x.device) * torch.tensor(n / size, dtype=torch.float32, device=x.device)
        low = at.floor().long()
        weight = (at - low).view(-1, *[1] * (3 - axis))
        a, b = x.index_select(axis, low).float(), x.index_select(axis, (low + 1).clamp(max=n - 1)).float()
        x = a + (b - a) * weight
    return x


STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "pool", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "pool")
STRIDED = ("Conv2d_1a_3x3", "Mixed_6a.branch3x3", "Mixed_6a.branch3x3dbl_3", "Mixed_7a.branch3x3_2",
           "Mixed_7a.branch7x7x3_4")
UNPADDED = (*STRIDED, "Conv2d_2a_3x3", "Conv2d_4a_3x3")
BRANCHES = {                                             # by letter of a block: chains of convolutions, concatenated
    "A": ("1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3"),
    "B": ("3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3"),
    "C": ("1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5"),
    "D": ("3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"),
    "E": ("1x1", "3x3_1 3x3_2a|3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a|3x3dbl_3b")}
BLOCKS = dict(zip(["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"], "AAABCCCCDEE", strict=True))


class Inception(nn.Module):
    """The Inception network of 2015: uint8 B x 3 x H x W -> pool B x 2048, spatial B x 2023, logits B x 1008.

    Against torchvision's inception_v3: average pools count real pixels only, the last block pools by maximum, 1008
    classes. Logits are without the bias (as the Inception Score wants them); `spatial` are the first 7 channels of
    Mixed_6d.branch1x1, flattened H, W, C. Batch norms (eps 1e-3) are folded into the convolutions.
    """

    def __init__(self, weights: dict[str, torch.Tensor], resize: str = "tf1"):
        super().__init__()
        self.resize, self.convs = resize, nn.ModuleDict()
        try:
            for key in [k for k in weights if k.endswith(".conv.weight")]:
                name, w = key[:-len(".conv.weight")], weights[key].float()
                gamma, beta, mean, variance = (weights[f"{name}.bn.{part}"].float() for part in (
                    "weight", "bias", "running_mean", "running_var"))
                scale = gamma * (variance + 1e-3).rsqrt()
                padding = (0, 0) if name in UNPADDED else (w.shape[2] // 2, w.shape[3] // 2)
                conv = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2:], 1 + (name in STRIDED), padding)
                conv.load_state_dict({"weight": w * scale[:, None, None, None], "bias": beta - mean * scale})
                self.convs[name.replace(".", "/")] = conv
            self.register_buffer("fc", weights["fc.weight"].float())
        except (KeyError, RuntimeError) as error:
            fail(f"not the weights of FID's Inception: {' '.join(str(error).split())[:200]}")
        if len(self.convs) != 94:
            fail(f"not the weights of FID's Inception: {len(self.convs)} convolutions, not 94")

    def run(self, x, names: str):
        """A chain of convolutions; a|b are two side by side."""
        for name in names.split():
            if "|" in name:
                block = name.rpartition("/")[0]
                first, second = name.split("|")
                return torch.cat([self.run(x, first), self.run(x, f"{block}/branch{second}")], 1)
            x = F.relu(self.convs[name](x), inplace=True)
        return x

    def forward(self, images):
        if self.resize == "tf1":
            x = (tf_resize(images) - 128) / 128
        else:
            x = 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        x = x.contiguous(memory_format=torch.channels_last)
        for name in STEM:
            x = F.max_pool2d(x, 3, 2) if name == "pool" else self.run(x, name)
        for block, letter in BLOCKS.items():
            at = f"Mixed_{block}/branch"
            parts = [self.run(x, " ".join(at + name for name in chain.split())) for chain in BRANCHES[letter]]
            if letter in "BD":
                parts.append(F.max_pool2d(x, 3, 2))
            else:
                pooled = (F.max_pool2d(x, 3, 1, 1) if block == "7c" else
                          F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
                parts.append(self.run(pooled, at + "_pool"))
            if block == "6d":
                spatial = parts[0][:, :7].permute(0, 2, 3, 1).flatten(1).float()
            x = torch.cat(parts, 1)
        with torch.autocast(x.device.type, enabled=False):
            pool = x.float().mean((2, 3))
            return pool, spatial, pool @ self.fc.T


def load_inception(cfg, run: Run) -> Inception:
    weights = pretrained("pt_inception-2015-12-05-6726825d", cfg.weights, "--features classifier or --no-rfid")
    return freeze(Inception(weights, getattr(cfg, "resize", "tf1")), run).to(memory_format=torch.channels_last)


class InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) over blocks of 5,000 images in file order, averaged over the blocks; streaming."""

    def __init__(self, n: int, device: torch.device, block: int = 5000, classes: int = 1008):
        self.block, count = block, -(-n // block)
        device = "cpu" if device.type == "mps" else device
        self.sums = torch.zeros(count, classes + 2, dtype=torch.float64, device=device)   # p, sum p log p, images

    def add(self, index: torch.Tensor, logits: torch.Tensor) -> None:
        log_p = double(logits).log_softmax(1)
        p = log_p.exp()
        row = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)
        self.sums.index_add_(0, index.to(p.device) // self.block, row)

    def finish(self, run: Run) -> float:
        p, negative_entropy, count = run.sum(self.sums).cpu().split([self.sums.shape[1] - 2, 1, 1], 1)
        mean = p / count
        return (negative_entropy[:, 0] / count[:, 0] - torch.special.xlogy(mean, mean).sum(1)).exp().mean().item()


def squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp(min=0)


def radii(x: torch.Tensor, k: int = 3, tile: int = 2000) -> torch.Tensor:
    """Squared distance of each point to its k-th nearest other point; duplicates count as points."""
    if len(x) <= k:
        fail(f"precision and recall need more than {k} images in each set, not {len(x)}")
    return torch.cat([squared_distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(tile)])


def precision_recall(reference: torch.Tensor, samples: torch.Tensor, k: int = 3, tile: int = 2000) -> tuple:
    """Share of samples within the radius of some reference point, and of references within that of some sample
    (Kynkaanniemi 2019), all points of both sets; float32 in tiles. (ADM computes in float16: within 0.002.)
    """
    def covered(points, centres):
        limits, hits = radii(centres, k, tile), 0
        for part in points.split(tile):
            inside = torch.zeros(len(part), dtype=torch.bool, device=part.device)
            for c, r in zip(centres.split(tile), limits.split(tile)):
                inside |= (squared_distances(part, c) <= r).any(1)
            hits += inside.sum().item()
        return hits / len(points)

    return covered(samples, reference), covered(reference, samples)


@torch.no_grad()
def inception_statistics(net: Inception, images, run: Run, batch: int = 100, keep: int = 0) -> dict:
    """mu, sigma, mu_s, sigma_s and the Inception Score of uint8 images; pool features of at most `keep` of them."""
    n, pool, spatial = len(images), Moments(2048, run.device), Moments(2023, run.device)
    chosen = evenly(n, keep)
    score, kept = InceptionScore(n, run.device), torch.zeros(len(chosen), 2048, device=run.device)
    for index, x in in_batches(images, run, batch):
        with run.autocast():
            p, s, logits = net(x)
        pool.add(p)
        spatial.add(s)
        score.add(index, logits)
        wanted = torch.isin(index, chosen)
        kept[torch.searchsorted(chosen, index[wanted]).to(run.device)] = p[wanted.to(run.device)]
    (mu, sigma), (mu_s, sigma_s) = pool.finish(run), spatial.finish(run)
    found = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "inception_score": score.finish(run), "n": n}
    return found | ({"features": run.sum(kept)} if keep else {})


def evenly(n: int, most: int) -> torch.Tensor:
    """Numbers of at most `most` of n images, evenly spaced."""
    return torch.from_numpy(np.linspace(0, n - 1, min(n, most)).astype(int))


def in_batches(images, run: Run, batch: int):
    """This process's share as (indices, uint8 B x 3 x H x W on the device); files are read while a batch is in use."""
    parts = [torch.arange(i, min(i + batch, len(images))) for i in range(batch * run.rank, len(images),
                                                                         batch * run.world)]
    bar = tqdm(total=len(images), desc="features", unit=" images", leave=False, disable=None if run.main else True)
    with ThreadPoolExecutor(1) as pool, bar:
        if isinstance(images, Made):                     # networks at work: not in another thread
            found = (images[index.numpy()] for index in parts)
        else:
            found = ahead(pool, lambda index: images[index.numpy()], parts)
        for index, x in zip(parts, found):
            yield index, x.to(run.device)
            bar.update(len(index) * run.world)


def ahead(pool: ThreadPoolExecutor, work: Callable, parts: list):
    """Results of work(part) in order, the next one under way while one is in use."""
    waiting = [pool.submit(work, part) for part in parts[:1]]
    for i in range(len(parts)):
        waiting += [pool.submit(work, part) for part in parts[i + 1:i + 2]]
        yield waiting.pop(0).result()


# ---------------------------------------------------------------------------------------------------------------------
# Frozen networks with public weights: vision transformers and LPIPS

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of RGB in 0..1
RENAMED = {                                              # names in the public files -> those of torch's own layer
    "dino": (("blocks.", "layers."), ("attn.qkv.", "self_attn.in_proj_"), ("attn.proj", "self_attn.out_proj"),
             ("mlp.fc", "linear"), ("patch_embed.proj", "patch_embed")),
    "siglip": (("vision_model.", ""), ("encoder.", ""), ("layer_norm", "norm"), ("mlp.fc", "linear"),
               ("post_layernorm", "norm"), ("embeddings.patch_embedding", "patch_embed"),
               ("embeddings.position_embedding.weight", "pos_embed"))}
RENAMED["dinov2"] = RENAMED["dino"]


class VisionTransformer(nn.Module):
    """DINO, DINOv2 (with registers or without) or SigLIP's vision tower, built and filled from its public weights.

    One pre-norm layer serves all three. They differ in the tokens before the patches, in GELU, in the statistics of
    their input and in how a table of positions is stretched to another grid. Heads default to 64 channels each.
    """

    def __init__(self, weights: dict[str, torch.Tensor], kind: str, heads: int = 0):
        super().__init__()
        w = {}
        for key, value in weights.items():
            if key.startswith(("text_model.", "logit_", "vision_model.head.")) or key.endswith(("_ids", "mask_token")):
                continue                                 # SigLIP's text half and pooling; what only training used
            for old, new in RENAMED[kind]:
                key = key.replace(old, new)
            w[key] = value.float()
        try:
            fold_layer_scale(w, "self_attn.out_proj", "linear2")
            for key in [k for k in w if ".q_proj." in k]:
                parts = [w.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
                w[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
            width, _, self.patch, _ = w["patch_embed.weight"].shape
            pos = w.pop("pos_embed").reshape(1, -1, width)
            prefix = pos[:, :0]
            if kind != "siglip":
                prefix, pos = w.pop("cls_token") + pos[:, :1], pos[:, 1:]
            registers = w.pop("register_tokens", prefix[:, :0])
        except KeyError as error:
            fail(f"not {kind} weights: {error} is missing")
        except (ValueError, RuntimeError, IndexError) as error:
            fail(f"not {kind} weights: {str(error).splitlines()[0]}")
        self.kind, self.width, self.prefix, self.registers = kind, width, 1 - (kind == "siglip"), registers.shape[1]
        # DINO was trained with the exact GELU; the discriminators built on it use the other one, and so do we
        gelu = F.gelu if kind == "dinov2" else functools.partial(F.gelu, approximate="tanh")
        with torch.device("meta"):
            self.patch_embed = nn.Conv2d(3, width, self.patch, self.patch)
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(width, heads or max(1, width // 64), 4 * width, 0, gelu, 1e-6,
                                           batch_first=True, norm_first=True)
                for _ in {k.split(".")[1] for k in w if k.startswith("layers.")})
            self.norm = nn.LayerNorm(width, 1e-6)
        load_strictly(self, w, f"{kind} weights")
        for name, values in zip(("mean", "std"), ((0.5,) * 3,) * 2 if kind == "siglip" else IMAGENET):
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.register_buffer("pos_embed", pos)
        self.register_buffer("prefix_tokens", torch.cat([prefix, registers], 1))

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """The table of patch positions, 1 x rows*columns x D, stretched as the network's own code does it."""
        m = math.isqrt(self.pos_embed.shape[1])
        if rows == columns == m:
            return self.pos_embed
        table = self.pos_embed.unflatten(1, (m, m)).permute(0, 3, 1, 2)
        if self.kind == "siglip" or self.registers:      # DINOv2 with registers smooths, SigLIP does not
            table = F.interpolate(table, (rows, columns), mode="bicubic", antialias=bool(self.registers))
        else:                                            # the kernel takes this scale, not rows / m
            scale = (rows + 0.1) / m, (columns + 0.1) / m
            table = F.interpolate(table, scale_factor=scale, mode="bicubic")
        return table.flatten(2).transpose(1, 2)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images B x 3 x h x w -> class token, registers, patches: the input of the first layer."""
        x = self.patch_embed(x)
        tokens = x.flatten(2).transpose(1, 2) + self.positions(*x.shape[-2:])
        return torch.cat([self.prefix_tokens.expand(len(x), -1, -1), tokens], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images -> tokens after the last norm, B x (prefix + registers + patches) x D."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def normalise(self, image: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] -> the network's own input statistics."""
        return (image * 0.5 + 0.5 - self.mean) / self.std

    @torch.no_grad()
    def patch_features(self, image: torch.Tensor, grid: int) -> torch.Tensor:
        """B x grid*grid x D of images in [-1, 1], which are resized so that the network has as many patches."""
        size = grid * self.patch
        if image.shape[-1] != size:
            image = F.interpolate(image, (size, size), mode="bicubic", antialias=True)
        return self(self.normalise(image))[:, self.prefix + self.registers:].float()


class Lpips(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al. 2018): a distance of images in [-1, 1], B values; deterministic, no dropout."""

    PLAN = (64, 64, "tap", "pool", 128, 128, "tap", "pool", 256, 256, 256, "tap", "pool", 512, 512, 512, "tap", "pool",
            512, 512, 512, "tap")

    def __init__(self, vgg: dict[str, torch.Tensor], heads: dict[str, torch.Tensor]):
        super().__init__()
        self.convs, self.heads = nn.ModuleList(), nn.ParameterList()
        numbers = sorted({int(key.split(".")[1]) for key in vgg if key.startswith("features.")})
        try:
            for number in numbers:
                weight = vgg[f"features.{number}.weight"].float()
                self.convs.append(nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1))
                self.convs[-1].load_state_dict({"weight": weight, "bias": vgg[f"features.{number}.bias"].float()})
            self.heads.extend(heads[f"lin{i}.model.1.weight"].float() for i in range(5))
        except (KeyError, RuntimeError) as error:
            fail(f"not the weights of VGG16 and LPIPS: {' '.join(str(error).split())[:200]}")
        if [c.out_channels for c in self.convs] != [c for c in self.PLAN if isinstance(c, int)]:
            fail("not the weights of VGG16: its convolutions have other widths")
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The five tapped activations, each of unit length over its channels."""
        x, taps, convs = (x - self.shift) / self.scale, [], iter(self.convs)
        x = x.contiguous(memory_format=torch.channels_last)
        for step in self.PLAN:
            if step == "tap":
                taps.append(x.float() / (x.float().square().sum(1, keepdim=True).sqrt() + 1e-10))
            else:
                x = F.max_pool2d(x, 2) if step == "pool" else F.relu(next(convs)(x))
        return taps

    def layers(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The five parts of the distance, B x 5."""
        return torch.stack([(head * (f - g).square()).sum(1).mean((1, 2))
                            for head, f, g in zip(self.heads, self.features(a), self.features(b))], 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.layers(a, b).sum(1)


def load_lpips(folder: str, hint: str = "--lpips 0") -> Lpips:
    return Lpips(pretrained("vgg16-397923af", folder, hint), pretrained("lpips_vgg", folder, hint))


def freeze(net: nn.Module, run: Run) -> nn.Module:
    """On the device, without gradients; matrices once and for all in the precision they are multiplied in."""
    net = net.to(run.device).eval().requires_grad_(False)
    for m in net.modules() if run.precision == "bf16" else ():
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            m.to(torch.bfloat16)
    return net


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each pair of uint8 images; identical ones count as 100 dB."""
    error = (double(a) - double(b)).square().flatten(1).mean(1)
    return (20 * math.log10(255) - 10 * error.log10()).clamp(max=100)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each pair of uint8 images: 11-pixel Gaussian window of deviation 1.5 (Wang 2004)."""
    a, b = double(a) / 255, double(b) / 255
    w = torch.exp(-0.5 * ((torch.arange(11, device=a.device, dtype=torch.float64) - 5) / 1.5) ** 2)
    w = (torch.outer(w, w) / w.sum() ** 2)[None, None]

    def blur(x):
        return F.conv2d(x.flatten(0, 1)[:, None], w).view(*x.shape[:2], x.shape[2] - 10, x.shape[3] - 10)

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return score.flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# Latents: what a linear model, the neighbours and Gaussian mixtures make of them (paper, Fig. 2a, 5a and App. B.3)


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


def knn_accuracy(train_z, train_y, val_z, val_y, classes: int, k: int = 10) -> float:
    """Share of validation latents whose class is the commonest among their k nearest standardised training latents."""
    z, v = train_z.flatten(1), val_z.flatten(1)
    mean, std = z.mean(0), z.std(0) + 1e-6
    z, v = (z - mean) / std, (v - mean) / std
    right = 0
    for part, y in zip(v.split(500), val_y.split(500)):
        near = train_y[squared_distances(part, z).topk(k, largest=False).indices]
        right += (F.one_hot(near, classes).sum(1).argmax(1) == y).sum().item()
    return right / len(val_y)


def principal_components(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, axes (columns, largest variance first) and the share of variance that the first 1, 2, ... axes explain."""
    z = z.double()
    values, vectors = torch.linalg.eigh(torch.cov(z.T))
    values = values.flip(0).clamp(min=0)
    return z.mean(0), vectors.flip(1), values.cumsum(0) / values.sum()


def mixture_log_prob(x: torch.Tensor, weights, means, covariances) -> torch.Tensor:
    """log of weight times density of each point under each Gaussian, N x K."""
    inverse = torch.linalg.inv(torch.linalg.cholesky(covariances))               # K x d x d
    parts = []
    for w, m, p in zip(weights, means, inverse):
        squares = ((x - m) @ p.T).square().sum(1)
        parts.append(w.log() + p.diagonal().log().sum() - 0.5 * (squares + x.shape[1] * math.log(2 * math.pi)))
    return torch.stack(parts, 1)


def fit_mixture(x: torch.Tensor, k: int, seed: int = 0, iterations: int = 100, floor: float = 1e-3) -> tuple:
    """Weights, means and full covariances of k Gaussians by EM in float64, started by k-means++ and ten k-means steps.

    `floor` is added to the variances; the fit ends when the log-likelihood per dimension gains less than 1e-4.
    """
    x, g = x.double(), torch.Generator().manual_seed(seed)
    if len(x) < 2 * k:
        fail(f"{len(x)} latents are too few for a mixture of {k} Gaussians")
    centres = x[torch.randint(len(x), (1,), generator=g)]
    while len(centres) < k:
        nearest = squared_distances(x, centres).min(1).values
        centres = torch.cat([centres, x[torch.multinomial(nearest.cpu() + 1e-12, 1, generator=g)]])
    for _ in range(10):
        member = F.one_hot(squared_distances(x, centres).argmin(1), k).double()
        count = member.sum(0)[:, None]
        centres = torch.where(count > 0, member.T @ x / count.clamp(min=1), centres)
    responsibility, before = member, -math.inf
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        count = responsibility.sum(0) + 1e-9
        weights, means = count / count.sum(), responsibility.T @ x / count[:, None]
        covariances = torch.stack([((x - m) * r[:, None]).T @ (x - m) / n for m, r, n in zip(
            means, responsibility.T, count)]) + floor * eye
        joint = mixture_log_prob(x, weights, means, covariances)
        total = joint.logsumexp(1)
        responsibility = (joint - total[:, None]).exp()
        if total.mean() - before < 1e-4 * x.shape[1]:
            break
        before = total.mean()
    return weights, means, covariances


def mixture_curve(train_z, val_z, dims: int, sizes=(1, 2, 4, 8, 16, 32), seed: int = 0) -> dict[int, float]:
    """Held-out negative log-likelihood per dimension of growing mixtures (App. B.3): PCA to `dims`, standardise."""
    mean, axes, _ = principal_components(train_z)
    z, v = ((x.double() - mean) @ axes[:, :dims] for x in (train_z, val_z))
    std = z.std(0).clamp(min=1e-9)                        # a dead channel stays where it is
    curve = {}
    for k in tqdm(sizes, desc="mixtures", leave=False, disable=None):
        mixture = fit_mixture(z / std, k, seed)
        curve[k] = -mixture_log_prob(v / std, *mixture).logsumexp(1).mean().item() / dims
    return curve


# ---------------------------------------------------------------------------------------------------------------------
# Features from the data set's own labels


class Classifier(nn.Module):
    """A small convolutional network; gives its pooled features (B x 192) and class logits for uint8 images."""

    WIDTH = 192

    def __init__(self, classes: int):
        super().__init__()
        widths = (3, 32, 64, 128, self.WIDTH)
        self.stages = nn.Sequential(*(nn.Sequential(
            nn.Conv2d(i, o, 3, 1 if i == 3 else 2, 1, bias=False), nn.BatchNorm2d(o), nn.GELU()
        ) for i, o in itertools.pairwise(widths)))
        self.head = nn.Linear(self.WIDTH, classes)

    def maps(self, x):
        """The last convolution of images in [-1, 1]: B x 192 x S/8 x S/8, with S at most 64."""
        if x.shape[-1] > 64:
            x = F.interpolate(x, (64, 64), mode="area")
        return self.stages(x.contiguous(memory_format=torch.channels_last))

    def forward(self, x):
        features = self.maps(to_float(x) if x.dtype == torch.uint8 else x).mean((2, 3))
        return features.float(), self.head(features).float()

    @torch.no_grad()
    def patch_features(self, x: torch.Tensor, grid: int) -> torch.Tensor:
        """B x grid*grid x 192 of images in [-1, 1]: the map, averaged over patches, or repeated."""
        return F.adaptive_avg_pool2d(self.maps(x), grid).flatten(2).transpose(1, 2).float()


def train_classifier(train: Images, run: Run, seed: int = 0, steps: int = 800, batch: int = 100) -> Classifier:
    """Fit the classifier to the training labels, in one process; deterministic on one kind of device.

    Batches are blurred (shrunk to 1/2, 1/3 or 1/4 and enlarged) in three of four steps, and noise is added, so that it
    knows an object by its form, as a person does, and not by single sharp pixels.
    """
    torch.manual_seed(seed)
    net = Classifier(len(train.classes)).to(run.device, memory_format=torch.channels_last)
    params = list(net.parameters())
    optimizer = torch.optim.AdamW(params, 5e-3, weight_decay=0.05)
    batches = Batches(train, batch, seed, Run(0, 1, run.device, run.precision))
    for step in tqdm(range(steps), desc="training the classifier", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * learning_rate(step, steps, steps // 10, "linear")
        x, y = batches(step)
        if step % 4:
            small = max(1, round(x.shape[-1] / (step % 4 + 1)))
            x = F.interpolate(F.interpolate(x, (small, small), mode="area"), x.shape[-2:], mode="bicubic")
        g = run.generator(seed, 9, step)
        amount = 0.15 * torch.rand(len(x), 1, 1, 1, generator=g, device=run.device)
        x = x + amount * torch.randn(x.shape, generator=g, device=run.device)
        with run.autocast():
            loss = F.cross_entropy(net(x)[1], y, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def keep_classifier(train: Images, run: Run, seed: int, more: Callable = lambda net, alone: {}) -> tuple:
    """(the classifier of a data set, what more(it, a run of one process) found), made once and kept in the cache."""
    if len(train.classes) < 2:
        fail("a classifier needs a data set with classes; this one has a single class")
    path = cache_dir() / f"classifier-2-{seed}-{train.fingerprint}.pt"

    def make():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                run.print(f"training a small classifier (seed {seed}), once for this data set")
                alone = Run(0, 1, run.device, run.precision)
                net = train_classifier(train, alone, seed)
                save_checkpoint(path, {"kind": "classifier", "net": net.state_dict(), **more(net, alone)})

    run.first(make)
    state = load_checkpoint(path, "classifier")
    net = Classifier(len(train.classes))
    net.load_state_dict(state.pop("net"))
    return net.to(run.device, memory_format=torch.channels_last).eval().requires_grad_(False), state


class Made:
    """n images that come into being when they are asked for: make(index) -> uint8 B x 3 x S x S."""

    def __init__(self, n: int, make):
        self.n, self.make = n, make

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return self.make(index)


@torch.no_grad()
def score_images(net: Classifier, images, labels: torch.Tensor | None, run: Run, batch: int = 500) -> tuple:
    """Mean and covariance of the features of uint8 images (tensor, Images, Made), and the share of labels known."""
    moments, right = Moments(net.WIDTH, run.device), torch.zeros(1, device=run.device)
    for index, x in in_batches(images, run, batch):
        features, logits = net(x)
        moments.add(features)
        if labels is not None:
            right += (logits.argmax(1) == labels[index].to(run.device)).sum()
    return *moments.finish(run), run.sum(right).item() / len(images)


class Judge:
    """The classifier of a data set, the statistics of its training images, and the validation images' own score."""

    def __init__(self, train: Images, val: Images, run: Run):
        def statistics(net, alone):
            mean, cov, _ = score_images(net, train, None, alone)
            mean_val, cov_val, accuracy = score_images(net, val, val.labels, alone)
            return {"mean": mean, "cov": cov, "reference": {
                "fd_classifier": frechet_distance(mean, cov, mean_val, cov_val), "class_accuracy": accuracy,
                "images": len(val)}}

        self.run, (self.net, state) = run, keep_classifier(train, run, 0, statistics)
        self.mean, self.cov, self.reference = state["mean"], state["cov"], state["reference"]

    def score(self, images, labels: torch.Tensor | None = None) -> tuple[dict, tuple]:
        """(fd_classifier of uint8 images against the training images and the share of their labels recognised; the mean
        and covariance of their features, for distances to other images).
        """
        mean, cov, accuracy = score_images(self.net, images, labels, self.run)
        facts = {"fd_classifier": frechet_distance(self.mean, self.cov, mean, cov), "images": len(images)}
        return facts | ({"class_accuracy": accuracy} if labels is not None else {}), (mean, cov)

    def __call__(self, images, labels: torch.Tensor | None = None) -> dict:
        return self.score(images, labels)[0]


def npz_array(path: Path, name: str) -> np.ndarray:
    """An array of an npz file; mapped, not read, where it is stored uncompressed."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
    if info.compress_type == zipfile.ZIP_STORED:
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)           # of the member's own header: lengths of its name and extras
            file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read[version](file)
            if not fortran and not dtype.hasobject and math.prod(shape):
                return np.memmap(path, dtype, "r", file.tell(), shape)
    with np.load(path) as file:
        return file[name]


def load_samples(path: Path, reference: bool = False) -> tuple[Images, torch.Tensor | None, dict]:
    """Images of an npz file, their labels or None, and the facts sample.py stored with them."""
    try:
        pixels = npz_array(path, "arr_0")
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
            raise ValueError(f"arr_0 is {pixels.dtype} {pixels.shape}")
        with np.load(path) as file:
            if "mu" in file and not reference:
                raise ValueError("it holds the statistics of a reference: give it second, as B")
            labels = torch.from_numpy(file["labels"]) if "labels" in file else None
            facts = json.loads(str(file["facts"])) if "facts" in file else {}
        if labels is not None and labels.shape != (len(pixels),):
            raise ValueError(f"{tuple(labels.shape)} labels for {len(pixels)} images")
    except FileNotFoundError:
        fail(f"{path}: no such file; sample.py writes it")
    except LOAD_ERRORS as error:
        fail(f"{path} is not a file of samples ({in_a_line(error)}); arr_0 must be uint8 n x S x S x 3")
    return Images(pixels, torch.zeros(len(pixels)), ["all"], ""), labels, facts


class Folder:
    """Image files of one size below a folder, read by a few threads when they are asked for."""

    def __init__(self, root: Path):
        self.root, self.names, self.pool, self.shapes = root, find_images(root), ThreadPoolExecutor(4), set()
        if not self.names:
            fail(f"{root}: no images found")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        try:
            images = list(self.pool.map(lambda i: read_image(self.root / self.names[i], 0), index))
        except READ_ERRORS as error:
            fail(f"{self.root}: an image is unreadable: {error}")
        self.shapes |= {image.shape for image in images}
        if len(self.shapes) > 1:
            fail(f"{self.root}: images of several sizes, as {min(self.shapes)} and {max(self.shapes)}; crop them to "
                 "one: data.py --data DIR --size S --out PACKED, and give PACKED")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def open_set(name: str, size: int, run: Run) -> tuple:
    """Images of a set (or None) and its stored statistics (or {}): see the head of this file for what it may be."""
    path = Path(name)
    if path.suffix == ".npz":
        try:
            with np.load(path) as file:
                names = [k for k in ("mu", "sigma", "mu_s", "sigma_s") if k in file]
                stored = {k: torch.from_numpy(file[k]).double() for k in names}
                pixels = "arr_0" in file
                n = int(file["n"]) if "n" in file else 0
            for mean, cov, width in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
                if (mean in stored or cov in stored or mean == "mu" and stored) and not (
                        stored[mean].shape == (width,) and stored[cov].shape == (width, width)):
                    raise ValueError(f"{mean} and {cov} must have {width} and {width} x {width} numbers")
            if not all(value.isfinite().all() for value in stored.values()):
                raise ValueError("its statistics are not finite")
            if not stored and not pixels:
                raise ValueError("neither arr_0 nor mu and sigma are in it")
        except FileNotFoundError:
            fail(f"{path}: no such file")
        except LOAD_ERRORS as error:
            fail(f"{path} is not a file of images or statistics ({in_a_line(error)})")
        return load_samples(path, True)[0] if pixels else None, stored | ({"n": n} if stored else {})
    try:
        packed = json.loads((path / "meta.json").read_text()) if (path / "meta.json").is_file() else {}
        packed = packed if "fingerprint" in packed else {}
        size = packed["size"] if packed else size
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"{path / 'meta.json'} is not that of a packed data set ({type(error).__name__})")
    if name in NAMED or packed:
        if not size:
            fail(f"{name} is a data set without a size of its own: give --size")
        return run.first(lambda: load_images(name, size, "train")), {}
    if not path.is_dir():
        fail(f"{name}: no such file or folder, and none of {', '.join(NAMED)}")
    return Folder(path), {}


def compare(cfg: Config, run: Run, a, b, stored: dict) -> dict:
    """FID, sFID, IS, precision and recall, or fd_dinov2, of images a against images b or stored statistics.

    Precision and recall take 10,000 evenly spaced images of a larger b, as many as ADM's reference files hold.
    """
    metrics, wanted = {}, cfg.features.split(",")
    if "dinov2" in wanted and b is None:
        fail("--features dinov2 needs the images of the set B, not its Inception statistics")
    if "fid" in wanted:
        net = load_inception(cfg, run)
        ours = inception_statistics(net, a, run, cfg.batch_size, keep=len(a) if b is not None else 0)
        theirs = inception_statistics(net, b, run, cfg.batch_size, keep=10_000) if b is not None else {}
        against = theirs | stored                        # what is stored is of the whole set, its images may be a few
        metrics["fid"] = frechet_distance(ours["mu"], ours["sigma"], against["mu"], against["sigma"])
        if "mu_s" in against:
            metrics["sfid"] = frechet_distance(ours["mu_s"], ours["sigma_s"], against["mu_s"], against["sigma_s"])
        metrics["inception_score"] = ours["inception_score"]
        if theirs:
            metrics["precision"], metrics["recall"] = precision_recall(theirs["features"], ours["features"])
            metrics["n_reference_precision"] = len(theirs["features"])
        metrics |= {"resize": cfg.resize, "n_reference": int(against["n"]) or None,
                    "inception": "pt_inception-2015-12-05-6726825d"}
    if "dinov2" in wanted:
        net = VisionTransformer(pretrained("dinov2_vitl14_pretrain", cfg.weights, "--features fid"), "dinov2")
        both = [dino_moments(freeze(net, run), images, run, cfg.batch_size) for images in (a, b)]
        metrics["fd_dinov2"] = frechet_distance(*both[0], *both[1])
    return metrics


@torch.no_grad()
def dino_moments(net: VisionTransformer, images, run: Run, batch: int) -> tuple:
    """Mean and covariance of the class token of images resized to 224 (bicubic, antialiased)."""
    moments = Moments(net.width, run.device)
    for _, x in in_batches(images, run, batch):
        x = F.interpolate(to_float(x), (224, 224), mode="bicubic", antialias=True)
        with run.autocast():
            moments.add(net(net.normalise(x))[:, 0].float())
    return moments.finish(run)


def write_statistics(cfg: Config, run: Run) -> None:
    """fid.py stats X --out ref.npz: mu, sigma, mu_s, sigma_s of all images, and up to 10,000 of them for precision."""
    images, _ = open_set(cfg.stats, cfg.size, run)
    if images is None or not cfg.out.endswith(".npz"):
        fail(f"fid.py stats {cfg.stats} --out REF.npz: the set must have images, and --out must end in .npz")
    found = inception_statistics(load_inception(cfg, run), images, run, cfg.batch_size)
    if run.main:
        some = evenly(len(images), 10_000).numpy()
        pixels = np.concatenate([images[part].permute(0, 2, 3, 1).numpy() for part in np.array_split(
            some, -(-len(some) // 500))])
        part, out = Path(cfg.out + ".part.npz"), Path(cfg.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, arr_0=pixels, n=len(images), **{k: found[k].numpy() for k in ("mu", "sigma", "mu_s", "sigma_s")})
        part.replace(out)
    run.print(f"wrote {cfg.out}: statistics of {len(images)} images of {cfg.stats} ({cfg.resize} resize, "
              f"{run.precision}), and up to 10,000 of them")
    run.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Many runs side by side: one JSON a run, the table, the pictures. A run is a folder KIND-SEED with tokenizer/, diffusion/
# (evaluated without guidance), analysis/, guided/, stage1/ (samples decoded by stage 1) and step-N/ (earlier models)

MEASURES = {                                             # rows of the table: key, digits, factor
    "reconstruction: PSNR, stage 1": ("stage1.psnr", 2, 1),
    "reconstruction: PSNR, stage 2": ("stage2.psnr", 2, 1),
    "reconstruction: rFD, stage 1": ("stage1.fd_classifier", 2, 1),
    "reconstruction: rFD, stage 2": ("stage2.fd_classifier", 2, 1),
    "samples: gFD": ("samples.fd_classifier", 2, 1),
    "samples: distance to reconstructions": ("samples.fd_to_reconstructions", 2, 1),
    "samples: gFD, decoder of stage 1": ("samples_stage1.fd_classifier", 2, 1),
    "samples: gFD, guided": ("samples_guided.fd_classifier", 2, 1),
    "samples: recognised, %": ("samples.class_accuracy", 1, 100),
    "samples: recognised, guided, %": ("samples_guided.class_accuracy", 1, 100),
    "diffusion loss at the end": ("diffusion_loss", 3, 1),
    "latents: linear probe, %": ("linear_probe", 1, 100),
    "latents: k-NN, %": ("knn_accuracy", 1, 100),
    "latents: directions for 90 % of the variance": ("dimensions_for_90_percent", 0, 1),
    "latents: NLL per dimension, 8 Gaussians": ("mixture_nll_per_dimension.8", 3, 1),
    "latents: NLL per dimension, 32 Gaussians": ("mixture_nll_per_dimension.32", 3, 1),
}
PARTS = ("tokenizer/metrics.json", "analysis/analysis.json", "diffusion/metrics.json", "stage1/metrics.json",
         "guided/metrics.json")
LOSSES = "diffusion/log.jsonl"                           # whose last line holds the loss at the end


def number(row: dict, key: str) -> float:
    """row["a"]["b"] for the key "a.b"."""
    return float(functools.reduce(lambda found, name: found[name], key.split("."), row))


def collect(folder: Path) -> dict:
    """What the commands left in one run's folder, as one dict; `setup` must be the same in runs that are compared."""
    try:
        kind, _, seed = folder.name.rpartition("-")
        tok, analysis, gen, stage1, guided = (json.loads((folder / part).read_text()) for part in PARTS)
        (latents,) = analysis["rows"].values()
        log = [json.loads(line) for line in (folder / LOSSES).read_text().splitlines()]
        by_step = {int(path.parent.name[5:]): json.loads(path.read_text())["samples"]["fd_classifier"]
                   for path in folder.glob("step-*/metrics.json")} | {gen["steps"]: gen["rows"]["samples"]["fd_classifier"]}
        sampling = {k: v for k, v in gen["sampling"].items() if k != "seed"}
        row = {"kind": kind, "seed": int(seed), "commit": [tok["commit"], gen["commit"], guided["commit"]],
               "setup": {"steps": tok["steps"], "stage2_steps": tok["stage2_steps"], "diffusion_steps": gen["steps"],
                         "precision": tok["precision"], "data": latents["data"], "latents": latents["latents"],
                         "dimensions": analysis["dimensions"], "images": gen["rows"]["samples"]["images"],
                         "sampling": sampling, "guided": guided["sampling"]["guidance"],
                         "scored_at_steps": sorted(by_step)},
               "stage1": tok["stage1"], "stage2": tok["stage2"], "linear_probe": tok["linear_probe"],
               **{k: latents[k] for k in ("knn_accuracy", "dimensions_for_90_percent", "mixture_nll_per_dimension")},
               "samples": gen["rows"]["samples"], "samples_guided": guided["samples"], "samples_stage1": stage1["samples"],
               "real_validation_images": gen["rows"]["real validation images"], "diffusion_loss": log[-1]["loss"],
               "fd_classifier_by_step": {str(step): by_step[step] for step in sorted(by_step)}}
        for key, *_ in MEASURES.values():
            number(row, key)
    except LOAD_ERRORS as error:
        fail(f"{folder} is not a whole run KIND-SEED as the README lays it out ({in_a_line(error)}); make it anew, or move it away")
    for name, of in (("stage1", stage1), ("guided", guided)):
        if of["sampling"].get("training_steps") != gen["steps"]:
            fail(f"{folder / name}: samples of a model of {of['sampling'].get('training_steps')} steps, not {gen['steps']}: "
                 "remove it and run again")
    return row


def table(cfg: Config) -> None:
    """fid.py table RUNS --out DIR: DIR/KIND-SEED.json, table.md, and four pictures.

    RUNS may also be such a DIR: then table and pictures are made from its JSON files (samples.png needs the samples).
    """
    runs, out = Path(cfg.table), Path(cfg.out or cfg.table)
    if not runs.is_dir():
        fail(f"{runs}: no such folder")
    folders, rows = sorted(path for path in runs.glob("*-*") if path.is_dir()), []
    for path in folders:
        if missing := [part for part in (*PARTS, LOSSES) if not (path / part).exists()]:
            print(f"{path} is left out: it has no {missing[0]}")
        else:
            rows.append(collect(path))
    if not folders:
        rows = [read_json(path, "kind", "seed", "setup") for path in sorted(runs.glob("*-*.json"))]
    if not rows:
        fail(f"{runs} holds no finished run KIND-SEED, nor KIND-SEED.json")
    for row in rows:
        if row["setup"] != rows[0]["setup"]:
            fail(f"{row['kind']}-{row['seed']} and {rows[0]['kind']}-{rows[0]['seed']} were made with other steps, "
                 f"images or samplers: {row['setup']} and {rows[0]['setup']}")
    out.mkdir(parents=True, exist_ok=True)
    for row in rows if folders else ():
        write_json(out / f"{row['kind']}-{row['seed']}.json", row)
    kinds = by_kind(rows)
    write_atomically(out / "table.md", markdown(kinds).encode())

    def curves(name):
        """Per kind: the mean over its seeds at each x of the dict `name`."""
        return {kind: [(int(x), float(np.mean([row[name][x] for row in of]))) for x in of[0][name]] for kind, of in kinds.items()}

    save_curves(out / "probe.png", {kind: [(100 * row["linear_probe"], row["samples"]["fd_classifier"]) for row in of]
                                    for kind, of in kinds.items()},
                "linear probe of the latents, %", "gFD without guidance, a point per seed", join=False)
    save_curves(out / "mixtures.png", curves("mixture_nll_per_dimension"), "Gaussians in the mixture",
                "held-out negative log-likelihood per dimension, mean of the seeds", log_x=True)
    save_curves(out / "training.png", curves("fd_classifier_by_step"), "training steps of the generator",
                "gFD without guidance, mean of the seeds")
    firsts = {kind: path for kind, of in kinds.items()
              if (path := runs / f"{kind}-{of[0]['seed']}/guided/samples.npz").exists()}
    if firsts:
        images = [load_samples(path)[0] for path in firsts.values()]
        shown = min(10, *map(len, images))
        save_grid(out / "samples.png", torch.cat([of[np.arange(shown)] for of in images]), shown,
                  names=[kind for kind in firsts for _ in range(shown)])
    print(markdown(kinds), f"wrote {out}/table.md, probe.png, mixtures.png, training.png"
          f"{', samples.png' if firsts else ''} of {len(rows)} runs", sep="\n")


def by_kind(rows: list[dict]) -> dict[str, list]:
    """Rows of the same kind together, those without masks first."""
    kinds = sorted({row["kind"] for row in rows}, key=lambda kind: (kind.startswith("mae"), kind))
    return {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}


def markdown(kinds: dict[str, list]) -> str:
    """The table: mean over seeds and, after ±, the standard deviation (n - 1) of each measure."""
    lines = ["| | " + " | ".join(kinds) + " |", "|---" * (1 + len(kinds)) + "|"]
    for title, (key, digits, factor) in MEASURES.items():
        cells = []
        for rows in kinds.values():
            values = factor * np.array([number(row, key) for row in rows])
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, f"| seeds | {' | '.join(str(len(rows)) for rows in kinds.values())} |"]) + "\n"


def arguments(argv: list[str]) -> list[str]:
    """`stats X ...`, `table X ...` and `A B ...` as flags."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if len(words) == 2 and words[0] in ("stats", "table"):
        return [f"--{words[0]}", words[1], *argv[2:]]
    if len(words) == 2:
        return ["--samples", words[0], "--data", words[1], *([] if "--features" in argv else ["--features", "fid"]),
                *argv[2:]]
    return argv


def main():
    cfg, began = parse_config(Config, {}, __doc__, arguments(sys.argv[1:])), time.time()
    if cfg.table:
        return table(cfg)
    run = start(cfg)
    if cfg.stats:
        return write_statistics(cfg, run)
    cfg.features = cfg.features or "classifier"
    if Path(cfg.samples).is_dir() or cfg.samples in NAMED:
        (images, _), labels, facts = open_set(cfg.samples, cfg.size, run), None, {}
    else:
        images, labels, facts = load_samples(Path(cfg.samples))
    data, size = cfg.data or facts.get("data", ""), cfg.size or images[np.arange(1)].shape[-1]
    if not data:
        fail(f"{cfg.samples} does not name its data set; give --data")
    metrics, out = {"samples": {"images": len(images), "size": images[np.arange(1)].shape[-1]}}, Path(cfg.out)
    if not cfg.out:
        out = Path(cfg.samples).absolute().with_name("metrics.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    train = run.first(lambda: load_images(data, size, "train")) if "classifier" in cfg.features else None
    if set(cfg.features.split(",")) - {"classifier"}:
        reference, stored = open_set(data, size, run)
        metrics["samples"] |= compare(cfg, run, images, reference, stored)
        if min(len(images), metrics["samples"].get("n_reference") or 2048) < 2048 and "fid" in cfg.features:
            run.print("fewer than 2,048 images, as many as there are features: the FID is biased upwards, strongly")
    if train and len(train.classes) == 1:
        run.print(f"{data} has one class only: fd_classifier, which needs labels, is not available")
    elif train:
        judge = Judge(train, load_images(data, size, "val"), run)
        metrics["samples"] |= judge(images, labels)
        metrics["validation_images"] = judge.reference
    metrics |= {"features": cfg.features, "against": data, "sampling": facts, "precision": run.precision,
                "commit": commit(), "seconds": round(time.time() - began)}
    if run.main:
        write_json(out, metrics)
        rows = {"samples": metrics["samples"], "real validation images": metrics.get("validation_images")}
        for name, row in rows.items():
            if row:
                shown = "   ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
                run.print(f"{name:24s} N={row['images']:<6d} {shown}")
        run.print(f"wrote {out}")
    run.barrier()
    return None


if __name__ == "__main__":
    launch(main)
