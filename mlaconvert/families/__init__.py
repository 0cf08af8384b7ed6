"""Model families: which checkpoint is what, under which names, and how LoRAs and wrappers lie around it.

`open` recognises a checkpoint by its family (`protocol`; `wan` is one), after `wrappers` took off what trainers put
around names; `causal` and `classes` read codebases' own fields, `lora` and `adapter` add LoRAs.

    from mlaconvert.families.open import open_checkpoint

    with open_checkpoint("tiny") as checkpoint:
        weights = checkpoint.attention(0)  # of layer 0, by canonical names
"""
