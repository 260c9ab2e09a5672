"""The paper's ablations at a small size: tokenizers, the same generator on each, several seeds.

    python experiments/finding.py --out out/finding --jobs 2
    python experiments/finding.py --out out/finding --kinds hog_depth_1 hog_depth_6 --seeds 0
    python experiments/finding.py --table out/finding      # table of the runs that are there
    python experiments/finding.py --table results/finding  # the same from the JSON files

Which number of a tokenizer tells how well a generator will do on it? predictors.md answers, from
four kinds on.

A run is a folder KIND-SEED. A command whose result is there is skipped, so the same command goes on
after a stop. If a command fails, its log file is named and the other runs go on. At the end OUT/table
holds table.md, predictors.md, a JSON file per run, samples.png, and figures by matplotlib.
"""
import functools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import figure, make_parser, read_json, read_log, run_script, write_json
from scipy.stats import rankdata

from data import save_grid

# Flags of each kind of tokenizer, after those of all
KINDS = {kind: f"--preset {kind}" for kind in ("ae", "vae", "mae_pixel", "mae_hog", "mae_teacher")}
KINDS |= {
    "vae_strong": "--preset vae --kl 1e-4",
    "hog_mask_0": "--mask-min 0 --mask-max 0", "hog_mask_0_60": "--mask-min 0 --mask-max 0.6",
    "hog_mask_20_60": "--mask-min 0.2 --mask-max 0.6", "hog_mask_60_80": "--mask-min 0.6 --mask-max 0.8",
    "hog_depth_0": "--aux-depth 0", "hog_depth_1": "--aux-depth 1", "hog_depth_6": "--aux-depth 6",
    "hog_stage1": "--stage2-steps 0"}  # its steps are those of both stages
# Sweeps: x, kind, gFID of the paper or 0 (256 px ImageNet, SiT-L; depth: with all targets)
SWEEPS = {
    "mask ratio, %": [("0", "hog_mask_0", 0), ("0-60", "hog_mask_0_60", 24.15), ("20-60", "hog_mask_20_60", 20.35),
                      ("40-60", "mae_hog", 17.18), ("60-80", "hog_mask_60_80", 0)],
    "auxiliary layers": [("0", "hog_depth_0", 6.98), ("1", "hog_depth_1", 6.43), ("3", "mae_hog", 5.78),
                         ("6", "hog_depth_6", 7.12)]}

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
    "latents: NLL per dimension, 100 diagonal": ("diagonal_mixture_nll_per_dimension.100", 3, 1),
    "latents: iFD, of interpolations": ("ifd_classifier", 2, 1),
    "latents: variance of the velocity, t = 0.3": ("velocity_variance.0.3", 4, 1),
    "latents: variance of the velocity, t = 0.5": ("velocity_variance.0.5", 4, 1),
    "latents: variance of the velocity, t = 0.7": ("velocity_variance.0.7", 4, 1),
}
SCORES = {"gFD": "samples.fd_classifier", "gFD, guided": "samples_guided.fd_classifier",
          "distance": "samples.fd_to_reconstructions"}
PREDICTORS = [name for name in MEASURES if name.startswith(("latents", "recon", "diffusion"))]
SHOWN = ("stage2.fd_classifier", "linear_probe", "ifd_classifier")  # in predictors.png
PARTS = ("tokenizer/metrics.json", "analysis/analysis.json", "diffusion/metrics.json",
         "stage1/metrics.json", "guided/metrics.json")

def commands(at: Path, kind: str, seed: int, cfg):
    """The commands of one run, in order: (result file, script, arguments)."""
    tokenizer, model = at / "tokenizer/ckpt.pt", at / "diffusion/ckpt.pt"
    steps = cfg.steps + cfg.stage2_steps * (kind == "hog_stage1")
    args = ["--steps", steps, "--stage2-steps", cfg.stage2_steps, *KINDS[kind].split()]
    yield PARTS[0], "tokenizer.py", [*args, "--seed", seed, "--out", at / "tokenizer"]

    args = ["latents", tokenizer, "--dims", cfg.dims]
    yield PARTS[1], "fid.py", [*args, "--out", at / "analysis"]

    args = ["--tokenizer", tokenizer, "--steps", cfg.diffusion_steps, "--guidance", 1]
    yield PARTS[2], "diffusion.py", [*args, "--seed", seed, "--out", at / "diffusion"]

    stage1 = ["--model", model, "--tokenizer", at / "tokenizer/stage1.pt", "--guidance", 1]
    for name, args in {"stage1": stage1, "guided": ["--model", model]}.items():
        yield f"{name}/samples.npz", "sample.py", [*args, "--seed", seed, "--out", at / name]
        yield f"{name}/metrics.json", "fid.py", ["--samples", at / name / "samples.npz"]

def run(kind: str, seed: int, cfg) -> None:
    at = cfg.table / f"{kind}-{seed}"
    at.mkdir(parents=True, exist_ok=True)
    for result, script, args in commands(at, kind, seed, cfg):
        if not (at / result).exists():
            print(f"{at.name}: {script} -> {result}", flush=True)
            run_script(script, *args, *cfg.args.get(script, []), log=at / "log.txt", OMP_NUM_THREADS="1")

def run_all(cfg) -> None:
    path = cfg.table / "settings.json"
    settings = some(vars(cfg), "steps", "stage2_steps", "diffusion_steps", "dims", "args")
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
    samples = diffusion["rows"]["samples"]
    setup = some(tokenizer, "precision") | some(latents, "data", "latents") | {
        "steps": tokenizer["steps"] + tokenizer["stage2_steps"], "diffusion_steps": diffusion["steps"],
        "dimensions": analysis["dimensions"], "images": samples["images"],
        "sampling": {k: v for k, v in diffusion["sampling"].items() if k != "seed"},
        "guided": guided["sampling"]["guidance"]}
    latents = some(latents, "dimensions_for_90_percent", "mixture_nll_per_dimension", "ifd_classifier",
                   "diagonal_mixture_nll_per_dimension", "velocity_variance")
    return some(tokenizer, "stage1", "stage2", "linear_probe") | latents | {
        "kind": kind, "seed": int(seed), "setup": setup, "samples": samples,
        "samples_guided": guided["samples"], "samples_stage1": stage1["samples"],
        "commit": [part["commit"] for part in (tokenizer, diffusion, guided)],
        "real_validation_images": diffusion["rows"]["real validation images"],
        "diffusion_loss": read_log(folder / "diffusion/log.jsonl")[-1]["loss"]}

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
        names = [k for k in first["setup"] | row["setup"] if first["setup"].get(k) != row["setup"].get(k)]
        if names:
            both = f"{row['kind']}-{row['seed']} and {first['kind']}-{first['seed']}"
            sys.exit(f"finding.py: {both} were made with other {', '.join(names)}")
    return rows

def values_of(rows: list[dict], key: str) -> np.ndarray:
    """What each run holds at a path like "samples.fd_classifier"; nan if it lacks it."""
    found = [functools.reduce(lambda at, name: at.get(name, {}), key.split(".", 1), row) for row in rows]
    return np.array([np.nan if value == {} else value for value in found], float)

def rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's, of each row of two arrays B x K; nan where all are equal."""
    x, y = (rankdata(a, axis=1) - (a.shape[1] + 1) / 2 for a in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))

def predictors(kinds: dict[str, list]) -> dict[str, dict[str, tuple]]:
    """{predictor: {score: (rank correlation over the kinds, its bootstrap interval)}}."""
    drawn = np.random.default_rng(0).integers(0, len(kinds), (2000, len(kinds)))
    drawn[0], found = np.arange(len(kinds)), {}
    for title in PREDICTORS if len(kinds) > 3 else ():
        x, *scores = (np.array([values_of(of, key).mean() for of in kinds.values()])[drawn]
                      for key in (MEASURES[title][0], *SCORES.values()))
        if np.ptp(x[0]) > 0:  # not nan
            found[title] = {}
            for name, again in zip(SCORES, (rank_correlation(x, y) for y in scores)):
                low, high = np.nanpercentile(again, (2.5, 97.5))
                found[title][name] = f"{again[0]:+.2f}", f"{low:+.2f} to {high:+.2f}"
    return found

def to_markdown(lines: list) -> str:
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines]
    return "\n".join([lines[0], "|---" * (lines[0].count("|") - 1) + "|", *lines[1:]]) + "\n"

def markdown(kinds: dict[str, list]) -> str:
    """A row per measure: mean over the seeds ± standard deviation (n - 1)."""
    lines = []
    for title, (key, digits, factor) in MEASURES.items():
        cells = [title]
        for rows in kinds.values():
            values = factor * values_of(rows, key)
            if np.isnan(values).any():
                break
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        else:
            lines.append(cells)
    return to_markdown([["", *kinds], *lines, ["seeds", *(str(len(rows)) for rows in kinds.values())]])

def table(folder: Path, out: Path) -> None:
    """Write table.md, predictors.md, a JSON file per run, and the figures."""
    rows = read_runs(folder)
    names = sorted({row["kind"] for row in rows}, key=lambda kind: (kind.startswith("mae"), kind))
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in names}
    for row in rows:
        write_json(out / f"{row['kind']}-{row['seed']}.json", row)
    groups = [{kind: of for kind, of in kinds.items() if kind.startswith("hog") == sweep} for sweep in (False, True)]
    text = "\n".join(markdown(group) for group in groups if group)
    (out / "table.md").write_text(text)
    print(text)

    found, panels = predictors(kinds), {}
    for name, title in product(("gFD", "distance"), found):
        key, _, factor = MEASURES[title]
        if key in SHOWN:
            panels[f"{title}: {found[title][name][0]} with {name}"] = {
                kind: (factor * values_of(of, key).mean(), values_of(of, SCORES[name]).mean())
                for kind, of in kinds.items()}
    if found:
        lines = [["predictor", *(word for name in SCORES for word in (f"with {name}", "95 %"))]]
        text = to_markdown(lines + [[title, *sum(cells.values(), ())] for title, cells in found.items()])
        (out / "predictors.md").write_text(text)
        print(text)
        figure(out / "predictors.png", panels, "", "gFD (above), distance (below)", "o")
    print(f"wrote {out}/table.md of {len(rows)} runs, of commits", *{str(row.get("commit")) for row in rows})

    paths = {kind: folder / f"{kind}-{of[0]['seed']}/guided/samples.npz" for kind, of in kinds.items()}
    samples = {kind: np.load(path)["arr_0"][:10] for kind, path in paths.items() if path.exists()}
    if samples:
        images = torch.from_numpy(np.concatenate([*samples.values()])).permute(0, 3, 1, 2)
        labels = [kind for kind, some in samples.items() for _ in some]
        save_grid(out / "samples.png", images, len(images) // len(samples), names=labels)

    def means(name):  # of row[name], a dict of x to y, over the seeds
        return {kind: ([*map(int, of[0][name])], np.mean([[*row[name].values()] for row in of], 0))
                for kind, of in kinds.items()}

    panels = {"full covariances": means("mixture_nll_per_dimension")}
    if all("velocity_variance" in row for row in rows):  # runs of today's code
        panels["diagonal covariances, as released"] = means("diagonal_mixture_nll_per_dimension")
    figure(out / "mixtures.png", panels, "Gaussians in the mixture", "held-out NLL per dimension", scale="log")

    panels, gfd = {}, {kind: values_of(of, SCORES["gFD"]).mean() for kind, of in kinds.items()}
    for title, points in SWEEPS.items():
        paper = {kind: gfid for _, kind, gfid in points if gfid}
        points = [(x, kind) for x, kind, _ in points if kind in kinds]
        panels[title] = {
            "here: gFD": ([x for x, _ in points], [gfd[kind] / gfd["mae_hog"] for _, kind in points]),
            "the paper: gFID": ([x for x, kind in points if kind in paper],
                                [paper[kind] / paper["mae_hog"] for _, kind in points if kind in paper])}
    if {"hog_mask_20_60", "hog_depth_1", "mae_hog"} <= kinds.keys():
        figure(out / "sweeps.png", panels, "", "gFD or gFID, the default is 1")

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the runs, or with --table of the table")
    add("--kinds", nargs="+", default=list(KINDS)[:5], choices=KINDS, help="lines of KINDS")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=2250, help="steps of stage 1")
    add("--stage2-steps", type=int, default=1100, help="steps of stage 2")
    add("--diffusion-steps", type=int, default=400, help="steps of the generator")
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
