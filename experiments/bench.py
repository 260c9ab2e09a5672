"""How fast is it? A run from its log, reading of data, Inception, and the cost of the presets.

    python experiments/bench.py log out/tokenizer/log.jsonl out/diffusion/log.jsonl
    python experiments/bench.py data               # packed images against JPEG files, and packing
    python experiments/bench.py fid --weights DIR  # and torch-fidelity (pip install torch-fidelity)
    python experiments/bench.py cost               # of the presets, by arithmetic

Run `log` on the machine that wrote the logs. It gives medians of the last five lines of each
stage beside what a large matrix product reaches on one device.
"""
import importlib.util  # noqa: I001
import shutil
import statistics
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import DEVICE, in_turn, made_by, make_parser, matmul_tflops, read_log, seconds, write_json
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import diffusion
import fid
import tokenizer

def rates(works: dict, images: int, *rounds: int) -> dict[str, float]:
    found = in_turn(works, *rounds)
    return {f"{name}, images/s": round(images / s, 1) for name, s in found.items()}

def rates_of(lines: list[dict], ceiling: float) -> dict[str, dict]:
    """Medians of each stage of a log, and its share of the ceiling."""
    rows = {}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        of = [line for line in lines if line["stage"] == stage]
        of = of[1:][-5:] or of  # the first is the warm-up
        names = "images_per_s", "tflops", "data_wait"
        row = {name: statistics.median(line[name] for line in of) for name in names}
        rows[stage] = row | {"share_of_matmul": round(row["tflops"] / ceiling, 3)}
    return rows

def log(cfg) -> dict:
    dist = data.start(cfg.precision)
    dtype = torch.bfloat16 if dist.precision == "bf16" else torch.float32
    ceiling = matmul_tflops(cfg.size, dtype, cfg.rounds)
    lines = [line for path in cfg.logs for line in read_log(path)]
    about = {"precision": dist.precision, "matmul_tflops": ceiling}
    return about | rates_of(lines, ceiling * cfg.processes)

def data_speed(cfg) -> dict:
    """JPEG files like photographs, 500 x 375, and the same packed at 256 px; one thread reads."""
    shutil.rmtree(cfg.out / "data", ignore_errors=True)
    rng, files, packed = np.random.default_rng(0), cfg.out / "data/jpeg", cfg.out / "data/packed"
    files.mkdir(parents=True)
    for i in range(cfg.images):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        noisy = coarse.resize((500, 375)) + rng.normal(0, 8, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files / f"{i}.jpg", quality=90)

    turn = count()
    works = {f"packing, {n} worker(s)": lambda n=n: data.pack(files, 256, f"{packed}{next(turn)}", n)
             for n in (1, 2)}
    rows = rates(works, cfg.images, 3, 0)
    loader = data.Loader(data.ImageSet(f"{packed}0", 256, "train"), cfg.batch, 0, data.Dist())
    some, step = sorted(files.iterdir())[:cfg.batch], count()
    works = {"packed": lambda: loader.gather(next(step)),
             "JPEG": lambda: [data.read_image(path, 256) for path in some]}
    return rows | rates(works, cfg.batch, cfg.rounds)

def pictures(n: int, size: int) -> torch.Tensor:
    """uint8 n x 3 x S x S on the device."""
    coarse = torch.rand(n, 3, 8, 8, device=DEVICE)
    x = 200 * F.interpolate(coarse, size, mode="bicubic")
    return (x + 55 * torch.rand_like(x)).clamp(0, 255).to(torch.uint8)

def fid_speed(cfg) -> dict:
    """Inception on images of 256 px, and what a setting changes in a distance."""
    x, n, rows = pictures(2 * cfg.batch, 256), cfg.batch, {}
    sets = fid.LazyImages(n, lambda i: x[i]), fid.LazyImages(n, lambda i: x[n + i] // 2)
    net = fid.load_inception(cfg.weights, data.Dist(device=DEVICE))
    backend = torch.backends.cudnn
    for name in ("fp32", "fp32, benchmark", "tf32, benchmark", "bf16")[::1 if x.is_cuda else 3]:
        backend.allow_tf32, backend.benchmark = "tf32" in name, name != "fp32"
        dist = data.Dist(device=DEVICE, precision=name[:4])
        work = partial(fid.inception_statistics, net, dist=dist)
        moments = []
        for found in map(work, sets):
            moments += found["mu"][:n], found["sigma"][:n, :n]  # full rank takes n features
        rate = n / seconds(partial(work, sets[0]), cfg.rounds, 0)
        rows[name] = {"images_per_s": rate, "fid": fid.frechet_distance(*moments)}
    if importlib.util.find_spec("torch_fidelity"):
        from torch_fidelity import feature_extractor_inceptionv3 as other

        path = next(Path(cfg.weights or data.cache_dir()).rglob("pt_inception*"))
        theirs = other.FeatureExtractorInceptionV3(
            "net", ["2048"], feature_extractor_weights_path=str(path)).to(DEVICE)
        rate = n / seconds(lambda: theirs(x[:n]), cfg.rounds)
        rows["torch-fidelity"] = {"images_per_s": rate}
    return rows

def cost_of(cfg, shape: tuple = (128, 32)) -> dict:
    """A forward pass has 2 FLOPs a multiply-add, training 3 passes. No frozen networks."""
    with torch.device("meta"):
        if isinstance(cfg, tokenizer.Config):
            model = tokenizer.Tokenizer(cfg, {"hog": 108, "dinov2": 1024, "siglip": 1024})
            inputs = [torch.zeros(1, 3, cfg.size, cfg.size)]
        else:
            model = cfg.build_sit(shape, 1000)
            inputs = [torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1).long()]
    sizes = []  # of what leaves a layer
    for layer in model.modules():
        if isinstance(layer, (tokenizer.Block, diffusion.SiTBlock)):
            layer.register_forward_hook(lambda *of: sizes.append(of[2].numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    gflop, parameters = counter.get_total_flops() / 1e9, sum(p.numel() for p in model.parameters())
    return {
        "parameters_m": parameters / 1e6, "forward_gflop": gflop,
        "training_eflop": 3 * gflop * cfg.steps * cfg.batch_size / 1e9,
        "state_gb": 20 * parameters / 1e9,  # weight, gradient, two moments, average
        "activations_gb_64_images": 64 * 34 * sum(sizes) / 1e9}  # 34 bytes by Korthikanti 2022

def cost(cfg) -> dict:
    names = [(tokenizer, "imagenet256"), (tokenizer, "imagenet512")]
    names += [(diffusion, name) for name in list(diffusion.PRESETS)[1:]]
    return {name: cost_of(of.Config(**of.PRESETS[name])) for of, name in names}

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    works = {"log": log, "data": data_speed, "fid": fid_speed, "cost": cost}
    add("what", choices=works)
    add("logs", nargs="*", help="of log: log.jsonl of tokenizer.py or diffusion.py")
    add("--processes", type=int, default=1, help="of log: processes of the run")
    add("--precision", default="auto", help="of log: precision of the run (auto, fp32, bf16)")
    add("--size", type=int, default=0, help="of log: side of the matrices; 0: by device")
    add("--images", type=int, default=4000, help="of data: number of JPEG files")
    add("--weights", default="", help="of fid: folder of the Inception weights; empty: the cache")
    add("--batch", type=int, default=64, help="of data and fid: images of a round")
    add("--rounds", type=int, default=9, help="rounds to take the median of")
    add("--out", type=Path, default=Path("out/bench"), help="folder for WHAT.json")
    cfg = parser.parse_args()
    rows = works[cfg.what](cfg)
    print(*rows.items(), sep="\n")
    write_json(cfg.out / f"{cfg.what}.json", made_by(f"bench.py {cfg.what}") | {"rows": rows})

if __name__ == "__main__":
    main()
