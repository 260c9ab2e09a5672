"""Score samples of one model for each sampler, number of steps and guidance; table and figure.

    python experiments/samplers.py --model out/diffusion/ckpt.pt

A setting that is in the JSON file is not repeated. The figure needs matplotlib.
"""
import itertools  # noqa: I001
from pathlib import Path

from common import figure, made_by, make_parser, read_json, run_script, write_json

def score(cfg, key: dict) -> dict:
    """Make and score the samples of one setting."""
    flags = {"sampler": key["sampler"], "steps": key["steps"], "guidance": key["guidance"],
             "guidance-high": key["high"], "num-samples": cfg.num_samples, "seed": cfg.seed,
             "model": cfg.model, "out": cfg.out / "samples"}
    run_script("sample.py", *(f"--{name}={x}" for name, x in flags.items()))
    run_script("fid.py", "--samples", cfg.out / "samples/samples.npz")
    scores = read_json(cfg.out / "samples/metrics.json")["samples"]
    calls = key["steps"] * 2 - 1 if key["sampler"] == "heun" else key["steps"]
    return key | {"calls": calls} | {k: round(scores[k], 4) for k in ("fd_classifier", "class_accuracy")}

def draw(rows: list[dict], path: Path) -> None:
    """A panel per sampler, a curve per guidance."""
    panels = {}
    for row in rows:
        label = f"guidance {row['guidance']} on [0, {row['high']:g}]"
        curve = panels.setdefault(row["sampler"], {}).setdefault(label, ([], []))
        curve[0].append(row["calls"])
        curve[1].append(row["fd_classifier"])
    figure(path, panels, "network calls", "fd_classifier", scale="log")

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="out/diffusion/ckpt.pt", help="checkpoint of diffusion.py")
    add("--samplers", nargs="+", default=["euler", "heun", "sde"])
    add("--steps", type=int, nargs="+", default=[5, 10, 25, 50, 100, 250])
    add("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    add("--high", type=float, nargs="+", default=[1.0, 0.75], help="guidance acts for t up to this")
    add("--num-samples", type=int, default=1000)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("out/samplers"), help="folder of samplers.json, .png")
    cfg = parser.parse_args()

    path, fresh = cfg.out / "samplers.json", made_by("samplers.py") | {"seed": cfg.seed, "rows": []}
    result = read_json(path) if path.exists() else fresh
    for sampler, guidance, high, steps in itertools.product(cfg.samplers, cfg.guidance, cfg.high, cfg.steps):
        key = {"sampler": sampler, "steps": steps, "guidance": guidance, "low": 0.0, "high": high}
        known = any(key.items() <= row.items() for row in result["rows"])
        if not known and (guidance > 1 or high == 1):  # without guidance the interval changes nothing
            result["rows"].append(score(cfg, key))
            print(result["rows"][-1], flush=True)
            write_json(path, result)
    draw(result["rows"], cfg.out / "samplers.png")

if __name__ == "__main__":
    main()
