"""Read mutated caches: every outcome must be success or one of our own errors, in little memory.

    python -m benchmarks.fuzz_reader --mutations 100000

The code is ``tests/reliability/fuzz_reader.py``, of which the tests run a short form.
"""

from tests.reliability.fuzz_reader import main

if __name__ == "__main__":
    main()
