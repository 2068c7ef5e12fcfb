"""Kill ``cache-teacher`` at random moments, resume it, and see what is left.

    python -m benchmarks.kill_harness --kills 100 --processes 1
    python -m benchmarks.kill_harness --kills 100 --processes 2

The code is ``tests/reliability/kill_harness.py``, of which the tests run a short form.
"""

from tests.reliability.kill_harness import main

if __name__ == "__main__":
    main()
