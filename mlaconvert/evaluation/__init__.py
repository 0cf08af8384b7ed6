"""How close a converted model is to its teacher, what it saves, and how fast it is.

`run.evaluate_models` measures models beside one teacher: `conditions` says on what, `compare` measures one model
(`losses`, `timesteps`, `drift`), `figures` defines every figure once for JSON, tables, page and card. `sweep` measures
many conversions of one checkpoint, `bench` the speed of random weights.
"""
