"""`python -m agro_kernels`: the self-check, for bug reports."""

from agro_kernels.self_check import main

if __name__ == "__main__":
    raise SystemExit(main())
