"""What only a GPU shows. Weights are made, images drawn: only this repository is needed.

    python experiments/gpu.py all         # in order of value, under nine minutes
    python experiments/gpu.py sit_train   # one line, under two minutes
    python experiments/gpu.py all --tiny  # the same on a CPU

A line writes OUT/gpu_LINE.json row by row; a whole file of this commit is not made again.
A line that fails or takes too long says so, and the next goes on.
"""
import os
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
import default_record
import numpy as np
import torch
import torch.nn.functional as F
from common import DEVICE, ROOT, read_json, seconds
from torch._dynamo.utils import counters

import data
import diffusion
import fid
import tokenizer

TINY, CUDA = "--tiny" in sys.argv, DEVICE.type == "cuda"
BF16, FP32 = (data.Dist(device=DEVICE, precision=name) for name in ("bf16", "fp32"))

def pick(full, tiny):
    return tiny if TINY else full

NET = pick({}, {"width": 24, "heads": 2, "depth": 1})
SMALL = pick({}, NET | {"size": 32, "patch": 8, "latents": 4, "channels": 4,
                        "aux_width": 24, "aux_heads": 2})

def config(preset: str, **fields):
    if preset.startswith("imagenet"):
        fields = {"adv_start": 0} | SMALL | fields
        return tokenizer.Config(**tokenizer.PRESETS[preset] | fields)
    return diffusion.Config(**diffusion.PRESETS[preset] | NET | fields)

def pictures(n: int, size: int) -> torch.Tensor:
    coarse = torch.rand(n, 3, 8, 8, device=DEVICE)
    x = 200 * F.interpolate(coarse, size, mode="bicubic")
    return (x + 55 * torch.rand_like(x)).clamp(0, 255).to(torch.uint8)

def vit(width: int, depth: int, patch: int, positions: int) -> dict:
    layer = torch.nn.TransformerEncoderLayer(width, 1, 4 * width)
    parts = {f"layers.{i}": layer for i in range(depth)}
    parts["patch_embed"] = torch.nn.Conv2d(3, width, patch, patch)
    parts["norm"] = torch.nn.LayerNorm(width)
    weights = {f"{part}.{name}": w for part, net in parts.items()
               for name, w in net.state_dict().items()}
    return weights | {"pos_embed": torch.randn(1, positions, width)}

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
        return partial(diffusion.train, cfg, BF16, latents, meta, lambda model: None)
    images = SimpleNamespace(
        rows=pictures(n, cfg.size).permute(0, 2, 3, 1).cpu().numpy(), index=np.arange(n),
        labels=torch.arange(n), view=partial(data.ImageSet.view, None))
    targets = {name: tokenizer.TARGETS[name](cfg, BF16, images) for name in cfg.target_names()}
    model = tokenizer.Tokenizer(cfg, {name: target.width for name, target in targets.items()})
    lpips = tokenizer.compiled(fid.load_lpips("", BF16), cfg)
    adversary = tokenizer.Adversary(cfg, BF16)
    return partial(tokenizer.train, cfg, BF16, 1, model.to(DEVICE), images, targets, lpips,
                   adversary, None)

def train(preset: str, batch: int, compiled: bool, ceiling: float, tracer=None) -> dict:
    """Speed, graphs, waits for the device, and the peak of memory beside its formula."""
    folder, every, seen, write = tempfile.TemporaryDirectory(), pick(4, 1), [], data.Log.write
    cfg = config(preset, batch_size=batch, compile=compiled, out=folder.name,
                 steps=pick(16, 3), log_every=every, save_every=10**9)
    work = loop(cfg)

    def line(log, step):
        waits = sum("synchroniz" in str(warning.message) for warning in caught)
        seen.append((counters["stats"]["unique_graphs"], waits / every))
        write(log, step)  # waits
        caught.clear()
        if tracer:
            tracer.step()

    counters.clear()
    torch._dynamo.reset()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("warn")
    with (warnings.catch_warnings(record=True) as caught, patch.object(data.Dist, "save"),
          patch.object(data.Log, "write", line)):
        warnings.simplefilter("always")
        work()
    log = common.read_log(f"{folder.name}/log.jsonl")
    (row,) = bench.rates_of(log, ceiling).values()
    cost, micro = bench.cost_of(cfg), min(cfg.micro_batch or batch, batch)
    formula = cost["state_gb"] + micro / 64 * cost["activations_gb_64_images"]
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
    return row | {"graphs": seen[-1][0], "graphs_later": seen[-1][0] - seen[0][0],
                  "waits_a_step": seen[-1][1], "micro_batch": micro, "peak_gb": peak,
                  "formula_gb": formula, "ms_a_step": 1e3 * batch / row["images_per_s"]}

# ---- The lines. Each yields (row, numbers)

def tests(ceiling):
    """Output and gradient against fp32 on the CPU, relative; then the tests."""
    cfg = config("imagenet256", depth=pick(2, 1))
    x = pictures(2, cfg.size)
    sit = diffusion.SiT(8, 4, 10, *pick((1152, 2, 16), (24, 1, 2)))
    nets = {"tokenizer": (tokenizer.Tokenizer(cfg), data.to_float(x)),
            "sit": (sit, torch.randn(2, 8, 4), torch.rand(2), torch.arange(2)),
            "inception": (fid.Inception(made("pt_")), x)}
    for name, (net, *inputs) in nets.items():
        for p in net.parameters():
            p.data += 0.02 * torch.randn_like(p)  # none is zero
        first = None
        for how in ("reference", "fp32", "bf16", "compiled")[:3 if name == "inception" else 4]:
            device = torch.device("cpu") if how == "reference" else DEVICE
            net.to(device).zero_grad()
            call = torch.compile(net) if how == "compiled" else net
            with torch.autocast(device.type, torch.bfloat16, how == "bf16"):
                out = call(*(x.to(device) for x in inputs))
            out = out["recon"] if name == "tokenizer" else out[0] if name == "inception" else out
            out.square().mean().backward()
            grads = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
            found = [x.detach().cpu().double() for x in (out, torch.cat(grads))]
            first = first or found
            output, gradient = ((a - b).norm() / b.norm() for a, b in zip(found, first))
            yield f"{name}, {how}", {"output": output.item(), "gradient": gradient.item()}
    words = pick(["-q", "-k", "agree", ROOT / "test_all.py"], ["--version"])
    done = subprocess.run([sys.executable, "-m", "pytest", *words], capture_output=True, check=False)
    yield "test_all.py", {"said": (done.stdout + done.stderr).decode().splitlines()[-1]}

def trainings(full: tuple, tiny: tuple, ceiling):
    for preset, batch, compiled in pick(full, tiny):
        row = f"{preset}, batch {batch}, {'compiled' if compiled else 'eager'}"
        yield row, train(preset, batch, compiled, ceiling)

def profile(ceiling):
    """Time on the device by part and by operation; for the rest of a step it idles."""
    kind = "device" if CUDA else "cpu"
    for preset, batch in pick({"imagenet256": 64, "sit-xl": 128}, {"sit-b": 4}).items():
        plan = torch.profiler.schedule(wait=1, warmup=1, active=1)
        with torch.profiler.profile(schedule=plan) as trace:
            row, ms = train(preset, batch, False, ceiling, trace), {}
        for e in trace.key_averages():
            part = next((part for part in ("autograd::engine", "Optimizer.step") if part in e.key), "")
            if part:
                ms[part] = ms.get(part, 0) + getattr(e, f"{kind}_time_total") / 1e3
            if e.device_type.name == ("CUDA" if CUDA else "CPU") and not e.is_user_annotation:
                own = getattr(e, f"self_{kind}_time_total") / 1e3
                ms |= {e.key: own, "busy": ms.get("busy", 0) + own}
        ms = {key: round(ms[key] / pick(4, 1), 2) for key in sorted(ms, key=ms.get, reverse=True)[:12]}
        yield preset, {"ms_a_step": row["ms_a_step"], "ms": ms}

def sampling(ceiling):
    """SiT-XL and decoder at 512 px, 250 guided steps (from fewer), 128 and 1,024 tokens."""
    n, few, many = pick((64, 2, 6), (2, 2, 4))
    for tokens in pick((128, 1024), (4, 16)):
        # 0 latents: the patches are the tokens
        tok, cfg = config("imagenet512", latents=tokens % pick(1024, 16)), config("sit-xl")
        sit, net = cfg.build_sit((tokens, tok.channels), 1000), tokenizer.Tokenizer(tok)
        sit.to(DEVICE).eval().compile(fullgraph=True, dynamic=False)
        net.to(DEVICE).eval()

        def make(steps, sit=sit, net=net):
            how = diffusion.SamplerConfig("sde", steps, 1.5)
            z = diffusion.generate(sit, range(n), torch.arange(n), how, BF16)
            tokenizer.decode_images(net, z, BF16)

        short, long = (seconds(partial(make, steps), pick(3, 1), 1) for steps in (few, many))
        step = (long - short) / (many - few)
        gflop = 2 * n * bench.cost_of(cfg, sit.shape)["forward_gflop"]  # guidance takes two
        tflops, rate = gflop / 1e3 / step, n / (long + (250 - many) * step)
        yield f"{tokens} tokens", {"images_per_s": rate, "ms_a_step": 1e3 * step,
                                   "tflops": tflops, "share_of_matmul": tflops / ceiling}

def fid_speed(ceiling):
    """Inception on images on the device, and what a setting changes in a distance."""
    net, k, backend = fid.load_inception("", FP32), pick(2048, 64), torch.backends.cudnn
    x = pictures(*pick((8192, 256), (8, 32)))
    n = len(x) // 2
    sets = fid.LazyImages(n, lambda i: x[i]), fid.LazyImages(n, lambda i: x[n + i] // 2)
    for name in pick(("fp32", "fp32, benchmark", "tf32, benchmark", "bf16, benchmark"), ("fp32", "bf16")):
        backend.allow_tf32, backend.benchmark = "tf32" in name, "benchmark" in name
        work = partial(fid.inception_statistics, net, dist=BF16 if "bf16" in name else FP32)
        moments = [s[key][:k].T[:k] for s in map(work, sets) for key in ("mu", "sigma")]
        rate = n / seconds(partial(work, sets[0]), pick(3, 1), 0)
        yield name, {"images_per_s": rate, "fid": fid.frechet_distance(*moments)}

def quick(ceiling):
    """The four commands of the README."""
    net = ["--width", 24, "--heads", 2, "--depth", 1, "--steps", 4]
    images = ["--data", ROOT / "assets", "--size", 16, "--patch", 4, "--stage2-steps", 2]
    small = {"tokenizer.py": net + images, "diffusion.py": net, "sample.py": ["--num-samples", 20]}
    with tempfile.TemporaryDirectory() as folder:
        cores = os.sched_getaffinity(0)
        default_record.chain(ROOT, Path(folder), 0, cores, pick({}, small))
        yield "README", default_record.metrics_of(Path(folder))

IN256, IN512, SIT, LIGHTNING = "imagenet256", "imagenet512", "sit-xl", "lightning-xl"
LINES = {  # in order of value
    "tests": tests,
    "tokenizer_train": partial(trainings, ((IN256, 64, False), (IN256, 128, True)),
                               ((IN256, 4, False), (IN256, 4, True))),
    "sit_train": partial(trainings, ((SIT, 256, True), (SIT, 128, False)), ((SIT, 4, True),)),
    "sampling": sampling, "fid_speed": fid_speed,
    "memory": partial(trainings, (  # micro-batches of the presets
        (LIGHTNING, 128, False), (IN512, 16, False), (SIT, 256, False)), ((LIGHTNING, 4, False),)),
    "profile": profile, "quick": quick}

def measure(name: str, path: Path):
    """One line, in this process."""
    fid.pretrained, rows = made, {}
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if TINY:  # a CPU may have no compiler
        torch.compile = partial(torch.compile, backend="eager")
        torch.nn.Module.compile = lambda net, **how: None
    ceiling = common.matmul_tflops(pick(8192, 512))
    about = {"precision": "bf16", "seed": 0, "matmul_tflops": ceiling, "rows": rows}
    about = common.made_by(f"gpu.py {name}") | about
    for row, numbers in LINES[name](ceiling):
        rows[row] = numbers
        common.write_json(path, about)
    common.write_json(path, about | {"whole": True})

def main():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("line", choices=["all", *LINES])
    add("--tiny", action="store_true", help="small sizes, for a CPU")
    add("--out", type=Path, default=ROOT / "results", help="folder of gpu_LINE.json")
    add("--here", action="store_true", help="in this process, without a limit of time")
    cfg = parser.parse_args()
    if cfg.here:
        return measure(cfg.line, cfg.out / f"gpu_{cfg.line}.json")
    end, now = time.time() + 530, common.commit()
    for name in LINES if cfg.line == "all" else [cfg.line]:
        path, failed = cfg.out / f"gpu_{name}.json", ""
        known = read_json(path) if path.exists() else {}
        if not known.get("whole") or known["commit"] != now or "dirty" in now:
            path.unlink(missing_ok=True)
            words = [name, "--here", "--out", cfg.out, *["--tiny"] * TINY]
            with tempfile.NamedTemporaryFile() as log:
                try:
                    limit = max(5, min(115, end - time.time()))
                    common.run_script(__file__, *words, log=log.name, limit=limit)
                except RuntimeError:
                    lines = Path(log.name).read_text().splitlines()
                    failed = lines[-1] if lines else f"killed after {limit:.0f} s"
        rows = read_json(path)["rows"] if path.exists() else {}
        for row, numbers in rows.items():
            text = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
            print(f"{name:16s} {row:32s}", *text, sep="  ")
        if failed:
            print(f"{name:16s} FAILED: {failed}", flush=True)

if __name__ == "__main__":
    main()
