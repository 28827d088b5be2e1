"""`python -m smelt`, which is also what torchrun starts; the commands live in `smelt.cli`."""

from smelt.cli.app import main

if __name__ == "__main__":
    main()
