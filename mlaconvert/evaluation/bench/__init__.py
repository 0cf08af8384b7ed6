"""Speed and memory of dense and latent attention, side by side in one run.

`run.bench` measures what a `setting.BenchSetting` describes: `runner` is a side as it runs, `memory` and `flops` are
what it takes; what the machine can do is measured in `mlaconvert.model.rates`.

    from mlaconvert.evaluation.bench.run import bench
    from mlaconvert.evaluation.bench.setting import BenchSetting

    report = bench(BenchSetting(geometry="tiny", kv_ranks=(9, 18)))
"""
