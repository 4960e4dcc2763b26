"""``python -m skipscope``: the command line; also what torchrun starts."""

from skipscope.cli import main

if __name__ == "__main__":
    main()
