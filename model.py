"""Wan 2.1's video DiT in one class: the teacher, the AnyFlow student, and causal (FAR) AnyFlow.

The three are one network over GROUPS of tokens. A group is a run of frames cut into patches of one size; it brings
its frames' times (t, r) and its positions in the video. All that differs is which groups there are and who sees
whom:

    bidirectional       [the whole video]                                      everybody sees everybody
    causal, inference   [one chunk]                                            sees itself and the KV cache
    causal, training    [compressed past | noisy window | clean window]        a mask by chunk, `chunk_mask`

Parameters and config keys have the names of diffusers: published folders load, and what is saved opens there.
Latents are (B, F, C, H, W), text embeddings (B, L, text_dim), times float, (B,) or (B, F) in [0, 1].
Sources: Wan (2503.20314), FAR (2503.19325), AnyFlow (2605.13724).
"""

import functools
import json
import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CLASSES = {
    "teacher": "WanTransformer3DModel",
    "anyflow": "AnyFlowTransformer3DModel",
    "causal": "AnyFlowFARTransformer3DModel",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


# ------------------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------------------

STUDENT, CAUSAL = {"kinds": ("anyflow", "causal")}, {"kinds": ("causal",)}


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the network, under the names that diffusers gives them. Defaults: Wan 2.1 1.3B."""

    kind: str = "anyflow"  # "teacher": one time; "anyflow": two; "causal": two times, chunks and a cache
    patch_size: tuple = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024  # kept for diffusers; positions here have no limit
    gate_value: float = field(default=0.25, metadata=STUDENT)  # weight of r beside t in the time embedding
    deltatime_type: str = field(default="r", metadata=STUDENT)  # the second embedder sees r, or t - r
    compressed_patch_size: tuple = field(default=(1, 4, 4), metadata=CAUSAL)
    full_chunk_limit: int = field(default=3, metadata=CAUSAL)  # chunks at full resolution, the newest included
    chunk_partition: tuple = field(default=(1, 3, 3, 3, 3, 3, 3, 2), metadata=CAUSAL)  # latent frames a chunk

    # What published configs also hold, with the one value that this network has.
    FIXED = {"image_dim": None, "qk_norm": "rms_norm_across_heads", "added_kv_proj_dim": None,
             "pos_embed_seq_len": None}

    @property
    def width(self):
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config, where="config"):
        """From the dict of a diffusers config.json. ValueError for a missing, unknown or unsupported key."""
        kinds = {name: kind for kind, name in CLASSES.items()}
        if not isinstance(config, dict):
            raise ValueError(f"{where} holds {type(config).__name__}, expected an object of keys and values")
        name = config.get("_class_name")
        if name not in kinds:
            raise ValueError(f"{where}: _class_name is {name!r}, expected one of {', '.join(kinds)}")
        keys = cls._keys(kinds[name])
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        for key, value in cls.FIXED.items():
            if given.pop(key, value) != value:
                raise ValueError(f"{where}: {key} is {config[key]!r}, but only {value!r} is supported")
        for problem, names in (("unknown key", given.keys() - keys), ("missing key", keys - given.keys())):
            if names:
                raise ValueError(f"{where}: {problem} {', '.join(sorted(names))} for {name}")
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        given["out_channels"] = given["out_channels"] or given["in_channels"]
        return cls(kind=kinds[name], **given)

    def __post_init__(self):
        small, large = self.patch_size, self.compressed_patch_size
        for name, patch in (("patch_size", small), ("compressed_patch_size", large)):
            if not isinstance(patch, tuple) or len(patch) != 3 or patch[0] != 1:
                raise ValueError(f"{name} is {patch!r}, expected patches of one frame, (1, h, w)")
        if self.kind == "causal" and (large[1] % small[1] or large[2] % small[2]):
            raise ValueError(f"compressed_patch_size is {large}, expected a multiple of patch_size {small}")
        if self.deltatime_type not in ("r", "t-r"):
            raise ValueError(f"deltatime_type is {self.deltatime_type!r}, expected 'r' or 't-r'")
        for name in ("num_attention_heads", "attention_head_dim", "in_channels", "text_dim", "num_layers"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected an integer of at least 1")

    def to_dict(self):
        """The config.json that diffusers reads."""
        given = {key: getattr(self, key) for key in sorted(self._keys(self.kind))}
        fixed = self.FIXED if self.kind == "teacher" else {"image_dim": None}
        return {"_class_name": CLASSES[self.kind]} | given | fixed

    @classmethod
    def _keys(cls, kind):
        return {f.name for f in fields(cls) if f.name != "kind" and kind in f.metadata.get("kinds", (kind,))}


PRESETS = {
    "wan-1.3b": WanConfig(),
    "wan-14b": WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40),
    "tiny": WanConfig(patch_size=(1, 4, 4), compressed_patch_size=(1, 8, 8), num_attention_heads=3,
                      attention_head_dim=24, in_channels=3, out_channels=3, text_dim=32, freq_dim=64, ffn_dim=144,
                      num_layers=4),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------------------


class Embedder(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, inputs, width, activation):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, width), nn.Linear(width, width)
        self.activation = activation

    def forward(self, x):
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """Times and text to the network's width."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        self.time_embedder = Embedder(config.freq_dim, width, F.silu)
        if config.kind != "teacher":
            self.delta_embedder = Embedder(config.freq_dim, width, F.silu)
            self.delta_embedder.load_state_dict(self.time_embedder.state_dict())
        self.time_proj = nn.Linear(width, 6 * width)
        self.text_embedder = Embedder(config.text_dim, width, gelu)

    def times(self, t, r):
        """(B, f) -> e = (1 - gate) E_t(t) + gate E_r(r) (B, f, width), and its modulations (B, f, 6, width)."""
        e = self.time_embedder(self.sinusoid(t))
        if self.config.kind != "teacher":
            second = r if self.config.deltatime_type == "r" else t - r
            gate = self.config.gate_value
            e = (1 - gate) * e + gate * self.delta_embedder(self.sinusoid(second))
        return e, self.time_proj(F.silu(e)).unflatten(-1, (6, -1))

    def sinusoid(self, t):
        """1000 t as cosines, then sines, of geometrically spaced frequencies 1 to 1/10000: (..., freq_dim)."""
        half = self.config.freq_dim // 2
        exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
        frequencies = torch.exp(-math.log(10000) * exponents)
        angles = 1000 * t.float()[..., None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], -1).to(self.time_proj.weight.dtype)


def gelu(x):
    return F.gelu(x, approximate="tanh")


class Attention(nn.Module):
    """Multi-head attention; q and k are normalised over all heads together."""

    def __init__(self, config):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.width
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = nn.RMSNorm(width, config.eps), nn.RMSNorm(width, config.eps)

    def query(self, x):
        """(B, N, width) -> (B, N, heads, head_dim)."""
        return self.norm_q(self.to_q(x)).unflatten(2, (self.heads, -1))

    def key_value(self, x):
        """Two of (B, N, heads, head_dim)."""
        return tuple(y.unflatten(2, (self.heads, -1)) for y in (self.norm_k(self.to_k(x)), self.to_v(x)))

    def attend(self, q, k, v, mask=None):
        """(B, N, heads, head_dim), M keys and values -> (B, N, width). mask: None, bool (N, M) or a BlockMask."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if isinstance(mask, BlockMask):
            x = compiled_flex_attention()(q, k, v, block_mask=mask)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](x.transpose(1, 2).flatten(2))


GRAPHS = 64  # that one function may be compiled to: chunks have many shapes, each with and without gradient


@functools.cache
def compiled_flex_attention():
    torch._dynamo.config.recompile_limit = GRAPHS
    return torch.compile(flex_attention, dynamic=False)


def compile_blocks(model):
    """Compile a network block by block, so that all blocks share their graphs."""
    torch._dynamo.config.recompile_limit = GRAPHS
    for block in model.blocks:
        block.compile()


class FeedForward(nn.Module):
    """Linear, GELU, Linear, under the names of diffusers (`net.0.proj`, `net.2`)."""

    def __init__(self, width, inner):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, inner)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x):
        return self.net[2](gelu(self.net[0].proj(x)))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; times enter as shift, scale and gate by frame."""

    def __init__(self, config):
        super().__init__()
        self.eps, width = config.eps, config.width
        self.attn1, self.attn2 = Attention(config), Attention(config)
        self.norm2 = nn.LayerNorm(width, config.eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(width, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(self, x, *inputs, checkpointing="none"):
        """`compute`, and what of it the backward pass recomputes: "none", all ("full"), or all but self-attention
        ("selective"). A compiled block holds its checkpoint inside, where the compiler sees both."""
        if checkpointing == "none":
            return self.compute(x, *inputs)
        policy = dict(context_fn=keep_self_attention) if checkpointing == "selective" else {}
        return checkpoint(self.compute, x, *inputs, use_reentrant=False, preserve_rng_state=False, **policy)

    def compute(self, x, modulation, spans, rope, text, past=None, mask=None, blank=0, keep=False):
        """The block on tokens x (B, N, width), returned in that shape; with keep also their keys and values.

        modulation: (B, f, 6, width). spans: frames, and tokens a frame, of each group. rope: of `rotate`. text:
        embedded (B, L, width), or its keys and values. past: cached keys and values, before x. blank: how many keys
        and values of zero come after x.
        """
        m = (self.scale_shift_table + modulation.float()).unbind(2)  # shift, scale, gate; shift, scale, gate

        h = modulate(x, m[0], m[1], spans, self.eps)
        k, v = self.attn1.key_value(h)
        k = rotate(k, rope)
        own = (k, v) if keep else None
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        if blank:
            k, v = (F.pad(y, (0, 0, 0, 0, 0, blank)) for y in (k, v))
        x = gated(x, self.attn1.attend(rotate(self.attn1.query(h), rope), k, v, mask), m[2], spans)
        del h, k, v

        h = norm_float32(self.norm2, x)
        text = self.attn2.key_value(text) if torch.is_tensor(text) else text
        x = x + self.attn2.attend(self.attn2.query(h), *text)

        x = gated(x, self.ffn(modulate(x, m[3], m[4], spans, self.eps)), m[5], spans)
        return (x, own) if keep else x


ATTENTION = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in (
    "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")]  # fmt: skip
ATTENTION.append(torch.ops.higher_order.flex_attention)


def is_self_attention(context, op, q=None, k=None, *args, **kwargs):
    own = op in ATTENTION and q.shape[2] <= k.shape[2]  # more tokens than a prompt; some keys may be cached
    return CheckpointPolicy.MUST_SAVE if own else CheckpointPolicy.PREFER_RECOMPUTE


# At 32,760 tokens it is half of a block's work (14B) or more (1.3B), and one tensor of the size of its input.
keep_self_attention = functools.partial(create_selective_checkpoint_contexts, is_self_attention)


def norm_float32(norm, x):
    if isinstance(norm, nn.Identity):
        return x
    return F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps).to(x.dtype)


def modulate(x, shift, scale, spans, eps):
    """LayerNorm(x) (1 + scale) + shift in float32; x (B, N, width), shift and scale (B, f, width) by frame."""
    h = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return per_frame(torch.addcmul, spans, (shift, False), (h, True), (1 + scale, False)).to(x.dtype)


def gated(x, y, gate, spans):
    """x + gate y in float32; x, y (B, N, width), gate (B, f, width) by frame."""
    return per_frame(torch.addcmul, spans, (x.float(), True), (y.float(), True), (gate, False)).to(x.dtype)


def per_frame(function, spans, *operands):
    """function of operands (tokens (B, N, width), True) or (frames (B, f, width), False), group by group: the value
    of a frame meets the frame's tokens by broadcasting, and is never repeated in memory."""
    counts = {True: [f * n for f, n in spans], False: [f for f, _ in spans]}
    groups = zip(*(value.split(counts[tokens], 1) for value, tokens in operands))
    out = []
    for (f, n), group in zip(spans, groups):
        parts = (v.unflatten(1, (f, n)) if tokens else v[:, :, None] for v, (_, tokens) in zip(group, operands))
        out.append(function(*parts).flatten(1, 2))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def rotate(x, rope):
    """Turn the pairs (2i, 2i+1) of x (B, N, heads, head_dim), as complex numbers, by rope (N, head_dim/2, 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # real arithmetic is fused, complex is not
        (a, b), (cos, sin) = pairs.unbind(-1), rope[:, None].unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope)[:, None])
    return turned.flatten(-2).to(x.dtype)


def rope_axis(dim, start, count, cell, device):
    """Unit complex numbers (count, dim/2) of one axis; a patch over `cell` positions has their normalised mean."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    positions = torch.arange(start * cell, (start + count) * cell, device=device, dtype=torch.float64)
    angles = positions[:, None] * frequencies
    turns = torch.polar(torch.ones_like(angles), angles).unflatten(0, (count, cell)).mean(1)
    return (turns / turns.abs()).to(torch.complex64)


def chunk_mask(chunks, window, full, compressed, clean, device):
    """Who sees whom in causal training, over [compressed past | noisy window | clean window].

    Nobody sees a later chunk. A noisy token sees the past, CLEAN copies of earlier chunks and the noisy tokens
    of its own chunk, as it will when sampling; a clean token sees the past and clean tokens. Without clean
    copies, noisy tokens see the noisy tokens of earlier chunks.
    chunks: frames of each, the last `window` of them at full resolution. full, compressed: tokens a frame.
    Returns bool (N, N), or a BlockMask on a GPU.
    """
    past, late = list(enumerate(chunks))[:-window], list(enumerate(chunks))[-window:]
    runs = [(i, 0, f * compressed) for i, f in past]  # chunk, role and length; roles: 0 past, 1 noisy, 2 clean
    runs += [(i, role, f * full) for role in ((1, 2) if clean else (1,)) for i, f in late]
    index, roles, lengths = torch.tensor(runs, device=device).T
    n = sum(length for _, _, length in runs)
    run = (torch.arange(n, device=device)[:, None] >= lengths.cumsum(0)).sum(1)
    chunk, role = index[run], roles[run]

    def allowed(b, h, q, k):
        to_noisy = (role[q] == 1) & ((chunk[q] == chunk[k]) | (not clean))
        to_clean = (role[q] == 2) | (chunk[k] < chunk[q])
        return (chunk[k] <= chunk[q]) & ((role[k] == 0) | (role[k] == 1) & to_noisy | (role[k] == 2) & to_clean)

    if torch.device(device).type == "cuda":
        return torch.compile(create_block_mask)(allowed, None, None, n, n, device=device)  # never N x N in memory
    return allowed(None, None, torch.arange(n, device=device)[:, None], torch.arange(n, device=device))


cached_chunk_mask = functools.lru_cache(maxsize=32)(chunk_mask)


# ------------------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Frames that enter the network together."""

    tokens: torch.Tensor  # (B, f n, width)
    t: torch.Tensor  # (B, f), or (B, 1) for one time in all frames
    r: torch.Tensor
    rope: torch.Tensor  # unit complex numbers, (f n, head_dim/2, 2)

    @property
    def span(self):
        """How many times there are, and how many tokens share each."""
        return self.t.shape[1], self.tokens.shape[1] // self.t.shape[1]


class Cache:
    """What a causal model remembers of finished chunks: every block's keys and values, compressed chunks first."""

    def __init__(self, padding):
        self.padding = padding
        self.past = None  # a list, by block, of keys and values (B, tokens, heads, head_dim)
        self.compressed = 0  # how many of the tokens are of compressed chunks: these never change again
        self.window = []  # the chunks that are at full resolution, as latents
        self.frames = 0  # latent frames committed

    def append(self, own):
        if self.past is not None:
            own = [tuple(torch.cat(both, 1) for both in zip(old, new)) for old, new in zip(self.past, own)]
        self.past = own

    def forget_full_resolution(self):
        n = self.compressed
        self.past = [(k[:, :n], v[:, :n]) for k, v in self.past] if n else None


class Wan(nn.Module):
    """u(z, t, r, text) for videos z (B, F, C, H, W). See `forward` for the three ways to call it."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        self.patch_embedding = nn.Conv3d(config.in_channels, width, config.patch_size, config.patch_size)
        if config.kind == "causal":
            size = config.compressed_patch_size
            self.far_patch_embedding = nn.Conv3d(config.in_channels, width, size, size)
            larger = compressed_patches(self.patch_embedding.state_dict(), size)
            self.far_patch_embedding.load_state_dict(larger)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.proj_out = nn.Linear(width, config.out_channels * math.prod(config.patch_size))
        self.checkpointing = "none"  # of the blocks: "none", "full" or "selective", see `Block.forward`

    def forward(self, z, t, r, text, *, clean=None, chunks=None, cache=None):
        """Average velocity u(z, t, r) of z's frames, or of those in the window where there are `chunks`.

        Bidirectional: z is a whole video.
        Causal inference: z is the next chunk, and `cache`, from `new_cache`, holds the earlier ones.
        Causal training: `chunks` are the frames of every chunk, `clean` is the clean video of all of them, and z
        the noisy frames of the last `full_chunk_limit` chunks (of all, if they are fewer). Without `clean`, z is
        the whole noisy video, its earlier chunks are compressed with their own times, and u is of the last ones.

        t, r: float, (B,) or (B, F). text: (B, L, text_dim), or what `encode_text` made of it. Raises ValueError.
        """
        self._check(z, text, clean, chunks, cache)
        text = self.embed_text(text) if torch.is_tensor(text) else text
        t, r = torch.broadcast_tensors(as_times(t, z, "t"), as_times(r, z, "r"))
        mask, past = None, None
        if chunks is not None:
            window = min(len(chunks), self.config.full_chunk_limit)
            start = sum(chunks[:-window])
            video = z if clean is None else clean
            if video.shape[1] != sum(chunks) or z.shape[1] != sum(chunks) - start * (clean is not None):
                wanted = f"{sum(chunks)} frames, {sum(chunks) - start} of them in the window"
                found = f"{z.shape[1]} in z and {video.shape[1]} in the whole video"
                raise ValueError(f"chunks {tuple(chunks)} are {wanted}; found {found}")
            zero = torch.zeros_like(t[:, :1])
            if clean is None:
                early, late = zip(*((x[:, :start], x[:, start:]) if x.shape[1] > 1 else (x, x) for x in (t, r)))
            else:
                early, late = (zero, zero), (t, r)
            groups = [self._group(video[:, :start], *early, 0, compressed=True)] if start else []
            groups += [self._group(z[:, start - sum(chunks):], *late, start)]
            groups += [self._group(clean[:, start:], zero, zero, start)] if clean is not None else []
            patches = self.config.patch_size, self.config.compressed_patch_size
            tokens = [z.shape[3] * z.shape[4] // math.prod(patch) for patch in patches]
            of_chunks = chunk_mask if torch.compiler.is_compiling() else cached_chunk_mask
            mask = of_chunks(tuple(chunks), window, *tokens, clean is not None, str(z.device))
            noisy = int(start > 0)
        else:
            groups, noisy = [self._group(z, t, r, cache.frames if cache else 0)], 0
            past = cache.past if cache else None
        blank = -groups[0].tokens.shape[1] % 128 if cache and cache.padding else 0
        x, e = self._blocks(groups, text, past, mask, blank)

        spans = [g.span for g in groups]
        x = x.split([f * n for f, n in spans], 1)[noisy]
        e = e.split([f for f, _ in spans], 1)[noisy]
        shift, scale = (self.scale_shift_table + e.float()[:, :, None]).unbind(2)
        x = self.proj_out(modulate(x, shift, scale, [spans[noisy]], self.config.eps))
        _, p, q = self.config.patch_size
        h, w = z.shape[3] // p, z.shape[4] // q
        return rearrange(x, "b (f h w) (p q c) -> b f c (h p) (w q)", h=h, w=w, p=p, q=q)

    def embed_text(self, text):
        """(B, L, text_dim) -> (B, L, width)."""
        if text.ndim != 3 or text.shape[2] != self.config.text_dim:
            raise ValueError(f"text has shape {tuple(text.shape)}, expected (B, L, {self.config.text_dim})")
        return self.condition_embedder.text_embedder(text.to(self.proj_out.weight.dtype))

    def encode_text(self, text):
        """(B, L, text_dim) -> keys and values of all cross-attentions: once for a prompt, not once for a step."""
        text = self.embed_text(text)
        return [block.attn2.key_value(text) for block in self.blocks]

    # Causal inference. A compressed token sees only compressed tokens up to its own chunk, so what the cache holds
    # of it is final. A token at full resolution sees the compressed past, which changes when a chunk leaves the
    # window: then the chunks in the window, and they alone, are encoded again.

    def new_cache(self, padding=True):
        """An empty cache for one stream (of any batch size).

        The published sampler pads a chunk to a multiple of 128 tokens and masks nothing, so that every query also
        sees as many keys of zero with values of zero. padding=True does the same, to give the same video;
        padding=False leaves them out, as training does. At 480 x 832 they are 104 of 1,664 keys for the first
        chunk of one frame, 56 of some 14,000 for a later one of three.
        """
        if self.config.kind != "causal":
            raise ValueError(f"a cache needs a causal model, found kind {self.config.kind!r}")
        return Cache(padding)

    @torch.no_grad()
    def extend(self, cache, chunk, text):
        """Commit a finished chunk (B, f, C, H, W): encode it at t = r = 0 and add it to the cache, in place."""
        self._check(chunk, text, None, None, cache)
        text = self.embed_text(text) if torch.is_tensor(text) else text
        cache.window.append(chunk)
        cache.frames += chunk.shape[1]
        new = cache.window[-1:]
        if len(cache.window) >= self.config.full_chunk_limit:
            cache.forget_full_resolution()
            start = cache.frames - sum(c.shape[1] for c in cache.window)
            self._commit(cache, cache.window.pop(0), start, text, compressed=True)
            new = cache.window
        start = cache.frames - sum(c.shape[1] for c in new)
        for chunk in new:
            self._commit(cache, chunk, start, text)
            start += chunk.shape[1]

    def _commit(self, cache, chunk, start, text, compressed=False):
        zero = chunk.new_zeros(len(chunk), 1, dtype=torch.float32)
        group = self._group(chunk, zero, zero, start, compressed)
        own = []
        self._blocks([group], text, cache.past, keep=own)
        cache.append(own)
        cache.compressed += group.tokens.shape[1] * compressed

    def _group(self, video, t, r, start, compressed=False):
        patch = self.config.compressed_patch_size if compressed else self.config.patch_size
        embedding = self.far_patch_embedding if compressed else self.patch_embedding
        tokens = embedding(video.transpose(1, 2).to(embedding.weight.dtype)).flatten(2).transpose(1, 2)
        f, h, w = video.shape[1], video.shape[3] // patch[1], video.shape[4] // patch[2]
        return Group(tokens, t, r, self._rope(start, f, h, w, patch))

    def _rope(self, start, f, h, w, patch):
        """Positions of a group, (f h w, head_dim/2, 2): a third for height, for width, the rest for time."""
        side = 2 * (self.config.attention_head_dim // 6)
        sizes = self.config.attention_head_dim - 2 * side, side, side
        device = self.proj_out.weight.device
        cells = [compressed // full for compressed, full in zip(patch, self.config.patch_size)]
        axes = [rope_axis(size, at, count, cell, device)
                for size, at, count, cell in zip(sizes, (start, 0, 0), (f, h, w), cells)]
        axes = [axis.reshape([-1 if i == j else 1 for j in range(3)] + [axis.shape[1]]).expand(f, h, w, -1)
                for i, axis in enumerate(axes)]
        return torch.view_as_real(torch.cat(axes, -1).flatten(0, 2))

    def _blocks(self, groups, text, past=None, mask=None, blank=0, keep=None):
        """All blocks over all groups: tokens (B, N, width), and e (B, f, width).

        keep: a list that takes the keys and values of every block, for a cache.
        """
        x = torch.cat([g.tokens for g in groups], 1)
        t, r = torch.cat([g.t for g in groups], 1), torch.cat([g.r for g in groups], 1)
        e, modulation = self.condition_embedder.times(t, r)
        rope, spans = torch.cat([g.rope for g in groups]), [g.span for g in groups]
        for i, block in enumerate(self.blocks):
            prompt = text if torch.is_tensor(text) else text[i]
            inputs = (modulation, spans, rope, prompt, past[i] if past else None, mask, blank, keep is not None)
            x = block(x, *inputs, checkpointing=self.checkpointing if torch.is_grad_enabled() else "none")
            if keep is not None:
                x, own = x
                keep.append(own)
        return x, e

    def _check(self, z, text, clean, chunks, cache):
        c = self.config
        if (clean is not None and chunks is None) or (chunks is not None and cache is not None):
            raise ValueError("expected `clean` only with `chunks`, and `chunks` (training) or `cache` (inference)")
        if (chunks is not None or cache is not None) and c.kind != "causal":
            raise ValueError(f"chunks and cache need a causal model, found kind {c.kind!r}")
        if z.ndim != 5 or z.shape[2] != c.in_channels:
            raise ValueError(f"the video has shape {tuple(z.shape)}, expected (B, F, {c.in_channels}, H, W)")
        patch = c.compressed_patch_size if chunks is not None or cache is not None else c.patch_size
        if z.shape[3] % patch[1] or z.shape[4] % patch[2]:
            found, wanted = f"{z.shape[3]} x {z.shape[4]}", f"{patch[1]} x {patch[2]}"
            raise ValueError(f"height and width are {found}, expected multiples of {wanted}")
        batch = len(text if torch.is_tensor(text) else text[0][0])
        if batch != len(z):
            raise ValueError(f"text has a batch of {batch}, expected {len(z)} as the video")

    # Folders in the layout of diffusers: config.json and safetensors, whole or in shards with an index.

    @classmethod
    def from_pretrained(cls, folder, kind=None, dtype=None, device="cpu", **new):
        """Load a folder, or its subfolder `transformer`.

        kind: "anyflow" or "causal" to start a student from a teacher, or a causal model from a bidirectional one or
        the other way; at r = t, on a whole video, it computes what the folder's model does. new: config keys that
        the folder's model lacks, as chunk_partition. Returns a whole model or raises ValueError, which names the
        file, what it has and what it lacks.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"no model folder at {folder}")
        if not (folder / "config.json").exists() and (folder / "transformer" / "config.json").exists():
            folder = folder / "transformer"
        config = WanConfig.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
        if kind is not None:
            known = list(CLASSES)[config.kind != "teacher":]  # two times do not become one
            if kind not in known:
                raise ValueError(f"kind is {kind!r}, expected one of {', '.join(known)} for {folder}")
            own = config.to_dict()
            config = replace(config, kind=kind, **{key: new[key] for key in new if key not in own})
        state = read_weights(folder)
        if kind == "anyflow":
            state = {name: value for name, value in state.items() if not name.startswith("far_patch_embedding.")}
        complete_student(state, config)
        with torch.device("meta"):
            model = cls(config)
        wanted = {name: value.shape for name, value in model.state_dict().items()}
        lacking, unknown = wanted.keys() - state.keys(), state.keys() - wanted.keys()
        for problem, names in (("lacks", lacking), ("has unknown", unknown)):
            if names:
                some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise ValueError(f"{folder} {problem} {some} for a {config.kind} model")
        for name, shape in wanted.items():
            if state[name].shape != shape:
                found = tuple(state[name].shape)
                raise ValueError(f"{folder}: {name} has shape {found}, expected {tuple(shape)}")
        model.load_state_dict({name: value.to(device, dtype) for name, value in state.items()}, assign=True)
        return model

    def save_pretrained(self, folder):
        """Write config.json and the weights, LoRA merged in, for diffusers to open: beside, then renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in merged_state(self).items()}
        write(folder / WEIGHTS, lambda part: save_file(state, part, metadata={"format": "pt"}))
        (folder / f"{WEIGHTS}.index.json").unlink(missing_ok=True)  # of shards that were here before
        config = json.dumps(self.config.to_dict(), indent=2) + "\n"
        write(folder / "config.json", lambda part: part.write_text(config))


def as_times(t, z, name):
    """float, (B,) or (B, F) -> float32 (B, 1) or (B, F). A compiled forward cannot check values, only shapes."""
    t = torch.as_tensor(t, dtype=torch.float32, device=z.device)
    if t.shape not in ((), z.shape[:1], z.shape[:2]):
        wanted = f"a float, ({len(z)},) or {tuple(z.shape[:2])}"
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {wanted}")
    if not torch.compiler.is_compiling() and not ((0 <= t) & (t <= 1)).all():
        raise ValueError(f"{name} is in [{t.min():.4g}, {t.max():.4g}], expected times in [0, 1]")
    return t.expand(len(z))[:, None] if t.ndim < 2 else t


def compressed_patches(embedding, size):
    """{"weight", "bias"} of the patch embedding -> for patches of a larger size, by trilinear interpolation."""
    weight = embedding["weight"]
    larger = F.interpolate(weight.flatten(0, 1)[:, None].float(), size=size, mode="trilinear")
    larger = larger.reshape(*weight.shape[:2], *size).to(weight.dtype)
    return {"weight": larger, "bias": embedding["bias"].clone()}


def complete_student(state, config):
    """Add, in place, what a student has beyond its teacher: a second time embedder, compressed patches."""
    first, second = "condition_embedder.time_embedder.", "condition_embedder.delta_embedder."
    if config.kind != "teacher" and not any(name.startswith(second) for name in state):
        state.update({second + name.removeprefix(first): value.clone()
                      for name, value in list(state.items()) if name.startswith(first)})
    if config.kind == "causal" and not any(name.startswith("far_patch_embedding.") for name in state):
        patch = {name: state.get(f"patch_embedding.{name}") for name in ("weight", "bias")}
        if None not in (patch["weight"], patch["bias"]):
            new = compressed_patches(patch, config.compressed_patch_size)
            state.update({f"far_patch_embedding.{name}": value for name, value in new.items()})


def provenance(folder):
    """What `train.py` wrote beside a model's weights: stage, preset, recipe. Empty for a published folder."""
    path = Path(folder) / "anyflow.json"
    return read_json(path) if path.exists() else {}


def write(path, save):
    """save(temporary path), then rename: nobody finds half a file, and an old one stays if this one fails."""
    path = Path(path)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        save(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path):
    if not path.exists():
        raise ValueError(f"no file {path}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def read_weights(folder):
    """{name: tensor} of a folder's safetensors, one file or the shards that its index lists."""
    index = folder / f"{WEIGHTS}.index.json"
    names = [WEIGHTS]
    if index.exists():
        listed = read_json(index)
        if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict):
            raise ValueError(f"{index} has no weight_map")
        names = sorted(set(listed["weight_map"].values()))
    state = {}
    for name in names:
        if not (folder / name).exists():
            raise ValueError(f"no file {folder / name}" + f", which {index.name} lists" * index.exists())
        try:
            state.update(load_file(folder / name))
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is no safetensors file: {error}") from None
    return state


# ------------------------------------------------------------------------------------------------------------
# LoRA
# ------------------------------------------------------------------------------------------------------------

# The linears that the release adapts.
LORA = r"attn1\.(to_[qkv]|to_out\.0)$|ffn\.net\.(0\.proj|2)$|(time|delta)_embedder\.linear_[12]$"


class LoRALinear(nn.Linear):
    """W x + b + (alpha / rank) up(down(x)): W and b frozen, `up` zero at the start, where nothing changes.

    Where W is another network's weight, shared with it, the frozen `lora_start_*` lead from that network to where
    this one starts: W + start_up start_down.
    """

    @classmethod
    def wrap(cls, linear, rank, alpha, start=None):
        linear.__class__ = cls
        linear.requires_grad_(False)
        linear.scale = alpha / rank
        weight = linear.weight
        outputs, inputs = weight.shape
        linear.lora_down = nn.Parameter(weight.new_empty(rank, inputs).normal_(std=inputs**-0.5))
        linear.lora_up = nn.Parameter(weight.new_zeros(outputs, rank))
        up, down = (None, None) if start is None else (nn.Parameter(x, requires_grad=False) for x in start)
        linear.lora_start_up, linear.lora_start_down = up, down

    def forward(self, x):
        y = super().forward(x) + F.linear(F.linear(x, self.lora_down), self.lora_up) * self.scale
        if self.lora_start_up is not None:
            y = y + F.linear(F.linear(x, self.lora_start_down), self.lora_start_up)
        return y

    def merged(self):
        added = self.scale * self.lora_up.float() @ self.lora_down.float()
        if self.lora_start_up is not None:
            added = added + self.lora_start_up.float() @ self.lora_start_down.float()
        return self.weight + added.to(self.weight.dtype)


def low_rank(difference, rank):
    """up (outputs, rank) and down (rank, inputs) whose product is nearest to the difference (outputs, inputs)."""
    with torch.random.fork_rng(devices=[difference.device] if difference.is_cuda else []):
        torch.manual_seed(0)  # the same on every process, and not of a run's random numbers
        up, sizes, down = torch.svd_lowrank(difference, min(rank + 8, *difference.shape), niter=4)
    return (up * sizes)[:, :rank].contiguous(), down[:, :rank].mT.contiguous()


def add_lora(model, rank, alpha, pattern=LORA, starts=None):
    """Freeze the model and give a LoRA to every linear whose name matches; a causal model's compressed patch
    embedding stays trainable as a whole. starts: {name: (up, down)} of `LoRALinear`. Returns the model. ValueError
    where nothing matches."""
    chosen = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(pattern, n)}
    if any(isinstance(linear, LoRALinear) for linear in chosen.values()):
        raise ValueError("the model has a LoRA already, expected one without: save and load it to merge")
    if not chosen or rank < 1:
        raise ValueError(f"LoRA has rank {rank} and matches {len(chosen)} linears, expected at least 1 of each")
    model.requires_grad_(False)
    for name, linear in chosen.items():
        LoRALinear.wrap(linear, rank, alpha, (starts or {}).get(name))
    if model.config.kind == "causal":
        model.far_patch_embedding.requires_grad_(True)
    return model


def merged_state(model):
    """The state dict with every LoRA added into its weight: names and shapes of a model without LoRA."""
    state = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{name}.weight"] = module.merged().detach()
    return state
