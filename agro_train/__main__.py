"""`python -m agro_train` (and `accelerate launch -m agro_train`) is the command `agro`."""

from agro_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
