"""`python -m gkd_trainer` is `gkd-trainer`, also for `accelerate launch -m gkd_trainer train ...`."""

from gkd_trainer.cli import main

if __name__ == "__main__":
    main()
