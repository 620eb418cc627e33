"""The console command `gkd-trainer`: `entry` runs a command, and each command is a module with a SUMMARY and a `run`.

Parsing is separate from running: `parser` and `config_file` read options for any command, `train_options` those of
`train`. No module here imports a heavy library at its top, so that help is instant.
"""

from gkd_trainer.cli.entry import main

__all__ = ["main"]
