"""``python -m tsforge`` is the same as the ``tsforge`` command."""

from tsforge.cli import main

if __name__ == "__main__":
    main()
