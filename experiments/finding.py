"""The paper's ablation at a small size: several tokenizers, the same generator on each, several seeds.

    python experiments/finding.py --out out/finding --jobs 2
    python experiments/finding.py --table out/finding      # table of the runs that are there
    python experiments/finding.py --table results/finding  # the same from the JSON files

A run is a folder KIND-SEED. A command whose result is there is skipped, so the same command goes on
after a stop. If a command fails, its log file is named and the other runs go on. At the end OUT/table
holds table.md, a JSON file per run, samples.png, and figures by matplotlib.
"""
import functools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from common import figure, make_parser, read_json, read_log, run_script, write_json

from data import save_grid

# Rows of the table: path in the JSON file of a run, digits, factor
MEASURES = {
    "reconstruction: PSNR, stage 1": ("stage1.psnr", 2, 1),
    "reconstruction: PSNR, stage 2": ("stage2.psnr", 2, 1),
    "reconstruction: rFD, stage 1": ("stage1.fd_classifier", 2, 1),
    "reconstruction: rFD, stage 2": ("stage2.fd_classifier", 2, 1),
    "samples: gFD": ("samples.fd_classifier", 2, 1),
    "samples: distance to reconstructions": ("samples.fd_to_reconstructions", 2, 1),
    "samples: gFD, decoder of stage 1": ("samples_stage1.fd_classifier", 2, 1),
    "samples: gFD, guided": ("samples_guided.fd_classifier", 2, 1),
    "samples: recognised, %": ("samples.class_accuracy", 1, 100),
    "samples: recognised, guided, %": ("samples_guided.class_accuracy", 1, 100),
    "diffusion loss at the end": ("diffusion_loss", 3, 1),
    "latents: linear probe, %": ("linear_probe", 1, 100),
    "latents: k-NN, %": ("knn_accuracy", 1, 100),  # early runs only
    "latents: directions for 90 % of the variance": ("dimensions_for_90_percent", 0, 1),
    "latents: NLL per dimension, 8 Gaussians": ("mixture_nll_per_dimension.8", 3, 1),
    "latents: NLL per dimension, 32 Gaussians": ("mixture_nll_per_dimension.32", 3, 1),
}
PARTS = ("tokenizer/metrics.json", "analysis/analysis.json", "diffusion/metrics.json",
         "stage1/metrics.json", "guided/metrics.json")

def commands(at: Path, kind: str, seed: int, cfg):
    """The commands of one run, in order: (result file, script, arguments)."""
    tokenizer, model = at / "tokenizer/ckpt.pt", at / "diffusion/ckpt.pt"
    args = ["--preset", kind, "--steps", cfg.steps, "--stage2-steps", cfg.stage2_steps]
    yield PARTS[0], "tokenizer.py", [*args, "--seed", seed, "--out", at / "tokenizer"]

    args = ["latents", tokenizer, "--dims", cfg.dims]
    yield PARTS[1], "fid.py", [*args, "--out", at / "analysis"]

    args = ["--tokenizer", tokenizer, "--steps", cfg.diffusion_steps, "--guidance", 1]
    args += ["--keep-every", cfg.keep_every]
    yield PARTS[2], "diffusion.py", [*args, "--seed", seed, "--out", at / "diffusion"]

    stage1 = ["--model", model, "--tokenizer", at / "tokenizer/stage1.pt", "--guidance", 1]
    samples = {"stage1": stage1, "guided": ["--model", model]}
    for step in (cfg.keep_every, 2 * cfg.keep_every):
        early = model.with_name(f"step-{step}.pt")
        samples[f"step-{step}"] = ["--model", early, "--guidance", 1]
    for name, args in samples.items():
        file = f"{name}/samples.npz"
        yield file, "sample.py", [*args, "--seed", seed, "--out", at / name]
        yield f"{name}/metrics.json", "fid.py", ["--samples", at / file]

def run(kind: str, seed: int, cfg) -> None:
    at = cfg.table / f"{kind}-{seed}"
    at.mkdir(parents=True, exist_ok=True)
    for result, script, args in commands(at, kind, seed, cfg):
        if not (at / result).exists():
            print(f"{at.name}: {script} -> {result}", flush=True)
            more = cfg.args.get(script, [])
            run_script(script, *args, *more, log=at / "log.txt", OMP_NUM_THREADS="1")

def run_all(cfg) -> None:
    names = ("steps", "stage2_steps", "diffusion_steps", "keep_every", "dims", "args")
    settings, path = {name: getattr(cfg, name) for name in names}, cfg.table / "settings.json"
    if path.exists() and read_json(path) != settings:
        sys.exit(f"finding.py: {cfg.table} was made with {read_json(path)}; give another --out")
    write_json(path, settings)

    pool = ThreadPoolExecutor(cfg.jobs)
    jobs = [pool.submit(run, kind, seed, cfg) for seed in cfg.seeds for kind in cfg.kinds]
    try:
        errors = [str(job.exception()) for job in jobs if job.exception()]
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        errors = ["stopped; the same command continues"]
    if errors:
        sys.exit("finding.py: " + "\n".join(errors))

def some(content: dict, *names: str) -> dict:
    return {name: content[name] for name in names}

def collect(folder: Path) -> dict:
    """The results of one run. Runs that are compared must have the same `setup`."""
    kind, _, seed = folder.name.rpartition("-")
    tokenizer, analysis, diffusion, stage1, guided = (read_json(folder / part) for part in PARTS)
    (latents,) = analysis["rows"].values()
    samples, steps = diffusion["rows"]["samples"], diffusion["steps"]
    by_step = {steps: samples["fd_classifier"]}
    for path in folder.glob("step-*/metrics.json"):
        by_step[int(path.parent.name[5:])] = read_json(path)["samples"]["fd_classifier"]

    setup = some(tokenizer, "steps", "stage2_steps", "precision") | some(latents, "data", "latents")
    setup |= {
        "diffusion_steps": steps, "dimensions": analysis["dimensions"], "images": samples["images"],
        "sampling": {k: v for k, v in diffusion["sampling"].items() if k != "seed"},
        "guided": guided["sampling"]["guidance"], "scored_at_steps": sorted(by_step)}
    latents = some(latents, "dimensions_for_90_percent", "mixture_nll_per_dimension")
    return some(tokenizer, "stage1", "stage2", "linear_probe") | latents | {
        "kind": kind, "seed": int(seed), "setup": setup, "samples": samples,
        "samples_guided": guided["samples"], "samples_stage1": stage1["samples"],
        "commit": [part["commit"] for part in (tokenizer, diffusion, guided)],
        "real_validation_images": diffusion["rows"]["real validation images"],
        "diffusion_loss": read_log(folder / "diffusion/log.jsonl")[-1]["loss"],
        "fd_classifier_by_step": {str(step): by_step[step] for step in sorted(by_step)}}

def read_runs(folder: Path) -> list[dict]:
    """The rows of a folder of runs, or of a folder with their JSON files."""
    rows = []
    for path in sorted(folder.glob("*-[0-9]*")):
        try:
            rows.append(collect(path) if path.is_dir() else read_json(path))
        except FileNotFoundError as error:
            print(f"{path} is left out: it has no {Path(error.filename).relative_to(path)}")
        except (KeyError, ValueError, IndexError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            sys.exit(f"finding.py: {path} is not a whole run ({what}); remove it")
    if not rows:
        sys.exit(f"finding.py: {folder} holds no finished run KIND-SEED, nor KIND-SEED.json")

    first = rows[0]
    for row in rows:
        if row["setup"] != first["setup"]:
            both = f"{row['kind']}-{row['seed']} and {first['kind']}-{first['seed']}"
            settings = f"{row['setup']}, {first['setup']}"
            sys.exit(f"finding.py: {both} were made with other settings: {settings}")
    return rows

def markdown(kinds: dict[str, list]) -> str:
    """A row per measure: mean over the seeds ± standard deviation (n - 1)."""
    lines = []
    for title, (key, digits, factor) in MEASURES.items():
        cells = [title]
        for rows in kinds.values():
            found = [functools.reduce(lambda at, name: at.get(name, {}), key.split("."), row) for row in rows]
            if {} in found:
                break
            values = factor * np.array(found, float)
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        else:
            lines.append(cells)
    lines.append(["seeds", *(str(len(rows)) for rows in kinds.values())])
    head = ["| | " + " | ".join(kinds) + " |", "|---" * (1 + len(kinds)) + "|"]
    return "\n".join(head + [f"| {' | '.join(cells)} |" for cells in lines]) + "\n"

def table(folder: Path, out: Path) -> None:
    """Write table.md, a JSON file per run, and the figures."""
    rows = read_runs(folder)
    names = sorted({row["kind"] for row in rows}, key=lambda kind: (kind.startswith("mae"), kind))
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in names}
    for row in rows:
        write_json(out / f"{row['kind']}-{row['seed']}.json", row)
    (out / "table.md").write_text(markdown(kinds))
    print(f"{markdown(kinds)}wrote {out}/table.md of {len(rows)} runs")

    paths = {kind: folder / f"{kind}-{of[0]['seed']}/guided/samples.npz" for kind, of in kinds.items()}
    samples = {kind: np.load(path)["arr_0"][:10] for kind, path in paths.items() if path.exists()}
    if samples:
        images = torch.from_numpy(np.concatenate([*samples.values()])).permute(0, 3, 1, 2)
        labels = [kind for kind, some in samples.items() for _ in some]
        save_grid(out / "samples.png", images, len(images) // len(samples), names=labels)

    def means(name):  # of row[name], a dict of x to y, over the seeds
        return {kind: ([*map(int, of[0][name])], np.mean([[*row[name].values()] for row in of], 0))
                for kind, of in kinds.items()}

    points = {kind: ([100 * row["linear_probe"] for row in of],
                     [row["samples"]["fd_classifier"] for row in of]) for kind, of in kinds.items()}
    nll, steps = means("mixture_nll_per_dimension"), means("fd_classifier_by_step")
    gfd, mean = "gFD without guidance", "mean of the seeds"
    figure(out / "probe.png", {"": points}, "linear probe of the latents, %", gfd, "o")
    figure(out / "mixtures.png", {"": nll}, "Gaussians in the mixture",
           f"held-out NLL per dimension, {mean}", scale="log")
    figure(out / "training.png", {"": steps}, "training steps of the generator", f"{gfd}, {mean}")

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the runs, or with --table of the table")
    kinds = ["mae_hog", "ae", "mae_teacher", "vae", "mae_pixel"]
    add("--kinds", nargs="+", default=kinds, help="presets")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=1300, help="steps of stage 1")
    add("--stage2-steps", type=int, default=800, help="steps of stage 2")
    add("--diffusion-steps", type=int, default=400, help="steps of the generator")
    add("--keep-every", type=int, default=100, help="score it also after one and two times these")
    add("--jobs", type=int, default=2, help="runs at a time, with one thread each")
    add("--dims", type=int, default=64, help="dimensions in which mixtures are fitted")
    add("--args", type=json.loads, default={}, help='more flags: {"sample.py": ["--steps", 5]}')
    add("--table", type=Path, metavar="DIR", help="run nothing; make table and figures of DIR")
    cfg = parser.parse_args()
    if not cfg.table:
        cfg.table, cfg.out = (cfg.out or Path("out/finding")).resolve(), None
        run_all(cfg)
    has_runs = any(path.is_dir() for path in cfg.table.glob("*-[0-9]*"))
    table(cfg.table, cfg.out or (cfg.table / "table" if has_runs else cfg.table))

if __name__ == "__main__":
    main()
