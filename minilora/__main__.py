"""`python -m minilora VERB` is `minilora VERB`."""

from minilora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
