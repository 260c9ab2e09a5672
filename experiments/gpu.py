"""What only a GPU shows. Weights are made, images drawn: only this repository is needed.

    python experiments/gpu.py all         # in order of value, under nine minutes
    python experiments/gpu.py sit_train   # one line, under two minutes
    python experiments/gpu.py all --tiny  # the same on a CPU

A line writes OUT/gpu_LINE.json row by row; a whole file of this commit is not made again.
A line that fails or takes too long says so and leaves gpu_LINE.log; the next goes on.
"""
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import bench
import common
import numpy as np
import torch
from common import DEVICE, ROOT, read_json, seconds, write_json
from default_record import chain
from torch._dynamo.utils import counters

import data
import diffusion
import fid
import tokenizer

TINY, CUDA = "--tiny" in sys.argv, DEVICE.type == "cuda"
FAST = data.start("auto")

def pick(full, tiny):
    return tiny if TINY else full

NET = pick({}, {"width": 24, "heads": 2, "depth": 1})
SMALL = pick({}, NET | {"size": 32, "patch": 8, "latents": 4, "channels": 4,
                        "aux_width": 24, "aux_heads": 2})

def config(preset: str, **fields):
    if preset in tokenizer.PRESETS:
        more = {} if preset == "quick" else {"adv_start": 0} | SMALL
        return tokenizer.Config(**tokenizer.PRESETS[preset] | more | fields)
    return diffusion.Config(**diffusion.PRESETS[preset] | NET | fields)

def vit(width: int, depth: int, patch: int, positions: int) -> dict:
    layer = torch.nn.TransformerEncoderLayer(width, 1, 4 * width)
    net = torch.nn.ModuleDict({
        "layers": torch.nn.ModuleList([layer] * depth), "norm": torch.nn.LayerNorm(width),
        "patch_embed": torch.nn.Conv2d(3, width, patch, patch)})
    return net.state_dict() | {"pos_embed": torch.randn(1, positions, width)}

def made(name: str, *_) -> dict:
    """Random weights in the shapes of a public file, in place of fid.pretrained."""
    if name.startswith("siglip"):
        return vit(*pick((1024, 24, 16, 256), (64, 1, 16, 4)))
    if name.startswith("dino"):
        sizes = (1024, 24, 14, 1370) if "dinov2" in name else (384, 12, 16, 197)
        weights = vit(*pick(sizes, (64, sizes[1] % 24 or 1, sizes[2], 5)))
        return weights | {"cls_token": weights["pos_embed"][:, :1]}
    files = {"vgg": "vgg16", "lpi": "lpips_heads_v0.1_vgg", "pt_": "inception_fid"}
    public = read_json(ROOT / "assets/goldens/metrics/state_dict_keys.json")
    weights = {}
    for key, shape in public[files[name[:3]]].items():
        one = float(key.endswith(("weight", "var")))  # of a norm
        w = weights[key] = torch.full(shape, one)
        if w.ndim > 1:
            w.normal_(0, (2 / w[0].numel()) ** 0.5)
    return weights

def loop(cfg):
    """The training loop of these settings, on drawn images or latents."""
    n = pick(512, 8)
    if isinstance(cfg, diffusion.Config):
        rows = torch.randn(n, 2, 128, 32).half().numpy()
        one = torch.ones(32, device=DEVICE)
        latents = diffusion.LatentSet(rows, torch.arange(n), np.arange(n), 0 * one, one)
        meta = {"shape": (128, 32), "classes": range(1000)}
        return partial(diffusion.train, cfg, FAST, latents, meta, lambda model: None)
    images = SimpleNamespace(
        rows=bench.pictures(n, cfg.size).permute(0, 2, 3, 1).cpu().numpy(), index=np.arange(n),
        labels=torch.arange(n), view=partial(data.ImageSet.view, None))
    targets = {name: tokenizer.TARGETS[name](cfg, FAST, images) for name in cfg.target_names()}
    model = tokenizer.Tokenizer(cfg, {name: target.width for name, target in targets.items()})
    lpips = FAST.compiled(fid.load_lpips("", FAST), cfg.compile) if cfg.lpips else None
    adversary = tokenizer.Adversary(cfg, FAST) if cfg.adversary == "dino" else None
    return partial(tokenizer.train, cfg, FAST, 1, model.to(DEVICE), images, None, targets, lpips,
                   adversary, None)

def train(preset: str, batch: int, compiled: bool, ceiling: float, then=lambda: None) -> dict:
    """Speed, graphs, waits for the device, and the peak of memory beside its formula."""
    folder, every, seen, write = tempfile.TemporaryDirectory(), pick(4, 1), [], data.Log.write
    cfg = config(preset, batch_size=batch, compile=compiled, out=folder.name,
                 steps=pick(16, 3), log_every=every, save_every=10**9)
    work = loop(cfg)

    def line(log, step, more=None):  # val_psnr is not measured
        waits = sum("synchroniz" in str(warning.message) for warning in caught)
        seen.append((counters["stats"]["unique_graphs"], waits / every))
        write(log, step)  # waits
        caught.clear()
        then()

    counters.clear()
    torch._dynamo.reset()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("warn")
    with (warnings.catch_warnings(record=True) as caught, patch.object(data.Dist, "save"),
          patch.object(data.Log, "write", line)):
        warnings.simplefilter("always")
        work()
    (row,) = bench.rates_of(common.read_log(f"{folder.name}/log.jsonl"), ceiling).values()
    cost, micro = bench.cost_of(cfg), min(cfg.micro_batch or batch, batch)
    formula = cost["state_gb"] + micro / 64 * cost["activations_gb_64_images"]
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
    graphs, waits = zip(*seen)
    return row | {"ms_a_step": 1e3 * batch / row["images_per_s"], "waits_a_step": waits[-1],
                  "graphs": graphs[-1], "graphs_later": graphs[-1] - graphs[0],
                  "micro_batch": micro, "peak_gb": peak, "formula_gb": formula}

# ---- The lines. Each yields (row, numbers)

def tests(ceiling):
    """Output and gradient against fp32 on the CPU, relative; then the tests."""
    cfg = config("imagenet256", depth=pick(2, 1))
    x = bench.pictures(pick(2, 1), cfg.size)
    sit = diffusion.SiT(8, 4, 10, *pick((1152, 2, 16), (24, 1, 2)))
    nets = {"tokenizer": (tokenizer.Tokenizer(cfg), data.to_float(x)),
            "sit": (sit, torch.randn(2, 8, 4), torch.rand(2), torch.arange(2)),
            "inception": (fid.Inception(made("pt_")), x)}
    for name, (net, *inputs) in nets.items():
        for p in net.parameters():
            p.data += 0.02 * torch.randn_like(p)  # none is zero
        known = None
        for how in ("reference", "fp32", "bf16", "compiled")[:3 if name == "inception" else 4]:
            device = torch.device("cpu") if how == "reference" else DEVICE
            call = torch.compile(net) if how == "compiled" else net
            net.to(device).zero_grad()
            with torch.autocast(device.type, torch.bfloat16, how == "bf16"):
                out = call(*(x.to(device) for x in inputs))
            out = out["recon"] if name == "tokenizer" else out[0]  # of SiT the first image
            out.square().mean().backward()
            gradient = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
            found = [x.detach().cpu().double() for x in (out, torch.cat(gradient))]
            known = known or found
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, known)]
            yield f"{name}, {how}", dict(zip(("output", "gradient"), errors))
    words = pick(["-q", "-k", "agree", ROOT / "test_all.py"], ["--version"])
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    yield "test_all.py", {"said": (done.stdout + done.stderr).splitlines()[-1]}

def trainings(full: tuple, tiny: tuple, ceiling):
    for preset, batch, compiled in pick(full, tiny):
        row = f"{preset}, batch {batch}, {'compiled' if compiled else 'eager'}"
        yield row, train(preset, batch, compiled, ceiling)

def profile(ceiling):
    """Time on the device by part and by operation; for the rest of a step it idles."""
    kind, steps = ("device" if CUDA else "cpu"), pick(4, 1)
    parts = "autograd::engine", "Optimizer.step"
    for preset, batch in pick({"imagenet256": 64, "sit-xl": 128}, {"sit-b": 4, "quick": 64}).items():
        plan = torch.profiler.schedule(wait=1, warmup=1, active=1)
        with torch.profiler.profile(schedule=plan) as trace:
            row, ms = train(preset, batch, False, ceiling, trace.step), {}
        for event in trace.key_averages():
            total, own = (getattr(event, f"{of}{kind}_time_total") for of in ("", "self_"))
            here = event.device_type.name == ("CUDA" if CUDA else "CPU")
            spent = dict.fromkeys((part for part in parts if part in event.key), total)
            if here and not event.is_user_annotation:
                spent |= {"busy": own, event.key: own}
            for name, us in spent.items():
                ms[name] = ms.get(name, 0) + us / 1e3 / steps
        top = sorted(ms, key=ms.get, reverse=True)[:12]
        yield preset, {"ms_a_step": row["ms_a_step"]} | {name: ms[name] for name in top}

def sampling(ceiling):
    """SiT-XL and decoder at 512 px, 250 guided steps (from fewer), 128 and 1,024 tokens."""
    n, few, many = pick((64, 2, 6), (2, 2, 40))
    for tokens in pick((128, 1024), (4, 16)):
        latents = tokens % pick(1024, 16)  # 0: the patches are the tokens
        tok, cfg = config("imagenet512", latents=latents), config("sit-xl")
        sit, net = cfg.build_sit((tokens, tok.channels), 1000), tokenizer.Tokenizer(tok)
        sit.to(DEVICE).eval().compile(fullgraph=True, dynamic=False)
        net.to(DEVICE).eval()

        def make(steps, sit=sit, net=net):
            how = diffusion.SamplerConfig("sde", steps, 1.5)
            z = diffusion.generate(sit, range(n), torch.arange(n), how, FAST)
            tokenizer.decode_images(net, z, FAST)

        short, long = (seconds(partial(make, steps), pick(3, 1), 1) for steps in (few, many))
        step = (long - short) / (many - few)
        gflop = 2 * n * bench.cost_of(cfg, sit.shape)["forward_gflop"]  # guidance takes two
        tflops, rate = gflop / 1e3 / step, n / (long + (250 - many) * step)
        yield f"{tokens} tokens", {"images_per_s": rate, "ms_a_step": 1e3 * step,
                                   "tflops": tflops, "share_of_matmul": tflops / ceiling}

def fid_speed(ceiling):
    n, rounds = pick((4096, 3), (1, 1))
    yield from bench.fid_speed(SimpleNamespace(weights="", batch=n, rounds=rounds)).items()

def quick(ceiling):
    """The four commands of the README."""
    net = ["--width", 24, "--heads", 2, "--depth", 1, "--steps", 4]
    images = ["--data", ROOT / "assets", "--size", 16, "--patch", 4, "--stage2-steps", 2]
    small = {"tokenizer.py": net + images, "diffusion.py": net, "sample.py": ["--num-samples", 20]}
    with tempfile.TemporaryDirectory() as folder:
        cores, more = os.sched_getaffinity(0), pick({}, small)
        yield "README", chain(ROOT, Path(folder, "run"), 0, cores, more)

IN256, IN512, SIT, LIGHTNING = "imagenet256", "imagenet512", "sit-xl", "lightning-xl"
LINES = {  # in order of value
    "tests": tests,
    "tokenizer_train": partial(trainings, (
        (IN256, 64, False), (IN256, 128, True)), ((IN256, 4, True),)),
    "sit_train": partial(trainings, (
        (SIT, 256, True), (SIT, 128, False)), ((SIT, 4, True),)),
    "sampling": sampling, "fid_speed": fid_speed,
    "memory": partial(trainings, (  # micro-batches of the presets
        (LIGHTNING, 128, False), (IN512, 16, False), (SIT, 256, False)), ((LIGHTNING, 4, False),)),
    "profile": profile, "quick": quick}

def show(name: str, row: str, numbers: dict):
    text = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
    print(f"{name:16s} {row:32s}", *text, sep="  ", flush=True)

def measure(name: str, path: Path):
    signal.alarm(pick(120, 600))  # ends this process
    fid.pretrained, rows = made, {}
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if TINY:  # a CPU may have no compiler
        torch.compile = partial(torch.compile, backend="eager")
        torch.nn.Module.compile = lambda net, **how: None
    ceiling = common.matmul_tflops(pick(8192, 64))
    about = {"precision": FAST.precision, "seed": 0, "matmul_tflops": ceiling, "rows": rows}
    about |= common.made_by(f"gpu.py {name}")
    for row, numbers in LINES[name](ceiling):
        rows[row] = numbers
        show(name, row, numbers)
        write_json(path, about)
    write_json(path, about | {"whole": True})

def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("line", choices=["all", *LINES])
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="for gpu_LINE.json")
    cfg = parser.parse_args()
    cfg.out.mkdir(parents=True, exist_ok=True)
    end, most, now = time.time() + pick(530, 3000), pick(115, 500), common.commit()
    paths = {name: cfg.out / f"gpu_{name}.json" for name in LINES if cfg.line in ("all", name)}
    for name, path in paths.items():
        known, log = read_json(path) if path.exists() else {}, path.with_suffix(".log")
        if not known.get("whole") or known["commit"] != now or "dirty" in now:
            path.unlink(missing_ok=True)
            if cfg.line == name:
                measure(name, path)
                continue
            words = ["--out", cfg.out, *["--tiny"] * TINY]
            limit = max(5, min(most, end - time.time()))
            try:
                common.run_script("experiments/gpu.py", name, *words, log=log, limit=limit)
                log.unlink()
            except RuntimeError as error:
                print(f"{name:16s} FAILED: {error}", flush=True)
        for row, numbers in (read_json(path)["rows"] if path.exists() else {}).items():
            show(name, row, numbers)

if __name__ == "__main__":
    main()
