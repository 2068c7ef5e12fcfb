"""Speed, as ratios measured in one run; see ``python -m benchmarks.speed --help``.

Every question has a module with ``run(settings) -> dict``, whose result is written to
``benchmarks/results/speed.json`` together with machine, versions, command and load. Because other
processes may use the machine, processor seconds are reported with wall-clock seconds, the compared
variants take turns, and medians are reported.
"""
