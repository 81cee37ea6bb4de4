"""`python -m datastore` is the `datastore` command."""

from datastore.cli.main import main

if __name__ == "__main__":
    main()
