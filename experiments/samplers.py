"""Score samples of one model for each sampler, number of steps and guidance; table and figure.

    python experiments/samplers.py --model out/diffusion/ckpt.pt

A setting that is in the JSON file is not repeated. The figure needs matplotlib.
"""
import itertools
from pathlib import Path

from common import made_by, make_parser, pyplot, read_json, run_script, write_json

def score(cfg, key: dict) -> dict:
    """Make and score the samples of one setting."""
    flags = {"sampler": key["sampler"], "steps": key["steps"], "guidance": key["guidance"],
             "guidance-high": key["high"], "num-samples": cfg.num_samples, "seed": cfg.seed,
             "model": cfg.model, "out": cfg.out / "samples"}
    run_script("sample.py", *(f"--{name}={x}" for name, x in flags.items()))
    run_script("fid.py", "--samples", cfg.out / "samples/samples.npz")
    scores = read_json(cfg.out / "samples/metrics.json")["samples"]
    calls = key["steps"] * 2 - 1 if key["sampler"] == "heun" else key["steps"]
    names = "fd_classifier", "class_accuracy"
    return key | {"calls": calls} | {name: round(scores[name], 4) for name in names}

def draw(rows: list[dict], path: Path) -> None:
    """fd_classifier against network calls: a panel per sampler, a curve per guidance."""
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    size = 4 * len(names), 4
    figure, panels = pyplot().subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names):
        curves = {}
        for row in rows:
            if row["sampler"] == name:
                label = f"guidance {row['guidance']} on [0, {row['high']:g}]"
                curves.setdefault(label, []).append((row["calls"], row["fd_classifier"]))
        for label, points in curves.items():
            panel.plot(*zip(*points), "o-", label=label)
        panel.set(title=name, xscale="log", xlabel="network calls", ylabel="fd_classifier")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)

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
    grid = itertools.product(cfg.samplers, cfg.guidance, cfg.high, cfg.steps)
    for sampler, guidance, high, steps in grid:
        key = {"sampler": sampler, "steps": steps, "guidance": guidance, "low": 0.0, "high": high}
        known = any(key.items() <= row.items() for row in result["rows"])
        if not known and (guidance > 1 or high == 1):  # without guidance the interval changes nothing
            result["rows"].append(score(cfg, key))
            print(result["rows"][-1], flush=True)
            write_json(path, result)
    draw(result["rows"], cfg.out / "samplers.png")

if __name__ == "__main__":
    main()
