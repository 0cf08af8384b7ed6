"""Converted models inside other people's code: diffusers' pipelines, SGLang's engine and the streaming codebases.

`contract` says what an engine must know of a model. Built on it, `diffusers` has the classes that its pipelines take,
`sglang` is a package that SGLang's diffusion engine loads, and `streaming` puts latent attention into a codebase's own
model. `collect` records a model in its own code.

    from mlaconvert.integrations.diffusers import WanMLATransformer3DModel

    transformer = WanMLATransformer3DModel.from_pretrained("wan-mla")  # for WanPipeline(transformer=...)
"""
