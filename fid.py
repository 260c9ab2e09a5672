"""Networks we do not train, and what we measure with them.

    torchrun fid.py  # out/samples/samples.npz against its data -> metrics.json
    torchrun fid.py A B  # FID, sFID, IS, precision, recall of A against B
    torchrun fid.py stats B --out ref.npz  # statistics of B, to give in place of B
    python fid.py latents CKPT [CKPT ...] --out DIR  # linear probe, Gaussian mixtures

A and B: an npz with arr_0 (uint8 n x S x S x 3), a folder of images of one size, or a data set. B may be statistics
(mu, sigma, mu_s, sigma_s). `fid` is as ADM's; `fd_classifier` uses a network trained on the labels of the data set.
"""
import argparse
import functools
import itertools
import json
import math
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    Dist,
    ImageSet,
    Loader,
    cache_dir,
    die,
    download,
    find_images,
    launch,
    load_checkpoint,
    option,
    read_image,
    reading,
    to_float,
    writing,
)

# ---------------- 1. Pretrained weights

META = "https://dl.fbaipublicfiles.com"
LPIPS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
SIGLIP = "https://huggingface.co/google/siglip-large-patch16-256/resolve/main/model.safetensors"
FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
INCEPTION = "pt_inception-2015-12-05-6726825d"
WEIGHTS = {  # name: address, start of the published sha256
    "vgg16-397923af": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "lpips_vgg": (LPIPS, "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    INCEPTION: (f"{FID}/{INCEPTION}.pth", "6726825d"),
    "dino_deitsmall16_pretrain": (f"{META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", ""),
    "siglip-large-patch16-256": (SIGLIP, "")}
for net in ("vits14", "vits14_reg4", "vitb14", "vitb14_reg4", "vitl14", "vitl14_reg4"):
    WEIGHTS[f"dinov2_{net}_pretrain"] = f"{META}/dinov2/dinov2_{net[:6]}/dinov2_{net}_pretrain.pth", ""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
Weights = dict[str, Tensor]


def pretrained(name: str, folder: str, hint: str) -> Weights:
    """Weights of the table: NAME.pth or .safetensors in the folder ("": the cache), else downloaded into it."""
    root = Path(folder or cache_dir()).absolute()
    for path in (root / f"{name}.pth", root / f"{name}.safetensors"):
        if path.exists():
            return read_weights(path)
    url, sha256 = WEIGHTS[name]
    path = root / f"{name}{Path(url).suffix}"
    return read_weights(download(url, path, sha256, f" (--weights), or do without: {hint}"))


def read_weights(path: str | Path) -> Weights:
    """Tensors by name, on the CPU, of a .safetensors or a torch file. Runs no code from the file."""
    with reading(path, "a file of weights"):
        if Path(path).suffix == ".safetensors":
            return read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # settings beside the weights
            state = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("ema", "model", "state_dict"):  # wrappings of training checkpoints, best first
            state = state[name] if isinstance(state.get(name), dict) else state
        return dict(state)


def read_safetensors(path: str | Path) -> Weights:
    """Memory-mapped tensors: 8 bytes of header length, a JSON header, tensors without gaps."""
    raw = np.memmap(path, np.uint8, "c")  # copy on write: nothing reaches the file
    begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    pairs = json.loads(raw[8:begin].tobytes(), object_pairs_hook=list)
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    header = {name: dict(entry) for name, entry in pairs if name != "__metadata__"}
    body, tensors = torch.from_numpy(raw)[begin:], {}
    end = 0  # of the tensor before
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        start, stop = entry["data_offsets"]
        sane = len(shape) <= 8 and all(type(n) is int and 0 <= n <= len(raw) for n in shape)
        if not sane or start != end or stop != start + math.prod(shape) * dtype.itemsize or stop > len(body):
            raise ValueError(f"{name}: {entry['dtype']} {shape} at bytes {start} to {stop}")
        part = body[start:stop]
        if (begin + start) % dtype.itemsize:  # torch needs aligned addresses
            part = part.clone()
        tensors[name] = part.view(dtype).reshape(shape)
        end = stop
    return tensors


def fold_layer_scale(weights: Weights, attention: str, mlp: str) -> Weights:
    """Multiply LayerScale (`blocks.i.ls1.gamma`, `ls2.gamma`) into the matrices of these names, in place."""
    scaled = {key.rsplit(".", 3)[0] for key in weights if re.search(r"\.\d+\.ls[12]\.gamma$", key)}
    for scale, matrix in (("ls1", attention), ("ls2", mlp)):
        for key in [key for key in weights if key.endswith(f".{matrix}.weight")]:
            layer = key.removesuffix(f".{matrix}.weight")
            if layer.rpartition(".")[0] in scaled:  # one layer has scales, so all must
                gamma = weights.pop(f"{layer}.{scale}.gamma")
                if not gamma.shape == weights[f"{layer}.{matrix}.bias"].shape == weights[key].shape[:1]:
                    raise ValueError(f"{layer}.{scale}.gamma is {list(gamma.shape)}")
                weights[key] = weights[key] * gamma[:, None]
                weights[f"{layer}.{matrix}.bias"] = weights[f"{layer}.{matrix}.bias"] * gamma
    return weights


# ---------------- 2. Frozen networks: vision transformers, LPIPS, Inception

KEY_MAP = {  # names in the public files -> in torch's own layer
    "vision_model.": "", "encoder.": "", "embeddings.position_embedding.weight": "pos_embed", "blocks.": "layers.",
    "embeddings.patch_embedding": "patch_embed", "patch_embed.proj": "patch_embed", "attn.qkv.": "self_attn.in_proj_",
    "attn.proj": "self_attn.out_proj", "post_layernorm": "norm", "layer_norm": "norm", "mlp.fc": "linear"}
UNUSED = re.compile(r"text_model\.|logit_|vision_model\.head\.|.*(_ids|mask_token)$")


def freeze(net: nn.Module, dist: Dist) -> nn.Module:
    """To the device, without gradients. For bf16 the matrices are converted once, not in every call."""
    net = net.to(dist.device).eval().requires_grad_(False)
    for module in net.modules() if dist.precision == "bf16" else ():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            module.to(torch.bfloat16)
    return net


class VisionTransformer(nn.Module):
    """DINO, DINOv2 (with registers or without) or SigLIP's vision tower, sizes as in the weights."""

    def __init__(self, weights: Weights, kind: str, heads: int = 0):
        super().__init__()
        with reading("the file", f"{kind} weights"):
            w = {}
            for key, value in weights.items():
                if not UNUSED.match(key):  # SigLIP's text half and pooling; training's mask
                    for old, new in KEY_MAP.items():
                        key = key.replace(old, new)
                    w[key] = value.float()
            fold_layer_scale(w, "self_attn.out_proj", "linear2")
            for key in [key for key in w if ".q_proj." in key]:  # SigLIP has three matrices for one
                parts = [w.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
                w[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)

            width, _, patch, _ = w["patch_embed.weight"].shape
            pos = w.pop("pos_embed").reshape(1, -1, width)  # 1 x tokens x D
            prefix = pos[:, :0]
            if kind != "siglip":  # a class token, with a position of its own
                prefix, pos = w.pop("cls_token") + pos[:, :1], pos[:, 1:]
            registers = w.pop("register_tokens", prefix[:, :0])
            if math.isqrt(pos.shape[1]) ** 2 != pos.shape[1]:
                raise ValueError(f"{pos.shape[1]} positions are not a square grid")

            # DINO was trained with exact GELU; the published discriminators on it use tanh's, as we do.
            gelu = F.gelu if kind == "dinov2" else functools.partial(F.gelu, approximate="tanh")
            heads = heads or (16 if width == 1152 else max(1, width // 64))  # SigLIP so400m
            layer = width, heads, len(w["layers.0.linear1.weight"]), 0, gelu, 1e-6, True, True
            depth = sum(key.endswith(".linear1.weight") for key in w)
            with torch.device("meta"):  # no memory: the weights themselves move in
                self.patch_embed = nn.Conv2d(3, width, patch, patch)
                self.layers = nn.ModuleList(nn.TransformerEncoderLayer(*layer) for _ in range(depth))
                self.norm = nn.LayerNorm(width, 1e-6)
            self.load_state_dict(w, assign=True)

        self.kind, self.width, self.patch = kind, width, patch
        self.prefix, self.registers = prefix.shape[1], registers.shape[1]
        imagenet, half = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3,) * 2  # mean, std of RGB
        self.register_buffer("statistics", torch.tensor(half if kind == "siglip" else imagenet)[..., None, None])
        self.register_buffer("pos_embed", pos)
        self.register_buffer("prefix_tokens", torch.cat([prefix, registers], 1))

    def positions(self, rows: int, columns: int) -> Tensor:
        """Patch positions, 1 x rows*columns x D, stretched as the network's own code does it."""
        m = math.isqrt(self.pos_embed.shape[1])
        if rows == columns == m:
            return self.pos_embed
        table = self.pos_embed.unflatten(1, (m, m)).permute(0, 3, 1, 2)  # 1 x D x m x m
        if self.kind == "siglip" or self.registers:  # DINOv2 with registers smooths, SigLIP does not
            table = F.interpolate(table, (rows, columns), mode="bicubic", antialias=bool(self.registers))
        else:  # the kernel takes this scale, not rows / m
            table = F.interpolate(table, scale_factor=((rows + 0.1) / m, (columns + 0.1) / m), mode="bicubic")
        return table.flatten(2).transpose(1, 2)

    def embed(self, x: Tensor) -> Tensor:
        """Normalised images -> class token, registers, patches: the first layer's input."""
        x = self.patch_embed(x)  # B x D x rows x columns
        tokens = x.flatten(2).transpose(1, 2) + self.positions(*x.shape[-2:])  # B x N x D
        return torch.cat([self.prefix_tokens.expand(len(x), -1, -1), tokens], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images -> tokens after the last norm, B x (prefix + registers + N) x D."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def normalise(self, image: Tensor) -> Tensor:
        return (image * 0.5 + 0.5 - self.statistics[0]) / self.statistics[1]

    @torch.no_grad()
    def patch_features(self, image: Tensor, grid: int) -> Tensor:
        """Images in [-1, 1], resized to grid x grid patches -> B x grid*grid x D."""
        size = grid * self.patch
        if image.shape[-1] != size:
            image = F.interpolate(image, (size, size), mode="bicubic", antialias=True)
        return self(self.normalise(image))[:, self.prefix + self.registers:].float()


def load_vit(name: str, folder: str, dist: Dist, hint: str) -> VisionTransformer:
    """A frozen transformer of WEIGHTS; the first word of its name is its kind."""
    weights = dist.rank0_first(lambda: pretrained(name, folder, hint))
    return freeze(VisionTransformer(weights, re.split("[_-]", name)[0]), dist)


class Lpips(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al. 2018): distance of images in [-1, 1], B values."""

    STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # convolutions by torchvision's number

    def __init__(self, vgg: Weights, heads: Weights):
        super().__init__()
        self.stages, self.heads = nn.ModuleList(), nn.ParameterList()
        with reading("the file", "weights of VGG16 or LPIPS"):
            for i, numbers in enumerate(self.STAGES):
                stage = nn.Sequential()
                for number in numbers:
                    w, b = (vgg[f"features.{number}.{part}"].float() for part in ("weight", "bias"))
                    conv = nn.Conv2d(w.shape[1], w.shape[0], 3, padding=1)
                    conv.load_state_dict({"weight": w, "bias": b})
                    stage.extend([conv, nn.ReLU()])
                self.stages.append(stage)
                self.heads.append(heads[f"lin{i}.model.1.weight"].float())
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def features(self, x: Tensor) -> list[Tensor]:
        """Five activations of VGG16, each of unit length over its channels."""
        x = ((x - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        features = []
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i else x)
            features.append(x.float() / (x.float().square().sum(1, keepdim=True).sqrt() + 1e-10))
        return features

    def layers(self, a: Tensor, b: Tensor) -> Tensor:
        """The five parts of the distance, B x 5."""
        triples = zip(self.heads, self.features(a), self.features(b))
        return torch.stack([(head * (f - g).square()).sum(1).mean((1, 2)) for head, f, g in triples], 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layers(a, b).sum(1)


def load_lpips(folder: str, dist: Dist) -> Lpips:
    names = "vgg16-397923af", "lpips_vgg"
    vgg, heads = dist.rank0_first(lambda: [pretrained(name, folder, "--lpips 0") for name in names])
    return freeze(Lpips(vgg, heads), dist)


STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "pool", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "pool")
STRIDED = re.compile(r"Conv2d_1a|Mixed_6a.branch3x3(dbl_3)?$|Mixed_7a.branch(3x3_2|7x7x3_4)")
UNPADDED = re.compile(rf"{STRIDED.pattern}|Conv2d_[24]a")
BRANCHES = {  # by kind of block: chains of convolutions
    "A": ("1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3"),
    "B": ("3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3"),
    "C": ("1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5"),
    "D": ("3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"),
    "E": ("1x1", "3x3_1 3x3_2a|3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a|3x3dbl_3b")}
BLOCKS = dict(zip(("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"), "AAABCCCCDEE"))


class Inception(nn.Module):
    """FID's Inception of 2015: uint8 B x 3 x H x W -> pool B x 2048, spatial B x 2023, logits B x 1008."""

    def __init__(self, weights: Weights, resize: str = "tf1"):
        super().__init__()
        self.resize, self.convs = resize, nn.ModuleDict()
        with reading("the file", "weights of FID's Inception"):
            self.register_buffer("fc", weights["fc.weight"].float())  # 1008 x 2048
            for name in [key.removesuffix(".conv.weight") for key in weights if key.endswith(".conv.weight")]:
                w = weights[f"{name}.conv.weight"].float()
                parts = ("weight", "bias", "running_mean", "running_var")
                gamma, beta, mean, variance = (weights[f"{name}.bn.{part}"].float() for part in parts)
                scale = gamma * (variance + 1e-3).rsqrt()  # the batch norm, folded in
                padding = (0, 0) if UNPADDED.match(name) else (w.shape[2] // 2, w.shape[3] // 2)
                conv = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2:], 1 + bool(STRIDED.match(name)), padding)
                conv.load_state_dict({"weight": w * scale[:, None, None, None], "bias": beta - mean * scale})
                self.convs[name.replace(".", "/")] = conv  # a module's name holds no dot
            if len(self.convs) != 94:
                raise ValueError(f"{len(self.convs)} convolutions, not 94")

    def chain(self, x: Tensor, names: str, at: str = "") -> Tensor:
        """Convolutions one after the other, a|b side by side."""
        for name in names.split():
            x = torch.cat([F.relu(self.convs[at + part](x), inplace=True) for part in name.split("|")], 1)
        return x

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.resize == "tf1":
            x = (tf_resize(images) - 128) / 128
        else:  # pytorch-fid
            x = 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        x = x.contiguous(memory_format=torch.channels_last)
        for name in STEM:
            x = F.max_pool2d(x, 3, 2) if name == "pool" else self.chain(x, name)

        for block, kind in BLOCKS.items():
            at = f"Mixed_{block}/branch"
            parts = [self.chain(x, names, at) for names in BRANCHES[kind]]
            if kind in "BD":
                parts.append(F.max_pool2d(x, 3, 2))
            elif block == "7c":
                parts.append(self.chain(F.max_pool2d(x, 3, 1, 1), "_pool", at))
            else:  # torchvision counts padded pixels, too
                parts.append(self.chain(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), "_pool", at))
            if block == "6d":  # 17 x 17 x 7, flattened H, W, C
                spatial = parts[0][:, :7].permute(0, 2, 3, 1).flatten(1).float()
            x = torch.cat(parts, 1)

        with torch.autocast(x.device.type, enabled=False):
            pool = x.float().mean((2, 3))
            return pool, spatial, pool @ self.fc.T  # the Inception Score leaves out the bias


def load_inception(folder: str, dist: Dist, resize: str = "tf1") -> Inception:
    weights = dist.rank0_first(lambda: pretrained(INCEPTION, folder, "--features classifier or --no-rfid"))
    return freeze(Inception(weights, resize), dist).to(memory_format=torch.channels_last)


# ---------------- 3. Moments and distances

@dataclass
class LazyImages:
    """n images that are made when asked for: make(index array) -> uint8 B x 3 x S x S."""
    n: int
    make: Callable
    ahead: bool = False  # in another thread; not for networks: no_grad is per thread

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: np.ndarray) -> Tensor:
        return self.make(index)


def in_batches(images, dist: Dist, batch: int):
    """This process's share, as (indices, uint8 B x 3 x S x S on the device)."""
    parts = torch.arange(len(images)).split(batch)[dist.rank::dist.world_size]
    bar = tqdm(parts, desc="features", leave=False, disable=None if dist.is_main else True)
    future = None
    with ThreadPoolExecutor(1) as pool:
        for i, index in enumerate(bar):
            x = future.result() if future else images[index.numpy()]
            if i + 1 < len(parts) and getattr(images, "ahead", True):  # files are read meanwhile
                future = pool.submit(images.__getitem__, parts[i + 1].numpy())
            yield index, x.to(dist.device)


class Moments:
    """Mean and covariance of features (B x D), in float64, over batches and processes."""

    def __init__(self, width: int, device: torch.device):
        self.count, self.sum, self.outer = (
            torch.zeros(shape, device=device).double() for shape in (1, width, (width, width)))

    def add(self, features: Tensor) -> None:
        # Multiples of 2^-15 sum up exactly, so no bit depends on the order or the size of the batches.
        features = (features.double() * 2**15).round() / 2**15
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def finish(self, dist: Dist) -> tuple[Tensor, Tensor]:
        n, total, outer = (dist.all_reduce(x).cpu() for x in (self.count, self.sum, self.outer))
        mean = total / n
        return mean, (outer - n * torch.outer(mean, mean)) / (n - 1).clamp(min=1)


def frechet_distance(mean1, cov1, mean2, cov2) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64."""
    mean1, cov1, mean2, cov2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mean1, cov1, mean2, cov2))
    # The eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2) are real without full rank, too; scipy's sqrtm is not.
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item()
    if not math.isfinite(distance):
        die("a Frechet distance is not finite: the features or statistics are not")
    return max(0.0, distance)


# ---------------- 4. FID, sFID, Inception Score, precision and recall, as ADM's evaluator defines them

def tf_resize(x: Tensor, size: int = 299) -> Tensor:
    """TensorFlow 1's bilinear resize of B x 3 x H x W, bit by bit: no half-pixel shift, no smoothing."""
    for axis in (3, 2):  # first along rows of pixels, then along columns
        n = x.shape[axis]
        at = torch.arange(size, device=x.device) * torch.tensor(n / size, dtype=torch.float32, device=x.device)
        low = at.floor().long()
        weight = (at - low).view(-1, *[1] * (3 - axis))
        a = x.index_select(axis, low).float()
        b = x.index_select(axis, (low + 1).clamp(max=n - 1)).float()
        x = a + (b - a) * weight
    return x


class InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) of blocks of 5,000 images in file order, averaged."""

    def __init__(self, n: int, device: torch.device, block: int = 5000, classes: int = 1008):
        self.block = block
        # A row per block: sums of p and of p log p, number of images.
        self.sums = torch.zeros(-(-n // block), classes + 2, device=device).double()

    def add(self, index: Tensor, logits: Tensor) -> None:
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        row = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)
        self.sums.index_add_(0, index.to(p.device) // self.block, row)

    def finish(self, dist: Dist) -> float:
        p, negative_entropy, count = dist.all_reduce(self.sums).cpu().tensor_split([-2, -1], 1)
        mean = p / count
        return (negative_entropy[:, 0] / count[:, 0] - torch.special.xlogy(mean, mean).sum(1)).exp().mean().item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp(min=0)


def knn_radii(x: Tensor, k: int = 3, tile: int = 2000) -> Tensor:
    """Squared distance of each point to its k-th nearest other point."""
    if len(x) <= k:
        die(f"precision and recall need more than {k} images in each set")
    return torch.cat([squared_distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(tile)])


def precision_recall(reference: Tensor, samples: Tensor, k: int = 3, tile: int = 2000) -> tuple:
    """Share of samples within a radius of the reference, and the reverse (Kynkaanniemi 2019)."""
    def covered(points, centres):
        radii, hits = knn_radii(centres, k, tile), 0
        for part in points.split(tile):  # n x n distances would not fit; ADM's are float16
            tiles = zip(centres.split(tile), radii.split(tile))
            hits += sum((squared_distances(part, c) <= r).any(1) for c, r in tiles).count_nonzero().item()
        return hits / len(points)

    return covered(samples, reference), covered(reference, samples)


@torch.no_grad()
def inception_statistics(net: Inception, images, dist: Dist, batch: int = 100, keep: int = 0) -> dict:
    """mu, sigma, mu_s, sigma_s, Inception Score of uint8 images; pool features of at most `keep`, evenly spaced."""
    pool_moments, spatial_moments = Moments(2048, dist.device), Moments(2023, dist.device)
    score = InceptionScore(len(images), dist.device)
    kept = torch.from_numpy(np.linspace(0, len(images) - 1, min(len(images), keep)).astype(int))
    features = torch.zeros(len(kept), 2048, device=dist.device)  # each process fills its rows
    for index, x in in_batches(images, dist, batch):
        with dist.autocast():
            pool, spatial, logits = net(x)
        pool_moments.add(pool)
        spatial_moments.add(spatial)
        score.add(index, logits)
        inside = torch.isin(index, kept)
        features[torch.searchsorted(kept, index[inside]).to(dist.device)] = pool[inside.to(dist.device)]

    moments = *pool_moments.finish(dist), *spatial_moments.finish(dist)
    return dict(zip(("mu", "sigma", "mu_s", "sigma_s"), moments)) | {
        "n": len(images), "inception_score": score.finish(dist), "features": dist.all_reduce(features)}


# ---------------- 5. Reconstructions

def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pairs of uint8 images; at most 100 dB."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return (20 * math.log10(255) - 10 * error.log10()).clamp(max=100)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of pairs of uint8 images (Wang 2004): 11-pixel Gaussian, deviation 1.5."""
    a, b = a.double() / 255, b.double() / 255
    w = torch.exp(-0.5 * ((torch.arange(11, device=a.device, dtype=torch.float64) - 5) / 1.5) ** 2)
    w = (torch.outer(w, w) / w.sum() ** 2).expand(a.shape[1], 1, 11, 11)
    blur = functools.partial(F.conv2d, weight=w, groups=a.shape[1])  # each channel by itself
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2  # flat images: no division by zero
    score = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return score.flatten(1).mean(1)


@torch.no_grad()
def reconstruction_metrics(reconstruct, images, dist: Dist, classifier_fd=None, lpips=None,
                           weights: str | None = None) -> dict[str, float]:
    """Scores of reconstruct(uint8) against uint8 images: psnr, ssim, and what else is given."""
    side = images[np.arange(1)].shape[-1]
    metrics = {"psnr": psnr}
    if side > 10:  # the window of SSIM
        metrics["ssim"] = ssim
    if lpips:
        metrics["lpips"] = lambda x, y: lpips(to_float(x), to_float(y))
    sums = torch.zeros(len(metrics), device=dist.device).double()
    batch = max(1, min(250, 250 * 128**2 // side**2))  # large images need more memory
    for _, x in in_batches(images, dist, batch):
        y = reconstruct(x)
        with dist.autocast():  # float64 stays float64
            sums += torch.stack([metric(x, y).sum().to(sums) for metric in metrics.values()])

    scores = dict(zip(metrics, (dist.all_reduce(sums) / len(images)).tolist()))
    lazy = LazyImages(len(images), lambda i: reconstruct(images[i].to(dist.device)))
    if classifier_fd:
        scores["fd_classifier"] = classifier_fd.score(lazy)[0]["fd_classifier"]
    if weights is not None:
        fp32 = replace(dist, precision="fp32")
        net = load_inception(weights, fp32)
        a, b = (inception_statistics(net, x, fp32) for x in (lazy, images))
        scores["rfid"] = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
    return scores


# ---------------- 6. Latents: a linear model and Gaussian mixtures on them (paper, Fig. 2a, 5a, App. B.3)

def linear_probe(train_z, train_y, val_z, val_y, classes: int, iterations: int = 100) -> float:
    """Accuracy of logistic regression on the flattened, standardised latents."""
    z, v = train_z.flatten(1).double(), val_z.flatten(1).double()  # n x L*H
    mean, std = z.mean(0), z.std(0) + 1e-6
    z, v = (z - mean) / std, (v - mean) / std
    w = torch.zeros(z.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)  # last row: bias
    solver = torch.optim.LBFGS([w], max_iter=iterations, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(z @ w[:-1] + w[-1], train_y) + 1e-4 * w.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return ((v @ w[:-1] + w[-1]).argmax(1) == val_y).double().mean().item()


def principal_components(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, axes (columns, largest first), share of variance of the first 1, 2, ... axes."""
    values, vectors = torch.linalg.eigh(torch.cov(z.double().T))
    values = values.flip(0).clamp(min=0)
    return z.double().mean(0), vectors.flip(1), values.cumsum(0) / values.sum()


def gmm_log_prob(x: Tensor, weights, means, covariances) -> Tensor:
    """log(weight * density) of n points under K Gaussians, n x K."""
    inverse = torch.linalg.inv(torch.linalg.cholesky(covariances))  # K x d x d
    parts = []
    for w, m, p in zip(weights, means, inverse):
        squares = ((x - m) @ p.T).square().sum(1)
        parts.append(w.log() + p.diagonal().log().sum() - 0.5 * (squares + x.shape[1] * math.log(2 * math.pi)))
    return torch.stack(parts, 1)


def fit_gmm(x: Tensor, k: int, seed: int = 0, iterations: int = 100, floor: float = 1e-3) -> tuple:
    """Weights, means, full covariances (plus `floor`) of k Gaussians: EM from k-means++."""
    if len(x) < 2 * k:
        die(f"{len(x)} latents are too few for a mixture of {k} Gaussians")
    x, last = x.double(), -math.inf
    _, cluster = kmeans2(x.cpu().numpy(), k, minit="++", rng=np.random.default_rng(seed))
    responsibility = F.one_hot(torch.from_numpy(cluster).long(), k).to(x)  # n x K
    eye = torch.eye(x.shape[1]).to(x)
    for _ in range(iterations):
        count = responsibility.sum(0) + 1e-9  # a cluster may be empty
        weights, means = count / count.sum(), responsibility.T @ x / count[:, None]
        covariances = torch.stack([((x - m) * r[:, None]).T @ (x - m) / n + floor * eye
                                   for m, r, n in zip(means, responsibility.T, count)])
        joint = gmm_log_prob(x, weights, means, covariances)
        total = joint.logsumexp(1)
        responsibility = (joint - total[:, None]).exp()
        if total.mean() - last < 1e-4 * x.shape[1]:
            break
        last = total.mean()
    return weights, means, covariances


def gmm_nll_curve(train_z, val_z, dims: int, sizes=(1, 2, 4, 8, 16, 32), seed: int = 0) -> dict[int, float]:
    """Held-out negative log-likelihood per dimension of growing mixtures, after PCA to `dims`."""
    mean, axes, _ = principal_components(train_z)
    z, v = ((x.double() - mean) @ axes[:, :dims] for x in (train_z, val_z))
    std = z.std(0).clamp(min=1e-9)  # a dead channel stays where it is
    curve = {}
    for k in tqdm(sizes, desc="mixtures", leave=False, disable=None):
        mixture = fit_gmm(z / std, k, seed)
        curve[k] = -gmm_log_prob(v / std, *mixture).logsumexp(1).mean().item() / dims
    return curve


# ---------------- 7. Features from the data set's own labels

class Classifier(nn.Module):
    """A small convolutional network: images -> pooled features (B x 192) and class logits (B x K)."""

    width = 192

    def __init__(self, classes: int):
        super().__init__()
        self.stages = nn.Sequential()
        for i, o in itertools.pairwise((3, 32, 64, 128, 192)):
            conv = nn.Conv2d(i, o, 3, 1 if i == 3 else 2, 1, bias=False)
            self.stages.append(nn.Sequential(conv, nn.BatchNorm2d(o), nn.GELU()))
        self.head = nn.Linear(192, classes)

    def maps(self, x: Tensor) -> Tensor:
        """The last convolution of images in [-1, 1]: B x 192 x S/8 x S/8, with S at most 64."""
        if x.shape[-1] > 64:
            x = F.interpolate(x, (64, 64), mode="area")
        return self.stages(x.contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.maps(to_float(x) if x.dtype == torch.uint8 else x).mean((2, 3))
        return features.float(), self.head(features).float()

    @torch.no_grad()
    def patch_features(self, x: Tensor, grid: int) -> Tensor:
        """Images in [-1, 1] -> B x grid*grid x 192: the maps, averaged over patches, or repeated."""
        return F.adaptive_avg_pool2d(self.maps(x), grid).flatten(2).transpose(1, 2).float()


def train_classifier(images: ImageSet, dist: Dist, seed: int = 0, steps: int = 800, batch: int = 100) -> Classifier:
    """Fit the classifier in one process; deterministic on one kind of device."""
    torch.manual_seed(seed)
    net = Classifier(len(images.classes)).to(dist.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3, weight_decay=0.05)
    loader, warmup = Loader(images, batch, seed, dist), steps // 10
    for step in tqdm(range(steps), desc="training the classifier", disable=None):
        decay = 1 - 0.9 * (max(0, step - warmup) / (steps - warmup))  # linear, to a tenth
        optimizer.param_groups[0]["lr"] = 5e-3 * (min(1.0, (step + 1) / max(1, warmup)) * decay)  # warm-up first
        x, y = loader(step)  # B x 3 x S x S, B
        # Blur in three of four batches, and noise, teach forms, as a person sees them, not sharp pixels.
        if step % 4:
            small = max(1, round(x.shape[-1] / (step % 4 + 1)))
            x = F.interpolate(F.interpolate(x, (small, small), mode="area"), x.shape[-2:], mode="bicubic")
        g = dist.generator(seed, "classifier noise", step)
        amount = 0.15 * torch.rand(len(x), 1, 1, 1, generator=g, device=dist.device)
        x = x + amount * torch.randn(x.shape, generator=g, device=dist.device)
        with dist.autocast():
            loss = F.cross_entropy(net(x)[1], y, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def cached_classifier(images: ImageSet, dist: Dist, seed: int = 0) -> Classifier:
    """The frozen classifier of a data set, trained once; `moments`: mean and covariance of its features."""
    # Seed 0 scores images, seed 1 teaches the tokenizer: no network scores what it has taught.
    if len(images.classes) < 2:
        die("a classifier needs a data set with two classes or more")
    path = cache_dir() / f"classifier-3-{seed}-{images.fingerprint}.pt"  # 3: version of the training

    def load():
        if not path.exists():
            dist.print(f"training a small classifier (seed {seed}), once for this data set")
            net = train_classifier(images, dist.alone(), seed)
            mean, cov, _ = score_images(net, images, None, dist.alone())
            dist.save(path, {"kind": "classifier", "net": net.state_dict(), "mean": mean, "cov": cov})
        return load_checkpoint(path, "classifier")

    state = dist.rank0_first(load)
    net = Classifier(len(images.classes))
    net.load_state_dict(state["net"])
    net.moments = state["mean"], state["cov"]
    return net.to(dist.device, memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def score_images(net: Classifier, images, labels: Tensor | None, dist: Dist) -> tuple:
    """Mean and covariance of the features of uint8 images, share of labels recognised."""
    moments, right = Moments(192, dist.device), torch.zeros(1, device=dist.device)
    for index, x in in_batches(images, dist, 500):
        features, logits = net(x)
        moments.add(features)
        if labels is not None:
            right += (logits.argmax(1) == labels[index].to(dist.device)).sum()
    return *moments.finish(dist), dist.all_reduce(right).item() / len(images)


class ClassifierFD:
    """Distance to the training images (mean, cov); `reference` is the score of the validation images."""

    def __init__(self, train: ImageSet, val: ImageSet, dist: Dist):
        self.dist, self.net = dist, cached_classifier(train, dist)
        self.mean, self.cov = self.net.moments
        self.reference, _ = self.score(val, val.labels)

    def score(self, images, labels: Tensor | None = None) -> tuple[dict, tuple]:
        """({fd_classifier, images, class_accuracy if labels are given}, (mean, covariance) of the images)."""
        mean, cov, accuracy = score_images(self.net, images, labels, self.dist)
        row = {"fd_classifier": frechet_distance(self.mean, self.cov, mean, cov), "images": len(images)}
        return row | ({} if labels is None else {"class_accuracy": accuracy}), (mean, cov)


# ---------------- 8. Command line

@dataclass(frozen=True)
class Config:
    task: str = option("score", "as the commands above set it", ("score", "stats", "latents"))
    samples: str = option("out/samples/samples.npz", "the set A, or checkpoints with commas")
    data: str = option("", "the set B; empty: what the samples name")
    out: str = option("", "file, or folder for latents; empty: metrics.json beside the samples")
    features: str = option("classifier", "of the distance; `A B` means fid", ("classifier", "fid", "both"))
    resize: str = option("tf1", "as ADM or as pytorch-fid", ("tf1", "pytorch-fid"))
    size: int = option(0, "side of a data set; 0: that of the samples")
    weights: str = option("", "folder of the Inception weights; empty: the cache")
    batch_size: int = option(100, "images that a process scores at a time", least=1)
    precision: str = option("fp32", "bf16 moves a FID slightly", ("auto", "fp32", "bf16"))
    dims: int = option(0, "of the mixtures; 0: 90 % of the variance of each tokenizer's latents")

    def check(self) -> None:
        if self.task != "score" and not (self.samples and self.out):
            raise ValueError(f"fid.py {self.task} needs what to read, and --out")


def arguments(argv: list[str]) -> list[str]:
    """`A B`, `stats B` and `latents CKPT ...` as flags."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    flags = argv[len(words):]
    if words[:1] in (["stats"], ["latents"]):
        return ["--task", words[0], "--samples", ",".join(words[1:]), *flags]
    if len(words) == 2:
        return ["--samples", words[0], "--data", words[1], "--features", "fid", *flags]
    return argv


def npz_array(path: Path, name: str) -> np.ndarray:
    """An array of an npz file, memory-mapped if it is stored without compression."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo(f"{name}.npy")
        file.seek(info.header_offset + 26)  # in zip's own header: lengths of name and extras
        file.seek(sum(np.frombuffer(file.read(4), "<u2").tolist()), os.SEEK_CUR)
        if info.compress_type == zipfile.ZIP_STORED and np.lib.format.read_magic(file) == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if not fortran and not dtype.hasobject:
                return np.memmap(path, dtype, "r", file.tell(), shape)
    return np.load(path)[name]


def open_set(name: str, size: int, dist: Dist) -> tuple:
    """(images or None, statistics or {}, labels or None, how they were made) of a set."""
    path = Path(name)
    packed = (path / "meta.json").is_file()
    if path.is_file():
        return open_npz(path)
    if path.is_dir() and not packed:
        return open_folder(path), {}, None, {}
    if not packed and not size:
        die(f"{name}: no such file or folder; for a data set, give --size")
    return dist.rank0_first(lambda: ImageSet(name, 0 if packed else size, "train")), {}, None, {}


def open_folder(root: Path) -> LazyImages:
    names = find_images(root) or die(f"{root}: no images found")
    pool = ThreadPoolExecutor(4)

    def read(index):
        with reading(root, "a folder of images of one size (data.py makes one)"):
            # The first file comes along, so that two batches of different sizes fail, too.
            images = list(pool.map(lambda i: read_image(root / names[i], 0), [0, *index]))
            return torch.from_numpy(np.stack(images)[1:]).permute(0, 3, 1, 2)

    return LazyImages(len(names), read, ahead=True)


def open_npz(path: Path) -> tuple:
    shapes = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
    with reading(path, "an npz file of images (arr_0) or statistics"), np.load(path) as file:
        stats = {key: torch.from_numpy(file[key]).double() for key in shapes if key in file}
        if any(x.shape != shapes[key] or not x.isfinite().all() for key, x in stats.items()):
            raise ValueError(f"statistics must be finite, of shapes {shapes}")
        if stats or "arr_0" not in file:
            stats |= {"n": int(file["n"]) if "n" in file else 0, "mu": stats["mu"], "sigma": stats["sigma"]}
        if "arr_0" not in file:
            return None, stats, None, {}

        pixels = npz_array(path, "arr_0")
        labels = torch.from_numpy(file["labels"]) if "labels" in file else None
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
            raise ValueError(f"arr_0 is {pixels.dtype} {pixels.shape}, not uint8 n x S x S x 3")
        if labels is not None and len(labels) != len(pixels):
            raise ValueError(f"{len(labels)} labels for {len(pixels)} images")
        meta = json.loads(str(file["meta"])) if "meta" in file else {}
    images = LazyImages(len(pixels), lambda i: torch.from_numpy(pixels[i]).permute(0, 3, 1, 2), ahead=True)
    return images, stats, labels, meta


def inception_scores(cfg: Config, dist: Dist, images, reference, stats: dict) -> dict:
    """FID, sFID, IS, precision and recall of images against reference images or statistics."""
    net = load_inception(cfg.weights, dist, cfg.resize)
    a = inception_statistics(net, images, dist, cfg.batch_size, keep=len(images) if reference else 0)
    b, row = {}, {"resize": cfg.resize, "inception_score": a["inception_score"]}
    if reference:  # 10,000 of a large set, as in ADM's reference files
        b = inception_statistics(net, reference, dist, cfg.batch_size, keep=10_000)
        row["precision"], row["recall"] = precision_recall(b["features"], a["features"])
        row["n_reference_precision"] = len(b["features"])
    b |= stats  # they are of the whole set, its images may be a few
    row["n_reference"] = b["n"] or None
    for name, mean, cov in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if mean in b:
            row[name] = frechet_distance(a[mean], a[cov], b[mean], b[cov])
    if min(len(images), b["n"] or 2048) < 2048:
        dist.print("fewer than 2,048 images, as many as features: the FID is far too high")
    return row


def score(cfg: Config, dist: Dist) -> None:
    """Samples against a data set -> metrics.json."""
    start = time.time()
    images, stats, labels, meta = open_set(cfg.samples, cfg.size, dist)
    if stats:
        die(f"{cfg.samples} holds statistics: give it second, as B")
    size = cfg.size or images[np.arange(1)].shape[-1]
    data = cfg.data or meta.get("data") or die(f"{cfg.samples} does not name its data set: give --data")
    rows = {"samples": {"images": len(images), "size": size}}
    if cfg.features != "classifier":
        reference, stats, _, _ = open_set(data, size, dist)
        rows["samples"] |= inception_scores(cfg, dist, images, reference, stats)
    if cfg.features != "fid":
        train, val = dist.rank0_first(lambda: [ImageSet(data, size, split) for split in ("train", "val")])
        if len(train.classes) > 1:
            judge = ClassifierFD(train, val, dist)
            rows["samples"] |= judge.score(images, labels)[0]
            rows["validation_images"] = judge.reference
        else:
            dist.print(f"{data} has one class only: fd_classifier, which needs labels, is not available")

    out = Path(cfg.out) if cfg.out else Path(cfg.samples).absolute().with_name("metrics.json")
    dist.make_out_dir(out.parent)
    dist.save(out, rows | {"features": cfg.features, "against": data, "sampling": meta,
                           "precision": dist.precision, "seconds": round(time.time() - start)})
    for name, row in rows.items():
        dist.print(name, *(f"{key} {value:.6g}" for key, value in row.items() if isinstance(value, (int, float))))
    dist.print(f"wrote {out}")


def write_statistics(cfg: Config, dist: Dist) -> None:
    """mu, sigma, mu_s, sigma_s of all images of a set, and up to 10,000 of the images -> npz."""
    images = open_set(cfg.samples, cfg.size, dist)[0] or die(f"{cfg.samples} holds no images")
    stats = inception_statistics(load_inception(cfg.weights, dist, cfg.resize), images, dist, cfg.batch_size)
    dist.make_out_dir(Path(cfg.out).parent)
    if dist.is_main:
        index = np.linspace(0, len(images) - 1, min(len(images), 10_000)).astype(int)
        pixels = images[index].permute(0, 2, 3, 1).numpy()
        arrays = {key: stats[key] for key in ("mu", "sigma", "mu_s", "sigma_s", "n")}
        with writing(cfg.out) as file:
            np.savez(file, arr_0=pixels, **arrays)
    dist.print(f"wrote {cfg.out}: statistics of {len(images)} images ({cfg.resize}, {dist.precision})")


def compare_latents(cfg: Config, dist: Dist) -> None:
    """Probe and mixtures (App. B.3) of tokenizers, all in the same number of dimensions -> analysis.json."""
    from tokenizer import encode_dataset, load_tokenizer  # here, as tokenizer.py imports this file

    dist, rows, latents = dist.alone(), {}, {}
    for path in cfg.samples.split(","):
        model, trained = load_tokenizer(path, dist.device)
        train, val = (ImageSet(trained.data, trained.size, split) for split in ("train", "val"))
        (z, y), (v, u) = (encode_dataset(model, images, dist, most=20_000) for images in (train, val))
        latents[path] = z.flatten(1), v.flatten(1)
        dims = int((principal_components(z.flatten(1))[2] < 0.9).sum()) + 1
        rows[path] = {"latents": list(z.shape[1:]), "data": trained.data, "steps": trained.steps,
                      "seed": trained.seed, "dimensions_for_90_percent": dims}
        if len(train.classes) > 1:
            rows[path]["linear_probe"] = linear_probe(z, y, v, u, len(train.classes))

    dims = cfg.dims or max(row["dimensions_for_90_percent"] for row in rows.values())
    dims = min(dims, *(z.shape[1] for z, _ in latents.values()))
    for path, (z, v) in latents.items():
        z, v = z.to(dist.device), v.to(dist.device)
        rows[path]["mixture_nll_per_dimension"] = gmm_nll_curve(z, v, dims)
        dist.print(path, *(f"{key} {value}" for key, value in rows[path].items()))
    out = dist.make_out_dir(cfg.out) / "analysis.json"
    dist.save(out, {"dimensions": dims, "rows": rows})
    dist.print(f"wrote {out}")


def main(cfg: Config, dist: Dist) -> None:
    {"score": score, "stats": write_statistics, "latents": compare_latents}[cfg.task](cfg, dist)


if __name__ == "__main__":
    launch(main, Config, {}, __doc__, arguments(sys.argv[1:]))
