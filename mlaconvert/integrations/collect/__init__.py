"""Windows of self-attention recorded while a model's own code runs, for a calibration of models that ours cannot run.

`passes` says what a call of another codebase's self-attention attended to, `recorder` keeps a sample of it, and
`session` is `collect` itself, around the user's run.

    from mlaconvert.integrations.collect import collect

    with collect(pipeline.generator.model, output="moments"):
        pipeline.inference()
"""

from mlaconvert.integrations.collect.passes import Pass
from mlaconvert.integrations.collect.session import Collection, collect

__all__ = ["Collection", "Pass", "collect"]
