"""Score samples of one model for each sampler, number of steps and guidance; a table and a figure.

    python experiments/samplers.py --model out/diffusion/ckpt.pt

A setting that is in the JSON file is not repeated. The figure needs matplotlib: pip install matplotlib
"""
import itertools
import shutil
from pathlib import Path

from common import made_by, make_parser, pyplot, read_json, run_script, write_json


def score(cfg, sampler: str, steps: int, guidance: float, high: float) -> dict:
    """Make and score the samples of one setting."""
    args = ["--model", cfg.model, "--num-samples", cfg.num_samples, "--seed", cfg.seed, "--sampler", sampler]
    args += ["--steps", steps, "--guidance", guidance, "--guidance-high", high, "--out", cfg.out / "samples"]
    run_script("sample.py", *args)
    run_script("fid.py", "--samples", cfg.out / "samples/samples.npz")
    scores = read_json(cfg.out / "samples/metrics.json")["samples"]
    shutil.rmtree(cfg.out / "samples")
    calls = 2 * steps - 1 if sampler == "heun" else steps
    return {"calls": calls, **{name: round(scores[name], 4) for name in ("fd_classifier", "class_accuracy")}}


def draw(rows: list[dict], path: Path) -> None:
    """fd_classifier against network calls: a panel per sampler, a curve per guidance."""
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    figure, panels = pyplot().subplots(1, len(names), figsize=(4 * len(names), 4), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names):
        for guidance, high in dict.fromkeys((row["guidance"], row["high"]) for row in rows):
            key = {"sampler": name, "guidance": guidance, "high": high}.items()
            points = [(row["calls"], row["fd_classifier"]) for row in rows if key <= row.items()]
            panel.plot(*zip(*points), "o-", label=f"guidance {guidance} on [0, {high:g}]")
        panel.set(title=name, xscale="log", xlabel="network calls", ylabel="fd_classifier")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=Path("out/diffusion/ckpt.pt"), help="checkpoint of diffusion.py")
    add("--samplers", nargs="+", default=["euler", "heun", "sde"])
    add("--steps", type=int, nargs="+", default=[5, 10, 25, 50, 100, 250])
    add("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    add("--high", type=float, nargs="+", default=[1.0, 0.75], help="guidance acts for t up to this")
    add("--num-samples", type=int, default=1000)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("out/samplers"), help="folder for samplers.json and samplers.png")
    cfg = parser.parse_args()

    path = cfg.out / "samplers.json"
    cfg.out.mkdir(parents=True, exist_ok=True)
    result = read_json(path) if path.exists() else made_by("samplers.py") | {"seed": cfg.seed, "rows": []}
    grid = itertools.product(cfg.samplers, cfg.guidance, cfg.high, cfg.steps)
    for sampler, guidance, high, steps in grid:
        key = {"sampler": sampler, "steps": steps, "guidance": guidance, "low": 0.0, "high": high}
        known = any(key.items() <= row.items() for row in result["rows"])
        if not known and (guidance > 1 or high == 1):  # without guidance the interval changes nothing
            result["rows"].append(key | score(cfg, sampler, steps, guidance, high))
            print(result["rows"][-1], flush=True)
            write_json(path, result)
    draw(result["rows"], cfg.out / "samplers.png")


if __name__ == "__main__":
    main()
