"""Every kind of damage to every kind of file of a cache: who notices.

    python -m benchmarks.damage_matrix            # minutes on one core; writes docs/reliability.md
    python -m benchmarks.damage_matrix --files 1  # a quick look

The code is ``tests/reliability/damage_matrix.py``, of which the tests run a short form.
"""

from tests.reliability.damage_matrix import main

if __name__ == "__main__":
    main()
