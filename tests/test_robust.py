"""What comes from outside may be broken or hostile: it runs no code, mixes no data, ends in a sentence."""

import fcntl
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_train import Codec, refused, run, weights

import sample
import train
from full import checkpoint, parallel, pixels, plan, prepare
from full.data import Shards, preset
from full.files import (
    WEIGHTS,
    append,
    compressed_patches,
    hold,
    provenance,
    read_json,
    read_log,
    text_of,
    write_json,
)
from full.options import command, device_of, reason
from model import Wan
from toy import flow2d, page, video
from toy.video import STORY, write_shards
from toy.world import World

ROOT = Path(__file__).parents[1]
TINY = ["teacher", "--preset", "tiny", "--batch", "4", "--steps", "2", "--save-every", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("made") / "run"
    run(*TINY, "--out", folder)
    return folder


@pytest.fixture
def kept(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


class Command:
    """What a crafted pickle holds: it runs where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_metadata_of_a_checkpoint_runs_no_code(made, tmp_path):
    for name in ("command", "bytes"):
        folder = shutil.copytree(made / "checkpoints" / "step-0000002", tmp_path / name)
        metadata = checkpoint.Reader(folder).read_metadata()
        if name == "command":
            metadata.planner_data = Command(tmp_path / "ran")
        else:  # torch unpickles what such an entry stands for
            key = next(iter(metadata.state_dict_metadata))
            metadata.state_dict_metadata[key] = checkpoint.dcp.metadata.BytesStorageMetadata()
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        net = torch.nn.Linear(1, 1, bias=False)
        write_json(folder / "checksums.json", checkpoint.checksums(folder))  # an attacker knows how to sum
        with pytest.raises(ValueError):
            checkpoint.Run({"student": net}, {}, Path("none"), {}).load(folder)
        with pytest.raises(ValueError, match="expected descriptions of tensors alone"):
            checkpoint.Reader(folder).read_metadata()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [3, None, []])
def test_metadata_that_is_none_is_told_in_one_sentence(value, made, tmp_path, caplog):
    folder = shutil.copytree(made / "checkpoints" / "step-0000002", tmp_path / "step-0000002")
    (folder / ".metadata").write_bytes(pickle.dumps(value))
    write_json(folder / "checksums.json", checkpoint.checksums(folder))
    settings = read_json(folder / "settings.json")
    run = checkpoint.Run({"student": torch.nn.Linear(1, 1)}, {}, tmp_path, settings)
    with pytest.raises(checkpoint.Damaged, match=f"cannot read checkpoint {folder}: "):
        run.load(folder)
    assert not caplog.records


def test_checkpoint_reads_no_file_outside_its_folder(made, tmp_path):
    folder = shutil.copytree(made / "checkpoints" / "step-0000002", tmp_path / "out")
    metadata = checkpoint.Reader(folder).read_metadata()
    for name in ("../x.distcp", "/x.distcp", "a/x.distcp"):
        next(iter(metadata.storage_data.values())).relative_path = name
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match="expected no folder"):
            checkpoint.Reader(folder).read_metadata()


def small(folder, inputs=2, **settings):
    """A run of one linear layer, before its first step."""
    nets = {name: torch.nn.Linear(inputs, 1, bias=False) for name in ("student", "fake")}
    adam = {name: torch.optim.AdamW(net.parameters(), 0.1) for name, net in nets.items()}
    return checkpoint.Run(nets, adam, folder, settings)


def saved(folder, *steps, **options):
    run_ = small(folder, **options)
    for run_.step in steps:
        run_.save()
    return run_


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    run_ = small(tmp_path)
    (run_.folder / "step-0000003.bak").mkdir(parents=True)  # of a careful user
    saved(tmp_path, 1, 2, 3, 10)
    assert [path.name for path in run_.all()] == ["step-0000003", "step-0000010"]
    assert {*run_.folder.iterdir()} == {*run_.all(), run_.folder / "step-0000003.bak"}
    assert run_.newest() == f"the last whole checkpoint is {run_.all()[1]}"


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    """Torch says so by what is no Exception."""
    run_ = saved(tmp_path, 1)
    full = checkpoint.CheckpointException("long", {0: (OSError("No space left"), None)})
    monkeypatch.setattr(checkpoint.dcp, "save", mock.Mock(side_effect=full))
    run_.step = 2
    with pytest.raises(OSError, match="cannot save .*step-0000002: No space left; the last whole .*0000001$"):
        run_.save()
    assert [path.name for path in run_.folder.iterdir()] == ["step-0000001"]


def test_a_run_begins_as_with_a_fresh_optimiser(tmp_path):
    """Though a checkpoint needs the state that AdamW makes at its first gradient."""
    run_ = small(tmp_path)
    net = run_.nets["student"]
    fresh = torch.nn.Parameter(net.weight.detach().clone())
    net.weight.grad = fresh.grad = torch.tensor([[1.0, -3.0]])
    for optimiser in (run_.optimisers["student"], torch.optim.AdamW([fresh], 0.1)):
        optimiser.step(), optimiser.step()
    assert torch.equal(net.weight, fresh)


@pytest.mark.parametrize("place", [0.01, 0.99])
def test_every_file_of_a_checkpoint_is_held_against_its_checksum(place, tmp_path):
    """Also a large one, from its first to its last bytes; and the list of checksums itself."""
    folder = saved(tmp_path, 1, inputs=200_000).all()[0]
    names = {path.name for path in folder.iterdir()}
    assert {".metadata", "settings.json", "checksums.json"} < names
    for path in [*folder.iterdir()]:
        whole = path.read_bytes()
        at = int(place * len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        words = f"damaged: {re.escape(path.name)} changed"
        words = "half-written" if path.name == "checksums.json" else words
        with pytest.raises(checkpoint.Damaged, match=words):
            small(tmp_path, inputs=200_000).load(folder)
        path.write_bytes(whole)
    small(tmp_path, inputs=200_000).load(folder)
    (folder / "settings.json").unlink(), os.mkfifo(folder / "settings.json")
    with pytest.raises(checkpoint.Damaged, match="settings.json changed"):  # and not waited for
        small(tmp_path).load(folder)
    (folder / "checksums.json").write_text("3")
    with pytest.raises(checkpoint.Damaged, match="half-written"):
        small(tmp_path).load(folder)


def test_a_checkpoint_that_names_a_file_it_lacks_is_damaged(tmp_path):
    """By its own list of contents, whose checksum is right."""
    folder = saved(tmp_path, 1).all()[0]
    metadata = checkpoint.Reader(folder).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "x.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    write_json(folder / "checksums.json", checkpoint.checksums(folder))
    with pytest.raises(checkpoint.Damaged, match=f"cannot read checkpoint {folder}: .*x.distcp"):
        small(tmp_path).load(folder)


@pytest.mark.parametrize("mine, words", [
    (dict(share=1, lr=0.5), "share True -> 1$"), (dict(share=True, lr=0.5, new=2), "new None -> 2$"),
    (dict(share=True), "lr 0.5 -> None$")])
def test_resume_takes_no_other_settings(mine, words, tmp_path):
    """Not even those of another type, nor one more or one less."""
    saved(tmp_path, 1, share=True, lr=0.5)
    with pytest.raises(ValueError, match=f"made with other settings: {words}"):
        small(tmp_path, **mine).resume()


@pytest.mark.parametrize("part", ["student", "fake", "average"])
def test_no_part_of_a_checkpoint_is_saved_that_is_not_finite(part, tmp_path):
    run_ = saved(tmp_path, 1)
    weight = run_.average["weight"] if part == "average" else run_.nets[part].weight
    weight.data[0, 1], run_.step = float("nan"), 2
    with pytest.raises(FloatingPointError, match="step 2: weights are not finite after it; the last whole"):
        run_.save()
    assert [path.name for path in run_.folder.iterdir()] == ["step-0000001"]


def test_the_average_takes_the_place_of_the_weights_for_a_while(tmp_path):
    run_ = small(tmp_path)
    own = run_.nets["student"].weight.detach().clone()
    run_.average["weight"] += 1
    with pytest.raises(RuntimeError, match="full"), run_.averaged() as net:
        assert torch.equal(net.weight, own + 1)
        raise RuntimeError("a full disk")
    assert torch.equal(run_.nets["student"].weight, own)


def test_the_average_is_what_is_exported(tmp_path):
    """In float32, also where the network before training is of bfloat16."""
    recipe, make = train.Recipe(lora=0), lambda: Wan(replace(preset("tiny")[0], num_layers=1))
    run_ = checkpoint.Run({"student": make()}, {}, tmp_path, {"stage": "teacher"})
    for p in run_.average.values():
        p += 0.001
    run_.export(tmp_path, lambda: make().bfloat16(), recipe)
    made = weights(tmp_path)
    assert made.keys() == run_.average.keys() and provenance(tmp_path) == {"stage": "teacher"}
    assert all(torch.equal(made[key], p) for key, p in run_.average.items())


def test_sigterm_to_another_process_stops_this_one(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(checkpoint.anyflow, "sum_over_processes", lambda x: x + 1)
    assert checkpoint.Stop(torch.device("cpu"))


def test_published_folders_run_no_code(tmp_path, monkeypatch):
    """Pickled weights and a tokenizer with code of its own are refused, without a question."""
    pytest.importorskip("transformers"), pytest.importorskip("diffusers")
    from test_sample import published

    from full.pixels import VAE, TextEncoder

    published(tmp_path / "wan", "causal", text_dim=32)
    for part, file, make in (("vae", "diffusion_pytorch_model", VAE), ("text_encoder", "model", TextEncoder)):
        folder = tmp_path / "wan" / part
        state = load_file(folder / f"{file}.safetensors")
        (folder / f"{file}.safetensors").unlink()
        name = file if part == "vae" else "pytorch_model"
        torch.save(state, folder / f"{name}.bin")
        with pytest.raises(ValueError, match=f"{part} cannot be loaded"):
            make(tmp_path / "wan")
        save_file(state, folder / f"{file}.safetensors", metadata={"format": "pt"})
    code = tmp_path / "wan" / "tokenizer"
    config = json.loads((code / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (code / "tokenizer_config.json").write_text(json.dumps(config))
    (code / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    try:
        TextEncoder(tmp_path / "wan")
    except ValueError as error:
        assert "tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("values", ["x", 3, None, [], ["x", "x"], [1.0], [1.0, 0.0], [1.0, float("nan")]])
def test_vae_whose_std_is_not_numbers_above_0_is_told(values, tmp_path, monkeypatch):
    model = SimpleNamespace(config=SimpleNamespace(latents_mean=[0.0, 0.0], latents_std=values))
    model.to = model.eval = lambda *_: model
    monkeypatch.setattr(pixels, "optional", lambda *_: SimpleNamespace(AutoencoderKLWan=None))
    monkeypatch.setattr(pixels, "loaded", lambda *_, **options: model)
    (tmp_path / "vae").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/vae: latents_.*number"):
        pixels.VAE(tmp_path)


def began(*args, until, **options):
    """A process of ours, at work: until() is true."""
    process = subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)
    deadline = time.time() + 120
    while not until():
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.02)
    return process


def rows(folder):
    return (folder / "log.jsonl").read_text().count("\n") if (folder / "log.jsonl").exists() else 0


LONG = ["train.py", "teacher", "--preset", "tiny", "--batch", "4", "--steps", "100000", "--save-every"]


@pytest.mark.slow
def test_second_run_on_a_folder_is_told_who_holds_it_and_sigterm_saves(tmp_path):
    """The lock falls with the process; SIGTERM, which clusters send first, loses no step."""
    folder, saved = tmp_path / "out", lambda: list((tmp_path / "out").glob("checkpoints/step-*"))
    first = began(*LONG, "1", "--out", folder, until=saved)
    second = subprocess.run([sys.executable, *LONG, "1", "--out", folder, "--resume"], cwd=ROOT,
                            capture_output=True, text=True)
    said = second.stderr.strip().splitlines()
    assert second.returncode and f"in use by process {first.pid}" in said[-1] and len(said) == 1
    first.kill(), first.wait()
    shutil.rmtree(folder / "checkpoints")
    third = began(*LONG, "5", "--out", folder, until=saved)
    third.terminate()
    said = third.communicate(timeout=60)[1].strip().splitlines()[-1]
    step = max(int(path.name[5:]) for path in saved())
    assert third.returncode == 1 and f"SIGTERM: saved step {step}" in said and rows(folder) == step
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_agree_on_the_step_that_they_save(how, tmp_path, monkeypatch):
    """Whether torchrun is asked to end or killed: its ranks save one step and end, and --resume goes on."""
    folder = tmp_path / "out"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    saved = lambda: [int(path.name[5:]) for path in folder.glob("checkpoints/step-*")]
    process = began(*launch, *LONG, "5", "--out", folder, until=saved)
    listed = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    children = subprocess.run(listed, capture_output=True, text=True)
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]  # until the ranks, too, have ended
    steps = re.findall("SIGTERM: saved step ([0-9]+)", said)
    assert steps == 2 * [str(max(saved()))] and rows(folder) == max(saved())
    assert not list(folder.glob("checkpoints/.*"))
    alive = lambda pid: Path(f"/proc/{pid}").exists() and ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    pids, deadline = children.stdout.split(), time.time() + 30
    while any(map(alive, pids)):
        assert time.time() < deadline
        time.sleep(0.1)
    monkeypatch.setattr(checkpoint.Stop, "__bool__", lambda _: True)  # after one step more
    assert f"saved step {int(steps[0]) + 1} " in refused(*LONG[1:], "5", "--out", folder, "--resume")
    assert len(pids) >= 2


@pytest.mark.slow
def test_process_whose_others_do_not_come_ends(monkeypatch):
    """Not after half an hour; with how many were found."""
    known = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}
    for key, value in known.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(parallel, "end_with_parent", lambda: None)
    monkeypatch.setattr(parallel, "timedelta", lambda minutes: timedelta(seconds=2))
    with pytest.raises(RuntimeError, match="1/2 clients joined"):
        parallel.start_processes("cpu", "float32")


def test_nothing_writes_into_a_folder_that_it_reads(made, tmp_path):
    start = shutil.copytree(made, tmp_path / "start", ignore=lambda *_: ["checkpoints", ".lock"])
    hub = tmp_path / "hub"
    shutil.copytree(start, hub / "transformer")
    options = ["flowmap", "--preset", "tiny", "--batch", "4", "--steps", "1"]
    for init, out in ((start, tmp_path / "new" / ".." / "start"), (hub, hub), (hub, hub / "transformer")):
        assert refused(*options, "--init", init, "--out", out)
    assert not (hub / "config.json").exists()
    before = weights(made)
    assert all(torch.equal(value, before[key]) for key, value in weights(start).items())


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(tmp_path):
    message = refused(*TINY[:-4], "--steps", "1", "--warmup", "0", "--lr", "1e38", "--clip", "1e38", "--out",
                      tmp_path / "out")
    assert "not finite" in message and not (tmp_path / "out" / WEIGHTS).exists()
    assert not list((tmp_path / "out" / "checkpoints").glob("*"))


def test_data_is_the_folder_and_its_sizes_wherever_one_stands(tmp_path, monkeypatch):
    for place, clips in (("a", 8), ("b", 12)):
        write_shards(World(), tmp_path / place / "shards", clips, seed=0)
    options = [*TINY, "--data", "shards", "--out", tmp_path / "out"]
    monkeypatch.chdir(tmp_path / "a")
    run(*options)
    assert read_json(tmp_path / "out" / "anyflow.json")["data"] == str(tmp_path / "a" / "shards")
    run(*TINY, "--data", "../a/shards", "--out", tmp_path / "out", "--resume")
    monkeypatch.chdir(tmp_path / "b")
    message = refused(*options, "--resume")
    assert "data " in message and "bytes " in message and "clips 8 -> 12" in message


def test_shards_are_not_mixed_nor_cut(tmp_path, capsys):
    write_shards(World(), tmp_path / "x", 8, seed=0, size=4)
    write_shards(World(), tmp_path / "x", 8, seed=0, size=4)
    with pytest.raises(ValueError, match="holds other shards"):
        write_shards(World(), tmp_path / "x", 4, seed=0, size=4)
    data = Shards(tmp_path / "x", World().shape, 32)
    cut = tmp_path / "x" / "shard-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{cut} has 5000 bytes"):
        data.batch(range(8), seed=0)
    first = tmp_path / "x" / "shard-00000.safetensors"
    save_file({"latents": torch.zeros(4, *World().shape), "text": torch.zeros(4, 7, 32)}, first)
    capsys.readouterr()
    write_shards(World(), tmp_path / "y", 4, seed=0)
    shutil.copy(tmp_path / "y" / "shard-00000.safetensors", tmp_path / "x" / "shard-00002.safetensors")
    assert len(Shards(tmp_path / "x", World().shape, 32, skip_bad=True)) == 4
    said = capsys.readouterr().err
    assert "skipped 2 bad" in said and str(first) in said and str(cut) in said


@pytest.mark.parametrize("null, latents, text, words", [
    ((1, 7, 32), (3, 2, 3, 4, 6), (2, 7, 32), r"latents \(3, 2, 3, 4, 6\) and text \(2, 7, 32\), expected"),
    ((1, 7, 32), (2, 2, 3, 6, 4), (2, 7, 32), r"latents \(2, 2, 3, 6, 4\) .*, expected \(n, 2, 3, 4, 6\)"),
    ((2, 7, 32), (2, 2, 3, 4, 6), (2, 7, 32), "null.safetensors has text .*, expected finite numbers"),
    ((1, 7, 16), (2, 2, 3, 4, 6), (2, 7, 16), "null.safetensors has text .*, expected finite numbers"),
    (None, (2, 2, 3, 4, 6), (2, 7, 32), "null.safetensors has text .*, expected finite numbers")])
def test_shards_of_other_shapes_and_a_null_prompt_that_is_none_are_told(null, latents, text, words, tmp_path):
    null = torch.full((1, 7, 32), float("inf")) if null is None else torch.zeros(null)
    save_file({"text": null}, tmp_path / "null.safetensors")
    save_file({"latents": torch.zeros(latents), "text": torch.zeros(text)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=words):
        Shards(tmp_path, (2, 3, 4, 6), 32)


def clips_of_videos(folder, rank=0, world=1, text_dim=32, codec=None, negative=""):
    """`prepare` of five videos into folder/out, two a shard; no ffmpeg: a video is its file's number."""
    folder.mkdir(exist_ok=True)
    for path in (folder / f"{i}.{ending}" for i in range(5) for ending in ("mp4", "txt")):
        if not path.exists():
            path.write_text(f"clip {path.stem}")
    codec = codec or Codec()
    shape = 3, 3, 4, 6
    return prepare.prepare(folder, folder / "out", shape, text_dim, codec, codec, negative, 2, rank, world)


def read_number(path, frames, height, width):
    return torch.full((frames, 3, height, width), int(path.stem) / 10), None


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(path.read_bytes()[:-700]), lambda path: path.write_bytes(b""),
    lambda path: save_file({"latents": torch.zeros(2, 3, 3, 4, 6), "text": torch.zeros(2, 7, 32)}, path),
    lambda path: save_file({key: rows[:1] for key, rows in load_file(path).items()}, path),
    lambda path: (path.unlink(), path.symlink_to(path.name))],
    ids=["cut", "empty", "of other text", "one clip short", "a link in a circle"])
def test_bad_shard_is_made_again(spoil, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "read_video", read_number)
    folder = tmp_path / "videos"
    assert clips_of_videos(folder) == (5, 0)
    path = folder / "out" / "000-000001.safetensors"
    spoil(path)
    assert clips_of_videos(folder) == (5, 0)
    rows = [json.loads(line) for line in open(folder / "out" / "manifest-000.jsonl")]
    assert sorted(row["video"] for row in rows) == [f"{i}.mp4" for i in range(5)]
    for row in rows:
        clip = load_file(folder / "out" / row["shard"])["latents"][row["row"]]
        video = read_number(folder / row["video"], 9, 32, 48)[0]
        assert torch.equal(clip, Codec().encode(video[None])[0].bfloat16())


def test_shard_that_no_manifest_names_is_no_second_copy(tmp_path, monkeypatch, capsys):
    """Of two processes one is killed before its manifest; one process goes on."""
    monkeypatch.setattr(prepare, "read_video", read_number)
    folder = tmp_path / "videos"
    clips_of_videos(folder, 0, 2), clips_of_videos(folder, 1, 2)
    (folder / "out" / "manifest-001.jsonl").unlink()
    clips_of_videos(folder)
    assert len(Shards(folder / "out", (3, 3, 4, 6), 32)) == 5
    assert "001-000000.safetensors: in no manifest" in capsys.readouterr().err


def test_two_processes_prepare_each_clip_once_and_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "read_video", read_number)
    folder = tmp_path / "videos"
    for _ in range(2):
        assert [clips_of_videos(folder, rank, 2) for rank in (0, 1)] == [(3, 0), (2, 0)]
    assert clips_of_videos(folder) == (3, 0), "its own; those of the other are in shards, too"
    assert len(Shards(folder / "out", (3, 3, 4, 6), 32)) == 5


def test_a_shard_that_is_damaged_twice_is_kept_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "read_video", read_number)
    folder = tmp_path / "videos"
    for times in range(3):
        assert clips_of_videos(folder) == (5, 0) and len([*folder.glob("out/*.damaged")]) == times
        max(folder.glob("out/[0-9]*.safetensors")).write_bytes(b"x")


def test_captions_and_the_null_prompt_are_what_their_files_say(tmp_path, monkeypatch):
    """Without a mark of their encoding or empty lines; one that is no text is skipped. Told where a video or
    caption is newer than its clip."""
    monkeypatch.setattr(prepare, "read_video", read_number)
    folder, codec = tmp_path / "videos", Codec()
    folder.mkdir()
    for i, said in enumerate((b"\xef\xbb\xbfclip\r\n", b"\n clip ", b"\xff\xfec\0", b" \n")):
        (folder / f"{i}.txt").write_bytes(said)
    (folder / "0.mp4").touch(), (folder / "0.mp4").rename(folder / "5.MP4")
    (folder / "5.txt").write_text("clip")
    assert clips_of_videos(folder, negative="bad") == (4, 2)
    made = load_file(folder / "out" / "000-000000.safetensors")
    assert torch.equal(made["text"], codec(2 * ["clip"]).bfloat16()) and made["text"].dtype == torch.bfloat16
    assert torch.equal(load_file(folder / "out" / "null.safetensors")["text"], codec(["bad"]).bfloat16())
    rows = [json.loads(line) for line in open(folder / "out" / "manifest-000.jsonl")]
    bad = [row for row in rows if "error" in row]
    assert [row["video"] for row in bad] == ["2.mp4", "3.mp4"]
    assert all("no caption in UTF-8" in row["error"] for row in bad)
    assert "5.MP4" in {row["video"] for row in rows}


def test_a_newer_video_is_told_once_and_stays_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "read_video", read_number)
    folder = tmp_path / "videos"
    clips_of_videos(folder)
    now = time.time()
    for i, name in enumerate(("null", "000-000000", "000-000001", "000-000002")):
        os.utime(folder / "out" / f"{name}.safetensors", (now + 100 * i, now + 100 * i))
    os.utime(folder / "2.mp4", (now + 250, now + 250)), os.utime(folder / "4.mp4", (now + 250, now + 250))
    monkeypatch.setattr(Codec, "encode", lambda *_: pytest.fail("it is encoded again"))
    capsys.readouterr()
    clips_of_videos(folder)
    assert "1 videos or captions are newer than their clips, which stay as they are, first 2.mp4" in (
        capsys.readouterr().err)
    clips_of_videos(folder, 1, 2)
    assert "newer" not in capsys.readouterr().err


def test_a_text_encoder_or_vae_of_another_size_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "read_video", read_number)
    with pytest.raises(ValueError, match="text encoder is 32 wide, expected 16 for the preset"):
        clips_of_videos(tmp_path / "videos", text_dim=16)
    codec = Codec()
    codec.encode = lambda video: torch.zeros(1, 3, 3, 4, 4)
    with pytest.raises(ValueError, match=r"the VAE makes \(3, 3, 4, 4\), expected \(3, 3, 4, 6\)"):
        clips_of_videos(tmp_path / "videos", codec=codec)


def test_the_command_prepares_with_what_it_is_given(tmp_path, monkeypatch, capsys):
    """The text of a file, without its empty lines; nothing into the folder that it reads; no clip: told."""
    made = {name: mock.Mock() for name in ("TextEncoder", "VAE", "prepare")}
    for name, stub in made.items():
        monkeypatch.setattr(prepare, name, stub)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    init, out = tmp_path / "wan", tmp_path / "out"
    init.mkdir(), (tmp_path / "negative.txt").write_text("\ufeffbad\n\n")
    made["prepare"].return_value = 0, 3
    monkeypatch.chdir(tmp_path)
    for name in ("videos", "others"):
        Path(name).mkdir(), Path(name, "a.mp4").touch()
    command = ["--preset", "wan-1.3b", "--init", init, "--videos", "videos", "--data", out,
               "--negative", f"@{tmp_path / 'negative.txt'}", "--clips-per-shard", "7", "--device", "cpu"]
    prepare.main([*map(str, command)])  # of two processes, the other may have better ones
    encode, vae = made["TextEncoder"](), made["VAE"]()
    wanted = Path("videos"), out, (21, 16, 60, 104), 4096, encode, vae, "bad", 7, 1, 2
    assert made["prepare"].call_args == mock.call(*wanted)
    assert made["TextEncoder"].call_args_list[0] == mock.call(init, torch.device("cpu"), torch.float32)
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit, match="none of the 3 videos in videos could be used"):
        prepare.main([*map(str, command)])
    made["prepare"].return_value = 4, 3
    prepare.main([*map(str, command)])
    assert "4 clips by process 0 in" in capsys.readouterr().out
    (out / "000-000000.safetensors").touch()
    for key, value in (("--preset", "wan-14b-causal-x"), ("--videos", "others"), ("--init", tmp_path)):
        other = [value if before == key else word for before, word in zip(["", *command], command)]
        other = ["tiny" if word == "wan-14b-causal-x" else word for word in other]
        with pytest.raises(SystemExit, match="was prepared from"):
            prepare.main([*map(str, other)])
    with pytest.raises(SystemExit, match="would be written and is read"):
        prepare.main([*map(str, [init if word == out else word for word in command])])


def test_prepare_keeps_its_settings_once_a_shard_is_made(tmp_path, monkeypatch):
    """A first command that failed does not bind the next one."""
    monkeypatch.setattr(prepare, "TextEncoder", mock.Mock())
    monkeypatch.setattr(prepare, "VAE", mock.Mock())
    monkeypatch.setattr(prepare, "prepare", mock.Mock(side_effect=[ValueError("no fit"), (1, 0)]))
    (tmp_path / "a.mp4").touch()
    there = str(tmp_path)
    main = lambda negative: prepare.main(["--preset", "tiny", "--init", there, "--videos", there,
                                          "--data", there + "/out", "--negative", negative])
    with pytest.raises(SystemExit, match="no fit"):
        main("one")
    main("two")
    (tmp_path / "out" / "000-000000.safetensors").touch()
    with pytest.raises(SystemExit, match="was prepared from .*two.*, expected .*three"):
        main("three")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """So that after a power loss it is the old one or the new one, whole."""
    done, sync, replace_ = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_size), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace_(*names)))
    write_json(tmp_path / "new" / "a.json", 12345)
    assert done == [6, "renamed"] and [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_folder_is_held_to_the_end_and_what_its_holder_writes_stays(tmp_path):
    """Anew by the same process, too, which tells its name once."""
    hold(tmp_path), hold(tmp_path / "x" / "..")
    with open(tmp_path / ".lock") as lock:
        assert lock.read() == f"process {os.getpid()} of {socket.gethostname()}"
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
    other = tmp_path / "other"
    other.mkdir(), (other / ".0123.part.json").touch()
    with open(other / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by another process"):
            hold(other)
    assert (other / ".0123.part.json").exists()


def test_a_text_file_is_read_without_the_mark_of_its_encoding(tmp_path):
    for name, text in (("a", "\ufeff\n\u00e9 cat \n\n"), ("b", '\ufeff{"a": 1}')):
        (tmp_path / name).write_text(text, "utf-8")
    assert text_of(f"@{tmp_path / 'a'}") == "\u00e9 cat" and text_of(" @b ") == " @b "
    assert read_json(tmp_path / "b") == {"a": 1}


def test_larger_patches_lie_on_straight_lines_between_the_numbers_of_smaller_ones():
    first = {"weight": torch.tensor([[0.0, 4.0], [8.0, 12.0]]).view(1, 1, 1, 2, 2), "bias": torch.ones(1)}
    line = torch.tensor([0.0, 1.0, 3.0, 4.0])
    made = compressed_patches(first, (1, 4, 4))
    assert torch.allclose(made["weight"][0, 0, 0], line + 2 * line[:, None]) and made["bias"] == 1


@pytest.mark.parametrize("error, said", [
    (MemoryError(), "MemoryError"), (OSError(28, "No space left"), "No space left"),
    (SafetensorError("no\nfile"), "no$"), (ZeroDivisionError("by zero"), "by zero"),
    (FloatingPointError("nan"), "nan"), (RuntimeError("\n rank 1\n"), "rank 1$"), (ValueError("v"), "v$"),
    (KeyboardInterrupt(), "stopped; it goes on$"), (torch.OutOfMemoryError("9 GiB\nx"), "9 GiB needs less$"),
    (checkpoint.CheckpointException("long", {1: (OSError("this one"), None)}), "this one$")], ids=repr)
def test_a_command_ends_in_one_sentence_whatever_happens(error, said, monkeypatch):
    def run():
        raise error if isinstance(error, Exception | KeyboardInterrupt) else RuntimeError(reason(error))

    with pytest.raises(SystemExit, match=f"^name: .*{said}") as end:
        command("name", run, "it goes on", lambda: "needs less")
    assert "\n" not in str(end.value)


def test_sigterm_is_ctrl_c_within_a_command_and_what_it_was_after_it():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit, match="name: stopped; it goes on"):
            command("name", lambda: os.kill(os.getpid(), signal.SIGTERM), "it goes on")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_each_process_of_a_node_takes_its_own_gpu_if_none_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "11"), monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of("cpu") == torch.device("cpu")
    for name in ("cuda", "nonsense"):
        with pytest.raises(ValueError, match=f"--device {name}: "):
            device_of(name)
    monkeypatch.setattr(torch, "empty", lambda *_, **options: None)
    assert [device_of(name).index for name in ("cuda", "cuda:5")] == [3, 5]


def test_files_are_as_readable_as_the_user_wants(tmp_path):
    (tmp_path / "mine").touch()
    write_shards(World(), tmp_path / "x", 2, seed=0)
    modes = {path.stat().st_mode for path in (tmp_path / "x").glob("*.*")}
    assert modes == {(tmp_path / "mine").stat().st_mode}


def test_prepare_has_its_folder_alone(tmp_path, monkeypatch, capsys):
    """It is told who holds it, before anything is loaded; and a manifest's shard lies in the folder."""
    monkeypatch.setattr(prepare, "read_video", read_number)
    folder = tmp_path / "videos"
    clips_of_videos(folder)
    command = ["--preset", "tiny", "--init", tmp_path, "--videos", folder, "--data", folder / "out",
               "--negative", ""]
    with open(folder / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("process 7", file=lock, flush=True)
        with pytest.raises(SystemExit, match="out is in use by process 7"):
            prepare.main([*map(str, command)])
    write = (folder / "out" / "manifest-000.jsonl").write_text
    write(json.dumps({"video": "0.mp4", "rank": 0, "shard": "../../x.safetensors", "row": 0}))
    with pytest.raises(ValueError, match="expected 000-000000.safetensors"):
        clips_of_videos(folder)


def test_clip_that_is_not_finite_is_named(tmp_path):
    write_shards(World(), tmp_path / "x", 8, seed=0)
    path = tmp_path / "x" / "shard-00000.safetensors"
    clips = load_file(path)
    clips["latents"][3, 0, 0, 0, 0] = float("inf")
    save_file(clips, path)
    message = refused(*TINY, "--batch", "8", "--data", tmp_path / "x", "--out", tmp_path / "out")
    assert f"clip 3 of {path} is not finite" in message


@pytest.mark.parametrize("spoil, words", [
    (lambda log: log.write_text("{\n"), "has a line that is no JSON"),
    (lambda log: log.write_text(""), "does not go to step 1"),
    (lambda log: log.write_text(re.sub('"step": (.)', r'"step": "\1"', log.read_text())), "does not go to"),
    (lambda log: (log.unlink(), log.symlink_to(log.name)), "no file")],
    ids=["corrupt", "empty", "text", "a link in a circle"])
def test_corrupt_log_is_told_before_the_training(spoil, words, kept):
    shutil.rmtree(kept / "checkpoints" / "step-0000002")
    spoil(kept / "log.jsonl")
    said = refused(*TINY, "--out", kept, "--resume")
    assert str(kept / "log.jsonl") in said and words in said
    assert not (kept / "checkpoints" / "step-0000002").exists()


def test_log_begins_anew_where_it_was_removed(tmp_path):
    """And is then cut back to the checkpoint, as a whole one."""
    log = tmp_path / "log.jsonl"
    assert read_log(log, 7) == []
    log.write_text("".join(f'{{"step": {i}}}\n' for i in range(8, 20)))
    for step in (7, 12, 19):
        assert read_log(log, step) == [{"step": i} for i in range(8, step + 1)]
    for step in (6, 20):
        with pytest.raises(ValueError, match=f"{log} does not go to step {step} "):
            read_log(log, step)
    append(log, '{"step": 20}\n{"st')  # a disk was full in the middle of a line
    assert read_log(log, 20)[-1] == {"step": 20}
    with pytest.raises(OSError, match="cannot write /dev/full: No space left"):
        append("/dev/full", "a line\n")


@pytest.mark.parametrize("name", ["anyflow.json", "scheduler/scheduler_config.json"])
def test_link_in_a_circle_is_no_missing_file(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to((tmp_path / name).name)
    with pytest.raises(ValueError, match=f"no file {tmp_path / name}"):
        provenance(tmp_path), pixels.Published(tmp_path, "cpu").shift()


@pytest.mark.slow
def test_story_leaves_no_child(tmp_path):
    """SIGTERM: the children save and end before it; SIGKILL: they end, too."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        folder = tmp_path / str(int(how))
        name = next(iter(STORY))
        process = began("-m", "toy.video", "--train", "--steps", "5000", "--out", folder,
                        until=lambda: rows(folder / "models" / name) or (folder / "models" / name).exists())
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                                  text=True)
        process.send_signal(how), process.wait(timeout=60)
        time.sleep(0 if how == signal.SIGTERM else 10)
        alive = [pid for pid in children.stdout.split() if Path(f"/proc/{pid}").exists()
                 and ") Z" not in Path(f"/proc/{pid}/stat").read_text()]
        assert children.stdout.split() and not alive


def test_stale_parts_go(kept):
    shutil.rmtree(kept / "checkpoints" / "step-0000002")
    (kept / "checkpoints" / ".step-0000077.part").mkdir()
    (kept / ".0123.part.json").write_text("")
    run(*TINY, "--out", kept, "--resume")
    assert not list((kept / "checkpoints").glob(".*")) and not list(kept.glob(".*.part*"))


def test_index_of_weights_stays_in_its_folder(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "model", ignore=lambda *_: ["checkpoints"])
    (folder / WEIGHTS).rename(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        write_json(folder / f"{WEIGHTS}.index.json", {"weight_map": {"x": name}})
        with pytest.raises(ValueError, match="expected a name without a folder"):
            Wan.from_pretrained(folder)


@pytest.mark.parametrize("layers", [1, 3, 1000, 10**5, 10**9])
def test_number_of_layers_is_held_against_the_weights_before_a_network_is_built(layers, made, tmp_path,
                                                                                monkeypatch):
    folder = shutil.copytree(made, tmp_path / "model", ignore=lambda *_: ["checkpoints"])
    write_json(folder / "config.json", read_json(folder / "config.json") | {"num_layers": layers})
    monkeypatch.setattr(Wan, "__init__", lambda *_: pytest.fail("it is built"))
    words = "in .1, 1000" if layers > 1000 else f"weights of 4 layers, expected {layers} as in"
    with pytest.raises(ValueError, match=f"{folder}.*{words}"):
        Wan.from_pretrained(folder)


def test_files_are_not_written_through_a_planted_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".a.part.json", ".a.json.part"):
        (tmp_path / name).symlink_to(victim)
    (tmp_path / "a.json").symlink_to(victim)
    write_json(tmp_path / "a.json", {})
    assert victim.read_text() == "mine" and read_json(tmp_path / "a.json") == {}
    long = tmp_path / ("x" * 250 + ".json")
    write_json(long, 1)
    assert read_json(long) == 1
    old = os.umask(0o027)
    write_json(tmp_path / "b.json", {})
    os.umask(old)
    assert (tmp_path / "b.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("spoil, words", [
    (lambda x: x.fill_(float("nan")), "not finite"), (lambda x: x.int(), "int32"),
    (lambda x: x.bool(), "bool"),
    (lambda x: x.to(torch.float8_e4m3fn), "float8"), (lambda x: x.to(torch.complex64), "complex64")])
def test_weights_that_are_no_finite_real_numbers_are_told_at_loading(made, tmp_path, spoil, words):
    folder = shutil.copytree(made, tmp_path / "model", ignore=lambda *_: ["checkpoints"])
    state = load_file(folder / WEIGHTS)
    save_file(state | {"proj_out.bias": spoil(state["proj_out.bias"])}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"{folder}.*proj_out.bias .*{words}"):
        Wan.from_pretrained(folder)


@pytest.mark.parametrize("options, words", [
    (["--out", ""], "it is empty"), (["--data", ""], "it is empty"), (["--init", ""], "it is empty"),
    (["--teacher", ""], "it is empty"), (["--judge", ""], "it is empty"),
    (["--compile", "yes"], "found 'yes', expected true or false"), (["--batch", "4.5"], "an integer"),
    (["--seed", "-1"], "'-1' is no integer"), (["--seed", str(2**32)], "from 0 to 2^32 - 1")])
def test_empty_names_and_foreign_seeds_are_refused(options, words, capsys):
    with pytest.raises(SystemExit) as error:
        run(*TINY, *options)
    assert error.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("main, options, words", [
    *((sample.main, [f"--{name}", ""], f"--{name} is empty") for name in (
        "model", "parts", "prompts", "image", "video", "text", "context")),
    (sample.main, ["--per-prompt", "9999999999"], "from 1 to 999999"),
    (sample.main, ["--seed", 5000 * "1"], "'11111111111111111111' is no integer"),
    (prepare.main, ["--data", ""], "it is empty"), (prepare.main, ["--init", ""], "it is empty"),
    (flow2d.main, ["--out", ""], "it is empty"), (video.main, ["--out", ""], "it is empty"),
    (video.main, ["--steps", "3"], "need --train")])
def test_what_no_command_can_use_is_told_at_once(main, options, words, capsys):
    with pytest.raises(SystemExit) as error:
        main(options)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="^sample.py: .*File name too long"):
        sample.main(["--out", str(tmp_path / (300 * "a" + ".gif"))])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop" in refused(*TINY, "--out", tmp_path / "loop" / "x").lower()
    assert "--resume found no folder" in refused(*TINY, "--out", tmp_path / "none", "--resume")
    assert not (tmp_path / "none").exists()


def test_rank_outside_the_world_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "5"), monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK is 5, expected 0 to 1" in refused(*TINY, "--out", tmp_path / "out")


@pytest.mark.parametrize("option", ["--image", "--prompts", "--video", "--text", "--context"])
def test_fifos_are_refused(option, made, tmp_path, capsys):
    """Not waited for."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises((SystemExit, ValueError), match="no file|tiny world"):
        sample.main(["--model", str(made), option, str(tmp_path / "fifo"), "--out", str(tmp_path / "out")])


def test_central_difference_stays_within_the_time_axis(tmp_path):
    assert "eps is 10.0" in refused("flowmap", *TINY[1:], "--eps", "10", "--out", tmp_path / "out")


@pytest.mark.parametrize("rollout", ["flowmap", "consistency"])
def test_plan_counts_one_of_a_hundred_thousand_updates(rollout, monkeypatch):
    asked = []

    def counted(stage, recipe, config, shape, layers, steps, *_):
        updates = recipe.fake_steps * (stage == "onpolicy")
        asked.append(updates)
        return steps * [(layers * (50 + 7 * updates), [layers])]

    monkeypatch.setattr(plan, "steps_on_meta", counted)
    (config, shape), flops = preset("tiny"), {}
    for n in (1, 2, 100_000):
        recipe = train.recipe_of("tiny", "onpolicy", dict(rollout=rollout, fake_steps=n))
        flops[n], _ = plan.cost_of_training("onpolicy", recipe, config, shape, 1)
    assert max(asked) < 10 and flops[2] - flops[1] == 7 * config.num_layers
    assert flops[100_000] == pytest.approx(flops[1] + 99_999 * (flops[2] - flops[1]))


@pytest.mark.parametrize("options", [
    ["--resume"], ["--init", "x"], ["--data", "true"], ["--teacher", "5"], ["--out", "x"], ["--seed", "1"]])
def test_plan_refuses_what_it_would_not_use(options, capsys):
    with pytest.raises(SystemExit) as error:
        plan.main(["--preset", "tiny", "--gpus", "1", *options])
    assert error.value.code == 2
    assert f"unrecognized arguments: {options[0]}" in capsys.readouterr().err.splitlines()[-1]


@contextmanager
def full_disk():
    """No file grows beyond 500 bytes; not even pytest's own log, so only within the test."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


NAMES = "results.json", "explore.html", "null.safetensors"


def write_briefly(name, folder, monkeypatch):
    """The sentence with which the toy's command ends that writes a file of that name, without its work."""
    scores = {key: 7 * [0.5] for key in ("swd", "path_error", "budget_drift")}
    ruler = SimpleNamespace(floor=0.1, floor_ode=0.1, of_ode=lambda _: 0.1, measure=lambda *_: (scores, 0, 0))
    monkeypatch.setattr(flow2d, "trained_seeds", lambda *_: [({"teacher": None}, {"teacher": 1.0}, ruler)])
    monkeypatch.setattr(flow2d.plots, "decide", lambda _: [])
    monkeypatch.setattr(page, "trained", lambda *_: {})
    monkeypatch.setattr(page, "page", lambda _: 5000 * "x")
    command, *options = {"results.json": (flow2d, "--out", folder),
                         "explore.html": (page, "--out", folder / name),
                         "null.safetensors": (video, "--clips", 8, "--write-shards", folder)}[name]
    with pytest.raises(SystemExit) as error:
        command.main([str(option) for option in options])
    assert not list(folder.glob(".*.part*")) and len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_full_disk_is_told_and_loses_nothing(name, tmp_path, monkeypatch):
    old = tmp_path / name[:12]  # shards are never written over
    old.write_text("old")
    with full_disk():
        said = write_briefly(name, tmp_path, monkeypatch)
    assert f"cannot write {tmp_path / name}: " in said and "File too large" in said
    assert old.read_text() == "old"


@pytest.mark.parametrize("name", NAMES)
def test_folder_in_the_place_of_a_file_is_told(name, tmp_path, monkeypatch):
    (tmp_path / name / "old").mkdir(parents=True)
    assert str(tmp_path) in write_briefly(name, tmp_path, monkeypatch)
    assert (tmp_path / name / "old").exists()


@pytest.mark.parametrize("command", ["sample.py", "train.py flowmap", "-m toy.video", "-m full.plan"])
def test_ctrl_c_while_torch_is_imported_is_one_sentence(command):
    python = [sys.executable, "-X", "importtime", *command.split()]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
    with subprocess.Popen(python, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        for line in process.stderr:  # of one module each, when it has been imported
            if line.endswith("| argparse\n"):
                process.send_signal(signal.SIGINT)
                break
        said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == -signal.SIGINT
    assert said == ["stopped before anything was begun\n"]
