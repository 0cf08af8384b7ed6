"""Videos from a model: prompts, rollout through the cache, pictures and movies.

`request` says what is wanted, `plan` what that makes of a model, `passes` run it chunk by chunk into `chunks`, from
which an interrupted run goes on; `movies` and `output` write files, `vbench_names` many at once.

    from mlaconvert.generation.request import Generation
    from mlaconvert.generation.run import generate

    report = generate("tiny", "video", Generation(frames=9, prompts=("large red disc right gray",)))
"""
