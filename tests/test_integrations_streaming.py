"""Latent attention inside a streaming codebase, held against the recorded outputs of Self-Forcing and our rollout.

The stand-in below is called, caches and evicts as the published code does: keys are cached turned by their absolute
frame, each layer's dictionary is [B, tokens, heads, width] with two indices, and what overflows is moved out behind the
sink.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, relative
from documents import blocks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from mlaconvert.attention import DenseAttention, attend
from mlaconvert.config import ConvertRecipe, StreamingConfig
from mlaconvert.convert import convert
from mlaconvert.errors import ConfigError, InputError, UnsupportedModelError
from mlaconvert.integrations.streaming import StreamingLatentAttention, swap_attention
from mlaconvert.model import WanModel, load_model
from mlaconvert.rollout import Sampler, chunk_noise, rollout
from mlaconvert.rope import rotary, rotate

LATENTS = (6, 10)
TOKENS = 15  # of a latent frame
WINDOW = StreamingConfig(window_frames=6)
GOLDEN_TOLERANCE = 1e-4


class TheirAttention(nn.Module):
    """Dense self-attention with Self-Forcing's call and cache."""

    def __init__(self, dense: DenseAttention, split: tuple[int, int, int], window: int, sink: int) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "norm_q", "norm_k"):
            setattr(self, name, getattr(dense, name))
        self.num_heads, self.split = dense.num_heads, split
        self.local_attn_size, self.sink_size, self.max_attention_size = window, sink, max(window, 100) * TOKENS
        self.kept = 0  # leading slots that are not written

    def forward(
        self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        current_start: int = 0, cache_start: Any = None,
    ) -> Tensor:  # fmt: skip
        frames, height, width = grid_sizes[0].tolist()
        place = torch.arange(frames) + current_start // TOKENS
        turn = rotary(place, height, width, self.split)
        q, k = (n(w(x)).unflatten(-1, (self.num_heads, -1)) for n, w in ((self.norm_q, self.q), (self.norm_k, self.k)))
        new = (rotate(k, turn), self.v(x).unflatten(-1, (self.num_heads, -1)))
        count, end = x.shape[1], int(kv_cache["local_end_index"]) + current_start + x.shape[1]
        end -= int(kv_cache["global_end_index"])
        over = end - kv_cache["k"].shape[1]
        sink = self.sink_size * TOKENS
        for name, value in zip(("k", "v"), new, strict=True):
            if self.local_attn_size != -1 and over > 0:
                kv_cache[name][:, sink : end - over - count] = kv_cache[name][:, sink + over : end - count].clone()
            first = max(end - max(over, 0) - count, self.kept)
            kv_cache[name][:, first : end - max(over, 0)] = value[:, first - end + max(over, 0) + count :]
        end -= max(over, 0)
        kv_cache["global_end_index"].fill_(current_start + count)
        kv_cache["local_end_index"].fill_(end)
        out = attend(rotate(q, turn), kv_cache["k"][:, :end], kv_cache["v"][:, :end], None)
        return self.o(out.flatten(-2))


class TheirModel(WanModel):
    """A causal model that hands each layer its dictionary, with native names."""

    def __init__(self, dense: WanModel, window: int, sink: int) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in dense.__dict__.items() if not k.startswith("_")}, _pairs=set())
        for name, part in dense.named_children():
            self.add_module(name, part)
        for block in self.blocks:
            block.self_attn = TheirAttention(block.self_attn, dense.config.rope_split, window, sink)  # type: ignore
        self.local_attn_size = window

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, context: Tensor, kv_cache: Any, current_start: int, *more: bool
    ) -> Tensor:
        p = self.prepare(x, t, context)
        lengths, grid, out = torch.tensor([p.x.shape[1]]), torch.tensor([p.grid]), p.x

        def by_frame(tokens: Tensor, scale: Tensor, shift: Any = 0) -> Tensor:
            return (tokens.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None] + shift).flatten(1, 2)

        for block, cache in zip(self.blocks, kv_cache, strict=True):
            e = (p.modulation + block.modulation).unbind(-2)
            found = block.self_attn(
                by_frame(block.norm1(out), 1 + e[1], e[0][:, :, None]),
                lengths, grid, None, None, cache, current_start, current_start, *more,
            )  # fmt: skip
            if isinstance(found, tuple):
                found, (seen, end, change) = found
                if not change["is_recompute"]:
                    cache["global_end_index"].fill_(seen)
                    cache["local_end_index"].fill_(end)
            out = out + by_frame(found, e[2])
            out = out + block.cross_attn(block.norm3(out), block.cross_attn.project(p.text, None))
            out = out + by_frame(block.ffn(by_frame(block.norm2(out), 1 + e[4], e[3][:, :, None])), e[5])
        return self.finish(out, p)


class TheirPipeline(nn.Module):
    """Allocates the dense dictionaries itself, and begins a new video by putting new indices into them."""

    def __init__(self, model: TheirModel) -> None:
        super().__init__()
        self.generator = nn.Module()
        self.generator.model = model
        self.kv_cache1: Any = None
        self.devices: list[str] = []

    def _initialize_kv_cache(self, batch_size: int, dtype: torch.dtype, device: Any) -> None:
        self.devices.append(str(device))
        config, size = self.generator.model.config, self.generator.model.local_attn_size * TOKENS
        shape = [batch_size, size, config.num_heads, config.head_dim]
        self.kv_cache1 = [
            {
                **{name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")},
                **{f"{name}_end_index": torch.tensor([0], device=device) for name in ("global", "local")},
            }
            for _ in range(config.num_layers)
        ]

    def begin(self, batch: int = 1) -> None:
        if self.kv_cache1 is None:
            self._initialize_kv_cache(batch_size=batch, dtype=torch.float32, device=torch.device("cpu"))
        for layer in self.kv_cache1:
            for name in ("global_end_index", "local_end_index"):
                layer[name] = torch.tensor([0])

    def chunk(self, x: Tensor, t: Tensor, context: Tensor, start: int, *more: bool) -> Tensor:
        out: Tensor = self.generator.model(x, t, context, self.kv_cache1, start * TOKENS, *more)  # type: ignore
        return out

    @torch.no_grad()
    def twice(self, x: Tensor, v: dict[str, Tensor]) -> Tensor:
        """Chunks of three frames, each run twice, as the recorded outputs were made."""
        self.begin()
        out = []
        for start in range(0, x.shape[2], 3):
            part = x[:, :, start : start + 3]
            self.chunk(part + 1, v["t"].expand(1, 3), v["context"], start)
            out.append(self.chunk(part, v["t"].expand(1, 3), v["context"], start))
        return torch.cat(out, 2)

    @torch.no_grad()
    def rollout(self, context: Tensor, frames: int, sampler: Sampler) -> Tensor:
        """Few-step denoising with a clean pass, by the noise of our rollout."""
        batch = len(context)
        self.begin(batch)
        out = []
        for start in range(0, frames, 3):
            draws = chunk_noise(range(batch), start, (16, 3, *LATENTS), len(sampler.timesteps))
            x, *fresh = draws
            levels = [*(t / 1000 for t in sampler.timesteps), 0.0]
            for i, level in enumerate(levels[:-1]):
                x = x - level * self.chunk(x, torch.full((batch, 3), 1000 * level), context, start)
                x = torch.lerp(x, fresh[i], levels[i + 1]) if levels[i + 1] else x
            self.chunk(x, torch.zeros(batch, 3), context, start)
            out.append(x)
        return torch.cat(out, 2)


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return dict(load_file(Path(__file__).parent / "golden" / "wan_tiny" / "golden.safetensors"))


RECIPES = {
    "lossless": ConvertRecipe(init="lossless", streaming=WINDOW),
    "paper": ConvertRecipe(init="svd", streaming=WINDOW),
    "token": ConvertRecipe(init="svd", streaming=WINDOW, key_norm="token", rope="latent"),
    "head": ConvertRecipe(init="svd", streaming=WINDOW, key_norm="token", rope="head", layers="0,2"),
}


@pytest.fixture(scope="module")
def folders(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("streaming")
    for name, recipe in RECIPES.items():
        convert(golden, root / name, recipe)
    return {name: root / name for name in RECIPES}


@pytest.fixture
def make(golden: Path) -> Callable[..., TheirPipeline]:
    def pipeline(window: int = 6, sink: int = 1) -> TheirPipeline:
        return TheirPipeline(TheirModel(load_model(golden), window, sink))

    return pipeline


def attentions(pipe: TheirPipeline) -> list[nn.Module]:
    return [block.self_attn for block in pipe.generator.model.blocks]  # type: ignore


RECORDED = [("x", "sf.chunks3.out"), ("x_long", "sf.window6_sink1.out")]


@pytest.mark.parametrize(("latents", "expected"), RECORDED)
def test_the_stand_in_is_self_forcing(make: Any, vectors: dict[str, Tensor], latents: str, expected: str) -> None:
    assert relative(make().twice(vectors[latents], vectors), vectors[expected]) < 1e-5


@pytest.mark.parametrize(
    ("positions", "latents", "expected"),
    [
        *(("absolute", *case) for case in RECORDED),
        ("window", "x", "infrope.chunks3.out"),
        (None, "x_long", "infrope.window6_sink1.out"),
    ],
)
@pytest.mark.parametrize("whole_pipeline", [True, False])
def test_a_lossless_swap_gives_the_recorded_outputs(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], positions: Any, latents: str, expected: str,
    whole_pipeline: bool,
) -> None:  # fmt: skip
    pipe = make()
    swap_attention(pipe if whole_pipeline else pipe.generator.model, folders["lossless"], positions=positions)
    for _ in range(2):  # the second video begins in the first one's dictionaries
        assert relative(pipe.twice(vectors[latents], vectors), vectors[expected]) < GOLDEN_TOLERANCE
    assert pipe.devices == ["meta" if whole_pipeline else "cpu"]


@pytest.mark.parametrize("name", ["paper", "token", "head"])
def test_a_rollout_equals_ours(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], name: str) -> None:
    """Two videos, beyond the window, in two steps a chunk. Layers that stay dense count absolute frames."""
    sampler = Sampler.few_step((1000, 500))
    context = torch.cat((vectors["context"], vectors["context"].flip(1)))
    pipe = make()
    dense = pipe.rollout(context, 12, sampler)
    pipe = make()
    positions: Any = "absolute" if name == "head" else "window"
    swap_attention(pipe, folders[name], positions=positions)
    found = pipe.rollout(context, 12, sampler)
    model = load_model(folders[name], streaming=StreamingConfig(window_frames=6, positions=positions))
    ours = rollout(model, context, frames=12, height=6, width=10, sampler=sampler)
    assert relative(found, torch.cat(list(ours), 2)) < 1e-5
    assert relative(found, dense) > 1e-2


def test_the_dictionaries_hold_latents(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]) -> None:
    """92.7% less than the dense ones; layers that stay dense keep theirs."""
    dense = 2 * 6 * TOKENS * 96 * 4
    for name, converted in (("paper", (0, 1, 2)), ("head", (0, 2))):
        pipe, config = make(), load_model(folders[name]).config
        swap_attention(pipe, folders[name])
        for begun in (pipe.begin, lambda pipe=pipe: pipe.twice(vectors["x"], vectors)):
            begun()
            sizes = [cache["k"].nbytes + cache["v"].nbytes for cache in pipe.kv_cache1]
            assert sizes == [6 * TOKENS * 4 * scalars for scalars in config.cached_scalars()]
            assert not any(value.is_meta for cache in pipe.kv_cache1 for value in cache.values())
            assert all(set(cache) == {"k", "v", "global_end_index", "local_end_index"} for cache in pipe.kv_cache1)
        for i, attention in enumerate(attentions(pipe)):
            assert isinstance(attention, StreamingLatentAttention) == (i in converted)
            assert (sizes[i] <= 0.079 * dense) == (i in converted)
        ends = [(int(cache["global_end_index"]), int(cache["local_end_index"])) for cache in pipe.kv_cache1]
        assert ends == [(6 * TOKENS, 6 * TOKENS)] * 3
        swap_attention(pipe, folders["lossless"] if name == "paper" else folders[name])  # dictionaries in use serve on
        expected = vectors["infrope.chunks3.out"] if name == "paper" else pipe.twice(vectors["x"], vectors)
        assert relative(pipe.twice(vectors["x"], vectors), expected) < GOLDEN_TOLERANCE


def test_limits_dtype_and_weights_outside_attention(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]
) -> None:
    """A model with other weights becomes the converted one, in its own dtype and with its own limits."""
    pipe = make(window=7, sink=2)
    randomize(pipe)
    pipe.to(torch.bfloat16)
    swap_attention(pipe, folders["lossless"])
    expected = load_model(folders["lossless"]).bfloat16().state_dict()
    found = pipe.generator.model.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [(a.local_attn_size, a.sink_size, a.max_attention_size) for a in attentions(pipe)] == [(7, 2, 1500)] * 3
    swap_attention(pipe, folders["paper"])  # a second swap is as good as the first
    found = pipe.generator.model.state_dict()
    assert set(found) == set(load_model(folders["paper"]).state_dict())


def test_tokens_before_the_last_ones_are_not_attended_to(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]
) -> None:
    """`max_attention_size` shortens the window without shortening the cache: three frames see only themselves."""
    pipe = make()
    swap_attention(pipe, folders["lossless"])
    for attention in attentions(pipe):
        attention.max_attention_size = 3 * TOKENS
    found = pipe.twice(vectors["x"], vectors)
    alone = load_model(folders["lossless"], streaming=StreamingConfig(window_frames=3, sink_frames=0))
    with torch.no_grad():
        expected = alone(vectors["x"], vectors["t"], vectors["context"])
    assert relative(found, expected) < GOLDEN_TOLERANCE
    assert relative(found, vectors["infrope.chunks3.out"]) > 1e-2


class CausVidAttention(TheirAttention):
    def forward(  # type: ignore[override]
        self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        current_start: int = 0, current_end: int = 0,
    ) -> Tensor:  # fmt: skip
        raise NotImplementedError


def test_a_cache_without_indices_is_causvids(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]) -> None:
    """Its slots count from the start of the video, and nothing is evicted."""
    pipe = make(window=-1, sink=0)
    for attention in attentions(pipe):
        attention.__class__ = CausVidAttention
    swap_attention(pipe.generator.model, folders["lossless"])
    pipe.kv_cache1 = [{name: torch.zeros(1, 12 * TOKENS, 4, 24) for name in ("k", "v")} for _ in range(3)]
    out = []
    with torch.no_grad():
        for start in range(0, 12, 3):
            part = vectors["x_long"][:, :, start : start + 3]
            out.append(pipe.chunk(part, vectors["t"].expand(1, 3), vectors["context"], start))
        whole = load_model(folders["lossless"], streaming=StreamingConfig(window_frames=12, sink_frames=0))
        expected = whole(vectors["x_long"], vectors["t"], vectors["context"])
    assert relative(torch.cat(out, 2), expected) < GOLDEN_TOLERANCE
    with pytest.raises(InputError, match="holds 180"):
        pipe.chunk(part, vectors["t"].expand(1, 3), vectors["context"], 12)


class LongLiveAttention(TheirAttention):
    """Indices are handed back to the model, and past chunks are written again when the prompt changes."""

    def forward(  # type: ignore[override]
        self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        current_start: int = 0, cache_start: Any = None, sink_recache_after_switch: bool = False,
    ) -> Any:  # fmt: skip
        before = {name: kv_cache[name].clone() for name in ("global_end_index", "local_end_index")}
        again = current_start > 0 and current_start + x.shape[1] <= int(before["global_end_index"])
        self.kept = self.sink_size * TOKENS if again and not sink_recache_after_switch else 0
        out = super().forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start)
        after = {name: int(kv_cache[name]) for name in before}
        kv_cache.update(before)
        return out, (*after.values(), {"is_recompute": again})


@pytest.mark.parametrize("sink", [0, 1, 3])
def test_longlives_prompt_switch(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], sink: int) -> None:
    """Behind the window, twice: past chunks with the sink kept, then with another sink, then new chunks."""
    found = []
    for swapped in (False, True):
        pipe = make(sink=sink)
        for attention in attentions(pipe):
            attention.__class__ = LongLiveAttention
        if swapped:
            swap_attention(pipe, folders["lossless"], positions="absolute")
        x, context, out = vectors["x_long"], vectors["context"], []
        with torch.no_grad():
            for video in range(2):
                pipe.begin()
                for start, frames, anew in (
                    (0, 3, False), (3, 3, False), (6, 3, False), (6, 3, False),
                    (3, 3, False), (3, 6, False), (9, 3, False), (6, 6, True), (9, 3, False),
                ):  # fmt: skip
                    part = x[:, :, start : start + frames] + 0.1 * video
                    out.append(pipe.chunk(part, vectors["t"].expand(1, frames), context + 0.2 * anew, start, anew))
        found.append(torch.cat(out, 2))
    assert relative(found[1], found[0]) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("copies", [1, 2])
def test_without_a_cache_the_mask_is_theirs(make: Any, folders: dict[str, Path], copies: int) -> None:
    """A whole clip, and in teacher forcing the clean clip and behind it the noisy one, at the same positions."""
    pipe = make()
    swap_attention(pipe, folders["token"])
    attention = attentions(pipe)[1]
    reference = load_model(folders["token"]).blocks[1].self_attn
    count = 6 * TOKENS
    chunk = torch.arange(2 * count) % count // (3 * TOKENS)

    def seen(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
        past = chunk[k] < chunk[q]
        return torch.where(q < count, (k < count) & (chunk[k] <= chunk[q]), (past & (k < count)) | (
            (k >= count) & (chunk[k] == chunk[q])
        ))  # fmt: skip

    x = torch.randn(2, copies * count, 96, generator=torch.Generator().manual_seed(4))
    mask = create_block_mask(seen, None, None, copies * count, copies * count, device="cpu", BLOCK_SIZE=15)
    lengths, grid = torch.tensor([count, count]), torch.tensor([[6, 3, 5]] * 2)
    found = attention(x, lengths, grid, None, mask)
    dense = torch.tensor([[bool(seen(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(0, copies * count, 15)]
                          for q in range(0, copies * count, 15)])  # fmt: skip
    turn = rotary(torch.arange(6).repeat(copies), 3, 5, (4, 4, 4))
    from mlaconvert.attention import AttentionPlan

    visible = dense.repeat_interleave(15, 0).repeat_interleave(15, 1)
    plan = AttentionPlan(query_rotary=turn, key_rotary=turn, mask=visible)
    assert relative(found, reference(x, plan)) < 1e-5
    assert relative(attention(x, lengths, grid, None, None), found) > 1e-3
    with pytest.raises(InputError, match="not one or two clips"):
        attention(x[:, 1:], lengths, grid, None, None)


# --- what is refused -----------------------------------------------------------------------------------------------


class LongLive2Attention(TheirAttention):
    def forward(  # type: ignore[override]
        self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        current_start: int = 0, cache_start: Any = None, t_scale: float = 1.0,
    ) -> Tensor:  # fmt: skip
        raise NotImplementedError


def test_other_calls_are_refused(make: Any, folders: dict[str, Path], golden: Path) -> None:
    pipe = make()
    attentions(pipe)[2].__class__ = LongLive2Attention
    with pytest.raises(UnsupportedModelError, match="t_scale"):
        swap_attention(pipe, folders["paper"])
    with pytest.raises(UnsupportedModelError, match="0 models"):
        swap_attention(nn.Linear(2, 2), folders["paper"])
    with pytest.raises(UnsupportedModelError, match="2 models"):
        swap_attention(nn.ModuleList((make(), make())), folders["paper"])
    with pytest.raises(ConfigError, match="not converted"):
        swap_attention(make(), golden)


def test_another_geometry_changes_nothing(make: Any, folders: dict[str, Path]) -> None:
    pipe = make()
    pipe.generator.model.blocks[1].ffn[0] = nn.Linear(96, 161)
    before = {name: tensor.clone() for name, tensor in pipe.state_dict().items()}
    with pytest.raises(InputError, match=r"blocks\.1\.ffn\.0\.(bias|weight).*161.*160"):
        swap_attention(pipe, folders["paper"])
    del pipe.generator.model.blocks[2]
    with pytest.raises(InputError, match=r"blocks\.1\.ffn|blocks\.2"):
        swap_attention(pipe, folders["paper"])
    assert not any(isinstance(a, StreamingLatentAttention) for a in attentions(pipe))
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.state_dict().items())


def test_chunks_that_do_not_fit(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor]) -> None:
    pipe = make()
    swap_attention(pipe, folders["paper"])
    pipe.begin()
    t, context = vectors["t"], vectors["context"]
    with torch.no_grad():
        pipe.chunk(vectors["x"], t.expand(1, 6), context, 0)
        with pytest.raises(InputError, match="local_attn_size of at least 7"):
            pipe.chunk(vectors["x"], t.expand(1, 6), context, 6)
        with pytest.raises(InputError, match="for 1 videos"):
            pipe.chunk(vectors["x"].repeat(2, 1, 1, 1, 1), t.expand(2, 6), context.repeat(2, 1, 1), 0)
        attention = attentions(pipe)[0]
        with pytest.raises(InputError, match="6 x 3 x 5"):
            attention(torch.zeros(1, 7, 96), None, torch.tensor([[6, 3, 5]]), None, None, pipe.kv_cache1[0])


def test_the_walkthroughs_snippets_run(
    make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parent.parent / "examples" / "self_forcing.md").read_text()
    (tmp_path / "sf-mla").symlink_to(folders["lossless"])
    monkeypatch.chdir(tmp_path)
    scope = {"pipeline": make()}
    for snippet in blocks(page, "python"):
        exec(compile(snippet, "self_forcing.md", "exec"), scope)
    found = scope["pipeline"].twice(vectors["x_long"], vectors)
    assert relative(found, vectors["infrope.window6_sink1.out"]) < GOLDEN_TOLERANCE
