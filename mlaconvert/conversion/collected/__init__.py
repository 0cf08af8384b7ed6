"""Calibration from what a model's own code was seen to do: windows that `mlaconvert.collect` recorded.

`record` is the folder, written while a pipeline runs and read without trusting it; `walk` gives its windows layer by
layer, in the place of clips that go through a model; `settings` is what of a recipe such a calibration can follow.

    from pathlib import Path
    from mlaconvert.conversion.collected.record import Collected

    collected = Collected(Path("moments"))
    x = collected.read(collected.windows[0], layer=3)  # [1, tokens, width]
"""
