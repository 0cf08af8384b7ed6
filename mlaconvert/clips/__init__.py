"""Clips for calibrating, healing and evaluating: stored, drawn, encoded from videos, or made by a teacher.

`folder` reads and writes them, `encode` makes them of `videos` (`footage` decodes), `teacher_made` lets a model
generate its own, `tiny` draws the built-in model's.

    from pathlib import Path

    from mlaconvert.clips.folder import load_clips
    from mlaconvert.config.geometry import WanConfig

    config = WanConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
    latents, context = load_clips(Path("clips"), config, 8)  # [8, C, F, H, W] and [8, T, text_dim]
"""
