"""Images from a trained pair of tokenizer and diffusion model.

    torchrun sample.py                                   # -> out/samples/samples.npz, grid.png
    torchrun --nproc_per_node=8 sample.py --images 50000 # shared out; killed and started again, it goes on

Image number i is a function of the weights, the settings and (seed, i), whatever the number of processes.
"""
import dataclasses
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import (
    Chunks,
    Common,
    Run,
    bench_facts,
    clock,
    commit,
    fail,
    launch,
    load_checkpoint,
    parse_config,
    read_json,
    save_grid,
    setting,
    start,
    write_json,
)
from diffusion import (
    Sampling,
    fingerprint,
    forward_flops,
    generate,
    latent_decoder,
    load_diffusion,
    load_official,
)
from tokenizer import forward_flops as tokenizer_flops
from tokenizer import load_tokenizer


@dataclass
class Config(Common):
    model: str = setting("out/diffusion/ckpt.pt", "checkpoint of diffusion.py")
    from_official: str = setting("", "a released SiT (folder or file) in place of --model; needs --tokenizer")
    tokenizer: str = setting("", "checkpoint of tokenizer.py; empty: the one the model was trained on")
    guide: str = setting("", "autoguidance: an earlier or smaller checkpoint of diffusion.py instead of the null class")
    path: str = setting("", "interpolation of the SDE sampler; empty: as trained; for released models cosine, which "
                        "their demos use, though nothing published says what they were trained on",
                        ("linear", "cosine"))
    out: str = setting("out/samples", "folder for samples.npz (arr_0 uint8 n x S x S x 3, labels) and grid.png")
    n: int = setting(2000, "number of images (torchrun takes --n for its own: say --images there)",
                     alias=("--images",), least=1)
    labels: str = setting("balanced", "balanced (i mod K), random, or class names or numbers separated by commas")
    sampler: str = setting("heun", "euler, heun (two network calls a step), or sde (Euler-Maruyama)",
                           ("euler", "heun", "sde"))
    steps: int = setting(10, "steps of the sampler", least=1)
    guidance: float = setting(2.0, "scale of classifier-free guidance; 1: none", least=1)
    guidance_low: float = setting(0.0, "guidance acts where guidance_low <= t")
    guidance_high: float = setting(0.75, "... and t <= guidance_high; t = 1 is noise")
    batch_size: int = setting(250, "images a process makes at a time", least=1)
    png: bool = setting(False, "write the images as png/000000.png ..., too")
    bench: int = setting(0, "measure so many batches, write bench.json and stop")

    def check(self):
        if not self.guidance_low <= self.guidance_high <= 1:
            raise ValueError("0 <= --guidance-low <= --guidance-high <= 1 is needed")
        if self.from_official and not self.tokenizer:
            raise ValueError("--from-official needs --tokenizer: what tokenizer.py --from-official wrote")


PAPER = {"sampler": "sde", "steps": 250, "n": 50_000, "guidance": 1.9, "guidance_high": 0.75}        # Table 8
PRESETS = {"quick": {}, "paper256": PAPER, "paper512": PAPER | {"guidance": 1.5, "guidance_high": 0.7}}


def choose_labels(rule: str, n: int, classes: list[str], seed: int) -> np.ndarray:
    """The class of each of n images."""
    if rule == "balanced":
        return np.arange(n) % len(classes)
    if rule == "random":
        return np.random.default_rng([seed, 8]).integers(0, len(classes), n)
    chosen = []
    for word in rule.split(","):
        if word in classes:
            chosen.append(classes.index(word))
        elif word.isdecimal() and int(word) < len(classes):
            chosen.append(int(word))
        else:
            fail(f"--labels {rule}: {word!r} is none of the classes {', '.join(classes[:20])}")
    return np.array(chosen)[np.arange(n) % len(chosen)]


def main():
    cfg, began = parse_config(Config, PRESETS, __doc__), time.time()
    if cfg.from_official and "--preset" not in " ".join(sys.argv):   # then the paper's settings for its size
        size = load_checkpoint(cfg.tokenizer, "tokenizer")["config"]["size"]
        preset = "paper512" if size == 512 else "paper256"
        cfg = parse_config(Config, PRESETS, __doc__, [*sys.argv[1:], "--preset", preset])
    if cfg.bench:
        cfg.n = cfg.batch_size * (cfg.bench + 2)
    run = start(cfg)
    name, guide = cfg.from_official or cfg.model, None
    if cfg.from_official:
        model, trained, state = load_official(cfg.from_official, cfg.tokenizer, run.device)
    else:
        model, trained, state = load_diffusion(cfg.model, run.device)
    path = cfg.path or trained.path
    tokenizer, tok = load_tokenizer(cfg.tokenizer or trained.tokenizer, run.device)
    if fingerprint(tokenizer.state_dict()) != state["tokenizer_weights"]:
        fail(f"{cfg.tokenizer or trained.tokenizer} is not the tokenizer that {name} was trained on")
    if cfg.guide:
        guide, guide_cfg, other = load_diffusion(cfg.guide, run.device)
        same = {fact: other[fact] == state[fact] for fact in ("tokenizer_weights", "classes")}
        same |= {fact: np.allclose(other[fact], state[fact], rtol=1e-2, atol=1e-2) for fact in ("mean", "std")}
        for fact, ok in (same | {"path": guide_cfg.path == trained.path}).items():
            if not ok:
                fail(f"--guide {cfg.guide} cannot guide {name}: it was trained with another {fact.replace('_', ' ')}")
    elif cfg.guidance > 1 and not trained.label_dropout:
        fail(f"{name} was trained without dropped labels and has no null class: give --guidance 1, or --guide")
    for net in (model, guide) if cfg.compile else ():
        net is None or net.compile(fullgraph=True, dynamic=False)        # guided or not, last batch or not: 4 shapes
    mean, std = (torch.tensor(state[name], device=run.device) for name in ("mean", "std"))
    decode, classes = latent_decoder(tokenizer, mean, std), state["classes"]
    labels = choose_labels(cfg.labels, cfg.n, classes, cfg.seed)
    guidance = cfg.guidance if len(classes) > 1 or guide else 1.0    # without classes there is nothing to guide to
    how = Sampling(cfg.sampler, cfg.steps, guidance, cfg.guidance_low, cfg.guidance_high, cfg.seed)
    facts = dataclasses.asdict(how) | {
        "n": cfg.n, "labels": cfg.labels, "path": path, "data": state["data"], "size": state["size"],
        "training_steps": state["step"], "weights": fingerprint(model.state_dict(), ""),
        "guide": fingerprint(guide.state_dict(), "") if guide else "",
        "tokenizer_weights": fingerprint(tokenizer.state_dict(), ""), "precision": run.precision,
        "batch_size": cfg.batch_size}
    def make(i, j):
        return generate(model, decode, range(i, j), torch.from_numpy(labels[i:j]), how, path, run, guide)

    out = run.claim(cfg.out)
    if cfg.bench:
        first, second = (forward_flops(*net.shape, net.x_embedder.out_features, len(net.blocks),
                                       "lightning" if net.rope else "sit") for net in (model, guide or model))
        flops = how.calls() * first + (how.evaluations() - how.calls()) * second + tokenizer_flops(tok)[1]
        return benchmark(cfg, run, make, flops, facts)
    images = sample_all(cfg, run, out / "parts", facts, make)
    if run.main:
        part = out / "samples.part.npz"
        facts["commit"] = commit()
        np.savez(part, arr_0=images, labels=labels, classes=np.array(classes), facts=np.array(json.dumps(facts)))
        part.replace(out / "samples.npz")
        if cfg.png:
            for folder in ("png", "png.part"):           # none of an earlier, larger run may stay
                shutil.rmtree(out / folder, ignore_errors=True)
            (out / "png.part").mkdir()
            for i, image in enumerate(images):
                Image.fromarray(np.asarray(image)).save(out / f"png.part/{i:06d}.png")
            (out / "png.part").rename(out / "png")
        shown = min(cfg.n, 80)
        columns = min(10, len(classes) if len(classes) > 1 else 8)
        save_grid(out / "grid.png", torch.from_numpy(np.array(images[:shown])).permute(0, 3, 1, 2), columns,
                  names=[classes[c] for c in labels[:shown]] if len(classes) > 1 else [])
        (out / "parts/belongs.json").unlink()            # first what makes the parts count
        shutil.rmtree(out / "parts")
        run.print(f"{cfg.n} images of {name} ({cfg.sampler}, {how.calls()} network calls, guidance {guidance:g} on "
                  f"[{cfg.guidance_low:g}, {cfg.guidance_high:g}], {cfg.labels} labels, {run.precision})")
        run.print(f"wrote {out}/samples.npz, grid.png in {time.time() - began:.0f} s")
    run.barrier()


def benchmark(cfg: Config, run: Run, make, flops: float, facts: dict) -> None:
    """--bench: images/s, and the share of what the device can do, of whole batches, the decoding with them."""
    seconds, b = [], cfg.batch_size
    for k in tqdm(range(cfg.bench + 2), unit=" batches", disable=None if run.main else True):
        began = clock(run)
        make(k * b, (k + 1) * b)
        seconds.append(clock(run) - began)
    rate = b * run.world / float(np.median(seconds[2:]))               # two batches warm up
    found = bench_facts(cfg, run, rate, flops) | {"batches": cfg.bench, "gflop_per_image": flops / 1e9, "sampling": facts}
    if run.main:
        write_json(Path(cfg.out) / "bench.json", found)


def sample_all(cfg: Config, run: Run, folder: Path, facts: dict, make) -> np.ndarray:
    """All images as one memory-mapped uint8 n x S x S x 3, written in blocks and continued where it was cut."""
    belongs = folder / "belongs.json"
    if run.main and (cfg.fresh or not belongs.exists() or read_json(belongs) != facts):
        belongs.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)        # nothing yet, or of other settings or weights
        folder.mkdir(parents=True)
        write_json(belongs, facts)
    run.barrier()
    shape = (cfg.n, facts["size"], facts["size"], 3)
    chunks = Chunks(folder / "images.npy", shape, np.uint8, cfg.batch_size, run, "sampling")
    for i, j in chunks:
        chunks.write(i, make(i, j).permute(0, 2, 3, 1).numpy())
    return chunks.array


if __name__ == "__main__":
    launch(main)
