"""What config.json and recipes say of a model: its geometry, how it sees time, its latent attention.

`geometry`, `streaming` and `mla` are the dataclasses, with a text and a range for every field; `parsing` reads them
strictly from plain data, `budget` is the default cache at any width.

    from mlaconvert.config.budget import default_budget
    from mlaconvert.config.geometry import WanConfig

    default_budget(WanConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960))  # 192 + 32 scalars a token
"""
