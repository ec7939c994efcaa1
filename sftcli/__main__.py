"""Entry point of the ``sft`` command and of ``python -m sftcli``."""

from sftcli.cli.app import main

if __name__ == "__main__":
    main()
