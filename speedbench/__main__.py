"""`python -m speedbench` is `speedbench`. Guarded, because engines import the main module again."""

import sys

if __name__ == "__main__":
    from speedbench.cli import main

    sys.exit(main())
