"""From a dense checkpoint to a folder with latent attention.

`recipe` says what is wanted, `plan` what that makes of a model; `from_weights` and `from_clips` (with `calibration`)
make the layers, `assembly` and `journal` write them, `verify` compares, `provenance` and `records` say later where a
model came from. `analyze` only looks.

    from mlaconvert.conversion.recipe import ConvertRecipe
    from mlaconvert.conversion.run import convert

    report = convert("tiny", "tiny-mla", ConvertRecipe(init="svd"))
"""
