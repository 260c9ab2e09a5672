"""What only a GPU shows. Weights are made, images drawn: only this repository is needed.

    python experiments/gpu.py all         # in order of value, under nine minutes
    python experiments/gpu.py sit_train   # one line, under two minutes
    python experiments/gpu.py all --tiny  # the same on a CPU

A line writes OUT/gpu_LINE.json row by row; a whole file of this commit is not made again. A line that
fails or takes too long says so, and the next goes on. Clocks are synchronised; rates are medians.
"""
import os
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from common import ROOT, made_by, make_parser, read_json, run_script, write_json
from PIL import Image
from torch._dynamo.utils import counters

import data
import diffusion
import fid
import tokenizer

TINY, CUDA = "--tiny" in sys.argv, torch.cuda.is_available()
CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if CUDA else "cpu")
BF16, FP32 = (data.Dist(device=DEVICE, precision=name) for name in ("bf16", "fp32"))
PUBLIC = read_json(ROOT / "assets/goldens/metrics/state_dict_keys.json")

def pick(full, tiny):
    return tiny if TINY else full

NET = pick({}, {"width": 24, "heads": 2, "depth": 1})
TOKENIZER = pick({}, NET | {"size": 32, "patch": 8, "latents": 4, "channels": 4, "aux_width": 24, "aux_heads": 2})

def clock() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()

def seconds(work, rounds: int = 5, warmup: int = 2) -> float:
    clocks = [(work(), clock())[1] for _ in range(warmup + rounds + 1)]
    return float(np.median(np.diff(clocks)[warmup:]))

def pictures(n: int, size: int) -> torch.Tensor:
    smooth = F.interpolate(torch.rand(n, 3, 8, 8, device=DEVICE), size, mode="bicubic")
    return (200 * smooth + 55 * torch.rand_like(smooth)).clamp(0, 255).to(torch.uint8)

def vit(width: int, depth: int, patch: int, tokens: int) -> dict:
    """Shapes of a ViT, after those of DINO ViT-S/16."""
    shapes, sides = {}, {16: patch, 197: tokens}
    for key, shape in PUBLIC["dino_deitsmall16"].items():
        sizes = [sides.get(n, n if n % 384 else n // 384 * width) for n in shape]
        for i in range(depth) if ".0." in key else [0] * ("blocks" not in key):
            shapes[key.replace(".0.", f".{i}.")] = sizes
    return shapes

def made(name: str, *_) -> dict:
    """Random weights in the shapes of a public file, in place of fid.pretrained."""
    sizes = pick({"dino_": (384, 12, 16, 197), "dinov2": (1024, 24, 14, 1370), "siglip": (1024, 24, 16, 257)},
                 {"dino_": (64, 12, 16, 5), "dinov2": (64, 1, 14, 5), "siglip": (64, 1, 16, 5)})
    files = {"vgg": "vgg16", "lpips": "lpips_heads_v0.1_vgg", "pt_": "inception_fid"}
    shapes = {start: vit(*size) for start, size in sizes.items()} | {k: PUBLIC[v] for k, v in files.items()}
    weights = {}
    for key, shape in next(shapes[start] for start in shapes if name.startswith(start)).items():
        w = torch.full(shape, float(key.endswith(("weight", "var"))), device=DEVICE)  # if a norm's
        weights[key] = w.normal_(0, (2 / np.prod(shape[1:])) ** 0.5) if len(shape) > 1 else w
    if name.startswith("siglip"):
        weights["pos_embed"] = weights["pos_embed"][:, weights.pop("cls_token").shape[1]:]
    return weights

def train(preset: str, batch: int, compiled: bool, ceiling: float, tracer=None) -> dict:
    """The training loop of a preset as it is: rate, memory, graphs, and waits for the device."""
    rare = dict.fromkeys(("save_every", "log_every"), 10**9)
    fields = rare | {"batch_size": batch, "compile": compiled, "steps": pick(16, 3), "out": "none"}
    n, every, marks, add = pick(512, 8), pick(4, 1), [], data.Log.add
    if "imagenet" in preset:
        cfg = tokenizer.Config(**tokenizer.PRESETS[preset] | {"adv_start": 0} | TOKENIZER | fields)
        images = SimpleNamespace(rows=pictures(n, cfg.size).permute(0, 2, 3, 1).cpu().numpy(), index=np.arange(n),
                                 labels=torch.arange(n) % 10, view=partial(data.ImageSet.view, None))
        targets = {name: tokenizer.TARGETS[name](cfg, BF16, images) for name in cfg.target_names()}
        model = tokenizer.Tokenizer(cfg, {name: target.width for name, target in targets.items()}).to(DEVICE)
        losses = targets, BF16.compiled(fid.load_lpips("", BF16), cfg.compile), tokenizer.Adversary(cfg, BF16)
        work = partial(tokenizer.train, cfg, BF16, 1, model, images, *losses, None)
    else:
        cfg = diffusion.Config(**diffusion.PRESETS[preset] | NET | fields)
        rows = torch.randn(n, 2, *pick((128, 32), (4, 4))).half().numpy()
        one = torch.ones(rows.shape[-1], device=DEVICE)
        latents = diffusion.LatentSet(rows, torch.arange(n) % 1000, np.arange(n), 0 * one, one)
        meta = {"shape": rows.shape[2:], "classes": range(1000)}
        work = partial(diffusion.train, cfg, BF16, latents, meta, lambda model: None)

    def mark(log, *args, **terms):
        add(log, *args, **terms)
        if len(log.scales) % every == 0:
            marks.append((clock(), counters["stats"]["unique_graphs"], len(waits), log.flops))
            if tracer:
                tracer.step()

    torch._dynamo.reset()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits, patch.object(data.Log, "add", mark), \
            patch.object(data.Log, "write"), patch.object(data.Dist, "save"):
        warnings.simplefilter("always")
        work()
    clocks, graphs, waited, flops = zip(*marks)
    step = np.median(np.diff(clocks)) / every
    synced = sum("synchroniz" in str(w.message) for w in waits[waited[0]:waited[-1]])
    tflops, steps = flops[0] * batch / step / 1e12, every * (len(marks) - 1)
    return {"ms": 1e3 * step, "images_per_s": batch / step, "tflops_of_model": tflops, "share": tflops / ceiling,
            "graphs": graphs[-1], "graphs_later": graphs[-1] - graphs[0], "waits_per_step": synced / steps,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0}

# ---- The lines. Each yields (row, numbers)

def tests(ceiling):
    """Output and gradient of networks against fp32 on the CPU, relative; then tests."""
    cfg = tokenizer.Config(**tokenizer.PRESETS["imagenet256"] | {"depth": 2} | TOKENIZER)
    x, sit = pictures(2, cfg.size), diffusion.SiT(8, 4, 10, *pick((1152, 2, 16), (24, 1, 2)))
    nets = {"tokenizer": (tokenizer.Tokenizer(cfg), data.to_float(x)), "inception": (fid.Inception(made("pt_")), x),
            "sit": (sit, torch.randn(2, 8, 4), torch.rand(2), torch.arange(2))}
    for name, (net, *inputs) in nets.items():
        for p in net.parameters():
            p.data += 0.02 * torch.randn_like(p)  # none is zero
        found = {}
        for how in ("reference", "fp32", "bf16", "compiled")[:3 if name == "inception" else 4]:
            device = CPU if how == "reference" else DEVICE
            net.to(device).zero_grad()
            call = torch.compile(net) if how == "compiled" else net
            with torch.autocast(device.type, torch.bfloat16, how == "bf16"):
                out = call(*(x.to(device) for x in inputs))
            out = out["recon"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
            out.square().mean().backward()
            grads = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
            found[how] = [x.detach().cpu().double() for x in (out, torch.cat(grads))]
            output, gradient = ((a - b).norm() / b.norm() for a, b in zip(found[how], found["reference"]))
            yield f"{name}, {how}", {"output": output.item(), "gradient": gradient.item()}
    command = [sys.executable, "-m", "pytest", *pick(("-q", "-k", "agree", ROOT / "test_all.py"), ("--version",))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    yield "test_all.py", {"said": (done.stdout + done.stderr).splitlines()[-1]}

def trainings(cases, ceiling):
    for preset, batch, compiled in cases:
        yield f"{preset}, batch {batch}, compiled {compiled}", train(preset, batch, compiled, ceiling)

def memory(ceiling):
    """Of the table in the README, without torch.compile."""
    for preset in pick(("imagenet256", "imagenet512", "sit-b", "sit-l", "sit-xl", "lightning-xl"), ("sit-b",)):
        few, many = (train(preset, n, False, ceiling)["peak_gib"] for n in pick((16, 32), (2, 4)))
        yield preset, {"gib_64_images": 4 * (many - few), "gib_without": 2 * few - many}

def profile(ceiling):
    """Time on the device by part and operation, waits for it, and how long it idles."""
    for preset, batch in pick({"imagenet256": 64, "sit-xl": 128}, {"imagenet256": 4, "sit-b": 4}).items():
        with torch.profiler.profile(schedule=torch.profiler.schedule(wait=1, warmup=1, active=1)) as trace:
            row = train(preset, batch, False, ceiling, trace)
        kind, events = ("device" if CUDA else "cpu"), trace.key_averages()
        wait = "cudaStreamSynchronize" if CUDA else "aten::_local_scalar_dense"
        spent = {e.key: getattr(e, f"self_{kind}_time_total") / 1e3 for e in events
                 if e.device_type.name == ("CUDA" if CUDA else "CPU") and not getattr(e, "is_user_annotation", False)}
        part = {f"{name}_ms": sum(getattr(e, f"{kind}_time_total") for e in events if e.key.startswith(key)) / 1e3
                for name, key in {"backward": "autograd::engine", "optimizer": "Optimizer.step"}.items()}
        top = {key: round(spent[key], 2) for key in sorted(spent, key=spent.get)[:-9:-1]}
        yield preset, {"steps": pick(4, 1), "ms_a_step": row["ms"], "busy_ms": sum(spent.values())} | part | {
            "waits": sum(e.count for e in events if e.key == wait), "ms_by_operation": top}

def sampling(ceiling):
    """SiT-XL and decoder at 512 px, always guided, 250 steps (from fewer): 128 and 1,024 tokens."""
    for tokens in pick((128, 1024), (4, 16)):
        fields = TOKENIZER | {"latents": tokens % pick(1024, 16)}  # 0: image tokens
        tok = tokenizer.Config(**tokenizer.PRESETS["imagenet512"] | fields)
        sit = diffusion.SiT(tokens, tok.channels, 1000, *pick((1152, 28, 16), (24, 1, 2)))
        log, n = SimpleNamespace(), pick(64, 2)
        data.Log.count_flops(log, sit, torch.zeros(1, *sit.shape), torch.zeros(1), torch.zeros(1).long())
        sit.to(DEVICE).eval().compile(fullgraph=True, dynamic=False)
        net = tokenizer.Tokenizer(tok).to(DEVICE).eval()
        how = [diffusion.SamplerConfig("sde", steps, 1.5) for steps in pick((2, 6), (2, 4))]

        def make(cfg, sit=sit, net=net, n=n):
            z = diffusion.generate(sit, range(n), torch.arange(n), cfg, BF16)
            return tokenizer.decode_images(net, z, BF16).cpu()

        short, long = (seconds(partial(make, cfg=cfg), 1, 1) for cfg in how)
        step = (long - short) / (how[1].steps - how[0].steps)
        tflops = 2 / 3 * log.flops * n / step / 1e12  # two thirds: a forward pass is one, guidance takes two
        yield f"{tokens} tokens", {"images_per_s": n / (long + (250 - how[1].steps) * step), "ms_a_step": 1e3 * step,
                                   "tflops": tflops, "share": tflops / ceiling}

def fid_speed(ceiling):
    """Inception on uint8 images on the device, and what each setting changes in a distance."""
    net, x, k = fid.load_inception("", FP32), pictures(pick(8192, 8), pick(256, 32)), pick(2048, 64)
    sets = [fid.LazyImages(len(x) // 2, make) for make in (lambda i: x[i], lambda i: x[len(x) // 2 + i] // 2)]
    for name in ("fp32", "bf16, benchmark", "tf32, benchmark", "fp32, benchmark")[:pick(4, 2)]:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = "tf32" in name, "benchmark" in name
        work, moments = partial(fid.inception_statistics, net, dist=BF16 if "bf16" in name else FP32), []
        for s in map(work, sets):
            moments += s["mu"][:k], s["sigma"][:k, :k]
        rate = len(sets[0]) / seconds(lambda work=work: work(sets[0]), *pick((3, 0), (1, 0)))
        yield name, {"images_per_s": rate, "fid": fid.frechet_distance(*moments)}

def quick(ceiling):
    """The four commands of the README."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.mkdir("few")
        for i, x in enumerate(pictures(24, 16).permute(0, 2, 3, 1).cpu().numpy()):
            Image.fromarray(x).save(f"few/{i}.png")
        small = pick({}, {"tokenizer": "--data few --size 16 --patch 4 --latents 4 --steps 4 --stage2-steps 2 "
                                       "--width 24 --heads 2 --depth 1", "sample": "--num-samples 20 --steps 2",
                          "diffusion": "--width 24 --heads 2 --depth 1 --steps 4"})
        for name in ("tokenizer", "diffusion", "sample", "fid"):
            took = run_script(f"{name}.py", *small.get(name, "").split(), log="log")
            yield name, {"seconds": took}
        for name, row in {"tokenizer": "stage2", "samples": "samples"}.items():
            yield f"scores of {name}", read_json(f"out/{name}/metrics.json")[row]

LINES = {  # in order of value
    "tests": tests,
    "tokenizer_train": partial(trainings, pick([("imagenet256", 64, False), ("imagenet256", 128, True)],
                                               [("imagenet256", 4, False), ("imagenet256", 4, True)])),
    "sit_train": partial(trainings, pick([("sit-xl", 256, True), ("sit-xl", 128, False)], [("sit-xl", 4, True)])),
    "sampling": sampling, "fid_speed": fid_speed, "memory": memory, "profile": profile, "quick": quick}

def measure(name: str, path: Path):
    """One line, in a process of its own."""
    fid.pretrained, rows = made, {}
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if TINY:  # a CPU may have no compiler
        torch.compile = partial(torch.compile, backend="eager")
        torch.nn.Module.compile = lambda net, **how: None
    n = pick(8192, 512)
    a = torch.randn(n, n, device=DEVICE).bfloat16()
    ceiling = 2 * n**3 / seconds(lambda: a @ a) / 1e12
    about = made_by(f"gpu.py {name}") | {"precision": "bf16", "seed": 0, "matmul_tflops": ceiling, "rows": rows}
    for row, numbers in LINES[name](ceiling):
        rows[row] = numbers
        write_json(path, about)
    write_json(path, about | {"whole": True})

def main():
    parser = make_parser(__doc__)
    parser.add_argument("line", choices=["all", *LINES])
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of gpu_LINE.json")
    parser.add_argument("--here", action="store_true", help="in this process, without a limit of time")
    cfg = parser.parse_args()
    if cfg.here:
        return measure(cfg.line, cfg.out.absolute() / f"gpu_{cfg.line}.json")
    end, commit = time.time() + 530, made_by("")["commit"]
    for name in LINES if cfg.line == "all" else [cfg.line]:
        path, failed = cfg.out / f"gpu_{name}.json", ""
        known = read_json(path) if path.exists() else {}
        if not known.get("whole") or known["commit"] != commit or "dirty" in commit:
            path.unlink(missing_ok=True)
            command = [sys.executable, __file__, name, "--here", "--out", cfg.out, *["--tiny"] * TINY]
            with tempfile.TemporaryFile("w+") as said:
                child = subprocess.Popen(command, stderr=said, start_new_session=True)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(max(5, min(115, end - time.time())))
                if child.poll() != 0:
                    with suppress(ProcessLookupError):
                        os.killpg(child.pid, 9)  # its processes, too
                    said.seek(0)
                    failed = (said.read().splitlines() or ["no word"])[-1] if child.poll() else "it took too long"
        for row, numbers in (read_json(path)["rows"] if path.exists() else {}).items():
            text = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
            print(f"{name:16s} {row:40s}", *text, sep="  ")
        print(f"{name:16s} FAILED: {failed}\n" * bool(failed), end="", flush=True)

if __name__ == "__main__":
    main()
