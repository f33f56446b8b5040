"""Wan 2.1's video DiT in one class: the teacher, the AnyFlow student, and causal (FAR) AnyFlow.

The three are one network over GROUPS of tokens. A group is a run of frames cut into patches of one size; it
brings its frames' times (t, r) and its positions in the video. All that differs is which groups there are and
who sees whom:

    bidirectional       [the whole video]                                      everybody sees everybody
    causal, inference   [one chunk]                                            sees itself and the KV cache
    causal, training    [compressed past | clean window | noisy window]        by chunk, `rows_of_chunks`

A causal model makes a CHUNK of latent frames together, from noise, after earlier chunks: it sees the newest,
the WINDOW, in full, those before COMPRESSED into larger patches. Folders are exchanged with diffusers.
Latents are (B, F, C, H, W), text embeddings (B, L, text_dim), times float, (B,) or (B, F) in [0, 1].
Sources: Wan (2503.20314), FAR (2503.19325), AnyFlow (2605.13724).
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from anyflow import as_times
from full import files  # model folders
from full.compile import keep_self_attention, lean  # lean(norm, x) is norm(x), with less kept for going back
from full.lora import merged_state
from full.options import check, option  # option(default, meaning, limits): a field of a dataclass

CLASSES = {
    "teacher": "WanTransformer3DModel",
    "anyflow": "AnyFlowTransformer3DModel",
    "causal": "AnyFlowFARTransformer3DModel",
}


# ---- Config (its reading and checking may wait) ----------------------------------------------------------

SIZE, COUNT, PATCH = dict(low=1, high=2**17), dict(low=1, high=1024), dict(low=1, high=1024, length=3)
STUDENT, CAUSAL = dict(kinds=("anyflow", "causal")), dict(kinds=("causal",))

@dataclass(frozen=True)
class WanConfig:
    """Sizes of the network, under the names that diffusers gives them. Defaults: Wan 2.1 1.3B."""

    kind: str = option("anyflow", "one time, two, or two with chunks and a cache", choices=tuple(CLASSES))
    patch_size: tuple = option((1, 2, 2), "frames, height and width of a token", **PATCH)
    num_attention_heads: int = option(12, **SIZE)
    attention_head_dim: int = option(128, **SIZE)
    in_channels: int = option(16, **SIZE)
    out_channels: int = option(16, **SIZE)
    text_dim: int = option(4096, **SIZE)
    freq_dim: int = option(256, "sinusoids of a time", **SIZE)
    ffn_dim: int = option(8960, **SIZE)
    num_layers: int = option(30, low=1, high=1000)
    cross_attn_norm: bool = option(True)
    eps: float = option(1e-6, "of the norms", above=0, high=1)
    rope_max_seq_len: int = option(1024, "kept for diffusers; positions here have no limit", **SIZE)
    gate_value: float = option(0.25, "weight of r beside t in the time embedding", low=0, high=1, **STUDENT)
    deltatime_type: str = option("r", "what the second embedder sees", choices=("r", "t-r"), **STUDENT)
    compressed_patch_size: tuple = option((1, 4, 4), "of chunks that left the window", **PATCH, **CAUSAL)
    full_chunk_limit: int = option(3, "chunks at full resolution, with the newest", low=1, high=99, **CAUSAL)
    chunk_partition: tuple = option((1, 3, 3, 3, 3, 3, 3, 2), "latent frames a chunk", **COUNT, **CAUSAL)

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
        name = config.get("_class_name") if isinstance(config, dict) else config
        if not isinstance(name, str) or name not in kinds:
            raise ValueError(f"{where}: _class_name is {name!r}, expected one of {', '.join(kinds)}")
        keys = cls._keys(kinds[name])
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        for key, value in cls.FIXED.items():
            if given.pop(key, value) != value:
                raise ValueError(f"{where}: {key} is {config[key]!r}, but only {value!r} is supported")
        for problem, names in (("unknown", given.keys() - keys), ("missing", keys - given.keys())):
            if names:
                raise ValueError(f"{where}: {problem} key {', '.join(sorted(names))} for {name}")
        given |= {"out_channels": given["in_channels"]} if given["out_channels"] is None else {}
        try:
            return cls(kind=kinds[name], **check(cls, given))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def __post_init__(self):
        small, large = self.patch_size, self.compressed_patch_size
        if self.width > SIZE["high"]:
            raise ValueError(f"heads times head_dim are {self.width}, expected at most {SIZE['high']}")
        if self.out_channels != self.in_channels:
            raise ValueError(f"out_channels is {self.out_channels}, expected in_channels, {self.in_channels}")
        if small[0] != 1 or large[0] != 1:
            raise ValueError(f"patch sizes are {small} and {large}, expected patches of one frame, (1, h, w)")
        if self.kind == "causal" and (large[1] % small[1] or large[2] % small[2]):
            raise ValueError(f"compressed_patch_size is {large}, expected a multiple of patch_size {small}")

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
    "tiny": WanConfig(patch_size=(1, 4, 4), compressed_patch_size=(1, 8, 8), num_attention_heads=4,
                      attention_head_dim=24, in_channels=3, out_channels=3, text_dim=32, freq_dim=64,
                      ffn_dim=288, num_layers=4),
}


# ---- Groups of tokens, and who sees whom in causal training ----------------------------------------------

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

# With chunks 0 to 3, of which the last three are in the window (x: the query of that row sees the key):
#
#                    keys   past   clean       noisy
#         queries             0    1  2  3     1  2  3
#         past      0         x
#         clean     1         x    x
#                   2         x    x  x
#                   3         x    x  x  x
#         noisy     1         x                x
#                   2         x    x              x
#                   3         x    x  x              x
#
# Nobody sees a later chunk, and clean tokens never see noise. A noisy token sees the past, CLEAN copies of
# earlier chunks and the noisy tokens of its own: in the last chunk, just what it sees when sampling. Each row
# is one attention over the columns that it sees: no pair is computed to be masked.

def rows_of_chunks(chunks, window, full, compressed, clean):
    """The table above as (lengths, columns): tokens of each row, and a tuple of the columns that it sees.

    chunks: frames of each, the last `window` of them at full resolution. full, compressed: tokens a frame.
    Without clean copies, noisy tokens see the noisy tokens of earlier chunks.
    """
    lengths = [f * compressed for f in chunks[:-window]] + [f * full for f in chunks[-window:]]
    columns = [tuple(range(i + 1)) for i in range(len(chunks))]
    if clean:
        columns += [(*row[:-1], row[-1] + window) for row in columns[-window:]]  # noise in its copy's place
        lengths += lengths[-window:]
    return lengths, columns


# ---- Parts -----------------------------------------------------------------------------------------------

class Embedder(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, inputs, width, activation):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, width), nn.Linear(width, width)
        self.activation = activation

    def forward(self, x):
        return self.linear_2(self.activation(self.linear_1(x.to(self.linear_1.weight.dtype))))

class ConditionEmbedder(nn.Module):
    """Times and text to the network's width."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        self.time_embedder = Embedder(config.freq_dim, width, F.silu)
        if config.kind != "teacher":
            self.delta_embedder = Embedder(config.freq_dim, width, F.silu)
            self.delta_embedder.load_state_dict(self.time_embedder.state_dict())  # so e = E_t(t) at r = t
        self.time_proj = nn.Linear(width, 6 * width)
        self.text_embedder = Embedder(config.text_dim, width, gelu)

    def times(self, t, r):
        """(B, f) -> e = (1 - gate) E_t(t) + gate E_r(r) (B, f, width), and modulations (B, f, 6, width)."""
        e = self.time_embedder(self.sinusoid(t))
        if self.config.kind != "teacher":
            gate, second = self.config.gate_value, r if self.config.deltatime_type == "r" else t - r
            e = (1 - gate) * e + gate * self.delta_embedder(self.sinusoid(second))
        return e, self.time_proj(F.silu(e).to(self.time_proj.weight.dtype)).unflatten(-1, (6, -1))

    def sinusoid(self, t):
        """cos, then sin, of Wan's time, 1000 t, times frequencies from 1 towards 1/10000: (..., freq_dim)."""
        angles = 1000 * t.float()[..., None] * self.frequencies(t.device)
        return torch.cat([angles.cos(), angles.sin()], -1)

    def frequencies(self, device=None):
        half = self.config.freq_dim // 2
        return torch.exp(-math.log(10000) * (torch.arange(half, device=device).float() / half))

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
        return lean(self.norm_q, self.to_q(x)).unflatten(2, (self.heads, -1))

    def key_value(self, x):
        """Two of (B, N, heads, head_dim)."""
        return [y.unflatten(2, (self.heads, -1)) for y in (lean(self.norm_k, self.to_k(x)), self.to_v(x))]

    def attend(self, q, k, v, rows=None):
        """(B, N, heads, head_dim), M keys and values -> (B, N, width). rows: of `rows_of_chunks`, or None."""
        if rows is None:
            x = attention(q, k, v)
        else:
            lengths, columns = rows
            q, k, v = (y.split(lengths, 1) for y in (q, k, v))
            seen = lambda y, row: torch.cat([y[i] for i in row], 1)  # row by row: all at once are large
            x = [attention(query, seen(k, row), seen(v, row)) for query, row in zip(q, columns)]
            x = torch.cat(x, 1)
        return self.to_out[0](x.flatten(2))

def attention(q, k, v):
    return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)

class Norm(nn.LayerNorm):
    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps).to(x.dtype)

class FeedForward(nn.Module):
    """Linear, GELU, Linear, under the names of diffusers (`net.0.proj`, `net.2`)."""

    def __init__(self, width, inner):
        super().__init__()
        first = nn.ModuleDict({"proj": nn.Linear(width, inner)})
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x):
        return self.net[2](gelu(self.net[0].proj(x)))

class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; times shift, scale and gate by frame."""

    def __init__(self, config):
        super().__init__()
        self.eps, width = config.eps, config.width
        self.attn1, self.attn2 = Attention(config), Attention(config)
        self.norm2 = Norm(width, config.eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(width, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(self, x, *inputs, checkpointing="none"):
        """`compute`, of which the backward pass recomputes nothing ("none"), all ("full"), or all but
        self-attention ("selective"). The checkpoint is inside the block: both are compiled together."""
        if checkpointing == "none":
            return self.compute(x, *inputs)
        policy = dict(context_fn=keep_self_attention) if checkpointing == "selective" else {}
        return checkpoint(self.compute, x, *inputs, use_reentrant=False, preserve_rng_state=False, **policy)

    def compute(self, x, modulation, spans, rope, text, k_past, v_past, rows=None, blank=0, keep=False):
        """The block on tokens x (B, N, width), returned in that shape; with keep also their keys and values.

        modulation: (B, f, 6, width). spans: (frames, tokens a frame) of each group. rope: of `rotate`. text:
        embedded (B, L, width), or its keys and values. k_past, v_past: a cache's, which come before x's, or
        None; two arguments, because a checkpoint never frees a tuple's tensors. rows: who sees whom, by
        `rows_of_chunks`, or None: all see all. blank: how many keys and values of zero come last.
        """
        modulation = (self.scale_shift_table + modulation.float()).unbind(2)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation

        h = modulate(x, shift, scale, spans, self.eps)
        k, v = self.attn1.key_value(h)
        k = rotate(k, rope)
        made = (k, v) if keep else None
        if k_past is not None:
            k, v = torch.cat([k_past, k], 1), torch.cat([v_past, v], 1)
        if blank:
            k, v = (F.pad(y, (0, 0, 0, 0, 0, blank)) for y in (k, v))
        x = gated(x, self.attn1.attend(rotate(self.attn1.query(h), rope), k, v, rows), gate, spans)
        del h, k, v  # their memory is free before the next attention

        h = self.norm2(x)
        text = self.attn2.key_value(text) if torch.is_tensor(text) else text
        x = x + self.attn2.attend(self.attn2.query(h), *text)

        x = gated(x, self.ffn(modulate(x, ffn_shift, ffn_scale, spans, self.eps)), ffn_gate, spans)
        return (x, made) if keep else x

def modulate(x, shift, scale, spans, eps):
    """LayerNorm(x) (1 + scale) + shift in float32; x (B, N, width), shift, scale (B, f, width) by frame."""
    h = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    groups = zip(of_frames(shift, spans), of_tokens(h, spans), of_frames(1 + scale, spans))
    return joined([torch.addcmul(a, b, c) for a, b, c in groups]).to(x.dtype)  # a + b c

def gated(x, y, gate, spans):
    """x + gate y in float32; x, y (B, N, width), gate (B, f, width) by frame."""
    groups = zip(of_tokens(x.float(), spans), of_tokens(y.float(), spans), of_frames(gate, spans))
    return joined([torch.addcmul(*group) for group in groups]).to(x.dtype)

def of_tokens(x, spans):
    """(B, N, width) -> (B, frames, tokens a frame, width) of each group."""
    return [group.unflatten(1, span) for group, span in zip(x.split([f * n for f, n in spans], 1), spans)]

def of_frames(x, spans):
    """(B, f, width) -> (B, frames, 1, width) of each group, to meet the frames' tokens by broadcasting."""
    return [group[:, :, None] for group in x.split([f for f, _ in spans], 1)]

def joined(groups):
    """The inverse of `of_tokens`."""
    return groups[0].flatten(1, 2) if len(groups) == 1 else torch.cat([g.flatten(1, 2) for g in groups], 1)

def rotate(x, rope):
    """Turn the pairs (2i, 2i+1) of x (B, N, heads, head_dim), as complex numbers, by rope (N, dim/2, 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # real arithmetic is fused, complex is not
        (a, b), (cos, sin) = pairs.unbind(-1), rope[:, None].unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope)[:, None])
    return turned.flatten(-2).to(x.dtype)

def rope_axis(dim, start, count, cell, device):
    """Unit complex numbers (count, dim/2) of one axis; a patch of `cell` positions: their mean, length 1."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    positions = torch.arange(start * cell, (start + count) * cell, device=device, dtype=torch.float64)
    angles = positions[:, None] * frequencies
    turns = torch.polar(torch.ones_like(angles), angles).unflatten(0, (count, cell)).mean(1)
    return (turns / turns.abs()).to(torch.complex64)


# ---- The network -----------------------------------------------------------------------------------------

class Wan(nn.Module):
    """u(z, t, r, text) for videos z (B, F, C, H, W). See `forward` for the three ways to call it."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        self.patch_embedding = nn.Conv3d(config.in_channels, width, config.patch_size, config.patch_size)
        if config.kind == "causal":
            size = config.compressed_patch_size
            self.far_patch_embedding = nn.Conv3d(config.in_channels, width, size, size)
            larger = files.compressed_patches(self.patch_embedding.state_dict(), size)  # interpolated
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
        Causal training: `chunks` are the frames of every chunk, `clean` is the clean video of all, and z the
        noisy frames of the last `full_chunk_limit` chunks (of all, if they are fewer). Without `clean`, z is
        the whole noisy video, earlier chunks are compressed with their own times, and u is of the last ones.

        t, r: float, (B,) or (B, F). text: (B, L, text_dim), or what `encode_text` made of it.
        """
        self._check(z, text, clean, chunks, cache)
        text = self.embed_text(text) if torch.is_tensor(text) else text
        t, r = (time[:, None] if time.ndim == 1 else time for time in as_times(z, t, r))
        if chunks is not None:
            groups, rows = self._window(z, t, r, clean, tuple(chunks))
        else:
            groups, rows = [self._group(z, t, r, cache.frames if cache else 0)], None
        blank = -groups[0].tokens.shape[1] % 128 if cache and cache.padding else 0
        x, e = self._blocks(groups, text, cache.past if cache else None, rows, blank)

        spans = [group.span for group in groups]
        x = of_tokens(x, spans)[-1].flatten(1, 2)
        e = e.split([f for f, _ in spans], 1)[-1]
        shift, scale = (self.scale_shift_table + e.float()[:, :, None]).unbind(2)
        x = self.proj_out(modulate(x, shift, scale, spans[-1:], self.config.eps))
        _, p, q = self.config.patch_size
        h, w = z.shape[3] // p, z.shape[4] // q
        return rearrange(x, "b (f h w) (p q c) -> b f c (h p) (w q)", h=h, w=w, p=p, q=q)

    def _window(self, z, t, r, clean, chunks):
        """Causal training's groups, the noisy one last, and who sees whom."""
        window = min(len(chunks), self.config.full_chunk_limit)
        frames, start = sum(chunks), sum(chunks[:-window])  # the window holds the frames from start on
        video = z if clean is None else clean
        if video.shape[1] != frames or z.shape[1] != (frames if clean is None else frames - start):
            wanted = f"{frames} frames, {frames - start} of them in the window"
            raise ValueError(f"chunks are {wanted}; found {z.shape[1]} in z and {video.shape[1]} in all")
        zero = torch.zeros_like(t[:, :1])
        past_times, noisy_times = (zero, zero), (t, r)
        if clean is None:
            t, r = t.expand(-1, frames), r.expand(-1, frames)
            past_times, noisy_times = (t[:, :start], r[:, :start]), (t[:, start:], r[:, start:])
            z = z[:, start:]

        groups = [self._group(video[:, :start], *past_times, 0, compressed=True)] if start else []
        groups += [self._group(clean[:, start:], zero, zero, start)] if clean is not None else []
        groups += [self._group(z, *noisy_times, start)]
        patches = self.config.patch_size, self.config.compressed_patch_size
        tokens = [z.shape[3] * z.shape[4] // math.prod(patch) for patch in patches]
        return groups, rows_of_chunks(chunks, window, *tokens, clean is not None)

    def _group(self, video, t, r, start, compressed=False):
        """The frames of a video that begins at frame `start`, cut into patches."""
        patch = self.config.compressed_patch_size if compressed else self.config.patch_size
        embedding = self.far_patch_embedding if compressed else self.patch_embedding
        tokens = embedding(video.transpose(1, 2).to(embedding.weight.dtype)).flatten(2).transpose(1, 2)
        f, h, w = video.shape[1], video.shape[3] // patch[1], video.shape[4] // patch[2]
        return Group(tokens, t, r, self._rope(start, f, h, w, patch))

    def _rope(self, start, f, h, w, patch):
        """Positions of a group, (f h w, head_dim/2, 2): a third for height, for width, the rest for time."""
        side, device = 2 * (self.config.attention_head_dim // 6), self.proj_out.weight.device
        cells = [large // small for large, small in zip(patch, self.config.patch_size)]
        time = rope_axis(self.config.attention_head_dim - 2 * side, start, f, cells[0], device)[:, None, None]
        height = rope_axis(side, 0, h, cells[1], device)[:, None]
        width = rope_axis(side, 0, w, cells[2], device)
        axes = [axis.expand(f, h, w, -1) for axis in (time, height, width)]
        return torch.view_as_real(torch.cat(axes, -1).flatten(0, 2))

    def _blocks(self, groups, text, past=None, rows=None, blank=0, keep=None):
        """All blocks over all groups: tokens (B, N, width), and e (B, f, width).

        keep: a list that takes the keys and values of every block, for a cache.
        """
        x = torch.cat([g.tokens for g in groups], 1)
        t, r = torch.cat([g.t for g in groups], 1), torch.cat([g.r for g in groups], 1)
        e, modulation = self.condition_embedder.times(t, r)
        rope, spans = torch.cat([g.rope for g in groups]), [g.span for g in groups]
        for i, block in enumerate(self.blocks):
            prompt = text if torch.is_tensor(text) else text[i]
            inputs = modulation, spans, rope, prompt, *(past[i] if past else (None, None)), rows, blank
            checkpointing = self.checkpointing if torch.is_grad_enabled() else "none"
            x = block(x, *inputs, keep is not None, checkpointing=checkpointing)
            if keep is not None:
                x, made = x
                keep.append(made)
        return x, e

    def embed_text(self, text):
        """(B, L, text_dim) -> (B, L, width)."""
        if text.ndim != 3 or text.shape[2] != self.config.text_dim:
            raise ValueError(f"text has shape {tuple(text.shape)}, expected (B, L, {self.config.text_dim})")
        return self.condition_embedder.text_embedder(text)

    def encode_text(self, text):
        """(B, L, text_dim) -> keys and values of all cross-attentions, once for a prompt."""
        text = self.embed_text(text)
        return [block.attn2.key_value(text) for block in self.blocks]

    # Causal inference. While chunk 5 is made, with full_chunk_limit 3, the cache holds
    #
    #     keys and values of    [0][1][2]         [   3   ][   4   ]      and chunk 5 sees all, and itself
    #                           compressed        full resolution
    #
    # `extend` then lets chunk 3 leave the window. Compressed tokens see only compressed ones, up to their own
    # chunk, so [0][1][2] are final and stay. Tokens at full resolution see the compressed past, which grows:
    # keys and values of 3 and 4 are dropped, 3 is encoded again, compressed, then 4 and 5 in full.

    def new_cache(self, padding=False):
        """An empty cache for one stream (of any batch size).

        padding=True is for equality with the pipeline of diffusers: it pads a chunk to a multiple of 128
        tokens and masks nothing: queries also see keys of zero, 104 of 1,664 in a first chunk at 480 x 832.
        """
        if self.config.kind != "causal":
            raise ValueError(f"a cache needs a causal model, found kind {self.config.kind!r}")
        return Cache(padding)

    @torch.no_grad()
    def extend(self, cache, chunk, text):
        """Encode a finished chunk (B, f, C, H, W), or a list of them, at t = r = 0. Returns the cache."""
        new = [chunk] if torch.is_tensor(chunk) else chunk
        for chunk in new:
            self._check(chunk, text, None, None, cache)
        text = self.embed_text(text) if torch.is_tensor(text) else text
        leave = max(0, len(cache.window + new) + 1 - self.config.full_chunk_limit)  # 1: the chunk to come
        old, cache.window = (cache.window + new)[:leave], (cache.window + new)[leave:]
        if old:
            n, cache.frames = cache.compressed_tokens, cache.compressed_frames
            cache.past = [(k[:, :n], v[:, :n]) for k, v in cache.past] if n else None
        for chunk in old:
            self._commit(cache, chunk, text, compressed=True)
        for chunk in cache.window if old else new:
            self._commit(cache, chunk, text)
        return cache

    def _commit(self, cache, chunk, text, compressed=False):
        zero = chunk.new_zeros(len(chunk), 1, dtype=torch.float32)
        group, made = self._group(chunk, zero, zero, cache.frames, compressed), []
        self._blocks([group], text, cache.past, keep=made)
        for i, old in enumerate(cache.past or ()):  # block by block: all at once would be the cache twice
            made[i] = cache.past[i] = tuple(torch.cat(both, 1) for both in zip(old, made[i]))
        cache.past, cache.frames = made, cache.frames + chunk.shape[1]
        cache.shape = len(chunk), *chunk.shape[2:]
        if compressed:
            cache.compressed_tokens, cache.compressed_frames = made[0][0].shape[1], cache.frames

    def _check(self, z, text, clean, chunks, cache):
        c = self.config
        causal = chunks is not None or cache is not None
        if (clean is not None and chunks is None) or (chunks is not None and cache is not None):
            raise ValueError("expected `clean` only with `chunks` (training), and either those or `cache`")
        if causal and c.kind != "causal":
            raise ValueError(f"chunks and cache need a causal model, found kind {c.kind!r}")
        if z.ndim != 5 or z.shape[2] != c.in_channels:
            raise ValueError(f"the video has shape {tuple(z.shape)}, expected (B, F, {c.in_channels}, H, W)")
        _, p, q = c.compressed_patch_size if causal else c.patch_size
        if z.shape[3] % p or z.shape[4] % q:
            raise ValueError(f"height and width are {tuple(z.shape[3:])}, expected multiples of {p} x {q}")
        if cache is not None and cache.shape not in (None, (len(z), *z.shape[2:])):
            raise ValueError(f"a chunk is {tuple(z.shape)}, expected (B, C, H, W) of the cache {cache.shape}")
        batch = len(text if torch.is_tensor(text) else text[0][0])
        if clean is not None and (len(clean), *clean.shape[2:]) != (len(z), *z.shape[2:]):
            raise ValueError(f"clean is {tuple(clean.shape)}, expected {tuple(z.shape)} but for the frames")
        if chunks is not None and not (len(chunks) and min(chunks) >= 1):
            raise ValueError(f"chunks are {tuple(chunks)}, expected frames of each, at least 1")
        if batch != len(z):
            raise ValueError(f"text has a batch of {batch}, expected {len(z)} as the video")

    @classmethod
    def from_pretrained(cls, folder, kind=None, dtype=None, device="cpu", **new):
        """Load a folder in the layout of diffusers, or its subfolder `transformer`.

        kind: "anyflow" or "causal" to start a student from a teacher, or a causal model from a bidirectional
        one, or the other way. At r = t, on a whole video, it computes what the folder's model does (but for a
        teacher's student with deltatime_type "t-r": its second embedder sees 0). new: with a kind, config
        keys that the folder lacks, as chunk_partition. ValueError names the file, what it has, what it lacks.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"no model folder at {folder}")
        if not (folder / "config.json").exists() and (folder / "transformer" / "config.json").exists():
            folder = folder / "transformer"
        if folder.name == "transformer" and folder.with_name("transformer_2").is_dir():
            raise ValueError(f"{folder.parent} has two networks, transformer and transformer_2, expected one")
        config = WanConfig.from_dict(files.read_json(folder / "config.json"), str(folder / "config.json"))
        state = files.read_weights(folder, config.num_layers)
        if kind is not None:
            if kind not in CLASSES or (kind == "teacher" and config.kind != "teacher"):
                raise ValueError(f"kind is {kind!r} for {folder} of kind {config.kind}, expected a student's")
            lacking = check(WanConfig, {key: new[key] for key in new.keys() - config.to_dict().keys()})
            before, config = config.kind, replace(config, kind=kind, **lacking)
            state = files.of_kind(state, before, config)
        with torch.device("meta"):
            model = cls(config)
        files.take_weights(model, {name: p.to(device, dtype) for name, p in state.items()}, folder)
        return model

    def save_pretrained(self, folder):
        """Write config.json and the weights, LoRA merged in, for diffusers to open: beside, then renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in merged_state(self).items()}
        files.write(folder / files.WEIGHTS, lambda part: save_file(state, part, metadata={"format": "pt"}))
        (folder / f"{files.WEIGHTS}.index.json").unlink(missing_ok=True)  # of shards that were here before
        files.write_json(folder / "config.json", self.config.to_dict())

class Cache:
    """What a causal model keeps of finished chunks: each block's keys and values, compressed chunks first."""

    def __init__(self, padding):
        self.padding = padding
        self.past = None  # a list, by block, of keys and values (B, tokens, heads, head_dim)
        self.frames = 0  # latent frames that they are of
        self.shape = None  # (B, C, H, W) of the chunks
        self.compressed_tokens = self.compressed_frames = 0  # of compressed chunks: final
        self.window = []  # the chunks that are at full resolution, as latents
