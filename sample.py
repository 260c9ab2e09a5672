"""Images from a trained pair of tokenizer and diffusion model.

    torchrun sample.py  # -> out/samples/samples.npz, grid.png
    torchrun --nproc_per_node=8 sample.py --num-samples 50000

Sample i depends only on weights, settings and (seed, i), not on batch size or process count.
"""
import json  # noqa: I001
import shutil
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import Dist, Shards, die, keep_outside, launch, make_shards, option, save_grid, writing
from diffusion import (
    SamplerConfig, fingerprint, generate, latent_decoder, load_diffusion, load_official)
from tokenizer import load_tokenizer

@dataclass(frozen=True)
class Config:
    model: str = option("out/diffusion/ckpt.pt", "checkpoint of diffusion.py, or a released SiT")
    tokenizer: str = option("", "checkpoint of tokenizer.py; empty: that of the model")
    guide: str = option("", "autoguidance: a worse model in place of the null class")
    path: str = ""  # interpolation of the SDE sampler; empty: as trained
    out: str = option("out/samples", "folder to write")
    num_samples: int = option(2000, "number of images", least=1)
    labels: str = option("balanced", "balanced, random, or classes with commas")
    sampler: str = option("heun", "heun: two network calls a step", ("euler", "heun", "sde"))
    steps: int = option(10, "of the sampler", least=1)
    guidance: float = option(2.0, "its scale; 1: none", least=1)
    guidance_low: float = option(0.0, "it acts where this <= t")
    guidance_high: float = option(0.75, "and t <= this; t = 1 is noise")
    batch_size: int = option(250, "images at a time", least=1)
    png: bool = option(False, "write png/000000.png ..., too")
    seed: int = option(0, "of the noise and of random labels")
    compile: bool = torch.cuda.is_available()
    precision: str = option("auto", "auto: bf16 if the hardware has it", ("auto", "fp32", "bf16"))

    def check(self) -> None:
        if not self.guidance_low <= self.guidance_high <= 1:
            raise ValueError("--guidance-low <= --guidance-high <= 1 is needed")

PAPER = {"sampler": "sde", "steps": 250, "num_samples": 50_000, "guidance": 1.9}  # Table 8
PRESETS = {"quick": {}, "paper256": PAPER,
           "paper512": PAPER | {"guidance": 1.5, "guidance_high": 0.7}}

def choose_labels(rule: str, n: int, classes: list[str], dist: Dist, seed: int) -> np.ndarray:
    """The class of each of n images."""
    if rule == "balanced":
        return np.arange(n) % len(classes)
    if rule == "random":
        return dist.rng(seed, "labels").integers(0, len(classes), n)
    numbers = {name: i for i, name in enumerate(classes)}
    if not any(name.isdigit() for name in classes):  # else a missing name would be a number
        numbers |= {str(i): i for i in range(len(classes))}
    words = rule.split(",")
    for word in words:
        if word not in numbers:
            die(f"--labels {rule}: {word!r} is none of the classes {', '.join(classes[:20])}")
    return np.resize([numbers[word] for word in words], n)

def save_npz(path: Path, images: Shards, **arrays: np.ndarray) -> None:
    """An npz as numpy writes it. arr_0 goes shard by shard, to save memory."""
    with writing(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
            np.lib.format.write_array_header_1_0(member, header)
            for shard in images.arrays:
                member.write(np.ascontiguousarray(shard))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, array)

def load_models(cfg: Config, dist: Dist) -> tuple:
    """(model, its settings, all else that is stored, tokenizer, guide)"""
    if Path(cfg.model).is_dir() or cfg.model.endswith(".safetensors"):
        if not cfg.tokenizer:
            die("a released SiT needs --tokenizer")
        model, trained, meta = load_official(cfg.model, cfg.tokenizer, dist.device)
    else:
        model, trained, meta = load_diffusion(cfg.model, dist.device)
    # The folder of a run may have been moved: the tokenizer is where it was as seen from the model, or where it was
    places = [Path(cfg.model).parent / meta["tokenizer"][0], Path(meta["tokenizer"][-1])]
    for path in [cfg.tokenizer] if cfg.tokenizer else sorted(places, key=lambda place: not place.exists()):
        tokenizer, _ = load_tokenizer(path, dist.device)
        if fingerprint(tokenizer.state_dict()) == meta["tokenizer_weights"]:
            break
    else:
        die(f"{path} is not the tokenizer that {cfg.model} was trained on: give --tokenizer")

    guide = None
    if cfg.guide:
        guide, guide_cfg, other = load_diffusion(cfg.guide, dist.device)
        ours, theirs = meta | {"path": trained.path}, other | {"path": guide_cfg.path}
        for name in ("tokenizer_weights", "images", "path"):
            if ours.get(name) != theirs[name]:
                die(f"--guide {cfg.guide} was trained with other {name} than {cfg.model}")
    elif cfg.guidance > 1 and not trained.label_dropout:
        die(f"{cfg.model} has no null class: give --guidance 1, or --guide")
    for net in filter(None, (model, guide)) if cfg.compile else ():
        net.compile(fullgraph=True, dynamic=False)
    return model, trained, meta, tokenizer, guide

def main(cfg: Config, dist: Dist) -> None:
    model, trained, meta, tokenizer, guide = load_models(cfg, dist)
    keep_outside(cfg.out, meta["data"])
    classes, n = meta["classes"], cfg.num_samples
    labels = choose_labels(cfg.labels, n, classes, dist, cfg.seed)
    guidance = cfg.guidance if len(classes) > 1 or guide else 1.0
    sampling = SamplerConfig(cfg.sampler, cfg.steps, guidance, cfg.guidance_low, cfg.guidance_high,
                             cfg.seed, cfg.path or trained.path)
    mean, std = (torch.tensor(meta[name], device=dist.device) for name in ("mean", "std"))
    decode = latent_decoder(tokenizer, mean, std, dist)

    def make(start, stop):
        y = torch.from_numpy(labels[start:stop])
        x = generate(model, decode, range(start, stop), y, sampling, dist, guide)
        return x.permute(0, 2, 3, 1).numpy()

    made_of = asdict(sampling) | {  # hashed into the shards' names
        "n": n, "labels": cfg.labels, "data": meta["data"], "size": meta["size"],
        "training_steps": meta["step"], "precision": dist.precision, "batch_size": cfg.batch_size}
    nets = {"weights": model, "guide": guide, "tokenizer_weights": tokenizer}
    made_of |= {name: net and fingerprint(net.state_dict(), ("",)) for name, net in nets.items()}
    out = dist.make_out_dir(cfg.out)
    images = make_shards(out / "parts", n, cfg.batch_size, make, made_of, dist, "sampling")
    if dist.is_main:
        if (out / "samples.npz").exists():  # else png/ is not ours
            shutil.rmtree(out / "png", ignore_errors=True)
        about = {"classes": np.array(classes), "meta": np.array(json.dumps(made_of))}
        save_npz(out / "samples.npz", images, labels=labels, **about)
        if cfg.png:
            (out / "png").mkdir()
            for i in range(n):
                Image.fromarray(images[[i]][0]).save(out / f"png/{i:06d}.png")
        first = torch.from_numpy(images[np.arange(min(n, 80))]).permute(0, 3, 1, 2)
        save_grid(out / "grid.png", first, 10, names=[classes[c] for c in labels])
        for part in (out / "parts").glob("*.npy"):
            part.unlink(missing_ok=True)
        with suppress(OSError):  # a second run may still write there
            (out / "parts").rmdir()
    dist.print(f"wrote {out}: {sampling}, {sampling.nfe()} network calls, "
               f"{sampling.nfe_with_guidance()} if a guided one counts twice")
    dist.barrier()

if __name__ == "__main__":
    launch(main, Config, PRESETS, __doc__)
