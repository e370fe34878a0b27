"""`python cli.py --prompt "a red apple"` draws a picture; `python cli.py --help` tells the rest."""

from flux_core.main import main

if __name__ == "__main__":
    raise SystemExit(main())
