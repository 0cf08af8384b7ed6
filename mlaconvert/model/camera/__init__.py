"""A transformer of two streams, video and text, that makes a video chunk by chunk along a camera's path.

`model` runs it: the prompt once, then for every chunk the past that it is given, and the chunk at each timestep.
`turns` is what position and camera do to queries, keys and values, `attention` has it dense and latent, `blocks` and
`text` are the rest.

    from mlaconvert import load_camera_model
    from mlaconvert.model.camera.model import Frames

    model = load_camera_model("worldplay-mla")
    text = model.read(states, letters=letters, image=image)  # once a prompt
    past = model.remember(Frames(chosen, timesteps, actions, cameras), text)  # once a chunk
    velocity = model(Frames(chunk, timesteps, actions, cameras), text, past)
"""
