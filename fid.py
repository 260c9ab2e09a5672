"""Frechet distances between sets of images, and what else a set of samples is scored by.

    torchrun fid.py                                      # out/samples/samples.npz against its data -> metrics.json

A Frechet distance is named after its features: `fd_classifier` uses a small network trained here on the labels of the
data set itself, and says nothing about numbers published as FID, which need the Inception weights of 2015.
"""
import itertools
import json
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
    locked,
    parse_config,
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
