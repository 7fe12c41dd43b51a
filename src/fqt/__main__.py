"""``python -m fqt``: the command line."""

from fqt.cli import main

if __name__ == "__main__":
    main()
