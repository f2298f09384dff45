"""`python -m fides_plugins.cli` is the command `fides`."""

from fides_plugins.cli import main

if __name__ == "__main__":
    main()
