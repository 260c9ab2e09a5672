"""All tests: `python -m pytest -q -n 2 test_all.py`. CPU only; the scripts run end to end, tiny.

Reference values are read from ../shared/goldens where that folder is (the full set), else from assets/goldens.
Markers: `bookkeeping` counts lines or quotes code, a fork can leave it out; `campaign` is long, run it by -m campaign.
"""
import argparse
import ast
import copy
import dataclasses
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zlib
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("MAETOK_TEST_GPU", "")  # before torch: the tests are for the CPU,
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and threads of several processes hinder each other
import torch
import torch._dynamo  # each optimizer asks for it: here once, not in each process that runs a script
import torch.distributed.run
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode

import data
import diffusion
import fid
import sample
import tokenizer

HERE = Path(__file__).resolve().parent
GOLDENS = next(p for p in (HERE.parent / "shared/goldens", HERE / "assets/goldens") if p.is_dir())
STAGES = ("data", "fid", "tokenizer", "diffusion", "sample")
ONE, CPU = data.Dist(), torch.device("cpu")  # one process, CPU, fp32

def golden(name: str) -> tuple[dict, dict, dict]:
    """Arrays, weights under their official names, and the case of one golden file."""
    with np.load(GOLDENS / f"{name}.npz") as z:
        arrays = {k: z[k] for k in z.files if z[k].dtype.kind in "fiub"}
        case = json.loads(str(z["case" if "case" in z.files else "meta"]))
    tensors = {k: torch.from_numpy(x) if x.ndim else x.item() for k, x in arrays.items()}
    return tensors, below(tensors, "sd/"), case

def goldens(family: str, pattern: str):
    """One case of a test per golden file."""
    return pytest.mark.parametrize("name", sorted(f"{family}/{p.stem}" for p in (GOLDENS / family).glob(pattern)))

def below(tensors: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): torch.as_tensor(v) for k, v in tensors.items() if k.startswith(prefix)}

def close(ours, theirs, rtol=1e-4):
    """Largest difference relative to the largest value."""
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    error = (torch.as_tensor(ours).double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)
    assert error <= rtol, f"relative error {error:.2e}"

def near(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)

def refused(call, *args, message="") -> str:
    """The one line with which the program ends at this call."""
    with pytest.raises(SystemExit) as error:
        call(*args)
    said = str(error.value.code)
    assert message in said and len(said.splitlines()) == 1 and len(said) < 600, said
    return said

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.prepare.cache_clear()                           # it keeps what a relative name meant before

def content_of(path) -> dict:
    """JSON, the arrays of an npz file, or all tensors of a nested checkpoint by their place."""
    path = Path(path)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".npz":
        with np.load(path) as z:
            return dict(z)
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(torch.load(path))
    return {torch.utils._pytree.keystr(at): x for at, x in leaves if isinstance(x, torch.Tensor)}

# ---- Agreement with the reference implementations

@goldens("maetok", "tokenizer_*")
def test_tokenizer_agrees_with_official(name):
    t, weights, case = golden(name)
    model, _ = tokenizer.from_official(weights, case["enc"]["num_heads"], case["dec"]["num_heads"])
    close(model.encoder(t["image"]), t["encoder_tokens"])
    close(model.encode(t["image"]), t["latents"])
    close(model(t["image"])["recon"], t["reconstruction"])
    close(model.decode(t["free_latents"]), t["free_reconstruction"])
    if "mask" in t:
        mask = t["mask"].bool()
        close(model.encode(t["image"], mask), t["masked_latents"])
        close(model(t["image"], mask)["recon"], t["masked_reconstruction"])

@goldens("maetok", "rope_*")
def test_rope_agrees_with_official(name):
    t, _, case = golden(name)
    for grid in ("grid", "other"):
        columns, rows = t[f"{grid}_xy"].tolist()
        cos, sin = tokenizer.rope_tables(t["freqs"], case["num_heads"], (rows, columns), 0, 0)
        close(cos, t[f"{grid}_cos"])
        close(sin, t[f"{grid}_sin"])
        for layer, part in itertools.product(range(len(cos)), "qk"):
            close(tokenizer.rotate(t[f"{grid}_{part}"], cos[layer], sin[layer]), t[f"{grid}_{part}_rot"][layer])

@goldens("maetok", "hog_*")
def test_hog_agrees_with_official(name):
    t = golden(name)[0]
    near(tokenizer.hog(t["image_u8"].float() / 127.5 - 1, 16), t["hog"], 1e-5)

@goldens("metrics", "hog*")
def test_hog_agrees_with_maskfeat(name):
    t, _, case = golden(name)
    sizes = {tag: (cell, patch) for tag, _, _, _, cell, patch in case["cases"]} | {"edges": (8, 16)}
    keys = [k for k in t if k.startswith("target_")]
    for key in keys:
        _, tag, window = key.split("_")
        cell, patch = sizes[tag.removesuffix("dyadic")]
        near(tokenizer.hog(t[f"x_{tag}"], patch, cell, int(window[2:])), t[key], 1e-5)
    assert len(keys) >= 2

@goldens("maetok", "maskae_*")
def test_a_masked_training_step_agrees_with_official(name):
    """Masked latents, reconstruction and the three auxiliary losses; of the teachers only their outputs are given."""
    t, weights, case = golden(name)
    model, cfg = tokenizer.from_official(weights, *(case[net]["num_heads"] for net in ("enc", "dec", "aux")))
    x, mask = t["image_u8"].float() / 127.5 - 1, t["mask"].bool()
    out, hog = model(x, mask), tokenizer.hog(x, cfg.patch)
    close(model.encode(x, mask), t["latents"])
    close(out["recon"][..., ::4, ::4], t["reconstruction"])
    near(hog[:, :len(t["target_hog"][0])], t["target_hog"], 1e-5)
    aux = {"hog": ("hog", hog, tokenizer.masked_mse), "dinov2": ("dino", t["target_dino"], tokenizer.masked_cosine),
           "siglip": ("clip", t["target_clip"], tokenizer.masked_cosine)}
    assert set(model.aux) == set(aux)
    for ours, (theirs, target, loss) in aux.items():
        close(out[ours][:, :len(t[f"pred_{theirs}"][0])], t[f"pred_{theirs}"])
        close(loss(out[ours], target, mask), t[f"{theirs}_loss"])

class Probe(torch.nn.Module):
    """The small discriminator of the golden."""

    def __init__(self, weights):
        super().__init__()
        self.c1, self.c2 = torch.nn.Conv2d(3, 6, 3, 2, 1), torch.nn.Conv2d(6, 1, 3, 2, 1)
        self.load_state_dict(weights)

    def forward(self, *views):
        return [self.c2(F.leaky_relu(self.c1(x), 0.2)).flatten(1) for x in views]

@goldens("maetok", "gan_*")
def test_adversarial_terms_and_the_image_loss_agree_with_official(name):
    """Hinge, LeCam, DiffAugment; then adaptive weight and both objectives, with the small networks of the golden."""
    t, _, case = golden(name)
    close(tokenizer.hinge_loss(t["logits_real"], t["logits_fake"]), t["hinge_d"])
    lecam, halves = tokenizer.LeCam(ONE), tokenizer.LeCam(ONE)  # the second in two micro-batches
    for real, fake, means, value in zip(t["lecam_real"], t["lecam_fake"], t["lecam_ema"], t["lecam_reg"]):
        close(lecam(real, fake), value)
        [halves(real, fake, 0.5) for _ in range(2)]
        close(torch.cat([lecam.means, halves.means]), means.repeat(2))
    augment, color = partial(tokenizer.augment, t["aug_x"]), t["aug_u"]
    for i, operation in enumerate(("brightness", "saturation", "contrast")):
        alone = torch.full_like(color, 0.5)  # the middle of each range changes nothing
        alone[i] = color[i]
        close(augment({"color": alone}, 0.2), t[f"aug_{operation}"])
    close(augment({"shift": t["aug_shift"]}, 0.2), t["aug_translation"])
    for share in (0.2, 0.5):
        close(augment({"cutout": t[f"aug_cutout{share}_offset"]}, share), t[f"aug_cutout{share}"])
    cfg = tokenizer.Config(size=16, patch=8, batch_size=case["batch"], diffaug=False, consistency=0.0)
    adversary = tokenizer.Adversary(cfg, ONE, Probe(below(t, "probe/")))
    real, recon = t["vq_real"], t["vq_recon"]
    for group in adversary.optimizers[0].param_groups:
        group["lr"] = 0.0  # the discriminator stays
    image = tokenizer.unpatchify(t["vq_feat"] @ t["vq_last_layer"].T, 4).requires_grad_()
    large = image.repeat_interleave(2, 2).repeat_interleave(2, 3)  # the golden enlarges its image
    close(large.detach(), recon)
    losses = tokenizer.image_loss(recon, real, lambda a, b: (a - b).abs().mean((1, 2, 3)))
    for i, step in enumerate(t["vq_steps"].tolist()):
        warm, on = min(1, step / 10), step >= 30  # the warm-up and the start step of the case
        terms = (large - real).square().mean() + warm * (large - real).abs().mean(), -adversary.net(large)[0].mean()
        grads = [torch.autograd.grad(term, image, retain_graph=True)[0] for term in terms]
        adaptive = tokenizer.adaptive_weight(*grads, t["vq_feat"], 4, ONE)
        close(adaptive, t["vq_adaptive_weight"][i])
        adv = on * 0.4 * adaptive * adversary.generator_loss(recon, step - 1, slice(None))
        close(losses["recon"] + warm * losses["lpips"] + t["vq_codebook_losses"].sum() + adv, t["vq_gen_loss"][i])
        if on:
            terms = adversary.train_step(real, recon, step - 1)
            close(0.4 * (terms["hinge"] + 0.001 * terms["lecam"]), t["vq_disc_loss"][i])
        else:  # the official code moves the LeCam means from the first step
            adversary.lecam(*adversary.net(real, recon))

def dino_discriminator(trunk, weights, *args):
    """With weights under the official names; those without running statistics lack some."""
    net = tokenizer.DinoDiscriminator(trunk.eval(), *args)
    net.load_state_dict({k: weights.get(k, v) for k, v in net.state_dict().items()})
    return net

@goldens("maetok", "disc_dino_*")
@torch.no_grad()
def test_dino_discriminator_agrees_with_official(name):
    t, _, case = golden(name)
    trunk = fid.VisionTransformer(below(t, "dino/"), "dino", case["num_heads"])
    net = dino_discriminator(trunk, below(t, "disc/"), ONE, tuple(case["key_depths"]))
    for i, tap in enumerate(net.features(t["x"])):
        close(tap[0, :, :16], t[f"activation{i}"])
    net.eval()
    close(net(t["x"])[0], t["logits_eval"])
    if "x_large" in t:
        close(net(t["x_large"])[0], t["logits_eval_large"])
    close(net.train()(t["x"])[0], t["logits_train"])

def filled(shapes: dict, seed: int) -> dict[str, torch.Tensor]:
    """Weights that follow from (seed, name, shape): how the goldens of `metrics` were made."""
    weights = {}
    for key, shape in shapes.items():
        last, rank = key.rpartition(".")[2], len(shape)
        u = 2 * np.random.default_rng([seed, zlib.crc32(key.encode())]).random(shape) - 1
        if last == "running_var":
            u = 1 + 0.5 * u
        elif last == "running_mean":
            u = 0.2 * u
        elif last in ("weight_u", "weight_v"):
            u = u / np.sqrt((u * u).sum())
        elif re.search("pos_embed|_tokens?$|position_embedding|probe", key):
            u = 0.5 * math.sqrt(3) * u
        elif key.startswith("lin") and rank == 4 and shape[0] == 1:
            u = 0.5 * (u + 1)
        elif rank <= 1:
            u = 1 + 0.25 * u if last in ("weight", "gamma") else 0.1 * u
        else:
            u = math.sqrt(3 * (2 if rank >= 3 else 1) / math.prod(shape[1:])) * u
        counts = last == "num_batches_tracked"
        weights[key] = torch.zeros(shape, dtype=torch.int64) if counts else torch.from_numpy(u.astype(np.float32))
    return weights

def shrunk(weights: dict, pattern: str) -> dict:
    """Small activations make the eps of the norms visible."""
    return {key: w * np.float32(1e-3) if re.search(pattern, key) else w for key, w in weights.items()}

def public_keys(network: str) -> dict[str, list[int]]:
    """Names and shapes of a public weight file."""
    return json.loads((GOLDENS / "metrics/state_dict_keys.json").read_text())[network]

def images_of(t, key):
    return t[key].permute(0, 3, 1, 2).float() / 127.5 - 1

@goldens("metrics", "dinodisc*")
@torch.no_grad()
def test_dino_discriminator_agrees_at_full_size(name):
    t, _, case = golden(name)
    trunk = fid.VisionTransformer(filled(public_keys("dino_deitsmall16"), case["weight_seed"]), "dino")
    with np.load(GOLDENS / f"{name}.npz") as z:
        heads = filled(json.loads(str(z["heads_keys"])), case["weight_seed"])
    x, net = images_of(t, "img"), dino_discriminator(trunk, heads, ONE)
    for turn in ("first", "second"):
        near(net(x)[0], t[f"logits_sbn_{turn}"], 1e-4)
    for key, suffix, every in (("img", "", 3), ("img_224", "_224", 7)):
        for i, tap in enumerate(net.features(images_of(t, key)) if key in t else ()):
            n, channels, _ = t[f"act{i}{suffix}"].shape
            near(tap[:n, :channels, ::every], t[f"act{i}{suffix}"], 2e-4)

@goldens("metrics", "dinov2*")
@torch.no_grad()
def test_dinov2_agrees_with_official(name):
    t, _, case = golden(name)
    seed, seen = case["weight_seed"], 0
    for tag, keys in case["keys"].items():
        weights = filled(keys, seed)
        if tag == "plain_small":
            weights = shrunk(weights, "^pos_embed$|^cls_token$|gamma$|^patch_embed")
        net = fid.VisionTransformer(weights, "dinov2", case["config"]["num_heads"]).eval()
        n = net.prefix + net.registers
        for key in (k for k in t if re.fullmatch(rf"patch_{tag}_\d+x\d+", k)):
            size = key.rpartition("_")[2]
            out = net(t[f"x_{size}"])
            near(out[:, n:], t[key], 3e-5)
            near(out[:, 0], t[f"cls_{tag}_{size}"], 3e-5)
            if net.registers:
                near(out[:, 1:n], t[f"regtok_{tag}_{size}"], 3e-5)
            seen += 1
        net.pos_embed = filled({"pos_embed": (1, 1370, 8)}, seed)["pos_embed"][:, 1:]
        for key in (k for k in t if re.fullmatch(rf"pos37_{tag}_\d+", k)):
            side = int(key.rpartition("_")[2])
            near(net.positions(side, side), t[key][:, 1:], 1e-5)
            seen += 1
    assert seen >= 5

@goldens("metrics", "siglip*")
@torch.no_grad()
def test_siglip_agrees_with_official(name):
    t, _, case = golden(name)
    whole = filled(case["keys"], case["weight_seed"])
    small = shrunk(whole, r"embeddings\.|out_proj\.|\.mlp\.fc2\.")
    for weights, size, suffix in ((whole, "native", ""), (whole, "interp", ""), (small, "native", "_small")):
        net = fid.VisionTransformer(weights, "siglip", case["config"]["num_attention_heads"]).eval()
        near(net(t[f"x_{size}"]), t[f"last_hidden_state_{size}{suffix}"], 3e-5)

@goldens("metrics", "lpips*")
@torch.no_grad()
def test_lpips_agrees_with_official(name):
    t, _, case = golden(name)
    vgg = filled(public_keys("vgg16"), case["weight_seed"])
    heads = {"real": {f"lin{i}.model.1.weight": t[f"head_real_lin{i}"] for i in range(5)},
             "det": filled(public_keys("lpips_heads_v0.1_vgg"), case["weight_seed"])}
    for key in (k for k in t if k.startswith("layers_")):
        _, size, kind = key.split("_")
        net = fid.Lpips(vgg, heads[kind])  # in training mode, too: nothing in it is random
        pair = images_of(t, f"a_{size}"), images_of(t, f"b_{size}")
        taps = zip(net.heads, *map(net.features, pair))
        near(torch.stack([(head * (f - g).square()).sum(1).mean((1, 2)) for head, f, g in taps], 1), t[key], 1e-6)
        near(net(*pair), t[f"lpips_{size}_{kind}"], 1e-6)

def build_sit(weights, args) -> diffusion.SiT:
    model = diffusion.from_official(weights, args["num_heads"])
    assert (*model.shape, model.null_class) == (args["input_size"], args["in_channels"], args["num_classes"])
    return model

@goldens("maetok", "sit_tiny_*")
def test_sit_agrees_with_official(name):
    t, weights, case = golden(name)
    model = build_sit(weights, case["args"])
    close(diffusion.sinusoid(t["t"], 256), t["t_sinusoid"])
    close(model.t_embedder.mlp(diffusion.sinusoid(t["t"], 256)), t["t_embed"])
    close(model(t["x"], t["t"], t["y"]), t["velocity"])
    if case["keep_pos_embed"]:
        close(diffusion.token_positions(*model.pos_embed.shape[1:]), weights["pos_embed"])

@goldens("maetok", "loss_*")
def test_flow_loss_agrees_with_official(name):
    t, weights, case = golden(name)
    model = build_sit(weights, case["args"])
    for path, times in itertools.product(("linear", "cosine"), ("uniform", "lognormal")):
        at = t["uniform_t"] if times == "uniform" else diffusion.PATHS[path].time_of(t["rnd_normal"].exp())
        close(at, t[f"{path}_{times}_t"])
        loss = diffusion.velocity_loss(model, t["x"], t["noise"], at.flatten(), t["y"], path)
        close(loss, t[f"{path}_{times}_loss"])

@goldens("maetok", "sampler_*")
@torch.no_grad()
def test_samplers_agree_with_official_and_their_calls_are_counted(name):
    t, weights, case = golden(name)
    model, calls, steps = build_sit(weights, case["args"]), [], t["num_steps"]
    model.register_forward_pre_hook(lambda _, args: calls.append((args[1][0].item(), len(args[0]))))
    for suffix, scale in (("cfg1", 1.0), ("cfg", t["cfg_scale"])):
        args = diffusion.guided_velocity(model, t["y"], scale, *case["interval"]), t["noise"], steps
        ode = partial(diffusion.sample_ode, *args)
        solvers = {"euler": ode, "heun": partial(ode, heun=True)}
        for path in ("linear", "cosine"):
            solvers[f"sde_{path}"] = partial(diffusion.sample_sde, *args, path, iter(t["sde_eps"]).__next__)
        for solver, solve in solvers.items():
            calls.clear()
            close(solve(), t[f"{solver}_{suffix}"])
            times, rows = zip(*calls)
            close(times, t[f"{solver}_{suffix}_call_t"], 1e-6)
            assert list(rows) == t[f"{solver}_{suffix}_call_rows"].tolist()
            sampling = diffusion.SamplerConfig(solver.partition("_")[0], steps, scale, *case["interval"])
            single, double = sampling.nfe()
            assert (len(rows), sum(rows)) == (single, len(t["y"]) * double)

def moments(features, size=37):
    whole = fid.Moments(features.shape[1], CPU)
    [whole.add(part) for part in features.split(size)]
    return whole.finish(ONE)

@goldens("metrics", "frechet*")
def test_frechet_distance_inception_score_precision_and_recall_agree(name):
    """With exact values, and with ADM's; the second are in the full goldens only, and in the end-to-end golden."""
    t, _, case = golden(name)
    found = {tag: moments(t[f"feat_{tag}"]) for tag in "ABCD"}
    for a, b in ("AB", "CD", "AC"):  # C and D have fewer samples than dimensions
        assert fid.frechet_distance(*found[a], *found[b]) == pytest.approx(t[f"fid_exact_{a}{b}"], rel=1e-6)
    assert fid.frechet_distance(*found["A"], *found["A"]) < 1e-6
    if "is_acts" not in t:
        return
    logits = t["is_acts"] @ t["is_W"]
    for block, key in ((case["is_split_size"], "is_adm_split"), (5000, "is_adm_default")):
        assert fid.inception_score(logits, block) == pytest.approx(t[key], rel=1e-5)
    for tag, middle in (("g", ""), ("nn", "nn_")):
        ref, smp = t[f"pr_{middle}ref"], t[f"pr_{middle}smp"]
        assert [*fid.precision_recall(ref, smp)] == pytest.approx(t[f"pr_{tag}_exact"].tolist())
        close(fid.knn_radii(ref).square(), t[f"pr_{tag}_radii_ref_fp32"], 1e-5)
        close(fid.knn_radii(smp).square(), t[f"pr_{tag}_radii_smp_fp32"], 1e-5)

@goldens("metrics", "resize*")
def test_resize_agrees_with_tensorflow(name):
    t, _, _ = golden(name)
    for key in (k for k in t if k.startswith("img_")):
        out = fid.tf_resize(t[key].permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        assert torch.equal(out[t["rows"]][:, t["cols"]], t[f"tf1_{key[4:]}"])  # not a bit apart
        close(out.double().sum((0, 1)), t[f"tf1sum_{key[4:]}"], 1e-9)

@lru_cache
def inception(resize):
    weights = filled(public_keys("inception_fid"), 1000)
    return fid.Inception(weights, resize).eval(), weights["fc.bias"]  # no score uses the bias of classification

@goldens("metrics", "inception*")
@torch.no_grad()
def test_inception_agrees_with_both_references(name):
    t, _, case = golden(name)
    assert case["weight_seed"] == 1000
    for key in (k for k in t if k.startswith("pool_")):
        _, size, kind = key.split("_")
        net, bias = inception("tf1" if kind == "tf1" else "pytorch-fid")
        pool, spatial, logits = net(t[f"img_{size}"].permute(0, 3, 1, 2))
        for what, ours in (("pool", pool), ("spatial", spatial), ("logits_nobias", logits), ("logits", logits + bias)):
            near(ours, t[f"{what}_{size}_{kind}"], 2e-4)

@goldens("metrics", "e2e*")
def test_the_whole_suite_agrees_end_to_end(name):
    t, _, _ = golden(name)
    sets = [fid.LazyImages(len(x), lambda i, x=x: x[i].permute(0, 3, 1, 2)) for x in (t["img_ref"], t["img_smp"])]
    ref, smp = (fid.inception_statistics(inception("tf1")[0], images, ONE, 16) for images in sets)
    for key, mean, cov in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        assert fid.frechet_distance(ref[mean], ref[cov], smp[mean], smp[cov]) == pytest.approx(t[key], rel=1e-5)
    assert fid.inception_score(smp["logits"]) - 1 == pytest.approx(t["is_split5000"] - 1, rel=1e-4)
    assert [*fid.precision_recall(ref["features"], smp["features"])] == pytest.approx(t["precision_recall"].tolist())

# ---- Released checkpoints

def key_list(name: str) -> dict[str, list[int]]:
    rows = [line.split("\t") for line in (GOLDENS / f"maetok/keys/{name}.tsv").read_text().splitlines()[1:]]
    return {key: [int(n) for n in shape.split("x")] for key, shape, *_ in rows}

def write_safetensors(path, tensors: dict) -> None:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [at, at + 4 * x.numel()]}
        at += 4 * x.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # real files are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(x.contiguous().numpy().tobytes() for x in tensors.values())

def release(folder: str, weights: dict, **config) -> None:
    Path(folder).mkdir()
    write_safetensors(f"{folder}/model.safetensors", weights)
    Path(f"{folder}/config.json").write_text(json.dumps(config))

@torch.no_grad()
def test_a_released_tokenizer_at_full_size():
    """The exact key lists with random values; of the smaller --from-official, an image there and back, and statistics."""
    for name, size in (("ae_b128_512_p16_movq_nocls", 512), ("ae_b128_256_plain_cls", 256)):
        weights = {key: 0.03 * torch.randn(shape) for key, shape in key_list(name).items()}
        model, cfg = tokenizer.from_official(weights)
        assert (cfg.size, cfg.latents, cfg.channels) == (size, 128, 32)
        x = torch.rand(1, 3, size, size) * 2 - 1
        z, image = model.encode(x), model(x)["recon"]
        assert z.shape == (1, 128, 32) and image.shape == x.shape and image.isfinite().all()
    release("official", weights, vq_mean=0.01, vq_std=0.07)
    call("tokenizer --from-official official --out ours")
    again, _ = tokenizer.load_tokenizer("ours/ckpt.pt", CPU)
    assert torch.load("ours/ckpt.pt")["latent_statistics"] == {"mean": 0.01, "std": 0.07}
    assert torch.equal(again.encode(x), z) and torch.equal(again.decode(z), image)

@torch.no_grad()
def test_a_released_sit_at_full_size():
    """The exact key list: strict, every number accounted for, and it runs (values repeated, so that it fits)."""
    shapes = key_list("sit_xl_1d_128x32")
    weights = {key: torch.full([1] * len(shape), 0.01).expand(shape) for key, shape in shapes.items()}
    model = diffusion.from_official(weights)
    numbers = sum(math.prod(v.shape) for v in model.state_dict().values())
    assert (numbers, model.shape, model.null_class, model.blocks[27].attn.heads) == (675_000_608, (128, 32), 1000, 16)
    assert model(torch.randn(1, 128, 32), torch.tensor([0.5]), torch.tensor([1000])).shape == (1, 128, 32)
    del weights["blocks.3.mlp.fc1.bias"]
    with pytest.raises(RuntimeError, match=r"blocks\.3\.mlp\.fc1\.bias"):
        diffusion.from_official(weights)

def test_each_damage_to_a_released_checkpoint_is_named():
    _, weights, case = golden("maetok/tokenizer_tiny_b_movq")
    load = partial(tokenizer.from_official, enc_heads=case["enc"]["num_heads"], dec_heads=case["dec"]["num_heads"])
    refused(load, weights | {"encoder.surprise": torch.zeros(1)}, message="encoder.surprise is unknown")
    unused = re.compile(r"freqs_t_|decoder.model.(pos_embed|patch_embed|cls_token)|norm.adaLN|encoder.mask_token")
    for key in (key for key in weights if not unused.search(key)):
        said = refused(load, {k: v for k, v in weights.items() if k != key})
        assert f"{key} is missing" in said or key.endswith(("freqs", "adaLN_modulation.1.weight")), (key, said)
        if key.startswith(("encoder", "quant", "post")):
            for other in (weights[key][..., None], weights[key].flatten()[:1]):
                refused(load, weights | {key: other})

def test_a_training_checkpoint_becomes_a_tokenizer_that_a_released_sit_samples_with():
    weights = golden("maetok/tokenizer_tiny_b_movq")[1]
    torch.save({"model": {"a": torch.zeros(1)}, "ema": weights, "args": argparse.Namespace(lr=1)}, "train.pt")
    torch.save(weights, "bare.pt")
    assert fid.read_weights("train.pt").keys() == fid.read_weights("bare.pt").keys() == weights.keys()
    Path("config.json").write_text('{"vq_mean": 0.5, "vq_std": 2.0}')
    convert = partial(call, "tokenizer --from-official train.pt --out tok")
    convert()
    refused(convert, message="is there already")
    _, weights, case = golden("maetok/sit_tiny_b")
    release("sit", weights, num_heads=case["args"]["num_heads"])
    call("sample --preset paper256 --model sit --tokenizer tok/ckpt.pt --num-samples 9 --png --precision tf32",
         "--sampler euler --steps 3 --labels balanced")
    found = content_of("out/samples/samples.npz")
    images, labels = found["arr_0"], torch.from_numpy(found["labels"])
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1] and images.shape == (9, 64, 64, 3)
    assert np.array_equal(np.asarray(Image.open("out/samples/png/000008.png")), images[8])
    sit, (model, _) = build_sit(weights, case["args"]), tokenizer.load_tokenizer("tok/ckpt.pt", CPU)
    with torch.no_grad():
        velocity = diffusion.guided_velocity(sit, labels, 1.9, 0.0, 0.75)
        x = diffusion.sample_ode(velocity, diffusion.image_noise(range(9), 0, sit.shape, ONE)(), 3)
        again = data.to_uint8(model.decode(x.float() * 2 + 0.5))
    assert np.abs(again.permute(0, 2, 3, 1).numpy().astype(int) - images).max() <= 1

# ---- Running the scripts

# Settings of a tiny run: flags and other fields. They become a preset `tiny`
TINY = {"tokenizer": {"size": 16, "patch": 4, "width": 24, "heads": 2, "depth": 1, "aux_width": 16, "aux_depth": 1,
                      "latents": 4, "channels": 4, "batch_size": 16, "warmup": 2, "log_every": 1},
        "diffusion": {"width": 24, "heads": 2, "depth": 1, "batch_size": 16, "sampling_steps": 2, "log_every": 1}}
FP32 = "--precision fp32 --optimizer adamw"

FORK = multiprocessing.get_context("forkserver")  # its processes start at once: they begin with this file imported
FORK.set_forkserver_preload(["test_all"])

def forked(run, env, cwd, said, limit):
    """What such a process does. Its files have at most `limit` bytes."""
    os.environ.update(env)
    os.chdir(cwd)
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run()

def forking(command, start=subprocess.run, **how):
    """subprocess.run; but a script, and what it starts, are forked from a process that has torch already."""
    at = command.index(sys.executable) + 1 if sys.executable in command else 0
    if not at or command[at].startswith("-"):  # a module, or not Python
        return start(command, **how)
    said = getattr(how.get("stdout"), "name", "said")
    fork = FORK if subprocess.run is start else multiprocessing.get_context("fork")
    child = fork.Process(target=forked, args=(partial(as_main, *command[at:]), how["env"], ".", said, -1))
    child.start()
    return SimpleNamespace(returncode=child.join() or child.exitcode)

def as_main(path, *words):
    subprocess.run = forking
    sys.argv, sys.path[:] = [path, *words], [str(Path(path).parent), *(p for p in sys.path if p != str(HERE))]
    runpy.run_path(path, run_name="__main__")
    os._exit(sys.stdout.flush() or 0)  # a child of a pool's thread would wait for that thread

def counting(run):
    """With graphs that are counted: generating code for them would take minutes."""
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    torch.compile = partial(torch.compile, backend=counter)
    run()
    print("graphs:", counter.frame_count, flush=True)

def script(*line, cwd=".", fields=None, processes=1, torchrun=False, limit=-1, fails=False, background=False):
    """`call`, with TINY, in processes of its own, or in new ones by torchrun. Returns what they said, or the process."""
    line, port = " ".join(map(str, line)), str(20_000 + os.getpid() % 20_000)
    cwd, said = Path(cwd).absolute(), Path(cwd, f"said-{time.time()}.txt").absolute()
    fields = (fields or {}) if line.split()[0] in TINY else None
    env = os.environ | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run, ranks = partial(call, line, fields=fields), range(processes)
    if torchrun:
        code = f"import sys; sys.path.append({str(HERE)!r}); import test_all; test_all.call({line!r}, fields={fields!r})"
        command = [f"--nproc_per_node={processes}", f"--max-restarts={int(not fails)}", "--master_port", port,
                   "--no-python", sys.executable, "-c", code]
        run, ranks = partial(torch.distributed.run.main, command), [0]
    if "--compile" in line:
        run = partial(counting, run)
    children = [FORK.Process(target=forked, daemon=True, args=(run, env | {"RANK": str(rank)}, cwd, said, limit))
                for rank in ranks]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HERE)  # the first start finds this file there
        for child in children:
            child.start()
    if background:
        return children[0]
    assert {child.join(400) or child.exitcode for child in children} == {int(fails)}, said.read_text()
    return said.read_text()

def call(*line, fields=None) -> None:
    """Run a script in this process, as its last line does; with `fields`, TINY and these are a preset."""
    name, *flags = shlex.split(" ".join(map(str, line)))
    module = sys.modules[name]
    presets = getattr(module, "PRESETS", {})
    if fields is not None:
        presets, flags = presets | {"tiny": TINY[name] | fields}, ["--preset=tiny", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py"])
        flags = fid.arguments(flags) if name == "fid" else flags
        data.launch(module.main, module.Config, presets, module.__doc__, flags)

fid.train_classifier.__defaults__ = 0, 40  # steps: no test asks for a good one

@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A new cache for all tests and the processes of -n. Of the shapes of 16 pixels it holds 2,900."""
    at = tmp_path_factory.getbasetemp()
    at = (at.parent if "PYTEST_XDIST_WORKER" in os.environ else at) / "cache"
    os.environ["MAETOK_CACHE"] = str(at)
    few = np.concatenate([np.arange(2500), 2**32 + np.arange(400)])
    render = lambda start, stop: data.render_shapes(few[start:stop], 16)[0].permute(0, 2, 3, 1).numpy()
    data.store(at / "shapes-16px", 16, data.SHAPES, few % 10, 2500, "few", render)
    fid.cached_classifier(data.ImageSet("shapes", 16, "train"), ONE, "")

@pytest.fixture(scope="session")
def chain(tmp_path_factory, cache):
    """The folder `out` of the four scripts, which ran once, tiny."""
    at = tmp_path_factory.mktemp("chain")
    script("tokenizer --steps 12 --stage2-steps 8", cwd=at)
    script(f"diffusion --steps 10 --samples 40 --tokenizer {at}/out/tokenizer/ckpt.pt", cwd=at)
    script("sample --num-samples 30 --steps 3 --batch-size 8", cwd=at)
    script("fid", cwd=at)
    return at / "out"

@pytest.fixture
def made(chain):
    """The flags that name the tiny models."""
    models = f"--tokenizer {chain}/tokenizer/ckpt.pt"
    return {"tokenizer": "", "diffusion": models, "sample": f"{models} --model {chain}/diffusion/ckpt.pt", "data": ""}

def log_of(folder) -> list[dict]:
    """The lines of a log without what the clock measures; of a step that came again the last one."""
    clock = {"images_per_s", "tflops", "data_wait", "memory_gib"}
    lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines() if line[-1] == "}"]
    last = {(line["stage"], line["step"]): line for line in lines}
    return [{k: v for k, v in last[at].items() if k not in clock} for at in sorted(last)]

def assert_losses_agree(one: str, two: str, count: int) -> None:
    a, b = (np.array([line[key] for line in log_of(folder) for key in ("recon", "hog", "loss") if key in line])
            for folder in (one, two))
    assert len(a) == len(b) == count and np.abs(a / b - 1).max() < 1e-4

def assert_same(one: str, two: str, *files: str) -> None:
    """The files of two runs hold the same numbers, bit for bit."""
    for a, b in ((Path(one, file), Path(two, file)) for file in files):
        if a.is_dir():
            names = [{p.name for p in folder.iterdir() if p.suffix != ".part"} for folder in (a, b)]
            assert names[0] == names[1] != set()
            assert_same(a, b, *names[0])
        elif a.name == "log.jsonl":
            assert log_of(one) == log_of(two)
        elif a.name == "metrics.json":
            assert content_of(a) | {"seconds": 0} == content_of(b) | {"seconds": 0}
        elif a.suffix in (".pt", ".npz"):
            x, y = content_of(a), content_of(b)
            assert x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and np.array_equal(x[k], y[k]) for k in x), a
        else:
            assert a.read_bytes() == b.read_bytes(), a

def wait_for(condition, process) -> None:
    while not condition():
        assert process.exitcode is None, "the run ended before it could be killed"
        time.sleep(0.002)

def kill_when(condition, process) -> None:
    wait_for(condition, process)
    process.kill()
    process.join()

def logged(folder: str, stage: str, step: int) -> bool:
    return (log := Path(folder, "log.jsonl")).exists() and f'{stage}", "step": {step},' in log.read_text()

# ---- All losses at once, with made weights

@pytest.fixture(scope="session")
def made_weights(tmp_path_factory):
    """A folder of pretrained networks under their public names: random, and all but VGG16 and Inception small."""
    at, dino = tmp_path_factory.mktemp("weights"), below(golden("maetok/disc_dino_a")[0], "dino/")
    dino |= {key.replace(".0.", f".{i}."): x for key, x in dino.items() if "blocks.0." in key for i in range(12)}
    dinov2, siglip = (golden(f"metrics/{name}")[2]["keys"] for name in ("dinov2", "siglip"))
    for name, weights in {"vgg16-397923af": filled({k: v for k, v in public_keys("vgg16").items() if "features" in k}, 1),
            "lpips_vgg": filled(public_keys("lpips_heads_v0.1_vgg"), 1),
            "pt_inception-2015-12-05-6726825d": filled(public_keys("inception_fid"), 1000),
            "dino_deitsmall16_pretrain": dino, "dinov2_vitl14_pretrain": filled(dinov2["plain"], 1)}.items():
        torch.save(weights, at / f"{name}.pth")
    unused = {"logit_scale": (1,), "text_model.final_layer_norm.bias": (64,)}
    write_safetensors(at / "siglip-large-patch16-256.safetensors", filled(siglip | unused, 1))
    return at

def test_the_released_preset_and_its_fields(monkeypatch):
    monkeypatch.setattr(tokenizer, "load_vit", lambda name, *rest, resample: data.die(f"{name} {resample}"))
    for preset, name, lr in (("imagenet256", "large-patch16-256 0", 1e-4), ("released256", "so400m-patch14-224 16", 2e-4)):
        cfg = tokenizer.Config(**tokenizer.PRESETS[preset])
        refused(tokenizer.TARGETS["siglip"], cfg, ONE, None, message=f": siglip-{name}")
        both = (tokenizer.Adversary(c, ONE, torch.nn.Linear(2, 2)) for c in (cfg, dataclasses.replace(cfg, disc_lr=3)))
        assert [net.optimizers[0].param_groups[0]["lr"] for net in both] == [lr, 3]
    assert (cfg.decoder, cfg.augment, cfg.warmup) == ("modulated", "crop", 2 * 2502)

FULL = TINY["tokenizer"] | {
    "size": 32, "patch": 8, "targets": "pixel,hog,dinov2,siglip", "lpips": 1.0, "lpips_warmup": 4, "adversary": "dino",
    "adv_start": 3, "precision": "fp32", "optimizer": "adamw", "lr": 1e-4}
LOSSES = {"recon", "lpips", "pixel", "hog", "dinov2", "siglip", "grad"}
ADVERSARIAL = {"adv", "adaptive", "hinge", "lecam", "consistency", "logits_real", "logits_fake", "grad_d"}

def test_all_losses_train_resume_and_share_out(made_weights, cache):
    """Every term is logged from its step on; two processes are as one; a killed run goes on bit by bit."""
    Path("pictures").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (42, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(f"pictures/{i}.png")
    run = partial(script, "tokenizer --steps 6 --stage2-steps 3 --save-every 2 --data pictures --weights", made_weights,
                  fields=FULL)
    run("--rfid --out whole")
    run("--out two", processes=2)
    for one, two in zip(log_of("whole"), log_of("two"), strict=True):
        first = one["stage"] == "stage 1"
        terms = {"stage", "step", "lr"} | (LOSSES if first else {"recon", "lpips", "grad"})
        assert one.keys() - {"val_psnr"} == terms | (ADVERSARIAL if not first or one["step"] >= 3 else set()), one
        for name in one.keys() - {"stage"}:
            rel = {"adaptive": 0.5, "grad": 0.1, "grad_d": 1e-2}.get(name, 1e-4 if first else 1e-3)  # L_adv: rounding tells
            assert abs(two[name] - one[name]) / max(abs(one[name]), 1e-6 / rel) <= rel, (name, one, two)  # also if not finite
    metrics, stage1, stage2 = (content_of(f"whole/{name}") for name in ("metrics.json", "stage1.pt", "ckpt.pt"))
    assert metrics["stage2"]["lpips"] > 0 and metrics["stage2"]["rfid"] > 0
    assert [metrics["stage2"]["psnr"]] == pytest.approx([x["val_psnr"] for x in log_of("whole") if "val_psnr" in x][4:])
    assert {k for k, w in stage1.items() if not torch.equal(w, stage2.get(k, w))} == {k for k in stage1 if "'decoder." in k}
    kill_when(lambda: logged("cut", "stage 1", 5), run("--out cut", background=True))
    assert "continuing" in run("--out cut")
    assert_same("whole", "cut", "ckpt.pt", "stage1.pt", "log.jsonl")
    assert any("heads.0.0.0.weight_u" in key for key in content_of("cut/ckpt.pt")) and len(log_of("cut")) == 9

@pytest.mark.parametrize("stage, adv_start", [(1, 0), (1, 2), (2, 2)])
def test_a_step_has_the_gradients_of_the_sum(made_weights, monkeypatch, stage, adv_start):
    """The loop's passes from both ends are Eq. 6 plus Eq. 8; LPIPS warms up, L_adv begins, over the steps of both stages."""
    cfg = tokenizer.Config(**FULL | {"weights": str(made_weights), "out": ".", "steps": 1, "stage2_steps": 1,
                                     "adv_start": adv_start, "clip": 0.0, "aux_weight": 0.5})
    targets = {name: tokenizer.TARGETS[name](cfg, ONE, None) for name in cfg.target_names()}
    model = tokenizer.Tokenizer(cfg, {name: target.width for name, target in targets.items()})
    lpips, adversary = fid.load_lpips(cfg.weights, ONE), tokenizer.Adversary(cfg, ONE)
    adversary.net.eval()  # spectral norm stands still
    frozen, targets, on = copy.deepcopy(adversary), targets if stage == 1 else {}, stage >= adv_start
    x = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = tokenizer.random_mask(16, 16, 0.5, torch.Generator().manual_seed(2))
    idle, ratios = torch.optim.SGD(model.parameters()), []
    idle.param_groups.clear()  # it neither steps nor clears the gradients
    loader = type("Source", (), {"wait_seconds": 0.0, "__call__": lambda self, step: (x, None)})()
    monkeypatch.setattr(tokenizer, "make_optimizers", lambda *args: [idle])
    monkeypatch.setattr(tokenizer, "random_mask", lambda batch, n, ratio, generator: ratios.append(ratio) or mask)
    monkeypatch.setattr(tokenizer, "Loader", lambda *args: loader)
    tokenizer.train(cfg, ONE, stage, model, None, data.to_uint8(x), targets, lpips, adversary, None)

    out = model(x, mask)
    loss = F.mse_loss(out["recon"], x) + min(1, stage / 4) * lpips(out["recon"], x).mean()
    if on:
        adv, last = frozen.generator_loss(out["recon"], stage - 1, slice(None)), model.decoder.head.weight
        norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (loss, adv)]
        loss = loss + cfg.adv_weight * (norms[0] / (norms[1] + 1e-4)).detach() * adv
    loss = loss + sum(0.5 * target.loss(out[name], target.features(x), mask) for name, target in targets.items())
    trained = {k: p for k, p in model.named_parameters() if p.grad is not None}
    assert trained.keys() == {k for k, _ in model.named_parameters() if stage == 1 or k.startswith("decoder.")}
    for (name, p), grad in zip(trained.items(), torch.autograd.grad(loss, trained.values())):
        assert grad.abs().max() > 0, name
        close(p.grad, grad, 1e-3)
    moved = [not torch.equal(a, b) for a, b in zip(frozen.net.parameters(), adversary.net.parameters())]
    assert (all(moved) if on else not any(moved)) and ("adv" in log_of(".")[0]) == on
    assert 0.4 <= ratios[0] <= 0.6 and (stage == 1 or ratios == [cfg.mask_max])
    for net in (lpips, adversary.net.trunk[0]):  # nothing trains what is pretrained
        assert not any(p.requires_grad or p.grad is not None for p in net.parameters()) and not net.training

@pytest.mark.parametrize("fields", [
    {"latents": 0}, {"latents": 0, "decoder": "modulated"}, {"positions": "table", "dec_class_token": True},
    {"kl": 1e-4}, {"aux_depth": 0}, tokenizer.PRESETS["mae_pixel"], tokenizer.PRESETS["mae_teacher"]], ids=str)
def test_the_baselines_train(cache, monkeypatch, fields):
    """Two steps of each stage in this process, and what they save loads again."""
    monkeypatch.setattr(tokenizer, "evaluate", lambda *args: {})
    call("tokenizer --steps 2 --stage2-steps 2 --out .", FP32, fields=fields)
    (stage1, cfg), (stage2, _) = (tokenizer.load_tokenizer(f"{name}.pt", CPU) for name in ("stage1", "ckpt"))
    lines, terms = log_of("."), {*cfg.target_names(), *fields.keys() & {"kl"}}
    assert len(lines) == 4 and terms <= lines[0].keys() and not terms & lines[2].keys() and lines[0].get("kl", 1) > 0
    x = data.to_float(data.ImageSet("shapes", cfg.size, "train")[np.arange(2)])
    z = stage2.encode(x)
    assert z.shape == (2, cfg.tokens()[1], cfg.channels) and torch.equal(z, stage1.encode(x))
    assert stage2.decode(z).shape == x.shape

# ---- The device `meta` in place of a GPU: it refuses tensors of the CPU beside its own, and gives nothing back
# .item(), .cpu(), bool(), boolean indices and mixed devices, which slow or end a run on a GPU, raise there. Not seen: real
# kernels, bf16 (meta has no autocast) and the fused optimizer (the plain one takes its place). Left out, as they read back
# on purpose: lines of the log, checkpoints, the check of to_uint8, the last sums of the metrics.

META = torch.device("meta")

class MetaDist(data.Dist):
    def generator(self, *args):
        return SimpleNamespace(device=self.device)  # the fixture lets torch.rand take it

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def save(self, path, content):
        pass

class MetaLoader(data.Loader):
    def gather(self, step):
        return [x.to(META) for x in super().gather(step)]

class OneDevice(TorchDispatchMode):
    """Indices, matrices and the like of the CPU pass on meta, but cost a copy or fail on a GPU. Only copies may cross."""
    crossing = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        devices = {x.device for x in leaves if isinstance(x, torch.Tensor) and x.ndim}
        assert len(devices) < 2 or op in self.crossing, f"{op} of two devices"
        return op(*args, **(kwargs or {}))

@pytest.fixture
def meta(monkeypatch):
    """A Dist of the device meta. Draws, batches and optimizers work there, and the log is never written."""
    def draw(there, *shape, generator=None, **kwargs):
        if isinstance(generator, SimpleNamespace):
            assert kwargs["device"] == generator.device
        elif generator:
            kwargs["generator"] = generator
        return there(*shape, **kwargs)

    with META:  # torch notes here which functions make tensors, before they are replaced
        torch.zeros(1)
    [monkeypatch.setattr(torch, name, partial(draw, getattr(torch, name))) for name in ("rand", "randn")]
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, adamw=torch.optim.AdamW, fused=None, **kwargs: adamw(*args, **kwargs))
    monkeypatch.setattr(data.Log, "write", lambda self, step, more=dict: (more(), self.reset()))
    monkeypatch.setattr(tokenizer, "to_uint8", lambda x: x.to(torch.uint8))
    [monkeypatch.setattr(module, "Loader", MetaLoader) for module in (tokenizer, diffusion, fid)]
    with OneDevice():
        yield MetaDist(device=META)

def blank_images(size, n=32):
    """What the loops need of an ImageSet."""
    rows, view = np.zeros((n, size, size, 3), np.uint8), partial(data.ImageSet.view, None)
    return SimpleNamespace(rows=rows, index=np.arange(n), labels=torch.arange(n) % 3, classes=["a", "b", "c"], view=view)

@pytest.mark.parametrize("stage, fields", [
    (1, {}), (1, {"kl": 1e-4, "decoder": "modulated", "optimizer": "muon", "micro_batch": 4}),
    (1, {"mask_max": 0.0, "mask_min": 0.0, "targets": "pixel", "latents": 0, "adversary": "none"}), (2, {})], ids=str)
def test_a_step_of_the_tokenizer_keeps_to_its_device(made_weights, meta, stage, fields):
    """Two steps of preset imagenet256: forward pass, all losses, backward pass, clipping, optimizers, average, log."""
    cfg = tokenizer.Config(**tokenizer.PRESETS["imagenet256"] | {
        "targets": "pixel,hog,dinov2,siglip", "depth": 2, "batch_size": 8, "steps": 2, "stage2_steps": 2, "adv_start": 2,
        "weights": str(made_weights)} | fields)
    names = cfg.target_names() if stage == 1 else []
    targets = {name: tokenizer.TARGETS[name](cfg, meta, None) for name in names}
    with META:
        model = tokenizer.Tokenizer(cfg, {name: target.width for name, target in targets.items()})
    adversary = tokenizer.Adversary(cfg, meta) if cfg.adversary == "dino" else None
    average = tokenizer.train(cfg, meta, stage, model, blank_images(256), torch.zeros(2, 3, 256, 256).byte(), targets,
                              fid.load_lpips(cfg.weights, meta), adversary, None)
    assert all(p.is_meta for p in (*average.parameters(), *average.buffers()))

@pytest.mark.parametrize("fields", [
    {"style": "sit"}, {"style": "lightning", "optimizer": "muon", "cosine_loss": 1.0, "path": "cosine", "micro_batch": 4},
    {"qk_norm": True, "time": "uniform"}], ids=str)
def test_diffusion_and_its_samplers_keep_to_their_device(meta, monkeypatch, fields):
    """Two steps of training; then each sampler with guidance, and with autoguidance, down to the images."""
    cfg = diffusion.Config(**TINY["diffusion"] | {"steps": 2, "batch_size": 8, "out": "."} | fields)
    rows, mean = np.zeros((32, 2, 4, 6), np.float16), torch.zeros(6, device=META)
    latents = diffusion.LatentSet(rows, torch.arange(32) % 3, np.arange(32), mean, mean + 1)
    model = diffusion.train(cfg, meta, latents, {"shape": (4, 6), "classes": "abc"}, lambda model: None)
    with META:
        net = tokenizer.Tokenizer(tokenizer.ModelConfig(size=16, patch=8, latents=4, channels=6))
    for sampler, guide in itertools.product(("euler", "heun", "sde"), (None, model)):
        draw = diffusion.image_noise(range(3), 0, model.shape, meta)
        velocity = diffusion.guided_velocity(model, torch.arange(3, device=META), 2.0, 0.0, 0.7, guide)
        x = (diffusion.sample_sde(velocity, draw(), 3, cfg.path, draw) if sampler == "sde" else
             diffusion.sample_ode(velocity, draw(), 3, sampler == "heun"))
        assert tokenizer.decode_images(net, x.float(), meta).shape == (3, 3, 16, 16)

def test_the_metrics_keep_to_their_device(made_weights, meta, monkeypatch):
    """Features of Inception and of the classifier with their moments, its training, and the scores of pairs."""
    monkeypatch.setattr(MetaDist, "all_reduce", lambda self, x: torch.zeros_like(x, device=CPU))
    images = fid.LazyImages(5, lambda index: torch.zeros(len(index), 3, 32, 32, dtype=torch.uint8))
    net = fid.load_inception(str(made_weights), meta)
    assert fid.inception_statistics(net, images, meta, 2, 2)["features"].shape == (3, 2048)
    classifier = fid.train_classifier(blank_images(32, 100), meta, steps=2)
    monkeypatch.setattr(fid, "frechet_distance", lambda *moments: 0.0)
    assert classifier.score(images)[0]["images"] == 5
    for _, x in fid.in_batches(images, meta, 2):
        assert classifier(data.to_float(x))[0].is_meta and classifier.patch_features(data.to_float(x), 4).is_meta
        for score in (fid.psnr, fid.ssim, lambda a, b: fid.load_lpips(str(made_weights), meta)(a.float(), b.float())):
            assert score(x, x).shape == (len(x),)

def test_the_probe_is_fitted_on_the_device(meta, monkeypatch):
    seen, z, y = [], torch.randn(9, 2, 3), torch.arange(9) % 4
    monkeypatch.setattr(torch.optim.LBFGS, "step", lambda self, objective: seen.append(objective()))
    with pytest.raises(RuntimeError, match="meta"):  # the accuracy is read back
        fid.linear_probe(z, y, z, y, 4, META)
    assert seen[0].is_meta and seen[0].dtype == torch.float64

# ---- Closed forms

@torch.no_grad()
def test_weights_begin_as_released():
    """A deviation of 0.02 (torch cuts at +-2: never); behind a norm, of 0.02 sqrt(D) = 0.55."""
    cfg = tokenizer.ModelConfig(size=64, patch=16, width=768, depth=2, heads=12, channels=32, decoder="modulated")
    model = tokenizer.Tokenizer(cfg, {"hog": 108})
    for name, m in ((name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)):
        std, w = 0.0 if "modulation" in name else 0.02, m.weight
        assert w.abs().max() <= 10 * std and float(w.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * w.numel())), name
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.68  # mean square of photos: 0.46
    assert float(model.encode(x).std()) == pytest.approx(0.58, abs=0.06)
    assert float(F.mse_loss(model(x)["recon"], x)) == pytest.approx(0.77, abs=0.04)

def test_random_crops_are_pillows_and_shared_out():
    x, rng = torch.rand(300, 3, 40, 40) * 2 - 1, partial(ONE.rng, 0, "augmentation", 3, 5)
    crop = lambda *rows: tokenizer.random_crop(x[slice(*rows)], 32, 300, slice(*rows), rng())
    assert torch.equal(crop(0, 300), torch.cat([crop(0, 150), crop(150, 300)]))
    sides = (draw := rng()).integers(32, 41, 300)
    tops, lefts = draw.integers(0, sides - 31, (2, 300))
    assert set(sides) == set(range(32, 41)) and set(tops) == set(lefts) == set(range(9))
    for i, (side, top, left) in enumerate(zip(sides[:20], tops, lefts)):
        picture = np.array(Image.fromarray(x[i, 1].numpy()).resize((side, side), Image.BICUBIC))
        near(crop(0, 300)[i, 1], torch.from_numpy(picture[top:top + 32, left:left + 32]).clamp(-1, 1), 1e-5)

def test_layers_add_up_in_fp32_under_bf16():
    """What enters a layer is fp32, as are velocity, reconstruction and the features of HOG."""
    seen, x = [], torch.randn(2, 3, 16, 16)
    nets = [(diffusion.SiT(4, 6, 3, 24, 1, 2, style), torch.randn(2, 4, 6), torch.rand(2), torch.arange(2)) for style in diffusion.STYLES]
    for fields in ({}, {"latents": 0}, {"positions": "table"}, {"decoder": "modulated"}):
        cfg = tokenizer.ModelConfig(**{"size": 16, "patch": 8, "width": 24, "heads": 2} | fields)
        nets.append((tokenizer.Tokenizer(cfg, {"hog": 108}), x))
    for net, *inputs in nets:
        for m in net.modules():
            if isinstance(m, (tokenizer.Block, diffusion.SiTBlock)):
                m.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            out = net(*inputs)
        seen.append((out["recon"] if isinstance(out, dict) else out).dtype)
    assert len(seen) > 20 and set(seen) == {torch.float32}

def test_micro_batches_are_of_one_size():
    net = torch.nn.Linear(1, 1)
    for batch, micro in itertools.product(range(1, 40), range(41)):
        parts = [part for part, share in ONE.micro_batches(net, batch, micro)]
        assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
        sizes = {part.stop - part.start for part in parts}
        assert len(sizes) == 1 and sizes.pop() <= (micro or batch)

def test_masks_are_drawn_as_the_paper_says():
    mask = tokenizer.random_mask(64, 16, 0.45, torch.Generator().manual_seed(0))
    assert (mask.sum(1) == math.ceil(16 * 0.45)).all() and mask.float().mean(0).std() < 0.15  # each place is as likely
    ratios = [tokenizer.sample_mask_ratio(0.4, 0.6, ONE.rng(0, "mask ratio", step)) for step in range(4000)]
    quartiles = np.quantile(ratios, [0, 0.25, 0.5, 0.75, 1])
    assert quartiles == pytest.approx([0.4, 0.457, 0.508, 0.555, 0.6], abs=0.006)

def shaken(model, seed=0):
    """A network whose parameters are all random, also those that start at zero."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=g)
    return model

def test_autoguidance_and_the_interval_of_guidance():
    model, guide = (shaken(diffusion.SiT(4, 3, 5, 16, 1, 2), seed) for seed in (0, 1))
    x, y = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([1, 4])
    good, null, bad = (diffusion.guided_velocity(net, labels)(x, 0.5) for net, labels in (
        (model, y), (model, torch.tensor([5, 5])), (guide, y)))
    for settings, other, expected in (((3.0, 0.0, 0.4), None, good), ((3.0, 0.5, 0.5), None, null + 3 * (good - null)),
            ((3.0,), guide, bad + 3 * (good - bad)), ((3.0, 0.6, 1.0), guide, good), ((3.0,), model, good)):
        close(diffusion.guided_velocity(model, y, *settings, guide=other)(x, 0.5), expected, 1e-5)
    assert (good - null).abs().max() > 1e-3

def test_lightning_places_tokens_by_sines_and_by_rope_and_qk_norm_is_a_choice():
    for style, norm, mlp in (("sit", torch.nn.LayerNorm, tokenizer.Mlp), ("lightning", torch.nn.RMSNorm, diffusion.SwiGlu)):
        plain, normed = (diffusion.SiT(6, 3, 5, 24, 1, 2, style, qk_norm).blocks[0] for qk_norm in (False, True))
        assert [type(plain.attn.q_norm), type(normed.attn.k_norm), type(plain.mlp)] == [torch.nn.Identity, norm, mlp]
    net, order = shaken(diffusion.SiT(6, 3, 5, 24, 2, 2, style="lightning")), torch.tensor([1, 0, 2, 3, 4, 5])
    x, t, y = torch.randn(2, 6, 3), torch.rand(2), torch.tensor([0, 5])
    sines, (cos, sin) = net.pos_embed.data, net.rope
    for a, b in ((0, 1), (1, 0), (0, 0)):  # sines, RoPE
        net.pos_embed.data, net.rope = a * sines, torch.stack([b * cos + 1 - b, b * sin])
        assert ((net(x[:, order], t, y) - net(x, t, y)[:, order]).abs().max() > 2e-5) == (a + b > 0)
    opposite = diffusion.velocity_loss(lambda *_: -x, x * 0, x, t, y, "linear", 0.5)
    close(opposite, (4 * x.square() + 1).mean((1, 2)), 1e-5)  # half of one minus the cosine, which is -1

def test_moments_are_exact_and_ssim_is_that_of_skimage():
    features = 3 * torch.randn(3000, 7)
    mean, cov = moments(features, 1000)
    close(cov, torch.cov(features.double().T), 1e-4)
    for size in (1, 333):  # neither order nor batches move a bit
        again = moments(features[torch.randperm(3000)], size)
        assert torch.equal(again[0], mean) and torch.equal(again[1], cov)
    refused(fid.frechet_distance, mean * math.nan, cov, mean, cov, message="not finite")
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    b = (a.int() + 10).clamp(max=255).to(torch.uint8)
    for x, y, p, s in zip(a.numpy(), b.numpy(), fid.psnr(a, b), fid.ssim(a, b)):
        assert p == pytest.approx(metrics.peak_signal_noise_ratio(x, y), rel=1e-9)
        theirs = metrics.structural_similarity(x, y, channel_axis=0, gaussian_weights=True, sigma=1.5,
                                               use_sample_covariance=False, data_range=255)
        assert s == pytest.approx(theirs, abs=1e-6)
        x, y = x / 127.5 - 1, y / 127.5 - 1
        theirs = metrics.structural_similarity(x, y, channel_axis=0, data_range=2.0)  # as in the paper's evaluation
        assert fid.ssim(*(torch.tensor((z + 1) * 127.5)[None] for z in (x, y)), flat=True) == pytest.approx(theirs, abs=1e-6)

def test_a_tap_of_zeros_has_a_gradient_in_lpips(made_weights):
    net = fid.load_lpips(str(made_weights), ONE)
    net.stages = torch.nn.ModuleList(torch.nn.Identity() for _ in net.stages)  # taps are the images
    net.heads = torch.nn.ParameterList(head[:, :3] for head in net.heads)
    x = net.rgb[0].expand(2, 3, 32, 32).clone().requires_grad_()  # normalised: 0 in every channel
    net(x, torch.rand(2, 3, 32, 32)).sum().backward()
    assert x.grad.isfinite().all()

def test_a_transformer_of_so400ms_widths_gives_the_features_of_plain_operations():
    at, shapes = "encoder.layers.0.", {"embeddings.patch_embedding": (1152, 3, 14, 14), "post_layernorm": (1152,)}
    shapes |= {f"{at}self_attn.{n}_proj": (1152, 1152) for n in ("q", "k", "v", "out")}
    shapes |= {f"{at}mlp.fc1": (4304, 1152), f"{at}mlp.fc2": (1152, 4304)} | {f"{at}layer_norm{i}": (1152,) for i in (1, 2)}
    w = {name: (0.02 * torch.randn(shape), 0.02 * torch.randn(shape[0])) for name, shape in shapes.items()}
    position, x = 0.02 * torch.randn(4, 1152), torch.randn(2, 3, 28, 28)
    weights = {f"vision_model.{name}.{part}": value for name, pair in w.items() for part, value in zip(("weight", "bias"), pair)}
    weights["vision_model.embeddings.position_embedding.weight"] = position
    net, released = (fid.VisionTransformer(weights, "siglip", resample=patch) for patch in (0, 16))

    norm = lambda x, name: F.layer_norm(x, (1152,), *w[name], 1e-6)
    tokens = F.conv2d(x, *w["embeddings.patch_embedding"], stride=14).flatten(2).mT + position
    h = norm(tokens, f"{at}layer_norm1")
    q, k, v = (F.linear(h, *w[f"{at}self_attn.{n}_proj"]).view(2, 4, 16, 72).transpose(1, 2) for n in "qkv")
    h = ((q @ k.mT / 72**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    tokens = tokens + F.linear(h, *w[f"{at}self_attn.out_proj"])
    h = F.linear(norm(tokens, f"{at}layer_norm2"), *w[f"{at}mlp.fc1"])
    tokens = tokens + F.linear(F.gelu(h, approximate="tanh"), *w[f"{at}mlp.fc2"])
    close(net(x), norm(tokens, "post_layernorm"), 1e-5)
    close(released.normalise(x), (x - fid.IMAGENET[0]) / fid.IMAGENET[1], 1e-6)
    x = x[..., :14, :14]  # a patch; resized, it gives the same
    close(released.patch_embed(F.interpolate(x, 16, mode="bicubic", antialias=True)), net.patch_embed(x), 1e-4)

def test_mixtures_and_probe():
    g = torch.Generator().manual_seed(0)
    modes = torch.tensor([[1.0, 1, 0], [-1, 1, 0], [1, -1, 0], [-1, -1, 1]]) * 6
    y, v = torch.randint(4, (2000,), generator=g), torch.randint(4, (1000,), generator=g)
    train, val = (modes[labels] + torch.randn(len(labels), 3, generator=g) for labels in (y, v))
    assert fid.linear_probe(train, y, val, v, 4) > 0.95 and fid.linear_probe(train, y.roll(1), val, v, 4) < 0.5
    curve = fid.gmm_nll_curve(train, val, 3, (1, 2, 4, 8))
    assert curve == fid.gmm_nll_curve(train, val, 3, (1, 2, 4, 8))  # a function of the seed
    assert curve[1] > curve[2] + 0.1 > curve[4] + 0.2 and abs(curve[4] - curve[8]) < 0.02
    weights, means, covariances = fid.fit_gmm(train, 4)
    exact = torch.distributions.MultivariateNormal(means, covariances).log_prob(val.double()[:, None]) + weights.log()
    close(fid.gmm_log_prob(val.double(), weights, means, covariances), exact, 1e-9)
    weights, means, variances = fid.fit_gmm(train, 4, diagonal=True)  # the modes as they were made
    nearest = torch.cdist(modes.double(), means).min(1)
    assert nearest.values.max() < 0.2 and nearest.indices.sort().values.tolist() == [0, 1, 2, 3]
    close(variances, torch.ones(4, 3) + 1e-3, 0.15)
    exact = torch.distributions.MultivariateNormal(means, torch.diag_embed(variances)).log_prob(val.double()[:, None])
    close(fid.gmm_log_prob(val.double(), weights, means, variances), exact + weights.log(), 1e-9)
    assert fid.gmm_nll_curve(train, val, 3, (4,), diagonal=True)[4] == pytest.approx(curve[4], abs=0.01)

def test_neighbours_on_the_sphere_and_ambiguous_velocities():
    a, b = torch.eye(3)[:2]
    close(fid.interpolate(a[None], b[None])[0], (a + b) / 2**0.5)  # slerp of orthogonal vectors
    close(fid.interpolate(2 * a[None], a[None])[0], 1.5 * a)  # linear where the angle is 0
    z = torch.cat([torch.randn(500, 16), torch.randn(10, 16) / 10 + 5])  # the ten nearest, by cosine
    v = torch.full((2000, 16), 5.0)
    mixed = fid.interpolate(v, z)
    assert len(mixed.unique(dim=0)) == 10 and F.cosine_similarity(mixed, v).min() > 0.99

    m, t = 0.8, 0.6  # two points: Var[x | x_t] = 4 m^2 p (1 - p)
    x_t = torch.linspace(-6, 6, 20_001).double()
    density = torch.stack([(-((x_t - (1 - t) * s * m) ** 2) / (2 * t**2)).exp() for s in (-1, 1)])
    p = density[0] / density.sum(0)
    exact = (4 * m**2 * p * (1 - p) * density.sum(0)).sum() / density.sum() / t**2
    points = torch.tensor([[-m], [m]])
    assert fid.velocity_variance(points, t, 200_000) == pytest.approx(exact.item(), rel=0.01)
    assert fid.velocity_variance(points, 0.05) < 1e-9  # nothing is ambiguous near the data

def test_muon_is_torchs_and_the_learning_rate_follows_its_schedule():
    """Matrices of a shape orthogonalised together give what torch does one by one, up to bf16; its state, too."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((48, 16), (16, 16), (16, 64), (48, 16), (9, 9))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine, torchs = data.Muon(ours, 0.02, 0.5), torch.optim.Muon(theirs, 0.02, 0.5)
    for step in range(5):
        for i, (one, two) in enumerate(zip(ours, theirs)):  # one without gradient now and then, one always
            one.grad = two.grad = None if (step, i) in ((0, 0), (2, 3)) or i == 4 else torch.randn_like(one)
        mine.step()
        torchs.step()
        for one, two in zip(ours, theirs):
            assert (one - two).abs().max() < 2e-3 and (one - two).abs().mean() < 2e-4  # of updates of 5e-3
        if step == 1:
            mine.load_state_dict(copy.deepcopy(torchs.state_dict()))  # a checkpoint that torch's left
    x, (a, b, c) = torch.randn(2, 48, 16), torchs.param_groups[0]["ns_coefficients"]
    s = torch.linalg.svdvals(x / x.norm(dim=(1, 2), keepdim=True)).double()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    close(torch.linalg.svdvals(data.orthogonalise(x, (a, b, c), 5)), s.sort(descending=True).values, 1e-4)  # bf16 misses it
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        cfg, dist = tokenizer.Config(), dataclasses.replace(ONE, precision=precision)
        assert data.make_optimizers(tokenizer.Tokenizer(cfg), cfg, dist)[1].dtype == dtype
    for schedule, end in (("constant", 1.0), ("cosine", 0.1), ("linear", 0.1)):
        rates = [data.lr_schedule(step, 100, 10, schedule) for step in range(101)]
        assert rates[:10] == pytest.approx(np.arange(1, 11) / 10) and rates[100] == pytest.approx(end)
        assert all(np.diff(rates[10:]) <= 0)

def test_frechet_in_closed_form_against_scipy_and_masks_hide():
    eye, zero, rng = torch.eye(6), torch.zeros(6), np.random.default_rng(0)
    assert fid.frechet_distance(zero, 4 * eye, zero + 2, 9 * eye) == pytest.approx(24 + 6 * (2 - 3) ** 2)
    a, b = (m @ m.T + np.eye(20) for m in rng.normal(size=(2, 20, 20)))
    expected = np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert fid.frechet_distance(np.zeros(20), a, np.zeros(20), b) == pytest.approx(expected, rel=1e-9)
    model, x, mask = tokenizer.Tokenizer(tokenizer.Config()).eval(), torch.rand(2, 3, 32, 32), torch.arange(16).expand(2, 16) < 9
    hidden = torch.where(mask[..., None], torch.randn(2, 16, 192), tokenizer.patchify(x, 8))
    other = tokenizer.unpatchify(hidden, 8)              # other pixels where the mask is: the latents are the same
    torch.testing.assert_close(model.encode(x, mask), model.encode(other, mask))
    assert not torch.allclose(model.encode(x), model.encode(other))

def test_center_crop_follows_adm():
    image = Image.fromarray((np.indices((100, 300)).sum(0) % 256).astype(np.uint8)).convert("RGB")
    by_hand = image.resize((150, 50), Image.Resampling.BOX).resize((96, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(data.center_crop(image, 32)), np.asarray(by_hand.crop((32, 0, 64, 32))))

# ---- Data

def both(folder, size=0) -> list[data.ImageSet]:
    """The splits of a data set, as the next process would read them."""
    data.prepare.cache_clear()
    return [data.ImageSet(str(folder), size, split) for split in ("train", "val")]

def make_folder(root, n=30, classes=("cat", "dog"), size=20) -> Path:
    for k, i in itertools.product(range(len(classes)), range(n)):
        file = Path(root, classes[k], f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size, 3), (8 * i % 256, 100 * k, 40), np.uint8)).save(file)
    return Path(root)

def times(folder) -> dict:
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*.npy")}

def test_shapes_are_a_pure_function_and_batches_share_them_out(cache):
    """Also: a linear model on the pixels knows a little, not all. Batches cover an epoch, disjoint across processes."""
    x, y = data.render_shapes(np.arange(40), 32)
    assert torch.equal(data.render_shapes(np.array([17, 3]), 32)[0], x[[17, 3]])
    (make_folder("shapes", 1) / "packed.json").write_text("{}")  # the name wins, also in later stages; a run may lie there
    train, val = (data.ImageSet("shapes", 32, split, "shapes/run") for split in ("train", "val"))
    assert (len(train), len(val), train.classes, train.data) == (20_000, 2_000, list(data.SHAPES), "shapes")
    assert torch.equal(train[np.arange(40)], x) and torch.equal(train.labels[:40], y)
    pixels = [data.to_float(s[np.arange(n)]).flatten(1) for s, n in ((train, 8000), (val, 2000))]
    assert 0.15 < fid.linear_probe(pixels[0], train.labels[:8000], pixels[1], val.labels, 10, iterations=20) < 0.45
    seen = np.concatenate([data.batch_indices(103, 10, 7, step) for step in range(31)])[:309].reshape(3, 103)
    assert (np.sort(seen) == np.arange(103)).all() and not np.array_equal(seen[0], seen[1])
    dists = ONE, data.Dist(0, 2), data.Dist(1, 2)
    whole, *halves = (data.to_uint8(data.Loader(train, 8, 0, dist)(3)[0]) for dist in dists)
    assert torch.equal(whole, torch.cat(halves))
    x = train[data.batch_indices(len(train), 8, 0, 3)]
    kept, mirrored = ((whole == view).flatten(1).all(1) for view in (x, x.flip(3)))
    assert (kept ^ mirrored).all() and kept.any() and mirrored.any()

@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "jpg"), ("L", "JPEG"), ("CMYK", "jpg"), ("RGB", "png"), ("RGBA", "PNG"), ("P", "gif"), ("LA", "png"),
    ("1", "png"), ("I;16", "png"), ("CMYK", "tif"), ("YCbCr", "tif"), ("F", "tif"), ("RGB", "bmp"), ("RGB", "webp")])
def test_every_kind_of_image(mode, suffix):
    ramp = np.linspace(0, 255, 40 * 30).reshape(30, 40)
    picture = Image.fromarray((ramp * 257).astype(np.uint16) if mode == "I;16" else ramp.astype(np.uint8)).convert(mode)
    if mode == "RGBA":
        picture.putalpha(0)
    picture.save(f"a.{suffix}")
    x = data.read_image(f"a.{suffix}", 16)
    assert x.shape == (16, 16, 3) and x.dtype == np.uint8
    if mode == "RGBA":
        assert (x == 255).all()  # transparent on white
    else:
        assert x[0].mean() < 60 and x[-1].mean() > 190  # the ramp, at 8 bits

def test_a_folder_is_packed_split_and_reread(cache):
    root = make_folder("my pictures")
    train, val = both(root, 16)
    assert (len(train), len(val), train.classes) == (57, 3, ["cat", "dog"])
    assert (train[np.arange(57)][:, 1, 8, 8] == 100 * train.labels).all()
    data.pack(root, 16, Path("packed"))
    again, _ = both("packed")
    assert torch.equal(again[np.arange(57)], train[np.arange(57)]) and again.fingerprint == train.fingerprint
    refused(both, "packed", 32, message="16 px, not --size 32")
    Image.new("RGB", (20, 20)).save(root / "cat/new.png")  # a changed folder is packed anew
    assert sum(map(len, both(root, 16))) == 61  # a black picture is a picture
    refused(data.pack, root, 16, Path("packed"), message="was made of other")
    shutil.rmtree(root)
    refused(both, root, 16, message="no such folder")

def test_shards_are_shared_out_and_those_of_other_content_refused(monkeypatch):
    rows, calls = np.random.default_rng(0).integers(0, 256, (47, 3, 2), dtype=np.uint8), []
    def shards(folder, made_of="this", dist=ONE):
        return data.make_shards(Path(folder), 47, 10, lambda a, b: calls.append(a) or rows[a:b], made_of, dist, "")
    found = shards("one")
    for index in (np.arange(47), np.array([46, 0, 10, 9, 9])):
        assert found.shape[0] == 47 and np.array_equal(found[index], rows[index])
    refused(shards, "one", "that", message="was made of other")
    monkeypatch.setattr(data.Dist, "barrier", lambda self: None)
    Path("two").mkdir()
    refused(shards, "two", "this", data.Dist(1, 2), message="two")  # the other's are not there yet
    shards("two", "this", data.Dist(0, 2))
    assert calls == [0, 10, 20, 30, 40, 10, 30, 0, 20, 40]
    assert_same("one", "two", *os.listdir("one"))
    sample.save_npz(Path("x.npz"), found, classes=np.array(["a", "bc"]))
    z = content_of("x.npz")
    assert np.array_equal(z["arr_0"], rows) and list(z["classes"]) == ["a", "bc"]

def test_packing_goes_on_where_it_was_cut_and_memory_does_not_grow(monkeypatch):
    """Peak of what numpy and Python allocate, in packing a folder and in writing an npz of it, at two sizes."""
    root, honest, seen, peaks = make_folder("x", 300), data.read_image, [], []
    def cut(path, size):
        seen.append(path)
        if len(seen) == 250:
            raise KeyboardInterrupt
        return honest(path, size)
    monkeypatch.setattr(data, "SHARD", 100 * 3 * 8**2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "read_image", cut)
        data.pack(root, 8, "out", 1)
    before = times("out")
    Path("out/images/00003-cut.npy.1.part").write_bytes(b"\x93NUM")  # a kill left it
    data.pack(root, 8, "out", 1)
    data.pack(root, 8, "whole")
    assert len(before) == 2 and before.items() <= times("out").items()
    assert_same("whole", "out", "images", "labels.npy", "packed.json")
    monkeypatch.setattr(data, "SHARD", 20 * 3 * 160**2)
    for i, n in enumerate((60, 60, 240)):  # the first time also loads code
        make_folder(f"folder {i}", n, ("all",))
        tracemalloc.start()
        data.pack(f"folder {i}", 160, f"packed {i}", 2)
        sample.save_npz(Path(f"{i}.npz"), data.Shards(sorted(Path(f"packed {i}/images").glob("*.npy"))))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1]

@pytest.fixture
def server(tmp_path):
    """Serves the folder `served`; the first answer for a name in `broken` stops half way."""
    broken, served = set(), tmp_path / "served"
    served.mkdir()
    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            content, name = source.read(), Path(self.path).name
            outputfile.write(content[:len(content) // 2] if name in broken else content)
            broken.discard(name)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=served))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield served, f"http://127.0.0.1:{httpd.server_port}/", broken
    httpd.shutdown()

def test_named_sets_are_downloaded_checked_and_read(server, tmp_path, monkeypatch):
    served, url, _ = server
    monkeypatch.setenv("MAETOK_CACHE", str(tmp_path / "cache"))
    def publish(name, archive, members: dict[str, bytes]):
        with tarfile.open(served / archive, "w:gz") as tar:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        monkeypatch.setattr(data, name, (url + archive, hashlib.sha256((served / archive).read_bytes()).hexdigest()))
    rows = np.random.default_rng(0).integers(0, 256, (60, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(60) % 10
    names = [f"x/{name}.bin" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
    members = {name: part.tobytes() for name, part in zip(names, np.split(rows, 6))}
    publish("CIFAR10", "made.tar.gz", members | {"x/batches.meta.txt": "\n".join("abcdefghij").encode()})
    with monkeypatch.context() as patch:
        patch.setattr(data, "CIFAR10", (url + "made.tar.gz", "0" * 64))
        refused(both, "cifar10", 32, message="invalid hash")
    assert not os.listdir("cache")
    train, val = both("cifar10", 32)
    assert (len(train), len(val), train.classes) == (50, 10, list("abcdefghij"))
    assert np.array_equal(train[np.arange(50)].flatten(1).numpy(), rows[:50, 1:])
    picture = io.BytesIO()
    Image.new("RGB", (40, 30)).save(picture, "JPEG")
    names = [f"imagenette2-320/{split}/n01/a.JPEG" for split in ("train", "val")]
    publish("IMAGENETTE", "good.tgz", dict.fromkeys(names, picture.getvalue()))
    assert [len(part) for part in both("imagenette", 16)] == [1, 1]

def test_pretrained_weights_are_found_fetched_checked_or_asked_for(server, monkeypatch):
    served, url, broken = server
    weights, folder, net = {"a": torch.arange(5000.0)}, Path("w"), url + "net.pth"
    torch.save(weights, served / "net.pth")
    sha256 = hashlib.sha256((served / "net.pth").read_bytes()).hexdigest()[:8]
    known = {"with hash": (net, sha256), "without": (net, ""), "wrong": (net, "0" * 8),
             "gone": ("http://127.0.0.1:9/gone.pth", "")}
    monkeypatch.setattr(fid, "WEIGHTS", known)
    def fetch(name, at=folder):
        return torch.equal(fid.pretrained(name, str(at), ONE, "--lpips 0")["a"], weights["a"])
    for name, message in (("wrong", "invalid hash"), ("gone", "refused")):
        said = refused(fetch, name, message=message)
        assert all(part in said for part in (known[name][0], f"w/{name}.pth", "--weights", "do without: --lpips 0"))
    broken.add("net.pth")  # no hash is known, but half a file is not taken
    refused(fetch, "without", message="without.pth: ")
    assert not list(folder.iterdir()) and fetch("without") and fetch("with hash")
    (served / "net.pth").unlink()
    assert fetch("without")  # not fetched again
    (folder / "gone.pth").write_bytes(b"half")
    refused(fetch, "gone", message="gone.pth is not a file of weights")
    write_safetensors(folder / "wrong.safetensors", weights)
    assert fetch("wrong")
    refused(fetch, "without", folder / "gone.pth/below", message=str(folder / "gone.pth"))

def test_safetensors_are_read_and_refused():
    path, body = Path("x.safetensors"), np.arange(24, dtype=np.uint8).tobytes()
    def read(dtype, shape, start=0, stop=24, length=0, pad=0):
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        text = json.dumps({"__metadata__": {}, "a": entry}).encode() + b" " * pad
        path.write_bytes((length or len(text)).to_bytes(8, "little") + text + body)
        return fid.read_weights(path)["a"]
    kinds = {"F32": np.float32, "I64": np.int64, "F16": np.float16}
    for pad, (dtype, kind) in itertools.product(range(4), kinds.items()):  # at odd addresses, too
        expected = np.frombuffer(body, kind)
        assert np.array_equal(read(dtype, [len(expected)], pad=pad).numpy(), expected, equal_nan=True)
    assert read("BF16", [3, 4], 0, 24).dtype == torch.bfloat16 and read("F32", [], 0, 4).shape == ()
    for case in (("F32", [4], 0, 12), ("F33", [3], 0, 12), ("F32", [4], 12, 28), ("F32", [6], 0, 24, 2**62)):
        refused(read, *case, message="x.safetensors is not a file of weights")

# ---- What a folder means, and what a file holds: nothing silently wrong

FOLDERS = {  # files, and the classes, counts and words of the listing
    "bus/0-19 car/0-19 train/0-19": (["bus", "car", "train"], 57, 3, "one in twenty"),
    "Train/x/0-3 Train/y/0-3 TEST/x/0-1 TEST/y/0": (["x", "y"], 8, 3, "from TEST/"),
    "training/x/0-3 validation/x/0": (["x"], 4, 1, "from validation/"),
    "train/x/0-39 valid/x/0-1": (["x"], 40, 2, "from valid/"), "train/0-7 test1/0-3": (["all"], 8, 4, "from test1/"),
    "train/x/0-3 val/x/0 test/x/0-9 0-8": (["x"], 4, 1, "left out: 10 images in test/, 9 loose images"),
    "Training/x/0-3 Testing/x/0 __MACOSX/x/0": (["x"], 4, 1, "(from Testing/); left out: nothing"),
    "train/0-19": (["all"], 19, 1, "one in twenty"), "0-39": (["all"], 38, 2, "one in twenty"),
    "x/0-9 y/0-9 empty/ unknown/a.txt": (["empty", "unknown", "x", "y"], 19, 1, "left out: 1 .txt"),
    "x/0 y/0 z/0": (["x", "y", "z"], 3, 1, "one in twenty"), "0": (["all"], 1, 1, "one in twenty"),
    "a/b.heic c/d/0-3 c/d/...e.png": (["d"], 4, 1, "left out: 1 .heic"), "trainSet/trainSet/0 testSet/0": "have other names",
    "x/train1/0 x/test1/0 y/0": "splits lie inside x/", "tests/tests/x/0 train_set/train_set/x/0 test_set/x/0": "have other names",
    "x/0-9 b.heic c.CR2 .hidden.png .git/0": (["x"], 9, 1, "left out: 1 .cr2, 1 .heic"),
    "flowers/rose/0-9 flowers/tulip/0-9 flowers/readme.txt": (["rose", "tulip"], 19, 1, "x/flowers: 2 classes"),
    "zip/train/x/0-3 zip/val/x/0": (["x"], 4, 1, "from val/"), "x/train/0 x/test/0 y/train/0": "splits lie inside x/",
    "#tag/0-3 @user/0-3 $100/0-3 x/__a.png": (["#tag", "$100", "@user", "x"], 12, 1, "left out: nothing"),
    "train/x/0-3 val/0": "val/0.png lies in no class folder", "x/0 loose.png": "loose.png lies in no class folder",
    "train/x/0 val/z/0": "val/z/0.png lies in no class folder", "a.txt b.txt": "no images found below it; left out: 2 .txt"}

@pytest.mark.parametrize("files", FOLDERS)
def test_what_a_folder_means(files, capsys):
    for word in files.split():
        folder, _, name = word.rpartition("/")
        Path("x", folder).mkdir(parents=True, exist_ok=True)
        first, _, last = name.partition("-")
        names = [f"{i}.png" for i in range(int(first), int(last or first) + 1)] if first.isdigit() else [name] * bool(name)
        [Image.new("RGB", (20, 20)).save(Path("x", folder, name), "PNG") for name in names]
    if isinstance(expected := FOLDERS[files], str):
        refused(data.list_folder, Path("x"), message=expected)
        return
    listing = data.list_folder(Path("x"))
    assert (listing.classes, listing.n_train, len(listing.files) - listing.n_train) == expected[:3]
    assert expected[3] in f"{capsys.readouterr().out}{listing.root}: {listing.summary}"
    assert all(listing.classes[label] in (*Path(path).parts[:-1], "all") for path, label in listing.files)
    counts = np.bincount([label for _, label in listing.files[:listing.n_train]], minlength=len(listing.classes))
    assert [name for name, n in zip(listing.classes, counts) if not n] == [n for n in listing.classes if n in ("empty", "unknown")]

def test_links_pipes_and_the_folder_of_the_run(cache, monkeypatch):
    """Two links to one folder are two classes; a loop ends; what is no file is named and never opened."""
    root = make_folder(Path("x").absolute(), 10)
    (root / "also cat").symlink_to(root / "cat")
    (root / "cat/loop").symlink_to(root)
    (root / "dog/broken.png").symlink_to("nowhere")
    os.mkfifo(root / "dog/pipe.png")
    listing = data.list_folder(root)
    assert listing.classes == ["also cat", "cat", "dog"] and len(listing.files) == 30
    assert "pipe.png' (no file)" in listing.summary and "broken.png' (no file)" in listing.summary
    for i, j in itertools.product(range(9), repeat=2):  # folders that link to each other: no end of ways
        Path(f"links/{i}").mkdir(parents=True, exist_ok=True)
        Path(f"links/{i}/{j}").symlink_to(Path(f"links/{j}").absolute())
    Image.new("RGB", (9, 9)).save("links/0/a.png")
    assert data.list_folder(Path("links")).files
    refused(data.ImageSet, str(root), 16, "train", str(root / "out"), message="lies inside --data")
    refused(data.pack, root, 16, root / "packed", message="lies inside --data")
    ONE.save(Path("own/labels.npy"), {"the user's": 1})
    for folder in (root, "own"):  # it would overwrite
        refused(data.pack, make_folder("raw", 3), 16, folder, message="which data.py did not write")
    monkeypatch.chdir(root)
    refused(call, "tokenizer --data .", message="lies inside --data")
    assert not (root / "out").exists()
    call("data --data .")  # says what the folder means, and writes nothing
    assert not list(root.rglob("*.npy"))

def test_a_cache_is_renewed_and_pixels_are_the_identity(cache, capsys):
    root = make_folder("x", 12)
    before, _ = both(root, 16)
    shutil.copytree(root, "y", copy_function=shutil.copy)  # other times, other place: the same data
    assert both("y", 16)[0].fingerprint == before.fingerprint
    for path in root.rglob("*.png"):  # edited in place, with the size and the name they had
        pixels, size = np.asarray(Image.open(path)), path.stat().st_size
        Image.fromarray(255 - pixels).save(path)
        path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
    after, _ = both(root, 16)
    assert after.fingerprint != before.fingerprint
    for i, row in enumerate(after.index):
        path = data.list_folder(root).files[row][0]
        assert np.array_equal(after[np.array([i])][0].permute(1, 2, 0), data.read_image(root / path, 16))
    cat, dog, aside = (root / name for name in ("cat/1.png", "dog/1.png", "aside.png"))
    for path in (cat, dog):  # as large and as old
        path.write_bytes(path.read_bytes().ljust(2000, b"\0"))
        os.utime(path, (0, 0))
    exchanged = both(root, 16)[0].fingerprint
    [old.rename(new) for old, new in ((cat, aside), (dog, cat), (aside, dog))]
    assert both(root, 16)[0].fingerprint != exchanged
    [shutil.copy(path, path.with_suffix(".PNG")) for path in make_folder("z", 4).rglob("*.png")]
    Path("z/meta.json").write_text("{}")  # the user's own
    assert len(both("z", 16)[0]) == 15 and "1 images are in training and validation" in capsys.readouterr().out
    data.pack("z", 16, "packed")
    refused(data.pack, "packed", 16, "again", message="no images found below it; left out: 1 .json")
    Path("packed/packed.json").write_text('{"format": "another"}')
    refused(both, "packed", 16, message="its format is another")

def test_twenty_thousand_classes_are_listed_at_once(monkeypatch):
    names = [f"{i:05d}" for i in range(20_000)]
    [Path("x", name).mkdir(parents=True) for name in names]
    monkeypatch.setattr(data, "find_images", lambda root: ([f"{root}/{name}/{i}.png" for name in names for i in "ab"], []))
    begin = time.perf_counter()
    assert data.list_folder(Path("x")).classes == names
    assert time.perf_counter() - begin < 3  # a search in a list takes longer

def test_packing_that_is_cut_while_the_folder_changes_holds_one_listing(cache, monkeypatch):
    root, honest, count = make_folder("x", 100), data.read_image, itertools.count()
    monkeypatch.setattr(data, "SHARD", 40 * 3 * 16**2)
    def cut(path, size):
        if next(count) % 120 == 119:
            raise KeyboardInterrupt
        return honest(path, size)
    monkeypatch.setattr(data, "read_image", cut)
    for change in (None, "add", "remove"):
        if change == "add":
            shutil.copy(root / "dog/5.png", root / "cat/000.png")
        if change == "remove":
            (root / "cat/000.png").unlink()
        with pytest.raises(KeyboardInterrupt):
            both(root, 16)
    monkeypatch.setattr(data, "read_image", honest)
    images, _ = both(root, 16)
    assert (images[np.arange(len(images))][:, 1, 8, 8] == 100 * images.labels).all() and len(images) == 190

def grey_png(path: Path, values: np.ndarray, bits: int, key: int) -> None:
    """A grey PNG of few or many bits with a transparent value, which Pillow cannot write."""
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    rows = values.astype(">u2").view(np.uint8).reshape(len(values), -1) if bits == 16 else np.stack(
        [np.bitwise_or.reduce([row[i::8 // bits] << (8 - bits * (i + 1)) for i in range(8 // bits)]) for row in values])
    head = values.shape[1].to_bytes(4, "big") + values.shape[0].to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    body = zlib.compress(b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"tRNS", key.to_bytes(2, "big"))
                     + chunk(b"IDAT", body) + chunk(b"IEND", b""))

def test_orientation_transparency_and_deep_pixels(capsys):
    rgb, _ = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)), data.say_once.cache_clear()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        rgb.save(Path("a.png"), exif=exif)
        turned = np.asarray(ImageOps.exif_transpose(Image.open(Path("a.png"))))
        assert np.array_equal(data.read_image(Path("a.png"), 0), turned)
        assert turned.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
        for mode in ("L", "RGBA", "CMYK"):  # without compression Pillow maps a file that it opens by its name
            (plain := rgb.convert(mode)).save(Path("a.tif"), exif=exif)
            turn = {6: Image.ROTATE_270, 8: Image.ROTATE_90}.get(orientation)
            assert turn is None or np.array_equal(data.read_image("a.tif", 0), plain.transpose(turn).convert("RGB"))
    rgb.save(Path("b.png"), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")  # a damaged tag
    assert np.array_equal(data.read_image(Path("b.png"), 0), np.asarray(rgb))
    for bits, key, other, grey in ((2, 1, 2, 170), (4, 3, 5, 85), (8, 9, 77, 77), (16, 257 * 3, 257 * 200, 200)):
        values = np.full((8, 8), other, np.uint16 if bits == 16 else np.uint8)
        values[2:4] = key
        grey_png(Path("g.png"), values, bits, key)
        pixels = data.read_image(Path("g.png"), 0)
        assert (pixels[2:4] == 255).all() and (pixels[5:] == grey).all(), bits
    Path("dark.pgm").write_bytes(b"P5 2 2 65535\n" + np.array([0, 100, 25700, 200], ">u2").tobytes())
    assert data.read_image("dark.pgm", 0)[..., 0].tolist() == [[0, 0], [100, 1]]
    for values, shown in (([0, 1.004], [0, 255]), ([0, 262], [0, 255]), ([0, 3000], [0, 12]), ([-1, 1], [0, 0])):
        Image.fromarray(np.float32([values] * 2)).save("o.tif")
        assert data.try_to_read(Path("o.tif"), 2)[0, :, 0].tolist() == shown
    (clear := rgb.copy()).putalpha(0)
    clear.save("clear.png", save_all=True, append_images=[rgb])
    data.read_image("clear.png", 0)
    deep = np.tile(np.linspace(0, 250, 16), (16, 1))
    for kind, scale in ((np.int32, 1), (np.int32, 257), (np.float32, 1), (np.float32, 1 / 255), (np.float32, 1e6)):
        values = (deep * scale).astype(kind)
        if kind == np.float32:
            values[0, 0] = np.nan
        Image.fromarray(values).save(Path("d.tif"))
        grey = data.read_image(Path("d.tif"), 0)[..., 0].astype(int)
        assert np.abs(grey - deep * (255 / 250 if scale == 1e6 else 1)).max() <= 1, (kind, scale)
    bits16, bits12 = np.full((9, 9), 257 * 200, np.uint16), np.tile(np.array([0xAB, 0xCA, 0xBC], np.uint8), (9, 4))
    for values, tags, grey in ((bits16, {262: 1}, 200), (bits16, {262: 0}, 55), (bits12, {256: 8, 258: 12}, 171)):
        Image.fromarray(values).save(Path("m.tif"))  # then with tags that Pillow does not write: white is 0, 12 bits
        content = bytearray(Path("m.tif").read_bytes())
        for tag, value in tags.items():
            at = re.search(tag.to_bytes(2, "little") + b"[\3\4]\0\1\0\0\0", content).end()
            content[at:at + 2] = value.to_bytes(2, "little")
        Path("m.tif").write_bytes(content)
        assert (data.read_image(Path("m.tif"), 0) == grey).all(), tags
    for suffix in ("jp2", "ppm", "tga", "ico", *(["avif"] if "AVIF" in data.FORMATS else [])):
        rgb.resize((32, 32)).save(Path(f"e.{suffix}"))
        assert data.read_image(Path(f"e.{suffix}"), 16).shape == (16, 16, 3) and f".{suffix}" in data.SUFFIXES
    (Path("f.jpg")).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # no Ghostscript is started
    assert not data.try_to_read(Path("f.jpg"), 16).any()
    said = capsys.readouterr().out
    assert all(text in said for text in ("cannot identify", "negative values", "the first counts", "almost black", "are white"))

# ---- The scripts, end to end

def test_the_four_scripts_write_what_they_say(chain):
    names = ("tokenizer", "diffusion", "samples")
    metrics, rows, scores = (content_of(chain / name / "metrics.json") for name in names)
    assert {"psnr", "ssim", "ssim_7x7_range2", "fd_classifier"} == metrics["stage2"].keys() and 0 <= metrics["linear_probe"] <= 1
    assert metrics["probe_images"] == [2_500, 400]
    for picture in ("tokenizer/recon.png", "diffusion/samples.png", "samples/grid.png"):
        assert Image.open(chain / picture).size[0] > 100
    rows = rows["rows"]
    assert rows["reconstructions"]["fd_classifier"] > rows["real validation images"]["fd_classifier"]
    assert 0 < rows["samples"]["fd_to_reconstructions"] != rows["samples"]["fd_classifier"]
    assert scores["samples"]["images"] == 30 and not (chain / "samples/parts").exists()
    z = content_of(chain / "samples/samples.npz")
    assert z["arr_0"].shape == (30, 16, 16, 3) and z["arr_0"].dtype == np.uint8
    assert z["labels"].tolist() == [i % 10 for i in range(30)] and z["classes"].tolist() == list(data.SHAPES)
    assert json.loads(str(z["meta"])).items() >= {"data": "shapes", "size": 16, "training_steps": 10}.items()
    call(f"fid latents {chain}/tokenizer/stage1.pt {chain}/tokenizer/ckpt.pt --out l")
    one, two = content_of("l/analysis.json")["rows"].values()
    distances = [row.pop("ifd_classifier") for row in (one, two)]
    assert min(distances) > 0 and distances[0] != distances[1]  # as their decoders differ
    assert one == two and len(one["mixture_nll_per_dimension"]) == 6  # stage 2 does not touch the latents
    assert one["velocity_variance"]["0.3"] < one["velocity_variance"]["0.7"]
    folder, state = chain / "diffusion/latents", torch.load(chain / "diffusion/ckpt.pt")
    z = np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))]).astype(np.float64)
    x = (z - state["mean"]) / state["std"]
    assert z.shape == (2_500, 2, 4, 4) and state["classes"] == list(data.SHAPES)
    assert x.mean((0, 1, 2)) == pytest.approx(0, abs=1e-6) and x.std((0, 1, 2)) == pytest.approx(1, abs=1e-6)
    model, _ = tokenizer.load_tokenizer(chain / "tokenizer/ckpt.pt", CPU)
    images = data.ImageSet("shapes", 16, "train")
    close(z[:3, 1], model.encode(data.to_float(images[np.arange(3)]).flip(3)), 2e-2)  # float16, perhaps bf16
    model.to_latent.weight.data += 1
    made_of = {"tokenizer_weights": tokenizer.fingerprint(model.state_dict()), "images": images.fingerprint}
    refused(diffusion.encode_dataset, model, images, folder, made_of, ONE, message="made of other weights")

def test_samples_depend_on_neither_processes_nor_batches_nor_a_kill(made):
    line = f"sample {made['sample']} --num-samples 120 --precision fp32 --sampler sde --steps 40"
    run = partial(script, line)
    run("--batch-size 4 --out one")
    run("--batch-size 4 --out two", processes=2)
    kill_when(lambda: len(times("cut/parts")) >= 2, run("--batch-size 4 --out cut", background=True))
    before = times("cut/parts")
    refused(call, line, "--steps 39 --batch-size 4 --out cut", message="other weights")
    assert before == times("cut/parts")
    run("--batch-size 4 --out cut")
    run("--batch-size 15 --out batch")
    assert_same("one", "two", "samples.npz")
    assert_same("one", "cut", "samples.npz")
    one, batch = (content_of(f"{name}/samples.npz")["arr_0"].astype(int) for name in ("one", "batch"))
    assert np.abs(one - batch).max() <= 1

def test_a_run_begins_with_the_weights_of_another(chain, monkeypatch, capsys):
    """Ours at another size, crop and list of targets, and a released one; it goes on when the file has moved."""
    monkeypatch.setattr(tokenizer, "evaluate", lambda *args: {})
    shutil.copy(chain / "tokenizer/stage1.pt", "a.pt")
    run = partial(call, "tokenizer --size 32 --targets pixel --augment crop --steps 2 --stage2-steps 1 --lr 0 --out",
                  fields={"muon_lr": 0.0, "precision": "fp32"})
    run("a --init a.pt")
    said, made, stage1 = capsys.readouterr().out, content_of("a.pt"), content_of("a/stage1.pt")
    for found in ("44 taken over: enc", "1 stretched: encoder.pos_embed\n", "22 new: aux.pixel.", "22 dropped: aux.hog."):
        assert f"--init: {found}" in said, said
    table, key = stage1.pop("['ema']['encoder.pos_embed']"), "['ema']['to_latent.weight']"
    assert table.shape == (1, 65, 24) and torch.equal(table[:, 0], made["['ema']['encoder.pos_embed']"][:, 0])
    assert all(torch.equal(w, made[key]) for key, w in stage1.items() if key[1:4] == "'em" and ".pixel." not in key)
    run("a --init", shutil.move("a.pt", "b.pt"))
    assert "continuing" in (said := capsys.readouterr().out) and "taken over" not in said
    for more in ("", f"--init {chain}/tokenizer/ckpt.pt"):
        refused(run, "a", more, message="was made with init")
    run("b --init b.pt --stage2-only")
    assert torch.equal(content_of("b/stage1.pt")[key], made[key]) and log_of("b")[0]["stage"] == "stage 2"
    refused(run, "c --init b.pt --stage2-only --channels 6", message="to_latent.weight does not fit")
    release("r", golden("maetok/tokenizer_tiny_b_movq")[1])
    call("tokenizer --size 32 --patch 8 --latents 12 --channels 6 --width 48 --depth 2 --heads 3 --decoder modulated",
         "--init r --stage2-only --stage2-steps 1 --out d", fields={"dec_width": 32, "dec_depth": 3, "dec_heads": 2})
    assert re.search("1 stretched: encoder.pos_embed\n.* 0 new: \n.* 0 dropped:", capsys.readouterr().out)

def test_nothing_stale_lies_beside_a_new_run(cache, monkeypatch):
    """A finished run is started again, with its checkpoint and without, and ends before it has new results."""
    (run := partial(call, "tokenizer --steps 2 --stage2-steps 1 --out .", fields={}))()
    ONE.save(Path("x/recon.png"), {"the user's": 1})
    refused(run, "--out x", message="x holds recon.png of something else")
    for name, stale in (("evaluate", {"recon.png", "metrics.json"}), ("train", {"recon.png", "stage1.pt"})):
        monkeypatch.setattr(tokenizer, name, lambda *args: data.die("it fails"))
        [Path(path).write_text("old") for path in stale]
        refused(run, message="it fails")
        assert not stale & set(os.listdir())
        Path("ckpt.pt").unlink(missing_ok=True)

def test_processes_train_as_one(made):
    """Also in pieces of 7 rows, which are made to 6 and 4, and compiled: a graph for each stage or network."""
    for name, more, count in (("tokenizer", "--stage2-steps 20 --augment crop", 60), ("diffusion", "--samples 0", 20)):
        run = partial(script, name, "--steps 20 --batch-size 24", more, made[name], FP32, "--out")
        run(f"{name}-one")
        run(f"{name}-two --micro-batch 7", processes=2)
        done = run(f"{name}-three --micro-batch 7 --compile", processes=3)
        assert "unused" not in done and max(re.findall(r"graphs:\s*(\d)", done)) in "23", done
        for other in ("two", "three"):
            assert_losses_agree(f"{name}-one", f"{name}-{other}", count)
    assert_same("diffusion-one", "diffusion-two", "latents")

def test_lightning_trains_and_an_earlier_checkpoint_guides(made):
    call("diffusion --steps 6 --keep-every 3 --samples 0 --style lightning", made["diffusion"], fields={"cosine_loss": 1.0})
    run = partial(call, "sample --num-samples 9 --steps 2 --precision fp32 --guidance 99")
    run("--out plain")
    run("--out guided --guide out/diffusion/step-3.pt")
    plain, guided = (content_of(f"{out}/samples.npz")["arr_0"] for out in ("plain", "guided"))
    assert not np.array_equal(plain, guided)
    state = torch.load("out/diffusion/step-3.pt")
    for change, flag, message in (({"images": "x"}, "--guide", "other images"),
                                  ({"config": state["config"] | {"path": "cosine"}}, "--guide", "other path"),
                                  ({"config": state["config"] | {"label_dropout": 0.0}}, "--model", "no null class")):
        ONE.save(Path("x.pt"), state | change)
        refused(run, flag, "x.pt", message=message)

def test_presets_are_the_published_settings_and_what_diverges_is_refused():
    for name, how in {"paper256": "sde 1.9 0.75", "paper512": "sde 1.5 0.7", "lightning256": "euler 1.8 0.75",
                      "lightning512": "euler 1.6 0.65"}.items():
        c = sample.Config(**sample.PRESETS[name])
        assert f"{c.sampler} {c.guidance} {c.guidance_high}" == how and c.guidance_low == 0
        assert (c.steps, c.num_samples, c.labels, c.precision) == (250, 50_000, "random", "fp32")
    for name, width in (("sit-b-40ep", 768), ("sit-xl-40ep", 1152)):
        c = diffusion.Config(**diffusion.PRESETS[name])
        assert [c.width, c.steps, c.batch_size, c.sampler, c.sampling_steps, c.guidance] == [width, 400_000, 128, "sde", 250, 1]
    with pytest.raises(ValueError, match="cosine_loss needs a clip above 0"):
        diffusion.Config(cosine_loss=1.0, clip=0.0).check()

def test_init_takes_over_what_fits(chain, made, capsys):
    make_folder("x", 30, "abc", 16)  # three classes in place of ten. At rate 0 the weights stay as they begin
    line = f"diffusion {made['diffusion']} --init {chain}/diffusion/ckpt.pt --steps 2 --samples 0 --data x"
    run = partial(call, line, "--optimizer adamw --lr 0")
    refused(run, "--heads 1", message="ckpt.pt needs --width 24 --heads 2")
    run("--out one", fields={})
    old, new, table = torch.load(chain / "diffusion/ckpt.pt")["ema"], torch.load("one/ckpt.pt"), "y_embedder.embedding_table.weight"
    assert "--init: 1 new: " + table in capsys.readouterr().out and new["model"][table].shape == (4, 24)
    assert all(torch.equal(w, old[name]) for name, w in new["ema"].items() if name != table)
    run("--init gone.pt --out one", fields={})  # goes on from its own checkpoint
    refused(run, "--init gone.pt --out two", message="gone.pt: No such file")
    assert "continuing one/ckpt.pt" in capsys.readouterr().out and not Path("two").exists()
    release("sit", weights := golden("maetok/sit_tiny_b")[1], num_heads=6)
    run("--init sit --qk-norm --width 48 --heads 6 --depth 3 --out three", fields={})
    new = torch.load("three/ckpt.pt")["ema"]
    weights |= {"pos_embed": diffusion.token_positions(4, 48)}  # of another length: its own
    assert all(torch.equal(new[k], weights[k]) for k in weights if k[:6] in ("blocks", "t_embe", "pos_em"))

def test_a_tokenizer_of_other_images_is_said(chain, capsys):
    make_folder("x", 30, "abc", 16)
    state, known = torch.load(chain / "tokenizer/ckpt.pt"), data.ImageSet("x", 16, "train").fingerprint
    for i, images in enumerate(("", known, "others")):  # "": not known
        ONE.save(Path("t.pt"), state | {"config": state["config"] | {"images": images}})
        call(f"diffusion --tokenizer t.pt --data x --steps 1 --samples 0 --out {i}", fields={})
        said = capsys.readouterr().out.count("warning: the tokenizer was trained on other images than /")
        assert said == (images == "others")

def test_nothing_of_an_earlier_run_stays_and_classes_without_images_are_not_sampled(made, capsys, monkeypatch):
    (make_folder("x", 1, "b") / "b/0.png").write_text("no picture")
    make_folder("x", 30, "ac", 16)
    train = partial(call, f"diffusion {made['diffusion']} --data x --steps 2 --samples 9 --out d", fields={})
    train()
    assert "warning: no training images, so no samples, of b" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "train", lambda *args: sys.exit("cut"))
        for kept in (["samples.png", "step-9.pt"], []):  # the run goes on, or begins again
            old = [Path("d", name) for name in ("metrics.json", "samples.png", "step-9.pt")]
            assert all(path.write_text("old") for path in old) and refused(train, message="cut")
            assert [path.name for path in old if path.exists()] == kept
            Path("d/ckpt.pt").unlink(missing_ok=True)
    train()
    run = partial(call, f"sample {made['diffusion']} --model d/ckpt.pt --num-samples 9 --steps 1 --out s")
    run("--png")
    Path("s/metrics.json").write_text("old")
    Path("s/png/000003.png").unlink()  # as after a kill
    run("--png --labels random")
    assert set(content_of("s/samples.npz")["labels"]) == {0, 2} and len(list(Path("s/png").iterdir())) == 9
    run()
    assert {p.name for p in Path("s").iterdir()} == {"samples.npz", "grid.png"}

@pytest.mark.parametrize("n, more", [(60, "--mask-min 0 --mask-max 0 --targets none"), (1, "")])
def test_a_flat_folder_goes_through_all_scripts(cache, n, more):
    """One class, the plain autoencoder without masking on two processes, or one image; no scores that need labels."""
    make_folder("flat", n, ("",))
    script(f"tokenizer --data flat --steps 4 --stage2-steps 3 {more}", processes=1 + (n > 1))
    assert "one class only" in script("diffusion --steps 4 --samples 8")
    script("sample --num-samples 9 --steps 2")
    z = content_of("out/samples/samples.npz")
    assert z["arr_0"].shape == (9, 16, 16, 3) and json.loads(str(z["meta"]))["guidance"] == 1.0
    assert "has one class only" in script("fid")

def test_fid_command_line(made_weights, cache):
    """A B, stats, reference statistics instead of images, a folder of PNGs: one number."""
    a, b = (np.random.default_rng(n).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for n in (6, 7))
    np.savez("a.npz", arr_0=a)
    np.savez_compressed("b.npz", arr_0=b)
    [Path(name).mkdir() for name in ("folder", "shapes")]
    [Image.fromarray(pixels).save(f"folder/{i}.png") for i, pixels in enumerate(b)]
    flags = f"--weights {made_weights} --batch-size 5 --resize pytorch-fid --out"
    assert "folder: 7 images below it" in script("fid stats folder", flags, "ref.npz", processes=2)
    z = content_of("ref.npz")
    assert z["mu"].shape == (2048,) and z["sigma_s"].shape == (2023, 2023) and np.array_equal(z["arr_0"], b)
    for name, mean in {"only": {"mu": z["mu"]}, "nan": {"mu": z["mu"] * np.nan}, "narrow": {"mu": z["mu"][:64]}, "half": {},
                       "adm": {"mu": z["mu"], "arr_0": b[:5]}, "none": {"arr_0": b[:0]}}.items():
        np.savez(f"{name}.npz", sigma=z["sigma"], resize="pytorch-fid", **mean)
    call("fid a.npz b.npz", flags, "1.json")
    script("fid a.npz ref.npz", flags, "2.json", processes=2)
    assert "fewer than 2,048" in script("fid a.npz only.npz", flags, "3.json")
    call("fid a.npz adm.npz", flags, "4.json")  # its statistics are of more images than it holds
    first, second, third, fourth = (content_of(f"{i}.json")["samples"] for i in (1, 2, 3, 4))
    assert (first["images"], first["n_reference"], fourth["n_reference"]) == (6, 7, None)
    for key in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert second[key] == pytest.approx(first[key], rel=1e-3), key
        assert third.get(key) == (pytest.approx(first[key], rel=1e-3) if key in ("fid", "inception_score") else None)
    Image.new("RGB", (9, 9)).save("folder/odd.png")
    for line, message in {"a.npz folder": "another size; data.py makes one size", "a.npz nan.npz": "finite",
                          "folder/odd.png a.npz": "is not an npz file", "ref.npz a.npz": "give it second, as B", "none.npz a.npz": "above 0",
                          "shapes a.npz": "give --size", "a.npz narrow.npz": "of the right size", "a.npz half.npz": "mu is missing"}.items():
        refused(call, "fid", line, flags, "4.json", message=message)

def test_a_run_and_its_data_can_be_moved(cache, monkeypatch):
    """The folder out/ and the images lie elsewhere now: later stages go on, sample, and score the same data."""
    make_folder("a/photos", 30)
    train, generate = "tokenizer --steps 3 --stage2-steps 2", "diffusion --steps 3 --samples 8"
    script(train, "--data photos", cwd="a")
    script(generate, cwd="a")
    shutil.move("a", "b")
    photos = Path("b/photos").absolute()
    call(train, f"--data {photos} --out b/out/tokenizer", fields={})  # goes on: it is done
    call(generate, f"--data {photos} --tokenizer b/out/tokenizer/ckpt.pt --out b/out/diffusion", fields={})
    run = partial(call, "sample --model b/out/diffusion/ckpt.pt --num-samples 4 --steps 1 --out s")
    run()
    call(f"fid --samples s/samples.npz --data {photos}")
    shutil.move("b/out/tokenizer", "elsewhere")
    refused(run, message="tokenizer/ckpt.pt: No such file")
    run("--tokenizer elsewhere/ckpt.pt")

def test_what_would_spoil_a_result_is_refused(chain, made, capsys):
    for line in (f"--out {chain}/tokenizer", f"--out {chain}/diffusion --init {chain}/diffusion/ckpt.pt"):
        refused(call, "diffusion", made["diffusion"], line, message="whose ckpt.pt it would overwrite")
    state = torch.load(chain / "diffusion/ckpt.pt")
    for name in ("final_layer.linear.bias", "blocks.0.mlp.fc1.bias"):
        ONE.save(Path("x.pt"), state | {"ema": state["ema"] | {name: state["ema"][name] * math.nan}})
        refused(call, "sample --num-samples 9", made["sample"], "--model x.pt", message="the velocity of sample 0 is not finite")
    state, images = torch.load(chain / "tokenizer/ckpt.pt"), data.ImageSet("shapes", 16, "val")
    weight, bias = (state["ema"][f"{name}"].clone() for name in ("to_latent.weight", "decoder.head.bias"))
    state["ema"]["decoder.head.bias"], state["config"]["adv_norm"] = bias * math.nan, "batch"  # once a field
    ONE.save(Path("t.pt"), state)
    refused(tokenizer.reconstruct, tokenizer.load_tokenizer("t.pt", CPU)[0], images[np.arange(3)], ONE, message="not finite")
    state["ema"]["decoder.head.bias"] = bias
    for dead, message in (([2], "latent channels [2] are constant"), ([0, 1, 2, 3], "all latents are equal")):
        state["ema"]["to_latent.weight"] = weight.index_fill(0, torch.tensor(dead), 0)
        ONE.save(Path("t.pt"), state)
        line = f"diffusion --tokenizer t.pt --steps 2 --samples 0 --precision fp32 --out d{len(dead)}"
        said = refused(call, line) if len(dead) == 4 else call(line, fields={}) or capsys.readouterr().out
        assert message in said, said

def test_a_finished_run_goes_on_at_a_constant_rate(made):
    run = partial(call, "diffusion --samples 0", made["diffusion"], FP32)
    for schedule in ("constant", "cosine"):
        more = partial(run, fields={"schedule": schedule})
        more(f"--steps 3 --out {schedule}")
        if schedule == "cosine":
            refused(more, "--steps 6 --out cosine", message="made with steps 3, now 6")
        else:
            [more("--steps 6 --out", out) for out in ("constant", "whole")]
            refused(more, "--steps 2 --out constant", message="ckpt.pt has more than --steps 2")
    assert_same("whole", "constant", "ckpt.pt", "log.jsonl")

@pytest.mark.parametrize("line, message", [
    ("tokenizer --batch-size 16", "with 16 at once: try --micro-batch 8"), ("sample --batch-size 9", "try --batch-size 4"),
    ("diffusion --batch-size 16 --micro-batch 6", "with 6 at once: try --micro-batch 3"),
    ("data --data x", "try --workers 1")])
def test_a_batch_that_does_not_fit_is_one_line_with_advice(monkeypatch, line, message):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(sys.modules[line.split()[0]], "main", full)
    refused(call, line, message=message)

def test_a_batch_that_processes_cannot_share():
    said = script("tokenizer --batch-size 15 --data none --out z", processes=2, torchrun=True, fails=True)
    assert said.count("--batch-size 15 must be a multiple of the 2 processes") == 1  # before anything is read

def test_scores_say_what_they_are_of(made_weights, cache, monkeypatch, capsys):
    """Labels, sizes, counts and resizes that would make a number wrong are refused or said; what can be given is given."""
    rng = np.random.default_rng(0)
    pixels, small = (rng.integers(0, 256, (n, s, s, 3), dtype=np.uint8) for n, s in ((12, 16), (3, 9)))
    sets = {"right": np.arange(12) % 10, "wide": np.arange(12), "few": np.arange(3)}
    [np.savez(f"{name}.npz", arr_0=pixels, labels=labels.astype(np.uint32)) for name, labels in sets.items()]
    np.savez("below.npz", arr_0=pixels, labels=np.arange(12) - 1)
    np.savez("small.npz", arr_0=small)
    np.savez("names.npz", arr_0=pixels, labels=np.zeros(12, int), classes=np.array(["ape", "cat"]))
    np.save("x.npy", pixels)
    make_folder("folder", 3, ("",))
    call("fid --samples right.npz --data shapes")
    assert "12 images, no more than 192 features: their fd_classifier is too high" in capsys.readouterr().out
    assert Path("right.npz.metrics.json").exists()  # metrics.json may be the user's
    call("fid --samples names.npz --data shapes")
    assert "have other classes: class_accuracy is left out" in capsys.readouterr().out
    weights = f"--weights {made_weights}"
    call("fid small.npz right.npz --out 1.json", weights)
    said, row = capsys.readouterr().out, content_of("1.json")["samples"]
    assert "A and B differ in size" in said and "need more than 3 images" in said and "3 images, fewer than 2,048" in said
    assert {"fid", "sfid", "inception_score"} < row.keys() and "precision" not in row and row["n_reference"] == 12
    np.savez("samples.npz", arr_0=pixels, meta='{"data": "folder"}')
    call("fid --features fid --samples samples.npz", weights)
    assert content_of("metrics.json")["samples"]["n_reference"] == 2  # the training images, cropped as the model saw them
    np.savez("ref.npz", mu=np.zeros(2048), sigma=np.eye(2048), resize="pytorch-fid")
    Path("folder/1.png").write_bytes(b"no picture")
    for line, message in {"--samples wide.npz --data shapes": "labels 0 to 11, shapes has 10 classes",
                          "--samples few.npz": "3 labels for 12", "--samples below.npz --data shapes": "labels -1 to 10",
                          "right.npz x.npy": "x.npy is not an npz file", "right.npz folder/0.png": "0.png is not an npz file",
                          "right.npz ref.npz": "ref.npz was made with --resize pytorch-fid, not tf1",
                          "right.npz folder": "folder/1.png is not an image", "--samples small.npz": "give --data"}.items():
        refused(call, "fid", line, weights, message=message)
    capsys.readouterr()
    monkeypatch.setattr(data.Dist, "save", lambda self, path, content: data.die(f"cannot write {path}"))
    refused(call, "fid --samples right.npz --data shapes", message="cannot write")
    assert '"fd_classifier"' in capsys.readouterr().out  # what was computed is shown
    assert list(fid.gmm_nll_curve(torch.randn(57, 3), torch.randn(9, 3), 3)) == [1, 2, 4, 8, 16]

def test_a_read_only_cache_that_holds_all_is_enough(chain, monkeypatch):
    """The packed images are read; a classifier that is not there is kept beside the run."""
    shutil.copytree(os.environ["MAETOK_CACHE"], "cache", ignore=shutil.ignore_patterns("*.pt", "*.part"))
    monkeypatch.setenv("MAETOK_CACHE", str(Path("cache").absolute()))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    before = sorted(Path("cache").rglob("*"))
    call("tokenizer --steps 2 --stage2-steps 1", fields={})
    assert list(Path("out/tokenizer").glob("classifier*.pt")) and before == sorted(Path("cache").rglob("*"))

def test_nodes_without_a_shared_cache_have_one_classifier(cache, monkeypatch):
    images, sent, nets = data.ImageSet("shapes", 16, "train"), [], []
    monkeypatch.setattr(data.Dist, "barrier", lambda self: None)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, source: (
        sent.append(x.clone()) if len(nets) == 0 else x.copy_(sent.pop(0))))
    for rank, steps in ((0, 3), (1, None)):  # the second cannot train
        monkeypatch.setenv("MAETOK_CACHE", str(Path(f"cache{rank}").absolute()))
        monkeypatch.setattr(fid, "train_classifier", partial(fid.train_classifier, steps=steps))
        nets.append(fid.cached_classifier(images, data.Dist(rank, 2), "."))
    one, two = (net.state_dict() for net in nets)
    assert not sent and one["mean"].any() and all(torch.equal(one[key], two[key]) for key in one)

def test_files_are_read_ahead_on_as_many_threads_as_cores(monkeypatch):
    make_folder("x", 80, ("",))
    monkeypatch.setattr(os, "cpu_count", lambda: 40)
    images, decode, together = fid.open_set("x", 0, ONE)[0], fid.read_image, threading.Barrier(40)
    monkeypatch.setattr(fid, "read_image", lambda *args: (together.wait(10), decode(*args))[1])
    batches, seen = fid.in_batches(images, ONE, 40), []
    monkeypatch.setattr(fid.np, "stack", lambda x, stack=np.stack: (seen.append(len(x)), stack(x))[1])
    _, x = next(batches)
    [time.sleep(0.01 * (len(seen) < 2)) for _ in range(500)]  # nobody asks for the second batch
    assert seen == [40, 40] and torch.equal(x, images[np.arange(40)])

def test_an_npz_is_mapped_and_still_checked():
    pixels = np.random.default_rng(0).integers(0, 256, (500, 64, 64, 3), np.uint8)
    np.savez("a.npz", arr_0=pixels)
    tracemalloc.start()
    images, _ = fid.open_set("a.npz", 0, ONE)
    assert tracemalloc.get_traced_memory()[1] < 4e6 < pixels.nbytes
    tracemalloc.stop()
    assert np.array_equal(images[np.array([3, 499])].permute(0, 2, 3, 1), pixels[[3, 499]])
    whole = Path("a.npz").read_bytes()
    Path("a.npz").write_bytes(whole[:10**6] + bytes(9) + whole[10**6 + 9:])
    refused(fid.open_set, "a.npz", 0, ONE, message="a.npz is not an npz file")

def test_the_probe_of_many_classes_is_bounded():
    z, y = torch.randn(300, 64), torch.randint(0, 40_000, (300,))
    before = peak_memory()
    fid.linear_probe(z, y, z, y, 40_000, iterations=2)
    assert peak_memory() - before < 700_000

# ---- Faults: what may happen to a run, its files and its neighbours. `pytest -m campaign` runs the long half

SHORT = {"tokenizer": "--stage2-steps 0", "diffusion": "--samples 0"}

# Kills: after this step of this stage, twice each; or 12 at random moments of so many seconds, mostly after the start
KILLED = [("tokenizer", "--steps 60 --stage2-steps 60 --save-every 7", "ckpt.pt log.jsonl metrics.json",
           [("stage 2", 5), ("stage 2", 10), ("stage 1", 45), ("stage 1", 50)]),
          ("diffusion", "--steps 150 --samples 0 --save-every 7", "ckpt.pt log.jsonl metrics.json",
           [("diffusion", 45), ("diffusion", 50)])]
CAMPAIGN = [("tokenizer", "--steps 400 --stage2-steps 400 --save-every 1", "ckpt.pt stage1.pt metrics.json log.jsonl", [2.1] * 12),
            ("diffusion", "--steps 700 --save-every 1 --samples 0", "ckpt.pt latents log.jsonl", [2.1] * 12),
            ("sample", "--num-samples 1000 --sampler sde --steps 60 --batch-size 20", "samples.npz", [1.2] * 12),
            ("data", "--data x --size 64 --workers 1", "images labels.npy packed.json", [0.9] * 12)]

@pytest.mark.parametrize("name, line, files, kills", [
    *KILLED, *(pytest.param(*case, marks=pytest.mark.campaign) for case in CAMPAIGN)])
def test_a_killed_run_goes_on_bit_by_bit(made, name, line, files, kills):
    make_folder("x", 3000 * (name == "data"), size=64)
    run, rng, kills = partial(script, name, line, made[name]), np.random.default_rng(zlib.crc32(line.encode())), [*kills]
    run("--out whole")
    while kills:
        victim, kill = run("--out cut", background=True), kills[-1]
        if isinstance(kill, tuple):  # the second time it has just gone on
            wait_for(lambda kill=kill: logged("cut", *kill), victim)
        else:
            time.sleep(rng.uniform(0.1, kill))
        if victim.exitcode is not None:  # it came through: from the start again
            shutil.rmtree("cut")
            continue
        kills.pop()
        victim.kill()
        victim.join()
        for path in Path("cut").glob("*.pt"):
            torch.load(path)  # whole at every moment
    assert "continuing" in run("--out cut") or not isinstance(kill, tuple)
    assert_same("whole", "cut", *files.split())

@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_torchrun_brings_back_a_dead_worker_of_a_run_that_began_with_one(cache):
    run = partial(script, "tokenizer --steps 100 --stage2-steps 0 --lr 1e-4", FP32, "--save-every 15")
    run("--out one")
    kill_when(lambda: logged("cut", "stage 1", 25), run("--out cut", background=True))
    job = run("--out cut", background=True, processes=2, torchrun=True)
    wait_for(lambda: logged("cut", "stage 1", 50), job)
    for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    job.join(120)
    assert job.exitcode == 0
    assert_losses_agree("one", "cut", 200)

@pytest.mark.parametrize("name", ["tokenizer", "diffusion", "sample"])
def test_two_runs_in_one_folder(made, name):
    """Both end with the result of one run; but sample.py removes its parts at the end, which may end the other."""
    more, *files = {"tokenizer": ("--steps 40 --stage2-steps 20 --save-every 5", "stage1.pt", "ckpt.pt"),
                    "diffusion": ("--steps 60 --save-every 5 --samples 0", "ckpt.pt", "latents"),
                    "sample": ("--num-samples 200 --batch-size 10", "samples.npz")}[name]
    line = f"{name} {more} {made[name]} --out"
    script(line, "alone")
    both = [script(line, "shared", background=True) for _ in range(2)]
    codes = [process.join(120) or process.exitcode for process in both]
    said = "".join(path.read_text() for path in Path().glob("said*"))
    assert codes == [0, 0] or (name == "sample" and sorted(codes) == [0, 1] and said.count("sample.py: ") == 1), said
    assert "Traceback" not in said
    assert_same("alone", "shared", *files)

def test_free_options_may_differ_and_others_not():
    cfg = tokenizer.Config()
    for field in dataclasses.fields(cfg):
        out, value, other = Path(field.name), getattr(cfg, field.name), copy.copy(cfg)
        again = partial(ONE.make_out_dir, out, other, {"pixels": "a"})
        ONE.make_out_dir(out, cfg, {"pixels": "a"})
        object.__setattr__(other, field.name, not value if isinstance(value, bool) else value * 2 or "other")
        if field.metadata.get("free"):
            again()
        else:
            refused(again, message=f"{out} was made with {field.name} {value}, now")
    refused(ONE.make_out_dir, out, cfg, {"pixels": "b"}, message="made with pixels a, now b")

@pytest.mark.parametrize("name, term", [("tokenizer", "recon"), ("diffusion", "loss")])
def test_a_number_that_is_not_finite_stops_the_run_before_a_save(made, monkeypatch, name, term):
    honest, bad = data.Loader.__call__, {7: math.nan}
    def poison(self, step):
        x, y = honest(self, step)
        return x * bad.get(step, 1), y

    monkeypatch.setattr(data.Loader, "__call__", poison)
    run = partial(call, name, SHORT[name], made[name], "--steps 12 --save-every 4 --out .",
                  fields={"log_every": 5, "clip": 0.0})
    refused(run, message=f"{term} is not finite at step 8 (learning rate 0.00")
    assert torch.load("ckpt.pt")["step"] == 4
    bad.clear()  # mended: it goes on
    run()
    assert all(x.isfinite().all() for x in content_of("ckpt.pt").values()) and log_of(".")[-1]["step"] == 12

def test_a_full_disk_keeps_what_is_there(made):
    """A limit on the size of files stands in for the disk: writing fails as there, with another number."""
    def full(size, line):
        said = script(line, limit=size, fails=True)
        found = re.findall(rf"^{line.split()[0]}\.py: (.*)", said, re.MULTILINE)
        assert len(found) == 1 and "Traceback" not in said
        assert re.search(r"cannot write .*\.(pt|npy|npz): File too large.*kept", found[0])
    train = "tokenizer --stage2-steps 0 --save-every 5 --steps 30 --out t"
    kill_when(Path("t/ckpt.pt").exists, script(train, background=True))
    before = Path("t/ckpt.pt").read_bytes()
    full(len(before) * 4 // 5, train)
    assert Path("t/ckpt.pt").read_bytes() == before
    script(train)
    full(20_000, f"diffusion {made['diffusion']} --out d")
    full(100_000, f"sample {made['sample']} --num-samples 900 --steps 1 --out s")
    make_folder("x", 100, size=64)
    full(300_000, "data --data x --size 64 --out packed")
    assert not Path("packed/packed.json").exists() and not Path("s/samples.npz").exists()

def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def test_damaged_pictures_are_named_and_odd_ones_are_read(capsys):
    """Damaged ones are named with a reason and the rest is packed, in little memory; more than 1 % end the run."""
    peak, root = peak_memory(), make_folder("x", 3000, ("all",), 4) / "all"
    picture, contents = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)), {}
    for kind in ("jpeg", "gif", "tiff", "webp", "bmp", "png"):
        file = io.BytesIO()
        picture.save(file, kind)
        whole = file.getvalue()
        contents |= {f"half.{kind}": whole[:1000], f"head\n.{kind}": whole[:20], f"\u732b.{kind}": whole[40:]}

    def header(w, h):  # a PNG that claims to be so large
        body = b"IHDR" + w.to_bytes(4, "big") + h.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
        return whole[:12] + body + zlib.crc32(body).to_bytes(4, "big") + whole[33:]

    contents |= {"empty.png": b"", "text.png": b"no picture\n" * 50, "zeros.webp": bytes(500), "none.png": header(0, 0),
                 "bomb.png": header(60_000, 60_000), "wide bomb.png": header(2**31 - 1, 1)}
    [(root / name).write_bytes(content) for name, content in contents.items()]
    bad = [root / name for name in contents]
    data.pack(root, 8, "out")
    said = capsys.readouterr().out
    assert all(f"unreadable: {str(p.absolute())!r}: " in said for p in bad) and said.count("unreadable: ") == len(bad)
    assert sum(map(len, both("out"))) == 3000 and peak_memory() < peak + 600_000
    [(root / f"{i}.png").write_bytes(b"no image") for i in range(10)]
    refused(data.pack, root, 8, "many", message="images are unreadable")
    assert not Path("many/packed.json").exists()

    root, rgb = make_folder("odd", 1, ("",)), Image.new("RGB", (30, 20), "red")
    rgb.save(root / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    [rgb.resize(size).save(root / f"{size}.png") for size in ((1, 500), (500, 1), (1, 1))]
    names = "with space", "new\nline", "\u732b", "-dash", "a" * 200, "dot.in.name", "100%"
    [rgb.save(root / f"{name}.JPG", "JPEG") for name in names]
    data.pack(root, 16, "read")
    assert sum(map(len, both("read"))) == 12

def test_checkpoints_and_notes_of_a_run_that_are_damaged_are_named(chain, made):
    for kind, load in (("tokenizer", tokenizer.load_tokenizer), ("diffusion", diffusion.load_diffusion)):
        state = torch.load(chain / kind / "ckpt.pt")
        config, weights = state["config"], state["ema"]
        name = next(k for k in weights if k.endswith("qkv.weight"))
        changes = [("config", config | {"width": 48}, ""), ("config", config | {"surprise": 1}, "surprise"),
                   ("config", 3, ""), ("ema", weights | {"other": torch.zeros(1)}, "other"),
                   ("ema", {k: v for k, v in weights.items() if k != name}, name)]
        if kind == "diffusion":
            changes += [("classes", ["a"], ""), ("std", [math.nan] * 4, "statistics")]
        for key, value, message in changes:
            ONE.save(Path("x.pt"), state | {key: value})
            assert message in refused(load, "x.pt", CPU, message="x.pt")
    shutil.copytree(chain / "diffusion/latents", "e/latents")
    min(Path("e/latents").iterdir()).write_bytes(b"\x93NUMPY")
    for name, content in {"d/settings.json": b"{", "p/packed.json": b"{}",
                          "t/ckpt.pt": (chain / "tokenizer/stage1.pt").read_bytes(),
                          "l/log.jsonl": b'{"stage": "stage 1", "step": 9}\n{"stage": "stage 2", "st'}.items():
        Path(name).parent.mkdir()
        Path(name).write_bytes(content)
    run = partial(call, fields={})
    refused(run, "tokenizer --steps 9 --out t", message="t holds the ckpt.pt of something else")
    refused(run, "tokenizer --data p --out u", message="p is not a whole packed data set")
    refused(run, "diffusion --out d", made["diffusion"], message="settings.json is not the settings of a run")
    refused(run, "diffusion --out e", made["diffusion"], message="latents is not a whole folder of shards")
    run("tokenizer --steps 2 --stage2-steps 0 --out l")
    assert [line["step"] for line in log_of("l")] == [1, 2, 9]

def test_random_damage_ends_in_one_line(chain):
    """700 damaged files: read after all, or refused in one line; never another error, never a large allocation."""
    rng, peak, packed = np.random.default_rng(0), peak_memory(), Path("packed")
    data.pack(make_folder("x", 6), 8, packed)
    np.savez("a.npz", arr_0=rng.integers(0, 256, (6, 8, 8, 3), np.uint8), labels=np.arange(6))
    write_safetensors("a.safetensors", {"one": torch.randn(4, 5), "two.x": torch.randn(7)})

    def images(path):
        found = both(packed)[0] if packed in path.parents else fid.open_set(str(path), 0, ONE)[0]
        return found and found[np.arange(len(found))]

    for source, read in {chain / "tokenizer/ckpt.pt": lambda path: tokenizer.load_tokenizer(path, CPU),
                         chain / "diffusion/ckpt.pt": lambda path: diffusion.load_diffusion(path, CPU),
                         Path("a.safetensors"): fid.read_weights, Path("a.npz"): images, packed / "labels.npy": images,
                         packed / "packed.json": images, next(packed.glob("images/*.npy")): images}.items():
        whole = source.read_bytes()
        path = source if packed in source.parents else Path(f"broken{source.suffix}")
        for turn in range(101):  # at last it is whole again
            at, span = int(rng.integers(min(len(whole), rng.choice([400, 10**9])))), int(rng.integers(1, 9))
            part = whole[at:at + span]  # noise, nothing, twice, or larger numbers in a header
            new = (rng.bytes(span), b"", part + part, b"9" * span)[rng.integers(4)]
            end = b"" if rng.random() < 0.2 else whole[at + span:]
            path.unlink(missing_ok=True)  # a map of the file before stays whole
            path.write_bytes(whole[:at] + new + end if turn < 100 else whole)
            try:
                read(path)
            except SystemExit as error:
                assert len(str(error.code).splitlines()) == 1 and turn < 100, error
    assert peak_memory() < peak + 500_000

# Command lines (OUT: the folder of the tiny models), and what the one line must say
MISTAKES = {"tokenizer --step 3": "unrecognized arguments: --step 3", "tokenizer --steps abc": "invalid int value: 'abc'",
    "tokenizer --preset huge": "invalid choice: 'huge'", "tokenizer --size 33": "--size 33 must be a multiple",
    "tokenizer --targets hogg": "--targets hogg", "tokenizer --batch-size 0": "--batch-size 0 must be at least 1",
    "tokenizer --mask-min 0.9": "--mask-min", "tokenizer --lpips 1 --weights offline": "or do without: --lpips 0",
    "tokenizer --stage2-only": "--stage2-only needs --init", "tokenizer --init empty": "empty/model.safetensors: no such",
    "tokenizer --init OUT/diffusion/ckpt.pt": "of diffusion.py", "tokenizer --init OUT/tokenizer/ckpt.pt": "no matrix fits",
    "tokenizer --adversary dino --weights offline": "from http://127.0.0.1:9/dino_deitsmall16_pretrain.pth",
    "tokenizer --from-official other/ckpt.pt": "encoder.model.patch_embed.proj.weight is missing",
    "tokenizer --data nowhere": "/nowhere: no such folder", "tokenizer --data empty": "no images found",
    "tokenizer --data mixed": "lies in no class folder", "data --data shapes": "need no packing",
    "tokenizer --out damaged": "damaged/ckpt.pt is not a checkpoint of tokenizer.py",
    "tokenizer --out other --steps 3": "not a checkpoint of tokenizer.py (it is one of diffusion.py)",
    "diffusion --tokenizer none.pt": "none.pt: no such file", "diffusion --width 25": "--width 25",
    "diffusion --seed 18446744073709551616": "below 2**62", "sample --guidance inf": "below 2**62",
    "tokenizer --steps 0": "--steps 0 must be at least 1", "tokenizer --lr nan": "--lr nan must be at least 0",
    "diffusion --seed -1": "--seed -1 must be at least 0", "diffusion --guidance-high 2": "--guidance-high",
    "sample --guidance 0.5": "--guidance 0.5 must be at least 1", "sample --model none.pt": "none.pt: no such file",
    "sample --model x.safetensors": "a released SiT needs --tokenizer", "diffusion --tokenizer converted/ckpt.pt": "give --data",
    "sample --model OUT/diffusion/ckpt.pt --out OUT/diffusion": "diffusion holds settings.json",
    "tokenizer --stage2-only --init converted/ckpt.pt --out converted": "converted holds the ckpt.pt of something else",
    "sample --model OUT/diffusion/ckpt.pt --tokenizer OUT/tokenizer/ckpt.pt --guide none.pt": "none.pt: no such file",
    "sample --model OUT/diffusion/ckpt.pt --tokenizer OUT/tokenizer/ckpt.pt --labels unicorn": "'unicorn' is none of",
    "sample --model OUT/diffusion/ckpt.pt --tokenizer strange/ckpt.pt": "is not the tokenizer that",
    "fid --samples none.npz": "none.npz: no such file", "fid stats empty --out x.npz": "no images found",
    "fid OUT/samples/samples.npz mixed/cat --weights offline": "/pt_inception-2015-12-05-6726825d.pth. put",
    "fid stats shapes --out x.npz": "give --size", "fid latents none.pt --out x": "none.pt: no such file",
    "data --data nowhere": "nowhere: no such folder", "data --data nowhere --out x": "nowhere: no such folder"}

@pytest.fixture(scope="session")
def mistakes_folder(tmp_path_factory, chain):
    at = tmp_path_factory.mktemp("mistakes")
    make_folder(at / "mixed", 2)
    Image.new("RGB", (9, 9)).save(at / "mixed/loose.png")
    [(at / name).mkdir() for name in ("empty", "damaged", "other", "offline")]
    (at / "damaged/ckpt.pt").write_bytes((chain / "tokenizer/ckpt.pt").read_bytes()[:20_000])
    shutil.copy(chain / "diffusion/ckpt.pt", at / "other")
    state = torch.load(chain / "tokenizer/ckpt.pt")
    state["ema"]["to_latent.bias"] += 1
    ONE.save(at / "strange/ckpt.pt", state)
    ONE.save(at / "converted/ckpt.pt", state | {"config": state["config"] | {"data": ""}, "step": None})
    return at

@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_clear_line(mistakes_folder, chain, monkeypatch, capsys, line):
    """In this process: a subprocess for each would take minutes. No file is left."""
    before, (name, *args) = sorted(mistakes_folder.rglob("*")), line.replace("OUT", str(chain)).split()
    monkeypatch.chdir(mistakes_folder)
    monkeypatch.setattr(fid, "WEIGHTS", {k: ("http://127.0.0.1:9/" + url.rpartition("/")[2], sha256)
                                         for k, (url, sha256) in fid.WEIGHTS.items()})
    with pytest.raises(SystemExit) as error:
        call(name, *args)
    said = (capsys.readouterr().err if error.value.code == 2 else error.value.code).strip()
    assert said.startswith(f"{name}.py: ") and MISTAKES[line].lower() in said.lower() and "\n" not in said
    assert before == sorted(mistakes_folder.rglob("*"))

# ---- The house

README = (HERE / "README.md").read_text()

def test_a_compiled_model_is_one_graph(made, made_weights, monkeypatch):
    """Frozen networks, too; the discriminator's has one for each side of its loss."""
    from torch._dynamo.testing import CompileCounter  # it takes longer to import than all else
    compile_, full = torch.compile, {"adversary": "dino", "lpips": 1.0, "targets": "dinov2,siglip", "weights": str(made_weights)}
    for name, short, fields, graphs in (("tokenizer", SHORT["tokenizer"], {}, 1), ("diffusion", SHORT["diffusion"], {}, 3),
                                        ("tokenizer", "--stage2-steps 0", full, 1 + 1 + 2 + 2)):
        counter = CompileCounter()
        monkeypatch.setattr(torch, "compile", partial(compile_, backend=counter))
        monkeypatch.setattr(sys.modules[name], "evaluate", lambda *args: {}, raising=False)
        torch._dynamo.reset()
        call(name, short, made[name], "--compile --steps 3 --out", f"{name}{graphs}", fields=fields)
        assert counter.frame_count == graphs  # of diffusion.py: encoder, decoder, network
    torch._dynamo.reset()
    nets = [ONE.compiled(tokenizer.Block(4, 1), on=True) for _ in range(5)]
    assert all(net(torch.zeros(n, 1, 4)).shape == (n, 1, 4) for net in nets for n in (1, 2))  # more than 8

def test_the_rules_for_labels():
    refused(sample.choose_labels, "0", 1, ["1", "2"], ONE, 0, message="'0' is none of the classes")  # not class number 0
    choose = partial(sample.choose_labels, classes=["a", "b"], dist=ONE, seed=0)
    assert choose("b,0", 3).tolist() == [1, 0, 1] and 400 < choose("random", 1000).sum() < 600

def imports_of(name: str) -> list[tuple[str, int]]:
    """Modules that a script imports, and how many names from each."""
    nodes = list(ast.walk(ast.parse((HERE / f"{name}.py").read_text())))
    whole = [(alias.name.split(".")[0], 0) for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return whole + [(node.module.split(".")[0], len(node.names)) for node in nodes if isinstance(node, ast.ImportFrom)]

# As on Windows: modules that cannot be imported
BLOCK = """import runpy, sys
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios")))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

@pytest.mark.parametrize("name", STAGES)
def test_help_shows_every_flag_without_the_modules_of_unix_and_imports_go_one_way(name, monkeypatch):
    command = [sys.executable, "-c", BLOCK, f"{name}.py", "--help"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fields = dataclasses.fields(sys.modules[name].Config)
    shown = set(re.findall(r"^  (--\w[\w-]*)", done.stdout, re.MULTILINE)) - {"--preset"}
    assert {"--" + f.name.replace("_", "-") for f in fields if "help" in f.metadata} == shown
    assert len(shown) <= {"tokenizer": 35, "diffusion": 25, "sample": 17}.get(name, 12)
    packages = set(sys.stdlib_module_names) | {"torch", "numpy", "tqdm", "PIL", "scipy"}
    later = {"tokenizer"} if name == "fid" else set()  # fid.py latents, inside its function
    assert dict(imports_of(name)).keys() <= packages | {*STAGES[:STAGES.index(name)]} | later
    monkeypatch.delenv("MAETOK_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where nobody knows the user
    refused(data.cache_dir, message="set MAETOK_CACHE")

TINY_FLAGS = {name: [f"--{k.replace('_', '-')}={v}" for k, v in TINY[name].items()
                     if "help" in sys.modules[name].Config.__dataclass_fields__[k].metadata] for name in TINY}
SMALL = {"tokenizer.py": [*TINY_FLAGS["tokenizer"], "--steps=6", "--stage2-steps=4"],
         "diffusion.py": [*TINY_FLAGS["diffusion"], "--steps=6", "--samples=40"], "sample.py": ["--num-samples=40"]}
FEW = SMALL | {"tokenizer.py": [*SMALL["tokenizer.py"], "--data=few", "--size=4", "--patch=2"]}  # a new cache: less to put there
EXPERIMENTS = {  # file: its tiny commands. CHAIN: the tiny models; WEIGHTS; HERE
    "finding": [f"--out f --kinds mae_hog --seeds 0 --dims 8 --jobs 1 --args '{json.dumps(SMALL)}'", "--table bank --out bank/table",
                *(f"--table HERE/results/{name} --out {name}" for name in ("finding", "finding_long", "bank_bf16"))],
    "default_record": [f"a=HERE --out o --args '{json.dumps(FEW)}'"],
    "official_step": ["""--kinds 'ours, eager' --rounds 2 --batch 2 2 --sit 24 1 2 --json o.json
                      --model '{"size":32,"width":24,"heads":2,"depth":1}'"""],
    "bench": ["log CHAIN/tokenizer/log.jsonl --size 128 --out o", "cost --out o",
              "data --images 12 --batch 4 --rounds 2 --out o", "fid --weights WEIGHTS --batch 1 --rounds 1 --out o"],
    "gpu": ["all --tiny --out o"],
    "samplers": ["--model CHAIN/diffusion/ckpt.pt --num-samples 20 --samplers euler heun --steps 2 --guidance 1 --out o"],
    "compare": [f"'tiny=tokenizer.py {shlex.join(SMALL['tokenizer.py'])} --save-every=1 --precision=fp32' --processes 1 2 --out o"]}

@pytest.mark.parametrize("path", [p for p in sorted((HERE / "experiments").glob("*.py")) if p.stem != "common"], ids=lambda p: p.stem)
def test_experiments_run(path, chain, made_weights):
    make_folder("few")
    for line in EXPERIMENTS[path.stem]:
        path.stem in ("finding", "samplers") and pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        for i, kind in enumerate(("ae", "hog_mask_20_60", "hog_depth_1", "mae_hog") if "bank" in line else ()):
            row = content_of("f/table/mae_hog-0.json") | {"kind": kind, "linear_probe": i, "ifd_classifier": -i}  # whose gFD rises
            scores = {"fd_classifier": i + 1.0, "fd_to_reconstructions": i}
            ONE.save(Path(f"bank/{kind}-0.json"), row | {"samples": scores, "samples_guided": scores})
        line = line.replace("CHAIN", str(chain)).replace("WEIGHTS", str(made_weights)).replace("HERE", str(HERE))
        code = forking([sys.executable, str(path), *shlex.split(line)], env={**os.environ}).returncode
        assert code == 0, Path("said").read_text()
    assert path.stem != "finding" or 3 * "| -1.00 | -1.00 to -1.00 " in Path("bank/table/predictors.md").read_text()
    assert sum(line["whole"] and line["rows"] != {} for line in map(content_of, Path().glob("o/gpu*"))) == 8 * (path.stem == "gpu")
    for made in Path().glob("*/*.md"):  # the tables in results/ are those that their runs make
        assert made.read_text() == (HERE / "results" / made).read_text()
        rows = [content_of(path) for path in made.parent.glob("*.json")]
        kinds = [[row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}]
        probe, *scores = ([np.mean([value(row) for row in of]) for of in kinds] for value in (
            lambda row: row["linear_probe"], lambda row: row["samples"]["fd_classifier"],
            lambda row: row["samples_guided"]["fd_classifier"], lambda row: row["samples"]["fd_to_reconstructions"]))
        found = [f"{scipy.stats.spearmanr(probe, score).statistic:+.2f}" for score in scores]
        assert made.stem == "table" or found == re.search(r"probe, % \| (.*)", made.read_text())[1].split(" | ")[::2]

@pytest.mark.bookkeeping
def test_budgets_and_what_the_readme_counts_and_quotes():
    """Lines, bytes, imported names; the README's line counts; each of its Python blocks is code that is there."""
    sources = {path.stem: path.read_text().splitlines() for path in HERE.glob("*.py")}
    assert sources.keys() == {*STAGES, "test_all"} and len(sources["test_all"]) <= 2295
    assert sum(len(sources[name]) for name in STAGES) <= 3535
    assert sum((HERE / f"{name}.py").stat().st_size for name in STAGES) <= 186_800
    assert sum(len(p.read_text().splitlines()) for p in (HERE / "experiments").glob("*.py")) <= 1157
    for name, source in sources.items():
        assert all(count <= {"data": 14, "fid": 9}.get(module, 99) for module, count in imports_of(name)), name
        counted = re.search(rf"\| \[{name}.py\].*?\| (\d+) \|", README)[1]
        assert int(counted) == pytest.approx(len(source), rel=0.03), name
    code = "\n".join(line.strip() for source in sources.values() for line in source)
    for block in re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for part in block.strip().split("\n\n"):
            assert "\n".join(line.strip() for line in part.splitlines()) in code, part

def test_every_command_of_the_readme_runs(cache, made_weights):
    """Its sh blocks in order, by bash; no installing (.ci/run does it), small files and sizes, torchrun as one process."""
    make_folder("images", 20, size=16)
    make_folder("A", 8, ("",), 16)
    make_folder("B", 9, ("",), 16)
    release("maetok-b-128", golden("maetok/tokenizer_tiny_b_movq")[1], vq_mean=0.5, vq_std=2.0)
    release("sit-xl", golden("maetok/sit_tiny_b")[1], num_heads=6)
    small = {"tokenizer": f"{shlex.join(TINY_FLAGS['tokenizer'])} --steps=2 --stage2-steps=1 --weights={made_weights}",
             "diffusion": f"{shlex.join(TINY_FLAGS['diffusion'])} --steps=4 --keep-every=2 --samples=20 --batch-size=8",
             "sample": "--num-samples=20 --steps=2", "fid": f"--weights={made_weights} --dims=8", "data": "--size=16"}
    text = "".join(re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    text = re.sub(r"python3 -m venv .*?requirements.txt( pytest(-xdist)?==[\d.]+)* && ", "", text)
    for old, new in {"path/to/": "", "/data/imagenet": "images"}.items():
        assert old in text
        text = text.replace(old, new)
    ran = []
    for line in re.split(r"\n| && ", text.strip()):
        launcher, *words = shlex.split(line, comments=True)
        script_, *flags = itertools.dropwhile(lambda word: word.startswith("--"), words)  # those are of torchrun
        ran.append(f"{launcher} {script_}")
        if script_.removesuffix(".py") in small:
            call(script_.removesuffix(".py"), shlex.join(flags), small[script_.removesuffix(".py")])
        else:
            end = [*flags, "--collect-only"] if script_ == "-m" else ["--help"]
            subprocess.run([sys.executable, script_, *end], cwd=HERE, check=True, stdout=subprocess.DEVNULL)
    assert {"python data.py", *(f"torchrun {name}.py" for name in STAGES[1:])} <= set(ran)

# Numbers of the README that are not ours: the paper's; then settings, versions, and limits that a test states
NOT_OURS = """0.67 24.47 0.85 5.78 0.48 5.69 1.22 22.17 1.75 18.17 1.15 17.18 2.43 13.54 0.89 6.24 23.61 2.31 1.67 40 60 24.15 22.63 20.35 6.98 6.43 7.12 8.80
0.75 2.0 4.0 1.0 3.0 45 90 1 2.13.0 0.4.0 2.9.1 2.14.1 2.11 3.10 3.11 3.13 3.2 3.3 3.1 171.9 2.9 13.73 6.27 2603.05630"""

def test_numbers_in_both_readmes_are_in_the_results():
    """Each decimal number or percentage outside code rounds a value in results/, or stands above; rows with a spread, too."""
    files = [p.read_text() for p in (HERE / "results").rglob("*") if p.suffix == ".json" or p.name in ("table.md", "predictors.md")]
    values = np.array([float(n) for n in re.findall(r"(?<![\w.])\d+\.?\d*(?:e-?\d+)?(?![\w.])", "\n".join(files))])
    quoted = {line for line in README.splitlines() if line.startswith("|") and " ± " in line}
    assert len(quoted) > 5 and quoted <= set("\n".join(files).splitlines())
    code = re.compile(r"^```.*?^```|`[^`]*`|\]\(.*?\)|^#.*?$|Eq\. ?\d+|\(\[arXiv.*?\)", re.MULTILINE | re.DOTALL)
    for number, percent in re.findall(r"(?<![\w.\-])(\d[\d,]*(?:\.\d+)*)( %)?", code.sub(" ", README + (HERE / "results/README.md").read_text())):
        number = number.rstrip(",").replace(",", "")
        if ("." in number or percent) and number not in NOT_OURS.split():
            half = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
            assert any((np.abs(scale * values - float(number)) <= half).any() for scale in (1, 100)), number
