"""The same calls to diffusers and to this project, with weights and inputs that depend on their names alone.

A case is a dict: kind, config, call, and what the call needs. `ours` and `theirs` answer (B, F, C, H, W).
"""

import zlib

import numpy as np
import torch

import sample
from model import CLASSES, Wan, WanConfig

SMALL = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4,
             out_channels=4, text_dim=12, freq_dim=16, ffn_dim=48, num_layers=2, cross_attn_norm=True,
             eps=1e-6, rope_max_seq_len=1024)
STUDENT = dict(gate_value=0.25, deltatime_type="r", image_dim=None)
CAUSAL = dict(compressed_patch_size=(1, 4, 4), full_chunk_limit=3, chunk_partition=(1, 2, 2, 1, 2, 2, 1))
TEACHER = dict(qk_norm="rms_norm_across_heads", image_dim=None, added_kv_proj_dim=None,
               pos_embed_seq_len=None)


def config_of(kind, **changes):
    extra = {"teacher": TEACHER, "anyflow": STUDENT, "causal": STUDENT | CAUSAL}[kind]
    return {"_class_name": CLASSES[kind]} | SMALL | extra | changes


def draw(name, *shape):
    """Normal float32 numbers that depend on the name alone, on every version of every library."""
    numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(np.asarray(numbers, dtype="float32"))


def weights(shapes):
    """Weights large enough that every part of the network matters in the output."""
    one = lambda name: ".norm" in name and name.endswith("weight")
    scale = lambda shape: 0.2 if len(shape) > 1 else 0.3
    return {name: draw(name, *shape) * scale(shape) + one(name) for name, shape in shapes.items()}


def times(name, *shape):
    """Pairs t >= r in (0, 1)."""
    t, r = draw(name, 2, *shape).sigmoid().sort(0, descending=True).values
    return t, r


CASES = {
    "teacher": dict(kind="teacher", call="forward", frames=3),
    "bidirectional": dict(kind="anyflow", call="forward", frames=3),
    "bidirectional, t - r": dict(kind="anyflow", call="forward", frames=3, config=dict(deltatime_type="t-r")),
    "bidirectional, times by frame": dict(kind="anyflow", call="by frame", frames=4),
    "pipeline": dict(kind="anyflow", call="pipeline", frames=3, steps=3),
    "pipeline, guidance": dict(kind="anyflow", call="pipeline", frames=3, steps=2, guidance=3.0),
    "pipeline, given frame": dict(kind="anyflow", call="pipeline", frames=3, steps=2, given=1),
    "causal pipeline": dict(kind="causal", call="pipeline", frames=11, steps=2),
    "causal pipeline, guidance": dict(kind="causal", call="pipeline", frames=11, steps=2, guidance=2.5),
    "causal pipeline, image": dict(kind="causal", call="pipeline", frames=11, steps=1, given=1),
    "causal pipeline, video": dict(kind="causal", call="pipeline", frames=11, steps=1, given=5, guidance=2.0),
} | {
    f"causal training, {len(chunks)} chunks{' with clean copy' * clean}": dict(
        kind="causal", call="training", chunks=chunks, clean=clean)
    for chunks in ((2,), (1, 2), (1, 2, 1), (1, 2, 1, 2), (1, 1, 2, 1, 2), (1, 2, 1, 1, 2, 1))
    for clean in (True, False)
}


def inputs(case, batch=2, size=(8, 12)):
    c = config_of(case["kind"], **case.get("config", {}))
    frames = case.get("frames") or sum(case["chunks"])
    z, clean = (draw(f"{part} {case}", batch, frames, c["in_channels"], *size) for part in ("noise", "clean"))
    text, null = (draw(f"{part} {case}", batch, 5, c["text_dim"]) for part in ("text", "null"))
    return c, z, clean, text, null


@torch.no_grad()
def ours(case, dtype=torch.float32):
    c, z, clean, text, null = inputs(case)
    model = Wan(WanConfig.from_dict(c))
    model.load_state_dict(weights({name: value.shape for name, value in model.state_dict().items()}))
    model, z, clean, text, null = model.to(dtype), *(x.to(dtype) for x in (z, clean, text, null))
    if case["call"] == "forward":
        t, r = times("forward", len(z))
        return model(z, t, t if case["kind"] == "teacher" else r, text)
    if case["call"] == "by frame":
        t, r = times("by frame", *z.shape[:2])
        t[:, 0] = r[:, 0] = 0
        return model(z, t, r, text)
    if case["call"] == "training":
        start = sum(case["chunks"][:-3])
        if case["clean"]:
            return model(z[:, start:], *times("training", len(z)), text, clean=clean, chunks=case["chunks"])
        return model(z, *times("training", *z.shape[:2]), text, chunks=case["chunks"])
    guidance, given = case.get("guidance", 1.0), case.get("given", 0)
    null, context = null if guidance != 1 else None, clean[:, :given] if given else None
    return sample.generate(model, text, z, case["steps"], guidance=guidance, null_text=null, context=context,
                           padding=True)  # as the pipeline of diffusers


@torch.no_grad()
def theirs(case, dtype=torch.float32):
    import diffusers

    c, z, clean, text, null = inputs(case)
    model = getattr(diffusers, c["_class_name"])(**{k: v for k, v in c.items() if not k.startswith("_")})
    model.load_state_dict(weights({name: value.shape for name, value in model.state_dict().items()}))
    model, z, clean, text, null = model.to(dtype), *(x.to(dtype) for x in (z, clean, text, null))
    if case["call"] == "forward":
        t, r = times("forward", len(z))
        if case["kind"] == "teacher":
            return model(z.transpose(1, 2), 1000 * t, text, return_dict=False)[0].transpose(1, 2)
        t, r = (1000 * x[:, None].expand(z.shape[:2]) for x in (t, r))
        return model(z, t, r, text, return_dict=False)[0]
    if case["call"] == "by frame":
        t, r = times("by frame", *z.shape[:2])
        t[:, 0] = r[:, 0] = 0
        return model(z, 1000 * t, 1000 * r, text, return_dict=False)[0]
    if case["call"] == "training":
        chunks, start, more = list(case["chunks"]), sum(case["chunks"][:-3]), {}
        t, r = times("training", *z.shape[:2])
        if case["clean"]:
            late = torch.arange(z.shape[1]) >= start
            t, r = (late * x[:, None] for x in times("training", len(z)))
            z = torch.cat([clean[:, :start], z[:, start:]], 1)
            clean = clean[:, start:]
            more = dict(clean_hidden_states=clean, clean_timestep=torch.zeros(clean.shape[:2]))
        return model(z, 1000 * t, 1000 * r, text, chunks, return_dict=False, **more)[0]
    return pipeline(model, case, z, clean, text, null)


def pipeline(model, case, z, clean, text, null):
    import diffusers

    kind = diffusers.AnyFlowPipeline if case["kind"] == "anyflow" else diffusers.AnyFlowFARPipeline
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5)
    pipe = kind(tokenizer=None, text_encoder=None, transformer=model, vae=None, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 8
    guidance, given = case.get("guidance", 1.0), case.get("given", 0)
    null, context = null if guidance != 1 else None, clean[:, :given] if given else None
    size = dict(num_frames=4 * z.shape[1] - 3, height=8 * z.shape[3], width=8 * z.shape[4])
    out = pipe(prompt_embeds=text, negative_prompt_embeds=null, guidance_scale=guidance,
               video_latents=context, latents=z.transpose(1, 2), num_inference_steps=case["steps"],
               output_type="latent", **size)
    return out.frames.transpose(1, 2)
