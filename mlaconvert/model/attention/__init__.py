"""Self-attention, dense and latent, and what each costs.

`kernel` is what both share, `dense` the teacher's, `latent` the converted one's, absorbed or expanded, whichever `cost`
finds cheaper.

    from mlaconvert.model.attention.latent import LatentAttention
    from mlaconvert.model.load import load_model

    converted = [block for block in load_model("tiny-mla").blocks if isinstance(block.self_attn, LatentAttention)]
"""
