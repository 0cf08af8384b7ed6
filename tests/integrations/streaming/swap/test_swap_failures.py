"""What a swap refuses, what it looks through, and that one that fails leaves everything as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import streaming_fixtures
import torch
from documents import blocks
from streaming_codebases import LongLiveAttention, TheirPipeline
from streaming_swap_cases import attentions, unchanged
from support import randomize, relative
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError, InputError, UnsupportedModelError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.lora import LoraFile
from mlaconvert.families.source import Source
from mlaconvert.integrations.streaming import StreamingLatentAttention, swap_attention


def test_another_geometry_changes_nothing(make: Any, folders: dict[str, Path]) -> None:
    pipe = make()
    pipe.generator.model.blocks[1].ffn[0] = nn.Linear(96, 161)
    with unchanged(pipe), pytest.raises(InputError, match=r"blocks\.1\.ffn\.0\.(bias|weight).*161.*160"):
        swap_attention(pipe, folders["absolute"])
    del pipe.generator.model.blocks[2]
    with unchanged(pipe), pytest.raises(InputError, match=r"blocks\.1\.ffn|blocks\.2"):
        swap_attention(pipe, folders["absolute"])


def quantised(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("where", ["self_attn.q", "ffn.2"])
def test_a_quantised_model_is_left_as_it_was(
    make: Any, folders: dict[str, Path], dtype: torch.dtype, where: str
) -> None:
    """Only the last block's weights, so that an eager swap would have replaced two layers by then."""
    pipe = make()
    linear = pipe.generator.model.blocks[2].get_submodule(where)
    linear.weight = quantised(linear.weight, dtype)
    with unchanged(pipe), pytest.raises(UnsupportedModelError, match="before the model is quantised"):
        swap_attention(pipe, folders["absolute"])


def test_a_model_without_weights_is_left_as_it_was(make: Any, folders: dict[str, Path]) -> None:
    pipe = make()
    pipe.generator.model.head.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"'head.*meta device; load its weights"):
        swap_attention(pipe, folders["absolute"])
    assert not any(isinstance(attention, StreamingLatentAttention) for attention in attentions(pipe))


@pytest.mark.parametrize("name", ["blocks.2.self_attn.o.weight", "blocks.2.ffn.0.bias"])
def test_a_file_that_breaks_off_changes_nothing(
    make: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Weights differ everywhere, so that all would be written."""
    read = Checkpoint.read

    def breaks(self: Checkpoint, canonical: str) -> Tensor:
        if canonical == name:
            raise CheckpointError("cut short")
        return read(self, canonical)

    pipe = make()
    randomize(pipe)
    monkeypatch.setattr(Checkpoint, "read", breaks)
    with unchanged(pipe), pytest.raises(CheckpointError, match="cut short"):
        swap_attention(pipe, folders["absolute"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_refuses_a_part_gets_all_back(
    make: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    """The last layer cannot be set, or the pipeline's allocation, after everything else has been."""
    pipe = make()
    randomize(pipe)
    if wrapped:
        monkeypatch.setattr(TheirPipeline, "__setattr__", refuses("_initialize_kv_cache"), raising=False)
    else:
        monkeypatch.setattr(type(pipe.generator.model.blocks[2]), "__setattr__", refuses("self_attn", after=2))
    with unchanged(pipe), pytest.raises(RuntimeError, match="read only"):
        swap_attention(pipe, folders["absolute"])


def refuses(name: str, after: int = 0) -> Callable[[Any, str, Any], None]:
    count = iter(range(1000))

    def set_or_not(self: Any, key: str, value: Any) -> None:
        if key == name and next(count) == after:
            raise RuntimeError("read only")
        nn.Module.__setattr__(self, key, value)

    return set_or_not


def compiled(pipe: TheirPipeline) -> None:
    pipe.generator.model = torch.compile(pipe.generator.model, backend="eager")  # type: ignore[assignment]


def compiled_in_place(pipe: TheirPipeline) -> None:
    pipe.generator.model.compile(backend="eager")  # type: ignore[union-attr]


def parallel(pipe: TheirPipeline) -> None:
    pipe.generator.model = nn.DataParallel(pipe.generator.model)  # type: ignore[arg-type]


def by_block(pipe: TheirPipeline) -> None:
    blocks = pipe.generator.model.blocks  # type: ignore[union-attr]
    for i, wrap in enumerate((checkpoint_wrapper, lambda block: torch.compile(block, backend="eager"))):
        blocks[i] = wrap(blocks[i])  # type: ignore[operator]
    blocks[2].self_attn = torch.compile(blocks[2].self_attn, backend="eager")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "wrap",
    [parallel, *(pytest.param(wrap, marks=pytest.mark.slow) for wrap in (compiled, compiled_in_place, by_block))],
)
@pytest.mark.parametrize("used", [False, True])
def test_wrapped_models(make: Any, folders: dict[str, Path], vectors: dict[str, Tensor], wrap: Any, used: bool) -> None:
    """Before the first run, and after one has been compiled for dense attention."""
    pipe = make()
    model = pipe.generator.model
    if wrap is parallel:
        pipe.generator.local_attn_size = 6
    wrap(pipe)
    if wrap in (compiled, parallel):  # the stand-in's pipeline asks its model for these
        pipe._initialize_kv_cache = lambda **options: allocate(pipe, model, **options)
    if used:
        assert relative(pipe.twice(vectors["x_long"], vectors), vectors["sf.window6_sink1.out"]) < 1e-4
    swap_attention(pipe, folders["absolute"])
    assert relative(pipe.twice(vectors["x_long"], vectors), vectors["sf.window6_sink1.out"]) < 1e-4
    assert sum(isinstance(part, StreamingLatentAttention) for part in pipe.modules()) == 3
    assert all(cache["v"].numel() == 0 for cache in pipe.kv_cache1)


def allocate(pipe: TheirPipeline, model: nn.Module, device: Any, **options: Any) -> None:
    outer, pipe.generator.model = pipe.generator.model, model
    try:
        TheirPipeline._initialize_kv_cache(pipe, device=device, **options)
    finally:
        pipe.generator.model = outer


class FullyShardedDataParallel(nn.Module):
    """Named as torch's, whose shards need processes."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = inside


def test_sharded_models_are_refused(make: Any, folders: dict[str, Path]) -> None:
    pipe = make()
    blocks = pipe.generator.model.blocks
    blocks[1] = FullyShardedDataParallel(blocks[1])
    with unchanged(pipe), pytest.raises(UnsupportedModelError, match="before FSDP wraps"):
        swap_attention(pipe, folders["absolute"])


RANK = 4


def lora_on(pipe: TheirPipeline) -> None:
    """As LongLive's inference.py: every linear layer of the blocks, wrapped by PEFT and loaded from a file."""
    model = pipe.generator.model
    targets = [
        name for name, part in model.named_modules() if name.startswith("blocks.") and isinstance(part, nn.Linear)
    ]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    pipe.generator.model = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(8)
    for name, weight in pipe.generator.model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=draw) * 0.1


@pytest.fixture(scope="module")
def with_lora(golden: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with that LoRA, converted without loss."""
    root = tmp_path_factory.mktemp("lora")
    pipe = streaming_fixtures.pipeline_of(golden)
    lora_on(pipe)
    state = peft.get_peft_model_state_dict(pipe.generator.model)  # type: ignore[arg-type]
    torch.save({"generator_lora": state, "critic_lora": {}}, root / "lora.pt")
    convert(
        Source(golden, loras=(LoraFile(path=root / "lora.pt"),)),
        root / "longlive-mla",
        streaming_fixtures.RECIPES["absolute"],
    )
    return root / "longlive-mla"


def test_a_lora_counts_once(
    make: Any, with_lora: Path, folders: dict[str, Path], vectors: dict[str, Tensor], golden: Path
) -> None:
    """On the model when the swap comes: it is taken out, because the folder's weights have it."""
    dense = make()
    lora_on(dense)
    expected = dense.twice(vectors["x_long"], vectors)
    assert relative(expected, vectors["sf.window6_sink1.out"]) > 0.05
    pipe = make()
    lora_on(pipe)
    with pytest.warns(UserWarning, match="LoRA layers taken out"):
        swap_attention(pipe, with_lora)
    assert relative(pipe.twice(vectors["x_long"], vectors), expected) < 1e-4
    assert not any("lora" in name for name in pipe.state_dict())
    without = make()  # what the page says: leave the script's LoRA part out
    swap_attention(without, with_lora)
    assert relative(without.twice(vectors["x_long"], vectors), expected) < 1e-4


def test_the_pages_lines_for_longlive_run(
    make: Any, with_lora: Path, vectors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the page puts them, behind the script's own part about the LoRA."""
    dense, scope = make(kind=LongLiveAttention), {"pipeline": make(kind=LongLiveAttention)}
    for pipe in (dense, scope["pipeline"]):
        lora_on(pipe)
    monkeypatch.chdir(with_lora.parent)
    (snippet,) = blocks((Path(__file__).parents[4] / "docs" / "integrations" / "codebases.md").read_text(), "python")
    with pytest.warns(UserWarning, match="LoRA layers taken out"):
        exec(compile(snippet, "codebases.md", "exec"), scope)
    expected = dense.twice(vectors["x_long"], vectors)
    assert relative(scope["pipeline"].twice(vectors["x_long"], vectors), expected) < 1e-4


def test_a_lora_that_is_not_in_the_folder_is_not_lost(make: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = make()
    lora_on(pipe)
    with unchanged(pipe), pytest.raises(InputError, match=r"was not converted with one.*--lora FILE.*unload\(\)"):
        swap_attention(pipe, folders["absolute"])
    shutil.copytree(folders["absolute"], tmp_path / "bare")
    (tmp_path / "bare" / "conversion.json").unlink()
    with unchanged(pipe), pytest.raises(InputError, match="not converted with one"):
        swap_attention(pipe, tmp_path / "bare")


def test_a_lora_after_the_swap_is_refused(make: Any, with_lora: Path, vectors: dict[str, Tensor]) -> None:
    """In its place in the script it would count twice, in what the swap left alone."""
    pipe = make()
    swap_attention(pipe, with_lora)
    lora_on(pipe)
    pipe.begin()
    with pytest.raises(InputError, match=r"after swap_attention.*count twice.*--lora"):
        pipe.chunk(vectors["x"][:, :, :3], vectors["t"].expand(1, 3), vectors["context"], 0)


def test_a_failed_swap_leaves_the_lora_in_place(
    make: Any, with_lora: Path, monkeypatch: pytest.MonkeyPatch, vectors: dict[str, Tensor]
) -> None:
    pipe = make()
    lora_on(pipe)
    monkeypatch.setattr(
        type(pipe.generator.model.base_model.model.blocks[2]), "__setattr__", refuses("self_attn", after=2)
    )
    with unchanged(pipe), pytest.raises(RuntimeError, match="read only"):
        swap_attention(pipe, with_lora)
