"""A transformer of two streams, video and text, that makes a video chunk by chunk along a camera's path.

`model` runs it: the prompt once, then for every chunk the past that it is given, and the chunk at each timestep.
`turns` is what position and camera do to queries, keys and values, `attention` has it dense and latent, `blocks` and
`text` are the rest.

    import torch
    from mlaconvert import load_camera_model
    from mlaconvert.model.camera.model import Frames
    from mlaconvert.model.camera.turns import Cameras

    model = load_camera_model("worldplay-mla")
    text = model.read(torch.zeros(1, 9, 3584))  # once a prompt
    still = Cameras(torch.eye(4).expand(4, 4, 4), torch.eye(3).expand(4, 3, 3))
    frames = Frames(torch.randn(1, 65, 4, 30, 52), torch.full((4,), 14.0), torch.zeros(4), still)
    past = model.remember(frames, text)  # once a chunk
    velocity = model(frames, text, past)
"""
