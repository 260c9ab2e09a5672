"""Frechet distances between sets of images, and what else a set of samples is scored by.

    torchrun fid.py                                      # out/samples/samples.npz against its data -> metrics.json

A Frechet distance is named after its features: `fd_classifier` uses a small network trained here on the labels of the
data set itself, and says nothing about numbers published as FID, which need the Inception weights of 2015.
"""
import functools
import itertools
import json
import math
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import (
    PRECISIONS,
    Batches,
    Images,
    Run,
    cache_dir,
    commit,
    fail,
    learning_rate,
    load_images,
    load_strictly,
    locked,
    parse_config,
    pretrained,
    save_checkpoint,
    setting,
    start,
    to_float,
    write_json,
)


@dataclass
class Config:
    samples: str = setting("out/samples/samples.npz", "file of samples: arr_0 uint8 n x S x S x 3, labels beside it")
    data: str = setting("", "data set to compare with; empty: the one named in the samples file")
    out: str = setting("", "JSON file to write; empty: metrics.json beside the samples")
    precision: str = setting("auto", "arithmetic in which a missing classifier is trained; scores are fp32", PRECISIONS)

    def check(self):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


class Moments:
    """Sums of features and of their outer products in float64, over any number of batches and processes."""

    def __init__(self, width: int, device: torch.device):
        self.n = torch.zeros(1, dtype=torch.float64, device=device)
        self.first = torch.zeros(width, dtype=torch.float64, device=device)
        self.second = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor) -> None:
        features = features.double()
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
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(0.0, distance.item())


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
            for key in [k for k in w if k.endswith(".gamma")]:       # LayerScale goes into the matrix before it
                layer, scale = key[:-len("ls1.gamma")], w.pop(key)
                for end in ("weight", "bias"):
                    name = layer + ("self_attn.out_proj." if "ls1" in key else "linear2.") + end
                    w[name] = w[name] * (scale[:, None] if end == "weight" else scale)
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
        self.kind, self.width, self.prefix, self.registers = kind, width, 1 - (kind == "siglip"), registers.shape[1]
        self.mean, self.std = ((0.5,) * 3, (0.5,) * 3) if kind == "siglip" else IMAGENET
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
        mean, std = (torch.tensor(v, device=image.device)[:, None, None] for v in (self.mean, self.std))
        return (image * 0.5 + 0.5 - mean) / std

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

    def forward(self, x):
        x = to_float(x) if x.dtype == torch.uint8 else x
        if x.shape[-1] > 64:
            x = F.interpolate(x, (64, 64), mode="area")
        features = self.stages(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return features.float(), self.head(features).float()


def train_classifier(train: Images, run: Run, steps: int = 800, batch: int = 100) -> Classifier:
    """Fit the classifier to the training labels, in one process; deterministic on one kind of device.

    Batches are blurred (shrunk to 1/2, 1/3 or 1/4 and enlarged) in three of four steps, and noise is added, so that it
    knows an object by its form, as a person does, and not by single sharp pixels.
    """
    torch.manual_seed(0)
    net = Classifier(len(train.classes)).to(run.device, memory_format=torch.channels_last)
    params = list(net.parameters())
    optimizer = torch.optim.AdamW(params, 5e-3, weight_decay=0.05)
    batches = Batches(train, batch, 0, Run(0, 1, run.device, run.precision))
    for step in tqdm(range(steps), desc="training the classifier", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * learning_rate(step, steps, steps // 10, "linear")
        x, y = batches(step)
        if step % 4:
            small = max(1, round(x.shape[-1] / (step % 4 + 1)))
            x = F.interpolate(F.interpolate(x, (small, small), mode="area"), x.shape[-2:], mode="bicubic")
        g = run.generator(0, 9, step)
        amount = 0.15 * torch.rand(len(x), 1, 1, 1, generator=g, device=run.device)
        x = x + amount * torch.randn(x.shape, generator=g, device=run.device)
        with run.autocast():
            loss = F.cross_entropy(net(x)[1], y, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


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
    starts = range(batch * run.rank, len(images), batch * run.world)
    for i in tqdm(starts, desc="features", leave=False, disable=None if run.main else True):
        index = np.arange(i, min(i + batch, len(images)))
        features, logits = net(images[index].to(run.device))
        moments.add(features)
        if labels is not None:
            right += (logits.argmax(1) == labels[index].to(run.device)).sum()
    return *moments.finish(run), run.sum(right).item() / len(images)


class Judge:
    """The classifier of a data set, the statistics of its training images, and the validation images' own score.

    Made once per data set and size and kept in the cache.
    """

    def __init__(self, train: Images, val: Images, run: Run):
        if len(train.classes) < 2:
            fail("fd_classifier needs a data set with classes; this one has a single class")
        self.run, path = run, cache_dir() / f"classifier-1-{train.fingerprint}.pt"
        run.first(lambda: self.make(path, train, val))
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.net = Classifier(len(train.classes))
        self.net.load_state_dict(state.pop("net"))
        self.net = self.net.to(run.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.mean, self.cov, self.reference = state["mean"], state["cov"], state["reference"]

    def make(self, path: Path, train: Images, val: Images) -> None:
        with locked(path.with_suffix(".lock")):
            if path.exists():
                return
            self.run.print("training the classifier whose features score the samples (once per data set)")
            alone = Run(0, 1, self.run.device, self.run.precision)
            net = train_classifier(train, alone)
            mean, cov, _ = score_images(net, train, None, alone)
            mean_val, cov_val, accuracy = score_images(net, val, val.labels, alone)
            save_checkpoint(path, {"net": net.state_dict(), "mean": mean, "cov": cov, "reference": {
                "fd_classifier": frechet_distance(mean, cov, mean_val, cov_val), "class_accuracy": accuracy,
                "images": len(val)}})

    def __call__(self, images, labels: torch.Tensor | None = None) -> dict:
        """fd_classifier of uint8 images against the training images, and the share of their labels recognised."""
        mean, cov, accuracy = score_images(self.net, images, labels, self.run)
        facts = {"fd_classifier": frechet_distance(self.mean, self.cov, mean, cov), "images": len(images)}
        return facts | ({"class_accuracy": accuracy} if labels is not None else {})


def load_samples(path: Path) -> tuple[torch.Tensor, torch.Tensor | None, dict]:
    """uint8 N x 3 x S x S, labels or None, and the facts sample.py stored with them."""
    try:
        with np.load(path) as file:
            pixels = file["arr_0"]
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
                raise ValueError(f"arr_0 is {pixels.dtype} {pixels.shape}")
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            labels = torch.from_numpy(file["labels"]) if "labels" in file else None
            facts = json.loads(str(file["facts"])) if "facts" in file else {}
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels for {len(images)} images")
    except FileNotFoundError:
        fail(f"{path}: no such file; sample.py writes it")
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        fail(f"{path} is not a file of samples ({error}); arr_0 must be uint8 n x S x S x 3")
    return images, labels, facts


def main():
    cfg, began = parse_config(Config, {}, __doc__), time.time()
    run = start(cfg)
    images, labels, facts = load_samples(Path(cfg.samples))
    data, size = cfg.data or facts.get("data", ""), images.shape[-1]
    if not data:
        fail(f"{cfg.samples} does not name its data set; give --data")
    train = run.first(lambda: load_images(data, size, "train"))
    if len(train.classes) == 1:
        run.print(f"{data} has one class only: fd_classifier, which needs labels, is not available; nothing written")
        return
    judge = Judge(train, load_images(data, size, "val"), run)
    metrics = {"samples": judge(images, labels), "validation_images": judge.reference}
    metrics |= {"features": "classifier", "against": f"{len(train)} training images of {data}", "sampling": facts,
                "precision": "fp32", "commit": commit(), "seconds": round(time.time() - began)}
    if run.main:
        out = Path(cfg.out) if cfg.out else Path(cfg.samples).with_name("metrics.json")
        write_json(out, metrics)
        for name, row in (("samples", metrics["samples"]), ("real validation images", judge.reference)):
            accuracy = f"   recognised by class {row['class_accuracy']:6.1%}" if "class_accuracy" in row else ""
            run.print(f"{name:24s} N={row['images']:<6d} fd_classifier {row['fd_classifier']:8.3f}{accuracy}")
        run.print(f"wrote {out}")
    run.barrier()


if __name__ == "__main__":
    main()
