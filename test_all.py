"""All tests: `python -m pytest -q -n 2 test_all.py`. CPU only; the scripts run end to end at a tiny size in subprocesses.

Reference values are read from ../shared/goldens where that folder is (the full set), else from assets/goldens.
Markers: `bookkeeping` counts lines or quotes code, a fork can leave it out; `campaign` is long, run it by -m campaign.
"""
import argparse
import ast
import copy
import dataclasses
import functools
import hashlib
import http.server
import importlib
import io
import itertools
import json
import math
import os
import re
import resource
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
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

os.environ["CUDA_VISIBLE_DEVICES"] = ""                 # before torch: the tests are for the CPU,
os.environ.setdefault("OMP_NUM_THREADS", "1")           # and threads of several processes hinder each other
import torch
import torch.nn.attention
import torch.nn.functional as F
import torch.utils.flop_counter
from PIL import Image

import data
import diffusion
import fid
import sample
import tokenizer

HERE = Path(__file__).resolve().parent
GOLDENS = next(p for p in (HERE.parent / "shared/goldens", HERE / "assets/goldens") if p.is_dir())
STAGES = ("data", "fid", "tokenizer", "diffusion", "sample")
ONE, CPU = data.Dist(), torch.device("cpu")             # one process, CPU, fp32


def golden(name: str) -> tuple[dict, dict, dict]:
    """Arrays, weights under their official names, and the case of one golden file."""
    with np.load(GOLDENS / f"{name}.npz") as z:
        tensors = {k: torch.from_numpy(z[k]) for k in z.files if z[k].dtype.kind in "fiub" and z[k].ndim}
        case = json.loads(str(z["case" if "case" in z.files else "meta"]))
        tensors |= {k: z[k].item() for k in z.files if z[k].ndim == 0 and z[k].dtype.kind in "fi"}
    return tensors, below(tensors, "sd/"), case


def goldens(family: str, pattern: str):
    """One case of a test per golden file. No gradients, unless the test turns them on."""
    names = sorted(f"{family}/{p.stem}" for p in (GOLDENS / family).glob(pattern))
    return pytest.mark.parametrize("name", names)


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


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with the reference implementations


@goldens("maetok", "tokenizer_*")
def test_tokenizer_agrees_with_official(name):
    t, weights, case = golden(name)
    model, _ = tokenizer.from_official(weights, case["enc"]["num_heads"], case["dec"]["num_heads"])
    pairs = {"encoder_tokens": model.encoder(t["image"]), "latents": model.encode(t["image"]),
             "reconstruction": model(t["image"])["recon"], "free_reconstruction": model.decode(t["free_latents"])}
    if "mask" in t:
        mask = t["mask"].bool()
        pairs |= {"masked_latents": model.encode(t["image"], mask), "masked_reconstruction": model(t["image"], mask)["recon"]}
    for key, ours in pairs.items():
        close(ours, t[key])


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
    t, _, _ = golden(name)
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
    out = model(x, mask)
    close(model.encode(x, mask), t["latents"])
    close(out["recon"][..., ::4, ::4], t["reconstruction"])
    hog = tokenizer.hog(x, cfg.patch)
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
    """Hinge, LeCam, DiffAugment; then adaptive weight and both objectives, with the small networks of the golden. Warm-up
    and start step of the loop itself are in test_a_step_has_the_gradients_of_the_sum.
    """
    t, _, case = golden(name)
    close(tokenizer.hinge_loss(t["logits_real"], t["logits_fake"]), t["hinge_d"])
    lecam = tokenizer.LeCam(ONE)
    for real, fake, means, value in zip(t["lecam_real"], t["lecam_fake"], t["lecam_ema"], t["lecam_reg"]):
        close(lecam(real, fake), value)
        close(lecam.means, means)
    augment, color = partial(tokenizer.augment, t["aug_x"]), t["aug_u"]
    for i, operation in enumerate(("brightness", "saturation", "contrast")):
        alone = torch.full_like(color, 0.5)              # the middle of each range changes nothing
        alone[i] = color[i]
        close(augment({"color": alone}, 0.2), t[f"aug_{operation}"])
    close(augment({"shift": t["aug_shift"]}, 0.2), t["aug_translation"])
    for share in (0.2, 0.5):
        close(augment({"cutout": t[f"aug_cutout{share}_offset"]}, share), t[f"aug_cutout{share}"])

    cfg = tokenizer.Config(size=16, patch=8, batch_size=case["batch"], lpips=1.0, adv_weight=0.4, lecam=0.001,
                           diffaug=False, consistency=0.0)
    adversary = tokenizer.Adversary(cfg, ONE, Probe(below(t, "probe/")))
    real, recon = t["vq_real"], t["vq_recon"]
    image = tokenizer.unpatchify(t["vq_feat"] @ t["vq_last_layer"].T, 4).requires_grad_()
    large = image.repeat_interleave(2, 2).repeat_interleave(2, 3)    # the golden enlarges its image
    close(large.detach(), recon)
    for i, step in enumerate(t["vq_steps"].tolist()):
        losses = tokenizer.image_loss(recon, real, lambda a, b: (a - b).abs().mean((1, 2, 3)))
        warm, on = min(1, step / 10), step >= 30         # the warm-up and the start step of the case
        terms = (large - real).square().mean() + warm * (large - real).abs().mean(), -adversary.net(large)[0].mean()
        grads = [torch.autograd.grad(term, image, retain_graph=True)[0] for term in terms]
        adaptive = tokenizer.adaptive_weight(*grads, t["vq_feat"], 4, ONE)
        close(adaptive, t["vq_adaptive_weight"][i])
        adv = on * 0.4 * adaptive * adversary.generator_loss(recon, step - 1, slice(None))
        close(losses["recon"] + warm * losses["lpips"] + t["vq_codebook_losses"].sum() + adv, t["vq_gen_loss"][i])
        if on:
            terms = adversary.train_step(real, recon, step - 1, 0.0)
            close(0.4 * (terms["hinge"] + 0.001 * terms["lecam"]), t["vq_disc_loss"][i])
        else:                                            # the official code moves the LeCam means from the first step
            adversary.lecam(*adversary.net(real, recon))


def dino_discriminator(trunk, weights, *args):
    """With weights under the official names; of a norm without running statistics some stay unused."""
    net = tokenizer.DinoDiscriminator(trunk.eval(), *args)
    own = net.state_dict()
    net.load_state_dict({k: weights.get(k, v) for k, v in own.items()})
    assert {k for k in own if "running" not in k and "tracked" not in k} <= weights.keys()
    return net


@goldens("maetok", "disc_dino_*")
@torch.no_grad()
def test_dino_discriminator_agrees_with_official(name):
    t, _, case = golden(name)
    trunk = fid.VisionTransformer(below(t, "dino/"), "dino", case["num_heads"])
    net = dino_discriminator(trunk, below(t, "disc/"), "batch", tuple(case["key_depths"]))
    for i, tap in enumerate(net.features(t["x"])):
        close(tap[0, :, :16], t[f"activation{i}"])
    net.eval()
    close(net(t["x"])[0], t["logits_eval"])
    if "x_large" in t:
        close(net(t["x_large"])[0], t["logits_eval_large"])
    close(net.train()(t["x"])[0], t["logits_train"])


def filled(shapes: dict, seed: int) -> dict[str, torch.Tensor]:
    """Weights that follow from (seed, name, shape): how the goldens of `metrics` were made."""
    tokens = "pos_embed", "cls_token", "dist_token", "register_tokens", "mask_token", "position_embedding", "probe"
    weights = {}
    for key, shape in shapes.items():
        last, n, rank = key.rpartition(".")[2], math.prod(shape), len(shape)
        u = (2 * np.random.default_rng([seed, zlib.crc32(key.encode())]).random(n) - 1).reshape(shape)
        if last == "num_batches_tracked":
            u = np.zeros(shape, np.int64)
        elif last in ("running_var", "running_mean"):
            u = 1 + 0.5 * u if last == "running_var" else 0.2 * u
        elif last in ("weight_u", "weight_v"):
            u = u / np.sqrt((u * u).sum())
        elif any(token in key for token in tokens):
            u = 0.5 * math.sqrt(3) * u
        elif key.startswith("lin") and rank == 4 and shape[0] == 1:
            u = 0.5 * (u + 1)
        elif rank <= 1:
            u = 1 + 0.25 * u if last in ("weight", "gamma") else 0.1 * u
        else:
            u = math.sqrt(3 * (2 if rank >= 3 else 1) / math.prod(shape[1:])) * u
        weights[key] = torch.from_numpy(u if u.dtype == np.int64 else u.astype(np.float32))
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
    x = images_of(t, "img")
    for norm, tag in (("batch", "sbn"), ("groups", "bn")):
        net = dino_discriminator(trunk, heads, norm)
        for turn in ("first", "second"):
            near(net(x)[0], t[f"logits_{tag}_{turn}"], 1e-4)
    near(net.eval()(x)[0], t["logits_bn_eval"], 1e-4)
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
    whole, heads = filled(case["keys"], case["weight_seed"]), case["config"]["num_attention_heads"]
    small = shrunk(whole, r"embeddings\.|out_proj\.|\.mlp\.fc2\.")
    for weights, size, suffix in ((whole, "native", ""), (whole, "interp", ""), (small, "native", "_small")):
        net = fid.VisionTransformer(weights, "siglip", heads).eval()
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
        net = fid.Lpips(vgg, heads[kind])                # in training mode, too: nothing in it is random
        pair = images_of(t, f"a_{size}"), images_of(t, f"b_{size}")
        near(net.layers(*pair), t[key], 1e-6)
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
    close(model.t_embedder(t["t"]), t["t_embed"])
    close(model(t["x"], t["t"], t["y"]), t["velocity"])
    if case["keep_pos_embed"]:
        close(diffusion.token_positions(*model.pos_embed.shape[1:]), weights["pos_embed"])


@goldens("maetok", "loss_*")
def test_flow_loss_agrees_with_official(name):
    t, weights, case = golden(name)
    model = build_sit(weights, case["args"])
    for path, times in itertools.product(("linear", "cosine"), ("uniform", "lognormal")):
        at = t["uniform_t"] if times == "uniform" else diffusion.lognormal_timesteps(t["rnd_normal"], path)
        close(at, t[f"{path}_{times}_t"])
        loss = diffusion.velocity_loss(model, t["x"], t["noise"], at.flatten(), t["y"], path)
        close(loss, t[f"{path}_{times}_loss"])


@goldens("maetok", "sampler_*")
@torch.no_grad()
def test_samplers_agree_with_official(name):
    t, weights, case = golden(name)
    model, calls = build_sit(weights, case["args"]), []
    model.register_forward_pre_hook(lambda _, args: calls.append((args[1][0].item(), len(args[0]))))
    for suffix, scale in (("cfg1", 1.0), ("cfg", t["cfg_scale"])):
        args = diffusion.guided_velocity(model, t["y"], scale, *case["interval"]), t["noise"], t["num_steps"]
        solvers = {"euler": partial(diffusion.sample_ode, *args), "heun": partial(diffusion.sample_ode, *args, heun=True)}
        for path in ("linear", "cosine"):
            solvers[f"sde_{path}"] = partial(diffusion.sample_sde, *args, path, iter(t["sde_eps"]).__next__)
        for solver, solve in solvers.items():
            calls.clear()
            close(solve(), t[f"{solver}_{suffix}"])
            close([c[0] for c in calls], t[f"{solver}_{suffix}_call_t"], 1e-6)
            assert [c[1] for c in calls] == t[f"{solver}_{suffix}_call_rows"].tolist()


def moments(features, size=37):
    whole = fid.Moments(features.shape[1], CPU)
    for part in features.split(size):
        whole.add(part)
    return whole.finish(ONE)


@goldens("metrics", "frechet*")
def test_frechet_distance_inception_score_precision_and_recall_agree(name):
    """With exact values, and with ADM's; the second are in the full goldens only, and in the end-to-end golden."""
    t, _, case = golden(name)
    found = {tag: moments(t[f"feat_{tag}"]) for tag in "ABCD"}
    for a, b in ("AB", "CD", "AC"):                      # C and D have fewer samples than dimensions
        assert fid.frechet_distance(*found[a], *found[b]) == pytest.approx(t[f"fid_exact_{a}{b}"], rel=1e-6)
    assert fid.frechet_distance(*found["A"], *found["A"]) < 1e-6
    if "is_acts" not in t:
        return
    logits = t["is_acts"] @ t["is_W"]
    for block, key in ((case["is_split_size"], "is_adm_split"), (5000, "is_adm_default")):
        score = fid.InceptionScore(len(logits), CPU, block, logits.shape[1])
        for part in torch.arange(len(logits)).flip(0).split(77):     # whatever order they come in
            score.add(part, logits[part])
        assert score.finish(ONE) == pytest.approx(t[key], rel=1e-5)
    for tag, middle in (("g", ""), ("nn", "nn_")):
        ref, smp = t[f"pr_{middle}ref"], t[f"pr_{middle}smp"]
        assert fid.precision_recall(ref, smp, tile=130) == pytest.approx(t[f"pr_{tag}_exact"].tolist())
        close(fid.knn_radii(ref), t[f"pr_{tag}_radii_ref_fp32"], 1e-5)
        close(fid.knn_radii(smp, tile=50), t[f"pr_{tag}_radii_smp_fp32"], 1e-5)


@goldens("metrics", "resize*")
def test_resize_agrees_with_tensorflow(name):
    t, _, _ = golden(name)
    for key in (k for k in t if k.startswith("img_")):
        out = fid.tf_resize(t[key].permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        assert torch.equal(out[t["rows"]][:, t["cols"]], t[f"tf1_{key[4:]}"])         # not a bit apart
        close(out.double().sum((0, 1)), t[f"tf1sum_{key[4:]}"], 1e-9)


@functools.cache
def inception(resize):
    net = fid.Inception(filled(public_keys("inception_fid"), 1000), resize).eval()
    return net, filled(public_keys("inception_fid"), 1000)["fc.bias"]    # the bias of classification, which no score uses


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
    ref, smp = (fid.inception_statistics(inception("tf1")[0], images, ONE, 16, keep=99) for images in sets)
    for key, mean, cov in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        assert fid.frechet_distance(ref[mean], ref[cov], smp[mean], smp[cov]) == pytest.approx(t[key], rel=1e-5)
    assert smp["inception_score"] - 1 == pytest.approx(t["is_split5000"] - 1, rel=1e-4)
    assert fid.precision_recall(ref["features"], smp["features"]) == pytest.approx(t["precision_recall"].tolist())


# Released checkpoints


def key_list(name: str) -> dict[str, list[int]]:
    rows = [line.split("\t") for line in (GOLDENS / f"maetok/keys/{name}.tsv").read_text().splitlines()[1:]]
    return {key: [int(n) for n in shape.split("x")] for key, shape, *_ in rows}


@pytest.mark.parametrize("name", ["ae_b128_256_plain_cls", "ae_b128_512_p16_movq_nocls"])
@torch.no_grad()
def test_a_released_tokenizer_at_full_size(name, tmp_path, capsys):
    """The exact key list with random values: --from-official, then an image there and back; the statistics travel."""
    torch.manual_seed(0)
    weights = {key: 0.03 * torch.randn(shape) for key, shape in key_list(name).items()}
    (tmp_path / "official").mkdir()
    write_safetensors(tmp_path / "official/model.safetensors", weights)
    (tmp_path / "official/config.json").write_text(json.dumps({"vq_mean": 0.01, "vq_std": 0.07, "image_size": 1}))
    start = time.time()
    read = fid.read_weights(tmp_path / "official/model.safetensors")
    assert time.time() - start < 5 and all(torch.equal(read[k], weights[k]) for k in weights)
    start = time.time()
    model, cfg = tokenizer.from_official(read)
    assert time.time() - start < 5
    assert (cfg.size, cfg.latents, cfg.channels) == (512 if "512" in name else 256, 128, 32)
    call("tokenizer", "--from-official", tmp_path / "official", "--out", tmp_path / "out")
    assert "0.07" in capsys.readouterr().out
    again, _ = tokenizer.load_tokenizer(tmp_path / "out/ckpt.pt", CPU)
    stored = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert stored["latent_statistics"] == {"mean": 0.01, "std": 0.07}
    assert (tmp_path / "out/ckpt.pt").stat().st_size < 4.01 * sum(p.numel() for p in model.parameters()) + 1e6
    x = torch.rand(1, 3, cfg.size, cfg.size) * 2 - 1
    z = model.encode(x)
    image = model.decode(z)
    assert z.shape == (1, 128, 32) and image.shape == x.shape and image.isfinite().all()
    assert torch.equal(again.encode(x), z) and torch.equal(again.decode(z), image)


@torch.no_grad()
def test_a_released_sit_at_full_size():
    """The exact key list: strict, every number accounted for, and it runs (values repeated, so that it fits)."""
    shapes = key_list("sit_xl_1d_128x32")
    weights = {key: torch.full([1] * len(shape), 0.01).expand(shape) for key, shape in shapes.items()}
    model = diffusion.from_official(weights)
    assert sum(math.prod(v.shape) for v in model.state_dict().values()) == 675_000_608
    assert (model.shape, model.null_class, len(model.blocks)) == ((128, 32), 1000, 28)
    assert model.blocks[0].attn.heads == 16
    assert model(torch.randn(1, 128, 32), torch.tensor([0.5]), torch.tensor([1000])).shape == (1, 128, 32)
    del weights["blocks.3.mlp.fc1.bias"]
    refused(diffusion.from_official, weights, message="blocks.3.mlp.fc1.bias")


def test_each_damage_to_a_released_checkpoint_is_named():
    name = "tokenizer_tiny_a" if (GOLDENS / "maetok/tokenizer_tiny_a.npz").exists() else "tokenizer_tiny_b_movq"
    _, weights, case = golden(f"maetok/{name}")
    load = partial(tokenizer.from_official, enc_heads=case["enc"]["num_heads"], dec_heads=case["dec"]["num_heads"])
    refused(load, weights | {"encoder.surprise": torch.zeros(1)}, message="encoder.surprise is unknown")
    folded = re.compile(r"freqs_t_|decoder.model.(pos_embed|patch_embed|cls_token)|norm.adaLN|encoder.mask_token")
    for key in weights:
        if not folded.search(key):
            said = refused(load, {k: v for k, v in weights.items() if k != key})
            assert f"{key} is missing" in said or key.endswith(("freqs", "adaLN_modulation.1.weight")), (key, said)
        if key.startswith(("encoder", "quant", "post")) and "freqs_t_" not in key:
            for other in (weights[key][..., None], weights[key].flatten()[:1], torch.tensor(1.0)):
                refused(load, weights | {key: other})


def test_a_training_checkpoint_becomes_a_tokenizer_that_a_released_sit_samples_with(tmp_path, monkeypatch):
    _, weights, _ = golden("maetok/tokenizer_tiny_b_movq")
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "ema": weights, "args": argparse.Namespace(lr=1)}, "train.pt")
    torch.save(weights, "bare.pt")
    assert fid.read_weights("train.pt").keys() == fid.read_weights("bare.pt").keys() == weights.keys()
    Path("config.json").write_text(json.dumps({"vq_mean": 0.5, "vq_std": 2.0}))
    call("tokenizer", "--from-official", "train.pt", "--out", "tok")
    refused(call, "tokenizer", "--from-official", "train.pt", "--out", "tok", message="is there already")
    _, weights, case = golden("maetok/sit_tiny_b")
    Path("sit").mkdir()
    write_safetensors(Path("sit/model.safetensors"), weights)
    Path("sit/config.json").write_text(json.dumps({"num_heads": case["args"]["num_heads"]}))
    call("sample", "--preset", "paper256", "--model", "sit", "--tokenizer", "tok/ckpt.pt", "--num-samples", 9, "--png",
         "--precision", "fp32", "--sampler", "euler", "--steps", 3)
    with np.load("out/samples/samples.npz") as z:
        images, labels = z["arr_0"], torch.from_numpy(z["labels"])
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1] and images.shape == (9, 64, 64, 3)
    assert np.array_equal(np.asarray(Image.open("out/samples/png/000008.png")), images[8])
    sit, (model, _) = build_sit(weights, case["args"]), tokenizer.load_tokenizer("tok/ckpt.pt", CPU)
    with torch.no_grad():
        velocity = diffusion.guided_velocity(sit, labels, 1.9, 0.0, 0.75)
        x = diffusion.sample_ode(velocity, diffusion.ImageNoise(range(9), 0, sit.shape, ONE)(), 3)
        again = data.to_uint8(model.decode(x.float() * 2 + 0.5))
    assert np.abs(again.permute(0, 2, 3, 1).numpy().astype(int) - images).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Running the scripts

# Settings of a tiny run: flags and other fields. They become a preset `tiny`
TINY = {"tokenizer": {"size": 16, "patch": 4, "width": 24, "heads": 2, "depth": 1, "aux_width": 16, "aux_depth": 1,
                      "latents": 4, "channels": 4, "batch_size": 16, "warmup": 2, "log_every": 1},
        "diffusion": {"width": 24, "heads": 2, "depth": 1, "batch_size": 16, "sampling_steps": 2, "log_every": 1}}
DRIVER = f"""import importlib, json, sys
sys.path.insert(0, {str(HERE)!r})
_, name, fields, *flags = sys.argv
import data
module = importlib.import_module(name)
sys.argv = [name + ".py", "--preset", "tiny", *flags]
data.launch(module.main, module.Config, module.PRESETS | {{"tiny": json.loads(fields)}}, module.__doc__)
"""
FP32 = ["--precision", "fp32", "--optimizer", "adamw"]


def script(name, *args, cwd, fields=None, processes=1, check=True, background=False, before=None):
    """Run a script in a subprocess: tokenizer.py and diffusion.py with TINY and `fields`, the others as they are."""
    command = [str(HERE / f"{name}.py")]
    if name in TINY:
        command = ["-c", DRIVER, name, json.dumps(TINY[name] | (fields or {}))]
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--max-restarts=1",
                    "--master_port", str(20_000 + os.getpid() % 20_000), "--no-python", sys.executable]
    command, env = [sys.executable, *launcher, *command, *map(str, args)], os.environ | {"OMP_NUM_THREADS": "1"}
    if background:
        with open(Path(cwd) / "said.txt", "w") as said:
            return subprocess.Popen(command, cwd=cwd, env=env, stdout=said, stderr=said)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=400, check=False,
                          preexec_fn=before)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def call(name, *args, fields=None) -> None:
    """Run a script in this process, as its last line does; with `fields` they are a preset, as in `script`."""
    module, before = sys.modules[name], sys.argv
    presets, flags = getattr(module, "PRESETS", {}), [str(arg) for arg in args]
    if fields is not None:
        presets, flags = presets | {"tiny": TINY[name] | fields}, ["--preset", "tiny", *flags]
    sys.argv = [f"{name}.py"]
    try:
        flags = fid.arguments(flags) if name == "fid" else flags
        data.launch(module.main, module.Config, presets, module.__doc__, flags)
    finally:
        sys.argv = before


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One cache of rendered images and classifiers for all tests: the user's own if it is set, else a temporary one,
    which the processes of -n share.
    """
    at = tmp_path_factory.getbasetemp()
    at = at.parent if "PYTEST_XDIST_WORKER" in os.environ else at
    return Path(os.environ.setdefault("MAETOK_CACHE", str(at / "cache")))


@pytest.fixture(scope="session")
def chain(tmp_path_factory, cache):
    """The folder `out` of the four scripts, which ran once, tiny."""
    at = tmp_path_factory.mktemp("chain")
    script("tokenizer", "--steps", 12, "--stage2-steps", 8, cwd=at)
    script("diffusion", "--steps", 10, "--samples", 40, "--tokenizer", at / "out/tokenizer/ckpt.pt", cwd=at)
    script("sample", "--num-samples", 30, "--steps", 3, "--batch-size", 8, cwd=at)
    script("fid", cwd=at)
    return at / "out"


@pytest.fixture
def made(chain):
    """The flags that name the tiny models."""
    return {"diffusion": ["--tokenizer", chain / "tokenizer/ckpt.pt"],
            "sample": ["--model", chain / "diffusion/ckpt.pt", "--tokenizer", chain / "tokenizer/ckpt.pt"]}


def log_of(folder) -> list[dict]:
    """The lines of a log without what the clock measures."""
    clock = {"images_per_s", "tflops", "data_wait", "memory_gib"}
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def assert_losses_agree(one: Path, two: Path, count: int) -> None:
    a, b = (np.array([line[key] for line in log_of(folder) for key in ("recon", "hog", "loss") if key in line])
            for folder in (one, two))
    assert len(a) == len(b) == count and np.abs(a / b - 1).max() < 1e-4


def tensors_of(path) -> dict:
    """All tensors of a nested checkpoint by path."""
    def walk(state, prefix):
        items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
        own = {prefix[1:]: state} if isinstance(state, torch.Tensor) else {}
        return own | {k: v for key, value in items for k, v in walk(value, f"{prefix}.{key}").items()}

    return walk(torch.load(path, weights_only=True), "")


def assert_same(one: Path, two: Path, *files: str) -> None:
    """The files of two runs hold the same numbers, bit for bit."""
    for a, b in ((one / file, two / file) for file in files):
        if a.is_dir():
            names = [{p.name for p in folder.iterdir() if p.suffix != ".part"} for folder in (a, b)]
            assert names[0] == names[1] != set()
            assert_same(a, b, *names[0])
        elif a.name == "log.jsonl":
            assert log_of(one) == log_of(two)
        elif a.name == "metrics.json":
            x, y = (json.loads(path.read_text()) | {"seconds": 0} for path in (a, b))
            assert x == y
        elif a.suffix == ".pt":
            x, y = tensors_of(a), tensors_of(b)
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), a
        elif a.suffix == ".npz":
            with np.load(a) as x, np.load(b) as y:
                assert x.files == y.files
                assert all(x[k].dtype == y[k].dtype and np.array_equal(x[k], y[k]) for k in x.files), a
        else:
            assert a.read_bytes() == b.read_bytes(), a


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)


def logged(folder: Path, step: int, stage="") -> bool:
    line = f'"stage": "{stage}", "step": {step},' if stage else f'"step": {step},'
    return (folder / "log.jsonl").exists() and line in (folder / "log.jsonl").read_text()


def kill_when(condition, process) -> None:
    wait_for(condition, process)
    process.kill()
    process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# All losses at once, with made weights


def write_safetensors(path: Path, tensors: dict) -> None:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [at, at + 4 * x.numel()]}
        at += 4 * x.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                      # real files are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.contiguous().numpy().tobytes())


@pytest.fixture(scope="session")
def made_weights(tmp_path_factory):
    """A folder of pretrained networks under their public names and keys: random, and all but VGG16 and Inception small."""
    at = tmp_path_factory.mktemp("weights")
    dino = below(golden("maetok/disc_dino_a")[0], "dino/")
    dino |= {key.replace(".0.", f".{i}."): x for key, x in dino.items() if "blocks.0." in key for i in range(12)}
    dinov2, siglip = (golden(f"metrics/{name}")[2]["keys"] for name in ("dinov2", "siglip"))
    for name, weights in {
            "vgg16-397923af": filled({k: v for k, v in public_keys("vgg16").items() if "features" in k}, 1),
            "lpips_vgg": filled(public_keys("lpips_heads_v0.1_vgg"), 1),
            "pt_inception-2015-12-05-6726825d": filled(public_keys("inception_fid"), 1000),
            "dino_deitsmall16_pretrain": dino, "dinov2_vits14_pretrain": filled(dinov2["plain"], 1),
            "dinov2_vitl14_pretrain": filled(dinov2["plain"], 1)}.items():
        torch.save(weights, at / f"{name}.pth")
    unused = {"logit_scale": (1,), "text_model.final_layer_norm.bias": (64,)}
    write_safetensors(at / "siglip-large-patch16-256.safetensors", filled(siglip | unused, 1))
    return at


FULL = TINY["tokenizer"] | {
    "size": 32, "patch": 8, "targets": "pixel,hog,dinov2,siglip", "dinov2": "vits14", "lpips": 1.0, "lpips_warmup": 4,
    "adversary": "dino", "adv_start": 3, "adv_norm": "groups", "precision": "fp32", "optimizer": "adamw", "lr": 1e-4}
LOSSES = {"recon", "lpips", "pixel", "hog", "dinov2", "siglip", "grad"}
ADVERSARIAL = {"adv", "adaptive", "hinge", "lecam", "consistency", "logits_real", "logits_fake", "grad_d"}


def test_all_losses_train_resume_and_share_out(made_weights, cache, tmp_path):
    """Every term finite and logged from its step on; two processes as one; a run that is killed goes on bit by bit, its
    discriminator and LeCam means too. Batch norm is of groups of 8, as processes on a CPU share no statistics.
    """
    (tmp_path / "pictures").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (42, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"pictures/{i}.png")
    run = partial(script, "tokenizer", "--weights", made_weights, "--steps", 6, "--stage2-steps", 3, "--save-every", 2,
                  "--data", "pictures", cwd=tmp_path, fields=FULL)
    run("--rfid", "--out", "whole")
    whole = log_of(tmp_path / "whole")
    assert len(whole) == 9
    for line in whole:
        first = line["stage"] == "stage 1"
        terms = {"stage", "step", "lr"} | (LOSSES if first else {"recon", "lpips", "grad"})
        assert line.keys() == terms | (ADVERSARIAL if not first or line["step"] >= 3 else set()), line
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
    metrics = json.loads((tmp_path / "whole/metrics.json").read_text())
    assert metrics["latents_unchanged_by_stage2"] and metrics["stage2"]["lpips"] > 0 and metrics["stage2"]["rfid"] > 0
    run("--out", "two", processes=2)
    for one, two in zip(whole, log_of(tmp_path / "two"), strict=True):
        for name in one.keys() - {"stage"}:
            tolerance = 5e-3 if name in ("adaptive", "grad") else 1e-4     # of small norms
            assert two[name] == pytest.approx(one[name], rel=tolerance, abs=1e-6), (name, one, two)
    kill_when(lambda: logged(tmp_path / "cut", 5), run("--out", "cut", background=True))
    assert "continuing" in run("--out", "cut").stdout
    assert_same(tmp_path / "whole", tmp_path / "cut", "ckpt.pt", "stage1.pt", "log.jsonl")
    assert {"adversary.means", "adversary.net.heads.0.0.0.weight_u"} <= tensors_of(tmp_path / "cut/ckpt.pt").keys()


@pytest.fixture
def all_losses(made_weights, tmp_path):
    """Settings of FULL, model, targets, LPIPS, adversary and a batch."""
    def make(**more):
        cfg = tokenizer.Config(**(FULL | {"weights": str(made_weights), "out": str(tmp_path)} | more))
        targets = {name: tokenizer.TARGETS[name](cfg, ONE, None) for name in cfg.target_names()}
        model = tokenizer.Tokenizer(cfg, {name: target.width for name, target in targets.items()})
        x = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        return cfg, model, targets, fid.load_lpips(cfg.weights, ONE), tokenizer.Adversary(cfg, ONE), x

    return make


class Recorder:
    """An optimizer that keeps the gradients of the last step and changes nothing."""
    param_groups = ()

    def __init__(self, model):
        self.model, self.zero_grad, self.state_dict = model, model.zero_grad, dict

    def step(self):
        self.grads = {k: p.grad.clone() for k, p in self.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage, adv_start", [(1, 0), (1, 2), (2, 2)])
def test_a_step_has_the_gradients_of_the_sum(all_losses, monkeypatch, stage, adv_start):
    """The loop's backward pass from both ends is an arrangement of Eq. 6 plus Eq. 8, not another loss. The adaptive
    weight is that of the last matrix; LPIPS warms up, and L_adv begins, over the steps of both stages.
    """
    cfg, model, targets, lpips, adversary, x = all_losses(steps=1, stage2_steps=1, adv_start=adv_start, clip=0.0,
                                                          aux_weight=0.5)
    targets, on = targets if stage == 1 else {}, stage >= adv_start
    adversary.net.eval()                                 # spectral norm stands still
    frozen, recorder = copy.deepcopy(adversary), Recorder(model)
    loader = type("Source", (), {"wait_seconds": 0.0, "__call__": lambda self, step: (x, None)})()
    monkeypatch.setattr(tokenizer, "make_optimizers", lambda model, cfg: [recorder])
    monkeypatch.setattr(tokenizer, "Loader", lambda *args: loader)
    tokenizer.train(cfg, ONE, stage, model, None, targets, lpips, adversary, None)

    ratio, stream = cfg.mask_max, "mask, stage 2"
    if stage == 1:
        ratio = tokenizer.sample_mask_ratio(cfg.mask_min, cfg.mask_max, ONE.rng(cfg.seed, "mask ratio", 0))
        stream = "mask"
    mask = tokenizer.random_mask(16, 16, ratio, ONE.generator(cfg.seed, stream, 0))
    out = model(x, mask)
    loss = F.mse_loss(out["recon"], x) + min(1, stage / 4) * lpips(out["recon"], x).mean()
    if on:
        adv, last = frozen.generator_loss(out["recon"], stage - 1, slice(None)), model.decoder.head.weight
        norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (loss, adv)]
        loss = loss + cfg.adv_weight * (norms[0] / (norms[1] + 1e-4)).detach() * adv
    loss = loss + sum(0.5 * target.loss(out[name], target.features(x), mask) for name, target in targets.items())
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert recorder.grads.keys() == trained.keys() and (stage == 1 or all(k.startswith("decoder.") for k in trained))
    for name, grad in zip(trained, torch.autograd.grad(loss, trained.values())):
        assert grad.abs().max() > 0, name
        close(recorder.grads[name], grad, 1e-3)
    moved = [not torch.equal(a, b) for a, b in zip(frozen.net.parameters(), adversary.net.parameters())]
    assert (all(moved) if on else not any(moved)) and ("adv" in log_of(cfg.out)[0]) == on


def test_each_loss_reaches_its_part_only(all_losses):
    cfg, model, targets, lpips, adversary, x = all_losses(adv_start=0)
    mask, names = torch.arange(16).expand(16, 16) % 2 == 0, {name for name, _ in model.named_parameters()}

    def touched(net, loss=None):
        if loss is not None:
            loss.backward(retain_graph=True)
        found = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        net.zero_grad()
        return found

    out = model(x, mask)
    image = sum(tokenizer.image_loss(out["recon"], x, lpips).values())
    image = image + adversary.generator_loss(out["recon"], 5, slice(None))
    assert touched(model, image) == {name for name in names if not name.startswith("aux.")}
    assert touched(adversary.net) and not out["hidden"].requires_grad
    for name, target in targets.items():
        own = {key for key in names if not key.startswith(("decoder.", "aux.")) or key.startswith(f"aux.{name}.")}
        assert touched(model, target.loss(out[name], target.features(x), mask)) == own
    adversary.train_step(x, out["recon"].detach(), 5, 1.0)
    assert not touched(model) and not touched(adversary.net)         # its step clears its gradients
    for net in (lpips, adversary.net.trunk[0], fid.load_vit("dinov2_vits14_pretrain", cfg.weights, ONE, "")):
        assert not any(p.requires_grad or p.grad is not None for p in net.parameters()) and not net.training


def test_augmentation_draws_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    draws = [tokenizer.draw_augmentation(rng, 64, 32, 0.2, 0.5) for _ in range(200)]
    for name, low, high, slack in (("color", 0, 1, 0.01), ("shift", -4, 4, 0), ("cutout", 0, 32, 0)):
        values = torch.stack([d[name] for d in draws if name in d])
        assert 70 < len(values) < 130 and values[0].shape == (3 if name == "color" else 2, 64)
        assert low <= values.min() <= low + slack and high - slack <= values.max() <= high
    assert len(tokenizer.draw_augmentation(rng, 2, 32, 0.5, 1)) == 3


@pytest.mark.parametrize("fields", [
    {"latents": 0}, {"latents": 0, "decoder": "modulated"}, {"kl": 1e-4}, {"aux_depth": 0}, tokenizer.PRESETS["mae_pixel"],
    {"positions": "table", "dec_class_token": True}, tokenizer.PRESETS["mae_teacher"]], ids=str)
def test_the_baselines_train(cache, tmp_path, monkeypatch, fields):
    """Two steps of each stage in this process, and what they save loads again. A teacher of 20 steps will do."""
    monkeypatch.setattr(tokenizer, "cached_classifier", partial(fid.train_classifier, steps=20))
    monkeypatch.setattr(tokenizer, "evaluate", lambda *args: {})
    call("tokenizer", "--steps", 2, "--stage2-steps", 2, "--out", tmp_path / "out", *FP32, fields=fields)
    (stage1, cfg), (stage2, _) = (tokenizer.load_tokenizer(tmp_path / f"out/{name}.pt", CPU) for name in ("stage1", "ckpt"))
    lines, terms = log_of(tmp_path / "out"), {*cfg.target_names(), *fields.keys() & {"kl"}}
    assert len(lines) == 4 and terms <= lines[0].keys() and not terms & lines[2].keys() and lines[0].get("kl", 1) > 0
    x = data.to_float(data.ImageSet("shapes", cfg.size, "train")[np.arange(2)])
    z = stage2.encode(x)
    assert z.shape == (2, cfg.tokens()[1], cfg.channels) and torch.equal(z, stage1.encode(x))
    assert stage2.decode(z).shape == x.shape


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms


def test_patches_masks_and_flops(tmp_path):
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    p = tokenizer.patchify(x, 4)
    assert p.shape == (2, 4, 48) and torch.equal(tokenizer.unpatchify(p, 4), x)
    assert p[0, 1, 3 * (2 * 4 + 1) + 2] == x[0, 2, 2, 4 + 1]       # patch 1 is right of patch 0; row, column, channel
    mask = tokenizer.random_mask(64, 16, 0.45, torch.Generator().manual_seed(0))
    assert (mask.sum(1) == math.ceil(16 * 0.45)).all() and mask.float().mean(0).std() < 0.15    # each place is as likely
    ratios = [tokenizer.sample_mask_ratio(0.4, 0.6, ONE.rng(0, "mask ratio", step)) for step in range(4000)]
    assert 0.4 <= min(ratios) and max(ratios) <= 0.6
    assert np.quantile(ratios, [0.25, 0.5, 0.75]) == pytest.approx([0.457, 0.508, 0.555], abs=0.006)
    prediction, target, mask = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), torch.tensor([[True, False, True, False]])
    target[0, 1:3] = torch.tensor([[100.0], [3.0]])
    assert tokenizer.masked_mse(prediction, target, mask) == 4.5   # hidden patches only

    model, x = tokenizer.Tokenizer(tokenizer.Config()).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    mask = torch.arange(16).expand(2, 16) < 9            # what it hides does not reach the latents
    other = tokenizer.unpatchify(torch.where(mask[..., None], torch.randn(2, 16, 192), tokenizer.patchify(x, 8)), 8)
    torch.testing.assert_close(model.encode(x, mask), model.encode(other, mask))
    assert not torch.allclose(model.encode(x), model.encode(other))

    # The log's FLOPs against torch's counter on the CPU, made to use an attention that the counter sees
    for more in ({}, {"latents": 0, "kl": 1.0}, {"decoder": "modulated", "dec_class_token": True, "aux_depth": 0},
                 {"dec_width": 64, "dec_depth": 2, "dec_heads": 2}):
        cfg = tokenizer.Config(out=str(tmp_path), **more)
        model = tokenizer.Tokenizer(cfg, {"hog": 108, "dinov2": 384})
        log = data.Log(cfg, ONE, "stage 1", 0, 9, type("Source", (), {"wait_seconds": 0.0}))
        log.count_flops(model, x, mask)
        counter = torch.utils.flop_counter.FlopCounterMode(display=False)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
            model(x[:1], mask[:1])
        first = 2 * 16 * model.encoder.patch_embed.weight.numel()    # no gradient flows into the image
        assert log.flops == 3 * counter.get_total_flops() - first


def test_gaussian_data_is_solved_with_the_right_order():
    """For data N(m, s^2) the velocity is known, and the flow map takes noise e to m + s e."""
    m, s = 0.7, 0.4

    def velocity(x, t, gate=None):
        variance = (1 - t) ** 2 * s**2 + t**2
        return (t - (1 - t) * s**2) / variance * (x - (1 - t) * m) - m

    def error(steps, heun):
        return (diffusion.sample_ode(velocity, noise, steps, heun) - (m + s * noise)).abs().mean()

    noise = torch.randn(4000, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert error(40, False) / error(80, False) == pytest.approx(2, abs=0.15)
    assert error(40, True) / error(80, True) == pytest.approx(4, abs=0.8)
    draw = partial(torch.randn, noise.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = diffusion.sample_sde(velocity, noise, 400, "linear", draw)
    assert (x.mean().item(), x.std().item()) == pytest.approx((m, s), abs=0.03)


@pytest.mark.parametrize("path", diffusion.PATHS)
def test_samplers_reach_the_mean_and_covariance_of_a_gaussian(path):
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    covariance, eye = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)

    def velocity(x, t, gate=None):
        alpha, sigma, d_alpha, d_sigma = (float(c) for c in diffusion.PATHS[path].coefficients(t))
        offset = (x - alpha * mean) @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * eye)
        return d_alpha * (mean + alpha * offset @ covariance) + d_sigma * sigma * offset

    g = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 1, 2, dtype=torch.float64, generator=g)
    for x in (diffusion.sample_ode(velocity, noise, 50, heun=True),
              diffusion.sample_sde(velocity, noise, 300, path, lambda: torch.randn(noise.shape, generator=g))):
        assert x.mean((0, 1)).numpy() == pytest.approx(mean.numpy(), abs=0.02)
        assert torch.cov(x.flatten(1).T).numpy() == pytest.approx(covariance.numpy(), abs=0.03)
    level = torch.tensor([0.1, 1.0, 7.0])                # training times are those of the path, too
    alpha, sigma, *_ = diffusion.PATHS[path].coefficients(diffusion.PATHS[path].time_of(level))
    close(sigma / alpha, level, 1e-5)


def shaken(model, seed=0):
    """A network whose parameters are all random, also those that start at zero."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=g)
    return model


def test_guidance_its_interval_and_autoguidance():
    model, guide = (shaken(diffusion.SiT(4, 3, 5, 16, 1, 2), seed) for seed in (0, 1))
    x, y = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([1, 4])
    good, null, bad = (diffusion.guided_velocity(net, labels)(x, 0.5) for net, labels in (
        (model, y), (model, torch.tensor([5, 5])), (guide, y)))
    for settings, other, expected in (
            ((1.0,), None, good), ((3.0,), None, null + 3 * (good - null)), ((3.0, 0.0, 0.4), None, good),
            ((3.0, 0.5, 0.5), None, null + 3 * (good - null)), ((3.0,), guide, bad + 3 * (good - bad)),
            ((1.0,), guide, good), ((3.0, 0.6, 1.0), guide, good), ((3.0,), model, good)):
        close(diffusion.guided_velocity(model, y, *settings, guide=other)(x, 0.5), expected, 1e-5)
    assert (good - null).abs().max() > 1e-3


def test_network_calls_are_counted():
    rows, noise = [], torch.randn(2, 4, 3)

    class Net:
        null_class = 3

        def __call__(self, x, t, y):
            rows.append(len(x))
            return torch.zeros_like(x)

    for sampler, (low, high, scale) in itertools.product(
            ("euler", "heun", "sde"), ((0.0, 1.0, 2.0), (0.2, 0.75, 2.0), (0.3, 0.7, 1.0))):
        rows.clear()
        sampling = diffusion.SamplerConfig(sampler, 10, scale, low, high)
        velocity = diffusion.guided_velocity(Net(), torch.tensor([0, 1]), scale, low, high)
        if sampler == "sde":
            diffusion.sample_sde(velocity, noise, 10, "linear", lambda: noise)
        else:
            diffusion.sample_ode(velocity, noise, 10, sampler == "heun")
        assert sum(rows) == 2 * sampling.nfe_with_guidance() and len(rows) == sampling.nfe()


def test_lightning_is_sit_with_other_parts():
    torch.manual_seed(0)
    sit, lightning = (diffusion.SiT(6, 3, 5, 24, 2, 2, style=style) for style in ("sit", "lightning"))
    assert not hasattr(lightning, "pos_embed") and isinstance(lightning.blocks[0].attn.q_norm, torch.nn.RMSNorm)
    assert isinstance(lightning.blocks[1].mlp, diffusion.SwiGlu) and isinstance(sit.blocks[1].mlp, tokenizer.Mlp)
    x, v, t, y = torch.randn(2, 6, 3), torch.randn(2, 6, 3), torch.rand(2), torch.tensor([0, 5])
    out, order = shaken(lightning)(x, t, y), torch.tensor([1, 0, 2, 3, 4, 5])
    assert (lightning(x[:, order], t, y) - out[:, order]).abs().max() > 2e-5           # it knows the places
    lightning.cos.fill_(1)
    lightning.sin.fill_(0)
    torch.testing.assert_close(lightning(x[:, order], t, y), lightning(x, t, y)[:, order])       # by RoPE alone
    for scale, cosine, expected in ((2, 1.0, v.square()), (-1, 0.5, 4 * v.square() + 1)):        # parallel, opposite
        loss = diffusion.velocity_loss(lambda *_, scale=scale: scale * v, v * 0, v, t, y, "linear", cosine)
        close(loss, expected.mean((1, 2)), 1e-5)
    assert diffusion.PRESETS["lightning-xl"]["beta2"] == 0.95 and "style" not in diffusion.PRESETS["sit-xl"]


def test_scores_in_closed_form_and_against_scipy_and_skimage():
    eye, zero, rng = torch.eye(6), torch.zeros(6), np.random.default_rng(0)
    assert fid.frechet_distance(zero, eye, zero + 2, eye) == pytest.approx(24)
    assert fid.frechet_distance(zero, 4 * eye, zero, 9 * eye) == pytest.approx(6 * (2 - 3) ** 2)
    refused(fid.frechet_distance, zero * math.nan, eye, zero, eye, message="not finite")
    a, b = (m @ m.T + np.eye(20) for m in rng.normal(size=(2, 20, 20)))
    mean = rng.normal(size=20)
    expected = mean @ mean + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert fid.frechet_distance(mean, a, 0 * mean, b) == pytest.approx(expected, rel=1e-9)
    for logits, expected in ((torch.zeros(50, 10), 1), (1000 * torch.eye(10).repeat(5, 1), 10)):
        score = fid.InceptionScore(50, CPU, 5000, 10)
        score.add(torch.arange(50), logits)
        assert score.finish(ONE) == pytest.approx(expected)
    x = torch.randn(60, 5)
    assert fid.precision_recall(x, x) == (1, 1) and fid.precision_recall(x, x + 100) == (0, 0)
    refused(fid.precision_recall, x[:3], x, message="more than 3 images")
    features = 3 * torch.randn(3000, 7)
    mean, cov = moments(features, 1000)
    for size in (1, 333):                                # neither order nor batches move a bit
        again = moments(features[torch.randperm(3000)], size)
        assert torch.equal(again[0], mean) and torch.equal(again[1], cov)
    close(cov, torch.cov(features.double().T), 1e-4)

    a = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    b = (a.int() + 10).clamp(max=255).to(torch.uint8)
    apart = fid.psnr(torch.zeros_like(a), torch.full_like(a, 16))
    assert apart == pytest.approx([10 * math.log10(255**2 / 256)] * 3) and fid.ssim(a, a) == pytest.approx([1.0] * 3)
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    for x, y, p, s in zip(a.numpy(), b.numpy(), fid.psnr(a, b), fid.ssim(a, b)):
        assert p == pytest.approx(metrics.peak_signal_noise_ratio(x, y), rel=1e-9)
        theirs = metrics.structural_similarity(x, y, channel_axis=0, gaussian_weights=True, sigma=1.5,
                                               use_sample_covariance=False, data_range=255)
        assert s == pytest.approx(theirs, abs=1e-6)


def test_mixtures_probe_and_components():
    g = torch.Generator().manual_seed(0)
    modes = torch.tensor([[1.0, 1, 0], [-1, 1, 0], [1, -1, 0], [-1, -1, 1]]) * 6
    train, val = (modes[torch.randint(4, (n,), generator=g)] + torch.randn(n, 3, generator=g) for n in (2000, 1000))
    curve = fid.gmm_nll_curve(train, val, 3, (1, 2, 4, 8))
    assert curve == fid.gmm_nll_curve(train, val, 3, (1, 2, 4, 8))                    # a function of the seed
    gains = [curve[1] - curve[2], curve[2] - curve[4], curve[4] - curve[8]]
    assert min(gains[:2]) > 0.1 and abs(gains[2]) < 0.02
    weights, means, covariances = fid.fit_gmm(train, 4)
    assert sorted(weights.tolist()) == pytest.approx([0.25] * 4, abs=0.03)
    for mean, covariance in zip(means, covariances):
        assert (modes - mean).norm(dim=1).min() < 0.3
        near(covariance, torch.eye(3).double(), 0.25)
    exact = torch.distributions.MultivariateNormal(means, covariances).log_prob(val.double()[:, None]) + weights.log()
    close(fid.gmm_log_prob(val.double(), weights, means, covariances), exact, 1e-9)

    y, v = torch.randint(3, (600,), generator=g), torch.randint(3, (300,), generator=g)
    z, w = (5 * torch.eye(3)[c] + torch.randn(len(c), 3, generator=g) for c in (y, v))
    assert fid.linear_probe(z, y, w, v, 3) > 0.95
    assert fid.linear_probe(z, y[torch.randperm(600, generator=g)], w, v, 3) < 0.5
    x = torch.randn(4000, 3, generator=g) * torch.tensor([3.0, 1, 0.1]) + 7
    mean, axes, share = fid.principal_components(x)
    assert mean.tolist() == pytest.approx([7] * 3, abs=0.2) and share[-1] == pytest.approx(1)
    assert share[0].item() == pytest.approx(0.9, abs=0.02) and axes[0, 0].abs() > 0.99


def test_muon_is_torchs_and_the_learning_rate_follows_its_schedule():
    """Matrices of a shape orthogonalised together give what torch does one by one, up to bf16; its state, too."""
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 16), (16, 64), (48, 16), (16, 64), (9, 9)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine, torchs = data.Muon(ours, 0.02, 0.5), torch.optim.Muon(theirs, 0.02, 0.5)
    for step in range(5):
        for i, (one, two) in enumerate(zip(ours, theirs)):           # one without gradient now and then, one always
            one.grad = two.grad = None if (step, i) in ((0, 0), (2, 4)) or i == 5 else torch.randn_like(one)
        for optimizer in (mine, torchs):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
            optimizer.step()
        for one, two in zip(ours, theirs):
            assert (one - two).abs().max() < 2e-3 and (one - two).abs().mean() < 2e-4     # of updates of 5e-3
        assert mine.state_dict()["state"].keys() == torchs.state_dict()["state"].keys() == set(range(step < 1, 5))
        if step == 1:
            mine.load_state_dict(copy.deepcopy(torchs.state_dict()))     # a checkpoint that torch's left
    for one, two in zip(ours, theirs):
        assert one.grad is None or torch.equal(mine.state[one]["momentum_buffer"], torchs.state[two]["momentum_buffer"])
    for schedule, end in (("constant", 1.0), ("cosine", 0.1), ("linear", 0.1)):
        rates = [data.lr_schedule(step, 100, 10, schedule) for step in range(101)]
        assert rates[:10] == pytest.approx(np.arange(1, 11) / 10) and rates[100] == pytest.approx(end)
        assert all(np.diff(rates[10:]) <= 0)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def both(folder, size=0) -> list[data.ImageSet]:
    """The splits of a data set, as the next process would read them."""
    data.prepare.cache_clear()
    return [data.ImageSet(str(folder), size, split) for split in ("train", "val")]


def make_folder(root: Path, n=30, classes=("cat", "dog"), size=20):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(np.full((size, size, 3), (8 * i % 256, 100 * k, 40), np.uint8)).save(root / name / f"{i}.png")
    return root


def times(folder: Path) -> dict:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.npy")}


def test_shapes_are_a_pure_function_and_batches_share_them_out(cache):
    """Also: a linear model on the pixels knows a little, not all. Batches cover each epoch, disjoint across processes."""
    x, y = data.render_shapes(np.arange(40), 32)
    assert torch.equal(data.render_shapes(np.array([17, 3]), 32)[0], x[[17, 3]]) and x.dtype == torch.uint8
    assert not torch.equal(data.render_shapes(np.arange(4), 32, seed=1)[0], x[:4])
    train, val = both("shapes", 32)
    assert (len(train), len(val), train.classes) == (20_000, 2_000, list(data.SHAPES))
    assert torch.equal(train[np.arange(40)], x) and torch.equal(train.labels[:40], y)
    assert torch.bincount(val.labels).tolist() == [200] * 10
    pixels = [data.to_float(s[np.arange(n)]).flatten(1) for s, n in ((train, 8000), (val, 2000))]
    accuracy = fid.linear_probe(pixels[0], train.labels[:8000], pixels[1], val.labels, 10, iterations=20)
    assert 0.15 < accuracy < 0.45

    seen = np.concatenate([data.batch_indices(103, 10, 7, step) for step in range(31)])
    for epoch in range(3):
        assert sorted(seen[103 * epoch:103 * (epoch + 1)]) == list(range(103))
    assert not np.array_equal(seen[:103], seen[103:206])
    assert [i for r in range(4) for i in range(52)[data.Dist(r, 4).local_slice(52)]] == list(range(52))
    whole, labels = data.Loader(train, 8, 0, ONE)(3)
    assert torch.equal(whole, torch.cat([data.Loader(train, 8, 0, data.Dist(r, 2))(3)[0] for r in range(2)]))
    index = data.batch_indices(len(train), 8, 0, 3)
    kept, mirrored = (data.to_uint8(whole) == x for x in (train[index], train[index].flip(3)))
    kept, mirrored = kept.flatten(1).all(1), mirrored.flatten(1).all(1)
    assert (kept ^ mirrored).all() and kept.any() and mirrored.any() and torch.equal(labels, train.labels[index])


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "jpg"), ("L", "JPEG"), ("CMYK", "jpg"), ("RGB", "png"), ("RGBA", "PNG"), ("P", "png"), ("P", "gif"),
    ("LA", "png"), ("1", "png"), ("I;16", "png"), ("I;16", "tiff"), ("CMYK", "tif"), ("RGB", "bmp"), ("RGB", "webp")])
def test_every_kind_of_image(tmp_path, mode, suffix):
    ramp = np.linspace(0, 255, 40 * 30).reshape(30, 40)
    picture = Image.fromarray(ramp.astype(np.uint8)).convert("RGBA" if mode == "RGBA" else "L")
    if mode == "RGBA":
        picture.putalpha(0)
    picture = Image.fromarray((ramp * 257).astype(np.uint16)) if mode == "I;16" else picture.convert(mode)
    picture.save(tmp_path / f"a.{suffix}")
    x = data.read_image(tmp_path / f"a.{suffix}", 16)
    assert x.shape == (16, 16, 3) and x.dtype == np.uint8
    if mode == "RGBA":
        assert (x == 255).all()                          # transparent on white
    else:
        assert x[0].mean() < 60 and x[-1].mean() > 190   # the ramp, at 8 bits


def test_center_crop_follows_adm():
    image = Image.fromarray((np.indices((100, 300)).sum(0) % 256).astype(np.uint8)).convert("RGB")
    by_hand = image.resize((150, 50), Image.Resampling.BOX).resize((96, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(data.center_crop(image, 32)), np.asarray(by_hand.crop((32, 0, 64, 32))))


def test_a_folder_is_packed_split_and_reread(tmp_path, cache):
    root, packed = make_folder(tmp_path / "my pictures"), tmp_path / "packed"
    train, val = both(root, 16)
    assert (len(train), len(val), train.classes) == (57, 3, ["cat", "dog"])
    assert (train[np.arange(57)][:, 1, 8, 8] == 100 * train.labels).all()
    data.pack(root, 16, packed)
    again, _ = both(packed)
    assert torch.equal(again[np.arange(57)], train[np.arange(57)]) and again.fingerprint == train.fingerprint
    refused(both, packed, 32, message="16 px, not --size 32")
    root.rename(tmp_path / "away")
    refused(both, root, 16, message="no such folder")
    (tmp_path / "away").rename(root)
    Image.new("RGB", (20, 20)).save(root / "cat" / "new.png")      # a changed folder is packed anew
    assert sum(map(len, both(root, 16))) == 61
    refused(data.pack, root, 16, packed, message="was made of other")
    assert both(make_folder(tmp_path / "x", 5, ("flat",)) / "flat", 16)[0].classes == ["all"]
    for split, n in (("train", 4), ("test", 2)):
        make_folder(tmp_path / "y" / split, n)
    assert [len(part) for part in both(tmp_path / "y", 16)] == [8, 4]


def test_unreadable_images_are_named_and_many_stop_the_run(tmp_path, capsys, monkeypatch):
    root, listing = make_folder(tmp_path / "x", 100), data.list_folder
    (root / "cat/5.png").write_bytes((root / "cat/5.png").read_bytes()[:40])

    def list_then_remove(folder):                        # a file that vanishes while the others are packed
        found = listing(folder)
        (root / "dog/7.png").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(data, "list_folder", list_then_remove)
    data.pack(root, 16, tmp_path / "ok")
    said = capsys.readouterr().out
    assert "'cat/5.png'" in said and "'dog/7.png': [Errno 2]" in said and sum(map(len, both(tmp_path / "ok"))) == 198
    for i in range(10, 15):
        (root / "dog" / f"{i}.png").write_bytes(b"no image")
    refused(data.pack, root, 16, tmp_path / "bad", message="6 of 199 images are unreadable")
    assert not (tmp_path / "bad" / "meta.json").exists()


def test_shards_are_whole_or_absent_and_shared_out(tmp_path, monkeypatch):
    """A run that is cut makes only what is missing; processes share the numbers; other content is refused."""
    rows, calls = np.random.default_rng(0).integers(0, 256, (47, 3, 2), dtype=np.uint8), []

    def make(start, stop):
        if len(calls) == 2 and cut:
            raise KeyboardInterrupt
        calls.append(start)
        return rows[start:stop]

    def shards(folder="s", made_of="this", dist=ONE):
        return data.make_shards(tmp_path / folder, 47, 10, make, made_of, dist, "")

    cut = True
    with pytest.raises(KeyboardInterrupt):
        shards()
    before, cut = times(tmp_path / "s"), False
    (tmp_path / "s/00003-cut.npy.1.part").write_bytes(b"\x93NUM")     # a kill left it
    found = shards()
    assert calls == [0, 10, 20, 30, 40] and len(before) == 2 and before.items() <= times(tmp_path / "s").items()
    assert found.shape == rows.shape and len(found) == 47
    for index in (np.arange(47), np.array([46, 0, 10, 9, 9]), np.array([3])):
        assert np.array_equal(found[index], rows[index])
    refused(shards, "s", "that", message="was made of other")
    (tmp_path / "two").mkdir()
    calls.clear()
    monkeypatch.setattr(data.Dist, "barrier", lambda self: None)
    refused(shards, "two", "this", data.Dist(1, 2), message="two")   # the other's are not there yet
    assert calls == [10, 30] and len(shards("two", "this", data.Dist(0, 2))) == 47 and calls == [10, 30, 0, 20, 40]
    assert all((tmp_path / "s" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "two").iterdir())
    arrays = {"labels": np.arange(47), "classes": np.array(["a", "bc"])}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    np.savez(tmp_path / "a/x.npz", arr_0=rows, **arrays)
    sample.save_npz(tmp_path / "b/x.npz", found, **arrays)
    assert_same(tmp_path / "a", tmp_path / "b", "x.npz")
    assert isinstance(fid.npz_array(tmp_path / "b/x.npz", "arr_0"), np.memmap)


def test_packing_goes_on_where_it_was_cut_and_memory_does_not_grow(tmp_path, monkeypatch):
    """Peak of what numpy and Python allocate, in packing a folder and in writing samples.npz, at two sizes."""
    root, honest, seen = make_folder(tmp_path / "x", 300), data.read_image, []

    def cut(path, size):
        seen.append(path)
        if len(seen) == 250:
            raise KeyboardInterrupt
        return honest(path, size)

    monkeypatch.setattr(data, "shard_length", lambda size: 100)
    monkeypatch.setattr(data, "read_image", cut)
    with pytest.raises(KeyboardInterrupt):
        data.pack(root, 8, tmp_path / "out", 1)
    before = times(tmp_path / "out")
    data.pack(root, 8, tmp_path / "out", 1)
    data.pack(root, 8, tmp_path / "whole")
    assert len(before) == 2 and before.items() <= times(tmp_path / "out").items()
    assert_same(tmp_path / "whole", tmp_path / "out", "images", "labels.npy", "meta.json")

    def peak(work, *args):
        tracemalloc.start()
        work(*args)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    def write_samples(out, n):
        images = data.make_shards(tmp_path / out, n, 100, lambda a, b: np.zeros((b - a, 64, 64, 3), np.uint8), n, ONE, "")
        sample.save_npz(tmp_path / f"{out}.npz", images)

    _, few, many = (peak(write_samples, f"s{i}", n) for i, n in enumerate((300, 300, 1200)))
    assert many < 1.1 * few
    monkeypatch.setattr(data, "shard_length", lambda size: 20)
    folders = [make_folder(tmp_path / f"f{i}", n, ("all",)) for i, n in enumerate((60, 60, 240))]
    _, few, many = (peak(data.pack, root, 160, tmp_path / f"p{i}", 2) for i, root in enumerate(folders))
    assert many < 1.2 * few


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/served; the first answer for a name in `broken` stops half way."""
    broken, served = set(), tmp_path / "served"
    served.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            content = (served / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:len(content) // 2] if name in broken else content)
            broken.discard(name)

        def log_message(self, *args):
            """Keep the test's output clean."""

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield served, f"http://127.0.0.1:{httpd.server_port}/", broken
    httpd.shutdown()


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    """A tar.gz with these files; returns its hash."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_named_sets_are_downloaded_checked_and_read(server, tmp_path, monkeypatch):
    served, url, broken = server
    monkeypatch.setenv("MAETOK_CACHE", str(tmp_path / "cache"))

    def publish(name, archive, members):
        monkeypatch.setattr(data, f"{name}_SHA256", write_tar(served / archive, members))
        monkeypatch.setattr(data, name, url + archive)

    rows = np.random.default_rng(0).integers(0, 256, (60, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(60) % 10
    files = [*(f"x/data_batch_{i}.bin" for i in range(1, 6)), "x/test_batch.bin"]
    members = {name: rows[10 * i:10 * i + 10].tobytes() for i, name in enumerate(files)}
    publish("CIFAR10", "made.tar.gz", members | {"x/batches.meta.txt": "\n".join("abcdefghij").encode()})
    with monkeypatch.context() as patch:
        patch.setattr(data, "CIFAR10_SHA256", "0" * 64)
        refused(both, "cifar10", 32, message="invalid hash")
    broken.add("made.tar.gz")
    refused(both, "cifar10", 32, message="cannot get cifar-10-binary.tar.gz from")     # the half that came is not used,
    assert not list((tmp_path / "cache").iterdir())
    train, val = both("cifar10", 32)                     # and the next call starts over
    assert len(train) == 50 and train.classes == list("abcdefghij") and len(val) == 10
    assert np.array_equal(train[np.arange(50)].flatten(1).numpy(), rows[:50, 1:])

    picture = io.BytesIO()
    Image.new("RGB", (40, 30)).save(picture, "JPEG")
    publish("IMAGENETTE", "evil.tgz", {"../../outside.txt": b"x"})
    refused(both, "imagenette", 16, message="outside the destination")
    assert not list(tmp_path.rglob("outside.txt")) and not (tmp_path / "cache/imagenette-files").exists()
    (tmp_path / "cache/imagenette2-320.tgz").unlink()
    publish("IMAGENETTE", "good.tgz", {f"imagenette2-320/{split}/n01/{i}.JPEG": picture.getvalue()
                                       for split in ("train", "val") for i in range(3)})
    assert [len(part) for part in both("imagenette", 16)] == [3, 3]


def test_pretrained_weights_are_found_fetched_checked_or_asked_for(server, tmp_path, monkeypatch):
    served, url, broken = server
    weights, folder = {"a": torch.arange(5000.0)}, tmp_path / "w"
    torch.save(weights, served / "net.pth")
    sha256 = hashlib.sha256((served / "net.pth").read_bytes()).hexdigest()[:8]
    known = {"with hash": (url + "net.pth", sha256), "without": (url + "net.pth", ""),
             "wrong": (url + "net.pth", "0" * 8), "gone": ("http://127.0.0.1:9/gone.pth", "")}
    monkeypatch.setattr(fid, "WEIGHTS", known)

    def fetch(name, at=folder):
        return fid.pretrained(name, str(at), "--lpips 0")["a"]

    for name, message in (("wrong", "invalid hash"), ("gone", "refused")):
        said = refused(fetch, name, message=message)
        assert known[name][0] in said and str(folder / f"{name}.pth") in said and "--weights" in said
        assert said.endswith("do without: --lpips 0")
    broken.add("net.pth")                                # no hash is known, but half a file is not taken
    refused(fetch, "without", message="cannot get without.pth")
    assert not list(folder.iterdir())
    for name in ("without", "with hash"):
        assert torch.equal(fetch(name), weights["a"])
    (served / "net.pth").unlink()
    assert torch.equal(fetch("without"), weights["a"])   # not fetched again
    (folder / "gone.pth").write_bytes(b"half")
    refused(fetch, "gone", message="gone.pth is not a file of weights")
    write_safetensors(folder / "wrong.safetensors", weights)
    assert torch.equal(fetch("wrong"), weights["a"])
    (tmp_path / "file").touch()
    refused(fetch, "without", tmp_path / "file/below", message=str(tmp_path / "file"))


def test_safetensors_are_read_and_refused(tmp_path):
    path, body = tmp_path / "x.safetensors", np.arange(24, dtype=np.uint8).tobytes()

    def read(header, length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
        return fid.read_weights(path)

    def entry(dtype, shape, start, stop):
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}

    kinds = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "U8": np.uint8, "F16": np.float16}
    for pad, (dtype, kind) in itertools.product(range(4), kinds.items()):              # at odd addresses, too
        header = json.dumps({"__metadata__": {}, "a": entry(dtype, [24 // kind().itemsize], 0, 24)}).encode() + b" " * pad
        assert np.array_equal(read(header)["a"].numpy(), np.frombuffer(body, kind), equal_nan=True)
    found = read({"a": entry("BF16", [2, 3], 4, 16), "s": entry("F32", [], 0, 4), "e": entry("F32", [0, 7], 4, 4)})
    assert found["a"].dtype == torch.bfloat16
    assert {name: tuple(x.shape) for name, x in found.items()} == {"a": (2, 3), "s": (), "e": (0, 7)}
    whole = {"a": entry("F32", [3], 0, 12), "b": entry("F32", [3], 12, 24)}
    twice = json.dumps(whole).replace('"b"', '"a"').encode()
    for header in (b"{", [1], {"a": 3}, b"\xff\xfe", twice, *({**whole, "b": entry("F32", *case)} for case in (
                       ([3], 8, 20), ([4], 12, 28), ([3], 13, 25))), *({"a": entry(*case)} for case in (
            ("F32", [4], 0, 12), ("F32", [-1], 12, 8), ("F32", [-1, -3], 0, 12), ("F32", [3.0], 0, 12),
            ("F33", [3], 0, 12), ("U8", [True], 0, 1), ("F32", [2**62, 4], 0, 12), ("F32", [2**63, 0], 0, 0),
            ("F32", [2**40, 2**40, 0], 0, 0), ("F32", [1] * 9, 0, 4)))):
        refused(read, header, message="x.safetensors is not a file of weights")
    for length in (2**62, 10**6):
        refused(read, whole, length, message="x.safetensors is not a file of weights")
    path.write_bytes(b"abc")
    refused(fid.read_weights, path, message="x.safetensors is not a file of weights")


# ---------------------------------------------------------------------------------------------------------------------
# The scripts, end to end


def test_the_four_scripts_write_what_they_say(chain):
    metrics, rows, scores = (json.loads((chain / name / "metrics.json").read_text())
                             for name in ("tokenizer", "diffusion", "samples"))
    assert metrics["latents_unchanged_by_stage2"] is True
    assert {"psnr", "ssim", "fd_classifier"} == metrics["stage2"].keys() and 0 <= metrics["linear_probe"] <= 1
    for picture in ("tokenizer/recon.png", "diffusion/samples.png", "samples/grid.png"):
        assert Image.open(chain / picture).size[0] > 100
    rows, real = rows["rows"], rows["rows"]["real validation images"]
    assert real["class_accuracy"] > 0.9 and rows["decoded noise"]["fd_classifier"] > real["fd_classifier"]
    assert 0 < rows["samples"]["fd_to_reconstructions"] != rows["samples"]["fd_classifier"]
    with np.load(chain / "samples/samples.npz") as z:
        assert z["arr_0"].shape == (30, 16, 16, 3) and z["arr_0"].dtype == np.uint8
        assert z["labels"].tolist() == [i % 10 for i in range(30)] and z["classes"].tolist() == list(data.SHAPES)
        assert json.loads(str(z["meta"])).items() >= {"data": "shapes", "size": 16, "training_steps": 10}.items()
    assert scores["samples"]["images"] == 30 and scores["sampling"]["sampler"] == "heun"
    assert "fid" not in scores["samples"] and not (chain / "samples/parts").exists()
    call("fid", "latents", chain / "tokenizer/stage1.pt", chain / "tokenizer/ckpt.pt", "--out", chain / "l")
    one, two = json.loads((chain / "l/analysis.json").read_text())["rows"].values()
    assert one == two and len(one["mixture_nll_per_dimension"]) == 6    # stage 2 does not touch the latents

    state = torch.load(chain / "diffusion/ckpt.pt", weights_only=True)
    z = np.concatenate([np.load(path) for path in sorted((chain / "diffusion/latents").glob("*.npy"))]).astype(np.float64)
    x, images = (z - state["mean"]) / state["std"], data.ImageSet("shapes", 16, "train")
    assert z.shape == (20_000, 2, 4, 4) and state["classes"] == list(data.SHAPES)
    assert x.mean((0, 1, 2)) == pytest.approx(0, abs=1e-6) and x.std((0, 1, 2)) == pytest.approx(1, abs=1e-6)
    model, _ = tokenizer.load_tokenizer(chain / "tokenizer/ckpt.pt", CPU)
    close(z[:3, 1], model.encode(data.to_float(images[np.arange(3)]).flip(3)), 2e-2)      # float16, perhaps bf16
    mean, std, z = torch.randn(4), torch.rand(4) + 0.1, torch.rand(5, 3, 4) * 2 - 1
    identity = type("Identity", (), {"decode": lambda self, x: x})()
    assert torch.equal(diffusion.latent_decoder(identity, mean, std, ONE)((z - mean) / std), data.to_uint8(z))
    model.to_latent.weight.data += 1
    refused(diffusion.encode_dataset, model, images, chain / "diffusion/latents", ONE, message="made of other weights")


def test_samples_depend_on_neither_processes_nor_batches_nor_a_kill(made, tmp_path):
    args = [*made["sample"], "--num-samples", 120, "--precision", "fp32", "--sampler", "sde", "--steps", 40]
    run, parts = partial(script, "sample", *args, cwd=tmp_path), tmp_path / "cut/parts"
    run("--batch-size", 4, "--out", "one")
    run("--batch-size", 4, "--out", "two", processes=2)
    kill_when(lambda: len(times(parts)) >= 2, run("--batch-size", 4, "--out", "cut", background=True))
    before = times(parts)
    refused(call, "sample", *args, "--steps", 39, "--batch-size", 4, "--out", tmp_path / "cut", message="other weights")
    assert before == times(parts)
    run("--batch-size", 4, "--out", "cut")
    run("--batch-size", 15, "--out", "batch")
    for name in ("two", "cut"):
        assert_same(tmp_path / "one", tmp_path / name, "samples.npz")
    one, batch = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("one", "batch"))
    assert np.abs(one - batch).max() <= 1


def test_two_processes_train_as_one(made, tmp_path):
    """In fp32 with AdamW: bf16, in which Muon always works, rounds the two halves of a gradient differently."""
    for name, args, count in (("tokenizer", ["--steps", 20, "--stage2-steps", 20], 60),
                              ("diffusion", ["--steps", 20, "--samples", 0, *made["diffusion"]], 20)):
        run = partial(script, name, *args, *FP32, cwd=tmp_path)
        run("--out", f"{name}-one")
        run("--out", f"{name}-two", processes=2)
        run("--out", f"{name}-micro", "--micro-batch", 5)
        for other in ("two", "micro"):
            assert_losses_agree(tmp_path / f"{name}-one", tmp_path / f"{name}-{other}", count)
    assert_same(tmp_path / "diffusion-one", tmp_path / "diffusion-two", "latents")
    odd = run("--batch-size", 15, "--out", "odd", processes=2, check=False)
    assert odd.returncode and "--batch-size 15 must be a multiple of the 2 processes" in odd.stderr


def test_lightning_trains_and_an_earlier_checkpoint_guides(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("diffusion", "--steps", 6, "--keep-every", 3, "--samples", 0, "--style", "lightning", *made["diffusion"],
         fields={"cosine_loss": 1.0})
    run = partial(call, "sample", "--num-samples", 9, "--steps", 2, "--precision", "fp32")
    run("--out", "plain")
    run("--out", "guided", "--guide", "out/diffusion/step-3.pt")
    plain, guided = (np.load(f"{out}/samples.npz")["arr_0"] for out in ("plain", "guided"))
    assert not np.array_equal(plain, guided)
    state = torch.load("out/diffusion/step-3.pt", weights_only=True)
    for change, flag, message in (({"mean": [9.0] * 4}, "--guide", "another mean"),
                                  ({"config": state["config"] | {"path": "cosine"}}, "--guide", "another path"),
                                  ({"config": state["config"] | {"label_dropout": 0.0}}, "--model", "no null class")):
        ONE.save(Path("x.pt"), state | change)
        refused(run, flag, "x.pt", message=message)


def test_a_flat_folder_goes_through_all_scripts(cache, tmp_path):
    """One class; the plain autoencoder without masking, on two processes; the scores that need labels are left out."""
    make_folder(tmp_path / "x", 60, ("flat",))
    script("tokenizer", "--data", "x/flat", "--mask-min", 0, "--mask-max", 0, "--targets", "none", "--steps", 4,
           "--stage2-steps", 3, cwd=tmp_path, processes=2)
    assert "one class only" in script("diffusion", "--steps", 4, "--samples", 8, cwd=tmp_path).stdout
    script("sample", "--num-samples", 9, "--steps", 2, cwd=tmp_path)
    with np.load(tmp_path / "out/samples/samples.npz") as z:
        assert z["arr_0"].shape == (9, 16, 16, 3) and json.loads(str(z["meta"]))["guidance"] == 1.0
    assert "has one class only" in script("fid", cwd=tmp_path).stdout


def test_fid_command_line(tmp_path, made_weights, cache, monkeypatch):
    """A B, stats, reference statistics instead of images, a folder of PNGs: one number."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for n in (12, 14))
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=a)
    np.savez_compressed("b.npz", arr_0=b)
    Path("folder").mkdir()
    for i, pixels in enumerate(b):
        Image.fromarray(pixels).save(f"folder/{i:02d}.png")
    weights = ["--weights", made_weights, "--batch-size", 5]
    script("fid", "stats", "folder", *weights, "--out", "ref.npz", cwd=tmp_path, processes=2)
    with np.load("ref.npz") as z:
        stored = dict(z)
    assert stored["mu"].shape == (2048,) and stored["sigma_s"].shape == (2023, 2023) and np.array_equal(stored["arr_0"], b)
    for name, arrays in (("only", {k: stored[k] for k in ("mu", "sigma")}), ("nan", stored | {"mu": stored["mu"] * np.nan}),
                         ("half", {k: stored[k] for k in ("mu_s", "sigma_s")}), ("narrow", stored | {"mu": stored["mu"][:64]})):
        np.savez(f"{name}.npz", **arrays)
    script("fid", "a.npz", "ref.npz", *weights, "--out", "2.json", cwd=tmp_path, processes=2)
    assert "fewer than 2,048 images" in script("fid", "a.npz", "only.npz", *weights, "--out", "3.json", cwd=tmp_path).stdout
    call("fid", "a.npz", "b.npz", *weights, "--out", "1.json")
    first, *others = (json.loads(Path(f"{i}.json").read_text())["samples"] for i in (1, 2, 3))
    scores = {"fid", "sfid", "inception_score", "precision", "recall"}
    assert scores | {"resize", "n_reference"} < first.keys() and '"precision": "fp32"' in Path("1.json").read_text()
    assert (first["images"], first["n_reference_precision"], first["n_reference"]) == (12, 14, 14)
    assert scores <= others[0].keys() and {"fid", "inception_score"} == scores & others[1].keys()
    for row in others:
        for key in scores & row.keys():
            assert row[key] == pytest.approx(first[key], rel=1e-3), key
    Image.new("RGB", (9, 9)).save("folder/odd.png")
    Path("foreign").mkdir()
    Path("foreign/meta.json").write_text("[3")
    for line, message in {"a.npz folder": "folder is not a folder of images of one size", "a.npz nowhere": "nowhere: no such",
                          "folder/odd.png a.npz": "is not an npz file", "a.npz nan.npz": "finite",
                          "ref.npz a.npz": "give it second, as B", "a.npz narrow.npz": "2048",
                          "a.npz half.npz": "mu is missing", "a.npz foreign": "foreign is not"}.items():
        refused(call, "fid", *line.split(), *weights, message=message)


# ---------------------------------------------------------------------------------------------------------------------
# Faults: what may happen to a run, its files and its neighbours. `pytest -m campaign test_all.py` runs the long half

FAULTS = {}


def tried(fault: str, outcomes: list[bool]) -> None:
    """Count faults that were survived: nothing lost, or refused in one line. $MAETOK_FAULTS: a file to keep the counts,
    unless several processes share the tests (-n).
    """
    FAULTS[fault] = {"tried": len(outcomes), "survived": sum(outcomes), "lost": len(outcomes) - sum(outcomes)}
    if "MAETOK_FAULTS" in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        Path(os.environ["MAETOK_FAULTS"]).write_text(json.dumps(FAULTS, indent=1) + "\n")
    assert all(outcomes), f"{fault}: {FAULTS[fault]}"


@pytest.mark.parametrize("stage, step", [("stage 1", 50), ("stage 2", 10), ("diffusion", 50)])
def test_a_killed_run_goes_on_bit_by_bit(made, tmp_path, stage, step):
    name, args = "tokenizer", ["--steps", 60, "--stage2-steps", 60]
    if stage == "diffusion":
        name, args = "diffusion", ["--steps", 150, "--samples", 0, *made["diffusion"]]
    run = partial(script, name, *args, "--save-every", 7, cwd=tmp_path)
    run("--out", "whole")
    for at in (step, step - 5):                          # the second time it has just gone on
        kill_when(lambda at=at: logged(tmp_path / "cut", at, stage), run("--out", "cut", background=True))
    assert "continuing" in run("--out", "cut").stdout
    assert_same(tmp_path / "whole", tmp_path / "cut", "ckpt.pt", "log.jsonl", "metrics.json")
    tried(f"SIGKILL in a training loop, {stage}: the same bits in the end", [True] * 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_torchrun_brings_back_a_dead_worker_and_a_run_of_one_process_goes_on_as_two(cache, tmp_path):
    run = partial(script, "tokenizer", "--steps", 150, "--stage2-steps", 0, *FP32, "--save-every", 20, cwd=tmp_path)
    run("--out", "one")
    kill_when(lambda: logged(tmp_path / "cut", 40), run("--out", "cut", background=True))
    job = run("--out", "cut", background=True, processes=2)
    wait_for(lambda: logged(tmp_path / "cut", 90), job)
    for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    assert job.wait(120) == 0, (tmp_path / "said.txt").read_text()
    assert_losses_agree(tmp_path / "one", tmp_path / "cut", 300)
    tried("a worker killed under torchrun --max-restarts: comes back, same losses", [True])


@pytest.mark.parametrize("name", ["tokenizer", "diffusion", "sample"])
def test_two_runs_in_one_folder(made, tmp_path, name):
    """With the same settings both end well, and the result is that of one run. Only sample.py, whose first run that ends
    removes the parts, may end the other in one line. Other settings are refused; nothing is lost.
    """
    args, lr, files = {
        "tokenizer": (["--steps", 40, "--stage2-steps", 20, "--save-every", 5], 0.002, ["stage1.pt", "ckpt.pt"]),
        "diffusion": (["--steps", 60, "--save-every", 5, "--samples", 0, *made["diffusion"]], 0.001, ["ckpt.pt", "latents"]),
        "sample": (["--num-samples", 200, "--batch-size", 10, *made["sample"]], None, ["samples.npz"])}[name]
    run = partial(script, name, *args, cwd=tmp_path)
    run("--out", "alone")
    first, second = run("--out", "shared", background=True), run("--out", "shared", check=False)
    codes, said = [first.wait(120), second.returncode], second.stderr + (tmp_path / "said.txt").read_text()
    assert codes == [0, 0] or (name == "sample" and sorted(codes) == [0, 1] and said.count("sample.py: ") == 1), said
    assert "Traceback" not in said
    assert_same(tmp_path / "alone", tmp_path / "shared", *files)
    if lr:
        other = partial(call, name, *args, "--lr", 1, "--out", tmp_path / "shared", fields={})
        refused(other, message=f"lr {lr}, now 1.0")
        assert_same(tmp_path / "alone", tmp_path / "shared", *files)


def test_free_options_may_differ_and_others_not(tmp_path):
    cfg = tokenizer.Config()
    for field in dataclasses.fields(cfg):
        out, value, other = tmp_path / field.name, getattr(cfg, field.name), copy.copy(cfg)
        ONE.make_out_dir(out, cfg, {"images": "a"})
        before = (out / "settings.json").read_bytes()
        object.__setattr__(other, field.name, not value if isinstance(value, bool) else value * 2 or "other")
        if field.metadata.get("free"):
            ONE.make_out_dir(out, other, {"images": "a"})
        else:
            refused(ONE.make_out_dir, out, other, {"images": "a"}, message=f"{out} was made with {field.name} {value}, now")
            assert (out / "settings.json").read_bytes() == before
    refused(ONE.make_out_dir, out, cfg, {"images": "b"}, message="made with images a, now b")


@pytest.mark.parametrize("name, term", [("tokenizer", "recon"), ("diffusion", "loss")])
def test_a_number_that_is_not_finite_stops_the_run_before_a_save(made, tmp_path, monkeypatch, name, term):
    honest, poisoned = data.Loader.__call__, {7}

    def poison(self, step):
        x, y = honest(self, step)
        return (x * math.nan if step in poisoned else x), y

    monkeypatch.setattr(data.Loader, "__call__", poison)
    args = ["--stage2-steps", 0] if name == "tokenizer" else ["--samples", 0, *made["diffusion"]]
    run = partial(call, name, *args, "--steps", 12, "--save-every", 4, "--out", tmp_path, fields={"log_every": 5, "clip": 0.0})
    refused(run, message=f"{term} is not finite at step 8 (learning rate 0.00")
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 4
    poisoned.clear()                                     # mended: it goes on
    run()
    assert all(x.isfinite().all() for x in tensors_of(tmp_path / "ckpt.pt").values())
    assert log_of(tmp_path)[-1]["step"] == 12 and "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_a_full_disk_keeps_what_is_there(made, tmp_path):
    """A limit on the size of files stands in for the disk: writing fails as there, with another number."""
    outcomes, checkpoint = [], tmp_path / "t/ckpt.pt"

    def full(size, name, *args):
        done = script(name, *args, cwd=tmp_path, check=False,
                      before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
        said = [line for line in done.stderr.splitlines() if line.startswith(f"{name}.py: ")]
        outcomes.append(done.returncode == 1 and len(said) == 1 and "kept" in said[0] and "Traceback" not in done.stderr)

    train = ["tokenizer", "--stage2-steps", 0, "--save-every", 5, "--steps", 30, "--out", "t"]
    kill_when(checkpoint.exists, script(*train, cwd=tmp_path, background=True))
    before = checkpoint.read_bytes()
    full(len(before) * 4 // 5, *train)
    assert checkpoint.read_bytes() == before
    script(*train, cwd=tmp_path)
    full(20_000, "diffusion", *made["diffusion"], "--out", "d")
    full(100_000, "sample", *made["sample"], "--num-samples", 900, "--steps", 1, "--out", "s")
    make_folder(tmp_path / "x", 100, size=64)
    full(300_000, "data", "--data", "x", "--size", 64, "--out", "packed")
    assert not (tmp_path / "packed/meta.json").exists() and not (tmp_path / "s/samples.npz").exists()
    tried("disk full: checkpoint, latents, samples, packing", outcomes)


def damaged_pictures(root: Path) -> list[Path]:
    """Files that are no whole, ordinary pictures, whatever their names say."""
    rng, files = np.random.default_rng(0), [io.BytesIO(), io.BytesIO()]
    for file, kind in zip(files, ("PNG", "JPEG")):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(file, kind)
    good, jpeg = (file.getvalue() for file in files)

    def header(w, h):                                    # a PNG that claims to be so large
        body = b"IHDR" + w.to_bytes(4, "big") + h.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
        return good[:8] + (13).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big") + good[33:]

    contents = {"empty.png": b"", "one byte.jpg": b"\xff", "text.png": b"no picture\n" * 50, "zeros.webp": bytes(500),
                "bomb.png": header(60_000, 60_000), "wide bomb.png": header(2**31 - 1, 1), "no size.png": header(0, 0),
                "tall.png": header(1, 2**31 - 1), "half.png": good[: len(good) // 2], "half.jpg": jpeg[:700],
                "head.png": good[:33], "head.jpg": jpeg[:20], "tail.png": good[40:], "gif.gif": b"GIF89a" + bytes(20),
                "tiff.tif": b"II*\0" + b"\xff" * 40, "2.tiff": b"MM\0*" + bytes(30), "bmp.bmp": b"BM" + b"\xff" * 60,
                "webp.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(20), "crc.png": good[:29] + bytes(4) + good[33:],
                "random.jpg": bytes(rng.integers(0, 256, 4000, np.uint8)), "svg.png": b"<svg/>",
                "new\nline.png": good[:100], "\u00fcml\u00e4ut \u732b.jpg": jpeg[:60], "quote'\".png": good[:50],
                "html.jpg": b"<!doctype html><title>404</title>", "zip.png": b"PK\3\4" + bytes(60),
                "noise.gif": b"GIF87a\xff\xff\xff\xff" + bytes(rng.integers(0, 256, 99, np.uint8))}
    for name, content in contents.items():
        (root / name).write_bytes(content)
    (root / "dangling.png").symlink_to(root / "nowhere")
    (root / "folder.png").mkdir()
    (root / "loop").symlink_to(root)
    return [*(root / name for name in contents), root / "dangling.png"]


def test_damaged_pictures_are_named_and_odd_ones_are_read(tmp_path, capsys):
    """Each damaged one among good ones: named with its reason; the rest is packed; no memory is asked for in vain."""
    peak, root = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, make_folder(tmp_path / "x", 3000, ("all",), 4) / "all"
    bad = damaged_pictures(root)
    data.pack(root, 8, tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("unreadable: ") == len(bad) >= 28 and sum(map(len, both(tmp_path / "out"))) == 3000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 600_000
    tried("damaged, empty, truncated, bomb and mislabelled pictures", [f"unreadable: {p.name!r}: " in said for p in bad])

    root, rng = tmp_path / "odd", np.random.default_rng(1)
    (root / "sub").mkdir(parents=True)
    (root / "sub/loop").symlink_to(root)
    rgb = Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8))
    for i, mode in enumerate(("CMYK", "L", "P", "1", "LA", "RGBA", "YCbCr", "F")):
        rgb.convert(mode).save(root / f"{i}.{'tif' if mode in ('CMYK', 'F', 'YCbCr') else 'png'}")
    Image.fromarray(rng.integers(0, 2**16, (30, 20), np.uint16)).save(root / "16 bits.png")
    rgb.save(root / "animated.gif", save_all=True, append_images=[rgb.rotate(90 * i) for i in range(3)])
    for size in ((1, 500), (500, 1), (1, 1)):
        rgb.resize(size).save(root / f"{size}.png")
    for name in ("with space", "new\nline", "\u732b", "-dash", "a" * 200, "dot.in.name", "100%"):
        rgb.save(root / f"{name}.JPG", "JPEG")
    data.pack(root, 16, tmp_path / "read")
    assert sum(map(len, both(tmp_path / "read"))) == len([p for p in root.iterdir() if p.is_file()]) == 20
    tried("odd colour models, shapes and names of pictures", [True] * 20)


def test_checkpoints_and_notes_of_a_run_that_are_damaged_are_named(chain, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = []
    for kind, load in (("tokenizer", tokenizer.load_tokenizer), ("diffusion", diffusion.load_diffusion)):
        state = torch.load(chain / kind / "ckpt.pt", weights_only=True)
        config, weights = state["config"], state["ema"]
        name = next(k for k in weights if k.endswith("qkv.weight"))
        changes = [("config", config | {"width": 48}, ""), ("config", config | {"surprise": 1}, "surprise"),
                   ("config", config | {"depth": 2}, ""), ("config", 3, ""), ("ema", [1], ""),
                   ("ema", {k: v for k, v in weights.items() if k != name}, name),
                   ("ema", weights | {"other": torch.zeros(1)}, "other")]
        if kind == "diffusion":
            changes += [("classes", ["a", "b"], ""), ("mean", [0.0], "statistics"), ("std", [math.nan] * 4, "statistics")]
        for key, value, message in changes:
            ONE.save(Path("x.pt"), state | {key: value})
            outcomes.append(message in refused(load, "x.pt", CPU, message="x.pt"))
    for name in "dtpl":
        Path(name).mkdir()
    Path("d/settings.json").write_text('{"tokenizer": ')
    shutil.copytree(chain / "diffusion/latents", "e/latents")
    latents = min(Path("e/latents").iterdir())
    latents.write_bytes(latents.read_bytes()[:5000])
    shutil.copy(chain / "tokenizer/stage1.pt", "t/ckpt.pt")
    Path("p/meta.json").write_text("{}")
    for name, out, message in (("diffusion", "d", "settings.json is not the settings of a run"),
                               ("diffusion", "e", "latents is not a whole folder of shards"), ("tokenizer", "t", "t/ckpt.pt")):
        refused(partial(call, fields={}), name, *made.get(name, []), "--steps", 9, "--out", out, message=message)
    refused(call, "tokenizer", "--data", "p", "--out", "u", message="p/labels.npy: No such file")
    Path("l/log.jsonl").write_bytes(b'{"stage": "stage 1", "st\n[3]\n{"x": 1}\n\xff\xfe\n')
    call("tokenizer", "--steps", 2, "--stage2-steps", 0, "--out", "l", fields={})
    assert len(log_of("l")) == 2
    tried("damaged checkpoints and notes of a run: named, or passed over", [*outcomes, *[True] * 5])


def mutated(content: bytes, rng) -> bytes:
    """A copy of a file with some bytes changed, cut out, doubled, or its end missing."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(0, max(1, len(content)) if rng.random() < 0.4 else min(400, max(1, len(content)))))
        span, kind = int(rng.integers(1, 9)), rng.integers(0, 5)
        if kind == 4:
            content = content[: max(1, at)]
        else:                                            # noise, nothing, twice, or larger numbers in a header
            part = content[at:at + span]
            content[at:at + span] = (rng.integers(0, 256, span, np.uint8).tobytes(), b"", part + part, b"9" * span)[kind]
    return bytes(content)


def test_random_damage_ends_in_one_line(chain, tmp_path):
    """2,000 damaged files: read after all, or refused in one line; never another error, never a large allocation."""
    rng, packed = np.random.default_rng(0), tmp_path / "packed"
    write_safetensors(tmp_path / "a.safetensors", {"one": torch.randn(4, 5), "two.x": torch.arange(7)})
    np.savez(tmp_path / "a.npz", arr_0=rng.integers(0, 256, (6, 8, 8, 3), np.uint8), labels=np.arange(6))
    np.savez_compressed(tmp_path / "ref.npz", mu=np.zeros(2048, np.float16), sigma=np.zeros((2048, 2048), np.float16))
    data.pack(make_folder(tmp_path / "x", 6), 8, packed)

    def read_images(path):
        images = both(packed)[0] if packed in path.parents else fid.open_set(str(path), 0, ONE)[0]
        return images and images[np.arange(len(images))]

    cases = [(tmp_path / "a.safetensors", fid.read_weights, 600), (tmp_path / "a.npz", read_images, 300),
             (tmp_path / "ref.npz", read_images, 100), (next(packed.glob("images/*.npy")), read_images, 200),
             (packed / "labels.npy", read_images, 100), (packed / "meta.json", read_images, 200),
             (chain / "tokenizer/ckpt.pt", partial(tokenizer.load_tokenizer, device=CPU), 200),
             (chain / "diffusion/ckpt.pt", partial(diffusion.load_diffusion, device=CPU), 200),
             (chain / "tokenizer/stage1.pt", fid.read_weights, 100)]
    peak, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for source, read, count in cases:
        content = source.read_bytes()
        path = source if packed in source.parents else tmp_path / f"broken{source.suffix}"
        read(source)
        for i in range(count):
            path.unlink(missing_ok=True)                 # a map of the file before stays whole
            path.write_bytes(mutated(content, rng))
            try:
                read(path)
                outcomes.append(True)
            except SystemExit as error:
                outcomes.append(len(str(error.code).splitlines()) == 1)
            except Exception as error:
                raise AssertionError(f"{source.name}, damage {i}: {error!r}") from error
        path.write_bytes(content)
    assert len(outcomes) == 2000 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 500_000
    tried("random damage to safetensors, npz, packed data and checkpoints", outcomes)


# Command lines (OUT: the folder of the tiny models), and what the one line must say
MISTAKES = {
    "tokenizer --stepz 3": "unrecognized arguments: --stepz 3", "tokenizer --step 3": "unrecognized arguments: --step 3",
    "tokenizer --steps abc": "argument --steps: invalid int value: 'abc'", "tokenizer --preset huge": "invalid choice: 'huge'",
    "tokenizer --size 33": "--size 33 must be a multiple", "tokenizer --width 50": "width 50 must be a multiple",
    "tokenizer --targets hogg": "--targets hogg", "tokenizer --targets hog,hog": "--targets hog,hog",
    "tokenizer --targets hog,none": "--targets hog,none", "tokenizer --adversary gan": "invalid choice: 'gan'",
    "tokenizer --batch-size 0": "--batch-size 0 must be at least 1", "tokenizer --mask-min 0.9": "--mask-min",
    "tokenizer --adversary dino --weights offline": "dino_deitsmall16_pretrain.pth from http://127",
    "tokenizer --lpips 1 --weights offline": "or do without: --lpips 0",
    "tokenizer --targets siglip --weights offline": "or do without: --targets hog",
    "tokenizer --from-official nowhere": "nowhere: no such file",
    "tokenizer --from-official empty": "empty/model.safetensors: no such file",
    "tokenizer --from-official damaged/ckpt.pt": "damaged/ckpt.pt is not a file of weights",
    "tokenizer --from-official other/ckpt.pt": "encoder.model.patch_embed.proj.weight is missing",
    "tokenizer --data nowhere": "/nowhere: no such folder", "tokenizer --data empty": "no images found",
    "tokenizer --data mixed": "lies beside class folders",
    "tokenizer --out damaged": "damaged/ckpt.pt is not a checkpoint of tokenizer.py",
    "tokenizer --out other --steps 3": "other/ckpt.pt is not a checkpoint of tokenizer.py (it is one of diffusion.py)",
    "diffusion --tokenizer none.pt": "none.pt: no such file", "diffusion --width 25": "--width 25",
    "diffusion --heads 0": "--heads 0 must be at least 1", "diffusion --seed -1": "--seed -1 must be at least 0",
    "diffusion --tokenizer damaged/ckpt.pt": "damaged/ckpt.pt is not a checkpoint",
    "diffusion --sampler dopri": "invalid choice: 'dopri'", "diffusion --guidance-high 2": "--guidance-high",
    "sample --num-samples 0": "--num-samples 0 must be at least 1", "sample --guidance 0.5": "--guidance 0.5 must be at least 1",
    "sample --model none.pt": "none.pt: no such file", "sample --model x.safetensors": "a released SiT needs --tokenizer",
    "sample --guidance-low 0.8": "--guidance-low <= --guidance-high",
    "sample --model OUT/diffusion/ckpt.pt --guide none.pt --tokenizer OUT/tokenizer/ckpt.pt": "none.pt: no such file",
    "sample --model OUT/diffusion/ckpt.pt --labels unicorn --tokenizer OUT/tokenizer/ckpt.pt": "'unicorn' is none of the cl",
    "sample --model x.safetensors --tokenizer OUT/tokenizer/ckpt.pt": "x.safetensors: no such file",
    "sample --model OUT/diffusion/ckpt.pt --tokenizer strange/ckpt.pt": "is not the tokenizer that",
    "fid --samples none.npz": "none.npz: no such file", "fid --features fd": "invalid choice: 'fd'",
    "fid OUT/samples/samples.npz none.npz": "none.npz: no such", "fid stats empty --out x.npz": "no images found",
    "fid OUT/samples/samples.npz mixed/cat --weights offline": "pt_inception-2015-12-05-6726825d.pth from http://127",
    "fid stats shapes --out x.npz": "give --size", "fid stats mixed": "--out",
    "fid latents none.pt --out damaged": "none.pt: no such file",
    "fid --samples damaged/ckpt.pt": "damaged/ckpt.pt is not an npz file", "data --data nowhere": "--out DIR",
    "data --data empty --out x": "no images found", "data --data nowhere --out x": "nowhere: no such folder"}


@pytest.fixture(scope="session")
def mistakes_folder(tmp_path_factory, chain):
    at = tmp_path_factory.mktemp("mistakes")
    make_folder(at / "mixed", 2)
    Image.new("RGB", (9, 9)).save(at / "mixed/loose.png")
    for name in ("empty", "damaged", "other", "strange", "offline"):
        (at / name).mkdir()
    whole = (chain / "tokenizer/ckpt.pt").read_bytes()
    (at / "damaged/ckpt.pt").write_bytes(whole[: len(whole) // 2])
    shutil.copy(chain / "diffusion/ckpt.pt", at / "other")
    state = torch.load(chain / "tokenizer/ckpt.pt", weights_only=True)
    state["ema"]["to_latent.bias"] += 1
    ONE.save(at / "strange/ckpt.pt", state)
    return at


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_clear_line(mistakes_folder, chain, monkeypatch, capsys, line):
    """In this process, called as the script does it: a subprocess for each would take minutes. No file is left."""
    before, (name, *args) = sorted(mistakes_folder.rglob("*")), line.replace("OUT", str(chain)).split()
    monkeypatch.chdir(mistakes_folder)
    monkeypatch.setattr(fid, "WEIGHTS", {k: ("http://127.0.0.1:9/" + url.rpartition("/")[2], sha256)
                                         for k, (url, sha256) in fid.WEIGHTS.items()})
    with pytest.raises(SystemExit) as error:
        call(name, *args)
    said = capsys.readouterr().err if error.value.code == 2 else error.value.code
    assert MISTAKES[line].lower() in said.lower() and len(said.strip().splitlines()) == 1 and said.startswith(f"{name}.py: ")
    assert before == sorted(mistakes_folder.rglob("*"))


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["tokenizer", "diffusion", "sample", "data"])
def test_sigkill_at_random_moments(cache, made, tmp_path, name):
    """A dozen times the process is killed at a random moment, mostly after its start; then it runs to the end."""
    args, files, span = {
        "tokenizer": (["--steps", 400, "--stage2-steps", 400, "--save-every", 1],
                      ["ckpt.pt", "stage1.pt", "metrics.json", "log.jsonl"], 1.5),
        "diffusion": (["--steps", 700, "--save-every", 1, "--samples", 0, *made["diffusion"]],
                      ["ckpt.pt", "latents", "log.jsonl"], 1.5),
        "sample": (["--num-samples", 1000, "--sampler", "sde", "--steps", 60, "--batch-size", 20, *made["sample"]],
                   ["samples.npz"], 0.6),
        "data": (["--data", tmp_path / "x", "--size", 64, "--workers", 1], ["images", "labels.npy", "meta.json"], 0.3)}[name]
    make_folder(tmp_path / "x", 3000 * (name == "data"), size=64)
    run, kills, rng = partial(script, name, *args, cwd=tmp_path), 0, np.random.default_rng(zlib.crc32(name.encode()))
    while kills < 12:
        victim = run("--out", "cut", background=True)
        time.sleep(rng.uniform(1.2, 2.0 + span))
        if victim.poll() is not None:                    # it came through: from the start again
            shutil.rmtree(tmp_path / "cut")
            continue
        kills += 1
        victim.kill()
        victim.wait()
        for path in (tmp_path / "cut").glob("*.pt"):
            torch.load(path, weights_only=True)          # whole at every moment
    run("--out", "cut")
    run("--out", "whole")
    assert_same(tmp_path / "whole", tmp_path / "cut", *files)
    tried(f"SIGKILL at random moments: {name}", [True] * kills)


# ---------------------------------------------------------------------------------------------------------------------
# The house

README = HERE / "README.md"


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations for which a program waits for a GPU: values that Python reads, and shapes that depend on them."""
    READERS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.overloadpacket.__name__ in self.READERS
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["tokenizer", "diffusion"])
def test_a_step_is_one_graph_and_waits_for_nothing(made, tmp_path, monkeypatch, name):
    """The compiled model is one graph, compiled once; and between two lines of the log no step waits for the device,
    after the first steps, in which the optimizers make their state.
    """
    compiled, steps, waits, compile_, add = [], [], Waits(), torch.compile, data.Log.add

    def backend(graph, inputs):
        compiled.append(len(steps))
        return graph.forward

    def count(self, *args, **terms):
        steps.append(add(self, *args, **terms))
        if flag == "--no-compile" and len(steps) == 2:
            waits.__enter__()
        if flag == "--no-compile" and len(steps) == 11:
            waits.__exit__(None, None, None)

    monkeypatch.setattr(data.Log, "add", count)
    monkeypatch.setattr(torch, "compile", lambda net, fullgraph: compile_(net, fullgraph=fullgraph, backend=backend))
    monkeypatch.setattr(sys.modules[name], "evaluate", lambda *args: {})
    args = ["--stage2-steps", 0] if name == "tokenizer" else ["--samples", 0, *made["diffusion"]]
    for flag in ("--compile", "--no-compile"):
        steps.clear()
        torch._dynamo.reset()
        call(name, *args, flag, "--steps", 12, "--out", tmp_path / flag, fields={"log_every": 100})
        assert len(steps) == 12
    assert compiled == [0] and waits.count == 0


def test_the_log_and_the_label_rules(tmp_path):
    cfg = dataclasses.replace(tokenizer.Config(), out=str(tmp_path), batch_size=8, lr=1e-3)
    (tmp_path / "log.jsonl").write_text('{"stage": "s", "step": 3}\n{"stage": "t", "step": 9}\n{"stage": "s", "st')
    log = data.Log(cfg, ONE, "s", 2, 4, type("Source", (), {"wait_seconds": 0.0}))    # it goes on after step 2
    for step in range(4):
        log.add(1.0, loss=torch.tensor(float(step)), part=(torch.tensor(6.0 * step), torch.tensor(2.0 + step)))
        if step % 2:
            log.write(step + 1)
    other, first, last = log_of(tmp_path)
    assert other == {"stage": "t", "step": 9} and (first["step"], last["step"]) == (2, 4)
    assert first["loss"] == 0.5 and first["part"] == pytest.approx(6 / 5) and last["lr"] == 1e-3     # ratios of sums
    for value in (1.0, math.nan, 2.0):
        log.add(0.5, loss=torch.tensor(value))
    refused(log.write, 8, message="s: loss is not finite at step 7 (learning rate 0.0005)")
    assert len(log_of(tmp_path)) == 3

    choose = partial(sample.choose_labels, classes=["a", "b"], dist=ONE, seed=0)
    assert choose("balanced", 5).tolist() == [0, 1, 0, 1, 0] and choose("b,0", 3).tolist() == [1, 0, 1]
    assert 400 < choose("random", 1000).sum() < 600 and np.array_equal(choose("random", 1000), choose("random", 1000))


def imports_of(name: str) -> dict[str, int]:
    """Modules that a script imports, and how many names from each."""
    found = {}
    for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for module in [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
                found[module.split(".")[0]] = max(found.get(module.split(".")[0], 0), len(node.names))
    return found


BLOCK = """import runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in blocked:
            raise ModuleNotFoundError(f"No module named {name}", name=name)
blocked = {"fcntl", "resource", "pwd", "grp", "termios"}
sys.meta_path.insert(0, Finder())
for name in blocked:
    sys.modules.pop(name, None)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", STAGES)
def test_help_shows_every_flag_without_the_modules_of_unix_and_imports_go_one_way(name, monkeypatch):
    """As on Windows and macOS: where fcntl, resource, pwd, grp and termios cannot be imported."""
    command = [sys.executable, "-c", BLOCK, str(HERE / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for f in dataclasses.fields(sys.modules[name].Config):
        if "help" in f.metadata:
            assert "--" + f.name.replace("_", "-") in done.stdout and f.metadata["help"].split()[0] in done.stdout
    packages = set(sys.stdlib_module_names) | {"torch", "numpy", "tqdm", "PIL", "scipy"}
    later = {"tokenizer"} if name == "fid" else set()    # fid.py latents, inside its function
    assert imports_of(name).keys() <= packages | {*STAGES[:STAGES.index(name)]} | later
    monkeypatch.delenv("MAETOK_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)    # as where nobody knows the user
    refused(data.cache_dir, message="set MAETOK_CACHE")


TINY_FLAGS = {name: [f"--{k.replace('_', '-')}={v}" for k, v in TINY[name].items()
                     if "help" in sys.modules[name].Config.__dataclass_fields__[k].metadata] for name in TINY}
SMALL = json.dumps({"tokenizer.py": TINY_FLAGS["tokenizer"], "sample.py": ["--num-samples", "40"],
                    "diffusion.py": [*TINY_FLAGS["diffusion"], "--samples", "40"]})
TOKENIZER = shlex.join(["tokenizer.py", *TINY_FLAGS["tokenizer"], "--steps=3", "--stage2-steps=3", "--precision=fp32"])
EXPERIMENTS = {                                          # file: its tiny commands. CHAIN: the tiny models; WEIGHTS; HERE
    "common": [], "finding": [
        ["--out", "f", "--kinds", "mae_hog", "--seeds", "0", "--steps", "6", "--stage2-steps", "4", "--diffusion-steps", "6",
         "--keep-every", "2", "--dims", "8", "--jobs", "1", "--args", SMALL], ["--table", "HERE/results/finding", "--out", "t"]],
    "default_speed": [["a=HERE", "b=HERE", "--steps", TOKENIZER, "--rounds", "2", "--out", "o"]],
    "official_step": [["--kinds", "ours, eager", "--rounds", "2", "--batch", "2", "2", "--model",
                       '{"size":32,"width":24,"heads":2,"depth":1}', "--sit", "24", "1", "2", "--json", "o.json"]],
    "bench": [["log", "CHAIN/tokenizer/log.jsonl", "--size", "128", "--out", "o"], ["cost", "--out", "o"],
              ["data", "--images", "12", "--batch", "4", "--rounds", "2", "--out", "o"],
              ["fid", "--weights", "WEIGHTS", "--batch", "1", "--rounds", "1", "--out", "o"]],
    "samplers": [["--model", "CHAIN/diffusion/ckpt.pt", "--num-samples", "20", "--samplers", "euler", "heun", "--steps", "2",
                  "--guidance", "1.0", "--out", "o"]],
    "compare": [[f"tiny={TOKENIZER} --save-every=1", "--processes", "1", "2", "--out", "o"]]}


@pytest.mark.parametrize("path", sorted((HERE / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_experiments_run(path, chain, made_weights, tmp_path):
    if path.stem in ("finding", "samplers"):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for args in ([["--help"], *EXPERIMENTS[path.stem]]):
        args = [arg.replace("CHAIN", str(chain)).replace("WEIGHTS", str(made_weights)).replace("HERE", str(HERE)) for arg in args]
        done = subprocess.run([sys.executable, path, *args], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.bookkeeping
def test_budgets():
    """Lines, bytes, flags, imported names."""
    lines, size = ({p.stem: count(p) for p in HERE.glob("*.py")} for count in (
        lambda p: len(p.read_text().splitlines()), lambda p: p.stat().st_size))
    assert sum(lines[name] for name in STAGES) <= 3850 and sum(size[name] for name in STAGES) <= 200_000
    assert lines["test_all"] <= 2200
    assert sum(len(p.read_text().splitlines()) for p in (HERE / "experiments").glob("*.py")) <= 900
    for name, flags in {"tokenizer": 36, "diffusion": 26, "sample": 18, "fid": 12}.items():
        command = [sys.executable, HERE / f"{name}.py", "--help"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert len(set(re.findall(r"^  (--\w[\w-]*)", said, re.MULTILINE))) <= flags, name
        assert imports_of(name).get("data", 0) <= 14 and imports_of(name).get("fid", 0) <= 9, name
    assert {p.name for p in HERE.glob("*.py")} == {f"{name}.py" for name in (*STAGES, "test_all")}


@pytest.mark.bookkeeping
def test_readme_counts_the_lines_and_quotes_the_code():
    readme = README.read_text()
    sources = {path.name: [line.strip() for line in path.read_text().splitlines()] for path in HERE.glob("*.py")}
    for name, source in sources.items():
        assert int(re.search(rf"\| \[{name}\].*?\| (\d+) \|", readme)[1]) == pytest.approx(len(source), rel=0.03), name
    for block in re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        for part in block.strip().split("\n\n"):
            lines = [line.strip() for line in part.splitlines()]
            assert any(lines == source[i:i + len(lines)] for source in sources.values() for i in range(len(source))), part


def test_every_command_of_the_readme_runs(cache, made_weights, tmp_path):
    """All of its sh blocks, in order in one folder, by bash as they stand, but: installing is left out (.ci/run does it),
    placeholders become small files, torchrun one process, and each script is given the smallest sizes behind its own flags.
    """
    at, commands = tmp_path / "files", tmp_path / "bin"
    make_folder(at / "images", 20, size=16)
    for folder, count in (("A", 8), ("B", 9)):
        make_folder(at / folder, count, ("",), 16)
    for name, file, meta in (("maetok-b-128", "tokenizer_tiny_b_movq", {"vq_mean": 0.5, "vq_std": 2.0}),
                             ("sit-xl", "sit_tiny_b", {"num_heads": 6})):
        (at / name).mkdir()
        write_safetensors(at / name / "model.safetensors", golden(f"maetok/{file}")[1])
        (at / name / "config.json").write_text(json.dumps(meta))
    sizes = {"tokenizer": [*TINY_FLAGS["tokenizer"], "--steps=2 --stage2-steps=1 --batch-size=4", f"--weights={made_weights}"],
             "diffusion": [*TINY_FLAGS["diffusion"], "--steps=4 --keep-every=2 --samples=20 --batch-size=8"],
             "sample": ["--num-samples=20 --steps=2"], "fid": [f"--weights={made_weights} --dims=8"], "data": ["--size=16"]}
    cases = [f"{name}.py) shift; exec {sys.executable} {HERE}/{name}.py \"$@\" {' '.join(more)};;"
             for name, more in sizes.items()]
    cases += [f'-m) exec {sys.executable} "$@" --collect-only;;',
              f'experiments/*) script=$1; exec {sys.executable} {HERE}/$script --help;;', '*) echo "what is $*?"; exit 1;;']
    commands.mkdir()
    for name in ("python", "torchrun"):
        text = ["#!/bin/bash", "while [[ $1 == --* ]]; do shift; done", "case $1 in", *cases, "esac\n"]
        (commands / name).write_text("\n".join(text))
        (commands / name).chmod(0o755)
    stand_ins = {"path/to/images": at / "images", "/data/imagenet": at / "images", "path/to/maetok-b-128": at / "maetok-b-128",
                 "path/to/sit-xl": at / "sit-xl", " A B": f" {at}/A {at}/B", "stats B": f"stats {at}/B",
                 " test_all.py": f" {HERE}/test_all.py"}
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert all(old in "".join(blocks) for old in stand_ins) and sum("torchrun" in block for block in blocks) >= 4
    for block in blocks:
        block = re.sub(r"python3 -m venv .*?requirements.txt( pytest(-xdist)?==[\d.]+)* && ", "", block)
        for old, new in stand_ins.items():
            block = block.replace(old, str(new))
        env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{commands}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-ec", block], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, block + done.stdout[-2000:] + done.stderr[-2000:]


# Numbers of the README that are no measurement of ours. Of the paper: its tables and figures as the README quotes them
PAPERS = {"40", "60", "0.67", "24.47", "0.85", "5.78", "0.48", "5.69", "1.22", "22.17", "1.75", "18.17", "1.15", "17.18",
          "2.43", "13.54", "0.89", "6.24", "23.61", "2.31", "1.67"}
# settings, versions, and limits that a test or an error message states
SETTINGS = {"0.75", "2.0", "1.0", "3.0", "45", "90", "1", "2.13.0", "0.4.0", "2.9.0", "2.14.1", "2.11", "3.10", "3.11", "3.13",
            "3.2", "3.3", "3.1", "171.9"}


def test_numbers_in_the_readme_are_in_the_results(monkeypatch):
    """Every decimal number outside code: a rounded value of some file in results/, or named above. Whole percentages, too,
    though among so many values few of them could fail. And the tables of the finding are those that its files make.
    """
    found, rows, unknown, readme = [], set(), [], README.read_text()

    def leaves(x):
        for value in x.values() if isinstance(x, dict) else x if isinstance(x, (list, set)) else ():
            leaves(value)
        if isinstance(x, (int, float)):
            found.append(float(x))
        if isinstance(x, str):
            found.extend(float(n) for n in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", x))

    monkeypatch.syspath_prepend(str(HERE / "experiments"))
    finding = importlib.import_module("finding")
    for path in (HERE / "results").glob("*/table.md"):
        runs = [json.loads(file.read_text()) for file in sorted(path.parent.glob("*-*.json"))]
        kinds = sorted({run["kind"] for run in runs}, key=lambda kind: (kind.startswith("mae"), kind))
        assert finding.markdown({kind: [run for run in runs if run["kind"] == kind] for kind in kinds}) == path.read_text()
        rows |= set(path.read_text().splitlines())
    for path in (HERE / "results").rglob("*.json"):
        leaves(json.loads(path.read_text()))
    leaves(rows)
    quoted = [line for line in readme.splitlines() if line.split("|")[1:2] and line.split("|")[1].strip() in finding.MEASURES]
    assert len(quoted) > 5 and set(quoted) <= rows
    text = "\n".join(line for line in readme.splitlines() if line not in quoted)
    text = re.sub(r"^```.*?^```|`[^`]*`|\]\(.*?\)|^#.*?$|Eq\. ?\d+|\(\[arXiv.*?\)", " ", text, flags=re.MULTILINE | re.DOTALL)
    values = np.array(found)
    for number, percent in re.findall(r"(?<![\w.\-])(\d[\d,]*(?:\.\d+)*)( %)?", text):
        number = number.rstrip(",").replace(",", "")
        if ("." in number or percent) and number not in PAPERS | SETTINGS:
            half = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
            known = number.count(".") < 2 and [(np.abs(scale * values - float(number)) <= half).any() for scale in (1, 100)]
            unknown += [] if known and any(known) else [number]
    assert not unknown
