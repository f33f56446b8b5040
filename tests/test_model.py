"""model.py and sample.py against diffusers: live where it is installed, by its stored answers everywhere."""

import collections
import copy
import itertools
import json
import math
import re
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import CASES, config_of, draw, ours, theirs, weights
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import anyflow
import model as M
import sample
from full.compile import lean
from full.files import WEIGHTS, provenance
from full.lora import BODY, add_lora
from model import PRESETS, Wan, WanConfig

STORED = load_file(Path(__file__).parent / "fixtures" / "outputs.safetensors")


def error(ours, reference):
    return ((ours - reference).abs().max() / reference.std()).item()


def build(kind="causal", **changes):
    model = Wan(WanConfig.from_dict(config_of(kind, **changes)))
    model.load_state_dict(weights({name: value.shape for name, value in model.state_dict().items()}))
    return model


# agreement with diffusers


@pytest.mark.parametrize("name", CASES)
def test_stored_answer_of_diffusers(name):
    assert error(ours(CASES[name]), STORED[name]) < 2e-5


def random_case(number):
    """Another config and another call for every number."""
    pick = lambda what, *options: options[int(draw(f"{what} {number}").abs() * 1000) % len(options)]
    kind = pick("kind", "teacher", "anyflow", "causal")
    heads, dim = pick("heads", 1, 2, 3), pick("dim", 16, 18, 32)
    config = dict(num_attention_heads=heads, attention_head_dim=dim, num_layers=pick("layers", 1, 3),
                  in_channels=pick("in", 3, 4), cross_attn_norm=pick("norm", True, False))
    config["out_channels"] = config["in_channels"]
    case = dict(kind=kind, number=number, config=config)
    case |= dict(frames=pick("frames", 1, 3, 5), steps=pick("steps", 1, 2, 4))
    if kind == "teacher":
        return case | dict(call="forward")
    guided = dict(guidance=3.0) if pick("guidance", True, False) else {}
    if kind == "anyflow":
        given = dict(given=1) if case["frames"] > 1 and pick("given", True, False) else {}
        return case | dict(call=pick("call", "forward", "by frame", "pipeline")) | guided | given
    config["full_chunk_limit"] = pick("limit", 2, 3)
    if pick("call", True, False):
        chunks = (1, 2, 1, 2, 1)[: pick("chunks", 1, 2, 3, 4, 5)]
        return case | dict(call="training", chunks=chunks, clean=pick("clean", True, False), frames=None)
    return case | dict(call="pipeline", frames=11, steps=1, given=pick("given", 0, 1, 3, 5)) | guided


@pytest.mark.parametrize("number", range(24))
def test_live_answer_of_diffusers(number):
    pytest.importorskip("diffusers")
    case = random_case(number)
    assert error(ours(case), theirs(case)) < 2e-5


@pytest.mark.parametrize("name", ["teacher", "bidirectional", "causal training, 5 chunks with clean copy"])
def test_bfloat16_is_as_close_to_float32_as_that_of_diffusers(name):
    pytest.importorskip("diffusers")
    exact = STORED[name]
    low, reference = (f(CASES[name], torch.bfloat16).float() for f in (ours, theirs))
    assert (low - exact).norm() <= 1.05 * (reference - exact).norm()


def test_names_and_shapes_are_those_of_diffusers_at_full_size():
    diffusers = pytest.importorskip("diffusers")
    for preset in ("wan-1.3b", "wan-14b"):
        for kind in M.CLASSES:
            config = replace(PRESETS[preset], kind=kind)
            with torch.device("meta"):
                mine = {k: v.shape for k, v in Wan(config).state_dict().items()}
                settings = {k: v for k, v in config.to_dict().items() if k[0] != "_"}
                reference = getattr(diffusers, M.CLASSES[kind])(**settings)
            assert mine == {k: v.shape for k, v in reference.state_dict().items()}


@pytest.mark.parametrize("preset, kind, count", [
    ("wan-1.3b", "teacher", 1_418_996_800),
    ("wan-1.3b", "anyflow", 1_421_752_384),
    ("wan-1.3b", "causal", 1_422_147_136),
    ("wan-14b", "causal", 14_317_342_784),
])
def test_parameter_counts(preset, kind, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Wan(replace(PRESETS[preset], kind=kind)).parameters()) == count


def test_folders_travel_both_ways(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    for kind, name in M.CLASSES.items():
        mine = build(kind)
        mine.save_pretrained(tmp_path / kind)
        reference, info = getattr(diffusers, name).from_pretrained(tmp_path / kind, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        reference.save_pretrained(tmp_path / "back", max_shard_size="40KB")  # in shards, with an index
        back = Wan.from_pretrained(tmp_path / "back")
        assert back.config == mine.config and (tmp_path / "back" / f"{WEIGHTS}.index.json").exists()
        assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), back.state_dict().values()))
        for path in (tmp_path / "back").iterdir():
            path.unlink()


# students


def test_saving_over_shards_leaves_no_old_weights(folder):
    shard(folder, ["one"])
    model = Wan.from_pretrained(folder)
    model.proj_out.bias.data.fill_(7)
    model.save_pretrained(folder)
    assert (Wan.from_pretrained(folder).proj_out.bias == 7).all()


def test_a_time_of_each_frame_meets_one_of_each_sample():
    model, z, text = build(), draw("z", 2, 3, 4, 8, 12), draw("text", 2, 5, 12)
    t, frames = torch.tensor([0.9, 0.4]), torch.full((2, 3), 0.1)
    assert torch.allclose(model(z, t, frames, text), model(z, t, 0.1, text), atol=1e-5)


def test_student_is_its_teacher_where_r_equals_t(tmp_path):
    teacher = build("teacher")
    teacher.save_pretrained(tmp_path)
    z, text, t = draw("z", 2, 3, 4, 8, 12), draw("text", 2, 5, 12), torch.tensor([0.8, 0.3])
    with torch.no_grad():
        expected = teacher(z, t, t, text)
        for kind in ("anyflow", "causal"):
            student = Wan.from_pretrained(tmp_path, kind=kind)
            assert torch.allclose(student(z, t, t, text), expected, atol=1e-5)
            assert not torch.allclose(student(z, t, t / 2, text), expected, atol=1e-3), "r is ignored"


def test_compressed_patches_of_a_constant_video_see_what_its_patches_see(tmp_path):
    build("anyflow").save_pretrained(tmp_path)
    student = Wan.from_pretrained(tmp_path, kind="causal")
    flat = torch.ones(1, 4, 1, 8, 12)
    small, large = student.patch_embedding, student.far_patch_embedding
    one, four = (e(flat)[0, :, 0, 0, 0] - e.bias for e in (small, large))
    assert torch.allclose(four, 4 * one, atol=1e-4), "four times the cells, each with the weight of one"


# the causal model


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("chunks, window", [((2,), 1), ((1, 3, 2), 3), ((1, 3, 2, 1, 2), 3), ((2, 1, 1), 1)])
def test_attention_by_rows_is_that_under_a_mask(chunks, window, clean):
    """Of every pair of tokens: past sees past; clean past and clean; noise past, clean copies of earlier
    chunks and its own (without copies, noise of earlier chunks); nobody a later chunk. With gradients."""
    tokens = [(i, "past") for i, f in enumerate(chunks[:-window]) for _ in range(2 * f)]
    for role in ("clean", "noisy") if clean else ("noisy",):
        tokens += [(i, role) for i in range(len(chunks) - window, len(chunks)) for _ in range(5 * chunks[i])]
    mask = torch.tensor([[
        j <= i and {"past": True, "noisy": sees == "noisy" and (i == j or not clean),
                    "clean": sees == "clean" or sees == "noisy" and j < i}[seen]
        for j, seen in tokens] for i, sees in tokens])
    rows = M.rows_of_chunks(chunks, window, 5, 2, clean)
    attention = build().blocks[0].attn1
    q, k, v = (torch.randn(2, len(tokens), 2, 16, requires_grad=True) for _ in range(3))
    x = attention.attend(q, k, v, rows)
    y = torch.nn.functional.scaled_dot_product_attention(*(h.transpose(1, 2) for h in (q, k, v)), mask)
    y = attention.to_out[0](y.transpose(1, 2).flatten(2))
    assert error(x.detach(), y.detach()) < 1e-5
    g = torch.randn_like(x)
    for a, b in zip(torch.autograd.grad(x, (q, k, v), g), torch.autograd.grad(y, (q, k, v), g)):
        assert error(a, b) < 1e-5


def test_nothing_leaks_from_later_chunks_or_from_noise_to_clean():
    model, chunks = build(), (1, 2, 1, 2)
    z, clean, text = draw("z", 1, 5, 4, 8, 12), draw("clean", 1, 6, 4, 8, 12), draw("text", 1, 5, 12)
    run = lambda z, clean: model(z, 0.7, 0.2, text, clean=clean, chunks=chunks).detach()
    base = run(z, clean)
    frames = lambda other: ((other - base).abs().amax((0, 2, 3, 4)) > 0).tolist()
    # The window is chunks 1, 2, 3 = frames 0-1, 2, 3-4 of z; frames 1-2, 3, 4-5 of clean.
    noisy, past, own = z.clone(), clean.clone(), clean.clone()
    noisy[:, 2] += 1
    assert frames(run(noisy, clean)) == [False, False, True, False, False]
    past[:, 0] += 1
    assert frames(run(z, past)) == [True] * 5
    own[:, 3] += 1  # the clean copy of the middle chunk reaches later chunks only
    assert frames(run(z, own)) == [False, False, False, True, True]


def test_inference_with_the_cache_is_training_with_clean_copies():
    model, chunks = build(), (1, 2, 1, 2, 1)
    clip, text = draw("clip", 2, 7, 4, 8, 12), draw("text", 2, 5, 12)
    noisy, t, r = draw("noisy", 2, 4, 4, 8, 12), torch.tensor([0.9, 0.4]), torch.tensor([0.5, 0.0])
    cache, start, out = model.new_cache(), 0, []
    with torch.no_grad():
        for i, size in enumerate(chunks):
            if i >= 2:
                out.append(model(noisy[:, start - 3 : start - 3 + size], t, r, text, cache=cache))
            model.extend(cache, clip[:, start : start + size], text)
            start += size
        whole = model(noisy, t, r, text, clean=clip, chunks=chunks)
        assert error(torch.cat(out[-1:], 1), whole[:, -1:]) < 1e-5


def test_the_cache_holds_what_encoding_the_whole_history_gives():
    model, text = build(), draw("text", 1, 5, 12)
    clip = draw("clip", 1, 12, 4, 8, 12)
    cache = model.new_cache()
    for i in range(6):
        model.extend(cache, clip[:, 2 * i : 2 * i + 2], text)
        # 6 a compressed frame, and two chunks in full, of 24 a frame
        tokens = max(0, i - 1) * 2 * 6, min(2, i + 1) * 2 * 24
        assert cache.compressed_tokens == tokens[0] and cache.past[0][0].shape[1] == sum(tokens)
        assert cache.frames == 2 * i + 2
        # As in training: the newest chunks are the clean copies in a window that is one chunk larger.
        if i >= 1:
            chunks, made, blocks = (2,) * (i + 2), [], Wan._blocks
            whole = torch.cat([clip[:, : 2 * i + 2], torch.zeros(1, 2, 4, 8, 12)], 1)
            model._blocks = lambda *args: blocks(model, *args, keep=made)
            with torch.no_grad():
                model(whole[:, -6:], 0.5, 0.5, text, clean=whole, chunks=chunks)
            del model._blocks
            for (k, v), (all_k, all_v) in zip(cache.past, made, strict=True):
                assert error(k, all_k[:, : sum(tokens)]) < 1e-5 and error(v, all_v[:, : sum(tokens)]) < 1e-5


def test_streams_of_any_length_do_bounded_work_per_chunk():
    model = build(num_layers=1)
    text, calls = draw("text", 1, 5, 12), []
    model.blocks[0].register_forward_pre_hook(lambda block, args: calls.append(args[0].shape[1]))
    sizes = []
    for chunk in sample.stream(model, text, torch.randn(1, 24, 4, 8, 12), 1, chunks=(1,) * 24):
        assert torch.isfinite(chunk).all()
        sizes.append(sum(calls))
        calls.clear()
    # A step of 24 tokens; before it the last chunk's commit: 6 tokens compressed and two chunks of 24.
    assert sizes[3:] == [6 + 24 + 24 + 24] * 21


def test_stream_and_generate_agree_and_given_frames_are_kept():
    model, text, noise = build(), draw("text", 1, 5, 12), draw("noise", 1, 8, 4, 8, 12)
    given = draw("given", 1, 3, 4, 8, 12)
    whole = sample.generate(model, text, noise, 2, context=given)
    parts = list(sample.stream(model, text, noise, 2, context=given))
    assert [p.shape[1] for p in parts] == [1, 2, 2, 1, 2] and torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(whole[:, :3], given)


def test_text_is_encoded_once_a_prompt():
    for kind in M.CLASSES:
        model, calls = build(kind), []
        model.condition_embedder.text_embedder.register_forward_hook(lambda *a: calls.append(1))
        sample.generate(model, draw("text", 1, 5, 12), draw("noise", 1, 5, 4, 8, 12), 4)
        assert len(calls) == 1


# training


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["anyflow", "causal"])
def test_compile_without_graph_breaks(kind):
    model, text = build(kind, num_layers=1), draw("text", 1, 5, 12)
    z, clean = draw("z", 1, 5, 4, 8, 12), draw("clean", 1, 6, 4, 8, 12)
    more = dict(clean=clean, chunks=(1, 2, 1, 2)) if kind == "causal" else {}
    args = z, torch.tensor([0.7]), torch.tensor([0.2]), text
    backend = "inductor" if kind == "causal" else "aot_eager"  # which makes the same graph and no kernels
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert error(compiled(*args, **more).detach(), model(*args, **more).detach()) < 1e-5


@pytest.mark.parametrize("chunks", [None, (1, 2, 1, 2)])
def test_checkpointing_gives_the_same_gradients(chunks):
    model = build()
    more = dict(clean=draw("clean", 1, 6, 4, 8, 12), chunks=chunks) if chunks else {}
    z, text, grads = draw("z", 1, 5, 4, 8, 12), draw("text", 1, 5, 12), []
    for model.checkpointing in ("none", "full", "selective"):
        model.zero_grad()
        model(z, 0.7, 0.2, text, **more).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        assert grads[0].keys() == other.keys() and all(torch.equal(grads[0][k], other[k]) for k in grads[0])


def test_lora_starts_at_the_model_trains_little_and_merges_on_save(tmp_path):
    model = build("causal")
    z, text = draw("z", 1, 3, 4, 8, 12), draw("text", 1, 5, 12)
    before = model(z, 0.7, 0.2, text).detach()
    names = set(model.state_dict())
    lora = add_lora(copy.deepcopy(model), rank=4)
    assert torch.equal(lora(z, 0.7, 0.2, text).detach(), before)
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    whole = {name for name in trained if "lora_" not in name}
    assert whole == {"far_patch_embedding.weight", "far_patch_embedding.bias"}
    per_block = 2 * (4 + 2)  # q, k, v, out of the self-attention and two of the feed-forward
    embedders = 2 * 4  # both linears of both time embedders
    assert len([n for n in trained if "lora_" in n]) == per_block * 2 + embedders
    for name, p in lora.named_parameters():
        if name.endswith("lora_up"):
            p.data = draw(name, *p.shape) * 0.1
    lora.save_pretrained(tmp_path)
    merged = Wan.from_pretrained(tmp_path)
    assert set(merged.state_dict()) == names
    after = lora(z, 0.7, 0.2, text).detach()
    assert error(merged(z, 0.7, 0.2, text).detach(), after) < 1e-5 and error(before, after) > 0.1


def test_lora_goes_on_where_one_was_beyond_the_pattern():
    """Also in a time embedder, of a network whose own LoRA is the body's."""
    model, name = build("anyflow"), "condition_embedder.time_embedder.linear_2"
    width = model.get_submodule(name).weight.shape[0]
    start = torch.randn(width, 1), torch.randn(1, width)
    model = add_lora(model, 2, BODY, {name: start})
    assert torch.equal(model.get_submodule(name).lora_up[:, :1], start[0])


# bad input


@pytest.fixture
def folder(tmp_path):
    build("anyflow").save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "delete"}))


WRONG = {
    "ffn_dim": ["48", 48.5, True, None, 0, 2**17 + 1, 10**400, [48], {}],
    "num_layers": ["2", -1, 10**9, [[2]]],
    "eps": ["1e-6", 0, -1e-6, math.nan, math.inf, 10**400, None],
    "cross_attn_norm": [1, "true", None],
    "deltatime_type": [0, None, ["r"]],
    "patch_size": [[1, 2], [1, 2, 2, 2], [1, [2], 2], [1, "2", 2], [1, 2.0, 2], [1, 2, True], [], None],
    "gate_value": [-0.1, 1.5, math.nan, "0.25"],
}
WRONG_PROVENANCE = {
    "stage": [1, "stage 2", ["flowmap"], True],
    "preset": [7, ["tiny"], {}],
    "rollout": ["euler", 0],
    "shift": ["5", 0, -1, math.nan, 10**400, [5.0]],
    "shape": [[9, 3, 12], [9, 3, 12, -12], [9, 3, 12, "12"], [9, 3, 12, 10**400], [[9, 3, 12, 12]], 9, "9"],
}


def each(wrong):
    pairs = [(key, value) for key, values in wrong.items() for value in values]
    ids = [f"{key} {value!r:.20}" for key, value in pairs]
    return pytest.mark.parametrize("key, value", pairs, ids=ids)


@each(WRONG)
def test_wrong_values_of_config_are_named_in_one_sentence(key, value):
    with pytest.raises(ValueError) as error:
        WanConfig.from_dict(config_of("anyflow") | {key: value}, "folder/config.json")
    said = str(error.value)
    assert said.startswith(f"folder/config.json: {key} is ") and "expected" in said and "\n" not in said


@each(WRONG_PROVENANCE)
def test_wrong_values_of_provenance_are_named_in_one_sentence(key, value, tmp_path):
    path = tmp_path / "anyflow.json"
    path.write_text(json.dumps({"stage": "flowmap", "preset": "tiny", key: value}))
    with pytest.raises(ValueError) as error:
        provenance(tmp_path)
    said = str(error.value)
    assert said.startswith(f"{path}: {key} is ") and "expected" in said and "\n" not in said


@pytest.mark.parametrize("changes", [
    dict(num_layers=1000), dict(ffn_dim=2**17), dict(num_attention_heads=2**17),
    dict(num_attention_heads=2**17, attention_head_dim=2**17),
])
def test_config_of_any_size_is_refused_before_memory_is_taken(folder, changes):
    """Each value alone is in range; what they ask for together is not what the weights have."""
    edit(folder, **changes)
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        Wan.from_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert time.perf_counter() - start < 20


NO_OBJECTS = {"null": "null", "number": "1e999", "list": "[[]]", "deep": 100_000 * "[", "bytes": "\udcff",
              "list for a name": '{"_class_name": ["x"]}'}


@pytest.mark.parametrize("text", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_what_is_no_object_is_named(folder, text):
    for name, read in (("config.json", Wan.from_pretrained), ("anyflow.json", provenance)):
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
        if name == "anyflow.json" and text.startswith("{"):
            continue  # an object, with a key that says nothing there
        with pytest.raises(ValueError) as error:
            read(folder)
        assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


def rewrite(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def shard(folder, names):
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    index = {"weight_map": {name: name + ".safetensors" for name in names}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("damage, message", [
    (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "no model folder"),
    (lambda f: (f / "config.json").unlink(), "no file .*config.json"),
    (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
    (lambda f: edit(f, _class_name="UNet"), "_class_name is 'UNet', expected one of WanTransformer3DModel, "),
    (lambda f: edit(f, colour=3), "unknown key colour"),
    (lambda f: edit(f, ffn_dim="delete"), "missing key ffn_dim"),
    (lambda f: edit(f, image_dim=1280), "image_dim is 1280"),
    (lambda f: edit(f, in_channels=9), "out_channels is 4, expected in_channels, 9"),
    (lambda f: edit(f, ffn_dim=64), "has shape"),
    (lambda f: edit(f, patch_size=2), "patch_size is 2, expected 3 integers "),
    (lambda f: edit(f, deltatime_type="dt"), "deltatime_type is 'dt', expected one of r, t-r"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json: _class_name is \\[\\]"),
    (lambda f: (f / f"{WEIGHTS}.index.json").write_text("{}"), "has no weight_map"),
    (lambda f: (f / WEIGHTS).unlink(), f"no file .*{WEIGHTS}"),
    (lambda f: (f / WEIGHTS).write_text("weights"), "is no safetensors file"),
    (lambda f: shard(f, ["one", "two"]), "no file .*two.safetensors, which .*index.json lists"),
    (lambda f: rewrite(f, lambda s: s.pop("proj_out.bias")), "lacks proj_out.bias"),
    (lambda f: rewrite(f, lambda s: s.update(extra=torch.zeros(1))), "has unknown extra"),
])
def test_damaged_folder_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        Wan.from_pretrained(folder)


def clocked(monkeypatch, seconds=1.0):
    """A causal model, and what its calls and ways into the cache have cost on a clock of its own."""
    model, spent = build(num_layers=1), [0.0]
    monkeypatch.setattr(sample.time, "perf_counter", lambda: sum(spent))
    model.register_forward_hook(lambda *_: spent.append(seconds))
    extend = model.extend
    monkeypatch.setattr(model, "extend", lambda *inputs: (spent.append(seconds), extend(*inputs))[1])
    return model, spent


def calls_by_chunk(model, spent, steps, frames=5, **options):
    """How many of the model's calls each chunk of one frame took, without that into the cache."""
    calls, text = [], draw("text", 1, 5, 12)
    noise = draw("z", 1, frames, 4, 8, 12)
    for _chunk in sample.stream(model, text, noise, steps, chunks=(1,) * frames, **options):
        calls.append(len(spent) - 1 - sum(calls) - len(calls))
    return calls


def test_every_chunk_takes_its_own_number_of_calls(monkeypatch):
    clock = clocked(monkeypatch)
    for steps, wanted in ((2, [2] * 5), ([3, 1], [3, 1, 1, 1, 1]), ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
                          (torch.tensor([1, 0.5, 0.1, 0]), [3] * 5)):
        clock[1][:] = [0.0]
        assert calls_by_chunk(*clock, steps) == wanted
    text, noise = draw("text", 1, 5, 12), draw("z", 1, 3, 4, 8, 12)
    whole = sample.generate(build("anyflow", num_layers=1), text, noise, torch.tensor([1, 0.3, 0]))
    assert torch.equal(whole, sample.generate(build("anyflow", num_layers=1), text, noise, [[1, 0.3, 0]]))


@pytest.mark.parametrize("budget, wanted", [
    (20.0, [4, 1, 2, 3, 4]),  # 20 - 5 on the first chunk: 3.75 a chunk, two of it kept for the cache
    (1.0, [4, 1, 1, 1, 1]),  # spent by the first chunk
    (1e9, [4, sample.MOST, sample.MOST, sample.MOST, sample.MOST]),
])
def test_a_stream_under_a_clock_spends_what_is_left(monkeypatch, budget, wanted):
    model, spent = clocked(monkeypatch)
    assert calls_by_chunk(model, spent, 4, budget=budget) == wanted
    assert sum(spent) <= max(budget, 4 + 4 * 2)  # a call and the way into the cache is the least


def test_a_stream_under_a_clock_makes_the_clips_of_its_calls(monkeypatch):
    model, _ = clocked(monkeypatch)
    text, noise = draw("text", 1, 5, 12), draw("z", 1, 5, 4, 8, 12)
    timed = torch.cat([*sample.stream(model, text, noise, 4, chunks=(1,) * 5, budget=20.0)], 1)
    assert torch.equal(timed, sample.generate(model, text, noise, [4, 1, 2, 3, 4], chunks=(1,) * 5))


def test_given_frames_stay_as_they_are_with_every_sampler():
    text, noise, given = draw("text", 2, 5, 12), draw("z", 2, 5, 4, 8, 12), draw("given", 2, 2, 4, 8, 12)
    for kind, sampler in itertools.product(("anyflow", "causal"), sample.SAMPLERS):
        more = dict(chunks=(2, 3)) if kind == "causal" else {}
        clip = sample.generate(build(kind), text, noise, 3, context=given, sampler=sampler, **more)
        assert torch.equal(clip[:, :2], given) and not clip[:, 2:].isnan().any(), (kind, sampler)
    options = dict(context=given, sampler="consistency", path=True)
    states = sample.generate(build("anyflow"), text, noise, 3, **options)
    assert all(torch.equal(state[:, :2], given) for state in states)


def test_a_cache_refuses_chunks_of_another_size():
    model = build("causal")
    cache = model.extend(model.new_cache(), draw("z", 2, 1, 4, 8, 12), draw("text", 2, 5, 12))
    for size in ((2, 1, 4, 8, 8), (1, 1, 4, 8, 12)):
        z, text = draw("z", *size), draw("text", size[0], 5, 12)
        for call in (lambda z=z, text=text: model(z, 0.5, 0.1, text, cache=cache),
                     lambda z=z, text=text: model.extend(cache, z, text)):
            with pytest.raises(ValueError, match=r"of the cache \(2, 4, 8, 12\)"):
                call()


def test_to_commit_a_chunk_takes_no_second_cache(monkeypatch):
    """The old keys and values of a block are gone before the next block's grow."""
    model, text = build(num_layers=4), draw("text", 1, 5, 12)
    cache = model.extend(model.new_cache(), draw("a", 1, 1, 4, 8, 12), text)
    old, alive, cat = [weakref.ref(k) for k, _ in cache.past], [], torch.cat

    def watched(tensors, *args):
        made = cat(tensors, *args)
        if made.ndim == 4 and made.shape[1] > cache.past[-1][0].shape[1]:
            alive.append(sum(k() is not None for k in old))
        return made

    monkeypatch.setattr(torch, "cat", watched)
    model.extend(cache, draw("b", 1, 1, 4, 8, 12), text)
    assert alive[-1] == 1 and len(cache.past) == 4


def test_a_folder_of_mixed_precision_computes(tmp_path):
    """diffusers keeps tables, LayerNorms and the time embedder in float32 where the rest is bfloat16."""
    build("anyflow").save_pretrained(tmp_path)
    wanted = Wan.from_pretrained(tmp_path)(draw("z", 1, 3, 4, 8, 12), 0.7, 0.2, draw("text", 1, 5, 12))
    state = load_file(tmp_path / WEIGHTS)
    keep = re.compile("time_embedder|scale_shift_table|norm2")
    state = {name: p if keep.search(name) else p.bfloat16() for name, p in state.items()}
    save_file(state, tmp_path / WEIGHTS)
    found = Wan.from_pretrained(tmp_path)(draw("z", 1, 3, 4, 8, 12), 0.7, 0.2, draw("text", 1, 5, 12))
    assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("kind, part", [("anyflow", "delta_embedder"), ("causal", "delta_embedder"),
                                        ("causal", "far_patch_embedding")])
@pytest.mark.parametrize("wanted", [None, "causal"])
def test_a_student_without_what_students_have_is_damaged(kind, part, wanted, tmp_path):
    """Only a teacher's folder gets a second time embedder, only a bidirectional one's compressed patches."""
    build(kind).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: [state.pop(name) for name in list(state) if part in name])
    with pytest.raises(ValueError, match=f"lacks .*{part}"):
        Wan.from_pretrained(tmp_path, wanted)


def test_two_networks_in_a_folder_are_refused(tmp_path):
    for name in ("transformer", "transformer_2"):
        build("teacher").save_pretrained(tmp_path / name)
    for folder in (tmp_path, tmp_path / "transformer"):
        with pytest.raises(ValueError, match="two networks, transformer and transformer_2"):
            Wan.from_pretrained(folder)


def test_a_folder_opens_from_within_and_beside_another_of_any_name(tmp_path, monkeypatch):
    for name in ("mine", "transformer_2"):
        build("teacher").save_pretrained(tmp_path / name)
        assert Wan.from_pretrained(tmp_path / name).config.kind == "teacher"
    monkeypatch.chdir(tmp_path / "mine")
    Wan.from_pretrained(".")


def test_new_keys_are_checked(tmp_path):
    build("teacher").save_pretrained(tmp_path)
    for new in ({"chunk_partition": (0, -1)}, {"full_chunk_limit": 0}):
        with pytest.raises(ValueError, match="expected"):
            Wan.from_pretrained(tmp_path, "causal", **new)
    assert Wan.from_pretrained(tmp_path, "causal", chunk_partition=[1, 1]).config.chunk_partition == (1, 1)


@pytest.mark.parametrize("size", [(1, 4, 3), (1, 3, 4), (2, 4, 4)])
def test_compressed_patches_are_whole_patches(size):
    with pytest.raises(ValueError, match="expected"):
        WanConfig(kind="causal", patch_size=(1, 2, 2), compressed_patch_size=size)


def test_a_new_student_has_the_embedding_of_t_alone_where_r_equals_t():
    """Its second time embedder starts as the first: whatever the gate, e = E_t(t)."""
    t = torch.rand(2, 3)
    embedder = Wan(replace(PRESETS["tiny"], num_layers=1, gate_value=0.6)).condition_embedder
    e, _ = embedder.times(t, t)
    assert torch.allclose(e, embedder.time_embedder(embedder.sinusoid(t)), atol=1e-6)


def test_norms_and_modulations_of_bfloat16_are_those_of_float32_rounded_once():
    x, y = torch.randn(2, 2, 12, 24).bfloat16()
    shift, scale = torch.randn(2, 2, 5, 24)
    norm, spans = M.Norm(24, 1e-6), [(2, 3), (3, 2)]
    for function in (norm, lambda x: M.modulate(x, shift, scale, spans, 1e-6),
                     lambda x: M.gated(x, y, shift, spans), lambda x: M.gated(y, x, scale, spans)):
        assert torch.equal(function(x), function(x.float()).bfloat16())
    small = 1e-3 * torch.randn(2, 5, 24)  # where eps counts
    assert torch.allclose(norm(small), torch.nn.functional.layer_norm(small, (24,), eps=1e-6))


def test_compressed_patches_of_a_new_model_see_what_its_patches_see():
    student = Wan(replace(PRESETS["tiny"], kind="causal", num_layers=1))
    small, large = student.patch_embedding, student.far_patch_embedding
    flat = torch.ones(1, 3, 1, 8, 8)
    one, four = (embedding(flat)[0, :, 0, 0, 0] - embedding.bias for embedding in (small, large))
    assert torch.allclose(four, 4 * one, atol=1e-4) and torch.equal(small.bias, large.bias)


def test_a_chunk_of_128_tokens_is_padded_by_none():
    model, text = build(num_layers=1), draw("text", 1, 5, 12)
    z = draw("z", 1, 1, 4, 16, 32)  # 8 x 16 tokens
    padded, plain = (model(z, 0.7, 0.2, text, cache=model.new_cache(padding)) for padding in (True, False))
    assert torch.equal(padded, plain)


@pytest.mark.parametrize("patch", [(1, 2, 4), (1, 4, 2)])
def test_patches_that_are_no_squares_go_back_to_where_they_came_from(patch):
    """A network that says its last bias alone, a number for each place in a patch: a pattern that repeats."""
    _, p, q = patch
    model = build("anyflow", num_layers=1, patch_size=patch)
    torch.nn.init.zeros_(model.proj_out.weight), model.proj_out.bias.data.copy_(torch.arange(4.0 * p * q))
    u = model(draw("z", 1, 2, 4, 8, 12), 0.7, 0.2, draw("text", 1, 5, 12))
    pattern = torch.arange(4.0 * p * q).reshape(p, q, 4).permute(2, 0, 1)
    assert torch.equal(u[0, 1], pattern.repeat(1, 8 // p, 12 // q))


@pytest.mark.parametrize("patch", [(1, 6, 2), (1, 2, 6), (1, 6, 6)])
def test_a_patch_of_an_odd_number_of_patches_is_where_its_middle_one_is(patch):
    """The mean of unit numbers at even angles has the direction of the middle one."""
    _, p, q = patch
    model = build(num_layers=1)
    small, large = (model._rope(2, 3, 24 // size[1], 24 // size[2], size).unflatten(0, (3, 24 // size[1], -1))
                    for size in ((1, 2, 2), patch))
    assert torch.allclose(large, small[:, p // 4 :: p // 2, q // 4 :: q // 2], atol=1e-6)


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls[op.overloadpacket._qualified_op_name.split("::")[1]] += 1
        return op(*args, **(kwargs or {}))


def test_checkpointing_recomputes_blocks_whole_or_but_for_self_attention():
    """A block's two attentions run once, of two with "selective" one again, with "full" both."""
    model, runs, linears = build("anyflow"), {}, {}
    for model.checkpointing in ("none", "selective", "full"):
        with Count() as counted:
            model(draw("z", 1, 5, 4, 8, 12), 0.7, 0.2, draw("text", 1, 5, 12)).sum().backward()
        runs[model.checkpointing] = counted.calls["_scaled_dot_product_flash_attention_for_cpu"]
        linears[model.checkpointing] = counted.calls["addmm"]
    n = len(model.blocks)
    assert runs == {"none": 2 * n, "selective": 3 * n, "full": 4 * n}
    assert linears["none"] < linears["selective"] == linears["full"]


@pytest.mark.parametrize("kind", ["anyflow", "causal"])
def test_no_student_becomes_a_teacher(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"kind is 'teacher' for .* of kind {kind}, expected a student's"):
        Wan.from_pretrained(tmp_path, "teacher")


def test_what_a_folder_says_of_itself_is_kept_and_only_what_it_lacks_is_taken(tmp_path):
    build("anyflow", gate_value=0.6).save_pretrained(tmp_path)
    config = Wan.from_pretrained(tmp_path, "causal", gate_value=0.1, full_chunk_limit=2).config
    assert (config.gate_value, config.full_chunk_limit) == (0.6, 2)


def test_a_folder_opens_in_the_precision_asked_for(tmp_path):
    build("anyflow").save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert {p.dtype for p in Wan.from_pretrained(tmp_path, dtype=dtype).parameters()} == {dtype}


@pytest.mark.parametrize("kind", ["anyflow", "causal"])
def test_guidance_of_zero_makes_the_clip_of_the_null_prompt(kind):
    model, noise = build(kind), draw("noise", 1, 5, 4, 8, 12)
    text, null = draw("text", 1, 5, 12), draw("null", 1, 5, 12)
    clip = sample.generate(model, text, noise, 2, guidance=0.0, null_text=null)
    assert torch.allclose(clip, sample.generate(model, null, noise, 2), atol=1e-5)


def test_a_budget_counts_what_a_call_costs_for_a_frame(monkeypatch):
    """Calls and ways into the cache of a second a frame, chunks of two frames: the first takes 4 x 2 and 2 of
    30 seconds, 5 a frame are left for four frames, and 6 for the last two; two a frame go to the cache."""
    model, calls, spent = build(num_layers=1), [[]], [0.0]
    monkeypatch.setattr(sample.time, "perf_counter", lambda: sum(spent))
    model.register_forward_hook(lambda *_: calls[-1].append(1) or spent.append(2.0))
    extend = model.extend
    monkeypatch.setattr(model, "extend", lambda *inputs: (
        calls.append([]), spent.append(2.0), extend(*inputs))[2])
    text, noise = draw("text", 1, 5, 12), draw("z", 1, 6, 4, 8, 12)
    list(sample.stream(model, text, noise, 4, chunks=(2, 2, 2), budget=30.0))
    assert [len(made) for made in calls] == [4, 3, 4] and sum(spent) <= 30


def test_samplers_are_those_of_anyflow_by_name():
    model, text, noise = build("anyflow"), draw("text", 1, 5, 12), draw("noise", 1, 3, 4, 8, 12)
    by_name = {"euler": lambda *args, **cond: anyflow.sample(*args, average=False, **cond),
               "flowmap": anyflow.sample, "consistency": anyflow.consistency_sample}
    assert by_name.keys() == sample.SAMPLERS.keys()
    for name, function in by_name.items():
        torch.manual_seed(1)
        wanted = function(model, noise, 3, shift=5.0, text=text)
        torch.manual_seed(1)
        assert torch.allclose(sample.generate(model, text, noise, 3, sampler=name), wanted, atol=1e-5), name


def test_only_stage_two_is_sampled_as_its_rollout():
    found = [sample.sampler_of_stage(stage, "consistency") for stage in ("teacher", "flowmap", "onpolicy")]
    assert found == ["euler", None, "consistency"]


BAD_CALLS = {
    "text has a batch of 1, expected 2": lambda m, z, x: m(torch.cat([z, z]), 0.5, 0.1, x),
    "clean is \\(2, 3, 4, 8, 12\\)": lambda m, z, x: m(
        z, 0.5, 0.1, x, clean=torch.cat([z, z]), chunks=(1, 2)),
    "steps are 3 numbers for 2 chunk": lambda m, z, x: sample.generate(m, x, z, [1, 2, 3], chunks=(1, 2)),
    "steps are 0 numbers": lambda m, z, x: sample.generate(m, x, z, [], chunks=(1, 2)),
    "steps are 2 numbers for 1 chunk": lambda m, z, x: sample.generate(build("anyflow"), x, z, [1, 2]),
    "budget is 0": lambda m, z, x: list(sample.stream(m, x, z, 1, chunks=(1, 2), budget=0)),
    "budget is nan": lambda m, z, x: list(sample.stream(m, x, z, 1, chunks=(1, 2), budget=math.nan)),
    "expected \\(B, F, 4, H, W\\)": lambda m, z, x: m(z[:, :, :3], 0.5, 0.1, x),
    "expected multiples of 4 x 4": lambda m, z, x: m(z[..., :10], 0.5, 0.1, x, chunks=(1, 2)),
    "expected multiples of 2 x 2": lambda m, z, x: m(z[..., :11], 0.5, 0.1, x),
    "text has shape": lambda m, z, x: m(z, 0.5, 0.1, x[..., :5]),
    "times are in \\[1.5, 1.5\\]": lambda m, z, x: m(z, 1.5, 0.1, x),
    "a time has shape \\(7,\\), expected a float, \\(1,\\)": lambda m, z, x: m(z, 0.5, torch.zeros(7), x),
    "found 3 in z": lambda m, z, x: m(z, 0.5, 0.1, x, chunks=(1, 1)),
    "are no sum": lambda m, z, x: sample.generate(m, x, torch.cat([z, z[:, :1]], 1), 1),
    "ends inside a chunk": lambda m, z, x: sample.generate(m, x, z, 1, context=z[:, :2], chunks=(1, 2)),
    "context has 3 frames": lambda m, z, x: sample.generate(m, x, z, 1, context=z),
    "context has shape": lambda m, z, x: sample.generate(m, x, z, 1, context=z[:, :1, :2]),
    "steps is 0": lambda m, z, x: sample.generate(m, x, z, 0),
    "needs the null prompt": lambda m, z, x: sample.generate(m, x, z, 1, guidance=2.0),
    "rank 0": lambda m, z, x: add_lora(m, 0),
    "rank 1 and 0 linears": lambda m, z, x: add_lora(m, 1, "nothing"),
    "has a LoRA already": lambda m, z, x: add_lora(add_lora(m, 1, BODY), 1),
    "clean is \\(1, 3, 4, 4, 12\\)": lambda m, z, x: m(z, 0.5, 0.1, x, clean=z[..., :4, :], chunks=(1, 2)),
    "chunks are \\(3, 0\\)": lambda m, z, x: m(z, 0.5, 0.1, x, chunks=(3, 0)),
    "only with `chunks`": lambda m, z, x: m(z, 0.5, 0.1, x, clean=z),
    "or `cache`": lambda m, z, x: m(z, 0.5, 0.1, x, chunks=(1, 2), cache=m.new_cache()),
    "batch of 2": lambda m, z, x: m(z, 0.5, 0.1, torch.cat([x, x])),
    "text has shape .1, 5, 3.": lambda m, z, x: sample.generate(m, x[..., :3], z, 1, chunks=(3,)),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_call_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message](build(num_layers=1), draw("z", 1, 3, 4, 8, 12), draw("text", 1, 5, 12))


def test_a_bidirectional_model_has_no_chunks():
    model, z = build("anyflow"), torch.zeros(1, 1, 4, 8, 8)
    for call in (model.new_cache, lambda: list(sample.stream(model, None, z, 1))):
        with pytest.raises(ValueError, match="causal model"):
            call()


def test_lean_norm_is_rms_norm_and_keeps_its_input_alone():
    """Values and gradients of torch's (float64), also of a frozen weight; of two tensors of x's size, one."""
    norm = torch.nn.RMSNorm(24, 1e-6).double()
    torch.nn.init.normal_(norm.weight)
    x, g = torch.randn(2, 2, 3, 5, 24, dtype=torch.float64).unbind()
    made = []
    for function in (norm, lambda x: lean(norm, x)):
        y, kept = x.clone().requires_grad_(), set()
        with torch.autograd.graph.saved_tensors_hooks(
                lambda s, kept=kept: kept.add((s.data_ptr(), s.numel())) or s, lambda s: s):
            out = function(y * 1)
        made.append([out, *torch.autograd.grad(out, (y, norm.weight), g)])
        made[-1].append(sum(numel == x.numel() for _, numel in kept))
    (*wanted, two), (*found, one) = made
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[0], lean(norm, x))  # x needs no gradient
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, wanted))
    assert (one, two) == (1, 2)
    norm.requires_grad_(False)
    _, tangent = torch.func.jvp(lambda x: lean(norm, x), (x,), (g,))
    assert torch.allclose(tangent, torch.func.jvp(norm, (x,), (g,))[1])
