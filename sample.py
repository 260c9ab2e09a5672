"""Images from a trained pair of tokenizer and diffusion model.

    torchrun sample.py                                          # -> out/samples/samples.npz, grid.png
    torchrun --nproc_per_node=8 sample.py --num-samples 50000   # shared out; a run that was killed goes on

Sample i depends only on weights, settings and (seed, i), not on batch size or process count.
"""
import dataclasses
import json
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import Dist, Shards, die, launch, make_shards, option, save_grid, writing
from diffusion import SamplerConfig, fingerprint, generate, latent_decoder, load_diffusion, load_official
from tokenizer import load_tokenizer


@dataclass(frozen=True)
class Config:
    model: str = option("out/diffusion/ckpt.pt", "checkpoint of diffusion.py, or a released SiT (folder, .safetensors)")
    tokenizer: str = option("", "checkpoint of tokenizer.py; empty: the one that the model was trained on")
    guide: str = option("", "autoguidance: an earlier or smaller checkpoint of diffusion.py in place of the null class")
    path: str = ""  # interpolation of the SDE sampler; empty: as trained
    out: str = option("out/samples", "folder for samples.npz (arr_0 uint8 n x S x S x 3, labels) and grid.png")
    num_samples: int = option(2000, "number of images", least=1)
    labels: str = option("balanced", "balanced (i mod K), random, or class names or numbers separated by commas")
    sampler: str = option("heun", "euler, heun (two network calls a step), or sde (Euler-Maruyama)",
                          ("euler", "heun", "sde"))
    steps: int = option(10, "steps of the sampler", least=1)
    guidance: float = option(2.0, "scale of classifier-free guidance; 1: none", least=1)
    guidance_low: float = option(0.0, "guidance acts where guidance_low <= t")
    guidance_high: float = option(0.75, "... and t <= guidance_high; t = 1 is noise")
    batch_size: int = option(250, "images that a process makes at a time", least=1)
    png: bool = option(False, "write the images as png/000000.png ..., too")
    seed: int = option(0, "seed of the noise and of random labels")
    compile: bool = torch.cuda.is_available()
    precision: str = option("auto", "of matrix products: auto is bf16 where the hardware multiplies it",
                            ("auto", "fp32", "bf16"))

    def check(self) -> None:
        if not self.guidance_low <= self.guidance_high <= 1:
            raise ValueError("0 <= --guidance-low <= --guidance-high <= 1 is needed")


PAPER = {"sampler": "sde", "steps": 250, "num_samples": 50_000, "guidance": 1.9, "guidance_high": 0.75}      # Table 8
PRESETS = {"quick": {}, "paper256": PAPER, "paper512": PAPER | {"guidance": 1.5, "guidance_high": 0.7}}


def choose_labels(rule: str, n: int, classes: list[str], dist: Dist, seed: int) -> np.ndarray:
    """The class of each of n images."""
    if rule == "balanced":
        return np.arange(n) % len(classes)
    if rule == "random":
        return dist.rng(seed, "labels").integers(0, len(classes), n)

    number_of = {str(i): i for i in range(len(classes))} | {name: i for i, name in enumerate(classes)}
    words = rule.split(",")
    for word in words:
        if word not in number_of:
            die(f"--labels {rule}: {word!r} is none of the classes {', '.join(classes[:20])}")
    return np.array([number_of[word] for word in words])[np.arange(n) % len(words)]


def save_npz(path: Path, images: Shards, **arrays: np.ndarray) -> None:
    """An npz as numpy writes it, uncompressed. arr_0 goes shard by shard, so memory does not grow with it."""
    with writing(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
            np.lib.format.write_array_header_1_0(member, header)
            for shard in images.arrays:
                member.write(np.ascontiguousarray(shard))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, array)


def main(cfg: Config, dist: Dist) -> None:
    began = time.time()

    # The model, its tokenizer, and the guide
    if Path(cfg.model).is_dir() or cfg.model.endswith(".safetensors"):
        if not cfg.tokenizer:
            die("a released SiT needs --tokenizer: what tokenizer.py --from-official wrote")
        model, trained, meta = load_official(cfg.model, cfg.tokenizer, dist.device)
    else:
        model, trained, meta = load_diffusion(cfg.model, dist.device)
    tokenizer, _ = load_tokenizer(cfg.tokenizer or trained.tokenizer, dist.device)
    if fingerprint(tokenizer.state_dict()) != meta["tokenizer_weights"]:
        die(f"{cfg.tokenizer or trained.tokenizer} is not the tokenizer that {cfg.model} was trained on")

    guide = None
    if cfg.guide:
        guide, guide_cfg, guide_meta = load_diffusion(cfg.guide, dist.device)
        same = {name: guide_meta[name] == meta[name] for name in ("tokenizer_weights", "classes")}
        same |= {name: np.allclose(guide_meta[name], meta[name], rtol=1e-2, atol=1e-2) for name in ("mean", "std")}
        same["path"] = guide_cfg.path == trained.path
        if not all(same.values()):
            other = min(same, key=same.get).replace("_", " ")
            die(f"--guide {cfg.guide} cannot guide {cfg.model}: it was trained with another {other}")
    elif cfg.guidance > 1 and not trained.label_dropout:
        die(f"{cfg.model} was trained without dropped labels and has no null class: give --guidance 1, or --guide")
    for net in filter(None, (model, guide)) if cfg.compile else ():
        net.compile(fullgraph=True, dynamic=False)  # guided or not, last batch or not: 4 shapes

    # How to sample. The hash of this is in the names of the shards
    classes, path = meta["classes"], cfg.path or trained.path
    labels = choose_labels(cfg.labels, cfg.num_samples, classes, dist, cfg.seed)
    guidance = cfg.guidance if len(classes) > 1 or guide else 1.0
    sampling = SamplerConfig(cfg.sampler, cfg.steps, guidance, cfg.guidance_low, cfg.guidance_high, cfg.seed)
    mean, std = (torch.tensor(meta[name], device=dist.device) for name in ("mean", "std"))
    decode = latent_decoder(tokenizer, mean, std, dist)
    made_of = dataclasses.asdict(sampling) | {
        "n": cfg.num_samples, "labels": cfg.labels, "path": path, "data": meta["data"], "size": meta["size"],
        "training_steps": meta["step"], "precision": dist.precision, "batch_size": cfg.batch_size}
    made_of |= {name: fingerprint(net.state_dict(), ("",)) if net else "" for name, net in
                (("weights", model), ("guide", guide), ("tokenizer_weights", tokenizer))}

    def make(start: int, stop: int) -> np.ndarray:
        y = torch.from_numpy(labels[start:stop])
        return generate(model, decode, range(start, stop), y, sampling, path, dist, guide).permute(0, 2, 3, 1).numpy()

    out = dist.make_out_dir(cfg.out)
    images = make_shards(out / "parts", cfg.num_samples, cfg.batch_size, make, made_of, dist, "sampling")
    if dist.is_main:
        save_npz(out / "samples.npz", images, labels=labels, classes=np.array(classes), meta=np.array(json.dumps(made_of)))
        if cfg.png:
            shutil.rmtree(out / "png", ignore_errors=True)
            (out / "png").mkdir()
            for i in range(cfg.num_samples):
                Image.fromarray(images[[i]][0]).save(out / f"png/{i:06d}.png")
        first = np.arange(min(cfg.num_samples, 80))
        columns = min(10, len(classes)) if len(classes) > 1 else 8
        names = tuple(classes[c] for c in labels[first]) if len(classes) > 1 else ()
        save_grid(out / "grid.png", torch.from_numpy(images[first]).permute(0, 3, 1, 2), columns, names=names)
        shutil.rmtree(out / "parts", ignore_errors=True)  # a second run may still write there
    dist.print(f"{cfg.num_samples} images of {cfg.model} ({cfg.sampler}, {sampling.nfe()} network calls, or "
               f"{sampling.nfe_with_guidance()} if a guided one counts twice; guidance {guidance:g} on "
               f"[{cfg.guidance_low:g}, {cfg.guidance_high:g}], {cfg.labels} labels, {dist.precision})")
    dist.print(f"wrote {out}/samples.npz, grid.png in {time.time() - began:.0f} s")
    dist.barrier()


if __name__ == "__main__":
    launch(main, Config, PRESETS, __doc__)
