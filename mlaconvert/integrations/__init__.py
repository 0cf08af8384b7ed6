"""Converted models inside other people's code: diffusers' pipelines and the streaming codebases."""
