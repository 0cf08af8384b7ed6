"""Converted models inside other people's code: diffusers' pipelines and the streaming codebases.

`diffusers` has the classes that its pipelines take, `streaming` puts latent attention into a codebase's own model.

    from mlaconvert.integrations.diffusers import WanMLATransformer3DModel

    transformer = WanMLATransformer3DModel.from_pretrained("wan-mla")  # for WanPipeline(transformer=...)
"""
