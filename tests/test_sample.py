"""Prompts and pixels: sample.py against the published pipelines on small random folders, and on bad input."""

import fnmatch
import importlib
import itertools
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from full import pixels as full_pixels
from full.data import preset
from full.hub import find
from full.pixels import (
    VAE,
    Published,
    TextEncoder,
    clean_prompt,
    clips_of,
    context_of,
    crop_and_resize,
    latent_shape,
    loaded,
    part_of,
    read_image,
    read_video,
    save,
)
from toy.world import embed, parse_prompt

HEIGHT, WIDTH, FRAMES = 64, 96, 17
SIZE = ["--frames", str(FRAMES), "--height", str(HEIGHT), "--width", str(WIDTH), "--steps", "2"]
PROMPT = " The <b>cat</b>   runs &amp;amp; \n a caf\u00e9 "


def published(path, kind, text_dim=32):
    """A folder as published, of random small networks: the pipeline, and the folder it was saved to."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *"The the cat dog runs over a & . café < > b".split()]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>",
                                                     eos_token="</s>", unk_token="<unk>")
    small = transformers.UMT5Config(vocab_size=32, d_model=text_dim, d_kv=8, d_ff=64, num_layers=2,
                                    num_heads=4)
    vae = diffusers.AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    own = dict(chunk_partition=(1, 2, 2)) if kind == "causal" else {}
    name = "AnyFlowFAR" if kind == "causal" else "AnyFlow"
    network = getattr(diffusers, f"{name}Transformer3DModel")(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16,
        text_dim=text_dim, freq_dim=32, ffn_dim=64, num_layers=2, **own)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=3)  # not the default: read from the folder
    encoder = transformers.UMT5EncoderModel(small)
    parts = tokenizer, encoder.eval(), network.eval(), vae.eval(), scheduler
    pipe = getattr(diffusers, f"{name}Pipeline")(*parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(path)
    return pipe, path


@pytest.fixture(scope="module", params=["anyflow", "causal"])
def folder(request, tmp_path_factory):
    return published(tmp_path_factory.mktemp(request.param) / "folder", request.param)


@pytest.fixture
def pixels(monkeypatch):
    """What would be written, uint8 (F, H, W, 3): an MP4 is not the same pixels again."""
    made = []
    keep = lambda stem, formats, latents, pixels, fps: made.append(pixels) or str(stem)
    monkeypatch.setattr(sample, "save", keep)
    return made


def run(*args):
    sample.main([str(arg) for arg in args])


def movie(path, frames=30, height=48, width=80, fps=16):
    """A smooth moving pattern in a file, and its frames in [0, 1] as they come out of it again."""
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    f, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 9 + f / 5), np.cos(y / 7 - f / 9), np.sin((x + y) / 11 + f / 3)]
    imageio.imwrite(path, (127 + 100 * np.stack(waves, -1)).astype(np.uint8), plugin="FFMPEG", fps=fps,
                    macro_block_size=2)
    return path


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_same_noise_same_video_as_the_published_pipelines(folder, pixels, guidance, tmp_path):
    """From a prompt with HTML and odd spaces, with and without guidance: pixels within one of 255."""
    pipe, path = folder
    negative = write(tmp_path / "negative.txt", "the dog")
    options = ["--guidance", guidance, "--negative", f"@{negative}", "--padding", "--seed", 7]
    run("--model", path, "--prompt", PROMPT, *SIZE, *options, "--out", tmp_path / "a.gif")
    options = dict(num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_inference_steps=2,
                   guidance_scale=guidance)
    generator = torch.Generator().manual_seed(7)
    theirs = pipe(prompt=PROMPT, negative_prompt="the dog", generator=generator, **options).frames[0]
    assert theirs.shape == pixels[0].shape == (FRAMES, HEIGHT, WIDTH, 3) and theirs.std() > 0.01
    assert np.abs(255 * theirs - pixels[0]).max() <= 0.51  # half for rounding to uint8


@pytest.mark.parametrize("task", ["image", "video"])
def test_given_frames_go_in_as_in_the_published_pipelines(folder, pixels, task, tmp_path):
    """I2V and V2V: the given frames are encoded, normalised and held as published."""
    pipe, path = folder
    if task == "image":
        noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "a.png")
        given = torch.from_numpy(noise).permute(2, 0, 1)[None] / 255
        options = ["--image", tmp_path / "a.png"]
    else:
        file = movie(tmp_path / "a.mp4", height=HEIGHT, width=WIDTH)
        given, options = read_video(file, 9, HEIGHT, WIDTH)[0], ["--video", file, "--given", 9]
    run("--model", path, "--prompt", PROMPT, *SIZE, *options, "--padding", "--out", tmp_path / "a.gif")
    theirs = pipe(prompt=PROMPT, video=given[None], num_frames=FRAMES, height=HEIGHT, width=WIDTH,
                  num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert np.abs(255 * theirs.frames[0] - pixels[0]).max() <= 0.51  # half for rounding to uint8


def test_only_a_causal_model_is_padded_and_only_if_asked(folder, pixels, tmp_path):
    """Keys of zero, for equality with the pipeline: they change what a causal model makes."""
    _, path = folder
    for options in ([], ["--padding"]):
        run("--model", path, "--prompt", PROMPT, *SIZE, *options, "--out", tmp_path / "a.gif")
    assert np.array_equal(*pixels) == ("causal" not in path.parent.name)


def test_a_trained_network_borrows_vae_and_text_encoder(folder, pixels, tmp_path):
    """--parts: what train.py leaves is the network alone; a published folder lends the rest."""
    _, path = folder
    shutil.copytree(path / "transformer", tmp_path / "network")
    (tmp_path / "network" / "anyflow.json").write_text('{"preset": "tiny"}')  # but not of the world
    for options in (["--model", path], ["--model", tmp_path / "network", "--parts", path]):
        run(*options, "--prompt", PROMPT, *SIZE, "--out", tmp_path / "a.gif")
    assert np.array_equal(*pixels)


def test_embeddings_are_zero_behind_the_prompt(folder):
    """As published: 512 rows, the first ones of the prompt's tokens and its end, the others zero."""
    _, path = folder
    text = TextEncoder(path)(["the cat runs", "", "the " * 600])
    assert text.shape == (3, 512, 32)
    assert [int(row.abs().sum(1).gt(0).sum()) for row in text] == [4, 1, 512]


def test_many_prompts_are_named_and_go_on(folder, tmp_path, capsys, monkeypatch):
    """<prompt>-<i>.mp4 with seeds SEED + i; one that fails leaves the others; a second run makes the rest."""
    pytest.importorskip("imageio_ffmpeg")
    _, path = folder
    (tmp_path / "prompts.txt").write_text("the cat runs\n\na/dog\n")
    out = tmp_path / "out"
    options = ["--model", path, *SIZE, "--prompts", tmp_path / "prompts.txt", "--per-prompt", 2]
    real = sample.save

    def full(stem, *args):
        if stem.name == "the cat runs-1":
            raise OSError(28, "No space left on device")
        return real(stem, *args)

    monkeypatch.setattr(sample, "save", full)
    with pytest.raises(SystemExit, match="1 of 4 clips failed: the cat runs-1: .*No space left"):
        run(*options, "--out", out)
    wanted = [*(f"a_dog-a4f552c9-{i}.mp4" for i in (0, 1)), "the cat runs-0.mp4"]
    assert sorted(p.name for p in out.iterdir()) == wanted
    monkeypatch.undo()
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    run(*options, "--out", out)
    assert "3 of 4 are there already" in capsys.readouterr().out
    assert all(p.stat().st_mtime_ns == before[p] for p in before) and (out / "the cat runs-1.mp4").exists()
    frames = list(pytest.importorskip("imageio.v3").imiter(out / "the cat runs-1.mp4", plugin="FFMPEG"))
    assert len(frames) == FRAMES and frames[0].shape == (HEIGHT, WIDTH, 3)


def test_a_video_that_was_not_written_whole_is_no_video(tmp_path, monkeypatch):
    """ffmpeg that ran out of space says nothing: what it left is counted, and the old file stays."""
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    save(tmp_path / "a", [".mp4"], None, frames, 16)
    before = (tmp_path / "a.mp4").read_bytes()
    monkeypatch.setattr(imageio, "imwrite", lambda part, *args, **options: part.write_bytes(before[:300]))
    with pytest.raises(OSError, match="ffmpeg could not write"):
        save(tmp_path / "a", [".mp4"], None, frames, 16)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == before


def test_a_video_is_read_at_the_rate_asked_for(tmp_path):
    """Frame i is what the file shows at i / fps seconds, whatever its rate; of another aspect the middle."""
    file = movie(tmp_path / "a.mp4", frames=30, height=48, width=80, fps=32)
    every, cut = read_video(file, 30, 48, 80, fps=32)
    half, _ = read_video(file, 15, 48, 80, fps=16)
    assert cut is None and torch.equal(half, every[::2])
    twice, _ = read_video(file, 20, 48, 80, fps=64)
    assert torch.equal(twice[::2], every[:10])
    square, cut = read_video(file, 3, 48, 48, fps=32)
    assert cut == "48 x 48 of 80 x 48" and torch.equal(square, every[:3, :, :, 16:64])


@pytest.mark.parametrize("kept", ["mod(n,7)", "lt(t,2)+not(mod(n,2))"])
def test_a_video_of_uneven_times_is_read_by_these(kept, tmp_path):
    """Thirty frames a second, of which some were left out, as by phones: brightness tells the time."""
    pytest.importorskip("imageio.v3")
    ffmpeg, file = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe(), tmp_path / "a.mp4"
    source = ["-f", "lavfi", "-i", "nullsrc=s=64x48:r=30:d=5,geq=lum='20+40*T':cb=128:cr=128"]
    look = ["-vf", f"select='{kept}'", "-fps_mode", "vfr", "-pix_fmt", "yuv420p", "-crf", "1", file]
    subprocess.run([ffmpeg, "-loglevel", "error", *source, *look], check=True)
    video, _ = read_video(file, 72, 48, 64)
    luma = 16 + 219 * video.mean((1, 2, 3))
    assert ((luma - 20) / 40 - torch.arange(72) / 16).abs().max() < 0.1


def test_pixels_that_are_not_square_are_shown_as_they_look(tmp_path):
    movie(tmp_path / "a.mp4", frames=4, height=48, width=80, fps=16)
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    wide = [ffmpeg, "-loglevel", "error", "-i", tmp_path / "a.mp4", "-vf", "setsar=2", tmp_path / "b.mp4"]
    subprocess.run(wide, check=True)
    assert read_video(tmp_path / "b.mp4", 3, 48, 80)[1] == "80 x 48 of 160 x 48"


def test_of_another_aspect_the_middle_is_used():
    """Of rows as of columns, pixel by pixel where the size is the same."""
    frame = np.broadcast_to(np.arange(61, dtype=np.uint8)[:, None, None], (61, 40, 3))
    for x, used in ((crop_and_resize(frame, 41, 40)), crop_and_resize(frame.swapaxes(0, 1), 40, 41)):
        line = x[0, :, 0] if x.shape[1] == 41 else x[0, 0]
        assert torch.equal((255 * line).round(), torch.arange(10, 51.0))
        assert used == ("40 x 41 of 40 x 61" if x.shape[1] == 41 else "41 x 40 of 61 x 40")


def test_resizing_is_bicubic_without_alias_and_in_range():
    """A parabola is enlarged exactly, thin lines at a third of the size are grey, an edge stays in [0, 1]."""
    line = lambda values: np.broadcast_to(np.uint8(values)[None, :, None], (len(values), len(values), 3))
    x, _ = crop_and_resize(line(np.arange(16) ** 2), 32, 32)
    at = (torch.arange(32) + 0.5) / 2 - 0.5
    assert torch.allclose(255 * x[0, 9, 4:-4], at[4:-4] ** 2, atol=0.01)
    x, _ = crop_and_resize(line(np.arange(48) % 2 * 255), 16, 16)
    assert (x[..., 2:-2] - 0.5).abs().max() < 0.15
    x, _ = crop_and_resize(line([0] * 8 + [255] * 8), 24, 24)
    assert x.min() == 0 and x.max() == 1


def test_an_image_is_turned_as_its_camera_was_held(tmp_path):
    exif, image = Image.Exif(), Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3))
    exif[0x0112] = 6  # a quarter to the right
    image.save(tmp_path / "a.png"), image.save(tmp_path / "b.png", exif=exif)
    plain, turned = read_image(tmp_path / "a.png", 4, 6)[0], read_image(tmp_path / "b.png", 6, 4)[0]
    assert torch.equal(turned, plain.rot90(-1, (2, 3)))
    Image.new("F", (6, 4)).save(tmp_path / "c.tiff")
    with pytest.raises(ValueError, match="mode F, expected 8 bits"):
        read_image(tmp_path / "c.tiff", 4, 6)


@pytest.mark.parametrize("config, wanted", [
    ({"shift": 3}, 3), ({"flow_shift": 8.0}, 8), ({"shift": None, "flow_shift": 2.0}, 2), ({}, 5), (None, 5)])
def test_the_shift_of_sampling_is_the_folders_by_either_name(config, wanted, tmp_path):
    if config is not None:
        (tmp_path / "scheduler").mkdir()
        write(tmp_path / "scheduler" / "scheduler_config.json", json.dumps(config))
    assert Published(tmp_path, "cpu").shift() == wanted


def test_prompts_are_cleaned_as_published():
    pytest.importorskip("ftfy")
    assert clean_prompt(" a &amp;lt;b \n\t caf\u00c3\u00a9 ") == "a <b caf\u00e9"


def stub(monkeypatch, **functions):
    """A VAE's model with two channels of mean 1, 2 and std 2, 4, and some functions of its own."""
    config = SimpleNamespace(latents_mean=[1.0, 2.0], latents_std=[2.0, 4.0], scale_factor_temporal=4,
                             scale_factor_spatial=8)
    model = SimpleNamespace(config=config, **functions)
    model.to = model.eval = lambda *_: model
    monkeypatch.setattr(full_pixels, "optional", lambda *_: SimpleNamespace(AutoencoderKLWan=None))
    monkeypatch.setattr(full_pixels, "loaded", lambda *_, **options: model)


def test_latents_are_normalised_and_pixels_in_range_and_what_is_not_finite_is_told(tmp_path, monkeypatch):
    """(x - mean) / std of each channel, and back; from -1 to 1 as 0 to 1."""
    (tmp_path / "vae").mkdir()
    made = lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x[:, :2]))
    stub(monkeypatch, encode=made, decode=lambda x: SimpleNamespace(sample=x))
    vae, x = VAE(tmp_path), torch.tensor([[3.0, 10.0]])[:, None, :, None, None]
    assert torch.equal(vae.encode((x + 1) / 2).flatten(), torch.tensor([1.0, 2.0]))
    y = vae.decode(torch.tensor([[-0.25, -1.0], [-5.0, 5.0]])[:, None, :, None, None])
    assert torch.equal(y.flatten(), torch.tensor([0.75, 0.0, 0.0, 1.0]))
    for words, call in (("latents", vae.encode), ("pixels", vae.decode)):
        with pytest.raises(ValueError, match=f"1 of 2 {words} are not finite"):
            call(torch.tensor([[1.0, math.nan]])[:, None, :, None, None])


def test_a_vae_of_other_channels_is_told_and_clips_are_side_by_side(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    stub(monkeypatch)
    parts = Published(tmp_path, "cpu")
    with pytest.raises(ValueError, match="makes 2 channels, expected 16"):
        parts.open_vae(16)
    video = torch.rand(2, 5, 3, 4, 6)
    parts.vae = SimpleNamespace(decode=lambda latents: video)
    made = parts.pixels(None)
    wanted = (255 * torch.cat([*video], -1)).round().byte().permute(0, 2, 3, 1)
    assert np.array_equal(made, wanted)


def test_each_prompt_has_its_own_embedding(monkeypatch):
    encode = lambda prompts: torch.tensor([[[float(prompt)]] for prompt in prompts])
    monkeypatch.setattr(full_pixels, "TextEncoder", lambda *_: encode)
    parts = Published("folder", "cpu")
    parts.read_prompts(["3", "1", "2"], torch.float32)
    assert [parts.text(prompt).tolist() for prompt in "123"] == [[[[1.0]]], [[[2.0]]], [[[3.0]]]]


def test_what_is_no_file_in_a_published_folder_is_told(tmp_path):
    (tmp_path / "vae").mkdir(), os.mkfifo(tmp_path / "vae" / "config.json")
    with pytest.raises(ValueError, match="config.json is neither a file nor a folder"):
        part_of(tmp_path, "vae")


def test_others_may_log_again_after_a_folder_was_read():
    kind = SimpleNamespace(from_pretrained=lambda folder: 1 / 0)
    with pytest.raises(ValueError, match="folder cannot be loaded: division"):
        loaded(kind, "folder")
    assert logging.root.manager.disable == 0


def test_files_have_the_rate_asked_for(tmp_path):
    """A GIF goes on for ever."""
    imageio, frames = pytest.importorskip("imageio.v3"), np.zeros((5, 32, 32, 3), np.uint8)
    frames += np.arange(5, dtype=np.uint8)[:, None, None, None]  # of equal ones a GIF would keep one
    pytest.importorskip("imageio_ffmpeg")
    save(tmp_path / "a", [".gif", ".mp4"], None, frames, 8)
    assert imageio.immeta(tmp_path / "a.mp4", plugin="FFMPEG")["fps"] == 8
    info = Image.open(tmp_path / "a.gif").info
    assert info["loop"] == 0 and info["duration"] == pytest.approx(1000 / 8, abs=10)


@pytest.mark.parametrize("frames, shown", [(17, [*range(1, 18, 2)]), (2, [1, 2])])
def test_a_contact_sheet_shows_up_to_nine_frames_evenly_spread(frames, shown, tmp_path, monkeypatch):
    drawn, titles = [], []
    for name in ("tight_layout", "savefig"):
        monkeypatch.setattr(pyplot.Figure, name, lambda *given, **options: None)
    monkeypatch.setattr(pyplot.Axes, "imshow", lambda self, x, **options: drawn.append(x[0, 0, 0] + 1))
    monkeypatch.setattr(pyplot.Axes, "set_title", lambda self, text, **options: titles.append(text))
    pixels = np.arange(frames, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    full_pixels.write_contact_sheet(pixels, tmp_path / "a.png")
    assert drawn == shown and titles == [f"frame {number}" for number in shown]


ROWS = [{"prompt_en": "a cat", "aug_prompt_en": "a very small cat"}, {"prompt_en": "b", "aug_prompt_en": "c"}]


@pytest.mark.parametrize("layout", ["lines", "list", "text"])
@pytest.mark.parametrize("seeds", ["per-prompt", "running"])
def test_prompts_of_vbench_name_a_clip_by_one_text_and_make_it_from_the_other(layout, seeds, tmp_path):
    """Two clips of each, seeds from 7: anew for every prompt, or running over all samples."""
    text = {"lines": "\n".join(map(json.dumps, ROWS)), "list": json.dumps(ROWS, indent=1), "text": "a cat\nb"}
    options = ["--prompts", str(write(tmp_path / "p", text[layout])), "--per-prompt", "2", "--seeds", seeds]
    clips = clips_of(sample.parse([*options, "--seed", "7", "--out", str(tmp_path / "o")]), [".gif"])
    key = "prompt_en" if layout == "text" else "aug_prompt_en"
    wanted = [(row[key], seed, tmp_path / "o" / f"{row['prompt_en']}-{i}")
              for row, pair in zip(ROWS, [(7, 8), (9, 10) if seeds == "running" else (7, 8)])
              for i, seed in enumerate(pair)]
    assert clips == wanted


def test_a_prompt_that_comes_twice_takes_its_seeds_twice_and_keeps_its_last_clip(tmp_path):
    rows = [*ROWS, ROWS[0] | {"aug_prompt_en": "another"}, {"prompt_en": "d", "aug_prompt_en": "e"}]
    options = ["--prompts", str(write(tmp_path / "p", json.dumps(rows))), "--seeds", "running"]
    clips = clips_of(sample.parse([*options, "--out", str(tmp_path / "o")]), [".gif"])
    assert {stem.name: (text, seed) for text, seed, stem in clips} == {
        "a cat-0": ("another", 2), "b-0": ("c", 1), "d-0": ("e", 3)}


def test_a_text_may_begin_with_a_bracket(tmp_path):
    options = ["--prompts", str(write(tmp_path / "p", "[a cat] sits\nb")), "--out", str(tmp_path / "o")]
    assert [text for text, *_ in clips_of(sample.parse(options), [".gif"])] == ["[a cat] sits", "b"]


def test_long_prompts_have_names_of_their_own_that_a_file_can_have(tmp_path):
    """Also where the cut goes through a letter; the short ones are named as they are."""
    prompts = ["short", *(f"{start}{150 * 'ä'}{end}" for start in ("", "a") for end in "12")]
    clips = clips_of(sample.parse(["--prompt", *prompts, "--out", str(tmp_path)]), [".safetensors"])
    names = [stem.name for *_, stem in clips]
    assert len({*names}) == 5 and names[0] == "short-0"
    for name in names:
        (tmp_path / f"{name}.safetensors").touch()


def test_a_clip_is_made_again_where_one_of_its_files_is_missing(tmp_path):
    args = sample.parse(["--prompt", "a", "b", "--out", str(tmp_path)])
    for name in ("a-0.gif", "b-0.gif", "b-0.png"):
        (tmp_path / name).touch()
    assert [text for text, *_ in clips_of(args, [".gif", ".png"])] == ["a"]


@pytest.mark.parametrize("prompts, words", [(["a", " "], "--prompt is empty"), (["\udcff"], "is no UTF-8")])
def test_one_prompt_of_several_that_is_none_is_told(prompts, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        clips_of(sample.parse(["--prompt", *prompts, "--out", str(tmp_path)]), [".gif"])


@pytest.mark.parametrize("name, multiple", [("wan-1.3b", 16), ("wan-1.3b-causal", 32)])
def test_a_clip_has_the_size_asked_for_or_else_the_trained_one(name, multiple):
    """Width and height in whole patches, of a causal model in those of its past chunks."""
    config, _ = preset(name)
    shape = lambda made, *size: latent_shape(
        SimpleNamespace(**dict(zip(("frames", "height", "width"), size))), config, made, (4, 8))
    assert shape({}, None, None, None) == (21, 16, 60, 104)
    assert shape({"shape": (9, 16, 30, 52)}, None, None, 96) == (9, 16, 30, 12)
    assert shape({}, 9, 64, 96) == (3, 16, 8, 12)
    for side, size in (("height", (9, 64 + multiple // 2, 96)), ("width", (9, 64, 96 + multiple // 2))):
        with pytest.raises(ValueError, match=f"{side} is .*, expected a multiple of {multiple}"):
            shape({}, *size)


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-1.3b-causal"])
def test_of_a_video_25_frames_are_given_if_nothing_is_said(name, monkeypatch):
    """The most whole chunks of as many; never the whole clip."""
    asked = []
    monkeypatch.setattr(full_pixels, "read_video", lambda *given: (asked.append(given) or given, None))
    parts, (config, shape) = Published("folder", "cpu"), preset(name)
    parts.latents = lambda video: video
    args = SimpleNamespace(context=None, image=None, video="a.mp4", chunks=None, given=None)
    assert context_of(args, config, shape, parts) == asked[0] == ("a.mp4", 25, 480, 832)
    args.given = 25
    with pytest.raises(ValueError, match="25 frames of --video are given, expected"):
        context_of(args, config, (7, *shape[1:]), parts)


def test_names_that_are_no_folders_are_looked_for_on_the_hub(tmp_path, monkeypatch):
    """AUTHOR/MODEL with its revision; a folder of that name comes first; no network or package: told."""
    hub = SimpleNamespace(asked=[])
    files = ["vae/config.json", "x.safetensors", "merges.txt", "spiece.model", "x.bin", "x.py", "x.pth"]

    def download(name, revision, allow_patterns, ignore_patterns):
        hub.asked.append((name, revision, ignore_patterns))
        fetched = {file for file in files if any(fnmatch.fnmatch(file, form) for form in allow_patterns)}
        assert fetched == {*files[:4]}, "weights, configs and tokenizers, nothing that runs code"
        if "none" in name:
            raise Exception("cannot reach the hub\nmore of it")  # of whatever kind
        return str(tmp_path / "cache")

    hub.snapshot_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nvidia" / "here").mkdir(parents=True)
    for name in ("nvidia/here", "/no/folder", "../folder", "./folder", "no/such/folder", "folder"):
        assert find(name) == Path(name)
    assert find("nvidia/AnyFlow", "main") == tmp_path / "cache"
    assert find("nvidia/AnyFlow", ignore="vae/*") == tmp_path / "cache"
    assert hub.asked == [("nvidia/AnyFlow", "main", None), ("nvidia/AnyFlow", None, "vae/*")]
    for name, module in (("nvidia/none", hub), ("nvidia/other", None)):
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        with pytest.raises(SystemExit, match=f"no folder {name}") as refusal:
            run("--model", name)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("command, needless", [
    (f"train.py flowmap --preset tiny --init {__name__}/x --out OUT", "text_encoder/*"),
    (f"full.prepare --preset tiny --init {__name__}/x --videos . --data OUT --negative no", "transformer/*"),
    (f"sample.py --parts {__name__}/x --out OUT", "transformer/*"),
    (f"sample.py --model {__name__}/x --out OUT", None)])
def test_commands_fetch_of_a_hub_what_they_need(command, needless, tmp_path, monkeypatch):
    asked = []
    hub = SimpleNamespace(snapshot_download=lambda name, **options: asked.append(options) or 1 / 0)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    program, *options = command.replace("OUT", str(tmp_path / "out")).split()
    with pytest.raises(SystemExit):
        importlib.import_module(program.removesuffix(".py")).main(options)
    assert [options["ignore_patterns"] for options in asked] == [needless]


@pytest.mark.parametrize("named, wanted", [("euler", "euler"), (None, "consistency")])
def test_options_of_the_command_line_reach_the_sampler(named, wanted, monkeypatch, tmp_path):
    """The sampler is the folder's own if none is named. A seed is one noise, drawn channels first as the
    published pipelines draw it."""
    asked = {}

    def generate(model, text, noise, steps, **options):
        asked.update(options, text=text, noise=noise, steps=steps)
        raise ValueError("stop here")

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "sampler_of_folder", lambda folder: "consistency")
    said = ["a fast blue cross moving up", "a slow red disc moving left"]
    given = ["--times", "1", "0.25", "0", "--shift", "3", "--guidance", "2", "--chunks", "1", "4", "4"]
    given += ["--padding", "--seed", "5", "--prompt", said[0], "--negative", said[1]]
    given += ["--sampler", named] if named else []
    with pytest.raises(SystemExit, match="stop here"):
        sample.main([*given, "--out", str(tmp_path / "a.gif")])
    prompts = [embed(torch.tensor([parse_prompt(words)])) for words in said]
    assert torch.equal(asked["text"], prompts[0]) and torch.equal(asked["null_text"], prompts[1])
    assert torch.equal(asked["steps"], torch.tensor([1, 0.25, 0], dtype=torch.float64))
    noise = torch.randn(1, 3, 9, 12, 12, generator=torch.Generator().manual_seed(5)).transpose(1, 2)
    assert torch.equal(asked["noise"], noise)
    names = ("shift", "guidance", "chunks", "padding", "sampler", "context")
    assert [asked[name] for name in names] == [3.0, 2.0, [1, 4, 4], True, wanted, None]


def test_a_null_prompt_of_one_row_and_another_length_serves_a_batch_of_embeddings(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(sample, "generate", lambda *inputs, **options: asked.update(options) or 1 / 0)
    texts = {"text": torch.randn(2, 4, 32), "null_text": torch.randn(1, 3, 32)}
    save_file(texts, tmp_path / "text.safetensors")
    with pytest.raises(SystemExit, match="division by zero"):
        sample.main(["--text", str(tmp_path / "text.safetensors"), "--guidance", "2",
                     "--out", str(tmp_path / "a.safetensors")])
    assert asked["null_text"].shape == (2, 3, 32)


def test_every_clip_of_the_command_line_has_its_prompt_and_its_seed(monkeypatch, tmp_path):
    """Noise of SEED + i, and torch's generator there, for samplers that draw more; and the budget."""
    asked, said = [], ["a fast blue cross moving up", "a slow red disc moving left"]

    def stream(model, text, noise, steps, *, budget, **options):
        asked.append((text, noise, torch.initial_seed(), budget))
        raise ValueError("stop here")

    monkeypatch.setattr(sample, "stream", stream)
    with pytest.raises(SystemExit, match="4 of 4 clips failed"):
        sample.main(["--prompt", *said, "--per-prompt", "2", "--seed", "5", "--budget", "20",
                     "--out", str(tmp_path)])
    clips = itertools.product(said, (5, 6))
    for (text, noise, seed, budget), (words, wanted) in zip(asked, clips, strict=True):
        fresh = torch.randn(1, 3, 9, 12, 12, generator=torch.Generator().manual_seed(wanted)).transpose(1, 2)
        assert torch.equal(text, embed(torch.tensor([parse_prompt(words)]))) and torch.equal(noise, fresh)
        assert (seed, budget) == (wanted, 20)


BAD = {
    "one column|prompt 1: aug_prompt_en is missing": lambda f, t: [
        "--prompts", write(t / "p.json", json.dumps({"prompt_en": "a cat"})), "--out", t / "o"],
    "a column of numbers|prompt 2: prompt_en is 3, expected text": lambda f, t: [
        "--prompts", write(t / "p", json.dumps([ROWS[0], ROWS[1] | {"prompt_en": 3}])), "--out", t / "o"],
    "a list of texts|prompt 1 holds str, expected an object": lambda f, t: [
        "--prompts", write(t / "p", '["a cat", "a dog"]'), "--out", t / "o"],
    "half a list|is no JSON": lambda f, t: ["--prompts", write(t / "p", '[{"prompt_en": '), "--out", t / "o"],
    "no negative|no file": lambda f, t: ["--negative", f"@{t / 'n'}", "--out", t / "a.gif"],
    "no VAE|has no vae": lambda f, t: (shutil.rmtree(f / "vae"), ["--out", t / "a.gif"])[1],
    "no tokenizer|has no tokenizer": lambda f, t: (shutil.rmtree(f / "tokenizer"), ["--out", t / "a.gif"])[1],
    "no prompts|has no prompt, expected": lambda f, t: [
        "--prompts", write(t / "p.txt", "\n \n"), "--out", t / "o"],
    "no file or folder|no file": lambda f, t: ["--prompts", t / "none", "--out", t / "o"],
    "empty prompt|--prompt is empty": lambda f, t: ["--prompt", " ", "--out", t / "a.gif"],
    "no image|is no image": lambda f, t: ["--image", write(t / "a.png", "?"), "--out", t / "a.gif"],
    "16 bits|mode I;16, expected 8 bits": lambda f, t: [
        "--image", drawn(t / "a.png", Image.new("I;16", (96, 64))), "--out", t / "a.gif"],
    "one latent frame|context has 1 frames, expected 1 or more, below 1": lambda f, t: [
        "--image", drawn(t / "a.png", Image.new("L", (96, 64))), "--frames", 1, "--out", t / "a.gif"],
    "no parts|no folder .*/gone": lambda f, t: ["--parts", t / "gone", "--out", t / "a.gif"],
    "half a text encoder|text_encoder lacks": lambda f, t: drop(f / "text_encoder" / "model.safetensors", t),
    "damaged tokenizer|tokenizer cannot be loaded": lambda f, t: [
        "--out", t / "a.gif", write(f / "tokenizer" / "tokenizer.json", "{")][:2],
    "not a number|96 of 16384 embeddings are not finite": lambda f, t: drop(
        f / "text_encoder" / "model.safetensors", t, math.nan),
    "no video|is no video": lambda f, t: ["--video", write(t / "a.mp4", "?" * 400), "--out", t / "a.gif"],
    "missing video|no file": lambda f, t: ["--video", t / "none.mp4", "--out", t / "a.gif"],
    "short video|has 30 frames at 16 frames a second, expected 33": lambda f, t: [
        "--video", movie(t / "b.mp4"), "--given", 33, "--frames", 37, "--chunks", 1, 8, 1,
        "--out", t / "a.gif"],
    "inside a chunk|7 frames of --video are given": lambda f, t: [
        "--video", movie(t / "b.mp4"), "--given", 7, "--out", t / "a.gif"],
    "frames|frames are 16, expected 1 more": lambda f, t: ["--frames", 16, "--out", t / "a.gif"],
    "height|height is 65, expected a multiple of": lambda f, t: ["--height", 65, "--out", t / "a.gif"],
    "unwritable|Not a directory|File exists": lambda f, t: ["--out", write(t / "file", "") / "a.gif"],
    "a file for several|expected a folder": lambda f, t: ["--per-prompt", 2, "--out", t / "a.gif"],
}


def write(path, text):
    path.write_text(text)
    return path


def drawn(path, image):
    image.save(path)
    return path


def drop(path, folder, value=None):
    """Leave out one tensor of a file, or fill it with a value."""
    tensors = load_file(path)
    name = "encoder.final_layer_norm.weight"
    if value is None:
        del tensors[name]
    else:
        tensors[name].fill_(value)
    save_file(tensors, path, metadata={"format": "pt"})
    return ["--out", folder / "a.gif"]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(folder, case, tmp_path):
    copy = tmp_path / "folder"
    shutil.copytree(folder[1], copy)
    wanted = case.split("|", 1)[1]
    with pytest.raises(SystemExit, match=wanted) as refusal:
        run("--model", copy, "--prompt", "the cat", *SIZE, *BAD[case](copy, tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("module", ["diffusers", "transformers", "imageio_ffmpeg"])
def test_what_is_not_installed_is_named(folder, module, tmp_path, monkeypatch):
    """What is missing, and how to install it; latents from embeddings still come."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=f"needs {module} .*pip install"):
        run("--model", folder[1], "--prompt", "the cat", *SIZE, "--out", tmp_path / "a.mp4")
    save_file({"text": torch.randn(2, 7, 32)}, tmp_path / "text.safetensors")
    run("--model", folder[1], "--text", tmp_path / "text.safetensors", *SIZE, "--out", tmp_path / "latents")
    latents = load_file(tmp_path / "latents.safetensors")["latents"]
    assert latents.shape == (2, 5, 16, HEIGHT // 8, WIDTH // 8)


def test_too_little_memory_is_told_what_is_needed(folder, tmp_path, monkeypatch):
    """One sentence: what needs less, and the command that says how much."""

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore of it")

    monkeypatch.setattr(sample, "generate", full)
    wanted = r"CUDA out of memory.*Fewer --frames, .*--height and --width need less; python -m full\.plan "
    with pytest.raises(SystemExit, match=wanted) as refusal:
        run("--model", folder[1], "--prompt", "the cat", *SIZE, "--out", tmp_path / "a.gif")
    assert "\n" not in str(refusal.value)


def test_what_is_transparent_lies_on_white(tmp_path):
    """Whatever colour a pixel keeps there; half of it is the mean."""
    image = Image.new("RGBA", (96, 64), (255, 0, 255, 0))
    image.paste((255, 0, 255, 128), (0, 0, 48, 64))
    frame = read_image(drawn(tmp_path / "a.png", image), 64, 96)[0][0]
    assert (frame[:, :, 50:] == 1).all() and torch.allclose(frame[:, 0, 0], torch.tensor([1, 127 / 255, 1.0]))


def test_prompts_that_are_there_twice_are_told(folder, tmp_path, capsys):
    prompts = write(tmp_path / "p.txt", "a cat\na dog\na cat\n")
    run("--model", folder[1], "--prompts", prompts, *SIZE, "--out", tmp_path / "o")
    assert "1 of 3 prompts are another's copy" in capsys.readouterr().out
    assert len([*(tmp_path / "o").glob("*.mp4")]) == 2


def test_another_aspect_is_cropped_and_said(folder, pixels, tmp_path, capsys):
    Image.new("RGB", (200, 100), "red").save(tmp_path / "wide.png")
    options = ["--prompt", "the cat", *SIZE, "--image", tmp_path / "wide.png", "--out", tmp_path / "a.gif"]
    run("--model", folder[1], *options)
    said = "wide.png: of another aspect than 96 x 64, used the middle, 150 x 100 of 200 x 100"
    assert said in capsys.readouterr().out
    assert json.loads((Path(folder[1]) / "scheduler" / "scheduler_config.json").read_text())["shift"] == 3
