"""How close a converted model is to its teacher, what it saves, and how fast it is.

`run.evaluate` measures models beside one teacher: `conditions` says on what, `compare` measures one model
(`losses`, `timesteps`, `drift`), `figures` defines every figure once for JSON, tables, page and card, `verdict`
says what they come to. `sweep` measures many conversions of one checkpoint, `bench` the speed of random weights.

    from mlaconvert.clips.tiny.clips import held_back
    from mlaconvert.evaluation.losses import measure_fidelity
    from mlaconvert.model.load import load_model

    measure_fidelity(load_model("tiny"), load_model("tiny-mla"), held_back(16)).velocity_error
"""
