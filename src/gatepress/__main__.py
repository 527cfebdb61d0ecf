"""`python -m gatepress` is `gatepress`."""

from gatepress.cli.app import main

if __name__ == "__main__":
    main()
