"""Speed, as ratios measured side by side in one run; see ``python -m benchmarks.speed --help``.

Every question has a module with ``run(settings) -> dict``; what it returns is written to
``benchmarks/results/speed.json`` together with machine, versions, command and load. Machines are
never alone: processor seconds stand beside the clock's, arms take turns, and medians are kept.
"""
