"""Images in; below, under its own banner, the helpers that every run shares.

    python data.py --data DIR --size 256 --out imagenet256      # pack a folder of images once

Conventions of the project:
  letters  B images, N patch tokens, L latent tokens, D width, H latent channels, P patch size, S image size, K classes
  images   float B x 3 x S x S in [-1, 1] inside; uint8, rounded, at every border (files, npz, metrics)
  random   a draw depends on (seed, stream, step) in training and on (seed, image number) in sampling. Each process
           draws for the global batch and keeps its rows, so one process and eight see the same numbers.
  steps    progress is counted in steps; --batch-size is the global batch
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import http.client
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
import typing
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


def die(message: str, cause: BaseException | None = None) -> typing.NoReturn:
    """End the program with one line on stderr and exit status 1."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}") from cause


def one_line(error: BaseException) -> str:
    text = f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
    return text[:200] or type(error).__name__


@contextlib.contextmanager
def reading(path: str | Path, what: str):
    """While a file of the user is read: any error inside ends in one line. `what` says what the file should be."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  torch, numpy, zip and Pillow raise a dozen kinds
        if getattr(error, "strerror", None):
            die(f"{error.filename or path}: {error.strerror}", error)
        die(f"{path} is not {what} ({one_line(error)})", error)


@contextlib.contextmanager
def writing(path: str | Path):
    """A temporary file that takes the name `path` once it is whole and on the disk. No two processes share one."""
    part = Path(f"{path}.{os.getpid()}.part")
    for old in part.parent.glob("*.part"):  # a run that was killed left it, or another run renames it just now
        with contextlib.suppress(FileNotFoundError):
            if old.stat().st_mtime < time.time() - 3600:
                old.unlink()
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        die(f"cannot write {path}: {one_line(error)}; what was saved before is kept", error)
    finally:
        part.unlink(missing_ok=True)


def cache_dir() -> Path:
    """Folder of downloads, packed images and classifiers: $MAETOK_CACHE, else ~/.cache/maetok."""
    name = os.environ.get("MAETOK_CACHE") or os.path.expanduser("~/.cache/maetok")
    if name.startswith("~"):
        die("there is no home folder to keep downloads and packed images in: set MAETOK_CACHE to a folder")
    Path(name).mkdir(parents=True, exist_ok=True)
    return Path(name).absolute()


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] float -> 0..255 uint8, rounded."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(x: Tensor) -> Tensor:
    """0..255 uint8 -> [-1, 1] float."""
    return x.float() / 127.5 - 1


# -------------------------------------------------------------------------------------------------
# Shards. Packed images, latents and samples are folders of .npy files of a fixed number of rows. A shard is whole or
# absent: a run that was cut makes what is missing, and two runs that write one shard write the same bytes.


class Shards:
    """The rows of several .npy files, memory-mapped. All files but the last have `length` rows."""

    def __init__(self, paths: list[Path]):
        self.arrays = [map_array(path) for path in paths]
        self.length = len(self.arrays[0])
        self.shape = (sum(map(len, self.arrays)), *self.arrays[0].shape[1:])
        if len({(array.shape[1:], array.dtype) for array in self.arrays}) > 1:
            raise ValueError("shards of several shapes")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        shard, row = np.divmod(np.asarray(index), self.length)
        rows = np.empty((len(row), *self.shape[1:]), self.arrays[0].dtype)
        for i in np.unique(shard):
            rows[shard == i] = self.arrays[i][row[shard == i]]
        return rows


def map_array(path: Path) -> np.ndarray:
    """Memory-map an .npy file. torch's map, unlike numpy's, keeps no file open: a large set has thousands."""
    array = np.load(path, mmap_mode="r")
    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
    return content[array.offset:].view(array.dtype).reshape(array.shape)


def hash_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def make_shards(folder: Path, n: int, length: int, make: typing.Callable, made_of: object, dist: "Dist",
                label: str) -> Shards:
    """Fill a folder with shards of `length` rows, which make(start, stop) returns. Processes share them by number.

    The names hold the hash of `made_of` (JSON: settings, hashes of weights). Shards of something else end the run.
    """
    key = hash_of(made_of)
    paths = [folder / f"{i:05d}-{key}.npy" for i in range(math.ceil(n / length))]
    if dist.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        if any(key not in path.name for path in folder.glob("*.npy")):
            die(f"{folder} was made of other weights, images or settings: give another --out, or delete it")
    dist.barrier()

    mine = range(dist.rank, len(paths), dist.world_size)
    missing = [i for i in mine if not paths[i].exists()]
    for i in tqdm(missing, desc=label, unit=" shards", disable=None if dist.is_main else True):
        rows = make(i * length, min((i + 1) * length, n))
        with writing(paths[i]) as file:
            np.save(file, rows)
    dist.barrier()
    with reading(folder, "a whole folder of shards"):
        return Shards(paths)


# -------------------------------------------------------------------------------------------------
# The built-in data set: ten kinds of object, rendered from signed distances

SHAPES = ("ball", "box", "triangle", "star", "heart", "ring", "cross", "moon", "drop", "flower")
SHAPES_VERSION = 1                                       # part of the cache's name: raise it when the pictures change
VAL_START = 2**32                                        # the validation images' indices begin here


def hash_uniform(seed: int, index: np.ndarray, columns: int) -> Tensor:
    """Uniform numbers in [0, 1), len(index) x columns, a pure function of (seed, index, column) (SplitMix64)."""
    x = np.asarray(index, np.uint64)[:, None] * np.uint64(columns) + np.arange(columns, dtype=np.uint64)
    x = x + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / 2**24)


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of a shape of about unit radius, negative inside; y points up."""
    r, angle, ax, ay = torch.hypot(x, y), torch.atan2(x, y), x.abs(), y.abs()
    if shape == "ball":
        return r - 0.85
    if shape == "box":
        return torch.hypot((ax - 0.62).clamp(min=0), (ay - 0.62).clamp(min=0)) - 0.15
    if shape == "triangle":
        return torch.maximum(0.866 * ax + 0.5 * y, -y) - 0.48
    if shape == "star":
        fold = torch.remainder(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5
        return r * (0.78 * fold.sin().abs() + 0.63 * fold.cos()) - 0.6
    if shape == "heart":
        ax, y = 0.6 * ax, 0.6 * y + 0.55
        lobe = torch.hypot(ax - 0.25, y - 0.75) - 0.354
        along = 0.5 * (ax + y).clamp(min=0)
        tip = torch.minimum(torch.hypot(ax, y - 1), torch.hypot(ax - along, y - along)) * (ax - y).sign()
        return torch.where(ax + y > 1, lobe, tip) / 0.6
    if shape == "ring":
        return (r - 0.63).abs() - 0.25
    if shape == "cross":
        return torch.minimum(torch.maximum(ax - 0.31, ay - 0.88), torch.maximum(ay - 0.31, ax - 0.88))
    if shape == "moon":
        return torch.maximum(r - 0.92, 0.72 - torch.hypot(x - 0.5, y - 0.15))
    if shape == "drop":
        y = y + 0.3
        return torch.where(0.86 * y < 0.5 * ax, torch.hypot(ax, y) - 0.6, 0.86 * ax + 0.5 * y - 0.6)
    return 0.8 * (r - 0.68 - 0.2 * (5 * angle).cos())     # flower


def render_shapes(index: np.ndarray, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of the built-in set, a pure function of (seed, index): uint8 B x 3 x size x size, and labels in 0..9.

    An upright object of free colour, size, place and pose, lit from a free direction, over a soft two-colour ground
    with two glows and its shadow. Rendered at twice the size and averaged down.
    """
    index, w = np.asarray(index), 2 * size
    label = torch.from_numpy((index % len(SHAPES)).astype(np.int64))
    u = hash_uniform(seed, index, 32)
    u[:, 10] = (u[:, 7] + 0.25 + 0.5 * u[:, 10]) % 1      # the ground's hue keeps away from the object's,
    u[:, 13] = (u[:, 10] + 0.3 * (u[:, 13] - 0.5)) % 1    # each pair of colours stays together
    u[:, 16] = (u[:, 7] + 0.24 * (u[:, 16] - 0.5)) % 1

    def draw(column, low, high):
        return (low + (high - low) * u[:, column])[:, None, None]

    def color(column, saturation, value):                 # columns: hue, saturation, value
        hue = ((((u[:, column, None] + torch.tensor([0, 2 / 3, 1 / 3])) % 1) * 6 - 3).abs() - 1).clamp(0, 1)
        return (draw(column + 2, *value) * (1 - draw(column + 1, *saturation) * (1 - hue[:, :, None])))[..., None]

    line = (torch.arange(w) + 0.5) / w * 2 - 1
    right, up = line[None, None, :], -line[None, :, None]
    turn, scale, aspect = draw(0, -0.3, 0.3), draw(1, 0.65, 0.95), draw(2, 0.9, 1.1)
    dx, dy = right - draw(3, -0.3, 0.3), up - draw(4, -0.3, 0.3)
    x = (dx * turn.cos() + dy * turn.sin()) / (scale * aspect)
    y = (dy * turn.cos() - dx * turn.sin()) / (scale / aspect)
    light = torch.stack(torch.broadcast_tensors(draw(5, -0.8, 0.8), draw(6, 0.25, 0.9), torch.tensor(0.9)))
    d, shadow = torch.empty_like(x), torch.empty_like(x)
    for c, shape in enumerate(SHAPES):
        of = label == c
        d[of] = signed_distance(shape, x[of], y[of]) * scale[of]
        shadow[of] = signed_distance(shape, x[of] + 0.28 * light[0, of], y[of] + 0.22 * light[1, of]) * scale[of]

    top, bottom = color(10, (0.1, 0.6), (0.3, 1.0)), color(13, (0.1, 0.6), (0.25, 0.9))
    image = bottom + (top - bottom) * torch.sigmoid((up - draw(19, -0.5, 0.3)) / draw(20, 0.08, 0.6))[:, None]
    for k in (21, 25):
        glow = torch.exp(-((right - draw(k, -1, 1)) ** 2 + (up - draw(k + 1, -1, 1)) ** 2) / draw(k + 2, 0.05, 0.4))
        image = image + (glow * draw(k + 3, -0.2, 0.3))[:, None]
    image = image * (1 - 0.5 * torch.sigmoid(-shadow / 0.07))[:, None]

    rim = 1 - (-d / 0.3).clamp(0, 1)                      # 1 at the outline, 0 on the plateau: a rounded relief
    down_slope, right_slope = torch.gradient(0.55 * (1 - rim**2).clamp(min=1e-4).sqrt(), spacing=2 / w, dim=(1, 2))
    normal = F.normalize(torch.stack([-right_slope, down_slope, torch.ones_like(d)]), dim=0)
    light = F.normalize(light, dim=0)
    half = F.normalize(light + torch.tensor([0.0, 0.0, 1.0])[:, None, None, None], dim=0)
    diffuse, gloss = (normal * light).sum(0).clamp(min=0), (normal * half).sum(0).clamp(min=0) ** 24
    body, tint = color(7, (0.4, 1.0), (0.4, 1.0)), color(16, (0.4, 1.0), (0.4, 1.0))
    body = body + (tint - body) * torch.sigmoid(3 * (x * draw(29, -1, 1) + y * draw(30, -1, 1)))[:, None]
    body = body * (0.35 + 0.75 * diffuse)[:, None] + (draw(31, 0, 0.6) * gloss)[:, None]
    image = image + (body - image) * (0.5 - d * w / 2).clamp(0, 1)[:, None]
    return to_uint8(F.avg_pool2d(image.clamp(0, 1), 2) * 2 - 1), label


# -------------------------------------------------------------------------------------------------
# Folders of images

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def crop_middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve by boxes while twice too large, bicubic to the short side, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return crop_middle(image, size, size)


def read_image(path: str | Path, size: int) -> np.ndarray:
    """One file as uint8 size x size x 3; size 0 keeps its own. First frame; transparency on white.

    The orientation tag is not applied, as in ADM.
    """
    with Image.open(path) as image:
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image, np.float64)
            if image.mode.startswith("I"):
                values = values / 257  # 16 bits
            elif values.max(initial=0) <= 1:
                values = values * 255
            image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        longest = 16 * min(image.size)  # a strip one pixel wide must not grow without bound
        image = crop_middle(image, min(image.width, longest), min(image.height, longest))
        return np.asarray(center_crop(image, size) if size else image)


def find_images(root: Path) -> list[str]:
    """Image files below root as sorted relative paths. Links are followed; hidden names and loops are left out."""
    def stop(error: OSError) -> None:
        raise error

    paths, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=stop):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.relpath(os.path.join(folder, name), root) for name in names
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES]
    return sorted(paths)


def list_folder(root: Path) -> tuple[list[str], list[tuple[str, int]], int]:
    """Class names, (path, label) of the images, training images first, and the number of training images.

    Class folders, or a flat folder (one class, "all"), below train/ and val/ (validation/, test/) if root has these.
    Else one image in twenty, chosen by the hash of its name, is for validation.
    """
    if not root.is_dir():
        die(f"--data {root}: no such folder, and none of {', '.join(DATASETS)}")
    folders = ["."]
    if (root / "train").is_dir():
        folders = ["train"] + [name for name in ("val", "validation", "test") if (root / name).is_dir()][:1]

    splits = []
    for folder in folders:
        with reading(root, "a folder of images"):
            parts = [(path, Path(path).parts) for path in find_images(root / folder)]
        splits.append([(os.path.normpath(os.path.join(folder, path)), names[0] if len(names) > 1 else "all")
                       for path, names in parts])
    if not splits[0]:
        die(f"--data {root}: no images found (looked for {' '.join(sorted(SUFFIXES))}, in all subfolders)")

    classes = sorted({name for _, name in splits[0]})
    if "all" in classes and len(classes) > 1:
        loose = next(path for path, name in splits[0] if name == "all")
        die(f"--data {root}: {loose} lies beside class folders; use class folders only, or a flat folder only")
    unknown = {name for rows in splits for _, name in rows} - set(classes)
    if unknown:
        die(f"--data {root}: class {min(unknown)} has validation images but no training images")

    if len(splits) == 1 or not splits[1]:
        by_hash = sorted(splits[0], key=lambda row: hashlib.sha256(os.fsencode(row[0])).digest())
        n_val = max(1, len(by_hash) // 20)
        splits = [sorted(by_hash[n_val:]) or by_hash, sorted(by_hash[:n_val])]
    return classes, [(path, classes.index(name)) for path, name in splits[0] + splits[1]], len(splits[0])


# -------------------------------------------------------------------------------------------------
# Packed images: images/*.npy uint8 n x S x S x 3, training images first; labels.npy; and meta.json, written last


def pack(root: str | Path, size: int, out: str | Path, workers: int = 0, replace: bool = False) -> None:
    """Decode, crop and store a folder of images once; a run that was cut goes on. `replace`: also if out is of another.

    Unreadable files are listed with the reason; more than 1 % of them ends the run.
    """
    root, out = Path(root).absolute(), Path(out).absolute()
    classes, files, n_train = list_folder(root)
    paths = [root / path for path, _ in files]
    lengths = [path.stat().st_size if path.exists() else -1 for path in paths]  # to know the folder again
    made_of = [size, classes, n_train, files, lengths]
    others = [path for path in out.glob("images/*.npy") if hash_of(made_of) not in path.name]
    if replace and others:
        shutil.rmtree(out)
    if (out / "meta.json").exists() and not others:
        return

    def try_to_read(path: Path) -> tuple[np.ndarray, str]:
        try:
            return read_image(path, size), ""
        except Exception as error:  # noqa: BLE001  Pillow raises a dozen kinds
            return np.zeros((size, size, 3), np.uint8), one_line(error)

    def decode(start: int, stop: int) -> np.ndarray:
        images, reasons = zip(*pool.map(try_to_read, paths[start:stop]))
        bad = [(start + i, files[start + i][0], reason) for i, reason in enumerate(reasons) if reason]
        with writing(out / f"images/{start}.json") as file:  # before its shard, which makes it count
            file.write(json.dumps(bad).encode())
        return np.stack(images)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # Pillow works outside Python's lock
        make_shards(out / "images", len(files), shard_length(size), decode, made_of, Dist(), f"packing {root.name}")

    labels = np.array([label for _, label in files])
    notes = [out / f"images/{start}.json" for start in range(0, len(files), shard_length(size))]
    unreadable = [row for note in notes for row in json.loads(note.read_text())]
    for i, path, reason in unreadable:
        labels[i] = -1  # a row without an image
        tqdm.write(f"unreadable: {path!r}: {reason}")
    if len(unreadable) > 0.01 * len(files):
        shutil.rmtree(out / "images")  # files that are mended are read again
        die(f"--data {root}: {len(unreadable)} of {len(files)} images are unreadable (listed above), more than 1 %; "
            "mend or remove them")
    write_meta(out, size, classes, made_of, labels, n_train)


def shard_length(size: int) -> int:
    """Images of a shard: at most 1,024, and at most 128 MB."""
    return max(1, min(1024, 2**27 // (3 * size**2)))


def write_meta(out: Path, size: int, classes: list[str], made_of: object, labels: np.ndarray, n_train: int) -> None:
    with writing(out / "labels.npy") as file:
        np.save(file, labels.astype(np.int64))
    meta = {"size": size, "classes": classes, "fingerprint": hash_of(made_of), "training_images": n_train}
    Dist().save(out / "meta.json", meta)


# -------------------------------------------------------------------------------------------------
# Data sets by name. To add one: a function that packs it at `size` into `out`, and its line in DATASETS


def pack_shapes(size: int, out: Path) -> None:
    index, made_of = np.concatenate([np.arange(20_000), VAL_START + np.arange(2_000)]), ["shapes", SHAPES_VERSION, size]

    def render(start: int, stop: int) -> np.ndarray:
        chunks = torch.from_numpy(index[start:stop]).split(max(1, 2**18 // size**2))
        return torch.cat([render_shapes(chunk.numpy(), size)[0] for chunk in chunks]).permute(0, 2, 3, 1).numpy()

    make_shards(out / "images", len(index), shard_length(size), render, made_of, Dist(), "rendering shapes")
    write_meta(out, size, list(SHAPES), made_of, index % len(SHAPES), 20_000)


def pack_cifar10(size: int, out: Path) -> None:
    if size != 32:
        die(f"--data cifar10 has images of 32 px, not --size {size}")
    archive = download(CIFAR10, cache_dir() / "cifar-10-binary.tar.gz", CIFAR10_SHA256)
    with reading(archive, "the archive of CIFAR-10"), tarfile.open(archive) as tar:
        content = {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}
        names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        rows = np.frombuffer(b"".join(content[name] for name in names), np.uint8).reshape(-1, 3073)
        classes = content["batches.meta.txt"].decode().split()
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # a row: label, 3 x 32 x 32
    make_shards(out / "images", len(rows), 1024, lambda a, b: images[a:b], "cifar10", Dist(), "packing cifar10")
    write_meta(out, 32, classes, "cifar10", rows[:, 0], len(rows) // 6 * 5)


def pack_imagenette(size: int, out: Path) -> None:
    archive = download(IMAGENETTE, cache_dir() / "imagenette2-320.tgz", IMAGENETTE_SHA256)
    folder = cache_dir() / "imagenette-files"
    if not folder.exists():
        part = Path(f"{folder}.{os.getpid()}.part")
        with reading(archive, "the archive of imagenette"), tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")  # refuses members that point outside
        part.rename(folder)
    pack(folder / "imagenette2-320", size, out)


DATASETS = {"shapes": pack_shapes, "cifar10": pack_cifar10, "imagenette": pack_imagenette}
CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"
IMAGENETTE_SHA256 = "569b4497c98db6dd29f335d1f109cf315fe127053cedf69010d047f0188e158c"


def download(url: str, path: Path, sha256: str, hint: str = "") -> Path:
    """Fetch url to path unless it is there. The file takes its name when its length and hash (a prefix) are right."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=60) as answer, open(part, "wb") as file:
                total = int(answer.headers.get("Content-Length") or 0)
                with tqdm.wrapattr(answer, "read", total=total, desc=f"getting {path.name}", disable=None) as body:
                    shutil.copyfileobj(body, file)
            if total and part.stat().st_size != total:
                raise OSError(f"{part.stat().st_size} of {total} bytes came")
            if sha256 and not hashlib.sha256(part.read_bytes()).hexdigest().startswith(sha256):
                raise OSError(f"invalid hash, not {sha256}")
            os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if part.exists():
            part.unlink()
        die(f"cannot get {path.name} from {url}: {one_line(error)}. Put the file at {path}{hint}", error)
    return path


@functools.lru_cache  # a large folder is listed once in a process
def prepare(data: str, size: int) -> Path:
    """The packed folder of --data at --size; it is made in the cache if need be."""
    if (Path(data) / "meta.json").is_file():
        return Path(data)
    if data in DATASETS:
        out = cache_dir() / f"{data}-{size}px"
        if not (out / "meta.json").exists():
            DATASETS[data](size, out)
        return out
    root = Path(data).absolute()
    out = cache_dir() / f"{root.name}-{size}px-{hash_of(str(root))[:8]}"
    pack(root, size, out, replace=True)
    return out


class ImageSet:
    """Split "train" or "val" of a data set: a name, a folder of images, or what `pack` wrote. Size 0: as packed.

    rows: uint8 n x S x S x 3 on the disk, of both splits; index: rows of this split; labels: int64 in 0..K-1.
    """

    def __init__(self, data: str, size: int, split: str):
        folder = prepare(data, size)
        with reading(folder, "a whole packed data set"):
            meta, labels = json.loads((folder / "meta.json").read_text()), np.load(folder / "labels.npy")
            self.size, self.classes, self.fingerprint = meta["size"], meta["classes"], meta["fingerprint"]
            self.rows = Shards(sorted((folder / "images").glob("*.npy")))
            is_train = np.arange(len(labels)) < meta["training_images"]
            self.index = np.flatnonzero((labels >= 0) & (is_train == (split == "train")))
            self.labels = torch.from_numpy(labels[self.index])
            if self.rows.shape != (len(labels), self.size, self.size, 3) or self.labels.max() >= len(self.classes):
                raise ValueError(f"images {self.rows.shape}, {len(labels)} labels")
        if size and self.size != size:
            die(f"--data {data} was packed at {self.size} px, not --size {size}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: np.ndarray) -> Tensor:
        """uint8 B x 3 x S x S of images number `index`, on the CPU."""
        return torch.from_numpy(self.rows[self.index[index]]).permute(0, 3, 1, 2)

    def view(self, rows: Tensor, mirror: Tensor) -> Tensor:
        """uint8 B x S x S x 3 -> float B x 3 x S x S in [-1, 1], mirrored where `mirror` (B) says so."""
        x = to_float(rows.permute(0, 3, 1, 2))
        return torch.where(mirror[:, None, None, None], x.flip(3), x)


# -------------------------------------------------------------------------------------------------
# Batches


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, STREAMS["epoch"], epoch]).permutation(n)


def batch_indices(n: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Dataset indices of the global batch: a window on an endless row of shuffled epochs."""
    at, index = step * batch, []
    while len(index) < batch:
        epoch, offset = divmod(at + len(index), n)
        index.extend(epoch_order(n, seed, epoch)[offset:offset + batch - len(index)])
    return np.array(index)


class Loader:
    """loader(step) -> (x, labels): this process's rows of the global batch, on the device.

    A data set has rows, index, labels and view(rows, mirror). One thread reads the next batch while the device works.
    A GPU holds all rows if they take less than a third of its free memory.
    """

    def __init__(self, dataset: typing.Any, batch: int, seed: int, dist: "Dist"):
        self.dataset, self.batch, self.seed, self.dist = dataset, batch, seed, dist
        self.pool, self.ahead, self.wait_seconds, self.resident = ThreadPoolExecutor(1), {}, 0.0, None
        arrays = [torch.from_numpy(array) for array in dataset.rows.arrays]
        if dist.device.type == "cuda" and sum(a.nbytes for a in arrays) < torch.cuda.mem_get_info()[0] / 3:
            self.resident = arrays[0].new_empty(dataset.rows.shape, device=dist.device)
            for part, array in zip(self.resident.split(dataset.rows.length), arrays):
                part.copy_(array)

    def gather(self, step: int) -> list[Tensor]:
        mine, cuda = self.dist.local_slice(self.batch), self.dist.device.type == "cuda"
        index = batch_indices(len(self.dataset.labels), self.batch, self.seed, step)[mine]
        mirror = self.dist.rng(self.seed, "mirror", step).random(self.batch)[mine] < 0.5
        rows = self.dataset.index[index]
        rows = self.dataset.rows[rows] if self.resident is None else rows
        batch = [torch.from_numpy(rows), torch.from_numpy(mirror), self.dataset.labels[index]]
        return [x.pin_memory().to(self.dist.device, non_blocking=True) if cuda else x for x in batch]

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        rows, mirror, labels = (self.ahead.pop(step, None) or self.pool.submit(self.gather, step)).result()
        self.ahead = {step + 1: self.pool.submit(self.gather, step + 1)}
        self.wait_seconds += time.perf_counter() - start
        return self.dataset.view(rows if self.resident is None else self.resident[rows], mirror), labels


# =================================================================================================
# THE RUN: settings, processes, optimizers, average, checkpoints, log, pictures
# =================================================================================================


def option(default: typing.Any, help: str, choices: tuple = (), least: float = 0, free: bool = False) -> typing.Any:
    """A field of a settings dataclass that is a flag. `free` ones may differ when a run goes on."""
    metadata = {"help": help, "choices": choices, "least": least, "free": free}
    return dataclasses.field(default=default, metadata=metadata)


def parse_config(config: type, presets: dict[str, dict], doc: str, argv: list[str] | None = None) -> typing.Any:
    """Defaults, then --preset NAME, then flags -> config. A mistake is one line and exit status 2."""
    types = typing.get_type_hints(config)
    flags = {f.name: f for f in dataclasses.fields(config) if "help" in f.metadata}
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")
    if presets:
        parser.add_argument("--preset", choices=presets, default="quick", help="a table of settings (default quick)")
    for name, f in flags.items():
        text = f.metadata["help"].replace("%", "%%") + (f" (default {f.default})" if f.default != "" else "")
        kind = {"type": types[name], "choices": f.metadata["choices"] or None}
        if types[name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)

    values = vars(parser.parse_args(argv))
    preset = values.pop("preset", "")
    try:
        cfg = config(**(presets.get(preset, {}) | values))
        for name, f in flags.items():
            if types[name] in (int, float) and not getattr(cfg, name) >= f.metadata["least"]:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be at least {f.metadata['least']}")
        cfg.check()
    except ValueError as error:
        parser.error(str(error))
    if os.environ.get("RANK", "0") == "0":
        print(f"{parser.prog} {preset}", *(f"{name}={value}" for name, value in values.items()), flush=True)
    return cfg


# Numbers of the random streams. Each purpose has its own, so that its draws are independent of the others
STREAMS = {"epoch": 1, "mirror": 2, "mask ratio": 3, "mask": 4, "mask, stage 2": 5, "augmentation": 6,
           "sampling noise": 6, "training noise": 7, "labels": 8, "classifier noise": 9}


@dataclasses.dataclass(frozen=True)
class Dist:
    """This process among those of torchrun, its device and its precision (fp32 or bf16)."""
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    precision: str = "fp32"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def alone(self) -> "Dist":
        """The same device without the other processes."""
        return dataclasses.replace(self, rank=0, world_size=1)

    def local_slice(self, batch: int) -> slice:
        """This process's rows of a global batch."""
        if batch % self.world_size:
            die(f"--batch-size {batch} must be a multiple of the {self.world_size} processes that share it")
        share = batch // self.world_size
        return slice(share * self.rank, share * (self.rank + 1))

    def print(self, *text: object) -> None:
        if self.is_main:
            tqdm.write(" ".join(map(str, text)), file=sys.stdout)
            sys.stdout.flush()

    def autocast(self) -> torch.autocast:
        """Matrix products in bf16, if that is the precision of the run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def rng(self, seed: int, stream: str, *index: int) -> np.random.Generator:
        """numpy's generator for (seed, stream, index), the same on every process."""
        return np.random.default_rng([seed, STREAMS[stream], *index])

    def generator(self, seed: int, stream: str, *index: int) -> torch.Generator:
        """torch's generator for (seed, stream, index), on the device."""
        state = np.random.SeedSequence([seed, STREAMS[stream], *index]).generate_state(1, np.uint64)
        return torch.Generator(self.device).manual_seed(int(state[0] >> 1))

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(x)
        return x

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def rank0_first(self, make: typing.Callable) -> typing.Any:
        """make() on rank 0, then on the others, which read what it left in the cache."""
        if not self.is_main:
            self.barrier()
        result = make()
        if self.is_main:
            self.barrier()
        return result

    def wrap(self, model: torch.nn.Module, compiled: bool = False) -> torch.nn.Module:
        """The model as training calls it: compiled if asked for, gradients averaged over the processes."""
        if compiled:
            model = torch.compile(model, fullgraph=True)
        if self.world_size == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def micro_batches(self, model: torch.nn.Module, batch: int, micro: int):
        """Slices of at most `micro` rows (0: all). Gradients are exchanged in the last one only."""
        count = math.ceil(batch / micro) if micro else 1
        for i in range(count):
            wait = i < count - 1 and self.world_size > 1
            with model.no_sync() if wait else contextlib.nullcontext():
                yield slice(batch * i // count, batch * (i + 1) // count)

    def make_out_dir(self, path: str, cfg: typing.Any = None, made_of: dict | None = None) -> Path:
        """The folder of a run. Its settings.json holds cfg and made_of (hashes of data, weights).

        A folder of other settings ends the run, so that no result is lost; free options may differ.
        """
        file = Path(path) / "settings.json"
        if self.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
        if self.is_main and cfg:
            settings, stored = dataclasses.asdict(cfg) | made_of, {}
            if file.exists():
                with reading(file, "the settings of a run"):
                    stored = dict(json.loads(file.read_text()))
            free = {f.name for f in dataclasses.fields(cfg) if f.metadata.get("free")}
            for name in sorted(settings.keys() & stored.keys() - free):
                if settings[name] != stored[name]:
                    die(f"{path} was made with {name} {stored[name]}, now {settings[name]}: "
                        "give another --out, or delete this one")
            self.save(file, settings)
        self.barrier()
        return Path(path)

    def save(self, path: Path, content: dict) -> None:
        """Write a dict as .json or .pt, with the commit; on rank 0 only; whole or not at all."""
        if self.is_main:
            content = content | {"commit": commit()}
            with writing(path) as file:
                if path.suffix == ".json":
                    file.write((json.dumps(content, indent=1) + "\n").encode())
                else:
                    torch.save(content, file)


@functools.lru_cache
def commit() -> str:
    """The commit of this code, with "-dirty" if it was edited since; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, cwd=Path(__file__).parent, text=True, capture_output=True, timeout=10, check=False)
        return done.stdout.strip() or "unknown"
    return "unknown"


def start(precision: str) -> Dist:
    """Join the processes that torchrun started, or be the only one. Choose device and precision."""
    rank, world_size, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device, bf16 = torch.device("cpu"), False
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            die(f"--nproc_per_node is larger than the {torch.cuda.device_count()} GPUs of this machine")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; speed comes from bf16
        torch.set_float32_matmul_precision("highest")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # else fp32: fp16 would need a scaler
    elif sys.platform == "linux":
        bf16 = "bf16" in Path("/proc/cpuinfo").read_text()  # avx512_bf16, amx_bf16; on Arm: bf16
        with contextlib.suppress(AttributeError, OSError):
            # glibc gives each large tensor back to the system and asks for it again: 6 % of a step
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if world_size > 1:  # rank 0 may pack a large data set for hours while the others wait
        nccl, hours = device.type == "cuda", datetime.timedelta(hours=12)
        store, _, _ = next(torch.distributed.rendezvous("env://", rank, world_size, timeout=hours))
        # torchrun --max-restarts keeps its store: this attempt must not meet what an earlier one left there
        store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        torch.distributed.init_process_group("nccl" if nccl else "gloo", timeout=hours, store=store, rank=rank,
                                             world_size=world_size, device_id=device if nccl else None)
    if precision == "auto":
        precision = "bf16" if bf16 else "fp32"
    dist = Dist(rank, max(1, world_size), device, precision)
    dist.print(f"{dist.world_size} process(es) on {device.type}, {torch.get_num_threads()} threads, {precision}, "
               f"torch {torch.__version__}, {commit()}")
    return dist


def launch(main: typing.Callable, config: type, presets: dict, doc: str, argv: list[str] | None = None) -> None:
    """Run main(cfg, dist) of a script. An error of the user or the machine ends in one line."""
    try:
        cfg = parse_config(config, presets, doc, argv)
        main(cfg, start(cfg.precision))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        die("stopped; the same command goes on from the last checkpoint or shard")
    except OSError as error:
        die(f"{error.filename or 'reading or writing'}: {error.strerror or error}; what was saved is kept", error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            die("out of memory: try a smaller --batch-size, or in training a --micro-batch", error)
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            die(f"process {os.environ.get('RANK')} lost another one; the message of that one says why", error)
        raise


class Muon(torch.optim.Muon):
    """torch's Muon with the matrices of a shape orthogonalised in one batch: 41 in place of 76 ms a step of `quick`."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
                    self.state[p] = self.state[p] or {"momentum_buffer": torch.zeros_like(p)}
            for shape, params in by_shape.items():
                momenta, grads = [self.state[p]["momentum_buffer"] for p in params], [p.grad for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # K x A x B
                updates = orthogonalise(nesterov, group["ns_coefficients"], group["ns_steps"])
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates.unbind(), alpha=-group["lr"] * max(1, shape[0] / shape[1]) ** 0.5)


def orthogonalise(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """About U V^T of each matrix U S V^T of x, K x A x B: Muon's Newton-Schulz iteration, in bf16."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.bfloat16().mT if tall else x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float().contiguous()


def make_optimizers(model: torch.nn.Module, cfg: typing.Any) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the matrices inside blocks and AdamW for the rest."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {name: p for name, p in named.items() if cfg.optimizer == "muon" and p.ndim == 2 and "blocks." in name}
    rest = [p for name, p in named.items() if name not in muon]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]  # biases, norms
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], cfg.lr, (0.9, cfg.beta2), fused=True)]
    if muon:
        optimizers.append(Muon(list(muon.values()), cfg.muon_lr, cfg.weight_decay))
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["peak_lr"] = group["lr"]
    return optimizers


def lr_schedule(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Share of the peak learning rate: linear warm-up, then constant, or cosine or linear to a tenth."""
    done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    decay = {"constant": 1.0, "cosine": 0.55 + 0.45 * np.cos(np.pi * done), "linear": 1 - 0.9 * done}[schedule]
    return min(1.0, (step + 1) / max(1, warmup)) * float(decay)


def set_lr(optimizers: list[torch.optim.Optimizer], step: int, steps: int, cfg: typing.Any) -> float:
    """Set the learning rates of a step. Returns their share of the peak."""
    scale = lr_schedule(step, steps, cfg.warmup, cfg.schedule)
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["lr"] = group["peak_lr"] * scale
    return scale


class Ema:
    """Exponential moving average of a model's parameters, fp32, in `model`. Its horizon grows with the run."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay
        self.source, self.target = [p.detach() for p in model.parameters()], list(self.model.parameters())

    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.target, self.source, 1 - min(self.decay, (step + 1) / (step + 10)))


def load_checkpoint(path: str | Path, kind: str) -> dict:
    """The dict that a script (kind: "tokenizer", "diffusion") saved, on the CPU. Runs no code from the file."""
    with reading(path, f"a checkpoint of {kind}.py"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["kind"] != kind:
            raise ValueError(f"it is one of {state['kind']}.py")
    return state


class Log:
    """Averages the terms of the steps, prints them and appends them to log.jsonl.

    Terms stay on the device until `write`, so a step never waits for the host.
    """

    def __init__(self, cfg: typing.Any, dist: Dist, stage: str, step: int, steps: int, loader: Loader):
        self.cfg, self.dist, self.stage, self.steps, self.loader = cfg, dist, stage, steps, loader
        self.path, self.flops = Path(cfg.out) / "log.jsonl", 0
        self.bar = tqdm(total=steps, initial=step, desc=stage, disable=None if dist.is_main else True, mininterval=1)
        if dist.is_main and self.path.exists():  # the steps after the checkpoint come again
            lines = []
            for line in self.path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut
                    entry = json.loads(line)
                    lines += [line + "\n"] if entry["stage"] != stage or entry["step"] <= step else []
            with writing(self.path) as file:
                file.write("".join(lines).encode())
        self.reset()

    def reset(self) -> None:
        self.terms, self.scales = {}, []
        self.start, self.waited = time.perf_counter(), self.loader.wait_seconds

    def count_flops(self, model: torch.nn.Module, *inputs: Tensor) -> None:
        """FLOPs of a training step per image, counted on the meta device: a CPU's attention hides from torch's counter."""
        model = copy.deepcopy(model).to("meta")
        with FlopCounterMode(display=False) as counter:
            out = model(*(x[:1].to("meta") for x in inputs))
            outputs = out.values() if isinstance(out, dict) else [out]
            torch.autograd.backward([x.sum() for x in outputs if x.requires_grad])
        self.flops = counter.get_total_flops()

    def add(self, lr_scale: float, **terms: Tensor | tuple[Tensor, Tensor]) -> None:
        """Terms of one step: a scalar each, or a pair (sum, count)."""
        self.scales.append(lr_scale)
        self.bar.update()
        for name, value in terms.items():
            pair = value if isinstance(value, tuple) else (value, torch.ones_like(value))
            self.terms.setdefault(name, []).append(torch.stack(pair).detach().float())

    def write(self, step: int) -> None:
        """Log the means since the line before. A term that is not finite ends the run."""
        pairs = torch.cat([torch.stack(rows) for rows in self.terms.values()])
        pairs = self.dist.all_reduce(pairs).cpu().double().split([len(rows) for rows in self.terms.values()])
        values, bad = {}, {}
        for name, rows in zip(self.terms, pairs):
            total, count = rows.sum(0).tolist()
            if not math.isfinite(total):  # bad: how many steps ago that began
                bad[name] = len(rows) - int(rows.isfinite().all(1).int().argmin())
            elif count:
                values[name] = float(f"{total / count:.6g}")
        if bad:
            name = max(bad, key=bad.get)
            die(f"{self.stage}: {name} is not finite at step {step - bad[name] + 1} (learning rate "
                f"{self.cfg.lr * self.scales[-bad[name]]:.3g}). The last checkpoint is kept. "
                "Try a lower --lr or --precision fp32")

        seconds = time.perf_counter() - self.start
        rate = len(self.scales) * self.cfg.batch_size / seconds
        wait = (self.loader.wait_seconds - self.waited) / seconds
        entry = {"stage": self.stage, "step": step, **values, "lr": self.cfg.lr * self.scales[-1],
                 "images_per_s": round(rate, 1), "tflops": float(f"{rate * self.flops / 1e12:.4g}"),
                 "data_wait": round(wait, 4)}
        if self.dist.device.type == "cuda":
            entry["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if self.dist.is_main:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.set_postfix_str(shown)
        self.dist.print(f"{self.stage} {step}/{self.steps}  {shown}  {rate:.0f} images/s  {entry['tflops']} TFLOP/s  "
                        f"data wait {wait:.1%}")
        self.reset()


def save_grid(path: Path, images: Tensor, columns: int, titles: tuple = (), names: tuple = ()) -> None:
    """A PNG of uint8 N x 3 x S x S, row by row, small ones enlarged; titles over columns, names under images."""
    zoom, gap = max(1, 96 // images.shape[-1]), 2
    cell, head, foot = images.shape[-1] * zoom, 16 * bool(titles), 14 * bool(names)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (cell + gap) - gap, head + rows * (cell + foot + gap) - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        pen.text((i * (cell + gap) + 2, 2), title, "black")
    for i, image in enumerate(images.cpu()):
        x, y = i % columns * (cell + gap), head + i // columns * (cell + foot + gap)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        if names:
            pen.text((x + 2, y + cell + 1), names[i], "black")
    with writing(path) as file:
        sheet.save(file, "PNG")


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = option("", "folder of images: class folders or flat, with or without train/ and val/")
    size: int = option(256, "side of the stored images in pixels", least=1)
    out: str = option("", "folder to write; give it to the other scripts as --data")
    workers: int = option(0, "threads that decode; 0: one a core")
    precision: typing.ClassVar = "fp32"

    def check(self) -> None:
        if not self.data or not self.out:
            raise ValueError("--data DIR and --out DIR are needed")


def main(cfg: Config, dist: Dist) -> None:
    pack(cfg.data, cfg.size, cfg.out, cfg.workers)
    for split in ("train", "val"):
        images = ImageSet(cfg.out, cfg.size, split)
        dist.print(f"{cfg.out}: {split} {len(images)} images of {cfg.size} px, {len(images.classes)} classes")


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
