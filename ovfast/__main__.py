"""`python -m ovfast`: the same command as `ovfast`."""

from ovfast.cli import main

if __name__ == "__main__":
    main()
