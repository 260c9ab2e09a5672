"""All tests: `python -m pytest -q -n 2 test_all.py`. CPU only; the scripts run end to end at a tiny size in subprocesses.

Reference values are read from ../shared/goldens where that folder is (the full set), else from assets/goldens.
"""
import argparse
import ast
import copy
import gc
import http.server
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

os.environ["CUDA_VISIBLE_DEVICES"] = ""                 # before torch: the tests are for the CPU,
os.environ.setdefault("OMP_NUM_THREADS", "1")           # and threads of several processes hinder each other
import torch
import torch.nn.attention
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


def golden(name: str) -> tuple[dict, dict, dict]:
    """Arrays, weights under their official names, and the case of one golden file."""
    with np.load(GOLDENS / f"{name}.npz") as z:
        tensors = {k: torch.from_numpy(z[k]) for k in z.files if z[k].dtype.kind in "fiub" and z[k].ndim}
        case = json.loads(str(z["case" if "case" in z.files else "meta"]))
        tensors |= {k: z[k].item() for k in z.files if z[k].ndim == 0 and z[k].dtype.kind in "fi"}
    weights = {k[3:]: v for k, v in tensors.items() if k.startswith("sd/")}
    return tensors, weights, case


def names(family: str, pattern: str) -> list[str]:
    return sorted(f"{family}/{p.stem}" for p in (GOLDENS / family).glob(pattern))


def close(ours, theirs, rtol=1e-4):
    """Largest difference relative to the largest value."""
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    error = (torch.as_tensor(ours).double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)
    assert error <= rtol, f"relative error {error:.2e}"


def cpu_run(precision="fp32") -> data.Run:
    return data.Run(0, 1, torch.device("cpu"), precision)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with the reference implementations


@pytest.mark.parametrize("name", names("maetok", "tokenizer_*"))
def test_tokenizer_agrees_with_official(name):
    t, weights, case = golden(name)
    model, _ = tokenizer.from_official(weights, case["enc"]["num_heads"], case["dec"]["num_heads"])
    close(model.encoder(t["image"]), t["encoder_tokens"])
    close(model.encode(t["image"]), t["latents"])
    close(model(t["image"])["recon"], t["reconstruction"])
    close(model.decode(t["free_latents"]), t["free_reconstruction"])
    if "mask" in t:
        close(model.encode(t["image"], t["mask"].bool()), t["masked_latents"])
        close(model(t["image"], t["mask"].bool())["recon"], t["masked_reconstruction"])


def test_official_weights_with_a_wrong_key_are_refused():
    _, weights, case = golden("maetok/tokenizer_tiny_b_movq")
    heads = case["enc"]["num_heads"], case["dec"]["num_heads"]
    with pytest.raises(SystemExit, match="encoder.surprise is unknown"):
        tokenizer.from_official(weights | {"encoder.surprise": torch.zeros(1)}, *heads)
    del weights["encoder.model.blocks.1.mlp.fc1.bias"]
    with pytest.raises(SystemExit, match=r"encoder.model.blocks.1.mlp.fc1.bias is missing"):
        tokenizer.from_official(weights, *heads)


def test_each_damage_to_a_released_checkpoint_is_named():
    name = "tokenizer_tiny_a" if (GOLDENS / "maetok/tokenizer_tiny_a.npz").exists() else "tokenizer_tiny_b_movq"
    _, weights, case = golden(f"maetok/{name}")
    heads = case["enc"]["num_heads"], case["dec"]["num_heads"]
    folded = ("freqs_t_", "decoder.model.pos_embed", "decoder.model.patch_embed", "norm.adaLN", "encoder.mask_token",
              "decoder.model.cls_token")
    for key in weights:
        if not any(part in key for part in folded):
            with pytest.raises(SystemExit) as error:
                tokenizer.from_official({k: v for k, v in weights.items() if k != key}, *heads)
            named = key in str(error.value) or key.endswith(("freqs", "adaLN_modulation.1.weight"))
            assert named and len(str(error.value).splitlines()) == 1, (key, error.value)
        if key.startswith(("encoder", "quant", "post")) and "freqs_t_" not in key:
            for other in (weights[key][..., None], weights[key].flatten()[:1], torch.tensor(1.0)):
                with pytest.raises(SystemExit) as error:
                    tokenizer.from_official(weights | {key: other}, *heads)
                assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["ae_b128_256_plain_cls", "ae_b128_512_p16_movq_nocls"])
@torch.no_grad()
def test_a_released_checkpoint_at_full_size(name, tmp_path, monkeypatch, capsys):
    """The exact key list with random values: --from-official, then an image there and back; the statistics travel."""
    text = (GOLDENS / f"maetok/keys/{name}.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in text[1:]]
    torch.manual_seed(0)
    weights = {key: 0.03 * torch.randn([int(n) for n in shape.split("x")]) for key, shape, *_ in rows}
    (tmp_path / "official").mkdir()
    write_safetensors(tmp_path / "official/model.safetensors", weights)
    (tmp_path / "official/config.json").write_text(json.dumps({"vq_mean": 0.01, "vq_std": 0.07, "image_size": 1}))
    start = time.time()
    read = data.read_weights(tmp_path / "official/model.safetensors")
    between = time.time()
    model, cfg = tokenizer.from_official(read)
    assert between - start < 5 and time.time() - between < 5
    assert all(torch.equal(read[k], weights[k]) for k in weights)
    assert (cfg.size, cfg.latents, cfg.channels) == (512 if "512" in name else 256, 128, 32)
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "--from-official", str(tmp_path / "official"), "--out",
                                      str(tmp_path / "out")])
    tokenizer.main()
    assert "0.07" in capsys.readouterr().out
    again, _ = tokenizer.load_tokenizer(tmp_path / "out/ckpt.pt", torch.device("cpu"))
    stored = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert stored["latent_statistics"] == {"mean": 0.01, "std": 0.07}
    assert (tmp_path / "out/ckpt.pt").stat().st_size < 4.01 * sum(p.numel() for p in model.parameters()) + 1e6
    x = torch.rand(1, 3, cfg.size, cfg.size) * 2 - 1
    z = model.encode(x)
    assert z.shape == (1, 128, 32) and torch.equal(again.encode(x), z)
    image = model.decode(z)
    assert image.shape == x.shape and torch.equal(again.decode(z), image) and image.isfinite().all()


def test_a_bare_state_dict_and_a_training_checkpoint_load(tmp_path, monkeypatch):
    _, weights, _ = golden("maetok/tokenizer_tiny_b_movq")
    state = {"model": {"a": torch.zeros(1)}, "ema": weights, "args": argparse.Namespace(lr=1)}
    torch.save(state, tmp_path / "train.pt")
    assert data.read_weights(tmp_path / "train.pt").keys() == weights.keys()
    torch.save(weights, tmp_path / "bare.pt")
    assert data.read_weights(tmp_path / "bare.pt").keys() == weights.keys()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "--from-official", "train.pt", "--out", "out"])
    tokenizer.main()
    again, cfg = tokenizer.load_tokenizer("out/ckpt.pt", torch.device("cpu"))
    assert (cfg.size, cfg.decoder) == (64, "modulated") and again.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 12, 6)
    with pytest.raises(SystemExit, match="is there already"):
        tokenizer.main()


@pytest.mark.parametrize("name", names("maetok", "rope_*"))
def test_rope_agrees_with_official(name):
    t, _, case = golden(name)
    heads = case["num_heads"]
    for grid in ("grid", "other"):
        columns, rows = t[f"{grid}_xy"].tolist()
        cos, sin = tokenizer.rope_tables(t["freqs"], heads, (rows, columns), 0, 0)
        close(cos, t[f"{grid}_cos"])
        close(sin, t[f"{grid}_sin"])
        for layer in range(len(cos)):
            close(tokenizer.rotate(t[f"{grid}_q"], cos[layer], sin[layer]), t[f"{grid}_q_rot"][layer])
            close(tokenizer.rotate(t[f"{grid}_k"], cos[layer], sin[layer]), t[f"{grid}_k_rot"][layer])


@pytest.mark.parametrize("name", names("maetok", "hog_*"))
def test_hog_agrees_with_official(name):
    t, _, _ = golden(name)
    torch.testing.assert_close(tokenizer.hog(t["image_u8"].float() / 127.5 - 1, 16), t["hog"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", names("metrics", "hog*"))
def test_hog_agrees_with_maskfeat(name):
    t, _, case = golden(name)
    sizes = {tag: (cell, patch) for tag, _, _, _, cell, patch in case["cases"]} | {"edges": (8, 16)}
    seen = 0
    for key in (k for k in t if k.startswith("target_")):
        _, tag, window = key.split("_")
        cell, patch = sizes[tag.removesuffix("dyadic")]
        ours = tokenizer.hog(t[f"x_{tag}"], patch, cell, int(window[2:]))
        torch.testing.assert_close(ours, t[key], atol=1e-5, rtol=0)
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("name", names("maetok", "maskae_*"))
def test_a_masked_training_step_agrees_with_official(name):
    """Masked latents, reconstruction and the three auxiliary losses; of the teachers only their outputs are given."""
    t, weights, case = golden(name)
    model, cfg = tokenizer.from_official(weights, *(case[net]["num_heads"] for net in ("enc", "dec", "aux")))
    assert cfg.targets == "hog,dinov2,siglip"
    x, mask = t["image_u8"].float() / 127.5 - 1, t["mask"].bool()
    out = model(x, mask)
    close(model.encode(x, mask), t["latents"])
    close(out["recon"][..., ::4, ::4], t["reconstruction"])
    targets = {"hog": tokenizer.hog(x, cfg.patch), "dinov2": t["target_dino"], "siglip": t["target_clip"]}
    torch.testing.assert_close(targets["hog"][:, :len(t["target_hog"][0])], t["target_hog"], atol=1e-5, rtol=0)
    for ours, theirs in (("hog", "hog"), ("dinov2", "dino"), ("siglip", "clip")):
        loss = tokenizer.masked_mse if ours == "hog" else tokenizer.masked_cosine
        close(out[ours][:, :len(t[f"pred_{theirs}"][0])], t[f"pred_{theirs}"])
        close(loss(out[ours], targets[ours], mask), t[f"{theirs}_loss"])


@pytest.mark.parametrize("name", names("maetok", "gan_*"))
def test_adversarial_terms_agree_with_official(name):
    t, _, _ = golden(name)
    close(tokenizer.hinge_loss(t["logits_real"], t["logits_fake"]), t["hinge_d"])
    lecam = tokenizer.LeCam(cpu_run())
    for real, fake, means, value in zip(t["lecam_real"], t["lecam_fake"], t["lecam_ema"], t["lecam_reg"]):
        close(lecam(real, fake), value)
        close(lecam.means, means)
    x, color = t["aug_x"], t["aug_u"]
    for i, operation in enumerate(("brightness", "saturation", "contrast")):
        alone = torch.full_like(color, 0.5)              # the middle of each range changes nothing
        alone[i] = color[i]
        close(tokenizer.augment(x, {"color": alone}, 0.2), t[f"aug_{operation}"])
    close(tokenizer.augment(x, {"shift": t["aug_shift"]}, 0.2), t["aug_translation"])
    for share in (0.2, 0.5):
        close(tokenizer.augment(x, {"cutout": t[f"aug_cutout{share}_offset"]}, share), t[f"aug_cutout{share}"])


class Probe(torch.nn.Module):
    """The small discriminator of the golden."""

    def __init__(self, weights):
        super().__init__()
        self.c1, self.c2 = torch.nn.Conv2d(3, 6, 3, 2, 1), torch.nn.Conv2d(6, 1, 3, 2, 1)
        self.load_state_dict(weights)

    def forward(self, *views):
        return [self.c2(torch.nn.functional.leaky_relu(self.c1(x), 0.2)).flatten(1) for x in views]


@pytest.mark.parametrize("name", names("maetok", "gan_*"))
def test_the_image_loss_agrees_with_official(name):
    """Warm-up, start step, adaptive weight and both objectives, with the small networks of the golden."""
    t, _, case = golden(name)
    cfg = tokenizer.Config(size=16, patch=8, batch_size=case["batch"], lpips=1.0, lpips_warmup=10, adv_weight=0.4,
                           adv_start=30, lecam=0.001, diffaug=False, consistency=0.0)
    adversary = tokenizer.Adversary(cfg, cpu_run(), Probe({k[6:]: v for k, v in t.items() if k.startswith("probe/")}))
    loss = tokenizer.ImageLoss(cfg, cpu_run(), lambda a, b: (a - b).abs().mean((1, 2, 3)), adversary)
    real, recon = t["vq_real"], t["vq_recon"]
    image = tokenizer.unpatchify(t["vq_feat"] @ t["vq_last_layer"].T, 4).requires_grad_()
    large = image.repeat_interleave(2, 2).repeat_interleave(2, 3)    # the golden enlarges its image
    close(large.detach(), recon)
    for i, step in enumerate(t["vq_steps"].tolist()):
        warm = min(1, step / 10)
        _, terms = loss(recon, t["vq_feat"], real, step - 1, slice(None))
        nll = terms["recon"] + warm * terms["lpips"]
        gradients = [torch.autograd.grad(term, image, retain_graph=True)[0] for term in (
            (large - real).square().mean() + warm * (large - real).abs().mean(), -adversary.net(large)[0].mean())]
        adaptive = tokenizer.adaptive_weight(*gradients, t["vq_feat"], 4, cpu_run())
        close(adaptive, t["vq_adaptive_weight"][i])
        assert ("adv" in terms) == (step >= 30)
        close(nll + t["vq_codebook_losses"].sum() + (0.4 * adaptive * terms["adv"] if "adv" in terms else 0),
              t["vq_gen_loss"][i])
        if step < 30:                                    # the official code moves the LeCam means from the first step
            assert not loss.discriminator_step(real, [recon], step - 1, 0.0)
            adversary.lecam(*adversary.net(real, recon))
        else:
            terms = loss.discriminator_step(real, [recon], step - 1, 0.0)
            close(0.4 * (terms["hinge"] + 0.001 * terms["lecam"]), t["vq_disc_loss"][i])


def fill_discriminator(net, weights):
    """Weights under the official names; of a norm without running statistics some stay unused."""
    own = net.state_dict()
    net.load_state_dict({k: weights.get(k, v) for k, v in own.items()})
    assert {k for k in own if "running" not in k and "tracked" not in k} <= weights.keys()
    return net


@pytest.mark.parametrize("name", names("maetok", "disc_dino_*"))
@torch.no_grad()
def test_dino_discriminator_agrees_with_official(name):
    t, _, case = golden(name)
    trunk = fid.VisionTransformer({k[5:]: v for k, v in t.items() if k.startswith("dino/")}, "dino", case["num_heads"])
    net = fill_discriminator(tokenizer.DinoDiscriminator(trunk.eval(), "batch", tuple(case["key_depths"])),
                             {k[5:]: torch.as_tensor(v) for k, v in t.items() if k.startswith("disc/")})
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
    made = {}
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
        made[key] = torch.from_numpy(u if u.dtype == np.int64 else u.astype(np.float32))
    return made


def public_keys(network: str) -> dict[str, list[int]]:
    """Names and shapes of a public weight file."""
    return json.loads((GOLDENS / "metrics/state_dict_keys.json").read_text())[network]


@pytest.mark.parametrize("name", names("metrics", "dinodisc*"))
@torch.no_grad()
def test_dino_discriminator_agrees_at_full_size(name):
    t, _, case = golden(name)
    trunk = fid.VisionTransformer(filled(public_keys("dino_deitsmall16"), case["weight_seed"]), "dino").eval()
    with np.load(GOLDENS / f"{name}.npz") as z:
        heads = filled(json.loads(str(z["heads_keys"])), case["weight_seed"])
    x = t["img"].permute(0, 3, 1, 2).float() / 127.5 - 1
    for norm in ("batch", "groups"):
        net = fill_discriminator(tokenizer.DinoDiscriminator(trunk, norm), heads)
        tag = "sbn" if norm == "batch" else "bn"
        for call in ("first", "second"):
            torch.testing.assert_close(net(x)[0], t[f"logits_{tag}_{call}"], atol=1e-4, rtol=0)
        if norm == "groups":
            torch.testing.assert_close(net.eval()(x)[0], t["logits_bn_eval"], atol=1e-4, rtol=0)
    taps = [(x, "", 3)]
    if "img_224" in t:
        taps.append((t["img_224"].permute(0, 3, 1, 2).float() / 127.5 - 1, "_224", 7))
    for image, suffix, every in taps:
        for i, tap in enumerate(net.features(image)):
            n, channels, _ = t[f"act{i}{suffix}"].shape
            torch.testing.assert_close(tap[:n, :channels, ::every], t[f"act{i}{suffix}"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", names("metrics", "dinov2*"))
@torch.no_grad()
def test_dinov2_agrees_with_official(name):
    t, _, case = golden(name)
    seed, seen = case["weight_seed"], 0
    for tag, keys in case["keys"].items():
        weights = filled(keys, seed)
        if tag == "plain_small":                         # small activations make the eps of the norms visible
            for key in weights:
                if key in ("pos_embed", "cls_token") or key.endswith("gamma") or key.startswith("patch_embed"):
                    weights[key] = weights[key] * np.float32(1e-3)
        net = fid.VisionTransformer(weights, "dinov2", case["config"]["num_heads"]).eval()
        for key in (k for k in t if re.fullmatch(rf"patch_{tag}_\d+x\d+", k)):
            size = key.rpartition("_")[2]
            out, n = net(t[f"x_{size}"]), net.prefix + net.registers
            torch.testing.assert_close(out[:, n:], t[key], atol=3e-5, rtol=0)
            torch.testing.assert_close(out[:, 0], t[f"cls_{tag}_{size}"], atol=3e-5, rtol=0)
            if net.registers:
                torch.testing.assert_close(out[:, 1:n], t[f"regtok_{tag}_{size}"], atol=3e-5, rtol=0)
            seen += 1
        net.pos_embed = filled({"pos_embed": (1, 1370, 8)}, seed)["pos_embed"][:, 1:]
        for key in (k for k in t if re.fullmatch(rf"pos37_{tag}_\d+", k)):
            side = int(key.rpartition("_")[2])
            torch.testing.assert_close(net.positions(side, side), t[key][:, 1:], atol=1e-5, rtol=0)
            seen += 1
    assert seen >= 5


@pytest.mark.parametrize("name", names("metrics", "siglip*"))
@torch.no_grad()
def test_siglip_agrees_with_official(name):
    t, _, case = golden(name)
    weights = filled(case["keys"], case["weight_seed"])
    net = fid.VisionTransformer(weights, "siglip", case["config"]["num_attention_heads"]).eval()
    for size in ("native", "interp"):
        torch.testing.assert_close(net(t[f"x_{size}"]), t[f"last_hidden_state_{size}"], atol=3e-5, rtol=0)
    for key in weights:
        if any(part in key for part in ("embeddings.", "out_proj.", ".mlp.fc2.")):
            weights[key] = weights[key] * np.float32(1e-3)
    net = fid.VisionTransformer(weights, "siglip", case["config"]["num_attention_heads"]).eval()
    torch.testing.assert_close(net(t["x_native"]), t["last_hidden_state_native_small"], atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", names("metrics", "lpips*"))
@torch.no_grad()
def test_lpips_agrees_with_official(name):
    t, _, case = golden(name)
    vgg = filled(public_keys("vgg16"), case["weight_seed"])
    heads = {"real": {f"lin{i}.model.1.weight": t[f"head_real_lin{i}"] for i in range(5)},
             "det": filled(public_keys("lpips_heads_v0.1_vgg"), case["weight_seed"])}
    for key in (k for k in t if k.startswith("layers_")):
        _, size, kind = key.split("_")
        net = fid.Lpips(vgg, heads[kind])                # in training mode, too: nothing in it is random
        a, b = (t[f"{side}_{size}"].permute(0, 3, 1, 2).float() / 127.5 - 1 for side in "ab")
        torch.testing.assert_close(net.layers(a, b), t[key], atol=1e-6, rtol=0)
        torch.testing.assert_close(net(a, b), t[f"lpips_{size}_{kind}"], atol=1e-6, rtol=0)


def build_sit(weights, args) -> diffusion.SiT:
    keys = ("input_size", "in_channels", "num_classes")
    model = diffusion.from_official(weights, args["num_heads"])
    assert (*model.shape, model.null) == tuple(args[key] for key in keys)
    return model


@pytest.mark.parametrize("name", names("maetok", "sit_tiny_*"))
def test_sit_agrees_with_official(name):
    t, weights, case = golden(name)
    model = build_sit(weights, case["args"])
    close(diffusion.sinusoid(t["t"], 256), t["t_sinusoid"])
    close(model.t_embedder(t["t"]), t["t_embed"])
    close(model(t["x"], t["t"], t["y"]), t["velocity"])
    if case["keep_pos_embed"]:
        close(diffusion.token_positions(*model.pos_embed.shape[1:]), weights["pos_embed"])


@torch.no_grad()
def test_a_released_sit_at_full_size():
    """The exact key list: strict, every number accounted for, and it runs (values repeated, so that it fits)."""
    text = (GOLDENS / "maetok/keys/sit_xl_1d_128x32.tsv").read_text().splitlines()
    shapes = {key: [int(n) for n in shape.split("x")] for key, shape, *_ in (line.split("\t") for line in text[1:])}
    weights = {key: torch.full([1] * len(shape), 0.01).expand(shape) for key, shape in shapes.items()}
    model = diffusion.from_official(weights)
    assert sum(math.prod(v.shape) for v in model.state_dict().values()) == 675_000_608
    assert (model.shape, model.null, len(model.blocks), model.blocks[0].attn.heads) == ((128, 32), 1000, 28, 16)
    assert model(torch.randn(1, 128, 32), torch.tensor([0.5]), torch.tensor([1000])).shape == (1, 128, 32)
    own = diffusion.SIZES["xl"]
    ratio = diffusion.forward_flops(1024, 32, *own[:2]) / diffusion.forward_flops(128, 32, *own[:2])
    assert ratio == pytest.approx(8.9, abs=0.1)
    with pytest.raises(SystemExit, match="a released SiT: blocks.3.mlp.fc1.bias is missing"):
        diffusion.from_official({k: v for k, v in weights.items() if k != "blocks.3.mlp.fc1.bias"})


def test_a_released_pair_samples(tmp_path):
    """sample.py --from-official with a converted tokenizer whose config gave the latent statistics."""
    _, weights, case = golden("maetok/tokenizer_tiny_b_movq")
    model, cfg = tokenizer.from_official(weights, case["enc"]["num_heads"], case["dec"]["num_heads"])
    state = {"kind": "tokenizer", "config": data.dataclasses.asdict(cfg), "stage": 2, "ema": model.state_dict()}
    data.save_checkpoint(tmp_path / "bare.pt", state)
    data.save_checkpoint(tmp_path / "tok.pt", state | {"latent_statistics": {"mean": 0.5, "std": 2.0}})
    _, weights, case = golden("maetok/sit_tiny_b")
    (tmp_path / "sit").mkdir()
    write_safetensors(tmp_path / "sit/model.safetensors", weights)
    (tmp_path / "sit/config.json").write_text(json.dumps({"num_heads": case["args"]["num_heads"]}))
    args = ["--from-official", "sit", "--n", "9", "--precision", "fp32", "--sampler", "euler", "--steps", "3", "--png"]
    script("sample", *args, "--tokenizer", "tok.pt", cwd=tmp_path)
    with np.load(tmp_path / "out/samples/samples.npz") as z:
        images, labels = z["arr_0"], z["labels"]
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1] and images.shape == (9, cfg.size, cfg.size, 3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/samples/png/000008.png")), images[8])
    sit, y = build_sit(weights, case["args"]), torch.from_numpy(labels)
    noise = diffusion.ImageNoise(range(9), 0, sit.shape, torch.device("cpu"))()
    with torch.no_grad():
        x = diffusion.sample_ode(diffusion.guided_velocity(sit, y, 1.9, 0.0, 0.75), noise, 3)       # paper256
        again = data.to_uint8(model.decode(x.float() * 2 + 0.5))
    assert np.abs(again.permute(0, 2, 3, 1).numpy().astype(int) - images).max() <= 1
    for extra, message in ((["--tokenizer", "bare.pt"], "has no latent statistics"), ([], "needs --tokenizer")):
        done = script("sample", *args, *extra, cwd=tmp_path, check=False)
        assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", names("maetok", "loss_*"))
def test_flow_loss_agrees_with_official(name):
    t, weights, case = golden(name)
    model = build_sit(weights, case["args"])
    for path in ("linear", "cosine"):
        for times in ("uniform", "lognormal"):
            at = t["uniform_t"] if times == "uniform" else diffusion.lognormal_times(t["rnd_normal"], path)
            close(at, t[f"{path}_{times}_t"])
            loss = diffusion.velocity_loss(model, t["x"], t["noise"], at.flatten(), t["y"], path)
            close(loss, t[f"{path}_{times}_loss"])


@pytest.mark.parametrize("name", names("maetok", "sampler_*"))
@torch.no_grad()
def test_samplers_agree_with_official(name):
    t, weights, case = golden(name)
    model, calls = build_sit(weights, case["args"]), []
    model.register_forward_pre_hook(lambda _, args: calls.append((args[1][0].item(), len(args[0]))))
    for suffix, scale in (("cfg1", 1.0), ("cfg", t["cfg_scale"])):
        velocity = diffusion.guided_velocity(model, t["y"], scale, *case["interval"])
        solvers = {"euler": lambda v=velocity: diffusion.sample_ode(v, t["noise"], t["num_steps"]),
                   "heun": lambda v=velocity: diffusion.sample_ode(v, t["noise"], t["num_steps"], heun=True)}
        for path in ("linear", "cosine"):
            solvers[f"sde_{path}"] = lambda v=velocity, p=path: diffusion.sample_sde(
                v, t["noise"], t["num_steps"], p, iter(t["sde_eps"]).__next__)
        for solver, solve in solvers.items():
            calls.clear()
            close(solve(), t[f"{solver}_{suffix}"])
            close([c[0] for c in calls], t[f"{solver}_{suffix}_call_t"], 1e-6)
            assert [c[1] for c in calls] == t[f"{solver}_{suffix}_call_rows"].tolist()


@pytest.mark.parametrize("name", names("metrics", "frechet*"))
def test_frechet_distance_agrees_with_exact(name):
    t, _, _ = golden(name)
    moments = {}
    for tag in "ABCD":
        whole = fid.Moments(t["feat_A"].shape[1], torch.device("cpu"))
        for part in t[f"feat_{tag}"].split(37):
            whole.add(part)
        moments[tag] = whole.finish(cpu_run())
    for pair in ("AB", "CD", "AC"):                      # C and D have fewer samples than dimensions
        distance = fid.frechet_distance(*moments[pair[0]], *moments[pair[1]])
        assert distance == pytest.approx(t[f"fid_exact_{pair}"], rel=1e-6)
    assert fid.frechet_distance(*moments["A"], *moments["A"]) < 1e-6


@pytest.mark.parametrize("name", names("metrics", "resize*"))
def test_resize_agrees_with_tensorflow(name):
    t, _, _ = golden(name)
    for key in (k for k in t if k.startswith("img_")):
        size = key[4:]
        out = fid.tf_resize(t[key].permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        assert torch.equal(out[t["rows"]][:, t["cols"]], t[f"tf1_{size}"])            # not a bit apart
        close(out.double().sum((0, 1)), t[f"tf1sum_{size}"], 1e-9)


@pytest.fixture(scope="session")
def inception():
    weights = filled(public_keys("inception_fid"), 1000)
    net = fid.Inception(weights).eval()
    net.bias = weights["fc.bias"]                        # of the logits of classification, which no score uses
    return net


@pytest.mark.parametrize("name", names("metrics", "inception*"))
@torch.no_grad()
def test_inception_agrees_with_both_references(name, inception):
    t, _, case = golden(name)
    assert case["weight_seed"] == 1000
    for key in (k for k in t if k.startswith("pool_")):
        _, size, kind = key.split("_")
        inception.resize = "tf1" if kind == "tf1" else "pytorch-fid"
        pool, spatial, logits = inception(t[f"img_{size}"].permute(0, 3, 1, 2))
        for found, what in ((pool, "pool"), (spatial, "spatial"), (logits, "logits_nobias"),
                            (logits + inception.bias, "logits")):
            torch.testing.assert_close(found, t[f"{what}_{size}_{kind}"], atol=2e-4, rtol=0)
    inception.resize = "tf1"


@pytest.mark.parametrize("name", names("metrics", "e2e*"))
def test_the_whole_suite_agrees_end_to_end(name, inception):
    t, _, _ = golden(name)
    sets = [data.Images(x.numpy(), torch.zeros(len(x)), [], "") for x in (t["img_ref"], t["img_smp"])]
    ref, smp = (fid.inception_statistics(inception, images, cpu_run(), 16, keep=99) for images in sets)
    assert fid.frechet_distance(ref["mu"], ref["sigma"], smp["mu"], smp["sigma"]) == pytest.approx(t["fid"], rel=1e-5)
    sfid = fid.frechet_distance(ref["mu_s"], ref["sigma_s"], smp["mu_s"], smp["sigma_s"])
    assert sfid == pytest.approx(t["sfid"], rel=1e-5)
    assert smp["inception_score"] - 1 == pytest.approx(t["is_split5000"] - 1, rel=1e-4)
    assert fid.precision_recall(ref["features"], smp["features"]) == pytest.approx(t["precision_recall"].tolist())


@pytest.mark.parametrize("name", names("metrics", "frechet*"))
def test_inception_score_precision_and_recall_agree_with_adm(name):
    t, _, case = golden(name)
    if "is_acts" not in t:
        pytest.skip("these values are in the full goldens only; the end-to-end golden covers the definitions")
    logits = t["is_acts"] @ t["is_W"]
    for block, key in ((case["is_split_size"], "is_adm_split"), (5000, "is_adm_default")):
        score = fid.InceptionScore(len(logits), torch.device("cpu"), block, logits.shape[1])
        for part in torch.arange(len(logits)).flip(0).split(77):     # whatever order they come in
            score.add(part, logits[part])
        assert score.finish(cpu_run()) == pytest.approx(t[key], rel=1e-5)
    for tag in ("g", "nn"):
        ref, smp = (t["pr_ref"], t["pr_smp"]) if tag == "g" else (t["pr_nn_ref"], t["pr_nn_smp"])
        assert fid.precision_recall(ref, smp, tile=130) == pytest.approx(t[f"pr_{tag}_exact"].tolist())
        close(fid.radii(ref), t[f"pr_{tag}_radii_ref_fp32"], 1e-5)
        close(fid.radii(smp, tile=50), t[f"pr_{tag}_radii_smp_fp32"], 1e-5)


def test_scores_in_closed_form():
    flat, sharp = torch.zeros(50, 10), 1000 * torch.eye(10).repeat(5, 1)
    for logits, expected in ((flat, 1), (sharp, 10)):
        score = fid.InceptionScore(50, torch.device("cpu"), 5000, 10)
        score.add(torch.arange(50), logits)
        assert score.finish(cpu_run()) == pytest.approx(expected)
    x = torch.randn(60, 5)
    assert fid.precision_recall(x, x) == (1, 1) and fid.precision_recall(x, x + 100) == (0, 0)
    with pytest.raises(SystemExit, match="more than 3 images"):
        fid.precision_recall(x[:3], x)


def test_sums_do_not_depend_on_order_or_batches_by_a_bit():
    features = 3 * torch.randn(3000, 7)
    found = []
    for order, size in ((torch.arange(3000), 1000), (torch.randperm(3000), 1), (torch.randperm(3000), 333)):
        moments = fid.Moments(7, torch.device("cpu"))
        for part in features[order].split(size):
            moments.add(part)
        found.append(moments.finish(cpu_run()))
    for mean, cov in found[1:]:
        assert torch.equal(mean, found[0][0]) and torch.equal(cov, found[0][1])
    close(found[0][1], torch.cov(features.double().T), 1e-4)


def test_mixtures_count_the_modes_of_a_mixture():
    g = torch.Generator().manual_seed(0)
    modes = torch.tensor([[1.0, 1, 0], [-1, 1, 0], [1, -1, 0], [-1, -1, 1]]) * 6
    train, val = (modes[torch.randint(4, (n,), generator=g)] + torch.randn(n, 3, generator=g) for n in (2000, 1000))
    curve = fid.mixture_curve(train, val, 3, (1, 2, 4, 8))
    assert curve == fid.mixture_curve(train, val, 3, (1, 2, 4, 8))                    # a function of the seed
    gains = [curve[1] - curve[2], curve[2] - curve[4], curve[4] - curve[8]]
    assert min(gains[:2]) > 0.1 and abs(gains[2]) < 0.02
    weights, means, covariances = fid.fit_mixture(train, 4)
    assert sorted(weights.tolist()) == pytest.approx([0.25] * 4, abs=0.03)
    for mean, covariance in zip(means, covariances):
        assert (modes - mean).norm(dim=1).min() < 0.3
        torch.testing.assert_close(covariance, torch.eye(3).double(), atol=0.25, rtol=0)
    exact = torch.distributions.MultivariateNormal(means, covariances).log_prob(val.double()[:, None]) + weights.log()
    close(fid.mixture_log_prob(val.double(), weights, means, covariances), exact, 1e-9)


def test_neighbours_and_components():
    g = torch.Generator().manual_seed(0)
    y, v = torch.randint(3, (600,), generator=g), torch.randint(3, (300,), generator=g)
    z, w = (5 * torch.eye(3)[c] + torch.randn(len(c), 3, generator=g) for c in (y, v))
    assert fid.knn_accuracy(z, y, w, v, 3) > 0.95
    assert fid.knn_accuracy(z, y[torch.randperm(600, generator=g)], w, v, 3) < 0.5
    x = torch.randn(4000, 3, generator=g) * torch.tensor([3.0, 1, 0.1]) + 7
    mean, axes, share = fid.principal_components(x)
    assert mean.tolist() == pytest.approx([7] * 3, abs=0.2) and share[-1] == pytest.approx(1)
    assert share[0].item() == pytest.approx(0.9, abs=0.02) and axes[0, 0].abs() > 0.99


def test_latents_are_analysed_side_by_side(chain, tmp_path):
    at, _ = chain
    pair = f"{at / 'out/tokenizer/stage1.pt'},{at / 'out/tokenizer/ckpt.pt'}"
    said = script("tokenizer", "--analyse", pair, "--out", "out", cwd=tmp_path).stdout
    found = json.loads((tmp_path / "out/analysis.json").read_text())
    rows = list(found["rows"].values())
    assert len(rows) == 2 and "analysis.png" in said and Image.open(tmp_path / "out/analysis.png").size[0] > 300
    for key in ("linear_probe", "knn_accuracy", "mixture_nll_per_dimension", "dimensions_for_90_percent"):
        assert rows[0][key] == rows[1][key]              # stage 2 does not touch the latents
    assert len(rows[0]["mixture_nll_per_dimension"]) == 6


def test_frechet_distance_agrees_with_scipy():
    rng = np.random.default_rng(0)
    a, b = (m @ m.T + np.eye(20) for m in rng.normal(size=(2, 20, 20)))
    mean = rng.normal(size=20)
    expected = mean @ mean + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert fid.frechet_distance(mean, a, 0 * mean, b) == pytest.approx(expected, rel=1e-9)


def test_fid_command_line(tmp_path, made_weights, cache, monkeypatch):
    """A B, stats, reference statistics instead of images, a folder of PNGs, a packed set: one number."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for n in (12, 14))
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez_compressed(tmp_path / "b.npz", arr_0=b)
    (tmp_path / "folder").mkdir()
    for i, pixels in enumerate(b):
        Image.fromarray(pixels).save(tmp_path / f"folder/{i:02d}.png")
    weights = ["--weights", made_weights, "--batch-size", "5"]
    script("fid", "a.npz", "b.npz", *weights, "--out", "1.json", cwd=tmp_path)
    script("fid", "stats", "folder", *weights, "--out", "ref.npz", cwd=tmp_path, processes=2)
    script("fid", "a.npz", "ref.npz", *weights, "--out", "2.json", cwd=tmp_path, processes=2)
    with np.load(tmp_path / "ref.npz") as z:
        assert z["mu"].shape == (2048,) and z["sigma_s"].shape == (2023, 2023) and np.array_equal(z["arr_0"], b)
        np.savez(tmp_path / "only.npz", mu=z["mu"], sigma=z["sigma"])
    done = script("fid", "a.npz", "only.npz", *weights, "--out", "3.json", cwd=tmp_path)
    assert "biased upwards" in done.stdout
    rows = [json.loads((tmp_path / f"{i}.json").read_text()) for i in (1, 2, 3)]
    first = rows[0]["samples"]
    assert {"fid", "sfid", "inception_score", "precision", "recall", "resize", "n_reference"} < first.keys()
    assert first["images"] == 12 and first["n_reference_precision"] == 14 and first["n_reference"] == 14
    assert rows[0]["precision"] == "fp32"
    for row in rows[1:]:
        for key in row["samples"].keys() & {"fid", "sfid", "inception_score", "precision", "recall"}:
            assert row["samples"][key] == pytest.approx(first[key], rel=1e-3), key
    assert "sfid" not in rows[2]["samples"] and "precision" not in rows[2]["samples"]
    Image.new("RGB", (9, 9)).save(tmp_path / "folder/odd.png")
    with np.load(tmp_path / "ref.npz") as z:
        stored = dict(z)
    for name, change in (("nan", {"mu": stored["mu"] * np.nan}), ("narrow", {"mu": stored["mu"][:64]})):
        np.savez(tmp_path / f"{name}.npz", **(stored | change))
    np.savez(tmp_path / "half.npz", mu_s=stored["mu_s"], sigma_s=stored["sigma_s"])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/meta.json").write_text("[3")
    for args, message in ((["a.npz", "folder"], "images of several sizes"), (["a.npz", "nowhere"], "no such file"),
                          (["folder/odd.png", "a.npz"], "is not a file of samples"),
                          (["ref.npz", "a.npz"], "give it second, as B"), (["a.npz", "nan.npz"], "not finite"),
                          (["a.npz", "narrow.npz"], "2048 and 2048 x 2048"), (["a.npz", "half.npz"], "'mu'"),
                          (["a.npz", "foreign"], "meta.json is not that of a packed data set"),
                          (["a.npz", "only.npz", "--features", "dinov2"], "needs the images of the set B")):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["fid.py", *args, *map(str, weights)])
        with pytest.raises(SystemExit) as error:
            fid.main()
        assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    (tmp_path / "folder/odd.png").unlink()
    monkeypatch.setattr(sys, "argv", ["fid.py", "a.npz", "folder", "--features", "dinov2", "--out", "new/4.json",
                                      *map(str, weights)])
    fid.main()
    found = json.loads((tmp_path / "new/4.json").read_text())["samples"]["fd_dinov2"]
    net = fid.VisionTransformer(torch.load(made_weights / "dinov2_vitl14_pretrain.pth"), "dinov2").eval()
    with torch.no_grad():
        both = [data.to_float(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (a, b)]
        both = [torch.nn.functional.interpolate(x, (224, 224), mode="bicubic", antialias=True) for x in both]
        both = [net(net.normalise(x))[:, 0].double() for x in both]
    moments = [m for x in both for m in (x.mean(0), torch.cov(x.T))]
    assert found == pytest.approx(fid.frechet_distance(*moments), rel=1e-3)
    with pytest.raises(SystemExit, match="not finite"):
        fid.frechet_distance(torch.full([3], math.nan), torch.eye(3), torch.zeros(3), torch.eye(3))


# ---------------------------------------------------------------------------------------------------------------------
# All losses at once, with made weights


def vit_keys(width: int, depth: int, patch: int, positions: int, scale: bool) -> dict[str, tuple]:
    """Names and shapes of a DINO or DINOv2 (`scale`: with LayerScale) file of another size."""
    keys = {"cls_token": (1, 1, width), "pos_embed": (1, positions, width), "norm.weight": (width,),
            "norm.bias": (width,), "patch_embed.proj.bias": (width,),
            "patch_embed.proj.weight": (width, 3, patch, patch)}
    for i in range(depth):
        sizes = {"norm1.weight": (), "norm1.bias": (), "norm2.weight": (), "norm2.bias": (), "attn.qkv.weight": 3,
                 "attn.qkv.bias": 3, "attn.proj.weight": 1, "attn.proj.bias": 1, "mlp.fc1.weight": 4, "mlp.fc1.bias": 4}
        sizes |= {"ls1.gamma": (), "ls2.gamma": ()} if scale else {}
        for name, times in sizes.items():
            rows = (width * (times or 1),)
            keys[f"blocks.{i}.{name}"] = rows + (width,) if name.endswith("weight") and times else rows
        keys |= {f"blocks.{i}.mlp.fc2.weight": (width, 4 * width), f"blocks.{i}.mlp.fc2.bias": (width,)}
    return keys


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
    """A folder of pretrained networks under their public names and keys: random, and all but VGG16 small."""
    at = tmp_path_factory.mktemp("weights")
    torch.save(filled({k: v for k, v in public_keys("vgg16").items() if "features" in k}, 1), at / "vgg16-397923af.pth")
    torch.save(filled(public_keys("lpips_heads_v0.1_vgg"), 1), at / "lpips_vgg.pth")
    torch.save(filled(public_keys("inception_fid"), 1000), at / "pt_inception-2015-12-05-6726825d.pth")
    torch.save(filled(vit_keys(24, 12, 16, 197, False), 1), at / "dino_deitsmall16_pretrain.pth")
    for size in "sl":
        keys = vit_keys(32, 2, 14, 1370, True) | {"mask_token": (1, 32)}
        torch.save(filled(keys, 1), at / f"dinov2_vit{size}14_pretrain.pth")
    _, _, case = golden(names("metrics", "siglip*")[0])
    extra = {"logit_scale": (1,), "text_model.final_layer_norm.bias": (64,)}
    write_safetensors(at / "siglip-large-patch16-256.safetensors", filled(case["keys"] | extra, 1))
    return at


FULL = ["--size", "32", "--patch", "8", "--width", "24", "--heads", "2", "--depth", "1", "--aux-width", "16",
        "--aux-depth", "1", "--latents", "4", "--channels", "4", "--batch-size", "4", "--warmup", "2",
        "--log-every", "1", "--targets", "pixel,hog,dinov2,siglip", "--dinov2", "vits14", "--lpips", "1",
        "--lpips-warmup", "4",
        "--adversary", "dino", "--adv-start", "3", "--precision", "fp32", "--optimizer", "adamw", "--lr", "1e-4"]
LOSSES = {"recon", "lpips", "pixel", "hog", "dinov2", "siglip", "grad"}
AGAINST = {"adv", "adaptive", "hinge", "lecam", "consistency", "on_real", "on_fake", "grad_d"}


def log_of(folder) -> list[dict]:
    skipped = {"images_per_s", "data_wait", "memory_gib"}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in skipped} for line in lines]


def test_all_losses_train_resume_and_share_out(made_weights, cache, tmp_path):
    """Every term finite and logged from its step on; two processes as one; a cut run goes on bit by bit, its
    discriminator and LeCam means too.
    """
    pictures = np.random.default_rng(0).integers(0, 256, (42, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(tmp_path / f"pictures/{i}.png")
    args = [*FULL, "--weights", made_weights, "--stage2-steps", "3", "--save-every", "2", "--data",
            tmp_path / "pictures"]
    script("tokenizer", *args, "--steps", "6", "--rfid", "--out", "whole", cwd=tmp_path)
    whole = log_of(tmp_path / "whole")
    for line in whole:
        named = {"stage", "step", "images", "lr"} | (LOSSES if line["stage"] == "stage 1" else {"recon", "lpips", "grad"})
        at = line["step"] + 6 * (line["stage"] == "stage 2")
        assert line.keys() == named | (AGAINST if at >= 3 else set()), line
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
    metrics = json.loads((tmp_path / "whole/metrics.json").read_text())
    assert metrics["latents_unchanged_by_stage2"] and metrics["stage2"]["lpips"] > 0 and metrics["stage2"]["rfid"] > 0
    script("tokenizer", *args, "--steps", "6", "--out", "two", cwd=tmp_path, processes=2)
    for one, two in zip(whole, log_of(tmp_path / "two")):
        for name in one.keys() - {"stage"}:
            tolerance = 5e-3 if name in ("adaptive", "grad") else 1e-4     # of small norms
            assert two[name] == pytest.approx(one[name], rel=tolerance, abs=1e-6), (name, one, two)
    victim = script("tokenizer", *args, "--steps", "6", "--out", "cut", cwd=tmp_path, background=True)
    log = tmp_path / "cut/log.jsonl"
    wait_for(lambda: log.exists() and '"step": 5,' in log.read_text(), victim)
    victim.kill()
    victim.wait()
    assert "continuing" in script("tokenizer", *args, "--steps", "6", "--out", "cut", cwd=tmp_path).stdout
    assert log_of(tmp_path / "cut") == whole
    a, b = (flat(torch.load(tmp_path / name / "ckpt.pt", weights_only=True)) for name in ("whole", "cut"))
    assert {"image_loss.means", "image_loss.net.heads.0.0.0.weight_u"} <= a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def flat(state, prefix="") -> dict:
    """All tensors of a nested checkpoint by path."""
    if isinstance(state, torch.Tensor):
        return {prefix[1:]: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}.{key}").items()}


def full_config(made_weights, **more) -> tokenizer.Config:
    cfg = data.parse_config(tokenizer.Config, tokenizer.PRESETS, "", [*FULL, "--weights", str(made_weights)])
    return data.dataclasses.replace(cfg, adv_start=0, **more)


def test_gradients_reach_what_they_should(made_weights):
    cfg, run = full_config(made_weights), cpu_run()
    targets, loss = tokenizer.make_targets(cfg, run, None), tokenizer.make_image_loss(cfg, run)
    frozen = [loss.lpips, loss.adversary.net.trunk[0], *(t.features.__wrapped__.func.__self__ for t in targets.values()
                                                       if hasattr(t.features, "__wrapped__"))]
    assert len(frozen) == 4
    model = tokenizer.Tokenizer(cfg, {name: t.width for name, t in targets.items()})
    x, mask = torch.rand(4, 3, 32, 32) * 2 - 1, torch.arange(16).expand(4, 16) % 2 == 0

    def touched(net):
        found = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        net.zero_grad()
        return found

    def everything(net):
        return {name for name, _ in net.named_parameters()}

    out = model(x, mask)
    gradient, _ = loss(out["recon"], out["hidden"], x, 5, slice(None))
    (out["recon"] * gradient).sum().backward(retain_graph=True)
    assert touched(model) == {name for name in everything(model) if not name.startswith("aux.")}
    for name, target in targets.items():
        target.loss(out[name], target.features(x), mask).backward(retain_graph=True)
        assert touched(model) == {key for key in everything(model)
                                  if not key.startswith(("decoder.", "aux.")) or key.startswith(f"aux.{name}.")}
    assert not touched(loss.adversary.net)               # the generator's step leaves the discriminator alone
    before = {k: v.clone() for k, v in loss.adversary.net.named_parameters()}
    loss.discriminator_step(x, [out["recon"].detach()], 5, 1.0)
    assert all(not torch.equal(before[k], v) for k, v in loss.adversary.net.named_parameters())
    assert not touched(model) and not any(p.requires_grad for net in frozen for p in net.parameters())
    stage2 = model.requires_grad_(False)
    stage2.decoder.requires_grad_(True)
    out = stage2(x, mask, frozen=True)
    (out["recon"] * loss(out["recon"], out["hidden"], x, 5, slice(None))[0]).sum().backward()
    assert touched(stage2) == {name for name in everything(stage2) if name.startswith("decoder.")}


def test_the_image_gradient_is_that_of_the_sum(made_weights):
    """Meeting in the image is an arrangement of Eq. 6, not another loss; the adaptive weight is the last layer's."""
    cfg, run = full_config(made_weights, diffaug=False), cpu_run()
    loss = tokenizer.make_image_loss(cfg, run)
    loss.adversary.net.eval()                            # spectral norm and batch norm stand still
    model, x = tokenizer.Tokenizer(cfg), torch.rand(4, 3, 32, 32) * 2 - 1
    out, last = model(x, torch.zeros(4, 16, dtype=torch.bool)), model.decoder.head.weight
    gradient, terms = loss(out["recon"], out["hidden"], x, 5, slice(None))
    nll = torch.nn.functional.mse_loss(out["recon"], x) + loss.lpips(out["recon"], x).mean()
    adv = loss.adversary.generator_loss(out["recon"], 5, slice(None))
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll, adv)]
    close(terms["adaptive"], norms[0] / (norms[1] + 1e-4))
    (whole,) = torch.autograd.grad(nll + 0.4 * terms["adaptive"] * adv, last)
    assert terms["adaptive"] > 0 and whole.abs().max() > 0
    (ours,) = torch.autograd.grad((model(x, torch.zeros(4, 16, dtype=torch.bool))["recon"] * gradient).sum(), last)
    close(ours, whole)


def test_patch_discriminator_has_the_known_size():
    net = tokenizer.PatchDiscriminator()
    convs = ((3, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))     # a bias, or weight and bias of a norm
    assert sum(p.numel() for p in net.parameters()) == sum(16 * i * o + b * o for i, o, b in convs) + 16 * 512 + 1
    assert net(torch.zeros(1, 3, 256, 256))[0].shape == (1, 900) and net(torch.zeros(2, 3, 32, 32))[0].shape == (2, 4)


def test_augmentation_draws_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    draws = [tokenizer.draw_augmentation(rng, 64, 32, 0.2, 0.5) for _ in range(200)]
    for name, low, high in (("color", 0, 1), ("shift", -4, 4), ("cutout", 0, 32)):
        found = [d[name] for d in draws if name in d]
        assert 70 < len(found) < 130 and found[0].shape == (3 if name == "color" else 2, 64)
        values = torch.stack(found)
        if name == "color":
            assert 0 <= values.min() < 0.01 and 0.99 < values.max() < 1
        else:
            assert (values.min(), values.max()) == (low, high)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(tokenizer.augment(x, {}, 0.2), x)
    assert len(tokenizer.draw_augmentation(rng, 2, 32, 0.5, 1)) == 3


@pytest.mark.parametrize("args", [["--latents", "0"], ["--latents", "0", "--decoder", "modulated"], ["--kl", "1e-4"],
                                  ["--aux-depth", "0"], ["--positions", "table", "--dec-class-token"],
                                  ["--adversary", "patchgan", "--adv-norm", "groups", "--size", "32", "--patch", "8"],
                                  ["--preset", "mae_teacher", "--drop-masked"]],
                         ids=" ".join)
def test_the_baselines_train(cache, tmp_path, monkeypatch, args):
    """Two steps of each stage in this process, and what they save loads again. A teacher of 20 steps will do."""
    monkeypatch.setattr(tokenizer, "keep_classifier",
                        lambda images, run, seed: (fid.train_classifier(images, run, seed, 20), {}))
    cfg = data.parse_config(tokenizer.Config, tokenizer.PRESETS, "", [
        *TINY, "--steps", "2", "--stage2-steps", "2", *args, "--out", str(tmp_path / "out")])
    run = data.start(cfg)
    images = data.load_images("shapes", cfg.size, "train")
    targets, loss = tokenizer.make_targets(cfg, run, images), tokenizer.make_image_loss(cfg, run)
    run.claim(cfg.out)
    stage1 = tokenizer.train_stage1(cfg, run, images, targets, loss, None)
    stage2 = tokenizer.train_stage2(cfg, run, images, stage1, loss, None)
    lines = log_of(tmp_path / "out")
    assert len(lines) == 4 and (not cfg.kl or lines[0]["kl"] > 0)
    x = data.to_float(images[np.arange(2)])
    z = stage2.encode(x)
    assert z.shape == (2, *cfg.tokens()[1:], cfg.channels) and torch.equal(z, stage1.encode(x))
    assert stage2.decode(z).shape == x.shape
    loaded, _ = tokenizer.load_tokenizer(tmp_path / "out/ckpt.pt", torch.device("cpu"))
    assert torch.equal(loaded.encode(x), z)


def test_a_last_layer_makes_what_is_read_and_nothing_else(monkeypatch):
    """Outputs and gradients are those of a last layer that makes all tokens, of which some are then taken (as a
    modulated one does anyway); and every parameter has a gradient, without which DDP would wait for ever.
    """
    whole, mask = tokenizer.Block.forward, torch.arange(32).view(2, 16) % 16 < 7

    def outputs_and_gradients(model, x, drop):
        out = model(x, mask, drop)
        loss = out["recon"].square().mean() + out["hog"].square().mean()
        return [out["recon"], out["hog"], *torch.autograd.grad(loss, list(model.parameters()))]

    for drop, more in ((0, {}), (0, {"latents": 0}), (0, {"positions": "table", "depth": 1, "aux_depth": 1}),
                       (0, {"decoder": "modulated", "dec_class_token": True}), (7, {}),
                       (0, {"latents": 0, "decoder": "modulated", "dec_class_token": True})):
        cfg = tokenizer.Config(size=16, patch=4, width=48, **more)
        model, x = tokenizer.Tokenizer(cfg, {"hog": 108}), torch.rand(2, 3, 16, 16)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)            # the modulation starts at zero
        ours = outputs_and_gradients(model, x, drop)
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer.Block, "forward", lambda self, x, rope=None, z=None, wanted=slice(None):
                          whole(self, x, rope, z)[:, wanted])
            theirs = outputs_and_gradients(model, x, drop)
        for a, b in zip(ours, theirs):
            close(a, b, 1e-4)


def test_flops_are_those_that_a_counter_counts():
    counter = torch.utils.flop_counter.FlopCounterMode
    for more in ({}, {"latents": 0, "kl": 1.0}, {"decoder": "modulated", "dec_class_token": True, "aux_depth": 0},
                 {"dec_width": 64, "dec_depth": 2, "dec_heads": 2}):
        cfg = tokenizer.Config(**more)
        widths = {"hog": 108, "dinov2": 384}
        model, x = tokenizer.Tokenizer(cfg, widths), torch.zeros(1, 3, 32, 32)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):       # which the counter can see
            with counter(display=False) as count:
                model(x)
            with counter(display=False) as alone:
                model.decode(model.encode(x))
            with counter(display=False) as dropped:
                model.encode(x, torch.arange(16)[None] < 7, 7 if cfg.latents else 0)
        *own, aux = tokenizer.forward_flops(cfg, widths)
        assert count.get_total_flops() == sum(own) + aux and alone.get_total_flops() == sum(own)
        assert dropped.get_total_flops() == tokenizer.forward_flops(cfg, widths, 7 if cfg.latents else 0)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms


def test_patchify_inverts_and_orders():
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    p = tokenizer.patchify(x, 4)
    assert p.shape == (2, 4, 48)
    torch.testing.assert_close(tokenizer.unpatchify(p, 4), x)
    assert p[0, 1, 3 * (2 * 4 + 1) + 2] == x[0, 2, 2, 4 + 1]       # patch 1 is right of patch 0; row, column, channel


def test_mask_hides_what_it_should():
    g = torch.Generator().manual_seed(0)
    mask = tokenizer.random_mask(64, 16, 0.45, g)
    assert (mask.sum(1) == math.ceil(16 * 0.45)).all()
    assert mask.float().mean(0).std() < 0.15             # every place is as likely
    ratios = [tokenizer.draw_mask_ratio(0.4, 0.6, 0, step) for step in range(4000)]
    assert 0.4 <= min(ratios) and max(ratios) <= 0.6
    assert np.quantile(ratios, [0.25, 0.5, 0.75]) == pytest.approx([0.457, 0.508, 0.555], abs=0.006)


def test_hidden_pixels_do_not_reach_the_latents():
    model = tokenizer.Tokenizer(tokenizer.Config()).eval()
    x, mask = torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :9] = True
    other = tokenizer.unpatchify(torch.where(mask[..., None], torch.randn(2, 16, 192), tokenizer.patchify(x, 8)), 8)
    torch.testing.assert_close(model.encode(x, mask), model.encode(other, mask))
    assert not torch.allclose(model.encode(x), model.encode(other))


def test_masked_loss_counts_hidden_patches_only():
    prediction, target, mask = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), torch.tensor([[True, False, True, False]])
    target[0, 1] = 100
    target[0, 2] = 3
    assert tokenizer.masked_mse(prediction, target, mask) == 4.5


def test_gaussian_data_is_solved_with_the_right_order():
    """For data N(m, s^2) the velocity is known, and the flow map takes noise e to m + s e."""
    m, s = 0.7, 0.4

    def velocity(x, t, gate=None):
        variance = (1 - t) ** 2 * s**2 + t**2
        return (t - (1 - t) * s**2) / variance * (x - (1 - t) * m) - m

    noise = torch.randn(4000, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = m + s * noise

    def error(steps, heun):
        return (diffusion.sample_ode(velocity, noise, steps, heun) - exact).abs().mean()

    assert error(40, False) / error(80, False) == pytest.approx(2, abs=0.15)
    assert error(40, True) / error(80, True) == pytest.approx(4, abs=0.8)
    g = torch.Generator().manual_seed(1)
    x = diffusion.sample_sde(velocity, noise, 400, "linear",
                             lambda: torch.randn(noise.shape, dtype=torch.float64, generator=g))
    assert x.mean().item() == pytest.approx(m, abs=0.03)
    assert x.std().item() == pytest.approx(s, abs=0.03)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_samplers_reach_the_mean_and_covariance_of_a_gaussian(path):
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)

    def velocity(x, t, gate=None):
        alpha, sigma, d_alpha, d_sigma = (float(c) for c in diffusion.interpolant(t, path))
        total = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        offset = (x - alpha * mean) @ torch.linalg.inv(total)
        return d_alpha * (mean + alpha * offset @ covariance) + d_sigma * sigma * offset

    g = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 1, 2, dtype=torch.float64, generator=g)
    for x in (diffusion.sample_ode(velocity, noise, 50, heun=True),
              diffusion.sample_sde(velocity, noise, 300, path, lambda: torch.randn(noise.shape, generator=g))):
        assert x.mean((0, 1)).numpy() == pytest.approx(mean.numpy(), abs=0.02)
        assert torch.cov(x.flatten(1).T).numpy() == pytest.approx(covariance.numpy(), abs=0.03)


def test_autoguidance_moves_away_from_the_guide():
    model, guide = (shaken(diffusion.SiT(4, 3, 5, 16, 1, 2), seed) for seed in (0, 1))
    x, y = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([1, 4])
    good, bad = (diffusion.guided_velocity(m, y)(x, 0.5) for m in (model, guide))
    for settings, expected in (((3.0,), bad + 3 * (good - bad)), ((1.0,), good), ((3.0, 0.6, 1.0), good)):
        close(diffusion.guided_velocity(model, y, *settings, guide=guide)(x, 0.5), expected, 1e-5)
    close(diffusion.guided_velocity(model, y, 3.0, guide=model)(x, 0.5), good, 1e-5)


def shaken(model, seed=0):
    """A network whose parameters are all random, also those that start at zero."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=g)
    return model


def test_lightning_is_sit_with_other_parts():
    torch.manual_seed(0)
    sit, lightning = (diffusion.SiT(6, 3, 5, 24, 2, 2, style=style) for style in ("sit", "lightning"))
    assert not hasattr(lightning, "pos_embed") and isinstance(lightning.blocks[0].attn.q_norm, torch.nn.RMSNorm)
    assert isinstance(lightning.blocks[1].mlp, diffusion.SwiGlu) and isinstance(sit.blocks[1].mlp, tokenizer.Mlp)
    x, t, y = torch.randn(2, 6, 3), torch.rand(2), torch.tensor([0, 5])
    out = shaken(lightning)(x, t, y)
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    assert (lightning(x[:, order], t, y) - out[:, order]).abs().max() > 2e-5           # it knows the places
    lightning.cos.fill_(1)
    lightning.sin.fill_(0)
    torch.testing.assert_close(lightning(x[:, order], t, y), lightning(x, t, y)[:, order])       # by RoPE alone
    v = torch.randn(2, 6, 3)
    loss = diffusion.velocity_loss(lambda *_: 2 * v, v * 0, v, t, y, "linear", 1.0)                # parallel: no cosine
    close(loss, v.square().mean((1, 2)), 1e-5)
    loss = diffusion.velocity_loss(lambda *_: -v, v * 0, v, t, y, "linear", 0.5)
    close(loss, 4 * v.square().mean((1, 2)) + 1, 1e-5)
    assert diffusion.PRESETS["lightning-xl"]["beta2"] == 0.95 and "style" not in diffusion.PRESETS["sit-xl"]


@pytest.mark.parametrize("style", ["sit", "lightning"])
def test_flops_of_the_generator_are_those_that_a_counter_counts(style):
    model = diffusion.SiT(16, 4, 10, 48, 3, 2, style=style)
    counter, visible = torch.utils.flop_counter.FlopCounterMode(display=False), torch.nn.attention.SDPBackend.MATH
    with torch.nn.attention.sdpa_kernel(visible), counter as count:
        model(torch.randn(1, 16, 4), torch.rand(1), torch.zeros(1, dtype=torch.long))
    assert count.get_total_flops() == diffusion.forward_flops(16, 4, 48, 3, style)


def test_normalising_latents_and_back_changes_nothing():
    class Identity:
        def decode(self, x):
            return x

    mean, std, z = torch.randn(4), torch.rand(4) + 0.1, torch.randn(5, 3, 4)
    close(diffusion.latent_decoder(Identity(), mean, std)((z - mean) / std), z, 1e-6)


def test_guidance_and_its_interval():
    model = diffusion.SiT(4, 3, 5, 16, 1, 2)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    torch.nn.init.normal_(model.y_embedder.embedding_table.weight)
    torch.nn.init.normal_(model.blocks[0].adaLN_modulation[1].weight)
    x, y = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([1, 4])
    with_class = diffusion.guided_velocity(model, y)(x, 0.5)
    without = diffusion.guided_velocity(model, torch.tensor([5, 5]))(x, 0.5)
    for settings, expected in (((1.0,), with_class), ((3.0,), without + 3 * (with_class - without)),
                               ((3.0, 0.0, 0.4), with_class)):
        close(diffusion.guided_velocity(model, y, *settings)(x, 0.5), expected, 1e-5)
    assert not torch.allclose(diffusion.guided_velocity(model, y, 3.0, 0.5, 0.5)(x, 0.5), with_class)


def test_frechet_closed_forms():
    eye, zero = torch.eye(6), torch.zeros(6)
    assert fid.frechet_distance(zero, eye, zero + 2, eye) == pytest.approx(24)
    assert fid.frechet_distance(zero, 4 * eye, zero, 9 * eye) == pytest.approx(6 * (2 - 3) ** 2)


def test_psnr_and_ssim():
    a = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    b = (a.int() + 10).clamp(max=255).to(torch.uint8)
    apart = fid.psnr(torch.zeros_like(a), torch.full_like(a, 16))
    assert apart == pytest.approx([10 * math.log10(255**2 / 256)] * 3)
    assert fid.ssim(a, a) == pytest.approx([1.0] * 3)
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    for x, y, p, s in zip(a, b, fid.psnr(a, b), fid.ssim(a, b)):
        x, y = x.numpy(), y.numpy()
        assert p == pytest.approx(metrics.peak_signal_noise_ratio(x, y), rel=1e-9)
        theirs = metrics.structural_similarity(x, y, channel_axis=0, gaussian_weights=True, sigma=1.5,
                                               use_sample_covariance=False, data_range=255)
        assert s == pytest.approx(theirs, abs=1e-6)


def test_learning_rate_schedules():
    for schedule, end in (("constant", 1.0), ("cosine", 0.1), ("linear", 0.1)):
        rates = [data.learning_rate(step, 100, 10, schedule) for step in range(101)]
        assert rates[:10] == pytest.approx(np.arange(1, 11) / 10) and rates[100] == pytest.approx(end)
        assert all(np.diff(rates[10:]) <= 0)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_shapes_are_a_pure_function_and_not_trivial(cache):
    x, y = data.render_shapes(np.arange(40), 32)
    again, _ = data.render_shapes(np.array([17, 3]), 32)
    assert torch.equal(again, x[[17, 3]]) and x.dtype == torch.uint8
    assert not torch.equal(data.render_shapes(np.arange(4), 32, seed=1)[0], x[:4])
    train, val = (data.load_images("shapes", 32, split) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (20_000, 2_000, list(data.SHAPES))
    assert torch.equal(train[np.arange(40)], x) and torch.equal(train.labels[:40], y)
    assert torch.bincount(val.labels).tolist() == [200] * 10
    pixels = [data.to_float(s[np.arange(n)]).flatten(1) for s, n in ((train, 8000), (val, 2000))]
    accuracy = fid.linear_probe(pixels[0], train.labels[:8000], pixels[1], val.labels, 10, iterations=20)
    assert 0.15 < accuracy < 0.45


def picture(mode: str, size=(40, 30)) -> Image.Image:
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
    if mode == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    if mode == "RGBA":
        image = Image.fromarray(ramp.astype(np.uint8)).convert("RGBA")
        image.putalpha(0)
        return image
    return Image.fromarray(ramp.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "jpg"), ("L", "JPEG"), ("CMYK", "jpg"), ("RGB", "png"), ("RGBA", "PNG"), ("P", "png"), ("P", "gif"),
    ("LA", "png"), ("1", "png"), ("I;16", "png"), ("I;16", "tiff"), ("CMYK", "tif"), ("RGB", "bmp"), ("RGB", "webp")])
def test_every_kind_of_image(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    picture(mode).save(path)
    x = data.read_image(path, 16)
    assert x.shape == (16, 16, 3) and x.dtype == np.uint8
    if mode == "RGBA":
        assert (x == 255).all()                          # transparent on white
    else:
        assert x[0].mean() < 60 and x[-1].mean() > 190   # the ramp, at 8 bits


def test_center_crop_follows_adm():
    image = Image.fromarray((np.indices((100, 300)).sum(0) % 256).astype(np.uint8)).convert("RGB")
    x = data.center_crop(image, 32)
    assert x.size == (32, 32)
    by_hand = image.resize((150, 50), Image.Resampling.BOX).resize((96, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(x), np.asarray(by_hand.crop((32, 0, 64, 32))))


def make_folder(root: Path, n=30, classes=("cat", "dog"), size=20):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(np.full((size, size, 3), (8 * i, 100 * k, 40), np.uint8)).save(root / name / f"{i}.png")
    return root


def test_folder_is_packed_split_and_reread(tmp_path, cache):
    root = make_folder(tmp_path / "my pictures")
    train, val = (data.load_images(str(root), 16, split) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (57, 3, ["cat", "dog"])
    assert (train[np.arange(57)][:, 1, 8, 8] == 100 * train.labels).all()
    packed = tmp_path / "packed"
    data.pack(root, 16, packed)
    again = data.load_images(str(packed), 16, "train")
    assert torch.equal(again[np.arange(57)], train[np.arange(57)]) and again.fingerprint == train.fingerprint
    Image.new("RGB", (20, 20)).save(root / "cat" / "new.png")      # a changed folder is packed anew
    data.prepare.cache_clear()                           # in the next process, that is
    assert len(data.load_images(str(root), 16, "train")) + len(data.load_images(str(root), 16, "val")) == 61
    with pytest.raises(SystemExit, match="16 px, not --size 32"):
        data.load_images(str(packed), 32, "train")


def test_flat_folder_is_one_class(tmp_path, cache):
    root = make_folder(tmp_path / "x", 5, ("flat",)) / "flat"
    assert data.load_images(str(root), 16, "train").classes == ["all"]


def test_unreadable_images_are_named_and_many_stop_the_run(tmp_path, capsys):
    root = make_folder(tmp_path / "x", 100)
    (root / "cat" / "5.png").write_bytes((root / "cat" / "5.png").read_bytes()[:40])
    data.pack(root, 16, tmp_path / "ok")
    assert "'cat/5.png'" in capsys.readouterr().out
    sizes = [len(data.load_images(str(tmp_path / "ok"), 16, split)) for split in ("train", "val")]
    assert sum(sizes) == 199
    for i in range(10, 15):
        (root / "dog" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="6 of 200 images are unreadable"):
        data.pack(root, 16, tmp_path / "bad")
    assert not (tmp_path / "bad" / "meta.json").exists()


def test_packing_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    root, work, seen = make_folder(tmp_path / "x", 300), data.pack_rows, []

    def cut(job):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(job[0])
        return work(job)

    monkeypatch.setattr(data, "pack_rows", cut)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        data.pack(root, 8, tmp_path / "out")
    monkeypatch.setattr(data, "pack_rows", lambda job: seen.append(job[0]) or work(job))
    data.pack(root, 8, tmp_path / "out")
    assert sorted(seen) == sorted(set(seen)) and len(seen) == 4     # nothing was done twice
    data.pack(root, 8, tmp_path / "whole")
    assert (tmp_path / "out/train.npy").read_bytes() == (tmp_path / "whole/train.npy").read_bytes()


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/served; the first answer for a name in `broken` stops half way."""
    (tmp_path / "served").mkdir()

    broken = set()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def do_GET(self):
            name = self.path.lstrip("/")
            if name in broken:
                broken.discard(name)
                content = (tmp_path / "served" / name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
            else:
                super().do_GET()

        def log_message(self, *args):
            """Keep the test's output clean."""

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield tmp_path / "served", f"http://127.0.0.1:{httpd.server_port}/", broken
    httpd.shutdown()


def add_to_tar(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def sha256(path):
    return data.hashlib.sha256(path.read_bytes()).hexdigest()


def test_cifar10_is_downloaded_checked_and_read(server, tmp_path, monkeypatch):
    served, url, broken = server
    monkeypatch.setenv("MAETOK_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (60, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(60) % 10
    with tarfile.open(served / "made.tar.gz", "w:gz") as tar:
        for i in range(6):
            name = f"data_batch_{i + 1}.bin" if i < 5 else "test_batch.bin"
            add_to_tar(tar, f"cifar-10-batches-bin/{name}", rows[10 * i:10 * i + 10].tobytes())
        add_to_tar(tar, "cifar-10-batches-bin/batches.meta.txt", "\n".join("abcdefghij").encode())
    monkeypatch.setattr(data, "CIFAR10", (url + "made.tar.gz", "0" * 64))
    with pytest.raises(SystemExit, match="invalid hash"):
        data.load_images("cifar10", 32, "train")
    assert not list((tmp_path / "cache").glob("made*"))
    monkeypatch.setattr(data, "CIFAR10", (url + "made.tar.gz", sha256(served / "made.tar.gz")))
    broken.add("made.tar.gz")
    with pytest.raises(SystemExit, match="cannot get made.tar.gz"):
        data.load_images("cifar10", 32, "train")          # the half that came is not used,
    train = data.load_images("cifar10", 32, "train")      # and the next call starts over
    assert len(train) == 50 and train.classes == list("abcdefghij")
    assert np.array_equal(train[np.arange(50)].flatten(1).numpy(), rows[:50, 1:])
    assert len(data.load_images("cifar10", 32, "val")) == 10


def test_pretrained_weights_are_found_fetched_checked_or_asked_for(server, tmp_path, monkeypatch):
    served, url, broken = server
    weights, folder = {"a": torch.arange(5000.0)}, tmp_path / "w"
    torch.save(weights, served / "net.pth")
    known = {"with hash": (url + "net.pth", sha256(served / "net.pth")[:8]), "without": (url + "net.pth", ""),
             "wrong": (url + "net.pth", "0" * 8), "gone": ("http://127.0.0.1:9/gone.pth", "")}
    monkeypatch.setattr(data, "WEIGHTS", known)
    for name, message in (("wrong", "invalid hash"), ("gone", "refused")):
        with pytest.raises(SystemExit) as error:
            data.pretrained(name, str(folder), "--lpips 0")
        said = str(error.value)
        assert message in said and known[name][0] in said and str(folder / f"{name}.pth") in said
        assert "--weights" in said and said.endswith("do without: --lpips 0") and len(said.splitlines()) == 1
    broken.add("net.pth")
    with pytest.raises(SystemExit, match="of .* bytes came"):
        data.pretrained("without", str(folder), "")      # no hash is known, but half a file is not taken
    assert not [p for p in folder.iterdir() if p.suffix != ".lock"]
    for name in ("without", "with hash"):
        assert torch.equal(data.pretrained(name, str(folder), "")["a"], weights["a"])
    (served / "net.pth").unlink()
    assert torch.equal(data.pretrained("without", str(folder), "")["a"], weights["a"])     # not fetched again
    (folder / "gone.pth").write_bytes(b"half")
    with pytest.raises(SystemExit, match="gone.pth is not a whole file of weights"):
        data.pretrained("gone", str(folder), "")
    write_safetensors(folder / "wrong.safetensors", weights)
    assert torch.equal(data.pretrained("wrong", str(folder), "")["a"], weights["a"])
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(SystemExit, match="--weights .*file"):
        data.pretrained("without", str(blocker / "below"), "")


def test_safetensors_are_read_and_refused(tmp_path):
    path = tmp_path / "x.safetensors"

    def write(header, body=b"", length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)

    def entry(dtype, shape, start, stop):
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}

    body = np.arange(24, dtype=np.uint8).tobytes()
    kinds = [("F32", np.float32), ("F64", np.float64), ("I64", np.int64), ("U8", np.uint8), ("F16", np.float16)]
    for pad in range(4):                                 # tensors at odd addresses, too
        for dtype, kind in kinds:
            write(json.dumps({"__metadata__": {}, "a": entry(dtype, [24 // kind().itemsize], 0, 24)}).encode()
                  + b" " * pad, body)
            assert np.array_equal(data.read_safetensors(path)["a"].numpy(), np.frombuffer(body, kind), equal_nan=True)
    write({"a": entry("BF16", [2, 3], 4, 16), "s": entry("F32", [], 0, 4), "e": entry("F32", [0, 7], 4, 4)}, body)
    found = data.read_safetensors(path)
    assert found["a"].dtype == torch.bfloat16 and found["a"].shape == (2, 3)
    assert found["s"].shape == () and found["e"].shape == (0, 7)
    whole = {"a": entry("F32", [3], 0, 12), "b": entry("F32", [3], 12, 24)}
    for name, (header, length) in {
            "overlap": ({**whole, "b": entry("F32", [3], 8, 20)}, None),
            "outside": ({**whole, "b": entry("F32", [4], 12, 28)}, None),
            "size": ({"a": entry("F32", [4], 0, 12)}, None), "negative": ({"a": entry("F32", [-1], 12, 8)}, None),
            "two negatives": ({"a": entry("F32", [-1, -3], 0, 12)}, None),
            "float": ({"a": entry("F32", [3.0], 0, 12)}, None),
            "dtype": ({"a": entry("F33", [3], 0, 12)}, None), "bool": ({"a": entry("U8", [True], 0, 1)}, None),
            "huge header": (whole, 2**62), "long header": (whole, 10**6), "no json": (b"{", None), "list": ([1], None),
            "no entry": ({"a": 3}, None), "twice": (json.dumps(whole).replace('"b"', '"a"').encode(), None),
            "overflow": ({"a": entry("F32", [2**62, 4], 0, 12)}, None),
            "empty and huge": ({"a": entry("F32", [2**40, 2**40, 0], 0, 0)}, None),
            "beyond int64": ({"a": entry("F32", [2**63, 0], 0, 0)}, None),
            "rank": ({"a": entry("F32", [1] * 9, 0, 4)}, None), "utf8": (b"\xff\xfe", None)}.items():
        write(header, body, length)
        with pytest.raises(SystemExit, match="is not a whole safetensors file") as error:
            data.read_safetensors(path)
        assert len(str(error.value).splitlines()) == 1, name
    path.write_bytes(b"abc")
    with pytest.raises(SystemExit, match="is not a whole safetensors file"):
        data.read_safetensors(path)


def test_archive_members_outside_the_target_are_refused(tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        add_to_tar(tar, "../../outside.txt", b"x")
    with pytest.raises(SystemExit, match="cannot be unpacked"):
        data.extract(tmp_path / "evil.tar", tmp_path / "a" / "b")
    assert not (tmp_path / "a" / "b").exists() and not (tmp_path / "outside.txt").exists()


def test_batches_cover_each_epoch_and_are_disjoint_across_ranks():
    seen = np.concatenate([data.batch_indices(103, 10, 7, step) for step in range(31)])
    for epoch in range(3):
        assert sorted(seen[103 * epoch:103 * (epoch + 1)]) == list(range(103))
    assert not np.array_equal(seen[:103], seen[103:206])
    rows = [list(range(52))[data.Run(r, 4, torch.device("cpu"), "fp32").rows(52)] for r in range(4)]
    assert [i for part in rows for i in part] == list(range(52))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    images = data.Images(pixels, torch.arange(9), ["a"], "")
    whole, _ = data.Batches(images, 8, 0, cpu_run())(3)
    halves = [data.Batches(images, 8, 0, data.Run(r, 2, torch.device("cpu"), "fp32"))(3)[0] for r in range(2)]
    assert torch.equal(whole, torch.cat(halves))


# ---------------------------------------------------------------------------------------------------------------------
# The scripts, end to end


TINY = ["--size", "16", "--patch", "4", "--width", "24", "--heads", "2", "--depth", "1", "--aux-width", "16",
        "--aux-depth", "1", "--latents", "4", "--channels", "4", "--batch-size", "16", "--warmup", "2",
        "--log-every", "1"]
TINY_SIT = ["--width", "24", "--heads", "2", "--depth", "1", "--batch-size", "16", "--log-every", "1",
            "--sampling-steps", "2"]


@pytest.fixture(autouse=True)
def signals():
    """main() called in this process must not keep pytest from being stopped."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One cache of rendered images and classifiers for all tests: the user's own if it is set, else a temporary one,
    which the processes of -n share.
    """
    at = tmp_path_factory.getbasetemp()
    at = at.parent if "PYTEST_XDIST_WORKER" in os.environ else at
    path = os.environ.setdefault("MAETOK_CACHE", str(at / "cache"))
    return Path(path)


def script(name, *args, cwd, processes=1, check=True, background=False, restarts=0, before=None):
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                                          f"--max-restarts={restarts}", "--master_port",
                                          str(20_000 + os.getpid() % 20_000)]
    command = [sys.executable, *launcher, str(HERE / f"{name}.py"), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if background:
        with open(Path(cwd) / "said.txt", "w") as said:
            return subprocess.Popen(command, cwd=cwd, env=env, stdout=said, stderr=said)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=400, check=False,
                          preexec_fn=before)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def losses(folder) -> list[float]:
    return [json.loads(line)[key] for line in (folder / "log.jsonl").read_text().splitlines()
            for key in ("recon", "hog", "loss") if key in json.loads(line)]


@pytest.fixture(scope="session")
def chain(tmp_path_factory, cache):
    """A folder where the four commands of the README ran once, tiny."""
    at = tmp_path_factory.mktemp("chain")
    said = {"tokenizer": script("tokenizer", *TINY, "--steps", "12", "--stage2-steps", "8", cwd=at).stdout,
            "diffusion": script("diffusion", *TINY_SIT, "--steps", "10", "--samples", "40", cwd=at).stdout,
            "sample": script("sample", "--n", "30", "--steps", "3", "--batch-size", "8", cwd=at).stdout,
            "fid": script("fid", cwd=at).stdout}
    return at, said


def test_the_four_scripts_run_and_write_what_they_say(chain):
    at, said = chain
    metrics = json.loads((at / "out/tokenizer/metrics.json").read_text())
    assert metrics["latents_unchanged_by_stage2"] is True
    assert {"psnr", "ssim"} <= metrics["stage2"].keys() and 0 <= metrics["linear_probe"] <= 1
    for picture_file in ("tokenizer/recon.png", "diffusion/samples.png", "samples/grid.png"):
        assert Image.open(at / "out" / picture_file).size[0] > 100
    rows = json.loads((at / "out/diffusion/metrics.json").read_text())["rows"]
    assert rows["real validation images"]["class_accuracy"] > 0.9
    assert rows["decoded noise"]["fd_classifier"] > rows["real validation images"]["fd_classifier"]
    assert 0 < rows["samples"]["fd_to_reconstructions"] != rows["samples"]["fd_classifier"]
    with np.load(at / "out/samples/samples.npz") as z:
        assert z["arr_0"].shape == (30, 16, 16, 3) and z["arr_0"].dtype == np.uint8
        assert z["labels"].tolist() == [i % 10 for i in range(30)] and z["classes"].tolist() == list(data.SHAPES)
    scores = json.loads((at / "out/samples/metrics.json").read_text())
    assert scores["samples"]["images"] == 30 and scores["sampling"]["sampler"] == "heun"
    assert "fid" not in scores["samples"]
    assert "fd_classifier" in said["fid"] and "PSNR" in said["tokenizer"]
    loaded = torch.load(at / "out/diffusion/ckpt.pt", weights_only=True)
    assert loaded["std"] and loaded["classes"] == list(data.SHAPES)
    assert not (at / "out/samples/parts").exists()


def test_latents_are_normalised_and_the_cache_knows_its_owner(chain):
    at, _ = chain
    folder = at / "out/diffusion/latents"
    meta, z = json.loads((folder / "meta.json").read_text()), np.load(folder / "latents.npy").astype(np.float64)
    assert z.shape == (20_000, 2, 4, 4)
    x = (z - meta["mean"]) / meta["std"]
    assert x.mean((0, 1, 2)) == pytest.approx(0, abs=1e-6) and x.std((0, 1, 2)) == pytest.approx(1, abs=1e-6)
    model, _ = tokenizer.load_tokenizer(at / "out/tokenizer/ckpt.pt", torch.device("cpu"))
    images = data.load_images("shapes", 16, "train")
    mirrored = model.encode(data.to_float(images[np.arange(3)]).flip(3))
    close(z[:3, 1], mirrored, 2e-2)                      # float16, and bf16 arithmetic where the run used it
    model.to_latent.weight.data += 1
    with pytest.raises(SystemExit, match="another tokenizer"):
        diffusion.encode_data(model, images, folder, cpu_run())


def test_samples_depend_on_neither_processes_nor_batches_nor_a_kill(chain, tmp_path):
    at, _ = chain
    args = ["--model", at / "out/diffusion/ckpt.pt", "--tokenizer", at / "out/tokenizer/ckpt.pt", "--images", "120",
            "--precision", "fp32", "--sampler", "sde", "--steps", "40", "--batch-size", "4"]
    script("sample", *args, "--out", "one", cwd=tmp_path)
    script("sample", *args, "--out", "two", cwd=tmp_path, processes=2)
    victim = script("sample", *args, "--out", "cut", cwd=tmp_path, background=True)
    done = tmp_path / "cut/parts/done.npy"
    wait_for(lambda: done.exists() and done.stat().st_size > 128 and np.load(done).sum() >= 2, victim)
    victim.kill()
    victim.wait()
    kept = np.load(done).sum()
    script("sample", *args, "--out", "cut", cwd=tmp_path)
    assert 2 <= kept
    one, two, cut = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "two", "cut"))
    assert np.array_equal(one, two) and np.array_equal(one, cut)
    args[args.index("--batch-size") + 1] = "15"
    script("sample", *args, "--out", "batch", cwd=tmp_path)
    assert np.abs(np.load(tmp_path / "batch/samples.npz")["arr_0"].astype(int) - one).max() <= 1


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)


def test_two_processes_train_as_one(chain, tmp_path):
    """In fp32 with AdamW: bf16, in which Muon always works, rounds the two halves of a gradient differently."""
    at, _ = chain
    train = [*TINY, "--steps", "20", "--stage2-steps", "20", "--precision", "fp32", "--optimizer", "adamw"]
    script("tokenizer", *train, "--out", "one", cwd=tmp_path)
    script("tokenizer", *train, "--out", "two", cwd=tmp_path, processes=2)
    script("tokenizer", *train, "--out", "micro", "--micro-batch", "5", cwd=tmp_path)
    sit = [*TINY_SIT, "--steps", "20", "--samples", "0", "--tokenizer", at / "out/tokenizer/ckpt.pt", *train[-4:]]
    script("diffusion", *sit, "--out", "one-d", cwd=tmp_path)
    script("diffusion", *sit, "--out", "two-d", cwd=tmp_path, processes=2)
    for one, other, count in (("one", "two", 60), ("one", "micro", 60), ("one-d", "two-d", 20)):
        a, b = losses(tmp_path / one), losses(tmp_path / other)
        assert len(a) == len(b) == count
        assert np.abs(np.array(a) / np.array(b) - 1).max() < 1e-4


def test_lightning_trains_and_an_earlier_checkpoint_guides(chain, tmp_path, monkeypatch):
    at, _ = chain
    script("diffusion", *TINY_SIT, "--steps", "6", "--keep-every", "3", "--samples", "0", "--style", "lightning",
           "--cosine-loss", "1", "--tokenizer", at / "out/tokenizer/ckpt.pt", cwd=tmp_path)
    args = ["--n", "9", "--steps", "2", "--precision", "fp32"]
    for out, guide in (("plain", []), ("guided", ["--guide", "out/diffusion/step-3.pt"])):
        script("sample", *args, *guide, "--out", out, cwd=tmp_path)
    plain, guided = (np.load(tmp_path / out / "samples.npz")["arr_0"] for out in ("plain", "guided"))
    assert not np.array_equal(plain, guided)
    state = torch.load(tmp_path / "out/diffusion/step-3.pt", weights_only=True)
    data.save_checkpoint(tmp_path / "other.pt", state | {"mean": [9.0] * 4})
    data.save_checkpoint(tmp_path / "cosine.pt", state | {"config": state["config"] | {"path": "cosine"}})
    data.save_checkpoint(tmp_path / "no-null.pt", state | {"config": state["config"] | {"label_dropout": 0.0}})
    for more, message in ((["--guide", "other.pt"], "another mean"), (["--guide", "cosine.pt"], "another path"),
                          (["--model", "no-null.pt"], "has no null class")):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sample.py", *args, *more])
        with pytest.raises(SystemExit, match=message):
            sample.main()


def test_a_flat_folder_goes_through_all_scripts(cache, tmp_path):
    """One class; the plain autoencoder without masking, on two processes; the scores that need labels are left out."""
    pictures = make_folder(tmp_path / "x", 60, ("flat",)) / "flat"
    args = [*TINY, "--data", pictures, "--mask-min", "0", "--mask-max", "0", "--targets", "none"]
    script("tokenizer", *args, "--steps", "4", "--stage2-steps", "3", cwd=tmp_path, processes=2)
    script("diffusion", *TINY_SIT, "--steps", "4", "--samples", "8", cwd=tmp_path)
    script("sample", "--n", "9", "--steps", "2", cwd=tmp_path)
    assert "one class only" in script("fid", cwd=tmp_path).stdout
    with np.load(tmp_path / "out/samples/samples.npz") as z:
        assert z["arr_0"].shape == (9, 16, 16, 3) and json.loads(str(z["facts"]))["guidance"] == 1.0
    odd = script("diffusion", *TINY_SIT, "--batch-size", "15", "--out", "odd", cwd=tmp_path, processes=2, check=False)
    assert odd.returncode and "--batch-size 15 must be a multiple of the 2 processes" in odd.stderr


def weights_of(path) -> dict:
    state = torch.load(path, weights_only=True)
    return {f"{part}.{k}": v for part in ("model", "ema") for k, v in state[part].items()}


@pytest.mark.parametrize("stage", ["stage 1", "stage 2", "diffusion"])
def test_a_stopped_or_killed_run_goes_on_bit_by_bit(chain, tmp_path, stage):
    at, _ = chain
    name = "diffusion" if stage == "diffusion" else "tokenizer"
    if name == "tokenizer":
        args = [*TINY, "--steps", "150", "--stage2-steps", "150", "--save-every", "7"]
    else:
        args = [*TINY_SIT, "--steps", "150", "--save-every", "7", "--samples", "0", "--preview-every", "1000",
                "--tokenizer", at / "out/tokenizer/ckpt.pt"]
    script(name, *args, "--out", "whole", cwd=tmp_path)
    log = tmp_path / "cut/log.jsonl"
    for number, step in ((signal.SIGTERM, 10), (signal.SIGINT, 30), (signal.SIGKILL, 50)):
        victim = script(name, *args, "--out", "cut", cwd=tmp_path, background=True)
        wait_for(lambda step=step: log.exists() and f'"stage": "{stage}", "step": {step},' in log.read_text(), victim)
        victim.send_signal(number)
        assert victim.wait(30) == (-9 if number == signal.SIGKILL else 0)
        said = (tmp_path / "said.txt").read_text()
        assert said.count(f"stopped by {number.name}; all is saved") == (number != signal.SIGKILL), said
        assert "Traceback" not in said
    said = script(name, *args, "--out", "cut", cwd=tmp_path).stdout
    assert "continuing" in said
    whole, cut = weights_of(tmp_path / "whole/ckpt.pt"), weights_of(tmp_path / "cut/ckpt.pt")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    tried("SIGTERM, SIGINT and SIGKILL in a training loop: the same bits in the end", [True] * 3)


MISTAKES = [
    ("tokenizer", ["--stepz", "3"], "unrecognized arguments: --stepz"),
    ("tokenizer", ["--steps", "abc"], "argument --steps: invalid int value: 'abc'"),
    ("tokenizer", ["--step", "3"], "unrecognized arguments: --step"),
    ("tokenizer", ["--preset", "huge"], "invalid choice: 'huge'"),
    ("tokenizer", ["--size", "33"], "--size 33 must be a multiple"),
    ("tokenizer", ["--width", "50"], "width 50 must be a multiple"),
    ("tokenizer", ["--targets", "hogg"], "--targets hogg"),
    ("tokenizer", ["--targets", "hog,hog"], "--targets hog,hog"),
    ("tokenizer", ["--targets", "hog,none"], "--targets hog,none"),
    ("tokenizer", ["--adversary", "patchgan", "--size", "16"], "--adversary patchgan needs images of 32"),
    ("tokenizer", ["--adversary", "dino", "--weights", "offline"], "dino_deitsmall16_pretrain.pth from http://127"),
    ("tokenizer", ["--lpips", "1", "--weights", "offline"], "or do without: --lpips 0"),
    ("tokenizer", ["--targets", "siglip", "--weights", "offline"], "or do without: --targets hog"),
    ("tokenizer", ["--from-official", "nowhere"], "there is no nowhere"),
    ("tokenizer", ["--from-official", "empty"], "there is no empty/model.safetensors"),
    ("tokenizer", ["--from-official", "damaged/ckpt.pt"], "is not a whole file of weights"),
    ("tokenizer", ["--from-official", "other/ckpt.pt"], "encoder.model.patch_embed.proj.weight is missing"),
    ("tokenizer", ["--mask-min", "0.9"], "--mask-min"),
    ("tokenizer", ["--drop-masked", "--compile"], "--drop-masked needs --no-compile"),
    ("tokenizer", ["--drop-masked", "--latents", "0"], "--drop-masked needs latent tokens"),
    ("tokenizer", ["--batch-size", "0"], "--batch-size"),
    ("tokenizer", ["--data", "nowhere"], "/nowhere: no such folder"),
    ("tokenizer", ["--data", "empty"], "no images found"),
    ("tokenizer", ["--data", "mixed"], "lies beside class folders"),
    ("tokenizer", ["--out", "damaged"], "is not a whole checkpoint"),
    ("tokenizer", ["--out", "other", "--steps", "3"], "is a checkpoint of diffusion.py"),
    ("diffusion", ["--tokenizer", "none.pt"], "none.pt: no such checkpoint"),
    ("diffusion", ["--tokenizer", "damaged/ckpt.pt"], "is not a whole checkpoint"),
    ("diffusion", ["--width", "25"], "--width 25"),
    ("diffusion", ["--sampler", "dopri"], "invalid choice: 'dopri'"),
    ("sample", ["--from-official", "nowhere", "--tokenizer", "CHAIN/out/tokenizer/ckpt.pt"], "there is no nowhere"),
    ("sample", ["--model", "CHAIN/out/diffusion/ckpt.pt", "--guide", "none.pt", "--tokenizer",
                "CHAIN/out/tokenizer/ckpt.pt"], "none.pt: no such checkpoint"),
    ("sample", ["--n", "0"], "--n"),
    ("sample", ["--guidance", "0.5"], "--guidance 0.5 must be at least 1"),
    ("diffusion", ["--heads", "0"], "--heads 0 must be at least 1"),
    ("diffusion", ["--seed", "-1"], "--seed -1 must be at least 0"),
    ("diffusion", ["--guidance-high", "2"], "--guidance-low <= --guidance-high"),
    ("sample", ["--model", "none.pt"], "none.pt: no such checkpoint"),
    ("sample", ["--labels", "unicorn", "--model", "CHAIN/out/diffusion/ckpt.pt", "--tokenizer",
                "CHAIN/out/tokenizer/ckpt.pt"], "'unicorn' is none of the classes"),
    ("fid", ["--samples", "none.npz"], "none.npz: no such file"),
    ("fid", ["--features", "fd"], "--features fd"),
    ("fid", ["CHAIN/out/samples/samples.npz", "none.npz"], "none.npz: no such file"),
    ("fid", ["CHAIN/out/samples/samples.npz", "CHAIN/out/samples/samples.npz", "--weights", "offline"],
     "pt_inception-2015-12-05-6726825d.pth from http://127"),
    ("fid", ["stats", "shapes", "--out", "x.npz"], "give --size"),
    ("fid", ["stats", "empty", "--out", "x.npz"], "no images found"),
    ("fid", ["stats", "mixed/cat", "--out", "x.json"], "must end in .npz"),
    ("fid", ["--samples", "damaged/ckpt.pt"], "is not a file of samples"),
    ("data", ["--data", "nowhere"], "--data DIR, --out DIR"),
    ("data", ["--data", "empty", "--out", "x"], "no images found"),
]


@pytest.fixture(scope="session")
def mistakes_folder(tmp_path_factory, chain):
    at = tmp_path_factory.mktemp("mistakes")
    (at / "empty").mkdir()
    make_folder(at / "mixed", 2)
    Image.new("RGB", (9, 9)).save(at / "mixed" / "loose.png")
    (at / "damaged").mkdir()
    whole = (chain[0] / "out/tokenizer/ckpt.pt").read_bytes()
    (at / "damaged/ckpt.pt").write_bytes(whole[: len(whole) // 2])
    (at / "other").mkdir()
    (at / "other/ckpt.pt").write_bytes((chain[0] / "out/diffusion/ckpt.pt").read_bytes())
    return at


@pytest.mark.parametrize("name, args, message", MISTAKES,
                         ids=lambda v: " ".join(v) if isinstance(v, list) else str(v)[:20])
def test_a_mistake_is_one_clear_line(mistakes_folder, chain, monkeypatch, capsys, name, args, message):
    """In this process, with main() called as the script calls it: a subprocess for each would take minutes."""
    gc.collect()                                         # the lock on --out goes with the run before
    before = sorted(p for p in mistakes_folder.rglob("*") if p.is_file())
    monkeypatch.chdir(mistakes_folder)
    monkeypatch.setattr(data, "WEIGHTS", {k: ("http://127.0.0.1:9/" + url.rpartition("/")[2], sha256)
                                          for k, (url, sha256) in data.WEIGHTS.items()})
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *(a.replace("CHAIN", str(chain[0])) for a in args)])
    with pytest.raises(SystemExit) as error:
        sys.modules[name].main()
    said = capsys.readouterr().err if error.value.code == 2 else error.value.code
    assert message in said and len(said.strip().splitlines()) == 1 and said.startswith(f"{name}.py: ")
    after = sorted(p for p in mistakes_folder.rglob("*") if p.is_file() and not p.name.endswith(".lock"))
    assert [p for p in before if not p.name.endswith(".lock")] == after
    tried("malformed command lines and what they name: one line, non-zero exit, no file", [True])


def test_other_settings_do_not_continue_a_run(chain, tmp_path):
    at, _ = chain
    done = script("tokenizer", *TINY, "--steps", "12", "--stage2-steps", "8", "--lr", "1", cwd=at, check=False)
    assert done.returncode == 1 and "was made with --lr" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", STAGES)
def test_help_shows_every_setting(name):
    said = script(name, "--help", cwd=HERE).stdout
    config = data.PackConfig if name == "data" else sys.modules[name].Config
    for f in data.dataclasses.fields(config):
        assert "--" + f.name.replace("_", "-") in said and f.metadata["help"].split()[0] in said


# ---------------------------------------------------------------------------------------------------------------------
# Faults: what may happen to a run, its files and its neighbours. `pytest -m campaign test_all.py` runs the long half.

FAULTS = {}                                              # what this session tried, and what came of it


def tried(fault: str, outcomes: list[bool]) -> None:
    """Count faults that were survived (nothing lost, or refused in one clear line); kept in $MAETOK_FAULTS, a file, unless
    two processes share the tests (-n).
    """
    count = FAULTS.setdefault(fault, {"tried": 0, "survived": 0, "lost": 0})
    for survived in outcomes:
        count["tried"] += 1
        count["survived" if survived else "lost"] += 1
    if "MAETOK_FAULTS" in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        Path(os.environ["MAETOK_FAULTS"]).write_text(json.dumps(FAULTS, indent=1) + "\n")
    assert all(outcomes), f"{fault}: {FAULTS[fault]}"


def refused(call, *args) -> str:
    """What the program says on ending at this call: one line."""
    with pytest.raises(SystemExit) as error:
        call(*args)
    said = str(error.value.code)
    assert len(said.splitlines()) == 1 and len(said) < 600, said
    return said


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """Process numbers of the workers of torchrun, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if rank := re.search(rb"\0RANK=(\d+)", Path(f"/proc/{child}/environ").read_bytes()):
            found[int(rank[1])] = int(child)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_one_process_goes_on_as_two_and_torchrun_brings_back_a_dead_one(cache, tmp_path):
    args = [*TINY, "--steps", "250", "--stage2-steps", "0", "--precision", "fp32", "--optimizer", "adamw",
            "--save-every", "20"]
    script("tokenizer", *args, "--out", "one", cwd=tmp_path)
    log = tmp_path / "cut/log.jsonl"
    victim = script("tokenizer", *args, "--out", "cut", cwd=tmp_path, background=True)
    wait_for(lambda: log.exists() and '"step": 10,' in log.read_text(), victim)
    victim.terminate()
    assert victim.wait(30) == 0
    job = script("tokenizer", *args, "--out", "cut", cwd=tmp_path, background=True, processes=2, restarts=1)
    wait_for(lambda: '"step": 60,' in log.read_text(), job)
    os.kill(workers(job)[1], signal.SIGKILL)
    assert job.wait(120) == 0, (tmp_path / "said.txt").read_text()
    one, cut = losses(tmp_path / "one"), losses(tmp_path / "cut")
    assert len(one) == len(cut) == 500 and np.abs(np.array(one) / np.array(cut) - 1).max() < 1e-4
    tried("a worker killed under torchrun --max-restarts: comes back, same losses", [True])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_several_processes_end_together(chain, tmp_path, number):
    """One is killed: the others end within a minute. torchrun is told to stop: all save the same step and end well."""
    args = [*TINY_SIT, "--steps", "5000", "--samples", "0", "--tokenizer", chain[0] / "out/tokenizer/ckpt.pt"]
    job = script("diffusion", *args, "--out", "d", cwd=tmp_path, background=True, processes=2)
    log, began = tmp_path / "d/log.jsonl", time.time()
    wait_for(lambda: log.exists() and '"step": 5,' in log.read_text(), job)
    began = time.time()
    os.kill(workers(job)[1] if number == signal.SIGKILL else job.pid, number)
    assert job.wait(60) != 0                             # torchrun's own status, whatever its workers' is
    said = (tmp_path / "said.txt").read_text()
    if number == signal.SIGKILL:
        assert "lost another one" in said
    else:
        assert time.time() - began < 20 and said.count("stopped by SIGTERM; all is saved") == 1
        state = torch.load(tmp_path / "d/ckpt.pt", weights_only=True)
        assert state["step"] == json.loads(log.read_text().splitlines()[-1])["step"]
    tried(f"{number.name} to {'a worker' if number == signal.SIGKILL else 'torchrun'}: all end, nothing hangs", [True])


@pytest.mark.parametrize("name", ["tokenizer", "diffusion"])
@pytest.mark.parametrize("skip", [0, 3])
def test_numbers_that_are_not_finite_stop_the_run_or_are_skipped(chain, tmp_path, monkeypatch, name, skip):
    module = sys.modules[name]
    source = module.Batches if name == "tokenizer" else module.LatentBatches
    honest, poisoned = source.__call__, {5} if skip else {7}

    def poison(self, step):
        x, y = honest(self, step)
        return (x * float("nan") if step in poisoned else x), y

    def run(out):
        gc.collect()                                     # the lock on --out goes with the run before
        args = [*TINY, "--stage2-steps", "0"] if name == "tokenizer" else [
            *TINY_SIT, "--samples", "0", "--tokenizer", str(chain[0] / "out/tokenizer/ckpt.pt")]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args, "--steps", "12", "--save-every", "4", "--log-every",
                                          "5", "--skip-nonfinite", str(skip), "--out", str(tmp_path / out)])
        module.main()
        return torch.load(tmp_path / out / "ckpt.pt", weights_only=True)

    monkeypatch.setattr(source, "__call__", poison)
    if skip:
        state = run("a")
        assert state["step"] == 12 and all(v.isfinite().all() for v in state["model"].values())
        poisoned |= {6, 7, 8}
        assert "--skip-nonfinite 10" in refused(run, "b")
    else:
        said = refused(run, "a")
        assert f"{'recon' if name == 'tokenizer' else 'loss'} is not finite at step 8 (learning rate 0.00" in said
        assert torch.load(tmp_path / "a/ckpt.pt", weights_only=True)["step"] == 4
        poisoned.clear()                                 # mended: it goes on
        assert run("a")["step"] == 12
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    bad = [line for line in lines if "not_finite" in line]
    assert [line["step"] for line in bad] == ([6] if skip else []) and not any("NaN" in str(line) for line in lines)
    if skip:
        n = 20_000
        assert bad[0]["indices"] == data.batch_indices(n, 16, 0, 5).tolist() and bad[0]["lr"] > 0


def limit_files(megabytes: float):
    """For a subprocess: no file may grow beyond this, as on a full disk."""
    size = int(megabytes * 2**20)
    return lambda: data.resource.setrlimit(data.resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_keeps_what_is_there(chain, tmp_path):
    """A limit on the size of files stands in for the disk: writing fails as there, with another number."""
    at, outcomes = chain[0] / "out", []

    def full(name, *args, megabytes):
        done = script(name, *args, cwd=tmp_path, check=False, before=limit_files(megabytes))
        said = [line for line in done.stderr.splitlines() if line.startswith(f"{name}.py: ")]
        outcomes.append(done.returncode == 1 and len(said) == 1 and "Traceback" not in done.stderr)
        return said[0]

    train = [*TINY, "--stage2-steps", "0", "--save-every", "5", "--out", "t"]
    script("tokenizer", *train, "--steps", "10", cwd=tmp_path)
    before, size = weights_of(tmp_path / "t/ckpt.pt"), (tmp_path / "t/ckpt.pt").stat().st_size
    more = torch.load(tmp_path / "t/ckpt.pt", weights_only=True)
    more["config"]["steps"] = 30
    data.save_checkpoint(tmp_path / "t/ckpt.pt", more)
    said = full("tokenizer", *train, "--steps", "30", megabytes=0.8 * size / 2**20)
    assert "checkpoint before it is untouched" in said
    after = weights_of(tmp_path / "t/ckpt.pt")
    assert all(torch.equal(before[k], after[k]) for k in before)
    script("tokenizer", *train, "--steps", "30", cwd=tmp_path)
    assert "kept" in full("diffusion", *TINY_SIT, "--tokenizer", at / "tokenizer/ckpt.pt", "--out", "d", megabytes=0.5)
    assert "kept" in full("sample", "--model", at / "diffusion/ckpt.pt", "--tokenizer", at / "tokenizer/ckpt.pt",
                          "--images", "900", "--steps", "1", "--out", "s", megabytes=0.2)
    folder = make_folder(tmp_path / "x", 100, size=64)
    assert "kept" in full("data", "--data", folder, "--size", "64", "--out", "packed", megabytes=0.3)
    assert not (tmp_path / "packed/meta.json").exists() and not (tmp_path / "s/samples.npz").exists()
    tried("disk full: checkpoint, latents, samples, packing", outcomes)


def damaged_pictures(root: Path) -> list[Path]:
    """Files that are no whole, ordinary pictures, whatever their names say."""
    good, made = io.BytesIO(), []
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(good, "PNG")
    good = good.getvalue()
    jpeg = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(jpeg, "JPEG")
    jpeg = jpeg.getvalue()

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
        made.append(root / name)
    (root / "dangling.png").symlink_to(root / "nowhere")
    (root / "folder.png").mkdir()
    (root / "loop").symlink_to(root)
    return [*made, root / "dangling.png"]


def test_damaged_pictures_are_named_and_nothing_grows(tmp_path, capsys):
    """Each of them among good ones: named with its reason; the rest is packed."""
    peak = data.resource.getrusage(data.resource.RUSAGE_SELF).ru_maxrss
    root, outcomes = make_folder(tmp_path / "x", 3000, ("all",), 4) / "all", []
    bad = damaged_pictures(root)
    data.pack(root, 8, tmp_path / "out")
    said = capsys.readouterr().out
    outcomes = [f"unreadable: {path.name!r}: " in said for path in bad]
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert len(meta["unreadable"]) == len(bad) >= 28
    sizes = [len(data.load_images(str(tmp_path / "out"), 8, split)) for split in ("train", "val")]
    tried("damaged, empty, truncated, bomb and mislabelled pictures", outcomes)
    assert sum(sizes) == 3000 and data.resource.getrusage(data.resource.RUSAGE_SELF).ru_maxrss < peak + 600_000


def odd_pictures(root: Path) -> int:
    """Readable pictures of every odd kind; returns their number."""
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8))
    for i, mode in enumerate(("CMYK", "L", "P", "1", "LA", "RGBA", "YCbCr", "I;16", "F", "LAB", "HSV")):
        picture = Image.fromarray(rng.integers(0, 2**16, (30, 20), np.uint16)) if mode == "I;16" else rgb.convert(
            "RGBA").convert(mode) if mode not in ("F", "LAB", "HSV") else rgb.convert("F" if mode == "F" else "RGB")
        picture.save(root / f"{i}.{'tif' if mode in ('CMYK', 'F', 'YCbCr') else 'png'}")
    rgb.save(root / "animated.gif", save_all=True, append_images=[rgb.rotate(90 * i, expand=False) for i in range(3)])
    rgb.resize((1, 500)).save(root / "narrow.png")
    rgb.resize((500, 1)).save(root / "flat.png")
    rgb.resize((1, 1)).save(root / "dot.png")
    for name in ("with space", "new\nline", "\u732b", "-dash", "a" * 200, "dot.in.name", "100%"):
        rgb.save(root / f"{name}.JPG", "JPEG")
    return len([p for p in root.iterdir() if p.is_file()])


def test_odd_pictures_and_names_are_read(tmp_path):
    (tmp_path / "x/sub").mkdir(parents=True)
    n = odd_pictures(tmp_path / "x")
    (tmp_path / "x/sub/loop").symlink_to(tmp_path / "x")
    data.pack(tmp_path / "x", 16, tmp_path / "out")
    sizes = [len(data.load_images(str(tmp_path / "out"), 16, split)) for split in ("train", "val")]
    tried("odd colour models, shapes and names of pictures", [True] * sum(sizes) + [False] * (n - sum(sizes)))
    assert json.loads((tmp_path / "out/meta.json").read_text())["unreadable"] == []


def test_files_that_vanish_while_they_are_packed_are_named(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / "x", 300, ("all",))
    listing = data.list_folder

    def then_gone(folder):
        found = listing(folder)
        (root / "all/7.png").unlink()
        return found

    monkeypatch.setattr(data, "list_folder", then_gone)
    data.pack(root, 8, tmp_path / "out")
    assert "'all/7.png': [Errno 2]" in capsys.readouterr().out


def test_a_second_run_in_the_same_folder_is_refused(chain, tmp_path):
    args = [*TINY, "--steps", "5000", "--out", "t"]
    first = script("tokenizer", *args, cwd=tmp_path, background=True)
    wait_for(lambda: (tmp_path / "t/log.jsonl").exists(), first)
    second = script("tokenizer", *args, cwd=tmp_path, check=False)
    first.kill()
    assert second.returncode == 1 and "t is in use by another run" in second.stderr


def test_a_strange_house(cache, tmp_path):
    """Another folder, a source tree that cannot be written, spaces, one core, no HOME, no shell variables."""
    source = tmp_path / "the source" / "of it"
    source.mkdir(parents=True)
    for name in STAGES:
        (source / f"{name}.py").write_bytes((HERE / f"{name}.py").read_bytes())
        (source / f"{name}.py").chmod(0o444)
    source.chmod(0o555)
    place = tmp_path / "some where"
    place.mkdir()
    env = {"PATH": os.environ["PATH"], "MAETOK_CACHE": str(cache)}
    core = {min(os.sched_getaffinity(0))} if hasattr(os, "sched_setaffinity") else set()
    command = [sys.executable, source / "tokenizer.py", *TINY, "--steps", "3", "--stage2-steps", "2", "--out", "my out"]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False,
                          preexec_fn=lambda: os.sched_setaffinity(0, core) if core else None)
    source.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in place.iterdir()} == {"my out"} and (place / "my out/metrics.json").exists()
    assert not any(p.suffix != ".py" for p in source.iterdir() if p.name != "__pycache__")


def test_without_a_home_the_cache_is_asked_for(monkeypatch):
    monkeypatch.delenv("MAETOK_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)    # what it gives where nobody knows the user
    assert "set MAETOK_CACHE" in refused(data.cache_dir)


def test_checkpoints_that_do_not_fit_say_what_differs(chain, tmp_path):
    at = chain[0] / "out"
    for kind, load in (("tokenizer", tokenizer.load_tokenizer), ("diffusion", diffusion.load_diffusion)):
        state = torch.load(at / kind / "ckpt.pt", weights_only=True)
        config, weights = state["config"], state["ema"]
        name = next(k for k in weights if k.endswith("qkv.weight"))
        changes = {"width": {"config": config | {"width": 48}}, "surprise": {"config": config | {"surprise": 1}},
                   name: {"ema": {k: v for k, v in weights.items() if k != name}},
                   "other": {"ema": weights | {"other": torch.zeros(1)}}, "depth": {"config": config | {"depth": 2}},
                   "config": {"config": 3}, "ema": {"ema": [1]}}
        if kind == "diffusion":
            changes |= {"classes": {"classes": ["a", "b"]}, "mean": {"mean": [0.0]}, "std": {"std": [math.nan] * 4}}
        for what, change in changes.items():
            data.save_checkpoint(tmp_path / "x.pt", state | change)
            said = refused(load, tmp_path / "x.pt", torch.device("cpu"))
            assert "x.pt" in said and (what in said or what in ("width", "depth", "classes", "ema", "config", "mean",
                                                                 "std")), said
        (tmp_path / "x.pt").unlink()


def test_a_pack_outlives_its_folder_and_a_signal(tmp_path, monkeypatch):
    """It is made anew only when the folder was read and differs."""
    monkeypatch.setenv("MAETOK_CACHE", str(tmp_path / "cache"))
    root = make_folder(tmp_path / "x", 30)
    data.prepare.cache_clear()
    out = data.prepare(str(root), 8)
    before = (out / "meta.json").read_bytes()
    root.rename(tmp_path / "away")
    data.prepare.cache_clear()
    assert "no such folder" in refused(data.prepare, str(root), 8)
    (tmp_path / "away").rename(root)
    with monkeypatch.context() as m:
        m.setattr(data, "list_folder", lambda root: data.leave(signal.SIGTERM))
        with pytest.raises(SystemExit):
            data.prepare(str(root), 8)
    assert (out / "meta.json").read_bytes() == before and data.prepare(str(root), 8) == out
    Image.new("RGB", (9, 9)).save(root / "cat/more.png")
    data.prepare.cache_clear()
    assert len(data.load_images(str(root), 8, "train")) + len(data.load_images(str(root), 8, "val")) == 61


def test_damaged_notes_of_a_run_are_named_or_passed_over(chain, tmp_path, monkeypatch):
    at, outcomes = chain[0] / "out", []
    (tmp_path / "d/latents").mkdir(parents=True)
    made_by = ["--tokenizer", str(at / "tokenizer/ckpt.pt")]

    def says(message, name, *args):
        gc.collect()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
        outcomes.append(message in refused(sys.modules[name].main))

    (tmp_path / "d/latents/belongs.json").write_text('{"tokenizer": ')
    says("belongs.json is damaged", "diffusion", *TINY_SIT, *made_by, "--out", str(tmp_path / "d"))
    data.shutil.copytree(at / "diffusion/latents", tmp_path / "e/latents")
    latents = tmp_path / "e/latents/latents.npy"
    latents.write_bytes(latents.read_bytes()[:5000])
    says("latents is damaged", "diffusion", *TINY_SIT, *made_by, "--out", str(tmp_path / "e"))
    (tmp_path / "t").mkdir()
    (tmp_path / "t/ckpt.pt").write_bytes((at / "tokenizer/stage1.pt").read_bytes())
    says("was made with another data", "tokenizer", *TINY, "--steps", "9", "--out", str(tmp_path / "t"))
    root = make_folder(tmp_path / "x", 30)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/meta.json").write_text("{}")
    says("meta.json is damaged", "data", "--data", str(root), "--size", "8", "--out", str(tmp_path / "p"))
    (tmp_path / "l").mkdir()
    (tmp_path / "l/log.jsonl").write_bytes(b'{"stage": "stage 1", "st\n[3]\n{"x": 1}\n\xff\xfe\n')
    gc.collect()
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", *TINY, "--steps", "2", "--stage2-steps", "0", "--out",
                                      str(tmp_path / "l")])
    tokenizer.main()
    outcomes.append(len(log_of(tmp_path / "l")) == 2)
    tried("damaged notes of a run: named, or passed over", outcomes)


def mutated(content: bytes, rng) -> bytes:
    """A copy of a file with some bytes changed, cut out, doubled, or its end missing."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(0, max(1, len(content)) if rng.random() < 0.4 else min(400, max(1, len(content)))))
        span = int(rng.integers(1, 9))
        kind = rng.integers(0, 5)
        if kind == 0:
            content[at:at + span] = rng.integers(0, 256, span, np.uint8).tobytes()
        elif kind == 1:
            content[at:at + span] = b""
        elif kind == 2:
            content[at:at] = content[at:at + span]
        elif kind == 3:
            content[at:at + span] = b"9" * span          # larger numbers where a header has some
        else:
            content = content[: max(1, at)]
    return bytes(content)


def test_random_damage_ends_in_one_line(chain, tmp_path, monkeypatch):
    """2,000 damaged files: read after all, or refused in one line; never another error, never a large allocation."""
    write_safetensors(tmp_path / "a.safetensors", {"one": torch.randn(4, 5), "two.x": torch.arange(7)})
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", arr_0=rng.integers(0, 256, (6, 8, 8, 3), np.uint8), labels=np.arange(6))
    np.savez_compressed(tmp_path / "ref.npz", mu=np.zeros(2048, np.float16), sigma=np.zeros((2048, 2048), np.float16))
    data.pack_arrays(tmp_path / "packed", 8, ["a", "b"], "f", {
        split: (rng.integers(0, 256, (6, 8, 8, 3), np.uint8), np.arange(6) % 2) for split in ("train", "val")})
    device, at = torch.device("cpu"), chain[0] / "out"

    def sample_set(path):
        images, _, _ = fid.load_samples(path)
        images[np.arange(len(images))]

    def packed_set(path):
        images = data.load_images(str(path.parent), 8, "train")
        images[np.arange(len(images))]

    packed = [tmp_path / "packed" / name for name in ("train.npy", "train_labels.npy", "meta.json")]
    cases = [(tmp_path / "a.safetensors", data.read_safetensors, 600), (tmp_path / "a.npz", sample_set, 300),
             (tmp_path / "ref.npz", lambda path: fid.open_set(str(path), 0, cpu_run()), 100),
             (packed[0], packed_set, 200), (packed[1], packed_set, 100), (packed[2], packed_set, 200),
             (at / "tokenizer/ckpt.pt", lambda path: tokenizer.load_tokenizer(path, device), 200),
             (at / "diffusion/ckpt.pt", lambda path: diffusion.load_diffusion(path, device), 200),
             (at / "tokenizer/stage1.pt", data.read_weights, 100)]
    assert sum(count for *_, count in cases) == 2000
    peak, outcomes = data.resource.getrusage(data.resource.RUSAGE_SELF).ru_maxrss, []
    for source, read, count in cases:
        whole = source.read_bytes()
        path = source if source in packed else tmp_path / f"broken{source.suffix}"
        read(source)
        for i in range(count):
            path.write_bytes(mutated(whole, rng))
            data.prepare.cache_clear()
            try:
                read(path)
                outcomes.append(True)
            except SystemExit as error:
                outcomes.append(len(str(error.code).splitlines()) == 1)
            except Exception as error:
                raise AssertionError(f"{source.name}, damage {i}: {error!r}") from error
        path.write_bytes(whole)
    assert data.resource.getrusage(data.resource.RUSAGE_SELF).ru_maxrss < peak + 500_000
    tried("random damage to safetensors, npz, packed data and checkpoints", outcomes)


@pytest.mark.campaign
@pytest.mark.parametrize("stage", ["stage 1 and 2", "encoding and diffusion", "sampling", "packing"])
def test_sigkill_at_random_moments(chain, tmp_path, stage):
    """A dozen times the process is killed at a random moment, mostly after its start; then it runs to the end."""
    at, rng = chain[0] / "out", np.random.default_rng(zlib.crc32(stage.encode()))
    made_by = ["--tokenizer", at / "tokenizer/ckpt.pt"]
    name, args, files, span = {
        "stage 1 and 2": ("tokenizer", [*TINY, "--steps", "400", "--stage2-steps", "400", "--save-every", "1"],
                          ["ckpt.pt", "stage1.pt", "metrics.json"], 1.5),
        "encoding and diffusion": ("diffusion", [*TINY_SIT, "--steps", "700", "--save-every", "1", "--samples", "0",
                                                 "--preview-every", "100", *made_by],
                                   ["ckpt.pt", "latents/latents.npy", "latents/labels.npy"], 1.5),
        "sampling": ("sample", ["--model", at / "diffusion/ckpt.pt", *made_by, "--images", "1000", "--sampler", "sde",
                                "--steps", "60", "--batch-size", "20", "--precision", "fp32"], ["samples.npz"], 0.6),
        "packing": ("data", ["--data", tmp_path / "x", "--size", "64", "--workers", "1"],
                    ["train.npy", "val.npy", "train_labels.npy", "meta.json"], 0.3)}[stage]
    if stage == "packing":
        make_folder(tmp_path / "x", 3000, size=64)
    kills = 0
    while kills < 12:
        victim = script(name, *args, "--out", "cut", cwd=tmp_path, background=True)
        time.sleep(rng.uniform(1.2, 2.0 + span))
        if victim.poll() is not None:                    # it came through: from the start again
            data.shutil.rmtree(tmp_path / "cut")
            continue
        kills += 1
        victim.kill()
        victim.wait()
        for path in (tmp_path / "cut").glob("*.pt"):
            torch.load(path, weights_only=True)          # whole at every moment
    script(name, *args, "--out", "cut", cwd=tmp_path)
    script(name, *args, "--out", "whole", cwd=tmp_path)
    same = []
    for one, two in ((tmp_path / "whole" / file, tmp_path / "cut" / file) for file in files):
        if one.suffix == ".pt":
            a, b = (flat(torch.load(path, weights_only=True)) for path in (one, two))
            same.append(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a))
        elif one.suffix == ".npz":
            same.append(np.array_equal(np.load(one)["arr_0"], np.load(two)["arr_0"]))
        else:
            same.append(one.name == "metrics.json" and two.exists() or one.read_bytes() == two.read_bytes())
    if name in ("tokenizer", "diffusion"):
        same.append(losses(tmp_path / "whole") == losses(tmp_path / "cut"))
    tried(f"SIGKILL at random moments: {stage}", [all(same)] * kills)


@pytest.mark.campaign
def test_sigkill_during_a_download(server, tmp_path, monkeypatch):
    """And during the unpacking and the conversion after it."""
    served, url, _ = server
    rows = np.random.default_rng(0).integers(0, 256, (5000, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(5000) % 10
    with tarfile.open(served / "made.tar.gz", "w:gz") as tar:
        for i in range(6):
            name = f"data_batch_{i + 1}.bin" if i < 5 else "test_batch.bin"
            add_to_tar(tar, f"cifar-10-batches-bin/{name}", rows.tobytes())
        add_to_tar(tar, "cifar-10-batches-bin/batches.meta.txt", "\n".join("abcdefghij").encode())
    call = (f"import data; data.CIFAR10 = ({url + 'made.tar.gz'!r}, {sha256(served / 'made.tar.gz')!r}); "
            "x = data.load_images('cifar10', 32, 'train'); print(len(x), int(x.pixels.astype(int).sum()))")
    rng, kills, cache = np.random.default_rng(0), 0, tmp_path / "cache"
    env = os.environ | {"MAETOK_CACHE": str(cache)}
    for _ in range(12):
        victim = subprocess.Popen([sys.executable, "-c", call], cwd=HERE, env=env, stderr=subprocess.DEVNULL)
        wait_for((cache / "cifar10.lock").exists, victim)
        time.sleep(rng.uniform(0, 0.6) + (1.8 if kills else 0))
        kills += victim.poll() is None
        victim.kill()
        victim.wait()
    done = subprocess.run([sys.executable, "-c", call], cwd=HERE, env=env, capture_output=True, text=True, check=False)
    assert kills >= 6 and done.stdout.split() == ["25000", str(5 * int(rows[:, 1:].astype(int).sum()))], done.stderr
    tried("SIGKILL at random moments: download, unpacking, conversion", [True] * kills)


@pytest.mark.campaign
def test_soak(cache, tmp_path, monkeypatch):
    """The default sizes ten times over in one process, with fewer steps: memory and open files stay as they are. Run
    it alone (-k soak): the memory that other tests leave to be reused would hide a leak.
    """
    def once():
        for command in ("tokenizer --steps 20 --stage2-steps 10 --log-every 10", "diffusion --steps 20 --samples 200",
                        "sample --n 200", "fid"):
            name, *args = command.split()
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
            sys.modules[name].main()
        gc.collect()
        data.shutil.rmtree("out")
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, len(os.listdir("/proc/self/fd"))

    monkeypatch.chdir(tmp_path)
    data.resource.setrlimit(data.resource.RLIMIT_DATA, (8 * 2**30, data.resource.RLIM_INFINITY))
    try:
        rounds = [once() for _ in range(10)]
    finally:
        data.resource.setrlimit(data.resource.RLIMIT_DATA, (data.resource.RLIM_INFINITY,) * 2)
    FAULTS["soak: MiB resident and open files after each of 10 rounds"] = rounds
    assert rounds[-1][0] < 1.05 * rounds[1][0] and len({files for _, files in rounds[1:]}) == 1, rounds
    tried("default chain, 10 rounds in one process under 8 GiB", [True] * 10)


@pytest.mark.campaign
def test_packed_data_is_ten_times_as_fast_as_jpeg(tmp_path):
    """Batches of packed images against files decoded and cropped, a thread each, alternating, both from memory that caches
    the disk; and packing with one and with two workers. Medians go to $MAETOK_SPEED, a file, if that is set.
    """
    rng, root, rates = np.random.default_rng(0), tmp_path / "jpegs", {}
    root.mkdir()
    for i in range(400):                                 # of a photograph's size and roughness
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noisy = np.asarray(coarse, np.float32) + rng.normal(0, 8, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / f"{i}.jpg", quality=90)
        for k in range(1, 10):                           # enough of them to outweigh the workers' start
            data.shutil.copy(root / f"{i}.jpg", root / f"{i}-{k}.jpg")
    files = sorted(root.iterdir())

    def timed(name, count, work, *args):
        start = time.perf_counter()
        work(*args)
        rates.setdefault(name, []).append(count / (time.perf_counter() - start))

    for repeat in range(3):
        for workers in (1, 2):
            data.shutil.rmtree(tmp_path / "packed", ignore_errors=True)
            timed(f"packing, {workers} workers", 4000, data.pack, root, 256, tmp_path / "packed", workers)
    batches = data.Batches(data.load_images(str(tmp_path / "packed"), 256, "train"), 64, 0, cpu_run())
    for repeat in range(6):
        timed("packed, batches of 64", 2560, lambda steps: [batches.gather(i) for i in steps], range(40 * repeat, 40 * repeat + 40))
        timed("JPEG, decoded and cropped", 100, lambda paths: [data.read_image(path, 256) for path in paths],
              files[100 * repeat:100 * repeat + 100])
    rates = {name: float(np.median(found)) for name, found in rates.items()}
    rates |= {"packed / JPEG": rates["packed, batches of 64"] / rates["JPEG, decoded and cropped"],
              "packing, 2 / 1 workers": rates["packing, 2 workers"] / rates["packing, 1 workers"],
              "bytes of a JPEG": float(np.mean([f.stat().st_size for f in files]))}
    if "MAETOK_SPEED" in os.environ:
        Path(os.environ["MAETOK_SPEED"]).write_text(json.dumps(rates, indent=1) + "\n")
    assert rates["packed / JPEG"] > 10 and rates["packing, 2 / 1 workers"] > 1.4, rates


# ---------------------------------------------------------------------------------------------------------------------
# Speed: what makes it, checked without a clock


def test_muon_is_torchs():
    """Matrices of a shape orthogonalised together give what torch does one by one, up to bf16; its state, too."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(48, 16), (16, 16), (16, 64), (48, 16), (16, 64), (9, 9)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine, torchs = data.Muon(ours, 0.02, 0.5), torch.optim.Muon(theirs, 0.02, 0.5)
    for step in range(5):
        for i, (one, two) in enumerate(zip(ours, theirs)):           # one of a shape without gradient now and then, one always
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


def test_dropped_patches_are_not_seen():
    """--drop-masked: the latents are those of the visible patches at their own places."""
    torch.manual_seed(0)
    cfg = tokenizer.Config(size=16, patch=4, latents=4, width=48, depth=2, heads=3, drop_masked=True)
    net, x = tokenizer.Tokenizer(cfg).encoder, torch.randn(3, 3, 16, 16)
    mask = tokenizer.random_mask(3, 16, 0.4, torch.Generator().manual_seed(0))
    drop = math.ceil(16 * 0.4)
    z, hidden = net(x, mask, drop), tokenizer.unpatchify(mask[..., None].expand(-1, -1, 48), 4)
    torch.testing.assert_close(net(torch.where(hidden, torch.randn_like(x), x), mask, drop), z, rtol=0, atol=0)
    assert not torch.allclose(net(torch.where(hidden, x, x.flip(3)), mask, drop), z)
    assert not torch.allclose(net(x, mask), z) and torch.equal(net(x, torch.zeros_like(mask), 0), net(x))

    def attend_to_the_visible(q, k, v):                  # the same, by a mask inside attention over all tokens
        hide = torch.nn.functional.pad(mask, (1, 4))[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, ~hide)

    honest, tokenizer.attend = tokenizer.attend, attend_to_the_visible
    try:
        torch.testing.assert_close(net(x), z, rtol=1e-4, atol=1e-5)
    finally:
        tokenizer.attend = honest


def test_recomputing_layers_changes_no_gradient():
    for module, make, inputs in (
            (tokenizer, lambda **kw: tokenizer.Tokenizer(tokenizer.Config(width=48, heads=3, depth=2, **kw)),
             (torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5)),
            (diffusion, lambda **kw: diffusion.SiT(8, 16, 10, 48, 2, 3, **kw),
             (torch.randn(2, 8, 16), torch.rand(2), torch.tensor([1, 2])))):
        gradients = []
        for recompute in (False, True):
            torch.manual_seed(0)
            net = make(recompute=recompute)
            for p in net.parameters():
                p.data += 0.02 * torch.randn_like(p)     # no zero layers
            out = net(*inputs)
            (out["recon"] if module is tokenizer else out).square().sum().backward()
            gradients.append([p.grad for p in net.parameters() if p.grad is not None])
        assert len(gradients[0]) > 20
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations for which a program waits for a GPU: values that Python reads, and shapes that depend on them."""

    READERS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.overloadpacket.__name__ in self.READERS
        return op(*args, **(kwargs or {}))


@pytest.fixture
def train_twelve_steps(chain, tmp_path, monkeypatch):
    """Run the training loop of a script in this process; on_step(step) is called as each step is logged."""
    def train(name, on_step, *more):
        def log(self, step, *args, **terms):
            on_step(step)
            return honest(self, step, *args, **terms)

        honest = data.Log.__call__
        monkeypatch.setattr(data.Log, "__call__", log)
        args = [*TINY, "--stage2-steps", "0"] if name == "tokenizer" else [
            *TINY_SIT, "--samples", "0", "--tokenizer", str(chain[0] / "out/tokenizer/ckpt.pt")]
        gc.collect()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args, *more, "--steps", "12", "--log-every", "100",
                                          "--save-every", "100", "--out", str(tmp_path / "o")])
        sys.modules[name].main()

    return train


@pytest.mark.parametrize("name", ["tokenizer", "diffusion"])
def test_one_graph_and_no_recompilation(train_twelve_steps, monkeypatch, name):
    """The compiled model is one graph, compiled once."""
    compiled, steps, compile_ = [], [], torch.compile

    def backend(graph, inputs):
        compiled.append(len(steps))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda net, fullgraph: compile_(net, fullgraph=fullgraph, backend=backend))
    torch._dynamo.reset()
    train_twelve_steps(name, steps.append, "--compile")
    torch._dynamo.reset()
    assert len(steps) == 12 and compiled == [0]


@pytest.mark.parametrize("name", ["tokenizer", "diffusion"])
def test_no_step_waits_for_the_device(train_twelve_steps, name):
    """Between two lines of the log; after the first steps, in which the optimizers make their state."""
    waits = Waits()

    def on_step(step):
        if step == 2:
            waits.__enter__()
        if step == 11:
            waits.__exit__(None, None, None)

    train_twelve_steps(name, on_step)
    assert waits.count == 0


def test_cost_of_sampling_is_counted():
    rows = []

    class Net:
        null = 3

        def __call__(self, x, t, y):
            rows.append(len(x))
            return torch.zeros_like(x)

    noise = torch.randn(2, 4, 3)
    for sampler in ("euler", "heun", "sde"):
        for low, high, scale in ((0.0, 1.0, 2.0), (0.2, 0.75, 2.0), (0.3, 0.7, 1.0)):
            rows.clear()
            how = diffusion.Sampling(sampler, 10, scale, low, high)
            velocity = diffusion.guided_velocity(Net(), torch.tensor([0, 1]), scale, low, high)
            if sampler == "sde":
                diffusion.sample_sde(velocity, noise, 10, "linear", lambda: noise)
            else:
                diffusion.sample_ode(velocity, noise, 10, sampler == "heun")
            assert sum(rows) == 2 * how.evaluations() and len(rows) == how.calls()


def test_bench_measures_and_leaves_the_run_alone(chain, tmp_path, monkeypatch):
    at = chain[0] / "out"
    made = ["--tokenizer", str(at / "tokenizer/ckpt.pt")]
    for name, args, file in (("tokenizer", [*TINY, "--bench", "5"], "bench/bench.json"),
                             ("diffusion", [*TINY_SIT, *made, "--bench", "5"], "bench/bench.json"),
                             ("sample", ["--model", str(at / "diffusion/ckpt.pt"), *made, "--bench", "2", "--batch-size",
                                         "20"], "bench.json")):
        gc.collect()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args, "--out", str(tmp_path / name)])
        sys.modules[name].main()
        found = json.loads((tmp_path / name / file).read_text())
        for row in found.values() if name == "tokenizer" else [found]:
            assert row["images_per_s"] > 0 and 0 < row["share_of_matmul"] < 1 and row["commit"]
        assert not list((tmp_path / name).rglob("*.pt")) and not list((tmp_path / name).rglob("samples.npz"))


# ---------------------------------------------------------------------------------------------------------------------
# The house


def test_imports_go_one_way():
    allowed = {name: set(STAGES[:i]) for i, name in enumerate(STAGES)}
    packages = set(sys.stdlib_module_names) | {"torch", "numpy", "tqdm", "PIL", "scipy"}
    for name in STAGES:
        tree = ast.parse((HERE / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert node in tree.body, f"{name}.py: an import inside a function"
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                for module in {m.split(".")[0] for m in modules}:
                    assert module in packages | allowed[name], f"{name}.py must not import {module}"
    assert {p.name for p in HERE.glob("*.py")} == {f"{name}.py" for name in (*STAGES, "test_all")}


def test_readme_counts_the_lines():
    readme = README.read_text()
    for path in HERE.glob("*.py"):
        said = int(re.search(rf"\| \[{path.name}\].*?\| (\d+) \|", readme)[1])
        assert said == pytest.approx(len(path.read_text().splitlines()), rel=0.03), path.name
    assert "@@" not in readme


README = HERE / "README.md"


def test_every_command_of_the_readme_runs(cache, made_weights, tmp_path):
    """All of its sh blocks, by bash as they stand, but: installing is left out (.ci/run does it), placeholders become
    small files, torchrun one process, and each script is given the smallest sizes behind its own flags.
    """
    at = tmp_path / "files"
    for folder, count in (("images", 40), ("A", 8), ("B", 9)):
        make_folder(at / folder, count, ("",), 16)
    weights = golden("maetok/tokenizer_tiny_b_movq")[1]
    for name, tensors, facts in (("maetok-b-128", weights, {"vq_mean": 0.5, "vq_std": 2.0}),
                                 ("sit-xl", golden("maetok/sit_tiny_b")[1], {"num_heads": 6})):
        (at / name).mkdir()
        write_safetensors(at / name / "model.safetensors", tensors)
        (at / name / "config.json").write_text(json.dumps(facts))
    sizes = {"tokenizer": [*TINY, "--steps", 2, "--stage2-steps", 1, "--batch-size", 4, "--aux-heads", 2, "--dims", 8,
                           "--weights", made_weights],
             "diffusion": [*TINY_SIT, "--steps", 4, "--keep-every", 2, "--samples", 20, "--batch-size", 8],
             "sample": ["--images", 20, "--steps", 2], "fid": ["--weights", made_weights], "data": ["--size", 16]}
    cases = "".join(f"{name}.py) shift; exec {sys.executable} {HERE}/{name}.py \"$@\" {' '.join(map(str, more))};;\n"
                    for name, more in sizes.items())
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(
            f'#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\ncase $1 in\n{cases}'
            f'-m) exec {sys.executable} "$@" --collect-only;;\nesac\necho "what is $*?"; exit 1\n')
        (tmp_path / "bin" / name).chmod(0o755)
    stand_ins = {"path/to/images": at / "images", "/data/imagenet": at / "images", "path/to/maetok-b-128": at / "maetok-b-128",
                 "path/to/sit-xl": at / "sit-xl", " A B": f" {at}/A {at}/B", "stats B": f"stats {at}/B",
                 "step-100": "step-2", "step-200": "step-4", "0 1 2": "0", "mae_hog ae mae_teacher vae mae_pixel": "mae_hog",
                 " test_all.py": f" {HERE}/test_all.py"}
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    used = set()
    for i, block in enumerate(blocks):
        block = re.sub(r"python3 -m venv .*?requirements.txt( pytest(-xdist)?==[\d.]+)* && ", "", block)
        for old, new in stand_ins.items():
            used |= {old} if old in block else set()
            block = block.replace(old, str(new))
        blocks[i] = "set -e\n" + block
    assert used == stand_ins.keys() and sum("torchrun" in block for block in blocks) >= 4

    def execute(i):
        (tmp_path / str(i)).mkdir()
        env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", blocks[i]], cwd=tmp_path / str(i), env=env, capture_output=True, text=True,
                              check=False)
        return done.returncode, blocks[i] + done.stdout[-2000:] + done.stderr[-2000:]

    with ThreadPoolExecutor(2) as pool:
        for code, said in pool.map(execute, range(len(blocks))):
            assert code == 0, said
    (finding,) = (i for i, block in enumerate(blocks) if "finding()" in block)
    found = tmp_path / str(finding) / "out/finding/table"
    assert {p.name for p in found.iterdir()} == {"mae_hog-0.json", "table.md", "probe.png", "mixtures.png",
                                                 "training.png", "samples.png"}


# Numbers of the README that are no measurement of ours. Of the paper: its tables and figures as the README quotes them
PAPERS = {"40", "60", "0.67", "24.47", "0.85", "5.78", "0.48", "5.69", "1.22", "22.17", "1.75", "18.17", "1.15", "17.18",
          "2.43", "13.54", "0.89", "6.24", "23.61", "2.31", "1.67"}
# settings, versions, and limits that a test or an error message states
SETTINGS = {"0.75", "2.0", "1.0", "3.0", "45", "90", "1", "2.13.0", "0.4.0", "2.9.0", "2.14.1", "2.11", "3.10", "3.11", "3.13",
            "3.2", "3.3", "3.1", "171.9"}


def test_numbers_in_the_readme_are_in_the_results():
    """Every decimal number outside code: a rounded value of some file in results/, or named above. Whole percentages, too,
    though among so many values few of them could fail.

    And the tables of the finding are those that its files make.
    """
    found = []

    def leaves(x):
        for value in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
            leaves(value)
        if isinstance(x, (int, float)):
            found.append(float(x))
        if isinstance(x, str):
            found.extend(float(n) for n in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", x))

    for path in (HERE / "results").rglob("*.json"):
        leaves(json.loads(path.read_text()))
    readme = README.read_text()
    short, long = ((HERE / at / "table.md").read_text() for at in ("results/finding", "results/finding_long"))
    for at, table in (("finding", short), ("finding_long", long)):
        files = [json.loads(path.read_text()) for path in sorted((HERE / "results" / at).glob("*-*.json"))]
        assert fid.markdown(fid.by_kind(files)) == table
    assert short in readme
    readme = readme.replace(short, "")
    rows = [line for line in readme.splitlines() if line.split("|")[1:2] and line.split("|")[1].strip() in fid.MEASURES]
    assert len(rows) > 5 and set(rows) <= set(long.splitlines()) and long.splitlines()[0] in readme
    leaves([short, long])
    readme = "\n".join(line for line in readme.splitlines() if line not in rows)
    readme = re.sub(r"^```.*?^```|`[^`]*`|\]\(.*?\)|^#.*?$|Eq\. ?\d+|\(\[arXiv.*?\)", " ", readme,
                    flags=re.MULTILINE | re.DOTALL)
    values, unknown = np.array(found), []
    for text, percent in re.findall(r"(?<![\w.\-])(\d[\d,]*(?:\.\d+)*)( %)?", readme):
        text = text.rstrip(",").replace(",", "")
        if ("." in text or percent) and text not in PAPERS | SETTINGS:
            if text.count(".") > 1:
                unknown.append(text)
                continue
            half = 0.5 * 10.0 ** -len(text.partition(".")[2]) + 1e-9
            if not any((np.abs(scale * values - float(text)) <= half).any() for scale in (1, 100)):
                unknown.append(text)
    assert not unknown


def test_code_in_the_readme_is_the_code():
    sources = [[line.strip() for line in path.read_text().splitlines()] for path in HERE.glob("*.py")]
    for block in re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL):
        for part in block.strip().split("\n\n"):
            lines = [line.strip() for line in part.splitlines()]
            assert any(lines == source[i:i + len(lines)] for source in sources for i in range(len(source))), part


def make_run(at, kind, seed, gfd, steps=5):
    """What the commands of the finding leave of one run."""
    for name, content in {
            "tokenizer": {"stage1": {"psnr": 20.0, "fd_classifier": 2.0}, "stage2": {"psnr": 21.0, "fd_classifier": 1.0},
                          "linear_probe": 0.5 + seed / 10, "steps": steps, "stage2_steps": 3, "precision": "fp32", "commit": "a"},
            "diffusion": {"rows": {"samples": {"fd_classifier": gfd, "class_accuracy": 0.5, "images": 9,
                                               "fd_to_reconstructions": gfd - 1},
                                   "real validation images": {"fd_classifier": 0.1}},
                          "sampling": {"sampler": "heun", "seed": seed}, "steps": 4, "commit": "b"},
            "guided": {"samples": {"fd_classifier": gfd / 2, "class_accuracy": 0.75}, "sampling": {"guidance": 2.0,
                       "training_steps": 4}, "commit": "c"},
            "stage1": {"samples": {"fd_classifier": gfd + 1, "class_accuracy": 0.5},
                       "sampling": {"training_steps": 4}, "commit": "c"},
            "step-2": {"samples": {"fd_classifier": 2 * gfd}},
            "analysis": {"dimensions": 9, "rows": {"ckpt.pt": {"data": "shapes", "latents": [2, 3],
                "knn_accuracy": 0.25, "dimensions_for_90_percent": 7,
                "mixture_nll_per_dimension": {"1": 1.5, "8": 1.25, "32": 1.0}}}}}.items():
        (at / f"{kind}-{seed}/{name}").mkdir(parents=True)
        file = "analysis" if name == "analysis" else "metrics"
        (at / f"{kind}-{seed}/{name}/{file}.json").write_text(json.dumps(content))
    (at / f"{kind}-{seed}/diffusion/log.jsonl").write_text('{"loss": 3.0}\n{"loss": 0.25}\n')


def test_many_runs_become_a_table(tmp_path, monkeypatch, capsys):
    at, out = tmp_path / "runs", tmp_path / "out"
    for kind, seed, gfd in (("mae_hog", 0, 2.0), ("mae_hog", 1, 4.0), ("ae", 0, 5.0)):
        make_run(at, kind, seed, gfd)

    def table(*args):
        monkeypatch.setattr(sys, "argv", ["fid.py", "table", *map(str, args)])
        fid.main()
        return capsys.readouterr().out

    (at / "vae-0").mkdir()                                # begun, not finished
    said = table(at, "--out", out)
    lines = {line.split(" | ")[0].strip("| "): line for line in said.splitlines()}
    assert lines["samples: gFD"].endswith("| 5.00 | 3.00 ± 1.41 |")      # the plain autoencoder stands first
    assert lines["samples: gFD, guided"].endswith("| 2.50 | 1.50 ± 0.71 |")
    assert lines["latents: linear probe, %"].endswith("| 50.0 | 55.0 ± 7.1 |")
    assert lines["diffusion loss at the end"].endswith("| 0.250 | 0.250 ± 0.000 |")
    assert "vae-0 is left out: it has no tokenizer/metrics.json" in said
    row = json.loads((out / "mae_hog-1.json").read_text())
    assert row["fd_classifier_by_step"] == {"2": 8.0, "4": 4.0} and row["setup"]["steps"] == 5
    first = (out / "table.md").read_text()
    (out / "table.md").unlink()
    table(out)                                           # once more, from the JSON files alone
    assert (out / "table.md").read_text() == first
    assert all(Image.open(out / f"{name}.png").size == (800, 420) for name in ("probe", "mixtures", "training"))
    half = at / "mae_hog-0/guided/metrics.json"          # samples of a generator that was stopped half way
    whole = half.read_text()
    for text, message in ((whole.replace('"training_steps": 4', '"training_steps": 2'), "of 2 steps, not 4"),
                          (whole.replace("fd_classifier", "fd"), "not a whole run"), (whole[:40], "not a whole run")):
        half.write_text(text)
        with pytest.raises(SystemExit, match=message):
            table(at, "--out", tmp_path / "new")
        assert not (tmp_path / "new").exists()
    half.write_text(whole)
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        table(tmp_path / "nowhere")
    make_run(at, "ae", 1, 5.0, steps=6)
    with pytest.raises(SystemExit, match="ae-1 and ae-0 were made with other steps"):
        table(at, "--out", out)


def test_label_rules():
    assert sample.choose_labels("balanced", 5, ["a", "b"], 0).tolist() == [0, 1, 0, 1, 0]
    assert sample.choose_labels("b,0", 3, ["a", "b"], 0).tolist() == [1, 0, 1]
    labels = sample.choose_labels("random", 1000, ["a", "b"], 0)
    assert 400 < labels.sum() < 600 and np.array_equal(labels, sample.choose_labels("random", 1000, ["a", "b"], 0))


def test_log_terms_may_be_ratios(tmp_path):
    class Source:
        waited = 0.0

        def indices(self, step):
            return np.arange(3)

    class Config:
        out, batch_size, log_every, save_every, lr, skip_nonfinite, bench = tmp_path, 8, 2, 100, 1e-3, 0, 0

    log = data.Log(cpu_run(), Config, "s", 0, 4, Source())
    for step in range(4):
        log(step + 1, 1.0, loss=torch.tensor(float(step)), part=(torch.tensor(6.0 * step), torch.tensor(2.0 + step)))
    first, last = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["loss"] == 0.5 and first["part"] == pytest.approx(6 / 5) and last["images"] == 32
    with pytest.raises(SystemExit, match="loss is not finite"):
        log(4, 1.0, loss=torch.tensor(float("nan")))
