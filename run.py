"""`python run.py ...` is `speedbench run ...`. Guarded, because engines import this file again."""

import sys

if __name__ == "__main__":
    from speedbench.cli import main

    sys.exit(main(["run", *sys.argv[1:]], prog="run.py"))
