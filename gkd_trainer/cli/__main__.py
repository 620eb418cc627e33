"""`python -m gkd_trainer.cli` is `gkd-trainer`."""

from gkd_trainer.cli.entry import main

if __name__ == "__main__":
    main()
