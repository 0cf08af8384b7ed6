"""The transformer itself: window, cache, attention, blocks, schedule and rollout.

`window` alone knows who sees whom; `cache` keeps what it says, `rope` turns keys, `attention` and `blocks` compute,
`wan` is the whole model, `conditions` what it is given besides noise, `load` reads it, `schedule` and `rollout`
generate with it. `memory` and `flops` say what it will take, and `rates` how long that is on a device.

    from mlaconvert.model.load import load_model

    model = load_model("tiny")  # dense or converted: a path or a Hub id
"""
