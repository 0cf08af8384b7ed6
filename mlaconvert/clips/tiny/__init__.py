"""The built-in model and the clips that it was trained on.

`clips` draws them and embeds their captions; beside it lie the model's files.

    from mlaconvert.clips.tiny.clips import held_back

    clips = held_back(16)  # which it has never seen
"""
