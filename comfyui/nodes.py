"""The nodes: load a model, switch prompts, sample; and two for the built-in model, which needs no other files."""

from __future__ import annotations

from typing import Any, cast, get_args

from comfy_api.latest import ComfyExtension, io

from mlaconvert.clips.tiny.clips import embed_captions
from mlaconvert.config.cache_dtype import CACHE_DTYPES
from mlaconvert.config.streaming import SHIFT, Positions
from mlaconvert.generation.plan import caption_tokens
from mlaconvert.generation.request import Generation
from mlaconvert.model.attention.kernel import AttentionMode

from . import models, sampling

Model = io.Custom("MLACONVERT_MODEL")
Prompts = io.Custom("MLACONVERT_PROMPTS")
CATEGORY = "mlaconvert"
OWN = "model's own"


class LoadModel(io.ComfyNode):  # type: ignore[misc]
    """A folder below ComfyUI's models, or a repository on the Hub."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI's `io.ComfyNode`."""
        return io.Schema(
            node_id="MlaconvertLoadModel",
            display_name="MLA Load Model",
            category=CATEGORY,
            description="Loads a model that mlaconvert converted, or a dense Wan model that streams.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=[*models.folders(), models.BUILT_IN],
                    tooltip="A folder below models/mlaconvert or models/diffusion_models. tiny is the small model that "
                    "comes with mlaconvert.",
                ),
                io.String.Input(
                    "hub_id", default="", tooltip="owner/name on the Hugging Face Hub, instead of the folder."
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", "bfloat16", "float16", "float32"],
                    tooltip="auto: the file's own on a CPU, else bfloat16.",
                ),
                io.Combo.Input(
                    "cache_dtype",
                    options=[OWN, *CACHE_DTYPES],
                    tooltip="What the cache of the past is narrowed to.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(get_args(AttentionMode)),
                    tooltip="How latent attention computes: the same to rounding. auto takes what is cheaper.",
                ),
            ],
            outputs=[Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, folder: str, hub_id: str, dtype: str, cache_dtype: str, attention: str) -> io.NodeOutput:
        """The model, not yet on the GPU."""
        return io.NodeOutput(
            models.load(
                models.find(folder, hub_id),
                dtype=None if dtype == "auto" else dtype,
                attention=attention,
                cache_dtype=None if cache_dtype == OWN else cache_dtype,
            )
        )


class PromptSwitch(io.ComfyNode):  # type: ignore[misc]
    """A further prompt, from a chunk on; several are chained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI's `io.ComfyNode`."""
        return io.Schema(
            node_id="MlaconvertPromptSwitch",
            display_name="MLA Prompt Switch",
            category=CATEGORY,
            description="A prompt that takes over at a chunk. Chain several by `others`, in any order.",
            inputs=[
                io.Conditioning.Input("conditioning"),
                io.Int.Input(
                    "chunk",
                    default=1,
                    min=1,
                    max=10**6,
                    tooltip="The chunk at which it begins. The first prompt begins at chunk 0; a chunk is three latent "
                    "frames, which are 12 video frames, unless the model says otherwise.",
                ),
                Prompts.Input("others", optional=True),
            ],
            outputs=[Prompts.Output(display_name="prompts")],
        )

    @classmethod
    def execute(cls, conditioning: Any, chunk: int, others: list[sampling.Switch] | None = None) -> io.NodeOutput:
        """The prompts with this one added."""
        return io.NodeOutput([*(others or []), (chunk, conditioning)])


class Sample(io.ComfyNode):  # type: ignore[misc]
    """A video, chunk by chunk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI's `io.ComfyNode`."""
        return io.Schema(
            node_id="MlaconvertSample",
            display_name="MLA Sample Video",
            category=CATEGORY,
            description="Generates a video chunk by chunk through the model's cache, whose size does not depend on the "
            "length.",
            inputs=[
                Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Used where cfg is not 1. Without one, cfg is 1."
                ),
                Prompts.Input("later_prompts", optional=True),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=True,
                    tooltip="Of the first video's noise; further ones of a batch count up.",
                ),
                io.Int.Input("width", default=0, min=0, max=16384, step=8, tooltip="Pixels. 0: what is usual."),
                io.Int.Input("height", default=0, min=0, max=16384, step=8, tooltip="Pixels. 0: what is usual."),
                io.Int.Input(
                    "length",
                    default=0,
                    min=0,
                    max=10**6,
                    tooltip="Video frames; Wan's VAE makes 1 + a multiple of 4. 0: what is usual, 81.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Euler steps. 0: the four steps of a few-step student, else what is usual.",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance by the negative prompt; 1 is off. 0: off for few-step students, else the usual.",
                ),
                io.Float.Input("shift", default=SHIFT, min=0.01, max=100.0, step=0.1),
                io.Int.Input(
                    "window_frames", default=0, min=0, max=10**4, tooltip="Latent frames seen. 0: the model's own."
                ),
                io.Int.Input(
                    "sink_frames",
                    default=-1,
                    min=-1,
                    max=10**4,
                    tooltip="First latent frames, which stay in the window. -1: the model's own.",
                ),
                io.Combo.Input(
                    "positions",
                    options=[OWN, *get_args(Positions)],
                    tooltip="Where frames are counted from: window for videos longer than the model was trained on.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(
        cls, model: models.LoadedModel, positive: Any, negative: Any = None, later_prompts: Any = None, **widgets: Any
    ) -> io.NodeOutput:
        """The latents; of models that work on pixels, those (see `ToImage`)."""
        sink, positions = widgets["sink_frames"], widgets["positions"]
        request = Generation(
            samples=widgets["batch_size"],
            seed=widgets["seed"],
            height=widgets["height"] or None,
            width=widgets["width"] or None,
            steps=widgets["steps"] or None,
            guidance=widgets["cfg"] or None,
            shift=widgets["shift"],
            window_frames=widgets["window_frames"] or None,
            sink_frames=None if sink < 0 else sink,
            positions=None if positions == OWN else cast(Positions, positions),
        )
        plan = sampling.plan_video(
            model, request, positive=positive, negative=negative, later=later_prompts or (), length=widgets["length"]
        )
        return io.NodeOutput({"samples": sampling.sample(model, plan)})


class Caption(io.ComfyNode):  # type: ignore[misc]
    """A caption for the built-in model, which has its own table of words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI's `io.ComfyNode`."""
        return io.Schema(
            node_id="MlaconvertCaption",
            display_name="MLA Caption (tiny model)",
            category=CATEGORY,
            description="A caption for tiny and its conversions, such as 'large red disc right, sky'.",
            inputs=[
                io.String.Input(
                    "caption",
                    default="large red disc right, sky",
                    tooltip="SIZE COLOR SHAPE HEADING, BACKGROUND; empty for the negative prompt.",
                )
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, caption: str) -> io.NodeOutput:
        """The caption's embedding."""
        return io.NodeOutput([[embed_captions(caption_tokens(caption)), {}]])


class ToImage(io.ComfyNode):  # type: ignore[misc]
    """The built-in model's pixels, which need no VAE, as images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI's `io.ComfyNode`."""
        return io.Schema(
            node_id="MlaconvertToImage",
            display_name="MLA Pixels to Image (tiny model)",
            category=CATEGORY,
            description="Pixels of tiny and its conversions as images; other models' latents go through VAE Decode.",
            inputs=[io.Latent.Input("samples")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any]) -> io.NodeOutput:
        """Frames [videos * F, H, W, 3] in [0, 1]."""
        pixels = samples["samples"]
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise ValueError(f"these are latents of {pixels.shape[1]} channels, not pixels; connect VAE Decode instead")
        frames = pixels.permute(0, 2, 3, 4, 1).flatten(0, 1)
        return io.NodeOutput((frames.clamp(-1, 1) + 1) / 2)


class Extension(ComfyExtension):  # type: ignore[misc]
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes."""
        return [LoadModel, PromptSwitch, Sample, Caption, ToImage]


async def comfy_entrypoint() -> Extension:
    """What ComfyUI calls when it loads the package."""
    return Extension()
