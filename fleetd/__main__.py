"""`python -m fleetd`: the same as the console script."""

from fleetd.cli.fleetd import main

if __name__ == "__main__":
    main()
