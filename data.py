"""Images in; below, under its own banner, what every run shares.

    python data.py --data DIR --size 256 --out imagenet256  # pack a folder of images once

Conventions of the project; tokenizer.py has the letters:
  images   float B x 3 x S x S in [-1, 1] inside; uint8, rounded, in files and metrics
  random   a draw depends on (seed, stream, step) in training, (seed, image) in sampling.
           Processes draw for the global batch and keep their own rows
"""
import argparse
import copy
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import cache, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import NoReturn
from urllib.request import urlretrieve

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, distributed, hypot, maximum, minimum, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# ---- Errors and files

def die(message: str) -> NoReturn:
    """End the program with one line."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")

def say(*text: object):
    """Print a line above the progress bars, on the first process."""
    if os.environ.get("RANK", "0") == "0":
        with tqdm.external_write_mode():
            print(*text, flush=True)
say_once = cache(say)

def one_line(error: Exception) -> str:
    # torch.save hides what the system said
    system = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None)
    text = f"{error.args[0]} is missing" if isinstance(error, KeyError) else system or str(error)
    return " ".join(text.split())[:200] or type(error).__name__

@contextmanager
def reading(path: str | Path, what: str):
    """An error in reading ends in one line: the file is not `what` it should be."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  libraries raise all kinds
        if getattr(error, "filename", None):
            die(f"{error.filename}: {error.strerror}")
        die(f"{path} is not {what} ({one_line(error)})")

@contextmanager
def writing(path: str | Path, hint: str = "; what was saved before is kept"):
    """A temporary file, renamed to `path` once it is whole."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another run renamed it
            for old in part.parent.glob(f"{Path(path).name}.*.part"):
                if old.stat().st_mtime < time.time() - 3600:  # a killed run left it
                    old.unlink()
        with open(part, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as error:  # noqa: BLE001
        die(f"cannot write {path}: {one_line(error)}{hint}")
    finally:
        with suppress(OSError):
            part.unlink()

def cache_dir() -> Path:
    """Folder of downloads, packed images and classifiers."""
    with reading("~", "a folder: set MAETOK_CACHE to one"):
        name = os.environ.get("MAETOK_CACHE") or "~/.cache/maetok"
        return Path(name).expanduser().absolute()

def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] float -> 0..255 uint8, rounded."""
    if not x.isfinite().all():  # a black picture would hide it
        die("an image is not finite: damaged weights, or try --precision fp32")
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

def to_float(x: Tensor) -> Tensor:
    """0..255 uint8 -> [-1, 1] float."""
    return x.float() / 127.5 - 1

# ---- Shards: images, latents or samples in .npy files with as many rows each

class Shards:
    """Their rows, memory-mapped."""

    def __init__(self, paths: list[Path]):
        self.arrays = []
        for path in paths:
            array = np.load(path, mmap_mode="r")
            # torch's map, unlike numpy's, holds no file open
            x = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
            self.arrays.append(x[array.offset:].view(array.dtype).reshape(array.shape))
        self.shape = sum(map(len, self.arrays)), *self.arrays[0].shape[1:]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        places = zip(*np.divmod(index, len(self.arrays[0])))
        return np.stack([self.arrays[shard][row] for shard, row in places])

def hash_of(content) -> str:
    return sha256(json.dumps(content).encode()).hexdigest()[:16]

def make_shards(folder: Path, n: int, length: int, make: Callable, made_of: object,
                dist: "Dist", label: str) -> Shards:
    """n rows that make(start, stop) returns, `length` to a file, shared out over processes.

    A run that was cut goes on. Files of another `made_of`, whose hash they are named by, end it.
    """
    key = hash_of(made_of)
    paths = [folder / f"{i:05d}-{key}.npy" for i in range(math.ceil(n / length))]
    if dist.is_main and set(folder.glob("*.npy")) - set(paths):
        die(f"{folder} was made of other weights, images, settings or precision: give another --out")
    dist.barrier()
    mine = range(dist.rank, len(paths), dist.world_size)
    for i in tqdm(mine, label, disable=not dist.is_main or None):
        if not paths[i].exists():
            rows = make(i * length, min((i + 1) * length, n))
            with writing(paths[i]) as file:
                np.save(file, rows)
    dist.barrier()
    with reading(folder, "a whole folder of shards"):
        return Shards(paths)

# ---- The built-in data set: ten kinds of object, rendered from signed distances

SHAPES = "ball", "box", "triangle", "star", "heart", "ring", "cross", "moon", "drop", "flower"

def hash_uniform(index: np.ndarray) -> Tensor:
    """Uniform in [0, 1), B x 32: SplitMix64 of (index, column)."""
    x = index.astype(np.uint64)[:, None] * 32 + np.arange(32, dtype=np.uint64)
    x = x + 0x632BE59BD9B4E019
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * factor
    x = (x ^ (x >> 31)) >> 40
    return torch.from_numpy(x.astype(np.float32) / 2**24)

def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to an outline of about unit radius, negative inside; y points up."""
    r, angle, ax, ay, low = hypot(x, y), torch.atan2(x, y), x.abs(), y.abs(), y + 0.3
    if shape == "star":
        fold = torch.remainder(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5
        return r * (0.78 * fold.sin().abs() + 0.63 * fold.cos()) - 0.6
    if shape == "heart":
        ax, y = 0.6 * ax, 0.6 * y + 0.55
        along = 0.5 * (ax + y).clamp(min=0)
        tip = minimum(hypot(ax, y - 1), hypot(ax - along, y - along)) * (ax - y).sign()
        return torch.where(ax + y > 1, hypot(ax - 0.25, y - 0.75) - 0.354, tip) / 0.6
    return {
        "ball": lambda: r - 0.85,
        "box": lambda: hypot((ax - 0.62).clamp(min=0), (ay - 0.62).clamp(min=0)) - 0.15,
        "triangle": lambda: maximum(0.866 * ax + 0.5 * y, -y) - 0.48,
        "ring": lambda: (r - 0.63).abs() - 0.25,
        "cross": lambda: maximum(maximum(ax, ay) - 0.88, minimum(ax, ay) - 0.31),
        "moon": lambda: maximum(r - 0.92, 0.72 - hypot(x - 0.5, y - 0.15)),
        "drop": lambda: torch.where(
            0.86 * low < 0.5 * ax, hypot(ax, low), 0.86 * ax + 0.5 * low) - 0.6,
        "flower": lambda: 0.8 * (r - 0.68 - 0.2 * (5 * angle).cos())}[shape]()

def render_shapes(index: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    """The built-in images, uint8 B x 3 x S x S, and labels in 0..9."""
    w = 2 * size  # averaged down at the end
    label = torch.from_numpy(index % len(SHAPES))
    u = hash_uniform(index)
    u[:, 10] = (u[:, 7] + 0.25 + 0.5 * u[:, 10]) % 1  # the ground is not of the object's hue
    u[:, 13] = (u[:, 10] + 0.3 * (u[:, 13] - 0.5)) % 1  # pairs of colours are alike
    u[:, 16] = (u[:, 7] + 0.24 * (u[:, 16] - 0.5)) % 1
    u = u[..., None, None, None]  # B x 32 x 1 x 1 x 1

    def draw(column, low, high):
        return low + (high - low) * u[:, column]

    def color(column, saturation=(0.4, 1), value=(0.4, 1)):  # hue is uniform
        hue = (u[:, column] + torch.tensor([0, 2 / 3, 1 / 3])[:, None, None]) % 1
        hue = ((hue * 6 - 3).abs() - 1).clamp(0, 1)  # B x 3 x 1 x 1
        return draw(column + 2, *value) * (1 - draw(column + 1, *saturation) * (1 - hue))

    right = (torch.arange(w) + 0.5) / w * 2 - 1
    up = -right[:, None]
    turn, scale, aspect = draw(0, -0.3, 0.3), draw(1, 0.65, 0.95), draw(2, 0.9, 1.1)
    dx, dy = right - draw(3, -0.3, 0.3), up - draw(4, -0.3, 0.3)
    x = (dx * turn.cos() + dy * turn.sin()) / (scale * aspect)  # B x 1 x w x w
    y = (dy * turn.cos() - dx * turn.sin()) / (scale / aspect)
    light = torch.stack([draw(5, -0.8, 0.8), draw(6, 0.25, 0.9), draw(5, 0.9, 0.9)])
    d, shadow = torch.empty_like(x), torch.empty_like(x)
    for c, shape in enumerate(SHAPES):
        of = label == c
        moved = x[of] + 0.28 * light[0, of], y[of] + 0.22 * light[1, of]
        d[of] = signed_distance(shape, x[of], y[of]) * scale[of]
        shadow[of] = signed_distance(shape, *moved) * scale[of]

    top, bottom = color(10, (0.1, 0.6), (0.3, 1)), color(13, (0.1, 0.6), (0.25, 0.9))
    blend = torch.sigmoid((up - draw(19, -0.5, 0.3)) / draw(20, 0.08, 0.6))
    image = bottom + (top - bottom) * blend  # B x 3 x w x w
    for k in (21, 25):
        away = (right - draw(k, -1, 1)) ** 2 + (up - draw(k + 1, -1, 1)) ** 2
        image = image + torch.exp(-away / draw(k + 2, 0.05, 0.4)) * draw(k + 3, -0.2, 0.3)
    image = image * (1 - 0.5 * torch.sigmoid(-shadow / 0.07))

    rim = 1 - (-d / 0.3).clamp(0, 1)  # 1 at the outline, 0 on the plateau: a rounded relief
    relief = 0.55 * (1 - rim**2).clamp(min=1e-4).sqrt()
    down_slope, right_slope = torch.gradient(relief, spacing=2 / w, dim=(2, 3))
    normal = F.normalize(torch.stack([-right_slope, down_slope, torch.ones_like(d)]), dim=0)
    light = F.normalize(light, dim=0)
    half = F.normalize(torch.stack([*light[:2], light[2] + 1]), dim=0)
    diffuse, gloss = ((normal * to).sum(0).clamp(min=0) for to in (light, half))
    body, tint = color(7), color(16)
    blend = torch.sigmoid(3 * (x * draw(29, -1, 1) + y * draw(30, -1, 1)))
    body = body + (tint - body) * blend
    body = body * (0.35 + 0.75 * diffuse) + draw(31, 0, 0.6) * gloss**24
    image = image + (body - image) * (0.5 - d * w / 2).clamp(0, 1)
    return to_uint8(F.avg_pool2d(image.clamp(0, 1), 2) * 2 - 1), label

# ---- Folders of images
# Links are followed; to folders in two levels. Hidden names and what systems leave are passed over.
# Files that are no images, and folders beside the splits, are left out and named.
#   Splits: train, training; val, valid, validation, dev, eval, test, testing; also Train2017.
#   A train/ beside other folders of images but no validation split is a class. Without a
#   validation split one image in twenty is taken, by the hash of its name; each class keeps one.
#   Classes: the folders of a split, or at the top, also empty ones. Loose images are one
#   class, "all"; beside class folders they are refused. A lone folder of folders stands for
#   the whole: flowers.zip/flowers/rose.

FORMATS = "AVIF BMP DDS DIB GIF ICO JPEG JPEG2000 PCX PNG PPM PSD QOI SGI TGA TIFF WEBP"
SUFFIXES = {k for k, name in Image.registered_extensions().items() if name in FORMATS.split()}
FORMATS = [name for name in FORMATS.split() if name in Image.OPEN]
SPLITS = ("train", "training"), ("val", "valid", "validation", "dev", "eval", "test", "testing")
DEBRIS = re.compile(r"\.(?!\.).*(?<!\.icloud)|__MACOSX|@eaDir|#recycle|\$RECYCLE\.BIN|System Volume Information|lost\+found")

def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's: boxes while it is twice too large, then bicubic; the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    w, h = (round(side * (size / min(image.size))) for side in image.size)
    left, top = (w - size) // 2, (h - size) // 2
    image = image.resize((w, h), Image.BICUBIC)
    return image.crop((left, top, left + size, top + size))

def to_8_bits(image: Image.Image, tags: dict) -> Image.Image:
    """Deep grey -> 8 bits. A file of up to 16 bits says what is white, by the tags of a TIFF.

    In others the least of 1, 255, 65535 that holds the values, file by file.
    """
    x = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
    if x.min() < -0.1 * x.max():
        raise ValueError("negative values")
    declared = 2 ** tags.get(258, [16])[0] - 1  # BitsPerSample
    known = "I;16" in image.mode or (image.mode, image.format) == ("I", "PPM")
    whites = [declared] if known else [1, 255, 65535, x.max()]
    white = next(white for white in whites if x.max() <= 1.1 * white)
    if tags.get(262) == 0:  # white is zero; Pillow knows it of 8 bits only
        x = white - x
    grey = Image.fromarray((x * (255 / white)).round().clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(x != image.info["transparency"]))
    return grey

def read_image(path: str | Path, size: int) -> np.ndarray:
    """uint8 size x size x 3, upright, on white, profiles ignored; size 0 keeps that of the file."""
    # By its path Pillow would map a TIFF as if it lay on its side
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        if max(image.size) > 1000 * min(image.size):
            raise ValueError("too long a strip")
        bits = str(image.tile[0][3])[-2:] if image.tile else ""
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        with suppress(Exception):  # some formats lack it
            if image.is_animated:
                say_once("of animations and pages the first counts")
        image.load()
        with suppress(Exception):  # the tag may be damaged
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "L" and "transparency" in image.info:  # Pillow scales the grey only
            image.info["transparency"] *= {";2": 85, ";4": 17}.get(bits, 1)
        if image.mode[0] in "IF":
            image = to_8_bits(image, tags)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if not image.getextrema()[3][1]:
                say_once("transparent images are white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if np.max(image.getextrema()) < 17:
            say_once("almost black images")
        return np.array(center_crop(image, size) if size else image)

def try_to_read(path: Path, size: int) -> np.ndarray:
    """The image; zeros, and a line that names the file, if it is unreadable."""
    try:
        image = read_image(path, size)
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # noqa: BLE001
        say(f"unreadable: {str(path)!r}: {one_line(error)}")
        return np.zeros((size, size, 3), np.uint8)
    image[0, 0, 0] |= not image.any()  # a black picture is not all zeros
    return image

def shorten(words: list[str]) -> str:
    return ", ".join(words[:20]) + ", ..." * (len(words) > 20)

def find_images(root: str | Path, above: tuple = ()) -> tuple[list, list]:
    """Paths of images, and suffixes or paths of all else."""
    images, others, here = [], [], os.path.realpath(root)
    for entry in os.scandir(root) if here not in above else ():
        name, path, suffix = entry.name, entry.path, Path(entry.name).suffix.lower()
        if DEBRIS.fullmatch(name):
            continue
        if entry.is_dir(follow_symlinks=len(above) < 2):  # a few levels, or links multiply
            below = find_images(path, (*above, here))
            images += below[0]
            others += below[1]
        elif suffix in SUFFIXES and entry.is_file():
            images.append(path)
        else:
            others.append(suffix or name if entry.is_file() else f"{path!r} (no file)")
    return images, others

def count(others):
    return shorten([f"{n} {name}" for name, n in sorted(Counter(others).items())]) or "nothing"

def all_images(root: Path):
    """Paths of all images below a folder."""
    images, others = find_images(root)
    say(f"{root}: {len(images)} images below it, of all splits; left out: {count(others)}")
    return sorted(images) or die(f"{root}: no images found")

Listing = namedtuple("Listing", "root classes n_train files summary")

def list_folder(root: Path) -> Listing:
    """What a folder means. files: (path below root, label), training images first."""
    if not root.is_dir():
        die(f"--data {root}: no such folder of images, and none of {', '.join(DATASETS)}")
    paths, others = find_images(root)
    paths = sorted(path.removeprefix(os.path.join(root, "")) for path in paths)
    tops = sorted({path.split(os.sep)[0] for path in paths if os.sep in path})
    splits = [next((top for name in names for top in tops
                    if top.lower().rstrip("0123456789") == name), None) for names in SPLITS]
    if len(tops) == 1 and not splits[0] and all(path.count(os.sep) > 1 for path in paths):
        say(f"{root}: only {tops[0]}/ holds images; left out: {count(others)}")
        return list_folder(root / tops[0])
    if not splits[0] or not splits[1] and len(tops) > 1:
        splits = ["", None]  # the top folders are classes
        folders = " ".join({os.path.dirname(path) for path in paths})
        words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", folders)}
        if all(words.intersection(names) for names in SPLITS):
            die(f"--data {root}: splits lie inside {tops[0]}/ or have other names: put train/, val/ on top")

    rows = {split: [] for split in splits}  # (path, class, or "" of a loose image)
    for path in paths:
        top, *parts = (path if splits[0] else os.sep + path).split(os.sep)
        if top in rows:
            rows[top].append((path, parts[0] if parts[1:] else ""))
        else:
            others.append(f"images in {top}/" if parts else "loose images")
    train, val = rows.values()
    if not train:
        die(f"--data {root}: no images found below it; left out: {count(others)}")
    inside = os.scandir(root / splits[0]) if any(name for _, name in train) else ()
    names = sorted(at.name for at in inside if at.is_dir() and not DEBRIS.fullmatch(at.name))
    number = {name: i for i, name in enumerate(names or [""])}  # or loose images
    for path, name in train + val:
        if name not in number:
            die(f"--data {root}: {path} lies in no class folder of training images; each "
                "split needs the same class folders, and no images beside them")

    if not val:
        by_hash = sorted(train, key=lambda row: sha256(os.fsencode(row[0])).digest())
        kept = {name: path for path, name in by_hash}
        val = [(path, name) for path, name in by_hash if path != kept[name]]
        val = sorted(val[:max(1, len(train) // 20)])
        train = sorted(set(train) - set(val))
        val = val or by_hash[:1]  # each class has one image
    files = [(path, number[name]) for path, name in train + val]
    source = f"from {splits[1]}/" if splits[1] else "one in twenty"
    summary = (f"{len(number)} classes, {len(train):,} + {len(val):,} images ({source}); "
               f"left out: {count(others)}")
    return Listing(root, [name or "all" for name in number], len(train), files, summary)

# ---- Packed images: images/*.npy, uint8 n x S x S x 3; labels.npy; packed.json

FORMAT = "MAETok images 1"

SHARD = 2**27  # bytes of a file, at most

def store(out, size, classes, labels, n_train, made_of, make):
    """make(start, stop) returns uint8 n x S x S x 3; an unreadable image is zeros."""
    n, length = len(labels), max(1, min(1024, SHARD // (3 * size**2)))
    rows = make_shards(out / "images", n, length, make, made_of, Dist(), "packing")
    readable = np.concatenate([array.any((1, 2, 3)) for array in rows.arrays])
    labels = np.where(readable, np.array(labels, np.int64), -1)
    unreadable = n - readable.sum()
    if unreadable > max(3, 0.01 * n) or labels[:n_train].max() < 0 or labels[n_train:].max() < 0:
        shutil.rmtree(out / "images")  # all are read and named again
        die(f"{unreadable} of {n} images are unreadable: mend or remove them")
    hashes = [hash(bytes(row)) for array in rows.arrays for row in array]
    both = {*hashes[:n_train]}.intersection(hashes[n_train:]) - {hash(bytes(3 * size**2))}
    if both:
        say(f"warning: {len(both)} images are in training and validation")
    digests = [sha256(array).hexdigest() for array in (*rows.arrays, labels)]
    with writing(out / "labels.npy") as file:
        np.save(file, labels)
    Dist().save(out / "packed.json", {
        "format": FORMAT, "size": size, "classes": classes, "training_images": n_train,
        "fingerprint": hash_of([digests, classes])})

def pack(root: str | Path, size: int, out: str | Path, workers: int = 0, cached: bool = False) -> Path:
    """Store a folder of images. `cached`: in a folder of this listing; others may be in use."""
    root, out = Path(root).absolute(), Path(out).absolute()
    keep_outside(out, root)
    ours = r"images|packed\.json|\d{5}-[0-9a-f]{16}\.npy|.*\.part" + r"|labels\.npy" * (out / "images").exists()
    for path in () if cached else out.rglob("*"):
        if not re.fullmatch(ours, path.name):
            die(f"--out {out} holds {path.name}, which data.py did not write: give an empty folder")
    root, classes, n_train, files, summary = list_folder(root)
    say(f"{root}: {summary}")
    paths = [root / path for path, _ in files]
    stats = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in map(os.stat, paths)]
    made_of = [size, classes, n_train, files, stats]  # changed files differ
    key = hash_of(made_of)
    out = out.with_name(f"{out.name}-{key}") if cached else out
    if (out / "packed.json").exists() and all(key in path.name for path in out.glob("images/*.npy")):
        return out
    read = partial(try_to_read, size=size)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        store(out, size, classes, [label for _, label in files], n_train, made_of,
              lambda start, stop: np.stack([*pool.map(read, paths[start:stop])]))
    return out

def keep_outside(out, data):
    inside = out and data and Path(out).resolve().is_relative_to(Path(data).expanduser().resolve())
    if inside and data not in DATASETS:
        die(f"--out {out} lies inside --data {data}: its pictures would become data")

# ---- Data sets by name. To add one: a function that stores it, and its line in DATASETS.
# If it changes, empty the cache

def pack_shapes(size: int, out: Path):
    index, chunk = np.r_[:20_000, 2**32:2**32 + 2_000], max(1, 2**18 // size**2)

    def render(start, stop):
        chunks = np.split(index[start:stop], range(chunk, stop - start, chunk))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images, _ = zip(*pool.map(partial(render_shapes, size=size), chunks))
        return torch.cat(images).permute(0, 2, 3, 1).numpy()

    made_of = ["shapes", 1, size]
    store(out, size, SHAPES, index % len(SHAPES), 20_000, made_of, render)

def pack_cifar10(size: int, out: Path):
    folder = unpacked("cifar10", *CIFAR10)
    with reading(folder, "the archive of CIFAR-10"):
        classes = next(folder.rglob("batches.meta.txt")).read_text().split()
        files = sorted(folder.rglob("*.bin"))  # data_batch_1 to 5, test_batch
        rows = np.concatenate([np.fromfile(file, np.uint8) for file in files])
        rows = rows.reshape(-1, 3073)  # label, 3 x 32 x 32
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    n_train = len(rows) // 6 * 5
    store(out, 32, classes, rows[:, 0], n_train, "cifar10", lambda start, stop: images[start:stop])

def pack_imagenette(size: int, out: Path):
    pack(unpacked("imagenette", *IMAGENETTE) / "imagenette2-320", size, out)

DATASETS = {"shapes": pack_shapes, "cifar10": pack_cifar10, "imagenette": pack_imagenette}
CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d6"
IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz", "569b4497c98db6dd29f335d1f109cf31"

def unpacked(name: str, url: str, digest: str) -> Path:
    """The folder of an archive's files."""
    folder = cache_dir() / f"{name}-files"
    if not folder.exists():
        archive = download(url, cache_dir() / Path(url).name, digest)
        part = Path(f"{folder}.{os.getpid()}.part")
        with reading(archive, f"the archive of {name}"):
            shutil.unpack_archive(archive, part)  # its hash vouches for it
        with suppress(OSError):  # another may be first
            part.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
    return folder

def download(url: str, path: Path, digest: str, hint: str = "") -> Path:
    """Fetch url to path unless it is there. `digest`: the start of its sha256, or ""."""
    if path.exists():
        return path
    socket.setdefaulttimeout(60)
    bar = tqdm(desc=path.name, unit="B", unit_scale=True, disable=None)
    with writing(path, f" from {url}. Put the file there{hint}") as file, bar:
        # It raises if cut short
        urlretrieve(url, file.name, lambda blocks, size, total: bar.update(size))
        if not sha256(file.read()).hexdigest().startswith(digest):
            raise OSError(f"invalid hash, not {digest}")
    return path

@cache  # a large folder is listed once
def prepare(data: str, size: int) -> Path:
    """A data set's packed folder, made in the cache if need be."""
    if data not in DATASETS:
        root = Path(data).expanduser().absolute()
        packed = (root / "packed.json").is_file()
        return root if packed else pack(root, size, cache_dir() / f"{root.name}-{size}px", cached=True)
    out = cache_dir() / f"{data}-{size}px"
    if not (out / "packed.json").exists():
        DATASETS[data](size, out)
    return out

class ImageSet:
    """Split "train" or "val" of a data set: a name, a folder, or what `pack` wrote.

    rows: uint8 n x S x S x 3; index: those of the split; labels: int64. Size 0: as packed.
    `out`: folder of the run, which must lie elsewhere.
    """

    def __init__(self, data: str, size: int, split: str, out: str = ""):
        keep_outside(out, data)
        self.data = data if data in DATASETS else str(Path(data).expanduser().absolute())
        folder = prepare(data, size)
        with reading(folder, "a whole packed data set"):
            meta = json.loads((folder / "packed.json").read_text())
            if meta["format"] != FORMAT:
                raise ValueError(f"its format is {meta['format']}")
            self.size, self.classes, self.fingerprint = meta["size"], meta["classes"], meta["fingerprint"]
            self.rows = Shards(sorted(folder.glob("images/*.npy")))
            labels = np.load(folder / "labels.npy")
            is_train = np.arange(len(labels)) < meta["training_images"]
            inside = is_train == (split == "train")
            self.index = np.flatnonzero((labels >= 0) & inside)
            self.unreadable = inside.sum() - len(self.index)
            self.labels = torch.from_numpy(labels[self.index])
            shape = len(labels), self.size, self.size, 3
            if self.rows.shape != shape or self.labels.max() >= len(self.classes):
                raise ValueError(f"images {self.rows.shape}, {len(labels)} labels")
        if size and self.size != size:
            die(f"--data {data} was packed at {self.size} px, not --size {size}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: np.ndarray) -> Tensor:
        """uint8 B x 3 x S x S, on the CPU."""
        return torch.from_numpy(self.rows[self.index[index]]).permute(0, 3, 1, 2)

    def describe(self) -> str:
        counts = torch.bincount(self.labels, minlength=len(self.classes))
        shown = shorten([f"{self.classes[c]} {counts[c]}" for c in counts.argsort(stable=True)])
        return (f"{len(self):,} images of {len(counts)} classes, the rarest first: {shown}; "
                f"{self.unreadable} unreadable")

    def view(self, rows: Tensor, mirror: Tensor) -> Tensor:
        """uint8 B x S x S x 3 -> float B x 3 x S x S, some mirrored."""
        x = to_float(rows.permute(0, 3, 1, 2))
        return torch.where(mirror[:, None, None, None], x.flip(3), x)

# ---- Batches

@lru_cache(2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return Dist().rng(seed, "epoch", epoch).permutation(n)

def batch_indices(n: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The global batch: a window on an endless row of shuffled epochs."""
    epochs, rows = np.divmod(step * batch + np.arange(batch), n)
    return np.array([epoch_order(n, seed, int(epoch))[row] for epoch, row in zip(epochs, rows)])

class Loader:
    """loader(step) -> (x, labels): this process's rows. A thread reads ahead.

    A data set has rows, index, labels and view(rows, mirror).
    """

    def __init__(self, dataset, batch: int, seed: int, dist: "Dist"):
        self.dataset, self.batch, self.seed, self.dist = dataset, batch, seed, dist
        self.pool, self.ahead, self.wait_seconds = ThreadPoolExecutor(1), {}, 0.0

    def gather(self, step: int) -> list[Tensor]:
        data, mine, device = self.dataset, self.dist.local_slice(self.batch), self.dist.device
        index = batch_indices(len(data.labels), self.batch, self.seed, step)[mine]
        mirror = self.dist.rng(self.seed, "mirror", step).random(self.batch)[mine] < 0.5
        rows = torch.from_numpy(data.rows[data.index[index]])
        batch = [rows, torch.from_numpy(mirror), data.labels[index]]
        if device.type == "cuda":
            batch = [x.pin_memory().to(device, non_blocking=True) for x in batch]
        return batch

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        batch = self.ahead.pop(step, None) or self.pool.submit(self.gather, step)
        rows, mirror, labels = batch.result()
        self.ahead = {step + 1: self.pool.submit(self.gather, step + 1)}
        self.wait_seconds += time.perf_counter() - start
        return self.dataset.view(rows, mirror), labels

# ---- THE RUN: options, processes, optimizers, average, checkpoints, log, pictures

def option(default, help: str, choices: tuple | None = None, **more) -> object:
    """A field that is a flag. `least`: of a number; `free`: it may differ when a run goes on."""
    return field(default=default, metadata={"help": help, "choices": choices, **more})

def parse_config(config: type, presets: dict, doc: str, argv: list | None = None) -> object:
    """Defaults, then --preset, then flags. A mistake is one line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=style)
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: {text} (see --help)\n")
    if presets:
        parser.add_argument("--preset", choices=presets, default="quick", help="table of settings")
    flags = {"--" + f.name.replace("_", "-"): f for f in fields(config) if "help" in f.metadata}
    for flag, f in flags.items():
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        text = f.metadata["help"].replace("%", "%%") + f" (default {f.default!r})"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)

    values = vars(parser.parse_args(argv))
    preset = values.pop("preset", "")
    try:
        cfg = config(**presets.get(preset, {}) | values)
        for flag, f in flags.items():
            value, least = getattr(cfg, f.name), f.metadata.get("least", 0)
            if f.type in (int, float) and not least <= value < 2**62:
                raise ValueError(f"{flag} {value} must be at least {least}, below 2**62")
        cfg.check()
    except ValueError as error:
        parser.error(str(error))
    say(parser.prog, preset, values)
    return cfg

# A purpose's stream; 6 serves numpy and torch
STREAMS = {"epoch": 1, "mirror": 2, "mask ratio": 3, "mask": 4, "mask, stage 2": 5,
           "augmentation": 6, "sampling noise": 6, "training noise": 7, "labels": 8,
           "classifier noise": 9}

@dataclass(frozen=True)
class Dist:
    """This process among those of torchrun, its device and precision."""
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    precision: str = "fp32"
    idle: object = None  # group of barriers: NCCL's keep a core and the GPU busy
    print, die = staticmethod(say), staticmethod(die)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def local_slice(self, batch: int) -> slice:
        """This process's rows of a global batch."""
        n = self.world_size
        if batch % n:
            text = f"--batch-size {batch} must be a multiple of the {n} processes that share it"
            die(text) if self.is_main else sys.exit(1)  # said once
        return slice(batch // n * self.rank, batch // n * (self.rank + 1))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16")

    def rng(self, seed: int, stream: str, *index: int) -> np.random.Generator:
        """numpy's generator, the same on every process."""
        return np.random.default_rng([seed, STREAMS[stream], *index])

    def generator(self, seed: int, stream: str, *index: int) -> torch.Generator:
        """torch's generator, on the device."""
        state = np.random.SeedSequence([seed, STREAMS[stream], *index]).generate_state(1, np.uint64)
        return torch.Generator(self.device).manual_seed(int(state[0] >> 1))

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.world_size > 1:
            distributed.all_reduce(x)
        return x

    def barrier(self):
        if self.world_size > 1:
            distributed.barrier(self.idle)

    def rank0_first(self, make: Callable) -> object:
        """make() on rank 0, then on the others, which find what it left."""
        result = make() if self.is_main else None
        self.barrier()
        return result if self.is_main else make()

    def compiled(self, net: nn.Module, on: bool) -> nn.Module:
        """The same network; if `on`, a graph for each size of its batches."""
        if on:
            # torch ends a run whose networks of one class need more than 8
            torch._dynamo.config.recompile_limit = 64
            net.compile(fullgraph=True, dynamic=False)
        return net

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as training calls it: processes average their gradients."""
        if self.world_size == 1:
            return model
        # If compiled, each bucket is a graph: few, large ones
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=250)

    def micro_batches(self, model: nn.Module, batch: int, micro: int):
        """Slices of at most `micro` rows (0: all), and their share of the batch.

        Processes average their gradients in the last one.
        """
        # Equal ones: torch.compile makes a graph for each size
        size = max(n for n in range(1, (micro or batch) + 1) if batch % n == 0)
        for start in range(0, batch, size):
            wait = start + size < batch and self.world_size > 1
            with model.no_sync() if wait else nullcontext():
                yield slice(start, start + size), size / batch

    def make_out_dir(self, path: str, cfg, made_of=(), stale=()) -> Path:
        """Store the settings of a run, remove `stale` results. Others than before end it."""
        out, file = Path(path), Path(path) / "settings.json"
        if self.is_main:
            now = asdict(cfg) | dict(made_of)
            free = {f.name for f in fields(cfg) if f.metadata.get("free")}
            if getattr(cfg, "schedule", "") == "constant" and not hasattr(cfg, "stage2_steps"):
                free.add("steps")  # a longer run takes the same steps first
            with reading(file, "the settings of a run"):
                before = json.loads(file.read_text()) if file.exists() else {"commit": ""}
                before.pop("commit")
                changed = {n for n in now.keys() & before.keys() - free if now[n] != before[n]}
            for n in sorted(changed):
                die(f"{path} was made with {n} {before[n]}, now {now[n]}: give another --out")
            for old in [old for pattern in stale for old in out.glob(pattern)]:
                if not before:
                    die(f"{path} holds {old.name} of something else: give another --out")
                old.unlink(missing_ok=True)
            self.save(file, now)
        self.barrier()
        return out

    def save(self, path: Path, content: dict):
        """Write a dict as .json or .pt, with the commit, on rank 0."""
        if self.is_main:
            content = content | {"commit": commit()}
            with writing(path) as file:
                if path.suffix == ".pt":
                    torch.save(content, file)
                else:
                    file.write(json.dumps(content, indent=1).encode())

@cache
def commit() -> str:
    """The commit of this code, "-dirty" if it was edited."""
    command = f'git -C "{Path(__file__).parent}" describe --always --dirty'
    status, said = subprocess.getstatusoutput(command)
    return "unknown" if status else said

def start(precision: str) -> Dist:
    """Join the processes of torchrun; choose device and precision."""
    ranks = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, n, local = (int(os.environ.get(*pair)) for pair in ranks.items())
    device, backend, bf16, idle = torch.device("cpu"), "gloo", False, None
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local), "nccl"
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # LPIPS and Inception are convolutions
        tf32 = precision == "tf32"  # fp32 is fp32, whatever a container switched
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # fp16 would need a scaler
    elif sys.platform == "linux":
        bf16 = "bf16" in Path("/proc/cpuinfo").read_text()
    if n > 1:
        wait = timedelta(hours=12)  # rank 0 may pack a large data set
        store, _, _ = next(distributed.rendezvous("env://", rank, n, timeout=wait))
        # torchrun --max-restarts keeps its store, and what an earlier attempt left
        store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        distributed.init_process_group(
            backend, timeout=timedelta(minutes=30), world_size=n, rank=rank, store=store,
            device_id=device if backend == "nccl" else None)
        idle = distributed.new_group(timeout=wait, backend="gloo")
    if precision == "auto":
        precision = "bf16" if bf16 else "fp32"
    say(f"{n} process(es) on {device.type}, {precision}, torch {torch.__version__}, {commit()}")
    return Dist(rank, n, device, precision, idle)

def launch(main: Callable, config: type, presets: dict, doc: str, argv: list | None = None):
    """Run main(cfg, dist). What the user or the machine did wrong is one line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        cfg = parse_config(config, presets, doc, argv)
        main(cfg, dist := start(cfg.precision))
        dist.barrier()
        if distributed.is_initialized():
            distributed.destroy_process_group()
    except KeyboardInterrupt:
        die("stopped; the same command goes on from what is saved")
    except OSError as error:
        die(f"{error.filename or 'a file'}: {error.strerror or error}; what was saved is kept")
    except (MemoryError, RuntimeError) as error:
        if "MemoryError" in repr(error) or "allocate memory" in str(error):
            if not hasattr(cfg, "batch_size"):
                die("out of memory: try --workers 1")
            rows = cfg.batch_size // int(os.environ.get("WORLD_SIZE", "1"))  # of this process
            rows = min(getattr(cfg, "micro_batch", 0) or rows, rows)
            flag = "--micro-batch" if hasattr(cfg, "micro_batch") else "--batch-size"
            die(f"out of memory with {rows} at once: try {flag} {max(1, rows // 2)}")
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            die("another process ended; its message says why")
        raise

class Muon(torch.optim.Muon):
    """torch's, with matrices of a shape in one batch: 41 in place of 76 ms in `quick`."""
    dtype = torch.float32

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape, lr = {}, group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
                    self.state[p] = self.state[p] or {"momentum_buffer": torch.zeros_like(p)}
            for (a, b), params in by_shape.items():
                momenta = [self.state[p]["momentum_buffer"] for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))
                x = orthogonalise(x.to(self.dtype), group["ns_coefficients"], group["ns_steps"])
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, x.unbind(), alpha=-lr * max(1, a / b) ** 0.5)

def orthogonalise(x: Tensor, coefficients: tuple, steps: int) -> Tensor:
    """About U V^T, in fp32, of each U S V^T of x, K x A x B: Newton-Schulz."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT, coefficients, steps).mT.contiguous()
    a, b, c = coefficients
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()

def make_optimizers(model: nn.Module, cfg, dist: Dist) -> list:
    """AdamW, or Muon for the matrices inside blocks and AdamW for the rest."""
    muon, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            inside = p.ndim == 2 and "blocks." in name and cfg.optimizer == "muon"
            (muon if inside else matrices if p.ndim > 1 else vectors).append(p)
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, cfg.lr, (0.9, cfg.beta2), fused=True)]
    if muon:
        optimizers.append(Muon(muon, cfg.muon_lr, cfg.weight_decay))
        if dist.precision == "bf16":  # a core without it takes 20 times as long
            optimizers[-1].dtype = torch.bfloat16
    return optimizers

def lr_schedule(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Share of the peak: linear warm-up, then constant, or cosine or linear to a tenth."""
    done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    cosine = float(0.55 + 0.45 * np.cos(np.pi * done))
    decay = {"constant": 1, "cosine": cosine, "linear": 1 - 0.9 * done}
    return min(1, (step + 1) / max(1, warmup)) * decay[schedule]

def set_lr(optimizers: list, step: int, steps: int, cfg) -> float:
    """Set the learning rates of a step. Returns their share of the peak."""
    scale = lr_schedule(step, steps, cfg.warmup, cfg.schedule)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * scale
    return scale

class Ema:
    """`model` is a moving average, whose horizon grows with the run."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay
        self.source = [p.detach() for p in model.parameters()]

    def update(self, step: int):
        weight = 1 - min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.model.parameters()), self.source, weight)

def load_checkpoint(path: str | Path, kind: str) -> dict:
    """What the script `kind` saved, on the CPU. Runs no code from it."""
    with reading(path, f"a checkpoint of {kind}.py"):
        # Mapped: processes share its pages, which may leave memory again
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name == "posix")
        if state["kind"] != kind:
            raise ValueError(f"it is one of {state['kind']}.py")
    return state

class Log:
    """Means of the steps' terms, in log.jsonl. No step waits: they stay on the device.

    After a kill some steps come again: of the lines of a step the last one counts.
    """

    def __init__(self, cfg, dist: Dist, stage: str, step: int, steps: int, loader: Loader):
        self.cfg, self.dist, self.stage, self.steps, self.loader = cfg, dist, stage, steps, loader
        self.path = Path(cfg.out) / "log.jsonl"
        self.bar = tqdm(total=steps, initial=step, desc=stage, disable=not dist.is_main or None)
        if dist.is_main and self.path.exists() and self.path.read_bytes()[-1:] not in b"\n":
            with open(self.path, "a") as file:
                print(file=file)  # a line that was cut short stays alone
        self.reset()

    def reset(self):
        self.terms, self.scales = {}, []
        self.start, self.waited = time.perf_counter(), self.loader.wait_seconds

    def count_flops(self, model: nn.Module, *inputs: Tensor):
        """FLOPs of training per image. Only on meta torch's counter sees attention."""
        model = copy.deepcopy(model).to("meta")
        with FlopCounterMode(display=False) as counter:
            out = model(*(x[:1].to("meta") for x in inputs))
            outputs = out.values() if isinstance(out, dict) else [out]
            torch.autograd.backward([x.sum() for x in outputs if x.requires_grad])
        self.flops = counter.get_total_flops()

    def add(self, lr_scale: float, **terms: Tensor | tuple):
        """Terms of one step: a scalar each, or a pair (sum, count)."""
        self.scales.append(lr_scale)
        self.bar.update()
        for name, value in terms.items():
            pair = value if isinstance(value, tuple) else (value, torch.ones_like(value))
            self.terms.setdefault(name, []).append(torch.stack(pair).detach().float())

    def write(self, step: int, more: Callable = dict):
        """A line of means since the last, and more(). A term that is not finite ends the run."""
        entry, lr = {}, [self.cfg.lr * scale for scale in self.scales]
        for name, rows in self.terms.items():
            rows = self.dist.all_reduce(torch.stack(rows)).cpu().double()  # steps x 2
            total, count = rows.sum(0).tolist()
            if not math.isfinite(total):
                ago = len(rows) - int(rows.isfinite().all(1).int().argmin())  # steps
                die(f"{self.stage}: {name} is not finite at step {step - ago + 1} (learning rate "
                    f"{lr[-ago]:.3g}); the last checkpoint is kept")
            if count:
                entry[name] = total / count
        seconds = time.perf_counter() - self.start
        rate = len(lr) * self.cfg.batch_size / seconds
        entry |= {"lr": lr[-1], "images_per_s": rate, "tflops": rate * self.flops / 1e12,
                  "data_wait": (self.loader.wait_seconds - self.waited) / seconds}
        entry |= {name: value.item() for name, value in more().items()}
        if self.dist.device.type == "cuda":
            entry["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.dist.is_main:
            with open(self.path, "a") as file:
                print(json.dumps({"stage": self.stage, "step": step} | entry), file=file)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in entry.items())
        self.bar.set_postfix_str(shown[:60])
        say(f"{self.stage} {step}/{self.steps}  {shown}")
        self.reset()

def save_grid(path: Path, images: Tensor, columns: int, names: tuple = ()):
    """A PNG of uint8 N x 3 x S x S, with names over the first ones."""
    size = images.shape[-1]
    side = size * max(1, 96 // size)  # small images are enlarged
    w, (rows, named) = side + 2, (math.ceil(len(x) / columns) for x in (images, names))
    sheet = Image.new("RGB", (columns * w, rows * w + named * 14), "white")
    for i, image in enumerate(images.cpu()):
        row, x = i // columns, i % columns * w
        y = row * w + min(row + 1, named) * 14
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        sheet.paste(picture.resize((side, side), Image.NEAREST), (x, y))
        if i < len(names):
            ImageDraw.Draw(sheet).text((x + 2, y - 13), names[i][:side // 6], "black")
    with writing(path) as file:
        sheet.save(file, "PNG")

@dataclass(frozen=True)
class Config:
    data: str = option("", "folder of images, perhaps with train/, val/ and class folders")
    size: int = option(256, "side of the stored images in pixels", least=1)
    out: str = option("", "folder to write, to give as --data; empty: only try")
    workers: int = option(0, "threads that decode; 0: one a core")
    precision = "fp32"

    def check(self):
        if not self.data or self.data in DATASETS:
            raise ValueError("--data DIR is needed; built-in sets need no packing")

def main(cfg: Config, dist: Dist):
    with tempfile.TemporaryDirectory() as trial:  # without --out
        out, size = (cfg.out, cfg.size) if cfg.out else (trial, 16)
        pack(cfg.data, size, out, cfg.workers)
        for split in ("train", "val"):
            say(f"{split}: {ImageSet(out, size, split).describe()}")

if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
