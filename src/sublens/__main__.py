"""``python -m sublens`` is the command ``sublens``."""

from sublens.cli import main

if __name__ == "__main__":
    main()
