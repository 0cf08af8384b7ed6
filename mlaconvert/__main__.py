"""`python -m mlaconvert`."""

from mlaconvert.cli import main

if __name__ == "__main__":
    main()
