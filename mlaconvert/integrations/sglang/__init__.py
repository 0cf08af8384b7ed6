"""Converted models in SGLang's diffusion engine: its chunks, sampler, text encoder, VAE and server, our transformer.

SGLang imports this package where an environment variable names it, and it registers the pipeline `WanMLAPipeline`:

    import os

    os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "mlaconvert.integrations.sglang"  # or exported in a shell

`transformer` loads the converted folder, `cache` is its latent cache as SGLang's stages hold one, `pipeline` puts both
into SGLang's causal stage. Needs sglang 0.5.23 or later, which is no dependency of mlaconvert.
"""

try:
    from sglang.multimodal_gen.registry import register_pipeline
except ImportError as error:
    raise ImportError(
        f"SGLang's diffusion engine cannot be imported ({error}); pip install 'sglang[diffusion]>=0.5.23'"
    ) from None

from mlaconvert.integrations.sglang.pipeline import WanMLAPipeline, WanMLAPipelineConfig, WanMLASamplingParams

__all__ = ["WanMLAPipeline", "WanMLAPipelineConfig", "WanMLASamplingParams"]

# Whoever imports the package again, as a reload does, registers the same classes again.
register_pipeline(
    WanMLAPipeline,
    sampling_param_cls=WanMLASamplingParams,
    pipeline_config_cls=WanMLAPipelineConfig,
    overwrite=True,
)
