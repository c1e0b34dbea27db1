"""`python -m dpcache`: the command line."""

from dpcache.apps.cli import main

if __name__ == "__main__":
    main()
