"""Images from a trained pair of tokenizer and diffusion model.

    torchrun sample.py  # -> out/samples/samples.npz, grid.png
    torchrun --nproc_per_node=8 sample.py --num-samples 50000

Sample i depends on weights, settings and (seed, i) alone; batch size may change its rounding.
"""
import json  # noqa: I001
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import Dist, Shards, die, keep_outside, launch, make_shards, option, save_grid, writing
from diffusion import SamplerConfig, draw_labels, generate, load_diffusion
from tokenizer import decode_images, fingerprint, load_tokenizer

@dataclass(frozen=True)
class Config:
    model: str = option("out/diffusion/ckpt.pt", "checkpoint of diffusion.py, or a released SiT")
    tokenizer: str = option("", "checkpoint of tokenizer.py; empty: that of the model")
    guide: str = option("", "autoguidance: a worse model in place of the null class")
    out: str = option("out/samples", "folder to write")
    num_samples: int = option(2000, "number of images", least=1)
    labels: str = option("balanced", "balanced, random, or classes with commas")
    sampler: str = option("heun", "heun has two calls a step", ("euler", "heun", "sde"))
    steps: int = option(10, "sampler steps", least=1)
    guidance: float = option(2.0, "guidance scale; 1: no guidance", least=1)
    guidance_low: float = option(0.0, "guidance acts where this <= t")
    guidance_high: float = option(0.75, "guidance acts where t <= this; t = 1: noise")
    batch_size: int = option(250, "images at a time", least=1)
    png: bool = option(False, "write png/000000.png and so on")
    seed: int = option(0, "seed of the noise and of random labels")
    compile: bool = False
    precision: str = option("auto", "auto: bf16 where fast; tf32: on a GPU", ("auto", "fp32", "tf32", "bf16"))

    def check(self):
        if not self.guidance_low <= self.guidance_high <= 1:
            raise ValueError("--guidance-low <= --guidance-high <= 1 is needed")

PAPER = {  # Sec. 4. bf16 would round each velocity to 3 digits
    "sampler": "sde", "steps": 250, "num_samples": 50_000, "guidance": 1.9,
    "labels": "random", "compile": torch.cuda.is_available(), "precision": "fp32"}
PRESETS = {
    "quick": {}, "paper256": PAPER, "paper512": PAPER | {"guidance": 1.5, "guidance_high": 0.7},
    "lightning256": PAPER | {"sampler": "euler", "guidance": 1.8},
    "lightning512": PAPER | {"sampler": "euler", "guidance": 1.6, "guidance_high": 0.65}}

def choose_labels(rule: str, n: int, classes: list, dist: Dist, seed: int, present=()) -> np.ndarray:
    """The class of each of n images. `present`: classes with training images."""
    chosen = present or range(len(classes))
    if rule not in ("balanced", "random"):
        numbers = {name: i for i, name in enumerate(classes)}
        if not any(name.isdigit() for name in classes):  # else a missing name would be a number
            numbers |= {str(i): i for i in range(len(classes))}
        if unknown := [word for word in rule.split(",") if word not in numbers]:
            die(f"--labels {rule}: {unknown[0]!r} is none of the classes: {', '.join(classes[:20])}")
        chosen = [numbers[word] for word in rule.split(",")]
    return draw_labels(rule, chosen, n, dist, seed)

def save_npz(path: Path, images: Shards, **arrays):
    """An npz as numpy writes it. arr_0 goes shard by shard."""
    header = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
    with writing(path) as file:
        np.savez(file, **arrays)
        with zipfile.ZipFile(file, "a") as zipped, zipped.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for shard in images.arrays:
                member.write(shard)

def load_models(cfg: Config, dist: Dist) -> tuple:
    """(model, settings, what else is stored, tokenizer, guide)"""
    model, trained, meta = load_diffusion(cfg.model, dist.device, cfg.tokenizer)
    # The tokenizer may have moved: look beside the model first
    places = [Path(cfg.model).parent / meta["tokenizer"][0], Path(meta["tokenizer"][-1])]
    for path in [cfg.tokenizer] if cfg.tokenizer else [p for p in places if p.exists()] or places[:1]:
        tokenizer, _ = load_tokenizer(path, dist.device)
        if fingerprint(tokenizer.state_dict()) == meta["tokenizer_weights"]:
            break
    else:
        die(f"{path} is not the tokenizer that {cfg.model} was trained on: give --tokenizer")
    guide = None
    if cfg.guide:
        guide, other, its_meta = load_diffusion(cfg.guide, dist.device, cfg.tokenizer)
        ours, its = meta | {"path": trained.path}, its_meta | {"path": other.path}
        for name in ("tokenizer_weights", "images", "path"):
            if ours.get(name) != its.get(name):
                die(f"--guide {cfg.guide} was trained with other {name} than {cfg.model}")
        dist.compiled(guide, cfg.compile)
    elif cfg.guidance > 1 and not trained.label_dropout:
        die(f"{cfg.model} has no null class: give --guidance 1, or --guide")
    return dist.compiled(model, cfg.compile), trained, meta, tokenizer, guide

def save(out: Path, cfg: Config, images: Shards, labels, classes: list, made_of: dict):
    """Write samples.npz, grid.png and png/, in place of an earlier run's."""
    save_npz(out / "samples.npz", images, labels=labels, classes=classes, meta=json.dumps(made_of))
    shutil.rmtree(out / "png", ignore_errors=True)
    (out / "metrics.json").unlink(missing_ok=True)
    if cfg.png:
        (out / "png").mkdir()
        write = lambda i: Image.fromarray(images[[i]][0]).save(out / f"png/{i:06d}.png")
        with ThreadPoolExecutor() as pool:
            list(pool.map(write, range(len(labels))))
    first = torch.from_numpy(images[np.arange(min(len(labels), 80))]).permute(0, 3, 1, 2)
    save_grid(out / "grid.png", first, 10, [classes[c] for c in labels[:80]])

def main(cfg: Config, dist: Dist):
    model, trained, meta, tokenizer, guide = load_models(cfg, dist)
    keep_outside(cfg.out, meta["data"])
    classes, n = meta["classes"], cfg.num_samples
    labels = choose_labels(cfg.labels, n, classes, dist, cfg.seed, meta.get("present"))
    guidance = cfg.guidance if len(classes) > 1 or guide else 1.0
    sampling = SamplerConfig(
        cfg.sampler, cfg.steps, guidance, cfg.guidance_low, cfg.guidance_high, cfg.seed, trained.path)
    mean, std = torch.tensor([meta["mean"], meta["std"]], device=dist.device)  # H each

    def make(start, stop):
        y = torch.from_numpy(labels[start:stop])
        z = generate(model, range(start, stop), y, sampling, dist, guide)  # B x L x H
        return decode_images(tokenizer, z * std + mean, dist).permute(0, 2, 3, 1).cpu().numpy()

    made_of = asdict(sampling) | {
        "n": n, "labels": cfg.labels, "data": meta["data"], "size": meta["size"],
        "training_steps": meta["step"], "precision": dist.precision, "batch_size": cfg.batch_size}
    for name, net in {"weights": model, "guide": guide, "tokenizer_weights": tokenizer}.items():
        made_of[name] = net and fingerprint(net.state_dict(), "")
    out = Path(cfg.out)
    for name in ("settings.json", "metrics.json", "grid.png", "png"):
        if dist.is_main and (out / name).exists() and not (out / "samples.npz").exists():
            die(f"{out} holds {name}, which sample.py did not write: give another --out")
    images = make_shards(out / "parts", n, cfg.batch_size, make, made_of, dist, "sampling")
    if dist.is_main:
        save(out, cfg, images, labels, classes, made_of)
        with suppress(OSError):  # a second run may write there
            for path in (out / "parts").glob("*-*.npy"):
                path.unlink(missing_ok=True)
            (out / "parts").rmdir()
    calls, doubled = sampling.nfe()
    dist.print(f"wrote {out}: {sampling}, {calls} network calls, {doubled} if guided ones count twice")

if __name__ == "__main__":
    launch(main, Config, PRESETS, __doc__)
