"""Images in; and, under its own banner below, the run around every stage.

    python data.py --data DIR --size 256 --out imagenet256      # pack a folder of images once

Conventions of the project, said once:
  letters   B images, N patch tokens, L latent tokens, D width, H latent channels, P patch size, S image size, K classes
  images    float B x 3 x S x S in [-1, 1] inside; uint8, rounded, at every border (files, npz, metrics)
  seeds     every random draw is a function of (seed, step) in training and of (seed, image number) in sampling: a
            process draws for the whole global batch and keeps its rows, so 1 and 8 processes see the same numbers, and
            a resumed run repeats the one that was cut
  progress  is counted in steps; --batch-size is the global one, whatever the number of processes
"""
import argparse
import atexit
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import http.client
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tokenize
import traceback
import typing
import urllib.request
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, UnidentifiedImageError
from tqdm import tqdm


def fail(message: str) -> typing.NoReturn:
    """End the program with one line on stderr and exit status 1."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")


def in_a_line(error: Exception) -> str:
    """What an error says, in short."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def cache_dir() -> Path:
    """Where downloads, packed images and feature networks are kept: $MAETOK_CACHE, else ~/.cache/maetok."""
    name = os.environ.get("MAETOK_CACHE") or os.path.expanduser("~/.cache/maetok")
    if name.startswith("~"):
        fail("there is no home folder to keep downloads and packed images in: set MAETOK_CACHE to a folder")
    path = Path(name).absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(path: Path, wait: bool = True):
    """Hold an advisory lock file, so that no two processes prepare the same thing; it ends with the process."""
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            fail(f"{path.parent} is in use by another run; give this one its own --out")
        yield


# ---------------------------------------------------------------------------------------------------------------------
# The built-in data set: ten kinds of object, rendered from signed distances

SHAPES = ("ball", "box", "triangle", "star", "heart", "ring", "cross", "moon", "drop", "flower")
SHAPES_VERSION = 1                                       # part of the cache's name: raise it when the pictures change
SHAPES_COUNT = {"train": 20_000, "val": 2_000}
VAL_START = 2**32                                        # the validation images' indices begin here


def hash_uniform(seed: int, index: np.ndarray, columns: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), len(index) x columns, a pure function of (seed, index, column) (SplitMix64)."""
    x = np.asarray(index, np.uint64)[:, None] * np.uint64(columns) + np.arange(columns, dtype=np.uint64)
    x = x + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / 2**24)


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
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


def render_shapes(index: np.ndarray, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
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


# ---------------------------------------------------------------------------------------------------------------------
# Folders of images

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError,
               UnidentifiedImageError)                    # what Pillow raises for a damaged file


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] float -> 0..255 uint8, rounded."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(x: torch.Tensor) -> torch.Tensor:
    """0..255 uint8 -> [-1, 1] float."""
    return x.float() / 127.5 - 1


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x of the CPU on the device; a GPU copies it from page-locked memory while the program goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def double(x: torch.Tensor) -> torch.Tensor:
    """x in float64; on the CPU if its device has no such numbers (Apple's)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's evaluation crop: halve by boxes while twice too large, then bicubic to the short side, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path: str | Path, size: int) -> np.ndarray:
    """One file as uint8 size x size x 3: first frame, transparency on white, 16 bits scaled to 8, any colour model.

    Size 0 keeps the file's own. The orientation tag is not applied, as in ADM and torchvision. Raises one of
    READ_ERRORS for a damaged file.
    """
    with Image.open(path) as image:
        image.load()
        if image.mode.startswith("I") or image.mode == "F":          # 16 bits; floats in 0..1 or 0..255
            values = np.asarray(image, np.float64)
            scale = 255 / 65535 if image.mode.startswith("I") else 255 if values.max(initial=0) <= 1 else 1
            image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        longest = 16 * min(image.size)                    # a strip one pixel wide must not grow without bound
        if max(image.size) > longest:
            w, h = min(image.width, longest), min(image.height, longest)
            left, top = (image.width - w) // 2, (image.height - h) // 2
            image = image.crop((left, top, left + w, top + h))
        return np.asarray(center_crop(image, size) if size else image)


def find_images(root: Path) -> list[str]:
    """Image files below root, sorted, as relative paths; links are followed, loops and hidden names left out."""
    found, seen = [], set()

    def unreadable(error):
        raise error

    for folder, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders[:] = []
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.relpath(os.path.join(folder, name), root) for name in files
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES]
    return sorted(found)


def list_folder(root: Path) -> tuple[list[str], dict[str, list[tuple[str, int]]]]:
    """Classes, and (path, label) of the train and val split of a folder.

    Class folders, or a flat folder (one class, named "all"); train/ and val/ (or validation/, test/) below root if they
    are there, else one image in twenty, chosen by the hash of its name, is kept for validation.
    """
    if not root.is_dir():
        fail(f"--data {root}: no such folder, and none of {', '.join(NAMED)}")
    val = next((name for name in ("val", "validation", "test") if (root / name).is_dir()), None)
    split_roots = {"train": "train", "val": val} if (root / "train").is_dir() else {"train": "."}
    files = {}
    try:
        for split, sub in split_roots.items():
            if sub:
                files[split] = [os.path.normpath(os.path.join(sub, f)) for f in find_images(root / sub)]
    except OSError as error:
        fail(f"--data {root}: cannot list {error.filename}: {error.strerror}")
    if not files["train"]:
        fail(f"--data {root}: no images found (looked for {' '.join(sorted(SUFFIXES))}, any case, in all subfolders)")

    def class_of(split, path):
        parts = Path(os.path.relpath(path, split_roots[split])).parts
        return parts[0] if len(parts) > 1 else None

    names = {class_of("train", path) for path in files["train"]}
    if None in names and len(names) > 1:
        loose = next(path for path in files["train"] if class_of("train", path) is None)
        fail(f"--data {root}: {loose} lies beside class folders; use class folders only, or a flat folder only")
    classes = sorted(names - {None}) or ["all"]
    listing = {}
    for split, paths in files.items():
        strange = {class_of(split, path) for path in paths} - names
        if strange:
            fail(f"--data {root}: {split} has class {min(map(str, strange))} which train has not")
        listing[split] = [(path, 0 if classes == ["all"] else classes.index(class_of(split, path))) for path in paths]
    if not listing.get("val"):
        by_hash = sorted(listing["train"], key=lambda item: hashlib.sha256(os.fsencode(item[0])).digest())
        held_out = set(by_hash[: max(1, len(by_hash) // 20)])
        listing["val"] = [item for item in listing["train"] if item in held_out]
        listing["train"] = [item for item in listing["train"] if item not in held_out] or listing["train"]
    return classes, listing


# ---------------------------------------------------------------------------------------------------------------------
# Packed images: {train,val}.npy uint8 n x S x S x 3, {train,val}_labels.npy, and meta.json, which is written last


def pack_rows(job) -> tuple[int, list]:
    """Worker of `pack`: decode some files into their rows; returns the job's number and the files it could not read."""
    number, split, first, root, paths, out, size = job
    rows, bad = np.zeros((len(paths), size, size, 3), np.uint8), []
    for i, path in enumerate(paths):
        try:
            rows[i] = read_image(Path(root) / path, size)
        except READ_ERRORS as error:
            bad.append([split, first + i, path, in_a_line(error)])
    write_rows(Path(out) / f"{split}.npy", first, rows)
    return number, bad


def outlive_nobody() -> None:
    """Set up a worker of `pack`: Ctrl-C is its parent's business, and it ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def write_rows(path: Path, start: int, rows: np.ndarray) -> None:
    """Put rows at `start` into an .npy file and on the disk, by writing, not through shared memory pages: those would
    end the process on a full disk, and two machines on one network disk would overwrite each other's.
    """
    array = np.load(path, mmap_mode="r")
    with open(path, "r+b", buffering=0) as file:
        file.seek(array.offset + start * array[:1].nbytes)
        content = memoryview(np.ascontiguousarray(rows, array.dtype)).cast("B")
        while content:
            content = content[file.write(content):]
        os.fsync(file.fileno())


def read_json(path: Path, *names: str) -> dict:
    """A JSON object that one of the scripts wrote, with these names in it."""
    try:
        found = json.loads(path.read_text())
        for name in names:
            found[name]
        return found
    except LOAD_ERRORS as error:
        fail(f"{path} is damaged ({type(error).__name__}: {in_a_line(error)}); remove it and run again")


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:                                      # a broken link, or gone since it was listed
        return -1


def pack(root: str | Path, size: int, out: str | Path, workers: int = 0, replace: bool = False) -> None:
    """Decode, crop and store a folder of images once; a broken-off packing is continued.

    A folder is known again by the names and sizes of its files; what was packed of another one is refused, or with
    `replace` packed anew. Unreadable files are named with their reason; more than 1 % of them ends the run.
    """
    root, out = Path(root).absolute(), Path(out).absolute()
    classes, listing = list_folder(root)
    facts = [[split, path, label, file_size(root / path)] for split, rows in listing.items() for path, label in rows]
    fingerprint = hashlib.sha256(json.dumps([size, facts]).encode()).hexdigest()[:16]
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock"):
        if (out / "meta.json").exists():
            if read_json(out / "meta.json", "fingerprint")["fingerprint"] == fingerprint:
                return
            if not replace:
                fail(f"{out} holds another packed data set; remove it or give another --out")
            (out / "meta.json").unlink()                 # first what makes the rest count
        progress = out / f"progress-{fingerprint}.jsonl"
        done, bad = set(), []
        if progress.exists():
            for line in progress.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):    # the line in which the last run was cut
                    number, more = json.loads(line)
                    done.add(number)
                    bad += more
        else:
            for split, files in listing.items():
                np.lib.format.open_memmap(out / f"{split}.npy", "w+", np.uint8, (len(files), size, size, 3)).flush()
            progress.touch()
        jobs, chunk = [], 256
        for split, files in listing.items():
            for first in range(0, len(files), chunk):
                paths = [path for path, _ in files[first:first + chunk]]
                jobs.append((len(jobs), split, first, str(root), paths, str(out), size))
        todo = [job for job in jobs if job[0] not in done]
        workers = min(workers or os.cpu_count(), len(todo))
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=len(jobs) * chunk, initial=len(done) * chunk, unit=" images",
                                           desc=f"packing {root.name}", disable=None))
            log = stack.enter_context(open(progress, "a"))
            if workers > 1 and len(todo) > 2:
                pool = ProcessPoolExecutor(workers, get_context("spawn"), outlive_nobody)
                stack.callback(pool.shutdown, cancel_futures=True)
                results = pool.map(pack_rows, todo)
            else:
                results = map(pack_rows, todo)
            try:
                for number, more in results:
                    bad += more
                    log.write(json.dumps([number, more]) + "\n")
                    log.flush()
                    bar.update(chunk)
            except BrokenProcessPool:
                fail(f"packing {root}: a decoding process was ended from outside, perhaps for want of memory; "
                     "run the same command again, with fewer --workers if it helps")
        total = sum(map(len, listing.values()))
        for _, _, path, reason in bad:
            tqdm.write(f"unreadable: {path!r}: {reason}")
        if len(bad) > 0.01 * total:
            progress.unlink()                            # what is mended will be read anew
            fail(f"--data {root}: {len(bad)} of {total} images are unreadable (listed above), more than 1 %; "
                 "mend or remove them")
        for split, files in listing.items():
            labels = np.array([label for _, label in files], np.int64)
            labels[[row for where, row, _, _ in bad if where == split]] = -1     # rows without an image
            np.save(out / f"{split}_labels.npy", labels)
        meta = {"format": 1, "size": size, "classes": classes, "source": str(root), "fingerprint": fingerprint,
                "images": {split: len(files) for split, files in listing.items()}, "unreadable": bad}
        write_atomically(out / "meta.json", json.dumps(meta, indent=1).encode())
        progress.unlink()


def pack_arrays(out: Path, size: int, classes: list[str], fingerprint: str, splits: dict) -> None:
    """The same layout from images already in memory: {split: (uint8 n x S x S x 3, labels)}."""
    out.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in splits.items():
        np.save(out / f"{split}.npy", images)
        np.save(out / f"{split}_labels.npy", np.asarray(labels, np.int64))
    meta = {"format": 1, "size": size, "classes": classes, "source": out.name, "fingerprint": fingerprint,
            "images": {split: len(labels) for split, (_, labels) in splits.items()}, "unreadable": []}
    write_atomically(out / "meta.json", json.dumps(meta, indent=1).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Data sets by name

CIFAR10 = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
           "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
IMAGENETTE = ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",
              "569b4497c98db6dd29f335d1f109cf315fe127053cedf69010d047f0188e158c")
NAMED = ("shapes", "cifar10", "imagenette")
LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, EOFError, IndexError, TypeError, AttributeError,
               pickle.UnpicklingError, tokenize.TokenError, OverflowError, MemoryError, AssertionError,
               zlib.error, zipfile.BadZipFile, struct.error)     # what torch.load and np.load raise for a damaged file


def download(url: str, path: Path, sha256: str, hint: str = "") -> Path:
    """Fetch url to path unless it is there; it gets its name when length and hash (a prefix; may be "") are right."""
    part = path.with_name(path.name + ".part")
    try:
        if path.exists():
            return path
        digest, came = hashlib.sha256(), 0
        with urllib.request.urlopen(url, timeout=60) as answer, open(part, "wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            bar = tqdm(total=total or None, desc=f"getting {path.name}", unit="B", unit_scale=True, disable=None)
            while block := answer.read(2**20):
                file.write(block)
                digest.update(block)
                came += len(block)
                bar.update(len(block))
            bar.close()
            os.fsync(file.fileno())
        if total and came != total:
            raise OSError(f"{came} of {total} bytes came")
        if not digest.hexdigest().startswith(sha256):
            raise OSError(f"invalid hash {digest.hexdigest()[:16]}..., not {sha256[:16]}...")
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        part.unlink(missing_ok=True)
        fail(f"cannot get {path.name} from {url}: {error}. Put the file at {path}{hint}")
    return path


# Pretrained networks by the stem of their public file: address, and hash where one is published (a prefix of sha256).
META, HUB = "https://dl.fbaipublicfiles.com", "https://huggingface.co"
WEIGHTS = {
    "vgg16-397923af": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "lpips_vgg": ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
                  "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "pt_inception-2015-12-05-6726825d": (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d"),
    "dino_deitsmall16_pretrain": (f"{META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", ""),
    "siglip-large-patch16-256": (f"{HUB}/google/siglip-large-patch16-256/resolve/main/model.safetensors", ""),
} | {f"dinov2_vit{s}14{r}_pretrain": (f"{META}/dinov2/dinov2_vit{s}14/dinov2_vit{s}14{r}_pretrain.pth", "")
     for s in "sbl" for r in ("", "_reg4")}


def pretrained(name: str, folder: str, hint: str) -> dict[str, torch.Tensor]:
    """The weights `name` of WEIGHTS: NAME.pth or NAME.safetensors in the folder ("": the cache), else downloaded there.

    `hint` says in the error how to do without them.
    """
    root = Path(folder).absolute() if folder else cache_dir()
    files = [root / (name + suffix) for suffix in (".pth", ".safetensors")]
    url, sha256 = WEIGHTS[name]
    path = next((f for f in files if f.exists()), files[url.endswith(".safetensors")])
    if not path.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / f"{name}.lock"):
                download(url, path, sha256, f" (--weights), or do without: {hint}")
        except OSError as error:
            fail(f"--weights {root}: {error.strerror}")
    return read_weights(path)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU, of a .safetensors or a torch file; never runs code from it."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):         # settings beside the weights
            state = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("ema", "model", "state_dict"):      # the wrappings of training checkpoints, best first
            if isinstance(state, dict) and isinstance(state.get(name), dict):
                state = state[name]
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise TypeError("not a dict of tensors")
    except LOAD_ERRORS as error:
        fail(f"{path} is not a whole file of weights ({type(error).__name__})")
    return dict(state)


def load_strictly(net: torch.nn.Module, weights: dict[str, torch.Tensor], what: str, theirs=str) -> None:
    """Give a network made on the meta device its weights; one that is missing, unknown or of another shape is named,
    as theirs(name) if the file calls it so.
    """
    own = net.state_dict()
    for names, problem in ((weights.keys() - own.keys(), "unknown"), (own.keys() - weights.keys(), "missing")):
        if names:
            fail(f"not {what}: {theirs(min(names))} is {problem}")
    for name, value in own.items():
        if weights[name].shape != value.shape:
            fail(f"not {what}: {theirs(name)} is {list(weights[name].shape)}, not {list(value.shape)}")
    net.load_state_dict(weights, assign=True)


def fold_layer_scale(weights: dict[str, torch.Tensor], attention: str, mlp: str) -> None:
    """Multiply each `blocks.i.ls1.gamma` and `ls2.gamma` into the matrix before it, of those names, in place.

    Where one layer has them all must: KeyError names the one that is missing.
    """
    for stem in {key.rsplit(".", 3)[0] for key in weights if re.search(r"\.\d+\.ls[12]\.gamma$", key)}:
        for layer in {key[len(stem) + 1:].split(".")[0] for key in weights if key.startswith(f"{stem}.")}:
            for scale, matrix in (("ls1", attention), ("ls2", mlp)):
                gamma, name = weights.pop(f"{stem}.{layer}.{scale}.gamma"), f"{stem}.{layer}.{matrix}"
                if gamma.shape != weights[f"{name}.bias"].shape:
                    raise ValueError(f"{stem}.{layer}.{scale}.gamma is {list(gamma.shape)}")
                weights[f"{name}.weight"] = weights[f"{name}.weight"] * gamma[:, None]
                weights[f"{name}.bias"] = weights[f"{name}.bias"] * gamma


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
               "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, mapped, not read: 8 bytes of header length, a JSON header, then raw tensors.

    Everything the header says is checked against the file before it is used; the tensors must not overlap.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, 100_000_000):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        spans, raw = [], torch.from_numpy(np.memmap(path, np.uint8, "c"))
        for name, entry in header.items():
            dtype, shape, (start, stop) = SAFETENSORS[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if len(shape) > 8 or not all(type(i) is int and 0 <= i <= size for i in (*shape, start, stop)):
                raise ValueError(f"{name}: shape {shape}, offsets {start}, {stop}")
            if stop - start != math.prod(shape) * dtype.itemsize or 8 + length + stop > size:
                raise ValueError(f"{name}: {entry['dtype']} {shape} at bytes {start} to {stop}")
            spans.append((start, stop, name, dtype, shape))
        spans.sort(key=lambda span: span[:2])
        for (_, stop, name, *_), (start, _, other, *_) in itertools.pairwise(spans):
            if start < stop:
                raise ValueError(f"{name} and {other} overlap")
        tensors = {}
        for start, stop, name, dtype, shape in spans:
            part = raw[8 + length + start:8 + length + stop]
            aligned = (8 + length + start) % dtype.itemsize == 0
            tensors[name] = (part if aligned else part.clone()).view(dtype).reshape(shape)
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        fail(f"{path} is not a whole safetensors file ({in_a_line(error)})")


def unique(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def extract(archive: Path, out: Path) -> Path:
    """Unpack a tar file into `out`, which appears only when whole; members that point outside it are refused."""
    if not out.exists():
        part = out.with_name(out.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(part, filter="data")
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            shutil.rmtree(part, ignore_errors=True)
            fail(f"{archive} cannot be unpacked: {error}; remove it to fetch it anew")
        part.rename(out)
    return out


@functools.lru_cache                                     # a large folder is walked once in a process
def prepare(data: str, size: int) -> Path:
    """The packed folder for --data at --size, made in the cache on first use."""
    cache = cache_dir()
    if (Path(data) / "meta.json").is_file():
        return Path(data)
    if data == "shapes":
        out = cache / f"shapes-{SHAPES_VERSION}-{size}"
        with locked(cache / f"{out.name}.lock"):
            if not (out / "meta.json").exists():
                splits = {}
                for split, n in SHAPES_COUNT.items():
                    start, images, labels = (0 if split == "train" else VAL_START), [], []
                    chunk = max(1, 2**18 // size**2)
                    for i in tqdm(range(0, n, chunk), desc=f"rendering shapes, {split}", disable=None):
                        x, y = render_shapes(np.arange(start + i, start + min(i + chunk, n)), size)
                        images.append(x.permute(0, 2, 3, 1).numpy())
                        labels.append(y.numpy())
                    splits[split] = np.concatenate(images), np.concatenate(labels)
                pack_arrays(out, size, list(SHAPES), out.name, splits)
        return out
    if data == "cifar10":
        if size != 32:
            fail(f"--data cifar10 has images of 32 px, not --size {size}")
        out = cache / "cifar10"
        with locked(cache / "cifar10.lock"):
            if not (out / "meta.json").exists():
                folder = extract(download(CIFAR10[0], cache / CIFAR10[0].rsplit("/", 1)[1], CIFAR10[1]),
                                 cache / "cifar10-files") / "cifar-10-batches-bin"
                splits = {}
                for split, names in {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}.items():
                    rows = np.concatenate([np.fromfile(folder / f"{f}.bin", np.uint8).reshape(-1, 3073) for f in names])
                    splits[split] = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
                classes = (folder / "batches.meta.txt").read_text().split()
                pack_arrays(out, 32, classes, "cifar10", splits)
        return out
    if data == "imagenette":
        with locked(cache / "imagenette.lock"):
            archive = download(IMAGENETTE[0], cache / IMAGENETTE[0].rsplit("/", 1)[1], IMAGENETTE[1])
            root = extract(archive, cache / "imagenette-files") / "imagenette2-320"
    else:
        root = Path(data).absolute()
    out = cache / f"{root.name}-{size}-{hashlib.sha256(os.fsencode(str(root))).hexdigest()[:8]}"
    pack(root, size, out, replace=True)
    return out


@dataclass
class Images:
    """One split of a packed data set. `pixels` may be memory-mapped; rows without an image are left out by `rows`."""
    pixels: np.ndarray | torch.Tensor                    # uint8 n x S x S x 3
    labels: torch.Tensor                                 # int64 in 0..K-1
    classes: list[str]
    fingerprint: str
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> torch.Tensor:
        """uint8 B x 3 x S x S of these images, on the CPU or wherever `pixels` is."""
        if isinstance(self.pixels, torch.Tensor):
            return self.pixels[to_device(torch.as_tensor(index), self.pixels.device)].permute(0, 3, 1, 2)
        index = np.asarray(index)
        pixels = self.pixels[index if self.rows is None else self.rows[index]]
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)


def load_images(data: str, size: int, split: str) -> Images:
    """Split "train" or "val" of a data set by name, of a folder, or of what `pack` wrote."""
    path = prepare(data, size)
    try:
        meta = read_json(path / "meta.json", "size", "classes", "fingerprint")
        if meta["size"] != size:
            fail(f"--data {data} was packed at {meta['size']} px, not --size {size}")
        pixels, labels = np.load(path / f"{split}.npy", mmap_mode="r"), np.load(path / f"{split}_labels.npy")
        if pixels.shape != (len(labels), size, size, 3) or pixels.dtype != np.uint8:
            raise ValueError(f"{split}.npy is {pixels.dtype} {pixels.shape}")
        rows = np.flatnonzero(labels >= 0)
        if not len(rows) or labels.max() >= len(meta["classes"]):
            raise ValueError(f"{split}_labels.npy does not fit its {len(meta['classes'])} classes")
        whole = len(rows) == len(labels)
        return Images(pixels, torch.from_numpy(labels[rows]), meta["classes"], meta["fingerprint"],
                      None if whole else rows)
    except LOAD_ERRORS as error:
        fail(f"{path} is not a whole packed data set ({in_a_line(error)}); remove it and run again")


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 1, epoch]).permutation(n)


def batch_indices(n: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The images of global step `step`: a window on the endless row of shuffled epochs, a function of its arguments."""
    at, index = step * batch, []
    while len(index) < batch:
        epoch, offset = divmod(at + len(index), n)
        index.extend(epoch_order(n, seed, epoch)[offset:offset + batch - len(index)])
    return np.array(index)


class Batches:
    """Training batches: `batches(step)` gives this process's rows of the global batch, float in [-1, 1], and labels.

    On a GPU the whole set lives on the device if it takes less than a third of its free memory; else, and for large
    sets on a CPU, one thread gathers the next batch from the memory map while the current one is used. `waited` counts
    the seconds spent waiting for data.
    """

    def __init__(self, images: Images, batch: int, seed: int, run: "Run", flip: bool = True):
        self.images, self.batch, self.seed, self.run, self.flip = images, batch, seed, run, flip
        self.waited, self.pool, self.ahead = 0.0, None, {}
        pixels = images.pixels
        if run.device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(run.device)[0] / 3:
            rows = pixels if images.rows is None else pixels[images.rows]
            self.images = dataclasses.replace(images, pixels=torch.from_numpy(np.array(rows)).to(run.device), rows=None)
        elif run.device.type == "cuda" or pixels.nbytes > 2**31:
            self.pool = ThreadPoolExecutor(1)

    def indices(self, step: int) -> np.ndarray:
        """Numbers of the images in the global batch."""
        return batch_indices(len(self.images), self.batch, self.seed, step)

    def gather(self, step):
        index = self.indices(step)[self.run.rows(self.batch)]
        return to_device(self.images[index], self.run.device), self.images.labels[index]

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = time.perf_counter()
        if self.pool:
            x, y = (self.ahead.pop(step, None) or self.pool.submit(self.gather, step)).result()
            self.ahead = {step + 1: self.pool.submit(self.gather, step + 1)}
        else:
            x, y = self.gather(step)
        self.waited += time.perf_counter() - start
        x = to_float(x)
        if self.flip:
            flip = np.random.default_rng([self.seed, 2, step]).random(self.batch)[self.run.rows(self.batch)] < 0.5
            x = torch.where(to_device(torch.from_numpy(flip), x.device)[:, None, None, None], x.flip(3), x)
        return x, to_device(y, x.device)


# =====================================================================================================================
# THE RUN AROUND A STAGE: settings, processes, optimizer, EMA, checkpoints, log, pictures
# =====================================================================================================================


def setting(default, help: str, choices: tuple = (), alias: tuple = (), least: float = 0):
    """A field of a stage's config: its default, what --help says of it, other names of its flag, its least value."""
    return field(default=default, metadata={"help": help, "choices": choices, "alias": alias, "least": least})


PRECISIONS = ("auto", "fp32", "bf16")


@dataclass
class Common:
    """Settings of every stage that runs a model."""
    seed: int = setting(0, "seed of everything random in this run")
    fresh: bool = setting(False, "start over: remove the checkpoints and the log that --out holds")
    compile: bool = setting(torch.cuda.is_available(), "torch.compile the networks (needs a C++ compiler on a CPU)")
    precision: str = setting("auto", "matrix arithmetic: auto is bf16 where the hardware multiplies it", PRECISIONS)


def parse_config(cls, presets: dict[str, dict], description: str, argv: list[str] | None = None):
    """Command line -> config: defaults, then --preset NAME, then the flags; every mistake is one line and exit 2."""
    types = typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")
    if presets:
        parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)),
                            help=f"a set of settings; flags override it (default {next(iter(presets))})")
    for f in dataclasses.fields(cls):
        flag, default = "--" + f.name.replace("_", "-"), f" (default {f.default})" if f.default != "" else ""
        if types[f.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                                help=f.metadata["help"] + default)
        else:
            parser.add_argument(flag, *f.metadata["alias"], dest=f.name, type=types[f.name],
                                choices=f.metadata["choices"] or None,
                                metavar=None if f.metadata["choices"] else types[f.name].__name__.upper(),
                                default=argparse.SUPPRESS, help=f.metadata["help"].replace("%", "%%") + default)
    given = vars(parser.parse_args(argv))
    chosen = given.pop("preset", None)
    cfg = cls(**(presets.get(chosen, {}) | given))
    for f in dataclasses.fields(cls):
        value = getattr(cfg, f.name)
        if isinstance(value, (int, float)) and not value >= f.metadata["least"]:
            parser.error(f"--{f.name.replace('_', '-')} {value} must be at least {f.metadata['least']}")
    try:
        cfg.check()
    except ValueError as error:
        parser.error(str(error))
    if os.environ.get("RANK", "0") == "0":
        name = f"preset {chosen}" if chosen else "defaults"
        print(f"{parser.prog}: {name}", *(f"--{k.replace('_', '-')} {v}" for k, v in given.items()), flush=True)
    return cfg


@dataclass
class Run:
    """This process among the others, its device and precision."""
    rank: int
    world: int
    device: torch.device
    precision: str
    claims: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    signals: list[str] = field(default_factory=list)     # SIGTERM and SIGINT that this process was sent
    looping: bool = False                                # in a loop that looks at them and can go on another time
    side: dist.ProcessGroup | None = None                # of CPU messages beside the computation
    vote: tuple | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def claim(self, out: str | Path, fresh: bool = False) -> Path:
        """Make the output folder and keep it locked until this process ends; a second run in it is refused."""
        out = Path(out)
        if self.main:
            out.mkdir(parents=True, exist_ok=True)
            self.claims.enter_context(locked(out / ".lock", wait=False))
            for name in ("ckpt.pt", "stage1.pt", "log.jsonl") if fresh else ():
                (out / name).unlink(missing_ok=True)
        self.barrier()
        return out

    def rows(self, batch: int) -> slice:
        """This process's rows of a global batch."""
        if batch % self.world:
            fail(f"--batch-size {batch} must be a multiple of the {self.world} processes that share it")
        return slice(batch * self.rank // self.world, batch * (self.rank + 1) // self.world)

    def print(self, *text) -> None:
        if self.main:
            tqdm.write(" ".join(map(str, text)), file=sys.stdout)
            sys.stdout.flush()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def generator(self, seed: int, *stream: int) -> torch.Generator:
        """A generator on the device, a function of the seed and the stream (a purpose and a step, say)."""
        state = int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator(self.device).manual_seed(state)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def on_signal(self, number: int, frame) -> None:
        """In a loop that looks at `signals` the step is finished and saved; elsewhere, or at the third, end here."""
        self.signals.append(signal.Signals(number).name)
        if not self.looping or len(self.signals) > 2:    # torchrun passes on a Ctrl-C that came to all: that makes two
            leave(number)

    def stop_asked(self) -> bool:
        """Whether any process was sent a signal; all get the same answer. Several ask each other without waiting for
        the answer, which the next call gives.
        """
        if self.world == 1:
            return bool(self.signals)
        before, votes = self.vote, torch.tensor([len(self.signals)])
        self.vote = votes, dist.all_reduce(votes, group=self.side, async_op=True)
        return before is not None and before[1].wait() and bool(before[0])

    def leave_if_asked(self, last: bool = False) -> None:
        """End here, with status 0, if any process was sent a signal; all processes must call this when they have saved.
        After the last time no loop looks at signals any more.
        """
        votes = torch.tensor([len(self.signals)])
        if self.world > 1:
            dist.all_reduce(votes, group=self.side)
        if votes:
            self.print(f"stopped by {(self.signals or ['a signal to another process'])[0]}; all is saved, the same "
                       "command goes on from here")
            raise SystemExit(0)
        self.looping = not last

    def first(self, make):
        """make() on the first process, then on the others: one prepares what all read."""
        if self.rank:
            self.barrier()
        result = make()
        if not self.rank:
            self.barrier()
        return result

    def parallel(self, model: torch.nn.Module, compiled: bool = False) -> torch.nn.Module:
        """The model as training calls it: compiled if asked for, gradients averaged over the processes."""
        model = torch.compile(model, fullgraph=True) if compiled else model
        if self.world == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def leave(number: int, frame=None) -> typing.NoReturn:
    """End at a signal, between two saves."""
    print(f"stopped by {signal.Signals(number).name}; the same command goes on from the last save", flush=True)
    # of several processes none ends with 0: torchrun would wait for the others, which may wait for this one
    raise SystemExit(0 if os.environ.get("WORLD_SIZE", "1") == "1" else 128 + number)


def launch(main: typing.Callable[[], None]) -> None:
    """Run the main() of a script. One of several processes that fails ends at once: others may be waiting for it, and
    the farewell to them would wait for them.
    """
    for number in (signal.SIGTERM, signal.SIGINT):       # until `start` knows better
        signal.signal(number, leave)
    try:
        one_line(main)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not code or not dist.is_initialized():
            raise
        if isinstance(code, str):
            print(code, file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def one_line(main: typing.Callable[[], None]) -> None:
    """main(); what the machine does to it (disk, memory, a lost process) ends it with one line, too."""
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or 'reading or writing'}: {error.strerror or error}; what was saved is kept")
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            fail("out of memory: try a smaller --batch-size, or in training a --micro-batch")
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            fail(f"process {os.environ.get('RANK')} lost another one; the message of that one says why")
        raise


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory"))


def raise_if_of_the_machine(error: Exception) -> None:
    """Raise again what the machine is to blame for (its disk, its memory), not the file that was read."""
    if out_of_memory(error) or getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE):
        raise error


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "bf16" in info.read_text()   # avx512_bf16, amx_bf16; on Arm: bf16


# Preparing a large data set on one process can take hours; torchrun ends the others at once if one dies.
HOURS = datetime.timedelta(hours=12)


def start(cfg) -> Run:
    """Join the processes torchrun started (or be the only one), choose the device and the precision."""
    rank, world, local = (int(os.environ.get(name, d)) for name, d in
                          (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    device, bf16 = torch.device("cpu"), fast_bf16()
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            fail(f"--nproc_per_node is larger than the {torch.cuda.device_count()} GPUs of this machine")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False          # fp32 means fp32; speed comes from bf16
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)       # else fp32: fp16 would need a scaler
    elif sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc would give back the memory of every large tensor and fault it in anew: keeping it saves 6 % of a step
        for option, value in ((-4, 0), (-1, 2**31 - 1)):                 # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    elif torch.backends.mps.is_available() and world == 1:
        device, bf16 = torch.device("mps"), False
    if world > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=HOURS))
        # torchrun --max-restarts may keep its store: what processes of an earlier attempt left there must not be met
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=HOURS, store=store, rank=rank,
                                world_size=world, device_id=device if device.type == "cuda" else None)
        atexit.register(dist.destroy_process_group)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and hasattr(cfg, "fresh"):
        cfg.fresh = False                                # brought back by torchrun --max-restarts: go on
    if cfg.precision == "auto":
        cfg.precision = "bf16" if bf16 else "fp32"
    run = Run(rank, world, device, cfg.precision, side=dist.new_group(backend="gloo", timeout=HOURS) if world > 1 else None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, run.on_signal)
    run.print(f"{'1 process' if world == 1 else f'{world} processes'} on {device_name(device)}, {cfg.precision}, no TF32, "
              f"torch {torch.__version__}")
    return run


def device_name(device: torch.device) -> str:
    names = {"cuda": torch.cuda.get_device_name, "mps": str, "cpu": lambda _: f"CPU, {torch.get_num_threads()} threads"}
    return names[device.type](device)


def micro_batches(model, batch: int, micro: int):
    """Slices of a process's batch that fit in memory; gradients are exchanged at the last one only."""
    count = -(-batch // micro) if micro else 1
    for i in range(count):
        last = i == count - 1
        hold = contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
        with hold:
            yield slice(batch * i // count, batch * (i + 1) // count)


class Muon(torch.optim.Muon):
    """torch.optim.Muon with its default options, the same state, and the same numbers up to the rounding of bf16; but the
    matrices of a shape are orthogonalised together, a few large products in place of many small ones
    (results/default_speed.json), for a moment's memory of three copies of these matrices.
    """

    def __init__(self, params, lr: float, weight_decay: float):
        super().__init__(params, lr, weight_decay)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers, grads = [self.state[p]["momentum_buffer"] for p in params], [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                ahead = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))         # K x A x B
                updates = orthogonalise(ahead, group["ns_coefficients"], group["ns_steps"])         # K x A x B
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
                torch._foreach_add_(params, updates.unbind(), alpha=-scale)


def orthogonalise(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Nearly the U V^T of each matrix U S V^T of x (K x A x B), fp32: Muon's Newton-Schulz iteration, in bf16."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.bfloat16().mT if tall else x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float().contiguous()


def make_optimizers(model: torch.nn.Module, cfg) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the hidden matrices and AdamW for the rest (cfg.optimizer).

    Hidden matrices are the 2-D weights inside transformer blocks; embeddings, heads, norms and biases stay with AdamW.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if cfg.optimizer == "muon" and p.ndim == 2 and "blocks." in name]
    ids = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in ids]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], cfg.lr, (0.9, cfg.beta2), fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, cfg.muon_lr, cfg.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def optimizer_step(optimizers, params: list, scale: float, clip: float, check: int) -> tuple[torch.Tensor, bool]:
    """Clip, set the learning rates to `scale` of their peaks, step, clear. Returns the gradient norm, on the device,
    and whether the step was taken: with `check`, which waits for the device, not if the norm is not finite.
    """
    norm = torch.nn.utils.clip_grad_norm_(params, clip or float("inf"))
    taken = not check or bool(norm.isfinite())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        if taken:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm, taken


def learning_rate(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Share of the peak learning rate: linear warm-up, then constant, or cosine or linear to a tenth."""
    done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    decay = {"constant": 1.0, "cosine": 0.55 + 0.45 * np.cos(np.pi * done), "linear": 1 - 0.9 * done}[schedule]
    return min(1.0, (step + 1) / max(1, warmup)) * float(decay)


class Ema:
    """Exponential moving average of a model's parameters, fp32, in `ema.model`; the horizon grows with the run."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay
        self.source, self.target = [p.detach() for p in model.parameters()], list(self.model.parameters())

    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.target, self.source, 1 - min(self.decay, (step + 1) / (step + 10)))


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename: the file is the old or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)


def save_checkpoint(path: Path, state: dict) -> None:
    """A dict of tensors, numbers, strings and dicts of them, written atomically; the old file survives a full disk."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as handle:
            torch.save(state, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}; the checkpoint before it is untouched")


def load_checkpoint(path: str | Path, kind: str) -> dict:
    """What save_checkpoint wrote for this kind of model, on the CPU, never running code from the file."""
    if not Path(path).is_file():
        fail(f"{path}: no such checkpoint; it is written by {kind}.py")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["kind"]
    except LOAD_ERRORS as error:
        raise_if_of_the_machine(error)
        fail(f"{path} is not a whole checkpoint ({type(error).__name__}); remove it or start with --fresh")
    if found != kind:
        fail(f"{path} is a checkpoint of {found}.py, not of {kind}.py")
    return state


FREE = {"fresh", "compile", "precision", "out", "log_every", "save_every", "preview_every", "micro_batch", "samples",
        "sampler", "sampling_steps", "guidance", "guidance_low", "guidance_high", "weights",
        "keep_every", "rfid", "analyse", "dims", "skip_nonfinite", "recompute", "bench"}       # may differ on resuming


def resume(path: Path, kind: str, cfg, belongs: dict, run: Run) -> dict | None:
    """The checkpoint to go on from, or None; one with other settings, data or latents (`belongs`) is refused."""
    if not path.exists():
        return None
    state = load_checkpoint(path, kind)
    for name, value in belongs.items():
        if state.get(name) != value:
            fail(f"{path} was made with another {name.replace('_', ' ')}; use --fresh to start over, or another --out")
    before = {f.name: f.default for f in dataclasses.fields(cfg)} | state["config"]    # settings younger than the file
    for name, old in before.items():
        new = getattr(cfg, name, None)
        if name not in FREE and old != new:
            fail(f"{path} was made with --{name.replace('_', '-')} {old}, now {new}; "
                 "use the same, --fresh to start over, or another --out")
    run.print(f"continuing {path} at step {state['step']}")
    return state


def commit() -> str:
    """The commit of the source tree, or "unknown"."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, text=True,
                              capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def array_file(path: Path, shape: tuple, dtype) -> np.ndarray:
    """A memory-mapped .npy of this shape to write into: the one that is there, or a new one of zeros."""
    if not path.exists():
        part = path.with_name(path.name + ".part")
        np.lib.format.open_memmap(part, "w+", dtype, shape).flush()
        os.replace(part, path)
    return np.load(path, mmap_mode="r")


class Chunks:
    """An array file filled in chunks of rows, shared out over the processes and restartable.

    Iterating gives this process's undone (start, stop), for which to call `write`; done.npy marks what is on disk.
    The loop ends when all processes are through; then `array` holds all rows.
    """

    def __init__(self, path: Path, shape: tuple, dtype, chunk: int, run: Run, what: str):
        self.n, self.chunk, self.run, self.what, self.path = shape[0], chunk, run, what, path
        files = ((path, shape, dtype), (path.with_name("done.npy"), (-(-self.n // chunk),), np.uint8))
        self.array, self.done = run.first(lambda: [array_file(*file) for file in files])

    def write(self, start: int, rows: np.ndarray) -> None:
        """Put rows at `start` on the disk, then mark them as done."""
        write_rows(self.path, start, rows)
        write_rows(self.path.with_name("done.npy"), start // self.chunk, np.ones(1, np.uint8))

    def __iter__(self):
        mine = [c for c in range(len(self.done)) if c % self.run.world == self.run.rank and not self.done[c]]
        bar = tqdm(total=sum(min(self.chunk, self.n - c * self.chunk) for c in mine), unit=" images", desc=self.what,
                   disable=None if self.run.main else True)
        self.run.looping = True
        for c in mine:
            start, stop = c * self.chunk, min((c + 1) * self.chunk, self.n)
            yield start, stop
            bar.update(stop - start)
            if self.run.signals:
                break
        bar.close()
        self.run.leave_if_asked(last=True)
        self.array = np.load(self.path, mmap_mode="r")


def write_json(path: Path, facts: dict) -> None:
    write_atomically(path, (json.dumps(facts, indent=1) + "\n").encode())


class Log:
    """One line on the terminal and one in log.jsonl every --log-every steps: means of the terms since the line before.

    A term is a value, or a pair (sum, count) whose ratio is shown. Terms stay on the device until the line is due, so a
    step never waits for the host. Also carries the progress bar, stops the run at a term that is not finite, and says
    when to save: no checkpoint is written after such a term.
    """

    def __init__(self, run: Run, cfg, stage: str, step: int, steps: int, batches):
        path = Path(cfg.out) / "log.jsonl"
        self.run, self.path, self.stage, self.steps = run, path, stage, steps
        self.cfg, self.batch, self.batches = cfg, cfg.batch_size, batches
        self.bar = tqdm(total=steps, initial=step, desc=stage, disable=None if run.main else True, mininterval=1)
        kept = []                                        # lines after the checkpoint we continue from will come again
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):      # the line in which a run was cut
                entry = json.loads(line)
                kept += [entry] if entry["stage"] != stage or entry["step"] <= step else []
        run.barrier()
        if run.main and path.exists():
            write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self.skipped = sum("not_finite" in entry and entry["stage"] == stage for entry in kept)
        run.looping = step < steps and not cfg.bench
        self.clear()

    def clear(self):
        self.terms, self.count, self.start, self.waited = {}, 0, time.perf_counter(), self.batches.waited

    def __call__(self, step: int, rate: float, taken: bool = True, **terms: torch.Tensor) -> bool:
        """Add the terms of step `step` (counted from 1), made at `rate` of the peak learning rate; whether to save now.

        A step that was not taken is logged on its own, and no more of them may come than --skip-nonfinite.
        """
        if not taken:
            self.report(self.totals({name: [(step, rate, pair(value))] for name, value in terms.items()}))
        else:
            for name, value in terms.items():
                self.terms.setdefault(name, []).append((step, rate, pair(value)))
        self.count += 1
        self.bar.update()
        asked, last = self.run.stop_asked(), step == self.steps
        every = self.cfg.save_every, getattr(self.cfg, "keep_every", 0)
        due = asked or last or any(n and step % n == 0 for n in every)
        if due or step % self.cfg.log_every == 0:
            self.line(step, rate)
        return due and not self.cfg.bench

    def totals(self, terms: dict) -> dict[str, list]:
        """The pairs summed over the processes, on the host: {term: [(step, rate, sum, count)]}."""
        flat = self.run.sum(torch.stack([value for rows in terms.values() for _, _, value in rows])).tolist()
        numbers = iter(flat)
        return {name: [(*row[:2], *next(numbers)) for row in rows] for name, rows in terms.items()}

    def report(self, totals: dict) -> None:
        """Log each step with a term that is not finite, with its images, and end the run if it is one too many."""
        bad = {}                                         # by step: its first such term
        for name, rows in totals.items():
            for step, rate, total, _ in rows:
                if not math.isfinite(total):
                    bad.setdefault(step, (rate, name))
        for step, (rate, name) in sorted(bad.items()):
            self.skipped += 1
            where = f"{self.stage}: {name} is not finite at step {step} (learning rate {self.cfg.lr * rate:.3g})"
            self.append({"stage": self.stage, "step": step, "not_finite": name, "lr": self.cfg.lr * rate,
                         "indices": self.batches.indices(step - 1).tolist()})
            if self.skipped > self.cfg.skip_nonfinite:
                fail(f"{where}; the last checkpoint is kept, the batch is in log.jsonl. Try a lower --lr, "
                     f"--precision fp32, or --skip-nonfinite {max(10, 2 * self.skipped)}")
            self.run.print(f"{where}: skipped, {self.skipped} of at most {self.cfg.skip_nonfinite}")

    def append(self, entry: dict) -> None:
        if self.run.main:
            with open(self.path, "a") as handle:
                handle.write(json.dumps(entry) + "\n")

    def line(self, step: int, rate: float) -> None:
        found = self.totals(self.terms) if self.terms else {}
        sums = {name: np.sum([row[2:] for row in rows], 0) for name, rows in found.items()}
        values = {name: float(f"{total / count:.6g}") for name, (total, count) in sums.items()
                  if count and math.isfinite(total)}
        seconds = time.perf_counter() - self.start
        entry = {"stage": self.stage, "step": step, "images": step * self.batch, **values, "lr": self.cfg.lr * rate,
                 "images_per_s": round(self.count * self.batch / seconds, 1),
                 "data_wait": round((self.batches.waited - self.waited) / seconds, 4),
                 "memory_gib": memory_gib(self.run)}
        self.report(found)
        self.append(entry)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.set_postfix_str(shown)
        self.run.print(f"{self.stage} {step}/{self.steps}  {shown}  {entry['images_per_s']:.0f} images/s  "
                       f"data wait {entry['data_wait']:.1%}  {entry['memory_gib']} GiB")
        self.clear()


def clock(run: Run) -> float:
    """Seconds, when all work given to the device is done."""
    if run.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def matmul_ceiling(run: Run) -> float:
    """TFLOP/s of large square matrix products in the precision of the run, the median of nine after three: what this
    device can do, to compare with.
    """
    n, seconds = 8192 if run.device.type == "cuda" else 2048, []
    a = torch.randn(n, n, device=run.device, dtype=torch.bfloat16 if run.precision == "bf16" else torch.float32)
    for _ in range(12):
        began = clock(run)
        a @ a
        seconds.append(clock(run) - began)
    return 2 * n**3 / 1e12 / float(np.median(seconds[3:]))


def bench_facts(cfg, run: Run, images_per_s: float, flops: float) -> dict:
    """What --bench reports; `flops` are those of the networks in question for one image."""
    memory = memory_gib(run)
    reached, ceiling = images_per_s * flops / 1e12 / run.world, matmul_ceiling(run)
    facts = {"images_per_s": round(images_per_s, 2), "tflops_per_process": float(f"{reached:.4g}"),
             "matmul_tflops": float(f"{ceiling:.4g}"), "share_of_matmul": round(reached / ceiling, 3),
             "memory_gib": memory, "processes": run.world, "device": device_name(run.device),
             "precision": run.precision, "compile": cfg.compile, "batch_size": cfg.batch_size, "seed": cfg.seed,
             "torch": torch.__version__, "commit": commit()}
    run.print("bench:", ", ".join(f"{name} {value}" for name, value in facts.items()))
    return facts


def bench(cfg, run: Run, flops: float, train: typing.Callable) -> tuple:
    """--bench STEPS: train(cfg) for so many steps after a fifth as many to warm up; (what it returns, facts).

    The rate is the median of five intervals of the run's own log; nothing else is written.
    """
    every = max(1, cfg.bench // 5)
    lengths = {name: 6 * every for name in ("steps", "stage2_steps") if hasattr(cfg, name)}
    lengths |= {name: 0 for name in ("keep_every",) if hasattr(cfg, name)}
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    out = train(dataclasses.replace(cfg, log_every=every, save_every=every, **lengths))
    lines = [json.loads(line) for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "images_per_s" in line][-5:]
    rate, wait = (float(np.median([line[name] for line in lines])) for name in ("images_per_s", "data_wait"))
    return out, bench_facts(cfg, run, rate, flops) | {"data_wait": wait, "steps": 5 * every}


def pair(value: torch.Tensor | tuple) -> torch.Tensor:
    """A term of the log as (sum, count)."""
    value = torch.stack(value) if isinstance(value, tuple) else torch.stack([value, torch.ones_like(value)])
    return value.detach().float()


def memory_gib(run: Run) -> float:
    """The most memory used so far, of the GPU or of this process."""
    if run.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)


def save_grid(path: str | Path, images: torch.Tensor, columns: int, titles=(), names=()) -> None:
    """A picture of uint8 N x 3 x S x S, row by row, small ones enlarged; titles over columns, names under cells."""
    n, _, s, _ = images.shape
    zoom, gap = max(1, 96 // s), 2
    cell, head, foot = s * zoom, 16 if titles else 0, 14 if names else 0
    rows = -(-n // columns)
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
    part = Path(path).with_suffix(".part.png")
    sheet.save(part)
    os.replace(part, path)


def save_curves(path: str | Path, curves: dict[str, list], x_name: str, y_name: str, log_x: bool = False,
                join: bool = True) -> None:
    """A picture of curves {name: [(x, y), ...]} with axes and a legend; points only, if not joined."""
    colors = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")
    points = [p for line in curves.values() for p in line]
    scale = np.log2 if log_x else np.asarray
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    left, right = (float(scale(f(p[0] for p in points))) for f in (min, max))
    low, high = low - 0.05 * (high - low + 1e-9), high + 0.05 * (high - low + 1e-9)
    sheet = Image.new("RGB", (800, 420), "white")
    pen = ImageDraw.Draw(sheet)

    def place(x, y):
        return 70 + 460 * (float(scale(x)) - left) / (right - left or 1), 370 - 330 * (y - low) / (high - low)

    pen.rectangle((70, 40, 530, 370), outline="black")
    for i in range(5):
        value = low + (high - low) * i / 4
        pen.text((8, 364 - 330 * i / 4), f"{value:.4g}", "black")
        pen.line((66, 370 - 330 * i / 4, 70, 370 - 330 * i / 4), "black")
    free = 0.0                                           # where the next label has room
    for x in sorted({p[0] for p in points}):
        if place(x, low)[0] >= free:
            pen.text((place(x, low)[0] - 8, 376), f"{x:g}", "black")
            free = place(x, low)[0] + 26
    pen.text((250, 396), x_name, "black")
    pen.text((8, 18), y_name, "black")
    for i, (name, line) in enumerate(curves.items()):
        color, spots = colors[i % len(colors)], [place(*p) for p in sorted(line)]
        if join:
            pen.line(spots, color, 2)
        for x, y in spots:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), color)
        pen.rectangle((545, 45 + 18 * i, 557, 55 + 18 * i), color)
        pen.text((562, 44 + 18 * i), name[-38:], "black")
    part = Path(path).with_suffix(".part.png")
    sheet.save(part)
    os.replace(part, path)


@dataclass
class PackConfig:
    data: str = setting("", "folder of images: class folders or flat, with or without train/ and val/")
    size: int = setting(256, "side of the stored images, in pixels")
    out: str = setting("", "folder to write; give it to the other scripts as --data")
    workers: int = setting(0, "decoding processes; 0: one per core")

    def check(self):
        if not self.data or not self.out or self.size < 1:
            raise ValueError("--data DIR, --out DIR and a positive --size are needed")


def main():
    cfg = parse_config(PackConfig, {}, "Pack a folder of images once, for fast and repeatable training.")
    pack(cfg.data, cfg.size, cfg.out, cfg.workers)
    for split in ("train", "val"):
        images = load_images(cfg.out, cfg.size, split)
        print(f"{cfg.out}: {split} {len(images)} images of {cfg.size} px, {len(images.classes)} classes")


if __name__ == "__main__":
    launch(main)
