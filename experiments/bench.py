"""How fast is it? A run from its log, reading of data, Inception features, and the cost of the presets.

    python experiments/bench.py log out/tokenizer/log.jsonl out/diffusion/log.jsonl
    python experiments/bench.py data               # packed images against JPEG files, and packing
    python experiments/bench.py fid --weights DIR  # and torch-fidelity, if there (pip install torch-fidelity)
    python experiments/bench.py cost               # parameters and FLOPs of the presets, by arithmetic

Run `log` on the machine that wrote the logs. It gives medians of the last five lines of each stage, without
the first line (warm-up), beside what a large matrix product reaches on one device.
"""
import importlib.util
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from common import made_by, make_parser, read_log, write_json
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import diffusion
import fid
import tokenizer


def rates_in_turn(works: dict, count: int, rounds: int) -> dict[str, float]:
    """Images/s of each function, the median of its rounds; one call of each in turn."""
    rates = {name: [] for name in works}
    for turn in range(rounds):
        for name, work in works.items():
            begin = time.perf_counter()
            work(turn)
            rates[name].append(count / (time.perf_counter() - begin))
    return {f"{name}, images/s": round(statistics.median(values), 1) for name, values in rates.items()}


def log(cfg) -> dict:
    """Images/s, TFLOP/s and data wait of each stage, and the share of the ceiling."""
    dist = data.start(cfg.precision)
    size = cfg.size or (8192 if dist.device.type == "cuda" else 2048)
    dtype = torch.bfloat16 if dist.precision == "bf16" else torch.float32
    a = torch.ones(size, size, device=dist.device, dtype=dtype)
    works = {"matmul": lambda turn: (a @ a)[0, 0].item()}  # waits for the device
    rates_in_turn(works, 1, 3)
    (rate,) = rates_in_turn(works, 2 * size**3, cfg.rounds).values()
    rows = {"precision": dist.precision, "matmul_tflops": rate / 1e12}

    lines = [line for path in cfg.logs for line in read_log(path)]
    for stage in dict.fromkeys(line["stage"] for line in lines):
        of = [line for line in lines if line["stage"] == stage]
        of = of[1:][-5:] or of
        names = ("images_per_s", "tflops", "data_wait")
        row = {name: statistics.median(line[name] for line in of) for name in names}
        share = row["tflops"] / cfg.processes / rows["matmul_tflops"]
        rows[stage] = row | {"share_of_matmul": round(share, 3)}
    return rows


def data_speed(cfg) -> dict:
    """Photograph-like JPEG files of 500 x 375 pixels, and the same packed at 256 px; one thread reads."""
    shutil.rmtree(cfg.out / "data", ignore_errors=True)
    rng, files, packed = np.random.default_rng(0), cfg.out / "data/jpeg", cfg.out / "data/packed"
    files.mkdir(parents=True)
    for i in range(cfg.images):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse) + rng.normal(0, 8, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files / f"{i}.jpg", quality=90)

    def pack(workers):
        return lambda turn: data.pack(files, 256, f"{packed}-{workers}-{turn}", workers)

    rates = rates_in_turn({f"packing, {n} worker(s)": pack(n) for n in (1, 2)}, cfg.images, 3)
    loader = data.Loader(data.ImageSet(f"{packed}-1-0", 256, "train"), cfg.batch, 0, data.Dist())
    some = sorted(files.iterdir())[:cfg.batch]
    reading = {"packed": loader.gather, "JPEG": lambda turn: [data.read_image(path, 256) for path in some]}
    return rates | rates_in_turn(reading, cfg.batch, cfg.rounds)


@torch.no_grad()
def fid_speed(cfg) -> dict:
    """Features of images of 256 x 256 pixels."""
    dist = data.start("fp32")
    bf16 = data.Dist(device=dist.device, precision="bf16")
    images = torch.randint(256, (cfg.batch, 3, 256, 256), dtype=torch.uint8, device=dist.device)
    net = fid.load_inception(cfg.weights, dist)

    def ours(precision):
        with precision.autocast():
            return net(images)[0].sum().item()

    works = {"fp32": lambda turn: ours(dist), "bf16": lambda turn: ours(bf16)}
    if importlib.util.find_spec("torch_fidelity"):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Other

        path = next(Path(cfg.weights or data.cache_dir()).rglob("pt_inception*"))
        other = Other("net", ["2048"], feature_extractor_weights_path=str(path)).to(dist.device)
        works["torch-fidelity"] = lambda turn: other(images)[0].sum().item()
    return rates_in_turn(works, cfg.batch, cfg.rounds)


def cost(cfg) -> dict:
    """Parameters, FLOPs of a forward pass (2 a multiply-add) and of training (3). No frozen networks."""
    rows = {}
    for name in ("imagenet256", "imagenet512", *list(diffusion.PRESETS)[1:]):
        with torch.device("meta"):
            if name.startswith("imagenet"):
                settings = tokenizer.Config(**tokenizer.PRESETS[name])
                model = tokenizer.Tokenizer(settings, {"hog": 108, "dinov2": 1024, "siglip": 1024})
                inputs = [torch.zeros(1, 3, settings.size, settings.size)]
            else:
                settings = diffusion.Config(**diffusion.PRESETS[name])
                model = settings.build_sit((128, 32), 1000)
                inputs = [torch.zeros(1, 128, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)]
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(*inputs)
        gflop, parameters = counter.get_total_flops() / 1e9, sum(p.numel() for p in model.parameters())
        rows[name] = {"parameters_m": parameters / 1e6, "forward_gflop": gflop,
                      "training_eflop": 3 * gflop * settings.steps * settings.batch_size / 1e9}
    return rows


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    works = {"log": log, "data": data_speed, "fid": fid_speed, "cost": cost}
    add("what", choices=works)
    add("logs", nargs="*", help="of log: log.jsonl of tokenizer.py or diffusion.py")
    add("--processes", type=int, default=1, help="of log: processes of the run")
    add("--precision", default="auto", help="of log: precision of the run (auto, fp32, bf16)")
    add("--size", type=int, default=0, help="of log: side of the matrices; 0: 8192 on a GPU, else 2048")
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
