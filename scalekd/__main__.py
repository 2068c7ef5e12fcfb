"""``python -m scalekd``, which ``accelerate launch -m scalekd`` and ``torchrun -m scalekd`` run."""

from scalekd.cli.main import main

if __name__ == "__main__":
    main()
