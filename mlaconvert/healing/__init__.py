"""Short trainings that bring a converted model back to its teacher, and on to a few-step student.

`recipe` says what is wanted, `stages` hold a loss each, `batches` and `frames` what they see, `loop` trains, `state`
keeps it, `output` writes the model, `estimate` says before what it will take.

    from mlaconvert.healing.recipe import HealRecipe
    from mlaconvert.healing.run import heal

    report = heal("tiny-mla", "tiny-healed", HealRecipe(stage="distill", steps=100))
"""
