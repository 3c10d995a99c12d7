"""`python -m vqhit` is the `vqhit` command."""

from vqhit.cli import main

if __name__ == "__main__":
    main()
