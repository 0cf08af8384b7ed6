"""Put the tiny model's training loss and a strip of its rollouts on record.

    python examples/show_tiny.py                       # writes examples/tiny.png

Below the loss, three 60-frame rollouts: three given frames of a held-back clip and what the model makes of them, eight
frames of it, above the clip itself; then two videos from noise and a caption alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

from mlaconvert import LatentSize, Sampler, load_model, rollout
from mlaconvert.clips import tiny
from mlaconvert.clips.tiny.clips import HEIGHT, HELD_BACK, WIDTH, embed_captions, null_context, sample_scenes
from mlaconvert.demo import CAPTIONS, FRAMES, GUIDANCE, STEPS, generate
from mlaconvert.generation.sheets import contact_sheet
from mlaconvert.model.rollout import Given


def main() -> None:
    model, record = load_model("tiny"), json.loads((Path(tiny.__file__).parent / "training.json").read_text())
    scenes = sample_scenes(CAPTIONS, HELD_BACK + 1)
    fresh = rollout(
        model,
        embed_captions(sample_scenes(2, HELD_BACK + 2).tokens()),
        size=LatentSize(frames=FRAMES, height=HEIGHT, width=WIDTH),
        given=Given(null_context=null_context()),
        sampler=Sampler.many_step(STEPS, guidance=GUIDANCE),
    )
    strips = [
        contact_sheet([generate(model), scenes.draw(torch.arange(FRAMES))], ["continued", "drawn"], given=3),
        contact_sheet([torch.cat(list(fresh), 2)], ["from noise"]),
    ]
    figure = Figure(figsize=(10, 10), layout="constrained")
    axes = figure.subplots(3, 1, height_ratios=[1.2, 3, 1])
    steps, losses = zip(*record["curve"], strict=True)
    axes[0].plot(steps, losses, linewidth=1)
    axes[0].set(xlabel="step", ylabel="training loss (MSE of velocity)", ylim=(0.02, 0.2))
    for axis, strip, title in zip(
        axes[1:],
        strips,
        ("continued from three given frames, beside the drawn clip", "from noise and a caption"),
        strict=True,
    ):
        axis.imshow(strip)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.savefig(Path(__file__).with_name("tiny.png"), dpi=110)


if __name__ == "__main__":
    main()
